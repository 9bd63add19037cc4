"""What the tests of workers look at: the table of processes."""

import os
import time
from pathlib import Path


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(of=None):
    """The processes that a process has started and that are alive; not Python's own tracker of shared memory."""
    parent = str(of or os.getpid())
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if stat[1] == parent and stat[0] != "Z" and "resource_tracker" not in command and "forkserver" not in command:
            found.append(int(entry.name))
    return found


def gone(pids, within=10.0):
    """Whether all the processes end in time."""
    ends = time.monotonic() + within
    while any(map(alive, pids)):
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True
