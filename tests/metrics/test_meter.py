import gc
import math

import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

import axontrain as ax
from axontrain import MetricError, Step
from axontrain.checkpoint.encode import decode, encode
from axontrain.metrics import Meter, meter

CLASSES = 4


def steps(sizes, seed=0, skipped=None):
    made = torch.Generator().manual_seed(seed)
    out = []
    for index, size in enumerate(sizes):
        predictions = torch.randn(size, CLASSES, generator=made)
        targets = torch.randint(CLASSES, (size,), generator=made)
        loss = torch.nn.functional.cross_entropy(predictions, targets)
        flag = None if skipped is None else torch.tensor(float(index in skipped))
        out.append(Step(loss, predictions, targets, size, {"margin": predictions.max()}, flag))
    return out


def fed(metrics, taken):
    one = Meter(metrics)
    for step in taken:
        one.record(step)
    return one


def hits(predictions, targets):
    return (predictions.argmax(1) == targets).float().mean()


METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "auroc": "auroc",
    "confusion_matrix": "confusion_matrix",
    "hits": hits,
    "own": MulticlassF1Score(CLASSES, average="macro"),
    "listed": MulticlassAUROC(CLASSES, thresholds=None),
}
pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all targets", "ignore:No (positive|negative) samples")


@pytest.mark.parametrize("sizes", [[8], [8, 8, 8, 3], [1, 7, 2, 30, 5], [4] * 300], ids=["one", "ragged", "all", "fold"])
def test_readings_are_torchmetrics_own(sizes):
    taken = steps(sizes)
    readings = fed(METRICS, taken).read()
    predictions, targets = (torch.cat([getattr(step, name) for step in taken]) for name in ("predictions", "targets"))
    weights = torch.tensor(sizes, dtype=torch.float64)
    assert readings["loss"] == pytest.approx(float((torch.stack([s.loss for s in taken]) * weights).sum() / weights.sum()))
    margins = torch.stack([step.values["margin"] for step in taken])
    assert readings["margin"] == pytest.approx(float((margins * weights).sum() / weights.sum()))
    expected = {
        "accuracy": MulticlassAccuracy(CLASSES, average="micro"),
        "f1": MulticlassF1Score(CLASSES, average="macro"),
        "auroc": MulticlassAUROC(CLASSES, average="macro", thresholds=200),
        "own": MulticlassF1Score(CLASSES, average="macro"),
        "listed": MulticlassAUROC(CLASSES, thresholds=None),
    }
    for name, metric in expected.items():
        # Of a name, auroc is taken at fixed thresholds.
        tolerance = 0.02 if name == "auroc" else 1e-6
        assert readings[name] == pytest.approx(float(metric(predictions, targets)), abs=tolerance), name
    assert readings["hits"] == pytest.approx(readings["accuracy"])
    matrix = torchmetrics.functional.confusion_matrix(predictions, targets, "multiclass", num_classes=CLASSES)
    assert readings["confusion_matrix"] == matrix.tolist()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sets(st.integers(0, 11)))
def test_reading_at_any_moment_changes_no_later_reading(sizes, moments):
    taken, metrics = steps(sizes), {name: METRICS[name] for name in ("accuracy", "f1", "hits", "own")}
    quiet, asked = Meter(metrics), Meter(metrics)
    for index, step in enumerate(taken):
        quiet.record(step)
        asked.record(step)
        if index in moments:
            assert asked.read() == asked.read()
    assert asked.read() == quiet.read()


def regressions(count, rows, flagged, seed=0):
    made = torch.Generator().manual_seed(seed)
    for index in range(count):
        predictions, targets = torch.randn(rows, generator=made), torch.randn(rows, generator=made)
        flag = torch.tensor(float(index % 7 == 3)) if flagged else None
        yield Step(torch.nn.functional.mse_loss(predictions, targets), predictions, targets, rows, {}, flag)


