"""The process that writes: what it did or failed in is told, and it neither outlives its parent nor disturbs it."""

import errno
import os
import signal
import subprocess
import sys
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


@pytest.mark.parametrize("how", ["os._exit(0)", "os._exit(7)", "SIGKILL"])
def test_a_process_that_ends_without_a_word_has_failed(how):
    def work():
        if how.startswith("os"):
            os._exit(7 if "7" in how else 0)
        os.kill(os.getpid(), signal.SIGKILL)

    job = Job(work)
    until(job.over)
    with pytest.raises(CheckpointError, match="was killed"):
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
