"""A step runner whose steps are replayed from CUDA graphs, where that is possible: bit for bit what they are without.

A step is recorded once batches of its kind have come some times (:mod:`axontrain.execution.worth`,
:mod:`axontrain.execution.attempt`). What was recorded is held against the same steps done kernel by kernel before it is trusted
(:mod:`axontrain.execution.comparison`); and before each replay shapes, attributes and options are looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from axontrain.execution import recording
from axontrain.execution.attempt import attempt, reason_of
from axontrain.execution.comparison import compared
from axontrain.execution.graphing import Graphing
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.statics import Updated, described, unlike
from axontrain.execution.step_graph import NotYetError, StepGraph, UnrecordableError
from axontrain.execution.steps import OneLoss, SeveralLosses
from axontrain.execution.trial import LESS, Trial
from axontrain.execution.worth import KINDS, Worth
from axontrain.objective import Step
from axontrain.state import LoopState

MOST = 8  # recordings at a time
WATCHED = 10  # steps that are left to the other runner for now: that is said
TRIES = 3  # where kernels sum in any order, and two steps alike differ in their last bits


class Graphed:
    """Steps that are replayed; those that nothing is recorded of, as another runner does them.

    Args:
        run: that other runner.
        state: the Loop's.
        made: what becomes of it, for the Loop's report.
    """

    def __init__(self, run: OneLoss | SeveralLosses, state: LoopState, made: Graphing) -> None:
        self.run, self.made = run, made
        self.updates = [*state.optimizers.values()]
        self.device = next(run.objective.parameters()).device
        self.recorder = recording.Recorder(self.device)
        scaler = getattr(run, "scaler", None)
        self.own = {} if scaler is None else {"the scale of losses": scaler.scale, "its good steps": scaler.good}
        self.graph: StepGraph | None = None  # the one in use
        self.worth = Worth()
        self.apart = ""  # why updates are not to be recorded, found while it was tried
        self.trial: Trial | None = None
        self.tried: StepGraph | None = None  # by the trial
        self.watched = 0  # steps since the last replay that were left to the other runner for now
        self.unseen = False  # whether the last steps were replays, of which the versions of tensors know nothing

    def __call__(self, batch: Any) -> Step:
        graph = self.graph
        if graph is None or self._watched():
            return self._otherwise(batch)
        given = graph.replay(batch)
        return self._otherwise(batch) if given is None else self._counted(graph, *given)

    def _counted(self, graph: StepGraph, step: Step, updated: Sequence[Updated]) -> Step:
        """The step of a replay: what of it is no work of the device."""
        self.made.report.replayed += 1
        if self.watched:
            self.watched, self.made.report.not_replayed = 0, ""
        self.worth.replays += 1
        self.unseen = True
        if graph.gradients:
            graph.put_gradients()
            if not graph.whole:
                for update, loss, terms, flag in updated:
                    if graph.raises:  # before anything is updated
                        update.refuse(loss, terms, flag)
                    update.step(flag)
        for update, loss, terms, flag in updated:
            update.done(loss, terms, flag)
        if graph.gradients:
            graph.drop_gradients()
        return step

    def _watched(self) -> bool:
        """Whether this step is left to the other runner: somebody waits for gradients, looks on, or has asked to skip it."""
        for update in self.updates:
            if update.veto is not None:
                return True
            for p in update.tensors:
                if p.grad is not None or p._backward_hooks or p._post_accumulate_grad_hooks:
                    return True
        # Autocast of somebody else's keeps copies of weights beyond a step; without gradients there is an error to raise.
        around = torch.is_autocast_enabled(self.device.type) or not torch.is_grad_enabled()
        return around or torch.is_anomaly_enabled() or bool(torch._C._len_torch_dispatch_stack())

    def _waits(self, why: str) -> None:
        """Say why steps are not replayed for now, where that goes on."""
        self.watched += 1
        if self.watched == WATCHED:
            self.made.waits(why)

    def _watched_by(self) -> str:
        """Who it is that :meth:`_watched` has found."""
        tensors = [p for update in self.updates for p in update.tensors]
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in tensors):
            return "there are hooks on the gradients of parameters, which would not be called"
        if any(p.grad is not None for p in tensors):
            return "parameters have gradients from before, to which those of a step are added"
        if torch.is_autocast_enabled(self.device.type):
            return "torch.autocast is on around it: precision= of the Loop does the same within a step"
        if torch.is_anomaly_enabled():
            return "torch's anomaly mode is on"
        return "a dispatch mode looks on, or a callback skips updates"

    def _otherwise(self, batch: Any) -> Step:
        """A step that the recording in use is not of: of another, of a new one, or of none."""
        if self.made.eager:
            return self._kernels(batch)
        if self._watched():
            self._waits(self._watched_by())
            with contextlib.nullcontext() if self.trial is None else self.trial.apart():
                return self._kernels(batch)
        if self.trial is not None and (step := self._in_trial(batch)) is not None:
            return step
        for graph in self.made.graphs:
            if graph is not self.graph and graph.left == 0 and (given := graph.replay(batch)) is not None:
                self.graph = graph
                return self._counted(graph, *given)
        fitting = [graph for graph in self.made.graphs if graph.inputs.fitting(batch) is not None]
        if not all(graph.holds() for graph in fitting):
            return self._ended(batch, fitting[0])
        if not fitting and self._is_worth_it(batch):
            fitting = self._recorded(batch)
        return self._compared(fitting[0], batch) if fitting else self._kernels(batch)

    def _kernels(self, batch: Any) -> Step:
        """A step as the other runner does it."""
        if self.unseen:
            self.unseen = False
            torch.autograd.graph.increment_version([*self.run.objective.parameters(), *self.run.objective.buffers()])
        return self.run(batch)

    def _give_up(self, why: str, line: str = "") -> None:
        self.graph = self.trial = self.tried = None
        self.made.give_up(why, line)
        self.recorder.renew()

    def _is_worth_it(self, batch: Any) -> bool:
        """Whether the step of a batch is to be recorded; it gives up where none will ever be."""
        kind = described(batch)
        if self.worth.often(kind):
            if len(self.made.graphs) >= MOST:
                self.made.report.others += 1
                return False
            frozen = [update.name for update in self.updates if not any(p.requires_grad for p in update.tensors)]
            if frozen:
                self._waits(f"all parameters of the optimizer {frozen[0]!r} are frozen")
            return not frozen
        if why := unlike(batch):
            self._give_up(why)
        elif self.worth.full and not self.made.graphs and not self.worth.knows(kind):
            self._give_up(f"the first {KINDS} batches that differ, in shapes or in what is no tensor, came too seldom")
        return False

    def _ended(self, batch: Any, graph: StepGraph) -> Step:
        """A step of which there is a recording that does not hold any more: it is done without, and the next is recorded.

        What may be gone, as an optimizer's state, is there again then.
        """
        why, options = graph.broken() or "something in the module", graph.assumptions.hold()
        self.worth.ended()
        if self.worth.in_vain and options and graph.whole:
            self.apart = f"{why}, and so on"
            self.worth.begin()
        if self.worth.in_vain:
            self._give_up(f"what was recorded holds for no time: {why}, and so on")
            return self._kernels(batch)
        self.made.report.rerecorded.append(why)
        self.graph = self.trial = self.tried = None
        self.made.close()  # all of them, as they share memory
        self.recorder.renew()
        return self._kernels(batch)

    def _recorded(self, batch: Any) -> list[StepGraph]:
        """Record the step of a batch; none where that cannot be."""
        of = self.run, self.updates, batch, self.recorder, self.own
        try:
            graph = attempt(*of, apart=self.apart, predictions=self.made.predictions)
        except NotYetError:
            self.worth.forget(described(batch))
            return []
        except Exception as error:
            if out_of_memory(error):
                self._give_up("there is not the memory to record them")
            else:
                self._give_up(*reason_of(error))
            return []
        self.made.graphs.append(graph)
        self.made.report.recorded += 1
        self.made.report.update = graph.apart
        return [graph]

    def _compared(self, graph: StepGraph, batch: Any) -> Step:
        """One of the first steps of a recording, held against the same without."""
        self.unseen = True
        try:
            step, different = compared(graph, batch, self.own, self._kernels)
        except UnrecordableError as error:
            self._give_up(*reason_of(error))
            step = None
        if step is None:  # and what the error held on to is free
            return self._kernels(batch)
        self.unseen = True
        if different:
            graph.refused += 1
            if graph.refused >= TRIES:
                self._give_up(f"replayed, a step is another: {different}")
            return step
        graph.refused = 0
        graph.left -= 1
        self.made.report.held += 1
        if not graph.left:
            if self.made.auto and self.made.chosen is None:
                self.graph, self.tried, self.trial = None, graph, Trial(self.recorder.wait)
            else:
                self.graph = graph
        return step

    def _in_trial(self, batch: Any) -> Step | None:
        """A step of the trial, which of both ways takes less time; None if the recording does not hold any more."""
        trial, graph = self.trial, self.tried
        assert trial is not None
        assert graph is not None  # while it is under way
        if graph.inputs.fitting(batch) is None:
            with trial.apart():
                return self._kernels(batch)
        if not graph.holds():
            return None
        way = trial.next()
        if trial.over:
            self.trial = self.tried = None
            if trial.ratio > LESS:
                self._give_up("")
                self.made.lose(trial.ratio)
                return self._kernels(batch)
            self.made.chosen, self.made.report.ratio = True, trial.ratio
            self.graph, way = graph, 1
        given = graph.replay(batch) if way else None
        return self._kernels(batch) if given is None else self._counted(graph, *given)
