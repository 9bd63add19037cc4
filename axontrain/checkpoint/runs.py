"""Runs: the checkpoints of a run directory: their names, the newest that verifies, which are kept, what a killed save left."""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axontrain.checkpoint import background
from axontrain.checkpoint import directory as files
from axontrain.display import COUNTERS
from axontrain.errors import CheckpointError, warn
from axontrain.state import LoopState

# What a killed save has left of a checkpoint whose name tells a reading is no such name.
NAME = re.compile(r"step-(?P<step>\d{9,18})(-((?!\.(tmp|old)-)[A-Za-z0-9_.+-]){1,120})?")
LEFT = re.compile(rf"(?P<name>{NAME.pattern})\.(?P<kind>tmp|old)-\d{{6}}-[0-9a-f]{{32}}")


MOST_NUMBER = 2**62


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint of a run directory.

    Attributes:
        path: its directory.
        step: as its name has it.
        about: what was said of it when it was written; empty where that cannot be read.
        problem: why it is no good, as far as was looked; "" if nothing is known.
        unseen: whether the problem is that it could not be looked at, as the disk had an error: it may be good.
    """

    path: Path
    step: int
    about: Mapping[str, Any]
    problem: str = ""
    unseen: bool = False

    @property
    def number(self) -> int:
        """Which one it is, by the order in which the run's checkpoints were written; 0 where that is not known."""
        number = self.about.get("number")
        return number if type(number) is int and 0 < number < MOST_NUMBER else 0

    @property
    def permanent(self) -> bool:
        """Whether it is never pruned."""
        return self.about.get("permanent") is True

    def reading(self, name: str) -> float:
        """What was read at its step; NaN if nothing was."""
        readings = self.about.get("readings")
        return as_number(readings.get(name)) if isinstance(readings, Mapping) else math.nan


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints of a run are kept: the last ones, the best ones, and the permanent ones.

    Args:
        last: how many of the newest; None keeps all.
        best: how many of the best by ``monitor``.
        monitor: a reading's name.
        mode: "min" or "max", which is better.
    """

    last: int | None
    best: int = 0
    monitor: str | None = None
    mode: str = "min"

    def ranked(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that have a reading, the best first; of equal ones the earlier first. NaN is no reading."""
        if self.monitor is None:
            return []
        monitor, sign = self.monitor, -1 if self.mode == "max" else 1
        known = [entry for entry in entries if not entry.problem and not math.isnan(entry.reading(monitor))]
        return sorted(known, key=lambda entry: sign * entry.reading(monitor))  # stable: entries come oldest first

    def is_among_best(self, value: float, entries: Iterable[Entry]) -> bool:
        """Whether a new reading is one of the best."""
        if math.isnan(value) or self.monitor is None:
            return False
        better = self.ranked(entries)[: self.best]
        if len(better) < self.best:
            return True
        worst = better[-1].reading(self.monitor)
        return value > worst if self.mode == "max" else value < worst

    def superfluous(self, entries: list[Entry]) -> list[Entry]:
        """What of the entries, oldest first, is to go. The last entry, which was just written and verified, never is.

        Nor is one that has a problem: it may be a permanent one or one of the best, and the problem may pass.
        """
        if self.last is None:
            return []
        good = [entry for entry in entries if not entry.problem]
        kept = {id(entry) for entry in (*good[-self.last :], *self.ranked(good)[: self.best], *entries[-1:])}
        return [entry for entry in good if id(entry) not in kept and not entry.permanent]


def name_of(step: int, reading: str | None = None, value: float = math.nan) -> str:
    """The name of the checkpoint of a step, and of the reading that it is ranked by.

    >>> name_of(123), name_of(123, "val/loss", 0.25), name_of(123, "../loss", float("nan"))
    ('step-000000123', 'step-000000123-val_loss-0.25', 'step-000000123')
    """
    name = f"step-{step:09d}"
    if reading is None or not math.isfinite(value):
        return name
    # A reading's name is the user's text: nothing in it may be taken for a path.
    return f"{name}-{re.sub(r'[^A-Za-z0-9]+', '_', reading).strip('_')[:80]}-{value:.6g}"


def as_number(value: Any) -> float:
    """A reading as it is ranked; NaN if it is no number, or larger than any that a reading has.

    >>> as_number(3), as_number(True), as_number(10**400)
    (3.0, nan, nan)
    """
    if isinstance(value, float):
        return value
    return float(value) if type(value) is int and abs(value) < 2**1000 else math.nan


