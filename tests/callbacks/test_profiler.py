"""Profiler: the chosen steps and no others are recorded, in files that Perfetto opens, however the fit ends."""

import gzip
import itertools
import json
import signal
import warnings
from collections import defaultdict

import pytest
import torch
from frames import watched
from torch import nn

import axontrain as ax
from axontrain.callbacks import profiler as module


def table(n=40, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


TRAIN, TEST = table(), table(12, seed=1)  # five steps an epoch, of 8


def loop_of(*callbacks, directory=None, start=0):
    torch.manual_seed(start)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = ax.Optimizer("adamw", lr=0.05)
    return ax.Loop(
        ax.Supervised(net, "cross_entropy"), optimizer, callbacks=list(callbacks), progress=False, directory=directory
    )


def read(path):
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


def named(path, word="step "):
    """The numbers of the steps in a trace, in the order of their times."""
    found = [e for e in read(path) if e.get("cat") == "user_annotation" and e["name"].startswith(word)]
    return [int(e["name"].removeprefix(word)) for e in sorted(found, key=lambda e: e["ts"])]


def steps_of(profiler):
    return [named(path) for path in profiler.files]


def running():
    return torch.autograd._profiler_enabled()


# --- which steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"steps": range(7, 10)}, [[7, 8, 9]]),
        ({"steps": range(1, 3)}, [[1, 2]]),  # there is nothing before them to warm up in
        ({"steps": range(14, 99)}, [[14, 15]]),  # the fit ends within them
        ({}, [[12, 13, 14]]),
        ({"steps": 2, "after": 4}, [[6, 7]]),
        ({"steps": 2, "after": 4, "warmup": 0}, [[5, 6]]),
        ({"steps": 1, "every": 4, "warmup": 2}, [[7], [11], [15]]),
        ({"steps": 1, "every": 4, "first": 2}, [[6], [10]]),
        ({"steps": 1, "every": 4, "first": 2, "after": 8}, [[10], [14]]),
        ({"steps": 1, "every": ax.Every(4, before=8)}, [[6]]),
        ({"steps": 2, "every": "1 epoch", "warmup": 0}, [[6, 7], [11, 12]]),
        ({"steps": 1, "every": lambda state: state.step in (2, 9), "warmup": 0}, [[3], [10]]),
        ({"steps": 3, "first": 2, "warmup": 1, "before": 9}, [[3, 4, 5], [7, 8, 9]]),
    ],
    ids=str,
)
def test_the_chosen_steps_and_no_others_are_recorded(tmp_path, options, steps):
    profiler = ax.Profiler(tmp_path, **options)
    loop_of(profiler).fit(TRAIN, TEST, epochs=3, batch_size=8)
    assert steps_of(profiler) == steps
    assert [named(path, "ProfilerStep#") for path in profiler.files] == steps
    assert [path.name for path in profiler.files] == [f"step-{of[0]:09d}.json" for of in steps]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in profiler.files]


def test_outside_of_its_steps_nothing_is_profiled(tmp_path):
    seen = {}
    loop = loop_of(ax.Profiler(tmp_path, steps=range(4, 6), warmup=1))
    loop.on("after_backward")(lambda state: seen.update({state.step + 1: running()}) or None)
    loop.on("before_evaluate")(lambda state: seen.update({f"evaluation {state.epoch}": running()}) or None)
    loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert [step for step, at_work in seen.items() if at_work] == [4, 5]
    assert seen["evaluation 1"] is False  # step 5 ends before it


def test_what_lies_between_two_recorded_steps_is_recorded(tmp_path):
    seen = []
    profiler = ax.Profiler(tmp_path, steps=range(5, 7))
    loop = loop_of(profiler)
    loop.on("before_evaluate")(lambda state: seen.append(running()))
    loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert seen == [True, False]
    assert steps_of(profiler) == [[5, 6]]  # the end of the data is no step


def test_a_recording_that_begins_with_an_epoch_has_nothing_of_the_validation_before_it(tmp_path):
    seen = []
    profiler = ax.Profiler(tmp_path, steps=range(6, 8), warmup=2)
    loop = loop_of(profiler)
    loop.on("before_evaluate")(lambda state: seen.append(running()))
    loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert seen == [False, False]
    assert steps_of(profiler) == [[6, 7]]


def test_a_step_that_a_hook_has_left_out_ends_before_the_next(tmp_path):
    profiler = ax.Profiler(tmp_path, steps=range(2, 5))
    loop = loop_of(profiler)
    loop.on("before_batch")(lambda state: ax.StopEpoch("enough") if (state.epoch, state.step) == (0, 2) else None)
    loop.fit(TRAIN, epochs=2, batch_size=8)
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in read(profiler.files[0]) if e["name"].startswith(("step ", "data"))]
    assert named(profiler.files[0]) == [2, 3, 3, 4]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(sorted(spans)))


