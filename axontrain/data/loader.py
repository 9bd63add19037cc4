"""Loader: the batches of a dataset, in an order and with a random state that nothing can disturb."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from axontrain.data.arrays import ArrayDataset
from axontrain.data.iterables import Source
from axontrain.data.making import Maker, Task
from axontrain.data.mixture import Mixture, MixtureMaker
from axontrain.data.protocol import Dataset, checked, is_iterable_only
from axontrain.data.rows import Rows
from axontrain.data.samplers import gives_batches
from axontrain.data.splitting import Subset
from axontrain.data.workers import Workers, checked_method
from axontrain.errors import ConfigurationError, DataError, kind_of, reject, whole
from axontrain.randomness import kept

# Gathering this much at once and cutting it into views is faster than gathering each batch: the call costs more than
# the copy for small batches, and a chunk stays within a core's cache. Larger ones were slower.
CHUNK_BYTES = 512 * 1024
# Batches of so much or more are gathered each by itself: cutting would cost more than the calls that it spares.
ALONE_BYTES = 128 * 1024


@dataclass
class _Held:
    """What a Loader has found or made for its passes; a copy of the Loader has its own."""

    size: int | None = None  # of the dataset, at the first pass
    pools: list[Workers] = field(default_factory=list)
    maker: Maker | MixtureMaker | None = None


class Loader:
    """Batches of a dataset.

    The order of an epoch is a pure function of (seed, epoch), and the random state (torch, NumPy, Python) in which a
    batch is made is one of (seed, epoch, index): the batches are the same with any number of workers, and going to batch k
    reads nothing before it.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``; or an iterable of samples (a torch ``IterableDataset``, a
            generator), which is read in its own order, by this process.
        batch_size: samples in a batch, 1 or more; the last batch of an epoch may be smaller. Not needed with a
            ``batch_sampler``.
        shuffle: a new order each epoch; else the dataset's own.
        sampler: another order: :class:`~axontrain.data.WeightedSampler`, :class:`~axontrain.data.BalancedSampler`,
            :class:`~axontrain.data.BucketSampler`, or any iterable of indices, as torch's samplers are.
        batch_sampler: any iterable of lists of indices.
        workers: processes that make batches ahead; 0 makes them here, one at a time. They stay until :meth:`close`, the end
            of the fit, or as long as the Loader.
        transform: called on each batch after collation (augmentation of a whole batch).
        collate: makes a batch of a list of samples; :func:`~axontrain.data.collate` unless given.
        drop_last: leave out a last batch that is smaller.
        seed: of order and randomness. In a Loop it is the Loop's unless given here; by itself it is 0 unless given.
        strict: whether a batch whose structure or trailing shape differs from the first is an error; None leaves that to
            the Loop, except that batches of a BucketSampler may differ.
        prefetch: batches that each worker makes ahead.
        start_method: how workers are started: "fork", "spawn" or "forkserver"; None is the platform's own way.
        timeout: seconds after which a batch that a worker has not made is an error. Starting does not count.
        pin_memory: lay what workers make into pinned memory; in a Loop on a GPU that is done anyway.

    Iterated by itself it counts its own passes; ``batches(seed, epoch, start)`` says which pass.

    >>> loader = Loader(list(range(10)), 4, shuffle=True)
    >>> [batch.tolist() for batch in loader.batches(seed=0, epoch=0, start=2)] == [
    ...     batch.tolist() for batch in loader.batches(seed=0, epoch=0)
    ... ][2:]
    True

    Raises:
        DataError: for what is no dataset, or a sampler that does not fit it.
        ConfigurationError: for arguments that cannot work together.
    """

    def __init__(
        self,
        dataset: Dataset | Any,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        sampler: Any = None,
        batch_sampler: Any = None,
        workers: int = 0,
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        seed: int | None = None,
        strict: bool | None = None,
        prefetch: int = 2,
        start_method: str | None = None,
        timeout: float = 8.0,
        pin_memory: bool = False,
        **others: Any,
    ) -> None:
        reject(others, Loader.__init__)
        if isinstance(sampler, torch.utils.data.BatchSampler) and batch_sampler is None:
            sampler, batch_sampler = None, sampler
        self.iterable = is_iterable_only(dataset)
        if self.iterable:
            self._check_iterable(dataset, shuffle, sampler, batch_sampler, workers)
        self.dataset: Any = dataset if self.iterable else checked(dataset)
        without = batch_size is None and batch_sampler is not None
        self.batch_size = None if without else whole("batch_size", batch_size)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.sampler, self.batch_sampler = sampler, batch_sampler
        self._rows().check()
        self.workers = whole("workers", workers, 0)
        self.transform, self.collate = transform, collate
        self.seed, self.strict = seed, strict
        if strict is None and gives_batches(sampler):
            self.strict = False
        self.prefetch = whole("prefetch", prefetch)
        self.start_method = checked_method(start_method)
        if not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ConfigurationError(f"timeout={timeout!r}: seconds, above 0")
        self.timeout, self.pin_memory = timeout, pin_memory
        self.passes = 0
        self._held = _Held()

    def __len__(self) -> int:
        return len(self._rows())

    def __iter__(self) -> Iterator[Any]:
        epoch, self.passes = self.passes, self.passes + 1
        return self.batches(0 if self.seed is None else self.seed, epoch)

    @property
    def uniform(self) -> bool:
        """Whether all batches have one structure and trailing shape by construction."""
        return self._uniform(as_arrays(self.dataset))

    def _uniform(self, data: Any) -> bool:
        return isinstance(data, ArrayDataset) and self.collate is None and self.transform is None

    def batches(
        self,
        seed: int,
        epoch: int,
        start: int = 0,
        stop: int | None = None,
        *,
        share: tuple[int, int] = (0, 1),
        step: int | None = None,
        pin_memory: bool | None = None,
        source: Source | None = None,
    ) -> Iterator[Any]:
        """The batches of one epoch from index ``start`` on, to before ``stop``.

        Args:
            seed: of order and randomness.
            epoch: the pass, from 0.
            start: the first batch that is wanted; nothing before it is read.
            stop: the first that is not.
            share: (rank, ranks): of each batch the part that this rank trains on. The parts differ in size by one at most,
                and put together they are the batch; one may be empty.
            step: the run's step at the epoch's beginning, for a :class:`~axontrain.data.Mixture` that chooses by it; unless
                given, ``epoch`` times the length of a pass.
            pin_memory: in place of the Loader's own.
            source: who reads an iterable, and knows how far; unless given, it is read from its beginning.
        """
        if self.iterable:
            read = Source(self.dataset, "the dataset") if source is None else source
            return itertools.islice(self._streamed(read, seed, epoch, start, share), _count(start, stop))
        self._check_size()
        quick, rows = as_arrays(self.dataset), self._rows()
        if self.workers == 0 and self._uniform(quick) and quick.on_one_device and share == (0, 1) and rows.sliced:
            return self._sliced(quick, rows.order(seed, epoch), rows.end(stop), start)
        return self._made(_tasks(rows, seed, epoch, start, stop, share, step), pin_memory)

    def close(self) -> None:
        """End the workers of passes that are over; another pass starts new ones."""
        for pool in [pool for pool in self._held.pools if not pool.busy]:
            self._held.pools.remove(pool)
            pool.close()

    def same_batches(self, other: Loader) -> bool:
        """Whether another Loader cuts data of this length into batches in the same way."""
        ours, theirs = (
            (
                id(one.dataset) if one.iterable else type(one.dataset),
                None if one.iterable else len(one.dataset),
                one.batch_size, one.shuffle, one.drop_last, id(one.sampler), id(one.batch_sampler), one.seed,
            )
            for one in (self, other)
        )  # fmt: skip
        return ours == theirs

    def _rows(self) -> Rows:
        return Rows(self.dataset, self.batch_size, self.shuffle, self.drop_last, self.sampler, self.batch_sampler)

    def _sliced(self, data: ArrayDataset, indices: Any, end: int, start: int) -> Iterator[Any]:
        size, device = self._batch_size(), data.tensors[0].device
        in_bytes = size * data.bytes_per_sample()
        chunk = size * (1 if in_bytes >= ALONE_BYTES else max(1, CHUNK_BYTES // max(1, in_bytes)))
        tensors, bare, flat, alone = data.tensors, data.bare, data.flat, chunk == size
        for place in _chunks(indices, start * size, end, chunk, device):
            if isinstance(place, slice):
                rows = tuple([tensor[place].clone() for tensor in tensors])
            else:
                try:
                    rows = tuple([tensor.index_select(0, place) for tensor in tensors])
                except (IndexError, RuntimeError):
                    data.gather(place)  # says which index it was
                    raise
            if alone:
                yield rows[0] if bare else rows if flat else data.assemble(rows)
            elif bare:
                yield from torch.split(rows[0], size)
            else:
                parts = zip(*[torch.split(tensor, size) for tensor in rows], strict=True)
                yield from parts if flat else map(data.assemble, parts)

    def _made(self, tasks: Iterator[Task], pin_memory: bool | None) -> Iterator[Any]:
        if self.workers:
            yield from self._pool(self.pin_memory if pin_memory is None else pin_memory).run(tasks)
            return
        maker = self._made_by()
        between = contextlib.nullcontext if maker.pure else kept
        for task in tasks:
            with between():
                batch = maker(task)
            yield batch

    def _streamed(self, source: Source, seed: int, epoch: int, start: int, share: tuple[int, int]) -> Iterator[Any]:
        maker, size = Maker(None, self.collate, self.transform), self._batch_size()
        for index, samples in enumerate(source.read(seed, epoch, start, size), start):
            if len(samples) < size and self.drop_last:
                return
            task = Task(seed, epoch, index, list(range(len(samples))), *_part(len(samples), share))
            with kept():
                batch = maker.of_samples(samples, task)
            yield batch

    def _batch_size(self) -> int:
        assert self.batch_size is not None  # without it there is a batch_sampler
        return self.batch_size

    def _made_by(self) -> Maker | MixtureMaker:
        if self._held.maker is None:
            if isinstance(self.dataset, Mixture):
                self._held.maker = self.dataset.maker(self.collate, self.transform)
            else:
                self._held.maker = Maker(as_arrays(self.dataset), self.collate, self.transform)
        return self._held.maker

    def _pool(self, pin_memory: bool) -> Workers:
        for pool in self._held.pools:
            if not pool.busy and pool.pin == pin_memory:
                return pool
        pool = Workers(
            self._made_by(),
            self.workers,
            prefetch=self.prefetch,
            start_method=self.start_method,
            timeout=self.timeout,
            pin=pin_memory,
        )
        self._held.pools.append(pool)
        return pool

    def _check_size(self) -> None:
        size = len(self.dataset)
        if self._held.size is None:
            self._held.size = size
        elif self._held.size != size:
            raise DataError(
                f"the dataset ({kind_of(self.dataset)}) had {self._held.size} samples and now has {size}: the order of a "
                f"pass is one of all its samples, so make a new Loader of it, and call fit again"
            )

    @staticmethod
    def _check_iterable(dataset: Any, shuffle: bool, sampler: Any, batch_sampler: Any, workers: int) -> None:
        named = {"shuffle": shuffle, "sampler": sampler, "batch_sampler": batch_sampler, "workers": workers}
        for name, value in named.items():
            if value:
                raise ConfigurationError(
                    f"{name}={value!r} with {kind_of(dataset)}, which can only be iterated: it has one order, and one process "
                    f"reads it. Shuffle it by its own means, or pass what has __len__ and __getitem__"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": _Held()}

    def __repr__(self) -> str:
        try:
            told = f"{len(self)} batches of "
        except TypeError:
            told = "batches of "
        how = f"{', shuffled' if self.shuffle else ''}{f', {self.workers} workers' if self.workers else ''}"
        return f"Loader({told}{self.batch_size or 'its batch_sampler'}{how})"


def _tasks(
    rows: Rows, seed: int, epoch: int, start: int, stop: int | None, share: tuple[int, int], step: int | None
) -> Iterator[Task]:
    for number, of_batch in enumerate(rows.batches(seed, epoch, start, stop, step), start):
        yield Task(seed, epoch, number, of_batch.tolist(), *_part(len(of_batch), share))


def _chunks(indices: Any, first: int, end: int, size: int, device: torch.device) -> Iterator[Tensor | slice]:
    """The places from ``first`` to before ``end``, so many at once: slices where the order is the dataset's own."""
    if isinstance(indices, Tensor):
        yield from torch.split(indices[first:end].to(device), size) if first < end else ()
        return
    for one in range(first, end, size):
        place = slice(one, min(one + size, end))
        yield place if indices is None else indices[place].to(device)


def as_arrays(dataset: Any) -> Any:
    """A dataset of torch's own that holds tensors, as what gathers them a batch at a time; any other as it is."""
    if type(dataset) is TensorDataset and not any(tensor.requires_grad for tensor in dataset.tensors):
        with contextlib.suppress(DataError):  # of a type that torch gathers no rows of
            return ArrayDataset(tuple(dataset.tensors))
    if type(dataset) is torch.utils.data.Subset:
        whole = as_arrays(dataset.dataset)
        return dataset if whole is dataset.dataset else Subset(whole, dataset.indices)
    return dataset


def _part(size: int, share: tuple[int, int]) -> tuple[int, int]:
    """The part of a batch that is one rank's: the first ranks have one more where it does not come out even.

    >>> [_part(10, (rank, 4)) for rank in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    rank, ranks = share
    least, more = divmod(size, ranks)
    first = rank * least + min(rank, more)
    return first, first + least + (rank < more)


def _count(start: int, stop: int | None) -> int | None:
    return None if stop is None else max(0, stop - start)
