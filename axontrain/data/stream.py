"""Stream: whatever a user trains on, seen as batches of an epoch from some index on.

What wraps the data does it here, once, before the loop starts: the check of shapes, the move to the device, the limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.data.arrays import ArrayDataset
from axontrain.data.loader import Loader
from axontrain.data.protocol import is_dataset, reject_frame
from axontrain.errors import BatchMismatchError, DataError, EmptyDataError, kind_of, whole

DEFAULT_BATCH_SIZE = 32


class Stream:
    """The batches of ``data`` for one use: training, validation or prediction.

    Args:
        data: a Dataset, a Loader, or any iterable of batches.
        name: what errors call it.
        batch_size: of a bare Dataset.
        shuffle: of a bare Dataset.
        limit: end each pass after so many batches.
        strict: raise where a batch's structure or trailing shape differs from the first's, or a list of batches looks like
            one of samples.
        device: where batches are moved; None leaves them.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        shuffle: bool = False,
        limit: int | None = None,
        strict: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.data, self.name, self.device = data, name, device
        self.limit = None if limit is None else whole("limit", limit, what="of batches")
        reject_frame(data, name)
        if strict and isinstance(data, (tuple, list)) and data and _is_sample(data[0]):
            raise DataError(
                f"{name} looks like a {type(data).__name__} of samples, and would be taken for one of batches (the first is "
                f"{kind_of(data[0])}): wrap it, ax.Loader({name}, batch_size); if it is batches, pass strict=False to the Loop"
            )
        self.loader = _loader(data, name, batch_size, shuffle)
        if self.loader is None:
            self.strict = strict
        else:
            own = self.loader.strict
            self.strict = (strict if own is None else own) and not self.loader.uniform
        self._first: list[str] | None = None
        self._live: Iterator[Any] | None = None
        self._position = (-1, -1)

    @property
    def brings_batches(self) -> bool:
        """Whether the data is batched already, so that a batch size would have no effect on it."""
        return self.loader is None or self.loader is self.data

    @property
    def length(self) -> int | None:
        """Batches in a pass, where that can be known."""
        try:
            length = len(self.loader if self.loader is not None else self.data)
        except TypeError:
            return None
        return length if self.limit is None else min(length, self.limit)

    def batches(self, seed: int, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from index ``start`` on; never more than one read at a time.

        Raises:
            EmptyDataError: if a pass gives no batch at all.
        """
        batches = self._from(seed, epoch, start)
        if self.limit is not None:
            batches = itertools.islice(batches, max(0, self.limit - start))
        if self.strict:
            batches = self._checked(batches, epoch, start)
        if self.device is not None and self.device.type != "cpu":
            batches = (to_device(batch, self.device) for batch in batches)
        return batches

    def goes_on_from(self, other: Stream) -> bool:
        """Take over how far ``other`` has read the same data; False if the batches are not the same as there."""
        if self.loader is not None and other.loader is not None:
            mine, its = self.loader, other.loader
            return (len(mine.dataset), mine.batch_size, mine.shuffle) == (len(its.dataset), its.batch_size, its.shuffle)
        if self.data is other.data:
            self._live, self._position, self._first = other._live, other._position, other._first
        return self.data is other.data

    def empty(self) -> EmptyDataError:
        """The error for a pass that gave no batch."""
        if self.loader is not None:
            rest = len(self.loader.dataset)
            why = f"{rest} samples, batch_size={self.loader.batch_size}, drop_last={self.loader.drop_last}"
        elif self.data is not None and iter(self.data) is self.data:
            why = "it is an iterator, which can be read once: pass an iterable that starts anew, as a list or a Loader"
        else:
            why = f"it is {kind_of(self.data)}"
        return EmptyDataError(f"{self.name} gave no batch: {why}")

    def _from(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        if self.loader is not None:
            return self.loader.batches(seed if self.loader.seed is None else self.loader.seed, epoch, start)
        live = self._live
        if live is not None and start and self._position == (epoch, start):
            return self._counted(live, epoch, start)
        fresh = iter(self.data)
        if start and fresh is not self.data:  # an iterator stands where it was left; an iterable starts anew
            for _ in itertools.islice(fresh, start):
                pass
        self._live = fresh
        return self._counted(fresh, epoch, start)

    def _counted(self, batches: Iterator[Any], epoch: int, start: int) -> Iterator[Any]:
        # Remembers how far an iterable has been read, so that a second fit goes on with the batches that are left.
        for index, batch in enumerate(batches, start):
            self._position = (epoch, index + 1)
            yield batch

    def _checked(self, batches: Iterator[Any], epoch: int, start: int) -> Iterator[Any]:
        for index, batch in enumerate(batches, start):
            now = signature(batch)
            if self._first is None:
                self._first = now
            elif now != self._first:
                raise BatchMismatchError(
                    f"{self.name}: batch {index} of epoch {epoch} differs from the first batch in structure or trailing "
                    f"shape: expected {_written(self._first)}, got {_written(now)}. "
                    f"Pad or collate it to one shape, or pass strict=False to the Loop if this is meant."
                )
            yield batch


def signature(batch: Any) -> list[str]:
    """The structure and trailing shapes of a batch: what may not change from one batch to the next.

    >>> signature((torch.zeros(4, 3), {"y": torch.zeros(4)}))
    ['[0]: (*, 3)', "[1]['y']: (*)"]
    """
    found: list[str] = []
    _describe(batch, "", found)
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch, whatever its structure."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def joined(parts: list[tuple[Any, int]]) -> Any:
    """Put predictions of batches together; each comes with the size of its batch.

    Tensors are joined along their first dimension, mappings and tuples item by item. A list with an item for each sample (as
    text or boxes are) is made longer; any other list is taken item by item too.

    Raises:
        DataError: if tensors of different batches differ in their trailing shape.
    """
    values = [value for value, _ in parts]
    first = values[0]
    if isinstance(first, Tensor):
        if any(value.shape[1:] != first.shape[1:] for value in values):
            raise DataError(
                "the predictions of different batches differ in shape, so they cannot be put together: "
                "use predict(..., stream=True), which gives them batch by batch"
            )
        return torch.cat(values) if first.dim() else torch.stack(values)
    if isinstance(first, Mapping):
        return {key: joined([(value[key], size) for value, size in parts]) for key in first}
    if isinstance(first, list) and all(len(value) == size for value, size in parts):
        return [item for value in values for item in value]
    if isinstance(first, (tuple, list)):
        items = [joined([(value[index], size) for value, size in parts]) for index in range(len(first))]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return values


def _describe(value: Any, path: str, found: list[str]) -> None:
    if isinstance(value, Tensor) or hasattr(value, "shape"):
        rest = ", ".join(map(str, value.shape[1:]))
        found.append(f"{path or 'batch'}: ({'*' if len(value.shape) else ''}{', ' + rest if rest else ''})")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):  # the same names in another order are no other structure
            _describe(value[key], f"{path}[{key!r}]", found)
    elif isinstance(value, (tuple, list)) and not (value and isinstance(value[0], (str, bytes, int, float))):
        for index, item in enumerate(value):
            _describe(item, f"{path}[{index}]", found)
    else:
        found.append(f"{path or 'batch'}: {type(value).__name__}")


def _written(parts: list[str]) -> str:
    return "; ".join(parts) or "nothing"


def _loader(data: Any, name: str, batch_size: int, shuffle: bool) -> Loader | None:
    if isinstance(data, Loader):
        loader: Loader | None = data
    elif _is_array(data):
        loader = Loader(ArrayDataset(data), batch_size, shuffle=shuffle)
    elif isinstance(data, (str, bytes, Mapping)) or data is None:
        raise DataError(
            f"{name} is {kind_of(data)}: pass a Dataset, a Loader, or an iterable of batches"
            + (" (a mapping of arrays: ax.ArrayDataset(mapping))" if isinstance(data, Mapping) else "")
        )
    elif isinstance(data, tuple) and data and all(_is_array(item) for item in data):
        raise DataError(
            f"{name} is {kind_of(data)}: a tuple of arrays is wrapped as ax.ArrayDataset(*arrays), so that it is not "
            f"taken for {len(data)} batches (a list is an iterable of batches)"
        )
    elif isinstance(data, (tuple, list)) or not is_dataset(data) or _gives_batches(data):
        # A list is taken for what it most often is in training code, one stream of batches; wrap it in a Loader to
        # have it taken for samples.
        loader = None
        if not isinstance(data, Iterable) and not hasattr(type(data), "__getitem__"):
            raise DataError(
                f"{name} is {kind_of(data)}: pass a Dataset (it has no __len__ or no __getitem__), a Loader, or an "
                f"iterable of batches (it has no __iter__)"
            )
    else:
        loader = Loader(data, batch_size, shuffle=shuffle)
    return loader


def _is_sample(item: Any) -> bool:
    # A pair or a mapping with a part that has no batch dimension; a list of numbers is a column of a batch.
    column = isinstance(item, list) and all(map(_is_number, item))
    pair = isinstance(item, (tuple, list)) and len(item) == 2 and not column
    parts = item.values() if isinstance(item, Mapping) else item if pair else ()
    return any(_is_number(part) or _is_sample(part) for part in parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "shape", None) == ()


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or type(value).__module__.partition(".")[0] == "numpy"


def _gives_batches(data: Any) -> bool:
    # torch's DataLoader has no __getitem__; loaders of other libraries that do say that they are loaders.
    return hasattr(data, "batch_sampler") or (hasattr(data, "batch_size") and hasattr(type(data), "__iter__"))
