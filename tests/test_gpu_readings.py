"""On a GPU: with everything on, a whole fit makes no call that torch counts as one that waits for the device."""

import contextlib
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax
from axontrain.data.augment import Crop, Cutout, Flip
from axontrain.data.structure import to_device
from axontrain.execution import run
from axontrain.host import Fetch, item, on_cpu, pinned, placed, scalar
from axontrain.metrics.meter import Meter
from axontrain.objective import Step
from axontrain.readings import Later

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)"),
]


@contextlib.contextmanager
def refused():
    """Within it, torch raises where the host would wait for the device."""
    torch.ones(1, device="cuda").sum()  # what is made at first
    try:
        yield torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def prototype():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        yield


@pytest.fixture
def deterministic(monkeypatch):
    # Convolutions alone would differ from run to run. Not torch's own mode: some of what it puts in place of a kernel may wait.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def test_numbers_travel_without_a_wait_that_torch_counts():
    there = torch.arange(4.0, device="cuda")
    with refused():
        with pytest.raises(RuntimeError, match="synchronizing"):
            there.sum().item()  # or this test would show nothing
        fetch = Fetch([there, there > 1, 3])
        there.zero_()  # after it, in the order of the stream
        assert fetch.values() == [[0.0, 1.0, 2.0, 3.0], [False, False, True, True], 3]
        assert fetch.arrived()
        assert item(scalar(2, there.device) + placed(torch.tensor([3]), there.device)) == 5
        kept = on_cpu({"there": there, "here": torch.ones(2)})
        assert not kept["there"].is_pinned()
        assert [float(tensor.sum()) for tensor in kept.values()] == [0.0, 2.0]


@pytest.mark.parametrize("large", [False, True])
def test_metrics_are_read_without_a_wait(monkeypatch, large):
    """Of each built-in name but those that rank, with weights that are numbers, values on the CPU, and skipped steps."""
    if large:
        monkeypatch.setattr("axontrain.metrics.meter.SMALL_BYTES", 0)
    monkeypatch.setattr("axontrain.metrics.meter.FOLD", 4)
    of_classes = ["accuracy", "precision", "recall", "f1", "dice", "iou", "confusion_matrix", "top2", "perplexity"]
    of_numbers = ["mse", "rmse", "mae", "r2", "cosine_similarity"]

    def half(predictions, targets):
        return 0.5

    def recorded(device, names, made):
        meter = Meter({**{name: name for name in names}, "half": half})
        generator = torch.Generator().manual_seed(0)
        read = []
        for number in range(10):
            predictions, targets = (part.to(device) for part in made(generator))
            flag = torch.tensor(float(number in (1, 6)), device=device)
            with refused() if device == "cuda" else contextlib.nullcontext():
                values = {"mixed": 0.25 if number % 2 else flag}
                meter.record(Step(flag + number, predictions, targets, weight=5, values=values, skipped=flag))
                if number == 6:
                    later = Later(meter.reading())
        while not later.arrived():
            pass
        read.append(later.result())
        with refused() if device == "cuda" else contextlib.nullcontext():
            read += [meter.read(), meter.read(last=True)]
        return read

    for names, made in (
        (of_classes, lambda generator: (torch.randn(5, 3, generator=generator), torch.randint(3, (5,), generator=generator))),
        (of_numbers, lambda generator: (torch.randn(5, 2, generator=generator), torch.randn(5, 2, generator=generator))),
    ):
        for here, there in zip(recorded("cpu", names, made), recorded("cuda", names, made), strict=True):
            assert here.keys() == there.keys()
            for name, value in here.items():
                torch.testing.assert_close(torch.tensor(there[name]), torch.tensor(value), rtol=1e-5, atol=1e-6, msg=name)


class Images(ax.Objective):
    metrics = ("accuracy", "top2")

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 10)
        )

    def predict(self, images):
        return self.net(images)

    def loss(self, logits, labels):
        return {"match": F.cross_entropy(logits, labels), "size": 1e-4 * logits.square().mean()}


def right(logits, labels):
    return (logits.argmax(-1) == labels).float().mean()


def digits(where):
    for part in ax.data.digits():
        images, labels = part.gather(torch.arange(700 if len(part) > 700 else 150))
        yield ax.ArrayDataset(images.reshape(-1, 1, 8, 8).to(where), labels.to(where))


