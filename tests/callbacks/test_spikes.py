"""SpikeGuard: leaps of the loss are left out, and where they go on the run goes back to before they began."""

import contextlib
import itertools
import math
import warnings
from collections import deque

import pytest
import torch
from torch import nn

import axontrain as ax


def batches(count=60, outliers=(), seed=0):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, 4, generator=made, dtype=torch.float64)
    y = x.sum(-1, keepdim=True) + 0.1 * torch.randn(count, 8, 1, generator=made, dtype=torch.float64)
    for index in outliers:
        y[index] += 100.0
    return list(zip(x, y, strict=True))


def loop_of(*callbacks, directory=None, optimizer="adam", **options):
    torch.manual_seed(0)
    spec = ax.Optimizer(optimizer, lr=0.05, **options)
    objective = ax.Supervised(nn.Linear(4, 1).double(), "mse")
    return ax.Loop(objective, spec, callbacks=list(callbacks), directory=directory, progress=False)


def skipping(steps):
    """What SpikeGuard should come to, where it is known which updates are to go."""

    class Skipping(ax.Callback):
        def before_batch(self, state):
            if state.step in steps:
                state.skip(torch.ones(()))

    return Skipping()


def assert_same(one, other):
    for (name, a), b in zip(one.objective.named_parameters(), other.objective.parameters(), strict=True):
        assert torch.equal(a, b), name
    theirs = other.state.optimizers["main"].state_dict()["optimizers"][0]["state"]
    for name, state in one.state.optimizers["main"].state_dict()["optimizers"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, theirs[name][key]), (name, key)


GUARD = {"window": 10, "deviations": 4, "look": 10}


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "nadam"])
@pytest.mark.parametrize("fit", [{}, {"microbatch": 3}], ids=["whole", "parts"])
def test_a_leap_is_left_out_and_told(optimizer, fit):
    data = batches(outliers=(25, 40))
    guarded, known = loop_of(ax.SpikeGuard(**GUARD), optimizer=optimizer), loop_of(skipping({25, 40}), optimizer=optimizer)
    with pytest.warns(UserWarning, match="SpikeGuard") as caught:
        guarded.fit(data, epochs=1, **fit)
    told = [str(one.message) for one in caught]
    assert [one.partition(":")[0] for one in told] == ["SpikeGuard left out 1 update"] * 2
    assert "step 26: " in told[0]
    assert "step 41: " in told[1]
    assert "is usual" in told[0]
    known.fit(data, epochs=1, **fit)
    assert_same(guarded, known)
    assert guarded.state.optimizers["main"].skipped == 2
    assert guarded.state.optimizers["main"].in_a_row == 0, "a leap is finite"
    plain = loop_of(optimizer=optimizer)
    plain.fit(data, epochs=1, **fit)
    assert not torch.equal(plain.objective.model.weight, guarded.objective.model.weight)


def test_without_leaps_it_changes_nothing():
    guarded, plain = loop_of(ax.SpikeGuard(**GUARD)), loop_of()
    for loop in (guarded, plain):
        loop.fit(batches(), epochs=2)
    assert_same(guarded, plain)


def test_a_level_that_stays_is_usual_in_the_end():
    steps = [0.0] * 20 + [1.0] * 180
    data = [(x, y + 5 * level) for (x, y), level in zip(batches(200), steps, strict=True)]
    loop = loop_of(ax.SpikeGuard(window=10, deviations=3, look=200), optimizer="sgd")
    with pytest.warns(UserWarning, match=r"left out \d+ updates: step 21"):
        loop.fit(data, epochs=1)
    assert 0 < loop.state.optimizers["main"].skipped < 60
    assert abs(loop.objective.model.bias.item() - 5) < 0.5


def test_what_is_not_finite_is_not_usual_and_not_a_leap():
    data = batches(outliers=(40,))
    data[25] = (data[25][0] * math.nan, data[25][1])
    loop = loop_of(ax.SpikeGuard(**GUARD))
    with pytest.warns() as caught:
        loop.fit(data, epochs=1)
    told = sorted(str(one.message).partition(":")[0].partition(" (")[0] for one in caught)
    assert told == ["1 update of the optimizer 'main' was skipped as not finite", "SpikeGuard left out 1 update"]


def test_in_fp16_a_leap_is_no_overflow():
    torch.manual_seed(0)
    data = [(x.float(), y.float() + 10 * (step == 25)) for step, (x, y) in enumerate(batches())]
    spec = ax.Optimizer("sgd", lr=0.05)
    loop = ax.Loop(
        ax.Supervised(nn.Linear(4, 1), "mse"), spec, callbacks=[ax.SpikeGuard(**GUARD)], precision="fp16", progress=False
    )
    loop.state.attached["scaler"].scale.fill_(4.0)
    scales = []
    loop.on("after_batch")(lambda state: scales.append(float(state.attached["scaler"].scale)))
    with pytest.warns(UserWarning, match="step 26"):
        loop.fit(data, epochs=1)
    assert scales[24] == scales[26]
    assert loop.state.optimizers["main"].skipped >= 1


