"""Readings that arrive a step or more later, as from a GPU: what they tell, and that nothing is lost while they travel."""

import math
import warnings

import pytest
import torch
from resume_runs import flat
from roads import SlowRoad
from torch import nn

import axontrain as ax
import axontrain.loop
import axontrain.update
from axontrain import host
from axontrain.execution import run
from axontrain.metrics import meter as meters
from axontrain.metrics.meter import Meter
from axontrain.metrics.registry import BUILT_IN
from axontrain.objective import Step
from axontrain.readings import Later


class Counting(ax.Objective):
    """The loss of step n is n + 1; where a batch says so, it is NaN."""

    def __init__(self):
        super().__init__()
        self.weight_ = nn.Parameter(torch.zeros(1))

    def predict(self, batch):
        return self.weight_ * 0 + batch.mean()

    def loss(self, predictions, batch):
        return predictions.sum()


def batches(count, bad=()):
    return [torch.full((1,), math.nan if n in bad else n + 1.0) for n in range(count)]


def made(*, patience=10, callbacks=(), **options):
    optimizer = ax.Optimizer("sgd", lr=0.1, patience=patience, **options)
    return ax.Loop(Counting(), optimizer, device="cpu", progress=False, callbacks=list(callbacks))


@pytest.fixture
def road(monkeypatch):
    """Each look-up of the loop begins a reading, or looks whether one has arrived, which a test decides."""
    for module in (run, axontrain.loop):
        monkeypatch.setattr(module, "READ_EVERY_SECONDS", 0.0)
        monkeypatch.setattr(module, "LOOK_AGAIN_SECONDS", 0.0)
    return SlowRoad.on_the_cpu(monkeypatch)


def test_a_reading_is_shown_when_it_has_arrived_and_is_of_the_step_at_which_it_was_begun(road):
    loop, shown = made(), {}

    @loop.on("after_batch")
    def look(state):
        shown[state.step] = state.values.get("train/loss"), state.under_way
        if state.step in (4, 5, 8):
            road.arrive()

    result = loop.fit(batches(10), epochs=1)
    # Begun after step 1, there after step 4. The next after step 5: of steps 1 to 5; it arrives during step 8.
    assert shown[1] == (None, False)
    assert [shown[step] for step in (2, 3, 4)] == [(None, True)] * 3
    assert shown[5] == (1.0, False)
    assert [shown[step] for step in (6, 7, 8)] == [(1.0, True)] * 3
    assert shown[9] == (3.0, False)
    assert result.values["train/loss"] == 5.5  # at the epoch's end it waits
    assert not loop.state.under_way
    assert [row["train/loss"] for row in result.history] == [5.5]


def test_it_is_looked_for_before_the_next_is_due(road, monkeypatch):
    loop, shown = made(), []

    @loop.on("after_batch")
    def look(state):
        shown.append(state.values.get("train/loss"))
        monkeypatch.setattr(run, "READ_EVERY_SECONDS", 1e9)  # from the first step on
        road.arrive()

    loop.fit(batches(6), epochs=1)
    assert shown == [None, None, 1.0, 1.0, 1.0, 1.0]


def test_between_readings_nothing_waits(road):
    loop, waits = made(), []

    @loop.on("after_batch")
    def look(state):
        waits.append(road.waits)
        if state.step % 3 == 0:
            road.arrive()

    with pytest.warns(ax.NonFiniteWarning, match="step 4"):
        loop.fit(batches(20, bad=(3,)), batches(4), epochs=1)
    assert set(waits) == {0}
    assert road.waits > 0


