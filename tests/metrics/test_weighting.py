"""Sample weights in the metrics: an integer weight is so many copies, a weight of zero leaves out, cuts change nothing."""

import math
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
from made_tensors import classes, holes, random

import axontrain as ax
from axontrain import ConfigurationError, MetricError, Step, UnknownNameError
from axontrain.checkpoint.encode import decode, encode
from axontrain.metrics import Meter, meter
from axontrain.metrics.registry import build, resolve

COUNTED = ("accuracy", "precision", "recall", "f1", "dice", "iou", "confusion_matrix")
RANKED = ("auroc", "average_precision")
REGRESSION = ("mse", "rmse", "mae", "r2")
ROWS = 12


LAYOUTS = {
    "multiclass": (random(ROWS, 4), classes(4, ROWS)),
    "ignored": (random(ROWS, 4), holes(classes(4, ROWS))),
    "soft": (random(ROWS, 4), random(ROWS, 4, seed=5).softmax(1)),
    "tokens": (random(ROWS, 3, 5), holes(classes(5, ROWS, 3))),
    "pixels": (random(ROWS, 3, 2, 4), classes(3, ROWS, 2, 4)),
    "binary": (random(ROWS), classes(2, ROWS)),
    "column": (random(ROWS, 1), classes(2, ROWS).float()),
    "masks": (random(ROWS, 1, 2, 3), classes(2, ROWS, 1, 2, 3)),
    "labels": (random(ROWS, 3), classes(2, ROWS, 3)),
    "label masks": (random(ROWS, 2, 3, 3), classes(2, ROWS, 2, 3, 3)),
}
CASES = (
    [(kind, LAYOUTS[name]) for name in LAYOUTS for kind in (*COUNTED, *RANKED)]
    + [
        (kind, LAYOUTS[name])
        for name in ("multiclass", "ignored", "soft", "tokens", "pixels")
        for kind in ("top2", "perplexity")
    ]
    + [("perplexity", (random(ROWS, 5, 3), classes(5, ROWS, 3)))]
    + [(kind, (random(ROWS), random(ROWS, 1, seed=4))) for kind in REGRESSION]
    + [(kind, (random(ROWS, 3), random(ROWS, 3, seed=4))) for kind in (*REGRESSION, "cosine_similarity")]
    + [("cosine_similarity", (random(ROWS, 2, 3), random(ROWS, 2, 3, seed=4)))]
    + [("accuracy", (classes(3, ROWS), classes(3, ROWS, seed=4)))]
)
WEIGHTS = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS).filter(lambda of: sum(w > 0 for w in of) > 1)


def steps(predictions, targets, weights=None, edges=(), skipped=None):
    bounds = [0, *sorted({e for e in edges if 0 < e < len(targets)}), len(targets)]
    for first, last in pairwise(bounds):
        of = slice(first, last)
        weight = None if weights is None else weights[of]
        count = last - first if weight is None else weight.sum()
        yield Step(torch.zeros(()), predictions[of], targets[of], count, {}, skipped, weight)


def reading(metrics, taken):
    one = Meter(metrics)
    for step in taken:
        one.record(step)
    return {name: value for name, value in one.read().items() if name != "loss"}


def agree(got, wanted, within=1e-6):
    assert got.keys() == wanted.keys()
    for name in got:
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(wanted[name]), rtol=within, atol=within, err_msg=name)


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(CASES), weights=WEIGHTS, dtype=st.sampled_from([torch.float32, torch.long, torch.float16]))
def test_an_integer_weight_is_so_many_copies(case, weights, dtype):
    kind, (predictions, targets) = case
    copies = torch.tensor(weights)
    wanted = reading([kind], steps(predictions.repeat_interleave(copies, 0), targets.repeat_interleave(copies, 0)))
    agree(reading([kind], steps(predictions, targets, copies.to(dtype))), wanted, 1e-5)


@settings(max_examples=200, deadline=None)
@given(
    case=st.sampled_from(CASES),
    weights=st.lists(st.floats(0, 1e3), min_size=ROWS, max_size=ROWS),
    edges=st.lists(st.integers(1, ROWS - 1), max_size=4),
    large=st.booleans(),
    flagged=st.booleans(),
)
def test_splitting_the_batch_changes_nothing(case, weights, edges, large, flagged):
    # `large` batches are counted at once, others are kept and joined.
    kind, batch = case
    weights = torch.tensor(weights)
    weights[[1, 7]] += 1
    wanted = reading([kind], steps(*batch, weights))
    flag = torch.tensor(0.0) if flagged else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meter, "SMALL_BYTES", 0 if large else 10**6)
        agree(reading([kind], steps(*batch, weights, edges, flag)), wanted, 1e-5)


