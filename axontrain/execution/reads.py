"""Host reads: what makes Python wait until the device has caught up, seen while it happens, on any machine.

Most of it are operators that give the host a number, or a result whose size depends on values; a dispatch mode sees them. What
it does not see are methods that look into memory by themselves (``tolist``, ``numpy``, printing): those are watched by name.
And a few functions are others on a GPU than on the CPU (``one_hot``, ``to("cpu")``, ``torch.tensor``): a function mode sees
those.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from axontrain.execution.lines import TORCH

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
    "_linalg_svd": "check of torch.linalg",
    "_linalg_eigh": "check of torch.linalg",
    "linalg_eig": "check of torch.linalg",
    "_to_sparse": "to_sparse",
}
METHODS = {"tolist": "tolist", "numpy": "numpy", "__array__": "numpy", "cpu": "cpu", "__repr__": "print"}
MASKS = (torch.bool, torch.uint8)
TO_HOST, TO_DEVICE = "copy to the host", "copy to the device without non_blocking=True"


class HostReads(TorchDispatchMode):
    """Calls ``seen`` for each host read within it, with a word for it, before it is done.

    On the CPU nothing waits, and it shows what would on a GPU: each ``.cpu()`` too, ``.to("cpu")`` where the name is written
    out (any other device is the one that it computes on), and what is made of numbers on a ``device=``.

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
        self._functions = _Functions(self)
        self._replaced: list[tuple[str, Any]] = []

    def __enter__(self) -> Any:
        for name, word in METHODS.items():
            self._replaced.append((name, vars(Tensor).get(name)))
            setattr(Tensor, name, self._watched(getattr(Tensor, name), word))
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._functions.__exit__(*raised)  # type: ignore[no-untyped-call]
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
        elif name in CHECKED:
            word = name if CHECKED[name](*args, **kwargs) else ""
        elif name in ("linspace", "logspace"):
            word = "item" if any(isinstance(end, Tensor) for end in args[:2]) else ""
        else:
            return ""
        return "" if self.apart and not any(map(_on_device, args)) else word

    def _watched(self, original: Any, word: str) -> Any:
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            words = [] if self.apart and tensor.device.type == "cpu" else [word]
            return self.done(words, original, tensor, *args, **kwargs)

        return method

    def done(self, words: list[str], function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function whose reads are these, whatever it does."""
        for word in () if self._within else words:
            self.seen(word)
        self._within += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._within -= 1


class _Functions(TorchFunctionMode):
    """Looks at the functions that read otherwise than the operators tell that they come to."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        words = FUNCTIONS[func](self.reads.apart, *args, **kwargs) if func in FUNCTIONS else None
        return func(*args, **kwargs) if words is None else self.reads.done(words, func, *args, **kwargs)


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
    return TO_HOST if into.type == "cpu" else TO_DEVICE


def _masked(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in MASKS for index in indices)


def _on_device(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_on_device, value))
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _of_one_hot(apart: bool, *args: Any, num_classes: int = -1, **options: Any) -> list[str]:
    """How many classes there are, if it is not told; on the CPU it looks at the labels in any case."""
    told = num_classes != -1 or (len(args) > 1 and args[1] != -1)
    return [] if told or (apart and not any(map(_on_device, (*args, *options.values())))) else ["one_hot"]


def _of_to(apart: bool, _: Tensor, *args: Any, **kwargs: Any) -> list[str] | None:
    """On the CPU nothing is copied, and what is told is what was meant; on a GPU the operator tells."""
    into = kwargs.get("device", args[0] if args else None)
    if apart or not isinstance(into, (str, torch.device)) or torch.device(into).type != "cpu" or not _named("cpu"):
        return None
    later = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    return None if later else [TO_HOST]


def _of_tensor(apart: bool, *args: Any, **kwargs: Any) -> list[str] | None:
    """A number is read of each tensor in it; and then it is copied to where it is to be, and waited for."""
    named = dict(zip(("data", "dtype", "device"), args, strict=False)) | kwargs
    data, device = named.get("data", named.get("obj")), named.get("device")  # obj is asarray's word
    if isinstance(data, Tensor):
        return None
    words = ["item"] * _tensors(data, apart)
    if device is None or torch.device(device).type == "meta":
        return words
    return [*words, TO_DEVICE] if (torch.device(device).type != "cpu" if apart else not _named("cpu")) else words


def _of_new_tensor(apart: bool, tensor: Tensor, data: Any, **options: Any) -> list[str] | None:
    return _of_tensor(apart, data, **{"device": tensor.device} | options)


# What is read by a call with these arguments; None: what the operators tell.
FUNCTIONS: dict[Any, Callable[..., list[str] | None]] = {
    F.one_hot: _of_one_hot,
    Tensor.to: _of_to,
    Tensor.new_tensor: _of_new_tensor,
    torch.tensor: _of_tensor,
    torch.as_tensor: _of_tensor,
    torch.asarray: _of_tensor,
}
# Whether an operator looks at its values before it does its work: for the range, what is negative, what is no probability.
CHECKED: dict[str, Callable[..., bool]] = {
    "histc": lambda *args, **_: args[2:3] == args[3:4],  # no range, or one of no extent
    "normal": lambda *args, **__: isinstance(args[-1], Tensor) and len(args) > 1,
    "multinomial": lambda _, number, replacement=False, **__: number == 1 or not replacement,
}


def _tensors(data: Any, apart: bool) -> int:
    """How many tensors there are in a list of lists whose values have to come to the host."""
    if isinstance(data, (list, tuple)):
        return sum(_tensors(item, apart) for item in data)
    return isinstance(data, Tensor) and (not apart or _on_device(data))


def _named(word: str) -> bool:
    """Whether the call, outside of torch, that has come to this has a text written out in it."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((__file__, TORCH)):
        frame = frame.f_back
    if frame is None:
        return False
    places = list(frame.f_code.co_positions())
    call = places[frame.f_lasti // 2]
    texts = (
        code for code in dis.get_instructions(frame.f_code) if code.opname.startswith("LOAD_CONST") and code.argval == word
    )
    return any(_lies_in(places[code.offset // 2], call) for code in texts)


def _lies_in(place: Any, whole: Any) -> bool:
    """Whether a place, from line and column to line and column, lies in another; where it is not known, it does."""
    if None in (*place, *whole):
        return True
    first, last, left, right = whole
    return (first, left) <= (place[0], place[2]) and (place[1], place[3]) <= (last, right)
