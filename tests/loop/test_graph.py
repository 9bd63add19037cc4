"""graph=: steps recorded once and replayed are, bit for bit, what they would have been; where not, they are not replayed.

They are recorded by a stand-in that does on the CPU what CUDA graphs do (tests/recorded.py); the same on a GPU is in
tests/test_gpu_graph.py.
"""

import argparse
import contextlib
import copy
import enum
import gc
import inspect
import pickle
import random
import re
import sys
import time
import warnings
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import Recording, living, recorder  # noqa: F401  # a fixture
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import axontrain as ax
from axontrain import randomness
from axontrain.execution import comparison, trial
from axontrain.execution.graphed import Graphed
from axontrain.execution.outcome import Outcome
from axontrain.execution.step_graph import StepGraph
from axontrain.execution.steps import OneLoss

pytestmark = pytest.mark.usefixtures("recorder")

X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
DATA = ax.ArrayDataset(X, Y)


class Net(ax.Objective):
    """With all that a step changes: dropout, BatchNorm's buffers, and a large buffer of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.register_buffer("moving", torch.zeros(80, 80))
        self.scale = 1.0

    def predict(self, x):
        if self.training:
            self.moving.mul_(0.9).add_(x.detach().mean())
        return self.net(x) * self.scale

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Plain(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)

    def predict(self, x):
        return self.net(x)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Plain4(Plain):
    """With the names of Net's parameters."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def made(graph, optimizer=None, objective=None, **options):
    torch.manual_seed(0)
    optimizer = optimizer or ax.Optimizer("adamw", lr=1e-2)
    return ax.Loop((objective or Net)(), optimizer, graph=graph, device="cpu", progress=False, **options)


def fitted(graph, *made_of, data=DATA, epochs=8, batch_size=16, fit=(), **options):
    loop = made(graph, *made_of, **options)
    loop.fit(data, *fit, epochs=epochs, batch_size=batch_size)
    return loop


def states(loop):
    tree = loop.save()
    return tree["objective"], tree["optimizers"], tree["rng"], tree["values"], tree["history"], loop.state.step


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("seconds", "elapsed", "time"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


OPTIMIZERS = {
    "sgd": lambda: ax.Optimizer("sgd", lr=0.1),
    "sgd, momentum, one cycle": lambda: ax.Optimizer(
        "sgd", lr=0.1, momentum=0.9, nesterov=True, schedule=ax.schedules.one_cycle(), clip_norm=1.0
    ),
    "adamw, cosine, groups": lambda: ax.Optimizer(
        "adamw", lr=1e-2, no_decay=True, groups={"net.4.*": {"lr": 1e-3}}, schedule=ax.schedules.cosine(warmup="5%")
    ),
    "adam, torch's StepLR": lambda: ax.Optimizer(
        "adam", lr=1e-2, clip_value=0.1, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5)
    ),
    "torch's OneCycleLR, which moves betas": lambda: ax.Optimizer(
        "adam", lr=1e-2, schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=48)
    ),
    "rmsprop, which counts on the host": lambda: ax.Optimizer("rmsprop", lr=1e-3),
    "sgd, dampened, so not fused": lambda: ax.Optimizer("sgd", lr=0.1, momentum=0.9, dampening=0.5),
    "muon and adamw, scheduled": lambda: ax.Optimizer(
        "muon",
        lr=1e-2,
        groups={lambda name, p: p.ndim != 2: {"optimizer": "adamw", "lr": 1e-3}},
        schedule=ax.schedules.linear(),
    ),
    "ema": lambda: ax.Optimizer("adamw", lr=1e-2, average="ema"),
}
AFTER = ("rmsprop", "sgd, dampened", "muon", "torch's OneCycleLR")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replayed_steps_are_bitwise_those_without(name):
    plain, replayed = (fitted(graph, OPTIMIZERS[name](), metrics=["accuracy"], fit=(DATA,)) for graph in (False, True))
    report = replayed.report()
    if name == "torch's OneCycleLR, which moves betas":
        assert "betas" in report.update
        assert report.replayed == 48 - 3 - 2 * 4 - 2
    else:
        assert (report.recorded, report.held, report.replayed, report.not_replayed) == (1, 2, 43, "")
    assert bool(report.update) == name.startswith(AFTER)
    assert same(states(plain), states(replayed))


@pytest.mark.slow
def test_a_thousand_steps_are_bitwise_those_without():
    plain, replayed = (fitted(graph, OPTIMIZERS["adamw, cosine, groups"](), epochs=170) for graph in (False, True))
    assert replayed.report().replayed == 1020 - 5
    assert same(states(plain), states(replayed))


def test_two_optimizers_of_one_loss():
    class Two(ax.Objective):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

        def predict(self, x):
            return self.head(self.body(x).relu())

        def loss(self, logits, labels):
            return F.cross_entropy(logits, labels)

    def optimizers():
        return {"body": ax.Optimizer("adamw", lr=1e-2), "head": ax.Optimizer("rmsprop", lr=1e-3)}

    loops = []
    for graph in (False, True):
        loops.append(fitted(graph, optimizers(), Two))
    assert loops[1].report().replayed > 0
    assert same(states(loops[0]), states(loops[1]))


@pytest.mark.parametrize("on_gpus", ["adamw", "rmsprop"])
def test_steps_that_are_not_finite_are_skipped_in_a_replay_too(on_gpus):
    x = X.clone()
    x[40] = float("nan")
    loops = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer(on_gpus, lr=1e-3), metrics=["accuracy"])
        loop.callbacks.append(ax.callback.FunctionCallback("after_batch", lambda state: None, every=1))
        with pytest.warns(ax.NonFiniteWarning, match=r"updates of the optimizer 'main' were skipped|1 update"):
            loop.fit(ax.Loader(ax.ArrayDataset(x, Y), 16), epochs=6)
        loops.append(loop)
    assert loops[1].report().replayed > 20
    assert loops[1].state.optimizers["main"].skipped == 6
    assert same(states(loops[0]), states(loops[1]))


def test_eager_steps_between_replays_put_back_the_buffers_of_now():
    # A large buffer is copied before a step where its version says that it was changed, of which a replay says nothing.
    x = X.clone()
    x[90] = float("nan")  # in the last batch of a pass, which is of another size
    loops = []
    for graph in (False, True):
        with pytest.warns(ax.NonFiniteWarning):
            loops.append(fitted(graph, data=ax.Loader(ax.ArrayDataset(x[:91], Y[:91]), 16), batch_size=32, epochs=3))
    assert loops[1].report().replayed > 5
    assert same(states(loops[0]), states(loops[1]))


def test_raising_on_what_is_not_finite():
    x = X.clone()
    x[80] = float("inf")
    loops = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("adamw", lr=1e-2, on_nonfinite="raise"))
        with pytest.raises(ax.NonFiniteError, match="step 9"):
            loop.fit([(x[i : i + 8], Y[i : i + 8]) for i in range(16, 96, 8)], epochs=1)
        loops.append(loop)
    assert loops[1].report().replayed > 0
    assert same(states(loops[0]), states(loops[1]))
    assert not living


def changed_once(kind, change):
    """Runs of an objective that is changed at a step; both ways."""
    loops = []
    for graph in (False, True):
        loop = made(graph, objective=kind)

        @loop.on("before_batch")
        def _(state):
            if state.step == 15:
                change(state.objective)

        loop.fit(DATA, epochs=5, batch_size=16)
        loops.append(loop)
    return loops


def changing(hook, change):
    """A run in which a hook changes something twice; both ways."""
    loops = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("adamw", lr=1e-2, clip_norm=1.0))

        @loop.on(hook)
        def _(state):
            if state.step in (10, 22):
                change(state)

        loop.fit(DATA, epochs=8, batch_size=16)
        loops.append(loop)
    assert same(states(loops[0]), states(loops[1]))
    return loops[1].report()


