"""Blame: of what a NonFiniteError came, its samples and the operation, noted on it on the way out."""

from __future__ import annotations

from typing import Any

from axontrain.data.stream import Stream
from axontrain.errors import NonFiniteError
from axontrain.execution.nonfinite import replay
from axontrain.execution.precision import Precision
from axontrain.objective import Objective
from axontrain.state import LoopState

MOST_NOTED, MOST_SAMPLES = 4, 32  # batches, and samples of each, that an error tells of


def note_samples(error: NonFiniteError, state: LoopState, train: Stream) -> None:
    """Say of which samples the batches were that were not finite."""
    for step in error.steps[:MOST_NOTED]:
        epoch, index = _place(state, step)
        if index >= 0 and (samples := train.samples(state.seed, epoch, index)):
            more = f", ... ({len(samples)} in all)" if len(samples) > MOST_SAMPLES else ""
            error.add_note(
                f"step {step} was of the samples {', '.join(map(str, samples[:MOST_SAMPLES]))}{more} of the training data"
            )


def note_origin(error: NonFiniteError, state: LoopState, train: Stream, batch: Any, precision: Precision) -> None:
    """Compute the last batch that was not finite once more, and say what was first not finite in it.

    The weights are those that it met, since nothing was updated. What it needs of time and memory is one step's, and a copy of
    the weights; where that fails, it says so, and the error is what it was.
    """
    if not error.steps:
        return
    step = error.steps[-1]
    try:
        if batch is None or step - state.step not in (0, 1):  # the batch in hand is another: read that one again
            epoch, index = _place(state, step)
            batch = train.again(state.seed, epoch, index, step - index - 1) if index >= 0 else None
            if batch is None:
                error.add_note(f"the batch of step {step} cannot be read again: on_nonfinite='raise' stops while it is in hand")
                return
        objective: Objective = state.objective  # type: ignore[assignment]  # checked by the Loop
        found = replay(objective, batch, precision)
    except Exception as failure:
        error.add_note(f"computing step {step} again, to find what was first not finite, failed: {failure!r}")
        return
    told = "all was finite, so it depends on what is drawn at random" if found is None else f"first not finite {found}"
    error.add_note(f"step {step} computed again: {told}")


def _place(state: LoopState, step: int) -> tuple[int, int]:
    """The epoch and the index of a step's batch, of the present epoch or the one before; below 0 if it was earlier."""
    epoch, index = state.epoch, step - (state.step - state.batch_index) - 1
    if index < 0:  # it was read when the epoch was over
        epoch, index = epoch - 1, index + (state.epoch_length or 0)
    return epoch, index
