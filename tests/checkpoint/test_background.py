"""The process that writes: what it did or failed in is told, and it neither outlives its parent nor disturbs it."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forks import in_child, is_there, until

from axontrain import CheckpointError
from axontrain.checkpoint import background
from axontrain.checkpoint.background import Job

pytestmark = pytest.mark.skipif(not background.AVAILABLE, reason="forks where that is safe")


def raising(error):
    def work():
        raise error

    return work


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_work_is_done_in_another_process_on_the_memory_of_that_moment(tmp_path):
    held = ["then"]

    def work():
        time.sleep(0.05)
        (tmp_path / "written").write_text(f"{held[0]} {os.getppid()}")
        held[0] = "changed there"

    job = Job(work)
    held[0] = "now"
    job.result()
    assert (tmp_path / "written").read_text() == f"then {os.getpid()}"
    assert held == ["now"]


def test_over_does_not_wait_and_result_does(tmp_path):
    job = Job(lambda: until((tmp_path / "go").exists))
    began = time.monotonic()
    assert not job.over()
    assert time.monotonic() - began < 0.5
    (tmp_path / "go").touch()
    until(job.over)
    job.result()
    assert job.over()
    job.result()  # as often as one likes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_an_error_of_the_system_keeps_its_number_and_names_the_file(number):
    job = Job(raising(OSError(number, os.strerror(number), "/run/step-1")))
    for _ in range(2):
        with pytest.raises(OSError, match=f"{os.strerror(number)}: /run/step-1") as caught:
            job.result()
        assert caught.value.errno == number


@pytest.mark.parametrize("value", [None, [], ["step-000000001"], {"a": [1, 2.5, "ü"]}, ["x" * 100] * 5000])
def test_what_the_work_returns_is_told(value):
    job = Job(lambda: value)
    until(job.over)
    assert job.result() == value
    assert job.result() == value


def test_an_error_of_the_system_without_a_number_is_told_in_its_words():
    with pytest.raises(CheckpointError, match=r"^/run/x could not be written: no space$"):
        Job(raising(OSError("/run/x could not be written: no space"))).result()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CheckpointError("x is damaged"), r"^x is damaged$"),
        (ValueError("bad"), r"^ValueError: bad$"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(0), "SystemExit"),
        (MemoryError(), "MemoryError"),
        (ValueError("\udcff\0\n\x1b"), "ValueError"),
        (ValueError("x" * 200_000), r"^ValueError: x{4000}"),
        (ValueError("\U0001f600" * 20_000), "ValueError"),
        (OSError(errno.EIO, "x" * 200_000), "x{4000}"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_any_other_error_is_told_with_its_kind(error, told):
    with pytest.raises((CheckpointError, OSError), match=told) as caught:
        Job(raising(error)).result()
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("how", ["os._exit(0)", "os._exit(7)", "SIGKILL", "within a word"])
def test_a_process_that_ends_without_a_word_has_failed(monkeypatch, how):
    monkeypatch.setattr(background, "_tell", lambda pipe, what: (os.write(pipe, b'{"done": [1'), os._exit(0)))

    def work():
        if how == "within a word":
            return
        if how.startswith("os"):
            os._exit(7 if "7" in how else 0)
        os.kill(os.getpid(), signal.SIGKILL)

    job = Job(work)
    until(job.over)
    with pytest.raises(CheckpointError, match=r"was killed \(by the system when memory runs out, or with the thread that"):
        job.result()


def test_nothing_is_left_of_a_job():
    before = descriptors()
    jobs = [Job(lambda: None), Job(raising(ValueError("bad"))), Job(lambda: os._exit(1))]
    for job in jobs:
        until(job.over)
        assert not Path(f"/proc/{job.pid}").exists()
    assert descriptors() == before


def test_a_fork_that_fails_leaves_nothing(monkeypatch):
    before = descriptors(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(os, "fork", raising(OSError(errno.EAGAIN, "no more processes")))
    with pytest.raises(OSError, match="no more processes"):
        Job(lambda: None)
    assert (descriptors(), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


def test_somebody_who_waits_for_all_children_does_no_harm():
    job = Job(lambda: None)
    os.waitpid(job.pid, 0)
    job.result()


def test_ctrl_c_and_sigterm_to_the_group_do_not_hurt_it(tmp_path):
    def work():
        (tmp_path / "began").touch()
        until((tmp_path / "go").exists)

    job = Job(work)
    until((tmp_path / "began").exists)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(job.pid, number)
    (tmp_path / "go").touch()
    job.result()
    assert {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM, signal.SIGTERM])
def test_no_handler_of_the_users_runs_there(tmp_path, number):
    def work():
        (tmp_path / "began").touch()
        until((tmp_path / "go").exists)

    before = signal.signal(number, lambda *_: (tmp_path / f"handled in {os.getpid()}").touch())
    try:
        job = Job(work)
        until((tmp_path / "began").exists)
        for process in (job.pid, os.getpid()):
            os.kill(process, number)
        (tmp_path / "go").touch()
        job.result()
    finally:
        signal.signal(number, before)
    assert [path.name for path in tmp_path.glob("handled*")] == [f"handled in {os.getpid()}"]


def test_ctrl_c_at_the_fork_loses_neither_the_pipe_nor_the_process(tmp_path, monkeypatch):
    before, fork = descriptors(), os.fork

    def interrupted():
        process = fork()
        if process:  # to this thread: another, which does not block it, would hand it on at once
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return process

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", interrupted)
            with pytest.raises(KeyboardInterrupt):
                Job((tmp_path / "done").touch, tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    background.settle(tmp_path)
    assert (tmp_path / "done").exists()
    assert descriptors() == before
    assert background._RUNNING == []


def test_ctrl_c_while_it_is_waited_for_loses_nothing_of_what_was_told(monkeypatch):
    job, read, count = Job(lambda: ["a", "b"]), os.read, 0

    def interrupted(pipe, size):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return read(pipe, size)

    monkeypatch.setattr(os, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert job.result() == ["a", "b"]


def test_any_number_of_open_files_does_no_harm(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2048:
        pytest.skip("no more than 1024 files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, before[1]))
    try:
        with contextlib.ExitStack() as held:
            while held.enter_context(Path("/dev/null").open()).fileno() < 1100:
                pass
            job = Job(lambda: until((tmp_path / "go").exists))
            assert not job.over()
            (tmp_path / "go").touch()
            until(job.over)
            job.result()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_thread_that_ends_takes_its_process_with_it_and_that_is_said(tmp_path):
    jobs = []

    def begin():
        jobs.append(Job(lambda: until((tmp_path / "go").exists)))
        time.sleep(0.1)  # until it is known there whose end is its own

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    with pytest.raises(CheckpointError, match="or with the thread that began it"):
        jobs[0].result()


FORKING = """
import os, sys, time, warnings
from pathlib import Path
from axontrain.checkpoint.background import Job, settle

