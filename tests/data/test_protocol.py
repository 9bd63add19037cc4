import pytest
import torch
from torch.utils.data import TensorDataset

import axontrain as ax
from axontrain.data.protocol import checked, is_dataset


class Squares:
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index**2


class NoLength:
    def __getitem__(self, index):
        return index


class NoItems:
    def __len__(self):
        return 5


@pytest.mark.parametrize("data", [Squares(), [1, 2], (1, 2), range(3), TensorDataset(torch.ones(3)), torch.ones(3)])
def test_whatever_has_a_length_and_items_is_a_dataset(data):
    assert isinstance(data, ax.Dataset)
    assert is_dataset(data)
    assert checked(data) is data


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (NoLength(), "data is NoLength, which is no dataset: it has no __len__$"),
        (NoItems(), "data is NoItems, which is no dataset: it has no __getitem__$"),
        (3, "data is int, which is no dataset: it has no __len__ and no __getitem__"),
        (None, "NoneType"),
        (iter([1]), "it has no __len__ and no __getitem__"),
        (Squares, "data is type, which is no dataset"),
        ("text", "text has to be made into tensors first"),
        (b"text", "text has to be made into tensors first"),
    ],
)
def test_what_is_no_dataset_says_what_it_lacks(data, told):
    with pytest.raises(ax.DataError, match=told):
        checked(data, "data")


def test_a_loader_checks_its_dataset():
    with pytest.raises(ax.DataError, match=r"NoLength.*no __len__"):
        ax.Loader(NoLength(), 2)
