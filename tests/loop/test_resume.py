"""A run that was broken off after any step and resumed by another process ends as the one that was not, bit for bit."""

import itertools
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from resume_runs import (
    OPTIMIZERS,
    WAYS,
    Case,
    break_off,
    broken_off,
    differences,
    finish,
    kill,
    leaves,
    make,
    outcome,
    same,
    way,
    whole,
)

import axontrain as ax
from axontrain.callback import Saver
from axontrain.checkpoint import runs

PLAIN = (
    (Case("sgd", workers=2, validate="3 steps"), 14),
    (Case("rmsprop", validate="3 steps", patience=3), 12),  # is ended by EarlyStopping
    (Case("gan", steps=None), 15),
)
FULL = (
    (Case("muon", validate="2 steps", drop_last=True, steps=11), 11),
    *(
        (Case(optimizer, workers, validate, **limits), last)
        for optimizer, workers, (validate, limits, last) in itertools.product(
            OPTIMIZERS,
            (0, 2),
            (("1 epoch", {}, 14), ("3 steps", {"steps": None}, 15), ("2 steps", {"patience": 4}, 10)),
        )
    ),
)


@pytest.fixture(autouse=True)
def pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def broken_off_everywhere(cases, root):
    program = broken_off([(number, *case) for number, case in enumerate(cases)], root)
    try:
        references = [whole(case, root / f"whole-{number}") for number, (case, _) in enumerate(cases)]
        assert program.wait(timeout=300) == 0
    finally:
        program.kill()
    return root, references


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return broken_off_everywhere(PLAIN, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return broken_off_everywhere(FULL, tmp_path_factory.mktemp("full"))


def resumes_everywhere(number, cases, root, references):
    (case, last), reference = cases[number], references[number]
    assert reference["at"][1] == last
    for step in range(1, last + 1):
        found = differences(reference, finish(case, root / f"{number}-{step}"))
        assert not found, f"{case} broken off by {way(number, step)} after step {step}: {found[:8]}"


@pytest.mark.parametrize("number", range(len(PLAIN)), ids=[case.name for case, _ in PLAIN])
def test_every_step(plain, number):
    resumes_everywhere(number, PLAIN, *plain)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FULL)), ids=[case.name for case, _ in FULL])
def test_every_step_of_every_combination(full, number):
    resumes_everywhere(number, FULL, *full)


def test_the_runs_compared_are_what_they_are_meant_to_be(plain):
    _, references = plain
    assert [reference["status"] for reference in references] == ["completed", "stopped", "completed"]
    for reference in references:
        names = {name.rpartition("/")[2] for name in reference if name.startswith("/result/history")}
        assert {"loss", "lr", "tenth"} <= {*names, "lr"}
        assert any(name.startswith("/rng/numpy") for name in reference)
        assert any(name.startswith("/rng/python") for name in reference)
        assert reference["/attached/callback/ReduceLROnPlateau(val/loss)/best"] < 10
        assert reference["/attached/callback/Tally/count"] == reference["at"][1]
        assert reference["/attached/callback/Tally#2/count"] == reference["at"][1] // 2
    assert any(name.startswith("/meter/losses") for name in references[0])  # it ends within an epoch
    assert any(name.startswith("/meter/metrics/auroc") for name in references[0])


# --- drawn ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the validation data was never used", "ignore:No (positive|negative) samples")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_drawn_combinations(tmp_path_factory, data):
    samples, batch_size = data.draw(st.integers(4, 30), "samples"), data.draw(st.integers(2, 9), "batch_size")
    drop_last = data.draw(st.booleans(), "drop_last")
    length = samples // batch_size if drop_last else -(-samples // batch_size)
    assume(length > 0 and (drop_last or samples % batch_size != 1))  # BatchNorm takes no batch of one
    case = Case(
        data.draw(st.sampled_from(sorted(OPTIMIZERS)), "optimizer"),
        validate=data.draw(st.sampled_from(["1 epoch", "2 epochs", "2 steps", "3 steps", "0.5 epochs", "30%", "20 samples"])),
        samples=samples,
        batch_size=batch_size,
        drop_last=drop_last,
        epochs=data.draw(st.integers(1, 3), "epochs"),
        steps=None,
        patience=data.draw(st.sampled_from([2, 50]), "patience"),
        keep_last=data.draw(st.sampled_from([1, 2, None]), "keep_last"),
        data=data.draw(st.sampled_from(["augmented", "mixture"])),
    )
    root = tmp_path_factory.mktemp("drawn")
    reference = whole(case, root / "whole")
    step = data.draw(st.integers(1, reference["at"][1]), "step")
    how = data.draw(st.sampled_from(WAYS), "how")
    if how == "kill":
        kill(case, root / "broken", step)
    else:
        break_off(case, root / "broken", how, step)
    assert not differences(reference, finish(case, root / "broken"))


