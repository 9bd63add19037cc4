"""Passes over data that train nothing: evaluation and prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from axontrain import randomness
from axontrain.data.stream import Stream
from axontrain.execution import modes
from axontrain.execution.notes import noted, reading
from axontrain.execution.precision import Precision
from axontrain.execution.steps import check_eval
from axontrain.metrics.meter import Meter
from axontrain.objective import Objective, batch_size, task_of
from axontrain.state import LoopState

END = object()


@contextlib.contextmanager
def evaluating(objective: Objective, state: LoopState, precision: Precision) -> Iterator[None]:
    """Eval mode, averages of weights, no gradients, and random numbers that follow from the run's seed, for the block."""
    random = randomness.seeded(randomness.derive(state.seed, "evaluate"))
    with modes.evaluation(objective), state.averaged(), random, torch.no_grad(), precision.settings(), precision.computing():
        yield


def evaluate(
    objective: Objective,
    stream: Stream,
    meter: Meter,
    state: LoopState,
    precision: Precision,
    interrupted: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Evaluate over all of a stream: the readings, means by items; none where it was interrupted."""
    meter.reset()
    meter.tasks = stream.tasks
    with evaluating(objective, state, precision):
        for index, batch in enumerate(reading(stream.batches(state.seed, 0), "in evaluation")):
            with noted(f"in evaluation, batch {index}", batch, objective):
                step = objective.eval_step(batch)
            if index == 0:
                check_eval(step, objective)
            step.loss = step.loss.detach()
            meter.record(step, task_of(batch))
            if interrupted is not None and interrupted():
                return {}
    if not len(meter):
        raise stream.empty()
    return meter.read(last=True)


def predicting(objective: Objective, stream: Stream, state: LoopState, precision: Precision) -> Iterator[tuple[Any, int]]:
    """The predictions and the size of each batch. Between batches, modes and generators are the caller's."""
    rng = None
    batches: Iterator[Any] | None = None
    with contextlib.closing(stream):
        try:
            while True:
                with evaluating(objective, state, precision):
                    if rng is not None:
                        randomness.restore(rng)
                    if batches is None:
                        batches = reading(stream.batches(state.seed, 0), "in prediction")
                    batch = next(batches, END)
                    if batch is END:
                        break
                    with noted("in prediction", batch, objective):
                        prediction = objective.predict(objective.split(batch)[0])
                    size, rng = batch_size(batch), randomness.capture()
                yield precision.shown(prediction), size
        finally:
            # An error's traceback holds this frame, and so would hold the workers. Dropped, not closed: a generator that is
            # closed in Python 3.12 keeps what it reads from, and that goes on.
            batches = None
    if rng is None:
        raise stream.empty()
