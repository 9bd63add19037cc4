"""Start: how a fit begins: what it was given is checked, what there is to resume is found, and the Run is put together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.nn.parameter import is_lazy

from axontrain import callback
from axontrain.callback import Callback, FunctionCallback, Hooks, Reader, Saver
from axontrain.callbacks.checkpoint import Checkpoint
from axontrain.callbacks.progress import ProgressBar
from axontrain.checkpoint import runs, schema
from axontrain.checkpoint.lock import DirectoryLock
from axontrain.clock import Every, Plan
from axontrain.data.loader import Loader
from axontrain.data.protocol import is_array
from axontrain.data.stream import DEFAULT_BATCH_SIZE, Stream
from axontrain.errors import CheckpointError, ConfigurationError, OptimizerError, kind_of, warn
from axontrain.execution import modes
from axontrain.execution.compilation import Compilation
from axontrain.execution.graphing import Graphing
from axontrain.execution.microbatches import AutoCut, Cut, cut_of, look_at
from axontrain.execution.precision import Precision
from axontrain.execution.run import DUE, Run
from axontrain.execution.runners import runner
from axontrain.execution.setup import compare, describe, same_batches, tell
from axontrain.execution.steps import Runner
from axontrain.metrics.meter import Meter
from axontrain.objective import Objective
from axontrain.optimizer import check_covered
from axontrain.state import LoopState, Stop, StopEpoch

MEMORY = "memory"


class Start:
    """The beginnings of one Loop's fits, and where the last of them ended.

    Args:
        state: the Loop's.
        judge: the objective that evaluates.
        metrics, eval_metrics: of training and of evaluation, resolved.
        seed: what the Loop was given; None if nothing.
        precision: in which it computes, and on which device.
        strict: see :class:`axontrain.Loop`.
        compilation: what is compiled of its steps; None leaves them in eager.
        graphing: what is replayed of them; None does them kernel by kernel.
    """

    def __init__(
        self,
        state: LoopState,
        judge: Objective,
        metrics: Mapping[str, Any],
        eval_metrics: Mapping[str, Any],
        *,
        seed: int | None,
        precision: Precision,
        strict: bool,
        compilation: Compilation | None = None,
        graphing: Graphing | None = None,
    ) -> None:
        self.compilation, self.graphing = compilation, graphing
        if compilation is not None:
            state.attach("compile", compilation)
        self.state, self.judge = state, judge
        self.metrics, self.eval_metrics = metrics, eval_metrics
        self.seed, self.precision, self.strict = seed, precision, strict
        self.scaler = precision.scaler(state.objective)
        if self.scaler is not None:
            state.attach("scaler", self.scaler)
            for name, update in state.optimizers.items():
                if update.spec.in_backward:
                    raise ConfigurationError(
                        f"the optimizer {name!r} has in_backward=True, and precision='fp16' scales the loss, to scale the "
                        f"gradients back when all of them are there: take precision='bf16'"
                    )
                update.scaled = True
        self._restored = False  # whether the state was replaced since the last fit
        self._at_home = False  # whether what lies in the directory is of this run
        self._last_stream: Stream | None = None

    def stream(self, data: Any, name: str, batch_size: int, **options: Any) -> Stream:
        """Batches of a user's data, on the device."""
        convert = self.precision.batch if self.precision.converts else None
        device = self.precision.device
        return Stream(data, name, batch_size=batch_size, strict=self.strict, device=device, convert=convert, **options)

    def runner(self, after_backward: Callable[[LoopState], None] | None, cut: Cut | None = None) -> Runner:
        """What trains on a batch."""
        return runner(
            self.state,
            after_backward,
            cut,
            precision=self.precision,
            scaler=self.scaler,
            keeps_predictions=bool(self.metrics),
            compilation=self.compilation,
            graphing=self.graphing,
        )

    def run(
        self,
        callbacks: Sequence[Callback],
        progress: bool,
        train: Any,
        validation: Any,
        epochs: int | None,
        steps: int | None,
        time: str | float | None,
        batch_size: int,
        microbatch: int | str | None,
        accumulate: int | None,
        validate: str | int | Every,
        limit: int | None,
        resume: bool,
    ) -> Run:
        """Check and put together all that a fit needs; what is wrong is found before anything is changed."""
        check_ready(self.state)
        if validate is None:
            raise ConfigurationError("validate=None: to validate never, leave the validation data out")
        if not isinstance(resume, bool):
            raise ConfigurationError(f"resume={resume!r}: True or False; to go on from one checkpoint, loop.restore(path)")
        if isinstance(validate, Loader) or (hasattr(validate, "__getitem__") and not isinstance(validate, str)):
            raise ConfigurationError(
                f"validate={kind_of(validate)}: it says when to validate, as '1 epoch'; the data are fit(train, validation)"
            )
        if is_array(train) and is_array(validation) and len(train) == len(validation) and _unlike(train, validation):
            raise ConfigurationError(
                f"fit({kind_of(train)}, {kind_of(validation)}): the second is data to validate on, of the same kind as the "
                f"first; inputs and targets together are ax.ArrayDataset(inputs, targets)"
            )
        every, plan = Every.parse(validate, "validate"), Plan.parse(epochs, steps, time)
        if plan.trains_nothing:
            warn("this fit trains nothing: a limit is 0")
        cut = cut_of(microbatch, accumulate)
        stream = self.stream(train, "train", batch_size, shuffle=True, limit=limit, accumulate=accumulate)
        validating = None if validation is None else self.stream(validation, "validation", batch_size, limit=limit)
        streams = [one for one in (stream, validating) if one is not None]
        check_batch_size(batch_size, *streams)
        for one in streams:
            if one.length == 0:
                raise one.empty()
        savers = [one for one in callbacks if isinstance(one, Saver)]
        if len(savers) > 1:
            raise ConfigurationError(
                f"callbacks has {' and '.join(map(repr, savers))}, and each would prune what the other keeps: one does all, "
                f"ax.Checkpoint(every=..., keep_last=..., best=..., permanent=...)"
            )
        if stream.source is not None and stream.source.once and any(getattr(one, "rollback", None) for one in callbacks):
            raise ConfigurationError(
                "SpikeGuard(rollback=...) reads batches again, and train is an iterator, which is read once: give a function "
                "that returns one, or a Dataset"
            )
        if modes.asleep(self.state.objective):
            warn(f"{modes.ASLEEP}, unless that is meant")
        if cut is not None:
            look_at(self.state.objective)
        with contextlib.ExitStack() as held:
            if self.state.directory is not None:
                held.enter_context(DirectoryLock(self.state.directory))
            run = self._begun(callbacks, progress, plan, every, stream, validating, cut, resume)
            run.lock = held.pop_all()  # the session gives it up
        return run

    def restore(self, callbacks: Sequence[Callback], tree: Mapping[str, Any], source: Any) -> None:
        """Fill the state from a saved one, which was checked (see :func:`naming`)."""
        self.attach(callbacks)
        try:
            self.state.load_state_dict(tree)
        except CheckpointError as error:
            if isinstance(source, Mapping):
                raise
            raise CheckpointError(
                f"{source}: {error}. To begin anew, choose another directory=; for its weights alone, "
                f"loop.restore({str(source)!r}, only='objective') or ax.load_weights"
            ) from error
        self._restored = True
        self.state.newest = self._newest()  # who goes back knows what there is
        if self.state.directory is not None and not isinstance(source, Mapping):
            self._at_home |= Path(source).resolve().is_relative_to(self.state.directory.resolve())

    def _begun(
        self,
        callbacks: Sequence[Callback],
        progress: bool,
        plan: Plan,
        every: Every,
        stream: Stream,
        validating: Stream | None,
        cut: Cut | None,
        resume: bool,
    ) -> Run:
        state = self.state
        setup = describe(state, stream, validating, every, self.metrics, callbacks, self.precision.device, self.precision.name)
        setup["compile"], setup["channels_last"] = self.compilation is not None, self.precision.channels_last
        setup["microbatch"] = "auto" if isinstance(cut, AutoCut) else None if cut is None else cut.size
        if state.directory is not None:
            runs.sweep(state.directory)
        found = self._found() if resume else ""
        if state.directory is not None and (not resume or found == MEMORY):
            self._check_directory(state.directory)
        resumed = self._goes_back(found, setup, plan, callbacks)
        self._at_home = True
        same = stream.goes_on_from(self._last_stream) if self._last_stream else same_batches(state.setup, setup)
        if self._restored:  # what this Loop has read last says nothing of the batches of that state
            same, self._restored = same and same_batches(state.setup, setup), False
        if resumed and not same and self._last_stream is not None:  # the same data, as far as can be seen, in another object
            stream.load_state_dict(self._last_stream.state_dict())
            same = True
        ended = state.batch_index >= (stream.length or math.inf)
        if resumed and same and ended and state.in_epoch and not state.owed:
            state.owed = DUE  # left or saved between an epoch's last step and its end
        if not same or (ended and state.owed != DUE):
            state.batch_index, state.in_epoch = 0, False  # other batches than those that it had begun with: it begins anew
        pending = self._pending(found, callbacks) if resumed else None
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
        if not resumed and validating is None:  # those of an earlier fit would be taken for this one's
            for name in [name for name in state.values if name.startswith("val/")]:
                del state.values[name]
        as_long = same and (self._last_stream is None or self._last_stream.limit == stream.limit)
        if stream.length is not None or not as_long:  # what has no length keeps the one that its last pass had
            state.epoch_length = stream.length
        state.plan, state.validates, state.meter.tasks = plan, validating is not None, stream.tasks
        state.setup, state.resumed = setup, resumed
        self._last_stream = stream
        state.attach("data", stream, replace=True)
        if isinstance(cut, AutoCut):
            before = state.attached.get("microbatch")
            if resumed and isinstance(before, AutoCut):
                cut.load_state_dict(before.state_dict())
            state.attach("microbatch", cut, replace=True)
        else:
            state.attached.pop("microbatch", None)
        self.attach(callbacks)
        state.history.rewrite()
        cadence = state.cadence("validate", every)
        cadence.start(state, resumed=resumed)
        taking_part = [*callback.in_order(callbacks), *([ProgressBar()] if progress else [])]
        savers = tuple(one for one in taking_part if isinstance(one, Saver))
        if state.directory is not None and not savers:
            savers = (Checkpoint(),)
            taking_part.extend(savers)
        hooks = Hooks(taking_part, state, resumed=resumed)
        train_step, meter = self.runner(hooks.after_backward, cut), Meter(self.eval_metrics)
        if self.graphing is not None:  # who trains without anybody to look on, and nothing to measure, needs none
            self.graphing.predictions = bool(self.metrics or callbacks)
        of = (stream, validating, self.judge, self.precision, meter, cadence, hooks, train_step, state.step)
        readers = tuple(one for one in taking_part if isinstance(one, Reader))
        run = Run(state, plan, *of, savers=savers, readers=readers, graphing=self.graphing)
        run.pending, state.halt = pending, None
        return run

    def _found(self) -> str | tuple[Path, Any]:
        """What there is to resume: the run in memory, or the newest checkpoint and its tree; "" if there is nothing."""
        state = self.state
        in_memory = state.step > 0 or state.old_plan is not None
        if state.directory is not None and (state.half_done or not in_memory):
            newest = runs.newest(state.directory)
            if newest is not None:
                return newest
        return MEMORY if in_memory else ""

    def _goes_back(
        self, found: str | tuple[Path, Any], setup: Mapping[str, Any], plan: Plan, callbacks: Sequence[Callback]
    ) -> bool:
        """Whether this fit goes on inside an earlier plan; a checkpoint that was found is restored.

        What has changed since is told in one warning, or is an error where it would make another run of it.
        """
        limits = plan.limits
        if isinstance(found, str):
            if not found:
                return False
            tell(found, compare(self.state.outline(), setup, None, limits, self.state))
            if self.state.half_done:
                warn("the last fit failed within a step, of which a part may be done, and there is no checkpoint to go back to")
            return True
        path, tree = found
        with naming(path):
            schema.check(tree)
            changes = compare(tree, setup, self.seed, limits, self.state)
        self.restore(callbacks, tree, path)
        tell(path, changes)
        old = self.state.old_plan
        if old is not None and old.start_step and old.limits != limits:
            warn(
                f"the fit that is gone on with began at step {old.start_step} with {_told(old)}, and this one says "
                f"{_told(plan)}: it ends after so much from there. Where a script fits twice, give each fit a Loop and a "
                f"directory of its own"
            )
        return True

    def _pending(self, found: str | tuple[Path, Any], callbacks: Sequence[Callback]) -> Stop | StopEpoch | None:
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
        stopper = callback.keys(callbacks).get(halt["callback"])
        if found == MEMORY or stopper is None or stopper.restates or isinstance(stopper, FunctionCallback):
            return None
        return Stop(halt["reason"]) if stopper.given == halt["given"] else None

    def _newest(self) -> int:
        there = [] if self.state.directory is None else runs.entries(self.state.directory)
        return max((entry.number for entry in there), default=0)

    def _check_directory(self, directory: Path) -> None:
        history = directory / "history.jsonl"
        if self._at_home and self._newest() > self.state.newest:
            raise ConfigurationError(
                f"directory={str(directory)!r}: another Loop has gone on with this run since, and this one would write over "
                f"what it saved. To go on from there, loop.restore({str(directory)!r}) and fit(..., resume=True); else choose "
                f"another directory"
            )
        if not self._at_home and ((history.is_file() and history.stat().st_size) or runs.entries(directory)):
            raise ConfigurationError(
                f"directory={str(directory)!r} holds another run already: choose another, or go on with that run by "
                f"fit(..., resume=True)"
            )

    def attach(self, callbacks: Sequence[Callback]) -> None:
        """Let the callbacks that have a state take part in saving and restoring."""
        for key, one in callback.stateful(callbacks).items():
            self.state.attach(f"callback/{key}", one, replace=True)


