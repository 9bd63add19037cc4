"""A small objective that keeps what it was trained on, and what it means that a run goes on."""

import warnings

import torch
from torch import nn

import axontrain as ax

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1)
PASS = 8  # batches of 8 in a pass over it


class Small(ax.Objective):
    """Keeps what it was trained on; its dropout draws from the run's own stream."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.seen = []

    def train_step(self, batch):
        self.seen.append(self.split(batch)[0].tolist())
        return super().train_step(batch)

    def split(self, batch):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        if isinstance(x, list):  # of the parts of a list, each a column: torch collates lists so
            x = torch.stack(x, 1)
        return torch.as_tensor(x).float(), torch.as_tensor(y).float()

    def predict(self, x):
        return self.net(x)[:, 0]

    def loss(self, predictions, targets):
        return ((predictions - targets) ** 2).mean()


def make_loop(**how):
    return ax.Loop(Small(), ax.Optimizer("adam", lr=0.01), progress=False, **how)


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.objective.parameters()])


def assert_goes_on(make, path, first, total=3 * PASS, told=None, **how):
    """A run that is broken off, saved, and gone on with in a new Loop with new data ends as the unbroken one."""
    unbroken, begun, other = make_loop(), make_loop(), make_loop()
    unbroken.fit(make(), steps=total, **how)
    data = make()
    begun.fit(data, steps=first, **how)
    other.restore(begun.save(path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.fit(make(), steps=total - first, **how)
    said = [str(one.message) for one in caught if issubclass(one.category, ax.AxonWarning)]
    assert len(said) == (told is not None), said
    assert told is None or told in said[0]
    assert other.objective.seen == unbroken.objective.seen[first:]
    assert torch.equal(weights(other), weights(unbroken))
    begun.fit(data, steps=total - first, **how)  # the same Loop goes on too, and nothing is read again
    assert torch.equal(weights(begun), weights(unbroken))
