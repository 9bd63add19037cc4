"""EarlyStopping: end the run when a reading no longer becomes better."""

from __future__ import annotations

from typing import Any

from axontrain.callback import Answer
from axontrain.callbacks.monitor import Monitor
from axontrain.state import LoopState, Stop


class EarlyStopping(Monitor):
    """End the run when ``monitor`` has not become better ``patience`` times in a row.

    After a validation within an epoch the run ends there; it is "stopped", with its readings kept.

    >>> EarlyStopping("val/loss", patience=5)
    EarlyStopping('val/loss', patience=5)
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        *,
        patience: int = 5,
        mode: str | None = None,
        min_delta: float = 0.0,
        **cadence: Any,
    ) -> None:
        super().__init__(monitor, patience=patience, mode=mode, min_delta=min_delta, **cadence)

    def acts(self, state: LoopState) -> Answer:
        """Stop."""
        return Stop(
            f"{self.monitor} has not become better than {self.best:.6g} (step {self.best_step}) {self.waited} times in a row"
        )
