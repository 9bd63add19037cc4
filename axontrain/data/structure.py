"""Batches of any structure: tensors in tuples, lists, mappings, named tuples and dataclasses, one in another."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import DataError, kind_of
from axontrain.host import pinned


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same structure with ``function`` of each of its leaves: whatever is no container.

    >>> mapped({"a": (1, [2, 3])}, lambda leaf: leaf * 10)
    {'a': (10, [20, 30])}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, function) for item in value)
    if is_record(value):
        return rebuilt(value, {name: mapped(getattr(value, name), function) for name in fields(value)})
    return function(value)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch, whatever its structure."""
    ahead = device.type != "cpu"  # what comes to the CPU would be read before it is there
    pins = device.type == "cuda"

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            # From memory that is not pinned the copy would wait until the device has come to it.
            if pins and leaf.device.type == "cpu" and not leaf.requires_grad and leaf.layout is torch.strided:
                leaf = pinned(leaf)
            return leaf.to(device, non_blocking=ahead)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return mapped(batch, move)


def shapes(batch: Any) -> str:
    """Types, shapes and dtypes of a batch, in one text: batches that are alike in all of them have the same.

    >>> shapes((torch.zeros(2, 3), 1)) == shapes((torch.ones(2, 3), 2)) != shapes((torch.zeros(4, 3), 1))
    True
    """
    return str(mapped(batch, kind_of))


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of its structure."""
    found: list[Tensor] = []
    mapped(batch, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def cut(batch: Any, first: int, last: int, size: int) -> Any:
    """The samples from ``first`` to before ``last`` of a batch of ``size``: of tensors, arrays, and lists with an item each.

    >>> cut([torch.arange(3), ("a", "b", "c")], 1, 3, 3)
    [tensor([1, 2]), ('b', 'c')]
    """
    if type(batch) in (list, tuple) and len(batch) == size and not any(_leads(item, size) for item in batch):
        return batch[first:last]
    if isinstance(batch, Mapping):
        return {key: cut(item, first, last, size) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(cut(item, first, last, size) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(cut(item, first, last, size) for item in batch)
    if is_record(batch):
        return rebuilt(batch, {name: cut(getattr(batch, name), first, last, size) for name in fields(batch)})
    return batch[first:last] if getattr(batch, "shape", ()) else batch


def share_of(size: int, share: tuple[int, int]) -> tuple[int, int]:
    """One of so many parts of ``size`` samples, a rank's or a microbatch: the first have one more where it is not even.

    >>> [share_of(10, (rank, 4)) for rank in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    index, count = share
    least, more = divmod(size, count)
    first = index * least + min(index, more)
    return first, first + least + (index < more)


def _leads(value: Any, size: int) -> bool:
    """Whether a value is a part of a batch of ``size``, and not a sample."""
    if isinstance(value, Mapping):
        return any(_leads(item, size) for item in value.values())
    if isinstance(value, (tuple, list)):
        return len(value) == size or any(_leads(item, size) for item in value)
    if is_record(value):
        return any(_leads(getattr(value, name), size) for name in fields(value))
    return bool(getattr(value, "shape", ())) and value.shape[0] == size


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
    if is_record(first):
        return rebuilt(first, {name: joined([(getattr(v, name), size) for v, size in parts]) for name in fields(first)})
    return values


def signature(batch: Any) -> list[str]:
    """The structure and trailing shapes of a batch: what may not change from one batch to the next.

    >>> signature((torch.zeros(4, 3), {"y": torch.zeros(4)}))
    ['[0]: (*, 3)', "[1]['y']: (*)"]
    """
    found: list[str] = []
    _describe(batch, "", found)
    return found


def trailing(batch: Any) -> list[tuple[int, torch.Size]] | None:
    """The dimensions and trailing shapes of a tuple of tensors, which are quick to compare; None of anything else.

    >>> trailing((torch.zeros(4, 3), torch.zeros(4)))
    [(2, torch.Size([3])), (1, torch.Size([]))]
    """
    if type(batch) is not tuple:
        return None
    found = []
    for part in batch:
        if not isinstance(part, Tensor):
            return None
        found.append((part.dim(), part.shape[1:]))
    return found


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
    elif is_record(value):
        for name in fields(value):
            _describe(getattr(value, name), f"{path}.{name}", found)
    else:
        found.append(f"{path or 'batch'}: {type(value).__name__}")


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields(record: Any) -> tuple[str, ...]:
    """The names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(record))


def rebuilt(record: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a dataclass instance with other values. Its ``__init__`` is not called: it may check single samples."""
    made = copy.copy(record)
    for name, value in values.items():
        object.__setattr__(made, name, value)  # frozen ones too
    return made
