"""graph= on a GPU: what is replayed from CUDA graphs is bitwise what it is without. What a CPU can show: loop/test_graph.py."""

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)"),
]


class Digits(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8 * 36, 10)
        )

    def predict(self, images):
        return self.net(images.view(-1, 1, 8, 8))

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


OPTIMIZERS = {
    "sgd": lambda: ax.Optimizer("sgd", lr=0.1, momentum=0.9, nesterov=True, schedule=ax.schedules.one_cycle()),
    "adam": lambda: ax.Optimizer("adam", lr=1e-3, clip_norm=1.0),
    "adamw": lambda: ax.Optimizer("adamw", lr=3e-3, no_decay=True, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="5%")),
    "a torch scheduler": lambda: ax.Optimizer(
        "adamw", lr=3e-3, schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.999)
    ),
    "rmsprop": lambda: ax.Optimizer("rmsprop", lr=1e-3),
    "muon": lambda: ax.Optimizer(
        "muon", lr=1e-2, groups={lambda n, p: p.ndim != 2: {"optimizer": "adamw", "lr": 1e-3}}, schedule=ax.schedules.linear()
    ),
    "ema": lambda: ax.Optimizer("adamw", lr=1e-2, average="ema"),
}


def fitted(graph, optimizer, objective=Digits, data=None, steps=1000, **options):
    torch.manual_seed(0)
    loop = ax.Loop(objective(), optimizer, graph=graph, progress=False, **options)
    train, test = (part.to("cuda") for part in ax.data.digits())
    loop.fit(train if data is None else data, test, steps=steps, batch_size=64)
    return loop


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def states(loop):
    tree = loop.save()
    return tree["objective"], tree["optimizers"], tree["rng"], tree["values"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thousand_steps_are_bitwise_those_without(name):
    plain, replayed = (fitted(graph, OPTIMIZERS[name](), metrics=["accuracy"]) for graph in (False, True))
    report = replayed.report()
    assert report.not_replayed == ""
    assert report.recorded == 2  # the last batch of an epoch is smaller
    assert report.replayed == 1000 - 10
    assert bool(report.update) == (name == "muon")
    assert same(states(plain), states(replayed))
    assert plain.state.values["val/accuracy"] > 0.9


@pytest.mark.parametrize("precision", ["tf32", "bf16", "bf16-true"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precisions_and_layouts(precision, channels_last):
    loops = [
        fitted(graph, OPTIMIZERS["adamw"](), steps=200, precision=precision, channels_last=channels_last)
        for graph in (False, True)
    ]
    assert loops[1].report().replayed > 150
    assert same(states(loops[0]), states(loops[1]))


def test_steps_that_are_not_finite_and_rates_that_change():
    loops = []
    train = ax.data.digits()[0].to("cuda")
    images, labels = train[:][0].clone(), train[:][1]
    images[100] = float("nan")
    for graph in (False, True):
        torch.manual_seed(0)
        loop = ax.Loop(Digits(), OPTIMIZERS["adam"](), graph=graph, progress=False)

        @loop.on("after_epoch", every="3 epochs")
        def _(state):
            state.optimizers["main"].rescale(0.5)

        with pytest.warns(ax.NonFiniteWarning):
            loop.fit(ax.Loader(ax.ArrayDataset(images, labels), 64), epochs=10)
        loops.append(loop)
    assert loops[1].state.optimizers["main"].skipped == 10
    assert loops[1].report().recorded > 3
    assert same(states(loops[0]), states(loops[1]))


def test_data_from_the_host():
    loops = [fitted(graph, OPTIMIZERS["adamw"](), data=ax.data.digits()[0], steps=300) for graph in (False, True)]
    assert loops[1].report().replayed > 250
    assert same(states(loops[0]), states(loops[1]))


class Reads(Digits):
    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        return loss * (1 + 0 * loss.item())


class Sizes(Digits):
    def loss(self, logits, labels):
        return super().loss(logits[labels > 0], labels[labels > 0])


class Uploads(Digits):
    def predict(self, images):
        return super().predict(images) + torch.tensor([1.0] * 10, device=images.device)


@pytest.mark.parametrize("kind", [Reads, Sizes, Uploads])
def test_what_waits_for_the_device_is_done_as_before_and_the_line_is_told(kind):
    with pytest.warns(ax.AxonWarning, match=r"a step waits for the device.*test_gpu_graph\.py:\d+"):
        loop = fitted(True, OPTIMIZERS["adam"](), kind, steps=60)
    assert loop.report().replayed == 0
    torch.rand(4, device="cuda")  # the generator is not left in the middle of a recording


def test_a_recording_that_fails_leaves_everything_usable(monkeypatch):
    from axontrain.execution import attempt

    monkeypatch.setattr(attempt, "_try", lambda graph, recorder: None)  # so that nothing is found before
    with pytest.warns(ax.AxonWarning, match=r"cannot be replayed from a CUDA graph.*test_gpu_graph\.py:\d+: return loss"):
        failed = fitted(True, OPTIMIZERS["adamw"](), Reads, steps=100)
    plain = fitted(False, OPTIMIZERS["adamw"](), Reads, steps=100)
    assert same(states(plain), states(failed))
    after = fitted(True, OPTIMIZERS["adamw"](), steps=100)
    assert after.report().replayed > 50
    assert same(states(fitted(False, OPTIMIZERS["adamw"](), steps=100)), states(after))


class Scaled(Digits):
    def __init__(self):
        super().__init__()
        self.scale, self.generator = 1.0, torch.Generator("cuda").manual_seed(1)

    def predict(self, images):
        noise = torch.randn(images.shape, device=images.device, generator=self.generator)
        return super().predict(images + 0.01 * noise) * self.scale


@pytest.mark.parametrize("rows", [1408, 1400])  # 22 batches of 64; and a smaller one at the end
def test_what_changes_is_recorded_anew_and_comes_back(rows):
    loops = []
    train = ax.data.digits()[0][:rows]
    data = ax.ArrayDataset(*(part.to("cuda") for part in train))
    for graph in (False, True):
        torch.manual_seed(0)
        loop = ax.Loop(Scaled(), OPTIMIZERS["adamw"](), graph=graph, progress=False)

        @loop.on("before_epoch", every="8 epochs")
        def _(state):
            state.objective.scale = 1.5 - state.objective.scale  # 1, 0.5, 1, 0.5
            for p in state.objective.net[0].parameters():
                p.requires_grad_(not p.requires_grad)

        loop.fit(data, epochs=32, batch_size=64)
        loops.append(loop)
    assert loops[1].report().not_replayed == ""
    assert len(loops[1].report().rerecorded) >= 3
    assert loops[1].report().replayed > 500
    assert same(states(loops[0]), states(loops[1]))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_after_a_recording_that_failed_memory_and_generators_are_as_ever(monkeypatch):
    from axontrain.execution import attempt

    class ReadsAndDraws(Scaled):
        def loss(self, logits, labels):
            loss = super().loss(logits, labels)
            return loss * (1 + 0 * loss.item())

    monkeypatch.setattr(attempt, "_try", lambda graph, recorder: None)
    objective = ReadsAndDraws()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.warns(ax.AxonWarning, match="cannot be replayed"):
        ax.Loop(objective, OPTIMIZERS["adamw"](), graph=True, progress=False).fit(
            ax.data.digits()[0].to("cuda"), steps=40, batch_size=64
        )
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(4, device="cuda", generator=objective.generator)
    torch.randn(4, device="cuda")
    large = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del large
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + 2**26


def pools():
    """Of graphs, that memory is held for."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()} - {(0, 0)}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("what", ["predictions", "python", "capture"])
def test_an_error_while_a_step_is_recorded_leaves_the_allocator_whole(what, beside):
    class Fails(Digits):
        def train_step(self, batch):
            step = super().train_step(batch)
            if beside and len(batch[0]) == 64:  # another is recorded of the last batch of an epoch, which is smaller
                return step
            if what == "predictions":
                step.predictions = torch.distributions.Categorical(logits=step.predictions, validate_args=False)
            elif torch.cuda.is_current_stream_capturing():
                if what == "python":
                    raise ValueError("not while it is recorded")
                step.loss.item()
            return step

    told = {"predictions": "the step gives Categorical", "python": "not while it is recorded", "capture": "capturing"}[what]
    before = pools()
    watched = {"callbacks": [ax.EarlyStopping("train/loss", patience=99)]}  # else nobody asks for predictions
    with pytest.warns(ax.AxonWarning, match=f"cannot be replayed from a CUDA graph.*{told}"):
        failed = fitted(True, OPTIMIZERS["adamw"](), Fails, **watched, steps=600)
    torch.cuda.empty_cache()
    assert (failed.report().recorded, failed.report().replayed > 0) == (beside, beside)
    assert same(states(fitted(False, OPTIMIZERS["adamw"](), Fails, **watched, steps=600)), states(failed))
    after = fitted(True, OPTIMIZERS["adamw"](), steps=200)
    assert after.report().replayed > 100
    torch.cuda.empty_cache()
    assert same(states(fitted(False, OPTIMIZERS["adamw"](), steps=200)), states(after))
    del failed, after
    assert pools() <= before


class Wide(ax.Objective):
    """Products with sums so long that cuBLAS splits them, and puts the parts in memory of the stream's."""

    def __init__(self):
        super().__init__()
        hidden = nn.Linear(64, 16384), nn.ReLU(), nn.Linear(16384, 64), nn.ReLU()
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))

    def predict(self, images):
        return self.net(images)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def by_hand(graph):
    torch.manual_seed(0)
    return ax.Loop(Wide(), ax.Optimizer("adamw", lr=1e-3), graph=graph, progress=False)


def several(loop, batch, steps):
    for _ in range(steps):
        loop.train_on_batch(batch)


def overwrite():
    """All memory that is not in use."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    junk = [torch.full((2**24,), float("nan"), device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    del junk


@pytest.mark.parametrize("ends", ["garbage", "a fit", "a failure", "Ctrl-C"])
def test_a_loop_goes_on_where_another_ends(ends):
    train = ax.data.digits()[0].to("cuda")
    batch, due = train[:64], []

    class Fails(Wide):
        def loss(self, logits, labels):
            if due and torch.cuda.is_current_stream_capturing():
                raise due.pop()
            return super().loss(logits, labels)

    seen = []
    for graph in (False, True):
        loop, other = by_hand(graph), by_hand(graph)
        for number in range(40):
            loop.train_on_batch(batch)
            other.train_on_batch(batch)
            if number % 10 == 9:
                torch.cuda.empty_cache()
        assert same(states(loop), states(other))
        if ends == "a fit":
            other.fit(train, steps=100, batch_size=64)
            assert not graph or other.report().replayed > 50
        elif ends in ("a failure", "Ctrl-C") and graph:
            torch.manual_seed(0)
            other = ax.Loop(Fails(), ax.Optimizer("adamw", lr=1e-3), graph=True, progress=False)
            due.append(ValueError("now") if ends == "a failure" else KeyboardInterrupt("now"))
            with pytest.warns(ax.AxonWarning, match="now") if ends == "a failure" else pytest.raises(KeyboardInterrupt):
                several(other, batch, 40)
            assert not due
        else:
            del other
            gc.collect()
        for _ in range(4):
            overwrite()
            several(loop, batch, 10)
        assert not graph or loop.report().replayed > 60
        seen.append(loop)
    assert same(states(seen[0]), states(seen[1]))


def test_ctrl_c_while_a_step_is_recorded_leaves_other_recordings():
    train, due, steps, seen = ax.data.digits()[0].to("cuda"), [], 0, []

    class Interrupted(Wide):
        def loss(self, logits, labels):
            if due and torch.cuda.is_current_stream_capturing():
                raise due.pop()
            return super().loss(logits, labels)

    for graph in (True, False):
        torch.manual_seed(0)
        loop = ax.Loop(Interrupted(), ax.Optimizer("adamw", lr=1e-3), graph=graph, progress=False)
        several(loop, train[:64], 20)
        if graph:
            due.append(KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                several(loop, train[:32], 20)
            steps, replayed = loop.state.step - 20, loop.report().replayed
        else:
            several(loop, train[:32], steps)
        for _ in range(20):
            overwrite()
            loop.train_on_batch(train[:64])
            loop.train_on_batch(train[:32])
        assert not graph or loop.report().replayed > replayed + 30
        seen.append(loop)
    assert same(states(seen[0]), states(seen[1]))


class Recurrent(Digits):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.rnn, self.net = nn.LSTM(8, 16, num_layers=2, dropout=dropout, batch_first=True), nn.Linear(16, 10)

    def predict(self, images):
        return self.net(self.rnn(images.view(-1, 8, 8))[0][:, -1])


def test_recurrent_networks():
    loops = [fitted(graph, OPTIMIZERS["adam"](), Recurrent, steps=200) for graph in (False, True)]
    assert loops[1].report().replayed > 150
    assert same(states(loops[0]), states(loops[1]))
    with pytest.warns(ax.AxonWarning, match="rnn has dropout between its layers"):
        dropped = fitted(True, OPTIMIZERS["adam"](), lambda: Recurrent(0.5), steps=100)
    assert same(states(fitted(False, OPTIMIZERS["adam"](), lambda: Recurrent(0.5), steps=100)), states(dropped))


def test_kernels_that_sum_in_any_order_are_replayed():
    torch.use_deterministic_algorithms(False)

    class Atomic(Digits):
        def __init__(self):
            super().__init__()
            self.embedding, self.net = nn.Parameter(torch.randn(17, 32)), nn.Linear(32, 10)

        def predict(self, images):
            index = images.view(len(images), -1).long().clamp(0, 16)
            rows = torch.arange(len(images), device=images.device).repeat_interleave(64, output_size=64 * len(images))
            summed = torch.zeros(len(images), 32, device=images.device)
            return self.net(summed.index_add(0, rows, self.embedding[index.reshape(-1)]))

    for _ in range(3):
        assert fitted(True, OPTIMIZERS["adamw"](), Atomic, steps=100).report().replayed > 50


def test_batches_that_lie_otherwise_in_memory():
    rows = torch.randn(640, 100, device="cuda")
    labels = torch.randint(10, (640,), device="cuda")
    batches = [(rows[n : n + 60, 3:67], labels[n : n + 60]) for n in range(0, 600, 60)]
    loops = [fitted(graph, OPTIMIZERS["adamw"](), data=batches, steps=300, strict=False) for graph in (False, True)]
    assert loops[1].report().replayed > 200
    assert same(states(loops[0]), states(loops[1]))


def test_generators_of_losses_microbatches_and_scaled_losses():
    class Adversaries(ax.Objective):
        def __init__(self):
            super().__init__()
            self.generator, self.discriminator = nn.Linear(8, 64), nn.Linear(64, 1)

        def train_step(self, batch):
            real = batch[0]
            fake = self.generator(torch.randn(len(real), 8, device=real.device))
            yield "discriminator", F.softplus(self.discriminator(fake.detach()) - self.discriminator(real)).mean()
            yield "generator", F.softplus(-self.discriminator(fake)).mean()

    class Normed(Digits):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Dropout(0.1), nn.Linear(32, 10))

    train = ax.data.digits()[0].to("cuda")
    for fit, precision, kind in (
        ({}, "fp32", Adversaries),
        ({"microbatch": 24}, "fp32", Adversaries),
        ({"microbatch": 24}, "bf16", Normed),
        ({}, "fp16", Normed),
    ):
        loops = []
        for graph in (False, True):
            torch.manual_seed(0)
            optimizers = {"generator": OPTIMIZERS["adam"](), "discriminator": OPTIMIZERS["adamw"]()}
            of = optimizers if kind is Adversaries else OPTIMIZERS["adamw"]()
            loop = ax.Loop(kind(), of, graph=graph, precision=precision, progress=False)
            loop.fit(train, steps=200, batch_size=64, **fit)
            loops.append(loop)
        assert loops[1].report().replayed > 150, loops[1].report()
        assert same(states(loops[0]), states(loops[1]))


def test_memory_is_given_back():
    torch.cuda.empty_cache()
    for graph in (False, True):  # what libraries keep for each stream is there then
        fitted(graph, OPTIMIZERS["adam"](), steps=50)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        fitted(True, OPTIMIZERS["adam"](), steps=50)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**23


def test_auto_keeps_one_of_both():
    auto = fitted("auto", OPTIMIZERS["adamw"](), steps=600)
    plain = fitted(False, OPTIMIZERS["adamw"](), steps=600)
    report = auto.report()
    assert bool(report.ratio) != bool(report.not_replayed)
    assert same(states(plain), states(auto))


def test_compiled_parts_are_replayed():
    torch.use_deterministic_algorithms(False)
    loop = fitted(True, OPTIMIZERS["adamw"](), steps=300, compile=True)
    assert loop.report().how == "in parts"
    assert loop.report().replayed > 200, loop.report()
    assert loop.evaluate(ax.data.digits()[1])["loss"] < 0.3


def test_a_process_group_of_nccl_ends_after_replays(tmp_path):
    script = textwrap.dedent("""
        import gc
        import torch, torch.distributed as dist
        import axontrain as ax

        dist.init_process_group("nccl", init_method="file://{path}", rank=0, world_size=1, device_id=torch.device("cuda:0"))

        class Reduced(ax.Supervised):
            def loss(self, predictions, targets):
                loss = super().loss(predictions, targets)
                total = loss.detach().clone()
                dist.all_reduce(total)
                return loss + 0 * total

        train = ax.data.digits()[0].to("cuda")
        objective, optimizer = Reduced(torch.nn.Linear(64, 10), "cross_entropy"), ax.Optimizer("sgd", lr=0.1)
        loop = ax.Loop(objective, optimizer, graph=True, progress=False)
        loop.fit(train, epochs=3, batch_size=64)
        print("replayed", loop.report().replayed, loop.report().not_replayed)
        for _ in range(8):
            loop.train_on_batch((torch.rand(64, 64, device="cuda"), torch.zeros(64, dtype=torch.long, device="cuda")))
        del loop
        gc.collect()  # its recordings are given back with it
        dist.destroy_process_group()
        print("ended")
    """).format(path=tmp_path / "rendezvous")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "ended" in done.stdout
    assert int(done.stdout.split("replayed ")[1].split()[0]) > 20, done.stdout
