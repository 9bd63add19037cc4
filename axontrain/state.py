"""LoopState: all that changes during a run, in one object that the hooks get. And the Result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from axontrain import display, randomness
from axontrain.averages import Average
from axontrain.clock import Cadence, Every, Plan
from axontrain.data.structure import to_device
from axontrain.errors import CheckpointError, ConfigurationError, kind_of, loses, warn
from axontrain.guard import BufferGuard
from axontrain.history import History
from axontrain.host import placed, travels
from axontrain.metrics.meter import Meter
from axontrain.naming import clean_names, torn
from axontrain.objective import Step
from axontrain.readings import Later, Reading, at_once, together
from axontrain.shown import NAME, plain
from axontrain.update import Update


@runtime_checkable
class Stateful(Protocol):
    """What takes part in saving and restoring."""

    def state_dict(self) -> dict[str, Any]:
        """What going on needs: numbers, text, None, tensors, and of them lists and mappings (which come back as list, dict)."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from what ``state_dict`` gave."""


class LoopState:
    """All that changes during a run.

    Attributes:
        objective: what is trained.
        optimizers: by name; a lone Optimizer is "main".
        epoch: epochs completed.
        step: batches trained on.
        samples: samples trained on.
        batch_index: batches of the present epoch trained on.
        values: the last readings, by name ("train/loss", "val/accuracy", ...). Within an epoch, on a GPU, the training means
            are those of the step at which their reading was begun, some steps ago; at its end, and in ``read()``, of the last.
        history: all readings.
        status: "ready", "running", "completed", "stopped", "interrupted" or "failed".
        last: the last Step; its loss and predictions are on the device.
        loss: in ``after_backward``, what backward was run on: a scalar on the device, unscaled.
        error: in ``on_error``, what was raised.
        validates: whether the present fit has validation data.
        resumed: whether the present fit goes on inside an earlier one's plan.
        directory: the run directory, if there is one.
    """

    def __init__(self, objective: nn.Module, optimizers: Mapping[str, Update], seed: int, train_meter: Meter) -> None:
        self.objective = objective
        self.optimizers = dict(optimizers)
        self._averages = [update.average for update in self.optimizers.values() if update.average is not None]
        self.epoch = self.step = self.samples = self.batch_index = 0
        self.values: dict[str, Any] = {}
        self.history = History()
        self.status = "ready"
        self.last: Step | None = None
        self.loss: Tensor | None = None
        self.vetoed = False  # whether somebody has asked for the step in hand to be skipped
        self.error: BaseException | None = None
        self.seed = seed
        self.plan: Plan | None = None
        self.epoch_length: int | None = None
        self.meter = train_meter
        self.newest = 0  # the number of the last checkpoint of the directory that this run has written or gone on from
        # The run's own random stream, and whether it is the global one just now.
        self.rng: dict[str, Any] | randomness.Snapshot | None = None
        self.drawing = False
        self.buffers: BufferGuard | None = None  # of the steps of the present fit, or by hand
        self.request: Stop | StopEpoch | None = None
        self.validates = self.resumed = False
        self.directory: Path | None = None
        self.old_plan: Plan | None = None  # of the last fit, or of the one that is running
        self.in_epoch = False  # whether before_epoch was called, and the epoch's end was not reached
        self.halt: dict[str, Any] | None = None  # what a hook had asked for when the last fit ended
        self.stopper: tuple[str, dict[str, Any]] = ("", {})  # the key of the callback that asked for it, and its arguments
        self.half_done = False  # whether an error ended the last fit between a forward pass and its update
        self.repeating = False  # whether a hook is called once more, after the run was resumed
        self.owed: list[str] = []  # what an interruption has left undone at the last step's end
        self.setup: dict[str, Any] = {}  # what the run was made of, to be compared when it is resumed
        self.attached: dict[str, Any] = {}
        self._cadences: dict[str, Cadence] = {}
        self._waiting: dict[str, Any] = {}
        self._trained = 0.0
        self._since: float | None = None
        self._later: Later[Any] | None = None  # a reading under way
        self.settling: Callable[[LoopState], None] | None = None  # of the present fit: see settle

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all fits."""
        return self._trained + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @property
    def progress(self) -> float:
        """How far the present fit has come, 0 to 1: what schedules see."""
        return 0.0 if self.plan is None else self.plan.progress(self)

    def read(self, *, last: bool = False) -> dict[str, Any]:
        """Read the training means since the epoch began (or since the last validation) to the host, into ``values``.

        What is read later does not change by it; with ``last`` the engine says that it begins anew afterwards.

        Raises:
            NonFiniteError: if too many updates in a row were skipped.
        """
        self._later = None  # a reading under way has changed nothing, and is done anew
        self.read_updates()  # who learns of a NaN here need not wonder at what a metric makes of it
        return at_once(self._means(last=last))

    def read_updates(self) -> None:
        """Read which updates were skipped, and tell.

        Raises:
            NonFiniteError: if too many in a row were.
        """
        at_once(together(self._of_updates()))

    def read_later(self, *, means: bool = True) -> bool:
        """Read as :meth:`read` does, without waiting for the device: now, or at a later call, when the numbers have arrived.

        They are those of the step at which the reading was begun, by the first call. On the CPU they are there at once.

        Args:
            means: with the training means; else what :meth:`read_updates` reads.

        Returns:
            Whether the reading is through, so that the next call begins another.

        Raises:
            NonFiniteError: if too many updates in a row were skipped.
        """
        if self._later is None and not travels(_device_of(self.objective)):
            self.read() if means else self.read_updates()
            return True
        later, self._later = self._later, None
        if later is None:
            later = Later(self._all(self._means()) if means else together(self._of_updates()))
        if not later.arrived():
            self._later = later
        return self._later is None

    @property
    def under_way(self) -> bool:
        """Whether a reading is under way."""
        return self._later is not None

    def drop_reading(self) -> None:
        """Forget a reading that is under way, as a fit begins or ends."""
        self._later = None

    def settle(self) -> None:
        """Have callbacks that look later at the device do so now: before weights are judged or kept, or the fit ends."""
        if self.settling is not None:
            self.settling(self)

    def _means(self, *, last: bool = False) -> Reading[dict[str, Any]]:
        found = (yield from self.meter.reading(last=last)) if len(self.meter) else {}
        readings = {f"train/{name}": value for name, value in found.items()}
        self.values.update(readings)
        return readings

    def _all(self, means: Reading[dict[str, Any]]) -> Reading[None]:
        # Begun at one moment; but who learns of a NaN need not wonder at what a metric makes of it: an error of theirs waits.
        found = yield from together([together(self._of_updates()), _held(means)])
        if found[1] is not None:
            raise found[1]

    def _of_updates(self) -> list[Reading[Any]]:
        buffers = [] if self.buffers is None else [self.buffers.settling()]
        return [*(optimizer.reading() for optimizer in self.optimizers.values()), *buffers]

    def skip(self, flag: Tensor) -> None:
        """Leave out the updates of the step in hand where ``flag``, a scalar tensor on any device, is above 0.

        Nothing waits for the device. For hooks before the update: ``before_batch``, ``after_backward``.
        """
        self.vetoed = True
        for optimizer in self.optimizers.values():
            veto = flag.detach().reshape(()).to(torch.float32).clamp(0.0, 1.0).ceil()
            optimizer.veto = (
                veto if optimizer.veto is None else torch.maximum(optimizer.veto, placed(veto, optimizer.veto.device))
            )

    def end_vetoes(self) -> None:
        """The step is done: what was wanted of it is not of the next."""
        self.vetoed = False
        for optimizer in self.optimizers.values():
            optimizer.veto = None

    def record(self, readings: Mapping[str, Any]) -> None:
        """Add readings of your own, at the present step: to ``values`` and to the history."""
        for name, value in readings.items():
            if not isinstance(value, (int, float, list)):
                raise ConfigurationError(f"record({name!r}: {kind_of(value)}): a reading is a number on the host")
        self.values.update(readings)
        self.history.add(self.step, self.epoch, readings)

    def attach(self, name: str, part: Stateful, *, replace: bool = False) -> None:
        """Let an object of yours take part in saving and restoring, under a name that stays the same between runs."""
        if not isinstance(name, str) or not name or name.startswith("$"):
            raise ConfigurationError(f"attach({name!r}, ...): a name, of text that does not begin with '$'")
        if not isinstance(part, Stateful):
            raise ConfigurationError(f"attach({name!r}): {kind_of(part)} has no state_dict and load_state_dict")
        if self.attached.get(name, part) is not part and not replace:
            raise ConfigurationError(f"attach({name!r}): another object has that name; replace=True puts this one in its place")
        self.attached[name] = part
        if name in self._waiting:
            part.load_state_dict(self._waiting.pop(name))

    def cadence(self, name: str, every: Every) -> Cadence:
        """The cadence of that name: made at first, afterwards the one that remembers."""
        cadence = self._cadences.get(name)
        if cadence is None:
            cadence = self._cadences[name] = Cadence(every)
            self.attach(f"cadence/{name}", cadence)
        cadence.change(every)
        return cadence

    def start_clock(self) -> None:
        """Training begins, or goes on."""
        self._since = time.perf_counter()

    def stop_clock(self) -> None:
        """Training pauses."""
        self._trained, self._since = self.elapsed, None

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on bit for bit needs; no tensor in it is shared with what trains."""
        return _cloned(self.live())  # type: ignore[no-any-return]

    def live(self) -> dict[str, Any]:
        """The same without a copy: true until training goes on."""
        rng = randomness.snapshot() if self.drawing else self.rng
        rng = randomness.savable(rng) if isinstance(rng, randomness.Snapshot) else rng
        of_attached = {name: _state_of(name, part) for name, part in self.attached.items()}
        names = clean_names(self.objective)
        return {
            "objective": {names[key]: value for key, value in self.weights().items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "counters": {
                "epoch": self.epoch,
                "step": self.step,
                "samples": self.samples,
                "batch_index": self.batch_index,
                "epoch_length": self.epoch_length,
                "elapsed": self.elapsed,
                "seed": self.seed,
            },
            "values": self.values,
            **self.history.state_dict(),
            "plan": None if self.old_plan is None else self.old_plan.state_dict(),
            "owed": self.owed,
            "halt": self._halting(),
            "in_epoch": self.in_epoch,
            "setup": self.setup,
            "rng": rng,
            "meter": self.meter.state_dict(),
            "attached": {**self._waiting, **of_attached},
        }

    def weights(self) -> dict[str, Any]:
        """The objective's state, with averages in place of raw weights where there are any."""
        state: dict[str, Any] = self.objective.state_dict()
        if not self._averages:
            return state
        self._settle_averages()
        shown = {id(tensor): value for average in self._averages for tensor, value in average.shown()}
        tensors = self._tensors()
        return state | {key: shown[id(own)] for key, own in tensors.items() if key in state and id(own) in shown}

    def _tensors(self) -> dict[str, Tensor]:
        """The objective's parameters and buffers under each of their names."""
        parameters = self.objective.named_parameters(remove_duplicate=False)
        return {**dict(parameters), **dict(self.objective.named_buffers(remove_duplicate=False))}

    def _settle_averages(self) -> None:
        if self.plan is not None:  # else there is no progress to go by
            for average in self._averages:
                average.settle(self)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Averages of weights, where there are any, are what the module holds within the block."""
        shown: list[Average] = []
        self._settle_averages()
        try:
            shown.extend(average for average in self._averages if average.show())
            yield
        finally:
            for average in shown:
                average.hide()

    @contextlib.contextmanager
    def training_weights(self) -> Iterator[None]:
        """The raw weights are what the module holds within the block, where a fit has left averages in it."""
        shown = [average for average in self._averages if average.raw is not None]
        for average in shown:
            average.hide()
        try:
            yield
        finally:
            for average in shown:
                average.show()

    def hide_averages(self) -> None:
        """Training begins: where the module holds averages of weights, the raw ones come back."""
        for average in self._averages:
            average.resume()

    def show_averages(self) -> None:
        """A fit ends: averages of weights, where there are any, are what the module holds from now on."""
        self._settle_averages()
        for average in self._averages:
            if not average.show() and average.raw is None and self.step and self.status == "completed":
                warn(f"average={average.spec!r} has not begun by step {self.step}, where the fit ended: these are raw weights")

    def halting(self, *, pending: bool) -> dict[str, Any]:
        """What a hook has asked for, to be kept with the state; ``pending`` if the run has not ended by it yet."""
        assert self.request is not None  # whoever asks has seen it
        by = {"callback": self.stopper[0], "given": self.stopper[1]}
        return {"kind": type(self.request).__name__, "reason": self.request.reason, **by, "pending": pending}

    def _halting(self) -> dict[str, Any] | None:
        return self.halting(pending=True) if self.halt is None and self.request is not None else self.halt

    def outline(self) -> dict[str, Any]:
        """Of ``state_dict`` what says where the run stands and what it was made of."""
        counters = {"epoch": self.epoch, "step": self.step, "batch_index": self.batch_index, "seed": self.seed}
        plan = None if self.old_plan is None else self.old_plan.state_dict()
        return {"counters": counters, "plan": plan, "setup": self.setup}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave: the user builds the objects, the state fills them.

        Raises:
            CheckpointError: if it is of another objective or other optimizers; nothing is changed then.
        """
        weights = self._raw_of(state)
        self._check_weights(weights)
        if set(state["optimizers"]) != set(self.optimizers):
            raise CheckpointError(
                f"the saved state has the optimizers {sorted(state['optimizers'])}, this Loop {sorted(self.optimizers)}"
            )
        for name, optimizer in self.optimizers.items():
            optimizer.check(state["optimizers"][name])
        # The parts that are the user's or torchmetrics' first, as they may refuse what they get; of weights and optimizers all
        # has been looked at, and a copy of those to go back to would take as much memory as they have.
        before = _cloned(_without_weights(self.live()))
        try:
            self._load_rest(_cloned(_without_weights(state)))
        except Exception as error:
            self._load_rest(before)
            raise CheckpointError(
                f"the saved state could not be taken, and all is as it was: {type(error).__name__}: {plain(error)}"
            ) from error
        names = clean_names(self.objective)
        dtypes = {name: value.dtype for name, clean in names.items() if isinstance(value := weights.get(clean), Tensor)}
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name], dtypes)
        self._load_weights(weights)
        for name, optimizer in self.optimizers.items():
            optimizer.load_average(state["optimizers"][name], training=self.status == "running")
        if self.status != "running":
            self.status = "ready"
        self.last = None
        self.drop_reading()

    def _raw_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A saved state's weights, with the raw ones in place of averages that nobody goes on with here."""
        weights, names = dict(state["objective"]), clean_names(self.objective)
        tensors = self._tensors()
        for name, update in self.optimizers.items():
            saved = state["optimizers"].get(name, {}).get("average")
            if saved is None or update.takes(saved):
                continue
            raw = {id(tensors[key]): value for key, value in saved["raw"].items() if key in tensors}
            weights |= {names[key]: raw[id(own)] for key, own in tensors.items() if id(own) in raw and key in names}
        return weights

    def _load_rest(self, state: Mapping[str, Any]) -> None:
        counters = state["counters"]
        self.epoch, self.step = counters["epoch"], counters["step"]
        self.samples, self.batch_index = counters["samples"], counters["batch_index"]
        self.epoch_length = counters.get("epoch_length")
        self._trained, self.seed = counters["elapsed"], counters["seed"]
        self.values = state["values"]
        self.history.load_state_dict(state)
        plan = state.get("plan")
        self.old_plan = None if plan is None else Plan.of(plan)
        self.halt, self.half_done = state.get("halt"), False
        self.owed, self.in_epoch, self.setup = state.get("owed", []), state.get("in_epoch", False), state.get("setup", {})
        self.rng = state["rng"]
        # A file's tensors are on the CPU, and those of the steps to come will not be.
        self.meter.load_state_dict(to_device(state["meter"], _device_of(self.objective)))
        self._waiting = dict(state["attached"])
        for name, part in self.attached.items():
            if name in self._waiting:
                part.load_state_dict(self._waiting.pop(name))

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take the objective of a saved state alone: everything else stays as it is here.

        Raises:
            CheckpointError: if it is of another objective; nothing is changed then.
        """
        self._check_weights(state["objective"])
        for average in self._averages:
            average.forget()  # before they are there: one that cannot says so
        self._load_weights(state["objective"])

    def _check_weights(self, saved: Mapping[str, Any]) -> None:
        names = clean_names(self.objective)
        own = {names[key]: value for key, value in self.objective.state_dict().items()}
        _check_fit(own, saved, type(self.objective).__name__)
        if fault := torn(self.objective, saved):
            raise CheckpointError(f"the saved state is not of this {type(self.objective).__name__}: {fault}")

    def _load_weights(self, saved: Mapping[str, Any]) -> None:
        names = clean_names(self.objective)
        self.objective.load_state_dict({key: saved[names[key]] for key in self.objective.state_dict()})

    def __repr__(self) -> str:
        return f"LoopState({self.status}, epoch={self.epoch}, step={self.step}, {self.values})"


@dataclass(frozen=True, slots=True)
class Stop:
    """A hook's answer: end the run after this step."""

    reason: str = "a callback said so"


