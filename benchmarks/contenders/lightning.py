"""Lightning: automatic optimisation, loss and accuracy through `self.log`, as its documentation has it.

Logger, checkpoints, summary and sanity check are off.
`barebones=True` is not used: it switches off `self.log` too, and with it the mean loss that the workloads ask for.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workloads import Job, Pair

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Classifier(pl.LightningModule):
    """The workload's model, its loss and accuracy logged as means over the epoch."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.model = job, job.model

    def training_step(self, batch: Pair, index: int) -> Tensor:
        return self._step(batch, "", self.job.work.accuracy)

    def validation_step(self, batch: Pair, index: int) -> None:
        self._step(batch, "val_", self.job.work.accuracy)

    def _step(self, batch: Pair, prefix: str, accuracy: bool) -> Tensor:
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        # batch_size given: Lightning need not look for it in the batch
        how = {"on_step": False, "on_epoch": True, "batch_size": len(y)}
        self.log(prefix + "loss", loss, prog_bar=self.job.work.bar, **how)
        if accuracy:  # by hand: a torchmetrics update costs more
            self.log(prefix + "accuracy", (logits.argmax(1) == y).float().mean(), **how)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.job.optimizer()


def prepare(job: Job, kind: type[Classifier] = Classifier) -> Callable[[], dict[str, float]]:
    """Build the Trainer, the module and the loaders."""
    module, loader = kind(job), job.loader()
    held_out = job.loader(validation=True) if job.work.validate else None
    trainer = pl.Trainer(
        max_epochs=job.epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=job.work.bar,
        callbacks=[TQDMProgressBar()] if job.work.bar else None,  # the cheaper of its two bars
        num_sanity_val_steps=0,
    )

    def fit() -> dict[str, float]:
        trainer.fit(module, loader, held_out)
        return {name: value.item() for name, value in trainer.callback_metrics.items()}

    return fit
