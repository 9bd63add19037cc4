"""compile=True: the same training by one graph, by parts where that cannot be, in eager where nothing can; never a crash."""

import copy
import functools
import gc
import itertools
import warnings
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from resume_runs import flat
from torch import nn
from unchanged import everything, same

import axontrain as ax
from axontrain.checkpoint.encode import decode, encode
from axontrain.execution import twin
from axontrain.execution.compilation import Compilation
from axontrain.execution.precision import Precision
from axontrain.execution.whole_step import WholeStep


def table(samples=160, seed=0, width=8):
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(seed))
    return ax.ArrayDataset(x, (x[:, 0] > 0).long())


class Net(ax.Objective):
    """A linear classifier: the quickest to compile."""

    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 2)
        self.scale = 1.0

    def predict(self, inputs):
        return self.net(inputs)

    def loss(self, logits, labels):
        return self.scale * F.cross_entropy(logits, labels)


class Deep(Net):
    """All that a step changes: parameters, BatchNorm's buffers, one that is replaced, random numbers; and named terms."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.register_buffer("mean", torch.zeros(8))

    def predict(self, inputs):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return self.net(inputs - self.mean)

    def loss(self, logits, labels):
        return {"ce": F.cross_entropy(logits, labels), "l2": 1e-3 * self.net[0].weight.square().sum()}


def made(objective=Net, optimizer=None, compile=True, **options):
    torch.manual_seed(0)
    optimizer = optimizer or ax.Optimizer("sgd", lr=0.1, momentum=0.9)
    return ax.Loop(objective(), optimizer, compile=compile, progress=False, **options)


def both(objective=Net, optimizer=None, data=None, *, fit=None, **options):
    """The same run in eager and compiled: the two loops."""
    loops = []
    for compile in (False, True):
        loop = made(objective, optimizer, compile, **{k: v() if k == "callbacks" else v for k, v in options.items()})
        loop.fit(data or table(), **{"epochs": 3, "batch_size": 16, **(fit or {})})
        loops.append(loop)
    return loops


def alike(eager, compiled, atol=1e-5):
    for (name, a), b in zip(eager.objective.state_dict().items(), compiled.objective.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for row, other in zip(eager.state.history.rows, compiled.state.history.rows, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"time", "elapsed", "seconds"}:
            if isinstance(row[key], float) and "loss" in key:
                assert other[key] == pytest.approx(row[key], rel=1e-4), key


OPTIMIZERS = {
    "sgd": ax.Optimizer("sgd", lr=0.1, schedule=ax.schedules.cosine(warmup="20%")),
    "nesterov": ax.Optimizer("sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, clip_value=0.05),
    "maximize": ax.Optimizer("sgd", lr=1e-3, maximize=True),
    "adamw": ax.Optimizer("adamw", lr=1e-2, clip_norm=0.1, no_decay=True, average="ema"),
    "adam": ax.Optimizer("adam", lr=1e-2, amsgrad=True, groups={"*.bias": {"lr": 1e-3, "betas": (0.8, 0.99)}}),
    "step": ax.Optimizer("sgd", lr=0.1, schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_whole_run_is_one_graph_and_the_same_training(name):
    eager, compiled = both(Deep, OPTIMIZERS[name])

    alike(eager, compiled, atol=2e-3 if "adam" in name else 1e-5)  # Adam makes much of a rounding error
    report = compiled.report()
    assert (report.how, report.graphs, report.recompilations, report.compared) == ("one graph", 1, 0, 3)
    assert eager.report().how == "eager"
    for a, b in zip(eager.state.optimizers.values(), compiled.state.optimizers.values(), strict=True):
        assert a.steps == b.steps == 30
        assert a.lr == b.lr
        for of_a, of_b in zip(a.optimizers[0].state.values(), b.optimizers[0].state.values(), strict=True):
            assert of_a.keys() == of_b.keys() or {k for k, v in of_a.items() if v is not None} == of_b.keys()


def test_the_miscompiled_is_found_and_named():
    class Miscompiled(Net):  # torch 2.13's CPU code drops alpha
        def predict(self, inputs):
            return torch.add(self.net.bias, inputs @ self.net.weight.T, alpha=0.1)

    with pytest.warns(
        ax.AxonWarning, match=r"differs from eager beyond rounding: the loss by .* Steps are done in eager"
    ) as told:
        eager, compiled = both(Miscompiled, fit={"epochs": 1})

    assert len(told) == 1
    for (name, a), b in zip(eager.objective.state_dict().items(), compiled.objective.state_dict().values(), strict=True):
        assert torch.equal(a, b), name  # the first step, too, is eager's
    assert compiled.report().how == "eager"
    assert compiled.report().compared == 0
    assert "the update of net.weight" in compiled.report().reason


def test_what_breaks_the_graph_is_told_by_its_line_and_compiled_in_parts():
    class Branches(Net):
        def predict(self, inputs):
            logits = self.net(inputs)
            if logits.sum() > 0:  # a host read
                logits = 2 * logits
            return logits

    with pytest.warns(ax.AxonWarning, match="cannot become one graph") as told:
        eager, compiled = both(Branches, fit={"epochs": 1})

    assert len(told) == 1
    text = str(told[0].message)
    assert "test_compile.py:" in text
    assert "if logits.sum() > 0" in text
    assert "ata-dependent" in text
    alike(eager, compiled)
    assert compiled.report().how == "in parts"
    assert compiled.report().compared >= 3


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_left_out_of_a_graph_too():
    class Poisoned(ax.Callback):
        def before_batch(self, state):
            if state.step == 5:
                state.objective.poison.fill_(float("nan"))
            elif state.step == 6:
                state.objective.poison.zero_()

    class Net2(Deep):
        def __init__(self):
            super().__init__()
            self.register_buffer("poison", torch.zeros(()))

        def loss(self, logits, labels):
            return F.cross_entropy(logits, labels) + self.poison

    seen = []

    class Keeps(ax.Callback):
        def after_batch(self, state):
            update = state.optimizers["main"]
            states = [v.clone() for of_p in update.optimizers[0].state.values() for v in of_p.values()]
            buffers = [b.clone() for name, b in state.objective.named_buffers() if name != "poison"]
            seen.append(([p.detach().clone() for p in state.objective.parameters()], states, buffers))

    loop = made(Net2, ax.Optimizer("adamw", lr=0.1), callbacks=[Poisoned(), Keeps()])
    with pytest.warns(ax.NonFiniteWarning, match="step 6: loss nan"):
        loop.fit(table(), epochs=1, batch_size=16)

    assert loop.report().how == "one graph"
    for before, after in zip(seen[4], seen[5], strict=True):
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(seen[5][0][0], seen[6][0][0])
    assert loop.state.optimizers["main"].skipped == 1
    assert loop.state.values["train/loss"] == loop.state.values["train/loss"]


@pytest.mark.slow
def test_raise_raises_and_has_changed_nothing():
    x = torch.randn(64, 8)
    x[40] = float("nan")
    loop = made(Net, ax.Optimizer("sgd", lr=0.1, on_nonfinite="raise"))
    before = {}

    @loop.on("before_batch")
    def keep(state):
        before["weights"] = state.objective.net.weight.detach().clone()

    with pytest.raises(ax.NonFiniteError, match="nothing was updated"):
        loop.fit(ax.Loader(ax.ArrayDataset(x, torch.zeros(64).long()), 8), epochs=1)
    assert torch.equal(before["weights"], loop.objective.net.weight)


def goes_on(run, tmp_path, stops):
    """What differs of a run that is broken off and resumed, for each of the steps at which it is."""
    data = table(150)  # nine batches of sixteen, and one of six
    whole = run()
    whole.fit(data, epochs=4, batch_size=16)
    for stop in stops:
        directory = tmp_path / str(stop)
        first = run(directory=directory)

        @first.on("after_batch")
        def leave(state, stop=stop):
            return ax.Stop("enough") if state.step == stop else None

        first.fit(data, epochs=4, batch_size=16)
        first.save(directory / "end")
        second = run()
        second.restore(directory / "end")
        second.fit(data, epochs=4, batch_size=16, resume=True)
        a, b = flat(whole.save()), flat(second.save())
        different = [
            key
            for key in a
            if not key.startswith(("/counters/elapsed", "/history", "/attached/cadence"))
            and not (torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b.get(key))
        ]
        yield stop, different
    assert whole.report().how == "one graph"


@pytest.mark.slow
def test_a_run_that_is_resumed_is_the_run_that_was_not_broken_off(tmp_path):
    found = goes_on(functools.partial(made, Deep, OPTIMIZERS["adamw"]), tmp_path, (1, 7, 10, 13, 25))
    assert [one for one in found if one[1]] == []


class Turns(ax.Callback):
    """Weight decay that is another now and then, and the first one again."""

    def after_batch(self, state):
        if state.step % 3 == 2:
            state.optimizers["main"].set(weight_decay=(0.2, 0.01, 0.05)[state.step // 3 % 3])


BETAS = ((0.9, 0.99), (0.8, 0.99), (0.85, 0.999))  # of which, unlike of weight decay, a scalar in a tensor gives other bits


class BetasOfABatch(ax.Callback):
    def before_batch(self, state):
        state.optimizers["main"].set(betas=BETAS[state.step // 6 % 3])


class BetasOfAnEpoch(ax.Callback):
    def before_epoch(self, state):
        state.optimizers["main"].set(betas=BETAS[state.epoch % 3])


class BetasBetween(ax.Callback):
    """Others between two steps, but in all of them the same."""

    def before_batch(self, state):
        state.optimizers["main"].set(betas=BETAS[0])

    def after_batch(self, state):
        state.optimizers["main"].set(betas=BETAS[1])


@pytest.mark.slow
@pytest.mark.parametrize("changing", [Turns, BetasOfABatch, BetasOfAnEpoch, BetasBetween])
def test_so_it_is_where_options_of_the_optimizer_change(changing, tmp_path):
    def run(**options):
        return made(Deep, OPTIMIZERS["adamw"], callbacks=[changing()], **options)

    assert [one for one in goes_on(run, tmp_path, (1, 2, 6, 9, 10, 25)) if one[1]] == []


@pytest.mark.slow
def test_what_is_restored_into_a_loop_that_has_graphs_goes_on_as_in_one_that_has_none(tmp_path):
    def run():
        return made(Net, ax.Optimizer("adamw", lr=1e-2), callbacks=[BetasOfABatch()])

    ends, first = [], run()

    @first.on("after_batch")
    def keep(state):
        if state.step == 4:
            first.save(tmp_path / "at4")

    first.fit(table(), epochs=2, batch_size=16)
    ends.append(copy.deepcopy(first.objective.state_dict()))
    for loop in (first, run()):
        loop.restore(tmp_path / "at4")
        loop.fit(table(), epochs=2, batch_size=16, resume=True)
        ends.append(loop.objective.state_dict())
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), end.values(), strict=True))


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40)


VARIED = {
    "decay": (ax.Optimizer("adamw", lr=1e-2, weight_decay=0.3, no_decay=True), lambda: [Turns()], "weight_decay"),
    "coupled": (ax.Optimizer("adam", lr=1e-2, weight_decay=0.3, amsgrad=True), lambda: [Turns()], "weight_decay"),
    "sgd": (ax.Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.3), lambda: [Turns()], "weight_decay"),
    "one_cycle": (ax.Optimizer("sgd", lr=0.05, momentum=0.9, nesterov=True, schedule=one_cycle), list, "momentum"),
    "betas": (ax.Optimizer("adamw", lr=0.05, schedule=one_cycle), list, "betas"),
    "maximize": (ax.Optimizer("sgd", lr=1e-3, momentum=0.5, maximize=True, schedule=one_cycle), list, "momentum"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED)
def test_options_that_change_are_one_more_graph_and_no_more(name):
    optimizer, callbacks, what = VARIED[name]
    eager, compiled = both(Net, optimizer, callbacks=callbacks)
    alike(eager, compiled)
    report = compiled.report()
    assert (report.how, report.graphs, report.recompilations) == ("one graph", 2, 1)
    assert report.changes[0].startswith(f"the optimizer's {what} was ")


@pytest.mark.slow
def test_momentum_that_comes_and_goes():
    class ComesAndGoes(ax.Callback):
        def after_batch(self, state):
            state.optimizers["main"].set(momentum=(0.0, 0.5, 0.8)[state.step // 5 % 3])

    eager, compiled = both(Net, ax.Optimizer("sgd", lr=0.05), callbacks=lambda: [ComesAndGoes()])
    alike(eager, compiled)
    assert (compiled.report().how, compiled.report().graphs) == ("one graph", 3)


@pytest.mark.slow
def test_checkpoints_go_from_eager_to_compiled_and_back(tmp_path):
    eager = made(Deep, OPTIMIZERS["adamw"], compile=False)
    eager.fit(table(), epochs=1, batch_size=16)
    eager.save(tmp_path / "eager")
    compiled = made(Deep, OPTIMIZERS["adamw"])
    compiled.restore(tmp_path / "eager")
    compiled.fit(table(), epochs=1, batch_size=16)
    compiled.save(tmp_path / "compiled")
    assert compiled.report().how == "one graph"
    again = made(Deep, OPTIMIZERS["adamw"], compile=False)
    again.restore(tmp_path / "compiled")
    again.fit(table(), epochs=1, batch_size=16)
    whole = made(Deep, OPTIMIZERS["adamw"], compile=False)
    for _ in range(3):
        whole.fit(table(), epochs=1, batch_size=16)
    alike(whole, again, atol=2e-3)
    assert eager.state.state_dict()["objective"].keys() == compiled.state.state_dict()["objective"].keys()
    plain = Deep()
    ax.load_weights(plain, tmp_path / "compiled")


@pytest.mark.slow
def test_a_resume_says_that_steps_were_not_compiled_before(tmp_path):
    first = made(compile=False, directory=tmp_path)
    first.fit(table(), steps=7, batch_size=16)
    second = made(directory=tmp_path)
    with pytest.warns(ax.AxonWarning, match="compile: it was False, and is True; numbers may differ in their last bits"):
        second.fit(table(), epochs=2, batch_size=16, resume=True)


@pytest.mark.slow
def test_the_last_batch_of_an_epoch_is_no_other_graph_and_variable_sizes_are_one_more():
    loop = made()
    loop.fit(table(150), epochs=8, batch_size=16)
    assert loop.report().graphs == 1

    generator = torch.Generator().manual_seed(0)
    sizes = [16, *torch.randint(3, 40, (60,), generator=generator).tolist()]
    batches = [(torch.randn(n, 8, generator=generator), torch.randint(2, (n,), generator=generator)) for n in sizes]
    eager, compiled = (made(compile=compile) for compile in (False, True))
    for one in (eager, compiled):
        one.fit(batches, epochs=1)
    assert compiled.report().graphs == 2
    assert "size" in compiled.report().changes[0]
    alike(eager, compiled)


@pytest.mark.slow
def test_what_changes_of_the_module_is_seen():
    class Ramps(ax.Callback):
        def before_epoch(self, state):
            state.objective.scale = 1.0 + state.epoch

    eager, compiled = both(callbacks=lambda: [Ramps()])
    alike(eager, compiled)
    report = compiled.report()
    assert (report.how, report.graphs, report.recompilations) == ("one graph", 3, 2)
    assert "scale == 1.0" in report.changes[0]


@pytest.mark.slow
def test_frozen_thawed_unused_and_tied_parameters_are_trained_as_in_eager():
    class Parts(Net):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.fixed = nn.Linear(8, 8).requires_grad_(False)

        def predict(self, inputs):
            return self.net(self.fixed(self.second(F.relu(self.first(inputs)))))

    optimizer = ax.Optimizer("adamw", lr=1e-2, weight_decay=0.5)
    eager, compiled = both(Parts, optimizer, callbacks=lambda: [ax.Unfreeze("first.*", at="1 epoch")])
    alike(eager, compiled, atol=2e-3)
    assert compiled.report().how == "one graph"
    assert compiled.report().graphs == 2
    torch.manual_seed(0)
    assert torch.equal(compiled.objective.unused.weight, Parts().unused.weight)  # no gradient: no decay either


class Counts(Net):
    calls = 0

    def predict(self, inputs):
        self.calls += 1
        return self.net(inputs)


@pytest.mark.slow
def test_counters_in_the_module_are_no_graph_a_step():
    loop = made(Counts)
    named = r"anew each time.*objective\.calls == \d .*, at .*: self\.calls \+= 1\. Steps"
    with pytest.warns(ax.AxonWarning, match=named) as told:
        loop.fit(table(), epochs=3, batch_size=16)
    assert len(told) == 1
    report = loop.report()
    assert (report.how, report.graphs) == ("eager", 3 + 4)  # of whole steps, and of parts
    assert [change.partition(" == ")[0] for change in report.changes[1:]] == ["objective.calls"] * 2  # first it was the class's
    assert loop.objective.calls == 30


class KeepsCount(Counts):
    """With layers of which compiled steps give other bits than eager ones."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 2))

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


