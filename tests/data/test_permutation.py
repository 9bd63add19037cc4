"""Orders of any length: computed, not stored, and as random as stored ones."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import axontrain as ax
from axontrain.data.order import STORED
from axontrain.data.permutation import Permutation

HUGE = 10**9


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_it_is_a_permutation(n, seed):
    assert sorted(Permutation(n, seed).tolist()) == list(range(n))


@given(st.integers(1, 2**42), st.integers(0, 2**63 - 1), st.data())
@settings(deadline=None)
def test_it_is_indexed_as_a_tensor_would_be(n, seed, data):
    order = Permutation(n, seed)
    start = data.draw(st.integers(0, n - 1))
    part = order[start : start + 50]
    assert len(order) == n
    assert part.dtype == torch.int64
    assert len(set(part.tolist())) == len(part) == min(50, n - start)
    assert 0 <= int(part.min()) <= int(part.max()) < n
    places = torch.arange(start, min(n, start + 50))
    assert torch.equal(order[places], part)
    assert torch.equal(torch.stack([order[int(place)] for place in places[:3]]), part[:3])
    assert torch.equal(order[start - n : min(-1, start - n + 9)], order[start : min(n - 1, start + 9)])


def test_what_is_outside_is_an_index_error():
    order = Permutation(10, 0)
    for place in (10, -11):
        with pytest.raises(IndexError, match="has no place"):
            order[place]
    assert order[10:20].tolist() == []
    assert len(list(Permutation(20_000, 1))) == 20_000
    with pytest.raises(ax.ConfigurationError, match=r"at most 2\^42"):
        Permutation(2**42 + 1, 0)


def test_it_is_split_as_a_tensor_would_be():
    order = Permutation(100_003, 5)
    parts = list(order.split(64))
    assert [len(part) for part in parts] == [64] * 1562 + [35]
    assert torch.equal(torch.cat(parts), order[:])


def test_small_orders_are_stored_and_large_ones_computed():
    assert isinstance(ax.order(0, 0, STORED), torch.Tensor)
    assert isinstance(ax.order(0, 0, STORED + 1), Permutation)


def test_a_large_order_is_the_same_in_every_release():
    assert ax.order(0, 0, HUGE)[:4].tolist() == PINNED


PINNED = [602133481, 558216093, 529896939, 878045490]


@given(st.integers(0, 2**62), st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_large_orders_depend_on_seed_and_epoch(seed, epoch):
    first = ax.order(seed, epoch, HUGE)[:20]
    assert torch.equal(ax.order(seed, epoch, HUGE)[:20], first)
    assert not torch.equal(ax.order(seed, epoch + 1, HUGE)[:20], first)
    assert not torch.equal(ax.order(seed + 1, epoch, HUGE)[:20], first)


def deviations(counts):
    """How far a chi-square statistic of counts, all expected alike, lies from its mean, in standard deviations."""
    expected = counts.sum() / counts.numel()
    degrees = counts.numel() - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("n", [STORED + 1, 3_000_000, HUGE, 2**40 + 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_place_holds_any_sample_and_so_does_its_neighbour(n, seed):
    """Chi-square over 64 parts of the places and of the samples, and over adjacent pairs, by high digits and by low ones."""
    size, bins = 1_000_000, 64
    order = Permutation(n, seed)
    values = order[:size]
    high, low = values * bins // n, values % bins
    assert abs(deviations(torch.bincount(high if n > 4 * size else low, minlength=bins).double())) < 6
    spread = torch.randint(n - 1, (size,), generator=torch.Generator().manual_seed(seed)).unique()
    cells = (spread * bins // n) * bins + order[spread] * bins // n
    assert abs(deviations(torch.bincount(cells, minlength=bins * bins).double())) < 6
    for digits in (high, low):
        pairs = torch.bincount(digits[:-1] * bins + digits[1:], minlength=bins * bins).double()
        assert abs(deviations(pairs)) < 6
    steps = (values[1:] - values[:-1]) % n * bins // n
    assert abs(deviations(torch.bincount(steps, minlength=bins).double())) < 6


@pytest.mark.parametrize("make", [lambda n, seed: ax.order(seed, 0, n), Permutation], ids=["stored", "computed"])
def test_over_many_seeds_each_place_holds_any_sample(make):
    n, seeds = 16, 8000
    orders = torch.stack([make(n, seed)[:] for seed in range(seeds)])
    places = torch.stack([torch.bincount(orders[:, place], minlength=n) for place in range(n)]).double()
    assert abs(deviations(places)) < 6
    pairs = torch.bincount((orders[:, :-1] * n + orders[:, 1:]).reshape(-1), minlength=n * n).view(n, n)
    assert int(pairs.diagonal().sum()) == 0
    assert abs(deviations(pairs[~torch.eye(n, dtype=torch.bool)].double())) < 6


SCRIPT = """
import resource, sys, time
import torch
torch.set_num_threads(1)
import axontrain as ax

class Huge:
    def __len__(self):
        return 10**9
    def __getitem__(self, index):
        return index

loader = ax.Loader(Huge(), 64, shuffle=True)
next(loader.batches(0, 0))  # imports and the like
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for epoch, start in ((0, 0), (1, 0), (7, 0), (0, 1), (3, 7_812_500), (5, 15_624_999)):
    began = time.process_time()
    batch = next(loader.batches(0, epoch, start))
    times.append(time.process_time() - began)
    assert len(batch) == 64
print(max(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_any_batch_of_a_thousand_million_is_there_at_once():
    """The bounds are far from what is seen (2 ms, 1 MB), since a stored order would take seconds and 8 GB."""
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120).stdout
    seconds, megabytes = map(float, out.split())
    assert megabytes <= 100
    assert seconds <= 5
