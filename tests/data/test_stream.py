import collections
import contextlib

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import axontrain as ax
from axontrain.data.stream import Stream
from axontrain.data.structure import signature, to_device


def listed(stream, epoch=0, start=0, seed=0):
    return [batch.tolist() for batch in stream.batches(seed, epoch, start)]


class Squares:
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.tensor(index**2)


class Anew:
    """An iterable that starts anew, of no known length."""

    def __iter__(self):
        return iter([torch.tensor([1]), torch.tensor([2]), torch.tensor([3])])


def test_a_dataset_is_cut_into_batches():
    stream = Stream(Squares(), "train", batch_size=2)
    assert listed(stream) == [[0, 1], [4, 9], [16]]
    assert stream.length == 3
    assert not stream.brings_batches
    shuffled = Stream(Squares(), "train", batch_size=2, shuffle=True)
    assert [value for batch in listed(shuffled, seed=3, epoch=1) for value in batch] == [
        index**2 for index in ax.order(3, 1, 5).tolist()
    ]


@pytest.mark.parametrize("data", [torch.arange(5), np.arange(5)], ids=["tensor", "array"])
def test_a_tensor_or_an_array_is_rows(data):
    assert listed(Stream(data, "data", batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_a_loader_says_for_itself():
    loader = ax.Loader(Squares(), 3)
    stream = Stream(loader, "train", batch_size=2, shuffle=True)
    assert listed(stream) == [[0, 1, 4], [9, 16]]
    assert stream.brings_batches


def test_a_list_is_a_stream_of_batches():
    batches = [torch.tensor([1, 2]), torch.tensor([3])]
    stream = Stream(batches, "train")
    assert [batch is own for batch, own in zip(stream.batches(0, 0), batches, strict=True)] == [True, True]
    assert stream.length == 2
    assert stream.brings_batches
    assert listed(stream, start=1) == [[3]]


def test_torchs_loader_is_a_stream_of_batches():
    stream = Stream(DataLoader(TensorDataset(torch.arange(5)), 2), "train")
    assert stream.length == 3
    assert [batch[0].tolist() for batch in stream.batches(0, 0)] == [[0, 1], [2, 3], [4]]


def test_an_iterable_starts_anew_each_epoch():
    stream = Stream(Anew(), "train")
    assert stream.length is None
    assert listed(stream) == listed(stream, epoch=1) == [[1], [2], [3]]
    with pytest.warns(ax.AxonWarning, match="the 2 before it were read once more and thrown away"):
        assert listed(stream, epoch=2, start=2) == [[3]]
    assert listed(stream, epoch=3, start=2) == [[3]]  # said once


def test_a_function_that_returns_an_iterator_starts_anew_and_may_want_the_epoch():
    def batches(epoch):
        yield from (torch.tensor([epoch, index]) for index in range(2))

    stream = Stream(batches, "train")
    assert stream.length is None
    assert listed(stream) == [[0, 0], [0, 1]]
    assert listed(stream, epoch=4) == [[4, 0], [4, 1]]
    assert listed(Stream(lambda: iter([torch.ones(1)]), "train"), epoch=4) == [[1.0]]
    assert listed(Stream(Anew().__iter__, "train"), epoch=4) == [[1], [2], [3]]


def test_an_iterator_stands_where_it_was_left():
    stream = Stream(iter([torch.tensor([1]), torch.tensor([2]), torch.tensor([3])]), "train")
    first = stream.batches(0, 0)
    assert next(first).tolist() == [1]
    assert listed(stream, start=1) == [[2], [3]]


def test_an_iterable_is_never_read_ahead():
    read = []

    def policy():
        for index in range(3):
            read.append(index)
            yield torch.tensor([index])

    batches = Stream(policy(), "train").batches(0, 0)
    for expected in ([0], [0, 1], [0, 1, 2]):
        next(batches)
        assert read == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_a_limit_ends_each_pass(limit):
    for data in (Squares(), Anew(), [torch.tensor([1])] * 3):
        stream = Stream(data, "train", batch_size=2, limit=limit)
        assert len(listed(stream)) == len(listed(stream, epoch=1)) == min(limit, 3)
        read_again = isinstance(data, Anew) and limit > 1
        with pytest.warns(ax.AxonWarning, match="thrown away") if read_again else contextlib.nullcontext():
            assert len(listed(stream, start=1)) == min(limit, 3) - 1
        assert stream.length in (min(limit, 3), None)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_a_limit_is_a_whole_number(limit):
    with pytest.raises(ax.ConfigurationError, match=r"limit=.*: a whole number of batches, 1 or more"):
        Stream(Squares(), "train", limit=limit)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ((torch.zeros(4, 3), torch.zeros(4)), r"train is tuple of 2: .* wrapped as ax\.ArrayDataset\(\*arrays\)"),
        ((np.zeros((4, 3)), np.zeros(4)), "a tuple of arrays is wrapped as"),
        ({"x": torch.zeros(4)}, r"train is dict of .*ax\.ArrayDataset\(mapping\)"),
        ("path/to/data", "train is str"),
        (None, "train is NoneType"),
        (3, "train is int.*it has no __len__"),
        (object(), "train is object"),
    ],
)
def test_what_is_no_data_says_what_to_pass(data, told):
    with pytest.raises(ax.DataError, match=told):
        Stream(data, "train")


image, number = torch.zeros(3), torch.tensor(1)


