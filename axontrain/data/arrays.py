"""ArrayDataset: tensors and arrays in memory, gathered a batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import DataError, kind_of


class ArrayDataset:
    """Arrays of one length as a dataset: in memory, or on the GPU.

    Args:
        *arrays: tensors, NumPy arrays, numeric columns or lists, each of N rows. One array gives batches that are a bare
            tensor, several give tuples, and a single mapping ``{name: array}`` gives mappings.

    Tensors and NumPy arrays are not copied, except for arrays that are read-only (a data frame's columns) or run backwards,
    which torch does not take; of a file larger than memory, ``np.load(path, mmap_mode="c")`` is not copied either. Samples
    and batches are copies, so that nothing done to them reaches the data.

    >>> data = ArrayDataset(torch.arange(6.0).reshape(3, 2), [0, 1, 0])
    >>> len(data), data[1]
    (3, (tensor([2., 3.]), tensor(1)))
    >>> data.gather(torch.tensor([2, 0]))[1]
    tensor([0, 0])

    Raises:
        DataError: if there is no array, lengths differ, or an array is not numeric.
    """

    def __init__(self, *arrays: Any) -> None:
        self.names: tuple[str, ...] | None = None
        if len(arrays) == 1 and isinstance(arrays[0], Mapping):
            self.names = tuple(arrays[0])
            arrays = tuple(arrays[0].values())
        if not arrays:
            raise DataError("ArrayDataset() needs an array: ArrayDataset(inputs, targets) or ArrayDataset({'x': inputs})")
        labels: tuple[str | int, ...] = self.names or tuple(range(len(arrays)))
        self.tensors = tuple(_tensor(array, label) for array, label in zip(arrays, labels, strict=True))
        sizes = {label: len(tensor) for label, tensor in zip(labels, self.tensors, strict=True)}
        if len(set(sizes.values())) > 1:
            raise DataError(f"ArrayDataset: the arrays differ in length: {sizes}; each has one row a sample")

    def __len__(self) -> int:
        return self.tensors[0].shape[0]

    def __getitem__(self, index: int) -> Any:
        return self._batch(tuple(tensor[index].clone() for tensor in self.tensors))

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The samples at ``indices``: torch's own protocol, so that its DataLoader gathers at once too."""
        gathered = [tensor.unbind() for tensor in self._gathered(_indices(indices))]
        return [self._batch(sample) for sample in zip(*gathered, strict=True)]

    def gather(self, indices: Tensor) -> Any:
        """The batch at ``indices`` (B,), as a copy."""
        return self._batch(self._gathered(indices))

    def bytes_per_sample(self) -> int:
        """The size of one row over all arrays."""
        return sum(t.element_size() * (t[:1].numel() if len(t) else 1) for t in self.tensors)

    def to(self, device: torch.device | str) -> ArrayDataset:
        """A dataset of the same rows on another device."""
        moved = ArrayDataset.__new__(ArrayDataset)
        moved.names, moved.tensors = self.names, tuple(tensor.to(device) for tensor in self.tensors)
        return moved

    def subset(self, indices: Any) -> ArrayDataset:
        """A dataset of the rows at ``indices``, copied."""
        part = ArrayDataset.__new__(ArrayDataset)
        part.names, part.tensors = self.names, self._gathered(_indices(indices))
        return part

    def __repr__(self) -> str:
        labels = self.names or range(len(self.tensors))
        of = ", ".join(f"{n}: {kind_of(t)}" for n, t in zip(labels, self.tensors, strict=True))
        return f"ArrayDataset({len(self)} samples, {of})"

    def _gathered(self, indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.index_select(0, indices.to(tensor.device)) for tensor in self.tensors)

    def _batch(self, parts: tuple[Any, ...]) -> Any:
        if self.names is not None:
            return dict(zip(self.names, parts, strict=True))
        return parts if len(parts) > 1 else parts[0]


# torch has them, but no index_select of them: the first shuffled batch would fail.
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _tensor(array: Any, label: str | int) -> Tensor:
    if not isinstance(array, Tensor):
        kind = kind_of(array)
        try:
            array = array.to_numpy() if hasattr(array, "to_numpy") else array
            flags = getattr(array, "flags", None)
            if flags is not None and (not flags.writeable or min(array.strides, default=0) < 0):
                array = array.copy()
            array = torch.as_tensor(array)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"ArrayDataset: array {label!r} is {kind}, which is not numeric: {error}") from error
    if array.dtype in _UNSIGNED:
        kind = str(array.dtype).removeprefix("torch.")
        raise DataError(f"ArrayDataset: array {label!r} is of {kind}, of which torch gathers no rows: make it int32 or int64")
    if array.dim() == 0:
        raise DataError(f"ArrayDataset: array {label!r} is a single number; it has one row a sample")
    tensor: Tensor = array.detach()
    return tensor


def _indices(indices: Any) -> Tensor:
    found = _tensor(indices, "indices")
    return found if found.numel() else found.long()  # an empty list would be one of floats
