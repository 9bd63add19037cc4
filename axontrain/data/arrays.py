"""ArrayDataset: tensors and arrays in memory, gathered a batch at a time."""

from __future__ import annotations

import copy
import hashlib
import mmap
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from axontrain.data.structure import fields, is_record
from axontrain.errors import ConfigurationError, DataError, OutOfRangeError, kind_of
from axontrain.host import placed

if TYPE_CHECKING:
    from axontrain.data.frames import Columns, Spec


class ArrayDataset:
    """Arrays of one length as a dataset: in memory, or on the GPU.

    Args:
        *arrays: tensors, NumPy arrays, numeric columns or lists, each of N rows. One array gives batches that are a bare
            tensor, several give tuples, and a single mapping ``{name: array}`` gives mappings. Structures nest: a mapping,
            a tuple, a named tuple or a dataclass instance of arrays gives batches (or parts of them) of the same kind. A
            list is an array.

    Attributes:
        tensors: the arrays, in the order in which they stand in the structure.
        names: the keys, where the structure is one mapping of arrays; else None.
        channels_last: whether images of one of them lie in memory with their channels last.
        columns: how a data frame was encoded, where ``from_frame`` made the dataset; else None.

    Tensors and NumPy arrays are not copied, except for arrays that are read-only (a data frame's columns) or run backwards,
    which torch does not take. A file that is mapped (``np.load(path, mmap_mode="r")``) is not copied, so that it may be larger
    than memory; nothing may write to its part of ``tensors``. Samples and batches are copies, so that nothing done to them
    reaches the data. Those of images that lie in memory with their channels last (``torch.channels_last``, or NumPy's
    (N, H, W, C) seen as (N, C, H, W)) lie so too.

    >>> data = ArrayDataset(torch.arange(6.0).reshape(3, 2), [0, 1, 0])
    >>> len(data), data[1]
    (3, (tensor([2., 3.]), tensor(1)))
    >>> data.gather(torch.tensor([2, 0]))[1]
    tensor([0, 0])
    >>> ArrayDataset({"numbers": torch.arange(6.0).reshape(3, 2), "city": [4, 7, 4]}, [0, 1, 0])[1]
    ({'numbers': tensor([2., 3.]), 'city': tensor(7)}, tensor(1))

    Raises:
        DataError: if there is no array, lengths differ, or an array is not numeric.
    """

    pure = True  # gathering draws nothing and runs nobody's code

    def __init__(self, *arrays: Any) -> None:
        found: list[tuple[str | int, Any]] = []
        self._structure = _taken(arrays[0] if len(arrays) == 1 else arrays, (), found)
        if not found:
            raise DataError("ArrayDataset() needs an array: ArrayDataset(inputs, targets) or ArrayDataset({'x': inputs})")
        self._labels = tuple(label for label, _ in found)
        self.tensors: tuple[Tensor, ...] = tuple(_tensor(array, label) for label, array in found)
        self.mapped = any(_mapped(array) for _, array in found)  # a file's memory, which a copy would bring in
        self.columns: Columns | None = None
        if len({len(tensor) for tensor in self.tensors}) > 1:
            sizes = {label: len(tensor) for label, tensor in zip(self._labels, self.tensors, strict=True)}
            raise DataError(f"ArrayDataset: the arrays differ in length: {sizes}; each has one row a sample")
        self.channels_last = any(map(_channels_last, self.tensors))

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        inputs: Spec | None = None,
        targets: Spec | bool | None = None,
        *,
        fill: Any = None,
        unseen: str = "error",
        dtype: torch.dtype = torch.float32,
        like: ArrayDataset | Columns | None = None,
    ) -> ArrayDataset:
        """A dataset of a data frame's rows: of pandas, polars, Arrow, or whatever else narwhals reads.

        Args:
            frame: the data frame; a lazy one is collected.
            inputs: a column's name for a vector (N,), a list of names for one matrix (N, F), a mapping of either; None for a
                matrix of all columns that are no targets.
            targets: likewise; None for batches of the inputs alone. Beside ``like``, False takes the inputs alone of a frame
                that has no targets, as to predict.
            fill: what stands for nulls, which are an error otherwise.
            unseen: whether a string that the vocabulary has not got is an "error" or code "zero".
            dtype: of the numbers.
            like: the dataset (or its ``columns``) that this frame is to be encoded like: the same columns, vocabularies and
                fills. Nothing else is given then, but for ``targets=False``.

        How each type is encoded stands at :class:`Columns`; the dataset keeps it in ``columns``.

        >>> import pandas as pd
        >>> frame = pd.DataFrame({"age": [31, 45, 27], "city": ["Rome", "Bonn", "Rome"], "left": [True, False, False]})
        >>> train = ArrayDataset.from_frame(frame, inputs={"numbers": ["age"], "city": "city"}, targets="left")
        >>> train[0]
        ({'numbers': tensor([31.]), 'city': tensor(1)}, tensor(1))
        >>> ArrayDataset.from_frame(frame[1:], like=train)[0]
        ({'numbers': tensor([45.]), 'city': tensor(0)}, tensor(0))

        Raises:
            ConfigurationError: for arguments that cannot work, or that stand beside ``like``.
            DataError: for a column that is missing or of a type that cannot be encoded, for nulls and unseen values.
        """
        from axontrain.data.frames import Columns  # here, for only those who have frames need it

        if like is None:
            if isinstance(targets, bool):
                raise ConfigurationError(f"from_frame(targets={targets}) goes with like=: leave it out for no targets")
            columns = Columns(inputs, targets, fill=fill, unseen=unseen, dtype=dtype)
            frame = columns.read(frame)  # once, not once for each of the two
            columns.learn(frame)
        else:
            given = {"inputs": inputs, "targets": None if targets is False else targets, "fill": fill}
            beside = [name for name, value in given.items() if value is not None]
            beside += ["unseen"] * (unseen != "error") + ["dtype"] * (dtype != torch.float32)
            if beside:
                raise ConfigurationError(f"from_frame(like=...) takes all from there: leave out {', '.join(beside)}")
            of = like.columns if isinstance(like, ArrayDataset) else like
            if not isinstance(of, Columns):
                what = "an ArrayDataset that from_frame did not make" if of is None else kind_of(of)
                raise ConfigurationError(f"from_frame(like=...) is {what}: give a dataset made by from_frame, or its columns")
            columns = of
        data = cls(columns.encode(frame, targets=targets is not False))
        data.columns = columns
        return data

    @property
    def on_one_device(self) -> bool:
        """Whether all arrays are on one device."""
        return len({tensor.device for tensor in self.tensors}) == 1

    @property
    def bare(self) -> bool:
        """Whether a batch is a single tensor."""
        return self._structure is None

    @property
    def flat(self) -> bool:
        """Whether a batch is a plain tuple of two or more tensors, so that there is nothing to assemble."""
        kind, _, parts = self._structure or (None, (), ())
        return kind is tuple and len(parts) > 1 and not any(parts)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The keys, where a batch is a mapping of tensors; else None."""
        kind, keys, parts = self._structure or (None, (), ())
        return keys if kind is dict and not any(parts) else None

    def assemble(self, parts: tuple[Any, ...]) -> Any:
        """Put flat parts, one for each of ``tensors``, together in the structure that the arrays were given in.

        >>> ArrayDataset({"x": [1, 2]}, [3, 4]).assemble(("a", "b"))
        ({'x': 'a'}, 'b')
        """
        return _assembled(self._structure, iter(parts))

    def __len__(self) -> int:
        return self.tensors[0].shape[0]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.assemble(tuple(tensor[index].clone() for tensor in self.tensors))
        except IndexError as error:
            if not isinstance(index, Integral):
                raise
            raise OutOfRangeError(f"ArrayDataset: there is no sample {index}: it has {len(self)}") from error

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The samples at ``indices``: torch's own protocol, so that its DataLoader gathers at once too."""
        gathered = [tensor.unbind() for tensor in self._gathered(_indices(indices))]
        return [self.assemble(sample) for sample in zip(*gathered, strict=True)]

    def gather(self, indices: Tensor) -> Any:
        """The batch at ``indices`` (B,), each 0 to ``len(self) - 1``, as a copy.

        Raises:
            DataError: (an IndexError too) for an index out of range; on a GPU it is torch's own, and comes later.
        """
        return self.assemble(self._gathered(indices))

    def rows(self, places: Tensor) -> tuple[Tensor, ...]:
        """The rows at places on the arrays' device, of each array, lying in memory as they do in it."""
        return tuple([_rows(tensor, places) for tensor in self.tensors])

    def bytes_per_sample(self) -> int:
        """The size of one row over all arrays."""
        return sum(t.element_size() * (t[:1].numel() if len(t) else 1) for t in self.tensors)

    def digest(self) -> str:
        """Of the first, the middle and the last row, and of what kind they are: other data has another."""
        made = hashlib.blake2b(digest_size=8)
        for tensor in self.tensors:
            rows = tensor[[0, len(self) // 2, -1]] if len(self) else tensor
            made.update(f"{rows.dtype} {tuple(rows.shape)}".encode())
            made.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if rows.numel() else b"")
        return made.hexdigest()

    def to(self, device: torch.device | str) -> ArrayDataset:
        """A dataset of the same rows on another device."""
        return self._of(tuple(tensor.to(device) for tensor in self.tensors))

    def subset(self, indices: Any) -> ArrayDataset:
        """A dataset of the rows at ``indices``, copied."""
        return self._of(self._gathered(_indices(indices)))

    def __repr__(self) -> str:
        of = ", ".join(f"{n}: {kind_of(t)}" for n, t in zip(self._labels, self.tensors, strict=True))
        return f"ArrayDataset({len(self)} samples, {of})"

    def _of(self, tensors: tuple[Tensor, ...]) -> ArrayDataset:
        other = copy.copy(self)
        other.tensors, other.mapped = tensors, False
        other.channels_last = any(map(_channels_last, tensors))
        return other

    def _gathered(self, indices: Tensor) -> tuple[Tensor, ...]:
        try:
            if self.channels_last:
                return tuple(_rows(tensor, placed(indices, tensor.device)) for tensor in self.tensors)
            return tuple(tensor.index_select(0, placed(indices, tensor.device)) for tensor in self.tensors)
        except (IndexError, RuntimeError) as error:
            # torch names no index, and looking for it beforehand would cost each batch. On a GPU its error comes later, and
            # nothing can be read after it.
            n = len(self)
            if isinstance(error, IndexError) or n == 0:
                _raise_outside(indices, n, error)
            raise


def _channels_last(tensor: Tensor) -> bool:
    """Whether images (N, C, H, W), or volumes, lie in memory with their channels last."""
    kind = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return kind is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=kind)


