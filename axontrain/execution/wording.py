"""Wording: how values, and the keys under which they lie, are called in a reason."""

from __future__ import annotations

from typing import Any

from torch import Tensor

LONG = 60  # letters


def shown(value: Any) -> str:
    """A value in few words.

    >>> shown([1, 2]), shown("a" * 100) == "'" + "a" * 59 + "..."
    ('[1, 2]', True)
    """
    try:
        return _short(repr(value))
    except Exception:  # of the user's
        return _short(object.__repr__(value))


def called(key: Any) -> str:
    """A key or a number, as what lies under it is called by it.

    >>> import torch
    >>> called("scale"), called(3), called(torch.zeros(2, 3))
    ('scale', '3', 'a tensor of shape (2, 3)')
    """
    if isinstance(key, Tensor):  # which would be waited for
        return f"a tensor of shape {tuple(key.shape)}"
    return _short(key) if type(key) is str else shown(key)


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}..."