def scaled(state):
    state.objective.scale *= 0.9


def less_dropout(state):
    state.objective.net[3].p *= 0.5


def other_decay(state):
    state.optimizers["main"].set(weight_decay=0.01 * state.step)


def lower_rate(state):
    state.optimizers["main"].rescale(0.5)


def tighter(state):
    state.optimizers["main"].spec.clip_norm *= 0.5


def frozen(state):
    for p in state.objective.net[0].parameters():
        p.requires_grad_(not p.requires_grad)


def moved(state):
    for p in state.objective.parameters():
        p.data = p.data.clone()


def replaced(state):
    state.objective.moving = torch.ones(80, 80)


def state_cleared(state):
    for optimizer in state.optimizers["main"].optimizers:
        optimizer.state.clear()


def momentum_replaced(state):
    (optimizer,) = state.optimizers["main"].optimizers
    for of_p in optimizer.state.values():
        of_p["exp_avg"] = torch.zeros_like(of_p["exp_avg"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (scaled, "scale of Net was"),
        (less_dropout, r"p of net\.3 \(Dropout\) was"),
        (other_decay, "the optimizer's weight_decay was"),
        (lower_rate, "the optimizer's lr was"),
        (tighter, "the optimizer's clip_norm was"),
        (frozen, r"weight of net\.0 \(Linear\) lies elsewhere, has another shape, or is trained or frozen otherwise"),
        (moved, r"weight of net\.0 \(Linear\) lies elsewhere"),
        (replaced, "moving of Net was given another tensor"),
        (state_cleared, "what the optimizer keeps was replaced"),
        (momentum_replaced, "what the optimizer keeps was replaced"),
    ],
)
def test_what_changes_between_steps_is_seen(change, told):
    report = changing("before_batch", change)
    assert report.recorded == 3
    assert report.replayed > 25
    assert len(report.rerecorded) == 2
    for line in report.rerecorded:
        assert re.search(told, line), line


class Mode(enum.Enum):
    ONE, TWO = 1, 2


class Holding(Net):
    """What it computes with lies in all sorts of places."""

    factor = 1.0  # of the class, until somebody sets one of the instance

    def __init__(self):
        super().__init__()
        self.full = torch.arange(1.0, 7.0)
        self.window, self.mode, self.function = self.full[:2], Mode.ONE, torch.tanh
        self.parts, self.mixed = [torch.ones(()), torch.ones(())], {"t": 1.0, "function": torch.sigmoid}
        self.options, self.weights = argparse.Namespace(a=1.0), [1.0, (2.0, [3.0])]

    def predict(self, x):
        logits = super().predict(x) * self.factor * self.window.sum() / 3 * self.mode.value * sum(self.parts)
        logits = logits + self.function(logits) + self.mixed["t"] * self.mixed["function"](logits) * self.options.a
        mask = getattr(self, "mask", None)
        return logits * self.weights[1][1][0] * (1 if mask is None else mask)


def own_factor(o):
    o.factor = 0.5


def later_buffer(o):
    o.register_buffer("mask", torch.tensor(0.5))


def other_function(o):
    o.function = torch.sin


def other_mode(o):
    o.mode = Mode.TWO


def other_option(o):
    o.options.a = 3.0


def other_in_a_dict(o):
    o.mixed["t"] = 3.0


def other_tensor_in_a_list(o):
    o.parts[1] = torch.full((), 3.0)


def other_view(o):
    o.window = o.full[:6]


def same_memory_other_shape(o):
    o.window.set_(o.full.untyped_storage(), 0, (4,), (1,))


def deep_in_lists(o):
    o.weights[1][1][0] = 1.5


@pytest.mark.parametrize(
    "change",
    [
        own_factor, later_buffer, other_function, other_mode, other_option, other_in_a_dict, other_tensor_in_a_list, other_view,
        same_memory_other_shape, deep_in_lists,
    ],
)  # fmt: skip
def test_wherever_it_lies_a_change_is_seen(change):
    loops = changed_once(Holding, change)
    report = loops[1].report()
    assert (report.recorded, len(report.rerecorded)) == (2, 1), report
    assert report.replayed == 30 - 5 - 3
    assert same(states(loops[0]), states(loops[1]))


class KeepsApart(Net):
    """What it writes to in place is neither parameter nor buffer, and lies under private names and in containers."""

    def __init__(self):
        super().__init__()
        self._center, self.kept = torch.zeros(3), {"mean": torch.zeros(())}
        self.teacher = [nn.Linear(8, 3)]

    def predict(self, x):
        logits = super().predict(x)
        if self.training:
            with torch.no_grad():
                self._center.mul_(0.9).add_(logits.mean(0), alpha=0.1)
                self.kept["mean"].mul_(0.5).add_(x.mean())
                for p in self.teacher[0].parameters():
                    p.mul_(0.99)
        return logits + self._center + self.kept["mean"] + 0.1 * self.teacher[0](x).detach()


class KeepsAShape(Net):
    def __init__(self):
        super().__init__()
        self.mask = torch.ones(1, 3).expand(16, 3)

    def predict(self, x):
        return super().predict(x) * self.mask


