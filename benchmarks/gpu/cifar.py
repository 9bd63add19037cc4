"""CIFAR-10 in the manner of airbench94: ten epochs from nothing, in eager, half precision, channels last.

What differs from the paper: the loss is the mean over a batch, with the rates that belong to it; autocast takes the place of
parameters in float16; and there are whole epochs, ten of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import cifar_data
from benchmarks.gpu.airbench import Lookahead, Network, whiten
from benchmarks.gpu.task import SEED, Algorithm, Given, Task, Workload

GOAL = 0.94  # accuracy
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SMOOTHING = 0.2
MOMENTUM = 0.85
# In the paper's units, in which rate and decay are those of an example, whatever the momentum.
RATE, DECAY, SHIFTS = 11.5, 0.0153, 64.0
WHITENED_BY = 5000  # images


@dataclasses.dataclass(frozen=True)
class Size:
    """How much there is of what."""

    train: int
    test: int
    batch_size: int
    epochs: int
    frozen_from: int  # the epoch from which on the first layer's bias is not trained
    widths: tuple[int, int, int]


FULL = Size(50_000, 10_000, 1024, 10, 3, (64, 256, 256))
SMALL = Size(512, 128, 64, 3, 1, (8, 16, 16))


@dataclasses.dataclass
class Data:
    """Normalised images and their labels, on the device."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    size: Size


def load(given: Given) -> Data:
    """Read or make the pictures, and normalise them."""
    size = SMALL if given.small else FULL
    found = cifar_data.made(size.train, size.test) if given.cifar is None else cifar_data.read(given.cifar)
    parts = {}
    for part, most in (("train", size.train), ("test", size.test)):
        images, labels = (tensor[:most].to(given.device) for tensor in found[part])
        mean, std = (torch.tensor(values, device=given.device)[:, None, None] * 255 for values in (MEAN, STD))
        dtype = torch.bfloat16 if given.half == "bf16" else torch.float32
        normalised = torch.cat([((chunk - mean) / std).to(dtype) for chunk in images.split(5000)])
        parts[part] = normalised, labels
    return Data(**parts, size=size)


def schedule(progress: float) -> float:
    """A triangle: from 0.2 up to 1 at 23 % of the training, and down to 0.07."""
    peak = 0.23
    return 0.2 + 0.8 * progress / peak if progress < peak else 1 - 0.93 * (progress - peak) / (1 - peak)


def algorithm(batch_size: int) -> Algorithm:
    """Nesterov's SGD, in which the shifts of BatchNorm learn 64 times as fast, and decay does not depend on the rate."""
    per_step = batch_size / (1024 * (1 + 1 / (1 - MOMENTUM)))
    rate, decay = RATE * per_step, DECAY * per_step
    shifts = {"lr": rate * SHIFTS, "weight_decay": decay / (rate * SHIFTS)}
    options = {"lr": rate, "momentum": MOMENTUM, "nesterov": True, "weight_decay": decay / rate}
    return Algorithm("sgd", options, {"*norm?.bias": shifts}, schedule)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels."""
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def task(data: Data, given: Given, epochs: int, epoch_done: Callable[[float], None]) -> Task:
    """A training from nothing."""
    torch.manual_seed(SEED)
    network = Network(data.size.widths).to(given.device, memory_format=torch.channels_last)
    whiten(network, data.train[0][:WHITENED_BY])
    ended: list[float] = []

    def at_its_end(loss: float) -> None:
        ended.append(loss)
        if len(ended) == epochs:
            slow.end()  # here, since frameworks may move the network elsewhere after their last epoch
        epoch_done(loss)

    made = Task(
        network, loss, data.train, data.size.batch_size, epochs, algorithm(data.size.batch_size), given.device, at_its_end,
        precision=given.half, channels_last=True, padding=2, freeze=("whiten.bias", data.size.frozen_from),
    )  # fmt: skip
    made.averaged = slow = Lookahead(network, made.steps)
    return made


@torch.inference_mode()
def judge(task: Task, data: Data) -> dict[str, float]:
    """Accuracy on the test set, by six views of each image, and the loss on a part of the training set."""
    task.net.eval()
    (images, labels), (seen, of_seen) = data.test, (tensor[:2000] for tensor in data.train)
    with task.computing():
        right = torch.cat([logits_of_views(task, part).argmax(1) for part in images.split(2000)]) == labels
        final = loss(task.net(seen.contiguous(memory_format=torch.channels_last)).float(), of_seen)
    return {"loss": final.item(), "accuracy": right.float().mean().item()}


def logits_of_views(task: Task, images: Tensor) -> Tensor:
    """Half of it is of the image, and a quarter each of it moved by a pixel up and left, or down and right; mirrored too."""
    padded = F.pad(images, (1,) * 4, mode="reflect")
    views = [(images, 0.25), (padded[..., :-2, :-2], 0.125), (padded[..., 2:, 2:], 0.125)]
    views += [(view.flip(3), share) for view, share in views]
    logits = [task.net(view.contiguous(memory_format=torch.channels_last)).float() * share for view, share in views]
    return torch.stack(logits).sum(0)


def epochs(given: Given) -> int:
    """Of a training."""
    return (SMALL if given.small else FULL).epochs


CIFAR = Workload("cifar", "CIFAR-10", load, task, judge, goes_on=False, epochs=epochs, tolerance=0.05)
