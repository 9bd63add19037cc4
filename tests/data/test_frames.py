import datetime as dt
import decimal
import json
import pickle
import subprocess
import sys

import narwhals as nw
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
import torch.nn as nn
from array_checks import same, warn_always
from hypothesis import given
from hypothesis import strategies as st

import axontrain as ax
from axontrain.checkpoint.encode import decode, encode
from axontrain.data.frames import Columns

__all__ = ["warn_always"]  # a fixture for every test here

ArrayDataset = ax.ArrayDataset


def arrow(frame):
    return pa.Table.from_pandas(frame, preserve_index=False)


BERLIN = dt.timezone(dt.timedelta(hours=2))

values = {
    "age": [31.5, 45.0, 27.25, 60.0],
    "count": [3, 1, 2, 2],
    "left": [True, False, False, True],
    "city": ["Rome", "Bonn", "Oslo", "Rome"],
    "born": [dt.datetime(1970, 1, 2), dt.datetime(1969, 12, 31, 12), dt.datetime(2020, 2, 29, 6), dt.datetime(1970, 1, 1)],
    "stay": [dt.timedelta(days=1), dt.timedelta(hours=12), dt.timedelta(0), dt.timedelta(days=-2)],
    "label": ["yes", "no", "no", "yes"],
}
pandas = pd.DataFrame(values)
frames = {
    "pandas": pandas,
    "polars": pl.DataFrame(values),
    "pyarrow": arrow(pandas),
    "polars, lazy": pl.DataFrame(values).lazy(),
    "pandas of arrow": arrow(pandas).to_pandas(types_mapper=pd.ArrowDtype),
    "pandas, nullable": pandas.convert_dtypes(),
    "a record batch": arrow(pandas).to_batches()[0],
    "narwhals": nw.from_native(pandas),
    "pandas, of an index with one value": pandas.set_axis([7, 7, 7, 7]),
}


@pytest.mark.parametrize("kind", frames)
def test_each_library_gives_the_same_tensors(kind):
    inputs = {"numbers": ["age", "left", "born", "stay"], "city": "city", "count": "count"}
    data = ArrayDataset.from_frame(frames[kind], inputs, "label")
    expected = (
        {
            "numbers": torch.tensor(
                [[31.5, 1, 1, 1], [45, 0, -0.5, 0.5], [27.25, 0, 18321.25, 0], [60, 1, 0, -2]], dtype=torch.float32
            ),
            "city": torch.tensor([2, 0, 1, 2]),
            "count": torch.tensor([3, 1, 2, 2]),
        },
        torch.tensor([1, 0, 0, 1]),
    )
    assert same(data.assemble(data.tensors), expected)
    assert data.columns.vocabulary("city") == ["Bonn", "Oslo", "Rome"]
    assert same(data.gather(torch.tensor([3]))[0]["city"], torch.tensor([2]))
    assert same(ArrayDataset.from_frame(frames[kind], like=data).tensors, data.tensors)


@pytest.mark.parametrize("kind", frames)
def test_each_column_alone_is_of_the_dtype_of_its_type(kind):
    names = {"age": torch.float32, "count": torch.int64, "left": torch.int64, "city": torch.int64}
    names |= {"born": torch.float32, "stay": torch.float32}
    encoded = Columns({name: name for name in names}).learn(frames[kind]).encode(frames[kind])
    assert {name: tensor.dtype for name, tensor in encoded.items()} == names
    assert {tensor.shape for tensor in encoded.values()} == {(4,)}


def test_a_name_gives_a_vector_and_a_list_a_matrix():
    assert ArrayDataset.from_frame(pandas, "age").tensors[0].shape == (4,)
    assert ArrayDataset.from_frame(pandas, ["age"]).tensors[0].shape == (4, 1)
    assert same(ArrayDataset.from_frame(pandas, ("age", "count"), "left")[0], (torch.tensor([31.5, 3.0]), torch.tensor(1)))
    assert ArrayDataset.from_frame(pandas, "age", ["label"]).tensors[1].tolist() == [[1], [0], [0], [1]]
    both = ArrayDataset.from_frame(pandas, "age", {"label": "label", "count": ["count"]})[0]
    assert same(both, (torch.tensor(31.5), {"label": torch.tensor(1), "count": torch.tensor([3.0])}))


def test_without_inputs_all_columns_that_are_no_targets_are_taken():
    data = ArrayDataset.from_frame(pandas[["count", "label", "age"]], targets="label")
    assert data.columns.inputs == ["count", "age"]
    assert same(data[1], (torch.tensor([1.0, 45.0]), torch.tensor(0)))
    assert same(ArrayDataset.from_frame(pandas, like=data)[1], data[1])  # with more columns than were learned
    assert ArrayDataset.from_frame(pandas[["count", "age"]]).tensors[0].shape == (4, 2)


