"""Audit: what a training step costs, in numbers that are the same on any machine, and which lines make it wait."""

from __future__ import annotations

import contextlib
import copy
import html
import math
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from axontrain import randomness
from axontrain.callback import Callback, stateful
from axontrain.data.loader import Loader
from axontrain.data.protocol import is_dataset
from axontrain.data.stream import Stream
from axontrain.data.structure import is_record, to_device
from axontrain.errors import AxonWarning, ConfigurationError, kind_of, whole
from axontrain.execution import compiled
from axontrain.execution.copying import copied, shared, untouched
from axontrain.execution.run import Run
from axontrain.loop import Loop
from axontrain.objective import TaskBatch
from axontrain.start import check_ready

WARM_UP = 5  # steps in which optimizers and metrics make their states, and what is compiled is


@dataclass(frozen=True, slots=True)
class HostRead:
    """One place at which Python waits until the device has caught up.

    Attributes:
        what: "item" (of ``.item()``, ``bool``, ``int``, ``float`` and formats too), "tolist", "numpy", "cpu", "print",
            "nonzero", "unique", "mask index", "one_hot" (that was not told of how many), "copy to the host", ...;
            ", in backward" where autograd does it.
        line: "file:line: source" of the user's code; of the library's where none of the user's is on the way.
        within: the library's line, where the user's calls it, and that reads; else "".
        per_step: how often, a step.
    """

    what: str
    line: str
    within: str
    per_step: float

    def __str__(self) -> str:
        return f"{_number(self.per_step)} × {self.what}, at {self.line}{self.within and f' (in {self.within})'}"


