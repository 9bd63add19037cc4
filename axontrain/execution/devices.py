"""Where computing happens: which device "auto" means, and the objective moved there."""

from __future__ import annotations

import torch

from axontrain.errors import ConfigurationError
from axontrain.objective import Objective


def device_of(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" takes a GPU where there is one."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ConfigurationError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def moved(objective: Objective, device: torch.device) -> Objective:
    """The objective on that device; it is not touched where it is there already."""
    if all(tensor.device == device for tensor in (*objective.parameters(), *objective.buffers())):
        return objective
    if meta := [name for name, tensor in (*objective.named_parameters(), *objective.named_buffers()) if tensor.is_meta]:
        raise ConfigurationError(
            f"{meta[0]} of the objective is on the meta device, and holds nothing: objective.to_empty(device=...), and weights "
            f"into it, before the Loop"
        )
    try:
        return objective.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigurationError(f"device={str(device)!r} cannot be used: {error}") from error
