"""Encoding: a tree of plain values and tensors as JSON text and a mapping of tensors.

Nothing else can be written, and nothing that is read is executed, imported or looked up: a tensor stands in the JSON as
``{"$tensor": name}``, a number that JSON lacks as ``{"$float": "nan"}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import CheckpointError, kind_of

TENSOR, FLOAT = "$tensor", "$float"
FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """Split a tree into JSON text and tensors (on the CPU, contiguous).

    >>> text, tensors = encode({"a": [1, torch.tensor(2.0)]})
    >>> text, tensors
    ('{"a":[1,{"$tensor":"a/1"}]}', {'a/1': tensor(2.)})

    Raises:
        CheckpointError: naming the place of a value that is no number, text, None, tensor, list or mapping with text keys.

    """
    tensors: dict[str, Tensor] = {}
    plain = _encoded(tree, (), tensors)
    return json.dumps(plain, allow_nan=False, separators=(",", ":"), ensure_ascii=True), tensors


def decode(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree together again.

    Raises:
        CheckpointError: for anything that ``encode`` does not write.

    """
    try:
        plain = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        return _decoded(plain, tensors)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the state is no JSON that axontrain wrote: {error or type(error).__name__}") from error


def _encoded(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {FLOAT: str(float(value))}
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(f"{_place(path)} is a tensor that is not dense ({value.layout}): it cannot be saved")
        name = base = "/".join(path)
        number = 2
        while name in tensors:
            name, number = f"{base}#{number}", number + 1
        tensors[name] = value.detach().to("cpu").contiguous()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise CheckpointError(f"{_place(path)} has the key {key!r}: keys are text that does not begin with $")
        return {key: _encoded(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
    raise CheckpointError(
        f"{_place(path)} is {kind_of(value)}, which cannot be saved: a state_dict holds numbers, text, None, tensors, and "
        f"lists and mappings of them"
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        if value[TENSOR] not in tensors:
            raise ValueError(f"it names a tensor {value[TENSOR]!r} that is not there")
        return tensors[value[TENSOR]]
    if set(value) == {FLOAT}:
        if value[FLOAT] not in FLOATS:
            raise ValueError(f"{value[FLOAT]!r} is no number")
        return FLOATS[value[FLOAT]]
    if any(key.startswith("$") for key in value):
        raise ValueError("a key begins with $")
    return {key: _decoded(item, tensors) for key, item in value.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _place(path: tuple[str, ...]) -> str:
    return f"the state's {'/'.join(path)!r}" if path else "the state"
