"""Data that can only be iterated, through a Loop: what each item draws, and going on where it was left."""

import dataclasses
import gc
import random
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, namedtuple

import numpy as np
import pytest
import torch
from process_table import children, gone
from small_runs import PASS, Small, X, Y, assert_goes_on, make_loop, weights
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import axontrain as ax
from axontrain.data.iterables import Source

TABLE = TensorDataset(X, Y)


# --- what is read ----------------------------------------------------------------------------------------------------


def noise():
    """A pass of batches that draw from every generator."""
    for index in range(PASS):
        x = torch.rand(8, 3) + index + float(np.random.rand()) + random.random()
        yield x, x.sum(1)


def endless():
    while True:
        x = torch.rand(8, 3) + float(np.random.rand()) + random.random()
        yield x, x.sum(1)


def noisy_samples():
    for index in range(60):
        x = torch.rand(3) + index / 60 + random.random()
        yield x, x.sum()


class Batches(IterableDataset):
    """A torch dataset of batches, without a state."""

    def __iter__(self):
        return noise()


class Samples(IterableDataset):
    def __iter__(self):
        return noisy_samples()


class Sized(Samples):
    def __len__(self):
        return 60


class Resetting:
    """An iterator that begins anew whenever ``iter`` is called, as many a loader does."""

    def __iter__(self):
        self.index = 0
        return self

    def __next__(self):
        if self.index == PASS:
            raise StopIteration
        self.index += 1
        x = torch.rand(8, 3) + self.index
        return x, x.sum(1)


class Augmented:
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + 0.1 * torch.randn(3), Y[index]


def own(seed=5):
    return torch.Generator().manual_seed(seed)


WITHOUT_STATE = {
    "function": lambda: noise,
    "endless function": lambda: endless,
    "endless generator": endless,
    "batches": Batches,
    "resetting iterator": Resetting,
    "samples of a function": lambda: ax.Loader(noisy_samples, 8),
    "samples": lambda: ax.Loader(Samples(), 8),
    "samples of a length": lambda: ax.Loader(Sized(), 8),
    "whole batches of samples": lambda: ax.Loader(Samples(), 8, drop_last=True),
    "torch": lambda: DataLoader(TABLE, 8, shuffle=True),
    "torch, augmented": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "torch, own generator": lambda: DataLoader(TABLE, 8, shuffle=True, generator=own()),
    "torch, with replacement": lambda: DataLoader(TABLE, 8, sampler=RandomSampler(TABLE, replacement=True, generator=own())),
    "torch, batch sampler": lambda: DataLoader(
        TABLE, batch_sampler=BatchSampler(RandomSampler(TABLE, generator=own()), 8, drop_last=False)
    ),
}


@pytest.mark.parametrize("first", [3, 11, 20])
@pytest.mark.parametrize("kind", WITHOUT_STATE)
def test_what_has_no_state_is_read_up_to_its_place_and_says_so_once(kind, first, tmp_path):
    assert_goes_on(WITHOUT_STATE[kind], tmp_path / "saved", first, told="before it were read once more and thrown away: 0.")


@pytest.mark.parametrize("kind", [kind for kind in WITHOUT_STATE if "torch" in kind])
def test_at_an_epochs_end_nothing_has_to_be_read_again(kind, tmp_path):
    assert_goes_on(WITHOUT_STATE[kind], tmp_path / "saved", PASS)
    assert_goes_on(WITHOUT_STATE[kind], tmp_path / "again", 2 * PASS)


@pytest.mark.parametrize("workers", [1, 2])
def test_torchs_loader_with_workers_goes_on(workers, tmp_path):
    def make():
        return DataLoader(Augmented(), 8, shuffle=True, generator=own(), num_workers=workers)

    assert_goes_on(make, tmp_path / "saved", 11, told="to go on at batch 3 the 3 before it")


