"""Batches of any structure, from samples of any structure."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import axontrain as ax
from axontrain.data import Pad, collate
from axontrain.data.structure import cut, joined, mapped, signature, tensors, to_device
from axontrain.objective import batch_size

Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: int


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    inner: Sample
    name: str


@dataclasses.dataclass
class Strict:
    """Checks what it is made with: a single sample."""

    x: torch.Tensor
    unit: str = dataclasses.field(init=False, default="mm")

    def __post_init__(self):
        assert self.x.shape == (3,)


def sample(index):
    return torch.full((3,), float(index))


STRUCTURES = {
    "tensor": sample,
    "number": float,
    "tuple": lambda i: (sample(i), i),
    "mapping": lambda i: {"x": sample(i), "y": i},
    "named tuple": lambda i: Pair(sample(i), i),
    "dataclass": lambda i: Sample(sample(i), i),
    "frozen": lambda i: Frozen(Sample(sample(i), i), str(i)),
    "strict": lambda i: Strict(sample(i)),
    "nested": lambda i: {"a": (sample(i), [Sample(sample(i), i), {"b": i}]), "c": Pair(i, Frozen(Sample(sample(i), i), "t"))},
    "numpy": lambda i: (np.full(3, i), np.float32(i)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_batch_has_the_structure_of_its_samples(name):
    make = STRUCTURES[name]
    batch = collate([make(0), make(1), make(2), make(3)])
    parts = tensors(batch)
    assert parts
    assert all(len(part) == 4 and part.reshape(4, -1)[:, 0].tolist() == [0, 1, 2, 3] for part in parts)
    assert batch_size(batch) == 4
    kind = type(make(0))
    assert isinstance(batch, kind) if kind in (Pair, Sample, Frozen, Strict, dict) else isinstance(batch, (list, torch.Tensor))


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_part_is_moved_described_cut_and_put_together(name):
    make = STRUCTURES[name]
    batch = collate([make(index) for index in range(5)])
    moved = to_device(batch, torch.device("meta"))
    assert all(part.is_meta for part in tensors(moved))
    assert signature(moved) == signature(batch)
    parts = [cut(batch, first, last, 5) for first, last in ((0, 2), (2, 3), (3, 5))]
    assert [batch_size(part) for part in parts] == [2, 1, 2]
    whole = joined([(part, batch_size(part)) for part in parts])
    assert all(map(torch.equal, tensors(whole), tensors(batch)))
    assert signature(whole) == signature(batch)
    doubled = mapped(batch, lambda leaf: leaf * 2 if isinstance(leaf, torch.Tensor) else leaf)
    assert all(torch.equal(two, one * 2) for two, one in zip(tensors(doubled), tensors(batch), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["frozen", "nested", "strict"])
def test_loaders_make_them_here_and_in_workers(name, workers):
    samples = [STRUCTURES[name](index) for index in range(10)]
    loader = ax.Loader(samples, 4, shuffle=True, workers=workers)
    order = ax.order(0, 0, 10)
    for batch, rows in zip(loader.batches(0, 0), order.split(4), strict=True):
        assert all(part.reshape(len(rows), -1)[:, 0].tolist() == rows.tolist() for part in tensors(batch))
    loader.close()


def test_an_objective_gets_them():
    class Learn(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def split(self, batch):
            assert isinstance(batch, Sample)
            return batch.x, batch.y

        def predict(self, x):
            return self.net(x).squeeze(1)

        def loss(self, predictions, y):
            return (predictions - y).square().mean()

    samples = [Sample(sample(index) / 10, index) for index in range(20)]
    loop = ax.Loop(Learn(), ax.Optimizer("sgd", lr=0.01), progress=False)
    result = loop.fit(ax.Loader(samples, 5, shuffle=True), samples[:0] or ax.Loader(samples, 5), epochs=2)
    assert loop.state.samples == 40
    assert "val/loss" in result.values


def test_samples_that_differ_say_so():
    with pytest.raises(ax.DataError, match="one of them has no 'y'"):
        collate([{"x": 1, "y": 2}, {"x": 1}])
    with pytest.raises(RuntimeError) as caught:
        collate([torch.zeros(2), torch.zeros(3)])
    assert "collate=ax.data.Pad()" in caught.value.__notes__[0]


# --- padding ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6), st.integers(-100, 0))
def test_padding_keeps_every_value_and_adds_one_only(rows, value):
    batch = Pad(value)([torch.tensor(row, dtype=torch.int64) for row in rows])
    assert batch.shape == (len(rows), max(map(len, rows)))
    for padded, row in zip(batch.tolist(), rows, strict=True):
        assert padded[: len(row)] == row
        assert set(padded[len(row) :]) <= {value}


def test_parts_are_padded_each_by_its_own():
    rows = [{"ids": [1, 2], "label": 1, "name": "a"}, {"ids": [3], "label": 0, "name": "b"}]
    batch = Pad({"ids": 9, "label": 0, "name": 0})(rows)
    assert batch["ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["label"].tolist() == [1, 0]
    assert batch["name"] == ["a", "b"]
    pairs = Pad((0, -100))([Pair(torch.ones(2, 3), torch.tensor([1, 2])), Pair(torch.ones(1, 3), torch.tensor([1]))])
    assert pairs.x.shape == (2, 2, 3)
    assert pairs.y.tolist() == [[1, 2], [1, -100]]
    records = Pad()([Sample(torch.ones(1), 0), Sample(torch.ones(3), 1)])
    assert records.x.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert repr(Pad(3)) == "Pad(3)"


@pytest.mark.parametrize("values", [(0,), {"x": 0}, "none"])
def test_padding_that_does_not_fit_the_samples_says_so(values):
    with pytest.raises(ax.DataError, match=r"Pad\("):
        Pad(values)([(torch.ones(1), torch.ones(1)), (torch.ones(2), torch.ones(1))])


def test_text_is_cut_and_parts_are_not_taken_for_samples():
    batch = collate([(sample(index), str(index)) for index in range(4)])
    assert cut(batch, 1, 3, 4)[1] == ("1", "2")
    two = collate([({"x": 0}, {"y": 0}), ({"x": 1}, {"y": 1})])
    first = cut(two, 0, 1, 2)
    assert first[0]["x"].tolist() == [0]
    assert first[1]["y"].tolist() == [0]
    assert cut([np.zeros(2), np.ones(2)], 0, 1, 2)[1].tolist() == [1]
    assert cut([{"a": 1}, {"a": 2}], 1, 2, 2) == [{"a": 2}]  # samples, as a user's collate may leave them


def test_padding_promotes_and_refuses_what_it_cannot_hold():
    assert Pad()([torch.tensor([1, 2]), torch.tensor([1.5, 2.5, 3.5])]).tolist() == [[1, 2, 0], [1.5, 2.5, 3.5]]
    assert Pad(0.5)([torch.tensor([1]), torch.tensor([1, 2])]).tolist() == [[1, 0.5], [1, 2]]
    assert Pad(-100)([torch.tensor([True]), torch.tensor([True, False])]).tolist() == [[1, -100], [1, 0]]
    with pytest.raises(ax.DataError, match=r"no number of torch\.uint8"):
        Pad(-100)([torch.ones(1, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8)])
    with pytest.raises(ax.DataError, match="has 3 values for samples of 2 parts"):
        Pad((0, 1, 2))([(torch.ones(1), torch.ones(1))])


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_looks_at_the_whole_batch_gets_it_on_ranks_too(ranks):
    texts = [torch.arange(1, 2 + index % 7) for index in range(12)]
    centred = ax.Loader(ax.ArrayDataset(torch.arange(12.0)), 4, shuffle=True, transform=lambda batch: batch - batch.mean())
    for loader in (ax.Loader(texts, 4, collate=Pad()), centred):
        whole = list(loader.batches(0, 0))
        shares = [list(loader.batches(0, 0, share=(rank, ranks))) for rank in range(ranks)]
        assert all(torch.equal(torch.cat(parts), own) for parts, own in zip(zip(*shares, strict=True), whole, strict=True))
