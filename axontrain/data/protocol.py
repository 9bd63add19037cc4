"""What a dataset is: a length, and a sample for each index."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

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
    return hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")


def checked(data: Any, name: str = "dataset") -> Dataset:
    """Return ``data`` if it is a Dataset, or say what is missing.

    Raises:
        DataError: naming the methods that ``data`` has not got.

    """
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(type(data), method)]
    if isinstance(data, (str, bytes)) or missing:
        raise DataError(
            f"{name} is {kind_of(data)}, which is no dataset: "
            + (f"it has no {' and no '.join(missing)}" if missing else "text has to be made into tensors first")
        )
    return data  # type: ignore[no-any-return]
