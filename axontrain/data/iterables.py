"""Source: data that can only be iterated, read on from any place: by its own ``state_dict``, or by reading up to it again."""

from __future__ import annotations

import functools
import inspect
import itertools
import time
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from axontrain.errors import AxonWarning, kind_of
from axontrain.randomness import derive, seeded

# What these hold is there already: no code of anybody's runs when it is read, and skipping costs nothing.
AT_HAND = (list, tuple, range)
END = object()


class Source:
    """Somebody else's iterable, read item by item and never ahead.

    Each item is made in a random state that (seed, epoch, index) decides, so that what an iterable draws depends on nothing
    else. (An iterator that goes on over passes counts from where it began.)

    Args:
        data: an iterable, which starts anew each epoch; an iterator, which goes on; or a function that returns one, given the
            epoch if it takes an argument.
        name: what warnings and errors call it.
    """

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name
        self._live: Iterator[Any] | None = None
        self._position = (0, 0)
        self._consumed = 0  # items of an iterator, over all passes
        self._begun: list[torch.Tensor] = []  # its own generators, at the beginning of the pass
        self._saved: Mapping[str, Any] | None = None
        self._told = False

    @property
    def once(self) -> bool:
        """Whether it is an iterator, which can be read only once."""
        return isinstance(self.data, Iterator)  # not iter(data) is data: that would start a DataLoader's workers

    def read(self, seed: int, epoch: int, start: int, size: int | None = None) -> Iterator[Any]:
        """The items of a pass from index ``start`` on; with ``size``, lists of so many."""
        items = self._live
        if items is None or start == 0 or self._position != (epoch, start):
            items = self._begin(seed, epoch, start, size)
        self._live = items
        for index in itertools.count(start):
            item = self._next(items, seed, epoch, index, size)
            if item is END:
                return
            self._position = (epoch, index + 1)
            self._consumed += 1
            yield item

    def goes_on_from(self, other: Source) -> None:
        """Take over how far another has read the same data."""
        self._live, self._position, self._consumed = other._live, other._position, other._consumed
        self._begun, self._saved = other._begun, other._saved

    def state_dict(self) -> dict[str, Any]:
        """How far it was read, and the data's own state where it has one."""
        own = getattr(self.data, "state_dict", None)
        started = self._live is not None
        return {
            "position": list(self._position),
            "consumed": self._consumed,
            "data": own() if callable(own) and started else None,
            "begun": list(self._begun),
            "now": [generator.get_state() for generator in _generators(self.data)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there at the next reading."""
        self._saved, self._live = state, None

    def _begin(self, seed: int, epoch: int, start: int, size: int | None) -> Iterator[Any]:
        saved, self._saved = self._saved, None
        generators = _generators(self.data)
        here = saved is not None and tuple(saved["position"]) == (epoch, start)
        if saved is not None:
            states = saved["begun"] if start and here else saved["now"]
            for generator, state in zip(generators, states, strict=False):
                generator.set_state(state)
        for owner in (self.data, getattr(self.data, "sampler", None)):
            if callable(tell := getattr(owner, "set_epoch", None)):
                tell(epoch)
        by_itself = here and start > 0 and saved is not None and saved["data"] is not None
        if by_itself and saved is not None and callable(load := getattr(self.data, "load_state_dict", None)):
            load(saved["data"])
            self._consumed = saved["consumed"]
            return self._iterated(seed, epoch)
        self._begun = [generator.get_state() for generator in generators]
        items = self._iterated(seed, epoch)
        if isinstance(self.data, AT_HAND):
            return itertools.islice(items, start * (size or 1), None)
        if self.once:  # it stands where it was left, unless this process has not read it yet
            behind = saved["consumed"] - self._consumed if saved is not None else 0
            self._skip(items, seed, 0, range(self._consumed, self._consumed + behind), size)
            self._consumed += max(0, behind)
        else:
            self._skip(items, seed, epoch, range(start), size)
        return items

    def _iterated(self, seed: int, epoch: int) -> Iterator[Any]:
        data = self.data
        if isinstance(data, AT_HAND):
            return iter(data)
        with seeded(derive(seed, "iterable", epoch)):
            if not is_maker(data):
                return iter(data)
            parameters = inspect.signature(data).parameters.values()
            wants = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            return iter(data(epoch) if len(wants) == 1 else data())

    def _next(self, items: Iterator[Any], seed: int, epoch: int, index: int, size: int | None) -> Any:
        if isinstance(self.data, AT_HAND):
            return _taken(items, size)
        place = (0, self._consumed) if items is self.data else (epoch, index)
        with seeded(derive(seed, "batch", *place)):
            return _taken(items, size)

    def _skip(self, items: Iterator[Any], seed: int, epoch: int, indices: range, size: int | None) -> None:
        """Read what was read before, in the same random states, and throw it away."""
        if not len(indices):
            return
        began = time.perf_counter()
        for index in indices:
            with seeded(derive(seed, "batch", epoch, index)):
                if _taken(items, size) is END:
                    break
        seconds = time.perf_counter() - began
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"{self.name} ({kind_of(self.data)}) has no state_dict, so that to go on at batch {indices.stop} the "
            f"{len(indices)} before it were read once more and thrown away: {seconds:.1f} s. Give it state_dict and "
            f"load_state_dict, or pass what has __len__ and __getitem__, of which nothing is read twice",
            AxonWarning,
            stacklevel=2,
        )


def is_maker(data: Any) -> bool:
    """Whether data is a function that returns an iterator, as a generator function is."""
    return isinstance(data, (types.FunctionType, types.MethodType, functools.partial))


def is_iterable(data: Any) -> bool:
    """Whether a Source can read it."""
    return is_maker(data) or isinstance(data, Iterable) or hasattr(type(data), "__getitem__")


def _taken(items: Iterator[Any], size: int | None) -> Any:
    if size is None:
        return next(items, END)
    return list(itertools.islice(items, size)) or END


def _generators(data: Any) -> list[torch.Generator]:
    # A torch DataLoader may draw its order from a generator of its own.
    owners = (data, getattr(data, "sampler", None))
    found = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(found.values())
