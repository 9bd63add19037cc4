"""What all tests need: one thread, Ctrl-C that arrives, and the same device on every machine."""

import gc
import os
import signal

import pytest
import torch


def pytest_configure(config):
    # What is compared bitwise is compared on the CPU, on machines that have a GPU too; those that need one are asked for.
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A shell starts what it runs in the background with Ctrl-C ignored, which all processes of the tests would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def what_was_imported_is_no_garbage():
    # Else each collection looks through all of torch and all tests, for longer than many a test takes.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
