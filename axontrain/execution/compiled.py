"""What torch.compile does, looked at and left out, without importing what nobody has asked for."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run what is compiled as it was written, for the block.

    Under a dispatch mode torch does so too, but then it skips that code for good: the user's model would be compiled no more.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return contextlib.nullcontext()
    stance: Any = torch.compiler.set_stance
    return stance("force_eager")  # type: ignore[no-any-return]


def works() -> bool:
    """Whether torch compiles anything where this is called: not under a dispatch mode, nor within :func:`uncompiled`."""
    stance = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)
    return not torch._C._len_torch_dispatch_stack() and getattr(stance, "stance", "") != "force_eager"


def graphs() -> int:
    """How many graphs it has made."""
    return int(_counters("stats").get("unique_graphs", 0))


def breaks() -> int:
    """How many graph breaks it has met in making them."""
    return sum(_counters("graph_break").values())


def _counters(name: str) -> Any:
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return {} if dynamo is None else dynamo.counters.get(name, {})
