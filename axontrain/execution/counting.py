"""Counting: what is done within a block, as numbers that are the same each time: calls, operators, copies, allocations.

Each counter may be entered again and again, and goes on from where it stood. Calls are counted apart from the rest, since
seeing an operator is a call itself.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from axontrain.execution import reads
from axontrain.execution.lines import OWN, TORCH, of_frames, of_traceback, told
from axontrain.execution.reads import HostReads, base_name

AUDIT = f"{OWN}audit.py"  # whose own calls are none of the step's
APART = (__file__, reads.__file__, AUDIT)
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")  # calls up to Python 3.11
COPIES = ("_to_copy", "copy_", "clone", "_foreach_copy_")


class Calls:
    """Counts calls of functions within it: of Python's own, and of those that are compiled in.

    Attributes:
        python: functions of Python's that were called, and generators that were gone on with.
        own: those of them that are axontrain's.
        builtin: functions that are compiled into Python, torch or another library.
        frames: of axontrain, between the block and the deepest ``Tensor.backward``.

    >>> with Calls() as calls:
    ...     _ = (lambda: len("abc"))()
    >>> calls.python, calls.own
    (1, 0)
    """

    def __init__(self) -> None:
        self.python = self.own = self.builtin = self.frames = 0
        self._before: Any = None
        self._collecting = False

    def __enter__(self) -> Calls:
        self._collecting = gc.isenabled()
        gc.disable()  # when it comes is chance, and what somebody has it call would be counted
        self._before = sys.getprofile()
        sys.setprofile(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        sys.setprofile(self._before)
        if self._collecting:
            gc.enable()

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        """Take in an event of Python's profiler."""
        code = frame.f_code
        path = code.co_filename
        if path in APART or code.co_name in COMPREHENSIONS:
            return
        if event == "call":
            self.python += 1
            if path.startswith(OWN):
                self.own += 1
            elif code is Tensor.backward.__code__:
                self.frames = max(self.frames, sum(where.startswith(OWN) for where, _ in of_frames(frame, AUDIT)))
        elif event == "c_call":
            self.builtin += 1


class Operations(HostReads):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__
    """Counts the operators of torch within it, below autograd, and what they copy, allocate and read.

    Attributes:
        operators: how many.
        copies, copied_bytes: the operators that copy a tensor, to where it was or to another device or dtype.
        allocations, allocated_bytes: new memory that results lie in; what a kernel needs while it runs is not seen.
        reads: how often the host read, by what it did, the line of the user's, and that of the library between.

    >>> with Operations() as operations:
    ...     _ = torch.ones(2, 4).t().contiguous().view(8)
    >>> operations.operators, operations.copied_bytes, operations.allocations, operations.allocated_bytes
    (4, 32, 2, 64)
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(self._read, device)
        self.operators = self.copies = self.copied_bytes = self.allocations = self.allocated_bytes = 0
        self.reads: Counter[tuple[str, str, str]] = Counter()

    @property
    def host_reads(self) -> int:
        """How often the host read, wherever."""
        return sum(self.reads.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and do it."""
        given = dict(_storages((args, kwargs)))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operators += 1
        new = {place: size for place, size in _storages(out) if place not in given}
        self.allocations += len(new)
        self.allocated_bytes += sum(new.values())
        if base_name(func) in COPIES:
            self.copies += 1
            into = args[0] if out is None else out  # of several at once
            self.copied_bytes += sum(leaf.nbytes for leaf in _pytree.tree_leaves(into) if isinstance(leaf, Tensor))
        return out

    def _read(self, word: str) -> None:
        places = [place for place in of_frames(sys._getframe(1), AUDIT) if place[0] not in APART]
        line, through = told(places)
        node: Any = torch._C._current_autograd_node()
        if node is not None and (not line or line.startswith((OWN, TORCH))):  # on a GPU, backward has a thread of its own
            of_forward = told(of_traceback(node.metadata.get("traceback_") or [], AUDIT))  # what has led to it
            line, through = of_forward if of_forward[0] else (line or node.name(), through)
            word = f"{word}, in backward"
        self.reads[word, line, through] += 1


def _storages(tree: Any) -> list[tuple[int, int]]:
    """The memory of the tensors of a tree: which it is, and its bytes; none that is empty."""
    found = []
    for leaf in _pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not is_traceable_wrapper_subclass(leaf):
            storage = leaf.untyped_storage()
            if storage.nbytes():
                found.append((storage._cdata, storage.nbytes()))
    return found
