import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook

import axontrain as ax
from axontrain.checkpoint.encode import decode, encode
from axontrain.optimizer import names

NAN, INF = float("nan"), float("inf")

# Every algorithm that takes dense gradients, and the options that change what it keeps. Muon takes matrices alone.
DENSE = sorted(set(names()) - {"lbfgs", "sparseadam"})
VARIANTS = [
    *((name, {}) for name in DENSE),
    *((name, {"fused": False}) for name in ("sgd", "adam", "adamw", "adagrad")),
    *((name, {"foreach": True}) for name in ("adam", "rmsprop", "adadelta", "nadam", "asgd", "rprop", "radam", "adamax")),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "fused": False}),
    ("sgd", {"momentum": 0.9, "dampening": 0.5}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("sgd", {"maximize": True}),
    ("adam", {"amsgrad": True}),
    ("adamw", {"amsgrad": True, "fused": False}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
    ("adagrad", {"initial_accumulator_value": 0.1}),
    ("adagrad", {"lr_decay": 0.1, "weight_decay": 0.01}),
    ("radam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
]


def model(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))


def data(count, rows=4, seed=1):
    made = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, 5, generator=made), torch.randint(3, (rows,), generator=made)) for _ in range(count)]


def poison(batch, value=NAN):
    return torch.full_like(batch[0], value), batch[1]


def inserted(batches, places, value=NAN):
    """The same batches, with a poisoned one before those at ``places`` of the whole."""
    out = list(batches)
    for place in places:
        out.insert(place, poison(batches[0], value))
    return out


def make(net, optimizer, **options):
    objective = net if isinstance(net, ax.Objective) else ax.Supervised(net, "cross_entropy")
    return ax.Loop(objective, optimizer, device="cpu", progress=False, **options)


def fitted(loop, batches, skips=False):
    if skips:
        with pytest.warns(ax.NonFiniteWarning):
            loop.fit(batches, epochs=1)
    else:
        loop.fit(batches, epochs=1)
    return loop


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def assert_same(one, other):
    """Bitwise, and the same structure."""
    a, b = dict(leaves(one)), dict(leaves(other))
    assert a.keys() == b.keys()
    for path, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[path].dtype, path
            assert torch.equal(value, b[path]), path
        else:
            assert value == b[path], path


def learnt(loop):
    """What an update may change."""
    return {
        "weights": loop.objective.state_dict(),
        "optimizers": {name: update.state_dict()["optimizers"] for name, update in loop.state.optimizers.items()},
    }


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else str(value))
@pytest.mark.parametrize("bound", [{}, {"clip_norm": 0.5}], ids=["free", "clipped"])
def test_skipped_updates_leave_weights_and_state_as_if_they_had_not_been(name, options, bound):
    spec = ax.Optimizer(name, lr=0.01, **options, **bound)
    batches = data(5)
    plain = fitted(make(model(bias=name != "muon"), spec), batches)
    guarded = fitted(make(model(bias=name != "muon"), spec), inserted(batches, (0, 3)), skips=True)
    assert guarded.state.step == 7
    assert guarded.state.optimizers["main"].skipped == 2
    assert_same(learnt(guarded), learnt(plain))
    # A test of nothing, if nothing were learnt at all.
    assert not torch.equal(plain.objective.model[0].weight, model(bias=name != "muon")[0].weight)


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadam", "muon"])
@pytest.mark.parametrize("bound", [{}, {"clip_norm": 0.5}, {"clip_value": 0.1}, {"clip_norm": 0.5, "clip_value": 0.1}])
def test_an_infinity_in_the_gradients_alone_is_seen(name, bound):
    class Root(ax.Objective):
        """A loss that is finite where its slope is not: the square root of 0."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 3, bias=False)

        def predict(self, batch):
            return self.linear(batch["x"])

        def loss(self, predictions, batch):
            loss = F.cross_entropy(predictions, batch["y"])
            if batch["steep"][0]:
                weight = self.linear.weight[0, 0]
                loss = loss + (weight - weight.detach()).sqrt()
            return loss

    def batches(steep):
        for index, (x, y) in enumerate(data(4)):
            if index in (0, 2) and steep:
                yield {"x": x, "y": y, "steep": torch.tensor([True])}
            yield {"x": x, "y": y, "steep": torch.tensor([False])}

    spec = ax.Optimizer(name, lr=0.01, **bound)
    plain = fitted(make(Root(), spec), list(batches(False)))
    guarded = fitted(make(Root(), spec), list(batches(True)), skips=True)
    assert guarded.state.optimizers["main"].skipped == 2
    assert_same(learnt(guarded), learnt(plain))


def with_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_batchnorm_does_not_see_skipped_batches(name):
    spec = ax.Optimizer(name, lr=0.01)
    batches = data(5)
    plain = fitted(make(with_norm(), spec), batches)
    guarded = fitted(make(with_norm(), spec), inserted(batches, (0, 3)), skips=True)
    assert int(guarded.objective.model[1].num_batches_tracked) == 5
    assert_same(learnt(guarded), learnt(plain))


def test_a_buffer_that_is_assigned_anew_is_put_back_too():
    class Averaged(ax.Objective):
        """Keeps a running mean as many do: by assignment, not in place."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(5))

        def predict(self, x):
            if self.training:
                self.seen = 0.9 * self.seen + 0.1 * x.mean(0)
            return self.linear(x)

        def loss(self, predictions, y):
            return F.cross_entropy(predictions, y)

    batches = data(4)
    plain = fitted(make(Averaged(), ax.Optimizer("sgd", lr=0.1)), batches)
    guarded = fitted(make(Averaged(), ax.Optimizer("sgd", lr=0.1)), inserted(batches, (0, 2)), skips=True)
    assert plain.objective.seen.abs().sum() > 0
    assert_same(learnt(guarded), learnt(plain))


def test_a_constant_buffer_stays_the_same_tensor():
    net = with_norm()
    net.register_buffer("table", torch.arange(3.0))
    table = net.table
    fitted(make(net, ax.Optimizer("sgd", lr=0.1)), inserted(data(3), (1,)), skips=True)
    assert net.table is table
    assert table.tolist() == [0, 1, 2]


