"""Refilling: a container made to hold again what it held, by which it is never empty meanwhile, nor without what is to stay.

Another thread may read it at that time, and Ctrl-C may come in between.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import islice
from operator import is_
from typing import Any

from axontrain.execution.views import MISSING, Bare, Slots, held, kind_of


def refill(where: Any, items: list[Any]) -> None:
    """Have a container hold what :func:`~axontrain.execution.views.held` found, if it does not.

    >>> from collections import Counter
    >>> counts = Counter("aab")
    >>> before = held(counts)
    >>> counts.update("abc")
    >>> refill(counts, before)
    >>> counts
    Counter({'a': 2, 'b': 1})
    """
    where = where.of if isinstance(where, Bare) else where
    if isinstance(where, Slots):
        _refill_slots(where, items)
        return
    kind = kind_of(where)
    if issubclass(kind, dict):
        _refill_dict(kind, where, items)
        return
    now = held(where) or []
    if len(now) == len(items) and all(map(is_, now, items)):
        return
    if kind is set:
        set.update(where, items)
        set.difference_update(where, set(now).difference(items))
    elif kind is list:
        list.__setitem__(where, slice(None), items)
    elif kind is deque:
        deque.extend(where, items)  # which drops from the left what there is no room for
        for _ in range(deque.__len__(where) - len(items)):
            deque.popleft(where)


def _refill_slots(where: Slots, items: list[tuple[str, Any]]) -> None:
    now, before = dict(where.items()), dict(items)
    for name, value in items:
        if now.get(name, MISSING) is not value:
            where[name] = value
    for name in now:
        if name not in before:
            del where[name]


def _refill_dict(kind: Any, where: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    for key, value in items:
        if dict.get(where, key, MISSING) is not value:
            kind.__setitem__(where, key, value)
    if dict.__len__(where) != len(items):
        before = dict(items)
        for key in [*kind.__iter__(where)]:
            if key not in before:
                kind.__delitem__(where, key)
    same = 0  # how many of the first are in their places
    for now, (key, _) in zip(kind.__iter__(where), items, strict=False):
        if now is not key:
            break
        same += 1
    for key, value in islice(items, same, None):
        if kind is OrderedDict:
            OrderedDict.move_to_end(where, key)  # type: ignore[arg-type]
        else:  # for a moment this one is gone
            dict.pop(where, key)
            dict.__setitem__(where, key, value)
