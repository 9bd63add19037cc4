"""Parquet and Arrow files: which there are, what their columns and row groups are, and one row group read."""

from __future__ import annotations

import glob
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from axontrain.errors import ConfigurationError, DataError, kind_of, require, unknown

# What a message of an Arrow file holds, in its format's numbering.
RECORD_BATCH = 3


class ParquetFile:
    """A Parquet file, open."""

    def __init__(self, path: Path) -> None:
        parquet = arrow("parquet")
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


class ArrowFile:
    """An Arrow IPC file, mapped; a record batch is a row group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _Reading(path):
            self._source = arrow().memory_map(str(path))
            self._all = arrow("ipc").open_file(self._source)
            self.schema = self._all.schema
        self._some: tuple[list[str], Any] = ([], None)

    def row_groups(self, columns: list[str]) -> list[tuple[int, int]]:
        """The rows of each, and its bytes in the file."""
        return [(header.rows, header.size) for header in headers(self.path)]

    def nulls(self, columns: list[str]) -> dict[str, int]:
        """How many values are missing in each column, where there are any."""
        # A header counts them in each column and, after it, in each of those that a nested one is made of.
        places = dict(zip(self.schema.names, itertools.accumulate(map(_arrays, self.schema.types), initial=0), strict=False))
        counts = dict.fromkeys(columns, 0)
        for header in headers(self.path):
            for column in columns:
                counts[column] += header.nulls[places[column]]
        return {column: count for column, count in counts.items() if count}

    def read(self, index: int, columns: list[str]) -> Any:
        """The record batch, as a pyarrow Table; without a copy where the file is not compressed."""
        with _Reading(self.path, index):
            batch = self._reader(columns).get_batch(index)
            return arrow().Table.from_batches([batch]).select(columns)

    def _reader(self, columns: list[str]) -> Any:
        if self._some[0] != columns:
            reader = self._all
            # Of a compressed file only some columns are to be unpacked; of one that is not, pyarrow would copy them.
            if len(columns) < len(self.schema) and any(header.compressed for header in itertools.islice(headers(self.path), 1)):
                ipc = arrow("ipc")
                fields = [self.schema.get_field_index(name) for name in columns]
                reader = ipc.open_file(self._source, options=ipc.IpcReadOptions(included_fields=fields))
            self._some = columns, reader
        return self._some[1]


class _Header(NamedTuple):
    rows: int
    size: int  # in bytes
    nulls: list[int]
    compressed: bool


def headers(path: Path) -> Iterator[_Header]:
    """What an Arrow file says of each record batch."""
    # pyarrow tells it with the batch only, and unpacks that for it: a pass over the whole file. The format:
    # File.fbs and Message.fbs of https://arrow.apache.org/docs/format/Columnar.html
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
    kind = kind.storage_type if isinstance(kind, arrow().BaseExtensionType) else kind
    return 1 + sum(_arrays(kind.field(child).type) for child in range(kind.num_fields))


class _Reading:
    """Says which file and row group it was, where pyarrow fails."""

    def __init__(self, path: Path, index: int | None = None) -> None:
        self.where = str(path) if index is None else f"row group {index} of {path}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, ValueError, arrow().ArrowException)):
            raise DataError(f"{self.where} cannot be read: {error}") from error


def found_files(paths: Any) -> list[Path]:
    """The files of a path, a list of paths or a pattern.

    Raises:
        DataError: if there are none, or one is not there.
    """
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


def opened(path: Path) -> ParquetFile | ArrowFile:
    """A file, opened as what its first bytes say that it is.

    Raises:
        DataError: if it is neither Parquet nor an Arrow file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if magic.startswith(b"PAR1"):
        return ParquetFile(path)
    if magic == b"ARROW1":
        return ArrowFile(path)
    if magic.startswith(b"\xff\xff\xff\xff"):
        raise DataError(
            f"{path} is an Arrow stream, which can only be read from its beginning; TableDataset takes Parquet and Arrow files "
            f"(pyarrow.ipc.new_file, Feather 2). If it is from Hugging Face datasets, pass that dataset itself"
        )
    raise DataError(f"{path} is neither Parquet nor an Arrow file: it begins with {magic!r}, not with b'PAR1' or b'ARROW1'")


def chosen(schema: Any, path: Path, wanted: Sequence[str] | None) -> list[str]:
    """The columns that are read: those wanted, or all.

    Raises:
        UnknownNameError: for one that the file has not got.
        DataError: for one that it has twice, or if none is read.
        ConfigurationError: for one that is wanted twice.
    """
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


def check_same(first: Any, other: Any, columns: list[str]) -> None:
    """Raise unless another file has the columns of the first, of the same types."""
    for name in columns:
        expected, index = first.schema.field(name).type, other.schema.get_field_index(name)
        if index < 0:
            raise DataError(f"{other.path} has no column {name!r}, which {first.path} has: all files have the same columns")
        if other.schema.field(index).type != expected:
            raise DataError(
                f"column {name!r} is {other.schema.field(index).type} in {other.path} and {expected} in {first.path}: "
                f"all files have the same columns"
            )


def arrow(module: str = "") -> Any:
    """A part of pyarrow, imported when it is needed."""
    return require(f"pyarrow.{module}" if module else "pyarrow", "tables", "reading a table")
