"""What a very long run keeps, and whether its steps become slower: memory by steps, the last steps beside the first.

`python -m benchmarks.long_run --steps 1000000` (about five minutes on two cores; one thread is used).

One process under a terminal of its own, one fit: Linear(32, 2), batches of 32, SGD, with accuracy, a progress bar, a history of
each epoch and of the learning rate every 1,000 steps, and a validation at each end of an epoch of 10,000 steps. Memory is what
is resident after a collection of garbage, at the end of an epoch; beside it stand the blocks that Python holds and the rows of
the history, which no allocator blurs. A time cannot be taken side by side with what was a million steps ago, so a loop by hand
stands beside both: of the 10,000 steps after the first epoch, which warms up, and of the last 10,000, each thousand is followed
by a thousand of that loop. What is counted is the time of the CPU, which on a quiet machine is that on the wall; "over the
first" is the ratio of the ratios, free of what the machine did meanwhile. The loop by hand trains the same on the same data;
its final loss has to be the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch.nn import functional as F

import axontrain as ax
from benchmarks import report
from benchmarks.contenders.axontrain import Classifier
from benchmarks.memory import resident
from benchmarks.processes import in_terminal

FEATURES, BATCH, LR = 32, 32, 0.05
EPOCH = 10_000  # steps
CHUNK = 1_000  # steps that take their turn
CHUNKS = 10  # after the first epoch, and as many at the end
HELD_OUT = 100  # batches
MOST_MB = 5.0  # of growth, after the first epoch
TOLERANCE = 0.01  # of losses, relative: both have long come to the floor that random labels leave
MOMENTS_OF_PATIENCE = 5e-3  # seconds a step, after which the run counts as hanging

Pair = tuple[torch.Tensor, torch.Tensor]


def data(batches: int, seed: int) -> Pair:
    """Two classes split by a plane, one label in ten at random."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0))
    x = torch.randn(batches * BATCH, FEATURES, generator=generator)
    y = (x @ plane > 0).long()
    noise = torch.rand(len(y), generator=generator) < 0.1
    return x, torch.where(noise, torch.randint(2, y.shape, generator=generator), y)


def model() -> torch.nn.Module:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Linear(FEATURES, 2)


