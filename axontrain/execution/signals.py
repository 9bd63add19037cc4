"""Ctrl-C and SIGTERM: the first asks the run to end after the step in hand; a second Ctrl-C raises KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

CTRL_C, SIGTERM = "Ctrl-C", "SIGTERM"
TERMINATED = 128 + signal.SIGTERM  # the exit status that shells and schedulers expect of what SIGTERM has ended


@contextlib.contextmanager
def interruptible(ask: Callable[[str], None]) -> Iterator[None]:
    """Call ``ask`` with the name at the first SIGINT, and at any SIGTERM, within the block. Handlers are put back after it.

    Only the main thread can take signals, and a handler that is not Python's own belongs to the user: both are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask(CTRL_C)

    def on_terminate(_signal: int, _frame: FrameType | None) -> None:
        ask(SIGTERM)

    with contextlib.ExitStack() as handlers:
        for number, plain, handler in (
            (signal.SIGINT, signal.default_int_handler, on_interrupt),
            (signal.SIGTERM, signal.SIG_DFL, on_terminate),
        ):
            before = signal.getsignal(number)
            if before is plain:
                signal.signal(number, handler)
                handlers.callback(signal.signal, number, before)
        yield
