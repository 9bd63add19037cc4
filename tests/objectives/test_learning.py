"""Objectives of every kind that learn: supervised, unlabelled, contrastive, with mappings, with another judge."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax


def loop_of(objective, lr=3e-3, name="adamw", **options):
    return ax.Loop(objective, ax.Optimizer(name, lr=lr), progress=False, **options)


@pytest.fixture(scope="module")
def digits():
    return ax.data.digits()


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


class Classifier(ax.Objective):
    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def predict(self, images):
        return self.net(images)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def test_a_classifier_learns_the_digits(digits):
    train, test = digits
    loop = loop_of(Classifier())
    result = loop.fit(train, test, epochs=6)
    assert result.status == "completed"
    assert result.values["val/accuracy"] > 0.9
    assert result.history["train/loss"][-1] < result.history["train/loss"][0] / 4
    right = loop.predict(test).argmax(1) == test.tensors[1]
    assert result.values["val/accuracy"] == pytest.approx(right.double().mean().item())


def test_a_regression_learns_and_its_metrics_are_those_of_its_predictions():
    x = torch.randn(600, 4)
    y = torch.sin(x[:, 0]) + x[:, 1] * x[:, 2] / 2
    train, test = ax.ArrayDataset(x[:500], y[:500, None]), ax.ArrayDataset(x[500:], y[500:, None])
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    loop = loop_of(ax.Supervised(net, "mse", metrics=["mae", "r2"]), lr=1e-2)
    result = loop.fit(train, test, epochs=25)
    assert result.values["val/r2"] > 0.9
    error = loop.predict(test)[:, 0] - y[500:]
    assert result.values["val/mae"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    spread = (y[500:] - y[500:].mean()).square().sum()
    assert result.values["val/r2"] == pytest.approx(1 - (error.square().sum() / spread).item(), rel=1e-4)


class Autoencoder(ax.Objective):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 12), nn.Linear(12, 64)

    def predict(self, images):
        return self.decoder(torch.relu(self.encoder(images)))

    def loss(self, predictions, images):
        return F.mse_loss(predictions, images)


def test_an_autoencoder_learns_from_unlabelled_bare_tensors(digits):
    images, held_out = digits[0].tensors[0], digits[1].tensors[0]
    loop = loop_of(Autoencoder(), lr=1e-2)
    before = loop.evaluate(ax.ArrayDataset(held_out))["loss"]
    result = loop.fit(ax.ArrayDataset(images), ax.ArrayDataset(held_out), epochs=8)
    assert result.values["val/loss"] < before / 4
    assert result.values["val/loss"] == pytest.approx(F.mse_loss(loop.predict(held_out), held_out).item(), rel=1e-5)


class Variational(ax.Objective):
    """Terms are sums over pixels and latents, means over samples, as the evidence lower bound has them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def predict(self, images):
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(latent), mean, log_variance

    def loss(self, predictions, images):
        logits, mean, log_variance = predictions
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return {"reconstruction": F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1).mean(), "kl": kl}


def test_a_variational_autoencoder_learns_and_each_of_its_terms_is_read(digits):
    train, test = (ax.ArrayDataset(part.tensors[0]) for part in digits)
    result = loop_of(Variational()).fit(train, test, epochs=8)
    for part in ("train", "val"):
        terms = [result.history[f"{part}/{name}"] for name in ("loss", "reconstruction", "kl")]
        assert len(terms[0]) == 8
        for loss, reconstruction, kl in zip(*terms, strict=True):
            assert loss == pytest.approx(reconstruction + kl, rel=1e-5)
            assert kl > 0
    assert result.history["val/reconstruction"][-1] < result.history["val/reconstruction"][0] * 0.9
    assert result.values["train/loss"] < 28 < result.history["train/loss"][0]


