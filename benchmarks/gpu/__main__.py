"""What training costs on a GPU: axontrain, the same by hand, and other frameworks, on three workloads, in one table.

`python -m benchmarks.gpu --data FOLDER --peers peers/bin/python` (FOLDER with cifar10-train.parquet, cifar10-test.parquet and
tinyshakespeare.txt; without it pictures and tokens are made up). It is meant to take eight minutes on one H100 without
peers; `--only` takes it apart.

CIFAR-10: the network of airbench94 in bfloat16 and eager, trained anew in each turn. GPT: GPT-2's 124 million parameters in
bfloat16, compiled. MLP: 784-256-256-10, batches of 64, Adam, in float32.

Each contender of a workload is a process of its own, which warms up (compiles, captures, has cuDNN choose) in a turn that is
not counted. In each round all take their turns, in an order of the round's own, while the others stand still. All train on the
same batches, which lie on the device; their final losses, and torch's settings, have to agree, or the table says "differs". A
ratio is taken within a round, against the fastest loop by hand of its column (of the MLP, that in eager). The clock waits for
the device; it runs from the end of an epoch to the end of a later one, so that what a framework does before and after a fit is
left out. "s to 94 %" is all of a training: building, initialising, ten epochs, evaluation with its augmentation; in brackets
where 94 % were not reached.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from axontrain.execution.peaks import peak_of
from benchmarks import report
from benchmarks.gpu import cifar_data, tables
from benchmarks.gpu.cifar import GOAL
from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.processes import FailedError, Process
from benchmarks.gpu.tables import Found
from benchmarks.gpu.task import Given
from benchmarks.gpu.worker import END
from benchmarks.gpu.workloads import WORKLOADS
from benchmarks.processes import Place, add_peers, places

TURN, WARM_UP = 120.0, 300.0  # seconds after which a contender is given up
TEXT = "tinyshakespeare.txt"


def main() -> int:
    """Measure, print the tables, and return 1 if a contender failed or did another training."""
    arguments = _arguments()
    started = time.monotonic()
    cuda = arguments.device == "cuda"
    wanted = [CONTENDERS[name] for name in arguments.contenders]
    asked = [one for one in wanted if (arguments.peers or not one.peer) and (cuda or not one.cuda)]
    where = places(asked, arguments.peers)
    taking_part = {one.name: place for one in asked if (place := where[one.name])}
    with tempfile.TemporaryDirectory() as folder:
        given = _given(arguments, Path(folder))
        found: list[Found] = []
        for name in arguments.only:
            found.append(measure(name, given, taking_part, arguments))
            if arguments.json:  # at once, for whom the time may run out
                arguments.json.write_text(json.dumps({one.name: vars(one) for one in found}, indent=1))

    about = (
        torch.cuda.get_device_name() if cuda else "no GPU",
        f"torch {torch.__version__}",
        f"rounds: {arguments.rounds}; medians.",
    )
    print(report.heading("gpu", *about))
    titles = {
        one.name: f"{one.title} {taking_part[one.name].version if one.peer else ''}".strip()
        for one in wanted
        if one.name in taking_part
    }
    for caption, (header, body) in (
        ("Time of a step or an epoch, as a ratio to the fastest loop by hand", tables.rows(found, titles)),
        ("The same in figures", tables.figures(found, titles)),
    ):
        print(f"\n{'**' + caption + '**' if arguments.markdown else caption}\n")
        print(report.table(header, body, markdown=arguments.markdown))
    print()
    for line in [*tables.verdicts(found, judged=cuda and not arguments.small), *_notes(found, given, wanted, where, arguments)]:
        print(f"- {line}" if arguments.markdown else line)
    wrong = False
    for one in found:
        for contender, failure in one.failures.items():
            print(f"\n{one.title}, {CONTENDERS[contender].title} failed:\n{failure}", file=sys.stderr)
            wrong = True
        wrong = wrong or any(one.differs(contender) for contender in one.turns)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)
    return 1 if wrong else 0


def measure(name: str, given: Given, taking_part: dict[str, Place], arguments: argparse.Namespace) -> Found:
    """Have all contenders of a workload take turns."""
    work = WORKLOADS[name]
    found = Found(name, work.title, work.tolerance)
    found.extra = {} if work.extra is None else work.extra(given)
    found.goal = GOAL if given.cifar is not None and name == "cifar" and not given.small else None
    found.peak = _peak(arguments)
    processes: dict[str, Process] = {}

    def answers(contenders: list[str], order: str, timeout: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Have them do something at the same time; of those who have not failed, what they answer."""
        there = [contender for contender in contenders if contender not in found.failures]
        for contender in there:
            if order:
                processes[contender].order(order)
        for contender in there:
            try:
                yield contender, processes[contender].answer(timeout)
            except FailedError as error:
                found.failures[contender] = str(error)
                processes[contender].close()
                _tell(f"{name}, {contender}: failed")

    try:
        for contender, place in taking_part.items():
            if name in CONTENDERS[contender].workloads:
                command = _command(name, contender, place, given, arguments)
                processes[contender] = Process(command, cpu=given.device.type == "cpu")
        every = list(processes)
        deque(answers(every, "", WARM_UP), maxlen=0)  # they load at the same time
        # On a GPU they warm up one by one, for some choose by time how they will go on.
        for together in [[one] for one in every] if given.device.type == "cuda" else [every]:
            for contender, answer in answers(together, "warm up", WARM_UP):
                _tell(f"{name}, {contender}: warm-up {answer['warm_up']:.1f} s")
        shuffled = random.Random(0)
        for number in range(arguments.rounds):
            for contender in shuffled.sample(every, len(every)):
                for _, answer in answers([contender], "turn", TURN):
                    found.turns.setdefault(contender, {})[number] = answer
                    _tell(f"{name}, round {number + 1}/{arguments.rounds}, {contender}: {answer['turn']:.2f} s")
        for contender in every:
            found.ends |= answers([contender], END, TURN)
    finally:
        for process in processes.values():
            process.close()
    return found