@pytest.mark.slow
def test_a_run_is_resumed_alike_while_it_finds_out_that_a_counter_changes(tmp_path):
    def run():
        return made(KeepsCount, ax.Optimizer("adamw", lr=0.01))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ax.AxonWarning)
        whole = run()
        whole.fit(table(), epochs=1, batch_size=16)
        assert whole.report().how == "eager"
        for kill in (2, 3, 4, 5, 7):
            first, second = run(), run()

            @first.on("after_batch")
            def leave(state, kill=kill):
                return ax.Stop("enough") if state.step == kill else None

            first.fit(table(), epochs=1, batch_size=16)
            second.restore(first.save(tmp_path / str(kill)))
            second.fit(table(), epochs=1, batch_size=16, resume=True)
            for a, b in zip(whole.objective.parameters(), second.objective.parameters(), strict=True):
                assert torch.equal(a, b), kill


@pytest.mark.slow
def test_a_counter_is_named_though_a_batch_is_of_another_size_then():
    loop = made(Counts)
    with pytest.warns(
        ax.AxonWarning, match=r"objective\.calls == \d \(a number that changes can be a buffer.*\), at .*calls \+= 1"
    ):
        loop.fit(table(320), epochs=2, batch_size=48)  # the step at which it is told is of 32
    assert loop.report().how == "eager"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replaced", "added", "listed"])