def test_the_end_of_data_of_no_known_length_is_no_step(tmp_path):
    batches = list(ax.Loader(TRAIN, 8))

    class Stream:
        def __iter__(self):
            return iter(batches)

    profiler = ax.Profiler(tmp_path, steps=range(4, 8))
    loop_of(profiler).fit(Stream(), epochs=2)
    assert steps_of(profiler) == [[4, 5, 6, 7]]
    assert named(profiler.files[0], "ProfilerStep#") == [4, 5, 6, 7]


def test_data_that_has_more_than_in_its_last_pass_is_recorded_by_its_steps(tmp_path):
    lengths = iter([3, 5])
    batches = list(ax.Loader(TRAIN, 8))

    def passes():
        yield from batches[: next(lengths)]

    class Growing:
        def __iter__(self):
            return passes()

    profiler = ax.Profiler(tmp_path, steps=range(6, 9))
    loop_of(profiler).fit(Growing(), epochs=2)
    assert steps_of(profiler) == [[6, 7, 8]]


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress": True},
        {"record_shapes": True},
        {"profile_memory": True},
        {"record_shapes": True, "profile_memory": True, "compress": True},
    ],
    ids=str,
)
def test_a_file_is_a_trace(tmp_path, options):
    profiler = ax.Profiler(tmp_path, steps=range(4, 7), **options)
    loop_of(profiler).fit(TRAIN, TEST, epochs=2, batch_size=8)
    (path,) = profiler.files
    assert path.name == ("step-000000004.json.gz" if "compress" in options else "step-000000004.json")
    events = read(path)
    tracks = defaultdict(list)
    for event in events:
        assert event["ph"] in "XiMsf", event
        assert {"name", "ph", "ts", "pid", "tid"} <= event.keys(), event
        assert isinstance(event["ts"], (int, float))
        if event["ph"] == "X" and event["cat"] != "Trace":
            assert event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    # Perfetto drops what overlaps what it does not lie within.
    for of_track in tracks.values():
        around = []
        for begin, end, name in sorted(of_track, key=lambda event: (event[0], -event[1])):
            while around and around[-1][0] <= begin:
                around.pop()
            assert not around or end <= around[-1][0] + 0.002, (name, around[-1])  # in µs, rounded to thousandths
            around.append((end, name))
    names = {event["name"] for event in events}
    assert {"aten::addmm", "data", "step 5"} <= names
    assert any("AddmmBackward" in name for name in names)
    assert ("[memory]" in names) == ("profile_memory" in options)
    shapes = [e["args"]["Input Dims"] for e in events if "Input Dims" in e.get("args", {})]
    assert bool(shapes) == ("record_shapes" in options)


def test_a_step_has_its_operations_within_it_and_its_data_before_it(tmp_path):
    profiler = ax.Profiler(tmp_path, steps=range(4, 6))
    loop_of(profiler).fit(TRAIN, epochs=1, batch_size=8)
    events = [e for e in read(profiler.files[0]) if e["ph"] == "X"]
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "user_annotation" and e["name"] != "data"}
    data = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "data")
    assert len(data) == 2
    for number, of_step in zip((4, 5), data, strict=True):
        begin, end = spans[f"step {number}"]
        outer = spans[f"ProfilerStep#{number}"]
        assert outer[0] <= of_step[0] <= of_step[1] <= begin <= end <= outer[1]
        within = {e["name"] for e in events if begin <= e["ts"] <= end}
        assert {"aten::addmm", "aten::native_batch_norm"} <= within
        assert any("Backward" in name for name in within)
        assert any("adamw" in name for name in within)


def test_without_a_directory_of_its_own_it_writes_into_that_of_the_run(tmp_path):
    profiler = ax.Profiler(steps=range(2, 4))
    loop_of(profiler, directory=tmp_path / "run").fit(TRAIN, epochs=1, batch_size=8)
    assert profiler.files == [tmp_path / "run" / "profile" / "step-000000002.json"]
    again = loop_of(ax.Profiler(steps=range(7, 8)), directory=tmp_path / "run", start=1)
    again.fit(TRAIN, epochs=2, batch_size=8, resume=True)  # what lies there does not stand in the way
    names = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert names == ["step-000000002.json", "step-000000007.json"]


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path):
    where = tmp_path / "traces"
    profiler = ax.Profiler(where, steps=range(3, 5))
    loop = loop_of(profiler)
    loop.on("after_batch")(lambda state: where.rmdir() if state.step == 3 else None)
    with pytest.warns(ax.AxonWarning, match=r"step-000000003.json could not be written"):
        result = loop.fit(TRAIN, epochs=1, batch_size=8)
    assert (result.status, profiler.files, running()) == ("completed", [], False)


