"""A batch in parts gives the gradient of the batch: ragged ones, means over tokens, several optimizers, too little memory."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from resume_runs import flat, leaves
from torch import nn

import axontrain as ax
from axontrain.execution.microbatches import TRY_AGAIN, out_of_memory

DOUBLE = {"rtol": 1e-9, "atol": 1e-11}


def table(n=70, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


class Tokens(ax.Objective):
    """A mean over those items that a mask keeps, as of a language model: 0/0 where it keeps none."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def predict(self, inputs):
        return self.net(inputs)

    def split(self, batch):
        return batch["x"], batch

    def weight(self, batch):
        return batch["mask"].sum()

    def loss(self, logits, batch):
        losses = F.cross_entropy(logits, batch["y"], reduction="none")
        return (losses * batch["mask"]).sum() / batch["mask"].sum()


class Terms(Tokens):
    """Two terms of one mean over samples."""

    weight = ax.Objective.weight

    def loss(self, logits, batch):
        return {"nll": F.cross_entropy(logits, batch["y"]), "small": 0.1 * logits.square().mean()}


def gradients(objective, batches, *, optimizer="sgd", clip=None, data=None, **fit):
    """The gradients of each step as ``after_backward`` sees them, and the loop."""
    torch.manual_seed(0)
    loop = ax.Loop(objective(), ax.Optimizer(optimizer, lr=0.1, clip_norm=clip), progress=False)
    seen = []
    loop.on("after_backward")(lambda state: seen.append([p.grad.clone() for p in state.objective.parameters()]))
    loop.fit(batches if data is None else data, epochs=1, **fit)
    return seen, loop


def assert_close(one, other, loops):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, **DOUBLE)
    a, b = loops
    for p, q in zip(a.objective.parameters(), b.objective.parameters(), strict=True):
        torch.testing.assert_close(p, q, **DOUBLE)
    assert (a.state.step, a.state.samples, a.state.epoch) == (b.state.step, b.state.samples, b.state.epoch)
    assert a.state.values.keys() == b.state.values.keys()
    for name, value in a.state.values.items():
        assert value == pytest.approx(b.state.values[name], nan_ok=True), name


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_gradient_is_that_of_the_batch(data):
    """Any sizes, any mask (with microbatches that keep nothing), any bound of the norm."""
    objective = data.draw(st.sampled_from([Tokens, Terms]))
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    batches = []
    for number, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
        batches.append({"x": x, "y": (x[:, 0] > 0).long(), "mask": torch.tensor(kept).double()})
    options = {
        "optimizer": data.draw(st.sampled_from(["sgd", "adamw", "rmsprop"])),
        "clip": data.draw(st.sampled_from([None, 0.05, 100.0])),
    }
    whole, of_whole = gradients(objective, batches, **options)
    parts, of_parts = gradients(objective, batches, microbatch=data.draw(st.integers(1, 21)), **options)
    assert_close(whole, parts, (of_whole, of_parts))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon", "adagrad", "adafactor"])
@pytest.mark.parametrize("microbatch", [1, 7, 16, 32, 1000])
def test_a_dataset_with_metrics_and_a_ragged_end(optimizer, microbatch):
    def made(**fit):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False)).double()
        objective = ax.Supervised(model, "cross_entropy", ["accuracy", "auroc"])
        loop = ax.Loop(objective, ax.Optimizer(optimizer, lr=0.02, schedule=ax.schedules.cosine()), progress=False)
        result = loop.fit(table(), table(20, 1), epochs=2, batch_size=32, **fit)
        return result, [p.detach().clone() for p in loop.objective.parameters()]

    (whole, weights), (parts, others) = made(), made(microbatch=microbatch)
    assert whole.step == parts.step == 6
    for name, value in whole.values.items():
        assert parts.values[name] == pytest.approx(value), name
    for a, b in zip(weights, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_sample_weights_and_class_weights():
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    w = torch.rand(40)
    w[:8] = 0  # a whole microbatch

    def made(**fit):
        torch.manual_seed(0)
        objective = ax.Supervised(
            nn.Linear(6, 3), "cross_entropy", ["accuracy"], class_weights=[1.0, 2.0, 0.5], sample_weights=True
        )
        loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), progress=False)
        loop.fit(ax.Loader(ax.ArrayDataset(x, y, w), 40), epochs=3, **fit)
        return loop

    whole, parts = made(), made(microbatch=8)
    torch.testing.assert_close(whole.objective.model.weight, parts.objective.model.weight)
    assert parts.state.values == pytest.approx(whole.state.values)


