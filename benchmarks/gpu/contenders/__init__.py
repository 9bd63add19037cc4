"""Who takes part. One file each, with `prepare(task, **options) -> fit`; `fit()` trains `task.net` in place.

It calls `task.epoch_done` at the end of each epoch with the mean of its losses, and returns what there is to tell of how it
trained, or nothing. What comes before the first step and after the last epoch's end no table counts, but for the time to an
accuracy, which is all of a training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A file of this folder, how it is to train which workloads, and how the table names it."""

    name: str
    title: str
    module: str
    workloads: dict[str, dict[str, Any]]  # with its options
    package: str | None = None  # what has to be importable
    distribution: str | None = None  # as the package index calls it
    peer: bool = False
    of: tuple[str, ...] = field(default=())  # the workloads of which it is 1.00, if it is the fastest such
    cuda: bool = False  # whether it needs a GPU


EAGER, COMPILED = {}, {"compiled": True}
ALL = {"cifar": EAGER, "gpt": COMPILED, "mlp": EAGER}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("by_hand", "by hand", "by_hand", ALL, of=("cifar", "gpt", "mlp")),
        Contender("same_loader", "by hand, over ax.Loader", "same_loader", {"cifar": EAGER}, of=("cifar",)),
        Contender("cuda_graph", "by hand, CUDA graph", "cuda_graph", {"mlp": {}}, cuda=True),
        Contender(
            "axontrain", "axontrain", "axontrain", {"cifar": {}, "gpt": {"compile": True}, "mlp": {}},
            "axontrain", "axontrain",
        ),
        Contender(
            "axontrain_graph", "axontrain, graph=True", "axontrain", {"mlp": {"graph": True}}, "axontrain", "axontrain",
        ),
        Contender(
            "axontrain_auto", 'axontrain, graph="auto"', "axontrain", {"mlp": {"graph": "auto"}}, "axontrain", "axontrain",
        ),
        Contender("lightning", "Lightning", "lightning", ALL, "lightning", "lightning", peer=True),
        Contender("ignite", "Ignite", "ignite", ALL, "ignite", "pytorch-ignite", peer=True),
        Contender("accelerate", "Accelerate", "accelerate", ALL, "accelerate", "accelerate", peer=True),
    )
}  # fmt: skip
