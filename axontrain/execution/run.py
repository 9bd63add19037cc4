"""Run: what one fit is made of, and the frame around it: generators, modes, signals, the outer hooks, errors' notes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from axontrain import randomness
from axontrain.callback import Hooks
from axontrain.clock import Cadence, Plan
from axontrain.data.stream import Stream, describe
from axontrain.execution import modes
from axontrain.execution.signals import interruptible
from axontrain.execution.steps import Runner
from axontrain.metrics.meter import Meter
from axontrain.objective import Objective
from axontrain.state import LoopState, Result, Stop, StopEpoch

# Readings cost a wait for the device: often enough for an eye on the bar, too seldom to be felt.
READ_EVERY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Interrupt(Stop):
    """Ctrl-C, as a request like a hook's."""


@dataclass(slots=True)
class Run:
    """One fit: its data, its limits, its hooks, and when the loop next has to look up from its batches."""

    state: LoopState
    plan: Plan
    train: Stream
    validation: Stream | None
    meter: Meter  # of validation
    validate: Cadence
    hooks: Hooks
    train_step: Runner
    next_step: float = 0
    next_time: float = 0.0
    next_reading: float = 0.0
    status: str = "completed"
    reason: str = ""
    batch: Any = None
    validated: bool = False

    def goes_on(self) -> bool:
        """Whether there is more to train: no limit reached, no stop asked for."""
        request = self.state.request
        if request is not None:
            self.status = "interrupted" if isinstance(request, Interrupt) else "stopped"
            self.reason = request.reason
            return False
        reached = self.plan.over(self.state)
        if reached is not None:
            self.status, self.reason = "completed", reached
        return reached is None

    def batches(self) -> Iterator[Any]:
        """The batches of the present epoch that have not been trained on."""
        state = self.state
        return self.train.batches(state.seed, state.epoch, state.batch_index)

    def epoch_is_over(self) -> bool:
        """Whether the epoch's last batch has been trained on, as far as that can be known beforehand."""
        return self.state.epoch_length is not None and self.state.batch_index >= self.state.epoch_length

    def look_ahead(self) -> None:
        """Work out at which step and at what time the loop next has to look up; the batches between need no thought."""
        state, plan = self.state, self.plan
        self.next_step = min(plan.last_step, self.validate.next_step(state))
        now = time.perf_counter()
        if now >= self.next_reading:
            self.next_reading = now + READ_EVERY_SECONDS
        self.next_time = self.next_reading
        if plan.seconds is not None:
            left = plan.start_elapsed + plan.seconds - state.elapsed
            self.next_time = min(self.next_time, now + max(0.0, left))

    def result(self) -> Result:
        """How it ended."""
        state = self.state
        return Result(self.status, self.reason, dict(state.values), state.history, state)


@contextlib.contextmanager
def session(run: Run) -> Iterator[None]:
    """All that surrounds the batches of a fit.

    The caller's random generators, module modes and signal handlers are as they were afterwards, however the fit ends;
    ``after_fit`` is called in any case, and an error carries a note of where it happened and on what batch.
    """
    state, hooks = run.state, run.hooks
    state.status, state.plan, state.request, state.error = "running", run.plan, None, None
    clear_gradients(state.objective)
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruptible(lambda: ask(run)))
        stack.enter_context(modes.training(state.objective))
        stack.enter_context(stream_of(state))
        state.start_clock()
        try:
            if hooks.before_fit is not None:
                hooks.before_fit(state)
            run.look_ahead()
            yield
            state.status = run.status
        except GeneratorExit:  # the caller of steps() has left its loop
            state.status, run.status, run.reason = "stopped", "stopped", "the caller left the loop"
            raise
        except BaseException as error:
            state.status, state.error = "failed", error
            note(error, run)
            if hooks.on_error is not None:
                hooks.on_error(state)
            raise
        finally:
            state.stop_clock()
            run.batch = None
            if isinstance(state.request, StopEpoch):
                state.request = None
            if hooks.after_fit is not None:
                hooks.after_fit(state)
            state.request, state.plan = None, None


def ask(run: Run) -> None:
    """Take an interrupt: the loop sees it after the step in hand, or the batch of validation."""
    run.state.request = Interrupt("Ctrl-C")


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
            state.rng, state.drawing = randomness.capture(), False


def clear_gradients(module: nn.Module) -> None:
    """Drop gradients that somebody else left behind: they would be a part of the first update."""
    for parameter in module.parameters():
        parameter.grad = None


def note(error: BaseException, run: Run) -> None:
    """Tell where an error happened: epoch, step, and the shapes and dtypes of the batch."""
    state = run.state
    where = f"in epoch {state.epoch}, step {state.step} (batch {state.batch_index} of the epoch)"
    error.add_note(where if run.batch is None else f"{where}, on the batch {describe(run.batch)}")
    hint = _dtype_hint(error, run)
    if hint:
        error.add_note(hint)


def _dtype_hint(error: BaseException, run: Run) -> str:
    # NumPy's default is float64, torch's float32: the commonest first error of all, and torch does not say how to mend it.
    text = describe(run.batch)
    if "float64" in text and ("dtype" in str(error) or "Double" in str(error)):
        objective: Objective = run.state.objective  # type: ignore[assignment]  # checked by the Loop
        dtypes = {str(p.dtype).removeprefix("torch.") for p in objective.parameters()}
        if "float64" not in dtypes:
            return f"the batch holds float64, the parameters are {', '.join(sorted(dtypes))}: convert the data, as by .float()"
    return ""
