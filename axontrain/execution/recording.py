"""Recording: the kernels that a function starts on a GPU, recorded once in a CUDA graph, and started again together.

Starting a kernel from Python takes some microseconds, which small ones do not; a graph starts hundreds of them at once
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). They run on the same memory each time.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

SYNCHRONISES = "called a synchronizing CUDA operation"  # torch's words, in its sync debug mode


def available(device: torch.device) -> bool:
    """Whether kernels can be recorded there."""
    return device.type == "cuda"


class Recorder:
    """Records graphs of one device, in generations: those of one share memory and a stream, and are given back together.

    A generation begins with what is first done for it, and is over once all of its recordings are closed.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._generation: _Generation | None = None

    def renew(self) -> None:
        """Begin a new generation with the next recording, whether or not all of the last are closed."""
        self._generation = None

    def _now(self) -> _Generation:
        if self._generation is None or not self._generation.end.alive:
            self._generation = _Generation(self.device)
        return self._generation

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
        stream, current, waits = self._now().stream, torch.cuda.current_stream(self.device), list[tuple[str, int]]()
        mode = torch.cuda.get_sync_debug_mode()
        stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(max(mode, 1))
            try:
                with torch.cuda.stream(stream):
                    yield waits
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                current.wait_stream(stream)
        for one in told:
            if SYNCHRONISES in str(one.message):
                waits.append((one.filename, one.lineno))
            elif "Synchronization debug mode" not in str(one.message):  # which says that it is a prototype
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def record(self, function: Callable[[], Any], generators: Iterable[Any] = ()) -> tuple[Recording, Any]:
        """Call a function, whose kernels are recorded and do not run; returns the recording and what the function gave.

        The present device and stream are what they were afterwards, whatever happens.

        Args:
            function: that.
            generators: beside the default one, those that are drawn from; others than of the device do not count.

        Raises:
            Exception: what the function raised, or torch, of something that cannot be recorded. Other recordings of the
                generation are to be closed then, unless it was Ctrl-C.
        """
        own = [one for one in generators if isinstance(one, torch.Generator) and one.device.type == "cuda"]
        with torch.cuda.device(self.device):  # its memory is of the present one
            return self._record(function, own)

    def _record(self, function: Callable[[], Any], generators: list[torch.Generator]) -> tuple[Recording, Any]:
        generation, current, entered = self._now(), torch.cuda.current_stream(self.device), False
        graph = generation.graph(generators)
        collecting = gc.isenabled()
        try:
            gc.disable()  # what it would free meanwhile may be of another graph, or wait for the device
            # Other threads, as those that save or pin memory, go on with what is not allowed while something is recorded.
            with (
                _redirected(),
                torch.cuda.graph(graph, pool=generation.pool, stream=generation.stream, capture_error_mode="thread_local"),
            ):
                entered = True
                given = function()
        except BaseException:
            self._generation = None  # the allocators of torch may take its memory for one that is recorded in
            try:
                generation.failed(graph, generators, entered=entered)
            finally:
                with contextlib.suppress(Exception):  # torch leaves its own in place where a beginning or an end fails
                    torch.cuda.set_stream(current)
            del generation  # which is over now, if nothing else is of it; the frames of the error would hold on to it
            raise
        finally:
            if collecting:
                gc.enable()
        return Recording(graph, generation), given