@dataclass(frozen=True, slots=True)
class StopEpoch:
    """A hook's answer: end the epoch after this step; it counts as completed, with the readings so far."""

    reason: str = "a callback said so"


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """How a fit ended.

    Args:
        status: "completed" (a limit was reached), "stopped" (a callback said so), "interrupted" (Ctrl-C).
        reason: which limit, which callback and why, in words.
        values: the last readings.
        history: all readings up to the end of this fit.
        state: the loop's state, live: it moves on with another fit.
        epoch: epochs completed at its end.
        step: batches trained on at its end.
    """

    status: str
    reason: str
    values: dict[str, Any]
    history: History
    state: LoopState = field(repr=False)
    epoch: int = 0
    step: int = 0

    @property
    def ok(self) -> bool:
        """Whether the run ended by its own rules: completed, or stopped by a callback."""
        return self.status in ("completed", "stopped")

    def __str__(self) -> str:
        return f"{self.history}\n{self._caption()}"

    def __repr__(self) -> str:
        numbers = {name: value for name, value in self.values.items() if isinstance(value, (int, float))}
        return f"Result({self._caption()}, values={numbers})"

    def _repr_html_(self) -> str:
        return display.rich(self.history.rows, self._caption())

    def _caption(self) -> str:
        return f"{self.status} ({self.reason}) at epoch {self.epoch}, step {self.step}"


