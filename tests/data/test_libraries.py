"""Other libraries' data, through a Loop: Hugging Face datasets, WebDataset, torchdata."""

import gc
import os
from itertools import chain

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pytest
import torch
import webdataset as wds
from small_runs import PASS, X, Y, assert_goes_on, make_loop

import axontrain as ax

COLUMNS = {"x": X.tolist(), "y": Y.tolist()}


def table():
    return datasets.Dataset.from_dict(COLUMNS)


def augmented(rows):
    """A transform of Hugging Face's, which draws."""
    x = torch.tensor(rows["x"])
    return {"x": list(x + torch.rand(x.shape) + float(np.random.rand())), "y": rows["y"]}


# --- Hugging Face: datasets ------------------------------------------------------------------------------------------


MAPS = {
    "bare": table,
    "torch": lambda: table().with_format("torch"),
    "numpy": lambda: table().with_format("numpy"),
    "transform": lambda: table().with_transform(augmented),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_dataset_is_a_dataset(kind, tmp_path):
    loop = make_loop()
    data = MAPS[kind]()
    result = loop.fit(data, data, epochs=2, batch_size=8)
    assert len(loop.objective.seen) == 2 * PASS
    assert result.values["val/loss"] > 0
    if kind != "transform":
        expected = X[ax.order(0, 1, 60)[:8]]
        assert torch.equal(torch.tensor(loop.objective.seen[PASS]), expected)
    assert len(loop.predict(data)) == 60
    assert_goes_on(lambda: ax.Loader(MAPS[kind](), 8, shuffle=True), tmp_path / "saved", 11)


@pytest.mark.parametrize("kind", MAPS)
def test_a_datasets_batches_are_the_same_with_workers(kind):
    def seen(workers):
        loop = make_loop()
        loop.fit(ax.Loader(MAPS[kind](), 8, shuffle=True, workers=workers), epochs=2)
        return loop.objective.seen

    assert seen(0) == seen(2)


def test_a_datasets_batch_is_a_mapping_read_at_once(monkeypatch):
    read = []
    many = datasets.Dataset.__getitems__
    monkeypatch.setattr(datasets.Dataset, "__getitems__", lambda self, rows: read.append(rows) or many(self, rows))
    loader = ax.Loader(table().with_format("torch"), 32, shuffle=True)
    first = next(iter(loader.batches(0, 0)))
    assert list(first) == ["x", "y"]
    assert torch.equal(first["x"], X[ax.order(0, 0, 60)[:32]])
    assert torch.equal(first["y"], Y[ax.order(0, 0, 60)[:32]])
    assert read == [ax.order(0, 0, 60)[:32].tolist()]


# --- Hugging Face: streams -------------------------------------------------------------------------------------------

READ = []


def rows(shards):
    for shard in shards:
        for index in range(15):
            READ.append((shard, index))
            yield {"x": X[15 * shard + index].tolist(), "y": float(Y[15 * shard + index])}


def stream():
    return table().to_iterable_dataset(num_shards=4)


def generated():
    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})


def noisy(row):
    return {"x": (np.array(row["x"]) + np.random.rand(3)).tolist(), "y": row["y"]}


STREAMS = {
    "samples": lambda: ax.Loader(stream().with_format("torch"), 8),
    "plain samples": lambda: ax.Loader(stream(), 8),
    "batches": lambda: stream().batch(8).with_format("torch"),
    "shards shuffled": lambda: ax.Loader(stream().shuffle(seed=3, buffer_size=1).with_format("torch"), 8),
    "mapped": lambda: ax.Loader(stream().map(noisy).with_format("torch"), 8),
    "interleaved": lambda: ax.Loader(
        datasets.interleave_datasets([stream(), stream()], probabilities=[0.5, 0.5], seed=1).with_format("torch"), 8
    ),
    "of a generator": lambda: ax.Loader(generated(), 8),
    "batches of a generator": lambda: generated().batch(8).with_format("torch"),
}


@pytest.mark.parametrize("first", [pytest.param(3, marks=pytest.mark.slow), PASS, pytest.param(11, marks=pytest.mark.slow), 20])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_goes_on_by_its_state_without_a_word(kind, first, tmp_path):
    assert_goes_on(STREAMS[kind], tmp_path / "saved", first)


def test_a_stream_gives_what_the_dataset_holds():
    loop = make_loop()
    loop.fit(STREAMS["samples"](), epochs=1)
    assert torch.equal(torch.tensor(list(chain(*loop.objective.seen))), X)
    assert loop.evaluate(STREAMS["samples"]())["loss"] == pytest.approx(loop.evaluate(STREAMS["batches"]())["loss"])
    assert len(loop.predict(STREAMS["batches"]())) == 60


@pytest.mark.parametrize("kind", ["of a generator", "batches of a generator"])
def test_a_stream_is_not_read_up_to_its_place(kind):
    loop, other = make_loop(), make_loop()
    loop.fit(STREAMS[kind](), steps=6)  # 48 samples: three shards and three more
    other.restore(loop.save())
    READ.clear()
    other.fit(STREAMS[kind](), steps=1)
    # Hugging Face itself reads from the beginning of a shard, and a batch from that of the shard where it began.
    assert {shard for shard, _ in READ} == ({2, 3} if "batches" in kind else {3})