def _rows(tensor: Tensor, places: Tensor) -> Tensor:
    """Rows of a tensor, as they lie in it: ``index_select`` gives them as (B, C, H, W), and takes its time for that."""
    if not _channels_last(tensor):
        return tensor.index_select(0, places)
    return tensor.movedim(1, -1).index_select(0, places).movedim(-1, 1)


def _raise_outside(indices: Tensor, n: int, error: Exception) -> None:
    wrong = indices[(indices < 0) | (indices >= n)].tolist()
    if wrong:
        more = f" (nor {len(wrong) - 1} more of the indices)" if len(wrong) > 1 else ""
        has = f"{n}, whose indices are 0 to {n - 1}" if n else "none"
        raise OutOfRangeError(f"ArrayDataset: there is no sample {wrong[0]}{more}: it has {has}") from error


# What a batch is put together as: None for a tensor, else (the type, the keys or field names, the structure of each part).
# Plain values, so that a dataset can be sent to a worker.
_Structure = tuple[type, tuple[Any, ...], tuple[Any, ...]] | None


def _taken(value: Any, path: tuple[Any, ...], found: list[tuple[str | int, Any]]) -> _Structure:
    """The structure of ``value``; its arrays are put into ``found``, each after its place."""
    kind: type = tuple
    if isinstance(value, Mapping):
        kind, parts = dict, dict(value)
    elif isinstance(value, tuple):
        if hasattr(value, "_fields"):
            kind = type(value)
        parts = dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    elif is_record(value) and not hasattr(value, "__array__"):
        kind = type(value)
        parts = {name: getattr(value, name) for name in fields(value)}
    else:
        found.append((path[0] if len(path) == 1 else ".".join(map(str, path)) or 0, value))
        return None
    return kind, tuple(parts), tuple(_taken(part, (*path, key), found) for key, part in parts.items())


