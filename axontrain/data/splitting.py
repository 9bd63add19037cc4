"""split: a dataset in parts that have nothing in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from axontrain.data.arrays import ArrayDataset
from axontrain.data.order import order
from axontrain.data.protocol import checked
from axontrain.data.samplers import class_codes
from axontrain.errors import ConfigurationError, DataError, OutOfRangeError, kind_of, unknown
from axontrain.randomness import derive


class Subset:
    """Some samples of a dataset, as a dataset.

    >>> part = Subset("abcdef", [4, 0])
    >>> len(part), part[0]
    (2, 'e')
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | Tensor) -> None:
        self.dataset = dataset
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        self.pure = bool(getattr(dataset, "pure", False))
        blocks = getattr(dataset, "blocks", None)
        if blocks is not None and bool((self.indices.diff() >= 0).all()):  # read a block at a time, in order within each
            ends = torch.tensor(blocks, dtype=torch.int64).cumsum(0)
            self.blocks = torch.bincount(torch.bucketize(self.indices, ends, right=True), minlength=len(blocks)).tolist()
            self.window = dataset.window

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise OutOfRangeError(f"index {index} of a part of {len(self)} samples")
        return self.dataset[int(self.indices[index])]

    # As fast as the dataset is: what it has not got, this has not got either.

    @property
    def gather(self) -> Callable[[Tensor], Any]:
        """The batch at indices, where the dataset gathers."""
        gather = self.dataset.gather
        if not callable(gather):
            raise AttributeError("gather")
        return lambda indices: gather(self.indices[indices])

    @property
    def __getitems__(self) -> Callable[[list[int]], list[Any]]:
        """The samples at indices, where the dataset makes many at once."""
        many = self.dataset.__getitems__
        if not callable(many):
            raise AttributeError("__getitems__")
        return lambda indices: many(self.indices[torch.as_tensor(indices, dtype=torch.int64)].tolist())

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {kind_of(self.dataset)})"


def split(dataset: Any, *shares: float, seed: int = 0, stratify: Any = None, groups: Any = None) -> tuple[Any, ...]:
    """Split a dataset at random into parts that have no sample in common.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``. Parts of an :class:`~axontrain.ArrayDataset` are
            ArrayDatasets, which are copies; of memory-mapped arrays and of other datasets they look into them.
        *shares: of each part: fractions that add up to 1 at most, or numbers of samples.
        seed: the same seed gives the same parts.
        stratify: (N,) labels of which each part has the same mixture; or an ArrayDataset's array, by its name or its place, or
            a column of the frame that it was made of.
        groups: (N,), or such a name: samples of one group (a patient, a document) stay in one part. The shares are then met
            as nearly as the groups allow.

    Within a part the samples keep their order.

    >>> data = ArrayDataset({"x": torch.arange(10.0), "y": torch.tensor([0] * 8 + [1] * 2)})
    >>> train, test = split(data, 0.5, 0.5, stratify="y")
    >>> len(train), train.tensors[1].sum()
    (5, tensor(1))

    Raises:
        ConfigurationError: for shares that are none, add up to more than there is, or leave a part empty.
        DataError: for labels or groups that are not one for each sample.
    """
    n = len(checked(dataset))
    wanted = _fractions(shares, n)
    strata = _of_each(dataset, stratify, "stratify", n)
    of_group = _of_each(dataset, groups, "groups", n)
    shuffled = order(derive(seed, "split"), 0, n)[:]
    if of_group is not None:
        parts = _in_groups(shuffled, wanted, of_group, strata)
    else:
        codes = torch.zeros(n, dtype=torch.int64) if strata is None else strata
        parts = _stratified(shuffled, wanted, codes)
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        if not len(part):
            raise ConfigurationError(f"split: part {number} of {n} samples, with a share of {share!r}, would be empty")
    return tuple(_part(dataset, part.sort().values) for part in parts)


def _fractions(shares: Sequence[float], n: int) -> list[float]:
    numbers = [isinstance(share, (int, float)) and not isinstance(share, bool) and share > 0 for share in shares]
    if not shares or not all(numbers):
        raise ConfigurationError(f"split(dataset, {', '.join(map(repr, shares))}): shares of the parts, each above 0")
    counts = all(isinstance(share, int) for share in shares) and (len(shares) > 1 or shares[0] > 1)
    fractions = [share / n for share in shares] if counts and n else list(map(float, shares))
    if sum(fractions) > 1 + 1e-9:
        raise ConfigurationError(
            f"split(dataset, {', '.join(map(repr, shares))}): that is more than {f'{n} samples' if counts else 'the whole, 1'}"
        )
    return fractions


