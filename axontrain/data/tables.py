"""TableDataset: Parquet and Arrow files larger than memory, read by row group."""

from __future__ import annotations

import bisect
import glob
import itertools
import operator
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from axontrain.data.structure import mapped
from axontrain.errors import ConfigurationError, DataError, kind_of, require, unknown, whole

# The row groups that are mixed with one another, and so held in memory together, unless ``cache`` says how many.
WINDOW_BYTES = 256 * 2**20
# Files that a process holds open: opening one again costs a look at its footer, a handle each would run out.
OPEN_FILES = 16
# What a message of an Arrow file holds, in its format's numbering.
RECORD_BATCH = 3
# torch has these, but no index_select of them.
_SIGNED = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}
_PER_DAY = {"s": 86_400, "ms": 86_400 * 10**3, "us": 86_400 * 10**6, "ns": 86_400 * 10**9}


class TableDataset:
    """The rows of Parquet or Arrow files as a dataset, read by row group: files may be larger than memory.

    Args:
        paths: a path, a list of paths, which are taken in its order, or a pattern (``"part-*.parquet"``, ``"**/*.arrow"``),
            whose files are sorted. What a file is, Parquet or an Arrow file (IPC, Feather 2), its first bytes say. All have
            the same columns.
        columns: which columns to read; all of them unless given.
        decode: a function of one row ``{column: value}`` that makes the sample (JPEG bytes into pixels). It may draw random
            numbers. Values are Python's own, None where there is none, bytes as they are; a list of numbers is a tensor.
        like: the ``Columns`` of a data frame that say how columns become tensors, with the vocabulary and the fill for
            missing values they were made with.
        targets: False takes the inputs alone, ``like`` Columns that have targets: of files without them, as to predict.
        cache: how many row groups are held in memory: those that are mixed, and one that the next batch may begin with (so
            that 4 mix 3). By default as many as make up about 256 MB before compression (one, where a single one is larger)
            are mixed.

    Without ``decode`` and ``like`` a sample is ``{column: value}`` and a batch of B rows ``{column: values}``:

    ======================================  ==================  ===============
    column                                  in a sample         in a batch
    ======================================  ==================  ===============
    number, boolean                         tensor ()           tensor (B,)
    date, time of day, timestamp, duration  tensor ()           tensor (B,)
    list of W numbers, W fixed              tensor (W,)         tensor (B, W)
    list of numbers                         tensor (n,)         list of tensors
    text; binary                            str; bytes          list of them
    ======================================  ==================  ===============

    Numbers keep their type, except for unsigned ones that torch cannot index (uint16 becomes int32, uint32 and uint64 int64)
    and decimals (float64). Times are float64 and count days: since 1970-01-01 (in UTC where there is a time zone), since
    midnight, or of a duration. Dictionary-encoded columns are read as their values.

    A shuffled pass reads each row group once: ``blocks``, the sizes of the row groups, and ``window``, how many of them are
    mixed, are what :func:`~axontrain.data.blocks.order_in_blocks` goes by. A file of one row group is read at once; a file
    is mixed better, and started sooner, the smaller its row groups are.

    >>> import tempfile, pyarrow, pyarrow.parquet
    >>> directory = tempfile.TemporaryDirectory()
    >>> points = pyarrow.table({"x": [0.5, 1.5, 2.5], "y": [0, 1, 0]})
    >>> pyarrow.parquet.write_table(points, directory.name + "/points.parquet", row_group_size=2)
    >>> data = TableDataset(directory.name + "/*.parquet")
    >>> data
    TableDataset(3 rows in 2 row groups of 1 file; columns x, y)
    >>> data.gather(torch.tensor([2, 0]))
    {'x': tensor([2.5000, 0.5000], dtype=torch.float64), 'y': tensor([0, 0])}
    >>> TableDataset(directory.name + "/points.parquet", decode=lambda row: (row["x"] * 2, row["y"]))[1]
    (3.0, 1)
    >>> directory.cleanup()

    Raises:
        DataError: for files that are missing, are neither Parquet nor Arrow, or differ in their columns, for columns that
            no tensor can be made of, and for missing values: at once where the file counts them, as most do, else when the row
            group is read.
        UnknownNameError: for a column that does not exist; the nearest ones are offered.
        ConfigurationError: for arguments that do not go together.
        MissingExtraError: if pyarrow is not installed.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        columns: Sequence[str] | None = None,
        decode: Callable[[dict[str, Any]], Any] | None = None,
        like: Any = None,
        targets: bool = True,
        cache: int | None = None,
    ) -> None:
        if like is not None and (decode is not None or columns is not None):
            other = "columns" if decode is None else "decode"
            raise ConfigurationError(
                f"TableDataset: like= says which columns are read and what they become; leave out {other}="
            )
        if decode is not None and not callable(decode):
            raise ConfigurationError(f"TableDataset: decode is {kind_of(decode)}: a function of one row, {{column: value}}")
        if not targets and like is None:
            raise ConfigurationError("TableDataset: targets=False goes with like=, whose targets it leaves out")
        self.decode, self.like, self.targets = decode, like, targets
        wanted = columns
        if like is not None:
            wanted = like.names if targets else like.input_names
            wanted = wanted or None
        if isinstance(wanted, str):
            raise ConfigurationError(f"TableDataset: columns={wanted!r}: a list of names, [{wanted!r}]")
        self.paths = _found(paths)
        opened: Any = None
        groups: list[_RowGroup] = []
        for number, path in enumerate(self.paths):
            file = _opened(path)
            if opened is None:
                opened = file
                self.columns = _chosen(file.schema, path, wanted)
                self._types = _types(file.schema, self.columns)
                if like is not None:
                    self._encoded(file.schema.empty_table().select(self.columns), str(path))  # before the first step
                elif decode is None:
                    _check_types(file.schema, path, self.columns)
            else:
                _check_same(opened, file, self.columns)
            if like is None and decode is None:
                for column, count in file.nulls(self.columns).items():
                    raise _missing(column, count, str(path))
            groups += [_RowGroup(number, index, rows, size) for index, (rows, size) in enumerate(file.row_groups(self.columns))]
        self._groups = groups
        self.blocks = [group.rows for group in groups]
        self._ends = list(itertools.accumulate(self.blocks))
        self._borders = torch.tensor(self._ends, dtype=torch.int64)
        self._firsts = self._borders - torch.tensor(self.blocks, dtype=torch.int64)
        if cache is None:
            self.window = _window([group.size for group in groups])
            self.cache = self.window + 1
        else:
            self.cache = whole("cache", cache, what="of row groups")
            self.window = max(1, self.cache - 1)
        self._held: _Held | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        place = operator.index(index)
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of a table of {len(self)} rows")
        number = bisect.bisect_right(self._ends, place)
        rows, at = self._row_group(number), place - self._ends[number] + self.blocks[number]
        if self.decode is None:
            return mapped(rows, lambda leaf: leaf[at].clone() if isinstance(leaf, Tensor) else leaf[at])
        try:
            return self.decode({name: column[at] for name, column in rows.items()})
        except Exception as error:
            error.add_note(f"in decode, of row {at} of {self._where(number)}")
            raise

    @property
    def gather(self) -> Callable[[Tensor], Any] | None:
        """``gather(indices)``, the batch at ``indices`` (B,); None with ``decode``, which makes samples one at a time."""
        return self._gathered if self.decode is None else None

    @property
    def __getitems__(self) -> Callable[[Sequence[int]], list[Any]] | None:
        """The samples at indices, in torch's own protocol; None with ``decode``: each sample has a random state of its own."""
        return self._samples if self.decode is None else None

    @property
    def reads(self) -> int:
        """How many row groups this process has read so far."""
        return self._of_this_process().reads

    def __repr__(self) -> str:
        names = ", ".join(self.columns[:6]) + (f" and {len(self.columns) - 6} more" if len(self.columns) > 6 else "")
        counts = ((len(self), "row"), (len(self.blocks), "row group"), (len(self.paths), "file"))
        rows, groups, files = (f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)
        return f"TableDataset({rows} in {groups} of {files}; columns {names})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # a worker opens the files and fills a cache for itself

    def _gathered(self, indices: Tensor) -> Any:
        n = len(self)
        places = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if places.numel() == 0:
            return self._empty()
        least, most = (int(bound) for bound in places.aminmax())
        if least < -n or most >= n:
            raise IndexError(f"row {most if most >= n else least} of a table of {n} rows")
        if least < 0:
            places = torch.where(places < 0, places + n, places)
        numbers = torch.bucketize(places, self._borders, right=True)
        first = int(numbers[0])
        if bool((numbers == first).all()):
            return _taken(self._row_group(first), places - (self._ends[first] - self.blocks[first]))
        # By row group, and back: sorted by it, the rows of each lie together.
        by_group = numbers.argsort(stable=True)
        back = torch.empty_like(by_group).scatter_(0, by_group, torch.arange(len(by_group)))
        found, counts = torch.unique(numbers, return_counts=True)
        rows = (places - self._firsts[numbers])[by_group].split(counts.tolist())  # type: ignore[no-untyped-call]
        earliest = by_group[counts.cumsum(0) - counts].tolist()
        # Those in memory first, and the others as the batch comes to them: where it goes from one window into the next, the
        # first's row groups are let go for those of the second, which are held after it.
        held = self._of_this_process().groups
        wanted = zip(found.tolist(), rows, earliest, strict=True)
        parts: dict[int, Any] = {}
        for number, within, _ in sorted(wanted, key=lambda each: (each[0] not in held, each[2])):
            parts[number] = _taken(self._row_group(number), within)
        return _joined([parts[number] for number in sorted(parts)], back)

    def _samples(self, indices: Sequence[int]) -> list[Any]:
        return _rows(self._gathered(torch.as_tensor(indices, dtype=torch.int64)))

    def _empty(self) -> Any:
        if not self._groups:
            raise IndexError("a table without a row group: there is no row to gather")
        return _taken(self._row_group(0), torch.empty(0, dtype=torch.int64))

    def _row_group(self, number: int) -> Any:
        held = self._of_this_process()
        with held.lock:
            if number in held.groups:
                held.groups.move_to_end(number)
            else:
                while len(held.groups) >= self.cache:  # before reading: never more than that at once
                    held.groups.popitem(last=False)
                held.groups[number] = self._read(held, number)
                held.reads += 1
            return held.groups[number]

    def _of_this_process(self) -> _Held:
        # Neither open files nor a lock are to be shared with a process that was forked.
        if self._held is None or self._held.process != os.getpid():
            self._held = _Held()
        return self._held

    def _read(self, held: _Held, number: int) -> Any:
        group, where = self._groups[number], self._where(number)
        if group.file in held.files:
            held.files.move_to_end(group.file)
        else:
            if len(held.files) >= OPEN_FILES:
                held.files.popitem(last=False)
            file = _opened(self.paths[group.file])
            if _types(file.schema, self.columns) != self._types:
                raise DataError(
                    f"the columns of {file.path} are no longer those it had: the file has changed since it was opened"
                )
            held.files[group.file] = file
        table = held.files[group.file].read(group.within, self.columns)
        if len(table) != group.rows:
            raise DataError(f"{where} has {len(table)} rows, and had {group.rows}: the file has changed since it was opened")
        if self.like is not None:
            return self._encoded(table, where)
        make = _column if self.decode is None else _objects
        return {name: make(_array(table.column(name)), name, where) for name in self.columns}

    def _encoded(self, table: Any, where: str) -> Any:
        try:
            return self.like.encode(table, targets=self.targets)
        except Exception as error:
            error.add_note(f"in {where}")
            raise

    def _where(self, number: int) -> str:
        group = self._groups[number]
        return f"row group {group.within} of {self.paths[group.file]}"


