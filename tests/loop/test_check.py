"""loop.check: what it finds in objectives that are really faulty, and that it changes nothing."""

import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from unchanged import everything, same

import axontrain as ax


def table(n=40, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


TRAIN, TEST = ax.ArrayDataset(*table()), ax.ArrayDataset(*table(16, seed=1))


class Good(ax.Objective):
    """Dropout, BatchNorm and every generator there is: enough to be disturbed."""

    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def predict(self, x):
        return self.net(x + 0.01 * float(np.random.normal()) + 0.01 * random.random())

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def loop_of(objective, optimizer=None, **options):
    optimizer = optimizer or ax.Optimizer("adam", lr=0.01)
    return ax.Loop(objective, optimizer, **{"progress": False, **options})


def made(kind):
    torch.manual_seed(0)
    return kind()


def only_problem(report):
    assert not report.ok
    assert not report
    assert len(report.problems) == 1, str(report)
    return report.problems[0]


def test_a_good_objective_is_ok_and_the_report_says_what_was_seen():
    report = loop_of(made(Good)).check(TRAIN, TEST)
    assert report.ok, str(report)
    text = str(report)
    seen = ("Tensor(32, 6) float32", "(32, 2)", "the mean over 32 items", "the loss falls", "goes on the same", "validation")
    for part in seen:
        assert part in text


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "nadam"])
def test_a_good_objective_is_ok_with_any_optimizer(optimizer):
    assert loop_of(made(Good), ax.Optimizer(optimizer, lr=0.01)).check(TRAIN, TEST).ok


@pytest.mark.parametrize("average", ["ema", ax.averages.ema(over="100 samples"), ax.averages.swa(0, every=1)])
def test_averages_are_no_state_that_is_lost(average):
    report = loop_of(made(Good), ax.Optimizer("adamw", lr=0.01, average=average)).check(TRAIN, TEST)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda p, t: F.cross_entropy(p, t), False),
        (lambda p, t: F.cross_entropy(p, t, reduction="sum"), True),
        (lambda p, t: F.cross_entropy(p @ p.T, torch.arange(len(p))), True),
        (lambda p, t: F.cross_entropy(p, t) + torch.rand(()), False),  # nothing can be told of what draws
    ],
    ids=["mean", "sum", "contrastive", "noise"],
)
def test_a_loss_that_microbatches_would_change_is_noted(loss, told):
    torch.manual_seed(0)
    objective = ax.Supervised(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)), loss)
    report = loop_of(objective, ax.Optimizer("sgd", lr=0.001)).check(TRAIN)
    assert ("is not the mean of that of its halves" in str(report)) is told, str(report)


def test_a_long_warm_up_is_no_loss_that_cannot_fall():
    optimizer = ax.Optimizer("adam", lr=0.01, schedule=ax.schedules.cosine(warmup="90%"))
    assert loop_of(made(Good), optimizer).check(TRAIN).ok


# --- the five findings ------------------------------------------------------------------------------------------------


class WrongShape(Good):
    def loss(self, logits, labels):
        return F.cross_entropy(logits[:-1], labels)


class NoScalar(Good):
    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="none")


class NoGraph(Good):
    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels).detach()


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (WrongShape, "ValueError.*batch_size"),
        (NoScalar, r"LossError.*not a scalar but \(32,\)"),
        (NoGraph, "LossError.*no graph"),
    ],
)
def test_finds_shapes_that_do_not_fit(objective, told):
    problem = only_problem(loop_of(made(objective)).check(TRAIN))
    assert re.search(told, problem)


def test_finds_dtypes_that_do_not_fit():
    x, y = table()
    problem = only_problem(loop_of(made(Good)).check(ax.ArrayDataset(x.double(), y)))
    assert "float64" in problem
    assert "parameters are float32" in problem


def test_finds_validation_data_that_do_not_fit():
    x, y = table()
    problem = only_problem(loop_of(made(Good)).check(TRAIN, ax.ArrayDataset(x[:, :4], y)))
    assert "validation" in problem
    assert "(32, 4)" in problem


def test_finds_metrics_that_do_not_fit():
    loop = loop_of(made(Good), metrics={"broken": lambda predictions, targets: predictions})
    assert "'broken'" in only_problem(loop.check(TRAIN))


def test_finds_a_parameter_that_gets_no_gradient():
    class Unused(Good):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 3)

    problem = only_problem(loop_of(made(Unused)).check(TRAIN))
    assert "no gradient reaches spare.weight, spare.bias" in problem


def test_finds_a_path_that_is_cut():
    class Cut(Good):
        def predict(self, x):
            hidden = self.net[0](x).detach()
            return self.net[4](torch.relu(hidden))

    problem = only_problem(loop_of(made(Cut)).check(TRAIN))
    assert "net.0.weight" in problem
    assert "net.4.weight" not in problem