def test_a_matrix_of_codes_alone_is_of_whole_numbers():
    assert ArrayDataset.from_frame(pandas, ["city", "label"]).tensors[0].dtype == torch.int64
    assert ArrayDataset.from_frame(pandas, ["city", "label", "left"]).tensors[0].dtype == torch.float32
    assert ArrayDataset.from_frame(pandas, ["city", "left"], dtype=torch.float64)[0].tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_numbers_are_of_the_dtype_asked_for(dtype):
    data = ArrayDataset.from_frame(pandas, {"age": "age", "stay": "stay", "all": ["count", "city"]}, dtype=dtype)
    assert {tensor.dtype for tensor in data.tensors} == {dtype}


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame, pa.table])
def test_dates_times_of_zones_and_decimals(library):
    frame = library(
        {
            "day": [dt.date(1970, 1, 3), dt.date(1969, 12, 31)],
            "cost": [decimal.Decimal("1.50"), decimal.Decimal("-2.25")],
            "at": [dt.datetime(1970, 1, 1, 2, tzinfo=BERLIN), dt.datetime(1970, 1, 1, 14, tzinfo=BERLIN)],
        }
    )
    assert ArrayDataset.from_frame(frame).tensors[0].tolist() == [[2, 1.5, 0], [-1, -2.25, 0.5]]


def test_moments_before_1970_and_of_other_units():
    moments = ["1900-01-01", "2020-01-01T06:00:00"]
    for unit in ("s", "ms", "us", "ns"):
        series = pd.Series(pd.to_datetime(moments, format="ISO8601")).astype(f"datetime64[{unit}]")
        assert ArrayDataset.from_frame(pd.DataFrame({"at": series}), "at").tensors[0].tolist() == [-25567, 18262.25]
        frame = pl.DataFrame({"at": series.dt.to_pydatetime().tolist()})
        assert ArrayDataset.from_frame(frame, "at").tensors[0].tolist() == [-25567, 18262.25]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_strings_of_arrow(kind):
    frame = pa.table({"city": pa.array(["b", None, "a"], kind)})
    assert ArrayDataset.from_frame(frame, "city", fill="?").tensors[0].tolist() == [2, 0, 1]


def test_numbers_of_each_width():
    small = pa.table({"half": pa.array(np.array([1, 2], dtype=np.float16)), "byte": pa.array([3, 4], pa.uint8())})
    assert ArrayDataset.from_frame(small).tensors[0].tolist() == [[1, 3], [2, 4]]
    nullable = pd.DataFrame({"n": pd.Series([1, None, 3], dtype="Int64"), "x": pd.Series([1.5, None, 2], dtype="Float64")})
    data = ArrayDataset.from_frame(nullable, {"n": "n", "x": "x"}, fill=0)
    assert same(data.tensors, (torch.tensor([1, 0, 3]), torch.tensor([1.5, 0, 2])))


def test_objects_of_python_in_a_column_of_pandas():
    frame = pd.DataFrame({"flag": [True, None, False], "text": np.array(["b", None, "a"], dtype=object)})
    data = ArrayDataset.from_frame(frame, {"flag": "flag", "text": "text"}, fill={"flag": True, "text": "?"})
    assert same(data[1], {"flag": torch.tensor(1), "text": torch.tensor(0)})


# ---- vocabularies


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)