# --- more than once, not at all, and at the end -----------------------------------------------------------------------

CASE = Case("adamw", validate="3 steps")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return whole(CASE, tmp_path_factory.mktemp("unbroken") / "whole")


@pytest.mark.parametrize("stops", [(3, 7), (4, 5, 12), (1, 5, 10, 13)])
def test_broken_off_again_and_again(tmp_path, unbroken, stops):
    for number, step in enumerate(stops):
        how = WAYS[(number + len(stops)) % len(WAYS)]
        if how == "kill":
            kill(CASE, tmp_path, step, resume=True, start=number)
        else:
            break_off(CASE, tmp_path, how, step, resume=True, start=number and 1)
    assert not differences(unbroken, finish(CASE, tmp_path))


def test_killed_before_the_first_checkpoint_it_begins_afresh(tmp_path, unbroken):
    kill(CASE, tmp_path, 4, every=100)
    assert not list(tmp_path.glob("step-*"))
    assert not differences(unbroken, finish(CASE, tmp_path))


def test_killed_it_goes_on_from_the_last_checkpoint(tmp_path, unbroken):
    kill(CASE, tmp_path, 13, every=4)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000008", "step-000000012"]
    assert not differences(unbroken, finish(CASE, tmp_path))


def unchanging(found):
    return {name: value for name, value in found.items() if not name.startswith("/rng")}


def test_a_finished_run_started_again_trains_nothing(tmp_path):
    first = whole(CASE, tmp_path)
    made = sorted(tmp_path.glob("step-*"))
    for _ in range(2):
        loop, fit = make(CASE, tmp_path, start=1)
        trained = []
        loop.on("after_batch")(lambda state, trained=trained: trained.append(state.step))
        result = loop.fit(**fit, resume=True)
        assert not trained
        assert (result.status, result.reason) == (first["status"], first["reason"])
        assert not differences(first, outcome(loop, result, tmp_path))
    assert sorted(tmp_path.glob("step-*")) == made


def test_a_run_that_early_stopping_ended_is_stopped_at_once(tmp_path):
    case = Case("rmsprop", validate="3 steps", patience=3)
    first = whole(case, tmp_path)
    assert (first["status"], first["at"]) == ("stopped", (2, 12))
    again = finish(case, tmp_path)
    assert "val/loss has not become better" in again["reason"]
    assert not differences(first, again)


@pytest.mark.parametrize("step", [3, 5, 6, 10, 13])
def test_a_fit_that_its_own_limit_ended_goes_on_to_a_later_one(tmp_path, step):
    """One whose schedule does not see progress, and without what is due by percents: those were of another plan."""
    found = []
    for limits in ([14], [step, 14]):
        for limit in limits:
            loop, fit = make(Case("sgd", validate="3 steps", steps=limit), tmp_path / f"{limits}")
            loop.callbacks.pop()
            result = loop.fit(**fit, resume=True)
            assert result.reason == f"steps={limit}"
        found.append(outcome(loop, result, tmp_path / f"{limits}"))
    assert not differences(*found)


# --- in the middle of a hook, and from memory -------------------------------------------------------------------------

HOOKS = ("before_epoch", "before_batch", "after_batch", "after_backward", "before_evaluate", "after_evaluate", "after_epoch")