@pytest.mark.parametrize("flagged", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("small", "most"), [(10**6, 10**9), (10**6, 16_000), (0, 10**9)], ids=["joined", "full", "large"])
def test_reading_changes_no_later_reading_over_many_folds(monkeypatch, flagged, small, most):
    # Sums of floats depend on their order: equal to the last bit they are only if nothing moved.
    monkeypatch.setattr(meter, "SMALL_BYTES", small)
    monkeypatch.setattr(meter, "MOST_BYTES", most)
    metrics = {"mse": "mse", "mae": "mae", "own": torchmetrics.MeanSquaredError()}
    quiet, asked = Meter(metrics), Meter(metrics)
    for index, step in enumerate(regressions(800, 5, flagged)):
        quiet.record(step)
        asked.record(step)
        if index in (0, 100, 255, 256, 300, 600, 601):
            asked.read()
    assert asked.read() == quiet.read()


def tensors():
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("weighted", [False, True])
def test_what_waits_for_a_reading_is_a_few_tensors(weighted):
    # A step of a tiny model takes so little time that ten thousand wait for a reading once a second.
    def taken(count):
        for step in steps([4] * count, skipped={3, 2 * meter.FOLD + 1}):
            step.sample_weights = torch.ones(4) if weighted else None
            yield step

    one = fed(["accuracy", "f1"], taken(2 * meter.FOLD))
    before = tensors()
    for step in taken(20 * meter.FOLD):
        one.record(step)
    del step
    assert tensors() - before < meter.FOLD
    assert len(one.state_dict()["metrics"]["f1"]["waiting"]) == 22  # of few tensors in a file, too


@pytest.mark.parametrize("left_out", [range(0, 600, 7), range(256), range(600)], ids=["some", "a fold", "all"])
@pytest.mark.parametrize("lengths", [[3], [3, 5, 2]], ids=["alike", "ragged"])
def test_steps_that_were_skipped_are_left_out_over_many_folds(lengths, left_out):
    made = torch.Generator().manual_seed(0)
    flagged, plain = Meter(["mae"]), Meter(["mae"])
    for index in range(600):
        predictions, targets = torch.randn(2, 2, lengths[index % len(lengths)], generator=made)  # do not fit, if ragged
        if skipped := index in left_out:
            predictions[:] = math.nan
        flagged.record(Step(torch.tensor(1.0), predictions, targets, 2, {}, torch.tensor(float(skipped))))
        if not skipped:
            plain.record(Step(torch.tensor(1.0), predictions, targets, 2))
    found, expected = (one.read().get("mae", -1.0) for one in (flagged, plain))  # no reading where nothing is left
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("flagged", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("cut", [1, 5, 255, 256, 300])
def test_saved_and_restored_in_the_middle_it_reads_the_same(flagged, cut):
    skipped = {2, 4, 200, 256, 310} if flagged else None
    taken = steps([3] * 320, skipped=skipped)
    whole = fed(METRICS, taken).read()
    other = Meter(METRICS)
    other.load_state_dict(decode(*encode(fed(METRICS, taken[:cut]).state_dict())))
    for step in taken[cut:]:
        other.record(step)
    assert other.read() == whole


def test_restored_and_saved_again_before_a_batch_nothing_is_lost():
    taken = steps([4] * 6)
    first, second, third = fed(METRICS, taken[:3]), Meter(METRICS), Meter(METRICS)
    second.load_state_dict(first.state_dict())
    third.load_state_dict(second.state_dict())
    for step in taken[3:]:
        third.record(step)
    assert third.read() == fed(METRICS, taken).read()


def test_restoring_replaces_what_was_taken_in():
    taken = steps([4] * 6)
    state = fed(METRICS, taken[:3]).state_dict()
    used = fed(METRICS, taken[3:])
    used.load_state_dict(state)
    assert used.read() == fed(METRICS, taken[:3]).read()


def test_restoring_an_empty_state_forgets_the_metrics_too():
    used = fed(METRICS, steps([4] * 3))
    used.load_state_dict(Meter(METRICS).state_dict())
    again = steps([5] * 2, seed=1)
    for step in again:
        used.record(step)
    assert used.read() == fed(METRICS, again).read()


def test_a_saved_state_does_not_change_with_the_meter():
    taken = steps([4] * 6)
    used = fed(METRICS, taken[:3])
    state = used.state_dict()
    expected = used.read()
    for step in taken[3:]:
        used.record(step)
    other = Meter(METRICS)
    other.load_state_dict(state)
    other.record(taken[3])
    assert other.read() == fed(METRICS, taken[:4]).read()
    assert expected == fed(METRICS, taken[:3]).read()


def test_reset_begins_anew():
    used = fed(METRICS, steps([4] * 300))
    assert len(used)
    used.reset()
    assert len(used) == 0
    assert used.read() == {}
    again = steps([5] * 2, seed=1)
    for step in again:
        used.record(step)
    assert used.read() == fed(METRICS, again).read()


def test_nothing_taken_in_reads_as_nothing():
    assert Meter().read() == Meter(METRICS).read() == {}


@pytest.mark.parametrize("weight", [0, torch.tensor(0)], ids=repr)
def test_a_step_of_weight_zero_adds_nothing_to_means(weight):
    one = Meter()
    one.record(Step(torch.tensor(2.0), weight=3, values={"a": 1.0}))
    one.record(Step(torch.tensor(math.nan), weight=weight, values={"a": math.nan}))
    assert one.read() == {"loss": 2.0, "a": 1.0}


def test_values_may_come_and_go():
    one = Meter()
    one.record(Step(torch.tensor(2.0), weight=1, values={"a": 1.0}))
    one.record(Step(torch.tensor(4.0), weight=1, values={"b": torch.tensor(3.0)}))
    assert one.read() == {"loss": 3.0, "a": 1.0, "b": 3.0}


def test_a_users_instance_is_cloned_and_stays_as_it_was():
    own = MulticlassAccuracy(CLASSES)
    first, second = fed({"own": own}, steps([4] * 3)), fed({"own": own}, steps([4] * 3, seed=1))
    assert own.update_count == 0
    assert first.read()["own"] != second.read()["own"]


def test_a_collection_reads_as_each_of_its_metrics():
    collection = torchmetrics.MetricCollection({"acc": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES)})
    taken = steps([5, 7, 2])
    readings = fed({"of": collection}, taken).read()
    for step in taken:
        collection.update(step.predictions, step.targets)
    expected = {f"of/{name}": float(value) for name, value in collection.compute().items()}
    assert {name: value for name, value in readings.items() if name.startswith("of/")} == pytest.approx(expected)


