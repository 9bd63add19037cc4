"""Assumptions: what a recorded step takes for given, since Python does not run in it again: looked at before each replay.

It is all that the module, its parts and the objects in them hold: numbers and texts by what they are; what is no tensor and no
container by which object it is; tensors by that, by where they lie, and by shape. What Python looks up elsewhere, as in global
variables or in a class, is not seen. What there is of the optimizers is in :mod:`axontrain.execution.rates`.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
DEPTH = 4  # of objects and containers in one another
MOST = 256  # things that a container holds, to be looked at one by one
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARTS = ("_modules", *HOOKS)
# What torch keeps in each module: of that its parts, its hooks and its mode are looked at, and tensors apart.
TORCHS = frozenset(vars(nn.Module())) - {"training", *PARTS}
# Of which objects nothing that they hold decides what a step computes: they are what they are.
OPAQUE = ("torch", "axontrain", "numpy", "builtins", "functools", "collections", "threading", "logging", "torchmetrics")

Place = dict[str, Any]


class Assumptions:
    """What was given when it was made.

    >>> module = nn.Dropout(0.5)
    >>> given = Assumptions(module)
    >>> given.hold(), given.broken()
    (True, '')
    >>> module.p = 0.1
    >>> given.hold(), given.broken()
    (False, 'p of Dropout was 0.5, and is 0.1')
    """

    def __init__(self, module: nn.Module) -> None:
        self._named: list[tuple[str, Any, list[Any]]] = []  # mappings and lists, and the keys that are looked at
        self._tensors: list[tuple[str, Any, Any, Tensor]] = []  # in which of them, under which key
        self._seen: set[int] = set()
        self._take_module("", module, DEPTH)
        self._places = [place for _, place, _ in self._named]
        self._sizes = [*map(len, self._places)]
        self._looks = [(itemgetter(*keys), place) for _, place, keys in self._named if keys]
        self._expected = [_own(look(place)) for look, place in self._looks]
        self._objects = [tensor for *_, tensor in self._tensors]
        device = next((p.device for p in module.parameters()), None)
        self._apart = device is not None and device.type != "cpu"  # from the host
        self._where = self._now()

    def _take_module(self, within: str, module: nn.Module, depth: int) -> None:
        for name, part in module.named_modules():
            what = ".".join(filter(None, (within, name)))
            what = f"{what} ({type(part).__name__})" if what else type(part).__name__
            own = {key: value for key, value in vars(part).items() if key not in TORCHS}
            self._take(what, vars(part), own.items(), depth)
            for place in (part._parameters, part._buffers):
                self._take(what, place, place.items(), depth)

    def _take(self, what: str, place: Any, items: Iterable[tuple[Any, Any]], depth: int) -> None:
        """Take in a mapping or a list, and what it holds."""
        if id(place) in self._seen:
            return
        self._seen.add(id(place))
        items = list(items)
        self._tensors += [(what, place, key, value) for key, value in items if isinstance(value, Tensor)]
        keys = [key for key, value in items if not isinstance(value, Tensor)]
        # Of one alone an itemgetter gives no tuple, and a tuple is compared by what its items are.
        self._named.append((what, place, keys * 2 if len(keys) == 1 else keys))
        for key, value in items if depth else ():
            name = f"{key} of {what}"
            if isinstance(value, PLAIN) or key in PARTS:
                continue
            if isinstance(value, dict) and len(value) <= MOST:
                self._take(name, value, value.items(), depth - 1)
            elif isinstance(value, (list, tuple)) and len(value) <= MOST:
                self._take(name, value, enumerate(value), depth - 1)
            elif isinstance(value, nn.Module):  # which is none of its parts
                self._take_module(str(key), value, depth - 1)
            elif _is_own(value):
                self._take(name, vars(value), vars(value).items(), depth - 1)

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        try:
            return (
                [*map(len, self._places)] == self._sizes
                and [look(place) for look, place in self._looks] == self._expected
                and all(map(is_, [place[key] for _, place, key, _ in self._tensors], self._objects))
                and self._now() == self._where
            )
        except (LookupError, RuntimeError, ValueError):  # one is gone; or arrays were compared, which are no truth
            return False

    def broken(self) -> str:
        """What of it is another now, in words; "" if nothing is, or it has no name."""
        named = [one for one in self._named if one[2]]
        for (what, place, keys), expected in zip(named, self._expected, strict=True):
            for key, before in zip(keys, expected, strict=True):
                try:
                    now = place[key]
                except LookupError:
                    return f"{key} of {what} is gone"
                if _same(now, before):
                    continue
                if key in PARTS:
                    return f"the {'parts' if key == '_modules' else 'hooks'} of {what} are others"
                return f"{key} of {what} was {shown(before)}, and is {shown(now)}"
        for (what, place, _), size in zip(self._named, self._sizes, strict=True):
            if len(place) != size:
                return f"{what} holds {len(place)} things, and held {size}"
        for (what, place, key, before), where in zip(self._tensors, self._where, strict=False):
            try:
                now = place[key]
            except LookupError:
                return f"{key} of {what} is gone"
            if now is not before:
                return f"{key} of {what} was given another tensor"
            if (now.data_ptr(), now.shape, now.stride(), now.requires_grad) != where:
                return f"{key} of {what} lies elsewhere, has another shape, or is trained or frozen otherwise"
        return "" if self._now() == self._where else "a tensor on the host is another"

    def put_back(self) -> None:
        """Make it again what it was, tensors aside that were written to."""
        named = [one for one in self._named if one[2]]
        for (_, place, keys), expected in reversed([*zip(named, self._expected, strict=True)]):  # what lies within comes first
            for key, before in zip(keys, expected, strict=True):
                if not isinstance(place, tuple) and key not in PARTS and not _has(place, key, before):
                    place[key] = before
        for _, place, key, tensor in self._tensors:
            if not isinstance(place, tuple) and not _has(place, key, tensor):
                place[key] = tensor

    def _now(self) -> list[Any]:
        places: list[Any] = [(one.data_ptr(), one.shape, one.stride(), one.requires_grad) for one in self._objects]
        if self._apart:  # what is done on the host is not recorded: of its tensors, how often they were changed
            places += [tensor._version for tensor in self._objects if tensor.device.type == "cpu"]
        return places


def hooked(module: nn.Module) -> str:
    """Which part of a module has hooks that Python calls; "" if none has."""
    for name, part in module.named_modules():
        if any(getattr(part, hooks) for hooks in HOOKS):
            return f"{name} ({type(part).__name__})" if name else type(part).__name__
    return ""


def is_plain(value: Any) -> bool:
    """Whether a value means nothing beside what it is equal to."""
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(map(is_plain, value)))


def shown(value: Any) -> str:
    """A value in few words."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_own(value: Any) -> bool:
    """Whether what an object holds may decide what a step computes: a config, a schedule; not a function, nor a library's."""
    functions = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
    known = isinstance(value, functions) or type(value).__module__.partition(".")[0] in OPAQUE
    return hasattr(value, "__dict__") and not known


def _own(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, with hooks, parts and sets in a copy, since they would be compared with themselves."""
    return tuple(value.copy() if isinstance(value, (dict, list, set)) else value for value in values)


def _has(place: Any, key: Any, value: Any) -> bool:
    try:
        return _same(place[key], value)
    except LookupError:
        return False


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return not isinstance(a, Tensor) and bool(a == b)
    except (RuntimeError, ValueError):
        return False
