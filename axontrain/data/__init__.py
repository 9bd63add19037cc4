"""Datasets, their order, and the batches made of them."""

from axontrain.data.arrays import ArrayDataset
from axontrain.data.digits import digits
from axontrain.data.loader import Loader
from axontrain.data.order import order
from axontrain.data.protocol import Dataset

__all__ = ["ArrayDataset", "Dataset", "Loader", "digits", "order"]