def test_a_tensor_that_a_step_keeps_is_named(way):
    class Keeps(Net):
        def __init__(self):
            super().__init__()
            self._mean, self._seen = torch.zeros(2), deque(maxlen=1)

        def predict(self, inputs):
            logits = self.net(inputs)
            if way == "replaced":
                self._mean = 0.9 * self._mean + 0.1 * logits.detach().mean(0)
            elif way == "added":
                self._last = logits.detach()
            else:
                self._seen.append(logits.detach())
            return logits

    name = {"replaced": "_mean", "added": "_last", "listed": "0 of _seen"}[way]
    with pytest.warns(ax.AxonWarning, match=rf"keeps a tensor that it has computed \({name} of Keeps\).*register_buffer"):
        eager, compiled = both(Keeps)
    alike(eager, compiled)
    torch.testing.assert_close(eager.objective._mean, compiled.objective._mean)
    assert compiled.report().how == "in parts"
    assert name in compiled.report().reason


@pytest.mark.slow
@pytest.mark.parametrize("way", ["written", "read"])
def test_what_torch_says_of_a_step_is_told_in_words(way):
    class Told(Net):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(2)

        def loss(self, logits, labels):
            loss = super().loss(logits, labels)
            if way == "written":
                self.mean.mul_(0.9)
            elif loss.item() > 100:
                loss = 0.0 * loss
            return loss

    why = {
        "written": r"writes in place \(mul_\) to a tensor that it has not .*register_buffer.*, at .*: self\.mean\.mul_\(0\.9\)",
        "read": r"Python goes by a number that the step computes, as by \.item\(\) .*, at .*: elif loss\.item\(\) > 100",
    }
    with pytest.warns(ax.AxonWarning, match=why[way]):
        eager, compiled = both(Told)
    alike(eager, compiled)
    torch.testing.assert_close(compiled.objective.mean, eager.objective.mean)


