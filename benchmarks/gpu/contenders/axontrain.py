"""axontrain as its own documentation says: an Objective, a Loop, a Loader over data on the device, `fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import axontrain as ax
from benchmarks.gpu.task import SEED, Averaged, Task


class Trained(ax.Objective):
    """The task's network with its loss."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.criterion = task.net, task.loss

    def predict(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(predictions, targets)


class Pull(ax.Callback):
    """Has an average of the weights pull at them every few steps."""

    def __init__(self, averaged: Averaged) -> None:
        super().__init__(every=averaged.every)
        self.averaged = averaged

    def after_batch(self, state: ax.LoopState) -> None:
        self.averaged.pull(state.step)


def loader(task: Task) -> ax.Loader:
    """The data, shuffled, and moved and flipped if they are to be."""
    augment = [ax.data.augment.Crop(task.padding), ax.data.augment.Flip(alternating=True)] if task.padding else None
    return ax.Loader(ax.ArrayDataset(*task.data), task.batch_size, shuffle=True, drop_last=True, augment=augment)


def optimizer(task: Task) -> ax.Optimizer:
    """The task's algorithm in axontrain's words."""
    of = task.algorithm
    return ax.Optimizer(of.kind, schedule=of.schedule, groups=of.groups or None, **of.options)


def prepare(task: Task, **options: Any) -> Callable[[], str]:
    """Build the Loop; ``options`` are how it computes: ``compile``, ``graph``."""
    callbacks: list[ax.Callback] = []
    if task.freeze is not None:
        callbacks.append(ax.Freeze(f"net.{task.freeze[0]}", at=f"{task.freeze[1]} epochs"))
    if task.averaged is not None:
        callbacks.append(Pull(task.averaged))
    loop = ax.Loop(
        Trained(task),
        optimizer(task),
        callbacks=callbacks,
        device=task.device,
        precision=task.precision,
        channels_last=task.channels_last,
        progress=False,
        seed=SEED,
        **options,
    )
    loop.on("after_epoch")(lambda state: task.epoch_done(state.values["train/loss"]))
    data = loader(task)

    def fit() -> str:
        loop.fit(data, epochs=task.epochs)
        return str(loop.report())

    return fit
