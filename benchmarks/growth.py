"""How the cost of a step grows: with the batch, the model, the number of steps, the dataset and the metrics.

`python -m benchmarks.growth --out benchmarks/plots` (about five minutes on two cores; one thread is used; `--quick` looks at
fewer sizes and takes half a minute). It needs matplotlib, the extra ``plot``.

An MLP with Adam, fused, learns ten clouds; all but one of its sizes stay as they are. Against axontrain stands the fastest of
the tensor loops written by hand, whichever that is at that size; with the metrics, one that sums counts as an expert would, and
one that updates a MetricCollection of torchmetrics at every step, as is usual. All runs in one process; contenders take turns
in an order of each round's own, and a turn is whole fits of fresh models from the same weights, so that what begins and ends a
fit is in it. The first round is not counted; a ratio is taken within a round, and has its median and its range.

What is counted is the time of the CPU: one thread computes and waits for nothing, so that on a quiet machine it is the time on
the wall, and on another it leaves out what else runs there. The ratio on the wall stands beside it, its median. "losses" says
whether the trained weights have the same loss over the training set, and the last epoch the same metrics, to a tolerance.

Each axis is a table, and a picture in --out: above µs a step, below the ratio, with the range over the rounds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import axontrain as ax
from axontrain.errors import require
from benchmarks import report
from benchmarks.contenders import axontrain, tensors_fused, views_fused
from benchmarks.run import judge, make_job
from benchmarks.workloads import Job, Pair, Workload

CLASSES = 10
OURS = "axontrain"
TORCHMETRICS = "torchmetrics"
# In the order in which they join: most of them an expert derives from one matrix of counts.
METRICS = ("accuracy", "f1", "top5", "confusion_matrix", "precision", "recall", "dice", "iou")
WIDE = 8  # times the least: then µs are drawn on a log scale
COLOURS = {"by hand": "#444444", OURS: "#d1495b", TORCHMETRICS: "#3d7ea6"}

Fit = Callable[[], dict[str, Any]]
Prepare = Callable[[Job], Fit]
BY_HAND: dict[str, Prepare] = {"tensors": tensors_fused.prepare, "views": views_fused.prepare}


@dataclass(frozen=True)
class Point:
    """One size: what is trained at it, by whom, and how many fits are a turn."""

    x: int
    work: Workload
    by_hand: dict[str, Prepare]  # the fastest of them is what the others stand against
    others: dict[str, Prepare]
    fits: int = 1

    @property
    def steps(self) -> int:
        """Steps of a fit."""
        return self.work.epochs * len(self.work.data()[0][0]) // self.work.batch_size


@dataclass(frozen=True)
class Axis:
    """What grows."""

    name: str
    title: str
    label: str  # of x, with its unit
    points: list[Point]
    log: bool = True


@dataclass(frozen=True)
class Measured:
    """One point: µs a step of each contender, of the CPU and on the wall, round by round."""

    x: int
    hand: str  # the fastest by hand
    us: dict[str, list[float]]
    wall_us: dict[str, list[float]]
    disagreement: str

    def ratios(self, name: str) -> list[float]:
        """A contender's time over that of the fastest by hand, round by round."""
        return self._ratios(self.us, name)

    def wall_ratios(self, name: str) -> list[float]:
        """The same of the time on the wall."""
        return self._ratios(self.wall_us, name)

    def _ratios(self, us: dict[str, list[float]], name: str) -> list[float]:
        return [ours / hand for ours, hand in zip(us[name], us[self.hand], strict=True)]


# What is trained


