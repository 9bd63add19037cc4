"""Batches by hand, as an expert makes them of data that lie on the device; every contender but axontrain trains on these.

They are the batches that axontrain makes of the same seed: the order of an epoch is `ax.order`, and what a sample draws is
`Draw`'s, of which all that an epoch needs is drawn at once. To move, flip and select images is then one gather from images
that were padded once, and what comes of it has its channels last.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import axontrain as ax
from axontrain.data.augment import Draw
from benchmarks.gpu.task import SEED, Task

Pair = tuple[Tensor, Tensor]


class Batches:
    """The batches of one epoch after another: iterated anew, it is at the next.

    An epoch counts from its first batch on: Lightning asks for an iterator more than once.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.epoch = task, 0
        (self.x, self.y), self.padding = task.data, task.padding
        if self.padding:
            self.padded = F.pad(self.x, (self.padding,) * 4, mode="reflect").permute(0, 2, 3, 1).contiguous()

    def __len__(self) -> int:
        return self.task.batches

    def __iter__(self) -> Iterator[Pair]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        indices = order(self.task, epoch)
        yield from self._moved(indices, epoch) if self.padding else self._plain(indices)

    def _plain(self, indices: Tensor) -> Iterator[Pair]:
        for index in indices.split(self.task.batch_size):
            yield self.x.index_select(0, index), self.y.index_select(0, index)

    def _moved(self, indices: Tensor, epoch: int) -> Iterator[Pair]:
        draw, (height, width) = Draw(SEED, epoch, indices), self.x.shape[2:]
        rows = draw.integers(2 * self.padding + 1)[:, None] + torch.arange(height, device=indices.device)
        columns = draw.integers(2 * self.padding + 1)[:, None] + torch.arange(width, device=indices.device)
        # Each image is shown the other way round in every second epoch.
        flipped = (draw.lasting.integers(2) + epoch) % 2 == 1
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
        parts = (tensor.split(self.task.batch_size) for tensor in (indices, rows, columns))
        for index, row, column in zip(*parts, strict=True):
            images = self.padded[index[:, None, None], row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
            yield images if self.task.channels_last else images.contiguous(), self.y.index_select(0, index)


def order(task: Task, epoch: int) -> Tensor:
    """The samples of an epoch's whole batches, one after the other, on the device."""
    n = len(task.data[0])
    return ax.order(SEED, epoch, n)[: task.batches * task.batch_size].to(task.device)
