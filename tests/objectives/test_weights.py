"""Sample weights and class weights, from the batch to the loss, the gradient, the means and the metrics."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from host_reads import NoHostReads
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tensors import classes, holes, random
from torch import nn

import axontrain as ax
from axontrain import ConfigurationError, LossError, MetricError, SplitError, Step

ROWS = 12
# Without average_precision: a model may give copies of one sample scores that differ in the last bit, and no longer tie.
COUNTED = ["accuracy", "precision", "recall", "f1", "dice", "iou", "confusion_matrix", "auroc"]
CLASSED = [*COUNTED, "top2"]
NUMBERS = ["mse", "rmse", "mae", "r2"]


class Tokens(nn.Module):
    """(B, T, 6) -> (B, C, T), as cross_entropy takes them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)

    def forward(self, x):
        return self.net(x).transpose(1, 2)


def net(outputs):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


X = random(ROWS, 6)
CASES = {
    "cross_entropy": (lambda: net(4), X, classes(4, ROWS), "cross_entropy", CLASSED),
    "ignored": (lambda: net(4), X, holes(classes(4, ROWS)), "cross_entropy", CLASSED),
    "soft": (lambda: net(4), X, random(ROWS, 4, seed=5).softmax(1), "cross_entropy", CLASSED),
    "tokens": (Tokens, random(ROWS, 3, 6), classes(4, ROWS, 3), "cross_entropy", [*CLASSED, "perplexity"]),
    "ignored tokens": (Tokens, random(ROWS, 3, 6), holes(classes(4, ROWS, 3)), "cross_entropy", [*CLASSED, "perplexity"]),
    "nll": (lambda: nn.Sequential(net(4), nn.LogSoftmax(1)), X, classes(4, ROWS), "nll", CLASSED),
    "binary": (lambda: net(1), X, classes(2, ROWS, 1).float(), "binary_cross_entropy", COUNTED),
    "labels": (lambda: net(3), X, classes(2, ROWS, 3), "binary_cross_entropy", COUNTED),
    "mse": (lambda: net(1), X, random(ROWS, 1, seed=3), "mse", NUMBERS),
    "mae": (lambda: net(2), X, random(ROWS, 2, seed=3), "mae", [*NUMBERS, "cosine_similarity"]),
    "huber": (lambda: net(2), X, 3 * random(ROWS, 2, seed=3), "huber", [*NUMBERS, "cosine_similarity"]),
}
WITH_CLASSES = {
    "cross_entropy": [0.5, 2.0, 1.0, 0.25],
    "ignored": [0.5, 2.0, 1.0, 0.25],
    "tokens": [0.5, 2.0, 1.0, 0.25],
    "ignored tokens": [0.5, 2.0, 1.0, 0.25],
    "nll": [0.5, 2.0, 1.0, 0.25],
    "binary": [0.5, 2.0],
    "labels": [0.5, 2.0],
}
WEIGHTS = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS).filter(lambda of: sum(w > 0 for w in of) > 1)


def objective_of(case, *, metrics=True, **options):
    torch.manual_seed(0)
    make, _, _, loss, names = CASES[case]
    return ax.Supervised(make(), loss, metrics=names if metrics else None, **options)


def gradients(objective, batch):
    objective.zero_grad()
    step = objective.train_step(batch)
    step.loss.backward()
    return step, [p.grad.clone() for p in objective.parameters()]


def close(got, wanted, within=1e-5):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=within, atol=1e-6)


def agree(got, wanted, within=1e-5):
    assert got.keys() == wanted.keys()
    for name in got:
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(wanted[name]), rtol=within, atol=within, err_msg=name)


def evaluated(objective, arrays, batch_size=ROWS):
    loop = ax.Loop(objective, device="cpu", progress=False)
    return loop.evaluate(ax.ArrayDataset(*arrays), batch_size=batch_size)


