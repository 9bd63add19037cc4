import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import axontrain as ax
from axontrain.data import ArrayDataset

images, labels = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.fixture(autouse=True)
def _warn_always():
    # torch tells of an array that cannot be written to once in a process: each test is to hear of it.
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


def same(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return type(other) is tuple and len(one) == len(other) and all(map(same, one, other))
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("arrays", "sample"),
    [
        ((images,), images[2]),
        ((images, labels), (images[2], labels[2])),
        ((images.numpy(), labels.numpy()), (images[2], labels[2])),
        ((images.tolist(), labels.tolist()), (images[2], labels[2])),
        (({"x": images, "y": labels.numpy()},), {"x": images[2], "y": labels[2]}),
        (({"x": images},), {"x": images[2]}),
        ((range(6),), torch.tensor(2)),
    ],
    ids=["one", "two", "numpy", "lists", "mapping", "mapping of one", "range"],
)
def test_samples_have_the_structure_of_the_arrays(arrays, sample):
    data = ArrayDataset(*arrays)
    assert len(data) == 6
    assert same(data[2], sample)
    assert same(data.__getitems__([2, 0])[0], sample)
    assert same(data.subset([2])[0], sample)
    first = next(iter(ax.Loader(data, 4)))
    assert same(first, data.gather(torch.arange(4)))


@given(st.lists(st.integers(0, 5), max_size=12))
def test_gathering_equals_indexing(indices):
    for data in (ArrayDataset(images, labels), ArrayDataset({"x": images, "y": labels})):
        batch, samples = data.gather(torch.tensor(indices, dtype=torch.long)), data.__getitems__(indices)
        assert len(samples) == len(indices)
        parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
        for row, index in enumerate(indices):
            values = data[index].values() if isinstance(batch, dict) else data[index]
            assert all(torch.equal(part[row], value) for part, value in zip(parts, values, strict=True))
            assert same(samples[row], data[index])


def test_columns_of_a_data_frame():
    frame = pd.DataFrame({"height": [1.0, 2.0], "count": [1, 2], "grown": [True, False], "name": ["a", "b"]})
    data = ArrayDataset(frame[["height", "count"]], frame["grown"])
    assert same(data[1], (torch.tensor([2.0, 2.0], dtype=torch.float64), torch.tensor(False)))
    by_name = ArrayDataset({name: frame[name] for name in ("height", "count")})
    assert same(by_name[0], {"height": torch.tensor(1.0, dtype=torch.float64), "count": torch.tensor(1)})
    with pytest.raises(ax.DataError, match=r"array 'name' is .*, which is not numeric"):
        ArrayDataset({"name": frame["name"]})


def test_numpy_arrays_that_cannot_be_written_to_are_taken_without_a_warning():
    array = np.arange(6.0)
    array.flags.writeable = False
    assert ArrayDataset(array)[3] == 3


def test_numpy_arrays_that_run_backwards_are_taken():
    assert ArrayDataset(np.arange(6.0)[::-1])[0] == 5


def test_what_cannot_be_written_to_is_left_alone():
    array = np.arange(6.0)
    array.flags.writeable = False
    ArrayDataset(array).tensors[0].fill_(-1)
    assert array.tolist() == [0, 1, 2, 3, 4, 5]


def test_no_samples_are_a_list_or_a_dataset_of_none():
    for data in (ArrayDataset(images, labels), ArrayDataset({"x": images})):
        assert data.__getitems__([]) == []
        assert len(data.subset([])) == 0
        assert data.subset([]).tensors[0].shape == (0, 2)


def test_a_mask_is_no_list_of_indices():
    with pytest.raises(RuntimeError, match="int64"):
        ArrayDataset(images).subset([True, False, True, False, False, False])


def test_a_file_is_mapped_and_not_read(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(6.0))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="c")
    assert ArrayDataset(mapped).tensors[0].data_ptr() == mapped.ctypes.data


def test_memory_is_shared_and_not_copied():
    array = np.zeros(6)
    assert ArrayDataset(array).tensors[0].data_ptr() == array.ctypes.data
    assert ArrayDataset(images).tensors[0].data_ptr() == images.data_ptr()


