"""The order of data that is read a block at a time: blocks in random order, rows mixed within a window of them.

A uniform shuffle of a file larger than memory would read a whole block for each row. Here an epoch reads each block once.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from axontrain.errors import ConfigurationError, whole
from axontrain.randomness import derive

# A batch may lie across the border of two windows, and the next one goes on in the second.
KEPT = 2


class BlockOrder:
    """The order of one epoch over blocks of rows; :func:`order_in_blocks` makes it.

    Only the windows that are asked for are computed: memory is of the order of the number of blocks and of one window.
    """

    def __init__(self, seed: int, epoch: int, blocks: Sequence[int], window: int) -> None:
        self.seed, self.epoch, self.window = seed, epoch, whole("window", window, what="of blocks")
        sizes = torch.tensor(list(blocks), dtype=torch.int64)
        if bool((sizes < 0).any()):
            raise ConfigurationError(f"a block of {int(sizes.min())} rows: the sizes of blocks are 0 or more")
        permuted = torch.randperm(len(sizes), generator=_generator(seed, epoch))
        self._firsts = (sizes.cumsum(0) - sizes)[permuted]  # of the rows of a block, in the order in which blocks are read
        self._sizes = sizes[permuted]
        # Where each window ends, in rows of the epoch.
        ends = self._sizes.cumsum(0)
        self._ends: list[int] = [*ends[self.window - 1 :: self.window].tolist(), *ends[-1:].tolist()]
        self._recent: OrderedDict[int, Tensor] = OrderedDict()
        self.computed = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows at the places ``start`` to ``stop - 1`` of the epoch: int64 (stop - start,), on the CPU.

        Raises:
            IndexError: for places that the epoch has not got.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"an epoch of {len(self)} rows has no places {start} to {stop}")
        parts: list[Tensor] = []
        number = bisect.bisect_right(self._ends, start)
        while start < stop:
            first, end = self._ends[number - 1] if number else 0, self._ends[number]
            if start < end:  # not a window of empty blocks
                last = min(stop, end)
                parts.append(self._window(number)[start - first : last - first])
                start = last
            number += 1
        if not parts:
            return torch.empty(0, dtype=torch.int64)
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def __repr__(self) -> str:
        return f"BlockOrder({len(self)} rows in {len(self._sizes)} blocks, mixed {self.window} at a time)"

    def _window(self, number: int) -> Tensor:
        if number in self._recent:
            self._recent.move_to_end(number)
            return self._recent[number]
        blocks = slice(number * self.window, (number + 1) * self.window)
        firsts, sizes = self._firsts[blocks], self._sizes[blocks]
        # The rows of the window's blocks one after another: how far each block is from where it would lie, and a count.
        shifts = firsts - (sizes.cumsum(0) - sizes)
        rows = shifts.repeat_interleave(sizes) + torch.arange(int(sizes.sum()))
        shuffled = rows[torch.randperm(len(rows), generator=_generator(self.seed, self.epoch, number))]
        self.computed += 1
        self._recent[number] = shuffled
        if len(self._recent) > KEPT:
            self._recent.popitem(last=False)
        return shuffled


def order_in_blocks(seed: int, epoch: int, blocks: Sequence[int], window: int) -> BlockOrder:
    """The order in which an epoch goes through rows that lie in blocks (row groups): a pure function of its arguments.

    The blocks are permuted and taken ``window`` at a time; the rows of a window are shuffled uniformly. An epoch that is
    gone through in this order needs ``window`` blocks in memory. Where all blocks fit in one window it is a uniform shuffle.

    Args:
        seed: of the run.
        epoch: which pass it is.
        blocks: the sizes of all blocks, in the order of the data.
        window: how many blocks are mixed, 1 or more.

    >>> order = order_in_blocks(0, 0, [3, 3, 2], window=2)
    >>> len(order), sorted(order.rows(0, 8).tolist())
    (8, [0, 1, 2, 3, 4, 5, 6, 7])
    >>> bool((order.rows(2, 5) == order.rows(0, 8)[2:5]).all())
    True

    Raises:
        ConfigurationError: for a window of no block, or a block of fewer than no rows.
    """
    return BlockOrder(seed, epoch, blocks, window)


def _generator(seed: int, epoch: int, *window: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, "blocks", epoch, *window))
