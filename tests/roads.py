"""A road from the CPU to itself on which numbers arrive when a test says so, as those of a GPU arrive some time later."""

import torch

from axontrain import host


class SlowRoad:
    """In place of :class:`axontrain.host.Cuda`. What has not arrived is nothing that a reading could be right with."""

    def __init__(self):
        self.under_way = []
        self.waits = 0

    @classmethod
    def on_the_cpu(cls, monkeypatch):
        """One that tensors of the CPU take from now on."""
        made = cls()
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
