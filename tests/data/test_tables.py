import datetime
import decimal
import io
import os
import pickle
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Subset

import axontrain as ax
from axontrain.data import table_columns, table_files, tables
from axontrain.data.blocks import order_in_blocks
from axontrain.data.frames import Columns
from axontrain.data.tables import TableDataset

POINTS = pa.table(
    {
        "x": pa.array([i / 2 for i in range(10)], pa.float32()),
        "y": pa.array(range(10), pa.int64()),
        "name": [f"point {i}" for i in range(10)],
    }
)
KINDS = ["parquet", "arrow", "compressed arrow"]


def write(path, table, rows=3, kind="parquet"):
    """Row groups of ``rows``; the end of the name is no part of what a file is."""
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd" if kind.startswith("compressed") else None)
        with pa.ipc.new_file(path, table.schema, options=options) as file:
            file.write_table(table, max_chunksize=rows)
    return path


def same(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


# ---- samples and batches


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_samples_and_batches(tmp_path, kind):
    data = TableDataset(write(tmp_path / "points", POINTS, kind=kind))
    assert len(data) == 10
    assert data.blocks == [3, 3, 3, 1]
    assert data.columns == ["x", "y", "name"]
    sample = {"x": torch.tensor(3.5), "y": torch.tensor(7), "name": "point 7"}
    assert same(data[7], sample)
    assert same(data[-3], sample)
    assert same(data[torch.tensor(7)], sample)
    assert same(data.__getitems__([9, 7])[1], sample)
    batch = {"x": torch.tensor([3.5, 0, 4.5]), "y": torch.tensor([7, 0, 9]), "name": ["point 7", "point 0", "point 9"]}
    assert same(data.gather(torch.tensor([7, 0, -1])), batch)
    assert same(data.gather(torch.tensor([], dtype=torch.int64)), {"x": torch.empty(0), "y": batch["y"][:0], "name": []})
    assert isinstance(data, ax.data.Dataset)
    assert repr(data) == "TableDataset(10 rows in 4 row groups of 1 file; columns x, y, name)"


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_type_becomes(tmp_path, kind):
    utc = datetime.UTC
    day, moment = datetime.date(1970, 1, 3), datetime.datetime(1970, 1, 2, 6)
    cases = {
        "bool": (pa.array([True, False]), torch.tensor([True, False])),
        "uint8": (pa.array([0, 255], pa.uint8()), torch.tensor([0, 255], dtype=torch.uint8)),
        "int16": (pa.array([-3, 4], pa.int16()), torch.tensor([-3, 4], dtype=torch.int16)),
        "uint16": (pa.array([1, 65535], pa.uint16()), torch.tensor([1, 65535], dtype=torch.int32)),
        "uint32": (pa.array([1, 2**32 - 1], pa.uint32()), torch.tensor([1, 2**32 - 1])),
        "uint64": (pa.array([1, 2**62], pa.uint64()), torch.tensor([1, 2**62])),
        "half": (pa.array([0.5, 2.0], pa.float16()), torch.tensor([0.5, 2.0], dtype=torch.float16)),
        "double": (pa.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64)),
        "decimal": (pa.array([decimal.Decimal("1.25")] * 2), torch.tensor([1.25] * 2, dtype=torch.float64)),
        "date": (pa.array([day] * 2), torch.tensor([2.0] * 2, dtype=torch.float64)),
        "moment": (pa.array([moment] * 2, pa.timestamp("us")), torch.tensor([1.25] * 2, dtype=torch.float64)),
        "zoned": (
            pa.array([moment.replace(tzinfo=utc)] * 2, pa.timestamp("ms", "Asia/Tokyo")),
            torch.tensor([1.25] * 2, dtype=torch.float64),
        ),
        "time": (pa.array([datetime.time(6)] * 2, pa.time32("ms")), torch.tensor([0.25] * 2, dtype=torch.float64)),
        "span": (
            pa.array([datetime.timedelta(hours=36)] * 2, pa.duration("us")),
            torch.tensor([1.5] * 2, dtype=torch.float64),
        ),
        "vector": (pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2)), torch.tensor([[1.0, 2], [3, 4]])),
        "matrix": (
            pa.array([[[1, 2], [3, 4]]] * 2, pa.list_(pa.list_(pa.int32(), 2), 2)),
            torch.tensor([[[1, 2], [3, 4]]] * 2, dtype=torch.int32),
        ),
        "ragged": (pa.array([[1, 2, 3], []]), [torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.int64)]),
        "text": (pa.array(["a", "é"]), ["a", "é"]),
        "bytes": (pa.array([b"\0", b"ab"]), [b"\0", b"ab"]),
        "fixed": (pa.array([b"ab", b"cd"], pa.binary(2)), [b"ab", b"cd"]),
        "category": (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
        "code": (pa.array([7, 5]).dictionary_encode(), torch.tensor([7, 5])),
        "tensor": (
            pa.ExtensionArray.from_storage(
                pa.fixed_shape_tensor(pa.int64(), [2]), pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
            ),
            torch.tensor([[1, 2], [3, 4]]),
        ),
    }
    path = write(tmp_path / "types", pa.table({name: array for name, (array, _) in cases.items()}), 1, kind)
    data = TableDataset(path)
    batch, sample = data.gather(torch.tensor([0, 1])), data[1]
    for name, (_, expected) in cases.items():
        assert same(batch[name], expected), name
        assert same(sample[name], expected[1]), name
    assert same(list(data.__getitems__([1])[0].values()), list(sample.values()))


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parts")
    for number, (first, last) in enumerate([(0, 4), (4, 4), (4, 9), (9, 10)]):
        write(directory / f"part-{number}", POINTS[first:last], 2, KINDS[number % 3])
    return directory


