"""On a GPU: it learns there, the data may live there, and no step waits for the device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax
from axontrain.execution.steps import runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]


class Digits(ax.Objective):
    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def predict(self, images):
        return self.net(images)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def made(**options):
    torch.manual_seed(0)
    optimizer = ax.Optimizer("adamw", lr=3e-3, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="5%"), **options)
    return ax.Loop(Digits(), optimizer, progress=False)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_it_learns_with_data_on_either_device(where):
    train, test = (part.to(where) for part in ax.data.digits())
    loop = made()
    result = loop.fit(train, test, epochs=5, batch_size=64)
    assert next(loop.objective.parameters()).is_cuda
    assert result.values["val/accuracy"] > 0.9
    assert loop.predict(test).device.type == "cpu"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "muon"])
def test_no_step_waits_for_the_device(optimizer):
    class Bare(Digits):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False))

    loop = ax.Loop(Bare(), ax.Optimizer(optimizer, lr=1e-3, clip_norm=1.0), progress=False)
    train = ax.data.digits()[0].to("cuda")
    train_step = runner(loop.state, None)
    batches = list(ax.Loader(train, 64))[:12]
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("default" if number < 2 else "error")  # the first make state and handles
        try:
            step = train_step(batch)
            loop.state.meter.record(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loop.state.read()["train/loss"] > 0


def test_a_run_does_not_depend_on_where_its_data_lie():
    states = []
    for where in ("cpu", "cuda"):
        loop = made()
        loop.fit(ax.data.digits()[0].to(where), epochs=2, batch_size=64)
        states.append(loop.objective.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_skipped_updates_change_nothing_on_the_device():
    loop = made()
    good = tuple(part.cuda() for part in ax.data.digits()[0].gather(torch.arange(64)))
    bad = (torch.full_like(good[0], float("nan")), good[1])
    loop = ax.Loop(Digits(), ax.Optimizer("adamw", lr=3e-3), progress=False)
    loop.train_on_batch(good)
    before = loop.save()
    assert float(loop.train_on_batch(bad).skipped) > 0
    after = loop.save()
    assert all(torch.equal(before["objective"][name], after["objective"][name]) for name in before["objective"])
