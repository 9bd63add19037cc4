"""Accelerate: the loop by hand; an Accelerator prepares module and optimizer, and runs backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from benchmarks.gpu.batches import Batches
from benchmarks.gpu.contenders import by_hand
from benchmarks.gpu.task import Task, WithLoss


def prepare(task: Task, *, compiled: bool = False) -> Callable[[], None]:
    """Prepare; the batches lie on the device as they are to be, so that there is nothing to prepare of them."""
    accelerator = Accelerator(cpu=task.device.type == "cpu", mixed_precision="bf16" if task.precision == "bf16" else "no")
    module, optimizer = accelerator.prepare(WithLoss(task), task.algorithm.of(task.net))
    if compiled:
        module = torch.compile(module)
    return lambda: by_hand.train(task, module, optimizer, Batches(task), accelerator.backward)
