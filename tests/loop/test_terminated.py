"""Ctrl-C and SIGTERM, sent to real processes at any time: the state is saved, and the run goes on as if nothing had been."""

import functools
import itertools
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_runs import Augmented, Case, differences, environment, finish, make, outcome, whole
from torch import nn

import axontrain as ax
from axontrain.checkpoint import runs

CASE = Case("sgd", validate="3 steps", epochs=2, steps=None)  # 10 steps
BY_NAME = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
SIGNALS = pytest.mark.parametrize("number", [*BY_NAME.values()], ids=[*BY_NAME])


@pytest.fixture(autouse=True)
def pythons_own_handlers():
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@functools.cache
def unbroken():
    return whole(CASE)


class Program:
    """A function in a forked process, which leads a group of its own. It is told ``tell``, to be called when it is time."""

    def __init__(self, body):
        self.told, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                code = body(lambda: os.write(write, b".")) or 0
            except SystemExit as exit:
                code = exit.code
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)

    def wait_for(self, seconds=10.0):
        assert select.select([self.told], [], [], seconds)[0], "it was never time"
        assert os.read(self.told, 1) == b"."

    def send(self, number, *, to_all=False):
        (os.killpg if to_all else os.kill)(self.pid, number)

    def code(self, seconds=10.0):
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.told)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it has not ended in {seconds} s")


def slowly(tell, seconds=0.3, times=1):
    """What takes its time, and says so, the first ``times``."""
    calls = []

    def take(*_arguments):
        calls.append(None)
        if len(calls) <= times:
            tell()
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                time.sleep(0.01)

    return take


def on_step(number, act):
    return lambda state: (act(), None)[1] if state.step == number else None


def in_training(tell, directory):
    loop, fit = make(CASE, directory)
    loop.on("after_backward")(on_step(6, slowly(tell)))
    return loop, fit


def in_validation(tell, directory):
    loop, fit = make(CASE, directory)
    loop.objective.during_eval = slowly(tell)
    return loop, fit


def in_the_first_step(tell, directory):
    loop, fit = make(CASE, directory)
    take, forward = slowly(tell), loop.objective.predict
    loop.objective.predict = lambda x: (take(), forward(x))[1]
    return loop, fit


def while_saving(tell, directory, *, asynchronous=False, every=4, times=1):
    commit, take = runs.commit, slowly(tell, times=times)
    runs.commit = lambda *arguments: (take(), commit(*arguments))[1]
    return make(CASE, directory, checkpoint=ax.Checkpoint(every=every, asynchronous=asynchronous))


def while_another_process_saves(tell, directory):
    return while_saving(tell, directory, asynchronous=True)


def in_the_wait_at_the_end(tell, directory):
    return while_saving(tell, directory, asynchronous=True, every=10)


PHASES = (in_training, in_validation, in_the_first_step, while_saving, while_another_process_saves, in_the_wait_at_the_end)


# Each phase with one of the two signals, by turns; with the other it is slow.
EACH = [
    pytest.param(phase, BY_NAME[name], id=f"{phase.__name__}-{name}", marks=[] if turn % 4 in (0, 3) else [pytest.mark.slow])
    for turn, (phase, name) in enumerate(itertools.product(PHASES, BY_NAME))
]


@pytest.mark.parametrize(("phase", "number"), EACH)
def test_the_state_is_saved_and_the_run_goes_on(tmp_path, phase, number):
    def body(tell):
        loop, fit = phase(tell, tmp_path)
        try:
            result = loop.fit(**fit)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert number == signal.SIGINT
        return 20 if result.status == "interrupted" else 30

    program = Program(body)
    program.wait_for()
    program.send(number)
    endings = {143} if number == signal.SIGTERM else {20, 30} if phase is in_the_wait_at_the_end else {20}
    assert program.code() in endings  # the wait may have begun or be about to
    step, tree = runs.newest(tmp_path)
    expected = {
        in_training: (7, 7),
        in_validation: (3, 3),
        in_the_first_step: (1, 1),
        while_another_process_saves: (4, 8),  # training goes on meanwhile, up to the next save, which waits
        in_the_wait_at_the_end: (10, 10),
    }
    first, last = expected.get(phase, (4, 6))
    assert first <= tree["counters"]["step"] <= last, step
    found = outcome_of(finish(CASE, tmp_path))
    assert not differences(unbroken(), found)


