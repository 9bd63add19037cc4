"""A GAN with two optimizers, and a language model whose means are over tokens."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax
from axontrain import schedules


class Gan(ax.Objective):
    """Learns a normal distribution with mean 3 and deviation 0.5."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        self.discriminator = nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def predict(self, noise):
        return self.generator(noise)

    def train_step(self, real):
        fake = self.generator(torch.randn(len(real), 2))
        yield (
            "discriminator",
            F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean(),
        )
        yield "generator", F.softplus(-self.discriminator(fake)).mean()


def reals(n=512):
    return ax.ArrayDataset(3 + 0.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(1)))


def gan(callbacks=(), **options):
    torch.manual_seed(0)
    optimizers = {name: ax.Optimizer("adam", lr=5e-3, betas=(0.5, 0.9), **options) for name in ("generator", "discriminator")}
    return ax.Loop(Gan(), optimizers, callbacks=callbacks, progress=False)


def test_a_gan_learns_where_the_data_lie():
    loop = gan()
    made = loop.predict(torch.randn(1000, 2))
    assert abs(made.mean().item()) < 1.5
    result = loop.fit(reals(), epochs=40, batch_size=64)
    made = loop.predict(torch.randn(1000, 2))
    assert made.mean().item() == pytest.approx(3, abs=0.6)
    assert made.std().item() < 1.2
    last = result.history.rows[-1]
    assert last["train/loss"] == pytest.approx(last["train/generator_loss"] + last["train/discriminator_loss"], rel=1e-5)


def test_the_step_counts_batches_however_many_optimizers_there_are():
    loop = gan()
    loop.fit(reals(), epochs=3, batch_size=64)
    assert (loop.state.step, loop.state.samples, loop.state.epoch) == (24, 3 * 512, 3)
    steps = {
        name: update.optimizers[0].state_dict()["state"][0]["step"].item() for name, update in loop.state.optimizers.items()
    }
    assert steps == {"generator": 24, "discriminator": 24}


def test_the_generators_loss_leaves_no_gradient_in_the_discriminator():
    loop = gan()
    turns = []

    @loop.on("after_backward")
    def look(state):
        parts = ("discriminator", "generator")
        turns.append([name for name in parts if any(p.grad is not None for p in getattr(state.objective, name).parameters())])

    loop.fit(reals(), steps=3)
    assert turns == [["discriminator"], ["generator"]] * 3


def test_each_optimizer_clips_its_own_gradients():
    torch.manual_seed(0)
    bounds = {"generator": 1e-3, "discriminator": 1e-2}
    loop = ax.Loop(Gan(), {n: ax.Optimizer("sgd", lr=1.0, clip_norm=b) for n, b in bounds.items()}, progress=False)
    before = {name: p.detach().clone() for name, p in loop.objective.named_parameters()}
    loop.fit(reals(), steps=1)
    for part, bound in bounds.items():
        moved = [p.detach() - before[name] for name, p in loop.objective.named_parameters() if name.startswith(part)]
        assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(bound, rel=1e-2)


def test_each_optimizer_has_its_own_schedule_by_steps_of_the_batch():
    torch.manual_seed(0)
    loop = ax.Loop(
        Gan(),
        {
            "generator": ax.Optimizer("sgd", lr=1e-2, schedule=schedules.linear()),
            "discriminator": ax.Optimizer("sgd", lr=2e-2, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)),
        },
        callbacks=[ax.LearningRate(every=1)],
        progress=False,
    )
    history = loop.fit(reals(), steps=5).history
    assert history["lr/generator"] == pytest.approx([1e-2 * (1 - k / 5) for k in range(5)])
    # A torch scheduler has stepped already when the batch is over: what is read is the rate of the next update.
    assert history["lr/discriminator"] == pytest.approx([2e-2, 1e-2, 1e-2, 5e-3, 5e-3])


def test_a_generator_may_return_a_step_with_predictions_for_the_metrics():
    class Two(ax.Objective):
        metrics = ("mae",)

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)

        def train_step(self, batch):
            x, y = batch
            yield "a", F.mse_loss(self.a(x), y)
            both = self.a(x).detach() + self.b(x)
            loss = F.mse_loss(both, y)
            yield "b", loss
            return ax.Step(loss, both, y, len(x))

    torch.manual_seed(0)
    x = torch.randn(64, 1)
    loop = ax.Loop(Two(), {name: ax.Optimizer("sgd", lr=0.1) for name in "ab"}, progress=False)
    result = loop.fit(ax.ArrayDataset(x, 2 * x), epochs=30)
    assert result.values["train/mae"] < 0.05 < result.history["train/mae"][0]
    assert result.values["train/loss"] == pytest.approx(result.values["train/b_loss"])


VERSE = """tyger tyger burning bright
in the forests of the night
what immortal hand or eye
could frame thy fearful symmetry
in what distant deeps or skies
burnt the fire of thine eyes
on what wings dare he aspire
what the hand dare seize the fire
and what shoulder and what art
could twist the sinews of thy heart
and when thy heart began to beat
what dread hand and what dread feet""".splitlines()
PAD = 0
ALPHABET = sorted(set("".join(VERSE)))


def verse():
    width = max(map(len, VERSE)) + 1
    rows = [[1 + ALPHABET.index(letter) for letter in line] + [PAD] * (width - len(line)) for line in VERSE]
    return torch.tensor(rows)


class Letters(ax.Objective):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET) + 1, 32)
        self.recurrent = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, len(ALPHABET) + 1)

    def split(self, lines):
        return lines[:, :-1], lines[:, 1:]

    def predict(self, letters):
        return self.head(self.recurrent(self.embed(letters))[0])

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)

    def weight(self, lines):
        return (lines[:, 1:] != PAD).sum()


def test_a_language_model_learns_its_verse():
    torch.manual_seed(0)
    loop = ax.Loop(Letters(), ax.Optimizer("adamw", lr=1e-2, clip_norm=1.0), progress=False)
    losses = loop.fit(ax.ArrayDataset(verse()), epochs=40, batch_size=4).history["train/loss"]
    assert losses[0] > 0.6 * math.log(len(ALPHABET))
    assert losses[-1] < 0.5


def test_the_reading_of_a_language_model_is_the_mean_over_tokens():
    torch.manual_seed(0)
    lines = verse()
    loop = ax.Loop(Letters(), ax.Optimizer("sgd", lr=0.0), progress=False)
    result = loop.fit(ax.ArrayDataset(lines), ax.ArrayDataset(lines), epochs=1, batch_size=5)  # batches of 5, 5 and 2
    with torch.no_grad():
        each = F.cross_entropy(
            loop.objective(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten(), ignore_index=PAD, reduction="none"
        )
    over_tokens = each.sum().item() / (lines[:, 1:] != PAD).sum().item()
    assert result.values["train/loss"] == pytest.approx(over_tokens, rel=1e-6)
    assert result.values["val/loss"] == pytest.approx(over_tokens, rel=1e-6)
    with torch.no_grad():
        of_batches = [loop.objective.eval_step(lines[i : i + 5]).loss.item() for i in (0, 5, 10)]
    assert abs(sum(of_batches) / 3 - over_tokens) > 1e-4  # a mean that ignored tokens would have been seen
