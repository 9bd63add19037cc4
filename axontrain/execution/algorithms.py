"""Algorithms: torch's optimizers as functions of tensors, which one graph can take in.

A torch optimizer keeps its state by parameter and steps from ``p.grad``; its functional form, which torch has beside it,
takes lists. That of SGD is used as it is. Adam's (Kingma and Ba 2015, arXiv:1412.6980; decoupled decay: Loshchilov and Hutter
2019, arXiv:1711.05101) is written anew: in torch's the corrections of its bias are no tensors of their own, and Inductor
computes two powers for each vector of a parameter, which costs a small network as much as its forward and backward passes.
What has no form here is updated by its optimizer, outside of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

# params, grads, the state's tensors by key, the learning rate: it writes into params and state
Applied = Callable[[list[Tensor], list[Tensor], Mapping[str, list[Tensor]], Tensor], None]


@dataclass(frozen=True, slots=True)
class Form:
    """How one group of parameters is updated.

    Args:
        options: those that are constants of the graph, by name.
        keys: of the state: what begins as zeros of the parameter's shape.
        counts: whether the state has a ``step`` beside, a scalar that begins at zero.
        apply: the algorithm.
    """

    options: Mapping[str, Any]
    keys: tuple[str, ...]
    counts: bool
    apply: Applied

    def of_now(self, group: Mapping[str, Any]) -> bool:
        """Whether the group has these options still."""
        return all(group[name] == value for name, value in self.options.items())


def form(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Form | str:
    """The functional form of a group of an optimizer; or why it has none, in words."""
    kind = type(optimizer)
    made = FORMS.get(kind)
    if made is None:
        return f"{kind.__name__} has no form that one graph could take in; SGD, Adam and AdamW have"
    return made(group)


def _sgd(group: Mapping[str, Any]) -> Form | str:
    options = {name: group[name] for name in ("weight_decay", "momentum", "dampening", "nesterov", "maximize")}
    if options["dampening"]:
        return "SGD with dampening begins unlike it goes on"
    momentum = bool(options["momentum"])

    def apply(params: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], lr: Tensor) -> None:
        buffers: Sequence[Tensor | None] = state["momentum_buffer"] if momentum else [None] * len(params)
        sgd(params, grads, list(buffers), foreach=True, fused=False, lr=lr, **options)  # type: ignore[arg-type]

    return Form(options, ("momentum_buffer",) if momentum else (), False, apply)


def _adam(group: Mapping[str, Any]) -> Form | str:
    options = {name: group[name] for name in ("amsgrad", "weight_decay", "eps", "maximize", "decoupled_weight_decay")}
    if any(isinstance(beta, Tensor) for beta in group["betas"]):
        return "Adam's betas are tensors"
    betas = tuple(group["betas"])
    amsgrad = bool(options["amsgrad"])
    keys = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))

    def apply(params: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], lr: Tensor) -> None:
        for index, (p, gradient) in enumerate(zip(params, grads, strict=True)):
            mean, square, step = state["exp_avg"][index], state["exp_avg_sq"][index], state["step"][index]
            g = -gradient if options["maximize"] else gradient
            step.add_(1)
            if options["weight_decay"] and options["decoupled_weight_decay"]:
                p.mul_(1 - lr * options["weight_decay"])
            elif options["weight_decay"]:
                g = g + options["weight_decay"] * p
            mean.lerp_(g, 1 - betas[0])
            square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            if amsgrad:
                largest = state["max_exp_avg_sq"][index]
                largest.copy_(torch.maximum(largest, square))
                square = largest
            # In double, as torch's fused kernels do: 1 - 0.999 in float32 has lost five digits.
            count = step if p.device.type == "mps" else step.double()
            rate = _once((lr / (1 - betas[0] ** count)).to(lr.dtype))
            correction = _once((1 - betas[1] ** count).sqrt().to(lr.dtype))
            p.sub_(rate * (mean / (square.sqrt() / correction + options["eps"])))

    return Form({**options, "betas": betas}, keys, True, apply)


def _once(scalar: Tensor) -> Tensor:
    """The same number, by a reduction: what is no reduction, Inductor computes anew for each element that it is used for."""
    return scalar.expand(9).amax()


FORMS: dict[type, Callable[[Mapping[str, Any]], Form | str]] = {
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
