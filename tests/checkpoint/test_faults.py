"""Disks that fail, files that are damaged, and writers that die: what was saved stays, and what failed is told."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from forks import in_child, is_there, until
from torch import nn

import axontrain as ax
from axontrain.checkpoint import background, directory, name_of, read, runs
from axontrain.checkpoint.directory import is_whole
from benchmarks.fuzz_checkpoints import different, same
from benchmarks.kills import timeless, unexpected

FILES = ("tensors.safetensors", "state.json", "about.json", "manifest.json")
STEPS, EVERY = 12, 2
forks = pytest.mark.skipif(not background.AVAILABLE, reason="writes in another process, which is forked")
BOTH = pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=forks)])


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """What fsync does cannot be seen without pulling the plug; that it is called, the faults in it show."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def made(directory, *callbacks, width=64, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 8))
    return ax.Loop(
        ax.Supervised(net, "mse"),
        ax.Optimizer("adamw", lr=0.01),
        callbacks=[*callbacks, ax.Checkpoint(f"{EVERY} steps", **options)] if directory else callbacks,
        directory=directory,
        device="cpu",
        progress=False,
    )


def fit(loop, steps=STEPS, **options):
    made = torch.Generator().manual_seed(0)
    data = ax.ArrayDataset(torch.randn(20, 8, generator=made), torch.randn(20, 8, generator=made))
    return loop.fit(data, steps=steps, batch_size=4, resume=True, **options)


ENDS = {}


def assert_ends_as_uninterrupted(loop, width=64):
    """Bit for bit, but for what says which callbacks there were."""
    if width not in ENDS:
        uninterrupted = made(None, width=width)
        fit(uninterrupted)
        ENDS[width] = rest(uninterrupted.save())
    assert same(rest(loop.save()), ENDS[width]), different(rest(loop.save()), ENDS[width])


def rest(tree):
    return {key: value for key, value in timeless(tree).items() if key not in ("setup", "attached")}


def steps_of(directory):
    """The steps of the checkpoints, all of which are whole; and nothing is beside them."""
    found = runs.entries(directory)
    assert all(is_whole(entry.path) for entry in found)
    assert unexpected(directory) == set()
    return [entry.step for entry in found]


class At(ax.Callback):
    """Does something after some steps; and lets each save end before the next step, so that it is known which one fails."""

    def __init__(self, **what):
        self.what, self.steps, self.checkpoint = what, [], None

    def after_batch(self, state):
        self.steps.append(state.step)
        checkpoint = self.checkpoint
        if checkpoint is not None and checkpoint._job is not None:
            until(checkpoint._job.over)
        action = self.what.get(f"step_{state.step}")
        if action is not None:
            action()


def loop_at(directory, at, **options):
    loop = made(directory, at, **options)
    at.checkpoint = loop.callbacks[-1]
    return loop


# --- disks -------------------------------------------------------------------------------------------------------------------


class Fault:
    """Something that fails while it is broken; ``left`` times, or as often as one tries."""

    told = "Input/output error"

    def __init__(self, place):
        self.place = place
        self.mark = place / "broken"  # a file, so that a forked process sees and changes it too

    def break_(self, once=False):
        self.mark.write_text("once" if once else "")

    def heal(self):
        self.mark.unlink(missing_ok=True)

    def fails(self):
        if not self.mark.exists():
            return False
        if self.mark.read_text():
            self.mark.unlink()
        return True


class Patched(Fault):
    """A call of the system that fails."""

    def __init__(self, place, patch, holder, name, number, only=""):
        super().__init__(place)
        self.told, call = os.strerror(number), getattr(holder, name)

        def failing(*arguments, **named):
            if only in str(arguments[0]) and self.fails():
                raise OSError(number, os.strerror(number))
            return call(*arguments, **named)

        patch.setattr(holder, name, failing)


