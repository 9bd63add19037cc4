"""ProgressBar: tqdm in a terminal or a notebook, and plain lines where neither is."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import Any

from axontrain import display
from axontrain.callback import Answer, Callback
from axontrain.errors import unknown
from axontrain.shown import NAME, plain
from axontrain.state import LoopState

STYLES = ("auto", "terminal", "notebook", "lines")
REDRAW_SECONDS = 0.1
LINE_SECONDS = 0.5
LONG_SECONDS = 30.0


class ProgressBar(Callback):
    """Show how far a fit has come, and its last readings.

    It is moved by the clock and reads nothing from the device: what it shows are the engine's own readings.

    Args:
        style: "terminal" or "notebook" (tqdm), "lines" (a line an epoch, and every half minute in long ones, for logs),
            or "auto".
        stream: where "terminal" and "lines" write; standard error unless given.

    >>> ProgressBar("lines").style
    'lines'
    """

    def __init__(self, style: str = "auto", *, stream: Any = None) -> None:
        super().__init__()
        if style not in STYLES:
            raise unknown("style of ProgressBar", style, STYLES)
        self.style, self.stream = style, stream
        self._bar: Any = None
        self._start = self._next = self._last_line = 0.0
        self._first_step = self._begun = 0
        self._told = -1

    def before_fit(self, state: LoopState) -> Answer:
        """Open the bar."""
        self._start = time.perf_counter()
        self._next, self._last_line = self._start + REDRAW_SECONDS, self._start - LINE_SECONDS
        self._first_step, self._told = state.step, -1
        self._begun = state.step if state.plan is None else state.plan.start_step  # earlier, where a run is resumed
        style = chosen(self._out()) if self.style == "auto" else self.style
        if style == "lines":
            return None
        if style == "notebook":
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
        options = {"file": self._out()} if style == "terminal" else {}
        self._bar = type("_Bar", (tqdm,), {"monitor_interval": 0})(  # no thread beside the training
            total=self._total(state),
            initial=state.step - self._begun,
            unit="step",
            dynamic_ncols=True,
            miniters=1,
            mininterval=0,
            **options,
        )
        return None

    def after_batch(self, state: LoopState) -> Answer:
        """Move, if a tenth of a second has passed."""
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + REDRAW_SECONDS
            if self._bar is not None:
                self._draw(state)
            elif now - self._last_line > LONG_SECONDS:
                self._line(state)
        return None

    def before_evaluate(self, state: LoopState) -> Answer:
        """Say that validation is under way."""
        if self._bar is not None:
            self._draw(state, " validating")
        return None

    def after_epoch(self, state: LoopState) -> Answer:
        """Show the epoch's readings."""
        if self._bar is not None:
            self._draw(state)
        elif time.perf_counter() - self._last_line >= LINE_SECONDS:
            self._line(state)
        return None

    def after_fit(self, state: LoopState) -> Answer:
        """Close the bar, with the last readings on it."""
        if self._bar is not None:
            self._draw(state)
            if state.error is None:  # a run that stopped early is whole; a notebook paints what is not in red
                self._bar.total = self._bar.n
            self._bar.close()
            self._bar = None
        elif self._told != state.step and state.step > self._first_step:
            self._line(state)
        return None

    def _draw(self, state: LoopState, doing: str = "") -> None:
        bar = self._bar
        bar.total = self._total(state)
        bar.n = state.step - self._begun
        bar.set_description_str(self._place(state) + doing, refresh=False)
        bar.set_postfix_str(readings(state), refresh=False)
        bar.refresh()

    def _line(self, state: LoopState) -> None:
        self._last_line, self._told = time.perf_counter(), state.step
        seconds = self._last_line - self._start
        line = f"{self._place(state)}  step {state.step}  {readings(state)}  {seconds:.1f} s"
        print(line, file=self._out(), flush=True)

    def _place(self, state: LoopState) -> str:
        plan = state.plan
        if plan is not None and plan.epochs is not None:
            return f"epoch {state.epoch}/{plan.start_epoch + plan.epochs}"
        return f"epoch {state.epoch}"

    def _total(self, state: LoopState) -> int | None:
        return None if state.plan is None else state.plan.total_steps(state)

    def _out(self) -> Any:
        return sys.stderr if self.stream is None else self.stream


def chosen(stream: Any) -> str:
    """The style that fits where the program runs."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if type(shell).__name__ == "ZMQInteractiveShell":
        return "notebook" if find_spec("ipywidgets") is not None else "lines"
    return "terminal" if getattr(stream, "isatty", lambda: False)() else "lines"


def readings(state: LoopState) -> str:
    """The last readings in one line, each a single number. A name may be out of a file, and a terminal would obey it."""
    return "  ".join(
        f"{plain(name, NAME)} {display.number(value)}"
        for name, value in state.values.items()
        if isinstance(value, (int, float))
    )
