"""Throughput: how fast training is, as readings."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from axontrain.callback import Answer, Looker, Reader
from axontrain.errors import ConfigurationError, kind_of, unknown, warn
from axontrain.execution import flops as counting
from axontrain.execution import memory
from axontrain.execution.peaks import kind_of_numbers, peak_of
from axontrain.execution.stopwatch import Stopwatch
from axontrain.objective import Objective, Supervised, batch_size, task_of
from axontrain.readings import Later, at_once, numbers, together
from axontrain.readings import Reading as Read
from axontrain.state import LoopState
from axontrain.update import Update

COUNTED, AUTO = "counted", "auto"
WAIT, REST = "wait", "rest"
MOST_LATER = 64  # readings that are on their way; further ones are waited for


class Throughput(Reader, Looker):
    """Record how fast training is, of the steps since the last reading (or since the fit began, or went on).

    ================================= ================================================================================
    reading                           what it is
    ================================= ================================================================================
    ``throughput/steps_per_second``   steps by seconds of training
    ``throughput/samples_per_second`` samples by seconds of training
    ``throughput/tokens_per_second``  tokens by seconds of training, where there are tokens
    ``throughput/data_wait``          the share of the training time that went by waiting for batches, 0 to 1
    ``throughput/mfu``                model FLOPs utilization, 0 to 1 (Chowdhery et al. 2022, arXiv:2204.02311,
                                      appendix B): FLOPs by seconds of training, as a share of the device's peak
    ``throughput/peak_memory``        bytes, the most so far: on a CUDA device those of its tensors
                                      (``torch.cuda.max_memory_allocated``), elsewhere what the process had resident
    ================================= ================================================================================

    They are read at each epoch's end and where a fit ends within one; with ``every=`` at any other cadence (see
    :class:`axontrain.Every`). What is read at an epoch's end waits for the device; of ``every=`` nothing does: the readings are
    recorded when they have arrived, a step or more later on a GPU, for the step that they are of.

    The time of a step is from where the loop asks for its batch to this callback's ``after_batch``: reading the batch, hooks
    before it, forward, backward, update, and the ``after_batch`` of callbacks before this one in the list. Left out is what
    lies between two steps: validation, readings, saving, the ``after_batch`` of later callbacks, the ends of epochs, and what
    the caller does between steps of ``loop.steps``; and what a :class:`axontrain.Profiler` does, wherever it stands in the
    list. On a GPU it is the device's time, by events in its stream, and waiting is what the device waits: where it is busy
    while the host waits for a batch, nothing is lost.

    FLOPs are counted once, by torch's ``FlopCounterMode``, of the first batch of a fit (of each task of a Mixture): its forward
    and its backward as they are dispatched, on a copy of the objective with a copy of the batch, so that nothing changes. They
    are then taken for each sample, so that smaller batches count less, and for each time that an optimizer that evaluates the
    loss by itself (LBFGS, SAM) has done so. Their limits: matrix products, convolutions and
    attention are counted alone, and kernels of others are not seen; what is computed anew in backward (checkpointing) counts,
    the update does not; what is compiled counts as it would without; samples whose lengths differ are taken to be like those of
    the first batch, and what is frozen or unfrozen later is not seen. For one step it takes the memory of a second copy of the
    weights and of their gradients. ``flops=`` spares it.

    Args:
        tokens: a function of a batch that counts its tokens: an int, or a scalar tensor, which is summed on its device. Unless
            given, what the objective's own ``weight(batch)`` counts, if it has one.
        flops: a number, of forward and backward once, for each sample; or a function of a batch that tells those of the whole
            batch, as a number; or "counted".
        peak: what the device can do in FLOP/s; "auto" looks it up by the device's name and the precision. Where that is not
            known, as for a CPU, a warning says so and there is no ``mfu``. None: no ``mfu``, and no FLOPs are counted.
        every, first, after, before: see :class:`axontrain.Every`.

    Attributes:
        flops_per_sample: what was counted, by task (None where there are none).

    >>> Throughput(every="100 steps", peak=312e12)
    Throughput(every=Every('100 steps'), peak=312000000000000.0)

    Raises:
        ConfigurationError: for values that cannot work; in a fit, if a function gives no number.
    """

    asks = ("after_batch",)

    def __init__(
        self,
        *,
        tokens: Callable[[Any], int | Tensor] | None = None,
        flops: float | str | Callable[[Any], float] = COUNTED,
        peak: float | str | None = AUTO,
        **cadence: Any,
    ) -> None:
        super().__init__(**cadence)
        if tokens is not None and not callable(tokens):
            raise ConfigurationError(f"tokens={kind_of(tokens)}: a function of a batch that counts its tokens")
        if isinstance(flops, str) and flops != COUNTED:
            raise unknown("way to know FLOPs, flops =", flops, (COUNTED,), "Else a number, or a function of a batch.")
        if isinstance(peak, str) and peak != AUTO:
            raise unknown("peak =", peak, (AUTO,), "Else a number of FLOP/s, or None.")
        for name, number in (("flops", flops), ("peak", peak)):
            if not (isinstance(number, str) or (name == "flops" and callable(number)) or (name == "peak" and number is None)):
                if not _is_number(number) or not 0 < number < math.inf:  # type: ignore[operator]  # it is a number then
                    raise ConfigurationError(f"{name}={number!r}: a number above 0, as {name}=1e12")
        if peak is None and flops != COUNTED:
            raise ConfigurationError("flops= is for mfu, which is a share of the peak, and peak=None leaves that out")
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self.flops_per_sample: dict[str | None, float] = {}
        if self.every is None:  # else nothing is to be done there
            self.after_epoch = self.look  # type: ignore[method-assign]
        self._watch = Stopwatch(torch.device("cpu"))
        self._peak: float | None = None  # None where there is no mfu
        self._counts_weight = False
        self._searching: list[Update] = []  # optimizers that evaluate the loss by themselves
        self._evaluated = 0  # how often they had, at the step before
        self._most = 0  # bytes, before they were made to be counted anew
        self._wait: tuple[Any, Any] = (None, None)  # marks of the present batch: asked for, got
        self._begun: Any = None  # and where its step begins
        self._of_batch: tuple[float, int | Tensor] = (0, 0)  # its FLOPs and tokens
        self._told: set[str] = set()
        # Of the steps since the last reading.
        self._steps, self._samples, self._flops = 0, 0, 0.0
        self._tokens: int | Tensor = 0
        self._later: deque[Later[None]] = deque()  # readings on their way

    def __repr__(self) -> str:
        options = {"every": (self.every, None), "tokens": (self.tokens, None), "flops": (self.flops, COUNTED)}
        options["peak"] = (self.peak, AUTO)
        of = [
            f"{name}={getattr(value, '__name__', None) or repr(value)}"
            for name, (value, default) in options.items()
            if value != default
        ]
        return f"Throughput({', '.join(of)})"

    def before_fit(self, state: LoopState) -> Answer:
        """Begin anew: what was before belongs to another time."""
        device = _device_of(state)
        self._watch = Stopwatch(device)
        own = getattr(state.objective.weight, "__func__", None) not in (Objective.weight, Supervised.weight)
        self._counts_weight = self.tokens is None and own
        self.flops_per_sample, self._later = {}, deque()
        self._most, self._of_batch = 0, (0, 0)
        self._searching = [update for update in state.optimizers.values() if update.spec.closure]
        self._evaluated = sum(update.evaluations for update in self._searching)
        self._peak = self._looked_up(state, device) if isinstance(self.peak, str) else self.peak
        self._begin(state)
        return None

    def reading(self, batches: Iterator[Any], state: LoopState) -> Iterator[Any]:
        """Look at the clock where the loop asks for a batch, and where it gets it."""
        while True:
            watch = self._watch
            asked = watch.mark()
            try:
                batch = next(batches)
            except StopIteration:
                watch.add(WAIT, asked, watch.mark())
                return
            got = self._begun = watch.mark()
            self._wait = asked, got
            if self._peak is not None or self.tokens is not None:
                if self._peak is not None and self.flops == COUNTED and task_of(batch) not in self.flops_per_sample:
                    self._count(batch, state)
                    self._begun = watch.mark()  # which is no time of training
                self._of_batch = self._flops_of(batch), 0 if self.tokens is None else self._tokens_of(batch)
            yield batch

    def after_batch(self, state: LoopState) -> Answer:
        """A step is through: take it in. Nothing is read from the device, unless a reading is due."""
        watch = self._watch
        watch.add(WAIT, *self._wait)
        watch.add(REST, self._begun, watch.mark())
        flops, tokens = self._of_batch
        if self._searching:
            before, self._evaluated = self._evaluated, sum(update.evaluations for update in self._searching)
            flops *= 1 + self._evaluated - before
        self._steps += 1
        self._flops += flops
        if self._counts_weight and state.last is not None:
            weight = state.last.weight
            tokens = weight.detach().reshape(()).to(torch.int64) if isinstance(weight, Tensor) else weight
        self._tokens = self._tokens + tokens
        if self.every is not None and self.cadences["after_batch"].due(state):
            self._later.append(Later(self._recorded(state)))
        while self._later and (len(self._later) > MOST_LATER or self._later[0].arrived()):
            self._later.popleft().result()
        return None

    def settle(self, state: LoopState) -> Answer:
        """Record what is on its way; waits for it."""
        while self._later:
            self._later.popleft().result()
        return None

    def look(self, state: LoopState, *, partial: bool = False) -> Answer:
        """Record, of the steps since the last time; what is ``partial`` is taken back when the fit is resumed."""
        at_once(self._recorded(state, partial=partial))
        return None

    def _recorded(self, state: LoopState, *, partial: bool = False) -> Read[None]:
        """The same as a reading, of the steps until it is begun."""
        step, epoch = state.step, state.epoch
        counts: dict[str, Any] = {"steps": self._steps, "samples": state.samples - self._samples}
        if self._counts_weight or self.tokens is not None:
            counts["tokens"] = self._tokens
        flops, peak = self._flops, memory.peak(self._watch.device)
        most = None if peak is None else max(peak, self._most)
        self._begin(state)
        times, per_second = yield from together([self._watch.reading(), numbers(counts)])
        seconds = sum(times.values())
        if not per_second["steps"] or seconds <= 0:
            return
        readings: dict[str, float] = {f"{name}_per_second": count / seconds for name, count in per_second.items()}
        readings["data_wait"] = times.get(WAIT, 0.0) / seconds
        if self._peak is not None:
            readings["mfu"] = flops / seconds / self._peak
        if most is not None:
            readings["peak_memory"] = most
        named = {f"throughput/{name}": value for name, value in readings.items()}
        state.values.update(named)
        state.history.add(step, epoch, named, partial=partial)

    def after_fit(self, state: LoopState) -> Answer:
        """Read what is left of an epoch that a limit or a stop has ended."""
        if state.error is None:  # else the device may be beyond being asked
            self.settle(state)
            if self.every is None:
                self.look(state, partial=bool(state.batch_index))
        return None

    def _begin(self, state: LoopState) -> None:
        self._steps, self._samples, self._flops, self._tokens = 0, state.samples, 0.0, 0

    def _looked_up(self, state: LoopState, device: torch.device) -> float | None:
        kind = kind_of_numbers(state.history.precision, state.objective)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this device ({device.type})"
        peak = peak_of(name, kind)
        if peak is None:
            self._tell(
                f"how many FLOP/s {name} can do in {'half precision' if kind == 'half' else kind} is not known, so there is no "
                f"throughput/mfu: Throughput(peak=...) in FLOP/s, or peak=None to leave it out"
            )
        return peak

    def _count(self, batch: Any, state: LoopState) -> None:
        """Count the FLOPs of a batch of its kind; where that fails, training goes on without."""
        device = self._watch.device
        if device.type == "cuda":
            self._most = max(self._most, memory.peak(device) or 0)
        try:
            with memory.unseen(device):
                counted = counting.per_sample(state, batch)
            why = "" if counted else "none of the operations is one that torch's FlopCounterMode knows"
        except Exception as error:  # of whatever a user's objective does on a copy
            counted, why = 0.0, f"{type(error).__name__}: {error}"
        if why:
            self._tell(f"FLOPs could not be counted, so there is no throughput/mfu: {why}. Throughput(flops=...) tells them")
            self._peak = None
        self.flops_per_sample[task_of(batch)] = counted

    def _flops_of(self, batch: Any) -> float:
        if self._peak is None:
            return 0
        if callable(self.flops):
            found = self.flops(batch)
            if not _is_number(found):
                raise ConfigurationError(f"flops= of a batch gave {kind_of(found)}: a number, which shapes tell")
            return found
        return batch_size(batch) * (self.flops_per_sample[task_of(batch)] if isinstance(self.flops, str) else self.flops)

    def _tokens_of(self, batch: Any) -> int | Tensor:
        found = self.tokens(batch)  # type: ignore[misc]  # asked for only where it is there
        if isinstance(found, Tensor) and found.numel() == 1:
            return found.detach().reshape(()).to(torch.int64)
        if isinstance(found, (bool, Tensor)) or not hasattr(found, "__index__"):
            raise ConfigurationError(f"tokens= of a batch gave {kind_of(found)}: an int, or a scalar tensor")
        return int(found)

    def _tell(self, what: str) -> None:
        """Once, however many fits there are."""
        if what not in self._told:
            self._told.add(what)
            warn(what)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _device_of(state: LoopState) -> torch.device:
    return next((parameter.device for parameter in state.objective.parameters()), torch.device("cpu"))