class Gan(ax.Objective):
    def __init__(self):
        super().__init__()
        self.generator = nn.Linear(3, 6).double()
        self.discriminator = nn.Linear(6, 1).double()

    def train_step(self, batch):
        real, noise = batch
        fake = self.generator(noise)
        ones, zeros = torch.ones(len(real), 1).double(), torch.zeros(len(real), 1).double()
        score = F.binary_cross_entropy_with_logits
        yield "discriminator", score(self.discriminator(real), ones) + score(self.discriminator(fake.detach()), zeros)
        yield "generator", {"fool": score(self.discriminator(fake), ones), "small": fake.square().mean()}
        return ax.Step(fake.mean().detach(), weight=len(real), values={"seen": float(len(real))})


@pytest.mark.parametrize("microbatch", [1, 5, 16])
def test_several_optimizers(microbatch):
    data = ax.ArrayDataset(torch.randn(48, 6).double(), torch.randn(48, 3).double())

    def made(**fit):
        torch.manual_seed(0)
        optimizers = {name: ax.Optimizer("adam", lr=0.05, clip_norm=1.0) for name in ("generator", "discriminator")}
        loop = ax.Loop(Gan(), optimizers, progress=False)
        calls = []
        loop.on("after_backward")(lambda state: calls.append(state.step))
        loop.fit(data, epochs=2, batch_size=16, **fit)
        return loop, calls

    (whole, calls), (parts, others) = made(), made(microbatch=microbatch)
    assert calls == others == [step for step in range(6) for _ in range(2)]
    for (name, a), b in zip(whole.objective.named_parameters(), parts.objective.parameters(), strict=True):
        torch.testing.assert_close(a, b, **DOUBLE, msg=name)
    for name, value in whole.state.values.items():
        if name != "train/seen":
            assert parts.state.values[name] == pytest.approx(value), name
    assert parts.state.values["train/seen"] == pytest.approx({1: 1, 5: 4, 16: 16}[microbatch])


def test_a_generator_that_yields_by_the_data_is_refused():
    class Moody(Gan):
        def train_step(self, batch):
            loss = self.generator(batch[1]).square().mean()
            yield ("generator" if batch[0][0, 0] > 0 else "discriminator"), loss + self.discriminator(batch[0]).mean()

    real = torch.ones(4, 6).double()
    real[2:] = -1
    optimizers = {name: ax.Optimizer("sgd", lr=0.1) for name in ("generator", "discriminator")}
    with pytest.raises(ax.LossError, match="by microbatch"):
        ax.Loop(Moody(), optimizers, progress=False).fit([(real, real[:, :3])], epochs=1, microbatch=2)


def test_a_batch_that_counts_nothing_is_skipped():
    x = torch.randn(6, 6).double()
    batches = [{"x": x, "y": torch.zeros(6).long(), "mask": mask} for mask in (torch.ones(6).double(), torch.zeros(6).double())]
    loops = []
    for fit in ({}, {"microbatch": 2}):
        torch.manual_seed(0)
        loop = ax.Loop(Tokens(), ax.Optimizer("sgd", lr=0.1), progress=False)
        with pytest.warns(ax.NonFiniteWarning, match="step 2"):
            loop.fit(batches, epochs=1, **fit)
        loops.append(loop)
    torch.testing.assert_close(*[list(loop.objective.parameters()) for loop in loops], **DOUBLE)


