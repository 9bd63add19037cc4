"""Optimizers that keep an average by themselves: trained at one point, evaluated, saved and exported at another."""

import math
import sys

import pytest
import schedulefree
import torch
import torch.nn.functional as F
from resume_runs import flat, same
from torch import nn

import axontrain as ax

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
DATA = ax.ArrayDataset(X, (X.sum(1) > 0).long())
NAMES = ("adamwschedulefree", "radamschedulefree", "sgdschedulefree")


class Net(ax.Objective):
    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def predict(self, x):
        return self.net(x)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def loop_of(name="adamwschedulefree", directory=None, **options):
    lr = 1.0 if name.startswith("sgd") else 0.01
    return ax.Loop(Net(), ax.Optimizer(name, lr=lr, **options), progress=False, directory=directory)


def by_hand(kind, lr):
    """The package's own use: train() before training, eval() before looking."""
    net = Net()
    net.net[2].p = 0.0
    optimizer = kind(net.parameters(), lr=lr)
    optimizer.train()
    for epoch in range(3):
        for rows in ax.order(0, epoch, len(DATA)).split(8):
            x, y = DATA.gather(rows)
            net.loss(net.predict(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.eval()
    return net


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("validate", [False, True])
def test_it_is_what_the_package_does_by_hand_however_often_one_looks(name, validate):
    loop = loop_of(name)
    loop.objective.net[2].p = 0.0
    if validate:

        @loop.on("after_batch")
        def look(state):
            loop.evaluate(DATA)
            loop.save()

    loop.fit(DATA, epochs=3, batch_size=8, **({"validation": DATA, "validate": "2 steps"} if validate else {}))
    kind = next(getattr(schedulefree, one) for one in dir(schedulefree) if one.lower() == name)
    hand = by_hand(kind, 1.0 if name.startswith("sgd") else 0.01)
    for (where, mine), theirs in zip(loop.objective.named_parameters(), hand.parameters(), strict=True):
        assert torch.equal(mine, theirs), where


def test_what_is_evaluated_saved_and_exported_is_the_average(tmp_path):
    loop = loop_of(directory=tmp_path)
    loop.callbacks.append(ax.Checkpoint(every="1 epoch"))
    result = loop.fit(DATA, DATA, epochs=2, batch_size=8)
    assert loop.evaluate(DATA, batch_size=8)["loss"] == result.values["val/loss"]
    plain = Net()
    ax.load_weights(plain, tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, loop.objective.state_dict()[name]), name
    training = loop.save()["optimizers"]["main"]["average"]["raw"]
    assert not torch.equal(training["net.0.weight"], plain.net[0].weight), "the point of training is another"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, name, step):
    fit = {"epochs": 2, "batch_size": 8, "validate": "3 steps"}
    whole = loop_of(name, tmp_path / "whole")
    result = whole.fit(DATA, DATA, **fit)
    broken = loop_of(name, tmp_path / "run")
    broken.on("after_batch")(lambda state: ax.Stop("enough") if state.step == step else None)
    broken.fit(DATA, DATA, **fit)
    again = loop_of(name, tmp_path / "run")
    found = again.fit(DATA, DATA, **fit, resume=True)
    one, other = (
        {key: leaf for key, leaf in flat(loop.save()).items() if "elapsed" not in key and "example" not in key}
        for loop in (whole, again)
    )
    assert one.keys() == other.keys()
    assert [key for key in one if not same(one[key], other[key])] == [], "bit for bit"
    assert found.values == result.values


def test_a_second_fit_goes_on_from_where_it_trained():
    whole, parts = loop_of(), loop_of()
    whole.fit(DATA, epochs=2, batch_size=8)
    parts.fit(DATA, epochs=1, batch_size=8)
    parts.fit(DATA, epochs=1, batch_size=8)
    for mine, theirs in zip(parts.objective.parameters(), whole.objective.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_that_somebody_changed_are_an_error():
    loop = loop_of()
    loop.fit(DATA, epochs=1, batch_size=8)
    loop.objective.load_state_dict(Net().state_dict())
    with pytest.raises(ax.ConfigurationError, match="goes on from its own average of them: make a new Loop"):
        loop.fit(DATA, epochs=1, batch_size=8)


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_update_changes_nothing(name):
    good, bad = DATA.gather(torch.arange(8)), (torch.full((8, 6), math.nan), torch.zeros(8).long())
    loops = [loop_of(name) for _ in range(2)]
    loops[0].fit([good] * 4, epochs=1)
    with pytest.warns(ax.NonFiniteWarning, match="2 updates"):
        loops[1].fit([good, bad, good, good, bad, good], epochs=1)
    loops[0].objective.net[2].p = loops[1].objective.net[2].p = 0.0
    states = [loop.save()["optimizers"]["main"]["optimizers"][0]["groups"][0] for loop in loops]
    assert states[0]["k"] == states[1]["k"] == 4
    assert states[0]["weight_sum"] == states[1]["weight_sum"]


def test_it_trains_a_part_beside_another_algorithm():
    spec = ax.Optimizer("adamwschedulefree", lr=0.01, groups={"net.3.*": {"optimizer": "sgd", "lr": 0.1}})
    loop = ax.Loop(Net(), spec, progress=False)
    loop.fit(DATA, epochs=1, batch_size=8)
    assert sorted(loop.save()["optimizers"]["main"]["average"]["raw"]) == ["net.0.bias", "net.0.weight"]


def test_another_average_beside_it_is_refused():
    with pytest.raises(ax.ConfigurationError, match="AdamWScheduleFree, which keeps one by itself"):
        loop_of(average="ema")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ax.MissingExtraError, match=r"'adamwschedulefree' needs schedulefree.*axontrain\[schedulefree\]"):
        ax.Optimizer("adamwschedulefree", lr=0.1)
    with pytest.raises(ax.UnknownNameError, match="adamwschedulefree"):
        ax.Optimizer("adamwschedulefre", lr=0.1)