@given(st.lists(st.integers(-10, 9), max_size=12), st.integers(1, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gathering_equals_indexing_however_few_are_held(in_parts, indices, cache):
    data = TableDataset(str(in_parts / "part-*"), cache=cache)
    assert sum(data.blocks) == len(data) == 10
    batch, samples = data.gather(torch.tensor(indices, dtype=torch.int64)), data.__getitems__(indices)
    assert len(samples) == len(indices)
    for row, index in enumerate(indices):
        assert same(data[index], {name: column[row] for name, column in batch.items()})
        assert same(data[index], samples[row])
        assert data[index]["y"] == index % 10


def test_samples_and_batches_are_copies(tmp_path):
    data = TableDataset(write(tmp_path / "points", POINTS, kind="arrow"))
    data[0]["x"].fill_(9)
    data.gather(torch.tensor([0, 1]))["x"].fill_(9)
    data.__getitems__([0])[0]["x"].fill_(9)
    assert data[0]["x"] == 0


def test_files_in_the_order_of_a_list_and_of_a_sorted_pattern(tmp_path, monkeypatch):
    for name, first in (("b", 5), ("a", 0)):
        write(tmp_path / f"{name}.parquet", POINTS[first : first + 5])
    monkeypatch.chdir(tmp_path)
    assert TableDataset("*.parquet")[0]["y"] == 0
    data = TableDataset(["b.parquet", tmp_path / "a.parquet"], columns=["y"])
    assert [sample["y"].item() for sample in data.__getitems__(range(10))] == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    monkeypatch.chdir("/")  # as a worker's may be
    assert pickle.loads(pickle.dumps(data))[0]["y"] == 5
    (tmp_path / "[1].parquet").write_bytes((tmp_path / "b.parquet").read_bytes())
    assert TableDataset(str(tmp_path / "[1].parquet"))[0]["y"] == 5  # a name that exists is no pattern


def test_only_the_columns_asked_for(tmp_path):
    path = write(tmp_path / "points", POINTS)
    assert list(TableDataset(path, columns=["y", "x"])[0]) == ["y", "x"]
    few = TableDataset(path, columns=["y"], decode=lambda row: row)
    assert few[3] == {"y": 3}


def test_it_is_read_by_torchs_own_loader_and_subset(tmp_path):
    data = TableDataset(write(tmp_path / "points", POINTS))
    batch = next(iter(DataLoader(Subset(data, [9, 0]), 2)))
    assert same(batch, data.gather(torch.tensor([9, 0])))
    rows = TableDataset(tmp_path / "points", decode=lambda row: row["y"])
    assert next(iter(DataLoader(rows, 3))).tolist() == [0, 1, 2]


# ---- decode


def jpeg(value):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def pixel(row):
    return Image.open(io.BytesIO(row["image"])).getpixel((0, 0)), row["label"]


@pytest.mark.parametrize("kind", KINDS)
def test_decode_makes_samples_of_rows_one_at_a_time(tmp_path, kind):
    images = pa.table({"image": [jpeg(value) for value in range(6)], "label": pa.array(range(6), pa.uint8())})
    data = TableDataset(write(tmp_path / "images", images, 4, kind), decode=pixel)
    assert [data[index] for index in (5, 0, -2)] == [(5, 5), (0, 0), (4, 4)]
    assert data.gather is None
    assert data.__getitems__ is None
    batch = next(iter(ax.Loader(Subset(data, range(6)), 6)))
    assert same(batch, [torch.arange(6), torch.arange(6)])


def test_decode_draws_once_for_each_sample(tmp_path):
    data = TableDataset(write(tmp_path / "points", POINTS), decode=lambda row: torch.rand(()).item())
    torch.manual_seed(0)
    drawn = [data[index] for index in (7, 0, 3)]
    torch.manual_seed(0)
    assert drawn == [torch.rand(()).item() for _ in range(3)]


def test_decode_is_given_values_as_they_are(tmp_path):
    table = pa.table(
        {
            "number": [1, None],
            "text": [None, "a"],
            "list": pa.array([[1, 2], None]),
            "vector": pa.array([[1, 2], None], pa.list_(pa.int16(), 2)),
            "record": [{"a": 1}, None],
            "day": [datetime.date(2024, 1, 2), None],
            "texts": [["a"], []],
        }
    )
    data = TableDataset(write(tmp_path / "rows", table), decode=dict)
    assert same(
        data[0],
        {
            "number": 1,
            "text": None,
            "list": torch.tensor([1, 2]),
            "vector": torch.tensor([1, 2], dtype=torch.int16),
            "record": {"a": 1},
            "day": datetime.date(2024, 1, 2),
            "texts": ["a"],
        },
    )
    assert data[1] == {"number": None, "text": "a", "list": None, "vector": None, "record": None, "day": None, "texts": []}


def test_what_decode_raises_says_where(tmp_path):
    path = write(tmp_path / "points", POINTS)
    data = TableDataset(path, decode=lambda row: 1 / (row["y"] - 4))
    with pytest.raises(ZeroDivisionError) as raised:
        data[4]
    assert raised.value.__notes__ == [f"in decode, of row 1 of row group 1 of {path}"]


# ---- like


def test_columns_of_a_frame_say_what_rows_become(in_parts, tmp_path):
    columns = Columns({"numbers": ["x"], "name": "name"}, "y").learn(POINTS)
    data = TableDataset(str(in_parts / "part-*"), like=columns, cache=2)
    assert data.columns == columns.names
    whole = columns.encode(POINTS)
    rows = torch.tensor([7, 0, 9, 8])
    inputs, targets = data.gather(rows)
    assert same(inputs, {key: value[rows] for key, value in whole[0].items()})
    assert same(targets, whole[1][rows])
    assert same(data[-1], ({key: value[9] for key, value in whole[0].items()}, whole[1][9]))
    assert same(data.__getitems__([3, 9])[1], data[9])
    assert same(data.gather(rows[:0])[0]["numbers"], torch.empty(0, 1))
    again = pickle.loads(pickle.dumps(data))
    assert same(again.gather(rows)[0], inputs)


def test_missing_values_are_filled_as_the_columns_say(tmp_path):
    table = pa.table({"x": [1.5, None, 2.5], "y": [0, 1, 0]})
    path = write(tmp_path / "points", table, 2)
    data = TableDataset(path, like=Columns(["x"], "y", fill={"x": -1.0}).learn(table))
    assert data.gather(torch.tensor([0, 1, 2]))[0].tolist() == [[1.5], [-1.0], [2.5]]
    data = TableDataset(path, like=Columns(["x"], "y").learn(table))
    with pytest.raises(ax.DataError, match="nulls: 'x'") as raised:
        data[0]
    assert raised.value.__notes__ == [f"in row group 0 of {path}"]


def test_files_without_targets_are_read_to_predict(tmp_path):
    table = pa.table({"x": [1.5, 2.0, 2.5], "y": [0, 1, 0]})
    path = write(tmp_path / "points", table, 2)
    known = Columns(["x"], "y").learn(table)
    data = TableDataset(path, like=known)
    bare = path.with_name("bare.parquet")
    pq.write_table(table.select(["x"]), bare)
    with pytest.raises(ax.AxonError, match="'y'"):
        TableDataset(bare, like=known)
    alone = TableDataset(bare, like=known, targets=False)
    assert torch.equal(alone.gather(torch.arange(len(alone))), data.gather(torch.arange(len(data)))[0])
    with pytest.raises(ax.ConfigurationError, match="goes with like="):
        TableDataset(bare, targets=False)


def test_columns_that_do_not_fit_the_files_are_told_of_at_once(tmp_path):
    path = write(tmp_path / "points", POINTS)
    with pytest.raises(ax.DataError, match="learned nothing yet"):
        TableDataset(path, like=Columns(["x"], "y"))
    with pytest.raises(ax.DataError, match="learned nothing yet"):
        TableDataset(path, like=Columns())
    with pytest.raises(ax.UnknownNameError, match=r"unknown column of .*points: 'xx'"):
        TableDataset(path, like=Columns(["xx"]))
    for name, value in {"columns": ["x"], "decode": dict}.items():
        with pytest.raises(ax.ConfigurationError, match=f"leave out {name}="):
            TableDataset(path, like=Columns(["x"]).learn(POINTS), **{name: value})


# ---- row groups: what is read, and what is held


def test_a_batch_reads_the_row_groups_it_needs_and_no_others(tmp_path):
    table = pa.table({"y": range(100)})
    data = TableDataset(write(tmp_path / "rows", table, 10), cache=5)
    assert data.reads == 0
    assert data.window == 4
    data.gather(torch.tensor([55, 51]))
    assert data.reads == 1
    data.gather(torch.tensor([50, 10, 19, 99]))
    assert data.reads == 3
    data[98], data[11]
    assert data.reads == 3
    order = order_in_blocks(0, 0, data.blocks, data.window)
    data = TableDataset(tmp_path / "rows", cache=5)
    batch = order.rows(80, 90)  # of the last window, two blocks
    data.gather(batch)
    assert data.reads == len(set((batch // 10).tolist())) <= 2


@pytest.mark.parametrize("cache", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("decode", [None, lambda row: row["y"]], ids=["gather", "decode"])
def test_an_epoch_reads_each_row_group_once(tmp_path, cache, batch_size, decode):
    data = TableDataset(write(tmp_path / "rows", pa.table({"y": range(203)}), 10), cache=cache, decode=decode)
    order = order_in_blocks(3, 1, data.blocks, data.window)
    seen = []
    for start in range(0, 203, batch_size):
        rows = order.rows(start, min(start + batch_size, 203))
        if decode is None:
            assert torch.equal(data.gather(rows)["y"], rows)
            seen += rows.tolist()
        else:
            seen += [data[row] for row in rows.tolist()]
        assert len(data._held.groups) <= cache
    assert sorted(seen) == list(range(203))
    assert data.reads == len(data.blocks) == 21


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_shuffles_it_by_row_groups(tmp_path, kind):
    path = write(tmp_path / "rows", pa.table({"y": range(203)}), 10, kind)
    for decode in (None, decoded):
        data = TableDataset(path, cache=4, decode=decode)
        loader = ax.Loader(data, 8, shuffle=True)
        batches = [batch if decode else batch["y"] for batch in loader.batches(seed=1, epoch=2)]
        assert data.reads == 21
        assert sorted(torch.cat(batches).tolist()) == list(range(203))
        again = TableDataset(path, cache=4, decode=decode)
        batch = next(ax.Loader(again, 8, shuffle=True).batches(seed=1, epoch=2, start=9))
        assert torch.equal(batch if decode else batch["y"], batches[9])
        assert again.reads == len(set((batches[9] // 10).tolist()))


def test_the_window_is_what_fits_in_memory(tmp_path, monkeypatch):
    table = pa.table({"x": torch.rand(8000).tolist(), "wide": torch.rand(8000).tolist()})
    path = write(tmp_path / "rows", table, 1000)
    assert TableDataset(path).window == 8
    assert TableDataset(path).cache == 9
    monkeypatch.setattr(tables, "WINDOW_BYTES", 40_000)  # a row group holds about 10,000 bytes a column
    assert TableDataset(path).window in (1, 2)
    assert TableDataset(path, columns=["x"]).window in (3, 4)
    monkeypatch.setattr(tables, "WINDOW_BYTES", 10)
    assert TableDataset(path).window == 1
    assert TableDataset(path, cache=6).window == 5
    assert TableDataset(path, cache=1).window == 1


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=5), max_size=5), st.sampled_from([None, "lz4"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_an_arrow_file_says_of_its_batches(tmp_path, batches, compression):
    kind = pa.struct({"a": pa.list_(pa.int8()), "b": pa.list_(pa.int8(), 2)})
    schema = pa.schema({"x": pa.int16(), "record": kind, "code": pa.dictionary(pa.int8(), pa.string()), "y": pa.int64()})
    path = tmp_path / "batches"
    with pa.ipc.new_file(path, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        for values in batches:
            empty = pa.nulls(len(values), kind)
            places = pa.array([None if value is None else 0 for value in values], pa.int8())
            codes = pa.DictionaryArray.from_arrays(places, ["a"])
            file.write_batch(pa.record_batch([values, empty, codes, values], schema=schema))
    headers = list(table_files.headers(path))
    nulls = [sum(value is None for value in values) for values in batches]
    assert [header.rows for header in headers] == [len(values) for values in batches]
    assert all(header.compressed == (compression is not None) for header in headers)
    columns = ["y", "x", "code"]
    assert table_files.ArrowFile(path).nulls(columns) == (dict.fromkeys(columns, sum(nulls)) if sum(nulls) else {})
    data = TableDataset(path, columns=columns, decode=lambda row: row["y"])
    assert [data[index] for index in range(len(data))] == [value for values in batches for value in values]


def test_more_files_than_are_held_open(tmp_path):
    for number in range(40):
        write(tmp_path / f"{number:02}", pa.table({"y": [number]}), kind=KINDS[number % 2])
    data = TableDataset(str(tmp_path / "*"), cache=1)
    for _ in range(2):
        assert [sample["y"].item() for sample in data.__getitems__(range(40))] == list(range(40))
    assert len(data._held.files) <= tables.OPEN_FILES


def test_threads_get_the_rows_they_ask_for(tmp_path):
    data = TableDataset(write(tmp_path / "rows", pa.table({"y": range(1000)}), 10), cache=2)
    wrong = []

    def read(seed):
        for rows in torch.randint(1000, (50, 8), generator=torch.Generator().manual_seed(seed)):
            if not torch.equal(data.gather(rows)["y"], rows):
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


READ_THROUGH = """
import sys, torch
from axontrain.data.blocks import order_in_blocks
from axontrain.data.tables import TableDataset

def memory():  # what is the process's own: pages of a mapped file are the system's to take back
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0]) / 1024

data = TableDataset(sys.argv[1], cache=5)  # four row groups of 4 MB, and one more
order = order_in_blocks(0, 0, data.blocks, data.window)
data.gather(order.rows(0, 64))
before = most = memory()
sums = 0.0
for start in range(0, len(data), 256):
    sums += float(data.gather(order.rows(start, min(start + 256, len(data))))["x"].double().sum())
    most = max(most, memory())
print(most - before, sums)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_over_data_larger_than_the_window_holds_memory_flat(tmp_path, kind):
    # 200 MB in row groups of 4 MB.
    values = torch.rand(50 * 4096, 256, generator=torch.Generator().manual_seed(0))
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), 256)
    path = write(tmp_path / "large", pa.table({"x": array}), 4096, kind)
    out = subprocess.run([sys.executable, "-W", "error", "-c", READ_THROUGH, path], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    grown, total = map(float, out.stdout.split())
    assert total == pytest.approx(float(values.double().sum()))
    assert grown < 60


# ---- processes


def test_it_pickles_without_what_it_holds(tmp_path):
    data = TableDataset(write(tmp_path / "rows", pa.table({"y": range(100_000)}), 50_000))
    data.gather(torch.tensor([0, 99_999]))
    held = pickle.dumps(data)
    assert len(held) < 2000
    again = pickle.loads(held)
    assert again.reads == 0
    assert again[99_999]["y"] == 99_999
    assert again.reads == 1


def decoded(row):
    return row["y"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_workers_read_for_themselves(tmp_path, start, kind):
    path = write(tmp_path / "rows", pa.table({"y": range(100)}), 7, kind)
    for decode in (None, decoded):
        data = TableDataset(path, decode=decode, cache=3)
        data[0], data[99]  # files are open and row groups held when the workers start
        loader = DataLoader(data, 8, num_workers=2, multiprocessing_context=start)
        batches = list(loader)
        seen = torch.cat([batch if decode else batch["y"] for batch in batches])
        assert seen.tolist() == list(range(100))
        assert data.reads == 2


def test_a_forked_process_has_open_files_and_a_cache_of_its_own(tmp_path):
    data = TableDataset(write(tmp_path / "rows", pa.table({"y": range(20)}), 5))
    data[0]
    ours = data._held
    assert ours.reads == 1
    child = os.fork()
    if child == 0:
        try:
            fine = data[7]["y"].item() == 7 and data._held is not ours and data.reads == 1
        finally:
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert data._held is ours


def test_pyarrow_is_imported_when_a_table_is_read(imported):
    assert "axontrain.data.tables" in imported["in the end"]
    assert not any(name.startswith("pyarrow") for name in imported["in the end"])


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "points", POINTS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ax.MissingExtraError, match=r"reading a table needs pyarrow.*axontrain\[tables\]"):
        TableDataset(path)


@pytest.mark.parametrize("values", [["a", "b", "c"], [b"a", b"b", b"c"], [1, 2, 3], [[1], [2, 3], []]])
def test_columns_in_parts_are_put_together(values):
    # Parquet gives those of more than 2 GB of text in parts.
    parts = pa.chunked_array([values[:2], values[2:]], pa.array(values).type)
    column = table_columns.column_of(table_columns.whole_array(parts), "x", "a row group")
    got = [value.tolist() if isinstance(value, torch.Tensor) else value for value in (column[0], column[1], column[2])]
    assert got == values


# ---- what is wrong, said


@pytest.mark.parametrize(("cache", "index"), [(None, 10), (None, -11), (2, 10**9)])
def test_an_index_beyond_the_end(tmp_path, cache, index):
    data = TableDataset(write(tmp_path / "points", POINTS), cache=cache)
    message = f"row {index} of a table of 10 rows"
    with pytest.raises(IndexError, match=message):
        data[index]
    with pytest.raises(IndexError, match=message):
        data.__getitems__([0, index])
    with pytest.raises(IndexError, match=message):
        data.gather(torch.tensor([index, 3]))


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ax.DataError, match=rf"there is no file none.parquet in {tmp_path}"):
        TableDataset("none.parquet")
    with pytest.raises(ax.DataError, match=rf"no file is like 'part-\*' \(looked from {tmp_path}\)"):
        TableDataset("part-*")
    with pytest.raises(ax.DataError, match="a list of no files"):
        TableDataset([])
    with pytest.raises(ax.DataError, match=rf"{tmp_path} is a directory; its files are '{tmp_path}/\*.parquet'"):
        TableDataset(tmp_path)
    with pytest.raises(ax.DataError, match="paths is int; it takes a path"):
        TableDataset(3)


def test_files_of_another_format(tmp_path):
    path = tmp_path / "file"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ax.DataError, match=rf"{path} is neither Parquet nor an Arrow file: it begins with b'a,b\\n1,'"):
        TableDataset(path)
    with pa.ipc.new_stream(path, POINTS.schema) as stream:
        stream.write_table(POINTS)
    with pytest.raises(ax.DataError, match="is an Arrow stream, which can only be read from its beginning"):
        TableDataset(path)
    path.write_bytes(b"")
    with pytest.raises(ax.DataError, match="begins with b''"):
        TableDataset(path)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_damaged(tmp_path, kind):
    path = write(tmp_path / "points", POINTS, 1000, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ax.DataError, match=f"{path} cannot be read: "):
        TableDataset(path)
    path.write_bytes(whole)
    data = TableDataset(path)
    path.unlink()
    with pytest.raises(ax.DataError, match=f"{path} cannot be read: .*No such file"):
        data[0]


def test_a_damaged_header_of_an_arrow_file_is_told_of(tmp_path):
    path = write(tmp_path / "points", POINTS, kind="arrow")
    whole = path.read_bytes()
    start = whole.index(b"\xff\xff\xff\xff", 16)  # after the schema, which is the first message
    for damage in (bytes(200), b"\xff" * 200):
        path.write_bytes(whole[: start + 8] + damage + whole[start + 208 :])
        with pytest.raises(ax.DataError, match=f"{path} cannot be read: the header of a record batch is damaged"):
            TableDataset(path)


def test_a_damaged_row_group_is_named(tmp_path):
    path = write(tmp_path / "points", POINTS)
    data, whole = TableDataset(path), path.read_bytes()
    path.write_bytes(whole[:4] + bytes(64) + whole[68:])
    with pytest.raises(ax.DataError, match=f"row group 0 of {path} cannot be read: "):
        data[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_has_changed(tmp_path, kind):
    path = write(tmp_path / "points", POINTS, kind=kind)
    data = TableDataset(path, columns=["y"])
    write(path, POINTS[:2], kind=kind)
    with pytest.raises(ax.DataError, match=f"row group 0 of {path} has 2 rows, and had 3: the file has changed"):
        data[0]
    with pytest.raises(ax.DataError, match=f"row group 3 of {path} cannot be read"):
        data[9]
    data = TableDataset(path, columns=["y"])
    for table in (POINTS.drop_columns(["y"]), POINTS.set_column(1, "y", POINTS["name"])):
        write(path, table, kind=kind)
        with pytest.raises(ax.DataError, match=f"the columns of {path} are no longer those it had"):
            data[0]


def test_columns_that_do_not_exist_or_differ(tmp_path):
    path, other = write(tmp_path / "a", POINTS), tmp_path / "b"
    with pytest.raises(ax.UnknownNameError, match=rf"unknown column of {path}: 'nane': did you mean 'name'\?"):
        TableDataset(path, columns=["nane"])
    write(other, POINTS.drop_columns(["y"]))
    with pytest.raises(ax.DataError, match=f"{other} has no column 'y', which {path} has"):
        TableDataset([path, other])
    assert len(TableDataset([path, other], columns=["x"])) == 20
    write(other, POINTS.set_column(1, "y", pa.array(range(10), pa.int32())))
    with pytest.raises(ax.DataError, match=f"column 'y' is int32 in {other} and int64 in {path}"):
        TableDataset([path, other])
    with pytest.raises(ax.ConfigurationError, match=r"columns='x': a list of names, \['x'\]"):
        TableDataset(path, columns="x")
    with pytest.raises(ax.ConfigurationError, match="has 'x' twice"):
        TableDataset(path, columns=["x", "y", "x"])
    with pytest.raises(ax.DataError, match=r"no column of .* is read; it has x, y, name"):
        TableDataset(path, columns=[])
    twice = pa.Table.from_arrays([POINTS["x"], POINTS["y"]], ["x", "x"])
    with pytest.raises(ax.DataError, match="has 2 columns named 'x'"):
        TableDataset(write(other, twice))


def test_columns_that_no_tensor_is_made_of(tmp_path):
    table = pa.table({"x": [1], "record": [{"a": 1}], "texts": [["a"]]})
    path = write(tmp_path / "rows", table)
    with pytest.raises(ax.DataError, match=r"column 'record' of .*rows is struct<a: int64>, of which no tensor can be made"):
        TableDataset(path)
    with pytest.raises(ax.DataError, match=r"column 'texts' of .* give decode="):
        TableDataset(path, columns=["x", "texts"])
    assert TableDataset(path, columns=["x"])[0]["x"] == 1
    huge = write(tmp_path / "huge", pa.table({"x": pa.array([2**64 - 1], pa.uint64())}))
    with pytest.raises(ax.DataError, match=r"column 'x' of row group 0 of .*huge: uint64 values beyond those of int64"):
        TableDataset(huge)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_missing_values_are_told_of_before_the_first_step(tmp_path, kind):
    table = pa.table(
        {
            "record": [{"a": 1, "b": None}, None, None, None, {"a": 1, "b": 2}],
            "list": [[[None]], None, [], [[1], [2]], None],
            "x": [1.0, None, None, 4.0, None],
            "y": [1, 2, 3, 4, 5],
            "category": pa.array(["a", "b", "a", "b", "a"]).dictionary_encode(),
            "name": ["a", None, "b", "c", "d"],
        }
    )
    path = write(tmp_path / "rows", table, 2, kind)
    columns = ["x", "y", "name"]
    with pytest.raises(ax.DataError, match=rf"column 'x' of {path}: 3 values are missing \(null\)\. Fill them"):
        TableDataset(path, columns=columns)
    with pytest.raises(ax.DataError, match=rf"column 'name' of {path}: 1 value is missing"):
        TableDataset(path, columns=["y", "name"])
    data = TableDataset(path, columns=["category", "y"])
    assert [data[4]["category"], data[4]["y"]] == ["a", 5]


LISTS = {
    "vector": pa.array([[1.0, 2.0], None, [1.0, 2.0]], pa.list_(pa.float32(), 2)),
    "in vector": pa.array([[1.0, None], [None, 2.0], [1.0, 2.0]], pa.list_(pa.float32(), 2)),
    "list": pa.array([[1, 2, 3], None, []]),
    "in list": pa.array([[1, None, 3], [], []]),
}


@pytest.mark.parametrize(
    ("name", "count"), [("vector", "1 value is"), ("in vector", "2 values are"), ("list", "1"), ("in list", "1")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_missing_values_of_lists(tmp_path, name, count, kind):
    path = write(tmp_path / "rows", pa.table({name: LISTS[name]}), kind=kind)
    with pytest.raises(ax.DataError, match=rf"column '{name}' of .*{path}: {count}.* missing"):
        TableDataset(path)[0]


def test_files_without_statistics_are_told_of_when_read(tmp_path):
    path = tmp_path / "rows"
    pq.write_table(pa.table({"x": [1, None]}), path, write_statistics=False)
    data = TableDataset(path)
    with pytest.raises(ax.DataError, match=r"column 'x' of row group 0 of .* 1 value is missing"):
        data[0]


def test_tables_without_rows(tmp_path):
    for kind in KINDS:
        data = TableDataset(write(tmp_path / "none", POINTS[:0], kind=kind))
        assert len(data) == 0
        with pytest.raises(IndexError, match="row 0 of a table of 0 rows"):
            data[0]
        with pytest.raises(IndexError, match="row 0 of a table of 0 rows"):
            data.gather(torch.tensor([0]))


def test_arguments_that_cannot_work(tmp_path):
    path = write(tmp_path / "points", POINTS)
    with pytest.raises(ax.ConfigurationError, match="cache=0: a whole number of row groups"):
        TableDataset(path, cache=0)
    with pytest.raises(ax.ConfigurationError, match="decode is str: a function of one row"):
        TableDataset(path, decode="jpeg")
