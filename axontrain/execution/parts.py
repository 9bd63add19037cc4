"""The training step compiled in parts: forward and backward, where torch can; the update is done in eager."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from axontrain.data.structure import shapes
from axontrain.execution import compiled
from axontrain.execution.beginning import Around, Before
from axontrain.execution.breaks import reason_of, trying
from axontrain.execution.failing import fail
from axontrain.execution.inductor import Backend, not_donated
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.steps import check
from axontrain.execution.twin import COMPARED, differences, in_eager, of_step, unmoved, untried_for
from axontrain.objective import Objective, Step

if TYPE_CHECKING:
    from axontrain.execution.compilation import Compilation


MOST_SHAPES = 16  # with more of them, one graph serves all
NOTHING = (
    "torch has compiled nothing of train_step: its compiler is switched off, or it has compiled a function of it as often as "
    "torch._dynamo.config.recompile_limit says, for other Loops"
)


class Parts:
    """Computes what ``train_step`` gives by what torch has compiled of it.

    Args:
        objective: what is trained.
        plain: its training step in eager.
        made: what counts, and says whether it is to go on.
    """

    def __init__(self, objective: Objective, plain: Callable[[Any], Any], made: Compilation) -> None:
        self.objective, self.plain, self.made = objective, plain, made
        self.backend, self.left, self.counted = Backend(direct=False), COMPARED, 0
        self.shapes: set[str] = set()  # of batches of which a step was held against eager
        self.trusted = False  # whether the first steps are through
        self.late = False  # whether a step was done by what was not held against eager yet

        def train_step(batch: Any) -> Any:
            return plain(batch)

        # Of its own code, since Dynamo keeps what it compiles by that.
        train_step.__code__ = train_step.__code__.replace(co_name="train_step")
        # And what it calls, as a method of a class that other Loops have too, is counted apart from what they compile.
        compile: Any = torch.compile
        own = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(compile).parameters else {}
        self.compiled = compile(train_step, backend=self.backend, **own)

    def __call__(self, batch: Any) -> Step:
        if self.made.eager:
            return self.plain(batch)  # type: ignore[no-any-return]  # what it is, the runner looks at
        if self.left:
            return self._compared(batch) if compiled.works() else self.plain(batch)
        if len(self.shapes) < MOST_SHAPES and shapes(batch) not in self.shapes:
            self.left = 1  # it is of another graph, or makes the one that there is one of variable sizes
            return self._compared(batch)
        try:
            step: Step = self.compiled(batch)
        except Exception as error:
            fail(error, self.objective, self.made.precision, batch)
        self._count()
        return step

    def _count(self) -> None:
        new = self.backend.graphs - self.counted
        if new or self.made.anew:
            self.counted += new
            self.made.counts(new, first=not self.trusted)
            if new and self.trusted:  # for something that has changed: it is held against eager from the next step on
                self.left, self.late = COMPARED, True
        self.trusted = self.trusted or not self.left
        if self.trusted and not new:
            self.made.tell()

    def _compared(self, batch: Any) -> Step:
        """A step of the first, held against eager by its loss and its gradients."""
        made, objective = self.made, self.objective
        started, untried = time.perf_counter(), ""
        try:
            expected, nudged = in_eager(objective, None, made.precision, batch)
            before = Before(objective)
            before.take_batch(batch)
        except Exception as error:
            untried = untried_for(error)
        if untried:
            plain: Step = self.plain(batch)  # whose error it may be
            made.give_up(untried, seen=True)
            return plain
        buffers = {name: before.named[name] for name, _ in objective.named_buffers()}
        try:
            with trying():
                tried = self.compiled(batch)
            check(tried, objective)
            between = Around(objective)  # backward is run once more, with its hooks
            names, live = zip(*((name, p) for name, p in objective.named_parameters() if p.requires_grad), strict=True)
            with not_donated():
                found_by = torch.autograd.grad(tried.loss, live, retain_graph=True, allow_unused=True)
            left_out = unmoved(expected, before)
            between.put_back()
            gradients = zip(names, found_by, strict=True)
            found = of_step(tried, objective, buffers)
            found.found |= {f"the gradient of {name}": one for name, one in gradients if one is not None}
        except Exception as error:
            if out_of_memory(error):
                raise
            lost = before.lost(gradients=True)
            why, line = (lost, "") if lost else reason_of(error)
            made.give_up(why, line, seen=bool(lost))
            return self.plain(batch)  # type: ignore[no-any-return]
        if told := left_out + differences(found, expected, nudged, {}, made.precision):
            lost = before.lost(gradients=True)
            made.differs([lost, *told] if lost else told, late=self.late)
            return self.plain(batch)  # type: ignore[no-any-return]
        self.left, self.late = self.left - 1, False
        self.shapes.add(shapes(batch))
        made.report.compared += 1
        self._count()
        made.report.seconds += time.perf_counter() - started
        if not self.left and not self.backend.graphs:
            made.give_up(NOTHING)
        return tried  # type: ignore[no-any-return]  # a step that was looked at
