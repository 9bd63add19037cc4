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
from axontrain.host import Fetch, placed, travels
from axontrain.readings import Reading, at_once

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
        parts = [
            _stacked([value for value, _, _ in of_name], name),
            _stacked([weight for _, weight, _ in of_name], name),
        ]
        if any(flag is not None for _, _, flag in of_name):
            parts.append(_stacked([0.0 if flag is None else flag for _, _, flag in of_name], name))
        # A value that is on the CPU goes to where its weight or its flag is, which would have to be waited for.
        device = next((part.device for part in parts if travels(part.device)), parts[0].device)
        values, weights, *flags = [placed(part, device) for part in parts]
        if flags:
            weights = torch.where(flags[0] > 0, 0.0, weights)
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
    return at_once(reading(sums))


def reading(sums: Sums) -> Reading[dict[str, float]]:
    """The same as a reading, of the sums as they are when it is begun."""
    names: dict[torch.device, list[str]] = {}
    for name, of_name in sums.items():
        names.setdefault(of_name.device, []).append(name)
    fetch = Fetch(torch.stack([sums[name] for name in of_device]) for of_device in names.values())
    yield [fetch]
    found = {
        name: total / weight if weight else float("nan")
        for of_device, rows in zip(names.values(), fetch.values(), strict=True)
        for name, (total, weight) in zip(of_device, rows, strict=True)
    }
    return {name: found[name] for name in sums}


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
    first = next((tensor for tensor in tensors if travels(tensor.device)), tensors[0])
    precision = torch.float32 if first.device.type == "mps" else torch.float64  # mps has no double
    if len(tensors) == len(values):
        return torch.stack([t.detach().reshape(()) for t in tensors]).to(precision)
    made = [
        placed(value.detach().reshape(()), first.device).to(precision)
        if isinstance(value, Tensor)
        else torch.full((), float(value), dtype=precision, device=first.device)
        for value in values
    ]
    return torch.stack(made)
