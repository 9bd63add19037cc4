"""What a Loop leaves as it was: random generators, module modes, data; and what has no say in training."""

import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import axontrain as ax


def table(n=40, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


TRAIN, TEST = ax.ArrayDataset(*table()), ax.ArrayDataset(*table(16, seed=1))


class Noisy(ax.Objective):
    """Draws from every generator there is, in training and in evaluation."""

    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))

    def predict(self, x):
        x = x + 0.1 * torch.randn_like(x) + 0.1 * float(np.random.normal()) + 0.1 * random.random()
        return self.net(x)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def noisy_loop(objective=None, **options):
    if objective is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            objective = Noisy()
    return ax.Loop(objective, ax.Optimizer("adam", lr=0.01), **{"progress": False, **options})


def test_making_a_metric_draws_nothing_of_the_run():
    """It imports torchmetrics, which imports what is installed, and some of that draws: rich does, once in a process."""

    class Drawing(torchmetrics.MeanMetric):
        def __init__(self):
            super().__init__()
            random.random(), np.random.normal(), torch.rand(())

        def update(self, predictions, targets):
            super().update(predictions.mean())

    states = []
    for metrics in ((), {"drawing": Drawing}):
        loop = noisy_loop(metrics=metrics)
        loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
        states.append(loop.save())
    assert repr(states[0]["rng"]) == repr(states[1]["rng"])
    weights = [state["objective"] for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def generators():
    return torch.get_rng_state(), repr(np.random.get_state()[1:]), np.random.get_state()[1].copy(), random.getstate()


def assert_same(before, after):
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()
    assert before[3] == after[3]


def weights(loop):
    return {name: value.clone() for name, value in loop.objective.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def shuffled():
    return DataLoader(TensorDataset(*table()), batch_size=8, shuffle=True)


# --- random generators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda loop, data: loop.fit(data, data, epochs=2),
        lambda loop, data: loop.evaluate(data),
        lambda loop, data: loop.predict(data),
        lambda loop, data: list(loop.predict(data, stream=True)),
        lambda loop, data: next(loop.predict(data, stream=True)),
        lambda loop, data: [loop.train_on_batch((x, y)) for x, y in zip(*(t.split(8) for t in table()), strict=True)],
        lambda loop, data: list(loop.steps(data, data, epochs=1)),
        lambda loop, data: next(loop.steps(data, data, epochs=1)),
        lambda loop, data: loop.check(data, data),
        lambda loop, data: loop.restore(loop.save()),
    ],
    ids=["fit", "evaluate", "predict", "stream", "stream, left", "train_on_batch", "steps", "steps, left", "check", "save"],
)
@pytest.mark.parametrize("data", [lambda: TRAIN, shuffled], ids=["arrays", "DataLoader"])
def test_the_callers_generators_are_untouched(use, data):
    loop, data = noisy_loop(), data()
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    before = generators()
    use(loop, data)
    assert_same(before, generators())


def test_the_callers_generators_are_untouched_by_a_fit_that_fails():
    loop = noisy_loop()
    loop.on("after_batch")(lambda state: 1 / (state.step - 3) and None)
    before = generators()
    with pytest.raises(ZeroDivisionError):
        loop.fit(TRAIN, epochs=2, batch_size=8)
    assert_same(before, generators())


def test_the_callers_generators_have_no_say_in_training():
    results = []
    for seed in (1, 2):
        loop = noisy_loop()
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        loop.fit(shuffled(), shuffled(), epochs=2)
        results.append((weights(loop), loop.state.history))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_between_steps_the_generators_are_the_callers():
    def draws():
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    expected = [draws() for _ in range(5)]
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    loop, twin = noisy_loop(), noisy_loop()
    assert [draws() for _ in loop.steps(TRAIN, epochs=1, batch_size=8)] == expected
    twin.fit(TRAIN, epochs=1, batch_size=8)
    assert_equal(weights(loop), weights(twin))  # and the caller's draws had no say in it