@given(st.lists(words, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_a_vocabulary_does_not_depend_on_rows_parts_or_library(cities, random):
    whole = Columns("city").learn(pl.DataFrame({"city": cities}))
    shuffled = random.sample(cities, len(cities))
    cut = random.randrange(len(cities) + 1)
    parts = Columns("city")
    for part in (shuffled[:cut], shuffled[cut:]):
        parts.learn(pa.table({"city": pa.array(part, pa.string())}))
    assert whole.vocabulary("city") == parts.vocabulary("city") == sorted(set(cities))
    codes = whole.encode(pd.DataFrame({"city": pd.Series(cities, dtype="str")}))
    assert [whole.vocabulary("city")[code] for code in codes] == cities
    assert torch.equal(parts.encode(pl.DataFrame({"city": cities})), codes)


@given(st.lists(words, min_size=1, max_size=10), st.lists(words, min_size=1, max_size=10))
def test_unseen_values_are_code_0_and_the_others_keep_theirs(seen, later):
    columns = Columns("city", unseen="zero").learn(pl.DataFrame({"city": seen}))
    known = [None, *columns.vocabulary("city")]
    codes = columns.encode(pl.DataFrame({"city": later})).tolist()
    assert [known[code] for code in codes] == [city if city in seen else None for city in later]


def test_an_unseen_value_is_an_error_that_says_what_to_do():
    columns = Columns("city", "label").learn(pandas)
    later = pandas.assign(city=["Rome", "Paris", "Paris", "Wien"])
    with pytest.raises(
        ax.DataError, match=r"column 'city' has 'Paris', 'Wien' in 3 rows, .*vocabulary of 3 has not got.*unseen='zero'"
    ):
        columns.encode(later)


def test_an_unseen_target_is_an_error_whatever_is_asked_for():
    data = ArrayDataset.from_frame(pandas, ["city"], "label", unseen="zero")
    assert data.tensors[1].tolist() == [1, 0, 0, 1]
    assert data.tensors[0].min() == 1
    with pytest.raises(ax.DataError, match=r"column 'label' has 'perhaps' in 1 row, .*no class stands for what is unseen"):
        ArrayDataset.from_frame(pandas.assign(label=["yes", "no", "perhaps", "no"]), like=data)


sizes = ["small", "large", "small", "middle"]
order = ["small", "middle", "large", "huge"]


@pytest.mark.parametrize(
    "series",
    [
        pd.Series(pd.Categorical(sizes, categories=order)),
        pd.Series(pd.Categorical(sizes, categories=order, ordered=True)),
        pl.Series(sizes, dtype=pl.Enum(order)),
    ],
    ids=["pandas", "pandas, ordered", "polars"],
)
def test_categories_keep_an_order_of_their_own(series):
    frame = pd.DataFrame({"size": series}) if isinstance(series, pd.Series) else pl.DataFrame({"size": series})
    data = ArrayDataset.from_frame(frame, "size")
    assert data.columns.vocabulary("size") == order
    assert data.tensors[0].tolist() == [0, 2, 0, 1]
    assert ArrayDataset.from_frame(pl.DataFrame({"size": ["huge"]}), like=data)[0] == 3  # strings, later
    later = Columns("size").learn(frame).learn(pl.DataFrame({"size": ["tiny", "small", "giant"]}))
    assert later.vocabulary("size") == [*order, "giant", "tiny"]


@pytest.mark.parametrize(
    "frame",
    [
        pl.DataFrame({"size": pl.Series(sizes, dtype=pl.Categorical)}),
        pa.table({"size": pa.array(sizes).dictionary_encode()}),
        pa.table({"size": pa.array(sizes).dictionary_encode()}).to_pandas(types_mapper=pd.ArrowDtype),
        pd.DataFrame({"size": pd.Categorical(sizes)}),
    ],
    ids=["polars", "arrow", "pandas of arrow", "pandas"],
)
def test_categories_without_one_are_sorted(frame):
    data = ArrayDataset.from_frame(frame, "size")
    assert data.columns.vocabulary("size") == ["large", "middle", "small"]
    assert data.tensors[0].tolist() == [2, 0, 2, 1]


def test_categories_that_are_no_strings_are_named_as_such():
    frame = pd.DataFrame({"n": pd.Categorical([10, 9, None, 10]), "cut": pd.cut([1, 5, 9, 1], [0, 4, 10])})
    data = ArrayDataset.from_frame(frame, {"n": "n", "cut": "cut"}, fill={"n": "none"})
    assert data.columns.vocabulary("n") == ["9", "10", "none"]
    assert data.columns.vocabulary("cut") == ["(0, 4]", "(4, 10]"]
    assert data.tensors[0].tolist() == [1, 0, 2, 1]
    assert data.tensors[1].tolist() == [0, 1, 1, 0]


def test_learning_goes_on_with_each_part_until_rows_are_encoded():
    columns = Columns({"city": "city", "n": "n"})
    columns.learn(pl.DataFrame({"city": ["b"], "n": [1]})).learn(pl.DataFrame({"city": ["a", None], "n": [0.5, 2.0]}))
    assert columns.vocabulary("city") == ["a", "b"]
    first = pl.DataFrame({"city": ["b"], "n": [1]})
    assert same(columns.encode(first), {"city": torch.tensor([1]), "n": torch.tensor([1.0])})
    columns.learn(first)
    with pytest.raises(ax.DataError, match=r"'city' would be encoded in another way.*encoded already"):
        columns.learn(pl.DataFrame({"city": ["A"], "n": [1]}))
    assert columns.vocabulary("city") == ["a", "b"]


def test_a_vocabulary_is_asked_for_by_the_name_of_a_column():
    columns = Columns(["city", "age"])
    with pytest.raises(ax.DataError, match="'city' has no vocabulary: it has not been learned"):
        columns.vocabulary("city")
    columns.learn(pandas)
    with pytest.raises(ax.DataError, match="'age' has no vocabulary: it holds numbers"):
        columns.vocabulary("age")
    with pytest.raises(ax.ConfigurationError, match="unknown column 'cty': did you mean 'city'"):
        columns.vocabulary("cty")
    columns.vocabulary("city").clear()
    assert columns.vocabulary("city") == ["Bonn", "Oslo", "Rome"]


# ---- nulls

holes = {"age": [1.0, None, 3.0, None], "city": ["a", None, "b", "a"], "n": [1, 2, 3, 4], "day": [None, *values["born"][:3]]}
holed = {
    "pandas": pd.DataFrame(holes),
    "polars": pl.DataFrame(holes),
    "pyarrow": pa.table(holes),
    "pandas, nullable": pd.DataFrame(holes).convert_dtypes(),
    "pandas of arrow": pa.table(holes).to_pandas(types_mapper=pd.ArrowDtype),
}
filling = {"age": -1, "city": "unknown", "day": dt.date(1970, 1, 11)}


@pytest.mark.parametrize("kind", holed)
def test_nulls_raise_with_column_and_count(kind):
    with pytest.raises(ax.DataError) as caught:
        ArrayDataset.from_frame(holed[kind], ["age", "n", "day"], "city")
    assert str(caught.value) == (
        "the frame has nulls: 'age' in 2 of 4 rows, 'day' in 1 of 4 rows, 'city' in 1 of 4 rows: "
        "give fill={'age': ..., 'day': ..., 'city': ...}, or drop these rows"
    )


@pytest.mark.parametrize("kind", holed)
def test_nulls_are_filled_as_asked(kind):
    data = ArrayDataset.from_frame(holed[kind], {"age": "age", "day": "day", "city": "city"}, fill=filling)
    assert data.tensors[0].tolist() == [1, -1, 3, -1]
    assert data.tensors[1].tolist()[:2] == [10, 1]
    assert data.columns.vocabulary("city") == ["a", "b", "unknown"]
    assert data.tensors[2].tolist() == [0, 2, 1, 0]
    again = ArrayDataset.from_frame(holed["polars"], like=Columns.from_state(data.columns.state_dict()))
    assert same(again.tensors, data.tensors)


def test_nan_is_a_null():
    frame = pl.DataFrame({"x": [1.0, float("nan"), None]})
    with pytest.raises(ax.DataError, match="'x' in 2 of 3 rows"):
        ArrayDataset.from_frame(frame, "x")
    assert ArrayDataset.from_frame(frame, "x", fill=0).tensors[0].tolist() == [1, 0, 0]


def test_one_fill_is_for_all_columns():
    frame = pl.DataFrame({"x": [None, 2.0], "flag": [None, True], "n": [1, None], "city": ["a", "b"]})
    data = ArrayDataset.from_frame(frame, {name: name for name in frame.columns}, fill=0)
    assert same(data[0], {"x": torch.tensor(0.0), "flag": torch.tensor(0), "n": torch.tensor(1), "city": torch.tensor(0)})
    assert data.columns.vocabulary("city") == ["a", "b"]
    words = ArrayDataset.from_frame(pl.DataFrame({"a": ["x", None], "b": ["x", "y"]}), {"a": "a", "b": "b"}, fill="none")
    assert words.columns.vocabulary("a") == ["none", "x"]
    assert words.columns.vocabulary("b") == ["x", "y"]
    with pytest.raises(
        ax.DataError, match=r"column 'b' has nulls, and its vocabulary has not got fill='none'.*give fill=\{'b'"
    ):
        ArrayDataset.from_frame(pl.DataFrame({"a": ["x"], "b": [None]}), like=words)


def test_a_fill_of_a_whole_column_and_of_fractions():
    frame = pl.DataFrame({"n": [1, None], "void": [None, None]})
    assert ArrayDataset.from_frame(frame, ["n"], fill=0.5).tensors[0].tolist() == [[1], [0.5]]
    with pytest.raises(ax.DataError, match="column 'void' had nothing but nulls when it was learned"):
        ArrayDataset.from_frame(frame, ["void"], fill=0.5)
    data = ArrayDataset.from_frame(pl.DataFrame({"n": [1, 2], "void": ["a", "b"]}), {"n": "n", "v": "void"}, fill={"void": "?"})
    assert ArrayDataset.from_frame(frame[:1], like=data).tensors[1].tolist() == [0]


def test_a_later_frame_gets_the_same_fill():
    data = ArrayDataset.from_frame(holed["polars"][2:3], ["age"], fill=7)
    assert ArrayDataset.from_frame(holed["pandas"], like=data).tensors[0].flatten().tolist() == [1, 7, 3, 7]


@pytest.mark.parametrize(
    ("column", "fill", "told"),
    [
        ("city", 0, r"fill=0 does not fit column 'city' of strings or categories.*: give fill=\{'city': a string\}"),
        ("age", "none", r"fill='none' does not fit column 'age' of numbers.*a number\}"),
        ("age", True, "fill=True does not fit column 'age' of numbers"),
        ("day", 0, r"column 'day' of dates.*a date or datetime\}"),
        ("flag", 2, r"column 'flag' of booleans.*True or False\}"),
        ("n", 0.5, r"column 'n' of numbers.*a whole number\}"),
    ],
)
def test_a_fill_of_the_wrong_type_is_an_error(column, fill, told):
    frame = holed["polars"].with_columns(pl.Series("flag", [True, None, None, None]), pl.Series("n", [1, None, 2, 3]))
    with pytest.raises(ax.DataError, match=told):
        ArrayDataset.from_frame(frame, column, fill=fill)
    # One that is meant for the column is looked at where there are no nulls yet, too.
    with pytest.raises(ax.DataError, match=told):
        ArrayDataset.from_frame(frame.drop_nulls(column), column, fill={column: fill})


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), pd.NaT, 2**63, 10**400, [0], b"x", torch.tensor(0)])
def test_what_cannot_fill_is_named(fill):
    with pytest.raises(ax.ConfigurationError, match="fill="):
        Columns("age", fill=fill)


