"""What a step of fit costs may not grow: counted, as a machine that is busy counts the same.

Each workload is fitted in earnest, with its data, recording and hooks; the difference of a long and a short fit leaves out what
is done once. A number that has fallen for good is lowered in COSTS, by hand: it is what the next change is held to.
"""

import re
import sys

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import axontrain as ax
from axontrain.execution import compiled, run
from axontrain.execution.counting import Calls, Operations

SHORT, LONG, ROWS = 20, 60, 32  # steps, and samples in each
MEASURED = ("2.13", "3.11")  # of torch and Python: others have other calls and operators within themselves
OURS = ("own", "frames", "host_reads", "graphs", "breaks")  # whichever they are

OF_TORCH = ("operators", "copies", "allocations", "allocated_bytes", "host_reads")
# Per step, at most. own: calls of axontrain's functions; python: of any; builtin: of compiled ones. The rest is as in ax.Audit,
# but that graphs, which are made after the first fit, and breaks are of all steps together.
NAMES = (
    "own", "python", "builtin", "frames", "operators", "copies", "allocations", "allocated_bytes", "host_reads", "graphs",
    "breaks",
)  # fmt: skip
COSTS = {
    "linear, sgd":                     ( 32,  90, 104,   3,  21,   0,   9,  5962,   0,   0,   0),
    "dense, adamw, accuracy":          ( 40, 133, 167,   3,  43,   2,  17, 17486,   0,   0,   0),
    "dense, adamw, clip_norm, cosine": ( 47, 142, 163,   3,  53,   1,  32, 16206,   0,   0,   0),
    "convolution, batchnorm, sgd":     ( 63, 186, 210,   3,  50,   6,  25, 18531,   0,   0,   0),
    "dense, adamw, ema":               ( 45, 147, 173,   4,  48,   1,  24, 18415,   0,   0,   0),
    "compiled, sgd":                   ( 32, 135, 157,   3,  37,   0,  15, 16138,   0,   0,   0),
    "one graph, adamw, accuracy":      ( 35,  53,  62,   0,  43,   2,  17, 17486,   0,   0,   0),
    "two optimizers":                  ( 47, 289, 298,   3,  78,   0,  37, 16090,   0,   0,   0),
}  # fmt: skip


class Adversaries(ax.Objective):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = nn.Linear(4, 32), nn.Linear(32, 1)

    def train_step(self, batch):
        real = batch[0]
        fake = self.generator(real[:, :4])
        yield "discriminator", (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake.detach()))).mean()
        yield "generator", F.softplus(-self.discriminator(fake)).mean()


class Images(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    def predict(self, x):
        return self.net(x.view(-1, 2, 4, 4))

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def dense():
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))


WORKLOADS = {
    "linear, sgd": lambda: (ax.Supervised(nn.Linear(32, 2), "cross_entropy"), ax.Optimizer("sgd", lr=0.1)),
    "dense, adamw, accuracy": lambda: (
        ax.Supervised(dense(), "cross_entropy", metrics=["accuracy"]),
        ax.Optimizer("adamw", lr=1e-3),
    ),
    "dense, adamw, clip_norm, cosine": lambda: (
        ax.Supervised(dense(), "cross_entropy"),
        ax.Optimizer("adamw", lr=1e-3, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="10%")),
    ),
    "convolution, batchnorm, sgd": lambda: (Images(), ax.Optimizer("sgd", lr=0.1, momentum=0.9)),
    "dense, adamw, ema": lambda: (ax.Supervised(dense(), "cross_entropy"), ax.Optimizer("adamw", lr=1e-3, average="ema")),
    "compiled, sgd": lambda: (
        ax.Supervised(torch.compile(dense(), backend="eager"), "cross_entropy"),
        ax.Optimizer("sgd", lr=0.1),
    ),
    "one graph, adamw, accuracy": lambda: (
        ax.Supervised(dense(), "cross_entropy", metrics=["accuracy"]),
        ax.Optimizer("adamw", lr=1e-3, schedule=ax.schedules.cosine()),
        {"compile": True},  # under a mode that counts operators it is done in eager
    ),
    "two optimizers": lambda: (
        Adversaries(),
        {name: ax.Optimizer("adam", lr=1e-3) for name in ("generator", "discriminator")},
    ),
}


