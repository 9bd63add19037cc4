"""Failing: a compiled step that fails is done once more in eager, on a copy, whose error has the line of the user's.

Compiled code checks indices too, but says only ``cpp_fused_embedding_0, main.cpp:52, index out of bounds: 0 <= tmp2 < 10``.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from axontrain.execution.copying import untouched
from axontrain.execution.lines import of_error
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.precision import Precision
from axontrain.execution.twin import Twin
from axontrain.objective import Objective


def fail(error: Exception, objective: Objective, precision: Precision, batch: Any) -> NoReturn:
    """Raise what the same step raises in eager, if the error came from within compiled code; else the error itself.

    The objective, its gradients and the random generators stay as they are.
    """
    # After an assertion on a GPU nothing more is computed on it.
    if out_of_memory(error) or "CUDA error" in str(error) or not _is_of_a_kernel(error):
        raise error
    found: Exception | None = None
    try:
        with untouched(objective):
            twin = Twin(objective, None, precision)
            try:
                twin.step(batch)
            except Exception as failed:
                found = failed
    except Exception:  # it cannot be copied, or there is not the memory for it
        raise error from None
    if found is None:
        error.add_note(
            "in eager, on a copy, the same step does not fail: Loop(..., compile=False) trains without what is compiled"
        )
        raise error
    if out_of_memory(found):
        raise error
    compiled = str(error).strip().partition("\n")[0].rpartition(", ")[2]
    found.add_note(f"as it fails in eager, on a copy; compiled, it fails by: {compiled}")
    raise found from None


def _is_of_a_kernel(error: Exception) -> bool:
    """Whether an error was raised by code that torch's compiler has written."""
    made: Any = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    innermost = next(of_error(error), ("", 0))[0]
    return made is not None and innermost.startswith(made.cache_dir())
