"""Kill a training process at random instants, start it again with the same script, and compare what it ends with.

`python -m benchmarks.kills --kills 2000 --seed 0` prints what it counted, and exits with 1 if anything went wrong. Every
process is a real one that SIGKILL ends; this one forks them, so that a start costs no imports. `tests/checkpoint/test_kills.py`
does the same with fewer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import axontrain as ax
from axontrain.checkpoint import read, write
from axontrain.checkpoint.directory import is_whole
from axontrain.checkpoint.runs import NAME
from benchmarks import report
from benchmarks.fuzz_checkpoints import different, same

ROOT = Path(__file__).parent.parent
EVERY, EPOCHS, SAMPLES, BATCH = 2, 3, 24, 4
STEPS = EPOCHS * SAMPLES // BATCH
KEPT = ("history.jsonl", ".lock")  # what a run directory has beside its checkpoints
SUBREAPER, DIE_WITH_PARENT = 36, 1  # of prctl(2)
EXITING = 4  # of the flags of a process in proc(5)


@dataclass
class Counts:
    """What was seen; all from ``torn`` on has to be 0."""

    kills: int = 0
    at_start: int = 0  # of them: before the first step
    while_saving: int = 0  # of them: something was left beside the checkpoints
    while_writer_wrote: int = 0  # of them: another process was writing
    finished: int = 0  # runs
    resumed: int = 0  # starts that went on from a checkpoint
    afresh: int = 0  # starts that had none
    torn: int = 0  # a checkpoint under its own name does not verify
    unrecoverable: int = 0  # there was a checkpoint, and the next start failed, or did not go on from the newest
    lost: int = 0  # more than the cadence promises
    not_swept: int = 0  # something left beside the checkpoints after the next start, or the end
    wrong: int = 0  # the end is not that of the run that was not interrupted
    left_behind: int = 0  # a process that outlived the one that was killed
    told: list[str] = field(default_factory=list)  # the first of what went wrong

    @property
    def bad(self) -> int:
        """How often anything went wrong."""
        names = [one.name for one in fields(self)]
        return sum(getattr(self, name) for name in names[names.index("torn") : -1])

    def tell(self, what: str, text: str) -> None:
        """Count something that went wrong."""
        setattr(self, what, getattr(self, what) + 1)
        if len(self.told) < 10:
            self.told.append(f"{what}: {text}")


def run(kills: int, seed: int) -> Counts:
    """Kill so often, in a process of its own: a process that forks ought to have no threads."""
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", str(kills), "--seed", str(seed), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"benchmarks.kills ended with {done.returncode}: {done.stderr}")
    return Counts(**json.loads(done.stdout.splitlines()[-1]))


# --- what is killed ----------------------------------------------------------------------------------------------------------


class Reporter(ax.Callback):
    """Says through a pipe where a run stands."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def before_fit(self, state: ax.LoopState) -> None:
        assert state.directory is not None
        left = [path.name for path in state.directory.iterdir() if not is_expected(path)]
        self.say(resumed=state.step, left=left)

    def after_batch(self, state: ax.LoopState) -> None:
        self.say(step=state.step)

    def say(self, **what: Any) -> None:
        os.write(self.pipe, json.dumps({"at": time.monotonic(), **what}).encode() + b"\n")


def is_expected(path: Path) -> bool:
    """Whether a file belongs into a run directory while nothing is being saved."""
    return path.name in KEPT or (
        NAME.fullmatch(path.name) is not None and ".tmp-" not in path.name and ".old-" not in path.name
    )


def script(directory: Path, reporter: Reporter, asynchronous: bool, best: bool) -> tuple[ax.Loop, ax.Result]:
    """What a user would write, and start again after a crash."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    data = ax.ArrayDataset(torch.randn(SAMPLES, 4), torch.randint(3, (SAMPLES,)))
    ranking = {"best": "val/loss", "keep_best": 2} if best else {}
    loop = ax.Loop(
        ax.Supervised(net, "cross_entropy"),
        ax.Optimizer("adamw", lr=0.01),
        callbacks=[reporter, ax.Checkpoint(f"{EVERY} steps", keep_last=2, asynchronous=asynchronous, **ranking)],
        directory=directory,
        device="cpu",
        progress=False,
    )
    return loop, loop.fit(data, data, epochs=EPOCHS, batch_size=BATCH, validate="3 steps", resume=True)


def live(directory: Path, pipe: int, asynchronous: bool, best: bool) -> NoReturn:
    """The life of a forked process."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        warnings.simplefilter("error")
        reporter = Reporter(pipe)
        try:
            loop, result = script(directory, reporter, asynchronous, best)
            rows = [dict(row) for row in result.history.rows]
            write(directory.with_name(f"{directory.name}-end"), {"state": loop.save(), "rows": rows, "status": result.status})
            reporter.say(ended=True)
            status = 0
        except BaseException:
            reporter.say(failed=traceback.format_exc())
    finally:
        os._exit(status)


