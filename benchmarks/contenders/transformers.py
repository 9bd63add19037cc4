"""HF Trainer: no saving, no reporting, no clipping, constant rate; loss logged once an epoch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.workloads import Job, Pair


class Classifier(nn.Module):
    """The workload's model in the Trainer's form, with the count of right answers that it does not keep itself."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.accuracy = job.model, job.work.accuracy
        self.correct = torch.zeros((), dtype=torch.long)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(x)
        if self.training and self.accuracy:
            self.correct += (logits.argmax(1) == labels).sum()
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ReadAccuracy(TrainerCallback):
    """Turns the count into an accuracy at the end of an epoch."""

    def __init__(self, model: Classifier, samples: int) -> None:
        self.model, self.samples, self.accuracy = model, samples, 0.0

    def on_epoch_end(self, *args: object, **kwargs: object) -> None:
        self.accuracy = self.model.correct.item() / self.samples
        self.model.correct.zero_()


class QuietProgress(ProgressCallback):
    """Its bar without the line of text that it adds at each log."""

    def on_log(self, *args: object, **kwargs: object) -> None:
        pass


def collate(samples: list[Pair]) -> dict[str, Tensor]:
    """Stack samples under the names that the model takes."""
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(y)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy over the validation set."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def prepare(job: Job) -> Callable[[], dict[str, float]]:
    """Build the Trainer; it builds the loaders itself."""
    work, optimizer, model = job.work, job.optimizer(), Classifier(job)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(Path(tempfile.gettempdir()) / "overhead-transformers"),  # nothing is saved in it
            num_train_epochs=job.epochs,
            per_device_train_batch_size=work.batch_size,
            per_device_eval_batch_size=work.batch_size,
            eval_strategy="epoch" if work.validate else "no",
            logging_strategy="epoch",
            logging_nan_inf_filter=False,  # no test of each step's loss
            save_strategy="no",
            report_to="none",
            disable_tqdm=not work.bar,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        data_collator=collate,
        train_dataset=TensorDataset(*job.train),
        eval_dataset=TensorDataset(*job.validation) if job.validation else None,
        compute_metrics=accuracy if work.validate else None,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.remove_callback(PrinterCallback)
    counted = ReadAccuracy(model, len(job.train[0]))
    if work.accuracy:
        trainer.add_callback(counted)
    if work.bar:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgress)

    def fit() -> dict[str, float]:
        trainer.train()
        logs = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
        read = {"loss": logs["loss"]}
        if work.accuracy:
            read["accuracy"] = counted.accuracy
        if work.validate:
            read |= {"val_loss": logs["eval_loss"], "val_accuracy": logs["eval_accuracy"]}
        return read

    return fit
