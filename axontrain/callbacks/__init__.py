"""Callbacks: what happens beside training, one idea a file. None of them imports the loop."""

from axontrain.callbacks.checkpoint import Checkpoint
from axontrain.callbacks.early_stopping import EarlyStopping
from axontrain.callbacks.freezing import Freeze, Unfreeze
from axontrain.callbacks.learning_rate import LearningRate
from axontrain.callbacks.profiler import Profiler
from axontrain.callbacks.progress import ProgressBar
from axontrain.callbacks.reduce_lr import ReduceLROnPlateau
from axontrain.callbacks.spikes import SpikeGuard
from axontrain.callbacks.throughput import Throughput

__all__ = [
    "Checkpoint",
    "EarlyStopping",
    "Freeze",
    "LearningRate",
    "Profiler",
    "ProgressBar",
    "ReduceLROnPlateau",
    "SpikeGuard",
    "Throughput",
    "Unfreeze",
]
