"""What keeps a step from being compiled: torch's reason, and the line of the user's that it is about."""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from axontrain.execution.lines import is_users, written

UNKNOWN = "something in the batch or in the module is another"
# What torch says of what is met often, and what it is about.
FAMILIAR = (
    (
        r"attempted to call in-place operation \(aten::(\w+).* mutate a captured Tensor",
        r"a step writes in place (\1) to a tensor that it has not computed: what it keeps can be a buffer (register_buffer), "
        r"and of its batch it takes a copy",
    ),
    (
        r"Could not guard on data-dependent expression (.+?) \(unhinted",
        r"Python goes by a number that the step computes, as by .item() (data-dependent: \1)",
    ),
    (
        r"TensorWrapper\.cpp",
        "torch.func, which differentiates a whole step, cannot follow a part of it, as one that computes its activations again "
        "or that writes to NumPy arrays",
    ),
)


@contextlib.contextmanager
def trying() -> Iterator[None]:
    """Have torch compile something, which may fail: what it warns of and logs is no news to the user, who is told why.

    Tracing that fails within torch.func leaves hooks on saved tensors forbidden, to the whole process.
    """
    autograd: Any = torch._C._autograd
    allowed, silent = autograd._saved_tensors_hooks_is_enabled(), logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(silent)
            if allowed and not autograd._saved_tensors_hooks_is_enabled():
                autograd._saved_tensors_hooks_enable()


def changed_for(graphs: int) -> tuple[str, str]:
    """What the last graphs were compiled for that torch has made, as it tells of its guards, and the line of the user's."""
    try:
        made = torch._dynamo.utils.get_compilation_metrics()[-graphs:]
        told = next((reason for one in made if (reason := one.recompile_reason)), "")
    except Exception:  # of another version of torch
        told = ""
    guard, _, stack = told.partition("User stack trace:")
    places = ((path, int(number)) for path, number in reversed(re.findall(r'File "(.+?)", line (\d+)', stack)))
    line = next((written(path, number) for path, number in places if is_users(path)), "")
    return in_short(guard.partition(": ")[2]).partition(" (")[0] or UNKNOWN, line


def in_short(guard: str) -> str:
    """A guard of torch's that failed, without its advice: what it was that held, and where that was read.

    >>> in_short("L['module']._modules['objective'].calls == 2    # self.calls += 1  # d/model.py:6 in predict (HINT: ...)")
    'objective.calls == 2 (d/model.py:6 in predict)'
    """
    held, *comments = re.split(r"\(HINT|\. Guard failed on", guard)[0].split("  # ")
    held = re.sub(r"L\['module'\]\._modules\['objective'\]|plain\.__self__", "objective", " ".join(held.split()))
    held = re.sub(r"_(?:modules|parameters|buffers)\['(\w+)'\]", r"\1", held)
    return f"{held} ({' '.join(comments[-1].split())})" if comments else held


class UntraceableError(Exception):
    """Why a step cannot become one graph, found before torch has tried."""


def reason_of(error: BaseException) -> tuple[str, str]:
    r"""Torch's reason in short, and the line of the user's: ``path:number: source``; "" where none is to blame.

    >>> reason_of(ValueError("no such thing\n\nand much more"))
    ('no such thing', '')
    >>> reason_of(RuntimeError("Could not guard on data-dependent expression u0 > 1 (unhinted: u0 > 1)."))[0]
    'Python goes by a number that the step computes, as by .item() (data-dependent: u0 > 1)'
    """
    stack: Iterable[traceback.FrameSummary] = getattr(error, "real_stack", None) or ()
    places = ((frame.filename, frame.lineno or 0) for frame in reversed([*stack]))
    line = next((written(path, number) for path, number in places if is_users(path)), "")
    for pattern, told in FAMILIAR:
        if found := re.search(pattern, str(error)):
            return found.expand(told), line
    texts = [text.strip() for text in str(error).strip().splitlines() if text.strip()]
    reason = texts[0] if texts else type(error).__name__
    explained = next((text.partition("Explanation: ")[2] for text in texts if text.startswith("Explanation: ")), "")
    if explained:
        reason = f"{reason} ({explained.rstrip('.')})"
    inner = getattr(error, "inner_exception", None)
    if inner is not None:  # of the compiler behind Dynamo
        reason = f"{type(inner).__name__}: {next(iter(str(inner).strip().splitlines()), '')}"
    return reason, line
