"""Throughput: what its readings count and leave out, by a clock that stands still unless something says that it takes time."""

import contextlib
import copy
import gc
import itertools
import math
import re
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from host_reads import NoHostReads
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import axontrain as ax
from axontrain import callback
from axontrain.execution import peaks, run, stopwatch


def table(n=40, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


TRAIN, TEST = table(), table(12, seed=1)  # five steps an epoch, of 8
PEAK = 1e9


class Clock:
    """In place of the time: it goes on only where it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter", clock)
    return clock


class Timed(ax.Objective):
    """Its steps take as long as they are told to."""

    def __init__(self, train=lambda: None, evaluate=lambda: None):
        super().__init__()
        self.net = nn.Linear(6, 2)
        self.train_takes, self.evaluate_takes = train, evaluate

    def train_step(self, batch):
        self.train_takes()
        return super().train_step(batch)

    def eval_step(self, batch):
        self.evaluate_takes()
        return super().eval_step(batch)

    def predict(self, inputs):
        return self.net(inputs)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Reading:
    """Batches that take their time to be read."""

    def __init__(self, takes, data=TRAIN, batch_size=8):
        self.takes, self.loader = takes, ax.Loader(data, batch_size)

    def __iter__(self):
        for batch in self.loader:
            self.takes()
            yield batch


def loop_of(*callbacks, objective=None, directory=None, **options):
    torch.manual_seed(0)
    return ax.Loop(
        Timed() if objective is None else objective() if isinstance(objective, type) else objective,
        ax.Optimizer("sgd", lr=0.05),
        callbacks=list(callbacks),
        progress=False,
        directory=directory,
        **options,
    )


def readings(loop, name):
    return [row[f"throughput/{name}"] for row in loop.state.history if f"throughput/{name}" in row]


def at(loop):
    return [row["step"] for row in loop.state.history if "throughput/steps_per_second" in row]


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [None, PEAK])
def test_rates_are_of_the_time_of_training(clock, peak):
    throughput = ax.Throughput(peak=peak)  # to count FLOPs takes a step's time, which is none of training's
    objective = Timed(lambda: clock.takes(0.3), lambda: clock.takes(100.0))
    loop = loop_of(throughput, objective=objective)
    data = Reading(lambda: clock.takes(0.1), table(36))  # the last batch has four
    result = loop.fit(data, TEST, epochs=2)
    assert at(loop) == [5, 10]
    for epoch in range(2):
        assert readings(loop, "steps_per_second")[epoch] == pytest.approx(2.5)
        assert readings(loop, "samples_per_second")[epoch] == pytest.approx(36 / 2.0)
        assert readings(loop, "data_wait")[epoch] == pytest.approx(0.25)
    names = {name for name in result.values if name.startswith("throughput/")}
    assert names == {
        "throughput/steps_per_second", "throughput/samples_per_second", "throughput/data_wait", "throughput/peak_memory",
        *(["throughput/mfu"] if peak else []),
    }  # fmt: skip
    assert type(result.values["throughput/peak_memory"]) is int
    assert result.values["throughput/peak_memory"] > 2**20


def test_what_lies_between_two_steps_is_left_out(clock, tmp_path):
    """Validation within an epoch, readings, saving, hooks that come later, and the caller of ``loop.steps``."""
    throughput = ax.Throughput(peak=None)
    objective = Timed(lambda: clock.takes(0.5), lambda: clock.takes(100.0))
    loop = loop_of(throughput, ax.Checkpoint(every=1), objective=objective, directory=tmp_path)
    for hook in ("after_batch", "before_evaluate", "after_evaluate", "after_epoch", "before_epoch"):
        loop.on(hook)(lambda state: clock.takes(10.0))
    read, saved = loop.state.read, loop.state.live
    loop.state.read = lambda **options: clock.takes(10.0) or read(**options)
    loop.state.live = lambda: clock.takes(10.0) or saved()
    for _ in loop.steps(TRAIN, TEST, epochs=2, batch_size=8, validate=2):
        clock.takes(10.0)
    assert clock.now > 500
    assert readings(loop, "steps_per_second") == [pytest.approx(2.0)] * 2
    assert readings(loop, "data_wait") == [0.0, 0.0]


def test_hooks_within_a_step_are_counted_and_so_are_callbacks_that_come_before(clock):
    class Before(ax.Callback):
        def before_batch(self, state):
            clock.takes(1.0)

        def after_batch(self, state):
            clock.takes(2.0)

    loop = loop_of(Before(), ax.Throughput(peak=None))
    loop.on("after_backward")(lambda state: clock.takes(1.0))
    loop.fit(TRAIN, epochs=1, batch_size=8)
    assert readings(loop, "steps_per_second") == [pytest.approx(0.25)]


@pytest.mark.parametrize("first", ["throughput", "profiler"])
def test_what_a_profiler_does_is_no_time_of_training_wherever_it_stands(clock, tmp_path, monkeypatch, first):
    begin, finish = ax.Profiler._begin, ax.Profiler._finish
    monkeypatch.setattr(ax.Profiler, "_begin", lambda *args: clock.takes(100.0) or begin(*args))
    monkeypatch.setattr(ax.Profiler, "_finish", lambda *args: clock.takes(100.0) or finish(*args))
    profiler = ax.Profiler(tmp_path, steps=range(2, 4), warmup=0)
    callbacks = [ax.Throughput(peak=None, every=5), profiler]
    loop = loop_of(*(callbacks if first == "throughput" else callbacks[::-1]), objective=Timed(lambda: clock.takes(0.3)))
    loop.fit(Reading(lambda: clock.takes(0.1)), epochs=1)
    assert clock.now > 200
    assert len(profiler.files) == 1
    assert readings(loop, "steps_per_second") == [pytest.approx(2.5)]
    assert readings(loop, "data_wait") == [pytest.approx(0.25)]


def test_other_callbacks_act_in_the_order_of_the_list(tmp_path):
    class Named(ax.Callback):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def after_fit(self, state):
            seen.append(self.name)

    class TakesTime(Named, callback.Reader):
        takes_time = True

        def reading(self, batches, state):
            return batches

    class Quick(TakesTime):
        takes_time = False

    seen = []
    given = [Named("a"), TakesTime("slow"), Named("b"), Quick("quick"), Named("c"), TakesTime("later")]
    loop_of(*given).fit(TRAIN, epochs=1)
    assert seen == ["a", "b", "quick", "slow", "c", "later"]


def test_it_says_what_it_was_made_with():
    assert repr(ax.Throughput()) == "Throughput()"
    assert repr(ax.Throughput(tokens=len, flops=2e9, every="2 epochs")) == (
        "Throughput(every=Every('2 epochs'), tokens=len, flops=2000000000.0)"
    )
    assert repr(ax.Throughput(peak=None)) == "Throughput(peak=None)"


def test_the_wait_for_the_end_of_the_data_is_one_too(clock):
    class Ending(Reading):
        def __iter__(self):
            yield from super().__iter__()
            clock.takes(1.0)

    loop = loop_of(ax.Throughput(peak=None), objective=Timed(lambda: clock.takes(0.2)))
    loop.fit(Ending(lambda: None), epochs=1)
    assert readings(loop, "data_wait") == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        ({}, [5, 10, 12]),  # the rest of an epoch that a limit has ended too
        ({"every": 4}, [4, 8, 12]),
        ({"every": 5}, [5, 10]),
        ({"every": 4, "first": 2}, [4, 8]),
        ({"every": "2 epochs"}, [10]),
        ({"every": 2, "after": 6, "before": 11}, [6, 8, 10]),
    ],
    ids=str,
)
def test_it_reads_when_it_is_told_to_of_the_steps_since(clock, cadence, steps):
    loop = loop_of(ax.Throughput(peak=None, **cadence))
    loop.on("before_batch")(lambda state: clock.takes(float(state.step + 1)))  # a step takes as long as its number
    loop.fit(TRAIN, steps=12, batch_size=8)
    assert at(loop) == steps
    for (begin, end), rate in zip(itertools.pairwise([0, *steps]), readings(loop, "steps_per_second"), strict=True):
        assert rate == pytest.approx((end - begin) / sum(range(begin + 1, end + 1)))


def test_several_fits_are_apart(clock):
    throughput = ax.Throughput(peak=None, every=4)
    loop = loop_of(throughput, objective=Timed(lambda: clock.takes(1.0)))
    loop.fit(TRAIN, steps=6, batch_size=8)
    clock.takes(1000.0)
    loop.fit(TRAIN, steps=6, batch_size=8)
    assert at(loop) == [4, 8, 12]
    assert readings(loop, "steps_per_second") == [pytest.approx(1.0)] * 3
    assert readings(loop, "samples_per_second") == [pytest.approx(8.0)] * 3
    other = loop_of(throughput, objective=Timed(lambda: clock.takes(0.5)))  # with the same callback
    other.fit(TRAIN, steps=4, batch_size=8)
    assert readings(other, "steps_per_second") == [pytest.approx(2.0)]


def test_a_batch_that_a_hook_leaves_out_is_none(clock):
    loop = loop_of(ax.Throughput(peak=None), objective=Timed(lambda: clock.takes(1.0)))
    loop.on("before_batch")(lambda state: ax.Stop("enough") if state.step == 3 else None)
    loop.fit(Reading(lambda: clock.takes(1.0)), epochs=1)
    assert at(loop) == [3]
    assert readings(loop, "steps_per_second") == [pytest.approx(0.5)]


def test_an_error_leaves_no_reading(clock):
    loop = loop_of(ax.Throughput(peak=None), objective=Timed(lambda: clock.takes(1.0)))
    loop.on("before_batch")(lambda state: 1 / 0 if state.step == 3 else None)
    with pytest.raises(ZeroDivisionError):
        loop.fit(TRAIN, epochs=1, batch_size=8)
    assert at(loop) == []


@pytest.mark.parametrize("data_is_slow", [True, False])
def test_on_the_clock_of_this_machine(data_is_slow):
    """Sleeps of 20 ms: either the data or the model has all of them."""

    def sleep():
        time.sleep(0.02)

    loop = loop_of(ax.Throughput(peak=None), objective=Timed(evaluate=sleep) if data_is_slow else Timed(sleep, sleep))
    begun = time.perf_counter()
    loop.fit(Reading(sleep) if data_is_slow else TRAIN, TEST, epochs=4, batch_size=8)
    seconds = sum(5 / rate for rate in readings(loop, "steps_per_second"))
    assert 0.4 <= seconds <= time.perf_counter() - begun - 4 * 0.04  # which are the validations'
    waits = readings(loop, "data_wait")  # of four, in case that the machine was busy meanwhile
    assert max(waits) > 0.5 if data_is_slow else min(waits) < 0.5


# --- a device that the host is ahead of -------------------------------------------------------------------------------


class Device:
    """A device that works off what it is given, while the host goes on; and the events in its stream."""

    def __init__(self, clock):
        self.clock, self.free, self.waits = clock, 0.0, 0

    def works(self, seconds):
        self.free = max(self.free, self.clock.now) + seconds

    def event(self, device, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self, stream):
        assert stream == "current"
        self.time = max(self.device.free, self.device.clock.now)

    def query(self):
        return self.time <= self.device.clock.now

    def synchronize(self):
        self.device.waits += 1
        self.device.clock.now = max(self.device.clock.now, self.time)

    def elapsed_time(self, other):
        assert other.query(), "the device has not come to it"
        return (other.time - self.time) * 1e3


@pytest.fixture
def device(clock, monkeypatch):
    device = Device(clock)
    monkeypatch.setattr(torch, "Event", device.event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: "current")
    monkeypatch.setattr("axontrain.callbacks.throughput._device_of", lambda state: torch.device("meta"))
    return device


def test_on_a_device_the_time_is_the_devices(clock, device):
    """The host gives the device a second of work each hundredth of a second."""

    def step():
        clock.takes(0.01)
        device.works(1.0)

    loop = loop_of(ax.Throughput(peak=None), objective=Timed(step, lambda: device.works(100.0)))
    waited = []
    loop.on("after_batch")(lambda state: waited.append(device.waits))
    loop.fit(Reading(lambda: clock.takes(0.01)), TEST, epochs=2)
    assert readings(loop, "steps_per_second") == [pytest.approx(1.0, rel=0.02)] * 2
    assert readings(loop, "data_wait")[0] < 0.02, "the device is busy while the host reads"
    assert waited == [0] * 5 + [1] * 5, "it waits once a reading"


def test_on_a_device_a_reading_within_an_epoch_is_recorded_for_its_step_when_it_has_arrived(clock, device):
    """Nobody waits for it but the end of an epoch."""
    waits, there = {}, {}
    loop = loop_of(
        ax.Throughput(peak=None, every=4, tokens=lambda batch: 3), objective=Timed(lambda: device.works(1.0)), metrics=None
    )

    @loop.on("after_batch")
    def look(state):
        waits[state.step], there[state.step] = device.waits, at(loop)
        if state.step == 6:
            state.record({"mine": 1.0})
            clock.takes(5.0)  # the device is through with the fifth

    loop.fit(table(8 * 14), epochs=1, batch_size=8)
    assert [there[step] for step in (4, 5, 6, 7, 14)] == [[], [], [], [4], [4]]
    assert waits[14] == 0
    assert device.waits == 2  # for the second and the third
    assert at(loop) == [4, 8, 12]
    assert [row["step"] for row in loop.state.history] == [4, 6, 8, 12, 14]
    assert readings(loop, "steps_per_second") == [pytest.approx(1.0)] * 3
    assert readings(loop, "tokens_per_second") == [pytest.approx(3.0)] * 3


def test_on_a_device_so_many_readings_may_be_on_their_way(clock, device, monkeypatch):
    monkeypatch.setattr("axontrain.callbacks.throughput.MOST_LATER", 3)
    waits = {}
    loop = loop_of(ax.Throughput(peak=None, every=1), objective=Timed(lambda: device.works(1.0)), metrics=None)
    loop.on("after_batch")(lambda state: waits.update({state.step: device.waits}))
    loop.fit(table(8 * 6), epochs=1, batch_size=8)
    assert waits == {1: 0, 2: 0, 3: 0, 4: 1, 5: 2, 6: 3}
    assert at(loop) == [1, 2, 3, 4, 5, 6]


def test_on_a_device_an_error_drops_a_reading_and_a_fit_that_ends_takes_it(clock, device):
    def fitted(fail):
        throughput = ax.Throughput(peak=None, every=4)
        loop = loop_of(throughput, objective=Timed(lambda: device.works(1.0)))

        @loop.on("after_batch")
        def look(state):
            if fail and state.step == 5:
                raise ArithmeticError

        with pytest.raises(ArithmeticError) if fail else contextlib.nullcontext():
            loop.fit(TRAIN, steps=5, batch_size=8)
        waits = device.waits
        if fail:
            loop.fit(TRAIN, steps=2, batch_size=8)  # nothing of what was before
            assert device.waits == waits
        return loop

    assert "throughput/steps_per_second" not in fitted(True).state.values
    assert at(fitted(False)) == [4]


def test_on_a_device_that_is_idle_waiting_for_data_is_seen(clock, device):
    def read():
        clock.takes(3.0)

    loop = loop_of(ax.Throughput(peak=None), objective=Timed(lambda: device.works(1.0)))
    for _ in loop.steps(Reading(read), TEST, epochs=1):
        clock.takes(50.0)  # the caller
    # A step is done while the caller takes his time, and the device then waits for all of the reading.
    assert readings(loop, "data_wait") == [pytest.approx(0.75)]
    assert readings(loop, "steps_per_second") == [pytest.approx(0.25)]


def test_spans_that_a_device_has_passed_are_not_kept(clock, device):
    watch = stopwatch.Stopwatch(torch.device("meta"))
    for _ in range(100):
        begin = watch.mark()
        device.works(1.0)
        watch.add("work", begin, watch.mark())
        clock.takes(0.5 if clock.now < 10 else 2.0)
    assert len(watch._waiting) < 5
    assert device.waits == 0
    assert watch.read() == {"work": pytest.approx(100.0)}
    assert watch.read() == {}


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def by_hand(objective, batch):
    with FlopCounterMode(display=False) as counter:
        objective.train_step(batch).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("net", "flops"),
    [
        # 2·a·b forward and as much for the weights; for the inputs only where something before it learns.
        (lambda: nn.Linear(6, 2), 4 * 6 * 2),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), 4 * 6 * 5 + 6 * 5 * 2),
        (lambda: nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Linear(5, 2)), 2 * 6 * 5 + 4 * 5 * 2),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2)), 4 * 6 * 5 + 6 * 5 * 2),
    ],
    ids=["one", "two", "frozen", "normed"],
)
def test_the_flops_of_linear_layers_are_those_of_the_formula(net, flops):
    throughput = ax.Throughput(peak=PEAK)
    loop = loop_of(throughput, objective=ax.Supervised(net(), "cross_entropy"))
    loop.fit(table(36), epochs=1, batch_size=8)  # the last batch has four
    assert throughput.flops_per_sample == {None: flops}
    rate = loop.state.values["throughput/samples_per_second"]
    assert loop.state.values["throughput/mfu"] == pytest.approx(flops * rate / PEAK)


class Attending(ax.Objective):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 2)

    def predict(self, x):  # (B, 6, 4)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(x, x, x)).mean(1)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("fit", [{}, {"microbatch": 3}, {"accumulate": 2}], ids=str)
def test_flops_are_those_that_are_dispatched(precision, fit):
    batch = (torch.randn(8, 6, 4), torch.randint(2, (8,)))
    expected = by_hand(Attending(), batch) / 8
    throughput = ax.Throughput(peak=PEAK)
    loop = loop_of(throughput, objective=Attending(), precision=precision)
    loop.fit([batch] * 4, epochs=1, **fit)
    assert throughput.flops_per_sample == {None: expected}
    assert expected > 6 * 6 * 8 * 2
    assert loop.state.values["throughput/samples_per_second"] == pytest.approx(
        loop.state.values["throughput/mfu"] * PEAK / expected
    )


class TwoNets(ax.Objective):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(3, 2)

    def train_step(self, batch):
        x, y = batch
        yield "one", self.one(x).square().mean()
        yield "other", F.cross_entropy(self.other(self.one(x)), y)

    def predict(self, x):
        return self.other(self.one(x))


def test_each_loss_of_a_generator_counts_for_the_parameters_of_its_optimizer():
    throughput = ax.Throughput(peak=PEAK)
    optimizers = {"one": ax.Optimizer("sgd", lr=0.1), "other": ax.Optimizer("sgd", lr=0.1)}
    loop = ax.Loop(TwoNets(), optimizers, callbacks=[throughput], progress=False)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    assert throughput.flops_per_sample == {None: 4 * 6 * 3 + 2 * 6 * 3 + 4 * 3 * 2}


def test_each_task_of_a_mixture_has_its_own():
    class Tasks(Timed):
        def predict(self, inputs):
            return self.net(inputs[..., :6])

        def train_step(self, batch):
            if batch.task == "twice":
                return ax.Step((self.net(batch[0]) + self.net(-batch[0])).square().mean(), weight=len(batch[0]))
            return super().train_step(batch)

    throughput = ax.Throughput(peak=PEAK)
    loop = loop_of(throughput, objective=Tasks())
    data = ax.Mixture({"once": TRAIN, "twice": TRAIN})
    loop.fit(data, epochs=1, batch_size=8)
    assert throughput.flops_per_sample == {"once": 48, "twice": 96}
    rate = loop.state.values["throughput/samples_per_second"]
    assert loop.state.values["throughput/mfu"] == pytest.approx(72 * rate / PEAK)


def test_compiled_parts_are_counted_as_they_are_uncompiled():
    runs = []

    def compiler(graph, examples):
        return lambda *inputs: runs.append(1) or graph(*inputs)

    net = nn.Sequential(torch.compile(nn.Linear(6, 5), backend=compiler), nn.ReLU(), nn.Linear(5, 2))
    throughput = ax.Throughput(peak=PEAK)
    loop_of(throughput, objective=ax.Supervised(net, "cross_entropy")).fit(TRAIN, epochs=1, batch_size=8)
    assert throughput.flops_per_sample == {None: 4 * 6 * 5 + 6 * 5 * 2}
    assert len(runs) == 5, "what is compiled is seen by nobody"


def test_where_memory_runs_out_fewer_samples_are_counted(capsys):
    class Hungry(Timed):
        def predict(self, inputs):
            if self is not loop.objective:  # but its copy
                print("tried", len(inputs))  # what it adds to a list here is put back
                if len(inputs) > 4:
                    raise torch.OutOfMemoryError("out of memory")
            return self.net(inputs)

    throughput = ax.Throughput(peak=PEAK)
    loop = loop_of(throughput, objective=Hungry())
    loop.fit(TRAIN, epochs=1, batch_size=16)
    assert throughput.flops_per_sample == {None: 48}
    assert re.findall(r"tried (\d+)", capsys.readouterr().out) == ["16", "8", "4"]


def test_the_copy_is_let_go_of_at_once(monkeypatch):
    """Without the garbage collector: until then a GPU would be short of so much memory."""
    copies, deepcopy = [], copy.deepcopy
    loop, alive = loop_of(ax.Throughput(peak=PEAK)), []

    def copied(value, *memo):
        made = deepcopy(value, *memo)
        if isinstance(made, Timed):
            copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(copy, "deepcopy", copied)

    @loop.on("before_batch", first=1)
    def look(state):
        alive.extend(ref() is not None for ref in copies)

    gc.disable()
    try:
        loop.fit(TRAIN, epochs=1, batch_size=8)
    finally:
        gc.enable()
    assert alive == [False]


class Noisy(Timed):
    """Draws, counts, and changes its batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.register_buffer("seen", torch.zeros(()))
        self.steps = 0

    def predict(self, inputs):
        self.seen += 1
        self.steps += 1
        inputs.mul_(1.5)
        return self.net(inputs + 0.1 * torch.randn_like(inputs))


@pytest.mark.parametrize("options", [{"peak": PEAK}, {"peak": PEAK, "every": 2}, {"peak": None}], ids=str)
def test_training_is_bitwise_the_same(options):
    plain, measured = loop_of(objective=Noisy), loop_of(ax.Throughput(**options), objective=Noisy)
    for loop in (plain, measured):
        loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    for name, value in plain.objective.state_dict().items():
        assert torch.equal(value, measured.objective.state_dict()[name]), name
    assert plain.objective.steps == measured.objective.steps
    assert torch.equal(plain.save()["rng"]["torch"], measured.save()["rng"]["torch"])
    rows = [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in measured.state.history]
    assert [row for row in rows if len(row) > 2] == list(plain.state.history)


@pytest.mark.parametrize("step", [3, 5, 7])
@pytest.mark.parametrize("every", [None, 4])
def test_a_run_that_is_resumed_ends_bitwise_and_reads_at_the_same_steps(clock, tmp_path, step, every):
    def made(directory=None):
        return loop_of(ax.Throughput(peak=PEAK, every=every), objective=Noisy, directory=directory)

    whole = made()
    whole.on("before_batch")(lambda state: clock.takes(1.0))
    whole.fit(TRAIN, epochs=3, batch_size=8)
    first = made(tmp_path)
    first.on("before_batch")(lambda state: clock.takes(1.0))
    steps = first.steps(TRAIN, epochs=3, batch_size=8)
    for _ in range(step):
        next(steps)
    steps.close()
    again = made(tmp_path)
    again.on("before_batch")(lambda state: clock.takes(0.5))
    again.fit(TRAIN, epochs=3, batch_size=8, resume=True)
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name]), name
    # An epoch's end that comes before any step has nothing to read; all other readings are taken where they would have been.
    assert at(again) == [number for number in at(whole) if (number, every) != (step, None)]
    rates = dict(zip(at(again), readings(again, "steps_per_second"), strict=True))
    assert {number: rate for number, rate in rates.items() if number > step} == {
        number: pytest.approx(2.0) for number in at(whole) if number > step
    }


