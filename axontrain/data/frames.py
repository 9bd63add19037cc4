"""Columns: which columns of a data frame are inputs and targets, and how each is encoded as numbers."""

from __future__ import annotations

import datetime as dt
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from axontrain.data.series import KINDS, as_text, distinct, kind_in, listed, narwhals, numbers, numpy, table_of, without_nulls
from axontrain.errors import CheckpointError, ConfigurationError, DataError, kind_of, unknown

Spec = str | list[str] | Mapping[str, str | list[str]]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}

WHOLE = ("integer", "boolean", "category")  # int64 when alone

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Columns:
    """How the columns of a data frame become tensors, the same way for each frame to come.

    Args:
        inputs: a column's name for a vector (N,), a list of names for one matrix (N, F), or a mapping ``{name: column or list
            of columns}`` for a mapping of those; None for a matrix of all columns that are no targets.
        targets: likewise; None for batches of the inputs alone, else they are pairs of inputs and targets.
        fill: what stands for nulls (and NaN) in all inputs, or a mapping ``{column: value}``, of targets too; without it nulls
            are an error. A date is filled by a ``datetime``, a duration by a ``timedelta``, a category by a string.
        unseen: what a string becomes that ``learn`` has not met: an "error", or code "zero", which is kept for such values in
            the inputs, so that the codes of the others are 1 to ``len(vocabulary(name))``. In targets it is an error always.
        dtype: of numbers; a floating one.

    ==============================  =====================================  ====================
    a column of                     holds                                  dtype of it alone
    ==============================  =====================================  ====================
    floats, decimals                the numbers                            ``dtype``
    integers                        the numbers                            int64
    booleans                        0 and 1                                int64
    strings, categories, enums      codes from 0: places in a vocabulary   int64
    dates, datetimes                days since 1970-01-01, of UTC          ``dtype``
    durations                       days                                   ``dtype``
    ==============================  =====================================  ====================

    A matrix is of ``dtype``, unless all its columns are codes: then it is int64, as embeddings want it. A vocabulary is sorted,
    whatever the order of the rows; that of enums and of the categories of pandas has their own order. Of today's moments,
    float32 holds the time of day to three minutes.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"age": [31.0, None, 27.0], "city": ["Rome", "Bonn", "Rome"], "left": [True, False, False]})
    >>> columns = Columns({"numbers": ["age"], "city": "city"}, "left", fill={"age": 30.0}).learn(frame)
    >>> inputs, targets = columns.encode(frame)
    >>> inputs["numbers"].tolist(), inputs["city"], targets
    ([[31.0], [30.0], [27.0]], tensor([1, 0, 1]), tensor([1, 0, 0]))
    >>> columns.vocabulary("city")
    ['Bonn', 'Rome']

    Its state is of plain values: ``loop.state.attach("columns", columns)`` saves it with a run.

    Raises:
        ConfigurationError: for arguments that cannot work.
    """

    def __init__(
        self,
        inputs: Spec | None = None,
        targets: Spec | None = None,
        *,
        fill: Any = None,
        unseen: str = "error",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.inputs = None if inputs is None else _spec("inputs", inputs)
        self.targets = None if targets is None else _spec("targets", targets)
        if unseen not in ("error", "zero"):
            raise unknown("way with unseen values", unseen, ("error", "zero"))
        if dtype not in DTYPES.values():
            raise ConfigurationError(f"dtype={dtype}: the numbers of a frame are of a floating dtype: {', '.join(DTYPES)}")
        self.unseen = unseen
        self.dtype = dtype
        if isinstance(fill, Mapping):
            self.fill: Any = {name: _plain(value) for name, value in fill.items() if value is not None}
        else:
            self.fill = _plain(fill)
        self._learned: dict[str, _Column] = {}
        self._used = False
        self._check_names(self.inputs)

    @property
    def names(self) -> list[str]:
        """The columns that are read, inputs first; before ``learn``, inputs=None adds none."""
        return [*_flat(self.inputs), *_flat(self.targets)]

    @property
    def input_names(self) -> list[str]:
        """The columns that are read for the inputs alone."""
        return list(_flat(self.inputs))

    def learn(self, frame: Any) -> Columns:
        """Learn types and vocabularies. Called again, for files read in parts, it adds the values of another frame.

        Raises:
            DataError: for a column that is missing or of a type that cannot be encoded, a fill that does not fit a column, or
                if codes that were given out already would change.
        """
        table = self.read(frame)
        inputs = self._inputs_of(table.columns)
        learned = {name: self._learning(name, table[name]) for name in [*_flat(inputs), *_flat(self.targets)]}
        bad = {name: table.schema[name] for name, column in learned.items() if column is None}
        if bad:
            raise DataError(
                f"these columns cannot be encoded: {', '.join(f'{name!r} ({dtype})' for name, dtype in bad.items())}: leave "
                f"them out of the inputs, or make numbers, booleans, strings or dates of them first"
            )
        self._replace(inputs, {name: column for name, column in learned.items() if column is not None})
        return self

    def encode(self, frame: Any, *, targets: bool = True) -> Any:
        """The tensors of a frame's N rows: inputs, or a pair of inputs and targets.

        Args:
            frame: a data frame with the columns that were learned; others do not matter.
            targets: False for the inputs alone: of a frame that has no targets, as to predict.

        Raises:
            DataError: for missing columns, nulls without a fill, values that the vocabulary has not got, columns of another
                kind than those learned, integers that ``dtype`` does not hold exactly.
        """
        if self.inputs is None or not self._learned:
            raise DataError("these columns have learned nothing yet: call learn(frame) first")
        table = self.read(frame, targets=targets)
        parts = {name: without_nulls(table[name]) for name in table.columns}
        for name, (present, _) in parts.items():
            self._check_kind(name, present)
        self._check_nulls(parts, len(table))
        values = {name: self._values(name, *part) for name, part in parts.items()}
        self._used = True
        encoded = self._tensors(self.inputs, values)
        return encoded if self.targets is None or not targets else (encoded, self._tensors(self.targets, values))

    def read(self, frame: Any, *, targets: bool = True) -> Any:
        """The columns of a frame that are needed, as narwhals' data frame; a lazy frame is collected.

        Raises:
            DataError: if ``frame`` is no data frame, or lacks a column: all that are missing, with the nearest names.
        """
        table = table_of(frame)
        has = list(table.collect_schema().names())
        of_targets = _flat(self.targets) if targets else []
        missing = [name for name in [*_flat(self.inputs), *of_targets] if name not in has]
        if missing:
            told = ", ".join(f"{name!r}{_near(name, has)}" for name in missing)
            alone = self._learned and set(missing) <= set(of_targets)
            raise DataError(
                f"the frame lacks the column{'s' * (len(missing) > 1)} {told}; it has {listed(has)}"
                + ("; targets=False takes the inputs alone" if alone else "")
            )
        table = table.select([*_flat(self._inputs_of(has)), *of_targets])
        return table.collect() if hasattr(table, "collect") else table

    def find(self, name: str, encoded: Any) -> Tensor:
        """The tensor (N,) of one column in what ``encode`` gave: a vector, or a column of a matrix.

        Raises:
            UnknownNameError: if it is none of the columns.
        """
        both = self.targets is not None and isinstance(encoded, tuple)
        for spec, part in ((self.inputs, encoded[0] if both else encoded), (self.targets, encoded[1] if both else None)):
            found = None if part is None else _found(spec, part, name)
            if found is not None:
                return found
        raise unknown("column", name, self.names)

    def vocabulary(self, name: str) -> list[str]:
        """The strings of a column in the order of their codes, which begin at 0 (inputs with unseen="zero": at 1).

        Raises:
            DataError: if the column has none.
        """
        column = self._learned.get(name)
        if name not in self.names:
            raise unknown("column", name, self.names)
        if column is None or column.kind != "category":
            raise DataError(
                f"column {name!r} has no vocabulary: it "
                + ("has not been learned" if column is None or column.kind is None else f"holds {KINDS[column.kind]}")
            )
        return list(column.vocabulary)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain values. Names stand in lists: they may begin with what a checkpoint keeps for itself."""
        each = isinstance(self.fill, dict)
        return {
            "inputs": _pairs(self.inputs),
            "targets": _pairs(self.targets),
            "fill": {"each": [[name, _written(fill)] for name, fill in self.fill.items()]} if each else _written(self.fill),
            "unseen": self.unseen,
            "dtype": str(self.dtype).removeprefix("torch."),
            "columns": [[name, *column.state()] for name, column in self._learned.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved.

        Raises:
            CheckpointError: if ``state`` is not of Columns.
            DataError: if rows were encoded already, in another way than the saved one.
        """
        try:
            fill = state["fill"]
            made = Columns(
                _unpaired(state["inputs"]),
                _unpaired(state["targets"]),
                fill={name: _read(value) for name, value in fill["each"]} if _is_each(fill) else _read(fill),
                unseen=state["unseen"],
                dtype=DTYPES[state["dtype"]],
            )
            made._learned = {name: _Column.of(*rest) for name, *rest in state["columns"]}
            if not set(made._learned) <= set(made.names):
                raise ValueError("it holds columns that are neither inputs nor targets")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is no state of data.Columns: {type(error).__name__}: {error}") from error
        if self._used and made._meaning() != self._meaning():
            raise DataError(
                "these columns have encoded rows already, in another way than the saved one: their codes would mean something "
                "else from here on. Encode the frame the saved way: "
                "ArrayDataset.from_frame(frame, like=Columns.from_state(saved))"
            )
        vars(self).update({**vars(made), "_used": self._used})

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Columns:
        """Make the columns that were saved.

        >>> columns = Columns(["a"], dtype=torch.float64)
        >>> Columns.from_state(columns.state_dict())
        Columns(['a'], dtype=torch.float64)

        Raises:
            CheckpointError: if ``state`` is not of Columns.
        """
        made = cls()
        made.load_state_dict(state)
        return made

    def __repr__(self) -> str:
        parts = [repr(part) for part in (self.inputs, self.targets)]
        parts = parts[: 2 if self.targets is not None else 1]
        parts += [f"fill={self.fill!r}"] * (self.fill is not None) + [f"unseen={self.unseen!r}"] * (self.unseen != "error")
        return f"Columns({', '.join(parts + [f'dtype={self.dtype}'] * (self.dtype != torch.float32))})"

    # ---- what is read, and what is wrong with it

    def _inputs_of(self, has: list[Any]) -> Any:
        if self.inputs is not None:
            return self.inputs
        inputs = [name for name in has if name not in _flat(self.targets)]
        if not inputs or not all(isinstance(name, str) for name in inputs):
            raise DataError(
                f"inputs=None takes all columns that are no targets; the frame has {listed(inputs)}"
                + (": columns are named by text, as by df.columns = df.columns.map(str)" if inputs else "")
            )
        return inputs

    def _check_names(self, inputs: Any) -> None:
        of_inputs, of_targets = _flat(inputs), _flat(self.targets)
        for what, names in (("inputs", of_inputs), ("targets", of_targets)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigurationError(f"among the {what} there is more than one {listed(twice)}: a column is taken once")
        both = [name for name in of_targets if name in of_inputs]
        if both:
            raise ConfigurationError(f"{listed(both)} is among the inputs and the targets: the model would be shown the answer")
        if isinstance(self.fill, dict) and inputs is not None:
            for name in self.fill:
                if name not in of_inputs and name not in of_targets:
                    raise unknown("column in fill:", name, [*of_inputs, *of_targets])

    def _check_kind(self, name: str, present: Any) -> None:
        learned, here = self._kind_of(name), kind_in(present.dtype)
        if learned is None or present.is_empty() or (here is not None and KINDS[here] == KINDS[learned]):
            return
        holds = f"holds {KINDS[here]} ({present.dtype})" if here else f"is of {present.dtype}, which cannot be encoded,"
        raise DataError(f"column {name!r} {holds} in this frame, and {KINDS[learned]} were learned of it")

    def _check_nulls(self, parts: Mapping[str, tuple[Any, Any]], rows: int) -> None:
        counts = {name: rows - len(present) for name, (present, keep) in parts.items() if keep is not None}
        left = {name: count for name, count in counts.items() if self._fill_of(name) is None}
        if left:
            told = ", ".join(f"{name!r} in {count} of {rows} rows" for name, count in left.items())
            raise DataError(
                f"the frame has nulls: {told}: give fill={{{', '.join(f'{name!r}: ...' for name in left)}}}, or drop these rows"
            )
        for name, count in counts.items():
            self._check_fill(name, self._kind_of(name), f", which has nulls in {count} of {rows} rows")

    def _check_fill(self, name: str, kind: str | None, which: str = "") -> None:
        fill = self._fill_of(name)
        whole = kind == "integer" and name in [*_alone(self.inputs), *_alone(self.targets)]
        if kind is not None and not _fits(fill, kind, whole):
            wanted = {
                "boolean": "True or False",
                "category": "a string",
                "date": "a date or datetime",
                "duration": "a timedelta",
            }
            raise DataError(
                f"fill={fill!r} does not fit column {name!r} of {KINDS[kind]}{which}: give "
                f"fill={{{name!r}: {wanted.get(kind, 'a whole number' if whole else 'a number')}}}"
            )

    def _meaning(self) -> tuple[Any, ...]:
        learned = {name: (column.kind, column.vocabulary) for name, column in self._learned.items()}
        return self.inputs, self.targets, self.fill, self.unseen, self.dtype, learned

    def _kind_of(self, name: str) -> str | None:
        return self._learned[name].kind if name in self._learned else None

    def _fill_of(self, name: str) -> Any:
        if isinstance(self.fill, dict):
            return self.fill.get(name)
        return None if name in _flat(self.targets) else self.fill  # nobody makes up labels without being told to

    # ---- learning

    def _learning(self, name: str, series: Any) -> _Column | None:
        """What is known of a column with this part of it; None where its type cannot be encoded."""
        known = self._learned.get(name, _Column())
        column = replace(known, vocabulary=list(known.vocabulary))
        present, keep = without_nulls(series)
        column.nulls = column.nulls or keep is not None
        if not present.is_empty():
            kind = kind_in(present.dtype)
            if kind is None:
                return None
            if column.kind is not None and KINDS[kind] != KINDS[column.kind]:
                raise DataError(
                    f"column {name!r} holds {KINDS[kind]} ({present.dtype}) in this frame, and {KINDS[column.kind]} were "
                    f"learned of it"
                )
            if kind == "category":
                column.add(*distinct(present))
            # Of whole numbers and others, the column is one of others.
            column.kind = "float" if {kind, column.kind} == {"integer", "float"} else kind
        if column.kind is not None and isinstance(self.fill, dict) and name in self.fill:
            self._check_fill(name, column.kind)
        fill = self._fill_of(name)
        # A fill that is meant for this column has a code from the start, one that is meant for all where it is needed.
        if column.kind == "category" and isinstance(fill, str) and (column.nulls or isinstance(self.fill, dict)):
            column.add([fill], ordered=column.ordered)
        return column

    def _replace(self, inputs: Any, learned: dict[str, _Column]) -> None:
        self._check_names(inputs)
        before = {name: column for name, column in self._learned.items() if column.kind is not None}
        changed = [
            name
            for name, column in before.items()
            if (column.kind, column.vocabulary) != (learned[name].kind, learned[name].vocabulary)
        ]
        if self._used and changed:
            raise DataError(
                f"{listed(changed)} would be encoded in another way from here on, and rows have been encoded already: learn "
                f"from all parts first, or from a new Columns"
            )
        self.inputs, self._learned = inputs, learned

    # ---- encoding

    def _values(self, name: str, present: Any, keep: Any) -> Any:
        """A column as a NumPy array of its own: int64, or of floats."""
        np = numpy()
        kind = self._kind_of(name) or kind_in(present.dtype) or "float"
        if self._kind_of(name) is None and (keep is not None or not present.is_empty()):
            raise DataError(
                f"column {name!r} had nothing but nulls when it was learned: learn from a frame that has values in it"
            )
        if present.is_empty():
            values = np.empty(0, dtype=np.int64 if kind in WHOLE else np.float64)
        elif kind == "category":
            values = self._codes(name, as_text(present))
        else:
            values = numbers(name, present)
        if keep is None:
            return values
        fill = self._filling(name, kind)
        if isinstance(fill, float) and not fill.is_integer() and values.dtype == np.int64:
            values = values.astype(np.float64)
        full = np.full(len(keep), fill, dtype=values.dtype)
        full[keep] = values
        return full

    def _table_of(self, name: str) -> dict[str, int]:
        first = 1 if self._zero(name) else 0
        return {value: code for code, value in enumerate(self._learned[name].vocabulary, first)}

    def _zero(self, name: str) -> bool:
        return self.unseen == "zero" and name not in _flat(self.targets)

    def _codes(self, name: str, text: Any) -> Any:
        codes, found = self._table_of(name), text.unique().to_list()
        strange = sorted(value for value in found if value not in codes)
        if strange and not self._zero(name):
            count = int(text.is_in(strange).sum())
            self._raise_unseen(name, strange, count)
        # Each value that is there is looked up once, and the rows by the library of the frame.
        numbers = text.replace_strict(found, [codes.get(value, 0) for value in found], return_dtype=narwhals().Int64)
        return numpy().array(numbers.to_numpy(), dtype="int64")

    def _raise_unseen(self, name: str, strange: list[str], count: int) -> None:
        target = name in _flat(self.targets)
        known = self._learned[name].vocabulary
        raise DataError(
            f"column {name!r} has {listed(strange)} in {count} row{'s' * (count > 1)}, which its vocabulary of {len(known)} "
            f"has not got: learn from all frames (columns.learn(frame) adds values)"
            + (" or leave these rows out: no class stands for what is unseen" if target else ", or take unseen='zero'")
        )

    def _filling(self, name: str, kind: str) -> Any:
        fill = self._fill_of(name)
        if kind == "category":
            codes = self._table_of(name)
            if fill not in codes and not self._zero(name):
                raise DataError(
                    f"column {name!r} has nulls, and its vocabulary has not got fill={fill!r}, since it had none when it was "
                    f"learned: give fill={{{name!r}: {fill!r}}}, so that it has from the start"
                )
            return codes.get(fill, 0)
        if kind == "date":
            return _days(fill)
        return fill / dt.timedelta(days=1) if kind == "duration" else int(fill) if kind == "boolean" else fill

    def _tensors(self, spec: Any, values: Mapping[str, Any]) -> Any:
        if isinstance(spec, dict):
            return {key: self._tensors(part, values) for key, part in spec.items()}
        if isinstance(spec, str):
            return self._tensor(spec, values[spec], alone=True)
        if all(self._kind_of(name) == "category" for name in spec):
            return torch.stack([torch.from_numpy(values[name]) for name in spec], dim=1)
        matrix = torch.empty(len(values[spec[0]]), len(spec), dtype=self.dtype)
        for index, name in enumerate(spec):
            matrix[:, index] = self._tensor(name, values[name], alone=False)
        return matrix

    def _tensor(self, name: str, values: Any, *, alone: bool) -> Tensor:
        np = numpy()
        kind = self._kind_of(name)
        if alone and kind in WHOLE:
            if values.dtype == np.int64:
                return torch.from_numpy(values)
            wrong = values[(values != np.trunc(values)) | (np.abs(values) >= 2.0**63)]
            if len(wrong):
                raise DataError(
                    f"column {name!r} has {wrong[0].item()!r} in this frame, and whole numbers were learned of it, which are "
                    f"int64: learn from a frame with such numbers too, or put it into a matrix: [{name!r}]"
                )
            return torch.from_numpy(values.astype(np.int64))
        name_of = str(self.dtype).removeprefix("torch.")
        exact = int(2 / torch.finfo(self.dtype).eps)
        if len(values) and (values.dtype == np.int64 or kind == "integer"):
            low, high = values.min().item(), values.max().item()
            if max(-low, high) > exact:
                raise DataError(
                    f"column {name!r} has {high if high > exact else low}, and {name_of} holds whole numbers exactly up to "
                    f"{exact} only: take it alone, as int64, by a mapping (inputs={{{name!r}: {name!r}, ...}})"
                    + ("" if self.dtype == torch.float64 else ", or dtype=torch.float64")
                )
        found = torch.from_numpy(values)
        made = found.to(self.dtype)
        if values.dtype != np.int64 and bool((made.isinf() & ~found.isinf()).any()):
            largest = found[made.isinf() & ~found.isinf()][0].item()
            raise DataError(f"column {name!r} has {largest:g}, which {name_of} does not hold: take dtype=torch.float64")
        return made


@dataclass
class _Column:
    """What was learned of one column."""

    kind: str | None = None  # None until there was a value
    vocabulary: list[str] = field(default_factory=list)
    ordered: bool = False  # whether its vocabulary came in an order of its own, which is kept
    nulls: bool = False

    def add(self, values: Iterable[str], ordered: bool) -> None:
        if not self.vocabulary:
            self.vocabulary, self.ordered = list(values), ordered
        elif self.ordered:
            known = set(self.vocabulary)
            self.vocabulary += [value for value in values if value not in known]
        else:
            self.vocabulary = sorted({*self.vocabulary, *values})

    def state(self) -> list[Any]:
        return [self.kind, list(self.vocabulary), self.ordered, self.nulls]

    @classmethod
    def of(cls, kind: Any, vocabulary: Any, ordered: Any, nulls: Any) -> _Column:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}")
        if not all(isinstance(value, str) for value in vocabulary) or len(set(vocabulary)) < len(vocabulary):
            raise ValueError("a vocabulary is of strings, each once")
        return cls(kind, list(vocabulary), bool(ordered), bool(nulls))


# ---- the arguments


def _spec(what: str, value: Any) -> Any:
    """``value`` with lists and mappings of its own, if it says which columns are meant."""
    if isinstance(value, Mapping):
        made = {key: _spec(what, part) for key, part in value.items()}
        if made and all(isinstance(key, str) for key in made) and not any(isinstance(part, dict) for part in made.values()):
            return made
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(name, str) for name in value):
            return list(value)
    elif isinstance(value, str):
        return value
    raise ConfigurationError(
        f"{what}={value!r}: a column's name (text), a list of names for a matrix, or a mapping {{name: column or list of "
        f"columns}}"
    )