# --- what kills --------------------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """How long the parts of a life take, in seconds: so that kills are spread over all of it."""

    start: float = 0.05
    step: float = 0.02
    end: float = 0.05

    def life(self, steps: int) -> float:
        return self.start + self.step * steps + self.end

    def learn(self, begun: float, over: float, lines: list[dict[str, Any]]) -> None:
        """Take in how a life went, a tenth of it."""
        if not lines or "resumed" not in lines[0]:
            self.start += 0.1 * max(0.0, over - begun - self.start)
            return
        self.start += 0.1 * (lines[0]["at"] - begun - self.start)
        steps = [line for line in lines if "step" in line]
        if steps:
            self.step += 0.1 * ((steps[-1]["at"] - lines[0]["at"]) / len(steps) - self.step)
            if lines[-1].get("ended"):
                self.end += 0.1 * (lines[-1]["at"] - steps[-1]["at"] - self.end)


class Killer:
    """Runs that are killed over and over.

    Args:
        directory: an empty one.
        seed: of when it kills.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self.chance, self.counts = directory, random.Random(seed), Counts()
        self.expected = {False: Expected(), True: Expected()}
        self.ends: dict[bool, Any] = {}
        ctypes.CDLL(None).prctl(SUBREAPER, 1)  # orphans become children of this process, which can see and count them

    def uninterrupted(self, best: bool) -> Any:
        """The end of a run that nobody kills."""
        if best not in self.ends:
            if not self.ends:  # here, so that those that are forked have imported all that torch imports late
                script(self.directory / "first", Reporter(os.open(os.devnull, os.O_WRONLY)), False, False)
            path = self.directory / f"uninterrupted-{best}"
            lines, killed, _, _ = self.life(path, 600.0, False, best)
            if killed or not lines[-1].get("ended"):
                raise RuntimeError(f"the uninterrupted run failed: {lines[-1]}")
            self.ends[best] = end_of(path)
        return self.ends[best]

    def kill(self, kills: int) -> Counts:
        """Begin runs and kill them, until so many kills are done."""
        number = 0
        while self.counts.kills < kills:
            self.one_run(self.directory / f"run-{number}", kills, asynchronous=number % 2 == 1, best=number % 4 >= 2)
            number += 1
        return self.counts

    def one_run(self, path: Path, kills: int, asynchronous: bool, best: bool) -> None:
        """Start a run again and again, until it ends by itself."""
        end, counts, expected = self.uninterrupted(best), self.counts, self.expected[asynchronous]
        newest = 0  # the step of the newest checkpoint that was seen whole
        while True:
            before = unexpected(path)
            more = counts.kills < kills
            after = self.chance.uniform(0, 1.3 * expected.life(STEPS - newest)) if more else 600.0
            begun = time.monotonic()
            lines, killed, died, orphans = self.life(path, after, asynchronous, best)
            expected.learn(begun, died, lines)
            told = f"{path.name} ({asynchronous=}, {best=}) from step {newest}, after {after:.4f} s: "
            if lines and "resumed" in lines[0]:
                counts.resumed += newest > 0
                counts.afresh += newest == 0
                if lines[0]["resumed"] != newest:
                    counts.tell("unrecoverable", f"{told}went on from step {lines[0]['resumed']}")
                if lines[0]["left"]:
                    counts.tell("not_swept", f"{told}{lines[0]['left']}")
            failed = [line["failed"] for line in lines if "failed" in line]
            if failed:
                counts.tell("unrecoverable" if newest else "wrong", told + failed[0])
                return
            torn, whole = checkpoints(path)
            for name in torn:
                counts.tell("torn", told + name)
            if not killed:
                break
            counts.kills += 1
            counts.at_start += not lines
            counts.while_saving += bool(unexpected(path) - before)
            counts.while_writer_wrote += orphans > 0
            done = max((line.get("step", 0) for line in lines), default=0)
            # Of the step that is reported here the save is still to come; one that another process writes is waited for only
            # when the next begins.
            promised = (done - 1) // EVERY * EVERY - (EVERY if asynchronous else 0)
            if max(whole, default=0) < max(promised, newest):
                counts.tell("lost", f"{told}step {done} was done, {whole} are there, {newest} was there before")
            newest = max(whole, default=0)
        counts.finished += 1
        if unexpected(path):
            counts.tell("not_swept", f"{told}{unexpected(path)} at the end")
        if not same(end_of(path), end):
            counts.tell("wrong", told + different(end_of(path), end))
        for one in (path, path.with_name(f"{path.name}-end")):
            shutil.rmtree(one)

    def life(self, path: Path, seconds: float, asynchronous: bool, best: bool) -> tuple[list[dict[str, Any]], bool, float, int]:
        """Let one process live for so long: what it said, whether it was killed, when, and how many processes it had."""
        ours, theirs = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(ours)
            live(path, theirs, asynchronous, best)
        os.close(theirs)
        handle = os.pidfd_open(process)
        select.select([handle], [], [], seconds)
        os.close(handle)
        os.kill(process, signal.SIGKILL)  # which does nothing to one that has ended by itself
        _, status = os.waitpid(process, 0)
        over = time.monotonic()
        orphans = self.reap(path)
        with open(ours, "rb") as stream:  # noqa: PTH123  # a descriptor
            lines = [json.loads(line) for line in stream.read().splitlines()]
        return lines, os.WIFSIGNALED(status), over, orphans

    def reap(self, path: Path) -> int:
        """Wait for the processes of the one that was killed, which have been killed with it; gives their number."""
        orphans = [int(number) for number in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        lively = [orphan for orphan in orphans if not is_exiting(orphan)]
        until = time.monotonic() + 5
        for orphan in orphans:
            while os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < until:
                time.sleep(0.0005)
            killed_late = os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            os.kill(orphan, signal.SIGKILL)
            _, status = os.waitpid(orphan, 0)
            if killed_late or (orphan in lively and not os.WIFSIGNALED(status)):
                self.counts.tell("left_behind", f"{path.name}: a process lived on after the one that had forked it")
        return len(orphans)


def is_exiting(process: int) -> bool:
    """Whether a process has ended, or is on its way to."""
    state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return state in "ZX" or bool(int(rest[5]) & EXITING)


def unexpected(path: Path) -> set[str]:
    """What lies in a run directory and is neither a checkpoint nor the run's."""
    return {one.name for one in path.iterdir() if not is_expected(one)} if path.is_dir() else set()


