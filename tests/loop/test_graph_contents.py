"""graph=: what a module holds and what its functions look up elsewhere is looked at before replays, and put back after trials.

A run with graph=True is the same as without, or it is not replayed, for which one warning gives the reason. By the stand-in
that records on the CPU (tests/recorded.py).
"""

import array
import concurrent.futures
import functools
import itertools
import multiprocessing
import queue
import random
import re
import sys
import threading
import types
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import recorder  # noqa: F401  # a fixture
from torch import nn

import axontrain as ax
from axontrain.execution.assumptions import Assumptions
from axontrain.execution.contents import ALL, Contents
from axontrain.execution.generators import draw_from, drawn_to, is_generator
from axontrain.execution.lookups import Lookups
from axontrain.execution.refilling import refill
from axontrain.execution.views import held

pytestmark = pytest.mark.usefixtures("recorder")

X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
DATA = ax.ArrayDataset(X, Y)
CHANGES = "Python changes something in each step, and is not called in a replay: "


class Net(ax.Objective):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def predict(self, x):
        return self.net(x)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def fit(loop):
    loop.fit(DATA, epochs=8, batch_size=16)


def changing(change):
    """A fit in which something is changed before one of its steps."""

    def drive(loop):
        @loop.on("before_batch")
        def _(state):
            if state.step == 20:
                change(state.objective)

        fit(loop)

    return drive


def both(kind, told="", *, drive=fit, begin=lambda: None, see=lambda objective: None, optimizer=None):
    """A run without and with graph=True, which end alike; gives the report of the second.

    Args:
        kind: of objective.
        told: what the warning says that steps are not replayed for; "" where they are, without a warning.
        drive: what is done with the Loop.
        begin: called before each run.
        see: what else is to be alike in the end, of the objective.
        optimizer: makes one.
    """
    seen = []
    for graph in (False, True):
        begin()
        torch.manual_seed(0)
        made = optimizer() if optimizer else ax.Optimizer("adamw", lr=1e-2)
        loop = ax.Loop(kind(), made, graph=graph, device="cpu", progress=False)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            drive(loop)
        tree = loop.save()
        seen.append((tree["objective"], tree["optimizers"], tree["rng"], tree["values"], loop.state.step, see(loop.objective)))
    assert same(seen[0], seen[1])
    if told:
        (warning,) = given
        assert told in plain(str(warning.message))
        assert loop.report().replayed == 0
    else:
        assert not given, given[0].message
        assert loop.report().replayed > 25
    return loop.report()


def plain(reason):
    """A reason, without which function it is that names a global variable."""
    return re.sub(r" that [\w.<>]+ names ", " ", reason)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# What cannot be looked at


def test_an_array_of_objects_is_left_alone():
    class Logs(Net):
        def __init__(self):
            super().__init__()
            self.log = np.array([None], dtype=object)

        def loss(self, logits, labels):
            self.log[0] = ["fresh", 1.0 if self.log[0] is None else self.log[0][1] + 1]
            return super().loss(logits, labels)

    both(Logs, "log of Logs is an array of objects", see=lambda o: o.log[0])


def test_an_array_of_another_class_is_left_alone():
    class Masks(Net):
        def __init__(self):
            super().__init__()
            self.mask = np.ma.MaskedArray(np.zeros(3), mask=[0, 1, 0])

        def loss(self, logits, labels):
            self.mask[0] += 1
            return super().loss(logits, labels)

    both(Masks, "mask of Masks is an array of another class than NumPy's own, MaskedArray", see=lambda o: o.mask.tolist())


def unlabelled():
    drawn = torch.randn(4000, 8, generator=torch.Generator().manual_seed(5))
    return iter(torch.utils.data.DataLoader(drawn, 16))


@pytest.mark.parametrize(
    ("make", "take"),
    [
        (itertools.count, lambda value: 2.0 if value % 10 == 9 else 1.0),
        (lambda: itertools.cycle([1.0, 2.0, 3.0, 4.0]), lambda value: value),
        (lambda: (1.0 if n < 30 else 0.5 for n in itertools.count()), lambda value: value),
        (unlabelled, lambda value: value.mean()),
    ],
)
def test_an_iterator_is_not_moved_on(make, take):
    class Moves(Net):
        def __init__(self):
            super().__init__()
            self.held = [make()]  # as a module's own attribute, it would be saved

        def loss(self, logits, labels):
            return super().loss(logits, labels) * take(next(self.held[0]))

    both(Moves, "0 of held of Moves is an iterator, which Python moves on", see=lambda o: next(o.held[0]))


