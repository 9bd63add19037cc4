"""A step runner whose steps are one compiled graph, where that is possible.

What is compiled is held against eager before it is trusted (:mod:`axontrain.execution.twin`).
"""

from __future__ import annotations

import time
from typing import Any

import torch

from axontrain.execution.algorithms import varying
from axontrain.execution.beginning import Before
from axontrain.execution.breaks import UNKNOWN, reason_of
from axontrain.execution.compilation import IN_VAIN, Compilation
from axontrain.execution.contents import Contents
from axontrain.execution.failing import fail
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.parts import Parts
from axontrain.execution.steps import OneLoss
from axontrain.execution.twin import Outcome, differences, in_eager, of_step, sizes, unmoved, untried_for
from axontrain.execution.whole_step import WholeStep
from axontrain.guard import has_hooks
from axontrain.objective import Step
from axontrain.state import LoopState


class OneGraph:
    """Steps of one loss and one optimizer, as one graph; those that no graph is of, as another runner does them.

    Args:
        run: that other runner.
        state: the Loop's.
        made: what was compiled before.
    """

    def __init__(self, run: OneLoss, state: LoopState, made: Compilation) -> None:
        self.run, self.state, self.made = run, state, made
        (self.update,) = state.optimizers.values()
        made.current = None  # that of a fit before may be of other hooks

    def __call__(self, batch: Any) -> Step:
        graph, update = self.made.current, self.update
        if graph is None or update.veto is not None or self._watched():
            return self._otherwise(batch)
        update.ready()
        try:
            step = graph.attempt(batch)
        except Exception as error:
            fail(error, self.run.objective, self.made.precision, batch)
        if step is None:
            return self._otherwise(batch)
        update.done(step.loss, step.values, step.skipped)  # type: ignore[arg-type]  # a graph's steps have a flag
        return step

    def _watched(self) -> bool:
        """Whether somebody waits for gradients or for the optimizer's steps, or has left gradients to be added to."""
        for p in self.update.tensors:
            if p.grad is not None or p._backward_hooks or p._post_accumulate_grad_hooks:
                return True
        return any(map(has_hooks, self.update.optimizers))

    def _otherwise(self, batch: Any) -> Step:
        """A step that the graph in use is not of."""
        made, update = self.made, self.update
        under = torch._C._len_torch_dispatch_stack()  # what is compiled under a mode, torch never runs again
        if made.eager or made.divided or update.veto is not None or under or self._watched():
            made.current = None
            return self.run(batch)
        update.ready()
        for graph in made.graphs:
            graph.begin()
            if graph.left:
                if not graph.why_not(batch):
                    return self._compared(graph, batch)
                continue
            try:
                step = graph.attempt(batch)
            except Exception as error:
                fail(error, self.run.objective, made.precision, batch)
            if step is not None:
                made.current = graph if not graph.dynamic else made.current
                update.done(step.loss, step.values, step.skipped)  # type: ignore[arg-type]
                return step
        how = made.how(batch, self.state.step)
        if how == "eager":
            return self.run(batch)
        change = made.graphs[-1].why_not(batch) if made.graphs else ""
        if not made.vary(varying(update.optimizers)) and made.in_vain(self.state.step, how):
            why = f"a step fits none of the {made.misses - 1} graphs before ({change or UNKNOWN})"
            self._in_parts(why, seen=True, changes=True)
            return self.run(batch)
        return self._compared(None, batch, dynamic=how == "dynamic", change=change)

    def _in_parts(self, why: str, line: str = "", *, seen: bool = False, changes: bool = False) -> None:
        self.made.go_in_parts(why, line, seen=seen, changes=changes)
        self.run.train_step = self.made.parts = Parts(self.run.objective, self.run.train_step, self.made)

    def _keeping(self, batch: Any) -> Step:
        """A step that keeps a tensor on the module; it is told which."""
        before = Contents(self.run.objective)
        step = self.run(batch)
        if what := Contents(self.run.objective).new_since(before):
            self.made.keeps(what)
        return step

    def _compared(self, graph: WholeStep | None, batch: Any, *, dynamic: bool = False, change: str = "") -> Step:
        """One of the first steps of a graph, held against eager; without a graph, one is compiled by it."""
        made, update, objective = self.made, self.update, self.run.objective
        started, untried = time.perf_counter(), ""
        try:
            expected, nudged = self._twins(batch)
            before, norms = Before(objective), sizes(objective)
            before.take_batch(batch)
        except Exception as error:
            untried = untried_for(error)
        if untried:
            step = self.run(batch)  # whose error it may be
            made.give_up(untried, seen=True)
            return step
        change = change if graph is None else "a graph does not fit its batch any more"
        try:
            if graph is not None:
                before.take_state(update.optimizers)
                given = graph.attempt(batch)
                graph = graph if given is not None else None
            if graph is None:
                trained = [name for name in expected.trained if name in update.parameters]
                graph = WholeStep(
                    objective, update, made.precision, trained, expected.changing, varying=made.varying, dynamic=dynamic
                )
                before.take_state(update.optimizers)
                given = graph.first(batch)
                made.takes(graph, change, varying(update.optimizers))
            assert given is not None  # by one or the other
            step = given
        except Exception as error:
            if out_of_memory(error):
                raise
            if lost := before.lost():
                made.give_up(lost, seen=True)
            elif dynamic or (graph is not None and graph.dynamic):
                made.fixed = reason_of(error)[0]
                made.graphs[:] = [one for one in made.graphs if not one.dynamic]
            else:
                # A run that goes on from here would try it again, and may not see again what was in the way.
                self._in_parts(*reason_of(error), seen=made.report.graphs > 0)
                if "TensorWrapper" in str(error):  # of torch.func, which lets no tensor out but those it is given back
                    return self._keeping(batch)
            return self.run(batch)
        found = of_step(step, objective, before.named, update)
        left = unmoved(expected, before)
        told = left + differences(found, expected, nudged, norms, made.precision)
        # torch.func lays out the random numbers of what is not contiguous otherwise than autograd does.
        if told and expected.draws:
            told = left + self._unlike_functional(found, before, norms, batch)
        if told:
            lost = before.lost()
            made.differs([lost, *told] if lost else told)
            return self.run(batch)
        graph.left -= not bool(step.skipped)  # where nothing was finite, nothing was compared
        if not graph.left and not graph.dynamic:
            made.current = graph
        made.report.compared += 1
        made.report.seconds += time.perf_counter() - started
        if made.unsteady and not dynamic:
            why = f"each of the last {IN_VAIN} steps fitted none of the graphs before ({change or UNKNOWN})"
            self._in_parts(why, seen=True, changes=True)
        update.done(step.loss, step.values, step.skipped)  # type: ignore[arg-type]
        return step

    def _unlike_functional(self, found: Outcome, before: Before, norms: dict[str, float], batch: Any) -> list[str]:
        """What differs from the step as torch.func does it in eager; all is again as the compiled step has left it."""
        now = Before(self.run.objective)
        now.take_state(self.update.optimizers)
        now.take_batch(batch)
        try:
            before.put_back()
            told = differences(found, *self._twins(batch, functional=True), norms, self.made.precision)
        except Exception as error:
            told = [untried_for(error)]
        lost = now.lost()
        return [lost, *told] if lost else told

    def _twins(self, batch: Any, *, functional: bool = False) -> tuple[Outcome, Outcome]:
        """The step in eager, and the same with weights that are off by a rounding error."""
        return in_eager(self.run.objective, self.update, self.made.precision, batch, functional=functional)
