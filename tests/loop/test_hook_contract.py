"""The hooks: their order, their answers, their cadence, and what the shipped callbacks do with them."""

import math

import pytest
import torch
from torch import nn

import axontrain as ax
from axontrain.callback import HOOKS


def table(n, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, x.sum(1, keepdim=True))


TRAIN, TEST = table(20), table(12, seed=1)


def line_loop(lr=0.01, schedule=None, **options):
    torch.manual_seed(0)
    optimizer = ax.Optimizer("sgd", lr=lr, schedule=schedule)
    return ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), optimizer, **{"progress": False, **options})


class Recorder(ax.Callback):
    """Writes down every hook that is called; ``answers`` are given where ``(hook, step)`` is a key."""

    def __init__(self, calls, answers=None, name=""):
        super().__init__()
        self.calls, self.answers, self.name = calls, answers or {}, name


def _recording(hook):
    def call(self, state):
        self.calls.append(self.name + hook)
        return self.answers.get((hook, state.step))

    return call


for _hook in HOOKS:
    setattr(Recorder, _hook, _recording(_hook))

BATCH = ["before_batch", "after_backward", "after_batch"]
EPOCH = ["before_epoch", *BATCH * 2, "before_evaluate", "after_evaluate", "after_epoch"]


def test_the_order_of_all_hooks_over_two_epochs():
    calls = []
    line_loop(callbacks=[Recorder(calls)]).fit(TRAIN, TEST, epochs=2, batch_size=10)
    assert calls == ["before_fit", *EPOCH, *EPOCH, "after_fit"]


def test_validation_within_an_epoch_comes_after_the_batch():
    calls = []
    line_loop(callbacks=[Recorder(calls)]).fit(TRAIN, TEST, epochs=1, batch_size=10, validate=1)
    evaluation = ["before_evaluate", "after_evaluate"]
    assert calls == ["before_fit", "before_epoch", *BATCH, *evaluation, *BATCH, *evaluation, "after_epoch", "after_fit"]


def test_callbacks_are_called_in_the_order_of_the_list():
    calls = []
    line_loop(callbacks=[Recorder(calls, name="a."), Recorder(calls, name="b.")]).fit(TRAIN, epochs=1, batch_size=20)
    one = ["before_fit", "before_epoch", *BATCH, "after_epoch", "after_fit"]
    assert calls == [f"{name}.{hook}" for hook in one for name in "ab"]


def test_a_fit_that_goes_on_within_an_epoch_opens_it_again():
    calls = []
    loop = line_loop(callbacks=[Recorder(calls)])
    loop.fit(TRAIN, steps=1, batch_size=10)
    assert calls == ["before_fit", "before_epoch", *BATCH, "after_fit"]
    calls.clear()
    loop.fit(TRAIN, epochs=1, batch_size=10)
    assert calls == ["before_fit", "before_epoch", *BATCH, "after_epoch", "after_fit"]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in ("after_fit", "on_error")])
def test_an_error_in_a_hook_is_raised_and_after_fit_is_called(hook):
    calls, errors = [], []

    class Broken(ax.Callback):
        pass

    def fail(self, state):
        raise ValueError(f"broken {hook}")

    setattr(Broken, hook, fail)
    loop = line_loop(callbacks=[Recorder(calls), Broken()])
    loop.on("on_error")(lambda state: errors.append(state.error))
    with pytest.raises(ValueError, match=f"broken {hook}") as info:
        loop.fit(TRAIN, TEST, epochs=2, batch_size=10)
    assert calls[-2:] == ["on_error", "after_fit"]
    assert calls.count("after_fit") == 1
    assert errors == [info.value]
    assert loop.state.status == "failed"


def test_a_loop_that_failed_can_be_fitted_again():
    loop = line_loop()
    failing = [True]

    @loop.on("after_batch")
    def fail(state):
        if failing and state.step == 1:
            failing.clear()
            raise ValueError("once")

    with pytest.raises(ValueError, match="once"):
        loop.fit(TRAIN, epochs=1, batch_size=5)
    assert loop.fit(TRAIN, epochs=1, batch_size=5).status == "completed"
    assert (loop.state.step, loop.state.epoch, loop.state.error) == (4, 1, None)


STOP = ax.Stop("no more")


