"""By hand over DataLoader(TensorDataset): the loop of most tutorials."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.contenders import _by_hand
from benchmarks.workloads import Job


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the optimizer and the loaders."""
    optimizer, loader = job.optimizer(), job.loader()
    held_out = job.loader(validation=True) if job.work.validate else []
    return lambda: _by_hand.train(job, job.model, optimizer, lambda: loader, held_out)
