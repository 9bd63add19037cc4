"""Outcome: what a step has made of all that it changes, and what it gave: to hold a replay against the step without.

They are to be the same bits. Where kernels sum in any order two steps alike are not, and then the last bits may differ; by how
much is judged by norms over all parameters, as what is nothing but rounding may differ by any factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axontrain import randomness
from axontrain.data.structure import tensors
from axontrain.objective import Step
from axontrain.update import Update

# By how much a replay may differ: so many times as two steps alike, and some rounding errors; at most by a part of the whole.
# An update of Adam's is of full size where a gradient is nothing but rounding.
TIMES, BITS, MOST, MOST_HALF, OF_UPDATES = 8.0, 2.0**10, 1e-3, 0.03, 0.01


class Outcome:
    """By name: parameters, buffers, what optimizers keep, losses and values. Of tensors in use, until it is ``kept``."""

    def __init__(self, found: Mapping[str, Tensor], drawn: randomness.Snapshot) -> None:
        self.found, self.drawn = found, drawn

    @classmethod
    def of(
        cls,
        module: nn.Module,
        updates: Sequence[Update],
        own: Mapping[str, Tensor],
        step: Step,
        *,
        whole: bool,
        predictions: bool,
    ) -> Outcome:
        """What is there after a step.

        Args:
            module, updates: what it has trained.
            own: further tensors that it may change, by name.
            step: what it gave.
            whole: whether its updates are a part of it; else gradients are looked at in their place.
            predictions: whether to look at predictions and targets.
        """
        parameters = dict(module.named_parameters())
        if whole:
            found: dict[str, Tensor] = {f"the update of {name}": p.detach() for name, p in parameters.items()}
            found |= _states(updates)
        else:
            found = {f"the gradient of {name}": p.grad for name, p in parameters.items() if p.grad is not None}
        found |= {f"the buffer {name}": b.detach() for name, b in module.named_buffers()}
        found |= own
        given: dict[str, Any] = {"loss": step.loss, "weight": step.weight, "flag of what is skipped": step.skipped}
        given |= {f"value {name!r}": value for name, value in step.values.items()}
        if predictions:
            named = enumerate([*tensors(step.predictions), *tensors(step.targets)])
            given |= {f"prediction or target ({index})": tensor for index, tensor in named}
        found |= {f"the {name}": torch.as_tensor(one).detach() for name, one in given.items() if one is not None}
        return cls(found, randomness.snapshot())

    def kept(self) -> Outcome:
        """The same, which later steps do not change."""
        return Outcome({name: tensor.clone() for name, tensor in self.found.items()}, self.drawn)

    def unlike(self, expected: Outcome, again: Outcome | None = None) -> str:
        """What is another than expected; "" if nothing is.

        Args:
            expected: of the step that is not replayed.
            again: of the same once more, where that may differ from itself; None where it may not.
        """
        if randomness.drawn(self.drawn, expected.drawn):
            return "it has drawn other random numbers"
        if again is not None and not again.unlike(expected):  # it does not differ from itself: nor may this
            again = None
        sums: dict[str, list[float]] = {}
        for name, right in expected.found.items():
            mine = self.found.get(name)
            if mine is None or mine.shape != right.shape or mine.dtype != right.dtype:
                return name
            if again is None or not right.dtype.is_floating_point:
                if not _same(mine, right):
                    return name
                continue
            kind, eps = name.partition(" of ")[0], torch.finfo(right.dtype).eps
            most = MOST_HALF if eps > MOST / BITS else OF_UPDATES if kind == "the update" else MOST
            size = _square(right)
            found = _square(mine, right), _square(again.found[name], right), size, eps**2 * size, most**2 * size
            of_kind = sums.setdefault(kind, [0.0] * len(found))
            of_kind[:] = map(sum, zip(of_kind, found, strict=True))
        for kind, squares in sums.items():
            gap, own, size, rounding, most = (square**0.5 for square in squares)
            if not gap <= min(TIMES * own + BITS * rounding, most):
                return f"{kind}, by {gap:.3g}, where it is {size:.3g}, and differs from itself by {own:.3g}"
        return ""


def _states(updates: Sequence[Update]) -> dict[str, Tensor]:
    found = {}
    for update in updates:
        names = {id(p): name for name, p in update.parameters.items()}
        for p, state in ((p, state) for one in update.optimizers for p, state in one.state.items()):
            for key, value in state.items():
                if isinstance(value, Tensor):
                    found[f"the state {key} of {names.get(id(p), 'a parameter')}"] = value
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, and what is no number in the same places."""
    return bool(torch.equal(a, b)) or bool(((a == b) | ((a != a) & (b != b))).all())


def _square(a: Tensor, b: Tensor | None = None) -> float:
    """Of the norm of a tensor, or of a difference."""
    difference = a.double() if b is None else a.double() - b.double()
    return float(torch.nan_to_num(difference).square().sum())
