import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

import axontrain as ax
from axontrain.data import loader as module


class Counting:
    """A dataset that remembers what was read of it."""

    def __init__(self, n):
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor(index)


class Many(Counting):
    def __getitems__(self, indices):
        self.read += indices
        return [torch.tensor(index) for index in indices]


class Gathering(Counting):
    def gather(self, indices):
        self.read += indices.tolist()
        return indices.clone()


class Noisy(Counting):
    """Samples that draw from every global generator, as an augmentation does."""

    def __getitem__(self, index):
        return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])


KINDS = {
    "items": Counting,
    "getitems": Many,
    "gather": Gathering,
    "arrays": lambda n: ax.ArrayDataset(torch.arange(n)),
    "list": lambda n: list(range(n)),
}


def listed(batches):
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(n=st.integers(0, 40), size=st.integers(1, 12), drop=st.booleans(), shuffle=st.booleans(), epoch=st.integers(0, 5))
def test_each_epoch_goes_through_every_sample_once_in_its_order(kind, n, size, drop, shuffle, epoch):
    loader = ax.Loader(KINDS[kind](n), size, drop_last=drop, shuffle=shuffle)
    expected = ax.order(7, epoch, n).tolist() if shuffle else list(range(n))
    cut = [expected[first : first + size] for first in range(0, n, size)]
    if drop and cut and len(cut[-1]) < size:
        cut.pop()
    assert listed(loader.batches(seed=7, epoch=epoch)) == cut
    assert len(loader) == len(cut)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(n=st.integers(1, 40), size=st.integers(1, 12), shuffle=st.booleans(), data=st.data())
def test_going_to_batch_k_gives_the_tail_and_reads_nothing_before_it(kind, n, size, shuffle, data):
    dataset = KINDS[kind](n)
    loader = ax.Loader(dataset, size, shuffle=shuffle)
    k = data.draw(st.integers(0, len(loader) + 1))
    whole = listed(loader.batches(seed=3, epoch=1))
    if isinstance(dataset, Counting):
        dataset.read.clear()
    assert listed(loader.batches(seed=3, epoch=1, start=k)) == whole[k:]
    if isinstance(dataset, Counting):
        assert dataset.read == [index for batch in whole[k:] for index in batch]


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_batches_cut_from_chunks_are_the_same_whatever_the_chunk(rows, monkeypatch):
    data = ax.ArrayDataset(torch.arange(100.0).reshape(50, 2), torch.arange(50))
    whole = [[part.tolist() for part in batch] for batch in ax.Loader(data, 4, shuffle=True).batches(0, 0, 2)]
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * data.bytes_per_sample())
    assert [[part.tolist() for part in batch] for batch in ax.Loader(data, 4, shuffle=True).batches(0, 0, 2)] == whole


def test_nothing_is_read_ahead():
    dataset = Counting(10)
    batches = iter(ax.Loader(dataset, 2))
    assert dataset.read == []
    next(batches)
    assert dataset.read == [0, 1]


# --- randomness ------------------------------------------------------------------------------------------------------


def disturbed(batches):
    """The same batches, while somebody else draws from every generator."""
    for batch in batches:
        yield batch
        torch.manual_seed(1), np.random.seed(1), random.seed(1)


def noise(batch):
    return batch + torch.rand(batch.shape[0], 1) + float(np.random.rand()) + random.random()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ax.Loader(Noisy(20), 3, shuffle=True),
        lambda: ax.Loader(ax.ArrayDataset(torch.zeros(20, 3)), 3, transform=noise),
        lambda: ax.Loader(Counting(20), 3, collate=lambda samples: noise(torch.zeros(len(samples), 3))),
    ],
    ids=["dataset", "transform", "collate"],
)
def test_the_random_state_of_a_batch_is_its_own(make):
    whole = torch.cat(list(make().batches(seed=5, epoch=2)))
    assert len(whole.unique(dim=0)) > 5  # drawn anew in each batch
    for k in (1, 4, 6):
        assert torch.equal(torch.cat(list(make().batches(5, 2, start=k))), whole[3 * k :])
    assert torch.equal(torch.cat(list(disturbed(make().batches(5, 2)))), whole)
    for other in (make().batches(6, 2), make().batches(5, 3)):
        assert not torch.equal(torch.cat(list(other)), whole)


def test_the_callers_generators_are_left_as_they_were():
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    batches = ax.Loader(Noisy(9), 3, shuffle=True, transform=noise).batches(0, 0)
    for _ in batches:
        assert state() == before
    assert state() == before


