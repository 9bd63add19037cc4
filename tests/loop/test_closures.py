"""Optimizers that evaluate the loss by themselves, several times a step: LBFGS, and sharpness-aware minimization."""

import math

import pytest
import torch
import torch.nn.functional as F
from resume_runs import flat, same
from torch import nn

import axontrain as ax

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :1].sin() + X[:, 1:2] ** 2
DATA = ax.ArrayDataset(X, Y)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021, arXiv:2010.01412): the gradient where the loss is highest nearby."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure):
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p, _ in moved]))
        away = [p.grad * (group["rho"] / (norm + 1e-12)) for p, group in moved]
        for (p, _), by in zip(moved, away, strict=True):
            p.add_(by)
        loss = closure()
        for (p, group), by in zip(moved, away, strict=True):
            p.sub_(by)
            p.sub_(p.grad, alpha=group["lr"])
        return loss


class Curve(ax.Objective):
    """A fit by least squares; dropout and BatchNorm where they are asked for."""

    def __init__(self, *between):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *between, nn.Linear(8, 1)).double()
        self.evaluations = 0

    def predict(self, x):
        self.evaluations += 1
        return self.net(x)

    def loss(self, predictions, targets):
        return F.mse_loss(predictions, targets)


def loop_of(spec, *between, directory=None):
    return ax.Loop(Curve(*between), spec, progress=False, directory=directory)


def lbfgs(**options):
    return ax.Optimizer("lbfgs", lr=1.0, max_iter=5, line_search_fn="strong_wolfe", **options)


def assert_same(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_lbfgs_is_that_of_torch_by_hand():
    loop, hand = loop_of(lbfgs()), Curve()
    loop.fit(DATA, epochs=4, batch_size=24)
    optimizer = torch.optim.LBFGS(hand.parameters(), lr=1.0, max_iter=5, line_search_fn="strong_wolfe")
    for epoch in range(4):
        x, y = DATA.gather(ax.order(0, epoch, 24))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = hand.loss(hand.predict(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same(loop.objective, hand)
    assert loop.objective.evaluations == hand.evaluations, "the first is made once"
    assert loop.state.values["train/loss"] < 0.5


def test_sharpness_aware_minimization_is_that_by_hand():
    loop, hand = loop_of(ax.Optimizer(SAM, lr=0.1, rho=0.1)), Curve()
    loop.fit(DATA, epochs=3, batch_size=8)
    for epoch in range(3):
        for rows in ax.order(0, epoch, 24).split(8):
            x, y = DATA.gather(rows)
            hand.zero_grad()
            hand.loss(hand.predict(x), y).backward()
            with torch.no_grad():
                norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in hand.parameters()]))
                away = [p.grad * (0.1 / (norm + 1e-12)) for p in hand.parameters()]
                for p, by in zip(hand.parameters(), away, strict=True):
                    p.add_(by)
            hand.zero_grad()
            hand.loss(hand.predict(x), y).backward()
            with torch.no_grad():
                for p, by in zip(hand.parameters(), away, strict=True):
                    p.sub_(by)
                    p.sub_(p.grad, alpha=0.1)
    assert_same(loop.objective, hand)


@pytest.mark.parametrize("spec", [lbfgs(), ax.Optimizer(SAM, lr=0.1)])
@pytest.mark.parametrize("step", range(1, 6))
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, spec, step):
    fit = {"epochs": 2, "batch_size": 8}
    whole = loop_of(spec, nn.Dropout(0.2), directory=tmp_path / "whole")
    whole.fit(DATA, **fit)
    broken = loop_of(spec, nn.Dropout(0.2), directory=tmp_path / "run")
    broken.on("after_batch")(lambda state: ax.Stop("enough") if state.step == step else None)
    broken.fit(DATA, **fit)
    again = loop_of(spec, nn.Dropout(0.2), directory=tmp_path / "run")
    again.fit(DATA, **fit, resume=True)
    one, other = ({key: leaf for key, leaf in flat(loop.save()).items() if "elapsed" not in key} for loop in (whole, again))
    assert [key for key in one | other if not same(one.get(key), other.get(key))] == []


