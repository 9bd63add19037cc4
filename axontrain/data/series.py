"""What a data frame and its columns hold, whatever library made them: as narwhals reads it."""

from __future__ import annotations

from typing import Any

from axontrain.errors import DataError, kind_of, require

# What a column holds, as errors call it. Whole and other numbers are two kinds, since alone they are of two dtypes.
KINDS = {
    "integer": "numbers",
    "float": "numbers",
    "boolean": "booleans",
    "category": "strings or categories",
    "date": "dates",
    "duration": "durations",
}

DAY = 86_400_000_000  # microseconds


def narwhals() -> Any:
    """The part of narwhals that stays as it is, imported when it is needed."""
    return require("narwhals.stable.v2", "frames", "reading a data frame")


def numpy() -> Any:
    """NumPy, imported when it is needed."""
    return require("numpy", "frames", "reading a data frame")


def table_of(frame: Any) -> Any:
    """A frame as narwhals has it; a lazy one stays lazy.

    Raises:
        DataError: if narwhals reads no columns of it, or two have one name.
    """
    nw = narwhals()
    try:
        native = nw.to_native(frame, pass_through=True)
        try:
            table = nw.from_native(native)
        except TypeError:
            if not hasattr(native, "__arrow_c_stream__"):
                raise
            table = nw.from_arrow(native, backend="pyarrow")  # a record batch, or a reader of them
        names = table.collect_schema().names()
    except (TypeError, ValueError) as error:  # narwhals' own are ValueErrors
        raise DataError(f"frame is {kind_of(frame)}, of which narwhals reads no columns: {error}") from error
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the frame has more than one column of the name {listed(twice)}: rename them")
    return table


def kind_in(dtype: Any) -> str | None:
    """What a column of this type holds: a key of KINDS; None for what cannot be encoded."""
    nw = narwhals()
    if dtype.is_integer():
        return "integer"
    if dtype.is_float() or dtype.is_decimal():
        return "float"
    if dtype in (nw.String, nw.Categorical, nw.Enum):
        return "category"
    if dtype in (nw.Date, nw.Datetime):
        return "date"
    return "boolean" if dtype == nw.Boolean else "duration" if dtype == nw.Duration else None


def _typed(series: Any) -> Any:
    """A column as a type that can be worked with.

    Python objects in a column of pandas are what Arrow takes them for: dates, decimals, booleans with nulls.
    """
    nw = narwhals()
    if series.dtype == nw.String and series.implementation.is_pyarrow() and "view" in str(nw.to_native(series).type):
        return series.cast(nw.String)  # Arrow picks no rows of views, and looks nothing up in them
    if series.dtype != nw.Object:
        return series
    try:
        array = series.to_arrow()
        return nw.from_native(require("pyarrow", "frames", "reading objects").chunked_array([array]), series_only=True)
    except (ImportError, TypeError, ValueError):  # pyarrow's own are among them
        return series


def without_nulls(series: Any) -> tuple[Any, Any]:
    """The values without nulls and NaN, and a mask of where they stand; None where nothing is missing."""
    series = _typed(series)
    missing = series.is_null()
    if series.dtype.is_float():
        missing = missing | series.is_nan()
    if not missing.any():
        return series, None
    keep = ~missing
    return series.filter(keep), numpy().array(keep.to_numpy(), dtype=bool)


def as_text(series: Any) -> Any:
    """Strings, or categories as strings."""
    nw = narwhals()
    return series if series.dtype == nw.String else series.cast(nw.String)


def distinct(series: Any) -> tuple[list[str], bool]:
    """The distinct values of strings or categories, and whether they are in an order of their own."""
    nw = narwhals()
    if series.dtype == nw.Enum:
        return [str(value) for value in series.dtype.categories], True
    # polars and Arrow number categories as they meet them: an order of rows, not of theirs.
    native = nw.to_native(series)
    if series.dtype == nw.Categorical and hasattr(native, "cat") and series.implementation.is_pandas_like():
        return [str(value) for value in native.cat.categories], True
    return sorted(as_text(series).unique().to_list()), False


def numbers(name: str, series: Any) -> Any:
    """The numbers of a column without nulls as a NumPy array that is a copy."""
    nw, np = narwhals(), numpy()
    dtype = series.dtype
    if dtype == nw.Date or dtype == nw.Datetime:
        return np.array(series.dt.timestamp("us").to_numpy(), dtype=np.int64) / DAY
    if dtype == nw.Duration:
        return np.array(series.dt.total_microseconds().to_numpy(), dtype=np.int64) / DAY
    if dtype == nw.Boolean:
        return np.array(series.to_numpy(), dtype=bool).astype(np.int64)
    if dtype.is_integer():
        if dtype in (nw.UInt64, nw.Int128, nw.UInt128):
            low, high = series.min(), series.max()
            if low < -(2**63) or high >= 2**63:
                raise DataError(f"column {name!r} has integers that int64 does not hold, from {low} to {high}: cast it first")
            series = series.cast(nw.Int64)
        return np.array(series.to_numpy(), dtype=np.int64)
    if dtype.is_decimal():
        series = series.cast(nw.Float64)
    values = np.array(series.to_numpy())
    return values if values.dtype in (np.float32, np.float64, np.float16) else values.astype(np.float64)


def listed(values: list[Any], most: int = 8) -> str:
    """A list as errors show it: its beginning, and how many more there are."""
    shown = ", ".join(map(repr, values[:most]))
    return (shown or "nothing") + (f" and {len(values) - most} more" if len(values) > most else "")
