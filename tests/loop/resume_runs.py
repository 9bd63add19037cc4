"""Runs that are broken off at any step, by another process than the one that goes on with them.

``python resume_runs.py REQUEST`` breaks runs off as a JSON file asks; ``finish`` goes on with one; ``outcome`` is all of a run.
"""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import axontrain as ax

ROWS = r"/meter/(tasks/\w+/)?example/\d+/0/0"
WAYS = ("kill", "raise", "stop", "int", "term")


@dataclass(frozen=True)
class Case:
    """One run; the defaults are three epochs of five batches, less one batch: it ends in the middle of an epoch."""

    optimizer: str = "adamw"
    workers: int = 0
    validate: str = "1 epoch"
    samples: int = 36
    batch_size: int = 8
    drop_last: bool = False
    epochs: int = 3
    steps: int | None = 14
    patience: int = 50
    data: str = "augmented"
    keep_last: int | None = 2

    @property
    def name(self):
        return "-".join(f"{value}".replace(" ", "_") for value in dataclasses.astuple(self))


class Augmented:
    """Samples that draw from all three generators; which were read is written to a file."""

    def __init__(self, samples, seed=0, log=None):
        self.x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
        self.log = log

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(f"{index}\n")
        x = self.x[index] + 0.1 * torch.randn(6) + 0.1 * float(np.random.normal()) + 0.1 * random.random()
        return x, (self.x[index].sum() > 0).long()


class Streamed:
    """Batches of a source that can only be read on, and says where it stands."""

    def __init__(self, samples, batch_size, log=None):
        self.rows, self.batch_size, self.at, self.log = Augmented(samples), batch_size, 0, log

    def __iter__(self):
        start, self.at = self.at, 0
        for first in range(start, len(self.rows), self.batch_size):
            self.at = first + self.batch_size
            if self.log is not None:
                with Path(self.log).open("a") as file:
                    file.write(f"{first}\n")
            rows = [self.rows[i] for i in range(first, min(self.at, len(self.rows)))]
            yield tuple(map(torch.stack, zip(*rows, strict=True)))
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Net(ax.Objective):
    metrics = ("accuracy", "auroc")

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
        self.during_eval = lambda: None

    def predict(self, x):
        return self.net(x + 0.1 * float(np.random.normal()) + 0.1 * random.random())

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)

    def eval_step(self, batch):
        self.during_eval()
        return super().eval_step(batch)


class Gan(ax.Objective):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
        self.critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(16, 1))
        self.during_eval = lambda: None

    def predict(self, noise):
        return self.generator(noise)

    def train_step(self, batch):
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 3))
        yield "critic", F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake.detach())).mean()
        yield "generator", F.softplus(-self.critic(fake)).mean()

    def eval_step(self, batch):
        self.during_eval()
        real = batch[0]
        return ax.Step(F.mse_loss(self.generator(torch.randn(len(real), 3)).mean(0), real.mean(0)), weight=len(real))


class Tally(ax.Callback):
    """A callback of the user's, with tensors."""

    def __init__(self, **cadence):
        super().__init__(**cadence)
        self.count, self.losses = 0, torch.zeros(2)

    def after_batch(self, state):
        self.count += 1
        loss = state.last.loss.detach().sum()
        self.losses = self.losses * torch.tensor([1.0, 0.5]) + loss

    def state_dict(self):
        return {"count": self.count, "losses": self.losses}

    def load_state_dict(self, state):
        self.count, self.losses = state["count"], state["losses"]


class Drawing(ax.Callback):
    """Draws in every hook that a run without a break has once."""

    def before_fit(self, state):
        torch.rand(3)

    def before_epoch(self, state):
        np.random.rand(2)

    def before_batch(self, state):
        random.random()

    def after_batch(self, state):
        torch.rand(1)

    def before_evaluate(self, state):
        torch.rand(2)

    def after_evaluate(self, state):
        np.random.rand(1)

    def after_epoch(self, state):
        random.random()

    def after_fit(self, state):
        torch.rand(1)
        np.random.rand(1)