class Contrastive(ax.Objective):
    """Two views of each image; a view has to find its other among all of the batch (InfoNCE)."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def predict(self, images):
        return F.normalize(self.encoder(images), dim=1)

    def train_step(self, images):
        one, other = (self.predict(F.dropout(images, 0.4) + 0.1 * torch.randn_like(images)) for _ in range(2))
        likeness = one @ other.T / 0.2
        own = torch.arange(len(images))
        return ax.Step(F.cross_entropy(likeness, own), likeness, own, len(images))

    eval_step = train_step


def test_contrastive_learning_finds_the_other_view_without_labels(digits):
    train, test = (ax.ArrayDataset(part.tensors[0]) for part in digits)
    loop = loop_of(Contrastive(), metrics={"found": lambda likeness, own: (likeness.argmax(1) == own).float().mean()})
    loader = ax.Loader(test, 64, drop_last=True)
    before = loop.evaluate(loader)
    result = loop.fit(train, loader, epochs=10, batch_size=64)
    assert result.values["val/loss"] < before["loss"] * 0.75
    assert result.values["val/found"] > before["found"] * 1.5


class Named(Classifier):
    def predict(self, batch):
        return self.net(batch["image"])

    def loss(self, logits, batch):
        return F.cross_entropy(logits, batch["label"])

    metrics = ()


class SplitNamed(Classifier):
    def split(self, batch):
        return batch["image"], batch["label"]


@pytest.mark.parametrize("objective", [Named, SplitNamed])
def test_mapping_batches_are_passed_whole_or_split_by_the_objective(digits, objective):
    train, test = (ax.ArrayDataset({"image": part.tensors[0], "label": part.tensors[1]}) for part in digits)
    loop = loop_of(objective())
    result = loop.fit(train, test, epochs=5)
    accuracy = (loop.predict(test).argmax(1) == test.tensors[1]).float().mean().item()
    assert accuracy > 0.9
    assert loop.state.samples == 5 * len(train)
    if objective is SplitNamed:
        assert result.values["val/accuracy"] == pytest.approx(accuracy)


class Smoothed(Classifier):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def predict(self, images):
        return self.net(images + 0.2 * torch.randn_like(images))

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.3)


def test_evaluate_with_judges_by_another_objective_than_it_trains_by(digits):
    train, test = digits
    plain = Classifier()
    loop = loop_of(Smoothed(plain.net), evaluate_with=plain)
    result = loop.fit(train, test, epochs=6)
    by_hand = F.cross_entropy(plain.net(test.tensors[0]), test.tensors[1]).item()
    assert result.values["val/loss"] == pytest.approx(by_hand, rel=1e-5)
    assert result.values["val/accuracy"] > 0.9
    smoothed = F.cross_entropy(plain.net(train.tensors[0]), train.tensors[1], label_smoothing=0.3).item()
    assert result.values["train/loss"] > smoothed - 0.05 > by_hand + 0.3  # it was trained by the other one


@pytest.mark.parametrize(
    ("name", "model", "targets"),
    [
        ("mse", nn.Linear(3, 1), lambda y: y[:, None]),
        ("mae", nn.Linear(3, 1), lambda y: y[:, None]),
        ("huber", nn.Linear(3, 1), lambda y: y[:, None]),
        ("binary_cross_entropy", nn.Linear(3, 1), lambda y: (y > 0).float()[:, None]),
        ("cross_entropy", nn.Linear(3, 2), lambda y: (y > 0).long()),
        ("nll", nn.Sequential(nn.Linear(3, 2), nn.LogSoftmax(dim=1)), lambda y: (y > 0).long()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_supervised_takes_every_loss_by_name(name, model, targets):
    x = torch.randn(200, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    result = loop_of(ax.Supervised(model, name), lr=0.1).fit(ax.ArrayDataset(x, targets(y)), epochs=8)
    losses = result.history["train/loss"]
    assert losses[-1] < losses[0] / 2


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-3.0))

    def forward(self, logits, labels):
        return F.cross_entropy(logits * self.log_scale.exp(), labels)


def test_a_loss_that_is_a_module_is_trained_along(digits):
    criterion = Tempered()
    result = loop_of(ax.Supervised(nn.Linear(64, 10), criterion), lr=0.05).fit(digits[0], epochs=3)
    assert criterion.log_scale.item() > -2.5
    assert result.history["train/loss"][-1] < result.history["train/loss"][0] / 1.5


def test_a_callable_loss_may_return_terms(digits):
    def terms(logits, labels):
        return {"fit": F.cross_entropy(logits, labels), "size": 1e-3 * logits.square().mean()}

    result = loop_of(ax.Supervised(nn.Linear(64, 10), terms, metrics=["accuracy"]), lr=0.02).fit(*digits, epochs=4)
    assert result.values["val/accuracy"] > 0.9
    assert result.values["train/loss"] == pytest.approx(result.values["train/fit"] + result.values["train/size"], rel=1e-5)


def test_half_mse_and_half_mae_add_up_to_one():
    class Zero(ax.Objective):
        def __init__(self):
            super().__init__()
            self.weight_of_nothing = nn.Parameter(torch.zeros(1))

        def predict(self, x):
            return x * self.weight_of_nothing

        def loss(self, predictions, targets):
            return {"mse": F.mse_loss(predictions, targets) / 2, "mae": F.l1_loss(predictions, targets) / 2}

    ones = torch.ones(7, 1)
    result = loop_of(Zero(), lr=0.0, name="sgd").fit(ax.ArrayDataset(ones, ones), epochs=1, batch_size=3)
    assert result.values == {"train/loss": 1.0, "train/mse": 0.5, "train/mae": 0.5}


class Frozen(ax.Objective):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.body.requires_grad_(False)

    def predict(self, images):
        return self.head(torch.relu(self.body(images)))

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "nadam"])
def test_a_parameter_thawed_by_a_callback_is_trained_from_then_on(digits, name):
    loop = loop_of(Frozen(), lr=1e-2, name=name)
    body = loop.objective.body
    seen = [body.weight.detach().clone()]

    @loop.on("before_epoch")
    def thaw(state):
        body.requires_grad_(state.epoch >= 2)

    @loop.on("after_epoch")
    def look(state):
        seen.append(body.weight.detach().clone())

    loop.fit(digits[0], epochs=3)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert (seen[3] - seen[2]).abs().max() > 1e-3