class ByHand:
    """The loop by hand, a chunk at a time: sums stay tensors, a validation begins each epoch but the first."""

    def __init__(self, train: Pair, held_out: Pair) -> None:
        self.net, self.held_out, self.steps = model(), held_out, 0
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LR)
        self.generator = torch.Generator().manual_seed(0)  # of its own: the fit beside it has the global one
        self._batches = self._forever(train)
        self._loss, self._correct = torch.zeros(()), torch.zeros((), dtype=torch.long)

    def chunk(self, steps: int) -> None:
        """Train for so many steps."""
        for _ in range(steps):
            x, y = next(self._batches)
            logits = self.net(x)
            loss = F.cross_entropy(logits, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self._loss.add_(loss.detach(), alpha=len(y))
            self._correct += (logits.argmax(1) == y).sum()
        self.steps += steps

    def _forever(self, train: Pair) -> Iterator[Pair]:
        x, y = train
        while True:
            for index in torch.randperm(len(x), generator=self.generator).split(BATCH):
                yield x.index_select(0, index), y.index_select(0, index)
            self._validate()

    @torch.inference_mode()
    def _validate(self) -> None:
        read = [self._loss.item(), self._correct.item()]
        self._loss.zero_(), self._correct.zero_()
        self.net.eval()
        for x, y in zip(*(part.split(BATCH) for part in self.held_out), strict=True):
            read.append(F.cross_entropy(self.net(x), y).item())
        self.net.train()


@torch.inference_mode()
def loss_of(net: torch.nn.Module, pair: Pair) -> float:
    """The mean loss over a set."""
    return F.cross_entropy(net(pair[0]), pair[1]).item()


class Watch(ax.Callback):
    """Measures from within the fit: memory at some ends of an epoch, times of chunks at its beginning and its end."""

    def __init__(self, by_hand: ByHand, marks: set[int], windows: dict[str, tuple[int, int]], chunk: int) -> None:
        super().__init__()
        self.by_hand, self.marks, self.windows, self.size = by_hand, marks, windows, chunk
        self.memory: list[dict[str, Any]] = []
        self.times: dict[str, list[tuple[float, float]]] = {name: [] for name in windows}  # ours, by hand
        self._since = 0.0

    def after_batch(self, state: ax.LoopState) -> None:
        """Time the chunk that ends here, and let the loop by hand have its turn."""
        if state.step % self.size:
            return
        took = process_time() - self._since
        for name, (first, last) in self.windows.items():
            if first < state.step <= last:
                begun = process_time()
                self.by_hand.chunk(self.size)
                self.times[name].append((took, process_time() - begun))
        self._since = process_time()

    def after_epoch(self, state: ax.LoopState) -> None:
        """Look at memory; the time that this takes is of no chunk."""
        if state.step in self.marks:
            begun = process_time()
            gc.collect()
            held = {"steps": state.step, "mb": resident() * 2**20 / 1e6}
            self.memory.append(held | {"blocks": sys.getallocatedblocks(), "rows": len(state.history)})
            self._since += process_time() - begun


def measure(steps: int, epoch: int = EPOCH, chunk: int = CHUNK, chunks: int = CHUNKS) -> dict[str, Any]:
    """Do the run in this process.

    Args:
        steps: of the whole run, a multiple of ``epoch``.
        epoch, chunk: steps.
        chunks: how many of them are timed after the first epoch, and at the end.
    """
    train, held_out = data(epoch, 1), data(min(HELD_OUT, epoch), 2)
    by_hand = ByHand(train, held_out)
    by_hand.chunk(chunk)  # has then what it needs in memory
    marks = {epoch * 10**power for power in range(12) if epoch * 10**power < steps} | {steps}
    # Not within the first epoch, where the other loop's turns would make time pass, and readings come, between fewer steps.
    windows = {"first": (epoch, epoch + chunk * chunks), "last": (steps - chunk * chunks, steps)}
    watch = Watch(by_hand, marks, windows, chunk)
    objective = Classifier(model())
    loop = ax.Loop(
        objective,
        ax.Optimizer("sgd", lr=LR),
        metrics=["accuracy"],
        callbacks=[ax.LearningRate(every=chunk), watch],
        device="cpu",
        seed=0,
    )
    begun = perf_counter()
    result = loop.fit(ax.ArrayDataset(*train), ax.ArrayDataset(*held_out), steps=steps, batch_size=BATCH)
    return {
        "steps": result.step,
        "seconds": perf_counter() - begun,
        "memory": watch.memory,
        "times": {name: [[1e6 * each / chunk for each in pair] for pair in pairs] for name, pairs in watch.times.items()},
        "losses": [loss_of(by_hand.net, train), loss_of(objective.model, train)],
    }


def memory_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for each look at memory."""
    first = found["memory"][0]
    return [
        [
            f"{at['steps']:,}",
            f"{at['mb']:.1f}",
            f"{at['mb'] - first['mb']:+.1f}",
            f"{(at['blocks'] - first['blocks']) / 1e3:+.1f}",
            f"{at['rows']:,}",
        ]
        for at in found["memory"]
    ]


def time_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for the first steps and one for the last."""
    ratios = {name: [ours / hand for ours, hand in pairs] for name, pairs in found["times"].items()}
    rows = []
    for name, pairs in found["times"].items():
        ours, hand = zip(*pairs, strict=True)
        share = median(ratios[name]) / median(ratios["first"])
        rows.append([name, f"{median(hand):.0f}", f"{median(ours):.0f}", _spread(ratios[name]), f"{share:.3f}"])
    return rows


def grown(found: dict[str, Any]) -> float:
    """MB more at the end than after the first epoch."""
    return float(found["memory"][-1]["mb"] - found["memory"][0]["mb"])


def same_losses(found: dict[str, Any]) -> bool:
    """Whether both ended at the same loss."""
    hand, ours = found["losses"]
    return math.isclose(hand, ours, rel_tol=TOLERANCE)  # False with NaN


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"


def in_its_terminal(steps: int) -> tuple[dict[str, Any], str]:
    """Do the run in a process of its own, whose progress bar has a terminal; what was measured, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.long_run", "--steps", str(steps), "--inside", str(out)]
        ended = in_terminal(command, timeout=60 + steps * MOMENTS_OF_PATIENCE)
        if ended.status or not out.exists():
            return {}, ended.tail.strip() or f"exit status {ended.status}, no output"
        return json.loads(out.read_text()), "" if ended.written else "its progress bar wrote nothing"


def main() -> int:
    """Measure, print two tables, and return 1 if memory has grown by 5 MB or more, or a run has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help=f"a multiple of {EPOCH:,}, from {3 * EPOCH:,} on")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--inside", type=Path, metavar="FILE", help="what the process of the run is called with")
    given = parser.parse_args()
    if given.steps % EPOCH or given.steps < 3 * EPOCH:
        parser.error(f"--steps {given.steps}: a multiple of {EPOCH}, from {3 * EPOCH} on")
    torch.set_num_threads(1)
    if given.inside:
        given.inside.write_text(json.dumps(measure(given.steps)))
        return 0
    found, failure = in_its_terminal(given.steps)
    if failure:
        print(failure, file=sys.stderr)
        return 1
    about = f"torch {torch.__version__}", "one thread used"
    print(f"{report.heading('long_run', *about)}; {found['seconds'] / 60:.1f} minutes.\n")
    header = ["after steps", "resident MB", "grown MB", "Python's blocks, thousands", "rows of history"]
    print(report.table(header, memory_rows(found), markdown=given.markdown))
    print(f"\n{CHUNKS} × {CHUNK:,} steps each, in turns; time of the CPU, medians, the ratio with its range.\n")
    header = ["steps", "by hand µs", "axontrain µs", "ratio (min–max)", "over the first"]
    print(report.table(header, time_rows(found), markdown=given.markdown))
    hand, ours = found["losses"]
    agree = "agree" if same_losses(found) else "differ"
    print(f"\nFinal losses: by hand {hand:.4f}, axontrain {ours:.4f}: they {agree}.")
    good = grown(found) < MOST_MB
    print(f"Growth: {grown(found):+.1f} MB, the goal is < {MOST_MB:g} MB: {'met' if good else 'missed'}.")
    return 0 if good and same_losses(found) else 1


if __name__ == "__main__":
    sys.exit(main())
