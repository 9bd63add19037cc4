"""Contents: what a module holds beside parameters and buffers: attributes, what lies within those, tensors, generators.

And what its functions look up elsewhere (:mod:`axontrain.execution.lookups`). One walk finds it; what is assumed of it, put
back and compared is made of that.
"""

from __future__ import annotations

import array
import functools
import io
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from axontrain.execution.generators import is_generator
from axontrain.execution.lookups import Lookups
from axontrain.execution.views import Slots

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
DEPTH, MOST = 8, 256  # of objects and containers in one another; things in one, to be looked at though they are plain
ALL = 2**14  # things beside those of the parts
SMALL = 2**16  # bytes of an array, to be looked at
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps in each module: of that its parts, its hooks and its mode are looked at, and tensors apart.
TORCHS = frozenset(vars(nn.Module())) - {"training", "_modules", *HOOKS}
# Of which objects nothing that they hold decides what a step computes: they are what they are.
OPAQUE = (
    "torch", "axontrain", "numpy", "builtins", "functools", "threading", "logging", "torchmetrics", "typing", "pathlib",
)  # fmt: skip
OURS = ("LoopState", "Loop", "Run", "Update", "History")  # which are others in each step
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
PARTIAL, METHOD = ("func", "args", "keywords"), ("__func__", "__self__")  # what these hold


class Place(NamedTuple):
    """Where things lie, by names or in an order.

    Attributes:
        what: how it is called.
        where: the mapping or sequence, or a view that looks like one.
        keys: of what is looked at one by one.
        whole: whether nothing else belongs there, so that how many there are counts.
    """

    what: str
    where: Any
    keys: list[Any]
    whole: bool = True