# --- the peak ---------------------------------------------------------------------------------------------------------


def test_where_the_peak_is_not_known_it_is_told_once_and_there_is_no_mfu():
    throughput = ax.Throughput()
    loop = loop_of(throughput)
    with pytest.warns(ax.AxonWarning, match=r"this device \(cpu\) can do in fp32 is not known.*peak=") as told:
        loop.fit(TRAIN, epochs=1, batch_size=8)
    assert len(told) == 1
    result = loop.fit(TRAIN, epochs=1, batch_size=8)
    assert "throughput/mfu" not in result.values
    assert throughput.flops_per_sample == {}, "nothing is counted that nobody asks for"


def test_a_peak_is_looked_up_by_name_and_precision(monkeypatch):
    asked = []
    monkeypatch.setattr("axontrain.callbacks.throughput.peak_of", lambda name, kind: asked.append(kind) or 1e12)
    for precision in ("fp32", "bf16", "fp64", "bf16-true"):
        loop = loop_of(ax.Throughput(), precision=precision)
        result = loop.fit(TRAIN, epochs=1, batch_size=8)
        assert result.values["throughput/mfu"] == pytest.approx(48 * 8 * result.values["throughput/steps_per_second"] / 1e12)
    assert asked == ["fp32", "half", "fp64", "half"]


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "half", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9e12),
        ("NVIDIA H100 PCIe", "tf32", 378e12),
        ("NVIDIA H100 NVL", "half", 835.5e12),
        ("NVIDIA H200", "half", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", "half", 312e12),
        ("NVIDIA A100 80GB PCIe", "fp64", 19.5e12),
        ("NVIDIA A10", "fp32", 31.2e12),
        ("NVIDIA L4", "half", 121e12),
        ("NVIDIA L40S", "half", 362e12),
        ("Tesla V100-SXM2-32GB", "half", 125e12),
        ("Tesla V100-PCIE-16GB", "half", 112e12),
        ("Tesla T4", "half", 65e12),
        ("Tesla T4", "tf32", None),
        ("NVIDIA GeForce RTX 4090", "half", 165.2e12),
        ("NVIDIA GeForce RTX 3090", "fp32", 35.6e12),
        # Others, whose names begin alike.
        ("NVIDIA A10G", "half", None),
        ("NVIDIA L40", "half", None),
        ("NVIDIA GeForce RTX 3090 Ti", "half", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "half", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "half", None),
        ("AMD Instinct MI300X", "half", None),
    ],
)
def test_the_table_knows_a_device_by_its_whole_name(name, kind, peak):
    found = peaks.peak_of(name, kind)
    assert found is None if peak is None else found == pytest.approx(peak)


