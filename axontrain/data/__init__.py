"""Datasets, their order, and the batches made of them."""

from typing import TYPE_CHECKING, Any

from axontrain.data import augment
from axontrain.data.arrays import ArrayDataset
from axontrain.data.collate import Pad, collate
from axontrain.data.digits import digits
from axontrain.data.loader import Loader
from axontrain.data.mixture import Mixture
from axontrain.data.order import order
from axontrain.data.permutation import Permutation
from axontrain.data.protocol import Dataset
from axontrain.data.samplers import BalancedSampler, BucketSampler, WeightedSampler
from axontrain.data.splitting import Subset, split

if TYPE_CHECKING:
    from axontrain.data.frames import Columns
    from axontrain.data.tables import TableDataset

__all__ = [
    "ArrayDataset",
    "BalancedSampler",
    "BucketSampler",
    "Columns",
    "Dataset",
    "Loader",
    "Mixture",
    "Pad",
    "Permutation",
    "Subset",
    "TableDataset",
    "WeightedSampler",
    "augment",
    "collate",
    "digits",
    "order",
    "split",
]


def __getattr__(name: str) -> Any:
    # Of frames and tables only those know who have some: they are a quarter of this package's import.
    if name == "Columns":
        from axontrain.data.frames import Columns

        return Columns
    if name == "TableDataset":
        from axontrain.data.tables import TableDataset

        return TableDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