def _flat(spec: Any) -> list[str]:
    if isinstance(spec, dict):
        return [name for part in spec.values() for name in _flat(part)]
    return [] if spec is None else [spec] if isinstance(spec, str) else spec


def _found(spec: Any, encoded: Any, name: str) -> Tensor | None:
    if isinstance(spec, dict):
        parts = (_found(part, encoded[key], name) for key, part in spec.items())
        return next((part for part in parts if part is not None), None)
    if spec == name:
        return encoded  # type: ignore[no-any-return]  # a name stands for a tensor
    return encoded[:, spec.index(name)] if isinstance(spec, list) and name in spec else None


def _alone(spec: Any) -> list[str]:
    parts = spec.values() if isinstance(spec, dict) else [spec]
    return [part for part in parts if isinstance(part, str)]


def _pairs(spec: Any) -> Any:
    return {"pairs": [[key, part] for key, part in spec.items()]} if isinstance(spec, dict) else spec


def _unpaired(spec: Any) -> Any:
    return dict(spec["pairs"]) if isinstance(spec, Mapping) else spec


# ---- fills


def _plain(fill: Any) -> Any:
    fill = fill.item() if type(fill).__module__ == "numpy" and hasattr(fill, "item") else fill
    if not isinstance(fill, (bool, int, float, str, dt.date, dt.timedelta, type(None))):
        raise ConfigurationError(
            f"fill={fill!r} is {kind_of(fill)}: nulls are filled by a number, a string, True or False, a date or a timedelta"
        )
    if isinstance(fill, int) and abs(fill) >= 2**63:
        raise ConfigurationError("fill= is a whole number that int64 does not hold")
    if (isinstance(fill, float) and not math.isfinite(fill)) or fill != fill:  # a missing date is unlike itself
        raise ConfigurationError(f"fill={fill!r} is as bad as a null: give a finite number, or drop these rows")
    return fill


