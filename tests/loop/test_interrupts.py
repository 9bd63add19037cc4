"""Ctrl-C ends the step in hand and gives a result; the program goes on (Lightning #20317, #20666)."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import axontrain as ax


@pytest.fixture(autouse=True)
def pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def table(n=40, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, x.sum(1, keepdim=True))


TRAIN, TEST = table(), table(12, seed=1)


def line_loop(**options):
    torch.manual_seed(0)
    return ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.01), **{"progress": False, **options})


def interrupt(state=None):
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_training_ends_the_step_in_hand():
    loop = line_loop()
    calls = []
    loop.on("after_backward")(lambda state: interrupt() if state.step == 12 else None)
    loop.on("after_fit")(lambda state: calls.append(state.status))
    result = loop.fit(TRAIN, TEST, epochs=9, batch_size=4)
    assert (result.status, result.reason, result.ok) == ("interrupted", "Ctrl-C", False)
    assert (loop.state.step, loop.state.epoch, loop.state.batch_index) == (13, 1, 3)
    assert result.values["train/loss"] == result.history["train/loss"][-1]
    assert calls == ["interrupted"]


def test_another_fit_goes_on_and_nothing_is_lost():
    loop, twin = line_loop(), line_loop()
    loop.on("after_batch")(lambda state: interrupt() if state.step == 12 else None)
    loop.fit(TRAIN, TEST, epochs=3, batch_size=4)
    assert loop.state.step == 12
    loop.fit(TRAIN, TEST, epochs=2, batch_size=4)
    twin.fit(TRAIN, TEST, epochs=3, batch_size=4)
    assert loop.state.step == twin.state.step == 30
    assert torch.equal(loop.objective.model.weight, twin.objective.model.weight)


def test_ctrl_c_in_validation_ends_there_without_half_a_reading():
    loop, evaluated = line_loop(), []

    class Interrupted(ax.Supervised):
        def eval_step(self, batch):
            evaluated.append(len(batch[0]))
            if len(evaluated) == 2:
                interrupt()
            return super().eval_step(batch)

    after = []
    loop = ax.Loop(Interrupted(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.01), progress=False)
    loop.on("after_evaluate")(lambda state: after.append("after_evaluate"))
    result = loop.fit(TRAIN, TEST, epochs=2, batch_size=4)
    assert result.status == "interrupted"
    assert evaluated == [4, 4]
    assert "val/loss" not in result.values
    assert after == []
    assert (loop.state.step, loop.state.epoch) == (10, 1)
    assert loop.fit(TRAIN, TEST, epochs=1, batch_size=4).values["val/loss"] > 0


def test_a_second_ctrl_c_raises():
    loop, calls = line_loop(), []

    @loop.on("after_backward")
    def twice(state):
        interrupt()
        interrupt()

    loop.on("after_fit")(lambda state: calls.append(state.status))
    with pytest.raises(KeyboardInterrupt):
        loop.fit(TRAIN, epochs=1)
    assert calls == ["failed"]


@pytest.mark.parametrize("how", ["completes", "fails", "interrupted", "left"])
def test_the_handler_is_put_back(how):
    loop = line_loop()
    if how == "fails":
        loop.on("after_batch")(lambda state: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.fit(TRAIN, epochs=1)
    elif how == "left":
        next(loop.steps(TRAIN, epochs=1))
    else:
        if how == "interrupted":
            loop.on("after_batch")(interrupt)
        loop.fit(TRAIN, epochs=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_is_left_alone():
    calls = []

    def own(number, frame):
        calls.append(number)

    signal.signal(signal.SIGINT, own)
    loop = line_loop()
    loop.on("after_batch", first=1)(interrupt)
    assert loop.fit(TRAIN, epochs=1).status == "completed"
    assert calls == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is own


def test_ctrl_c_between_the_steps_of_ones_own_loop_ends_it():
    loop, steps = line_loop(), 0
    for _ in loop.steps(TRAIN, epochs=9, batch_size=4):
        steps += 1
        if steps == 3:
            interrupt()
    assert steps <= 4
    assert loop.state.status == "interrupted"


PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program started in the background has none
import torch, axontrain as ax
x = torch.randn(64, 3)
loop = ax.Loop(ax.Supervised(torch.nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.01), progress=False)
loop.on("after_batch", first=1)(lambda state: print("training", flush=True))
result = loop.fit(ax.ArrayDataset(x, x.sum(1, keepdim=True)), time="5 min")
print(result.status, result.state.step > 0, "train/loss" in result.values, flush=True)
before = loop.state.step
print(loop.fit(ax.ArrayDataset(x, x.sum(1, keepdim=True)), steps=5).status, loop.state.step - before, flush=True)
"""


@pytest.mark.slow
def test_a_program_goes_on_after_ctrl_c():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout.readline() == "training\n"
        program.send_signal(signal.SIGINT)
        out, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert out.splitlines() == ["interrupted True True", "completed 5"], errors
    assert program.returncode == 0
