"""The random generators that training draws from: seeds derived from seeds, and states taken and put back.

Three global generators matter to a training step: torch's (of the CPU, and of each CUDA device in use), NumPy's and
Python's. A run owns a stream of each; the caller's are left as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


def derive(seed: int, *parts: int | str) -> int:
    """Make a 63-bit seed that is a pure function of ``seed`` and ``parts``, and unlike that of any other parts.

    >>> derive(0, "order", 3) == derive(0, "order", 3) != derive(0, "order", 4)
    True
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def capture() -> dict[str, Any]:
    """The state of every global generator, as tensors and numbers."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": _python_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = {
            "name": str(name),
            "keys": torch.from_numpy(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        }
    if _cuda_in_use():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what :func:`capture` took."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        of = state["numpy"]
        keys = of["keys"].numpy().astype("uint32")
        numpy.random.set_state((of["name"], keys, of["position"], of["has_gauss"], of["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(of_device, device)


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    # Not torch.manual_seed: for devices that are not in use it queues the call, with a traceback, each time anew.
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Leave the global generators, after the block, as they were before it."""
    before = capture()
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for the block, and put them back after it.

    >>> with seeded(1):
    ...     a = torch.rand(())
    >>> with seeded(1):
    ...     b = torch.rand(())
    >>> bool(a == b)
    True
    """
    with kept():
        seed_all(seed)
        yield


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _python_state() -> list[Any]:
    version, keys, gauss = random.getstate()
    return [version, torch.tensor(keys, dtype=torch.int64), gauss]
