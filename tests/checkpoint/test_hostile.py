"""Hostile checkpoints (the corpus of hostile.py) are refused, quickly and in words, with nothing run, imported or written; and
what could not be read back is refused when it is saved."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import corpus
from torch import nn

import axontrain as ax
from axontrain.checkpoint import directory, encode, read, schema, write
from axontrain.checkpoint.directory import about
from axontrain.checkpoint.schema import check
from benchmarks.fuzz_checkpoints import fitting, same, small_loop

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 2, 300

WATCHED = """
import json, os, resource, sys, time
from pathlib import Path
import torch
import axontrain as ax
from axontrain.checkpoint import read
from axontrain.checkpoint.directory import about
from benchmarks.fuzz_checkpoints import same, small_loop, write

good, paths = sys.argv[1], json.load(open(sys.argv[2]))
torch.set_num_threads(1)
loop = small_loop(8)
for look in (about, read, loop.restore):  # whatever is imported when first needed
    look(good)
    try:
        look(Path(good, "none"))
    except ax.CheckpointError:
        pass
for name in list(loop.state.attached):
    loop.state.attached[name].state_dict()
loop = small_loop(3)
before = loop.save()
modules, seen = set(sys.modules), []
QUIET = ("os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob", "object.__getattr__", "sys._getframe", "builtins.id")


def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path  # of what is open already
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
        if not written and not (mode and set(mode) & set("wax+")) and Path(path).is_relative_to(Path(good).parent):
            return
    if event not in QUIET:
        seen.append(f"{event} {arguments!r}"[:200])


def looked(look, path):
    try:
        look(path)
    except (ax.CheckpointError, OSError) as error:
        return str(error) if isinstance(error, ax.CheckpointError) or error.filename else repr(error)
    except BaseException as error:
        return repr(error)[:300]
    return None


status = os.open("/proc/self/status", os.O_RDONLY) if sys.platform == "linux" else None


def peak():
    if status is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # What getrusage tells is at least what the parent had taken when it forked.
    text = os.pread(status, 10_000, 0)
    return int(text[text.index(b"VmHWM:") + 6 :].split()[0]) / 1024


sys.addaudithook(hook)
told = {}
for name, path in paths.items():
    of = told[name] = {"path": path}
    for look in (about, read, loop.restore):
        started, memory, kept = time.process_time(), peak(), len(seen)
        text = looked(look, path)
        of[look.__name__] = {"said": text, "seconds": time.process_time() - started, "memory": peak() - memory,
                             "events": seen[kept:], "modules": sorted(set(sys.modules) - modules)}
    now = loop.save()
    of["changed"] = not same(now, before)
    if of["changed"]:
        loop = small_loop(3)
        before = loop.save()
        modules |= set(sys.modules)
