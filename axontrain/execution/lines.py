"""Lines: which line of whose code is being run, of the frames of a stack or of a traceback as autograd keeps it."""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

OWN, TORCH = f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}"
STDLIB, INSTALLED = f"{Path(os.__file__).parent}{os.sep}", {"site-packages", "dist-packages"}
TYPED_IN = ("<ipython-input", "<python-input", "<stdin>", "<doctest")  # anything else in angle brackets is made by a program
# Of torch, what stands between whoever calls a function and its kernel.
BETWEEN = (
    "_tensor", "_dynamo", "_compile.py", "_ops.py", "_jit_internal.py", "autograd", "functional.py", "optim/optimizer.py",
    "overrides.py", "utils",
)  # fmt: skip
THIN = tuple(f"{TORCH}{name}" for name in BETWEEN)

Place = tuple[str, int]  # a file, and a line from 1


def of_frames(frame: Any, last: str) -> Iterator[Place]:
    """The places of a frame and those that called it, innermost first, up to before the file ``last``."""
    while frame is not None and frame.f_code.co_filename != last:
        yield frame.f_code.co_filename, frame.f_lineno or 0
        frame = frame.f_back


def of_error(error: BaseException) -> Iterator[Place]:
    """The places that an error came through, innermost first."""
    return ((frame.f_code.co_filename, line) for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]))


def of_traceback(entries: Iterable[str], last: str) -> Iterator[Place]:
    """The same of a traceback in text, as autograd's anomaly mode notes it, whose innermost entry is its last."""
    for entry in reversed(list(entries)):
        head = entry.strip().partition("\n")[0]
        path = head.split('"')[1]
        if path == last:
            return
        yield path, int(head.split(", line ")[1].split(",")[0])


def told(places: Iterable[Place]) -> tuple[str, str]:
    """The innermost line of the user's, and the line of a library that it went through; "" where there is none.

    Where none is the user's, the library's is the first of the two; or else that of axontrain or torch.
    """
    users = library = ours = ""
    for path, number in places:
        if is_users(path):
            users = written(path, number)
            break
        if path.startswith("<"):
            continue
        if path.startswith((OWN, TORCH)):
            if not ours and not path.startswith(THIN):
                ours = written(path, number)
        elif not INSTALLED.isdisjoint(Path(path).parts):
            library = library or written(path, number)
    return (users, library) if users else (library or ours, "")


def is_users(path: str) -> bool:
    """Whether a file is the user's own: not torch's, ours, Python's or one that was installed, nor made by a program."""
    if path.startswith("<"):
        return path.startswith(TYPED_IN)
    return not path.startswith((OWN, TORCH, STDLIB)) and INSTALLED.isdisjoint(Path(path).parts)


def written(path: str, number: int) -> str:
    """A place as it is told: "file:line: source"."""
    return f"{path}:{number}: {linecache.getline(path, number).strip()}".rstrip(": ")
