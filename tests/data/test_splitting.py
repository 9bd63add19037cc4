"""Parts of a dataset: disjoint, seeded, stratified, and with groups kept whole."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import axontrain as ax
from axontrain.data import Subset, split


def numbers(part):
    return [part[index] for index in range(len(part))]


@given(st.integers(4, 300), st.integers(0, 2**62), st.sampled_from([(0.5, 0.5), (0.8, 0.2), (0.7, 0.2, 0.1), (0.3, 0.3)]))
@settings(deadline=None)
def test_parts_are_disjoint_and_as_large_as_their_shares(n, seed, shares):
    parts = [numbers(part) for part in split(range(n), *shares, seed=seed)] if n * min(shares) >= 1 else []
    assert all(abs(len(part) - n * share) <= 1 for part, share in zip(parts, shares, strict=False))
    together = [number for part in parts for number in part]
    assert len(together) == len(set(together))
    if sum(shares) == 1 and parts:
        assert sorted(together) == list(range(n))
    assert parts == ([numbers(part) for part in split(range(n), *shares, seed=seed)] if parts else [])
    assert all(part == sorted(part) for part in parts)


def test_another_seed_gives_other_parts():
    assert numbers(split(range(100), 0.5, 0.5)[0]) != numbers(split(range(100), 0.5, 0.5, seed=1)[0])


def test_shares_may_be_numbers_of_samples():
    train, test = split(range(10), 7, 2)
    assert (len(train), len(test)) == (7, 2)
    assert numbers(split(range(3), 1.0)[0]) == [0, 1, 2]


@given(st.lists(st.integers(0, 3), min_size=10, max_size=200), st.integers(0, 99))
@settings(deadline=None)
def test_each_part_has_the_mixture_of_the_whole(labels, seed):
    train, test = split(range(len(labels)), 0.6, 0.4, stratify=labels, seed=seed)
    for part, share in ((train, 0.6), (test, 0.4)):
        of_part = [labels[index] for index in numbers(part)]
        assert abs(len(of_part) - share * len(labels)) <= 1
        for label in set(labels):
            assert abs(of_part.count(label) - share * labels.count(label)) < 2


@pytest.mark.parametrize("kind", [list, np.array, pd.Series, torch.tensor, lambda of: [str(one) for one in of]])
def test_labels_may_be_of_any_kind(kind):
    labels = [0, 1] * 10
    train, test = split(range(20), 0.5, 0.5, stratify=kind(labels))
    assert sum(labels[index] for index in numbers(train)) == sum(labels[index] for index in numbers(test)) == 5


@given(st.lists(st.integers(0, 12), min_size=30, max_size=200), st.integers(0, 99))
@settings(deadline=None)
def test_groups_stay_whole(groups, seed):
    if len(set(groups)) < 4 or max(map(groups.count, groups)) > 0.5 * len(groups):
        return
    parts = split(range(len(groups)), 0.5, 0.5, groups=groups, seed=seed)
    of_parts = [{groups[index] for index in numbers(part)} for part in parts]
    assert of_parts[0].isdisjoint(of_parts[1])
    assert of_parts[0] | of_parts[1] == set(groups)
    largest = max(map(groups.count, groups))
    assert abs(len(parts[0]) - len(groups) / 2) <= largest


def test_groups_and_labels_together():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(100, (2000,), generator=generator)
    labels = (groups % 4 == 0).long()  # a quarter of the groups are ill
    train, rest = split(range(2000), 0.7, 0.2, groups=groups, stratify=labels)
    for part, share in ((train, 0.7), (rest, 0.2)):
        of_part = torch.tensor(numbers(part))
        assert abs(len(of_part) / 2000 - share) < 0.03
        assert abs(float(labels[of_part].float().mean()) - float(labels.float().mean())) < 0.03
    assert set(groups[numbers(train)].tolist()).isdisjoint(groups[numbers(rest)].tolist())


def test_parts_of_arrays_are_arrays_and_go_by_name():
    data = ax.ArrayDataset({"x": torch.arange(10.0), "y": torch.tensor([0] * 8 + [1] * 2)})
    train, test = split(data, 0.5, 0.5, stratify="y")
    assert isinstance(train, ax.ArrayDataset)
    assert int(train.tensors[1].sum()) == int(test.tensors[1].sum()) == 1
    pairs = ax.ArrayDataset(torch.arange(10.0), torch.tensor([0] * 8 + [1] * 2))
    assert int(split(pairs, 0.5, 0.5, stratify=1)[0].tensors[1].sum()) == 1
    with pytest.raises(ax.AxonError, match=r"did you mean 'y'"):
        split(data, 0.5, 0.5, stratify="yy")


def test_labels_may_be_a_column_of_the_frame_or_an_array_by_its_place():
    frame = pd.DataFrame({"a": range(20), "b": ["x", "y"] * 10, "c": [0, 1] * 10})
    for inputs in (["a", "b"], {"n": ["a"], "b": "b"}, "b"):
        data = ax.ArrayDataset.from_frame(frame, inputs, "c")
        for name in ("b", "c"):
            train, _ = split(data, 0.5, 0.5, stratify=name)
            assert int(train.tensors[-1].sum()) == 5
            assert train.columns is data.columns
        with pytest.raises(ax.AxonError, match="unknown column 'd'"):
            split(data, 0.5, 0.5, stratify="d")
    nested = ax.ArrayDataset({"a": torch.zeros(8, 2), "b": torch.zeros(8)}, torch.tensor([0, 1] * 4))
    assert int(split(nested, 0.5, 0.5, stratify=1)[0].tensors[-1].sum()) == 2
    for place, told in ((0, "stratify=0 is dict of"), (2, "unknown array in stratify: 2"), ("a", "unknown array")):
        with pytest.raises(ax.AxonError, match=told):
            split(nested, 0.5, 0.5, stratify=place)
    with pytest.raises(ax.AxonError, match="unknown array"):  # a single array has no names
        split(ax.ArrayDataset(torch.zeros(4, 4)), 0.5, 0.5, stratify=0)


def test_parts_are_as_fast_as_the_whole():
    class Many:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return index

        def __getitems__(self, indices):
            return [index * 10 for index in indices]

    part = split(Many(), 0.5, 0.5)[0]
    assert part.__getitems__([0, 4]) == [part.indices[0] * 10, part.indices[4] * 10]
    assert next(iter(ax.Loader(part, 5))).tolist() == (part.indices * 10).tolist()
    assert not hasattr(split([1, 2, 3, 4], 0.5, 0.5)[0], "__getitems__")
    assert repr(part) == "Subset(5 of Many)"
    with pytest.raises(IndexError, match="index 5 of a part of 5 samples"):
        part[5]
    assert Subset("abc", [2])[0] == "c"
    assert len(list(ax.Loader(part, 2, workers=1))) == 3


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((), {}, "shares of the parts, each above 0"),
        ((0.5, 0), {}, "each above 0"),
        ((0.5, -0.1), {}, "each above 0"),
        ((0.9, 0.2), {}, "more than the whole, 1"),
        ((8, 3), {}, "more than 10 samples"),
        ((0.99, 0.01), {}, "part 1 of 10 samples, with a share of 0.01, would be empty"),
        ((0.5, 0.5), {"stratify": [0, 1]}, "stratify has 2 values and the dataset 10 samples"),
        ((0.5, 0.5), {"groups": "x"}, "only an ArrayDataset's arrays go by a name"),
        ((0.5, 0.5), {"groups": [1] * 10}, "would be empty"),
        ((0.5, 0.5), {"stratify": torch.zeros(10, 2)}, r"stratify are Tensor\(10, 2\) float32: one label for each"),
    ],
)
def test_what_cannot_be_split_says_why(arguments, options, told):
    with pytest.raises(ax.AxonError, match=told):
        split(range(10), *arguments, **options)
