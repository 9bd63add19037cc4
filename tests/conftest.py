"""What all tests need: one thread, Ctrl-C that arrives, the same device on every machine; and a process that is fresh."""

import gc
import json
import os
import signal
import subprocess
import sys

import pytest
import torch


def pytest_configure(config):
    # What is compared bitwise is compared on the CPU, on machines that have a GPU too; those that need one are asked for.
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:  # torch reads it with what it first computes by cuBLAS, and what is compared bitwise there needs it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A shell starts what it runs in the background with Ctrl-C ignored, which all processes of the tests would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def what_was_there_before_is_no_garbage():
    """Else each collection looks through all of torch and of what tests have imported, for longer than many a test takes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def fast_disk():
    """What fsync does cannot be seen without pulling the plug; who looks for its calls or has them fail puts in its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


# What is imported by what, in one process for all who ask: it takes longer to begin than all of it.
FRESH = """
import json, sys

import torch, safetensors.torch

before = set(sys.modules)
import axontrain
after = set(sys.modules)
told = {"new": sorted(after - before), "all": sorted(after), "stdlib": sorted(sys.stdlib_module_names)}

from axontrain.naming import clean_names
before = set(sys.modules)
names = clean_names(torch.nn.Sequential(torch.nn.DataParallel(torch.nn.Linear(1, 1))))
told["names"], told["for names"] = list(names.values()), sorted(set(sys.modules) - before)

from axontrain.metrics.registry import register, resolve
register("own", lambda task: 0)
resolve(["accuracy", "top3", "own"])
resolve({"a": "f1", "b": lambda predictions, targets: 0})
import axontrain.data.tables
told["in the end"] = sorted(sys.modules)
print(json.dumps(told))
"""


@pytest.fixture(scope="session")
def imported():
    """The modules of a process that has imported axontrain, and done with it what is to import nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)
