"""Augmentations: each image in its own way, of (seed, epoch, index) alone, as a plain loop over images does it."""

import itertools
import re

import numpy as np
import pytest
import torch
from host_reads import NoHostReads
from hypothesis import given, settings
from hypothesis import strategies as st

import axontrain as ax
from axontrain.data.augment import Crop, Cutout, Draw, Flip
from axontrain.randomness import derive

MASK = 2**32 - 1
ALL = [Crop(3), Crop(5, mode="zeros"), Flip(), Flip(alternating=True), Cutout(4), Cutout(3, fill=7)]
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def images(count, channels=3, height=7, width=9, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 200, (count, channels, height, width), generator=generator).to(dtype)


# The same by Python's own numbers, one sample and one word at a time.


def mixed(x):
    x ^= x >> 16
    x = (x * 0x21F0AAAD) % 2**32
    x ^= x >> 15
    x = (x * 0xD35A2D97) % 2**32
    return x ^ (x >> 15)


def word(index, number, *of):
    key = derive(of[0], "augment", *of[1:])
    start = mixed((index & MASK) ^ (key & MASK)) + (index >> 32)
    return mixed(((start + number * 0x9E3779B9) & MASK) ^ (key >> 32))


def by_hand(augmentation, image, seed, epoch, index):
    """One image (C, H, W), by NumPy."""
    height, width = image.shape[1:]
    image = image.copy()
    if isinstance(augmentation, Crop):
        padding = augmentation.padding
        top, left = ((word(index, number, seed, epoch) * (2 * padding + 1)) >> 32 for number in range(2))
        how = {"reflect": "reflect", "zeros": "constant"}[augmentation.mode]
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=how)
        return padded[:, top : top + height, left : left + width]
    if isinstance(augmentation, Flip):
        if augmentation.alternating:
            flipped = ((word(index, 0, seed) >> 31) + epoch) % 2
        else:
            flipped = word(index, 0, seed, epoch) >> 31
        return image[:, :, ::-1] if flipped else image
    size = augmentation.size
    top, left = ((word(index, n, seed, epoch) * (side - size + 1)) >> 32 for n, side in enumerate((height, width)))
    image[:, top : top + size, left : left + size] = augmentation.fill
    return image


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.int64], ids=str)
def test_each_image_is_as_by_hand(augmentation, memory_format, dtype):
    x = images(40, dtype=dtype).contiguous(memory_format=memory_format)
    before, strides = x.clone(), x.stride()
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:40]
    for seed, epoch in ((0, 0), (3, 1), (2**40, 7)):
        made = augmentation(x, Draw(seed, epoch, indices))
        expected = [
            by_hand(augmentation, image.numpy(), seed, epoch, index) for image, index in zip(x, indices.tolist(), strict=True)
        ]
        assert torch.equal(made, torch.from_numpy(np.stack(expected)))
        assert (made.dtype, made.stride()) == (dtype, strides)
        assert not torch.equal(made, x)
        assert torch.equal(x, before), "what is given stays as it is"


def test_large_indices_have_numbers_of_their_own():
    indices = torch.tensor([5, 5 + 2**32, 5 + 2**33, 2**41 + 5])
    words = [word(index, 0, 0, 0) for index in indices.tolist()]
    assert (Draw(0, 0, indices).integers(2**31)).tolist() == [one >> 1 for one in words]
    assert len(set(words)) == 4


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 8, 8), (4, 1, 8, 8), (2, 3, 6, 13), (2, 3, 13, 6)], ids=str)
def test_any_number_of_images_of_any_shape(augmentation, memory_format, shape):
    x = images(*shape).contiguous(memory_format=memory_format)
    made = augmentation(x, Draw(0, 0, torch.arange(shape[0])))
    assert made.shape == x.shape
    assert made.is_contiguous(memory_format=memory_format) or not shape[0]  # of nothing, torch calls neither the format
    expected = [by_hand(augmentation, image.numpy(), 0, 0, index) for index, image in enumerate(x)]
    assert made.tolist() == [one.tolist() for one in expected]


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
def test_images_without_channels_and_views(augmentation):
    x = images(6, 1)
    draw = [Draw(0, 0, torch.arange(6)) for _ in range(4)]
    expected = augmentation(x, draw[0])
    assert torch.equal(augmentation(x[:, 0], draw[1]), expected[:, 0])
    wide = torch.cat([x, x], 3)[..., :9]  # strides of neither format
    assert torch.equal(augmentation(wide, draw[2]), expected)
    alike = x[:1].expand(6, -1, -1, -1)
    assert torch.equal(augmentation(alike, draw[3]), augmentation(alike.clone(), Draw(0, 0, torch.arange(6))))


ONES = st.sampled_from(ALL)


