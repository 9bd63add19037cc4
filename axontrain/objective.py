"""Objective: a model and a measure of how wrong it is.

It is a plain ``nn.Module``. It does not know the loop that trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from axontrain.errors import ConfigurationError, LossError, ObjectiveError, SplitError, kind_of, unknown


@dataclass(slots=True)
class Step:
    """What one step gave.

    Args:
        loss: scalar, the mean over ``weight`` items; the engine runs ``backward`` on it and keeps it detached.
        predictions: what metrics compare with ``targets``; None where there is nothing to compare.
        targets: see ``predictions``.
        weight: how many items ``loss`` is the mean of: an int, or a scalar tensor where only the device knows.
        values: further named scalars to record, weighted in the same way.
        skipped: set by the engine: a scalar tensor, above 0 if the update was skipped as not finite.
    """

    loss: Tensor
    predictions: Any = None
    targets: Any = None
    weight: int | Tensor = 1
    values: Mapping[str, Tensor | float] = field(default_factory=dict)
    skipped: Tensor | None = None


class Objective(nn.Module):
    """What is trained: write ``predict`` and ``loss``; override the rest where the shape does not fit.

    ``metrics`` names the criteria it is judged by (see :func:`axontrain.metrics.register`).

    >>> import torch
    >>> class Line(Objective):
    ...     metrics = ["mae"]
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(3, 1)
    ...
    ...     def predict(self, inputs):  # (B, 3) -> (B,)
    ...         return self.linear(inputs).squeeze(-1)
    ...
    ...     def loss(self, predictions, targets):
    ...         return F.mse_loss(predictions, targets)
    >>> step = Line().train_step((torch.zeros(4, 3), torch.zeros(4)))
    >>> step.predictions.shape, step.weight
    (torch.Size([4]), 4)
    """

    metrics: Any = ()

    def predict(self, inputs: Any) -> Any:
        """Map a batch of inputs to predictions: ``(B, ...) -> (B, ...)`` in most objectives."""
        hint = "; rename its forward to predict" if type(self).forward is not Objective.forward else ""
        raise ObjectiveError(f"{type(self).__name__}.predict is not written: def predict(self, inputs): ...{hint}")

    def loss(self, predictions: Any, targets: Any) -> Tensor | Mapping[str, Tensor]:
        """Say how wrong predictions are: a scalar, the mean over the batch, or a mapping of terms to be summed."""
        raise ObjectiveError(f"{type(self).__name__}.loss is not written: def loss(self, predictions, targets): ...")

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Take a batch apart into ``(inputs, targets)``.

        A pair (a tuple or a list of two) is taken as it is; anything else, a mapping too, is both.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        return batch, batch

    def weight(self, batch: Any) -> int | Tensor:
        """How many items the mean in ``loss`` is over: samples, unless overridden (tokens, for a language model).

        A tensor may count on the device; it is never read during a step.
        """
        return batch_size(batch)

    def train_step(self, batch: Any) -> Step | Generator[tuple[str, Tensor], None, Step | None]:
        """Compute the loss of a batch.

        For several optimizers, write it as a generator that yields ``(optimizer_name, loss)`` for each update and may
        return a Step of readings at the end; the engine runs backward, clipping, the update and the schedule of that
        optimizer, then resumes it::

            def train_step(self, batch):
                fake = self.generator(noise)
                yield "discriminator", self.discriminator_loss(batch, fake.detach())
                yield "generator", self.generator_loss(fake)
        """
        return self._step(batch)

    def eval_step(self, batch: Any) -> Step:
        """Compute the loss and the predictions of a batch in evaluation: no gradient, modules in eval mode."""
        return self._step(batch)

    def forward(self, inputs: Any) -> Any:
        """Predict; so that an objective is called like any module."""
        return self.predict(inputs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in METHODS and (isinstance(value, (nn.Module, Tensor)) or not callable(value)):
            raise ConfigurationError(
                f"{type(self).__name__}.{name} is a method of every Objective: give the attribute ({kind_of(value)}) another "
                f"name, as self.{OTHER_NAMES.get(name, f'my_{name}')}"
            )
        if name == "metrics":  # a torchmetrics object is a module, but no part of the model
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    if TYPE_CHECKING:  # nn.Module's __call__ is typed as Any: an objective's has a signature.

        def __call__(self, inputs: Any) -> Any: ...

    def _step(self, batch: Any) -> Step:
        parts = self.split(batch)
        if type(parts) is not tuple or len(parts) != 2:
            raise SplitError(
                f"{type(self).__name__}.split returned {kind_of(parts)}; it returns (inputs, targets). "
                f"The batch was {kind_of(batch)}."
            )
        inputs, targets = parts
        predictions = self.predict(inputs)
        loss = self.loss(predictions, targets)
        if isinstance(loss, Tensor):
            return Step(loss, predictions, targets, self.weight(batch))
        return Step(total(loss, self), predictions, targets, self.weight(batch), _detached(loss))


METHODS = ("predict", "loss", "split", "weight", "train_step", "eval_step")
OTHER_NAMES = {"loss": "criterion", "predict": "net", "weight": "class_weights"}


class Supervised(Objective):
    """An objective made of an existing model and a loss.

    Args:
        model: any module; ``predict(inputs)`` is ``model(inputs)``.
        loss: a name (``cross_entropy``, ``binary_cross_entropy`` on logits, ``mse``, ``mae``, ``huber``, ``nll``), or any
            callable of ``(predictions, targets)`` that returns a scalar or a mapping of terms. A loss that is a module
            becomes a part of the objective.
        metrics: see :attr:`Objective.metrics`.

    >>> import torch
    >>> objective = Supervised(nn.Linear(4, 3), "cross_entropy", metrics=["accuracy"])
    >>> objective(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Callable[[Any, Any], Tensor | Mapping[str, Tensor]],
        metrics: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"Supervised(model=...) takes an nn.Module, not {kind_of(model)}")
        if isinstance(loss, str):
            if loss not in LOSSES:
                raise unknown("loss", loss, LOSSES, "Any callable of (predictions, targets) will do too.")
            loss = LOSSES[loss]
        elif isinstance(loss, type):
            raise ConfigurationError(f"Supervised(loss={loss.__name__}) is a class: call it, as in {loss.__name__}()")
        elif not callable(loss):
            raise ConfigurationError(f"Supervised(loss=...) takes a name or a callable, not {kind_of(loss)}")
        self.model = model
        self._criterion = loss
        self.metrics = () if metrics is None else metrics

    def predict(self, inputs: Any) -> Any:
        """Call the model."""
        return self.model(inputs)

    def loss(self, predictions: Any, targets: Any) -> Tensor | Mapping[str, Tensor]:
        """Call the loss."""
        return self._criterion(predictions, targets)


