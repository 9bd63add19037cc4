"""Encoding: a tree of plain values and tensors as JSON text and a mapping of tensors.

Nothing else can be written, and nothing that is read is executed, imported or looked up: a tensor stands in the JSON as
``{"$tensor": name}``, a number that JSON lacks as ``{"$float": "nan"}``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import CheckpointError, kind_of
from axontrain.host import on_cpu
from axontrain.shown import LONGEST, plain, quoted

TENSOR, FLOAT = "$tensor", "$float"
FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# What is written can be read back: however deep the stack is by then, and however Python's limit of digits is set.
DEPTH = 100
DIGITS = 640
BEYOND = 10**DIGITS

MOST_VALUES = 2_000_000  # each takes time, and some hundred bytes of memory, however short it is in the file

# What safetensors has a name for.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def encode(tree: Any, place: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> tuple[str, dict[str, Tensor]]:
    """Split a tree into JSON text and tensors (on the CPU, contiguous, no two of one storage).

    With ``place``, the tensors are what it returns for those of the tree, which are then as they are there, on any device.

    What is read back is of the plain types: of any mapping (OrderedDict, defaultdict, Counter) a dict, of a tuple or a named
    tuple a list, of a subclass of float or str (``numpy.float64``) a float or str, of a Parameter a tensor. A
    ``load_state_dict`` that needs another type makes it of that.

    >>> text, tensors = encode({"a": [1, torch.tensor(2.0)]})
    >>> text, tensors
    ('{"a":[1,{"$tensor":"state/a/1"}]}', {'state/a/1': tensor(2.)})
    >>> decode(text, tensors), decode(*encode((1, 2)))
    ({'a': [1, tensor(2.)]}, [1, 2])

    Raises:
        CheckpointError: naming the place of a value that is no number, text, None, tensor, list or mapping with text keys,
            or that could not be read back.
    """
    tensors: dict[str, Tensor] = {}
    plain = _encoded(tree, (), tensors)
    text = json.dumps(plain, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    if _values(text) > MOST_VALUES:
        raise CheckpointError(
            f"the state has {_values(text):,} values, and no more than {MOST_VALUES:,} are read back: hold long lists of "
            f"numbers as tensors"
        )
    return text, place(tensors) if place is not None else _apart(tensors)


def decode(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree together again.

    Raises:
        CheckpointError: for anything that ``encode`` does not write.
    """
    left = dict(tensors)
    try:
        tree = _decoded(parsed(text), left, 0)
        if left:
            raise ValueError(f"it does not speak of {len(left)} of the tensors, as {quoted(next(iter(left)))}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the state is no JSON that axontrain wrote: {plain(error)}") from error
    return tree


def parsed(text: str) -> Any:
    """Parse JSON more strictly than Python does, and within a bound of time and memory.

    Raises:
        ValueError: for what is no JSON, has a key twice in an object, a number without bounds or too many values.
        RecursionError: for what is nested too deep.
    """
    if _values(text) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)


