"""TorchTNT: an AutoUnit under `train` or `fit`, loss and accuracy summed in its hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import Job, Pair

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports pkg_resources, which is deprecated
    from torchtnt.framework.auto_unit import AutoUnit, TrainStepResults
    from torchtnt.framework.callbacks.tqdm_progress_bar import TQDMProgressBar
    from torchtnt.framework.fit import fit
    from torchtnt.framework.state import State
    from torchtnt.framework.train import train


class Classifier(AutoUnit[Pair]):
    """The workload's model with the sums that its means are made of."""

    def __init__(self, job: Job) -> None:
        super().__init__(module=job.model, device=torch.device("cpu"))
        self.job = job
        self.read: dict[str, float] = {}
        self._clear()

    def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> tuple[torch.optim.Optimizer, None]:
        return self.job.optimizer(module.parameters()), None

    def compute_loss(self, state: State, data: Pair) -> tuple[Tensor, Tensor]:
        x, y = data
        logits = self.module(x)
        return F.cross_entropy(logits, y), logits

    def on_train_step_end(self, state: State, data: Pair, step: int, results: TrainStepResults) -> None:
        self._add(data[1], results.loss, results.outputs)

    def on_eval_step_end(self, state: State, data: Pair, step: int, loss: Tensor, outputs: Tensor) -> None:
        self._add(data[1], loss, outputs)

    def on_train_epoch_end(self, state: State) -> None:
        super().on_train_epoch_end(state)
        self._read("")

    def on_eval_epoch_end(self, state: State) -> None:
        self._read("val_")

    def _add(self, y: Tensor, loss: Tensor, logits: Tensor) -> None:
        self.loss_sum.add_(loss.detach(), alpha=len(y))
        if self.job.work.accuracy:
            self.correct += (logits.argmax(1) == y).sum()
        self.count += len(y)

    def _read(self, prefix: str) -> None:
        self.read[prefix + "loss"] = self.loss_sum.item() / self.count
        if self.job.work.accuracy:
            self.read[prefix + "accuracy"] = self.correct.item() / self.count
        self._clear()

    def _clear(self) -> None:
        self.loss_sum, self.correct, self.count = torch.zeros(()), torch.zeros((), dtype=torch.long), 0


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the unit and the loaders."""
    unit, loader = Classifier(job), job.loader()
    held_out = job.loader(validation=True) if job.work.validate else None
    callbacks = [TQDMProgressBar()] if job.work.bar else []

    def run() -> dict[str, float]:
        if held_out is None:
            train(unit, loader, max_epochs=job.epochs, callbacks=callbacks)
        else:
            fit(unit, loader, held_out, max_epochs=job.epochs, evaluate_every_n_epochs=1, callbacks=callbacks)
        return unit.read

    return run
