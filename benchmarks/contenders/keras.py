"""Keras on torch: the workload's module in a TorchModuleWrapper, `fit` over the arrays."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "torch"

import keras

from benchmarks.workloads import Job


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Compile the model; the optimizer is Keras' own, with torch's epsilon."""
    work = job.work
    model = keras.Sequential([keras.layers.TorchModuleWrapper(job.model)])
    if work.optimizer == "adam":
        optimizer = keras.optimizers.Adam(work.lr, epsilon=1e-8)
    else:
        optimizer = keras.optimizers.SGD(work.lr)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"] if work.accuracy else [],
    )
    x, y = job.train

    def fit() -> dict[str, float]:
        history = model.fit(
            x,
            y,
            batch_size=work.batch_size,
            epochs=job.epochs,
            validation_data=job.validation,
            verbose=1 if work.bar else 0,
        ).history
        return {name: float(values[-1]) for name, values in history.items()}

    return fit
