"""Lightning Fabric: the loop by hand; Fabric sets up model, optimizer and loaders, and runs backward."""

from __future__ import annotations

from collections.abc import Callable

from lightning.fabric import Fabric

from benchmarks.contenders import _by_hand
from benchmarks.workloads import Job


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Set up model, optimizer and loaders."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(job.model, job.optimizer())
    loader = fabric.setup_dataloaders(job.loader())
    held_out = fabric.setup_dataloaders(job.loader(validation=True)) if job.work.validate else []
    return lambda: _by_hand.train(job, model, optimizer, lambda: loader, held_out, fabric.backward)
