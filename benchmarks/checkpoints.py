"""What saving costs: how long a step waits for it, and how much slower training is while another process writes.

`python -m benchmarks.checkpoints` (a state of 1 GB; the disk is that of --directory).

All runs in one process. A round goes through all contenders in an order of its own, and trains the same model a few steps
before, so that each finds the memory alike. The stall is how much longer the step with the save took than the median of those
before it; the ratio is taken within a round. ``torch.save`` writes the state of the model and of the optimizer to one file and
syncs it: it keeps no sums, and a kill in the middle of it destroys what was there.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import axontrain as ax
from benchmarks import report

WIDTH = 2048
QUIET = 8  # steps before a save
Measured = tuple[float, float, float]  # seconds: the stall; until it was written; a step meanwhile, over one before


class Wide(ax.Objective):
    """Square layers without biases: so many parameters, and three times that with AdamW."""

    def __init__(self, gigabytes: float) -> None:
        super().__init__()
        layers = max(1, round(gigabytes * 1e9 / (3 * 4 * WIDTH**2)))
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))

    def predict(self, inputs: Tensor) -> Tensor:
        """Map (B, WIDTH) to (B, WIDTH)."""
        outputs: Tensor = self.net(inputs)
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(outputs, targets)


def by_axontrain(objective: Wide, data: ax.ArrayDataset, where: Path, *, asynchronous: bool) -> Measured:
    """One checkpoint amid training, after one that is not counted: that asks the system for the memory."""
    asked: list[bool] = []
    saving = ax.Checkpoint(every=lambda state: bool(asked and asked.pop()), keep_last=1, asynchronous=asynchronous)
    loop = ax.Loop(objective, ax.Optimizer("adamw", lr=1e-6), callbacks=[saving], directory=where, progress=False)
    clock = _Clock(loop.steps(data, steps=10**9, batch_size=4))
    for _ in range(2):
        while saving.writing:
            clock.step()
        quiet = median([clock.step() for _ in range(QUIET)][2:])
        asked.append(True)
        first = clock.step()  # it is saved between the steps, which belongs to the later
        meanwhile = []
        while saving.writing:
            meanwhile.append(clock.step())
    clock.steps.close()
    slower = median(meanwhile) / quiet if meanwhile else 1.0
    return first - quiet, first + sum(meanwhile), slower


class _Clock:
    """The seconds of each step; what is done between two steps belongs to the later."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps
        self.since = time.perf_counter()

    def step(self) -> float:
        next(self.steps)
        since, self.since = self.since, time.perf_counter()
        return self.since - since


def by_torch_save(objective: Wide, data: ax.ArrayDataset, where: Path) -> Measured:
    """The same state by torch.save, synced."""
    loop = ax.Loop(objective, ax.Optimizer("adamw", lr=1e-6), progress=False)
    loop.fit(data, steps=QUIET, batch_size=4)
    where.mkdir()
    since = time.perf_counter()
    with (where / "state.pt").open("wb") as file:
        optimizers = [o.state_dict() for o in loop.state.optimizers["main"].optimizers]
        torch.save({"model": objective.state_dict(), "optimizers": optimizers}, file)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - since
    return took, took, 1.0


def measured(gigabytes: float, rounds: int, directory: Path, seed: int) -> list[list[str]]:
    """Rows: a contender, its stall in seconds, the ratio to torch.save, until it was written, a step meanwhile."""
    torch.manual_seed(0)
    objective = Wide(gigabytes)
    inputs = torch.randn(8, WIDTH)
    data = ax.ArrayDataset(inputs, inputs)
    contenders: dict[str, Callable[[Path], Measured]] = {
        "torch.save, fsync": lambda where: by_torch_save(objective, data, where),
        "axontrain, asynchronous": lambda where: by_axontrain(objective, data, where, asynchronous=True),
        "axontrain, waited for": lambda where: by_axontrain(objective, data, where, asynchronous=False),
    }
    found: dict[str, list[Measured]] = {name: [] for name in contenders}
    order = random.Random(seed)
    for number in range(rounds + 1):
        for name in order.sample(sorted(contenders), len(contenders)):
            where = Path(tempfile.mkdtemp(dir=directory)) / "run"
            one = contenders[name](where)
            shutil.rmtree(where.parent)
            if number:  # the first round warms up
                found[name].append(one)
    rows = []
    for name, all_of in found.items():
        ratios = [one[0] / other[0] for one, other in zip(all_of, found["torch.save, fsync"], strict=True)]
        rows.append(
            [
                name,
                *(_spread([one[0] for one in all_of], 3), _spread(ratios, 2)),
                *(_spread([one[1] for one in all_of], 2), _spread([one[2] for one in all_of], 2)),
            ]
        )
    return rows


def _spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary directory unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as temporary:
        rows = measured(given.gigabytes, given.rounds, Path(temporary), given.seed)
    about = f"torch {torch.__version__}", f"state: {given.gigabytes:g} GB", f"rounds: {given.rounds}; median (range)."
    print(f"{report.heading('checkpoints', *about)}\n")
    header = ["contender", "stall, s", "over torch.save", "until written, s", "a step meanwhile, over before"]
    print(report.table(header, rows, markdown=given.markdown))


if __name__ == "__main__":
    main()
