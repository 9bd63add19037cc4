"""Loop: fit, evaluate, predict. The algorithm is ``Loop._algorithm``; start reading there.

All that is optional is wrapped around the objective or the data once, before the algorithm starts (:mod:`axontrain.execution`,
:mod:`axontrain.data.stream`), so that the algorithm itself has no branches for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from axontrain import callback, checkpoint, in_backward, randomness
from axontrain.callback import HOOKS, Callback, FunctionCallback, GoBack, Hook
from axontrain.checkpoint import runs, schema
from axontrain.clock import Every
from axontrain.data.stream import DEFAULT_BATCH_SIZE
from axontrain.data.structure import joined, to_device
from axontrain.errors import CheckpointError, ConfigurationError, kind_of, reject, unknown, warn, whole
from axontrain.execution import due, modes, passes
from axontrain.execution.compilation import Compilation
from axontrain.execution.devices import device_of, moved
from axontrain.execution.graphing import Graphing
from axontrain.execution.notes import noted
from axontrain.execution.precision import Precision
from axontrain.execution.report import StepReport
from axontrain.execution.run import DUE, LOOK_AGAIN_SECONDS, READ_EVERY_SECONDS, Run, clear_gradients, session, stream_of
from axontrain.execution.signals import TERMINATED
from axontrain.execution.steps import Runner
from axontrain.metrics.meter import Meter
from axontrain.metrics.registry import resolve
from axontrain.objective import Objective, Step, task_of
from axontrain.objective import batch_size as size_of
from axontrain.optimizer import Optimizer, named, route
from axontrain.preflight import Report, preflight
from axontrain.start import Start, check_batch_size, check_ready, naming
from axontrain.state import LoopState, Result

Function = TypeVar("Function", bound=Hook)


class Loop:
    """Trains, evaluates and predicts with one objective.

    Args:
        objective: what is trained; it is moved to ``device``.
        optimizer: an :class:`~axontrain.Optimizer`, or a dict of them by name; None to evaluate and predict only.
        metrics: further metrics, beside the objective's own (see :func:`axontrain.metrics.register`).
        callbacks: what happens beside training, in this order.
        evaluate_with: an objective that stands in for evaluation and validation.
        seed: what all that is random in training follows from; None takes one from torch's generator. The weights are made
            before: ``torch.manual_seed`` decides them.
        device: "auto" takes a GPU where there is one.
        strict: raise where a batch's structure or trailing shape differs from the first batch's, and where a list looks like
            one of samples rather than of batches.
        precision: "fp32", "tf32", "bf16", "fp16", "bf16-true", "fp64" or "fp8": see :mod:`axontrain.execution.precision`.
        channels_last: have images, (B, C, H, W) or (B, C, D, H, W), and the parameters of convolutions lie in memory with their
            channels last, shapes as they are: what convolutions compute fastest with, on GPUs above all.
        compile: have torch compile the training step: all of it, forward to update, as one graph where that is possible, else
            parts of it, else nothing, with a warning that says why. The first steps are held against eager ones on a copy,
            which takes the memory of a second model for as long. :meth:`report` says what came of it. Evaluation and
            prediction are not compiled.
        graph: True has steps recorded in CUDA graphs and replayed: their kernels are started together, where Python takes
            longer to start them one by one than they take, and the result is the same, bit for bit. A step is recorded after
            the first few of its shapes, held against two that are not, and done as before where something has changed: a
            shape, an option of the optimizer, an attribute of the objective, a global variable, closure or class attribute
            that its code names. What Python does beside that, as to print or to look at a clock, it does not do in a replay
            (see :mod:`axontrain.execution.assumptions`). A fit without metrics of training and without callbacks
            leaves no predictions in ``state.last``. It takes the memory of the batch, and of what a step computes, once more.
            "auto" times both ways and keeps the one that takes less. :meth:`report` says what came of it.
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
        precision: str = "fp32",
        channels_last: bool = False,
        compile: bool = False,
        graph: bool | str = False,
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
        self.device = device_of(device)
        self.precision = Precision(precision, self.device, channels_last=channels_last)
        self.objective = self.precision.taken(moved(objective, self.device))
        self.evaluate_with = None if evaluate_with is None else self.precision.taken(moved(evaluate_with, self.device))
        self.metrics = {**resolve(objective.metrics), **resolve(metrics)}
        judge = objective if evaluate_with is None else evaluate_with
        eval_metrics = {**resolve(judge.metrics), **resolve(metrics)}
        self.callbacks = callback.checked(callbacks)
        if not isinstance(compile, bool):
            raise ConfigurationError(f"compile={compile!r}: True or False")
        self.strict, self.progress = strict, progress
        if directory is not None and (not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory)):
            raise ConfigurationError(f"directory={directory!r}: a path, as 'runs/first'; None writes nothing")
        self.directory = None if directory is None else Path(directory)
        self.optimizers = named(optimizer)
        bound = {
            name: in_backward.bound(name, self.optimizers[name], parameters, objective)
            for name, parameters in route(objective, self.optimizers).items()
        }
        following = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed, least=-(2**63))
        seed = None if seed is None else following
        self.state = LoopState(objective, bound, following, Meter(self.metrics))
        self.state.history.precision = precision
        for update in bound.values():
            update.clock = self.state
        if self.directory is not None:
            self.state.directory, self.state.history.path = self.directory, self.directory / "history.jsonl"
        self._compilation = Compilation(self.precision) if compile else None
        self.graph, self._graphing = graph, Graphing.of(graph)
        if self._graphing is not None and self._compilation is not None:
            self._graphing.report = self._compilation.report
        of: dict[str, Any] = {"seed": seed, "precision": self.precision, "strict": strict}
        of |= {"compilation": self._compilation, "graphing": self._graphing}
        self._start = Start(self.state, judge, self.metrics, eval_metrics, **of)
        self._start.attach(self.callbacks)
        self._by_hand: Runner | None = None
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
        microbatch: int | str | None = None,
        accumulate: int | None = None,
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
            microbatch: compute so many samples of a batch at once, to save memory: the gradient is that of the batch to
                rounding where the loss is a mean over items (``weight(batch)`` of them), and nothing else knows of it. "auto"
                halves when memory runs out, and tries larger again later.
                ``state.last`` has predictions only if there are metrics of training, for which they are put together.
            accumulate: make one step of so many batches of ``train``, where they come ready-made and small.
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
        run = self._run(train, validation, epochs, steps, time, batch_size, microbatch, accumulate, validate, limit, resume)
        while True:
            try:
                deque(self._algorithm(run), maxlen=0)  # runs the generator to its end
            except GoBack as back:
                run = self._back(back, run)
            except Exception:
                if not run.terminated:
                    raise
                traceback.print_exc()  # the program ends, as it was asked to, whoever would have caught this
                raise SystemExit(TERMINATED) from None
            else:
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
        microbatch: int | str | None = None,
        accumulate: int | None = None,
        validate: str | int | Every = "1 epoch",
        limit: int | None = None,
        resume: bool = False,
        **others: Any,
    ) -> Iterator[Step]:
        """The same as ``fit``, step by step: ``for step in loop.steps(train, epochs=1): ...``.

        It is the same algorithm; leaving the loop early ends the run. Between steps the random generators are the caller's.
        """
        reject(others, Loop.steps)
        run = self._run(train, validation, epochs, steps, time, batch_size, microbatch, accumulate, validate, limit, resume)
        stepping = self._stepping(run)
        # Who has left it early and still holds it at the program's end has left the run too: it is to be saved then.
        weakref.finalize(stepping, _left, weakref.ref(stepping))
        return stepping

    def _algorithm(self, run: Run) -> Iterator[Step]:
        """Train: the one algorithm that ``fit`` and ``steps`` run."""
        state, train_step, record = run.state, run.train_step, run.record
        before_batch, after_batch = run.hooks.before_batch, run.hooks.after_batch
        with session(run):
            due.settle(run)
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
                        if due.look_up(run):
                            break
                if run.epoch_is_over():
                    due.end_epoch(run)
            due.end_fit(run)
        run.exit_if_terminated()

    def evaluate(self, data: Any, *, batch_size: int = DEFAULT_BATCH_SIZE, **others: Any) -> dict[str, Any]:
        """Evaluate: ``{"loss": ..., "accuracy": ...}``, means by items over the whole of ``data``.

        Modules are in eval mode for as long as it takes, there are no gradients, and what is random follows from the seed.
        """
        reject(others, Loop.evaluate)
        stream = self._start.stream(data, "data", batch_size)
        check_batch_size(batch_size, stream)
        with contextlib.closing(stream):
            return passes.evaluate(self._start.judge, stream, Meter(self._start.eval_metrics), self.state, self.precision)

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
        batches = self._start.stream(data, "data", batch_size)
        check_batch_size(batch_size, batches)
        predictions = passes.predicting(self.objective, batches, self.state, self.precision)
        if stream:
            return (prediction for prediction, _ in predictions)
        cpu = torch.device("cpu")
        return joined([(to_device(prediction, cpu), size) for prediction, size in predictions])

    def train_on_batch(self, batch: Any) -> Step:
        """Train on one batch: forward, backward, update, counters and readings, for a loop of your own.

        Callbacks belong to ``fit`` and are not called. ``loop.state.read()`` reads the means so far. Modules train as they
        would in ``fit``, and draw from the run's own random stream.

        Raises:
            ConfigurationError: for a schedule of progress, since a single batch has no end to progress to.
        """
        check_ready(self.state)
        state = self.state
        if any(update.sees_progress for update in state.optimizers.values()):
            raise ConfigurationError(
                "train_on_batch knows no end, so a schedule of progress has nothing to go by: use loop.steps(train, ...), or "
                "a torch scheduler factory, which counts steps"
            )
        if self._by_hand is None:
            self._by_hand = self._start.runner(None)
            self._next_reading = perf_counter() + READ_EVERY_SECONDS
            clear_gradients(self.objective)
        state.hide_averages()  # where a fit has left them in the module
        batch = to_device(batch, self.device)
        batch = self.precision.batch(batch) if self.precision.converts else batch
        noting = noted("in train_on_batch", batch, self.objective)
        with modes.training(self.objective), stream_of(state), self.precision.settings(), noting:
            try:
                step = self._by_hand(batch)
            except BaseException:
                clear_gradients(self.objective)  # or they would be a part of the next update
                state.end_vetoes()
                raise
        state.step += 1
        state.samples += size_of(batch)
        state.last = step
        state.meter.record(step, task_of(batch))
        if perf_counter() >= self._next_reading:  # of what was skipped: nobody else may ask for a long time
            through = state.read_later(means=False)
            self._next_reading = perf_counter() + (READ_EVERY_SECONDS if through else LOOK_AGAIN_SECONDS)
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

        From a hook, save in ``after_batch`` or ``after_epoch`` of the last callback: going on from there, those that come after
        it have had their turn. Other hooks are called again, in the place that they were saved in.

        Returns:
            The directory; or a snapshot that ``restore`` takes.

        Raises:
            ConfigurationError: in ``after_backward``, where a step is half done and nothing could go on from it.
            CheckpointError: if something in the state cannot be saved, the path is of something else, or the disk refuses;
                what was there is as it was.
        """
        if self.state.half_done and self.state.status == "running":
            raise ConfigurationError(
                "save() in after_backward: the step is half done, and going on from here would do its first half twice; "
                "save in after_batch"
            )
        if path is None:
            return self.state.state_dict()
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigurationError(f"save({path!r}): the path of a directory; without one it is kept in memory")
        try:
            return checkpoint.write(path, self.state.live(), runs.told_of(self.state))
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written: {error.strerror or error}. What was there is as it was"
            ) from error

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
        tree = source if isinstance(source, Mapping) else runs.read(Path(source))
        with naming("the snapshot" if tree is source else source):
            schema.check(tree)
        if only == "objective":
            self.state.load_weights(tree)
            return
        self._start.restore(self.callbacks, tree, source)
        for name, update in self.state.optimizers.items():
            saved = tree["optimizers"][name].get("average")
            if saved is not None and not update.takes(saved):
                warn(
                    f"the saved run evaluated an average of its weights ({saved['kind']}), and the optimizer {name!r} has "
                    f"average={update.spec.average!r}: what is here now are the raw weights, which training goes on with. For "
                    f"the average, give the Optimizer the same average=, or restore(..., only='objective')"
                )

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which goes on from here by itself: what computes its steps, it makes anew."""
        return {**vars(self), "_by_hand": None}

    @property
    def compiles(self) -> bool:
        """Whether steps are to be compiled."""
        return self._compilation is not None

    def report(self) -> StepReport:
        """How steps are computed: in eager, as one compiled graph, or in compiled parts, and why; what was compiled, and when.

        With ``graph=`` also how many were replayed from CUDA graphs, and why not.

        >>> import axontrain as ax
        >>> loop = Loop(ax.Supervised(torch.nn.Linear(1, 1), "mse"), ax.Optimizer("sgd", lr=0.1), progress=False)
        >>> print(loop.report())
        steps are computed in eager (compile=False)
        """
        made = self._compilation or self._graphing
        return StepReport("eager", "compile=False") if made is None else made.report

    def check(self, train: Any, validation: Any = None, *, batch_size: int = DEFAULT_BATCH_SIZE) -> Report:
        """Look for what commonly goes wrong, on a copy of everything: nothing is changed, the random generators neither.

        What the objective's code changes elsewhere, as in global variables, is put back and told; files are not, nor what
        iterators and queues gave.

        See :func:`axontrain.preflight.preflight` for what is looked at.
        """
        streams = {"train": self._start.stream(train, "train", batch_size, shuffle=True)}
        if validation is not None:
            streams["validation"] = self._start.stream(validation, "validation", batch_size)
        check_batch_size(batch_size, *streams.values())
        return preflight(
            self.objective,
            self.evaluate_with,
            self.optimizers,
            self.metrics,
            self._start.eval_metrics,
            streams,
            self.state.seed,
            self.precision,
        )

    def __repr__(self) -> str:
        return f"Loop({type(self.objective).__name__}, {self.optimizers or None}, {self.state!r})"

    def _run(self, *fit: Any) -> Run:
        self._by_hand = None  # a fit gives back what it has recorded
        run = self._start.run(self.callbacks, self.progress, *fit)
        run.again = lambda: self._run(*fit[:-1], True)
        return run

    def _back(self, back: GoBack, run: Run) -> Run:
        """A hook has asked to go on from a checkpoint."""
        self.restore(back.path)
        back.then()
        runs.abandon(back.path, self.state.live())
        assert run.again is not None  # _run has given it
        again = run.again()
        again.interrupt, again.terminated = run.interrupt, run.terminated  # if a signal came meanwhile
        return again

    def _stepping(self, run: Run) -> Iterator[Step]:
        # The generators are the run's while it computes, and the caller's while the caller does.
        state, algorithm = run.state, self._algorithm(run)
        if run.graphing is not None:
            run.graphing.predictions = True  # the caller may look at them
        caller, left = randomness.snapshot(), True
        try:
            while left:
                try:
                    for step in algorithm:
                        state.rng, state.drawing = randomness.snapshot(), False
                        state.owed = DUE  # who leaves now, or saves, has not had what is due after this step
                        randomness.restore(caller)
                        try:
                            yield step
                            state.owed = []
                        finally:
                            caller = randomness.snapshot()
                            randomness.restore(state.rng)
                            state.drawing = True
                    left = False
                except GoBack as back:
                    run = self._back(back, run)
                    algorithm = self._algorithm(run)
        except SystemExit:
            left = False
            raise
        finally:
            algorithm.close()  # type: ignore[attr-defined]  # it is a generator
            randomness.restore(caller)
            if left and run.terminated:  # nobody would hear of an error in a generator that is left
                signal.raise_signal(signal.SIGTERM)


def _left(stepping: weakref.ref[Any]) -> None:
    """At the program's end: end a loop over steps that somebody holds."""
    if (iterator := stepping()) is not None:
        iterator.close()
