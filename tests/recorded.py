"""A recorder of steps on the CPU that does what CUDA graphs do, so that what is made of them is tested on any machine.

What is recorded are the operators below autograd, with the very tensors that they were given. A replay does them again on the
same memory: the numbers that Python gave them stay, and what they make anew lies where it lay when it was recorded. Recording
leaves no trace: what it has written to is put back, with the random generator. Reading a number on the host is refused.
"""

import contextlib
import sys
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from axontrain.execution import recording

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
living = weakref.WeakSet()  # recordings that were not closed


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made, self.kept = [], [], set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        for tensor in given:
            place = tensor.untyped_storage().data_ptr()
            if place not in self.made:  # it was there before
                self.made.add(place)
                self.before.append((tensor.untyped_storage(), tensor.untyped_storage().clone()))
        result = func(*args, **kwargs)
        places = {tensor.untyped_storage().data_ptr() for tensor in given}
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        fresh = [leaf.untyped_storage().data_ptr() not in places for leaf in results]
        self.made |= {leaf.untyped_storage().data_ptr() for leaf in results}
        # As they are now: what is made of them in place, as another shape, comes later.
        noted = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs, results))
        self.operations.append((func, *noted, fresh, torch.is_grad_enabled()))
        return result


class Recording:
    """What was recorded; ``replays`` counts."""

    def __init__(self, operations):
        self.operations, self.replays = operations, 0
        living.add(self)

    def replay(self):
        assert self.operations is not None, "a recording that was closed is replayed"
        self.replays += 1
        for func, args, kwargs, results, fresh, grad in self.operations:
            with torch.set_grad_enabled(grad):  # by which some kernels decide what to keep
                now = [leaf for leaf in tree_flatten(func(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
            for before, after, is_fresh in zip(results, now, fresh, strict=True):
                if is_fresh:
                    before.copy_(after.detach())

    def close(self):
        self.operations = None
        living.discard(self)


class Recorder:
    """In place of :class:`axontrain.execution.recording.Recorder`."""

    def __init__(self, device):
        self.device, self.generation = device, []

    def renew(self):
        assert all(one.operations is None for one in self.generation), "memory is begun anew that is in use"
        self.generation = []

    def wait(self):
        pass

    @staticmethod
    def on_host(drawn):
        host = [one for one in drawn if one not in ("torch", "cuda") and not isinstance(one, torch.Generator)]
        return "" if not host else host[0] if isinstance(host[0], str) else f"a {type(host[0]).__name__} of its own"

    @contextlib.contextmanager
    def aside(self):
        from axontrain.execution.reads import HostReads

        waits = []

        def seen(word):
            between = (recording.__file__.rpartition("/")[0], torch.__file__.rpartition("/")[0])
            frame = sys._getframe(1)
            while frame.f_code.co_filename.startswith(between):
                frame = frame.f_back
            waits.append((frame.f_code.co_filename, frame.f_lineno))

        with HostReads(seen):
            yield waits

    def record(self, function, generators=()):
        generators = [torch.default_generator, *(one for one in generators if isinstance(one, torch.Generator))]
        states = [generator.get_state() for generator in generators]
        mode = _Recording()
        try:
            with mode:
                given = function()
        finally:
            for storage, before in mode.before:
                storage.copy_(before)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
        assert not self.generation or any(one.operations is not None for one in self.generation), "all of them were closed"
        self.generation.append(Recording(mode.operations))
        return self.generation[-1], given


@pytest.fixture
def recorder(monkeypatch):
    """Has steps recorded on the CPU; gives the recordings that were not closed."""
    monkeypatch.setattr(recording, "Recorder", Recorder)
    monkeypatch.setattr(recording, "available", lambda device: True)
    living.clear()
    return living