# ---- what does not fit


@pytest.mark.parametrize("kind", frames)
def test_missing_columns_are_named_with_the_nearest_there_are(kind):
    with pytest.raises(ax.DataError) as caught:
        ArrayDataset.from_frame(frames[kind], ["agee", "count", "zzz"], "lable")
    assert str(caught.value) == (
        "the frame lacks the columns 'agee' (did you mean 'age'?), 'zzz', 'lable' (did you mean 'label'?); "
        "it has 'age', 'count', 'left', 'city', 'born', 'stay', 'label'"
    )


def test_a_frame_without_targets_is_encoded_to_predict():
    data = ArrayDataset.from_frame(pandas, ["age"], "label")
    unlabelled = pandas.drop(columns="label")
    with pytest.raises(ax.DataError, match=r"lacks the column 'label'.*targets=False takes the inputs"):
        ArrayDataset.from_frame(unlabelled, like=data)
    assert torch.equal(data.columns.encode(unlabelled, targets=False), data.tensors[0])
    alone = ArrayDataset.from_frame(unlabelled, like=data, targets=False)
    assert torch.equal(alone.tensors[0], data.tensors[0])
    loop = ax.Loop(ax.Supervised(torch.nn.Linear(1, 2), "cross_entropy"), progress=False)
    assert torch.equal(loop.predict(alone), loop.predict(data))
    with pytest.raises(ax.ConfigurationError, match="targets=False\\) goes with like="):
        ArrayDataset.from_frame(pandas, ["age"], False)


