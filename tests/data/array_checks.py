"""What tests of arrays and of frames have in common."""

import pytest
import torch


@pytest.fixture(autouse=True)
def warn_always():
    # torch tells of an array that cannot be written to once in a process: each test is to hear of it.
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


def same(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return type(other) is tuple and len(one) == len(other) and all(map(same, one, other))
    return one.dtype == other.dtype and torch.equal(one, other)
