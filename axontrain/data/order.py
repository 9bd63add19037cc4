"""The order of samples: a pure function of (seed, epoch)."""

from __future__ import annotations

import torch
from torch import Tensor

from axontrain.data.permutation import Permutation
from axontrain.randomness import derive

# So many are drawn in a few milliseconds and stored in 8 MiB; the order of more is computed where it is needed.
STORED = 2**20


def order(seed: int, epoch: int, n: int) -> Tensor | Permutation:
    """The order in which an epoch goes through ``n`` samples: int64 (n,), on the CPU.

    It depends on nothing else: not on workers, ranks, restarts, nor on the global generators, which are left alone.

    Above 2^20 samples it is a :class:`~axontrain.data.Permutation`: indexed, sliced and split as the tensor would be, it
    computes the part that is asked for and stores nothing, so that the last batch of 10^9 samples is there as soon as the
    first. ``order(...)[:]`` is a tensor for any ``n`` that fits in memory.

    >>> sorted(order(0, 3, 5).tolist())
    [0, 1, 2, 3, 4]
    >>> bool((order(0, 3, 100) == order(0, 4, 100)).all())
    False
    >>> order(0, 3, 10**9)[500_000_000:500_000_002].dtype
    torch.int64
    """
    drawn_by = derive(seed, "order", epoch)
    if n > STORED:
        return Permutation(n, drawn_by)
    return torch.randperm(n, generator=torch.Generator().manual_seed(drawn_by))