def test_columns_that_become_of_another_kind_are_an_error():
    data = ArrayDataset.from_frame(pandas, {"age": "age", "count": "count", "city": "city"})
    with pytest.raises(
        ax.DataError, match=r"'age' holds strings or categories \(String\) in this frame, and numbers were learned"
    ):
        ArrayDataset.from_frame(pandas.assign(age="old"), like=data)
    with pytest.raises(ax.DataError, match=r"'city' holds numbers .*, and strings or categories were learned"):
        ArrayDataset.from_frame(pandas.assign(city=1), like=data)
    with pytest.raises(ax.DataError, match=r"'age' is of List\(Int64\), which cannot be encoded, in this frame"):
        ArrayDataset.from_frame(pl.DataFrame(values).with_columns(age=pl.lit([1], dtype=pl.List(pl.Int64))), like=data)
    with pytest.raises(ax.DataError, match=r"'age' holds booleans .* numbers were learned"):
        Columns("age").learn(pandas).learn(pandas.assign(age=True))


def test_whole_numbers_and_others_are_of_one_kind():
    data = ArrayDataset.from_frame(pandas, {"age": "age", "count": "count", "both": ["left"]})
    later = ArrayDataset.from_frame(pandas.assign(age=[1, 2, 3, 4], count=[1.0, 2.0, 3.0, 4.0]), like=data)
    assert [tensor.dtype for tensor in later.tensors] == [tensor.dtype for tensor in data.tensors]
    assert later.tensors[0].tolist() == later.tensors[1].tolist() == [1, 2, 3, 4]
    with pytest.raises(ax.DataError, match=r"column 'count' has 1.5 in this frame, and whole numbers were learned"):
        ArrayDataset.from_frame(pandas.assign(count=[1.0, 1.5, 2.0, 3.0]), like=data)
    matrix = ArrayDataset.from_frame(pandas, ["count"])
    assert ArrayDataset.from_frame(pandas.assign(count=1.5), like=matrix)[0].tolist() == [1.5]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2**24), (torch.float64, 2**53), (torch.bfloat16, 2**8)])
