"""Where a run that goes on could come to another end: what is in hand, what a hook has asked for, whose state it is."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import axontrain as ax

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
DATA = ax.ArrayDataset(X, X.sum(1, keepdim=True))


class Noisy(ax.Supervised):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 1)), "mse", metrics=["mae"])


def loop_of(directory=None, callbacks=(), objective=None, **options):
    optimizer = options.pop("optimizer", None) or ax.Optimizer("adam", lr=0.01)
    made = Noisy() if objective is None else objective
    return ax.Loop(made, optimizer, callbacks=list(callbacks), directory=directory, progress=False, **options)


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_same(one, other):
    for name, value in one.objective.state_dict().items():
        assert torch.equal(value, other.objective.state_dict()[name]), name
    assert one.state.history == other.state.history
    assert one.state.step == other.state.step


# --- what is in hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iterator", "stream"])
@pytest.mark.parametrize("when", [0, 3, 7])
def test_a_batch_that_was_read_when_ctrl_c_came_is_trained_on(kind, when):
    seen = []
    asked = [when]

    class Stream:
        def __init__(self):
            self.place = 0

        def __iter__(self):
            while self.place < 8:
                self.place += 1
                if asked and asked[0] == self.place - 1:
                    asked.clear()
                    interrupt()
                yield torch.full((2, 3), float(self.place - 1)), torch.zeros(2, 1)
            self.place = 0

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    data = Stream() if kind == "stream" else iter(Stream())
    loop = loop_of()
    loop.on("after_batch")(lambda state: seen.append(state.step))

    class Watching(Noisy):
        def split(self, batch):
            trained.append(int(batch[0][0, 0]))
            return super().split(batch)

    trained = []
    loop = loop_of(objective=Watching())
    assert loop.fit(data, epochs=1).status == "interrupted"
    assert loop.fit(data, epochs=1, resume=True).status == "completed"
    assert trained == list(range(8))


@pytest.mark.parametrize("what", ["DataLoader", "list", "function", "Loader"])
def test_the_same_data_made_anew_goes_on_within_its_epoch(what):
    def data():
        if what == "DataLoader":
            return DataLoader(TensorDataset(*DATA.tensors), 8)
        if what == "Loader":
            return ax.Loader(DATA, 8, sampler=ax.data.WeightedSampler(torch.ones(40)))
        batches = list(zip(*(part.split(8) for part in DATA.tensors), strict=True))
        return batches if what == "list" else lambda: iter(batches)

    whole, parted = loop_of(), loop_of()
    whole.fit(data(), epochs=3)
    parted.on("after_batch")(lambda state: interrupt() if state.step == 7 else None)
    assert parted.fit(data(), epochs=3).status == "interrupted"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what has no state: it is read up to there
        parted.fit(data(), epochs=3, resume=True)
    assert_same(whole, parted)


# --- what a hook has asked for ----------------------------------------------------------------------------------------


class Asking(ax.Callback):
    """Answers at one call of one hook, where Ctrl-C may come in too."""

    def __init__(self, hook, call, answer, interrupted):
        super().__init__()
        self.left, self.answer, self.interrupted = call, answer, interrupted
        setattr(self, hook, self.act)

    def act(self, state):
        self.left -= 1
        if self.left == 0:
            if self.interrupted:
                interrupt()
            return self.answer

    def state_dict(self):
        return {"left": self.left}

    def load_state_dict(self, state):
        self.left = state["left"]


@pytest.mark.parametrize("where", ["memory", "directory"])
@pytest.mark.parametrize("answer", [ax.Stop("enough"), ax.StopEpoch("enough"), None], ids=["Stop", "StopEpoch", "nothing"])
@pytest.mark.parametrize(
    ("hook", "call"),
    [("after_batch", 2), ("after_batch", 3), ("after_batch", 5), ("before_batch", 4), ("after_evaluate", 1), ("after_epoch", 1),
     ("before_evaluate", 1), ("before_epoch", 2), ("after_backward", 4)],
)  # fmt: skip
def test_what_a_hook_asks_for_in_an_interrupted_step_is_done(tmp_path, hook, call, answer, where):
    ends = []
    for number, interrupted in enumerate((False, True)):
        directory = tmp_path / str(number) if where == "directory" else None
        loop = loop_of(directory, [Asking(hook, call, answer, interrupted)])
        result = loop.fit(DATA, DATA, epochs=3, batch_size=8, validate=3)
        if interrupted:
            assert result.status == "interrupted"
            if where == "directory":
                loop = loop_of(directory, [Asking(hook, call, answer, interrupted)])
            result = loop.fit(DATA, DATA, epochs=3, batch_size=8, validate=3, resume=True)
        ends.append((loop, result.status, result.reason))
    assert ends[0][1:] == ends[1][1:]
    assert_same(ends[0][0], ends[1][0])


class StopAt(ax.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def after_batch(self, state):
        return ax.Stop("enough") if state.step == self.step else None


def test_a_run_that_a_callback_has_ended_stays_ended_when_its_script_is_started_again(tmp_path):
    results = []
    for _ in range(2):
        results.append(loop_of(tmp_path, [StopAt(8)]).fit(DATA, epochs=3, batch_size=8, resume=True))
    assert [(r.status, r.reason, r.step) for r in results] == [("stopped", "enough", 8)] * 2
    assert results[0].history == results[1].history
    assert results[0].values == results[1].values
    assert loop_of(tmp_path, [StopAt(None)]).fit(DATA, epochs=3, batch_size=8, resume=True).step == 15  # another callback


def test_hooks_with_a_cadence_are_not_called_again_for_the_same_epoch(tmp_path):
    calls = {"whole": [], "parted": []}
    for name in calls:
        for stop in (7, None) if name == "parted" else (None,):
            loop = loop_of(tmp_path / name, [StopAt(stop)])
            loop.on("before_epoch", first=2)(lambda state, name=name: calls[name].append(state.epoch))
            loop.fit(DATA, epochs=3, batch_size=8, resume=True)
    assert calls["parted"] == calls["whole"] == [0, 1]


# --- ends -------------------------------------------------------------------------------------------------------------


SWALLOWED = """
import signal, sys, os, torch, axontrain as ax
x = torch.randn(40, 3)
how, where = sys.argv[1:]
loop = ax.Loop(ax.Supervised(torch.nn.Linear(3, 1), "mse"), ax.Optimizer("sgd", lr=0.1), progress=False, directory=where)
data = ax.ArrayDataset(x, x.sum(1, keepdim=True))
if how == "after_fit":
    loop.on("after_fit")(lambda state: os.kill(os.getpid(), signal.SIGTERM))
    loop.fit(data, epochs=1, batch_size=8)