# --- the ends of a fit ------------------------------------------------------------------------------------------------


def stop(state):
    return ax.Stop("enough")


def press(state):
    signal.raise_signal(signal.SIGINT)


def press_again(state):
    raise KeyboardInterrupt


def fail(state):
    raise ValueError("broken")


@pytest.mark.parametrize("hook", ["after_batch", "after_backward", "before_batch"])
@pytest.mark.parametrize("act", [stop, press, press_again, fail])
def test_what_ends_a_fit_within_a_recording_leaves_the_trace_so_far(tmp_path, hook, act):
    profiler = ax.Profiler(tmp_path, steps=range(3, 9))
    loop = loop_of(profiler)
    loop.on(hook, every=lambda state: state.step == 4, first=1)(act)
    if act in (stop, press):
        status = loop.fit(TRAIN, epochs=2, batch_size=8).status
        assert status == ("stopped" if act is stop else "interrupted")
    else:
        with pytest.raises((KeyboardInterrupt, ValueError)):
            loop.fit(TRAIN, epochs=2, batch_size=8)
    assert not running()
    assert steps_of(profiler) == [[3, 4] if hook == "after_batch" else [3, 4, 5]]
    profiler.files.clear()
    done = loop.state.step
    loop.fit(TRAIN, steps=2, batch_size=8)  # another fit goes on within the steps
    assert not running()
    assert steps_of(profiler) == [[done + 1, done + 2]]


def test_a_fit_that_ends_within_the_warm_up_says_that_nothing_was_recorded(tmp_path):
    loop = loop_of(ax.Profiler(tmp_path, steps=range(6, 8), warmup=2))
    with pytest.warns(ax.AxonWarning, match="recorded nothing: the fit ended at step 5, before step 6"):
        loop.fit(TRAIN, epochs=1, batch_size=8)
    assert not running()
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(ax.AxonWarning, match="recorded nothing: the fit ended at step 5, before a recording was due"):
        loop_of(ax.Profiler(tmp_path)).fit(TRAIN, epochs=1, batch_size=8)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000006.json"]


def test_a_second_fit_records_again(tmp_path):
    profiler = ax.Profiler(tmp_path, every=5, steps=1)
    loop = loop_of(profiler)
    loop.fit(TRAIN, steps=8, batch_size=8)
    loop.fit(TRAIN, steps=8, batch_size=8)
    assert steps_of(profiler) == [[7], [12]]


def test_a_loop_over_steps_is_recorded_and_left_early(tmp_path):
    profiler = ax.Profiler(tmp_path, steps=range(3, 9))
    loop = loop_of(profiler)
    assert len(list(itertools.islice(loop.steps(TRAIN, epochs=2, batch_size=8), 4))) == 4
    assert not running()
    assert steps_of(profiler) == [[3, 4]]
    profiler = ax.Profiler(tmp_path / "all", steps=range(3, 5))
    loop = loop_of(profiler)
    at_work = [running() for _ in loop.steps(TRAIN, epochs=1, batch_size=8)]
    assert at_work == [False, False, True, False, False]
    assert steps_of(profiler) == [[3, 4]]


@pytest.mark.parametrize("stopped", [3, 6, 7])
def test_a_run_that_is_resumed_goes_on_by_the_cadence(tmp_path, stopped):
    def profiled(where):
        return ax.Profiler(tmp_path / where, every=5, steps=1, warmup=0)

    whole = loop_of(profiled("whole"))
    whole.fit(TRAIN, epochs=3, batch_size=8)
    first = loop_of(profiled("first"), directory=tmp_path / "run")
    steps = first.steps(TRAIN, epochs=3, batch_size=8)
    for _ in range(stopped):
        next(steps)
    steps.close()
    again = loop_of(profiled("again"), directory=tmp_path / "run", start=1)
    again.fit(TRAIN, epochs=3, batch_size=8, resume=True)
    steps = [steps_of(loop.callbacks[0]) for loop in (whole, first, again)]
    assert steps[0] == [[6], [11]]
    assert steps[1] + steps[2] == [[6], [11]]
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name]), name


@pytest.mark.parametrize("options", [{}, {"record_shapes": True, "profile_memory": True}])
def test_training_is_bitwise_the_same(tmp_path, options):
    plain, profiled = loop_of(), loop_of(ax.Profiler(tmp_path, every=3, steps=2, **options))
    results = [loop.fit(TRAIN, TEST, epochs=3, batch_size=8) for loop in (plain, profiled)]
    assert results[0].history == results[1].history
    for name, value in plain.objective.state_dict().items():
        assert torch.equal(value, profiled.objective.state_dict()[name]), name
    assert torch.equal(plain.save()["rng"]["torch"], profiled.save()["rng"]["torch"])