class Bag(ax.Objective):
    """An embedding whose gradients are sparse, and nothing dense."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 3, sparse=True)

    def predict(self, words):
        return self.table(words).mean(1)

    def loss(self, predictions, targets):
        return F.mse_loss(predictions, targets)


def sentences(count, seed=3):
    made = torch.Generator().manual_seed(seed)
    return [(torch.randint(20, (4, 5), generator=made), torch.randn(4, 3, generator=made)) for _ in range(count)]


def unknown_target(batch):
    return batch[0], torch.full_like(batch[1], NAN)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's own, in Adagrad
@pytest.mark.parametrize(("name", "options"), [("sparseadam", {}), ("sgd", {}), ("adagrad", {})], ids=lambda v: str(v))
@pytest.mark.parametrize("bound", [{}, {"clip_norm": 0.05}], ids=["free", "clipped"])
def test_sparse_gradients_are_guarded(name, options, bound):
    spec = ax.Optimizer(name, lr=0.1, **options, **bound)
    batches = sentences(4)
    bad = unknown_target(batches[0])
    plain = fitted(make(Bag(), spec), batches)
    guarded = fitted(make(Bag(), spec), [bad, *batches[:2], bad, *batches[2:]], skips=True)
    assert not torch.equal(plain.objective.table.weight, Bag().table.weight)
    assert_same(learnt(guarded), learnt(plain))


@pytest.mark.parametrize("bound", [{"clip_norm": 0.05}, {"clip_value": 0.01}])
def test_clipping_is_the_same_for_sparse_and_dense_gradients(bound):
    # A word that comes twice in a batch has two entries in a sparse gradient: it is their sum that is bounded.
    batches = [(torch.tensor([[1, 1, 1, 2]]), torch.ones(1, 3)), (torch.tensor([[2, 2, 3, 1]]), torch.ones(1, 3))]
    dense = Bag()
    dense.table.sparse = False
    spec = ax.Optimizer("sgd", lr=0.5, fused=False, **bound)
    sparse = fitted(make(Bag(), spec), batches)
    expected = fitted(make(dense, spec), batches)
    torch.testing.assert_close(sparse.objective.table.weight, expected.objective.table.weight)


class Halves(ax.Objective):
    """A part of it is bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6).to(torch.bfloat16), nn.Linear(6, 3)

    def predict(self, x):
        return self.second(self.first(x.bfloat16()).float().tanh())

    def loss(self, predictions, targets):
        return F.cross_entropy(predictions, targets)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "nadam"])
@pytest.mark.parametrize("bound", [{}, {"clip_norm": 0.5}], ids=["free", "clipped"])
def test_parameters_of_two_dtypes_are_guarded(name, bound):
    spec = ax.Optimizer(name, lr=0.01, **bound)
    batches = data(4)
    plain = fitted(make(Halves(), spec), batches)
    guarded = fitted(make(Halves(), spec), inserted(batches, (0, 3)), skips=True)
    assert_same(learnt(guarded), learnt(plain))


def test_large_gradients_of_a_finite_norm_are_no_reason_to_skip():
    class Steep(ax.Objective):
        def __init__(self):
            super().__init__()
            self.point = nn.Parameter(torch.zeros(3))

        def predict(self, x):
            return self.point * x

        def loss(self, predictions, _):
            return predictions.sum() * 1e18

    loop = make(Steep(), ax.Optimizer("sgd", lr=1.0, clip_norm=1.0))
    loop.fit([torch.ones(1, 3)], epochs=1)
    assert loop.state.optimizers["main"].skipped == 0
    torch.testing.assert_close(loop.objective.point.detach(), torch.full((3,), -1 / math.sqrt(3)))


class Terms(ax.Objective):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3)

    def predict(self, x):
        return self.linear(x)

    def loss(self, predictions, targets):
        return {"match": F.cross_entropy(predictions, targets), "size": torch.tensor(0.25)}


def test_the_warning_names_steps_and_terms():
    loop = make(Terms(), ax.Optimizer("sgd", lr=0.1))
    with pytest.warns(ax.NonFiniteWarning) as caught:
        loop.fit(inserted(data(4), (1, 4)), epochs=1)
    assert len(caught) == 1
    told = str(caught[0].message)
    assert told.startswith("2 updates of the optimizer 'main' were skipped")
    assert "step 2: loss nan, match nan, size 0.25" in told
    assert "step 5: loss nan" in told
    assert "step 1" not in told
    assert loop.state.optimizers["main"].skipped == 2


def test_one_skipped_update_is_told_of_in_the_singular():
    loop = make(Terms(), ax.Optimizer("sgd", lr=0.1))
    with pytest.warns(ax.NonFiniteWarning, match=r"^1 update of the optimizer 'main' was skipped"):
        loop.fit(inserted(data(2), (1,)), epochs=1)


def test_many_skipped_updates_are_told_of_by_the_first_four_and_the_last():
    loop = make(Terms(), ax.Optimizer("sgd", lr=0.1, patience=20))
    with pytest.warns(ax.NonFiniteWarning, match=r"step 2: .*step 3: .*step 4: .*step 5: .*; \.\.\. step 7\)"):
        loop.fit(inserted(data(2), (1,) * 6), epochs=1)


def test_patience_in_a_row_raises_at_the_reading_with_the_weights_from_before():
    batches = data(2)
    plain = fitted(make(model(), ax.Optimizer("adamw", lr=0.1)), batches)
    loop = make(model(), ax.Optimizer("adamw", lr=0.1, patience=3))
    with pytest.raises(ax.NonFiniteError, match=r"3 in a row, patience=3"):
        loop.fit([*batches, *[poison(batches[0])] * 3], epochs=1)
    assert loop.state.step == 5  # it is found at the epoch's end, not before
    assert_same(learnt(loop), learnt(plain))


def test_patience_counts_across_readings():
    loop = make(model(), ax.Optimizer("adamw", lr=0.1, patience=3))
    bad = poison(data(1)[0])
    with pytest.warns(ax.NonFiniteWarning), pytest.raises(ax.NonFiniteError, match="4 in a row"):
        loop.fit([bad, bad], epochs=3)
    assert loop.state.epoch <= 2
    assert loop.state.step == 4


