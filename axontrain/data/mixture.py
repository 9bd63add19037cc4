"""Mixture: several datasets, one for each step."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.data.arrays import ArrayDataset
from axontrain.data.making import Maker, Task
from axontrain.data.order import order
from axontrain.data.protocol import Dataset, checked
from axontrain.errors import ConfigurationError, DataError, OutOfRangeError, kind_of, unknown
from axontrain.objective import TaskBatch
from axontrain.randomness import derive

CHUNK = 16384


class Mixture:
    """Several datasets as one, whose batches are each of one task.

    In training (``shuffle=True``, as a bare dataset is) the task of a step is

    - drawn in proportion to the ``weights``: each task goes through its own data in passes of its own;
    - or what ``which(step)`` says, a function of the run's step (as trax's ``which_task``), in the same way;
    - or, without either, each task's batches come once in an epoch, in a random order.

    In evaluation each task's data is gone through once, one after the other. An epoch has as many batches as the datasets
    have together.

    A batch is a :class:`~axontrain.TaskBatch`, with the name of its ``task``. The methods of an Objective take it for the
    batch within, unless they are overridden: ``if batch.task == "a": ...``. Metrics are kept for each task: ``train/a/loss``,
    ``val/b/accuracy``; ``loss`` is that of all. A metric that is of one task alone has its name before its own:
    ``metrics={"a/accuracy": "accuracy", "b/mae": "mae"}``.

    Args:
        datasets: by name of the task.
        weights: how often each task is drawn: as many numbers above 0, in the order of the datasets or by name.
        which: a function of the step (0 for the first) that returns the name of a task.

    >>> mixture = Mixture({"a": list(range(6)), "b": list(range(100, 102))}, weights={"a": 1, "b": 1})
    >>> len(mixture), mixture[6]
    (8, 100)

    Raises:
        DataError: if there is no dataset, or one is none.
        ConfigurationError: if the weights do not fit, or both ``weights`` and ``which`` are given.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        weights: Any = None,
        *,
        which: Callable[[int], str] | None = None,
    ) -> None:
        if not isinstance(datasets, Mapping) or not datasets:
            raise DataError(f"Mixture({kind_of(datasets)}): it takes a mapping of datasets by name of their task")
        self.datasets = {str(name): checked(data, f"the dataset {name!r}") for name, data in datasets.items()}
        if weights is not None and which is not None:
            raise ConfigurationError("Mixture(weights=..., which=...): only one of them chooses the task of a step")
        if which is not None and not callable(which):
            raise ConfigurationError(f"Mixture(which={kind_of(which)}): it is a function of the step")
        self.weights = None if weights is None else self._checked(weights)
        self.which = which
        self.names = list(self.datasets)
        self._chosen: dict[int, list[int]] = {}  # by the seed where weights choose

    def __len__(self) -> int:
        return sum(map(len, self.datasets.values()))

    def __getitem__(self, index: int) -> Any:
        """The sample at ``index`` of all datasets, one after the other."""
        name, row = self._place(index)
        return self.datasets[name][row]

    @property
    def chooses(self) -> bool:
        """Whether weights or a function choose the task of a step."""
        return self.weights is not None or self.which is not None

    def described(self) -> dict[str, Any]:
        """What decides the batches, in plain values: the weights, and of each task its size and, of arrays, a digest."""
        which = None if self.which is None else getattr(self.which, "__qualname__", type(self.which).__name__)
        tasks = {
            name: [len(data), data.digest() if isinstance(data, ArrayDataset) else type(data).__name__]
            for name, data in self.datasets.items()
        }
        return {"weights": None if self.weights is None else self.weights.tolist(), "which": which, "tasks": tasks}

    def count(self, batch_size: int, drop_last: bool) -> int:
        """Batches in an epoch."""
        return sum(self._counts(batch_size, drop_last))

    def rows(
        self, seed: int, epoch: int, batch_size: int, *, shuffle: bool, drop_last: bool, step: int
    ) -> Callable[[int], Iterator[Tensor]]:
        """The indices of each batch of an epoch that begins at ``step``, as a function of the first that is wanted."""
        counts = self._counts(batch_size, drop_last)
        orders: dict[int, tuple[int, Any]] = {}
        if not shuffle:
            places = [(task, 0, index) for task, count in enumerate(counts) for index in range(count)]
        else:
            places = self._places(seed, epoch, counts, step)

        def from_batch(start: int) -> Iterator[Tensor]:
            for task, passes, index in places[start:]:
                size = len(self.datasets[self.names[task]])
                first, last = index * batch_size, min((index + 1) * batch_size, size)
                if shuffle:
                    if task not in orders or orders[task][0] != passes:
                        orders[task] = passes, order(derive(seed, "task", self.names[task]), passes, size)
                    rows = orders[task][1][first:last]
                else:
                    rows = torch.arange(first, last)
                yield rows + self._offsets()[task]

        return from_batch

    def maker(self, collate: Any, transform: Any) -> MixtureMaker:
        """What makes its batches."""
        makers = {name: Maker(data, collate, transform) for name, data in self.datasets.items()}
        return MixtureMaker(makers, self._offsets())

    def __repr__(self) -> str:
        of = ", ".join(f"{name}: {len(data)}" for name, data in self.datasets.items())
        return f"Mixture({of})"

    def _places(self, seed: int, epoch: int, counts: list[int], step: int) -> list[tuple[int, int, int]]:
        """For each batch of the epoch its task, the task's own pass, and the batch within that."""
        total = sum(counts)
        if self.which is None and self.weights is None:
            tasks = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            generator = torch.Generator().manual_seed(derive(seed, "mixture", epoch))
            shuffled = tasks[torch.randperm(total, generator=generator)].tolist()
            done = [0] * len(counts)
            passes = [epoch] * len(counts)
        else:
            chosen = self._choices(seed, step + total)
            shuffled = chosen[step : step + total]
            before = torch.bincount(torch.tensor(chosen[:step], dtype=torch.int64), minlength=len(counts)).tolist()
            done = [number % max(1, count) for number, count in zip(before, counts, strict=True)]
            passes = [number // max(1, count) for number, count in zip(before, counts, strict=True)]
        places = []
        for task in shuffled:
            if done[task] == counts[task]:
                passes[task], done[task] = passes[task] + 1, 0
            places.append((task, passes[task], done[task]))
            done[task] += 1
        return places

    def _choices(self, seed: int, stop: int) -> list[int]:
        """The task of each step from the run's first to before ``stop``: what each has had before follows from it."""
        chosen = self._chosen.setdefault(seed if self.which is None else 0, [])
        numbers = {name: number for number, name in enumerate(self.names)}
        while len(chosen) < stop:
            if self.which is not None:
                name = self.which(len(chosen))
                if name not in numbers:
                    raise unknown(f"task that which({len(chosen)}) of the Mixture returned:", name, self.names)
                chosen.append(numbers[name])
            else:
                assert self.weights is not None
                generator = torch.Generator().manual_seed(derive(seed, "mixture", len(chosen) // CHUNK))
                chosen += torch.multinomial(self.weights, CHUNK, replacement=True, generator=generator).tolist()
        return chosen

    def _counts(self, batch_size: int, drop_last: bool) -> list[int]:
        counts = [len(data) // batch_size if drop_last else -(-len(data) // batch_size) for data in self.datasets.values()]
        for name, count in zip(self.datasets, counts, strict=True):
            if not count:
                raise DataError(
                    f"the dataset {name!r} of the Mixture gives no batch: {len(self.datasets[name])} samples, "
                    f"batch_size={batch_size}, drop_last={drop_last}"
                )
        return counts

    def _offsets(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.datasets.values()), initial=0))[:-1]

    def _place(self, index: int) -> tuple[str, int]:
        row = index + len(self) if index < 0 else index
        for name, offset in zip(reversed(self.names), reversed(self._offsets()), strict=True):
            if offset <= row < offset + len(self.datasets[name]):
                return name, row - offset
        raise OutOfRangeError(f"index {index} of a Mixture of {len(self)} samples")

    def _checked(self, weights: Any) -> Tensor:
        if isinstance(weights, Mapping):
            if set(weights) != set(self.datasets):
                raise ConfigurationError(f"Mixture: weights of {sorted(weights)} for datasets {sorted(self.datasets)}")
            weights = [weights[name] for name in self.datasets]
        found = torch.as_tensor(weights, dtype=torch.float64)
        if found.shape != (len(self.datasets),) or not bool((torch.isfinite(found) & (found > 0)).all()):
            raise ConfigurationError(f"Mixture: weights={weights!r}: a number above 0 for each of {list(self.datasets)}")
        return found


class MixtureMaker:
    """Makes the batches of a Mixture: each by the maker of its own dataset."""

    def __init__(self, makers: dict[str, Maker], offsets: list[int]) -> None:
        self.makers, self.offsets = makers, offsets
        self.pure = all(maker.pure for maker in makers.values())

    def __call__(self, task: Task) -> TaskBatch:
        """Make the batch."""
        place = bisect.bisect_right(self.offsets, task.rows[0]) - 1
        name, offset = list(self.makers)[place], self.offsets[place]
        return TaskBatch(name, self.makers[name](task._replace(rows=[row - offset for row in task.rows])))
