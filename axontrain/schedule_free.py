"""Averages that an optimizer keeps by itself, as schedule-free ones do (Defazio et al. 2024, arXiv:2405.15682).

Such an optimizer trains at one point, and is to be evaluated at another, an average: its ``eval()`` moves the parameters there
and its ``train()`` moves them back, each by a computation that rounds. Here the point of training is kept while the average is
looked at, and put back as it was, so that looking changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axontrain.averages import Average
from axontrain.errors import ConfigurationError


class ScheduleFree:
    """Stands where :func:`~axontrain.averages.ema` and the like stand, for an optimizer that averages by itself."""

    kind, sees_progress = "schedule-free", False

    def described(self) -> list[Any]:
        """Its arguments in plain values: it has none."""
        return [self.kind]

    def __repr__(self) -> str:
        return "the optimizer's own average"


class OwnAverage(Average):
    """The average of optimizers that have ``train()`` and ``eval()``; of their parameters alone, not of buffers.

    Args:
        optimizers: those.
        parameters: of the optimizers, by name.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(ScheduleFree(), parameters, {})
        self.optimizers: list[Any] = list(optimizers)

    def begin(self) -> None:
        """Before a step: it is one of training."""
        for optimizer in self.optimizers:
            optimizer.train()

    def show(self) -> bool:
        """Put the average into the module; False if it is there."""
        if self.raw is not None:
            return False
        self.raw, self.torn = {name: tensor.clone() for name, tensor in self._live()}, True
        try:
            self._switch("eval")
        except BaseException:
            self.hide()
            raise
        self.torn = False
        return True

    def hide(self) -> None:
        """Put the point of training back."""
        if self.raw is not None:
            self.torn = True
            self._switch("train")
            self._put(self.raw)
            self.raw, self.torn = None, False

    def resume(self) -> None:
        """Training goes on from where it was."""
        if self.torn or self._is_shown():
            self.hide()
        else:
            self.forget()

    def forget(self) -> None:
        """The module holds other weights than the optimizer knows: none of what it keeps is an average of them.

        Raises:
            ConfigurationError: if it has trained already.
        """
        self.raw, self.torn = None, False
        if any(optimizer.state for optimizer in self.optimizers):
            raise ConfigurationError(
                f"the weights were changed since {type(self.optimizers[0]).__name__} trained them, and it goes on from its own "
                f"average of them: make a new Loop, with a new optimizer"
            )

    def shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the module is to be saved with: its tensors, and in place of each the average."""
        if not self.show():
            yield from ((live, live.detach()) for _, live in self._live())
            return
        try:
            values = [(live, live.detach().clone()) for _, live in self._live()]
        finally:
            self.hide()
        yield from values

    def load_state_dict(self, state: Mapping[str, Any], *, training: bool) -> None:
        """Go on from what ``state_dict`` gave; the module holds the average, and ``training`` says whether it is to stay."""
        self.raw = {name: state["raw"][name].to(tensor.device, copy=True) for name, tensor in self._live()}
        average = {name: tensor.detach().clone() for name, tensor in self._live()}
        self._switch("eval")  # whatever its options said when it was saved
        self._put(average)
        if training:
            self.hide()

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.parameters.items()

    def _is_shown(self) -> bool:
        if self.raw is None:
            return True
        found = {name: tensor.clone() for name, tensor in self._live()}
        self._switch("train")
        self._put(self.raw)
        self._switch("eval")
        same = all(torch.equal(tensor, found[name]) for name, tensor in self._live())
        self._put(found)
        return same

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers:
            getattr(optimizer, mode)()


def averaging(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps an average by itself, and has the methods that switch to it and back."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