def total(terms: Mapping[str, Tensor], objective: nn.Module) -> Tensor:
    """Sum a mapping of loss terms, or say what else ``loss`` returned."""
    name = type(objective).__name__
    if not isinstance(terms, Mapping):
        raise LossError(f"{name}.loss returned {kind_of(terms)}; it returns a scalar tensor or a mapping of named terms")
    if not terms:
        raise LossError(f"{name}.loss returned an empty mapping; there is nothing to minimise")
    for key, term in terms.items():
        if key == "loss":
            raise LossError(f"{name}.loss returned a term named 'loss', which is the name of the sum: call it otherwise")
        if not isinstance(term, Tensor) or term.numel() != 1:
            raise LossError(f"{name}.loss returned {kind_of(term)} as the term {key!r}; each term is a scalar tensor")
    return sum(term.reshape(()) for term in terms.values())  # type: ignore[return-value]  # not 0: there are terms


def batch_size(batch: Any) -> int:
    """The leading size of the first tensor (or array) in a batch; 1 where there is none.

    >>> import torch
    >>> batch_size({"a": [torch.zeros(5, 2)], "b": torch.zeros(5)})
    5
    """
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        elif isinstance(batch, (tuple, list)) and batch:
            if isinstance(batch[0], (str, bytes, int, float)):
                return len(batch)
            batch = batch[0]
        else:
            shape = getattr(batch, "shape", None)
            return int(shape[0]) if shape else 1
    return batch.shape[0] if batch.dim() else 1


def _detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    return {name: term.detach() for name, term in terms.items()}


def _same_shape(
    loss: Callable[..., Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    # torch broadcasts (B, 1) against (B,) to (B, B), trains on it, and only warns.
    def checked(predictions: Tensor, targets: Tensor) -> Tensor:
        if predictions.shape != targets.shape:
            raise LossError(
                f"predictions are {tuple(predictions.shape)} and targets {tuple(targets.shape)}: make the shapes equal, "
                f"as by predictions.squeeze(-1) or targets.unsqueeze(-1); broadcasting would compare each with each"
            )
        return loss(predictions, targets.to(predictions.dtype))

    return checked


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": _same_shape(F.binary_cross_entropy_with_logits),
    "mse": _same_shape(F.mse_loss),
    "mae": _same_shape(F.l1_loss),
    "huber": _same_shape(F.huber_loss),
    "nll": F.nll_loss,
}