def _cuts(size: int, wanted: list[float], due: list[float]) -> list[int]:
    """How many of ``size`` samples go to each part, where ``due`` is what the parts were owed from earlier strata."""
    exact = [share * size + owed for share, owed in zip(wanted, due, strict=True)]
    total = min(size, round(sum(exact)))
    counts = [max(0, math.floor(number + 1e-9)) for number in exact]
    while sum(counts) > total:
        counts[max(range(len(counts)), key=lambda part: counts[part] - exact[part])] -= 1
    while sum(counts) < total:
        counts[max(range(len(counts)), key=lambda part: exact[part] - counts[part])] += 1
    for part, number in enumerate(counts):
        due[part] = exact[part] - number
    return counts


def _stratified(shuffled: Tensor, wanted: list[float], codes: Tensor) -> list[Tensor]:
    due = [0.0] * len(wanted)  # so that rounding in one stratum is made good in the next
    found: list[list[Tensor]] = [[] for _ in wanted]
    for code in range(int(codes.max()) + 1 if len(codes) else 0):
        members = shuffled[codes[shuffled] == code]
        first = 0
        for part, count in enumerate(_cuts(len(members), wanted, due)):
            found[part].append(members[first : first + count])
            first += count
    return [torch.cat(part) if part else torch.empty(0, dtype=torch.int64) for part in found]


def _in_groups(shuffled: Tensor, wanted: list[float], of_group: Tensor, strata: Tensor | None) -> list[Tensor]:
    """Large groups first, each to the part that still lacks most of what the group has."""
    codes = torch.zeros_like(of_group) if strata is None else strata
    kinds = int(codes.max()) + 1
    counts = torch.zeros(int(of_group.max()) + 1, kinds, dtype=torch.float64)
    counts.index_put_((of_group, codes), torch.ones(len(codes), dtype=torch.float64), accumulate=True)
    totals = counts.sum(0).clamp_min(1)
    rest = 1 - sum(wanted)
    targets = torch.tensor([*wanted, rest] if rest > 1e-9 else wanted, dtype=torch.float64)[:, None] * totals
    seen = dict.fromkeys(of_group[shuffled].tolist())  # a random order, for groups of one size
    groups = sorted(seen, key=lambda group: -float(counts[group].sum()))
    to = torch.empty(len(counts), dtype=torch.int64)
    for group in groups:
        # How far all parts would be from what they should have, if the group went to this one.
        lacking = targets - counts[group]
        gain = ((targets / totals).square() - (lacking / totals).square()).sum(1)
        part = int(gain.argmax())
        to[group] = part
        targets[part] -= counts[group]
    return [shuffled[to[of_group[shuffled]] == part] for part in range(len(wanted))]


def _of_each(dataset: Any, values: Any, what: str, n: int) -> Tensor | None:
    if values is None:
        return None
    if isinstance(values, (str, int)):
        if not isinstance(dataset, ArrayDataset):
            raise DataError(f"{what}={values!r}: only an ArrayDataset's arrays go by a name; pass one value for each sample")
        values = _array(dataset, values, what)
    codes = class_codes(values, what)
    if len(codes) != n:
        raise DataError(f"{what} has {len(codes)} values and the dataset {n} samples: it needs one for each")
    return codes


def _array(dataset: ArrayDataset, name: str | int, what: str) -> Tensor:
    structure = dataset.assemble(dataset.tensors)
    if dataset.columns is not None and isinstance(name, str):
        return dataset.columns.find(name, structure)
    if isinstance(structure, Mapping):
        parts = dict(structure)
    elif isinstance(structure, tuple):
        parts = dict(enumerate(structure))
    else:
        parts = {}
    if name not in parts:
        raise unknown(f"array in {what}:", name, map(str, parts))
    found = parts[name]
    if not isinstance(found, Tensor):
        raise DataError(f"{what}={name!r} is {kind_of(found)}: pass one value for each sample")
    return found


def _part(dataset: Any, indices: Tensor) -> Any:
    if isinstance(dataset, ArrayDataset) and not dataset.mapped:
        return dataset.subset(indices)
    return Subset(dataset, indices)
