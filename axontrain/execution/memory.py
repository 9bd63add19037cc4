"""Memory: the most that was in use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


def peak(device: torch.device) -> int | None:
    """The most memory so far, in bytes: on a CUDA device what tensors took of it, elsewhere what the process had resident.

    None where the system does not tell.

    >>> 2**20 < peak(torch.device("cpu")) < 2**60
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, Linux and the BSDs kilobytes


@contextlib.contextmanager
def unseen(device: torch.device) -> Iterator[None]:
    """What the block takes of a CUDA device is not in its peak afterwards: that begins anew, if the block has raised it."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.max_memory_allocated(device)
    try:
        yield
    finally:
        if torch.cuda.max_memory_allocated(device) > before:
            torch.cuda.reset_peak_memory_stats(device)
