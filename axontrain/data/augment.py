"""Augmentations of whole batches of images, on the device where the batch lies: ``ax.Loader(..., augment=[...])``.

Each is called as ``augmentation(images, draw)`` and returns the images. What is random comes from the :class:`Draw`, so that
what becomes of a sample is a function of (seed, epoch, index) alone. There is no loop over samples, no mask index, and nothing
is read to the host.

>>> import axontrain as ax
>>> data = ax.ArrayDataset(torch.rand(100, 3, 32, 32), torch.arange(100))  # on a GPU: data.to("cuda")
>>> train = ax.Loader(data, 50, shuffle=True, augment=[Crop(4), Flip(alternating=True), Cutout(8)])
>>> [images.shape for images, labels in train]
[torch.Size([50, 3, 32, 32]), torch.Size([50, 3, 32, 32])]

One's own is any function of the two:

>>> def brighter(images, draw):
...     return images * (0.8 + 0.4 * draw.uniform()[:, None, None, None])
>>> train = ax.Loader(data, 50, shuffle=True, augment=[Flip(), brighter])

Sources: K. Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU, arXiv:2404.00498 (alternating flip); T. DeVries and
G. W. Taylor, Improved regularization of convolutional neural networks with Cutout, arXiv:1708.04552.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from axontrain.data.draws import Draw
from axontrain.errors import ConfigurationError, DataError, kind_of, unknown, whole

__all__ = ["Crop", "Cutout", "Draw", "Flip"]

MODES = ("reflect", "zeros")


class Crop:
    """Moves each image up or down and left or right by up to ``padding`` pixels, all offsets equally likely.

    That is, the image is padded on each side and cropped to its own size at a random place.

    Args:
        padding: pixels.
        mode: what comes in from beyond the edge: "reflect" mirrors the image there, its outermost pixels not repeated;
            "zeros" is zeros.

    >>> Crop(1, mode="zeros")(torch.arange(1, 10).reshape(1, 1, 3, 3), Draw(0, 0, torch.tensor([4])))
    tensor([[[[5, 6, 0],
              [8, 9, 0],
              [0, 0, 0]]]])

    Raises:
        ConfigurationError: for ``padding`` that is no whole number of 1 or more, or as large as the image if it is mirrored.
        UnknownNameError: for another ``mode``.
        DataError: for images that are not (B, C, H, W) or (B, H, W).
    """

    def __init__(self, padding: int = 4, mode: str = "reflect") -> None:
        self.padding, self.mode = whole("padding", padding, what="of pixels"), mode
        if mode not in MODES:
            raise unknown("mode of Crop:", mode, MODES)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Move the images; in dtype and memory format they stay as they are."""
        height, width = _sides(self, images, draw)
        padding, mirrored = self.padding, self.mode == "reflect"
        if mirrored and padding >= min(height, width):
            raise ConfigurationError(
                f"{self!r} of images of {height} x {width}: an image mirrored at its edge reaches {min(height, width) - 1} "
                f"beyond it; take a smaller padding, or mode='zeros'"
            )
        rows, columns = _offsets(draw, 2 * padding + 1, height), _offsets(draw, 2 * padding + 1, width)
        if mirrored:
            return _picked(images, _mirrored(rows - padding, height), _mirrored(columns - padding, width))
        return _picked(F.pad(images, (padding,) * 4), rows, columns)

    def __repr__(self) -> str:
        return f"Crop(padding={self.padding}, mode={self.mode!r})"


