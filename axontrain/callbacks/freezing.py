"""Freeze and Unfreeze: parameters that are not trained from some point of the run on, or up to it; one for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axontrain.callback import Answer, Callback
from axontrain.clock import Duration
from axontrain.errors import ConfigurationError, kind_of
from axontrain.optimizer import selected
from axontrain.state import LoopState


class _Switch(Callback):
    """Sets ``requires_grad`` where the run reaches a point, and where a fit begins before or after it."""

    trained_before: bool  # whether the parameters are trained before the point

    def __init__(self, params: str | Sequence[str], at: int | str, **cadence: Any) -> None:
        self.at = Duration.parse(at, "at")
        super().__init__(first=1, after=at, **cadence)  # whether it has acted is saved with the run
        self.patterns = [params] if isinstance(params, str) else list(params)
        for pattern in self.patterns:
            if not isinstance(pattern, str):
                raise ConfigurationError(f"{type(self).__name__}: {kind_of(pattern)} is no pattern of names, as 'backbone.*'")

    def before_fit(self, state: LoopState) -> Answer:
        """Bring the parameters to what they are at this point of the run."""
        acted = self.cadences["before_batch"].fired > 0  # where progress counts from 0 again, as in a second fit
        reached = acted or self.at.measure(state) >= self.at.amount
        self._set(state, self.trained_before != reached)
        return None

    def before_batch(self, state: LoopState) -> Answer:
        """At the point: an optimizer keeps the state that its parameters have."""
        self._set(state, not self.trained_before)
        return None

    def _set(self, state: LoopState, trained: bool) -> None:
        found = selected(dict(state.objective.named_parameters()), self.patterns, type(self).__name__)
        for parameter in found.values():
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None


class Unfreeze(_Switch):
    """Leave parameters as they are until the run reaches a point, and train them from there on.

    They have their places in the optimizer from the beginning, so that its other parameters keep their state. What a module
    does beside training its parameters (BatchNorm's running means, dropout) goes on: ``.eval()`` on it stops that.

    Args:
        params: a pattern over parameter names, or several: "backbone.*".
        at: a duration since the run began: "5 epochs", a number of steps, or "25%" of the fit that first gets there.

    >>> Unfreeze("backbone.*", "2 epochs").at
    Duration(amount=Fraction(2, 1), unit='epochs')

    Raises:
        OptimizerError: when a fit begins, if a pattern matches nothing.
    """

    trained_before = False


class Freeze(_Switch):
    """Train parameters until the run reaches a point, and leave them as they are from there on.

    Their state in the optimizer is kept: what is unfrozen later goes on with it.

    Args:
        params: a pattern over parameter names, or several.
        at: a duration since the run began, as of :class:`Unfreeze`.

    >>> Freeze(["embedding.*", "norm.*"], 1000).patterns
    ['embedding.*', 'norm.*']

    Raises:
        OptimizerError: when a fit begins, if a pattern matches nothing.
    """

    trained_before = True
