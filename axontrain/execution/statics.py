"""Statics: what a recorded step reads from and writes to, always the same memory: its batch, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from axontrain.data.structure import fields, is_record, mapped
from axontrain.errors import kind_of
from axontrain.execution.contents import PLAIN
from axontrain.guard import is_dense
from axontrain.objective import Step
from axontrain.update import Update


class Inputs:
    """A batch in memory that stays, into which the batches that are like it are copied.

    Alike are those of the same structure, whose tensors have the same shapes, strides, alignment, dtypes and devices, and in
    which all that is no tensor is equal.

    >>> inputs = Inputs((torch.zeros(2, 3), torch.zeros(2), "a"))
    >>> inputs.fitting((torch.ones(2, 3), torch.ones(2), "b")) is None
    True
    >>> inputs.take(inputs.fitting((torch.ones(2, 3), torch.ones(2), "a")))
    >>> inputs.batch[1]
    tensor([1., 1.])
    """

    def __init__(self, batch: Any) -> None:
        self._kinds, self._structure = described(batch)
        self.batch = mapped(batch, lambda leaf: _alike(leaf) if isinstance(leaf, Tensor) else leaf)
        leaves, _ = _taken_apart(self.batch)
        self._tensors = [(index, leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.take(leaves_of(batch))

    def fitting(self, batch: Any) -> Sequence[Any] | None:
        """What a batch is made of, its tensors and all else; None if it is not alike."""
        leaves, structure = _taken_apart(batch)
        alike = structure == self._structure and [_kind(leaf) for leaf in leaves] == self._kinds
        return leaves if alike else None

    def take(self, leaves: Sequence[Any]) -> None:
        """Copy what a batch that fits is made of."""
        for index, static in self._tensors:
            static.copy_(leaves[index], non_blocking=True)

    def let_go(self) -> None:
        """Have the tensors be again what they were made, where a step has asked for gradients by them, as of a penalty."""
        for _, static in self._tensors:
            if static.requires_grad:
                static.requires_grad_(False).grad = None

    def versions(self) -> list[int]:
        """How often each tensor was written to."""
        return [static._version for _, static in self._tensors]

    def position(self, tensor: Tensor) -> int | None:
        """Where in the batch a tensor stands, if it is one of the batch in memory."""
        return next((index for index, static in self._tensors if static is tensor), None)


def _alike(tensor: Tensor) -> Tensor:
    """Memory for tensors that are like one: kernels are chosen by how a tensor lies, and how far from a multiple."""
    size, steps = tensor.element_size(), tensor.stride()
    offset = _off(tensor) // size
    length = 1 + sum((extent - 1) * step for extent, step in zip(tensor.shape, steps, strict=True)) if tensor.numel() else 0
    memory = torch.empty(offset + length, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, steps, offset)


def _off(tensor: Tensor) -> int:
    """By how many bytes it is off a multiple at which new memory begins: by that, too, kernels are chosen."""
    return tensor.data_ptr() % (256 if tensor.is_cuda else 64)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of windows that slide."""
    reach = 0
    for step, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1:
            if step <= reach:
                return True
            reach += (extent - 1) * step
    return False


def leaves_of(batch: Any) -> Sequence[Any]:
    """The tensors of a batch and all else in it, in the order of its structure."""
    return _taken_apart(batch)[0]  # type: ignore[no-any-return]


def described(batch: Any) -> tuple[list[Any], Any]:
    """What batches that can be computed by one recording have in common."""
    leaves, structure = _taken_apart(batch)
    return [_kind(leaf) for leaf in leaves], structure


def unlike(batch: Any, *, of_a_step: bool = False) -> str:
    """What of a batch keeps its step from being recorded; "" if nothing does. Or of what a step gives: ``of_a_step``."""
    for leaf in _taken_apart(batch)[0]:
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, PLAIN):
                what = "the step gives" if of_a_step else "the batch holds"
                return f"{what} {kind_of(leaf)}, in which there may be anything"
        elif of_a_step:
            continue
        elif leaf.requires_grad:
            return f"a tensor of the batch, {kind_of(leaf)}, requires a gradient"
        elif type(leaf) is not Tensor or not is_dense(leaf) or _overlaps(leaf):
            return f"a tensor of the batch, {kind_of(leaf)}, is sparse, quantized, expanded, or of a class of its own"
    return ""


def _taken_apart(batch: Any) -> tuple[Any, Any]:
    kind = type(batch)
    if kind in (tuple, list) and all(isinstance(leaf, Tensor) for leaf in batch):  # most are so
        return batch, kind
    leaves: list[Any] = []
    return leaves, _ordered(mapped(batch, leaves.append))


