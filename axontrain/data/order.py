"""The order of samples: a pure function of (seed, epoch)."""

from __future__ import annotations

import torch
from torch import Tensor

from axontrain.randomness import derive


def order(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which an epoch goes through ``n`` samples: int64 (n,), on the CPU.

    It depends on nothing else: not on workers, ranks, restarts, nor on the global generators, which are left alone.

    >>> sorted(order(0, 3, 5).tolist())
    [0, 1, 2, 3, 4]
    >>> bool((order(0, 3, 100) == order(0, 4, 100)).all())
    False
    """
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return torch.randperm(n, generator=generator)