def row_at(state: LoopState) -> Mapping[str, Any]:
    """What was read at this very step. What was read only because a fit ended here is not: it is of a part of an epoch."""
    history = state.history
    if not history.rows or history.rows[-1]["step"] != state.step:
        return {}
    row: Mapping[str, Any] | None = history.rows[-1] if history.partial is None else history.partial["row"]
    return row or {}


def told_of(state: LoopState) -> dict[str, Any]:
    """What a list of checkpoints shows of a state: where it stands, and what was read at this very step."""
    row = row_at(state)
    readings = {name: value for name, value in row.items() if name not in COUNTERS and isinstance(value, (int, float))}
    return {
        "step": state.step,
        "epoch": state.epoch,
        "batch_index": state.batch_index,
        "readings": readings,
        "versions": dict(state.setup.get("versions", {})),
    }


def entries(directory: Path) -> list[Entry]:
    """The checkpoints of a run directory, oldest first, as far as a glance tells: the large files are not read."""
    found = []
    there = sorted(directory.iterdir()) if directory.is_dir() else []
    aside = {}  # of a save of the same name that was killed between its two renames: the last of them is the checkpoint
    for path in there:
        left = LEFT.fullmatch(path.name)
        if left is not None and left["kind"] == "old" and not os.path.lexists(directory / left["name"]):
            aside[left["name"]] = path
    for path in sorted([*(path for path in there if NAME.fullmatch(path.name)), *aside.values()]):
        match = re.match(NAME, path.name)
        assert match is not None  # so they were chosen
        about: Mapping[str, Any] = {}
        problem, unseen = "", False
        try:
            if not stat.S_ISDIR(path.lstat().st_mode):
                raise CheckpointError(f"{path} is no directory of its own")
            about = files.about(path)
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem, unseen = _not_looked_at(path, error), True
        if problem and path in aside.values():  # debris, which a save will sweep
            continue
        found.append(Entry(path, int(match["step"]), about, problem, unseen))
    # By the order in which they were written: who goes back to an early step and on from there makes newer ones of lower steps.
    found.sort(key=lambda entry: (entry.step, entry.path.name))
    number, behind, order = 0, 0, {}
    for entry in found:
        number, behind = (entry.number, 0) if entry.number else (number, behind + 1)
        order[id(entry)] = number, behind
    return sorted(found, key=lambda entry: order[id(entry)])


def newest(directory: Path) -> tuple[Path, Any] | None:
    """The newest checkpoint that verifies, and its tree; None if there is no checkpoint at all.

    A warning names those that were passed over, and what is wrong with them.

    Raises:
        CheckpointError: if there are checkpoints, and none is good.
    """
    there = entries(directory)
    found, bad = _first_good(there)
    while bad and _paths(now := entries(directory)) != _paths(there):  # somebody saves meanwhile, and prunes
        there = now
        found, bad = _first_good(there)
    if found is None and bad:
        raise CheckpointError(
            f"no checkpoint in {directory} is good: {'; '.join(bad)}. Take one from a copy, or begin anew in another directory"
        )
    if found is not None and bad:
        warn(f"{'; '.join(bad)}. Went on from the next older good one, {found[0]}")
    return found


def _paths(there: list[Entry]) -> list[Path]:
    return [entry.path for entry in there]


def _first_good(there: list[Entry]) -> tuple[tuple[Path, Any] | None, list[str]]:
    """The newest of the entries that verifies, with its tree, and what is wrong with those that were passed over."""
    bad: list[str] = []
    for entry in reversed(there):
        try:
            if entry.problem:
                raise CheckpointError(entry.problem)
            return (entry.path, files.read(entry.path)), bad
        except CheckpointError as error:
            bad.append(str(error))
        except OSError as error:
            bad.append(_not_looked_at(entry.path, error))
    return None, bad


def read(path: Path) -> Any:
    """The tree of a checkpoint's directory, or of the newest good one of a run directory."""
    if path.is_dir() and entries(path):
        found = newest(path)
        return None if found is None else found[1]
    return files.read(path)