def test_no_frame_lies_between_fit_and_backward_for_it(tmp_path, monkeypatch):
    loop = loop_of(ax.Profiler(tmp_path, steps=range(2, 4)), ax.Throughput(peak=None))
    seen = watched(monkeypatch)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    assert seen == [["__call__", "_algorithm", "fit"]] * 5


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_two_at_once_are_an_error_and_neither_is_left_at_work(tmp_path):
    one, other = ax.Profiler(tmp_path, steps=range(2, 3)), ax.Profiler(tmp_path, steps=range(4, 5))
    with pytest.raises(ax.ConfigurationError, match=r"range\(4, 5\)\) and Profiler\(steps=range\(2, 3\)\) at once"):
        loop_of(one, other).fit(TRAIN, epochs=1, batch_size=8)
    loop_of(other).fit(TRAIN, epochs=1, batch_size=8)
    assert steps_of(other) == [[4]]


def test_a_fit_within_a_fit_is_an_error_if_both_are_profiled(tmp_path):
    outer = loop_of(ax.Profiler(tmp_path / "outer", steps=range(1, 3)))

    @outer.on("after_batch", first=1)
    def fit_another(state):
        with pytest.raises(ax.ConfigurationError, match="at once"):
            loop_of(ax.Profiler(tmp_path / "inner", steps=range(1, 3))).fit(TRAIN, epochs=1, batch_size=8)
        loop_of().fit(TRAIN, epochs=1, batch_size=8)

    outer.fit(TRAIN, epochs=1, batch_size=8)
    assert steps_of(outer.callbacks[0]) == [[1, 2]]


def users():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def test_within_a_profiler_of_the_users_own_it_is_an_error(tmp_path):
    loop = loop_of(ax.Profiler(tmp_path, steps=range(4, 5)))
    with users() as own:
        with pytest.raises(ax.ConfigurationError, match=r"within a torch.profiler that is recording"):
            loop.fit(TRAIN, epochs=1, batch_size=8)
        torch.ones(3).cumsum(0)
    assert loop.state.step == 0
    assert "aten::cumsum" in {event.name for event in own.events()}, "theirs goes on"
    assert list(tmp_path.iterdir()) == []


def test_a_profiler_that_the_user_begins_meanwhile_is_an_error_when_the_steps_come(tmp_path):
    loop, own = loop_of(ax.Profiler(tmp_path, steps=range(3, 5))), users()
    loop.on("after_batch", first=1)(lambda state: own.start())
    try:
        with pytest.raises(ax.ConfigurationError, match=r"within a torch.profiler that is recording"):
            loop.fit(TRAIN, epochs=1, batch_size=8)
    finally:
        own.stop()
    assert loop.state.step == 1


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_without_anywhere_to_write_to_it_is_an_error():
    with pytest.raises(ax.ConfigurationError, match=r"nowhere to write to: ax.Profiler\('traces', ...\), or ax.Loop"):
        loop_of(ax.Profiler()).fit(TRAIN, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop_of().fit(TRAIN, epochs=1, batch_size=8)


def test_a_file_in_the_directorys_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ax.ConfigurationError, match=r"cannot write to .*file"):
        loop_of(ax.Profiler(tmp_path / "file")).fit(TRAIN, epochs=1)
    assert module.Profiler._at_work is None or module.Profiler._at_work() is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "steps=0: a whole number of steps, 1 or more"),
        ({"steps": range(3, 3)}, "steps in a row"),
        ({"steps": range(0, 3)}, "from 1 on"),
        ({"steps": range(1, 9, 2)}, "steps in a row"),
        ({"steps": (100, 103)}, r"as range\(100, 103\)"),
        ({"steps": range(1, 3), "every": 10}, "so does every="),
        ({"warmup": -1}, "warmup=-1"),
        ({"record_shapes": 1}, "record_shapes=1: True or False"),
        ({"compress": "gz"}, "compress='gz'"),
        ({"directory": 3}, "directory=3"),
        ({"active": 3}, "unknown option of Profiler.__init__: 'active'"),
        ({"every": "3"}, "has no unit"),
    ],
    ids=str,
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        ax.Profiler(**options)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)")
def test_on_a_gpu_its_kernels_are_in_the_trace(tmp_path):
    profiler = ax.Profiler(tmp_path, steps=range(4, 6))
    loop_of(profiler).fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert steps_of(profiler) == [[4, 5]]
    assert any(event.get("cat") == "kernel" for event in read(profiler.files[0]))
