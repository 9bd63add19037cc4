"""Making a batch of indices, here or in a worker, in random states that (seed, epoch, index) alone decide.

What is made a batch at a time (``gather``, ``__getitems__``, collation, the transform) draws in the state of the batch; each
sample that is made by itself draws in a state of its own. So a rank can make its share of a batch without the rest, and the
shares put together are the batch; only what may look at a whole batch, or draws for it, is done whole on each rank and cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from axontrain.data.collate import collate as default
from axontrain.data.structure import cut
from axontrain.errors import DataError, kind_of
from axontrain.randomness import GENERATORS, derive, drawn_since, seed_all, seed_some, seeder


class Task(NamedTuple):
    """One batch to be made: ``rows`` are the indices of the whole batch, of which ``first`` to before ``last`` are wanted."""

    seed: int
    epoch: int
    number: int
    rows: list[int]
    first: int
    last: int

    @property
    def state(self) -> int:
        """The seed of what the batch draws."""
        return derive(self.seed, "batch", self.epoch, self.number)

    def __str__(self) -> str:
        rows = self.rows[self.first : self.last]
        shown = str(rows) if len(rows) <= 8 else f"[{', '.join(map(str, rows[:8]))}, ... {len(rows)} in all]"
        return f"batch {self.number} of epoch {self.epoch}, made of the samples {shown}"


class Maker:
    """Makes batches of a dataset; it leaves the global generators anywhere.

    Args:
        data: what has ``gather``, ``__getitems__`` or ``__getitem__``, asked for in this order.
        collate: makes a batch of a list of samples; None for torch's way, or for ``gather``.
        transform: called on each batch.
    """

    def __init__(
        self,
        data: Any,
        collate: Callable[[list[Any]], Any] | None,
        transform: Callable[[Any], Any] | None,
    ) -> None:
        self.data, self.collate, self.transform = data, collate, transform
        gather = getattr(data, "gather", None) if collate is None else None
        self.gather = callable(gather)
        self.many = callable(getattr(data, "__getitems__", None))
        self.drawers: set[str] | None = None  # the generators that samples draw from; not known before the first batch
        # What may look at the whole batch gets it, and so does what was seen to draw for a batch.
        self.whole_only = not all(one is None or getattr(one, "by_sample", False) for one in (collate, transform))

    @property
    def pure(self) -> bool:
        """Whether no code of a user's runs, so that nothing can be drawn."""
        return self.gather and self.transform is None and bool(getattr(self.data, "pure", False))

    def __call__(self, task: Task) -> Any:
        """Make the batch."""
        return self._noted(task, lambda: self._made(task))

    def of_samples(self, samples: list[Any], task: Task) -> Any:
        """Make the batch of samples that are there already; of it, the part that the task wants."""
        return self._noted(task, lambda: self._of(samples, task))

    @staticmethod
    def _noted(task: Task, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except StopIteration as error:  # which would pass for the end of the data
            noted = DataError("StopIteration: a next() without a default found nothing where a sample or a batch is made")
            for note in (*getattr(error, "__notes__", ()), f"in {task}"):
                noted.add_note(note)
            raise noted from error
        except Exception as error:
            error.add_note(f"in {task}")
            raise

    def _of(self, samples: list[Any], task: Task) -> Any:
        batch = self._finished(self.collate or default, samples, derive(task.state, "batch"))
        whole = (task.first, task.last) == (0, len(samples))
        return batch if whole else cut(batch, task.first, task.last, len(samples))

    def _made(self, task: Task) -> Any:
        size = len(task.rows)
        whole = task._replace(first=0, last=size)
        if task == whole:
            return self._batch(whole, None)
        if task.first == task.last:  # fewer samples than ranks: nothing, in the structure that something would have
            return cut(self._batch(task._replace(first=0, last=1), None), 0, 0, 1)
        if not self.whole_only:
            drawn: set[str] = set()
            batch = self._batch(task, drawn)
            if not drawn:
                return batch
            self.whole_only = True
        return cut(self._batch(whole, None), task.first, task.last, size)

    def _batch(self, task: Task, drawn: set[str] | None) -> Any:
        """Make a batch; into ``drawn``, if it is wanted, goes what was drawn from for the batch as a whole."""
        rows = task.rows[task.first : task.last]
        if self.pure:
            return self.data.gather(torch.tensor(rows, dtype=torch.int64))
        state = task.state
        if self.gather or self.many:
            seed_all(state)
            made = self.data.gather(torch.tensor(rows, dtype=torch.int64)) if self.gather else self._many(rows)
            if drawn is not None:
                drawn |= drawn_since(state, GENERATORS)
            if self.gather and self.transform is None:
                return made
        else:
            made = self._samples(rows, state, task.first)
        state = derive(state, "batch")
        made = self._finished(None if self.gather else self.collate or default, made, state)
        if drawn is not None:
            drawn |= drawn_since(state, GENERATORS)
        return made

    def _finished(self, collate: Callable[[Any], Any] | None, made: Any, state: int) -> Any:
        """What is done to a batch as a whole, in its own state."""
        seed_all(state)
        batch = made if collate is None else collate(made)
        return batch if self.transform is None else self.transform(batch)

    def _many(self, rows: list[int]) -> list[Any]:
        samples: list[Any] = self.data.__getitems__(rows)
        if len(samples) != len(rows):
            raise DataError(f"__getitems__ of {kind_of(self.data)} gave {len(samples)} samples for {len(rows)} indices")
        return samples

    def _samples(self, rows: list[int], state: int, first: int) -> list[Any]:
        """Make samples one by one, each in a state of its own.

        That costs microseconds a sample, so only torch's generator, whose seed samples may read, and those that samples were
        seen to draw from are seeded for each; the others are for the batch, and are looked at after it.
        """
        if self.drawers is None:
            self.drawers, samples = self._first(rows, state, first)
            return samples
        others = [name for name in GENERATORS if name not in self.drawers]
        while True:
            seed_some(others, state)
            samples = self._each(rows, state, first, seeder(self.drawers))
            drawn = drawn_since(state, others)
            if not drawn:
                return samples
            # After all: once more, in the states that these samples should have had.
            self.drawers |= drawn
            others = [name for name in others if name not in drawn]

    def _first(self, rows: list[int], state: int, first: int) -> tuple[set[str], list[Any]]:
        """Make the first samples, and see which generators they draw from."""
        drawn = {"torch"}
        before: list[int] = []

        def look(seed: int) -> None:
            if before:
                drawn.update(drawn_since(before.pop(), GENERATORS))
            before.append(seed)
            seed_all(seed)

        samples = self._each(rows, state, first, look)
        return drawn | drawn_since(before.pop(), GENERATORS), samples

    def _each(self, rows: list[int], state: int, first: int, seed: Callable[[int], Any]) -> list[Any]:
        data = self.data
        samples: list[Any] = []
        try:
            for place, row in enumerate(rows, first):
                # Seeds of one batch need only differ: its own is a hash. The factor is 2^64 over the golden ratio.
                seed((state + place * 0x9E3779B97F4A7C15) % 2**63)
                samples.append(data[row])
        except Exception as error:
            error.add_note(f"in the sample at index {rows[len(samples)]}")
            raise
        return samples
