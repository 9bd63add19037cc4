"""Freeze and Unfreeze: what is trained from when on, and that nobody's optimizer state is lost by it."""

import itertools

import pytest
import torch
from torch import nn

import axontrain as ax


def table(n=40):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


TRAIN = table()


def loop_of(*callbacks, directory=None, start=0):
    torch.manual_seed(start)
    net = nn.Sequential()
    net.add_module("backbone", nn.Linear(6, 8))
    net.add_module("relu", nn.ReLU())
    net.add_module("head", nn.Linear(8, 2))
    optimizer = ax.Optimizer("adamw", lr=0.05)
    loop = ax.Loop(ax.Supervised(net, "cross_entropy"), optimizer, callbacks=callbacks, progress=False, directory=directory)
    seen = [loop.objective.model.backbone.weight.detach().clone()]
    loop.on("after_batch")(lambda state: seen.append(state.objective.model.backbone.weight.detach().clone()) or None)
    return loop, seen


def moved(seen):
    return [not torch.equal(one, other) for one, other in itertools.pairwise(seen)]


@pytest.mark.parametrize("at", ["1 epoch", 5, "50%", "40 samples"])
def test_what_is_unfrozen_is_trained_from_there_on(at):
    loop, seen = loop_of(ax.Unfreeze("model.backbone.*", at))
    loop.fit(TRAIN, epochs=2, batch_size=8)
    assert moved(seen) == [False] * 5 + [True] * 5
    steps = {name: int(state["step"]) for name, state in loop.save()["optimizers"]["main"]["optimizers"][0]["state"].items()}
    assert steps == {
        "model.backbone.weight": 5, "model.backbone.bias": 5, "model.head.weight": 10, "model.head.bias": 10,
    }  # fmt: skip


@pytest.mark.parametrize("at", ["1 epoch", 5])
def test_what_is_frozen_stays_with_its_state(at):
    loop, seen = loop_of(ax.Freeze(["model.backbone.*"], at))
    loop.fit(TRAIN, epochs=2, batch_size=8)
    assert moved(seen) == [True] * 5 + [False] * 5
    kept = loop.save()["optimizers"]["main"]["optimizers"][0]["state"]["model.backbone.weight"]
    assert int(kept["step"]) == 5
    assert bool(kept["exp_avg"].any())
    loop.callbacks.clear()
    loop.objective.requires_grad_(True)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    assert int(loop.save()["optimizers"]["main"]["optimizers"][0]["state"]["model.backbone.weight"]["step"]) == 10


@pytest.mark.parametrize("make", [ax.Freeze, ax.Unfreeze])
@pytest.mark.parametrize("step", [2, 4, 5, 6, 9])
def test_a_run_that_is_resumed_ends_bitwise(tmp_path, make, step):
    whole, _ = loop_of(make("model.backbone.*", "1 epoch"))
    whole.fit(TRAIN, epochs=2, batch_size=8)
    first, _ = loop_of(make("model.backbone.*", "1 epoch"), directory=tmp_path)
    steps = first.steps(TRAIN, epochs=2, batch_size=8)
    for _ in range(step):
        next(steps)
    steps.close()
    again, _ = loop_of(make("model.backbone.*", "1 epoch"), directory=tmp_path, start=1)
    again.fit(TRAIN, epochs=2, batch_size=8, resume=True)
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name]), name


def test_wrong_input_is_told():
    with pytest.raises(ax.OptimizerError, match=r"'backbone.\*' matches no parameter of model.backbone.weight"):
        loop_of(ax.Unfreeze("backbone.*", 3))[0].fit(TRAIN, epochs=1)
    with pytest.raises(ax.ConfigurationError, match="no pattern"):
        ax.Freeze([3], 3)
    with pytest.raises(ax.ConfigurationError, match="has no unit"):
        ax.Unfreeze("*", "3")


@pytest.mark.parametrize(("kind", "before"), [(ax.Unfreeze, False), (ax.Freeze, True)])
def test_a_share_of_a_fit_is_of_the_first_that_gets_there(kind, before):
    loop, seen = loop_of(kind("model.backbone.*", "50%"))
    for _ in range(2):
        loop.fit(TRAIN, epochs=2, batch_size=8)
    assert moved(seen) == [before] * 5 + [not before] * 15


def test_a_run_that_is_made_longer_does_not_freeze_again(tmp_path):
    loop, _ = loop_of(ax.Unfreeze("model.backbone.*", "50%"), directory=tmp_path)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    again, seen = loop_of(ax.Unfreeze("model.backbone.*", "50%"), directory=tmp_path)
    again.fit(TRAIN, epochs=3, batch_size=8, resume=True)
    assert all(moved(seen[1:]))