def commit(directory: Path, name: str, what: files.Encoded, keep: Keep, verified: Collection[str] = ()) -> list[str]:
    """Write a checkpoint, verified, and only then prune what is superfluous.

    Args:
        directory: of the run; it has to be there.
        name: as :func:`name_of` makes it.
        what: the state, made ready.
        keep: what is not superfluous.
        verified: the names of checkpoints that this run has seen to be good; others are read before they count among the
            last, lest a damaged one push out a good one.

    Returns:
        The names of those that were seen to be good: the new one, and what else was read.
    """
    path = files.commit(directory / name, what)
    there = [entry for entry in entries(directory) if entry.path != path]
    written = Entry(path, int(NAME.fullmatch(name)["step"]), files.about(path))  # type: ignore[index]  # it is such a name
    # Another checkpoint of the same step is from before a fault that this run has gone back behind.
    again = [entry for entry in there if entry.step == written.step]
    rest = [*(entry for entry in there if entry.step != written.step), written]
    looked_at, good = looked_at_best(*_looked_at(rest, keep, verified), keep, [*verified, name])
    for entry in (*again, *keep.superfluous(looked_at)):
        _remove(entry.path)
    return [name, *good]


def looked_at_best(there: list[Entry], good: list[str], keep: Keep, verified: Collection[str]) -> tuple[list[Entry], list[str]]:
    """The entries, where those that would count among the best were read whole; and the names of what was seen to be good."""
    there, good = list(there), list(good)
    while True:
        unknown = [e for e in keep.ranked(there)[: keep.best] if e.path.name not in verified and e.path.name not in good]
        if not unknown:
            return there, good
        for entry in unknown:
            seen = _read_whole(entry)
            if not seen.problem:
                good.append(entry.path.name)
            there[there.index(entry)] = seen


def verified(entry: Entry) -> bool:
    """Whether a checkpoint is good: it is read whole."""
    return not entry.problem and not _read_whole(entry).problem


def _read_whole(entry: Entry) -> Entry:
    try:
        files.verify(entry.path)
    except CheckpointError as error:
        return replace(entry, problem=str(error))
    except OSError as error:
        return replace(entry, problem=_not_looked_at(entry.path, error), unseen=True)
    return entry


def _looked_at(there: list[Entry], keep: Keep, verified: Collection[str]) -> tuple[list[Entry], list[str]]:
    """The entries, where those that would count among the last were read whole; and the names of what was seen to be good."""
    looked_at, good = [], []
    wanted = 0 if keep.last is None else keep.last - 1  # the newest has just been verified
    for entry in reversed(there[:-1]):
        seen = entry
        if wanted > 0 and not entry.problem and entry.path.name not in verified:
            seen = _read_whole(entry)
            if not seen.problem:
                good.append(entry.path.name)
        wanted -= not seen.problem
        looked_at.append(seen)
    return [*reversed(looked_at), there[-1]], good


def _not_looked_at(path: Path, error: OSError) -> str:
    return f"{path} could not be looked at, which says nothing of it: {error}"


def abandon(path: Path, tree: Any) -> None:
    """Go back to a checkpoint for good: those that were written after it are removed, and it holds the state that goes on."""
    told = files.about(path)
    number = told.get("number", 0)
    for entry in entries(path.parent):
        if entry.path != path and entry.number > number:
            _remove(entry.path)
    files.write(path, tree, told)


def sweep(directory: Path, name: str | None = None) -> list[str]:
    """Remove what saves that were killed have left in a run directory, all or those of one name; returns what it found.

    A checkpoint that had stepped aside for one that never came is put back, of several the last. What this process still
    writes there, for a fit that was not waited for, is no leftover: that is waited for now.
    """
    background.settle(directory)
    swept = []
    for path in sorted(directory.iterdir(), reverse=True) if directory.is_dir() else ():
        match = LEFT.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        target = directory / match["name"]
        aside = match["kind"] == "old" and not path.is_symlink()
        try:
            back = aside and not _verifies(target) and _verifies(path)
        except OSError:  # it may be all that there is: the next sweep may see
            continue
        if back:
            if os.path.lexists(target):
                _remove(target)
            path.rename(target)
        else:
            _remove(path)
        swept.append(path.name)
    return swept


def _verifies(path: Path) -> bool:
    try:
        files.verify(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
        return
    if not LEFT.fullmatch(path.name):
        # Renamed first, so that what is killed half-way is debris, and no checkpoint that lacks a file.
        aside = files.beside(path, "tmp")
        with suppress(OSError):
            path.rename(aside)
            path = aside
    shutil.rmtree(path, ignore_errors=True)
