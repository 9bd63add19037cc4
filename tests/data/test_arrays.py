import gc
import mmap
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from array_checks import same, warn_always
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import axontrain as ax
from axontrain.data import ArrayDataset, loader

__all__ = ["warn_always"]  # a fixture for every test here

images, labels = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])


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


IMAGES = torch.randn(23, 3, 4, 5, generator=torch.Generator().manual_seed(0))
LAST = {
    "tensor": IMAGES.contiguous(memory_format=torch.channels_last),
    "array": IMAGES.permute(0, 2, 3, 1).contiguous().numpy().transpose(0, 3, 1, 2),
}


@pytest.mark.parametrize("kind", LAST)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("alone", [False, True], ids=["many at once", "each alone"])
def test_batches_of_images_lie_in_memory_as_those_of_the_dataset(kind, batch_size, alone, monkeypatch):
    monkeypatch.setattr(loader, "ALONE_BYTES", 0 if alone else 2**30)
    plain, last = (ax.ArrayDataset(images, torch.arange(23)) for images in (IMAGES, LAST[kind]))
    assert (plain.channels_last, last.channels_last) == (False, True)
    for options in ({}, {"shuffle": True}, {"shuffle": True, "workers": 1}):
        pairs = zip(*(ax.Loader(data, batch_size, seed=0, **options) for data in (plain, last)), strict=True)
        for (images, labels), (others, those) in pairs:
            assert torch.equal(images, others)
            assert torch.equal(labels, those)
            assert images.is_contiguous()
            assert others.is_contiguous(memory_format=torch.channels_last)
            assert not others.is_contiguous()
    places = torch.tensor([3, 22, 0])
    for data in (last, last.subset(range(23)), last.to("cpu")):
        picked, labels = data.gather(places)
        assert torch.equal(picked, IMAGES[places])
        assert picked.stride() == LAST["tensor"][places].contiguous(memory_format=torch.channels_last).stride()
        assert torch.equal(labels, places)
    with pytest.raises(ax.DataError, match="there is no sample 23"):
        last.gather(torch.tensor([0, 23]))


def test_volumes_too_and_nothing_else():
    volumes = torch.randn(5, 2, 3, 4, 3).contiguous(memory_format=torch.channels_last_3d)
    gathered = ax.ArrayDataset(volumes).gather(torch.tensor([4, 1]))
    assert torch.equal(gathered, volumes[[4, 1]])
    assert gathered.is_contiguous(memory_format=torch.channels_last_3d)
    for other in (torch.randn(5, 1, 4, 4), torch.randn(5, 4).t(), torch.randn(6, 4, 4, 5).transpose(2, 3), torch.randn(3)):
        data = ax.ArrayDataset(other)
        assert not data.channels_last
        assert data.gather(torch.tensor([2, 0])).is_contiguous()


def test_moving_it_keeps_names_and_rows():
    moved = ArrayDataset({"x": images}).to("cpu")
    assert same(moved[1], {"x": images[1]})


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Record:
    image: Any
    label: Any


@dataclass(slots=True)
class Checked:
    image: Any

    def __post_init__(self):
        assert self.image.shape == (6, 2)  # of the whole, not of a batch


