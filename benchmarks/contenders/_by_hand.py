"""The loop that the hand-written contenders share: they differ in where batches come from, and in the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import Job, Pair


def train(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Iterable[Pair]],
    held_out: Iterable[Pair],
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> dict[str, float]:
    """Train as an expert writes it: sums stay tensors, and numbers are read at the end of an epoch.

    `model` and `backward` are passed for the frameworks that wrap these and leave the loop to its author.
    """
    with_accuracy, with_bar, steps = job.work.accuracy, job.work.bar, len(job.train[0]) // job.work.batch_size
    read: dict[str, float] = {}
    for _ in range(job.epochs):
        model.train()
        loss_sum, correct, seen = torch.zeros(()), torch.zeros((), dtype=torch.long), 0
        source = batches()
        if with_bar:
            from tqdm import tqdm

            source = bar = tqdm(source, total=steps)
        for x, y in source:
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            loss_sum.add_(loss.detach(), alpha=len(y))
            if with_accuracy:
                correct += (logits.argmax(1) == y).sum()
            if with_bar:
                seen += len(y)
                if seen % (50 * len(y)) == 0:  # a reading now and then: a person cannot read more
                    bar.set_postfix_str(f"loss {loss_sum.item() / seen:.3f}", refresh=False)
        read["loss"] = loss_sum.item() / len(job.train[0])
        if with_accuracy:
            read["accuracy"] = correct.item() / len(job.train[0])
        if job.work.validate:
            read["val_loss"], read["val_accuracy"] = evaluate(model, held_out)
    return read


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Pair]) -> tuple[float, float]:
    """Return mean loss and accuracy over batches."""
    model.eval()
    loss_sum, correct, count = torch.zeros(()), torch.zeros((), dtype=torch.long), 0
    for x, y in batches:
        logits = model(x)
        loss_sum.add_(F.cross_entropy(logits, y), alpha=len(y))
        correct += (logits.argmax(1) == y).sum()
        count += len(y)
    return loss_sum.item() / count, correct.item() / count


def split(pair: Pair | None, batch_size: int) -> list[Pair]:
    """Cut a set of tensors into views, one a batch."""
    return [] if pair is None else list(zip(*(part.split(batch_size) for part in pair), strict=True))