def test_a_metric_that_computes_a_mapping_reads_as_several():
    class Two(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("count", torch.tensor(0))

        def update(self, predictions, targets):
            self.count += len(targets)

        def compute(self):
            return {"count": self.count, "twice": 2 * self.count}

    assert fed({"n": Two}, steps([3, 4])).read() | {"loss": 0, "margin": 0} == {
        "loss": 0, "margin": 0, "n/count": 7.0, "n/twice": 14.0
    }  # fmt: skip


class Failing(torchmetrics.Metric):
    def __init__(self, where):
        super().__init__()
        self.where = where
        self.add_state("count", torch.tensor(0))

    def update(self, predictions, targets):
        if self.where == "update":
            raise ValueError("no such thing")

    def compute(self):
        raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("where", "told"), [("update", "does not take these predictions and targets"), ("compute", "cannot be computed")]
)
def test_an_error_in_a_metric_names_it(where, told):
    with pytest.raises(MetricError, match=rf"the metric 'mine' {told}: no such thing"):
        fed({"mine": Failing(where)}, steps([3])).read()


def test_a_function_that_gives_no_scalar_is_named():
    with pytest.raises(MetricError, match=r"metric 'each' is a function .* must return one scalar"):
        fed({"each": lambda predictions, targets: predictions}, steps([3]))


def test_metrics_of_a_step_without_predictions_are_an_error():
    with pytest.raises(MetricError, match="metric 'accuracy': this objective's Step has no predictions"):
        fed(["accuracy"], [Step(torch.tensor(1.0))])


