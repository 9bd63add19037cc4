import contextlib
import errno
import json
import math
import os
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import axontrain as ax
from axontrain import history as history_module
from axontrain.checkpoint.encode import decode, encode
from axontrain.clock import Every


def loop_of(net=None, **options):
    torch.manual_seed(0)
    objective = ax.Supervised(net or nn.Linear(3, 2), "cross_entropy", metrics=["accuracy"])
    return ax.Loop(objective, ax.Optimizer("adamw", lr=0.1), device="cpu", progress=False, **options)


def batches(count=4):
    made = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, generator=made), torch.randint(2, (4,), generator=made)) for _ in range(count)]


def strict(line):
    """Parse a line of JSON as other languages would: without NaN."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# --- history ---------------------------------------------------------------------------------------------------------


def history_of(*rows):
    history = ax.History()
    for step, epoch, readings in rows:
        history.add(step, epoch, readings)
    return history


def test_readings_of_one_step_are_one_row():
    history = history_of((10, 1, {"train/loss": 0.5}), (10, 1, {"val/loss": 0.6}), (20, 2, {"train/loss": 0.4}))
    assert history.rows == [
        {"epoch": 1, "step": 10, "train/loss": 0.5, "val/loss": 0.6},
        {"epoch": 2, "step": 20, "train/loss": 0.4},
    ]
    assert len(history) == 2
    assert list(history) == history.rows
    assert history.columns == ["train/loss", "val/loss"]


def test_a_later_reading_of_a_step_replaces_the_earlier():
    assert history_of((10, 0, {"a": 1}), (10, 1, {"a": 2})).rows == [{"epoch": 1, "step": 10, "a": 2}]


@given(st.lists(st.tuples(st.integers(0, 5), st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=2)), max_size=8))
def test_the_rows_follow_the_steps(readings):
    readings.sort(key=lambda item: item[0])
    history = history_of(*((step, 0, values) for step, values in readings))
    merged = {}
    for step, values in readings:
        merged.setdefault(step, {"epoch": 0, "step": step}).update(values)
    assert history.rows == list(merged.values())


def test_a_column_is_got_by_name():
    history = history_of((1, 0, {"a": 1.0}), (2, 0, {"b": 5}), (3, 1, {"a": 3.0}))
    assert history["a"] == [1.0, 3.0]
    assert history["step"] == [1, 2, 3]
    assert history["epoch"] == [0, 0, 1]
    with pytest.raises(ax.UnknownNameError, match="unknown reading 'val/los'"):
        history["val/los"]


@pytest.mark.parametrize(("mode", "step"), [("min", 3), ("max", 2)])
def test_the_best_row_is_never_one_that_is_nan(mode, step):
    history = history_of((1, 0, {"a": math.nan}), (2, 0, {"a": 5.0}), (3, 0, {"a": 1.0}), (4, 0, {"b": 0.0}))
    assert history.best("a", mode)["step"] == step


def test_the_best_of_equals_is_the_first():
    assert history_of((1, 0, {"a": 1.0}), (2, 0, {"a": 1.0})).best("a")["step"] == 1


def test_the_best_of_nothing_is_an_error():
    history = history_of((1, 0, {"a": math.nan, "matrix": [[1]]}))
    with pytest.raises(ax.UnknownNameError, match="unknown mode 'mim': did you mean 'min'"):
        history.best("a", "mim")
    for name in ("b", "a"):
        with pytest.raises(ax.AxonError, match=f"'{name}'"):
            history.best(name)
    with pytest.raises(ax.AxonError, match="matrix"):  # a matrix has no order
        history.best("matrix")


def test_histories_are_equal_by_their_rows():
    assert history_of((1, 0, {"a": 1})) == history_of((1, 0, {"a": 1}))
    assert history_of((1, 0, {"a": 1})) != history_of((1, 0, {"a": 2}))
    assert ax.History() != []


def test_the_file_has_a_line_of_strict_json_for_each_reading(tmp_path):
    path = tmp_path / "runs" / "new" / "history.jsonl"
    history = ax.History(path)
    history.add(10, 1, {"train/loss": math.nan, "up": math.inf, "down": -math.inf})
    history.add(10, 1, {"val/matrix": [[1, math.nan], [0, 2]], "name — ü": 1.5})
    lines = [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"epoch": 1, "step": 10, "train/loss": "nan", "up": "inf", "down": "-inf"},
        {"epoch": 1, "step": 10, "val/matrix": [[1, "nan"], [0, 2]], "name — ü": 1.5},
    ]


@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a pipe", "a directory"])
def test_what_is_no_file_of_the_runs_is_not_written_to(tmp_path, kind):
    path, victim = tmp_path / "history.jsonl", tmp_path / "victim"
    if kind == "a link":
        victim.write_text("precious")
    if "link" in kind:
        path.symlink_to(victim)
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    history = ax.History(path)
    with pytest.raises(ax.ConfigurationError, match=r"history\.jsonl is a link, or no file"):
        history.rewrite()
    with pytest.warns(ax.AxonWarning, match=r"history\.jsonl could not be written: .*kept in memory"):
        history.add(1, 0, {"a": 1.0})
    assert victim.exists() == (kind == "a link")
    assert kind != "a link" or victim.read_text() == "precious"
    assert len(history) == 1


def test_what_is_written_anew_goes_through_a_file_that_nobody_has_laid_out(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    stale, other = tmp_path / f"history.jsonl.tmp-{'ab' * 16}", tmp_path / "history.jsonl.tmp-mine"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "history.jsonl.tmp").symlink_to(victim)
    stale.symlink_to(victim)
    other.touch()
    history = ax.History(path)
    history.add(1, 0, {"a": 1.0})
    history.rewrite()
    assert victim.read_text() == "precious"
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "history.jsonl", "history.jsonl.tmp", "history.jsonl.tmp-mine", "victim"
    ]  # fmt: skip
    fresh = uuid.UUID(int=7)
    monkeypatch.setattr(uuid, "uuid4", lambda: fresh)
    monkeypatch.setattr(Path, "unlink", lambda self: None)  # somebody lays it out in between
    path.with_name(f"history.jsonl.tmp-{fresh.hex}").symlink_to(victim)
    with pytest.warns(ax.AxonWarning, match="File exists"):
        history.rewrite()
    assert victim.read_text() == "precious"


def test_a_full_disk_is_told_once_and_what_it_has_lost_is_written_later(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    history = ax.History(path)
    history.add(1, 0, {"a": 1.0})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(ax.AxonWarning, match=r"could not be written: .*No space left.* kept in memory"):
            history.rewrite()
        history.add(2, 0, {"a": 2.0})  # a second warning would be an error
        history.rewrite()
    assert [one.name for one in tmp_path.iterdir()] == ["history.jsonl"]
    assert len(path.read_text().splitlines()) == 1
    history.add(3, 0, {"a": 3.0})
    assert [strict(line) for line in path.read_text().splitlines()] == history.rows


@pytest.mark.parametrize("error", [OSError("renamed"), ax.CheckpointError("renamed")])
def test_a_guarded_history_is_written_nowhere_else(tmp_path, error):
    history = ax.History(tmp_path / "run" / "history.jsonl")
    history.add(1, 0, {"a": 1.0})
    (tmp_path / "run").rename(tmp_path / "moved")

    def guard():
        raise error

    history.guard = guard
    told = pytest.warns(ax.AxonWarning, match="renamed") if isinstance(error, OSError) else pytest.raises(type(error))
    with told:
        history.add(2, 0, {"a": 2.0})
    history.guard = lambda: None
    with contextlib.nullcontext() if isinstance(error, OSError) else pytest.warns(ax.AxonWarning, match="No such file"):
        history.add(3, 0, {"a": 3.0})
    assert [one.name for one in tmp_path.iterdir()] == ["moved"]
    assert history["a"] == [1.0, 2.0, 3.0]
    (tmp_path / "moved").rename(tmp_path / "run")
    history.rewrite()
    assert [strict(line) for line in history.path.read_text().splitlines()] == history.rows


def test_a_history_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history_of((1, 0, {"a": 1}))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_history_can_be_shown():
    assert str(ax.History()) == "no readings"
    assert repr(ax.History()) == "History(0 rows of nothing)"
    assert "<table>" in ax.History()._repr_html_()


def test_text_and_repr_tell_the_readings():
    history = history_of((10, 1, {"train/loss": 0.51234}), (20, 2, {"train/loss": math.nan}))
    assert repr(history) == "History(2 rows of train/loss)"
    assert str(history).splitlines() == ["epoch  step  train/loss", "    1    10      0.5123", "    2    20         nan"]


EVIL = "<script>alert('x')</script>"


@pytest.mark.parametrize("plots", [True, False], ids=["with matplotlib", "without"])
def test_names_and_values_in_html_are_escaped(monkeypatch, plots):
    if not plots:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)  # as if it were not installed
    else:
        pytest.importorskip("matplotlib")
    shown = history_of((1, 0, {EVIL: 1.0, '"><img onerror=x>': 2.0}), (2, 0, {EVIL: 2.0}))._repr_html_()
    assert "<script>" not in shown
    assert "onerror=x>" not in shown
    assert "&lt;script&gt;" in shown
    assert ("data:image/png;base64," in shown) is plots


@pytest.mark.parametrize("name", ["$\\frac$", "a $x$ b$", "_hidden", "100 %", "a_b^c", "{", "val/_x"])
def test_any_name_can_be_drawn(name):
    pytest.importorskip("matplotlib")
    assert "data:image/png" in history_of((1, 0, {name: 1.0}), (2, 0, {name: math.nan}))._repr_html_()


# --- result ----------------------------------------------------------------------------------------------------------


def test_a_result_tells_how_it_ended():
    result = loop_of().fit(batches(), batches(2), epochs=2)
    assert (result.status, result.reason, result.ok) == ("completed", "epochs=2", True)
    assert set(result.values) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert result.history == result.state.history
    assert str(result).endswith("completed (epochs=2) at epoch 2, step 8")
    assert "val/accuracy" in str(result)
    assert "completed (epochs=2) at epoch 2, step 8" in result._repr_html_()
    assert "LoopState" not in repr(result)


def test_the_values_of_a_result_stay_when_training_goes_on():
    loop = loop_of()
    result = loop.fit(batches(), epochs=1)
    before, said, rows = dict(result.values), str(result), len(result.history)
    loop.fit(batches(), epochs=1)
    assert (result.values, str(result), len(result.history)) == (before, said, rows)


@pytest.mark.parametrize(("status", "ok"), [("completed", True), ("stopped", True), ("interrupted", False)])
def test_a_run_that_was_interrupted_is_not_ok(status, ok):
    loop = loop_of()
    assert ax.Result(status, "", {}, loop.state.history, loop.state).ok is ok


def test_a_reason_in_html_is_escaped():
    loop = loop_of()
    loop.on("after_epoch")(lambda state: ax.Stop(EVIL))
    shown = loop.fit(batches(), epochs=2)._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


# --- readings of one's own -------------------------------------------------------------------------------------------


def test_record_adds_to_values_and_history():
    state = loop_of().state
    state.record({"mine": 1.5, "matrix": [[1, 2]]})
    assert state.values == {"mine": 1.5, "matrix": [[1, 2]]}
    assert state.history.rows == [{"epoch": 0, "step": 0, "mine": 1.5, "matrix": [[1, 2]]}]


@pytest.mark.parametrize("value", [torch.tensor(1.0), "high", None, {}])
def test_record_takes_numbers_on_the_host_alone(value):
    state = loop_of().state
    with pytest.raises(ax.ConfigurationError, match=r"record\('mine': .*a reading is a number on the host"):
        state.record({"mine": value})
    assert state.values == {}
    assert len(state.history) == 0


# --- attaching -------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_what_is_attached_is_saved_and_restored():
    one, other = loop_of(), loop_of()
    mine, theirs = Counter(), Counter()
    one.state.attach("mine", mine)
    mine.count = 3
    other.state.attach("mine", theirs)
    other.state.load_state_dict(one.state.state_dict())
    assert theirs.count == 3


def test_what_is_attached_after_restoring_is_filled_then_once():
    one, other, third = loop_of(), loop_of(), loop_of()
    one.state.attach("mine", mine := Counter())
    mine.count = 3
    other.state.load_state_dict(one.state.state_dict())
    third.state.load_state_dict(other.state.state_dict())  # saved on before anybody has attached it
    third.state.attach("mine", late := Counter())
    assert late.count == 3
    late.count = 5
    third.state.attach("mine", late)
    assert late.count == 5


def test_a_name_belongs_to_one_object():
    state = loop_of().state
    state.attach("mine", mine := Counter())
    state.attach("mine", mine)
    with pytest.raises(ax.ConfigurationError, match=r"attach\('mine'\): another object has that name"):
        state.attach("mine", Counter())
    with pytest.raises(ax.ConfigurationError, match=r"attach\('x'\): int has no state_dict and load_state_dict"):
        state.attach("x", 3)


def test_a_module_can_be_attached():
    one, other = loop_of(), loop_of()
    one.state.attach("teacher", teacher := nn.Linear(2, 2))
    other.state.attach("teacher", student := nn.Linear(2, 2))
    other.state.load_state_dict(decode(*encode(one.state.state_dict())))
    assert torch.equal(teacher.weight, student.weight)


def test_a_cadence_is_made_once_by_its_name():
    state = loop_of().state
    first = state.cadence("x", Every(2))
    assert state.cadence("x", Every(3)) is first
    assert repr(first.every) == "Every('3 steps')"


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_state_shares_no_tensor_with_what_trains():
    loop = loop_of()
    loop.fit(batches(), steps=2)
    state = loop.state.state_dict()
    before, _ = encode(state)[0], loop.fit(batches(), epochs=1)
    weight = state["objective"]["model.weight"]
    assert not torch.equal(weight, loop.objective.model.weight)
    assert encode(state)[0] == before


def test_values_and_history_of_a_saved_state_do_not_change_with_the_run():
    loop = loop_of()
    loop.fit(batches(), epochs=1)
    state = loop.state.state_dict()
    before = json.dumps([state["values"], state["history"]])
    loop.fit(batches(), epochs=2)
    loop.state.history.rows[0]["train/loss"] = -1
    assert json.dumps([state["values"], state["history"]]) == before


def test_a_state_of_another_objective_is_refused_and_changes_nothing():
    state = loop_of().state.state_dict()
    for net, told in (
        (nn.Linear(4, 2), r"model\.weight is \(2, 3\) there, \(2, 4\) here"),
        (nn.Sequential(nn.Linear(3, 2)), r"it lacks model\.0\.bias, model\.0\.weight; this objective lacks model\.bias"),
    ):
        loop = loop_of(net)
        loop.train_on_batch((torch.ones(2, 4 if isinstance(net, nn.Linear) else 3), torch.zeros(2, dtype=torch.long)))
        before = encode(loop.state.state_dict())[0]
        with pytest.raises(ax.CheckpointError, match=told):
            loop.state.load_state_dict(state)
        assert encode(loop.state.state_dict())[0] == before


def test_a_state_of_another_optimizer_changes_nothing():
    torch.manual_seed(0)
    loop = loop_of()
    groups = {"*.bias": {"weight_decay": 0.0}}
    other = ax.Loop(
        ax.Supervised(nn.Linear(3, 2), "cross_entropy"), ax.Optimizer("adamw", lr=0.1, groups=groups), progress=False
    )
    state = other.state.state_dict()
    before = loop.objective.model.weight.detach().clone()
    with pytest.raises(ax.CheckpointError):
        loop.state.load_state_dict(state)
    assert torch.equal(loop.objective.model.weight, before)
    two = ax.Loop(ax.Supervised(nn.Linear(3, 2), "cross_entropy"), {"model": ax.Optimizer("sgd", lr=0.1)}, progress=False)
    with pytest.raises(ax.CheckpointError, match=r"has the optimizers \['model'\], this Loop \['main'\]"):
        loop.state.load_state_dict(two.state.state_dict())


def test_the_clock_stands_between_fits():
    loop = loop_of()
    loop.fit(batches(), epochs=1)
    assert 0 < loop.state.elapsed == loop.state.elapsed


def test_the_repr_tells_where_a_run_stands():
    loop = loop_of()
    assert repr(loop.state) == "LoopState(ready, epoch=0, step=0, {})"
    loop.fit(batches(), epochs=1)
    assert repr(loop.state).startswith("LoopState(completed, epoch=1, step=4, {'train/loss': ")


def test_stops_have_reasons():
    assert ax.Stop("enough").reason == "enough"
    assert ax.StopEpoch() == ax.StopEpoch("a callback said so")


def test_a_directory_gets_the_history_of_a_fit(tmp_path):
    loop = loop_of(directory=tmp_path / "run")
    loop.fit(batches(), batches(1), epochs=2)
    lines = [strict(line) for line in Path(tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert lines == loop.state.history.rows


readings = st.dictionaries(
    st.sampled_from(["train/loss", "val/loss", "confusion", "count", "a/b"]),
    st.floats(allow_subnormal=True) | st.integers(-(2**70), 2**70) | st.booleans() | st.lists(st.integers(0, 3), max_size=2),
    max_size=4,
)


@given(st.lists(readings, max_size=12), st.integers(1, 5))
def test_a_history_of_any_length_is_saved_and_restored_to_the_last_bit(rows, packed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history_module, "PACKED", packed)
        history, again = ax.History(), ax.History()
        for step, row in enumerate(rows):
            history.add(step, 0, row)
            text, tensors = encode(history.state_dict())
            again.load_state_dict(decode(text, tensors))
            assert repr(again.rows) == repr([{**row} for row in history.rows]) or [
                sorted(map(repr, row.items())) for row in again.rows
            ] == [sorted(map(repr, row.items())) for row in history.rows]


def test_a_long_history_is_saved_by_columns():
    history = ax.History()
    for step in range(20_000):
        history.add(step, 0, {"train/loss": step / 7})
    text, tensors = encode(history.state_dict())
    assert len(text) < 500_000
    assert len(tensors) == 3


def test_a_history_that_cannot_be_written_is_warned_of_once_and_written_later(tmp_path):
    path = tmp_path / "run" / "history.jsonl"
    history = ax.History(path)
    history.add(1, 0, {"loss": 1.0})
    lines = path.read_text()
    path.unlink()
    path.mkdir()  # as unwritable as a full disk
    with pytest.warns(ax.AxonWarning, match=r"history\.jsonl could not be written"):
        history.add(2, 0, {"loss": 2.0})
    history.add(3, 0, {"loss": 3.0})  # a second warning would be an error here
    path.rmdir()
    path.write_text(lines)
    history.add(4, 0, {"loss": 4.0})
    history.add(5, 0, {"loss": 5.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_of_a_history_beyond_what_is_read_back_the_latest_rows_are_saved(monkeypatch):
    monkeypatch.setattr(history_module, "PACKED", 4)
    monkeypatch.setattr(history_module, "MOST_EARLY", 30)  # ten rows of three
    history, again = ax.History(), ax.History()
    for step in range(20):
        history.add(step, 0, {"loss": float(step)})
    with pytest.warns(ax.AxonWarning, match=r"its first 6 rows are in history\.jsonl alone"):
        saved = history.state_dict()
    again.load_state_dict(saved)
    assert [row["step"] for row in again.rows] == list(range(6, 20))


def test_readings_that_arrive_late_are_in_the_row_of_their_step(tmp_path, monkeypatch):
    monkeypatch.setattr("axontrain.history.PACKED", 2)
    history = ax.History(tmp_path / "history.jsonl")
    for step in (2, 4, 6, 8, 10):
        history.add(step, 0, {"a": float(step)})
    packed = history.state_dict()["early"]["step"]["values"].tolist()
    history.add(4, 0, {"b": 1.0})
    history.add(5, 0, {"b": 2.0})
    expected = [(2, None), (4, 1.0), (5, 2.0), (6, None), (8, None), (10, None)]
    assert [(row["step"], row.get("b")) for row in history] == expected
    again = ax.History()
    again.load_state_dict(history.state_dict())
    assert packed == [2, 4, 6, 8]
    assert again == history
    assert [row["step"] for row in map(json.loads, history.path.read_text().splitlines())] == [2, 4, 6, 8, 10, 4, 5]
