"""Background: work done by a forked process, on the memory as it is at the moment of the fork.

What the other process does has to be simple: files, sums, and no kernel of torch's that would run on several threads.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from axontrain.errors import CheckpointError

AVAILABLE = sys.platform == "linux"  # elsewhere a fork of a process with threads is not safe, or cannot die with its parent
DONE = b"done"
MOST_TOLD = 5000  # characters: what a pipe takes at once, however they are written
_RUNNING: list[Job] = []


class Job:
    """One piece of work in a process of its own, which ends with this one. Only one is waited for, by whoever made it.

    Args:
        work: what is done there; what it raises is raised here, by :meth:`result`.
        place: the directory that it works in, for :func:`settle`.
    """

    def __init__(self, work: Callable[[], object], place: Path | None = None) -> None:
        parent = os.getpid()
        self._told, tell = os.pipe()
        # Ctrl-C and SIGTERM go to whole groups of processes: what becomes of them is the parent's to say.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: there are threads, as in torch there are
                self.pid = os.fork()
            if self.pid == 0:
                _do(work, tell, parent)
        except OSError:
            os.close(self._told)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(tell)
        self._text: bytes | None = None
        atexit.register(self._finish)  # the program does not end before it
        self.place = None if place is None else place.resolve()
        _RUNNING.append(self)

    def over(self) -> bool:
        """Whether it has ended; does not wait."""
        if self._text is None:
            import select

            if not select.select([self._told], [], [], 0)[0]:
                return False
            self._finish()
        return True

    def result(self) -> None:
        """Wait for the end.

        Raises:
            OSError: as the work raised it.
            CheckpointError: if it failed otherwise.
        """
        self._finish()
        if self._text == DONE:
            return
        if not self._text:
            raise CheckpointError("the process that wrote it was killed, as the system does when memory runs out")
        told = json.loads(self._text)
        if told["errno"] is not None:
            raise OSError(told["errno"], told["text"])
        raise CheckpointError(told["text"])

    def _finish(self) -> None:
        if self._text is not None:
            return
        parts = []
        while part := os.read(self._told, 65536):  # to its end: the other side closes with its process
            parts.append(part)
        self._text = b"".join(parts)
        os.close(self._told)
        with contextlib.suppress(ChildProcessError):  # somebody who waits for all children was quicker
            os.waitpid(self.pid, 0)
        atexit.unregister(self._finish)
        _RUNNING.remove(self)


def settle(place: Path) -> None:
    """Wait for what this process has begun in a directory, and whoever began it did not wait for."""
    place = place.resolve()
    for job in tuple(_RUNNING):  # it leaves while it is gone through
        if job.place == place:
            job._finish()


def _do(work: Callable[[], object], tell: int, parent: int) -> None:
    """The whole life of the other process. Nothing of the parent's is to be finished, flushed or collected in it."""
    try:
        gc.disable()
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
        if os.getppid() != parent:  # which died before that was said
            os._exit(1)
        work()
        os.write(tell, DONE)
    except BaseException as error:
        number = getattr(error, "errno", None)
        text = getattr(error, "strerror", None) if number is not None else None
        where = getattr(error, "filename", None)
        told = f"{text or error}" + (f": {where}" if text and where else "")
        if not isinstance(error, (OSError, CheckpointError)):
            told = f"{type(error).__name__}: {told}"
        os.write(tell, json.dumps({"errno": number, "text": told[:MOST_TOLD]}).encode())
    finally:
        os._exit(0)
