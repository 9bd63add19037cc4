"""Orders other than the shuffled one: all are pure functions of (seed, epoch), and all go on at any batch."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

import axontrain as ax
from axontrain.data import BalancedSampler, BucketSampler, WeightedSampler

SIZE = 50
lengths = torch.randint(1, 30, (SIZE,), generator=torch.Generator().manual_seed(0))
labels = ["cat", "dog", "owl"] * 5 + ["cat"] * 35


class Listing:
    """The samples are their indices; those that were read are listed."""

    def __init__(self, size=SIZE):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return index


class Odd(Sampler):
    """A user's own: draws from torch's, NumPy's and Python's generators, and has no length."""

    def __iter__(self):
        order = torch.randperm(SIZE).tolist()
        for index in order:
            if random.random() < 0.9 or np.random.rand() < 0.1:
                yield index


class Pairs(Sampler):
    """A user's own batches, of sizes that differ."""

    def __iter__(self):
        order = torch.randperm(SIZE).tolist()
        while order:
            size = random.randint(1, 4)
            yield order[:size]
            order = order[size:]


def loaders(dataset):
    generator = torch.Generator().manual_seed(5)
    return {
        "sequential": ax.Loader(dataset, 4),
        "shuffled": ax.Loader(dataset, 4, shuffle=True),
        "drop_last": ax.Loader(dataset, 4, shuffle=True, drop_last=True),
        "weighted": ax.Loader(dataset, 4, sampler=WeightedSampler(lengths)),
        "without replacement": ax.Loader(dataset, 4, sampler=WeightedSampler(lengths, 30, replacement=False)),
        "balanced": ax.Loader(dataset, 4, sampler=BalancedSampler(labels)),
        "bucketed": ax.Loader(dataset, 4, sampler=BucketSampler(lengths, window=3)),
        "bucketed, dropping": ax.Loader(dataset, 4, sampler=BucketSampler(lengths, window=3), drop_last=True),
        "by length": ax.Loader(dataset, 4, sampler=BucketSampler(lengths, shuffle=False)),
        "torch's": ax.Loader(dataset, 4, sampler=RandomSampler(range(SIZE))),
        "torch's, seeded": ax.Loader(dataset, 4, sampler=RandomSampler(range(SIZE), generator=generator)),
        "torch's, weighted": ax.Loader(dataset, 4, sampler=WeightedRandomSampler(lengths.tolist(), 30)),
        "torch's, subset": ax.Loader(dataset, 4, sampler=SubsetRandomSampler(range(0, SIZE, 2)), drop_last=True),
        "a user's": ax.Loader(dataset, 4, sampler=Odd()),
        "a list": ax.Loader(dataset, 4, sampler=list(range(SIZE - 1, -1, -3))),
        "torch's batches": ax.Loader(dataset, batch_sampler=BatchSampler(RandomSampler(range(SIZE)), 5, drop_last=False)),
        "torch's batches as sampler": ax.Loader(dataset, 5, sampler=BatchSampler(SequentialSampler(range(SIZE)), 5, True)),
        "a user's batches": ax.Loader(dataset, batch_sampler=Pairs()),
    }


@pytest.mark.parametrize("name", loaders(Listing()))
def test_every_order_goes_on_at_any_batch_and_reads_nothing_before_it(name):
    dataset = Listing()
    loader = loaders(dataset)[name]
    whole = [batch.tolist() for batch in loader.batches(3, 2)]
    for start in (0, 1, 5, len(whole) - 1, len(whole)):
        torch.rand(7)  # what others draw changes nothing
        dataset.read = []
        assert [batch.tolist() for batch in loader.batches(3, 2, start)] == whole[start:]
        assert dataset.read == [index for batch in whole[start:] for index in batch]
    assert [batch.tolist() for batch in loader.batches(3, 2, 1, 3)] == whole[1:3]


