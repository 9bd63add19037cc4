"""Data that draws from a state of its own, over epochs: a run that was left at an epoch's end reads on as one that was not."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

import axontrain as ax

pytestmark = pytest.mark.filterwarnings("ignore:.* has no state_dict, so that to go on at batch")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


class Drawing:
    """An iterable whose generator goes on over epochs, and whose state says so."""

    def __init__(self):
        self.generator, self.place, self.order = torch.Generator().manual_seed(0), 8, torch.zeros(8)

    def __len__(self):
        return 4

    def __iter__(self):
        if self.place >= 8:
            self.order, self.place = torch.randperm(8, generator=self.generator), 0
        while self.place < 8:
            self.place += 2
            yield self.order[self.place - 2 : self.place]

    def state_dict(self):
        return {"generator": self.generator.get_state(), "place": self.place, "order": self.order}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.place, self.order = state["place"], state["order"]


class Placed:
    """An iterable whose state is a place in its pass: at the end of one there is nothing after it."""

    def __init__(self):
        self.place = self.start = 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.place, self.start = self.start, 0
        while self.place < 8:
            self.place += 2
            yield torch.arange(self.place - 2, self.place)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.start = state["place"]


def with_generator():
    return DataLoader(Rows(), 2, shuffle=True, generator=torch.Generator().manual_seed(0))


def with_sampler():
    return DataLoader(Rows(), 2, sampler=RandomSampler(Rows(), generator=torch.Generator().manual_seed(0)))


class Told(ax.Objective):
    def __init__(self, seen):
        super().__init__()
        self.weight_, self.seen = nn.Parameter(torch.zeros(())), seen

    def train_step(self, batch):
        self.seen.append(batch.tolist())
        return ax.Step(self.weight_ * batch.sum())


def loop_in(directory, seen):
    return ax.Loop(Told(seen), ax.Optimizer("sgd", lr=0.1), progress=False, directory=directory)


@pytest.mark.parametrize("data", [Drawing, Placed, with_generator, with_sampler])
@pytest.mark.parametrize("limit", [{"steps": n} for n in (1, 3, 4, 5, 8)] + [{"epochs": 1}, {"epochs": 2}], ids=str)
def test_it_goes_on_as_if_nothing_had_been(tmp_path, data, limit):
    whole, seen = [], []
    loop_in(tmp_path / "whole", whole).fit(data(), epochs=3)
    assert len(whole) == 12
    loop_in(tmp_path / "run", seen).fit(data(), **limit)
    loop_in(tmp_path / "run", seen).fit(data(), epochs=3, resume=True)
    assert seen == whole


@pytest.mark.parametrize("data", [Drawing, with_generator, with_sampler])
@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_in_memory_too(data, step):
    whole, seen = [], []
    loop_in(None, whole).fit(data(), epochs=3)
    loop, read = loop_in(None, seen), data()
    loop.fit(read, steps=step)
    loop.fit(read, epochs=3, resume=True)
    assert seen == whole


@pytest.mark.parametrize("data", [Drawing, with_generator])
def test_saved_by_a_hook_at_the_last_batch_of_an_epoch(tmp_path, data):
    whole, seen = [], []
    loop = loop_in(None, whole)
    loop.on("after_batch")(lambda state: loop.save(tmp_path / "state") and None if state.step == 4 else None)
    loop.fit(data(), epochs=3)
    again = loop_in(None, seen)
    again.restore(tmp_path / "state")
    again.fit(data(), epochs=3, resume=True)
    assert seen[-8:] == whole[4:]
