"""Inductor: torch's compiler as a backend that counts its graphs, and whose graphs are called directly where that is the same.

Between Dynamo, which takes a function's graph, and Inductor's code stands a runtime that gives mutated inputs and aliased
outputs their due. A graph that writes its inputs by itself and returns only what is new has no use for it, and on a small model
it costs as much as the graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# As of the random numbers of eager steps, so that the two can be compared, and that a run may change from one to the other.
# Sizes and strides are what Dynamo's guards have looked at.
# "deterministic" has it choose no kernel by its time, which would make a run that is resumed another one.
OPTIONS = {"fallback_random": True, "size_asserts": False, "deterministic": True}


class ClosedError(Exception):
    """A graph was to be compiled where none is to be."""


class Backend:
    """A backend for ``torch.compile``: Inductor.

    Args:
        direct: whether graphs are called without the runtime around them, where that is the same.
    """

    def __init__(self, *, direct: bool) -> None:
        self.direct = direct
        self.graphs = 0  # compiled so far
        self.closed = False  # whether another graph is an error

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor import config

        if self.closed:
            raise ClosedError
        self.graphs += 1
        options = {name: value for name, value in OPTIONS.items() if hasattr(config, name)}
        compiled = self._direct if self.direct else self._whole
        if all(one.device.type == "cpu" for one in inputs if isinstance(one, Tensor)):
            try:  # what calls the kernels in C++, too: of a small step that is a fifth
                return compiled(copy.deepcopy(graph), inputs, {**options, "cpp_wrapper": True})
            except Exception:  # not all that Python can call, that can
                return compiled(graph, inputs, options)
        return compiled(graph, inputs, options)

    def _whole(self, graph: Any, inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        with not_donated():
            return compile_fx(graph, inputs, config_patches=options)  # type: ignore[return-value]  # a callable

    def _direct(self, graph: Any, inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        found: list[tuple[Any, int, bool]] = []

        def inner(graph: Any, inputs: Sequence[Any], **options: Any) -> Any:
            code = compile_fx_inner(graph, inputs, **options)
            found.append((code, len(inputs), _is_whole()))
            return code

        with config.patch(enable_autograd_cache=False):  # else what was compiled before is not given to inner
            compiled = compile_fx(graph, inputs, inner_compile=inner, config_patches=options)
        if len(found) == 1 and found[0][1] == len(inputs) and found[0][2]:
            call = getattr(found[0][0], "current_callable", None)
            if callable(call):
                return _flat(call)
        return compiled  # type: ignore[return-value]  # a callable


def not_donated() -> contextlib.AbstractContextManager[Any]:
    """Have gradients taken for a look before backward is run: what backward is given, it is not to write over."""
    from torch._functorch import config

    patched: contextlib.AbstractContextManager[Any] = config.patch(donated_buffer=False, enable_autograd_cache=False)
    return patched


def _flat(call: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    def of_arguments(*arguments: Any) -> Any:
        return call([*arguments])

    return of_arguments


def _is_whole() -> bool:
    """Whether the graph in hand needs nothing around it: inputs are written within it, and outputs are new tensors."""
    try:
        from torch._functorch._aot_autograd.schemas import MutationType, OutputType, PlainTensorMeta

        found: Any = torch._guards.TracingContext.get().fw_metadata
        within = (MutationType.NOT_MUTATED, MutationType.MUTATED_IN_GRAPH)
        return (
            not found.tokens
            and not found.num_intermediate_bases
            and not getattr(found, "num_graphsafe_rng_states", 0)
            and all(one.output_type is OutputType.non_alias for one in found.output_info)
            and all(one.mutation_type in within and not one.mutates_metadata for one in found.input_info)
            and all(isinstance(one, PlainTensorMeta) for one in (*found.subclass_inp_meta, *found.subclass_fw_graph_out_meta))
        )
    except Exception:  # of another version of torch: its own runtime is always right
        return False