@settings(deadline=None, max_examples=60)
@given(
    several=st.lists(ONES, min_size=1, max_size=4),
    indices=st.lists(st.integers(0, 2**40), max_size=12),
    seed=st.integers(0, 2**62),
    epoch=st.integers(0, 1000),
    cuts=st.integers(1, 5),
)
def test_a_batch_is_its_samples_whatever_the_batch(several, indices, seed, epoch, cuts):
    x, numbers = images(len(indices), 2), torch.tensor(indices, dtype=torch.int64)

    def augmented(x, numbers):
        draw = Draw(seed, epoch, numbers)
        for one in several:
            x = one(x, draw)
        return x

    whole = augmented(x, numbers)
    parts = zip(x.split(cuts), numbers.split(cuts), strict=True)
    assert torch.equal(torch.cat([augmented(*part) for part in parts]), whole)
    backwards = augmented(x.flip(0), numbers.flip(0)).flip(0)
    assert torch.equal(backwards, whole)


@settings(deadline=None, max_examples=50)
@given(
    indices=st.lists(st.integers(0, 2**42), max_size=5),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0),
    below=st.integers(1, 2**31),
)
def test_what_is_drawn_is_of_the_index_and_how_many_were_drawn(indices, seed, epoch, below):
    draw = Draw(seed, epoch, torch.tensor(indices, dtype=torch.int64))
    for number in range(20):  # more than are hashed at once
        if number % 3:
            expected = [(word(index, number, seed, epoch) * below) >> 32 for index in indices]
            found = draw.integers(below)
            assert found.dtype == torch.int64
        else:
            expected = [(word(index, number, seed, epoch) >> 8) / 2**24 for index in indices]
            found = draw.uniform()
            assert found.dtype == torch.float32
        assert found.tolist() == expected


def chi_square(numbers, kinds):
    """How far counts are from equal, in standard deviations of what chance would make of it."""
    counts = torch.bincount(numbers, minlength=kinds).double()
    assert len(counts) == kinds
    expected = len(numbers) / kinds
    return float(((counts - expected) ** 2).sum() / expected - (kinds - 1)) / (2 * (kinds - 1)) ** 0.5


def samples(n=200_000):
    return torch.arange(n)


@pytest.mark.parametrize("below", [2, 3, 9, 25, 256, 1000])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_all_numbers_are_equally_likely(below, seed):
    draw = Draw(seed, seed, samples())
    for _ in range(9):
        assert abs(chi_square(draw.integers(below), below)) < 5


def test_uniform_numbers_are():
    drawn = Draw(0, 0, samples()).uniform()
    assert 0 <= float(drawn.min()) < 1e-4 < 0.9999 < float(drawn.max()) < 1
    assert abs(chi_square((drawn * 500).long(), 500)) < 5
    assert abs(float(drawn.double().mean()) - 0.5) < 5 * 12**-0.5 / len(drawn) ** 0.5


