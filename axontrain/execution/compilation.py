"""What a Loop has compiled, and how it goes on: as one graph, in parts, or in eager.

Which step is done in which way follows from the data and from what is saved with the run, so that a run that is resumed is the
same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axontrain.data.structure import shapes
from axontrain.errors import warn
from axontrain.execution.breaks import UNKNOWN, changed_for
from axontrain.execution.precision import Precision
from axontrain.execution.report import StepReport

if TYPE_CHECKING:  # imported when something is compiled
    from axontrain.execution.parts import Parts
    from axontrain.execution.whole_step import WholeStep

MOST_GRAPHS = 8
IN_VAIN = 3  # so many graphs, each of which was of one step only: something changes each step
EACH = 4  # so many steps in a row, for each of which parts were compiled: likewise
# Batches of another shape than the first, as the last of an epoch, are done in eager until there are so many of them, and they
# are so large a part of all.
FEW, SHARE = 8, 8


BATCH = "'batch["  # in what torch says of one
EFFECT = "was left as it was, which eager changes"  # of what a compiled step leaves out
COUNTS = ("main", "since", "others", "variable", "misses", "last", "in_a_row", "anew")  # which decide how the next step is done


class Compilation:
    """What a Loop has compiled: it outlives a fit, and takes part in saving."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.graphs: list[WholeStep] = []
        self.current: WholeStep | None = None  # the one in use, of those
        self.parts: Parts | None = None
        self.report = StepReport("eager", "no step was done yet")
        self.main = ""  # the first batch's shape
        self.since = 0  # the step at which it came
        self.others = 0  # batches of other shapes, before sizes were taken for variable
        self.variable = False  # whether they are
        # How often a step was of no graph, at which step last, and how often in a row: a graph is made then, but not for ever.
        self.misses, self.last, self.in_a_row = 0, -1, 0
        self.anew = 0  # steps in a row for which parts were compiled
        self.changed = UNKNOWN, ""  # for what, and the line
        self.varying: set[str] = set()  # options of the optimizer that have changed: they are constants of no graph any more
        self.constants: list[dict[str, list[float]]] = []  # of each group, those that may change, as they are in the graphs
        self.lost: list[str] = []  # the graphs of the run that are not there because it was resumed: "static" or "dynamic"
        self.told_later = ""  # a warning
        self.parted = False  # whether parts were compiled
        self.settles = False  # whether a run that was resumed has yet to compile them anew
        self.eager = ""  # why steps are done in eager for good
        self.fixed = ""  # why sizes cannot be taken for variable
        self.divided = ""  # why they are compiled in parts only
        self.seen = {"eager": "", "divided": ""}  # what of it has come of what a run has seen, and is to be so when it goes on

    def state_dict(self) -> dict[str, Any]:
        """What decides how the next step is done; what another try would show again, as no compiler, is no part of it."""
        made = [*self.lost, *("dynamic" if graph.dynamic else "static" for graph in self.graphs)]
        of_options = {"varying": sorted(self.varying), "constants": self.constants, "made": sorted(made), "parted": self.parted}
        return {name: getattr(self, name) for name in COUNTS} | self.seen | of_options

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        for name in COUNTS:
            setattr(self, name, state.get(name, getattr(self, name)))  # a run of before anew was counted has none
        varying, constants = set(state.get("varying", ())), [dict(one) for one in state.get("constants", ())]
        if (varying, constants) != (self.varying, self.constants):  # of graphs that the saved run had not made yet
            self.clear()
        self.varying, self.constants = varying, constants
        made = state.get("made", ["static"])  # what a run of before did not say
        self.lost = [*made] if not self.graphs else []
        self.parted = state.get("parted", False)
        # Where the last step was one that parts were compiled for, the next may well be, too.
        self.settles = self.parted and not self.anew and self.parts is None
        self.seen = {name: state[name] for name in self.seen}
        if why := self.seen["eager"]:
            self.eager, self.report.how, self.report.reason = why, "eager", why
        elif why := self.seen["divided"]:
            self.divided, self.report.how, self.report.reason = why, "in parts", why

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which goes on as this does: without the graphs, which are of this objective; it compiles its own."""
        copied = type(self)(self.precision)
        copied.load_state_dict(self.state_dict())
        return vars(copied)

    def how(self, batch: Any, step: int) -> str:
        """How a batch is to be done that no graph is of: by a "static" graph, a "dynamic" one, or in "eager"."""
        shape = shapes(batch)
        if not self.main:
            self.main, self.since = shape, step
        if shape == self.main:
            return "static"
        self.others += not self.variable
        self.variable = self.variable or (self.others > FEW and self.others * SHARE > step - self.since)
        return "dynamic" if self.variable and not self.fixed else "eager"

    def in_vain(self, step: int, kind: str) -> bool:
        """Whether to compile another graph, "static" or "dynamic", at a step that is of none, would be in vain."""
        next_to = step == self.last + 1 and self.misses > 0
        if kind in self.lost:
            self.lost.remove(kind)
            if not (next_to and self.in_a_row):  # it may be of one that there was before
                return False
        self.in_a_row = self.in_a_row + 1 if next_to else 0
        self.misses, self.last = self.misses + 1, step
        return self.misses > MOST_GRAPHS

    @property
    def unsteady(self) -> bool:
        """Whether each of the last steps needed another graph.

        It is so once the last of them is made: a run that goes on from there cannot know whether the next step is of one.
        """
        return self.in_a_row >= IN_VAIN - 1

    def vary(self, options: list[dict[str, list[float]]]) -> bool:
        """Have those be no constants any more that are others than when a graph was compiled, by this run or before it went on.

        Graphs in which they are go: a run that is resumed later has none.
        """
        pairs = zip(options, self.constants, strict=False)
        new = {name for now, before in pairs for name, value in before.items() if value != now.get(name, value)} - self.varying
        if new:
            self.varying = self.varying | new
            self.clear()
        return bool(new)

    def clear(self) -> None:
        """Let go of the graphs, also of those that a run that was resumed has yet to make anew."""
        self.graphs.clear()
        self.lost.clear()
        self.current = None

    def counts(self, new: int, *, first: bool) -> None:
        """Count graphs that were compiled of parts for a step, one of the ``first`` or not.

        Where each step wants others, it goes on in eager.
        """
        self.report.graphs += new
        if not new:
            self.anew, self.changed = 0, (UNKNOWN, "")
            return
        self.anew += not self.settles
        self.parted, self.settles = True, False
        why, line = changed_for(new)
        # A last batch of another size is not what changes each time: of several reasons, one that is of something else, and of
        # those one with a line of the user's.
        of_batch, known = why == UNKNOWN or BATCH in why, self.changed[0] != UNKNOWN
        if not known or line or not (of_batch or self.changed[1]):
            self.changed = why, line
        if not first:
            self.report.recompilations += new
            self.report.changes.append(f"{why}{f', at {line}' if line else ''}")
        if self.anew >= EACH:
            why, line = self.changed
            self.seen["eager"] = (
                f"torch compiles the step anew each time, since what it takes for given changes: {why} (a number that changes "
                f"can be a buffer, by register_buffer)"
            )
            self.give_up(self.seen["eager"], line)

    def takes(self, graph: WholeStep, change: str, options: list[dict[str, list[float]]]) -> None:
        """Count a graph that was compiled with these options; ``change`` says what did not fit those before."""
        self.graphs.append(graph)
        self.constants = [{name: of for name, of in group.items() if name not in self.varying} for group in options]
        self.report.how, self.report.reason = "one graph", ""
        self.report.graphs += 1
        if self.report.graphs > 1:
            self.report.recompilations += 1
            self.report.changes.append(change or UNKNOWN)

    def tell(self) -> None:
        """Give the warning that was to wait until it is known whether parts can be compiled once for all."""
        if self.told_later:
            warn(self.told_later)
            self.told_later = ""

    def go_in_parts(self, why: str, line: str = "", *, seen: bool = False, changes: bool = False) -> None:
        """Compile parts of the step from now on; say so where there is a line, or a name, that somebody could mend.

        ``seen`` if it has come of several steps, which a run that goes on from here will not see again; ``changes`` if that is
        something which is another each time.
        """
        if seen:
            self.seen["divided"] = why
        self.divided, self.report.how, self.report.reason = why, "in parts", why
        self.clear()
        if line:
            warn(
                f"compile=True: the whole step cannot become one graph: {why}, at {line}. Forward and backward are compiled in "
                f"parts around that line, and the update is done in eager"
            )
        elif changes:
            self.told_later = (
                f"compile=True: the step is not one graph any more: {why}. Forward and backward are compiled in parts, and the "
                f"update is done in eager. A number that changes can be a buffer, by register_buffer"
            )

    def keeps(self, what: str) -> None:
        """Say what a step keeps on the module, where that is why it is compiled in parts."""
        why = f"a step keeps a tensor that it has computed ({what}), where a whole step can only write to a buffer"
        self.divided = self.report.reason = why
        warn(
            f"compile=True: the whole step cannot become one graph: {why}. Forward and backward are compiled in parts, and the "
            f"update is done in eager. What is to be kept can be a buffer, by register_buffer; what is to be seen, a value of "
            f"the Step"
        )

    def differs(self, what: list[str], *, late: bool = False) -> None:
        """Do steps in eager from now on, as a compiled one was another than in eager; ``late`` if it was not the first."""
        told = "; ".join(what[:4]) + ("; the step before it was compiled anew, and done so" if late else "")
        how = "leaves out what eager does" if all(map(is_effect, what)) else "differs from eager beyond rounding"
        self.seen["eager"] = f"compiled, a step {how}: {told}"
        self.give_up(self.seen["eager"])

    def give_up(self, why: str, line: str = "", *, seen: bool = False) -> None:
        """Do steps in eager from now on, and say so; ``seen`` if another try might go otherwise."""
        self.told_later = ""
        if seen:
            self.seen["eager"] = why
        self.eager, self.report.how, self.report.reason = why, "eager", why
        self.clear()
        warn(f"compile=True: {why}{f', at {line}' if line else ''}. Steps are done in eager from here on")


def is_effect(what: str) -> bool:
    """Whether a difference is only that something around the objective was not changed."""
    return what.endswith(EFFECT)
