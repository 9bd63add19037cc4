"""Averages of weights over training: a moving one (EMA), or an equal one over its end (SWA).

Training goes on with the raw weights. The average is what is evaluated, predicted with, saved and exported: it is put into the
module for as long as that takes, by copies into its own tensors, and stays there between fits. Buffers of floating-point
numbers, as the running means of BatchNorm, are averaged like the weights. Averages of weights in float16 and bfloat16 are
float32, in which the small share of a step is not rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from axontrain.clock import Cadence, Clock, Duration, Every
from axontrain.errors import CheckpointError, ConfigurationError, kind_of, unknown, warn
from axontrain.guard import is_dense, mixed, on_one_device
from axontrain.shown import NAME, plain


class EMA:
    """What :func:`ema` describes."""

    kind, sees_progress = "ema", False

    def __init__(self, decay: float | None, over: Duration | None, warmup: bool) -> None:
        self.decay, self.over, self.warmup = decay, over, warmup

    def described(self) -> list[Any]:
        """Its arguments in plain values."""
        return [self.kind, self.decay, None if self.over is None else str(self.over), self.warmup]

    def share(self, samples: int, folds: int) -> float:
        """The share of the new weights in the average, after a step of so many samples and so many steps before."""
        decay = self._decay(samples)
        return 1 - (min(decay, (1 + folds) / (10 + folds)) if self.warmup else decay)

    def warm_share(self, samples: int, ninths: Tensor) -> Tensor:
        """The same in the warm-up, of a scalar tensor (10 + steps) / 9: 1 - (1 + n) / (10 + n) = 9 / (10 + n)."""
        return ninths.reciprocal().clamp_min(1 - self._decay(samples))

    def warms(self, folds: int) -> bool:
        """Whether it has to be known how many of so many steps were skipped, to tell the share.

        Up to twice the length of the warm-up: where half of them were skipped, the last of it is given up. Where the decay is
        by samples, it is as long as the smallest batch wants, which nobody knows.
        """
        if not self.warmup or (self.over is not None and self.over.unit == "samples"):
            return self.warmup
        decay = self._decay(1)
        return folds < 2 * (10 * decay - 1) / (1 - decay) + 64

    def _decay(self, samples: int) -> float:
        if self.decay is not None:
            return self.decay
        assert self.over is not None  # one of the two is given
        return math.exp(-(samples if self.over.unit == "samples" else 1) / float(self.over.amount))

    def __repr__(self) -> str:
        how = f"over='{self.over}'" if self.over is not None else f"decay={self.decay:g}"
        return f"ema({how}{'' if self.warmup else ', warmup=False'})"


class SWA:
    """What :func:`swa` describes."""

    kind = "swa"

    def __init__(self, start: Duration, every: Every) -> None:
        self.start, self.every = start, every
        self.sees_progress = start.unit == "percent"

    def described(self) -> list[Any]:
        """Its arguments in plain values."""
        return [self.kind, str(self.start), repr(self.every)]

    def __repr__(self) -> str:
        return f"swa(start='{self.start}', every='{self.every.interval}')"


def ema(decay: float | None = None, *, over: str | int | None = None, warmup: bool = True) -> EMA:
    """An exponential moving average: after each step ``average = d · average + (1 − d) · weights``.

    Args:
        decay: d, in 0 to 1; 0.999 unless ``over`` is given.
        over: its time constant instead, as "1000 steps" or "50000 samples": d = exp(−step / over), so that another batch size
            averages over as many samples.
        warmup: begin with a smaller d, the least of d and (1 + n) / (10 + n) after n steps, so that the first weights are
            forgotten soon (as in TensorFlow's ``ExponentialMovingAverage``).

    >>> ema(0.99).share(samples=32, folds=0)
    0.9
    >>> ema(over="1000 steps")
    ema(over='1000 steps')

    Raises:
        ConfigurationError: for both, for a decay outside of 0 to 1, or a time constant of another unit.
    """
    if decay is not None and over is not None:
        raise ConfigurationError(f"ema(decay={decay!r}, over={over!r}): one of the two, which say the same")
    if over is not None:
        duration = Duration.parse(over, "over")
        if duration.unit not in ("steps", "samples") or duration.amount == 0:
            raise ConfigurationError(f"over={over!r}: a number of steps or samples above 0, as '1000 steps'")
        return EMA(None, duration, bool(warmup))
    decay = 0.999 if decay is None else decay
    if isinstance(decay, (bool, str)) or not hasattr(decay, "__float__") or not 0 <= float(decay) < 1:
        raise ConfigurationError(f"decay={decay!r}: a number from 0 to below 1, as 0.999")
    return EMA(float(decay), None, bool(warmup))


def swa(start: str | int = "75%", *, every: str | int = "1 epoch") -> SWA:
    """The equal average of the weights at several points of the end of training (Izmailov et al. 2018, arXiv:1803.05407).

    Args:
        start: from when on: "75%" of the fit, "10 epochs", or a number of steps. Until then there is no average.
        every: how often the weights are taken; ``every=1`` is the average over all steps (Polyak and Juditsky 1992).

    The running means of BatchNorm are averaged too; those of the averaged weights themselves are had by a pass over the data in
    training mode, as ``torch.optim.swa_utils.update_bn`` makes it. Use a constant learning rate while it averages.

    >>> swa("50%", every="100 steps")
    swa(start='50%', every='100 steps')

    Raises:
        ConfigurationError: for what is no duration.
    """
    begin = Duration.parse(start, "start")
    if begin.unit == "percent" and begin.amount > 100:
        raise ConfigurationError(f"start={start!r}: of a fit there is no more than 100%")
    if callable(every) or every is None:
        raise ConfigurationError(f"every={every!r}: a duration, as '1 epoch' or a number of steps")
    return SWA(begin, Every(every, after=start))


def parse(average: Any) -> EMA | SWA | None:
    """Read what ``average=`` of an Optimizer takes.

    Raises:
        ConfigurationError: if it is no average.
    """
    if average is None or isinstance(average, (EMA, SWA)):
        return average
    if isinstance(average, str):
        if average not in ("ema", "swa"):
            raise unknown("average", average, ("ema", "swa"), "With arguments: ax.averages.ema(0.9999).")
        return ema() if average == "ema" else swa()
    hint = ": call it, as ax.averages.ema()" if average in (ema, swa) else ""
    raise ConfigurationError(f"average={kind_of(average)}: 'ema', 'swa', ax.averages.ema(...) or ax.averages.swa(...){hint}")


Slot = tuple[nn.Module, str]


class Spec(Protocol):
    """How to average, in words."""

    @property
    def kind(self) -> str:
        """Its name."""

    @property
    def sees_progress(self) -> bool:
        """Whether it needs a fit with an end."""

    def described(self) -> list[Any]:
        """Its arguments in plain values."""


class Average:
    """An average bound to parameters and buffers.

    Args:
        spec: what :func:`ema` or :func:`swa` gave.
        parameters: by name; those that are frozen are looked at again when one is thawed.
        buffers: by name, where they are found: modules replace them.
    """

    def __init__(self, spec: Spec, parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Slot]) -> None:
        self.spec, self.parameters, self.buffers = spec, dict(parameters), dict(buffers)
        self.average: dict[str, Tensor] = {}  # by name; empty until the average begins
        self.raw: dict[str, Tensor] | None = None  # of those names, while the module holds the average
        self.torn = False  # an exception came in the middle of copying
        self.folds = 0  # skipped ones too
        self.counted: Tensor | None = None  # (10 + those that were not) / 9, on the device, while a warm-up asks for it
        self._own = {name: self._buffer(name) for name in self.buffers}  # what is in their places to begin with
        self._tensors = list(self.parameters.values())
        self._taken: list[bool] = []  # which parameters were trainable when it was last looked
        self._lists: tuple[list[Tensor], list[Tensor]] | None = None  # the live parameters and their averages
        self.cadence = Cadence(spec.every) if isinstance(spec, SWA) else None

    def stepped(self, flag: Tensor, samples: int) -> None:
        """After a step of so many samples; it counts only where ``flag`` is 0."""
        if not isinstance(self.spec, EMA):
            return
        if not self.spec.warms(self.folds):
            self._fold(self.spec.share(samples, self.folds), flag)
            return
        if self.counted is None:
            dtype = torch.float32 if flag.device.type == "mps" else torch.float64
            self.counted = torch.full((), (10 + self.folds) / 9, dtype=dtype, device=flag.device)  # made there: no copy waits
        counts = flag.to(self.counted.device) == 0
        self._fold(self.spec.warm_share(samples, self.counted) * counts)
        self.counted.add_(counts, alpha=1 / 9)

    def begin(self) -> None:
        """Before a step: an average that has to know the first weights takes them; so it does of what was thawed."""
        trained = [p.requires_grad for p in self._tensors]
        if isinstance(self.spec, EMA) and (not self.average or self._taken != trained):
            self._take_new(trained)
        self._taken = trained

    def settle(self, clock: Clock) -> None:
        """Take the weights as they are, if they are due at this point of the run."""
        if self.cadence is None or self.raw is not None:
            return
        self.cadence.start(clock, resumed=True)  # where it has begun already, that changes nothing
        if self.cadence.due(clock):
            # What was trained up to here: what callbacks thaw at this point may be thawed already, or not yet.
            self._take_new(self._taken or [p.requires_grad for p in self._tensors])
            self._fold(1 / (self.folds + 1))

    def show(self) -> bool:
        """Put the average into the module; False if it is there, or there is none yet."""
        if self.raw is not None or not self.average:
            return False
        self.raw, self.torn = {name: tensor.detach().clone() for name, tensor in self._live()}, True
        try:
            self._put(self.average)
        except BaseException:
            self.hide()
            raise
        self.torn = False
        return True

    def hide(self) -> None:
        """Put the raw weights back."""
        if self.raw is not None:
            self.torn = True
            self._put(self.raw)
            self.raw, self.torn = None, False

    def resume(self) -> None:
        """Training goes on: with the raw weights, unless somebody has put others into the module since."""
        if self.raw is None or self.torn or self._is_shown():
            self.hide()
        else:
            warn("the weights were changed since the last fit, which left their average in the module: training goes on from "
                 "those that are there now, and the average begins anew")  # fmt: skip
            self.forget()

    def _is_shown(self) -> bool:
        return all(_equal(live, self.average[name].to(live.dtype)) for name, live in self._live())

    def forget(self) -> None:
        """Begin anew, from what the module holds."""
        self.average, self.raw, self.torn, self.folds, self.counted, self._lists = {}, None, False, 0, None, None
        self._taken = []

    def shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the module is to be saved with: its tensors, and in place of each one of the same type."""
        for name, live in self._live():
            yield live, live.detach() if self.raw is not None else self.average[name].to(live.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The raw weights, and of the average what the module's own types cannot hold."""
        raw: dict[str, Tensor] = dict(self._live()) if self.raw is None else self.raw
        finer = {name: tensor for name, tensor in self.average.items() if tensor.dtype != raw[name].dtype}
        cadence = None if self.cadence is None else self.cadence.state_dict()
        raw = {name: tensor.detach() for name, tensor in raw.items()}
        counts = {"folds": self.folds, "counted": None if self.counted is None else self.counted.clone()}
        return {"kind": self.spec.kind, **counts, "raw": raw, "finer": finer, "cadence": cadence}

    def load_state_dict(self, state: Mapping[str, Any], *, training: bool) -> None:
        """Go on from what ``state_dict`` gave; the module holds the average, and ``training`` says whether it is to stay."""
        self.forget()
        self.folds = state["folds"]
        if self.cadence is not None and state["cadence"] is not None:
            self.cadence.load_state_dict(state["cadence"])
        raw, counted = state["raw"], state["counted"]
        live = {name: tensor for name, tensor in self._all() if name in raw}
        self.average = {name: _of_average(tensor) for name, tensor in live.items()}
        for name, tensor in state["finer"].items():
            self.average[name].copy_(tensor)
        if counted is not None and self._tensors:
            self.counted = counted.to(self._tensors[0].device, copy=True)
        if live:
            self.raw = {name: raw[name].to(tensor.device, copy=True) for name, tensor in live.items()}
        if training:
            self.hide()

    def tensors(self) -> dict[str, Tensor]:
        """All that may be averaged, as it is in the module now."""
        return dict(self._all())

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.parameters.items()
        for name in self.buffers:
            buffer = self._buffer(name)
            if buffer is not None:
                yield name, buffer

    def _buffer(self, name: str) -> Tensor | None:
        owner, key = self.buffers[name]
        return owner._buffers[key]

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the module's tensors that are averaged."""
        return ((name, tensor) for name, tensor in self._all() if name in self.average)

    def _take_new(self, trained: list[bool]) -> None:
        """Begin to average what is trained, and buffers."""
        self._lists = None
        of_parameter = dict(zip(self.parameters, trained, strict=True))
        for name, tensor in self._all():
            if name not in self.average and of_parameter.get(name, True):
                self.average[name] = _of_average(tensor)

    @torch.no_grad()
    def _fold(self, share: float | Tensor, flag: Tensor | None = None) -> None:
        """Move the average by a share of its distance to the weights; not at all where the flag is above 0."""
        self.folds += 1
        if self._lists is None:
            names = [name for name in self.parameters if name in self.average]
            self._lists = [self.parameters[name] for name in names], [self.average[name] for name in names]
        live, average = self._lists
        if self.buffers:
            found = self._fold_others(share, flag)
            live = live + [buffer for _, buffer in found]
            average = average + [self.average[name] for name, _ in found]
        if not live or not on_one_device(live) or mixed([*live, *average]):
            for own, tensor in zip(average, live, strict=True):
                own.add_((tensor - own) * _counted(share, flag, own))
            return
        away = torch._foreach_sub(live, average)
        torch._foreach_mul_(away, _counted(share, flag, away[0]))
        torch._foreach_add_(average, away)

    def _fold_others(self, share: float | Tensor, flag: Tensor | None) -> list[tuple[str, Tensor]]:
        """Fold the buffers that are no running means, each by itself; gives the others."""
        means = []
        for name, (owner, _) in self.buffers.items():
            buffer = self._buffer(name)
            if buffer is None:
                continue
            if name not in self.average or self.average[name].shape != buffer.shape:  # made, or grown, since
                self.average[name] = _of_average(buffer)
            elif isinstance(owner, _NormBase):
                means.append((name, buffer))
            else:
                own = self.average[name]
                # A mask of infinities is equal to its average, and not at a distance of inf - inf.
                own.add_(torch.where(buffer == own, 0, buffer - own) * _counted(share, flag, own))
        return means

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, live in self._live():
            if name in self.buffers and (live is not self._own.get(name) or not is_dense(live)):
                # What a step has put in a buffer's place may be somebody's, as the batch; and some cannot be written.
                owner, key = self.buffers[name]
                owner._buffers[key] = values[name].to(device=live.device, dtype=live.dtype, copy=True)
            else:
                live.copy_(values[name])


def check_raw(of: str, own: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Raise unless the raw weights of a saved average are of these tensors.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for part in ("raw", "finer"):
        for name, tensor in state[part].items():
            if name not in own or own[name].shape != tensor.shape:
                here = tuple(own[name].shape) if name in own else "not there"
                raise CheckpointError(
                    f"the average of {of}: {plain(name, NAME)} is {tuple(tensor.shape)} in the saved one, {here} here"
                )


def buffers_of(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Slot]:
    """The buffers of floating-point numbers that go with parameters: those of modules all of whose parameters these are."""
    own = {id(p) for p in parameters.values()}
    whole = [
        name
        for name, part in module.named_modules()
        if (of_part := [id(p) for p in part.parameters()]) and own.issuperset(of_part)
    ]
    found, seen = {}, set()  # one that is in several places is averaged once
    for name, part in module.named_modules():
        if any(top in ("", name) or name.startswith(f"{top}.") for top in whole):
            for key, buffer in part._buffers.items():
                if buffer is not None and buffer.is_floating_point() and id(buffer) not in seen:
                    seen.add(id(buffer))
                    found[f"{name}.{key}" if name else key] = (part, key)
    return found


def _counted(share: float | Tensor, flag: Tensor | None, like: Tensor) -> float | Tensor:
    if isinstance(share, Tensor):
        share = share.to(device=like.device, dtype=like.dtype)
    return share if flag is None else (flag.to(like.device) == 0).to(like.dtype) * share


def _equal(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN: what holds one is still the same."""
    return torch.equal(one, other) or (
        one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    )


def _of_average(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().to(torch.float32 if half else tensor.dtype, copy=True)