def test_whole_numbers_that_are_not_held_exactly_are_an_error(dtype, most):
    for sign in (1, -1):
        fits, beyond = pl.DataFrame({"id": [sign * most]}), pl.DataFrame({"id": [sign * most + sign]})
        assert ArrayDataset.from_frame(fits, ["id"], dtype=dtype)[0].item() == sign * most
        with pytest.raises(ax.DataError, match=f"column 'id' has {sign * most + sign}, .*exactly up to {most} only.*mapping"):
            ArrayDataset.from_frame(beyond, ["id"], dtype=dtype)
        assert ArrayDataset.from_frame(beyond, {"id": "id"}, dtype=dtype)[0]["id"].item() == sign * most + sign


def test_numbers_that_are_too_large():
    with pytest.raises(ax.DataError, match=r"column 'x' has 1e\+300, which float32 does not hold: take dtype=torch.float64"):
        ArrayDataset.from_frame(pl.DataFrame({"x": [1.0, 1e300]}), "x")
    assert ArrayDataset.from_frame(pl.DataFrame({"x": [1.0, float("inf")]}), "x")[1] == float("inf")
    for kind in (pl.UInt64, pl.Int128):
        assert ArrayDataset.from_frame(pl.DataFrame({"x": pl.Series([2**63 - 1], dtype=kind)}), "x")[0] == 2**63 - 1
        with pytest.raises(
            ax.DataError, match=r"column 'x' has integers that int64 does not hold, from .* to 9223372036854775808"
        ):
            ArrayDataset.from_frame(pl.DataFrame({"x": pl.Series([2**63], dtype=kind)}), "x")


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (
            pl.DataFrame({"x": [1], "tags": [["a"]], "at": [dt.time(1)]}),
            r"'tags' \(List\(String\)\), 'at' \(Time\): leave them out",
        ),
        (pa.table({"raw": [b"x"], "pair": [{"a": 1}]}), r"'raw' \(Binary\), 'pair' \(Struct.*\): leave"),
        (pd.DataFrame({"any": [1, "x"]}), r"'any' \(Object\): leave"),
    ],
)
def test_types_that_cannot_be_encoded_are_named(frame, told):
    with pytest.raises(ax.DataError, match=f"these columns cannot be encoded: {told}"):
        ArrayDataset.from_frame(frame)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Columns(["a", "b", "a"]), "among the inputs there is more than one 'a'"),
        (lambda: Columns({"x": "a", "y": ["b", "a"]}), "among the inputs there is more than one 'a'"),
        (lambda: Columns("a", ["b", "b"]), "among the targets there is more than one 'b'"),
        (lambda: Columns(["a", "b"], "b"), "'b' is among the inputs and the targets"),
        (lambda: Columns([]), r"inputs=\[\]: a column's name"),
        (lambda: Columns({}), r"inputs=\{\}: a column's name"),
        (lambda: Columns([0]), r"inputs=\[0\]: a column's name"),
        (lambda: Columns({"x": {"y": "a"}}), "inputs=.*a column's name"),
        (lambda: Columns({1: "a"}), "inputs=.*a column's name"),
        (lambda: Columns("a", 3), "targets=3: a column's name"),
        (lambda: Columns("a", unseen="one"), "unknown way with unseen values 'one'"),
        (lambda: Columns("a", dtype=torch.int64), "dtype=torch.int64: .*floating"),
        (lambda: Columns("a", fill={"b": 0}), "unknown column in fill: 'b'"),
        (lambda: ArrayDataset.from_frame(pandas, fill={"agee": 0}), "unknown column in fill: 'agee': did you mean 'age'"),
        (lambda: ArrayDataset.from_frame(pandas, "age", fill=0, like=Columns("age")), "leave out inputs, fill"),
        (lambda: ArrayDataset.from_frame(pandas, unseen="zero", dtype=torch.float64, like=Columns("age")), "out unseen, dtype"),
        (lambda: ArrayDataset.from_frame(pandas, like=ArrayDataset([1])), "an ArrayDataset that from_frame did not make"),
        (lambda: ArrayDataset.from_frame(pandas, like=pandas), r"like=\.\.\.\) is DataFrame"),
    ],
)
def test_arguments_that_cannot_work_are_named(make, told):
    with pytest.raises(ax.ConfigurationError, match=told):
        make()


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        ({"age": [1]}, "frame is dict.*, of which narwhals reads no columns"),
        (None, "frame is NoneType, of which"),
        (pl.Series([1]), "frame is Series.*of which"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "frame is DataFrame, of which narwhals reads no columns: .*'a' 2 times"),
        (pd.DataFrame([[1, 2]]), "the frame has 0, 1: columns are named by text"),
        (pd.DataFrame(index=[1, 2]), "inputs=None takes all columns.*the frame has nothing"),
    ],
)
def test_what_is_no_frame_is_named(frame, told):
    with pytest.raises(ax.DataError, match=f"(?s){told}"):
        ArrayDataset.from_frame(frame)


