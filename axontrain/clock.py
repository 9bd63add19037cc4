"""Durations and cadences: one vocabulary for limits, validation, hooks and saves.

A duration is an amount and a unit: ``100`` (steps), ``"2 epochs"``, ``"10 min"``, ``"1e6 samples"``, ``"5%"`` of the run.
"""

from __future__ import annotations

import datetime
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, Protocol

from axontrain.errors import ConfigurationError, unknown, whole

SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}
UNITS = {
    **dict.fromkeys(("step", "steps"), "steps"),
    **dict.fromkeys(("epoch", "epochs"), "epochs"),
    **dict.fromkeys(("sample", "samples"), "samples"),
    **dict.fromkeys(("%", "percent"), "percent"),
    **dict.fromkeys(SECONDS, "seconds"),
}
_PATTERN = re.compile(r"\s*(?P<amount>[0-9.]+(?:e[+-]?[0-9]+)?)\s*(?P<unit>[a-z%]*)\s*", re.IGNORECASE)


class Clock(Protocol):
    """What a cadence reads of the run: :class:`axontrain.LoopState` has all of it."""

    step: int
    epoch: int
    samples: int
    batch_index: int

    @property
    def epoch_length(self) -> int | None:
        """Batches in an epoch, where known."""

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""

    @property
    def progress(self) -> float:
        """How far the present fit has come, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Duration:
    """An amount of training: ``unit`` is one of steps, epochs, samples, seconds, percent.

    >>> Duration.parse("2 epochs")
    Duration(amount=Fraction(2, 1), unit='epochs')
    >>> Duration.parse("1.5 min")
    Duration(amount=Fraction(90, 1), unit='seconds')
    >>> Duration.parse(100).unit
    'steps'
    """

    amount: Fraction
    unit: str

    @classmethod
    def parse(cls, value: int | str | datetime.timedelta | Duration, name: str = "duration") -> Duration:
        """Read a duration; ``name`` is what an error calls it.

        Raises:
            ConfigurationError: for a bare float, a missing or unknown unit, or a negative amount.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, datetime.timedelta):
            return cls._checked(Fraction(value.total_seconds()), "seconds", value, name)
        if hasattr(value, "__index__") and not isinstance(value, bool):
            return cls._checked(Fraction(operator.index(value)), "steps", value, name)
        match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ConfigurationError(
                f"{name}={value!r} is no duration: give an int (steps), or an amount and a unit such as "
                f"'2 epochs', '10 min', '1e6 samples', '5%'"
            )
        word = match["unit"].lower()
        if word not in UNITS:
            if word:
                raise unknown(f"unit in {name}={value!r},", word, UNITS)
            raise ConfigurationError(f"{name}={value!r} has no unit: say '{match['amount']} steps' or '... epochs'")
        try:
            amount = Fraction(match["amount"])
        except ValueError as error:
            raise ConfigurationError(f"{name}={value!r}: {match['amount']!r} is no number") from error
        return cls._checked(amount * SECONDS.get(word, 1), UNITS[word], value, name)

    @classmethod
    def _checked(cls, amount: Fraction, unit: str, value: object, name: str) -> Duration:
        if amount < 0:
            raise ConfigurationError(f"{name}={value!r} is negative: a duration is 0 or more")
        if unit in ("steps", "samples") and amount.denominator != 1:
            raise ConfigurationError(f"{name}={value!r}: {unit} are whole")
        return cls(amount, unit)

    def measure(self, clock: Clock) -> Fraction | float:
        """How much of this duration's unit the run has done so far."""
        match self.unit:
            case "steps":
                return Fraction(clock.step)
            case "epochs":
                length = clock.epoch_length
                return clock.epoch + (Fraction(clock.batch_index, length) if length else Fraction(0))
            case "samples":
                return Fraction(clock.samples)
            case "seconds":
                return clock.elapsed
            case _:
                # In units of 1e-12 of the run, as 87/150 of it is 57.99999999999999 % in floats: a step of any run is far
                # larger than the unit, and what completes a percent is a whole number of them.
                return Fraction(round(clock.progress * 10**12), 10**10)

    def __str__(self) -> str:
        amount = self.amount.numerator if self.amount.denominator == 1 else float(self.amount)
        return f"{amount}%" if self.unit == "percent" else f"{amount} {self.unit}"