class NetOfGraphs(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", torch.eye(16).to_sparse())

    def predict(self, x):
        return super().predict(torch.sparse.mm(self.adjacency, x))


@pytest.mark.parametrize("kind", [KeepsApart, KeepsAShape])
def test_tensors_that_are_no_buffers_are_as_without(kind):
    plain, replayed = (fitted(graph, objective=kind) for graph in (False, True))
    assert replayed.report().replayed == 43
    assert same(states(plain), states(replayed))
    if kind is KeepsApart:
        assert torch.equal(plain.objective._center, replayed.objective._center)


@pytest.mark.filterwarnings("ignore::axontrain.AxonWarning")
def test_a_sparse_buffer_does_no_harm():
    plain, replayed = (fitted(graph, objective=NetOfGraphs) for graph in (False, True))
    assert same(plain.objective.net.state_dict(), replayed.objective.net.state_dict())


def batch_order():
    for n in range(40):
        given = {"noisy": X[:16] + n, "clean": X[16:32], "y": Y[:16]}
        yield given if n % 2 else dict(reversed(given.items()))


def test_the_order_of_names_in_a_batch_is_not_mixed_up():
    class Ordered(Net):
        def split(self, batch):
            return batch["noisy"] - 2 * batch["clean"], batch["y"]

    plain, replayed = (
        fitted(graph, objective=Ordered, data=list(batch_order()), epochs=1, batch_size=32, strict=False)
        for graph in (False, True)
    )
    assert replayed.report().recorded == 2
    assert same(states(plain), states(replayed))


class Shares(Net):
    """Parts that write into one list, which falls back: it has to stay one."""

    def __init__(self):
        super().__init__()
        self._losses, self.calls, self._array = LOG, 0, np.zeros(1)
        self.gate = nn.Linear(8, 3)
        self.gate._losses = self._losses

    def predict(self, x):
        if self.training:
            self._losses.append(self.gate(x).square().mean())
            self.calls += 1
            self._array[0] += 1
        return super().predict(x)

    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        return loss + self.gate._losses.pop() if self.training and self.gate._losses else loss


LOG: list = []


class DrawsAside(Net):
    def __init__(self):
        super().__init__()
        self._random, self.rngs = random.Random(1), [np.random.default_rng(2), torch.Generator().manual_seed(1)]

    def predict(self, x):
        if self.training and (self._random.random() < 0.5 or self.rngs[0].random() < 0.5):
            x = x + torch.rand(x.shape, generator=self.rngs[1])
        return super().predict(x)


@pytest.mark.parametrize("mode", [True, "auto"])
@pytest.mark.parametrize("kind", [Shares, DrawsAside])
def test_after_falling_back_objects_are_the_same_and_generators_where_they_were(kind, mode):
    results = []
    for graph in (False, mode):
        LOG.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loop = fitted(graph, objective=kind)
        results.append(loop)
        if kind is Shares:
            assert loop.objective._losses is LOG is loop.objective.gate._losses
            assert (loop.objective.calls, loop.objective._array[0]) == (48, 48)
    assert bool(told) == (mode is True)
    assert results[1].report().replayed == 0
    assert results[1].report().not_replayed
    assert same(states(results[0]), states(results[1]))


@pytest.mark.parametrize("call", [4, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_while_it_tries_leaves_all_as_it_was(call, error, monkeypatch):
    monkeypatch.setattr(F, "left_of_it", 0, raising=False)  # in a library, where nobody looks for what a step changes

    class Interrupted(Net):
        def loss(self, logits, labels):
            F.left_of_it -= 1
            if F.left_of_it == 0:
                raise error("now")
            return super().loss(logits, labels)

    seen = []
    for graph in (False, True):
        loop = made(graph, objective=Interrupted)
        for number in range(1, 8):
            trying = graph and call == 4  # it is computed several times
            F.left_of_it = 2 if number == call and trying else 1 if number == call else 0
            if number == call:
                before = states(loop)
                if trying and error is ValueError:  # what it tries is not the step: that is done without
                    with pytest.warns(ax.AxonWarning, match="ValueError: now"):
                        loop.train_on_batch((X[:16], Y[:16]))
                    continue
                with pytest.raises(error):
                    loop.train_on_batch((X[:16], Y[:16]))
                weights, expected = (
                    {name: value for name, value in one[0].items() if name.startswith("net.") and "running" not in name}
                    for one in (states(loop), before)
                )
                weights.pop("net.1.num_batches_tracked"), expected.pop("net.1.num_batches_tracked")
                assert same((weights, states(loop)[1]), (expected, before[1]))
            else:
                loop.train_on_batch((X[:16], Y[:16]))
        seen.append(loop)
    assert "update" not in vars(seen[1].state.optimizers["main"])
    assert gc.isenabled()


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class HoldsOddly(Net):
    def __init__(self):
        super().__init__()
        self.slotted, self.array, self.queue = Slotted(), np.ones(2), deque([1.0])
        self.deep = [[[[[[1.0]]]]]]
        self.method = self.slotted.__class__.__init__ and SimpleNamespace(own=Schedule()).own.value

    def predict(self, x):
        factor = self.slotted.scale * float(self.array[0]) * self.queue[0] * self.deep[0][0][0][0][0][0]
        return super().predict(x) * factor * self.method()


class Schedule:
    def __init__(self):
        self.now = 1.0

    def value(self):
        return self.now


def in_slots(o):
    o.slotted.scale = 0.5


def in_an_array(o):
    o.array[0] = 0.5


def in_a_deque(o):
    o.queue[0] = 0.5


def in_the_deep(o):
    o.deep[0][0][0][0][0][0] = 0.5


def behind_a_method(o):
    o.method.__self__.now = 0.5


@pytest.mark.parametrize("change", [in_slots, in_an_array, in_a_deque, in_the_deep, behind_a_method])
def test_odd_places_are_looked_at_too(change):
    loops = changed_once(HoldsOddly, change)
    assert (loops[1].report().recorded, len(loops[1].report().rerecorded)) == (2, 1), loops[1].report()
    assert same(states(loops[0]), states(loops[1]))


def test_an_objective_that_holds_the_state():
    loop = made(True)
    loop.objective.state = loop.state
    with pytest.warns(ax.AxonWarning, match="is the LoopState, which is another in each step"):
        loop.fit(DATA, epochs=2, batch_size=16)


def test_what_cannot_be_compared_is_taken_for_another():
    class Odd:
        def __init__(self):
            self.value = 1.0

        def __eq__(self, other):
            return self.value.anything == other.value

        __hash__ = None

    class HoldsOdd(Net):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

    loop = made(True, objective=HoldsOdd)

    @loop.on("before_batch")
    def _(state):
        if state.step == 15:
            state.objective.odd = Odd()

    loop.fit(DATA, epochs=5, batch_size=16)
    assert loop.report().recorded == 2


def test_hooks_on_every_module():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.warns(ax.AxonWarning, match="every module has hooks"):
            fitted(True, epochs=2)
    finally:
        handle.remove()


def test_hooks_on_every_module_that_come_later():
    called = []
    loop = made(True)
    for _ in range(10):
        loop.train_on_batch((X[:16], Y[:16]))
    assert loop.report().replayed > 0
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(type(module).__name__))
    try:
        loop.train_on_batch((X[:16], Y[:16]))  # without, and others are recorded of the next
        with pytest.warns(ax.AxonWarning, match="every module has hooks"):
            loop.train_on_batch((X[:16], Y[:16]))
        for _ in range(3):
            loop.train_on_batch((X[:16], Y[:16]))
    finally:
        handle.remove()
    assert called.count("Dropout") == 5
    assert loop.report().rerecorded == ["there are hooks on every module"]


@pytest.mark.parametrize("of_all", [False, True])
def test_hooks_on_an_optimizer_that_come_later(of_all):
    loops, called = [], []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("adamw", lr=1e-2))
        called.append(0)

        def hook(optimizer, args, kwargs):
            called[-1] += 1

        for _ in range(10):
            loop.train_on_batch((X[:16], Y[:16]))
        (optimizer,) = loop.state.optimizers["main"].optimizers
        handle = register_optimizer_step_post_hook(hook) if of_all else optimizer.register_step_post_hook(hook)
        try:
            for _ in range(10):
                loop.train_on_batch((X[:16], Y[:16]))
        finally:
            handle.remove()
        loops.append(loop)
    assert called == [10, 10]
    assert same(states(loops[0]), states(loops[1]))
    report = loops[1].report()
    assert report.rerecorded == ["AdamW has hooks on its steps"]
    assert report.update == "AdamW has hooks on its steps"  # and so is done after what is replayed
    assert report.replayed > 10


def test_autocast_around_a_step_by_hand():
    loops = []
    for graph in (False, True):
        loop = made(graph, objective=Plain4)
        for number in range(18):
            with torch.autocast("cpu", torch.bfloat16, enabled=number >= 10):
                loop.train_on_batch((X[:16], Y[:16]))
        loops.append(loop)
    assert loops[1].report().replayed == 5
    assert same(states(loops[0]), states(loops[1]))


def test_a_step_of_a_class_of_its_own_and_predictions_of_no_known_kind():
    class More(ax.Step):
        pass

    class Returns(Net):
        def train_step(self, batch):
            return More(super().train_step(batch).loss)

    class Distribution(Net):
        def train_step(self, batch):
            step = super().train_step(batch)
            step.predictions = torch.distributions.Categorical(logits=step.predictions, validate_args=False)
            return step

    for kind, told in ((Returns, "train_step returns a More"), (Distribution, "the step gives Categorical")):
        with pytest.warns(ax.AxonWarning, match=told):
            fitted(True, objective=kind, callbacks=[ax.EarlyStopping("train/loss", patience=99)])


def test_a_copy_of_a_loop_records_for_itself():
    loop = made(True)
    for _ in range(8):
        loop.train_on_batch((X[:16], Y[:16]))
    copied = copy.deepcopy(loop)
    for one in (loop, copied):
        for _ in range(8):
            one.train_on_batch((X[:16], Y[:16]))
    assert loop.report().recorded == 1
    assert copied.report().replayed == 3 + 3
    assert same(states(loop)[:2], states(copied)[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_kernels_waver_a_wrong_replay_is_refused_all_the_same(dtype):
    right = {"the update of w": torch.randn(100).to(dtype), "the value 'v'": torch.ones((), dtype=dtype)}
    drawn = Outcome({}, randomness.snapshot()).drawn
    again = Outcome(
        {name: (one.float() * (1 + 1e-4)).to(dtype) + 1e-2 * (dtype != torch.float32) for name, one in right.items()}, drawn
    )
    for name in right:
        wrong = Outcome({**right, name: right[name] * 3}, drawn)
        assert wrong.unlike(Outcome(right, drawn), again)
    assert Outcome(right, drawn).unlike(Outcome(right, drawn), again) == ""


def test_a_change_now_and_then_is_worth_recording_anew():
    loop = made(True)

    @loop.on("before_batch")
    def _(state):
        if state.step % 62 == 61:
            state.objective.scale *= 0.99

    loop.fit(ax.ArrayDataset(X[:90], Y[:90]), epochs=60, batch_size=16)
    assert loop.report().not_replayed == ""
    assert len(loop.report().rerecorded) == 5


class Lion(torch.optim.Optimizer):
    """One that counts in Python, and puts new tensors in place of the old."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                mean = state.get("mean", torch.zeros_like(p))
                p.add_((0.9 * mean + 0.1 * p.grad).sign(), alpha=-group["lr"] / state["step"] ** 0.5)
                state["mean"] = 0.99 * mean + 0.01 * p.grad


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: ax.Optimizer(Lion, lr=1e-3),
        lambda: ax.Optimizer("adamwschedulefree", lr=1e-2, warmup_steps=10),
        lambda: ax.Optimizer("nadam", lr=1e-3),
        lambda: ax.Optimizer("asgd", lr=1e-2),
        lambda: ax.Optimizer("adam", lr=1e-3, fused=False, foreach=True),
    ],
)
def test_optimizers_that_keep_more_than_tensors_update_after_a_replay(optimizer):
    plain, replayed = (fitted(graph, optimizer(), Plain4) for graph in (False, True))
    assert replayed.report().replayed == 43
    assert "counts or reads on the host" in replayed.report().update
    assert same(states(plain), states(replayed))


def test_a_batch_that_lies_otherwise_in_memory():
    rows = torch.randn(96, 20, generator=torch.Generator().manual_seed(1))
    for batches in ([(rows[n : n + 16, :8], Y[n : n + 16]) for n in range(0, 96, 16)], ax.ArrayDataset(rows[:, 3:11], Y)):
        plain, replayed = (fitted(graph, data=batches, batch_size=32) for graph in (False, True))
        assert replayed.report().replayed > 0
        assert same(states(plain), states(replayed))


def test_batches_that_are_off_a_multiple_have_recordings_of_their_own():
    x, y = torch.randn(5 * 60, 3, generator=torch.Generator().manual_seed(1)), torch.randint(3, (300,))

    class Three(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

    batches = [(x[n : n + 5], y[n : n + 5]) for n in range(0, 300, 5)]  # of 60 bytes and of 40
    plain, replayed = (fitted(graph, objective=Three, data=batches, epochs=4, batch_size=32) for graph in (False, True))
    assert replayed.report().recorded > 1
    assert same(states(plain), states(replayed))


@torch.library.custom_op("axontrain_tests::wavering", mutates_args=())
def wavering(x: torch.Tensor) -> torch.Tensor:
    """A sum whose order nobody knows, by its last bits."""
    return x * (1 + 1e-7 * random.SystemRandom().uniform(-1, 1))


wavering.register_autograd(lambda ctx, grad: wavering(grad), setup_context=lambda ctx, inputs, output: None)


@pytest.mark.parametrize("name", ["sgd", "adamw, cosine, groups"])
def test_kernels_that_differ_from_themselves_are_no_reason(name):
    class Wavering(Net):
        def predict(self, x):
            return wavering(super().predict(wavering(x)))

    for _ in range(5):
        assert fitted(True, OPTIMIZERS[name](), Wavering).report().replayed > 40  # now and then one more is held against


def test_a_recording_that_is_wrong_is_not_used(monkeypatch):
    replay = Recording.replay

    def wrong(self):
        replay(self)
        for func, args, *_ in self.operations:
            if "fused_adamw" in str(func):
                args[0][0].mul_(1 + 1e-3)

    monkeypatch.setattr(Recording, "replay", wrong)
    with pytest.warns(ax.AxonWarning, match="replayed, a step is another: the update of"):
        loop = fitted(True)
    assert loop.report().replayed == 0
    monkeypatch.undo()
    assert same(states(fitted(False)), states(loop))


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.net[0].register_forward_hook(lambda module, args, out: CALLS.append(out.mean().detach()))


class Recurrent(Plain):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.net = nn.Linear(4, 3)

    def predict(self, x):
        return self.net(self.rnn(x.view(len(x), 4, 2))[0][:, -1])


class RecurrentWithout(Recurrent):
    def __init__(self):
        super().__init__()
        self.rnn.dropout = 0.0


class WritesToItsBatch(Net):
    def loss(self, logits, labels):
        return super().loss(logits, labels.remainder_(3))


class NotANumber(Net):
    def predict(self, x):
        return super().predict(x.masked_fill(x > 9, float("nan")))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Hooked, r"net\.0 \(Linear\) has hooks, which would not be called"),
        (Recurrent, "rnn has dropout between its layers"),
        (WritesToItsBatch, "a step writes to its batch"),
    ],
)
def test_what_a_replay_would_leave_out(kind, told):
    with pytest.warns(ax.AxonWarning, match=told):
        loop = fitted(True, objective=kind)
    assert loop.report().replayed == 0
    assert same(states(fitted(False, objective=kind)), states(loop))


@pytest.mark.parametrize("kind", [RecurrentWithout, NotANumber])
def test_what_it_would_not(kind):
    plain, replayed = (fitted(graph, objective=kind) for graph in (False, True))
    assert replayed.report().replayed == 43
    assert same(states(plain), states(replayed))


def test_an_error_names_gradients_in_a_replay_too():
    x = X.clone()
    x[80] = float("inf")
    batches = [(x[i : i + 8], Y[i : i + 8]) for i in range(0, 96, 8)]
    notes = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise"), Plain)
        with pytest.raises(ax.NonFiniteError) as raised:
            loop.fit(batches, epochs=1)
        notes.append(str(raised.value))
    assert loop.report().replayed > 0
    assert "gradients of net.weight, net.bias are not finite" in notes[0]
    assert notes[0] == notes[1]


def test_batches_none_of_which_is_like_another_are_told_of():
    batches = [{"x": X[:16], "y": Y[:16], "number": n} for n in range(80)]

    class Numbered(Net):
        def split(self, batch):
            return batch["x"], batch["y"]

    with pytest.warns(ax.AxonWarning, match="the first 64 batches that differ, in shapes or in what is no tensor"):
        fitted(True, objective=Numbered, data=batches, epochs=1, batch_size=32, strict=False)


def test_attributes_of_plain_objects_in_a_module_count_too():
    class Configured(Net):
        def __init__(self):
            super().__init__()
            self.config, self._weights = SimpleNamespace(temperature=1.0), [1.0, 2.0]

        def predict(self, x):
            return super().predict(x) * self.config.temperature * self._weights[1]

    loops = []
    for graph in (False, True):
        loop = made(graph, objective=Configured)

        @loop.on("after_epoch", every="3 epochs")
        def _(state):
            state.objective.config.temperature += 0.5
            state.objective._weights[1] -= 0.25

        loop.fit(DATA, epochs=8, batch_size=16)
        loops.append(loop)
    assert loops[1].report().recorded == 3
    assert same(states(loops[0]), states(loops[1]))


def test_what_changes_in_each_step_is_not_replayed():
    report = changing("before_batch", lambda state: None)
    assert not report.not_replayed
    loops = []
    for graph in ("auto", False):
        loop = made(graph)

        @loop.on("before_batch")
        def _(state):
            state.objective.scale = 1 + 0.01 * state.step

        loop.fit(DATA, epochs=4, batch_size=16)
        loops.append(loop)
    assert loops[0].report().not_replayed.startswith("what was recorded holds for no time: scale of Net was")
    assert same(states(loops[0]), states(loops[1]))


CALLS = [0]


class Reads(Net):
    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        return loss * (1 + 0 * loss.item())


class Counts(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def predict(self, x):
        self.calls += self.training
        return super().predict(x) * (1 + 0.01 * self.calls)


class CountsApart(Net):
    def __init__(self):
        super().__init__()
        self._calls = 0

    def predict(self, x):
        self._calls += self.training
        return super().predict(x) * (1 + 0.01 * self._calls)


class Rebinds(Net):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def predict(self, x):
        if self.training:
            self.mean = self.mean * 0.9 + x.mean()
        return super().predict(x) + self.mean


class DrawsOnTheHost(Net):
    def predict(self, x):
        return super().predict(x) * (1 + random.random())


class DrawsWithNumpy(Net):
    def predict(self, x):
        return super().predict(x) * (1 + np.random.rand())


class ReadsAClock(Net):
    def predict(self, x):
        return super().predict(x) * (1 + time.perf_counter() % 1)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Reads, r"a step waits for the device.*test_graph.py:\d+: return loss \* \(1 \+ 0 \* loss.item\(\)\)"),
        (Counts, r"Python changes something in each step.*calls of Counts was \d+, and is \d+"),
        (CountsApart, r"_calls of CountsApart was"),
        (Rebinds, r"mean of Rebinds was given another tensor"),
        (DrawsOnTheHost, "random numbers on the host, from python"),
        (DrawsWithNumpy, "random numbers on the host, from numpy"),
    ],
)
def test_what_cannot_be_replayed_is_done_as_before_and_said(kind, told):
    plain = fitted(False, objective=kind)
    with pytest.warns(ax.AxonWarning, match=r"(?s)graph=True: steps cannot be replayed from a CUDA graph: .*" + told) as given:
        replayed = fitted(True, objective=kind)
    assert len(given) == 1
    assert replayed.report().replayed == 0
    assert "steps are not replayed" in str(replayed.report())
    assert vars(plain.objective).get("calls") == vars(replayed.objective).get("calls")
    assert vars(plain.objective).get("_calls") == vars(replayed.objective).get("_calls")
    assert same(states(plain), states(replayed))
    assert not living


def test_numbers_from_elsewhere_are_seen_in_the_kernels():
    with pytest.warns(ax.AxonWarning, match=r"two steps call for other kernels.*aten.mul was given 1.\d+, and then 1.\d+"):
        loop = fitted(True, objective=ReadsAClock)
    assert loop.report().replayed == 0


@pytest.mark.parametrize(
    ("options", "fit", "told"),
    [
        ({"callbacks": [ax.callback.FunctionCallback("after_backward", lambda state: None)]}, {}, "after_backward"),
        ({"objective": Plain}, {"microbatch": "auto"}, "microbatch='auto'"),
        ({"optimizer": ax.Optimizer("lbfgs", lr=0.1)}, {}, "evaluates the loss by itself"),
        ({"optimizer": ax.Optimizer("sgd", lr=0.1, in_backward=True)}, {}, "within backward"),
    ],
)
def test_what_is_known_to_be_in_the_way_is_said_at_once(options, fit, told):
    loop = made(True, **options)
    with pytest.warns(ax.AxonWarning, match=told):
        loop.fit(DATA, steps=6, batch_size=16, **fit)
    quiet = made("auto", **options)
    quiet.fit(DATA, steps=6, batch_size=16, **fit)
    assert told in quiet.report().not_replayed


class Adversaries(ax.Objective):
    """A generator of losses, of which the discriminator has two in each step."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def train_step(self, batch):
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 4))
        yield (
            "discriminator",
            {
                "real": F.softplus(-self.discriminator(real)).mean(),
                "fake": F.softplus(self.discriminator(fake.detach())).mean(),
            },
        )
        yield "discriminator", F.softplus(-self.discriminator(real)).mean()
        yield "generator", F.softplus(-self.discriminator(fake)).mean()


def adversaries(**discriminator):
    return {
        "generator": ax.Optimizer("adam", lr=1e-3, schedule=ax.schedules.cosine()),
        "discriminator": ax.Optimizer(**{"factory": "adamw", "lr": 1e-3, "clip_norm": 1.0, **discriminator}),
    }


@pytest.mark.parametrize("fit", [{}, {"microbatch": 5}])
def test_generators_of_losses(fit):
    loops = []
    for graph in (False, True):
        loop = made(graph, adversaries(), Adversaries)
        loop.fit(DATA, epochs=6, batch_size=16, **fit)
        loops.append(loop)
    assert loops[1].report().replayed == 36 - 5
    assert {"train/real", "train/fake", "train/generator_loss"} < set(loops[1].state.values)
    assert same(states(loops[0]), states(loops[1]))
    assert [update.steps for update in loops[1].state.optimizers.values()] == [36, 72]


@pytest.mark.parametrize(
    ("discriminator", "told"),
    [
        ({"factory": "rmsprop"}, "updates lie between the losses of a step, and RMSprop counts"),
        (
            {"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 3)},
            "torch's schedule of the optimizer 'discriminator' steps between its updates",
        ),
        ({"on_nonfinite": "raise"}, "on_nonfinite='raise' looks at gradients before the next of several updates"),
    ],
)
def test_generators_whose_updates_are_more_than_kernels(discriminator, told):
    plain = fitted(False, adversaries(**discriminator), Adversaries)
    with pytest.warns(ax.AxonWarning, match=told):
        replayed = fitted(True, adversaries(**discriminator), Adversaries)
    assert same(states(plain), states(replayed))


def test_microbatches():
    loops = []
    for graph in (False, True):
        loop = made(graph, OPTIMIZERS["adamw, cosine, groups"](), Plain4, metrics=["accuracy"])
        loop.fit(ax.ArrayDataset(X[:90], Y[:90]), DATA, epochs=9, batch_size=16, microbatch=6)
        loops.append(loop)
    assert loops[1].report().recorded == 2
    assert loops[1].report().replayed == 54 - 2 * 5
    assert same(states(loops[0]), states(loops[1]))


def test_losses_that_are_scaled():
    # Too large at first, as scales begin; and once more at the end, by a batch of large inputs.
    x = X.clone()
    x[80:] *= 300
    loops = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("sgd", lr=0.1, momentum=0.9), Plain, precision="fp16")
        loop.fit(ax.Loader(ax.ArrayDataset(x, Y), 16), epochs=8)
        loops.append(loop)
    assert loops[1].report().replayed == 43
    assert loops[1].state.optimizers["main"].skipped > 0
    assert same(states(loops[0]), states(loops[1]))
    assert same(loops[0].save()["attached"]["scaler"], loops[1].save()["attached"]["scaler"])


def test_without_a_gpu_it_trains_and_says_so(monkeypatch):
    monkeypatch.undo()
    with pytest.warns(ax.AxonWarning, match="the parameters are on cpu, and CUDA graphs are of NVIDIA's GPUs"):
        loop = fitted(True, epochs=1)
    assert loop.state.step == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "are on cpu" in fitted("auto", epochs=1).report().not_replayed


@pytest.mark.parametrize("mode", [1, "on", None, "always"])
def test_other_words(mode):
    with pytest.raises(ax.ConfigurationError, match=r"graph=.*True, False or 'auto'"):
        made(mode)


def test_batches_of_several_shapes_have_recordings_of_their_own():
    x, y = X[:90], Y[:90]  # 5 of 16 and one of 10
    plain, replayed = (fitted(graph, data=ax.ArrayDataset(x, y), epochs=9) for graph in (False, True))
    report = replayed.report()
    assert (report.recorded, report.held, report.rerecorded) == (2, 4, [])
    assert report.replayed == 54 - 2 * (3 + 2)
    assert same(states(plain), states(replayed))


def test_sizes_without_end_are_not_recorded_without_end():
    batches = [(X[:n], Y[:n]) for n in list(range(2, 34)) * 5]
    plain, replayed = (fitted(graph, data=batches, epochs=1, batch_size=32) for graph in (False, True))
    assert replayed.report().recorded == 8
    assert same(states(plain), states(replayed))


def test_what_a_batch_holds_beside_tensors_counts():
    class Named(Net):
        def split(self, batch):
            return (batch["x"], batch["how"]), batch["y"]

        def predict(self, given):
            x, how = given
            return super().predict(x) * (2 if how == "double" else 1)

    batches = [{"x": X[:16], "y": Y[:16], "how": "double" if n % 4 == 0 else "once"} for n in range(40)]
    plain, replayed = (fitted(graph, objective=Named, data=batches, epochs=1, batch_size=32) for graph in (False, True))
    assert replayed.report().recorded == 2
    assert replayed.report().replayed == 30
    assert same(states(plain), states(replayed))


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (lambda: (X[:16], Y[:16], object()), "the batch holds object"),
        (lambda: (X[:1].expand(16, 8), Y[:16]), "expanded"),
        (lambda: (X[:16].clone().requires_grad_(), Y[:16]), "requires a gradient"),
    ],
)
def test_batches_that_cannot_be_copied_into_place(batch, told):
    class First(Net):
        def split(self, batch):
            return batch[0], batch[1]

    with pytest.warns(ax.AxonWarning, match=told):
        fitted(True, objective=First, data=[batch() for _ in range(5)], epochs=1, batch_size=32)


