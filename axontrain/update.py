"""Update: one optimizer at work: clip, guard, step, schedule.

What skips an update that is not finite is :mod:`axontrain.guard`; when that was is read here, and told.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from axontrain.averages import Average, buffers_of, check_raw
from axontrain.clock import Clock
from axontrain.errors import (
    CheckpointError,
    ConfigurationError,
    LossError,
    NonFiniteError,
    NonFiniteWarning,
    unknown,
    warn,
)
from axontrain.guard import Guard, on_one_device, within
from axontrain.host import Fetch, placed
from axontrain.optimizer import Optimizer, build, parts
from axontrain.readings import Later, Reading, at_once, numbers, together
from axontrain.schedule_free import OwnAverage, averaging
from axontrain.shown import NAME, plain, quoted

# Flags wait on the device until a reading; a loop that never reads reads here.
MOST_PENDING = 1024
# The scale of losses may have to be halved so often before gradients fit in float16: from 2^16 down to below 1.
HALVINGS = 20
FLAGS = 256
ALL = "all"
# Options of torch's optimizers that say which kernel computes, and not what.
KERNEL = ("fused", "foreach", "capturable", "differentiable")


class Done(NamedTuple):
    """An update of which nothing was read yet: its step, its flags, and what is told of it."""

    step: int
    not_finite: Tensor
    skipped: Tensor
    loss: Tensor
    terms: Mapping[str, Any]


class Update:
    """An :class:`Optimizer` bound to parameters.

    ``lr`` is the main group's present learning rate; ``steps`` counts its updates in this process; ``skipped`` counts those
    left out so far (as of the last reading); ``optimizers`` are the torch optimizers.
    """

    def __init__(
        self,
        name: str,
        spec: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        module: nn.Module | None = None,
        *,
        fused: bool = True,
    ) -> None:
        self.name, self.spec = name, spec
        self.parameters = dict(parameters)
        self.tensors = list(self.parameters.values())
        self.optimizers: list[torch.optim.Optimizer] = []
        self._guards: list[Guard] = []
        for part in parts(spec, self.parameters, module):
            optimizer, is_fused = build(part, fused)
            self.optimizers.append(optimizer)
            self._guards.append(Guard(optimizer, is_fused))
        # Those whose state is saved: SAM, for one, has within itself the optimizer that steps at last.
        self._inner = [(inner, outer) for outer in self.optimizers for inner in self._within(outer)]
        self._kept = [*self.optimizers, *(inner for inner, _ in self._inner)]
        self.average = self._average(module)
        self.not_finite: Tensor | None = None  # of the last update: above 0 if it was that which it was skipped for
        self.all_skipped: Tensor | None = None  # above 0 if all updates were, since somebody made it None
        self.veto: Tensor | None = None  # of the step in hand: above 0 if somebody wants it skipped, whatever it is
        self.again: Callable[[], Tensor] | None = None  # computes loss and gradients once more, while a step is done
        self.evaluations = 0  # how often that was asked for, ever
        self.scale = 1.0
        self._unscaled: list[float] = []  # the groups' rates as torch's schedulers have them, where those in use are others
        # On a GPU the rates of a schedule are such as float32 holds: kernels can take them from the device as well, in that.
        self.single = any(p.is_cuda for p in self.tensors)
        self.steps = 0
        self.skipped = 0
        self.in_a_row = 0
        self.bad_losses = 0  # so many in a row, where losses are scaled
        self.clock: Clock | None = None
        self.scaled = False  # whether losses are scaled: then gradients overflow now and then, and nothing is wrong
        self._pending: list[Done] = []
        self._later: Later[None] | None = None  # a reading that more of them than should wait have begun
        self._ones: dict[torch.device, Tensor] = {}
        self._zeros: dict[torch.device, list[Tensor]] = {}
        # Of the gradients that are there: whether one kernel can look through them all, and whether any is sparse.
        self._looked_at: list[bool] | str = []
        self._alike = self._sparse = False
        self._factor: Callable[[float], float] | None = None
        self._schedulers: list[LRScheduler] = []
        for group in self._groups():
            group.setdefault("initial_lr", group["lr"])
        self._made = _options(self._groups())
        self._set: builtins.set[str] = set()  # the names of options that were changed since
        if spec.schedule is not None:
            self._bind_schedule(spec.schedule)

    def _within(self, optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        own = {id(p) for p in self.tensors}
        found = [one for one in within(optimizer) if one.state is not optimizer.state]
        return [one for one in found if own.issuperset(id(p) for group in one.param_groups for p in group["params"])]

    def _average(self, module: nn.Module | None) -> Average | None:
        own = [optimizer for optimizer in self.optimizers if averaging(optimizer)]
        if self.spec.average is None:
            known = {id(p) for optimizer in own for group in optimizer.param_groups for p in group["params"]}
            return OwnAverage(own, {name: p for name, p in self.parameters.items() if id(p) in known}) if own else None
        if own:
            of = type(own[0]).__name__
            raise ConfigurationError(f"average={self.spec.average!r} with {of}, which keeps one by itself: leave average= out")
        return Average(self.spec.average, self.parameters, {} if module is None else buffers_of(module, self.parameters))

    @property
    def lr(self) -> float:
        """The present learning rate of the first group."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    @property
    def scheduled(self) -> bool:
        """Whether a schedule sets the learning rates."""
        return self._factor is not None or bool(self._schedulers)

    @property
    def sees_progress(self) -> bool:
        """Whether the schedule, or the start of an average, is by progress, which needs a plan with an end."""
        return self._factor is not None or (self.average is not None and self.average.spec.sees_progress)

    def update(self, loss: Tensor, terms: Mapping[str, Any]) -> Tensor:
        """Update the parameters from their gradients, and drop the gradients.

        Args:
            loss: scalar, detached: part of what has to be finite.
            terms: what a warning names beside it.

        Returns:
            A scalar float tensor: above 0 if the update was skipped.
        """
        if len(self._pending) >= MOST_PENDING:
            self._read_soon()
        if loss.ndim:
            loss = loss.reshape(())
        gradients = self._gradients(loss)
        if not gradients:
            return self._without_gradients(loss)
        spec, (flag, norm) = self.spec, self._judged(gradients, loss)
        if spec.on_nonfinite == "raise":
            self.refuse(loss, terms, flag)
        if spec.clip_norm is not None or spec.clip_value is not None:
            self._clip(gradients, norm)
        if self._factor is not None:
            self._set_scheduled_rates(self._factor)
        skip = flag if self.veto is None else self._or_vetoed(flag)
        if spec.closure:
            if (found := self._evaluated(skip, loss)) is not skip:
                flag = skip = found
        else:
            for guard in self._guards:
                guard.step(skip)
        for parameter in self.tensors:
            parameter.grad = None
        return self._finished(loss, terms, flag, skip)

    def _judged(self, gradients: list[Tensor], loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """Above 0 if something is not finite; and the norm of the gradients, where that is to be bounded."""
        if self.spec.clip_norm is None or self.spec.clip_value is not None:  # clamping would hide an infinity: look before it
            return self._not_finite(gradients, loss), None
        norm = _norm(gradients, loss.device)
        return (~torch.isfinite(norm + loss)).to(torch.float32), norm

    def judge(self, loss: Tensor) -> Tensor | None:
        """What an update does before its optimizers step, without a host read: look at the gradients, and clip them.

        Returns:
            Above 0 if something is not finite; None if there is no gradient.
        """
        loss = loss.reshape(())
        gradients = self._gradients(loss)
        if not gradients:
            return None
        flag, norm = self._judged(gradients, loss)
        self._clip(gradients, norm)
        return flag

    def step(self, flag: Tensor) -> None:
        """Let the optimizers step, unless ``flag`` is above 0, and drop the gradients."""
        for guard in self._guards:
            guard.step(flag)
        for parameter in self.tensors:
            parameter.grad = None

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """For the block, take no zeros from those that were made for later steps: what is recorded makes its own, each time."""
        before, self._zeros = self._zeros, {}
        try:
            yield
        finally:
            self._zeros = before

    def keeps(self) -> list[Any]:
        """What is kept between steps, object by object: in the optimizers' state, and to undo a step."""
        kept = [value for one in self.optimizers for state in one.state.values() for value in state.values()]
        kept += [guard.kept for guard in self._guards]
        return kept

    def read_by(self) -> str:
        """Which of the optimizers may read from the device while it steps, or has Python count or look on; "" if none."""
        for guard in self._guards:
            if why := guard.read_by():
                return why
        return ""

    def ready(self) -> None:
        """Get ready for an update that somebody else does, as a graph of the whole step: set its learning rates."""
        if len(self._pending) >= MOST_PENDING:
            self._read_soon()
        if self._factor is not None:
            self._set_scheduled_rates(self._factor)

    @property
    def rates(self) -> list[float]:
        """The learning rates of its groups; of a tensor's on a device it is read."""
        return [float(group["lr"]) for group in self._groups()]

    @rates.setter
    def rates(self, rates: list[float]) -> None:
        for group, rate in zip(self._groups(), rates, strict=True):
            _set_rate(group, rate)

    def done(self, loss: Tensor, terms: Mapping[str, Any], flag: Tensor) -> None:
        """Count an update that somebody else has done; ``flag`` is above 0 if it was left out as not finite.

        Raises:
            NonFiniteError: if it was, and ``on_nonfinite="raise"``.
        """
        if self.spec.on_nonfinite == "raise":
            self.refuse(loss, terms, flag)
        if self._schedulers:  # which warn if they are stepped before their optimizer
            for optimizer in self.optimizers:
                optimizer._opt_called = True  # type: ignore[attr-defined]
        self._finished(loss, terms, flag, flag)

    def refuse(self, loss: Tensor, terms: Mapping[str, Any], flag: Tensor) -> None:
        """Raise if ``flag`` is above 0; but of losses that are scaled, gradients overflow now and then, and that is no error.

        Raises:
            NonFiniteError: naming the step and, where they are there, the gradients.
        """
        if flag.item() and not (self.scaled and math.isfinite(loss.item())):  # on_nonfinite="raise" looks at each step
            raise self._error(loss, terms)

    def look(self, loss: Tensor, terms: Mapping[str, Any]) -> None:
        """Raise at once where the update would not be finite, at the cost of a host read; nothing is changed.

        Raises:
            NonFiniteError: naming the step and the gradients.
        """
        gradients = self._gradients(loss)
        if gradients:
            self.refuse(loss, terms, self._not_finite(gradients, loss))

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        gradients = [gradient for p in self.tensors if (gradient := p.grad) is not None]
        there = ALL if len(gradients) == len(self.tensors) else [p.grad is not None for p in self.tensors]
        if gradients and there != self._looked_at:
            self._looked_at = there
            self._look_at(gradients, loss)
        return self._coalesced() if self._sparse else gradients

    def _finished(self, loss: Tensor, terms: Mapping[str, Any], flag: Tensor, skip: Tensor) -> Tensor:
        if self._schedulers:
            self._step_schedulers()
        number = len(self._pending) if self.clock is None else self.clock.step  # _number, without a call in each step
        self._pending.append(Done(number + 1, flag, skip, loss, terms))
        self.steps += 1
        self.not_finite = flag
        if self.average is not None:
            self.all_skipped = skip if self.all_skipped is None else torch.minimum(self.all_skipped, skip)
        return skip

    def _or_vetoed(self, flag: Tensor) -> Tensor:
        """The flag; above 0 too where somebody wants the step in hand skipped."""
        return flag if self.veto is None else torch.maximum(flag, placed(self.veto, flag.device).to(flag))

    def _without_gradients(self, loss: Tensor) -> Tensor:
        if any(p.requires_grad for p in self.tensors):
            raise LossError(f"no parameter of the optimizer {self.name!r} has a gradient: the loss does not depend on them")
        self.not_finite = None
        return torch.zeros((), device=loss.device)  # all frozen for now: nothing to do until they are thawed

    def _number(self) -> int:
        """Of the step that is being done."""
        return self.clock.step + 1 if self.clock is not None else len(self._pending) + 1

    def _clip(self, gradients: list[Tensor], norm: Tensor | None = None) -> None:
        value, most = self.spec.clip_value, self.spec.clip_norm
        if not gradients:
            return
        if value is not None:
            for gradient in gradients:
                (gradient._values() if gradient.is_sparse else gradient).clamp_(-value, value)
        if most is not None:
            norm = _norm(gradients, gradients[0].device) if norm is None else norm
            # As torch's clip_grad_norm_: the small term keeps a norm of zero from dividing by zero.
            _scale(gradients, (most / (norm + 1e-6)).clamp_max(1.0))

    def _evaluated(self, flag: Tensor, loss: Tensor) -> Tensor:
        """Step an optimizer that evaluates the loss by itself; above 0 if that was skipped, or came to nothing finite."""
        again = self.again
        assert again is not None  # whoever trains with such an optimizer gives it
        found: Tensor | None = loss if self.spec.factory is torch.optim.LBFGS else None
        last: list[Tensor] = []

        def closure() -> Tensor:
            nonlocal found
            if found is not None:  # LBFGS asks first for what is there; others may have moved the weights by then
                first, found = found, None
                return first
            value = again()
            gradients = self._gradients(value)
            last[:] = [self._not_finite(gradients, value.detach())] if gradients else []
            self._clip(gradients)
            return value

        return self._guards[0].search(flag, closure, lambda: not any(map(bool, last)))

    def read(self) -> None:
        """Read which updates were skipped since the last reading; warn of them.

        Raises:
            NonFiniteError: after ``patience`` in a row.
        """
        at_once(self.reading())

    def reading(self) -> Reading[None]:
        """The same as a reading, of the updates that are done when it is begun; until its end it changes nothing."""
        pending = list(self._pending)
        if not pending:
            return
        flags, skips = yield from _flags(pending)
        skipped, in_a_row, longest = _counted(flags, self.in_a_row)
        patience, halvings, bad_losses = self.spec.patience, "", self.bad_losses if skipped else 0
        if self.scaled and longest >= patience + HALVINGS:
            halvings = f" after {HALVINGS} halvings of the loss scale"
        elif self.scaled and skipped:  # gradients overflow until the scale is right, and nothing is wrong; a loss is not scaled
            flags = yield from _of_losses(flags, pending)
            skipped, bad_losses, longest = _counted(flags, bad_losses)
        left_out = [done for flag, done in zip(flags, pending, strict=True) if flag]
        terms = yield from together([_terms(done.loss, done.terms) for done in left_out[:4]])
        theirs = not self._pending or self._pending[0] is not pending[0]
        if theirs:  # somebody has read them meanwhile, or went on from another state
            return
        self._pending = self._pending[len(pending) :]
        self.skipped, self.in_a_row, self.bad_losses = self.skipped + skips, in_a_row, bad_losses
        if not left_out:
            return
        told = "; ".join(f"step {done.step}: {of_done}" for done, of_done in zip(left_out, terms, strict=False))
        more = f"; ... step {left_out[-1].step}" if skipped > 4 else ""
        many, were = ("1 update", "was") if skipped == 1 else (f"{skipped} updates", "were")
        message = f"{many} of the optimizer {self.name!r} {were} skipped as not finite ({told}{more})"
        if longest >= patience:
            raise NonFiniteError(
                f"{message}; {longest} in a row, patience={patience}{halvings}. The weights are those from before. Lower "
                f"lr, set clip_norm=, or look at the data of those steps; on_nonfinite='raise' stops at the first.",
                [done.step for done in left_out],
            )
        warn(f"{message}; weights and optimizer state are as if they had not been", NonFiniteWarning)

    def _read_soon(self) -> None:
        """More updates wait than should: read them when they have arrived; wait for them where twice as many do."""
        later, self._later = self._later or Later(self.reading()), None
        if len(self._pending) >= 2 * MOST_PENDING:
            self.read()
        elif not later.arrived():
            self._later = later

    def rescale(self, factor: float, minimum: float = 0.0) -> None:
        """Multiply the learning rate of every group from now on by ``factor``, down to ``minimum`` in the first group."""
        base = float(self.optimizers[0].param_groups[0]["initial_lr"])
        factor = max(factor, minimum / (base * self.scale)) if base * self.scale > 0 else factor
        if factor >= 1:
            return
        if self._schedulers and not self._unscaled:
            self._unscaled = [float(group["lr"]) for group in self._groups()]
        self.scale *= factor
        for group in self._groups():
            _set_rate(group, self._held(float(group["lr"]) * factor))

    def set(self, **options: Any) -> None:
        """Change options of the parameter groups from now on, as of a run that was restored and is to go on with others.

        Args:
            lr: of the first group; the others keep their proportion to it, and a schedule its shape.
            options: of the algorithm, as ``weight_decay``, for every group.

        Raises:
            UnknownNameError: for an option that the algorithm has not.
            ConfigurationError: for a value that it cannot be; nothing is changed then.
        """
        groups = self._groups()
        for name in options:
            known = builtins.set.intersection(*({*group} for group in groups)) - {"params", "initial_lr"}
            if name not in known:
                raise unknown(f"option of the optimizer {self.name!r}:", name, known)
        for name, value in options.items():
            _check_option(self.name, name, value, groups[0][name])
        if "lr" in options:
            factor = float(options.pop("lr")) / float(groups[0]["initial_lr"])
            for group in groups:
                group["initial_lr"] = float(group["initial_lr"]) * factor
                _set_rate(group, self._held(float(group["lr"]) * factor))
            self._unscaled = [rate * factor for rate in self._unscaled]
            for scheduler in self._schedulers:
                scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
            self._set.add("lr")
        for group in groups:
            group.update(options)
        for guard in self._guards:
            guard.forget()
        self._set |= {*options}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, its options, its schedule, and what was skipped."""
        flags, skips = at_once(_flags(self._pending))
        of_losses = at_once(_of_losses(flags, self._pending)) if self.scaled else []
        return {
            "optimizers": [self._part_state(optimizer) for optimizer in self._kept],
            "schedulers": [
                {"kind": type(scheduler).__name__, "state": _plain(scheduler.state_dict())} for scheduler in self._schedulers
            ],
            "scale": self.scale,
            "unscaled": list(self._unscaled),
            "skipped": self.skipped + skips,
            "in_a_row": _counted(flags, self.in_a_row)[1],
            "bad_losses": _counted(of_losses, self.bad_losses)[1] if self.scaled else self.bad_losses,
            "average": None if self.average is None else self.average.state_dict(),
        }

    def described(self) -> dict[str, Any]:
        """The options that it was made with, in plain values: to be kept with a state."""
        of = {"clip_norm": self.spec.clip_norm, "clip_value": self.spec.clip_value, "schedule": self._described_schedule()}
        of["average"] = None if self.spec.average is None else self.spec.average.described()
        of["set"] = sorted(self._set)
        return self._made | of

    def _described_schedule(self) -> Any:
        """A schedule by what it gives: functions have no names that would tell them apart."""
        if self._factor is not None:
            return [float(self._factor(tenth / 10)) for tenth in range(11)]
        return [type(scheduler).__name__ for scheduler in self._schedulers] or None

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise unless ``state`` is of such an optimizer; nothing is changed.

        Raises:
            CheckpointError: if it is of another algorithm, of other parameters or groups, or of another kind of schedule.
        """
        of = f"the optimizer {self.name!r}"
        for key, own in (("optimizers", self._kept), ("schedulers", self._schedulers)):
            kinds = [type(one).__name__ for one in own]
            saved = [part["kind"] for part in state[key]]
            if len(kinds) != len(saved):
                raise CheckpointError(f"{of} has {len(kinds)} {key}, the saved one {len(saved)}")
            if kinds != saved:
                raise CheckpointError(f"{of} is made of {', '.join(kinds)}, the saved one of {', '.join(saved)}")
        if state["unscaled"] and len(state["unscaled"]) != len(self._groups()):
            raise CheckpointError(f"{of} has {len(self._groups())} groups, the saved one {len(state['unscaled'])}")
        for optimizer, part in zip(self._kept, state["optimizers"], strict=True):
            mine = self._grouped(optimizer)
            its = [group["parameters"] for group in part["groups"]]
            if mine != its:
                a, b = ({name for group in groups for name in group} for groups in (mine, its))
                names = ", ".join(plain(name, NAME) for name in sorted(a ^ b)[:8])
                sizes = [" and ".join(str(len(group)) for group in groups) for groups in (mine, its)]
                of_groups = f"other groups of parameters than the saved one: of {sizes[0]} here, of {sizes[1]} there"
                how = f"other parameters than the saved one: they differ in {names}" if names else of_groups
                raise CheckpointError(f"{of} is of {how}")
            for group, saved_group in zip(optimizer.param_groups, part["groups"], strict=True):
                _check_kinds(of, group, saved_group)
                self._check_shapes(of, group, part["state"])
        for scheduler, saved_one in zip(self._schedulers, state["schedulers"], strict=True):
            own = _plain(scheduler.state_dict())
            if foreign := sorted(set(saved_one["state"]) - set(own)):
                raise CheckpointError(
                    f"the saved schedule of {of} has {foreign[0][:100]!r}, which {type(scheduler).__name__} lacks"
                )
            _check_kinds(of, own, saved_one["state"])
        if self.average is not None and self.takes(state.get("average")):
            check_raw(of, self.average.tensors(), state["average"])

    def _check_shapes(self, of: str, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        # A fused kernel takes the sizes at their word, and would write outside of what is there.
        if not group.get("fused"):
            return
        shapes = {id(p): (name, p.shape) for name, p in self.parameters.items()}
        for name, shape in (shapes[id(p)] for p in group["params"]):
            for key, value in state.get(name, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.shape != shape:
                    raise CheckpointError(
                        f"{key} of {name} in {of} is {tuple(value.shape)} in the saved one, {tuple(shape)} here"
                    )

    def load_state_dict(self, state: Mapping[str, Any], dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """Go on from what ``state_dict`` gave.

        Args:
            state: that.
            dtypes: of the parameters when it was saved, by name: where one is another now, its state is turned into that.

        Raises:
            CheckpointError: if it is of other parameters or of another number of optimizers or schedules.
        """
        self.check(state)
        shared = [
            (inner, outer)
            for inner, outer in self._inner
            if all(one is other for one, other in zip(inner.param_groups, outer.param_groups, strict=False))
        ]
        for optimizer, part in zip(self._kept, state["optimizers"], strict=True):
            self._load_part(optimizer, part, dtypes or {})
        for inner, outer in shared:  # torch puts new groups in place of those that were loaded
            inner.param_groups = outer.param_groups
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(_restored(saved["state"], scheduler.state_dict()))
        self.scale, self._unscaled = state["scale"], list(state["unscaled"])
        self.skipped, self.in_a_row, self.bad_losses = state["skipped"], state["in_a_row"], state["bad_losses"]
        self._pending, self._later, self._looked_at = [], None, []
        if self._unscaled and self.scale == 1 and not self.single:  # of a run on a GPU
            for group, rate in zip(self._groups(), self._unscaled, strict=True):
                _set_rate(group, rate)
            self._unscaled = []
        for guard in self._guards:
            guard.forget()

    def load_average(self, state: Mapping[str, Any], *, training: bool) -> None:
        """The average of ``state_dict``, once the module holds it; ``training`` says whether the raw weights come back now."""
        if self.average is None:
            return
        if self.takes(state.get("average")):
            self.average.load_state_dict(state["average"], training=training)
        else:
            self.average.forget()

    def takes(self, saved: Mapping[str, Any] | None) -> bool:
        """Whether a saved average is one that goes on here."""
        return self.average is not None and saved is not None and saved["kind"] == self.average.spec.kind

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
        if self.single:
            self._unscaled = [float(group["lr"]) for group in self._groups()]
            for group, rate in zip(self._groups(), self._unscaled, strict=True):
                _set_rate(group, self._held(rate))

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _set_scheduled_rates(self, schedule: Callable[[float], float]) -> None:
        if self.clock is None:
            return
        factor = float(schedule(self.clock.progress))
        if not math.isfinite(factor):
            raise self._no_rate(f"gave {factor} for the progress {self.clock.progress:g}")
        factor *= self.scale
        for group in self._groups():
            rate = float(group["initial_lr"]) * factor
            _set_rate(group, ctypes.c_float(rate).value if self.single else rate)

    def _no_rate(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"step {self._number()}: the schedule of the optimizer {self.name!r} {what}. An update by it would spoil the "
            f"weights; they are those from before"
        )

    def _step_schedulers(self) -> None:
        # Some of torch's schedulers go on from the present rate, some from the base: each sees the rate that it has set.
        apart = self.scale != 1 or self.single
        if apart and self._unscaled:
            for group, rate in zip(self._groups(), self._unscaled, strict=True):
                _set_rate(group, rate)
        for scheduler in self._schedulers:
            scheduler.step()
            if any(
                isinstance(group["lr"], float) and not math.isfinite(group["lr"]) for group in scheduler.optimizer.param_groups
            ):
                raise self._no_rate(f"({type(scheduler).__name__}) set a learning rate that is not finite")
        if apart:
            self._unscaled = [float(group["lr"]) for group in self._groups()]
            for group, rate in zip(self._groups(), self._unscaled, strict=True):
                _set_rate(group, self._held(rate * self.scale))

    def _held(self, rate: float) -> float:
        """A rate as it is kept in a group."""
        return ctypes.c_float(rate).value if self.single and self.scheduled else rate

    def _look_at(self, gradients: list[Tensor], loss: Tensor) -> None:
        self._sparse = any(g.is_sparse for g in gradients)
        alike = all(g.dtype is loss.dtype and g.device == loss.device for g in gradients)
        self._alike = alike and not self._sparse and not gradients[0].is_complex()
        if self._sparse:
            for guard in self._guards:
                guard.unfuse()

    def _coalesced(self) -> list[Tensor]:
        # A sparse gradient may hold a row twice, to be added up: before that its norm and its bounds mean nothing.
        for parameter in self.tensors:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        return [p.grad for p in self.tensors if p.grad is not None]

    def _not_finite(self, gradients: list[Tensor], loss: Tensor) -> Tensor:
        if self._alike:
            return self._checked([*gradients, loss])
        flag = torch.zeros((), device=loss.device)
        for one in (*gradients, loss):
            values = one._values() if one.is_sparse else one
            flag = flag + (~torch.isfinite(values).all()).to(device=loss.device, dtype=flag.dtype)
        return flag.clamp_max(1.0)

    def _checked(self, tensors: list[Tensor]) -> Tensor:
        device = tensors[0].device
        if tensors[0].dtype is torch.bfloat16:  # for which the kernel below is missing on CUDA
            largest = torch.stack(torch._foreach_norm([tensor for tensor in tensors if tensor.numel()], math.inf))
            return (~torch.isfinite(largest)).any().float()
        # One kernel over all gradients; made for GradScaler, and with a scale of one it changes nothing.
        one = self._ones.get(device)
        if one is None:
            one = self._ones[device] = torch.ones((), device=device)
        zeros = self._zeros.get(device)
        if not zeros:  # made for many steps at once: one by one they cost more than the look
            zeros = self._zeros[device] = list(torch.zeros(FLAGS, device=device).unbind())
        flag = zeros.pop()
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, one)
        return flag

    def _error(self, loss: Tensor, terms: Mapping[str, Any]) -> NonFiniteError:
        step = self._number()
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        finite = Fetch(torch.isfinite(g._values() if g.is_sparse else g).all() for g in gradients.values()).values()
        bad = [name for name, is_finite in zip(gradients, finite, strict=True) if not is_finite]
        where = f"; gradients of {', '.join(bad[:6])}{', ...' if len(bad) > 6 else ''} are not finite" if bad else ""
        by = f"nothing was updated by the optimizer {self.name!r} (on_nonfinite='raise')"
        return NonFiniteError(f"step {step}: {at_once(_terms(loss, terms))}{where}; {by}", [step])

    def _grouped(self, optimizer: torch.optim.Optimizer) -> list[list[str]]:
        """The names of an optimizer's parameters, group by group."""
        names = {id(p): name for name, p in self.parameters.items()}
        return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    def _part_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        names = {id(p): name for name, p in self.parameters.items()}
        if others := [key for key in optimizer.state if id(key) not in names and optimizer.state[key]]:
            raise CheckpointError(
                f"the optimizer {self.name!r} ({type(optimizer).__name__}) keeps a state under {str(others[0])[:40]!r}, which "
                f"is none of its parameters: what is saved is by parameter; keep it there, or in its groups"
            )
        return {
            "kind": type(optimizer).__name__,
            "state": {
                names[id(p)]: {key: _plain(value) for key, value in state.items()}
                for p, state in optimizer.state.items()
                if state
            },
            "groups": [
                {"parameters": parameters}
                | {key: _plain(value) for key, value in group.items() if key != "params" and _savable(value)}
                for parameters, group in zip(self._grouped(optimizer), optimizer.param_groups, strict=True)
            ],
        }

    def _load_part(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
        names = {id(p): name for name, p in self.parameters.items()}
        index = {name: i for i, name in enumerate(name for group in self._grouped(optimizer) for name in group)}
        groups, count = [], 0
        for group, of_saved in zip(optimizer.param_groups, saved["groups"], strict=True):
            size = len(group["params"])
            options = {key: value for key, value in group.items() if key != "params"}
            taken = {k: v for k, v in of_saved.items() if k in options and k not in KERNEL}
            options |= {k: _like(v, options.get(k)) for k, v in taken.items()}
            groups.append({**options, "params": list(range(count, count + size))})
            count += size
        state = {index[name]: {k: _like(v, None) for k, v in of.items()} for name, of in saved["state"].items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        # torch brings all of it to the dtype of its parameter, where a float32 copy of bfloat16 weights would lose what it is
        # for; and a file has no strides, which fused kernels take to be the parameter's.
        for group in optimizer.param_groups:
            for p in group["params"]:
                for key, value in saved["state"].get(names[id(p)], {}).items():
                    if key != "step" and isinstance(value, Tensor):
                        if value.dtype is dtypes.get(names[id(p)]) and value.dtype is not p.dtype:
                            value = value.to(p.dtype)
                        optimizer.state[p][key] = _laid_out(value, p, fused=bool(group.get("fused")))


def _counted(flags: list[float], in_a_row: int) -> tuple[int, int, int]:
    """How many were skipped, how many in a row up to now, and the most in a row; so many were when it began."""
    longest = 0
    for flag in flags:
        in_a_row = in_a_row + 1 if flag else 0
        longest = max(longest, in_a_row)
    return sum(map(bool, flags)), in_a_row, longest


def _flags(pending: list[Done]) -> Reading[tuple[list[float], int]]:
    """Which updates were not finite, and how many were skipped, for whatever reason."""
    vetoed = [done.skipped for done in pending if done.skipped is not done.not_finite]
    both = [[done.not_finite for done in pending], vetoed]
    fetch = Fetch(torch.stack(flags) if flags else [] for flags in both)
    yield [fetch]
    flags, of_vetoed = fetch.values()
    own = sum(bool(flag) for flag, done in zip(flags, pending, strict=True) if done.skipped is done.not_finite)
    return flags, own + sum(map(bool, of_vetoed))


def _of_losses(flags: list[float], pending: list[Done]) -> Reading[list[float]]:
    """Those of the flags that are of a loss that is not finite by itself."""
    fetch = Fetch(done.loss if flag else 0.0 for flag, done in zip(flags, pending, strict=True))
    yield [fetch]
    return [float(not math.isfinite(loss)) for loss in fetch.values()]


def _check_kinds(of: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise where an option that was saved is of another kind than the own one; None may stand for any but a number."""
    for key in set(own) & set(saved) - {"params"}:
        a, b = _kind(own[key]), _kind(saved[key])
        if key in KERNEL and b not in ("nothing", "true or false"):
            raise CheckpointError(f"{key} of {of} is {b} in the saved one: it is true, false or nothing")
        asked = key not in KERNEL and (a in ("a number", "true or false") or a.startswith("a list"))
        if a != b and a != "nothing" and (b != "nothing" or asked):
            raise CheckpointError(f"{key} of {of} is {a} here, and {b} in the saved one")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (tuple, list)):
        return f"a list of {', '.join(map(_kind, value))}"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "a number"
    return "a mapping" if isinstance(value, Mapping) else type(value).__name__


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The norm over all gradients, without a host read."""
    dense = [g._values() if g.is_sparse else g for g in gradients]
    norms = torch._foreach_norm(dense) if on_one_device(dense) else [g.norm().to(device) for g in dense]
    dtype = torch.float64 if norms[0].dtype is torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(dtype) for n in norms]))
    return norm


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    if on_one_device(gradients) and not any(g.is_sparse for g in gradients):
        torch._foreach_mul_(gradients, factor)
        return
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # in a captured or compiled step the rate lives on the device
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _terms(loss: Tensor, terms: Mapping[str, Any]) -> Reading[str]:
    told = yield from numbers({"loss": loss, **terms})
    values = ", ".join(f"{name} {value:g}" for name, value in told.items())
    return values if not all(map(math.isfinite, told.values())) else f"{values}, gradients not finite"


def _options(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Options of parameter groups by name: one value where all have the same, else a list of each group's."""
    ours = ("params", "initial_lr", *KERNEL)
    names = dict.fromkeys(name for group in groups for name in group if name not in ours)
    plain = {
        name: [_plain(value.tolist() if isinstance(value := group.get(name), Tensor) else value) for group in groups]
        for name in names
        if all(_savable(group.get(name)) for group in groups)
    }
    return {name: values[0] if all(value == values[0] for value in values) else values for name, values in plain.items()}


def _savable(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_savable(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor, Mapping))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if _savable(item)}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _like(value: Any, own: Any) -> Any:
    if isinstance(own, tuple) and isinstance(value, list):
        return tuple(_like(item, None) for item in value)
    if isinstance(value, list):  # of LBFGS: tensors that were read from a file lie where its bytes do
        return [_like(item, None) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def _laid_out(value: Tensor, parameter: Tensor, *, fused: bool) -> Tensor:
    """A tensor of an optimizer's state on its parameter's device and, where it has its shape, in its layout."""
    if value.shape != parameter.shape:
        return value.detach().to(parameter.device, copy=True)
    dtype = parameter.dtype if fused else value.dtype  # a fused kernel does not look at it
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(value)


def _restored(saved: Any, own: Any) -> Any:
    """What was saved, in the types of what is there, and with what of it could not be saved (functions)."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        # JSON has only text for keys; torch's schedulers count by integers (MultiStepLR.milestones).
        if own and all(isinstance(key, int) for key in own):
            return type(own)({int(key): value for key, value in saved.items()})  # type: ignore[call-arg]
        return {**own, **{key: _restored(value, own.get(key)) for key, value in saved.items()}}
    if isinstance(saved, list) and isinstance(own, (list, tuple)) and len(saved) == len(own):
        return type(own)(_restored(a, b) for a, b in zip(saved, own, strict=True))
    return saved


SIZES = ("lr", "weight_decay", "momentum", "eps", "alpha", "lambd", "lr_decay")  # options that are numbers, and 0 or more


def _check_option(optimizer: str, name: str, value: Any, now: Any) -> None:
    """Raise unless a value can be one of an option: torch looks at them only when an optimizer is made."""
    asked = f"set({name}={quoted(value)}) of the optimizer {optimizer!r}"
    if isinstance(now, bool) and value is not None and not isinstance(value, bool):
        raise ConfigurationError(f"{asked}: True or False")
    if name in SIZES and not isinstance(value, Tensor) and not _is_size(value):
        raise ConfigurationError(f"{asked}: a finite number, 0 or more")
    if name == "betas":
        pair = value if isinstance(value, (tuple, list)) and len(value) == len(now) else ()
        if not pair or not all(isinstance(one, Tensor) or (_is_size(one) and one < 1) for one in pair):
            raise ConfigurationError(f"{asked}: {len(now)} numbers from 0 to 1, 1 itself left out")


def _is_size(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
