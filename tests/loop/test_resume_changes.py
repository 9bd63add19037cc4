"""What has changed since a run was saved is named; and which checkpoints of a run there are."""

import contextlib
import hashlib
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from resume_runs import Augmented, Case, break_off, differences, finish, leaves, make, outcome, whole
from torch import nn

import axontrain as ax
from axontrain.checkpoint import runs
from axontrain.version import VERSION

CASE = Case("sgd", validate="3 steps", epochs=2, steps=None)  # ten steps in two epochs
WITHIN, BETWEEN = 7, 5


class Net(ax.Objective):
    metrics = ("accuracy",)

    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))

    def predict(self, x):
        return self.net(x)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Other(ax.Callback):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def after_batch(self, state):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Others:
    """As Augmented, of another class."""

    def __init__(self, samples):
        self.rows = Augmented(samples)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def script(
    directory=None,
    *,
    width=8,
    samples=36,
    batch_size=8,
    shuffle=True,
    drop_last=False,
    data_seed=None,
    workers=0,
    kind=Augmented,
    seed=0,
    lr=0.05,
    weight_decay=0.0,
    clip=None,
    schedule=None,
    metrics=None,
    callbacks=(),
    validation=16,
    stop=None,
    **limits,
):
    """A script as one that is started again has it: the loop, and its fit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = Net(width)
    optimizer = ax.Optimizer("sgd", lr=lr, momentum=0.9, weight_decay=weight_decay, clip_norm=clip, schedule=schedule)
    loop = ax.Loop(objective, optimizer, metrics=metrics, callbacks=callbacks, seed=seed, progress=False, directory=directory)
    if stop is not None:
        loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == stop else None)
    train = ax.Loader(kind(samples), batch_size, shuffle=shuffle, workers=workers, drop_last=drop_last, seed=data_seed)
    validating = None if validation is None else ax.Loader(Augmented(validation, seed=1), 8)
    return loop, {"train": train, "validation": validating, **({"epochs": 2} | limits)}


def begun(directory, step, **how):
    loop, fit = script(directory, stop=step, **how)
    assert loop.fit(**fit).status == "stopped"


def told(directory, **how):
    """Go on with another script; returns what it was warned of."""
    loop, fit = script(directory, **how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.fit(**fit, resume=True)
    return [str(one.message) for one in caught if issubclass(one.category, ax.AxonWarning)]


@pytest.mark.parametrize("step", [WITHIN, BETWEEN])
@pytest.mark.parametrize("how", [{}, {"workers": 2}, {"stop": 99}], ids=str)
def test_nothing_that_matters_has_changed(tmp_path, step, how):
    begun(tmp_path, step)
    assert told(tmp_path, **how) == []


DATA = {
    "samples": ({"samples": 44}, "samples: it was 36, and is 44"),
    "batch size": ({"batch_size": 6}, "samples in a batch: it was 8, and is 6"),
    "shuffle": ({"shuffle": False}, "shuffle: it was True, and is False"),
    "drop_last": ({"drop_last": True}, "drop_last: it was False, and is True"),
    "seed of the data": ({"data_seed": 5}, "seed: it was None, and is 5"),
}


@pytest.mark.parametrize(("how", "words"), DATA.values(), ids=DATA)
def test_other_batches_are_an_error_within_an_epoch(tmp_path, how, words):
    begun(tmp_path, WITHIN)
    loop, fit = script(tmp_path, **how)
    before = leaves(loop.save())
    with pytest.raises(ax.CheckpointError, match=f"at batch 2 of epoch 1.*{words}.*Give fit the data.*without resume"):
        loop.fit(**fit, resume=True)
    assert not differences(before, leaves(loop.save()))
    assert told(tmp_path) == []  # with the data that it had it goes on


@pytest.mark.parametrize(("how", "words"), DATA.values(), ids=DATA)
def test_other_batches_are_a_warning_at_an_epochs_end(tmp_path, how, words):
    begun(tmp_path, BETWEEN)
    (warning,) = told(tmp_path, **how)
    assert warning.startswith(f"resumed from {tmp_path}")
    assert words in warning


def test_other_batches_are_an_error_from_memory_too():
    loop, fit = script(stop=WITHIN)
    loop.fit(**fit)
    before = leaves(loop.save())
    _, other = script(samples=44)
    with pytest.raises(ax.CheckpointError, match="samples: it was 36, and is 44"):
        loop.fit(**other, resume=True)
    assert not differences(before, leaves(loop.save()))


PLAIN = {
    "kind": ({"kind": Others}, ["kind: it was 'Augmented', and is 'Others'"]),
    "limit": ({"limit": 4}, ["limit: it was None, and is 4"]),
    "seed": ({"seed": 3}, ["seed: it was 0, and this Loop has 3; the run keeps 0"]),
    "lr": ({"lr": 0.5}, ["lr of the optimizer 'main': it was 0.05, and is 0.5; the run keeps what it had"]),
    "weight decay": ({"weight_decay": 0.5}, ["weight_decay of the optimizer 'main': it was 0.0, and is 0.5; the run keeps"]),
    "clipping": ({"clip": 0.5}, ["clip_norm of the optimizer 'main': it was None, and is 0.5; the clipping is that of"]),
    "a new callback": ({"callbacks": [Other()]}, ["Other is new: it begins with nothing"]),
    "a metric": ({"metrics": ["f1"]}, ["the metric f1 is new: of the present epoch it sees the rest"]),
    "validation": ({"validation": 24}, ["the validation data's samples: it was 16, and is 24"]),
    "no validation": ({"validation": None}, ["the validation data: there is none any more"]),
}


@pytest.mark.parametrize(("how", "words"), PLAIN.values(), ids=PLAIN)
def test_what_it_is_right_to_go_on_with_is_one_warning(tmp_path, how, words):
    begun(tmp_path, WITHIN)
    (warning,) = told(tmp_path, **how)
    for word in words:
        assert word in warning
    assert warning.count("; ") <= 1  # and nothing else


def test_several_changes_are_one_warning(tmp_path):
    begun(tmp_path, BETWEEN, callbacks=[Other()])
    (warning,) = told(tmp_path, seed=3, lr=0.5, batch_size=6, clip=1.0)
    for word in ("seed: it was 0", "lr of", "samples in a batch: it was 8", "clip_norm", "Other is no longer there"):
        assert word in warning


def test_what_is_told_to_be_kept_is_kept(tmp_path):
    begun(tmp_path / "a", WITHIN)
    begun(tmp_path / "b", WITHIN)
    results = []
    for directory, how in ((tmp_path / "a", {}), (tmp_path / "b", {"seed": 3, "lr": 0.5})):
        loop, fit = script(directory, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop.fit(**fit, resume=True)
        results.append(loop.save())
    assert not differences(*({name: leaf for name, leaf in leaves(tree).items() if "/setup" not in name} for tree in results))


def test_a_callback_that_is_missing_keeps_its_state_for_later(tmp_path):
    begun(tmp_path, WITHIN, callbacks=[Other()])
    loop, fit = script(tmp_path, stop=8)
    with pytest.warns(ax.AxonWarning, match="Other is no longer there: its state waits for it"):
        loop.fit(**fit, resume=True)
    back = Other()
    loop, fit = script(tmp_path, callbacks=[back])
    with pytest.warns(ax.AxonWarning, match="Other is new"):
        loop.fit(**fit, resume=True)
    assert back.seen == WITHIN + 2


@pytest.mark.parametrize("schedule", [None, "cosine"])
@pytest.mark.parametrize("limits", [{"epochs": 3}, {"steps": 9}], ids=str)
def test_other_limits_matter_to_a_schedule_of_progress_alone(tmp_path, schedule, limits):
    schedule = None if schedule is None else ax.schedules.cosine()
    begun(tmp_path, WITHIN, schedule=schedule)
    warned = told(tmp_path, schedule=schedule, **limits)
    if schedule is None:
        assert warned == []
    else:
        ((name, value),) = limits.items()
        was = 2 if name == "epochs" else None
        assert len(warned) == 1
        assert f"{name}: it was {was}, and is {value}, so that the schedule sees another progress" in warned[0]


def newest_of(directory):
    return [entry.path for entry in runs.entries(directory)][-1]


def rewritten(directory, change):
    """Change the state of the newest checkpoint, and its manifest, as another version would have written it."""
    path = newest_of(directory)
    state = json.loads((path / "state.json").read_text())
    change(state)
    text = json.dumps(state)
    (path / "state.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def setup_in(tree):
    """The setup, wherever in the file it lies."""
    if isinstance(tree, dict):
        if "versions" in tree and "optimizers" in tree:
            return tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            if (found := setup_in(part)) is not None:
                return found
    return None


def test_other_versions_are_told(tmp_path):
    begun(tmp_path, WITHIN)

    def older(state):
        setup_in(state)["versions"] |= {"torch": "1.0", "axontrain": "0.0.1"}
        setup_in(state)["device"] = "cuda"

    rewritten(tmp_path, older)
    (warning,) = told(tmp_path)
    assert f"the version of axontrain: it was '0.0.1', and is {VERSION!r}" in warning
    assert f"the version of torch: it was '1.0', and is {str(torch.__version__)!r}" in warning
    assert "the device: it was 'cuda', and is 'cpu'" in warning


def test_another_shape_is_an_error_and_changes_nothing(tmp_path):
    begun(tmp_path, WITHIN)
    loop, fit = script(tmp_path, width=9)
    before = leaves(loop.save())
    with pytest.raises(ax.CheckpointError, match=re.escape("net.0.weight is (8, 6) there, (9, 6) here")):
        loop.fit(**fit, resume=True)
    assert not differences(before, leaves(loop.save()))
    assert told(tmp_path) == []


@pytest.mark.parametrize("value", ["runs/first", Path("runs/first"), 1, None])
def test_resume_takes_no_path(tmp_path, value):
    loop, fit = script(tmp_path)
    with pytest.raises(ax.ConfigurationError, match=re.escape("to go on from one checkpoint, loop.restore(path)")):
        loop.fit(**fit, resume=value)


def test_the_weights_alone_can_be_taken(tmp_path):
    begun(tmp_path, WITHIN)
    saved = runs.newest(tmp_path)[1]
    for source in (tmp_path, newest_of(tmp_path), saved):
        loop, fit = script(seed=3, lr=0.5)
        before = leaves(loop.save())
        loop.restore(source, only="objective")
        after = leaves(loop.save())
        assert all(torch.equal(saved["objective"][name], value) for name, value in loop.objective.state_dict().items())
        changed = differences(before, after)
        assert changed
        assert all(name.startswith("/objective") for name in changed)
        assert loop.fit(**fit).step == 10
    with pytest.raises(ax.UnknownNameError, match="objective"):
        loop.restore(tmp_path, only="objectives")


def test_a_run_directory_is_restored_from_its_newest(tmp_path):
    begun(tmp_path, WITHIN)
    assert len(runs.entries(tmp_path)) == 2
    loop, fit = script()
    loop.restore(tmp_path)
    assert loop.state.step == WITHIN
    # A fit without resume trains that much more: the rest of the epoch, and another.
    assert loop.fit(**fit).step == 15


def test_after_a_failure_without_a_directory_it_goes_on_and_says_what_that_means():
    loop, fit = script()
    loop.on("after_backward")(lambda state: 1 / 0 if state.step == WITHIN else None)
    with pytest.raises(ZeroDivisionError):
        loop.fit(**fit)
    loop.callbacks.clear()
    with pytest.warns(ax.AxonWarning, match="the last fit failed within a step, of which a part may be done"):
        result = loop.fit(**fit, resume=True)
    assert (result.status, result.step) == ("completed", 10)


def test_after_a_failure_with_a_directory_the_same_loop_goes_back_to_the_checkpoint(tmp_path):
    reference = whole(CASE, tmp_path / "whole")
    loop = break_off(CASE, tmp_path / "run", "raise", WITHIN)
    loop.callbacks.pop()
    _, fit = make(CASE)
    assert not differences(reference, outcome(loop, loop.fit(**fit, resume=True), tmp_path / "run"))


def test_the_directory_of_another_run_is_refused(tmp_path):
    begun(tmp_path, WITHIN)
    kept = (tmp_path / "history.jsonl").read_text()
    loop, fit = script(tmp_path)
    with pytest.raises(ax.ConfigurationError, match=re.escape("go on with that run by fit(..., resume=True)")):
        loop.fit(**fit)
    assert (tmp_path / "history.jsonl").read_text() == kept
    assert told(tmp_path) == []


def test_checkpoints_alone_make_it_another_run_too(tmp_path):
    begun(tmp_path, WITHIN)
    (tmp_path / "history.jsonl").unlink()
    loop, fit = script(tmp_path)
    with pytest.raises(ax.ConfigurationError, match="holds another run already"):
        loop.fit(**fit)


# --- which checkpoints there are --------------------------------------------------------------------------------------


def names(directory):
    return [path.name for path in sorted(directory.glob("step-*"))]


def steps(directory):
    return [int(name[5:14]) for name in names(directory)]


class Reading(ax.Callback):
    """Makes ``val/loss`` what is wanted, look after look."""

    def __init__(self, values, name="val/loss"):
        super().__init__()
        self.values, self.name, self.looks = values, name, 0

    def after_evaluate(self, state):
        state.record({self.name: self.values[self.looks]})
        self.looks += 1

    def state_dict(self):
        return {"looks": self.looks}

    def load_state_dict(self, state):
        self.looks = state["looks"]


@pytest.mark.parametrize(("keep", "left"), [(1, [10]), (3, [8, 9, 10]), (None, list(range(1, 11)))])
def test_the_last_are_kept(tmp_path, keep, left):
    loop, fit = script(tmp_path, callbacks=[ax.Checkpoint(every=1, keep_last=keep)])
    loop.fit(**fit)
    assert steps(tmp_path) == left


def test_by_default_the_last_two_epochs(tmp_path):
    loop, fit = script(tmp_path, epochs=4)
    loop.fit(**fit)
    assert steps(tmp_path) == [15, 20]


NAN = math.nan
BEST = {
    "min": ("min", 1, [3.0, 1.0, 2.0, 4.0, 5.0], {4: 1.0}),
    "max": ("max", 1, [3.0, 1.0, 2.0, 4.0, 0.0], {8: 4.0}),
    "two": ("min", 2, [3.0, 1.0, 2.0, 4.0, 5.0], {4: 1.0, 6: 2.0}),
    "NaN": ("min", 1, [NAN, 2.0, NAN, NAN, 3.0], {4: 2.0}),
    "NaN, max": ("max", 2, [NAN, 2.0, NAN, 1.0, NAN], {4: 2.0, 8: 1.0}),
    "NaN alone": ("min", 1, [NAN] * 5, {}),
    "ties": ("min", 1, [2.0, 1.0, 1.0, 1.0, 2.0], {4: 1.0}),
    "ties, max, two": ("max", 2, [2.0, 2.0, 2.0, 1.0, 2.0], {2: 2.0, 4: 2.0}),
    "infinite": ("max", 1, [-math.inf, 1.0, 0.5, 0.0, 0.0], {4: 1.0}),
}


@pytest.mark.parametrize("every", ["2 steps", "4 steps", "100 steps", "1 epoch"])
@pytest.mark.parametrize(("mode", "keep", "values", "best"), BEST.values(), ids=BEST)
def test_the_best_are_kept(tmp_path, every, mode, keep, values, best):
    """What is ranked, named and saved is one and the same step, whether or not a cadence is due there too."""
    checkpoint = ax.Checkpoint(every=every, keep_last=1, best="val/loss", mode=mode, keep_best=keep)
    loop, fit = script(tmp_path, callbacks=[Reading(values), checkpoint], validate="2 steps")
    never = pytest.warns(ax.AxonWarning, match="'val/loss' was NaN whenever it was read, so no checkpoint was kept")
    with contextlib.nullcontext() if best else never:
        loop.fit(**fit)
    assert steps(tmp_path) == sorted({*best, 10})
    for entry in runs.entries(tmp_path):
        tree = runs.files.read(entry.path)
        assert tree["counters"]["step"] == entry.step
        read = entry.reading("val/loss")
        row = next(row for row in tree["history"] if row["step"] == entry.step)
        assert read == row["val/loss"] or read != read
        expected = values[entry.step // 2 - 1]
        assert entry.path.name == f"step-{entry.step:09d}" + (f"-val_loss-{expected:.6g}" if math.isfinite(expected) else "")
        assert entry.step == 10 or best[entry.step] == read


def test_the_weights_of_the_best_are_those_that_were_evaluated(tmp_path):
    checkpoint = ax.Checkpoint(every=100, keep_last=1, best="val/loss")
    loop, fit = script(tmp_path, callbacks=[checkpoint], validate="3 steps")
    loop.fit(**fit)
    best = loop.state.history.best("val/loss")
    other, fit = script()
    (path,) = [entry.path for entry in runs.entries(tmp_path) if entry.step == best["step"]]
    other.restore(path, only="objective")
    assert other.evaluate(fit["validation"])["loss"] == best["val/loss"]
    assert path.name == f"step-{best['step']:09d}-val_loss-{best['val/loss']:.6g}"


def test_the_best_outlives_a_restart(tmp_path):
    def again(**how):
        return script(
            tmp_path,
            callbacks=[Reading([2.0, 1.0, 3.0, 4.0, 1.5]), ax.Checkpoint(every=1, keep_last=1, best="val/loss")],
            validate="2 steps",
            **how,
        )

    loop, fit = again(stop=WITHIN)
    loop.fit(**fit)
    loop, fit = again()
    loop.fit(**fit, resume=True)
    assert names(tmp_path) == ["step-000000004-val_loss-1", "step-000000010-val_loss-1.5"]


@pytest.mark.parametrize("stop", [None, 4, 6, 8, 10])
def test_the_permanent_are_never_pruned(tmp_path, stop):
    """Also where the run has ended with one of them, and was started again."""

    def again(**how):
        return script(tmp_path, callbacks=[ax.Checkpoint(every=1, keep_last=1, permanent="4 steps")], **how)

    if stop is not None:
        loop, fit = again(stop=stop)
        loop.fit(**fit)
    loop, fit = again()
    loop.fit(**fit, resume=True)
    assert steps(tmp_path) == [4, 8, 10]
    for _ in range(2):  # it is finished; then with more to do
        loop, fit = again(epochs=3)
        loop.fit(**fit, resume=True)
    assert steps(tmp_path) == [4, 8, 12, 15]


def test_a_finished_run_that_is_started_again_stays_permanent(tmp_path):
    def again(epochs):
        return script(tmp_path, callbacks=[ax.Checkpoint(keep_last=1, permanent="1 epoch")], epochs=epochs)

    for epochs in (1, 1, 1, 2, 2, 3):
        loop, fit = again(epochs)
        loop.fit(**fit, resume=True)
    assert steps(tmp_path) == [5, 10, 15]


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a\\b", "val/../../x", "\x00x", "x" * 400, "é/loss\n"])
def test_names_cannot_leave_the_run_directory(tmp_path, name):
    directory = tmp_path / "deep" / "run"
    checkpoint = ax.Checkpoint(every=100, keep_last=1, best=name, mode="min")
    loop, fit = script(directory, callbacks=[Reading([2.0, 1.0, 3.0, 4.0, 5.0], name), checkpoint], validate="2 steps")
    loop.fit(**fit)
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"run"}
    assert steps(directory) == [4, 10]
    for made in names(directory):
        assert re.fullmatch(r"step-\d{9}-[A-Za-z0-9_]*-[\d.]+", made)
    assert runs.newest(directory)[1]["counters"]["step"] == 10
    assert [entry.reading(name) for entry in runs.entries(directory)] == [1.0, 5.0]


def test_who_goes_back_goes_on_from_there(tmp_path):
    """The checkpoints of the branch that was left are no longer the newest, though their steps are higher."""
    loop, fit = script(tmp_path, callbacks=[ax.Checkpoint(every=1, keep_last=None)])
    loop.fit(**fit)
    loop, fit = script(tmp_path, callbacks=[ax.Checkpoint(every=1, keep_last=None)], lr=0.01, seed=8, stop=7)
    loop.restore(tmp_path / "step-000000003")
    loop.fit(**fit)
    found, tree = runs.newest(tmp_path)
    assert found.name == "step-000000007"
    assert tree["counters"]["step"] == 7
    assert [row["step"] for row in tree["history"]] == [5, 7]
    expected = loop.objective.state_dict()
    other, fit = script(tmp_path, callbacks=[ax.Checkpoint(every=1, keep_last=None)], lr=0.01, seed=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the seed: the run keeps its own
        other.fit(**{**fit, "steps": 4}, resume=True)
    assert all(torch.equal(expected[name], value) for name, value in other.objective.state_dict().items())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"best": 5}, "best=5: the name of a reading"),
        ({"best": ""}, "best='': the name of a reading"),
        ({"best": ["val/loss"]}, "the name of a reading"),
        ({"best": "val/los"}, "^best='val/los': say mode='min' or mode='max'"),
        ({"mode": "min"}, "mode='min' is of the best: say by which reading"),
        ({"keep_best": 3}, "keep_best=3 is of the best: say by which reading"),
        ({"best": "val/loss", "keep_best": 0}, "keep_best=0: a whole number"),
        ({"best": "val/loss", "mode": "least"}, "unknown mode 'least'"),
        ({"asynchronous": "yes"}, "asynchronous='yes': None, True or False"),
        ({"asynchronous": 1}, "asynchronous=1: None, True or False"),
        ({"asynchronous": 0}, "asynchronous=0: None, True or False"),
        ({"every": "150%"}, "every='150%' is never due"),
        ({"permanent": "101%"}, "permanent='101%' is never due"),
        ({"every": 3, "on_failure": "ignore"}, "unknown on_failure 'ignore'"),
    ],
)
def test_arguments_that_say_nothing_are_refused(how, words):
    with pytest.raises(ax.ConfigurationError, match=words):
        ax.Checkpoint(**how)


def test_arguments_at_their_bounds_are_taken():
    ax.Checkpoint("100%", permanent="100%", asynchronous=False)
    assert ax.Checkpoint(best="val/loss").keep == runs.Keep(2, 1, "val/loss", "min")
    assert ax.Checkpoint(best="val/los", mode="max", keep_best=2).keep == runs.Keep(2, 2, "val/los", "max")


@pytest.mark.parametrize(
    ("best", "near", "step"),
    [
        ("val/acuracy", "'val/accuracy'", 3),
        ("val/lss", "'val/loss'", 3),
        ("train/accurcy", "'train/accuracy'", 5),
        ("loss", "'val/loss'", 5),
    ],
)
def test_a_best_that_is_not_among_the_readings_is_told_when_they_come(tmp_path, best, near, step):
    loop, fit = script(tmp_path, callbacks=[ax.Checkpoint(best=best, mode="min")], validate="3 steps")
    with pytest.raises(ax.UnknownNameError, match=f"unknown reading ranked by Checkpoint.*'{best}': did you mean .*{near}"):
        loop.fit(**fit)
    assert loop.state.step == step


def test_a_best_that_a_callback_records_is_known(tmp_path):
    checkpoint = ax.Checkpoint(best="mine", mode="min", keep_last=1)
    loop, fit = script(tmp_path, callbacks=[Reading([2.0, 1.0, 3.0, 4.0, 5.0], "mine"), checkpoint], validate="2 steps")
    loop.fit(**fit)
    assert steps(tmp_path) == [4, 10]


def test_a_reading_of_a_part_of_an_epoch_ranks_no_checkpoint(tmp_path):
    """A fit that ended within an epoch has read what an epoch reads; the uninterrupted one never does."""
    kept = {}
    for stop in (None, 1, 3, 7, 8):
        where = tmp_path / f"{stop}"
        for one in (stop, None):
            loop, fit = script(where, callbacks=[ax.Checkpoint(best="train/loss", keep_last=1)], epochs=3, stop=one)
            loop.fit(**fit, resume=True)
            if one is not None:
                (last,) = [entry for entry in runs.entries(where) if entry.step == one]
                assert last.path.name == f"step-{one:09d}"
                assert math.isnan(last.reading("train/loss"))
                assert "train/loss" in loop.state.history.rows[-1]
        kept[stop] = names(where)
    assert kept == dict.fromkeys(kept, kept[None])


def test_of_a_row_that_a_fits_end_has_added_to_what_was_there_ranks(tmp_path):
    loop, fit = script(tmp_path, callbacks=[ax.Checkpoint(best="mine", mode="max", keep_last=1)])
    loop.on("after_batch")(lambda state: state.record({"mine": float(state.step)}))
    loop.fit(**{**fit, "validation": None, "epochs": None, "steps": 4})
    assert loop.state.history.partial is not None
    assert "train/loss" in loop.state.history.rows[-1]
    (entry,) = runs.entries(tmp_path)
    assert entry.path.name == "step-000000004-mine-4"
    assert entry.about["readings"] == {"mine": 4.0}
    assert entry.about["best"] == {"monitor": "mine", "mode": "max"}


def test_two_checkpoints_are_refused(tmp_path):
    loop, fit = script(tmp_path, callbacks=[ax.Checkpoint(every=1), ax.Checkpoint(best="val/loss")])
    before = leaves(loop.save())
    with pytest.raises(ax.ConfigurationError, match="one does all"):
        loop.fit(**fit)
    assert not names(tmp_path)
    assert differences(before, leaves(loop.save())) == []


def test_after_a_resume_the_cadence_is_what_it_was(tmp_path):
    kept = {}
    for name, stops in (("whole", []), ("broken", [3, 4, 9])):
        for stop in [*stops, None]:
            how = {"callbacks": [ax.Checkpoint(every=3, keep_last=None)], "stop": stop, "epochs": 3}
            loop, fit = script(tmp_path / name, **how)
            loop.fit(**fit, resume=True)
        kept[name] = steps(tmp_path / name)
    assert kept["whole"] == [3, 6, 9, 12, 15]
    assert kept["broken"] == [3, 4, 6, 9, 12, 15]


def test_only_the_newest_that_is_good_is_taken(tmp_path):
    reference = whole(CASE, tmp_path / "whole")
    break_off(CASE, tmp_path / "run", "int", WITHIN, every=1)
    file = newest_of(tmp_path / "run") / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(ax.AxonWarning, match="Went on from the next older good one.*step-000000006"):
        found = finish(replace(CASE), tmp_path / "run")
    assert not differences(reference, found)


def rows(width=8, between=None, x=None, directory=None, step=None):
    """A fit of rows in memory, with another module in the middle."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = Net(width)
    if between is not None:
        objective.net[1] = between
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.05), progress=False, directory=directory)
    loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == step else None)
    made = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) if x is None else x
    return loop, ax.ArrayDataset(made, (made.sum(1) > 0).long())


