"""Recording: the kernels that a function starts on a GPU, recorded once in a CUDA graph, and started again together.

Starting a kernel from Python takes some microseconds, which small ones do not; a graph starts hundreds of them at once
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). They run on the same memory each time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

SYNCHRONISES = "called a synchronizing CUDA operation"  # torch's words, in its sync debug mode


def available(device: torch.device) -> bool:
    """Whether kernels can be recorded there."""
    return device.type == "cuda"


class Recorder:
    """Records graphs of one device, whose memory is shared: of a generation, which is given back together.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _stream(device)
        self.pool: Any = None

    def renew(self) -> None:
        """Begin a new generation: all recordings were closed, and what torch has kept for them is not to be used again."""
        self.pool = None

    def wait(self) -> None:
        """Until the device has done what it was given."""
        torch.cuda.synchronize(self.device)

    @staticmethod
    def on_host(drawn: Iterable[Any]) -> str:
        """Which of the generators that were drawn from is of the host, whose numbers a recording would repeat.

        Args:
            drawn: names of the global ones ("cuda" is the device's), and others themselves.
        """
        for one in drawn:
            if isinstance(one, torch.Generator) and one.device.type == "cuda":
                continue
            if one != "cuda":
                return one if isinstance(one, str) else f"a {type(one).__name__} of its own"
        return ""

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[tuple[str, int]]]:
        """Do the block on the stream that is recorded on later, as torch asks for, after and before all else.

        Gives a list, in which after the block are the places (file, line) that have waited for the device.
        """
        current, waits = torch.cuda.current_stream(self.device), list[tuple[str, int]]()
        mode = torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(max(mode, 1))
            try:
                with torch.cuda.stream(self.stream):
                    yield waits
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                current.wait_stream(self.stream)
        for one in told:
            if SYNCHRONISES in str(one.message):
                waits.append((one.filename, one.lineno))
            elif "Synchronization debug mode" not in str(one.message):  # which says that it is a prototype
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def record(self, function: Callable[[], Any], generators: Iterable[Any] = ()) -> tuple[Recording, Any]:
        """Call a function, whose kernels are recorded and do not run; returns the recording and what the function gave.

        Args:
            function: that.
            generators: beside the default one, those that are drawn from; others than of the device do not count.

        Raises:
            Exception: what the function raised, or torch, of something that cannot be recorded.
        """
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        own = [one for one in generators if isinstance(one, torch.Generator) and one.device.type == "cuda"]
        graph, current = _graph(own), torch.cuda.current_stream(self.device)
        collecting = gc.isenabled()
        gc.disable()  # what it would free meanwhile may be of another graph, or wait for the device
        try:
            # Other threads, as those that save or pin memory, go on with what is not allowed while something is recorded.
            with (
                _redirected(),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                given = function()
        except BaseException:
            torch.cuda.set_stream(current)  # torch leaves its own in place where the beginning fails
            graph.reset()
            self._recover(own)
            raise
        finally:
            if collecting:
                gc.enable()
        return Recording(graph), given

    def _recover(self, generators: list[torch.Generator]) -> None:
        """After a recording that failed: end what it has begun, as torch does not.

        Its allocator would take memory from the pool for good (https://github.com/pytorch/pytorch/issues/180395), and its
        generators would take themselves for recorded.
        """
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.device)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        for end in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(RuntimeError, AttributeError, TypeError):
                getattr(torch._C, end)(index, self.pool)
        self.renew()
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is next to empty
            graph = _graph(generators)
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                torch.zeros((), device=self.device)
            graph.reset()


def _graph(generators: list[torch.Generator]) -> Any:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph


@functools.cache
def _stream(device: torch.device) -> Any:
    # One for all: torch's libraries keep memory for each.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own


class Recording:
    """Kernels that were recorded."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self.replay: Callable[[], None] = graph.replay  # in the present stream

    def close(self) -> None:
        """Give its memory back: before a process group ends, as NCCL waits for graphs with its kernels."""
        self._graph.reset()
        self.replay = _closed


def _closed() -> None:
    raise RuntimeError("this recording was closed")


@contextlib.contextmanager
def _redirected() -> Iterator[None]:
    """Where something holds on to the node that adds up a parameter's gradient, it keeps the stream that it was made on."""
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)  # of torch 2.13
    if override is None:
        yield
        return
    override(True)
    try:
        yield
    finally:
        override(False)
