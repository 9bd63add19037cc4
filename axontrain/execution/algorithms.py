"""Algorithms: torch's optimizers as functions of tensors, which one graph can take in.

A torch optimizer keeps its state by parameter and steps from ``p.grad``; its functional form, which torch has beside it,
takes lists. That of SGD is used as it is. Adam's (Kingma and Ba 2015, arXiv:1412.6980; decoupled decay: Loshchilov and Hutter
2019, arXiv:1711.05101) is written anew: in torch's the corrections of its bias are no tensors of their own, and Inductor
computes two powers for each vector of a parameter, which costs a small network as much as its forward and backward passes.
What has no form here is updated by its optimizer, outside of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from axontrain.errors import kind_of

Numbers = Mapping[str, Any]  # options by name: numbers, or scalars on the device where they are others from step to step
# params, grads, the state's tensors by key, the learning rate, options: it writes into params and state
Applied = Callable[[list[Tensor], list[Tensor], Mapping[str, list[Tensor]], Tensor, Numbers], None]
VARYING = ("weight_decay", "momentum", "betas")  # options that can be scalars on the device


@dataclass(frozen=True, slots=True)
class Form:
    """How one group of parameters is updated.

    Args:
        options: those that are constants of the graph, by name.
        keys: of the state: what begins as zeros of the parameter's shape.
        counts: whether the state has a ``step`` beside, a scalar that begins at zero.
        apply: the algorithm.
        varying: options that are none, but scalars on the device.
    """

    options: Mapping[str, Any]
    keys: tuple[str, ...]
    counts: bool
    apply: Applied
    varying: tuple[str, ...] = ()

    def numbers(self, group: Mapping[str, Any]) -> list[float] | None:
        """What those that vary are in a group, betas one by one; None where another algorithm would be needed."""
        found: list[float] = []
        for name in self.varying:
            if not _is_number(group[name]) or (name == "momentum" and not group[name]):
                return None
            found += _each(group[name])
        return found

    def named(self, scalars: Tensor) -> Numbers:
        """All options by name, of what :meth:`numbers` gave."""
        if not self.varying:
            return self.options
        rest = [*scalars.unbind()]
        of_group: dict[str, Any] = {**self.options}
        for name in self.varying:
            many = 2 if name == "betas" else 1
            of_group[name] = rest[0] if many == 1 else tuple(rest[:many])
            del rest[:many]
        return of_group


def form(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], varying: Collection[str] = ()) -> Form | str:
    """The functional form of a group of an optimizer; or why it has none, in words.

    Args:
        optimizer: that.
        group: one of its groups.
        varying: which of its options are to be scalars on the device, of VARYING.
    """
    kind = type(optimizer)
    made = FORMS.get(kind)
    if made is None:
        return f"{kind.__name__} has no form that one graph could take in; SGD, Adam and AdamW have"
    for name in VARYING:
        if name in group and not _is_number(group[name]):
            return f"the optimizer's {name} is {kind_of(group[name])}, and not a number"
    return made(group, varying)


def varying(optimizers: Iterable[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The options of each group that can be scalars on the device, as they are now."""
    return [
        {name: [*map(float, _each(group[name]))] for name in VARYING if name in group and _is_number(group[name])}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def _is_number(value: Any) -> bool:
    return all(isinstance(one, Real) for one in _each(value))


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _split(group: Mapping[str, Any], names: Sequence[str], varying: Collection[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The constants, and the names of those that are none."""
    apart = tuple(name for name in names if name in varying and (name != "momentum" or group[name]))
    return {name: group[name] for name in names if name not in apart}, apart


def _sgd(group: Mapping[str, Any], varying: Collection[str]) -> Form | str:
    options, apart = _split(group, ("weight_decay", "momentum", "dampening", "nesterov", "maximize"), varying)
    if options["dampening"]:
        return "SGD with dampening begins unlike it goes on"
    momentum = bool(group["momentum"])

    def apply(
        params: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], lr: Tensor, numbers: Numbers
    ) -> None:
        if not apart:
            buffers: Sequence[Tensor | None] = state["momentum_buffer"] if momentum else [None] * len(params)
            sgd(params, grads, list(buffers), foreach=True, fused=False, lr=lr, **numbers)  # type: ignore[arg-type]
            return
        for index, (p, gradient) in enumerate(zip(params, grads, strict=True)):  # torch's takes numbers only
            g = (-gradient if numbers["maximize"] else gradient) + numbers["weight_decay"] * p
            if momentum:
                buffer = state["momentum_buffer"][index]
                buffer.mul_(numbers["momentum"]).add_(g)
                g = g + numbers["momentum"] * buffer if numbers["nesterov"] else buffer
            p.sub_(lr * g)

    return Form(options, ("momentum_buffer",) if momentum else (), False, apply, apart)


def _adam(group: Mapping[str, Any], varying: Collection[str]) -> Form | str:
    names = ("amsgrad", "weight_decay", "eps", "maximize", "decoupled_weight_decay", "betas")
    options, apart = _split(group, names, varying)
    amsgrad = bool(options["amsgrad"])
    keys = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))

    def apply(
        params: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], lr: Tensor, numbers: Numbers
    ) -> None:
        first, second = numbers["betas"]
        decays = "weight_decay" in apart or bool(numbers["weight_decay"])
        for index, (p, gradient) in enumerate(zip(params, grads, strict=True)):
            mean, square, step = state["exp_avg"][index], state["exp_avg_sq"][index], state["step"][index]
            g = -gradient if numbers["maximize"] else gradient
            step.add_(1)
            if decays and numbers["decoupled_weight_decay"]:
                p.mul_(1 - lr * numbers["weight_decay"])
            elif decays:
                g = g + numbers["weight_decay"] * p
            if "betas" in apart:
                mean.add_((g - mean) * (1 - first))  # lerp takes a weight of its own dtype, in which 1 - beta is rounded
                square.mul_(second).add_(g * g * (1 - second))
            else:
                mean.lerp_(g, 1 - first)
                square.mul_(second).addcmul_(g, g, value=1 - second)
            if amsgrad:
                largest = state["max_exp_avg_sq"][index]
                largest.copy_(torch.maximum(largest, square))
                square = largest
            # In double, as torch's fused kernels do: 1 - 0.999 in float32 has lost five digits.
            count = step if p.device.type == "mps" else step.double()
            rate = _once((lr / (1 - first**count)).to(lr.dtype))
            correction = _once((1 - second**count).sqrt().to(lr.dtype))
            p.sub_(rate * (mean / (square.sqrt() / correction + numbers["eps"])))

    return Form(options, keys, True, apply, apart)


def _once(scalar: Tensor) -> Tensor:
    """The same number, by a reduction: what is no reduction, Inductor computes anew for each element that it is used for."""
    return scalar.expand(9).amax()


FORMS: dict[type, Callable[[Mapping[str, Any], Collection[str]], Form | str]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
}


def begin(form: Form, group: Mapping[str, Any], parameters: Sequence[Tensor], state: Any) -> None:
    """Make the state of parameters that have none, as the optimizer itself would at their first step."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    wide = not group.get("fused") and torch.get_default_dtype() is torch.float64
    for p in parameters if form.counts or form.keys else ():
        of_p = state[p]
        if form.counts and "step" not in of_p:
            dtype = torch.float64 if wide else torch.float32
            of_p["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
        for key in form.keys:
            if of_p.get(key) is None:
                of_p[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