@functools.lru_cache(maxsize=2)
def clouds(samples: int, features: int = 32) -> Pair:
    """Ten overlapping clouds, one label in ten at random: the loss has a floor above zero."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    x = torch.randn(samples, features, generator=generator).add_(torch.randn(CLASSES, features, generator=generator)[y] / 2)
    noise = torch.rand(samples, generator=generator) < 0.1
    return x, torch.where(noise, torch.randint(CLASSES, y.shape, generator=generator), y)


def mlp(features: int, width: int, hidden: int) -> nn.Module:
    """So many hidden layers of that width, with rectifiers."""
    sizes = [features, *[width] * hidden]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        linear = nn.Linear(before, after)
        nn.init.kaiming_normal_(linear.weight)  # else a deep one hands nothing on
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def point(
    x: int,
    steps: int,
    *,
    batch: int = 32,
    samples: int = 2**13,
    features: int = 32,
    width: int = 64,
    hidden: int = 2,
    accuracy: bool = True,
    by_hand: dict[str, Prepare] | None = None,
    others: dict[str, Prepare] | None = None,
    fits: int = 1,
) -> Point:
    """A point of about so many steps, in whole epochs."""
    work = Workload(
        str(x),
        str(x),
        lambda: (clouds(samples, features), None),
        lambda: mlp(features, width, hidden),
        batch_size=batch,
        epochs=max(1, round(steps * batch / samples)),
        optimizer="adam",
        lr=3e-4,
        fused=True,
        tolerance=0.05,
        accuracy=accuracy,
    )
    return Point(x, work, by_hand or BY_HAND, others or {OURS: axontrain.prepare}, fits)


def axes(quick: bool) -> dict[str, Axis]:
    """All axes; quick ones have fewer points, of fewer steps."""
    share = 8 if quick else 1

    def some(every: Sequence[int]) -> Sequence[int]:
        return every[::2][:2] if quick else every

    def steps_of(number: int) -> Point:  # in epochs of at most 512 steps
        length = min(number, 512)
        return point(number, number, samples=32 * length, fits=max(1, 256 // share // number))

    made = [
        Axis(
            "batch",
            f"Batch size: MLP 32-64-64-10, {2**15 // share:,} samples",
            "batch size (samples)",
            [point(x, max(256, 2**15 // x) // share, batch=x, samples=2**15 // share) for x in some((8, 32, 128, 512, 2048))],
        ),
        Axis(
            "width",
            "Width: MLP 32-w-w-10, batches of 32",
            "width of the two hidden layers (units)",
            [point(x, (512 if x < 256 else 256) // share, width=x, samples=2**13 // share) for x in some((16, 64, 256, 512))],
        ),
        Axis(
            "depth",
            "Depth: hidden layers of 64, batches of 32",
            "hidden layers",
            [point(x, (512 if x < 8 else 256) // share, hidden=x, samples=2**13 // share) for x in some((1, 2, 4, 8, 16, 32))],
        ),
        Axis(
            "steps",
            "Steps of one fit: MLP 32-64-64-10, batches of 32, epochs of at most 512 steps",
            "steps of one fit",
            [steps_of(x) for x in some((16, 64, 256, 1024, 4096))],
        ),
        Axis(
            "dataset",
            "Dataset: MLP 16-64-64-10, batches of 256",
            "samples of the dataset",
            [point(2**x, 1024 // share, batch=256, samples=2**x, features=16) for x in some((12, 14, 16, 18, 20))],
        ),
        Axis(
            "metrics",
            f"Metrics: MLP 32-64-64-10, batches of 32; the first of\n{', '.join(METRICS)}",
            "metrics computed",
            [with_metrics(METRICS[:x], 512 // share) for x in some((0, 1, 2, 4, 8))],
            log=False,
        ),
    ]
    return {axis.name: axis for axis in made}


# Metrics: by hand, by torchmetrics, by axontrain


def with_metrics(names: tuple[str, ...], steps: int) -> Point:
    """A point of the axis of metrics."""
    return point(
        len(names),
        steps,
        accuracy=False,
        by_hand={"sums": lambda job: by_hand(job, Sums(names))},
        samples=32 * steps,
        others={
            TORCHMETRICS: lambda job: by_hand(job, Collection(names)),
            OURS: lambda job: by_axontrain(job, list(names)),
        },
    )


class Sums:
    """Metrics as an expert writes them: a count of hits, or one matrix of counts for all that can be derived from it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.alone = tuple(names) == ("accuracy",)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.right, self.top = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
        self.counts = torch.zeros(CLASSES**2, dtype=torch.long)

    def update(self, logits: Tensor, y: Tensor) -> None:
        """Take a batch in."""
        if not self.names:
            return
        if self.alone:
            self.right += (logits.argmax(1) == y).sum()
            return
        self.counts += torch.bincount(y * CLASSES + logits.argmax(1), minlength=CLASSES**2)
        if "top5" in self.names:
            self.top += (logits.topk(5, 1).indices == y[:, None]).sum()

    def compute(self) -> dict[str, Any]:
        """Derive them all from the counts, and read the ones that are wanted."""
        if self.alone:
            return {"accuracy": self.right}
        matrix = self.counts.view(CLASSES, CLASSES).double()
        hits, true, predicted, total = matrix.diag(), matrix.sum(1), matrix.sum(0), matrix.sum()
        every = {
            "accuracy": hits.sum() / total,
            "f1": (2 * hits / (true + predicted)).mean(),
            "top5": self.top / total,
            "confusion_matrix": matrix,
            "precision": (hits / predicted).mean(),
            "recall": (hits / true).mean(),
            "dice": hits.sum() / total,
            "iou": (hits / (true + predicted - hits)).mean(),
        }
        return {name: every[name] for name in self.names}