else:
    for step in loop.steps(data, epochs=1, batch_size=8):
        if loop.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            if how == "break":
                break
print("went on")
"""


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param("after_fit", 143, marks=pytest.mark.slow),
        pytest.param("break", -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("steps", 143, marks=pytest.mark.slow),
    ],
)
def test_sigterm_ends_the_program_wherever_it_comes(tmp_path, how, code):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, how, tmp_path], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{5 if how == 'after_fit' else 3:09d}"]


def test_a_loop_of_ones_own_that_is_left_has_saved(tmp_path):
    loop = loop_of(tmp_path)
    for _ in loop.steps(DATA, epochs=3, batch_size=8):
        if loop.state.step == 7:
            break
    again, whole = loop_of(tmp_path), loop_of()
    again.fit(DATA, epochs=3, batch_size=8, resume=True)
    whole.fit(DATA, epochs=3, batch_size=8)
    assert_same(whole, again)


@pytest.mark.parametrize("validate", ["1 epoch", 3])
def test_an_error_in_validation_loses_no_reading_of_training(tmp_path, validate):
    failing = []

    class Failing(Noisy):
        def eval_step(self, batch):
            if failing and failing.pop():
                raise ValueError("oops")
            return super().eval_step(batch)

    whole, loop = loop_of(tmp_path / "whole", objective=Failing()), loop_of(tmp_path / "parted", objective=Failing())
    whole.fit(DATA, DATA, epochs=2, batch_size=8, validate=validate)
    failing.append(True)
    with pytest.raises(ValueError, match="oops"):
        loop.fit(DATA, DATA, epochs=2, batch_size=8, validate=validate)
    loop.fit(DATA, DATA, epochs=2, batch_size=8, validate=validate, resume=True)
    assert_same(whole, loop)
    lines = [(tmp_path / name / "history.jsonl").read_text() for name in ("whole", "parted")]
    assert lines[0] == lines[1]


def test_going_on_from_memory_does_not_take_over_the_directory_of_another_run(tmp_path):
    loop_of(tmp_path / "first").fit(DATA, epochs=1, batch_size=8)
    before = sorted(path.name for path in (tmp_path / "first").iterdir())
    loop = loop_of(tmp_path / "first")
    other = loop_of()
    other.fit(DATA, epochs=2, batch_size=8)
    loop.restore(other.save())
    with pytest.raises(ax.ConfigurationError, match="holds another run"):
        loop.fit(DATA, epochs=3, batch_size=8, resume=True)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == before


# --- whose state it is, and what has changed --------------------------------------------------------------------------


def test_a_callback_does_not_get_the_state_of_one_that_watches_something_else(tmp_path):
    loop_of(tmp_path, [ax.EarlyStopping("val/loss", patience=2), StopAt(7)]).fit(DATA, DATA, epochs=3, batch_size=8)
    stopping = ax.EarlyStopping("val/mae", patience=2)
    loop = loop_of(tmp_path, [stopping])
    with pytest.warns(ax.AxonWarning, match=r"EarlyStopping\(val/mae\) is new.*EarlyStopping\(val/loss\) is no longer there"):
        loop.fit(DATA, DATA, epochs=3, batch_size=8, resume=True)
    assert stopping.best == min(loop.state.history["val/mae"][1:])


class Counting(ax.Callback):
    def __init__(self, unit=1):
        super().__init__()
        self.unit, self.count = unit, 0

    def after_batch(self, state):
        self.count += self.unit

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def warned(tmp_path, before, after, data=DATA, again=DATA, stop=7, **options):
    loop_of(tmp_path, before.get("callbacks", ()), **{k: v for k, v in before.items() if k != "callbacks"}).fit(
        data, steps=stop, **options
    )
    loop = loop_of(tmp_path, after.get("callbacks", ()), **{k: v for k, v in after.items() if k != "callbacks"})
    with pytest.warns(ax.AxonWarning) as found:
        loop.fit(again, steps=10, resume=True, **options)
    (told,) = [str(one.message) for one in found]
    assert found[0].filename == __file__
    return told


def test_callbacks_that_have_changed_places_are_named(tmp_path):
    told = warned(
        tmp_path, {"callbacks": [Counting(1), Counting(100)]}, {"callbacks": [Counting(100), Counting(1)]}, batch_size=8
    )
    assert "Counting, argument 0: it was 1, and is 100; Counting#2, argument 0: it was 100, and is 1" in told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, ax.schedules.cosine(), "the schedule of the optimizer 'main': this Loop's is used"),
        (ax.schedules.cosine(), lambda progress: 1 - progress, "the schedule of the optimizer 'main': this Loop's is used"),
        (ax.schedules.cosine(), None, "the schedule of the optimizer 'main': there is none, and the rate stays where it was"),
    ],
)
def test_another_schedule_is_named_with_what_comes_of_it(tmp_path, before, after, told):
    made = [{"optimizer": ax.Optimizer("adam", lr=0.01, schedule=one)} for one in (before, after)]
    assert told in warned(tmp_path, *made, batch_size=8)


def test_a_metric_that_is_another_under_the_same_name_is_named(tmp_path):
    def one(predictions, targets):
        return predictions.mean()

    def other(predictions, targets):
        return targets.mean()

    told = warned(tmp_path, {"metrics": {"m": one}}, {"metrics": {"m": other}}, batch_size=8)
    assert "the metric m: it was " in told
    assert "other" in told


def test_frozen_parameters_and_another_cadence_of_validation_are_named(tmp_path):
    frozen = Noisy()
    frozen.model[0].bias.requires_grad_(False)
    loop_of(tmp_path).fit(DATA, DATA, steps=5, batch_size=8, validate="1 epoch")
    with pytest.warns(ax.AxonWarning, match="model.0.bias: frozen"):
        loop_of(tmp_path, objective=frozen).fit(DATA, DATA, steps=7, batch_size=8, resume=True)
    with pytest.warns(ax.AxonWarning, match='validate: it was "Every'):
        loop_of(tmp_path).fit(DATA, DATA, steps=9, batch_size=8, validate=2, resume=True)


def test_an_object_of_the_users_that_is_not_attached_any_more_is_named(tmp_path):
    loop = loop_of(tmp_path)
    loop.state.attach("mine", Counting())
    loop.fit(DATA, steps=7, batch_size=8)
    with pytest.warns(ax.AxonWarning, match="mine is not attached any more"):
        loop_of(tmp_path).fit(DATA, steps=9, batch_size=8, resume=True)


def test_another_list_of_batches_is_refused_within_an_epoch(tmp_path):
    batches = list(zip(*(part.split(8) for part in DATA.tensors), strict=True))
    loop_of(tmp_path).fit(batches, steps=7)
    with pytest.raises(ax.CheckpointError, match="number of batches: it was 5, and is 4"):
        loop_of(tmp_path).fit(batches[:4], epochs=3, resume=True)


def test_other_weights_of_a_sampler_are_refused_within_an_epoch(tmp_path):
    def loader(weights):
        return ax.Loader(DATA, 8, sampler=ax.data.WeightedSampler(weights))

    loop_of(tmp_path).fit(loader(torch.ones(40)), steps=7)
    with pytest.raises(ax.CheckpointError, match="sampler: it was 'WeightedSampler"):
        loop_of(tmp_path).fit(loader(torch.arange(40.0)), epochs=3, resume=True)


def test_a_state_that_does_not_fit_names_the_checkpoint_and_the_ways_out(tmp_path):
    loop_of(tmp_path).fit(DATA, steps=7, batch_size=8)
    sgd = loop_of(tmp_path, optimizer=ax.Optimizer("sgd", lr=0.1))
    with pytest.raises(ax.CheckpointError, match=r"step-000000007.*made of.*another directory=.*only='objective'"):
        sgd.fit(DATA, steps=9, batch_size=8, resume=True)


class Half(ax.Callback):
    def state_dict(self):
        return {}


def test_half_a_state_is_refused():
    with pytest.raises(ax.ConfigurationError, match="both"):
        loop_of(callbacks=[Half()])


@pytest.mark.parametrize("nonsense", [None, 3, [], torch.zeros(2)])
def test_nonsense_is_no_checkpoint(nonsense):
    with pytest.raises(ax.ConfigurationError):
        loop_of().restore(nonsense)


def test_nonsense_is_no_directory():
    with pytest.raises(ax.ConfigurationError, match="directory=3"):
        loop_of(directory=3)


@pytest.mark.parametrize(
    "schedule",
    [None, ax.schedules.linear(), lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)],
    ids=["none", "progress", "torch"],
)
def test_a_run_goes_on_with_another_rate_where_that_is_said(tmp_path, schedule):
    def optimizer(lr, decay=0.0):
        groups = {"*.bias": {"lr": lr / 10}}
        return ax.Optimizer("sgd", lr=lr, weight_decay=decay, groups=groups, schedule=schedule)

    rates = []
    for lr in (0.1, 0.2):
        where = tmp_path / str(lr)
        loop_of(where, optimizer=optimizer(0.1), callbacks=[StopAt(4)]).fit(DATA, steps=10, batch_size=8)
        loop = loop_of(where, optimizer=optimizer(lr, lr))
        loop.restore(where)
        loop.state.optimizers["main"].set(lr=lr, weight_decay=lr)
        loop.fit(DATA, steps=10, batch_size=8, resume=True)
        groups = loop.state.optimizers["main"].optimizers[0].param_groups
        assert [group["weight_decay"] for group in groups] == [lr, lr]
        rates.append([group["lr"] for group in groups])
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])
    assert rates[0][0] == pytest.approx(10 * rates[0][1])
    with pytest.raises(ax.UnknownNameError, match="weight_dekay"):
        loop.state.optimizers["main"].set(weight_dekay=1)


def test_the_best_checkpoint_can_be_found_and_its_weights_be_taken(tmp_path):
    saving = ax.Checkpoint(best="val/loss", keep_last=1)
    assert saving.best_path is None
    loop = loop_of(tmp_path, [saving], optimizer=ax.Optimizer("sgd", lr=0.05))
    loop.fit(DATA, DATA, epochs=6, batch_size=8)
    best = loop.state.history.best("val/loss")
    assert saving.best_path.name.startswith(f"step-{best['step']:09d}-val_loss-")
    model = Noisy()
    ax.load_weights(model, saving.best_path)
    again = loop_of(objective=model)
    assert again.evaluate(DATA, batch_size=8)["loss"] == best["val/loss"]


# --- killed between the save of the last step and that of the fit's end ------------------------------------------------


class Ends(ax.Callback):
    """Ends the run, or the epoch, from one hook at one step; it has no state to say so by."""

    def __init__(self, hook, step, answer):
        super().__init__()
        setattr(self, hook, lambda state: answer if state.step == step else None)


@pytest.mark.parametrize(
    ("hook", "step", "answer"),
    [
        ("after_batch", 7, ax.Stop("enough")),
        ("after_batch", 7, ax.StopEpoch("on")),
        ("after_epoch", 10, ax.Stop("enough")),
        ("after_epoch", 5, ax.StopEpoch("on")),
        ("after_evaluate", 6, ax.Stop("enough")),
    ],
    ids=str,
)
def test_what_was_asked_for_at_a_step_that_was_saved_is_done(tmp_path, monkeypatch, hook, step, answer):
    fit = {"epochs": 3, "batch_size": 8, "validate": "3 steps"}

    def made(directory):
        return loop_of(directory, [Ends(hook, step, answer), ax.Checkpoint(every=1, keep_last=None)])

    whole = made(tmp_path / "whole")
    ended = whole.fit(DATA, DATA, **fit)
    with monkeypatch.context() as patch:
        patch.setattr(ax.Checkpoint, "at_fit_end", lambda self, state: None)
        made(tmp_path / "run").fit(DATA, DATA, **fit)
    again = made(tmp_path / "run")
    result = again.fit(DATA, DATA, **fit, resume=True)
    assert (result.status, result.reason) == (ended.status, ended.reason)
    assert_same(whole, again)


@pytest.mark.parametrize(("answer", "status"), [(ax.Stop("enough"), "stopped"), (ax.StopEpoch("on"), "completed")], ids=str)
def test_who_saves_by_hand_after_a_stop_was_asked_for_saves_that_too(answer, status):
    saved = []
    whole = loop_of(callbacks=[Ends("after_batch", 7, answer)])
    whole.on("after_batch")(lambda state: saved.append(whole.save()) if state.step == 7 else None)
    whole.fit(DATA, epochs=3, batch_size=8)
    again = loop_of(callbacks=[Ends("after_batch", 7, answer)])
    again.restore(saved[0])
    result = again.fit(DATA, epochs=3, batch_size=8, resume=True)
    assert result.status == status
    assert_same(whole, again)


@pytest.mark.parametrize("steps", [6, 7, 9, 10])
def test_the_reading_of_a_part_of_an_epoch_is_made_by_the_next_start(tmp_path, monkeypatch, steps):
    fit = {"steps": steps, "batch_size": 8}

    def made(directory):
        return loop_of(directory, [ax.Checkpoint(every=1, keep_last=None)])

    whole = made(tmp_path / "whole")
    ended = whole.fit(DATA, **fit)
    with monkeypatch.context() as patch:
        patch.setattr(ax.Checkpoint, "at_fit_end", lambda self, state: None)
        made(tmp_path / "run").fit(DATA, **fit)
    for _ in range(2):  # what is finished gives the same once more
        again = made(tmp_path / "run")
        result = again.fit(DATA, **fit, resume=True)
        assert result.values == ended.values
        assert_same(whole, again)