def test_what_steps_give_is_their_own():
    kept = {}
    for graph in (False, True):
        loop = made(graph, metrics=["accuracy"])
        kept[graph] = list(loop.steps(DATA, epochs=4, batch_size=16))
    assert loop.report().replayed == 19
    for a, b in zip(kept[False], kept[True], strict=True):
        for name in ("loss", "predictions", "targets", "skipped", "weight"):
            assert same(getattr(a, name), getattr(b, name)), name
    assert len({float(step.loss) for step in kept[True]}) == len(kept[True])


def test_predictions_are_given_where_somebody_may_look():
    seen = []
    for options in ({}, {"metrics": ["accuracy"]}, {"callbacks": [ax.EarlyStopping("train/loss", patience=99)]}):
        seen.append(fitted(True, **options).state.last.predictions is not None)
    assert seen == [False, True, True]
    assert all(step.predictions is not None for step in made(True).steps(DATA, epochs=2, batch_size=16))
    loop = made(True)
    assert all(loop.train_on_batch((X[:16], Y[:16])).predictions is not None for _ in range(9))


def test_named_terms_and_weights_of_tokens():
    class Tokens(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 3)

        def predict(self, x):
            return self.net(x)

        def loss(self, logits, labels):
            return {"fit": F.cross_entropy(logits, labels), "norm": 1e-3 * self.net.weight.square().sum()}

        def weight(self, batch):
            return (batch[1] > 0).sum()

    plain, replayed = (fitted(graph, objective=Tokens) for graph in (False, True))
    assert replayed.report().replayed > 0
    assert set(replayed.state.values) >= {"train/loss", "train/fit", "train/norm"}
    assert same(plain.state.values, replayed.state.values)


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_from_a_checkpoint_either_way(tmp_path, first):
    whole = fitted(False, OPTIMIZERS["adamw, cosine, groups"]())
    half = made(first, OPTIMIZERS["adamw, cosine, groups"](), directory=tmp_path)

    @half.on("after_batch")
    def _(state):
        if state.step == 27:
            half.save(tmp_path / "half")
            return ax.Stop("enough")

    half.fit(DATA, epochs=8, batch_size=16)
    other = made(not first, OPTIMIZERS["adamw, cosine, groups"]())
    other.restore(tmp_path / "half")
    other.state.halt = None
    other.fit(DATA, epochs=8, batch_size=16, resume=True)
    assert (half if first else other).report().replayed > 0
    assert same(states(whole)[:3], states(other)[:3])