class _RowGroup(NamedTuple):
    file: int
    within: int  # the file, from 0
    rows: int
    size: int  # in bytes, before compression, as far as the file tells


class _Held:
    """What one process holds of a dataset: open files, and the row groups used last."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.RLock()
        self.files: OrderedDict[int, _Parquet | _Arrow] = OrderedDict()
        self.groups: OrderedDict[int, Any] = OrderedDict()
        self.reads = 0


class _Parquet:
    """A Parquet file, open."""

    def __init__(self, path: Path) -> None:
        parquet = _pyarrow("parquet")
        self.path = path
        with _Reading(path):
            # Not mapped: the pages read would count as the process's memory until the system takes them back.
            self._file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
            self.schema = self._file.schema_arrow

    def row_groups(self, columns: list[str]) -> list[tuple[int, int]]:
        """The rows of each, and the bytes of ``columns`` before compression."""
        leaves = [leaf for leaf, path in self._leaves() if any(path == name or path.startswith(name + ".") for name in columns)]
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        return [(group.num_rows, sum(group.column(leaf).total_uncompressed_size for leaf in leaves)) for group in groups]

    def nulls(self, columns: list[str]) -> dict[str, int]:
        """How many values are missing in each column, where there are any and the file tells."""
        wanted, counts = set(columns), dict.fromkeys(columns, 0)
        # In lists the count is of something else: an empty list counts too.
        flat = [(leaf, path) for leaf, path in self._leaves() if path in wanted]
        for group in map(self._file.metadata.row_group, range(self._file.num_row_groups)):
            for leaf, path in flat:
                statistics = group.column(leaf).statistics
                if statistics is not None and statistics.has_null_count:
                    counts[path] += statistics.null_count
        return {column: count for column, count in counts.items() if count}

    def read(self, index: int, columns: list[str]) -> Any:
        """The row group, as a pyarrow Table."""
        with _Reading(self.path, index):
            return self._file.read_row_group(index, columns=columns)

    def _leaves(self) -> list[tuple[int, str]]:
        return [(leaf, self._file.schema.column(leaf).path) for leaf in range(len(self._file.schema))]


class _Arrow:
    """An Arrow IPC file, mapped; a record batch is a row group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _Reading(path):
            self._source = _pyarrow().memory_map(str(path))
            self._all = _pyarrow("ipc").open_file(self._source)
            self.schema = self._all.schema
        self._some: tuple[list[str], Any] = ([], None)

    def row_groups(self, columns: list[str]) -> list[tuple[int, int]]:
        """The rows of each, and its bytes in the file."""
        return [(header.rows, header.size) for header in _headers(self.path)]

    def nulls(self, columns: list[str]) -> dict[str, int]:
        """How many values are missing in each column, where there are any."""
        # A header counts them in each column and, after it, in each of those that a nested one is made of.
        places = dict(zip(self.schema.names, itertools.accumulate(map(_arrays, self.schema.types), initial=0), strict=False))
        counts = dict.fromkeys(columns, 0)
        for header in _headers(self.path):
            for column in columns:
                counts[column] += header.nulls[places[column]]
        return {column: count for column, count in counts.items() if count}

    def read(self, index: int, columns: list[str]) -> Any:
        """The record batch, as a pyarrow Table; without a copy where the file is not compressed."""
        with _Reading(self.path, index):
            batch = self._reader(columns).get_batch(index)
            return _pyarrow().Table.from_batches([batch]).select(columns)

    def _reader(self, columns: list[str]) -> Any:
        if self._some[0] != columns:
            reader = self._all
            # Of a compressed file only some columns are to be unpacked; of one that is not, pyarrow would copy them.
            if len(columns) < len(self.schema) and any(
                header.compressed for header in itertools.islice(_headers(self.path), 1)
            ):
                ipc = _pyarrow("ipc")
                fields = [self.schema.get_field_index(name) for name in columns]
                reader = ipc.open_file(self._source, options=ipc.IpcReadOptions(included_fields=fields))
            self._some = columns, reader
        return self._some[1]


