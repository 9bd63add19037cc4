"""Background: work done by a forked process, on the memory as it is at the moment of the fork.

What the other process does has to be simple: files, sums, and no kernel of torch's that would run on several threads.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from axontrain.errors import CheckpointError

# Elsewhere a fork of a process with threads is not safe, or cannot die with its parent.
AVAILABLE = sys.platform == "linux" and hasattr(torch.multiprocessing, "_prctl_pr_set_pdeathsig")
NICE = 10  # training goes first where there are not cores enough for both
MOST_TOLD = 5000  # characters of an error
KILLED = "the process that wrote it was killed (by the system when memory runs out, or with the thread that began it)"
ELSEWHERE = json.dumps({"errno": None, "text": "another process has begun it, and waits for it"}).encode()
_RUNNING: list[Job] = []


def _forget_in_child() -> None:
    # Of whoever forks this process: what was begun here is not its child's to wait for, whose end would be disturbed by it.
    for job in _RUNNING:
        atexit.unregister(job._finish)
        os.close(job._told)
        job._text = ELSEWHERE
    _RUNNING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _give_back_free_memory() -> None:
    # What was freed, as gradients after an update, and not given back would be shared with the child, and copied page by page
    # as soon as training writes to it again: of a state of 1 GB that took half a second. A fresh page is only cleared.
    with contextlib.suppress(AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


class Job:
    """One piece of work in a process of its own, which ends with this one. Only one is waited for, by whoever made it.

    The system ends it with the thread that began it, too.

    Args:
        work: what is done there. What it returns, plain values, is returned here by :meth:`result`; what it raises is raised.
        place: the directory that it works in, for :func:`settle`.
    """

    def __init__(self, work: Callable[[], object], place: Path | None = None) -> None:
        parent = os.getpid()
        self.place = None if place is None else place.resolve()
        self._text: bytes | None = None
        self._parts: list[bytes] = []
        _give_back_free_memory()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            # Signals go to whole groups of processes, and what is to be done about them is the parent's. In the child they
            # stay blocked; here they come when it is known what has been begun.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self._told, tell = os.pipe()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: there are threads, as in torch
                    self.pid = os.fork()
                if self.pid == 0:
                    _do(work, tell, parent)
            except BaseException:
                os.close(self._told)
                raise
            finally:
                os.close(tell)
            atexit.register(self._finish)  # the program does not end before it
            _RUNNING.append(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def over(self) -> bool:
        """Whether it has ended; does not wait."""
        if self._text is None:
            look = select.poll()  # select() takes no descriptor beyond 1023
            look.register(self._told, select.POLLIN)
            if not look.poll(0):
                return False
            self._finish()
        return True

    def result(self) -> Any:
        """Wait for the end; what the work returned.

        Raises:
            OSError: as the work raised it.
            CheckpointError: if it failed otherwise.
        """
        self._finish()
        try:
            told = json.loads(self._text or b"")
        except ValueError as error:  # it ended without a word, or within one
            raise CheckpointError(KILLED) from error
        if "done" in told:
            return told["done"]
        if told["errno"] is not None:
            raise OSError(told["errno"], told["text"])
        raise CheckpointError(told["text"])

    def _finish(self) -> None:
        if self._text is not None:
            return
        while part := os.read(self._told, 65536):  # to its end: the other side closes with its process
            self._parts.append(part)
        self._text = b"".join(self._parts)
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
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]  # AVAILABLE has looked
        if os.getppid() != parent:  # which died before that was said
            os._exit(1)
        os.nice(NICE)
        _tell(tell, {"done": work()})
    except BaseException as error:
        number = getattr(error, "errno", None)
        text = getattr(error, "strerror", None) if number is not None else None
        where = getattr(error, "filename", None)
        told = f"{text or error}" + (f": {where}" if text and where else "")
        if not isinstance(error, (OSError, CheckpointError)):
            told = f"{type(error).__name__}: {told}"
        _tell(tell, {"errno": number, "text": told[:MOST_TOLD]})
    finally:
        os._exit(0)


def _tell(tell: int, what: Any) -> None:
    left = json.dumps(what).encode()
    while left:
        left = left[os.write(tell, left) :]
