"""Lightning: automatic optimisation; losses summed in the module, which is its faster way.

Logger, checkpoints, summary, bar and sanity check are off.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.gpu.batches import Batches, Pair
from benchmarks.gpu.task import Task, WithLoss

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Module(pl.LightningModule):
    """The task's network with its loss."""

    def __init__(self, task: Task, compiled: bool) -> None:
        super().__init__()
        self.task, self.module = task, WithLoss(task)
        # In a tuple: a module of its own would be a second one with the same parameters.
        self.called = (torch.compile(self.module) if compiled else self.module,)

    def on_train_epoch_start(self) -> None:
        self.task.begin_epoch(self.current_epoch)
        self.loss_sum = torch.zeros((), device=self.task.device)

    def training_step(self, batch: Pair, index: int) -> Tensor:
        loss = self.called[0](*batch)
        self.loss_sum += loss.detach()
        return loss

    def on_train_batch_end(self, outputs: object, batch: Pair, index: int) -> None:
        averaged, step = self.task.averaged, self.global_step
        if averaged is not None and step % averaged.every == 0:
            averaged.pull(step)

    def on_train_epoch_end(self) -> None:
        self.task.epoch_done(self.loss_sum.item() / self.task.batches)

    def configure_optimizers(self) -> object:
        optimizer, schedule = self.task.algorithm.of(self.task.net), self.task.algorithm.schedule
        if schedule is None:
            return optimizer
        steps = self.task.steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def prepare(task: Task, *, compiled: bool = False) -> Callable[[], None]:
    """Build the Trainer and the module."""
    trainer = pl.Trainer(
        max_epochs=task.epochs,
        accelerator="gpu" if task.device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        benchmark=torch.backends.cudnn.benchmark,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    module, batches = Module(task, compiled), Batches(task)

    def fit() -> None:
        trainer.fit(module, batches)
        task.net.to(task.device)  # at the end of a fit Lightning moves modules to the CPU

    return fit
