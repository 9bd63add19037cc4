"""Assumptions: what a recorded step takes for given, since Python does not run in it again: looked at before each replay.

It is what the module, its parts and the objects in them hold: numbers and texts by what they are; what is no tensor and no
container by which object it is; tensors by that, by where they lie, and by shape. What Python looks up elsewhere,
as in global variables or in a class, is not seen; nor is what more than 256 things in one container are, or what lies deeper
than eight of them in one another. What there is of the optimizers is in :mod:`axontrain.execution.options`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_modules

from axontrain.execution.contents import HOOKS, MOST, PARTS, PLAIN, Contents, drawn_to
from axontrain.guard import is_dense

OF_EVERY = (
    of_modules._global_forward_hooks, of_modules._global_forward_pre_hooks,
    of_modules._global_backward_hooks, of_modules._global_backward_pre_hooks,
)  # fmt: skip
KEPT = (dict, list, set, deque)  # containers whose content is another although they are the same


class Assumptions:
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
        found = self.contents = Contents(module)
        self._named = [one for one in found.places if one[2]]
        self._places = [place for _, place, _ in found.places]
        self._sizes = [*map(len, self._places)]
        # Of one key alone an itemgetter gives no tuple, and a tuple is compared by what its items are.
        self._looks = [(itemgetter(*(keys * 2 if len(keys) == 1 else keys)), place) for _, place, keys in self._named]
        self._objects = [look(place) for look, place in self._looks]
        self._expected = [tuple(map(_own, values)) for values in self._objects]
        self._content = [(place, place.copy()) for place in self._places if type(place) in KEPT]
        self._tensors = [tensor for *_, tensor in found.tensors]
        self._lying = [one for one in self._tensors if one.layout is torch.strided]  # others lie in several places
        self._known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._arrays = [array.tobytes() for _, array in found.arrays]
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
                [*map(len, self._places)] == self._sizes
                and [look(place) for look, place in self._looks] == self._expected
                and all(map(is_, [place[key] for _, place, key, _ in self.contents.tensors], self._tensors))
                and self._now() == self._where
                and (not self._arrays or [array.tobytes() for _, array in self.contents.arrays] == self._arrays)
            )
        except Exception:  # one is gone; or what is compared is the user's, or a tensor, which has no one answer
            return False

    def broken(self) -> str:
        """What of it is another now, in words; "" if nothing is, or it has no name."""
        return next(self._differences(), "")

    def _differences(self) -> Iterator[str]:
        if any(OF_EVERY):
            yield "there are hooks on every module"
        for (what, place, keys), expected in zip(self._named, self._expected, strict=True):
            for key, before in zip(keys, expected, strict=False):
                if not _has(place, key):
                    yield f"{key} of {what} is gone"
                elif not _same(place[key], before):
                    if key in PARTS:
                        yield f"the {'parts' if key == '_modules' else 'hooks'} of {what} are others"
                    yield f"{key} of {what} was {shown(before)}, and is {shown(place[key])}"
        for (what, place, _), size in zip(self.contents.places, self._sizes, strict=True):
            if len(place) != size:
                yield f"{what} holds {len(place)} things, and held {size}"
        where = {id(one): lies for one, lies in zip(self._lying, self._where, strict=False)}
        for what, place, key, before in self.contents.tensors:
            if not _has(place, key):
                yield f"{key} of {what} is gone"
            elif place[key] is not before:
                yield f"{key} of {what} was given another tensor"
            elif id(before) in where and _lies(before) != where[id(before)]:
                yield f"{key} of {what} lies elsewhere, has another shape, or is trained or frozen otherwise"
        for (name, array), before in zip(self.contents.arrays, self._arrays, strict=True):
            if array.tobytes() != before:
                yield f"{name} is another array"
        if self._now() != self._where:
            yield "a tensor on the host is another"

    def drawn(self) -> list[Any]:
        """Which of its own generators were drawn from since."""
        return [one for one, before in self._drawn if drawn_to(one) != before]

    def begin(self) -> None:
        """A step begins: what is drawn is drawn from now on."""
        self._drawn = [(one, drawn_to(one)) for one, _ in self._drawn]

    def kept(self) -> dict[str, Tensor]:
        """The tensors that are neither parameters nor buffers, by name, of those that can be written to."""
        others = [one for one in self.contents.tensors if id(one[-1]) not in self._known and is_dense(one[-1])]
        return {f"the tensor of {key} of {what}": tensor for what, _, key, tensor in others}

    def put_back(self) -> None:
        """Make it again what it was, by the same objects; tensors aside that were written to."""
        for place, content in self._content:
            if isinstance(place, (list, deque)):
                if len(place) != len(content) or not all(map(is_, place, content)):
                    place.clear()
                    place.extend(content)
            elif len(place) != len(content) or not all(key in place and _is(place, key, content) for key in content):
                place.clear()
                place.update(content)
        for (_, place, keys), objects in zip(self._named, self._objects, strict=True):
            for key, before in zip(keys, objects, strict=False):
                if not isinstance(place, tuple) and key not in PARTS and not (_has(place, key) and place[key] is before):
                    place[key] = before
        for _, place, key, tensor in self.contents.tensors:
            if not isinstance(place, tuple) and not (_has(place, key) and place[key] is tensor):
                place[key] = tensor
        for (_, array), before in zip(self.contents.arrays, self._arrays, strict=True):
            if array.tobytes() != before:
                array[...] = type(array)(array.shape, array.dtype, before)

    def _now(self) -> list[Any]:
        places: list[Any] = [(one.data_ptr(), one.shape, one.stride(), one.requires_grad) for one in self._lying]
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


def is_plain(value: Any) -> bool:
    """Whether a value means nothing beside what it is equal to."""
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(map(is_plain, value)))


def shown(value: Any) -> str:
    """A value in few words."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, KEPT) and len(value) <= MOST else value


def _lies(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.requires_grad


def _has(place: Any, key: Any) -> bool:
    try:
        place[key]
    except (LookupError, AttributeError):
        return False
    return True


def _is(place: Any, key: Any, content: Any) -> bool:
    return not isinstance(place, dict) or place[key] is content[key]


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or (not isinstance(a, Tensor) and bool(a == b))
    except Exception:  # of the user's
        return False
