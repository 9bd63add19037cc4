"""What waits for a GPU, shown on any machine."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Raises on what waits for a GPU: reading a value, and sizes that depend on values."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal.")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = "aten.index" in str(func) and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if masked or any(name in str(func) for name in self.waits):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
