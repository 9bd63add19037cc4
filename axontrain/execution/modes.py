"""Train and eval mode of modules: set for a while, and put back one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd


@contextlib.contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Train mode for the block. A module already in it keeps parts that its user has put into eval mode (frozen ones)."""
    with _kept(module):
        if not module.training:
            module.train()
        yield


ASLEEP = "all parts of the objective are in eval mode, so BatchNorm and Dropout will not train: call objective.train()"


def asleep(module: nn.Module) -> bool:
    """Whether a module is in train mode by name only: all its parts are in eval mode, as pretrained models arrive."""
    parts = [part for part in module.modules() if part is not module]
    dependent = any(isinstance(part, (_NormBase, _DropoutNd)) for part in parts)
    return module.training and dependent and not any(part.training for part in parts)


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
