"""What the design promises of the loop's shape: few frames, few calls, and a file that is read in half an hour."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frames import watched
from torch import nn

import axontrain as ax


class Linear(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(32, 2)

    def predict(self, inputs):
        return self.net(inputs)

    def loss(self, predictions, targets):
        return F.cross_entropy(predictions, targets)


class Normed(Linear):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


class TwoLosses(Linear):
    def train_step(self, batch):
        inputs, targets = batch
        yield "net", self.loss(self.predict(inputs), targets)
        yield "net", self.loss(self.predict(inputs), targets)


def samples(batches):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32 * batches, 32, generator=generator)
    return ax.ArrayDataset(x, (x[:, 0] > 0).long())


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [
        (Linear, ax.Optimizer("sgd", lr=0.1)),
        (Normed, ax.Optimizer("adamw", lr=0.1, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="5%"))),
        (TwoLosses, {"net": ax.Optimizer("sgd", lr=0.1)}),
    ],
)
@pytest.mark.parametrize("how", ["fit", "steps"])
def test_three_frames_lie_between_fit_and_backward(objective, optimizer, how, monkeypatch):
    seen = watched(monkeypatch)
    loop = ax.Loop(objective(), optimizer, progress=True, callbacks=[ax.LearningRate(every=1)])
    if how == "fit":
        loop.fit(samples(4), samples(1), epochs=1)
    else:
        list(loop.steps(samples(4), samples(1), epochs=1))

    assert seen
    for names in seen:
        assert len(names) <= 3, names
        assert names[-1] == ("fit" if how == "fit" else "_stepping")


def python_calls(function):
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def by_hand(data, epochs):
    """The loop that the comparison is with: fused SGD, the mean loss tracked on the device."""
    x, y = data.tensors
    model = nn.Linear(32, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    total = torch.zeros(())
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x), 32):
            rows = order[start : start + 32]
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
    return total.item() / (epochs * len(x))


def test_a_step_makes_at_most_fifteen_python_calls_more_than_by_hand():
    # The difference of two lengths leaves out what is done once a fit or an epoch.
    short, long = samples(20), samples(70)
    loop = ax.Loop(Linear(), ax.Optimizer("sgd", lr=0.1), progress=False)
    loop.fit(short, epochs=1)
    by_hand(short, 1)

    ours = python_calls(lambda: loop.fit(long, epochs=1)) - python_calls(lambda: loop.fit(short, epochs=1))
    hand = python_calls(lambda: by_hand(long, 1)) - python_calls(lambda: by_hand(short, 1))

    assert ours / 50 <= hand / 50 + 15


def test_hooks_that_nobody_overrides_cost_nothing():
    class Silent(ax.Callback):
        """Overrides nothing."""

    def calls(callbacks):
        loop = ax.Loop(Linear(), ax.Optimizer("sgd", lr=0.1), callbacks=callbacks, progress=False)
        loop.fit(samples(1), epochs=1)
        short, long = samples(10), samples(60)
        return python_calls(lambda: loop.fit(long, epochs=1)) - python_calls(lambda: loop.fit(short, epochs=1))

    # A single call for each of them at each step would be 20 × 50; Python's own caches account for a few.
    assert calls([Silent() for _ in range(20)]) - calls([]) < 200


def test_the_algorithm_is_short_enough_to_read():
    source = Path(sys.modules["axontrain.loop"].__file__).read_text()
    start = source.index("    def _algorithm(")
    end = source.index("    def evaluate(", start)
    assert source[start:end].count("\n") <= 50
