"""Moving: what is another each time, or lives in other threads too, so that no step with it can be done without Python."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from axontrain.execution.arrays import SMALL, is_numpy
from axontrain.execution.views import is_a

OURS = ("LoopState", "Loop", "Run", "Update", "History")  # which are others in each step
MOCKS = "unittest.mock"  # in which are all methods there are
# What other threads and processes use: put back after a trial, it would be taken from under them. By module and name, as
# none of them is imported for this. Locks alone are in much that is harmless.
SHARED = {
    "queue": ("Queue", "SimpleQueue"),
    "_queue": ("SimpleQueue",),
    "threading": ("Thread", "Condition", "Event", "Semaphore", "Barrier"),
    "concurrent.futures._base": ("Executor", "Future"),
    "asyncio.events": ("AbstractEventLoop",),
    "multiprocessing.connection": ("_ConnectionBase",),
    "multiprocessing.managers": ("BaseManager", "BaseProxy"),
    "multiprocessing.pool": ("Pool",),
    "multiprocessing.process": ("BaseProcess",),
    "multiprocessing.queues": ("Queue", "SimpleQueue"),
    "multiprocessing.synchronize": ("SemLock", "Condition", "Event", "Barrier"),
}


def moving(value: Any) -> str:
    """Why nothing that a step does with a value can be done without Python; "" of most.

    >>> import threading
    >>> moving(iter([])), moving(threading.Event()), moving([])
    ('is an iterator, which Python moves on', 'is an Event, which other threads use', '')
    """
    kind = type(value)
    if is_a(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
        return f"is the {kind.__name__}, whose steps Python counts"
    if str(kind.__module__).startswith("axontrain") and kind.__name__ in OURS:
        return f"is the {kind.__name__}, which is another in each step"
    modules = [str(one.__module__) for one in kind.__mro__]
    if any(one.__name__ in SHARED.get(module, ()) for one, module in zip(kind.__mro__, modules, strict=True)):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        return f"is {article} {kind.__name__}, which other threads use"
    if _is_iterator(value):
        return "is an iterator, which Python moves on"
    if is_numpy(value):
        if value.dtype.hasobject:
            return "is an array of objects, in which there may be anything"
        if kind.__name__ != "ndarray" and value.nbytes <= SMALL:
            return f"is an array of another class than NumPy's own, {kind.__name__}"
    return ""


def is_taken(value: Any) -> bool:
    """Whether what is got from a value is gone from it: of an iterator, or a queue.

    >>> is_taken(iter([])), is_taken([])
    (True, False)
    """
    return _is_iterator(value) or any(one.__name__ in ("Queue", "SimpleQueue") for one in type(value).__mro__)


def _is_iterator(value: Any) -> bool:
    kind = type(value)
    if not is_a(value, Iterator) or is_a(value, io.IOBase) or kind in weakref.ProxyTypes:
        return False
    return MOCKS not in [str(one.__module__) for one in kind.__mro__]
