"""One step recorded: forward, backward, the look at the gradients, and the updates where their optimizers allow it.

It is the runner's own step, of which only that is left out which is no work of the device: counting, schedules, readings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from axontrain.execution.assumptions import Assumptions
from axontrain.execution.rates import Rates
from axontrain.execution.recording import Recorder
from axontrain.execution.statics import Inputs, Outputs, Updated
from axontrain.execution.steps import OneLoss, SeveralLosses
from axontrain.guard import BufferGuard
from axontrain.objective import Step
from axontrain.update import Update


class UnrecordableError(Exception):
    """Why a step cannot be recorded, found before it is tried; and the line of the user's, where there is one."""


class StepGraph:
    """A step of a runner, recorded.

    Args:
        run: the runner; whose steps were done so often that all it makes at first is there.
        updates: of its optimizers.
        batch: the first that it is of.
        whole: whether the optimizers' steps are recorded; else they are done after it.
        predictions: whether the step gives predictions and targets.
    """

    def __init__(
        self, run: OneLoss | SeveralLosses, updates: Sequence[Update], batch: Any, *, whole: bool, predictions: bool
    ) -> None:
        self.run, self.updates, self.whole, self.predictions = run, updates, whole, predictions
        self.inputs = Inputs(batch)
        self.rates, self.assumptions = Rates(updates, whole=whole), Assumptions(run.objective)
        self.left = 0  # steps that are still to be held against eager
        self.updated: list[Updated] = []  # by the last step that was computed
        self.gradients: list[tuple[Tensor, Tensor]] = []  # of parameters, where the update is not recorded

    def compute(self) -> Step:
        """The step of the batch in memory, as far as the device does it.

        Raises:
            UnrecordableError: if an optimizer has nothing to update, or would need another rate for a second update.
        """
        self.updated = []
        with self._on_device():
            step = self.run(self.inputs.batch)
        updates = [update for update, *_ in self.updated]
        for update in updates:
            if update.scheduled and not update.sees_progress and updates.count(update) > 1:
                raise UnrecordableError(f"torch's schedule of the optimizer {update.name!r} steps between its updates")
        return step

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """For the block, updates of the runner are what the device does of them, and all buffers are copied."""
        run, buffers = self.run, self.run.buffers
        methods = [self._update_of(update) for update in self.updates]
        run.buffers = BufferGuard.of(run.objective)
        before = run.updates if isinstance(run, OneLoss) else None
        if isinstance(run, OneLoss):
            run.updates = methods
        for update, method in zip(self.updates, methods, strict=True):
            update.update = method  # type: ignore[method-assign]
        try:
            yield
        finally:
            run.buffers = buffers
            if before is not None:
                run.updates = before  # type: ignore[union-attr]  # of one loss
            for update in self.updates:
                del update.update

    def _update_of(self, update: Update) -> Any:
        def on_device(loss: Tensor, terms: Mapping[str, Any]) -> Tensor:
            flag = update.judge(loss)
            if flag is None:
                raise UnrecordableError(f"all parameters of the optimizer {update.name!r} are frozen")
            if self.whole:
                update.step(flag)
            update.not_finite = flag
            self.updated.append((update, loss, terms, flag))
            return flag

        return on_device

    def once(self) -> Step:
        """The step of the batch in memory, all of it, kernel by kernel; nothing of it is counted."""
        step = self.compute()
        if not self.whole:
            for update, _, _, flag in self.updated:
                update.step(flag)
        return step

    def record(self, recorder: Recorder) -> None:
        """Record it. Nothing runs, and the generators are as they were; what Python does in a step, it has done."""
        with contextlib.ExitStack() as stack:
            for update in self.updates:
                stack.enter_context(update.recorded())
            stack.callback(self._drop_gradients)
            with self.rates:
                self.recording, outputs = recorder.record(self._given)
            self.outputs: Outputs = outputs
            if not self.whole:
                self.gradients = [(p, p.grad) for update in self.updates for p in update.tensors if p.grad is not None]

    def _drop_gradients(self) -> None:
        for update in self.updates:
            for parameter in update.tensors:
                parameter.grad = None

    def _given(self) -> Outputs:
        step = self.compute()
        return Outputs(step, self.updated, self.inputs, predictions=self.predictions)

    def replay(self, batch: Any) -> tuple[Step, Sequence[Updated]] | None:
        """Do the step of a batch; None if it is not one of those that were recorded.

        Returns:
            The step, and its updates.
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
            for update, _, _, flag in given[1]:
                update.step(flag)
        return given

    def broken(self) -> str:
        """What of it does not hold any more, in words; "" if that has no name."""
        return self.assumptions.broken() or self.rates.broken()

    def close(self) -> None:
        """Give its memory back."""
        self.recording.close()
