"""Snapshot: a state's tensors copied into one piece of memory, which is kept from save to save.

What costs most of a copy is new memory: the system hands it out page by page. So the memory is asked for once, in large pages,
and a later copy of a gigabyte takes a tenth of a second. A fork alone would be a snapshot too, but every page that training
changes afterwards would be copied by a fault of its own, which took ten times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from axontrain.host import copied

ALIGNMENT = 64
LARGE = 2**20  # the fork may keep what is smaller
DONTFORK, DOFORK, POPULATE_WRITE = 10, 11, 23  # of Linux: see madvise(2)


class Snapshot:
    """Memory for one copy of a state; a second one replaces the first.

    >>> snapshot = Snapshot()
    >>> weights = torch.ones(3)
    >>> taken = snapshot.take({"weights": weights})
    >>> weights.zero_(), taken
    (tensor([0., 0., 0.]), {'weights': tensor([1., 1., 1.])})
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._asking: threading.Thread | None = None

    def reserve(self, size: int) -> None:
        """Ask for memory beforehand, beside the training: a gigabyte may take a second."""
        if size > len(self._memory):
            self._memory = _large_pages(size)
            self._asking = threading.Thread(
                target=_advise, args=([(self._memory.data_ptr(), size)], POPULATE_WRITE), name="axontrain-reserve", daemon=True
            )
            self._asking.start()

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors of any device here; what is returned is true until the next call."""
        if self._asking is not None:
            self._asking.join()
            self._asking = None
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = end
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if end > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # before as much again is asked for
            self._memory = _large_pages(end)
        taken = {}
        for name, tensor in tensors.items():
            if not tensor.nbytes:
                taken[name] = torch.empty_like(tensor, device="cpu")
                continue
            place = self._memory[places[name] : places[name] + tensor.nbytes]
            taken[name] = place.view(tensor.dtype).view(tensor.shape)
        copied((taken[name], tensor) for name, tensor in tensors.items() if tensor.nbytes)
        return taken


@contextlib.contextmanager
def kept_from_forks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Processes forked within the block do not get the memory of these tensors, so that nothing of it is copied for them."""
    pages = list(_pages(tensors))
    _advise(pages, DONTFORK)
    try:
        yield
    finally:
        _advise(pages, DOFORK)


def _advise(pages: Iterable[tuple[int, int]], advice: int) -> None:
    # ctypes lets other threads run meanwhile. Advice that a kernel does not know is not taken, and nothing is lost by it.
    madvise = ctypes.CDLL(None).madvise
    for start, length in pages:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _large_pages(size: int) -> Tensor:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """The whole pages within the memory of each large tensor: what it shares with others stays out."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes >= LARGE and tensor.is_contiguous():
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                yield start, end - start
