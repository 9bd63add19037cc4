"""Assumptions: what a recorded step takes for given, since Python does not run in it again: looked at before each replay.

It is what the module, its parts and the objects in them hold, and what their functions look up elsewhere: global variables,
closures, default arguments, attributes of classes (:mod:`axontrain.execution.lookups`). Numbers and texts are looked at by
what they are and by their type; what is no tensor and no container, by which object it is; tensors by that, by where they lie,
and by shape. What there is of the optimizers is in :mod:`axontrain.execution.options`.

Not seen are clocks; files, and what is logged; what installed libraries keep to themselves; NumPy arrays of more than 64 KB;
of a container of more than 256 things, what is plain and in which order they are, except how many there are; what lies deeper
than eight containers in one another; the environment, and what is reached through ``sys.modules``; code made from texts, and
methods whose names are made up while they are looked up; what is looked up only when objects are made in a step or turned into
texts; and which of a set's members ``pop`` gives next.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from axontrain.execution.arrays import content_of
from axontrain.execution.contents import HOOKS, OF_EVERY
from axontrain.execution.generators import drawn_to
from axontrain.execution.surroundings import Surroundings, alike
from axontrain.execution.views import MISSING, looking
from axontrain.execution.wording import called

SHAPE = attrgetter("shape", "requires_grad")


class Assumptions(Surroundings):
    """What was given when it was made.

    >>> module = nn.Dropout(0.5)
    >>> given = Assumptions(module)
    >>> given.hold(), given.broken()
    (True, '')
    >>> module.p = 0.1
    >>> given.hold(), given.broken()
    (False, 'p of Dropout was 0.5, and is 0.1')
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        found = self.contents
        self._sized = [where for _, where, size in self._named if size]
        self._sizes = [*map(len, self._sized)]
        self._empty = [where for _, where, size in self._named if not size]
        self._ordered = [where for _, where in self._keyed]
        self._looks = [looking(place.where, place.keys) for place in found.places if place.keys]
        self._values = [*chain(*[look() for look in self._looks])]
        self._tensors = [tensor for *_, tensor in found.tensors]
        self._lying = [one for one in self._tensors if one.layout is torch.strided]  # others lie in several places
        self._drawn = [(one, drawn_to(one)) for one in found.generators]
        device = next((p.device for p in module.parameters()), None)
        self._apart = device is not None and device.type != "cpu"  # from the host
        self._where = self._now()

    def hold(self) -> bool:
        """Whether all of it is as it was, and no hook is on all modules; of generators nothing is assumed."""
        for hooks in OF_EVERY:
            if hooks:
                return False
        try:
            return (
                [*map(len, self._sized)] == self._sizes
                and not any(self._empty)
                and [*map(list, self._ordered)] == self._orders
                # The same objects, as a rule: what lies in them is looked at by itself, and what is plain does not change.
                and (all(map(is_, chain(*[look() for look in self._looks]), self._values)) or self._alike())
                and self._now() == self._where
                and (not self._sets or all(one == before for one, before in self._sets))
                and (not self._contexts or all(alike(one.get(MISSING), before) for _, one, before in self._contexts))
                and (not self._arrays or all(content_of(array) == before for array, before, _ in self._arrays))
            )
        except Exception:  # one is gone; or what is compared is the user's, or a tensor, which has no one answer
            return False

    def _alike(self) -> bool:
        return all(map(alike, chain(*[look() for look in self._looks]), self._values))

    def broken(self) -> str:
        """What of it is another now, in words; "" if nothing is, or it has no name."""
        return next(self._differences(), "")

    def _differences(self) -> Iterator[str]:
        if any(OF_EVERY):
            yield "there are hooks on every module"
        yield from self.changes()
        now, size = self._now(), len(self._lying)
        moved = {id(self._lying[n % size]) for n in range(3 * size) if now[n] != self._where[n]}
        for what, _, key, before in self.contents.tensors:
            if id(before) in moved:
                yield f"{called(key)} of {what} lies elsewhere, has another shape, or is trained or frozen otherwise"
        if now != self._where:
            yield "a tensor on the host is another"

    def drawn(self) -> list[Any]:
        """Which of its own generators were drawn from since."""
        return [one for one, before in self._drawn if drawn_to(one) != before]

    def begin(self) -> None:
        """A step begins: what is drawn is drawn from now on."""
        self._drawn = [(one, drawn_to(one)) for one, _ in self._drawn]

    def _now(self) -> list[Any]:
        """Where tensors lie, as many in turn; and those on the host."""
        lying = self._lying
        places: list[Any] = [*map(Tensor.data_ptr, lying), *map(Tensor.stride, lying), *map(SHAPE, lying)]
        if self._apart:  # what is done on the host is not recorded: of its tensors, how often they were changed
            places += [tensor._version for tensor in self._tensors if tensor.device.type == "cpu"]
        return places


def hooked(module: nn.Module) -> str:
    """Which part of a module has hooks that Python calls; "" if none has."""
    if any(OF_EVERY):
        return "every module"
    for name, part in module.named_modules():
        if any(getattr(part, hooks) for hooks in HOOKS):
            return f"{name} ({type(part).__name__})" if name else type(part).__name__
    return ""
