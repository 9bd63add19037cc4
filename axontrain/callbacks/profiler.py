"""Profiler: a trace of chosen steps, for Perfetto."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from axontrain.callback import Answer, Reader
from axontrain.errors import ConfigurationError, warn, whole
from axontrain.state import LoopState

FOLDER = "profile"  # in the run directory
SETTLED = 10  # steps after which allocators, autotuning and optimizers have done what they do once


class Profiler(Reader):
    """Record chosen steps with ``torch.profiler``, each recording as a file that https://ui.perfetto.dev opens.

    A recording begins when it is due: ``every=``, ``first=``, ``after=``, ``before=`` (see :class:`axontrain.Every`). First
    come ``warmup`` steps, in which the profiler gets ready, as it has to on a GPU; then ``steps`` steps are recorded. Without
    ``every=`` and ``first=`` it is once; without any of them, once after ten steps. Steps have the numbers that the history
    has: ``after=100`` warms up in step 101, and records from step 102 on.

    In the trace there are ``data``, the wait for a batch; ``step 102``, from there to the end of the update; and torch's
    ``ProfilerStep#102``, from one ``data`` to the next, which tools go by. What lies between two recorded steps is recorded
    too, as a validation. Outside of recordings nothing is profiled. Training is the same to the bit.

    Args:
        directory: where the files go; "profile" in the run directory, unless given. A file has the number of its first step,
            ``step-000000102.json``, and one of that name is replaced.
        steps: how many steps in a row; or which, as ``range(100, 103)`` for the steps 100, 101 and 102.
        warmup: how many steps before them, as far as there are.
        record_shapes: note the shapes that operations are given.
        profile_memory: note what is allocated and freed.
        compress: write ``.json.gz``, which Perfetto opens too.

    Attributes:
        files: the paths that were written, in their order.

    >>> Profiler("traces", steps=range(100, 103)).steps
    range(100, 103)
    >>> Profiler(every="1 epoch", first=3, steps=5)
    Profiler(steps=5, every=Every('1 epochs', first=3))

    Raises:
        ConfigurationError: when a fit begins, if there is nowhere to write to, or another profiler is at work: there can be
            one at a time.
    """

    asks = ("after_batch",)
    takes_time = True
    _at_work: weakref.ref[Profiler] | None = None  # the one of the fit that is running, of all in this process

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        steps: int | range = 3,
        warmup: int = 1,
        record_shapes: bool = False,
        profile_memory: bool = False,
        compress: bool = False,
        **cadence: Any,
    ) -> None:
        words = {name: given for name, given in cadence.items() if given is not None}
        if isinstance(steps, range):
            if not steps or steps.step != 1 or steps.start < 1:
                raise ConfigurationError(f"steps={steps!r}: steps in a row, from 1 on, as range(100, 103) for 100, 101 and 102")
            if timed := sorted(words.keys() & {"every", "first", "after", "before"}):
                raise ConfigurationError(f"steps={steps!r} says when, and so does {timed[0]}=: give a number of steps to that")
        elif isinstance(steps, (tuple, list)):
            raise ConfigurationError(f"steps={steps!r}: a number of steps, or which, as range(100, 103) for 100, 101 and 102")
        else:
            steps = whole("steps", steps, what="of steps")
            if "every" not in words:
                cadence = {"first": 1, **({"after": SETTLED} if not words else {}), **words}
        super().__init__(**cadence)
        if directory is not None and (not isinstance(directory, (str, Path)) or not str(directory)):
            raise ConfigurationError(f"directory={directory!r}: a path, as 'traces'; None is 'profile' in the run directory")
        # Not with_stack: ranges that begin in a hook and outlive it would cross those of Python functions, and Perfetto drops
        # what crosses another.
        options = {"record_shapes": record_shapes, "profile_memory": profile_memory}
        for name, given in {**options, "compress": compress}.items():
            if not isinstance(given, bool):
                raise ConfigurationError(f"{name}={given!r}: True or False")
        self.directory = None if directory is None else Path(directory)
        self.steps, self.warmup = steps, whole("warmup", warmup, least=0, what="of steps")
        self.options, self.compress = options, compress
        self.files: list[Path] = []
        self._where = Path()
        self._first, self._last = 1, 0  # of the steps to be recorded: none
        self._at = 0  # the step that the profiler is at
        self._profile: Any = None  # torch's, while it is at work
        self._range: Any = None  # of the step that is being recorded
        self._within = False  # whether a step was, in this recording
        self._recorded = False  # whether one was, in this fit

    def __repr__(self) -> str:
        when = "" if self.every is None else f", every={self.every!r}"
        return f"Profiler(steps={self.steps!r}{when})"

    def before_fit(self, state: LoopState) -> Answer:
        """Complain now rather than when the steps have come."""
        if self.directory is None and state.directory is None:
            raise ConfigurationError(
                f"{self!r} has nowhere to write to: ax.Profiler('traces', ...), or ax.Loop(..., directory='runs/first')"
            )
        other = None if Profiler._at_work is None else Profiler._at_work()
        if other is not None:
            raise ConfigurationError(
                f"{self!r} and {other!r} at once: torch's profiler records for one at a time. One does all of it, as "
                f"ax.Profiler(every='1 epoch', steps=3)"
            )
        _check_free()
        # One of the two is there, as was seen above.
        self._where = self.directory if self.directory is not None else state.directory / FOLDER  # type: ignore[operator]
        try:
            self._where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{self!r} cannot write to {self._where}: {error.strerror or error}") from error
        self._first, self._last = (self.steps[0], self.steps[-1]) if isinstance(self.steps, range) else (1, 0)
        self._recorded = False
        Profiler._at_work = weakref.ref(self)
        return None

    def reading(self, batches: Iterator[Any], state: LoopState) -> Iterator[Any]:
        """Begin where the loop asks for the batch of a step, so that the wait for it is seen."""
        while True:
            self._end_range()  # of a step that a hook has left out
            over = state.batch_index == state.epoch_length  # as far as is known: then no step follows
            if not over:
                self._advance(state)
            try:
                if self._profile is None:
                    batch = next(batches)
                else:
                    with torch.profiler.record_function("data"):
                        batch = next(batches)
            except StopIteration:
                return
            if over:
                self._advance(state)
            if self._profile is not None:
                self._within = self._at >= self._first
                self._range = torch.profiler.record_function(f"step {self._at}")
                self._range.__enter__()
            yield batch

    def after_batch(self, state: LoopState) -> Answer:
        """End where the last step ends; where none is recorded, look whether one is to be."""
        if self._profile is not None:
            self._end_range()
            if state.step >= self._last:
                self._finish()
        if self._profile is None and isinstance(self.steps, int) and self.cadences["after_batch"].due(state):
            self._first = state.step + 1 + self.warmup
            self._last = self._first + self.steps - 1
        return None

    def after_fit(self, state: LoopState) -> Answer:
        """Write what there is of a recording that the fit's end, an error or an interruption has cut short."""
        if Profiler._at_work is None or Profiler._at_work() is not self:
            return None
        Profiler._at_work = None
        self._finish()
        # What was to come and did not: nobody would know why there is no file.
        pending = state.step < self._first <= self._last
        never = isinstance(self.steps, int) and not self.cadences["after_batch"].fired
        if not self._recorded and (pending or never) and state.status == "completed":
            begins = f"step {self._first}" if pending else "a recording was due"
            warn(f"{self!r} recorded nothing: the fit ended at step {state.step}, before {begins}")
        return None

    def _advance(self, state: LoopState) -> None:
        """The profiler gets ready, or begins to record, where that is due; else it is told that another step begins."""
        step = state.step + 1
        if self._profile is None:
            if self._first - self.warmup <= step <= self._last:
                self._begin(step, _activities(state))
        elif step != self._at:
            self._profile.step()
        self._at = step

    def _begin(self, step: int, activities: list[Any]) -> None:
        _check_free()
        self._first = first = max(self._first, step)
        action = torch.profiler.ProfilerAction

        def schedule(number: int) -> Any:  # torch asks for 0 too, before it knows of the step
            return action.RECORD if max(number, step) >= first else action.WARMUP

        # The options are each of their own kind.
        profile = torch.profiler.profile(activities=activities, schedule=schedule, **self.options)  # type: ignore[arg-type]
        profile.step_num = step
        profile.__enter__()  # type: ignore[no-untyped-call]  # torch's own
        self._profile, self._within = profile, False

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _finish(self) -> None:
        """Stop the profiler, if it is at work, and write what it has recorded, if it has."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        self._end_range()
        profile.__exit__(None, None, None)
        if self._within:
            self._recorded = True
            self._write(profile)

    def _write(self, profile: Any) -> None:
        suffix = ".json.gz" if self.compress else ".json"  # by which torch compresses
        path = self._where / f"step-{self._first:09d}{suffix}"
        beside = self._where / f".tmp-{uuid.uuid4().hex}{suffix}"
        try:
            profile.export_chrome_trace(str(beside))
            beside.replace(path)
        except (OSError, RuntimeError) as error:  # no reason to lose what was trained
            warn(f"{self!r}: the trace {path} could not be written: {error}")
        else:
            self.files.append(path)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def _check_free() -> None:
    """Raise if a profiler is at work in this thread: another one would take its recording from it, without a word."""
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]  # private, and torch has no other way to ask
        raise ConfigurationError(
            "ax.Profiler within a torch.profiler that is recording: there can be one at a time, so leave one of them out"
        )


def _activities(state: LoopState) -> list[Any]:
    """What is recorded: the host, and the device of the objective, where the profiler knows it."""
    kinds = torch.profiler.ProfilerActivity
    there = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]  # torch's own
    devices = {parameter.device.type.upper() for parameter in state.objective.parameters()}
    of_devices = [getattr(kinds, name) for name in sorted(devices - {"CPU"}) if hasattr(kinds, name)]
    return [kinds.CPU, *(kind for kind in of_devices if kind in there)]
