import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
import types
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import axontrain as ax
from axontrain.callbacks import progress
from axontrain.callbacks.progress import chosen


def fit(style, stream, *, batches=6, epochs=2, wait=0.0, validation=True, **limits):
    objective = ax.Supervised(nn.Linear(3, 2), "cross_entropy", metrics=["accuracy", "confusion_matrix"])
    bar = ax.ProgressBar(style, stream=stream)
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), callbacks=[bar], device="cpu", progress=False)
    if wait:
        loop.on("after_batch")(lambda state: time.sleep(wait))
    data = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(batches)]
    loop.fit(data, data[:2] if validation else None, **(limits or {"epochs": epochs}))
    return loop


class Terminal:
    """A real pseudo-terminal of 200 columns, and what was written to it."""

    def __init__(self):
        self.leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        self.stream = os.fdopen(follower, "w")
        self.parts = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self.leader, 65536)
            except OSError:  # the other end was closed
                return
            if not part:
                return
            self.parts.append(part)

    def close(self):
        if not self.stream.closed:
            self.stream.close()
            self.reader.join(5)
            os.close(self.leader)
        return b"".join(self.parts).decode()


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


def test_on_a_terminal_it_draws_a_bar_with_the_readings(terminal):
    assert terminal.stream.isatty()
    assert chosen(terminal.stream) == "terminal"
    loop = fit("auto", terminal.stream)
    text = terminal.close()
    last = text.split("\r")[-2] if text.endswith("\r") else [part for part in text.split("\r") if part.strip()][-1]
    assert "epoch 2/2" in last
    assert "100%" in last
    assert "12/12" in last
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert f"{name} {loop.state.values[name]:.4g}" in last
    assert "confusion_matrix" not in text
    assert "validating" in text


def test_a_bar_shows_a_second_fit_from_its_own_beginning(terminal):
    loop = fit("terminal", terminal.stream, batches=5)
    loop.fit([(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(5)], epochs=1)
    text = terminal.close()
    assert "10/10" in text
    assert "epoch 3/3" in text
    assert "5/5" in text


def test_a_bar_of_unknown_length_shows_what_was_done():
    stream = io.StringIO()
    fit("terminal", stream, time=0.05, wait=0.01, validation=False)
    assert re.search(r"epoch \d+: \d+step", stream.getvalue())


def test_the_bar_moves_by_the_clock_and_not_by_the_step(monkeypatch):
    drawn = []
    original = ax.ProgressBar._draw
    monkeypatch.setattr(ax.ProgressBar, "_draw", lambda *a: (drawn.append(time.perf_counter()), original(*a))[1])
    began = time.perf_counter()
    fit("terminal", io.StringIO(), batches=400, epochs=1, validation=False)
    assert len(drawn) <= 3 + (time.perf_counter() - began) / progress.REDRAW_SECONDS
    drawn.clear()
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.0)
    fit("terminal", io.StringIO(), batches=10, epochs=1, validation=False)
    assert len(drawn) >= 10


def test_a_bar_leaves_no_thread_and_nothing_open(terminal):
    before = set(threading.enumerate())
    fit("terminal", terminal.stream)
    assert set(threading.enumerate()) == before


def test_a_bar_is_closed_after_an_error_too(terminal):
    before = set(threading.enumerate())
    bar = ax.ProgressBar("terminal", stream=terminal.stream)
    loop = ax.Loop(
        ax.Supervised(nn.Linear(3, 2), "cross_entropy"), ax.Optimizer("sgd", lr=0.1), callbacks=[bar], progress=False
    )
    with pytest.raises(ValueError, match="batch_size"):
        loop.fit([(torch.randn(4, 3), torch.randint(2, (4,))), (torch.randn(4, 3), torch.zeros(3).long())], epochs=1)
    assert bar._bar is None
    assert set(threading.enumerate()) == before
    assert terminal.close().endswith("\n")