warnings.simplefilter("ignore")  # of Python 3.12
there = Path(sys.argv[1])

def work():
    while not (there / "go").exists():
        time.sleep(0.002)
    return "told"

job = Job(work, there)
process = os.fork()
if process == 0:
    settle(there)  # is not its child's to wait for
    try:
        job.result()
    except Exception as error:
        print(error, flush=True)
    sys.exit(0)  # the ordinary way, with all that is done at exit
os.waitpid(process, 0)
(there / "go").touch()
print(job.result())
"""


def test_a_process_that_is_forked_later_neither_waits_for_it_nor_takes_what_it_tells(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORKING, tmp_path], capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr) == ("another process has begun it, and waits for it\ntold\n", "")


def test_without_a_way_to_die_with_the_parent_none_is_begun():
    script = (
        "import torch; del torch.multiprocessing._prctl_pr_set_pdeathsig\n"
        "from axontrain.checkpoint import background; print(background.AVAILABLE)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_process_dies_with_its_parent(tmp_path):
    def work():
        (tmp_path / "began").write_text(str(os.getpid()))
        until((tmp_path / "go").exists)
        (tmp_path / "done").touch()

    parent = in_child(lambda: Job(work).result())
    until(lambda: (tmp_path / "began").exists() and (tmp_path / "began").read_text())
    writer = int((tmp_path / "began").read_text())
    assert is_there(writer)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until(lambda: not is_there(writer), 5)
    (tmp_path / "go").touch()
    assert not (tmp_path / "done").exists()


PROGRAM = """
import atexit, sys, time
from pathlib import Path
from axontrain.checkpoint.background import Job

atexit.register(lambda: print(Path(sys.argv[1], "done").exists()))  # the first to be registered is the last to be called

def work():
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.002)
    Path(sys.argv[1], "done").touch()

job = Job(work)
print("the program's end")  # is not flushed: the fork is not to print it, too
raise ValueError("of the program")
"""


def test_the_end_of_the_program_waits_for_it(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert "Traceback" in program.stderr.readline()
        time.sleep(0.2)
        assert program.poll() is None
        (tmp_path / "go").touch()
        program.wait(20)
        assert (tmp_path / "done").exists()
        assert program.stdout.read() == "the program's end\nTrue\n"


def test_a_child_whose_parent_died_at_once_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(CheckpointError, match="was killed"):
        Job((tmp_path / "done").touch).result()
    assert not (tmp_path / "done").exists()
