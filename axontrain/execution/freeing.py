"""A step runner whose optimizers update within backward, and free each gradient as soon as it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from axontrain.execution.steps import OneLoss, SeveralLosses
from axontrain.in_backward import UpdateInBackward
from axontrain.objective import Step
from axontrain.update import Update


class Freeing:
    """Steps as another runner does them; between forward and backward it has those optimizers get ready."""

    def __init__(self, run: OneLoss | SeveralLosses, updates: Sequence[UpdateInBackward]) -> None:
        self.run, self.updates = run, updates
        if isinstance(run, SeveralLosses):
            self._taken, run.taken = run.taken, self.taken  # type: ignore[method-assign]
        else:
            self._train_step, run.train_step = run.train_step, self.train_step

    def __call__(self, batch: Any) -> Step:
        try:
            return self.run(batch)
        finally:
            for update in self.updates:
                update.end()

    def train_step(self, batch: Any) -> Step:
        """Forward, and ready for backward."""
        step: Step = self._train_step(batch)
        if isinstance(step, Step) and isinstance(step.loss, Tensor) and step.loss.numel() == 1:  # else the runner says so
            for update in self.updates:
                update.begin(step.loss)
        return step

    def taken(self, yielded: Any) -> tuple[Update, Tensor, Mapping[str, Tensor]]:
        """What was yielded, and ready for its backward."""
        update, loss, terms = self._taken(yielded)
        for one in self.updates:
            one.end()
        if isinstance(update, UpdateInBackward):
            update.begin(loss)
        return update, loss, terms
