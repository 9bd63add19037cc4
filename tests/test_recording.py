"""Recording: what a recorder leaves of torch's allocators, streams and generators, whatever happens while it records.

There need not be a GPU: below ``torch.cuda.graph``, which is torch's own, stands a model of what torch and CUDA do.
"""

import collections
import contextlib
import gc
import os
import types
import weakref

import pytest
import torch

from axontrain.execution import recording

DEVICE = torch.device("cuda", 0)
# Whether the end of a recording that failed stops the allocators, and whether a reset counts it out: in a release of torch.
TORCHS = {"2.10.0": (False, False), "2.13.0": (True, False), "2.14.0a0+later": (True, True)}


class Stream:
    def __init__(self, cuda, device, number):
        self.cuda, self.device, self.device_index, self.stream_id, self.device_type = cuda, device, device.index, number, 1

    def __eq__(self, other):
        return (self.device, self.stream_id) == (other.device, other.stream_id)

    def __hash__(self):
        return hash((self.device, self.stream_id))

    def wait_stream(self, other):
        assert self not in self.cuda.capturing
        assert other not in self.cuda.capturing


class Using:
    """``torch.cuda.stream``: a stream, and its device, as ``StreamContext`` sets and restores them."""

    def __init__(self, cuda, stream):
        self.cuda, self.stream = cuda, stream

    def __enter__(self):
        self.before = self.cuda.current[self.cuda.device]
        if self.before.device != self.stream.device:
            self.there = self.cuda.current[self.stream.device.index]
        self.cuda.set_stream(self.stream)

    def __exit__(self, *error):
        if self.before.device != self.stream.device:
            self.cuda.set_stream(self.there)
        self.cuda.set_stream(self.before)


class Allocator:
    """Its pools, by how many use them; an assertion of torch's is one of ours here."""

    def __init__(self):
        self.counts, self.freeable, self.underway = {}, set(), []

    def begin(self, pool):
        assert self.counts.get(pool, 1) > 0, "it->second->use_count > 0"
        self.counts[pool] = self.counts.get(pool, 0) + 1
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.underway.append(pool)

    def end(self, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, pool):
        assert pool in self.counts, "it != graph_pools.end()"
        self.counts[pool] -= 1
        assert self.counts[pool] >= 0, "uc >= 0"
        if not self.counts[pool]:
            self.freeable.add(pool)

    def empty(self):
        for pool in self.freeable:
            assert self.counts[pool] == 0, "it->second->use_count == 0"
            del self.counts[pool]
        self.freeable.clear()


class Cuda:
    """Two devices, as torch shows them."""

    def __init__(self, version):
        self.stops, self.counts_out = TORCHS[version]
        self.device, self.pools = 0, 0
        self.default = [Stream(self, torch.device("cuda", index), 0) for index in (0, 1)]
        self.current, self.given_out = list(self.default), collections.Counter()
        self.allocators, self.host = (Allocator(), Allocator()), Allocator()
        self.capturing = {}  # streams, by the graph that is recorded on them
        self.spoilt = set()  # those of them whose recording cannot be ended any more
        self.workspaces = {}  # of cuBLAS, by stream
        self.beginning = None  # an error that the next recording begins with
        self.stuck = False  # whether no recording can be ended
        self.asked = {}  # graphs, by whom pinned memory that is asked for meanwhile is for them
        self.generator_recorded = False

    def new_stream(self, device):
        self.given_out[device] += 1
        return Stream(self, device, 1 + (self.given_out[device] - 1) % 32)

    def set_stream(self, stream):
        self.device = stream.device_index
        self.current[self.device] = stream

    @contextlib.contextmanager
    def on(self, device):
        before, self.device = self.device, torch.device(device).index
        try:
            yield
        finally:
            self.device = before

    def now(self):
        return self.current[self.device]

    def handle(self):
        self.pools += 1
        return 0, self.pools

    def empty_cache(self):
        for allocator in (*self.allocators, self.host):
            allocator.empty()

    def synchronize(self, device=None):
        if self.now() in self.capturing:
            self.spoil()

    def spoil(self):
        """What is not allowed in a recording."""
        self.spoilt.add(self.now())
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def matmul(self):
        workspace = self.workspaces.setdefault(self.now(), object())
        if self.now() in self.capturing:
            self.capturing[self.now()].used.append(workspace)

    def rand(self):
        if self.now() in self.capturing:
            self.generator_recorded = True
        elif self.generator_recorded:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def pin(self):
        assert all(self.asked[pool]() is not None for pool in self.host.underway), "a graph that is no more is asked"

    def use_counts(self):
        """Of all pools that are used."""
        return [count for allocator in self.allocators for count in allocator.counts.values() if count]