@dataclass(frozen=True, slots=True, repr=False)
class Audit:
    """What one training step costs: each number is per step, the mean over ``steps`` of them.

    Attributes:
        steps: how many were counted.
        reads: the host reads, each place once, the most frequent first.
        calls: of functions written in Python, whoever's; a comprehension is none.
        own_calls: those of them that are axontrain's.
        builtin_calls: of compiled functions, from Python.
        frames: of axontrain, between ``fit`` (counted) and the deepest ``Tensor.backward``.
        operators: of torch, below autograd: forward, backward, update and metrics. A fused one counts once.
        copies, copied_bytes: the operators that copy a tensor (``clone``, ``contiguous``, to another dtype or device); bytes.
        allocations, allocated_bytes: new memory that operators' results lie in, and bytes; not what a kernel needs meanwhile.
        cuda_allocations, cuda_allocated_bytes: what torch's allocator gave out on the GPU; None elsewhere.
        recompilations: graphs that ``torch.compile`` made in steps that come after the first ones: 0 is right.
        graph_breaks: met while something was compiled, over all steps and not per step; what was compiled before is not seen.
        notes: what could not be looked at.
    """

    steps: int
    reads: tuple[HostRead, ...]
    calls: float
    own_calls: float
    builtin_calls: float
    frames: int
    operators: float
    copies: float
    copied_bytes: float
    allocations: float
    allocated_bytes: float
    cuda_allocations: float | None = None
    cuda_allocated_bytes: float | None = None
    recompilations: float = 0
    graph_breaks: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def host_reads(self) -> float:
        """How often the host reads, or waits to: 0 is right."""
        return sum(read.per_step for read in self.reads)

    def __repr__(self) -> str:
        return f"<Audit {self}>"

    def __str__(self) -> str:
        own, builtin = _number(self.own_calls), _number(self.builtin_calls)
        rows: list[tuple[str, float | None, str]] = [
            ("host reads", self.host_reads, ""),
            *(("", None, str(read)) for read in self.reads),
            ("Python calls", self.calls, f"of them {own} axontrain's; {builtin} builtin"),
            ("frames", self.frames, "of axontrain, from fit to backward"),
            ("operators", self.operators, ""),
            ("copies", self.copies, f"{_number(self.copied_bytes)} bytes"),
            ("allocations", self.allocations, f"{_number(self.allocated_bytes)} bytes"),
        ]
        if self.cuda_allocations is not None and self.cuda_allocated_bytes is not None:
            rows.append(("  on the GPU", self.cuda_allocations, f"{_number(self.cuda_allocated_bytes)} bytes"))
        breaks = f"{self.graph_breaks} graph break{'s' if self.graph_breaks > 1 else ''} in all" if self.graph_breaks else ""
        rows.append(("recompilations", self.recompilations, breaks))
        numbers = [("" if value is None else _number(value)) for _, value, _ in rows]
        width = max(map(len, numbers))
        lines = [
            f"  {name:14}  {number:>{width}}  {told}".rstrip() if name else f"      {told}"
            for (name, _, told), number in zip(rows, numbers, strict=True)
        ]
        return "\n".join([f"audit: a step of {self.steps}", *lines, *(f"  · {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def audit(
    loop: Loop,
    batch: Any,
    *,
    steps: int = 5,
    microbatch: int | str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Audit:
    """Count what a training step costs: host reads with the lines that make them, calls, operators, copies, allocations.

    A copy of the objective is trained on the batch as ``fit`` does it, from the batch to the asking for the next one, after a
    few steps of warm-up: once counting calls, once counting the rest. Nothing of the loop is changed, nor what the objective's
    code keeps elsewhere, as in global variables; the random generators are as before. It takes the memory of another
    objective with its optimizers, and the time of ``2 * (steps + 6)`` steps. Not in it are loading and moving the batch,
    readings, validation and saving, and what happens seldom within a step, as the folding of losses every 256.

    On the CPU it shows what would wait on a GPU. What an operator does within itself is not seen, nor is code within a compiled
    graph: of that ``operators``, ``copies``, ``allocations`` and ``reads`` are those of the same code uncompiled.

    Args:
        loop: whose objective, optimizers, metrics and precision.
        batch: as ``train_step`` gets it, on any device.
        steps: how many are counted.
        microbatch: as ``fit`` takes it.
        callbacks: whose hooks count too. They are called as in a ``fit`` and are not copied: what they write is written, what
            they save of themselves is put back. The loop's own are left out unless they are given here; those that save, write
            or wait for a validation have nothing to do in it.

    Returns:
        The :class:`Audit`; print it.

    Raises:
        ConfigurationError: for what is no Loop, no batch, or an objective that cannot be copied; if a callback ends the run.
        OptimizerError: if there is no optimizer, or a trainable parameter that none covers.

    >>> import axontrain as ax
    >>> class Told(ax.Objective):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net, self.sum = torch.nn.Linear(2, 1), 0.0
    ...
    ...     def predict(self, x):
    ...         return self.net(x)
    ...
    ...     def loss(self, predictions, targets):
    ...         loss = (predictions - targets).square().mean()
    ...         self.sum += loss.item()
    ...         return loss
    >>> loop = ax.Loop(Told(), ax.Optimizer("sgd", lr=0.1), device="cpu", progress=False)
    >>> found = ax.audit(loop, (torch.ones(4, 2), torch.zeros(4, 1)))
    >>> found.host_reads, found.frames, loop.state.step
    (1, 3, 0)
    >>> print(found.reads[0].what, found.reads[0].line.rpartition(": ")[2])
    item self.sum += loss.item()
    """
    from axontrain.execution.counting import Calls, Operations  # dispatch modes, which take torch 90 ms to set up

    if not isinstance(loop, Loop):
        hint = " (a class: call it)" if isinstance(loop, type) else ""
        raise ConfigurationError(f"audit({kind_of(loop)}, ...){hint}: the Loop, and a batch as its train_step gets it")
    _check_batch(batch)
    whole("steps", steps)
    check_ready(loop.state)
    with randomness.kept(), untouched(loop.objective) as around:
        batch = to_device(copy.deepcopy(batch), loop.device)
        batch = loop.precision.batch(batch) if loop.precision.converts else batch
        like, notes = _copy(loop, callbacks)
        notes += shared(around, like.objective)
        breaks, calls, operations = compiled.breaks(), Calls(), Operations(loop.device)
        with _kept(callbacks), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "average=", AxonWarning)  # of what the copy has not reached
            plain = like.run(_Batches(batch, steps, calls, loop.device), microbatch)
            breaks = compiled.breaks() - breaks
            with compiled.uncompiled(), _traced():
                like.run(_Batches(batch, steps, operations, loop.device), microbatch)

    notes += [around.left] if around.left else []
    if plain.graphs:
        notes.append("torch compiled anew in the steps that were counted: of the calls most are its compiler's")

    def mean(count: int) -> float:
        return count // steps if count % steps == 0 else count / steps

    on_gpu = loop.device.type == "cuda"
    return Audit(
        steps,
        tuple(HostRead(*place, mean(count)) for place, count in operations.reads.most_common()),
        mean(calls.python),
        mean(calls.own),
        mean(calls.builtin),
        calls.frames,
        mean(operations.operators),
        mean(operations.copies),
        mean(operations.copied_bytes),
        mean(operations.allocations),
        mean(operations.allocated_bytes),
        mean(plain.allocations) if on_gpu else None,
        mean(plain.allocated_bytes) if on_gpu else None,
        mean(plain.graphs),
        breaks,
        tuple(notes),
    )


class _Copy(Loop):
    """A loop like the user's, that trains on the batches it is given and reads nothing meanwhile."""

    batches: _Batches

    def run(self, batches: _Batches, microbatch: int | str | None) -> _Batches:
        """Train on the batches.

        Raises:
            ConfigurationError: if a callback ended it before they were through.
            KeyboardInterrupt: if Ctrl-C did.
        """
        self.batches = batches
        length = batches.steps + WARM_UP + 1
        result = self.fit([batches.batch] * (length + 1), steps=length, microbatch=microbatch)
        if result.status == "interrupted":
            raise KeyboardInterrupt
        if not batches.through:
            raise ConfigurationError(
                f"audit(..., callbacks=...): the run was {result.status} at step {result.step} of {length} ({result.reason}), "
                f"so nothing can be said of a step: leave that callback out"
            )
        return batches

    def _run(self, *fit: Any) -> Run:
        run = super()._run(*fit)
        run.train, run.next_reading = self.batches, math.inf  # else how slow it is would decide what is counted
        return run


class _Batches(Stream):
    """One batch again and again: after a warm-up, what is done with each of so many is counted."""

    def __init__(self, batch: Any, steps: int, counting: Any, device: torch.device) -> None:
        super().__init__([batch], "batch", strict=False)
        self.batch, self.steps, self.counting, self.on = batch, steps, counting, device
        self.graphs = self.allocations = self.allocated_bytes = 0
        self.through = False
        self._given = self._counted()

    @property
    def of_one_task(self) -> bool:
        return not isinstance(self.batch, TaskBatch)

    def batches(self, seed: int, epoch: int, start: int = 0, step: int | None = None) -> Iterator[Any]:
        return self._given

    def close(self) -> None:
        self._given.close()  # a step that fails while it is counted leaves the generator where it is

    def again(self, seed: int, epoch: int, index: int, step: int) -> Any:
        return copy.deepcopy(self.batch)

    def _counted(self) -> Generator[Any, None, None]:
        for _ in range(WARM_UP):
            yield copy.deepcopy(self.batch)  # what a step does to it in place is not to reach the next
        for _ in range(self.steps):
            fresh, graphs, memory = copy.deepcopy(self.batch), compiled.graphs(), _memory(self.on)
            with self.counting:
                yield fresh
            after = _memory(self.on)
            self.graphs += compiled.graphs() - graphs
            self.allocations += after[0] - memory[0]
            self.allocated_bytes += after[1] - memory[1]
        self.through = True
        yield copy.deepcopy(self.batch)


def _check_batch(batch: Any) -> None:
    asked = f"audit(loop, {kind_of(batch)}): one batch, as train_step gets it"
    if isinstance(batch, (Loader, DataLoader)):
        raise ConfigurationError(f"{asked}: next(iter(loader))")
    structured = isinstance(batch, (Tensor, tuple, list, Mapping)) or is_record(batch)
    own = isinstance(batch, TorchDataset) or hasattr(batch, "gather")  # one of torch's, or of ours
    if not structured and (own or (is_dataset(batch) and not hasattr(batch, "to"))) and not isinstance(batch, (str, bytes)):
        raise ConfigurationError(f"{asked}; of a dataset next(iter(ax.Loader(dataset, 32)))")
    if isinstance(batch, Iterator):
        raise ConfigurationError(f"{asked}; of an iterator next(batches)")
    if batch is None or isinstance(batch, (str, bytes, int, float, type)):
        raise ConfigurationError(f"{asked}, as a pair of tensors")


def _copy(loop: Loop, callbacks: Sequence[Callback]) -> tuple[_Copy, list[str]]:
    with loop.state.training_weights():  # a fit that is over has left averages of them in the module, where there are any
        try:
            objective = copied(loop.objective)
        except Exception as error:
            raise ConfigurationError(
                f"audit(loop, ...) trains a copy of the objective, and {type(loop.objective).__name__} cannot be copied: "
                f"{type(error).__name__}: {error}"
            ) from error
    for parameter in objective.parameters():
        parameter.grad = None
    notes = [
        f"{name or 'the objective'} was compiled in place, by .compile(), which a copy does not keep: this is of it uncompiled"
        for name, module in loop.objective.named_modules()
        if module._compiled_call_impl is not None
    ]
    if loop.graph:
        notes.append(f"graph={loop.graph!r}: this is of a step done kernel by kernel; a replay starts all of them at once")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AxonWarning)  # they were given when the loop was made
        like = _Copy(
            objective,
            loop.optimizers,
            metrics=loop.metrics,
            callbacks=callbacks,
            seed=loop.state.seed,
            device=loop.device,
            strict=False,
            precision=loop.precision.name,
            channels_last=loop.precision.channels_last,
            compile=loop.compiles,
            progress=False,
        )
    return like, notes


@contextlib.contextmanager
def _kept(callbacks: Sequence[Callback]) -> Iterator[None]:
    """What callbacks remember is as it was after the block; an error of one says whose it is."""
    parts = stateful(callbacks).values()
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    try:
        yield
    except ConfigurationError as error:
        if callbacks and not str(error).startswith("audit("):
            error.add_note("audit(..., callbacks=...): leave those out that save, write, or wait for a validation")
        raise
    finally:
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    """Have autograd note, for the block, which line of the forward pass each operation of backward is of."""
    before, check = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(before, check_nan=check)


def _memory(device: torch.device) -> tuple[int, int]:
    """What torch's allocator has given out on a GPU so far: how often, and bytes."""
    if device.type != "cuda":
        return 0, 0
    stats = torch.cuda.memory_stats(device)
    return stats["allocation.all.allocated"], stats["allocated_bytes.all.allocated"]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
