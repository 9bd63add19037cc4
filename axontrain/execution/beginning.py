"""What a step changes before it updates: put back, so that the step can be computed once more from where it began."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from axontrain import randomness
from axontrain.data.structure import tensors
from axontrain.execution.generators import draw_from, drawn_to
from axontrain.execution.refilling import refill
from axontrain.execution.surroundings import Surroundings
from axontrain.guard import is_dense

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of what size
MOST_BYTES = 2**28  # of tensors that the module does not hold itself, to be copied before a trial


class Changing:
    """What a step may change of a module beside its parameters: found once, and looked up each step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Metrics of torchmetrics within an objective hold what they count in attributes, not in buffers.
        self.metrics: list[Any] = [part for part in module.modules() if hasattr(type(part), "metric_state")]
        found = (value for part in module.modules() for value in vars(part).values())
        self.generators = [value for value in found if isinstance(value, torch.Generator)]


class Beginning:
    """Where a step begins: random generators, buffers, metrics within the module; gradients there are none."""

    def __init__(self, changing: Changing) -> None:
        self._module = changing.module
        self._rng = randomness.capture()
        self._buffers = [
            (part._buffers, name, buffer, None if buffer is None else buffer.clone(), _version(buffer))
            for part in self._module.modules()
            for name, buffer in part._buffers.items()
        ]
        self._metrics = [(metric, _copied(metric.metric_state), metric._update_count) for metric in changing.metrics]
        self._own = [(generator, generator.get_state()) for generator in changing.generators]

    def put_back(self, *, gradients: bool = False) -> None:
        """Make all of it what it was, and drop gradients, unless those are of parts before, and to be kept."""
        for parameter in () if gradients else self._module.parameters():
            parameter.grad = None
        with torch.no_grad():
            for place, name, buffer, kept, version in self._buffers:
                if buffer is not None and kept is not None and (is_dense(buffer) or _version(buffer) == version):
                    place[name] = buffer
                    if is_dense(buffer):
                        _restore(buffer, kept)
                else:
                    place[name] = None if kept is None else kept.clone()
        for metric, states, count in self._metrics:
            for name, value in _copied(states).items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, None
        for generator, state in self._own:
            generator.set_state(state)
        randomness.restore(self._rng)


class Around:
    """What code of a module may change in Python, tensors and generators included: attributes, global variables, closures.

    Args:
        module: that.
        surroundings: what was found there, if a walk was made already.
    """

    def __init__(self, module: nn.Module, surroundings: Surroundings | None = None) -> None:
        self.surroundings = Surroundings(module) if surroundings is None else surroundings
        self._tensors, self._large = self._clones(module)
        self.left = ""  # what could not be put back, in words
        self._drawn = [(generator, drawn_to(generator)) for generator in self.surroundings.contents.generators]

    def _clones(self, module: nn.Module) -> tuple[list[tuple[str, Tensor, Tensor]], list[tuple[str, Tensor, int]]]:
        """Tensors with what they hold; and with their versions those that are too large to be copied, or cannot be."""
        parts = {id(vars(part)) for part in module.modules()}
        own = {id(tensor) for _, where, _, tensor in self.surroundings.contents.tensors if id(where) in parts}
        clones, others, room = [], [], MOST_BYTES
        for name, tensor in self.surroundings.kept().items():
            room -= 0 if id(tensor) in own else tensor.nbytes
            try:
                with torch._C.DisableTorchFunctionSubclass():
                    copy = tensor.detach().clone() if id(tensor) in own or room >= 0 else None
            except Exception:  # of a class of the user's
                copy = None
            if copy is None:
                others.append((name, tensor, _version(tensor)))
            else:
                clones.append((name, tensor, copy))
        return clones, others

    def changes(self) -> Iterator[str]:
        """What is another now, in words."""
        for what, how in self.changed():
            yield f"{what} {how}"

    def changed(self) -> Iterator[tuple[str, str]]:
        """What is another now, and how."""
        yield from self.surroundings.changed()
        for name, live, before in self._tensors:
            if not _same_bits(live, before):
                yield name, "was written to"
        yield from self._written()
        for number, (generator, state) in enumerate(self._drawn):
            if drawn_to(generator) != state:
                yield f"a {type(generator).__name__} of its own{f' ({number})' if number else ''}", "was drawn from"

    def _written(self) -> Iterator[tuple[str, str]]:
        for name, tensor, version in self._large:
            if _version(tensor) != version:
                yield name, "was written to, and was too large to be kept"

    @torch.no_grad()
    def put_back(self) -> None:
        """Make all of it what it was.

        Raises:
            Exception: of what cannot be, once all else is.
        """
        with contextlib.ExitStack() as every:  # none of them, nor Ctrl-C, keeps the others from it
            every.callback(self._complain)
            for generator, state in self._drawn:
                every.callback(draw_from, generator, state)
            for _, live, before in self._tensors:
                every.callback(_restore_if_other, live, before)
            every.callback(self.surroundings.put_back)

    def _complain(self) -> None:
        for what, how in self._written():
            raise ValueError(f"{what} {how}")


