"""Accelerate: the loop by hand; an Accelerator prepares model, optimizer and loaders, and runs backward."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator

from benchmarks.contenders import _by_hand
from benchmarks.workloads import Job


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Prepare model, optimizer and loaders."""
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(job.model, job.optimizer(), job.loader())
    held_out = accelerator.prepare(job.loader(validation=True)) if job.work.validate else []
    return lambda: _by_hand.train(job, model, optimizer, lambda: loader, held_out, accelerator.backward)
