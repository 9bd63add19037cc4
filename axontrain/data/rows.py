"""Rows: which samples each batch of an epoch is made of, by whatever says the order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axontrain.data.blocks import BlockOrder, order_in_blocks
from axontrain.data.mixture import Mixture
from axontrain.data.order import order as shuffled_order
from axontrain.data.samplers import Foreign, as_rows, gives_batches, gives_indices, is_sampler, within
from axontrain.errors import ConfigurationError, DataError, kind_of

# Indices that are looked up at once, of orders that are computed.
CHUNK_ROWS = 16384


@dataclass(frozen=True, slots=True)
class Rows:
    """The order of a Loader: the arguments are the Loader's."""

    dataset: Any
    batch_size: int | None
    shuffle: bool
    drop_last: bool
    sampler: Any
    batch_sampler: Any

    def __len__(self) -> int:
        if self.batch_sampler is not None:
            return len(self.batch_sampler)
        if self._mixed:
            return self.dataset.count(self._size, self.drop_last)  # type: ignore[no-any-return]  # of a Mixture
        batches, rest = divmod(len(self.dataset if self.sampler is None else self.sampler), self._size)
        return batches + (1 if rest and not self.drop_last else 0)

    @property
    def sliced(self) -> bool:
        """Whether a batch is a slice of an order of the whole epoch."""
        return self.batch_sampler is None and (self.sampler is None or gives_indices(self.sampler))

    def end(self, stop: int | None) -> int:
        """Where in that order the batches before ``stop`` end."""
        n = len(self.dataset if self.sampler is None else self.sampler)
        end = n - n % self._size if self.drop_last else n
        return end if stop is None else min(end, stop * self._size)

    def batches(self, seed: int, epoch: int, start: int, stop: int | None, step: int | None = None) -> Iterator[Tensor]:
        """The indices of each batch from number ``start`` on; a Mixture may go by the run's step at the epoch's beginning.

        Raises:
            DataError: for what is no index of the dataset.
        """
        count = None if stop is None else max(0, stop - start)
        if self._mixed:
            size = self._size
            begun = epoch * len(self) if step is None else step
            chosen = self.dataset.rows(seed, epoch, size, shuffle=self.shuffle, drop_last=self.drop_last, step=begun)
            yield from itertools.islice(chosen(start), count)
        elif gives_batches(self.sampler):
            batches = self.sampler.batches(seed, epoch, self._size, drop_last=self.drop_last)
            yield from batches[start:stop]
        elif self.batch_sampler is not None:
            yield from itertools.islice(self._lists(seed, epoch, start), count)
        elif self.sampler is not None and not gives_indices(self.sampler):
            yield from itertools.islice(self._drawn(seed, epoch, start), count)
        else:
            yield from self._cut(self.order(seed, epoch), start, stop)

    def _cut(self, indices: Any, start: int, stop: int | None) -> Iterator[Tensor]:
        size, end = self._size, self.end(stop)
        chunk = size * max(1, CHUNK_ROWS // size)
        for first in range(start * size, end, chunk):
            last = min(first + chunk, end)
            if indices is None:
                rows = torch.arange(first, last)
            else:
                rows = indices.rows(first, last) if isinstance(indices, BlockOrder) else indices[first:last]
            yield from torch.split(rows, size)

    def _lists(self, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
        who, size = f"the batch_sampler ({type(self.batch_sampler).__name__})", len(self.dataset)
        for rows in itertools.islice(Foreign(self.batch_sampler, seed, epoch).items(), start, None):
            found = as_rows(rows, who)
            if not len(found) or (self.batch_size is not None and len(found) > self.batch_size):
                raise DataError(f"{who} gave a batch of {len(found)}: 1 or more, and no more than batch_size={self.batch_size}")
            yield within(found, size, who)

    def _drawn(self, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
        who, size, n = f"the sampler ({type(self.sampler).__name__})", self._size, len(self.dataset)
        drawn = itertools.islice(Foreign(self.sampler, seed, epoch).items(), start * size, None)
        while rows := list(itertools.islice(drawn, size)):
            if len(rows) < size and self.drop_last:
                return
            yield within(as_rows(rows, who), n, who)

    def order(self, seed: int, epoch: int) -> Any:
        """The order of an epoch, as what can be sliced; None for the dataset's own."""
        if self.sampler is not None:
            return self.sampler.indices(seed, epoch)
        if not self.shuffle:
            return None
        blocks = getattr(self.dataset, "blocks", None)
        if blocks is not None:  # read a block at a time
            return order_in_blocks(seed, epoch, blocks, self.dataset.window)
        return shuffled_order(seed, epoch, len(self.dataset))

    def check(self) -> None:
        """Raise for samplers that fit neither the dataset nor the other arguments."""
        for name, sampler in (("sampler", self.sampler), ("batch_sampler", self.batch_sampler)):
            if sampler is not None:
                self._check(name, sampler)

    def _check(self, name: str, sampler: Any) -> None:
        batches = name == "batch_sampler"
        if isinstance(self.dataset, Mixture):
            raise ConfigurationError(f"{name}= with a Mixture, which says by weights= or which= what comes when")
        if self.shuffle:
            raise ConfigurationError(f"shuffle=True and {name}=: the {name} says the order by itself")
        if batches and self.sampler is not None:
            raise ConfigurationError("sampler= and batch_sampler=: the batch_sampler says the order by itself")
        if batches and self.drop_last:
            raise ConfigurationError("drop_last=True and batch_sampler=: the batch_sampler makes the batches by itself")
        if not is_sampler(sampler) or (batches and (gives_indices(sampler) or gives_batches(sampler))):
            what = "lists of indices" if batches else "indices"
            raise DataError(f"{name} is {kind_of(sampler)}: it is an iterable of {what} that starts anew each epoch")
        covers = getattr(sampler, "covers", None)
        if covers is not None and covers != len(self.dataset):
            raise DataError(
                f"{type(sampler).__name__} was made of {covers} values and the dataset has {len(self.dataset)} samples: "
                f"it needs one for each"
            )

    @property
    def _mixed(self) -> bool:
        return isinstance(self.dataset, Mixture) and self.sampler is None and self.batch_sampler is None

    @property
    def _size(self) -> int:
        assert self.batch_size is not None  # without it there is a batch_sampler
        return self.batch_size