IN_PARTS = {
    "after_backward": ({"callbacks": lambda: [Looks()]}, {}, "after_backward"),
    "microbatch": ({}, {"microbatch": 4}, "microbatches"),
    "rmsprop": ({"optimizer": ax.Optimizer("rmsprop", lr=1e-3)}, {}, "RMSprop has no form"),
    "in_backward": ({"optimizer": ax.Optimizer("sgd", lr=0.1, in_backward=True)}, {}, "within backward"),
    "lbfgs": ({"optimizer": ax.Optimizer("lbfgs", lr=0.01)}, {"epochs": 1}, "evaluates the loss by itself"),
}


class Looks(ax.Callback):
    def after_backward(self, state):
        assert all(p.grad is not None for p in state.objective.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PARTS)
def test_what_one_graph_cannot_do_is_compiled_in_parts(name):
    options, fit, why = IN_PARTS[name]
    eager, compiled = both(Net, fit=fit, **options)
    alike(eager, compiled, atol=1e-3)
    assert compiled.report().how == "in parts"
    assert why in compiled.report().reason
    assert compiled.report().compared >= 3


@pytest.mark.slow
def test_a_generator_of_losses_is_trained_in_eager_and_told_once():
    class Two(Net):
        metrics = ()

        def train_step(self, batch):
            yield "main", self.loss(self.predict(batch[0]), batch[1])

    with pytest.warns(ax.AxonWarning, match="generator of several losses") as told:
        compiled = both(Two)[1]
    compiled.fit(table(), epochs=1)
    assert len(told) == 1
    assert compiled.report().how == "eager"


