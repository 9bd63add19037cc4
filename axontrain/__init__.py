"""axontrain: train any PyTorch objective with one short loop.

Write an :class:`Objective` (``predict`` and ``loss``), give it to a :class:`Loop` with an :class:`Optimizer`, and ``fit``.
"""

import gc
from typing import TYPE_CHECKING, Any

_collecting = gc.isenabled()
gc.disable()  # else a collection over all of torch's objects falls into this import, and takes twice what it takes
try:
    from axontrain import averages, data, metrics, schedules
    from axontrain.audit import Audit, audit
    from axontrain.callback import Callback
    from axontrain.callbacks import (
        Checkpoint,
        EarlyStopping,
        Freeze,
        LearningRate,
        Profiler,
        ProgressBar,
        ReduceLROnPlateau,
        SpikeGuard,
        Throughput,
        Unfreeze,
    )
    from axontrain.checkpoint.weights import load_weights
    from axontrain.clock import Duration, Every
    from axontrain.data import ArrayDataset, Dataset, Loader, Mixture, order, split
    from axontrain.errors import (
        AxonError,
        AxonWarning,
        BatchMismatchError,
        CheckpointError,
        ConfigurationError,
        DataError,
        EmptyDataError,
        LossError,
        MetricError,
        MissingExtraError,
        NonFiniteError,
        NonFiniteWarning,
        ObjectiveError,
        OptimizerError,
        OutOfRangeError,
        SplitError,
        UnknownNameError,
        UnknownOptionError,
        WorkerError,
    )
    from axontrain.execution.report import StepReport
    from axontrain.history import History
    from axontrain.locate import locate_nonfinite
    from axontrain.loop import Loop
    from axontrain.objective import Objective, Step, Supervised, TaskBatch
    from axontrain.optimizer import Optimizer, layerwise
    from axontrain.preflight import Report
    from axontrain.state import LoopState, Result, Stop, StopEpoch
    from axontrain.version import VERSION
finally:
    if _collecting:
        gc.enable()

if TYPE_CHECKING:
    from axontrain.data import Columns, TableDataset

__version__ = VERSION

__all__ = [
    "ArrayDataset",
    "Audit",
    "AxonError",
    "AxonWarning",
    "BatchMismatchError",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "Columns",
    "ConfigurationError",
    "DataError",
    "Dataset",
    "Duration",
    "EarlyStopping",
    "EmptyDataError",
    "Every",
    "Freeze",
    "History",
    "LearningRate",
    "Loader",
    "Loop",
    "LoopState",
    "LossError",
    "MetricError",
    "MissingExtraError",
    "Mixture",
    "NonFiniteError",
    "NonFiniteWarning",
    "Objective",
    "ObjectiveError",
    "Optimizer",
    "OptimizerError",
    "OutOfRangeError",
    "Profiler",
    "ProgressBar",
    "ReduceLROnPlateau",
    "Report",
    "Result",
    "SpikeGuard",
    "SplitError",
    "Step",
    "StepReport",
    "Stop",
    "StopEpoch",
    "Supervised",
    "TableDataset",
    "TaskBatch",
    "Throughput",
    "Unfreeze",
    "UnknownNameError",
    "UnknownOptionError",
    "WorkerError",
    "audit",
    "averages",
    "data",
    "layerwise",
    "load_weights",
    "locate_nonfinite",
    "metrics",
    "order",
    "schedules",
    "split",
]


def __getattr__(name: str) -> Any:
    if name in ("Columns", "TableDataset"):  # imported when used
        return getattr(data, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