def _assembled(structure: _Structure, parts: Iterator[Any]) -> Any:
    if structure is None:
        return next(parts)
    kind, keys, within = structure
    values = [next(parts) if part is None else _assembled(part, parts) for part in within]
    if kind is tuple:
        return tuple(values)
    if kind is dict:
        return dict(zip(keys, values, strict=True))
    if issubclass(kind, tuple):
        return kind._make(values)  # type: ignore[attr-defined]  # a named tuple
    made = object.__new__(kind)  # a dataclass: its own checks are of what was given, not of each batch
    for key, value in zip(keys, values, strict=True):
        object.__setattr__(made, key, value)  # frozen ones too
    return made


# torch has them, but no index_select of them: the first shuffled batch would fail.
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _tensor(array: Any, label: str | int) -> Tensor:
    if not isinstance(array, Tensor):
        kind = kind_of(array)
        nulls = _nulls(array)
        if nulls:
            raise DataError(
                f"ArrayDataset: array {label!r}, {kind}, has {nulls} null{'s' if nulls > 1 else ''}, which would become NaN: "
                f"fill them, or read the frame by ax.ArrayDataset.from_frame(frame, ..., fill=...)"
            )
        try:
            array = array.to_numpy() if hasattr(array, "to_numpy") else array
            flags = getattr(array, "flags", None)
            if flags is not None and min(array.strides, default=0) < 0:
                array = array.copy()
            elif flags is not None and not flags.writeable:
                array = _writeable(array) if _mapped(array) else array.copy()
            array = torch.as_tensor(array)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"ArrayDataset: array {label!r} is {kind}, which is not numeric: {error}. Text, dates and categories of a "
                f"data frame: ax.ArrayDataset.from_frame(frame, inputs=[...], targets='y')"
            ) from error
    if array.dtype in _UNSIGNED:
        kind = str(array.dtype).removeprefix("torch.")
        raise DataError(f"ArrayDataset: array {label!r} is of {kind}, of which torch gathers no rows: make it int32 or int64")
    if array.dim() == 0:
        raise DataError(
            f"ArrayDataset: array {label!r} is a single number; it has one row a sample (a list of numbers is an array, a "
            f"tuple a structure of arrays)"
        )
    tensor: Tensor = array.detach()
    return tensor


