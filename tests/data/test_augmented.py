"""A Loader's ``augment=``: a sample is augmented the same in whatever batch, process, share and run it comes."""

import dataclasses
import functools
import re
import warnings
from collections import namedtuple

import pytest
import torch
from host_reads import NoHostReads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import axontrain as ax
from axontrain.data.augment import Crop, Cutout, Draw, Flip
from axontrain.data.stream import Stream

N = 45
X = torch.randn(N, 2, 6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N)
CHAIN = [Crop(2), Flip(alternating=True), Cutout(2)]


def brighter(images, draw):
    return images + draw.uniform()[:, None, None, None]


class Rows:
    """The same samples one by one, for workers."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], Y[index]


def stream():
    yield from zip(X, Y, strict=True)


def augmented(seed, epoch, indices=Y, chain=CHAIN, x=X):
    """What is to come of the samples."""
    draw, made = Draw(seed, epoch, indices), x[indices]
    for one in chain:
        made = one(made, draw)
    return made


def by_sample(batches):
    """The images in the order of the samples, which the labels tell."""
    images, labels = map(torch.cat, zip(*batches, strict=True))
    assert sorted(labels.tolist()) == labels.unique().tolist(), "no sample came twice"
    return images[labels.argsort()]


MAKERS = {
    "arrays": lambda **how: ax.Loader(ax.ArrayDataset(X, Y), **how),
    "samples": lambda **how: ax.Loader(Rows(), **how),
    "transformed": lambda **how: ax.Loader(ax.ArrayDataset(X, Y), transform=tuple, **how),
    "tensors": lambda **how: ax.Loader(torch.utils.data.TensorDataset(X, Y), **how),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(1, N + 1), shuffle=st.booleans(), seed=st.integers(0, 9), epoch=st.integers(0, 9), ranks=st.integers(1, 3)
)
def test_a_sample_is_augmented_the_same_in_any_batch(make, size, shuffle, seed, epoch, ranks):
    loader = make(batch_size=size, shuffle=shuffle, augment=CHAIN)
    whole = list(loader.batches(seed, epoch))
    assert torch.equal(by_sample(whole), augmented(seed, epoch))
    start = len(whole) // 2
    for batch, expected in zip(loader.batches(seed, epoch, start), whole[start:], strict=True):
        assert all(map(torch.equal, batch, expected))
    shares = [list(loader.batches(seed, epoch, share=(rank, ranks))) for rank in range(ranks)]
    for parts, expected in zip(zip(*shares, strict=True), whole, strict=True):
        assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), expected))


@pytest.mark.parametrize("dataset", [Rows, lambda: ax.ArrayDataset(X, Y)], ids=["samples", "arrays"])
def test_workers_change_nothing(dataset):
    loaders = [ax.Loader(dataset(), 8, shuffle=True, augment=CHAIN, workers=workers) for workers in (0, 2)]
    for epoch in range(2):
        here, there = (list(loader.batches(0, epoch, 1)) for loader in loaders)
        assert len(here) == len(there) == 5
        assert all(torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other, strict=True))
    loaders[1].close()


def test_another_seed_and_another_epoch_are_others():
    loader = ax.Loader(ax.ArrayDataset(X, Y), 8, augment=[Crop(2)])
    first, again, epoch, seed = (by_sample(loader.batches(*of)) for of in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first, again)
    for other in (epoch, seed):
        differing = (other != first).flatten(1).any(1).float().mean()
        assert differing > 0.8  # one in 25 is as it was by chance
    assert torch.equal(by_sample(loader), first)  # iterated by itself it counts its passes
    assert torch.equal(by_sample(loader), epoch)
    own = ax.Loader(ax.ArrayDataset(X, Y), 8, augment=[Crop(2)], seed=1)
    assert torch.equal(by_sample(own), seed)


def test_an_iterable_goes_by_the_place_in_the_pass():
    loader = ax.Loader(stream, 7, augment=CHAIN)
    whole = list(loader.batches(0, 2))
    assert torch.equal(by_sample(whole), augmented(0, 2))
    assert torch.equal(by_sample(ax.Loader(stream, 20, augment=CHAIN).batches(0, 2)), augmented(0, 2))
    assert [len(labels) for _, labels in loader.batches(0, 2, 0, 2)] == [7, 7]
    shares = [list(loader.batches(0, 2, share=(rank, 2))) for rank in range(2)]
    assert torch.equal(by_sample([*shares[0], *shares[1]]), augmented(0, 2))


def test_samplers_and_mixtures_go_by_the_index():
    weighted = ax.Loader(ax.ArrayDataset(X, Y), 8, sampler=ax.data.WeightedSampler(torch.ones(N)), augment=CHAIN)
    for images, labels in weighted.batches(0, 0):
        assert torch.equal(images, augmented(0, 0, labels)), "one that comes twice is alike"
    lists = ax.Loader(ax.ArrayDataset(X, Y), batch_sampler=[[3, 1], [7], [44, 0, 2]], augment=CHAIN)
    assert all(torch.equal(images, augmented(0, 0, labels)) for images, labels in lists.batches(0, 0))
    mixture = ax.Mixture({"a": ax.ArrayDataset(X[:20], Y[:20]), "b": ax.ArrayDataset(X[20:], Y[20:])})
    batches = list(ax.Loader(mixture, 8, shuffle=True, augment=CHAIN).batches(0, 1))
    assert {batch.task for batch in batches} == {"a", "b"}
    assert torch.equal(by_sample(batch.batch for batch in batches), augmented(0, 1))


Pair = namedtuple("Pair", ["image", "label"])


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    label: torch.Tensor


def as_list(batch):
    return list(batch)


STRUCTURES = {
    "tuple": ((X, Y), CHAIN, lambda batch: batch[0]),
    "list": ((X, Y), CHAIN, lambda batch: batch[0]),
    "bare": (X, CHAIN, lambda batch: batch),
    "by place": ((Y, X), {1: CHAIN}, lambda batch: batch[1]),
    "from the end": ((Y, X), {-1: CHAIN}, lambda batch: batch[1]),
    "by key": ({"y": Y, "x": X}, {"x": CHAIN}, lambda batch: batch["x"]),
    "by key of the inputs": (({"x": X}, Y), {"x": CHAIN}, lambda batch: batch[0]["x"]),
    "named tuple": (Pair(X, Y), CHAIN, lambda batch: batch.image),
    "by name": (Pair(X, Y), {"image": CHAIN}, lambda batch: batch.image),
    "by field": (Record(X, Y), {"image": CHAIN}, lambda batch: batch.image),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_batches_of_any_structure(name):
    arrays, augment, images_of = STRUCTURES[name]
    data = ax.ArrayDataset(*arrays) if type(arrays) is tuple else ax.ArrayDataset(arrays)
    how = {"transform": as_list} if name == "list" else {}
    plain, loader = (ax.Loader(data, 8, **how, **more) for more in ({}, {"augment": augment}))
    rows = Y.split(8)
    for before, batch, indices in zip(plain.batches(0, 0), loader.batches(0, 0), rows, strict=True):
        assert type(batch) is type(before)
        assert torch.equal(images_of(batch), augmented(0, 0, indices))
        assert torch.equal(images_of(before), X[indices])


def test_parts_that_are_given_the_same_draw_the_same():
    mask = (X[:, 0] > 0).long()
    data = ax.ArrayDataset({"image": X, "mask": mask, "y": Y})
    geometry = [Crop(2), Flip()]
    loader = ax.Loader(data, 8, shuffle=True, augment={"image": [*geometry, Cutout(2)], "mask": geometry})
    for batch in loader.batches(0, 0):
        kept = batch["image"][:, 0] != 0  # but for what was cut out
        assert torch.equal(batch["mask"][kept], (batch["image"][:, 0] > 0).long()[kept])
        assert torch.equal(batch["image"], augmented(0, 0, batch["y"], [*geometry, Cutout(2)]))


def test_ones_own_function_takes_part():
    loader = ax.Loader(ax.ArrayDataset(X, Y), 8, shuffle=True, augment=[Flip(), brighter])
    assert torch.equal(by_sample(loader.batches(4, 2)), augmented(4, 2, chain=[Flip(), brighter]))
    alone = ax.Loader(ax.ArrayDataset(X, Y), 8, shuffle=True, augment=brighter)
    assert torch.equal(by_sample(alone.batches(4, 2)), augmented(4, 2, chain=[brighter]))


class Look(ax.Objective):
    """Keeps what it was trained and evaluated on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(60, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.seen = {True: [], False: []}

    def predict(self, images):
        self.seen[self.training].append(images.clone())
        return self.net(images)[:, 0]

    def loss(self, predictions, targets):
        return (predictions - targets / N).square().mean()


def script(directory=None, *, stop=None, workers=0, augment=CHAIN, make="arrays"):
    loop = ax.Loop(Look(), ax.Optimizer("adam", lr=0.01), seed=3, progress=False, directory=directory)
    if stop is not None:
        loop.on("after_batch")(lambda state: ax.Stop("enough") if state.step == stop else None)
    train = MAKERS[make](batch_size=8, shuffle=True, augment=augment, workers=workers)
    return loop, {"train": train, "validation": ax.Loader(ax.ArrayDataset(X, Y), 15), "epochs": 3}


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.objective.parameters()])