@pytest.mark.parametrize(
    ("where", "steps", "epochs", "last"),
    [
        (("before_fit", 0), 0, 0, []),
        (("before_epoch", 0), 0, 0, ["before_epoch"]),
        (("before_epoch", 2), 2, 1, ["after_epoch", "before_epoch"]),
        (("before_batch", 1), 1, 0, ["after_batch", "before_batch"]),
        (("after_backward", 0), 1, 0, ["after_backward", "after_batch"]),
        (("after_batch", 1), 1, 0, ["after_backward", "after_batch"]),
        (("after_batch", 2), 2, 1, ["after_evaluate", "after_epoch"]),  # the epoch was over: it counts
        (("before_evaluate", 2), 2, 1, ["after_evaluate", "after_epoch"]),
        (("after_evaluate", 2), 2, 1, ["after_evaluate", "after_epoch"]),
        (("after_epoch", 2), 2, 1, ["after_evaluate", "after_epoch"]),
    ],
)
def test_a_stop_of_any_hook_ends_the_run_after_the_step_in_hand(where, steps, epochs, last):
    calls = []
    loop = line_loop(callbacks=[Recorder(calls, {where: STOP})])
    result = loop.fit(TRAIN, TEST, epochs=3, batch_size=10)
    assert (result.status, result.reason, result.ok) == ("stopped", "no more", True)
    assert (loop.state.step, loop.state.epoch) == (steps, epochs)
    assert calls[-1] == "after_fit"
    assert calls[-1 - len(last) : -1] == last
    assert loop.state.status == "stopped"


def test_a_stopped_loop_goes_on_with_another_fit():
    loop = line_loop(callbacks=[Recorder([], {("after_batch", 1): STOP})])
    loop.fit(TRAIN, epochs=1, batch_size=10)
    result = loop.fit(TRAIN, epochs=1, batch_size=10)
    assert (result.status, loop.state.step, loop.state.epoch) == ("completed", 2, 1)


def test_a_stop_outranks_a_stopped_epoch_and_the_first_reason_holds():
    answers = [{("after_batch", 1): answer} for answer in (ax.StopEpoch("epoch"), ax.Stop("first"), ax.Stop("second"))]
    loop = line_loop(callbacks=[Recorder([], answer) for answer in answers])
    result = loop.fit(TRAIN, epochs=2, batch_size=10)
    assert (result.status, result.reason, loop.state.step) == ("stopped", "first", 1)


def test_a_stopped_epoch_is_not_left_over_for_the_next_fit():
    loop = line_loop(callbacks=[Recorder([], {("after_batch", 2): ax.StopEpoch("now")})])
    loop.fit(TRAIN, steps=2, batch_size=5)
    loop.fit(TRAIN, steps=4, batch_size=5)
    assert loop.state.step == 6


@pytest.mark.parametrize("answer", [True, "stop", 0.5, ax.Stop], ids=str)
def test_a_hook_that_answers_something_else_is_an_error(answer):
    loop = line_loop()
    loop.on("after_batch")(lambda state: answer)
    with pytest.raises(ax.ConfigurationError, match=r"after_batch.*returned.*ax\.Stop\(reason\)"):
        loop.fit(TRAIN, epochs=1)


def test_hooks_see_the_counters_of_their_moment():
    seen = []
    loop = line_loop()
    for hook in ("before_batch", "after_backward", "after_batch", "after_epoch"):
        loop.on(hook)(lambda s, h=hook: seen.append((h, s.epoch, s.step, s.batch_index, s.samples)))
    loop.fit(TRAIN, epochs=1, batch_size=12)
    assert seen == [
        ("before_batch", 0, 0, 0, 0),
        ("after_backward", 0, 0, 0, 0),
        ("after_batch", 0, 1, 1, 12),
        ("before_batch", 0, 1, 1, 12),
        ("after_backward", 0, 1, 1, 12),
        ("after_batch", 0, 2, 2, 20),
        ("after_epoch", 1, 2, 0, 20),
    ]


# --- cadence ----------------------------------------------------------------------------------------------------------


def test_counters_with_two_handlers_count_once():
    """Axon's loop_test.exs: two handlers on one event do not advance a counter twice."""
    loop, a, b = line_loop(), [], []
    every = ax.Every(3)
    loop.on("after_batch", every=every)(lambda state: a.append(state.step))
    loop.on("after_batch", every=every)(lambda state: b.append(state.step))
    loop.fit(TRAIN, steps=12, batch_size=2)
    assert a == b == [3, 6, 9, 12]
    assert loop.state.step == 12