def test_float32_is_tf32_where_torch_was_told_so():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert peaks.kind_of_numbers("fp32", nn.Linear(2, 2)) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert peaks.kind_of_numbers("fp32", nn.Linear(2, 2)) == "fp32"
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(9, 9).bfloat16())
    assert peaks.kind_of_numbers("fp32", mixed) == "half"
    assert peaks.kind_of_numbers("fp8", mixed) == "fp8"


@pytest.mark.parametrize("name", ["lbfgs", "sam"])
@pytest.mark.parametrize("microbatch", [None, 4])
def test_each_evaluation_of_the_loss_counts(clock, name, microbatch):
    class SAM(torch.optim.SGD):
        """Evaluates twice: where it is, and a step further on."""

        def step(self, closure):
            closure()
            super().step()
            closure()
            super().step()

    samples = []

    class Counting(Timed):
        def train_step(self, batch):
            samples.append(len(batch[0]))
            clock.takes(0.5)
            return super().train_step(batch)

    optimizer = {"lbfgs": ax.Optimizer("lbfgs", lr=0.1, max_iter=4), "sam": ax.Optimizer(SAM, lr=0.1, closure=True)}[name]
    torch.manual_seed(0)
    loop = ax.Loop(Counting(), optimizer, callbacks=[ax.Throughput(flops=1000.0, peak=PEAK)], device="cpu", progress=False)
    for _ in range(2):
        samples.clear()
        result = loop.fit(TRAIN, epochs=1, batch_size=8, microbatch=microbatch)
        assert sum(samples) > 2 * len(TRAIN)
        assert result.values["throughput/mfu"] == pytest.approx(1000 * sum(samples) / (0.5 * len(samples)) / PEAK)


