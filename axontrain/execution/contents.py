"""Contents: what a module holds beside parameters and buffers: attributes, what lies within those, tensors, generators.

And what its functions look up elsewhere (:mod:`axontrain.execution.lookups`). One walk finds it; what is assumed of it, put
back and compared is made of that.
"""

from __future__ import annotations

import functools
import gc
import inspect
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_modules

from axontrain.execution.arrays import is_array, written_through
from axontrain.execution.caches import is_cached, kept
from axontrain.execution.generators import is_generator
from axontrain.execution.lookups import Lookups
from axontrain.execution.moving import is_taken, moving
from axontrain.execution.views import Bare, Slots, bare, is_a, kind_of
from axontrain.execution.wording import called

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
DEPTH, MOST = 8, 256  # of objects and containers in one another; things in one, to be looked at though they are plain
ALL = 2**14  # things beside those of the parts
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_EVERY = (
    of_modules._global_forward_hooks, of_modules._global_forward_pre_hooks,
    of_modules._global_backward_hooks, of_modules._global_backward_pre_hooks,
)  # fmt: skip
# What torch keeps in each module: of that its parts, its hooks and its mode are looked at, and tensors apart.
TORCHS = frozenset(vars(nn.Module())) - {"training", "_modules", *HOOKS}
# Of which objects nothing that they hold decides what a step computes: they are what they are.
OPAQUE = (
    "torch", "axontrain", "numpy", "builtins", "functools", "threading", "logging", "torchmetrics", "typing", "pathlib",
    "random",
)  # fmt: skip
TORCH_S = ("torch.distributions", "torch.quasirandom")  # of which objects hold what decides
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
PARTIAL, METHOD = ("func", "args", "keywords"), ("__func__", "__self__")  # what these hold


class Place(NamedTuple):
    """Where things lie, by names or in an order.

    Attributes:
        what: how it is called.
        where: the mapping or sequence, or a view that looks like one.
        keys: of what is looked at one by one.
        whole: whether nothing else belongs there, so that how many there are counts.
        ordered: whether the order of keys counts too: not of attributes.
    """

    what: str
    where: Any
    keys: list[Any]
    whole: bool = True
    ordered: bool = False

    @property
    def changes(self) -> bool:
        """Whether it can be written to."""
        where = self.where.of if isinstance(self.where, Bare) else self.where
        return not is_a(where, (tuple, types.MappingProxyType))