def test_a_second_fit_and_steps_by_hand_record_anew():
    results = []
    for graph in (False, True):
        loop = made(graph)
        loop.fit(DATA, epochs=2, batch_size=16)
        for _ in range(8):
            loop.train_on_batch((X[:16], Y[:16]))
        if graph:
            assert len(living) == 1  # of the steps by hand, until the next fit
        loop.fit(DATA, epochs=2, batch_size=16)
        for _ in range(6):
            loop.train_on_batch((X[:16], Y[:16]))
        results.append(loop)
    assert results[1].report().recorded == 4
    assert results[1].report().replayed == 7 + 3 + 7 + 1
    assert same(states(results[0]), states(results[1]))


def test_recordings_are_given_back_when_a_fit_ends_or_fails():
    loop = made(True)

    @loop.on("after_batch")
    def _(state):
        if state.step == 20:
            assert living
            raise RuntimeError("a hook's own")

    with pytest.raises(RuntimeError, match="a hook's own"):
        loop.fit(DATA, epochs=8, batch_size=16)
    assert not living
    left = made(True)
    for _ in left.steps(DATA, epochs=3, batch_size=16):
        if left.state.step == 12:
            break
    left = None
    gc.collect()
    assert not living


def test_a_step_that_is_vetoed_is_not_replayed():
    loops = []
    for graph in (False, True):
        loop = made(graph)

        @loop.on("before_batch")
        def _(state):
            if state.step in (10, 11, 20):
                state.skip(torch.ones(()))

        loop.fit(DATA, epochs=5, batch_size=16)
        loops.append(loop)
    assert loops[1].report().replayed == 30 - 5 - 3
    assert loops[1].state.optimizers["main"].skipped == 3
    assert same(states(loops[0]), states(loops[1]))


