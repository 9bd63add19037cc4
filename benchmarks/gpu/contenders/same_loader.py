"""By hand over the Loader that axontrain trains on: what of a difference is the loop's, and what the data's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.batches import Pair
from benchmarks.gpu.contenders import by_hand
from benchmarks.gpu.contenders.axontrain import loader
from benchmarks.gpu.task import SEED, Task


class Batches:
    """The Loader's batches, epoch after epoch, in the order of memory that convolutions want."""

    def __init__(self, task: Task) -> None:
        self.loader, self.epoch = loader(task), 0
        self.format = torch.channels_last if task.channels_last else torch.preserve_format

    def __iter__(self) -> Iterator[Pair]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for x, y in self.loader.batches(SEED, epoch):
            yield x.contiguous(memory_format=self.format), y


def prepare(task: Task, *, compiled: bool = False) -> Callable[[], None]:
    """Build the same loop over other batches."""
    assert not compiled
    optimizer, batches = task.algorithm.of(task.net), Batches(task)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with task.computing():
            return task.loss(task.net(x), y)

    return lambda: by_hand.train(task, loss_of, optimizer, batches)