def test_columns_of_one_name_are_an_error():
    with pytest.raises(ax.DataError, match="'a'"):
        ArrayDataset.from_frame(pa.table([[1], [2]], names=["a", "a"]))


def test_nothing_learned_is_an_error():
    for columns in (Columns("age"), Columns()):
        with pytest.raises(ax.DataError, match=r"call learn\(frame\) first"):
            columns.encode(pandas)


@pytest.mark.parametrize("kind", ["pandas", "polars", "pyarrow"])
def test_a_frame_without_rows_has_tensors_without_rows(kind):
    inputs = {"numbers": ["age", "count"], "city": "city", "codes": ["label"]}
    data = ArrayDataset.from_frame(frames[kind], inputs, "left")
    empty = {"pandas": pandas[:0], "polars": pl.DataFrame(values)[:0], "pyarrow": arrow(pandas)[:0]}[kind]
    for none in (ArrayDataset.from_frame(empty, like=data), ArrayDataset.from_frame(empty, inputs, "left")):
        assert len(none) == 0
        assert [t.shape[1:] for t in none.tensors] == [t.shape[1:] for t in data.tensors]
    assert [t.dtype for t in ArrayDataset.from_frame(empty, like=data).tensors] == [t.dtype for t in data.tensors]
    untyped = pd.DataFrame({name: [] for name in values})
    assert [t.dtype for t in ArrayDataset.from_frame(untyped, like=data).tensors] == [t.dtype for t in data.tensors]
    learned = Columns(inputs, "left").learn(untyped).learn(frames[kind])
    assert learned.vocabulary("city") == data.columns.vocabulary("city")


# ---- the tensors and the frame


def test_the_frame_and_the_tensors_share_no_memory():
    frame = pd.DataFrame({"x": np.arange(3.0, dtype=np.float32), "n": np.arange(3)})
    data = ArrayDataset.from_frame(frame, {"x": "x", "n": "n"})
    for tensor in data.tensors:
        tensor.fill_(-1)
    assert frame["x"].tolist() == frame["n"].tolist() == [0, 1, 2]


def test_columns_come_along_to_a_device_and_a_subset():
    data = ArrayDataset.from_frame(pandas, ["age"], "label")
    assert data.subset([0]).columns is data.to("cpu").columns is data.columns
    assert ArrayDataset([1]).columns is None
    assert pickle.loads(pickle.dumps(data)).columns.vocabulary("label") == ["no", "yes"]


def test_the_repr_tells_what_was_given():
    assert repr(Columns(["a"], "b", fill=0, unseen="zero")) == "Columns(['a'], 'b', fill=0, unseen='zero')"
    assert repr(Columns(targets="b")) == "Columns(None, 'b')"


# ---- states


def states():
    yield Columns()
    yield Columns("age")
    for inputs in ("age", ["age", "city"], {"$tensor": "age", "$x": ["city", "$y"], "z": "count"}, None):
        for fill in (None, 0, "x", {"$y": "?"}, {"$y": dt.datetime(2020, 1, 1, 3), "age": 1.5}, dt.timedelta(hours=1)):
            known = {"$y", "age"} if inputs is None or isinstance(inputs, dict) else set()
            if isinstance(fill, dict) and not set(fill) <= known:
                continue
            columns = Columns(inputs, "label", fill=fill, unseen="zero", dtype=torch.float64)
            if not isinstance(fill, dict):
                columns.learn(pandas.assign(**{"$y": ["$", "ä", "\N{SNOWMAN}", ""]}))
            yield columns


@pytest.mark.parametrize("columns", list(states()), ids=repr)
def test_a_state_goes_through_a_checkpoint_and_json(columns):
    state = columns.state_dict()
    for plain in (decode(*encode(state)), json.loads(json.dumps(state, allow_nan=False))):
        again = Columns.from_state(plain)
        assert again.state_dict() == state
        assert repr(again) == repr(columns)
        assert vars(again) == vars(columns)


def test_rows_are_encoded_the_same_way_after_a_file_of_json(tmp_path):
    train = ArrayDataset.from_frame(
        holed["pandas"], {"age": ["age", "n"], "city": "city"}, "day", fill=filling, unseen="zero", dtype=torch.float64
    )
    (tmp_path / "columns.json").write_text(json.dumps(train.columns.state_dict()))
    like = Columns.from_state(json.loads((tmp_path / "columns.json").read_text()))
    later = holed["polars"].with_columns(city=pl.Series(["b", "z", None, "a"]))
    assert same(ArrayDataset.from_frame(holed["pyarrow"], like=like).tensors, train.tensors)
    assert ArrayDataset.from_frame(later, like=like).tensors[1].tolist() == [2, 0, 3, 1]


