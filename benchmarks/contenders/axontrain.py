"""axontrain as its own documentation says: a Loop, an ArrayDataset, `fit`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

import axontrain as ax
from benchmarks.workloads import Job


class Classifier(ax.Objective):
    """The workload's model with cross-entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def predict(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(predictions, targets)


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the Loop and the datasets."""
    work = job.work
    loop = ax.Loop(
        Classifier(job.model),
        ax.Optimizer(work.optimizer, lr=work.lr),
        metrics=["accuracy"] if work.accuracy else None,
        device="cpu",
        progress=work.bar,
        seed=0,
    )
    train = ax.ArrayDataset(*job.train)
    validation = ax.ArrayDataset(*job.validation) if job.validation else None

    def fit() -> dict[str, float]:
        values = loop.fit(train, validation, epochs=job.epochs, batch_size=work.batch_size).values
        read = {"loss": values["train/loss"]}
        if work.accuracy:
            read["accuracy"] = values["train/accuracy"]
        if work.validate:
            read |= {"val_loss": values["val/loss"], "val_accuracy": values["val/accuracy"]}
        return read

    return fit
