"""Update: one optimizer at work: clip, guard, step, schedule.

The guard skips an update whose loss or gradients are not finite, on the device and without a host read. Fused optimizers
do it by themselves when given ``found_inf``, as torch's GradScaler does; for the others everything that the update may
change is kept and put back by ``torch.where``.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from axontrain.clock import Clock
from axontrain.errors import (
    CheckpointError,
    ConfigurationError,
    LossError,
    NonFiniteError,
    NonFiniteWarning,
    OptimizerError,
)
from axontrain.optimizer import Optimizer, Part, parts

# Optimizers whose state begins as zeros, so that a skipped first update can leave zeros behind without a host read.
ZERO_STATE = ("SGD", "Adam", "AdamW", "Adamax", "RAdam", "RMSprop", "Adadelta", "Adagrad", "Muon")
# Flags wait on the device until a reading; a loop that never reads reads here.
MOST_PENDING = 1024


class Update:
    """An :class:`Optimizer` bound to parameters.

    ``lr`` is the main group's present learning rate; ``skipped`` counts the updates left out so far (as of the last
    reading); ``optimizers`` are the torch optimizers.
    """

    def __init__(self, name: str, spec: Optimizer, parameters: Mapping[str, nn.Parameter], *, fused: bool = True) -> None:
        self.name, self.spec = name, spec
        self.parameters = dict(parameters)
        self.tensors = list(self.parameters.values())
        self.optimizers: list[torch.optim.Optimizer] = []
        self._guards: list[_Guard] = []
        for part in parts(spec, self.parameters):
            optimizer, is_fused = _build(part, fused)
            self.optimizers.append(optimizer)
            self._guards.append(_Guard(optimizer, is_fused))
        self.scale = 1.0
        self.skipped = 0
        self.in_a_row = 0
        self.clock: Clock | None = None
        self._pending: list[tuple[int, Tensor, Tensor, Mapping[str, Any]]] = []
        self._ones: dict[torch.device, Tensor] = {}
        self._alike = (0, False)  # of so many gradients: whether one kernel can look through them all
        self._factor: Callable[[float], float] | None = None
        self._schedulers: list[LRScheduler] = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        if spec.schedule is not None:
            self._bind_schedule(spec.schedule)

    @property
    def lr(self) -> float:
        """The present learning rate of the first group."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    @property
    def sees_progress(self) -> bool:
        """Whether the schedule is a function of progress, which needs a plan with an end."""
        return self._factor is not None

    def update(self, loss: Tensor, terms: Mapping[str, Any]) -> Tensor:
        """Update the parameters from their gradients, and drop the gradients.

        Args:
            loss: scalar, detached: part of what has to be finite.
            terms: what a warning names beside it.

        Returns:
            A scalar float tensor: above 0 if the update was skipped.

        """
        gradients = [p.grad for p in self.tensors if p.grad is not None]
        if not gradients:
            raise LossError(f"no parameter of the optimizer {self.name!r} has a gradient: the loss does not depend on them")
        if self.spec.clip_norm is None:
            flag = self._not_finite(gradients, loss)
            if self.spec.clip_value is not None:
                _clamp(gradients, self.spec.clip_value)
        else:
            flag = self._clipped(gradients, loss)
        clock = self.clock
        step = clock.step + 1 if clock is not None else len(self._pending) + 1
        if self._factor is not None and clock is not None:
            self._set_rates(self._factor(clock.progress))
        if self.spec.on_nonfinite == "raise" and flag.item():
            raise NonFiniteError(self._described(step, loss, terms))
        for guard in self._guards:
            guard.step(flag)
        for scheduler in self._schedulers:
            scheduler.step()
        for parameter in self.tensors:
            parameter.grad = None
        self._pending.append((step, flag, loss, terms))
        if len(self._pending) >= MOST_PENDING:
            self.read()
        return flag

    def refresh(self) -> None:
        """Get ready for a fit: look at what may have changed since the last."""
        for guard in self._guards:
            guard.refresh()

    def read(self) -> None:
        """Read which updates were skipped since the last reading; warn of them.

        Raises:
            NonFiniteError: after ``patience`` in a row.

        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        flags = torch.stack([flag for _, flag, _, _ in pending]).tolist()
        if not any(flags):
            self.in_a_row = 0
            return
        left_out, longest = [], 0
        for flag, (step, _, loss, terms) in zip(flags, pending, strict=True):
            if flag:
                self.in_a_row += 1
                longest = max(longest, self.in_a_row)
                left_out.append((step, loss, terms))
            else:
                self.in_a_row = 0
        self.skipped += len(left_out)
        told = "; ".join(f"step {step}: {_terms(loss, terms)}" for step, loss, terms in left_out[:4])
        more = f"; ... step {left_out[-1][0]}" if len(left_out) > 4 else ""
        message = f"{len(left_out)} updates of the optimizer {self.name!r} were skipped as not finite ({told}{more})"
        if longest >= self.spec.patience:
            raise NonFiniteError(
                f"{message}; {longest} in a row, patience={self.spec.patience}. The weights are those from before. Lower "
                f"lr, set clip_norm=, or look at the data of those steps; on_nonfinite='raise' stops at the first."
            )
        warnings.warn(f"{message}; weights and optimizer state are as if they had not been", NonFiniteWarning, stacklevel=2)

    def rescale(self, factor: float, minimum: float = 0.0) -> None:
        """Multiply the learning rate of every group from now on by ``factor``, down to ``minimum`` in the first group."""
        base = float(self.optimizers[0].param_groups[0]["initial_lr"])
        factor = max(factor, minimum / (base * self.scale)) if base * self.scale > 0 else factor
        if factor >= 1:
            return
        self.scale *= factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                _set_rate(group, float(group["lr"]) * factor)
        for scheduler in self._schedulers:
            scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, its options, its schedule, and what was skipped."""
        return {
            "optimizers": [self._part_state(optimizer) for optimizer in self.optimizers],
            "schedulers": [_plain(scheduler.state_dict()) for scheduler in self._schedulers],
            "scale": self.scale,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            CheckpointError: if it is of other parameters or of another number of optimizers or schedules.

        """
        for key, own in (("optimizers", self.optimizers), ("schedulers", self._schedulers)):
            if len(state[key]) != len(own):
                raise CheckpointError(f"the optimizer {self.name!r} has {len(own)} {key}, the saved one {len(state[key])}")
        for optimizer, part in zip(self.optimizers, state["optimizers"], strict=True):
            self._load_part(optimizer, part)
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            kept = {k: v for k, v in scheduler.state_dict().items() if k not in saved}
            scheduler.load_state_dict({**kept, **_restored(saved, scheduler.state_dict())})
        self.scale, self.skipped, self.in_a_row = state["scale"], state["skipped"], state["in_a_row"]
        self._pending = []
        for guard in self._guards:
            guard.forget()

    def __repr__(self) -> str:
        return f"Update({self.name!r}, {self.spec!r}, {len(self.tensors)} parameters)"

    def _bind_schedule(self, schedule: Callable[..., Any]) -> None:
        factor, cause = None, None
        try:
            factor = schedule(0.0)
        except Exception as error:
            cause = repr(error)
        if isinstance(factor, (int, float)) or (isinstance(factor, Tensor) and factor.numel() == 1):
            self._factor = schedule
            return
        for optimizer in self.optimizers:
            try:
                scheduler = schedule(optimizer)
            except Exception as error:
                raise ConfigurationError(
                    f"schedule={schedule!r} is neither a function of progress (called with 0.0: {cause or repr(factor)}) nor a "
                    f"torch scheduler factory (called with the optimizer: {error!r})"
                ) from error
            if isinstance(scheduler, ReduceLROnPlateau):
                raise ConfigurationError("torch's ReduceLROnPlateau waits for a reading: use the callback ax.ReduceLROnPlateau")
            if not isinstance(scheduler, LRScheduler):
                raise ConfigurationError(f"schedule={schedule!r} gave {scheduler!r}, which is no torch scheduler")
            self._schedulers.append(scheduler)

    def _set_rates(self, factor: float) -> None:
        factor = float(factor) * self.scale
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                _set_rate(group, float(group["initial_lr"]) * factor)

    def _not_finite(self, gradients: list[Tensor], loss: Tensor) -> Tensor:
        if len(gradients) != self._alike[0]:
            alike = all(g.dtype is loss.dtype and g.device == loss.device and not g.is_sparse for g in gradients)
            self._alike = (len(gradients), alike and not gradients[0].is_complex())
        if self._alike[1]:
            return self._checked([*gradients, loss])
        flag = torch.zeros((), device=loss.device)
        for one in (*gradients, loss):
            values = one.coalesce().values() if one.is_sparse else one
            flag = flag + (~torch.isfinite(values).all()).to(device=loss.device, dtype=flag.dtype)
        return flag.clamp_max(1.0)

    def _checked(self, tensors: list[Tensor]) -> Tensor:
        # One kernel over all gradients; made for GradScaler, and with a scale of one it changes nothing.
        device = tensors[0].device
        one = self._ones.get(device)
        if one is None:
            one = self._ones[device] = torch.ones((), device=device)
        flag = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, one)
        return flag

    def _clipped(self, gradients: list[Tensor], loss: Tensor) -> Tensor:
        limit, bound = self.spec.clip_norm, self.spec.clip_value
        assert limit is not None
        flag = None
        if bound is not None:
            flag = self._not_finite(gradients, loss)  # clamping would hide an infinity
            _clamp(gradients, bound)
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        norms = torch._foreach_norm(dense) if _on_one_device(dense) else [g.norm().to(loss.device) for g in dense]
        norm = torch.linalg.vector_norm(torch.stack([n.to(torch.float32) for n in norms] if _mixed(norms) else list(norms)))
        if flag is None:
            flag = (~torch.isfinite(norm + loss)).to(torch.float32)
        # As torch's clip_grad_norm_: the small term keeps a zero norm from dividing by zero.
        factor = (limit / (norm + 1e-6)).clamp_max(1.0)
        if _on_one_device(gradients) and not any(g.is_sparse for g in gradients):
            torch._foreach_mul_(gradients, factor)
        else:
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return flag

    def _described(self, step: int, loss: Tensor, terms: Mapping[str, Any]) -> str:
        bad = [
            name
            for name, p in self.parameters.items()
            if p.grad is not None and not bool(torch.isfinite(p.grad.coalesce().values() if p.grad.is_sparse else p.grad).all())
        ]
        where = f"gradients of {', '.join(bad[:6])}{', ...' if len(bad) > 6 else ''} are not" if bad else "all gradients are"
        return f"step {step}: {_terms(loss, terms)}; {where} finite; nothing was updated (on_nonfinite='raise')"

    def _part_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        names = {id(p): name for name, p in self.parameters.items()}
        return {
            "state": {
                names[id(p)]: {key: _plain(value) for key, value in state.items()}
                for p, state in optimizer.state.items()
                if state
            },
            "groups": [
                {"parameters": [names[id(p)] for p in group["params"]]}
                | {key: _plain(value) for key, value in group.items() if key != "params" and _savable(value)}
                for group in optimizer.param_groups
            ],
        }

    def _load_part(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        own = [name for group in self._part_state(optimizer)["groups"] for name in group["parameters"]]
        given = [name for group in saved["groups"] for name in group["parameters"]]
        if own != given:
            other = sorted(set(own) ^ set(given)) or own
            raise CheckpointError(
                f"the optimizer {self.name!r} is of other parameters than the saved one: they differ in {', '.join(other[:8])}"
            )
        index = {name: i for i, name in enumerate(own)}
        groups, count = [], 0
        for group, of_saved in zip(optimizer.param_groups, saved["groups"], strict=True):
            size = len(group["params"])
            options = {key: value for key, value in group.items() if key != "params"}
            options |= {k: _like(v, options.get(k)) for k, v in of_saved.items() if k != "parameters" and k in options}
            groups.append({**options, "params": list(range(count, count + size))})
            count += size
        state = {index[name]: {k: _like(v, None) for k, v in of.items()} for name, of in saved["state"].items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})


class _Guard:
    """One torch optimizer, stepped so that a flag undoes the step on the device."""

    def __init__(self, optimizer: torch.optim.Optimizer, fused: bool) -> None:
        self.optimizer, self.fused = optimizer, fused
        kind = type(optimizer)
        # SGD's dampening is left out of its first step, so a first step on zeros would not be the same.
        damped = any(group.get("dampening", 0) for group in optimizer.param_groups)
        self.zeros = kind.__module__.startswith("torch.optim") and kind.__name__ in ZERO_STATE and not damped
        self.kept: list[Tensor] = []
        self.live: list[Tensor] = []
        self.states = -1
        self.plain: Callable[[], Any] = optimizer.step
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
            self.plain()
            return
        if not self.zeros and (self.states <= 0 or _has_numbers(self.optimizer)):
            # Its state begins as we cannot know, or lies on the host: read the flag, as torch's GradScaler always does.
            if not flag.item():
                self.optimizer.step()
            self.states = len(_states(self.optimizer))
            return
        self._keep()
        self.optimizer.step()
        skipped = flag > 0
        for live, kept in zip(self.live, self.kept, strict=True):
            live.copy_(torch.where(skipped.to(live.device), kept, live))
        made = _states(self.optimizer)
        if len(made) != self.states:
            known = {id(tensor) for tensor in self.live}
            for tensor in made:
                if id(tensor) not in known:
                    tensor.copy_(torch.where(skipped.to(tensor.device), torch.zeros_like(tensor), tensor))
            self.forget()

    def refresh(self) -> None:
        """A fit begins: hooks may have been put on the optimizer since."""
        self.plain = _plain_step(self.optimizer)

    def forget(self) -> None:
        """Look up anew what the optimizer changes: its state was replaced."""
        self.live, self.kept, self.states = [], [], -1 if self.zeros else len(_states(self.optimizer))

    def _keep(self) -> None:
        if not self.live:
            states = _states(self.optimizer)
            self.states = len(states)
            self.live = [p.data for group in self.optimizer.param_groups for p in group["params"]] + states
            self.kept = [tensor.clone() for tensor in self.live]
            return
        if _mixed(self.live) or not _on_one_device(self.live):
            for kept, live in zip(self.kept, self.live, strict=True):
                kept.copy_(live)
        else:
            torch._foreach_copy_(self.kept, self.live)


class BufferGuard:
    """Puts back the buffers of a module (BatchNorm's running means) after a skipped update.

    Only buffers that steps were seen to change are kept: a large constant one costs nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        self._slots = [
            (owner, name) for owner in module.modules() for name, value in owner._buffers.items() if value is not None
        ]
        self._versions: list[int] = []
        self._kept: dict[tuple[nn.Module, str], Tensor] = {}
        self._changing = list(self._slots)  # all of them, until a first step has shown which

    @classmethod
    def of(cls, module: nn.Module) -> BufferGuard | None:
        """A guard of the module's buffers; None if it has none."""
        return cls(module) if any(True for _ in module.buffers()) else None

    def keep(self) -> None:
        """Before the forward pass."""
        self._kept = {slot: _buffer(slot).clone() for slot in self._changing}
        self._versions = [_buffer(slot)._version for slot in self._slots]

    def put_back(self, flag: Tensor) -> None:
        """After the update: where it was skipped, the buffers are again what they were."""
        changed = [s for s, version in zip(self._slots, self._versions, strict=True) if _buffer(s)._version != version]
        skipped = flag > 0
        with torch.no_grad():
            for slot in changed:
                if slot in self._kept:
                    live = _buffer(slot)
                    live.copy_(torch.where(skipped.to(live.device), self._kept[slot], live))
        if len(self._changing) == len(self._slots):
            self._changing = changed
        else:
            self._changing += [slot for slot in changed if slot not in self._kept]


def _buffer(slot: tuple[nn.Module, str]) -> Tensor:
    return slot[0]._buffers[slot[1]]  # type: ignore[return-value]  # a slot had a tensor


def _build(part: Part, fused: bool) -> tuple[torch.optim.Optimizer, bool]:
    factory, options = part.factory, dict(part.options)
    groups = [{"params": list(parameters.values()), **own} for parameters, own in part.groups]
    tensors = [p for group in groups for p in group["params"]]
    accepted = _accepted(factory)
    takes_lr = "lr" in accepted or "**" in accepted
    if not takes_lr:
        options.pop("lr")
    said = {"fused", "foreach", "capturable", "differentiable"} & set(options)
    attempts = [options]
    can_fuse = fused and isinstance(factory, type) and "fused" in accepted and not said
    if can_fuse and not options.get("dampening") and not any(p.is_complex() for p in tensors):
        attempts.insert(0, {**options, "fused": True})
    if "capturable" in accepted and not said and any(p.is_cuda for p in tensors):
        attempts[-1] = {**options, "capturable": True}  # keeps its step counts on the device
    for attempt in attempts:
        try:
            optimizer = factory(groups, **attempt)
            break
        except RuntimeError:  # fused on a device or dtype that has no such kernel
            if attempt is attempts[-1]:
                raise
        except (TypeError, ValueError) as error:
            raise OptimizerError(
                f"{getattr(factory, '__name__', factory)} cannot be made for {len(tensors)} parameters "
                f"({', '.join(list(part.groups[0][0])[:4])}, ...): {error}. Where it takes only some kinds of "
                f"parameters, give the others a group: groups={{lambda name, p: p.ndim != 2: dict(optimizer='adamw', lr=...)}}"
            ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"the optimizer factory {factory!r} returned {optimizer!r}, no torch.optim.Optimizer")
    is_fused = bool(optimizer.param_groups and all(group.get("fused") for group in optimizer.param_groups))
    return optimizer, is_fused


def _plain_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """``optimizer.step`` without the annotation for profilers that torch wraps around it, half the time of a small step.

    With hooks on the optimizer, or a scheduler that counts its steps, it is the step as it is.
    """
    step = type(optimizer).step
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if not getattr(step, "hooked", False) or "step" in vars(optimizer) or any(hooks):
        return lambda: optimizer.step()
    return functools.partial(step.__wrapped__, optimizer)  # type: ignore[attr-defined]  # functools.wraps sets it


def _accepted(factory: Any) -> set[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return {"**"}
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _has_numbers(optimizer: torch.optim.Optimizer) -> bool:
    return any(isinstance(value, (int, float)) for state in optimizer.state.values() for value in state.values())


def _clamp(gradients: list[Tensor], bound: float) -> None:
    for gradient in gradients:
        (gradient._values() if gradient.is_sparse else gradient).clamp_(-bound, bound)


def _on_one_device(tensors: list[Tensor]) -> bool:
    return len({tensor.device for tensor in tensors}) == 1


def _mixed(tensors: Iterable[Tensor]) -> bool:
    return len({tensor.dtype for tensor in tensors}) > 1


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # in a captured or compiled step the rate lives on the device
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _terms(loss: Tensor, terms: Mapping[str, Any]) -> str:
    told = {"loss": float(loss), **{name: float(value) for name, value in terms.items()}}
    values = ", ".join(f"{name} {value:g}" for name, value in told.items())
    return values if not all(map(math.isfinite, told.values())) else f"{values}, gradients not finite"


def _savable(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_savable(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if _savable(item) or isinstance(item, Mapping)}
    return list(value) if isinstance(value, tuple) else value


def _like(value: Any, own: Any) -> Any:
    if isinstance(own, tuple) and isinstance(value, list):
        return tuple(value)
    return value.clone() if isinstance(value, Tensor) else value


def _restored(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has only text for keys; torch's schedulers count by integers (MultiStepLR.milestones).
    out: dict[str, Any] = {}
    for key, value in saved.items():
        mine = own.get(key)
        if isinstance(value, Mapping) and isinstance(mine, Mapping) and all(isinstance(k, int) for k in mine):
            value = type(mine)({int(k): v for k, v in value.items()})  # type: ignore[call-arg]
        out[key] = value
    return out