@pytest.mark.parametrize("between", [nn.Tanh(), nn.LeakyReLU(0.2), nn.Sequential(nn.ReLU())], ids=lambda m: type(m).__name__)
def test_a_module_that_is_another_is_told(tmp_path, between):
    loop, data = rows(directory=tmp_path, step=WITHIN)
    loop.fit(data, epochs=2, batch_size=8)
    again, data = rows(between=between, directory=tmp_path)
    words = (
        "the number of modules: it was 5, and is 6"
        if isinstance(between, nn.Sequential)
        else rf"net\.1 is {type(between).__name__}\("
    )
    with pytest.warns(UserWarning, match=words):
        again.fit(data, epochs=2, batch_size=8, resume=True)


@pytest.mark.parametrize(
    "change", [lambda x: x.flip(0), lambda x: x + 1, lambda x: x.double()], ids=["order", "values", "dtype"]
)
def test_other_rows_of_the_same_size_are_other_batches(tmp_path, change):
    loop, data = rows(directory=tmp_path, step=WITHIN)
    loop.fit(data, epochs=2, batch_size=8)
    again, _ = rows(directory=tmp_path)
    x = change(data.tensors[0])
    with pytest.raises(ax.CheckpointError, match="rows at its beginning, middle and end, by a digest"):
        again.fit(ax.ArrayDataset(x, (x.sum(1) > 0).long()), epochs=2, batch_size=8, resume=True)


