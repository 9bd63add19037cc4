"""A copy of an objective, to try things on."""

from __future__ import annotations

import copy

from torch import Tensor

from axontrain.data.structure import tensors
from axontrain.objective import Objective


def copied(objective: Objective) -> Objective:
    """A copy; results that a module keeps, as its last activations, which torch does not copy, are detached in it."""
    kept: dict[int, Tensor] = {}
    for module in objective.modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                kept |= {id(one): one.detach().clone() for one in tensors(value) if one.grad_fn is not None}
    return copy.deepcopy(objective, kept)
