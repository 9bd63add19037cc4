"""By hand: the loop that is 1.00, and which the frameworks that leave the loop to its author share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.gpu.batches import Batches, Pair
from benchmarks.gpu.task import Task, WithLoss


def prepare(task: Task, *, compiled: bool = False) -> Callable[[], None]:
    """Build the optimizer and the batches."""
    module = WithLoss(task)
    call = torch.compile(module) if compiled else module
    optimizer, batches = task.algorithm.of(task.net), Batches(task)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with task.computing():
            return call(x, y)

    return lambda: train(task, loss_of, optimizer, batches)


def train(
    task: Task,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Pair],
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> None:
    """Train as an expert writes it: nothing is read from the device before an epoch's end.

    Args:
        batches: iterated once an epoch.
        backward: for the framework that wraps it.
    """
    schedule, averaged, step = task.algorithm.schedule, task.averaged, 0
    rates = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(task.epochs):
        task.begin_epoch(epoch)
        task.net.train()
        loss_sum = torch.zeros((), device=task.device)
        for x, y in batches:
            if schedule is not None:
                factor = schedule(step / task.steps)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            loss = loss_of(x, y)
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            loss_sum += loss.detach()
            step += 1
            if averaged is not None and step % averaged.every == 0:
                averaged.pull(step)
        task.epoch_done(loss_sum.item() / task.batches)
