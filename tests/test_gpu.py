"""On a GPU: it learns there, the data may live there, and no step waits for the device."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax
from axontrain.execution.runners import runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)"),
]


class Digits(ax.Objective):
    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def predict(self, images):
        return self.net(images)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def made(**options):
    torch.manual_seed(0)
    optimizer = ax.Optimizer("adamw", lr=3e-3, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="5%"), **options)
    return ax.Loop(Digits(), optimizer, progress=False)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_it_learns_with_data_on_either_device(where):
    train, test = (part.to(where) for part in ax.data.digits())
    loop = made()
    result = loop.fit(train, test, epochs=5, batch_size=64)
    assert next(loop.objective.parameters()).is_cuda
    assert result.values["val/accuracy"] > 0.9
    assert loop.predict(test).device.type == "cpu"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it says that it is a prototype
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "muon"])
def test_no_step_waits_for_the_device(optimizer):
    class Bare(Digits):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False))

    loop = ax.Loop(Bare(), ax.Optimizer(optimizer, lr=1e-3, clip_norm=1.0), progress=False)
    train = ax.data.digits()[0].to("cuda")
    train_step = runner(loop.state, None)
    batches = list(ax.Loader(train, 64))[:12]
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("default" if number < 2 else "error")  # the first make state and handles
        try:
            step = train_step(batch)
            loop.state.meter.record(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loop.state.read()["train/loss"] > 0


def test_a_run_does_not_depend_on_where_its_data_lie():
    states = []
    for where in ("cpu", "cuda"):
        loop = made()
        loop.fit(ax.data.digits()[0].to(where), epochs=2, batch_size=64)
        states.append(loop.objective.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_skipped_updates_change_nothing_on_the_device():
    loop = made()
    good = tuple(part.cuda() for part in ax.data.digits()[0].gather(torch.arange(64)))
    bad = (torch.full_like(good[0], float("nan")), good[1])
    loop = ax.Loop(Digits(), ax.Optimizer("adamw", lr=3e-3), progress=False)
    loop.train_on_batch(good)
    before = loop.save()
    assert float(loop.train_on_batch(bad).skipped) > 0
    after = loop.save()
    assert all(torch.equal(before["objective"][name], after["objective"][name]) for name in before["objective"])


class Varied(ax.Objective):
    """Deterministic kernels alone; dropout draws from the device's generator, the noise from the CPU's and NumPy's."""

    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))

    def predict(self, images):
        noise = torch.randn(images.shape, device=images.device) + torch.rand(64).to(images.device)
        return self.net(images + 0.1 * noise + 0.1 * float(np.random.normal()))

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def varied(directory=None, *, start=0, stop=None, every=None):
    torch.manual_seed(start)
    optimizer = ax.Optimizer("adamw", lr=3e-3, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="5%"))
    callbacks = [ax.EarlyStopping(patience=99), ax.ReduceLROnPlateau(patience=1)]
    if every is not None:
        callbacks.append(ax.Checkpoint(every=every, keep_last=None, asynchronous=True))
    loop = ax.Loop(Varied(), optimizer, callbacks=callbacks, progress=False, directory=directory)
    if stop is not None:
        loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == stop else None)
    return loop


def leaves(tree, path=""):
    if isinstance(tree, dict):
        return {key: leaf for name, part in tree.items() for key, leaf in leaves(part, f"{path}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {key: leaf for i, part in enumerate(tree) for key, leaf in leaves(part, f"{path}/{i}").items()}
    return {path: tree}


def assert_same_state(one, other):
    one, other = (
        {
            name: leaf
            for name, leaf in leaves(tree).items()
            if not any(word in name for word in ("elapsed", "cadence/Checkpoint", "meter/example"))
        }
        for tree in (one, other)
    )
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        is_tensor = isinstance(leaf, torch.Tensor)
        assert torch.equal(leaf.cpu(), other[name].cpu()) if is_tensor else leaf == other[name] or leaf != leaf, name


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("step", range(1, 12))
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, deterministic, step):
    """Each step of three epochs of four, the last of which is cut short: weights, states, history, generators."""
    train, test = (ax.data.Subset(part, range(200)) for part in ax.data.digits())
    fit = {"train": train, "validation": test, "epochs": 3, "steps": 11, "batch_size": 64, "validate": "3 steps"}
    whole = varied(tmp_path / "whole")
    result = whole.fit(**fit)
    assert len(whole.save()["rng"]["cuda"]) == torch.cuda.device_count()
    varied(tmp_path / "run", stop=step).fit(**fit)
    torch.cuda.manual_seed(step)
    again = varied(tmp_path / "run", start=1)
    found = again.fit(**fit, resume=True)
    assert_same_state(whole.save(), again.save())
    assert (found.values, found.history) == (result.values, result.history)


def test_checkpoints_written_meanwhile_are_of_their_steps(tmp_path, deterministic):
    """By another process, while the device trains on: each goes on to the same end."""
    train, _ = ax.data.digits()
    fit = {"train": train, "epochs": 2, "batch_size": 64}
    whole = varied(every=None)
    whole.callbacks.clear()
    whole.fit(**fit)
    loop = varied(tmp_path / "run", every=5)
    del loop.callbacks[:2]
    loop.fit(**fit)
    for path in sorted((tmp_path / "run").glob("step-*")):
        again = varied(start=1)
        again.callbacks.clear()
        again.restore(path)
        again.fit(**fit, resume=True)
        for name, value in whole.objective.state_dict().items():
            assert torch.equal(value, again.objective.state_dict()[name]), (path.name, name)


@pytest.mark.filterwarnings("ignore:.*normalise over the samples")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "bf16-true", "fp64"])
def test_each_precision_learns(precision):
    train, test = ax.data.digits()
    torch.manual_seed(0)
    loop = ax.Loop(Digits(), ax.Optimizer("adamw", lr=3e-3, clip_norm=1.0), precision=precision, progress=False)
    result = loop.fit(train, test, epochs=5, batch_size=64, microbatch=48 if precision == "fp16" else None)
    assert result.values["val/accuracy"] > 0.9