# --- the two laws ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(sorted(CASES)), weights=WEIGHTS, dtype=st.sampled_from([torch.float32, torch.float64, torch.long]))
def test_an_integer_weight_is_so_many_copies(case, weights, dtype):
    _, x, y, _, _ = CASES[case]
    copies = torch.tensor(weights)
    repeated = x.repeat_interleave(copies, 0), y.repeat_interleave(copies, 0)
    weighted, plain = objective_of(case, sample_weights=True), objective_of(case)
    step, found = gradients(weighted, (x, y, copies.to(dtype)))
    wanted_step, wanted = gradients(plain, repeated)
    torch.testing.assert_close(step.loss, wanted_step.loss, rtol=1e-5, atol=1e-6)
    assert step.loss.dtype == torch.float32
    close(found, wanted)
    agree(evaluated(weighted, (x, y, copies.to(dtype))), evaluated(plain, repeated, len(repeated[0])))


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    weights=st.lists(st.floats(0, 100), min_size=ROWS, max_size=ROWS),
    size=st.integers(1, ROWS),
    of_classes=st.booleans(),
)
def test_splitting_the_batch_changes_nothing(case, weights, size, of_classes):
    _, x, y, _, _ = CASES[case]
    weights = torch.tensor(weights)
    weights[[1, 7]] += 1
    options = {"class_weights": WITH_CLASSES[case]} if of_classes and case in WITH_CLASSES else {}
    objective = objective_of(case, sample_weights=True, **options)
    agree(evaluated(objective, (x, y, weights), size), evaluated(objective, (x, y, weights)))
    whole, wanted = gradients(objective, (x, y, weights))
    parts = [gradients(objective, tuple(t[i : i + size] for t in (x, y, weights))) for i in range(0, ROWS, size)]
    total = sum(float(step.weight) for step, _ in parts)
    assert total == pytest.approx(float(whole.weight))
    summed = [sum(float(step.weight) / total * of[i] for step, of in parts) for i in range(len(wanted))]
    close(summed, wanted, 1e-4)


# --- class weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cross_entropy", "ignored", "tokens", "ignored tokens"])
def test_class_weights_are_torchs_own(case):
    _, x, y, _, _ = CASES[case]
    weights = torch.tensor(WITH_CLASSES[case])
    objective = objective_of(case, class_weights=weights)
    step, found = gradients(objective, (x, y))
    by_hand = F.cross_entropy(objective(x), y, weight=weights)
    torch.testing.assert_close(step.loss, by_hand)
    objective.zero_grad()
    by_hand.backward()
    close(found, [p.grad for p in objective.parameters()])
    kept = y[y >= 0]
    assert float(step.weight) == pytest.approx(float(weights[kept].sum()))


def test_class_weights_of_the_other_losses():
    _, x, y, _, _ = CASES["nll"]
    objective = objective_of("nll", class_weights=WITH_CLASSES["nll"])
    weights = torch.tensor(WITH_CLASSES["nll"])
    torch.testing.assert_close(objective.train_step((x, y)).loss, F.nll_loss(objective(x), y, weight=weights))
    for case in ("binary", "labels"):
        _, x, y, _, _ = CASES[case]
        objective = objective_of(case, class_weights=[0.5, 2.0])
        each = torch.where(y > 0.5, 2.0, 0.5)
        losses = F.binary_cross_entropy_with_logits(objective(x), y.float(), reduction="none")
        torch.testing.assert_close(objective.train_step((x, y)).loss, (each * losses).sum() / each.sum())


@pytest.mark.parametrize("case", WITH_CLASSES)
def test_class_weights_and_sample_weights_multiply(case):
    _, x, y, _, _ = CASES[case]
    of_samples = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    table = torch.tensor(WITH_CLASSES[case])
    each = torch.where(y == -100, 0, table[y.long().clamp(0)]) * of_samples.reshape(ROWS, *[1] * (y.dim() - 1))
    both = objective_of(case, class_weights=WITH_CLASSES[case], sample_weights=True)
    alone = objective_of(case, sample_weights=True)
    step, found = gradients(both, (x, y, of_samples))
    wanted_step, wanted = gradients(alone, (x, y, each))
    torch.testing.assert_close(step.loss, wanted_step.loss)
    torch.testing.assert_close(step.sample_weights, each)
    close(found, wanted)
    agree(evaluated(both, (x, y, of_samples)), evaluated(alone, (x, y, each)))


