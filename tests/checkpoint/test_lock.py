"""One run at a time on a run directory: real processes, killed."""

import contextlib
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from forks import in_child, is_there, until

import axontrain as ax
from axontrain.checkpoint import lock as lock_module
from axontrain.checkpoint.lock import DirectoryLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the other process")


def data():
    torch.manual_seed(0)
    return ax.ArrayDataset(torch.randn(8, 2), torch.randn(8, 1))


def loop_in(directory, *callbacks):
    model = ax.Supervised(torch.nn.Linear(2, 1), "mse")
    return ax.Loop(model, ax.Optimizer("sgd", lr=0.1), directory=directory, callbacks=callbacks, progress=False, device="cpu")


def is_free(directory):
    """Whether another process gets in."""

    def work():
        with contextlib.suppress(ax.ConfigurationError):
            DirectoryLock(directory)
            os._exit(7)

    process = in_child(work)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7


class Holder:
    """Another process that holds a directory.

    Args:
        directory: what it holds.
        more: what else it does before it says that it is ready.
    """

    def __init__(self, directory, more=lambda: None):
        ready = directory.with_name(f"{directory.name}.ready")

        def work():
            held = DirectoryLock(directory)
            more()
            ready.touch()
            time.sleep(60)
            held.release()

        self.pid = in_child(work)
        until(ready.exists)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_the_second_process_is_refused_with_the_first_ones_number(run):
    holder = Holder(run)
    try:
        debris = run / f"step-000000002.tmp-000000-{'ab' * 16}"
        debris.mkdir()  # what the first one is writing just now
        for resume in (False, True):
            with pytest.raises(
                ax.ConfigurationError, match=rf"'{run}' is in use by process {holder.pid} on .*or choose another"
            ):
                loop_in(run).fit(data(), epochs=1, resume=resume)
        assert sorted(file.name for file in run.iterdir()) == [".lock", debris.name]
        assert loop_in(run.with_name("other")).fit(data(), epochs=1).ok  # is no matter
    finally:
        holder.kill()


def test_the_lock_dies_with_its_owner_though_its_processes_live(run):
    workers = run.with_name("workers")

    def fork_workers():
        for _ in range(3):
            in_child(lambda: time.sleep(60))
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], close_fds=False)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        workers.write_text(children)

    holder = Holder(run, fork_workers)
    left = [int(process) for process in workers.read_text().split()]
    try:
        assert not is_free(run)
        holder.kill()
        assert all(map(is_there, left))
        assert len(left) == 4
        DirectoryLock(run).release()  # at once
        assert loop_in(run).fit(data(), epochs=1).ok
    finally:
        for process in left:
            os.kill(process, signal.SIGKILL)


def test_the_lock_of_a_killed_training_with_workers_and_a_writer_dies_with_it(run):
    def train():
        fsync = os.fsync
        parent = os.getpid()
        os.fsync = lambda file: fsync(file) if os.getpid() == parent else time.sleep(60)  # a slow disk
        loader = ax.Loader(data(), batch_size=4, shuffle=True, workers=2)
        loop_in(run, ax.Checkpoint("1 step", asynchronous=True)).fit(loader, epochs=10**6)

    process = in_child(train)
    until(lambda: list(run.glob("step-*.tmp-*")))
    time.sleep(0.05)
    assert not is_free(run)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    DirectoryLock(run).release()
    assert loop_in(run).fit(data(), epochs=1, resume=True).ok
    assert not list(run.glob("*.tmp-*"))


def test_two_loops_of_one_process_are_one_too_many(run):
    other = loop_in(run)

    def train(state):
        with pytest.raises(ax.ConfigurationError, match="is in use by another Loop of this process"):
            other.fit(data(), epochs=1)

    loop = loop_in(run)
    loop.on("after_batch", every=1, first=1)(train)
    assert loop.fit(data(), epochs=1).ok
    assert other.state.step == 0
    assert other.fit(data(), epochs=1, resume=True).ok


