"""Means over steps, weighted by items: kept on the device, summed in double precision.

What is kept is a monoid: ``{}`` is empty and :func:`merge` adds, so that means may be taken over any parts of an epoch, on
any number of ranks, and put together in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import MetricError, kind_of

# name -> tensor (2,) of [sum of weight * value, sum of weight]
Sums = dict[str, Tensor]
# value, weight, skipped (a flag on the device, or None)
Entry = tuple[Any, int | Tensor, Tensor | None]


def summed(entries: Mapping[str, Sequence[Entry]]) -> Sums:
    """Sum entries by name. One of weight zero, or whose flag is above 0, adds nothing, be it NaN.

    >>> sums = summed({"loss": [(torch.tensor(1.0), 3, None), (torch.tensor(2.0), 1, None)]})
    >>> means(sums)
    {'loss': 1.25}
    """
    sums: Sums = {}
    for name, of_name in entries.items():
        values = _stacked([value for value, _, _ in of_name], name)
        weights = _stacked([weight for _, weight, _ in of_name], name).to(values.device)
        if any(flag is not None for _, _, flag in of_name):
            flags = _stacked([0.0 if flag is None else flag for _, _, flag in of_name], name).to(values.device)
            weights = torch.where(flags > 0, 0.0, weights)
        weighted = torch.where(weights > 0, values * weights, 0.0)
        sums[name] = torch.stack([weighted.sum(), weights.sum()])
    return sums


def merge(a: Sums, b: Sums) -> Sums:
    """Put two sums together; associative and commutative up to rounding, with ``{}`` as the neutral one."""
    merged = dict(a)
    for name, sums in b.items():
        merged[name] = merged[name] + sums if name in merged else sums
    return merged


def means(sums: Sums) -> dict[str, float]:
    """Read the means to the host, all at once; a name that no item spoke of is NaN."""
    if not sums:
        return {}
    device = next(iter(sums.values())).device
    rows = torch.stack([of_name.to(device) for of_name in sums.values()]).tolist()
    return {name: total / weight if weight else float("nan") for name, (total, weight) in zip(sums, rows, strict=True)}


def _stacked(values: list[Any], name: str) -> Tensor:
    if isinstance(values[0], Tensor):
        try:
            stacked = torch.stack(values)
        except (RuntimeError, TypeError):  # of several shapes or devices, or not all tensors
            stacked = None
        if stacked is not None and stacked.dim() == 1:
            return stacked.detach().to(torch.float32 if stacked.device.type == "mps" else torch.float64)
    tensors = [value for value in values if isinstance(value, Tensor)]
    for tensor in tensors:
        if tensor.numel() != 1:
            raise MetricError(f"the reading {name!r} is {kind_of(tensor)}; a reading is a scalar")
    if not tensors:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    first = tensors[0]
    precision = torch.float32 if first.device.type == "mps" else torch.float64  # mps has no double
    if len(tensors) == len(values):
        return torch.stack([t.detach().reshape(()) for t in tensors]).to(precision)
    made = [
        value.detach().reshape(()).to(first.device, precision)
        if isinstance(value, Tensor)
        else torch.full((), float(value), dtype=precision, device=first.device)  # a copy would wait for the device
        for value in values
    ]
    return torch.stack(made)
