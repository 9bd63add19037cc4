"""Views: what holds things and is no mapping, looked at as one; and what a container of whatever class holds, put back."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict, deque
from collections.abc import Iterable
from operator import is_
from typing import Any

# Which class's methods are used of a container: those of its own may count, or refuse.
KINDS = (OrderedDict, dict, list, deque, set)


class Slots:
    """The attributes of an object that has ``__slots__``."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        self.owner, self.names = owner, tuple(names)

    @classmethod
    def of(cls, value: Any) -> Slots | None:
        """None of an object that has none."""
        kinds = [vars(kind) for kind in type(value).__mro__ if "__slots__" in vars(kind)]
        # By the names under which they lie: those that begin with two underscores are changed by Python.
        names = [name for own in kinds for name, one in own.items() if isinstance(one, types.MemberDescriptorType)]
        return cls(value, names) if names else None

    def items(self) -> list[tuple[str, Any]]:
        """Those that are set."""
        return [(name, getattr(self.owner, name)) for name in self.names if hasattr(self.owner, name)]

    def __len__(self) -> int:
        return sum(hasattr(self.owner, name) for name in self.names)

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.owner, name)


class Cells:
    """The variables that a function is closed over."""

    def __init__(self, function: types.FunctionType) -> None:
        self.cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def items(self) -> list[tuple[str, Any]]:
        """Those that have a value."""
        found = []
        for name, cell in self.cells.items():
            with contextlib.suppress(ValueError):  # of one that has none
                found.append((name, cell.cell_contents))
        return found

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cells[name].cell_contents
        except ValueError:  # it has none
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        self.cells[name].cell_contents = value


class OfClass:
    """The attributes of a class, its bases' too."""

    def __init__(self, kind: type) -> None:
        self.owner = kind
        # Where each lies: what is set meanwhile on a class that comes before does not belong there.
        self.origins = {name: one for one in reversed(kind.__mro__) for name in vars(one)}

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        kinds, origin = self.owner.__mro__, self.origins[name]
        for kind in kinds[: kinds.index(origin)]:
            if name in vars(kind):
                delattr(kind, name)
        if vars(origin).get(name) is not value:
            setattr(origin, name, value)


def held(where: Any) -> list[Any] | None:
    """What a container holds, in its order: pairs, of a mapping; None of what is put back key by key.

    >>> held({1: "a"}), held([2]), held({3}), held((4,))
    ([(1, 'a')], [2], [3], None)
    """
    if isinstance(where, Slots):
        return where.items()
    base: Any = next((kind for kind in KINDS if isinstance(where, kind)), None)
    if base is None:
        return None
    return [*(base.items(where) if issubclass(base, dict) else base.__iter__(where))]


def refill(where: Any, items: list[Any]) -> None:
    """Have a container hold what :func:`held` found, if it does not.

    >>> from collections import Counter
    >>> counts = Counter("aab")
    >>> before = held(counts)
    >>> counts.update("abc")
    >>> refill(counts, before)
    >>> counts
    Counter({'a': 2, 'b': 1})
    """
    now = held(where) or []
    pairs = isinstance(where, (dict, Slots))
    if len(now) == len(items) and all(map(_are, now, items) if pairs else map(is_, now, items)):
        return
    if isinstance(where, Slots):
        for name in where.names:
            if hasattr(where.owner, name):
                del where[name]
        for name, value in items:
            where[name] = value
    elif isinstance(where, OrderedDict):
        OrderedDict.clear(where)
        for key, value in items:
            OrderedDict.__setitem__(where, key, value)
    elif isinstance(where, dict):
        dict.clear(where)
        dict.update(where, items)
    elif isinstance(where, list):
        list.__setitem__(where, slice(None), items)
    elif isinstance(where, deque):
        deque.clear(where)
        deque.extend(where, items)
    elif isinstance(where, set):
        set.clear(where)
        set.update(where, items)


def _are(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    return a[0] is b[0] and a[1] is b[1]
