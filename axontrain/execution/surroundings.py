"""Surroundings: what code of a module may change in Python, in the module and around it: put back, so that a trial leaves none.

That is what a walk finds (:mod:`axontrain.execution.contents`): attributes and what lies in them, and what functions look up
elsewhere: global variables, closures, default arguments, attributes of classes, variables of threads and of contexts; and the
environment. Moved on all the same are clocks, files, what installed libraries and cached methods keep, iterators and queues,
large NumPy arrays, and what lies deeper or is more than the walk goes through.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from axontrain.execution.arrays import content_of, put_into
from axontrain.execution.contents import MOST, PLAIN, Contents, Place
from axontrain.execution.refilling import refill
from axontrain.execution.views import MISSING, held, peek
from axontrain.execution.wording import called, shown
from axontrain.guard import is_dense

WALKS = 5  # at most


class Surroundings:
    """What there was when it was made. Of tensors and generators it says which there are, and no more.

    >>> module = nn.Dropout(0.5)
    >>> before = Surroundings(module)
    >>> module.p = 0.1
    >>> [*before.changes()]
    ['p of Dropout was 0.5, and is 0.1']
    >>> before.put_back()
    >>> module.p
    0.5
    """

    def __init__(self, module: nn.Module) -> None:
        found = self.contents = _walked(module)
        self._named = [(place.what, place.where, len(place.where)) for place in found.places if place.whole]
        self._keyed = [(one.what, one.where) for one in found.places if one.ordered and 1 < len(one.where) <= MOST]
        self._orders = [[*where] for _, where in self._keyed]
        # To be put back; what of a place is not all that it holds is put back key by key.
        self._before = [(place, held(place.where) if place.whole else None, _values(place)) for place in found.places]
        self._sets = [(one, set(one)) for _, one in found.sets]
        self._arrays = [(array, content_of(array), copy.copy(array)) for _, array in found.arrays]
        self._contexts = [(name, one, one.get(MISSING)) for name, one in found.contexts]
        self._environment = dict(os.environ)
        self._known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def kept(self) -> dict[str, Tensor]:
        """The tensors that are neither parameters nor buffers, by name, of those that can be written to."""
        others: dict[int, tuple[str, Tensor]] = {}
        for what, _, key, tensor in self.contents.tensors:
            if id(tensor) not in self._known and not tensor.is_meta and is_dense(tensor):
                others.setdefault(id(tensor), (f"the tensor of {called(key)} of {what}", tensor))
        named: dict[str, Tensor] = {}
        for name, tensor in others.values():
            named[f"{name} ({len(named)})" if name in named else name] = tensor  # as of two functions of one name
        return named

    def changes(self) -> Iterator[str]:
        """What is another now, in words."""
        for what, how in self.changed():
            yield f"{what} {how}"

    def changed(self) -> Iterator[tuple[str, str]]:
        """What is another now, and how."""
        for place, _, values in self._before:
            for key, before in zip(place.keys, values, strict=True):
                if why := _difference(peek(place.where, key), before):
                    yield f"{called(key)} of {place.what}", why
        for what, where, size in self._named:
            if len(where) != size:
                of_part = what.startswith("the ")
                yield what, "are others" if of_part else f"holds {len(where)} things, and held {size}"
        for (what, where), before in zip(self._keyed, self._orders, strict=True):
            keys = [*where]
            if len(keys) != len(before) or not all(map(_same, keys, before)):  # of tensors == has no one answer
                yield what, "are in another order" if what.startswith("the ") else "has another order"
        for (name, one), (_, before) in zip(self.contents.sets, self._sets, strict=True):
            if one != before:
                yield name, f"was {shown(before)}, and is {shown(one)}"
        for (name, array), (_, before, _) in zip(self.contents.arrays, self._arrays, strict=True):
            if content_of(array) != before:
                yield name, "is another array"
        for name, variable, before in self._contexts:
            if why := _difference(variable.get(MISSING), before):
                yield name, why
        for key in sorted({*self._environment, *os.environ}):
            if os.environ.get(key) != self._environment.get(key):
                yield f"the environment's {key}", "is another text"

    def put_back(self) -> None:
        """Make it again what it was, by the same objects; tensors aside that were written to.

        Raises:
            Exception: of what cannot be put back, once all else is.
        """
        with contextlib.ExitStack() as every:  # none of them, nor Ctrl-C, keeps the others from it
            for place, content, values in self._before:
                if content is not None:
                    every.callback(refill, place.where, content)
                elif place.changes:
                    for key, before in zip(place.keys, values, strict=True):
                        every.callback(_put, place.where, key, before)
            for one, members in self._sets:
                every.callback(refill, one, [*members])
            for array, before, copied in self._arrays:
                every.callback(put_into, array, before, copied)
            for _, variable, value in self._contexts:
                if value is not MISSING and variable.get(MISSING) is not value:
                    every.callback(variable.set, value)
            if dict(os.environ) != self._environment:
                every.callback(os.environ.update, self._environment)
                for key in {*os.environ} - {*self._environment}:
                    every.callback(os.environ.pop, key, None)


def _walked(module: nn.Module) -> Contents:
    """What is found; once more, where another thread of the user's has changed the size of something meanwhile."""
    for _ in range(WALKS - 1):
        with contextlib.suppress(RuntimeError):
            return Contents(module)
    return Contents(module)


def alike(now: Any, before: Any) -> bool:
    """Whether a value is the same as before, or one that cannot be told from it.

    >>> alike([2, (0.0,)], [2, (0.0,)]), alike(2, 2.0), alike(0.0, -0.0), alike([2], [2.0])
    (True, False, False, False)
    """
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, PLAIN):
        return repr(now) == repr(before)
    if type(now) is dict:
        return len(now) == len(before) and all(map(alike, chain(*now.items()), chain(*before.items())))
    if isinstance(now, tuple) or type(now) in (list, deque):
        return len(now) == len(before) and all(map(alike, now, before))
    return type(now) in (set, frozenset) and bool(now == before)


def _values(place: Place) -> list[Any]:
    return [place.where[key] for key in place.keys]


def _put(where: Any, key: Any, before: Any) -> None:
    if peek(where, key) is not before:
        where[key] = before


def _difference(now: Any, before: Any) -> str:
    """How a value is another than before, in words; "" if it cannot be told from it."""
    if now is MISSING:
        return "is gone"
    if isinstance(before, Tensor):
        return "" if now is before else "was given another tensor"
    if _same(now, before):
        return ""
    was, is_now = shown(before), shown(now)
    return "is another object" if was == is_now else f"was {was}, and is {is_now}"


def _same(a: Any, b: Any) -> bool:
    try:
        return alike(a, b)
    except Exception:  # of the user's
        return False
