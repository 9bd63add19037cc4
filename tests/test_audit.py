"""ax.audit: what it counts of real steps, the lines that it finds, and that it changes nothing."""

import copy
import gc
import random
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from unchanged import everything, same

import axontrain as ax
from axontrain.execution import compiled
from axontrain.execution.counting import Calls

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 6, generator=GENERATOR)
BATCH = (X, (X.sum(1) > 0).long())


class Net(ax.Objective):
    """Dropout, BatchNorm and every generator there is: enough to be disturbed, and nothing that reads."""

    metrics = ("accuracy",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def predict(self, x):
        return self.net(x + 0.01 * np.random.normal() + 0.01 * random.random())

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Adversaries(ax.Objective):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(2, 6), nn.Linear(6, 1)

    def train_step(self, batch):
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 2))
        yield "discriminator", (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake.detach()))).mean()
        yield "generator", F.softplus(-self.discriminator(fake)).mean()


def loop_of(objective, optimizer=None, **options):
    optimizer = optimizer or ax.Optimizer("adamw", lr=0.01)
    return ax.Loop(objective, optimizer, **{"progress": False, "device": "cpu", **options})


def lines(found):
    """Each place as (what, the source of its line, how often)."""
    return {(read.what, read.line.partition(": ")[2], read.per_step) for read in found.reads}


