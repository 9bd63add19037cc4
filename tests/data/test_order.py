import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import axontrain as ax

seeds = st.integers(-(2**63), 2**63)
epochs = st.integers(0, 10**6)


@given(seeds, epochs, st.integers(0, 200))
def test_the_order_is_a_permutation_and_a_pure_function(seed, epoch, n):
    order = ax.order(seed, epoch, n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    torch.rand(1)  # what others draw changes nothing
    assert torch.equal(ax.order(seed, epoch, n), order)


@given(seeds, epochs)
def test_seeds_and_epochs_give_orders_of_their_own(seed, epoch):
    first = ax.order(seed, epoch, 50)
    for other in (ax.order(seed, epoch + 1, 50), ax.order(seed + 1, epoch, 50), ax.order(epoch, seed + 2**64, 50)):
        assert not torch.equal(first, other)


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    ax.order(0, 0, 100)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_order_is_the_same_in_every_release():
    # A run that goes on under a newer axontrain has to go through the same order.
    assert ax.order(0, 0, 8).tolist() == [7, 1, 3, 0, 6, 2, 5, 4]


def test_each_place_is_as_likely_as_any_other():
    firsts = torch.stack([ax.order(seed, 0, 4) for seed in range(2000)])
    counts = torch.stack([(firsts == value).float().mean(0) for value in range(4)])
    assert (counts - 0.25).abs().max() < 0.05  # five standard deviations
