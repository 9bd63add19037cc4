"""One step recorded: forward, backward, the look at the gradients, and the updates where their optimizers allow it.

It is the runner's own step, of which only that is left out which is no work of the device: counting, schedules, readings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from axontrain.execution.assumptions import Assumptions
from axontrain.execution.options import Options
from axontrain.execution.recording import Recorder, Recording
from axontrain.execution.statics import Inputs, Outputs, Updated, unlike
from axontrain.execution.steps import OneLoss, SeveralLosses
from axontrain.guard import BufferGuard
from axontrain.objective import Step
from axontrain.update import Update

COMPARED = 2  # the first shows what is recorded wrong; the second, what would be another each time


class UnrecordableError(Exception):
    """Why a step cannot be recorded, found before it is tried; and the line of the user's, where there is one."""


class NotYetError(UnrecordableError):
    """Why a step cannot be recorded before it was done some more times."""


class StepGraph:
    """A step of a runner, recorded.

    Args:
        run: the runner; whose steps were done so often that all it makes at first is there.
        updates: of its optimizers.
        batch: the first that it is of.
        apart: why the optimizers' steps are done after it, and are not recorded; "" if they are.
        predictions: whether the step gives predictions and targets.
    """

    def __init__(
        self, run: OneLoss | SeveralLosses, updates: Sequence[Update], batch: Any, *, apart: str, predictions: bool
    ) -> None:
        self.run, self.updates, self.apart, self.predictions = run, updates, apart, predictions
        self.whole = whole = not apart
        self.inputs = Inputs(batch)
        self.options, self.assumptions = Options(updates, whole=whole), Assumptions(run.objective)
        self.left = COMPARED  # steps that are still to be held against those without
        self.refused = 0  # of them, how many in a row were another
        self.updated: list[Updated] = []  # by the last step that was computed
        self.gradients: list[tuple[Tensor, Tensor]] = []  # of parameters, where the update is not recorded, or may raise
        self.raises = any(update.spec.on_nonfinite == "raise" for update in updates)
        # Torch's own leave gradients where they are; others may keep them, and a replay writes to the same memory.
        optimizers = [optimizer for update in updates for optimizer in update.optimizers]
        self._lends = all(type(optimizer).__module__.startswith("torch.optim") for optimizer in optimizers)
        self._in_record = False
        self.recording: Recording | None = None
        self.outputs: Outputs | None = None

    def compute(self) -> Step:
        """The step of the batch in memory, as far as the device does it; gradients are left where updates are not recorded.

        Raises:
            UnrecordableError: if an optimizer has nothing to update, or would need another rate for a second update; if the
                step writes to its batch, or to a value on the host.
        """
        self.updated, versions = [], self.inputs.versions()
        try:
            with self._on_device():
                step = self.run(self.inputs.batch)
        finally:
            self.inputs.let_go()
        if type(step) is not Step:
            raise UnrecordableError(f"train_step returns a {type(step).__name__}, which may have more than a Step")
        if versions != self.inputs.versions():
            raise UnrecordableError("a step writes to its batch, where a replay would write to a copy")
        for name, value in step.values.items():
            if isinstance(value, Tensor) and value.device != step.loss.device:
                raise UnrecordableError(f"the value {name!r} is computed on {value.device}, and not where the loss is")
        updates = [update for update, *_ in self.updated]
        for update in updates:
            if update.scheduled and not update.sees_progress and updates.count(update) > 1:
                raise UnrecordableError(f"torch's schedule of the optimizer {update.name!r} steps between its updates")
        return step

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """For the block, updates of the runner are what the device does of them, and all buffers are copied."""
        run, buffers = self.run, self.run.buffers
        methods, flags = [self._update_of(update) for update in self.updates], [update.not_finite for update in self.updates]
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
            for update, flag in zip(self.updates, flags, strict=True):
                del update.update
                update.not_finite = flag  # not one in the memory of a recording

    def _update_of(self, update: Update) -> Any:
        def on_device(loss: Tensor, terms: Mapping[str, Any]) -> Tensor:
            flag = update.judge(loss)
            if flag is None:
                raise UnrecordableError(f"all parameters of the optimizer {update.name!r} are frozen")
            if self.raises and self._in_record:
                self._keep_gradients(update)
            if self.whole:
                update.step(flag)
            update.not_finite = flag
            self.updated.append((update, loss, terms, flag))
            return flag

        return on_device

    def record(self, recorder: Recorder) -> None:
        """Record it. Nothing runs, and the generators are as they were; what Python does in a step, it has done."""
        with contextlib.ExitStack() as stack:
            for update in self.updates:
                stack.enter_context(update.recorded())
            stack.callback(self.drop_gradients)
            self.gradients, self._in_record = [], True
            stack.callback(setattr, self, "_in_record", False)
            with self.options:
                self.recording, self.outputs = recorder.record(self._given, self.assumptions.contents.generators)
            if not self.whole and not self.raises:
                for update in self.updates:
                    self._keep_gradients(update)

    def _keep_gradients(self, update: Update) -> None:
        self.gradients += [(p, p.grad) for p in update.tensors if p.grad is not None]

    def drop_gradients(self) -> None:
        """Leave none behind."""
        for update in self.updates:
            for parameter in update.tensors:
                parameter.grad = None

    def _given(self) -> Outputs:
        step = self.compute()
        if self.predictions and (leaf := unlike((step.predictions, step.targets, step.sample_weights), of_a_step=True)):
            raise UnrecordableError(leaf)
        return Outputs(step, self.updated, self.inputs, predictions=self.predictions)

    def replay(self, batch: Any) -> tuple[Step, Sequence[Updated]] | None:
        """Do the step of a batch; None if it is not one of those that were recorded.

        Returns:
            The step, and its updates.
        """
        leaves = self.inputs.fitting(batch)
        if leaves is None or not self.assumptions.hold() or not self.options.hold():
            return None
        self.options.set()
        self.inputs.take(leaves)
        self.recording.replay()  # type: ignore[union-attr]  # it is there from record to close
        return self.outputs.given(leaves)  # type: ignore[union-attr]

    def put_gradients(self) -> None:
        """Put gradients of the last replay where updates, or an error about them, look for them."""
        for parameter, gradient in self.gradients:
            parameter.grad = gradient if self._lends else gradient.clone()

    def holds(self) -> bool:
        """Whether what was given when it was recorded is as it was."""
        return self.assumptions.hold() and self.options.hold()

    def broken(self) -> str:
        """What of it does not hold any more, in words; "" if that has no name."""
        try:
            return self.assumptions.broken() or self.options.broken()
        except Exception:  # of the user's, as of a value that has no text
            return ""

    def close(self) -> None:
        """Give its memory back, and let go of what lies in it."""
        if self.recording is not None:
            self.recording.close()
        self.recording = self.outputs = None
        self.updated, self.gradients = [], []
        for update in self.updates:
            for optimizer in update.optimizers:
                vars(optimizer).pop("found_inf", None)  # a flag in that memory, which a fused step was given