def checkpoints(path: Path) -> tuple[list[str], list[int]]:
    """The names of the checkpoints that do not verify, and the steps of those that do."""
    torn, whole = [], []
    for one in sorted(path.iterdir()) if path.is_dir() else ():
        match = NAME.fullmatch(one.name)
        if match is not None and is_expected(one):
            if is_whole(one):
                whole.append(int(match["step"]))
            else:
                torn.append(one.name)
    return torn, whole


def end_of(path: Path) -> Any:
    """What a run has ended with, in memory and on the disk, without what tells the time."""
    end = read(path.with_name(f"{path.name}-end"))
    newest = max((one for one in path.iterdir() if NAME.fullmatch(one.name)), key=lambda one: one.name)
    rows: dict[int, dict[str, Any]] = {}
    for line in (path / "history.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    kept = sorted(one.name for one in path.iterdir() if is_expected(one))
    return {
        **end,
        "checkpoint": timeless(read(newest)),
        "state": timeless(end["state"]),
        "lines": list(rows.values()),
        "kept": kept,
    }


def timeless(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the seconds that it took."""
    rest = {key: value for key, value in tree.items() if key not in ("counters", "plan")}
    for name in ("counters", "plan"):
        rest[name] = {key: value for key, value in tree[name].items() if "elapsed" not in key}
    return rest


def table(counts: Counts, seconds: float, *, markdown: bool) -> str:
    """The counts, a line each, and what went wrong."""
    numbers = {name: value for name, value in asdict(counts).items() if name != "told"}
    body = [[name.replace("_", " "), f"{value:,}"] for name, value in numbers.items()]
    body.append(["seconds", f"{seconds:,.0f}"])
    return "\n".join([report.table(["counted", "times"], body, markdown=markdown), *counts.told])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of when it kills; the instants themselves are the machine's")
    parser.add_argument("--directory", help="where the runs are; a temporary directory unless given")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        counts = Killer(Path(directory), arguments.seed).kill(arguments.kills)
    if arguments.json:
        print(json.dumps(asdict(counts)))
    else:
        print(f"{report.heading('kills', f'torch {torch.__version__}')}\n")
        print(table(counts, time.monotonic() - begun, markdown=arguments.markdown))
    return 1 if counts.bad else 0


if __name__ == "__main__":
    sys.exit(main())
