"""Guard: a step of an optimizer, undone on the device where a flag says that it was not finite.

Fused optimizers skip by themselves when given ``found_inf``, as torch's GradScaler does. For the others everything that the
step may change is kept before, and put back by ``torch.where``. Neither reads the flag on the host.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from axontrain.errors import ConfigurationError

# Optimizers whose state begins as zeros, so that a skipped first update can leave zeros behind without a host read.
ZERO_STATE = ("SGD", "Adam", "AdamW", "Adamax", "RAdam", "RMSprop", "Adadelta", "Adagrad", "Muon")
# Buffers of so many elements cost less to keep than to ask about.
SMALL_BUFFER = 4096


class Guard:
    """One torch optimizer, stepped so that a flag undoes the step on the device."""

    def __init__(self, optimizer: torch.optim.Optimizer, fused: bool) -> None:
        self.optimizer, self.fused = optimizer, fused
        kind = type(optimizer)
        self.zeros = self._begins_as_zeros()
        self.kept: list[Tensor] = []
        self.live: list[Tensor] = []
        self.states = -1
        self.counts: bool | None = None  # whether a step changes numbers in its groups; None until one was seen
        self.plain = _plain_step(optimizer)
        if fused and kind is torch.optim.SGD:
            # A skipped first step would leave the fused kernel's momentum buffers uninitialised.
            for group in optimizer.param_groups:
                if group["momentum"]:
                    for p in group["params"]:
                        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step(self, flag: Tensor) -> None:
        """Step, unless ``flag`` is above 0."""
        if self.fused:
            self.optimizer.found_inf = flag  # type: ignore[attr-defined]  # what torch's GradScaler sets
            if _watched(self.optimizer):
                self.optimizer.step()
            else:
                self.plain()
            return
        if not self.zeros and (self.states <= 0 or self.counts is not False or _has_numbers(self.optimizer)):
            # Its state begins as we cannot know, or lies on the host: read the flag, as torch's GradScaler always does.
            if not flag.item():
                before = _numbers(self.optimizer)
                self.optimizer.step()
                self.counts = self.counts or _numbers(self.optimizer) != before
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of the order
            self.states = len(_states(self.optimizer))
            return
        self._keep()
        self.optimizer.step()
        skipped = flag > 0
        _put_back(skipped, self.live, self.kept)
        made = _states(self.optimizer)
        if len(made) != self.states:
            _clear(skipped, made, self.live)
            self.forget()

    def step_alone(self, parameter: Tensor, group: dict[str, Any], flag: Tensor) -> None:
        """Step for one parameter of a group, and no other, unless ``flag`` is above 0.

        Raises:
            ConfigurationError: if the algorithm counts in its groups, which would count every parameter.
        """
        optimizer = self.optimizer
        every, params = optimizer.param_groups, group["params"]
        optimizer.param_groups, group["params"] = [group], [parameter]
        try:
            if self.fused:
                self.step(flag)
                return
            before = _numbers(optimizer) if self.counts is None else None
            self._step_of_one(parameter, flag)
            if before is not None:
                self.counts = _numbers(optimizer) != before
            if self.counts:
                raise ConfigurationError(
                    f"in_backward=True: {type(optimizer).__name__} counts its steps in its groups, once for all their "
                    f"parameters, and would count each of them: leave in_backward=True out"
                )
        finally:
            optimizer.param_groups, group["params"] = every, params

    def _step_of_one(self, parameter: Tensor, flag: Tensor) -> None:
        optimizer = self.optimizer
        state = list(optimizer.state[parameter].values()) if parameter in optimizer.state else []
        if not self.zeros and (not state or any(isinstance(value, (int, float)) for value in state)):
            if not flag.item():
                optimizer.step()
            optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of the order
            return
        live = [parameter.data, *(value for value in state if isinstance(value, Tensor))]
        kept = [tensor.clone() for tensor in live]
        optimizer.step()
        skipped = flag > 0
        _put_back(skipped, live, kept)
        made = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        if len(made) != len(live) - 1:
            _clear(skipped, made, live)

    def search(self, flag: Tensor, closure: Callable[[], Tensor]) -> Tensor:
        """Step an optimizer that evaluates a closure as often as it likes, unless ``flag`` is above 0.

        Returns:
            The flag; above 0 too where parameters were not finite after it, which then are as they were, and its state too.
        """
        optimizer = self.optimizer
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of the order
        if flag.item():
            return flag
        live = [p for group in optimizer.param_groups for p in group["params"]]
        kept, state = [p.detach().clone() for p in live], {p: copy.deepcopy(of_p) for p, of_p in optimizer.state.items()}
        optimizer.step(torch.enable_grad()(closure))  # type: ignore[arg-type]  # gives the loss, as a tensor
        if all(bool(torch.isfinite(p).all()) for p in live):
            return flag
        with torch.no_grad():
            for p, before in zip(live, kept, strict=True):
                p.copy_(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        return torch.ones_like(flag)

    def unfuse(self) -> None:
        """Go on without the fused kernel, which has no sparse gradients."""
        if self.fused:
            self.fused = False
            for group in self.optimizer.param_groups:
                group["fused"] = False
            self.optimizer.__dict__.pop("found_inf", None)  # which other kernels do not take

    def forget(self) -> None:
        """Look up anew what the optimizer changes: its state and its options were replaced."""
        self.zeros = self._begins_as_zeros()
        if self._damped():
            self.unfuse()  # its kernel could not be skipped then
        self.counts = None
        self.live, self.kept, self.states = [], [], -1 if self.zeros else len(_states(self.optimizer))

    def _begins_as_zeros(self) -> bool:
        kind = type(self.optimizer)
        # SGD's dampening is left out of its first step, so a first step on zeros would not be the same.
        return kind.__module__.startswith("torch.optim") and kind.__name__ in ZERO_STATE and not self._damped()

    def _damped(self) -> bool:
        return any(group.get("dampening", 0) for group in self.optimizer.param_groups)

    def _keep(self) -> None:
        if not self.live:
            states = _states(self.optimizer)
            self.states = len(states)
            self.live = [p.data for group in self.optimizer.param_groups for p in group["params"]] + states
            self.kept = [tensor.clone() for tensor in self.live]
            return
        if mixed(self.live) or not on_one_device(self.live):
            for kept, live in zip(self.kept, self.live, strict=True):
                kept.copy_(live)
        else:
            torch._foreach_copy_(self.kept, self.live)


class BufferGuard:
    """Puts back the buffers of a module (BatchNorm's running means) after a skipped update.

    Large buffers that no step was seen to change, as a causal mask, are not kept: they cost nothing. Small ones and those of
    normalisation layers always are, since torch's kernels change running means without counting a version.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: dict[tuple[nn.Module, str], Tensor] = {}
        self._always: list[tuple[nn.Module, str]] = []
        self._watched: dict[tuple[nn.Module, str], int] = {}
        for owner in module.modules():
            for name, value in owner._buffers.items():
                if value is None:
                    continue
                if isinstance(owner, _NormBase) or value.numel() <= SMALL_BUFFER:
                    self._always.append((owner, name))
                else:
                    self._watched[(owner, name)] = -1  # unlike any version: kept before the first step

    @classmethod
    def of(cls, module: nn.Module) -> BufferGuard | None:
        """A guard of the module's buffers; None if it has none."""
        return cls(module) if any(True for _ in module.buffers()) else None

    def keep(self) -> None:
        """Before the forward pass."""
        changing = [slot for slot, version in self._watched.items() if _buffer(slot)._version != version]
        self._kept = {slot: _buffer(slot).clone() for slot in (*self._always, *changing)}
        self._watched = {slot: _buffer(slot)._version for slot in self._watched}

    def put_back(self, flag: Tensor) -> None:
        """After the update: where it was skipped, the buffers are again what they were."""
        skipped = flag > 0
        with torch.no_grad():
            for slot, kept in self._kept.items():
                live = _buffer(slot)
                if slot not in self._watched or live._version != self._watched[slot]:
                    live.copy_(torch.where(skipped.to(live.device), kept, live))


def _buffer(slot: tuple[nn.Module, str]) -> Tensor:
    return slot[0]._buffers[slot[1]]  # type: ignore[return-value]  # a slot had a tensor


def _plain_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """``optimizer.step`` without the annotation for profilers that torch wraps around it, half the time of a small step."""
    step = type(optimizer).step
    if not getattr(step, "hooked", False):
        return optimizer.step
    return functools.partial(step.__wrapped__, optimizer)  # type: ignore[attr-defined]  # functools.wraps sets it


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody wants to know of its steps: hooks on it or on all optimizers, or a scheduler that counts them."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or "step" in vars(optimizer)
    )