def test_class_weights_reach_the_metrics():
    # Balanced weights make of accuracy the balanced one.
    x, y = random(60, 6), torch.cat([torch.zeros(40), torch.ones(20)]).long()
    torch.manual_seed(0)
    objective = ax.Supervised(net(2), "cross_entropy", metrics=["accuracy"], class_weights={0: 0.75, 1: 1.5})
    right = objective(x).argmax(1) == y
    wanted = (right[:40].double().mean() + right[40:].double().mean()) / 2
    assert evaluated(objective, (x, y), 7)["accuracy"] == pytest.approx(float(wanted), abs=1e-6)


@pytest.mark.parametrize(
    "given", [[0.5, 2, 1, 0.25], (0.5, 2, 1, 0.25), {2: 1, 0: 0.5, 3: 0.25, 1: 2}, np.array([0.5, 2, 1, 0.25])]
)
def test_class_weights_are_a_buffer(given):
    objective = objective_of("cross_entropy", class_weights=given)
    assert torch.equal(objective.state_dict()["class_weights"], torch.tensor([0.5, 2, 1, 0.25]))
    assert objective.to("meta").class_weights.is_meta
    assert "class_weights" not in objective_of("cross_entropy").state_dict()


def test_class_weights_survive_saving_and_training(tmp_path):
    def loop(weights):
        objective = objective_of("cross_entropy", class_weights=weights)
        return ax.Loop(objective, ax.Optimizer("adamw", lr=0.1), device="cpu", progress=False)

    first, second = loop([0.5, 2, 1, 0.25]), loop([1, 1, 1, 1])
    data = ax.ArrayDataset(X, CASES["cross_entropy"][2])
    first.fit(data, epochs=2, batch_size=4)
    second.restore(first.save(tmp_path / "state"))
    assert torch.equal(second.objective.class_weights, torch.tensor([0.5, 2, 1, 0.25]))
    for one in (first, second):
        one.fit(data, epochs=1, batch_size=4)
    close(second.objective.parameters(), first.objective.parameters(), 0)


@pytest.mark.parametrize(
    ("loss", "weights", "says"),
    [
        ("mse", [1, 2], r"losses that have classes, cross_entropy, nll, binary_cross_entropy, not with 'mse'"),
        (F.cross_entropy, [1, 2], "not with a callable: give sample_weights=True"),
        ("cross_entropy", {0: 1, 2: 3}, r"classes \[0, 2\], and none for \[1\]"),
        ("cross_entropy", {}, r"classes \[\], and none for"),
        ("cross_entropy", {"a": 1, "b": 3}, r"classes \['a', 'b'\], and none for \[0, 1\]"),
        ("cross_entropy", [[1, 2], [3, 4]], r"takes numbers, one for each class, not list of 2"),
        ("cross_entropy", "balanced", "takes numbers, one for each class, not str"),
        ("cross_entropy", 3.0, "takes numbers, one for each class, not float"),
        ("cross_entropy", [1, -1], r"holds \[1.0, -1.0\]: weights are finite and not negative"),
        ("cross_entropy", [1, math.nan], "finite and not negative"),
        ("binary_cross_entropy", [1, 2, 3], "takes numbers, two, of the classes 0 and 1"),
    ],
)
def test_class_weights_that_cannot_be(loss, weights, says):
    with pytest.raises(ConfigurationError, match=says):
        ax.Supervised(net(4), loss, class_weights=weights)


def test_class_weights_that_fit_neither_predictions_nor_targets():
    with pytest.raises(LossError, match=r"has 3 weights, and predictions are Tensor\(12, 4\)"):
        objective_of("cross_entropy", class_weights=[1, 1, 1]).train_step((X, classes(3, ROWS)))
    with pytest.raises(LossError, match="targets that are class numbers, not probabilities"):
        objective_of("cross_entropy", class_weights=[1, 1, 1, 1]).train_step((X, CASES["soft"][2]))
    with pytest.raises(IndexError, match="out of bounds"):
        objective_of("cross_entropy", class_weights=[1, 1, 1, 1]).train_step((X, classes(4, ROWS) + 1))
    with pytest.raises(RuntimeError, match="multi-target not supported"):
        objective_of("cross_entropy", class_weights=[1, 1, 1, 1]).train_step((X, classes(4, ROWS, 1)))