class Graph:
    """``torch.cuda.CUDAGraph``."""

    present: Cuda
    ended = acquired = False

    def __init__(self):
        self.cuda, self.used = self.present, []

    def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
        cuda, self.stream = self.cuda, self.cuda.now()
        assert capture_error_mode == "thread_local"
        assert self.stream not in cuda.default
        self.id, self.allocator = pool or (cuda.handle()[1], 0), cuda.allocators[cuda.device]
        self.allocator.begin(self.id)
        cuda.host.begin(self.id)
        cuda.asked[self.id], self.acquired = weakref.ref(self), True
        if cuda.beginning is not None:
            error, cuda.beginning = cuda.beginning, None
            raise error
        cuda.capturing[self.stream] = self

    def capture_end(self):
        cuda = self.cuda
        if cuda.now() != self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        if cuda.stuck:
            raise RuntimeError("CUDA error: unspecified launch failure")
        del cuda.capturing[self.stream]
        failed = self.stream in cuda.spoilt
        cuda.spoilt.discard(self.stream)
        if cuda.stops or not failed:
            self.allocator.end(self.id)
            cuda.host.end(self.id)
        if failed:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        cuda.generator_recorded, self.ended = False, True

    def pool(self):
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.id

    def reset(self):
        if self.ended or (self.acquired and self.cuda.counts_out):
            self.cuda.workspaces.pop(self.stream, None)
            self.allocator.release(self.id)
            self.cuda.host.release(self.id)
        self.ended = self.acquired = False

    __del__ = reset

    def replay(self):
        assert self.ended
        assert all(used in self.cuda.workspaces.values() for used in self.used), "an illegal memory access"


@pytest.fixture
def release():
    return "2.13.0"


@pytest.fixture
def cuda(monkeypatch, release):
    """The model, with nothing left of earlier recordings."""
    gc.collect()
    cuda = Cuda(release)
    zeros = torch.zeros
    monkeypatch.setattr(Graph, "present", cuda, raising=False)
    monkeypatch.setattr(torch, "__version__", release)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: cuda.rand() if device == DEVICE else zeros(*size))
    of_torch = types.SimpleNamespace(
        CUDAGraph=Graph,
        Stream=cuda.new_stream,
        stream=lambda stream: Using(cuda, stream),
        device=cuda.on,
        current_stream=lambda device=None: cuda.current[cuda.device if device is None else device.index],
        set_stream=cuda.set_stream,
        current_device=lambda: cuda.device,
        synchronize=cuda.synchronize,
        empty_cache=cuda.empty_cache,
        graph_pool_handle=cuda.handle,
        is_current_stream_capturing=lambda: cuda.now() in cuda.capturing,
        get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=lambda mode: None,
    )
    for name, value in vars(of_torch).items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in (
        ("_host_emptyCache", lambda: None),
        ("_cuda_endAllocateToPool", lambda device, pool: cuda.allocators[device].end(pool)),
        ("_cuda_releasePool", lambda device, pool: cuda.allocators[device].release(pool)),
    ):
        monkeypatch.setattr(torch._C, name, value, raising=False)
    for name, fresh in (("_free", collections.defaultdict(list)), ("_made", collections.defaultdict(list)), ("_unended", [])):
        monkeypatch.setattr(recording, name, fresh)
    yield cuda
    gc.collect()