class Before:
    """All that a step changes, as it was before: where it begins, what is around it, parameters, and what optimizers keep."""

    def __init__(self, module: nn.Module, surroundings: Surroundings | None = None) -> None:
        self._beginning, self.around = Beginning(Changing(module)), Around(module, surroundings)
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.named = {name: tensor.detach().clone() for name, tensor in named.items()}
        self._parameters = dict(module.named_parameters())
        self._state: list[tuple[Tensor, Tensor]] = []
        self._batch: list[tuple[Tensor, Tensor]] = []
        self._states: list[tuple[dict[Any, Any], dict[Any, dict[str, Any]]]] = []

    def take_state(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Take in what the optimizers keep; what they keep beside it later, :meth:`put_back` takes away."""
        self._states += [(one.state, {p: dict(of_p) for p, of_p in one.state.items()}) for one in optimizers]
        found = (value for one in optimizers for of_p in one.state.values() for value in of_p.values())
        self.take(value for value in found if isinstance(value, Tensor))

    def take_batch(self, batch: Any) -> None:
        """Take in the tensors of a batch, to which a step may write."""
        dense = (tensor for tensor in tensors(batch) if not tensor.is_meta and is_dense(tensor))
        self._batch += [(tensor, tensor.detach().clone()) for tensor in dense]

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Take in further tensors."""
        self._state += [(value, value.clone()) for value in tensors]

    @torch.no_grad()
    def put_back(self, *, gradients: bool = False) -> None:
        """Make all of it what it was, and drop gradients, unless those are of parts before, and to be kept.

        Raises:
            Exception: of what cannot be, once all else is.
        """
        with contextlib.ExitStack() as every:  # none of them, nor Ctrl-C, keeps the others from it
            every.callback(self._beginning.put_back, gradients=gradients)
            for name, parameter in self._parameters.items():
                every.callback(_restore, parameter, self.named[name])
            for kept, known in self._states:
                every.callback(_refill_state, kept, known)
            for live, before in self._state:
                every.callback(_restore, live, before)
            for live, before in self._batch:
                every.callback(_restore_if_other, live, before)
            every.callback(self.around.put_back)

    def lost(self, *, gradients: bool = False) -> str:
        """Put it back, and say what of the user's cannot be; "" if all is as it was."""
        try:
            self.put_back(gradients=gradients)
        except Exception as error:
            return f"what a step changes cannot be put back, to do it again in eager: {type(error).__name__}: {error}"
        return ""


def _refill_state(state: dict[Any, Any], known: dict[Any, dict[str, Any]]) -> None:
    """Have an optimizer keep what it kept."""
    for p in [p for p in state if p not in known]:
        del state[p]
    for p, of_p in known.items():
        refill(state[p], [*of_p.items()])


def _restore(live: Tensor, before: Tensor) -> None:
    """Write into a tensor what it held; one that was not looked into is left alone."""
    if is_lazy(live) or is_lazy(before) or live.layout is not torch.strided:
        return
    if live.shape != before.shape or live.dtype != before.dtype:  # somebody has put other memory behind it
        live.data = before.clone()
    elif is_dense(live):
        live.detach().copy_(before)


def _restore_if_other(live: Tensor, before: Tensor) -> None:
    """Leave alone what is the same: it may be memory that cannot be written to, or be saved for somebody's backward pass."""
    if not _same_bits(live, before):
        _restore(live, before)


def _same_bits(live: Tensor, before: Tensor) -> bool:
    if live.shape != before.shape or live.dtype != before.dtype:
        return False
    if not is_dense(live) or not is_dense(before):  # which nobody writes back
        return True
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        a, b = (torch.view_as_real(one.resolve_conj()) if one.is_complex() else one.resolve_neg() for one in (live, before))
        bits = BITS.get(a.element_size())
        return torch.equal(a, b) if bits is None or a.dtype is torch.bool else torch.equal(a.view(bits), b.view(bits))


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or is_lazy(tensor) or tensor.is_inference() else tensor._version


def _copied(states: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value.clone() for name, value in states.items()}