def test_they_are_put_back_after_an_error_too():
    def fail(batch):
        torch.rand(1)
        raise ValueError("no")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        next(iter(ax.Loader(Counting(9), 3, transform=fail)))
    assert torch.equal(torch.get_rng_state(), before)


# --- in and out of a Loop --------------------------------------------------------------------------------------------


def test_iterated_by_itself_it_counts_its_own_passes():
    loader = ax.Loader(list(range(20)), 6, shuffle=True)
    assert [listed(loader) for _ in range(3)] == [listed(loader.batches(seed=0, epoch=epoch)) for epoch in range(3)]
    assert loader.passes == 3
    own = ax.Loader(list(range(20)), 6, shuffle=True, seed=4)
    assert listed(own) == listed(loader.batches(seed=4, epoch=0))


def orders_of(loader, seed, epochs=2):
    """What a Loop trains on."""
    seen = []

    class Look(ax.Objective):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def predict(self, x):
            return self.scale * x

        def loss(self, predictions, x):
            seen.append(x.tolist())
            return predictions.float().mean()

    ax.Loop(Look(), ax.Optimizer("sgd", lr=0.1), seed=seed, device="cpu", progress=False).fit(loader, epochs=epochs)
    return seen


def test_in_a_loop_seed_and_epoch_are_the_loops_unless_it_has_a_seed():
    samples = list(range(20))
    free, own = ax.Loader(samples, 6, shuffle=True), ax.Loader(samples, 6, shuffle=True, seed=4)
    list(free)  # its own passes do not matter
    for seed in (0, 1):
        assert orders_of(free, seed) == [b for epoch in range(2) for b in listed(free.batches(seed, epoch))]
        assert orders_of(own, seed) == [b for epoch in range(2) for b in listed(own.batches(4, epoch))]
    assert free.passes == 1


# --- collation -------------------------------------------------------------------------------------------------------


def test_a_collate_of_the_users_gets_the_samples():
    loader = ax.Loader([[1], [2, 3], [4, 5, 6]], 2, collate=lambda samples: [value for sample in samples for value in sample])
    assert list(loader) == [[1, 2, 3], [4, 5, 6]]


def test_collate_goes_before_gather_and_after_getitems():
    dataset = Many(5)
    assert list(ax.Loader(dataset, 2, collate=len)) == [2, 2, 1]
    assert list(ax.Loader(Gathering(5), 2, collate=len)) == [2, 2, 1]
    assert list(ax.Loader(ax.ArrayDataset(torch.arange(5)), 2, collate=len)) == [2, 2, 1]


def test_transform_takes_the_collated_batch():
    assert listed(ax.Loader([1, 2, 3], 2, transform=lambda batch: batch * 10)) == [[10, 20], [30]]
    assert listed(ax.Loader(ax.ArrayDataset(torch.arange(3)), 2, transform=lambda batch: batch * 10)) == [[0, 10], [20]]


def test_an_error_in_a_sample_says_which_sample_and_batch():
    class Broken(Counting):
        def __getitem__(self, index):
            return 1 / (index - 7)

    with pytest.raises(ZeroDivisionError) as caught:
        list(ax.Loader(Broken(10), 4).batches(0, 3))
    batch = "in batch 1 of epoch 3, made of the samples [4, 5, 6, 7]"
    assert caught.value.__notes__ == ["in the sample at index 7", batch]


def test_an_error_in_many_samples_or_their_collation_says_which_batch():
    class Broken(Counting):
        def __getitems__(self, indices):
            return [1 / (index - 7) for index in indices]

    batch = "in batch 1 of epoch 0, made of the samples [4, 5, 6, 7]"
    with pytest.raises(ZeroDivisionError) as caught:
        list(ax.Loader(Broken(10), 4).batches(0, 0))
    assert caught.value.__notes__ == [batch]
    with pytest.raises(RuntimeError) as caught:  # samples of two shapes
        list(ax.Loader([torch.zeros(1)] * 7 + [torch.zeros(2)], 4).batches(0, 0))
    hint, where = caught.value.__notes__
    assert "collate=ax.data.Pad()" in hint
    assert where == batch


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2", None])
def test_a_batch_size_is_a_whole_number(size):
    with pytest.raises(ax.ConfigurationError, match=r"batch_size=.*: a whole number, 1 or more"):
        ax.Loader([1], size)