def step(cuda):
    """What is recorded, on the stream that it was tried on before."""

    def function():
        cuda.matmul()
        cuda.rand()
        return "given"

    return function


def recorded(recorder, cuda):
    with recorder.aside():
        cuda.matmul()
    return recorder.record(step(cuda))[0]


def as_ever(cuda):
    """Nothing is under way or used, torch can go on, and so can others."""
    gc.collect()
    assert cuda.use_counts() == []
    assert not cuda.capturing
    assert all(allocator.underway == [] for allocator in cuda.allocators)
    assert (cuda.device, cuda.current) == (0, cuda.default)
    cuda.empty_cache()
    cuda.rand()
    cuda.pin()
    other = recording.Recorder(DEVICE)
    one = recorded(other, cuda)
    one.replay()
    one.close()
    cuda.empty_cache()
    return True


every_torch = pytest.mark.parametrize("release", TORCHS)


@every_torch
def test_recordings_share_a_pool_that_is_given_back_with_the_last(cuda):
    recorder = recording.Recorder(DEVICE)
    several = [recorded(recorder, cuda) for _ in range(3)]
    assert cuda.use_counts() == [3]
    for one in several:
        for other in several:
            other.replay()  # none has lost what it uses
        assert one is not several[0] or cuda.use_counts() == [3]
    for one in several[:2]:
        one.close()
        one.close()
    several[2].replay()
    with pytest.raises(RuntimeError, match="this recording was closed"):
        several[0].replay()
    several[2].close()
    assert cuda.use_counts() == []
    one = recorded(recorder, cuda)  # of a new generation
    one.replay()
    one.close()
    assert cuda.use_counts() == []
    recorder.renew()
    assert as_ever(cuda)


class Interruption(KeyboardInterrupt):
    pass


@every_torch
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, Interruption])
@pytest.mark.parametrize("beside", [0, 2])
def test_where_only_python_fails_the_pool_is_not_given_back_twice(cuda, error, beside):
    recorder = recording.Recorder(DEVICE)
    others = [recorded(recorder, cuda) for _ in range(beside)]

    def fails():
        step(cuda)()
        raise error("in the middle")

    with pytest.raises(error, match="in the middle") as told:
        recorder.record(fails)
    assert cuda.use_counts() == ([3] if beside else [])  # at once, though the error has its frames
    for one in others:  # which Ctrl-C leaves
        one.replay()
    assert others == [] or recorded(recorder, cuda).replay() is None
    for one in others:
        one.close()
    recorder.renew()
    del told
    assert as_ever(cuda)


@every_torch
@pytest.mark.parametrize("beside", [0, 2])
def test_where_a_recording_cannot_be_ended_the_pool_is_given_back_once(cuda, beside):
    recorder = recording.Recorder(DEVICE)
    others = [recorded(recorder, cuda) for _ in range(beside)]

    def fails():
        step(cuda)()
        cuda.spoil()

    with pytest.raises(RuntimeError, match="failed due to a previous error") as told:
        recorder.record(fails)
    assert "not permitted when stream is capturing" in str(told.value.__context__)
    del told
    assert cuda.use_counts() == ([2] if beside else [])
    cuda.rand()  # the generator is not left in the middle
    for one in others:
        one.close()
    assert as_ever(cuda)
    assert recorded(recorder, cuda).replay() is None
    recorder.renew()
    assert as_ever(cuda)


@pytest.mark.parametrize("release", ["2.14.0a0+later"])
def test_what_is_not_known_is_not_counted_out_twice(cuda, monkeypatch):
    cuda.counts_out = False  # a torch that does the one alone, of which that is not known
    recorder = recording.Recorder(DEVICE)
    other = recorded(recorder, cuda)
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(cuda.spoil)
    other.close()
    assert cuda.use_counts() == [1]  # its memory is lost
    cuda.empty_cache()
    assert recorded(recorder, cuda).replay() is None


