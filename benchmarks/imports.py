"""What `import axontrain` adds to `import torch`, and what other frameworks add.

`python -m benchmarks.imports --peers peers/bin/python`. Fresh processes, interleaved; a first round, in which Python
compiles to bytecode, is thrown away.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from statistics import median

from benchmarks import report
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.processes import ENVIRONMENT, ROOT, places

GOAL_MS = 150
# Users have bytecode; where the environment says that none is written, each round would compile all of it again.
WITH_BYTECODE = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONDONTWRITEBYTECODE"}
IMPORTS = {  # where the package that a user imports is not the one that is looked for
    "fabric": "lightning.fabric",
    "lightning": "lightning.pytorch",
    "ignite": "ignite.engine, ignite.metrics",
    "torchtnt": "torchtnt.framework",
    "transformers": "transformers.trainer",
}

_TIME = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
before, started, cpu = len(sys.modules), time.perf_counter(), time.process_time()
import {modules}
seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
print(json.dumps([seconds * 1e3, cpu_seconds * 1e3, len(sys.modules) - before]))
"""


def main() -> int:
    """Measure and print the table; 1 where axontrain misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", action="append", default=[], metavar="PYTHON", help="may be given more than once")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()

    contenders = [each for each in CONTENDERS.values() if each.package and each.name != "lightning_sums"]
    installed = {name: place for name, place in places(contenders, arguments.peers).items() if place}
    commands = {
        name: [place.python, "-c", _TIME.format(modules=modules(CONTENDERS[name]))] for name, place in installed.items()
    }
    times: dict[str, list[list[float]]] = {name: [] for name in installed}
    order = random.Random(0)
    for number in range(arguments.rounds + 1):
        for name in order.sample(list(installed), len(installed)):
            done = subprocess.run(commands[name], cwd=ROOT, env=WITH_BYTECODE, check=True, capture_output=True, text=True)
            if number:
                times[name].append(json.loads(done.stdout.splitlines()[-1]))

    body = []
    for name, measured in sorted(times.items(), key=lambda item: median(item[1])):
        wall, cpu, count = zip(*measured, strict=True)
        spread = f"{median(wall):.0f} ({min(wall):.0f}–{max(wall):.0f})"
        title = f"{modules(CONTENDERS[name])} {installed[name].version}".strip()
        body.append([title, spread, f"{median(cpu):.0f}", f"{median(count):.0f}"])
    print(f"{report.heading('imports', f'rounds: {arguments.rounds}; medians.')}\n")
    header = ["import, after torch", "ms (min–max)", "CPU ms", "modules"]
    print(report.table(header, body, markdown=arguments.markdown))
    ours = median(wall for wall, _, _ in times["axontrain"])
    print(f"\naxontrain: {ours:.0f} ms, the goal is {GOAL_MS}: {'met' if ours <= GOAL_MS else 'missed'}.")
    return int(ours > GOAL_MS)


def modules(contender: Contender) -> str:
    """Return what a user of this framework imports to train."""
    return IMPORTS.get(contender.name, contender.package or "")


if __name__ == "__main__":
    sys.exit(main())