def test_a_nan_in_one_part_skips_the_batch():
    x = torch.randn(8, 6).double()
    x[5, 2] = float("nan")
    loop = ax.Loop(Terms(), ax.Optimizer("adamw", lr=0.1), progress=False)
    before = [p.detach().clone() for p in loop.objective.parameters()]
    with pytest.warns(ax.NonFiniteWarning, match="1 update"):
        loop.fit([{"x": x, "y": torch.zeros(8).long()}], epochs=1, microbatch=2)
    torch.testing.assert_close(before, list(loop.objective.parameters()))


def test_predictions_are_put_together_for_metrics_and_take_no_memory_else():
    lasts = []
    for metrics in ((), ("accuracy",)):
        torch.manual_seed(0)
        loop = ax.Loop(
            ax.Supervised(nn.Linear(6, 2).double(), "cross_entropy", metrics), ax.Optimizer("sgd", lr=0.1), progress=False
        )
        loop.on("after_batch")(lambda state: lasts.append(state.last))
        loop.fit(table(20), epochs=1, batch_size=20, microbatch=6)
    assert lasts[0].predictions is None
    assert lasts[1].predictions.shape == (20, 2)
    assert lasts[1].targets.shape == (20,)
    assert not lasts[1].predictions.requires_grad
    assert [step.weight for step in lasts] == [20, 20]
    torch.testing.assert_close(lasts[0].loss, lasts[1].loss)


@pytest.mark.parametrize("given", [0, -1, 2.5, "half", True])
def test_what_is_no_size_is_refused(given):
    loop = ax.Loop(Terms(), ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.raises(ax.ConfigurationError, match="microbatch="):
        loop.fit(table(), epochs=1, microbatch=given)


def test_what_cannot_be_cut_is_an_error_that_names_it():
    class Prior(Terms):
        def loss(self, logits, batch):
            return F.cross_entropy(logits + batch["prior"], batch["y"])

    batch = {"x": torch.randn(8, 6).double(), "y": torch.zeros(8).long(), "prior": torch.zeros(2).double()}
    loop = ax.Loop(Prior(), ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.raises(ax.DataError, match=r"Tensor\(2,\) float64.*accumulate=n"):
        loop.fit([batch], epochs=1, microbatch=4)
    loop.fit([batch, batch, batch], epochs=1, accumulate=2)
    assert loop.state.step == 2


def test_modules_that_look_at_the_whole_batch_are_warned_of_once():
    objective = ax.Supervised(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), "cross_entropy")
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.warns(ax.AxonWarning, match=r"model\.1 normalise over the samples") as told:
        loop.fit(table(), epochs=2, batch_size=32, microbatch=8)
    assert len(told) == 1
    objective.model[1].eval()  # a frozen one knows no batch
    loop.fit(table(), epochs=1, batch_size=32, microbatch=8)


def test_parts_are_of_one_size_or_nearly():
    """A remainder of one sample would be one that no BatchNorm can train on."""
    sizes = []

    class Counting(ax.Supervised):
        def predict(self, inputs):
            sizes.append(len(inputs))
            return super().predict(inputs)

    objective = Counting(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), "cross_entropy")
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.warns(ax.AxonWarning, match="normalise"):
        loop.fit(list(ax.Loader(table(33), 33)), epochs=1, microbatch=8)
    assert sizes == [7, 7, 7, 6, 6]
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught, pytest.warns(ax.AxonWarning):
        loop.fit(list(ax.Loader(table(4), 4)), epochs=1, microbatch=1)
    assert any("microbatch= is to be 2 or more" in note for note in caught.value.__notes__)


# --- several batches that come ready-made ------------------------------------------------------------------------------


def small_batches(count=7, size=4):
    data = table(count * size - 2)
    return list(ax.Loader(data, size))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_n_small_batches_are_one_step(n):
    """The last group divided by what it has (Lightning #19987), a mean over items and not over batches (#20350)."""
    small = small_batches()
    large = [tuple(map(torch.cat, zip(*small[i : i + n], strict=True))) for i in range(0, len(small), n)]

    def objective():
        return ax.Supervised(nn.Linear(6, 2).double(), "cross_entropy")

    whole, of_whole = gradients(objective, large)
    parts, of_parts = gradients(objective, small, accumulate=n)
    assert_close(whole, parts, (of_whole, of_parts))
    again, of_again = gradients(objective, small, accumulate=n, microbatch=3)
    assert_close(whole, again, (of_whole, of_again))