def test_finds_a_parameter_that_no_optimizer_covers():
    loop = loop_of(made(Good), {"head": ax.Optimizer("sgd", lr=0.1, params="net.4.*")})
    problem = only_problem(loop.check(TRAIN))
    assert "net.0.weight" in problem
    assert "net.4" not in problem


def test_finds_that_there_is_no_optimizer():
    loop = ax.Loop(made(Good), progress=False)
    assert "no optimizer" in only_problem(loop.check(TRAIN))


@pytest.mark.parametrize("lr", [0.0, 1e4])
def test_finds_a_rate_by_which_the_loss_cannot_fall(lr):
    class Line(ax.Objective):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(6, 1)

        def predict(self, x):
            return self.line(x).squeeze(1)

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets.float())

    problem = only_problem(loop_of(made(Line), ax.Optimizer("sgd", lr=lr)).check(TRAIN))
    assert "lr" in problem


def test_finds_a_loss_that_rises_as_it_learns():
    class Upwards(Good):
        def train_step(self, batch):
            step = super().train_step(batch)
            step.loss = step.loss.detach() * 2 - step.loss  # the gradient points the wrong way
            return step

    assert "does not fall" in only_problem(loop_of(made(Upwards)).check(TRAIN))


class HiddenTensor(Good):
    """Keeps a running mean that its state_dict does not have."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(6)

    def predict(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().predict(x - self.mean)


class HiddenNumber(Good):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def predict(self, x):
        self.calls += self.training
        return super().predict(x) / (1 + 0.01 * self.calls)


class HiddenBuffer(Good):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def predict(self, x):
        if self.training:
            self.seen += 1
        return super().predict(x) / (1 + 0.01 * self.seen)


class HiddenInAPart(Good):
    def __init__(self):
        super().__init__()
        self.inner = HiddenNumber()
        del self.net

    def predict(self, x):
        return self.inner.predict(x)


class HiddenInAList(Good):
    def __init__(self):
        super().__init__()
        self.memory = []

    def predict(self, x):
        if self.training:
            self.memory.append(x.detach().mean())
        return super().predict(x) + 0.1 * len(self.memory) * x[:, :2]


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (HiddenTensor, "mean"),
        (HiddenNumber, "calls"),
        (HiddenBuffer, "seen"),
        (HiddenInAPart, "inner.calls"),
        (HiddenInAList, "trains on differently"),
    ],
)
def test_finds_state_that_is_lost_when_saved_and_restored(objective, told):
    problem = only_problem(loop_of(made(objective)).check(TRAIN))
    assert problem.startswith("state is lost")
    assert told in problem


class Kept(HiddenNumber):
    """The same, saved as it should be."""

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_state_that_is_saved_is_no_problem():
    report = loop_of(made(Kept)).check(TRAIN)
    assert report.ok, str(report)


# --- data -------------------------------------------------------------------------------------------------------------


def test_finds_that_there_are_no_batches():
    assert "gives no batch" in only_problem(loop_of(made(Good)).check([]))
    assert "validation gives no batch" in only_problem(loop_of(made(Good)).check(TRAIN, []))


def test_an_iterator_is_not_read_and_the_report_says_so():
    batches = list(zip(*(part.split(8) for part in table()), strict=True))
    iterator = iter(batches)
    report = loop_of(made(Good)).check(iterator)
    assert report.ok
    assert "not looked at" in str(report)
    assert len(list(iterator)) == 5


def test_unlabelled_data_and_a_training_step_of_ones_own_are_ok():
    class Contrastive(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 4)

        def train_step(self, x):
            a, b = (F.normalize(self.net(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
            return ax.Step(F.cross_entropy(a @ b.T / 0.1, torch.arange(len(x))), weight=len(x))

        eval_step = train_step

    report = loop_of(made(Contrastive)).check(ax.ArrayDataset(table()[0]), ax.ArrayDataset(table(9)[0]))
    assert report.ok, str(report)


class Adversaries(ax.Objective):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = nn.Linear(2, 6), nn.Linear(6, 1)

    def train_step(self, real):
        fake = self.generator(torch.randn(len(real), 2))
        yield "discriminator", (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake.detach()))).mean()
        yield "generator", F.softplus(-self.discriminator(fake)).mean()


def test_several_optimizers_are_ok():
    loop = loop_of(made(Adversaries), {name: ax.Optimizer("adam", lr=0.01) for name in ("generator", "discriminator")})
    report = loop.check(ax.ArrayDataset(table()[0]))
    assert report.ok, str(report)


def test_a_judge_of_its_own_is_checked_with_its_own_metrics():
    class Judge(ax.Objective):
        metrics = ("mae",)

        def __init__(self, net):
            super().__init__()
            self.net = net

        def predict(self, x):
            return self.net(x).softmax(1)[:, 1]

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets.float())

    objective = made(Good)
    objective.metrics = {"nll": lambda logits, labels: F.cross_entropy(logits, labels)}  # not for a judge's probabilities
    loop = loop_of(objective, evaluate_with=Judge(objective.net))
    loop.evaluate(TEST)  # what the check is to foretell
    report = loop.check(TRAIN, TEST)
    assert report.ok, str(report)


# --- nothing is changed -----------------------------------------------------------------------------------------------


TRAINABLE = (Good, HiddenTensor, HiddenNumber, HiddenBuffer, HiddenInAPart, HiddenInAList, Kept)
FAULTY = (WrongShape, NoScalar, NoGraph)


@pytest.mark.parametrize(
    ("objective", "trained"),
    [*((kind, False) for kind in (*TRAINABLE, *FAULTY)), *((kind, True) for kind in TRAINABLE)],
    ids=lambda value: value.__name__ if isinstance(value, type) else "trained" if value else "fresh",
)
def test_nothing_is_changed(objective, trained):
    loop = loop_of(made(objective))
    if trained:
        loop.fit(TRAIN, TEST, epochs=1, batch_size=8)
        loop.fit(TRAIN, steps=2, batch_size=8)
    list(loop.objective.modules())[1].eval()
    for parameter in loop.objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    hidden = {name: getattr(loop.objective, name) for name in ("mean", "calls", "seen") if hasattr(loop.objective, name)}
    hidden = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in hidden.items()}
    length = len(getattr(loop.objective, "memory", ()))
    before = everything(loop)
    loop.check(TRAIN, TEST)
    after = everything(loop)
    for part in before:
        assert same(before[part], after[part]), part
    assert all(same(value, getattr(loop.objective, name)) for name, value in hidden.items())
    assert len(getattr(loop.objective, "memory", ())) == length


def test_training_is_the_same_after_a_check():
    plain, checked = loop_of(made(Good)), loop_of(made(Good))
    for loop in (plain, checked):
        loop.fit(TRAIN, TEST, steps=7, batch_size=8)
    checked.check(TRAIN, TEST)
    for loop in (plain, checked):
        loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert same(dict(plain.objective.state_dict()), dict(checked.objective.state_dict()))
    assert plain.state.history == checked.state.history


def test_a_judge_is_left_as_it_was():
    judge = made(Good)
    judge.net[0].eval()
    loop = loop_of(made(Good), evaluate_with=judge)
    before = {n: v.clone() for n, v in judge.state_dict().items()}
    loop.check(TRAIN, TEST)
    assert same(before, dict(judge.state_dict()))
    assert (judge.training, judge.net[0].training) == (True, False)


def test_loaders_and_iterables_are_left_as_they_were():
    loader = ax.Loader(TRAIN, 8, shuffle=True)
    list(loader)
    loop = loop_of(made(Good))
    loop.check(loader, loader)
    assert loader.passes == 1


def test_a_torch_loaders_own_generator_is_left_as_it_was():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*table()), batch_size=8, shuffle=True, generator=generator)
    before = generator.get_state()
    loop_of(made(Good)).check(loader, loader)
    assert torch.equal(before, generator.get_state())


def test_what_an_objective_does_to_a_batch_does_not_reach_a_list_of_batches():
    class Spoiling(Good):
        def predict(self, x):
            return super().predict(x.mul_(0.5))

    batches = list(zip(*(part.split(8) for part in table()), strict=True))
    before = batches[0][0].clone()
    loop_of(made(Spoiling)).check(batches, batches)
    assert torch.equal(batches[0][0], before)


def test_a_generator_of_the_objectives_own_is_left_as_it_was():
    class Own(Good):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def predict(self, x):
            return super().predict(x + 0.01 * torch.rand(x.shape, generator=self.generator))

    objective = made(Own)
    before = objective.generator.get_state()
    loop_of(objective).check(TRAIN, TEST)
    assert torch.equal(objective.generator.get_state(), before)


def test_the_report_escapes_what_it_shows_in_a_notebook():
    html = loop_of(made(Good), metrics={"<b>": lambda predictions, targets: predictions}).check(TRAIN)._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_a_generator_whose_losses_are_scaled_goes_on_the_same():
    class Adversaries(ax.Objective):
        def __init__(self):
            super().__init__()
            self.generator, self.discriminator = nn.Linear(8, 2), nn.Linear(2, 1)

        def train_step(self, real):
            fake = self.generator(real.repeat(1, 4))
            yield "discriminator", F.softplus(self.discriminator(fake.detach()) - self.discriminator(real)).mean()
            yield "generator", F.softplus(-self.discriminator(fake)).mean()

    optimizers = {name: ax.Optimizer("adamw", lr=1e-3) for name in ("generator", "discriminator")}
    report = ax.Loop(Adversaries(), optimizers, precision="fp16", progress=False).check(ax.ArrayDataset(torch.randn(256, 2)))
    assert report.ok, report
