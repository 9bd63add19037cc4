"""What a contender is given: one training, the same for all, and how the workloads describe theirs."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SEED = 0  # of weights, of orders, and of what augmentation draws
KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Given:
    """What the command was given: the device, whether all is small, and files of real data, where there are any."""

    device: torch.device
    small: bool
    cifar: Path | None = None  # a .safetensors of benchmarks.gpu.cifar_data
    text: Path | None = None

    @property
    def half(self) -> str:
        """The precision of what trains in half: bfloat16 on a GPU; a CPU would emulate it."""
        return "bf16" if self.device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Algorithm:
    """An optimizer in words, of which torch's and axontrain's are made."""

    kind: str
    options: dict[str, Any]
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)  # patterns of names, with options of their own
    schedule: Callable[[float], float] | None = None  # progress, 0 to 1, to a factor of the learning rate

    def of(self, net: nn.Module, **kernel: Any) -> torch.optim.Optimizer:
        """Torch's optimizer of a network, fused: what axontrain takes too."""
        rest = {name: p for name, p in net.named_parameters() if p.requires_grad}
        groups = []
        for pattern, options in self.groups.items():
            names = fnmatch.filter(rest, pattern)
            groups.append({"params": [rest.pop(name) for name in names], **options})
        return KINDS[self.kind]([{"params": list(rest.values())}, *groups], **self.options, fused=True, **kernel)


class Averaged(Protocol):
    """What is done to the weights beside the updates, every ``every`` steps."""

    every: int

    def pull(self, step: int) -> None: ...


@dataclass
class Task:
    """One training: a network to be trained in place, on data that lie on the device."""

    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor]
    batch_size: int
    epochs: int
    algorithm: Algorithm
    device: torch.device
    epoch_done: Callable[[float], None]  # to be called at the end of each epoch with its mean loss, read to the host
    precision: str = "fp32"  # or "bf16": autocast
    channels_last: bool = False
    padding: int = 0  # pixels by which images are moved; they are flipped too then
    freeze: tuple[str, int] | None = None  # a parameter's name, and the epoch from which on it is not trained
    averaged: Averaged | None = None

    @property
    def batches(self) -> int:
        """Batches of an epoch: whole ones."""
        return len(self.data[0]) // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of the training."""
        return self.batches * self.epochs

    def begin_epoch(self, epoch: int) -> None:
        """Freeze what is to be, by hand."""
        if self.freeze is not None and epoch == self.freeze[1]:
            self.net.get_parameter(self.freeze[0]).requires_grad_(False)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Compute the forward pass in the block in the task's precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()


class WithLoss(nn.Module):
    """A network and its loss as one module, so that one compiled function, or one wrapper, has both."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.criterion = task.net, task.loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.net(inputs), targets)


@dataclass(frozen=True)
class Workload:
    """One of the trainings that are compared.

    In one that goes on, a contender trains without end, and a turn is some epochs of that; else a turn is a training from the
    beginning, judged at its end.
    """

    name: str
    title: str
    load: Callable[[Given], Any]  # the data, on the device
    task: Callable[[Any, Given, int, Callable[[float], None]], Task]  # from data, epochs, and what an epoch's end calls
    judge: Callable[[Task, Any], dict[str, float]]  # "loss" of the trained weights, and "accuracy" where there is one
    goes_on: bool
    epochs: Callable[[Given], int]  # of a turn, as it is measured
    tolerance: float  # of final losses, relative
    samples: int = 1  # items (tokens) of a sample, for what is given by the item
    extra: Callable[[Given], dict[str, float]] | None = None  # what a step amounts to: "tokens", "flops"
