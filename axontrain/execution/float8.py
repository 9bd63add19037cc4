"""Linear layers in float8, by torchao (Micikevicius et al. 2022, arXiv:2209.05433)."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from axontrain.errors import ConfigurationError, require, warn

MULTIPLE = 16  # of both sizes of a layer: the kernels of GPUs take no others
CAPABLE = (8, 9)  # NVIDIA's Ada and Hopper, and what came after


def to_float8(module: nn.Module, device: torch.device) -> None:
    """Swap ``nn.Linear`` in a module for layers that multiply in float8; parameters stay the same, and their names.

    Inputs and weights are cast to E4M3, gradients to E5M2, each tensor by a scale of the moment.

    Args:
        module: changed in place.
        device: where it computes; where that has no float8, it is emulated, which a warning says.

    Raises:
        ConfigurationError: if no layer can be swapped.
        MissingExtraError: without torchao.
    """
    if any(type(part).__name__ == "Float8Linear" for part in module.modules()):
        return
    linear = [(name, part) for name, part in module.named_modules() if type(part) is nn.Linear]
    if not any(_fits(part) for _, part in linear):
        told = ", ".join(f"{name} ({part.in_features} to {part.out_features})" for name, part in linear[:4]) or "none"
        raise ConfigurationError(
            f"precision='fp8' multiplies in nn.Linear layers whose sizes are multiples of {MULTIPLE}, and there is none: the "
            f"linear layers are {told}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao's own imports
        float8 = require("torchao.float8", "fp8", "precision='fp8'")
    emulate = device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABLE
    if emulate:
        what = "this device" if device.type != "cuda" else torch.cuda.get_device_name(device)
        warn(f"precision='fp8': {what} has no float8, which is emulated: its rounding, and more time than 'bf16' takes")
    config = float8.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # padded: a last batch is of any size
    places = [(part, name, child) for part in module.modules() for name, child in part._modules.items() if child is not None]
    float8.convert_to_float8_training(
        module, module_filter_fn=lambda part, _: type(part) is nn.Linear and _fits(part), config=config
    )
    swapped: dict[nn.Module, nn.Module] = {}
    for part, name, child in places:  # one that is in several places, and what was hung on it
        found = part._modules[name]
        if found is not None and found is not child:
            swapped.setdefault(child, found)
    for part, name, child in places:
        if child in swapped:
            part._modules[name] = swapped[child]
    for old, new in swapped.items():
        for hooks in HOOKS:
            if getattr(old, hooks, None):
                setattr(new, hooks, getattr(old, hooks))


HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _fits(part: nn.Linear) -> bool:
    if "weight" not in part._parameters:  # it is computed from others, as by the older weight_norm
        return False
    return part.in_features % MULTIPLE == 0 and part.out_features % MULTIPLE == 0