class Bad(ax.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.act)

    def act(self, state):
        raise ValueError("bad")


@pytest.mark.parametrize("hook", ["before_fit", "after_batch", "after_fit"])
def test_it_is_given_up_after_an_error_in_fit(run, hook):
    with pytest.raises(ValueError, match="bad"):
        loop_in(run, Bad(hook)).fit(data(), epochs=1)
    assert is_free(run)


def test_it_is_given_up_after_fit_and_held_until_then(run):
    loop, seen = loop_in(run), []
    loop.on("after_fit")(lambda state: seen.append(is_free(run)))
    assert loop.fit(data(), epochs=1).ok
    assert seen == [False]
    assert is_free(run)
    assert loop.fit(data(), epochs=1).ok


def test_it_is_given_up_after_an_error_before_the_fit(run):
    loop_in(run).fit(data(), epochs=1)
    wrong = ax.Loop(
        ax.Supervised(torch.nn.Linear(2, 3), "mse"), ax.Optimizer("sgd", lr=0.1), directory=run, progress=False, device="cpu"
    )
    with pytest.raises(ax.CheckpointError):
        wrong.fit(data(), epochs=2, resume=True)
    assert is_free(run)
    with pytest.raises(ax.ConfigurationError, match="holds another run"):
        loop_in(run).fit(data(), epochs=1)
    assert is_free(run)
    for arguments in ({}, {"epochs": -1}, {"epochs": 1, "validate": None}, {"epochs": 1, "resume": 1}):
        with pytest.raises(ax.ConfigurationError):
            loop_in(run).fit(data(), **arguments)
    assert is_free(run)


def test_it_is_given_up_with_steps_that_were_left_or_never_begun(run):
    loop = loop_in(run)
    for _ in loop.steps(data(), epochs=2, batch_size=2):
        assert not is_free(run)
        break
    gc.collect()
    assert is_free(run)
    steps = loop.steps(data(), epochs=2, batch_size=2, resume=True)
    assert not is_free(run)
    del steps
    gc.collect()
    assert is_free(run)


def test_a_link_to_it_is_the_same_directory(run, tmp_path):
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    run.mkdir()
    with DirectoryLock(run):
        for name in (tmp_path / "link", tmp_path / "run" / ".." / "run"):
            with pytest.raises(ax.ConfigurationError, match="another Loop of this process"):
                DirectoryLock(name)
            assert not is_free(name)
    holder = Holder(tmp_path / "link")
    try:
        with pytest.raises(ax.ConfigurationError, match=f"process {holder.pid}"):
            DirectoryLock(run)
    finally:
        holder.kill()


def test_reading_or_copying_the_run_directory_meanwhile_does_not_give_it_up(run, tmp_path):
    with DirectoryLock(run):
        shutil.copytree(run, tmp_path / "copy")  # as a callback may that uploads it
        assert (run / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert not is_free(run)
    assert is_free(run)


def test_one_of_many_threads_gets_it(run):
    got, refused, start = [], [], threading.Barrier(16)

    def take():
        start.wait()
        try:
            got.append(DirectoryLock(run))
        except ax.ConfigurationError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 15)
    got[0].release()
    got[0].release()  # as often as one likes
    assert is_free(run)


def test_one_of_many_processes_gets_it(run, tmp_path):
    def work():
        until((tmp_path / "go").exists)
        try:
            lock = DirectoryLock(run)
        except ax.ConfigurationError:
            (tmp_path / f"refused-{os.getpid()}").touch()
            return
        (tmp_path / f"got-{os.getpid()}").touch()
        until(lambda: len(list(tmp_path.glob("refused-*"))) == 7)
        lock.release()

    processes = [in_child(work) for _ in range(8)]
    (tmp_path / "go").touch()
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 8
    assert len(list(tmp_path.glob("got-*"))) == 1


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ax.ConfigurationError, match="cannot be made"):
            loop_in(path).fit(data(), epochs=1)


