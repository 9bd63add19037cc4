import collections
import enum
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axontrain import CheckpointError
from axontrain.checkpoint import read, write
from axontrain.checkpoint.encode import decode, encode

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
SHAPES = [(), (0,), (1,), (3,), (2, 0, 3), (2, 3), (1, 2, 1, 2)]


def same(a, b):
    """Bitwise, NaN too, and of the same types; a tuple comes back as a list."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(b) is list and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return type(b) is float and (math.copysign(1, a), a) == (math.copysign(1, b), b) if a == a else b != b
    return type(a) is type(b) and a == b


def _bytes(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def filled(dtype, shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=made)
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


tensors = st.builds(filled, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 1000))
views = st.sampled_from(
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12)[::3],
        torch.arange(12.0)[3:6],
        torch.ones(1).expand(5),
        torch.arange(4.0, requires_grad=True),
        torch.nn.Parameter(torch.ones(2, 2)),
    ]
)
numbers = st.one_of(
    st.integers(-(10**30), 10**30), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([-0.0, 5e-324, 1e308])
)
keys = st.text(max_size=8).filter(lambda key: not key.startswith("$"))
# Lone surrogates are text to Python, but no UTF-8; no state_dict has them.
readable = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda key: not key.startswith("$"))


def trees_of(keys):
    leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), tensors, views)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=4)
        ),
        max_leaves=12,
    )


@given(trees_of(keys))
def test_what_is_encoded_is_decoded(tree):
    text, found = encode(tree)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert text.isascii()
    assert same(tree, decode(text, found))


@settings(max_examples=60)
@given(tree=trees_of(readable))
def test_what_is_written_is_read(tmp_path_factory, tree):
    path = write(tmp_path_factory.mktemp("trees") / "state", tree)
    assert same(tree, read(path))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_shape_are_written_and_read(tmp_path, dtype):
    tree = {str(shape): filled(dtype, shape) for shape in SHAPES}
    assert same(tree, read(write(tmp_path / "state", tree)))


def test_tensors_that_share_storage_are_written_each_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tree = {"whole": whole, "again": whole, "row": whole[1], "column": whole[:, 1], "halves": [whole[:2], whole[1:]]}
    back = read(write(tmp_path / "state", tree))
    assert same(tree, back)
    back["whole"].zero_()
    assert back["row"].tolist() == [4, 5, 6, 7]


def test_tied_weights_are_written_and_read(tmp_path):
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    other.weight = one.weight
    state = torch.nn.ModuleList([one, other]).state_dict()
    assert same(dict(state), read(write(tmp_path / "state", state)))


def test_a_slice_of_a_large_tensor_is_written_without_the_rest(tmp_path):
    path = write(tmp_path / "state", {"few": torch.zeros(1_000_000)[:10]})
    assert (path / "tensors.safetensors").stat().st_size < 10_000


def test_a_tree_may_be_a_single_value(tmp_path):
    for index, tree in enumerate([3, None, math.nan, "text", [], {}, torch.ones(2)]):
        assert same(tree, read(write(tmp_path / str(index), tree)))


def test_keys_that_look_like_paths_are_kept_apart(tmp_path):
    tree = {
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1), "b#2": torch.full((1,), 2.0)},
        "__metadata__": torch.ones(3),
        "": torch.ones(4),
    }
    assert same(tree, read(write(tmp_path / "state", tree)))


def test_mappings_of_other_kinds_become_dicts():
    tree = collections.OrderedDict(a=types.MappingProxyType({"b": 1}))
    assert decode(*encode(tree)) == {"a": {"b": 1}}


def test_what_is_encoded_is_not_changed_by_what_comes_later(tmp_path):
    weight = torch.zeros(2)
    path = write(tmp_path / "state", {"weight": weight})
    weight += 1
    assert read(path)["weight"].tolist() == [0, 0]


class Thing:
    pass


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Thing(), "Thing"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (1j, "complex"),
        (np.float32(1), "float32"),
        (np.int64(3), "int64"),
        (np.zeros(3), r"ndarray\(3,\)"),
        (Path("a"), "Path"),
        (torch.device("cpu"), "device"),
        (torch.float32, "dtype"),
        (len, "builtin_function"),
        (torch.ones(2).to_sparse(), "not dense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_saved_is_named_by_its_place(value, told):
    with pytest.raises(CheckpointError, match=rf"the state's 'optimizers/main/1' is .*{told}"):
        encode({"optimizers": {"main": [0, value]}})


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        (np.float32(1), "is NumPy's float32, which cannot be saved. Save x.item()"),
        (np.bool_(True), "Save x.item()"),
        (np.array(1), "Save x.item()"),
        (np.zeros(3), "is NumPy's ndarray(3,) float64, which cannot be saved. Save torch.from_numpy(x)"),
        ({1, 2}, "is set, which cannot be saved. Save sorted(x)"),
        (frozenset(), "Save sorted(x)"),
        (b"bytes", "Save torch.tensor(list(x), dtype=torch.uint8), or x.hex()"),
        (bytearray(1), "dtype=torch.uint8"),
        (1j, "Save [x.real, x.imag]"),
        (range(3), "Save list(x)"),
        (collections.deque(), "Save list(x)"),
        (iter([]), "Save list(x)"),
        (Path("a"), "Save str(x)"),
        (torch.device("cpu"), "Save str(x)"),
        (torch.float32, "Save str(x)"),
        (enum.Enum("Colour", "RED").RED, "Save x.value, or x.name"),
        (torch.nn.ReLU(), "Save its state_dict()"),
        (Thing(), "is Thing, which cannot be saved: a state_dict holds"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_may_be_saved_in_its_place_is_said(value, instead):
    with pytest.raises(CheckpointError) as raised:
        encode([value])
    assert instead in str(raised.value)


def test_what_is_advised_can_be_saved():
    array, text = np.zeros(3), b"bytes"
    tree = [
        np.float32(1).item(),
        torch.from_numpy(array),
        torch.tensor(list(text), dtype=torch.uint8),
        sorted({1, 2}),
        list({}.keys()),
    ]
    assert bytes(decode(*encode(tree))[2].tolist()) == text


def test_containers_and_numbers_of_other_kinds_come_back_plain():
    point = collections.namedtuple("point", "x y")(1, (2,))
    tree = {"a": point, "b": collections.Counter("aa"), "c": collections.defaultdict(int, d=np.float64(0.5)), "d": (1,)}
    back = decode(*encode(tree))
    assert back == {"a": [1, [2]], "b": {"a": 2}, "c": {"d": 0.5}, "d": [1]}
    assert [type(back[key]) for key in "abcd"] == [list, dict, dict, list]
    assert type(back["c"]["d"]) is float


def test_a_key_that_is_a_number_says_what_it_would_be_as_text():
    with pytest.raises(CheckpointError, match=r"the key 7: keys are text that does not begin with \$; str\(key\) is '7'"):
        encode({7: 1})


@pytest.mark.parametrize("key", [1, None, ("a",), "$tensor", "$float", "$", "$own"])
def test_keys_that_cannot_be_saved_are_named(key):
    with pytest.raises(CheckpointError, match=r"the state's 'a' has the key .*keys are text that does not begin with \$"):
        encode({"a": {key: 1}})


def test_a_tree_within_itself_is_an_error():
    tree = {}
    tree["self"] = tree
    with pytest.raises(CheckpointError):
        encode(tree)


def test_a_number_too_long_to_be_read_back_is_not_written():
    with pytest.raises(CheckpointError, match="'count'"):
        encode({"count": 10**5000})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no JSON that axontrain wrote"),
        ("{", "no JSON"),
        ("[1,]", "no JSON"),
        ("NaN", "NaN is no JSON"),
        ('{"a": Infinity}', "Infinity is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1, "a": 2}', "a key stands twice"),
        ('{"x": {"a": 1, "b": 2, "a": 1}}', "a key stands twice"),
        ('{"$tensor": "a", "$tensor": "a"}', "a key stands twice"),
        ('{"$tensor": "b"}', "it names a tensor 'b' that is not there"),
        ('{"$tensor": "../../a"}', "is not there"),
        ('{"$tensor": 3}', "is not there"),
        ('{"$tensor": null}', "is not there"),
        ('{"$tensor": []}', "is not there"),
        ('{"$tensor": {"$tensor": "a"}}', "is not there"),
        ('{"$tensor": "a", "b": 1}', r"a key begins with \$"),
        ('{"$float": "1.5"}', "'1.5' is no number"),
        ('{"$float": "NaN"}', "'NaN' is no number"),
        ('{"$float": 1}', "is no number"),
        ('{"$float": []}', "is no number"),
        ('{"$float": {}}', "is no number"),
        ('{"$module": "os"}', r"a key begins with \$"),
        ('{"a": [{"$type": "set"}]}', r"a key begins with \$"),
        ("[" * 100_000 + "]" * 100_000, "no JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "no JSON"),
        ("[" * 900 + "]" * 900 + "x", "no JSON"),
        ("1" * 10_000, "no JSON"),
    ],
    ids=lambda value: value[:24] if len(value) < 200 else f"{value[:8]} and so on",
)
def test_json_that_encode_does_not_write_is_rejected(text, told):
    with pytest.raises(CheckpointError, match=told):
        decode(text, {"a": torch.ones(1)})


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.sampled_from(["$tensor", "$float", "a"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["$tensor", "$float", "$", "a", "b"]), inner, max_size=2)
        ),
    )
)
def test_any_json_is_decoded_or_is_a_checkpoint_error(value):
    try:
        tree = decode(json.dumps(value), {"a": torch.ones(1)})
    except CheckpointError:
        return
    assert same(tree, decode(*encode(tree)))  # what was accepted is what could have been written