@pytest.mark.parametrize("first", [3, 11, 20])
@pytest.mark.parametrize("batched", [False, True])
def test_a_shuffle_buffer_which_their_state_leaves_out_is_filled_by_reading_again(batched, first, tmp_path):
    def make():
        shuffled = stream().shuffle(seed=3, buffer_size=20)
        return shuffled.batch(8).with_format("torch") if batched else ax.Loader(shuffled.with_format("torch"), 8)

    assert_goes_on(make, tmp_path / "saved", first, told="leaves its shuffle buffer out, so that to go on at batch")


def test_each_epoch_of_a_stream_has_an_order_of_its_own():
    data = stream().shuffle(seed=3, buffer_size=20).with_format("torch")
    loop = make_loop()
    loop.fit(ax.Loader(data, 8), epochs=3)
    assert data.epoch == 2
    epochs = [list(chain(*loop.objective.seen[first : first + PASS])) for first in (0, PASS, 2 * PASS)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(X.tolist())


def test_a_stream_of_samples_in_place_of_batches_says_to_wrap_it():
    for data in (stream(), stream().with_format("torch")):
        with pytest.raises(ax.DataError, match=r"train is IterableDataset, which gives samples.*ax\.Loader\(train, batch_size"):
            make_loop().fit(data, steps=2)


def test_a_stream_that_went_on_by_its_state_is_whole_when_evaluated():
    loop, other = make_loop(), make_loop()
    loop.fit(STREAMS["samples"](), steps=3)
    other.restore(loop.save())
    data = STREAMS["samples"]()
    other.fit(data, steps=1)
    assert len(other.predict(data)) == 60


def test_a_stream_in_torchs_loader_goes_on(tmp_path):
    def make():
        return torch.utils.data.DataLoader(stream().shuffle(seed=3, buffer_size=20).with_format("torch"), 8)

    assert_goes_on(make, tmp_path / "saved", 11, told="to go on at batch 3 the 3 before it were read once more")


# --- WebDataset ------------------------------------------------------------------------------------------------------

# They leave files open until these are collected.
UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for index in range(30 * shard, 30 * shard + 30):
                writer.write({"__key__": f"{index:04d}", "x.npy": X[index].numpy(), "y.npy": Y[index].numpy()})
    yield str(folder / "{0..1}.tar")
    gc.collect()  # here, where the warning is left alone


def pipeline(shards):
    return wds.WebDataset(shards, shardshuffle=False).decode().to_tuple("x.npy", "y.npy")


PIPELINES = {
    "samples": lambda shards: ax.Loader(pipeline(shards), 8),
    "collated": lambda shards: ax.Loader(pipeline(shards), 8, collate=lambda samples: ax.data.collate(samples)),
    "batches": lambda shards: pipeline(shards).batched(8),
    "loader": lambda shards: wds.WebLoader(pipeline(shards).batched(8), batch_size=None, num_workers=0),
}


@UNCLOSED
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_webdataset_is_read_up_to_its_place(kind, shards, tmp_path):
    told = "has no state_dict, so that to go on at batch 3 the 3 before it were read once more"
    assert_goes_on(lambda: PIPELINES[kind](shards), tmp_path / "saved", 11, total=20, told=told)
    loop = make_loop()
    loop.fit(PIPELINES[kind](shards), PIPELINES[kind](shards), epochs=1)
    assert sorted(chain(*loop.objective.seen)) == sorted(X.tolist())


@UNCLOSED
def test_a_webdataset_is_read_by_its_own_workers(shards):
    loop = make_loop()
    loop.fit(wds.WebLoader(pipeline(shards).batched(8), batch_size=None, num_workers=2), epochs=2)
    assert loop.state.epoch == 2
    assert sorted(chain(*loop.objective.seen)) == sorted(X.tolist() * 2)


@UNCLOSED
def test_samples_of_a_webdataset_in_place_of_batches_say_to_wrap_it(shards):
    data = wds.WebDataset(shards, shardshuffle=False).decode().to_tuple("x.npy", "__key__").map_tuple(torch.tensor, int)
    with pytest.raises(ax.DataError, match=r"train is WebDataset, which gives samples.*ax\.Loader\(train, batch_size\)"):
        make_loop().fit(data, steps=2)


# --- torchdata -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("first", [3, PASS, 11, 20])
@pytest.mark.parametrize("seed", [None, 5])
def test_torchdatas_loader_goes_on_by_its_state_without_a_word(seed, first, tmp_path):
    library = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        own = None if seed is None else torch.Generator().manual_seed(seed)
        torch.manual_seed(3)  # from which it draws when it is made, unless it is given a generator
        return library.StatefulDataLoader(torch.utils.data.TensorDataset(X, Y), 8, shuffle=True, generator=own)

    assert_goes_on(make, tmp_path / "saved", first)