@pytest.mark.parametrize(
    ("cadence", "steps", "count"),
    [
        ({"every": 2, "after": 10, "before": 40}, 50, 15),  # Axon's loop_test.exs
        ({"every": 3}, 30, 10),
        ({"every": 3, "first": 2}, 30, 2),
        ({"every": "2 epochs"}, 40, 2),
        ({"every": "10%"}, 50, 10),
        ({"every": "20 samples"}, 30, 3),
        pytest.param({"every": lambda state: state.step % 7 == 0}, 50, 7, id="predicate"),
        ({"first": 1}, 30, 1),
        ({"after": "1 epoch"}, 30, 21),
    ],
    ids=str,
)
def test_a_handler_is_called_as_often_as_its_cadence_says(cadence, steps, count):
    loop, calls = line_loop(), []
    loop.on("after_batch", **cadence)(lambda state: calls.append(state.step))
    loop.fit(TRAIN, steps=steps, batch_size=2)  # epochs of 10
    assert len(calls) == count


def test_every_second_epoch():
    loop, calls = line_loop(), []
    loop.on("after_epoch", every="2 epochs")(lambda state: calls.append(state.epoch))
    loop.fit(TRAIN, epochs=5)
    loop.fit(TRAIN, epochs=2)
    assert calls == [2, 4, 6]


def test_a_callback_takes_a_cadence_as_well():
    class Counting(ax.Callback):
        def __init__(self, **cadence):
            super().__init__(**cadence)
            self.at, self.fits = [], 0

        def before_fit(self, state):
            self.fits += 1

        def after_batch(self, state):
            self.at.append(state.step)

    counting = Counting(every=4, after=8)
    line_loop(callbacks=[counting]).fit(TRAIN, steps=17, batch_size=2)
    assert (counting.at, counting.fits) == ([8, 12, 16], 1)


# --- shipped callbacks ------------------------------------------------------------------------------------------------


class Scripted(ax.Objective):
    """Its loss in validation is what the script says, one number for each validation."""

    def __init__(self, script):
        super().__init__()
        self.script, self.at = script, nn.Parameter(torch.zeros(1))
        self.evaluations = 0

    def train_step(self, batch):
        return ax.Step(self.at.square().sum(), weight=len(batch))

    def eval_step(self, batch):
        value = self.script[self.evaluations]
        self.evaluations += 1
        return ax.Step(torch.tensor(float(value)), weight=len(batch), values={"accuracy": float(value)})


def watched(script, *callbacks, epochs=None, **options):
    loop = ax.Loop(Scripted(script), ax.Optimizer("sgd", lr=1.0), callbacks=callbacks, progress=False)
    one = torch.ones(2, 1)
    return loop, loop.fit([one], [one], epochs=epochs or len(script), **options)


NAN = math.nan


@pytest.mark.parametrize(
    ("script", "options", "stops"),
    [
        ([5, 4, 3, 2, 1], {"patience": 1}, None),
        ([5, 6, 4, 3, 3], {"patience": 1}, 2),
        ([5, 6, 7, 4, 4, 4, 4], {"patience": 3}, 7),  # a better one starts the count anew
        ([5, 5, 5, 5], {"patience": 2}, 3),  # a plateau is not better
        ([5, 4.95, 4.9, 4.85], {"patience": 2, "min_delta": 0.2}, 3),
        ([5, 4.5, 4.0, 3.5], {"patience": 2, "min_delta": 0.2}, None),
        ([5, NAN, NAN, 4], {"patience": 2}, 3),  # NaN is never better
        ([NAN, NAN, 5, 4], {"patience": 3}, None),
        ([1, 2, 3, 4], {"patience": 2, "mode": "max"}, None),
        ([4, 3, 2, 1], {"patience": 2, "mode": "max"}, 3),
        ([5, 6, 7, 8, 9], {"patience": 1, "every": "2 epochs"}, 4),  # looks at 6 and 8
    ],
)
def test_early_stopping_stops_when_nothing_becomes_better(script, options, stops):
    loop, result = watched(script, ax.EarlyStopping("val/loss", **options))
    if stops is None:
        assert (loop.state.epoch, result.status) == (len(script), "completed")
    else:
        assert (loop.state.epoch, result.status) == (stops, "stopped")
        assert "val/loss" in result.reason


