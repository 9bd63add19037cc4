"""Monitor: watching one reading for being better than the best so far."""

from __future__ import annotations

import math
from typing import Any

from axontrain.callback import Answer, Callback
from axontrain.errors import ConfigurationError, unknown, whole
from axontrain.state import LoopState

LOWER_IS_BETTER = ("loss", "mse", "rmse", "mae", "perplexity", "error")
HIGHER_IS_BETTER = (
    "accuracy",
    "precision",
    "recall",
    "f1",
    "auroc",
    "r2",
    "cosine_similarity",
    "dice",
    "iou",
    "top",
)


class Monitor(Callback):
    """The base of callbacks that act when a reading has not become better for a while.

    A ``val/`` reading is looked at after each validation, any other at each epoch's end. NaN is never better.

    Args:
        monitor: the reading, as ``"val/loss"``.
        patience: after so many looks in a row without a better reading it acts.
        mode: "min" or "max", which is better; told from the name where it is a known one.
        min_delta: by how much a reading has to be better.
    """

    restates = True

    def __init__(self, monitor: str, *, patience: int, mode: str | None = None, min_delta: float = 0.0, **cadence: Any) -> None:
        super().__init__(**cadence)
        if not min_delta >= 0:
            raise ConfigurationError(f"min_delta={min_delta!r}: 0 or more")
        if mode not in (None, "min", "max"):
            raise unknown("mode", mode, ("min", "max"))
        self.monitor, self.min_delta = monitor, min_delta
        self.patience = whole("patience", patience, what="of looks")
        self.mode = mode or better_of(monitor)
        self.best = self._worst()
        self.best_step: int | None = None
        self.waited = 0

    @property
    def label(self) -> str:
        return f"{type(self).__name__}({self.monitor})"

    def before_fit(self, state: LoopState) -> Answer:
        """Complain now rather than never act: without validation no ``val/`` reading will come."""
        if self.monitor.startswith("val/") and not state.validates:
            raise ConfigurationError(
                f"{self!r} watches {self.monitor!r}, but this fit has no validation data: pass fit(train, validation, ...)"
            )
        if state.step == 0:  # a run from the beginning: what another Loop reached says nothing of this one
            self.best, self.best_step, self.waited = self._worst(), None, 0
        elif self.waited >= self.patience and state.resumed:  # it ended the run, and still does
            return self.acts(state)
        elif self.waited >= self.patience:  # it ended the fit before; this one is to go on
            self.waited = 0
        return None

    def after_evaluate(self, state: LoopState) -> Answer:
        """Look at a ``val/`` reading."""
        return self._look(state) if self.monitor.startswith("val/") else None

    def after_epoch(self, state: LoopState) -> Answer:
        """Look at any other reading."""
        return None if self.monitor.startswith("val/") else self._look(state)

    def acts(self, state: LoopState) -> Answer:
        """What is done when patience has run out."""
        raise NotImplementedError  # abstract

    def state_dict(self) -> dict[str, Any]:
        """The best reading so far, and how long ago it was."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.monitor!r}, patience={self.patience})"

    def _worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf

    def _look(self, state: LoopState) -> Answer:
        if self.monitor not in state.values:
            raise unknown(f"reading watched by {self!r}:", self.monitor, state.values)
        value = state.values[self.monitor]
        if not isinstance(value, (int, float)):
            raise ConfigurationError(f"{self!r} watches a reading that is no single number")
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:  # with NaN it is False
            self.best, self.best_step, self.waited = value, state.step, 0
            return None
        self.waited += 1
        return self.acts(state) if self.waited >= self.patience else None


def better_of(monitor: str) -> str:
    """Whether lower or higher is better, by a reading's name.

    >>> better_of("val/loss"), better_of("val/top5")
    ('min', 'max')
    """
    name = monitor.rpartition("/")[2]
    if name.endswith(LOWER_IS_BETTER):
        return "min"
    if name.startswith(HIGHER_IS_BETTER) or name == "average_precision":
        return "max"
    raise ConfigurationError(f"monitor={monitor!r}: say mode='min' or mode='max', the name does not tell which is better")
