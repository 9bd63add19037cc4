"""Averages of weights: what is evaluated, saved and exported is the average, and training goes on with the raw weights."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from resume_runs import flat
from torch import nn

import axontrain as ax
from axontrain import averages


def table(n=40, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


TRAIN, TEST = table(), table(24, seed=1)


class Net(ax.Objective):
    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

    def predict(self, inputs):
        return self.net(inputs)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Gan(ax.Objective):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(3, 6), nn.Linear(6, 1)

    def predict(self, noise):
        return self.generator(noise)

    def train_step(self, batch):
        fake = self.generator(torch.randn(len(batch[0]), 3))
        yield "critic", (self.critic(fake.detach()) - self.critic(batch[0])).mean()
        yield "generator", -self.critic(fake).mean()


def loop_of(average, *, optimizer="adamw", directory=None, start=0, objective=Net, precision="fp32", **options):
    torch.manual_seed(start)
    made = ax.Optimizer(optimizer, lr=0.05, average=average, **options)
    return ax.Loop(objective(), made, progress=False, directory=directory, precision=precision)


def weights(loop):
    return {name: value.clone() for name, value in loop.objective.state_dict().items()}


def raw_weights(average, **fit):
    """What the module held after each step, and after the fit."""
    loop, seen = loop_of(average), []
    loop.on("after_batch")(lambda state: seen.append({k: v.clone() for k, v in state.objective.state_dict().items()}) or None)
    loop.fit(TRAIN, batch_size=8, **fit)
    return seen, weights(loop), loop


@pytest.mark.parametrize(
    ("average", "decay"),
    [
        (averages.ema(0.9), lambda n: min(0.9, (1 + n) / (10 + n))),
        (averages.ema(0.5, warmup=False), lambda n: 0.5),
        (averages.ema(over="20 steps", warmup=False), lambda n: math.exp(-1 / 20)),
        (averages.ema(over="100 samples", warmup=False), lambda n: math.exp(-8 / 100)),
        ("ema", lambda n: min(0.999, (1 + n) / (10 + n))),
    ],
    ids=["decay", "no warm-up", "steps", "samples", "by name"],
)
def test_a_moving_average_is_what_its_formula_says(average, decay):
    torch.manual_seed(0)
    expected = {name: value.double() for name, value in Net().state_dict().items()}
    seen, found, _ = raw_weights(average, epochs=2)
    for number, raw in enumerate(seen):
        d = decay(number)
        expected = {name: d * value + (1 - d) * raw[name].double() for name, value in expected.items()}
    for name, value in found.items():
        if value.is_floating_point():  # those of BatchNorm among them
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, seen[-1][name])


@pytest.mark.parametrize(
    ("average", "taken"),
    [
        ("swa", [15, 20]),  # of four epochs of five steps
        (averages.swa("50%", every="1 epoch"), [10, 15, 20]),
        (averages.swa("2 epochs", every="3 steps"), [12, 15, 18]),
        (averages.swa(0, every=1), range(1, 21)),
        (averages.swa("17 steps", every=2), [18, 20]),
    ],
)
def test_an_equal_average_is_the_mean_of_its_weights(average, taken):
    seen, found, _ = raw_weights(average, epochs=4)
    for name, value in found.items():
        if value.is_floating_point():
            mean = torch.stack([seen[step - 1][name].double() for step in taken]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_training_knows_nothing_of_it(average):
    without, _, _ = raw_weights(None, epochs=4)
    seen, _, _ = raw_weights(average, epochs=4)
    for one, other in zip(without, seen, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_before_it_begins_there_is_none():
    with pytest.warns(UserWarning, match="has not begun by step 10"):
        seen, found, _ = raw_weights(averages.swa("10 epochs"), epochs=2)
    assert all(torch.equal(value, seen[-1][name]) for name, value in found.items())


@pytest.mark.parametrize("average", [averages.ema(0.9), averages.swa(0, every=1)])
def test_what_is_evaluated_predicted_and_validated_is_the_average(average):
    loop = loop_of(average)
    result = loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    alone = Net()
    alone.load_state_dict(loop.objective.state_dict())
    judge = ax.Loop(alone, progress=False)
    expected = judge.evaluate(TEST)
    assert loop.evaluate(TEST) == expected
    assert result.values["val/loss"] == pytest.approx(expected["loss"], rel=1e-6)
    inputs = TEST.tensors[0]
    assert torch.equal(loop.predict(inputs), judge.predict(inputs))
    within = []
    loop.on("after_batch", first=1)(lambda state: within.append((weights(loop), loop.predict(inputs), weights(loop))) and None)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    before, predictions, after = within[0]
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the raw weights are back"
    raw = Net()
    raw.load_state_dict(before)
    assert not torch.equal(ax.Loop(raw, progress=False).predict(inputs), predictions)
    streamed = torch.cat(list(loop.predict(inputs, stream=True)))
    assert torch.equal(streamed, loop.predict(inputs))


@pytest.mark.parametrize("average", [averages.ema(0.9), averages.ema(over="64 samples"), averages.swa("20%", every=3), "swa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
@pytest.mark.parametrize("step", [3, 10, 18])
def test_a_run_that_is_resumed_ends_bitwise(tmp_path, average, precision, step):
    fit = {"train": TRAIN, "validation": TEST, "epochs": 4, "batch_size": 8, "validate": "4 steps"}
    whole = loop_of(average, precision=precision)
    result = whole.fit(**fit)
    first = loop_of(average, precision=precision, directory=tmp_path)
    steps = first.steps(**fit)
    for _ in range(step):
        next(steps)
    steps.close()
    again = loop_of(average, precision=precision, directory=tmp_path, start=1)
    found = again.fit(**fit, resume=True)
    assert found.history.rows == result.history.rows
    one, other = flat(whole.save()), flat(again.save())
    assert set(one) <= set(other), "beside those of saving"
    for name, leaf in one.items():
        if "elapsed" not in name and "/example/" not in name:
            assert torch.equal(leaf, other[name]) if isinstance(leaf, torch.Tensor) else leaf == other[name], name


@pytest.mark.parametrize("average", [averages.ema(0.9), averages.swa(0, every=1)])
def test_a_second_fit_goes_on_with_the_raw_weights(average):
    once, twice = loop_of(average), loop_of(average)
    once.fit(TRAIN, epochs=4, batch_size=8)
    twice.fit(TRAIN, epochs=2, batch_size=8)
    shown = weights(twice)
    twice.fit(TRAIN, epochs=2, batch_size=8)
    assert not torch.equal(shown["net.0.weight"], twice.objective.net[0].weight)
    for name, value in once.objective.state_dict().items():
        assert torch.equal(value, twice.objective.state_dict()[name]), name


@pytest.mark.parametrize("average", [averages.ema(0.9), averages.swa(0, every=1)])
def test_what_is_exported_is_the_average(tmp_path, average):
    loop = loop_of(average, directory=tmp_path / "run")
    loop.fit(TRAIN, epochs=2, batch_size=8)
    expected = weights(loop)
    for source in (tmp_path / "run", loop.save(), loop.save(tmp_path / "by_hand")):
        model = Net()
        ax.load_weights(model, source)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        alone = loop_of(None, start=1)
        alone.restore(source, only="objective")
        assert all(torch.equal(value, expected[name]) for name, value in alone.objective.state_dict().items())
    again = loop_of(average, start=1)
    again.restore(tmp_path / "run")
    assert all(torch.equal(value, expected[name]) for name, value in again.objective.state_dict().items())
    saved = []
    loop.on("after_batch", first=1)(lambda state: saved.append(loop.save()) and None)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    raw = saved[0]["optimizers"]["main"]["average"]["raw"]
    assert not torch.equal(saved[0]["objective"]["net.0.weight"], raw["net.0.weight"])


def test_a_skipped_update_changes_no_average():
    loop = loop_of(averages.ema(0.9))
    x, y = TRAIN.tensors
    kept = []

    @loop.on("after_batch")
    def keep(state):
        kept.append({name: value.clone() for name, value in state.optimizers["main"].average.average.items()})

    good, bad = (x[:8], y[:8]), (torch.full((8, 6), float("nan")), y[:8])
    with pytest.warns(ax.NonFiniteWarning):
        loop.fit([good, bad, good], epochs=1)
    for name, value in kept[0].items():
        assert torch.equal(value, kept[1][name]), name
    assert all(torch.isfinite(value).all() for value in kept[2].values())
    assert not torch.equal(kept[1]["net.0.weight"], kept[2]["net.0.weight"])


def test_each_optimizer_has_its_own():
    torch.manual_seed(0)
    optimizers = {
        "generator": ax.Optimizer("sgd", lr=0.1, average=averages.ema(0.5, warmup=False)),
        "critic": ax.Optimizer("sgd", lr=0.1),
    }
    loop = ax.Loop(Gan(), optimizers, progress=False)
    seen = []
    loop.on("after_batch")(lambda state: seen.append(weights(loop)) or None)
    first = weights(loop)
    loop.fit([(torch.randn(4, 6),) for _ in range(2)], epochs=1)
    expected = 0.25 * first["generator.weight"] + 0.25 * seen[0]["generator.weight"] + 0.5 * seen[1]["generator.weight"]
    torch.testing.assert_close(loop.objective.generator.weight, expected)
    assert torch.equal(loop.objective.critic.weight, seen[1]["critic.weight"])


def test_in_bfloat16_small_shares_are_not_rounded_away():
    loop = loop_of(averages.ema(0.999, warmup=False), precision="bf16-true", optimizer="sgd")
    loop.fit(TRAIN, epochs=1, batch_size=8)
    average = loop.state.optimizers["main"].average
    assert {value.dtype for value in average.average.values()} == {torch.float32}
    assert {value.dtype for value in loop.objective.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}


def test_what_is_thawed_later_joins():
    loop = loop_of(averages.ema(0.5, warmup=False), optimizer="sgd")
    last = loop.objective.net[4]
    last.requires_grad_(False)
    loop.on("after_batch", first=1)(lambda state: last.requires_grad_(True) and None)
    seen = []
    loop.on("after_batch")(lambda state: seen.append(last.weight.detach().clone()) or None)
    loop.fit(TRAIN, epochs=1, batch_size=8, limit=3)
    expected = 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]
    torch.testing.assert_close(last.weight, expected)


def test_tied_weights_are_averaged_once():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = self.net[0]

    loop = loop_of(averages.ema(0.9), objective=Tied)
    loop.fit(TRAIN, epochs=1, batch_size=8)
    saved = loop.save()["objective"]
    assert torch.equal(saved["again.weight"], saved["net.0.weight"])
    assert torch.equal(saved["again.weight"], loop.objective.net[0].weight)


def test_weights_that_were_put_in_between_fits_are_trained_on():
    loop = loop_of(averages.ema(0.9), optimizer="sgd")
    loop.fit(TRAIN, epochs=1, batch_size=8)
    other = Net()
    loop.objective.load_state_dict(other.state_dict())
    first = []
    loop.on("before_batch", first=1)(lambda state: first.append(weights(loop)) and None)
    with pytest.warns(ax.AxonWarning, match="the weights were changed since the last fit"):
        loop.fit(TRAIN, epochs=1, batch_size=8)
    assert all(torch.equal(value, first[0][name]) for name, value in other.state_dict().items())


def test_going_on_without_it_or_with_another_is_told_and_trains_the_raw_weights(tmp_path):
    def left(average, place):
        loop = loop_of(average, directory=place)
        steps = loop.steps(TRAIN, epochs=2, batch_size=8)
        for _ in range(5):
            next(steps)
        raw = weights(loop)
        steps.close()
        return raw

    for number, (before, after) in enumerate([("ema", None), ("ema", averages.swa(0, every=1)), (None, "ema")]):
        raw = left(before, tmp_path / str(number))
        again, first = loop_of(after, directory=tmp_path / str(number), start=1), []
        again.on("before_batch", first=1)(
            lambda state, first=first: first.append(copy.deepcopy(state.objective.state_dict())) and None
        )
        with pytest.warns(ax.AxonWarning, match="average of the optimizer 'main': it was .* that of this Loop"):
            again.fit(TRAIN, epochs=2, batch_size=8, resume=True)
        assert all(torch.equal(value, first[0][name]) for name, value in raw.items())


def test_by_hand_the_module_holds_the_raw_weights_and_is_evaluated_by_the_average():
    loop = loop_of(averages.ema(0.9), optimizer="sgd")
    batches = list(ax.Loader(TRAIN, 8))
    for batch in batches:
        loop.train_on_batch(batch)
    raw = weights(loop)
    average = dict(loop.state.optimizers["main"].average.average)
    assert not torch.equal(raw["net.0.weight"], average["net.0.weight"])
    alone = Net()
    alone.load_state_dict({**raw, **average})
    assert loop.evaluate(TEST) == ax.Loop(alone, progress=False).evaluate(TEST)
    assert all(torch.equal(value, raw[name]) for name, value in loop.objective.state_dict().items())
    loop.fit(TRAIN, epochs=1, batch_size=8)
    before, shown = loop.save(), weights(loop)
    fitted = before["optimizers"]["main"]["average"]["raw"]
    loop.train_on_batch(batches[0])
    one_step = loop.objective.net[0].weight - fitted["net.0.weight"]
    expected = loop_of(averages.ema(0.9), optimizer="sgd")
    expected.objective.load_state_dict({**shown, **fitted})
    expected.state.rng = before["rng"]
    expected.train_on_batch(batches[0])
    torch.testing.assert_close(one_step, expected.objective.net[0].weight - fitted["net.0.weight"])
    with pytest.raises(ax.ConfigurationError, match="knows no end"):
        loop_of("swa").train_on_batch(batches[0])


@given(st.integers(1, 4), st.sampled_from([1, 2, 5]), st.floats(0.0, 0.99), st.booleans())
@settings(max_examples=15, deadline=None)
def test_microbatches_and_averages_know_nothing_of_each_other(seed, microbatch, decay, warmup):
    def trained(**fit):
        torch.manual_seed(seed)
        objective = ax.Supervised(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double(), "cross_entropy")
        loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1, average=averages.ema(decay, warmup=warmup)), progress=False)
        x, y = TRAIN.tensors
        loop.fit(ax.ArrayDataset(x.double(), y), epochs=1, batch_size=10, **fit)
        return loop.objective

    for one, other in zip(trained().parameters(), trained(microbatch=microbatch).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ax.Optimizer("sgd", lr=1, average="emma"), "did you mean 'ema'"),
        (lambda: ax.Optimizer("sgd", lr=1, average=0.9), "average=float"),
        (lambda: ax.Optimizer("sgd", lr=1, average=averages.ema), "call it"),
        (lambda: averages.ema(1.0), "from 0 to below 1"),
        (lambda: averages.ema("0.9"), "from 0 to below 1"),
        (lambda: averages.ema(0.9, over="10 steps"), "one of the two"),
        (lambda: averages.ema(over="2 epochs"), "steps or samples"),
        (lambda: averages.ema(over=0), "above 0"),
        (lambda: averages.swa("75"), "has no unit"),
        (lambda: averages.swa(every=lambda state: True), "a duration"),
        (lambda: averages.swa(every=0), "never due"),
    ],
)
def test_what_is_no_average_is_told(make, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        make()


def test_a_state_of_other_weights_is_refused_and_changes_nothing():
    loop = loop_of("ema")
    loop.fit(TRAIN, epochs=1, batch_size=8)
    kept, before = loop.save(), weights(loop)
    kept["optimizers"]["main"]["average"]["raw"]["net.0.weight"] = torch.zeros(3)
    with pytest.raises(ax.CheckpointError, match=r"net.0.weight is \(3,\)"):
        loop.restore(kept)
    assert all(torch.equal(value, before[name]) for name, value in loop.objective.state_dict().items())


def test_without_averages_a_step_is_what_it_was():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = loop_of(None)
        assert loop.state.optimizers["main"].average is None
        assert type(loop._start.runner(None)).__name__ == "OneLoss"


class Masked(ax.Objective):
    """A causal mask of infinities among its buffers, and one that grows with the sequence."""

    def __init__(self):
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.triu(torch.full((6, 6), float("-inf")), 1))
        self.register_buffer("seen", torch.zeros(1))

    def predict(self, x):
        self.seen = x.new_zeros(x.shape[1] + int(len(self.seen) > x.shape[1]))  # it has another size each time
        scores = (self.query(x) @ x.transpose(1, 2) + self.mask).softmax(-1)
        return self.out(scores @ x)

    def loss(self, predictions, targets):
        return F.mse_loss(predictions, targets)


@pytest.mark.parametrize("average", ["ema", averages.swa(0, every=1)], ids=["ema", "swa"])
def test_infinities_that_are_meant_stay_infinities(average):
    loop = loop_of(average, objective=Masked)
    x = torch.randn(16, 6, 4)
    bad = (torch.full((8, 6, 4), float("nan")), x[:8])
    for _ in range(2):  # the second begins with what the first has left
        with pytest.warns(ax.NonFiniteWarning) as caught:
            result = loop.fit([(x[:8], x[8:]), bad, (x[8:], x[:8])], [(x, x)], epochs=1)
        assert len(caught) == 1
        assert math.isfinite(result.values["val/loss"])
        assert torch.equal(loop.objective.mask, Masked().mask)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("places", [(0,), (1, 1, 3)])
def test_with_skipped_updates_the_average_is_as_if_they_had_not_been(warmup, places):
    loops = [loop_of(averages.ema(0.99, warmup=warmup), optimizer="sgd") for _ in range(2)]
    x, y = TRAIN.tensors
    good = list(zip(x.split(8), y.split(8), strict=True))
    bad = list(good)
    for place in places:
        bad.insert(place, (torch.full((8, 6), float("nan")), y[:8]))
    loops[0].objective.net[3].p = loops[1].objective.net[3].p = 0.0  # dropout would draw otherwise
    loops[0].fit(good, epochs=1)
    with pytest.warns(ax.NonFiniteWarning):
        loops[1].fit(bad, epochs=1)
    for (name, one), other in zip(weights(loops[0]).items(), weights(loops[1]).values(), strict=True):
        assert torch.equal(one, other), name


def thawing(average, directory=None):
    loop = loop_of(average, optimizer="sgd", directory=directory)
    loop.callbacks.append(ax.Unfreeze("net.4.*", "2 epochs"))
    return loop


@pytest.mark.parametrize("average", [averages.ema(0.9), averages.swa("2 epochs", every="1 epoch")], ids=["ema", "swa"])
@pytest.mark.parametrize("step", [9, 10, 11, 15])
def test_what_is_thawed_joins_at_the_same_point_whoever_saves_or_resumes_there(tmp_path, average, step):
    fit = {"epochs": 5, "batch_size": 8}
    whole = thawing(average)
    whole.fit(TRAIN, **fit)
    saving = thawing(average, tmp_path / "saving")
    saving.fit(TRAIN, TEST, **fit)
    broken = thawing(average, tmp_path / "run")
    broken.on("after_batch")(lambda state: ax.Stop("enough") if state.step == step else None)
    broken.fit(TRAIN, **fit)
    again = thawing(average, tmp_path / "run")
    again.fit(TRAIN, **fit, resume=True)
    for other in (saving, again):
        for (name, value), theirs in zip(weights(whole).items(), weights(other).values(), strict=True):
            assert torch.equal(value, theirs), name


def test_an_average_that_never_begins_is_told():
    loop = loop_of(averages.swa(500))
    with pytest.warns(UserWarning, match=r"average=swa\(start='500 steps', every='1 epochs?'\) has not begun by step 5"):
        loop.fit(TRAIN, epochs=1, batch_size=8)
    with pytest.raises(ax.ConfigurationError, match="start='150%': of a fit there is no more than 100%"):
        averages.swa("150%")


@pytest.mark.parametrize("other", [None, "swa"])
def test_who_restores_without_the_average_is_told_that_these_are_the_raw_weights(tmp_path, other):
    loop = loop_of("ema")
    loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    path = loop.save(tmp_path / "state")
    again = loop_of(other)
    with pytest.warns(UserWarning, match=r"evaluated an average of its weights \(ema\).*only='objective'"):
        again.restore(path)
    assert again.evaluate(TEST)["loss"] != loop.state.values["val/loss"]
    again.restore(path, only="objective")
    assert again.evaluate(TEST)["loss"] == loop.state.values["val/loss"]


@pytest.mark.parametrize("over", ["100 samples", "30 steps"])
def test_a_last_batch_that_is_smaller_warms_up_with_the_others(over):
    """More steps than the warm-up of the usual batch takes, fewer than that of the last one."""
    x = torch.randn(33, 6, generator=torch.Generator().manual_seed(3))
    loop, kept = loop_of(averages.ema(over=over), optimizer="sgd"), []
    loop.objective.net = nn.Sequential(nn.Linear(6, 2))
    loop = ax.Loop(loop.objective, ax.Optimizer("sgd", lr=0.05, average=averages.ema(over=over)), progress=False)
    name = "net.0.weight"
    average, steps = loop.objective.net[0].weight.detach().double().clone(), 0

    @loop.on("after_batch")
    def fold(state):
        nonlocal average, steps
        samples = 1 if (state.step - 1) % 2 else 32
        decay = math.exp(-samples / 100) if "samples" in over else math.exp(-1 / 30)
        decay = min(decay, (1 + steps) / (10 + steps))
        average = decay * average + (1 - decay) * state.objective.net[0].weight.detach().double()
        steps += 1
        kept.append(state.optimizers["main"].average.average[name].double())

    loop.fit(ax.ArrayDataset(x, (x.sum(1) > 0).long()), epochs=400, batch_size=32)
    torch.testing.assert_close(kept[-1], average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_a_loop_with_an_average_can_be_copied(average):
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    data = ax.ArrayDataset(x, x.sum(1, keepdim=True))
    spec = ax.Optimizer("adamw", lr=1e-2, average=average)
    loop = ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), spec, progress=False)
    loop.fit(data, epochs=2, batch_size=8)
    copied = copy.deepcopy(loop)
    for each in (loop, copied):
        each.fit(data, epochs=4, batch_size=8)
    assert all(torch.equal(p, q) for p, q in zip(loop.objective.parameters(), copied.objective.parameters(), strict=True))
    assert not any(p is q for p, q in zip(loop.objective.parameters(), copied.objective.parameters(), strict=True))
