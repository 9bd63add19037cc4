"""What would wait for a GPU, shown where there is none: by tensors of a GPU that have no values.

A dispatch mode raises on whatever reads one, or copies between it and the host in a way that waits. Backward needs a GPU, so
gradients are given. In a process of its own, left without its exit handlers: fake tensors can corrupt the heap there.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import axontrain.loop
import axontrain.metrics.meter
import axontrain as ax
from axontrain import host
from axontrain.clock import Plan
from axontrain.data import structure
from axontrain.data.augment import Crop, Cutout, Flip
from axontrain.execution.microbatches import merged
from axontrain.execution.precision import Scaler
from axontrain.execution.reads import HostReads
from axontrain.guard import BufferGuard
from axontrain.objective import Step

there = torch.device("cuda", 0)
axontrain.metrics.meter.FOLD = 8
axontrain.loop.device_of, axontrain.loop.moved = lambda device: there, lambda objective, device: objective
nn.init.kaiming_uniform_ = nn.init.uniform_ = lambda tensor, *arguments, **options: tensor
torch.Tensor.pin_memory = host.pinned = structure.pinned = lambda tensor: tensor  # which fake ones have not


def at(tensor, index):
    # As Tensor.__getitem__, which asks for a GPU.
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            tensor, dim = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1), dim + 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            assert part.device == tensor.device, "an index that has to be moved"
            tensor, dim = torch.ops.aten.index(tensor, [None] * dim + [part]), dim + 1
    return tensor


def copy_(tensor, source, non_blocking=False):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.aten.copy_(tensor, source, non_blocking)


torch.Tensor.__getitem__, torch.Tensor.copy_ = at, copy_
torch.Tensor.__deepcopy__ = lambda tensor, memo: memo.setdefault(id(tensor), tensor.detach().clone())


class Mark:
    def query(self):
        return False


class Road(host.Cuda):
    def mark(self, device):
        return Mark()


host.ROADS["cuda"] = Road()


class Small(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
        self.register_buffer("mask", torch.ones(5000))  # a large one, which is asked about

    def predict(self, x):
        return self.net(x)

    def loss(self, logits, labels):
        return nn.functional.cross_entropy(logits, labels)


def right(logits, labels):
    return (logits.argmax(-1) == labels).float().mean()


def plain(logits, labels):
    return 0.5  # on the host


def refuse(word):
    raise AssertionError(f"{word} waits for the device")


METRICS = {name: name for name in ("accuracy", "top2", "f1", "iou", "perplexity")} | {"right": right, "plain": plain}


ROWS = 4


def main(name, average=None):
    with FakeTensorMode():
        with there:
            objective = Small()
        optimizer = ax.Optimizer(name, lr=0.1, clip_norm=1.0, clip_value=5.0, schedule=ax.schedules.cosine(), average=average)
        spikes = ax.SpikeGuard(window=4)
        loop = ax.Loop(objective, optimizer, metrics=METRICS, progress=False)
        state, (update,) = loop.state, loop.state.optimizers.values()
        state.plan = Plan(steps=600)
        state.buffers = buffers = BufferGuard.of(objective)
        scaler = Scaler(there)
        with there:
            data = ax.ArrayDataset(torch.ones(64, 3, 8, 8), torch.ones(64, dtype=torch.int64))
        loader = ax.Loader(data, 16, shuffle=True, augment=[Crop(2), Flip(alternating=True), Cutout(4)])

        def step(number):
            with there:
                logits, labels = torch.ones(ROWS, 3), torch.ones(ROWS, dtype=torch.int64)
                for parameter in objective.parameters():
                    parameter.grad = torch.ones(parameter.shape)
                loss = torch.ones(())
            buffers.keep()
            objective.net[1].running_mean.mul_(0.9)
            state.loss, state.last = loss, None
            spikes.after_backward(state)
            scaler.unscale([parameter.grad for parameter in objective.parameters()])
            if update.average is not None:
                update.average.begin()
                update.all_skipped = None
            skipped = update.update(loss, {"part": loss * 2})
            if update.average is not None:
                update.average.stepped(update.all_skipped, ROWS)
            scaler.update(skipped)
            buffers.put_back(skipped)
            state.end_vetoes()
            ragged = [Step(loss, logits, labels, weight=3), Step(loss, logits, labels, weight=4, values={"own": 0.25})]
            step = merged([(one, ROWS) for one in ragged])
            step.skipped = skipped
            state.step += 1
            state.last = step
            step.values = {**step.values, "mixed": 0.5 if number % 2 else loss}
            state.meter.record(step)
            spikes.after_batch(state)

        with HostReads(refuse, there):
            for batch in loader:
                pass
            for number in range(60):
                step(number)
                if number % 7 == 0:
                    assert state.read_later() is False
                    state.drop_reading()
            assert spikes._asked and not spikes._later.arrived()
    print("nothing waits", flush=True)


main(*sys.argv[1:])
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("adamw", "ema"), ("rmsprop",)], ids=" ".join)
def test_steps_and_readings_that_are_begun_do_not_wait_for_a_gpu(arguments):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "nothing waits\n", done.stderr[-2000:]