def test_the_repr_is_short():
    assert repr(ax.Loader(list(range(10)), 4, shuffle=True)) == "Loader(3 batches of 4, shuffled)"


# --- torch's own datasets of tensors ---------------------------------------------------------------------------------


def test_torchs_datasets_of_tensors_are_gathered_at_once_and_left_as_they_are():
    x, y = torch.arange(40.0).reshape(20, 2), torch.arange(20)
    whole = TensorDataset(x, y)
    part = Subset(whole, range(19, 4, -1))
    for dataset, rows in ((whole, ax.order(0, 1, 20)), (part, 19 - ax.order(0, 1, 15)), (Subset(part, [3, 1]), None)):
        before = dict(vars(dataset))
        batches = list(ax.Loader(dataset, 6, shuffle=True).batches(0, 1))
        assert vars(dataset) == before
        found = torch.cat([labels for _, labels in batches])
        assert torch.equal(torch.cat([images for images, _ in batches]), x[found])
        assert sorted(found.tolist()) == ([16, 18] if rows is None else sorted(rows.tolist()))
        assert rows is None or torch.equal(found, rows)
        slow = ax.Loader(dataset, 6, shuffle=True, collate=torch.utils.data.default_collate).batches(0, 1)
        assert all(torch.equal(a, b) for one, two in zip(batches, slow, strict=True) for a, b in zip(one, two, strict=True))
    assert ax.Loader(whole, 6).uniform


def test_what_torch_gathers_no_rows_of_goes_one_by_one():
    tracked = torch.ones(6, 2, requires_grad=True)
    (batch,) = next(iter(ax.Loader(TensorDataset(tracked), 4)))
    assert batch.requires_grad
    (batch,) = next(iter(ax.Loader(TensorDataset(torch.ones(6, dtype=torch.uint16)), 4)))
    assert batch.dtype is torch.uint16


# --- arguments of a pass, and what is no dataset ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((0, -1), {}, "epoch=-1"),
        ((0, 0, -1), {}, "start=-1"),
        ((0, 0), {"share": (2, 2)}, r"share=\(2, 2\): \(rank, ranks\), with rank 0 to ranks - 1"),
        ((0, 0), {"share": (-1, 2)}, "share="),
        ((0, 0), {"share": 2}, "share=2"),
        ((0, 0), {"share": (0, 0)}, "share="),
    ],
)
def test_a_pass_that_cannot_be_is_an_error(arguments, options, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        ax.Loader(range(10), 4).batches(*arguments, **options)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (ax.Loader(range(4), 2), "gives batches already: pass it as it is"),
        (torch.utils.data.DataLoader(range(4), 2), "gives batches already"),
        ((torch.zeros(4), np.zeros(4)), r"ax\.ArrayDataset\(\*arrays\)"),
        ({"x": torch.zeros(4)}, r"ax\.ArrayDataset\(mapping\)"),
        ({1, 2}, "it has no order"),
    ],
    ids=["Loader", "DataLoader", "tuple", "mapping", "set"],
)
def test_what_is_no_dataset_of_samples_says_what_to_do(data, told):
    with pytest.raises(ax.DataError, match=told):
        ax.Loader(data, 2)


def test_the_order_of_a_pass_puts_predictions_back():
    lengths = torch.tensor([3, 1, 2, 5, 4])
    loader = ax.Loader(lengths.float()[:, None].tolist(), 2, sampler=ax.data.BucketSampler(lengths, shuffle=False))
    assert loader.order().tolist() == [3, 4, 0, 2, 1]
    shuffled = ax.Loader(ax.ArrayDataset(lengths), 2, shuffle=True)
    predictions = torch.cat(list(shuffled.batches(7, 0)))
    assert torch.equal(predictions[shuffled.order(7).argsort()], lengths)


def test_a_dataset_that_gives_too_few_samples_says_so():
    class Few(Counting):
        def __getitems__(self, indices):
            return [1.0] * (len(indices) - 1)

    with pytest.raises(ax.DataError, match="__getitems__ of Few gave 3 samples for 4 indices"):
        list(ax.Loader(Few(8), 4))


def test_batches_of_one_chunk_are_apart():
    data = ax.ArrayDataset(torch.ones(64, 2))
    batches = iter(ax.Loader(data, 4, shuffle=True))
    weight = torch.ones(2, requires_grad=True)
    first, second = next(batches), next(batches)
    loss = (first @ weight).square().sum()
    second.mul_(2)
    loss.backward()
    assert weight.grad is not None
