"""No host read within steps, shown by tensors that have no values: whatever reads one raises."""

import subprocess
import sys

import pytest

# In a process of its own, left without its exit handlers: fake tensors can corrupt the heap there.
SCRIPT = """
import os, sys
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
import axontrain.metrics.meter
import axontrain as ax
from axontrain.clock import Plan
from axontrain.execution.runners import runner

axontrain.metrics.meter.FOLD = 8

class Small(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16, affine=False), nn.Dropout(0.1), nn.Linear(16, 3, bias=False)
        )

    def predict(self, x):
        return self.net(x)

    def loss(self, logits, labels):
        return {"match": nn.functional.cross_entropy(logits, labels), "size": logits.square().mean()}

def right(logits, labels):
    return (logits.argmax(-1) == labels).float().mean()

for name in sys.argv[1:]:
    with FakeTensorMode():
        optimizer = ax.Optimizer(name, lr=0.1, clip_norm=1.0, clip_value=5.0, schedule=ax.schedules.cosine(), average="ema")
        loop = ax.Loop(Small(), optimizer, metrics={"right": right}, progress=False)
        loop.state.plan = Plan(steps=600)
        train_step = runner(loop.state, None)
        for _ in range(20):  # past two folds of the means
            step = train_step((torch.randn(4, 8), torch.randint(3, (4,))))
            loop.state.step += 1
            loop.state.meter.record(step)
        try:
            loop.state.meter.read()
        except DataDependentOutputException:
            print(name, "reads where it is read alone", flush=True)
os._exit(0)
"""


PLAIN, SLOW = ("sgd", "adamw", "muon"), ("adam", "adagrad", "rmsprop", "adadelta")


@pytest.mark.parametrize("names", [PLAIN, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["plain", "slow"])
def test_steps_run_on_tensors_without_values(names):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.splitlines() == [f"{name} reads where it is read alone" for name in names], done.stderr[-2000:]