class _Header(NamedTuple):
    rows: int
    size: int  # in bytes
    nulls: list[int]
    compressed: bool


def _headers(path: Path) -> Iterator[_Header]:
    # What an Arrow file says of each record batch. pyarrow tells it with the batch only, and unpacks that for it: a pass over
    # the whole file. The format: File.fbs and Message.fbs of https://arrow.apache.org/docs/format/Columnar.html
    with path.open("rb") as file:
        try:
            file.seek(-10, os.SEEK_END)  # the footer's length, and the magic bytes
            (length,) = struct.unpack("<i6x", file.read(10))
            file.seek(-10 - length, os.SEEK_END)
            footer = file.read(length)
            for offset, prefixed, size in struct.iter_unpack("<qi4xq", _vector(footer, _followed(footer, 0), 3, 24)):
                file.seek(offset)
                message = file.read(prefixed)
                message = message[8 if message.startswith(b"\xff\xff\xff\xff") else 4 :]
                root = _followed(message, 0)
                kind, batch = _field(message, root, 1), _followed(message, _field(message, root, 2))
                if not kind or message[kind] != RECORD_BATCH:
                    raise struct.error("it is none of a record batch")
                at = _field(message, batch, 0)  # absent where it is zero
                (rows,) = struct.unpack_from("<q", message, at) if at else (0,)
                nulls = [count for _, count in struct.iter_unpack("<qq", _vector(message, batch, 1, 16))]
                yield _Header(rows, size, nulls, compressed=_field(message, batch, 3) > 0)
        except struct.error as error:
            raise DataError(f"{path} cannot be read: the header of a record batch is damaged ({error})") from error


