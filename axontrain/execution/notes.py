"""Notes on errors: where it happened, on what batch, and what is commonly behind it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from axontrain.errors import kind_of


def note(error: BaseException, where: str, batch: Any, module: nn.Module) -> None:
    """Add to an error where it happened, the shapes and dtypes of the batch, and a hint where one is known."""
    told = "" if batch is None else f"on the batch {kind_of(batch)}"
    text = ", ".join(part for part in (where, told) if part)
    if text:
        error.add_note(text)
    for hint in _hints(str(error), kind_of(batch), module):
        error.add_note(hint)


@contextlib.contextmanager
def noted(where: str, batch: Any, module: nn.Module) -> Iterator[None]:
    """Note errors of the block."""
    try:
        yield
    except Exception as error:
        note(error, where, batch, module)
        raise


def reading(batches: Iterator[Any], where: str) -> Generator[Any, None, None]:
    """The same batches; an error in reading one says where it was."""
    for index in itertools.count():
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            error.add_note(f"{where}, reading batch {index}")
            raise
        yield batch


def _is_channels_last(module: nn.Module) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    return any(
        not is_lazy(p) and p.dim() in last and not p.is_contiguous() and p.is_contiguous(memory_format=last[p.dim()])
        for p in module.parameters()
    )


def _hints(text: str, batch: str, module: nn.Module) -> Iterator[str]:
    # NumPy's default is float64, torch's float32: the commonest first error of all, and torch does not say how to mend it.
    if "float64" in batch and ("dtype" in text or "Double" in text):
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
        if "float64" not in dtypes:
            yield f"the batch holds float64, the parameters are {', '.join(dtypes)}: convert the data, as by .float()"
    if "backward through the graph a second time" in text:
        yield (
            "the engine runs backward on the loss that train_step returns: leave .backward() out of it; several losses are "
            "yielded, as (optimizer_name, loss)"
        )
    if "0D or 1D target" in text or "multi-target not supported" in text:
        yield "cross_entropy takes class numbers of shape (B,): for targets of shape (B, 1), squeeze them, as by .squeeze(-1)"
    wrong = (
        "expected scalar type Long",
        "not implemented for 'Int'",
        "expected target dtype",
        'kernel_2d_index" not implemented',
    )
    if any(part in text for part in wrong):  # the last is a GPU's
        yield "cross_entropy takes class numbers of dtype int64: convert the targets, as by .long()"
    if "must be Tensor, not numpy.ndarray" in text or "'numpy.ndarray' object has no attribute" in text:
        yield (
            "batches of your own are taken as they are: make tensors of NumPy arrays, as by torch.from_numpy; arrays of all "
            "samples make an ax.ArrayDataset"
        )
    if "view size is not compatible" in text and _is_channels_last(module):
        yield "with channels_last=True images lie otherwise in memory: .view(len(x), -1) cannot flatten them, .flatten(1) can"
    if "more than 1 value per channel" in text:
        yield (
            "a BatchNorm cannot train on one sample at a time: ax.Loader(..., drop_last=True) leaves a small last batch out, "
            "and microbatch= is to be 2 or more"
        )
    if "must be Tensor, not list" in text or "must be Tensor, not tuple" in text or "must be Tensor, not dict" in text:
        yield f"predict was given what split made of {batch}: override split(batch) to return (inputs, targets)"
