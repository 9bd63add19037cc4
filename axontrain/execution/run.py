"""Run: what one fit is made of, and the frame around it: generators, modes, signals, the outer hooks, errors' notes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from axontrain import randomness
from axontrain.callback import GoBack, Hooks, Reader, Saver
from axontrain.clock import Cadence, Plan
from axontrain.data.stream import Stream
from axontrain.errors import NonFiniteError, WorkerError
from axontrain.execution import modes
from axontrain.execution.blame import note_origin, note_samples
from axontrain.execution.graphing import Graphing
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.notes import note
from axontrain.execution.precision import Precision
from axontrain.execution.signals import SIGTERM, TERMINATED, interruptible
from axontrain.execution.steps import Runner
from axontrain.metrics.meter import Meter
from axontrain.objective import Objective, Step, task_of
from axontrain.state import LoopState, Result, Stop, StopEpoch

SIGNALLED = 0.3  # seconds within which a signal reaches all of a group of processes
READ_EVERY_SECONDS = 1.0  # often enough for an eye on the bar, too seldom to be felt
LOOK_AGAIN_SECONDS = 0.005  # whether a reading has arrived from the device
# What an interruption can leave undone at the end of a step: all of validating, all but the draws before it, after_epoch; or
# all that is due.
VALIDATE, EVALUATE, AFTER_EPOCH = "validate", "evaluate", "after epoch"
DUE = ["look up"]


@dataclass(slots=True)
class Run:
    """One fit: its data, its limits, its hooks, and when the loop next has to look up from its batches."""

    state: LoopState
    plan: Plan
    train: Stream
    validation: Stream | None
    judge: Objective  # of validation
    precision: Precision
    meter: Meter  # of validation
    validate: Cadence
    hooks: Hooks
    train_step: Runner
    first_step: int  # the state's, when it began
    next_step: float = 0
    next_time: float = 0.0
    next_reading: float = 0.0
    status: str = "completed"
    reason: str = ""
    batch: Any = None
    validated: bool = False
    exhausted: bool = False
    pending: Stop | StopEpoch | None = None  # what a hook had asked for when the run that is resumed was interrupted
    interrupt: str = ""  # Ctrl-C or SIGTERM, once it was seen
    terminated: bool = False
    savers: tuple[Saver, ...] = ()
    readers: tuple[Reader, ...] = ()
    graphing: Graphing | None = None
    again: Callable[[], Run] | None = None  # begins the same fit once more, resumed
    lock: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)

    def goes_on(self) -> bool:
        """Whether there is more to train: no limit reached, no stop asked for."""
        state, request = self.state, self.state.request
        if request is not None:  # kept with the state: a run that is resumed has to know
            state.halt = state.halting(pending=bool(self.interrupt))
        if self.interrupt or request is not None:
            self.status = "interrupted" if self.interrupt else "stopped"
            self.reason = self.interrupt or request.reason  # type: ignore[union-attr]  # one of the two is there
            return False
        reached = self.plan.over(self.state)
        if reached is not None:
            self.status, self.reason = "completed", reached
        return reached is None

    def begin_epoch(self) -> None:
        """``before_epoch``; where a run is resumed within an epoch, that has had its draws already."""
        state, hook = self.state, self.hooks.before_epoch
        if hook is not None:
            with again(state) if state.resumed and state.in_epoch else contextlib.nullcontext():
                hook(state)
        state.in_epoch = True

    def batches(self) -> Iterator[Any]:
        """The batches of the present epoch that have not been trained on; none once a stop was asked for."""
        state, self.exhausted = self.state, False
        if state.request is not None or self.interrupt:
            return
        try:
            batches = self.train.batches(state.seed, state.epoch, state.batch_index, state.step - state.batch_index)
            for reader in self.readers:
                batches = reader.reading(batches, state)
            for batch in batches:
                self.batch = batch
                yield batch
                self.batch = None
        except RuntimeError as error:
            if self.lost(error):
                return
            raise
        if state.batch_index == 0:
            raise self.train.empty()
        if state.step == self.plan.start_step and state.batch_index == self.plan.start_index:
            self.plan.start_epoch += 1  # nothing was left of the epoch that the last fit ended in: it is none of this one
        self.exhausted = True
        state.epoch_length = state.batch_index  # data of no known length has one now

    @property
    def record(self) -> Callable[[Step], None]:
        """What takes in each step: a plain dataset's go into one account, those of tasks into one for each."""
        return self.state.meter.record if self.train.of_one_task else self._record_by_task

    def _record_by_task(self, step: Step) -> None:
        self.state.meter.record(step, task_of(self.batch))

    def epoch_is_over(self) -> bool:
        """Whether the present epoch counts as completed: its batches are through, or a hook ended it."""
        state = self.state
        if state.owed:  # what is due within the epoch comes first, when the run is resumed
            return False
        through = state.batch_index == state.epoch_length  # not beyond it: data of no known length may give more than before
        return self.exhausted or through or isinstance(state.request, StopEpoch)

    def lost(self, error: Exception) -> bool:
        """Whether an error says that workers are gone because SIGTERM went to all of a group of processes."""
        if not isinstance(error, WorkerError) and "DataLoader worker" not in str(error):  # torch's own has no type for it
            return False
        ends = time.perf_counter() + SIGNALLED
        while not self.interrupt and time.perf_counter() < ends:  # they may have got it a moment before this process
            time.sleep(0.01)
        return bool(self.interrupt)

    def interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM was seen."""
        return bool(self.interrupt)

    def save(self) -> None:
        """Let those act who save, if all of this step is done."""
        if not self.state.owed:
            for saver in self.savers:
                saver.at_step_end(self.state)

    def exit_if_terminated(self) -> None:
        """After SIGTERM, when all is saved: end the program, as it was asked to."""
        if self.terminated:
            where = self.state.directory
            if where is None:
                told = "nothing was saved: Loop(..., directory=...) saves there, and fit(..., resume=True) then goes on"
            elif any(saver.failed for saver in self.savers):
                told = (
                    f"the state could not be saved; {where} is as it was before, and fit(..., resume=True) goes on from there"
                )
            else:
                told = f"the state was saved in {where}; fit(..., resume=True) goes on"
            print(f"axontrain: SIGTERM at step {self.state.step}: {told}", file=sys.stderr)
            raise SystemExit(TERMINATED)

    def look_ahead(self) -> None:
        """Work out at which step and at what time the loop next has to look up; the batches between need no thought."""
        state, plan = self.state, self.plan
        self.next_step = min(plan.last_step, self.validate.next_step(state), *(s.next_step(state) for s in self.savers))
        now = time.perf_counter()
        if now >= self.next_reading:
            self.next_reading = now + (LOOK_AGAIN_SECONDS if state.under_way else READ_EVERY_SECONDS)
        left = min([self.validate.seconds_left(state), *(saver.seconds_left(state) for saver in self.savers)])
        self.next_time = min(self.next_reading, now + left)
        if plan.seconds is not None:
            left = plan.start_elapsed + plan.seconds - state.elapsed
            self.next_time = min(self.next_time, now + max(0.0, left))
        if self.interrupt:
            self.next_step = -1

    def result(self) -> Result:
        """How it ended."""
        state = self.state
        values, history = dict(state.values), state.history.copy()
        return Result(self.status, self.reason, values, history, state, state.epoch, state.step)


@contextlib.contextmanager
def session(run: Run) -> Iterator[None]:
    """All that surrounds the batches of a fit.

    The caller's random generators, module modes and signal handlers are as they were afterwards, however the fit ends;
    ``after_fit`` is called in any case, and an error carries a note of where it happened and on what batch.
    """
    state, hooks = run.state, run.hooks
    state.status, state.plan, state.request, state.error = "running", run.plan, run.pending, None
    state.old_plan, state.half_done, state.settling = run.plan, False, hooks.settle
    clear_gradients(state.objective)
    state.drop_reading()  # by hand, of which nobody asks for the means
    state.hide_averages()
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.lock)
        stack.enter_context(interruptible(lambda reason: ask(run, reason)))
        stack.enter_context(modes.training(state.objective))
        stack.enter_context(run.precision.settings())
        stack.enter_context(stream_of(state))
        state.start_clock()
        try:
            if hooks.before_fit is not None:
                # The run that is resumed had it before its first step: what is drawn there is not to be drawn twice.
                with randomness.kept() if state.resumed else contextlib.nullcontext():
                    hooks.before_fit(state)
            run.look_ahead()
            yield
            state.status = run.status
        except GeneratorExit:  # the caller of steps() has left its loop
            state.status, run.status, run.reason = "stopped", "stopped", "the caller left the loop"
            for saver in run.savers:
                saver.at_fit_end(state)
            raise
        except BaseException as error:
            state.status, state.error = "failed", error
            if isinstance(error, GoBack):  # no error of the run: it goes on from there
                state.status, state.error = "stopped", None
                raise
            within = run.batch is not None and state.last is None  # from the forward pass to the update
            state.half_done = within or (not isinstance(error, Exception) and EVALUATE not in state.owed)
            note(error, where(run), run.batch, state.objective)
            if out_of_memory(error) and state.setup.get("microbatch") != "auto":  # which has said what it tried
                error.add_note(_smaller(state.setup.get("microbatch")))
            if isinstance(error, NonFiniteError):
                note_samples(error, state, run.train)
                note_origin(error, state, run.train, run.batch, run.precision)
            if hooks.on_error is not None:
                with randomness.kept():
                    hooks.on_error(state)
            raise
        finally:
            state.stop_clock()
            state.settling = None
            state.drop_reading()  # all that it would have counted is counted at the next
            state.end_vetoes()  # of a step that was not done
            state.show_averages()
            run.batch = None
            if run.graphing is not None:  # whoever waits for NCCL to end waits for graphs with its kernels
                run.graphing.close()
            for stream in (run.train, run.validation):
                if stream is not None:
                    stream.close()
            try:
                if hooks.after_fit is not None:
                    with randomness.kept():  # a run that is resumed has it once more: what is drawn there is not to count
                        hooks.after_fit(state)
            finally:
                state.request, state.plan, state.resumed = None, None, False
                for saver in run.savers:
                    saver.close(state)


def _smaller(microbatch: int | None) -> str:
    than = "" if microbatch is None else f" than the {microbatch} of now"
    return (
        f"out of memory: fit(..., microbatch=...) computes a batch in parts of fewer samples{than}, with the same gradient to "
        f"rounding; 'auto' finds how many fit"
    )


def ask(run: Run, reason: str) -> None:
    """Take an interrupt: the loop sees it after the step in hand, or the batch of validation."""
    run.terminated = run.terminated or reason == SIGTERM
    if run.interrupt != SIGTERM:
        run.interrupt = reason
    run.next_step = -1  # to look up after this step


@contextlib.contextmanager
def again(state: LoopState) -> Iterator[None]:
    """A hook is called once more, as the run was resumed after its first call: it has had its draws, and its cadences."""
    state.repeating = True
    try:
        with randomness.kept():
            yield
    finally:
        state.repeating = False


@contextlib.contextmanager
def stream_of(state: LoopState) -> Iterator[None]:
    """Let the block draw from the run's own random stream; the caller's generators are as they were after it."""
    with randomness.kept():
        if state.rng is None:
            randomness.seed_all(randomness.derive(state.seed, "run"))
        else:
            randomness.restore(state.rng)
        state.drawing = True
        try:
            yield
        finally:
            state.rng, state.drawing = randomness.snapshot(), False


def clear_gradients(module: nn.Module) -> None:
    """Drop gradients that somebody else left behind: they would be a part of the first update."""
    for parameter in module.parameters():
        parameter.grad = None


def where(run: Run) -> str:
    """Where a fit stands, for a note on an error."""
    state = run.state
    return f"in epoch {state.epoch}, step {state.step} (batch {state.batch_index} of the epoch), counted from 0"