class Every:
    """When something happens, apart from what happens.

    Args:
        interval: due whenever the run has passed another multiple of this: ``100`` (steps), ``"2 epochs"``,
            ``"10 min"``, ``"1e6 samples"``, ``"5%"``; or a predicate on the state, due when it answers True;
            None: on each occasion.
        first: at most so many times.
        after: not before the run has done so much (that much itself included): ``after=10`` is from step 10 on.
        before: not once the run has done so much: ``before=40`` ends at step 39.

    >>> Every("2 epochs", first=3)
    Every('2 epochs', first=3)
    """

    __slots__ = ("after", "before", "first", "interval", "predicate")

    def __init__(
        self,
        interval: int | str | datetime.timedelta | Duration | Callable[[Any], bool] | None = None,
        *,
        first: int | None = None,
        after: int | str | None = None,
        before: int | str | None = None,
        name: str = "every",
    ) -> None:
        self.predicate: Callable[[Any], bool] | None = None
        self.interval: Duration | None = None
        if callable(interval):
            self.predicate = interval
        elif interval is not None:
            self.interval = Duration.parse(interval, name)
            if self.interval.amount == 0:
                raise ConfigurationError(f"{name}={interval!r} is never due: an interval is above 0")
        self.first = None if first is None else whole("first", first, what="of times")
        self.after = None if after is None else Duration.parse(after, "after")
        self.before = None if before is None else Duration.parse(before, "before")

    @classmethod
    def parse(cls, value: Every | int | str | Callable[[Any], bool] | None, name: str = "every", **bounds: Any) -> Every:
        """Make an Every of whatever the ``every=`` of a callback takes; ``name`` is what an error calls it."""
        if isinstance(value, Every):
            if any(bound is not None for bound in bounds.values()):
                raise ConfigurationError("give first=, after= and before= to the Every, or beside it: not both")
            return value
        return cls(value, name=name, **bounds)

    def __repr__(self) -> str:
        what = self.predicate if self.predicate is not None else None if self.interval is None else str(self.interval)
        bounds = [f"first={self.first}"] if self.first is not None else []
        bounds += [f"{n}='{d}'" for n, d in (("after", self.after), ("before", self.before)) if d is not None]
        return f"Every({', '.join([repr(what), *bounds])})"