def test_a_state_of_another_metric_is_refused():
    state = fed({"m": MulticlassAccuracy(CLASSES)}, steps([3])).state_dict()
    used = fed({"m": Failing("compute")}, steps([3]))
    with pytest.raises(MetricError, match="the metric 'm' has no state 'tp'"):
        used.load_state_dict(state)


def test_predictions_that_change_in_place_later_are_counted_as_they_were():
    # A model may write its outputs into one buffer; what waits to be counted is that buffer.
    one = Meter(["accuracy"])
    buffer = torch.zeros(2, 2)
    for winner, target in ((0, 0), (1, 1)):
        buffer.zero_()[:, winner] = 1
        one.record(Step(torch.tensor(0.0), buffer, torch.full((2,), target), 2))
    assert one.read()["accuracy"] == 1.0


def test_a_recorded_step_keeps_no_graph():
    weights = torch.ones(CLASSES, requires_grad=True)
    predictions = torch.randn(3, CLASSES) * weights
    one = fed(["accuracy"], [Step(torch.tensor(0.0), predictions, torch.zeros(3, dtype=torch.long), 3, {"a": weights.sum()})])
    kept = one.state_dict()
    assert not kept["metrics"]["accuracy"]["waiting"][0][0].requires_grad
    assert not kept["losses"][0]["values"]["a"].requires_grad


def regression(targets, skipped=None, rows=3):
    flag = None if skipped is None else torch.tensor(skipped)
    return Step(torch.tensor(1.0), torch.randn(rows, 1), torch.full((rows, 1), targets), rows, {}, flag)


def test_a_metric_of_classes_does_not_measure_a_regression():
    objective = ax.Supervised(torch.nn.Linear(1, 1), "mse", metrics=["accuracy"])
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), device="cpu", progress=False)
    with pytest.raises(MetricError, match=r"'accuracy' .* cannot take for classes .* use mse, mae or r2"):
        loop.fit(ax.ArrayDataset(torch.randn(64, 1), 3 * torch.randn(64, 1)), epochs=1)


@pytest.mark.parametrize("rows", [3, 100_000], ids=["kept", "counted at once"])
def test_targets_of_a_step_that_was_skipped_are_not_looked_at(rows):
    one = fed(["accuracy"], [regression(1.0, 0.0, rows), regression(math.nan, 1.0, rows)])
    assert 0 <= one.read()["accuracy"] <= 1
    one.record(regression(math.nan, 0.0, rows))
    with pytest.raises(MetricError, match=f"{rows} of the targets"):
        one.read()


def test_what_was_seen_of_targets_is_saved_too():
    saved = fed(["accuracy"], [regression(3.0)] * 2 * meter.FOLD).state_dict()
    restored = Meter(["accuracy"])
    restored.load_state_dict(decode(*encode(saved)))
    restored.record(regression(1.0))
    with pytest.raises(MetricError, match=f"{6 * meter.FOLD} of the targets"):
        restored.read()


# --- a state that was forged -----------------------------------------------------------------------------------------


def looks(num_classes=None):
    assert float(torch.ones(1)) == 1  # as a constructor may look at its own tensors
    return MulticlassF1Score(num_classes, average="macro")


@pytest.mark.parametrize(
    "metrics",
    [["confusion_matrix"], {"own": torchmetrics.classification.MulticlassConfusionMatrix}, {"looks": looks}],
    ids=["by name", "a class", "a function"],
)
def test_a_forged_example_takes_no_memory(metrics):
    state = fed(metrics, steps([4] * 3)).state_dict()
    before = Meter(metrics)
    before.load_state_dict(state)
    assert before.read() == fed(metrics, steps([4] * 3)).read()
    shape = [4, 2**21]  # a matrix of 32 TB
    state["example"] = [[shape, "torch.float32"], [[4], "torch.int64"]]
    forged = Meter(metrics)
    forged.load_state_dict(state)
    with pytest.raises(MetricError, match=r"the saved metrics are of predictions \(4, 2097152\) and targets \(4,\), for which"):
        forged.read()


