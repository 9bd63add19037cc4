"""One step recorded: forward, backward, the look at the gradients, and the update where its optimizers allow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from axontrain.execution.assumptions import Assumptions
from axontrain.execution.rates import Rates
from axontrain.execution.recording import Recorder
from axontrain.execution.statics import Inputs, Outputs
from axontrain.execution.steps import OneLoss, let_go
from axontrain.guard import BufferGuard
from axontrain.objective import Step
from axontrain.update import Update


class UnrecordableError(Exception):
    """Why a step cannot be recorded, found before it is tried."""


class StepGraph:
    """A step of a runner, recorded.

    Args:
        run: the runner, of one loss; whose steps were done so often that all it makes at first is there.
        updates: of the runner's optimizers.
        batch: the first that it is of.
        whole: whether the optimizers' steps are recorded; else they are done after it.
        predictions: whether the step gives predictions and targets.
    """

    def __init__(self, run: OneLoss, updates: Sequence[Update], batch: Any, *, whole: bool, predictions: bool) -> None:
        self.run, self.whole, self.predictions = run, whole, predictions
        self.updates = updates
        self.inputs = Inputs(batch)
        self.rates, self.assumptions = Rates(updates, whole=whole), Assumptions(run.objective)
        self.left = 0  # steps that are still to be held against eager
        self.gradients: list[tuple[Tensor, Tensor]] = []  # of parameters, where the update is not recorded

    def compute(self) -> Step:
        """The step of the batch in memory, as far as the device does it."""
        run, buffers = self.run, BufferGuard.of(self.run.objective)  # that copies all of them
        if buffers is not None:
            buffers.keep()
        step: Step = run.train_step(self.inputs.batch)
        step.loss.backward()  # type: ignore[no-untyped-call]
        let_go(step)
        flags = self.flags = list[Tensor]()
        for update in self.updates:
            flag = update.judge(step.loss)
            if flag is None:
                raise UnrecordableError(f"all parameters of the optimizer {update.name!r} are frozen")
            flags.append(flag)
            if self.whole:
                update.step(flag)
        step.skipped = flags[0] if len(flags) == 1 else torch.stack(flags).amax()
        if buffers is not None:
            buffers.put_back(step.skipped)
        return step

    def once(self) -> Step:
        """The step of the batch in memory, all of it, kernel by kernel; nothing of it is counted."""
        step = self.compute()
        if not self.whole:
            for update, flag in zip(self.updates, self.flags, strict=True):
                update.step(flag)
        return step

    def record(self, recorder: Recorder) -> None:
        """Record it. Nothing runs, and the generators are as they were; what Python does in a step, it has done."""
        updates, zeros = self.updates, [update.recorded() for update in self.updates]
        for one in zeros:
            one.__enter__()
        try:
            with self.rates:
                self.recording, outputs = recorder.record(self._given)
            self.outputs: Outputs = outputs
            if not self.whole:
                self.gradients = [(p, p.grad) for update in updates for p in update.tensors if p.grad is not None]
        finally:
            for one in zeros:
                one.__exit__(None, None, None)
            for update in updates:
                for parameter in update.tensors:
                    parameter.grad = None

    def _given(self) -> Outputs:
        step = self.compute()
        return Outputs(step, self.flags, self.inputs, predictions=self.predictions)

    def replay(self, batch: Any) -> tuple[Step, Sequence[Tensor]] | None:
        """Do the step of a batch; None if it is not one of those that were recorded.

        Returns:
            The step, and for each update its flag: above 0 if it was left out.
        """
        leaves = self.inputs.fitting(batch)
        if leaves is None or not self.assumptions.hold() or not self.rates.set():
            return None
        self.inputs.take(leaves)
        self.recording.replay()
        given = self.outputs.given(leaves)
        if not self.whole:
            for parameter, gradient in self.gradients:
                parameter.grad = gradient
            for update, flag in zip(self.updates, given[1], strict=True):
                update.step(flag)
        return given

    def broken(self) -> str:
        """What of it does not hold any more, in words; "" if that has no name."""
        return self.assumptions.broken() or self.rates.broken()

    def close(self) -> None:
        """Give its memory back."""
        self.recording.close()