def test_gradients_do_not_come_along():
    weights = torch.ones(3, requires_grad=True)
    assert not ArrayDataset(weights).tensors[0].requires_grad


def batches_of(data, way):
    if way == "loader":
        return ax.Loader(data, 2)
    if way == "shuffled":
        return ax.Loader(data, 2, shuffle=True)
    if way == "transformed":
        return ax.Loader(data, 2, transform=lambda batch: batch)
    if way == "collated":
        return ax.Loader(data, 1, collate=lambda samples: samples[0])
    if way == "torch":
        return DataLoader(data, 2)
    if way == "torch, one at a time":
        return DataLoader(data, batch_size=None)
    return [data.gather(torch.arange(4)), data.subset(range(3)).tensors, *data.__getitems__([0, 1])]


@pytest.mark.parametrize("way", ["loader", "shuffled", "transformed", "collated", "torch", "torch, one at a time", "by hand"])
def test_changing_a_batch_never_changes_the_data(way):
    array, tensor = np.arange(6.0), torch.arange(6)
    for batch in batches_of(ArrayDataset(array, tensor), way):
        for part in batch:
            part.fill_(-1)
    assert array.tolist() == tensor.tolist() == [0, 1, 2, 3, 4, 5]


def test_batches_share_no_memory_that_is_written_to():
    batches = list(ax.Loader(ArrayDataset(torch.arange(6)), 2))
    batches[0].fill_(-1)
    assert [batch.tolist() for batch in batches] == [[-1, -1], [2, 3], [4, 5]]


def test_changing_the_data_after_a_batch_does_not_change_the_batch():
    tensor = torch.arange(6)
    batches = iter(ax.Loader(ArrayDataset(tensor), 2))
    first = next(batches)
    tensor.fill_(-1)
    assert first.tolist() == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_loader_takes_it(workers):
    context = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(ArrayDataset(images, labels), 4, num_workers=workers, **context)
    taken = [tuple(batch) for batch in loader]
    assert same(taken[0], (images[:4], labels[:4]))
    assert same(taken[1], (images[4:], labels[4:]))


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ((), r"ArrayDataset\(\) needs an array"),
        (({},), "needs an array"),
        ((images, labels[:5]), r"differ in length: \{0: 6, 1: 5\}"),
        (({"x": images, "y": labels[:5]},), r"differ in length: \{'x': 6, 'y': 5\}"),
        ((torch.tensor(3.0),), "array 0 is a single number"),
        ((3,), "array 0 is a single number"),
        ((["a", "b"],), "array 0 is list of 2.*not numeric"),
        (([[1], [2, 3]],), "not numeric"),
        ((np.array(["a", "b"]),), "not numeric"),
        ((np.array([{}, {}]),), "not numeric"),
        ((np.array([1, None]),), "array 0 is ndarray.*object, which is not numeric"),
        ((np.array(["2020-01-01"], dtype="datetime64[D]"),), "not numeric"),
        (({"tokens": np.arange(3, dtype=np.uint16)},), "'tokens' is of uint16, .* make it int32 or int64"),
        ((pd.DataFrame({"x": [1.0], "y": ["a"]}),), "array 0 is DataFrame, which is not numeric"),
        ((None,), "array 0 is NoneType, which is not numeric"),
    ],
)
def test_what_is_no_array_is_named(arrays, told):
    with pytest.raises(ax.DataError, match=told):
        ArrayDataset(*arrays)


def test_the_repr_tells_shapes_and_dtypes():
    assert repr(ArrayDataset(images, labels)) == "ArrayDataset(6 samples, 0: Tensor(6, 2) float32, 1: Tensor(6,) int64)"
    assert repr(ArrayDataset({"x": images})) == "ArrayDataset(6 samples, x: Tensor(6, 2) float32)"


def test_an_empty_dataset_has_no_batches():
    data = ArrayDataset(torch.empty(0, 3))
    assert len(data) == 0
    assert list(ax.Loader(data, 2)) == []


def test_a_row_is_as_large_as_its_parts():
    assert ArrayDataset(images, labels).bytes_per_sample() == 2 * 4 + 8


def test_moving_it_keeps_names_and_rows():
    moved = ArrayDataset({"x": images}).to("cpu")
    assert same(moved[1], {"x": images[1]})