def test_patience_does_not_count_what_is_not_in_a_row():
    good = data(1)[0]
    loop = make(model(), ax.Optimizer("adamw", lr=0.1, patience=2))
    with pytest.warns(ax.NonFiniteWarning, match="^3 updates"):
        loop.fit([poison(good), good, poison(good), good, poison(good), good], epochs=1)


def test_a_reading_that_finds_all_finite_breaks_the_row():
    good, bad = data(1)[0], poison(data(1)[0])
    loop = make(model(), ax.Optimizer("sgd", lr=0.1, patience=2))
    with pytest.warns(ax.NonFiniteWarning):
        loop.fit([good, bad], epochs=1)
    loop.fit([good], epochs=1)
    with pytest.warns(ax.NonFiniteWarning):  # the second skip, but not in a row
        loop.fit([bad, good], epochs=1)


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadam"])
def test_raise_raises_at_once_and_updates_nothing(name):
    batches = data(4)
    plain = fitted(make(with_norm(), ax.Optimizer(name, lr=0.1)), batches[:2])
    loop = make(with_norm(), ax.Optimizer(name, lr=0.1, on_nonfinite="raise"))
    with pytest.raises(ax.NonFiniteError, match=r"step 3: loss nan.*nothing was updated"):
        loop.fit([*batches[:2], poison(batches[0]), *batches[2:]], epochs=1)
    assert loop.state.step == 2
    assert_same(learnt(loop)["optimizers"], learnt(plain)["optimizers"])
    for key, value in plain.objective.named_parameters():
        assert torch.equal(value, loop.objective.get_parameter(key)), key


def test_raise_leaves_buffers_as_they_were():
    batches = data(2)
    plain = fitted(make(with_norm(), ax.Optimizer("sgd", lr=0.1)), batches)
    loop = make(with_norm(), ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise"))
    with pytest.raises(ax.NonFiniteError):
        loop.fit([*batches, poison(batches[0])], epochs=1)
    assert_same(dict(loop.objective.named_buffers()), dict(plain.objective.named_buffers()))


class OnePart(ax.Objective):
    """The slope of one part alone is not finite: infinite for ``slope`` 1, NaN for 0; the loss is finite."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope
        torch.manual_seed(0)
        self.calm, self.wild = nn.Linear(5, 3), nn.Parameter(torch.zeros(1))

    def predict(self, x):
        return self.calm(x) + (self.slope * self.wild).sqrt()

    def loss(self, predictions, targets):
        return F.mse_loss(predictions[:, 0], targets.float())


@pytest.mark.parametrize("bound", [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}, {"clip_norm": 1.0, "clip_value": 1.0}])
@pytest.mark.parametrize("slope", [1.0, 0.0], ids=["infinite", "nan"])
def test_raise_names_the_parameters_whose_gradients_are_not_finite(slope, bound):
    loop = make(OnePart(slope), ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise", **bound))
    with pytest.raises(ax.NonFiniteError) as caught:
        loop.fit(data(1), epochs=1)
    assert "gradients of wild are not finite" in str(caught.value)
    assert "calm" not in str(caught.value)


def test_raise_takes_finite_steps_like_any_other():
    one = fitted(make(model(), ax.Optimizer("adamw", lr=0.1, on_nonfinite="raise")), data(3))
    other = fitted(make(model(), ax.Optimizer("adamw", lr=0.1)), data(3))
    assert_same(learnt(one), learnt(other))


# --- readings --------------------------------------------------------------------------------------------------------


def wrong(predictions, targets):
    """A metric as a function: the share of wrong answers."""
    return (predictions.argmax(1) != targets).float().mean()


@pytest.mark.parametrize("classes", [3, 200], ids=["small", "large predictions"])
def test_skipped_steps_are_left_out_of_means_and_metrics(classes):
    rows = 4 if classes == 3 else 400  # 400 · 200 floats are more than the 256 KB that are kept for later

    def loop():
        torch.manual_seed(0)
        metrics = {
            "accuracy": "accuracy",
            "f1": "f1",
            "confusion_matrix": "confusion_matrix",
            "auroc": "auroc",
            "wrong": wrong,
            "own": torchmetrics.classification.MulticlassAccuracy(classes, average="macro"),
        }
        return make(nn.Linear(5, classes), ax.Optimizer("sgd", lr=0.1), metrics=metrics)

    made = torch.Generator().manual_seed(5)
    batches = [(torch.randn(rows, 5, generator=made), torch.randint(classes, (rows,), generator=made)) for _ in range(4)]
    plain = fitted(loop(), batches)
    guarded = fitted(loop(), inserted(batches, (0, 2, 6)), skips=True)
    assert plain.state.values.keys() == guarded.state.values.keys() >= {"train/loss", "train/own", "train/auroc"}
    assert_same(guarded.state.values, plain.state.values)


@pytest.mark.filterwarnings("ignore:Metric .* will save all targets")  # which is what it is here for
def test_skipped_steps_are_left_out_of_metrics_that_keep_lists():
    def loop():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
        metrics = {"rank": torchmetrics.SpearmanCorrCoef()}
        return make(ax.Supervised(net, "mse"), ax.Optimizer("sgd", lr=0.1), metrics=metrics)

    batches = [(x, y.float()) for x, y in data(4)]
    plain = fitted(loop(), batches)
    guarded = fitted(loop(), inserted(batches, (0, 2, 6)), skips=True)
    assert_same(guarded.state.values, plain.state.values)


def test_skipped_steps_are_left_out_of_means_over_more_than_a_fold():
    batches = data(300, rows=2)
    places = (0, 100, 255, 256, 257, 301)

    def loop():
        return make(model(), ax.Optimizer("sgd", lr=0.1), metrics=["accuracy", "f1", wrong])

    plain = fitted(loop(), batches)
    guarded = fitted(loop(), inserted(batches, places), skips=True)
    # Sums are folded at the same counts of steps, so at other ones of the steps that count: equal up to rounding.
    assert guarded.state.values == pytest.approx(plain.state.values, rel=1e-12)
    assert guarded.state.values["train/accuracy"] == plain.state.values["train/accuracy"]


def test_an_epoch_of_skipped_steps_alone_has_no_metrics_and_no_loss():
    loop = make(model(), ax.Optimizer("sgd", lr=0.1), metrics=["accuracy", wrong])
    fitted(loop, [poison(batch) for batch in data(3)], skips=True)
    assert math.isnan(loop.state.values["train/loss"])
    assert math.isnan(loop.state.values["train/wrong"])
    assert math.isnan(loop.state.values.get("train/accuracy", NAN))


# --- schedules, several optimizers -----------------------------------------------------------------------------------


def rates(schedule, batches, name="sgd", **options):
    seen = []
    loop = make(model(), ax.Optimizer(name, lr=1.0, schedule=schedule, **options))
    loop.on("after_batch")(lambda state: seen.append(state.optimizers["main"].lr))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ax.NonFiniteWarning)
        loop.fit(batches, epochs=1)
    return seen


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "nadam"])
@pytest.mark.parametrize("places", [(0,), (1, 2)])
def test_schedules_go_on_over_skipped_steps(name, places):
    def halved(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    bad = [poison(batch) if index in places else batch for index, batch in enumerate(data(5))]
    assert rates(ax.schedules.linear(), bad, name) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(halved, bad, name) == [1.0, 0.5, 0.5, 0.25, 0.25]


class Rivals(ax.Objective):
    """Two networks with an optimizer each; a batch can spoil the loss of one alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(5, 1), nn.Linear(5, 1)

    def train_step(self, batch):
        yield "one", self.one(batch["one"]).square().mean()
        yield "two", self.two(batch["two"]).square().mean()


def test_a_skipped_update_of_one_optimizer_does_not_touch_the_other():
    both = {name: ax.Optimizer("adamw", lr=0.1) for name in ("one", "two")}
    batches = [{"one": x, "two": x + 1} for x, _ in data(4)]
    spoilt = [{**batch, "two": batch["two"] * NAN} if index == 1 else batch for index, batch in enumerate(batches)]
    whole = fitted(make(Rivals(), both), batches)
    partly = fitted(make(Rivals(), both), spoilt, skips=True)
    without = fitted(make(Rivals(), both), [batches[0], *batches[2:]])
    assert_same(learnt(partly)["optimizers"]["one"], learnt(whole)["optimizers"]["one"])
    assert_same(learnt(partly)["optimizers"]["two"], learnt(without)["optimizers"]["two"])
    assert torch.equal(partly.objective.one.weight, whole.objective.one.weight)
    assert torch.equal(partly.objective.two.weight, without.objective.two.weight)
    assert {name: update.skipped for name, update in partly.state.optimizers.items()} == {"one": 0, "two": 1}


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_one_loss_with_several_optimizers_is_guarded(name):
    def loop():
        return make(
            model(),
            {
                "a": ax.Optimizer(name, lr=0.1, params="model.0.*"),
                "b": ax.Optimizer("muon", lr=0.1, params="*.2.weight"),
                "c": ax.Optimizer("sgd", lr=0.1, params="*.2.bias"),
            },
        )

    batches = data(4)
    plain = fitted(loop(), batches)
    guarded = loop()
    with pytest.warns(ax.NonFiniteWarning) as caught:
        guarded.fit(inserted(batches, (0, 2)), epochs=1)
    assert len(caught) == 3
    assert_same(learnt(guarded), learnt(plain))


# --- state -----------------------------------------------------------------------------------------------------------


def stepped(loop, batches):
    for batch in batches:
        loop.train_on_batch(batch)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_state_goes_through_a_checkpoint_and_on_bitwise(name, options):
    def loop():
        spec = ax.Optimizer(name, lr=0.01, schedule=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]), **options)
        return make(model(bias=name != "muon"), spec)

    whole, first, second = loop(), loop(), loop()
    batches = data(6)
    stepped(whole, batches)
    stepped(first, batches[:3])
    second.state.load_state_dict(decode(*encode(first.state.state_dict())))
    assert_same(second.state.optimizers["main"].state_dict(), first.state.optimizers["main"].state_dict())
    stepped(second, batches[3:])
    assert_same(learnt(second), learnt(whole))
    assert second.state.optimizers["main"].lr == whole.state.optimizers["main"].lr


SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 4], 0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.01, step_size_up=2, cycle_momentum=False),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.5, total_iters=2), schedulers.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.5, total_iters=4), schedulers.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_schedulers_go_through_a_checkpoint_and_on(name):
    def loop():
        return make(model(), ax.Optimizer("sgd", lr=0.01, schedule=SCHEDULERS[name]))

    def rates(one, batches):
        seen = []
        for batch in batches:
            seen.append(one.state.optimizers["main"].lr)
            one.train_on_batch(batch)
        return seen

    whole, first, second = loop(), loop(), loop()
    batches = data(7)
    expected = rates(whole, batches)
    assert len(set(expected)) > 2
    assert rates(first, batches[:3]) == expected[:3]
    second.state.load_state_dict(decode(*encode(first.state.state_dict())))
    assert rates(second, batches[3:]) == expected[3:]
    assert_same(learnt(second), learnt(whole))


def test_sparse_adam_goes_through_a_checkpoint_and_on_bitwise():
    whole, first, second = (make(Bag(), ax.Optimizer("sparseadam", lr=0.1)) for _ in range(3))
    batches = sentences(6)
    stepped(whole, batches)
    stepped(first, batches[:3])
    second.state.load_state_dict(decode(*encode(first.state.state_dict())))
    stepped(second, batches[3:])
    assert_same(learnt(second), learnt(whole))


def test_state_goes_by_parameter_names():
    loop = make(model(), ax.Optimizer("adamw", lr=0.01, groups={"*.bias": {"weight_decay": 0.0}}))
    stepped(loop, data(1))
    (part,) = loop.state.optimizers["main"].state_dict()["optimizers"]
    assert set(part["state"]) == {"model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias"}
    assert [group["parameters"] for group in part["groups"]] == [
        ["model.0.weight", "model.2.weight"],
        ["model.0.bias", "model.2.bias"],
    ]