def _field(buffer: bytes, table: int, number: int) -> int:
    # Where a field of a flatbuffer's table stands; 0 if the table has not got it.
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    (size,) = struct.unpack_from("<H", buffer, vtable)
    offset = struct.unpack_from("<H", buffer, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return int(table + offset) if offset else 0


def _followed(buffer: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", buffer, at)[0])


def _vector(buffer: bytes, table: int, number: int, size: int) -> bytes:
    # The bytes of a vector of structs of ``size``.
    at = _field(buffer, table, number)
    if not at:
        return b""
    start = _followed(buffer, at)
    (count,) = struct.unpack_from("<I", buffer, start)
    return buffer[start + 4 : start + 4 + size * count]


def _arrays(kind: Any) -> int:
    # How many arrays a column is made of, itself counted.
    kind = kind.storage_type if isinstance(kind, _pyarrow().BaseExtensionType) else kind
    return 1 + sum(_arrays(kind.field(child).type) for child in range(kind.num_fields))


class _Reading:
    """Says which file and row group it was, where pyarrow fails."""

    def __init__(self, path: Path, index: int | None = None) -> None:
        self.where = str(path) if index is None else f"row group {index} of {path}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, ValueError, _pyarrow().ArrowException)):
            raise DataError(f"{self.where} cannot be read: {error}") from error


class _Objects:
    """A column of values that are no tensor, or not all of one length: an Arrow array, and what is made of an item."""

    def __init__(self, array: Any, made: Callable[[Any], Any]) -> None:
        self.array, self.made = array, made

    def __getitem__(self, index: int) -> Any:
        return self.made(self.array[index])


def _found(paths: Any) -> list[Path]:
    if isinstance(paths, (str, os.PathLike)):
        text = os.fspath(paths)
        if glob.has_magic(text) and not Path(text).exists():
            found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207  # absolute patterns too
            if not found:
                raise DataError(f"TableDataset: no file is like {text!r} (looked from {Path.cwd()})")
        else:
            found = [Path(text)]
    elif isinstance(paths, Sequence) and not isinstance(paths, bytes):
        found = [Path(path) for path in paths]
        if not found:
            raise DataError("TableDataset: a list of no files; it takes a path, a list of paths, or a pattern")
    else:
        raise DataError(f"TableDataset: paths is {kind_of(paths)}; it takes a path, a list of paths, or a pattern")
    for path in found:
        if path.is_dir():
            raise DataError(f"TableDataset: {path} is a directory; its files are {str(path / '*.parquet')!r}, as a pattern")
        if not path.is_file():
            raise DataError(f"TableDataset: there is no file {path}" + ("" if path.is_absolute() else f" in {Path.cwd()}"))
    return [path.absolute() for path in found]  # a worker may have another working directory


def _opened(path: Path) -> _Parquet | _Arrow:
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if magic.startswith(b"PAR1"):
        return _Parquet(path)
    if magic == b"ARROW1":
        return _Arrow(path)
    if magic.startswith(b"\xff\xff\xff\xff"):
        raise DataError(
            f"{path} is an Arrow stream, which can only be read from its beginning; TableDataset takes Parquet and Arrow files "
            f"(pyarrow.ipc.new_file, Feather 2). If it is from Hugging Face datasets, pass that dataset itself"
        )
    raise DataError(f"{path} is neither Parquet nor an Arrow file: it begins with {magic!r}, not with b'PAR1' or b'ARROW1'")


def _chosen(schema: Any, path: Path, wanted: Sequence[str] | None) -> list[str]:
    columns = list(schema.names if wanted is None else wanted)
    if not columns:
        raise DataError(f"TableDataset: no column of {path} is read; it has {', '.join(schema.names) or 'none'}")
    for name in columns:
        if name not in schema.names:
            raise unknown(f"column of {path}:", name, schema.names)
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has {schema.names.count(name)} columns named {name!r}: columns= takes those of one name")
        if columns.count(name) > 1:
            raise ConfigurationError(f"TableDataset: columns={columns!r} has {name!r} twice")
    return columns


def _check_same(first: Any, other: Any, columns: list[str]) -> None:
    for name in columns:
        expected, index = first.schema.field(name).type, other.schema.get_field_index(name)
        if index < 0:
            raise DataError(f"{other.path} has no column {name!r}, which {first.path} has: all files have the same columns")
        if other.schema.field(index).type != expected:
            raise DataError(
                f"column {name!r} is {other.schema.field(index).type} in {other.path} and {expected} in {first.path}: "
                f"all files have the same columns"
            )


def _types(schema: Any, columns: list[str]) -> dict[str, Any]:
    return {field.name: field.type for field in schema if field.name in columns}


def _check_types(schema: Any, path: Path, columns: list[str]) -> None:
    for name in columns:
        kind = _plain(schema.field(name).type)
        if not (_is_numeric(kind) or _is_text(kind) or _is_list_of_numbers(kind)):
            raise DataError(
                f"column {name!r} of {path} is {schema.field(name).type}, of which no tensor can be made: leave it out "
                f"(columns=[...]), or give decode=, a function of one row that makes the sample"
            )


def _missing(column: str, count: int, where: str) -> DataError:
    what = "1 value is" if count == 1 else f"{count} values are"
    return DataError(
        f"column {column!r} of {where}: {what} missing (null). Fill them in the file, leave the column out (columns=[...]), "
        f"give like=, Columns with a fill, or decode=, which is given None there"
    )


def _window(sizes: list[int]) -> int:
    # As many as fit whichever they are: the largest first.
    fit = bisect.bisect_right(list(itertools.accumulate(sorted(sizes, reverse=True))), WINDOW_BYTES)
    return max(1, fit)


def _array(column: Any) -> Any:
    # One array of plain values of a column, which may be in parts, dictionary-encoded or of an extension type.
    types, pyarrow = _pyarrow("types"), _pyarrow()
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.num_chunks == 1:
        array = column.chunk(0)
    else:
        if types.is_string(column.type):  # in one array, these hold 2 GB
            column = column.cast(pyarrow.large_string())
        elif types.is_binary(column.type):
            column = column.cast(pyarrow.large_binary())
        array = column.combine_chunks()
    return array.storage if isinstance(array, pyarrow.ExtensionArray) else array


def _column(array: Any, name: str, where: str) -> Tensor | _Objects:
    if array.null_count:
        raise _missing(name, array.null_count, where)
    if _is_numeric(array.type):
        return _tensor(array, name, where)
    if _is_list_of_numbers(array.type) and array.flatten().null_count:
        raise _missing(name, array.flatten().null_count, where)
    return _objects(array, name, where)


def _objects(array: Any, name: str, where: str) -> _Objects:
    types = _pyarrow("types")
    if _is_list_of_numbers(array.type) or (types.is_fixed_size_list(array.type) and _is_numeric(array.type)):

        def numbers(item: Any) -> Tensor | None:
            values = item.values
            return None if values is None else _tensor(values, name, where).clone()

        return _Objects(array, numbers)
    return _Objects(array, operator.methodcaller("as_py"))


def _tensor(array: Any, name: str, where: str) -> Tensor:
    # Of numbers, without a copy where Arrow and torch store them alike; what is given out are copies.
    pyarrow, types = _pyarrow(), _pyarrow("types")
    kind = array.type
    if array.null_count:
        raise _missing(name, array.null_count, where)
    if types.is_fixed_size_list(kind):
        flat = _tensor(array.flatten(), name, where)
        return flat.reshape(len(array), kind.list_size, *flat.shape[1:])
    if types.is_boolean(kind):
        return from_dlpack(array.cast(pyarrow.uint8())).bool()
    if types.is_temporal(kind):
        return _days(array)
    if types.is_decimal(kind):
        return from_dlpack(array.cast(pyarrow.float64()))
    if str(kind) in _SIGNED:
        try:
            array = array.cast(_SIGNED[str(kind)])
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"column {name!r} of {where}: {kind} values beyond those of int64: {error}") from error
    return from_dlpack(array)


def _days(array: Any) -> Tensor:
    pyarrow, types = _pyarrow(), _pyarrow("types")
    kind = array.type
    if types.is_date32(kind):
        return from_dlpack(array.cast(pyarrow.int32())).double()
    count = array.cast(pyarrow.int32() if types.is_time32(kind) else pyarrow.int64())
    return from_dlpack(count).double() / _PER_DAY["ms" if types.is_date64(kind) else kind.unit]


def _is_numeric(kind: Any) -> bool:
    types = _pyarrow("types")
    if types.is_fixed_size_list(kind):
        return _is_numeric(kind.value_type)
    times = types.is_temporal(kind) and not types.is_interval(kind)
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind) or times)


