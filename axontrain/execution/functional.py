"""Forward and backward as a function of tensors, by torch.func: what a graph of a whole step begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from axontrain.execution.precision import Precision
from axontrain.objective import Objective

PREFIX = "objective."  # of the names of an objective's parameters in Forward


class Forward(nn.Module):
    """A module whose call is the objective's training step, in the run's precision."""

    def __init__(self, objective: Objective, precision: Precision) -> None:
        super().__init__()
        self.objective, self.precision = objective, precision

    def forward(self, batch: Any) -> Any:
        with self.precision.computing():
            return self.objective.train_step(batch)


def differentiated(
    module: nn.Module, trained: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any
) -> tuple[dict[str, Tensor], Tensor, Any, dict[str, Tensor]]:
    """The gradients of a training step's loss, and what else it gave.

    Args:
        module: a :class:`Forward`.
        trained: the parameters to differentiate by, by their names in it.
        buffers: those that the step changes; they are left as they are.
        batch: the batch.

    Returns:
        The gradients by name; the loss, a scalar; predictions, targets, weight, values and sample weights; the buffers after
        the step.
    """
    own = tree_leaves(batch)
    held: list[Any] = []

    def loss_of(trained: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
        named = {**trained, **buffers}
        step = functional_call(module, named, (batch,))
        parts = (step.predictions, _new(step.targets, own), step.weight, step.values, step.sample_weights)
        leaves, spec = tree_flatten(parts)
        computed = [isinstance(leaf, Tensor) and not _is_one_of(leaf, own) for leaf in leaves]
        held.append((spec, computed, [None if new else leaf for new, leaf in zip(computed, leaves, strict=True)]))
        tensors = [leaf for new, leaf in zip(computed, leaves, strict=True) if new]
        # A buffer that was replaced, and not written into, is what functional_call has put into `named`.
        return step.loss.reshape(()), (tensors, {name: named[name] for name in buffers})

    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    gradients, (loss, (tensors, after)) = grad_and_value(loss_of, has_aux=True)(trained, copies)
    spec, computed, leaves = held[0]
    rest = [tensor.detach() for tensor in reversed(tensors)]
    parts = tree_unflatten([rest.pop() if new else leaf for new, leaf in zip(computed, leaves, strict=True)], spec)
    return gradients, loss.detach(), parts, after


def _new(value: Any, own: Sequence[Any]) -> Any:
    """Copies of what may be views of the batch, as targets that are its tokens but the first: a graph returns what is new."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and not _is_one_of(leaf, own) else leaf, value)


def _is_one_of(leaf: Any, own: Sequence[Any]) -> bool:
    return any(leaf is one for one in own)