class Contents:
    """What is found in a module when it is made.

    Attributes:
        places: mappings and sequences.
        tensors: what, place, key, and the tensor.
        arrays: NumPy's and Python's, small ones, and what they are called.
        sets: those, and what they are called.
        generators: of random numbers: the module's own.
        running: why a step cannot be done without Python, found on the way; "" if nothing was.
        contexts: variables of contexts, and what they are called.
        taken: iterators and queues, from which a step may take what is gone then, and what they are called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.places: list[Place] = []
        self.tensors: list[tuple[str, Any, Any, Tensor]] = []
        self.arrays: list[tuple[str, Any]] = []
        self.sets: list[tuple[str, set[Any]]] = []
        self.generators: list[Any] = []
        self.running = ""
        self.contexts: list[tuple[str, ContextVar[Any]]] = []
        self.taken: list[tuple[str, Any]] = []
        self._seen: set[int] = set()
        self._left, self._lookups = ALL, Lookups()
        self._waiting: deque[tuple[str, Any, int]] = deque([("", module, DEPTH)])  # what lies nearest is looked into first
        self._waiting += [("a hook of every module", hook, DEPTH) for hooks in OF_EVERY for hook in hooks.values()]
        while self._waiting and self._left >= 0:
            self._within(*self._waiting.popleft())
            for found in () if self._waiting or self._left < 0 else self._lookups.more():
                self._place(found.what, found.where, [(name, found.where[name]) for name in found.names], DEPTH, whole=False)

    def names(self, name: str) -> bool:
        """Whether code of the user's that may run names something so."""
        return self._lookups.names(name)

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
                group = "parts" if where is part._modules else "hooks"
                self._seen.add(id(where))
                ordered, deep = is_a(where, dict), 0 if group == "parts" else depth
                self._place(f"the {group} of {what}", where, where.items(), deep, ordered=ordered, of_part=True)

    def _place(
        self,
        what: str,
        where: Any,
        items: Iterable[tuple[Any, Any]],
        depth: int,
        *,
        whole: bool = True,
        ordered: bool = False,
        of_part: bool = False,
    ) -> None:
        items = [*items] if of_part else [*islice(items, self._left + 1)]
        self._left -= 0 if of_part else len(items)
        if self._left < 0:
            more = f"with {what}, there are more than {ALL} things, all of which would be looked at before each replay"
            self.running = self.running or more
            return
        self.places.append(Place(what, where, [key for key, _ in items], whole, ordered))
        for key, value in items:
            if is_a(value, Tensor):
                self.tensors.append((what, where, key, value))
            elif type(value) is str:
                self._lookups.named(value)
            elif depth and not is_a(value, PLAIN) and (whole or not is_a(value, types.ModuleType)):
                self._waiting.append((f"{called(key)} of {what}", value, depth - 1))

    def _within(self, name: str, value: Any, depth: int) -> None:
        """Look into what is no tensor, and not plain."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if is_generator(value):
            self.generators.append(value)
            return
        kind = kind_of(value)
        if why := moving(value):
            self.running = self.running or f"{name} {why}"
            self.taken += [(name, value)] if is_taken(value) else []
        elif is_a(value, nn.Module):
            self._module(name, value, depth)
        elif is_a(value, (type, types.ModuleType)):
            self._lookups.space(value, made=is_a(value, type))
        elif is_a(value, FUNCTIONS):
            parts = PARTIAL if is_a(value, functools.partial) else METHOD
            self._waiting += [(name, getattr(value, part), depth) for part in parts if hasattr(value, part)]
            self._lookups.function(value)
        elif is_array(value):
            self._array(name, value)
        elif kind in (set, frozenset):
            self.sets += [(name, value)] if kind is set else []
            self._container(name, tuple(kind.__iter__(value)), depth)
        elif kind is not None:
            self._container(name, bare(value), depth)
        elif is_a(value, ContextVar):
            self.contexts.append((name, value))
            if (now := value.get(None)) is not None and not is_a(now, PLAIN):
                self._waiting.append((name, now, depth))
        elif is_a(value, types.MappingProxyType):
            if type(gc.get_referents(value)[0]) is dict:
                self._place(name, value, value.items(), depth)
        elif is_a(value, weakref.ref):
            self._waiting.append((name, value(), depth))
        elif is_cached(value):
            self._cached(name, value, depth)
        elif (within := inspect.getattr_static(value, "__wrapped__", None)) is not None:
            self._waiting.append((name, within, depth))
        if _is_own(value):
            self._attributes(name, value, depth)

    def _container(self, name: str, where: Any, depth: int) -> None:
        keyed = is_a(where.of if isinstance(where, Bare) else where, dict)
        items = where.items() if keyed else enumerate(where)
        # Of many things in a container, those that are plain are left out.
        some = items if len(where) <= MOST else ((key, value) for key, value in items if not _is_constant(value))
        self._place(name, where, some, depth, ordered=keyed)

    def _array(self, name: str, value: Any) -> None:
        """One that is looked at and put back; where it is only a view, that of which it is one."""
        owner = written_through(value)
        if owner is None:
            self.running = self.running or f"{name} is a read-only view of what cannot be put back"
        elif owner is value or id(owner) not in self._seen:
            self._seen.add(id(owner))
            self.arrays.append((name, owner))

    def _cached(self, name: str, function: Any, depth: int) -> None:
        """What a function remembers: of each call that it knows, but whether it knows more does not count."""
        by_key, within = kept(function)
        of_calls = f"what {name} remembers"
        self._place(of_calls, types.MappingProxyType(by_key), by_key.items(), depth, whole=False)
        self._place(of_calls, within, enumerate(within), depth)
        self._waiting.append((name, function.__wrapped__, depth))

    def _attributes(self, name: str, value: Any, depth: int) -> None:
        self._lookups.space(type(value))
        try:
            own = object.__getattribute__(value, "__dict__")  # with no method of the user's
        except AttributeError:
            own = value.__dict__ if is_a(value, threading.local) else None  # of this thread
        if own is not value and is_a(own, dict):
            where = bare(own)
            self._place(name, where, where.items(), depth)
        if slots := Slots.of(value):
            self._place(name, slots, slots.items(), depth)


def _is_constant(value: Any) -> bool:
    """Whether a value is plain, or a tuple of such."""
    return is_a(value, PLAIN) or (is_a(value, tuple) and all(map(_is_constant, tuple.__iter__(value))))


def _is_own(value: Any) -> bool:
    """Whether what an object holds may decide what a step computes: a config, a schedule; not a function, nor a library's."""
    if is_a(value, (nn.Module, type, types.ModuleType, *FUNCTIONS)):
        return False
    home = str(type(value).__module__)
    return home.partition(".")[0] not in OPAQUE or home.startswith(TORCH_S)
