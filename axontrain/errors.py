"""What can go wrong, and how it is said.

Every error of axontrain derives from :class:`AxonError`, and from the built-in error a caller would expect, so that
both ``except ax.AxonError`` and ``except ValueError`` work::

    AxonError
    ├── ConfigurationError (ValueError)      an argument that cannot work, or two that cannot work together
    │   ├── UnknownNameError                 a name that does not exist; the nearest ones are offered
    │   │   └── UnknownOptionError (TypeError)   an argument that does not exist
    │   └── OptimizerError                   parameters that no optimizer covers, or that two do
    ├── DataError (ValueError)               data that cannot be trained on
    │   ├── EmptyDataError                   no batch at all
    │   ├── BatchMismatchError               a batch unlike the first
    │   └── OutOfRangeError (IndexError)     an index that a dataset has not got
    ├── WorkerError (RuntimeError)           a worker process died, or keeps its batch for too long
    ├── ObjectiveError (TypeError)           what an objective returned
    │   ├── SplitError                       ``split`` and the batch do not fit
    │   └── LossError                        a loss that is no scalar, has no graph, or sits elsewhere
    ├── MetricError (ValueError)             a metric that cannot be made, updated or read
    ├── NonFiniteError (ArithmeticError)     too many updates in a row were not finite
    ├── CheckpointError (RuntimeError)       a checkpoint that is damaged, or is of another objective
    └── MissingExtraError (ImportError)      an optional dependency that is not installed; names the extra

    AxonWarning (UserWarning)
    └── NonFiniteWarning                     updates were skipped
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING

from axontrain.shown import quoted

if TYPE_CHECKING:
    from torch import Tensor

DEPTH = 4  # of what kind_of looks into


class AxonError(Exception):
    """The root of every error that axontrain raises by itself."""


class ConfigurationError(AxonError, ValueError):
    """An argument that cannot work, or arguments that cannot work together."""


class UnknownNameError(ConfigurationError):
    """A name that does not exist: of a metric, a reading, a hook, an optimizer, an option, a style or a unit."""


class UnknownOptionError(UnknownNameError, TypeError):
    """An argument that does not exist."""


class OptimizerError(ConfigurationError):
    """A parameter that no optimizer covers, or that two cover."""


class DataError(AxonError, ValueError):
    """Data that cannot be trained on."""


class EmptyDataError(DataError):
    """A pass over the data gave no batch."""


class BatchMismatchError(DataError):
    """A batch whose structure or trailing shape differs from the first batch's."""


class WorkerError(AxonError, RuntimeError):
    """A worker process died, or has not made its batch in time."""


class OutOfRangeError(DataError, IndexError):
    """An index that a dataset has not got."""


class ObjectiveError(AxonError, TypeError):
    """An objective returned something that cannot be trained on."""


class SplitError(ObjectiveError):
    """``split`` did not give inputs and targets."""


class LossError(ObjectiveError):
    """A loss that is not a scalar, has no graph, or sits on another device."""


class MetricError(AxonError, ValueError):
    """A metric that cannot be made, updated or read."""


