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
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from axontrain.errors import ConfigurationError
from axontrain.host import Fetch
from axontrain.readings import Reading, at_once

# Optimizers whose state begins as zeros, so that a skipped first update can leave zeros behind without a host read.
ZERO_STATE = ("SGD", "Adam", "AdamW", "Adamax", "RAdam", "RMSprop", "Adadelta", "Adagrad", "Muon")
# Of those, the ones that count no steps: the others do so on the host, unless they are capturable.
COUNTLESS = ("SGD", "Muon")
# Attributes of every optimizer, which say nothing of what a step changes.
TORCHS = (
    "defaults", "param_groups", "state", "step", "found_inf", "grad_scale", "_opt_called", "_step_count",
    "_warned_capturable_if_run_uncaptured", "_zero_grad_profile_name", "_step_supports_amp_scaling",
    "_need_device_dtype_check_for_fused",
)  # fmt: skip
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
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "plain": None}  # a function of torch's that is found by no name

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.plain = _plain_step(self.optimizer)

    def _begin(self) -> None:
        """Make the momentum buffers of fused SGD, which a skipped first step would leave uninitialised."""
        if not self.fused or type(self.optimizer) is not torch.optim.SGD:
            return
        for group in self.optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if self.optimizer.state[p].get("momentum_buffer") is None:
                    buffer = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self.optimizer.state[p]["momentum_buffer"] = buffer

    def step(self, flag: Tensor) -> None:
        """Step, unless ``flag`` is above 0."""
        if self.skips:
            self.optimizer.found_inf = flag  # type: ignore[attr-defined]  # what torch's GradScaler sets
            if has_hooks(self.optimizer) or "step" in vars(self.optimizer):  # by which a scheduler counts them
                self.optimizer.step()
            else:
                self.plain()
            return
        if not self.zeros and (self.counts is not False or self.nested or not _known(self.optimizer)):
            self._read(flag)
            return
        before = None if self.zeros else _numbers(self.optimizer)
        if self.kept is None or not (self.zeros or self.kept.still()):  # torch's own keep their tensors
            self.kept = Kept(self.optimizer)
        else:
            self.kept.keep()
        self.optimizer.step()
        self.kept.put_back(flag)
        if self.kept.grew(whole=not self.zeros):
            self.kept.clear(flag)
            self.kept = None
        if before is not None and _numbers(self.optimizer) != before:  # it counts now and then
            self.counts = True
            if flag.item():
                _put_numbers(self.optimizer, before)

    def read_by(self) -> str:
        """Why a step of it is more than what the device does: it reads, or Python counts or looks on; "" if it is not."""
        name = type(self.optimizer).__name__
        if has_hooks(self.optimizer):
            return f"{name} has hooks on its steps"
        if self.skips:
            return ""
        counted = not all(group.get("capturable") for group in self.optimizer.param_groups) and name not in COUNTLESS
        return f"{name} counts or reads on the host while it steps" if counted or not self.zeros else ""

    def _read(self, flag: Tensor) -> None:
        """Read the flag, as torch's GradScaler always does: what the step may change we cannot know, or lies on the host."""
        if not flag.item():
            before = _numbers(self.optimizer)
            self.optimizer.step()
            self.counts = self.counts or _numbers(self.optimizer) != before or _holds(self.optimizer)
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
                    f"in_backward=True: {type(optimizer).__name__} counts its steps, or keeps tensors, for all its parameters "
                    f"together, and would do so for each of them: leave in_backward=True out"
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
        live = _parameters(optimizer)
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
            _put_numbers(one, numbers)
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
        self._begin()

    def _begins_as_zeros(self) -> bool:
        kind = type(self.optimizer)
        # SGD's dampening is left out of its first step, so a first step on zeros would not be the same.
        return kind.__module__.startswith("torch.optim") and kind.__name__ in ZERO_STATE and not self._damped()

    def _damped(self) -> bool:
        return any(group.get("dampening", 0) for group in self.optimizer.param_groups)


