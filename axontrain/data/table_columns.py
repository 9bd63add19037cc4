"""Columns of Arrow tables as tensors, and as what is no tensor: text, bytes, lists of differing lengths."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from axontrain.data.table_files import arrow
from axontrain.errors import DataError

# torch has these, but no index_select of them.
_SIGNED = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}
_PER_DAY = {"s": 86_400, "ms": 86_400 * 10**3, "us": 86_400 * 10**6, "ns": 86_400 * 10**9}


class Objects:
    """A column of values that are no tensor, or not all of one length: an Arrow array, and what is made of an item."""

    def __init__(self, array: Any, made: Callable[[Any], Any]) -> None:
        self.array, self.made = array, made

    def __getitem__(self, index: int) -> Any:
        return self.made(self.array[index])


def types_of(schema: Any, columns: list[str]) -> dict[str, Any]:
    """The type of each column."""
    return {field.name: field.type for field in schema if field.name in columns}


def check_types(schema: Any, path: Path, columns: list[str]) -> None:
    """Raise for a column of which no tensor can be made, nor text or bytes."""
    for name in columns:
        kind = _plain(schema.field(name).type)
        if not (_is_numeric(kind) or _is_text(kind) or _is_list_of_numbers(kind)):
            raise DataError(
                f"column {name!r} of {path} is {schema.field(name).type}, of which no tensor can be made: leave it out "
                f"(columns=[...]), or give decode=, a function of one row that makes the sample"
            )


def missing(column: str, count: int, where: str) -> DataError:
    """The error for values that are missing."""
    what = "1 value is" if count == 1 else f"{count} values are"
    return DataError(
        f"column {column!r} of {where}: {what} missing (null). Fill them in the file, leave the column out (columns=[...]), "
        f"give like=, Columns with a fill, or decode=, which is given None there"
    )


def whole_array(column: Any) -> Any:
    """A column, which may be in parts, dictionary-encoded or of an extension type, as one array of plain values."""
    types, pyarrow = arrow("types"), arrow()
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.num_chunks == 1:
        array = column.chunk(0)
    else:
        if types.is_string(column.type):  # in one array, these hold 2 GB
            column = column.cast(pyarrow.large_string())
        elif types.is_binary(column.type):
            column = column.cast(pyarrow.large_binary())
        array = column.combine_chunks()
    return array.storage if isinstance(array, pyarrow.ExtensionArray) else array


def column_of(array: Any, name: str, where: str) -> Tensor | Objects:
    """A column as a tensor, or as items where it is none."""
    if array.null_count:
        raise missing(name, array.null_count, where)
    if _is_numeric(array.type):
        return _tensor(array, name, where)
    if _is_list_of_numbers(array.type) and array.flatten().null_count:
        raise missing(name, array.flatten().null_count, where)
    return objects_of(array, name, where)


def objects_of(array: Any, name: str, where: str) -> Objects:
    """A column as items of Python's own: what decode is given."""
    types = arrow("types")
    if _is_list_of_numbers(array.type) or (types.is_fixed_size_list(array.type) and _is_numeric(array.type)):

        def numbers(item: Any) -> Tensor | None:
            values = item.values
            return None if values is None else _tensor(values, name, where).clone()

        return Objects(array, numbers)
    return Objects(array, operator.methodcaller("as_py"))


def _tensor(array: Any, name: str, where: str) -> Tensor:
    # Of numbers, without a copy where Arrow and torch store them alike; what is given out are copies.
    pyarrow, types = arrow(), arrow("types")
    kind = array.type
    if array.null_count:
        raise missing(name, array.null_count, where)
    if types.is_fixed_size_list(kind):
        flat = _tensor(array.flatten(), name, where)
        return flat.reshape(len(array), kind.list_size, *flat.shape[1:])
    if types.is_boolean(kind):
        return from_dlpack(array.cast(pyarrow.uint8())).bool()
    if types.is_temporal(kind):
        return _days(array)
    if types.is_decimal(kind):
        return from_dlpack(array.cast(pyarrow.float64()))
    if str(kind) in _SIGNED:
        try:
            array = array.cast(_SIGNED[str(kind)])
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"column {name!r} of {where}: {kind} values beyond those of int64: {error}") from error
    return from_dlpack(array)


def _days(array: Any) -> Tensor:
    pyarrow, types = arrow(), arrow("types")
    kind = array.type
    if types.is_date32(kind):
        return from_dlpack(array.cast(pyarrow.int32())).double()
    count = array.cast(pyarrow.int32() if types.is_time32(kind) else pyarrow.int64())
    return from_dlpack(count).double() / _PER_DAY["ms" if types.is_date64(kind) else kind.unit]


def _is_numeric(kind: Any) -> bool:
    types = arrow("types")
    if types.is_fixed_size_list(kind):
        return _is_numeric(kind.value_type)
    times = types.is_temporal(kind) and not types.is_interval(kind)
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind) or times)


def _is_text(kind: Any) -> bool:
    types = arrow("types")
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in texts + binaries)


def _is_list_of_numbers(kind: Any) -> bool:
    types = arrow("types")
    return (types.is_list(kind) or types.is_large_list(kind)) and _is_numeric(kind.value_type)


def _plain(kind: Any) -> Any:
    if arrow("types").is_dictionary(kind):
        return kind.value_type
    return kind.storage_type if isinstance(kind, arrow().BaseExtensionType) else kind