@pytest.mark.parametrize("make", ["arrays", "samples"])
@pytest.mark.parametrize("stop", [6, 8, 17])
def test_a_run_that_goes_on_in_an_epoch_is_the_same(tmp_path, stop, make):
    whole, fit = script(make=make)
    assert whole.fit(**fit).step == 18
    begun, fit = script(tmp_path, stop=stop, make=make)
    assert begun.fit(**fit).status == "stopped"
    other, fit = script(tmp_path, make=make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert other.fit(**fit, resume=True).status == "completed"
    seen = [*begun.objective.seen[True], *other.objective.seen[True]]
    assert all(map(torch.equal, seen, whole.objective.seen[True]))
    assert len(seen) == 18
    assert torch.equal(weights(other), weights(whole))
    assert torch.equal(torch.cat(whole.objective.seen[False][:3]), X), "evaluation is not augmented"
    indices = [ax.order(3, epoch, N) for epoch in range(3)]
    expected = torch.cat([augmented(3, epoch, rows) for epoch, rows in enumerate(indices)])
    assert torch.equal(torch.cat(seen), expected)


def test_microbatches_and_workers_see_the_same():
    first = None
    for how, more in (({}, {}), ({"make": "samples", "workers": 2}, {}), ({}, {"microbatch": 3})):
        loop, fit = script(**how)
        loop.fit(**fit, **more)
        seen = torch.cat(loop.objective.seen[True])
        first = seen if first is None else first
        assert torch.equal(seen, first)


OTHERS = {
    "none": (None, None),
    "another": ([Crop(1)], "[Crop(padding=1, mode='reflect')]"),
    "a function": ({0: brighter}, "{0: [brighter]}"),
}


@pytest.mark.parametrize(("augment", "now"), OTHERS.values(), ids=OTHERS)
def test_a_run_that_is_resumed_with_another_augmentation_is_told(tmp_path, augment, now):
    begun, fit = script(tmp_path, stop=8)
    begun.fit(**fit)
    other, fit = script(tmp_path, augment=augment)
    with pytest.warns(ax.AxonWarning) as caught:
        other.fit(**fit, resume=True)
    (warning,) = [str(one.message) for one in caught]
    was = "[Crop(padding=2, mode='reflect'), Flip(alternating=True), Cutout(size=2, fill=0)]"
    assert warning.endswith(f"Since then has changed: the training data's augment: it was {was!r}, and is {now!r}")


class Plain:
    def __call__(self, images, draw):
        return images


def test_what_is_said_of_an_augmentation_is_the_same_in_each_process():
    def described(augment):
        return Stream(ax.Loader(ax.ArrayDataset(X, Y), 8, augment=augment), "train").described()["augment"]

    assert described(brighter) == "[brighter]"
    assert described(Plain()) == "[Plain]"
    assert (
        described({"x": Flip(), "y": [Flip(), Plain()]})
        == "{'x': [Flip(alternating=False)], 'y': [Flip(alternating=False), Plain]}"
    )
    partial = functools.partial(lambda images, draw, by: images * by, by=2)
    assert re.fullmatch(r"\[functools.partial\(<function .*<lambda>>, by=2\)\]", described(partial))
    assert described(None) is None


def test_nothing_is_read_between_batches():
    data = ax.ArrayDataset(X, Y)
    loader = ax.Loader(data, 8, shuffle=True, augment=CHAIN)
    with NoHostReads():
        batches = [list(loader.batches(0, epoch)) for epoch in range(2)]
    assert torch.equal(by_sample(batches[1]), augmented(0, 1))


def test_batches_that_differ_are_still_an_error():
    def grows(images, draw):
        return images if 0 in draw.indices else images[..., :4]

    loop = ax.Loop(Look(), ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.raises(ax.BatchMismatchError, match="batch 1 of epoch 0"):
        loop.fit(ax.Loader(ax.ArrayDataset(X, Y), 8, augment=[grows]), epochs=1)


GIVEN = {
    "class": (Flip, "augment=Flip is a class: give an instance, Flip"),
    "class of two": ([Crop], "augment=Crop is a class"),
    "text": ("flip", "augment=str: a function"),
    "one argument": (lambda images: images, "is called with images and draw.*transform="),
    "nothing": ({}, "names no part"),
}


@pytest.mark.parametrize(("augment", "words"), GIVEN.values(), ids=GIVEN)
def test_what_is_no_augmentation_is_refused(augment, words):
    with pytest.raises(ax.ConfigurationError, match=words):
        ax.Loader(ax.ArrayDataset(X, Y), 8, augment=augment)


FAILING = {
    "no key": ({"image": X, "y": Y}, Flip(), r"dict of .*: it has to be named, as augment=\{'image'"),
    "another key": ({"image": X, "y": Y}, {"images": Flip()}, "it has no part 'images'"),
    "another place": ((X, Y), {2: Flip()}, "it has no part 2"),
    "a name of a tuple": ((X, Y), {"image": Flip()}, "Tensor.*it has no part 'image'"),
    "labels": ((X, Y), {1: Flip()}, r"images \(B, C, H, W\).*got Tensor\(8,\)"),
    "nested": (({"image": X}, Y), Flip(), "a row for each of 8 samples, and this part of the batch is dict"),
    "nothing": ((X, Y), lambda images, draw: None, "<lambda> returned NoneType for Tensor"),
    "fewer": ((X, Y), lambda images, draw: images[1:], "<lambda> returned Tensor.7, 2, 6, 5"),
}


@pytest.mark.parametrize(("arrays", "augment", "words"), FAILING.values(), ids=FAILING)
def test_what_fails_says_where(arrays, augment, words):
    data = ax.ArrayDataset(*arrays) if isinstance(arrays, tuple) else ax.ArrayDataset(arrays)
    with pytest.raises(ax.DataError, match=words) as caught:
        list(ax.Loader(data, 8, augment=augment).batches(0, 4, 2))
    assert "in augment= of batch 2 of epoch 4" in caught.value.__notes__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)")
@pytest.mark.parametrize("where", ["there", "here", "workers"])
def test_a_loop_on_a_gpu_sees_what_one_on_the_cpu_does(where):
    seen = {}
    for device in ("cpu", "cuda"):
        loop, fit = script()
        loop = ax.Loop(loop.objective, ax.Optimizer("adam", lr=0.01), seed=3, device=device, progress=False)
        if where == "there" and device == "cuda":
            fit["train"] = ax.Loader(ax.ArrayDataset(X, Y).to("cuda"), 8, shuffle=True, augment=CHAIN)
        elif where == "workers":
            start = "spawn" if device == "cuda" else None
            fit["train"] = ax.Loader(Rows(), 8, shuffle=True, augment=CHAIN, workers=2, start_method=start)
        loop.fit(**fit)
        assert all(images.device.type == device for images in loop.objective.seen[True])
        seen[device] = torch.cat(loop.objective.seen[True]).cpu()
    assert torch.equal(seen["cpu"], seen["cuda"])