def fitted(where, *, strict, directory=None, callbacks=(), microbatch=None, every=None, guard=True, **options):
    """Three epochs with everything on; if ``strict``, no wait is allowed from the third step to the end of the fit."""
    torch.manual_seed(0)
    train, test = digits("cuda" if where == "cuda" else "cpu")
    if where == "batches":
        train, test = list(ax.Loader(train, 32)), list(ax.Loader(test, 32))
    else:
        train = ax.Loader(train, 32, shuffle=True, augment=[Crop(1), Flip(alternating=True), Cutout(2)])
    optimizer = ax.Optimizer(
        "adamw", lr=3e-3, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="5%"), average=ax.averages.ema(0.9)
    )
    loop = ax.Loop(
        Images(),
        optimizer,
        metrics={"right": right},
        device="cuda",
        progress=False,
        directory=directory,
        callbacks=[
            ax.ProgressBar("terminal", stream=io.StringIO()),
            ax.Throughput(tokens=lambda batch: (batch[1] >= 0).sum(), peak=1e15, every=every),
            *([ax.SpikeGuard(window=10, look=10)] if guard else []),
            ax.LearningRate(every=3),
            ax.EarlyStopping("val/loss", patience=99),
            *callbacks,
        ],
        **options,
    )
    shown = []

    @loop.on("after_batch")
    def look(state):
        shown.append(state.values.get("train/loss"))
        if strict and state.step == 3:
            torch.cuda.set_sync_debug_mode("error")

    try:
        result = loop.fit(train, test, epochs=3, batch_size=32, microbatch=microbatch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return loop, result, shown


WAYS = {
    "plain": {},
    "fp16": {"precision": "fp16"},
    "bf16, channels_last": {"precision": "bf16", "channels_last": True},
    "microbatch": {"microbatch": 24},
}


@pytest.mark.filterwarnings("ignore:.*normalise over the samples")
@pytest.mark.filterwarnings("ignore:SpikeGuard left out")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["cuda", "cpu", "batches"])
def test_a_fit_with_everything_on_never_waits_and_is_that_of_one_that_may(monkeypatch, deterministic, where, way):
    _, plain, _ = fitted(where, strict=False, **WAYS[way])
    expected = {name: value.clone() for name, value in plain.state.objective.state_dict().items()}
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 0.002)
    monkeypatch.setattr(run, "LOOK_AGAIN_SECONDS", 0.0)
    sent = []

    def watched(tensor):
        sent.append(pinned(tensor))
        return sent[-1]

    monkeypatch.setattr("axontrain.data.structure.pinned", watched)
    loop, result, shown = fitted(where, strict=True, **WAYS[way])
    assert len({loss for loss in shown if loss is not None}) > 3  # more than at the ends of epochs: some have come meanwhile
    for name, value in loop.objective.state_dict().items():
        assert torch.equal(value, expected[name]), name

    def rows(history):
        return [{key: value for key, value in row.items() if not key.startswith("throughput/")} for row in history]

    assert rows(result.history) == rows(plain.history)
    assert any("throughput/tokens_per_second" in row for row in result.history)
    if where != "cuda":
        assert sent
        assert all(tensor.is_pinned() for tensor in sent)


@pytest.fixture
def waits(monkeypatch):
    """At which steps the host has waited for an event: torch's own mode counts none of these."""
    found, at = [], {"step": 0}

    def counted(kind):
        class Counted(kind):
            def synchronize(self):
                found.append(at["step"])
                return super().synchronize()

        return Counted

    # Of readings, and of a stopwatch.
    monkeypatch.setattr(torch.cuda, "Event", counted(torch.cuda.Event))
    monkeypatch.setattr(torch, "Event", counted(torch.Event))

    class Steps(ax.Callback):
        def before_batch(self, state):
            at["step"] = state.step + 1

    return found, Steps


@pytest.mark.filterwarnings("ignore:SpikeGuard left out")
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("way", ["plain", "graph"])
@pytest.mark.parametrize("where", ["cuda", "cpu", "batches"])
def test_a_fit_waits_for_no_event_but_at_the_ends_of_epochs(monkeypatch, waits, where, way, large):
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 0.002)
    monkeypatch.setattr(run, "LOOK_AGAIN_SECONDS", 0.0)
    if large:
        monkeypatch.setattr("axontrain.metrics.meter.SMALL_BYTES", 30 * 10 * 4)  # but of the last batch, of 28
    found, steps = waits
    options = {"graph": True, "guard": False} if way == "graph" else {}  # who looks between backward and update is in no graph
    _, result, shown = fitted(where, strict=False, callbacks=[steps()], every=10, **options)
    assert len({loss for loss in shown if loss is not None}) > 3
    ends = {row["step"] for row in result.history if "val/loss" in row}
    assert ends == {22, 44, 66}
    assert found, "at the ends of epochs it does"
    assert set(found) <= {0, *ends}
    rows = [row["step"] for row in result.history if "throughput/tokens_per_second" in row]
    assert rows == [10, 20, 30, 40, 50, 60]


def behind():
    """The device has half a second of work before it; what tells whether it is through."""
    torch.cuda._sleep(10**9)
    through = torch.cuda.Event()
    through.record()
    return through