@pytest.mark.parametrize("average", ["ema", ax.averages.swa(0, every=1)])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16-true"])
def test_averages_are_on_the_device_and_go_on_bitwise(tmp_path, deterministic, average, precision):
    train, _ = ax.data.digits()

    def loop(directory=None):
        torch.manual_seed(0)
        optimizer = ax.Optimizer("adamw", lr=3e-3, average=average)
        return ax.Loop(Digits(), optimizer, precision=precision, progress=False, directory=directory)

    whole = loop()
    whole.fit(train, epochs=2, batch_size=64)
    loop(tmp_path).fit(train, steps=9, batch_size=64)
    again = loop(tmp_path)
    again.fit(train, epochs=2, batch_size=64, resume=True)
    assert {tensor.device.type for tensor in again.state.optimizers["main"].average.average.values()} == {"cuda"}
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name]), name


@pytest.mark.parametrize("microbatch", [None, 16])
def test_a_step_in_fp16_does_not_wait_for_the_device(microbatch):
    loop = ax.Loop(Varied(), ax.Optimizer("adamw", lr=1e-3, clip_norm=1.0), precision="fp16", progress=False)
    objective = loop.objective
    objective.predict = objective.net.forward
    waits = []

    @loop.on("after_backward")
    def look(state):
        if state.step == 3:
            torch.cuda.set_sync_debug_mode("error")

    @loop.on("after_batch")
    def look_away(state):
        torch.cuda.set_sync_debug_mode("default")
        waits.append(state.step)

    train = ax.data.digits()[0].to("cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        warnings.filterwarnings("ignore", ".*normalise over the samples")
        loop.fit(train, epochs=1, batch_size=64, limit=6, microbatch=microbatch)
    assert len(waits) == 6


@pytest.mark.filterwarnings("ignore:.*normalise over the samples")
def test_memory_that_runs_out_is_halved():
    """On the device's own allocator."""

    class Hungry(Digits):
        def predict(self, images):
            if len(images) > 20:
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return self.net(images)

    loop = ax.Loop(Hungry(), ax.Optimizer("adamw", lr=1e-3), progress=False)
    with pytest.warns(ax.AxonWarning, match="microbatches of") as told:
        loop.fit(ax.data.digits()[0], epochs=1, batch_size=64, limit=4, microbatch="auto")
    assert ["of 16" in str(warning.message) for warning in told if "fit in memory" in str(warning.message)] == [False, True]
    assert loop.state.step == 4


class Plain(Digits):
    """Without what draws or counts, for comparisons between ways to do the same."""

    def __init__(self, bias=True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64, bias=bias), nn.Tanh(), nn.Linear(64, 10, bias=bias))


def plain(name, bias=True, precision="fp32", callbacks=(), directory=None, **options):
    torch.manual_seed(0)
    spec = ax.Optimizer(name, lr=1e-3, **options)
    return ax.Loop(Plain(bias), spec, precision=precision, callbacks=list(callbacks), progress=False, directory=directory)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "rmsprop", "nadam", "muon", "adafactor"])
