"""When a fit ends, and when it validates on its way."""

import pytest
import torch
from torch import nn

import axontrain as ax


def table(n, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, x.sum(1, keepdim=True))


TRAIN, TEST = table(40), table(12, seed=1)


def line_loop(**options):
    torch.manual_seed(0)
    return ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.01), **{"progress": False, **options})


def validated(loop):
    return [row["step"] for row in loop.state.history if "val/loss" in row]


@pytest.mark.parametrize("limit", [{"epochs": 0}, {"steps": 0}, {"time": 0}])
def test_a_limit_of_zero_returns_the_initial_state_and_warns(limit):
    """Axon: epochs 0 returns the initial state."""
    loop = line_loop()
    before = loop.save()
    with pytest.warns(ax.AxonWarning, match="trains nothing"):
        result = loop.fit(TRAIN, TEST, **limit)
    assert (result.status, loop.state.step, result.values, len(result.history)) == ("completed", 0, {}, 0)
    for name, value in before["objective"].items():
        assert torch.equal(value, loop.objective.state_dict()[name])


@pytest.mark.parametrize(
    ("limits", "steps", "reason"),
    [
        ({"epochs": 2}, 20, "epochs=2"),
        ({"steps": 7}, 7, "steps=7"),
        ({"epochs": 2, "steps": 13}, 13, "steps=13"),
        ({"epochs": 1, "steps": 13}, 10, "epochs=1"),
        ({"epochs": 1, "time": "1 h"}, 10, "epochs=1"),
        ({"epochs": 3, "limit": 4}, 12, "epochs=3"),
        ({"epochs": 3, "limit": 400}, 30, "epochs=3"),
    ],
)
def test_limits_combine_and_the_first_reached_ends_the_run(limits, steps, reason):
    loop = line_loop()
    result = loop.fit(TRAIN, batch_size=4, **limits)
    assert (loop.state.step, result.status, result.reason) == (steps, "completed", reason)


def test_a_limit_on_batches_holds_for_validation_too():
    loop = line_loop()
    counts = []
    loop.evaluate(TEST, batch_size=4)
    plain = loop.objective.eval_step

    def counting(batch):
        counts.append(len(batch[0]))
        return plain(batch)

    loop.objective.eval_step = counting
    loop.fit(TRAIN, TEST, epochs=2, batch_size=4, limit=2)
    assert counts == [4, 4] * 2


@pytest.mark.parametrize("time", [0.05, "0.05 s"])
def test_time_ends_an_endless_run(time):
    def endless():
        while True:
            yield TRAIN.tensors

    loop = line_loop()
    result = loop.fit(endless(), time=time)
    assert result.reason == "time=0.05 s"
    assert 0.05 <= loop.state.elapsed < 5
    assert loop.state.step > 1


def test_a_second_fit_has_its_time_anew():
    loop = line_loop()
    loop.fit([TRAIN.tensors], time=0.05)
    steps = loop.state.step
    loop.fit([TRAIN.tensors], time=0.05)
    assert loop.state.step > steps
    assert loop.state.elapsed >= 0.1


@pytest.mark.parametrize(
    ("validate", "steps"),
    [
        ("1 epoch", [10, 20]),
        ("2 epochs", [20]),
        ("0.5 epochs", [5, 10, 15, 20]),
        (7, [7, 14]),
        ("4 steps", [4, 8, 12, 16, 20]),
        ("25%", [5, 10, 15, 20]),
        ("24 samples", [6, 12, 18]),
        (ax.Every(5, first=2), [5, 10]),
        (ax.Every(5, after="1 epoch"), [10, 15, 20]),
        pytest.param(ax.Every(lambda state: state.step in (3, 17)), [3, 17], id="predicate"),
    ],
    ids=repr,
)
def test_validation_is_had_whenever_it_is_due(validate, steps):
    loop = line_loop()
    loop.fit(TRAIN, TEST, epochs=2, batch_size=4, validate=validate)
    assert validated(loop) == steps


@pytest.mark.parametrize("limit", [{"steps": 6}, {"steps": 16}])
def test_validation_that_is_due_at_the_last_step_is_had(limit):
    # Within an epoch, too: the last validation of a run is the one that is looked at.
    loop = line_loop()
    result = loop.fit(TRAIN, TEST, batch_size=4, validate=2, **limit)
    assert validated(loop) == list(range(2, limit["steps"] + 1, 2))
    assert result.values["val/loss"] == pytest.approx(loop.evaluate(TEST)["loss"])


def test_validation_does_not_come_twice_where_two_intervals_meet():
    loop, calls = line_loop(), []
    loop.on("before_evaluate")(lambda state: calls.append(state.step))
    loop.fit(TRAIN, TEST, epochs=2, batch_size=4, validate=5)
    assert calls == [5, 10, 15, 20]


def test_another_interval_in_a_second_fit_is_heeded():
    loop = line_loop()
    loop.fit(TRAIN, TEST, epochs=1, batch_size=4, validate=1)
    loop.fit(TRAIN, TEST, epochs=2, batch_size=4, validate="1 epoch")
    loop.fit(TRAIN, TEST, epochs=1, batch_size=4, validate=5)
    assert validated(loop) == [*range(1, 11), 20, 30, 35, 40]


def test_an_interval_of_steps_goes_on_counting_in_a_second_fit():
    loop = line_loop()
    for _ in range(3):
        loop.fit(TRAIN, TEST, steps=10, batch_size=4, validate=8)
    assert validated(loop) == [8, 16, 24]


def test_an_interval_of_percent_is_of_each_fit():
    loop = line_loop()
    loop.fit(TRAIN, TEST, epochs=1, batch_size=4, validate="50%")
    loop.fit(TRAIN, TEST, epochs=2, batch_size=4, validate="50%")
    assert validated(loop) == [5, 10, 20, 30]


def test_validation_that_was_never_due_is_warned_of():
    loop = line_loop()
    with pytest.warns(ax.AxonWarning, match="never used"):
        loop.fit(TRAIN, TEST, steps=5, batch_size=4)


def test_validation_that_was_never_due_in_a_second_fit_is_warned_of():
    loop = line_loop()
    loop.fit(TRAIN, TEST, epochs=1, batch_size=4)
    with pytest.warns(ax.AxonWarning, match="never used"):
        loop.fit(TRAIN, TEST, steps=5, batch_size=4)


def test_validation_within_an_epoch_starts_the_training_means_anew():
    loop, losses = line_loop(), []
    loop.on("after_batch")(lambda state: losses.append(state.last.loss.item()))
    result = loop.fit(TRAIN, TEST, epochs=1, batch_size=4, validate=5)
    assert result.history["train/loss"] == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5])


def test_an_epoch_of_unknown_length_that_ends_at_a_step_limit_ends_the_run_there():
    reads = []

    def four():
        for index in range(4):
            reads.append(index)
            yield TRAIN.tensors

    loop = line_loop()
    loop.fit(four(), steps=4)
    assert (loop.state.step, len(reads)) == (4, 4)


def test_a_schedule_of_progress_ends_with_the_plan_of_each_fit():
    loop = ax.Loop(
        ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=1.0, schedule=ax.schedules.linear()), progress=False
    )
    rates = []
    loop.on("after_batch")(lambda state: rates.append(state.optimizers["main"].lr))
    loop.fit(TRAIN, steps=4, batch_size=4)
    loop.fit(TRAIN, epochs=1, batch_size=4)  # the six batches that are left of the epoch
    assert rates == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4] + [1 - k / 6 for k in range(6)])