@pytest.mark.parametrize("own", [False, True], ids=["present stream", "own stream"])
def test_a_number_is_there_when_the_device_has_come_to_it(own):
    there = torch.arange(4.0, device="cuda")
    assert Fetch([there * 2]).values() == [[0.0, 2.0, 4.0, 6.0]]  # what is loaded at first is
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) if own else contextlib.nullcontext():
        through = behind()
        fetch = Fetch([there * 2, there])
        there.zero_()
        assert not fetch.arrived()
        assert not through.query()
        assert fetch.values() == [[0.0, 2.0, 4.0, 6.0], [0.0, 1.0, 2.0, 3.0]]
        assert through.query()
        assert fetch.arrived()


LAYOUTS = {
    "contiguous": lambda: torch.arange(24.0).reshape(2, 3, 2, 2),
    "channels_last": lambda: torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "with gaps": lambda: torch.arange(24.0).reshape(2, 3, 2, 2)[..., :1],
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_any_layout_is_sent_without_a_wait(layout):
    cuda, tensor = torch.device("cuda"), LAYOUTS[layout]()
    to_device(tensor, cuda)
    torch.cuda.synchronize()
    through = behind()
    there = to_device((tensor, tensor), cuda)
    assert not through.query()
    assert pinned(tensor).is_pinned()
    assert all(torch.equal(part.cpu(), tensor) for part in there)
    assert there[0].stride() == tensor.to(cuda).stride()


def test_large_predictions_after_small_ones_are_taken_in_without_a_wait():
    sizes = [4, 4, 9000, 4, 9000, 9000, 4]  # of which 9000 rows are large
    labels = {rows: torch.zeros(rows, dtype=torch.long, device="cuda") for rows in sizes}
    logits = {rows: torch.eye(10, device="cuda")[labels[rows]] for rows in sizes}
    flags = [torch.tensor(float(n in (1, 4)), device="cuda") for n in range(len(sizes))]

    def recorded():
        meter = Meter(["accuracy"])
        for number, (rows, flag) in enumerate(zip(sizes, flags, strict=True)):
            predictions = logits[rows].roll(1, 1) if number in (2, 3) else logits[rows]
            meter.record(Step(flag, predictions, labels[rows], weight=rows, skipped=flag))
        return meter, Later(meter.reading())

    recorded()[0].read()  # what is loaded at first is
    torch.cuda.synchronize()
    through = behind()
    meter, later = recorded()
    assert not through.query()
    assert not later.arrived()
    right = (4 + 9000 + 4) / (4 + 9000 + 4 + 9000 + 4)
    assert later.result()["accuracy"] == pytest.approx(right)
    assert meter.read()["accuracy"] == pytest.approx(right)


@pytest.mark.filterwarnings("ignore:SpikeGuard left out")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_saving_copies_the_state_without_a_wait_that_torch_counts(tmp_path, deterministic, asynchronous):
    checkpoint = ax.Checkpoint(every=7, keep_last=None, asynchronous=asynchronous)
    loop, _, _ = fitted("cuda", strict=True, directory=tmp_path, callbacks=[checkpoint])
    torch.manual_seed(1)
    again = ax.Loop(Images(), loop.optimizers, metrics={"right": right}, progress=False, device="cuda")
    again.restore(sorted(tmp_path.glob("step-*"))[-1], only="objective")
    for name, value in loop.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore::axontrain.NonFiniteWarning")
def test_skipped_updates_of_several_optimizers_are_counted_without_a_wait(monkeypatch):
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(run, "LOOK_AGAIN_SECONDS", 0.0)

    class Two(ax.Objective):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 10), nn.Linear(64, 10)

        def train_step(self, batch):
            for name, net in (("first", self.first), ("second", self.second)):
                yield name, F.cross_entropy(net(batch[0]), batch[1])

    optimizers = {name: ax.Optimizer("adamw", lr=1e-3, clip_norm=1.0) for name in ("first", "second")}
    loop = ax.Loop(Two(), optimizers, device="cuda", progress=False)
    images, labels = ax.data.digits()[0].gather(torch.arange(64))
    batches = [(images * (float("nan") if n in (5, 6, 11) else 1), labels) for n in range(40)]

    @loop.on("after_batch")
    def look(state):
        if state.step == 3:
            torch.cuda.set_sync_debug_mode("error")

    try:
        loop.fit(batches, epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [update.skipped for update in loop.state.optimizers.values()] == [3, 3]


def test_options_that_change_are_given_to_a_compiled_step_without_a_wait():
    loop = ax.Loop(Images(), ax.Optimizer("sgd", lr=0.01, momentum=0.9), device="cuda", compile=True, progress=False)
    optimizer, step = loop.state.optimizers["main"], loop._start.runner(None)
    batch = torch.rand(8, 1, 8, 8, device="cuda"), torch.randint(10, (8,), device="cuda")
    loop.objective.train()
    for number in range(16):  # compiled, changed, compiled again, and held against eager
        optimizer.set(momentum=0.8 if number < 8 else 0.7)
        step(batch)
    assert loop.report().how == "one graph"
    with refused():
        for number in range(4):
            optimizer.set(momentum=0.5 + 0.1 * number)
            step(batch)
    assert loop.report().graphs == 2
