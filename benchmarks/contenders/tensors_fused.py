"""By hand over tensors, with torch's fused optimizer."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.contenders import tensors
from benchmarks.workloads import Job


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the same loop with the other optimizer."""
    return tensors.prepare(job, fused=True)
