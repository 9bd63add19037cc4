"""TableDataset: Parquet and Arrow files larger than memory, read by row group."""

from __future__ import annotations

import bisect
import itertools
import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axontrain.data.arrays import ArrayDataset
from axontrain.data.structure import mapped
from axontrain.data.table_columns import check_types, column_of, missing, objects_of, types_of, whole_array
from axontrain.data.table_files import ArrowFile, ParquetFile, check_same, chosen, found_files, opened
from axontrain.errors import ConfigurationError, DataError, kind_of, whole

# The row groups that are mixed with one another, and so held in memory together, unless ``cache`` says how many.
WINDOW_BYTES = 256 * 2**20
# Files that a process holds open: opening one again costs a look at its footer, a handle each would run out.
OPEN_FILES = 16


class TableDataset:
    """The rows of Parquet or Arrow files as a dataset, read by row group: files may be larger than memory.

    Args:
        paths: a path, a list of paths, which are taken in its order, or a pattern (``"part-*.parquet"``, ``"**/*.arrow"``),
            whose files are sorted. What a file is, Parquet or an Arrow file (IPC, Feather 2), its first bytes say. All have
            the same columns.
        columns: which columns to read; all of them unless given.
        decode: a function of one row ``{column: value}`` that makes the sample (JPEG bytes into pixels). It may draw random
            numbers. Values are Python's own, None where there is none, bytes as they are; a list of numbers is a tensor.
        like: the ``Columns`` of a data frame, or the ArrayDataset made of it, that say how columns become tensors, with the
            vocabulary and the fill for missing values they were made with.
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
        if isinstance(like, ArrayDataset):
            like = like.columns
            if like is None:
                raise ConfigurationError("TableDataset(like=...) is an ArrayDataset that from_frame did not make")
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
        self.paths = found_files(paths)
        first: Any = None
        groups: list[_RowGroup] = []
        for number, path in enumerate(self.paths):
            file = opened(path)
            if first is None:
                first = file
                self.columns = chosen(file.schema, path, wanted)
                self._types = types_of(file.schema, self.columns)
                if like is not None:
                    self._encoded(file.schema.empty_table().select(self.columns), str(path))  # before the first step
                elif decode is None:
                    check_types(file.schema, path, self.columns)
            else:
                check_same(first, file, self.columns)
            if like is None and decode is None:
                for column, count in file.nulls(self.columns).items():
                    raise missing(column, count, str(path))
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

    @property
    def pure(self) -> bool:
        """Whether nobody's code runs when it is read, so that nothing can be drawn."""
        return self.decode is None

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
        rows = torch.split((places - self._firsts[numbers])[by_group], counts.tolist())
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
            file = opened(self.paths[group.file])
            if types_of(file.schema, self.columns) != self._types:
                raise DataError(
                    f"the columns of {file.path} are no longer those it had: the file has changed since it was opened"
                )
            held.files[group.file] = file
        table = held.files[group.file].read(group.within, self.columns)
        if len(table) != group.rows:
            raise DataError(f"{where} has {len(table)} rows, and had {group.rows}: the file has changed since it was opened")
        if self.like is not None:
            return self._encoded(table, where)
        make = column_of if self.decode is None else objects_of
        return {name: make(whole_array(table.column(name)), name, where) for name in self.columns}

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
        self.files: OrderedDict[int, ParquetFile | ArrowFile] = OrderedDict()
        self.groups: OrderedDict[int, Any] = OrderedDict()
        self.reads = 0


def _window(sizes: list[int]) -> int:
    # As many as fit whichever they are: the largest first.
    fit = bisect.bisect_right(list(itertools.accumulate(sorted(sizes, reverse=True))), WINDOW_BYTES)
    return max(1, fit)


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
