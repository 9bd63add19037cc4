"""What all tests need: one thread, Ctrl-C that arrives, and the same device on every machine."""

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