class Full(Fault):
    """A disk that is full: a small one, in memory."""

    told = "No space left"

    def break_(self, once=False):
        with contextlib.suppress(OSError), (self.place / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def heal(self):
        (self.place / "ballast").unlink()


class Short(Fault):
    """Files that may not grow beyond a limit, as under a quota."""

    told = "File too large"

    def break_(self, once=False):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, self.before[1]))

    def heal(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class ReadOnly(Fault):
    """A directory that may no longer be written to."""

    told = "Permission denied"

    def break_(self, once=False):
        (self.place / "run").chmod(0o555)

    def heal(self):
        (self.place / "run").chmod(0o755)


PATCHES = {
    "fsync": (os, "fsync", errno.EIO),
    "fsync, full": (os, "fsync", errno.ENOSPC),
    "rename": (Path, "rename", errno.EIO, ".tmp-"),
    "mkdir": (Path, "mkdir", errno.EDQUOT, ".tmp-"),
    "manifest": (Path, "write_text", errno.ENOSPC, "manifest"),
    "state": (Path, "write_text", errno.EIO, "state.json"),
    "verify": (os, "open", errno.EIO, "tensors"),
}
KINDS = [*PATCHES, "full disk", "limit", "read-only"]
# Each fault with one of the two ways of writing, by turns; with the other it is slow.
BY_TURNS = pytest.mark.parametrize(
    ("fault", "asynchronous"),
    [
        pytest.param(kind, way, marks=[*([forks] if way else []), *([] if number % 2 == way else [pytest.mark.slow])])
        for number, kind in enumerate(KINDS)
        for way in (False, True)
    ],
    indirect=["fault"],
)


@pytest.fixture
def fault(request, tmp_path, monkeypatch):
    kind = request.param
    if kind in PATCHES:
        yield Patched(tmp_path, monkeypatch, *PATCHES[kind])
    elif kind == "limit":
        yield Short(tmp_path)
    elif kind == "full disk":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
        try:
            yield Full(tmp_path)
        finally:
            subprocess.run(["umount", "-l", tmp_path], check=True)
    else:
        with tempfile.TemporaryDirectory() as place:
            before = os.geteuid()
            if before == 0:  # who may write anywhere
                os.chown(place, 65534, 65534)
                os.seteuid(65534)
            try:
                yield ReadOnly(Path(place))
            finally:
                os.seteuid(before)


def messages(caught):
    assert all(one.category is ax.AxonWarning for one in caught), [str(one.message) for one in caught]
    return [str(one.message) for one in caught]


def assert_tells(text, step, fault, on_failure):
    """What failed, why, and what to do."""
    ends = {"warn": "Training goes on", "raise": r"(on_failure='warn' trains on)"}
    parts = (
        f"the checkpoint {name_of(step)} could not be written",
        fault.told,
        "Those before it are as they were",
        "make room",
    )
    for part in (*parts, ends[on_failure]):
        assert part in text


@BY_TURNS
def test_training_goes_on_with_a_warning_each_time_until_the_disk_recovers(fault, asynchronous):
    run = fault.place / "run"
    seen = []
    at = At(step_6=fault.break_, step_9=lambda: (fault.heal(), seen.append(steps_of(run))))
    loop = loop_at(run, at, asynchronous=asynchronous, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(loop).status == "completed"
    told = messages(caught)
    assert len(told) == 2, told
    for text, step in zip(told, (6, 8), strict=True):
        assert_tells(text, step, fault, "warn")
    assert seen[0][:2] == [2, 4]
    assert steps_of(run) == [10, 12]
    assert_ends_as_uninterrupted(loop)


@BY_TURNS
def test_the_fit_stops_with_an_error_and_goes_on_from_what_was_saved(fault, asynchronous):
    run = fault.place / "run"
    loop = loop_at(run, At(step_6=fault.break_), asynchronous=asynchronous)
    try:
        with pytest.raises(ax.CheckpointError) as caught:
            fit(loop)
    finally:
        fault.heal()
    assert_tells(str(caught.value), 6, fault, "raise")
    assert loop.state.step == (7 if asynchronous else 6)
    assert steps_of(run)[:2] == [2, 4]
    again = made(run, asynchronous=asynchronous)
    assert fit(again).status == "completed"
    assert steps_of(run) == [10, 12]
    assert_ends_as_uninterrupted(again)


@BOTH
@pytest.mark.parametrize("fault", ["fsync", "manifest", "full disk", "read-only"], indirect=True)
def test_a_disk_that_never_recovers_is_told_each_time_and_takes_nothing(fault, asynchronous):
    run = fault.place / "run"
    loop = loop_at(run, At(step_6=fault.break_), asynchronous=asynchronous, on_failure="warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert fit(loop).status == "completed"
    finally:
        fault.heal()
    told = messages(caught)
    assert len(told) == 5, told  # and once more at the end
    for text, step in zip(told, (6, 8, 10, 12, 12), strict=True):
        assert_tells(text, step, fault, "warn")
    assert steps_of(run)[:2] == [2, 4]
    assert_ends_as_uninterrupted(loop)


@BOTH
@pytest.mark.parametrize("on_failure", ["warn", "raise"])
@pytest.mark.parametrize("fault", ["fsync", "rename"], indirect=True)
def test_a_fault_that_comes_once(fault, asynchronous, on_failure):
    run = fault.place / "run"
    loop = loop_at(run, At(step_6=lambda: fault.break_(once=True)), asynchronous=asynchronous, on_failure=on_failure)
    if on_failure == "raise":
        with pytest.raises(ax.CheckpointError) as caught:
            fit(loop)
        assert_tells(str(caught.value), 6, fault, "raise")
        assert steps_of(run)[:2] == [2, 4]
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(loop)
        (text,) = messages(caught)
        assert_tells(text, 6, fault, "warn")
        assert steps_of(run) == [10, 12]


@BOTH
@pytest.mark.parametrize("fault", ["fsync"], indirect=True)
def test_a_last_save_that_fails_is_an_error_of_the_fit(fault, asynchronous):
    run = fault.place / "run"
    loop = loop_at(run, At(step_11=fault.break_), asynchronous=asynchronous)
    with pytest.raises(ax.CheckpointError, match=f"{name_of(12)} could not be written.*Input/output error"):
        fit(loop)
    fault.heal()
    assert steps_of(run) == [8, 10]
    again = made(run)
    fit(again)
    assert_ends_as_uninterrupted(again)


@BOTH
@pytest.mark.parametrize("fault", ["fsync"], indirect=True)
def test_a_save_that_failed_at_the_last_step_is_tried_again(fault, asynchronous):
    run = fault.place / "run"
    at = At(step_10=lambda: fault.break_(once=True))  # the end of an epoch too
    with pytest.warns(ax.AxonWarning, match=f"{name_of(10)} could not be written") as caught:
        fit(loop_at(run, at, asynchronous=asynchronous, on_failure="warn"), steps=10)
    assert len(caught) == 1
    assert steps_of(run) == [8, 10]


@forks
@pytest.mark.parametrize("fault", ["fsync"], indirect=True)
def test_a_writers_failure_does_not_hide_the_error_that_ended_the_fit(fault):
    def stop():
        raise ValueError("of the user's")

    run = fault.place / "run"
    at = At(step_6=fault.break_, step_7=stop)
    with pytest.raises(ValueError, match="of the user's") as caught:
        fit(loop_at(run, at, asynchronous=True))
    assert any(f"{name_of(6)} could not be written" in note for note in caught.value.__notes__)
    assert steps_of(run) == [2, 4]


def taken_away(run, how):
    """A run directory as it may go while a run writes there; and where it is."""
    if how == "removed":
        shutil.rmtree(run)
        return run
    run.rename(run.with_name("moved"))
    if how == "replaced":
        run.mkdir()
    return run.with_name("moved")


@BOTH
@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
@pytest.mark.parametrize("step", [5, 6])  # where the history is written first, and a checkpoint
def test_a_run_directory_that_goes_away_ends_the_fit_and_nothing_is_written_in_its_place(tmp_path, asynchronous, how, step):
    run = tmp_path / "run"
    loop = loop_at(run, At(**{f"step_{step}": lambda: taken_away(run, how)}), asynchronous=asynchronous)
    why = "is another directory than" if how == "replaced" else "was renamed or removed while this run writes there"
    with pytest.raises(ax.CheckpointError, match=f"run {why}.*put it back where it was"):
        fit(loop)
    assert loop.state.step == step
    assert not run.exists() or list(run.iterdir()) == []
    if how != "removed":
        if how == "replaced":
            run.rmdir()
        (tmp_path / "moved").rename(run)
        again = made(run)
        fit(again)
        assert_ends_as_uninterrupted(again)
        assert len((run / "history.jsonl").read_text().splitlines()) == len(again.state.history)


@BOTH
@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
def test_a_run_directory_that_goes_away_is_told_each_time_where_training_is_to_go_on(tmp_path, asynchronous, how):
    run = tmp_path / "run"

    def back():
        if how != "removed":
            shutil.rmtree(run, ignore_errors=True)
            (tmp_path / "moved").rename(run)

    at = At(step_5=lambda: taken_away(run, how), step_9=back)
    loop = loop_at(run, at, asynchronous=asynchronous, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(loop).status == "completed"
    told = messages(caught)
    assert sum("history.jsonl could not be written" in text for text in told) == 1
    failed = [step for step in range(2, 14) for text in told if f"the checkpoint {name_of(step)} could not" in text]
    assert failed == ([6, 8] if how != "removed" else [6, 8, 10, 12, 12])
    assert len(told) == 1 + len(failed)
    assert all("run was renamed" in text or "run is another directory" in text for text in told)
    assert_ends_as_uninterrupted(loop)
    if how == "removed":
        assert not run.exists()
        return
    assert steps_of(run) == [10, 12]
    assert not (tmp_path / "moved").exists()
    assert len((run / "history.jsonl").read_text().splitlines()) == len(loop.state.history)


@forks
def test_a_run_directory_that_goes_away_while_it_is_written_to_is_not_made_anew(tmp_path, slow_writer):
    run = tmp_path / "run"
    loop = made(run, At(step_3=lambda: (until(lambda: being_written(run)), taken_away(run, "renamed"), slow_writer.touch())),
                asynchronous=True)  # fmt: skip
    with pytest.raises(ax.CheckpointError, match="run was renamed or removed"):
        fit(loop)
    assert not run.exists()


def test_the_way_to_a_relative_directory_can_be_lost_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(ax.CheckpointError, match="or the program has changed its working directory"):
        fit(made("run", At(step_3=lambda: os.chdir(elsewhere))))
    assert list(elsewhere.iterdir()) == []


def test_a_full_disk_when_a_fit_begins_is_told_once_and_the_fit_goes_on(tmp_path, monkeypatch):
    run = tmp_path / "run"
    loop = made(run, on_failure="warn")
    fit(loop, steps=5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.setattr(os, "fsync", full)
        warnings.simplefilter("always")
        assert fit(loop, steps=10).status == "completed"
    told = messages(caught)
    assert sum("history.jsonl could not be written" in text for text in told) == 1
    assert sorted(one.name for one in run.iterdir() if "tmp" in one.name) == []
    assert fit(loop, steps=12).status == "completed"
    assert len((run / "history.jsonl").read_text().splitlines()) == len(loop.state.history)


@BOTH
def test_older_ones_are_read_whole_once_by_a_run_that_goes_on(tmp_path, monkeypatch, asynchronous):
    run, log = tmp_path / "run", tmp_path / "log"
    fit(made(run, keep_last=4), steps=8)
    assert steps_of(run) == [2, 4, 6, 8]
    described = directory._described

    def logged(file):
        if file.name == "tensors.safetensors":
            with log.open("a") as stream:
                stream.write(f"{file.parent.name}\n")
        return described(file)

    monkeypatch.setattr(directory, "_described", logged)
    at = At(step_9=lambda: log.write_text(""))  # what is resumed from is read by then
    loop = loop_at(run, at, asynchronous=asynchronous, keep_last=4)
    fit(loop, steps=14)
    read_whole = log.read_text().split()
    assert {name for name in read_whole if ".tmp-" not in name} == {name_of(step) for step in (4, 6, 8)}
    assert len([name for name in read_whole if ".tmp-" not in name]) == 3
    assert steps_of(run) == [8, 10, 12, 14]


@forks
@pytest.mark.parametrize("asynchronous", [None, True])
def test_a_fit_in_another_thread_writes_in_it_unless_it_is_told_otherwise(tmp_path, monkeypatch, asynchronous):
    monkeypatch.setattr("axontrain.callbacks.checkpoint.SMALL_BYTES", 0)
    begun, job = [], background.Job
    monkeypatch.setattr(background, "Job", lambda *given: (begun.append(given), job(*given))[1])
    results = []
    for thread in (threading.Thread, lambda target: target()):
        count = len(begun)
        run = tmp_path / f"run{len(results)}"
        one = thread(target=lambda run=run: results.append(fit(made(run, asynchronous=asynchronous))))
        if one is not None:
            one.start()
            one.join()
        assert (len(begun) > count) == (asynchronous is True or one is None)
        assert steps_of(run) == [10, 12]
    assert [result.status for result in results] == ["completed"] * 2


def test_a_number_of_those_that_cannot_be_looked_at_is_not_given_twice(tmp_path, monkeypatch):
    run, look = tmp_path / "run", directory.about

    def fails(path):
        if name_of(6) in str(path) or name_of(4) in str(path):
            raise OSError(errno.ESTALE, "Stale file handle")
        return look(path)

    def breaks():
        monkeypatch.setattr(directory, "about", fails)

    at = At(step_7=breaks, step_9=lambda: monkeypatch.setattr(directory, "about", look))
    fit(made(run, at, keep_last=None))  # of 8 it is only known that it comes after those that this fit has written
    found = runs.entries(run)
    assert [entry.step for entry in found] == [2, 4, 6, 8, 10, 12]
    assert [entry.number for entry in found] == sorted({entry.number for entry in found})


# --- damage ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was killed after step 9, with checkpoints of the steps 4, 6 and 8, of many blocks."""
    run = tmp_path_factory.mktemp("damage") / "run"

    def stop():
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        fit(made(run, At(step_9=stop), width=1200, keep_last=3))
    assert [entry.step for entry in runs.entries(run)] == [4, 6, 8]
    return run


def test_a_bit_that_flips_in_any_block_of_any_file_is_found(whole, tmp_path):
    path = shutil.copytree(whole / name_of(8), tmp_path / name_of(8))
    blocks = 0
    for name in FILES:
        file = path / name
        with file.open("r+b") as stream:
            size = file.stat().st_size
            for start in range(0, size, 4096):
                place = start + (start // 4096 * 1021) % min(4096, size - start)
                stream.seek(place)
                right = stream.read(1)[0]
                for value, good in ((right ^ 1 << start // 4096 % 8, False), (right, True)):
                    stream.seek(place)
                    stream.write(bytes([value]))
                    stream.flush()
                    assert is_whole(path) == good, f"{name} at {place}"
                blocks += 1
    assert blocks > 50


def flip(file, other):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def truncate(file, other):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file, other):
    file.write_bytes(b"")


def delete(file, other):
    file.unlink()


def take_the_others(file, other):
    shutil.copy(other / file.name, file)


def swap(file, other):
    content = file.read_bytes()
    shutil.copy(other / file.name, file)
    (other / file.name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, empty, delete, take_the_others, swap], ids=lambda damage: damage.__name__)
def test_the_next_older_good_one_is_used_and_said(whole, tmp_path, name, damage):
    run = shutil.copytree(whole, tmp_path / "run")
    damage(run / name_of(8) / name, run / name_of(6))
    damaged, good = [8], 6
    if damage is swap:
        damaged, good = [8, 6], 4
    assert [step for step in (8, 6, 4) if not is_whole(run / name_of(step))] == damaged
    seen = {}
    at = At(step_9=lambda: seen.update(after=is_whole(run / name_of(8))))
    loop = made(run, at, width=1200, keep_last=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(loop)
    (text,) = messages(caught)
    for step in damaged:
        assert str(run / name_of(step)) in text
    assert f"older good one, {run / name_of(good)}" in text
    assert name in text or name == "manifest.json"  # by which another file looks damaged
    assert at.steps[0] == good + 1
    assert seen == {"after": True}  # the damaged one was replaced when its step came again
    assert steps_of(run) == [8, 10, 12]
    assert_ends_as_uninterrupted(loop, 1200)


def test_where_none_is_good_that_is_an_error_that_lists_them_and_nothing_is_touched(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    for step, damage in ((8, flip), (6, empty), (4, delete)):
        damage(run / name_of(step) / "tensors.safetensors", run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("step-*/*")}
    loop = made(run, width=1200)
    weights = loop.save()["objective"]
    for act in (lambda: fit(loop), lambda: loop.restore(run)):
        with pytest.raises(ax.CheckpointError, match=r"no checkpoint in .* is good") as caught:
            act()
        for step in (8, 6, 4):
            assert f"{run / name_of(step)} is" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("step-*/*")} == before
    assert loop.state.step == 0
    assert same(loop.save()["objective"], weights)


# --- the process that writes -------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_writer(tmp_path, monkeypatch):
    """Writers that wait for a file, ``go``, before they have what they wrote on the disk; the main process does not."""
    main = os.getpid()
    monkeypatch.setattr(os, "fsync", lambda _: os.getpid() != main and until((tmp_path / "go").exists))
    return tmp_path / "go"


def being_written(run):
    return list(run.glob("step-*.tmp-*"))


@forks
@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_a_writer_that_is_killed_is_told_at_the_next_step(tmp_path, slow_writer, on_failure):
    run = tmp_path / "run"
    slow_writer.touch()

    def kill():
        until(lambda: being_written(run))
        os.kill(at.checkpoint._job.pid, signal.SIGKILL)
        until(at.checkpoint._job.over)
        slow_writer.touch()

    class Killing(At):
        def after_batch(self, state):
            if state.step == 7:
                kill()
            if state.step == 6:
                slow_writer.unlink()
            super().after_batch(state)

    at = Killing()
    loop = loop_at(run, at, asynchronous=True, on_failure=on_failure)
    if on_failure == "raise":
        with pytest.raises(ax.CheckpointError, match=f"{name_of(6)} could not be written: the process .* was killed"):
            fit(loop)
        assert loop.state.step == 7
        assert steps_of(run) == [2, 4]
        again = made(run)
        fit(again)
        assert_ends_as_uninterrupted(again)
        return
    with pytest.warns(ax.AxonWarning, match=f"{name_of(6)} could not be written: the process .* was killed") as caught:
        fit(loop)
    assert len(caught) == 1
    assert steps_of(run) == [10, 12]
    assert_ends_as_uninterrupted(loop)


@forks
def test_a_writer_dies_with_the_training_that_is_killed(tmp_path, slow_writer):
    run = tmp_path / "run"

    def train():
        parent = os.getpid()

        def slow(file):
            if os.getpid() != parent and list(run.glob(f"{name_of(6)}.tmp-*")):
                (tmp_path / "writer").write_text(str(os.getpid()))
                time.sleep(60)

        os.fsync = slow
        at = At()
        loop = loop_at(run, at, asynchronous=True)
        at.what["step_7"] = lambda: time.sleep(60)
        at.checkpoint, first = None, at.checkpoint
        at.what |= {f"step_{step}": lambda: until(lambda: first._job is None or first._job.over()) for step in (3, 5)}
        fit(loop)

    process = in_child(train)
    until(lambda: (tmp_path / "writer").exists() and (tmp_path / "writer").read_text())
    writer = int((tmp_path / "writer").read_text())
    assert is_there(writer)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    until(lambda: not is_there(writer), 5)
    assert [entry.step for entry in runs.entries(run)] == [2, 4]
    assert all(is_whole(entry.path) for entry in runs.entries(run))
    assert len(unexpected(run)) == 1
    again = made(run)
    fit(again)
    assert steps_of(run) == [10, 12]
    assert_ends_as_uninterrupted(again)


@forks
@pytest.mark.parametrize("how", ["the end", "an error", "leaving steps()"])
def test_however_a_fit_ends_it_waits_for_the_writer(tmp_path, monkeypatch, how):
    run, main = tmp_path / "run", os.getpid()
    monkeypatch.setattr(os, "fsync", lambda _: os.getpid() != main and time.sleep(0.01))

    def stop():
        raise ValueError("here")

    loop = made(run, At(**({"step_7": stop} if how == "an error" else {})), asynchronous=True)
    if how == "the end":
        fit(loop)
        assert steps_of(run) == [10, 12]
        return
    if how == "an error":
        with pytest.raises(ValueError, match="here"):
            fit(loop)
    else:
        for step in loop.steps([(torch.randn(4, 8), torch.randn(4, 8))] * 10, steps=10):
            del step
            if loop.state.step == 7:
                break
    assert steps_of(run) == ([4, 6] if how == "an error" else [6, 7])  # who leaves is saved at once


ABANDONED = """
import atexit, os, sys, time
import torch
import axontrain as ax

saved = os.path.join(sys.argv[1], "step-000000002")
atexit.register(lambda: print(os.path.exists(saved)))  # the first to be registered is the last to be called
torch.set_num_threads(1)
fsync, main = os.fsync, os.getpid()
os.fsync = lambda file: (os.getpid() != main and time.sleep(0.1), fsync(file))
loop = ax.Loop(
    ax.Supervised(torch.nn.Linear(2, 1), "mse"), ax.Optimizer("sgd", lr=0.1), directory=sys.argv[1], progress=False,
    callbacks=[ax.Checkpoint("2 steps", asynchronous=True)], device="cpu",
)
steps = loop.steps([(torch.randn(4, 2), torch.randn(4, 1))] * 10, epochs=1)
for _ in range(3):
    next(steps)
sys.stop = steps  # nobody closes it
assert not os.path.exists(saved)
"""


@forks
@pytest.mark.slow
def test_the_end_of_a_program_that_abandons_its_steps_waits_for_the_writer(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ABANDONED, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert steps_of(tmp_path / "run") == [2, 3]  # who holds them to the end has left them there


@forks
def test_ctrl_c_to_the_group_does_not_hurt_the_writer(tmp_path, slow_writer):
    run = tmp_path / "run"
    main = tmp_path / "all"

    def train():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        parent = os.getpid()
        os.fsync = lambda _: os.getpid() != parent and until(slow_writer.exists)
        loop = made(run, At(step_3=lambda: (main.touch(), time.sleep(0.5))), asynchronous=True)
        result = fit(loop)
        assert result.status == "interrupted"
        assert result.step == 3

    process = in_child(train)
    until(main.exists)
    until(lambda: being_written(run))
    os.killpg(process, signal.SIGINT)
    time.sleep(0.05)
    slow_writer.touch()
    assert os.waitpid(process, 0)[1] == 0
    assert steps_of(run) == [2, 3]
    again = made(run)
    fit(again)
    assert_ends_as_uninterrupted(again)


@forks
def test_a_fit_after_a_second_ctrl_c_waits_for_the_writer_that_the_first_left(tmp_path, slow_writer):
    run = tmp_path / "run"

    def interrupt():
        until(lambda: being_written(run))
        raise KeyboardInterrupt

    loop = made(run, At(step_3=interrupt), asynchronous=True)
    with pytest.raises(KeyboardInterrupt):
        fit(loop)
    assert being_written(run)
    process = in_child(lambda: (time.sleep(0.2), slow_writer.touch()))
    at = At()
    again = made(run, at)
    fit(again)
    os.waitpid(process, 0)
    assert at.steps[0] == 3  # what was being written is the newest
    assert steps_of(run) == [10, 12]
    assert_ends_as_uninterrupted(again)


def test_where_no_fork_is_safe_saves_are_waited_for(tmp_path, monkeypatch):
    def never():
        raise AssertionError("forked")

    monkeypatch.setattr(background, "AVAILABLE", False)
    monkeypatch.setattr(os, "fork", never)
    monkeypatch.setattr("axontrain.callbacks.checkpoint.SMALL_BYTES", 0)
    with pytest.raises(ax.ConfigurationError, match="no safe fork"):
        ax.Checkpoint(asynchronous=True)
    loop = made(tmp_path / "run")
    fit(loop)
    assert steps_of(tmp_path / "run") == [10, 12]
    assert_ends_as_uninterrupted(loop)


@forks
def test_where_a_fork_fails_the_save_is_made_here(tmp_path, monkeypatch):
    tried = []

    def fails():
        tried.append(True)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fails)
    loop = made(tmp_path / "run", asynchronous=True)
    fit(loop)
    assert len(tried) == STEPS // EVERY
    assert steps_of(tmp_path / "run") == [10, 12]
    assert read(tmp_path / "run" / name_of(12))["counters"]["step"] == 12