def test_what_was_skipped_is_counted_and_told_when_it_arrives(road):
    loop, seen = made(), {}

    @loop.on("after_batch")
    def look(state):
        seen[state.step] = state.optimizers["main"].skipped, len(told)
        if state.step == 6:
            road.arrive()  # the flags, after step 3
        if state.step == 7:
            road.arrive()  # what is told of them

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop.on("after_batch")(lambda state: road.arrive() if state.step == 2 else None)
        loop.fit(batches(9, bad=(2, 4, 8)), epochs=1)
    assert [seen[step] for step in (3, 5, 7)] == [(0, 0)] * 3
    assert seen[8] == (1, 1)
    assert loop.state.optimizers["main"].skipped == 3
    assert [str(one.message).partition(" (")[2].partition("; weights")[0] for one in told] == [
        "step 3: loss nan)",
        "step 5: loss nan; step 9: loss nan)",
    ]
    assert loop.state.values["train/loss"] == (1 + 2 + 4 + 6 + 7 + 8) / 6


@pytest.mark.filterwarnings("ignore::axontrain.NonFiniteWarning")
@pytest.mark.parametrize("arrives", [(), (3,), (3, 4), (4, 6, 8)], ids=str)
@pytest.mark.parametrize("step", range(1, 10))
def test_a_state_saved_meanwhile_is_that_of_a_run_that_waits(road, monkeypatch, step, arrives):
    """Whatever is under way, or has arrived in part; and it goes on to the same end."""
    bad = (1, 2, 5, 6)

    def saved():
        loop, states = made(average="ema"), []

        @loop.on("after_batch")
        def look(state):
            if state.step == step:
                states.append(loop.save())
            if state.step in arrives:
                road.arrive()

        loop.fit(batches(9, bad), epochs=1)
        return *states, loop.save()

    slow, end = saved()
    monkeypatch.delitem(host.ROADS, "cpu")
    plain, end_of_plain = saved()
    assert same(plain, slow)
    assert slow["optimizers"]["main"]["skipped"] == sum(n < step for n in bad)
    assert same(end, end_of_plain)
    monkeypatch.setitem(host.ROADS, "cpu", road)
    again = made(average="ema")
    again.restore(slow)
    again.fit(batches(9, bad), epochs=1, resume=True)
    assert same(again.save(), end)


def same(one, other):
    leaves = [
        {
            key: leaf
            for key, leaf in flat(tree).items()
            if not any(word in key for word in ("elapsed", "/values", "/attached/data"))
        }
        for tree in (one, other)
    ]
    return leaves[0].keys() == leaves[1].keys() and all(
        torch.equal(leaf.nan_to_num(), leaves[1][key].nan_to_num())
        if isinstance(leaf, torch.Tensor)
        else leaf == leaves[1][key] or leaf != leaf
        for key, leaf in leaves[0].items()
    )


def test_too_many_in_a_row_are_an_error_when_that_has_arrived(road):
    loop = made(patience=3)

    @loop.on("after_batch")
    def look(state):
        if state.step in (2, 7, 8, 12, 13):
            road.arrive()

    # Read after step 2: the first. Begun after step 3, of which one update was bad: its flags come in step 7, its loss in 8.
    # Begun after step 9, with two more: they are an error when that is known.
    told = pytest.warns(ax.NonFiniteWarning, match=r"1 update .*step 3")
    with told, pytest.raises(ax.NonFiniteError, match=r"2 updates .* 3 in a row") as caught:
        loop.fit(batches(20, bad=(2, 3, 4)), epochs=1)
    assert loop.state.step == 13
    assert caught.value.steps == (4, 5)
    assert not loop.state.under_way


def test_a_fit_that_fails_forgets_what_was_under_way_and_the_next_one_counts_it(road):
    loop = made()

    @loop.on("after_batch")
    def look(state):
        if state.step == 4:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        loop.fit(batches(6, bad=(1,)), epochs=1)
    assert not loop.state.under_way
    assert loop.state.optimizers["main"].skipped == 0
    road.arrive()
    with pytest.warns(ax.NonFiniteWarning, match="step 2"):
        loop.state.read()
    assert loop.state.optimizers["main"].skipped == 1
    assert loop.state.values["train/loss"] == (1 + 3 + 4) / 3


