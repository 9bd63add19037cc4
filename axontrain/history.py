"""History: the readings of a run, in memory and as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axontrain import display
from axontrain.errors import AxonWarning, ConfigurationError, unknown

PRECISION = "precision"
ABOUT = (*display.COUNTERS, PRECISION)  # names in a row that are no readings
PACKED = 4096  # rows of a history
MOST_EARLY = 10_000_000  # values of its earlier rows: each takes many times its bytes once it is in a row again
_UNFOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor is a pipe waited for


class History:
    """The readings of a run: one row for each step at which something was read.

    A row that was read in another precision than "fp32" has it, under "precision".

    Args:
        path: a file of JSON lines that each reading is appended to; a later line for a step adds to the earlier.

    >>> history = History()
    >>> history.add(10, 1, {"train/loss": 0.5})
    >>> history.add(10, 1, {"val/loss": 0.6})
    >>> history["val/loss"], history.rows
    ([0.6], [{'epoch': 1, 'step': 10, 'train/loss': 0.5, 'val/loss': 0.6}])
    """

    def __init__(self, path: Path | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.path = path
        self.precision = "fp32"
        self.guard: Callable[[], None] | None = None  # asked before the file is written: raises where it may not be
        self._behind = False  # whether the file lacks rows
        # A row that is there only because a fit ended within an epoch: what it was before, and None if there was none.
        self.partial: dict[str, Any] | None = None
        self._early: tuple[list[dict[str, Any]], int, dict[str, Any] | None] = (self.rows, 0, None)

    def add(self, step: int, epoch: int, readings: Mapping[str, Any], *, partial: bool = False) -> None:
        """Add readings to the row of a step; a ``partial`` one is taken back when the fit is resumed.

        The step may be an earlier one than the last, of readings that have taken their time to arrive.
        """
        if self.precision != "fp32":
            readings = {PRECISION: self.precision, **readings}
        if partial and self.partial is not None and self.rows and self.rows[-1]["step"] == step:  # by another, just before
            self.partial["names"] = sorted({*self.partial["names"], *readings})
        elif partial:
            row = dict(self.rows[-1]) if self.rows and self.rows[-1]["step"] == step else None
            self.partial = {"row": row, "names": sorted(readings)}
        place = len(self.rows)
        while place and self.rows[place - 1]["step"] > step:
            place -= 1
        if place <= self._early[1]:  # among those that are packed already
            self._early = (self.rows, 0, None)
        if place and self.rows[place - 1]["step"] == step:
            self.rows[place - 1].update({"epoch": epoch, **readings})
        else:
            self.rows.insert(place, {"epoch": epoch, "step": step, **readings})
        if self.path is not None:
            try:
                self._append({"epoch": epoch, "step": step, **readings})
            except OSError as error:
                self._fall_behind(error)

    def _append(self, row: dict[str, Any]) -> None:
        assert self.path is not None  # as add has seen
        if self._behind:
            self._write_anew()
            return
        if self.guard is None:  # else there is a run whose directory it is
            self.path.parent.mkdir(parents=True, exist_ok=True)
        else:
            self.guard()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _UNFOLLOWED, 0o666)
        with open(file, "a", encoding="utf-8") as stream:  # noqa: PTH123  # it is open
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"{self.path} is no file")
            stream.write(json.dumps(_jsonable(row), allow_nan=False) + "\n")

    def _fall_behind(self, error: OSError) -> None:
        if not self._behind:
            warnings.warn(
                f"{self.path} could not be written: {error}. Its rows are kept in memory, and written when that is possible "
                f"again",
                AxonWarning,
                stacklevel=3,
            )
        self._behind = True

    def take_back(self) -> None:
        """Drop what was read only because a fit ended within an epoch: for a run that goes on as if it had not."""
        if self.partial is not None:
            before, now = self.partial["row"] or {}, self.rows.pop()
            names = self.partial.get("names", now)
            # What was recorded since, as by a person between two fits, is of the step and stays.
            kept = {name: value for name, value in now.items() if name not in names and name not in display.COUNTERS}
            if before or kept:
                counters = {name: now[name] for name in display.COUNTERS if name in now}
                self.rows.append({**counters, **before, **kept})
            self.partial = None

    def rewrite(self) -> None:
        """Bring the file to these rows, at once or not at all: it may have rows of steps that a killed run has lost.

        Raises:
            ConfigurationError: if a link is in its place, or something else that is no file.
        """
        if self.path is None:
            return
        found = self.path.lstat() if os.path.lexists(self.path) else None
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"{self.path} is a link, or no file: a run has a file of its own there; remove it")
        if not self.rows and found is None:
            return
        try:
            self._write_anew()
        except OSError as error:
            self._fall_behind(error)

    def _write_anew(self) -> None:
        assert self.path is not None  # as whoever calls has seen
        if self.guard is not None:
            self.guard()
        lines = [json.dumps(_jsonable(row), allow_nan=False) + "\n" for row in self.rows]
        left = re.compile(rf"{re.escape(self.path.name)}\.tmp-[0-9a-f]{{32}}")
        for one in self.path.parent.iterdir():
            if left.fullmatch(one.name):  # by a run that was killed
                with suppress(OSError):
                    one.unlink()
        beside = self.path.with_name(f"{self.path.name}.tmp-{uuid.uuid4().hex}")
        try:
            file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _UNFOLLOWED, 0o666)
            with open(file, "w", encoding="utf-8") as stream:  # noqa: PTH123  # it is open
                stream.writelines(lines)
                stream.flush()
                os.fsync(file)
            beside.replace(self.path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        self._behind = False

    @property
    def columns(self) -> list[str]:
        """The names of the readings."""
        return list({name: None for row in self.rows for name in row if name not in ABOUT})

    def best(self, name: str, mode: str = "min") -> dict[str, Any]:
        """The row whose reading ``name`` is the lowest (``mode="min"``) or highest (``"max"``); never one that is NaN."""
        if mode not in ("min", "max"):
            raise unknown("mode", mode, ("min", "max"))
        rows = [row for row in self.rows if isinstance(row.get(name), (int, float)) and not math.isnan(row[name])]
        if not rows:
            raise unknown("reading", name, self.columns)
        return (min if mode == "min" else max)(rows, key=lambda row: row[name])

    def state_dict(self) -> dict[str, Any]:
        """The rows: the last ones as they are; what is before them, once it is long, by columns, as tensors.

        A million rows would be far more text than a checkpoint is read with.
        """
        count = max(0, len(self.rows) - 1) // PACKED * PACKED  # the last row may change yet
        if self._early[0] is not self.rows or self._early[1] != count:
            self._early = (self.rows, count, _columns(self._kept(count)) if count else None)
        return {"history": self.rows[count:], "early": self._early[2], "partial": self.partial}

    def _kept(self, count: int) -> list[dict[str, Any]]:
        """Of so many rows the latest that are read back; of a history that long the file has the rest."""
        values, first = 0, count
        while first and (values := values + len(self.rows[first - 1])) <= MOST_EARLY:
            first -= 1
        if first:
            warnings.warn(
                f"the history has more than {MOST_EARLY:,} readings: a checkpoint keeps the latest of them, and its first "
                f"{first:,} rows are in history.jsonl alone. Record less often, as by every=100",
                AxonWarning,
                stacklevel=2,
            )
        return self.rows[first:count]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows that ``state_dict`` gave."""
        self.rows = [*_rows(state.get("early")), *state["history"]]
        self.partial = state.get("partial")

    def copy(self) -> History:
        """The readings so far, which stay as they are when more are added here."""
        copied = History()
        copied.rows = [dict(row) for row in self.rows]
        return copied

    def __getitem__(self, name: str) -> list[Any]:
        values = [row[name] for row in self.rows if name in row]
        if not values:
            raise unknown("reading", name, [*display.COUNTERS, *self.columns])
        return values

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __str__(self) -> str:
        return display.text_table(self.rows) if self.rows else "no readings"

    def __repr__(self) -> str:
        return f"History({len(self)} rows of {', '.join(self.columns) or 'nothing'})"

    def _repr_html_(self) -> str:
        return display.rich(self.rows, repr(self))


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows by columns: for each name in which rows it stands (None: in all), and its values."""
    places: dict[str, list[int]] = {}
    values: dict[str, list[Any]] = {}
    for index, row in enumerate(rows):
        for name, value in row.items():
            places.setdefault(name, []).append(index)
            values.setdefault(name, []).append(value)
    return {
        name: {"rows": None if len(at) == len(rows) else torch.tensor(at), "values": _as_tensor(values[name])}
        for name, at in places.items()
    }


def _as_tensor(values: list[Any]) -> Any:
    kinds = {type(value) for value in values}
    if kinds == {float}:
        return torch.tensor(values, dtype=torch.float64)  # Python's own floats, to the last bit
    if kinds == {int} and all(abs(value) < 2**63 for value in values):
        return torch.tensor(values, dtype=torch.int64)
    return values


def _rows(columns: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if columns is None:
        return []
    found: list[dict[str, Any]] = [{} for _ in range(len(columns["step"]["values"]))]
    for name, column in columns.items():
        values = column["values"]
        places = range(len(found)) if column["rows"] is None else column["rows"].tolist()
        for place, value in zip(places, values.tolist() if isinstance(values, Tensor) else values, strict=True):
            found[place][name] = value
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf": JSON has no such numbers
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) else value
