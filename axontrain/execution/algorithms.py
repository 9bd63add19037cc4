"""Algorithms: torch's optimizers as functions of tensors, which one graph can take in.

A torch optimizer keeps its state by parameter and steps from ``p.grad``; its functional form, which torch has beside it, takes
lists. What has no such form without a host read is updated by its optimizer, outside of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
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
        adam(
            params,
            grads,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["max_exp_avg_sq"] if amsgrad else [],
            state["step"],
            foreach=True,
            capturable=True,
            fused=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            **options,
        )

    return Form({**options, "betas": betas}, keys, True, apply)


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