def test_a_limit_counts_steps():
    loop = ax.Loop(ax.Supervised(nn.Linear(6, 2).double(), "cross_entropy"), ax.Optimizer("sgd", lr=0.1), progress=False)
    result = loop.fit(small_batches(), epochs=2, accumulate=2, limit=3)
    assert (result.step, result.epoch) == (6, 2)
    assert loop.fit(small_batches(), epochs=1, accumulate=2).step == 10


def test_a_dataset_is_not_accumulated():
    loop = ax.Loop(ax.Supervised(nn.Linear(6, 2).double(), "cross_entropy"), ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.raises(ax.ConfigurationError, match="batch_size= says"):
        loop.fit(table(), epochs=1, accumulate=2)
    with pytest.raises(ax.ConfigurationError, match="accumulate=0"):
        loop.fit(small_batches(), epochs=1, accumulate=0)


class Dropping(ax.Supervised):
    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 2)).double(), "cross_entropy", ["accuracy"]
        )


@pytest.mark.parametrize("data", ["dataset", "loader", "iterable"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, stop, data):
    def made(directory, start=0, stop=None):
        torch.manual_seed(start)
        loop = ax.Loop(Dropping(), ax.Optimizer("adamw", lr=0.1), progress=False, directory=directory)
        if stop is not None:
            loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == stop else None)
        return loop

    def fit(loop):
        if data == "dataset":
            return loop.fit(table(), epochs=3, batch_size=32, microbatch=10, steps=7, resume=True)
        small = ax.Loader(table(), 12, shuffle=True) if data == "loader" else small_batches()
        return loop.fit(small, epochs=3, accumulate=3, microbatch=5, steps=7, resume=True)

    whole, again = made(tmp_path / "whole"), made(tmp_path / "run", start=1)
    result = fit(whole)
    fit(made(tmp_path / "run", stop=stop))
    assert fit(again).values == result.values
    one, other = (leaves(loop.save()) for loop in (whole, again))
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        if name != "/attached/data/turns":  # how often this process has begun an iterable that starts anew
            assert torch.equal(leaf, other[name]) if isinstance(leaf, torch.Tensor) else leaf == other[name], name


def test_another_number_of_batches_in_a_step_is_named(tmp_path):
    def made():
        return ax.Loop(Dropping(), ax.Optimizer("sgd", lr=0.1), progress=False, directory=tmp_path / "run")

    loop = made()
    loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == 2 else None)
    loop.fit(small_batches(), epochs=2, accumulate=2, resume=True)
    with pytest.raises(ax.CheckpointError, match="number of batches in a step: it was 2, and is 3"):
        made().fit(small_batches(), epochs=2, accumulate=3, resume=True)


# --- as large as memory allows -----------------------------------------------------------------------------------------


class Hungry(ax.Objective):
    """Asks the allocator for more than there is where it sees more samples than ``room``, in the midst of a step."""

    metrics = ("accuracy",)

    def __init__(self, room=10**9):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 2)).double()
        self.register_buffer("seen", torch.zeros(()))
        self.room, self.asked = room, []

    def predict(self, inputs):
        self.asked.append(len(inputs))
        self.seen += len(inputs)
        hidden = self.net(inputs)
        if len(inputs) > self.room:
            torch.empty(2**60, dtype=torch.uint8)
        return hidden

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def hungry(room, **fit):
    torch.manual_seed(0)
    loop = ax.Loop(Hungry(room), ax.Optimizer("adamw", lr=0.05), progress=False)
    loop.fit(table(), batch_size=32, **fit)
    return loop


