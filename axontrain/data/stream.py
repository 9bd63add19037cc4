"""Stream: whatever a user trains on, seen as batches of an epoch from some index on.

What wraps the data does it here, once, before the loop starts: the check of shapes, the move to the device, the limit.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset

from axontrain.data.arrays import ArrayDataset
from axontrain.data.iterables import AT_HAND, Source, is_iterable
from axontrain.data.loader import Loader
from axontrain.data.mixture import Mixture
from axontrain.data.protocol import is_array, is_dataset, reject_frame
from axontrain.data.structure import signature, to_device, trailing
from axontrain.data.transfer import ahead
from axontrain.errors import BatchMismatchError, ConfigurationError, DataError, EmptyDataError, kind_of, whole
from axontrain.objective import Accumulated, task_of

DEFAULT_BATCH_SIZE = 32


class Stream:
    """The batches of ``data`` for one use: training, validation or prediction.

    Args:
        data: a Dataset, a Loader, or any iterable of batches.
        name: what errors call it.
        batch_size: of a bare Dataset.
        shuffle: of a bare Dataset.
        limit: end each pass after so many batches.
        accumulate: make one batch of so many that come ready-made; the last of a pass may have fewer.
        strict: raise where a batch's structure or trailing shape differs from the first's, or a list of batches looks like
            one of samples.
        device: where batches are moved; None leaves them.
        convert: what is made of each batch there, as one in another precision.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        shuffle: bool = False,
        limit: int | None = None,
        accumulate: int | None = None,
        strict: bool = True,
        device: torch.device | None = None,
        convert: Callable[[Any], Any] | None = None,
    ) -> None:
        self.data, self.name, self.device, self.convert = data, name, device, convert
        self.limit = None if limit is None else whole("limit", limit, what="of batches")
        self.accumulate = None if accumulate is None else whole("accumulate", accumulate, what="of batches")
        reject_frame(data, name)
        if strict and isinstance(data, (tuple, list)) and data and _is_sample(data[0]):
            raise DataError(
                f"{name} looks like a {type(data).__name__} of samples, and would be taken for one of batches (the first is "
                f"{kind_of(data[0])}): wrap it, ax.Loader({name}, batch_size); if it is batches, pass strict=False to the Loop"
            )
        self.loader = _loader(data, name, batch_size, shuffle)
        self.source: Source | None
        if self.loader is None:
            self.strict, self.source = strict, Source(data, name)
        else:
            own = self.loader.strict
            self.strict = (strict if own is None else own) and not self.loader.uniform
            # Of its own, for somebody else may read through the same Loader.
            self.source = Source(self.loader.dataset, name) if self.loader.iterable else None
            mixture = self.loader.dataset
            if shuffle and isinstance(mixture, Mixture) and not self.loader.shuffle and mixture.chooses:
                raise ConfigurationError(
                    f"{name} is a Loader without shuffle=True of a Mixture with weights= or which=, which choose in a shuffled "
                    f"pass only: ax.Loader(mixture, batch_size, shuffle=True)"
                )
        if self.accumulate is not None and not self.brings_batches:
            raise ConfigurationError(
                f"accumulate={accumulate} makes a step of so many batches that come ready-made, and {name} is a Dataset: "
                f"batch_size= says what a step sees of it, and microbatch= how much of that at once"
            )
        if self.accumulate is not None and self.tasks:
            raise ConfigurationError(
                f"accumulate={accumulate}: batches of a Mixture are of one task each, and make no step together"
            )
        self._first: dict[str | None, list[str]] = {}  # by task

    @property
    def brings_batches(self) -> bool:
        """Whether the data is batched already, so that a batch size would have no effect on it."""
        return self.loader is None or self.loader is self.data

    @property
    def of_one_task(self) -> bool:
        """Whether no batch can be of a task: all a dataset gives, unless it is a Mixture."""
        return self.loader is not None and not self.loader.iterable and not isinstance(self.loader.dataset, Mixture)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks of a Mixture."""
        mixture = None if self.loader is None else self.loader.dataset
        return tuple(mixture.names) if isinstance(mixture, Mixture) else ()

    @property
    def length(self) -> int | None:
        """Batches in a pass, where that can be known."""
        try:
            length = len(self.loader if self.loader is not None else self.data)
        except TypeError:
            return None
        if self.accumulate is not None:
            length = -(-length // self.accumulate)
        return length if self.limit is None else min(length, self.limit)

    def batches(self, seed: int, epoch: int, start: int = 0, step: int | None = None) -> Iterator[Any]:
        """The batches of an epoch from index ``start`` on; ``step`` is the run's at the epoch's beginning.

        An iterable is read batch by batch and never ahead, since what it gives may depend on what was learnt so far.

        Raises:
            EmptyDataError: if a pass gives no batch at all.
        """
        together, limit = self.accumulate or 1, self.limit
        first = start * together if self.source is None else self.source.stood(epoch, start, together)
        batches = self._batches(seed, epoch, first, None if limit is None else limit * together, step)
        if self.convert is not None:
            batches = map(self.convert, batches)
        return batches if self.accumulate is None else _accumulated(batches, self.accumulate)

    def _batches(self, seed: int, epoch: int, start: int, limit: int | None, step: int | None) -> Iterator[Any]:
        cuda = self.device is not None and self.device.type == "cuda"
        own = seed if self.loader is None or self.loader.seed is None else self.loader.seed
        augment = None if self.loader is None else self.loader.augment
        if self.loader is not None:
            read = self.loader.batches if augment is None else self.loader.numbered
            pin = True if cuda else None
            batches = read(own, epoch, start, limit, step=step, pin_memory=pin, source=self.source)
        else:
            assert self.source is not None  # what is no Loader is read by a Source
            batches = self.source.read(seed, epoch, start)
            if limit is not None:
                batches = itertools.islice(batches, max(0, limit - start))
        if augment is not None:  # where they are used, and checked as they are used
            augmented = augment.applied(self._moved(batches), own, epoch, start)
            return self._checked(augmented, epoch, start) if self.strict else augmented
        return self._moved(self._checked(batches, epoch, start) if self.strict else batches)

    def _moved(self, batches: Iterator[Any]) -> Iterator[Any]:
        if self.device is None or self.device.type == "cpu":
            return batches
        if self.device.type == "cuda" and self.loader is not None and not self.loader.iterable:
            return ahead(batches, self.device)
        return map(functools.partial(to_device, device=self.device), batches)

    def finish(self, seed: int, epoch: int, index: int) -> None:
        """Read the end of a pass of which all batches were trained on, where it was left before that."""
        if self.source is not None and self.limit is None and self.length is not None:  # else there may be more
            size = None if self.loader is None else self.loader.batch_size
            self.source.finish(seed, epoch, self.source.stood(epoch, index, self.accumulate or 1), size)

    def again(self, seed: int, epoch: int, index: int, step: int) -> Any:
        """A batch that was read before; None of an iterable, whose batches are read once, but for a list's."""
        if self.source is not None:
            if self.loader is not None or not isinstance(self.source.data, AT_HAND):
                return None
            together = self.accumulate or 1
            found = self.source.data[index * together : (index + 1) * together]
            found = [one if self.convert is None else self.convert(one) for one in found]
            found = [one if self.device is None else to_device(one, device=self.device) for one in found]
            return Accumulated(tuple(found)) if self.accumulate is not None and found else next(iter(found), None)
        return next(self.batches(seed, epoch, index, step), None)

    def samples(self, seed: int, epoch: int, index: int) -> list[int]:
        """Which samples of a dataset a batch was made of; none where that is not for this to say."""
        loader = self.loader
        if loader is None or loader.iterable or isinstance(loader.dataset, Mixture):
            return []
        if loader.sampler is not None or loader.batch_sampler is not None:  # somebody else's, who may draw when asked again
            return []
        own, together = seed if loader.seed is None else loader.seed, self.accumulate or 1
        return loader.samples(own, epoch, index * together, (index + 1) * together)

    def goes_on_from(self, other: Stream) -> bool:
        """Take over how far ``other`` has read the same data; False if the batches are not the same as there."""
        if self.accumulate != other.accumulate:
            return False
        if self.source is not None and other.source is not None:
            if self.source.data is other.source.data and self._cut_as(other):
                self.source.goes_on_from(other.source)
                self._first = other._first
            elif other.source.restored is not None:  # and not read since: the same data, as after a restart
                self.source.load_state_dict(other.source.restored)
            else:
                return False
            return True
        return self.loader is not None and other.loader is not None and self.loader.same_batches(other.loader)

    def _cut_as(self, other: Stream) -> bool:
        if self.loader is None or other.loader is None:
            return self.loader is other.loader
        return self.loader.same_batches(other.loader)

    def state_dict(self) -> dict[str, Any]:
        """How far an iterable was read; a dataset's batches are a function of the epoch and need nothing."""
        return {} if self.source is None else self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if self.source is not None and state:
            self.source.load_state_dict(state)

    def described(self) -> dict[str, Any]:
        """What decides which batches there are, in plain values: to be kept with a state."""
        loader = self.loader
        data = self.data if loader is None else loader.dataset
        of = {"kind": type(data).__name__, "batches": self.length, "limit": self.limit}
        of["accumulate"] = None if self.accumulate == 1 else self.accumulate  # which is the same batches
        if loader is None:
            try:
                return of | {"length": len(data)}
            except TypeError:
                return of
        return of | {
            "samples": None if loader.iterable else len(loader.dataset),
            "rows": data.digest() if isinstance(data, ArrayDataset) else None,
            "mixture": data.described() if isinstance(data, Mixture) else None,
            "batch_size": loader.batch_size,
            "shuffle": loader.shuffle,
            "drop_last": loader.drop_last,
            "augment": None if loader.augment is None else loader.augment.described(),
            "sampler": _fingerprint(loader.sampler),
            "batch_sampler": _fingerprint(loader.batch_sampler),
            "seed": loader.seed,
        }

    def close(self) -> None:
        """End the workers of a Loader."""
        if self.loader is not None:
            self.loader.close()

    def empty(self) -> EmptyDataError:
        """The error for a pass that gave no batch."""
        if self.loader is not None and not self.loader.iterable:
            rest = len(self.loader.dataset)
            why = f"{rest} samples, batch_size={self.loader.batch_size}, drop_last={self.loader.drop_last}"
        elif self.source is not None and self.source.once:
            why = "it is an iterator, which can be read once: pass an iterable that starts anew, as a list or a Loader"
        else:
            empty = isinstance(self.data, (list, tuple, dict)) and not self.data
            why = f"it is {f'an empty {type(self.data).__name__}' if empty else kind_of(self.data)}"
        return EmptyDataError(f"{self.name} gave no batch: {why}")

    def _checked(self, batches: Iterator[Any], epoch: int, start: int) -> Iterator[Any]:
        known: Any = None  # what the last batch was, where that is quick to tell
        for index, batch in enumerate(batches, start):
            if known is not None and trailing(batch) == known:
                yield batch
                continue
            task = task_of(batch)
            now = signature(batch if task is None else batch.batch)
            first = self._first.get(task)
            if first is None:
                pair = isinstance(batch, (tuple, list)) or isinstance(self.data, IterableDataset)
                if self.loader is None and pair and _is_sample(batch):
                    raise DataError(
                        f"{self.name} is {kind_of(self.data)}, which gives samples (the first is {kind_of(batch)}), and is "
                        f"read as batches: wrap it, ax.Loader({self.name}, batch_size); if it is batches, pass strict=False to "
                        f"the Loop"
                    )
                self._first[task] = now
            elif now != first:
                raise BatchMismatchError(
                    f"{self.name}: batch {index} of epoch {epoch} differs from the first batch in structure or trailing "
                    f"shape: expected {_written(first)}, got {_written(now)}. "
                    f"Pad or collate it to one shape, or pass strict=False to the Loop if this is meant."
                )
            known = trailing(batch)
            yield batch