# --- sample weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_weights_zero_adds_nothing(case):
    _, x, y, _, _ = CASES[case]
    objective = objective_of(case, sample_weights=True)
    step, found = gradients(objective, (x, y, torch.zeros(ROWS)))
    assert step.loss == 0
    assert step.weight == 0
    assert step.loss.requires_grad
    assert all(not gradient.any() for gradient in found)


@pytest.mark.parametrize("case", CASES)
def test_what_weighs_nothing_may_be_missing(case):
    _, x, y, _, _ = CASES[case]
    objective, kept = objective_of(case, sample_weights=True), torch.arange(ROWS) % 3 != 1
    weights = torch.where(kept, 2.0, 0.0)
    y = y.clone()
    y[~kept] = math.nan if y.is_floating_point() else 10**6 if "label" not in case else 1
    step, found = gradients(objective, (x, y, weights))
    wanted_step, wanted = gradients(objective, (x[kept], y[kept], weights[kept]))
    torch.testing.assert_close(step.loss, wanted_step.loss)
    close(found, wanted)
    agree(evaluated(objective, (x, y, weights), 5), evaluated(objective, (x[kept], y[kept], weights[kept])))


def test_weights_of_tokens():
    _, x, y, _, _ = CASES["ignored tokens"]
    weights = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(3))
    objective = objective_of("ignored tokens", sample_weights=True)
    step = objective.train_step((x, y, weights))
    each = weights * (y != -100)
    losses = F.cross_entropy(objective(x), y, reduction="none")
    torch.testing.assert_close(step.loss, (each * losses).sum() / each.sum())
    torch.testing.assert_close(step.weight, each.sum())


def test_weights_in_half_precision_are_summed_in_single():
    x, y = random(3000, 6), classes(4, 3000)
    objective = objective_of("cross_entropy", metrics=False, sample_weights=True)
    step = objective.train_step((x, y, torch.full((3000,), 100.0, dtype=torch.float16)))
    assert float(step.weight) == 300_000
    torch.testing.assert_close(step.loss, F.cross_entropy(objective(x), y))


@pytest.mark.parametrize("shape", [(ROWS - 1,), (ROWS, 2), (4, ROWS)])
@pytest.mark.parametrize("case", CASES)
def test_weights_of_another_shape_are_an_error(case, shape):
    _, x, y, _, _ = CASES[case]
    if shape == (ROWS, 2) and y.shape == shape:
        return
    with pytest.raises((LossError, SplitError), match=r"weights .*are Tensor\(.*weights are \(B,\), one a sample"):
        objective_of(case, sample_weights=True).train_step((x, y, torch.ones(shape)))


@pytest.mark.parametrize(
    "batch", [(X, X), X, [X], (X, X, X, X), {"x": X}, (X, X, None)], ids=lambda b: f"{type(b).__name__} {len(b)}"
)
def test_a_batch_that_is_no_triple(batch):
    says = r"Supervised\(sample_weights=True\) takes batches \(inputs, targets, weights\), and this one is .*Tensor\(12, 6\)"
    with pytest.raises(SplitError, match=says):
        objective_of("mse", sample_weights=True).train_step(batch)


def test_a_batch_without_targets_for_class_weights():
    with pytest.raises(SplitError, match=r"\(class_weights=...\) takes batches \(inputs, targets\), and this one is Tensor"):
        objective_of("cross_entropy", class_weights=[1, 1, 1, 1]).train_step(X)


