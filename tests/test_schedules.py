import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import axontrain as ax
from axontrain import schedules

points = st.floats(0, 1)
warmups = st.floats(0.01, 0.9)

# Each schedule without a warm-up, and what it is by its formula.
FORMULAS = {
    "constant": (schedules.constant(), lambda p: 1.0),
    "linear": (schedules.linear(), lambda p: 1 - p),
    "linear to a tenth": (schedules.linear(end=0.1), lambda p: 1 - 0.9 * p),
    "cosine": (schedules.cosine(), lambda p: math.cos(math.pi * p / 2) ** 2),
    "cosine to a tenth": (schedules.cosine(end=0.1), lambda p: 0.1 + 0.9 * math.cos(math.pi * p / 2) ** 2),
    "one_cycle": (
        schedules.one_cycle(peak=0.25, start=0.1, end=0.01),
        lambda p: (
            0.1 + 0.9 * math.sin(math.pi * p / 0.5) ** 2
            if p < 0.25
            else 0.01 + 0.99 * math.cos(math.pi * (p - 0.25) / 1.5) ** 2
        ),
    ),
    "step": (schedules.step(at=[0.5, "75%"], factor=0.5), lambda p: 1.0 if p < 0.5 else 0.5 if p < 0.75 else 0.25),
}
WITH_WARMUP = {
    "constant": schedules.constant,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "one_cycle": schedules.one_cycle,
}


@pytest.mark.parametrize("name", FORMULAS)
@given(p=points)
def test_each_is_its_formula(name, p):
    schedule, formula = FORMULAS[name]
    assert schedule(p) == pytest.approx(formula(p), abs=1e-12)


@given(points, st.floats(0.01, 0.99))
def test_inverse_sqrt_is_its_formula(p, warmup):
    expected = p / warmup if p < warmup else math.sqrt(warmup / p)
    assert schedules.inverse_sqrt(warmup=warmup)(p) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", WITH_WARMUP)
@given(p=points, warmup=warmups)
def test_warmup_goes_before_each(name, p, warmup):
    make = WITH_WARMUP[name]
    plain, warmed = make(), make(warmup=warmup)
    expected = plain(0.0) * p / warmup if p < warmup else plain((p - warmup) / (1 - warmup))
    assert warmed(p) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [*WITH_WARMUP, "inverse_sqrt"])
@given(warmup=warmups)
def test_warmup_begins_at_0_and_is_whole_at_its_end(name, warmup):
    make = schedules.inverse_sqrt if name == "inverse_sqrt" else WITH_WARMUP[name]
    schedule = make(warmup=warmup)
    whole = 1.0 if name == "inverse_sqrt" else make()(0.0)
    assert schedule(0.0) == 0.0
    assert schedule(warmup) == pytest.approx(whole, abs=1e-9)
    assert schedule(warmup * (1 - 1e-9)) == pytest.approx(whole, abs=1e-6)


@given(points, warmups)
def test_steps_are_at_points_of_the_whole_run_warmup_or_not(p, warmup):
    plain, warmed = schedules.step(at=[0.92, 0.95]), schedules.step(at=[0.92, 0.95], warmup=warmup)
    if p >= warmup and all(abs(p - at) > 1e-9 for at in (0.92, 0.95)):
        assert warmed(p) == pytest.approx(plain(p))
    assert warmed(0.0) == 0.0


@pytest.mark.parametrize("name", [*FORMULAS, "inverse_sqrt"])
@given(p=points)
def test_factors_lie_between_0_and_1(name, p):
    schedule = schedules.inverse_sqrt() if name == "inverse_sqrt" else FORMULAS[name][0]
    assert 0 <= schedule(p) <= 1


def test_values_at_the_beginning_the_peak_and_the_end():
    assert [schedules.one_cycle()(p) for p in (0.0, 0.3, 1.0)] == pytest.approx([0.04, 1.0, 4e-6], abs=1e-15)
    assert [schedules.cosine()(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-15)
    assert [schedules.cosine(end=0.2)(p) for p in (0.0, 1.0)] == [1.0, 0.2]
    assert [schedules.linear(end=2.0)(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.5, 2.0]
    assert [schedules.step(at=[0.5])(p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.1, 0.1]
    assert schedules.inverse_sqrt(warmup="25%")(1.0) == 0.5


def of_torch(make, n):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler = make(optimizer)
    rates = []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("n", [2, 10, 57, 1000])
def test_cosine_is_torchs(n):
    ours = [0.4 * schedules.cosine(end=0.1)(k / n) for k in range(n)]
    assert of_torch(lambda o: CosineAnnealingLR(o, n, eta_min=0.04), n) == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize("n", [11, 58, 1001])
def test_one_cycle_is_torchs(n):
    # torch counts to the last of N updates, so that this one is at the end; here that is the end of the run.
    ours = [0.4 * schedules.one_cycle()(k / (n - 1)) for k in range(n)]

    def make(optimizer):
        # Its peak is at update pct_start * N - 1.
        return OneCycleLR(optimizer, max_lr=0.4, total_steps=n, pct_start=(0.3 * (n - 1) + 1) / n)

    assert of_torch(make, n) == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize("make", [schedules.constant, schedules.linear, schedules.cosine, schedules.one_cycle])
@pytest.mark.parametrize("warmup", [1.0, 1.5, -0.1, "100%", "five", "5", None, [0.1], math.nan, "nan%"])
def test_a_warmup_is_a_fraction_of_the_run(make, warmup):
    with pytest.raises(ax.ConfigurationError, match="warmup="):
        make(warmup=warmup)


def test_a_warmup_in_percent_is_the_same():
    assert schedules.cosine(warmup="25%")(0.1) == schedules.cosine(warmup=0.25)(0.1) == schedules.cosine(warmup=" 25 % ")(0.1)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: schedules.one_cycle(peak=0.0), r"one_cycle\(peak=0\.0\): the peak lies between 0 and 1"),
        (lambda: schedules.one_cycle(peak=1.0), "peak"),
        (lambda: schedules.one_cycle(start=-0.1), "start=-0.1: a factor of the learning rate is 0 or more"),
        (lambda: schedules.one_cycle(end=math.nan), "end=nan"),
        (lambda: schedules.linear(end=-1.0), "end=-1.0"),
        (lambda: schedules.cosine(end=-1.0), "end=-1.0"),
        (lambda: schedules.inverse_sqrt(warmup=0.0), "begins at infinity: give a warm-up"),
        (lambda: schedules.step(at="50%"), r"at='50%'\): at is a list"),
        (lambda: schedules.step(at=0.5), "at is a list"),
        (lambda: schedules.step(at=[30, 60]), "at=30: a fraction of the run"),
        (lambda: schedules.step(at=["half"]), "at='half': give a fraction"),
        (lambda: schedules.step(at=[0.5], factor=-1.0), "factor=-1.0"),
    ],
)
def test_what_cannot_be_a_schedule_is_said(make, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        make()


def test_each_schedule_is_documented_and_takes_a_warmup():
    for make in (*WITH_WARMUP.values(), schedules.inverse_sqrt, schedules.step):
        assert make.__doc__
        assert "warmup" in make.__annotations__