class Flip:
    """Flips images left to right: each with probability 1/2.

    Args:
        alternating: choose at random in epoch 0, and in each later epoch the other way from the one before, so that two epochs
            in a row show each image both ways.

    >>> images = torch.arange(3).expand(4, 1, 1, 3)
    >>> [Flip(alternating=True)(images, Draw(0, epoch, torch.arange(4)))[:, 0, 0, 0].tolist() for epoch in range(3)]
    [[0, 2, 0, 2], [2, 0, 2, 0], [0, 2, 0, 2]]

    Raises:
        ConfigurationError: for ``alternating`` that is neither True nor False.
        DataError: for images that are not (B, C, H, W) or (B, H, W).
    """

    def __init__(self, alternating: bool = False) -> None:
        if not isinstance(alternating, bool):
            raise ConfigurationError(
                f"Flip(alternating={alternating!r}): True or False; each image is flipped in half of cases"
            )
        self.alternating = alternating

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Flip the images; in dtype and memory format they stay as they are."""
        _, width = _sides(self, images, draw)
        chosen = (draw.lasting.integers(2) + draw.epoch) % 2 if self.alternating else draw.integers(2)
        places = torch.arange(width, device=images.device)
        return _picked(images, None, torch.where(chosen[:, None] == 1, width - 1 - places, places))

    def __repr__(self) -> str:
        return f"Flip(alternating={self.alternating})"


class Cutout:
    """Fills a square of each image, at a random place that is wholly within it; all places are equally likely.

    Args:
        size: of its sides, in pixels.
        fill: with what: of images that are normalised 0 is the mean, else black.

    >>> Cutout(2)(torch.ones(1, 1, 4, 4, dtype=torch.uint8), Draw(0, 0, torch.tensor([3])))[0, 0]
    tensor([[0, 0, 1, 1],
            [0, 0, 1, 1],
            [1, 1, 1, 1],
            [1, 1, 1, 1]], dtype=torch.uint8)

    Raises:
        ConfigurationError: for ``size`` that is no whole number of 1 or more, or larger than the image; for ``fill`` that is
            no number, or none of the images' dtype.
        DataError: for images that are not (B, C, H, W) or (B, H, W).
    """

    def __init__(self, size: int = 8, fill: float = 0) -> None:
        self.size, self.fill = whole("size", size, what="of pixels"), fill
        if isinstance(fill, bool) or not isinstance(fill, (int, float)):
            raise ConfigurationError(f"Cutout(fill={kind_of(fill)}): a number")

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Fill a square of each; the images that are given stay as they are."""
        height, width = _sides(self, images, draw)
        if self.size > min(height, width):
            raise ConfigurationError(f"{self!r} of images of {height} x {width}: the square has to fit into the image")
        if not images.dtype.is_floating_point and not _holds(images.dtype, self.fill):
            raise ConfigurationError(f"{self!r}: that is no number of {images.dtype}, which the images are of")
        rows = _offsets(draw, height - self.size + 1, self.size)
        columns = _offsets(draw, width - self.size + 1, self.size)
        filled = images.clone()
        pixels, dim = _pixels(filled)
        pixels.scatter_(dim, _spread(_places(rows, columns, width), pixels, dim), self.fill)
        return filled

    def __repr__(self) -> str:
        return f"Cutout(size={self.size}, fill={self.fill})"


def _sides(augmentation: object, images: Tensor, draw: Draw) -> tuple[int, int]:
    """Height and width, of what is checked to be images, one for each that draws."""
    if not isinstance(images, Tensor) or images.dim() not in (3, 4):
        raise DataError(
            f"{augmentation!r} is of images (B, C, H, W) or (B, H, W), and got {kind_of(images)}"
            + (": reshape the data before, images.reshape(-1, 1, H, W)" if isinstance(images, Tensor) else "")
        )
    if len(images) != len(draw):
        raise DataError(
            f"{augmentation!r}: {len(draw)} samples draw, and there are {kind_of(images)}: its first dimension is the batch"
        )
    return images.shape[-2], images.shape[-1]


def _holds(dtype: torch.dtype, number: float) -> bool:
    if dtype is torch.bool:
        return number in (0, 1)
    return number == number // 1 and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


def _offsets(draw: Draw, count: int, length: int) -> Tensor:
    """So many neighbouring places for each sample, which begin at one of the first ``count``: (B, length)."""
    return draw.integers(count)[:, None] + torch.arange(length, device=draw.indices.device)


def _mirrored(places: Tensor, length: int) -> Tensor:
    return (length - 1) - ((length - 1) - places.abs()).abs()


def _places(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Of each sample's (B, h) rows and (B, w) columns the places among all pixels of its image: (B, h * w)."""
    return (rows[:, :, None] * width + columns[:, None, :]).flatten(1)


def _channels_last(images: Tensor) -> bool:
    return images.dim() == 4 and not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _pixels(images: Tensor) -> tuple[Tensor, int]:
    """The images with their pixels in one dimension, and which that is, a view where they lie in one of the two formats."""
    if _channels_last(images):
        return images.permute(0, 2, 3, 1).flatten(1, 2), 1
    return images.flatten(-2), images.dim() - 2


def _spread(places: Tensor, over: Tensor, dim: int) -> Tensor:
    """Places of pixels (B, P), alike for all channels."""
    if over.dim() == 2:
        return places
    return places[:, :, None].expand(-1, -1, over.shape[2]) if dim == 1 else places[:, None].expand(-1, over.shape[1], -1)


def _picked(images: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """Of each image its own (B, h) rows, or all, and (B, w) columns, in its memory format."""
    count, (height, width) = len(images), images.shape[-2:]
    if _channels_last(images):  # a pixel is a row, which is copied as one
        if rows is None:
            rows = torch.arange(height, device=images.device).expand(count, -1)
        first = torch.arange(count, device=images.device)[:, None] * (height * width)
        places = _places(rows, columns, width) + first
        picked = images.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, places.flatten())
        return picked.reshape(count, rows.shape[1], columns.shape[1], images.shape[1]).permute(0, 3, 1, 2)
    if rows is None:  # an index of one dimension is quicker to make than one of two
        at = columns.reshape(count, *(1,) * (images.dim() - 2), columns.shape[1])
        return images.gather(images.dim() - 1, at.expand(*images.shape[:-1], -1))
    pixels, dim = _pixels(images)
    picked = pixels.gather(dim, _spread(_places(rows, columns, width), pixels, dim))
    return picked.reshape(*images.shape[:-2], rows.shape[1], columns.shape[1])
