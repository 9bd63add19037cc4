"""Which step runner trains an objective: chosen once, before the loop starts, so that the loop has no branches."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from axontrain.errors import ConfigurationError
from axontrain.execution import recording
from axontrain.execution.averaged import Averaged
from axontrain.execution.compilation import Compilation
from axontrain.execution.freeing import Freeing
from axontrain.execution.graphing import Graphing
from axontrain.execution.microbatches import AutoCut, Cut, OneLossInParts, SeveralLossesInParts
from axontrain.execution.precision import FP32, Precision, Scaler
from axontrain.execution.searching import Searching
from axontrain.execution.steps import OneLoss, Runner, SeveralLosses
from axontrain.in_backward import UpdateInBackward
from axontrain.objective import Objective
from axontrain.state import LoopState


def runner(
    state: LoopState,
    after_backward: Callable[[LoopState], None] | None,
    cut: Cut | None = None,
    *,
    precision: Precision = FP32,
    scaler: Scaler | None = None,
    keeps_predictions: bool = True,
    compilation: Compilation | None = None,
    graphing: Graphing | None = None,
) -> Runner:
    """Choose how this objective is trained: by one loss or by a generator of several, of whole batches or part by part.

    Args:
        state: the Loop's.
        after_backward: a hook, or None.
        cut: how batches are cut; None leaves them whole.
        precision: what it computes in.
        scaler: of losses, if the precision has one.
        keeps_predictions: whether those of microbatches are put together, for metrics; else they take no memory.
        compilation: what was compiled so far, where steps are to be; None leaves them in eager.
        graphing: what becomes of replays, where steps are to be; None does them kernel by kernel.
    """
    run = _of_updates(state, after_backward, cut, precision, scaler, keeps_predictions)
    replayed = False
    if graphing is not None:
        graphing.begin()
        if graphing.chosen is not False:  # else it was tried, and took no less time
            graphing.give_up(_not_replayed(run, state, after_backward))
            replayed = not graphing.eager
    if compilation is not None:
        run = _compiled(run, state, after_backward, compilation, replayed=replayed)
    if graphing is not None and replayed:
        from axontrain.execution.graphed import Graphed

        run = Graphed(run, state, graphing)  # type: ignore[arg-type]  # not compiled
    if freeing := [update for update in state.optimizers.values() if isinstance(update, UpdateInBackward)]:
        run = Freeing(run, freeing)  # type: ignore[arg-type]  # of whole batches
    for update in state.optimizers.values():
        if update.spec.closure:
            run = Searching(run, update)  # type: ignore[arg-type]  # of one loss
    return Averaged(run, state) if any(update.average is not None for update in state.optimizers.values()) else run


def _not_replayed(run: Runner, state: LoopState, after_backward: Callable[[LoopState], None] | None) -> str:
    """Why steps cannot be replayed from CUDA graphs, as far as that is known before any was done; "" if they may."""
    devices = {parameter.device for parameter in state.objective.parameters()}
    if len(devices) > 1:
        return f"the parameters are on several devices: {', '.join(sorted(map(str, devices)))}"
    if not all(map(recording.available, devices)):
        return f"the parameters are on {next(iter(devices))}, and CUDA graphs are of NVIDIA's GPUs"
    if isinstance(getattr(run, "cut", None), AutoCut):
        return "microbatch='auto' looks for memory that runs out in each step"
    if after_backward is not None:
        return f"a callback looks at gradients, in after_backward: {after_backward.__name__}"
    for name, part in state.objective.named_modules():
        if isinstance(part, nn.RNNBase) and part.dropout > 0 and part.num_layers > 1:
            return f"{name or type(part).__name__} has dropout between its layers, for which cuDNN draws a seed on the host"
    updates = list(state.optimizers.values())
    if any(isinstance(update, UpdateInBackward) for update in updates):
        return "an optimizer updates within backward, from hooks of Python's"
    if any(update.spec.closure for update in updates):
        return "the optimizer evaluates the loss by itself, as often as it likes"
    several = len(updates) > 1 or isinstance(run, SeveralLosses)
    if several and any(update.spec.on_nonfinite == "raise" for update in updates):
        return "on_nonfinite='raise' looks at gradients before the next of several updates"
    return ""


def _compiled(
    run: Runner, state: LoopState, after_backward: Callable[[LoopState], None] | None, made: Compilation, *, replayed: bool
) -> Runner:
    """The same steps compiled: as one graph, or the forward and backward of each part."""
    from axontrain.execution.one_graph import OneGraph
    from axontrain.execution.parts import Parts

    if not isinstance(run, OneLoss):
        why = "train_step is a generator of several losses, which cannot be compiled; its networks can, each by .compile()"
        if made.eager != why:
            made.give_up(why)
        return run
    why = made.divided
    if type(run) is not OneLoss:
        why = "microbatches, or losses that are scaled, update once for several backward passes"
    elif replayed:
        why = "graph= replays the update and what lies between with them, from a CUDA graph"
    elif after_backward is not None:
        why = f"a callback looks at gradients, in after_backward: {after_backward.__name__}"
    elif len(state.optimizers) > 1:
        why = "there are several optimizers"
    elif isinstance(only := next(iter(state.optimizers.values())), UpdateInBackward):
        why = "the optimizer updates within backward"
    elif only.spec.closure:
        why = "the optimizer evaluates the loss by itself"
    if not why:
        return OneGraph(run, state, made)
    if not made.eager:
        made.report.how, made.report.reason = "in parts", why
        if made.parts is None:
            made.parts = Parts(run.objective, run.train_step, made)
        run.train_step = made.parts
    return run


def _of_updates(
    state: LoopState,
    after_backward: Callable[[LoopState], None] | None,
    cut: Cut | None,
    precision: Precision,
    scaler: Scaler | None,
    keeps_predictions: bool,
) -> Runner:
    objective: Objective = state.objective  # type: ignore[assignment]  # checked by the Loop
    after_backward = None if after_backward is None else _within_a_step(after_backward)
    several = inspect.isgeneratorfunction(objective.train_step)
    for name, update in state.optimizers.items():
        if update.spec.closure and (several or len(state.optimizers) > 1):
            raise ConfigurationError(
                f"the optimizer {name!r} ({update.spec.name}) evaluates the loss by itself, several times a step: that goes "
                f"with one optimizer and a train_step that returns a Step"
            )
    raising = [name for name, update in state.optimizers.items() if update.spec.on_nonfinite == "raise"]
    within = [name for name, update in state.optimizers.items() if isinstance(update, UpdateInBackward)]
    if raising and within and not several:
        raise ConfigurationError(
            f"the optimizer {raising[0]!r} has on_nonfinite='raise', which promises that nothing was updated, and "
            f"{within[0]!r} has in_backward=True, which has updated by then: leave one of them out"
        )
    for name, update in state.optimizers.items():
        if isinstance(update, UpdateInBackward) and (cut is not None or after_backward is not None):
            what = (
                "microbatch= or accumulate=, which sums gradients before it updates"
                if cut is not None
                else "a callback's after_backward, which looks at gradients: they are freed by then"
            )
            raise ConfigurationError(f"the optimizer {name!r} has in_backward=True, which does not go with {what}")
    if cut is None and scaler is None:
        return (SeveralLosses if several else OneLoss)(objective, state, after_backward, precision)
    if cut is None:
        cut, keeps_predictions = Cut(None), True
    if several and isinstance(cut, AutoCut):
        raise ConfigurationError(
            "microbatch='auto' does a step again that runs out of memory, and one of several updates may have done the first "
            "of them: give a number of samples"
        )
    kind = SeveralLossesInParts if several else OneLossInParts
    return kind(objective, state, after_backward, precision, cut, scaler, keeps_predictions)


def _within_a_step(hook: Callable[[LoopState], None]) -> Callable[[LoopState], None]:
    """The same hook; for as long as it runs, the state says that it is between two steps."""

    def call(state: LoopState) -> None:
        state.half_done = True
        hook(state)
        state.half_done = False

    return call
