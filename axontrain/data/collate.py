"""Making a batch of samples: torch's ``default_collate``, for dataclasses too, and padding to the longest."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from axontrain.data.structure import fields, is_record, rebuilt
from axontrain.errors import DataError, kind_of


def collate(samples: list[Any]) -> Any:
    """Stack samples to a batch, as torch's ``default_collate`` does; dataclasses become dataclasses of batches.

    >>> collate([{"x": torch.zeros(2), "y": 0}, {"x": torch.ones(2), "y": 1}])
    {'x': tensor([[0., 0.],
            [1., 1.]]), 'y': tensor([0, 1])}

    Raises:
        DataError: if the samples differ in structure.
    """
    first = samples[0]
    if isinstance(first, Tensor) or not _holds_record(first):
        try:
            return default_collate(samples)
        except KeyError as error:
            raise DataError(f"the samples differ: one of them has no {error}, the first is {kind_of(first)}") from error
        except RuntimeError as error:
            if "equal size" in str(error):
                error.add_note(
                    "samples of different shapes: collate=ax.data.Pad() pads them to the longest of the batch, and "
                    "sampler=ax.data.BucketSampler(lengths) puts those of like length together"
                )
            raise
    if is_record(first):
        return rebuilt(first, {name: collate([getattr(sample, name) for sample in samples]) for name in fields(first)})
    if isinstance(first, Mapping):
        return {key: collate([sample[key] for sample in samples]) for key in first}
    parts = [collate(list(part)) for part in zip(*samples, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else parts


class Pad:
    """Pads tensors to the longest of the batch along their first dimension, and stacks them: ``collate=ax.data.Pad()``.

    Args:
        values: what to pad with: a number for all, or one for each part of a sample, as a tuple or a mapping:
            ``Pad((0, -100))`` pads inputs with 0 and targets with what ``cross_entropy`` ignores.

    Numbers and tensors without dimensions are stacked as they are.

    >>> Pad()([torch.tensor([1, 2, 3]), torch.tensor([4])])
    tensor([[1, 2, 3],
            [4, 0, 0]])
    >>> Pad((0, -100))([(torch.ones(1), torch.tensor([5])), (torch.ones(2), torch.tensor([6, 7]))])[1]
    tensor([[   5, -100],
            [   6,    7]])

    Raises:
        DataError: if ``values`` has another structure than the samples.
    """

    def __init__(self, values: Any = 0) -> None:
        self.values = values

    def __call__(self, samples: list[Any]) -> Any:
        """Make a batch of samples."""
        return _padded(samples, self.values)

    def __repr__(self) -> str:
        return f"Pad({self.values!r})"


def _padded(samples: list[Any], values: Any) -> Any:
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: _padded([s[key] for s in samples], _of(values, key, first)) for key in first}
    if is_record(first):
        return rebuilt(
            first, {name: _padded([getattr(s, name) for s in samples], _of(values, name, first)) for name in fields(first)}
        )
    if isinstance(first, (tuple, list)) and not (first and isinstance(first[0], (int, float))):
        if isinstance(values, (tuple, list)) and len(values) != len(first):
            raise DataError(f"Pad({values!r}) has {len(values)} values for samples of {len(first)} parts, {kind_of(first)}")
        parts = [_padded([s[i] for s in samples], _of(values, i, first)) for i in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, (str, bytes)):
        return list(samples)
    made = [torch.as_tensor(sample) for sample in samples]
    dtype = functools.reduce(torch.promote_types, (sample.dtype for sample in made))
    if not made[0].dim():
        return torch.stack([sample.to(dtype) for sample in made])
    if not isinstance(values, (int, float)):
        raise DataError(f"Pad({values!r}): a number pads {kind_of(first)}")
    dtype = torch.result_type(torch.empty(1, dtype=dtype), values)  # 0.5 makes floats of integers
    whole = not dtype.is_floating_point and dtype is not torch.bool
    if whole and not torch.iinfo(dtype).min <= values <= torch.iinfo(dtype).max:
        raise DataError(f"Pad({values!r}): that is no number of {dtype}, which the samples are of")
    return pad_sequence([sample.to(dtype) for sample in made], batch_first=True, padding_value=values)


def _of(values: Any, key: Any, sample: Any) -> Any:
    if isinstance(values, (int, float)):
        return values
    try:
        return values[key]
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"Pad({values!r}) has no value for the part {key!r} of a sample, which is {kind_of(sample)}") from error


def _holds_record(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_record, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_record, value))
    return is_record(value)