@every_torch
def test_recovery_does_not_take_what_live_recordings_use(cuda):
    recorder, others = recording.Recorder(DEVICE), recording.Recorder(DEVICE)
    live = recorded(others, cuda)
    for fails in (cuda.spoil, lambda: 1 / 0):
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            recorder.record(fails)
        live.replay()
    live.close()
    assert as_ever(cuda)


@every_torch
def test_a_recording_that_does_not_begin(cuda):
    recorder = recording.Recorder(DEVICE)
    cuda.beginning = RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        recorder.record(step(cuda))
    assert cuda.current == cuda.default
    assert cuda.allocators[0].underway == []
    assert cuda.use_counts() in ([], [1])  # it is empty
    cuda.empty_cache()
    assert recorded(recorder, cuda).replay() is None


@every_torch
@pytest.mark.parametrize("at", ["capture_begin", "capture_end"])
def test_ctrl_c_between_a_beginning_and_an_end(cuda, monkeypatch, at):
    recorder, method = recording.Recorder(DEVICE), getattr(Graph, at)

    def interrupted(self, *args, **kwargs):
        monkeypatch.setattr(Graph, at, method)
        if at == "capture_begin":
            method(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Graph, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorder.record(step(cuda))
    assert as_ever(cuda)


@every_torch
def test_a_function_that_leaves_another_stream(cuda):
    recorder = recording.Recorder(DEVICE)
    with pytest.raises(RuntimeError, match="must end on the same stream"):
        recorder.record(lambda: cuda.set_stream(cuda.new_stream(DEVICE)))
    assert as_ever(cuda)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_fails_in_recovery_hides_the_error(cuda, monkeypatch, fails):
    recorder = recording.Recorder(DEVICE)

    def broken(*args):
        raise AttributeError("of another torch") if fails else RuntimeError("CUDA error: device-side assert triggered")

    def function():
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, broken)
        for name in ("synchronize", "set_stream", "stream", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, broken)
        monkeypatch.setattr(Graph, "reset", broken)
        monkeypatch.setattr(Graph, "pool", broken)
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        recorder.record(function)
    monkeypatch.undo()


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("present", [0, 1])
def test_the_device_and_the_streams_are_what_they_were(cuda, present, spoil):
    cuda.device = present
    cuda.current = [cuda.new_stream(one.device) for one in cuda.default]
    before = list(cuda.current)
    device = torch.device("cuda", 1)
    recorder = recording.Recorder(device)
    one = recorded(recorder, cuda)
    assert one._generation.stream.device == device
    assert (cuda.device, cuda.current) == (present, before)
    with pytest.raises((RuntimeError, ValueError)):
        recorder.record(cuda.spoil if spoil else lambda: int("one"))
    assert (cuda.device, cuda.current) == (present, before)
    assert cuda.allocators[0].counts == {}
    one.close()
    assert cuda.use_counts() == []


def test_a_stream_that_is_not_to_be_ended_is_not_used_again(cuda):
    recorder = recording.Recorder(DEVICE)
    cuda.stuck = True
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        recorder.record(step(cuda))
    (stuck, *_), cuda.stuck = cuda.capturing, False
    recorder.renew()
    gc.collect()
    assert stuck not in recording._free[DEVICE]
    assert stuck != streams(recorded(recorder, cuda))[0]


def streams(*recordings):
    return [one._generation.stream for one in recordings]


def test_no_two_live_generations_share_a_stream(cuda):
    recorders, live = [recording.Recorder(DEVICE) for _ in range(recording.STREAMS)], []
    for recorder in recorders:
        live.append(recorded(recorder, cuda))
        for _ in range(7):
            cuda.new_stream(DEVICE)  # of somebody else: torch gives out the same ones again
    assert len(set(streams(*live))) == len(live)
    assert streams(live[0]) == streams(recorded(recorders[0], cuda))
    for one in live[::2]:
        one.close()
    for one in live[1::2]:
        one.replay()
    assert recorded(recording.Recorder(torch.device("cuda", 1)), cuda)