class Damage(ax.Callback):
    """Spoils the weights once, after a step, as faulty memory does."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = list(steps)

    def after_batch(self, state):
        if self.steps and state.step == self.steps[0]:
            del self.steps[0]
            with torch.no_grad():
                state.objective.model.weight.add_(30.0)


@pytest.mark.parametrize("how", ["fit", "steps"])
@pytest.mark.parametrize("margin", [0, 3])
def test_it_goes_back_and_leaves_out_what_leapt(tmp_path, how, margin):
    """Of the damage nothing is left; of the steps after it the updates."""
    guard = ax.SpikeGuard(rollback=5, margin=margin, **GUARD)
    saving = ax.Checkpoint(every="10 steps", keep_last=None)
    loop = loop_of(Damage(33), guard, saving, directory=tmp_path / "run")
    data = batches(100)
    with pytest.warns(UserWarning, match="SpikeGuard") as caught:
        loop.fit(data, epochs=1) if how == "fit" else deque(loop.steps(data, epochs=1))
    assert loop.state.status == "completed"
    told = " ".join(str(one.message) for one in caught)
    assert f"goes back to {tmp_path / 'run' / 'step-000000030'}" in told
    assert f"leaves out the updates of steps {34 - margin} to 40" in told
    assert loop.state.step == 100
    assert guard.left_out == [[33 - margin, 39]]
    assert guard.times == 1
    known = loop_of(skipping(range(33 - margin, 40)))
    known.fit(data, epochs=1)
    assert_same(loop, known)
    assert [row["step"] for row in loop.state.history.rows] == [100]


def test_a_run_that_went_back_and_is_killed_ends_the_same(tmp_path):
    data = batches(100)

    def made(*more):
        return loop_of(Damage(33), ax.SpikeGuard(rollback=5, **GUARD), *more, directory=tmp_path / "run")

    whole = loop_of(skipping(range(33, 40)))
    whole.fit(data, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = made(ax.Checkpoint(every="10 steps", keep_last=None))
        first.on("after_batch")(lambda state: ax.Stop("enough") if state.step == 57 else None)
        first.fit(data, epochs=1)
        again = loop_of(
            Damage(), ax.SpikeGuard(rollback=5, **GUARD), ax.Checkpoint(every="10 steps"), directory=tmp_path / "run"
        )
        again.fit(data, epochs=1, resume=True)
    assert_same(again, whole)


def test_after_so_many_times_it_stops(tmp_path):
    guard = ax.SpikeGuard(rollback=5, most=2, **GUARD)
    saving = ax.Checkpoint(every="10 steps", keep_last=None)
    loop = loop_of(Damage(33, 53, 73), guard, saving, directory=tmp_path / "run")
    with pytest.warns(UserWarning, match="SpikeGuard"):
        result = loop.fit(batches(100), epochs=1)
    assert result.status == "stopped"
    assert "SpikeGuard went back 2 times before" in result.reason


def test_without_a_checkpoint_from_before_it_goes_on(tmp_path):
    guard = ax.SpikeGuard(rollback=5, **GUARD)
    loop = loop_of(Damage(23), guard, ax.Checkpoint(every="50 steps"), directory=tmp_path / "run", optimizer="sgd")
    with pytest.warns(UserWarning, match="SpikeGuard") as caught:
        assert loop.fit(batches(100), epochs=1).status == "completed"
    assert any("there is no checkpoint from before step 24" in str(one.message) for one in caught)


class Twice(ax.Objective):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def predict(self, x):
        return self.a(x)

    def train_step(self, batch):
        yield "a", self.a(batch[0].float()).square().mean()
        yield "a", self.a(batch[0].float()).square().mean()
        yield "b", self.b(batch[0].float()).square().mean()


def test_a_skip_is_of_all_updates_of_the_step_and_of_no_other():
    loop = ax.Loop(Twice(), {"a": ax.Optimizer("sgd", lr=0.1), "b": ax.Optimizer("sgd", lr=0.1)}, progress=False)
    seen = []
    loop.on("before_batch")(lambda state: state.skip(torch.ones(())) if state.step == 1 else None)
    loop.on("after_batch")(lambda state: seen.append([p.detach().clone() for p in state.objective.parameters()]))
    loop.fit(batches(3), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert loop.state.optimizers["a"].skipped == 2


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_flag_of_zero_skips_nothing(in_backward):
    loop, plain = loop_of(in_backward=in_backward), loop_of(in_backward=in_backward)
    loop.on("before_batch")(lambda state: state.skip(torch.tensor(0.0)) if state.step < 5 else state.skip(torch.tensor(0.3)))
    loop.fit(batches(9), epochs=1)
    plain.fit(batches(9)[:5], epochs=1)
    assert_same(loop, plain)
    assert loop.state.optimizers["main"].skipped == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deviations": 0}, "deviations=0: a number above 0"),
        ({"deviations": "many"}, "deviations='many': a number above 0"),
        ({"window": 0}, "window=0: a whole number of steps, 1 or more"),
        ({"rollback": 0}, "rollback=0: a whole number of steps, 1 or more"),
        ({"margin": -1}, "margin=-1: a whole number of updates, 0 or more"),
        ({"look": 0.5}, "look=0.5: a whole number of steps, 1 or more"),
    ],
)
def test_values_that_cannot_work_are_refused(options, words):
    with pytest.raises(ax.ConfigurationError, match=words):
        ax.SpikeGuard(**options)


def test_what_it_cannot_judge_is_refused_before_training():
    with pytest.raises(ax.ConfigurationError, match="goes back to a checkpoint: Loop"):
        loop_of(ax.SpikeGuard(rollback=3)).fit(batches(3), epochs=1)
    specs = {"a": ax.Optimizer("sgd", lr=0.1), "b": ax.Optimizer("sgd", lr=0.1)}
    with pytest.raises(ax.ConfigurationError, match="judges one loss a step, and this train_step yields several"):
        ax.Loop(Twice(), specs, callbacks=[ax.SpikeGuard()], progress=False).fit(batches(3), epochs=1)
    with pytest.raises(ax.ConfigurationError, match="in_backward=True, which does not go with a callback's after_backward"):
        loop_of(ax.SpikeGuard(), in_backward=True).fit(batches(3), epochs=1)


AROUND = list(itertools.product((34, 38, 40, 41, 45, 52), ("stop", "error")))
QUICK = [(34, "stop"), (38, "error"), (40, "error"), (45, "stop")]


def guarded(directory):
    guard = ax.SpikeGuard(rollback=5, margin=3, window=10, deviations=4, look=20)
    return loop_of(guard, ax.Checkpoint(every="3 steps", keep_last=None), directory=directory), guard


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of leaps of the data itself, which come again."""
    data = batches(80, outliers=range(31, 37))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, guard = guarded(tmp_path_factory.mktemp("unbroken"))
        whole.fit(data, epochs=1)
    assert guard.left_out == [[28, 36]]
    return data, whole, guard


