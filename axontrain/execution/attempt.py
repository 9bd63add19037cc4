"""An attempt: a step is tried, and recorded if nothing speaks against it; all is as it was afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from axontrain import randomness
from axontrain.execution.assumptions import hooked
from axontrain.execution.beginning import Before
from axontrain.execution.lines import of_error, told
from axontrain.execution.options import why_apart
from axontrain.execution.parts import Parts
from axontrain.execution.recording import Recorder
from axontrain.execution.step_graph import NotYetError, StepGraph, UnrecordableError
from axontrain.execution.steps import OneLoss, SeveralLosses
from axontrain.execution.tracing import Trace
from axontrain.update import Update

Runner = OneLoss | SeveralLosses


def attempt(
    run: Runner,
    updates: Sequence[Update],
    batch: Any,
    recorder: Recorder,
    own: Mapping[str, Tensor],
    *,
    apart: str,
    predictions: bool,
) -> StepGraph:
    """Record the step of a batch.

    Args:
        run: whose step; its optimizers are of ``updates``.
        updates: those.
        batch: that.
        recorder: of its device.
        own: further tensors that the runner changes.
        apart: why updates are not to be recorded, found before; "" to find out.
        predictions: whether predictions and targets are to be given.

    Raises:
        UnrecordableError: if it cannot be recorded.
        NotYetError: if it can be after some more steps.
        Exception: what torch raises where it cannot.
    """
    apart = apart or why_apart(updates)
    if apart and isinstance(run, SeveralLosses):
        raise UnrecordableError(f"updates lie between the losses of a step, and {apart}")
    if part := hooked(run.objective):
        raise UnrecordableError(f"{part} has hooks, which would not be called")
    graph = StepGraph(run, updates, batch, apart=apart, predictions=predictions)
    if running := graph.assumptions.contents.running:
        raise UnrecordableError(running)
    before, kept = before_step(graph, own), _kept(updates)
    try:
        _try(graph, recorder)
        if _kept(updates) != kept:
            raise NotYetError("an optimizer makes in this step what it will keep")
        put_back(graph, before)
        graph.record(recorder)
    except BaseException:
        put_back(graph, before)
        graph.close()
        raise
    put_back(graph, before)
    return graph


def _kept(updates: Sequence[Update]) -> list[int]:
    return [len(update.keeps()) for update in updates]


def before_step(graph: StepGraph, own: Mapping[str, Tensor]) -> Before:
    """All that a step changes, to be put back."""
    before = Before(graph.run.objective, graph.assumptions)
    before.take_state([one for update in graph.updates for one in update.optimizers])
    before.take(own.values())
    return before


def put_back(graph: StepGraph, before: Before) -> None:
    """Make all of it what it was.

    Raises:
        UnrecordableError: if something of the user's cannot be; all else is.
    """
    graph.drop_gradients()
    try:
        before.put_back()
    except Exception as error:
        raise UnrecordableError(f"what a step changes in Python cannot be put back: {type(error).__name__}: {error}") from error


def _try(graph: StepGraph, recorder: Recorder) -> None:
    """Compute the step as it is to be recorded, on the stream of recordings, and look for what cannot be.

    Then twice more: numbers that Python gives to kernels are to be the same, as a recording will repeat them.

    Raises:
        UnrecordableError: if there is something.
    """
    drawn = randomness.snapshot()
    graph.assumptions.begin()
    with recorder.aside() as waits:
        graph.compute()
    graph.drop_gradients()
    if waits:
        raise UnrecordableError("a step waits for the device, as for what .item() reads", told(waits)[0])
    every = [*randomness.drawn(drawn, randomness.snapshot()), *graph.assumptions.drawn()]
    if drawing := recorder.on_host(every):
        raise UnrecordableError(f"a step draws random numbers on the host, from {drawing}: draw them on the device")
    if not graph.assumptions.hold():
        what = graph.assumptions.broken()
        raise UnrecordableError(f"Python changes something in each step, and is not called in a replay: {what}")
    if isinstance(getattr(graph.run, "train_step", None), Parts):  # what is compiled is not run under a mode
        return
    traces = Trace(), Trace()
    for trace in traces:
        with trace:
            graph.compute()
        graph.drop_gradients()
    if what := traces[0].unlike(traces[1]):
        raise UnrecordableError(f"two steps call for other kernels, and a replay would not: {what}")


def reason_of(error: Exception) -> tuple[str, str]:
    """Why something could not be recorded, in short, and the line of the user's; "" where none is to blame."""
    if isinstance(error, UnrecordableError):
        return str(error.args[0]), error.args[1] if len(error.args) > 1 else ""
    first: BaseException = error
    while first.__context__ is not None:  # what follows is of a recording that ended in the middle
        first = first.__context__
    line = told(of_error(first))[0]
    head = next((text.strip() for text in str(first).splitlines() if text.strip()), type(first).__name__)
    return f"{type(first).__name__}: {head}", line