def test_gradients_that_were_left_are_added_to_as_without():
    loops = []
    for graph in (False, True):
        loop = made(graph)

        @loop.on("before_batch")
        def _(state):
            if state.step == 15:
                for p in state.objective.parameters():
                    p.grad = torch.ones_like(p)

        loop.fit(DATA, epochs=4, batch_size=16)
        loops.append(loop)
    assert loops[1].report().replayed == 24 - 5 - 1
    assert same(states(loops[0]), states(loops[1]))


def test_own_generators_draw_the_same():
    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def predict(self, x):
            return super().predict(x + 0.1 * torch.randn(x.shape, generator=self.generator))

    plain, replayed = (fitted(graph, objective=Noisy) for graph in (False, True))
    assert replayed.report().replayed == 43
    assert same(states(plain), states(replayed))


@pytest.mark.parametrize("precision", ["bf16", "bf16-true", "fp64"])
def test_precisions(precision):
    plain, replayed = (fitted(graph, precision=precision, metrics=["accuracy"]) for graph in (False, True))
    assert replayed.report().replayed == 43
    assert same(states(plain), states(replayed))


def timed(monkeypatch, eager, replayed):
    """Has steps take so many seconds each, by a clock of their own."""
    now = [1.0]
    monkeypatch.setattr(trial, "perf_counter", lambda: now[0])
    kernels, replay = Graphed._kernels, Recording.replay

    def slower(self, batch):
        now[0] += eager
        return kernels(self, batch)

    def quicker(self):
        now[0] += replayed
        return replay(self)

    monkeypatch.setattr(Graphed, "_kernels", slower)
    monkeypatch.setattr(Recording, "replay", quicker)


