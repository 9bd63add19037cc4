"""Step runners: forward, backward, update (see :mod:`axontrain.execution.runners`, which chooses one)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import LossError, NonFiniteError, ObjectiveError, kind_of, unknown
from axontrain.execution.precision import Precision
from axontrain.guard import BufferGuard
from axontrain.objective import Objective, Step, total
from axontrain.state import LoopState
from axontrain.update import Update

Runner = Callable[[Any], Step]


class OneLoss:
    """``train_step`` returns a Step: one backward, then every optimizer updates its parameters."""

    def __init__(
        self, objective: Objective, state: LoopState, after_backward: Callable[[LoopState], None] | None, precision: Precision
    ) -> None:
        self.objective, self.state, self.after_backward = objective, state, after_backward
        self.train_step = precision.within(objective.train_step)
        self.updates = [optimizer.update for optimizer in state.optimizers.values()]
        several = len(self.updates) > 1
        self.looks = [one.look for one in state.optimizers.values() if several and one.spec.on_nonfinite == "raise"]
        self.buffers = state.buffers = BufferGuard.of(objective)
        self.checked = False
        self.updating = True  # else a step ends with the gradients

    def __call__(self, batch: Any) -> Step:
        if self.buffers is not None:
            self.buffers.keep()
        step: Step = self.train_step(batch)
        if not self.checked:
            check(step, self.objective)
            self.checked = True
        loss = step.loss
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError:
            check(step, self.objective)  # says it better, where it is about the loss
            raise
        let_go(step)
        return self.finished(step)

    def finished(self, step: Step) -> Step:
        """After backward: the hook, the updates, and the buffers of a step that was skipped."""
        if self.after_backward is not None:
            self.state.loss = step.loss
            self.after_backward(self.state)
        if not self.updating:
            return step
        loss = step.loss
        try:
            for look in self.looks:  # before any of them updates
                look(loss, step.values)
            for update in self.updates:
                skipped = update(loss, step.values)
                step.skipped = skipped if step.skipped is None else torch.maximum(step.skipped, skipped)
        except NonFiniteError:
            if self.buffers is not None:
                self.buffers.put_back(torch.ones(()))
            raise
        if self.buffers is not None:
            self.buffers.put_back(step.skipped)  # type: ignore[arg-type]  # there is at least one update
        if self.state.vetoed:
            self.state.end_vetoes()
        return step


class SeveralLosses:
    """``train_step`` is a generator: it yields ``(optimizer_name, loss)`` for each update."""

    def __init__(
        self, objective: Objective, state: LoopState, after_backward: Callable[[LoopState], None] | None, precision: Precision
    ) -> None:
        self.objective, self.state, self.after_backward = objective, state, after_backward
        self.next = precision.within(next)
        self.buffers = state.buffers = BufferGuard.of(objective)

    def __call__(self, batch: Any) -> Step:
        if self.buffers is not None:
            self.buffers.keep()
        losses: dict[str, list[Tensor]] = {}
        skipped: Tensor | None = None
        generator: Any = self.objective.train_step(batch)
        returned = None
        while True:
            try:
                yielded = self.next(generator)
            except StopIteration as stop:
                returned = stop.value
                break
            update, loss, terms = self.taken(yielded)
            # Only into this optimizer's parameters: a generator's loss leaves nothing behind in the discriminator.
            if inputs := [p for p in update.tensors if p.requires_grad]:  # else all are frozen for now
                loss.backward(inputs=inputs)  # type: ignore[no-untyped-call]
            if self.after_backward is not None:
                self.state.loss = loss.detach()
                self.after_backward(self.state)
            skipped = self.updated(update, loss.detach(), terms, skipped)
            for name, value in {f"{update.name}_loss": loss, **terms}.items():
                losses.setdefault(name, []).append(value.detach())
        weight = self.objective.weight(batch) if returned is None else 1
        return self.finished(self.step_of(weight, losses, returned), skipped)

    def updated(self, update: Update, loss: Tensor, terms: Mapping[str, Any], skipped: Tensor | None) -> Tensor:
        """Update by one optimizer; above 0 if that or an earlier one of the step was skipped."""
        try:
            flag = update.update(loss, terms)
        except NonFiniteError:
            if self.buffers is not None:
                self.buffers.put_back(torch.ones(()))
            raise
        return flag if skipped is None else torch.maximum(skipped, flag)

    def finished(self, step: Step, skipped: Tensor | None) -> Step:
        """After the last update: the buffers of a step that was skipped."""
        step.skipped = skipped
        if self.buffers is not None and skipped is not None:
            self.buffers.put_back(skipped)
        if self.state.vetoed:
            self.state.end_vetoes()
        return step

    def taken(self, yielded: Any) -> tuple[Update, Tensor, Mapping[str, Tensor]]:
        """What a generator yielded, looked at: the optimizer, the loss, its terms."""
        of = f"{type(self.objective).__name__}.train_step"
        if not isinstance(yielded, tuple) or len(yielded) != 2:
            raise LossError(f"{of} yielded {kind_of(yielded)}; it yields (optimizer_name, loss)")
        name, loss = yielded
        if name not in self.state.optimizers:
            raise unknown(f"optimizer yielded by {of}:", name, self.state.optimizers)
        terms: Mapping[str, Tensor] = {}
        if not isinstance(loss, Tensor):
            terms, loss = loss, total(loss, self.objective)
        update, what = self.state.optimizers[name], f"{of} yielded ({name!r}, loss); the"
        if any(p.requires_grad for p in update.tensors):
            check(Step(loss), self.objective, what)
        else:  # all are frozen for now, and nothing has to have a graph
            check_scalar(loss, what)
        return update, loss, terms

    def step_of(self, weight: int | Tensor, losses: Mapping[str, list[Tensor]], returned: Any) -> Step:
        """The Step of a batch from its weight, from the losses that were yielded, and from what the generator returned."""
        if returned is not None and not isinstance(returned, Step):
            raise ObjectiveError(
                f"{type(self.objective).__name__}.train_step returned {kind_of(returned)}; a generator returns None or a Step"
            )
        if not losses:
            raise ObjectiveError(f"{type(self.objective).__name__}.train_step yielded no (optimizer_name, loss)")
        values = {name: torch.stack([v.reshape(()) for v in of_name]).mean() for name, of_name in losses.items()}
        if returned is not None:
            let_go(returned)
            returned.values = {**values, **returned.values}
            return returned
        sum_of_losses = torch.stack([values[f"{name}_loss"] for name in self.state.optimizers if f"{name}_loss" in values])
        return Step(sum_of_losses.sum(), weight=weight, values=values)


def let_go(step: Step) -> None:
    """Whoever keeps the step is not to keep its graph."""
    step.loss = step.loss.detach()
    if isinstance(step.predictions, Tensor):
        step.predictions = step.predictions.detach()
    elif step.predictions is not None:
        step.predictions = _detached(step.predictions)
    if step.values:
        step.values = _detached(dict(step.values))


def _detached(value: Any) -> Any:
    """The same in plain containers; one of a library's own, which may be more than what it contains, is left as it is."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) is dict:
        return {key: _detached(item) for key, item in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


def check(step: Any, objective: Objective, what: str = "") -> None:
    """Say what is wrong with a step before autograd says it worse.

    Raises:
        ObjectiveError: if it is no Step.
        LossError: if its loss is no scalar tensor, has no graph, or sits on another device than the parameters.
    """
    name = type(objective).__name__
    if not isinstance(step, Step):
        raise ObjectiveError(f"{name}.train_step returned {kind_of(step)}; it returns an ax.Step (loss, predictions, ...)")
    loss, what = step.loss, what or f"{name}: the"
    check_scalar(loss, what)
    if "loss" in step.values:
        raise LossError(f"{name}: the Step's values have a 'loss', which is the name of its loss: call it otherwise")
    if not loss.requires_grad:
        raise LossError(
            f"{what} loss has no graph, so nothing can learn from it: it was computed from no trainable parameter, or under "
            f"torch.no_grad(), or by .detach(), .item() or .numpy()"
        )
    devices = {p.device for p in objective.parameters()}
    if devices and loss.device not in devices:
        raise LossError(
            f"{what} loss is on {loss.device}, the parameters on {', '.join(map(str, devices))}: compute it where they are"
        )


def check_eval(step: Any, objective: Objective) -> None:
    """The same for an evaluation step, whose loss needs no graph."""
    name = type(objective).__name__
    if not isinstance(step, Step):
        raise ObjectiveError(f"{name}.eval_step returned {kind_of(step)}; it returns an ax.Step (loss, predictions, ...)")
    check_scalar(step.loss, f"{name}: the")


def check_scalar(loss: Any, what: str) -> None:
    """Raise unless the loss is one number in a tensor."""
    if not isinstance(loss, Tensor):
        hint = ": of named terms it is their sum, and the terms are values=" if isinstance(loss, Mapping) else ""
        raise LossError(f"{what} loss is {kind_of(loss)}; in an ax.Step it is a scalar tensor{hint}")
    if loss.is_complex():
        raise LossError(f"{what} loss is complex, and what is least of complex numbers is not said: take .abs() or .real")
    if loss.numel() != 1:
        raise LossError(
            f"{what} loss is not a scalar but {tuple(loss.shape)}: reduce it, as by loss.mean() (the mean over the batch)"
        )
