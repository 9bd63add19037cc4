"""Lookups: what the functions that a step may run find by name elsewhere than in the module.

That is global variables, what a function is closed over, its default arguments and own attributes, and attributes of classes
and of the user's Python modules. Which functions may run is found by name as well: a method that is named nowhere in what runs
is left out, as one that plots. Installed libraries are not looked into, nor are torch, axontrain, and what comes with Python.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

from axontrain.execution import lines
from axontrain.execution.views import Cells, OfClass

# By which a step begins; what it calls is named in these, and what torch calls is named here.
BEGIN = ("train_step", "predict", "loss", "split", "weight", "forward", "backward", "setup_context", "vmap", "jvp")
# Methods that Python calls when an object is made, and those that it calls on other occasions than in a step.
MAKING = frozenset({"__new__", "__init__", "__post_init__"})
ASIDE = frozenset({
    "__init_subclass__", "__class_getitem__", "__set_name__", "__del__", "__repr__", "__str__", "__sizeof__", "__dir__",
    "__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__annotate__",
})  # fmt: skip
# What Python's own instructions do, of several versions of it.
LOOKS = {
    "LOAD_GLOBAL": "global", "LOAD_NAME": "global", "STORE_GLOBAL": "global", "DELETE_GLOBAL": "global", "LOAD_DEREF": "cell",
    "IMPORT_NAME": "import",
}  # fmt: skip
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR", "IMPORT_FROM")
BETWEEN = ("CACHE", "PUSH_NULL", "COPY", "PRECALL", "EXTENDED_ARG")  # what may stand between a variable and its attribute


class Found(NamedTuple):
    """Where something is looked up: what it is called, the place, and the names that are looked up in it."""

    what: str
    where: Any
    names: list[str]


class Lookups:
    """What is looked up by the functions that it is given, and by all that these call by name.

    >>> factor, offset = 2.0, 1.0
    >>> def scaled(x):
    ...     return x * factor
    >>> lookups = Lookups()
    >>> lookups.function(scaled)
    >>> [(found.what, found.names) for found in lookups.more()]
    [('the global variables that scaled names', ['factor'])]
    """

    def __init__(self) -> None:
        self._names = set(BEGIN)  # of attributes and methods, as they are named in what may run
        self._spaces: dict[int, tuple[Any, bool]] = {}  # classes and modules; and whether objects are made of them
        self._functions: list[types.FunctionType] = []  # to be read
        self._known: dict[int, types.FunctionType] = {}
        self._taken: set[tuple[int, str]] = set()

    def function(self, value: Any) -> None:
        """One that may run, or what stands around one."""
        if isinstance(value, types.FunctionType) and id(value) not in self._known:
            self._known[id(value)] = value
            if _is_users_file(value.__code__.co_filename):
                self._functions.append(value)
        within = inspect.getattr_static(value, "__wrapped__", None)
        if isinstance(within, (types.MethodType, functools.partial)):
            within = getattr(within, "func" if isinstance(within, functools.partial) else "__func__")
        if within is not None and within is not value:
            self.function(within)

    def names(self, name: str) -> bool:
        """Whether code of the user's that may run names something so."""
        users = [function for function in self._known.values() if _is_users_file(function.__code__.co_filename)]
        return any(name in code.co_names for function in users for code in _within(function.__code__))

    def named(self, text: str) -> None:
        """A text that may be a name, as getattr takes: from a config."""
        self._names.update(_texts([text]))

    def space(self, space: Any, *, made: bool = False) -> None:
        """A class or a module, of which attributes and methods may be used; and of a class, whether objects are made."""
        if (id(space) not in self._spaces or made) and any(map(_is_users, getattr(space, "__mro__", (space,)))):
            self._spaces[id(space)] = space, made

    def more(self) -> list[Found]:
        """What is found in what was given since it was asked last."""
        found: list[Found] = []
        while True:
            while self._functions:
                found += self._of_function(self._functions.pop())
            many = len(self._spaces)
            for space, made in [*self._spaces.values()]:
                found += self._of_module(space) if isinstance(space, types.ModuleType) else self._of_class(space, made)
            if not self._functions and many == len(self._spaces):
                return found

    def _of_function(self, function: types.FunctionType) -> Iterator[Found]:
        space, cells, called = function.__globals__, Cells(function), function.__qualname__.rpartition("<locals>.")[2]
        closed = {name: value for name, value in cells.items() if name != "__class__"}  # which super() is closed over
        used: list[str] = []
        for code in _within(function.__code__):
            self._names.update(_texts(code.co_consts))  # as getattr takes
            for kind, name, attributes in _uses(code):
                value = {"global": space, "cell": closed}.get(kind, {}).get(name)
                if not isinstance(value, types.ModuleType) or _is_users(value):  # torch.log is no method log of the user's
                    self._names.update(attributes)
                if kind == "import":
                    self._imported(name, space)
                elif kind == "global" and name in space:
                    used.append(name)
                for attribute in attributes:
                    if not (_is_users_module(value) and attribute in vars(value)):
                        break
                    yield from self._new(f"the module {value.__name__}", vars(value), [attribute])
                    value = vars(value)[attribute]
                else:
                    if _is_users_module(value):  # it goes by another name from here on
                        self.space(value)
        yield from self._new(f"the global variables that {called} names", space, used)
        yield from self._new(f"the closure of {called}", cells, closed)
        for given in (function.__defaults__, function.__kwdefaults__):
            if given:
                self._names.update(_texts([*given.values()] if isinstance(given, dict) else given))
                yield Found(f"the defaults of {called}", given, [*given] if isinstance(given, dict) else [*range(len(given))])
        if own := [name for name in vars(function) if not name.startswith("__")]:
            yield Found(f"the function {called}", vars(function), own)

    def _of_class(self, kind: type, made: bool) -> Iterator[Found]:
        view, names = OfClass(kind), list[str]()
        for owner in kind.__mro__:
            if not _is_users(owner):
                continue
            for name, value in [*vars(owner).items()]:
                special = name.startswith("__") and name.endswith("__")
                if special and (name in ASIDE or (name in MAKING and not made)):
                    continue
                if not special and name not in self._names:
                    continue
                if isinstance(value, types.ModuleType):
                    self.space(value)
                elif hasattr(type(value), "__get__") and not isinstance(value, functools.partial):
                    if _is_users(type(value)) and hasattr(value, "__dict__"):  # a descriptor of the user's
                        self.space(type(value))
                        yield Found(f"{name} of the class {kind.__name__}", vars(value), [*vars(value)])
                    for part in (value, *(getattr(value, part, None) for part in ("__func__", "fget", "fset", "func"))):
                        self.function(part)
                elif not special and not issubclass(owner, enum.Enum) and view.origins[name] is owner:
                    names.append(name)
        yield from self._new(f"the class {kind.__name__}", view, names, of=kind)

    def _of_module(self, module: types.ModuleType) -> Iterator[Found]:
        names = [name for name in self._names if name in vars(module)]
        for name in names:
            if isinstance(vars(module)[name], types.ModuleType):
                self.space(vars(module)[name])
        yield from self._new(f"the module {module.__name__}", vars(module), names)

    def _imported(self, name: str, space: dict[str, Any]) -> None:
        """A module, or one of a package, that is imported within a function, whose attributes are named in it."""
        with contextlib.suppress(ImportError):  # of a relative name where there is no package
            base = importlib.util.resolve_name(name, str(space.get("__package__") or ""))
            for path in (base, *(f"{base}.{part}" for part in self._names)):
                if isinstance(module := sys.modules.get(path), types.ModuleType):
                    self.space(module)

    def _new(self, what: str, where: Any, names: Iterable[str], *, of: Any = None) -> Iterator[Found]:
        """Those names that were not found before."""
        place = id(where if of is None else of)
        if new := [name for name in dict.fromkeys(names) if (place, name) not in self._taken]:
            self._taken.update((place, name) for name in new)
            yield Found(what, where, new)


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Texts that may be names, also of tuples of them."""
    for one in values:
        if isinstance(one, str) and one.isidentifier():
            yield one
        elif isinstance(one, (tuple, frozenset)):
            yield from _texts(one)


def _within(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions written within it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _within(one)


def _uses(code: types.CodeType) -> Iterator[tuple[str, str, list[str]]]:
    """Which variables are looked up elsewhere, each with the attributes that are looked up in it in turn; and imports.

    Gives the kind, "global", "cell", "import", or "" of what is none of them, its name, and those of its attributes.
    """
    last: tuple[str, str, list[str]] = "", "", []
    level, given = 0, 0  # of an import, by how many packages up it begins; it is given before the names
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            level, given = given, one.argval if isinstance(one.argval, int) else 0
        if one.opname in ATTRIBUTES:
            last[2].append(one.argval)
        elif one.opname not in BETWEEN:
            yield last
            kind, name = LOOKS.get(one.opname, ""), str(one.argval)
            last = kind, "." * level + name if kind == "import" else name, []
    yield last


@functools.lru_cache(maxsize=1024)
def _is_users_file(path: str) -> bool:
    return lines.is_users(path)


def _is_users_module(value: Any) -> TypeGuard[types.ModuleType]:
    return isinstance(value, types.ModuleType) and _is_users(value)


def _is_users(space: Any) -> bool:
    """Whether a class or a module is written in one of the user's files, or typed in."""
    name = space.__name__ if isinstance(space, types.ModuleType) else space.__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    return name == "__main__" if file is None else _is_users_file(file)
