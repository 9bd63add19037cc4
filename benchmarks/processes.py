"""Where contenders are installed, and a process under a terminal of its own."""

from __future__ import annotations

import argparse
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import Contender

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "KERAS_BACKEND": "torch",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "TERM": "xterm",
}

_LOOK = """
import json, sys
from importlib import metadata, util
found = {}
for package, distribution in json.loads(sys.argv[1]):
    if util.find_spec(package):
        try:
            found[package] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[package] = ""
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Place:
    """The interpreter that runs a contender, and the version it has there."""

    python: str
    version: str = ""


def places(contenders: Iterable[Contender], peers: Iterable[str]) -> dict[str, Place | None]:
    """Find the first interpreter, this one and then the peers', that can import each contender; None where none can."""
    contenders = list(contenders)
    wanted = [(each.package, each.distribution) for each in contenders if each.package]
    found: dict[str, Place | None] = {each.name: None if each.package else Place(sys.executable) for each in contenders}
    for python in (sys.executable, *peers):
        command = [python, "-c", _LOOK, json.dumps(wanted)]
        versions = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for each in contenders:
            if found[each.name] is None and each.package in versions:
                found[each.name] = Place(python, versions[each.package])
    return found


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it wrote to its terminal."""

    status: int
    written: int
    tail: str


def add_peers(parser: argparse.ArgumentParser) -> None:
    """Let a command be told where other frameworks are installed: for :func:`places`."""
    parser.add_argument(
        "--peers",
        action="append",
        default=[],
        metavar="PYTHON",
        help="the interpreter of an environment with other frameworks; may be given more than once",
    )


def in_terminal(command: list[str], *, timeout: float) -> Ended:
    """Run a command with a pseudo-terminal for its output, so that each progress bar behaves as before a person."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    written, tail = 0, b""

    def drain() -> None:
        nonlocal written, tail
        while True:
            try:
                chunk = os.read(reader, 65_536)
            except OSError:  # Linux's way of saying that nobody holds the other end
                return
            if not chunk:
                return
            written += len(chunk)
            tail = (tail + chunk)[-4_000:]

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        status = process.wait(timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        tail += b"\ntook too long"
    thread.join(5)
    os.close(reader)
    return Ended(status, written, tail.decode(errors="replace"))
