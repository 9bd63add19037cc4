"""Views: what holds things and is no mapping, looked at as one; and containers of the user's, by none of their own methods."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from operator import itemgetter, methodcaller
from typing import Any

# Which class's methods are used of a container: those of its own may count, move, add what is missing, or refuse.
KINDS = (OrderedDict, dict, list, deque, tuple, set, frozenset)
READ = ("__getitem__", "__missing__", "__len__", "__iter__", "__bool__", "items")
MISSING = object()  # where there is nothing

Look = Callable[[], Iterable[Any]]


def is_a(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether a value is of a class, whatever it says itself: mocks and proxies give another class than theirs."""
    return issubclass(type(value), kinds)


def kind_of(where: Any) -> Any:
    """Which of Python's own containers a value is; None if it is none."""
    return next((kind for kind in KINDS if is_a(where, kind)), None)


class Slots:
    """The attributes of an object that has ``__slots__``; by their descriptors, as another class may use the names too."""

    def __init__(self, owner: Any, members: dict[str, types.MemberDescriptorType]) -> None:
        self.owner, self.members = owner, members

    @classmethod
    def of(cls, value: Any) -> Slots | None:
        """None of an object that has none."""
        members: dict[str, types.MemberDescriptorType] = {}
        for kind in type(value).__mro__:
            # By the names under which they lie: those that begin with two underscores are changed by Python.
            for name, one in vars(kind).items() if "__slots__" in vars(kind) else ():
                if isinstance(one, types.MemberDescriptorType):
                    members[f"{name} of {kind.__name__}" if name in members else name] = one
        return cls(value, members) if members else None

    def items(self) -> list[tuple[str, Any]]:
        """Those that are set."""
        return [(name, value) for name in self.members if (value := self._get(name)) is not MISSING]

    def looking(self, names: list[str]) -> Look:
        """How they are got at once."""
        return partial(map, methodcaller("__get__", self.owner), [self.members[name] for name in names])

    def _get(self, name: str) -> Any:
        try:
            return self[name]
        except AttributeError:  # it is not set
            return MISSING

    def __len__(self) -> int:
        return len(self.items())

    def __getitem__(self, name: str) -> Any:
        return self.members[name].__get__(self.owner)

    def __setitem__(self, name: str, value: Any) -> None:
        self.members[name].__set__(self.owner, value)

    def __delitem__(self, name: str) -> None:
        self.members[name].__delete__(self.owner)


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
    """The attributes of a class, its bases' too; whatever its metaclass does when they are got and set."""

    def __init__(self, kind: type) -> None:
        self.owner = kind
        # Where each lies: what is set meanwhile on a class that comes before does not belong there.
        self.origins = {name: one for one in reversed(kind.__mro__) for name in vars(one)}

    def looking(self, names: list[str]) -> Look:
        """How they are got at once."""
        return partial(map, type.__getattribute__, repeat(self.owner), names)

    def __getitem__(self, name: str) -> Any:
        return type.__getattribute__(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        kinds, origin = self.owner.__mro__, self.origins[name]
        for kind in kinds[: kinds.index(origin)]:
            if name in vars(kind):
                type.__delattr__(kind, name)
        if vars(origin).get(name) is not value:
            type.__setattr__(origin, name, value)


class Bare:
    """A container of a class that reads by methods of its own, looked at by those of Python's: nothing counts or is added."""

    def __init__(self, of: Any) -> None:
        self.of, self.kind = of, kind_of(of)

    def items(self) -> Iterable[tuple[Any, Any]]:
        """What lies in it, by keys or numbers."""
        items: Iterable[tuple[Any, Any]] = self.kind.items(self.of) if issubclass(self.kind, dict) else enumerate(self)
        return items

    def looking(self, keys: list[Any]) -> Look:
        """How what lies under some keys is got at once."""
        if issubclass(self.kind, dict):
            return partial(map, dict.get, repeat(self.of), keys, repeat(MISSING))
        return partial(map, self.kind.__getitem__, repeat(self.of), keys)

    def __len__(self) -> int:
        return int(self.kind.__len__(self.of))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.kind.__iter__(self.of))

    def __getitem__(self, key: Any) -> Any:
        if not issubclass(self.kind, dict):
            return self.kind.__getitem__(self.of, key)
        if (value := dict.get(self.of, key, MISSING)) is MISSING:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.kind.__setitem__(self.of, key, value)


def bare(where: Any) -> Any:
    """A container, to be looked at without a method of the user's: itself, if it has none.

    >>> from collections import defaultdict
    >>> counts = defaultdict(int, a=1)
    >>> "b" in dict(bare(counts).items()), peek(bare(counts), "b") is MISSING, dict(counts)
    (False, True, {'a': 1})
    """
    kind, own = kind_of(where), type(where)
    if own is kind or all(getattr(own, name, None) is getattr(kind, name, None) for name in READ):
        return where
    return Bare(where)


def looking(where: Any, keys: list[Any]) -> Look:
    """How what lies under some keys is got at once; it may fail where some are gone."""
    if isinstance(where, (Slots, OfClass, Bare)):
        return where.looking(keys)
    return partial(itemgetter(*keys * 2 if len(keys) == 1 else keys), where)  # of one key alone it gives no tuple


def peek(where: Any, key: Any) -> Any:
    """What lies under a key; ``MISSING`` where nothing does."""
    try:
        return where[key]
    except (LookupError, AttributeError):
        return MISSING


def held(where: Any) -> list[Any] | None:
    """What a container holds, in its order: pairs, of a mapping; None of what is put back key by key.

    >>> held({1: "a"}), held([2]), held({3}), held((4,))
    ([(1, 'a')], [2], [3], None)
    """
    if isinstance(where, Slots):
        return where.items()
    where = where.of if isinstance(where, Bare) else where
    kind = kind_of(where)
    if kind in (None, tuple, frozenset):
        return None
    return [*(kind.items(where) if issubclass(kind, dict) else kind.__iter__(where))]