@pytest.mark.parametrize(
    ("arrays", "sample"),
    [
        (({"x": images, "y": labels}, labels), lambda n: ({"x": images[n], "y": labels[n]}, labels[n])),
        (((images, labels), labels), lambda n: ((images[n], labels[n]), labels[n])),
        (((images, labels),), lambda n: (images[n], labels[n])),
        (((images,),), lambda n: (images[n],)),
        (({"x": (images, {"z": labels}), "y": labels},), lambda n: {"x": (images[n], {"z": labels[n]}), "y": labels[n]}),
        ((images, {"y": labels.tolist()}), lambda n: (images[n], {"y": labels[n]})),
        (({"x": images, 1: labels},), lambda n: {"x": images[n], 1: labels[n]}),
        (({"a.b": images, "a": {"b": labels}},), lambda n: {"a.b": images[n], "a": {"b": labels[n]}}),
    ],
    ids=["mapping", "tuple", "one tuple", "tuple of one", "deep", "list within", "keys of any kind", "like names"],
)
def test_structures_nest(arrays, sample):
    data = ArrayDataset(*arrays)
    assert len(data) == 6
    assert same(data[2], sample(2))
    assert same(data.gather(torch.tensor([4, 1])), sample([4, 1]))
    assert same(data.__getitems__([2, 0])[1], sample(0))
    assert same(data.subset([2])[0], sample(2))
    assert same(data.to("cpu").assemble(data.tensors), sample(slice(None)))
    assert same(pickle.loads(pickle.dumps(data))[2], sample(2))


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_loader_gives_batches_of_the_structure(shuffle):
    data = ArrayDataset({"x": images, "y": labels}, labels)
    for inputs, target in ax.Loader(data, 4, shuffle=shuffle):
        assert list(inputs) == ["x", "y"]
        assert torch.equal(inputs["y"], target)
        assert inputs["x"].shape == (len(target), 2)


def test_named_tuples_and_dataclasses_are_structures_too():
    data = ArrayDataset(Pair(images, {"y": labels}), Record(images, labels), Checked(images))
    pair, record, checked = data.gather(torch.tensor([3, 1]))
    assert [type(part) for part in (pair, record, checked)] == [Pair, Record, Checked]
    assert same(pair.right["y"], labels[[3, 1]])
    assert same(record.image, images[[3, 1]])
    assert same(checked.image, images[[3, 1]])
    assert same(data[2][1].label, labels[2])


@pytest.mark.parametrize(
    ("arrays", "flat", "names"),
    [
        ((images,), False, None),
        ((images, labels), True, None),
        (((images, labels),), True, None),
        (((images,),), False, None),
        (({"x": images, "y": labels},), False, ("x", "y")),
        (({"x": images, "y": (labels,)},), False, None),
        (({"x": images}, labels), False, None),
        ((Pair(images, labels),), False, None),
    ],
)
def test_flat_says_that_there_is_nothing_to_assemble(arrays, flat, names):
    data = ArrayDataset(*arrays)
    assert data.flat is flat
    assert data.names == names
    if flat:
        assert same(data.assemble(data.tensors), data.tensors)


def test_arrays_within_are_named_by_their_place():
    with pytest.raises(ax.DataError, match=r"array '0\.city' is .*not numeric"):
        ArrayDataset({"numbers": images, "city": ["a"] * 6}, labels)
    with pytest.raises(ax.DataError, match=r"differ in length: \{'0\.x': 6, 1: 5\}"):
        ArrayDataset({"x": images}, labels[:5])
    with pytest.raises(ax.DataError, match=r"array 1 is a single number.*list of numbers is an array"):
        ArrayDataset((images, 3))
    assert repr(ArrayDataset({"x": images}, labels)) == (
        "ArrayDataset(6 samples, 0.x: Tensor(6, 2) float32, 1: Tensor(6,) int64)"
    )


@pytest.mark.parametrize("index", [6, 7, -1, -7])
@pytest.mark.parametrize(
    "way",
    [lambda data, at: data.gather(torch.tensor(at)), ArrayDataset.__getitems__, ArrayDataset.subset],
    ids=["gather", "items", "subset"],
)
def test_an_index_out_of_range_is_named(way, index):
    with pytest.raises(ax.DataError, match=rf"no sample {index} \(nor 1 more of the indices\): it has 6") as caught:
        way(ArrayDataset(images, labels), [0, index, 5, 99])
    assert isinstance(caught.value, IndexError)


def test_one_sample_goes_by_the_rules_of_python():
    data = ArrayDataset(images, labels)
    assert same(data[-1], data[5])
    assert same(data[np.int64(2)], data[2])
    assert len(list(data)) == 6
    for index in (6, -7, np.int64(6)):
        with pytest.raises(IndexError, match=rf"no sample {index}: it has 6"):
            data[index]
    with pytest.raises(ax.DataError, match=r"no sample 0 .*it has none"):
        ArrayDataset(images[:0]).gather(torch.tensor([0, 1]))