def test_a_directory_that_cannot_be_written_to_is_said():
    with tempfile.TemporaryDirectory() as place:
        run = Path(place, "run")
        run.mkdir(0o555)
        Path(place).chmod(0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(ax.ConfigurationError, match=r"cannot be written to: .*Permission denied"):
                loop_in(run).fit(data(), epochs=1)
            with pytest.raises(ax.ConfigurationError, match=r"cannot be made: .*Permission denied"):
                loop_in(run / "deeper").fit(data(), epochs=1)
        finally:
            os.seteuid(before)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_the_file_system_has_no_locks_a_warning_says_so(run, monkeypatch, number):
    import fcntl

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(ax.AxonWarning, match="cannot be locked"):
        lock = DirectoryLock(run)
    lock.release()


@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a pipe", "a directory"])
def test_what_is_no_file_of_the_runs_is_neither_followed_nor_waited_for(run, tmp_path, kind):
    run.mkdir()
    victim = tmp_path / "victim"
    if kind == "a link":
        victim.write_text("precious")
    if "link" in kind:
        (run / ".lock").symlink_to(victim)
    elif kind == "a pipe":
        os.mkfifo(run / ".lock")
    else:
        (run / ".lock").mkdir()
    with pytest.raises(ax.ConfigurationError, match=r"\.lock is a link, or no file|cannot be written to.*Is a directory"):
        DirectoryLock(run)
    assert victim.exists() == (kind == "a link")
    assert kind != "a link" or victim.read_text() == "precious"
    if kind == "a directory":
        (run / ".lock").rmdir()
    else:
        (run / ".lock").unlink()
    DirectoryLock(run).release()


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_full_disk_is_told_and_the_directory_is_held(run, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.warns(ax.AxonWarning, match=r"\.lock could not be written: .*No space left.* The directory is this run's"):
            lock = DirectoryLock(run)
    assert not is_free(run)
    lock.release()
    assert is_free(run)


def test_a_directory_that_fails_while_it_is_locked_is_told_and_nothing_is_left(run, monkeypatch):
    run.mkdir()
    before, opened = len(list(Path("/proc/self/fd").iterdir())), os.open

    def fails(path, *arguments):
        if Path(path) == run:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(ax.ConfigurationError, match=r"cannot be locked: .*Too many open files"):
            DirectoryLock(run)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    DirectoryLock(run).release()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.slow
def test_the_end_of_a_program_that_never_began_its_steps_is_silent(run):
    script = f"""
import sys, torch, axontrain as ax
model = ax.Supervised(torch.nn.Linear(2, 1), "mse")
loop = ax.Loop(model, ax.Optimizer("sgd", lr=0.1), directory={str(run)!r}, progress=False, device="cpu")
kept = loop.steps([(torch.ones(4, 2), torch.ones(4, 1))], epochs=1)
sys.kept = kept
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lock_that_is_collected_while_another_is_taken_is_no_deadlock(run, monkeypatch):
    abandoned, locked = [DirectoryLock(run.with_name("other"))], lock_module._locked
    monkeypatch.setattr(lock_module, "_locked", lambda file: (abandoned.clear(), locked(file))[1])
    with DirectoryLock(run):
        assert is_free(run.with_name("other"))


def test_a_directory_that_was_renamed_or_replaced_is_known(run, tmp_path):
    with DirectoryLock(run):
        key = lock_module.key_of(run)
        assert lock_module.lost(run, key) == ""
        run.rename(tmp_path / "moved")
        assert "was renamed or removed" in lock_module.lost(run, key)
        run.mkdir()
        assert "is another directory" in lock_module.lost(run, key)
        shutil.rmtree(tmp_path / "moved")
        for _ in range(20):  # though it has gone, its inode is nobody else's
            run.rmdir()
            run.mkdir()
            assert "is another directory" in lock_module.lost(run, key)