@pytest.mark.parametrize("spec", [lbfgs(), ax.Optimizer(SAM, lr=0.1, clip_norm=0.5)])
def test_it_is_one_function_of_the_weights_however_often_it_is_evaluated(spec):
    losses, hooks = [], []
    loop = loop_of(spec, nn.Dropout(0.5), nn.BatchNorm1d(8))

    class Watching(type(loop.objective)):
        def loss(self, predictions, targets):
            losses.append(super().loss(predictions, targets))
            return losses[-1]

    loop.objective.__class__ = Watching
    loop.on("after_backward")(lambda state: hooks.append(state.step))
    with torch.no_grad():
        before = [p.clone() for p in loop.objective.parameters()]
    loop.fit([(X, Y)], epochs=1)
    assert len(hooks) == len(losses) > 1
    assert int(loop.objective.net[3].num_batches_tracked) == 1, "one step is one batch"
    after = [p.clone() for p in loop.objective.parameters()]
    state = loop.save()
    other = loop_of(spec, nn.Dropout(0.5), nn.BatchNorm1d(8))
    other.fit([(X, Y)], epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(after, other.objective.parameters(), strict=True))
    assert same(flat(state["rng"])["/torch"], flat(other.save()["rng"])["/torch"])
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("spec", [lbfgs(), ax.Optimizer(SAM, lr=0.1, clip_norm=0.5)])
@pytest.mark.parametrize("microbatch", [5, 24])
def test_in_parts_it_is_the_same_to_rounding(spec, microbatch):
    whole, parts = loop_of(spec), loop_of(spec)
    whole.fit([(X, Y)] * 2, epochs=1)
    parts.fit([(X, Y)] * 2, epochs=1, microbatch=microbatch)
    for a, b in zip(whole.objective.parameters(), parts.objective.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("spec", [lbfgs(), ax.Optimizer(SAM, lr=0.1)])
def test_what_is_not_finite_at_first_or_later_changes_nothing(spec):
    class Cliff(Curve):
        calls, at = 0, 3

        def loss(self, predictions, targets):
            Cliff.calls += 1
            return super().loss(predictions, targets) * (math.nan if Cliff.calls == Cliff.at else 1.0)

    for at in (3, 4) if spec.factory is SAM else (1,):
        loops = [ax.Loop(kind(), spec, progress=False) for kind in (Curve, Cliff)]
        Cliff.calls, Cliff.at = 0, at
        loops[0].fit([(X, Y)], epochs=1)
        before = loops[0].save()["optimizers"]["main"]["optimizers"]
        with pytest.warns(ax.NonFiniteWarning, match="1 update"):
            loops[1].fit([(X, Y)] * 2, epochs=1)
        assert_same(loops[0].objective, loops[1].objective)
        after = loops[1].save()["optimizers"]["main"]["optimizers"]
        one, other = flat(before), flat(after)
        assert [key for key in one | other if not same(one.get(key), other.get(key))] == []


def test_a_schedule_moves_its_rate():
    rates = []
    spec = ax.Optimizer(SAM, lr=0.1, schedule=ax.schedules.linear())
    loop = loop_of(spec)
    loop.on("after_batch")(lambda state: rates.append(state.optimizers["main"].lr))
    loop.fit(DATA, epochs=1, batch_size=8)
    assert rates == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])


