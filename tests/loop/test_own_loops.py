"""Loops of one's own: train_on_batch and steps take the same steps as fit."""

import copy
import gc
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax


def table(n=40, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x.sum(1) > 0).long())


TRAIN, TEST = table(), table(16, seed=1)
BATCHES = list(zip(*(part.split(8) for part in TRAIN.tensors), strict=True))


def noisy_loop(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
    options = {"progress": False, "metrics": ["accuracy"], **options}
    optimizer = options.pop("optimizer", None) or ax.Optimizer("adam", lr=0.01, clip_norm=1.0)
    return ax.Loop(ax.Supervised(net, "cross_entropy"), optimizer, **options)


def assert_same(a, b):
    for (name, one), other in zip(a.objective.state_dict().items(), b.objective.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_train_on_batch_takes_the_steps_of_fit_bit_for_bit():
    loop, twin = noisy_loop(), noisy_loop()
    result = loop.fit(BATCHES, epochs=1)
    losses = [twin.train_on_batch(batch).loss.item() for batch in BATCHES]
    assert_same(loop, twin)
    assert (twin.state.step, twin.state.samples) == (loop.state.step, loop.state.samples) == (5, 40)
    assert twin.state.read() == {k: v for k, v in result.values.items() if k.startswith("train/")}
    assert twin.state.values["train/loss"] == pytest.approx(sum(losses) / 5)


def test_train_on_batch_gives_the_step_with_its_loss_detached():
    loop = noisy_loop()
    step = loop.train_on_batch(BATCHES[0])
    assert isinstance(step, ax.Step)
    assert step is loop.state.last
    assert not step.loss.requires_grad
    assert step.predictions.shape == (8, 2)
    assert step.weight == 8


def test_train_on_batch_and_fit_go_on_from_each_other():
    loop, twin = noisy_loop(), noisy_loop()
    loop.fit(BATCHES * 2, epochs=1)
    for batch in BATCHES:
        twin.train_on_batch(batch)
    twin.fit(BATCHES, epochs=1)
    assert_same(loop, twin)
    assert twin.state.step == 10


def test_the_readings_of_a_fit_are_of_its_own_batches():
    loop = noisy_loop(optimizer=ax.Optimizer("sgd", lr=0.0))
    for part in loop.objective.modules():  # what depends on the mode stands still
        if isinstance(part, (nn.Dropout, nn.BatchNorm1d)):
            part.eval()
    far = (BATCHES[0][0] * 100, BATCHES[0][1])
    loop.train_on_batch(far)
    result = loop.fit(BATCHES, epochs=1)
    x, y = TRAIN.tensors
    assert result.values["train/loss"] == pytest.approx(F.cross_entropy(loop.objective(x), y).item(), rel=1e-5)


def test_train_on_batch_needs_an_end_for_a_schedule_of_progress():
    loop = noisy_loop(optimizer=ax.Optimizer("sgd", lr=0.1, schedule=ax.schedules.linear()))
    with pytest.raises(ax.ConfigurationError, match="knows no end"):
        loop.train_on_batch(BATCHES[0])
    assert loop.state.step == 0


def test_train_on_batch_counts_steps_for_a_torch_scheduler():
    loop = noisy_loop(optimizer=ax.Optimizer("sgd", lr=1.0, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1)))
    rates = []
    for batch in BATCHES:
        rates.append(loop.state.optimizers["main"].lr)
        loop.train_on_batch(batch)
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_train_on_batch_works_for_several_optimizers():
    class Two(ax.Objective):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 2)

        def train_step(self, batch):
            yield "a", F.cross_entropy(self.a(batch[0]), batch[1])
            yield "b", F.cross_entropy(self.b(batch[0]), batch[1])

    loop = ax.Loop(Two(), {n: ax.Optimizer("sgd", lr=0.1) for n in "ab"}, progress=False)
    first = loop.train_on_batch(BATCHES[0])
    for _ in range(20):
        last = loop.train_on_batch(BATCHES[0])
    assert loop.state.step == 21
    assert last.values["a_loss"] < first.values["a_loss"]
    assert last.values["b_loss"] < first.values["b_loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_of_a_loop_trains_its_own_objective(precision):
    loop = noisy_loop(precision=precision, seed=0)
    loop.train_on_batch(BATCHES[0])
    copied, before = copy.deepcopy(loop), copy.deepcopy(loop.objective.state_dict())
    torch.manual_seed(1)
    copied.train_on_batch(BATCHES[1])
    assert all(torch.equal(value, before[name]) for name, value in loop.objective.state_dict().items())
    torch.manual_seed(1)
    loop.train_on_batch(BATCHES[1])
    assert_same(loop, copied)
    assert not torch.equal(before["model.0.weight"], loop.objective.state_dict()["model.0.weight"])


def test_train_on_batch_calls_no_callbacks():
    calls = []
    loop = noisy_loop()
    loop.on("after_batch")(lambda state: calls.append(1))
    loop.train_on_batch(BATCHES[0])
    assert calls == []


def test_steps_yields_every_step_of_fit():
    loop, twin = noisy_loop(), noisy_loop()
    fitted = []
    loop.on("after_batch")(lambda state: fitted.append(state.last.loss.item()))
    loop.fit(TRAIN, TEST, epochs=2, batch_size=8)
    own = []
    for step in twin.steps(TRAIN, TEST, epochs=2, batch_size=8):
        assert isinstance(step, ax.Step)
        assert step is twin.state.last
        own.append(step.loss.item())
        assert twin.state.step == len(own)
    assert own == fitted
    assert_same(loop, twin)
    assert loop.state.history == twin.state.history
    assert twin.state.status == "completed"


def test_steps_calls_the_callbacks():
    calls = []
    loop = noisy_loop()
    for hook in ("before_fit", "after_epoch", "after_evaluate", "after_fit"):
        loop.on(hook)(lambda state, hook=hook: calls.append(hook))
    list(loop.steps(TRAIN, TEST, epochs=1))
    assert calls == ["before_fit", "after_evaluate", "after_epoch", "after_fit"]


def test_leaving_the_steps_early_ends_the_run_cleanly():
    loop, twin, calls = noisy_loop(), noisy_loop(), []
    loop.on("after_fit")(lambda state: calls.append(state.status))
    for _ in loop.steps(TRAIN, epochs=2, batch_size=8):
        if loop.state.step == 3:
            break
    assert calls == ["stopped"]
    assert (loop.state.step, loop.state.epoch, loop.state.batch_index) == (3, 0, 3)
    assert loop.objective.training
    loop.fit(TRAIN, epochs=1, batch_size=8)  # what is left of the epoch
    twin.fit(TRAIN, epochs=1, batch_size=8)
    assert_same(loop, twin)


def test_what_steps_cannot_do_is_said_at_once():
    with pytest.raises(ax.ConfigurationError, match="would never end"):
        noisy_loop().steps(TRAIN)


def test_steps_may_be_left_by_an_error_of_the_callers():
    loop = noisy_loop()

    def own():
        for _ in loop.steps(TRAIN, epochs=2, batch_size=8):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        own()
    gc.collect()  # the frame of the error held the steps
    assert loop.state.status == "stopped"
    assert loop.fit(TRAIN, epochs=1, batch_size=8).status == "completed"


def test_nothing_is_trained_before_the_first_step_is_asked_for():
    loop = noisy_loop()
    steps = loop.steps(TRAIN, epochs=1)
    assert loop.state.step == 0
    next(steps)
    assert loop.state.step == 1


def test_who_leaves_and_still_holds_the_steps_at_the_programs_end_has_saved(tmp_path):
    script = f"""
import torch
import axontrain as ax
torch.manual_seed(0)
objective, optimizer = ax.Supervised(torch.nn.Linear(4, 1), "mse"), ax.Optimizer("sgd", lr=0.1)
loop = ax.Loop(objective, optimizer, progress=False, directory={str(tmp_path)!r})
steps = loop.steps(ax.ArrayDataset(torch.randn(64, 4), torch.randn(64, 1)), epochs=1, batch_size=8)
for step in steps:
    if loop.state.step == 3:
        break
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000003"]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "one_cycle", "inverse_sqrt", "step"])
def test_a_loop_that_was_pickled_goes_on_as_the_other_does(schedule, fitted):
    made = getattr(ax.schedules, schedule)(warmup="10%", **({"at": ["50%"]} if schedule == "step" else {}))
    loop = noisy_loop(
        optimizer=ax.Optimizer("adamw", lr=0.01, schedule=made, average="ema"),
        metrics=["accuracy", "top2", "f1", "iou", "auroc", "perplexity"],
        callbacks=[ax.EarlyStopping("val/loss"), ax.LearningRate()],
    )
    if fitted:
        loop.fit(TRAIN, TEST, epochs=1, batch_size=8)
    sent = pickle.loads(pickle.dumps(loop))
    for one in (loop, sent):
        one.fit(TRAIN, TEST, epochs=2, batch_size=8)
    for a, b in zip(loop.objective.state_dict().values(), sent.objective.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert sent.state.values == loop.state.values