def _accumulated(batches: Iterator[Any], count: int) -> Iterator[Accumulated]:
    while group := tuple(itertools.islice(batches, count)):
        yield Accumulated(group)


def _fingerprint(sampler: Any) -> str | None:
    """A sampler's kind, and of ours a digest of what it goes by, as the weights."""
    if sampler is None:
        return None
    kind = type(sampler)
    if not kind.__module__.startswith("axontrain."):
        return kind.__name__
    digest = hashlib.sha256()
    for name, value in sorted(vars(sampler).items()):
        for part in value if isinstance(value, (list, tuple)) else (value,):
            held = part.numpy(force=True).tobytes() if isinstance(part, torch.Tensor) else repr(part).encode()
            digest.update(name.encode() + held)
    return f"{kind.__name__} {digest.hexdigest()[:12]}"


def _written(parts: list[str]) -> str:
    return "; ".join(parts) or "nothing"


def _loader(data: Any, name: str, batch_size: int, shuffle: bool) -> Loader | None:
    if isinstance(data, Loader):
        loader: Loader | None = data
    elif is_array(data):
        loader = Loader(ArrayDataset(data), batch_size, shuffle=shuffle)
    elif isinstance(data, (str, bytes, Mapping)) or data is None:
        raise DataError(
            f"{name} is {kind_of(data)}: pass a Dataset, a Loader, or an iterable of batches"
            + (" (a mapping of arrays: ax.ArrayDataset(mapping))" if isinstance(data, Mapping) else "")
        )
    elif isinstance(data, tuple) and data and all(is_array(item) for item in data):
        raise DataError(
            f"{name} is {kind_of(data)}: a tuple of arrays is wrapped as ax.ArrayDataset(*arrays), so that it is not "
            f"taken for {len(data)} batches (a list is an iterable of batches)"
        )
    elif isinstance(data, (tuple, list)) or not is_dataset(data) or _gives_batches(data):
        # A list is taken for what it most often is in training code, one stream of batches; wrap it in a Loader to
        # have it taken for samples.
        loader = None
        if not is_iterable(data):
            raise DataError(
                f"{name} is {kind_of(data)}: pass a Dataset (it has no __len__ or no __getitem__), a Loader, or an "
                f"iterable of batches (it has no __iter__)"
            )
    else:
        loader = Loader(data, batch_size, shuffle=shuffle)
    return loader


def _is_sample(item: Any) -> bool:
    # A pair or a mapping with a part that has no batch dimension; a list of numbers is a column of a batch.
    column = isinstance(item, list) and all(map(_is_number, item))
    pair = isinstance(item, (tuple, list)) and len(item) == 2 and not column
    parts = item.values() if isinstance(item, Mapping) else item if pair else ()
    return any(_is_number(part) or _is_sample(part) for part in parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "shape", None) == ()


def _gives_batches(data: Any) -> bool:
    # torch's DataLoader has no __getitem__; loaders of other libraries that do say that they are loaders.
    return hasattr(data, "batch_sampler") or (hasattr(data, "batch_size") and hasattr(type(data), "__iter__"))