def _is_text(kind: Any) -> bool:
    types = _pyarrow("types")
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in texts + binaries)


def _is_list_of_numbers(kind: Any) -> bool:
    types = _pyarrow("types")
    return (types.is_list(kind) or types.is_large_list(kind)) and _is_numeric(kind.value_type)


def _plain(kind: Any) -> Any:
    if _pyarrow("types").is_dictionary(kind):
        return kind.value_type
    return kind.storage_type if isinstance(kind, _pyarrow().BaseExtensionType) else kind


def _taken(group: Any, rows: Tensor) -> Any:
    def of(leaf: Any) -> Any:
        return leaf.index_select(0, rows) if isinstance(leaf, Tensor) else [leaf[row] for row in rows.tolist()]

    return mapped(group, of)


def _joined(parts: list[Any], back: Tensor) -> Any:
    # Batches put together, and their rows into the order asked for.
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts).index_select(0, back)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], back) for key in first}
    if isinstance(first, tuple):
        items = [_joined(list(of), back) for of in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    flat = list(itertools.chain.from_iterable(parts))
    return [flat[row] for row in back.tolist()]


def _rows(batch: Any) -> list[Any]:
    if isinstance(batch, Tensor):
        return list(batch.unbind())
    if isinstance(batch, dict):
        return [dict(zip(batch, row, strict=True)) for row in zip(*map(_rows, batch.values()), strict=True)]
    if isinstance(batch, tuple):
        rows = zip(*map(_rows, batch), strict=True)
        return [type(batch)(*row) for row in rows] if hasattr(batch, "_fields") else list(rows)
    return list(batch)


def _pyarrow(module: str = "") -> Any:
    return require(f"pyarrow.{module}" if module else "pyarrow", "tables", "reading a table")