def test_a_script_of_two_fits_in_one_directory_is_told(tmp_path):
    loop, data = rows(directory=tmp_path)
    loop.fit(data, epochs=3, batch_size=8)
    loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == 19 else None)
    loop.fit(data, epochs=2, batch_size=8)
    again, data = rows(directory=tmp_path)
    with pytest.warns(UserWarning, match=r"began at step 15 with epochs=2, and this one says epochs=3.*a directory of its own"):
        again.fit(data, epochs=3, batch_size=8, resume=True)
    same, data = rows(directory=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.fit(data, epochs=3, batch_size=8, resume=True)  # the same limits as the fit that was gone on with


def test_groups_that_are_others_are_told_by_their_sizes(tmp_path):
    def made(**groups):
        return ax.Loop(Net(), ax.Optimizer("adamw", lr=0.05, **groups), progress=False, directory=tmp_path)

    _, data = rows()
    made().fit(data, epochs=1, batch_size=8)
    with pytest.raises(ax.CheckpointError, match="other groups of parameters than the saved one: of 2 and 2 here, of 4 there"):
        made(no_decay=True).fit(data, epochs=2, batch_size=8, resume=True)


@pytest.mark.parametrize("together", [2, 3, 4])
@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_last_group_of_small_batches_that_is_smaller(tmp_path, together, step):
    x = torch.randn(10, 4, 6, generator=torch.Generator().manual_seed(0))
    batches = [(one, (one.sum(1) > 0).long()) for one in x]

    def stream():
        yield from batches

    def made(directory=None, stop=None):
        loop, _ = rows(directory=directory, step=stop)
        return loop

    whole = made()
    whole.fit(stream, epochs=2, accumulate=together)
    made(tmp_path, step).fit(stream, epochs=2, accumulate=together)
    again = made(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what was read once more
        again.fit(stream, epochs=2, accumulate=together, resume=True)
    for one, other in zip(whole.objective.parameters(), again.objective.parameters(), strict=True):
        assert torch.equal(one, other)


def mixture_of(directory, *, weights=(1, 1), shift=0.0, count=24, step=None):
    loop, _ = rows(directory=directory, step=step)
    parts = {}
    for seed, name in enumerate("ab"):
        x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + (shift if name == "a" else 0.0)
        parts[name] = ax.ArrayDataset(x, (x.sum(1) > 0).long())
    return loop, ax.Mixture(parts, weights=list(weights))


@pytest.mark.parametrize("change", [{"weights": (9, 1)}, {"shift": 1.0}, {"weights": (2, 2)}], ids=str)
def test_another_mixture_is_other_batches(tmp_path, change):
    loop, data = mixture_of(tmp_path, step=4)
    loop.fit(data, epochs=2, batch_size=8)
    again, data = mixture_of(tmp_path, **change)
    with pytest.raises(ax.CheckpointError, match="the training data's mixture's weights and tasks"):
        again.fit(data, epochs=2, batch_size=8, resume=True)


class Wordy(nn.Module):
    """Says something else each time, or cannot say anything yet."""

    def __init__(self, ready):
        super().__init__()
        self.ready = ready

    def forward(self, x):
        return x.relu()

    def extra_repr(self):
        if not self.ready:
            raise AttributeError("nothing is known yet")
        return f"f={object()}"


@pytest.mark.parametrize("ready", [True, False])
def test_what_a_module_of_the_users_says_is_not_asked(tmp_path, ready):
    loop, data = rows(between=Wordy(ready), directory=tmp_path, step=WITHIN)
    loop.fit(data, epochs=2, batch_size=8)
    again, data = rows(between=Wordy(ready), directory=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.fit(data, epochs=2, batch_size=8, resume=True)


def test_a_lazy_module_that_has_become_another_is_the_same():
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    loop = ax.Loop(ax.Supervised(net, "cross_entropy"), ax.Optimizer("sgd", lr=0.05), progress=False)
    loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == WITHIN else None)
    _, data = rows()
    loop.fit(data, epochs=2, batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.fit(data, epochs=2, batch_size=8, resume=True)
