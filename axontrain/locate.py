"""Where a NaN or an infinity comes from."""

from __future__ import annotations

from typing import Any

from axontrain.data.structure import tensors, to_device
from axontrain.errors import ConfigurationError, kind_of
from axontrain.execution.nonfinite import Origin, replay
from axontrain.loop import Loop


def locate_nonfinite(loop: Loop, batch: Any) -> Origin | None:
    """Compute the losses and gradients of a batch, operation by operation, and tell what was first not finite.

    It is done by itself when a fit ends in a :class:`~axontrain.errors.NonFiniteError`, and noted on the error. Nothing is
    changed: it works on a copy of the objective, with the weights of training, and the random generators are as before.

    Args:
        loop: whose objective, weights and precision.
        batch: as ``train_step`` gets it, on any device.

    Returns:
        None if all is finite; else what made the loss or a gradient not so: ``phase`` ("batch", "parameters", "forward" or
        "backward"), ``module``, ``operation``, ``tensor``, and ``line`` of your code. Infinities that are meant, as those of a
        mask, are passed over unless a NaN becomes of them.

    Raises:
        ConfigurationError: for what is no Loop, or no batch.

    >>> import axontrain as ax
    >>> import torch
    >>> class Root(ax.Objective):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Linear(2, 1)
    ...
    ...     def predict(self, x):
    ...         return torch.sqrt(self.net(x))
    ...
    ...     def loss(self, predictions, targets):
    ...         return (predictions - targets).square().mean()
    >>> objective = Root()
    >>> _ = torch.nn.init.constant_(objective.net.weight, -1.0)
    >>> loop = ax.Loop(objective, device="cpu", progress=False)
    >>> found = ax.locate_nonfinite(loop, (torch.ones(4, 2), torch.zeros(4, 1)))
    >>> found.phase, found.operation, found.tensor
    ('forward', 'aten.sqrt', 'Tensor(4, 1) float32 with 4 NaN of 4, the first at (0, 0)')
    """
    if not isinstance(loop, Loop):
        raise ConfigurationError(f"locate_nonfinite({kind_of(loop)}, ...): the Loop, and a batch as its train_step gets it")
    if not any(True for _ in tensors(batch)):
        raise ConfigurationError(
            f"locate_nonfinite(loop, {kind_of(batch)}): a batch of tensors, as train_step gets it; of a dataset "
            f"next(iter(ax.Loader(dataset, 32)))"
        )
    batch = to_device(batch, loop.device)
    batch = loop.precision.batch(batch) if loop.precision.converts else batch
    with loop.state.training_weights():
        return replay(loop.objective, batch, loop.precision)
