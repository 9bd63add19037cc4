"""Workers: processes that make batches, which are torch's DataLoader's; and what is said when one of them is in trouble."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import pickle
import signal
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.multiprocessing
from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids
from torch.utils.data import DataLoader, get_worker_info

from axontrain.data.making import Task
from axontrain.errors import ConfigurationError, DataError, WorkerError

POLL = 1.0  # seconds between looks at the workers, while a batch is waited for
# Until all workers have begun (a spawned one imports torch first) no batch can be late.
STARTUP = 120.0


class Workers:
    """A pool of worker processes that lives over passes, until it is closed or a pass is left in the middle.

    Args:
        maker: makes a batch of a task; it is sent to each worker once.
        count: of processes.
        prefetch: batches that each makes ahead.
        start_method: "fork", "spawn" or "forkserver"; None for the platform's own.
        timeout: seconds that a batch may keep the loop waiting.
        pin: whether batches are laid into pinned memory, for copies to a GPU.
    """

    def __init__(
        self,
        maker: Callable[[Task], Any],
        count: int,
        *,
        prefetch: int,
        start_method: str | None,
        timeout: float,
        pin: bool,
    ) -> None:
        self.count, self.timeout, self.pin, self.start_method = count, timeout, pin, start_method
        self._poll = min(POLL, timeout / 4)
        self.busy = False
        self._holder: weakref.finalize[Any, Workers] | None = None
        self._tasks = _Tasks()
        context = torch.multiprocessing.get_context(start_method)
        self._begun = context.Value("i", 0)
        self._begin = _Begin(self._begun)
        self._in_hand = context.Array("q", [-1] * count, lock=False)  # the number of the batch that each worker makes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: as asked
            self._loader: DataLoader[Any] = DataLoader(
                _InWorker(maker, self._in_hand),  # type: ignore[arg-type]  # what it asks of a dataset is __getitem__
                batch_size=None,
                sampler=self._tasks,
                num_workers=count,
                collate_fn=_as_it_is,
                pin_memory=pin,
                timeout=self._poll,
                worker_init_fn=self._begin,
                multiprocessing_context=start_method,
                generator=torch.Generator(),  # or it would draw from the global one
                prefetch_factor=prefetch,
                persistent_workers=True,
            )

    def run(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """The batches of the tasks, in their order.

        Raises:
            WorkerError: if a worker dies, or keeps a batch waiting for too long.
        """
        waiting: deque[Task] = deque()
        failed: list[Exception] = []
        self._tasks.source, self.busy = _remembered(tasks, waiting, failed), True
        ended, lost = False, False
        try:
            batches = self._started()
            while True:
                try:
                    batch = self._next(batches, waiting)
                except StopIteration:
                    if failed:
                        raise failed[0] from None
                    if waiting:
                        raise WorkerError(f"the workers ended before {waiting[0]}") from None
                    ended = True
                    return
                waiting.popleft()
                yield batch
        except (WorkerError, KeyboardInterrupt):
            lost = True
            raise
        finally:
            self.busy = False
            if not ended:  # batches are on their way that nobody will take
                self.close(kill=lost)

    def close(self, *, kill: bool = False) -> None:
        """End the processes: after the batch that each has in hand, or at once."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is None:
            return
        if self._holder is not None:
            self._holder.detach()
            self._holder = None
        _unwatch(iterator)
        if kill:
            for worker in _processes(iterator):
                if worker.is_alive():
                    worker.kill()
                worker.join()
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # it has workers

    def _started(self) -> Any:
        started = self._loader._iterator is not None
        try:
            try:
                batches = self._iterated()
            except RuntimeError as error:  # a worker died while nobody waited for it, or answers late: begin with new ones
                if not started:
                    raise WorkerError(f"a worker ended as it began: {error}") from error
                self.close(kill=True)
                batches = self._iterated()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if started or ("pickle" not in str(error) and "local object" not in str(error)):
                raise
            raise DataError(
                f"the dataset cannot be sent to a worker process: {error}. With start_method={self._method()!r} the dataset, "
                f"transform and collate are pickled: define their classes and functions at the top level of a module, without "
                f"lambda; or use start_method='fork', or workers=0"
            ) from error
        # torch's handler for SIGCHLD raises wherever the program is when a worker dies, be it in the middle of an update. It
        # is to raise only while a batch is waited for: see _watched.
        _unwatch(batches)
        batches._worker_pids_set = False
        if self._holder is None:
            # torch's iterator ends its workers at once when nobody holds it, but in a garbage collection, as a part of a cycle,
            # it waits 5 seconds for each: so it is held from outside for as long as this lives.
            self._holder = weakref.finalize(self, id, batches)
        return batches

    def _iterated(self) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create|Got pickle error")
            if self._loader._iterator is None:
                self._begun.value = 0
                self._begin.by_main_thread = threading.current_thread() is threading.main_thread()
                with _no_collection() as self._begin.collects:
                    return iter(self._loader)
            return iter(self._loader)

    def _next(self, batches: Any, waiting: deque[Task]) -> Any:
        since = time.monotonic()
        begun = self._begun.value >= self.count
        while True:
            try:
                with _watched(batches):
                    return next(batches)
            except StopIteration:
                raise
            except Exception as error:
                ours = not str(error).startswith("Caught ")  # as what a worker's own code raised does
                if ours and isinstance(error, (RuntimeError, OSError, EOFError)) and (dead := _dead(batches, error)):
                    raise WorkerError(self._died(dead, batches, waiting)) from error
                if not str(error).startswith("DataLoader timed out"):
                    if waiting:
                        error.add_note(f"in {waiting[0]}")
                    raise
            if not begun and self._begun.value >= self.count:
                begun, since = True, time.monotonic()
            limit = self.timeout if begun else max(STARTUP, self.timeout)
            if time.monotonic() - since + self._poll / 2 >= limit:
                raise WorkerError(self._late(time.monotonic() - since, batches, waiting))

    def _died(self, dead: list[Any], batches: Any, waiting: deque[Task]) -> str:
        numbers = {worker.pid: number for number, worker in enumerate(_processes(batches))}
        told = "; ".join(
            f"worker {numbers[worker.pid]} (pid {worker.pid}) {_how(worker.exitcode)}"
            f"{self._making(numbers[worker.pid], waiting)}"
            for worker in dead
        )
        hint = ""
        if any(worker.exitcode == -signal.SIGKILL for worker in dead):
            hint = ". The system kills a process that takes too much memory: use fewer workers or a smaller batch"
        elif self._begun.value < self.count and self._method() != "fork":
            hint = (
                f". It had not begun yet: what it printed above says why. With start_method={self._method()!r} a script has "
                f"its code under if __name__ == '__main__', and a notebook its dataset in a module that it imports"
            )
        return told + hint

    def _late(self, seconds: float, batches: Any, waiting: deque[Task]) -> str:
        number = _worker_of_front(batches)
        who = "a worker" if number is None else f"worker {number} (pid {_processes(batches)[number].pid})"
        return (
            f"{who} has not made its batch in {seconds:.2g} s: {waiting[0] if waiting else 'none was asked for'}. If batches "
            f"may take that long, set a higher limit: ax.Loader(..., timeout=60)"
        )

    def _making(self, number: int, waiting: deque[Task]) -> str:
        task = next((task for task in waiting if task.number == self._in_hand[number]), None)
        return " while it had no batch in hand" if task is None else f" while it had {task} in hand"

    def _method(self) -> str:
        return self.start_method or str(multiprocessing.get_start_method())