@pytest.mark.parametrize(
    ("step", "how"), [one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in AROUND]
)
def test_a_run_broken_off_around_a_rollback_ends_as_one_that_was_not(tmp_path, unbroken, step, how):
    """Broken off before, within and after the way back."""
    data, whole, of_whole = unbroken
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken, _ = guarded(tmp_path)
        seen = []

        @broken.on("after_batch")
        def stop(state):
            seen.append(state.step)
            if len(seen) == step and how == "error":  # which saves nothing
                raise ArithmeticError
            return ax.Stop("enough") if len(seen) == step else None

        with contextlib.suppress(ArithmeticError):
            broken.fit(data, epochs=1)
        again, of_again = guarded(tmp_path)
        again.fit(data, epochs=1, resume=True)
    assert (of_again.left_out, of_again.times) == (of_whole.left_out, of_whole.times)
    assert_same(again, whole)


def test_what_was_written_after_it_is_gone_once_it_went_back(tmp_path):
    guard = ax.SpikeGuard(rollback=5, **GUARD)
    loop = loop_of(Damage(33), guard, ax.Checkpoint(every="5 steps", keep_last=None), directory=tmp_path / "run")
    there = []
    loop.on("before_fit")(lambda state: there.append(sorted(path.name for path in state.directory.glob("step-*"))))
    with pytest.warns(UserWarning, match="SpikeGuard"):
        loop.fit(batches(60), epochs=1)
    assert there[1] == [f"step-{step:09d}" for step in (5, 10, 15, 20, 25, 30)]


def test_an_iterator_cannot_be_gone_back_in(tmp_path):
    loop = loop_of(ax.SpikeGuard(rollback=5), directory=tmp_path / "run")
    with pytest.raises(ax.ConfigurationError, match="train is an iterator, which is read once"):
        loop.fit(iter(batches(5)), epochs=1)


@pytest.mark.parametrize("how", ["before_batch", "error"])
def test_a_skip_of_a_step_that_is_not_done_is_of_no_other(how):
    loop, plain = loop_of(), loop_of()
    data = batches(4)
    if how == "error":
        loop.state.skip(torch.ones(()))
        with pytest.raises(RuntimeError):
            loop.train_on_batch((data[0][0][:, :2], data[0][1]))
    else:
        asked = []

        @loop.on("before_batch")
        def stop(state):
            if not asked:
                asked.append(state.skip(torch.ones(())))
                return ax.Stop("not now")

        loop.fit(data, epochs=1)
    loop.train_on_batch(data[0])
    plain.train_on_batch(data[0])
    assert_same(loop, plain)