class NonFiniteError(AxonError, ArithmeticError):
    """Loss or gradients were not finite, and the optimizer was told not to go on.

    Attributes:
        steps: the steps that it is about, from 1, of the run.
    """

    def __init__(self, message: str, steps: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.steps = tuple(steps)


class CheckpointError(AxonError, RuntimeError):
    """A checkpoint that is damaged, incomplete, or belongs to something else."""


class MissingExtraError(AxonError, ImportError):
    """An optional dependency is not installed."""


class AxonWarning(UserWarning):
    """The root of every warning that axontrain gives."""


class NonFiniteWarning(AxonWarning):
    """Updates were skipped because the loss or the gradients were not finite."""


def warn(message: str, category: type[AxonWarning] = AxonWarning) -> None:
    """Warn at the line of whoever called axontrain, however many of its frames lie between."""
    level, frame = 1, sys._getframe()
    between = ("axontrain", "contextlib")  # in which a fit's beginning and end are called
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in between:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def unknown(kind: str, name: object, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """Make the error for a name that does not exist, with the nearest names that do.

    >>> print(unknown("metric", "acuracy", ["accuracy", "auroc"]))
    unknown metric 'acuracy': did you mean 'accuracy' or 'auroc'? Known: accuracy, auroc.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}: {offer}Known: {', '.join(names)}.{' ' + hint if hint else ''}")


def whole(name: str, value: object, least: int = 1, what: str = "") -> int:
    """Return ``value`` as an int, if it is a whole number (of Python's or NumPy's) of at least ``least``.

    >>> whole("epochs", 2)
    2

    Raises:
        ConfigurationError: otherwise.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # raises for what is no integer
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ConfigurationError(f"{name}={value!r}: a whole number{' ' if what else ''}{what}, {least} or more")
    return number


def reject(unknown_options: Mapping[str, object], *functions: Callable[..., object]) -> None:
    """Raise for arguments that none of ``functions`` has, with the nearest ones that they have.

    Python's own TypeError names the argument, but offers nothing.

    Raises:
        UnknownOptionError: if there are any.
    """
    for name in unknown_options:
        parameters = (p for function in functions for p in inspect.signature(function).parameters.values())
        known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}
        meant, told = ALSO_CALLED.get(name, ""), ""
        if meant in known:
            known, told = {meant}, f"Perhaps {meant}= is meant."
        message = str(unknown(f"option of {functions[0].__qualname__}:", name, known, told))
        raise UnknownOptionError(message)


# What others call it, where the nearest name would be another.
ALSO_CALLED = {
    **dict.fromkeys(("val", "valid", "val_data", "validation_data", "val_dataloaders", "val_loader"), "validation"),
    **dict.fromkeys(("max_epochs", "num_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("max_steps", "num_steps"), "steps"),
    **dict.fromkeys(("ckpt_path", "resume_from"), "resume"),
    **dict.fromkeys(("accumulate_grad_batches", "gradient_accumulation_steps"), "accumulate"),
    **{"learning_rate": "lr"},
    **dict.fromkeys(("accelerator", "gpus"), "device"),
    **dict.fromkeys(("default_root_dir", "logdir", "log_dir"), "directory"),
}


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    >>> require("json", "plot", "drawing").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs {package}, which is not installed: pip install 'axontrain[{extra}]'"
        ) from error


def loses(there: Tensor, here: Tensor) -> bool:
    """Whether a tensor loses more than digits where it is converted to another's dtype: a fraction, or an imaginary part.

    >>> import torch
    >>> loses(torch.tensor(0.5), torch.tensor(1)), loses(torch.tensor(1), torch.tensor(0.5))
    (True, False)
    """
    of_there, of_here = (2 if one.is_complex() else 1 if one.is_floating_point() else 0 for one in (there, here))
    return of_there > of_here


def kind_of(value: object) -> str:
    """Name a value's type the way an error message should: short, and with shape and dtype for a tensor.

    >>> kind_of([1, "a"])
    'list of 2: (int, str)'
    """
    return _kind_of(value, DEPTH)


def _kind_of(value: object, depth: int) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None and type(value).__name__ != str(dtype):  # as NumPy's own numbers: float32
        return f"{type(value).__name__}{tuple(shape)} {str(dtype).removeprefix('torch.')}"
    if not depth:  # what holds itself has no end, and what is of a file may be as deep as it likes
        return type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}: ({', '.join(_kind_of(v, depth - 1) for v in value[:4])})"
    if isinstance(value, dict):
        return "dict of {" + ", ".join(f"{quoted(k)}: {_kind_of(v, depth - 1)}" for k, v in islice(value.items(), 6)) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [f"{field.name}: {_kind_of(getattr(value, field.name), depth - 1)}" for field in dataclasses.fields(value)[:6]]
        return f"{type(value).__name__}({', '.join(parts)})"
    return type(value).__name__
