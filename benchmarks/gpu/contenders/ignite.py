"""Ignite: an Engine around a step of one's own, the mean loss as an attached metric."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from torch import Tensor

from benchmarks.gpu.batches import Batches, Pair
from benchmarks.gpu.task import Task, WithLoss


def prepare(task: Task, *, compiled: bool = False) -> Callable[[], None]:
    """Build the engine, and attach what happens beside the steps."""
    module, optimizer, batches = WithLoss(task), task.algorithm.of(task.net), Batches(task)
    call = torch.compile(module) if compiled else module
    schedule, averaged = task.algorithm.schedule, task.averaged
    rates = [group["lr"] for group in optimizer.param_groups]

    def step(engine: Engine, batch: Pair) -> Tensor:
        with task.computing():
            loss = call(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    trainer = Engine(step)
    Average(device=task.device).attach(trainer, "loss")

    @trainer.on(Events.EPOCH_STARTED)
    def begin(engine: Engine) -> None:
        task.begin_epoch(engine.state.epoch - 1)
        task.net.train()

    if schedule is not None:

        @trainer.on(Events.ITERATION_STARTED)
        def set_rates(engine: Engine) -> None:
            factor = schedule((engine.state.iteration - 1) / task.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    if averaged is not None:

        @trainer.on(Events.ITERATION_COMPLETED(every=averaged.every))
        def pull(engine: Engine) -> None:
            averaged.pull(engine.state.iteration)

    @trainer.on(Events.EPOCH_COMPLETED)
    def end(engine: Engine) -> None:
        task.epoch_done(float(engine.state.metrics["loss"]))

    return lambda: trainer.run(batches, max_epochs=task.epochs) and None
