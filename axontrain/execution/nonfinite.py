"""Where a NaN or an infinity came from: a batch computed once more, with every operation looked at.

Each operation is seen below autograd, in the forward pass and in the backward one. What is not finite is followed from the
operation that made it of finite numbers to the loss or a gradient, so that infinities that are meant, as those of a mask, are
no finding unless a NaN becomes of them. It reads each result on the host, and is for looking once.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from axontrain import randomness
from axontrain.data.structure import tensors
from axontrain.errors import kind_of
from axontrain.execution import modes
from axontrain.execution.compiled import uncompiled
from axontrain.execution.copying import copied, untouched
from axontrain.execution.lines import OWN, TORCH, written
from axontrain.execution.precision import Precision
from axontrain.objective import Accumulated, Objective, Step, total

GIVEN = 2**40  # added to the number of an origin that is a constant: told of only where nothing else is found
OWNER = "axontrain"  # the key in a node of autograd's graph, beside torch's own for tracebacks


@dataclass(frozen=True, slots=True)
class Origin:
    """The first thing that was not finite, of what made the loss or a gradient so.

    Attributes:
        phase: "batch" or "parameters", if it came in with them; "forward", or "backward".
        module: the path of the innermost module in whose computation it was; "" in the objective's own methods.
        operation: as torch names it: "aten.log", or in the backward pass "SqrtBackward0".
        tensor: its shape, dtype, how many values are not finite, and the index of the first of them.
        line: of the user's code in the forward pass, "file:line: source"; "" where all of it is torch's.
    """

    phase: str
    module: str
    operation: str
    tensor: str
    line: str = ""

    def __str__(self) -> str:
        if self.phase in ("batch", "parameters"):
            what = f"in {self.operation} of the batch" if self.phase == "batch" else f"in the parameter {self.operation}"
            return f"{what}: {self.tensor}"
        within = f", in {self.module}" if self.module else ""
        return f"in {self.operation} of the {self.phase} pass{within}{self.line and f', at {self.line}'}: {self.tensor}"


def replay(objective: Objective, batch: Any, precision: Precision) -> Origin | None:
    """Compute the losses and gradients of a batch on a copy of the objective, and tell what was first not finite.

    The objective, its gradients and the random generators are as before; None if everything was finite.
    """
    with randomness.kept(), untouched(objective), precision.settings(), uncompiled():
        trial = copied(objective)
        for parameter in trial.parameters():
            parameter.grad = None
        with modes.training(trial), torch.enable_grad():
            for one in batch.batches if isinstance(batch, Accumulated) else (batch,):
                if (found := _Watch(trial).origin(one, precision)) is not None:
                    return found
    return None


class _Watch(TorchDispatchMode):
    """Looks at each operation within it."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.objective = objective
        self.origins: dict[int, tuple[int, Origin]] = {}  # by the storage that is not finite; first those that nobody gave
        self.owners = [""]
        self.count = 0

    def origin(self, batch: Any, precision: Precision) -> Origin | None:
        """Compute losses and gradients, and tell what made one of them not finite."""
        for index, tensor in enumerate(tensors(batch)):
            self._came_in("batch", f"tensor {index}", tensor)
        for name, parameter in self.objective.named_parameters():
            self._came_in("parameters", name, parameter.detach())
        hooks = [hook for name, module in self.objective.named_modules() if name for hook in self._followed(name, module)]
        anomaly, checks = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        torch.autograd.set_detect_anomaly(True, check_nan=False)  # has autograd note the traceback of each operation
        try:
            for loss in self._losses(batch, precision):
                self._own(loss, "")
                if not _finite(loss):
                    return self._of(loss)
                with self:
                    loss.backward()  # type: ignore[no-untyped-call]
                for parameter in self.objective.parameters():
                    if parameter.grad is not None and not _finite(_values(parameter.grad)):
                        return self._of(*(_values(p.grad) for p in self.objective.parameters() if p.grad is not None))
                    parameter.grad = None
        finally:
            torch.autograd.set_detect_anomaly(anomaly, check_nan=checks)
            for hook in hooks:
                hook.remove()
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation: where its result is not finite, and what it took was, it is an origin."""
        kwargs = kwargs or {}
        taken = [value for value in _leaves((args, kwargs)) if isinstance(value, Tensor)]
        bad = [value for value in taken if not _finite(value)]
        nan = any(_has_nan(value) for value in bad)
        shared = {_storage(value) for value in taken}
        out = func(*args, **kwargs)
        name = str(func).rpartition(".")[0]
        if "empty" in name:  # holds whatever was in memory
            return out
        for value in _leaves(out):
            if not isinstance(value, Tensor):
                continue
            if _finite(value):
                if (place := _storage(value)) not in shared:  # of memory that was another's before
                    self.origins.pop(place, None)
                continue
            known = [self.origins[place] for one in bad if (place := _storage(one)) in self.origins]
            # A constant that is not finite is meant, as of a mask, until a NaN becomes of it.
            if not bad or (not nan and _has_nan(value) and all(number >= GIVEN for number, _ in known)):
                given = not bad and any(isinstance(one, float) and not math.isfinite(one) for one in _leaves((args, kwargs)))
                self.count += 1
                self.origins[_storage(value)] = (given * GIVEN + self.count, self._made(name, value))
            elif known:
                self.origins[_storage(value)] = min(known)
        return out

    def _losses(self, batch: Any, precision: Precision) -> Iterator[Tensor]:
        step: Any = self.objective.train_step
        if not inspect.isgeneratorfunction(step):
            with self:
                found = precision.within(step)(batch)
            if isinstance(found, Step):
                yield found.loss
            return
        generator, following = step(batch), precision.within(next)
        while True:
            try:
                with self:
                    _, loss = following(generator)
                    loss = loss if isinstance(loss, Tensor) else total(loss, self.objective)
            except StopIteration:
                return
            yield loss

    def _followed(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Note in autograd's graph which module an operation is of: the innermost."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._own((args, kwargs), self.owners[-1])
            self.owners.append(name)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._own(output, name)
            self.owners.pop()

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def _own(self, values: Any, name: str) -> None:
        nodes: list[Any] = [value.grad_fn for value in _leaves(values) if isinstance(value, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and OWNER not in node.metadata:
                node.metadata[OWNER] = name
                nodes += [following for following, _ in node.next_functions]

    def _came_in(self, phase: str, what: str, tensor: Tensor) -> None:
        if not _finite(tensor):
            self.count += 1
            self.origins[_storage(tensor)] = (self.count, Origin(phase, "", what, _described(tensor)))

    def _made(self, name: str, tensor: Tensor) -> Origin:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return Origin("forward", self.owners[-1], name, _described(tensor), _line_of(sys._getframe()))
        line = _line_in(node.metadata.get("traceback_") or [])
        return Origin("backward", node.metadata.get(OWNER, ""), node.name(), _described(tensor), line)

    def _of(self, *values: Tensor) -> Origin:
        """What made a loss or gradients not finite."""
        found = [self.origins[place] for value in values if not _finite(value) and (place := _storage(value)) in self.origins]
        if found:
            return min(found, key=lambda one: one[0])[1]
        first = next(value for value in values if not _finite(value))
        return Origin("forward", "", "a constant", _described(first))


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        yield tree
        return
    for part in tree:
        yield from _leaves(part)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce()._values() if tensor.is_sparse else tensor


def _finite(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if is_traceable_wrapper_subclass(tensor):  # as of torchao's float8: what it holds is in other tensors
        return all(map(_finite, _within(tensor)))
    return bool(torch.isfinite(_wide(tensor)).all())


def _has_nan(tensor: Tensor) -> bool:
    if is_traceable_wrapper_subclass(tensor):
        return any(map(_has_nan, _within(tensor)))
    return tensor.is_floating_point() and bool(torch.isnan(_wide(tensor)).any())


def _within(tensor: Any) -> list[Tensor]:
    return [part for name in tensor.__tensor_flatten__()[0] if isinstance(part := getattr(tensor, name), Tensor)]


def _wide(tensor: Tensor) -> Tensor:
    """Of float8, which torch does not look into, the same numbers in float32."""
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _described(tensor: Tensor) -> str:
    if is_traceable_wrapper_subclass(tensor):
        return " of ".join(_described(part) for part in _within(tensor) if not _finite(part))
    wide = _wide(tensor)
    bad = ~torch.isfinite(wide)
    nans, first = int(torch.isnan(wide).sum()), tuple(bad.nonzero()[0].tolist())
    kinds = ((nans, "NaN"), (int(bad.sum()) - nans, "infinite"))
    told = " and ".join(f"{count} {kind}" for count, kind in kinds if count)
    return f"{kind_of(tensor)} with {told} of {tensor.numel()}{f', the first at {first}' if first else ''}"


def _line_of(frame: Any) -> str:
    """The innermost line of the user's, no further out than the replay."""
    while frame is not None and frame.f_code is not _Watch._losses.__code__:
        path = frame.f_code.co_filename
        if not path.startswith((TORCH, OWN, "<")):
            return written(path, frame.f_lineno)
        frame = frame.f_back
    return ""


def _line_in(traceback: list[str]) -> str:
    """The same of a traceback as autograd keeps it: entries of a file, a line and its source."""
    for entry in reversed(traceback):
        head, _, source = entry.strip().partition("\n")
        path, number = head.split('"')[1], head.split(", line ")[1].split(",")[0]
        if path.startswith(OWN) and "_losses" in head:
            return ""
        if not path.startswith((TORCH, OWN, "<")):
            return f"{path}:{number}: {source.strip().splitlines()[0] if source.strip() else ''}".rstrip(": ")
    return ""