def test_skips_that_no_reading_has_told_of_are_not_lost_in_a_saved_state():
    loop = make(model(), ax.Optimizer("sgd", lr=0.1, patience=3))
    bad = poison(data(1)[0])
    stepped(loop, [bad, bad])
    other = make(model(), ax.Optimizer("sgd", lr=0.1, patience=3))
    with warnings.catch_warnings():  # whether it is told of at saving or at the next reading is left open
        warnings.simplefilter("ignore", ax.NonFiniteWarning)
        other.state.load_state_dict(loop.state.state_dict())
    stepped(other, [bad])
    with pytest.raises(ax.NonFiniteError, match="3 in a row"):
        other.state.read()


def test_a_state_of_other_parameters_is_refused_and_they_are_named():
    stepped(loop := make(model(), ax.Optimizer("adamw", lr=0.01, groups={"*.bias": {"weight_decay": 0.0}})), data(1))
    state = loop.state.optimizers["main"].state_dict()
    deeper = make(nn.Sequential(model(), nn.Linear(3, 3)), ax.Optimizer("adamw", lr=0.01))
    with pytest.raises(ax.CheckpointError, match=r"differ in .*model\.0\.0\.bias"):
        deeper.state.optimizers["main"].load_state_dict(state)
    two = make(model(), ax.Optimizer("adamw", lr=0.01, groups={"*.bias": {"optimizer": "sgd", "lr": 0.1}}))
    with pytest.raises(ax.CheckpointError, match="has 2 optimizers, the saved one 1"):
        two.state.optimizers["main"].load_state_dict(state)


# --- hooks of the torch optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_hooks_on_the_torch_optimizer_are_called(name):
    loop = make(model(), ax.Optimizer(name, lr=0.1))
    seen = []
    loop.fit(data(2), epochs=1)
    (optimizer,) = loop.state.optimizers["main"].optimizers
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    loop.fit(data(2), epochs=1)
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_hooks_that_a_callback_registers_are_called(name):
    loop = make(model(), ax.Optimizer(name, lr=0.1))
    seen = []

    @loop.on("before_fit")
    def register(state):
        state.optimizers["main"].optimizers[0].register_step_post_hook(lambda *_: seen.append("after"))

    loop.fit(data(2), epochs=1)
    assert seen == ["after"] * 2


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_hooks_on_all_torch_optimizers_are_called(name):
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("after"))
    try:
        make(model(), ax.Optimizer(name, lr=0.1)).fit(data(2), epochs=1)
    finally:
        handle.remove()
    assert seen == ["after"] * 2


def test_a_loss_that_reaches_no_parameter_of_the_optimizer_is_an_error():
    class Apart(Rivals):
        def train_step(self, batch):
            return ax.Step(self.one(batch["one"]).square().mean())

    both = {name: ax.Optimizer("adamw", lr=0.1) for name in ("one", "two")}
    with pytest.raises(ax.LossError, match="no parameter of the optimizer 'two' has a gradient"):
        make(Apart(), both).fit([{"one": x} for x, _ in data(1)], epochs=1)