def test_the_allocator_says_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_it_is_halved_until_it_fits_and_nothing_else_knows():
    with pytest.warns(ax.AxonWarning, match="microbatch='auto'") as told:
        auto = hungry(9, epochs=2, microbatch="auto")
    assert [str(one.message).partition(":")[2].partition(" do")[0] for one in told] == [
        " 32 samples at once",
        " 16 samples at once",
    ]
    assert auto.objective.asked[:6] == [32, 16, 8, 8, 8, 8]
    fixed = hungry(9, epochs=2, microbatch=8)
    one, other = flat(auto.save()), flat(fixed.save())
    for name, leaf in other.items():
        if "elapsed" not in name and name != "/setup/microbatch":
            assert torch.equal(leaf, one[name]) if isinstance(leaf, torch.Tensor) else leaf == one[name], name
    assert float(auto.objective.seen) == 140
    assert auto.state.history.rows == fixed.state.history.rows


def test_where_memory_is_enough_nothing_is_cut():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto = hungry(100, epochs=2, microbatch="auto")
    assert auto.objective.asked == [32, 32, 6] * 2
    whole = hungry(100, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(auto.objective.parameters(), whole.objective.parameters(), strict=True))


def test_a_larger_size_is_tried_again_later():
    loop = ax.Loop(Hungry(20), ax.Optimizer("sgd", lr=0.01), progress=False)
    loop.on("after_batch", every=TRY_AGAIN + 20)(lambda state: setattr(state.objective, "room", 40))
    with pytest.warns(ax.AxonWarning) as told:
        loop.fit(table(64), steps=6 * TRY_AGAIN, batch_size=32, microbatch="auto")
    said = [str(one.message) for one in told]
    assert [
        ("not fit in memory:" in one, "not fit in memory yet" in one, "again" in one.partition(":")[2]) for one in said
    ] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ] or "whole batches fit in memory again" in said[-1]
    assert "yet; on with 16" in said[1]
    assert loop.objective.asked[-3:] == [32, 32, 32]


def test_what_was_found_is_saved(tmp_path):
    def made(room):
        return ax.Loop(Hungry(room), ax.Optimizer("sgd", lr=0.01), progress=False, directory=tmp_path / "run")

    with pytest.warns(ax.AxonWarning, match="32 samples at once"):
        made(20).fit(table(), epochs=1, batch_size=32, microbatch="auto", resume=True)
    loop = made(20)
    loop.fit(table(), epochs=2, batch_size=32, microbatch="auto", resume=True)
    assert loop.objective.asked == [16, 16, 16, 16, 6]


@pytest.mark.parametrize(
    ("fit", "than"), [({}, "fewer samples, with"), ({"microbatch": 20}, "fewer samples than the 20 of now")]
)
def test_when_memory_runs_out_microbatches_are_offered(fit, than):
    with pytest.raises(RuntimeError, match="allocate") as caught:
        hungry(10, epochs=1, **fit)
    assert any(than in note and "'auto' finds how many fit" in note for note in caught.value.__notes__)