kept = len(seen)
open(os.devnull, "w").close()
eval("1")
seen_now = len(seen) - kept
json.dump({"told": told, "sees": seen_now}, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The corpus, and what became of each of it in a process that is watched: by name."""
    base = tmp_path_factory.mktemp("hostile")
    paths = corpus(base / "corpus")
    (base / "paths.json").write_text(json.dumps({name: str(path) for name, path in paths.items()}))
    listed = _listed(base / "corpus")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, base / "corpus" / "good", base / "paths.json", base / "told.json"],
        capture_output=True, text=True, timeout=300, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    told = json.loads((base / "told.json").read_text())
    assert told["sees"] >= 2  # a test of nothing, if the hook were blind
    assert _listed(base / "corpus") == listed
    yield paths, told["told"]
    for path in sorted((base / "corpus").rglob("*"), reverse=True):  # a quarter of a gigabyte
        if path.is_file() and path.stat().st_size > 2**20:
            path.unlink()


def _listed(directory):
    return {str(path): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.rglob("*")}


def _table(rows):
    return "\n".join(f"{name}: {what}" for name, what in rows[:40]) + f"\n{len(rows)} in all"


def _assert_none(rows):
    assert not rows, "\n" + _table(rows)


def _looks(told):
    return [(f"{name}, {look}", of, of[look]) for name, of in told.items() for look in ("about", "read", "restore")]


@pytest.mark.slow  # the whole corpus takes a quarter of a minute
def test_the_corpus_is_large_and_of_different_things(hostile):
    paths, _ = hostile
    assert len(paths) > 500
    assert {name.partition(":")[0] for name in paths} == {"file", "about", "state", "loop"}


@pytest.mark.slow
def test_each_is_refused_by_whom_it_should_be(hostile):
    _, told = hostile
    kinds = {"file": ("read", "restore"), "about": ("about",), "state": ("restore",), "loop": ("restore",)}
    _assert_none([(name, look) for name, of in told.items() for look in kinds[name.partition(":")[0]] if not of[look]["said"]])


@pytest.mark.slow
def test_what_is_refused_is_a_checkpoint_error_that_can_be_shown(hostile):
    """In one line, short, without what a terminal acts on; of a file it names which."""
    _, told = hostile
    rows = []
    for name, of, look in _looks(told):
        text = look["said"]
        if text is None:
            continue
        named = of["path"] in text or text.startswith(("the saved state", "the optimizer", "the saved schedule"))
        if not named or not text.isprintable() or len(text) > 1200 + len(of["path"]):
            rows.append((name, repr(text[:200])))
    _assert_none(rows)


@pytest.mark.slow
def test_nothing_runs_is_imported_or_written(hostile):
    _, told = hostile
    _assert_none(
        [(name, look["events"] or look["modules"]) for name, _, look in _looks(told) if look["events"] or look["modules"]]
    )


@pytest.mark.slow
def test_each_takes_little_time_and_memory(hostile):
    _, told = hostile
    _assert_none([(name, f"{look['seconds']:.1f} s") for name, _, look in _looks(told) if look["seconds"] > SECONDS])
    assert sum(look["memory"] for _, _, look in _looks(told)) < MEGABYTES, [
        (name, look["memory"]) for name, _, look in _looks(told) if look["memory"] > 10
    ]


@pytest.mark.slow
def test_the_loop_is_bit_for_bit_as_it_was(hostile):
    _, told = hostile
    _assert_none([(name, "changed") for name, of in told.items() if of["changed"] and of["restore"]["said"]])


@pytest.mark.slow
def test_the_schema_refuses_each_state_by_itself(hostile):
    paths, _ = hostile
    rows = []
    for name, path in paths.items():
        if name.startswith("state: "):
            try:
                check(read(path))
                rows.append((name, "passed"))
            except ax.CheckpointError as error:
                if not str(error).startswith("the saved state"):
                    rows.append((name, str(error)))
    _assert_none(rows)
    check(small_loop().save())
    check(read(write(paths["loop: no optimizer"].parent / "whole", small_loop(7).save())))


def test_the_schema_takes_what_states_there_are():
    """Of other optimizers, of tasks and weights, and of generators of CUDA."""
    for optimizer in ("sgd", "adagrad", "rmsprop", "nadam", "asgd", "rprop", "adafactor", "radam", "adamax", "adadelta"):
        net = nn.Linear(3, 2)
        loop = ax.Loop(ax.Supervised(net, "cross_entropy"), ax.Optimizer(optimizer, lr=0.01), device="cpu", progress=False)
        loop.fit([(torch.randn(4, 3), torch.randint(2, (4,)))] * 3, epochs=1)
        check(loop.save())
    state = loop.save()
    state["rng"]["cuda"] = [torch.tensor([5, 8], dtype=torch.int64).view(torch.uint8)]
    check(state)


def test_early_readings_are_bounded(monkeypatch):
    """Each value takes many times its bytes once it stands in a row."""
    state = small_loop().save()
    whole = {"rows": None, "values": torch.arange(1000)}
    some = {"rows": torch.arange(500), "values": torch.ones(500, dtype=torch.float64)}
    state["early"] = {"step": whole, "epoch": whole, "a": some, "b": {"rows": torch.arange(2), "values": [1, None]}}
    monkeypatch.setattr(schema, "MOST_EARLY", 2502)
    check(state)
    monkeypatch.setattr(schema, "MOST_EARLY", 2501)
    with pytest.raises(ax.CheckpointError, match="the saved state's 'early' holds more than 2,501 readings"):
        check(state)


def test_a_forged_example_takes_no_memory_when_it_is_read():
    def made():
        objective = ax.Supervised(nn.Linear(3, 2), "cross_entropy", metrics=["confusion_matrix"])
        return ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), device="cpu", progress=False)

    loop = made()
    for _ in loop.steps([(torch.randn(4, 3), torch.randint(2, (4,)))] * 3, epochs=1):
        if loop.state.step == 2:
            snapshot, expected = loop.save(), loop.state.read()
    assert snapshot["meter"]["metrics"]["confusion_matrix"]["waiting"]
    honest, forged = made(), made()
    honest.restore(snapshot)
    assert honest.state.read() == expected
    snapshot["meter"]["example"][0][0] = [4, 2**20]  # of as many classes, a matrix of 8 TB
    forged.restore(snapshot)
    with pytest.raises(ax.MetricError, match=r"'confusion_matrix' would hold 1,099,511,627,777 values where \d+ were saved"):
        forged.state.read()


@pytest.mark.parametrize(
    "kind", ["a pipe", "a device", "a NUL", "too long", "nothing", "a file", "a directory of links", "a loop"]
)
def test_a_path_that_is_strange_is_an_error_at_once(tmp_path, kind):
    path = {"a device": "/dev/zero", "a NUL": f"{tmp_path}/a\0b", "too long": f"{tmp_path}/{'x' * 5000}"}.get(
        kind, tmp_path / "x"
    )
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a file":
        path.write_text("{}")
    elif kind == "a directory of links":
        path.mkdir()
        (path / "step-000000001").symlink_to("/etc")
    elif kind == "a loop":
        path.symlink_to(path)
    for look in (read, about, small_loop().restore):
        with pytest.raises((ax.CheckpointError, OSError)):
            look(path)


# --- names that are shown --------------------------------------------------------------------------------------------


def test_names_and_readings_that_are_strange_are_kept_as_they_are(tmp_path):
    """They are text: what shows them escapes them."""
    names = ["a\nb", "\x1b[31mred", "=cmd|' /C calc'!A0", "<script>alert(1)</script>", "\u202etxt", "../../up", "", " "]
    path = write(tmp_path / "s", {}, {"readings": dict.fromkeys(names, 0.5)})
    assert list(about(path)["readings"]) == names


# --- saving ----------------------------------------------------------------------------------------------------------


class Part:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"good": 1, "bad": self.value}

    def load_state_dict(self, state):
        self.value = state["bad"]


class Kept(Part, ax.Callback):
    pass


class Extra(nn.Linear):
    value = None

    def get_extra_state(self):
        return {"bad": self.value}

    def set_extra_state(self, state):
        self.value = state["bad"]


holds_itself: list = []
holds_itself.append(holds_itself)

UNSAVABLE = {
    "an object": object(),
    "a class": Part,
    "a function": write,
    "a lambda in a list": [1, lambda: None],
    "a module": os,
    "a set": {1, 2},
    "bytes": b"bytes",
    "a bytearray": bytearray(b"x"),
    "a range": range(3),
    "a generator": (number for number in ()),
    "a key that is a number": {1: "a"},
    "a key that is None": {None: "a"},
    "a key that is a tuple": {("a", "b"): 1},
    "a key of ours": {"$tensor": "state/x"},
    "another key of ours": {"$anything": 1},
    "a NumPy array": np.zeros(3),
    "a NumPy number": np.int64(3),
    "a NumPy array of objects": np.array([object()]),
    "a complex number": 1 + 2j,
    "a path": Path("a"),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a tensor on meta": torch.empty(3, device="meta"),
    "a tensor of complex doubles": torch.zeros(2, dtype=torch.complex128),
    "a tensor of 65 dimensions": torch.zeros([1] * 65),
    "a list that holds itself": holds_itself,
    "a number of a thousand digits": 10**1000,
    "a dtype": torch.float32,
    "a device": torch.device("cpu"),
    "a generator of torch's": torch.Generator(),
}


@pytest.mark.parametrize("through", ["attach", "a callback", "extra state"])
@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_cannot_be_read_back_is_an_error_when_saving(tmp_path, through, name):
    net, callbacks = Extra(3, 2), []
    part = {"attach": Part(1), "a callback": Kept(1), "extra state": net}[through]
    if through == "a callback":
        callbacks.append(part)
    loop = ax.Loop(
        ax.Supervised(net, "cross_entropy"), ax.Optimizer("sgd", lr=0.1), callbacks=callbacks, device="cpu", progress=False
    )
    if through == "attach":
        loop.state.attach("mine", part)
    if through == "a callback":
        loop.state.attach("callback/Kept", part, replace=True)
    path = loop.save(tmp_path / "saved")
    good = read(path)
    part.value = UNSAVABLE[name]
    with pytest.raises(ax.CheckpointError, match="bad"):
        loop.save(path)
    assert same(read(path), good)
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("value", [math.nan, -math.inf, -0.0, "\0\x1b\ud800", "$tensor", 10**600, [[[]]], {"": {"/": None}}])
def test_what_is_plain_is_saved_however_strange(tmp_path, value):
    loop = small_loop()
    loop.state.attach("mine", part := Part(value))
    path = loop.save(tmp_path / "saved")
    part.value = None
    loop.restore(path)
    assert same(part.value, value)


def test_what_is_said_about_a_checkpoint_can_be_read_back(tmp_path):
    path = write(tmp_path / "saved", {"a": 1}, {"step": 1})
    for told in ({"a": torch.ones(1)}, {"a": "x" * 2**20}):
        with pytest.raises(ax.CheckpointError, match="what is said about a checkpoint is plain values"):
            write(path, {"a": 2}, told)
    assert read(path) == {"a": 1}


def test_more_than_is_read_back_is_an_error_when_saving(tmp_path, monkeypatch):
    path = write(tmp_path / "saved", {"a": 1})
    monkeypatch.setattr(encode, "MOST_VALUES", 100)
    with pytest.raises(ax.CheckpointError, match="the state has 102 values, and no more than 100 are read back"):
        write(path, {"a": [0] * 100})
    monkeypatch.undo()
    for name, most in (("MOST_TENSORS", 5), ("MOST_HEADER", 1000)):
        monkeypatch.setattr(directory, name, most)
        with pytest.raises(ax.CheckpointError, match=r"the state has 50 tensors, .* are read back: stack those"):
            write(path, {"a": [torch.zeros(0)] * 50})
        monkeypatch.undo()
    assert read(path) == {"a": 1}


def test_the_bounds_of_saving_are_those_of_reading(tmp_path):
    tree = {"\x01" * 1000: [torch.zeros([1] * 64) for _ in range(500)]}
    assert same(read(write(tmp_path / "saved", tree)), tree)
    fitting(tmp_path / "saved")
    assert same(read(tmp_path / "saved"), tree)


def test_which_kernel_computes_is_true_or_false_or_nothing():
    loop = ax.Loop(ax.Supervised(torch.nn.Linear(2, 2), "cross_entropy"), ax.Optimizer("adamw", lr=0.1), progress=False)
    state = loop.save()
    state["optimizers"]["main"]["optimizers"][0]["groups"][0]["foreach"] = [2, 3]
    with pytest.raises(ax.CheckpointError, match=r"foreach of the optimizer 'main' is a list .* true, false or nothing"):
        loop.restore(state)
