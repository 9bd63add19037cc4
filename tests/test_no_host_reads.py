"""Between readings nothing waits for the device: a read of one number a step would cost more than the step."""

import io
import math

import pytest
import torch
from torch import nn

import axontrain as ax
from axontrain.execution import run
from axontrain.execution.reads import HostReads

OPTIMIZERS = {
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "adam": ("adam", {}),
    "adamw": ("adamw", {}),
    "adagrad": ("adagrad", {}),
    "rmsprop": ("rmsprop", {}),
    "adadelta": ("adadelta", {}),
    "muon": ("muon", {}),
}


NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("adam", "adagrad", "rmsprop", "adadelta") else name
    for name in OPTIMIZERS
]


class Reads(HostReads):
    """Counts host reads: all of them, and those within a training step."""

    def __init__(self):
        super().__init__(self._count)
        self.all = self.within = 0
        self.inside = False

    def _count(self, word):
        self.all += 1
        self.within += self.inside


class Steps(ax.Callback):
    """Marks what lies within a step: from before a batch is trained on until after it was recorded."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def before_batch(self, state):
        self.reads.inside = True

    def after_batch(self, state):
        self.reads.inside = False


@pytest.fixture
def reads(monkeypatch):
    # So that a slow machine makes no more readings than a fast one.
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 1e9)
    return Reads()


def dense(bias=True):
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias))


def noisy():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def samples(batches, rows=4):
    return ax.ArrayDataset(torch.randn(batches * rows, 6), torch.randint(3, (batches * rows,)))


def counted(reads, net, spec, batches, *, progress=True, validation=None, metrics=("accuracy",)):
    loop = ax.Loop(
        ax.Supervised(net, "cross_entropy", metrics=list(metrics)),
        spec,
        device="cpu",
        progress=False,
        callbacks=[Steps(reads), *([ax.ProgressBar("terminal", stream=io.StringIO())] if progress else [])],
    )
    data = samples(batches)
    loop.fit(data, validation, epochs=1, batch_size=4)  # builds metrics and optimizer state
    before, reads.within = reads.all, 0
    with reads:
        loop.fit(data, validation, epochs=1, batch_size=4)
    assert loop.state.step == 2 * batches
    return reads.all - before, reads.within


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bound", [{"clip_norm": 1.0}, {"clip_value": 0.1}], ids=["norm", "value"])
def test_training_reads_as_often_in_a_long_epoch_as_in_a_short_one(reads, name, bound):
    factory, options = OPTIMIZERS[name]
    spec = ax.Optimizer(factory, lr=0.01, schedule=ax.schedules.cosine(warmup="10%"), **bound, **options)
    short, within_short = counted(reads, dense(bias=name != "muon"), spec, 20)
    long, within_long = counted(reads, dense(bias=name != "muon"), spec, 60)
    assert 0 < short == long
    assert within_short == within_long == 0


@pytest.mark.parametrize("name", NAMES)
def test_updates_within_backward_read_nothing(reads, name):
    factory, options = OPTIMIZERS[name]
    spec = ax.Optimizer(factory, lr=0.01, clip_value=0.1, in_backward=True, **options)
    short, _ = counted(reads, dense(bias=name != "muon"), spec, 20)
    long, within = counted(reads, dense(bias=name != "muon"), spec, 60)
    assert 0 < short == long
    assert within == 0


@pytest.mark.parametrize("average", ["ema", ax.averages.swa(0, every=1)], ids=["ema", "swa"])
def test_averages_read_nothing(reads, average):
    spec = ax.Optimizer("adamw", lr=0.01, average=average)
    short, _ = counted(reads, noisy(), spec, 20)
    long, within = counted(reads, noisy(), spec, 60)
    assert 0 < short == long
    assert within == 0


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_batchnorm_and_dropout_read_nothing(reads, name):
    spec = ax.Optimizer(name, lr=0.01)
    short, _ = counted(reads, noisy(), spec, 20)
    long, within = counted(reads, noisy(), spec, 60)
    assert 0 < short == long
    assert within == 0


@pytest.mark.parametrize("schedule", [torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.OneCycleLR])
def test_torch_schedulers_read_nothing(reads, schedule):
    options = {"step_size": 3} if schedule is torch.optim.lr_scheduler.StepLR else {"max_lr": 0.1, "total_steps": 200}
    spec = ax.Optimizer("adamw", lr=0.01, schedule=lambda optimizer: schedule(optimizer, **options))
    short, _ = counted(reads, dense(), spec, 20)
    long, within = counted(reads, dense(), spec, 60)
    assert 0 < short == long
    assert within == 0


def test_validation_reads_as_often_over_much_data_as_over_little(reads):
    spec = ax.Optimizer("adamw", lr=0.01)
    metrics = ["accuracy", "f1", "auroc", "confusion_matrix"]
    short, _ = counted(reads, dense(), spec, 20, validation=samples(10), metrics=metrics)
    long, within = counted(reads, dense(), spec, 20, validation=samples(50), metrics=metrics)
    assert 0 < short == long
    assert within == 0


@pytest.mark.parametrize("batches", [40, 300], ids=["few", "more than a fold"])
def test_evaluate_reads_as_often_over_much_data_as_over_little(reads, batches):
    metrics = ["accuracy", "f1", "auroc", "confusion_matrix", "perplexity"]
    loop = ax.Loop(ax.Supervised(noisy(), "cross_entropy", metrics=metrics), device="cpu", progress=False)
    loop.evaluate(samples(2), batch_size=4)

    def of(data):
        before = reads.all
        with reads:
            loop.evaluate(data, batch_size=4)
        return reads.all - before

    assert 0 < of(samples(10)) == of(samples(batches))


def test_own_loop_reads_nothing_until_it_asks(reads, monkeypatch):
    monkeypatch.setattr("axontrain.loop.READ_EVERY_SECONDS", math.inf)  # what was skipped is asked for now and then
    loop = ax.Loop(ax.Supervised(noisy(), "cross_entropy"), ax.Optimizer("adamw", lr=0.01, clip_norm=1.0), progress=False)
    batch = (torch.randn(4, 6), torch.randint(3, (4,)))
    loop.train_on_batch(batch)
    with reads:
        for _ in range(30):
            step = loop.train_on_batch(batch)
        assert reads.all == 0
        float(step.loss)
    assert reads.all == 1


def test_a_skipped_update_is_not_read_within_the_step(reads):
    spec = ax.Optimizer("rmsprop", lr=0.01)
    loop = ax.Loop(
        ax.Supervised(noisy(), "cross_entropy", metrics=["accuracy"]), spec, progress=False, callbacks=[Steps(reads)]
    )
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(6)]
    batches[3] = (batches[3][0] * float("nan"), batches[3][1])
    with pytest.warns(ax.NonFiniteWarning), reads:
        loop.fit(batches, epochs=1)
    assert reads.within == 0