@pytest.mark.parametrize(
    ("of", "told"),
    [
        (lambda loop: loop, "is the Loop, which is another in each step"),
        (lambda loop: loop.state, "is the LoopState"),
        (lambda loop: loop.state.optimizers["main"], "is the Update"),
        (lambda loop: loop.state.history, "is the History"),
        (lambda loop: functools.partial(print, loop.state.history), "is the History"),
        (lambda loop: loop.state.optimizers["main"].optimizers[0], "is the AdamW, whose steps Python counts"),
        (
            lambda loop: torch.optim.lr_scheduler.StepLR(loop.state.optimizers["main"].optimizers[0], 20),
            "is the StepLR, whose steps Python counts",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_what_counts_steps_in_python(of, told):
    both(Net, told, drive=lambda loop: (setattr(loop.objective, "held", [of(loop)]), fit(loop)))


def test_an_optimizer_of_the_module_that_it_steps_itself():
    class Inner(Net):
        def __init__(self):
            super().__init__()
            self.critic = [nn.Linear(8, 3)]
            self.own = torch.optim.SGD(self.critic[0].parameters(), lr=0.1, momentum=0.9)

        def train_step(self, batch):
            self.own.zero_grad()
            F.cross_entropy(self.critic[0](batch[0]), batch[1]).backward()
            self.own.step()
            step = super().train_step(batch)
            step.loss = step.loss + 0.1 * F.mse_loss(step.predictions, self.critic[0](batch[0]).detach())
            return step

    both(Inner, "own of Inner is the SGD, whose steps Python counts", see=lambda o: [*o.critic[0].parameters()])


class Loaded(Net):
    def __init__(self):
        super().__init__()
        self.table = [[[0] * 100 for _ in range(100)] for _ in range(100)]


def test_more_than_can_be_looked_at_each_time():
    report = both(Loaded, f"there are more than {ALL} things, all of which would be looked at before each replay")
    assert "of table of Loaded" in report.not_replayed
    assert sum(len(place.keys) for place in Contents(Loaded()).places) < 2 * ALL  # it goes no further, of a million


# What is in containers


class OwnDict(dict):
    def copy(self):
        raise TypeError("no copies")


class OwnList(list):
    pass


class OwnDeque(deque):
    pass


def in_a_dict(held):
    held[f"k{len(held)}"] = 1


def in_a_list(held):
    held.append(len(held))


@pytest.mark.parametrize(
    ("make", "fill"),
    [
        (set, lambda held: held.add(len(held))),
        (bytearray, in_a_list),
        (lambda: array.array("q"), in_a_list),
        (dict, in_a_dict),
        (OwnDict, in_a_dict),
        (Counter, lambda held: held.update([f"k{len(held)}", "all"])),
        (lambda: defaultdict(list), lambda held: held[len(held)].append(1)),
        (OrderedDict, in_a_dict),
        (list, in_a_list),
        (OwnList, in_a_list),
        (OwnDeque, in_a_list),
        (lambda: deque([0, 0, 0], maxlen=3), lambda held: held.append(held[-1] + 1)),
    ],
)
def test_containers_of_all_classes_are_put_back(make, fill):
    class Fills(Net):
        def __init__(self):
            super().__init__()
            self.held = make()

        def loss(self, logits, labels):
            fill(self.held)
            return super().loss(logits, labels) * (1 + 0.01 * len(self.held))

    def see(objective):
        held = objective.held
        return type(held), [*held.items()] if isinstance(held, dict) else [*held], getattr(held, "maxlen", None)

    both(Fills, CHANGES, see=see)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_an_order_is_put_back_too(kind):
    module = nn.Identity()
    module.held = kind(a=1, b=2, c=3)
    given = Assumptions(module)
    module.held["a"] = module.held.pop("a")
    given.put_back()
    assert [*module.held] == ["a", "b", "c"]


def test_an_average_of_many_tensors():
    class Averages(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.ModuleList(nn.Linear(8, 8) for _ in range(140))
            self.average = {name: p.detach().clone() for name, p in self.named_parameters()}

        def predict(self, x):
            return super().predict(self.more[0](x))

        def train_step(self, batch):
            with torch.no_grad():
                for name, p in self.named_parameters():
                    self.average[name].lerp_(p, 0.1)
            return super().train_step(batch)

    both(Averages, see=lambda o: o.average)


def test_of_many_things_in_a_container_those_that_are_not_plain():
    held = [1.0] * 300 + [[1.0]]
    module = nn.Identity()
    module.held = held
    given = Assumptions(module)
    held[0] = 2.0
    assert given.hold()
    held[300][0] = 2.0
    assert given.broken() == "0 of 300 of held of Identity was 1.0, and is 2.0"
    held[300][0] = 1.0
    held.append(1.0)
    assert given.broken() == "held of Identity holds 302 things, and held 301"


class Private:
    __slots__ = ("__scale", "other")

    def __init__(self):
        self.__scale = 1.0

    def get(self):
        return self.__scale * getattr(self, "other", 1.0)

    def put(self, value):
        self.__scale = value


class HoldsMore(Net):
    def __init__(self):
        super().__init__()
        self.private, self.own = Private(), OwnDict()
        self.own.scale, self.partial = 1.0, functools.partial(torch.mul, other=1.0)
        self.number, self.zero, self.shared = 2, 0.0, {1: [1.0]}

    def predict(self, x):
        logits = super().predict(x) * self.private.get() * self.own.scale * self.shared[1][0]
        logits = logits + (torch.tensor([1], dtype=torch.uint8) * self.number * 200).sum() * 1e-3
        return self.partial(logits) + 1e-3 * torch.atan2(torch.tensor(self.zero), torch.tensor(-1.0))


def private_slot(o):
    o.private.put(0.5)


def slot_set_later(o):
    o.private.other = 0.5


def of_a_dict_of_its_own_class(o):
    o.own.scale = 0.5


def in_a_partial(o):
    o.partial.keywords["other"] = 0.5


def another_type(o):
    o.number = 2.0


def another_sign(o):
    o.zero = -0.0


def another_container(o):
    o.shared = {1: [0.5]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (private_slot, "_Private__scale of private of HoldsMore was 1.0, and is 0.5"),
        (slot_set_later, "private of HoldsMore holds 2 things, and held 1"),
        (of_a_dict_of_its_own_class, "scale of own of HoldsMore was 1.0, and is 0.5"),
        (in_a_partial, "other of partial of HoldsMore was 1.0, and is 0.5"),
        (another_type, "number of HoldsMore was 2, and is 2.0"),
        (another_sign, "zero of HoldsMore was 0.0, and is -0.0"),
        (another_container, "shared of HoldsMore was {1: [1.0]}, and is {1: [0.5]}"),
    ],
)
def test_a_change_is_seen(change, told):
    report = both(HoldsMore, drive=changing(change))
    assert report.rerecorded == [told]


def test_what_is_equal_is_no_change():
    def again(objective):
        objective.shared, objective.zero, objective.number = {1: [1.0]}, float("0"), int("2")

    assert both(HoldsMore, drive=changing(again)).rerecorded == []


def test_a_slot_that_a_trial_has_set_is_not_set_afterwards():
    module = nn.Identity()
    module.private = Private()
    given = Assumptions(module)
    module.private.other = 3.0
    module.private.put(2.0)
    given.put_back()
    assert not hasattr(module.private, "other")
    assert module.private.get() == 1.0


@pytest.mark.parametrize("in_place", [True, False])
def test_a_distribution(in_place):
    class Prior(Net):
        def __init__(self):
            super().__init__()
            self.prior = torch.distributions.Normal(torch.zeros(3), torch.ones(3), validate_args=False)

        def loss(self, logits, labels):
            mean = logits.detach().mean(0)
            if in_place:
                self.prior.loc.mul_(0.9).add_(mean, alpha=0.1)
            else:
                self.prior.loc = self.prior.loc * 0.9 + mean * 0.1
            return super().loss(logits, labels) - 1e-2 * self.prior.log_prob(logits).mean()

    both(Prior, "" if in_place else "loc of prior of Prior was given another tensor", see=lambda o: o.prior.loc)


# What is looked up elsewhere

NUMBERS, LOSSES, CONFIG, SCALE = [0], [], types.SimpleNamespace(scale=1.0), 1.0
CENTER, LOOPS, RNG, DRAWS = torch.zeros(3), [], [None], torch.Generator()
F.seen_by_a_test = 0  # in a library, where nobody looks
SETTINGS = types.ModuleType("settings_of_a_test")
SETTINGS.__file__, SETTINGS.scale, SETTINGS.calls = "/home/somebody/settings.py", 1.0, 0
sys.modules["settings_of_a_test"] = SETTINGS


class Settings:
    scale, calls = 1.0, 0


def begin():
    NUMBERS[0], CONFIG.scale, SETTINGS.scale, SETTINGS.calls = 0, 1.0, 1.0, 0
    Settings.scale, Settings.calls, globals()["SCALE"] = 1.0, 0, 1.0
    LOSSES.clear(), LOOPS.clear(), CENTER.zero_(), DRAWS.manual_seed(3), RNG.clear()
    RNG.append(np.random.default_rng(0))
    helper.calls = 0


def helper(loss):
    helper.calls += 1
    return loss * (2 if helper.calls % 10 == 0 else 1)


class OfItsClass(Net):
    losses = ()

    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        self.losses.append(loss.detach())
        return loss


class InGlobals(Net):
    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        LOSSES.append(loss.detach())
        return loss


class CountsInGlobals(Net):
    def loss(self, logits, labels):
        NUMBERS[0] += 1
        loss = super().loss(logits, labels)
        return loss + 1e-2 * logits.square().mean() if NUMBERS[0] % 10 == 0 else loss


class SetsAGlobal(Net):
    def loss(self, logits, labels):
        global SCALE
        SCALE = SCALE * 0.99
        return super().loss(logits, labels) * (1 if SCALE > 0.7 else 2)


class InAFunction(Net):
    def loss(self, logits, labels):
        return helper(super().loss(logits, labels))


class InADefault(Net):
    def loss(self, logits, labels, calls=[0]):  # noqa: B006
        calls[0] += 1
        return super().loss(logits, labels) * (2 if calls[0] % 10 == 0 else 1)


class OnTheClass(Net):
    def loss(self, logits, labels):
        Settings.calls += 1
        return super().loss(logits, labels) * (2 if Settings.calls % 10 == 0 else 1)


class InAModule(Net):
    def loss(self, logits, labels):
        SETTINGS.calls += 1
        return super().loss(logits, labels) * (2 if SETTINGS.calls % 10 == 0 else 1)


class ImportsAModule(Net):
    def loss(self, logits, labels):
        import settings_of_a_test as settings

        settings.calls += 1
        return super().loss(logits, labels) * (2 if settings.calls % 10 == 0 else 1)


class ByALoop(Net):
    def loss(self, logits, labels):
        return super().loss(logits, labels) + (1e-2 * logits.square().mean() if LOOPS[0].state.step > 25 else 0)


class Mixes(Net):
    def train_step(self, batch):
        x, y = batch
        return super().train_step((x.flip(1) if RNG[0].random() < 0.1 else x, y))


def closed_over():
    calls = 0

    class Closed(Net):
        def loss(self, logits, labels):
            nonlocal calls
            calls += 1
            return super().loss(logits, labels) * (2 if calls % 10 == 0 else 1)

    made = Closed()
    made.seen = [lambda: calls]
    return made


@pytest.mark.parametrize(
    ("kind", "told", "see"),
    [
        (OfItsClass, CHANGES + "losses of the class OfItsClass holds 4 things, and held 3", lambda o: OfItsClass.losses),
        (InGlobals, CHANGES + "LOSSES of the global variables holds 4 things, and held 3", lambda o: LOSSES),
        (CountsInGlobals, CHANGES + "0 of NUMBERS of the global variables was 3, and is 4", lambda o: NUMBERS),
        (SetsAGlobal, CHANGES + "SCALE of the global variables was 0.97", lambda o: SCALE),
        (InAFunction, CHANGES + "calls of the function helper was 3, and is 4", lambda o: helper.calls),
        (InADefault, CHANGES + "0 of 0 of the defaults of InADefault.loss was 3", lambda o: [*InADefault.loss.__defaults__[0]]),
        (OnTheClass, CHANGES + "calls of the class Settings was 3, and is 4", lambda o: Settings.calls),
        (InAModule, CHANGES + "calls of the module settings_of_a_test was 3, and is 4", lambda o: SETTINGS.calls),
        (ImportsAModule, CHANGES + "calls of the module settings_of_a_test was 3, and is 4", lambda o: SETTINGS.calls),
        (closed_over, CHANGES + "calls of the closure of", lambda o: o.seen[0]()),
        (ByALoop, "0 of LOOPS of the global variables is the Loop, which is another in each step", None),
        (Mixes, "a step draws random numbers on the host, from a Generator", lambda o: RNG[0].random()),
    ],
)
def test_what_a_step_changes_elsewhere(kind, told, see):
    def fresh():
        begin()
        OfItsClass.losses = []
        InADefault.loss.__defaults__[0][0] = 0

    both(kind, told, begin=fresh, see=see or (lambda o: None), drive=lambda loop: (LOOPS.append(loop), fit(loop)))


class Adversaries(ax.Objective):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def train_step(self, batch):
        fake = self.generator(torch.randn(len(batch[0]), 4))
        NUMBERS[0] += 1
        yield "critic", F.softplus(-self.critic(batch[0])).mean() + F.softplus(self.critic(fake.detach())).mean()
        if NUMBERS[0] % 20 == 0:
            yield "generator", F.softplus(-self.critic(fake)).mean()


def test_a_counter_of_a_critic_s_steps():
    told = CHANGES + "0 of NUMBERS of the global variables was"
    optimizers = {"generator": ax.Optimizer("adam", lr=1e-3), "critic": ax.Optimizer("adam", lr=1e-3)}
    both(Adversaries, told, begin=begin, see=lambda o: NUMBERS[0], optimizer=lambda: optimizers)


class Scaled(Net):
    """By numbers that lie in all sorts of places, none of them in the module."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        config = types.SimpleNamespace(scale=1.0)
        self.function, self.set = lambda logits: logits * config.scale, lambda value: setattr(config, "scale", value)

    def predict(self, x):
        return self.function(super().predict(x)) * self.named() * SETTINGS.scale

    def named(self):
        return SCALE * CONFIG.scale * Settings.scale * self.factor


def of_globals(o):
    globals()["SCALE"] = 0.5


def of_a_config(o):
    CONFIG.scale = 0.5


def of_a_class(o):
    Settings.scale = 0.5


def of_its_class(o):
    Scaled.factor = 0.5


def of_a_module(o):
    SETTINGS.scale = 0.5


def of_a_closure(o):
    o.set(0.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_globals, "SCALE of the global variables was 1.0, and is 0.5"),
        (of_a_config, "scale of CONFIG of the global variables was 1.0, and is 0.5"),
        (of_a_class, "scale of the class Settings was 1.0, and is 0.5"),
        (of_its_class, "factor of the class Scaled was 1.0, and is 0.5"),
        (of_a_module, "scale of the module settings_of_a_test was 1.0, and is 0.5"),
        (of_a_closure, "scale of config of the closure of <lambda> was 1.0, and is 0.5"),
    ],
)
def test_what_others_change_elsewhere(change, told):
    def fresh():
        begin()
        Scaled.factor = 1.0

    report = both(Scaled, drive=changing(change), begin=fresh)
    assert [*map(plain, report.rerecorded)] == [told]


class CentersGlobally(Net):
    def loss(self, logits, labels):
        CENTER.mul_(0.9).add_(logits.detach().mean(0), alpha=0.1)
        return super().loss(logits - CENTER, labels)


class CentersByClass(Net):
    center = torch.zeros(3)

    def loss(self, logits, labels):
        self.center.mul_(0.9).add_(logits.detach().mean(0), alpha=0.1)
        return super().loss(logits - self.center, labels)


def centers_in_a_closure():
    center, average = torch.zeros(3), {}

    class Closed(Net):
        def loss(self, logits, labels):
            with torch.no_grad():
                center.mul_(0.9).add_(logits.mean(0), alpha=0.1)
                for name, p in self.named_parameters():
                    average.setdefault(name, p.clone()).lerp_(p, 0.1)
            return super().loss(logits - center, labels)

    made = Closed()
    made.seen = [lambda: (center, average)]
    return made


class DrawsGlobally(Net):
    def predict(self, x):
        return super().predict(x + 0.1 * torch.randn(x.shape, generator=DRAWS))


class DrawsInAPartial(Net):
    def __init__(self):
        super().__init__()
        self.noise = functools.partial(torch.randn, generator=torch.Generator().manual_seed(3))

    def predict(self, x):
        return super().predict(x + 0.1 * self.noise(x.shape))


@pytest.mark.parametrize(
    ("kind", "see"),
    [
        (CentersGlobally, lambda o: CENTER.clone()),
        (CentersByClass, lambda o: o.center.clone()),
        (centers_in_a_closure, lambda o: o.seen[0]()),
        (DrawsGlobally, lambda o: DRAWS.get_state()),
        (DrawsInAPartial, lambda o: o.noise.keywords["generator"].get_state()),
    ],
)
def test_tensors_and_generators_elsewhere_are_as_without(kind, see):
    def fresh():
        begin()
        CentersByClass.center.zero_()

    assert both(kind, begin=fresh, see=see).replayed == 43


def test_a_class_attribute_is_put_back_where_it_was():
    class Base(Net):
        calls = 0

        def loss(self, logits, labels):
            type(self).calls += 1
            return super().loss(logits, labels)

    class Derived(Base):
        pass

    def fresh():
        if "calls" in vars(Derived):
            del Derived.calls

    both(Derived, "calls of the class Derived was 3, and is 4", begin=fresh, see=lambda o: (Base.calls, Derived.calls))
    fresh()
    given = Assumptions(Derived())
    Derived.calls = 4
    given.put_back()
    assert "calls" not in vars(Derived)


class Quiet(Net):
    """Of which nothing that others change is used in a step."""

    made, plotted = 0, 0

    def __init__(self):
        super().__init__()
        Quiet.made += 1
        self.numbers = lambda: None

    def predict(self, x):
        F.seen_by_a_test += 1
        return super().predict(x)

    def plot(self):
        Quiet.plotted += 1
        LOSSES.append(len(DATA))
        NUMBERS[0] += 1

    def __repr__(self):
        return f"Quiet({NUMBERS})"


def test_what_a_step_does_not_name_may_change():
    def disturb(state):
        globals()[f"made_in_step_{state.step}"] = state.step  # as in a notebook
        state.objective.plot()
        Quiet.made += 1
        SETTINGS.scale = float(state.step)

    def drive(loop):
        loop.on("before_batch")(disturb)
        fit(loop)

    report = both(Quiet, drive=drive, begin=begin)
    assert (report.replayed, report.rerecorded) == (43, [])
    for step in range(48):
        globals().pop(f"made_in_step_{step}", None)


def test_functions_that_call_one_another_by_name():
    def first():
        return second()

    def second():
        return NUMBERS

    lookups = Lookups()
    lookups.function(first)
    (of_first,) = lookups.more()
    assert (of_first.what, of_first.names) == ("the closure of first", ["second"])
    lookups.function(of_first.where["second"])
    (of_second,) = lookups.more()
    assert (of_second.what, of_second.names) == ("the global variables that second names", ["NUMBERS"])
    assert lookups.more() == []


def test_decorated_methods_are_looked_into():
    class Decorated(Net):
        @torch.no_grad()
        def helped(self, logits):
            return logits * CONFIG.scale

        @property
        def offset(self):
            return Settings.scale

        @staticmethod
        def more():
            return SETTINGS.scale

        def predict(self, x):
            return self.helped(super().predict(x)) + self.offset + self.more()

    places = {(place.what, key) for place in Contents(Decorated()).places for key in place.keys}
    assert ("CONFIG of the global variables that Decorated.helped names", "scale") in places
    assert ("the class Settings", "scale") in places
    assert ("the module settings_of_a_test", "scale") in places


def test_tensors_that_are_new():
    module = nn.Identity()
    module.kept = {"first": torch.ones(1)}
    before = Contents(module)
    assert Contents(module).new_since(before) == ""
    module.kept["second"] = torch.ones(1)
    assert Contents(module).new_since(before) == "second of kept of Identity"


# That all of it is put back, by nothing of the user's


def holding(**held):
    """A module, what is given of it, and what it holds."""
    module = nn.Identity()
    for name, value in held.items():
        setattr(module, name, value)
    return Assumptions(module)


def test_one_that_cannot_be_put_back_does_not_keep_the_others_from_it(monkeypatch):
    first, last, numbers, array = {"a": 1}, {"a": 1}, {1, 2}, np.zeros(2)
    bad = [1]
    given = holding(first=first, bad=bad, last=last, numbers=numbers, array=array)
    first["a"] = last["a"] = bad[0] = 2
    numbers.clear()
    array += 1

    def failing(where, items):
        if where is bad:
            raise RuntimeError("it is frozen")
        refill(where, items)

    monkeypatch.setattr("axontrain.execution.surroundings.refill", failing)
    with pytest.raises(RuntimeError, match="it is frozen"):
        given.put_back()
    assert (first, last, numbers, array.tolist(), bad) == ({"a": 1}, {"a": 1}, {1, 2}, [0, 0], [2])


HISTORY = np.zeros(64)


def test_a_read_only_view_is_put_back_by_what_it_is_of():
    class Windows(Net):
        def __init__(self):
            super().__init__()
            self.windows = np.lib.stride_tricks.sliding_window_view(HISTORY, 8)

        def loss(self, logits, labels):
            HISTORY[:-1] = HISTORY[1:]
            HISTORY[-1] += 1
            return super().loss(logits, labels) * (1 + 0.001 * self.windows[-1].mean())

    both(Windows, CHANGES + "windows of Windows is another array", begin=lambda: HISTORY.fill(0), see=lambda o: HISTORY.copy())


def test_a_read_only_view_of_what_is_not_looked_at_is_left_alone():
    large = np.zeros(2**14)

    class Part(Net):
        def __init__(self):
            super().__init__()
            self.part = large[:4]
            self.part.flags.writeable = False

        def loss(self, logits, labels):
            large[0] += 1
            return super().loss(logits, labels) * (1 + 0.001 * self.part[0])

    both(
        Part, "part of Part is a read-only view of what cannot be put back", begin=lambda: large.fill(0), see=lambda o: large[0]
    )


def test_read_only_arrays_that_are_no_views():
    own = np.arange(3.0)
    own.flags.writeable = False
    given = holding(own=own, of_bytes=np.frombuffer(b"abcd", np.uint8))
    assert given.contents.running == ""
    own.flags.writeable = True
    own[0] = 5
    own.flags.writeable = False
    assert given.broken() == "own of Identity is another array"
    given.put_back()
    assert own[0] == 0
    assert not own.flags.writeable
    assert given.hold()


class Slotted:
    __slots__ = ("factor",)


class Shadowing(Slotted):
    @property
    def factor(self):
        return 1.5


def test_a_slot_under_a_property_of_its_name():
    class Scales(Net):
        def __init__(self):
            super().__init__()
            self.by = [Shadowing()]

        def loss(self, logits, labels):
            return super().loss(logits, labels) * self.by[0].factor

    both(Scales)
    by = Shadowing()
    slot = vars(Slotted)["factor"]
    slot.__set__(by, 1.0)
    given = holding(by=by)
    slot.__set__(by, 2.0)
    assert given.broken() == "factor of by of Identity was 1.0, and is 2.0"
    given.put_back()
    assert slot.__get__(by) == 1.0


class Immutable(type):
    def __setattr__(cls, name, value):
        raise TypeError("immutable")


class Constants(metaclass=Immutable):
    calls = 0


def test_a_class_that_lets_nothing_be_set():
    class Counts(Net):
        def loss(self, logits, labels):
            type.__setattr__(Constants, "calls", Constants.calls + 1)
            return super().loss(logits, labels) * (2 if Constants.calls % 10 == 0 else 1)

    told = CHANGES + "calls of the class Constants was 3, and is 4"
    both(Counts, told, begin=lambda: type.__setattr__(Constants, "calls", 0), see=lambda o: Constants.calls)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: {"a": 1, "b": 2}, lambda held: held.update(b=3, c=4)),
        (lambda: {"a": 1, "b": 2}, lambda held: held.update(a=held.pop("a"))),
        (lambda: OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
        (lambda: [1, 2], lambda held: held.append(3)),
        (lambda: deque([1, 2]), lambda held: held.append(3)),
        (lambda: deque([1, 2, 3], maxlen=3), lambda held: held.append(4)),
        (lambda: deque([1, 2], maxlen=3), lambda held: (held.append(4), held.append(5))),
        (lambda: {1, 2}, lambda held: (held.add(3), held.remove(1))),
    ],
)
def test_nothing_is_empty_while_it_is_put_back(make, change):
    where = make()
    before = held(where)
    change(where)
    seen = []

    def look(frame, event, argument):
        if frame.f_code.co_filename.endswith("refilling.py"):
            frame.f_trace_opcodes = True
            seen.append(len(where))
            return look

    sys.settrace(look)
    try:
        refill(where, before)
    finally:
        sys.settrace(None)
    assert held(where) == before
    assert where == make()
    assert len(seen) > 10
    assert min(seen) > 0


def test_ctrl_c_while_attributes_are_put_back_leaves_them_there():
    module = nn.Identity()
    module.calls = 0
    given = Assumptions(module)
    module.calls, module.new = 1, 2
    names = {*vars(module)}

    def stop(frame, event, argument):
        if frame.f_code.co_name == "_refill_dict" and frame.f_locals["where"] is vars(module):
            if event == "line" and module.calls == 0:  # in the middle of it
                sys.settrace(None)
                raise KeyboardInterrupt
            return stop
        return stop if event == "call" else None

    sys.settrace(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            given.put_back()
    finally:
        sys.settrace(None)
    assert {*vars(module)} == names


# What other threads live in


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (queue.Queue, "is a Queue"),
        (queue.LifoQueue, "is a LifoQueue"),
        (queue.SimpleQueue, "is a SimpleQueue"),
        (threading.Thread, "is a Thread"),
        (threading.Condition, "is a Condition"),
        (threading.Event, "is an Event"),
        (threading.BoundedSemaphore, "is a BoundedSemaphore"),
        (concurrent.futures.Future, "is a Future"),
        (lambda: concurrent.futures.ThreadPoolExecutor(1), "is a ThreadPoolExecutor"),
        (multiprocessing.Event, "is an Event"),
        (multiprocessing.Lock, "is a Lock"),
    ],
)
def test_what_other_threads_use_is_refused_before_the_trial(make, told):
    class Logs(Net):
        def __init__(self):
            super().__init__()
            self.logger = types.SimpleNamespace(within=[make()])

    assert Contents(Logs()).running == f"0 of within of logger of Logs {told}, which other threads use"


def test_a_queue_of_a_thread_loses_nothing():
    class Logs(Net):
        def __init__(self):
            super().__init__()
            self.log = [queue.Queue()]

        def loss(self, logits, labels):
            self.log[0].put(len(labels))
            return super().loss(logits, labels)

    both(Logs, "0 of log of Logs is a Queue, which other threads use", see=lambda o: o.log[0].qsize())


def test_a_lock_alone_is_harmless():
    assert holding(locks=[threading.Lock(), threading.RLock()]).contents.running == ""


# That nothing of the user's is called while it is looked


class Recent(OrderedDict):
    def __getitem__(self, key):
        self.move_to_end(key)
        return super().__getitem__(key)


class Tells(dict):
    def __init__(self, *args):
        super().__init__(*args)
        self.reads = Counter()

    def __getitem__(self, key):
        self.reads[key] += 1
        return super().__getitem__(key)

    def __missing__(self, key):
        raise RuntimeError(f"no option {key}")


class Numbered(list):
    def __getitem__(self, key):
        raise RuntimeError("by number only")

    def __len__(self):
        raise RuntimeError("not to be counted")


def test_a_look_calls_no_method_of_a_container():
    recent, tells, missing, numbered = Recent(a=1, b=2, c=3), Tells({"a": 1}), defaultdict(list, a=[1]), Numbered([1, 2])
    given = holding(recent=recent, tells=tells, missing=missing, numbered=numbered)
    assert given.hold()
    assert given.broken() == ""
    assert [*recent] == ["a", "b", "c"]
    assert not tells.reads
    del missing["a"]
    assert not given.hold()
    assert given.broken() == "a of missing of Identity is gone"
    assert not missing
    given.put_back()
    assert missing == {"a": [1]}
    list.append(numbered, 3)
    assert not given.hold()
    assert given.broken() == "numbered of Identity holds 3 things, and held 2"
    given.put_back()
    assert [*list.__iter__(numbered)] == [1, 2]
    dict.__setitem__(tells, "b", dict.pop(tells, "a"))
    assert given.broken() == "a of tells of Identity is gone"
    given.put_back()
    assert given.hold()
    assert not tells.reads


def test_a_default_dict_that_is_emptied_stays_empty():
    class Sums(Net):
        def __init__(self):
            super().__init__()
            self.sums = defaultdict(list, weight=[0.5])

        def loss(self, logits, labels):
            return super().loss(logits, labels) * (self.sums["weight"][0] if "weight" in self.sums else 1.0)

    report = both(Sums, drive=changing(lambda o: o.sums.clear()), see=lambda o: dict(o.sums))
    assert report.rerecorded == ["weight of sums of Sums is gone"]


class Anything:
    """Which has whatever it is asked for."""

    def __getattr__(self, name):
        return Anything()


class NoKey:
    def __init__(self):
        self.options = {"scale": 1.0}

    def __getattr__(self, name):
        return self.options[name]


class Wordless:
    def __init__(self, value):
        self.value = value

    def __repr__(self):
        raise RuntimeError("no words for it")


class Lies:
    __class__ = dict  # as proxies give the class of what they stand for


def test_objects_that_answer_anything():
    alive = NoKey()
    given = holding(
        some=[Anything(), NoKey(), weakref.proxy(alive), mock.MagicMock(), mock.Mock(spec=dict), Lies(), Wordless(1)]
    )
    assert given.contents.running == ""
    assert given.hold()


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (Wordless(1), Wordless(1), "held of Identity was <test_graph_contents.Wordless object at "),
        (types.SimpleNamespace(scale=1.0), types.SimpleNamespace(scale=1.0), "held of Identity is another object"),
        (1, 2, "held of Identity was 1, and is 2"),
    ],
)
def test_the_reason_of_another_object(before, now, told):
    module = nn.Identity()
    module.held = before
    given = Assumptions(module)
    module.held = now
    assert not given.hold()
    assert given.broken().startswith(told)


def test_what_is_behind_a_proxy_and_a_weak_reference():
    options = NoKey()
    mapping = {"scale": 1.0}
    given = holding(proxy=types.MappingProxyType(mapping), refers=weakref.ref(options))
    mapping["scale"] = 2.0
    assert not given.hold()
    assert given.broken() == "scale of proxy of Identity was 1.0, and is 2.0"
    given.put_back()  # which can write to what is behind only by its own name
    assert mapping["scale"] == 2.0
    mapping["scale"] = 1.0
    assert given.hold()
    options.options["scale"] = 3.0
    assert given.broken() == "scale of options of refers of Identity was 1.0, and is 3.0"


def test_keys_are_called_in_few_words():
    key = torch.zeros(2, 3)
    given = holding(held={key: [1], "k" * 100: [1]})
    given.contents.places[-2].where[0] = 2
    assert given.broken() == "0 of a tensor of shape (2, 3) of held of Identity was 1, and is 2"
    given.put_back()
    given.contents.places[-1].where[0] = 2
    assert given.broken() == f"0 of {'k' * 60}... of held of Identity was 1, and is 2"


def test_many_tuples_of_what_is_plain_are_plain():
    samples = [(f"{n}.png", (n % 3, 1.0)) for n in range(ALL)]
    contents = holding(samples=samples).contents
    assert contents.running == ""
    assert not any(place.keys for place in contents.places if place.where is samples)


# Orders


class Stages(Net):
    def __init__(self):
        super().__init__()
        self.stages = {"a": 1.0, "b": 3.0}
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})

    def predict(self, x):
        logits = super().predict(x) * self.stages[next(iter(self.stages))]
        for number, head in enumerate(self.heads.values()):
            logits = logits + (number + 1) * head(logits)
        return logits


def of_a_dict(o):
    o.stages["a"] = o.stages.pop("a")


def of_parts(o):
    o.heads["a"] = o.heads.pop("a")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_a_dict, "stages of Stages has another order"),
        (of_parts, "the parts of heads (ModuleDict) are in another order"),
    ],
)
def test_the_order_of_keys_counts(change, told):
    assert both(Stages, drive=changing(change)).rerecorded == [told]


# Generators


def test_numpy_s_bit_generators():
    class Bits(Net):
        def __init__(self):
            super().__init__()
            self.bits = [np.random.PCG64(0)]

        def loss(self, logits, labels):
            return super().loss(logits, labels) * (2.0 if np.random.Generator(self.bits[0]).random() < 0.2 else 1.0)

    told = "a step draws random numbers on the host, from a PCG64 of its own"
    both(Bits, told, see=lambda o: np.random.Generator(o.bits[0]).random())


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_a_bit_generator_is_put_back(kind):
    bits = kind(3)
    state = drawn_to(bits)
    numbers = np.random.Generator(bits).random(5)
    assert drawn_to(bits) != state
    draw_from(bits, state)
    assert drawn_to(bits) == state
    assert (np.random.Generator(bits).random(5) == numbers).all()


def test_the_system_s_generator_is_none_that_can_be_put_back():
    assert not is_generator(random.SystemRandom())
    assert holding(drawn=[random.SystemRandom()]).contents.running == ""


def test_a_sobol_engine():
    class Collocates(Net):
        def __init__(self):
            super().__init__()
            self.points = torch.quasirandom.SobolEngine(8, scramble=True, seed=0)

        def train_step(self, batch):
            return super().train_step((batch[0] + 0.1 * self.points.draw(16), batch[1]))

    told = CHANGES + "quasi of points of Collocates was given another tensor"
    both(Collocates, told, see=lambda o: (o.points.num_generated, o.points.draw(4)))


# What functions remember


@functools.cache
def kept_center():
    return torch.zeros(3)


@functools.lru_cache(maxsize=4)
def kept_center_of(size):
    return torch.zeros(size)


@functools.cache
def kept_generator():
    return torch.Generator().manual_seed(3)


@functools.cache
def kept_count():
    return [0]


@functools.lru_cache(maxsize=2)
def kept_counts(first, last):
    return {"calls": [0]}


class CentersByACache(Net):
    def center(self):
        return kept_center()

    def loss(self, logits, labels):
        self.center().mul_(0.9).add_(logits.detach().mean(0), alpha=0.1)
        return super().loss(logits - self.center(), labels)


class CentersByASmallCache(CentersByACache):
    def center(self):
        return kept_center_of(3)


class DrawsByACache(Net):
    def predict(self, x):
        return super().predict(x + 0.1 * torch.randn(x.shape, generator=kept_generator()))


class CountsInACache(Net):
    def count(self):
        return kept_count()

    def loss(self, logits, labels):
        self.count()[0] += 1
        return super().loss(logits, labels) * (2 if self.count()[0] % 10 == 0 else 1)


class CountsInASmallCache(CountsInACache):
    def count(self):
        return kept_counts("a", last={}.get(1))["calls"]


def forget():
    for one in (kept_center, kept_center_of, kept_generator, kept_count, kept_counts):
        one.cache_clear()


@pytest.mark.parametrize(
    ("kind", "told", "see"),
    [
        (CentersByACache, "", lambda o: o.center().clone()),
        (CentersByASmallCache, "", lambda o: o.center().clone()),
        (DrawsByACache, "", lambda o: kept_generator().get_state()),
        (
            CountsInACache,
            CHANGES + "0 of () of what kept_count of the global variables remembers was 3",
            lambda o: [*o.count()],
        ),
        (CountsInASmallCache, CHANGES + "0 of calls of 1 of what kept_counts of the global variables", lambda o: [*o.count()]),
    ],
)
def test_what_functions_remember(kind, told, see):
    both(kind, told, begin=forget, see=see)


@pytest.mark.parametrize("kind", [CentersByACache, CentersByASmallCache])
def test_a_function_that_forgets_what_a_step_has_used(kind):
    report = both(kind, drive=changing(lambda o: forget()), begin=forget, see=lambda o: o.center().clone())
    assert len(report.rerecorded) == 1
    assert "of what kept_center" in report.rerecorded[0]
    assert report.rerecorded[0].endswith(" is gone")