# Each hook with one of the two signals, by turns; with the other it is slow.
SIGNALLED = [
    pytest.param(hook, where, number, marks=[] if turn % 4 in (0, 3) else [pytest.mark.slow])
    for turn, (hook, (where, number)) in enumerate(
        itertools.product([*HOOKS, "evaluation"], [("memory", signal.SIGINT), ("directory", signal.SIGTERM)])
    )
]


@pytest.mark.parametrize(("hook", "where", "number"), SIGNALLED)
def test_a_signal_in_any_hook_loses_nothing(tmp_path, hook, number, where):
    """At each occasion of the hook in turn."""
    case = Case("sgd", validate="2 steps", samples=20, epochs=2, steps=None)
    reference = whole(case)
    for occasion in itertools.count():
        calls = itertools.count()

        def signalled(state=None, calls=calls, occasion=occasion):
            if next(calls) == occasion:
                os.kill(os.getpid(), number)

        directory = tmp_path / f"{occasion}" if where == "directory" else None
        loop, fit = make(case, directory)
        if hook == "evaluation":
            loop.objective.during_eval = signalled
        else:
            loop.on(hook)(signalled)
        try:
            status = loop.fit(**fit).status
        except SystemExit as ending:
            status = {143: "interrupted"}[ending.code]
        if status == "completed":  # there are no more
            assert next(calls) == occasion
            assert occasion > 1
            return
        if directory is not None:
            loop, fit = make(case, directory, start=1)
        result = loop.fit(**fit, resume=True)
        assert not differences(reference, outcome(loop, result)), f"{hook} {occasion}"


@pytest.mark.parametrize("how", ["stop", "int", "term"])
def test_from_memory_without_a_directory(unbroken, how):
    reference = {name: value for name, value in unbroken.items() if not name.startswith("/file")}
    for step in range(1, 14):
        loop = break_off(CASE, None, how, step)
        loop.callbacks.pop()  # what broke it off
        _, fit = make(CASE)
        assert not differences(reference, outcome(loop, loop.fit(**fit, resume=True))), step


# --- other data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["streamed", "list", "mixture"])
def test_other_data(tmp_path, data):
    case = Case("sgd", data=data, validate="2 steps", epochs=2, steps=None)
    reference = whole(case, tmp_path / "whole")
    for step in range(1, reference["at"][1] + 1, 1 if data != "mixture" else 3):
        how = way(0, step)
        if how == "kill":
            kill(case, tmp_path / f"{step}", step)
        else:
            break_off(case, tmp_path / f"{step}", how, step)
        found = differences(reference, finish(case, tmp_path / f"{step}"))
        if data == "list":  # which begins anew each time: how often it was read to its end decides nothing
            found = [name for name in found if name != "/attached/data/turns"]
        assert not found, (step, how, found[:8])


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_a_loop_of_ones_own_that_was_left_is_gone_on_with(tmp_path, where):
    case = Case("sgd", validate="3 steps", epochs=2, steps=None)
    reference = whole(case)
    for step in range(1, 11):
        directory = tmp_path / f"{step}" if where == "directory" else None
        loop, fit = make(case, directory, every=1 if directory else None)
        for _ in loop.steps(**fit):
            if loop.state.step == step:
                break
        assert loop.state.status == "stopped"
        if directory is not None:
            loop, fit = make(case, directory)
        steps = sum(1 for _ in loop.steps(**fit, resume=True))
        assert steps in (10 - step, 11 - step)
        found = outcome(loop)
        assert not differences({name: reference[name] for name in found}, found), step


@pytest.mark.parametrize(("data", "workers"), [("augmented", 0), ("augmented", 2), ("streamed", 0)])
def test_going_on_reads_nothing_of_what_was_trained_on(tmp_path, data, workers):
    case = Case("sgd", data=data, epochs=2, steps=None)
    loop, fit = make(case, log=tmp_path / "all")
    loop.fit(**fit)
    case = replace(case, workers=workers)
    kill(case, tmp_path / "run", 7)  # two batches of the second epoch
    loop, fit = make(case, tmp_path / "run", log=tmp_path / "rest")
    loop.fit(**fit, resume=True)
    every, rest = ((tmp_path / name).read_text().split() for name in ("all", "rest"))
    per_epoch, per_batch = (36, 8) if data == "augmented" else (5, 1)
    assert len(every) == 2 * per_epoch
    expected = every[per_epoch + 2 * per_batch :]
    assert (sorted(rest) if workers else rest) == (sorted(expected) if workers else expected)