def _state_of(name: str, part: Stateful) -> Any:
    try:
        return part.state_dict()
    except Exception as error:
        error.add_note(f"in the state_dict of {name.removeprefix('callback/')}, which takes part in saving")
        raise


def _held(reading: Reading[Any]) -> Reading[Exception | None]:
    """The same, but it gives what it would raise."""
    try:
        yield from reading
    except Exception as error:
        return error
    return None


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _without_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in state.items() if name not in ("objective", "optimizers")}


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _cloned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cloned(item) for item in value]
    # As from a file, where nothing is left of a type of somebody's own.
    if isinstance(value, str):
        return str.__str__(value)
    return float(value) if isinstance(value, float) else value


def _check_fit(own: Mapping[str, Any], saved: Mapping[str, Any], name: str) -> None:
    missing, foreign = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or foreign:
        raise CheckpointError(
            f"the saved state is not of this {name}: "
            + "; ".join(
                f"{what} {', '.join(plain(name, NAME) for name in names[:6])}{', ...' if len(names) > 6 else ''}"
                for what, names in (("it lacks", missing), ("this objective lacks", foreign))
                if names
            )
        )
    for key, value in own.items():
        there = saved[key]
        if isinstance(value, Tensor) and isinstance(there, Tensor) and loses(there, value):
            raise CheckpointError(
                f"the saved state is not of this {name}: {key} is {kind_of(there)} there, {kind_of(value)} here"
            )
        if isinstance(value, Tensor) and value.shape != getattr(saved[key], "shape", None):
            raise CheckpointError(
                f"the saved state is not of this {name}: {key} is {_shape(saved[key])} there, {_shape(value)} here"
            )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else kind_of(value)