class Kept:
    """What a step of an optimizer changes, as it was before: parameters, and the tensors of its state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.parameters = optimizer, _parameters(optimizer)
        self.slots, self.states = self._slots(), len(optimizer.state)
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

    def grew(self, *, whole: bool) -> bool:
        """Whether the step made state that was not there before; unless ``whole``, of parameters that had none."""
        return len(self._slots()) != len(self.slots) if whole else len(self.optimizer.state) != self.states

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

    Each buffer is copied. Of large ones, as a causal mask, the copy is made anew only where the buffer's version, or the tensor
    in its place, has changed: then they cost memory, and no time. What is written through ``.data`` has no version; buffers
    that a step is seen to change so, until :meth:`settle` is first called, are copied each time too, as small ones and those
    of normalisation layers are, whose kernels count no version either.
    """

    def __init__(self, module: nn.Module) -> None:
        self._copies: dict[Slot, Copy] = {}
        self._unseen: dict[Slot, Tensor | None] = {}  # large ones, until settled: above 0 if one was changed without a version
        for owner in module.modules():
            for name, value in owner._buffers.items():
                self._copies[owner, name] = Copy(each_time=True)
                if (
                    value is not None
                    and not is_lazy(value)
                    and not isinstance(owner, _NormBase)
                    and value.numel() > SMALL_BUFFER
                ):
                    self._unseen[owner, name] = None

    @classmethod
    def of(cls, module: nn.Module) -> BufferGuard | None:
        """A guard of the module's buffers; None if it has none."""
        return cls(module) if any(part._buffers for part in module.modules()) else None

    def keep(self) -> None:
        """Before the forward pass."""
        shared: dict[int, Copy] = {}
        for slot, kept in self._copies.items():
            live = _buffer(slot)
            kept.take(live, shared.get(id(live)))
            shared[id(live)] = kept

    def put_back(self, flag: Tensor) -> None:
        """After the update: where it was skipped, the buffers are again what they were."""
        changed = [(slot, kept) for slot, kept in self._copies.items() if kept.may_have_changed(_buffer(slot))]
        if not changed:
            return
        skipped = flag > 0
        with torch.no_grad():
            for slot, kept in changed:
                live = _buffer(slot)
                if slot in self._unseen and live is kept.of and kept.is_of_now():
                    found = torch.ne(live, kept.held).any().float()  # type: ignore[arg-type]  # a dense one is held
                    before = self._unseen[slot]
                    self._unseen[slot] = found if before is None else torch.maximum(before, found)
                self._restore(slot, live, kept, skipped)

    def _restore(self, slot: Slot, live: Tensor | None, kept: Copy, skipped: Tensor) -> None:
        owner, name = slot
        held = kept.held if kept.held is not None else kept.of
        alike = live is not None and held is not None and live.shape == held.shape and live.dtype == held.dtype
        if alike and kept.dense and is_dense(live):  # type: ignore[arg-type]  # alike: it is there
            found = torch.where(skipped.to(live.device), held, live)  # type: ignore[union-attr, arg-type]
            if live is kept.of:
                live.copy_(found)  # type: ignore[union-attr]
            else:  # what was put in its place may be somebody's, as the batch
                owner._buffers[name] = found
        elif kept.seen and skipped.item():  # it was made, dropped, or grew, or is of a kind that torch has no where for
            owner._buffers[name] = held

    def settle(self) -> None:
        """At a reading: large buffers that were not seen to be changed without a version are copied where that has changed."""
        at_once(self.settling())

    def settling(self) -> Reading[None]:
        """The same as a reading."""
        asked = {slot: changed for slot, changed in self._unseen.items() if changed is not None}
        fetch = Fetch(asked.values())
        yield [fetch]
        for slot, changed in zip(asked, fetch.values(), strict=True):
            if self._unseen.pop(slot, None) is not None:
                self._copies[slot].each_time = bool(changed)


class Copy:
    """A buffer as it was before a step."""

    def __init__(self, *, each_time: bool) -> None:
        self.each_time = each_time
        self.of: Tensor | None = None
        self.held: Tensor | None = None
        self.version = -1
        self.seen = self.dense = False

    def take(self, live: Tensor | None, other: Copy | None = None) -> None:
        """Copy a buffer, if that has to be done anew; ``other`` has a copy of the same, which is in several places."""
        if other is not None:
            self.of, self.held, self.version = other.of, other.held, other.version
            self.seen, self.dense = other.seen, other.dense
            return
        dense = live is not None and is_dense(live)
        if self.seen and live is self.of and (live is None or (self.is_of_now() and not (self.each_time and dense))):
            return
        self.of, self.seen, self.dense = live, live is None or not is_lazy(live), dense
        self.version = 0 if live is None or not self.seen else live._version
        if live is None or not self.seen:
            self.held = None
        elif dense and self.held is not None and self.held.shape == live.shape and self.held.dtype == live.dtype:
            self.held = self.held.copy_(live) if self.held.device == live.device else live.clone()
        else:
            self.held = live.clone()

    def may_have_changed(self, live: Tensor | None) -> bool:
        """Whether the step may have changed the buffer, which is ``live`` now."""
        if live is not self.of:
            return True
        return live is not None and (not self.seen or (self.each_time and self.dense) or not self.is_of_now())

    def is_of_now(self) -> bool:
        """Whether the buffer's version is still that of the copy."""
        return self.of is None or is_lazy(self.of) or self.of._version == self.version


