"""Worth: whether a step is to be recorded: batches like its own come often, and recordings last."""

from __future__ import annotations

from typing import Any

WARM_UP = 3  # steps of a kind of batch before one is recorded: they make what is made once, and let libraries choose kernels
KINDS = 64  # of batches, of which it is counted how often they come
REPLAYS = 50  # that pay for a recording
IN_VAIN = 4  # recordings in a row that did not: something changes all the time


class Worth:
    """Counts kinds of batches, and how long recordings last.

    >>> worth = Worth()
    >>> [worth.often("a kind") for _ in range(5)]
    [False, False, False, True, True]
    >>> for _ in range(IN_VAIN):
    ...     worth.ended()
    >>> worth.in_vain
    True
    """

    def __init__(self) -> None:
        self.kinds: list[tuple[Any, int]] = []
        self.replays = self.vain = 0  # since the last recording ended; and recordings in a row that ended too soon

    def often(self, kind: Any) -> bool:
        """Count a batch of a kind; whether so many have come that a step of them is to be recorded."""
        for index, (other, count) in enumerate(self.kinds):
            if other == kind:
                self.kinds[index] = (kind, count + 1)
                return count >= WARM_UP
        if len(self.kinds) < KINDS:
            self.kinds.append((kind, 1))
        return False

    def forget(self, kind: Any) -> None:
        """Count batches of a kind anew."""
        self.kinds = [(other, 1 if other == kind else count) for other, count in self.kinds]

    def knows(self, kind: Any) -> bool:
        """Whether batches of a kind are counted."""
        return any(other == kind for other, _ in self.kinds)

    @property
    def full(self) -> bool:
        """Whether no other kinds are counted."""
        return len(self.kinds) >= KINDS

    def ended(self) -> None:
        """A recording does not hold any more."""
        self.vain = self.vain + 1 if self.replays < REPLAYS else 0
        self.replays = 0

    @property
    def in_vain(self) -> bool:
        """Whether another recording would not last either."""
        return self.vain >= IN_VAIN

    def begin(self) -> None:
        """Something is recorded otherwise from now on: what has not lasted says nothing of it."""
        self.vain = self.replays = 0