@pytest.mark.parametrize(
    ("flops", "of_batch"),
    [(1000.0, lambda size: 1000.0 * size), (lambda batch: 10.0 * len(batch[0]) ** 2, lambda n: 10.0 * n**2)],
)
def test_flops_of_ones_own(clock, flops, of_batch):
    throughput = ax.Throughput(flops=flops, peak=PEAK)
    loop = loop_of(throughput, objective=Timed(lambda: clock.takes(0.5)))
    result = loop.fit(table(36), epochs=1, batch_size=8)
    assert result.values["throughput/mfu"] == pytest.approx((4 * of_batch(8) + of_batch(4)) / (5 * 0.5) / PEAK)
    assert throughput.flops_per_sample == {}


def test_flops_that_cannot_be_counted_are_told_and_training_goes_on():
    class Fussy(Timed):
        def predict(self, inputs):
            if self is not loop.objective:
                raise ValueError("not on a copy")
            return self.net(inputs)

    loop = loop_of(ax.Throughput(peak=PEAK), objective=Fussy())
    with pytest.warns(ax.AxonWarning, match=r"could not be counted.*ValueError: not on a copy.*flops=") as told:
        loop.fit(TRAIN, epochs=1, batch_size=8)
    assert len(told) == 1
    result = loop.fit(TRAIN, epochs=1, batch_size=8)
    assert result.status == "completed"
    assert "throughput/mfu" not in result.values
    assert result.values["throughput/steps_per_second"] > 0