@pytest.mark.slow
def test_without_a_compiler_it_trains_in_eager_and_says_why(monkeypatch):
    from torch._inductor import cpp_builder

    def none(*_, **__):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    torch._dynamo.reset()

    class Odd(Net):  # of sizes that no cache has
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 13)

    uncached = torch._inductor.config.patch(force_disable_caches=True)
    with uncached, pytest.warns(ax.AxonWarning, match=r"no C\+\+ compiler was found.*Steps are done in eager"):
        eager, compiled = both(Odd, fit={"epochs": 1})
    alike(eager, compiled, atol=0)


@pytest.mark.slow
def test_loops_of_ones_own_are_compiled_too():
    eager, compiled = (made(compile=compile) for compile in (False, True))
    x, y = torch.randn(16, 8), torch.randint(2, (16,))
    for loop in (eager, compiled):
        for _ in range(6):
            loop.train_on_batch((x, y))
    alike(eager, compiled)
    assert compiled.report().how == "one graph"
    steps = [step.loss for step in compiled.steps(table(), epochs=1, batch_size=16)]
    assert len(steps) == 10
    assert all(not loss.requires_grad for loss in steps)


@pytest.mark.slow
def test_a_step_keeps_what_it_gave():
    class Keeps(ax.Callback):
        def after_batch(self, state):
            self.last = state.last

    keeps = Keeps()
    loop = made(Deep, callbacks=[keeps])
    loop.fit(table(), epochs=1, batch_size=16)
    step = keeps.last
    assert step.predictions.shape == (16, 2)
    assert step.targets.shape == (16,)
    assert step.weight == 16
    assert set(step.values) == {"ce", "l2"}
    assert torch.allclose(step.loss, step.values["ce"] + step.values["l2"])
    held = step.predictions.clone()
    loop.fit(table(seed=5), epochs=1, batch_size=16)
    assert torch.equal(held, step.predictions)  # not a buffer that the next step writes


@pytest.mark.slow
def test_targets_that_are_views_of_the_batch_and_a_transformer_with_dropout():
    class Characters(ax.Objective):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(20, 16), nn.Linear(16, 20)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

        def split(self, tokens):
            return tokens[:, :-1], tokens[:, 1:]

        def weight(self, tokens):
            return tokens[:, 1:].numel()

        def predict(self, tokens):
            return self.out(self.block(self.embedding(tokens)))

        def loss(self, logits, targets):
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    tokens = ax.ArrayDataset(torch.randint(0, 20, (160, 9), generator=torch.Generator().manual_seed(0)))
    optimizer = ax.Optimizer("adamw", lr=1e-3, groups={nn.Embedding: {"lr": 1e-2}}, no_decay=True, clip_norm=1.0)
    eager, compiled = both(Characters, optimizer, tokens)
    assert compiled.report().how == "one graph"
    assert compiled.report().compared >= 3
    a, b = (loop.state.values["train/loss"] for loop in (eager, compiled))
    assert abs(a - b) < 0.02  # torch.func draws dropout in another order


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16-true", "fp64"])
def test_other_precisions_become_one_graph_too(precision):
    eager, compiled = both(Deep, OPTIMIZERS["nesterov"], precision=precision)
    assert compiled.report().how == "one graph"
    a, b = (loop.state.values["train/loss"] for loop in (eager, compiled))
    assert a == pytest.approx(b, rel=0.05 if "bf16" in precision else 1e-9)


@pytest.mark.slow
def test_it_reads_nothing_between_readings(monkeypatch):
    loop = made(Deep, OPTIMIZERS["adamw"])
    loop.fit(table(), epochs=1, batch_size=16)
    seen = []
    read = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: seen.append(1) or read(self))
    step = loop._start.runner(None)
    loop.objective.train()
    batch = (torch.randn(16, 8), torch.randint(2, (16,)))
    step(batch)
    for _ in range(3):
        loop.state.meter.record(step(batch))
    assert not seen


@pytest.mark.slow
def test_where_torch_lets_nobody_look_at_its_guards_it_looks_for_itself(monkeypatch):
    monkeypatch.setattr(WholeStep, "_take_hold", lambda self: None)

    class Ramps(ax.Callback):
        def before_epoch(self, state):
            state.objective.scale = 1.0 + (state.epoch == 1)

    eager, compiled = both(callbacks=lambda: [Ramps()])
    alike(eager, compiled)
    assert (compiled.report().how, compiled.report().graphs) == ("one graph", 2)