@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_weights_of_one_change_no_value(kind, batch):
    agree(reading([kind], steps(*batch, torch.ones(ROWS))), reading([kind], steps(*batch)))


@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_what_weighs_nothing_may_be_anything(kind, batch):
    predictions, targets = (tensor.clone() for tensor in batch)
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) + 0.5
    kept = torch.arange(ROWS) % 4 != 1
    wanted = reading([kind], steps(predictions[kept], targets[kept], weights[kept]))
    for tensor in (predictions, targets):
        if tensor.is_floating_point():
            tensor[~kept] = math.nan
    agree(reading([kind], steps(predictions, targets, torch.where(kept, weights, 0))), wanted)


@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_only_weights_of_zero_are_no_reading(kind, batch):
    found = reading([kind], steps(*batch, torch.zeros(ROWS)))[kind]
    assert np.all((np.nan_to_num(np.asarray(found)) == 0) | (kind == "perplexity"))


@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_the_scale_of_weights_does_not_matter(kind, batch):
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)).double()
    wanted, scaled = (reading([kind], steps(*batch, w))[kind] for w in (weights, weights * 2.0**-60))
    if kind == "confusion_matrix":
        scaled = (np.asarray(scaled) * 2.0**60).tolist()
    agree({kind: scaled}, {kind: wanted})


# --- against scikit-learn --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.integers(-4, 4), min_size=ROWS, max_size=ROWS),
    weights=st.lists(st.floats(0.125, 100, width=32), min_size=ROWS, max_size=ROWS),
    targets=st.lists(st.integers(0, 1), min_size=ROWS, max_size=ROWS).filter(lambda of: 0 < sum(of) < ROWS),
)
def test_ranked_values_are_scikit_learns_ties_too(scores, weights, targets):
    batch = torch.tensor(scores).float(), torch.tensor(targets), torch.tensor(weights)
    found = reading(list(RANKED), steps(*batch))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(targets, scores, sample_weight=weights), abs=1e-9)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(targets, scores, sample_weight=weights))


def test_counted_and_regression_values_are_scikit_learns():
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    one = {"sample_weight": weights.numpy()}
    logits, targets = LAYOUTS["multiclass"]
    taken, true = logits.argmax(1).numpy(), targets.numpy()
    macro = {"average": "macro", "zero_division": 0.0}
    agree(
        reading(list(COUNTED), steps(logits, targets, weights)),
        {
            "accuracy": sk.accuracy_score(true, taken, **one),
            "precision": sk.precision_score(true, taken, **macro, **one),
            "recall": sk.recall_score(true, taken, **macro, **one),
            "f1": sk.f1_score(true, taken, **macro, **one),
            "dice": sk.f1_score(true, taken, average="micro", **one),
            "iou": sk.jaccard_score(true, taken, **macro, **one),
            "confusion_matrix": sk.confusion_matrix(true, taken, **one),
        },
    )
    p, t = random(ROWS), random(ROWS, seed=4) + 2000
    agree(
        reading(list(REGRESSION), steps(p, t, weights)),
        {
            "mse": sk.mean_squared_error(t, p, **one),
            "rmse": sk.root_mean_squared_error(t, p, **one),
            "mae": sk.mean_absolute_error(t, p, **one),
            "r2": sk.r2_score(t.double(), p.double(), **one),
        },
        1e-5,
    )


def test_token_weights_of_the_targets_shape():
    logits, targets = LAYOUTS["tokens"]
    weights = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(3))
    flat = logits.reshape(-1, 5), targets.flatten(), weights.flatten()
    kinds = [*COUNTED, *RANKED, "top2", "perplexity"]
    agree(reading(kinds, steps(logits, targets, weights)), reading(kinds, steps(*flat)))


def test_pixel_and_label_weights():
    scores, targets = LAYOUTS["label masks"]
    weights = torch.rand(ROWS, 3, 3, generator=torch.Generator().manual_seed(3))
    flat = [t.movedim(1, -1).reshape(-1, 2) for t in (scores, targets)]
    agree(reading(list(COUNTED), steps(scores, targets, weights)), reading(list(COUNTED), steps(*flat, weights.flatten())))
    each = torch.rand(*targets.shape, generator=torch.Generator().manual_seed(3))
    found = reading(["accuracy"], steps(scores, targets, each))["accuracy"]
    right = ((scores > 0) == targets.bool()).double()
    assert found == pytest.approx(float((right * each).sum() / each.sum()), abs=1e-6)


