"""What a Loop has recorded of its steps, and why not: it outlives a fit, and the recordings do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    def waits(self, why: str) -> None:
        """Say why steps are not replayed for now; they are again once that has ended."""
        if not self.auto:
            warn(f"graph=True: steps are not replayed: {why}. They are done as without it for as long")
        self.report.not_replayed = why

    def lose(self, ratio: float) -> None:
        """Replays took longer, or no less: do steps kernel by kernel from now on, in later fits too."""
        self.chosen = False
        self.give_up(f"that takes {ratio:.2f} of the time")

    def close(self) -> None:
        """Give the memory of the recordings back: of all together, since they share it."""
        while self.graphs:
            self.graphs.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which goes on as this does: without the recordings, which are of this objective."""
        return {**vars(self), "graphs": [], "eager": "", "predictions": True}

    def begin(self) -> None:
        """A fit begins: what has kept the last from being recorded may be gone."""
        self.close()
        self.eager, self.predictions = "", True
