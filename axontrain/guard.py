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
        # The kernel skips what it does itself; a subclass may do more in its step.
        self.skips = fused and _defines(kind, "step").__module__.startswith("torch.optim")
        self.zeros, self.nested = self._begins_as_zeros(), bool(within(optimizer))
        self.kept: Kept | None = None
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
        if self.skips:
            self.optimizer.found_inf = flag  # type: ignore[attr-defined]  # what torch's GradScaler sets
            if _watched(self.optimizer):
                self.optimizer.step()
            else:
                self.plain()
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self.zeros and (self.counts is not False or self.nested or not _known(self.optimizer, parameters)):
            self._read(flag)
            return
        if self.kept is None or not self.kept.still():
            self.kept = Kept(self.optimizer, parameters)
        else:
            self.kept.keep()
        self.optimizer.step()
        self.kept.put_back(flag)
        if self.kept.grew():
            self.kept.clear(flag)
            self.kept = None

    def _read(self, flag: Tensor) -> None:
        """Read the flag, as torch's GradScaler always does: what the step may change we cannot know, or lies on the host."""
        if not flag.item():
            before = _numbers(self.optimizer)
            self.optimizer.step()
            self.counts = self.counts or _numbers(self.optimizer) != before
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of the order

    def step_alone(self, parameter: Tensor, group: dict[str, Any], flag: Tensor) -> None:
        """Step for one parameter of a group, and no other, unless ``flag`` is above 0.

        Raises:
            ConfigurationError: if the algorithm counts in its groups, which would count every parameter.
        """
        optimizer = self.optimizer
        every, params = optimizer.param_groups, group["params"]
        optimizer.param_groups, group["params"] = [group], [parameter]
        try:
            self.kept = None  # it was of another parameter
            self.step(flag)
            if self.counts:
                raise ConfigurationError(
                    f"in_backward=True: {type(optimizer).__name__} counts its steps in its groups, once for all their "
                    f"parameters, and would count each of them: leave in_backward=True out"
                )
        finally:
            optimizer.param_groups, group["params"], self.kept = every, params, None

    def search(self, flag: Tensor, closure: Callable[[], Tensor], finite: Callable[[], bool]) -> Tensor:
        """Step an optimizer that evaluates a closure as often as it likes, unless ``flag`` is above 0.

        Returns:
            The flag; above 0 too where parameters are not finite after it, or ``finite`` says that what it evaluated last was
            not: then all is as it was, its state, and that of optimizers which it has within itself, too.
        """
        optimizer = self.optimizer
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn of the order
        if flag.item():
            return flag
        every = [optimizer, *within(optimizer)]
        live = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in live]
        states = [({p: copy.deepcopy(of_p) for p, of_p in one.state.items()}, _numbers(one)) for one in every]
        optimizer.step(torch.enable_grad()(closure))  # type: ignore[arg-type]  # gives the loss, as a tensor
        if finite() and all(bool(torch.isfinite(p).all()) for p in live):
            return flag
        with torch.no_grad():
            for p, before in zip(live, kept, strict=True):
                p.copy_(before)
        for one, (state, numbers) in zip(every, states, strict=True):
            one.state.clear()
            one.state.update(state)
            for group, of_group in zip(one.param_groups, numbers, strict=True):
                group.update(of_group)
        return torch.ones_like(flag)

    def unfuse(self) -> None:
        """Go on without the fused kernel, which has no sparse gradients."""
        if self.fused:
            self.fused = self.skips = False
            for group in self.optimizer.param_groups:
                group["fused"] = False
            self.optimizer.__dict__.pop("found_inf", None)  # which other kernels do not take

    def forget(self) -> None:
        """Look up anew what the optimizer changes: its state and its options were replaced."""
        self.zeros = self._begins_as_zeros()
        if self._damped():
            self.unfuse()  # its kernel could not be skipped then
        self.counts, self.kept = None, None

    def _begins_as_zeros(self) -> bool:
        kind = type(self.optimizer)
        # SGD's dampening is left out of its first step, so a first step on zeros would not be the same.
        return kind.__module__.startswith("torch.optim") and kind.__name__ in ZERO_STATE and not self._damped()

    def _damped(self) -> bool:
        return any(group.get("dampening", 0) for group in self.optimizer.param_groups)


class Kept:
    """What a step of an optimizer changes, as it was before: parameters, and the tensors of its state."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.slots = self._slots()
        self.live = self._live()
        self.kept = [tensor.detach().clone() for tensor in self.live]

    def still(self) -> bool:
        """Whether it is the same tensors: some algorithms put new ones in their place."""
        return len(self._slots()) == len(self.slots) and all(
            one is other and one.shape == before.shape
            for one, other, before in zip(self._live(), self.live, self.kept, strict=True)
        )

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the same tensors again, as they are now."""
        if mixed(self.live) or not on_one_device(self.live):
            for kept, live in zip(self.kept, self.live, strict=True):
                kept.copy_(live)
        else:
            torch._foreach_copy_(self.kept, self.live)

    @torch.no_grad()
    def put_back(self, flag: Tensor) -> None:
        """Where ``flag`` is above 0, make all of it what it was."""
        skipped = flag > 0
        count = len(self.parameters)
        for live, kept in zip(self.live[:count], self.kept, strict=False):
            live.copy_(torch.where(skipped.to(live.device), kept, live))
        for (state, key), live, kept in zip(self.slots, self.live[count:], self.kept[count:], strict=True):
            now = state.get(key)
            if now is live:
                live.copy_(torch.where(skipped.to(live.device), kept, live))
            elif isinstance(now, Tensor) and now.shape == kept.shape:
                state[key] = torch.where(skipped.to(now.device), kept, now)
            elif skipped.item():
                state[key] = kept.clone()

    def grew(self) -> bool:
        """Whether the step made state that was not there before."""
        return len(self._slots()) != len(self.slots)

    @torch.no_grad()
    def clear(self, flag: Tensor) -> None:
        """Where ``flag`` is above 0, make the state that the step made zeros, as which it begins."""
        known = {(id(state), key) for state, key in self.slots}
        for state, key in self._slots():
            if (id(state), key) not in known:
                state[key].copy_(torch.where((flag > 0).to(state[key].device), torch.zeros_like(state[key]), state[key]))

    def _slots(self) -> list[tuple[dict[str, Any], str]]:
        states = self.optimizer.state
        found = (states[p] for p in self.parameters if p in states)
        return [(state, key) for state in found for key, value in state.items() if isinstance(value, Tensor)]

    def _live(self) -> list[Tensor]:
        return [*self.parameters, *(state[key] for state, key in self.slots)]


