"""The small MLP of `benchmarks.overhead` (W2), whose kernels are so short that what launches them decides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.task import SEED, Algorithm, Given, Task, Workload
from benchmarks.workloads import WORKLOADS

BATCH_SIZE = 64
FULL, SMALL = 96_000, 1_280  # samples
RATE = 1e-5  # so low that after many epochs the loss is not near 0 yet, where any rounding would show
Pair = tuple[Tensor, Tensor]


def load(given: Given) -> Pair:
    """Ten overlapping clouds in 784 dimensions, one label in ten at random."""
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(10, (SMALL if given.small else FULL,), generator=generator)
    centres = torch.randn(10, 784, generator=generator) * 0.1
    x = torch.randn(len(y), 784, generator=generator).add_(centres[y])
    noise = torch.rand(len(y), generator=generator) < 0.1
    y = torch.where(noise, torch.randint(10, y.shape, generator=generator), y)
    return x.to(given.device), y.to(given.device)


def task(data: Pair, given: Given, epochs: int, epoch_done: Callable[[float], None]) -> Task:
    """A training that goes on."""
    torch.manual_seed(SEED)
    net = WORKLOADS["W2"].model().to(given.device)
    return Task(net, F.cross_entropy, data, BATCH_SIZE, epochs, Algorithm("adam", {"lr": RATE}), given.device, epoch_done)


@torch.inference_mode()
def judge(task: Task, data: Pair) -> dict[str, float]:
    """The loss on the training set."""
    task.net.eval()
    return {"loss": F.cross_entropy(task.net(data[0]), data[1]).item()}


MLP = Workload("mlp", "MLP", load, task, judge, goes_on=True, epochs=lambda given: 2 if given.small else 4, tolerance=0.05)
