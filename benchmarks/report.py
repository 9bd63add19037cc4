"""From runs to tables."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import WORKLOADS, Workload

Run = dict[str, Any]

HEADER = ["contender", "µs/step", "ratio (min–max)", "CPU ratio", "final loss", "import s", "first fit s", "peak MiB"]


def of_contenders(runs: Iterable[Run], workload: str) -> dict[str, dict[int, Run]]:
    """Sort a workload's runs: contender → round → run."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run["workload"] == workload:
            found.setdefault(run["contender"], {})[run["round"]] = run
    return found


def middle(by_round: dict[int, Run], key: str) -> float:
    """Return the median over rounds."""
    return median(run[key] for run in by_round.values())


def reference(found: dict[str, dict[int, Run]]) -> str | None:
    """Return the fastest of the tensor loops written by hand, by the median over rounds."""
    tensors = [name for name in found if CONTENDERS[name].tensors]
    return min(tensors, key=lambda name: middle(found[name], "us_per_step"), default=None)


def ratios(by_round: dict[int, Run], against: dict[int, Run], key: str) -> list[float]:
    """Return this contender's time over the reference's, round by round: what slows a whole round cancels out."""
    return [run[key] / against[number][key] for number, run in by_round.items() if number in against]


def disagreement(work: Workload, run: Run, against: Run) -> str:
    """Say in what a run differs from the reference beyond the tolerance: not the same training, not the same cost."""
    pairs = {"final loss": (run["final_loss"], against["final_loss"])}
    pairs |= {name: (run["tracked"].get(name), value) for name, value in against["tracked"].items()}
    for name, (ours, theirs) in pairs.items():
        if ours is None:
            return f"no {name}"
        close = abs(ours - theirs) <= work.tolerance * theirs
        if not close:  # written so that NaN differs
            return f"differs: {name} {ours:.4f}"
    return ""


def rows(runs: list[Run], workload: str, versions: dict[str, str]) -> list[list[str]]:
    """Make a workload's rows, fastest first."""
    found = of_contenders(runs, workload)
    against = found.get(reference(found) or "", {})
    made: list[tuple[float, list[str]]] = []
    for name, by_round in found.items():
        run = next(iter(by_round.values()))
        wall, cpu = (ratios(by_round, against, key) for key in ("us_per_step", "cpu_us_per_step"))
        loss = f"{run['final_loss']:.4f}"
        if against:
            loss = f"{loss} {disagreement(WORKLOADS[workload], run, next(iter(against.values())))}".strip()
        row = [
            title(name, versions),
            f"{middle(by_round, 'us_per_step'):.0f}",
            f"{median(wall):.2f} ({min(wall):.2f}–{max(wall):.2f})" if wall else "–",
            f"{median(cpu):.2f}" if cpu else "–",
            loss,
            f"{middle(by_round, 'import_seconds'):.2f}" if CONTENDERS[name].package else "–",
            f"{middle(by_round, 'warmup_seconds'):.2f}",
            f"{middle(by_round, 'peak_mib'):.0f}",
        ]
        made.append((middle(by_round, "us_per_step"), row))
    return [row for _, row in sorted(made)]


def summary(runs: list[Run], workloads: list[str], versions: dict[str, str]) -> list[list[str]]:
    """Make one row a contender: its median ratio on each workload, a star where its losses differ."""
    made: dict[str, list[tuple[float, str]]] = {}
    for workload in workloads:
        found = of_contenders(runs, workload)
        against = found.get(reference(found) or "", {})
        for name, by_round in found.items():
            shares = ratios(by_round, against, "us_per_step")
            if shares:
                differs = disagreement(WORKLOADS[workload], by_round[min(by_round)], against[min(against)])
                text = f"{median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f}){'*' if differs else ''}"
                made.setdefault(name, []).append((median(shares), text))
    complete = {name: cells for name, cells in made.items() if len(cells) == len(workloads)}
    ordered = sorted(complete, key=lambda name: geometric_mean(share for share, _ in complete[name]))
    return [[title(name, versions), *(text for _, text in complete[name])] for name in ordered]


def title(name: str, versions: dict[str, str]) -> str:
    """Return a contender's name with its version."""
    return f"{CONTENDERS[name].title} {versions.get(name, '')}".strip()


def table(header: list[str], body: list[list[str]], *, markdown: bool) -> str:
    """Lay out rows: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        laid = [cells[0].ljust(widths[0]), *(cell.rjust(widths[i]) for i, cell in enumerate(cells) if i)]
        return f"| {' | '.join(laid)} |" if markdown else "  ".join(laid)

    rule = ["-" * (width - 1) + (":" if i and markdown else "-") for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, body)])


def heading(name: str, *about: str, arguments: Sequence[str] | None = None) -> str:
    """Say what was run, when, and where: the command without the option that only changes how it prints."""
    given = shlex.join(one for one in (sys.argv[1:] if arguments is None else arguments) if one != "--markdown")
    command = f"python -m benchmarks.{name} {given}".strip()
    return ", ".join([f"`{command}`", datetime.now(UTC).date().isoformat(), machine(), *about])


def machine() -> str:
    """Name the machine as far as it says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {platform.system()}, Python {platform.python_version()}"
