"""One contender in a process of its own: `python -m benchmarks.gpu.worker WORKLOAD CONTENDER`, which the command starts.

It does a turn for each line that it reads, the first of which warms up, and answers with a line of JSON; the line "end" has it
judge the trained weights and end. Between turns it does nothing, and gives the memory that it has cached back to the device,
so that those who wait take only what their networks and optimizers do.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.task import Given, Task, Workload
from benchmarks.gpu.workloads import WORKLOADS

SETTLING = 1  # epochs of each turn of a training that goes on, in which the allocator finds its memory again
END = "end"
Prepare = Callable[[Task], Callable[[], str | None]]


class Line:
    """The orders that come in, and the answers that go out; whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        self.orders = sys.stdin
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        sys.stdout.flush()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(self, **what: Any) -> None:
        self.answers.write(json.dumps(what) + "\n")
        self.answers.flush()

    def order(self) -> str:
        """The next; where nobody is there any more the process ends."""
        line = self.orders.readline()
        if not line:
            sys.exit("whoever gives the orders is gone")
        return line.strip()


class Device:
    """Waits for the device, and says what it has used."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def seconds(self) -> float:
        """The time, when the device has done all it was given."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def clear(self) -> None:
        """Give back what is cached, and begin to look for the peak anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """MiB of tensors, at most, since the last clearing; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else 0.0


def main() -> None:
    """Load, and do what is ordered."""
    arguments = _arguments()
    line, work = Line(), WORKLOADS[arguments.workload]
    given = Given(torch.device(arguments.device), arguments.small, arguments.cifar, arguments.text)
    if given.device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    contender = CONTENDERS[arguments.contender]
    prepare = importlib.import_module(f"benchmarks.gpu.contenders.{contender.module}").prepare
    options = contender.workloads[work.name]
    data = work.load(given)
    line.answer(torch=torch.__version__)

    def prepared(task: Task) -> Callable[[], str | None]:
        return prepare(task, **options)

    run = going_on if work.goes_on else afresh
    task, told = run(work, given, data, prepared, line, arguments.rounds)
    found = {}
    if work.goes_on:
        line.order()  # to end: there is no other left
        found = work.judge(task, data)
    line.answer(told=told or "", settings=settings(), **found)


def going_on(work: Workload, given: Given, data: Any, prepare: Prepare, line: Line, rounds: int) -> tuple[Task, str | None]:
    """One training without end, which stands still at some ends of epochs until the next turn is ordered."""
    device, epochs = Device(given.device), work.epochs(given)
    of_turn, done, started = SETTLING + epochs, 0, 0.0

    def wait() -> None:
        device.clear()
        line.order()

    def epoch_done(loss: float) -> None:
        nonlocal done, started
        now = device.seconds()
        if done == 0:
            line.answer(warm_up=now - started)
            wait()
        elif (at := (done - 1) % of_turn + 1) == SETTLING:
            started = device.seconds()
        elif at == of_turn:
            steps = epochs * task.batches
            line.answer(seconds=(now - started) / steps, turn=now - started, train_loss=loss, peak=device.peak())
            if done < rounds * of_turn:
                wait()
        done += 1

    line.order()
    started = device.seconds()
    task = work.task(data, given, 1 + rounds * of_turn, epoch_done)
    return task, prepare(task)()


def afresh(work: Workload, given: Given, data: Any, prepare: Prepare, line: Line, rounds: int) -> tuple[Task, str | None]:
    """One training from the beginning after another; the first, of one epoch, warms up."""
    device, turns = Device(given.device), 0
    ends: list[tuple[float, float]] = []

    def epoch_done(loss: float) -> None:
        ends.append((device.seconds(), loss))

    while line.order() != END:
        first, turns = turns == 0, turns + 1
        ends.clear()
        device.clear()
        begun = device.seconds()
        task = work.task(data, given, 1 if first else work.epochs(given), epoch_done)
        told = prepare(task)()
        trained = device.seconds()
        found = work.judge(task, data)
        judged = device.seconds()
        if first:
            line.answer(warm_up=judged - begun)
            continue
        # The first epoch has what a framework does before it, and is left out of an epoch's time, but not of all of it; what it
        # does after the last is left out of both.
        (one, _), (last, loss) = ends[0], ends[-1]
        found |= {"seconds": (last - one) / (len(ends) - 1), "turn": judged - begun, "whole": last - begun + judged - trained}
        line.answer(train_loss=loss, peak=device.peak(), **found)
    return task, told


def settings() -> dict[str, Any]:
    """What of torch's settings decides how fast kernels are: they have to be the same for all."""
    return {
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.conv.fp32_precision": torch.backends.cudnn.conv.fp32_precision,
        "cuda.matmul.fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--text", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