def test_early_stopping_tells_the_mode_from_the_name():
    loop, _ = watched([1, 2, 3, 2, 2], ax.EarlyStopping("val/accuracy", patience=2))
    assert loop.state.epoch == 5
    loop, _ = watched([3, 2, 1, 2, 3], ax.EarlyStopping("val/accuracy", patience=2))
    assert loop.state.epoch == 3
    with pytest.raises(ax.ConfigurationError, match="mode='min' or mode='max'"):
        ax.EarlyStopping("val/goodness")


def test_early_stopping_goes_by_validations_within_an_epoch():
    loop = ax.Loop(
        Scripted([5, 6, 7, 8]),
        ax.Optimizer("sgd", lr=1.0),
        callbacks=[ax.EarlyStopping("val/loss", patience=2)],
        progress=False,
    )
    one = torch.ones(2, 1)
    result = loop.fit([one] * 8, [one], epochs=1, validate=2)
    assert (result.status, loop.state.step, loop.state.epoch) == ("stopped", 6, 0)
    assert result.values["val/loss"] == 7


def test_early_stopping_by_a_training_reading_looks_at_each_epochs_end():
    loop = line_loop(lr=0.0, callbacks=[ax.EarlyStopping("train/loss", patience=2, min_delta=1e-3)])
    loop.fit(TRAIN, epochs=9)
    assert loop.state.epoch == 3


def test_a_fit_after_early_stopping_has_its_patience_anew():
    loop, _ = watched([1, 2, 3, 4, 5, 6, 7], ax.EarlyStopping("val/loss", patience=2))
    assert loop.state.epoch == 3
    one = torch.ones(2, 1)
    loop.fit([one], [one], epochs=4)
    assert loop.state.epoch == 5


def test_reduce_lr_on_plateau_lowers_the_rate_in_time():
    script = [5, 4, 4, 4, 3, 3, 3]
    rates = ax.LearningRate()
    _, result = watched(script, rates, ax.ReduceLROnPlateau("val/loss", factor=0.1, patience=2))
    # Validation comes before after_epoch: a rate lowered after the fourth is read at the fourth.
    assert result.history["lr"] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_reduce_lr_on_plateau_heeds_cooldown_and_the_lowest_rate():
    _, result = watched([5] * 6, ax.LearningRate(), ax.ReduceLROnPlateau("val/loss", factor=0.1, patience=1, cooldown=1))
    assert result.history["lr"] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001])
    _, result = watched([5] * 5, ax.LearningRate(), ax.ReduceLROnPlateau("val/loss", factor=0.1, patience=1, min_lr=0.05))
    assert result.history["lr"] == pytest.approx([1, 0.1, 0.05, 0.05, 0.05])


def test_reduce_lr_on_plateau_scales_a_schedule():
    loop = ax.Loop(
        Scripted([5, 5, 5, 5]),
        ax.Optimizer("sgd", lr=1.0, schedule=ax.schedules.linear()),
        callbacks=[ax.LearningRate(every=1), ax.ReduceLROnPlateau("val/loss", factor=0.5, patience=1)],
        progress=False,
    )
    one = torch.ones(2, 1)
    result = loop.fit([one], [one], epochs=4)
    assert result.history["lr"] == pytest.approx([1, 0.75, 0.5 * 0.5, 0.25 * 0.25])


def test_learning_rates_are_readings_of_the_steps_that_used_them():
    loop = line_loop(lr=0.1, schedule=ax.schedules.linear(), callbacks=[ax.LearningRate(every=2)])
    result = loop.fit(TRAIN, steps=6, batch_size=5)
    assert [(row["step"], row["lr"]) for row in result.history if "lr" in row] == [
        (2, pytest.approx(0.1 * 5 / 6)),
        (4, pytest.approx(0.1 * 3 / 6)),
        (6, pytest.approx(0.1 * 1 / 6)),
    ]


def test_readings_of_a_callbacks_own_are_in_the_history_and_the_result():
    loop = line_loop()
    loop.on("after_epoch")(lambda state: state.record({"norm": state.objective.model.weight.norm().item()}))
    result = loop.fit(TRAIN, epochs=2)
    assert len(result.history["norm"]) == 2
    assert result.values["norm"] == result.history["norm"][-1] == loop.objective.model.weight.norm().item()
