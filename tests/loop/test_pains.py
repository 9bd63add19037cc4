"""What hurt the users of other training loops; each test names the thread (of Lightning, unless another is named)."""

import inspect
import io
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import axontrain as ax
from axontrain.callback import HOOKS, Hooks
from axontrain.execution import run as execution


def table(n=22, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 1


def dataset(n=22, seed=0):
    return ax.ArrayDataset(*table(n, seed))


def line_loop(lr=0.05, **options):
    torch.manual_seed(0)
    return ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=lr), **{"progress": False, **options})


# --- overhead ---------------------------------------------------------------------------------------------------------


def test_from_fit_to_backward_there_are_three_frames(monkeypatch):
    """#6196, #8857: overhead on small models."""
    counts, backward = [], torch.Tensor.backward

    def spy(self, *args, **kwargs):
        files = [Path(frame.filename).parent for frame in inspect.stack(0)]
        counts.append(sum("axontrain" in file.parts[-2:] for file in files))
        return backward(self, *args, **kwargs)

    loop = line_loop()
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    loop.fit(dataset(), dataset(), steps=3)
    assert len(counts) == 3
    assert max(counts) <= 3


def test_hooks_that_nobody_overrides_are_none():
    """#6196: hooks that do nothing were called at every batch."""

    class AfterEpoch(ax.Callback):
        def after_epoch(self, state): ...

    hooks = Hooks([AfterEpoch()], line_loop().state)
    assert [name for name in HOOKS if getattr(hooks, name) is not None] == ["after_epoch"]


def test_neither_the_loop_nor_its_bar_reads_the_device_between_readings(monkeypatch):
    """#13179, #13937, #21232: the progress bar read the GPU at every step, even while off."""

    class HostReads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(execution, "READ_EVERY_SECONDS", math.inf)  # a slow machine would else come to a reading
    monkeypatch.setattr("axontrain.callbacks.progress.REDRAW_SECONDS", 0.0)
    stream = io.StringIO()
    loop = line_loop(callbacks=[ax.ProgressBar("terminal", stream=stream)])
    counts = []

    with HostReads() as reads:

        @loop.on("after_batch")
        def count(state):
            counts.append(reads.count)

        loop.fit(dataset(), steps=5)
        torch.ones(1).item()  # the instrument works
        assert reads.count > counts[-1]
    assert counts == [0] * 5
    assert "train/loss" in stream.getvalue()


def test_the_package_imports_no_library_that_only_some_runs_need(imported):
    """#12786, #16090: 3,597 modules were imported before anything was done."""
    assert not {"torchmetrics", "matplotlib", "IPython", "pandas"}.intersection(imported["all"])


# --- readings ---------------------------------------------------------------------------------------------------------


def test_means_are_weighted_by_items_over_a_ragged_last_batch():
    """#11715, #10349; Axon: running averages ignored the batch size."""
    loop, x, y = line_loop(lr=0.0, metrics=["mae"]), *table(22)
    result = loop.fit(dataset(22), dataset(22), epochs=1, batch_size=8)  # 8, 8 and 6
    with torch.no_grad():
        error = loop.objective(x) - y
    for part in ("train", "val"):
        assert result.values[f"{part}/loss"] == pytest.approx(error.square().mean().item(), rel=1e-6)
        assert result.values[f"{part}/mae"] == pytest.approx(error.abs().mean().item(), rel=1e-6)


def test_the_loss_is_that_of_the_step_and_not_of_the_step_before():
    """Axon: the running loss lagged a step, and its first print was 0.0."""
    batches = list(zip(*(part.split(8) for part in table(24)), strict=True))
    loop, weights, losses = line_loop(), [], []

    @loop.on("before_batch")
    def before(state):
        weights.append({k: v.detach().clone() for k, v in state.objective.model.state_dict().items()})

    @loop.on("after_batch")
    def after(state):
        losses.append(state.last.loss.clone())
        assert not state.last.loss.requires_grad

    loop.fit(batches, epochs=2)
    for (x, y), of, loss in zip(batches * 2, weights, losses, strict=True):
        assert torch.equal(F.mse_loss(F.linear(x, of["weight"], of["bias"]), y), loss)