def test_operations_that_nobody_knows_are_told():
    class Scaling(Timed):
        def predict(self, inputs):
            return inputs[:, :2] * self.net.weight[0, 0]

    loop = loop_of(ax.Throughput(peak=PEAK), objective=Scaling())
    with pytest.warns(ax.AxonWarning, match="none of the operations is one that torch's FlopCounterMode knows"):
        result = loop.fit(TRAIN, epochs=1, batch_size=8)
    assert "throughput/mfu" not in result.values


# --- tokens -----------------------------------------------------------------------------------------------------------


class Language(Timed):
    """Six tokens a sample, of which those above 0 count."""

    def __init__(self, on_device):
        super().__init__(lambda: None)
        self.on_device = on_device

    def weight(self, batch):
        count = (batch[0] > 0).sum()
        return count if self.on_device else int(count)


@pytest.mark.parametrize("fit", [{}, {"microbatch": 3}], ids=str)
@pytest.mark.parametrize("on_device", [True, False])
def test_tokens_are_what_the_objectives_own_weight_counts(clock, on_device, fit):
    loop = loop_of(ax.Throughput(peak=None), objective=Language(on_device))
    loop.on("before_batch")(lambda state: clock.takes(0.5))
    loop.fit(TRAIN, epochs=1, batch_size=8, **fit)
    count = int((TRAIN.tensors[0] > 0).sum())
    assert readings(loop, "tokens_per_second") == [pytest.approx(count / 2.5)]