def test_a_state_that_was_changed_is_refused():
    columns = Columns(["age", "city"], "label").learn(pandas)
    good = columns.state_dict()
    changes = [
        {"dtype": "int64"}, {"dtype": "torch.load"}, {"dtype": []}, {"inputs": 3}, {"inputs": {"pairs": 1}},
        {"unseen": "never"},
        {"columns": [["age", "number", [], False, False]]}, {"columns": [["age", "float"]]}, {"columns": 1},
        {"columns": [["other", "float", [], False, False]]}, {"columns": [["city", "category", [1], False, False]]},
        {"columns": [["city", "category", ["a", "a"], False, False]]}, {"fill": {"eval": "1"}}, {"fill": {"date": "soon"}},
        {"fill": {"each": 1}}, {"fill": {"each": [["other", 1]]}},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ax.CheckpointError, match=r"no state of data\.Columns"):
            Columns.from_state({**good, **change})
    for key in good:
        with pytest.raises(ax.CheckpointError, match=key):
            Columns.from_state({name: value for name, value in good.items() if name != key})
    with pytest.raises(ax.CheckpointError):
        columns.load_state_dict([])
    assert columns.state_dict() == good


def test_columns_that_have_encoded_rows_are_not_changed_by_a_state():
    saved = Columns("city").learn(pl.DataFrame({"city": ["a", "b"]})).state_dict()
    fresh = Columns("city").learn(pl.DataFrame({"city": ["b", "c"]}))
    fresh.load_state_dict(saved)
    assert fresh.vocabulary("city") == ["a", "b"]
    fresh.encode(pl.DataFrame({"city": ["a"]}))
    fresh.load_state_dict(saved)
    used = ArrayDataset.from_frame(pl.DataFrame({"city": ["b", "c"]}), "city").columns
    with pytest.raises(ax.DataError, match="encoded rows already, in another way than the saved one"):
        used.load_state_dict(saved)
    assert used.vocabulary("city") == ["b", "c"]


# ---- training


class Stay(ax.Objective):
    def __init__(self, cities):
        super().__init__()
        self.city = nn.Embedding(cities + 1, 4)
        self.net = nn.Sequential(nn.Linear(2 + 4, 16), nn.ReLU(), nn.Linear(16, 2))

    def predict(self, inputs):
        return self.net(torch.cat([inputs["numbers"], self.city(inputs["city"])], dim=1))

    def loss(self, logits, labels):
        return nn.functional.cross_entropy(logits, labels)


def visitors(n, seed):
    random = np.random.default_rng(seed)
    city = random.choice(["Bonn", "Oslo", "Rome"], n)
    height = random.normal(size=n)
    stays = (height > 0) ^ (city == "Oslo")
    return pl.DataFrame(
        {
            "height": pl.Series(height).scatter(range(0, n, 50), None),
            "nights": random.integers(0, 3, n),
            "city": pl.Series(city.tolist()).scatter(range(7, n, 50), None),
            "stays": np.where(stays, "yes", "no").tolist(),
        }
    )


def test_a_model_learns_from_a_frame_and_its_columns_are_saved(tmp_path):
    fill = {"height": 0.0, "city": "unknown"}
    inputs = {"numbers": ["height", "nights"], "city": "city"}
    train = ArrayDataset.from_frame(visitors(600, 0), inputs, "stays", fill=fill, unseen="zero")
    later = visitors(300, 1).with_columns(pl.col("city").replace({"Rome": "Paris"}))
    test = ArrayDataset.from_frame(later.to_pandas(), like=train)
    assert 0 in test.tensors[1]

    cities = len(train.columns.vocabulary("city"))
    loop = ax.Loop(Stay(cities), ax.Optimizer("adamw", lr=1e-2))
    loop.state.attach("columns", train.columns)
    result = loop.fit(train, epochs=12, batch_size=32)
    assert result.epoch == 12
    right = (loop.predict(train).argmax(1) == train.tensors[-1]).float().mean()
    assert right > 0.9

    path = loop.save(tmp_path / "state")
    columns = Columns()
    again = ax.Loop(Stay(cities), ax.Optimizer("adamw", lr=1e-2))
    again.state.attach("columns", columns)
    again.restore(path)
    data = ArrayDataset.from_frame(later, like=columns)
    assert same(data.tensors, test.tensors)
    assert torch.equal(again.predict(data), loop.predict(test))


SCRIPT = """
import sys
import axontrain as ax
from axontrain.data.frames import Columns
Columns(["a"])
assert not {"narwhals", "pandas", "polars", "pyarrow"} & set(sys.modules), sorted(sys.modules)
sys.modules["narwhals"] = None  # as where it is not installed
try:
    Columns(["a"]).learn(object())
except ax.MissingExtraError as error:
    print(error)
"""


def test_narwhals_is_imported_when_a_frame_is_read():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "reading a data frame needs narwhals, which is not installed: pip install 'axontrain[frames]'" in done.stdout
