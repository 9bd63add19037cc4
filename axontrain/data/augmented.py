"""Augmented: what a Loader's ``augment=`` is, and the batches that it is done to, once they are where they are used."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from axontrain.data.draws import Draw
from axontrain.data.structure import fields, is_record, rebuilt
from axontrain.errors import ConfigurationError, DataError, kind_of
from axontrain.host import placed
from axontrain.objective import TaskBatch


class Numbered(NamedTuple):
    """A batch that is to be augmented, and which samples it is made of: it is moved as any batch is."""

    indices: Tensor
    batch: Any


class Augment:
    """What is done to batches, each part of them in its own way.

    Args:
        given: an augmentation, several that are done one after the other, or a mapping of either by the part that they are of.

    Raises:
        ConfigurationError: for what cannot be called as ``augmentation(images, draw)``.
    """

    def __init__(self, given: Any) -> None:
        parts = dict(given) if isinstance(given, Mapping) else {None: given}
        if not parts:
            raise ConfigurationError("augment={}: it names no part of a batch; leave it out, or augment={'image': [...]}")
        self.parts: dict[Any, tuple[Callable[[Tensor, Draw], Tensor], ...]] = {}
        for key, augmentations in parts.items():
            several = tuple(augmentations) if isinstance(augmentations, (list, tuple)) else (augmentations,)
            for one in several:
                _check(one)
            self.parts[key] = several

    def applied(self, batches: Iterator[Numbered], seed: int, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from number ``start`` on, augmented."""
        for number, numbered in enumerate(batches, start):
            try:
                batch = self(numbered, seed, epoch)
            except Exception as error:
                error.add_note(f"in augment= of batch {number} of epoch {epoch}")
                raise
            del numbered  # or what was given would live for as long as what was made of it
            yield batch

    def __call__(self, numbered: Numbered, seed: int, epoch: int) -> Any:
        """A batch with its parts augmented; each part draws the same numbers, in its own order."""
        batch = numbered.batch
        for key, several in self.parts.items():
            change = functools.partial(_done, several=several, indices=numbered.indices, seed=seed, epoch=epoch)
            batch = _replaced(batch, key, change)
        return batch

    def described(self) -> str:
        """What is done, in words that are the same in each process."""
        parts = {key: f"[{', '.join(map(_word, several))}]" for key, several in self.parts.items()}
        return parts.get(None) or f"{{{', '.join(f'{key!r}: {of}' for key, of in parts.items())}}}"


def _check(one: Any) -> None:
    if isinstance(one, type):
        raise ConfigurationError(f"augment={one.__name__} is a class: give an instance, {one.__name__}(...)")
    if not callable(one):
        raise ConfigurationError(
            f"augment={kind_of(one)}: a function (images, draw) -> images, as ax.data.augment.Flip() is, or a list of such"
        )
    try:
        signature = inspect.signature(one)
    except (TypeError, ValueError):  # of what is written in C
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ConfigurationError(
            f"augment={_word(one)}{signature} is called with images and draw, and does not take these: what is called with a "
            f"batch goes to transform="
        ) from error


def _done(images: Any, several: tuple[Any, ...], indices: Tensor, seed: int, epoch: int) -> Tensor:
    if not isinstance(images, Tensor) or not images.dim() or len(images) != len(indices):
        raise DataError(
            f"augment= is of a tensor with a row for each of {len(indices)} samples, and this part of the batch is "
            f"{kind_of(images)}: augment={{'image': [...]}} names another part by its key, or its place in a tuple"
        )
    draw, found = Draw(seed, epoch, placed(indices, images.device)), images
    for one in several:
        made = one(found, draw)
        if not isinstance(made, Tensor) or made.dim() == 0 or len(made) != len(indices):
            raise DataError(f"augment={_word(one)} returned {kind_of(made)} for {kind_of(images)}: it returns the images")
        found = made
    return found


def _replaced(batch: Any, key: Any, change: Callable[[Any], Tensor]) -> Any:
    """The batch with one of its parts changed: by key, by place in a tuple, or, without either, itself or its first part."""
    if isinstance(batch, TaskBatch):
        return TaskBatch(batch.task, _replaced(batch.batch, key, change))
    if isinstance(batch, Mapping) and key in batch:
        return {**batch, key: change(batch[key])}
    if is_record(batch) and key in fields(batch):
        return rebuilt(batch, {key: change(getattr(batch, key))})
    if isinstance(batch, (tuple, list)) and len(batch):
        named = getattr(batch, "_fields", ())
        place = named.index(key) if key in named else key if isinstance(key, int) else 0
        if -len(batch) <= place < len(batch):
            part = batch[place]
            # A name that is none of the tuple's is one of its first part's, which is the inputs.
            changed = change(part) if key is None or isinstance(key, int) or key in named else _replaced(part, key, change)
            parts = [changed if number == place % len(batch) else item for number, item in enumerate(batch)]
            return type(batch)(*parts) if named else type(batch)(parts)
    elif key is None and not isinstance(batch, Mapping) and not is_record(batch):
        return change(batch)
    which = "it has to be named" if key is None else f"it has no part {key!r}"
    raise DataError(
        f"augment= and a batch that is {kind_of(batch)}: {which}, as augment={{'image': [...]}} names one by its key"
    )


def _word(one: Any) -> str:
    """What an augmentation is: of ours, and of a user's that says so, with its arguments."""
    if isinstance(name := getattr(one, "__qualname__", None), str):
        return name
    said = repr(one) if any("__repr__" in vars(kind) for kind in type(one).__mro__[:-1]) else type(one).__qualname__
    return re.sub(r" at 0x[0-9a-fA-F]+", "", said)  # an address is another one each time
