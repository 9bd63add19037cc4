"""A comparison: a step replayed, and the same from the same beginning kernel by kernel, for good."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from axontrain.execution.attempt import before_step, put_back, reason_of
from axontrain.execution.beginning import Before
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.outcome import Outcome
from axontrain.execution.statics import leaves_of
from axontrain.execution.step_graph import StepGraph, UnrecordableError
from axontrain.objective import Step

NO_MEMORY = "there is not the memory to hold replays against steps that are not"


def compared(graph: StepGraph, batch: Any, own: Mapping[str, Tensor], kernels: Callable[[Any], Step]) -> tuple[Step, str]:
    """Do a step in both ways.

    Args:
        graph: the recording, which holds for the batch.
        batch: of which the step is.
        own: further tensors that the runner changes, by name.
        kernels: does the step without it, and counts it.

    Returns:
        The step, and what of the replay was another; "" if nothing was.

    Raises:
        UnrecordableError: where memory runs out, or a replay fails; the step was not done.
    """
    with _in_memory():
        before = before_step(graph, own)
    different, rates = "", [update.rates for update in graph.updates]
    try:
        with _in_memory():
            given = graph.replay(batch)
            assert given is not None  # as was looked
            graph.put_gradients()
            replayed = _outcome(graph, given[0], own).kept()
            if not graph.whole:  # an update takes gradients away: they are compared before it
                live = _computed(graph, batch, own, before).kept()
                different = replayed.unlike(live)
                if different:
                    different = replayed.unlike(live, _computed(graph, batch, own, before))
    finally:
        put_back(graph, before)
        for update, of_groups in zip(graph.updates, rates, strict=True):
            update.rates = of_groups  # the forward pass may look at those of the step before
    step = _for_good(graph, batch, kernels, before)
    if graph.whole:
        live = _outcome(graph, step, own)
        different = replayed.unlike(live)
        if different:
            try:
                different = _wavers(graph, batch, own, before, replayed, live)
            except UnrecordableError as error:  # the step is done, and stays so
                different = str(error)
    return step, different


def _wavers(graph: StepGraph, batch: Any, own: Mapping[str, Tensor], before: Before, replayed: Outcome, live: Outcome) -> str:
    """What of a replay is another by more than kernels differ from themselves."""
    with _in_memory():
        now, live = before_step(graph, own), live.kept()
        try:
            return replayed.unlike(live, _computed(graph, batch, own, before))
        finally:
            put_back(graph, now)


def _for_good(graph: StepGraph, batch: Any, kernels: Callable[[Any], Step], before: Before) -> Step:
    """The step without the recording; where memory runs out before an update, as if it had not begun."""
    counted = [update.steps for update in graph.updates]
    try:
        return kernels(batch)
    except Exception as error:
        if not out_of_memory(error) or counted != [update.steps for update in graph.updates]:
            raise
        put_back(graph, before)
        raise UnrecordableError(NO_MEMORY) from error


@contextlib.contextmanager
def _in_memory() -> Iterator[None]:
    """Have memory that runs out, and whatever else a replay fails of, be a reason not to replay."""
    try:
        yield
    except UnrecordableError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise UnrecordableError(NO_MEMORY) from error
        raise UnrecordableError(*reason_of(error)) from error


def _computed(graph: StepGraph, batch: Any, own: Mapping[str, Tensor], before: Before) -> Outcome:
    """The step kernel by kernel, from where it began, and not counted."""
    put_back(graph, before)
    graph.inputs.take(leaves_of(batch))
    return _outcome(graph, graph.compute(), own)


def _outcome(graph: StepGraph, step: Step, own: Mapping[str, Tensor]) -> Outcome:
    module, kept = graph.run.objective, graph.assumptions.kept()
    return Outcome.of(module, graph.updates, {**own, **kept}, step, whole=graph.whole, predictions=graph.predictions)