@pytest.mark.slow
def test_an_optimizer_state_that_is_replaced_is_the_one_that_is_used():
    eager, compiled = (made(compile=compile) for compile in (False, True))
    for loop in (eager, compiled):
        loop.fit(table(), epochs=1, batch_size=16)
        saved = copy.deepcopy(loop.save())
        loop.fit(table(), epochs=1, batch_size=16)
        loop.restore(saved)
        for of_p in loop.state.optimizers["main"].optimizers[0].state.values():
            of_p["momentum_buffer"] = 2 * of_p["momentum_buffer"]
        loop.state.optimizers["main"].set(weight_decay=0.1)
        loop.fit(table(), epochs=1, batch_size=16)
    alike(eager, compiled)
    assert compiled.report().changes == ["the optimizer's weight_decay was 0, and is 0.1"]


@pytest.mark.slow
def test_graphs_are_let_go_with_their_loop():
    loop = made()
    loop.fit(table(), epochs=1, batch_size=16)
    (graph,) = loop._compilation.graphs
    import weakref

    gone = weakref.ref(loop.objective)
    del loop, graph
    gc.collect()
    assert gone() is None


def test_compile_is_true_or_false():
    with pytest.raises(ax.ConfigurationError, match="compile='default': True or False"):
        made(compile="default")


def test_a_twin_leaves_its_original_as_it_was():
    torch.manual_seed(0)
    loop = made(Deep, OPTIMIZERS["adamw"], compile=False)
    loop.fit(table(), steps=3, batch_size=16)
    objective, update = loop.objective.train(), loop.state.optimizers["main"]
    loop.state.hide_averages()
    before, drawn = copy.deepcopy(loop.save()), torch.get_rng_state()
    batch = (torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(16).long())
    outcomes = [
        twin.Twin(objective, update, loop.precision, nudged=nudged).step(batch, functional=functional)
        for nudged, functional in itertools.product((False, True), repeat=2)
    ]
    after = loop.save()
    a, b = flat(before), flat(after)
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a if "elapsed" not in k)
    assert torch.equal(drawn, torch.get_rng_state())
    plain, functional, *_ = outcomes
    assert plain.draws
    assert set(plain.changing) == {"mean", "net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}
    assert not twin.differences(functional, plain, outcomes[2], twin.sizes(objective), loop.precision)
    for name in ("the loss", "the update of net.0.weight", "the buffer mean", "the state exp_avg of net.4.weight"):
        wrong = copy.deepcopy(plain)
        wrong.found[name] = wrong.found[name] * 1.5
        assert twin.differences(wrong, plain, outcomes[2], twin.sizes(objective), loop.precision), name


@pytest.mark.slow
def test_warnings_of_torchs_own_are_not_the_users():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = made(Deep, OPTIMIZERS["adamw"])
        loop.fit(table(), epochs=1, batch_size=16)
    assert loop.report().how == "one graph"


@pytest.mark.slow
def test_what_was_seen_of_steps_holds_when_the_run_goes_on(tmp_path):
    first = made(Counts, directory=tmp_path)
    first.fit(table(), steps=5, batch_size=16)
    assert first.report().how == "in parts"
    second = made(Counts, directory=tmp_path)
    with pytest.warns(ax.AxonWarning, match="anew each time"):
        second.fit(table(), steps=9, batch_size=16, resume=True)
    # Of the four steps in a row two were in the first run.
    assert (first._compilation.anew, second.report().how, second.report().graphs) == (2, "eager", 2)
    third = made(Counts, directory=tmp_path)
    third.fit(table(), steps=12, batch_size=16, resume=True)
    assert third.report().reason == second.report().reason
    assert third.report().graphs == 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_gradients_that_are_rounding_alone_send_nobody_to_eager(optimizer):
    class Biased(ax.Objective):  # a bias before a BatchNorm has a gradient of zero, and of rounding
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
            )  # fmt: skip

        def predict(self, images):
            return self.net(images)

        def loss(self, logits, labels):
            return F.cross_entropy(logits, labels)

    generator = torch.Generator().manual_seed(0)
    images = ax.ArrayDataset(torch.randn(64, 3, 8, 8, generator=generator), torch.randint(3, (64,), generator=generator))
    for seed in range(4):
        torch.manual_seed(seed)
        loop = ax.Loop(Biased(), ax.Optimizer(optimizer, lr=1e-3), compile=True, progress=False)
        loop.fit(images, steps=3, batch_size=8)
        assert (loop.report().how, loop.report().compared) == ("one graph", 3)


@pytest.mark.slow
def test_activation_checkpointing_is_compiled_in_parts_and_forbids_nobody_anything():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

        def predict(self, inputs):
            return self.net(checkpoint(self.first, inputs, use_reentrant=False))

    eager, compiled = both(Checkpointed)
    alike(eager, compiled)
    assert compiled.report().how == "in parts"
    assert "one that computes its activations again" in compiled.report().reason
    made(Checkpointed, compile=False).fit(table(), epochs=1)  # tracing that fails forbids hooks on saved tensors


@pytest.mark.slow
def test_in_parts_a_batch_of_another_size_is_held_against_eager_too():
    class Small(Net):  # is miscompiled where a batch is small
        def predict(self, inputs):
            if len(inputs) < 16:
                logits = torch.add(self.net.bias, inputs @ self.net.weight.T, alpha=0.1)
            else:
                logits = self.net(inputs)
            if logits.sum() > 1e9:  # a host read
                logits = 2 * logits
            return logits

    with pytest.warns(ax.AxonWarning) as told:
        eager, compiled = both(Small, data=table(150), fit={"epochs": 1})
    assert "differs from eager" in str(told[-1].message)
    alike(eager, compiled)


