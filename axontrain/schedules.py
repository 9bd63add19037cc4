r"""Schedules: functions of progress (0 to 1) that give the factor of the base learning rate.

Each takes ``warmup``, a fraction of the run (``0.05`` or ``"5%"``), over which the factor rises linearly from 0 to where
the schedule begins; the schedule itself then runs over what is left. With warm-up w and schedule f::

    factor(p) = f(0) · p / w                 for p < w
    factor(p) = f((p − w) / (1 − w))         from w on

A user's own schedule is any such function. A schedule knows nothing of steps or epochs, so it means the same on any
number of ranks, and a longer run needs no other one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from axontrain.errors import ConfigurationError

Schedule = Callable[[float], float]


def constant(*, warmup: float | str = 0.0) -> Schedule:
    """Keep the base rate.

    >>> constant(warmup="10%")(0.05)
    0.5
    """
    return _warmed(functools.partial(_linear, 1.0), warmup)


def linear(*, end: float = 0.0, warmup: float | str = 0.0) -> Schedule:
    """Fall in a straight line from 1 to ``end``.

    >>> linear()(0.25)
    0.75
    """
    _at_least_zero("end", end)
    return _warmed(functools.partial(_linear, end), warmup)


def cosine(*, end: float = 0.0, warmup: float | str = 0.0) -> Schedule:
    """Fall along half a cosine from 1 to ``end`` (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts).

    factor(p) = end + (1 − end) · (1 + cos πp) / 2

    >>> cosine(warmup="50%")(0.25), cosine()(1.0)
    (0.5, 0.0)
    """
    _at_least_zero("end", end)
    return _warmed(functools.partial(_cosine, end), warmup)


def one_cycle(*, peak: float = 0.3, start: float = 0.04, end: float = 4e-6, warmup: float | str = 0.0) -> Schedule:
    """Rise to the base rate at progress ``peak`` and fall to almost nothing, along cosines.

    The base rate is the highest of the run, as ``max_lr`` is in ``torch.optim.lr_scheduler.OneCycleLR``, whose default
    shape this is (Smith and Topin 2018, arXiv:1708.07120; cosine instead of straight lines after fastai).

    >>> one_cycle()(0.3)
    1.0
    """
    if not 0 < peak < 1:
        raise ConfigurationError(f"one_cycle(peak={peak!r}): the peak lies between 0 and 1, as in 0.3")
    _at_least_zero("start", start)
    _at_least_zero("end", end)
    return _warmed(functools.partial(_one_cycle, peak, start, end), warmup)


def inverse_sqrt(*, warmup: float | str = 0.05) -> Schedule:
    """Fall with the square root of time after warm-up (Vaswani et al. 2017, arXiv:1706.03762, equation 3).

    factor(p) = p / w for p < w, sqrt(w / p) from w on. It needs a warm-up: without one it begins at infinity.

    >>> inverse_sqrt(warmup=0.25)(1.0)
    0.5
    """
    warm = _fraction("warmup", warmup)
    if warm == 0:
        raise ConfigurationError("inverse_sqrt(warmup=0) begins at infinity: give a warm-up, as in '5%'")
    return functools.partial(_inverse_sqrt, warm)


def step(*, at: Sequence[float | str], factor: float = 0.1, warmup: float | str = 0.0) -> Schedule:
    """Multiply by ``factor`` at each point of progress in ``at``.

    >>> step(at=["50%", "75%"])(0.6)
    0.1
    """
    if isinstance(at, (str, float, int)):
        raise ConfigurationError(f"step(at={at!r}): at is a list of points of progress, as in ['50%', '75%']")
    points = sorted(_fraction("at", point) for point in at)
    _at_least_zero("factor", factor)

    # Points are of the whole run, with its warm-up: "75%" is where a reader looks for it.
    return _warmed(functools.partial(_step, points, factor, _fraction("warmup", warmup)), warmup)


def _warmed(schedule: Schedule, warmup: float | str) -> Schedule:
    warm = _fraction("warmup", warmup)
    return functools.partial(_after_warmup, schedule, warm) if warm else schedule


# Functions of a module, so that a Loop can be sent to another process.


def _after_warmup(schedule: Schedule, warm: float, progress: float) -> float:
    if progress < warm:
        return schedule(0.0) * progress / warm
    return schedule((progress - warm) / (1 - warm))


def _linear(end: float, progress: float) -> float:
    return 1 + (end - 1) * progress


def _cosine(end: float, progress: float) -> float:
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def _one_cycle(peak: float, start: float, end: float, progress: float) -> float:
    if progress <= peak:
        return _between(start, 1.0, progress / peak)
    return _between(1.0, end, (progress - peak) / (1 - peak))


def _inverse_sqrt(warm: float, progress: float) -> float:
    return progress / warm if progress < warm else math.sqrt(warm / progress)


def _step(points: Sequence[float], factor: float, warm: float, progress: float) -> float:
    return factor ** sum(warm + progress * (1 - warm) >= point for point in points)


def _fraction(name: str, value: float | str) -> float:
    try:
        if isinstance(value, str):
            if not value.strip().endswith("%"):
                raise ValueError
            fraction = float(value.strip()[:-1]) / 100
        else:
            fraction = float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name}={value!r}: give a fraction of the run, as in 0.05 or '5%'") from None
    if not 0 <= fraction < 1:
        raise ConfigurationError(f"{name}={value!r}: a fraction of the run lies in 0 to 1 (1 itself left out)")
    return fraction


def _at_least_zero(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigurationError(f"{name}={value!r}: a factor of the learning rate is 0 or more")


def _between(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
