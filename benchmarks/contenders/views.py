"""By hand over tensors: the whole epoch permuted once, then cut into views. Fast, at the price of a second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks.contenders import _by_hand
from benchmarks.workloads import Job, Pair


def prepare(job: Job, *, fused: bool = False) -> Callable[[], dict[str, float]]:
    """Build the optimizer; `fused` is torch's own switch."""
    optimizer = job.optimizer(fused=fused)
    (x, y), size = job.train, job.work.batch_size
    held_out = _by_hand.split(job.validation, size)

    def batches() -> Iterable[Pair]:
        order = torch.randperm(len(x))
        return zip(x.index_select(0, order).split(size), y.index_select(0, order).split(size), strict=True)

    return lambda: _by_hand.train(job, job.model, optimizer, batches, held_out)