PAIRS = {
    "two draws": lambda of: (of(0, 0)[0], of(0, 0)[1]),
    "draws of two blocks": lambda of: (of(0, 0)[0], of(0, 0)[8]),
    "two epochs": lambda of: (of(0, 0)[0], of(0, 1)[0]),
    "two seeds": lambda of: (of(0, 0)[0], of(1, 0)[0]),
    "neighbours": lambda of: (of(0, 0)[0][:-1], of(0, 0)[0][1:]),
    "two apart": lambda of: (of(0, 0)[0][:-2], of(0, 0)[0][2:]),
    "a power of two apart": lambda of: (of(0, 0)[0][: -(2**12)], of(0, 0)[0][2**12 :]),
    "an epoch and the run": lambda of: (of(0, 0)[0], Draw(0, 0, samples()).lasting.integers(16)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_numbers_are_independent(pair):
    def of(seed, epoch):
        draw = Draw(seed, epoch, samples())
        return [draw.integers(16) for _ in range(9)]

    first, second = pair(of)
    assert abs(chi_square(first * 16 + second, 256)) < 5


def test_all_offsets_occur_equally_often():
    count, padding = 40_000, 4
    numbers = torch.arange(100.0).reshape(1, 1, 10, 10).expand(count, -1, -1, -1)
    first = Crop(padding)(numbers, Draw(0, 0, torch.arange(count)))[:, 0, 4, 4]  # the middle says which offset it was
    offsets = torch.stack([first // 10, first % 10], 1).long()
    assert offsets.unique().tolist() == list(range(9))
    assert abs(chi_square(offsets[:, 0] * 9 + offsets[:, 1], 81)) < 5


def test_all_places_of_a_cutout_occur_equally_often():
    made = Cutout(3)(torch.ones(40_000, 1, 8, 6), Draw(0, 0, torch.arange(40_000)))[:, 0]
    assert (made == 0).sum((1, 2)).unique().tolist() == [9]
    first = (made == 0).flatten(1).int().argmax(1)
    rows, columns = first // 6, first % 6
    assert abs(chi_square(rows * 4 + columns, 6 * 4)) < 5


@pytest.mark.parametrize("seed", [0, 1])
def test_half_are_flipped_in_any_epoch(seed):
    x = torch.tensor([0, 1]).reshape(1, 1, 1, 2).expand(20_000, -1, -1, -1)
    indices = torch.arange(20_000)
    flipped = {
        alternating: [Flip(alternating)(x, Draw(seed, epoch, indices))[:, 0, 0, 0] for epoch in range(4)]
        for alternating in (False, True)
    }
    for each in itertools.chain(*flipped.values()):
        assert abs(chi_square(each, 2)) < 5
    first, second, third, fourth = flipped[True]
    assert torch.equal(second, 1 - first)
    assert torch.equal(third, first)
    assert torch.equal(fourth, second)
    first, second, *_ = flipped[False]
    assert abs(chi_square(first * 2 + second, 4)) < 5


def every(x, indices, seed=0, epoch=5):
    draw = Draw(seed, epoch, indices)
    for one in ALL:
        x = one(x, draw)
    return x


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_nothing_is_read_to_the_host(memory_format):
    x = images(12).contiguous(memory_format=memory_format)
    with NoHostReads():
        made = every(x, torch.arange(12))
    assert not torch.equal(made, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_it_is_one_graph(memory_format):
    x = images(12).contiguous(memory_format=memory_format)

    def chain(x, draw):
        for one in ALL:
            x = one(x, draw)
        return x

    compiled = torch.compile(chain, fullgraph=True, backend="eager")
    for epoch in range(2):
        draw = Draw(0, epoch, torch.arange(12))
        assert torch.equal(compiled(x, draw), every(x, torch.arange(12), epoch=epoch))


REFUSED = {
    "padding": (lambda: Crop(0), "padding=0: a whole number of pixels, 1 or more"),
    "mode": (lambda: Crop(mode="edge"), "unknown mode of Crop: 'edge'.*Known: reflect, zeros"),
    "size": (lambda: Cutout(1.5), "size=1.5: a whole number of pixels"),
    "fill": (lambda: Cutout(fill="black"), re.escape("Cutout(fill=str): a number")),
    "mirror": (lambda: Crop(4)(images(2, height=4), two()), "of images of 4 x 9: .* reaches 3 beyond it; take a smaller"),
    "square": (lambda: Cutout(8)(images(2), two()), "of images of 7 x 9: the square has to fit"),
    "byte": (lambda: Cutout(2, fill=0.5)(images(2, dtype=torch.uint8), two()), "fill=0.5.*no number of torch.uint8"),
    "bytes": (lambda: Cutout(2, fill=256)(images(2, dtype=torch.uint8), two()), "no number of torch.uint8"),
    "bool": (lambda: Cutout(2, fill=2)(images(2) > 9, two()), "no number of torch.bool"),
    "too many": (lambda: two().integers(2**31 + 1), "2\\^31 at most"),
    "below": (lambda: two().integers(0), "below=0: a whole number, 1 or more"),
}
WRONG = {
    "flat": (
        lambda: Flip()(torch.zeros(2, 64), two()),
        r"of images \(B, C, H, W\) or \(B, H, W\), and got Tensor\(2, 64\) .*reshape",
    ),
    "list": (lambda: Flip()([1, 2], two()), r"and got list of 2: \(int, int\)$"),
    "one image": (
        lambda: Crop(2)(images(1)[0], two()),
        "2 samples draw, and there are .*3, 7, 9.*first dimension is the batch",
    ),
}


def two():
    return Draw(0, 0, torch.arange(2))


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused(call, words):
    with pytest.raises(ax.ConfigurationError, match=words):
        call()


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_batch_of_images_is_refused(call, words):
    with pytest.raises(ax.DataError, match=words):
        call()


def test_the_largest_that_fits_does():
    x = images(8, 1, 4, 4)
    for one in (Crop(3), Crop(30, mode="zeros"), Cutout(4, fill=0)):
        made = one(x, Draw(0, 0, torch.arange(8)))
        expected = [by_hand(one, image.numpy(), 0, 0, index) for index, image in enumerate(x)]
        assert torch.equal(made, torch.from_numpy(np.stack(expected)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (they are hidden but from pytest -m gpu)")
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_gpu_makes_the_same(memory_format, dtype):
    x, indices = images(64, dtype=dtype).contiguous(memory_format=memory_format), torch.arange(64).flip(0) + 2**33
    expected = every(x, indices)
    there, where = x.cuda(), indices.cuda()
    every(there, where)  # the first call makes contexts
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # whatever would wait for the device is an error
        captured = every(there, where)
    graph.replay()
    for made in (every(there, where), captured):
        assert made.is_cuda
        assert made.is_contiguous(memory_format=memory_format)
        assert torch.equal(made.cpu(), expected)
    assert torch.equal(Draw(3, 4, where).uniform().cpu(), Draw(3, 4, indices).uniform())
