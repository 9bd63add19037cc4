"""Generators of random numbers, torch's, NumPy's and Python's: where each stands, and back to there."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from axontrain.execution.views import is_a


def is_generator(value: Any) -> bool:
    """Whether a value draws random numbers: of torch's, NumPy's or Python's; of the system's there is nothing to put back."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy is not None:
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator)
    return is_a(value, kinds) and not is_a(value, random.SystemRandom)


def drawn_to(generator: Any) -> Any:
    """Where a generator stands, to be compared and put back."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):  # the older one of NumPy's
        return _listed(generator.get_state(legacy=False))
    return _listed(getattr(generator, "bit_generator", generator).state)


def draw_from(generator: Any, state: Any) -> None:
    """Put a generator back to where :func:`drawn_to` found it."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.tensor(state, dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def _listed(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _listed(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state
