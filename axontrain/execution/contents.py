"""Contents: what a module holds beside parameters and buffers: attributes, what lies within those, tensors, generators.

One walk finds it; what is assumed of it, put back and compared is made of that.
"""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
DEPTH, MOST = 8, 256  # of objects and containers in one another; things in one, to be looked at one by one
SMALL = 2**16  # bytes of an array, to be looked at
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARTS = ("_modules", *HOOKS)
# What torch keeps in each module: of that its parts, its hooks and its mode are looked at, and tensors apart.
TORCHS = frozenset(vars(nn.Module())) - {"training", *PARTS}
# Of which objects nothing that they hold decides what a step computes: they are what they are.
OPAQUE = ("torch", "axontrain", "numpy", "builtins", "functools", "threading", "logging", "torchmetrics")


class Contents:
    """What is found in a module when it is made.

    Attributes:
        places: mappings and lists, what they are called, and the keys in them that are no tensors'.
        tensors: what, place, key, and the tensor.
        arrays: NumPy's, small ones, and what they are called.
        generators: of random numbers: the module's own.
        running: why a step cannot be done without Python, found on the way; "" if nothing was.
    """

    def __init__(self, module: nn.Module) -> None:
        self.places: list[tuple[str, Any, list[Any]]] = []
        self.tensors: list[tuple[str, Any, Any, Tensor]] = []
        self.arrays: list[tuple[str, Any]] = []
        self.generators: list[Any] = []
        self.running = ""
        self._seen: set[int] = set()
        self._module("", module, DEPTH)

    def new_since(self, before: Contents) -> str:
        """Which tensor is here that was not before, by its name; "" if none is."""
        known = {id(tensor) for *_, tensor in before.tensors}
        return next((f"{key} of {what}" for what, _, key, tensor in self.tensors if id(tensor) not in known), "")

    def _module(self, within: str, module: nn.Module, depth: int) -> None:
        for name, part in module.named_modules():
            what = ".".join(filter(None, (within, name)))
            what = f"{what} ({type(part).__name__})" if what else type(part).__name__
            own = {key: value for key, value in vars(part).items() if key not in TORCHS}
            self._place(what, vars(part), own.items(), depth)
            for place in (part._parameters, part._buffers):
                self._place(what, place, place.items(), depth)

    def _place(self, what: str, place: Any, items: Iterable[tuple[Any, Any]], depth: int) -> None:
        if id(place) in self._seen:
            return
        self._seen.add(id(place))
        items = list(items)
        self.tensors += [(what, place, key, value) for key, value in items if isinstance(value, Tensor)]
        self.places.append((what, place, [key for key, value in items if not isinstance(value, Tensor)]))
        for key, value in items:
            if not isinstance(value, (Tensor, *PLAIN)) and key not in PARTS:
                self._within(f"{key} of {what}", value, depth)

    def _within(self, name: str, value: Any, depth: int) -> None:
        if is_generator(value):
            if not any(value is one for one in self.generators):
                self.generators.append(value)
        elif not depth:
            return
        elif isinstance(value, dict):
            self._place(name, value, value.items() if len(value) <= MOST else (), depth - 1)
        elif isinstance(value, (list, tuple, deque)):
            self._place(name, value, enumerate(value) if len(value) <= MOST else (), depth - 1)
        elif isinstance(value, nn.Module):  # which is none of the parts
            self._module(name, value, depth - 1)
        elif isinstance(value, types.MethodType):
            self._within(name, value.__self__, depth - 1)
        elif type(value).__module__.startswith("axontrain") and type(value).__name__ in ("LoopState", "Loop", "Run"):
            self.running = f"{name} is the {type(value).__name__}, which is another in each step"
        elif _is_array(value):
            self.arrays.append((name, value))
        elif _is_own(value) and id(value) not in self._seen:
            self._seen.add(id(value))
            if hasattr(value, "__dict__"):
                self._place(name, vars(value), vars(value).items(), depth - 1)
            if slots := Slots.of(value):
                self._place(name, slots, slots.items(), depth - 1)


class Slots(dict[str, Any]):
    """The attributes of an object that has ``__slots__``, as a mapping that looks at them anew."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        super().__init__({name: getattr(owner, name) for name in names if hasattr(owner, name)})
        self.owner = owner

    @classmethod
    def of(cls, value: Any) -> Slots | None:
        """None of an object that has none."""
        found = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
        names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
        return cls(value, names) if names else None

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.nbytes <= SMALL


def is_generator(value: Any) -> bool:
    """Whether a value draws random numbers: of torch's, NumPy's or Python's."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy is not None:
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
    return isinstance(value, kinds)


def drawn_to(generator: Any) -> Any:
    """Where a generator stands, to be compared and put back."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state(legacy=False)
    return _listed(state)


def draw_from(generator: Any, state: Any) -> None:
    """Put a generator back to where :func:`drawn_to` found it."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.tensor(state, dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _listed(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _listed(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state


def _is_own(value: Any) -> bool:
    """Whether what an object holds may decide what a step computes: a config, a schedule; not a function, nor a library's."""
    functions = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
    return not isinstance(value, functions) and type(value).__module__.partition(".")[0] not in OPAQUE
