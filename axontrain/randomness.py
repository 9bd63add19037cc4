"""The random generators that training draws from: seeds derived from seeds, and states taken and put back.

Three global generators matter to a training step: torch's (of the CPU, and of each CUDA device in use), NumPy's and
Python's. A run owns a stream of each; the caller's are left as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def derive(seed: int, *parts: int | str) -> int:
    """Make a 63-bit seed that is a pure function of ``seed`` and ``parts``, and unlike that of any other parts.

    >>> derive(0, "order", 3) == derive(0, "order", 3) != derive(0, "order", 4)
    True
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def capture() -> dict[str, Any]:
    """The state of every global generator, as tensors and numbers."""
    return savable(snapshot())


def savable(live: Snapshot) -> dict[str, Any]:
    """What :func:`snapshot` took, as tensors and numbers."""
    version, words, gauss = live.python
    state: dict[str, Any] = {
        "torch": live.torch,
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
    }
    if live.numpy is not None:
        name, keys, position, has_gauss, cached = live.numpy
        state["numpy"] = {
            "name": str(name),
            "keys": torch.from_numpy(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        }
    if live.cuda is not None:
        state["cuda"] = live.cuda
    return state


def restore(state: dict[str, Any] | Snapshot) -> None:
    """Put back what :func:`capture` or :func:`snapshot` took."""
    if isinstance(state, Snapshot):
        put_back(state)
        return
    version, words, gauss = state["python"]
    numpy = None
    if "numpy" in state:
        of = state["numpy"]
        numpy = (of["name"], of["keys"].numpy().astype("uint32"), of["position"], of["has_gauss"], of["gauss"])
    put_back(Snapshot(state["torch"], (version, tuple(words.tolist()), gauss), numpy, state.get("cuda")))


class Snapshot(NamedTuple):
    """The global generators as they are at a moment: quicker to take than :func:`capture`, and not made to be saved."""

    torch: Tensor
    python: Any
    numpy: Any
    cuda: list[Tensor] | None


def snapshot() -> Snapshot:
    """Take the state of the global generators."""
    numpy = sys.modules.get("numpy")
    return Snapshot(
        torch.get_rng_state(),
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
        torch.cuda.get_rng_state_all() if _cuda_in_use() else None,
    )


def drawn(before: Snapshot, after: Snapshot) -> set[str]:
    """Which generators two snapshots differ in: "torch", of the CPU, "cuda", "python", "numpy".

    >>> before = snapshot()
    >>> with kept():
    ...     value = random.random()
    ...     drawn(before, snapshot())
    {'python'}
    """
    found = {"python"} if before.python != after.python else set()
    if not torch.equal(before.torch, after.torch):
        found.add("torch")
    if any(not torch.equal(a, b) for a, b in zip(before.cuda or (), after.cuda or (), strict=False)):
        found.add("cuda")
    if before.numpy is not None and after.numpy is not None:
        (_, keys, *rest), (_, others, *others_rest) = before.numpy, after.numpy
        if rest != others_rest or (keys != others).any():
            found.add("numpy")
    return found


def put_back(state: Snapshot) -> None:
    """Set the global generators as :func:`snapshot` found them."""
    torch.set_rng_state(state.torch)
    random.setstate(state.python)
    numpy = sys.modules.get("numpy")
    if numpy is not None and state.numpy is not None:
        numpy.random.set_state(state.numpy)
    if state.cuda is not None and torch.cuda.is_available():
        for device, of_device in enumerate(state.cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(of_device, device)


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    for seed_one in _SEED.values():
        seed_one(seed)


def seed_some(names: Iterable[str], seed: int) -> None:
    """Seed some of the global generators: of GENERATORS."""
    for name in names:
        _SEED[name](seed)


def seeder(names: Iterable[str]) -> Callable[[int], Any]:
    """What seeds some of the global generators, made once for many seeds."""
    seeds = [_SEED[name] for name in names]
    if seeds == [_seed_torch] and not _cuda_in_use():
        return torch.default_generator.manual_seed

    def seed_each(seed: int) -> None:
        for seed_one in seeds:
            seed_one(seed)

    return seed_each


def drawn_since(seed: int, names: Iterable[str]) -> set[str]:
    """Which of the named generators were drawn from since they were seeded with ``seed``. They are anywhere afterwards.

    One more draw tells it, compared with the first after seeding: twenty times quicker than comparing whole states.

    >>> with seeded(7):
    ...     drawn = random.random()
    ...     drawn_since(7, GENERATORS)
    {'python'}
    """
    drawn = set()
    for name in names:
        draw = _DRAW[name]
        following = draw()
        _SEED[name](seed)
        if draw() != following:
            drawn.add(name)
    return drawn


def _seed_torch(seed: int) -> None:
    # Not torch.manual_seed: for devices that are not in use it queues the call, with a traceback, each time anew.
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)


def _draw_torch() -> Any:
    # What was drawn on a GPU is not looked for there: that would wait for it. It counts as drawn.
    return object() if _cuda_in_use() else torch.randint(2**62, ()).item()


def _seed_numpy(seed: int) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _draw_numpy() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.random_sample()


_SEED: dict[str, Callable[[int], None]] = {"torch": _seed_torch, "python": random.seed, "numpy": _seed_numpy}
_DRAW: dict[str, Callable[[], Any]] = {"torch": _draw_torch, "python": random.random, "numpy": _draw_numpy}
GENERATORS = tuple(_SEED)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Leave the global generators, after the block, as they were before it."""
    before = snapshot()
    try:
        yield
    finally:
        put_back(before)


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


class Apart:
    """Random generators of somebody who draws now and then: in place while he draws, and the others' between.

    Args:
        seed: of the global generators at his first draw.
        own: generators of his own; each is seeded too, from its own seed and this one, and afterwards is as it was.

    >>> twice = []
    >>> for _ in range(2):
    ...     drawer = Apart(5)
    ...     for _ in range(2):
    ...         with drawer.drawing():
    ...             twice.append(float(torch.rand(())))
    >>> twice[:2] == twice[2:], twice[0] == twice[1]
    (True, False)
    """

    def __init__(self, seed: int, own: Sequence[torch.Generator] = ()) -> None:
        self._seed, self._own = seed, list(own)
        self._state: Snapshot | None = None
        self._states: list[Tensor] = []

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let the block draw."""
        before = [generator.get_state() for generator in self._own]
        with kept():
            if self._state is None:
                seed_all(self._seed)
                for generator in self._own:
                    generator.manual_seed(derive(self._seed, generator.initial_seed()))
            else:
                put_back(self._state)
                for generator, state in zip(self._own, self._states, strict=True):
                    generator.set_state(state)
            try:
                yield
            finally:
                self._state = snapshot()
                self._states = [generator.get_state() for generator in self._own]
                for generator, state in zip(self._own, before, strict=True):
                    generator.set_state(state)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
