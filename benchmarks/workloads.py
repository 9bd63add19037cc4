"""The four workloads: one definition of data, model, optimizer and length that every contender uses.

torch is imported inside the functions: the driver reads this file too, and never needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

Pair: TypeAlias = "tuple[Tensor, Tensor]"
Data: TypeAlias = "tuple[Pair, Pair | None]"  # to train on, to validate on

DIGITS = Path(__file__).parent.parent / "axontrain" / "data" / "digits.safetensors"


@dataclass(frozen=True)
class Workload:
    """What is trained, how, and for how long.

    Every training set is a whole number of batches, so that a mean of batch means is the mean over samples and no
    contender is asked to weigh a shorter last batch.
    """

    name: str
    title: str
    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    batch_size: int
    epochs: int
    optimizer: str
    lr: float
    fused: bool  # the faster of torch's implementations on a CPU: given to every contender that takes a torch optimizer
    tolerance: float  # of losses, relative: four standard deviations over orders of the samples, rounded up
    accuracy: bool = True
    bar: bool = False
    validate: bool = False


@dataclass
class Job:
    """One training run: a workload with its data, a model to be trained in place, and a number of epochs."""

    work: Workload
    model: nn.Module
    train: Pair
    validation: Pair | None
    epochs: int

    def loader(self, *, validation: bool = False) -> DataLoader:
        """Make the loader that tutorials make, over the training or the validation set."""
        from torch.utils.data import DataLoader, TensorDataset

        pair = self.validation if validation else self.train
        assert pair is not None
        return DataLoader(TensorDataset(*pair), batch_size=self.work.batch_size, shuffle=not validation)

    def optimizer(self, parameters: Iterable[Tensor] | None = None, *, fused: bool | None = None) -> torch.optim.Optimizer:
        """Make the workload's torch optimizer, in its faster implementation if `fused` does not say which."""
        kind, options = self.optimizer_options(fused=fused)
        return kind(parameters or self.model.parameters(), **options)

    def optimizer_options(self, *, fused: bool | None = None) -> tuple[type[torch.optim.Optimizer], dict]:
        """Give class and options, for frameworks that build the optimizer themselves."""
        import torch

        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        fused = self.work.fused if fused is None else fused
        return kinds[self.work.optimizer], {"lr": self.work.lr} | ({"fused": True} if fused else {})


def _linear_data() -> Data:
    """Return two classes split by a plane, one label in ten at random: the loss has a floor above zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12_800, 32, generator=generator)
    y = (x @ torch.randn(32, generator=generator) > 0).long()
    noise = torch.rand(len(y), generator=generator) < 0.1
    return (x, torch.where(noise, torch.randint(2, y.shape, generator=generator), y)), None


def _mlp_data() -> Data:
    """Return ten overlapping clouds in 784 dimensions, the width of a small picture, one label in ten at random."""
    import torch

    generator = torch.Generator().manual_seed(2)
    y = torch.randint(10, (19_200,), generator=generator)
    centres = torch.randn(10, 784, generator=generator) * 0.1
    x = torch.randn(len(y), 784, generator=generator).add_(centres[y])
    noise = torch.rand(len(y), generator=generator) < 0.1
    return (x, torch.where(noise, torch.randint(10, y.shape, generator=generator), y)), None


def _digits_data() -> Data:
    """Return the 8×8 digits that axontrain ships: 44 batches to train on, 12 to validate on."""
    import torch

    generator = torch.Generator().manual_seed(3)
    if DIGITS.exists():
        from safetensors.torch import load_file

        stored = load_file(DIGITS)
        x, y = stored["images"].float() / 16, stored["labels"].long()
    else:  # without the package: ten noisy stencils of the same size
        y = torch.randint(10, (1_797,), generator=generator)
        x = (torch.rand(10, 64, generator=generator)[y] + 0.5 * torch.randn(len(y), 64, generator=generator)).clamp(0, 1)
    order = torch.randperm(len(y), generator=generator)
    x, y = x[order].reshape(-1, 1, 8, 8), y[order]
    return (x[:1408], y[:1408]), (x[1408:1792], y[1408:1792])


def _linear() -> nn.Module:
    from torch import nn

    return nn.Linear(32, 2)


def _mlp() -> nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def _convolutional() -> nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


_MLP = {
    "data": _mlp_data, "model": _mlp, "batch_size": 64, "epochs": 5,
    "optimizer": "adam", "lr": 2e-4, "fused": True, "tolerance": 0.03,
}  # fmt: skip

WORKLOADS = {
    work.name: work
    for work in (
        Workload(
            "W1", "Linear(32, 2), batch 32, SGD; loss", _linear_data, _linear, batch_size=32, epochs=10,
            optimizer="sgd", lr=0.05, fused=False, tolerance=0.01, accuracy=False,
        ),
        Workload("W2", "MLP 784-256-256-10, batch 64, Adam; loss and accuracy", **_MLP),
        Workload("W3", "W2 with a progress bar", **_MLP, bar=True),
        Workload(
            "W4", "convolutional network, 8×8 digits, batch 32, Adam; validation every epoch", _digits_data,
            _convolutional, batch_size=32, epochs=5, optimizer="adam", lr=5e-4, fused=True, tolerance=0.12,
            validate=True,
        ),
    )
}  # fmt: skip