def _encoded(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if len(path) > DEPTH:
        raise CheckpointError(f"{_place(path[:6])} goes on for more than {DEPTH} levels, or holds itself: it cannot be saved")
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        if abs(value) >= BEYOND:
            raise CheckpointError(f"{_place(path)} is a number of more than {DIGITS} digits: it could not be read back")
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {FLOAT: str(float(value))}
    if isinstance(value, Tensor):
        name = _name(path, tensors)
        tensors[name] = _dense(value, path)
        return {TENSOR: name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise CheckpointError(
                    f"{_place(path)} has the key {quoted(key)}: keys are text that does not begin with ${_for_key(key)}"
                )
        return {key: _encoded(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
    raise CheckpointError(
        f"{_place(path)} is {_kind(value)}, which cannot be saved{_instead(value)}: a state_dict holds numbers, text, None, "
        f"tensors, and lists and mappings of them"
    )


def _kind(value: Any) -> str:
    return f"NumPy's {kind_of(value)}" if type(value).__module__ == "numpy" else kind_of(value)


def _instead(value: Any) -> str:
    """What may stand for a value of another kind, where something does."""
    if type(value).__module__ == "numpy":  # it is not imported for this
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            return ". Save x.item(), which is Python's own"
        return ". Save torch.from_numpy(x), and make it an array again with x.numpy()" if hasattr(value, "__array__") else ""
    if isinstance(value, complex):
        return ". Save [x.real, x.imag]"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ". Save torch.tensor(list(x), dtype=torch.uint8), or x.hex()"
    if isinstance(value, Enum):
        return ". Save x.value, or x.name"
    if isinstance(value, (Set, Sequence, Iterator)):
        return ". Save sorted(x)" if isinstance(value, Set) else ". Save list(x)"
    if isinstance(value, (os.PathLike, torch.device, torch.dtype)):
        return ". Save str(x)"
    return ". Save its state_dict()" if callable(getattr(value, "state_dict", None)) else ""


def _for_key(key: object) -> str:
    return "" if isinstance(key, str) else f"; str(key) is {quoted(str(key))}" if isinstance(key, (int, float)) else ""


def _name(path: tuple[str, ...], tensors: Mapping[str, Tensor]) -> str:
    """A tensor's name: its place, for people to read. It is looked up as it is, and never is a path of files."""
    # safetensors keeps "__metadata__" for itself, so that no name begins with a key; and it writes UTF-8 only.
    name = base = "/".join(("state", *path)).encode("utf-8", "backslashreplace").decode("utf-8")
    number = 2
    while name in tensors:  # keys may hold a slash
        name, number = f"{base}#{number}", number + 1
    return name


def _dense(value: Tensor, path: tuple[str, ...]) -> Tensor:
    if value.layout is not torch.strided:
        raise CheckpointError(f"{_place(path)} is a tensor that is not dense ({value.layout}): it cannot be saved")
    if value.dtype not in DTYPES or value.is_meta:
        raise CheckpointError(f"{_place(path)} is {kind_of(value)} on {value.device}: safetensors holds no such tensor")
    # A conjugate or negative view is a flag on other numbers, and the bytes are what is written.
    return value.detach().resolve_conj().resolve_neg()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor a storage of its own, which safetensors insists on: tied weights and slices are written each whole."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, given in on_cpu(tensors).items():
        tensor = given.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return apart


def _decoded(value: Any, left: dict[str, Tensor], depth: int) -> Any:
    """The value with the tensors in it, each of which is taken from what is left of them: none stands in two places."""
    if depth > DEPTH:
        raise ValueError(f"it goes on for more than {DEPTH} levels")
    if isinstance(value, list):
        return [_decoded(item, left, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    if not isinstance(value, dict):
        return value
    for key in value:
        if key.startswith("$"):
            return _marked(value, left)
    return {key: _decoded(item, left, depth + 1) for key, item in value.items()}


def _marked(value: dict[str, Any], left: dict[str, Tensor]) -> Any:
    key, item = next(iter(value.items()))
    if len(value) > 1 or key not in (TENSOR, FLOAT):
        raise ValueError("a key begins with $")
    if key == TENSOR:
        if not isinstance(item, str) or item not in left:
            raise ValueError(f"it names a tensor {quoted(item)} that is not there, or that stands elsewhere already")
        return left.pop(item)
    if not isinstance(item, str) or item not in FLOATS:
        raise ValueError(f"{quoted(item)} is no number")
    return FLOATS[item]


def _values(text: str) -> int:
    """About how many values a JSON text has: no fewer."""
    return text.count(",") + text.count("[") + text.count("{") + 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:  # the time to read it grows with the square
        raise ValueError(f"a number has more than {DIGITS} digits")
    return int(digits)


def _place(path: tuple[str, ...]) -> str:
    return f"the state's {quoted('/'.join(path), LONGEST)}" if path else "the state"
