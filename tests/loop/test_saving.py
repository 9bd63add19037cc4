"""Saving and restoring: training on after it is bit for bit the same as having gone on."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from resume_runs import flat
from torch import nn

import axontrain as ax


def table(n=40, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


TRAIN, TEST = table(), table(16, seed=1)


class Noisy(ax.Objective):
    metrics = ("accuracy", "auroc")

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))

    def predict(self, x):
        return self.net(x + 0.1 * float(np.random.normal()) + 0.1 * random.random())

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Counter(ax.Callback):
    """A callback with a state of its own."""

    def __init__(self, **cadence):
        super().__init__(**cadence)
        self.count, self.total = 0, torch.zeros(())

    def after_batch(self, state):
        self.count += 1
        self.total = self.total + state.last.loss

    def state_dict(self):
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state):
        self.count, self.total = state["count"], state["total"]


OPTIMIZERS = {
    "adam": lambda: ax.Optimizer("adam", lr=0.01),
    "momentum": lambda: ax.Optimizer("sgd", lr=0.05, momentum=0.9),
    "rmsprop": lambda: ax.Optimizer("rmsprop", lr=0.01),
    "scheduler": lambda: ax.Optimizer("adamw", lr=0.01, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)),
    "milestones": lambda: ax.Optimizer(
        "sgd", lr=0.05, schedule=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 9], 0.5)
    ),
    "progress": lambda: ax.Optimizer("adamw", lr=0.01, schedule=ax.schedules.cosine()),
    "groups": lambda: ax.Optimizer(
        "adamw", lr=0.01, groups={"*.bias": {"weight_decay": 0.0}, "net.4.weight": {"optimizer": "sgd", "momentum": 0.9}}
    ),
}


def make(optimizer="adam", seed=0, start=0, objective=Noisy):
    torch.manual_seed(start)
    callbacks = [Counter(every=3), ax.EarlyStopping("val/loss", patience=50), ax.ReduceLROnPlateau("val/loss", patience=1)]
    return ax.Loop(objective(), OPTIMIZERS[optimizer](), callbacks=callbacks, seed=seed, progress=False)


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if "elapsed" in name:
            continue
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name] or value != value
        assert same, name


def carry(loop, tmp_path, how):
    return loop.save() if how == "memory" else loop.save(tmp_path / "saved")


@pytest.mark.parametrize("how", ["memory", "directory"])
@pytest.mark.parametrize("steps", [10, 7], ids=["at an epoch's end", "within an epoch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_on_after_a_restore_is_the_same_as_going_on(tmp_path, optimizer, steps, how):
    loop = make(optimizer)
    loop.fit(TRAIN, TEST, steps=steps, batch_size=8)  # epochs of 5
    saved = carry(loop, tmp_path, how)
    other = make(optimizer, seed=7, start=1)  # other weights, another seed: all of it comes from what was saved
    other.restore(saved)
    assert_same(loop.save(), other.save())
    for one in (loop, other):
        one.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert_same(loop.save(), other.save())
    assert loop.state.history == other.state.history
    assert [c.state_dict() for c in loop.callbacks[:1]] == [c.state_dict() for c in other.callbacks[:1]]
    assert (loop.callbacks[1].best, loop.callbacks[1].waited) == (other.callbacks[1].best, other.callbacks[1].waited)


def test_a_saved_state_shares_nothing_with_what_trains():
    loop = make()
    loop.fit(TRAIN, TEST, steps=7, batch_size=8)
    saved = loop.save()
    before = {name: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in flat(saved).items()}
    loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    assert_same(flat(saved), before)


def test_a_snapshot_restores_as_often_as_wanted():
    loop = make()
    loop.fit(TRAIN, TEST, steps=7, batch_size=8)
    saved, results = loop.save(), []
    for _ in range(2):
        loop.restore(saved)
        loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
        results.append(loop.save())
    assert_same(*results)


def test_a_state_saved_by_a_hook_goes_on_the_same():
    loop, saved = make(), []
    loop.on("after_batch", every=7, first=1)(lambda state: saved.append(loop.save()))
    loop.fit(TRAIN, TEST, steps=7, batch_size=8)
    loop.fit(TRAIN, TEST, epochs=1, batch_size=8)
    other = make(seed=7, start=1)
    other.on("after_batch", every=7, first=1)(lambda state: saved.append(other.save()))
    other.restore(saved[0])
    other.fit(TRAIN, TEST, epochs=1, batch_size=8)
    for part in ("objective", "optimizers", "counters", "rng", "values"):
        assert_same(loop.save()[part], other.save()[part])


def test_a_half_done_step_is_not_saved():
    loop = make()

    @loop.on("after_backward")
    def save(state):
        if state.step == 2:
            loop.save()

    with pytest.raises(ax.ConfigurationError, match="save in after_batch"):
        loop.fit(TRAIN, TEST, epochs=1, batch_size=8)
    assert loop.state.step == 2
    loop.callbacks.pop()
    loop.on("after_backward")(lambda state: None)
    saved = []
    loop.on("after_batch")(lambda state: saved.append(loop.save()))
    loop.fit(TRAIN, TEST, epochs=1, batch_size=8)
    assert len(saved) == 3  # the rest of the epoch


def test_a_state_saved_between_the_steps_of_ones_own_loop_goes_on_the_same():
    loop = make()
    for number, _ in enumerate(loop.steps(TRAIN, TEST, steps=7, batch_size=8), 1):
        torch.rand(number)  # the caller's generator, which is another than the run's
        if number == 4:
            saved = loop.save()
    other = make(seed=7, start=1)
    other.restore(saved)
    other.fit(TRAIN, TEST, steps=3, batch_size=8)
    for name, value in loop.objective.state_dict().items():
        assert torch.equal(value, other.objective.state_dict()[name]), name


def test_a_state_saved_between_batches_by_hand_goes_on_the_same():
    batches = list(zip(*(part.split(8) for part in TRAIN.tensors), strict=True))
    loop, other = make(), make(seed=7, start=1)
    for batch in batches[:2]:
        loop.train_on_batch(batch)
    other.restore(loop.save())
    for one in (loop, other):
        for batch in batches[2:]:
            one.train_on_batch(batch)
    assert_same(loop.save(), other.save())


def test_a_list_of_batches_goes_on_where_the_saved_run_stood():
    batches = list(zip(*(part.split(8) for part in TRAIN.tensors), strict=True))
    loop, other, seen = make(), make(seed=7, start=1), []
    loop.fit(batches, TEST, steps=7)
    other.restore(loop.save())
    other.on("after_batch")(lambda state: seen.append(state.last.targets))
    other.fit(batches, TEST, epochs=1)
    assert torch.equal(torch.cat(seen), TRAIN.tensors[1][16:])


def test_restoring_takes_a_loop_back_in_the_middle_of_its_data():
    batches = list(zip(*(part.split(8) for part in TRAIN.tensors), strict=True))
    loop, seen = make(), []
    loop.fit(batches, TEST, steps=2, validate=1)
    saved = loop.save()
    loop.fit(batches, TEST, steps=2, validate=1)
    loop.restore(saved)
    loop.on("after_batch")(lambda state: seen.append(state.last.targets))
    loop.fit(batches, TEST, epochs=1)
    assert torch.equal(torch.cat(seen), TRAIN.tensors[1][16:])


def test_readings_that_are_not_finite_survive(tmp_path):
    loop = make()
    loop.fit(TRAIN, TEST, epochs=1)
    loop.state.record({"odd": math.nan, "large": math.inf})
    other = make()
    other.restore(loop.save(tmp_path / "saved"))
    assert math.isnan(other.state.values["odd"])
    assert other.state.values["large"] == math.inf


def test_an_object_of_the_users_takes_part():
    class Bank:
        def __init__(self):
            self.rows = torch.zeros(2)

        def state_dict(self):
            return {"rows": self.rows}

        def load_state_dict(self, state):
            self.rows = state["rows"]

    loop, bank = make(), Bank()
    loop.state.attach("bank", bank)
    bank.rows = torch.ones(2)
    saved = loop.save()
    other, late = make(), Bank()
    other.restore(saved)
    other.state.attach("bank", late)  # after the restore: its state has waited for it
    assert torch.equal(late.rows, torch.ones(2))
    with pytest.raises(ax.ConfigurationError, match="state_dict"):
        other.state.attach("list", [])


# --- what does not fit ------------------------------------------------------------------------------------------------


class Wider(Noisy):
    def __init__(self):
        super().__init__()
        self.net[4] = nn.Linear(16, 3)


class Deeper(Noisy):
    def __init__(self):
        super().__init__()
        self.net.append(nn.Linear(2, 2))


def trained(loop, epochs=1):
    loop.fit(TRAIN, TEST, epochs=epochs, batch_size=8)
    return loop


@pytest.mark.parametrize("how", ["memory", "directory"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"objective": Wider}, {}),
        ({"objective": Deeper}, {}),
        ({}, {"objective": Deeper}),
        ({"optimizer": "groups"}, {}),
        ({"optimizer": "scheduler"}, {}),
        ({"optimizer": "momentum"}, {}),
        ({"optimizer": "adam"}, {"optimizer": "momentum"}),
    ],
    ids=["wider", "deeper", "shallower", "other groups", "another schedule", "momentum to adam", "adam to momentum"],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(tmp_path, source, target, how):
    """trax: restoring into a different model fails."""
    loop = trained(make(**target))
    before = loop.save()
    saved = carry(trained(make(**source, start=1), epochs=2), tmp_path, how)
    with pytest.raises(ax.CheckpointError):
        loop.restore(saved)
    assert_same(before, loop.save())


class Pair(ax.Objective):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 2), nn.Linear(2, 2)

    def predict(self, x):
        return self.b(torch.relu(self.a(x)))

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def pair(b=None, names=("a", "b")):
    torch.manual_seed(0)
    params = {"a": "a.*", "b": "b.*"}
    optimizers = {n: ax.Optimizer("adam", lr=0.01, params=params[k]) for n, k in zip(names, "ab", strict=True)}
    if b is not None:
        optimizers["b"] = b
    return ax.Loop(Pair(), optimizers, progress=False)


def test_a_second_optimizer_that_does_not_fit_leaves_the_first_as_it_was():
    loop = pair(ax.Optimizer("adam", lr=0.01, params="b.*", groups={"*.weight": {"weight_decay": 0.1}}))
    loop.fit(TRAIN, epochs=1)
    other = pair()
    other.fit(TRAIN, epochs=2)
    before = other.save()
    with pytest.raises(ax.CheckpointError):
        other.restore(loop.save())
    assert_same(before, other.save())


def test_groups_of_the_same_parameters_in_the_same_order_are_told_apart():
    torch.manual_seed(0)
    grouped = ax.Optimizer("sgd", lr=0.1, groups={"*.bias": {"lr": 0.01}})
    loops = [
        ax.Loop(ax.Supervised(nn.Linear(6, 2), "cross_entropy"), o, progress=False)
        for o in (grouped, ax.Optimizer("sgd", lr=0.1))
    ]
    with pytest.raises(ax.CheckpointError, match="group"):
        loops[1].restore(loops[0].save())


def test_optimizers_of_other_names_are_refused():
    loop, other = pair(), pair(names=("first", "second"))
    with pytest.raises(ax.CheckpointError, match=r"\['a', 'b'\].*\['first', 'second'\]"):
        other.restore(loop.save())


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_directory_is_refused_and_changes_nothing(tmp_path, file):
    loop = trained(make())
    saved = loop.save(tmp_path / "saved")
    content = bytearray((saved / file).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / file).write_bytes(content)
    loop.fit(TRAIN, TEST, epochs=1)
    before = loop.save()
    with pytest.raises(ax.CheckpointError):
        loop.restore(saved)
    assert_same(before, loop.save())


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ax.CheckpointError, match="not there"):
        make().restore(tmp_path / "nowhere")