def test_leaving_the_steps_does_not_take_the_callers_draws_back():
    torch.manual_seed(5)
    expected = [torch.rand(1).item() for _ in range(4)]
    torch.manual_seed(5)
    drawn = []
    for _ in noisy_loop().steps(TRAIN, epochs=1, batch_size=8):
        drawn.append(torch.rand(1).item())
        if len(drawn) == 3:
            break
    drawn.append(torch.rand(1).item())
    assert drawn == expected


def test_the_same_seed_gives_the_same_weights_and_readings_bit_for_bit():
    """Axon's loop_test.exs, with dropout and validation."""
    one, other, another = noisy_loop(seed=3), noisy_loop(seed=3), noisy_loop(seed=4)
    for loop in (one, other, another):
        loop.fit(TRAIN, TEST, epochs=3, batch_size=8)
    assert_equal(weights(one), weights(other))
    assert one.state.history == other.state.history
    assert one.state.history != another.state.history


def test_a_seed_of_none_is_taken_from_torchs_generator():
    seeds = []
    for start in (1, 1, 2):
        torch.manual_seed(start)
        seeds.append(noisy_loop(seed=None).state.seed)
    assert seeds[0] == seeds[1] != seeds[2]


# --- what has no say in training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", [TEST, ax.ArrayDataset(*table(7, seed=2)), shuffled()], ids=["16", "7", "DataLoader"])
@pytest.mark.parametrize("validate", ["1 epoch", 2])
def test_validation_does_not_change_training(validation, validate):
    plain, validated = noisy_loop(), noisy_loop()
    plain.fit(TRAIN, epochs=3, batch_size=8, validate=validate)
    validated.fit(TRAIN, validation, epochs=3, batch_size=8, validate=validate)
    assert_equal(weights(plain), weights(validated))
    assert plain.state.history["train/loss"] == validated.state.history["train/loss"]


def test_evaluation_within_a_fit_does_not_change_training():
    plain, evaluated = noisy_loop(), noisy_loop()

    @evaluated.on("after_batch")
    def look(state):
        evaluated.evaluate(TEST)
        evaluated.predict(TEST)

    for loop in (plain, evaluated):
        loop.fit(TRAIN, epochs=2, batch_size=8)
    assert_equal(weights(plain), weights(evaluated))


@pytest.mark.parametrize("style", ["terminal", "lines"])
def test_the_progress_bar_does_not_change_training(style, monkeypatch):
    monkeypatch.setattr("axontrain.callbacks.progress.REDRAW_SECONDS", 0.0)
    stream = io.StringIO()
    plain, shown = noisy_loop(), noisy_loop(callbacks=[ax.ProgressBar(style, stream=stream)])
    for loop in (plain, shown):
        loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert_equal(weights(plain), weights(shown))
    assert plain.state.history == shown.state.history
    assert "val/accuracy" in stream.getvalue()


def test_how_often_is_read_does_not_change_what_is_read():
    plain, read = noisy_loop(), noisy_loop()
    read.on("after_batch")(lambda state: state.read() and None)
    for loop in (plain, read):
        loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert plain.state.history == read.state.history
    assert_equal(weights(plain), weights(read))


def test_gradients_that_somebody_left_behind_are_not_in_the_first_update():
    plain, left = noisy_loop(), noisy_loop()
    for parameter in left.objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    for loop in (plain, left):
        loop.fit(TRAIN, steps=2, batch_size=8)
    assert_equal(weights(plain), weights(left))


def test_one_optimizer_serves_two_loops():
    optimizer = ax.Optimizer("adam", lr=0.01, schedule=ax.schedules.linear())
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        loop = ax.Loop(Noisy(), optimizer, progress=False)
        loop.fit(TRAIN, epochs=1)
        results.append(weights(loop))
    assert_equal(*results)


# --- modes ------------------------------------------------------------------------------------------------------------


def modes(loop):
    return [module.training for module in loop.objective.modules()]


