import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torch.nn.functional as F
import torchmetrics
from host_reads import NoHostReads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassFBetaScore

from axontrain.errors import ConfigurationError, MetricError, UnknownNameError
from axontrain.metrics import names, registry
from axontrain.metrics.layout import Layout, infer
from axontrain.metrics.registry import BUILT_IN, Built, MetricSpec, build, register, registered, resolve

COUNTED = ("accuracy", "precision", "recall", "f1", "dice", "iou", "confusion_matrix")
RANKED = ("auroc", "average_precision")
REGRESSION = ("mse", "rmse", "mae", "r2")


@pytest.fixture
def own_names(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))


def made(kind, predictions, targets) -> Built:
    return build(kind, resolve([kind])[kind], predictions, targets)


def value_of(built, *batches):
    for batch in batches:
        built.metric.update(*built.prepare(*batch))
    return built.read(built.metric.compute())


def measured(kind, predictions, targets):
    return value_of(made(kind, predictions, targets), (predictions, targets))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(count, *shape, seed=1):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def counted(kind, true, predicted, average):
    """scikit-learn's value from class indices, or from 0 and 1."""
    one = {"average": average, "zero_division": 0.0}
    return {
        "accuracy": lambda: np.mean(true == predicted),
        "precision": lambda: sk.precision_score(true, predicted, **one),
        "recall": lambda: sk.recall_score(true, predicted, **one),
        "f1": lambda: sk.f1_score(true, predicted, **one),
        "dice": lambda: sk.f1_score(true, predicted, average="binary" if average == "binary" else "micro"),
        "iou": lambda: sk.jaccard_score(true, predicted, **one),
        "confusion_matrix": lambda: (
            sk.multilabel_confusion_matrix(true, predicted) if true.ndim > 1 else sk.confusion_matrix(true, predicted)
        ),
    }[kind]()


def agree(got, wanted, within=1e-6):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=within, atol=within)


# --- values, against scikit-learn ------------------------------------------------------------------------------------

MULTICLASS = {
    "plain": (random(60, 4), classes(4, 60), 1),
    "int32 targets": (random(60, 4), classes(4, 60).int(), 1),
    "language model": (random(6, 9, 5), classes(5, 6, 9), -1),
    "segmentation": (random(3, 4, 6, 7), classes(4, 3, 6, 7), 1),
    "classes last": (random(3, 6, 7, 4), classes(4, 3, 6, 7), -1),
    "both dimensions fit": (random(4, 5, 5), classes(5, 4, 5), 1),
    "half precision": (random(60, 4).bfloat16(), classes(4, 60), 1),
}


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("case", MULTICLASS)
def test_multiclass_counts(kind, case):
    predictions, targets, dim = MULTICLASS[case]
    wanted = counted(kind, targets.flatten().numpy(), predictions.argmax(dim).flatten().numpy(), "macro")
    agree(measured(kind, predictions, targets), wanted)


@pytest.mark.parametrize("kind", COUNTED)
def test_ignored_targets_are_left_out(kind):
    predictions, targets = random(60, 4), classes(4, 60)
    kept = torch.arange(60) % 3 != 0
    with_holes = torch.where(kept, targets, -100)
    wanted = counted(kind, targets[kept].numpy(), predictions.argmax(1)[kept].numpy(), "macro")
    agree(measured(kind, predictions, with_holes), wanted)
    last = predictions.reshape(6, 10, 4), with_holes.reshape(6, 10)
    agree(measured(kind, *last), wanted)


@pytest.mark.parametrize("kind", COUNTED)
def test_soft_targets_count_as_their_largest(kind):
    predictions, soft = random(60, 4), random(60, 4, seed=5).softmax(1)
    agree(measured(kind, predictions, soft), measured(kind, predictions, soft.argmax(1)))


def test_absent_classes_are_out_of_the_macro_average():
    predictions, targets = F.one_hot(torch.tensor([0, 1, 1, 2]), 50).float(), torch.tensor([0, 1, 2, 2])
    wanted = sk.f1_score(targets, predictions.argmax(1), average="macro")
    assert measured("f1", predictions, targets) == pytest.approx(wanted)


BINARY = {
    "logits": (random(50) * 3, classes(2, 50)),
    "probabilities": (random(50).sigmoid(), classes(2, 50)),
    "column": (random(50, 1), classes(2, 50, 1)),
    "column against vector": (random(50, 1), classes(2, 50)),
    "vector against column": (random(50), classes(2, 50, 1)),
    "bool": (random(50), classes(2, 50).bool()),
    "float": (random(50), classes(2, 50).float()),
    "smoothed float": (random(50, 1), classes(2, 50).float() * 0.8 + 0.1),
    "masks": (random(3, 1, 5, 5), classes(2, 3, 5, 5)),
    "masks both": (random(3, 1, 5, 5), classes(2, 3, 1, 5, 5).float()),
    "decided": (random(50) > 0, classes(2, 50)),
}


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("case", BINARY)
def test_binary_counts(kind, case):
    scores, targets = BINARY[case]
    border = 0.5 if case in ("probabilities", "decided") else 0
    taken, true = (scores > border).flatten().int().numpy(), (targets > 0.5).flatten().int().numpy()
    agree(measured(kind, scores, targets), counted(kind, true, taken, "binary"))


