"""Datasets that processes can be started with: of the top level of a module, so that they can be pickled."""

import os
import random
import signal
import time

import numpy as np
import torch


class Noisy:
    """Each sample holds its index and a draw from each global generator; beside it the process that made it."""

    def __init__(self, size=60):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        draws = [index, random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor(draws, dtype=torch.float64), os.getpid()


class Still(Noisy):
    """Draws nothing."""

    def __getitem__(self, index):
        return torch.tensor([float(index)]), os.getpid()


class Seldom(Noisy):
    """Draws for some samples only, and not for the first ones."""

    def __getitem__(self, index):
        return torch.tensor([float(index), float(torch.rand(())) if index % 7 == 6 else 0.0]), os.getpid()


class Many(Noisy):
    """Makes many samples at once, with draws for all of them."""

    def __getitems__(self, indices):
        draws = torch.rand(len(indices), dtype=torch.float64)
        return [
            (torch.stack([torch.tensor(float(i)).double(), draw]), os.getpid()) for i, draw in zip(indices, draws, strict=True)
        ]


class Troubled(Noisy):
    """Something happens at index 40."""

    def __init__(self, trouble, size=64):
        super().__init__(size)
        self.trouble = trouble

    def __getitem__(self, index):
        if index == 40:
            if self.trouble == "raise":
                raise ValueError("a bad sample")
            if self.trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "exit":
                os._exit(3)
            time.sleep(10_000)
        return super().__getitem__(index)


def noise(batch):
    """A transform of a whole batch, which draws from all generators."""
    values, pids = batch
    drawn = torch.rand(values.shape, dtype=torch.float64)
    return values + drawn * np.random.rand() * random.random(), pids


def double(batch):
    """A transform that draws nothing."""
    values, pids = batch
    return values * 2, pids
