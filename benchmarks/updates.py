"""What an update costs beside the same by hand: the guard against what is not finite; clipping, schedule, average with it.

`python -m benchmarks.updates` (about two minutes on two cores; one thread is used; on a GPU where there is one).

The first table is of whole steps of an MLP (64-256-256-10, batches of 128, AdamW, fused): a loop by hand against ``Loop.fit``,
both with the same clipping by norm, schedule, guard and moving average. The second is of updates alone, of a model of four
small tensors that has its gradients: ``Update.update`` against ``optimizer.step()`` and dropping the gradients, unguarded.
Contenders take turns of some hundred steps; a turn of ours is a fit, with all that begins and ends one. Differences and ratios
are taken within a round.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import axontrain as ax
from axontrain.optimizer import names
from axontrain.update import Update
from benchmarks import report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR, NORM, DECAY = 1e-3, 1.0, 0.999
STEPS = 500  # of a turn
SCHEDULE = ax.schedules.cosine(warmup="5%")
# LBFGS evaluates the loss, and SparseAdam takes sparse gradients alone.
UPDATED = sorted(set(names()) - {"lbfgs", "sparseadam"})
FUSED = ("sgd", "adam", "adamw", "adagrad")

Batches = list[tuple[Tensor, Tensor]]


def mlp() -> nn.Sequential:
    """64-256-256-10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(DEVICE)


def by_hand(batches: Batches, *, plain: bool = False) -> Iterator[None]:
    """As fast as it is written by hand: fused, many tensors at once, no host read; ``plain`` leaves out all but the update."""
    model = mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    average = [p.detach().clone() for p in parameters]
    while True:
        losses = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for step in range(STEPS):
            inputs, targets = batches[step % len(batches)]
            loss = cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if not plain:
                norm = nn.utils.clip_grad_norm_(parameters, NORM)
                optimizer.found_inf = (~torch.isfinite(norm + loss.detach())).float()  # type: ignore[attr-defined]
                optimizer.param_groups[0]["lr"] = LR * SCHEDULE(step / STEPS)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not plain:
                with torch.no_grad():
                    torch._foreach_lerp_(average, list[Tensor](parameters), 1 - DECAY)
            losses += loss.detach()
        losses.item()
        yield


def by_axontrain(batches: Batches, *, plain: bool = False) -> Iterator[None]:
    """The same by a Loop; ``plain`` leaves out all but the guard, which is always there."""
    more = {} if plain else {"clip_norm": NORM, "schedule": SCHEDULE, "average": ax.averages.ema(DECAY)}
    optimizer = ax.Optimizer("adamw", lr=LR, **more)  # type: ignore[arg-type]  # each of its own kind
    loop = ax.Loop(ax.Supervised(mlp(), "cross_entropy"), optimizer, progress=False, device=DEVICE)
    while True:
        loop.fit(batches, steps=STEPS)
        yield


def steps(rounds: int) -> list[list[str]]:
    """Whole steps: µs by hand, µs by axontrain, and their ratio."""
    made = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(128, 64, generator=made).to(DEVICE), torch.randint(10, (128,), generator=made).to(DEVICE))
        for _ in range(50)
    ]
    runs = {
        "by hand": by_hand(batches),
        "axontrain": by_axontrain(batches),
        "plain by hand": by_hand(batches, plain=True),
        "plain axontrain": by_axontrain(batches, plain=True),
    }
    times = taken_in_turns(runs, rounds)
    body = []
    for what, hand, ours in (
        ("clip, schedule, guard, average", "by hand", "axontrain"),
        ("none by hand; the guard", "plain by hand", "plain axontrain"),
    ):
        ratios = [a / b for a, b in zip(times[ours], times[hand], strict=True)]
        body.append([what, _us(times[hand]), _us(times[ours]), _spread(ratios)])
    return body


def taken_in_turns(runs: dict[str, Iterator[None]], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each, round by round, in an order of each round's own; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(list(runs), len(runs)):
            begun = perf_counter()
            next(runs[name])
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append((perf_counter() - begun) / STEPS)
    return times


def updates(rounds: int) -> list[list[str]]:
    """Updates alone: µs without a guard, µs with it, and what is between them."""
    body = []
    variants = [(name, True) for name in UPDATED] + [(name, False) for name in FUSED]
    for name, fused in variants:
        options = {} if fused else {"fused": False}
        runs = {"bare": _bare(name, options), "guarded": _guarded(name, options)}
        times = taken_in_turns(runs, rounds)
        more = [1e6 * (a - b) for a, b in zip(times["guarded"], times["bare"], strict=True)]
        kind = "fused" if fused and name in FUSED else "foreach or single"
        body.append(
            [
                name,
                kind,
                _us(times["bare"]),
                _us(times["guarded"]),
                f"{median(more):+.1f} ({min(more):+.1f} to {max(more):+.1f})",
            ]
        )
    return body


def _small(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "muon":  # which takes matrices alone
        return nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4))).to(DEVICE)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(DEVICE)


def _bare(name: str, options: dict[str, bool]) -> Iterator[None]:
    module = _small(name)
    parameters = list(module.parameters())
    spec = ax.Optimizer(name, lr=LR, **options)  # type: ignore[arg-type]
    optimizer = Update("main", spec, dict(module.named_parameters()), module).optimizers[0]
    gradients = [torch.full_like(p, 1e-3) for p in parameters]
    while True:
        for _ in range(STEPS):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            optimizer.step()
            for p in parameters:
                p.grad = None
        yield


def _guarded(name: str, options: dict[str, bool]) -> Iterator[None]:
    module = _small(name)
    parameters = list(module.parameters())
    spec = ax.Optimizer(name, lr=LR, **options)  # type: ignore[arg-type]
    update = Update("main", spec, dict(module.named_parameters()), module)
    gradients = [torch.full_like(p, 1e-3) for p in parameters]
    loss = torch.ones((), device=DEVICE)
    while True:
        for _ in range(STEPS):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            update.update(loss, {})
        update.read()
        yield


def _us(seconds: list[float]) -> str:
    return f"{1e6 * median(seconds):.1f}"


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = f"torch {torch.__version__}", DEVICE, "one thread used", f"rounds: {given.rounds}; medians."
    print(f"{report.heading('updates', *about)}\n")
    header = ["a step with", "by hand µs", "axontrain µs", "ratio"]
    print(report.table(header, steps(given.rounds), markdown=given.markdown), "\n")
    header = ["optimizer", "kernel", "bare µs", "guarded µs", "more µs"]
    print(report.table(header, updates(given.rounds), markdown=given.markdown))


if __name__ == "__main__":
    main()
