import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axontrain import MetricError
from axontrain.metrics.means import means, merge, summed

# Multiples of 1/8 below 2^20: their sums are exact in double precision, so that laws hold to the last bit.
eighths = st.integers(-(2**20), 2**20).map(lambda value: value / 8)
weights = st.integers(0, 1000)
entries = st.lists(st.tuples(eighths, weights), max_size=6)


def exactly(items):
    return [(torch.tensor(value, dtype=torch.float64), weight, None) for value, weight in items]


sums = st.dictionaries(st.sampled_from(["loss", "a", "b"]), entries.filter(len), max_size=3).map(
    lambda named: summed({name: exactly(items) for name, items in named.items()})
)


def plain(of):
    return {name: tensor.tolist() for name, tensor in of.items()}


@given(sums, sums, sums)
def test_merge_is_associative(a, b, c):
    assert plain(merge(merge(a, b), c)) == plain(merge(a, merge(b, c)))


@given(sums, sums)
def test_merge_is_commutative(a, b):
    assert plain(merge(a, b)) == plain(merge(b, a))


@given(sums)
def test_nothing_is_neutral(a):
    assert plain(merge(a, {})) == plain(merge({}, a)) == plain(a)


@given(sums, sums)
def test_merge_changes_neither(a, b):
    before = plain(a), plain(b)
    merge(a, b)
    assert (plain(a), plain(b)) == before


@given(entries.filter(len), st.data())
def test_the_mean_of_parts_is_the_mean_of_the_whole(items, data):
    items = exactly(items)
    cut = data.draw(st.integers(0, len(items)))
    parts = [summed({"x": part}) if part else {} for part in (items[:cut], items[cut:])]
    assert plain(merge(*parts)) == plain(summed({"x": items}))


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 50)), min_size=1, max_size=8))
def test_means_are_weighted(items):
    read = means(summed({"x": [(torch.tensor(value), weight, None) for value, weight in items]}))
    total = sum(weight for _, weight in items)
    assert read["x"] == pytest.approx(math.fsum(value * weight for value, weight in items) / total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_a_weight_of_zero_adds_nothing_be_it_nan(bad, weight):
    items = [(torch.tensor(2.0), 3, None), (torch.tensor(bad), weight, None)]
    assert means(summed({"x": items})) == {"x": 2.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 5.0])
def test_a_skipped_entry_adds_nothing(bad):
    items = [
        (torch.tensor(2.0), 3, torch.tensor(0.0)),
        (torch.tensor(bad), 1, torch.tensor(1.0)),
        (torch.tensor(4.0), 1, None),
    ]
    assert means(summed({"x": items})) == {"x": 2.5}


def test_what_is_not_finite_and_counts_is_seen():
    assert math.isnan(means(summed({"x": [(torch.tensor(math.nan), 1, None)]}))["x"])
    assert means(summed({"x": [(torch.tensor(math.inf), 1, None)]})) == {"x": math.inf}


def test_a_name_that_no_item_spoke_of_is_nan():
    assert math.isnan(means(summed({"x": [(torch.tensor(1.0), 0, None)]}))["x"])
    assert means({}) == {}


def test_weights_and_values_may_be_tensors_or_numbers():
    items = [
        (torch.tensor(1.0), 1, None),
        (torch.tensor([2.0]), torch.tensor(2), None),
        (3, torch.tensor([3.0]), None),
        (4.0, 4, torch.tensor(0.0)),
        (torch.tensor(5), 5, None),
        (torch.tensor(6.0, dtype=torch.bfloat16), 6, None),
        (torch.tensor(True), 7, None),
    ]
    assert means(summed({"x": items}))["x"] == pytest.approx((1 + 4 + 9 + 16 + 25 + 36 + 7) / 28, rel=1e-15)


def test_sums_are_kept_in_double_precision():
    # 2^24 ones and a half: single precision would lose the half.
    items = [(torch.tensor(1.0), 2**24, None), (torch.tensor(0.5), 1, None)]
    total, weight = summed({"x": items})["x"].tolist()
    assert (total, weight) == (2**24 + 0.5, 2**24 + 1)


def test_a_reading_keeps_no_graph():
    sums = summed({"x": [(torch.ones((), requires_grad=True) * 2, 1, None)]})
    assert not sums["x"].requires_grad


def test_a_reading_that_is_no_scalar_is_named():
    with pytest.raises(MetricError, match=r"the reading 'x' is Tensor\(2,\) float32; a reading is a scalar"):
        summed({"x": [(torch.ones(2), 1, None)]})
