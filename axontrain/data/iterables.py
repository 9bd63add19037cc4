"""Source: data that can only be iterated, read on from any place: by its own ``state_dict``, or by reading up to it again."""

from __future__ import annotations

import functools
import inspect
import itertools
import time
import types
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from axontrain.data.hugging_face import forget_start, leaves_buffer_out
from axontrain.errors import AxonWarning, DataError, kind_of
from axontrain.randomness import derive, seeded

# What these hold is there already: no code of anybody's runs when it is read, and skipping costs nothing.
AT_HAND = (list, tuple, range)
END = object()
# By whom data was begun to be read last: a state_dict of its own tells of that reading.
_LAST: weakref.WeakKeyDictionary[Any, object] = weakref.WeakKeyDictionary()


class Source:
    """Somebody else's iterable, read item by item and never ahead.

    Each item is made in a random state that (seed, epoch, index) decides, so that what an iterable draws depends on nothing
    else. (An iterator that goes on over passes counts from where it began, and anew if it gives more after its end.)

    Args:
        data: an iterable, which starts anew each epoch; an iterator, which goes on; or a function that returns one, given the
            epoch if it takes an argument.
        name: what warnings and errors call it.
    """

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name
        self._live: Iterator[Any] | None = None
        self._position = (0, 0)
        self._consumed = 0  # items of an iterator, over all passes since it began
        self._turns = 0  # how often an iterator began anew after its end, as one whose __iter__ resets it does
        self._holder: weakref.finalize[Any, Source] | None = None
        self._reading: object | None = None  # a token of this reading; that of the data's last is in _LAST
        self._begun: list[torch.Tensor] = []  # its own generators, at the beginning of the pass
        self._ended = False  # whether the pass was read to its end
        self._probing = False  # whether it begins by a state of the end of the pass before
        self._saved: Mapping[str, Any] | None = None
        self._told = False

    @property
    def once(self) -> bool:
        """Whether it is an iterator, which can be read only once."""
        return isinstance(self.data, Iterator)  # not iter(data) is data: that would start a DataLoader's workers

    @property
    def restored(self) -> Mapping[str, Any] | None:
        """A state that was loaded, where nothing was read since."""
        return self._saved

    def read(self, seed: int, epoch: int, start: int, size: int | None = None) -> Iterator[Any]:
        """The items of a pass from index ``start`` on; with ``size``, lists of so many."""
        items = self._live
        if items is None or start == 0 or self._position != (epoch, start):
            items = self._begin(seed, epoch, start, size)
        for index in itertools.count(start):
            try:
                item = self._next(items, seed, epoch, index, size)
            except BaseException:  # what failed is not gone on with: the pass is read up to here once more
                self._saved, self._live = self._state(None), None
                raise
            if item is END and index == 0 and self._probing:  # its state told of a place, and not of what it has drawn so far
                forget_start(self.data, self._saved["data"] if self._saved is not None else None)
                items = self._iterated(seed, epoch)
                self._hold(items)
                item = self._next(items, seed, epoch, index, size)
            self._probing = False
            if self._saved is not None:
                forget_start(self.data, self._saved["data"])
            self._saved, self._live = None, items  # at each item: somebody else may have read in between
            self._ended = item is END
            if item is END:
                self._turns, self._consumed = self._turns + 1, 0
                return
            self._position = (epoch, index + 1)
            self._consumed += 1
            yield item

    def finish(self, seed: int, epoch: int, index: int, size: int | None = None) -> None:
        """Read the end of a pass of which all items were read: whoever draws there, as torch's samplers do, is to do so."""
        if self._saved is not None and self._saved["data"] is not None:
            self._saved = {**self._saved, "ended": True}  # of data with a state the next pass begins by that
        elif not self._ended and ((self._live is not None and self._position == (epoch, index)) or _generators(self.data)):
            next(self.read(seed, epoch, index, size), None)

    def stood(self, epoch: int, index: int, together: int) -> int:
        """Where a pass stands of which so many groups of items were read: the last group may have been a smaller one."""
        of, item = self._position if self._saved is None else self._saved["position"]
        most = index * together
        return item if of == epoch and most - together < item < most else most

    def goes_on_from(self, other: Source) -> None:
        """Take over how far another has read the same data."""
        self._live, self._position, self._consumed = other._live, other._position, other._consumed
        self._turns, self._reading, self._ended = other._turns, other._reading, other._ended
        self._begun, self._saved = other._begun, other._saved
        self._hold(self._live)

    def state_dict(self) -> dict[str, Any]:
        """How far it was read, and the data's own state where it has one."""
        if self._saved is not None:  # nothing was read since that was loaded
            return dict(self._saved)
        own = getattr(self.data, "state_dict", None)
        ours = self._live is not None and _last(self.data) in (None, self._reading)
        return self._state(own() if callable(own) and ours else None)

    def _state(self, own: Any) -> dict[str, Any]:
        return {
            "position": list(self._position),
            "consumed": self._consumed,
            "turns": self._turns,
            "ended": self._ended,
            "data": own,
            "begun": list(self._begun),
            "now": [generator.get_state() for generator in _generators(self.data)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there at the next reading."""
        self._saved, self._live = state, None

    def _begin(self, seed: int, epoch: int, start: int, size: int | None) -> Iterator[Any]:
        saved, generators = self._saved, _generators(self.data)
        here = saved is not None and start > 0 and tuple(saved["position"]) == (epoch, start)
        self._set(generators, saved, "begun" if here else "now")
        for owner in _parts(self.data):
            if callable(tell := getattr(owner, "set_epoch", None)):
                tell(epoch)
        self._begun = [generator.get_state() for generator in generators]
        self._reading = object()
        _last(self.data, self._reading)
        after = saved is not None and start == 0 and bool(saved.get("ended")) and saved["position"][0] == epoch - 1
        by_itself = saved is not None and (here or after or self.once) and self._goes_on_by_itself(saved)
        self._probing = after and by_itself and not self.once
        self._ended = False
        items = self._iterated(seed, epoch)
        self._hold(items)
        if isinstance(self.data, AT_HAND):
            return itertools.islice(items, start * (size or 1), None)
        if by_itself and saved is not None:
            self._consumed, self._turns = saved["consumed"], saved["turns"]
        elif items is self.data:
            self._catch_up(items, saved, seed, size)
        else:
            self._skip(items, seed, epoch, range(start), size)
        if here:  # somebody else may have drawn from them since the pass began
            self._set(generators, saved, "now")
        return items

    def _hold(self, items: Any) -> None:
        # An iterator of torch's ends its workers at once when nobody holds it, but in a garbage collection, as a part of a
        # Loop that is gone, it waits 5 seconds for each. So it is held from outside for as long as this lives.
        if self._holder is not None:
            self._holder.detach()
        self._holder = weakref.finalize(self, id, items) if hasattr(items, "_shutdown_workers") else None

    def _goes_on_by_itself(self, saved: Mapping[str, Any]) -> bool:
        load = getattr(self.data, "load_state_dict", None)
        if saved["data"] is None or not callable(load) or leaves_buffer_out(self.data):
            return False
        load(saved["data"])
        return True

    def _catch_up(self, items: Iterator[Any], saved: Mapping[str, Any] | None, seed: int, size: int | None) -> None:
        """An iterator stands where it was left, unless this process has not read it yet."""
        if saved is not None and (saved["turns"], saved["consumed"]) > (self._turns, self._consumed):
            first = self._consumed if saved["turns"] == self._turns else 0
            self._turns, self._consumed = saved["turns"], saved["consumed"]
            self._skip(items, seed, self._turns, range(first, self._consumed), size)

    @staticmethod
    def _set(generators: list[torch.Generator], saved: Mapping[str, Any] | None, when: str) -> None:
        if saved is not None:
            for generator, state in zip(generators, saved[when], strict=False):
                generator.set_state(state)

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
        place = (self._turns, self._consumed) if items is self.data else (epoch, index)
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
                    raise DataError(
                        f"{self.name} ({kind_of(self.data)}) ended after {index} batches, and the run stood at batch "
                        f"{indices.stop}: it gives fewer than it did then"
                    )
        seconds = time.perf_counter() - began
        if self._told:
            return
        self._told = True
        what = f"{self.name} ({kind_of(self.data)})"
        if leaves_buffer_out(self.data):
            why, remedy = f"the state_dict of {what} leaves its shuffle buffer out", "Shuffle it by its shards alone"
        elif callable(getattr(self.data, "load_state_dict", None)):
            why, remedy = f"no state of {what} was kept for this place", "Let nobody else read it meanwhile"
        else:
            why, remedy = f"{what} has no state_dict", "Give it state_dict and load_state_dict"
        warnings.warn(
            f"{why}, so that to go on at batch {indices.stop} the {len(indices)} before it were read once more and thrown "
            f"away: {seconds:.1f} s. {remedy}, or pass what has __len__ and __getitem__, of which nothing is read twice",
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


def _last(data: Any, reading: object | None = None) -> object | None:
    try:
        if reading is not None:
            _LAST[data] = reading
        return _LAST.get(data)
    except TypeError:  # it cannot be hashed, or not be referred to weakly
        return None


def _parts(data: Any) -> list[Any]:
    # A torch DataLoader draws its order from a sampler, or from a batch_sampler that may hold one.
    batches = getattr(data, "batch_sampler", None)
    found = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(part): part for part in found if part is not None}.values())


def _generators(data: Any) -> list[torch.Generator]:
    # Of their own, from which they may draw.
    own = (getattr(part, "generator", None) for part in _parts(data))
    return list({id(generator): generator for generator in own if isinstance(generator, torch.Generator)}.values())
