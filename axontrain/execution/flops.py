"""FLOPs: how many floating-point operations training takes, counted from what is dispatched."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from axontrain import randomness
from axontrain.execution import copying
from axontrain.execution.microbatches import Cut, out_of_memory
from axontrain.execution.precision import AUTOCAST
from axontrain.objective import Objective, batch_size, total
from axontrain.state import LoopState


def per_sample(state: LoopState, batch: Any) -> float:
    """FLOPs of forward and backward, for each sample of a batch.

    They are counted on a copy of the objective: it, its gradients, the batch and the random generators are as before. Of a
    batch that is computed in parts the first part is taken; where memory runs out, half of it, and so on.

    Args:
        state: of a fit, for its objective, its precision, and how its batches are cut.
        batch: as ``train_step`` gets it.
    """
    size = state.setup.get("microbatch")
    part = Cut(size if isinstance(size, int) else None)(batch)[0]
    while True:
        samples = batch_size(part)
        try:
            return _counted(state, part) / samples
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or samples < 2:
                raise
        part = Cut(-(-samples // 2))(part)[0]


def _counted(state: LoopState, batch: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    objective: Objective = state.objective  # type: ignore[assignment]  # checked by the Loop
    # What there is to warn of, the step itself warns of.
    with randomness.kept(), copying.untouched(objective), _uncompiled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied, batch = copying.copied(objective), copy.deepcopy(batch)
        for parameter in copied.parameters():
            parameter.grad = None
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            for loss, inputs in _losses(copied, batch, state):
                loss.backward(inputs=inputs)  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops())


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What is compiled is computed operation by operation in the block, since nobody sees what a compiled one does."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _losses(objective: Objective, batch: Any, state: LoopState) -> Iterator[tuple[Tensor, list[Tensor] | None]]:
    """Each loss of a step, and of which parameters the gradients are wanted; None: of all."""
    precision = state.history.precision

    def computing() -> contextlib.AbstractContextManager[Any]:
        device = next((parameter.device.type for parameter in objective.parameters()), "cpu")
        return torch.autocast(device, AUTOCAST[precision]) if precision in AUTOCAST else contextlib.nullcontext()

    if not inspect.isgeneratorfunction(objective.train_step):
        with computing():
            step: Any = objective.train_step(batch)
        yield step.loss, None
        return
    parameters = dict(objective.named_parameters())
    losses: Any = objective.train_step(batch)
    while True:
        try:
            with computing():
                name, loss = next(losses)
        except StopIteration:
            return
        inputs: list[Tensor] = [parameters[of] for of in state.optimizers[name].parameters if parameters[of].requires_grad]
        if inputs:
            yield loss if isinstance(loss, Tensor) else total(loss, objective), inputs
