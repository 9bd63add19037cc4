"""A step runner whose steps are followed by the averages of weights."""

from __future__ import annotations

from typing import Any

from axontrain.averages import Average
from axontrain.execution.steps import Runner
from axontrain.objective import Step, batch_size
from axontrain.state import LoopState
from axontrain.update import Update


class Averaged:
    """Steps as another runner does them; then the average of each optimizer that was at work takes its weights in."""

    def __init__(self, run: Runner, state: LoopState) -> None:
        self.run, self.state = run, state
        self.averages: list[tuple[Update, Average]] = [
            (update, update.average) for update in state.optimizers.values() if update.average is not None
        ]

    def __call__(self, batch: Any) -> Step:
        for update, average in self.averages:
            average.settle(self.state)
            average.begin()
            update.all_skipped = None
        step = self.run(batch)
        samples = batch_size(batch)
        for update, average in self.averages:
            if update.all_skipped is not None:  # it was at work
                average.stepped(update.all_skipped, samples)
        return step