def outcome_of(found):
    return {name: value for name, value in found.items() if not name.startswith("/file")}


SCRIPT = """
import sys, time
sys.path.insert(0, {helpers!r})
import torch
torch.set_num_threads(1)
from resume_runs import Case, make, outcome
loop, fit = make(Case("adamw", validate="3 steps", epochs=2, steps=None), {directory!r})
loop.on("after_batch")(lambda state: (print(state.step, flush=True), time.sleep({seconds})) and None)
result = loop.fit(**fit, resume=True)
found = outcome(loop, result, {directory!r})
print("completed", flush=True)
"""


def started(path, directory, seconds):
    text = SCRIPT.format(helpers=str(Path(__file__).parent), directory=str(directory), seconds=seconds)
    path.write_text(text)
    return subprocess.Popen([sys.executable, "-W", "error", str(path)], env=environment(), stdout=subprocess.PIPE, text=True)


def read_until(program, word):
    for line in program.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"it never said {word}")


@pytest.mark.slow
def test_a_script_that_was_terminated_and_started_again_ends_as_one_that_was_not(tmp_path):
    path, directory = tmp_path / "script.py", tmp_path / "run"
    program = started(path, directory, seconds=0.05)
    try:
        other = started(tmp_path / "other.py", tmp_path / "unbroken", seconds=0)
        read_until(program, "4")
        program.terminate()
        assert program.wait(timeout=20) == 143
        assert other.wait(timeout=20) == 0
    finally:
        program.kill()
        other.kill()
        program.stdout.close()
        other.stdout.close()
    step = runs.newest(directory)[1]["counters"]["step"]
    assert 4 <= step < 10
    path.write_text(path.read_text().replace("0.05", "0"))
    found = runpy.run_path(str(path))["found"]  # started again, here
    case = Case("adamw", validate="3 steps", epochs=2, steps=None)
    assert not differences(whole(case, tmp_path / "here"), found)
    saved = [runs.newest(tmp_path / name)[1] for name in ("run", "unbroken")]
    for tree in saved:
        assert tree["counters"]["step"] == 10
    assert all(torch.equal(saved[0]["objective"][name], value) for name, value in saved[1]["objective"].items())
    assert torch.equal(saved[0]["rng"]["torch"], saved[1]["rng"]["torch"])


@pytest.mark.slow
def test_the_end_of_a_program_waits_for_what_is_being_written(tmp_path):
    """Two Ctrl-C end it at once, in the middle of a save by another process."""
    text = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(Path(__file__).parent)!r})