def test_an_optimizer_whose_parameters_are_all_frozen_waits_until_they_are_thawed():
    class TwoParts(ax.Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
            self.body.requires_grad_(False)

        def predict(self, x):
            return self.head(self.body(x))

        def loss(self, logits, labels):
            return F.cross_entropy(logits, labels)

    loop = make(TwoParts(), {name: ax.Optimizer("adam", lr=0.1) for name in ("body", "head")})
    before = loop.objective.body.weight.clone()
    loop.on("after_epoch", first=1)(lambda state: state.objective.body.requires_grad_(True) and None)
    loop.fit(data(2), epochs=1)
    assert torch.equal(loop.objective.body.weight, before)
    loop.fit(data(2), epochs=1)
    assert not torch.equal(loop.objective.body.weight, before)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("accumulate", [None, 2])
def test_an_error_names_the_samples_of_the_step(shuffle, accumulate):
    x, y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 1)
    x[29] = math.nan
    loop = ax.Loop(ax.Supervised(nn.Linear(4, 1), "mse"), ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise"), progress=False)
    loader = ax.Loader(ax.ArrayDataset(x, y), 8, shuffle=shuffle)
    if accumulate is None:
        with pytest.raises(ax.NonFiniteError) as caught:
            loop.fit(loader, epochs=1)
        [note] = [note for note in caught.value.__notes__ if "samples" in note]
        batch = next(batch for batch in loader.order(0).split(8) if 29 in batch)
        assert f"samples {', '.join(map(str, batch.tolist()))} of the training data" in note
        assert caught.value.steps == (1 + [29 in batch for batch in loader.order(0).split(8)].index(True),)
    else:
        with pytest.raises(ax.NonFiniteError) as caught:
            loop.fit(list(loader), epochs=1, accumulate=accumulate)
        assert not any("samples" in note for note in caught.value.__notes__), "of a list nobody knows"


def test_many_in_a_row_name_those_of_the_present_epoch():
    x, y = torch.randn(40, 4), torch.zeros(40, 1)
    x[8:] = math.nan
    spec = ax.Optimizer("sgd", lr=0.1, patience=3)
    loop = ax.Loop(ax.Supervised(nn.Linear(4, 1), "mse"), spec, progress=False)
    with pytest.raises(ax.NonFiniteError) as caught:
        loop.fit(ax.Loader(ax.ArrayDataset(x, y), 8), epochs=1)
    assert caught.value.steps == (2, 3, 4, 5)
    told = [note for note in caught.value.__notes__ if "samples" in note]
    assert [note.partition(" was")[0] for note in told] == ["step 2", "step 3", "step 4", "step 5"]
    assert "samples 8, 9, 10, 11, 12, 13, 14, 15 of" in told[0]


def test_of_gathered_batches_all_samples_are_named():
    x, y = torch.randn(40, 4), torch.zeros(40, 1)
    x[9] = math.nan
    spec = ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise")
    loop = ax.Loop(ax.Supervised(nn.Linear(4, 1), "mse"), spec, progress=False)
    with pytest.raises(ax.NonFiniteError) as caught:
        loop.fit(ax.Loader(ax.ArrayDataset(x, y), 4), epochs=1, accumulate=2)
    assert any("step 2 was of the samples 8, 9, 10, 11, 12, 13, 14, 15 of" in note for note in caught.value.__notes__)


class Replacing(torch.optim.Optimizer):
    """Puts new tensors into its state, as many do that are written by hand."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["m"] = 0.9 * state["m"] + p.grad if "m" in state else p.grad.clone()
                    state["sizes"] = torch.cat([state.get("sizes", p.new_zeros(0)), p.grad.norm()[None]])
                    p.data = p.data - group["lr"] * state["m"]


@pytest.mark.parametrize("factory", [Replacing, "nadam", "adamw", "rmsprop"])
def test_state_and_weights_that_are_replaced_are_put_back_too(factory):
    def clamped(state):
        for p in state.objective.parameters():
            p.data = p.data.clamp(-0.3, 0.3)

    spec, batches = ax.Optimizer(factory, lr=0.01), data(8)
    loops = [make(model(), spec), make(model(), spec)]
    for loop in loops:
        clamped(loop.state)
        loop.on("after_batch")(clamped)
    fitted(loops[0], batches)
    fitted(loops[1], inserted(batches, (0, 4)), skips=True)
    assert loops[1].state.optimizers["main"].skipped == 2
    assert_same(learnt(loops[1]), learnt(loops[0]))


class Slow(torch.optim.SGD):
    """Does more than the kernel of the class that it is of (Lookahead: Zhang et al. 2019, arXiv:1907.08610)."""

    def step(self):
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        slow = self.state[p].setdefault("slow", p.detach().clone())
                        slow.lerp_(p, 0.5)
                        p.copy_(slow)


@pytest.mark.parametrize("factory", [Slow, "nadam", "rprop", "asgd", "adafactor", "adamw"])
@pytest.mark.parametrize("place", [0, 3, 4])
def test_the_first_update_of_what_is_thawed_may_be_skipped(factory, place):
    spec, batches = ax.Optimizer(factory, lr=0.01), data(8)
    loops = []
    for given in (batches, inserted(batches, (place,))):
        loop = make(model(), spec)
        loop.objective.model[0].requires_grad_(False)
        count = 3 + (place < 4 and given is not batches)

        @loop.on("after_batch")
        def thaw(state, count=count):
            if state.step == count:
                state.objective.model[0].requires_grad_(True)

        loops.append(fitted(loop, given, skips=given is not batches))
    assert not torch.equal(loops[0].objective.model[0].weight, model()[0].weight)
    assert_same(learnt(loops[1]), learnt(loops[0]))


class Centred(ax.Objective):
    """A running mean in a buffer, changed in the way that ``how`` says."""

    def __init__(self, how, size):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.how = nn.Linear(5, 3), how
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("constant", torch.arange(float(size)))

    def predict(self, x):
        following = 0.9 * self.center + 0.1 * x.mean()
        if self.how == "assigned":
            self.center = following
        elif self.how == "grown":
            self.center = torch.cat([following, x.mean()[None]])
        elif self.how == "made":
            self.center = None if self.training and x.mean() > 0 else following
            if self.center is None:
                self.center = following
        else:
            (self.center.data if self.how == "by data" else self.center).copy_(following)
        return self.linear(x)

    def loss(self, predictions, targets):
        return F.cross_entropy(predictions, targets)


@pytest.mark.parametrize("how", ["in place", "by data", "assigned", "grown", "made"])
@pytest.mark.parametrize("size", [4, 8192])
@pytest.mark.parametrize("passes", [1, 2])
def test_buffers_of_any_size_are_put_back_however_they_were_changed(how, size, passes):
    spec, batches = ax.Optimizer("sgd", lr=0.1), data(4)
    loops = [make(Centred(how, size), spec) for _ in range(2)]
    for index in range(passes):  # from the first reading on, large ones that did not change are watched by their versions
        fitted(loops[0], batches)
        fitted(loops[1], inserted(batches, (0, 2)), skips=True)
        assert loops[1].state.optimizers["main"].skipped == 2 * (index + 1)
    assert loops[0].objective.center.abs().sum() > 0
    assert_same(learnt(loops[1]), learnt(loops[0]))
    assert_same(dict(loops[1].objective.named_buffers()), dict(loops[0].objective.named_buffers()))


def test_large_buffers_that_no_step_changes_are_copied_once():
    loop = make(Centred("by data", 8192), ax.Optimizer("sgd", lr=0.1))
    fitted(loop, data(3))
    kept = {name: copy for (_, name), copy in loop.state.buffers._copies.items()}
    assert kept["center"].each_time
    assert not kept["constant"].each_time
    loop.state.buffers.keep()  # the last step before the reading has written in it
    held = kept["constant"].held
    version = held._version
    loop.state.buffers.keep()
    assert kept["constant"].held is held
    assert held._version == version, "it was copied anew"
    loop.objective.constant.add_(1)
    loop.state.buffers.keep()
    assert torch.equal(kept["constant"].held, loop.objective.constant)


@pytest.mark.parametrize("size", [16, 8192])
@pytest.mark.parametrize("every", [1, 3, 5])
@pytest.mark.parametrize("reading", [2, 7, 100])
def test_a_buffer_that_is_written_now_and_then_is_put_back(size, every, reading):
    class Bank(ax.Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.count = nn.Linear(5, 3), 0
            self.register_buffer("bank", torch.zeros(size))

        def predict(self, x):
            self.count += 1
            if self.count % every == 0:
                self.bank.mul_(0.9).add_(0.1 * x.mean())
            return self.linear(x) + self.bank[0]

        def loss(self, predictions, targets):
            return F.cross_entropy(predictions, targets)

    batches = data(20)
    batches[14] = poison(batches[14])  # written in by each of them
    loop = make(Bank(), ax.Optimizer("sgd", lr=0.1))
    loop.on("after_batch", every=reading)(lambda state: state.read() and None)
    with pytest.warns(ax.NonFiniteWarning, match="1 update"):
        loop.fit(batches, epochs=1)
    assert torch.isfinite(loop.objective.bank).all()
    assert loop.objective.bank.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")  # torch's own, of sparse CSR and of quantization
@pytest.mark.parametrize("kind", ["sparse", "csr", "expanded", "quantized", "float8", "lazy"])
@pytest.mark.parametrize("size", [4, 100])
def test_buffers_of_any_kind_are_let_be(kind, size):
    made = {
        "sparse": lambda: torch.eye(size).to_sparse(),
        "csr": lambda: torch.eye(size).to_sparse_csr(),
        "expanded": lambda: torch.ones(1, size).expand(size, size),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(size, size), 0.1, 0, torch.qint8),
        "float8": lambda: torch.ones(size, size).to(torch.float8_e4m3fn),
        "lazy": lambda: None,
    }[kind]
    net = nn.Sequential(nn.LazyBatchNorm1d() if kind == "lazy" else nn.Identity(), nn.Linear(5, 3))
    net.register_buffer("other", made())
    loop = make(net, ax.Optimizer("sgd", lr=0.1))
    fitted(loop, inserted(data(4), (2,)), skips=True)
    fitted(loop, inserted(data(4), (2,)), skips=True)
    assert loop.state.optimizers["main"].skipped == 2


def test_parameters_change_places_with_sparse_ones():
    """As many gradients as before, of other kinds."""

    class Words(ax.Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.scale, self.out = nn.Embedding(20, 4, sparse=True), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def predict(self, words):
            return self.out(self.words(words).mean(1) * self.scale)

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets)

    for bound in ({}, {"clip_norm": 0.1}):
        loop = make(Words(), ax.Optimizer("sgd", lr=0.1, **bound), callbacks=[ax.Unfreeze("words.*", 2), ax.Freeze("scale", 2)])
        before = loop.objective.words.weight.detach().clone()
        loop.fit(sentences(4), epochs=1)
        assert not torch.equal(loop.objective.words.weight, before)


def test_raise_with_several_optimizers_updates_none_of_them():
    spec = {
        "calm": ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise"),
        "wild": ax.Optimizer("sgd", lr=0.1, params="wild", on_nonfinite="raise"),
    }
    loop = make(OnePart(0.0), spec)
    before = [p.detach().clone() for p in loop.objective.parameters()]
    with pytest.raises(ax.NonFiniteError, match="gradients of wild are not finite; nothing was updated"):
        loop.fit(data(1), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, loop.objective.parameters(), strict=True))


FUSED = {"sgd": [{}, {"momentum": 0.9}], "adam": [{}, {"amsgrad": True}], "adamw": [{"weight_decay": 0.1}], "adagrad": [{}]}


@pytest.mark.parametrize(("name", "options"), [(name, of) for name, variants in FUSED.items() for of in variants], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_kernel_is_the_default_and_computes_what_the_others_do(name, options, dtype):
    loops = []
    for how in ({}, {"fused": False, "foreach": True}, {"fused": False, "foreach": False}):
        loop = make(model().to(dtype), ax.Optimizer(name, lr=0.01, **options, **how))
        fitted(loop, [(x.to(dtype), y) for x, y in data(8)])
        loops.append(loop)
    kernels = [
        (bool(group.get("fused")), group.get("foreach"))
        for loop in loops
        for group in loop.state.optimizers["main"].optimizers[0].param_groups
    ]
    assert kernels[0][0] is True
    assert kernels[1:] == [(False, True), (False, False)]
    for other in loops[1:]:
        for one, two in zip(loops[0].objective.parameters(), other.objective.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5 if dtype is torch.float32 else 1e-12, atol=1e-7)


MANY = ["adadelta", "adafactor", "adamax", "asgd", "muon", "nadam", "radam", "rmsprop", "rprop"]


@pytest.mark.parametrize("name", MANY)
def test_kernels_over_many_tensors_compute_what_those_over_one_do(name):
    assert {*MANY, *FUSED, "lbfgs", "sparseadam"} == {*names()}, "a new algorithm of torch's belongs into one of these lists"
    loops = []
    for how in ({}, {"foreach": True}, {"foreach": False}):
        if name == "muon" and how:  # which has no such option
            continue
        loop = make(model(bias=name != "muon").double(), ax.Optimizer(name, lr=0.01, **how))
        loops.append(fitted(loop, [(x.double(), y) for x, y in data(8)]))
    for other in loops[1:]:
        for one, two in zip(loops[0].objective.parameters(), other.objective.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)  # ASGD's own rates are float32


class InGroups(torch.optim.Optimizer):
    """Keeps a tensor in its groups, a number in an attribute, and a state under a name."""

    def __init__(self, params, lr=0.01, named=False):
        super().__init__(params, {"lr": lr, "v": torch.zeros(())})
        self.count, self.named = 0, named

    @torch.no_grad()
    def step(self):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    group["v"] = 0.9 * group["v"] + 0.1 * p.grad.norm()
                    self.state[p].setdefault("seen", torch.zeros(())).add_(1)
                    if self.named:
                        self.state["shared"]["v"] = self.state["shared"].get("v", 0.0) + p.grad.norm()
                    p.sub_(p.grad / (1 + group["v"]), alpha=group["lr"] / self.count)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("places", [(0,), (3, 4), (1, 6)])
def test_what_an_optimizer_keeps_elsewhere_is_as_if_the_skipped_had_not_been(named, places):
    spec, batches = ax.Optimizer(InGroups, lr=0.1, named=named), data(6)
    plain = fitted(make(model(), spec), batches)
    guarded = fitted(make(model(), spec), inserted(batches, places), skips=True)
    assert torch.isfinite(guarded.objective.model[0].weight).all()
    for one, other in zip(plain.objective.parameters(), guarded.objective.parameters(), strict=True):
        assert torch.equal(one, other)
    assert guarded.state.optimizers["main"].optimizers[0].count == 6


def test_a_state_under_a_name_cannot_be_saved_and_says_so():
    loop = fitted(make(model(), ax.Optimizer(InGroups, lr=0.1, named=True)), data(2))
    with pytest.raises(ax.CheckpointError, match="keeps a state under 'shared', which is none of its parameters"):
        loop.save()


class NowAndThen(torch.optim.Optimizer):
    """Counts in its groups every third step, for the first time in the third."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr, "k": 0})
        self.calls = torch.zeros(())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    steps = self.state[p].setdefault("steps", torch.zeros(()))
                    steps += 1
                    p.sub_(p.grad, alpha=group["lr"] / (1 + group["k"]))
            group["k"] += int(steps) % 3 == 0


@pytest.mark.parametrize("place", [1, 2, 3, 5])
def test_numbers_that_are_counted_now_and_then_are_put_back(place):
    spec, batches = ax.Optimizer(NowAndThen, lr=0.1), data(7)
    plain = fitted(make(model(), spec), batches)
    guarded = fitted(make(model(), spec), inserted(batches, (place,)), skips=True)
    assert_same(learnt(guarded), learnt(plain))


def test_a_buffer_that_is_somebodys_is_not_written_into():
    class Last(ax.Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 3)
            self.register_buffer("last", torch.zeros(4, 5))

        def predict(self, x):
            self.last = x
            return self.linear(x)

        def loss(self, predictions, targets):
            return F.cross_entropy(predictions, targets)

    for average in (None, "ema"):
        batches = inserted(data(4), (2,))
        before = [(x.clone(), y.clone()) for x, y in batches]
        loop = fitted(make(Last(), ax.Optimizer("sgd", lr=0.1, average=average)), batches, skips=True)
        assert torch.isfinite(loop.objective.last).all()
        for (x, _), (kept, _) in zip(batches, before, strict=True):
            assert torch.equal(x.nan_to_num(), kept.nan_to_num())


def test_one_buffer_in_many_places_is_copied_once():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            mask = torch.triu(torch.full((100, 100), float("-inf")), 1)
            self.parts = nn.ModuleList(nn.Linear(5, 5) for _ in range(6))
            for part in self.parts:
                part.register_buffer("mask", mask)
            self.out = nn.Linear(5, 3)

        def forward(self, x):
            for part in self.parts:
                x = part(x) + part.mask[0, 0]
            return self.out(x)

    loop = make(Layers(), ax.Optimizer("adamw", lr=0.01, average="ema"))
    fitted(loop, inserted(data(4), (2,)), skips=True)
    loop.state.buffers.keep()
    assert len({id(kept.held) for (_, name), kept in loop.state.buffers._copies.items() if name == "mask"}) == 1
    assert sum("mask" in name for name in loop.state.optimizers["main"].average.average) == 1


def test_momentum_that_is_switched_on_later_may_begin_with_a_skipped_update():
    loops = []
    for places in ((), (0,)):
        loop = fitted(make(model(), ax.Optimizer("sgd", lr=0.1)), data(2))
        loop.state.optimizers["main"].set(momentum=0.9)
        loops.append(fitted(loop, inserted(data(4, seed=5), places), skips=bool(places)))
    assert_same(learnt(loops[1]), learnt(loops[0]))


def test_an_optimizer_that_passes_its_options_on_takes_them():
    class Wrapped(torch.optim.SGD):
        def __init__(self, params, lr, scale=1.0, **options):
            super().__init__(params, lr=lr * scale, **options)

    loop = fitted(make(model(), ax.Optimizer(Wrapped, lr=0.1, momentum=0.9, weight_decay=0.1)), data(3))
    [group] = loop.state.optimizers["main"].optimizers[0].param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.1)