@pytest.mark.parametrize("function", [lambda batch: batch[0].numel(), lambda batch: torch.tensor(batch[0].numel())])
def test_tokens_are_what_a_function_counts(clock, function):
    loop = loop_of(ax.Throughput(peak=None, tokens=function), objective=Language(True))
    loop.on("before_batch")(lambda state: clock.takes(0.5))
    loop.fit(TRAIN, epochs=2, batch_size=8)
    assert readings(loop, "tokens_per_second") == [pytest.approx(240 / 2.5)] * 2


@pytest.mark.parametrize("given", [1.5, "many", torch.ones(2), True], ids=str)
def test_a_function_that_counts_no_tokens_is_an_error(given):
    loop = loop_of(ax.Throughput(peak=None, tokens=lambda batch: given))
    with pytest.raises(ax.ConfigurationError, match=r"tokens= of a batch gave .*: an int, or a scalar tensor"):
        loop.fit(TRAIN, epochs=1, batch_size=8)


def test_a_function_that_tells_no_flops_is_an_error():
    loop = loop_of(ax.Throughput(peak=PEAK, flops=lambda batch: torch.ones(())))
    with pytest.raises(ax.ConfigurationError, match=r"flops= of a batch gave Tensor\(\) float32: a number"):
        loop.fit(TRAIN, epochs=1, batch_size=8)


