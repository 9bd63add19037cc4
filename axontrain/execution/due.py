"""What is due between batches: readings, validation, saving, the ends of an epoch and of a fit.

``state.owed`` tells what an interruption has left undone of it, in this order: a validation, ``after_epoch``, saving. A run
that is resumed does that first (:func:`settle`).
"""

from __future__ import annotations

import contextlib
from time import perf_counter
from typing import Any

from axontrain.errors import warn
from axontrain.execution.passes import evaluate
from axontrain.execution.run import AFTER_EPOCH, DUE, EVALUATE, VALIDATE, Run, again
from axontrain.state import LoopState, Stop, StopEpoch


def look_up(run: Run) -> bool:
    """Validate, read or save, where due; whether the pass over the data ends here."""
    state = run.state
    if not run.epoch_is_over():  # else the epoch's end does it
        validate = run.validate.due(state)
        if validate or _ends(run):
            state.settle()
        if validate:
            _read_and_validate(run)
        elif perf_counter() >= run.next_reading:
            state.read_later()
        run.save()
    run.look_ahead()
    return _ends(run)


def end_epoch(run: Run) -> None:
    """Count the epoch; then validation, readings, ``after_epoch``, saving: all of one and the same step."""
    state = run.state
    state.settle()
    if not run.exhausted and state.batch_index == state.epoch_length:
        run.train.finish(state.seed, state.epoch, state.batch_index)
    state.epoch += 1
    state.batch_index, state.in_epoch = 0, False
    state.owed = [AFTER_EPOCH]
    _read_and_validate(run, validate=run.validate.due(state))
    _after_epoch(run)


def settle(run: Run) -> None:
    """Do what an interruption left undone at the end of the last step, where the run is resumed."""
    state = run.state
    if not state.resumed:
        return
    if state.owed:
        state.settle()
    if state.owed == DUE:
        state.owed = []
        look_up(run)
    elif state.owed:
        if run.validation is None:
            state.owed = [one for one in state.owed if one == AFTER_EPOCH]
        elif state.owed[0] in (VALIDATE, EVALUATE):
            _validate(run, {})
            state.history.rewrite()  # one row of it and of what was read before
        if AFTER_EPOCH in state.owed:
            _after_epoch(run)
        else:
            run.save()
    if (state.batch_index or state.in_epoch) and run.epoch_is_over():
        end_epoch(run)


def end_fit(run: Run) -> None:
    """Read what is left of an epoch that a limit or a stop has ended; save."""
    state = run.state
    state.settle()  # before_batch may have ended it, which nobody looks up after
    trained = state.step - run.first_step
    # A run that was killed after its last step, and before this, has not read either.
    unread = state.resumed and not (state.history.rows and state.history.rows[-1]["step"] == state.step)
    if state.batch_index and (trained or unread):
        readings = state.read()
        if readings:
            state.history.add(state.step, state.epoch, readings, partial=True)
    validated = run.validated or (state.resumed and any(name.startswith("val/") for name in state.values))
    if run.validation is not None and trained and not validated and run.status == "completed":
        warn(
            f"the validation data was never used: the run ended after {trained} steps, before {run.validate.every!r} was due; "
            f"pass validate= a shorter interval, as in validate=100"
        )
    for saver in run.savers:
        saver.at_fit_end(state)
    if run.interrupt and run.status == "completed":  # Ctrl-C within the last save: who runs several fits is to hear of it
        run.status, run.reason = "interrupted", run.interrupt


def _ends(run: Run) -> bool:
    """Whether the pass over the data ends with this step, be it through or not."""
    return run.state.request is not None or run.interrupted() or run.plan.over(run.state) is not None


def _after_epoch(run: Run) -> None:
    state = run.state
    interrupted = run.interrupted()
    if not interrupted:
        state.owed = []
        if run.hooks.after_epoch is not None:
            run.hooks.after_epoch(state)
    if isinstance(state.request, StopEpoch):  # the epoch is over now
        state.request = None
    if not interrupted:
        run.save()
    run.look_ahead()


def _read_and_validate(run: Run, *, validate: bool = True) -> None:
    state = run.state
    readings = state.read(last=True)
    state.meter.reset()
    if validate and run.validation is not None:
        _validate(run, readings)
    else:
        _record(state, readings)


def _validate(run: Run, readings: dict[str, Any]) -> None:
    """Evaluate, and take the readings with those of training.

    A validation that is interrupted is owed, and one that comes too late: when the run is resumed, it is done first.
    """
    state = run.state
    assert run.validation is not None  # else nothing is due
    too_late = isinstance(state.request, Stop) and state.batch_index and EVALUATE not in state.owed
    if run.interrupted() or too_late:
        if not state.owed or state.owed[0] == AFTER_EPOCH:
            state.owed = [VALIDATE, *state.owed]
        _record(state, readings)
        return
    if run.hooks.before_evaluate is not None:
        with again(state) if EVALUATE in state.owed else contextlib.nullcontext():
            run.hooks.before_evaluate(state)
    rest = [one for one in state.owed if one == AFTER_EPOCH]
    state.owed = [EVALUATE, *rest]
    found: dict[str, Any] = {}
    try:
        found = evaluate(run.judge, run.validation, run.meter, state, run.precision, run.interrupted)
    except BaseException as error:
        if not isinstance(error, RuntimeError) or not run.lost(error):
            _record(state, readings)
            raise
    run.validated, interrupted = True, run.interrupted()
    if not interrupted:
        readings = readings | {f"val/{name}": value for name, value in found.items()}
    _record(state, readings)
    if interrupted:
        return
    state.owed = rest
    if run.hooks.after_evaluate is not None:
        run.hooks.after_evaluate(state)


def _record(state: LoopState, readings: dict[str, Any]) -> None:
    state.values.update(readings)
    if readings:
        state.history.add(state.step, state.epoch, readings)