def test_who_reads_by_himself_waits_and_gets_the_present_numbers(road):
    loop, read, shown = made(), {}, {}

    @loop.on("after_batch")
    def look(state):
        shown[state.step] = state.values.get("train/loss")
        if state.step in (3, 5):  # a reading was begun after step 1, and after step 3 or 4 another
            read[state.step] = state.read()["train/loss"]

    loop.fit(batches(6), epochs=1)
    assert read == {3: 2.0, 5: 3.0}
    assert [shown[step] for step in (3, 4, 5, 6)] == [None, 2.0, 2.0, 3.0]


def test_what_somebody_has_read_meanwhile_is_not_counted_twice(road):
    loop = made()
    state, update = loop.state, loop.state.optimizers["main"]
    for batch in batches(3, bad=(1,)):
        loop.train_on_batch(batch)
    state.drop_reading()
    assert not state.read_later()
    with pytest.warns(ax.NonFiniteWarning, match="1 update"):
        state.read_updates()
    for batch in batches(2, bad=(0,)):
        state.meter.record(loop._by_hand(batch))
    while not state.read_later():  # that which was begun before
        road.arrive()
    assert update.skipped == 1
    with pytest.warns(ax.NonFiniteWarning, match="1 update"):
        state.read()
    assert update.skipped == 2


def test_another_state_drops_what_was_under_way(road):
    loop = made()
    first, state = loop.save(), loop.state
    for batch in batches(3, bad=(0,)):
        loop.train_on_batch(batch)
    assert state.under_way
    loop.restore(first)
    assert not state.under_way
    road.arrive()
    loop.train_on_batch(batches(1)[0])
    state.read()
    assert state.optimizers["main"].skipped == 0
    assert state.values == {"train/loss": 1.0}


def test_a_loop_by_hand_is_told_without_waiting(road):
    loop = made()
    skipped = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number, batch in enumerate(batches(8, bad=(1,))):
            if number in (2, 5, 7):
                road.arrive()
            loop.train_on_batch(batch)
            skipped.append((loop.state.optimizers["main"].skipped, len(told)))
    # Of the first step; from the fourth on of the second to the fourth: the flags in the sixth, what is told in the eighth.
    assert skipped == [(0, 0)] * 7 + [(1, 1)]
    assert road.waits == 0
    assert loop.state.values == {}


def test_more_than_may_wait_are_read_as_they_come_and_waited_for_in_the_end(road, monkeypatch):
    monkeypatch.setattr(axontrain.update, "MOST_PENDING", 4)
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 1e9)
    update = None
    loop, waiting = made(), {}
    update = loop.state.optimizers["main"]

    @loop.on("after_batch")
    def look(state):
        waiting[state.step] = len(update._pending), road.waits
        if state.step == 6:
            road.arrive()

    loop.fit(batches(20), epochs=1, steps=17)
    assert waiting[6] == (6, 0)  # begun before the fifth
    assert waiting[7] == (3, 0)  # four of them have come
    assert waiting[8] == (4, 0)
    assert waiting[12] == (8, 0)
    assert waiting[13] == (1, 1)  # twice as many as may wait: that is waited for
    assert waiting[16] == (4, 1)


def recorded(meter, count, *, first=0, bad=(), rows=3):
    """Steps with predictions whose accuracy is 1 for even steps, else 0; the loss is the step's number."""
    for n in range(first, first + count):
        labels = torch.zeros(rows, dtype=torch.long)
        logits = torch.tensor([[1.0, 0.0] if n % 2 == 0 else [0.0, 1.0]]).repeat(rows, 1)
        skipped = torch.tensor(float(n in bad))
        meter.record(Step(torch.tensor(float(n)), logits, labels, weight=rows, skipped=skipped))


def begun(meter):
    return Later(meter.reading())