class Leaps(ax.SpikeGuard):
    """Leaves out what leaps a little, and says nothing."""

    def _tell(self, found):
        return


def matrices(name, parameter):
    return parameter.ndim == 2


OPTIMIZERS = {
    "adamw": lambda: ax.Optimizer("adamw", lr=0.01, schedule=ax.schedules.cosine(warmup="10%")),
    "sgd": lambda: ax.Optimizer("sgd", lr=0.05, momentum=0.9, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5)),
    "rmsprop": lambda: ax.Optimizer("rmsprop", lr=0.01, clip_norm=0.5),
    "muon": lambda: ax.Optimizer("adamw", lr=0.01, groups={matrices: {"optimizer": "muon", "lr": 0.02}}),
    "gan": lambda: {
        "generator": ax.Optimizer("adam", lr=0.01),
        "critic": ax.Optimizer("rmsprop", lr=0.005, schedule=ax.schedules.linear()),
    },
}


def training_data(case, log=None):
    if case.data == "streamed":
        return Streamed(case.samples, case.batch_size, log)
    if case.data == "list":
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return [(x, (x.sum(1) > 0).long()) for x in torch.randn(case.samples, 6).split(case.batch_size)]
    rows = Augmented(case.samples, log=log)
    if case.data == "mixture":
        rows = ax.Mixture({"a": rows, "b": Augmented(12, seed=7)}, weights=[2, 1])
    return ax.Loader(rows, case.batch_size, shuffle=True, workers=case.workers, drop_last=case.drop_last)


def make(case, directory=None, *, every=None, start=0, checkpoint=None, log=None, own=(), **how):
    """A Loop for a case, and the arguments of its fit: as the script says it each time that it is started."""
    with torch.random.fork_rng():
        torch.manual_seed(start)
        objective = (Gan if case.optimizer == "gan" else Net)()
    callbacks = [
        ax.EarlyStopping("val/loss", patience=case.patience, min_delta=0.01 if case.patience == 50 else 10.0),
        ax.ReduceLROnPlateau("val/loss", patience=1, factor=0.5, min_delta=10.0, cooldown=1),
        ax.LearningRate(every=3),
        Tally(),
        Tally(every=2),
        Drawing(),
        *([] if case.optimizer == "gan" else [Leaps(deviations=0.5, window=3, look=4)]),
        *own,
    ]
    if checkpoint is not None:
        callbacks.append(checkpoint)
    elif every is not None:
        callbacks.append(ax.Checkpoint(every=every, keep_last=case.keep_last))
    loop = ax.Loop(objective, OPTIMIZERS[case.optimizer](), callbacks=callbacks, progress=False, directory=directory)
    loop.on("after_batch", every="10%")(tenth)
    limits = {"epochs": case.epochs, "steps": case.steps, "validate": case.validate}
    data = {"train": training_data(case, log), "validation": ax.Loader(Augmented(16, seed=1), 8)}
    return loop, {**data, **limits, **how}


def tenth(state):
    state.record({"tenth": state.samples})


