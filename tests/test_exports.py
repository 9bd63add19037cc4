import inspect

import pytest

import axontrain as ax

# A name that comes or goes is a change of the interface: it is to be seen here, and in the changelog.
EXPORTED = [
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


def test_the_exported_names_are_these():
    assert ax.__all__ == EXPORTED
    assert sorted(ax.__all__) == ax.__all__


@pytest.mark.parametrize("name", EXPORTED)
def test_each_is_there_and_documented(name):
    value = getattr(ax, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        assert value.__doc__, "its own, not its parent's"


def test_a_star_import_brings_them():
    names = {}
    exec("from axontrain import *", names)
    assert set(EXPORTED) <= names.keys()


@pytest.mark.parametrize("name", EXPORTED)
def test_public_methods_are_documented(name):
    value = getattr(ax, name)
    if not inspect.isclass(value):
        return
    for method, function in vars(value).items():
        if not method.startswith("_") and callable(function) and not issubclass(value, ax.Callback):
            assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_the_version_is_text():
    assert ax.__version__.count(".") == 2