def _put_back(skipped: Tensor, live: list[Tensor], kept: list[Tensor]) -> None:
    """Where it was skipped, make tensors again what they were."""
    for now, before in zip(live, kept, strict=True):
        now.copy_(torch.where(skipped.to(now.device), before, now))


def _clear(skipped: Tensor, made: list[Tensor], live: list[Tensor]) -> None:
    """Where it was skipped, make the state that the step made, and that was not live before, zeros."""
    known = {id(tensor) for tensor in live}
    for tensor in made:
        if id(tensor) not in known:
            tensor.copy_(torch.where(skipped.to(tensor.device), torch.zeros_like(tensor), tensor))


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of its groups that some optimizers count in."""
    kinds = (bool, int, float)
    return [{key: value for key, value in group.items() if isinstance(value, kinds)} for group in optimizer.param_groups]


def _has_numbers(optimizer: torch.optim.Optimizer) -> bool:
    return any(isinstance(value, (int, float)) for state in optimizer.state.values() for value in state.values())


def on_one_device(tensors: list[Tensor]) -> bool:
    """Whether one kernel can run over all of them."""
    return len({tensor.device for tensor in tensors}) == 1


def mixed(tensors: Iterable[Tensor]) -> bool:
    """Whether their dtypes differ."""
    return len({tensor.dtype for tensor in tensors}) > 1
