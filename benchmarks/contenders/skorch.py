"""Skorch: a NeuralNetClassifier, accuracy scored from the predictions made in training; no printed table."""

from __future__ import annotations

from collections.abc import Callable

from skorch import NeuralNetClassifier
from skorch.callbacks import EpochScoring, ProgressBar
from skorch.helper import predefined_split
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.workloads import Job


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the net; it builds optimizer and loaders itself."""
    work = job.work
    kind, options = job.optimizer_options()
    callbacks: list[tuple[str, object]] = []
    if work.accuracy:
        scoring = EpochScoring("accuracy", lower_is_better=False, on_train=True, name="train_acc", use_caching=True)
        callbacks.append(("train_acc", scoring))
    if work.bar:
        callbacks.append(("bar", ProgressBar(postfix_keys=["train_loss"])))
    net = NeuralNetClassifier(
        job.model,
        criterion=nn.CrossEntropyLoss,
        optimizer=kind,
        **{f"optimizer__{name}": value for name, value in options.items()},
        batch_size=work.batch_size,
        max_epochs=job.epochs,
        iterator_train__shuffle=True,
        train_split=predefined_split(TensorDataset(*job.validation)) if job.validation else None,
        callbacks=callbacks,
        callbacks__print_log=None,
        callbacks__valid_acc=EpochScoring("accuracy", lower_is_better=False, name="valid_acc") if work.validate else None,
        classes=list(range(10)),
        device="cpu",
        verbose=0,
    )

    def fit() -> dict[str, float]:
        last = net.fit(TensorDataset(*job.train), y=None).history[-1]
        names = {"loss": "train_loss", "accuracy": "train_acc", "val_loss": "valid_loss", "val_accuracy": "valid_acc"}
        return {name: float(last[key]) for name, key in names.items() if key in last}

    return fit