class At(ax.Callback):
    """Does something before a step."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action

    def before_batch(self, state):
        if state.step == self.step:
            self.action(state)


def doubled(module, inputs, output):
    return 2 * output


LATER = {
    "a hook on a module": lambda state: state.objective.net.register_forward_hook(doubled),
    "a hook on a gradient": lambda state: state.objective.net.weight.register_hook(lambda gradient: -gradient),
    "a hook on steps": lambda state: (
        state.optimizers["main"]
        .optimizers[0]
        .register_step_post_hook(lambda optimizer, *_: optimizer.param_groups[0].update(lr=0.01))
    ),
    "clipping": lambda state: setattr(state.optimizers["main"].spec, "clip_norm", 0.01),
    "a gradient that is left": lambda state: setattr(state.objective.net.bias, "grad", torch.ones(2)),
    "a global": lambda state: globals().update(SCALE=0.5),
}
SCALE = 1.0


class Scaled(Net):
    def loss(self, logits, labels):
        return SCALE * F.cross_entropy(logits, labels)


@pytest.mark.slow
@pytest.mark.parametrize("what", LATER)
def test_what_comes_later_is_heeded(what, monkeypatch):
    loops = []
    for compile in (False, True):
        monkeypatch.setitem(globals(), "SCALE", 1.0)
        optimizer = ax.Optimizer("sgd", lr=0.1, momentum=0.9, clip_norm=100.0)
        loop = made(Scaled, optimizer, compile, callbacks=[At(12, LATER[what])])
        loop.fit(table(), epochs=3, batch_size=16)
        loops.append(loop)
    alike(*loops)
    plain = made(Scaled, ax.Optimizer("sgd", lr=0.1, momentum=0.9, clip_norm=100.0), False)
    plain.fit(table(), epochs=3, batch_size=16)
    same = zip(plain.objective.parameters(), loops[0].objective.parameters(), strict=True)
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in same)  # it does something


@pytest.mark.slow
def test_a_state_from_before_the_first_step_is_gone_on_from():
    loops = []
    for compile in (False, True):
        loop = made(Net, ax.Optimizer("adamw", lr=0.01), compile)
        start = loop.save()
        for _ in range(2):
            loop.restore(start)
            loop.fit(table(), epochs=1, batch_size=16)
        loops.append(loop)
    alike(*loops, atol=1e-4)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_no_proof():
    class Miscompiled(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("poison", torch.full((), float("nan")))

        def predict(self, inputs):
            return torch.add(self.net.bias, inputs @ self.net.weight.T, alpha=0.1) + self.poison

    heal = At(3, lambda state: state.objective.poison.zero_())
    loop = made(Miscompiled, callbacks=[heal])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop.fit(table(), epochs=1, batch_size=16)
    assert loop.report().how == "eager"
    assert any("differs from eager" in str(one.message) for one in told)


@pytest.mark.slow
def test_what_a_module_keeps_is_not_moved_on_twice():
    class Momentum(Net):
        def __init__(self):
            super().__init__()
            self.slow = nn.Linear(8, 2).requires_grad_(False)
            self.seen = []
            self.mean = torch.zeros(2)

        def predict(self, inputs):
            with torch.no_grad():
                self.slow.weight.lerp_(self.net.weight, 0.1)
            logits = self.net(inputs)
            self.seen.append(float(logits.detach().sum()))  # a host read: in parts
            self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean(0)
            return logits + 0.1 * self.slow(inputs)

    one, parts = (pytest.warns(ax.AxonWarning, match=why) for why in ("cannot become one graph", "anew each time"))
    with one, parts:  # of a list that grows
        eager, compiled = both(Momentum)
    alike(eager, compiled)
    assert len(eager.objective.seen) == len(compiled.objective.seen) == 30
    torch.testing.assert_close(eager.objective.mean, compiled.objective.mean)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fit", "train_on_batch", "in parts"])
def test_a_copy_of_a_loop_goes_on_by_itself_with_graphs_of_its_own(way):
    callbacks = [Looks()] if way == "in parts" else []
    loop, data, batch = made(callbacks=callbacks), table(), table()[0:16]
    eager = made(compile=False)

    def trained(one):
        if way == "train_on_batch":
            for _ in range(6):
                one.train_on_batch(batch)
        else:
            one.fit(data, epochs=1, batch_size=16)

    trained(loop)
    trained(eager)
    before = copy.deepcopy(loop.objective.state_dict())
    copied = copy.deepcopy(loop)
    assert copied.report().graphs == 0
    trained(copied)
    trained(eager)
    alike(eager, copied)
    assert copied.report().how == loop.report().how == ("in parts" if way == "in parts" else "one graph")
    assert (copied.report().graphs > 0, copied.report().recompilations) == (True, 0)
    assert all(torch.equal(value, before[name]) for name, value in loop.objective.state_dict().items())
    trained(loop)
    alike(eager, loop)


class Broken(Net):
    def loss(self, logits, labels):
        torch._dynamo.graph_break()
        return super().loss(logits * 1.0, labels)


@pytest.fixture
def twice():
    with torch._dynamo.config.patch(recompile_limit=2):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("twice")
def test_each_of_many_loops_of_one_class_has_parts_of_its_own():
    reports = []
    for _ in range(4):
        loop = made(Broken)
        with pytest.warns(ax.AxonWarning, match="cannot become one graph"):
            loop.fit(table(), epochs=1, batch_size=16)
        reports.append(loop.report())
    assert [(one.how, one.graphs) for one in reports] == [("in parts", reports[0].graphs)] * 4
    assert reports[0].graphs > 1


@pytest.mark.slow
@pytest.mark.usefixtures("twice")
def test_where_torch_compiles_nothing_the_report_says_so(monkeypatch):
    plain = torch.compile

    def sharing(*args, isolate_recompiles=False, **options):  # as versions of torch did that count all Loops together
        return plain(*args, **options)

    class Shared(Broken):
        def predict(self, inputs):
            return super().predict(inputs)

        def train_step(self, batch):
            return super().train_step(batch)

    monkeypatch.setattr(torch, "compile", sharing)
    told, loops = [], []
    for _ in range(4):
        loops.append(made(Shared))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loops[-1].fit(table(), epochs=1, batch_size=16)
        told.append(any("compiled nothing of train_step" in str(one.message) for one in caught))
    reports = [loop.report() for loop in loops]
    assert [(one.how, one.graphs > 0) for one in reports] == [("in parts", True)] * 2 + [("eager", False)] * 2
    assert told == [False, False, True, True]
    alike(loops[0], loops[-1])


@pytest.mark.slow
def test_what_is_seen_uncompiled_is_not_taken_for_compiled():
    loop = made(callbacks=[Looks()])
    loop.fit(table(), steps=1, batch_size=16)
    with torch.compiler.set_stance("force_eager"):
        loop.fit(table(), steps=5, batch_size=16)
    assert loop.report().compared == 1
    loop.fit(table(), steps=4, batch_size=16)
    assert (loop.report().how, loop.report().compared) == ("in parts", 3)


class Embeds(Net):
    def __init__(self, whole=True):
        super().__init__()
        self.whole = whole
        self.net = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 4))

    def loss(self, logits, labels):
        if not self.whole:
            print(end="")
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("whole", "what"),
    [
        (True, "token"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, "label"), (False, "token"), (False, "label")]),
    ],
)
def test_a_compiled_step_that_fails_gives_eagers_error(whole, what):
    x = torch.arange(64) % 8
    y = x % 4
    loop, eager = (made(lambda: Embeds(whole), compile=compile) for compile in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ax.AxonWarning)
        loop.fit(ax.ArrayDataset(x, y), epochs=1, batch_size=8)
    eager.fit(ax.ArrayDataset(x, y), epochs=1, batch_size=8)
    compiled = "one graph" if whole else "in parts"
    assert loop.report().how == compiled
    before = everything(loop)
    wrong = (x + 8, y) if what == "token" else (x, y + 4)
    with pytest.raises(IndexError, match=r"index out of range in self|Target \d+ is out of bounds") as found:
        loop.train_on_batch(tuple(part[:8] for part in wrong))
    assert any("compiled, it fails by: index out of bounds" in note for note in found.value.__notes__)
    users = [entry.name for entry in found.traceback if str(entry.path) == __file__]
    assert users[-1] == ("predict" if what == "token" else "loss")
    after = everything(loop)
    assert [name for name in before if not same(before[name], after[name])] == []
    for loops in (loop, eager):
        loops.fit(ax.ArrayDataset(x, y), epochs=2, batch_size=8)
    alike(eager, loop)
    assert loop.report().how == compiled


def test_a_first_step_that_fails_fails_as_in_eager_and_once():
    with pytest.raises(IndexError, match="out of bounds") as found:
        made(Embeds).train_on_batch((torch.arange(8), torch.arange(8)))
    assert found.value.__context__ is None


def test_graphs_that_a_resumed_run_makes_anew_are_not_counted_as_others():
    made_of = SimpleNamespace(dynamic=False), SimpleNamespace(dynamic=True)
    run = Compilation(Precision("fp32", torch.device("cpu")))
    for step, graph in zip((0, 9), made_of, strict=True):
        assert not run.in_vain(step, "dynamic" if graph.dynamic else "static")
        run.takes(graph, "", [{"weight_decay": [0.1]}])
    for step in range(10, 50, 2):  # resumed every two steps
        saved = run.state_dict()
        run = Compilation(Precision("fp32", torch.device("cpu")))
        run.load_state_dict(decode(*encode(saved)))
        for later, graph in enumerate(made_of):
            assert not run.in_vain(step + later, "dynamic" if graph.dynamic else "static")
            run.takes(graph, "", [{"weight_decay": [0.1]}])
        assert run.state_dict() == saved
    assert not run.in_vain(60, "static")  # one that there was not
    assert run.misses == saved["misses"] + 1


def test_a_batchs_size_is_not_what_changes_each_time_where_something_else_does(monkeypatch):
    reasons = iter([("G['n'] == 0", ""), ("G['n'] == 1", ""), ("tensor 'batch[0]' size mismatch", ""), ("UNUSED", "")])
    monkeypatch.setattr("axontrain.execution.compilation.changed_for", lambda graphs: next(reasons))
    made_of = Compilation(Precision("fp32", torch.device("cpu")))
    made_of.anew = 1
    for _ in range(2):
        made_of.counts(1, first=False)
    with pytest.warns(ax.AxonWarning, match=r"changes: G\['n'\] == 1 \("):
        made_of.counts(1, first=False)