class Both(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None
        loss = closure()
        super().step()
        return loss


def test_one_that_could_do_without_is_told_by_closure():
    loop = loop_of(ax.Optimizer(Both, lr=0.1, closure=True))
    loop.fit([(X, Y)], epochs=1)
    assert loop.objective.evaluations == 2


def test_what_cannot_be_is_refused():
    with pytest.raises(ax.ConfigurationError, match="LBFGS compares gradients"):
        lbfgs(clip_norm=1.0)
    with pytest.raises(ax.ConfigurationError, match="closure='x': True or False"):
        ax.Optimizer("sgd", lr=0.1, closure="x")
    with pytest.raises(ax.ConfigurationError, match=r"groups\['\*.bias'\]: SGD beside lbfgs"):
        lbfgs(groups={"*.bias": {"optimizer": torch.optim.SGD}})
    with pytest.raises(ax.ConfigurationError, match="SAM beside sgd"):
        ax.Optimizer("sgd", lr=0.1, groups={"*.bias": {"optimizer": SAM}})
    two = {"a": ax.Optimizer(SAM, lr=0.1, params="net.0.*"), "b": ax.Optimizer("sgd", lr=0.1, params="net.2.*")}
    loop = loop_of(two)
    with pytest.raises(ax.ConfigurationError, match=r"the optimizer 'a' \(SAM\) evaluates the loss by itself"):
        loop.fit(DATA, epochs=1)


class Around(torch.optim.Optimizer):
    """SAM as it is published most often: an optimizer within, which shares its groups."""

    def __init__(self, params, lr, rho=0.05, listed=False):
        super().__init__(params, {"lr": lr, "rho": rho})
        base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.held = [base] if listed else base
        self.param_groups = base.param_groups

    @property
    def base(self):
        return self.held[0] if isinstance(self.held, list) else self.held

    @torch.no_grad()
    def step(self, closure=None):
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, group in moved:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=group["rho"])
        loss = closure()
        for p, _ in moved:
            p.copy_(self.state[p]["old"])
        self.base.step()
        return loss


@pytest.mark.parametrize("spec", [ax.Optimizer(Around, lr=0.1, closure=True, listed=listed) for listed in (False, True)])
@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_an_optimizer_within_another_goes_on_too(tmp_path, spec, step):
    test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, spec, step)


def test_groups_stay_shared_with_the_optimizer_within(tmp_path):
    spec = ax.Optimizer(Around, lr=0.1, closure=True)
    loop = loop_of(spec)
    loop.fit(DATA, epochs=1, batch_size=8)
    again = loop_of(spec)
    again.restore(loop.save())
    outer = again.state.optimizers["main"].optimizers[0]
    assert outer.param_groups is outer.base.param_groups
    assert any(state["momentum_buffer"].abs().sum() > 0 for state in outer.base.state.values())


@pytest.mark.parametrize("at", [2, 4, 8])
@pytest.mark.parametrize(
    "spec",
    [ax.Optimizer(Around, lr=0.1, closure=True), ax.Optimizer("lbfgs", lr=0.1, max_iter=4, max_eval=2)],
    ids=["within", "lbfgs"],
)
def test_a_later_evaluation_that_is_not_finite_leaves_nothing_behind(spec, at):
    class Pit(Curve):
        calls, at = 0, 0

        def loss(self, predictions, targets):
            Pit.calls += 1
            return super().loss(predictions, targets) * (math.nan if Pit.calls == Pit.at else 1.0)

    runs = []
    for place in (0, at):
        Pit.calls, Pit.at = 0, place
        loop = ax.Loop(Pit(), spec, progress=False)
        if place:
            with pytest.warns(ax.NonFiniteWarning, match="1 update"):
                loop.fit([(X, Y)] * 6, epochs=1)
        else:
            loop.fit([(X, Y)] * 5, epochs=1)
        runs.append(loop)
    assert_same(*(loop.objective for loop in runs))
    one, other = (flat(loop.save()["optimizers"]["main"]["optimizers"]) for loop in runs)
    assert [key for key in one | other if not same(one.get(key), other.get(key))] == []


@pytest.mark.parametrize("step", [2, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lbfgs_from_a_file_goes_on_bitwise(tmp_path, dtype, step):
    """What it remembers is in lists of tensors, which lie elsewhere in a file: products of float32 round by that."""
    table = ax.ArrayDataset(X.to(dtype), Y.to(dtype))

    def made(directory=None):
        objective = Curve().to(dtype)
        return ax.Loop(objective, ax.Optimizer("lbfgs", lr=0.5, max_iter=3), progress=False, directory=directory)

    whole, broken, again = made(), made(tmp_path), made(tmp_path)
    whole.fit(table, epochs=5, batch_size=8)
    broken.on("after_batch")(lambda state: ax.Stop("enough") if state.step == step else None)
    broken.fit(table, epochs=5, batch_size=8)
    again.fit(table, epochs=5, batch_size=8, resume=True)
    assert_same(whole.objective, again.objective)
