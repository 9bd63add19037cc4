"""Loop: fit, evaluate, predict. The algorithm is ``Loop._algorithm``; start reading there.

All that is optional is wrapped around the objective or the data once, before the algorithm starts (:mod:`axontrain.execution`,
:mod:`axontrain.data.stream`), so that the algorithm itself has no branches for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from axontrain import callback, checkpoint, randomness
from axontrain.callback import HOOKS, Callback, FunctionCallback, Hook, Hooks, Saver
from axontrain.callbacks.checkpoint import Checkpoint
from axontrain.callbacks.progress import ProgressBar
from axontrain.checkpoint import runs
from axontrain.checkpoint.lock import DirectoryLock
from axontrain.checkpoint.schema import check
from axontrain.clock import Duration, Every, Plan
from axontrain.data.stream import DEFAULT_BATCH_SIZE, Stream
from axontrain.data.structure import joined, to_device
from axontrain.errors import AxonWarning, CheckpointError, ConfigurationError, OptimizerError, kind_of, reject, unknown, whole
from axontrain.execution import modes
from axontrain.execution.notes import noted, reading
from axontrain.execution.run import (
    AFTER_EPOCH,
    DUE,
    EVALUATE,
    READ_EVERY_SECONDS,
    VALIDATE,
    Run,
    again,
    clear_gradients,
    session,
    stream_of,
)
from axontrain.execution.setup import compare, describe, same_batches, tell, warn
from axontrain.execution.steps import Runner, check_eval, runner
from axontrain.metrics.meter import Meter
from axontrain.metrics.registry import resolve
from axontrain.objective import Objective, Step, task_of
from axontrain.objective import batch_size as size_of
from axontrain.optimizer import MAIN, Optimizer, check_covered, route
from axontrain.preflight import Report, preflight
from axontrain.state import LoopState, Result, Stop, StopEpoch
from axontrain.update import Update

Function = TypeVar("Function", bound=Hook)


class Loop:
    """Trains, evaluates and predicts with one objective.

    Args:
        objective: what is trained; it is moved to ``device``.
        optimizer: an :class:`~axontrain.Optimizer`, or a dict of them by name; None to evaluate and predict only.
        metrics: further metrics, beside the objective's own (see :func:`axontrain.metrics.register`).
        callbacks: what happens beside training, in this order.
        evaluate_with: an objective that stands in for evaluation and validation.
        seed: what all that is random in training follows from; None takes one from torch's generator.
        device: "auto" takes a GPU where there is one.
        strict: raise where a batch's structure or trailing shape differs from the first batch's, and where a list looks like
            one of samples rather than of batches.
        progress: show a bar, or lines where no bar can be.
        directory: where history and checkpoints are written; None writes nothing.

    >>> import axontrain as ax
    >>> line = ax.ArrayDataset(torch.linspace(-1, 1, 64)[:, None], torch.linspace(-2, 2, 64)[:, None])
    >>> loop = Loop(ax.Supervised(torch.nn.Linear(1, 1), "mse"), ax.Optimizer("sgd", lr=0.3), progress=False)
    >>> result = loop.fit(line, epochs=20)
    >>> result.status, result.values["train/loss"] < 1e-3
    ('completed', True)
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        *,
        metrics: Any = None,
        callbacks: Sequence[Callback] = (),
        evaluate_with: Objective | None = None,
        seed: int | None = 0,
        device: str | torch.device = "auto",
        strict: bool = True,
        progress: bool = True,
        directory: str | Path | None = None,
        **others: Any,
    ) -> None:
        reject(others, Loop.__init__)
        for name, given in (("objective", objective), ("evaluate_with", evaluate_with)):
            if not isinstance(given, Objective) and not (given is None and name == "evaluate_with"):
                hint = (
                    "it is a class: call it"
                    if isinstance(given, type)
                    else "subclass it, or wrap a model: ax.Supervised(model, loss)"
                )
                raise ConfigurationError(f"{name} is {kind_of(given)}, no ax.Objective: {hint}")
        self.device = _device(device)
        self.objective = _moved(objective, self.device)
        self.evaluate_with = None if evaluate_with is None else _moved(evaluate_with, self.device)
        self.metrics = {**resolve(objective.metrics), **resolve(metrics)}
        judge = objective if evaluate_with is None else evaluate_with
        self._eval_metrics = {**resolve(judge.metrics), **resolve(metrics)}
        self.callbacks = callback.checked(callbacks)
        self.strict, self.progress = strict, progress
        if directory is not None and not isinstance(directory, (str, os.PathLike)):
            raise ConfigurationError(f"directory={directory!r}: a path, as 'runs/first'; None writes nothing")
        self.directory = None if directory is None else Path(directory)
        self.optimizers = _optimizers(optimizer)
        bound = {
            name: Update(name, self.optimizers[name], parameters)
            for name, parameters in route(objective, self.optimizers).items()
        }
        self._seed = seed
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        self.state = LoopState(objective, bound, seed, Meter(self.metrics))
        for update in bound.values():
            update.clock = self.state
        if self.directory is not None:
            self.state.directory, self.state.history.path = self.directory, self.directory / "history.jsonl"
        self._attach_callbacks()
        self._at_home = False  # whether what lies in the directory is of this run
        self._by_hand: Runner | None = None
        self._last_stream: Stream | None = None
        self._next_reading = 0.0

    def fit(
        self,
        train: Any,
        validation: Any = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        time: str | float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        validate: str | int | Every = "1 epoch",
        limit: int | None = None,
        resume: bool = False,
        **others: Any,
    ) -> Result:
        """Train until the first of the limits is reached; a second fit trains that much more.

        Args:
            train: a Dataset (shuffled), a :class:`~axontrain.Loader`, or any iterable of batches.
            validation: the same, not shuffled; evaluated whenever ``validate`` says.
            epochs, steps, time: the limits (``time="10 min"``, or seconds); at least one.
            batch_size: samples in a batch, where ``train`` or ``validation`` is a bare Dataset.
            validate: a duration: "1 epoch", "500 steps", "10 min", "5%", or an :class:`~axontrain.Every`.
            limit: end each pass, of training and validation, after so many batches: for trials.
            resume: go on inside the plan of a fit that was interrupted or killed, as if it had not been; the limits are then
                those of both together. It goes on from memory where something is there, else from the newest checkpoint of
                ``directory`` that verifies, else it begins afresh: so the same script started again finishes the same run.

        Returns:
            The :class:`~axontrain.Result`: status, reason, last readings, history.

        Raises:
            ConfigurationError: for arguments that cannot work; for a ``directory`` that another process is using.
            CheckpointError: if no checkpoint of the directory is good, or it is of something else; with ``resume``, if what has
                changed since would make it another run.
            SystemExit: with status 143, after SIGTERM: the state was saved, where there is a ``directory``.
            OptimizerError: if there is no optimizer, or a trainable parameter that none covers.
        """
        reject(others, Loop.fit)
        run = self._run(train, validation, epochs, steps, time, batch_size, validate, limit, resume)
        deque(self._algorithm(run), maxlen=0)  # runs the generator to its end
        return run.result()

    def steps(
        self,
        train: Any,
        validation: Any = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        time: str | float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        validate: str | int | Every = "1 epoch",
        limit: int | None = None,
        resume: bool = False,
        **others: Any,
    ) -> Iterator[Step]:
        """The same as ``fit``, step by step: ``for step in loop.steps(train, epochs=1): ...``.

        It is the same algorithm; leaving the loop early ends the run. Between steps the random generators are the caller's.
        """
        reject(others, Loop.steps)
        run = self._run(train, validation, epochs, steps, time, batch_size, validate, limit, resume)
        return self._stepping(run)

    def _algorithm(self, run: Run) -> Iterator[Step]:
        """Train: the one algorithm that ``fit`` and ``steps`` run."""
        state, train_step, record = run.state, run.train_step, run.record
        before_batch, after_batch = run.hooks.before_batch, run.hooks.after_batch
        with session(run):
            self._settle(run)
            while run.goes_on():
                run.begin_epoch()
                for batch in run.batches():
                    if before_batch is not None:
                        before_batch(state)
                        if state.request is not None:
                            break
                    state.last = step = None  # what it holds need not outlive the next forward pass
                    state.last = step = train_step(batch)  # forward, backward, after_backward, update
                    state.step += 1
                    state.batch_index += 1
                    state.samples += size_of(batch)
                    record(step)  # on the device
                    if after_batch is not None:
                        state.owed = DUE  # a state saved by a hook has yet to be looked at
                        after_batch(state)
                        state.owed = []
                    yield step
                    if state.step >= run.next_step or perf_counter() >= run.next_time or state.request is not None:
                        if self._look_up(run):
                            break
                if run.epoch_is_over():
                    self._end_epoch(run)
            self._end_fit(run)
        run.exit_if_terminated()

    def _look_up(self, run: Run) -> bool:
        """Validate, read or save, where due; whether the pass over the data ends here."""
        state = run.state
        if not run.epoch_is_over():  # else the epoch's end does it
            if run.validate.due(state):
                self._read_and_validate(run)
            elif perf_counter() >= run.next_reading:
                state.read()
            run.save()
        run.look_ahead()
        return state.request is not None or run.interrupted() or run.plan.over(state) is not None

    def _end_epoch(self, run: Run) -> None:
        """Count the epoch; then validation, readings, ``after_epoch``, saving: all of one and the same step."""
        state = run.state
        state.epoch += 1
        state.batch_index, state.in_epoch = 0, False
        state.owed = [AFTER_EPOCH]
        self._read_and_validate(run, validate=run.validate.due(state))
        self._after_epoch(run)

    def _after_epoch(self, run: Run) -> None:
        state = run.state
        if not run.interrupted():
            state.owed = []
            if run.hooks.after_epoch is not None:
                run.hooks.after_epoch(state)
            run.save()
        if isinstance(state.request, StopEpoch):  # the epoch is over now
            state.request = None
        run.look_ahead()

    def _read_and_validate(self, run: Run, *, validate: bool = True) -> None:
        state = run.state
        readings = state.read(last=True)
        state.meter.reset()
        if validate and run.validation is not None:
            self._validate(run, readings)
        else:
            _record(state, readings)

    def _validate(self, run: Run, readings: dict[str, Any]) -> None:
        """Evaluate, and take the readings with those of training.

        A validation that is interrupted is owed, and one that comes too late: when the run is resumed, it is done first.
        """
        state = run.state
        assert run.validation is not None  # else nothing is due
        too_late = isinstance(state.request, Stop) and state.batch_index and EVALUATE not in state.owed
        if run.interrupted() or too_late:
            if not state.owed or state.owed[0] == AFTER_EPOCH:
                state.owed = [VALIDATE, *state.owed]
            _record(state, readings)
            return
        if run.hooks.before_evaluate is not None:
            with again(state) if EVALUATE in state.owed else contextlib.nullcontext():
                run.hooks.before_evaluate(state)
        rest = [one for one in state.owed if one == AFTER_EPOCH]
        state.owed = [EVALUATE, *rest]
        try:
            found = self._evaluate(run.validation, run)
        except BaseException:
            _record(state, readings)
            raise
        run.validated, interrupted = True, run.interrupted()
        if not interrupted:
            readings = readings | {f"val/{name}": value for name, value in found.items()}
        _record(state, readings)
        if interrupted:
            return
        state.owed = rest
        if run.hooks.after_evaluate is not None:
            run.hooks.after_evaluate(state)

    def _settle(self, run: Run) -> None:
        """Do what an interruption left undone at the end of the last step, where the run is resumed."""
        state = run.state
        if not state.resumed:
            return
        if state.owed == DUE:
            state.owed = []
            self._look_up(run)
        elif state.owed:
            if run.validation is None:
                state.owed = [one for one in state.owed if one == AFTER_EPOCH]
            elif state.owed[0] in (VALIDATE, EVALUATE):
                self._validate(run, {})
                state.history.rewrite()  # one row of it and of what was read before
            if AFTER_EPOCH in state.owed:
                self._after_epoch(run)
            else:
                run.save()
        if (state.batch_index or state.in_epoch) and run.epoch_is_over():
            self._end_epoch(run)

    def _end_fit(self, run: Run) -> None:
        """Read what is left of an epoch that a limit or a stop has ended; save."""
        state = run.state
        trained = state.step - run.first_step
        if state.batch_index and trained:
            readings = state.read()
            if readings:
                state.history.add(state.step, state.epoch, readings, partial=True)
        validated = run.validated or (state.resumed and any(name.startswith("val/") for name in state.values))
        if run.validation is not None and trained and not validated and run.status == "completed":
            warnings.warn(
                f"the validation data was never used: the run ended after {trained} steps, before "
                f"{run.validate.every!r} was due; pass validate= a shorter interval, as in validate=100",
                AxonWarning,
                stacklevel=4,
            )
        for saver in run.savers:
            saver.at_fit_end(state)

    def evaluate(self, data: Any, *, batch_size: int = DEFAULT_BATCH_SIZE, **others: Any) -> dict[str, Any]:
        """Evaluate: ``{"loss": ..., "accuracy": ...}``, means by items over the whole of ``data``.

        Modules are in eval mode for as long as it takes, there are no gradients, and what is random follows from the seed.
        """
        reject(others, Loop.evaluate)
        stream = self._stream(data, "data", batch_size)
        self._check_batch_size(batch_size, stream)
        with contextlib.closing(stream):
            return self._evaluate(stream)

    def _evaluate(self, stream: Stream, run: Run | None = None) -> dict[str, Any]:
        objective = self.objective if self.evaluate_with is None else self.evaluate_with
        meter = Meter(self._eval_metrics) if run is None else run.meter
        meter.reset()
        meter.tasks = stream.tasks
        with self._evaluating(objective):
            for index, batch in enumerate(reading(stream.batches(self.state.seed, 0), "in evaluation")):
                with noted(f"in evaluation, batch {index}", batch, objective):
                    step = objective.eval_step(batch)
                if index == 0:
                    check_eval(step, objective)
                step.loss = step.loss.detach()
                meter.record(step, task_of(batch))
                if run is not None and run.interrupted():
                    return {}
        if not len(meter):
            raise stream.empty()
        return meter.read(last=True)

    def predict(self, data: Any, *, batch_size: int = DEFAULT_BATCH_SIZE, stream: bool = False, **others: Any) -> Any:
        """Predict for all of ``data``, in its order.

        Batches go through the objective's ``split``: of a pair the first is the inputs, a bare tensor is inputs.

        Args:
            data: a Dataset, a Loader, a tensor or array (rows), or any iterable of batches.
            batch_size: of a bare Dataset or tensor.
            stream: give an iterator of the predictions of each batch, on the device, instead of all of them on the CPU.

        Returns:
            What ``predict`` returns, batches put together along the first dimension.
        """
        reject(others, Loop.predict)
        batches = self._stream(data, "data", batch_size)
        self._check_batch_size(batch_size, batches)
        predictions = self._predicting(batches)
        if stream:
            return (prediction for prediction, _ in predictions)
        cpu = torch.device("cpu")
        return joined([(to_device(prediction, cpu), size) for prediction, size in predictions])

    def _predicting(self, stream: Stream) -> Iterator[tuple[Any, int]]:
        """The predictions and the size of each batch. Between batches, modes and generators are the caller's."""
        rng = None
        batches: Generator[Any, None, None] | None = None
        with contextlib.closing(stream), contextlib.ExitStack() as stack:
            while True:
                with self._evaluating(self.objective):
                    if rng is not None:
                        randomness.restore(rng)
                    if batches is None:
                        batches = reading(stream.batches(self.state.seed, 0), "in prediction")
                        stack.callback(batches.close)
                    batch = next(batches, END)
                    if batch is END:
                        break
                    with noted("in prediction", batch, self.objective):
                        prediction = self.objective.predict(self.objective.split(batch)[0])
                    size, rng = size_of(batch), randomness.capture()
                yield prediction, size
        if rng is None:
            raise stream.empty()

    @contextlib.contextmanager
    def _evaluating(self, objective: Objective) -> Iterator[None]:
        seed = randomness.derive(self.state.seed, "evaluate")
        with modes.evaluation(objective), randomness.seeded(seed), torch.no_grad():
            yield

    def train_on_batch(self, batch: Any) -> Step:
        """Train on one batch: forward, backward, update, counters and readings, for a loop of your own.

        Callbacks belong to ``fit`` and are not called. ``loop.state.read()`` reads the means so far. Modules train as they
        would in ``fit``, and draw from the run's own random stream.

        Raises:
            ConfigurationError: for a schedule of progress, since a single batch has no end to progress to.
        """
        self._check_ready()
        state = self.state
        if any(update.sees_progress for update in state.optimizers.values()):
            raise ConfigurationError(
                "train_on_batch knows no end, so a schedule of progress has nothing to go by: use loop.steps(train, ...), or "
                "a torch scheduler factory, which counts steps"
            )
        if self._by_hand is None:
            self._by_hand = runner(state, None)
            self._next_reading = perf_counter() + READ_EVERY_SECONDS
            clear_gradients(self.objective)
        batch = to_device(batch, self.device)
        with modes.training(self.objective), stream_of(state), noted("in train_on_batch", batch, self.objective):
            step = self._by_hand(batch)
        state.step += 1
        state.samples += size_of(batch)
        state.last = step
        state.meter.record(step, task_of(batch))
        if perf_counter() >= self._next_reading:  # of what was skipped: nobody else may ask for a long time
            self._next_reading = perf_counter() + READ_EVERY_SECONDS
            for update in state.optimizers.values():
                update.read()
        return step

    def on(
        self,
        hook: str,
        every: Any = None,
        *,
        first: int | None = None,
        after: int | str | None = None,
        before: int | str | None = None,
        **others: Any,
    ) -> Callable[[Function], Function]:
        """Make a function a callback: ``@loop.on("after_batch", every=100)``. It takes the state, as any hook does."""
        reject(others, Loop.on)
        if hook not in HOOKS:
            raise unknown("hook", hook, HOOKS)

        def take(function: Function) -> Function:
            made = FunctionCallback(hook, function, every=every, first=first, after=after, before=before)
            self.callbacks.append(made)
            return function

        return take

    def save(self, path: str | Path | None = None) -> Any:
        """Save the whole state: to a directory of safetensors and JSON, or, without a path, to memory.

        Returns:
            The directory; or a snapshot that ``restore`` takes.
        """
        if path is None:
            return self.state.state_dict()
        return checkpoint.write(path, self.state.live(), runs.told_of(self.state))

    def restore(self, source: str | Path | Mapping[str, Any], *, only: str | None = None) -> None:
        """Go on from a saved state.

        Nothing in a directory is executed or imported: the objects are yours, the state fills them.

        Args:
            source: a checkpoint's directory; a run directory, whose newest checkpoint that verifies is taken; or a snapshot
                that ``save()`` gave.
            only: "objective" takes the weights alone; optimizers, counters and all else stay as they are.

        Raises:
            CheckpointError: if it is damaged, or of another objective; nothing is changed then.
        """
        if not isinstance(source, (str, os.PathLike, Mapping)):
            raise ConfigurationError(f"restore({kind_of(source)}): the path of a checkpoint or of a run, or what save() gave")
        if only not in (None, "objective"):
            raise unknown("part of a state, only =", only, ("objective",))
        tree = source if isinstance(source, Mapping) else _read(Path(source))
        try:
            check(tree)
        except CheckpointError as error:
            raise CheckpointError(f"{'the snapshot' if tree is source else source}: {error}") from error
        if only == "objective":
            self.state.load_weights(tree)
            return
        self._take(tree, source)

    def _take(self, tree: Mapping[str, Any], source: Any) -> None:
        self._attach_callbacks()
        try:
            self.state.load_state_dict(tree)
        except CheckpointError as error:
            if isinstance(source, Mapping):
                raise
            raise CheckpointError(
                f"{source}: {error}. To begin anew, choose another directory=; for its weights alone, "
                f"loop.restore({str(source)!r}, only='objective') or ax.load_weights"
            ) from error
        if self.directory is not None and not isinstance(source, Mapping):
            self._at_home |= Path(source).resolve().is_relative_to(self.directory.resolve())

    def check(self, train: Any, validation: Any = None, *, batch_size: int = DEFAULT_BATCH_SIZE) -> Report:
        """Look for what commonly goes wrong, on a copy of everything: nothing is changed, the random generators neither.

        See :func:`axontrain.preflight.preflight` for what is looked at.
        """
        streams = {"train": self._stream(train, "train", batch_size, shuffle=True)}
        if validation is not None:
            streams["validation"] = self._stream(validation, "validation", batch_size)
        self._check_batch_size(batch_size, *streams.values())
        return preflight(
            self.objective, self.evaluate_with, self.optimizers, self.metrics, self._eval_metrics, streams, self.state.seed
        )

    def __repr__(self) -> str:
        return f"Loop({type(self.objective).__name__}, {self.optimizers or None}, {self.state!r})"

    def _run(
        self,
        train: Any,
        validation: Any,
        epochs: int | None,
        steps: int | None,
        time: str | float | None,
        batch_size: int,
        validate: str | int | Every,
        limit: int | None,
        resume: bool,
    ) -> Run:
        """Check and put together all that a fit needs; what is wrong is found before anything is changed."""
        self._check_ready()
        if validate is None:
            raise ConfigurationError("validate=None: to validate never, leave the validation data out")
        if not isinstance(resume, bool):
            raise ConfigurationError(f"resume={resume!r}: True or False; to go on from one checkpoint, loop.restore(path)")
        every, plan = Every.parse(validate, "validate"), _plan(epochs, steps, time)
        stream = self._stream(train, "train", batch_size, shuffle=True, limit=limit)
        validating = None if validation is None else self._stream(validation, "validation", batch_size, limit=limit)
        streams = [one for one in (stream, validating) if one is not None]
        self._check_batch_size(batch_size, *streams)
        for one in streams:
            if one.length == 0:
                raise one.empty()
        savers = [one for one in self.callbacks if isinstance(one, Saver)]
        if len(savers) > 1:
            raise ConfigurationError(
                f"callbacks has {' and '.join(map(repr, savers))}, and each would prune what the other keeps: one does all, "
                f"ax.Checkpoint(every=..., keep_last=..., best=..., permanent=...)"
            )
        if modes.asleep(self.objective):
            warnings.warn(f"{modes.ASLEEP}, unless that is meant", AxonWarning, stacklevel=3)
        with contextlib.ExitStack() as held:
            if self.directory is not None:
                held.enter_context(DirectoryLock(self.directory))
            run = self._begun(plan, every, stream, validating, resume)
            run.lock = held.pop_all()  # the session gives it up
        return run

    def _begun(
        self,
        plan: Plan,
        every: Every,
        stream: Stream,
        validating: Stream | None,
        resume: bool,
    ) -> Run:
        state = self.state
        setup = describe(state, stream, validating, every, self.metrics, self.callbacks, self.device)
        if self.directory is not None:
            runs.sweep(self.directory)
        found = self._found() if resume else ""
        if self.directory is not None and (not resume or found == MEMORY):
            self._check_directory(self.directory)
        resumed = self._goes_back(found, setup, plan)
        self._at_home = True
        same = stream.goes_on_from(self._last_stream) if self._last_stream else same_batches(state.setup, setup)
        if resumed and not same and self._last_stream is not None:  # the same data, as far as can be seen, in another object
            stream.load_state_dict(self._last_stream.state_dict())
            same = True
        ended = state.batch_index >= (stream.length or math.inf)
        if resumed and same and ended and state.in_epoch and not state.owed:
            state.owed = DUE  # left or saved between an epoch's last step and its end
        if not same or (ended and state.owed != DUE):
            state.batch_index, state.in_epoch = 0, False  # other batches than those that it had begun with: it begins anew
        pending = self._pending(found) if resumed else None
        if resumed and state.old_plan is not None:
            plan.goes_on_from(state.old_plan)
            if plan.over(state) is None and not isinstance(pending, Stop):
                state.history.take_back()
        else:
            plan.start_epoch, plan.start_step, plan.start_elapsed = state.epoch, state.step, state.elapsed
            plan.start_index = state.batch_index
            state.owed, state.history.partial = [], None
        if state.batch_index == 0:
            state.meter.reset()
        as_long = same and (self._last_stream is None or self._last_stream.limit == stream.limit)
        if stream.length is not None or not as_long:  # what has no length keeps the one that its last pass had
            state.epoch_length = stream.length
        state.plan, state.validates, state.meter.tasks = plan, validating is not None, stream.tasks
        state.setup, state.resumed = setup, resumed
        self._last_stream = stream
        state.attach("data", stream, replace=True)
        self._attach_callbacks()
        state.history.rewrite()
        cadence = state.cadence("validate", every)
        cadence.start(state, resumed=resumed)
        callbacks = [*self.callbacks, *([ProgressBar()] if self.progress else [])]
        savers = tuple(one for one in callbacks if isinstance(one, Saver))
        if self.directory is not None and not savers:
            savers = (Checkpoint(),)
            callbacks.extend(savers)
        hooks = Hooks(callbacks, state, resumed=resumed)
        train_step = runner(state, hooks.after_backward)
        meter = Meter(self._eval_metrics)
        run = Run(state, plan, stream, validating, meter, cadence, hooks, train_step, state.step, savers=savers)
        run.pending, state.halt = pending, None
        return run

    def _found(self) -> str | tuple[Path, Any]:
        """What there is to resume: the run in memory, or the newest checkpoint and its tree; "" if there is nothing."""
        state = self.state
        in_memory = state.step > 0 or state.old_plan is not None
        if self.directory is not None and (state.half_done or not in_memory):
            newest = runs.newest(self.directory)
            if newest is not None:
                return newest
        return MEMORY if in_memory else ""

    def _goes_back(self, found: str | tuple[Path, Any], setup: Mapping[str, Any], plan: Plan) -> bool:
        """Whether this fit goes on inside an earlier plan; a checkpoint that was found is restored.

        What has changed since is told in one warning, or is an error where it would make another run of it.
        """
        limits = {name: value for name, value in plan.state_dict().items() if not name.startswith("start_")}
        if isinstance(found, str):
            if not found:
                return False
            tell(found, compare(self.state.outline(), setup, None, limits))
            if self.state.half_done:
                warn("the last fit failed within a step, of which a part may be done, and there is no checkpoint to go back to")
            return True
        path, tree = found
        try:
            check(tree)
            changes = compare(tree, setup, self._seed, limits)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._take(tree, path)
        tell(path, changes)
        return True

    def _pending(self, found: str | tuple[Path, Any]) -> Stop | StopEpoch | None:
        """What a hook has asked for, and the run that is resumed has not done yet; or has done, and would do again.

        A run that a callback has ended is over when its script is started again, if that callback is still there and made in
        the same way (a function on a hook is not known again). In memory it was a person who said to go on.
        """
        halt = self.state.halt
        if halt is None:
            return None
        self.state.stopper = (halt["callback"], halt["given"])
        if halt["pending"]:
            return StopEpoch(halt["reason"]) if halt["kind"] == StopEpoch.__name__ else Stop(halt["reason"])
        stopper = callback.keys(self.callbacks).get(halt["callback"])
        if found == MEMORY or stopper is None or stopper.restates or isinstance(stopper, FunctionCallback):
            return None
        return Stop(halt["reason"]) if stopper.given == halt["given"] else None

    def _stepping(self, run: Run) -> Iterator[Step]:
        # The generators are the run's while it computes, and the caller's while the caller does.
        state, algorithm = run.state, self._algorithm(run)
        caller, left = randomness.capture(), True
        try:
            for step in algorithm:
                state.rng, state.drawing = randomness.capture(), False
                state.owed = DUE  # who leaves now, or saves, has not had what is due after this step
                randomness.restore(caller)
                try:
                    yield step
                    state.owed = []
                finally:
                    caller = randomness.capture()
                    randomness.restore(state.rng)
                    state.drawing = True
            left = False
        except SystemExit:
            left = False
            raise
        finally:
            algorithm.close()  # type: ignore[attr-defined]  # it is a generator
            randomness.restore(caller)
            if left and run.terminated:  # nobody would hear of an error in a generator that is left
                signal.raise_signal(signal.SIGTERM)

    def _stream(self, data: Any, name: str, batch_size: int, *, shuffle: bool = False, limit: int | None = None) -> Stream:
        return Stream(data, name, batch_size=batch_size, shuffle=shuffle, limit=limit, strict=self.strict, device=self.device)

    def _check_batch_size(self, batch_size: int, *streams: Stream) -> None:
        if batch_size != DEFAULT_BATCH_SIZE and all(stream.brings_batches for stream in streams):
            raise ConfigurationError(
                f"batch_size={batch_size} has no effect on {' and '.join(s.name for s in streams)}, which bring their own "
                f"batches: leave it out, or pass a Dataset"
            )

    def _check_ready(self) -> None:
        state = self.state
        if state.status == "running":
            raise ConfigurationError("this Loop is running already: a hook of it cannot train with it too; use another Loop")
        if not state.optimizers:
            raise OptimizerError(
                "this Loop has no optimizer, so it can evaluate and predict only: ax.Loop(objective, optimizer)"
            )
        check_covered(self.objective, {name: update.parameters for name, update in state.optimizers.items()})

    def _check_directory(self, directory: Path) -> None:
        history = directory / "history.jsonl"
        if not self._at_home and ((history.is_file() and history.stat().st_size) or runs.entries(directory)):
            raise ConfigurationError(
                f"directory={str(directory)!r} holds another run already: choose another, or go on with that run by "
                f"fit(..., resume=True)"
            )

    def _attach_callbacks(self) -> None:
        for key, one in callback.stateful(self.callbacks).items():
            self.state.attach(f"callback/{key}", one, replace=True)