class Collection:
    """The same by torchmetrics, updated at every step; its MetricCollection computes once what several need."""

    def __init__(self, names: Sequence[str]) -> None:
        import torchmetrics
        from torchmetrics import classification as of

        makers: dict[str, Callable[[], torchmetrics.Metric]] = {
            "accuracy": lambda: of.MulticlassAccuracy(CLASSES, average="micro"),
            "f1": lambda: of.MulticlassF1Score(CLASSES),
            "top5": lambda: of.MulticlassAccuracy(CLASSES, top_k=5, average="micro"),
            "confusion_matrix": lambda: of.MulticlassConfusionMatrix(CLASSES),
            "precision": lambda: of.MulticlassPrecision(CLASSES),
            "recall": lambda: of.MulticlassRecall(CLASSES),
            "dice": lambda: of.MulticlassF1Score(CLASSES, average="micro"),
            "iou": lambda: of.MulticlassJaccardIndex(CLASSES),
        }
        self.metrics = torchmetrics.MetricCollection({name: makers[name]() for name in names}) if names else None

    def reset(self) -> None:
        """Begin anew."""
        if self.metrics is not None:
            self.metrics.reset()

    def update(self, logits: Tensor, y: Tensor) -> None:
        """Take a batch in."""
        if self.metrics is not None:
            self.metrics.update(logits.detach(), y)

    def compute(self) -> dict[str, Any]:
        """The values."""
        return {} if self.metrics is None else self.metrics.compute()


