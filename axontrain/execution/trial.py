"""A trial: two ways to do a step, timed in turns, to keep the one that takes less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

BLOCK, ROUNDS = 10, 5  # steps in a turn, and turns of each
LESS = 0.98  # what is no less than that is noise


class Trial:
    """Which of two ways takes less time, from one step's beginning to the next's, all that lies between included.

    Args:
        wait: waits until the device has done what it was given.

    >>> trial = Trial(lambda: None)
    >>> ways = [trial.next() for _ in range(BLOCK * ROUNDS * 2 + 1)]
    >>> ways[: BLOCK + 1] == [0] * BLOCK + [1], trial.over
    (True, True)
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._times: tuple[list[float], list[float]] = ([], [])
        self._way, self._left, self._since = 0, 0, 0.0
        self.over = False

    def next(self) -> int:
        """Which way the coming step is to be done, 0 or 1; asked before each."""
        if not self._left:
            self._wait()
            now = perf_counter()
            if self._since:
                self._times[self._way].append(now - self._since)
                self._way = 1 - self._way
            self.over = len(self._times[1]) == ROUNDS
            self._left, self._since = BLOCK, now
        self._left -= 1
        return self._way

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Leave the block out: a step that can be done in one way only."""
        self._wait()
        began = perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._since += perf_counter() - began if self._since else 0.0

    @property
    def ratio(self) -> float:
        """What a step takes in the second way, as a part of what it takes in the first; of their medians."""
        return median(self._times[1]) / median(self._times[0])