@pytest.mark.parametrize("fold", [4, 1000], ids=["joined", "waiting"])
@pytest.mark.parametrize("most", [2**26, 1], ids=["small", "more than may wait"])
@pytest.mark.parametrize("large", [False, True], ids=["kept", "given at once"])
def test_metrics_are_of_the_step_at_which_they_were_begun(monkeypatch, fold, most, large):
    """Those of small predictions, which wait for their flags, and of large ones, which are undone on the device."""
    import torchmetrics  # which takes seconds

    monkeypatch.setattr(meters, "FOLD", fold)
    monkeypatch.setattr(meters, "MOST_BYTES", most)
    if large:
        monkeypatch.setattr(meters, "SMALL_BYTES", 0)
    bad = (1, 3, 6, 14)

    class Share(torchmetrics.MeanMetric):  # somebody else's, who is given each step by itself
        def update(self, predictions, targets):
            super().update((predictions.argmax(-1) == targets).float())

    metrics = {"accuracy": "accuracy", "f1": "f1", "confusion_matrix": "confusion_matrix", "share": Share()}

    def plain(count):
        meter = Meter(metrics)
        recorded(meter, count, bad=bad)
        return meter.read()

    expected = {count: plain(count) for count in (2, 9, 10, 25)}
    road = SlowRoad.on_the_cpu(monkeypatch)
    meter = Meter(metrics)
    recorded(meter, 10, bad=bad)
    later = begun(meter)
    recorded(meter, 9, first=10, bad=bad)  # while it travels
    looks = 0
    while not later.arrived():
        road.arrive()
        recorded(meter, 1, first=19 + looks, bad=bad)
        looks += 1
    assert later.result() == expected[10]
    recorded(meter, 6 - looks, first=19 + looks, bad=bad)
    assert meter.read() == meter.read() == expected[25]
    assert meter.read(last=True) == expected[25]


def test_steps_wait_for_their_flags_until_there_are_too_many(monkeypatch):
    monkeypatch.setattr(meters, "FOLD", 4)
    monkeypatch.setattr(meters, "MOST_BYTES", 5 * 48 - 1)  # of five steps
    road = SlowRoad.on_the_cpu(monkeypatch)
    meter = Meter({"accuracy": "accuracy"})
    recorded(meter, 8)
    assert road.waits == 0
    road.arrive()
    recorded(meter, 8, first=8)  # the first eight are given to the metric now
    assert road.waits == 0
    recorded(meter, 2, first=16)
    assert road.waits > 0  # of twice as many as may wait
    assert meter.read()["accuracy"] == 0.5


def test_steps_that_were_all_skipped_have_nothing_to_say_when_that_arrives(monkeypatch):
    monkeypatch.setattr(meters, "SMALL_BYTES", 0)
    road = SlowRoad.on_the_cpu(monkeypatch)
    meter = Meter({"accuracy": "accuracy"})
    recorded(meter, 3, bad=(0, 1, 2))
    later = begun(meter)
    while not later.arrived():
        road.arrive()
    assert math.isnan(later.result().pop("loss"))
    assert later.result() == {}
    assert road.waits == 0


def test_values_that_are_computed_on_the_host_are_those_of_the_device(monkeypatch):
    """Each of the built-in names, of which some look at numbers to compute their value."""
    classes = [name for name in BUILT_IN if name not in ("mse", "rmse", "mae", "r2", "cosine_similarity")]
    torch.manual_seed(0)
    of_classes = [(torch.randn(6, 3), torch.randint(3, (6,))) for _ in range(5)]
    of_numbers = [(torch.randn(6, 2), torch.randn(6, 2)) for _ in range(5)]

    def read():
        found = {}
        for names, data in ((classes, of_classes), (["mse", "rmse", "mae", "r2", "cosine_similarity"], of_numbers)):
            meter = Meter(list(names))
            for number, (predictions, targets) in enumerate(data):
                skipped = torch.tensor(float(number == 2))
                meter.record(Step(torch.tensor(1.0), predictions, targets, weight=6, skipped=skipped))
            found |= meter.read()
        return found

    plain = read()
    SlowRoad.on_the_cpu(monkeypatch)
    assert read() == plain
    assert set(plain) == {"loss", *BUILT_IN}


