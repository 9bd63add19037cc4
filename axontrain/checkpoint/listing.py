"""Listing: the checkpoints of a run directory as a table for a terminal, each verified, and why one is bad."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

from axontrain.checkpoint import directory as files
from axontrain.checkpoint.runs import LEFT, NAME, Entry, Keep, as_number, entries
from axontrain.display import number
from axontrain.errors import CheckpointError
from axontrain.shown import plain

HEADER = ("checkpoint", "epoch", "size", "written", "readings", "verdict")


def listed(directory: Path) -> tuple[str, bool]:
    """List the checkpoints of a run directory, oldest first, reading every byte of each.

    Returns:
        The table, and whether all of it is good.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    alone = (directory / files.MANIFEST).exists() or (NAME.fullmatch(directory.name) is not None and directory.is_dir())
    found = [_lone(directory)] if alone else entries(directory)
    if not found:
        why = "is not there" if not directory.exists() else "holds no checkpoint"
        raise CheckpointError(f"{directory} {why}: give the directory of a run, as in ax.Loop(..., directory=...)")
    problems = [_problem(entry) for entry in found]
    good = [entry for entry, problem in zip(found, problems, strict=True) if not problem]
    marks = {} if alone else _marks(good)
    rows = [HEADER, *(_row(entry, problem, marks.get(entry.path, [])) for entry, problem in zip(found, problems, strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left = sorted(path.name for path in directory.iterdir() if LEFT.fullmatch(path.name))
    if left:
        lines.append(
            f"left by saves that were killed, removed when the run goes on: {', '.join(plain(name, None) for name in left)}"
        )
    return "\n".join(lines), not any(problems)


def _lone(path: Path) -> Entry:
    try:
        about = files.about(path)
    except (CheckpointError, OSError) as error:
        return Entry(path, 0, {}, str(error))
    return Entry(path, 0, about)


def _problem(entry: Entry) -> str:
    if entry.problem:
        return entry.problem
    try:
        files.read(entry.path)  # more than its sums: that what they fit can be read
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def _marks(good: list[Entry]) -> dict[Path, list[str]]:
    """What is to be said of some among all that are good: which is the best, if it is known by what, and which is taken."""
    marks: dict[Path, list[str]] = {}
    said = [entry.about["best"] for entry in good if isinstance(entry.about.get("best"), dict)]
    monitor, mode = (said[-1].get("monitor"), said[-1].get("mode")) if said else (None, None)
    if isinstance(monitor, str) and mode in ("min", "max"):
        for entry in Keep(None, 1, monitor, mode).ranked(good)[:1]:
            marks[entry.path] = [f"best {plain(monitor)}"]
    if good:
        marks.setdefault(good[-1].path, []).append("the one that resume=True takes")
    return marks


def _row(entry: Entry, problem: str, marks: list[str]) -> tuple[str, ...]:
    about = entry.about
    epoch, readings, written = about.get("epoch"), about.get("readings"), about.get("time")
    told = readings.items() if isinstance(readings, dict) else ()
    return (
        plain(entry.path.name),
        str(epoch) if type(epoch) is int and abs(epoch) < 2**63 else "",
        _size(entry.path),
        _time(as_number(written)),
        plain(", ".join(f"{name} {number(value)}" for name, value in told if _is_shown(value)), None),
        f"BAD: {plain(problem, None)}" if problem else ", ".join(["good", *(["permanent"] if entry.permanent else []), *marks]),
    )


def _is_shown(value: object) -> bool:
    return isinstance(value, (bool, float)) or not math.isnan(as_number(value))


def _size(path: Path) -> str:
    try:
        size = float(sum(file.lstat().st_size for file in path.iterdir()))
    except OSError:
        return ""
    power = 0
    while size >= 999.5 and power < 4:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _time(written: float) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(written):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, OSError, ValueError):
        return ""
