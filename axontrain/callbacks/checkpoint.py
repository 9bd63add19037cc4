"""Checkpoint: the whole state, saved into the run directory at a cadence, the best kept, the superfluous pruned."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from axontrain.callback import Answer, Saver
from axontrain.callbacks.monitor import better_of
from axontrain.checkpoint import background, directory, lock, runs
from axontrain.checkpoint.encode import encode
from axontrain.checkpoint.snapshot import Snapshot, kept_from_forks
from axontrain.clock import Cadence, Every
from axontrain.errors import AxonWarning, CheckpointError, ConfigurationError, unknown, whole
from axontrain.state import LoopState

# Below this, writing costs less than the fork and the copies that it makes training pay for.
SMALL_BYTES = 8 * 2**20
DEFAULT = ("1 epoch", "10 min")
RETURN = "put it back where it was, and go on by fit(..., resume=True)"


class Checkpoint(Saver):
    """Save the whole state into the Loop's ``directory``, so that ``fit(..., resume=True)`` goes on from there.

    A Loop with a directory has one of these unless it is given another; the end of a fit is always saved, that by Ctrl-C or
    SIGTERM too. Checkpoints are committed whole, verified, and only then are older ones pruned. Large states are written by
    another process while training goes on; a failure there is told at the next step, and the fit does not end before it.

    Args:
        every: when to save (see :class:`axontrain.Every`); unless given, at each epoch's end and every ten minutes.
        keep_last: how many of the newest to keep; None keeps all. With two, one may be damaged.
        best: a reading, as ``"val/loss"``: whenever it is read and is one of the best, the state of that step is saved, and
            its name tells the reading. NaN is never a best; of equal ones the earlier stays.
        keep_best: how many of the best to keep, beside the last; one unless given.
        mode: "min" or "max", which is better; told from the name where it is a known one.
        permanent: save at these times too, and never prune what was saved then: a cadence, as ``"10 epochs"``.
        on_failure: "raise" ends the fit when a checkpoint cannot be written; "warn" trains on without it. What was written
            before is intact in either case.
        asynchronous: write in another process: None where that pays and the fit runs in the main thread, as the system ends
            such a process with the thread that began it; False never, True always (Linux).
        first, after, before: of ``every``: see :class:`axontrain.Every`.

    >>> Checkpoint(every="1000 steps", keep_last=3, best="val/accuracy", keep_best=2)
    Checkpoint(every='1000 steps', keep_last=3, best='val/accuracy', keep_best=2)
    """

    def __init__(
        self,
        every: Any = None,
        *,
        keep_last: int | None = 2,
        best: str | None = None,
        keep_best: int | None = None,
        mode: str | None = None,
        permanent: Any = None,
        on_failure: str = "raise",
        asynchronous: bool | None = None,
        **bounds: Any,
    ) -> None:
        bounded = any(bound is not None for bound in bounds.values())
        super().__init__(every=DEFAULT[0] if every is None and bounded else every, **bounds)
        if mode not in (None, "min", "max"):
            raise unknown("mode", mode, ("min", "max"))
        if on_failure not in ("raise", "warn"):
            raise unknown("on_failure", on_failure, ("raise", "warn"))
        if best is not None and (not isinstance(best, str) or not best):
            raise ConfigurationError(f"best={best!r}: the name of a reading, as 'val/loss'")
        for option, given in (("mode", mode), ("keep_best", keep_best)):
            if best is None and given is not None:
                raise ConfigurationError(f"{option}={given!r} is of the best: say by which reading, as best='val/loss'")
        if asynchronous is not None and not isinstance(asynchronous, bool):
            raise ConfigurationError(f"asynchronous={asynchronous!r}: None, True or False")
        if asynchronous and not background.AVAILABLE:
            raise ConfigurationError(
                "asynchronous=True: this platform has no safe fork; leave it out, and saves are waited for"
            )
        last = None if keep_last is None else whole("keep_last", keep_last, what="of checkpoints")
        count = 0 if best is None else whole("keep_best", 1 if keep_best is None else keep_best, what="of checkpoints")
        self.keep = runs.Keep(last, count, best, mode or ("min" if best is None else _better_of(best)))
        self.permanent = None if permanent is None else Every.parse(permanent, "permanent")
        for option, cadence in (("every", self.every), ("permanent", self.permanent)):
            interval = None if cadence is None else cadence.interval
            if interval is not None and interval.unit == "percent" and interval.amount > 100:
                raise ConfigurationError(f"{option}='{interval}' is never due: a run is over at 100%")
        self.on_failure, self.asynchronous = on_failure, asynchronous
        self._cadences: list[Cadence] = []
        self._permanent: Cadence | None = None
        self._job: background.Job | None = None
        self._snapshot = Snapshot()
        self._writing = Path()  # what the job writes
        self._at: tuple[int, int, int, bool] | None = None  # the place in the run that was saved last
        self._at_permanent = False
        self._verified: set[str] = set()  # the names of checkpoints that this fit has seen to be good
        self._number = 0  # of the last that this fit has written
        self._known = False  # whether the reading that is ranked by was there
        self._directory: Path | None = None
        self._key = (0, 0)  # of the run directory
        self._sized = False  # whether it was seen how large the state is

    def __repr__(self) -> str:
        of = [] if self.every is None else [f"every='{self.every.interval or self.every.predicate}'"]
        of.append(f"keep_last={self.keep.last}")
        if self.keep.monitor is not None:
            of += [f"best={self.keep.monitor!r}", f"keep_best={self.keep.best}"]
        return f"Checkpoint({', '.join(of)})"

    @property
    def writing(self) -> bool:
        """Whether another process is writing a checkpoint just now."""
        return self._job is not None and not self._job.over()

    @property
    def best_path(self) -> Path | None:
        """Where the best checkpoint of the last fit's directory lies, for ``ax.load_weights``; None if there is none."""
        if self._directory is None:
            return None
        if self._job is not None:
            self._finish()
        ranked = self.keep.ranked(self._seen_whole(runs.entries(self._directory)))
        return ranked[0].path if ranked else None

    def _seen_whole(self, entries: list[runs.Entry]) -> list[runs.Entry]:
        """The entries; those of the best that this fit has not seen to be good were read, lest a damaged one rank."""
        entries, good = runs.looked_at_best(entries, [], self.keep, self._verified)
        self._verified.update(good)
        return entries

    def before_fit(self, state: LoopState) -> Answer:
        """Complain now rather than when there is something to lose."""
        if state.directory is None:
            raise ConfigurationError(f"{self!r} has nowhere to save to: ax.Loop(..., directory='runs/first')")
        if self.keep.monitor is not None and self.keep.monitor.startswith("val/") and not state.validates:
            raise ConfigurationError(
                f"{self!r} ranks by {self.keep.monitor!r}, but this fit has no validation data: fit(train, validation, ...)"
            )
        self._directory, self._key = state.directory, lock.key_of(state.directory)
        state.history.guard = partial(self._guard, state.directory)
        encode(state.live(), dict)  # what cannot be saved is an error before the first step
        every: tuple[str | Every, ...] = DEFAULT if self.every is None else (self.every,)
        self._cadences = [
            state.cadence(f"Checkpoint.every{number or ''}", Every.parse(one)) for number, one in enumerate(every)
        ]
        self._permanent = None if self.permanent is None else state.cadence("Checkpoint.permanent", self.permanent)
        for cadence in self._all():
            cadence.start(state, resumed=state.resumed)
        self._at, self._sized, self._known, self._verified, self._number = None, False, False, set(), 0
        return None

    def next_step(self, state: LoopState) -> float:
        """The next step at which one of the cadences can be due; the very next while something is being written."""
        if self._job is not None or not self._sized:
            return state.step + 1
        return min(cadence.next_step(state) for cadence in self._all())

    def seconds_left(self, state: LoopState) -> float:
        """The time until one of the cadences is due."""
        return min(cadence.seconds_left(state) for cadence in self._all())

    def at_step_end(self, state: LoopState) -> None:
        """Save, where a cadence is due or the reading is one of the best."""
        if self._job is not None and self._job.over():
            self._finish()
        if not self._sized:  # after the first step, when optimizers have their states
            self._sized = True
            tree = state.live()
            if self.on_failure == "raise":
                encode(tree, dict)  # so that what optimizers hold is looked at now
            if self._goes_apart(tree):
                self._snapshot.reserve(int(1.02 * _bytes(tree)))
        due = [cadence.due(state) for cadence in self._all()]  # each is asked, since asking takes the occasion
        permanent = self._permanent is not None and due[-1]
        if any(due) or self._is_best(state):
            state.settle()  # who goes back from here may need the one that this would push out
            self._save(state, permanent=permanent)
        self._look(state)

    def at_fit_end(self, state: LoopState) -> None:
        """Save where the fit has ended, unless that was done already; wait until it is written."""
        self._finish()
        saved = self._at == _place(state)
        undone = state.owed or state.halt is not None or state.history.partial is not None
        if not saved or undone:
            self._save(state, permanent=saved and self._at_permanent, wait=True)
        monitor = self.keep.monitor
        readings = [row[monitor] for row in state.history if monitor in row]
        if readings and all(isinstance(value, float) and math.isnan(value) for value in readings):
            warnings.warn(
                f"{self!r}: {monitor!r} was NaN whenever it was read, so no checkpoint was kept for being the best",
                AxonWarning,
                stacklevel=2,
            )

    def close(self, state: LoopState) -> None:
        """Wait for what is being written. An error has ended the fit already, and is not to be hidden by another."""
        state.history.guard = None
        if isinstance(state.error, Exception):
            try:
                self._finish()
            except (CheckpointError, OSError) as error:
                state.error.add_note(str(error))
        elif state.error is None:
            self._finish()
        # After a second Ctrl-C nothing is waited for, but by the end of the program.
        self._snapshot = Snapshot()

    def _all(self) -> list[Cadence]:
        return self._cadences if self._permanent is None else [*self._cadences, self._permanent]

    def _is_best(self, state: LoopState) -> bool:
        value = self._reading(state)
        if math.isnan(value):
            return False
        if self._job is not None:  # of which it is not known yet
            self._finish()
        try:
            there = [entry for entry in runs.entries(_directory(state)) if entry.step != state.step]
            return self.keep.is_among_best(value, self._seen_whole(there))
        except OSError:  # which saving will tell
            return True

    def _reading(self, state: LoopState) -> float:
        """The reading that checkpoints are ranked by, if it was taken at this very step."""
        value = runs.row_at(state).get(self.keep.monitor or "")
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigurationError(f"{self!r} ranks by a reading that is no single number")
        return runs.as_number(value)

    def _look(self, state: LoopState) -> None:
        """Complain when readings of its kind have come, and the one that is ranked by was not among them."""
        monitor = self.keep.monitor
        if monitor is None or self._known:
            return
        self._known = monitor in state.values
        if monitor.startswith("val/"):
            came = any(name.startswith("val/") for name in runs.row_at(state))
        else:
            came = state.batch_index == 0 and not state.in_epoch
        if came and not self._known:
            raise unknown(f"reading ranked by {self!r}:", monitor, state.values)

    def _guard(self, where: Path) -> None:
        """Keep the history from being written into another directory than this run's."""
        why = lock.lost(where, self._key)
        if why and self.on_failure == "raise":
            raise CheckpointError(f"{why}. Nothing more was written: {RETURN}")
        if why:
            raise OSError(why)

    def _save(self, state: LoopState, *, permanent: bool, wait: bool = False) -> None:
        self._finish()
        self.failed = False
        where = _directory(state)
        name = runs.name_of(state.step, self.keep.monitor, self._reading(state))
        self._writing = where / name
        try:
            if why := lock.lost(where, self._key):
                raise CheckpointError(why)
            there = runs.entries(where)
        except (CheckpointError, OSError) as error:
            self._fail(error)
            return
        number = max((entry.number for entry in there), default=0)
        number = max(number, self._number) + 1  # of those that could not be looked at it is not known
        state.newest = self._number = number
        self._verified &= {entry.path.name for entry in there}
        # A run that ended with a permanent one and is started again saves that step once more.
        permanent = permanent or any(entry.permanent for entry in there if entry.step == state.step)
        about = runs.told_of(state) | {"number": number, "permanent": permanent, "time": time.time()}
        if self.keep.monitor is not None:
            about["best"] = {"monitor": self.keep.monitor, "mode": self.keep.mode}
        live: list[Tensor] = []

        def place(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            live.extend(tensors.values())
            return self._snapshot.take(tensors)

        try:
            tree = state.live()
            apart = not wait and self._goes_apart(tree)
            what = directory.encoded(tree, about, place if apart else None)
        except CheckpointError as error:  # a callback's state has come to hold what none can
            self._fail(error)
            return
        work = partial(runs.commit, where, name, what, self.keep, frozenset(self._verified))
        self._at, self._at_permanent = _place(state), permanent
        if apart and self._begin(work, live):
            return
        try:
            self._verified.update(work() or ())
        except (OSError, CheckpointError) as error:
            self._fail(error)

    def _goes_apart(self, tree: Any) -> bool:
        if self.asynchronous is None:
            here = threading.current_thread() is threading.main_thread()
            return background.AVAILABLE and here and _bytes(tree) >= SMALL_BYTES
        return self.asynchronous

    def _begin(self, work: Callable[[], list[str]], live: list[Tensor]) -> bool:
        try:
            with kept_from_forks(live):
                self._job = background.Job(work, self._writing.parent)
        except OSError:  # no memory for another process: then in this one
            return False
        return True

    def _finish(self) -> None:
        """Wait for what is being written, and say what went wrong with it."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            self._verified.update(job.result() or ())
        except (OSError, CheckpointError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._at, self.failed = None, True
        why, then = "", "Those before it are as they were; make room, or choose another directory"
        with suppress(OSError):
            why = lock.lost(self._writing.parent, self._key)
            if why:
                then = f"Nothing more was written: {RETURN}"
            else:  # what a writer that was killed has left, which would pile up
                runs.sweep(self._writing.parent, self._writing.name)
        message = f"the checkpoint {self._writing.name} could not be written: {why or error}. {then}"
        if self.on_failure == "raise":
            raise CheckpointError(f"{message} (on_failure='warn' trains on)") from error
        warnings.warn(f"{message}. Training goes on", AxonWarning, stacklevel=2)


def _better_of(best: str) -> str:
    try:
        return better_of(best)
    except ConfigurationError:
        raise ConfigurationError(
            f"best={best!r}: say mode='min' or mode='max', the name does not tell which is better"
        ) from None


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _place(state: LoopState) -> tuple[int, int, int, bool]:
    return state.step, state.epoch, state.batch_index, state.in_epoch


def _directory(state: LoopState) -> Path:
    assert state.directory is not None  # before_fit has seen it
    return state.directory
