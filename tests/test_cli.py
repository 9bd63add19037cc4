import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import axontrain as ax
from axontrain import cli
from axontrain.checkpoint import name_of, read


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "axontrain.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "runs" / "first"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["fit", "digits", "--epochs", "2", "--seed", "3", "--directory", str(directory)])
    return directory, subprocess.CompletedProcess("fit", status, out.getvalue(), err.getvalue())


def test_fit_digits_says_what_it_did_and_where_things_are(run):
    directory, done = run
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "completed (epochs=2) at epoch 2, step 46" in lines
    assert "val/accuracy" in lines[0]
    (told,) = (line for line in lines if line.startswith("test accuracy"))
    assert 60 < float(told.split()[2]) <= 100
    assert told.endswith("on 359 digits it has not seen")
    assert f"run directory {directory}:" in lines
    for name in ("history.jsonl", name_of(46), "curve.png"):
        assert name in done.stdout
        assert (directory / name).exists()
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_what_it_says_is_what_it_wrote(run):
    directory, done = run
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert f"test accuracy {100 * rows[-1]['val/accuracy']:.2f} %" in done.stdout
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert read(directory / name_of(46))["counters"]["step"] == 46


def test_what_it_wrote_can_be_gone_on_with(run):
    directory, _ = run
    optimizer = ax.Optimizer("adamw", lr=4e-3, weight_decay=0.01, schedule=ax.schedules.one_cycle())
    loop = ax.Loop(cli.Digits(), optimizer, device="cpu", progress=False)
    loop.restore(directory / name_of(46))
    _, test = ax.data.digits()
    evaluated = loop.evaluate(test, batch_size=64)
    assert evaluated["accuracy"] == loop.state.history.rows[-1]["val/accuracy"]
    assert loop.state.seed == 3


@pytest.mark.slow
def test_the_same_seed_trains_the_same(tmp_path):
    directory, again = tmp_path / "first", tmp_path / "again"
    for where in (directory, again):
        done = command("fit", "digits", "--epochs", 2, "--seed", 3, "--directory", where)
        assert done.returncode == 0, done.stderr
        assert "completed (epochs=2) at epoch 2, step 46" in done.stdout.splitlines()
        assert "Warning" not in done.stderr
        assert "Traceback" not in done.stderr
    one, other = (read(where / name_of(46))["objective"] for where in (directory, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (again / "history.jsonl").read_text() == (directory / "history.jsonl").read_text()


def test_a_directory_that_is_not_empty_is_refused_and_left_alone(run, capsys):
    directory, _ = run
    before = sorted(directory.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "digits", "--epochs", "1", "--directory", str(directory)])
    assert ended.value.code == 2
    assert f"--directory: {directory} is there already, and not empty" in capsys.readouterr().err
    assert sorted(directory.rglob("*")) == before


def test_a_file_in_place_of_the_directory_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "digits", "--directory", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: command"),
        (["fit"], "required: what"),
        (["fit", "letters"], "invalid choice: 'letters'"),
        (["fit", "digits", "--epochs", "0"], "--epochs: 1 or more"),
        (["fit", "digits", "--epochs", "some"], "invalid int value: 'some'"),
        (["fit", "digits", "--epoch-count", "3"], "unrecognized arguments"),
        (["predict"], "invalid choice: 'predict'"),
    ],
)
def test_what_it_does_not_know_ends_with_status_2(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"axontrain {ax.__version__}\n"


def test_a_failure_that_axontrain_knows_is_one_line_and_status_1(monkeypatch, capsys, tmp_path):
    def damaged(**_):
        raise ax.DataError("the digits are damaged")

    monkeypatch.setattr(ax.data, "digits", damaged)
    assert cli.main(["fit", "digits", "--directory", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "axontrain: the digits are damaged\n"


def test_a_directory_that_cannot_be_made_is_one_line_and_status_1(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status = cli.main(["fit", "digits", "--epochs", "1", "--directory", str(tmp_path / "file" / "run")])
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()  # before anything was trained
    assert line.startswith("axontrain: ")
    assert str(tmp_path / "file" / "run") in line


def test_a_disk_that_is_full_is_one_line_and_status_1(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ax.Loop, "fit", full)
    assert cli.main(["fit", "digits", "--directory", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "axontrain: [Errno 28] No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_reads_digits_well(seed, tmp_path):
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for a busy machine take minutes
    done = command("fit", "digits", "--seed", seed, "--directory", tmp_path / "run", env=alone)
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("test accuracy"))
    assert float(told.split()[2]) >= 98.5
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < 0.05  # as small as what it has learned


@pytest.mark.slow
def test_an_interrupted_run_goes_on_by_the_command(tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = ["fit", "digits", "--epochs", "6", "--directory"]
    program = subprocess.Popen(
        [sys.executable, "-m", "axontrain.cli", *arguments, parted], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not list(parted.glob("step-*")):
            assert program.poll() is None
            time.sleep(0.01)
        program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 143, errors
    assert command(*arguments, parted, "--resume").returncode == 0
    assert command(*arguments, whole).returncode == 0
    states = [read(directory / name_of(138)) for directory in (whole, parted)]
    for name, value in states[0]["objective"].items():
        assert torch.equal(value, states[1]["objective"][name]), name
    assert states[0]["history"] == states[1]["history"]


def test_resume_needs_a_directory(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "digits", "--resume"])
    assert "--directory" in capsys.readouterr().err


def test_a_finished_run_started_again_says_the_same(run, capsys):
    directory, done = run
    before = (directory / "history.jsonl").read_text()
    assert cli.main(["fit", "digits", "--epochs", "2", "--seed", "3", "--directory", str(directory), "--resume"]) == 0
    assert capsys.readouterr().out.splitlines() == done.stdout.splitlines()
    assert (directory / "history.jsonl").read_text() == before


@pytest.mark.parametrize("what", ["checkpoints", "import-weights", "fit"])
def test_ctrl_c_outside_of_a_fit_ends_quietly(capsys, tmp_path, monkeypatch, what):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("listed", "import_weights", "fit_digits"):
        monkeypatch.setattr(cli, name, interrupted)
    arguments = {"fit": ["fit", "digits", "--directory", str(tmp_path / "run")]}.get(what, [what, str(tmp_path)])
    assert cli.main(arguments) == 130
    assert capsys.readouterr() == ("", "axontrain: interrupted\n")
