"""ReduceLROnPlateau: a lower learning rate when a reading no longer becomes better."""

from __future__ import annotations

from typing import Any

from axontrain.callback import Answer
from axontrain.callbacks.monitor import Monitor
from axontrain.errors import ConfigurationError, unknown
from axontrain.state import LoopState


class ReduceLROnPlateau(Monitor):
    """Multiply the learning rate by ``factor`` when ``monitor`` has not become better ``patience`` times in a row.

    It goes together with any schedule, whose rates are scaled from then on.

    Args:
        monitor, patience, mode, min_delta: see :class:`EarlyStopping`.
        factor: between 0 and 1.
        cooldown: so many looks after a reduction are not counted.
        min_lr: the lowest rate to go to (of the first parameter group; the others keep their proportion).
        optimizer: of which optimizer; all of them unless given.

    >>> ReduceLROnPlateau("val/loss", factor=0.5, patience=3)
    ReduceLROnPlateau('val/loss', patience=3)
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        *,
        factor: float = 0.1,
        patience: int = 10,
        mode: str | None = None,
        min_delta: float = 0.0,
        cooldown: int = 0,
        min_lr: float = 0.0,
        optimizer: str | None = None,
        **cadence: Any,
    ) -> None:
        super().__init__(monitor, patience=patience, mode=mode, min_delta=min_delta, **cadence)
        if not 0 < factor < 1:
            raise ConfigurationError(f"factor={factor!r}: between 0 and 1")
        if cooldown < 0 or min_lr < 0:
            raise ConfigurationError(f"cooldown={cooldown!r}, min_lr={min_lr!r}: 0 or more")
        self.factor, self.cooldown, self.min_lr, self.optimizer = factor, cooldown, min_lr, optimizer

    def before_fit(self, state: LoopState) -> Answer:
        """Check that the optimizer exists."""
        if self.optimizer is not None and self.optimizer not in state.optimizers:
            raise unknown(f"optimizer of {self!r}:", self.optimizer, state.optimizers)
        return super().before_fit(state)

    def acts(self, state: LoopState) -> Answer:
        """Reduce, and wait from the beginning."""
        for name, optimizer in state.optimizers.items():
            if self.optimizer in (None, name):
                optimizer.rescale(self.factor, self.min_lr)
        self.waited = -self.cooldown
        return None