class Contents:
    """What is found in a module when it is made.

    Attributes:
        places: mappings and sequences.
        tensors: what, place, key, and the tensor.
        arrays: NumPy's and Python's, small ones, and what they are called.
        sets: those, and what they are called.
        generators: of random numbers: the module's own.
        running: why a step cannot be done without Python, found on the way; "" if nothing was.
    """

    def __init__(self, module: nn.Module) -> None:
        self.places: list[Place] = []
        self.tensors: list[tuple[str, Any, Any, Tensor]] = []
        self.arrays: list[tuple[str, Any]] = []
        self.sets: list[tuple[str, set[Any]]] = []
        self.generators: list[Any] = []
        self.running = ""
        self._seen: set[int] = set()
        self._left, self._lookups = ALL, Lookups()
        self._waiting: deque[tuple[str, Any, int]] = deque([("", module, DEPTH)])  # what lies nearest is looked into first
        while self._waiting and self._left >= 0:
            self._within(*self._waiting.popleft())
            for found in () if self._waiting or self._left < 0 else self._lookups.more():
                self._place(found.what, found.where, [(name, found.where[name]) for name in found.names], DEPTH, whole=False)

    def new_since(self, before: Contents) -> str:
        """Which tensor is here that was not before, by its name; "" if none is."""
        known = {id(tensor) for *_, tensor in before.tensors}
        return next((f"{key} of {what}" for what, _, key, tensor in self.tensors if id(tensor) not in known), "")

    def _module(self, within: str, module: nn.Module, depth: int) -> None:
        for name, part in module.named_modules():
            what = ".".join(filter(None, (within, name)))
            what = f"{what} ({type(part).__name__})" if what else type(part).__name__
            if id(vars(part)) in self._seen:
                continue
            self._seen.add(id(vars(part)))
            self._lookups.space(type(part))
            own = [(key, value) for key, value in vars(part).items() if key not in TORCHS]
            self._place(what, vars(part), own, depth, of_part=True)
            for where in (part._parameters, part._buffers):
                self._place(what, where, where.items(), 0, of_part=True)
            for where in (part._modules, *(getattr(part, hooks) for hooks in HOOKS)):
                called = "parts" if where is part._modules else "hooks"
                self._seen.add(id(where))
                self._place(f"the {called} of {what}", where, where.items(), 0, of_part=True)

    def _place(
        self, what: str, where: Any, items: Iterable[tuple[Any, Any]], depth: int, *, whole: bool = True, of_part: bool = False
    ) -> None:
        items = [*items] if of_part else [*islice(items, self._left + 1)]
        self._left -= 0 if of_part else len(items)
        if self._left < 0:
            more = f"with {what}, there are more than {ALL} things, all of which would be looked at before each replay"
            self.running = self.running or more
            return
        self.places.append(Place(what, where, [key for key, _ in items], whole))
        for key, value in items:
            if isinstance(value, Tensor):
                self.tensors.append((what, where, key, value))
            elif depth and not isinstance(value, PLAIN) and (whole or not isinstance(value, types.ModuleType)):
                self._waiting.append((f"{key} of {what}", value, depth - 1))

    def _within(self, name: str, value: Any, depth: int) -> None:
        """Look into what is no tensor, and not plain."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if is_generator(value):
            self.generators.append(value)
            return
        if why := _moving(value):
            self.running = self.running or f"{name} {why}"
        elif isinstance(value, nn.Module):
            self._module(name, value, depth)
        elif isinstance(value, (type, types.ModuleType)):
            self._lookups.space(value, made=isinstance(value, type))
        elif isinstance(value, FUNCTIONS):
            parts = PARTIAL if isinstance(value, functools.partial) else METHOD
            self._waiting += [(name, getattr(value, part), depth) for part in parts if hasattr(value, part)]
            self._lookups.function(value)
        elif is_array(value):
            self.arrays.append((name, value))
        elif isinstance(value, dict):
            self._place(name, value, _looked_at(value.items(), len(value)), depth)
        elif isinstance(value, (list, tuple, deque)):
            self._place(name, value, _looked_at(enumerate(value), len(value)), depth)
        elif isinstance(value, (set, frozenset)):
            self.sets += [(name, value)] if isinstance(value, set) else []
            self._place(name, tuple(value), _looked_at(enumerate(value), len(value)), depth)
        elif hasattr(value, "__wrapped__"):
            self._lookups.function(value)
        if _is_own(value):
            self._attributes(name, value, depth)

    def _attributes(self, name: str, value: Any, depth: int) -> None:
        self._lookups.space(type(value))
        if hasattr(value, "__dict__"):
            self._place(name, vars(value), vars(value).items(), depth)
        if slots := Slots.of(value):
            self._place(name, slots, slots.items(), depth)


def _looked_at(items: Iterable[tuple[Any, Any]], size: int) -> Iterable[tuple[Any, Any]]:
    """Of many things in a container, those that are plain are left out."""
    return items if size <= MOST else ((key, value) for key, value in items if not isinstance(value, PLAIN))


def _moving(value: Any) -> str:
    """Why nothing that a step does with a value can be done without Python; "" of most."""
    kind = type(value)
    if isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
        return f"is the {kind.__name__}, whose steps Python counts"
    if kind.__module__.startswith("axontrain") and kind.__name__ in OURS:
        return f"is the {kind.__name__}, which is another in each step"
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        return "is an iterator, which Python moves on"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        if value.dtype.hasobject:
            return "is an array of objects, in which there may be anything"
        if type(value) is not numpy.ndarray and value.nbytes <= SMALL:
            return f"is an array of another class than NumPy's own, {kind.__name__}"
    return ""


def is_array(value: Any) -> bool:
    """Whether a value is an array, or bytes, so small that they are looked at."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return bool(value.nbytes <= SMALL)
    return isinstance(value, (bytearray, array.array)) and len(memoryview(value).cast("B")) <= SMALL


def _is_own(value: Any) -> bool:
    """Whether what an object holds may decide what a step computes: a config, a schedule; not a function, nor a library's."""
    if isinstance(value, (nn.Module, type, types.ModuleType, *FUNCTIONS)):
        return False
    home = type(value).__module__
    return home.partition(".")[0] not in OPAQUE or home.startswith("torch.distributions")