class Looking(ax.Callback):
    """A hook of somebody's, as there is in most fits."""

    def after_batch(self, state):
        self.last = state.last


def samples(steps):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * steps, 32, generator=generator)
    return ax.ArrayDataset(x, (x[:, 0] > 0).long())


def costs(workload, *callbacks):
    """What a step costs, by name."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # once anything was compiled, torch makes more calls by itself
    breaks = compiled.breaks()
    objective, optimizer, *options = WORKLOADS[workload]()
    callbacks = [Looking(), *callbacks]
    loop = ax.Loop(objective, optimizer, device="cpu", progress=False, callbacks=callbacks, **(options or [{}])[0])
    short, long = samples(SHORT), samples(LONG)

    def fitted(data, counter):
        with counter:
            loop.fit(data, epochs=1, batch_size=ROWS)
        return counter

    for data in (short, long):  # builds metrics and the optimizer's state, compiles, and fills Python's own caches
        fitted(data, Calls())
    graphs = compiled.graphs()
    few, many = fitted(short, Calls()), fitted(long, Calls())
    graphs, breaks = compiled.graphs() - graphs, compiled.breaks() - breaks
    with compiled.uncompiled():
        few_of_torch, many_of_torch = fitted(short, Operations()), fitted(long, Operations())

    def per_step(name, few, many):
        return (getattr(many, name) - getattr(few, name)) / (LONG - SHORT)

    return {
        **{name: per_step(name, few, many) for name in ("own", "python", "builtin")},
        "frames": many.frames,
        **{name: per_step(name, few_of_torch, many_of_torch) for name in OF_TORCH},
        "graphs": graphs,
        "breaks": breaks,
    }


def grown(workload, found):
    """What has grown, in words."""
    here = (".".join(torch.__version__.split(".")[:2]), ".".join(map(str, sys.version_info[:2])))
    names = NAMES if here == MEASURED else OURS
    most = dict(zip(NAMES, COSTS[workload], strict=True))
    return [f"{name} of {workload!r} grew from {most[name]} to {found[name]:g}" for name in names if found[name] > most[name]]


@pytest.fixture(autouse=True)
def no_reading_by_time(monkeypatch):
    # So that a slow machine makes no more readings than a fast one.
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 1e9)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_step_costs_no_more_than_it_did(workload):
    more = grown(workload, costs(workload))
    assert not more, (
        f"{'; '.join(more)}, a step. Find what is done anew at each step and do it once, or, if it is worth that, write "
        f"the new number into COSTS of tests/test_costs.py and say why; a number that has fallen is lowered there too"
    )


class Reading(ax.Callback):
    """Costs what a step should not."""

    def after_batch(self, state):
        state.last.loss.item()
        state.last.loss.clone()


def test_a_step_that_costs_more_is_told():
    told = "; ".join(grown("linear, sgd", costs("linear, sgd", Reading(), ax.LearningRate(every=1))))
    assert "host_reads of 'linear, sgd' grew from 0 to 1" in told
    most = dict(zip(NAMES, COSTS["linear, sgd"], strict=True))
    assert re.search(rf"own of 'linear, sgd' grew from {most['own']} to (\d+)", told)
    assert "frames" not in told


class Broken(nn.Linear):
    """One graph, where it could be none that is broken."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class Remade(nn.Module):
    """Calls what is compiled with ever more dimensions: one graph in the first two fits, another in those that are counted."""

    def __init__(self):
        super().__init__()
        self.net, self.steps = torch.compile(nn.Linear(32, 2), backend="eager"), 0

    def forward(self, x):
        more, self.steps = self.steps // (SHORT + LONG), self.steps + 1
        return self.net(x.view(*[1] * more, *x.shape)).view(-1, 2)


@pytest.mark.parametrize(
    ("name", "net"), [("breaks", lambda: torch.compile(Broken(32, 2), backend="eager")), ("graphs", Remade)]
)
def test_a_graph_that_is_broken_or_made_anew_is_told(name, net, monkeypatch):
    made = {"compiled, sgd": lambda: (ax.Supervised(net(), "cross_entropy"), ax.Optimizer("sgd", lr=0.1))}
    monkeypatch.setattr(f"{__name__}.WORKLOADS", WORKLOADS | made)
    assert f"{name} of 'compiled, sgd' grew from 0 to 1" in "; ".join(grown("compiled, sgd", costs("compiled, sgd")))
