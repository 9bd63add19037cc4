"""What was first not finite: found by computing a batch once more, by hand or on the way out of a fit."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import axontrain as ax

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(8, 1)


class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)  # of what a ReLU leaves: zeros


class Root(nn.Module):
    def forward(self, x):
        return torch.sqrt((x - x.detach()).abs())  # its gradient at 0 is infinite


class Softmax(nn.Module):
    def __init__(self, blind):
        super().__init__()
        self.blind = blind

    def forward(self, x):
        mask = torch.ones(3, dtype=torch.bool) if self.blind else torch.tensor([True, False, False])
        return x.masked_fill(mask.to(x.device), -math.inf).softmax(-1)


class Exp(nn.Module):
    def forward(self, x):
        e = torch.exp(1000 * (x + 1))
        return e / e.sum(-1, keepdim=True)


class Recomputed(nn.Module):
    def forward(self, x):
        return checkpoint(lambda x: torch.sqrt((x - x.detach()).abs()), x, use_reentrant=False)


class Net(ax.Objective):
    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.between = nn.Identity() if between is None else between
        self.out = nn.Linear(3, 1)

    def predict(self, x):
        return self.out(self.between(self.net(x)))

    def loss(self, predictions, targets):
        return F.mse_loss(predictions, targets)


def loop_of(objective, **options):
    return ax.Loop(objective, ax.Optimizer("sgd", lr=0.1, **options), progress=False)


def line_of(kind):
    return {Log: "torch.log(x)", Root: "torch.sqrt", Exp: "torch.exp", Recomputed: "torch.sqrt"}[kind]


@pytest.mark.parametrize(
    ("between", "phase", "operation"),
    [
        (Log(), "forward", "aten.log"),
        (Exp(), "forward", "aten.exp"),
        (Root(), "backward", "SqrtBackward0"),
        (Recomputed(), "backward", "SqrtBackward0"),
    ],
)
def test_the_operation_the_module_and_the_line_are_named(between, phase, operation):
    found = ax.locate_nonfinite(loop_of(Net(between)), (X, Y))
    assert (found.phase, found.operation) == (phase, operation)
    assert found.module == "between"
    path, number, source = found.line.split(":", 2)
    assert path == __file__
    assert line_of(type(between)) in source
    assert Path(path).read_text().splitlines()[int(number) - 1].strip() == source.strip()
    assert "Tensor(8, 3) float32 with" in found.tensor
    assert operation in str(found)
    assert "in between" in str(found)


def test_a_mask_is_no_finding_unless_a_nan_becomes_of_it():
    assert ax.locate_nonfinite(loop_of(Net(Softmax(blind=False))), (X, Y)) is None
    found = ax.locate_nonfinite(loop_of(Net(Softmax(blind=True))), (X, Y))
    assert (found.phase, found.operation, found.module) == ("forward", "aten._softmax", "between")
    assert "24 NaN of 24, the first at (0, 0)" in found.tensor


def test_what_came_in_not_finite_is_told_of_if_it_matters():
    bad = X.clone()
    bad[5, 2] = math.nan
    found = ax.locate_nonfinite(loop_of(Net()), (bad, Y))
    assert (found.phase, found.operation) == ("batch", "tensor 0")
    assert str(found) == "in tensor 0 of the batch: Tensor(8, 3) float32 with 1 NaN of 24, the first at (5, 2)"

    class Ignoring(Net):
        def loss(self, predictions, targets):
            return torch.where(targets.isnan(), 0, (predictions - targets.nan_to_num()) ** 2).mean()

    missing = Y.clone()
    missing[3] = math.nan
    assert ax.locate_nonfinite(loop_of(Ignoring()), (X, missing)) is None
    objective = Net()
    objective.out.weight.data[0, 1] = math.inf
    found = ax.locate_nonfinite(loop_of(objective), (X, Y))
    assert (found.phase, found.operation) == ("parameters", "out.weight")


def test_a_constant_is_named_if_there_is_nothing_else():
    class Infinite(Net):
        def predict(self, x):
            return super().predict(x) * math.inf

    found = ax.locate_nonfinite(loop_of(Infinite()), (X, Y))
    assert (found.phase, found.operation) == ("forward", "aten.mul")
    assert "super().predict(x) * math.inf" in found.line


def test_of_several_losses_the_one_that_it_is():
    class Two(ax.Objective):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def train_step(self, batch):
            x, _ = batch
            yield "a", self.a(x).square().mean()
            yield "b", {"first": self.b(x).square().mean(), "second": torch.log(self.b(x) * 0).mean()}

    loop = ax.Loop(Two(), {name: ax.Optimizer("sgd", lr=0.1) for name in "ab"}, progress=False)
    found = ax.locate_nonfinite(loop, (X, Y))
    assert (found.phase, found.operation, found.module) == ("forward", "aten.log", "")
    assert "torch.log(self.b(x) * 0)" in found.line


@pytest.mark.parametrize("precision", ["fp64", "bf16", "bf16-true", "fp16"])
def test_in_any_precision(precision):
    loop = ax.Loop(Net(Log()), ax.Optimizer("sgd", lr=0.1), precision=precision, progress=False)
    found = ax.locate_nonfinite(loop, (X, Y))
    assert found.operation == "aten.log"
    assert {"fp64": "float64", "bf16": "bfloat16", "bf16-true": "bfloat16", "fp16": "float16"}[precision] in found.tensor


def test_nothing_is_changed():
    objective = Net(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), Log()))
    loop = loop_of(objective, average="ema")
    with pytest.warns(ax.NonFiniteWarning):
        loop.fit([(X, Y)], epochs=1)
    objective.out.weight.grad = torch.ones(1, 3)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    torch.manual_seed(5)
    batch = X.clone(), Y.clone()
    assert ax.locate_nonfinite(loop, batch) is not None
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(value, objective.state_dict()[name]) for name, value in before.items())
    assert torch.equal(objective.out.weight.grad, torch.ones(1, 3))
    assert objective.net[0].weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in objective.modules())
    assert torch.equal(batch[0], X)
    assert not torch.is_anomaly_enabled()


def notes_of(loop, *data, **fit):
    with pytest.raises(ax.NonFiniteError) as caught:
        loop.fit(*data, **fit)
    return [note for note in caught.value.__notes__ if "computed again" in note or "again" in note]


@pytest.mark.parametrize("microbatch", [None, 3])
def test_the_error_of_a_fit_says_it(microbatch):
    [note] = notes_of(loop_of(Net(Log()), on_nonfinite="raise"), [(X, Y)], epochs=1, microbatch=microbatch)
    assert note.startswith("step 1 computed again: first not finite in aten.log of the forward pass, in between, at ")


def test_a_batch_that_is_no_longer_in_hand_is_read_again():
    x, y = torch.randn(40, 3), torch.zeros(40, 1)
    x[8:24, 1] = math.nan
    spec = {"patience": 2}
    [note] = notes_of(loop_of(Net(), **spec), ax.Loader(ax.ArrayDataset(x, y), 8), epochs=1)
    told = "step 3 computed again: first not finite in tensor 0 of the batch: Tensor(8, 3) float32 with 8 NaN of 24"
    assert note == f"{told}, the first at (0, 1)"
    batches = list(ax.Loader(ax.ArrayDataset(x, y), 8))
    [note] = notes_of(loop_of(Net(), **spec), batches, epochs=1)
    assert note == f"{told}, the first at (0, 1)"
    small = list(ax.Loader(ax.ArrayDataset(x, y), 4))
    [note] = notes_of(loop_of(Net(), **spec), small, epochs=1, accumulate=2)
    assert note.startswith("step 3 computed again: first not finite in tensor 0 of the batch: Tensor(4, 3) float32")
    [note] = notes_of(loop_of(Net(), **spec), lambda: iter(batches), epochs=1)
    assert note == "the batch of step 3 cannot be read again: on_nonfinite='raise' stops while it is in hand"


def test_what_is_random_may_not_come_again():
    class Once(Net):
        first = True

        def predict(self, x):
            found = super().predict(x)
            if Once.first:
                Once.first = False
                return found * math.nan
            return found

    [note] = notes_of(loop_of(Once(), on_nonfinite="raise"), [(X, Y)], epochs=1)
    assert note == "step 1 computed again: all was finite, so it depends on what is drawn at random"


def test_where_it_fails_the_error_is_what_it_was():
    class Single(Net):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is one of me")

    [note] = notes_of(loop_of(Single(Log()), on_nonfinite="raise"), [(X, Y)], epochs=1)
    assert note.startswith("computing step 1 again, to find what was first not finite, failed: RuntimeError('there is one")