@pytest.mark.parametrize("shape", [(ROWS + 1,), (ROWS, 2), (3, ROWS), (ROWS, 3, 2)])
@pytest.mark.parametrize("kind", ["accuracy", "f1", "auroc", "perplexity", "top2"])
def test_weights_that_fit_nothing_are_an_error(kind, shape):
    with pytest.raises(MetricError, match=r"sample_weights are Tensor\(.*targets"):
        reading([kind], [misfit(LAYOUTS["tokens"], shape)])


@pytest.mark.parametrize("shape", [(ROWS + 1,), (ROWS, 2), (3, ROWS), (ROWS, 3, 2)])
@pytest.mark.parametrize("kind", [*REGRESSION, "cosine_similarity"])
def test_the_same_of_regressions(kind, shape):
    with pytest.raises(MetricError, match=r"sample_weights are Tensor\(.*targets"):
        reading([kind], [misfit((random(ROWS, 3), random(ROWS, 3)), shape)])


def misfit(batch, shape):
    return Step(torch.zeros(()), *batch, ROWS, sample_weights=torch.ones(shape))


def test_too_many_weights_of_one_batch_do_not_make_up_for_another():
    logits, targets = LAYOUTS["multiclass"]
    one = Meter(["accuracy"])
    with pytest.raises(MetricError, match=r"Tensor\(5,\) .* targets Tensor\(4,\) int64: one weight a sample"):
        one.record(Step(torch.zeros(()), logits[:4], targets[:4], 4, sample_weights=torch.ones(5)))


@pytest.mark.parametrize("weights", [[1.0] * ROWS, torch.tensor(1.0), 2])
def test_weights_are_a_vector(weights):
    with pytest.raises(MetricError, match=r"sample_weights are .*; they are a tensor \(B,\)"):
        reading(["accuracy"], [Step(torch.zeros(()), *LAYOUTS["multiclass"], ROWS, sample_weights=weights)])


def test_a_column_of_weights_is_a_vector():
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    for name in ("multiclass", "tokens", "column", "labels"):
        batch = LAYOUTS[name]
        agree(reading(["accuracy"], steps(*batch, weights[:, None])), reading(["accuracy"], steps(*batch, weights)))


# --- batches with and without weights, counts and their types --------------------------------------------------------


def test_counts_are_integers_without_weights_and_sums_with():
    batch = LAYOUTS["multiclass"]
    plain = reading(["confusion_matrix"], steps(*batch))["confusion_matrix"]
    assert all(type(cell) is int for row in plain for cell in row)
    weighted = reading(["confusion_matrix"], steps(*batch, torch.full((ROWS,), 0.25)))["confusion_matrix"]
    assert np.array_equal(np.asarray(plain) / 4, weighted)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_batches_without_weights_among_others_count_once(kind, batch, large, monkeypatch):
    monkeypatch.setattr(meter, "SMALL_BYTES", 0 if large else 10**6)
    weights = torch.tensor([1.0] * 4 + [2.0, 0.5, 0.0, 3.0] + [1.0] * 4)
    mixed = list(steps(*batch, weights, (4, 8)))
    mixed[0].sample_weights = mixed[2].sample_weights = None
    agree(reading([kind], mixed), reading([kind], steps(*batch, weights)), 1e-5)
    agree(reading([kind], mixed[::-1]), reading([kind], steps(*batch, weights)), 1e-5)


def test_after_a_reset_counts_are_integers_again():
    one = Meter(["confusion_matrix"])
    for weights in (torch.full((ROWS,), 0.5), None):
        one.reset()
        for step in steps(*LAYOUTS["multiclass"], weights):
            one.record(step)
        found = one.read(last=True)["confusion_matrix"]
    assert all(type(cell) is int for row in found for cell in row)


def test_a_million_batches_of_small_weights_do_not_stand_still():
    # In single precision a sum of 2^24 no longer moves by 1.
    built = build("accuracy", resolve(["accuracy"])["accuracy"], *LAYOUTS["multiclass"])
    built.update(built.metric, *LAYOUTS["multiclass"], torch.full((ROWS,), 2.0**24))
    before = float(built.metric.items)
    built.update(built.metric, *LAYOUTS["multiclass"], torch.ones(ROWS))
    assert float(built.metric.items) == before + ROWS


# --- saved, skipped, read early --------------------------------------------------------------------------------------


def hits(predictions, targets, weights):
    return (weights * (predictions.argmax(1) == targets)).sum() / weights.sum()