def _fits(fill: Any, kind: str, whole: bool) -> bool:
    if kind == "boolean":
        return isinstance(fill, (bool, int)) and fill in (0, 1)
    if kind == "category":
        return isinstance(fill, str)
    if kind == "date":
        return isinstance(fill, dt.date)
    if kind == "duration":
        return isinstance(fill, dt.timedelta)
    return (
        isinstance(fill, (int, float))
        and not isinstance(fill, bool)
        and not (whole and (fill != int(fill) or abs(fill) >= 2**63))
    )


def _days(date: dt.date) -> float:
    moment = date if isinstance(date, dt.datetime) else dt.datetime(date.year, date.month, date.day)
    aware = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    return (aware - EPOCH) / dt.timedelta(days=1)


def _written(fill: Any) -> Any:
    if isinstance(fill, dt.date):
        return {"datetime" if isinstance(fill, dt.datetime) else "date": fill.isoformat()}
    return {"days": fill / dt.timedelta(days=1)} if isinstance(fill, dt.timedelta) else fill


def _is_each(fill: Any) -> bool:
    return isinstance(fill, Mapping) and "each" in fill


def _read(fill: Any) -> Any:
    if not isinstance(fill, Mapping):
        return fill
    ((kind, value),) = fill.items()
    if kind == "days":
        return dt.timedelta(days=value)
    return {"datetime": dt.datetime, "date": dt.date}[kind].fromisoformat(value)


# ---- what errors say


def _near(name: str, known: Iterable[Any]) -> str:
    near = difflib.get_close_matches(name, [str(one) for one in known], n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
