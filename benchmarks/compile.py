"""What a step costs where it is compiled, in the steady state: by hand in eager, by hand as one graph, and `compile=True`.

`python -m benchmarks.compile` (about three minutes on two cores; one thread is used).

All train the workloads of `benchmarks.overhead` (W1, W2 and W4) in one process and take turns, one run of the workload each;
what compiles has compiled in a run before. The graph by hand is what torch's parts allow: `torch.func.grad_and_value` over
the model, torch's functional SGD or Adam on it, the learning rate a tensor, compiled with `fullgraph=True`; it has no guard
against what is not finite, which both of axontrain's have. Ratios are taken within a round, to the faster of the eager loops
by hand over tensors.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy
from torch.optim.adam import adam
from torch.optim.sgd import sgd

import axontrain as ax
from benchmarks import report
from benchmarks.contenders import tensors, tensors_fused
from benchmarks.contenders.axontrain import Classifier
from benchmarks.run import judge
from benchmarks.workloads import WORKLOADS, Job

HAND = ("by hand, tensors", "by hand, tensors, fused")


def graph_by_hand(job: Job) -> Callable[[], None]:
    """One graph of forward, backward and update, and sums that stay tensors."""
    model, work = job.model, job.work
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    state = {key: [torch.zeros_like(p) for p in parameters.values()] for key in ("mean", "square")}
    steps = [torch.zeros(()) for _ in parameters]
    rate = torch.tensor(work.lr)

    def step(
        parameters: dict[str, Tensor], state: dict[str, list[Tensor]], steps: list[Tensor], rate: Tensor, x: Tensor, y: Tensor
    ):
        def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            logits = functional_call(model, parameters, (x,))
            return cross_entropy(logits, y), logits

        gradients, (loss, logits) = grad_and_value(loss_of, has_aux=True)(parameters)
        live, grads = list(parameters.values()), [gradients[name] for name in parameters]
        if work.optimizer == "sgd":
            none = [None] * len(live)
            options = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
            sgd(live, grads, none, foreach=True, lr=rate, **options)
        else:
            options = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
            adam(live, grads, state["mean"], state["square"], [], steps, foreach=True, capturable=True, lr=rate, **options)
        return loss, (logits.argmax(1) == y).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    (x, y), size = job.train, work.batch_size

    @torch.no_grad()
    def run() -> None:
        for _ in range(job.epochs):
            model.train()
            loss_sum, correct = torch.zeros(()), torch.zeros((), dtype=torch.long)
            for index in torch.randperm(len(x)).split(size):
                loss, right = compiled(parameters, state, steps, rate, x.index_select(0, index), y.index_select(0, index))
                loss_sum.add_(loss, alpha=size)
                if work.accuracy:
                    correct += right
            loss_sum.item()
            correct.item()
            if job.validation is not None:
                validate(model, job)

    return run


@torch.inference_mode()
def validate(model: nn.Module, job: Job) -> None:
    """Loss and accuracy over the validation set, as the loops by hand take them."""
    model.eval()
    loss_sum, correct, (x, y) = torch.zeros(()), torch.zeros((), dtype=torch.long), job.validation
    for part, labels in zip(x.split(job.work.batch_size), y.split(job.work.batch_size), strict=True):
        logits = model(part)
        loss_sum.add_(cross_entropy(logits, labels), alpha=len(labels))
        correct += (logits.argmax(1) == labels).sum()
    loss_sum.item()
    correct.item()


def by_axontrain(job: Job, *, compiled: bool) -> Callable[[], None]:
    """A Loop."""
    work = job.work
    metrics = ["accuracy"] if work.accuracy else None
    optimizer = ax.Optimizer(work.optimizer, lr=work.lr)
    loop = ax.Loop(Classifier(job.model), optimizer, metrics=metrics, device="cpu", progress=False, compile=compiled)
    train = ax.ArrayDataset(*job.train)
    validation = None if job.validation is None else ax.ArrayDataset(*job.validation)

    def run() -> None:
        loop.fit(train, validation, epochs=job.epochs, batch_size=work.batch_size)
        assert not compiled or loop.report().how == "one graph", loop.report()

    return run


CONTENDERS: dict[str, Callable[[Job], Callable[[], object]]] = {
    HAND[0]: tensors.prepare,
    HAND[1]: tensors_fused.prepare,
    "by hand, one graph": graph_by_hand,
    "axontrain": lambda job: by_axontrain(job, compiled=False),
    "axontrain, compile=True": lambda job: by_axontrain(job, compiled=True),
}


def measure(name: str, rounds: int) -> list[list[str]]:
    """One workload's rows."""
    work = WORKLOADS[name]
    runs: dict[str, Callable[[], object]] = {}
    losses: dict[str, float] = {}
    for contender, prepare in CONTENDERS.items():
        torch.manual_seed(0)
        train, validation = work.data()
        job = Job(work, work.model(), train, validation, work.epochs)
        runs[contender] = prepare(job)
        runs[contender]()
        losses[contender] = judge(job)[0]
        job.model.train()
    steps = work.epochs * len(work.data()[0][0]) // work.batch_size
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    order = random.Random(0)
    for _ in range(rounds):
        turns = list(runs)
        order.shuffle(turns)
        for contender in turns:
            gc.collect()
            started = perf_counter()
            runs[contender]()
            times[contender].append((perf_counter() - started) / steps * 1e6)
    fastest = min(HAND, key=lambda contender: median(times[contender]))
    rows = []
    for contender, taken in times.items():
        shares = [a / b for a, b in zip(taken, times[fastest], strict=True)]
        same = abs(losses[contender] - losses[fastest]) <= work.tolerance * losses[fastest]
        loss = f"{losses[contender]:.4f}{'' if same else ' differs'}"
        spread = f"{median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})"
        rows.append([contender, f"{median(taken):.0f}", spread, loss])
    return rows


def main() -> None:
    """Print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workloads", nargs="+", choices=("W1", "W2", "W4"), default=["W1", "W2", "W4"])
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = f"torch {torch.__version__}", "one thread used", f"rounds: {given.rounds}; medians."
    print(report.heading("compile", *about))
    for name in given.workloads:
        title = f"{name}: {WORKLOADS[name].title}"
        print(f"\n{'**' + title + '**' if given.markdown else title}\n")
        header = ["contender", "µs/step", "ratio (min–max)", "final loss"]
        print(report.table(header, measure(name, given.rounds), markdown=given.markdown))


if __name__ == "__main__":
    main()
