"""A road from the CPU to itself on which numbers arrive when a test says so, as those of a GPU arrive some time later."""

import torch

from axontrain import host


class SlowRoad:
    """In place of :class:`axontrain.host.Cuda`. What has not arrived is nothing that a reading could be right with."""

    def __init__(self):
        self.under_way = []
        self.waits = 0

    @classmethod
    def on_the_cpu(cls, monkeypatch, *given):
        """One that tensors of the CPU take from now on."""
        made = cls(*given)
        monkeypatch.setitem(host.ROADS, "cpu", made)
        return made

    def sent(self, tensor):
        nothing = {torch.bool: True}.get(tensor.dtype, float("nan") if tensor.is_floating_point() else 1_000_003)
        there = torch.full(tensor.shape, nothing, dtype=tensor.dtype)
        self.under_way.append((there, tensor.detach().clone()))  # as it is now, whatever is done to it later
        return there

    def mark(self, device):
        return Mark(self, len(self.under_way))

    def arrive(self):
        """All that is under way is there."""
        for there, value in self.under_way:
            there.copy_(value)
        self.under_way = []


class Mark:
    def __init__(self, road, count):
        self.road, self.before = road, [there for there, _ in road.under_way[:count]]

    def query(self):
        return not any(there is one for there, _ in self.road.under_way for one in self.before)

    def synchronize(self):
        self.road.waits += 1
        self.road.arrive()


class DelayedRoad(SlowRoad):
    """What is sent arrives so many steps later; a test counts them in ``now``."""

    def __init__(self, delay):
        super().__init__()
        self.delay, self.now = delay, 0

    def mark(self, device):
        return DelayedMark(self, len(self.under_way), self.now + self.delay)


class DelayedMark(Mark):
    def __init__(self, road, count, due):
        super().__init__(road, count)
        self.due = due

    def query(self):
        if self.road.now >= self.due:
            self._arrive()
        return super().query()

    def synchronize(self):
        self.road.waits += 1
        self._arrive()

    def _arrive(self):
        """What was sent before it, and no more."""
        mine = [pair for pair in self.road.under_way if any(pair[0] is one for one in self.before)]
        for there, value in mine:
            there.copy_(value)
        self.road.under_way = [pair for pair in self.road.under_way if not any(pair[0] is one[0] for one in mine)]