@pytest.mark.parametrize("weights", [[1.0] * ROWS, torch.tensor(1.0), 3, torch.ones(ROWS, dtype=torch.complex64)])
def test_weights_that_are_no_vector(weights):
    class Own(Weighted):
        def split(self, batch):
            return batch[0], batch[1], weights

    with pytest.raises(SplitError, match=r"Own.split returned .* as weights; .* weights are a tensor \(B,\)"):
        Own().train_step((X, random(ROWS, 1)))


def test_sample_weights_is_a_switch():
    with pytest.raises(ConfigurationError, match=r"takes True or False, not Tensor\(3,\).*ax.ArrayDataset\(inputs, targets, w"):
        ax.Supervised(net(1), "mse", sample_weights=torch.ones(3))


# --- losses of the user's own ----------------------------------------------------------------------------------------


def weighted_mse(predictions, targets, weights):
    return (weights * (predictions - targets).square().squeeze(-1)).sum() / weights.sum()


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, predictions, targets, weights):
        return weighted_mse(predictions, targets, weights) * self.scale


@pytest.mark.parametrize(
    "loss", [weighted_mse, Module(), lambda p, t, w=None: weighted_mse(p, t, w), lambda *a: weighted_mse(*a)]
)
def test_a_callable_of_three(loss):
    torch.manual_seed(0)
    objective = ax.Supervised(net(1), loss, sample_weights=True)
    named = objective_of("mse", sample_weights=True)
    batch = X, random(ROWS, 1, seed=3), torch.rand(ROWS)
    torch.testing.assert_close(objective.train_step(batch).loss, named.train_step(batch).loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda predictions, targets: 0,
        nn.CrossEntropyLoss(),
        F.cross_entropy,  # its third is of classes
        F.mse_loss,  # and its, size_average
        lambda predictions, targets, reduction="mean": 0,
        lambda predictions, targets, *, weights: 0,
    ],
)
def test_a_callable_of_two_is_refused(loss):
    with pytest.raises(ConfigurationError, match=r"takes no weights: write a function of \(predictions, targets, weights\)"):
        ax.Supervised(net(1), loss, sample_weights=True)


class Weighted(ax.Objective):
    metrics = ("mae",)

    def __init__(self):
        super().__init__()
        self.net = net(1)

    def predict(self, x):
        return self.net(x)

    def split(self, batch):
        return (batch["x"], batch["y"], batch["w"]) if isinstance(batch, dict) else batch

    def loss(self, predictions, targets, weights):
        return {"fit": weighted_mse(predictions, targets, weights), "size": self.net[0].weight.square().mean()}


def test_an_objective_of_three_with_terms_and_mappings():
    x, y, w = X, random(ROWS, 1, seed=3), torch.rand(ROWS)
    torch.manual_seed(0)
    objective = Weighted()
    step = objective.train_step({"x": x, "y": y, "w": w})
    wanted = weighted_mse(objective(x), y, w).detach()
    torch.testing.assert_close(step.values["fit"], wanted)
    torch.testing.assert_close(step.weight, w.sum())
    assert step.sample_weights is w
    loop = ax.Loop(objective, device="cpu", progress=False)
    found = loop.evaluate(ax.ArrayDataset({"x": x, "y": y, "w": w}), batch_size=5)
    assert found["fit"] == pytest.approx(float(wanted), rel=1e-5)
    errors = (objective(x) - y).abs().squeeze(-1).detach()
    assert found["mae"] == pytest.approx(float((w * errors).sum() / w.sum()), rel=1e-5)


class Two(Weighted):
    def loss(self, predictions, targets):
        return F.mse_loss(predictions, targets)


class Option(Weighted):
    def loss(self, predictions, targets, reduction="mean"):
        return F.mse_loss(predictions, targets, reduction=reduction)


@pytest.mark.parametrize("kind", [Two, Option])
def test_an_objective_whose_loss_takes_two(kind):
    says = rf"{kind.__name__}.loss takes no weights, and split gave some \(Tensor\(12,\) float32\): write def loss\(self"
    with pytest.raises(LossError, match=says):
        kind().train_step((X, random(ROWS, 1), torch.ones(ROWS)))
    step = kind().train_step((X, random(ROWS, 1), None))
    assert step.weight == ROWS
    assert step.sample_weights is None


