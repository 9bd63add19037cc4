"""Host reads: what makes Python wait until the device has caught up, seen while it happens, on any machine.

Most of it are operators that give the host a number, or a result whose size depends on values; a dispatch mode sees them. What
it does not see are methods that look into memory by themselves (``tolist``, ``numpy``, printing): those are watched by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What a user calls it, by the operator that it comes to.
OPERATORS = {
    "_local_scalar_dense": "item",  # and bool, int, float, an index, a format of one
    "is_nonzero": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "allclose": "allclose",
    "bincount": "bincount",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique_consecutive",
    "unique_dim_consecutive": "unique_consecutive",
    "_linalg_check_errors": "check of torch.linalg",
}
METHODS = {"tolist": "tolist", "numpy": "numpy", "__array__": "numpy", "cpu": "cpu", "__repr__": "print"}
MASKS = (torch.bool, torch.uint8)


class HostReads(TorchDispatchMode):
    """Calls ``seen`` for each host read within it, with a word for it, before it is done.

    On the CPU nothing waits, and it shows what would on a GPU: each ``.cpu()`` too.

    Args:
        seen: it may raise; nothing is read then.
        device: where it computes. Of a loop on a GPU, what lies on the CPU anyway is not waited for.

    >>> words = []
    >>> with HostReads(words.append):
    ...     values = torch.arange(3.0)
    ...     _ = values[values > 1], float(values.sum()), torch.where(values > 1, values, 0.0)
    >>> words
    ['mask index', 'item']
    """

    def __init__(self, seen: Callable[[str], None], device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.seen = seen
        self.apart = device is not None and device.type != "cpu"
        self._within = 0  # a method that is watched: what it does to read is the same read
        self._replaced: list[tuple[str, Any]] = []

    def __enter__(self) -> Any:
        for name, word in METHODS.items():
            self._replaced.append((name, vars(Tensor).get(name)))
            setattr(Tensor, name, self._watched(getattr(Tensor, name), word))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        while self._replaced:
            name, before = self._replaced.pop()
            if before is None:  # it is of the class that torch.Tensor derives from
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operation, and do it."""
        kwargs = kwargs or {}
        if not self._within and (word := self._word(func, args, kwargs)):
            self.seen(word)
        return func(*args, **kwargs)

    def _word(self, func: Any, args: Any, kwargs: Any) -> str:
        """What the host would read by an operation; "" if nothing."""
        name = base_name(func)
        if name in ("_to_copy", "copy_"):  # between devices
            return _copied(name, args, kwargs)
        if name in OPERATORS:
            word = OPERATORS[name]
        elif name == "repeat_interleave" and "self" not in kwargs and len(args) == 1 and kwargs.get("output_size") is None:
            word = name
        elif name in ("index", "_unsafe_index"):
            word = "mask index" if _masked(args[1]) else ""
        elif name in ("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"):
            value = args[2]
            filled = value.numel() == 1 and value.device.type == "cpu" and not (len(args) > 3 and args[3])
            word = "mask assignment" if _masked(args[1]) and not filled else ""  # one number is filled in where the mask is
        else:
            return ""
        return "" if self.apart and not any(map(_on_device, args)) else word

    def _watched(self, original: Any, word: str) -> Any:
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._within and not (self.apart and tensor.device.type == "cpu"):
                self.seen(word)
            self._within += 1
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self._within -= 1

        return method


def base_name(func: Any) -> str:
    """Of an operator without its library and overload: "index" of ``aten.index.Tensor``."""
    parts = str(func).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _copied(name: str, args: Any, kwargs: Any) -> str:
    if name == "copy_":
        into, source = args[0].device, args[1].device
        later = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    else:
        into, source, later = kwargs.get("device"), args[0].device, kwargs.get("non_blocking")
    if later or into is None or into.type == source.type or "meta" in (into.type, source.type):
        return ""
    return "copy to the host" if into.type == "cpu" else "copy to the device without non_blocking=True"


def _masked(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in MASKS for index in indices)


def _on_device(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_on_device, value))
    return isinstance(value, Tensor) and value.device.type != "cpu"