@pytest.mark.parametrize("options", [{}, {"tokens": lambda batch: (batch[0] > 0).sum()}], ids=["weight", "function"])
def test_between_readings_nothing_is_read_from_the_device(monkeypatch, options):
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 1e9)
    throughput = ax.Throughput(peak=PEAK, every=10, **options)
    loop = loop_of(throughput, objective=Language(True))
    steps = loop.steps(list(ax.Loader(TRAIN, 8)), epochs=2)
    next(steps)  # in which FLOPs are counted
    with NoHostReads():
        for _ in range(3):
            next(steps)
    assert isinstance(throughput._tokens, torch.Tensor)
    assert len(list(steps)) == 6
    assert at(loop) == [10]


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokens": 3}, "tokens=int: a function of a batch"),
        ({"flops": "some"}, "unknown way to know FLOPs, flops = 'some': Known: counted. Else a number"),
        ({"flops": 0}, "flops=0: a number above 0"),
        ({"flops": True}, "flops=True: a number above 0"),
        ({"peak": "h100"}, "unknown peak = 'h100': Known: auto. Else a number"),
        ({"peak": -1.0}, "peak=-1.0: a number above 0"),
        ({"peak": math.inf}, "peak=inf: a number above 0"),
        ({"peak": math.nan}, "peak=nan: a number above 0"),
        ({"peak": [1]}, r"peak=\[1\]: a number above 0"),
        ({"peak": None, "flops": 1e9}, "flops= is for mfu"),
        ({"every": "3"}, "has no unit"),
        ({"token": len}, "unknown option of Throughput.__init__: 'token'"),
    ],
    ids=str,
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(ax.ConfigurationError, match=re.compile(told, re.DOTALL)):
        ax.Throughput(**options)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)")


