"""What splitting batches, updating within backward, and averaging weights cost or save in memory, beside the same by hand.

`python -m benchmarks.memory` (about a minute on two cores; on a GPU where there is one).

Each run is a process of its own; what is counted is its peak during training less what it held after its imports: resident
memory on the CPU, what torch had allocated on a GPU. So that what was freed does not count on the CPU, glibc is told to give it
back to the system at once. The losses of the last step are printed too: the same training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import axontrain as ax
from benchmarks import report
from benchmarks.run import peak_mib

STEPS = 4
LR = 1e-4
DEEP = {"width": 512, "layers": 16, "batch": 8192}  # activations are most of it
WIDE = {"width": 2048, "layers": 12, "batch": 16}  # parameters are
PARTS = 8
DECAY = 0.999
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # bytes; once set, it does not grow with what was freed


class Net(ax.Objective):
    """Square layers and rectifiers."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())))

    def predict(self, inputs: Tensor) -> Tensor:
        """Map (B, width) to (B, width)."""
        outputs: Tensor = self.net(inputs)
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(outputs, targets)


Batches = list[tuple[Tensor, Tensor]]
Train = Callable[[Net, Batches], float]


def by_hand(objective: Net, batches: Batches, parts: int = 1, average: bool = False) -> float:
    """A loop over batches, in parts where there is more than one."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LR, fused=True)
    averaged = AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(DECAY)) if average else None
    for inputs, targets in batches:
        total = torch.zeros((), device=inputs.device)
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            loss = objective.loss(objective.predict(x), y) / parts
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if averaged is not None:
            averaged.update_parameters(objective)
    return total.item()


def by_hand_in_backward(objective: Net, batches: Batches) -> float:
    """An optimizer for each parameter, stepped by a hook on it: torch's tutorial."""
    optimizers = {p: torch.optim.AdamW([p], lr=LR, fused=True) for p in objective.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in objective.parameters():
        p.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    for inputs, targets in batches:
        loss = objective.loss(objective.predict(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def by_axontrain(objective: Net, batches: Batches, microbatch: int | None = None, **options: object) -> float:
    """The same by a Loop."""
    losses: list[Tensor] = []
    loop = ax.Loop(objective, ax.Optimizer("adamw", lr=LR, **options), progress=False)  # type: ignore[arg-type]
    for step in loop.steps(batches, epochs=1, microbatch=microbatch):
        losses[:] = [step.loss]
    return losses[0].item()


CASES: dict[str, tuple[dict[str, int], dict[str, Train]]] = {
    "whole batches": (DEEP, {"by hand": by_hand, "axontrain": by_axontrain}),
    f"in {PARTS} parts": (
        DEEP,
        {
            "by hand": lambda objective, batches: by_hand(objective, batches, PARTS),
            "axontrain": lambda objective, batches: by_axontrain(objective, batches, DEEP["batch"] // PARTS),
        },
    ),
    "updates after backward": (WIDE, {"by hand": by_hand, "axontrain": by_axontrain}),
    "updates within backward": (
        WIDE,
        {
            "by hand": by_hand_in_backward,
            "axontrain": lambda objective, batches: by_axontrain(objective, batches, in_backward=True),
        },
    ),
    "moving average": (
        WIDE,
        {
            "by hand": lambda objective, batches: by_hand(objective, batches, average=True),
            "axontrain": lambda objective, batches: by_axontrain(objective, batches, average=ax.averages.ema(DECAY)),
        },
    ),
}


def one(case: str, contender: str) -> dict[str, float]:
    """Train in this process; MiB at the peak, and the last loss."""
    sizes, contenders = CASES[case]
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by_axontrain(Net(2, 1).to(device), [(torch.ones(2, 2), torch.ones(2, 2))])  # imports what is imported when it is used
    before = 0.0 if device.type == "cuda" else resident()
    torch.manual_seed(0)
    objective = Net(sizes["width"], sizes["layers"]).to(device)
    shape = (sizes["batch"], sizes["width"])
    batches = [(torch.randn(shape, device=device), torch.randn(shape, device=device)) for _ in range(STEPS)]
    loss = contenders[contender](objective, batches)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mib()
    return {"mib": peak - before, "loss": loss}


def resident() -> float:
    """MiB that this process holds in memory just now (of /proc, so on Linux alone)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "CONTENDER"), help="what the processes of a run are called with")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one)))
        return
    body = []
    for case, (_, contenders) in CASES.items():
        found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name in contenders:
                command = [sys.executable, "-m", "benchmarks.memory", "--one", case, name]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | AT_ONCE)
                found[name].append(json.loads(run.stdout))
        hand = median(run["mib"] for run in found["by hand"])
        ratios = [ours["mib"] / theirs["mib"] for ours, theirs in zip(found["axontrain"], found["by hand"], strict=True)]
        losses = [found[name][0]["loss"] for name in contenders]
        body.append(
            [
                case,
                f"{hand:.0f}",
                f"{median(run['mib'] for run in found['axontrain']):.0f}",
                f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                f"{losses[0]:.6f}" if abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0]) else f"differ: {losses}",
            ]
        )
    print(f"{report.heading('memory', f'torch {torch.__version__}', f'rounds: {given.rounds}; medians.')}\n")
    print(report.table(["case", "by hand MiB", "axontrain MiB", "ratio", "loss of both"], body, markdown=given.markdown))


if __name__ == "__main__":
    main()
