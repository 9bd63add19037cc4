"""A step runner whose steps are replayed from CUDA graphs, where that is possible: bit for bit what they are without.

A step is recorded once it was done some times with batches of its shapes. What was recorded is held against the same steps done
kernel by kernel before it is trusted; and before each replay shapes, attributes and options are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from axontrain import randomness
from axontrain.execution import recording
from axontrain.execution.assumptions import hooked
from axontrain.execution.beginning import Before, Changing
from axontrain.execution.graphing import Graphing
from axontrain.execution.lines import told
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.outcome import Outcome
from axontrain.execution.parts import Parts
from axontrain.execution.rates import fixed
from axontrain.execution.statics import Updated, described, leaves_of, unlike
from axontrain.execution.step_graph import StepGraph, UnrecordableError
from axontrain.execution.steps import OneLoss, SeveralLosses
from axontrain.execution.tracing import Trace
from axontrain.execution.trial import LESS, Trial
from axontrain.objective import Step
from axontrain.state import LoopState

WARM_UP = 3  # steps of a batch's shapes before one is recorded: they make what is made once, and let libraries choose kernels
COMPARED = 2  # the first shows what is recorded wrong; the second, what would be another each time
MOST = 8  # recordings at a time
KINDS = 64  # of batches, of which it is counted how often they come
WORTH = 50  # replays that pay for a recording
IN_VAIN = 4  # so many in a row that did not: something changes all the time
TRIES = 3  # where kernels sum in any order, and two steps alike differ in their last bits


class Graphed:
    """Steps that are replayed; those that nothing is recorded of, as another runner does them.

    Args:
        run: that other runner.
        state: the Loop's.
        made: what becomes of it, for the Loop's report.
        predictions: whether steps give predictions, as metrics of training need.
    """

    def __init__(self, run: OneLoss | SeveralLosses, state: LoopState, made: Graphing, *, predictions: bool) -> None:
        self.run, self.state, self.made, self.predictions = run, state, made, predictions
        device = next(run.objective.parameters()).device
        self.updates = [*state.optimizers.values()]
        self.recorder = recording.Recorder(device, Changing(run.objective).generators)
        self.graph: StepGraph | None = None  # the one in use
        self.seen: list[tuple[Any, int]] = []  # kinds of batches, and how often they came
        self.trial: Trial | None = None
        self.tried: StepGraph | None = None  # by the trial
        scaler = getattr(run, "scaler", None)
        self.own = [] if scaler is None else [scaler.scale, scaler.good]  # what a runner itself changes
        self.vain = self.replays = self.refused = 0
        self.apart = ""  # why updates are not to be recorded, found while it was tried
        self.unseen = False  # whether the last steps were replays, of which the versions of tensors know nothing

    def __call__(self, batch: Any) -> Step:
        graph = self.graph
        if graph is None or self._watched():
            return self._otherwise(batch)
        for update in self.updates:
            update.ready()
        given = graph.replay(batch)
        return self._otherwise(batch) if given is None else self._counted(graph, *given)

    def _counted(self, graph: StepGraph, step: Step, updated: Sequence[Updated]) -> Step:
        """The step of a replay: what of it is no work of the device."""
        self.made.report.replayed += 1
        self.replays += 1
        self.unseen = True
        if graph.gradients:
            graph.put_gradients()
            if not graph.whole:
                for update, _, _, flag in updated:
                    update.step(flag)
        for update, loss, terms, flag in updated:
            update.done(loss, terms, flag)
        if graph.gradients:
            graph.drop_gradients()
        return step

    def _watched(self) -> bool:
        """Whether this step is to be left to the other runner: somebody waits for gradients, or has asked to skip it."""
        for update in self.updates:
            if update.veto is not None:
                return True
            for p in update.tensors:
                if p.grad is not None or p._backward_hooks or p._post_accumulate_grad_hooks:
                    return True
        return torch.is_anomaly_enabled() or bool(torch._C._len_torch_dispatch_stack())

    def _otherwise(self, batch: Any) -> Step:
        """A step that the recording in use is not of."""
        made = self.made
        if made.eager or self._watched():
            return self._kernels(batch)
        for update in self.updates:
            update.ready()
        if self.trial is not None and (step := self._in_trial(batch)) is not None:
            return step
        for graph in made.graphs:
            if graph is not self.graph and graph.left == 0 and (given := graph.replay(batch)) is not None:
                self.graph = graph
                return self._counted(graph, *given)
        for graph in made.graphs:
            if graph.left and graph.inputs.fitting(batch) is not None:
                return self._compared(graph, batch)
        if self._often(batch):
            return self._recorded(batch)
        return self._kernels(batch)

    def _kernels(self, batch: Any) -> Step:
        """A step as the other runner does it."""
        if self.unseen:
            self.unseen = False
            torch.autograd.graph.increment_version([*self.run.objective.parameters(), *self.run.objective.buffers()])
        return self.run(batch)

    def _often(self, batch: Any) -> bool:
        """Whether batches of this kind have come so often that a step of them is to be recorded."""
        kind = described(batch)
        for index, (other, count) in enumerate(self.seen):
            if other == kind:
                self.seen[index] = (kind, count + 1)
                return count >= WARM_UP and (len(self.made.graphs) < MOST or self._stale(batch) != [])
        if why := unlike(batch):
            self._give_up(why)
        elif len(self.seen) < KINDS:
            self.seen.append((kind, 1))
        elif not self.made.graphs:
            self._give_up(f"the first {KINDS} batches that differ, in shapes or in what is no tensor, came too seldom")
        return False

    def _stale(self, batch: Any) -> list[StepGraph]:
        """Recordings of such batches, which do not hold any more."""
        return [one for one in self.made.graphs if one.inputs.fitting(batch) is not None]

    def _give_up(self, why: str, line: str = "") -> None:
        self.graph = self.trial = self.tried = None
        self.made.give_up(why, line)
        self.recorder.renew()
        self.seen.clear()

    def _recorded(self, batch: Any) -> Step:
        """Record the step of a batch, and do it."""
        if stale := self._stale(batch):
            why, options = stale[0].broken() or "something in the module", stale[0].assumptions.hold()
            self.vain = self.vain + 1 if self.replays < WORTH else 0
            if self.vain >= IN_VAIN and options and stale[0].whole:
                self.apart, self.vain = f"{why}, and so on", 0
            if self.vain >= IN_VAIN:
                self._give_up(f"what was recorded holds for no time: {why}, and so on")
                return self._kernels(batch)
            self.made.report.rerecorded.append(why)
            stale.clear()
            self.graph = None
            self.made.close()  # all of them, as they share memory
            self.recorder.renew()
            self.replays = 0
            return self._kernels(batch)  # which makes anew what may be gone, as an optimizer's state
        self.replays = 0
        graph, before = None, None
        try:
            reason = self.apart or fixed(self.updates)
            if reason and isinstance(self.run, SeveralLosses):
                raise UnrecordableError(f"updates lie between the losses of a step, and {reason}")
            if part := hooked(self.run.objective):
                raise UnrecordableError(f"{part} has hooks, which would not be called")
            graph = StepGraph(self.run, self.updates, batch, whole=not reason, predictions=self.predictions)
            before = self._before()
            self._try(graph)
            self._put_back(graph, before)
            graph.record(self.recorder)
            self._put_back(graph, before)
        except Exception as error:
            if graph is not None:
                if before is not None:
                    self._put_back(graph, before)
                graph.close()
            if out_of_memory(error):
                self._give_up("there is not the memory to record them and to hold them against those of before")
            else:
                self._give_up(*_reason(error))
            return self._kernels(batch)
        graph.left, self.made.report.update = COMPARED, reason
        self.made.graphs.append(graph)
        self.made.report.recorded += 1
        return self._compared(graph, batch, before)

    def _before(self) -> Before:
        before = Before(self.run.objective)
        before.take_state([one for update in self.updates for one in update.optimizers])
        before.take(self.own)
        return before

    def _put_back(self, graph: StepGraph, before: Before) -> None:
        graph.drop_gradients()
        graph.assumptions.put_back()
        before.put_back()

    def _try(self, graph: StepGraph) -> None:
        """Compute the step as it is to be recorded, on the stream of recordings, and look for what cannot be.

        Then twice more: numbers that Python gives to kernels are to be the same, as a recording will repeat them.

        Raises:
            UnrecordableError: if there is something.
        """
        drawn = randomness.snapshot()
        with self.recorder.aside() as waits:
            graph.compute()
        graph.drop_gradients()
        if waits:
            raise UnrecordableError("a step waits for the device, as for what .item() reads", told(waits)[0])
        if drawing := self.recorder.on_host(randomness.drawn(drawn, randomness.snapshot())):
            raise UnrecordableError(f"a step draws random numbers on the host, from {drawing}: draw them on the device")
        if not graph.assumptions.hold():
            what = graph.assumptions.broken()
            raise UnrecordableError(f"Python changes something in each step, and is not called in a replay: {what}")
        if isinstance(getattr(self.run, "train_step", None), Parts):  # what is compiled is not run under a mode
            return
        traces = Trace(), Trace()
        for trace in traces:
            with trace:
                graph.compute()
            graph.drop_gradients()
        if what := traces[0].unlike(traces[1]):
            raise UnrecordableError(f"two steps call for other kernels, and a replay would not: {what}")

    def _compared(self, graph: StepGraph, batch: Any, before: Before | None = None) -> Step:
        """Do a step in two ways from one beginning: replayed, and kernel by kernel for good."""
        for update in self.updates:
            update.ready()
        if not graph.rates.set() or not graph.assumptions.hold():
            return self._recorded(batch)
        try:
            before = self._before() if before is None else before
            given = graph.replay(batch)
            assert given is not None  # as was looked
            graph.put_gradients()
            replayed = self._outcome(graph, given[0]).kept()
            self._put_back(graph, before)
            if graph.whole:
                step = self._kernels(batch)
            else:  # the update is not recorded: gradients are compared, which it takes away
                graph.inputs.take(leaves_of(batch))
                step = graph.compute()
            self.unseen = True
            live = self._outcome(graph, step)
            different = replayed.unlike(live)
            if different:
                different = self._wavers(graph, batch, before, replayed, live)
            if not graph.whole:
                self._put_back(graph, before)
        except Exception as error:
            if not out_of_memory(error) or before is None:
                raise
            self._put_back(graph, before)
            self._give_up("there is not the memory to hold them against those of before")
            return self._kernels(batch)
        if not graph.whole:
            step = self._kernels(batch)
        if different:
            self.refused += 1
            if self.refused >= TRIES:
                self._give_up(f"replayed, a step is another: {different}")
            return step
        self.refused = 0
        graph.left -= 1
        self.made.report.held += 1
        if not graph.left:
            self._trusted(graph)
        return step

    def _wavers(self, graph: StepGraph, batch: Any, before: Before, replayed: Outcome, live: Outcome) -> str:
        """What of a replay is another by more than kernels differ from themselves; all is as it was afterwards."""
        now, live = self._before(), live.kept()
        gradients = [(p, p.grad) for update in self.updates for p in update.tensors]
        self._put_back(graph, before)
        graph.inputs.take(leaves_of(batch))
        again = self._outcome(graph, graph.compute())
        different = replayed.unlike(live, again)
        now.put_back()
        for p, gradient in gradients:
            p.grad = gradient
        return different

    def _outcome(self, graph: StepGraph, step: Step) -> Outcome:
        of = self.run.objective, self.updates, self.own, step
        return Outcome.of(*of, whole=graph.whole, predictions=self.predictions)

    def _trusted(self, graph: StepGraph) -> None:
        if self.made.auto and self.made.chosen is None:
            self.graph, self.tried, self.trial = None, graph, Trial(self.recorder.wait)
        else:
            self.graph = graph

    def _in_trial(self, batch: Any) -> Step | None:
        """A step of the trial, which of both ways takes less time; None if that has ended in between."""
        trial, graph = self.trial, self.tried
        assert trial is not None
        assert graph is not None  # while it is under way
        if graph.inputs.fitting(batch) is None:
            with trial.apart():
                return self._kernels(batch)
        if not graph.assumptions.hold() or not graph.rates.set():  # to be recorded anew
            self.trial = self.tried = None
            return None
        way = trial.next()
        if trial.over:
            self.trial = self.tried = None
            if trial.ratio > LESS:
                self.graph = None
                self.made.lose(trial.ratio)
                self.recorder.renew()
                return self._kernels(batch)
            self.made.chosen, self.made.report.ratio = True, trial.ratio
            self.graph, way = graph, 1
        if not way:
            return self._kernels(batch)
        given = graph.replay(batch)
        assert given is not None  # as was looked
        return self._counted(graph, *given)


def _reason(error: Exception) -> tuple[str, str]:
    """Why something could not be recorded, in short, and the line of the user's; "" where none is to blame."""
    if isinstance(error, UnrecordableError):
        return str(error.args[0]), error.args[1] if len(error.args) > 1 else ""
    first: BaseException = error
    while first.__context__ is not None:  # what follows is of a recording that ended in the middle
        first = first.__context__
    places, entry = [], first.__traceback__
    while entry is not None:
        places.append((entry.tb_frame.f_code.co_filename, entry.tb_lineno))
        entry = entry.tb_next
    line = told(reversed(places))[0]
    head = next((text.strip() for text in str(first).splitlines() if text.strip()), type(first).__name__)
    return f"{type(first).__name__}: {head}", line
