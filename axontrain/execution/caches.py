"""Caches: what functions keep that remember what they gave, ``functools.cache`` and ``lru_cache``."""

from __future__ import annotations

import functools
import gc
from typing import Any

from axontrain.execution.views import is_a

KIND = type(functools.lru_cache(int))  # which has no name of its own
LINK = "_lru_list_elem"  # around what is kept where there is an end to how much is


def is_cached(value: Any) -> bool:
    """Whether a value is a function that remembers what it gave."""
    return is_a(value, KIND)


def kept(function: Any) -> tuple[dict[Any, Any], tuple[Any, ...]]:
    """What such a function keeps: by what it was given, not to be written to; and, if links stand there, what lies in these.

    >>> @functools.cache
    ... def table(size):
    ...     return [0] * size
    >>> table(2), kept(table)
    ([0, 0], ({2: [0, 0]}, ()))
    """
    found = [one for one in gc.get_referents(function) if one is not vars(function)]
    by_key = [one for one in found if type(one) is dict]
    for one in by_key:
        if one and all(type(value).__name__ == LINK for value in one.values()):
            within = (value for value in found if value is not one and value is not function.__wrapped__)
            return one, tuple(value for value in within if not isinstance(value, type))
    return (by_key[0] if by_key else {}), ()