def flat(tree, path=""):
    """Every leaf of a state by its path."""
    if isinstance(tree, dict):
        return {key: leaf for name, part in tree.items() for key, leaf in flat(part, f"{path}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {key: leaf for i, part in enumerate(tree) for key, leaf in flat(part, f"{path}/{i}").items()}
    return {path: tree}


def leaves(tree):
    """What of a saved state has to be the same; but for times, and the saving itself."""
    found = flat({**tree, "attached": {}, "meter": taken_in(tree["meter"])})
    found |= {
        key: leaf
        for name, part in tree["attached"].items()
        if not name.startswith("cadence/Checkpoint")
        for key, leaf in flat(part, f"/attached/{name}").items()
    }
    # Of the example that metrics are built by, the number of rows says nothing: it is that of any batch.
    return {key: leaf for key, leaf in found.items() if "elapsed" not in key and not re.fullmatch(ROWS, key)}


def taken_in(meter):
    """What a meter holds, without metrics that have nothing: whether those were built yet is no difference."""
    metrics = {name: of for name, of in meter["metrics"].items() if of["updates"] or of["waiting"]}
    return {**meter, "metrics": metrics, "tasks": {task: taken_in(of) for task, of in meter["tasks"].items()}}


def outcome(loop, result=None, directory=None):
    """All that a run has come to, by name."""
    found = leaves(loop.save())
    if result is not None:
        found["status"], found["reason"], found["at"] = result.status, result.reason, (result.epoch, result.step)
        found |= flat({"result": {"values": result.values, "history": result.history.rows}})
    if directory is not None:
        found |= flat({"file": merged(directory)})
        rows = [{name: value if value == value else "nan" for name, value in row.items()} for row in loop.state.history.rows]
        assert merged(directory) == rows, "history.jsonl is not the history"
    return found


def merged(directory):
    """The rows of history.jsonl, as a reader puts them together; each reading is there once."""
    rows = {}
    for line in (Path(directory) / "history.jsonl").read_text().splitlines():
        new = json.loads(line)
        row = rows.setdefault(new["step"], {})
        twice = set(row) & set(new) - {"step", "epoch"}
        assert not twice, f"{twice} of step {new['step']} are there twice"
        row.update(new)
    assert list(rows) == sorted(rows)
    return list(rows.values())


def differences(one, other):
    """The names of what is not the same, bit for bit."""
    return [name for name in {**one, **other} if name not in one or name not in other or not same(one[name], other[name])]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def whole(case, directory=None, **how):
    """The outcome of the run that nothing breaks off."""
    loop, fit = make(case, directory, **how)
    result = loop.fit(**fit)
    return outcome(loop, result, directory)


def finish(case, directory, **how):
    """Start the script again: another Loop, whose weights are others where there is a checkpoint to take them from."""
    begun = any(Path(directory).glob("step-*"))
    loop, fit = make(case, directory, start=int(begun), **how)
    result = loop.fit(**fit, resume=True)
    return outcome(loop, result, directory)


def break_off(case, directory, how, step, **options):
    """Run until ``step`` was done, and no further. After ``kill`` and ``raise`` the newest checkpoint is all there is."""
    every = 1 if how in ("kill", "raise") else None
    loop, fit = make(case, directory, **{"every": every, **options})

    def here(state):
        if state.step != step:
            return None
        if how == "raise":
            raise ZeroDivisionError
        if how == "stop":
            return ax.Stop("enough")
        os.kill(os.getpid(), {"int": signal.SIGINT, "term": signal.SIGTERM}[how])

    def killed(state):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    if how == "kill":  # when the step was saved: before the next one, or at the very end
        loop.on("before_batch")(killed)
        loop.on("after_fit")(killed)
    else:
        loop.on("after_batch")(here)
    try:
        result = loop.fit(**fit)
    except ZeroDivisionError:
        assert how == "raise"
    except SystemExit as ending:
        if (how, ending.code) != ("term", 143):
            raise
    else:
        assert (how, result.status) in (("stop", "stopped"), ("int", "interrupted")), (how, result)
    assert loop.state.step == step
    return loop


def kill(case, directory, step, **options):
    """Break a run off by SIGKILL, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            break_off(case, directory, "kill", step, **options)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def way(number, step):
    """The ways of stopping alternate over the steps, from another one on in each case."""
    return WAYS[(number + step) % len(WAYS)]


def broken_off(cases, root):
    """Break off every case after every step, in another process. Returns its exit."""
    request = Path(root) / "request.json"
    told = [(number, dataclasses.asdict(case), last) for number, case, last in cases]
    request.write_text(json.dumps({"root": str(root), "cases": told}))
    return subprocess.Popen([sys.executable, "-W", "error", __file__, str(request)], env=environment())


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def main(path):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program started in the background has none
    asked = json.loads(Path(path).read_text())
    for number, described, last in asked["cases"]:
        case = Case(**described)
        for step in range(1, last + 1):
            how, directory = way(number, step), Path(asked["root"]) / f"{number}-{step}"
            if how == "kill":
                kill(case, directory, step)
            else:
                break_off(case, directory, how, step)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    main(sys.argv[1])