def test_a_subclass_of_supervised_may_take_two_or_split_otherwise():
    class TwoOf(ax.Supervised):
        def loss(self, predictions, targets):
            return super().loss(predictions, targets)

    with pytest.raises(LossError, match=r"TwoOf\.loss takes no weights"):
        TwoOf(net(1), "mse", sample_weights=True).train_step((X, random(ROWS, 1), torch.ones(ROWS)))

    class Named(ax.Supervised):
        def split(self, batch):
            return batch["x"], batch["y"], batch["w"]

    torch.manual_seed(0)
    batch = {"x": X, "y": random(ROWS, 1, seed=3), "w": torch.rand(ROWS)}
    wanted = objective_of("mse", sample_weights=True).train_step(tuple(batch.values())).loss
    torch.manual_seed(0)
    torch.testing.assert_close(Named(net(1), "mse").train_step(batch).loss, wanted)
    torch.testing.assert_close(Named(net(1), weighted_mse).train_step(batch).weight, batch["w"].sum())
    with pytest.raises(LossError, match="Named: the loss mse_loss takes no weights"):
        Named(net(1), F.mse_loss).train_step(batch)


def test_a_signature_is_read_once_for_each_class(monkeypatch):
    import inspect

    objective, batch = Weighted(), (X, random(ROWS, 1), torch.ones(ROWS))
    objective.train_step(batch)
    monkeypatch.setattr(inspect, "signature", None)
    objective.train_step(batch)
    Weighted().eval_step(batch)


def test_weight_may_be_overridden():
    class Counting(Weighted):
        def weight(self, batch):
            return 7

    batch = X, random(ROWS, 1), torch.rand(ROWS)
    assert Counting().train_step(batch).weight == 7
    objective = Weighted()
    objective.weight = lambda batch: 5
    assert objective.train_step(batch).weight == 5


def test_a_step_is_as_it_was():
    step = Step(torch.zeros(()), 1, 2, 3, {"a": 1.0}, torch.ones(()))
    assert (step.predictions, step.targets, step.weight, step.skipped) == (1, 2, 3, torch.ones(()))
    assert step.sample_weights is None


# --- through the loop ------------------------------------------------------------------------------------------------


def digits(count=None):
    train, test = ax.data.digits()
    made = torch.Generator().manual_seed(0)
    return [ax.ArrayDataset(*d.tensors, torch.rand(len(d), generator=made)) for d in (train, test)]


def classifier(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return ax.Supervised(model, "cross_entropy", metrics=["accuracy", "f1", "confusion_matrix"], **options)


def test_weights_reach_training_validation_and_evaluation():
    train, test = digits()
    loop = ax.Loop(classifier(sample_weights=True), ax.Optimizer("adamw", lr=3e-3), device="cpu", progress=False)
    result = loop.fit(train, test, epochs=3, batch_size=64)
    assert result.values["val/accuracy"] > 0.8
    x, y, w = test.tensors
    logits = loop.predict(test)
    torch.testing.assert_close(logits, loop.predict(ax.ArrayDataset(x)))  # inputs alone will do
    right = (logits.argmax(1) == y).double()
    wanted = {
        "loss": float((w * F.cross_entropy(logits, y, reduction="none")).sum() / w.sum()),
        "accuracy": float((w * right).sum() / w.sum()),
    }
    found = loop.evaluate(test, batch_size=33)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5)
        assert result.values[f"val/{name}"] == pytest.approx(value, rel=1e-5)
    assert np.asarray(found["confusion_matrix"]).sum() == pytest.approx(float(w.sum()), rel=1e-5)


def test_training_on_weights_is_training_on_copies():
    # The data in order, in batches that hold whole groups of copies.
    copies = torch.tensor([1, 2, 0, 3] * 8)
    x, y = random(32, 6), classes(4, 32)
    weighted = [(x[i : i + 4], y[i : i + 4], copies[i : i + 4]) for i in range(0, 32, 4)]
    repeated = [(a.repeat_interleave(c, 0), b.repeat_interleave(c, 0)) for a, b, c in weighted]
    loops = []
    for batches, options in ((weighted, {"sample_weights": True}), (repeated, {})):
        objective = objective_of("cross_entropy", **options)
        loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), device="cpu", progress=False)
        result = loop.fit(batches, batches, epochs=3)
        loops.append((list(objective.parameters()), result.values))
    close(loops[0][0], loops[1][0])
    agree(loops[0][1], loops[1][1])


