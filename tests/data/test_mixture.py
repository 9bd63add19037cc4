"""Several datasets as one: a task for each step, metrics for each task."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import axontrain as ax


def mixture(**options):
    return ax.Mixture({"a": list(range(20)), "b": list(range(100, 112)), "c": list(range(200, 203))}, **options)


def passes(loader, epochs, seed=0, start=0):
    return [[(b.task, b.batch.tolist()) for b in loader.batches(seed, epoch, start)] for epoch in range(epochs)]


def test_it_is_a_dataset_of_all():
    data = mixture()
    assert len(data) == 35
    assert [data[0], data[19], data[20], data[34], data[-1]] == [0, 19, 100, 202, 202]
    for index in (35, -36):
        with pytest.raises(IndexError, match=f"index {index} of a Mixture of 35 samples"):
            data[index]


def test_without_weights_an_epoch_goes_through_each_once_in_a_mixed_order():
    loader = ax.Loader(mixture(), 4, shuffle=True)
    assert len(loader) == 5 + 3 + 1
    first, second = passes(loader, 2)
    for epoch in (first, second):
        assert sorted(sample for _, batch in epoch for sample in batch) == [*range(20), *range(100, 112), *range(200, 203)]
        assert all(len({sample // 100 for sample in batch}) == 1 for _, batch in epoch), "each of one task"
    assert [task for task, _ in first] != sorted(task for task, _ in first)
    assert first != second


def test_in_evaluation_one_comes_after_the_other():
    (epoch,) = passes(ax.Loader(mixture(weights=[1, 1, 1]), 4), 1)
    assert [sample for _, batch in epoch for sample in batch] == [*range(20), *range(100, 112), *range(200, 203)]
    assert [task for task, _ in epoch] == list("aaaaabbbc")


def test_weights_say_how_often_a_task_comes_and_each_goes_through_its_own_data():
    loader = ax.Loader(mixture(weights={"c": 1, "a": 1, "b": 2}), 4, shuffle=True)
    steps = [step for epoch in passes(loader, 400) for step in epoch]
    counts = collections.Counter(task for task, _ in steps)
    assert len(steps) == 400 * 9
    assert abs(counts["b"] / len(steps) - 0.5) < 0.04
    assert abs(counts["a"] - counts["c"]) < 0.04 * len(steps)
    for task, size in (("a", 20), ("b", 12), ("c", 3)):
        of_task = [batch for name, batch in steps if name == task]
        per_pass = -(-size // 4)
        for first in range(0, len(of_task) - per_pass, per_pass):
            seen = [sample for batch in of_task[first : first + per_pass] for sample in batch]
            assert len(set(seen)) == size, "a pass of its own, whatever the epochs of the mixture"


def test_which_says_the_task_of_each_step():
    loader = ax.Loader(mixture(which=lambda step: "abc"[step % 3] if step < 9 else "a"), 4, shuffle=True)
    first, second = passes(loader, 2)
    assert [task for task, _ in first] == list("abcabcabc")
    assert {task for task, _ in second} == {"a"}
    of_a = [sample for epoch in (first, second) for task, batch in epoch if task == "a" for sample in batch]
    assert len(set(of_a[:20])) == 20


@given(
    kind=st.sampled_from([{}, {"weights": [3, 1, 2]}, {"which": lambda step: "abc"[step * step % 3]}]),
    batch_size=st.integers(1, 7),
    epoch=st.integers(0, 5),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_it_goes_on_at_any_batch(kind, batch_size, epoch, data):
    whole = list(ax.Loader(mixture(**kind), batch_size, shuffle=True).batches(7, epoch))
    start = data.draw(st.integers(0, len(whole)))
    rest = list(ax.Loader(mixture(**kind), batch_size, shuffle=True).batches(7, epoch, start))
    assert [(b.task, b.batch.tolist()) for b in rest] == [(b.task, b.batch.tolist()) for b in whole[start:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_the_same_in_workers_and_on_ranks(workers):
    loader = ax.Loader(mixture(weights=[1, 2, 1]), 4, shuffle=True, workers=workers)
    whole = passes(ax.Loader(mixture(weights=[1, 2, 1]), 4, shuffle=True), 2)
    assert passes(loader, 2) == whole
    shares = [[(b.task, b.batch.tolist()) for b in loader.batches(0, 1, share=(rank, 2))] for rank in range(2)]
    assert [(one[0], one[1] + two[1]) for one, two in zip(*shares, strict=True)] == whole[1]
    loader.close()


class Heads(ax.Objective):
    """A body for all tasks, a head for each."""

    metrics = ("accuracy",)

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.heads = nn.ModuleDict({task: nn.Linear(16, size) for task, size in classes.items()})
        self.seen = []

    def train_step(self, batch):
        self.seen.append(batch.task)
        return self._one(batch)

    def eval_step(self, batch):
        return self._one(batch)

    def _one(self, batch):
        images, labels = batch
        logits = self.heads[batch.task](self.body(images).relu())
        return ax.Step(F.cross_entropy(logits, labels), logits, labels, len(labels))


def task(classes, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    return ax.ArrayDataset(x, x[:, :classes].argmax(1))


def test_metrics_are_kept_for_each_task():
    torch.manual_seed(0)
    objective = Heads({"three": 3, "five": 5})
    train = ax.Mixture({"three": task(3, 300, 0), "five": task(5, 600, 1)})
    test = ax.Mixture({"three": task(3, 100, 2), "five": task(5, 50, 3)})
    loop = ax.Loop(objective, ax.Optimizer("adam", lr=0.01), progress=False)
    result = loop.fit(train, test, epochs=8, batch_size=30)
    names = {
        f"{part}/{of}"
        for part in ("train", "val")
        for of in ("loss", "three/loss", "three/accuracy", "five/loss", "five/accuracy")
    }
    assert names == set(result.values)
    assert result.values["val/three/accuracy"] > 0.8
    assert result.values["val/five/accuracy"] > 0.7
    mean = (100 * result.values["val/three/loss"] + 50 * result.values["val/five/loss"]) / 150
    assert result.values["val/loss"] == pytest.approx(mean)
    found = loop.evaluate(task(3, 100, 2)) if False else loop.evaluate(test)
    assert found["three/accuracy"] == pytest.approx(result.values["val/three/accuracy"])
    assert collections.Counter(objective.seen) == {"three": 8 * 10, "five": 8 * 20}


def test_an_objective_that_knows_of_no_task_takes_the_batch_within():
    class Plain(ax.Objective):
        metrics = ("mse",)

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)

        def split(self, batch):
            return batch["x"], batch["y"]

        def predict(self, x):
            return self.net(x).squeeze(1)

        def loss(self, predictions, y):
            return F.mse_loss(predictions, y)

    x = torch.randn(60, 3)
    data = {name: ax.ArrayDataset({"x": x, "y": x.sum(1) + shift}) for name, shift in (("a", 0.0), ("b", 0.1))}
    loop = ax.Loop(Plain(), ax.Optimizer("sgd", lr=0.1), progress=False)
    result = loop.fit(ax.Mixture(data), epochs=20)
    assert result.values["train/a/mse"] == pytest.approx(result.values["train/a/loss"])
    assert loop.state.samples == 20 * 120
    pairs = ax.Mixture({"a": ax.ArrayDataset(x, x.sum(1, keepdim=True))})
    assert ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.1), progress=False).fit(pairs, epochs=1).ok
    assert loop.predict(ax.Loader(ax.Mixture(data), 32)).shape == (120,)


@pytest.mark.parametrize("kind", [{}, {"weights": [1, 3]}, {"which": lambda step: "three" if step % 4 else "five"}])
def test_a_run_over_tasks_goes_on_bit_for_bit(kind, tmp_path):
    def made():
        torch.manual_seed(0)
        return ax.Loop(Heads({"three": 3, "five": 5}), ax.Optimizer("adam", lr=0.01), progress=False)

    def data():
        return ax.Mixture({"three": task(3, 70, 0), "five": task(5, 110, 1)}, **kind)

    whole, part = made(), made()
    expected = whole.fit(data(), steps=20, batch_size=20)
    part.fit(data(), steps=13, batch_size=20)
    path = part.save(tmp_path / "state")
    rest = made()
    rest.restore(path)
    found = rest.fit(data(), steps=7, batch_size=20)
    assert found.values == expected.values
    assert all(map(torch.equal, whole.objective.parameters(), rest.objective.parameters()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ax.Mixture({}), "takes a mapping of datasets"),
        (lambda: ax.Mixture([[1]]), "takes a mapping of datasets"),
        (lambda: ax.Mixture({"a": iter([1])}), "the dataset 'a' is list_iterator, which is no dataset"),
        (lambda: mixture(weights=[1, 2]), r"weights=\[1, 2\]: a number above 0 for each of \['a', 'b', 'c'\]"),
        (lambda: mixture(weights=[1, 2, 0]), "a number above 0"),
        (lambda: mixture(weights={"a": 1}), r"weights of \['a'\] for datasets \['a', 'b', 'c'\]"),
        (lambda: mixture(weights=[1, 1, 1], which=lambda step: "a"), "only one of them"),
        (lambda: mixture(which="a"), "it is a function of the step"),
        (lambda: list(ax.Loader(mixture(which=lambda step: "d"), 4, shuffle=True)), r"which\(0\) of the Mixture returned: 'd'"),
        (lambda: list(ax.Loader(mixture(), 4, shuffle=True, drop_last=True)), "the dataset 'c' of the Mixture gives no batch"),
    ],
)
def test_what_does_not_fit_says_so(make, told):
    with pytest.raises(ax.AxonError, match=told):
        make()


@pytest.mark.parametrize("options", [{"sampler": [0, 20]}, {"batch_sampler": [[0, 1]]}])
def test_a_mixture_takes_no_sampler(options):
    with pytest.raises(ax.ConfigurationError, match="says by weights= or which= what comes when"):
        ax.Loader(mixture(), 4, **options)


def test_training_on_a_mixture_that_chooses_wants_shuffling():
    loop = ax.Loop(ax.Supervised(nn.Linear(1, 1), "mse"), ax.Optimizer("sgd", lr=0.1), progress=False)
    with pytest.raises(ax.ConfigurationError, match="shuffle=True"):
        loop.fit(ax.Loader(mixture(weights=[1, 1, 1]), 4), epochs=1)


class Kinds(ax.Objective):
    """Classes for one task, numbers for the other."""

    metrics = {"class/accuracy": "accuracy", "number/mae": "mae"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.body, self.classes, self.number = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def train_step(self, batch):
        x, y = batch
        hidden = self.body(x).relu()
        if batch.task == "class":
            logits = self.classes(hidden)
            return ax.Step(F.cross_entropy(logits, y), logits, y, len(y))
        numbers = self.number(hidden)[:, 0]
        return ax.Step(F.mse_loss(numbers, y), numbers, y, len(y))

    eval_step = train_step


def kinds(**options):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    return ax.Mixture({"class": ax.ArrayDataset(x, x[:, :3].argmax(1)), "number": ax.ArrayDataset(x, x.sum(1))}, **options)


def test_a_task_may_have_metrics_of_its_own(tmp_path):
    loop = ax.Loop(Kinds(), ax.Optimizer("adam", lr=0.01), progress=False)
    result = loop.fit(kinds(), kinds(), epochs=2, batch_size=10)
    of = {"loss", "class/loss", "class/accuracy", "number/loss", "number/mae"}
    assert set(result.values) == {f"{part}/{name}" for part in ("train", "val") for name in of}


def test_the_readings_of_a_task_outlast_a_restart(tmp_path):
    def made():
        torch.manual_seed(0)
        return ax.Loop(Kinds(), ax.Optimizer("adam", lr=0.01), progress=False)

    data = kinds(which=lambda step: "number" if step < 3 else "class")  # no number comes after the third step
    whole, part, rest = made(), made(), made()
    expected = whole.fit(data, epochs=1, batch_size=10)
    part.fit(data, steps=5, batch_size=10)
    rest.restore(part.save(tmp_path / "state"))
    found = rest.fit(data, epochs=1, batch_size=10)
    assert found.values == expected.values
    assert "train/number/mae" in found.values
