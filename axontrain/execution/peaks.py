"""Peaks: how many floating-point operations a second a device can do, dense, as its maker says."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import nn

# In 1e12 FLOP/s, without sparsity: float64; float32 as it is; TF32; float16 and bfloat16, summed in float32; float8. On tensor
# cores where there are any for it. By the names that torch.cuda.get_device_name gives.
KINDS = ("fp64", "fp32", "tf32", "half", "fp8")
TABLE: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    # NVIDIA H100 Tensor Core GPU Architecture (whitepaper); the H100 NVL and the H200 from their datasheets,
    # whose numbers for tensor cores are with sparsity: half of them. GH200 has the chip of the SXM5.
    (r"H100 NVL|H200 NVL", (60.0, 60.0, 417.5, 835.5, 1670.5)),
    (r"H100 PCIe", (51.2, 51.2, 378.0, 756.0, 1513.0)),
    (r"H100 80GB HBM3|H100 SXM5?|H200|GH200", (66.9, 66.9, 494.7, 989.4, 1978.9)),
    # NVIDIA A100 Tensor Core GPU Architecture (whitepaper): the PCIe and the SXM4 alike. A30, A40 and A10: datasheets.
    (r"A100", (19.5, 19.5, 156.0, 312.0, None)),
    (r"A30", (10.3, 10.3, 82.0, 165.0, None)),
    (r"A40", (None, 37.4, 74.8, 149.7, None)),
    (r"A10", (None, 31.2, 62.5, 125.0, None)),
    # L4 and L40S: datasheets, half of what they say with sparsity.
    (r"L4", (None, 30.3, 60.0, 121.0, 242.5)),
    (r"L40S", (None, 91.6, 183.0, 362.0, 733.0)),
    # NVIDIA Tesla V100 datasheet; T4 datasheet. Their tensor cores have float16 alone.
    (r"V100S-PCIE", (8.2, 16.4, None, 130.0, None)),
    (r"V100-SXM[23]", (7.8, 15.7, None, 125.0, None)),
    (r"V100-PCIE", (7.0, 14.0, None, 112.0, None)),
    (r"T4", (None, 8.1, None, 65.0, None)),
    # NVIDIA Ada GPU Architecture and NVIDIA Ampere GA102 GPU Architecture (whitepapers); RTX A6000: datasheet.
    (r"RTX 4090", (None, 82.6, 82.6, 165.2, 330.3)),
    (r"RTX 3090", (None, 35.6, 35.6, 71.0, None)),
    (r"RTX A6000", (None, 38.7, 77.4, 154.8, None)),
)
# What may stand beside the name of the product, and leaves it what it is: the maker, the line, the memory, the socket.
AROUND = r"(?:NVIDIA |Tesla |GeForce )*(?:{})(?:[- ](?:SXM\d?|PCI[eE]|PG\d+|\d+GB|HBM\w+))*"


def peak_of(name: str, kind: str) -> float | None:
    """FLOP/s of a device by its name, for numbers of one of KINDS; None where that is not known.

    A name that is not in the table is not taken for one that is like it: an A10G is no A10, and a laptop's GPU no desktop's.

    >>> peak_of("NVIDIA A100-SXM4-80GB", "half"), peak_of("NVIDIA A10G", "half")
    (312000000000000.0, None)
    """
    for pattern, peaks in TABLE:
        if re.fullmatch(AROUND.format(pattern), name):
            peak = peaks[KINDS.index(kind)]
            return None if peak is None else peak * 1e12
    return None


def kind_of_numbers(precision: str, module: nn.Module) -> str:
    """In what numbers most of a module's operations are, of KINDS: by the precision, else by its parameters.

    >>> kind_of_numbers("bf16", nn.Linear(2, 2)), kind_of_numbers("fp32", nn.Linear(2, 2).half())
    ('half', 'half')
    """
    if precision == "fp8":
        return "fp8"
    if precision in ("bf16", "fp16"):
        return "half"
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        counts[parameter.dtype] += parameter.numel()
    dtype = max(counts, key=counts.__getitem__, default=torch.float32)
    if dtype in (torch.float64, torch.complex128):
        return "fp64"
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
