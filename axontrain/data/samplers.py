"""Samplers: orders other than the shuffled one, each a pure function of (seed, epoch) too.

``Loader(dataset, batch_size, sampler=...)`` takes one of these, or any sampler of torch's.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from axontrain.data.order import order
from axontrain.data.permutation import Permutation
from axontrain.errors import ConfigurationError, DataError, kind_of, whole
from axontrain.randomness import Apart, derive

DRAWN_AT_ONCE = 1024


class WeightedSampler:
    """Samples drawn with probabilities in proportion to their weights.

    Args:
        weights: (N,), one for each sample of the dataset, 0 or more; 0 leaves a sample out.
        size: how many an epoch draws; N unless given.
        replacement: whether a sample may come more than once in an epoch. Without, the weights say which come first
            (Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006).

    >>> sampler = WeightedSampler([0.0, 1.0, 3.0], size=1000)
    >>> counts = sampler.indices(seed=0, epoch=0).bincount(minlength=3)
    >>> int(counts[0]), bool(counts[2] > 2 * counts[1])
    (0, True)

    Raises:
        ConfigurationError: if the weights are no weights, or fewer than ``size`` samples have one without replacement.
    """

    def __init__(self, weights: Any, size: int | None = None, *, replacement: bool = True) -> None:
        self.weights = _column(weights, torch.float64)
        if self.weights.dim() != 1 or not bool((torch.isfinite(self.weights) & (self.weights >= 0)).all()):
            raise ConfigurationError(f"WeightedSampler: weights are {kind_of(weights)}: one for each sample, finite, 0 or more")
        if not bool((self.weights > 0).any()):
            raise ConfigurationError("WeightedSampler: no weight is above 0, so there is nothing to draw")
        self.covers = len(self.weights)
        drawable = int((self.weights > 0).sum())
        self.replacement = replacement
        self.size = (self.covers if replacement else drawable) if size is None else whole("size", size)
        if not replacement and self.size > drawable:
            raise ConfigurationError(
                f"WeightedSampler(size={self.size}, replacement=False): only {drawable} samples have a weight above 0"
            )

    def __len__(self) -> int:
        return self.size

    def indices(self, seed: int, epoch: int) -> Tensor:
        """The samples of an epoch in order: int64 (size,)."""
        generator = torch.Generator().manual_seed(derive(seed, "weighted", epoch))
        if self.replacement:
            cumulative = self.weights.cumsum(0)
            draws = torch.rand(self.size, dtype=torch.float64, generator=generator) * cumulative[-1]
            # A draw of exactly a border belongs to the sample above it: one of weight 0 has no room.
            return torch.searchsorted(cumulative, draws, right=True).clamp_max_(_last(self.weights))
        # The logarithm of an exponential wait over the weight: infinite for 0, and finite for the smallest number above it.
        waits = torch.empty_like(self.weights).exponential_(generator=generator).log() - self.weights.log()
        return waits.argsort()[: self.size]


class BalancedSampler:
    """As many samples of each class: those of rare classes come again, each class's in a new order each time through.

    Args:
        labels: (N,), the class of each sample of the dataset: numbers or text.
        size: how many an epoch draws; N unless given.

    >>> labels = ["cat"] * 8 + ["dog"] * 2
    >>> drawn = BalancedSampler(labels).indices(seed=0, epoch=0)
    >>> sorted(labels[index] for index in drawn).count("dog")
    5
    """

    def __init__(self, labels: Any, size: int | None = None) -> None:
        codes = class_codes(labels, "BalancedSampler: labels")
        self.covers = len(codes)
        self.size = self.covers if size is None else whole("size", size)
        self.members = list(torch.split(codes.argsort(stable=True), codes.bincount().tolist())) if len(codes) else []

    def __len__(self) -> int:
        return self.size

    def indices(self, seed: int, epoch: int) -> Tensor:
        """The samples of an epoch in order: int64 (size,)."""
        if not self.members:
            return torch.empty(0, dtype=torch.int64)
        generator = torch.Generator().manual_seed(derive(seed, "balanced", epoch))
        share, rest = divmod(self.size, len(self.members))
        extra = set(torch.randperm(len(self.members), generator=generator)[:rest].tolist())
        drawn = []
        for number, members in enumerate(self.members):
            wanted = share + (number in extra)
            rounds = -(-wanted // len(members))
            through = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
            drawn += through and [torch.cat(through)[:wanted]]
        found = torch.cat(drawn)
        return found[torch.randperm(len(found), generator=generator)]


class BucketSampler:
    """Batches of samples of like length, so that little is padded.

    The shuffled order is cut into windows of so many batches, each window sorted by length and cut into batches, and the
    batches are shuffled again.

    Args:
        lengths: (N,), the length of each sample of the dataset.
        window: batches in a window: more of them pad less and shuffle less.
        shuffle: False goes from the longest to the shortest, always the same: for evaluation, and for prediction, whose results
            come in this order (:meth:`Loader.order <axontrain.Loader.order>` says which it is).

    >>> sampler = BucketSampler([1, 9, 2, 8, 3, 7], window=3)
    >>> sorted(sorted(batch.tolist()) for batch in sampler.batches(seed=0, epoch=0, batch_size=2))
    [[0, 2], [1, 3], [4, 5]]
    """

    def __init__(self, lengths: Any, window: int = 100, *, shuffle: bool = True) -> None:
        self.lengths = _column(lengths)
        if self.lengths.dim() != 1 or self.lengths.is_floating_point():
            raise ConfigurationError(f"BucketSampler: lengths are {kind_of(lengths)}: one whole number for each sample")
        self.covers = len(self.lengths)
        self.window, self.shuffle = whole("window", window, what="of batches"), shuffle

    def __len__(self) -> int:
        return self.covers

    def batches(self, seed: int, epoch: int, batch_size: int, *, drop_last: bool = False) -> list[Tensor]:
        """The batches of an epoch, each int64 (batch_size,); one may be smaller, unless ``drop_last``."""
        if self.shuffle:
            indices = order(seed, epoch, self.covers)[:]
            windows = torch.split(indices, batch_size * self.window)
            indices = torch.cat([w[self.lengths[w].argsort(stable=True)] for w in windows])
        else:
            indices = self.lengths.argsort(descending=True, stable=True)
        batches = [batch for batch in torch.split(indices, batch_size) if len(batch) == batch_size or not drop_last]
        if not self.shuffle or not self.covers:
            return batches
        generator = torch.Generator().manual_seed(derive(seed, "buckets", epoch))
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


# What an epoch goes through: sliced, it gives the samples at those places.
Indices = Tensor | Permutation


class Foreign:
    """A sampler of somebody else's, read once: torch's or a user's, of indices or of lists of them.

    It draws in a random state of its own that (seed, epoch) decides, from a ``generator`` of its own too, and is told the
    epoch by ``set_epoch`` where it has that. So its order is as pure a function as it is itself: one that keeps count of its
    passes, or draws from other generators, goes its own ways.
    """

    def __init__(self, sampler: Any, seed: int, epoch: int) -> None:
        self.sampler = sampler
        owners = (sampler, getattr(sampler, "sampler", None))
        own = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
        for owner in owners:
            if callable(tell := getattr(owner, "set_epoch", None)):
                tell(epoch)
        self._drawer = Apart(derive(seed, "sampler", epoch), list(own.values()))

    def items(self) -> Iterator[Any]:
        """What it gives, one by one; a few are drawn ahead."""
        with self._drawer.drawing():
            drawn = iter(self.sampler)
        while True:
            with self._drawer.drawing():
                some = list(itertools.islice(drawn, DRAWN_AT_ONCE))
            yield from some
            if len(some) < DRAWN_AT_ONCE:
                return


def gives_indices(sampler: Any) -> bool:
    """Whether a sampler is a pure function, ``indices(seed, epoch)``."""
    return _is_function_of(getattr(sampler, "indices", None), "seed", "epoch")


def gives_batches(sampler: Any) -> bool:
    """Whether a sampler is a pure function, ``batches(seed, epoch, batch_size, drop_last=...)``."""
    return _is_function_of(getattr(sampler, "batches", None), "seed", "epoch", "batch_size", "drop_last")


def _is_function_of(value: Any, *names: str) -> bool:
    # Others' samplers, and tensors, have methods of these names that are something else.
    try:
        return callable(value) and set(names) <= set(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return False


def is_sampler(value: Any) -> bool:
    """Whether a value gives indices at all: such a function, or an iterable that starts anew."""
    return gives_indices(value) or gives_batches(value) or (isinstance(value, Iterable) and not isinstance(value, Iterator))


def within(rows: Tensor, size: int, who: str) -> Tensor:
    """Return the indices that a sampler gave, if the dataset has them.

    Raises:
        DataError: naming the first index that it has not.
    """
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= size):
        wrong = next(row for row in rows.tolist() if not 0 <= row < size)
        raise DataError(f"{who} gave the index {wrong}, and the dataset has {size} samples: indices are 0 to {size - 1}")
    return rows


def as_rows(indices: Sequence[Any], who: str) -> Tensor:
    """Return the indices that a sampler gave as a tensor.

    Raises:
        DataError: if they are none.
    """
    try:
        rows = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{who} gave {kind_of(indices)}: it gives indices, whole numbers") from error
    if rows.numel() and (rows.is_floating_point() or rows.dim() != 1):
        raise DataError(f"{who} gave {kind_of(indices)}: it gives indices, whole numbers")
    return rows.long()


def class_codes(labels: Any, what: str) -> Tensor:
    """Number the distinct values of (N,) labels, numbers or text, in sorted order: int64 (N,)."""
    if isinstance(labels, Tensor) or hasattr(labels, "dtype"):
        try:
            found = _column(labels)
        except (TypeError, ValueError):
            found = None
        if found is not None and found.dim() != 1:
            raise DataError(f"{what} are {kind_of(labels)}: one label for each sample, (N,)")
        if found is not None:
            codes_of: Tensor = torch.unique(found, sorted=True, return_inverse=True)[1]
            return codes_of
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    values = [value.item() if isinstance(value, Tensor) else value for value in values]
    codes = {value: code for code, value in enumerate(sorted(set(values), key=lambda value: (str(type(value)), value)))}
    return torch.tensor([codes[value] for value in values], dtype=torch.int64)


def _column(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A column of numbers, of whatever library, as a tensor on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().cpu().to(dtype)
    array = values.to_numpy() if hasattr(values, "to_numpy") else values
    # A copy, since a data frame's may be read-only, which torch warns of.
    return torch.as_tensor(array.copy() if hasattr(array, "dtype") else list(array), dtype=dtype)


def _last(weights: Tensor) -> int:
    # Rounding may put the last draw beyond the sum: the last sample of any weight is meant.
    return int((weights > 0).nonzero()[-1])