@pytest.mark.parametrize(
    "use",
    [
        lambda loop: loop.fit(TRAIN, TEST, epochs=1),
        lambda loop: loop.evaluate(TEST),
        lambda loop: loop.predict(TEST),
        lambda loop: loop.train_on_batch(table(8)),
        lambda loop: next(loop.steps(TRAIN, epochs=1)),
        lambda loop: next(loop.predict(TEST, stream=True)),
        lambda loop: loop.check(TRAIN, TEST),
    ],
    ids=["fit", "evaluate", "predict", "train_on_batch", "steps", "stream", "check"],
)
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_train_and_eval_modes_are_put_back(use, mode):
    loop = noisy_loop()
    loop.objective.train(mode != "eval")
    if mode == "mixed":
        loop.objective.net[1].eval()
    before = modes(loop)
    use(loop)
    assert modes(loop) == before


def test_modes_are_put_back_after_an_error():
    loop = noisy_loop()
    loop.objective.eval()
    loop.on("after_batch")(lambda state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.fit(TRAIN, epochs=1)
    assert not any(modes(loop))


def test_training_is_in_train_mode_and_evaluation_in_eval_mode():
    seen = []

    class Looking(Noisy):
        def predict(self, x):
            seen.append((self.training, self.net[3].training, torch.is_grad_enabled()))
            return super().predict(x)

    loop = noisy_loop(Looking())
    loop.objective.eval()
    loop.fit(TRAIN, TEST, epochs=2, batch_size=40)
    assert seen == [(True, True, True), (False, False, False)] * 2


def test_a_part_that_its_user_put_into_eval_mode_stays_so():
    loop = noisy_loop()
    norm = loop.objective.net[1].eval()
    seen = []
    loop.on("after_batch")(lambda state: seen.append((norm.training, state.objective.training)))
    loop.fit(TRAIN, TEST, epochs=2, batch_size=20)
    assert seen == [(False, True)] * 4
    assert torch.equal(norm.running_mean, torch.zeros(16))


# --- data -------------------------------------------------------------------------------------------------------------


class Spoiling(Noisy):
    """Changes its batch in place, as augmentation does."""

    def predict(self, x):
        return super().predict(x.mul_(0).add_(1))

    def loss(self, logits, labels):
        return super().loss(logits, labels.zero_())


@pytest.mark.parametrize(
    "made",
    [
        lambda data: data,
        lambda data: ax.Loader(data, 8),
        lambda data: ax.Loader(data, 8, shuffle=True),
        lambda data: DataLoader(data, batch_size=8),
    ],
    ids=["bare", "Loader", "shuffled", "DataLoader"],
)
def test_what_is_done_to_a_batch_does_not_reach_the_arrays(made):
    x, y = table()
    array = x.numpy()  # shares memory with x
    data = made(ax.ArrayDataset(array, y))
    loop = noisy_loop(Spoiling())
    loop.fit(data, data, epochs=1)
    loop.evaluate(data)
    loop.predict(data)
    loop.check(data, data)
    assert torch.equal(x, table()[0])
    assert torch.equal(y, table()[1])


def test_predicting_does_not_change_a_tensor():
    x = table()[0]
    noisy_loop(Spoiling()).predict(x)
    assert torch.equal(x, table()[0])


def test_a_loader_of_the_users_is_left_as_it_was():
    loader = ax.Loader(TRAIN, 8, shuffle=True)
    list(loader)
    before = dict(vars(loader))
    loop = noisy_loop()
    loop.fit(loader, loader, epochs=2)
    loop.evaluate(loader), loop.predict(loader), loop.check(loader)
    assert vars(loader) == before
    assert loader.passes == 1


def test_a_seed_of_the_loaders_own_holds_in_a_loop():
    seen = []
    loop = noisy_loop()
    loop.on("after_batch")(lambda state: seen.append(state.last.targets))
    loop.fit(ax.Loader(TRAIN, 8, shuffle=True, seed=9), epochs=1)
    assert torch.equal(torch.cat(seen), table()[1][ax.order(9, 0, 40)])


def test_an_objective_does_not_come_to_know_its_loop():
    objective = Noisy()
    before = set(vars(objective))
    loop = noisy_loop(objective)
    loop.fit(TRAIN, TEST, epochs=1)
    assert set(vars(objective)) == before