def test_a_batch_of_no_weight_is_no_update_of_plain_sgd_and_no_warning():
    objective = objective_of("cross_entropy", sample_weights=True)
    before = copy.deepcopy(objective.state_dict())
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), device="cpu", progress=False)
    step = loop.train_on_batch((X, CASES["cross_entropy"][2], torch.zeros(ROWS)))
    assert not float(step.skipped)
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())


def test_metrics_that_take_no_weights_are_named_when_it_trains():
    def share(predictions, targets):
        return (predictions.argmax(1) == targets).float().mean()

    objective = objective_of("cross_entropy", metrics=False, sample_weights=True)
    data = ax.ArrayDataset(X, CASES["cross_entropy"][2], torch.ones(ROWS))
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), metrics=[share], device="cpu", progress=False)
    with pytest.raises(MetricError, match=r"'share' .* takes no sample weights.*ax.metrics.unweighted"):
        loop.fit(data, epochs=1)
    assert "'share'" in str(loop.check(data))
    told = ax.Loop(objective, metrics=[ax.metrics.unweighted(share)], device="cpu", progress=False)
    assert told.evaluate(data)["share"] == pytest.approx(float(share(objective(X), data.tensors[1])))


@pytest.mark.parametrize("options", [{"sample_weights": True}, {"class_weights": [1.0] * 9 + [3.0]}])
def test_preflight_takes_weights(options):
    train, test = digits()
    if "class_weights" in options:
        train, test = (ax.ArrayDataset(*d.tensors[:2]) for d in (train, test))
    loop = ax.Loop(classifier(**options), ax.Optimizer("adamw", lr=3e-3), device="cpu", progress=False)
    report = loop.check(train, test)
    assert report.ok, report
    assert "the mean over" in str(report)


def test_preflight_says_that_weights_are_missing():
    loop = ax.Loop(classifier(sample_weights=True), ax.Optimizer("adamw", lr=3e-3), device="cpu", progress=False)
    report = loop.check(ax.data.digits()[0])
    assert "the first step fails: SplitError: Supervised(sample_weights=True) takes batches" in str(report)


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing(case):
    _, x, y, _, _ = CASES[case]
    objective = objective_of(case, sample_weights=True, class_weights=WITH_CLASSES.get(case))
    with NoHostReads():
        objective.train_step((x, y, torch.rand(ROWS))).loss.backward()


@pytest.mark.parametrize("shape", [(12, 5), (12, 2, 3)])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_what_the_loss_leaves_out_is_no_item(shape, size):
    """Targets of -100: the means are over the others, as torch's is, and so are the gradients of parts."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=made, dtype=torch.float64)
    y = torch.randint(3, shape, generator=made)
    y[torch.rand(shape, generator=made) < 0.5] = -100
    y[:size] = -100  # a whole part

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 3 * math.prod(shape[1:])).double()

        def forward(self, inputs):
            return self.linear(inputs).view(len(inputs), 3, *shape[1:])

    data = ax.ArrayDataset(x, y)
    loops = [ax.Loop(ax.Supervised(Net(), "cross_entropy"), ax.Optimizer("sgd", lr=0.1), progress=False) for _ in range(3)]
    loops[0].fit([(x, y)], epochs=1)
    loops[1].fit([(x, y)], epochs=1, microbatch=size)
    for one, other in zip(loops[0].objective.parameters(), loops[1].objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    whole = F.cross_entropy(loops[2].objective.predict(x), y).item()
    batches = [part for part in ax.Loader(data, 4) if (part[1] != -100).any()]
    assert loops[2].evaluate(batches)["loss"] == pytest.approx(whole)
