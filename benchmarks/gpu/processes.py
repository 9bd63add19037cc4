"""The process of a contender, as the command that starts it sees it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from typing import Any

from benchmarks.processes import ROOT

ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class FailedError(Exception):
    """A contender's process has ended, or taken too long; the message is the end of what it wrote."""


class Process:
    """A process that answers each line with a line of JSON.

    Args:
        command: what runs.
        cpu: whether it is to see no GPU, and to have one thread.
    """

    def __init__(self, command: list[str], *, cpu: bool) -> None:
        environment = os.environ | {"PYTHONHASHSEED": "0"} | (ON_CPU if cpu else {})
        self.told = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.told,
            start_new_session=True,
        )
        self._rest = b""

    def order(self, what: str) -> None:
        """Have it do something, of which :meth:`answer` waits for the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(f"{what}\n".encode())
            self.process.stdin.flush()

    def answer(self, timeout: float) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            FailedError: if there is none within so many seconds.
        """
        assert self.process.stdout is not None
        until, found = time.monotonic() + timeout, self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(found, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, until - time.monotonic())):
                    self._kill()
                    raise FailedError(f"{self._tail()}\ntook more than {timeout:.0f} s")
                chunk = os.read(found, 65_536)
                if not chunk:
                    raise FailedError(self._tail())
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it, whatever it is at, with all that it has started."""
        self._kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]  # both are pipes
        self.told.close()

    def _kill(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _tail(self) -> str:
        """The end of what it wrote, once it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.told.seek(max(0, self.told.seek(0, os.SEEK_END) - 4000))
        text = self.told.read().decode(errors="replace").strip()
        return text or f"exit status {self.process.poll()}, no output"
