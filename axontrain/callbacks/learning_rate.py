"""LearningRate: the learning rate as a reading."""

from __future__ import annotations

from typing import Any

from axontrain.callback import Answer, Callback
from axontrain.state import LoopState


class LearningRate(Callback):
    """Record the learning rate of each optimizer: ``lr``, or ``lr/<name>`` where there are several.

    At each epoch's end, or with ``every=`` at any other cadence. Reading it costs no wait for the device.

    >>> LearningRate(every=100).every
    Every('100 steps')
    """

    def __init__(self, **cadence: Any) -> None:
        super().__init__(**cadence)
        # Only the hook that is wanted is overridden, so that the other costs nothing: that is seen on the instance.
        if self.every is None:
            self.after_epoch = self.look  # type: ignore[method-assign]
        else:
            self.after_batch = self.look  # type: ignore[method-assign]

    def look(self, state: LoopState) -> Answer:
        """Record."""
        several = len(state.optimizers) > 1
        state.record({f"lr/{name}" if several else "lr": update.lr for name, update in state.optimizers.items()})
        return None
