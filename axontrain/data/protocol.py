"""What a dataset is: a length, and a sample for each index."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor
from torch.utils.data import IterableDataset

from axontrain.data.iterables import is_maker
from axontrain.errors import DataError, kind_of


@runtime_checkable
class Dataset(Protocol):
    """``__len__`` and ``__getitem__``: any data library can have them, and torch's map-style datasets do.

    Two faster ways are used where a dataset has them: ``__getitems__(indices) -> list of samples``, and
    ``gather(indices) -> batch``, which gives the collated batch at once.

    >>> isinstance([1, 2, 3], Dataset)
    True
    """

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """The sample at ``index``, 0 to ``len(self) - 1``."""


def is_dataset(data: Any) -> TypeGuard[Dataset]:
    """Whether ``data`` has what the protocol asks for: on its class, where Python looks for it."""
    if isinstance(data, IterableDataset):  # which inherits a __getitem__ that it has not
        return False
    return hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")


def is_iterable_only(data: Any) -> bool:
    """Whether ``data`` can be iterated and no more: a torch IterableDataset, a generator, a function that returns one."""
    if isinstance(data, type) or is_dataset(data):
        return False
    return isinstance(data, IterableDataset) or is_maker(data) or hasattr(type(data), "__iter__")


def is_array(value: Any) -> bool:
    """Whether a value is a tensor or a NumPy array: rows, one a sample."""
    return isinstance(value, Tensor) or type(value).__module__.partition(".")[0] == "numpy"


def reject_frame(data: Any, name: str) -> None:
    """Raise if ``data`` is a data frame: by index it gives columns or nothing, never samples.

    Raises:
        DataError: saying how its columns become a dataset.
    """
    if type(data).__name__.endswith("Frame") and hasattr(data, "columns"):  # of pandas, polars, and those like them
        raise DataError(
            f"{name} is a {type(data).__name__}: pass its columns, as ax.ArrayDataset({{'x': df['x'], 'y': df['y']}}), or "
            f"ax.ArrayDataset(df[['a', 'b']].to_numpy(), df['y']) for pairs of inputs and targets; columns of text, dates and "
            f"nulls by ax.ArrayDataset.from_frame(df, inputs=['a', 'b'], targets='y')"
        )


def checked(data: Any, name: str = "dataset") -> Dataset:
    """Return ``data`` if it is a Dataset, or say what is missing.

    Raises:
        DataError: naming the methods that ``data`` has not got, or what to make of a data frame.
    """
    reject_frame(data, name)
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(type(data), method)]
    if isinstance(data, (str, bytes)) or missing:
        raise DataError(
            f"{name} is {kind_of(data)}, which is no dataset: "
            + (f"it has no {' and no '.join(missing)}" if missing else "text has to be made into tensors first")
        )
    return data  # type: ignore[no-any-return]  # it has what a Dataset has
