"""Stopwatch: how long spans of a run take, without waiting for the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from axontrain.readings import Reading, at_once


class Stopwatch:
    """Adds up spans between marks, by name.

    On the CPU a mark is the time. Elsewhere the host is ahead of the device, and its time says nothing of what the device does:
    there a mark is an event in the device's stream, so that a span is what the device takes from one to the other, idle or not.

    Args:
        device: where the run computes.

    >>> watch = Stopwatch(torch.device("cpu"))
    >>> watch.add("nothing", watch.mark(), watch.mark())
    >>> list(watch.read()), watch.read()
    (['nothing'], {})
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, float] = {}
        self._waiting: deque[tuple[str, Any, Any]] = deque()  # spans whose ends the device had not come to

    def mark(self) -> Any:
        """Now, as the device sees it."""
        if self.device.type == "cpu":
            return perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def add(self, name: str, start: Any, end: Any) -> None:
        """Take in a span from one mark to another; those of earlier spans that the device has passed are let go."""
        if self.device.type == "cpu":
            self._sums[name] = self._sums.get(name, 0.0) + end - start
            return
        self._waiting.append((name, start, end))
        while self._waiting and self._waiting[0][2].query():
            _fold(self._waiting, self._sums)

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading; waits until the device has come to the last mark."""
        return at_once(self.reading())

    def reading(self) -> Reading[dict[str, float]]:
        """The same as a reading, of the spans that were added until it is begun: those after it are of the next."""
        sums, waiting = self._sums, self._waiting
        self._sums, self._waiting = {}, deque()
        if waiting:
            last = waiting[-1][2]
            yield [_Passed(last)]
            if not last.query():
                last.synchronize()
        while waiting:
            _fold(waiting, sums)
        return sums


@dataclass(frozen=True, slots=True)
class _Passed:
    """That a device has come to a mark."""

    mark: Any

    def arrived(self) -> bool:
        return bool(self.mark.query())


def _fold(waiting: deque[tuple[str, Any, Any]], sums: dict[str, float]) -> None:
    name, start, end = waiting.popleft()
    sums[name] = sums.get(name, 0.0) + start.elapsed_time(end) / 1e3  # it is in milliseconds
