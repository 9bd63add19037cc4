"""One contender: `python -m benchmarks.run CONTENDER WORKLOAD...` prints one line of JSON for each workload.

The framework is imported once, which is timed, and each workload then runs in a process of its own, forked from there:
as good as a fresh process (no tensor has been computed before the fork), without paying for the imports four times.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import WORKLOADS, Data, Job, Workload

WARMUP_BATCHES, WARMUP_EPOCHS = 4, 2
Prepare = Callable[[Job], Callable[[], dict[str, float]]]


def make_job(work: Workload, data: Data, *, warmup: bool = False) -> Job:
    """Make a run from the workload's initial weights; for the warm-up a throwaway one of a few steps."""
    torch.manual_seed(0)
    model = work.model()
    train, validation = data
    if warmup:
        count = WARMUP_BATCHES * work.batch_size
        train = (train[0][:count], train[1][:count])
    return Job(work, model, train, validation, WARMUP_EPOCHS if warmup else work.epochs)


@torch.inference_mode()
def judge(job: Job) -> tuple[float, float]:
    """Return loss and accuracy of the final weights over the training set, in evaluation mode."""
    job.model.eval()
    x, y = job.train
    logits = torch.cat([job.model(part) for part in x.split(1024)])
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def peak_mib() -> float:
    """Return the peak resident memory of this process; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


def measure(prepare: Prepare, work: Workload) -> dict[str, object]:
    """Warm up, train with the clock running, judge."""
    data = work.data()
    # Frameworks import and register lazily, and the allocator has to grow: none of it is the cost of a step.
    warmup_started = time.perf_counter()
    prepare(make_job(work, data, warmup=True))()
    warmup_seconds = time.perf_counter() - warmup_started

    job = make_job(work, data)
    fit = prepare(job)
    gc.collect()
    started, cpu = time.perf_counter(), time.process_time()
    tracked = fit()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    peak = peak_mib()

    steps = work.epochs * len(job.train[0]) // work.batch_size
    loss, accuracy = judge(job)
    return {
        "steps": steps, "seconds": seconds, "us_per_step": seconds / steps * 1e6,
        "cpu_seconds": cpu_seconds, "cpu_us_per_step": cpu_seconds / steps * 1e6,
        "final_loss": loss, "final_accuracy": accuracy, "tracked": tracked, "peak_mib": peak,
        "warmup_seconds": warmup_seconds,
    }  # fmt: skip


def in_child(action: Callable[[], None]) -> int:
    """Fork, do the action there, and return the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        action()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # none of the exit handlers that frameworks registered in the parent


def main() -> None:
    """Import, then run each workload; lines go to a file where the terminal is taken by a progress bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--out", type=Path, help="append the lines to this file instead of printing them")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    started = time.perf_counter()
    prepare = importlib.import_module(f"benchmarks.contenders.{arguments.contender}").prepare
    import_seconds = time.perf_counter() - started
    # torch imports torch._dynamo with the first optimizer, a second: here, not once a workload
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    def run(name: str) -> None:
        line = json.dumps(
            {"contender": arguments.contender, "workload": name, "torch": torch.__version__}
            | {"import_seconds": import_seconds}
            | measure(prepare, WORKLOADS[name])
        )
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(line + "\n")
        else:
            print(line)

    failed = [name for name in arguments.workloads if in_child(lambda name=name: run(name))]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
