"""What keeps a step from being compiled: torch's reason, and the line of the user's that it is about."""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from axontrain.execution.lines import is_users, written


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


class UntraceableError(Exception):
    """Why a step cannot become one graph, found before torch has tried."""


def reason_of(error: BaseException) -> tuple[str, str]:
    r"""Torch's reason in short, and the line of the user's: ``path:number: source``; "" where none is to blame.

    >>> reason_of(ValueError("no such thing\n\nand much more"))
    ('no such thing', '')
    """
    stack: Iterable[traceback.FrameSummary] = getattr(error, "real_stack", None) or ()
    places = ((frame.filename, frame.lineno or 0) for frame in reversed([*stack]))
    line = next((written(path, number) for path, number in places if is_users(path)), "")
    texts = [text.strip() for text in str(error).strip().splitlines() if text.strip()]
    reason = texts[0] if texts else type(error).__name__
    explained = next((text.partition("Explanation: ")[2] for text in texts if text.startswith("Explanation: ")), "")
    if explained:
        reason = f"{reason} ({explained.rstrip('.')})"
    inner = getattr(error, "inner_exception", None)
    if inner is not None:  # of the compiler behind Dynamo
        reason = f"{type(inner).__name__}: {next(iter(str(inner).strip().splitlines()), '')}"
    return reason, line