def test_where_no_bar_can_be_there_are_lines():
    stream = io.StringIO()
    assert chosen(stream) == "lines"
    loop = fit("auto", stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("epoch 1/2  step 6  train/loss ")
    assert lines[-1].startswith("epoch 2/2  step 12  ")
    assert f"val/accuracy {loop.state.values['val/accuracy']:.4g}" in lines[-1]
    assert re.search(r" \d+\.\d s$", lines[-1])
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_lines_of_short_epochs_are_rare_and_the_last_is_always_there():
    stream = io.StringIO()
    fit("lines", stream, batches=2, epochs=200)
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("epoch 200/200  step 400")
    assert len(lines) < 20
    assert len(set(lines)) == len(lines)


def test_lines_come_within_long_epochs_too(monkeypatch):
    monkeypatch.setattr(progress, "LONG_SECONDS", 0.05)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.01)
    stream = io.StringIO()
    fit("lines", stream, batches=10, epochs=1, wait=0.02, validation=False)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    assert lines[0].startswith("epoch 0/1  step ")


def test_a_run_by_steps_shows_the_epoch_without_a_total():
    stream = io.StringIO()
    fit("lines", stream, steps=3, validation=False)
    assert stream.getvalue().startswith("epoch 0  step 3  ")


def test_it_writes_to_standard_error_of_the_moment(capsys):
    fit("lines", None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train/loss" in captured.err


def test_a_loop_shows_progress_unless_told_not_to(capsys):
    objective = ax.Supervised(nn.Linear(3, 2), "cross_entropy")
    data = [(torch.randn(4, 3), torch.randint(2, (4,)))]
    ax.Loop(objective, ax.Optimizer("sgd", lr=0.1)).fit(data, epochs=1)
    assert "train/loss" in capsys.readouterr().err
    ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), progress=False).fit(data, epochs=1)
    assert capsys.readouterr().err == ""


def test_readings_of_names_and_values_of_any_kind_are_drawn(terminal):
    objective = ax.Supervised(nn.Linear(3, 2), "cross_entropy")
    loop = ax.Loop(
        objective, ax.Optimizer("sgd", lr=0.1), callbacks=[ax.ProgressBar("terminal", stream=terminal.stream)], progress=False
    )
    loop.on("after_epoch")(lambda state: state.record({"{odd} %s": float("nan"), "many": [1, 2]}))
    loop.fit([(torch.randn(4, 3), torch.randint(2, (4,)))], epochs=1)
    text = terminal.close()
    assert "{odd} %s nan" in text
    assert "many" not in text


class ZMQInteractiveShell:
    """Named like the shell of a notebook."""


def in_a_notebook(monkeypatch):
    made = types.ModuleType("IPython")
    made.get_ipython = ZMQInteractiveShell
    monkeypatch.setitem(sys.modules, "IPython", made)


def test_in_a_notebook_it_is_a_widget_only_if_there_are_widgets(monkeypatch):
    in_a_notebook(monkeypatch)
    assert chosen(io.StringIO()) == ("notebook" if find_spec("ipywidgets") else "lines")
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    assert chosen(io.StringIO()) == "lines"


def test_in_a_terminal_shell_it_is_a_terminal(monkeypatch, terminal):
    made = types.ModuleType("IPython")
    made.get_ipython = lambda: object()
    monkeypatch.setitem(sys.modules, "IPython", made)
    assert chosen(terminal.stream) == "terminal"
    made.get_ipython = lambda: None
    assert chosen(io.StringIO()) == "lines"


def test_a_style_that_is_not_known_offers_the_nearest():
    with pytest.raises(ax.UnknownNameError, match="unknown style of ProgressBar 'line': did you mean 'lines'"):
        ax.ProgressBar("line")


@pytest.mark.parametrize("style", ["lines", "terminal"])
def test_a_terminal_does_not_obey_a_name(style):
    """A reading is named by whoever wrote the checkpoint that was restored."""
    stream = io.StringIO()
    bar = ax.ProgressBar(style, stream=stream)
    objective = ax.Supervised(nn.Linear(3, 2), "cross_entropy")
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), callbacks=[bar], device="cpu", progress=False)
    loop.state.values.update({"\x1b]0;evil\x07\x1b[2J": 0.5, "a\nb\u202e": 1.0, "x" * 10_000: 2.0})
    loop.fit([(torch.randn(4, 3), torch.randint(2, (4,)))], epochs=1)
    text = stream.getvalue()
    assert r"\x1b]0;evil\x07\x1b[2J 0.5" in text
    assert r"a\nb\u202e 1" in text
    assert not set("\x1b\x07\u202e") & set(text.replace("\x1b[A", ""))
    assert "x" * 200 not in text
