"""Loader: the batches of a dataset, in an order and with a random state that nothing can disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from axontrain.data.arrays import ArrayDataset
from axontrain.data.order import order
from axontrain.data.protocol import Dataset, checked
from axontrain.errors import reject, whole
from axontrain.randomness import derive, seeded

# Gathering this much at once and cutting it into views is faster than gathering each batch: the call costs more than
# the copy for small batches, and a chunk stays within a core's cache. Larger ones were slower.
CHUNK_BYTES = 512 * 1024


class Loader:
    """Batches of a dataset.

    The order of an epoch is a pure function of (seed, epoch), and the random state (torch, NumPy, Python) in which a
    batch is made is one of (seed, epoch, index): going to batch k reads nothing before it.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``.
        batch_size: samples in a batch, 1 or more; the last batch of an epoch may be smaller.
        shuffle: a new order each epoch; else the dataset's own.
        transform: called on each batch after collation (augmentation of a whole batch).
        collate: makes a batch of a list of samples; torch's ``default_collate`` unless given.
        drop_last: leave out a last batch that is smaller.
        seed: of order and randomness. In a Loop it is the Loop's unless given here; by itself it is 0 unless given.
        strict: whether a batch whose structure or trailing shape differs from the first is an error; None leaves that to
            the Loop.

    Iterated by itself it counts its own passes; ``batches(seed, epoch, start)`` says which pass.

    >>> loader = Loader(list(range(10)), 4, shuffle=True)
    >>> [batch.tolist() for batch in loader.batches(seed=0, epoch=0, start=2)] == [
    ...     batch.tolist() for batch in loader.batches(seed=0, epoch=0)
    ... ][2:]
    True
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        seed: int | None = None,
        strict: bool | None = None,
        **others: Any,
    ) -> None:
        reject(others, Loader.__init__)
        self.dataset = checked(dataset)
        self.batch_size = whole("batch_size", batch_size)
        self.shuffle = shuffle
        self.transform = transform
        self.collate = collate
        self.drop_last = drop_last
        self.seed = seed
        self.strict = strict
        self.passes = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Any]:
        epoch, self.passes = self.passes, self.passes + 1
        return self.batches(0 if self.seed is None else self.seed, epoch)

    @property
    def uniform(self) -> bool:
        """Whether all batches have one structure and trailing shape by construction."""
        return isinstance(self.dataset, ArrayDataset) and self.collate is None and self.transform is None

    def batches(self, seed: int, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of one epoch from index ``start`` on."""
        if self.uniform:
            return self._sliced(seed, epoch, start)
        return self._made(seed, epoch, start)

    def _sliced(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        data: ArrayDataset = self.dataset  # type: ignore[assignment]  # what uniform means
        size, end = self.batch_size, self._end()
        indices = order(seed, epoch, len(data)).to(data.tensors[0].device) if self.shuffle else None
        chunk = size * max(1, CHUNK_BYTES // max(1, size * data.bytes_per_sample()))
        for first in range(start * size, end, chunk):
            last = min(first + chunk, end)
            if indices is None:
                rows = tuple(tensor[first:last].clone() for tensor in data.tensors)
            else:
                rows = data._gathered(indices[first:last])
            parts = zip(*(torch.split(tensor, size) for tensor in rows), strict=True)
            if data.names is not None:
                for part in parts:
                    yield dict(zip(data.names, part, strict=True))
            elif len(rows) == 1:
                for (part,) in parts:
                    yield part
            else:
                yield from parts

    def _made(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        data, size, end = self.dataset, self.batch_size, self._end()
        indices = order(seed, epoch, len(data)) if self.shuffle else None
        for index, first in enumerate(range(start * size, end, size), start):
            last = min(first + size, end)
            rows = torch.arange(first, last) if indices is None else indices[first:last]
            with seeded(derive(seed, "batch", epoch, index)):
                try:
                    batch = self._batch(data, rows)
                except Exception as error:
                    error.add_note(f"in batch {index} of epoch {epoch}, made of the samples {_short(rows.tolist())}")
                    raise
            yield batch

    def _batch(self, data: Any, rows: Tensor) -> Any:
        if self.collate is None and hasattr(data, "gather"):
            batch = data.gather(rows)
        else:
            indices = rows.tolist()
            many = getattr(data, "__getitems__", None)
            samples = _one_by_one(data, indices) if many is None else many(indices)
            batch = (self.collate or default_collate)(samples)
        return batch if self.transform is None else self.transform(batch)

    def _end(self) -> int:
        n = len(self.dataset)
        return n - n % self.batch_size if self.drop_last else n

    def __repr__(self) -> str:
        return f"Loader({len(self)} batches of {self.batch_size}{', shuffled' if self.shuffle else ''})"


def _one_by_one(data: Any, indices: list[int]) -> list[Any]:
    samples: list[Any] = []
    try:
        for index in indices:
            samples.append(data[index])  # noqa: PERF401  # so that it is known which one failed
    except Exception as error:
        error.add_note(f"in the sample at index {indices[len(samples)]}")
        raise
    return samples


def _short(indices: list[int]) -> str:
    return str(indices) if len(indices) <= 8 else f"[{', '.join(map(str, indices[:8]))}, ... {len(indices)} in all]"