def mapped_files(path):
    array = np.arange(48.0).reshape(12, 4)
    np.save(path / "rows.npy", array)
    (path / "rows.bin").write_bytes(array.tobytes())
    loaded = np.load(path / "rows.npy", mmap_mode="r")
    raw = np.memmap(path / "rows.bin", dtype="f8", mode="r", shape=(12, 4))
    handle = (path / "rows.bin").open("rb")
    viewed = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), dtype="f8").reshape(12, 4)
    handle.close()
    return [loaded, raw, loaded[2:9], loaded[::2, 1:3], np.asarray(raw)[3:], raw.T, viewed, loaded.view("i8")]


def test_a_mapped_file_that_is_read_only_is_not_copied(tmp_path):
    for mapped in mapped_files(tmp_path):
        data = ArrayDataset(mapped, np.arange(len(mapped)))
        assert data.tensors[0].data_ptr() == mapped.ctypes.data
        picked = torch.tensor([3, 0])
        assert torch.equal(data.gather(picked)[0], torch.from_numpy(np.array(mapped[[3, 0]])))
        batch = data.gather(picked)[0].fill_(-1)
        assert (batch == -1).all()
        assert not (data.gather(picked)[0] == -1).any()


def test_a_mapped_file_stays_open_as_long_as_the_dataset(tmp_path):
    data = ArrayDataset(mapped_files(tmp_path)[0])
    gc.collect()
    assert data[11].tolist() == [44, 45, 46, 47]


def test_a_mapped_file_that_runs_backwards_is_copied(tmp_path):
    mapped = mapped_files(tmp_path)[0]
    assert ArrayDataset(mapped[::-1])[0].tolist() == [44, 45, 46, 47]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("mode", ["r", "c"])
def test_memory_stays_flat_over_a_file_of_400_megabytes(tmp_path, mode):
    rows = 100_000
    path = tmp_path / "rows.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, 1000)).flush()  # sparse: no block is written

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    mapped = np.load(path, mmap_mode=mode)
    before = resident()
    data = ArrayDataset(mapped, np.arange(rows))
    for start in range(0, 2000, 100):
        data.gather(torch.arange(start, start + 64) * 7 % rows)
    assert data.bytes_per_sample() * len(data) > 400e6
    assert resident() - before < 40e6


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([1, None, None]),
        pl.DataFrame({"a": [1.0, None], "b": [None, 2.0]}),
        pd.Series([1, None, None], dtype="Int64"),
        pa.chunked_array([[1, None], [None]]),
    ],
    ids=["polars", "polars frame", "pandas", "arrow"],
)
def test_nulls_are_an_error_and_no_nan(column):
    with pytest.raises(ax.DataError, match=r"has 2 nulls, which would become NaN: fill them, or .*from_frame"):
        ArrayDataset(column)


def test_a_nan_of_pandas_is_a_number_as_any_other():
    assert ArrayDataset(pd.Series([1.0, float("nan")])).tensors[0].isnan().tolist() == [False, True]
    assert ArrayDataset(pd.Series([1, 2], dtype="Int64")).tensors[0].tolist() == [1, 2]


def test_text_in_a_column_points_to_from_frame():
    with pytest.raises(ax.DataError, match="from_frame"):
        ArrayDataset(pd.Series(["a", "b"]))


def test_parts_of_a_mapped_file_are_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(40.0).reshape(20, 2))
    mapped = ArrayDataset(np.load(tmp_path / "x.npy", mmap_mode="r"), torch.arange(20))
    assert mapped.mapped
    assert not mapped.subset([0]).mapped
    train, test = ax.split(mapped, 0.5, 0.5)
    assert isinstance(train, ax.data.Subset)
    found = torch.cat([labels for _, labels in ax.Loader(train, 4, shuffle=True)])
    assert sorted(found.tolist() + [int(test[index][1]) for index in range(10)]) == list(range(20))