# --- host reads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        ax.Optimizer("sgd", lr=0.01, momentum=0.9),
        ax.Optimizer("adamw", lr=0.01, clip_norm=1.0, schedule=ax.schedules.cosine(warmup="10%")),
        ax.Optimizer("rmsprop", lr=0.01, average="ema"),
        ax.Optimizer("adam", lr=0.01, in_backward=True),
    ],
    ids=["sgd", "adamw", "rmsprop", "in backward"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_a_step_without_host_reads_has_none(optimizer, precision):
    found = ax.audit(loop_of(Net(), optimizer, precision=precision), BATCH)
    assert found.host_reads == 0
    assert found.reads == ()


class Reading(Net):
    """Reads in each of its methods."""

    def split(self, batch):
        x, y = batch
        if torch.equal(x, x):  # in split
            return x, y

    def predict(self, x):
        self.largest = x.abs().max().item()  # in predict
        return super().predict(x)

    def loss(self, logits, labels):
        kept = labels >= 0
        loss = F.cross_entropy(logits[kept], labels[kept])  # in loss
        self.told = f"{loss:.3f} {loss}"  # told
        return loss


def test_each_read_is_told_with_the_users_line():
    found = ax.audit(loop_of(Reading()), BATCH)
    assert lines(found) == {
        ("equal", "if torch.equal(x, x):  # in split", 1),
        ("item", "self.largest = x.abs().max().item()  # in predict", 1),
        ("mask index", "loss = F.cross_entropy(logits[kept], labels[kept])  # in loss", 2),
        ("mask assignment, in backward", "loss = F.cross_entropy(logits[kept], labels[kept])  # in loss", 1),
        ("item", 'self.told = f"{loss:.3f} {loss}"  # told', 2),
    }
    assert found.host_reads == 7
    read = next(read for read in found.reads if read.what == "equal")
    path, number, _ = re.fullmatch(r"(.*):(\d+): (.*)", read.line).groups()
    assert (path, "# in split" in Path(path).read_text().splitlines()[int(number) - 1]) == (__file__, True)


def test_what_reads_on_a_gpu_alone_is_told_and_what_reads_on_the_cpu_alone_is_not():
    class Elsewhere(Net):
        def loss(self, logits, labels):
            known = F.one_hot(labels, 2).to(logits.device)
            found = F.one_hot(labels)  # how many
            scale = torch.tensor([0.5, 0.5], device=logits.device)  # numbers
            self.kept = logits.detach().to("cpu")  # kept
            self.sums = torch.tensor([0.0, logits.detach().sum()])  # of a tensor
            return -(logits.log_softmax(1) * (known * scale + found * scale)).sum(1).mean()

    assert lines(ax.audit(loop_of(Elsewhere()), BATCH)) == {
        ("one_hot", "found = F.one_hot(labels)  # how many", 1),
        (
            "copy to the device without non_blocking=True",
            "scale = torch.tensor([0.5, 0.5], device=logits.device)  # numbers",
            1,
        ),
        ("copy to the host", 'self.kept = logits.detach().to("cpu")  # kept', 1),
        ("item", "self.sums = torch.tensor([0.0, logits.detach().sum()])  # of a tensor", 1),
    }


def disagreement(predictions, targets):
    return (predictions.argmax(1) != targets).float().mean().item()  # in a metric


class Snooping(ax.Callback):
    def after_batch(self, state):
        self.last = float(state.last.loss)  # in a callback


def test_reads_of_a_metric_and_of_a_callback_are_told():
    loop = loop_of(Net(), metrics=[disagreement], callbacks=[Snooping()])
    told = {("item", "return (predictions.argmax(1) != targets).float().mean().item()  # in a metric", 1)}
    assert lines(ax.audit(loop, BATCH)) == told
    assert not hasattr(loop.callbacks[0], "last")
    told |= {("item", "self.last = float(state.last.loss)  # in a callback", 1)}
    assert lines(ax.audit(loop, BATCH, callbacks=loop.callbacks)) == told


def test_a_read_of_a_custom_backward_is_told_with_its_own_line():
    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / max(1.0, gradient.norm().item())  # in backward

    class Through(Net):
        def predict(self, x):
            return Clipped.apply(super().predict(x))

    assert lines(ax.audit(loop_of(Through()), BATCH)) == {
        ("item", "return gradient / max(1.0, gradient.norm().item())  # in backward", 1)
    }


def test_a_library_that_reads_is_told_with_its_line_and_the_users():
    class Asking(Net):
        def __init__(self):
            super().__init__()
            self.judge = torchmetrics.classification.BinaryAccuracy()  # which validates its arguments

        def loss(self, logits, labels):
            self.judge.update(logits.argmax(1), labels)  # asked
            return super().loss(logits, labels)

    found = ax.audit(loop_of(Asking()), BATCH)
    assert found.reads
    for read in found.reads:
        assert read.line.endswith("self.judge.update(logits.argmax(1), labels)  # asked")
        assert "torchmetrics" in read.within
        assert read.within in str(found)


def test_an_optimizer_of_torchs_that_reads_is_told_with_torchs_line():
    found = ax.audit(loop_of(Net(), ax.Optimizer("nadam", lr=0.01)), BATCH)
    assert found.reads
    assert all(re.search(r"torch.optim.nadam\.py:\d+: .*_get_value", read.line) for read in found.reads)


def test_an_engine_that_was_asked_to_look_at_each_step_is_told_with_its_line():
    found = ax.audit(loop_of(Net(), ax.Optimizer("sgd", lr=0.01, on_nonfinite="raise")), BATCH)
    assert len(found.reads) == 1
    assert re.search(r"axontrain.update\.py:\d+: if flag.item.* # on_nonfinite=.raise. looks at each step", found.reads[0].line)


def test_what_is_read_every_other_step_is_half_a_read():
    class Seldom(Net):
        def __init__(self):
            super().__init__()
            self.steps = 0

        def loss(self, logits, labels):
            loss = super().loss(logits, labels)
            self.steps += 1
            if self.steps % 2:
                float(loss.detach())
            return loss

    found = ax.audit(loop_of(Seldom()), BATCH, steps=4)
    assert found.host_reads == 0.5
    assert "0.50 × item, at" in str(found)


# --- counts -----------------------------------------------------------------------------------------------------------


NUMBERS = (
    "calls", "own_calls", "builtin_calls", "operators", "copies", "copied_bytes", "allocations", "allocated_bytes",
)  # fmt: skip


class Exact(ax.Objective):
    """A known number of operators, copies, calls and bytes."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8))

    def predict(self, x):
        return x

    def loss(self, predictions, targets):
        for _ in range(self.extra):
            predictions.t().contiguous()  # a view, and a copy of 32 * 8 * 4 bytes
            self.called()
        return (self.factor * predictions).mean()

    def called(self):
        len("")

    extra = 0


def test_counts_are_per_step_and_of_what_was_done():
    def counted(extra, steps):
        objective = Exact()
        objective.extra = extra
        return ax.audit(loop_of(objective, ax.Optimizer("sgd", lr=0.1)), torch.ones(32, 8), steps=steps)

    none, some, longer = counted(0, 3), counted(5, 3), counted(5, 7)
    assert some.operators - none.operators == 10
    assert (some.copies, none.copies) == (5, 0)
    assert (some.copied_bytes, none.copied_bytes) == (5 * 1024, 0)
    assert some.allocations - none.allocations == 5
    assert some.allocated_bytes - none.allocated_bytes == 5 * 1024
    assert some.calls - none.calls == 5
    assert some.own_calls == none.own_calls > 0
    assert some.builtin_calls - none.builtin_calls == 15  # t, contiguous, len
    assert longer.steps == 7
    for name in (
        "calls",
        "own_calls",
        "builtin_calls",
        "operators",
        "copies",
        "copied_bytes",
        "allocations",
        "allocated_bytes",
    ):
        assert getattr(longer, name) == getattr(some, name), name


def test_an_audit_counts_what_fit_does():
    loop = loop_of(ax.Supervised(nn.Linear(6, 2), "cross_entropy"), ax.Optimizer("sgd", lr=0.1))
    found = ax.audit(loop, BATCH)

    def calls(steps):
        data = ax.ArrayDataset(*(part.repeat(steps, *[1] * (part.dim() - 1)) for part in BATCH))
        with Calls() as counted:
            loop.fit(data, epochs=1, batch_size=32)
        return counted.own

    calls(2)
    loading, reading = 1, 1  # a slice of the data, a flag of each update
    assert found.own_calls == (calls(30) - calls(10)) / 20 - loading - reading


def test_frames_are_three_and_more_for_what_is_wrapped():
    assert ax.audit(loop_of(Net()), BATCH).frames == 3
    assert ax.audit(loop_of(Net(), ax.Optimizer("sgd", lr=0.1, average="ema")), BATCH).frames == 4


def test_microbatches_are_counted_as_fit_makes_them():
    objective = ax.Supervised(nn.Linear(6, 2), "cross_entropy")
    whole, parts = (ax.audit(loop_of(objective), BATCH, microbatch=n) for n in (None, 8))
    assert parts.operators > 2.5 * whole.operators
    assert parts.host_reads == 0


def test_several_optimizers_are_counted_together():
    optimizers = {name: ax.Optimizer("adam", lr=0.01) for name in ("generator", "discriminator")}
    found = ax.audit(loop_of(Adversaries(), optimizers), BATCH)
    assert found.frames == 3
    assert found.host_reads == 0
    assert found.operators > 40


def test_an_optimizer_that_evaluates_a_closure_is_audited():
    one = ax.audit(loop_of(Net(), ax.Optimizer("lbfgs", lr=0.1, max_iter=2)), BATCH)
    more = ax.audit(loop_of(Net(), ax.Optimizer("lbfgs", lr=0.1, max_iter=6)), BATCH)
    assert more.operators > one.operators
    assert any("lbfgs.py" in read.line for read in one.reads)


def test_lazy_modules_and_batches_of_any_structure():
    class Lazy(ax.Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.LazyLinear(2)

        def loss(self, predictions, batch):
            return F.cross_entropy(self.net(batch["x"]), batch["more"][0])

        def predict(self, batch):
            return None

    loop = loop_of(Lazy(), ax.Optimizer("sgd", lr=0.1))
    assert ax.audit(loop, {"x": BATCH[0], "more": [BATCH[1], "text"]}).host_reads == 0
    assert nn.parameter.is_lazy(loop.objective.net.weight)


def test_a_batch_of_a_task_and_a_batch_with_a_number():
    def loss(predictions, targets):
        return F.cross_entropy(predictions, targets)

    loop = loop_of(ax.Supervised(nn.Linear(6, 2), loss))
    assert ax.audit(loop, ax.TaskBatch("digits", BATCH)).host_reads == 0

    class Scaled(Net):
        def split(self, batch):
            return batch[0] * batch[1], BATCH[1]

    assert ax.audit(loop_of(Scaled()), (X, torch.tensor(2.0))).host_reads == 0


def test_recompilations_and_graph_breaks_are_counted():
    class Compiled(Net):
        def __init__(self, changing):
            super().__init__()
            self.net = torch.compile(nn.Sequential(nn.Linear(6, 2)), backend="eager")
            self.changing, self.rows = changing, 0

        def predict(self, x):
            self.rows += 1
            return self.net(x.view(*[1] * (self.rows if self.changing else 1), *x.shape)).view(-1, 2)

    torch._dynamo.reset()
    steady, changing = (ax.audit(loop_of(Compiled(changing), metrics=None), BATCH, steps=2) for changing in (False, True))
    assert steady.recompilations == 0
    assert changing.recompilations == 1
    assert "\n  recompilations" in str(changing)

    class Broken(Net):
        def __init__(self):
            super().__init__()
            self.scaled = torch.compile(self.twice, backend="eager")

        def __deepcopy__(self, memo):  # a function that is compiled holds its object
            made = type(self)()
            made.load_state_dict(self.state_dict())
            return made

        def twice(self, x):
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

        def predict(self, x):
            return super().predict(self.scaled(x))

    torch._dynamo.reset()
    found = ax.audit(loop_of(Broken()), BATCH)
    assert found.graph_breaks == 1
    assert "1 graph break in all" in str(found)
    torch._dynamo.reset()


def test_what_is_compiled_stays_so_and_is_seen_as_it_was_written():
    """Under a dispatch mode torch skips code for good, which was compiled before."""
    graphs, runs = [], []

    def backend(graph, examples):
        graphs.append(graph)

        def run(*inputs):
            runs.append(1)
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    loop = loop_of(ax.Supervised(torch.compile(net, backend=backend), "cross_entropy"))
    plain = ax.audit(loop_of(ax.Supervised(net, "cross_entropy")), BATCH)
    loop.train_on_batch(BATCH)
    found = ax.audit(loop, BATCH)
    assert (found.operators, found.allocations) == (plain.operators, plain.allocations)
    assert found.recompilations == 0
    before = len(runs)
    loop.train_on_batch(BATCH)
    assert len(runs) == before + 1
    ax.locate_nonfinite(loop, BATCH)
    loop.train_on_batch(BATCH)
    assert len(runs) == before + 2
    torch._dynamo.reset()


def test_a_module_that_was_compiled_in_place_is_noted():
    objective = Net()
    objective.net.compile(backend="eager")
    found = ax.audit(loop_of(objective), BATCH)
    assert "net was compiled in place" in found.notes[0]
    assert found.notes[0] in str(found)


def test_nothing_of_dynamo_is_imported_where_nobody_has(monkeypatch):
    for name in ("torch._dynamo", "torch._dynamo.utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with compiled.uncompiled():
        assert (compiled.graphs(), compiled.breaks()) == (0, 0)
    assert "torch._dynamo" not in sys.modules


# --- nothing is changed -----------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "momentum": ax.Optimizer("sgd", lr=0.01, momentum=0.9),
    "adamw": ax.Optimizer("adamw", lr=0.01),
    "average": ax.Optimizer("adamw", lr=0.01, average="ema"),
    "in backward": ax.Optimizer("adamw", lr=0.01, in_backward=True),
    "scheduler": ax.Optimizer("adamw", lr=0.01, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2)),
    "lbfgs": ax.Optimizer("lbfgs", lr=0.01, max_iter=2),
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_changed(optimizer, trained):
    loop = loop_of(Reading(), OPTIMIZERS[optimizer], metrics={"own": disagreement})
    data = ax.ArrayDataset(*BATCH)
    if trained:
        loop.fit(data, data, epochs=1, batch_size=8)
        loop.fit(data, steps=2, batch_size=8)
        loop.train_on_batch(BATCH)
    loop.objective.net[1].eval()
    if optimizer != "in backward":
        for parameter in loop.objective.parameters():
            parameter.grad = torch.ones_like(parameter)
    batch = tuple(part.clone() for part in BATCH)
    hidden = getattr(loop.objective, "largest", None)
    before = everything(loop)
    found = ax.audit(loop, batch, steps=2)
    after = everything(loop)
    assert found.host_reads
    for part in before:
        assert same(before[part], after[part]), part
    assert same(batch, BATCH)
    assert getattr(loop.objective, "largest", None) == hidden


def test_training_is_the_same_after_an_audit():
    plain, audited = (loop_of(Net(), ax.Optimizer("sgd", lr=0.1, momentum=0.9)) for _ in range(2))
    data = ax.ArrayDataset(*BATCH)
    for loop in (plain, audited):
        loop.fit(data, data, steps=6, batch_size=8)
    ax.audit(audited, BATCH)
    for loop in (plain, audited):
        loop.fit(data, data, epochs=2, batch_size=8)
    assert same(dict(plain.objective.state_dict()), dict(audited.objective.state_dict()))
    assert plain.state.history == audited.state.history


def test_two_audits_are_the_same():
    loop = loop_of(Reading(), ax.Optimizer("adamw", lr=0.1, average="ema"))
    assert ax.audit(loop, BATCH) == ax.audit(loop, BATCH)


def test_a_metric_of_the_users_gets_nothing():
    metric = torchmetrics.classification.MulticlassAccuracy(2, validate_args=False)
    found = ax.audit(loop_of(Net(), metrics={"own": metric}), BATCH)
    assert [(read.what, "torchmetrics" in read.line) for read in found.reads] == [("bincount", True)]
    assert metric.update_count == 0


def test_what_a_step_does_to_a_batch_reaches_neither_it_nor_the_next_step(capsys):
    class Spoiling(Net):
        def predict(self, x):
            print(float(x.sum()))  # what it keeps in the class is put back
            return super().predict(x.mul_(0.5))

    batch = (X.clone(), BATCH[1])
    ax.audit(loop_of(Spoiling()), batch)
    assert torch.equal(batch[0], X)
    seen = capsys.readouterr().out.split()
    assert len(seen) > 5
    assert len(set(seen)) == 1


def test_averages_that_a_fit_has_left_in_the_module_are_there_afterwards():
    loop = loop_of(Net(), ax.Optimizer("sgd", lr=0.5, average=ax.averages.ema(0.9)))
    loop.fit(ax.ArrayDataset(*BATCH), epochs=3, batch_size=8)
    shown = copy.deepcopy(dict(loop.objective.state_dict()))
    ax.audit(loop, BATCH)
    assert same(shown, dict(loop.objective.state_dict()))
    assert loop.state.optimizers["main"].average.raw is not None


class Failing(Net):
    """Fails at its sixth step: while it is counted."""

    def __init__(self, error, at=6):
        super().__init__()
        self.error, self.left = error, at

    def loss(self, logits, labels):
        self.left -= 1
        if not self.left:
            raise self.error
        return super().loss(logits, labels)


@pytest.mark.parametrize("at", [1, 6, 9, 15])
def test_a_step_that_fails_leaves_nothing_behind(at):
    loop = loop_of(Failing(RuntimeError("by design"), at))
    gc.disable()
    try:
        before = everything(loop)
        with pytest.raises(RuntimeError, match="by design") as info:
            ax.audit(loop, BATCH)
        after = everything(loop)
    finally:
        gc.enable()
    assert info.value.__notes__
    for part in before:
        assert same(before[part], after[part]), part


def test_ctrl_c_ends_it():
    class Interrupting(Net):
        def loss(self, logits, labels):
            signal.raise_signal(signal.SIGINT)
            return super().loss(logits, labels)

    loop = loop_of(Interrupting())
    before = everything(loop)
    with pytest.raises(KeyboardInterrupt):
        ax.audit(loop, BATCH)
    assert same(before, everything(loop))


def test_it_goes_in_a_thread():
    found = []
    loop = loop_of(Reading())
    thread = threading.Thread(target=lambda: found.append(ax.audit(loop, BATCH)))
    thread.start()
    thread.join(60)
    assert found[0].host_reads == 7


def test_a_step_that_is_not_finite_is_warned_of_and_counted_as_any_other():
    bad = (torch.full_like(X, float("nan")), BATCH[1])
    with pytest.warns(ax.NonFiniteWarning):
        found = ax.audit(loop_of(Net(), ax.Optimizer("sgd", lr=0.1, patience=100)), bad)
    assert found.host_reads == 0


# --- what cannot be audited -------------------------------------------------------------------------------------------


DATA = ax.ArrayDataset(*BATCH)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Net(), BATCH), r"audit\(Net, ...\): the Loop"),
        ((ax.Loop, BATCH), r"a class: call it"),
        ((loop_of(Net()), ax.Loader(DATA, 8)), r"audit\(loop, Loader\): one batch.*next\(iter\(loader\)\)"),
        ((loop_of(Net()), DataLoader(TensorDataset(*BATCH), 8)), r"next\(iter\(loader\)\)"),
        ((loop_of(Net()), DATA), r"of a dataset next\(iter\(ax.Loader\(dataset, 32\)\)\)"),
        ((loop_of(Net()), TensorDataset(*BATCH)), r"of a dataset next"),
        ((loop_of(Net()), iter([BATCH])), r"of an iterator next\(batches\)"),
        ((loop_of(Net()), None), "one batch, as train_step gets it, as a pair of tensors"),
        ((loop_of(Net()), "text"), "one batch"),
        ((loop_of(Net()), 3), "one batch"),
        ((ax.Loop(Net(), progress=False), BATCH), "no optimizer"),
        ((loop_of(Net(), {"net.4": ax.Optimizer("sgd", lr=0.1)}), BATCH), "no optimizer covers net.0.weight"),
    ],
)
def test_what_it_cannot_work_with_is_told(arguments, words):
    with pytest.raises(ax.ConfigurationError, match=f"(?s){words}"):
        ax.audit(*arguments)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_are_one_or_more(steps):
    with pytest.raises(ax.ConfigurationError, match="steps="):
        ax.audit(loop_of(Net()), BATCH, steps=steps)


def test_an_objective_that_cannot_be_copied_is_told():
    class Holding(Net):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(ax.ConfigurationError, match="Holding cannot be copied: TypeError"):
        ax.audit(loop_of(Holding()), BATCH)


def test_a_callback_that_ends_the_run_is_told():
    class Ending(ax.Callback):
        def after_batch(self, state):
            return ax.Stop("enough") if state.step == 5 else None

    with pytest.raises(ax.ConfigurationError, match=r"stopped at step 5 of 11 \(.*enough.*\).*leave that callback out"):
        ax.audit(loop_of(Net()), BATCH, callbacks=[Ending()])


def test_a_hook_cannot_audit_the_loop_that_it_runs_in():
    class Nested(ax.Callback):
        def after_batch(self, state):
            ax.audit(loop, BATCH)

    loop = loop_of(Net(), callbacks=[Nested()])
    with pytest.raises(ax.ConfigurationError, match="running already"):
        loop.fit(DATA, epochs=1)


# --- how it looks -----------------------------------------------------------------------------------------------------


def test_it_is_shown_as_text_and_in_a_notebook():
    class Marked(Net):
        def loss(self, logits, labels):
            loss = super().loss(logits, labels)
            assert loss.item() < 1e9, "<b>"
            return loss

    found = ax.audit(loop_of(Marked()), BATCH)
    text = str(found)
    assert text.startswith("audit: a step of 5\n  host reads ")
    assert re.search(r"1 × item, at .*test_audit\.py:\d+: assert loss\.item\(\)", text)
    for row in ("Python calls", "frames", "operators", "copies", "allocations", "recompilations"):
        assert f"\n  {row}" in text
    assert "GPU" not in text
    assert repr(found) == f"<Audit {text}>"
    assert "&lt;b&gt;" in found._repr_html_()
    assert "<b>" not in found._repr_html_()


def test_an_audit_of_what_is_compiled_counts_what_is_compiled():
    eager, one_graph = (
        ax.Loop(
            ax.Supervised(torch.nn.Linear(6, 2), "cross_entropy"),
            ax.Optimizer("sgd", lr=0.1),
            device="cpu",
            progress=False,
            compile=compile,
        )
        for compile in (False, True)
    )
    a, b = ax.audit(eager, BATCH), ax.audit(one_graph, BATCH)
    assert b.calls < 0.7 * a.calls
    assert b.frames == 0  # no backward of torch's
    assert b.operators == pytest.approx(a.operators, abs=1)  # as it is written
    assert b.recompilations == 0
    assert one_graph.report().graphs == 0  # nothing of the loop is changed


def test_what_callbacks_remember_is_as_it_was():
    stopping, guard = ax.EarlyStopping("train/loss", patience=3), ax.SpikeGuard()
    loop = loop_of(Net())
    loop.callbacks[:] = [stopping, guard]
    loop.fit([BATCH] * 3, epochs=2)
    before = [copy.deepcopy(one.state_dict()) for one in (stopping, guard)]
    ax.audit(loop, BATCH, callbacks=loop.callbacks)
    assert all(same(old, one.state_dict()) for old, one in zip(before, (stopping, guard), strict=True))


def test_a_callback_that_has_nothing_to_do_in_an_audit_is_named(tmp_path):
    loop = loop_of(Net())
    with pytest.raises(ax.ConfigurationError) as told:
        ax.audit(loop, BATCH, callbacks=[ax.Checkpoint()])
    assert "leave those out that save" in told.value.__notes__[-1]


def test_an_objective_that_keeps_results_with_their_graph_is_audited():
    class Keeps(Net):
        def predict(self, x):
            self.last = super().predict(x)
            return self.last

    loop = loop_of(Keeps())
    loop.fit([BATCH] * 2, epochs=1)
    assert ax.audit(loop, BATCH).operators > 0