@pytest.mark.parametrize(("eager", "replayed", "chosen"), [(3.0, 1.0, True), (1.0, 1.02, False), (1.0, 0.99, False)])
def test_auto_keeps_what_takes_less_time(monkeypatch, eager, replayed, chosen):
    timed(monkeypatch, eager, replayed)
    plain, auto = (fitted(graph, epochs=25) for graph in (False, "auto"))
    report = auto.report()
    in_turns = trial.BLOCK * trial.ROUNDS
    if chosen:
        assert report.replayed == 150 - 5 - in_turns
        assert report.ratio == pytest.approx(replayed / eager)
    else:
        assert report.replayed == in_turns
        assert report.not_replayed == f"that takes {replayed:.2f} of the time"
    assert same(states(plain), states(auto))
    assert not living


@pytest.mark.parametrize("change", [scaled, lower_rate])
def test_what_changes_within_a_trial_is_recorded_anew(monkeypatch, change):
    timed(monkeypatch, 3.0, 1.0)
    waits = []
    monkeypatch.setattr("recorded.Recorder.wait", lambda self: waits.append(1))
    loops = []
    for graph in (False, "auto"):
        loop = made(graph)

        @loop.on("before_batch")
        def _(state):
            if state.step == 40:
                change(state)

        loop.fit(DATA, epochs=40, batch_size=16)
        loops.append(loop)
    report = loops[1].report()
    assert report.ratio == pytest.approx(1 / 3)
    assert report.recorded == 2
    assert len(waits) < 20
    assert same(states(loops[0]), states(loops[1]))


def test_a_trial_goes_on_over_batches_of_other_shapes(monkeypatch):
    timed(monkeypatch, 3.0, 1.0)
    data = ax.ArrayDataset(X[:60], Y[:60])  # three of 16 and one of 12 in an epoch
    plain, auto = (fitted(graph, data=data, epochs=50) for graph in (False, "auto"))
    assert auto.report().ratio == pytest.approx(1 / 3)
    assert auto.report().recorded == 2
    assert same(states(plain), states(auto))


def test_a_trial_that_was_lost_is_not_made_again(monkeypatch):
    timed(monkeypatch, 1.0, 2.0)
    auto = fitted("auto", epochs=25)
    for _ in range(2):
        auto.fit(DATA, epochs=10, batch_size=16)
    assert auto.report().recorded == 1
    assert auto.report().not_replayed == "that takes 2.00 of the time"


def test_auto_tries_once(monkeypatch):
    timed(monkeypatch, 3.0, 1.0)
    auto = fitted("auto", epochs=25)
    before = auto.report().replayed
    auto.fit(DATA, epochs=10, batch_size=16)
    assert auto.report().replayed == before + 60 - 5


def test_a_mode_that_looks_on_has_steps_done_without():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Seen.count += 1
            return func(*args, **(kwargs or {}))

    loop = made(True)
    for _ in range(10):
        loop.train_on_batch((X[:16], Y[:16]))
    replayed = loop.report().replayed
    assert replayed == 5
    with Seen():
        loop.train_on_batch((X[:16], Y[:16]))
    assert Seen.count > 20
    assert loop.report().replayed == replayed


@pytest.mark.slow
def test_compiled_parts_are_replayed():
    looking = ax.callback.FunctionCallback("after_backward", lambda state: None)  # keeps it from becoming one graph
    plain, replayed = fitted(False, compile=True, callbacks=[looking]), fitted(True, compile=True)
    report = replayed.report()
    assert (plain.report().how, report.how) == ("in parts", "in parts")
    assert "from a CUDA graph" in report.reason
    assert report.replayed > 0
    assert "steps are replayed" in str(report)
    # Not bitwise: under the mode that records here, torch computes what is compiled as if it were not.
    assert replayed.state.values["train/loss"] == pytest.approx(plain.state.values["train/loss"], rel=1e-4)


def test_the_audit_says_that_it_is_of_steps_that_are_not_replayed():
    found = ax.audit(made(True), (X[:16], Y[:16]))
    assert any("graph=" in note for note in found.notes)


def halved(parameter):
    parameter.grad.mul_(0.5)


WATCHING = {
    "hooks on the gradients": lambda p: p.register_hook(lambda g: g.clamp(-0.01, 0.01)),
    "hooks on the gradients of parameters": lambda p: p.register_post_accumulate_grad_hook(halved),
    "torch.autocast is on": lambda p: torch.autocast("cpu", torch.bfloat16),
    "anomaly mode": lambda p: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("why", WATCHING)
def test_who_looks_on_at_all_steps_is_told_of(why):
    loops = []
    for graph in (False, True):
        loop = made(graph, objective=Plain)
        handle = WATCHING[why](loop.objective.net.weight)
        told = pytest.warns(ax.AxonWarning, match=f"steps are not replayed: .*{why}") if graph else contextlib.nullcontext()
        try:
            with told:
                loop.fit(DATA, epochs=2, batch_size=16) if "hooks" in why else around(handle, loop)
        finally:
            if "hooks" in why:
                handle.remove()
        loops.append(loop)
    assert why in loops[1].report().not_replayed
    assert why in str(loops[1].report())
    assert same(states(loops[0]), states(loops[1]))
    loops[1].fit(DATA, epochs=4, batch_size=16)
    assert loops[1].report().replayed > 0
    assert loops[1].report().not_replayed == ""


def around(context, loop):
    with warnings.catch_warnings(), context:
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        loop.fit(DATA, epochs=2, batch_size=16)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_the_same_error(off):
    loop = made(True, objective=Plain)
    for _ in range(10):
        loop.train_on_batch((X[:16], Y[:16]))
    assert loop.report().replayed > 0
    with off(), pytest.raises(ax.LossError, match="no graph"):
        loop.train_on_batch((X[:16], Y[:16]))


def test_overflows_of_scaled_losses_are_no_error():
    x = X.clone()
    x[80:] *= 300
    loops = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise"), Plain, precision="fp16")
        loop.fit(ax.Loader(ax.ArrayDataset(x, Y), 16), epochs=8)
        loops.append(loop)
    assert loops[1].report().replayed > 0
    assert loops[1].state.optimizers["main"].skipped == loops[0].state.optimizers["main"].skipped > 0
    assert same(states(loops[0]), states(loops[1]))


def test_updates_that_are_done_apart_raise_too():
    x = X.clone()
    x[80] = float("inf")
    batches, notes, loops = [(x[i : i + 8], Y[i : i + 8]) for i in range(0, 96, 8)], [], []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("rmsprop", lr=0.01, on_nonfinite="raise"), Plain)
        with pytest.raises(ax.NonFiniteError) as raised:
            loop.fit(batches, epochs=1)
        notes.append(str(raised.value))
        loops.append(loop)
    assert loops[1].report().replayed > 0
    assert "RMSprop counts" in loops[1].report().update
    assert "gradients of net.weight, net.bias are not finite" in notes[0]
    assert notes[0] == notes[1]
    assert same(states(loops[0]), states(loops[1]))


def test_raising_from_a_step_on():
    x = X.clone()
    x[80] = float("inf")
    notes = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("sgd", lr=0.1), Plain)

        @loop.on("before_batch")
        def _(state):
            if state.step == 6:
                state.optimizers["main"].spec.on_nonfinite = "raise"

        with pytest.raises(ax.NonFiniteError) as raised:
            loop.fit([(x[i : i + 8], Y[i : i + 8]) for i in range(0, 96, 8)], epochs=1)
        notes.append(str(raised.value))
    assert "gradients of net.weight, net.bias are not finite" in notes[0]
    assert notes[0] == notes[1]


def regrouped(state, way):
    optimizer = state.optimizers["main"].optimizers[0]
    group = optimizer.param_groups[0]
    parameter = group["params"].pop(0)
    if way == "moved":
        optimizer.add_param_group({"params": [parameter], "lr": 0.5, "fused": group["fused"]})
    elif way == "swapped":
        group["params"].append(parameter)