def by_hand(job: Job, metrics: Sums | Collection) -> Fit:
    """The loop over tensors with these metrics."""
    optimizer, (x, y), size = job.optimizer(), job.train, job.work.batch_size

    def fit() -> dict[str, Any]:
        read: dict[str, Any] = {}
        for _ in range(job.epochs):
            job.model.train()
            metrics.reset()
            loss_sum = torch.zeros(())
            for index in torch.randperm(len(x)).split(size):
                inputs, targets = x.index_select(0, index), y.index_select(0, index)
                logits = job.model(inputs)
                loss = F.cross_entropy(logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum.add_(loss.detach(), alpha=len(targets))
                metrics.update(logits, targets)
            read = {name: value.tolist() for name, value in metrics.compute().items()}
            read["loss"] = loss_sum.item() / len(x)
        if "accuracy" in read:
            read["accuracy"] /= len(x) if isinstance(metrics, Sums) and metrics.alone else 1
        return read

    return fit


def by_axontrain(job: Job, names: list[str]) -> Fit:
    """A Loop with these metrics."""
    loop = ax.Loop(
        axontrain.Classifier(job.model),
        ax.Optimizer(job.work.optimizer, lr=job.work.lr),
        metrics=names or None,
        device="cpu",
        progress=False,
        seed=0,
    )
    train = ax.ArrayDataset(*job.train)

    def fit() -> dict[str, Any]:
        values = loop.fit(train, epochs=job.epochs, batch_size=job.work.batch_size).values
        return {name: values[f"train/{name}"] for name in (*names, "loss")}

    return fit


# Measuring


def measure(at: Point, rounds: int) -> Measured:
    """Let all contenders of a point take turns."""
    contenders = at.by_hand | at.others
    us: dict[str, list[float]] = {name: [] for name in contenders}
    wall_us: dict[str, list[float]] = {name: [] for name in contenders}
    ends: dict[str, tuple[float, dict[str, Any]]] = {}
    order, data, steps = random.Random(at.x), at.work.data(), at.steps * at.fits
    for turn in range(rounds + 1):
        gc.collect()
        for name in order.sample(list(contenders), len(contenders)):
            seconds = wall = 0.0
            for _ in range(at.fits):
                job = make_job(at.work, data)
                fit = contenders[name](job)
                begun, used = time.perf_counter(), time.process_time()
                tracked = fit()
                seconds += time.process_time() - used
                wall += time.perf_counter() - begun
            if turn:
                us[name].append(1e6 * seconds / steps)
                wall_us[name].append(1e6 * wall / steps)
            elif name not in ends:
                ends[name] = judge(job)[0], tracked
    fastest = min(at.by_hand, key=lambda name: median(us[name]))
    return Measured(at.x, fastest, us, wall_us, disagreement(ends, fastest, at.work.tolerance))


def disagreement(ends: dict[str, tuple[float, dict[str, Any]]], against: str, tolerance: float) -> str:
    """Say who has not done the same training as that one, and by what it shows; empty if all have.

    The tolerance is of the loss; of 1, for metrics, which are shares of it; and of the largest, for counts.
    """
    loss, tracked = ends[against]
    for name, (its_loss, its) in ends.items():
        if not math.isclose(its_loss, loss, rel_tol=tolerance):  # NaN differs
            return f"differs: {name} {its_loss:.4f}, {against} {loss:.4f}"
        for metric, value in tracked.items():
            ours, theirs = _numbers(its.get(metric)), _numbers(value)
            scale = max(1.0, *map(abs, theirs))
            if len(ours) != len(theirs) or not all(abs(a - b) <= tolerance * scale for a, b in zip(ours, theirs, strict=True)):
                return f"differs: {metric} of {name}"
    return ""


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [] if value is None else [float(value)]


# Showing


def rows(found: list[Measured], others: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The header and a row for each point."""
    header = ["fastest by hand", "µs by hand", *(f"µs {name}" for name in others)]
    header += [f"{name} (min–max)" for name in others] + [f"wall, {name}" for name in others] + ["losses"]
    body = []
    for at in found:
        ratios = [at.ratios(name) for name in others]
        body.append(
            [
                f"{at.x:,}",
                at.hand,
                *(f"{median(at.us[name]):.0f}" for name in (at.hand, *others)),
                *(f"{median(each):.2f} ({min(each):.2f}–{max(each):.2f})" for each in ratios),
                *(f"{median(at.wall_ratios(name)):.2f}" for name in others),
                at.disagreement or "agree",
            ]
        )
    return header, body


def draw(axis: Axis, found: list[Measured], others: Sequence[str], path: Path) -> None:
    """Write an axis as a picture: µs a step above, ratios below.

    Raises:
        MissingExtraError: without matplotlib, the extra ``plot``.
    """
    figure = require("matplotlib.figure", "plot", "a picture of the costs").Figure(figsize=(6.4, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    x = [at.x for at in found]
    for name in ("by hand", *others):
        us = [at.us[at.hand if name == "by hand" else name] for at in found]
        _line(above, x, us, name)
        if name != "by hand":
            _line(below, x, [at.ratios(name) for at in found], name)
    below.axhline(1.0, color=COLOURS["by hand"], linewidth=1)
    if axis.log:
        below.set_xscale("log", base=2)
        below.xaxis.set_major_formatter(_as_in_tables)
    below.set_xticks(x)
    every = [each for at in found for of_one in at.us.values() for each in of_one]
    if max(every) < WIDE * min(every):  # what is all but flat is to look so
        above.set_ylim(bottom=0)
    else:
        above.set_yscale("log")
        above.yaxis.set_major_formatter(_as_in_tables)
        above.yaxis.set_minor_formatter(lambda value, _: _as_in_tables(value) if f"{value:e}"[0] in "25" else "")
    above.set_title(axis.title, fontsize=10)
    above.set_ylabel("µs a step, of the CPU")
    below.set_ylabel("ratio to by hand")
    below.set_xlabel(axis.label)
    above.legend()
    for panel in (above, below):
        panel.grid(alpha=0.3, which="both")
    figure.savefig(path, format="png", dpi=90)


def _as_in_tables(value: float, _: object = None) -> str:
    return f"{value:,.0f}"


def _line(panel: Any, x: list[int], of_rounds: list[list[float]], name: str) -> None:
    middle = [median(each) for each in of_rounds]
    low = [at - min(each) for at, each in zip(middle, of_rounds, strict=True)]
    high = [max(each) - at for at, each in zip(middle, of_rounds, strict=True)]
    panel.errorbar(x, middle, yerr=[low, high], marker="o", markersize=3, capsize=3, label=name, color=COLOURS[name])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, draw, and return 1 if a contender has not done the same training."""
    given = _arguments(arguments)
    require("matplotlib.figure", "plot", "benchmarks.growth, which draws,")  # before minutes have passed
    torch.set_num_threads(1)
    begun, every = time.monotonic(), axes(given.quick)
    given.out.mkdir(parents=True, exist_ok=True)
    about = f"torch {torch.__version__}", f"{os.cpu_count()} cores, one thread used", f"rounds: {given.rounds}; medians."
    print(report.heading("growth", *about, arguments=arguments))
    same = True
    for name in given.only:
        axis = every[name]
        others = list(axis.points[0].others)
        found = [measure(at, given.rounds) for at in axis.points]
        header, body = rows(found, others)
        title = axis.title.replace("\n", " ")
        print(f"\n{'**' + title + '**' if given.markdown else title}\n")
        print(report.table([axis.label, *header], body, markdown=given.markdown), flush=True)
        draw(axis, found, others, given.out / f"{name}.png")
        same = same and not any(at.disagreement for at in found)
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes; pictures in {given.out}", file=sys.stderr)
    return 0 if same else 1


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = list(axes(quick=True))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plots"), metavar="FOLDER", help="where pictures go")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, help="9 unless given, 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="two sizes of each axis, and fewer steps")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    given = parser.parse_args(arguments)
    given.rounds = given.rounds or (2 if given.quick else 9)
    return given


if __name__ == "__main__":
    sys.exit(main())