class Errors(torchmetrics.Metric):
    """Of a user: weighted, by a parameter."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0))
        self.add_state("count", torch.tensor(0.0))

    def update(self, predictions, targets, sample_weight=None):
        wrong = (predictions.argmax(1) != targets).float()
        weight = torch.ones(len(wrong)) if sample_weight is None else sample_weight
        self.total += (wrong * weight).sum()
        self.count += weight.sum()

    def compute(self):
        return self.total / self.count


MANY = {
    "accuracy": "accuracy",
    "f1": "f1",
    "auroc": "auroc",
    "hits": hits,
    "errors": Errors(),
    "plain": ax.metrics.unweighted("accuracy"),
}


def many(count, flagged, rows=3):
    made = torch.Generator().manual_seed(0)
    for index in range(count):
        predictions, targets = torch.randn(rows, 4, generator=made), torch.randint(4, (rows,), generator=made)
        weights = None if index % 5 == 4 else torch.rand(rows, generator=made)
        flag = torch.tensor(float(index % 7 == 3)) if flagged else None
        yield Step(torch.tensor(1.0), predictions, targets, rows if weights is None else weights.sum(), {}, flag, weights)


@pytest.mark.parametrize("flagged", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("cut", [1, 5, 255, 256, 300])
def test_saved_and_restored_in_the_middle_it_reads_the_same(flagged, cut):
    taken = list(many(320, flagged))
    first, whole, other = Meter(MANY), Meter(MANY), Meter(MANY)
    for step in taken[:cut]:
        first.record(step)
    other.load_state_dict(decode(*encode(first.state_dict())))
    for step in taken:
        whole.record(step)
    for step in taken[cut:]:
        other.record(step)
    assert other.read() == whole.read()


def test_what_waits_is_saved_with_its_weights():
    one = Meter(["accuracy"])
    weights = torch.ones(ROWS)
    for step in steps(*LAYOUTS["multiclass"], weights):
        one.record(step)
    weights.zero_()  # a loader may write its next batch there
    (entry,) = one.state_dict()["metrics"]["accuracy"]["waiting"]
    assert len(entry) == 4
    assert entry[2] is None
    assert torch.equal(entry[3], torch.ones(ROWS))


@pytest.mark.parametrize("small", [10**6, 0], ids=["kept", "counted at once"])
def test_skipped_steps_are_left_out(small, monkeypatch):
    monkeypatch.setattr(meter, "SMALL_BYTES", small)
    metrics = {name: MANY[name] for name in ("accuracy", "f1", "hits", "errors", "plain")}
    taken = list(many(20, True))
    kept = [step for step in taken if not float(step.skipped)]
    agree(reading(metrics, taken), reading(metrics, kept))


@pytest.mark.parametrize("flagged", [False, True], ids=["evaluation", "training"])
def test_reading_changes_no_later_reading(flagged):
    quiet, asked = Meter(MANY), Meter(MANY)
    for index, step in enumerate(many(300, flagged)):
        quiet.record(step)
        asked.record(step)
        if index in (0, 100, 255, 256):
            asked.read()
    assert asked.read() == quiet.read()


# --- no host reads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [10**6, 0], ids=["kept", "counted at once"])
@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_recording_reads_nothing(kind, batch, small, monkeypatch):
    one, taken = Meter([kind]), list(steps(*batch, torch.rand(ROWS), (5,), torch.tensor(0.0)))
    monkeypatch.setattr(meter, "SMALL_BYTES", small)
    with NoHostReads():
        for step in taken:
            one.record(step)


@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_updates_follow_from_shapes_alone(kind, batch):
    predictions, targets = (tensor.to("meta") for tensor in batch)
    built = build(kind, resolve([kind])[kind], predictions, targets)
    built.update(built.metric, predictions, targets, torch.ones(ROWS, device="meta"))
    assert all(part.is_meta for state in built.metric.metric_state.values() for part in torch.utils._pytree.tree_leaves(state))


# --- what takes weights, and what does not ---------------------------------------------------------------------------


def plain(predictions, targets):
    return (predictions.argmax(1) == targets).float().mean()


def optional(predictions, targets, *, sample_weight=None):
    right = (predictions.argmax(1) == targets).double()
    return right.mean() if sample_weight is None else (right * sample_weight).sum() / sample_weight.sum()


def by_place(predictions, targets, w, /):
    return hits(predictions, targets, w)


@pytest.mark.parametrize("metric", [hits, optional, by_place, lambda p, t, weights: hits(p, t, weights)])
@settings(max_examples=25, deadline=None)
@given(edges=st.lists(st.integers(1, ROWS - 1), max_size=4))
def test_functions_of_three_get_the_weights(metric, edges):
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    found = reading({"m": metric, "accuracy": "accuracy"}, steps(*LAYOUTS["multiclass"], weights, edges))
    assert found["m"] == pytest.approx(found["accuracy"], abs=1e-6)


@pytest.mark.parametrize("metric", [hits, optional, by_place])
def test_functions_of_three_on_batches_without_weights(metric):
    found = reading({"m": metric, "accuracy": "accuracy"}, steps(*LAYOUTS["multiclass"], None, (3, 5)))
    assert found["m"] == pytest.approx(found["accuracy"], abs=1e-6)


def test_functions_are_averaged_by_weights_whatever_the_loss_is_a_mean_of():
    logits, targets = LAYOUTS["multiclass"]
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    taken = list(steps(logits, targets, weights, (2,)))
    taken[0].weight, taken[1].weight = 100, 1  # tokens, say
    found = reading({"m": hits, "plain": ax.metrics.unweighted(plain), "accuracy": "accuracy"}, taken)
    assert found["m"] == pytest.approx(found["accuracy"], abs=1e-6)
    assert found["plain"] == pytest.approx(float(plain(logits, targets)))


def test_objects_whose_update_takes_weights_get_them():
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    found = reading({"m": Errors(), "c": Errors, "accuracy": "accuracy"}, steps(*LAYOUTS["multiclass"], weights, (3, 5)))
    assert found["m"] == found["c"] == pytest.approx(1 - found["accuracy"], abs=1e-6)


REFUSED = {
    "function": plain,
    "instance": torchmetrics.classification.MulticlassAccuracy(4),
    "class": torchmetrics.Accuracy,
    "factory": lambda num_classes: torchmetrics.classification.MulticlassF1Score(num_classes),
    "of torch": F.cross_entropy,  # whose weight is of classes: of four, as there are weights here
    "another default": lambda predictions, targets, weight=0.5: weight,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_and_may_be_told_to_do_without(kind):
    logits, targets = LAYOUTS["multiclass"][0][:4], LAYOUTS["multiclass"][1][:4]
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(MetricError, match=r"metric 'mine' is a .* takes no sample weights.*of three|metric 'mine' .* weights"):
        reading({"mine": REFUSED[kind]}, steps(logits, targets, weights))
    told = reading({"mine": ax.metrics.unweighted(REFUSED[kind])}, steps(logits, targets, weights, (1,)))
    assert told["mine"] == pytest.approx(reading({"mine": REFUSED[kind]}, steps(logits, targets, None, (1,)))["mine"])


def test_the_refusal_says_what_to_do():
    says = r"'plain' is a function .*write a function of \(predictions, targets, weights\).*: ax.metrics.unweighted\(\.\.\.\)"
    with pytest.raises(MetricError, match=says):
        reading([plain], steps(*LAYOUTS["multiclass"], torch.ones(ROWS)))


@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_unweighted_names_read_as_without_weights(kind, batch):
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    found = reading([ax.metrics.unweighted(kind)], steps(*batch, weights, (4,)))
    assert found == reading([kind], steps(*batch, None, (4,)))


def test_unweighted_names_its_metric():
    instance = torchmetrics.classification.MulticlassAccuracy(4)
    given = [ax.metrics.unweighted(one) for one in ("top3", plain, instance, torchmetrics.R2Score)]
    assert list(resolve(given)) == ["top3", "plain", "multiclass_accuracy", "r2_score"]
    assert list(resolve({"own": ax.metrics.unweighted(lambda predictions, targets: 0)})) == ["own"]
    assert resolve([ax.metrics.unweighted(ax.metrics.unweighted("f1"))])["f1"].joinable


def test_unweighted_refuses_what_is_no_metric():
    with pytest.raises(UnknownNameError, match="did you mean 'accuracy'"):
        ax.metrics.unweighted("acuracy")
    with pytest.raises(ConfigurationError, match="3 is no metric"):
        ax.metrics.unweighted(3)
    with pytest.raises(ConfigurationError, match=r"requires \(x\)"):
        ax.metrics.unweighted(lambda x: x)
    with pytest.raises(ConfigurationError, match=r"takes one metric, not list of 1.*call it on each"):
        ax.metrics.unweighted(["f1"])
    with pytest.raises(ConfigurationError, match="takes one metric, not MetricCollection"):
        ax.metrics.unweighted(torchmetrics.MetricCollection([torchmetrics.R2Score()]))
    with pytest.raises(ConfigurationError, match=r"has no name of its own: metrics=\{'name': ...\}"):
        resolve([ax.metrics.unweighted(lambda predictions, targets: 0)])
