"""Train and eval mode of modules: set for a while, and put back one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Train mode for the block. A module already in it keeps parts that its user has put into eval mode (frozen ones)."""
    with _kept(module):
        if not module.training:
            module.train()
        yield


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Eval mode for the block."""
    with _kept(module):
        module.eval()
        yield


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    before = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