def test_float_targets_that_are_no_classes_are_an_error_when_they_arrive(monkeypatch):
    road = SlowRoad.on_the_cpu(monkeypatch)
    meter = Meter(["accuracy"])
    meter.record(Step(torch.tensor(1.0), torch.randn(4, 2), torch.full((4, 2), 3.5), weight=4))
    later = begun(meter)
    assert not later.arrived()
    road.arrive()
    assert not later.arrived()  # the flags; now the counts are under way
    road.arrive()
    with pytest.raises(ax.MetricError, match="cannot take for classes"):
        later.arrived()
    assert road.waits == 0


@pytest.mark.parametrize("step", [9, 11, 16], ids=["before its look", "under way", "told"])
def test_a_guard_against_spikes_tells_at_the_next_look(road, monkeypatch, step):
    monkeypatch.setattr(run, "READ_EVERY_SECONDS", 1e9)
    data = [torch.full((1,), 50.0 if n == 6 else 1.0) for n in range(19)]

    def loop_of(save=None):
        loop = made(callbacks=[ax.SpikeGuard(window=4, deviations=2, look=5)])

        @loop.on("after_batch")
        def look(state):
            told[state.step] = len(caught)
            if state.step == save:
                saved.append(loop.save())
            if state.step in (6, 12):
                road.arrive()

        return loop

    told, saved, message = {}, [], "SpikeGuard left out 1 update: step 7: 50, where 1 ± 0 is usual"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop_of().fit(data, epochs=1)
    # Looked for at step 10, there in step 12 (as in 6 was what it looked for at 5), acted upon at 15.
    assert [told[step] for step in (10, 12, 13, 14, 15)] == [0, 0, 0, 0, 1]
    assert [str(one.message) for one in caught][:1] == [message]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop_of(save=step).fit(data, epochs=1)
    again, told = loop_of(), {}
    again.restore(saved[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.fit(data, epochs=1, resume=True)
    assert [str(one.message) for one in caught if "SpikeGuard" in str(one.message)] == ([message] if step < 15 else [])
    assert told[17] == (step < 15)


@pytest.mark.parametrize("rows", [4, 40_000], ids=["small", "large"])
def test_metrics_that_are_on_the_cpu_are_read_as_they_were_when_the_rest_was_sent(monkeypatch, rows):
    """As of a step whose predictions were brought to the host, while its loss is on the device."""
    import torchmetrics  # which takes seconds

    class Elsewhere(SlowRoad):  # a device of which all values are 1
        def sent(self, tensor):
            there = torch.full(tensor.shape, math.nan, dtype=tensor.dtype)
            self.under_way.append((there, torch.ones(tensor.shape, dtype=tensor.dtype)))
            return there

    class Share(torchmetrics.MeanMetric):
        def update(self, predictions, targets):
            super().update((predictions.argmax(-1) == targets).float())

    road = Elsewhere()
    monkeypatch.setitem(host.ROADS, "meta", road)
    meter = Meter({"share": Share(), "accuracy": "accuracy"})

    def record(right):
        predictions = torch.tensor([[1.0, 0.0] if right else [0.0, 1.0]]).repeat(rows, 1)
        meter.record(Step(torch.ones((), device="meta"), predictions, torch.zeros(rows, dtype=torch.long), weight=rows))

    record(True)
    record(True)
    later = begun(meter)
    record(False)
    record(False)
    assert not later.arrived()
    road.arrive()
    assert later.result() == {"loss": 1.0, "share": 1.0, "accuracy": 1.0}
    assert road.waits == 0


SIZES = [3, 3, 20, 3, 20, 20, 3, 3, 20, 3, 3, 3]  # rows: more than ten are large


def of_sizes(meter, first, last, sizes=SIZES, bad=(1, 4, 6)):
    for n in range(first, last):
        recorded(meter, 1, first=n, bad=bad, rows=sizes[n])


@pytest.mark.parametrize("saved", [5, 9])
def test_large_predictions_wait_for_their_turn_where_small_ones_wait_for_their_flags(monkeypatch, saved):
    monkeypatch.setattr(meters, "SMALL_BYTES", 10 * 16)
    metrics = {"accuracy": "accuracy", "f1": "f1", "perplexity": "perplexity"}
    plain = Meter(metrics)
    of_sizes(plain, 0, saved)
    expected = plain.read()
    of_sizes(plain, saved, 12)
    road = SlowRoad.on_the_cpu(monkeypatch)
    meter, again = Meter(metrics), Meter(metrics)
    of_sizes(meter, 0, saved)
    again.load_state_dict(meter.state_dict())
    later = begun(meter)
    for one in (meter, again):
        waits = road.waits
        of_sizes(one, saved, 12)
        assert road.waits == waits
    while not later.arrived():
        road.arrive()
    assert later.result() == expected
    assert len(meter._tallies[0].groups) > 2
    of_sizes(meter, 2, 3)  # a large one, before which all but the last small ones are known
    of_sizes(plain, 2, 3)
    assert [group.large for group in meter._tallies[0].groups] == [False, True]
    of_sizes(again, 2, 3)
    assert meter.read() == again.read() == plain.read()
    assert meter.read(last=True) == again.read(last=True) == plain.read(last=True)


def test_so_many_large_ones_may_wait(monkeypatch):
    monkeypatch.setattr(meters, "SMALL_BYTES", 10 * 16)
    monkeypatch.setattr(meters, "MOST_BYTES", 3 * 20 * 16)
    road = SlowRoad.on_the_cpu(monkeypatch)
    meter = Meter({"accuracy": "accuracy"})
    of_sizes(meter, 0, 6, [3, *[20] * 20])
    assert road.waits == 0
    of_sizes(meter, 6, 8, [3, *[20] * 20])
    assert road.waits == 1
    assert meter._tallies[0].groups == []


@pytest.mark.parametrize("bad", [0, 2])
def test_too_many_in_a_row_are_told_before_what_a_metric_makes_of_them(monkeypatch, road, bad):
    monkeypatch.setattr(meters, "SMALL_BYTES", 0)

    class Wrong(Counting):
        metrics = ("accuracy",)  # of targets that it cannot take, which it learns of before the losses are there

        def train_step(self, batch):
            return Step(self.loss(self.predict(batch), batch), torch.zeros(4, 2), torch.full((4, 2), 3.5), weight=4)

    loop = ax.Loop(Wrong(), ax.Optimizer("sgd", lr=0.1, patience=2), device="cpu", progress=False)
    monkeypatch.setattr(axontrain.loop, "READ_EVERY_SECONDS", 1e9)
    for batch in batches(3, bad=range(1, 1 + bad)):
        loop.train_on_batch(batch)

    def read():
        while not loop.state.read_later():
            road.arrive()

    with pytest.raises(ax.NonFiniteError if bad else ax.MetricError):
        read()
    assert not loop.state.under_way


def test_a_reading_of_nothing_changes_nothing():
    """Not what is counted of losses that were bad in a row, where losses are scaled."""
    loop = made(patience=3)
    update = loop.state.optimizers["main"]
    update.scaled = True
    for batch in batches(2, bad=(0, 1)):
        loop.train_on_batch(batch)
    with pytest.warns(ax.NonFiniteWarning, match="2 updates"):
        update.read()
    before = update.bad_losses, update.in_a_row, update.skipped
    update.read()
    assert (update.bad_losses, update.in_a_row, update.skipped) == before == (2, 2, 2)
    loop.train_on_batch(batches(1, bad=(0,))[0])
    with pytest.raises(ax.NonFiniteError, match="3 in a row"):
        update.read()


def test_a_reading_by_hand_is_not_that_of_a_fit(road):
    loop, seen = made(), []
    loop.train_on_batch(batches(1)[0])
    assert loop.state.under_way  # of what was skipped, and of no mean
    loop.on("after_batch")(lambda state: seen.append(state.under_way))
    loop.fit(batches(2), epochs=1)
    assert seen == [False, True]