@pytest.mark.parametrize(
    "sample",
    [
        (image, 1),
        [image, 1],
        (image, number),
        (image, np.int64(1)),
        (image.numpy(), 0.5),
        ("text", True),
        (0.5, 1.0),
        {"x": image, "y": 1},
        {"x": image, "y": number},
        ({"x": image, "n": number}, image),
    ],
    ids=repr,
)
def test_a_list_of_samples_is_not_taken_for_batches(sample):
    told = r"train looks like a {} of samples.*wrap it, ax\.Loader\(train, batch_size\)"
    for samples in ([sample] * 3, (sample,) * 3):
        with pytest.raises(ax.DataError, match=told.format(type(samples).__name__)):
            Stream(samples, "train")
        assert len(list(Stream(samples, "train", strict=False).batches(0, 0))) == 3  # if it is meant
        assert len(list(Stream(ax.Loader(samples, 2), "train").batches(0, 0))) == 2


@pytest.mark.parametrize(
    "batch",
    [
        (image, image),
        (image, [0, 1, 2]),
        (torch.zeros(2, 3), [0, 1]),
        (image, ["a", "b", "c"]),
        {"x": image, "names": ["a", "b", "c"]},
        image,
        number,
        [0.5, 1.0],
        (image, image, 3),
    ],
    ids=repr,
)
def test_what_may_be_a_batch_is_one(batch):
    assert len(list(Stream([batch], "train").batches(0, 0))) == 1


def test_a_data_frame_is_not_taken_for_samples():
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [0, 1]})
    with pytest.raises(ax.DataError, match=r"train is a DataFrame: pass its columns, as ax\.ArrayDataset\(\{"):
        Stream(frame, "train")
    with pytest.raises(ax.DataError, match=r"dataset is a DataFrame: .*df\[\['a', 'b'\]\]\.to_numpy\(\), df\['y'\]"):
        ax.Loader(frame, 2)


# --- structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2)),
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(())),
        ((torch.zeros(4), torch.zeros(4)), (torch.zeros(4),)),
        ({"x": torch.zeros(4)}, {"z": torch.zeros(4)}),
        ({"x": torch.zeros(4)}, torch.zeros(4)),
        (np.zeros((4, 3)), np.zeros((4, 2))),
    ],
    ids=str,
)
def test_a_batch_unlike_the_first_is_an_error_unless_it_is_meant(first, second):
    with pytest.raises(ax.BatchMismatchError, match=r"train: batch 1 of epoch 2 differs .*strict=False"):
        list(Stream([first, second], "train").batches(0, 2))
    assert len(list(Stream([first, second], "train", strict=False).batches(0, 2))) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(4, 3), torch.zeros(1, 3)),
        ((torch.zeros(4), [torch.zeros(4, 2)]), (torch.zeros(2), [torch.zeros(2, 2)])),
        ({"x": torch.zeros(4), "y": torch.zeros(4)}, {"y": torch.zeros(3), "x": torch.zeros(3)}),
        ((torch.zeros(4), ["a", "b"]), (torch.zeros(4), ["a", "b", "c"])),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
    ],
    ids=str,
)
def test_batches_may_differ_in_size_and_in_the_order_of_names(first, second):
    assert len(list(Stream([first, second], "train").batches(0, 0))) == 2


def test_the_first_batch_of_all_epochs_is_the_measure():
    stream = Stream([torch.zeros(4, 3)], "train")
    list(stream.batches(0, 0))
    stream.data[0] = torch.zeros(4, 2)
    with pytest.raises(ax.BatchMismatchError, match=r"batch 0 of epoch 1.*expected batch: \(\*, 3\), got batch: \(\*, 2\)"):
        list(stream.batches(0, 1))


def test_a_loader_may_be_less_strict_than_the_loop_and_more():
    ragged = [torch.zeros(3), torch.zeros(2)]
    assert len(list(Stream(ax.Loader(ragged, 1, strict=False), "train").batches(0, 0))) == 2
    with pytest.raises(ax.BatchMismatchError):
        list(Stream(ax.Loader(ragged, 1, strict=True), "train", strict=False).batches(0, 0))


def test_signatures_leave_the_size_out():
    assert signature({"a": [torch.zeros(4, 3)], "b": 3}) == ["['a'][0]: (*, 3)", "['b']: int"]


# --- nothing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "train gave no batch"),
        (ax.ArrayDataset(torch.empty(0, 2)), "train gave no batch: 0 samples, batch_size=32"),
        (ax.Loader(ax.ArrayDataset(torch.ones(3)), 4, drop_last=True), "3 samples, batch_size=4, drop_last=True"),
        (iter([]), "it is an iterator, which can be read once"),
    ],
)
def test_training_on_nothing_is_an_error_that_says_why(data, told):
    objective = ax.Supervised(torch.nn.Linear(1, 1), "mse")
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.raises(ax.EmptyDataError, match=told):
        loop.fit(data, epochs=1)
    assert loop.state.step == 0


def test_an_iterator_that_is_used_up_is_an_error_in_the_second_epoch():
    objective = ax.Supervised(torch.nn.Linear(1, 1), "mse")
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), progress=False)
    batches = iter([(torch.ones(2, 1), torch.ones(2, 1))])
    with pytest.raises(ax.EmptyDataError, match="read once"):
        loop.fit(batches, epochs=2)


# --- devices ---------------------------------------------------------------------------------------------------------


def test_every_tensor_of_a_batch_is_moved_whatever_its_structure():
    Pair = collections.namedtuple("Pair", "x y")
    batch = {"a": (torch.ones(1), [torch.ones(2)]), "b": Pair(torch.ones(3), "text"), "c": 4}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert isinstance(moved["a"], tuple)
    assert isinstance(moved["b"], Pair)
    assert moved["b"].x.is_meta
    assert (moved["b"].y, moved["c"]) == ("text", 4)
    assert all(batch.is_meta for batch in Stream(Squares(), "train", device=torch.device("meta")).batches(0, 0))