def _ordered(structure: Any) -> Any:
    """A structure in which the order of names counts, as leaves are taken in it."""
    if isinstance(structure, dict):
        return dict, tuple((key, _ordered(value)) for key, value in structure.items())
    if isinstance(structure, (tuple, list)):
        return type(structure), tuple(map(_ordered, structure))
    if is_record(structure):
        return type(structure), tuple(_ordered(getattr(structure, name)) for name in fields(structure))
    return structure


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        off = leaf.data_ptr() % (256 if leaf.is_cuda else 64)  # as in _off
        return type(leaf), leaf.shape, leaf.stride(), off, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


# An update of a step: whose, of which loss and its terms, and above 0 if it was left out.
Updated = tuple[Update, Tensor, Mapping[str, Any], Tensor]


class Outputs:
    """What a recorded step gives, copied anew from memory that the next replay writes to.

    Numbers are put together while it is recorded, so that one copy does for all of a kind.

    Args:
        step: as the recording gave it.
        updated: its updates: whose, of which loss and its terms, and the flag.
        inputs: of the recording: what the step hands on of its batch is then that of the batch itself.
        predictions: whether predictions and targets are given.
    """

    def __init__(self, step: Step, updated: Sequence[Updated], inputs: Inputs, *, predictions: bool) -> None:
        trees = (step.predictions, step.targets, step.sample_weights) if predictions else (None, None, None)
        self._trees = [None if tree is None else mapped(tree, lambda leaf: _Given.of(leaf, inputs)) for tree in trees]
        self._predicts = any(tree is not None for tree in trees)
        self._numbers: list[Any] = []
        self._indices: dict[int, int] = {}  # of tensors, by id
        self._loss, self._skipped, self._weight = map(self._index, (step.loss, step.skipped, step.weight))
        self._values = [(name, self._index(value)) for name, value in step.values.items()]
        self._updated = [
            (update, self._index(loss), None if terms is step.values else self._terms(terms), self._index(flag))
            for update, loss, terms, flag in updated
        ]
        rows: dict[Any, list[int]] = {}
        for index, number in enumerate(self._numbers):
            if isinstance(number, Tensor) and not number.ndim:
                rows.setdefault((number.dtype, number.device), []).append(index)
        self._rows = [torch.stack([self._numbers[index] for index in of_row]) for of_row in rows.values()]
        # What comes one after the other when the rows are taken apart, and what is the same each time or has a shape.
        self._order = [index for of_row in rows.values() for index in of_row]
        self._others = [None if index in self._order else number for index, number in enumerate(self._numbers)]
        self._shaped = [index for index, number in enumerate(self._others) if isinstance(number, Tensor)]
        self._numbers = []

    def _index(self, number: Any) -> int:
        """Where a number stands among those that are given; the same tensor has one place."""
        key = id(number)
        if not isinstance(number, Tensor) or key not in self._indices:
            self._indices[key] = len(self._numbers)
            self._numbers.append(number.detach() if isinstance(number, Tensor) else number)
            return len(self._numbers) - 1
        return self._indices[key]

    def _terms(self, terms: Mapping[str, Any]) -> list[tuple[str, int]]:
        return [(name, self._index(value)) for name, value in terms.items()]

    def given(self, leaves: Sequence[Any]) -> tuple[Step, list[Updated]]:
        """What the last replay gave, of a batch that was made of these: the step, and its updates."""
        found: list[Any] = self._others.copy()
        fresh = [number for row in self._rows for number in row.clone().unbind()]
        for index, number in zip(self._order, fresh, strict=True):
            found[index] = number
        for index in self._shaped:
            found[index] = found[index].clone()
        predictions, targets, sample_weights = self._trees
        if self._predicts:
            predictions, targets, sample_weights = (None if tree is None else _fresh(tree, leaves) for tree in self._trees)
        values = {name: found[index] for name, index in self._values}
        step = Step(found[self._loss], predictions, targets, found[self._weight], values, found[self._skipped], sample_weights)
        updated: list[Updated] = [
            (update, found[loss], values if terms is None else {name: found[at] for name, at in terms}, found[flag])
            for update, loss, terms, flag in self._updated
        ]
        return step, updated


class _Given:
    """A tensor of the predictions or targets of a recorded step; the batch's own, where that is handed on."""

    def __init__(self, tensor: Tensor, position: int | None) -> None:
        self.tensor, self.position = tensor, position

    @classmethod
    def of(cls, leaf: Any, inputs: Inputs) -> Any:
        return cls(leaf.detach(), inputs.position(leaf)) if isinstance(leaf, Tensor) else leaf


def _fresh(tree: Any, leaves: Sequence[Any]) -> Any:
    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, _Given):
            return leaf
        return leaf.tensor.clone() if leaf.position is None else leaves[leaf.position]

    return fresh(tree) if isinstance(tree, _Given) else mapped(tree, fresh)
