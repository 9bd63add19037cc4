"""Readings: what is read from the device a piece at a time, now or later.

A reading is a generator, so that one text serves both: it yields what it needs to go on, and returns what was read. What it
changes it changes at its end, so that one that is dropped has changed nothing.

On a GPU a fit waits all the same: at an epoch's end, before a validation and after it, for a save, and where it ends; within an
epoch where a metric sorts all that it was given (``auroc``, ``average_precision``), or is somebody's that looks at numbers by
itself; and where far more updates, or predictions, have come than should be kept until their flags are known.

>>> import torch
>>> def mean(values):
...     sums = Fetch([values.sum(), len(values)])
...     yield [sums]
...     total, count = sums.values()
...     return total / count
>>> at_once(mean(torch.tensor([1.0, 2.0])))
1.5
>>> later = Later(mean(torch.tensor([1.0, 2.0])))
>>> later.arrived(), later.result()  # on the CPU at once
(True, 1.5)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from axontrain.host import Fetch, single

T = TypeVar("T")


class Need(Protocol):
    """What a reading waits for, as a :class:`~axontrain.host.Fetch`."""

    def arrived(self) -> bool:
        """Whether it is there; does not wait."""


Reading: TypeAlias = Generator[Sequence[Need], None, T]


def at_once(reading: Reading[T]) -> T:
    """What a reading gives; waits for all that it needs."""
    while True:
        try:
            next(reading)  # it waits by itself, for what it looks at
        except StopIteration as end:
            found: T = end.value
            return found


class Later(Generic[T]):
    """A reading under way: begun now, and ended by whoever looks at it when all it needs has arrived."""

    _found: T

    def __init__(self, reading: Reading[T]) -> None:
        self._reading, self._over = reading, False
        self._needs: Sequence[Need] = ()
        self._go_on()

    def arrived(self) -> bool:
        """Go on as far as that can be done without waiting; whether it is through. It raises what the reading raises."""
        while not self._over and all(need.arrived() for need in self._needs):
            self._go_on()
        return self._over

    def result(self) -> T:
        """What it gave; waits where it has not arrived, and for nothing that the device was asked for after it was begun."""
        while not self.arrived():
            self._go_on()  # what it needs it waits for by itself
        return self._found

    def _go_on(self) -> None:
        try:
            self._needs = next(self._reading)
        except StopIteration as end:
            self._found, self._over, self._needs = end.value, True, ()


def together(readings: Sequence[Reading[Any]]) -> Reading[list[Any]]:
    """Several readings begun at the same moment, each of which goes on in its turn; what they gave."""
    found: list[Any] = [None] * len(readings)
    needs: dict[int, Sequence[Need]] = dict.fromkeys(range(len(readings)), ())
    while needs:
        for number in tuple(needs):
            try:
                needs[number] = next(readings[number])
            except StopIteration as end:
                found[number] = end.value
                del needs[number]
        if needs:
            yield [need for of_one in needs.values() for need in of_one]
    return found


def numbers(values: Mapping[str, Any]) -> Reading[dict[str, float]]:
    """Read scalars by name."""
    fetch = Fetch(values.values())
    yield [fetch]
    return {name: float(value) for name, value in zip(values, map(single, fetch.values()), strict=True)}
