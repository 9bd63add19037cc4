"""Permutation: an order of any length, of which any part is computed and none is stored.

A Feistel network permutes the numbers below a power of two; those that fall beyond the length are sent through it again until
they fall within, which leaves a permutation of the length (cycle-walking). Each round mixes one half of the bits into the
other by a strongly universal hash, with keys drawn from the seed.

Sources: M. Luby and C. Rackoff, How to construct pseudorandom permutations from pseudorandom functions, SIAM J. Comput. 17
(1988); J. Black and P. Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002; M. Dietzfelbinger, Universal hashing and
k-wise independent random variables via integer arithmetic without primes, STACS 1996.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from axontrain.errors import ConfigurationError

ROUNDS = 12
# A hash of h bits to h bits is strongly universal in words of 2h - 1 bits or more, and the product of a word and h bits has to
# fit in an int64: with words of 41 bits h is at most 21.
WORD = 41
MOST_BITS = 42
CHUNK = 16384


class Permutation:
    """The numbers 0 to ``n - 1`` in an order that ``seed`` decides; indexed and sliced as a tensor of them would be.

    >>> order = Permutation(10**12, seed=0)
    >>> len(order), order[999_999:1_000_001].shape
    (1000000000000, torch.Size([2]))
    >>> sorted(Permutation(6, seed=3).tolist())
    [0, 1, 2, 3, 4, 5]

    Raises:
        ConfigurationError: for more than 2^42 numbers.
    """

    __slots__ = ("_keys", "_left", "_right", "n")

    def __init__(self, n: int, seed: int) -> None:
        bits = max(2, (n - 1).bit_length())
        if bits > MOST_BITS:
            raise ConfigurationError(f"an order of {n} samples: at most 2^{MOST_BITS} can be put in order")
        self.n = n
        self._left, self._right = bits // 2, bits - bits // 2
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randint(2**WORD, (ROUNDS, 2), generator=generator).tolist()
        self._keys = [(factor | 1, term) for factor, term in keys]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """The numbers at a place, in a slice of step 1, or at the places of an int64 tensor: int64, on the CPU."""
        if isinstance(index, slice):
            first, last, step = index.indices(self.n)
            places = torch.arange(first, max(first, last) if step > 0 else min(first, last), step)
        else:
            places = torch.as_tensor(index, dtype=torch.int64)
            places = torch.where(places < 0, places + self.n, places)
            if places.numel() and (int(places.min()) < 0 or int(places.max()) >= self.n):
                raise IndexError(f"an order of {self.n} samples has no place {index!r}")
        shape = places.shape
        found = self._once(places.reshape(-1))
        while bool((beyond := found >= self.n).any()):
            found[beyond] = self._once(found[beyond])
        return found.view(shape)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, self.n, CHUNK):
            yield from self[first : first + CHUNK]

    def split(self, size: int) -> Iterator[Tensor]:
        """Parts of ``size``, one after another; the last may be smaller. They are computed as they are taken."""
        chunk = size * max(1, CHUNK // size)
        for first in range(0, self.n, chunk):
            yield from torch.split(self[first : first + chunk], size)

    def tolist(self) -> list[int]:
        """All of them, as a list."""
        numbers: list[int] = self[:].tolist()
        return numbers

    def __repr__(self) -> str:
        return f"Permutation({self.n})"

    def _once(self, numbers: Tensor) -> Tensor:
        left, right = self._left, self._right
        high, low = numbers >> right, numbers & ((1 << right) - 1)
        for number, (factor, term) in enumerate(self._keys):
            if number % 2:
                low ^= _hashed(high, right, factor, term)
            else:
                high ^= _hashed(low, left, factor, term)
        return (high << right) | low


def _hashed(values: Tensor, bits: int, factor: int, term: int) -> Tensor:
    # The highest ``bits`` of a word: ((factor * x + term) mod 2^WORD) >> (WORD - bits).
    return (values * factor).add_(term).bitwise_and_((1 << WORD) - 1).bitwise_right_shift_(WORD - bits)
