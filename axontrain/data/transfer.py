"""Transfer: batches copied to a GPU while it computes on the one before.

The copy runs on a stream of its own, from pinned memory. The compute stream waits for it by an event, and ``record_stream``
tells the allocator who uses the memory: without that it may be handed out again while a kernel still reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from axontrain.data.structure import mapped, tensors, to_device


def ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """The batches on a CUDA device, each copied while the one before it is computed on.

    One batch is read ahead; what its reading raises is raised in its turn.
    """
    side = _side_stream(device)
    following = _Copy(batches, device, side)
    while True:
        present = following
        if present.ended:
            return
        if present.error is not None:
            error, present.error = present.error, None
            try:
                raise error
            finally:
                del error  # or its traceback, which holds this frame, would be a cycle that keeps the workers
        batch = present.taken()
        following = _Copy(batches, device, side)
        yield batch


@functools.cache
def _side_stream(device: torch.device) -> Any:
    # One for all passes: the allocator keeps memory for each stream apart.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own


class _Copy:
    """A batch on its way."""

    def __init__(self, batches: Iterator[Any], device: torch.device, side: Any) -> None:
        self.error: Exception | None = None
        self.ended = False
        self.device = device
        try:
            batch = next(batches)
        except StopIteration:
            self.ended = True
            return
        except Exception as error:
            self.error = error
            return
        self.pinned = mapped(batch, _pinned)  # kept until the copy is taken
        if any(tensor.is_cuda for tensor in tensors(batch)):  # made on the device itself: that has to be done first
            side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.moved = to_device(self.pinned, device)
            self.done = side.record_event()

    def taken(self) -> Any:
        """The batch, safe to compute on in the current stream."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        for tensor in tensors(self.moved):
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return self.moved


def _pinned(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and not leaf.is_pinned():
        return leaf.pin_memory()
    return leaf