# --- saving changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saving_changes_nothing_of_the_run(tmp_path, unbroken, asynchronous):
    plain = {name: value for name, value in unbroken.items() if not name.startswith("/file")}
    loop, fit = make(CASE)
    assert not differences(plain, outcome(loop, loop.fit(**fit)))
    loop, fit = make(CASE, tmp_path, checkpoint=ax.Checkpoint(every=1, keep_last=None, asynchronous=asynchronous))
    assert not differences(plain, outcome(loop, loop.fit(**fit)))
    assert len(list(tmp_path.glob("step-*"))) == 14


class Snapshots(Saver):
    """Keeps the state at each step's end, in memory."""

    def __init__(self):
        super().__init__()
        self.states = {}

    def next_step(self, state):
        return state.step + 1

    def seconds_left(self, state):
        return float("inf")

    def at_step_end(self, state):
        self.states[state.step] = state.state_dict()

    def at_fit_end(self, state):
        pass

    def close(self, state):
        pass


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_checkpoint_is_the_state_of_its_step(tmp_path, monkeypatch, asynchronous):
    """Of a run without it; training goes on for some steps while each is being written."""
    snapshots = Snapshots()
    loop, fit = make(CASE, own=[snapshots])
    loop.fit(**fit)
    commit, me, began = runs.commit, os.getpid(), []

    def slowly(*arguments):
        if os.getpid() != me:
            time.sleep(0.15)
        commit(*arguments)

    monkeypatch.setattr(runs, "commit", slowly)
    loop, fit = make(CASE, tmp_path, checkpoint=ax.Checkpoint(every=4, keep_last=None, asynchronous=asynchronous))

    @loop.on("after_batch")
    def watch(state):
        began.append(len(list(tmp_path.glob("step-?????????"))))

    loop.fit(**fit)
    if asynchronous:
        assert began[4] == began[5] == 0  # steps went by while it was being written
    for step in (4, 8, 12):
        tree = runs.files.read(tmp_path / f"step-{step:09d}")
        kept = leaves(snapshots.states[step])
        found = leaves(tree)
        assert kept.keys() == found.keys()
        assert [name for name in kept if not same(kept[name], found[name])] == [], step


def test_readings_that_were_not_taken_are_saved_as_they_are(tmp_path):
    loop, fit = make(CASE, tmp_path, checkpoint=ax.Checkpoint(every=2, keep_last=None))
    loop.fit(**{**fit, "validate": "1 epoch"})
    losses = runs.files.read(tmp_path / "step-000000004")["meter"]["losses"]
    assert [tuple(of["loss"].shape) for of in losses] == [()] * 4
    assert len({float(of["loss"]) for of in losses}) == 4


def test_the_callers_generators_are_as_they_were(tmp_path):
    break_off(CASE, tmp_path, "stop", 7)
    torch.manual_seed(3)
    finish(CASE, tmp_path)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("step", range(1, 16))
def test_a_state_saved_by_a_hook_within_a_step_loses_nothing_that_was_due_after_it(tmp_path, step):
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    data = ax.ArrayDataset(x, x.sum(1, keepdim=True))

    def make():
        torch.manual_seed(1)
        objective = ax.Supervised(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1)), "mse")
        return ax.Loop(objective, ax.Optimizer("adam", lr=0.01), metrics=["mae"], progress=False)

    loop, other = make(), make()

    @loop.on("after_batch")
    def save(state):
        if state.step == step:
            loop.save(tmp_path / "saved")

    loop.fit(data, data, epochs=3, batch_size=8, validate=3)
    other.restore(tmp_path / "saved")
    other.on("after_batch")(lambda state: None)
    other.fit(data, data, epochs=3, batch_size=8, validate=3, resume=True)
    assert other.state.history == loop.state.history
    for name, value in loop.objective.state_dict().items():
        assert torch.equal(value, other.objective.state_dict()[name])
