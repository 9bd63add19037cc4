"""graph=: what a module holds and what its functions look up elsewhere is looked at before replays, and put back after trials.

A run with graph=True is the same as without, or it is not replayed, for which one warning gives the reason. By the stand-in
that records on the CPU (tests/recorded.py).
"""

import array
import functools
import itertools
import re
import sys
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from contextvars import ContextVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import recorder  # noqa: F401  # a fixture
from torch import nn

import axontrain as ax
from axontrain.execution.assumptions import Assumptions
from axontrain.execution.contents import ALL, Contents
from axontrain.execution.lookups import Lookups

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
SEEN: ContextVar[int] = ContextVar("SEEN", default=0)  # in which nobody looks
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
        SEEN.set(SEEN.get() + 1)
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