@pytest.mark.parametrize("classes", [CLASSES, 60_000])
def test_what_is_restored_of_many_classes_is_read_without_a_batch(classes):
    metrics = {"accuracy": "accuracy", "perplexity": "perplexity", "f1": "f1", "looks": looks}
    if classes > CLASSES:
        del metrics["looks"]  # of torchmetrics, whose matrix of so many takes 29 GB
    predictions, targets = torch.randn(3, classes), torch.arange(3)
    step = Step(torch.tensor(1.0), predictions, targets, 3)
    one = fed(metrics, [step] * 2)
    expected = one.read(last=True)  # so that nothing waits, and only states are saved
    for extra in ({}, {"hits": hits}):
        other = Meter({**metrics, **extra})
        other.load_state_dict(decode(*encode(one.state_dict())))
        assert {name: value for name, value in other.read().items() if name in expected} == expected


def test_a_metric_that_is_new_is_made_without_a_batch():
    one = fed(["accuracy"], steps([4] * 3))
    other = Meter(["accuracy", "confusion_matrix"])
    other.load_state_dict(one.state_dict())
    assert other.read() == one.read()


def test_what_waits_is_saved_joined_and_goes_on_the_same():
    torch.manual_seed(0)
    steps = [
        Step(torch.tensor(1.0), torch.randn(n, 3), torch.randint(3, (n,)), n, skipped=torch.tensor(float(index % 7 == 3)))
        for index, n in enumerate([4, 4, 2] * 200)
    ]
    whole = meter.Meter(["accuracy", "f1"])
    for step in steps:
        whole.record(step)
    for cut in (1, 255, 256, 257, 513, 599):
        first, second = meter.Meter(["accuracy", "f1"]), meter.Meter(["accuracy", "f1"])
        for step in steps[:cut]:
            first.record(step)
        second.load_state_dict(first.state_dict())
        for step in steps[cut:]:
            second.record(step)
        assert second.read() == whole.read()


def test_a_metric_that_is_restored_is_made_as_it_was_and_not_by_the_next_batch():
    # Of (B, 3, 3) one cannot see which of the two dimensions are the classes; of the first batch, (B, 5, 3), one could.
    def tagged(tokens):
        generator = torch.Generator().manual_seed(tokens)
        logits, labels = torch.randn(4, tokens, 3, generator=generator), torch.randint(3, (4, tokens), generator=generator)
        return Step(torch.tensor(0.0), logits, labels, 4 * tokens)

    whole, first, second = (meter.Meter(["accuracy"]) for _ in range(3))
    for step in (tagged(5), tagged(3)):
        whole.record(step)
    first.record(tagged(5))
    second.load_state_dict(first.state_dict())
    second.record(tagged(3))
    assert second.read() == whole.read()


def test_what_waits_is_a_copy_whatever_its_structure():
    buffer = {"mean": torch.zeros(2)}
    one = meter.Meter({"kept": Kept()})
    for value in (1.0, 2.0):
        buffer["mean"].fill_(value)
        one.record(Step(torch.tensor(0.0), buffer, torch.ones(2), skipped=torch.tensor(0.0)))
    assert one.read()["kept"] == 6.0


def test_where_all_steps_were_skipped_nothing_is_said():
    one = meter.Meter(["accuracy"])
    large = torch.randn(40_000, 3), torch.randint(3, (40_000,))
    one.record(Step(torch.tensor(float("nan")), *large, skipped=torch.tensor(1.0)))
    assert "accuracy" not in one.read()
    one.record(Step(torch.tensor(1.0), *large, skipped=torch.tensor(0.0)))
    assert one.read()["accuracy"] == pytest.approx((large[0].argmax(1) == large[1]).float().mean().item())


class Kept(torchmetrics.Metric):
    """Keeps what it gets, in a list."""

    def __init__(self):
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, predictions, targets):
        self.values.append(predictions["mean"] * targets)

    def compute(self):
        return torch.cat(self.values).sum()
