"""Assumptions: what a recorded step takes for given, since Python does not run in it again: looked at before each replay.

It is the attributes of the module and of its parts (numbers, texts, and containers of them; those of dataclasses and namespaces
in it, too), its hooks, its parts, and where its parameters and buffers lie. What Python looks up elsewhere, as in global
variables, is not seen. Those of the optimizers are in :mod:`axontrain.execution.rates`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)
MOST = 1000  # values that a container may have, to be compared each step
# Of every module: its parts, and the hooks on it.
PARTS = (
    "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


# What else torch keeps in each, as what is done when states are saved.
TORCHS = frozenset(vars(nn.Module())) - {"training", *PARTS}


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
        named = ((what, attributes, _names(attributes)) for what, attributes in _attributes(module))
        self._named = [one for one in named if one[2]]
        self._looks = [(itemgetter(*names), attributes) for _, attributes, names in self._named]
        self._expected = [_kept(look(attributes)) for look, attributes in self._looks]
        self._places = [
            place for part in module.modules() for place in (part._parameters, part._buffers) if place
        ]  # dicts that modules go on using
        found = [
            (what, attributes, name, value)
            for what, attributes in _attributes(module)
            for name, value in attributes.items()
            if isinstance(value, Tensor)
        ]
        self._owners = [what for what, *_ in found]
        self._kept = [(attributes, name, value) for _, attributes, name, value in found]
        device = next((p.device for p in module.parameters()), None)
        self._apart = device is not None and device.type != "cpu"  # from the host
        self._tensors = self._where()

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        try:
            return [look(attributes) for look, attributes in self._looks] == self._expected and self._where() == self._tensors
        except (KeyError, RuntimeError):  # one is gone; or two tensors were compared
            return False

    def broken(self) -> str:
        """What of it is another now, in words; "" if nothing is, or it has no name."""
        for (what, attributes, names), expected in zip(self._named, self._expected, strict=True):
            for name, before in zip(names, expected, strict=True):
                if name not in attributes:
                    return f"{name} of {what} is gone"
                if attributes[name] != before and name in PARTS:
                    return f"the {'parts' if name == '_modules' else 'hooks'} of {what} are others"
                if attributes[name] != before:
                    return f"{name} of {what} was {shown(before)}, and is {shown(attributes[name])}"
        for (attributes, name, before), what in zip(self._kept, self._owners, strict=True):
            if attributes.get(name) is not before:
                return f"{name} of {what} was given another tensor"
        if self._where() != self._tensors:
            return "a parameter or buffer lies elsewhere, or is trained or frozen otherwise"
        return ""

    def put_back(self) -> None:
        """Make the attributes again what they were."""
        for (_, attributes, names), expected in zip(self._named, self._expected, strict=True):
            for name, before in zip(names, expected, strict=True):
                if name not in PARTS and (name not in attributes or attributes[name] != before):
                    attributes[name] = _copied(before)
        for attributes, name, value in self._kept:
            attributes[name] = value

    def _where(self) -> list[Any]:
        found = [tensor for place in self._places for tensor in place.values() if tensor is not None]
        if self._kept:
            found += [tensor for attributes, name, _ in self._kept if isinstance(tensor := attributes.get(name), Tensor)]
        places: list[Any] = [(tensor.data_ptr(), tensor.requires_grad) for tensor in found]
        if self._apart:  # what is done on the host is not recorded: of its tensors, how often they were changed
            places += [tensor._version for tensor in found if tensor.device.type == "cpu"]
        return places


def _attributes(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The attributes of a module, of its parts, and of plain objects in them."""
    for name, part in module.named_modules():
        what = f"{name} ({type(part).__name__})" if name else type(part).__name__
        yield what, vars(part)
        for key, value in vars(part).items():
            record = dataclasses.is_dataclass(value) and not isinstance(value, type)
            if (record and hasattr(value, "__dict__")) or isinstance(value, types.SimpleNamespace):
                yield f"{key} of {what}", vars(value)


def _names(attributes: dict[str, Any]) -> list[str]:
    names = [name for name, value in attributes.items() if name in PARTS or (name not in TORCHS and is_plain(value))]
    return names * 2 if len(names) == 1 else names  # of one alone an itemgetter gives no tuple


def is_plain(value: Any) -> bool:
    """Whether a value can be compared, and means nothing beside what it is equal to."""
    if isinstance(value, PLAIN):
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        return len(value) <= MOST and all(map(is_plain, value))
    return isinstance(value, dict) and len(value) <= MOST and all(map(is_plain, value.values()))


def _kept(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, with containers of their own, which nobody changes."""
    return tuple(_copied(value) for value in values)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(_copied, value))
    return value


def shown(value: Any) -> str:
    """A value in few words."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