class _InWorker:
    """The maker as a dataset of torch's DataLoader: an index is a whole batch."""

    def __init__(self, maker: Callable[[Task], Any], in_hand: Any) -> None:
        self.maker, self.in_hand = maker, in_hand

    def __getitem__(self, task: Task) -> Any:
        worker = get_worker_info()
        assert worker is not None  # nobody else asks
        self.in_hand[worker.id] = task.number
        batch = self.maker(task)
        self.in_hand[worker.id] = -1
        return batch


class _Tasks:
    """What torch's DataLoader takes for a sampler: the tasks of the present pass."""

    source: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.source)


class _Begin:
    """Runs first in each worker."""

    def __init__(self, begun: Any) -> None:
        self.begun, self.by_main_thread, self.collects = begun, False, True

    def __call__(self, worker: int) -> None:
        # What there is by now is the loop's process's to collect: freeing what lay on a GPU would end this one.
        gc.freeze()
        if self.collects:
            gc.enable()
        # Ctrl-C goes to the whole group of processes: the loop decides what comes of it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux" and self.by_main_thread:
            with contextlib.suppress(AttributeError, RuntimeError):
                # However the loop's process ends, a worker that hangs ends with it (with the thread that made it, to be exact).
                torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
        with self.begun.get_lock():
            self.begun.value += 1


@contextlib.contextmanager
def _no_collection() -> Iterator[bool]:
    """No garbage collection within the block, nor in what is forked there; gives whether there was any before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield collects
    finally:
        if collects:
            gc.enable()


def checked_method(start_method: str | None) -> str | None:
    """Return how workers are started, if the platform has that.

    Raises:
        ConfigurationError: if it has not.
    """
    known = multiprocessing.get_all_start_methods()
    if start_method is not None and start_method not in known:
        raise ConfigurationError(f"start_method={start_method!r}: this platform has {', '.join(map(repr, known))}")
    return start_method


def _remembered(tasks: Iterable[Task], waiting: deque[Task], failed: list[Exception]) -> Iterator[Task]:
    # An error of the sampler has its turn after the batches that were asked for before it.
    try:
        for task in tasks:
            waiting.append(task)
            yield task
    except Exception as error:
        failed.append(error)


def _processes(batches: Any) -> list[Any]:
    return list(batches._workers)


def _worker_of_front(batches: Any) -> int | None:
    # torch keeps to itself which worker has which task.
    known = getattr(batches, "_task_info", {}).get(getattr(batches, "_rcvd_idx", None))
    return None if known is None else int(known[0])


@contextlib.contextmanager
def _watched(batches: Any) -> Iterator[None]:
    """Raise for a worker that has died, or dies within the block: the wait for its batch could last for ever."""
    try:
        if threading.current_thread() is threading.main_thread():  # where signals are handled
            _set_worker_pids(id(batches), tuple(worker.pid for worker in _processes(batches)))
            _error_if_any_worker_fails()
        yield
    finally:
        _unwatch(batches)


def _unwatch(batches: Any) -> None:
    with contextlib.suppress(ValueError):  # it was not watched
        _remove_worker_pids(id(batches))


def _dead(batches: Any, error: Exception) -> list[Any]:
    # A connection breaks a moment before the process that held it counts as dead.
    ends = time.monotonic() + (POLL if isinstance(error, (OSError, EOFError)) else 0)
    while True:
        dead = [worker for worker in _processes(batches) if not worker.is_alive()]
        if dead or time.monotonic() >= ends:
            return dead
        time.sleep(0.01)


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit status {exitcode}"


def _as_it_is(batch: Any) -> Any:
    return batch