class _Generation:
    """Graphs that share memory, on a stream that no other graph is recorded on while they are there.

    torch keeps memory of cuBLAS for each stream, whose address is in all graphs that were recorded on it; and lets go of it
    with the first of them that is reset (https://github.com/pytorch/pytorch/issues/193402).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _taken(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[Any] = []  # to be reset, all together
        self.recordings = weakref.WeakSet[Recording]()  # that are not closed
        self._reusable = [self.stream]
        self.end = weakref.finalize(
            self, _over, os.getpid(), device, self.graphs, self._reusable
        )  # or when nobody has it any more

    def graph(self, generators: list[torch.Generator]) -> Any:
        """One that nothing was recorded in."""
        graph = _graph(generators)
        self.graphs.append(graph)
        return graph

    def close(self, recording: Recording) -> None:
        """Give all memory back with the last recording; a graph that is reset before would take what the others use."""
        self.recordings.discard(recording)
        if not self.recordings:
            self.end()

    def failed(self, graph: Any, generators: list[torch.Generator], *, entered: bool) -> None:
        """End what a recording that failed has begun, as torch does not. The error is to be told: nothing is raised here.

        Args:
            graph: which it was to be in.
            generators: that were drawn from.
            entered: whether something was recorded.
        """
        with contextlib.suppress(Exception), torch.cuda.stream(self.stream), _unwarned():
            if torch.cuda.is_current_stream_capturing():  # Ctrl-C came between, or the function has left another stream
                graph.capture_end()
        with contextlib.suppress(Exception), torch.cuda.stream(self.stream):
            if torch.cuda.is_current_stream_capturing():
                self._reusable.clear()
        with contextlib.suppress(Exception):
            graph.pool()  # raises if the recording did not end; it did where only Python has failed
            return  # and gives all back when it is reset, with the others
        self.graphs.remove(graph)
        _unended.append(graph)
        with contextlib.suppress(Exception):
            torch.cuda.synchronize(self.device)
        with contextlib.suppress(Exception):
            graph.reset()
        with contextlib.suppress(Exception):
            self._count_out(entered=entered)
        # Its generators take themselves for recorded, until a recording ends well.
        with contextlib.suppress(Exception), _unwarned():
            stream, fresh = _taken(self.device), _graph(generators)  # not on ours, see above
            with torch.cuda.graph(fresh, stream=stream, capture_error_mode="thread_local"):
                torch.zeros((), device=self.device)
            fresh.reset()
            _free[self.device].append(stream)

    def _count_out(self, *, entered: bool) -> None:
        """Have torch's allocator take no more memory from the pool for a graph, and count it out of those that use it.

        Counted out twice, the pool would break the allocator; not at all, it keeps its memory for good. Where a recording
        could not be ended torch did neither at first; then the one, when it ends (pytorch#180395); then the other, too, when it
        is reset (pytorch#190348). That can be told apart, but for a torch which does the one alone.
        """
        stopped = True
        try:
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        except RuntimeError:  # torch has done so
            stopped = False
        if entered and (stopped or (torch.version.hip is None and torch.__version__.partition("+")[0] in FORGETS)):
            torch._C._cuda_releasePool(self.device.index, self.pool)


def _over(process: int, device: torch.device, graphs: list[Any], streams: list[Any]) -> None:
    """A generation is: the next may have its stream."""
    if process != os.getpid():  # one that was forked off has no device, and is not to touch them as it ends
        _unended.extend(graphs)
        return
    for graph in graphs:
        with contextlib.suppress(Exception):  # an error of the device's, which whoever uses it next is told
            graph.reset()
    graphs.clear()
    _free[device].extend(streams)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without torch's warning of a recording with nothing in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _graph(generators: list[torch.Generator]) -> Any:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph


FORGETS = ("2.13.0",)  # releases that do not count out, whether or not they stop: of others it is not known
STREAMS = 32  # of a device that torch has, and gives out in turn
_free = collections.defaultdict[torch.device, list[Any]](list)  # streams, which torch's libraries keep memory for
_made = collections.defaultdict[torch.device, list[Any]](list)
_unended: list[Any] = []  # graphs to be kept: torch's allocator of pinned memory goes on to ask them


def _taken(device: torch.device) -> Any:
    """A stream that no generation has."""
    with contextlib.suppress(IndexError):
        return _free[device].pop()
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        if stream not in _made[device]:
            break
    _made[device].append(stream)
    return stream


class Recording:
    """Kernels that were recorded."""

    def __init__(self, graph: Any, generation: _Generation) -> None:
        self.replay: Callable[[], None] = graph.replay  # in the present stream
        self._generation: _Generation | None = generation
        generation.recordings.add(self)

    def close(self) -> None:
        """Give memory back, with the last of a generation: before a process group ends, as NCCL waits for its kernels."""
        self.replay = _closed
        generation, self._generation = self._generation, None
        if generation is not None:
            generation.close(self)


def _closed() -> None:
    raise RuntimeError("this recording was closed")


@contextlib.contextmanager
def _redirected() -> Iterator[None]:
    """Where something holds on to the node that adds up a parameter's gradient, it keeps the stream that it was made on."""
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)  # of torch 2.13
    if override is None:
        yield
        return
    before = torch._C._override_stale_capture_stream()
    override(True)
    try:
        yield
    finally:
        override(before)
