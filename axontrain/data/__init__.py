"""Datasets, their order, and the batches made of them."""

from axontrain.data.arrays import ArrayDataset
from axontrain.data.collate import Pad, collate
from axontrain.data.digits import digits
from axontrain.data.frames import Columns
from axontrain.data.loader import Loader
from axontrain.data.mixture import Mixture
from axontrain.data.order import order
from axontrain.data.permutation import Permutation
from axontrain.data.protocol import Dataset
from axontrain.data.samplers import BalancedSampler, BucketSampler, WeightedSampler
from axontrain.data.splitting import Subset, split
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
    "collate",
    "digits",
    "order",
    "split",
]