@pytest.mark.parametrize("name", loaders(Listing()))
def test_every_order_is_another_in_another_epoch_unless_it_is_fixed(name):
    loader = loaders(Listing())[name]
    orders = [[batch.tolist() for batch in loader.batches(seed, epoch)] for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    fixed = name in ("sequential", "a list", "by length", "torch's batches as sampler")
    assert (orders[0] == orders[1] == orders[2]) is fixed
    assert fixed or orders[1] != orders[2]


@pytest.mark.parametrize("name", loaders(Listing()))
def test_every_order_is_the_same_in_workers_and_on_ranks(name):
    loader = loaders(Listing())[name]
    whole = [batch.tolist() for batch in loader.batches(3, 1)]
    shares = [[batch.tolist() for batch in loader.batches(3, 1, share=(rank, 3))] for rank in range(3)]
    assert [[*one, *two, *three] for one, two, three in zip(*shares, strict=True)] == whole
    loader.workers = 2
    assert [batch.tolist() for batch in loader.batches(3, 1)] == whole
    loader.close()


@pytest.mark.parametrize("name", loaders(Listing()))
def test_the_length_is_that_of_a_pass(name):
    loader = loaders(Listing())[name]
    count = sum(1 for _ in loader.batches(0, 0))
    if name in ("a user's", "a user's batches"):
        with pytest.raises(TypeError):
            len(loader)
    else:
        assert len(loader) == count


def test_generators_are_left_as_they_were():
    generator = torch.Generator().manual_seed(5)
    loader = ax.Loader(Listing(), 4, sampler=RandomSampler(range(SIZE), generator=generator))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), generator.get_state()
    list(loader)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), generator.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def test_a_sampler_is_told_the_epoch():
    told = []

    class Told(SequentialSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    loader = ax.Loader(Listing(), 4, sampler=Told(range(SIZE)))
    for epoch in (0, 1, 5):
        list(loader.batches(0, epoch))
    assert told == [0, 1, 5]


def test_samplers_work_in_a_fit():
    x = torch.randn(SIZE, 3)
    data = ax.ArrayDataset(x, x.sum(1, keepdim=True))
    for sampler in (WeightedSampler(lengths), BalancedSampler(labels), BucketSampler(lengths), RandomSampler(data)):
        loop = ax.Loop(ax.Supervised(torch.nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.1), progress=False)
        assert loop.fit(ax.Loader(data, 8, sampler=sampler), epochs=3).values["train/loss"] < 5
        assert loop.state.step == 3 * 7


# --- weighted --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20).filter(any), st.integers(0, 2**62), st.integers(0, 50))
@settings(deadline=None)
def test_a_weight_of_zero_is_never_drawn(weights, seed, epoch):
    drawn = WeightedSampler(weights, 200).indices(seed, epoch)
    assert all(weights[index] > 0 for index in drawn.tolist())
    apart = WeightedSampler(weights, replacement=False)
    once = apart.indices(seed, epoch).tolist()
    assert sorted(once) == [index for index, weight in enumerate(weights) if weight > 0]


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_are_in_proportion_to_the_weights(replacement):
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    if replacement:
        counts = WeightedSampler(weights, 100_000).indices(0, 0).bincount().double()
    else:  # the first of each epoch
        sampler = WeightedSampler(weights, 1, replacement=False)
        counts = torch.cat([sampler.indices(0, epoch) for epoch in range(10_000)]).bincount().double()
    shares = counts / counts.sum()
    assert (shares - weights / 10).abs().max() < 0.02


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: WeightedSampler([1.0, -1.0]), "finite, 0 or more"),
        (lambda: WeightedSampler([1.0, float("nan")]), "finite, 0 or more"),
        (lambda: WeightedSampler([[1.0]]), "one for each sample"),
        (lambda: WeightedSampler([0.0, 0.0]), "no weight is above 0"),
        (lambda: WeightedSampler([0.0, 1.0], 2, replacement=False), "only 1 samples have a weight above 0"),
        (lambda: WeightedSampler([1.0], 0), "size=0"),
        (lambda: BucketSampler([1.5, 2.0]), "one whole number for each sample"),
        (lambda: BucketSampler([1, 2], window=0), "window=0"),
    ],
)
def test_what_is_no_weight_and_no_length_says_so(make, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        make()


# --- balanced --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of",
    [labels, np.array(labels), pd.Series(labels), torch.tensor([{"cat": 0, "dog": 1, "owl": 2}[one] for one in labels])],
    ids=["list", "numpy", "pandas", "tensor"],
)
def test_each_class_comes_as_often(of):
    drawn = BalancedSampler(of, 90).indices(0, 0).tolist()
    counts = {name: sum(labels[index] == name for index in drawn) for name in ("cat", "dog", "owl")}
    assert counts == {"cat": 30, "dog": 30, "owl": 30}
    of_cats = [index for index in drawn if labels[index] == "cat"]
    assert len(set(of_cats)) == 30, "none comes again while others have not come"
    of_dogs = [index for index in drawn if labels[index] == "dog"]
    assert {of_dogs.count(index) for index in of_dogs} == {6}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 2**62))
@settings(deadline=None)
def test_classes_differ_by_one_at_most(of, size, seed):
    drawn = BalancedSampler(of, size).indices(seed, 0).tolist()
    assert len(drawn) == size
    counts = [sum(of[index] == one for index in drawn) for one in set(of)]
    assert max(counts) - min(counts) <= 1