class BufferGuard:
    """Puts back the buffers of a module (BatchNorm's running means) after a skipped update.

    Large buffers that no step was seen to change, as a causal mask, are not kept: they cost nothing. Small ones and those of
    normalisation layers always are. A change is seen by the tensor's version or by another tensor in its place; one that is
    written through ``.data``, which has no version, by a look at the numbers, taken until :meth:`settle` is first called.
    """

    def __init__(self, module: nn.Module) -> None:
        self._always: list[Slot] = []
        self._watched: dict[Slot, tuple[Tensor | None, int]] = {}  # the tensor and its version as of the last step
        self._changed: dict[Slot, Tensor] = {}  # of large ones, for as long as they are looked at: above 0 if a step changed it
        self._before: dict[Slot, tuple[Tensor | None, Tensor | None]] = {}  # before a step: the tensor, and a copy of it
        for owner in module.modules():
            for name, value in owner._buffers.items():
                self._always.append((owner, name))
                if value is not None and not isinstance(owner, _NormBase) and value.numel() > SMALL_BUFFER:
                    self._changed[(owner, name)] = torch.zeros((), device=value.device)

    @classmethod
    def of(cls, module: nn.Module) -> BufferGuard | None:
        """A guard of the module's buffers; None if it has none."""
        return cls(module) if any(part._buffers for part in module.modules()) else None

    def keep(self) -> None:
        """Before the forward pass."""
        self._before = {}
        for slot in self._always:
            live = _buffer(slot)
            self._before[slot] = live, None if live is None else live.clone()
        for slot, (last, version) in self._watched.items():
            live = _buffer(slot)
            if live is last and (live is None or live._version == version):
                self._before[slot] = live, None  # if it is another tensor afterwards, this one is as it was
            else:
                self._before[slot] = live, None if live is None else live.clone()
                self._watched[slot] = live, 0 if live is None else live._version

    def put_back(self, flag: Tensor) -> None:
        """After the update: where it was skipped, the buffers are again what they were."""
        found = [(slot, _buffer(slot), before, kept) for slot, (before, kept) in self._before.items()]
        found = [one for one in found if one[3] is not None or one[1] is not one[2]]
        if not found:
            return
        skipped = flag > 0
        with torch.no_grad():
            for slot, live, before, kept in found:
                if slot in self._changed and live is not None and kept is not None:
                    changed = (live != kept).any() if live.shape == kept.shape else torch.ones((), device=live.device)
                    self._changed[slot] = torch.maximum(self._changed[slot], changed.float())
                if slot in self._watched and live is before and live is not None and live._version == self._watched[slot][1]:
                    continue  # the step left it alone
                if live is not before:
                    self._replaced(slot, live, before if kept is None else kept, skipped)
                elif live is not None and kept is not None:
                    live.copy_(torch.where(skipped.to(live.device), kept, live))

    def _replaced(self, slot: Slot, live: Tensor | None, kept: Tensor | None, skipped: Tensor) -> None:
        owner, name = slot
        if live is not None and kept is not None and live.shape == kept.shape and live.dtype == kept.dtype:
            live.copy_(torch.where(skipped.to(live.device), kept, live))
        elif skipped.item():  # it was made, dropped, or grew
            owner._buffers[name] = kept

    def settle(self) -> None:
        """At a reading: large buffers that no step has changed are watched by their versions from now on."""
        if not self._before:
            return  # no step was seen yet
        for slot, changed in self._changed.items():
            if not changed.item():
                self._always.remove(slot)
                self._watched[slot] = None, -1  # unlike any: kept before the next step
        self._changed = {}


Slot = tuple[nn.Module, str]


def _buffer(slot: Slot) -> Tensor | None:
    return slot[0]._buffers.get(slot[1])


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


def _defines(kind: type, name: str) -> type:
    """The class that a method of a class is from."""
    return next(one for one in kind.__mro__ if name in vars(one))


def _known(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> bool:
    """Whether all that a step changes is there already, and on the device."""
    states = optimizer.state
    for p in parameters:
        state = states.get(p)
        if not state:
            if p.grad is not None:
                return False
        elif not all(value is None or isinstance(value, Tensor) for value in state.values()):
            return False
    return True


def within(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Optimizers that an optimizer has within itself, as SAM has the one that steps at last."""
    return [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]


def _numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of its groups that some optimizers count in."""
    kinds = (bool, int, float)
    return [{key: value for key, value in group.items() if isinstance(value, kinds)} for group in optimizer.param_groups]


def on_one_device(tensors: list[Tensor]) -> bool:
    """Whether one kernel can run over all of them."""
    return len({tensor.device for tensor in tensors}) == 1


def mixed(tensors: Iterable[Tensor]) -> bool:
    """Whether their dtypes differ."""
    return len({tensor.dtype for tensor in tensors}) > 1
