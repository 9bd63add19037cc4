"""A step runner whose steps are replayed from CUDA graphs, where that is possible: bit for bit what they are without.

A step is recorded once it was done some times with batches of its shapes. What was recorded is held against the same steps done
kernel by kernel before it is trusted; and before each replay shapes, attributes and options are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from axontrain import randomness
from axontrain.execution import recording
from axontrain.execution.beginning import Before, Changing
from axontrain.execution.graphing import Graphing
from axontrain.execution.lines import told
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.parts import Parts
from axontrain.execution.rates import fixed
from axontrain.execution.statics import Updated, described, leaves_of, unlike
from axontrain.execution.step_graph import StepGraph, UnrecordableError
from axontrain.execution.steps import OneLoss, SeveralLosses
from axontrain.execution.tracing import Trace
from axontrain.execution.trial import Trial
from axontrain.objective import Step
from axontrain.state import LoopState

WARM_UP = 3  # steps of a batch's shapes before one is recorded: they make what is made once, and let libraries choose kernels
COMPARED = 2  # the first shows what is recorded wrong; the second, what would be another each time
MOST = 8  # recordings at a time
IN_VAIN = 4  # so many in a row that were replayed no oftener than they were compared: something changes all the time
TIMES = 8.0  # what kernels that sum in any order differ by from themselves, at most so many times


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
        scaler = getattr(run, "scaler", None)
        self.own = [] if scaler is None else [scaler.scale, scaler.good]  # what a runner itself changes
        self.vain = self.replays = 0
        self.apart = ""  # why updates are not to be recorded, found while it was tried
        self.aside = False  # whether the last steps were replays, of which the versions of tensors know nothing

    def __call__(self, batch: Any) -> Step:
        graph = self.graph
        if graph is None or self._watched():
            return self._otherwise(batch)
        for update in self.updates:
            update.ready()
        given = graph.replay(batch)
        if given is None:
            return self._otherwise(batch)
        return self._counted(*given)

    def _counted(self, step: Step, updated: Sequence[Updated]) -> Step:
        self.made.report.replayed += 1
        self.replays += 1
        self.aside = True
        for update, loss, terms, flag in updated:
            update.done(loss, terms, flag)
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
        if self.trial is not None:
            return self._tried(batch)
        for update in self.updates:
            update.ready()
        for graph in made.graphs:
            if graph is not self.graph and graph.left == 0 and (given := graph.replay(batch)) is not None:
                self.graph = graph
                return self._counted(*given)
        for graph in made.graphs:
            if graph.left and graph.inputs.fitting(batch) is not None:
                return self._compared(graph, batch)
        if self._often(batch):
            return self._recorded(batch)
        return self._kernels(batch)

    def _kernels(self, batch: Any) -> Step:
        """A step as the other runner does it."""
        if self.aside:
            self.aside = False
            torch.autograd.graph.increment_version([*self.run.objective.parameters(), *self.run.objective.buffers()])
        return self.run(batch)

    def _often(self, batch: Any) -> bool:
        """Whether batches of these shapes have come so often that a step of them is to be recorded."""
        kind = described(batch)
        for index, (other, count) in enumerate(self.seen):
            if other == kind:
                self.seen[index] = (kind, count + 1)
                return count >= WARM_UP
        if why := unlike(batch):
            self._give_up(why)
        elif len(self.seen) < 64:  # of data whose sizes vary without end, only those that come first
            self.seen.append((kind, 1))
        return False

    def _give_up(self, why: str, line: str = "") -> None:
        self.graph = self.trial = None
        self.made.give_up(why, line)
        self.seen.clear()

    def _recorded(self, batch: Any) -> Step:
        """Record the step of a batch, and do it."""
        made = self.made
        stale = [one for one in made.graphs if one.inputs.fitting(batch) is not None]  # which did not hold any more
        why = stale[0].broken() if stale else ""
        self.vain = self.vain + 1 if stale and self.replays <= COMPARED else 0
        self.replays = 0
        for one in stale:
            made.graphs.remove(one)
            one.close()
        if self.vain >= IN_VAIN and stale[0].whole and stale[0].assumptions.hold():
            self.apart, self.vain = f"{why or 'an option'}, and so on", 0
        if self.vain >= IN_VAIN:
            self._give_up(f"what was recorded holds for no time: {why or 'something'}, and so on")
            return self._kernels(batch)
        if len(made.graphs) >= MOST:
            return self._kernels(batch)
        if stale:
            made.report.rerecorded.append(why or "something in the module")
        self.graph = None
        before = None
        try:
            reason = self.apart or fixed(self.updates)
            if reason and isinstance(self.run, SeveralLosses):
                raise UnrecordableError(f"updates lie between the losses of a step, and {reason}")
            graph = StepGraph(self.run, self.updates, batch, whole=not reason, predictions=self.predictions)
            made.report.update = reason
            before = self._before()
            self._try(graph)
            before.put_back()
            graph.record(self.recorder)
        except Exception as error:
            if before is not None:
                graph.assumptions.put_back()
                before.put_back()
            if out_of_memory(error):
                self._give_up("there is not the memory to record them and to hold them against those of before")
            else:
                self._give_up(*_reason(error))
            return self._kernels(batch)
        graph.left = COMPARED
        made.graphs.append(graph)
        made.report.recorded += 1
        return self._compared(graph, batch, before)

    def _before(self) -> Before:
        before = Before(self.run.objective)
        before.take_state([one for update in self.updates for one in update.optimizers])
        before.take(self.own)
        return before

    def _try(self, graph: StepGraph) -> None:
        """Compute the step as it is to be recorded, on the stream of recordings, and look for what cannot be.

        Then twice more: numbers that Python gives to kernels are to be the same, as a recording will repeat them.

        Raises:
            UnrecordableError: if there is something.
        """
        drawn = randomness.snapshot()
        with self.recorder.aside() as waits:
            graph.compute()
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
        if what := traces[0].unlike(traces[1]):
            raise UnrecordableError(f"two steps call for other kernels, and a replay would not: {what}")

    def _compared(self, graph: StepGraph, batch: Any, before: Before | None = None) -> Step:
        """Do a step in three ways from one beginning: kernel by kernel, replayed, and kernel by kernel for good."""
        before = self._before() if before is None else before
        for update in self.updates:
            update.ready()
        if not graph.rates.set() or not graph.assumptions.hold():
            return self._recorded(batch)
        try:
            graph.inputs.take(leaves_of(batch))
            once = _Outcome(self, graph.once())
            before.put_back()
            given = graph.replay(batch)
            assert given is not None  # as was looked
            replayed = _Outcome(self, given[0])
            before.put_back()
        except Exception as error:
            before.put_back()
            if not out_of_memory(error):
                raise
            self._give_up("there is not the memory to hold them against those of before")
            return self._kernels(batch)
        self.aside = True
        step = self._kernels(batch)
        if different := replayed.unlike(_Outcome(self, step), once):
            self._give_up(f"replayed, a step is another: {different}")
            return step
        graph.left -= 1
        self.made.report.held += 1
        if not graph.left:
            self._trusted(graph)
        return step

    def _trusted(self, graph: StepGraph) -> None:
        made = self.made
        if made.auto and made.chosen is None:
            self.graph, self.trial = None, Trial(self.recorder.wait)
            self.tried = graph
        elif made.auto and not made.chosen:
            self._give_up(made.report.not_replayed)
        else:
            self.graph = graph

    def _tried(self, batch: Any) -> Step:
        """A step of the trial, which of both ways takes less time."""
        trial, graph = self.trial, self.tried
        assert trial is not None  # it is under way
        if graph.inputs.fitting(batch) is None or not graph.assumptions.hold():
            trial.again()
            return self._kernels(batch)
        way = trial.next()
        if trial.over:
            self.trial, ratio = None, trial.ratio
            self.made.chosen = ratio <= 1.0
            if self.made.chosen:
                self.graph = graph
                self.made.report.ratio = ratio
                return self(batch)
            self._give_up(f"that takes {ratio:.2f} times as long")
            return self._kernels(batch)
        if not way:
            return self._kernels(batch)
        for update in self.updates:
            update.ready()
        given = graph.replay(batch)
        if given is None:
            trial.again()
            return self._kernels(batch)
        return self._counted(*given)


class _Outcome:
    """What a step has made of all that it changes, and its loss."""

    def __init__(self, of: Graphed, step: Step) -> None:
        objective = of.run.objective
        self.found = {f"the update of {name}": p.detach().clone() for name, p in objective.named_parameters()}
        self.found |= {f"the buffer {name}": b.detach().clone() for name, b in objective.named_buffers()}
        for update in of.updates:
            names = {id(p): name for name, p in update.parameters.items()}
            for optimizer in update.optimizers:
                for p, state in optimizer.state.items():
                    for key, value in state.items():
                        if isinstance(value, Tensor):
                            self.found[f"the state {key} of {names.get(id(p), 'a parameter')}"] = value.clone()
        self.found |= {f"the scale of losses ({index})": own.clone() for index, own in enumerate(of.own)}
        self.found["the loss"] = step.loss.detach().clone()
        self.drawn = randomness.snapshot()

    def unlike(self, expected: _Outcome, once: _Outcome) -> str:
        """What is another than expected; "" if nothing is. Where two steps alike differ in their last bits, so may it."""
        if randomness.drawn(self.drawn, expected.drawn):
            return "it has drawn other random numbers"
        for name, right in expected.found.items():
            mine, again = self.found[name], once.found.get(name)
            if mine.shape != right.shape or (not _same(mine, right) and (again is None or _same(again, right))):
                return name
            if again is not None and not _same(again, right):
                gap, own = (float((one.double() - right.double()).abs().max()) for one in (mine, again))
                if not gap <= TIMES * own:
                    return f"{name}, by {gap:.3g}, where it differs from itself by {own:.3g}"
        return ""


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, and what is no number in the same places."""
    return bool(torch.equal(a, b)) or bool(((a == b) | ((a != a) & (b != b))).all())


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
