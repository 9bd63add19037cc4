"""SpikeGuard where what it looks at arrives later, as from a GPU: it decides what it decides where nothing is waited for."""

import warnings
from collections import deque

import pytest
import torch
from roads import DelayedRoad
from torch import nn

import axontrain as ax
from axontrain import host

DELAYS = (0, 1, 3, 7, 13)


class Given(ax.Objective):
    """The loss is what the batch says; the weight tells how many updates were done."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def predict(self, batch):
        return self.w + batch

    def loss(self, predictions, batch):
        return predictions.sum()


def batches(count, first=20, last=10**9):
    return [torch.full((1,), 50.0 if first <= n < last else 1.0) for n in range(count)]


def outcome(monkeypatch, directory, delay, data, *, look=10, most=3, callbacks=(), how="fit", **fit):
    """How a fit ends whose readings arrive so many steps later; None: on the CPU, at once."""
    monkeypatch.delitem(host.ROADS, "cpu", raising=False)
    road = None if delay is None else DelayedRoad.on_the_cpu(monkeypatch, delay)
    guard = ax.SpikeGuard(window=8, warmup=5, deviations=3, rollback=5, look=look, most=most)
    loop = ax.Loop(
        Given(),
        ax.Optimizer("sgd", lr=0.001),
        device="cpu",
        progress=False,
        directory=directory / str(delay),
        callbacks=[guard, *(make() for make in callbacks)],
    )
    seen = []

    @loop.on("after_batch")
    def step(state):
        seen.append(state.step)
        if road is not None:
            road.now += 1

    loop.on("after_evaluate")(lambda state: seen.append(("validated", state.step, float(state.objective.w.detach()))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "fit":
            loop.fit(data, **{"epochs": 1, **fit})
        else:
            deque(loop.steps(data, **{"epochs": 1, **fit}))
    state = loop.state
    decided = {
        "status": state.status,
        "step": state.step,
        "times": guard.times,
        "left_out": guard.left_out,
        "weight": float(state.objective.w.detach()),
        "history": [row["step"] for row in state.history],
        "there": sorted(path.name for path in state.directory.glob("step-*")),
    }
    return decided, seen


def saving(every, **options):
    return lambda: ax.Checkpoint(every=every, asynchronous=False, **options)


CASES = {
    "the last look is at the last step": ((30,), {"callbacks": [saving(5, keep_last=None)]}),
    "by steps()": ((30,), {"callbacks": [saving(5, keep_last=None)], "how": "steps"}),
    "a leap over several looks": ((60, 20, 32), {"look": 5, "callbacks": [saving(10, keep_last=None)]}),
    "it stops": ((60,), {"most": 1, "callbacks": [saving(10, keep_last=None)]}),
    "old checkpoints go": ((60, 20, 32), {"callbacks": [saving(10)]}),
    "saved between looks": ((60, 20, 32), {"callbacks": [saving(7, keep_last=3)]}),
    "a limit within an epoch": ((60, 20, 30), {"callbacks": [saving(20, keep_last=None)], "steps": 31}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_it_decides_does_not_hang_on_when_its_look_arrives(monkeypatch, tmp_path, case):
    data, options = CASES[case]
    here, _ = outcome(monkeypatch, tmp_path, None, batches(*data), **options)
    assert here["times"]
    found = [outcome(monkeypatch, tmp_path, delay, batches(*data), **options) for delay in DELAYS]
    assert [one for one, _ in found] == [here] * len(DELAYS)
    assert [seen for _, seen in found] == [found[0][1]] * len(DELAYS)


def test_who_stops_does_so_at_a_step_that_does_not_hang_on_it(monkeypatch, tmp_path):
    data = batches(60)
    options = {"most": 1, "callbacks": [lambda: ax.Checkpoint(every=20, keep_last=None, asynchronous=False)]}
    here, _ = outcome(monkeypatch, tmp_path, None, data, look=15, **options)
    there = [outcome(monkeypatch, tmp_path, delay, data, look=15, **options)[0] for delay in DELAYS]
    # On the CPU by the look at step 45; else at the next look, which is the fit's end.
    assert (here["step"], [one["step"] for one in there]) == (45, [60] * len(DELAYS))
    assert {one["status"] for one in (here, *there)} == {"stopped"}
    assert all(one["left_out"] == here["left_out"] for one in there)


def test_nobody_judges_weights_before_it_has_settled(monkeypatch, tmp_path):
    """Validation and what goes by it: the best checkpoint, and an early end."""
    validation = [torch.zeros(1)]
    options = {
        "callbacks": [saving(10, best="val/loss"), lambda: ax.EarlyStopping("val/loss", patience=2)],
        "validation": validation,
        "validate": "10 steps",
    }
    here, seen_here = outcome(monkeypatch, tmp_path, None, batches(40, 20, 32), **options)
    for delay in DELAYS:
        there, seen = outcome(monkeypatch, tmp_path, delay, batches(40, 20, 32), **options)
        assert there == here
        assert [one for one in seen if isinstance(one, tuple)] == [one for one in seen_here if isinstance(one, tuple)]


def test_between_looks_nothing_waits_and_a_look_that_has_arrived_does_not(monkeypatch, tmp_path):
    road = DelayedRoad.on_the_cpu(monkeypatch, 4)
    guard, waits = ax.SpikeGuard(window=8, warmup=5, deviations=3, look=5), {}
    loop = ax.Loop(Given(), ax.Optimizer("sgd", lr=0.001), device="cpu", progress=False, callbacks=[guard])

    @loop.on("after_batch")
    def step(state):
        waits[state.step] = road.waits
        road.now += 1

    with pytest.warns(UserWarning, match="SpikeGuard left out 1 update: step 13"):
        loop.fit(batches(40, 12, 13), epochs=1)
    assert set(waits.values()) == {0}


def test_an_error_leaves_what_was_looked_for_to_the_next_fit(monkeypatch, tmp_path):
    """Not lost: a saved state tells of it too."""
    DelayedRoad.on_the_cpu(monkeypatch, 10**9)
    guard = ax.SpikeGuard(window=8, warmup=5, deviations=3, look=5)
    loop = ax.Loop(Given(), ax.Optimizer("sgd", lr=0.001), device="cpu", progress=False, callbacks=[guard])
    saved = []

    @loop.on("after_batch")
    def fail(state):
        if state.step == 7:
            saved.append(loop.save())
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        loop.fit(batches(20), epochs=1)
    assert saved[0]["attached"]["callback/SpikeGuard"]["found"] == {"steps": list(range(7)), "told": 0, "asked": 5}


@pytest.mark.parametrize(("key", "value"), [("asked", 9), ("asked", "5"), ("told", -1), ("told", None)])
def test_a_state_that_cannot_be_is_refused_when_it_is_restored(key, value):
    def made():
        return ax.Loop(
            Given(), ax.Optimizer("sgd", lr=0.001), progress=False, callbacks=[ax.SpikeGuard(window=8, warmup=5, look=5)]
        )

    loop = made()
    loop.fit(batches(7), epochs=1)
    state = loop.save()
    state["attached"]["callback/SpikeGuard"]["found"][key] = value
    again = made()
    with pytest.raises(ax.CheckpointError, match=f"SpikeGuard: {key}={value!r} of "):
        again.restore(state)