@pytest.mark.parametrize("way", ["taken out", "moved", "swapped"])
def test_groups_of_parameters_that_change(way):
    loops = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("sgd", lr=0.1, momentum=0.9), Plain4)

        @loop.on("before_batch")
        def _(state):
            if state.step == 15:
                regrouped(state, way)

        loop.fit(DATA, epochs=5, batch_size=16)
        loops.append(loop)
    assert all(torch.equal(p, q) for p, q in zip(*(loop.objective.parameters() for loop in loops), strict=True))
    told = (
        "the optimizer has more groups than it had, or fewer"
        if way == "moved"
        else "the optimizer's group 0 is of other parameters"
    )
    assert loops[1].report().rerecorded == [told]


class Remembers(torch.optim.Optimizer):
    """One that keeps the gradient itself, and counts in its group."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                before = self.state[p].get("previous", p.grad)
                p.sub_(group["lr"] * (2 * p.grad - before))
                self.state[p]["previous"] = p.grad


def test_an_optimizer_may_keep_the_gradient_itself():
    plain, replayed = (fitted(graph, ax.Optimizer(Remembers, lr=0.1), Plain) for graph in (False, True))
    assert replayed.report().replayed > 30
    assert all(torch.equal(p, q) for p, q in zip(plain.objective.parameters(), replayed.objective.parameters(), strict=True))


class Penalised(Plain):
    """Asks for gradients by its inputs, in place, as gradient penalties and adversarial training do."""

    def __init__(self, way="penalty"):
        super().__init__()
        self.way = way

    def train_step(self, batch):
        x, y = batch
        x.requires_grad_(True)
        logits = self.net(x)
        if self.way == "penalty":
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            return ax.Step(self.loss(logits, y) + 0.1 * slope.square().mean(), logits, y)
        self.loss(logits, y).backward(inputs=[x])
        adversarial = x.detach() + 0.1 * x.grad.sign()
        x.grad = None
        logits = self.net(adversarial)
        return ax.Step(self.loss(logits, y), logits, y)


@pytest.mark.parametrize("way", ["penalty", "adversarial"])
def test_gradients_by_the_batch(way):
    plain, replayed = (fitted(graph, objective=lambda: Penalised(way)) for graph in (False, True))
    assert replayed.report().replayed > 30
    assert same(states(plain), states(replayed))


def test_a_scheduled_rate_is_the_one_before_while_a_step_is_computed():
    class Shows(Plain):
        def train_step(self, batch):
            step = super().train_step(batch)
            step.values = {"rate": torch.tensor(self.rates()[0])}
            return step

    loops = []
    for graph in (False, True):
        loop = made(graph, ax.Optimizer("adamw", lr=1e-2, schedule=ax.schedules.cosine()), Shows)
        loop.objective.rates = lambda loop=loop: [
            float(g["lr"]) for g in loop.state.optimizers["main"].optimizers[0].param_groups
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ax.AxonWarning)  # a step that looks at the Loop is not replayed
            loop.fit(DATA, epochs=4, batch_size=16)
        loops.append(loop)
    assert same(states(loops[0]), states(loops[1]))


def test_steps_of_more_kinds_than_are_recorded_are_counted():
    sizes = [*range(4, 14)] * 8
    loop = made(True, objective=Plain, strict=False)
    loop.fit([(X[:n], Y[:n]) for n in sizes], epochs=1)
    report = loop.report()
    assert (report.recorded, report.others) == (8, 2 * (8 - 3))
    assert "10 steps were of further kinds of batches" in str(report)


FAILING = {
    "what is kept of before": (comparison, "before_step"),
    "the replay": (StepGraph, "replay"),
    "the step without": (OneLoss, "finished"),
}


@pytest.mark.parametrize("where", FAILING)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a kernel of one's own")])
def test_what_fails_while_a_recording_is_compared(where, error, monkeypatch):
    if where == "the step without" and not isinstance(error, torch.OutOfMemoryError):
        pytest.skip("it is the step's own error")
    plain = fitted(False, objective=Net, epochs=4)
    owner, name = FAILING[where]
    genuine, armed = getattr(owner, name), [True]

    def failing(*args, **kwargs):
        within = [frame.function for frame in inspect.stack(0)[1:6]]
        if armed[0] and ("compared" in within or "_for_good" in within):
            armed[0] = False
            raise error
        return genuine(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    with pytest.warns(ax.AxonWarning, match="there is not the memory|a kernel of one's own"):
        replayed = fitted(True, objective=Net, epochs=4)
    assert not armed[0]
    assert same(states(plain), states(replayed))
    assert not living


def test_a_loop_is_pickled_and_goes_on():
    loop = made(True, objective=Plain)
    for _ in range(10):
        loop.train_on_batch((X[:16], Y[:16]))
    copied = pickle.loads(pickle.dumps(loop))
    for each in (loop, copied):
        for _ in range(10):
            each.train_on_batch((X[:16], Y[:16]))
    assert copied.report().replayed > 5
    assert same(states(loop)[:2], states(copied)[:2])


def test_a_callback_that_keeps_steps_from_being_replayed_is_named():
    class Norms(ax.Callback):
        def after_backward(self, state):
            pass

    with pytest.warns(ax.AxonWarning, match="a callback looks at gradients, in after_backward: Norms"):
        fitted(True, epochs=1, callbacks=[Norms()])


def test_a_recurrent_network():
    class Recurrent(Plain):
        def __init__(self):
            super().__init__()
            self.rnn, self.net = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

        def predict(self, x):
            return self.net(self.rnn(x.view(len(x), 4, 2))[0][:, -1])

    plain, replayed = (fitted(graph, objective=Recurrent) for graph in (False, True))
    assert replayed.report().replayed > 30
    assert same(states(plain), states(replayed))


def test_an_optimizer_whose_parameters_are_all_frozen_for_now():
    class Two(Plain):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)

        def predict(self, x):
            return self.net(self.first(x))

    loops = []
    for graph in (False, True):
        torch.manual_seed(0)
        optimizers = {
            "first": ax.Optimizer("adamw", lr=1e-2, params="first.*"),
            "rest": ax.Optimizer("sgd", lr=0.1, params="net.*"),
        }
        thaws = ax.Unfreeze("first.*", at="3 epochs")
        loop = ax.Loop(Two(), optimizers, graph=graph, device="cpu", progress=False, callbacks=[thaws])
        if graph:
            with pytest.warns(ax.AxonWarning, match="not replayed: all parameters of the optimizer 'first' are frozen"):
                loop.fit(DATA, epochs=8, batch_size=16)
        else:
            loop.fit(DATA, epochs=8, batch_size=16)
        loops.append(loop)
    assert loops[1].report().replayed == 5 * 6 - 3 - 2
    assert loops[1].report().not_replayed == ""
    assert same(states(loops[0]), states(loops[1]))


def test_python_between_replays_is_little(monkeypatch):
    monkeypatch.setattr(Recording, "replay", lambda self: None)
    monkeypatch.setattr(Outcome, "unlike", lambda self, expected, again=None: "")  # as nothing is computed
    loop = made(True, objective=Plain4)
    batch = X[:16], Y[:16]
    for _ in range(6):
        loop.train_on_batch(batch)
    step, calls = loop._by_hand, [0, 0]

    def count(frame, event, argument):
        calls[0] += event == "call"
        calls[1] += event == "c_call"

    sys.setprofile(count)
    try:
        step(batch)
    finally:
        sys.setprofile(None)
    assert loop.report().replayed == 2
    # What it was when it was written; of other versions of Python less may be counted.
    assert calls[0] <= 42
    assert calls[1] <= 39