def test_a_single_sample_that_does_not_fit_is_an_error():
    with pytest.warns(ax.AxonWarning), pytest.raises(RuntimeError, match="allocate") as caught:
        hungry(0, epochs=1, microbatch="auto")
    assert any("a single sample does not fit" in note for note in caught.value.__notes__)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Wrong(Hungry):
        def predict(self, inputs):
            return self.net(inputs[:, :3])

    loop = ax.Loop(Wrong(), ax.Optimizer("sgd", lr=0.01), progress=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        loop.fit(table(), epochs=1, microbatch="auto")


def test_auto_is_for_one_loss():
    optimizers = {name: ax.Optimizer("sgd", lr=0.1) for name in ("generator", "discriminator")}
    with pytest.raises(ax.ConfigurationError, match="give a number of samples"):
        ax.Loop(Gan(), optimizers, progress=False).fit([(torch.zeros(4, 6), torch.zeros(4, 3))], epochs=1, microbatch="auto")


def test_in_memory_a_run_goes_on_with_the_size_that_was_found():
    def left_and_gone_on(interrupted):
        torch.manual_seed(0)
        loop = ax.Loop(Hungry(17), ax.Optimizer("adamw", lr=0.05), progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ax.AxonWarning)
            if interrupted:
                steps = loop.steps(table(), epochs=2, batch_size=32, microbatch="auto")
                for _ in range(4):
                    next(steps)
                steps.close()
                state = loop.save()
                loop.fit(table(), epochs=2, batch_size=32, microbatch="auto", resume=True)
                sizes = [loop.objective.asked[-1]]
                loop.restore(state)
                asked = len(loop.objective.asked)
                loop.fit(table(), epochs=2, batch_size=32, microbatch="auto", resume=True)
                sizes.append(max(loop.objective.asked[asked:]))
                assert max(sizes) == 16, "nothing ran out of memory again"
            else:
                loop.fit(table(), epochs=2, batch_size=32, microbatch="auto")
        return loop.objective.state_dict()

    whole, found = left_and_gone_on(False), left_and_gone_on(True)
    assert all(torch.equal(value, found[name]) for name, value in whole.items() if name != "seen")


class Counted(torch.autograd.Function):
    """Counts the samples whose graphs are alive."""

    alive = peak = 0

    @staticmethod
    def forward(ctx, x):
        ctx.size = len(x)
        Counted.alive += len(x)
        Counted.peak = max(Counted.peak, Counted.alive)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Counted.alive -= ctx.size
        return gradient


class Pair(ax.Objective):
    """Two optimizers, one after the other, of one mean over items of its own count."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 1).double(), nn.Linear(6, 1).double()

    def weight(self, batch):
        return 2 * len(batch[0])

    def train_step(self, batch):
        for name in ("a", "b"):
            yield name, Counted.apply(getattr(self, name)(batch[0])).square().mean()


def pair(**fit):
    torch.manual_seed(0)
    loop = ax.Loop(Pair(), {name: ax.Optimizer("sgd", lr=0.1) for name in ("a", "b")}, progress=False)
    result = loop.fit(table(64), epochs=1, **fit)
    return loop, result


def test_of_several_optimizers_one_part_is_in_memory_at_a_time():
    Counted.alive = Counted.peak = 0
    whole, _ = pair(batch_size=64)
    assert Counted.peak == 64
    Counted.alive = Counted.peak = 0
    parts, _ = pair(batch_size=64, microbatch=4)
    assert Counted.peak == 4
    for one, other in zip(whole.objective.parameters(), parts.objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, **DOUBLE)


def test_several_optimizers_with_a_weight_of_their_own_accumulate():
    whole, result = pair(batch_size=32)
    batches = list(ax.Loader(table(64), 16, shuffle=True).batches(0, 0))
    torch.manual_seed(0)
    loop = ax.Loop(Pair(), {name: ax.Optimizer("sgd", lr=0.1) for name in ("a", "b")}, progress=False)
    found = loop.fit(batches, epochs=1, accumulate=2)
    for name in ("train/loss", "train/a_loss", "train/b_loss"):
        assert found.values[name] == pytest.approx(result.values[name])
    for one, other in zip(whole.objective.parameters(), loop.objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, **DOUBLE)


def test_an_optimizer_whose_parameters_are_frozen_for_now_waits():
    for fit in ({}, {"microbatch": 4}):
        torch.manual_seed(0)
        objective = Pair()
        objective.b.requires_grad_(False)
        loop = ax.Loop(objective, {name: ax.Optimizer("sgd", lr=0.1) for name in ("a", "b")}, progress=False)
        assert loop.fit(table(64), epochs=1, batch_size=16, **fit).status == "completed"
        assert loop.state.optimizers["b"].steps == 0


class Measured(Terms):
    """Values that are no floats, and one that only some batches have; where nothing counts, a loss without a graph."""

    def split(self, batch):
        return batch[0], batch[1]

    def train_step(self, batch):
        x, y = batch
        kept = y == 1
        values = {"share": torch.stack([*kept]).float().mean() > 0.5, "count": kept.sum()}
        if bool((x[:, 0] > 1).any()):
            values["large"] = x[x[:, 0] > 1, 0].mean()
        if not bool(kept.any()):
            return ax.Step(torch.zeros(()), weight=0, values={"share": values["share"], "count": values["count"]})
        return ax.Step(F.cross_entropy(self.net(x[kept]), y[kept]), weight=int(kept.sum()), values=values)


def test_values_of_parts_are_means_of_those_that_have_them():
    x = torch.zeros(8, 6, dtype=torch.float64)
    x[0, 0] = 3.0
    y = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0])
    seen = []
    torch.manual_seed(0)
    loop = ax.Loop(Measured(), ax.Optimizer("sgd", lr=0.1), progress=False)
    loop.on("after_batch")(lambda state: seen.append({name: float(v) for name, v in state.last.values.items()}) or None)
    loop.fit([(x, y)], epochs=1, microbatch=2)
    # Parts of two samples: 2, 1, 0 and 1 of them count; the third has no graph, and no weight.
    assert seen == [{"share": pytest.approx(2 / 4), "count": pytest.approx((2 * 2 + 1 + 1) / 4), "large": 3.0}]


def test_a_batch_in_which_nothing_counts_is_told_as_without_parts():
    for fit in ({}, {"microbatch": 2}):
        loop = ax.Loop(Measured(), ax.Optimizer("sgd", lr=0.1), progress=False)
        with pytest.raises(ax.LossError, match="no graph"):
            loop.fit([(torch.zeros(8, 6, dtype=torch.float64), torch.zeros(8, dtype=torch.long))], epochs=1, **fit)


def test_a_retry_puts_back_buffers_that_were_not_there_metrics_and_generators():
    class Lazily(Hungry):
        def __init__(self, room):
            super().__init__(room)
            self.register_buffer("mean", None)
            self.own = torch.Generator().manual_seed(0)

        def predict(self, inputs):
            noise = torch.rand(len(inputs), 1, generator=self.own, dtype=inputs.dtype)
            if self.mean is None:
                self.mean = inputs.mean(0)
            return super().predict(inputs + self.mean + 0.01 * noise)

    def trained(**fit):
        torch.manual_seed(0)
        loop = ax.Loop(Lazily(17), ax.Optimizer("sgd", lr=0.1), progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ax.AxonWarning)
            loop.fit(table(64), epochs=1, batch_size=32, **fit)
        return loop.objective

    one, other = trained(microbatch=16), trained(microbatch="auto")
    assert torch.equal(one.own.get_state(), other.own.get_state())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_weights_of_whole_numbers_in_a_tensor_are_as_exact_as_others():
    class Whole(Tokens):
        def weight(self, batch):
            return batch["mask"].long().sum()

    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = (torch.arange(48) % 3 > 0).double()
    batch = [{"x": x, "y": (x.sum(1) > 0).long(), "mask": mask}]
    whole, _ = gradients(Whole, batch)
    parts, _ = gradients(Whole, batch, microbatch=5)
    for one, other in zip(whole[0], parts[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_a_part_of_weight_zero_with_sparse_gradients_adds_nothing():
    """Token weights as a tensor: of a part that is all padding the loss is 0/0, and so are its gradients."""

    class Words(ax.Objective):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.out = nn.Embedding(20, 4, sparse=sparse).double(), nn.Linear(4, 3).double()

        def predict(self, words):
            return self.out(self.words(words))

        def loss(self, logits, targets):
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

        def weight(self, batch):
            return (batch[1] != -1).sum()

    made = torch.Generator().manual_seed(0)
    words, targets = torch.randint(20, (8, 5), generator=made), torch.randint(3, (8, 5), generator=made)
    targets[2:4] = -1
    loops = []
    for sparse, fit in ((False, {}), (True, {}), (True, {"microbatch": 2})):
        loop = ax.Loop(Words(sparse), ax.Optimizer("sgd", lr=0.1), progress=False)
        loop.fit([(words, targets)] * 3, epochs=1, **fit)
        loops.append(loop)
    for other in loops[1:]:
        for one, two in zip(loops[0].objective.parameters(), other.objective.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
