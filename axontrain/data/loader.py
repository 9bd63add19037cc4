"""Loader: the batches of a dataset, in an order and with a random state that nothing can disturb."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from axontrain.data.arrays import ArrayDataset
from axontrain.data.augmented import Augment, Numbered
from axontrain.data.collate import Pad
from axontrain.data.iterables import Source
from axontrain.data.making import Maker, Task
from axontrain.data.mixture import Mixture, MixtureMaker
from axontrain.data.protocol import Dataset, checked, is_array, is_iterable_only
from axontrain.data.rows import Rows
from axontrain.data.samplers import gives_batches
from axontrain.data.splitting import Subset
from axontrain.data.structure import share_of
from axontrain.data.workers import Workers, checked_method
from axontrain.errors import ConfigurationError, DataError, kind_of, reject, whole
from axontrain.host import placed
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
            of the fit, or as long as the Loader, with the dataset as it was when they started.
        transform: called on each batch after collation (augmentation of a whole batch).
        collate: makes a batch of a list of samples; :func:`~axontrain.data.collate` unless given. On ranks, transform and
            collate get the whole batch, of which the rank's share is cut: what they do may depend on all of it. Those with
            an attribute ``by_sample`` that is true get the share alone.
        augment: what is done to the images of a batch, on the device where it is used (in a Loop on a GPU there, wherever the
            data come from): ``augment=[Crop(4), Flip(), Cutout(8)]`` of :mod:`axontrain.data.augment`, or any functions
            ``(images, draw) -> images`` that take what is random from the :class:`~axontrain.data.augment.Draw`. What becomes
            of a sample is then a function of (seed, epoch, index): a sample that an epoch has twice is augmented alike. An
            iterable's samples have no index but their place in the pass. It is done to a batch that is a tensor, or to the
            first part of one that is a tuple; a mapping names other parts by key or place, and parts that are given the same
            draw the same: ``augment={"image": [Crop(4), Flip(), Cutout(8)], "mask": [Crop(4), Flip()]}``.
        drop_last: leave out a last batch that is smaller.
        seed: of order and randomness. In a Loop it is the Loop's unless given here; by itself it is 0 unless given.
        strict: whether a batch whose structure or trailing shape differs from the first is an error; None leaves that to
            the Loop, except that batches of a BucketSampler or a :class:`~axontrain.data.Pad` may differ.
        prefetch: batches that each worker makes ahead.
        start_method: how workers are started: "fork", "spawn" or "forkserver"; None is the platform's own way.
        timeout: seconds after which a batch that a worker has not made is an error; None waits for ever. Starting, and what is
            made while the loop is busy, do not count.
        pin_memory: lay what workers make into pinned memory; in a Loop on a GPU that is done anyway.

    Random states are those of the global generators: a dataset that keeps a generator of its own answers for it. Threads of
    one process share them; runs that are to be reproducible go into processes of their own.

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
        augment: Any = None,
        drop_last: bool = False,
        seed: int | None = None,
        strict: bool | None = None,
        prefetch: int = 2,
        start_method: str | None = None,
        timeout: float | None = 8.0,
        pin_memory: bool = False,
        **others: Any,
    ) -> None:
        reject(others, Loader.__init__)
        if isinstance(sampler, torch.utils.data.BatchSampler) and batch_sampler is None:
            sampler, batch_sampler = None, sampler
        _reject_batches(dataset)
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
        self.augment = None if augment is None else Augment(augment)
        self.seed, self.strict = seed, strict
        if strict is None and (gives_batches(sampler) or isinstance(collate, Pad)):
            self.strict = False
        self.prefetch = whole("prefetch", prefetch)
        self.start_method = checked_method(start_method)
        if timeout is not None and (not isinstance(timeout, (int, float)) or not timeout > 0):
            raise ConfigurationError(f"timeout={timeout!r}: seconds, above 0; None waits for ever")
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
        return self.augment is None and self._uniform(as_arrays(self.dataset))

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
        if self.augment is not None:
            numbered = self.numbered(seed, epoch, start, stop, share=share, step=step, pin_memory=pin_memory, source=source)
            return self.augment.applied(numbered, seed, epoch, start)
        self._check(epoch, start, share)
        if self.iterable:
            return map(operator.itemgetter(1), self._streamed(seed, epoch, start, stop, share, source))
        quick, rows = as_arrays(self.dataset), self._rows()
        if self._gathers(quick, rows, share):
            return self._sliced(quick, rows.order(seed, epoch), rows.end(stop), start)
        return self._made(_tasks(rows, seed, epoch, start, stop, share, step), pin_memory)

    def numbered(
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
    ) -> Iterator[Numbered]:
        """The batches as :meth:`batches` gives them, not augmented yet, each with the indices of its samples."""
        self._check(epoch, start, share)
        if self.iterable:
            return itertools.starmap(_numbered, self._streamed(seed, epoch, start, stop, share, source))
        quick, rows = as_arrays(self.dataset), self._rows()
        if self._gathers(quick, rows, share):
            size, device = self._batch_size(), quick.tensors[0].device
            places = _chunks(rows.order(seed, epoch), start * size, rows.end(stop), size, device)
            return (Numbered(place, quick.gather(place)) for place in map(functools.partial(_each, device=device), places))
        asked: deque[Task] = deque()  # of which the batches are not there yet
        tasks = _remembered(_tasks(rows, seed, epoch, start, stop, share, step), asked)
        return (_numbered(asked.popleft(), batch) for batch in self._made(tasks, pin_memory))

    def order(self, seed: int = 0, epoch: int = 0) -> Tensor:
        """Which samples the batches of an epoch are made of, one after the other: int64, on the CPU.

        Predictions come in this order; ``predictions[loader.order(loop.state.seed).argsort()]`` has that of the dataset.
        """
        return torch.cat(list(self._rows().batches(seed if self.seed is None else self.seed, epoch, 0, None)))

    def samples(self, seed: int, epoch: int, start: int, stop: int | None = None) -> list[int]:
        """Which samples the batches of an epoch from ``start`` to before ``stop`` are made of, as :meth:`batches` gives them.

        >>> Loader(range(10), 4).samples(seed=0, epoch=0, start=2)
        [8, 9]
        """
        return [row for rows in self._rows().batches(seed, epoch, start, stop) for row in rows.tolist()]

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

    def _check(self, epoch: int, start: int, share: tuple[int, int]) -> None:
        whole("epoch", epoch, 0)
        whole("start", start, 0)
        _check_share(share)
        if not self.iterable:
            self._check_size()

    def _gathers(self, data: Any, rows: Rows, share: tuple[int, int]) -> bool:
        """Whether batches are slices of arrays, put in order, and nothing else."""
        return self.workers == 0 and self._uniform(data) and data.on_one_device and share == (0, 1) and rows.sliced

    def _rows(self) -> Rows:
        return Rows(self.dataset, self.batch_size, self.shuffle, self.drop_last, self.sampler, self.batch_sampler)

    def _sliced(self, data: ArrayDataset, indices: Any, end: int, start: int) -> Iterator[Any]:
        size, device = self._batch_size(), data.tensors[0].device
        in_bytes = size * data.bytes_per_sample()
        chunk = size * (1 if in_bytes >= ALONE_BYTES else max(1, CHUNK_BYTES // max(1, in_bytes)))
        tensors, bare, flat, alone = data.tensors, data.bare, data.flat, chunk == size
        plain = not data.channels_last
        for place in _chunks(indices, start * size, end, chunk, device):
            if isinstance(place, slice):
                rows = tuple([tensor[place].clone() for tensor in tensors])
            else:
                try:
                    rows = tuple([tensor.index_select(0, place) for tensor in tensors]) if plain else data.rows(place)
                except (IndexError, RuntimeError):
                    data.gather(place)  # says which index it was
                    raise
            if alone:
                yield rows[0] if bare else rows if flat else data.assemble(rows)
            # Not torch.split: the batches of a chunk would count as changed in place when one of them is.
            elif bare:
                yield from torch.unsafe_split(rows[0], size)
            else:
                parts = zip(*[torch.unsafe_split(tensor, size) for tensor in rows], strict=True)
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

    def _streamed(
        self, seed: int, epoch: int, start: int, stop: int | None, share: tuple[int, int], source: Source | None
    ) -> Iterator[tuple[Task, Any]]:
        maker, size = Maker(None, self.collate, self.transform), self._batch_size()
        source = Source(self.dataset, "the dataset") if source is None else source
        for index, samples in enumerate(itertools.islice(source.read(seed, epoch, start, size), _count(start, stop)), start):
            if len(samples) < size and self.drop_last:
                return
            places = list(range(index * size, index * size + len(samples)))
            task = Task(seed, epoch, index, places, *share_of(len(samples), share))
            with kept():
                batch = maker.of_samples(samples, task)
            yield task, batch

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
            timeout=math.inf if self.timeout is None else self.timeout,
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


def _reject_batches(dataset: Any) -> None:
    """Raise for what would be taken for samples, and is arrays or batches."""
    if isinstance(dataset, Loader) or (hasattr(dataset, "batch_size") and hasattr(type(dataset), "__iter__")):
        raise DataError(f"dataset is {kind_of(dataset)}, which gives batches already: pass it as it is, not in an ax.Loader")
    if isinstance(dataset, tuple) and not hasattr(dataset, "_fields") and dataset and all(map(is_array, dataset)):
        raise DataError(f"dataset is {kind_of(dataset)}: a tuple of arrays is wrapped as ax.ArrayDataset(*arrays)")
    if isinstance(dataset, (Mapping, Set)):
        how = (
            "a mapping of arrays is wrapped as ax.ArrayDataset(mapping)" if isinstance(dataset, Mapping) else "it has no order"
        )
        raise DataError(f"dataset is {kind_of(dataset)}: {how}")


def _tasks(
    rows: Rows, seed: int, epoch: int, start: int, stop: int | None, share: tuple[int, int], step: int | None
) -> Iterator[Task]:
    for number, of_batch in enumerate(rows.batches(seed, epoch, start, stop, step), start):
        yield Task(seed, epoch, number, of_batch.tolist(), *share_of(len(of_batch), share))


def _remembered(tasks: Iterator[Task], asked: deque[Task]) -> Iterator[Task]:
    for task in tasks:
        asked.append(task)
        yield task


def _numbered(task: Task, batch: Any) -> Numbered:
    return Numbered(torch.tensor(task.rows[task.first : task.last], dtype=torch.int64), batch)


def _each(place: Tensor | slice, device: torch.device) -> Tensor:
    return torch.arange(place.start, place.stop, device=device) if isinstance(place, slice) else place


def _chunks(indices: Any, first: int, end: int, size: int, device: torch.device) -> Iterator[Tensor | slice]:
    """The places from ``first`` to before ``end``, so many at once: slices where the order is the dataset's own."""
    if isinstance(indices, Tensor):
        yield from torch.split(placed(indices[first:end], device), size) if first < end else ()
        return
    for one in range(first, end, size):
        place = slice(one, min(one + size, end))
        yield place if indices is None else placed(indices[place], device)


def as_arrays(dataset: Any) -> Any:
    """A dataset of torch's own that holds tensors, as what gathers them a batch at a time; any other as it is."""
    if type(dataset) is TensorDataset and not any(tensor.requires_grad for tensor in dataset.tensors):
        with contextlib.suppress(DataError):  # of a type that torch gathers no rows of
            return ArrayDataset(tuple(dataset.tensors))
    if type(dataset) is torch.utils.data.Subset:
        whole = as_arrays(dataset.dataset)
        return dataset if whole is dataset.dataset else Subset(whole, dataset.indices)
    return dataset


def _check_share(share: Any) -> None:
    rank, ranks = share if isinstance(share, tuple) and len(share) == 2 else (None, None)
    if not isinstance(rank, int) or not isinstance(ranks, int) or not 0 <= rank < ranks:
        raise ConfigurationError(f"share={share!r}: (rank, ranks), with rank 0 to ranks - 1")


def _count(start: int, stop: int | None) -> int | None:
    return None if stop is None else max(0, stop - start)
