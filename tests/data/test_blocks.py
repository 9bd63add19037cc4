import itertools
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import axontrain as ax
from axontrain.data.blocks import order_in_blocks

seeds = st.integers(-(2**63), 2**63)
epochs = st.integers(0, 10**6)
sizes = st.lists(st.integers(0, 9), max_size=12)
windows = st.integers(1, 14)


@given(seeds, epochs, sizes, windows)
def test_it_is_a_permutation_and_a_pure_function(seed, epoch, blocks, window):
    order = order_in_blocks(seed, epoch, blocks, window)
    rows = order.rows(0, len(order))
    assert rows.dtype == torch.int64
    assert sorted(rows.tolist()) == list(range(sum(blocks)))
    torch.rand(1)  # what others draw changes nothing
    assert torch.equal(order_in_blocks(seed, epoch, tuple(blocks), window).rows(0, len(order)), rows)


@given(sizes, windows, st.lists(st.integers(0, 108), max_size=6))
def test_a_part_is_that_of_the_whole_wherever_it_is_cut(blocks, window, cuts):
    order = order_in_blocks(1, 2, blocks, window)
    whole = order.rows(0, len(order))
    cuts = sorted({0, len(order), *(min(cut, len(order)) for cut in cuts)})
    parts = [order_in_blocks(1, 2, blocks, window).rows(a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([*parts, torch.empty(0, dtype=torch.int64)]), whole)
    parts = [order.rows(a, b) for a, b in reversed(list(itertools.pairwise(cuts)))]  # and in any sequence
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *reversed(parts)]), whole)


@given(seeds, sizes, windows)
def test_no_more_than_a_window_of_blocks_is_open_at_once(seed, blocks, window):
    owner = [number for number, size in enumerate(blocks) for _ in range(size)]
    order = order_in_blocks(seed, 0, blocks, window)
    seen = [owner[row] for row in order.rows(0, len(order)).tolist()]
    spans = {number: (seen.index(number), len(seen) - seen[::-1].index(number)) for number in set(seen)}
    for place in range(len(seen)):
        assert sum(first <= place < end for first, end in spans.values()) <= window


@given(seeds, epochs)
def test_seeds_and_epochs_give_orders_of_their_own(seed, epoch):
    def rows(seed, epoch):
        return order_in_blocks(seed, epoch, [20] * 4, 2).rows(0, 80)

    first = rows(seed, epoch)
    for other in (rows(seed, epoch + 1), rows(seed + 1, epoch), rows(epoch, seed + 2**64)):
        assert not torch.equal(first, other)


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    order_in_blocks(0, 0, [5, 5], 1).rows(0, 10)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_order_is_the_same_in_every_release():
    # A run that goes on under a newer axontrain has to go through the same order.
    assert order_in_blocks(0, 0, [3, 2, 0, 4], 2).rows(0, 9).tolist() == [0, 8, 7, 5, 6, 2, 1, 3, 4]


def test_reaching_the_middle_computes_the_windows_it_touches():
    order = order_in_blocks(0, 0, [1000] * 100_000, 10)
    middle = 50_005_000 // 2
    order.rows(middle, middle + 64)
    assert order.computed == 1
    order.rows(30_000 - 32, 30_000 + 32)  # across a border
    assert order.computed == 3
    order.rows(30_000 + 32, 30_000 + 96)  # in the window computed last
    order.rows(30_000 - 96, 30_000 - 32)
    assert order.computed == 3


def test_a_billion_rows_are_in_order_at_once():
    blocks = [100_000] * 10_000
    order_in_blocks(0, 0, [10], 1)
    before = time.perf_counter()
    order_in_blocks(0, 0, blocks, 3).rows(700_000_000, 700_000_064)
    assert time.perf_counter() - before < 1


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_rows_are_uniform_within_a_window():
    # Eight rows in one window: each place and row, and each pair of neighbours, as often as any other.
    runs, n = 4000, 8
    orders = torch.stack([order_in_blocks(seed, 0, [3, 0, 4, 1], 4).rows(0, n) for seed in range(runs)])
    places = torch.stack([(orders == row).sum(0) for row in range(n)]).double()
    assert chi_square(places, runs / n) < 49 + 5 * (2 * 49) ** 0.5
    pairs = torch.bincount((orders[:, :-1] * n + orders[:, 1:]).flatten(), minlength=n * n).double()
    pairs = pairs.view(n, n)[~torch.eye(n, dtype=torch.bool)]
    assert chi_square(pairs, runs * (n - 1) / len(pairs)) < 55 + 5 * (2 * 55) ** 0.5


def test_each_block_is_as_likely_in_each_window():
    runs = 2000
    firsts = torch.stack([order_in_blocks(seed, 0, [2] * 6, 2).rows(0, 4) // 2 for seed in range(runs)])
    counts = torch.bincount(firsts.flatten(), minlength=6).double()
    # A block that is in the first window gives both its rows: half as many independent draws as rows.
    assert chi_square(counts / 2, runs / 3) < 5 + 5 * 10**0.5


def test_with_one_window_any_row_may_come_anywhere():
    for window in (3, 50):
        orders = torch.stack([order_in_blocks(seed, 0, [2, 1, 3], window).rows(0, 6) for seed in range(300)])
        for place in range(6):
            assert set(orders[:, place].tolist()) == set(range(6))


def test_what_cannot_be_put_in_order():
    with pytest.raises(ax.ConfigurationError, match="window=0: a whole number of blocks, 1 or more"):
        order_in_blocks(0, 0, [1], 0)
    with pytest.raises(ax.ConfigurationError, match="a block of -2 rows"):
        order_in_blocks(0, 0, [3, -2], 1)
    with pytest.raises(IndexError, match="an epoch of 3 rows has no places 1 to 4"):
        order_in_blocks(0, 0, [3], 1).rows(1, 4)
    assert len(order_in_blocks(0, 0, [], 1)) == len(order_in_blocks(0, 0, [0, 0], 1)) == 0
    assert order_in_blocks(0, 0, [0, 0], 1).rows(0, 0).tolist() == []
    assert repr(order_in_blocks(0, 0, [3, 2], 2)) == "BlockOrder(5 rows in 2 blocks, mixed 2 at a time)"
