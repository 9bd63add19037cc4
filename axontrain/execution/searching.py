"""A step runner for optimizers whose step evaluates the loss by itself: LBFGS, SAM."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from axontrain.execution.beginning import Beginning, Changing
from axontrain.execution.steps import OneLoss
from axontrain.objective import Step
from axontrain.update import Update


class Searching:
    """Steps as another runner does them, whose update may have loss and gradients of the batch computed anew."""

    def __init__(self, run: OneLoss, update: Update) -> None:
        self.run, self.update = run, update
        self.changing = Changing(run.objective)

    def __call__(self, batch: Any) -> Step:
        beginning = Beginning(self.changing)

        def again() -> Tensor:
            self.update.evaluations += 1
            beginning.put_back()  # the same dropout: it is to be the same function of the weights
            self.run.updating = False
            try:
                return self.run(batch).loss
            finally:
                self.run.updating = True

        self.update.again = again
        try:
            return self.run(batch)
        finally:
            self.update.again = None
