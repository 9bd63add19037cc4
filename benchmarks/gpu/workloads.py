"""The workloads by name."""

from __future__ import annotations

from benchmarks.gpu.cifar import CIFAR
from benchmarks.gpu.gpt import GPT_124M
from benchmarks.gpu.mlp import MLP

WORKLOADS = {work.name: work for work in (CIFAR, GPT_124M, MLP)}
