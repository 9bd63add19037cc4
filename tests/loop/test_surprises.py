"""What newcomers ran into: each is said, and none goes on in silence."""

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn

import axontrain as ax


def data(n=40, classes=3, seed=0):
    made = torch.Generator().manual_seed(seed)
    return ax.ArrayDataset(torch.randn(n, 4, generator=made), torch.randint(classes, (n,), generator=made))


def supervised(metrics=None):
    torch.manual_seed(0)
    return ax.Supervised(nn.Linear(4, 3), "cross_entropy", metrics)


def loop_of(objective=None, **options):
    return ax.Loop(objective or supervised(), ax.Optimizer("sgd", lr=0.1), progress=False, **options)


# --- names that an objective has already -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", nn.MSELoss()),
        ("predict", nn.Linear(2, 2)),
        ("weight", torch.ones(3)),
        ("weight", nn.Parameter(torch.ones(3))),
        ("split", 0.5),
    ],
)
def test_an_attribute_cannot_take_the_place_of_a_method(name, value):
    class Mine(ax.Objective):
        def __init__(self):
            super().__init__()
            setattr(self, name, value)

    with pytest.raises(ax.ConfigurationError, match=rf"Mine\.{name} is a method of every Objective.*another name"):
        Mine()


def test_a_function_may_take_the_place_of_a_method():
    objective = supervised()
    objective.weight = lambda batch: 7
    assert objective.train_step(data().gather(torch.arange(4))).weight == 7


@pytest.mark.parametrize("build", [dict, list], ids=["mapping", "list"])
def test_torchmetrics_objects_given_to_an_objective_are_used(build):
    metric = torchmetrics.Accuracy(task="multiclass", num_classes=3)
    metrics = {"own": metric} if build is dict else [metric]
    values = loop_of(supervised(metrics)).fit(data(), epochs=1).values
    assert len(values) == 2
    assert "own" in values or build is list or "train/own" in values


def test_a_bare_torchmetrics_object_is_no_part_of_the_model():
    objective = supervised()
    objective.metrics = torchmetrics.Accuracy(task="multiclass", num_classes=3)
    assert len(list(objective.children())) == 1
    with pytest.raises(ax.AxonError, match="metrics"):
        loop_of(objective)


def test_forward_in_place_of_predict_is_told_of():
    class Torchlike(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x)

        def loss(self, predictions, targets):
            return F.cross_entropy(predictions, targets)

    with pytest.raises(ax.ObjectiveError, match="rename its forward to predict"):
        loop_of(Torchlike()).fit(data(), epochs=1)


def test_a_class_in_place_of_an_object_is_told_of():
    with pytest.raises(ax.ConfigurationError, match=r"a class: call it, as in MSELoss\(\)"):
        ax.Supervised(nn.Linear(1, 1), nn.MSELoss)
    with pytest.raises(ax.ConfigurationError, match="it is a class: call it"):
        ax.Loop(ax.Supervised)
    with pytest.raises(ax.ConfigurationError, match=r"call it, as in ax\.schedules\.cosine\(\)"):
        ax.Optimizer("sgd", lr=0.1, schedule=ax.schedules.cosine)


# --- modes ------------------------------------------------------------------------------------------------------------


def sleeping():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()  # as pretrained models arrive
    return ax.Supervised(net, "cross_entropy")


def test_a_model_that_is_wholly_in_eval_mode_is_warned_of():
    with pytest.warns(ax.AxonWarning, match=r"in eval mode.*objective\.train\(\)"):
        loop_of(sleeping()).fit(data(), epochs=1)
    report = loop_of(sleeping()).check(data())
    assert "in eval mode" in str(report)
    assert not report.ok


def test_a_part_in_eval_mode_is_the_users_choice():
    objective = ax.Supervised(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 3)), "cross_entropy")
    loop_of(objective).fit(data(), epochs=1)
    assert torch.equal(objective.model[1].running_mean, torch.zeros(8))


# --- callbacks, results, directories ----------------------------------------------------------------------------------


def test_a_callback_in_another_loop_begins_anew():
    stopping = ax.EarlyStopping("train/loss", patience=2)
    loop_of(callbacks=[stopping]).fit(data(), epochs=5)
    other = loop_of(ax.Supervised(nn.Linear(4, 3), lambda p, t: F.cross_entropy(p, t) + 10), callbacks=[stopping])
    assert other.fit(data(), epochs=5).status == "completed"


def test_a_callback_that_is_there_twice_is_refused():
    stopping = ax.EarlyStopping("train/loss")
    with pytest.raises(ax.ConfigurationError, match="twice"):
        loop_of(callbacks=[stopping, stopping])


def test_callbacks_can_be_replaced_between_fits():
    loop = loop_of(callbacks=[ax.EarlyStopping("train/loss", patience=1)])
    loop.fit(data(), epochs=1)
    loop.callbacks = [ax.EarlyStopping("train/accuracy", patience=3)]
    # The reading it watches is not there: that is said, and by the new one.
    with pytest.raises(ax.UnknownNameError, match="train/accuracy"):
        loop.fit(data(), epochs=1)


@pytest.mark.parametrize("make", [lambda: ax.EarlyStopping(patince=3), lambda: ax.LearningRate(evry=3)])
def test_a_wrong_option_of_a_callback_offers_the_right_one(make):
    with pytest.raises(ax.UnknownOptionError, match=r"did you mean '(patience|every)'"):
        make()


def test_wrong_options_of_every_method_offer_the_right_one():
    loop = loop_of()
    for call in (
        lambda: loop.evaluate(data(), batchsize=3),
        lambda: loop.predict(data(), batchsize=3),
        lambda: loop.on("after_batch", evry=3),
        lambda: loop.fit(data(), epoch=3),
        lambda: loop.steps(data(), epoch=3),
        lambda: ax.Loader(data(), 3, shufle=True),
    ):
        with pytest.raises(ax.UnknownOptionError, match="did you mean"):
            call()


