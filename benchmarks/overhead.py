"""What a training step costs: axontrain, loops written by hand, and other frameworks on the same four workloads.

`python -m benchmarks.overhead --peers peers/bin/python` (an environment made from requirements-peers.txt).

Each run is a process of its own, on one thread, after a warm-up; rounds go through all contenders in an order of their
own. A ratio is taken within a round, against the fastest of the tensor loops written by hand; the table has its median
and its range. "first fit" is the warm-up of eight steps, which no ratio counts: what a framework imports only when it
is used is in there. The final loss is that of the trained weights over the training set; "differs" marks a contender
that did not do the same training. All keep loss and accuracy of each epoch; the frameworks have what they can do without
switched off, and get the torch optimizer in its faster implementation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import report
from benchmarks.contenders import CONTENDERS
from benchmarks.processes import Place, add_peers, in_terminal, places
from benchmarks.workloads import WORKLOADS

TIMEOUT = 600.0


def main() -> int:
    """Measure, print the tables, and return 1 if a run failed."""
    arguments = _arguments()
    started = time.monotonic()
    found = places((CONTENDERS[name] for name in arguments.contenders), arguments.peers)
    taking_part = {name: place for name, place in found.items() if place}
    runs: list[report.Run] = []
    failures: dict[str, str] = {}
    order = random.Random(0)
    for number in range(arguments.rounds):
        names = list(taking_part)
        order.shuffle(names)
        for name in names:
            if name in failures:
                continue
            made, failure = measure(name, taking_part[name], arguments.workloads)
            runs += [run | {"round": number} for run in made]
            times = ", ".join(f"{run['workload']} {run['us_per_step']:.0f} µs" for run in made)
            print(f"round {number + 1}/{arguments.rounds}: {name}: {times or 'failed'}", file=sys.stderr)
            if failure:
                failures[name] = failure

    versions = {name: place.version for name, place in taking_part.items()}
    torches = sorted({run["torch"] for run in runs})
    facts = {
        "command": f"python -m benchmarks.overhead {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{report.machine()}, torch {', '.join(torches)}, {os.cpu_count()} cores, one thread used",
        "rounds": arguments.rounds,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(facts | {"versions": versions, "failures": failures, "runs": runs}, indent=1))
    print(f"`{facts['command']}`, {facts['date']}, {facts['machine']}, rounds: {arguments.rounds}; medians.")
    if len(torches) > 1:
        print("\nThe environments have different versions of torch: do not compare their rows.")
    for name in arguments.workloads:
        title = f"{name}: {WORKLOADS[name].title}"
        rows = report.rows(runs, name, versions)
        print(f"\n{'**' + title + '**' if arguments.markdown else title}\n")
        print(report.table(report.HEADER, rows, markdown=arguments.markdown))
    print("\nAll ratios, to each workload's fastest tensor loop by hand\n")
    rows = report.summary(runs, arguments.workloads, versions)
    print(report.table(["contender", *arguments.workloads], rows, markdown=arguments.markdown))
    if missing := [CONTENDERS[name].title for name, place in found.items() if place is None]:
        print(f"\nNot installed: {', '.join(missing)}.")
    for name, failure in failures.items():
        print(f"\n{CONTENDERS[name].title} failed:\n{failure}", file=sys.stderr)
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes", file=sys.stderr)
    return 1 if failures else 0


def measure(name: str, place: Place, workloads: list[str]) -> tuple[list[report.Run], str]:
    """Run a contender's workloads; return what was measured, and the end of its output if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.json"
        command = [place.python, "-m", "benchmarks.run", name, *workloads, "--out", str(out)]
        ended = in_terminal(command, timeout=TIMEOUT)
        runs = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    barred = any(WORKLOADS[workload].bar for workload in workloads)
    if ended.status:
        return runs, ended.tail.strip() or f"exit status {ended.status}, no output"
    return runs, "its progress bar wrote nothing" if barred and not ended.written else ""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add_peers(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