def _command(name: str, contender: str, place: Place, given: Given, arguments: argparse.Namespace) -> list[str]:
    command = [place.python, "-m", "benchmarks.gpu.worker", name, contender, "--device", given.device.type]
    command += ["--rounds", str(arguments.rounds)] + ["--small"] * given.small
    for option, path in (("--cifar", given.cifar), ("--text", given.text)):
        command += [] if path is None else [option, str(path)]
    return command


def _given(arguments: argparse.Namespace, folder: Path) -> Given:
    """Find the data; what is in Parquet is decoded once, for all processes."""
    data, cifar, text = arguments.data, None, None
    if data is not None:
        data = data.resolve()
        beside = data if data.is_dir() else data.parent
        text = beside / TEXT if (beside / TEXT).exists() else None
        cifar = beside / cifar_data.CONVERTED if data.is_dir() else data
        if not cifar.exists():
            cifar = None
            if "cifar" in arguments.only and all(cifar_data.parquet(data, part).exists() for part in cifar_data.PARTS):
                cifar = folder / cifar_data.CONVERTED
                cifar_data.convert(data, cifar)
                _tell("CIFAR-10 is decoded")
        if cifar is None and text is None:
            sys.exit(f"--data {data}: there is no {cifar_data.CONVERTED}, cifar10-*.parquet or {TEXT}")
    return Given(torch.device(arguments.device), arguments.small, cifar, text)


def _peak(arguments: argparse.Namespace) -> float | None:
    if arguments.peak is not None:
        return arguments.peak * 1e12
    return peak_of(torch.cuda.get_device_name(), "half") if arguments.device == "cuda" else None


def _notes(
    found: list[Found], given: Given, wanted: list[Any], where: dict[str, Place | None], arguments: argparse.Namespace
) -> list[str]:
    """What a reader has to know beside the figures."""
    lines = []
    if "cifar" in arguments.only and given.cifar is None:
        lines.append("CIFAR-10: its pictures were made up (--data has none), and so is its accuracy.")
    if "gpt" in arguments.only:
        lines.append(f"GPT: {'characters of ' + TEXT if given.text else 'tokens at random'}.")
    if given.device.type == "cpu":
        lines.append("On a CPU, in float32 and on one thread: a trial of the command, which says nothing of a GPU.")
    for one in wanted:
        if one.cuda and given.device.type != "cuda":
            lines.append(f"Left out: {one.title}, which needs a GPU.")
        elif one.peer and not arguments.peers:
            lines.append(f"Left out: {one.title}, for --peers names no environment that has it.")
        elif where.get(one.name) is None:
            lines.append(f"Not installed: {one.title}.")
    for one in found:
        for contender in one.turns:
            if differs := one.differs(contender):
                lines.append(f"{one.title}, {CONTENDERS[contender].title} differs: {differs}.")
            told = one.ends.get(contender, {}).get("told")
            if told and CONTENDERS[contender].workloads[one.name]:
                lines.append(f"{one.title}, {CONTENDERS[contender].title}: {told}.")
    if len({end.get("torch") for one in found for end in one.ends.values()}) > 1:
        lines.append("The environments have different versions of torch: do not compare their rows.")
    return lines


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="a folder with real data, or what benchmarks.gpu.cifar_data has written",
    )
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    add_peers(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="the device's peak in bfloat16, where it is not known")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every turn there, after each workload")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --device cpu --small tries the command without one")
    if given.data is not None and not given.data.exists():
        parser.error(f"--data {given.data}: there is no such file or folder")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: 1 or more")
    return given


if __name__ == "__main__":
    sys.exit(main())