@pytest.mark.parametrize("how", [{}, {"clip_norm": 1.0}, {"in_backward": True}], ids=str)
def test_a_loss_of_one_element_is_a_loss(how):
    class One(Halves):
        def loss(self, predictions, targets):
            return super().loss(predictions, targets)[None]

    fitted(make(One(), ax.Optimizer("adamw", lr=0.01, **how)), data(3))


@pytest.mark.parametrize("within", [True, False])
def test_raise_beside_updates_within_backward_is_refused(within):
    specs = {
        "calm": ax.Optimizer("sgd", lr=0.1, in_backward=within),
        "wild": ax.Optimizer("sgd", lr=0.1, params="wild", on_nonfinite="raise"),
    }
    loop = make(OnePart(1.0), specs)
    words = "which promises that nothing was updated, and 'calm' has in_backward=True" if within else "gradients of wild"
    with pytest.raises((ax.ConfigurationError, ax.NonFiniteError), match=words):
        loop.fit(data(1), epochs=1)


def test_of_several_updates_a_step_one_that_counts_moves_the_average():
    class Twice(ax.Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(5, 3)

        def predict(self, x):
            return self.net(x)

        def train_step(self, batch):
            yield "net", F.cross_entropy(self.net(batch[0]), batch[1])
            yield "net", F.cross_entropy(self.net(batch[0]), batch[1]) * NAN

    loop = make(Twice(), {"net": ax.Optimizer("sgd", lr=0.1, average=ax.averages.ema(0.5, warmup=False))})
    with pytest.warns(ax.NonFiniteWarning):
        loop.fit(data(4), epochs=1)
    average = loop.state.optimizers["net"].average
    assert not torch.equal(average.average["net.weight"], Twice().net.weight)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight_decay": "a"}, r"set\(weight_decay='a'\) of the optimizer 'main': a finite number, 0 or more"),
        ({"weight_decay": -5.0}, "0 or more"),
        ({"lr": -1.0}, "0 or more"),
        ({"lr": float("nan")}, "a finite number"),
        ({"betas": (2, 3)}, "2 numbers from 0 to 1"),
        ({"betas": 0.9}, "2 numbers from 0 to 1"),
        ({"amsgrad": 1}, "True or False"),
        ({"lr": 0.5, "eps": None}, "a finite number"),
    ],
)
def test_what_no_option_can_be_is_refused_and_nothing_is_changed(options, told):
    loop = ax.Loop(ax.Supervised(nn.Linear(2, 2), "cross_entropy"), ax.Optimizer("adamw", lr=0.1), progress=False)
    update = loop.state.optimizers["main"]
    before = copy.deepcopy(update.optimizers[0].param_groups)
    with pytest.raises(ax.ConfigurationError, match=told):
        update.set(**options)
    for group, old in zip(update.optimizers[0].param_groups, before, strict=True):
        assert {**group, "params": 0} == {**old, "params": 0}


def test_options_that_are_below_zero_by_nature_are_taken():
    loop = ax.Loop(ax.Supervised(nn.Linear(2, 2), "cross_entropy"), ax.Optimizer("adafactor", lr=0.1), progress=False)
    update = loop.state.optimizers["main"]
    update.set(beta2_decay=-0.7, foreach=None)
    assert update.optimizers[0].param_groups[0]["beta2_decay"] == -0.7