Slot = tuple[nn.Module, str]
# Of others, as float8, torch has no comparison everywhere.
COMMON = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is one that torch can compare and write anew, wherever: neither sparse, quantized, nor expanded."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_nested or tensor.dtype not in COMMON:
        return False
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):  # as one that is spread over devices
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _buffer(slot: Slot) -> Tensor | None:
    return slot[0]._buffers.get(slot[1])


def _plain_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """``optimizer.step`` without the annotation for profilers that torch wraps around it, half the time of a small step."""
    step = type(optimizer).step
    if not getattr(step, "hooked", False):
        return optimizer.step
    return functools.partial(step.__wrapped__, optimizer)  # type: ignore[attr-defined]  # functools.wraps sets it


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there are hooks on its steps, or on those of all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def hooks_of(optimizer: torch.optim.Optimizer) -> list[dict[int, Any]]:
    """Where torch keeps those hooks: to be looked at again and again, at no call."""
    own: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return [*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks]


def _defines(kind: type, name: str) -> type:
    """The class that a method of a class is from."""
    return next(one for one in kind.__mro__ if name in vars(one))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all that a step changes is there already, and on the device."""
    states = optimizer.state
    for p in _parameters(optimizer):
        state = states.get(p)
        if not state:
            if p.grad is not None:
                return False
        elif not all(value is None or isinstance(value, Tensor) for value in state.values()):
            return False
    return True


def within(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Optimizers that an optimizer has within itself, as SAM has the one that steps at last; also in a list or a mapping."""
    found: list[torch.optim.Optimizer] = []
    for value in vars(optimizer).values():
        several = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        found += [one for one in several if isinstance(one, torch.optim.Optimizer)]
    return found


def _numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers that some optimizers count in: in their groups, in attributes, and in their state beside the parameters."""
    kinds = (bool, int, float)
    own: dict[str, Any] = {
        key: value for key, value in vars(optimizer).items() if isinstance(value, kinds) and key not in TORCHS
    }
    named: dict[Any, Any] = {
        key: {name: one for name, one in value.items() if isinstance(one, kinds)}
        for key, value in optimizer.state.items()
        if not isinstance(key, Tensor) and isinstance(value, dict)
    }
    groups = [{key: value for key, value in group.items() if isinstance(value, kinds)} for group in optimizer.param_groups]
    return [own, named, *groups]


def _put_numbers(optimizer: torch.optim.Optimizer, numbers: list[dict[str, Any]]) -> None:
    """Make them again what :func:`_numbers` found."""
    own, named, *groups = numbers
    vars(optimizer).update(own)
    for key, values in named.items():
        optimizer.state[key].update(values)  # type: ignore[index]  # torch lets names be keys, too
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)


def _holds(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it keeps tensors elsewhere than in the state of its parameters: in groups, in attributes, or under a name."""
    of_groups = (value for group in optimizer.param_groups for key, value in group.items() if key not in ("params", "lr"))
    own = (value for key, value in vars(optimizer).items() if key not in TORCHS)
    named = (value for key, value in optimizer.state.items() if not isinstance(key, Tensor))
    return any(map(_has_tensor, (*of_groups, *own, *named)))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_tensor, value.values()))
    return any(map(_has_tensor, value)) if isinstance(value, (list, tuple)) else isinstance(value, Tensor)


def on_one_device(tensors: list[Tensor]) -> bool:
    """Whether one kernel can run over all of them."""
    return len({tensor.device for tensor in tensors}) == 1


def mixed(tensors: Iterable[Tensor]) -> bool:
    """Whether their dtypes differ."""
    return len({tensor.dtype for tensor in tensors}) > 1
