"""Statics: what a recorded step reads from and writes to, always the same memory: its batch, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from axontrain.data.structure import mapped
from axontrain.errors import kind_of
from axontrain.guard import is_dense
from axontrain.objective import Step

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Inputs:
    """A batch in memory that stays, into which the batches that are like it are copied.

    Alike are those of the same structure, whose tensors have the same shapes, strides, dtypes and devices, and in which all
    that is no tensor is equal.

    >>> inputs = Inputs((torch.zeros(2, 3), torch.zeros(2), "a"))
    >>> inputs.fits((torch.ones(2, 3), torch.ones(2), "a")), inputs.fits((torch.ones(2, 3), torch.ones(2), "b"))
    (True, False)
    >>> inputs.take((torch.ones(2, 3), torch.ones(2), "a"))
    >>> inputs.batch[1]
    tensor([1., 1.])
    """

    def __init__(self, batch: Any) -> None:
        self._kinds, self._structure = described(batch)
        self.batch = mapped(batch, lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf)
        leaves, _ = _taken_apart(self.batch)
        self._tensors = [(index, leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.take(batch)

    def fits(self, batch: Any) -> bool:
        """Whether a batch is alike."""
        return described(batch) == (self._kinds, self._structure)

    def take(self, batch: Any) -> None:
        """Copy a batch that fits."""
        leaves, _ = _taken_apart(batch)
        for index, static in self._tensors:
            static.copy_(leaves[index], non_blocking=True)

    def position(self, tensor: Tensor) -> int | None:
        """Where in the batch a tensor stands, if it is one of the batch in memory."""
        return next((index for index, static in self._tensors if static is tensor), None)


def described(batch: Any) -> tuple[list[Any], Any]:
    """What batches that can be computed by one recording have in common."""
    leaves, structure = _taken_apart(batch)
    return [_kind(leaf) for leaf in leaves], structure


def unlike(batch: Any) -> str:
    """What of a batch keeps its step from being recorded; "" if nothing does."""
    for leaf in _taken_apart(batch)[0]:
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, CONSTANTS):
                return f"the batch holds {kind_of(leaf)}, in which a step may look for anything"
        elif leaf.requires_grad:
            return f"a tensor of the batch, {kind_of(leaf)}, requires a gradient"
        elif not is_dense(leaf):
            return f"a tensor of the batch, {kind_of(leaf)}, is sparse, quantized, expanded, or of a class of its own"
    return ""


def _taken_apart(batch: Any) -> tuple[Any, Any]:
    kind = type(batch)
    if kind in (tuple, list) and all(isinstance(leaf, Tensor) for leaf in batch):  # most are so
        return batch, kind
    leaves: list[Any] = []
    return leaves, mapped(batch, leaves.append)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


class Outputs:
    """What a recorded step gives, copied anew from memory that the next replay writes to.

    Numbers are put together while it is recorded, so that one copy does for all of a kind.

    Args:
        step: as the recording gave it.
        flags: of each update, above 0 if it was left out; of one alone it is the step's.
        inputs: of the recording: what the step hands on of its batch is then that of the batch itself.
        predictions: whether predictions and targets are given.
    """

    def __init__(self, step: Step, flags: Sequence[Tensor], inputs: Inputs, *, predictions: bool) -> None:
        self._inputs = inputs
        self._trees = (step.predictions, step.targets, step.sample_weights) if predictions else (None, None, None)
        values = {name: value.detach() if isinstance(value, Tensor) else value for name, value in step.values.items()}
        weight = step.weight.detach() if isinstance(step.weight, Tensor) else step.weight
        numbers: dict[str, Any] = {"loss": step.loss.detach(), "skipped": step.skipped, "weight": weight}
        numbers |= {f"value {name}": value for name, value in values.items()}
        self._flags = ["skipped"] if len(flags) == 1 else [f"flag {number}" for number in range(len(flags))]
        numbers |= dict(zip(self._flags, flags, strict=True))
        self._rows: list[tuple[list[str], Tensor]] = []
        rows: dict[torch.dtype, list[str]] = {}
        self._others: dict[str, Any] = {}
        for name, number in numbers.items():
            if isinstance(number, Tensor) and not number.ndim:
                rows.setdefault(number.dtype, []).append(name)
            else:
                self._others[name] = number
        for names in rows.values():
            self._rows.append((names, torch.stack([numbers[name] for name in names])))
        self._names = [f"value {name}" for name in values]
        self._values = list(values)

    def given(self, batch: Any) -> tuple[Step, list[Tensor]]:
        """What the last replay gave, which was of this batch: the step, and the flag of each update."""
        found: dict[str, Any] = {}
        for names, row in self._rows:
            found.update(zip(names, row.clone().unbind(), strict=True))
        for name, value in self._others.items():
            found[name] = value.clone() if isinstance(value, Tensor) else value
        values: Mapping[str, Any] = {name: found[key] for name, key in zip(self._values, self._names, strict=True)}
        predictions, targets, sample_weights = (None if tree is None else self._fresh(tree, batch) for tree in self._trees)
        step = Step(found["loss"], predictions, targets, found["weight"], values, found["skipped"], sample_weights)
        return step, [found[name] for name in self._flags]

    def _fresh(self, tree: Any, batch: Any) -> Any:
        def fresh(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            position = self._inputs.position(leaf)
            return leaf.detach().clone() if position is None else _taken_apart(batch)[0][position]

        return mapped(tree, fresh)