def test_streams_are_used_again(cuda):
    kept = recorded(recording.Recorder(DEVICE), cuda)  # whose recorder is garbage
    for _ in range(3):
        recorder = recording.Recorder(DEVICE)
        one, two = recorded(recorder, cuda), recorded(recorder, cuda)
        one.close()
        two.close()  # as at the end of a fit
        three = recorded(recorder, cuda)
        three.close()
        recorder.renew()
        with recorder.aside():
            pass  # nothing is recorded of it
        recorder.renew()
        with pytest.raises(ZeroDivisionError):
            recorder.record(lambda: 1 / 0)
        with pytest.raises(RuntimeError):
            recorder.record(cuda.spoil)
        forgotten = recorded(recorder, cuda)
        del forgotten, recorder
        kept.replay()
    assert len(recording._made[DEVICE]) == 3  # that which is kept, one at a time, and one to recover on
    assert streams(kept)[0] not in recording._free[DEVICE]
    kept.close()
    assert len(recording._free[DEVICE]) == 3
    assert as_ever(cuda)


def test_what_was_tried_and_what_is_recorded_are_on_one_stream(cuda):
    recorder, seen = recording.Recorder(DEVICE), []
    with recorder.aside():
        seen.append(cuda.now())
    recorder.record(lambda: seen.append(cuda.now()))
    with recorder.aside():
        seen.append(cuda.now())
    assert len(set(seen)) == 1
    assert seen[0] not in cuda.default


def test_garbage_is_given_back(cuda):
    recorder = recording.Recorder(DEVICE)
    recorder.kept = [recorded(recorder, cuda), recorder]  # a cycle
    del recorder
    gc.collect()
    assert cuda.use_counts() == []
    assert len(recording._free[DEVICE]) == 1


def test_the_end_of_a_forked_process_gives_nothing_back(cuda):
    one = recorded(recording.Recorder(DEVICE), cuda)
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            one.close()
            status = 0 if cuda.use_counts() == [1] else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    one.close()
    assert cuda.use_counts() == []


def test_a_graph_that_cannot_be_reset_keeps_no_other_from_it(cuda, monkeypatch):
    recorder = recording.Recorder(DEVICE)
    several = [recorded(recorder, cuda) for _ in range(3)]
    graphs = [*recorder._generation.graphs]

    def failing():
        raise RuntimeError("an error of the device's")

    monkeypatch.setattr(graphs[1], "reset", failing, raising=False)
    for one in several:
        one.close()
    assert cuda.use_counts() == [1]
    assert len(recording._free[DEVICE]) == 1
    monkeypatch.undo()
    graphs[1].reset()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_override_of_stale_streams_is_what_it_was(cuda, before, fails):
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)
    if override is None:
        pytest.skip("it is of torch 2.13")
    seen = []

    def function():
        seen.append(torch._C._override_stale_capture_stream())
        assert not fails

    override(before)
    try:
        with pytest.raises(AssertionError) if fails else contextlib.nullcontext():
            recording.Recorder(DEVICE).record(function)
        assert seen == [True]
        assert torch._C._override_stale_capture_stream() is before
    finally:
        override(False)


@pytest.mark.parametrize("enabled", [False, True])
def test_garbage_is_not_collected_meanwhile(cuda, enabled):
    recorder, seen = recording.Recorder(DEVICE), []
    try:
        (gc.enable if enabled else gc.disable)()
        recorder.record(lambda: seen.append(gc.isenabled()))
        with pytest.raises(ZeroDivisionError):
            recorder.record(lambda: 1 / 0)
        assert (seen, gc.isenabled()) == ([False], enabled)
    finally:
        gc.enable()
