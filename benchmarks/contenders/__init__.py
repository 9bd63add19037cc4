"""Who takes part. One file each, with `prepare(job) -> fit`: what is built before the clock starts, and the timed call.

`fit()` trains `job.model` in place for `job.epochs` and returns what it tracked of the last epoch: "loss" (the mean
over the epoch's batches), "accuracy" where the workload wants it, "val_loss" and "val_accuracy" where it validates.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """A file of this folder and how the table names it."""

    name: str
    title: str
    package: str | None = None  # what has to be importable, and is timed by benchmarks.imports
    distribution: str | None = None  # as the package index calls it
    tensors: bool = False  # a loop written by hand over tensors: the fastest of these is the reference


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("tensors", "by hand, tensors", tensors=True),
        Contender("tensors_fused", "by hand, tensors, fused", tensors=True),
        Contender("views", "by hand, permuted views", tensors=True),
        Contender("views_fused", "by hand, permuted views, fused", tensors=True),
        Contender("dataloader", "by hand, DataLoader"),
        Contender("axontrain", "axontrain", "axontrain", "axontrain"),
        Contender("ignite", "Ignite", "ignite", "pytorch-ignite"),
        Contender("fabric", "Lightning Fabric", "lightning", "lightning"),
        Contender("accelerate", "Accelerate", "accelerate", "accelerate"),
        Contender("poutyne", "Poutyne", "poutyne", "poutyne"),
        Contender("skorch", "skorch", "skorch", "skorch"),
        Contender("torchtnt", "TorchTNT AutoUnit", "torchtnt", "torchtnt"),
        Contender("lightning_sums", "Lightning (sums by hand)", "lightning", "lightning"),
        Contender("lightning", "Lightning (self.log)", "lightning", "lightning"),
        Contender("transformers", "HF Trainer", "transformers", "transformers"),
        Contender("keras", "Keras on torch", "keras", "keras"),
    )
}