import axontrain as ax
from axontrain.checkpoint import runs
from resume_runs import Case, make
commit = runs.commit
runs.commit = lambda *arguments: (time.sleep(2.5), commit(*arguments))
checkpoint = ax.Checkpoint(every=4, asynchronous=True)
loop, fit = make(Case("sgd", epochs=2, steps=None), {str(tmp_path / "run")!r}, checkpoint=checkpoint)
loop.on("after_backward")(lambda state: (print("now", flush=True), time.sleep(30)) and None if state.step == 4 else None)
loop.fit(**fit)
"""
    (tmp_path / "script.py").write_text(text)
    program = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        read_until(program, "now")
        assert not list((tmp_path / "run").glob("step-?????????"))
        program.send_signal(signal.SIGINT)
        time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=10)
    finally:
        program.kill()
    assert "KeyboardInterrupt" in errors
    assert program.returncode == -signal.SIGINT
    assert runs.newest(tmp_path / "run")[1]["counters"]["step"] == 4


def in_group(group):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat[2]) == group and stat[0] != "Z":
                found.append(int(entry.name))
    return found


@SIGNALS
def test_a_signal_to_the_whole_group_of_processes(tmp_path, number):
    """As a scheduler, or a terminal, sends it: the workers get it too."""

    def body(tell):
        taken = Augmented.__getitem__
        Augmented.__getitem__ = lambda self, index: (time.sleep(0.02), taken(self, index))[1]
        commit, me = runs.commit, os.getpid()
        runs.commit = lambda *arguments: (os.getpid() == me or time.sleep(0.2), commit(*arguments))[1]
        checkpoint = ax.Checkpoint(every=7, asynchronous=True)
        loop, fit = make(replace(CASE, workers=2), tmp_path, checkpoint=checkpoint)
        loop.on("after_batch")(on_step(7, tell))
        return 20 if loop.fit(**fit).status == "interrupted" else 30

    program = Program(body)
    program.wait_for()
    time.sleep(0.05)  # the state is being written by another process, and the next batch waited for
    assert len(in_group(program.pid)) >= 4
    program.send(number, to_all=True)
    assert program.code() == (143 if number == signal.SIGTERM else 20)
    ends = time.monotonic() + 5
    while in_group(program.pid):
        assert time.monotonic() < ends, "a process was left"
        time.sleep(0.01)
    assert 7 <= runs.newest(tmp_path)[1]["counters"]["step"] < 10
    assert not differences(unbroken(), outcome_of(finish(CASE, tmp_path)))


def line_loop(**options):
    torch.manual_seed(0)
    return ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.01), progress=False, **options)


TRAIN = ax.ArrayDataset(torch.linspace(-1, 1, 120).reshape(40, 3), torch.linspace(-1, 1, 40)[:, None])


def terminate(state=None):
    os.kill(os.getpid(), signal.SIGTERM)


def test_without_a_directory_it_exits_the_same(capsys):
    loop, calls = line_loop(), []
    loop.on("after_batch")(on_step(3, terminate))
    loop.on("after_fit")(lambda state: calls.append(state.status))
    with pytest.raises(SystemExit) as exit:
        loop.fit(TRAIN, epochs=2)
    assert exit.value.code == 143
    assert calls == ["interrupted"]
    assert loop.state.step == 3
    told = capsys.readouterr().err
    assert "nothing was saved: Loop(..., directory=...) saves there, and fit(..., resume=True) then goes on" in told


@pytest.mark.parametrize(
    "order",
    [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
)
def test_sigterm_outranks_whatever_comes_with_it(tmp_path, order):
    loop = line_loop(directory=tmp_path)
    loop.on("after_batch")(on_step(3, lambda: [os.kill(os.getpid(), number) for number in order]))
    with pytest.raises(SystemExit) as exit:
        loop.fit(TRAIN, epochs=2, batch_size=8)
    assert exit.value.code == 143
    assert runs.newest(tmp_path)[1]["counters"]["step"] == 3


def test_a_second_ctrl_c_raises_at_once_and_the_last_checkpoint_is_good(tmp_path):
    def body(tell):
        loop, fit = make(CASE, tmp_path, every=1)
        loop.on("after_backward")(on_step(6, slowly(tell, seconds=20)))
        loop.fit(**fit)

    program = Program(body)
    program.wait_for()
    program.send(signal.SIGINT)
    time.sleep(0.05)
    program.send(signal.SIGINT)
    assert program.code(seconds=3) == 130
    assert runs.newest(tmp_path)[1]["counters"]["step"] == 6
    assert not differences(unbroken(), outcome_of(finish(CASE, tmp_path)))


@pytest.mark.parametrize("how", ["completes", "fails", "terminated", "interrupted", "left", "refused"])
def test_the_handlers_are_put_back(tmp_path, how):
    loop = line_loop(directory=tmp_path)
    inside = []
    loop.on("after_batch")(lambda state: inside.append(signal.getsignal(signal.SIGTERM)))
    if how == "fails":
        loop.on("after_batch")(lambda state: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.fit(TRAIN, epochs=1)
    elif how == "refused":
        loop.callbacks.append(ax.Checkpoint(best="val/loss"))
        with pytest.raises(ax.ConfigurationError):
            loop.fit(TRAIN, epochs=1)
    elif how == "terminated":
        loop.on("after_batch")(terminate)
        with pytest.raises(SystemExit):
            loop.fit(TRAIN, epochs=1)
    elif how == "left":
        next(loop.steps(TRAIN, epochs=1))
    else:
        if how == "interrupted":
            loop.on("after_batch")(lambda state: signal.raise_signal(signal.SIGINT))
        loop.fit(TRAIN, epochs=1)
    assert how == "refused" or callable(inside[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_users_own_is_left_alone():
    calls = []

    def own(number, frame):
        calls.append(number)

    signal.signal(signal.SIGTERM, own)
    loop = line_loop()
    loop.on("after_batch", first=1)(terminate)
    assert loop.fit(TRAIN, epochs=1).status == "completed"
    assert calls == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is own


def test_ignored_signals_stay_ignored():
    """As ``nohup`` does, and a shell for what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop = line_loop()
    loop.on("after_batch", first=1)(lambda state: signal.raise_signal(signal.SIGINT))
    assert loop.fit(TRAIN, epochs=1).status == "completed"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_thread_that_is_not_the_main_one(tmp_path):
    """Only the main thread may set handlers: there fit works without, and saves, and goes on."""
    found, seen = {}, []

    def train():
        try:
            for limit in (4, None):
                loop, fit = make(CASE, tmp_path)
                loop.on("after_batch")(lambda state: seen.append(signal.getsignal(signal.SIGTERM)))
                if limit is not None:
                    loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == 4 else None)
                found["result"] = outcome(loop, loop.fit(**fit, resume=True))
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(20)
    assert "error" not in found, found
    assert not differences(unbroken(), found["result"])
    assert set(seen) == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Slow:
    """Samples that take a while, here or in a worker."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.ones(3) * index, torch.ones(1)


@SIGNALS
@pytest.mark.parametrize("where", ["validation", "training of torch's DataLoader"])
def test_workers_that_a_signal_to_the_group_took(tmp_path, where, number):
    """Nothing is lost with them: what is in hand is begun again when the run is resumed."""

    def body(tell):
        loop = line_loop(directory=tmp_path)
        train, validation = ax.Loader(Slow(8), 4, workers=1), ax.Loader(Slow(400), 4, workers=1)
        if where == "validation":
            loop.on("before_evaluate")(lambda state: tell() and None)
        else:
            train = torch.utils.data.DataLoader(Slow(400), 4, num_workers=1)
            loop.on("after_batch")(on_step(3, tell))
        return 20 if loop.fit(train, validation, epochs=2).status == "interrupted" else 30

    program = Program(body)
    program.wait_for()
    time.sleep(0.5 if where == "validation" else 0.05)
    program.send(number, to_all=True)
    assert program.code() == (143 if number == signal.SIGTERM else 20)
    tree = runs.newest(tmp_path)[1]
    assert tree["counters"]["step"] == 2 if where == "validation" else tree["counters"]["step"] >= 3
    assert tree["owed"] == (["evaluate", "after epoch"] if where == "validation" else tree["owed"])


def test_sigterm_is_not_lost_with_an_error_of_the_same_step(capsys):
    loop = line_loop()

    @loop.on("after_batch")
    def fail(state):
        if state.step == 2:
            terminate()
            raise ValueError("the disk of the data is gone")

    with pytest.raises(SystemExit) as exit:
        loop.fit(TRAIN, epochs=1)
    assert exit.value.code == 143
    assert "the disk of the data is gone" in capsys.readouterr().err


def test_a_state_that_could_not_be_saved_is_not_said_to_be(tmp_path, monkeypatch, capsys):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    loop = line_loop(directory=tmp_path, callbacks=[ax.Checkpoint(on_failure="warn")])

    @loop.on("after_batch")
    def fill(state):
        if state.step == 3:
            monkeypatch.setattr(runs, "commit", full)
            terminate()

    with pytest.raises(SystemExit) as exit, pytest.warns(ax.AxonWarning, match="No space left"):
        loop.fit(TRAIN, epochs=3)
    assert exit.value.code == 143
    told = capsys.readouterr().err
    assert "could not be saved" in told
    assert "was saved" not in told


def test_ctrl_c_within_the_last_save_is_heard(tmp_path):
    class Pressed(ax.Checkpoint):
        def at_fit_end(self, state):
            signal.raise_signal(signal.SIGINT)
            super().at_fit_end(state)

    loop = line_loop(directory=tmp_path, callbacks=[Pressed()])
    result = loop.fit(TRAIN, epochs=1)
    assert result.status == loop.state.status == "interrupted"
    assert runs.newest(tmp_path)[1]["counters"]["step"] == loop.state.step