def test_updates_within_backward_are_those_after_it(deterministic, name):
    train = ax.data.digits()[0].to("cuda")
    weights = []
    for within in (True, False):
        loop = plain(name, bias=name != "muon", in_backward=within)
        loop.fit(train, epochs=1, batch_size=64)
        weights.append(list(loop.objective.parameters()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_within_backward_there_is_one_gradient_at_a_time():
    """A network whose gradients are most of what changes: with them all at once the peak is higher by nearly their size."""
    peaks = []
    for within in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
        loop = ax.Loop(ax.Supervised(net, "mse"), ax.Optimizer("sgd", lr=1e-3, in_backward=within), progress=False)
        batches = [(torch.randn(8, 1024), torch.randn(8, 1024)) for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loop.fit(batches, epochs=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del loop, net
        torch.cuda.empty_cache()
    assert peaks[0] - peaks[1] > 12 * 4 * 1024**2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    "options", [{"in_backward": True}, {"average": "ema"}, {"average": "ema", "in_backward": True}], ids=str
)
@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_no_step_within_backward_or_with_an_average_waits(name, options):
    loop = plain(name, **options)
    train_step = runner(loop.state, None)
    for number, batch in enumerate(list(ax.Loader(ax.data.digits()[0].to("cuda"), 64))[:8]):
        torch.cuda.set_sync_debug_mode("default" if number < 2 else "error")
        try:
            loop.state.meter.record(train_step(batch))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loop.state.read()["train/loss"] > 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_guard_against_spikes_waits_for_nothing_between_its_looks():
    guard = ax.SpikeGuard(window=4, deviations=3, look=100)
    loop = plain("adamw")
    train_step = runner(loop.state, guard.after_backward)
    for number, batch in enumerate(list(ax.Loader(ax.data.digits()[0].to("cuda"), 64))[:12]):
        torch.cuda.set_sync_debug_mode("default" if number < 2 else "error")
        try:
            train_step((batch[0] * (1000 if number == 9 else 1), batch[1]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        loop.state.step += 1
    loop.state.read()
    assert loop.state.optimizers["main"].skipped == 1


@pytest.mark.parametrize("name", ["lbfgs", "adamwschedulefree"])
def test_closures_and_averages_of_their_own_go_on_bitwise(tmp_path, deterministic, name):
    if name == "adamwschedulefree":
        pytest.importorskip("schedulefree")
    train, _ = ax.data.digits()
    whole, first, again = (plain(name, directory=where) for where in (None, tmp_path, tmp_path))
    whole.fit(train, epochs=2, batch_size=256)
    first.on("after_batch")(lambda state: ax.Stop("enough") if state.step == 4 else None)
    first.fit(train, epochs=2, batch_size=256)
    again.fit(train, epochs=2, batch_size=256, resume=True)
    for key, value in whole.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[key]), key


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16-true"])
def test_where_a_nan_comes_from_is_found_on_the_device(precision):
    class Root(Plain):
        def predict(self, images):
            return torch.sqrt(self.net(images) - 100)

    torch.manual_seed(0)
    loop = ax.Loop(Root(), ax.Optimizer("adamw", lr=1e-3, patience=2), precision=precision, progress=False)
    batch = ax.data.digits()[0].gather(torch.arange(8))
    found = ax.locate_nonfinite(loop, batch)
    assert (found.phase, found.operation) == ("forward", "aten.sqrt")
    with pytest.raises(ax.NonFiniteError) as caught:
        loop.fit([batch] * 3, epochs=1)
    assert any("aten.sqrt" in note for note in caught.value.__notes__)


def test_an_audit_counts_what_waits_for_the_device_and_nothing_else():
    class Waiting(Digits):
        def loss(self, logits, labels):
            loss = super().loss(logits[labels >= 0], labels)  # masked
            self.scale = torch.tensor([2.0], device=logits.device)  # made
            self.here = torch.ones(3).sum().item()  # on the CPU
            return loss * self.scale.sum() + 0 * loss.item()  # read

    batch = ax.data.digits()[0].gather(torch.arange(64))
    torch.manual_seed(0)
    found = ax.audit(ax.Loop(Waiting(), ax.Optimizer("adamw", lr=1e-3), progress=False), batch)
    assert {(read.what, read.line.rpartition("# ")[2], read.per_step) for read in found.reads} == {
        ("mask index", "masked", 1),
        ("mask assignment, in backward", "masked", 1),
        ("copy to the device without non_blocking=True", "made", 1),
        ("item", "read", 1),
    }
    none = ax.audit(made(), batch)
    assert none.reads == ()
    assert none.cuda_allocations > 0
    assert none.cuda_allocated_bytes > 0


@pytest.mark.parametrize("size", [16, 8192])
@pytest.mark.parametrize("how", ["in place", "by data", "assigned"])
def test_buffers_are_put_back_on_the_device(size, how):
    class Bank(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("bank", torch.zeros(size))

        def predict(self, images):
            following = 0.9 * self.bank + 0.1 * images.mean()
            if how == "assigned":
                self.bank = following
            else:
                (self.bank.data if how == "by data" else self.bank).copy_(following)
            return self.net(images)

    torch.manual_seed(0)
    loop = ax.Loop(Bank(), ax.Optimizer("adamw", lr=1e-3), progress=False)
    x, y = ax.data.digits()[0].gather(torch.arange(8))
    for _ in range(2):
        with pytest.warns(ax.NonFiniteWarning, match="1 update"):
            loop.fit([(x, y), (x * float("nan"), y), (x, y)], epochs=1)
        assert torch.isfinite(loop.objective.bank).all()
    assert loop.objective.bank.is_cuda


def test_float8_where_the_device_has_it():
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    train, test = ax.data.digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ax.AxonWarning)  # of emulation
        loop = ax.Loop(
            ax.Supervised(net, "cross_entropy", metrics=["accuracy"]),
            ax.Optimizer("adamw", lr=3e-3),
            precision="fp8",
            progress=False,
        )
    assert loop.fit(train, test, epochs=5, batch_size=64).values["val/accuracy"] > 0.9
