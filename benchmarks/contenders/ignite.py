"""Ignite: an Engine around a step of one's own, mean loss and accuracy as attached metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ignite.engine import Engine, Events
from ignite.handlers.tqdm_logger import ProgressBar
from ignite.metrics import Accuracy, Average
from torch.nn import functional as F

from benchmarks.workloads import Job, Pair


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the engines and attach metrics, validation and bar."""
    work, model, optimizer, loader = job.work, job.model, job.optimizer(), job.loader()
    read: dict[str, float] = {}

    def train_step(engine: Engine, batch: Pair) -> dict[str, torch.Tensor]:
        model.train()
        x, y = batch
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), "y_pred": logits, "y": y}

    @torch.inference_mode()
    def eval_step(engine: Engine, batch: Pair) -> dict[str, torch.Tensor]:
        model.eval()
        x, y = batch
        logits = model(x)
        return {"loss": F.cross_entropy(logits, y), "y_pred": logits, "y": y}

    def attach(engine: Engine, accuracy: bool) -> None:
        Average(output_transform=lambda output: output["loss"]).attach(engine, "loss")
        if accuracy:
            Accuracy(output_transform=lambda output: (output["y_pred"], output["y"])).attach(engine, "accuracy")

    trainer = Engine(train_step)
    attach(trainer, work.accuracy)
    if work.bar:
        ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output["loss"]})
    if work.validate:
        evaluator, held_out = Engine(eval_step), job.loader(validation=True)
        attach(evaluator, accuracy=True)

        @trainer.on(Events.EPOCH_COMPLETED)
        def validate(engine: Engine) -> None:
            metrics = evaluator.run(held_out).metrics
            read.update(val_loss=float(metrics["loss"]), val_accuracy=metrics["accuracy"])

    def fit() -> dict[str, float]:
        metrics = trainer.run(loader, max_epochs=job.epochs).metrics
        return read | {name: float(value) for name, value in metrics.items()}

    return fit