def test_a_directory_of_another_run_is_refused(tmp_path):
    first = loop_of(directory=tmp_path / "run")
    first.fit(data(), epochs=1)
    with pytest.raises(ax.ConfigurationError, match="another run"):
        loop_of(directory=tmp_path / "run").fit(data(), epochs=1)
    going_on = loop_of(directory=tmp_path / "run")
    going_on.restore(tmp_path / "run" / "step-000000002")
    going_on.fit(data(), epochs=1)
    assert (tmp_path / "run" / "history.jsonl").read_text().count("\n") == 2


def test_a_directory_that_is_a_file_is_told_of_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    loop = loop_of(directory=tmp_path / "file")
    with pytest.raises(ax.ConfigurationError, match="cannot be made"):
        loop.fit(data(), epochs=1)
    assert loop.state.step == 0


def test_a_fit_inside_a_fit_is_refused():
    loop = loop_of()
    loop.on("after_epoch")(lambda state: loop.fit(data(), epochs=1) and None)
    with pytest.raises(ax.ConfigurationError, match="running already"):
        loop.fit(data(), epochs=1)


def test_a_step_that_is_kept_keeps_no_graph():
    loop = loop_of()
    loop.fit(data(), epochs=1)
    assert not loop.state.last.predictions.requires_grad


def test_batches_by_hand_that_are_never_finite_are_told_of(monkeypatch):
    monkeypatch.setattr("axontrain.loop.READ_EVERY_SECONDS", 0.0)
    loop = loop_of()
    bad = (torch.full((4, 4), float("nan")), torch.zeros(4, dtype=torch.long))
    for _ in range(9):
        with pytest.warns(ax.NonFiniteWarning, match="skipped"):
            loop.train_on_batch(bad)
    with pytest.raises(ax.NonFiniteError, match="10 in a row"):
        loop.train_on_batch(bad)


# --- hints ------------------------------------------------------------------------------------------------------------


def noted(error):
    return "\n".join(getattr(error.value, "__notes__", []))


@pytest.mark.parametrize(
    "call",
    [
        lambda loop, d: loop.fit(d, epochs=1),
        lambda loop, d: loop.evaluate(d),
        lambda loop, d: loop.predict(d),
        lambda loop, d: loop.train_on_batch(d.gather(torch.arange(4))),
    ],
    ids=["fit", "evaluate", "predict", "train_on_batch"],
)
def test_numpys_float64_is_explained_wherever_it_turns_up(call):
    x, y = data().tensors
    with pytest.raises(RuntimeError) as error:
        call(loop_of(), ax.ArrayDataset(x.double().numpy(), y.numpy()))
    assert ".float()" in noted(error)
    assert "float64" in noted(error)


@pytest.mark.parametrize(
    ("targets", "hint"),
    [(lambda y: y.float(), ".long()"), (lambda y: y[:, None], ".squeeze(-1)"), (lambda y: y.int(), ".long()")],
    ids=["float", "column", "int32"],
)
def test_labels_that_cross_entropy_does_not_take_are_explained(targets, hint):
    x, y = data().tensors
    with pytest.raises(RuntimeError) as error:
        loop_of().fit(ax.ArrayDataset(x, targets(y)), epochs=1)
    assert hint in noted(error)


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_tells_of_shapes_that_broadcast():
    class Broadcasting(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def predict(self, x):
            return self.net(x)

        def loss(self, predictions, targets):
            return F.mse_loss(predictions, targets)

    x, y = data().tensors
    report = loop_of(Broadcasting()).check(ax.ArrayDataset(x, y.float()))
    assert "target size" in str(report)
    assert not report.ok


def test_check_tells_of_a_last_batch_of_one_with_batchnorm():
    objective = ax.Supervised(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), "cross_entropy")
    assert "drop_last" in str(loop_of(objective).check(data(33)))
    assert loop_of(objective).check(data(34)).ok


def test_check_tells_of_an_optimizer_that_is_never_used():
    class Half(ax.Objective):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def train_step(self, batch):
            yield "a", F.cross_entropy(self.a(batch[0]), batch[1])

    optimizers = {name: ax.Optimizer("sgd", lr=0.1) for name in "ab"}
    report = ax.Loop(Half(), optimizers, progress=False).check(data())
    assert "never yields a loss for the optimizer 'b'" in str(report)


def test_a_loss_on_another_device_says_where_it_is():
    class Elsewhere(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def predict(self, x):
            return self.net(x)

        def loss(self, logits, labels):
            return F.cross_entropy(logits, labels).to("meta")

    with pytest.raises(ax.LossError, match="loss is on meta, the parameters on cpu"):
        loop_of(Elsewhere(), device="cpu").fit(data(), epochs=1)


def test_a_fit_without_validation_does_not_show_that_of_the_one_before():
    train, test = ax.data.digits()
    loop = ax.Loop(ax.Supervised(nn.Linear(64, 10), "cross_entropy"), ax.Optimizer("sgd", lr=0.1), progress=False)
    assert "val/loss" in loop.fit(train, test, epochs=1).values
    assert set(loop.fit(train, epochs=1).values) == {"train/loss"}


def test_a_warning_of_what_is_not_finite_is_at_the_line_that_trains():
    loop = ax.Loop(ax.Supervised(nn.Linear(2, 1), "mse"), ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.warns(ax.NonFiniteWarning) as told:
        loop.fit(ax.ArrayDataset(torch.full((8, 2), float("nan")), torch.zeros(8, 1)), epochs=1)
    assert told[0].filename == __file__