def wide(*callbacks):
    """Weights are most of what it takes: a second copy of them would be seen."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
    return ax.Loop(ax.Supervised(net, "mse"), ax.Optimizer("sgd", lr=1e-3), callbacks=list(callbacks), progress=False)


def on_device(count=8):
    return [(torch.randn(16, 1024, device="cuda"), torch.randn(16, 1024, device="cuda")) for _ in range(count)]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_a_gpu_nothing_waits_between_readings(monkeypatch):
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 1e9)
    throughput = ax.Throughput(peak=1e15, every=6, tokens=lambda batch: (batch[0] > 0).sum())
    loop = wide(throughput)

    @loop.on("after_batch")
    def look(state):  # after step 2 until after step 5: three steps, and what lies between them
        torch.cuda.set_sync_debug_mode("error" if 2 <= state.step < 5 else "default")

    begun = time.perf_counter()
    try:
        loop.fit(on_device(), epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert at(loop) == [6]
    assert 0 < 6 / readings(loop, "steps_per_second")[0] < time.perf_counter() - begun
    assert 0 <= readings(loop, "data_wait")[0] <= 1
    assert readings(loop, "tokens_per_second")[0] > 0
    # Of the first layer's inputs nothing is learnt.
    assert throughput.flops_per_sample == {None: (8 * 6 - 2) * 1024**2}


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_the_time_is_that_of_its_work():
    """The host is through with its part long before the device is."""

    class Heavy(Timed):
        def train_step(self, batch):
            torch.cuda._sleep(20_000_000)  # cycles of the device
            return super().train_step(batch)

    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    loop = loop_of(ax.Throughput(peak=None), objective=Heavy())
    loop.on("before_batch")(lambda state: events[0].record() if state.step == 0 else None)
    loop.on("after_batch")(lambda state: events[1].record() if state.step == 5 else None)
    loop.fit(TRAIN.to("cuda"), TEST.to("cuda"), epochs=1, batch_size=8)
    torch.cuda.synchronize()
    assert 5 / readings(loop, "steps_per_second")[0] >= 0.9 * events[0].elapsed_time(events[1]) / 1e3


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_the_peak_of_memory_is_that_of_training():
    peaks_of = []
    for callbacks in ([], [ax.Throughput(peak=1e15)]):
        loop, batches = wide(*callbacks), on_device()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = loop.fit(batches, epochs=1)
        read = result.values.get("throughput/peak_memory", torch.cuda.max_memory_allocated())
        peaks_of.append(read - before)
        del loop, batches, result
        torch.cuda.empty_cache()
    weights = 8 * 4 * 1024**2
    assert peaks_of[0] > 0.9 * weights, "the gradients"
    assert abs(peaks_of[1] - peaks_of[0]) < 0.5 * weights, "the copy is not seen"


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_the_peak_is_looked_up_or_told():
    loop = wide(ax.Throughput())
    known = peaks.peak_of(torch.cuda.get_device_name(), "fp32")
    if known is None:
        with pytest.warns(ax.AxonWarning, match="is not known"):
            result = loop.fit(on_device(), epochs=1)
    else:
        result = loop.fit(on_device(), epochs=1)
    assert ("throughput/mfu" in result.values) == (known is not None)