class Cadence:
    """One use of an :class:`Every`: remembers what has already been due.

    Its state is apart from the Every, so that one Every may serve many callbacks without their sharing a count.
    """

    def __init__(self, every: Every) -> None:
        self.every = every
        self._multiple: int | None = None
        self.fired = 0

    def start(self, clock: Clock, *, resumed: bool = False) -> None:
        """Begin at the clock's present reading; what was passed before does not count.

        With ``resumed`` the plan is the old one, and what counts in percent of it goes on too.
        """
        percent = self.every.interval is not None and self.every.interval.unit == "percent"
        if self._multiple is None or (percent and not resumed):
            self._multiple = self._count(clock)

    def due(self, clock: Clock) -> bool:
        """Whether now is an occasion; asking takes it."""
        every = self.every
        if every.interval is not None:
            multiple = self._count(clock)
            passed = multiple > (self._multiple or 0)
            self._multiple = multiple
            if not passed:
                return False
        if every.after is not None and every.after.measure(clock) < every.after.amount:
            return False
        if every.before is not None and every.before.measure(clock) >= every.before.amount:
            return False
        if every.first is not None and self.fired >= every.first:
            return False
        if every.predicate is not None and not every.predicate(clock):
            return False
        self.fired += 1
        return True

    def next_step(self, clock: Clock) -> float:
        """No step before this one can be due (so that a loop asks only then); infinite if only an epoch's end can."""
        interval = self.every.interval
        if interval is None or interval.unit not in ("steps", "epochs", "seconds"):
            return clock.step + 1
        if interval.unit == "seconds":  # see seconds_left
            return math.inf
        if interval.unit == "epochs":
            return math.inf if interval.amount.denominator == 1 else clock.step + 1
        return float((clock.step // interval.amount + 1) * interval.amount)

    def seconds_left(self, clock: Clock) -> float:
        """How long it will take until this is due, if a time says so; else infinite."""
        interval = self.every.interval
        if interval is None or interval.unit != "seconds":
            return math.inf
        return max(0.0, float((self._multiple or 0) + 1) * float(interval.amount) - clock.elapsed)

    def _count(self, clock: Clock) -> int:
        interval = self.every.interval
        if interval is None:
            return 0
        if interval.unit == "steps":  # asked at every batch: whole numbers are ten times faster than fractions
            return clock.step // interval.amount.numerator
        return int(interval.measure(clock) // interval.amount)

    def change(self, every: Every) -> None:
        """Go by another Every from now on; what was counted in another interval says nothing any more."""
        if str(every.interval) != str(self.every.interval):
            self._multiple = None
        self.every = every

    def state_dict(self) -> dict[str, Any]:
        """What has already been due."""
        return {"interval": str(self.every.interval), "multiple": self._multiple, "fired": self.fired}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._multiple = state["multiple"] if state["interval"] == str(self.every.interval) else None
        self.fired = state["fired"]


@dataclass(slots=True)
class Plan:
    """The limits of one fit, and how far it has come: the progress that schedules see.

    Limits combine; the first reached ends the run. Progress counts whole steps, so that it is the same number on every
    machine: before the k-th of N updates (k from 0) it is k / N.
    """

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    start_epoch: int = 0
    start_step: int = 0
    start_index: int = 0
    start_elapsed: float = 0.0

    def goes_on_from(self, old: Plan) -> None:
        """Begin where another plan began: these limits are then those of both together."""
        self.start_epoch, self.start_step = old.start_epoch, old.start_step
        self.start_index, self.start_elapsed = old.start_index, old.start_elapsed

    def state_dict(self) -> dict[str, Any]:
        """The limits, and where it began."""
        return asdict(self)

    @property
    def limits(self) -> dict[str, Any]:
        """What ends it, by name; None where that does not."""
        return {"epochs": self.epochs, "steps": self.steps, "seconds": self.seconds}

    @classmethod
    def parse(cls, epochs: Any, steps: Any, time: Any) -> Plan:
        """The plan of these limits, as ``fit`` takes them.

        Raises:
            ConfigurationError: if one is no limit, or there is none.
        """
        epochs = None if epochs is None else whole("epochs", epochs, 0)
        steps = None if steps is None else whole("steps", steps, 0)
        seconds = None
        if time is not None:
            number = isinstance(time, (int, float)) and not isinstance(time, bool)
            duration = Duration.parse(f"{time!r} s" if number else time, "time")
            if duration.unit != "seconds":
                raise ConfigurationError(f"time={time!r}: a time, as '10 min', or a number of seconds")
            seconds = float(duration.amount)
        if epochs is None and steps is None and seconds is None:
            raise ConfigurationError(
                "fit would never end: give it a limit, epochs=, steps= or time= (the first reached ends it)"
            )
        return cls(epochs, steps, seconds)

    @property
    def trains_nothing(self) -> bool:
        """Whether a limit is reached before the first step."""
        return 0 in (self.epochs, self.steps, self.seconds)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Plan:
        """The plan that ``state_dict`` told of."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def over(self, clock: Clock) -> str | None:
        """The limit that has been reached, in words, or None."""
        if self.epochs is not None and clock.epoch - self.start_epoch >= self.epochs:
            return f"epochs={self.epochs}"
        if self.steps is not None and clock.step - self.start_step >= self.steps:
            return f"steps={self.steps}"
        if self.seconds is not None and clock.elapsed - self.start_elapsed >= self.seconds:
            return f"time={self.seconds:g} s"
        return None

    @property
    def last_step(self) -> float:
        """The step count at which the run ends, if a number of steps says so; else infinite."""
        return math.inf if self.steps is None else self.start_step + self.steps

    def progress(self, clock: Clock) -> float:
        """The fraction of the plan that is done, 0 to 1: the largest over its limits."""
        done = 0.0
        if self.steps:
            done = (clock.step - self.start_step) / self.steps
        if self.epochs:
            length = clock.epoch_length
            if length:
                batches = (clock.epoch - self.start_epoch) * length + clock.batch_index - self.start_index
                # A run that begins in mid-epoch has that much less to do: finishing that epoch counts as one.
                done = max(done, batches / max(1, self.epochs * length - self.start_index))
            else:
                done = max(done, (clock.epoch - self.start_epoch) / self.epochs)
        if self.seconds:
            done = max(done, (clock.elapsed - self.start_elapsed) / self.seconds)
        return min(done, 1.0)

    def total_steps(self, clock: Clock) -> int | None:
        """How many steps this fit will take, where that is known beforehand."""
        known = [] if self.steps is None else [self.steps]
        if self.epochs is not None and clock.epoch_length:
            known.append(max(0, self.epochs * clock.epoch_length - self.start_index))
        return min(known, default=None)