MULTILABEL = {
    "logits": (random(50, 4), classes(2, 50, 4)),
    "probabilities": (random(50, 4).sigmoid(), classes(2, 50, 4)),
    "bool": (random(50, 4), classes(2, 50, 4).bool()),
    "masks": (random(3, 4, 5, 5), classes(2, 3, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("case", MULTILABEL)
def test_multilabel_counts(kind, case):
    scores, targets = (tensor.movedim(1, -1).reshape(-1, 4) for tensor in MULTILABEL[case])
    taken = (scores > (0.5 if case == "probabilities" else 0)).int().numpy()
    agree(measured(kind, *MULTILABEL[case]), counted(kind, targets.int().numpy(), taken, "macro"))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("case", ["plain", "language model", "segmentation"])
def test_top_k(k, case):
    predictions, targets, dim = MULTICLASS[case]
    scores = predictions.movedim(dim, -1).reshape(-1, predictions.shape[dim])
    true = targets.flatten().clone()
    wanted = (scores.topk(k).indices == true[:, None]).any(1).float().mean()
    assert measured(f"top{k}", predictions, targets) == pytest.approx(wanted.item())
    holes = targets.clone()
    holes[::2] = -100
    kept = holes.flatten() >= 0
    wanted = (scores.topk(k).indices == true[:, None]).any(1)[kept].float().mean()
    assert measured(f"top{k}", predictions, holes) == pytest.approx(wanted.item())


def test_top_k_needs_k_classes():
    with pytest.raises(MetricError, match=r"'top5' looks at the 5 highest .* have 3: use 'top3' at most"):
        made("top5", random(8, 3), classes(3, 8))


def test_classes_as_predictions_serve_accuracy_alone():
    predictions, targets = classes(4, 5, 10), classes(4, 5, 10, seed=2)
    assert measured("accuracy", predictions, targets) == pytest.approx((predictions == targets).float().mean().item())
    for kind in ("f1", "auroc", "top2", "perplexity", "confusion_matrix"):
        with pytest.raises(MetricError, match=rf"'{kind}'.*classes already.*pass an instance"):
            made(kind, predictions, targets)


@pytest.mark.parametrize("kind", RANKED)
def test_ranked_binary(kind):
    wanted = {"auroc": sk.roc_auc_score, "average_precision": sk.average_precision_score}[kind]
    for case, (scores, targets) in BINARY.items():
        agree(measured(kind, scores, targets), wanted((targets > 0.5).flatten(), scores.flatten()), 1e-6)
        assert case
    confident = torch.tensor([20.0, 25.0, 30.0, 18.0]), torch.tensor([0, 1, 1, 0])
    assert measured(kind, *confident) == 1.0  # in single precision all four would be equal
    surer = torch.tensor([38.0, 45.0, 50.0, 40.0]), torch.tensor([0, 1, 1, 0])
    assert measured(kind, *surer) == 1.0  # the sigmoid of all four is 1, in double precision too


@pytest.mark.parametrize("kind", ["auroc", "average_precision"])
@pytest.mark.parametrize("rows", [19, 37])
def test_equal_logits_are_ties_wherever_they_lie(kind, rows):
    # torch's sigmoid of one number differs in its last bit from place to place.
    logits = random(200)
    targets = torch.arange(rows) % 3 == 0
    wanted = {"auroc": 0.5, "average_precision": float(targets.double().mean())}[kind]
    found = {measured(kind, logit.repeat(rows), targets.long()) for logit in logits}
    assert [*found] == [pytest.approx(wanted, abs=1e-6)]


@pytest.mark.parametrize("kind", [*COUNTED, *RANKED])
def test_binary_and_multilabel_targets_other_than_0_and_1_are_left_out(kind):
    for scores, targets in (BINARY["logits"], MULTILABEL["logits"]):
        more = torch.cat([scores, scores[:3]]), torch.cat([targets, torch.full_like(targets[:3], -100)])
        agree(measured(kind, *more), measured(kind, scores, targets))


@pytest.mark.parametrize("kind", RANKED)
def test_ranked_multilabel(kind):
    wanted = {"auroc": sk.roc_auc_score, "average_precision": sk.average_precision_score}[kind]
    scores, targets = MULTILABEL["logits"]
    agree(measured(kind, scores, targets), wanted(targets, scores, average="macro"))
    scores, targets = MULTILABEL["masks"]
    flat = [tensor.movedim(1, -1).reshape(-1, 4) for tensor in (targets, scores)]
    agree(measured(kind, scores, targets), wanted(*flat, average="macro"))


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("case", ["plain", "language model", "segmentation"])
def test_ranked_multiclass(kind, case):
    predictions, targets, dim = MULTICLASS[case]
    scores = predictions.softmax(dim).movedim(dim, -1).reshape(-1, predictions.shape[dim]).double().numpy()
    true = targets.flatten().numpy()
    if kind == "auroc":
        wanted = sk.roc_auc_score(true, scores, multi_class="ovr")
    else:
        wanted = np.mean([sk.average_precision_score(true == c, scores[:, c]) for c in range(scores.shape[1])])
    agree(measured(kind, predictions, targets), wanted)
    agree(measured(kind, predictions.softmax(dim), targets), wanted)
    more = torch.cat([predictions, predictions[:1]]), torch.cat([targets, torch.full_like(targets[:1], -100)])
    agree(measured(kind, *more), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_perplexity(dtype):
    logits, targets = random(4, 7, 5).to(dtype), classes(5, 4, 7)
    targets[0, :3] = -100
    wanted = math.exp(F.cross_entropy(logits.double().movedim(-1, 1), targets).item())
    within = 1e-5 if dtype == torch.float32 else 1e-4
    agree(measured("perplexity", logits, targets), wanted, within)
    agree(measured("perplexity", logits.movedim(-1, 1), targets), wanted, within)
    flat = logits.reshape(-1, 5), targets.flatten()
    agree(measured("perplexity", *flat), wanted, within)


def test_perplexity_is_finite_where_a_softmax_underflows():
    wanted = math.exp((0 + 200) / 2)
    logits = torch.tensor([[0.0, 200.0], [0.0, 200.0]])
    assert measured("perplexity", logits, torch.tensor([1, 0])) == pytest.approx(wanted, rel=1e-6)
    assert torchmetrics.functional.text.perplexity(logits[None], torch.tensor([[1, 0]])) == math.inf


def test_counts_are_exact_beyond_single_precision():
    built = made("mse", torch.ones(3), torch.zeros(3))
    built.metric.total.fill_(2**24)
    built.metric.sum_squared_error.fill_(2**24)
    assert value_of(built, (torch.ones(1), torch.zeros(1))) == 1.0
    assert built.metric.total == 2**24 + 1


@pytest.mark.parametrize("shapes", [((40,), (40,)), ((40, 1), (40,)), ((40,), (40, 1)), ((8, 5), (8, 5)), ((4, 5, 2),) * 2])
def test_regression(shapes):
    predictions, targets = random(*shapes[0]), random(*shapes[1], seed=3) + 2000
    p, t = predictions.flatten().double().numpy(), targets.flatten().double().numpy()
    agree(measured("mse", predictions, targets), sk.mean_squared_error(t, p), 1e-5)
    agree(measured("rmse", predictions, targets), sk.root_mean_squared_error(t, p), 1e-5)
    agree(measured("mae", predictions, targets), sk.mean_absolute_error(t, p), 1e-5)
    agree(measured("r2", predictions, targets), sk.r2_score(t, p), 1e-9)


def test_regression_takes_integers_half_precision_and_gaps_in_memory():
    predictions, targets = random(6, 8).half().T, classes(9, 6, 8).T
    wanted = (predictions.double() - targets).square().mean().item()
    assert measured("mse", predictions, targets) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", REGRESSION)
@pytest.mark.parametrize("shapes", [((4, 3), (4,)), ((4, 1), (3,)), ((1, 4), (4,)), ((4,), ()), ((2, 3), (3, 2))])
def test_regression_never_broadcasts(kind, shapes):
    with pytest.raises(MetricError, match=rf"'{kind}'.*must have one shape, up to a trailing dimension of 1"):
        made(kind, torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_regression_checks_later_batches_too():
    built = made("mse", torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(MetricError, match=r"Tensor\(4, 3\) float32 and targets Tensor\(4,\) float32"):
        built.prepare(torch.zeros(4, 3), torch.zeros(4))


def test_cosine_similarity():
    predictions, targets = random(6, 5), random(6, 5, seed=2)
    wanted = F.cosine_similarity(predictions, targets).mean().item()
    assert measured("cosine_similarity", predictions, targets) == pytest.approx(wanted)
    deep = predictions.reshape(2, 3, 5).requires_grad_(), targets.reshape(2, 3, 5)
    assert measured("cosine_similarity", *deep) == pytest.approx(wanted)
    for shapes in (((6,), (6,)), ((6, 5), (6, 1))):
        with pytest.raises(MetricError, match=r"compares vectors, \(B, D\) each"):
            made("cosine_similarity", torch.ones(shapes[0]), torch.ones(shapes[1]))


# --- updates: no host reads, and one is as good as many --------------------------------------------------------------

LOGITS, TOKENS = (random(12, 4), classes(4, 12)), (random(12, 3, 5), classes(5, 12, 3))
ALL = (
    [(kind, batch) for kind in (*COUNTED, *RANKED, "top2", "perplexity") for batch in (LOGITS, TOKENS)]
    + [(kind, (random(12), classes(2, 12))) for kind in (*COUNTED, *RANKED)]
    + [(kind, (random(12, 1), classes(2, 12).float())) for kind in (*COUNTED, *RANKED)]
    + [(kind, (random(12, 3), classes(2, 12, 3))) for kind in (*COUNTED, *RANKED)]
    + [(kind, (random(12, 2, 6, 6), classes(2, 12, 6, 6))) for kind in (*COUNTED, *RANKED)]
    + [(kind, (random(12), random(12, 1, seed=4))) for kind in REGRESSION]
    + [
        ("cosine_similarity", (random(12, 3), random(12, 3, seed=4))),
        ("accuracy", (classes(3, 12), classes(3, 12, seed=4))),
    ]
)


def test_the_guard_sees_what_torchmetrics_does():
    metric = MulticlassAccuracy(4, ignore_index=-100, validate_args=False)
    with NoHostReads(), pytest.raises(AssertionError, match="waits for the device"):
        metric.update(*LOGITS)


@pytest.mark.parametrize(("kind", "batch"), ALL)
def test_building_and_updating_read_nothing(kind, batch):
    with NoHostReads():
        built = made(kind, *batch)
        built.metric.update(*built.prepare(*batch))
        built.metric.reset()


@pytest.mark.parametrize(("kind", "batch"), ALL)
def test_updates_follow_from_shapes_alone(kind, batch):
    batch = tuple(tensor.to("meta") for tensor in batch)
    built = made(kind, *batch)
    built.metric.update(*built.prepare(*batch))
    assert built.metric.device == torch.device("meta")
    assert all(part.is_meta for state in built.metric.metric_state.values() for part in torch.utils._pytree.tree_leaves(state))


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(ALL), cuts=st.lists(st.integers(2, 10), max_size=4), cut_first=st.booleans())
def test_joined_batches_update_as_each_would(case, cuts, cut_first):
    kind, (predictions, targets) = case
    edges = [0, *sorted(set(cuts)), 12]
    parts = [(predictions[a:b], targets[a:b]) for a, b in pairwise(edges)]
    built, joined = (made(kind, *parts[0]) if cut_first else made(kind, predictions, targets) for _ in range(2))
    assert built.joinable
    agree(value_of(built, *parts), value_of(joined, (predictions, targets)))


@pytest.mark.parametrize("kind", [*COUNTED, *RANKED])
def test_one_batch_of_logits_that_might_be_probabilities_changes_nothing(kind):
    # Two logits of 0.2 are positive, though as probabilities they would not be: torchmetrics takes them for those.
    parts = [(torch.tensor([0.2, 0.9]), torch.tensor([1, 0])), (torch.tensor([-3.0, 4.0]), torch.tensor([0, 1]))]
    whole = tuple(map(torch.cat, zip(*parts, strict=True)))
    assert value_of(made(kind, *parts[0]), *parts) == measured(kind, *whole)
    assert measured("recall", *whole) == 1.0
    alone = BinaryF1Score()
    for part in parts:
        alone.update(*part)
    assert alone.compute() != measured("f1", *whole)


def test_a_target_that_is_no_class_raises():
    for kind in ("f1", "iou"):
        built = made(kind, random(4, 3), classes(3, 4))
        for wrong in (3, 7, -1):
            with pytest.raises(RuntimeError, match="out of bounds"):
                built.metric.update(*built.prepare(random(1, 3), torch.tensor([wrong])))


NUMBERS = {
    "a column": (random(12, 1), random(12, 1, seed=4)),
    "a vector": (random(12), random(12, seed=4) * 100),
    "NaN": (random(12), torch.tensor([0.0, 1.0] * 5 + [1.0, torch.nan])),
    "several": (random(12, 3), random(12, 3, seed=4)),
    "several of 0 to 1": (random(12, 3), random(12, 3, seed=4).sigmoid()),
    "labels as floats": (random(12, 3), classes(2, 12, 3).float()),
    "half precision": (random(12, 3).half(), random(12, 3, seed=4).half()),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("kind", [*COUNTED, *RANKED, "top2", "perplexity"])
def test_float_targets_that_are_no_classes_are_refused_when_the_value_is_read(kind, case):
    predictions, targets = NUMBERS[case]
    if kind in ("top2", "perplexity") and predictions.shape[1:] != (3,):
        return
    with NoHostReads():
        built = made(kind, predictions, targets)
        built.metric.update(*built.prepare(predictions, targets))
    with pytest.raises(ValueError, match=r"cannot take for classes .* of classes: for numbers use mse, mae or r2"):
        built.metric.compute()
    built.metric.reset()  # it is forgotten with the data
    good = targets.softmax(1) if targets.dim() > 1 and targets.shape[1] > 1 else (targets > 0).float()
    built.metric.update(*built.prepare(predictions, good))
    built.metric.compute()


def test_one_strange_target_among_many_batches_is_enough():
    batches = [(random(4), torch.ones(4)), (random(4), torch.tensor([0.0, 1.0, 2.0, 0.0])), (random(4), torch.zeros(4))]
    built = made("accuracy", *batches[0])
    for predictions, targets in batches:
        built.metric.update(*built.prepare(predictions, targets))
    with pytest.raises(ValueError, match="1 of the targets"):
        built.metric.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 10, 1000, 50_000])
def test_probabilities_of_any_precision_are_classes(dtype, count):
    logits = random(8, count)
    smoothed = F.one_hot(classes(count, 8), count) * 0.9 + 0.1 / count
    for targets in (smoothed, (random(8, count, seed=4) * 3).softmax(1)):
        measured("accuracy", logits, targets.to(dtype))


def test_a_factory_of_the_users_is_told_of_binary_targets_that_are_none(own_names):
    register("specificity", lambda task: torchmetrics.Specificity(task))
    predictions, targets = random(12, 1), random(12, 1, seed=4)
    with pytest.raises(RuntimeError, match="expected only the following values"):
        measured("specificity", predictions, targets)
    assert 0 <= measured("specificity", predictions, (targets > 0).float()) <= 1


@pytest.mark.parametrize("kind", RANKED)
def test_ranked_metrics_leave_out_what_is_undefined(kind):
    predictions, targets = random(40, 3), classes(2, 40)  # class 2 never comes
    scores = predictions.double().softmax(1)
    wanted = [measured(kind, scores[:, c], targets == c) for c in (0, 1)]
    assert measured(kind, predictions, targets) == pytest.approx(sum(wanted) / 2)
    assert math.isnan(measured(kind, random(4), torch.zeros(4)))
    only = measured(kind, random(4), torch.ones(4))
    assert math.isnan(only) if kind == "auroc" else only == 1.0


def test_kept_scores_are_copies_without_graph():
    scores = random(4).requires_grad_()
    built = made("auroc", scores, classes(2, 4))
    built.metric.update(*built.prepare(scores, classes(2, 4)))
    (kept,) = built.metric.scores
    assert not kept.requires_grad
    assert kept._base is None
    assert kept.data_ptr() != scores.data_ptr()


def test_a_vocabulary_needs_no_square_of_it():
    logits, targets = random(2, 4, 50_000), classes(50_000, 2, 4)
    built = made("f1", logits, targets)
    built.metric.update(*built.prepare(logits, targets))
    # The one more counts float targets that are no classes.
    assert sum(getattr(built.metric, state).numel() for state in built.metric._defaults) == 150_001


@pytest.mark.parametrize(("kind", "batch"), ALL)
def test_clone_reset_and_merge(kind, batch):
    half = tuple(tensor[:6] for tensor in batch), tuple(tensor[6:] for tensor in batch)
    built = made(kind, *batch)
    built.metric.update(*built.prepare(*half[0]))
    other = built.metric.clone()
    other.reset()
    other.update(*built.prepare(*half[1]))
    built.metric.merge_state(other)
    agree(built.read(built.metric.compute()), measured(kind, *batch))


# --- the table of tasks ----------------------------------------------------------------------------------------------

ROWS = [
    ((8, 3), torch.float, (8,), torch.long, Layout("multiclass", 3)),
    ((8, 3), torch.float, (8,), torch.uint8, Layout("multiclass", 3)),
    ((8, 3, 4), torch.float, (8, 4), torch.long, Layout("multiclass", 3)),
    ((8, 3, 4, 5), torch.float, (8, 4, 5), torch.long, Layout("multiclass", 3)),
    ((8, 7, 5), torch.float, (8, 7), torch.long, Layout("multiclass", 5, -1)),
    ((8, 5, 5), torch.float, (8, 5), torch.long, Layout("multiclass", 5)),
    ((8, 4, 6, 3), torch.float, (8, 4, 6), torch.long, Layout("multiclass", 3, -1)),
    ((8, 3), torch.float, (8, 3), torch.float, Layout("multiclass", 3)),
    ((8, 3, 4), torch.bfloat16, (8, 3, 4), torch.float, Layout("multiclass", 3)),
    ((8, 3), torch.float, (8, 3), torch.long, Layout("multilabel", 3)),
    ((8, 3), torch.float, (8, 3), torch.bool, Layout("multilabel", 3)),
    ((8, 3, 4), torch.float, (8, 3, 4), torch.long, Layout("multilabel", 3)),
    ((8,), torch.float, (8,), torch.long, Layout("binary", 1)),
    ((8,), torch.float, (8,), torch.float, Layout("binary", 1)),
    ((8,), torch.bool, (8,), torch.bool, Layout("binary", 1)),
    ((8, 1), torch.float, (8, 1), torch.float, Layout("binary", 1)),
    ((8, 1), torch.float, (8,), torch.long, Layout("binary", 1)),
    ((8, 1), torch.float, (8,), torch.float, Layout("binary", 1)),
    ((8,), torch.float, (8, 1), torch.long, Layout("binary", 1)),
    ((8, 1, 5, 5), torch.float, (8, 5, 5), torch.long, Layout("binary", 1)),
    ((8, 7, 1), torch.float, (8, 7), torch.long, Layout("binary", 1, -1)),
    ((8, 3), torch.long, (8, 3), torch.long, Layout("labels", 0)),
    ((8,), torch.long, (8,), torch.bool, Layout("labels", 0)),
]


@pytest.mark.parametrize("row", ROWS)
def test_table_of_tasks(row):
    shape, dtype, wanted, kind, layout = row
    assert infer("f1", torch.zeros(shape, dtype=dtype), torch.zeros(wanted, dtype=kind)) == layout


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [
        (torch.zeros(8, 3), torch.zeros(8)),  # regression, or a bug
        (torch.zeros(8, 3), torch.zeros(7, dtype=torch.long)),
        (torch.zeros(8, 3), torch.zeros(8, 4, dtype=torch.long)),
        (torch.zeros(8), torch.zeros(8, 3, dtype=torch.long)),
        (torch.zeros(8, 3, 4), torch.zeros(8, dtype=torch.long)),
        (torch.zeros(()), torch.zeros((), dtype=torch.long)),
        (torch.zeros(3), torch.zeros((), dtype=torch.long)),
        (torch.zeros(()), torch.zeros((1,), dtype=torch.long)),
        (torch.zeros(8, dtype=torch.long), torch.zeros(8)),
        (torch.zeros(8, 3, dtype=torch.long), torch.zeros(8, dtype=torch.long)),
        (torch.zeros(8, 3, dtype=torch.bool), torch.zeros(8, dtype=torch.long)),
        (torch.zeros(8, dtype=torch.complex64), torch.zeros(8, dtype=torch.long)),
    ],
)
def test_what_fits_no_task(predictions, targets):
    with pytest.raises(MetricError, match=r"'f1': predictions Tensor.* fit no classification task: scores"):
        made("f1", predictions, targets)


@pytest.mark.parametrize("kind", ["top2", "perplexity"])
@pytest.mark.parametrize("batch", [(random(8), classes(2, 8)), (random(8, 3), classes(2, 8, 3))])
def test_class_scores_are_needed(kind, batch):
    with pytest.raises(MetricError, match=rf"'{kind}' needs scores for each class.*are (binary|multilabel)"):
        made(kind, *batch)


def test_align():
    predictions, targets = random(2, 7, 5), classes(5, 2, 7).int()
    moved, same = infer("m", predictions, targets).align(predictions, targets)
    assert torch.equal(moved, predictions.transpose(1, 2))
    assert same.dtype == torch.long
    scores, labels = infer("m", random(4, 1), torch.ones(4)).align(random(4, 1), torch.ones(4))
    assert scores.shape == labels.shape == (4,)
    assert labels.dtype == torch.long
    soft = random(4, 3).softmax(1)
    assert torch.equal(infer("m", random(4, 3), soft).align(random(4, 3), soft)[1], soft.argmax(1))


# --- missing and other data ------------------------------------------------------------------------------------------


def plain(predictions, targets):
    return (predictions == targets).float().mean()


@pytest.mark.parametrize("spec", ["accuracy", plain, MulticlassAccuracy(3)])
def test_missing_data(spec):
    (entry,) = resolve({"m": spec}).values()
    with pytest.raises(MetricError, match=r"'m': this objective's Step has no targets: return Step\(\.\.\., predic"):
        build("m", entry, random(4, 3), None)
    with pytest.raises(MetricError, match="'m': this objective's Step has no predictions"):
        build("m", entry, None, classes(3, 4))


@pytest.mark.parametrize("kind", ["accuracy", "mse"])
def test_structured_data(kind):
    with pytest.raises(MetricError, match=r"dict of \{'boxes': Tensor\(4, 3\).*override train_step .*use a function"):
        made(kind, {"boxes": random(4, 3)}, classes(3, 4))
    with pytest.raises(MetricError, match=r"reads targets that are one tensor.*tuple of 2"):
        made(kind, random(4, 3), (classes(3, 4), classes(3, 4)))


# --- names and lists -------------------------------------------------------------------------------------------------


def test_names_are_known_without_torchmetrics(imported):
    assert "axontrain.metrics.registry" in imported["in the end"]
    assert "torchmetrics" not in imported["in the end"]


def test_built_in_names():
    assert set(BUILT_IN) <= set(registered())
    assert set(BUILT_IN) == {*names._COUNTED, *names._RANKED, *names._ERRORS, "perplexity", "cosine_similarity"}
    assert all(spec.joinable for spec in resolve([*BUILT_IN, "top7"]).values())


def test_resolve_forms():
    assert resolve(None) == resolve([]) == resolve({}) == {}
    spec = MetricSpec("own", lambda: torchmetrics.MeanSquaredError(), joinable=True)
    assert list(resolve([plain, "f1", MulticlassAccuracy(3), spec, nn.MSELoss(), torchmetrics.R2Score])) == [
        *("plain", "f1", "multiclass_accuracy", "own", "mse_loss", "r2_score")
    ]
    assert list(resolve(("f1", "mse"))) == ["f1", "mse"]
    entries = resolve({"a": "f1", "b": plain, "c": MulticlassAccuracy(3), "d": torchmetrics.R2Score, "e": spec})
    assert list(entries) == list("abcde")
    assert entries["e"] is spec
    assert entries["a"].joinable
    assert not entries["c"].joinable


def test_a_collection_is_its_metrics():
    members = torchmetrics.MetricCollection({"acc": MulticlassAccuracy(3), "f": MulticlassFBetaScore(2.0, 3)}, prefix="x_")
    entries = resolve({"group": members})
    assert list(entries) == ["group/x_acc", "group/x_f"]
    batch = random(9, 3), classes(3, 9)
    built = build("group/x_acc", entries["group/x_acc"], *batch)
    assert value_of(built, batch) == pytest.approx(MulticlassAccuracy(3)(*batch).item())


@pytest.mark.parametrize(
    ("specs", "error", "says"),
    [
        ("accuracy", ConfigurationError, r"must be a list or a dict, not str: metrics=\['accuracy'\]"),
        ({"accuracy", "f1"}, ConfigurationError, "must be a list or a dict, not set"),
        (plain, ConfigurationError, "must be a list or a dict, not function"),
        (["acuracy"], UnknownNameError, "unknown metric 'acuracy': did you mean 'accuracy'"),
        ({"a": "top0"}, UnknownNameError, r"unknown metric 'top0': did you mean 'top5'.*top\{k\} for any k"),
        (["f1", "f1"], ConfigurationError, "two metrics are named 'f1'"),
        ([plain, MetricSpec("plain", plain)], ConfigurationError, "two metrics are named 'plain'"),
        ({"loss": "f1"}, ConfigurationError, "'loss' is reserved"),
        (["loss"], ConfigurationError, "'loss' is reserved"),
        ({1: "f1"}, ConfigurationError, "name must be a string, not 1"),
        ({"": "f1"}, ConfigurationError, "name must be a string, not ''"),
        ([lambda p, t: p], ConfigurationError, r"has no name of its own: metrics=\{'name': ...\}"),
        ([partial(plain)], ConfigurationError, "has no name of its own"),
        ([3], ConfigurationError, "3 is no metric: a metric is made by"),
        ({"a": 3}, ConfigurationError, r"'a' is int: a metric is made by \(1\).*\(2\).*\(3\)"),
        ({"a": None}, ConfigurationError, "'a' is NoneType"),
        ({"a": lambda x: x}, ConfigurationError, r"'a': <lambda> requires \(x\), but a metric is made by \(1\)"),
        ({"a": lambda x, y, z: x}, ConfigurationError, r"requires \(x, y, z\)"),
        ({"a": MulticlassFBetaScore}, ConfigurationError, r"MulticlassFBetaScore requires \(beta, num_classes\)"),
        ([MetricSpec("a", 3)], ConfigurationError, "'a' is int"),
        ({"a": lambda *, x, y: x}, ConfigurationError, r"requires \(x, y\)"),
    ],
)
def test_resolve_errors(specs, error, says):
    with pytest.raises(error, match=says):
        resolve(specs)


def test_unreadable_arguments(monkeypatch):
    def unreadable(_):
        raise ValueError("no signature found")

    monkeypatch.setattr(registry.inspect, "signature", unreadable)
    with pytest.raises(ConfigurationError, match=r"arguments of .* cannot be read; wrap it in a function"):
        resolve({"a": plain})


# --- registering -----------------------------------------------------------------------------------------------------


def test_register_errors(own_names):
    with pytest.raises(ConfigurationError, match="'f1' exists already: pass overwrite=True"):
        register("f1", plain)
    with pytest.raises(ConfigurationError, match="'top3' exists already"):
        register("top3", plain)
    with pytest.raises(ConfigurationError, match="'loss' is reserved"):
        register("loss", plain, overwrite=True)
    with pytest.raises(ConfigurationError, match="must be a string"):
        register(plain, plain)
    with pytest.raises(ConfigurationError, match=r"'own': plain3 requires .* made by \(1\).*\(2\).*\(3\)"):
        register("own", type("plain3", (), {"__init__": lambda self, a, b, c: None}))
    with pytest.raises(ConfigurationError, match="'own' is int"):
        register("own", 3)
    assert "own" not in registered()
    register("own", plain)
    with pytest.raises(ConfigurationError, match="'own' exists already"):
        register("own", plain)
    register("f1", plain, overwrite=True)
    register("top3", plain, overwrite=True)
    assert made("f1", random(4), random(4)).function is not None
    assert made("top3", random(4), random(4)).function is not None


BATCH = random(30, 3), classes(3, 30)


def macro(num_classes):
    return MulticlassAccuracy(num_classes)


@pytest.mark.parametrize(
    "factory",
    [
        lambda: MulticlassAccuracy(3),
        macro,
        MulticlassAccuracy,
        partial(torchmetrics.Accuracy, average="macro"),
        lambda task, num_classes=None, num_labels=None: torchmetrics.Accuracy(
            task, num_classes=num_classes, num_labels=num_labels, average="macro"
        ),
        lambda predictions, num_classes: MulticlassAccuracy(predictions.shape[1] + num_classes - 3),
        partial(torchmetrics.Accuracy, task="multiclass", num_classes=3, average="macro"),
    ],
)
def test_factories(own_names, factory):
    register("own", factory)
    built = made("own", *BATCH)
    assert not built.joinable
    assert built.function is None
    assert value_of(built, BATCH) == pytest.approx(sk.balanced_accuracy_score(BATCH[1], BATCH[0].argmax(1)))


def test_a_class_of_torchmetrics_takes_the_task_of_the_batch():
    (entry,) = resolve({"a": torchmetrics.Accuracy}).values()
    tokens = random(6, 4, 5), classes(5, 6, 4)
    built = build("a", entry, *tokens)
    assert value_of(built, tokens) == pytest.approx((tokens[0].argmax(-1) == tokens[1]).float().mean().item())
    column = random(20, 1), classes(2, 20).float()
    built = build("a", entry, *column)
    assert value_of(built, column) == pytest.approx(((column[0][:, 0] > 0) == column[1]).float().mean().item())
    labels = random(20, 3), classes(2, 20, 3)
    built = build("a", entry, *labels)
    assert value_of(built, labels) == pytest.approx(((labels[0] > 0) == labels[1]).float().mean().item())


def test_a_users_default_is_kept():
    seen = []

    def make(num_classes=10, task=None):
        seen.append((num_classes, task))
        return torchmetrics.MeanSquaredError()

    (entry,) = resolve([make]).values()
    build("make", entry, *BATCH)
    build("make", entry, random(4, 3), random(4))  # fits no task, and none is required
    assert seen == [(10, "multiclass"), (10, None)]


def test_what_cannot_be_inferred_is_named():
    (entry,) = resolve([macro]).values()
    with pytest.raises(MetricError, match=r"needs num_classes, which predictions Tensor\(8,\) .* do not tell \(binary\)"):
        build("macro", entry, random(8), classes(2, 8))
    with pytest.raises(MetricError, match=r"do not tell \(classes instead of scores\)"):
        build("macro", entry, classes(3, 8), classes(3, 8))
    with pytest.raises(MetricError, match="fit no classification task"):
        build("macro", entry, random(8, 3), random(8))
    with pytest.raises(MetricError, match="one tensor"):
        build("macro", entry, [random(8, 3)], classes(3, 8))


def test_factories_that_fail():
    for factory, says in (
        (lambda: 3, "'a': its factory returned int, not a torchmetrics.Metric"),
        (nn.MSELoss, "its factory returned MSELoss, not"),
        (lambda num_classes: MulticlassAccuracy(num_classes, top_k=9), "'a' cannot be made: Expected argument `top_k`"),
    ):
        (entry,) = resolve({"a": factory}).values()
        with pytest.raises(MetricError, match=says):
            build("a", entry, *BATCH)


def test_instances_are_cloned_and_reset():
    own = MulticlassAccuracy(3)
    own.update(*BATCH)
    (entry,) = resolve({"a": own}).values()
    first, second = (build("a", entry, *BATCH) for _ in range(2))
    assert first.metric is not own
    assert first.metric is not second.metric
    assert first.metric.update_count == 0
    assert own.update_count == 1
    first.metric.update(*first.prepare(*BATCH))
    assert second.metric.update_count == 0
    assert second.metric.tp.sum() == 0
    assert not first.joinable


def test_instances_take_what_the_step_has():
    boxes = [{"boxes": torch.zeros(1, 4)}], [{"boxes": torch.ones(1, 4)}]

    class Boxes(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("count", torch.tensor(0), "sum")

        def update(self, predictions, targets):
            self.count += len(predictions)

        def compute(self):
            return {"map": self.count / 2, "all": {"n": self.count}}

    built = build("boxes", resolve([Boxes()])["boxes"], *boxes)
    assert value_of(built, boxes) == {"map": 0.5, "all/n": 1.0}
    assert built.metric.device == torch.device("cpu")
    texts = build("boxes", resolve([Boxes()])["boxes"], ["a"], ["b"])
    assert value_of(texts, (["a"], ["b"]))["all/n"] == 1.0


# --- functions -------------------------------------------------------------------------------------------------------


def test_functions():
    predictions = classes(3, 30, seed=9)
    built = build("plain", resolve([plain])["plain"], predictions, BATCH[1])
    assert built.metric is None
    assert not built.joinable
    assert torch.equal(built.function(predictions, BATCH[1]), plain(predictions, BATCH[1]))
    for function in (nn.MSELoss(), F.mse_loss, lambda a, b, scale=2: (a - b).square().mean().reshape(1, 1), MSE()):
        built = build("m", resolve({"m": function})["m"], random(5), random(5, seed=2))
        predictions = random(5).requires_grad_()
        value = built.function(predictions, random(5, seed=2))
        assert value.shape == ()
        assert not value.requires_grad
        assert value.item() == pytest.approx(F.mse_loss(random(5), random(5, seed=2)).item())


class MSE:
    def __call__(self, predictions, targets):
        return F.mse_loss(predictions, targets).item()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda predictions, targets: predictions, r"must return one scalar, .* returned Tensor\(30, 3\) float32$"),
        (lambda a, b: {"x": a}, "it returned dict of"),
        (
            lambda predictions, targets: MulticlassAccuracy(3),
            "returned MulticlassAccuracy. A factory takes num_classes",
        ),
    ],
)
def test_functions_that_return_no_scalar(function, says):
    built = build("m", resolve({"m": function})["m"], *BATCH)
    with pytest.raises(MetricError, match=says):
        built.function(*BATCH)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_read():
    read = Built("m").read
    assert read(torch.tensor(0.5)) == 0.5
    assert type(read(torch.tensor(3))) is float
    assert read(torch.tensor([0.5, 1])) == [0.5, 1.0]
    assert read(torch.tensor([[3, 1], [0, 2]])) == [[3, 1], [0, 2]]
    assert read({"a": torch.tensor(1.0), "b": {"c": torch.ones(2), "d": 2}}) == {
        "a": 1.0,
        "b/c": [1.0, 1.0],
        "b/d": 2.0,
    }
    assert read((torch.ones(1), [torch.zeros(())])) == [[1.0], [0.0]]
    with pytest.raises(MetricError, match="'m' computed str: it must be a tensor"):
        read("x")
