"""Arrays, NumPy's and Python's, so small that they are looked at: in whose memory they lie, and what is in them, put back."""

from __future__ import annotations

import array
import sys
from typing import Any

from axontrain.execution.views import is_a

SMALL = 2**16  # bytes of an array, to be looked at


def is_array(value: Any) -> bool:
    """Whether a value is an array, or bytes, so small that they are looked at."""
    if is_numpy(value):
        return bool(value.nbytes <= SMALL)
    return is_a(value, (bytearray, array.array)) and len(memoryview(value).cast("B")) <= SMALL


def is_numpy(value: Any) -> bool:
    """Whether a value is an array of NumPy's, which is not imported for that."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and is_a(value, numpy.ndarray)


def written_through(value: Any) -> Any:
    """The array by which what is in an array can be written: itself, or what a read-only view is of; None if there is none.

    >>> import numpy as np
    >>> base = np.zeros(3)
    >>> written_through(np.broadcast_to(base, (2, 3))) is base
    True
    """
    if not is_numpy(value) or value.flags.writeable:
        return value
    owner = value
    while (base := getattr(owner, "base", None)) is not None:
        owner = base
    if isinstance(owner, bytes):  # which never change
        return value
    return owner if is_numpy(owner) and is_array(owner) and type(owner) is sys.modules["numpy"].ndarray else None


def content_of(value: Any) -> bytes:
    """What is in an array."""
    return bytes(value) if isinstance(value, bytearray) else value.tobytes()


def put_into(value: Any, before: bytes, copied: Any) -> None:
    """Make what is in an array again what it was, if it is not; of one that owns its memory, be it read-only."""
    if content_of(value) == before:
        return
    if not is_numpy(value):
        value[:] = copied
        return
    if value.shape != copied.shape:  # NumPy's own method has changed it
        value.resize(copied.shape, refcheck=False)
    was = value.flags.writeable
    value.flags.writeable = True
    value[...] = copied
    value.flags.writeable = was