def test_the_warning_tells_the_cost(tmp_path):
    loop, other = make_loop(), make_loop()
    loop.fit(noise, steps=5)
    other.restore(loop.save())
    told = (
        r"train \(function\) has no state_dict, so that to go on at batch 5 the 5 before it were read once more and thrown "
        r"away: \d+\.\d s\. Give it state_dict and load_state_dict, or pass what has __len__ and __getitem__, of which "
        r"nothing is read twice"
    )
    with pytest.warns(ax.AxonWarning, match=told):
        other.fit(noise, steps=1)


def test_another_loop_goes_on_from_memory():
    loop, other, unbroken = make_loop(), make_loop(), make_loop()
    unbroken.fit(noise, steps=20)
    loop.fit(noise, steps=11)
    other.restore(loop.save())
    with pytest.warns(ax.AxonWarning, match="thrown away"):
        other.fit(noise, steps=9)
    assert torch.equal(weights(other), weights(unbroken))


def test_a_loop_goes_back_to_what_it_saved():
    loop, unbroken = make_loop(), make_loop()
    unbroken.fit(noise, steps=20)
    loop.fit(noise, steps=11)
    saved = loop.save()
    loop.fit(noise, steps=6)
    loop.restore(saved)
    with pytest.warns(ax.AxonWarning, match="to go on at batch 3 the 3 before it"):
        loop.fit(noise, steps=9)
    assert torch.equal(weights(loop), weights(unbroken))


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
from test_iterables import ax, make_loop, noise, weights
loop = make_loop()
if sys.argv[1] == "first":
    loop.fit(noise, steps=11)
    loop.save(sys.argv[2])
else:
    loop.restore(sys.argv[2])
    loop.fit(noise, steps=9)
    print(weights(loop).double().tolist())