def _record(state: LoopState, readings: dict[str, Any]) -> None:
    state.values.update(readings)
    if readings:
        state.history.add(state.step, state.epoch, readings)


def _read(path: Path) -> Any:
    """The tree of a checkpoint's directory, or of the newest good one of a run directory."""
    if path.is_dir() and runs.entries(path):
        found = runs.newest(path)
        return None if found is None else found[1]
    return checkpoint.read(path)


def _optimizers(optimizer: Any) -> dict[str, Optimizer]:
    named = {} if optimizer is None else dict(optimizer) if isinstance(optimizer, Mapping) else {MAIN: optimizer}
    for name, one in named.items():
        if not isinstance(one, Optimizer):
            raise ConfigurationError(
                f"the optimizer {name!r} is {kind_of(one)}; it is an ax.Optimizer, as ax.Optimizer('adamw', lr=1e-3)"
            )
    return named


def _device(device: str | torch.device) -> torch.device:
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ConfigurationError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def _moved(objective: Objective, device: torch.device) -> Objective:
    if all(tensor.device == device for tensor in (*objective.parameters(), *objective.buffers())):
        return objective
    try:
        return objective.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigurationError(f"device={str(device)!r} cannot be used: {error}") from error


def _plan(epochs: Any, steps: Any, time: Any) -> Plan:
    epochs = None if epochs is None else whole("epochs", epochs, 0)
    steps = None if steps is None else whole("steps", steps, 0)
    seconds = None
    if time is not None:
        number = isinstance(time, (int, float)) and not isinstance(time, bool)
        duration = Duration.parse(f"{time!r} s" if number else time, "time")
        if duration.unit != "seconds":
            raise ConfigurationError(f"time={time!r}: a time, as '10 min', or a number of seconds")
        seconds = float(duration.amount)
    if epochs is None and steps is None and seconds is None:
        raise ConfigurationError("fit would never end: give it a limit, epochs=, steps= or time= (the first reached ends it)")
    if epochs == 0 or steps == 0 or seconds == 0:
        warnings.warn("this fit trains nothing: a limit is 0", AxonWarning, stacklevel=4)
    return Plan(epochs, steps, seconds)


END = object()
MEMORY = "memory"
