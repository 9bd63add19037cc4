import datetime
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import axontrain as ax
from axontrain.checkpoint.encode import decode, encode
from axontrain.clock import SECONDS, UNITS, Cadence, Duration, Every, Plan

counts = st.integers(0, 200)
intervals = st.integers(1, 25)


@dataclass
class Run:
    """A clock without a loop: so many steps of one sample, in epochs of one length, a second each."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    batch_index: int = 0
    epoch_length: int | None = 10
    elapsed: float = 0.0
    progress: float = 0.0
    total: int = 100

    def after(self, step):
        """The clock after so many steps, an epoch being counted with its last batch."""
        self.step, self.samples, self.elapsed = step, step, float(step)
        self.epoch, self.batch_index = divmod(step, self.epoch_length)
        self.progress = min(1.0, step / self.total)
        return self


def due_at(every, steps, *, start=0, run=None, cadence=None):
    """The steps at which it is due, when asked after each."""
    run = run or Run()
    cadence = cadence or Cadence(every)
    cadence.start(run.after(start))
    return [step for step in range(start + 1, steps + 1) if cadence.due(run.after(step))]


# --- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", UNITS)
def test_every_unit_is_read(word):
    duration = Duration.parse(f"3 {word}")
    assert duration.unit == UNITS[word]
    assert duration.amount == 3 * SECONDS.get(word, 1)
    assert Duration.parse(f"3{word.upper()}") == duration
    assert Duration.parse(f"  3   {word}  ") == duration


@pytest.mark.parametrize(
    ("value", "amount", "unit"),
    [
        (100, 100, "steps"),
        (0, 0, "steps"),
        ("1e6 samples", 10**6, "samples"),
        ("1E3 samples", 1000, "samples"),
        ("2.0 epochs", 2, "epochs"),
        ("0.5 epochs", Fraction(1, 2), "epochs"),
        (".5 epochs", Fraction(1, 2), "epochs"),
        ("0.1 epochs", Fraction(1, 10), "epochs"),
        ("5%", 5, "percent"),
        ("12.5 percent", Fraction(25, 2), "percent"),
        ("1.5 min", 90, "seconds"),
        ("2 h", 7200, "seconds"),
        ("1 day", 86400, "seconds"),
        ("1e-1 s", Fraction(1, 10), "seconds"),
        (datetime.timedelta(minutes=3), 180, "seconds"),
    ],
)
def test_amounts_are_exact(value, amount, unit):
    assert Duration.parse(value) == Duration(Fraction(amount), unit)


def test_a_duration_is_taken_as_it_is():
    duration = Duration.parse("2 epochs")
    assert Duration.parse(duration) is duration


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (1.5, ax.ConfigurationError, r"validate=1\.5 is no duration: give an int \(steps\), or an amount and a unit"),
        (True, ax.ConfigurationError, "validate=True is no duration"),
        (None, ax.ConfigurationError, "validate=None is no duration"),
        ("", ax.ConfigurationError, "validate='' is no duration"),
        ("soon", ax.ConfigurationError, "validate='soon' is no duration"),
        ("-1 epochs", ax.ConfigurationError, "validate='-1 epochs' is no duration"),
        ("1 2 epochs", ax.ConfigurationError, "is no duration"),
        ("nan epochs", ax.ConfigurationError, "is no duration"),
        ("1 epoch 2", ax.ConfigurationError, "is no duration"),
        ("100", ax.ConfigurationError, "validate='100' has no unit: say '100 steps' or '... epochs'"),
        ("2 epocs", ax.UnknownNameError, "'epocs': did you mean 'epochs'"),
        ("2 fortnights", ax.UnknownNameError, "unknown unit in validate='2 fortnights', 'fortnights'"),
        ("1.2.3 epochs", ax.ConfigurationError, r"'1\.2\.3' is no number"),
        ("1.5 steps", ax.ConfigurationError, "steps are whole"),
        ("1e-1 samples", ax.ConfigurationError, "samples are whole"),
        (-5, ax.ConfigurationError, "validate=-5 is negative: a duration is 0 or more"),
        (datetime.timedelta(seconds=-1), ax.ConfigurationError, "is negative"),
    ],
)
def test_what_is_no_duration_is_rejected_by_name(value, error, told):
    with pytest.raises(error, match=told):
        Duration.parse(value, "validate")


@pytest.mark.parametrize("text", ["12.5%", "0.1 epochs", "1234567 samples", "1000000000 steps", "0.0001%", "1e-07 epochs"])
def test_what_is_written_is_what_was_given(text):
    duration = Duration.parse(text)
    assert str(duration) == text
    assert Duration.parse(str(duration)) == duration


@given(st.integers(0, 10**9), st.sampled_from(sorted(set(UNITS.values()))))
def test_a_written_duration_reads_back(amount, unit):
    duration = Duration(Fraction(amount), unit)
    assert Duration.parse(str(duration)) == duration


def test_a_duration_is_measured_in_its_own_unit():
    run = Run(step=25, epoch=2, samples=800, batch_index=5, epoch_length=10, elapsed=90.0, progress=0.25)
    measured = {unit: Duration(Fraction(1), unit).measure(run) for unit in set(UNITS.values())}
    assert measured == {"steps": 25, "epochs": Fraction(5, 2), "samples": 800, "seconds": 90.0, "percent": 25.0}
    run.epoch_length = None  # an iterable: what part of an epoch is done is not known
    assert Duration.parse("1 epoch").measure(run) == 2


# --- cadences --------------------------------------------------------------------------------------------------------


@given(counts, intervals)
def test_every_k_steps_is_due_n_over_k_times_and_at_its_multiples(n, k):
    due = due_at(Every(k), n)
    assert len(due) == n // k
    assert all(step % k == 0 for step in due)


@given(counts, intervals, st.integers(1, 12), counts, counts)
def test_first_after_and_before_combine(n, k, first, after, before):
    due = due_at(Every(k, first=first, after=after, before=before), n)
    assert due == [step for step in range(1, n + 1) if step % k == 0 and after <= step < before][:first]


@given(counts, intervals, counts)
def test_a_second_fit_does_not_count_what_was_passed_before(n, k, start):
    assert due_at(Every(k), n, start=start) == [step for step in range(start + 1, n + 1) if step % k == 0]


everies = st.one_of(
    intervals,
    st.sampled_from(["1 epoch", "2 epochs", "0.5 epochs", "0.3 epochs", "1.7 epochs", "7 samples", "5%", "30%", "4 s"]),
    st.just(lambda run: run.step % 3 == 1),
    st.none(),
)


@given(everies, counts, st.data(), st.one_of(st.none(), st.integers(1, 9)))
def test_saved_and_restored_in_the_middle_it_is_due_as_if_uninterrupted(interval, n, data, first):
    every = Every(interval, first=first)
    middle = data.draw(st.integers(0, n))
    one = Cadence(every)
    before = due_at(every, middle, cadence=one)
    other = Cadence(every)
    other.load_state_dict(decode(*encode(one.state_dict())))
    after = [step for step in range(middle + 1, n + 1) if other.due(Run().after(step))]
    assert before + after == due_at(every, n)


@given(everies, counts, st.data())
def test_a_second_fit_in_the_middle_goes_on_with_the_cadence(interval, n, data):
    assume(interval not in ("5%", "30%"))  # of the run: a second fit is another one
    every, middle = Every(interval, first=5), data.draw(st.integers(0, n))
    cadence = Cadence(every)
    before = due_at(every, middle, cadence=cadence)
    assert before + due_at(every, n, start=middle, cadence=cadence) == due_at(every, n)


@given(counts, intervals, st.lists(st.integers(1, 200), unique=True))
def test_asked_seldom_it_is_due_once_for_the_multiples_passed(n, k, asked):
    cadence, run, last = Cadence(Every(k)), Run(), 0
    cadence.start(run)
    for step in sorted(asked):
        assert cadence.due(run.after(step)) == (step // k > last // k)
        last = step


@given(intervals, counts)
def test_next_step_is_never_too_late(k, n):
    every = Every(k)
    cadence, run = Cadence(every), Run()
    cadence.start(run)
    for step in range(n):
        promised = cadence.next_step(run.after(step))
        assert promised == (step // k + 1) * k


@given(everies, st.integers(1, 100))
def test_no_step_before_next_step_is_due_nor_any_time_before_the_seconds_are_over(interval, n):
    run, cadence = Run(), Cadence(Every(interval))
    cadence.start(run.after(0))
    promised, until = cadence.next_step(run), run.elapsed + cadence.seconds_left(run)
    for step in range(1, n + 1):
        run.after(step)
        due = cadence.due(run)
        if run.batch_index:  # an epoch's end is asked about in any case
            assert not due or step >= promised or run.elapsed >= until - 1e-9
        promised, until = cadence.next_step(run), run.elapsed + cadence.seconds_left(run)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 15), st.integers(1, 100))
def test_fractional_epochs_are_due_at_the_batch_that_completes_them(numerator, denominator, length, n):
    every = Every(Duration(Fraction(numerator, denominator), "epochs"))
    run = Run(epoch_length=length)
    due = due_at(every, n, run=run)
    part = Fraction(numerator, denominator)
    multiples = [Fraction(step, length) // part for step in range(n + 1)]
    assert due == [step for step in range(1, n + 1) if multiples[step] > multiples[step - 1]]


def test_half_epochs_of_an_odd_length():
    assert due_at(Every("0.5 epochs"), 10, run=Run(epoch_length=5)) == [3, 5, 8, 10]


def test_whole_epochs_are_asked_about_at_the_end_alone():
    cadence = Cadence(Every("2 epochs"))
    assert cadence.next_step(Run()) == math.inf
    assert due_at(Every("2 epochs"), 60) == [20, 40, 60]


def test_epochs_of_unknown_length_are_counted_when_they_end():
    run = Run(epoch_length=None)
    cadence = Cadence(Every("0.5 epochs"))
    cadence.start(run)
    run.step = run.batch_index = 7
    assert not cadence.due(run)
    run.epoch, run.batch_index = 1, 0
    assert cadence.due(run)
    assert not cadence.due(run)


def test_samples_go_by_the_samples_of_each_batch():
    cadence, run = Cadence(Every("10 samples")), Run()
    cadence.start(run)
    due = []
    for run.step, size in enumerate([4, 4, 4, 16, 1, 4, 7, 1], 1):
        run.samples += size
        if cadence.due(run):
            due.append(run.samples)
    assert due == [12, 28, 33, 40]  # two multiples passed at once are one occasion


def test_time_goes_by_seconds_of_training():
    cadence, run = Cadence(Every("1 min")), Run(elapsed=30.0)
    cadence.start(run)
    due = []
    for run.elapsed in (45.0, 59.9, 60.0, 61.0, 119.0, 200.0, 239.0, 240.0):
        if cadence.due(run):
            due.append(run.elapsed)
    assert due == [60.0, 200.0, 240.0]
    assert cadence.next_step(Run(step=7)) == math.inf
    assert cadence.seconds_left(Run(elapsed=250.0)) == 50.0


@given(st.integers(1, 400), st.sampled_from([1, 2, 5, 10, 20, 25, 50]))
def test_percent_of_the_run_are_due_at_the_step_that_completes_them(total, percent):
    due = due_at(Every(f"{percent}%"), total, run=Run(total=total, epoch_length=1000))
    part = Fraction(percent, 100)
    multiples = [Fraction(step, total) // part for step in range(total + 1)]
    assert due == [step for step in range(1, total + 1) if multiples[step] > multiples[step - 1]]


@given(st.integers(1, 10**7), st.integers(1, 100), st.sampled_from(["0.1", "0.3", "1", "2.5", "7", "33"]))
def test_percent_are_exact_in_long_runs(total, times, percent):
    part = Fraction(percent) / 100
    step = math.ceil(times * part * total)  # the step that completes so many of them
    assume(0 < step <= total)
    cadence, run = Cadence(Every(f"{percent}%")), Run(total=total, epoch_length=1000)
    cadence.start(run.after(step - 1))
    assert cadence.due(run.after(step))
    assert not cadence.due(run)


@given(st.integers(1, 400), st.sampled_from([1, 2, 5, 29, 57, 58]))
def test_bounds_in_percent_are_exact(total, percent):
    run = Run(total=total, epoch_length=1000)
    done = [step for step in range(1, total + 1) if 100 * step >= percent * total]
    assert due_at(Every(after=f"{percent}%"), total, run=run) == done
    assert due_at(Every(before=f"{percent}%"), total, run=run) == [s for s in range(1, total + 1) if s not in done]


def test_percent_start_anew_with_each_fit():
    every, cadence = Every("50%"), None
    cadence = Cadence(every)
    assert due_at(every, 100, cadence=cadence) == [50, 100]
    run = Run()
    cadence.start(run)  # a second fit: progress is 0 again
    assert [step for step in range(1, 101) if cadence.due(run.after(step))] == [50, 100]


@given(counts, st.integers(1, 5), counts)
def test_a_predicate_is_due_when_it_answers_true(n, first, after):
    def odd(run):
        return run.step % 2 == 1

    due = due_at(Every(odd, first=first, after=after), n)
    assert due == [step for step in range(1, n + 1) if step % 2 and step >= after][:first]


@given(counts)
def test_without_an_interval_each_occasion_is_due(n):
    assert due_at(Every(), n) == list(range(1, n + 1))


def test_one_every_serves_many_uses():
    every = Every(2, first=1)
    assert due_at(every, 10) == due_at(every, 10) == [2]


def test_bounds_have_units_of_their_own():
    assert due_at(Every(3, after="1 epoch", before="25 samples"), 40) == [12, 15, 18, 21, 24]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Every(0), "every=0 is never due: an interval is above 0"),
        (lambda: Every("0 epochs"), "every='0 epochs' is never due"),
        (lambda: Every(0.5), r"every=0\.5 is no duration"),
        (lambda: Every(3, first=0), "first=0: a whole number of times, 1 or more"),
        (lambda: Every(3, first=True), "first=True"),
        (lambda: Every(3, first=1.0), r"first=1\.0"),
        (lambda: Every(3, after="later"), "after='later' is no duration"),
        (lambda: Every(3, before=-1), "before=-1 is negative"),
        (lambda: Every.parse(Every(3), first=2), r"give first=, after= and before= to the Every, or beside it: not both"),
    ],
)
def test_a_cadence_that_cannot_be_is_rejected(make, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        make()


def test_parse_takes_an_every_or_what_makes_one():
    every = Every(3, first=2)
    assert Every.parse(every, first=None) is every
    assert repr(Every.parse("2 epochs", first=2)) == "Every('2 epochs', first=2)"


def test_the_repr_can_be_read():
    assert repr(Every()) == "Every(None)"
    assert repr(Every(100, after=10, before="2 epochs")) == "Every('100 steps', after='10 steps', before='2 epochs')"
    assert repr(Every("5%")) == "Every('5%')"


# --- plans -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300))
def test_progress_before_the_kth_of_n_updates_is_k_over_n(n):
    plan = Plan(steps=n)
    assert [plan.progress(Run().after(k)) for k in range(n + 1)] == [k / n for k in range(n + 1)]


@given(st.integers(1, 8), st.integers(1, 30), st.integers(0, 100), st.integers(0, 29))
def test_progress_over_epochs_counts_batches_from_where_the_fit_began(epochs, length, start, index):
    index %= length
    plan = Plan(epochs=epochs, start_epoch=start // length, start_step=start, start_index=index)
    begin = plan.start_epoch * length + index
    total = epochs * length - index  # finishing the epoch that was begun counts as one
    seen = []
    for done in range(total + 1):
        epoch, batch = divmod(begin + done, length)
        seen.append(plan.progress(Run(step=start + done, epoch=epoch, batch_index=batch, epoch_length=length)))
    assert seen == [done / total for done in range(total + 1)]


plans = st.builds(
    Plan,
    epochs=st.one_of(st.none(), st.integers(1, 9)),
    steps=st.one_of(st.none(), st.integers(1, 90)),
    seconds=st.one_of(st.none(), st.floats(0.5, 90)),
)


@given(plans)
def test_progress_rises_from_0_to_1_and_is_the_largest_of_its_limits(plan):
    alone = [Plan(epochs=plan.epochs), Plan(steps=plan.steps), Plan(seconds=plan.seconds)]
    seen = []
    for step in range(101):
        run = Run().after(step)
        seen.append(plan.progress(run))
        assert seen[-1] == max(one.progress(run) for one in alone)
        assert (seen[-1] == 1.0) == (plan.over(run) is not None)
    assert seen[0] == 0.0
    assert all(0 <= a <= b <= 1 for a, b in pairwise(seen))


def test_epochs_of_unknown_length_progress_in_whole_ones():
    plan = Plan(epochs=4)
    assert plan.progress(Run(epoch=1, batch_index=7, step=20, epoch_length=None)) == 0.25


def test_the_first_limit_reached_ends_the_run_and_is_named():
    plan = Plan(epochs=2, steps=5, seconds=60.0, start_epoch=1, start_step=10, start_elapsed=100.0)
    at = Run(step=14, epoch=2, elapsed=159.0)
    assert plan.over(at) is None
    at.step = 15
    assert plan.over(at) == "steps=5"
    at.step, at.epoch = 14, 3
    assert plan.over(at) == "epochs=2"
    at.epoch, at.elapsed = 2, 160.0
    assert plan.over(at) == "time=60 s"


def test_the_total_is_the_smallest_that_is_known():
    assert Plan(epochs=3, start_index=4).total_steps(Run()) == 26
    assert Plan(epochs=3, steps=20).total_steps(Run()) == 20
    assert Plan(epochs=3).total_steps(Run(epoch_length=None)) is None
    assert Plan(seconds=3.0).total_steps(Run()) is None
    assert Plan(steps=7, start_step=5).last_step == 12
    assert Plan(epochs=7).last_step == math.inf