"""


@pytest.mark.slow
def test_another_process_goes_on(tmp_path):
    unbroken = make_loop()
    unbroken.fit(noise, steps=20)
    for turn in ("first", "second"):
        command = [sys.executable, "-c", SCRIPT.format(paths=sys.path), turn, str(tmp_path / "saved")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("AxonWarning") == 1
    assert done.stdout.strip() == str(weights(unbroken).double().tolist())


# --- own states ------------------------------------------------------------------------------------------------------


class Stateful(IterableDataset):
    """Batches, or samples, with a state of its own; it remembers what was read and which epochs it was told."""

    def __init__(self, size=None):
        self.size, self.read, self.told = size, [], []
        self.index = self.next = 0

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __iter__(self):
        self.index, self.next = self.next, 0
        while self.index < (60 if self.size is None else PASS):
            self.read.append(self.index)
            self.index += 1
            x = torch.rand(3 if self.size is None else (self.size, 3)) + self.index
            yield x, x.sum(-1)

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.next = state["index"]


WITH_STATE = {"batches": lambda: Stateful(8), "samples": lambda: ax.Loader(Stateful(), 8)}


@pytest.mark.parametrize("first", [3, PASS, 11, 2 * PASS, 20])
@pytest.mark.parametrize("kind", WITH_STATE)
def test_what_has_a_state_goes_on_by_it_without_a_word(kind, first, tmp_path):
    assert_goes_on(WITH_STATE[kind], tmp_path / "saved", first)


@pytest.mark.parametrize("kind", WITH_STATE)
def test_what_has_a_state_is_not_read_up_to_its_place(kind):
    loop, other = make_loop(), make_loop()
    loop.fit(WITH_STATE[kind](), steps=19)
    other.restore(loop.save())
    data = WITH_STATE[kind]()
    other.fit(data, steps=2)
    source = data.dataset if isinstance(data, ax.Loader) else data
    assert source.read == ([24 + i for i in range(16)] if isinstance(data, ax.Loader) else [3, 4])
    assert source.told == [2]


def test_each_epoch_is_told():
    data = Stateful(8)
    make_loop().fit(data, epochs=3)
    assert data.told == [0, 1, 2]
    loader = DataLoader(TABLE, 8, sampler=torch.utils.data.DistributedSampler(TABLE, num_replicas=2, rank=0))
    make_loop().fit(loader, epochs=3)
    assert loader.sampler.epoch == 2


def test_a_loaded_state_that_was_not_read_from_yet_is_saved_again():
    unbroken, loop, other = make_loop(), make_loop(), make_loop()
    unbroken.fit(Stateful(8), steps=6)
    data = Stateful(8)
    loop.fit(data, steps=3)
    loop.restore(loop.save())
    other.restore(loop.save())
    other.fit(Stateful(8), steps=3)
    assert torch.equal(weights(other), weights(unbroken))


class Numbers:
    """An iterator with a state."""

    def __init__(self):
        self.index, self.read = 0, []

    def __iter__(self):
        return self

    def __next__(self):
        self.read.append(self.index)
        self.index += 1
        return torch.rand(8, 3) + self.index, torch.rand(8)

    state_dict, load_state_dict = Stateful.state_dict, lambda self, state: setattr(self, "index", state["index"])


@pytest.mark.parametrize("first", [3, 5, 7, 10])
def test_an_iterator_with_a_state_goes_on_at_an_epochs_end_too(first, tmp_path):
    assert_goes_on(Numbers, tmp_path / "saved", first, limit=5)


def test_a_state_that_tells_of_somebody_elses_reading_is_not_used():
    unbroken, loop, other = make_loop(), make_loop(), make_loop()
    unbroken.fit(Stateful(8), steps=6)
    data = Stateful(8)
    loop.fit(data, steps=3)
    loop.evaluate(data)  # whatever it says of itself now, it is not where training stands
    other.restore(loop.save())
    with pytest.warns(ax.AxonWarning, match="no state of train .* was kept for this place"):
        other.fit(Stateful(8), steps=3)
    assert torch.equal(weights(other), weights(unbroken))
    loop.fit(data, steps=3)


# --- what draws ------------------------------------------------------------------------------------------------------


def drawn(seed, epoch, start=0):
    source = Source(noise, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ax.AxonWarning)
        return [x.tolist() for x, _ in source.read(seed, epoch, start)]


def test_what_an_item_draws_is_a_function_of_seed_epoch_and_index():
    whole = drawn(1, 2)
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    assert drawn(1, 2) == whole
    assert drawn(1, 2, 5) == whole[5:]
    assert not any(batch in whole for other in (drawn(1, 3), drawn(2, 2)) for batch in other)
    found = []
    for x, _ in Source(noise, "data").read(1, 2, 0):
        torch.rand(3), np.random.rand(), random.random()  # the model draws as much as it likes
        found.append(x.tolist())
    assert found == whole


def test_reading_draws_nothing_from_the_run():
    class Model(Small):
        def train_step(self, batch):
            step = super().train_step(batch)
            self.seen[-1] = float(torch.rand(()))
            return step

    runs = []
    loaders = [DataLoader(TABLE, 8, shuffle=True, drop_last=True, generator=generator) for generator in (None, own())]
    for data in (noise, [(X[:8], Y[:8])] * PASS, *loaders):
        loop = ax.Loop(Model(), ax.Optimizer("sgd", lr=0.0), progress=False)
        loop.fit(data, steps=12)
        runs.append(loop.objective.seen)
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_an_iterable_is_begun_once_in_an_epoch():
    class Begun:
        begun = 0

        def __iter__(self):
            self.begun += 1
            return iter(list(noise()))

    data = Begun()
    loop = make_loop()
    loop.fit(data, epochs=2)
    loop.fit(data, steps=3)
    loop.fit(data, steps=2)  # goes on
    assert data.begun == 3


def test_nothing_is_read_ahead_of_what_was_learnt():
    loop = make_loop()

    def policy():
        while True:
            yield torch.full((4, 3), float(loop.state.step)), torch.ones(4)

    for data in (policy, policy()):
        at = loop.state.step
        loop.fit(data, steps=4)
        assert [batch[0][0] for batch in loop.objective.seen[at:]] == list(range(at, at + 4))


def test_torchs_loader_is_left_as_it_is():
    loader = DataLoader(TABLE, 8, shuffle=True, generator=own())
    before = dict(vars(loader)) | {"sampler's": dict(vars(loader.sampler))}
    loop = make_loop()
    loop.fit(loader, loader, steps=11)
    other = make_loop()
    other.restore(loop.save())
    with pytest.warns(ax.AxonWarning, match="thrown away"):
        other.fit(loader, steps=2)
    assert dict(vars(loader)) | {"sampler's": dict(vars(loader.sampler))} == before


def test_validation_may_draw_from_the_generator_of_the_training_data():
    def fit(loop, steps):
        loader = DataLoader(TABLE, 8, shuffle=True, generator=own())
        loop.fit(loader, loader, steps=steps, validate=2)

    unbroken, loop, other = make_loop(), make_loop(), make_loop()
    fit(unbroken, 20)
    fit(loop, 11)
    other.restore(loop.save())
    with pytest.warns(ax.AxonWarning, match="thrown away"):
        fit(other, 9)
    assert torch.equal(weights(other), weights(unbroken))
    of = [{row["step"]: row["val/loss"] for row in one.state.history if "val/loss" in row} for one in (other, unbroken)]
    assert of[0] == of[1]


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [Samples(), Sized()], ids=["samples", "of a length"])
def test_samples_in_place_of_batches_are_an_error_that_says_to_wrap_them(data):
    with pytest.raises(ax.DataError, match=r"gives samples .*wrap it, ax\.Loader\(train, batch_size\)"):
        make_loop().fit(data, steps=3)


@pytest.mark.parametrize("how", ["shuffle", "sampler", "batch_sampler", "workers"])
def test_what_can_only_be_iterated_has_one_order(how):
    value = {"shuffle": True, "workers": 2}.get(how, [[0]])
    with pytest.raises(ax.ConfigurationError, match=rf"{how}=.* with Samples, which can only be iterated"):
        ax.Loader(Samples(), 8, **{how: value})


def test_what_ends_before_the_place_where_the_run_stood_is_an_error():
    def shorter():
        yield from list(noise())[:4]

    for make in (lambda data: data, lambda data: ax.Loader(data, 1, collate=lambda samples: samples[0])):
        loop, other = make_loop(), make_loop()
        loop.fit(make(noise), steps=6)
        other.restore(loop.save())
        with pytest.raises(ax.DataError, match="ended after 4 batches, and the run stood at batch 6"):
            other.fit(make(shorter), steps=3)


def test_an_iterable_that_failed_is_read_again_from_its_place():
    fails = []

    def shaky():
        for index, batch in enumerate(noise()):
            if index == 5 and fails:
                raise OSError(fails.pop())
            yield batch

    unbroken, loop = make_loop(), make_loop()
    unbroken.fit(shaky, steps=20)
    fails.append("the disk is away")
    with pytest.raises(OSError, match="the disk is away") as caught:
        loop.fit(shaky, steps=20)
    assert "in epoch 0, step 5 (batch 5 of the epoch), counted from 0" in caught.value.__notes__
    with pytest.warns(ax.AxonWarning, match="thrown away"):
        loop.fit(shaky, steps=15)
    assert loop.objective.seen == unbroken.objective.seen


def test_a_loader_that_failed_goes_on_in_its_own_order():
    fails = []

    class Shaky(Augmented):
        def __getitem__(self, index):
            if len(fails) == 30:
                fails.clear()
                raise OSError("the disk is away")
            if fails:
                fails.append(index)
            return X[index], Y[index]

    def loader():
        return DataLoader(Shaky(), 8, shuffle=True, generator=own())

    unbroken, loop = make_loop(), make_loop()
    unbroken.fit(loader(), steps=20)
    fails.append("from now on")
    data = loader()
    with pytest.raises(OSError, match="the disk is away"):
        loop.fit(data, steps=20)
    with pytest.warns(ax.AxonWarning, match="thrown away"):
        loop.fit(data, steps=20 - loop.state.step)
    assert loop.objective.seen == unbroken.objective.seen


def test_a_stream_that_ends_early_ends_the_epoch():
    lengths = iter([4, 2, 3])

    def uneven():
        yield from list(noise())[: next(lengths)]

    loop = make_loop()
    loop.fit(uneven, epochs=3)
    assert (loop.state.step, loop.state.epoch) == (9, 3)


def test_batches_that_differ_are_an_error_unless_they_are_meant():
    def ragged():
        yield torch.ones(2, 3), torch.ones(2)
        yield torch.ones(2, 3), torch.ones(2, 1)

    with pytest.raises(ax.BatchMismatchError, match="train: batch 1 of epoch 0 differs"):
        make_loop().fit(ragged, epochs=1)

    class Any(Small):
        def loss(self, predictions, targets):
            return ((predictions - targets.flatten()) ** 2).mean()

    assert ax.Loop(Any(), ax.Optimizer("sgd", lr=0.1), strict=False, progress=False).fit(ragged, epochs=1).step == 2


@pytest.mark.parametrize("first", [3, 5, 12])
@pytest.mark.parametrize("kind", ["function", "endless generator", "torch, own generator", "samples"])
def test_with_a_limit_too_it_goes_on(kind, first, tmp_path):
    inside = first % 5 or kind == "endless generator"
    told = "thrown away" if inside else None
    assert_goes_on(WITHOUT_STATE[kind], tmp_path / "saved", first, total=18, told=told, limit=5)


@pytest.mark.parametrize("kind", [kind for kind in WITHOUT_STATE if not kind.startswith("endless")])
def test_evaluation_and_prediction_read_iterables(kind):
    loop, make = make_loop(), WITHOUT_STATE[kind]
    found = loop.evaluate(make())
    assert found == loop.evaluate(make())
    predictions = loop.predict(make())
    assert len(predictions) in (60, 56, 64)
    assert torch.equal(torch.cat(list(loop.predict(make(), stream=True))), predictions)


def test_validation_data_may_be_an_iterable():
    loop = make_loop()
    loop.fit(noise, ax.Loader(noisy_samples, 8), epochs=3)
    assert len(loop.state.history["val/loss"]) == 3
    with pytest.raises(ax.EmptyDataError, match="validation gave no batch: it is an iterator, which can be read once"):
        loop.fit(noise, noise(), epochs=2)


def test_validation_leaves_the_reading_of_the_same_loader_alone():
    unbroken, loop = make_loop(), make_loop()
    unbroken.fit(ax.Loader(noisy_samples, 8), ax.Loader(noisy_samples, 8), steps=20, validate=2)
    loader = ax.Loader(noisy_samples, 8)
    loop.fit(loader, loader, steps=11, validate=2)
    loop.fit(loader, loader, steps=9, validate=2)
    assert loop.objective.seen == unbroken.objective.seen


# --- samples of any structure ----------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    inputs: Record
    name: str


SHAPES = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "mapping": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "named tuple": (Pair, lambda b: (b.x, b.y)),
    "dataclass": (Record, lambda b: (b.x, b.y)),
    "nested": (lambda x, y: {"a": [Record(x, y)], "n": (1, "text")}, lambda b: (b["a"][0].x, b["a"][0].y)),
    "frozen": (lambda x, y: Frozen(Record(x, y), "text"), lambda b: (b.inputs.x, b.inputs.y)),
    "deep": (lambda x, y: Pair({"r": Frozen(Record(x, y), "text")}, [y]), lambda b: (b.x["r"].inputs.x, b.y[0])),
}


class Shaped:
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return self.make(X[index], Y[index])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_of_any_structure_reach_the_objective(shape, workers):
    make, parts = SHAPES[shape]

    class Split(Small):
        def train_step(self, batch):
            self.types.add(type(batch))
            return super().train_step(self.split(batch))

        def split(self, batch):
            return batch if isinstance(batch, tuple) and type(batch) is tuple else tuple(parts(batch))

    plain = make_loop()
    plain.fit(ax.Loader(TABLE, 8, shuffle=True), epochs=2)
    objective = Split()
    objective.types = set()
    loop = ax.Loop(objective, ax.Optimizer("adam", lr=0.01), progress=False)
    loop.fit(ax.Loader(Shaped(make), 8, shuffle=True, workers=workers), epochs=2)
    assert loop.objective.seen == plain.objective.seen
    assert torch.equal(weights(loop), weights(plain))
    sample = make(X[0], Y[0])
    assert objective.types == {list if type(sample) is tuple else type(sample)}


class Ragged:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.arange(1, 2 + index * 7 % 11), index % 2


class Text(ax.Objective):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 4, padding_idx=0), nn.Linear(4, 2)
        self.seen, self.widths = Counter(), []

    def train_step(self, batch):
        tokens, labels = batch
        self.widths.append((tokens.shape[1], int((tokens > 0).sum(1).min())))
        self.seen.update((tokens > 0).sum(1).tolist())
        return super().train_step((tokens, labels))

    def predict(self, tokens):
        return self.head(self.embedding(tokens).sum(1))

    def loss(self, logits, labels):
        return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_ragged_text_is_padded_and_put_together_by_length(workers):
    data = Ragged()
    lengths = [len(data[i][0]) for i in range(40)]
    sampler = ax.data.BucketSampler(lengths)
    loop = ax.Loop(Text(), ax.Optimizer("sgd", lr=0.1), progress=False)
    loop.fit(ax.Loader(data, 8, sampler=sampler, collate=ax.data.Pad(), workers=workers), epochs=2)
    assert loop.objective.seen == {length: 2 * count for length, count in Counter(lengths).items()}
    assert sum(width - least for width, least in loop.objective.widths) < 2 * 10 * 5
    other = ax.Loop(Text(), ax.Optimizer("sgd", lr=0.1), progress=False)
    other.fit(ax.Loader(data, 8, sampler=sampler, collate=ax.data.Pad()), epochs=2)
    assert other.objective.widths == loop.objective.widths


def test_ragged_text_without_padding_says_how_to_pad():
    with pytest.raises(RuntimeError, match="equal size") as caught:
        make_loop().fit(ax.Loader(Ragged(), 8), epochs=1)
    assert any("collate=ax.data.Pad()" in note for note in caught.value.__notes__)


class Bad(Shaped):
    def __getitem__(self, index):
        if index == 37:
            return self.decode(index)
        return X[index], Y[index]

    def decode(self, index):
        raise ValueError("a bad sample")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_item_is_named_and_keeps_its_traceback(workers):
    with pytest.raises(ValueError, match="a bad sample") as caught:
        make_loop().fit(ax.Loader(Bad(None), 8, shuffle=True, workers=workers), epochs=1)
    told = "".join(traceback.format_exception(caught.value))
    assert "in the sample at index 37" in told
    assert 'raise ValueError("a bad sample")' in told
    assert "in decode" in told
    assert "in epoch 0, step" in told


@pytest.mark.parametrize(("has", "lacks"), [("__getitem__", "__len__"), ("__len__", "__getitem__")])
def test_a_method_that_a_dataset_lacks_is_named(has, lacks):
    data = type("Lacking", (), {has: lambda self, *_: 3})()
    with pytest.raises(ax.DataError, match=rf"Lacking, which is no dataset: it has no {lacks}"):
        ax.Loader(data, 2)


def test_what_is_neither_dataset_nor_iterable_says_so_before_the_first_step():
    data = type("Lacking", (), {"__len__": lambda self: 3})()
    with pytest.raises(ax.DataError, match=r"train is Lacking: .*it has no __len__ or no __getitem__"):
        make_loop().fit(data, epochs=1)


def test_workers_of_a_pass_that_was_left_end_with_the_loop():
    loop = make_loop()
    loop.fit(DataLoader(Augmented(), 8, num_workers=2), steps=3)
    before = children()
    assert len(before) >= 2  # they wait, for a fit that goes on
    began = time.perf_counter()
    del loop
    gc.collect()
    assert gone(before)
    assert time.perf_counter() - began < 4  # torch waits 5 seconds for each where it is collected as a part of a cycle


# --- the epochs of what has no known length --------------------------------------------------------------------------


def passes_of(*sizes):
    """A function whose passes are of these sizes, one epoch after the other."""

    def batches(epoch):
        for _ in range(sizes[min(epoch, len(sizes) - 1)]):
            x = torch.rand(8, 3)
            yield x, x.sum(1)

    return batches


def test_a_fit_that_begins_where_a_pass_had_ended_trains_what_it_was_asked_to():
    loop, unbroken = make_loop(), make_loop()
    loop.fit(noise, steps=PASS)  # nobody knows yet that this was all
    result = loop.fit(noise, epochs=1)
    assert loop.state.step == 2 * PASS
    assert result.epoch == 2
    unbroken.fit(noise, epochs=2)
    assert torch.equal(weights(loop), weights(unbroken))


def test_a_length_that_was_learnt_is_kept_over_a_restart(tmp_path):
    loop, other = make_loop(), make_loop()
    loop.fit(noise, steps=3 * PASS - 4)
    other.restore(loop.save(tmp_path / "state"))
    with pytest.warns(ax.AxonWarning, match="thrown away"):
        other.fit(noise, noise, steps=4)
    loop.fit(noise, noise, steps=4)
    assert loop.state.epoch == other.state.epoch == 3
    assert "val/loss" in other.state.values


def test_a_pass_that_is_longer_than_the_one_before_is_not_cut():
    data = passes_of(4, 9)
    loop = make_loop()
    loop.fit(data, steps=10)
    assert (loop.state.epoch, loop.state.batch_index) == (1, 6)
    loop.fit(data, epochs=1)
    assert (loop.state.epoch, loop.state.step) == (2, 13)
    unbroken = make_loop()
    unbroken.fit(data, epochs=2)
    assert torch.equal(weights(loop), weights(unbroken))


def test_another_object_of_the_same_data_goes_on_after_a_restore():
    loop, unbroken = make_loop(), make_loop()
    loop.fit(Stateful(8), steps=3)
    loop.restore(loop.save())
    loop.fit(Stateful(8), steps=3)
    unbroken.fit(Stateful(8), steps=6)
    assert loop.objective.seen == unbroken.objective.seen
    assert torch.equal(weights(loop), weights(unbroken))
    loop.fit(Stateful(8), steps=1)  # without a restore it is other data, and the epoch begins anew
    assert loop.objective.seen[-1] == loop.objective.seen[0]


def test_evaluating_through_the_same_loader_leaves_the_place_alone(tmp_path):
    loader = ax.Loader(Samples(), 8)
    loop, other = make_loop(), make_loop()
    loop.fit(loader, steps=3)
    loop.evaluate(loader)
    saved = loop.save()
    assert saved["attached"]["data"]["position"] == [0, 3]
    other.restore(saved)
    with pytest.warns(ax.AxonWarning, match=r"train \(Samples\) has no state_dict"):
        other.fit(ax.Loader(Samples(), 8), steps=3)
    loop.fit(loader, steps=3)  # goes on where it stands, without a word
    assert torch.equal(weights(other), weights(loop))


@pytest.mark.parametrize("how", ["evaluate", "predict"])
def test_an_error_in_reading_says_where_it_was(how):
    def failing():
        yield X[:8], Y[:8]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk") as caught:
        getattr(make_loop(), how)(failing)
    assert any("reading batch 1" in note for note in caught.value.__notes__)
