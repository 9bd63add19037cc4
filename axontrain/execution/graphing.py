"""What a Loop has recorded of its steps, and why not: it outlives a fit, and the recordings do not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

from axontrain.errors import ConfigurationError, warn
from axontrain.execution.report import StepReport

if TYPE_CHECKING:  # imported when something is recorded
    from axontrain.execution.step_graph import StepGraph

AUTO = "auto"


class Graphing:
    """How a Loop replays its steps.

    Args:
        mode: True, or "auto" to do so where it takes less time; False is None of this class.
    """

    def __init__(self, mode: bool | str) -> None:
        self.auto = mode == AUTO
        self.report = StepReport("eager", "compile=False")
        self.graphs: list[StepGraph] = []
        self.eager = ""  # why steps are not replayed for the rest of a fit
        self.chosen: bool | None = None  # whether replays took less time; None until that was tried
        self.predictions = True  # whether somebody may look at those of a step

    @staticmethod
    def of(mode: Any) -> Graphing | None:
        """What ``graph=`` asks for.

        Raises:
            ConfigurationError: for anything but True, False and "auto".
        """
        if mode is False:
            return None
        if mode is not True and mode != AUTO:
            raise ConfigurationError(f"graph={mode!r}: True, False or 'auto', which times both and keeps what takes less")
        return Graphing(mode)

    def give_up(self, why: str, line: str = "") -> None:
        """Do steps kernel by kernel from now on; say so, where they were asked to be replayed."""
        at = f", at {line}" if line else ""
        if why and not self.auto and self.eager != why:
            warn(f"graph=True: steps cannot be replayed from a CUDA graph: {why}{at}. They are done as without it")
        self.eager, self.report.not_replayed = why, f"{why}{at}"
        self.close()

    def lose(self, ratio: float) -> None:
        """Replays took longer, or no less: do steps kernel by kernel from now on, in later fits too."""
        self.chosen = False
        self.give_up(f"that takes {ratio:.2f} of the time")

    def close(self) -> None:
        """Give the memory of the recordings back: of all together, since they share it."""
        while self.graphs:
            self.graphs.pop().close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """What goes on as this does, without its recordings, which are of this objective."""
        copied = type(self)(AUTO if self.auto else True)
        memo[id(self)] = copied
        copied.report, copied.chosen = copy.deepcopy(self.report, memo), self.chosen
        return copied

    def begin(self) -> None:
        """A fit begins: what has kept the last from being recorded may be gone."""
        self.close()
        self.eager, self.predictions = "", True
