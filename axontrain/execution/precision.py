"""Precision: in which floating-point numbers a step computes, and in which order images lie in memory.

======== ==================== =================================================================================
name     parameters, updates  computes
======== ==================== =================================================================================
fp32     as they are          as torch does for float32; nothing is touched (torch's own default for convolutions
                              on NVIDIA GPUs is TF32)
tf32     as they are          matrix products and convolutions of float32 in TF32 (NVIDIA GPUs from Ampere on)
bf16     as they are          under ``torch.autocast``: matrix products and convolutions in bfloat16, what sums or
                              exponentiates (softmax, norms, most losses) in float32
fp16     as they are          the same in float16, with the loss scaled so that small gradients do not vanish
bf16-true bfloat16            all of it, batches too; half the memory, and updates below 1/256 of a weight are lost
fp64     float64              all of it, batches too
fp8      as they are          as bf16, and linear layers whose sizes are multiples of 16 in float8 (the extra ``fp8``;
                              GPUs from Ada on, elsewhere it is emulated): worth it for large layers that are compiled
======== ==================== =================================================================================

In all of them readings are summed in float64. Predictions of ``Loop.predict`` are float32 under autocast.

With ``channels_last``, parameters and tensors of batches that have four dimensions (B, C, H, W), or five, lie with their
channels last in memory, shapes as they are: convolutions are faster so, with tensor cores above all. Numbers may differ in
their last bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axontrain.data.structure import mapped
from axontrain.errors import ConfigurationError, unknown, warn
from axontrain.execution.float8 import to_float8
from axontrain.objective import Objective

NAMES = ("fp32", "tf32", "bf16", "fp16", "bf16-true", "fp64", "fp8")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
TRUE = {"bf16-true": torch.bfloat16, "fp64": torch.float64}

# Of torch's GradScaler (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).
FIRST_SCALE = 2.0**16
GROWTH, BACKOFF, PERIOD = 2.0, 0.5, 2000


class Precision:
    """One of the precisions on one device.

    Args:
        name: see above.
        device: where it computes.
        channels_last: see above.

    >>> with Precision("bf16", torch.device("cpu")).computing():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16

    Raises:
        ConfigurationError: if there is none of that name, or the device does not have it.
    """

    def __init__(self, name: str, device: torch.device, *, channels_last: bool = False) -> None:
        if name not in NAMES:
            raise unknown("precision", name, NAMES)
        if not isinstance(channels_last, bool):
            raise ConfigurationError(f"channels_last={channels_last!r}: True or False")
        self.name, self.device, self.channels_last = name, device, channels_last
        self.autocast: torch.dtype | None = AUTOCAST.get(name)
        self.dtype: torch.dtype | None = TRUE.get(name)  # of parameters and batches
        self.converts = self.dtype is not None or channels_last  # whether batches are made others
        if (
            device.type == "cuda"
            and name in ("bf16", "bf16-true", "fp8")
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise ConfigurationError(f"precision={name!r}: {torch.cuda.get_device_name(device)} has no bfloat16; 'fp16' it has")
        if device.type == "mps" and name == "fp64":
            raise ConfigurationError("precision='fp64': MPS has no float64; device='cpu' has")
        if name == "tf32" and device.type != "cuda":
            warn(f"precision='tf32' is of NVIDIA GPUs: on this device ({device.type}) float32 is computed in full")

    def __repr__(self) -> str:
        return f"Precision({self.name!r})"

    def taken(self, objective: Objective) -> Objective:
        """The objective with its floating-point parameters and buffers, or its linear layers, in this precision."""
        if self.name == "fp8":
            to_float8(objective, self.device)
        if self.channels_last:
            for tensor in (*objective.parameters(), *objective.buffers()):
                tensor.data = _channels_last(tensor.data)
        if self.dtype is None:
            return objective
        named = (*objective.named_parameters(), *objective.named_buffers())
        if found := [name for name, tensor in named if tensor.is_complex()]:
            raise ConfigurationError(f"precision={self.name!r}: {found[0]} is complex, and would lose its imaginary part")
        return objective.to(self.dtype)

    def batch(self, batch: Any) -> Any:
        """A batch with its floating-point tensors in this precision, and its images in this order."""
        dtype, channels_last = self.dtype, self.channels_last

        def converted(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if dtype is not None and leaf.is_floating_point():
                leaf = leaf.to(dtype)
            return _channels_last(leaf) if channels_last else leaf

        return mapped(batch, converted)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Compute the forward pass of the block in this precision."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def within(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same function, computing in this precision; itself where there is nothing to do."""
        if self.autocast is None:
            return function

        def call(batch: Any) -> Any:
            with self.computing():
                return function(batch)

        return call

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Torch's settings as this precision wants them, and afterwards as they were."""
        if self.name != "tf32":
            yield
            return
        places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
        before = [place.fp32_precision for place in places]
        for place in places:
            place.fp32_precision = "tf32"
        try:
            yield
        finally:
            for place, setting in zip(places, before, strict=True):
                place.fp32_precision = setting

    def shown(self, predictions: Any) -> Any:
        """Predictions for the user, to whom what autocast makes of them is of no use: NumPy has no bfloat16."""
        if self.autocast is None:
            return predictions
        half = (torch.float16, torch.bfloat16)
        return mapped(predictions, lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in half else leaf)

    def scaler(self, objective: nn.Module) -> Scaler | None:
        """What scales losses, where small gradients would vanish.

        Raises:
            ConfigurationError: if parameters are float16 themselves, whose gradients cannot be brought back to scale.
        """
        if self.name != "fp16":
            return None
        if names := [name for name, p in objective.named_parameters() if p.dtype is torch.float16]:
            raise ConfigurationError(
                f"precision='fp16' computes in float16 with parameters in float32, and {', '.join(names[:4])} are float16: "
                f"objective.float(), or precision='bf16-true'"
            )
        return Scaler(self.device)


def _channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()]) if tensor.dim() in formats else tensor


FP32 = Precision("fp32", torch.device("cpu"))


class Scaler:
    """Scales losses before backward, and gradients back after it: dynamically, and without a host read.

    The scale is halved when gradients overflow, and doubled after ``PERIOD`` steps in which none did.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(FIRST_SCALE, device=device)
        self.good = torch.tensor(0, dtype=torch.int32, device=device)  # steps since the last overflow
        self._inverse: Tensor | None = None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to run backward on."""
        return loss * self.scale.to(loss.dtype)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Bring gradients back to what they are of the loss."""
        inverse = self.scale.double().reciprocal().float()
        for gradient in gradients:
            gradient.mul_(inverse)

    def update(self, skipped: Tensor) -> None:
        """After a step: ``skipped`` is above 0 if its gradients were not finite."""
        torch._amp_update_scale_(self.scale, self.good, skipped.float(), GROWTH, BACKOFF, PERIOD)

    def state_dict(self) -> dict[str, Any]:
        """The scale, and for how many steps it has held."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.scale.copy_(state["scale"])
        self.good.copy_(state["good"])
