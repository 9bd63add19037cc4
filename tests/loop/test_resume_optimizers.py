"""States of optimizers that come back from a file: in the layout, the dtype and the kernels of the Loop that goes on."""

import warnings

import pytest
import torch
from torch import nn

import axontrain as ax


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return ax.ArrayDataset(
        torch.randn(64, 3, 8, 8, generator=generator, dtype=dtype), torch.randn(64, 1, generator=generator, dtype=dtype)
    )


def channels_last():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def transposed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 1))
    net[1].weight = nn.Parameter(torch.randn(192, 8, generator=torch.Generator().manual_seed(1)).t() / 14)
    return net


def loop_of(net, optimizer, precision="fp32", **options):
    torch.manual_seed(0)
    objective = ax.Supervised(net(), "mse")
    return ax.Loop(objective, ax.Optimizer(optimizer, lr=1e-2, **options), precision=precision, progress=False)


def gone_on(make, path, then=None):
    """The weights of a run, and of one that another Loop goes on with from a file after six of twelve steps."""
    whole, first, second = make(), make(), (then or make)()
    whole.fit(data(), steps=12, batch_size=16)
    steps = first.steps(data(), steps=12, batch_size=16)
    for _ in range(6):
        next(steps)
    steps.close()
    second.restore(first.save(path))
    second.fit(data(), steps=12, batch_size=16, resume=True)
    return whole.objective.state_dict(), second.objective.state_dict()


@pytest.mark.parametrize("net", [channels_last, transposed])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "options"), [("adamw", {}), ("sgd", {"momentum": 0.9}), ("adagrad", {})], ids=["adamw", "sgd", "adagrad"]
)
def test_states_have_the_layout_of_their_parameters(tmp_path, net, optimizer, options, fused):
    options = options if fused else {**options, "fused": False}
    whole, found = gone_on(lambda: loop_of(net, optimizer, **options), tmp_path / "state")
    for name, value in whole.items():
        assert torch.equal(value, found[name]), name


class Master(torch.optim.Optimizer):
    """Keeps a float32 copy of weights in bfloat16, and writes its rounding into them."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.detach().float().clone())
                master.add_(p.grad.float(), alpha=-group["lr"])
                p.copy_(master)


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("nadam", "fp64"), ("nadam", "bf16-true"), ("asgd", "bf16-true"), (Master, "bf16-true")]
)
def test_states_keep_their_dtype(tmp_path, optimizer, precision):
    whole, found = gone_on(lambda: loop_of(channels_last, optimizer, precision), tmp_path / "state")
    for name, value in whole.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
@pytest.mark.parametrize("saved", [{"fused": False}, {"foreach": True}, {}], ids=["not fused", "foreach", "as it is"])
@pytest.mark.parametrize("now", [{"fused": False}, {}], ids=["then not fused", "then as it is"])
def test_which_kernel_computes_is_this_loops_affair(tmp_path, optimizer, saved, now):
    whole, found = gone_on(
        lambda: loop_of(channels_last, optimizer, **saved), tmp_path / "state", lambda: loop_of(channels_last, optimizer, **now)
    )
    for name, value in whole.items():
        torch.testing.assert_close(value, found[name])


def test_a_kernel_that_cannot_be_skipped_is_left(tmp_path):
    """Dampening comes with the state, and fused SGD with it starts as the guard cannot undo."""
    momentum = {"momentum": 0.9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ax.AxonWarning)  # it tells of the dampening
        whole, found = gone_on(
            lambda: loop_of(channels_last, "sgd", dampening=0.1, **momentum),
            tmp_path / "state",
            lambda: loop_of(channels_last, "sgd", **momentum),
        )
    for name, value in whole.items():
        torch.testing.assert_close(value, found[name])


def test_sparse_gradients_go_on_after_going_back_in_memory():
    torch.manual_seed(0)
    objective = ax.Supervised(nn.Sequential(nn.EmbeddingBag(10, 1, sparse=True, mode="sum")), "mse")
    loop = ax.Loop(objective, ax.Optimizer("sgd", lr=0.1), progress=False)
    words = ax.ArrayDataset(torch.randint(10, (32, 4), generator=torch.Generator().manual_seed(0)), torch.ones(32, 1))
    kept = loop.save()
    loop.fit(words, epochs=1, batch_size=8)
    after = {name: value.clone() for name, value in loop.objective.state_dict().items()}
    loop.restore(kept)
    loop.fit(words, epochs=1, batch_size=8)
    for name, value in loop.objective.state_dict().items():
        assert torch.equal(value, after[name])