def test_what_is_ranked_named_and_saved_is_of_one_step():
    """#17417, #20185: checkpoints were named and ranked with the previous validation's metric."""
    train, test, seen = dataset(), dataset(10, seed=1), []
    loop = line_loop()

    @loop.on("after_epoch")
    def look(state):
        row = state.history.rows[-1]
        x, y = test.tensors
        with torch.no_grad():
            by_hand = F.mse_loss(state.objective(x), y).item()
        assert row["val/loss"] == state.values["val/loss"] == pytest.approx(by_hand, rel=1e-6)
        assert (row["step"], row["epoch"]) == (state.step, state.epoch)
        seen.append((state.epoch, state.step))

    loop.fit(train, test, epochs=3, batch_size=8)
    assert seen == [(1, 3), (2, 6), (3, 9)]


def test_a_stopped_run_keeps_its_readings():
    """Axon: the metrics of a halted run were overwritten with zeros."""
    loop, losses = line_loop(), []

    @loop.on("after_batch")
    def stop(state):
        losses.append((state.last.loss.item(), len(state.last.targets)))
        return ax.Stop("seen enough") if state.step == 5 else None

    result = loop.fit(dataset(), dataset(10, seed=1), epochs=9, batch_size=8)  # epochs of 8, 8 and 6
    assert (result.status, result.reason, result.ok) == ("stopped", "seen enough", True)
    assert result.values["train/loss"] == pytest.approx(sum(loss * n for loss, n in losses[3:]) / 16, rel=1e-6)
    assert result.values["val/loss"] == result.history["val/loss"][0] > 0  # of the epoch that was completed
    assert result.history.rows[-1]["step"] == loop.state.step == 5


def test_a_stopped_epoch_counts_with_the_readings_so_far_and_clean_counters():
    """Axon: :halt_epoch left the epoch and the metrics stale."""
    loop, losses, seen = line_loop(), [], []

    @loop.on("after_batch")
    def stop(state):
        losses.append(state.last.loss.item())
        return ax.StopEpoch("this epoch is enough") if state.batch_index == 2 else None

    @loop.on("after_epoch")
    def look(state):
        seen.append((state.epoch, state.step, state.batch_index))

    result = loop.fit(dataset(24), dataset(8), epochs=3, batch_size=4)
    assert result.status == "completed"
    assert seen == [(1, 2, 0), (2, 4, 0), (3, 6, 0)]
    assert result.history["train/loss"] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)])
    assert len(result.history["val/loss"]) == 3
    assert [row["step"] for row in result.history] == [2, 4, 6]


# --- counting ---------------------------------------------------------------------------------------------------------


class Two(ax.Objective):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def train_step(self, batch):
        x, y = batch
        yield "a", F.mse_loss(self.a(x), y)
        yield "b", F.l1_loss(self.b(x), y)


def test_the_step_counts_batches_and_not_optimizers():
    """#17958: global_step counted every optimizer's update: 3 batches gave 6."""
    loop = ax.Loop(Two(), {"a": ax.Optimizer("sgd", lr=0.1), "b": ax.Optimizer("adam", lr=0.1)}, progress=False)
    after = []
    loop.on("after_batch", every=3)(lambda state: after.append(state.step))
    loop.fit(dataset(24), epochs=2, batch_size=4)
    assert loop.state.step == 12
    assert after == [3, 6, 9, 12]


def test_several_optimizers_lose_neither_clipping_nor_schedules():
    """#17801, #7698: several optimizers forced a manual mode without either."""
    torch.manual_seed(0)
    options = {"lr": 1.0, "clip_norm": 1e-2, "schedule": ax.schedules.linear()}
    loop = ax.Loop(Two(), {name: ax.Optimizer("sgd", **options) for name in "ab"}, progress=False)
    moves = []
    weights = {name: getattr(loop.objective, name) for name in "ab"}

    def flat(module):
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    before = {name: flat(module) for name, module in weights.items()}

    @loop.on("after_batch")
    def measure(state):
        moves.append({name: (flat(module) - before[name]).norm().item() for name, module in weights.items()})
        before.update({name: flat(module) for name, module in weights.items()})

    loop.fit(dataset(24), steps=4, batch_size=6)
    for name in "ab":
        assert [move[name] for move in moves] == pytest.approx([1e-2 * (1 - k / 4) for k in range(4)], rel=1e-2)


