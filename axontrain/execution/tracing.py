"""Tracing: which operators a function calls, and what Python gives them beside tensors: what a recording of it would repeat."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Trace(TorchDispatchMode):
    """Notes operators within it, with shapes in place of tensors.

    >>> import torch
    >>> traces = []
    >>> for factor in (2.0, 2.0, 3.0):
    ...     with Trace() as trace:
    ...         _ = torch.ones(2) * factor
    ...     traces.append(trace)
    >>> traces[0].unlike(traces[1]), traces[0].unlike(traces[2])
    ('', 'aten.mul was given 2.0, and then 3.0')
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation, and do it."""
        kwargs = kwargs or {}
        self.calls.append((str(func.overloadpacket), tree_map(_noted, (args, kwargs))))
        return func(*args, **kwargs)

    def unlike(self, other: Trace) -> str:
        """What is another in the other trace, in words; "" if nothing is."""
        for (name, given), (its, given_it) in zip(self.calls, other.calls, strict=False):
            if name != its:
                return f"{name} was called, and then {its}"
            if given != given_it:
                a, b = ([*_leaves(one)] for one in (given, given_it))
                one, two = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), (given, given_it))
                return f"{name} was given {one}, and then {two}"
        if len(self.calls) != len(other.calls):
            return f"{len(self.calls)} operators were called, and then {len(other.calls)}"
        return ""


def _noted(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), str(leaf.dtype), str(leaf.device)
    if isinstance(leaf, float) and leaf != leaf:
        return str(leaf)
    return leaf if isinstance(leaf, (int, float, complex, str, bool, type(None))) else type(leaf).__name__


def _leaves(value: Any) -> Any:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