def _unlike(train: Any, validation: Any) -> bool:
    """Whether arrays have other rows: those of data to validate on are as those of training."""
    return tuple(train.shape[1:]) != tuple(validation.shape[1:]) or str(train.dtype) != str(validation.dtype)


def _told(plan: Plan) -> str:
    return ", ".join(f"{name}={value}" for name, value in plan.limits.items() if value is not None)


def check_ready(state: LoopState) -> None:
    """Raise unless a step can be trained.

    Raises:
        ConfigurationError: if the Loop is running.
        OptimizerError: if there is no optimizer, or a trainable parameter that none covers.
    """
    if state.status == "running":
        raise ConfigurationError(
            "this Loop is running already, or was copied while it was: a hook of it cannot train with it too; use another, "
            "which other.restore(loop.save()) puts where this one stands"
        )
    if not state.optimizers:
        raise OptimizerError("this Loop has no optimizer, so it can evaluate and predict only: ax.Loop(objective, optimizer)")
    if not any(True for _ in state.objective.parameters()):
        raise OptimizerError(
            f"{type(state.objective).__name__} has no parameter, so there is nothing to train: layers are attributes of it, or "
            f"in an nn.ModuleList or nn.Sequential; those in a plain list are not found"
        )
    check_covered(state.objective, {name: update.parameters for name, update in state.optimizers.items()})
    averaged = any(update.average is not None for update in state.optimizers.values())
    lazy = [name for name, p in state.objective.named_parameters() if is_lazy(p)]
    if lazy and (averaged or state.directory is not None):
        raise ConfigurationError(
            f"{', '.join(lazy[:4])} get their shapes from the first batch, and until then can be neither saved nor averaged: "
            f"call the objective's predict(inputs) once before the Loop is made"
        )


def check_batch_size(batch_size: int, *streams: Stream) -> None:
    """Raise if a batch size was given that has no effect.

    Raises:
        ConfigurationError: if so.
    """
    if batch_size != DEFAULT_BATCH_SIZE and all(stream.brings_batches for stream in streams):
        raise ConfigurationError(
            f"batch_size={batch_size} has no effect on {' and '.join(s.name for s in streams)}, which bring their own "
            f"batches: leave it out, or pass a Dataset"
        )


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """Let an error of the block say which saved state it is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
