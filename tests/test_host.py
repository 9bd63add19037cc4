"""Numbers that travel to the host: begun now, looked at later, or waited for where they are needed at once."""

import numpy as np
import pytest
import torch
from roads import SlowRoad

from axontrain.host import ROADS, Fetch, copied, item, on_cpu, pinned, placed, scalar
from axontrain.readings import Later, at_once, numbers, together


@pytest.fixture
def road(monkeypatch):
    return SlowRoad.on_the_cpu(monkeypatch)


def doubled(values, log=None):
    fetch = Fetch([values])
    yield [fetch]
    if log is not None:
        log.append("first")
    second = Fetch([values * fetch.values()[0]])
    yield [second]
    return second.values()[0]


def test_what_was_sent_is_what_it_was_then(road):
    values = torch.tensor([1.0, 2.0])
    fetch = Fetch([values, "beside", torch.tensor(3)])
    values.zero_()
    assert not fetch.arrived()
    road.arrive()
    assert fetch.arrived()
    assert fetch.values() == [[1.0, 2.0], "beside", 3]
    assert road.waits == 0


def test_who_needs_it_at_once_waits_for_what_he_asked_for(road):
    assert Fetch([torch.tensor(True)]).values() == [True]
    assert at_once(doubled(torch.tensor(3.0))) == 9.0
    assert item(torch.tensor([[2.5]])) == 2.5
    assert at_once(numbers({"a": torch.ones(1), "b": 2})) == {"a": 1.0, "b": 2.0}
    assert road.waits == 5


def test_a_reading_goes_on_when_what_it_needs_has_arrived(road):
    log = []
    later = Later(doubled(torch.tensor(3.0), log))
    assert (later.arrived(), log) == (False, [])
    road.arrive()
    assert (later.arrived(), log) == (False, ["first"])
    road.arrive()
    assert later.arrived()
    assert later.result() == 9.0
    assert road.waits == 0


def test_several_are_begun_at_the_same_moment_and_one_may_need_more_than_another(road):
    values = torch.tensor(3.0)

    def short():
        fetch = Fetch([values])
        yield [fetch]
        return fetch.values()[0]

    def nothing():
        return "nothing"
        yield

    later = Later(together([doubled(values), short(), nothing()]))
    values.fill_(5.0)
    road.arrive()
    assert not later.arrived()
    road.arrive()
    assert later.arrived()
    assert later.result() == [15.0, 3.0, "nothing"]
    assert at_once(together([])) == []


def test_what_a_reading_raises_is_raised_by_who_looks(road):
    def fails():
        yield [Fetch([torch.tensor(1.0)])]
        raise ValueError("no")

    later = Later(fails())
    assert not later.arrived()
    road.arrive()
    with pytest.raises(ValueError, match="no"):
        later.arrived()


def test_on_the_cpu_a_reading_is_through_at_once():
    later = Later(doubled(torch.tensor(2.0)))
    assert later.arrived()
    assert later.result() == 4.0


def test_copies_to_keep_are_waited_for_once(road):
    first, second = torch.zeros(2), torch.zeros(3)
    copied([(first, torch.ones(2)), (second, torch.ones(3))])
    assert road.waits == 1
    assert (first.sum() + second.sum()).item() == 5
    there = torch.arange(2)
    assert on_cpu({"there": there})["there"] is there


@pytest.mark.parametrize(
    "value", [3, True, 0.5, torch.tensor([2.0]), np.array(0.5), np.float64(0.1), np.float32(0.1), np.int32(3)], ids=repr
)
def test_a_number_becomes_the_tensor_that_torch_makes_of_it(value):
    made, cpu = scalar(value, torch.device("cpu")), torch.device("cpu")
    assert made.dtype is torch.as_tensor(value).dtype
    assert torch.equal(made, torch.as_tensor(value))
    assert placed(made, cpu) is made


LAYOUTS = {
    "contiguous": torch.arange(24.0).reshape(2, 3, 2, 2),
    "channels_last": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "transposed": torch.arange(6).reshape(2, 3).t(),
    "with gaps": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)[:, :2],
    "expanded": torch.arange(3).expand(4, 3),
    "one": torch.tensor(True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_its_layout_a_tensor_is_pinned_in_that_of_its_copy(monkeypatch, layout):
    empty_like, made = torch.empty_like, []

    def without_pins(tensor, *, pin_memory=False, device=None):
        made.append(pin_memory)
        return empty_like(tensor, device=device)

    monkeypatch.setattr(torch, "empty_like", without_pins)
    tensor = LAYOUTS[layout]
    there = pinned(tensor)
    assert made == [True]
    assert torch.equal(there, tensor)
    assert there.stride() == tensor.clone().stride()
    # What has gaps has them in pinned memory too.
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    assert (pinned(tensor) is tensor) == (layout not in ("with gaps", "expanded"))


def test_what_does_not_travel_is_of_the_same_moment_as_what_does(monkeypatch, road):
    monkeypatch.setitem(ROADS, "meta", ROADS.pop("cpu"))
    here = torch.tensor(1.0)
    fetch, alone = Fetch([here, torch.ones((), device="meta")]), Fetch([here])
    here.fill_(2.0)
    assert not fetch.arrived()
    assert fetch._values[0].item() == 1.0
    assert alone.there()[0] is here  # and is not copied where nothing does
