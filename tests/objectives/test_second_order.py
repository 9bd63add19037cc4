"""Losses that hold gradients: penalties on slopes, steps that are differentiated through."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax


class Critic(ax.Objective):
    """WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028); what it draws comes with the batch, so that parts draw the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def predict(self, noise):
        return self.generator(noise)

    def penalty(self, real, fake, share):
        between = torch.lerp(fake.to(real.dtype), real, share).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    def losses(self, name, batch):
        real, noise, share = batch
        if name == "generator":
            return -self.critic(self.generator(noise)).mean()
        fake = self.generator(noise).detach()
        distance = self.critic(fake).mean() - self.critic(real).mean()
        return {"distance": distance, "penalty": 10 * self.penalty(real, fake, share)}

    def train_step(self, batch):
        for name in ("critic", "critic", "generator"):
            yield name, self.losses(name, batch)


def batches(count=6, rows=12):
    made = torch.Generator().manual_seed(1)
    sizes = ((rows, 3), (rows, 2), (rows, 1))
    return [tuple(torch.rand(size, generator=made, dtype=torch.float64) for size in sizes) for _ in range(count)]


def loop_of(**options):
    specs = {name: ax.Optimizer("adam", lr=0.01, betas=(0.0, 0.9), **options) for name in ("generator", "critic")}
    return ax.Loop(Critic(), specs, progress=False)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_gradient_penalty_is_that_by_hand(clip):
    loop, hand = loop_of(clip_norm=clip), Critic()
    result = loop.fit(batches(), epochs=2)
    optimizers = {
        name: torch.optim.Adam(getattr(hand, name).parameters(), lr=0.01, betas=(0.0, 0.9), fused=True)
        for name in ("generator", "critic")
    }
    penalties = []
    for _ in range(2):
        for batch in batches():
            for name in ("critic", "critic", "generator"):
                loss = hand.losses(name, batch)
                parameters = list(getattr(hand, name).parameters())
                if isinstance(loss, dict):
                    penalties.append(float(loss["penalty"].detach()))
                    loss = sum(loss.values())
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.grad = g
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizers[name].step()
    for (name, one), other in zip(loop.objective.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=name)
    assert result.values["train/penalty"] == pytest.approx(sum(penalties[12:]) / 12)


@pytest.mark.parametrize("size", [4, 5, 11])
def test_a_gradient_penalty_in_parts_is_that_of_the_whole(size):
    whole, parts = loop_of(), loop_of()
    whole.fit(batches(), epochs=2)
    parts.fit(batches(), epochs=2, microbatch=size)
    for (name, one), other in zip(whole.objective.named_parameters(), parts.objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gradient_penalty_under_autocast_learns(precision):
    torch.manual_seed(0)
    objective = Critic().float()
    specs = {name: ax.Optimizer("adam", lr=0.01) for name in ("generator", "critic")}
    loop = ax.Loop(objective, specs, precision=precision, progress=False)
    data = [tuple(part.float() for part in batch) for batch in batches()]
    result = loop.fit(data, epochs=20)
    assert result.history["train/penalty"][-1] < 0.5 * result.history["train/penalty"][0]


def test_a_penalty_whose_slope_is_not_finite_is_skipped():
    """The square root of a slope of zero: its own slope is infinite, where the loss is finite."""

    class Flat(ax.Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3, 1).double()

        def predict(self, x):
            return self.net(x)

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets)

        def train_step(self, batch):
            x, scale = batch
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad((self.net(x) * scale).sum(), x, create_graph=True)
            return ax.Step(self.net(x).square().mean() + slope.norm(dim=1).mean(), weight=len(x))

    good = [(x, torch.ones(12, 1, dtype=torch.float64)) for x, _, _ in batches(4)]
    bad = (good[0][0].clone(), torch.full((12, 1), float("nan"), dtype=torch.float64))
    plain, guarded = (ax.Loop(Flat(), ax.Optimizer("adam", lr=0.01), progress=False) for _ in range(2))
    plain.fit([(x.detach().clone(), s) for x, s in good], epochs=1)
    with pytest.warns(ax.NonFiniteWarning, match="1 update"):
        guarded.fit([(x.detach().clone(), s) for x, s in (*good[:2], bad, *good[2:])], epochs=1)
    for one, other in zip(plain.objective.parameters(), guarded.objective.parameters(), strict=True):
        assert torch.equal(one, other)


class Adapting(ax.Objective):
    """One gradient step on five points, differentiated through (Finn et al. 2017, arXiv:1703.03400)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def predict(self, x):
        return self.net(x)

    def train_step(self, batch):
        weights = dict(self.net.named_parameters())

        def of_one(x, y, x_new, y_new):
            def loss(weights):
                return F.mse_loss(torch.func.functional_call(self.net, weights, (x,)), y)

            slopes = torch.func.grad(loss)(weights)
            fitted = {name: value - 0.1 * slopes[name] for name, value in weights.items()}
            return F.mse_loss(torch.func.functional_call(self.net, fitted, (x_new,)), y_new)

        return ax.Step(torch.func.vmap(of_one)(*batch).mean(), weight=len(batch[0]))


def tasks(count=4, rows=6):
    made = torch.Generator().manual_seed(2)
    return [tuple(torch.rand(rows, 5, 1, generator=made, dtype=torch.float64) for _ in range(4)) for _ in range(count)]


@pytest.mark.parametrize("fit", [{}, {"microbatch": 2}], ids=["whole", "parts"])
def test_a_step_is_differentiated_through(fit):
    loop, hand = ax.Loop(Adapting(), ax.Optimizer("sgd", lr=0.1), progress=False), Adapting()
    loop.fit(tasks(), epochs=2, **fit)
    for _ in range(2):
        for batch in tasks():
            losses = []
            for x, y, x_new, y_new in zip(*batch, strict=True):
                parameters = dict(hand.net.named_parameters())
                slopes = torch.autograd.grad(F.mse_loss(hand.net(x), y), list(parameters.values()), create_graph=True)
                fitted = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}
                losses.append(F.mse_loss(torch.func.functional_call(hand.net, fitted, (x_new,)), y_new))
            gradients = torch.autograd.grad(torch.stack(losses).mean(), list(hand.parameters()))
            with torch.no_grad():
                for p, g in zip(hand.parameters(), gradients, strict=True):
                    p.sub_(g, alpha=0.1)
    for (name, one), other in zip(loop.objective.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)
