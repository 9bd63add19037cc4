"""Draw: random numbers for the samples of a batch, computed where the batch lies, of (seed, epoch, index) alone.

A generator gives the next number to whoever comes next, so that its numbers depend on who came before. These are a hash of a
counter instead: of the sample's index, under a key from the seed and the epoch, and of how many were drawn for it. So a sample
draws the same in any batch, and numbers on a GPU are those of the CPU: all is arithmetic of whole numbers, in which nothing
overflows, for a product of two numbers of 32 and 31 bits fits in an int64.

Sources: J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; the hash of 32 bits and its constants are
from C. Wellons, hash-prospector, https://github.com/skeeto/hash-prospector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axontrain.errors import ConfigurationError, whole
from axontrain.randomness import derive

MASK = 2**32 - 1
STEP = 0x9E3779B9  # between the words of one sample: 2^32 over the golden ratio
AT_ONCE = 8  # words of each sample that are hashed together, for small kernels cost their launch; a crop takes two


class Numbers:
    """Random numbers for each of some samples, under one key; each call draws anew, as of a generator."""

    def __init__(self, indices: Tensor, key: int) -> None:
        self.indices = indices
        self._key = key
        self._words: Tensor | None = None
        self._drawn = 0

    def __len__(self) -> int:
        return len(self.indices)

    def integers(self, below: int) -> Tensor:
        """A whole number for each sample, 0 to ``below - 1``: (B,) int64.

        All are equally likely, to one part in 2^32 / ``below``, which is 2^31 at most.

        Raises:
            ConfigurationError: for ``below`` that is no whole number of 1 to 2^31.
        """
        if whole("below", below) > 2**31:
            raise ConfigurationError(f"below={below}: of numbers of 32 bits, 2^31 at most")
        return (self._next() * below) >> 32

    def uniform(self) -> Tensor:
        """A number for each sample, from 0 to below 1, a multiple of 2^-24: (B,) float32."""
        return (self._next() >> 8).to(torch.float32) * 2**-24

    def _next(self) -> Tensor:
        number = self._drawn % AT_ONCE
        if self._words is None or number == 0:
            self._words = _words(self.indices, self._key, self._drawn, AT_ONCE)
        self._drawn += 1
        return self._words[number]


class Draw(Numbers):
    """What the samples of one batch draw: a number each, the same in any batch, on any device.

    Each call draws anew, as of a generator, and in the order of the calls. Nothing is read to the host.

    Args:
        seed: of the run.
        epoch: the pass, from 0.
        indices: (B,) int64, which samples the batch is made of; the numbers are computed on their device.

    Attributes:
        seed, epoch, indices: as given.
        lasting: numbers of their own that have the same methods, and are the same in every epoch.

    >>> draw = Draw(0, 3, torch.tensor([7, 2, 9]))
    >>> draw.integers(10), draw.integers(10)
    (tensor([3, 1, 7]), tensor([7, 3, 0]))
    >>> Draw(0, 3, torch.tensor([2])).integers(10)
    tensor([1])
    """

    def __init__(self, seed: int, epoch: int, indices: Tensor) -> None:
        super().__init__(indices, derive(seed, "augment", epoch))
        self.seed, self.epoch = seed, epoch
        self.lasting = Numbers(indices, derive(seed, "augment"))

    def __repr__(self) -> str:
        return f"Draw(seed={self.seed}, epoch={self.epoch}, {len(self)} samples)"


def _words(indices: Tensor, key: int, first: int, count: int) -> Tensor:
    """The words of each sample from number ``first`` on: (count, B) int64, 0 to 2^32 - 1."""
    of_sample = _mixed((indices & MASK) ^ (key & MASK)) + (indices >> 32)
    numbers = torch.arange(first, first + count, device=indices.device)[:, None] * STEP
    return _mixed(((of_sample + numbers) & MASK) ^ (key >> 32))


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits in which each bit of the result depends on all."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & MASK
    x = x ^ (x >> 15)
    x = (x * (0xD35A2D97 - 2**32)) & MASK  # modulo 2^32 the same factor, and the product fits
    return x ^ (x >> 15)
