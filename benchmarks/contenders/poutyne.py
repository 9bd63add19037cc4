"""Poutyne: a Model around the network, `fit_generator` over the loaders."""

from __future__ import annotations

from collections.abc import Callable

from poutyne import Model

from benchmarks.workloads import Job


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the Model and the loaders."""
    metrics = ["accuracy"] if job.work.accuracy else None
    model = Model(job.model, job.optimizer(), "cross_entropy", batch_metrics=metrics)
    loader = job.loader()
    held_out = job.loader(validation=True) if job.work.validate else None

    def fit() -> dict[str, float]:
        last = model.fit_generator(loader, held_out, epochs=job.epochs, verbose=job.work.bar)[-1]
        read = {"loss": last["loss"]}
        if job.work.accuracy:
            read["accuracy"] = last["acc"] / 100
        if job.work.validate:
            read |= {"val_loss": last["val_loss"], "val_accuracy": last["val_acc"] / 100}
        return read

    return fit