def test_a_second_fit_trains_that_much_more():
    """#12789, #11425: a second fit trained nothing."""
    loop = line_loop()
    first = loop.fit(dataset(24), epochs=2, batch_size=8)
    loss = first.values["train/loss"]
    second = loop.fit(dataset(24), epochs=3, batch_size=8)
    assert (loop.state.epoch, loop.state.step) == (5, 15)
    assert second.values["train/loss"] < loss
    assert [row["epoch"] for row in second.history] == [1, 2, 3, 4, 5]


def seen_by(loop):
    """The first column of every batch that is trained on."""
    seen = []
    loop.on("after_batch")(lambda state: seen.append(state.last.targets[:, 0].long().tolist()))
    return seen


def numbered(n=20):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), torch.arange(float(n))[:, None]


def test_a_second_fit_goes_on_with_the_samples_of_the_epoch_not_yet_seen():
    """#19764, #18780: a run taken up within an epoch saw 5 of 12 samples again."""
    loop = line_loop(lr=1e-4)
    seen = seen_by(loop)
    data = ax.ArrayDataset(*numbered(20))
    loop.fit(data, steps=3, batch_size=4)
    assert (loop.state.epoch, loop.state.batch_index) == (0, 3)
    loop.fit(data, epochs=1, batch_size=4)  # finishing the epoch counts as one
    assert (loop.state.epoch, loop.state.batch_index) == (1, 0)
    assert list(chain(*seen)) == ax.order(0, 0, 20).tolist()
    seen.clear()
    loop.fit(data, epochs=1, batch_size=4)
    assert list(chain(*seen)) == ax.order(0, 1, 20).tolist()


def list_of_batches():
    return list(zip(*(part.split(4) for part in numbered(20)), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ax.Loader(ax.ArrayDataset(*numbered(20)), 4),
        lambda: ax.Loader(TensorDataset(*numbered(20)), 4),
        list_of_batches,
        lambda: DataLoader(TensorDataset(*numbered(20)), batch_size=4, shuffle=False),
        lambda: iter(list_of_batches()),
    ],
    ids=["Loader of arrays", "Loader of a torch dataset", "list", "DataLoader", "iterator"],
)
def test_any_data_go_on_where_the_first_fit_has_left_them(make):
    """#19764: the same for data that bring their own batches."""
    loop, data = line_loop(lr=1e-4), make()
    seen = seen_by(loop)
    loop.fit(data, steps=2)
    loop.fit(data, steps=1)
    loop.fit(data, epochs=1)
    assert seen == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert (loop.state.epoch, loop.state.step) == (1, 5)


def test_the_reading_of_an_epoch_in_two_fits_is_over_the_whole_epoch():
    """#19764: what was recorded before the break belongs to the epoch as well."""
    loop, x, y = line_loop(lr=0.0), *table(22)
    loop.fit(dataset(22), steps=1, batch_size=8)
    result = loop.fit(dataset(22), epochs=1, batch_size=8)
    assert result.values["train/loss"] == pytest.approx(F.mse_loss(loop.objective(x), y).item(), rel=1e-6)


def test_other_data_begin_an_epoch_of_their_own_with_readings_of_their_own():
    """Axon: stale metrics. Nothing of the data that were left in mid-epoch stays in the mean."""
    loop = line_loop(lr=0.0)
    loop.fit(dataset(22), steps=1, batch_size=8)
    x, y = table(10, seed=1)
    result = loop.fit(dataset(10, seed=1), epochs=1, batch_size=8)
    assert result.values["train/loss"] == pytest.approx(F.mse_loss(loop.objective(x), y).item(), rel=1e-6)


