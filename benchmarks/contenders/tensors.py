"""By hand over tensors: a permutation an epoch, and each batch gathered by its part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.contenders import _by_hand
from benchmarks.workloads import Job, Pair


def prepare(job: Job, *, fused: bool = False) -> Callable[[], dict[str, float]]:
    """Build the optimizer; `fused` is torch's own switch."""
    optimizer = job.optimizer(fused=fused)
    (x, y), size = job.train, job.work.batch_size
    held_out = _by_hand.split(job.validation, size)

    def batches() -> Iterator[Pair]:
        for index in torch.randperm(len(x)).split(size):
            yield x.index_select(0, index), y.index_select(0, index)  # a quarter of the time of x[index] on wide rows

    return lambda: _by_hand.train(job, job.model, optimizer, batches, held_out)