def _nulls(array: Any) -> int:
    """The nulls in a column of a data frame, or in a frame: of polars, of Arrow, and of the types of pandas that have them."""
    count = getattr(array, "null_count", None)
    count = count() if callable(count) else count
    if count is not None:
        return sum(map(sum, count.rows())) if hasattr(count, "rows") else int(count)
    kinds = getattr(array, "dtypes", None)
    kinds = [] if kinds is None else list(kinds) if hasattr(kinds, "__iter__") else [kinds]
    if not any(type(getattr(kind, "na_value", None)).__name__ == "NAType" for kind in kinds):
        return 0  # where pandas has only NaN, that is a number as any other
    found = array.isna().sum()
    return int(found.sum() if hasattr(found, "sum") else found)


def _mapped(array: Any) -> bool:
    """Whether the memory of ``array`` is a mapped file's, whatever slices and views lie between."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return array is not None


class _Unlocked:
    """NumPy's array interface to the memory of a read-only array, which it keeps alive, without the mark."""

    def __init__(self, array: Any) -> None:
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _writeable(array: Any) -> Any:
    """The same memory as an array that torch takes without a warning: a dataset reads from it, and never writes to it."""
    import numpy as np

    return np.asarray(_Unlocked(array))


def _indices(indices: Any) -> Tensor:
    found = _tensor(indices, "indices")
    return found if found.numel() else found.long()  # an empty list would be one of floats