def test_a_state_saved_at_an_epochs_end_does_not_repeat_the_epoch(tmp_path):
    """Axon: a checkpoint taken at an epoch's end repeated that epoch on resume."""
    data, loop = ax.ArrayDataset(*numbered(20)), line_loop(lr=1e-4)
    loop.on("after_epoch")(lambda state: loop.save(tmp_path / f"epoch-{state.epoch}") and None)
    loop.fit(data, epochs=2, batch_size=4)
    other = line_loop(lr=1e-4)
    seen = seen_by(other)
    other.restore(tmp_path / "epoch-1")
    result = other.fit(data, epochs=2, batch_size=4)
    assert list(chain(*seen)) == ax.order(0, 1, 20).tolist() + ax.order(0, 2, 20).tolist()
    assert result.history["train/loss"][:2] == loop.state.history["train/loss"]
    assert [row["epoch"] for row in result.history] == [1, 2, 3]


# --- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_has_a_unit():
    """#12205, #20468: val_check_interval counted batches, and 1 meant other than 1.0."""
    with pytest.raises(ax.ConfigurationError, match=r"1\.0.*steps"):
        line_loop().fit(dataset(), dataset(), epochs=1, validate=1.0)
    for validate, steps in ((1, [1, 2, 3, 4, 5, 6]), ("1 epoch", [3, 6]), ("1 step", [1, 2, 3, 4, 5, 6])):
        loop = line_loop()
        loop.fit(dataset(22), dataset(5), epochs=2, batch_size=8, validate=validate)
        assert [row["step"] for row in loop.state.history if "val/loss" in row] == steps


# --- data -------------------------------------------------------------------------------------------------------------


def test_loaders_and_samplers_are_not_rewritten():
    """#1995, #20272, #17793: loaders were rebuilt, samplers replaced, their attributes lost."""
    loader = DataLoader(TensorDataset(*table(24)), batch_size=4, shuffle=True, drop_last=True)
    own = ax.Loader(dataset(24), 4, shuffle=True)
    before = dict(vars(loader)), dict(vars(own))
    line_loop().fit(loader, own, epochs=2)
    line_loop().fit(own, loader, epochs=2, limit=2)
    assert {k: id(v) for k, v in vars(loader).items() if k != "_iterator"} == {
        k: id(v) for k, v in before[0].items() if k != "_iterator"
    }
    assert vars(own) == before[1]


def test_an_empty_loader_is_an_error():
    """Seen: an empty loader trained nothing, in silence."""
    too_few = ax.Loader(dataset(3), 4, drop_last=True), DataLoader(TensorDataset(*table(3)), 4, drop_last=True)
    for empty in ([], iter([]), *too_few):
        with pytest.raises(ax.EmptyDataError, match="train gave no batch"):
            line_loop().fit(empty, epochs=1)
        with pytest.raises(ax.EmptyDataError):
            line_loop().evaluate(empty)
        with pytest.raises(ax.EmptyDataError):
            line_loop().predict(empty)


def test_an_empty_validation_loader_is_an_error():
    """Seen: an empty loader is passed over in silence."""
    with pytest.raises(ax.EmptyDataError, match="validation gave no batch"):
        line_loop().fit(dataset(), [], epochs=1)


def test_a_nan_loss_does_not_step_on():
    """Seen, and Axon: non-finite gradients still updated the weights."""
    batches = list_of_batches()
    batches[2] = (batches[2][0] * math.nan, batches[2][1])
    loop = line_loop(lr=1e-3)
    weights = []
    loop.on("after_batch")(lambda state: weights.append(state.objective.model.weight.detach().clone()))
    with pytest.warns(ax.NonFiniteWarning, match="step 3"):
        result = loop.fit(batches, epochs=1)
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert math.isfinite(result.values["train/loss"])
    assert loop.state.optimizers["main"].skipped == 1


def test_predictions_may_be_had_batch_by_batch():
    """#6508, #19398: predict held everything in memory."""
    reads = []

    def batches():
        for x in table(20)[0].split(4):
            reads.append(len(x))
            yield x

    predictions = line_loop().predict(batches(), stream=True)
    assert reads == []
    next(predictions)
    assert reads == [4]
    assert sum(len(part) for part in predictions) == 16
    assert len(reads) == 5