# --- by length -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None)
def test_buckets_hold_every_sample_once(of, batch_size, window, seed):
    batches = BucketSampler(of, window).batches(seed, 0, batch_size)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(of)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1), "only one is smaller"
    dropped = BucketSampler(of, window).batches(seed, 0, batch_size, drop_last=True)
    assert len(dropped) == len(of) // batch_size


def test_a_bucket_pads_little():
    of = torch.randint(1, 500, (5000,), generator=torch.Generator().manual_seed(1))

    def padded(batches):
        return sum(int(of[batch].max()) * len(batch) for batch in batches) / int(of.sum())

    assert padded(BucketSampler(of).batches(0, 0, 16)) < 1.05
    assert padded(ax.order(0, 0, 5000).split(16)) > 1.5
    longest_first = BucketSampler(of, shuffle=False).batches(0, 0, 16)
    assert int(of[longest_first[0]].min()) >= int(of[longest_first[1]].max())


def test_texts_of_differing_lengths_train():
    """The batches of a BucketSampler may differ in their trailing shape, which is otherwise an error."""
    generator = torch.Generator().manual_seed(0)
    texts = [(torch.randint(1, 20, (int(n),), generator=generator), torch.tensor(int(n) % 2)) for n in lengths]

    class Text(ax.Objective):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(20, 8, padding_idx=0), torch.nn.Linear(8, 2)

        def predict(self, tokens):
            return self.out(self.embed(tokens).sum(1))

        def loss(self, logits, labels):
            return torch.nn.functional.cross_entropy(logits, labels)

    loop = ax.Loop(Text(), ax.Optimizer("adam", lr=0.01), progress=False)
    train = ax.Loader(texts, 8, sampler=BucketSampler(lengths, window=2), collate=ax.data.Pad())
    assert loop.fit(train, epochs=2).ok
    with pytest.raises(ax.BatchMismatchError, match="strict=False"):
        loop.fit(ax.Loader(texts, 8, shuffle=True, collate=ax.data.Pad(), strict=True), epochs=1)
    assert loop.fit(ax.Loader(texts, 8, shuffle=True, collate=ax.data.Pad()), epochs=1).ok  # nor do those that are padded


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sampler": WeightedSampler([1.0, 2.0])}, "WeightedSampler was made of 2 values and the dataset has 50 samples"),
        ({"sampler": BucketSampler([1, 2])}, "BucketSampler was made of 2 values"),
        ({"sampler": 3}, "sampler is int: it is an iterable of indices that starts anew"),
        ({"sampler": iter([1])}, "starts anew each epoch"),
        (
            {"batch_sampler": WeightedSampler(lengths)},
            "batch_sampler is WeightedSampler: it is an iterable of lists of indices",
        ),
        ({"sampler": Odd(), "shuffle": True}, "shuffle=True and sampler="),
        ({"sampler": Odd(), "batch_sampler": Pairs()}, "sampler= and batch_sampler="),
        ({"batch_sampler": Pairs(), "drop_last": True}, "drop_last=True and batch_sampler="),
    ],
)
def test_a_sampler_that_does_not_fit_is_an_error_at_once(options, told):
    with pytest.raises(ax.AxonError, match=told):
        ax.Loader(Listing(), 4, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"sampler": [0, 1, 50]},
            r"the sampler \(list\) gave the index 50, and the dataset has 50 samples: indices are 0 to 49",
        ),
        ({"sampler": [-1]}, "gave the index -1"),
        ({"sampler": ["a"]}, "gives indices, whole numbers"),
        ({"sampler": [0.5]}, "gives indices, whole numbers"),
        ({"batch_sampler": [[0, 99]]}, r"the batch_sampler \(list\) gave the index 99"),
        ({"batch_sampler": [[]]}, "gave a batch of 0"),
        ({"batch_sampler": [[0, 1, 2, 3, 4]]}, "gave a batch of 5: 1 or more, and no more than batch_size=4"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_that_is_none_is_an_error_that_names_it(options, told, workers):
    with pytest.raises(ax.DataError, match=told):
        list(ax.Loader(Listing(), 4, workers=workers, **options))


def test_a_dataset_that_changes_its_length_is_an_error_before_the_first_step():
    dataset = Listing()
    loader = ax.Loader(dataset, 4, shuffle=True)
    loop = ax.Loop(
        ax.Supervised(torch.nn.Linear(1, 1), lambda predictions, _: predictions.mean()),
        ax.Optimizer("sgd", lr=0.1),
        progress=False,
    )
    loop.objective.split = lambda batch: (batch.float()[:, None], batch)
    loop.on("after_epoch")(lambda state: setattr(dataset, "size", 40))
    with pytest.raises(ax.DataError, match=r"had 50 samples and now has 40: .*make a new Loader"):
        loop.fit(loader, epochs=3)
    assert loop.state.epoch == 1
    assert loop.state.step == 13
