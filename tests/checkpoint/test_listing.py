"""The list of a run's checkpoints: each verified, why one is bad, and nothing in it that a terminal would obey."""

import json
import math
import re

import pytest
import torch

import axontrain as ax
from axontrain import cli
from axontrain.checkpoint import directory, runs
from axontrain.checkpoint.listing import listed


def save(where, step, /, **about):
    keep = runs.Keep(None)
    runs.commit(
        where, runs.name_of(step), directory.encoded({"step": step, "text": "x" * 5000}, {"number": step, **about}), keep
    )


@pytest.fixture
def three(tmp_path):
    save(tmp_path, 10, epoch=1, readings={"val/loss": 0.5}, time=1.7e9)
    save(tmp_path, 20, epoch=2, readings={"val/loss": 0.25}, permanent=True)
    save(tmp_path, 30, epoch=3)
    return tmp_path


def test_it_says_which_are_good_and_which_one_a_resumed_run_takes(three, capsys):
    assert cli.main(["checkpoints", str(three)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", *(runs.name_of(step) for step in (10, 20, 30))]
    assert "val/loss 0.5" in lines[1]
    assert "2023-11-1" in lines[1]
    assert lines[2].endswith("good, permanent")
    assert lines[3].endswith("good, the one that resume=True takes")
    assert re.search(r" 5\.\d* kB ", lines[1])


@pytest.mark.parametrize(
    ("file", "harm", "why"),
    [
        ("state.json", lambda content: content.replace(b"x", b"y", 1), "state.json is not of the content"),
        ("state.json", lambda content: content[:-1], "state.json is not of the size"),
        ("tensors.safetensors", None, "it has no tensors.safetensors"),
        ("manifest.json", None, "no checkpoint: it has no manifest.json"),
        ("about.json", lambda content: content.replace(b"3", b"4", 1), "about.json is not of the content"),
    ],
)
def test_it_says_why_one_is_bad_and_that_the_older_one_is_taken(three, capsys, file, harm, why):
    path = three / runs.name_of(30) / file
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    assert cli.main(["checkpoints", str(three)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "BAD: " in lines[3]
    assert why in lines[3]
    assert "the one that resume=True takes" in lines[2]


def test_one_checkpoint_can_be_looked_at_alone(three, capsys):
    assert cli.main(["checkpoints", str(three / runs.name_of(20))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("good, permanent")  # what a run would take is said of a run
    (three / runs.name_of(20) / "manifest.json").unlink()
    assert cli.main(["checkpoints", str(three / runs.name_of(20))]) == 1
    assert "BAD: " in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_says_which_is_the_best_where_the_run_has_said_by_what(tmp_path, capsys, mode):
    best = {"monitor": "val/\x1bloss", "mode": mode}
    for step, value in ((10, 0.5), (20, 0.25), (30, math.nan), (40, 0.75), (50, 0.3)):
        save(tmp_path, step, readings={"val/\x1bloss": value}, best=best)
    assert cli.main(["checkpoints", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "best" in line] == [runs.name_of(20 if mode == "min" else 40)]
    (line,) = [line for line in lines if "best" in line]
    assert line.endswith("good, best val/\\x1bloss")


@pytest.mark.parametrize("best", [None, "val/loss", [], {}, {"monitor": 5, "mode": "min"}, {"monitor": "a", "mode": "least"},
                                  {"monitor": "a", "mode": []}, {"monitor": "b", "mode": "min"}])  # fmt: skip
def test_where_it_is_not_known_by_what_none_is_the_best(tmp_path, best):
    save(tmp_path, 10, readings={"a": 1.0}, best=best)
    table, good = listed(tmp_path)
    assert good
    assert "best" not in table


HUGE = 10**400


@pytest.mark.parametrize(
    "about",
    [{"time": HUGE}, {"time": -HUGE}, {"time": True}, {"time": math.inf}, {"time": 1e300}, {"readings": {"x": HUGE}},
     {"readings": {"x": -HUGE}}, {"number": HUGE}, {"epoch": HUGE}, {"epoch": True}, {"step": HUGE}, {"step": -1},
     {"readings": {"x": HUGE}, "best": {"monitor": "x", "mode": "max"}}],
)  # fmt: skip
def test_numbers_out_of_all_range_are_no_traceback(tmp_path, capsys, about):
    save(tmp_path, 10, **{"number": 1, **about})
    save(tmp_path, 20, number=2)
    assert [entry.step for entry in runs.entries(tmp_path)] == [10, 20]
    assert cli.main(["checkpoints", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0" * 30 not in out
    assert "True" not in out.replace("resume=True", "")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_where_there_is_none_that_is_said(tmp_path, capsys, name):
    assert cli.main(["checkpoints", str(tmp_path / name)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("axontrain: ")


def test_what_a_terminal_would_obey_is_shown_as_text(tmp_path, capsys):
    save(tmp_path, 10, readings={"\x1b[2Jloss\n\r": 1.0, "=cmd()": 2.0, "<b>": 3.0}, epoch="\x1b[31m", time=1e300)
    assert cli.main(["checkpoints", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert all(char.isprintable() for line in out.splitlines() for char in line)
    assert "\\x1b[2Jloss\\n\\r 1" in out


def test_what_killed_saves_have_left_is_named(three, capsys):
    left = f"{runs.name_of(40)}.tmp-000000-{'ab' * 16}"
    (three / left).mkdir()
    assert cli.main(["checkpoints", str(three)]) == 0
    assert left in capsys.readouterr().out.splitlines()[-1]


def test_a_link_out_of_the_directory_is_bad(three):
    (three / runs.name_of(40)).symlink_to(three / runs.name_of(30))
    table, good = listed(three)
    assert not good
    assert "is no directory of its own" in table


def test_it_reads_and_writes_nothing_else(three):
    before = {path: path.stat().st_mtime_ns for path in three.rglob("*")}
    listed(three)
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*")} == before


def test_the_names_that_a_loop_gives(tmp_path):
    saving = ax.Checkpoint(every="1 epoch", best="val/loss", keep_last=None)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    data = ax.ArrayDataset(x, x.sum(1, keepdim=True))
    torch.manual_seed(0)
    loop = ax.Loop(
        ax.Supervised(torch.nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.1), callbacks=[saving], directory=tmp_path,
        progress=False,
    )  # fmt: skip
    loop.fit(data, data, epochs=3, batch_size=8)
    table, good = listed(tmp_path)
    assert good
    assert table.splitlines()[-1].endswith("good, best val/loss, the one that resume=True takes")
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    for row in rows:
        assert f"step-{row['step']:09d}-val_loss-{row['val/loss']:.6g}" in table