def test_checkpoints_are_named_by_their_step_and_none_replaces_another(tmp_path):
    """#10506, #20397: names without the metric's step, `-v1` collisions."""
    loop = line_loop(directory=tmp_path)
    loop.fit(dataset(24), epochs=1, batch_size=8)
    loop.fit(dataset(24), epochs=1, batch_size=8)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000000003", "step-000000006"]


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    """Lightning writes lightning_logs/ wherever it runs."""
    monkeypatch.chdir(tmp_path)
    line_loop().fit(dataset(), dataset(), epochs=1)
    assert list(tmp_path.iterdir()) == []


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_two_early_stoppings_on_one_reading_count_apart():
    """Axon: two early_stop handlers on one name shared a counter."""
    hasty, patient = ax.EarlyStopping("val/loss", patience=2), ax.EarlyStopping("val/loss", patience=3)
    loop = line_loop(lr=0.0, callbacks=[hasty, patient])
    result = loop.fit(dataset(), dataset(), epochs=10)
    assert (hasty.waited, patient.waited) == (2, 2)  # with a shared counter the run had ended sooner
    assert (result.status, loop.state.epoch) == ("stopped", 3)


def test_unknown_options_are_errors():
    """axon #504: unknown options were ignored in silence."""
    with pytest.raises(ax.UnknownOptionError, match="did you mean 'epochs'"):
        line_loop().fit(dataset(), epoch=3)
    with pytest.raises(ax.UnknownOptionError, match="did you mean 'callbacks'"):
        ax.Loop(ax.Supervised(nn.Linear(3, 1), "mse"), callback=[])
    with pytest.raises(TypeError, match="patince"):
        ax.EarlyStopping("val/loss", patince=3)
    with pytest.raises(TypeError, match="shufle"):
        ax.Loader(dataset(), 4, shufle=True)


def test_gradients_are_to_be_seen_by_callbacks():
    """axon #577, #661: gradients visible to metrics and handlers."""
    loop, norms = line_loop(), []
    x, y = table(8)

    @loop.on("after_backward")
    def look(state):
        norms.append(state.objective.model.weight.grad.clone())

    weight = loop.objective.model.weight.detach().clone().requires_grad_()
    bias = loop.objective.model.bias.detach().clone()
    F.mse_loss(F.linear(x, weight, bias), y).backward()
    loop.fit([(x, y)], steps=1)
    assert torch.equal(norms[0], weight.grad)


def test_objectives_need_not_compare_with_targets():
    """axon #595, #669: objectives that are not loss(y, ŷ): here the distance to a fixed point."""

    class Point(ax.Objective):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.zeros(2))

        def train_step(self, goals):
            return ax.Step((self.at - goals).square().sum(1).mean(), weight=len(goals))

    goals = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loop = ax.Loop(Point(), ax.Optimizer("sgd", lr=0.2), progress=False)
    loop.fit([goals], steps=40)
    assert torch.allclose(loop.objective.at, torch.tensor([2.0, 3.0]), atol=1e-4)


def test_data_are_not_consumed_by_peeking():
    """axon #655: looking at the first batch took it away."""
    loop, batches = line_loop(lr=1e-4), list_of_batches()
    seen = seen_by(loop)
    loop.fit(iter(batches), epochs=1)
    assert seen == [batch[1][:, 0].long().tolist() for batch in batches]


def test_iteration_instead_of_handlers():
    """axon #461, #655: a loop of one's own over the same steps."""
    loop = line_loop()
    losses = [step.loss.item() for step in loop.steps(dataset(24), epochs=2, batch_size=8)]
    twin, seen = line_loop(), []
    twin.on("after_batch")(lambda state: seen.append(state.last.loss.item()))
    twin.fit(dataset(24), epochs=2, batch_size=8)
    assert losses == seen


def test_a_callback_can_see_the_loss_and_stop():
    """trax #1340: its callbacks could do neither."""
    loop = line_loop(lr=0.1)
    loop.on("after_batch")(lambda state: ax.Stop("low enough") if state.last.loss < 0.5 else None)
    result = loop.fit(dataset(), epochs=100, batch_size=8)
    assert result.status == "stopped"
    assert loop.state.last.loss.item() < 0.5
