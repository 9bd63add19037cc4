"""Preflight: what commonly goes wrong, looked for on copies before hours are spent."""

from __future__ import annotations

import contextlib
import copy
import html
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from axontrain import randomness
from axontrain.checkpoint.encode import decode, encode
from axontrain.data.stream import Stream
from axontrain.errors import NonFiniteWarning, OptimizerError, kind_of
from axontrain.execution import copying, modes
from axontrain.execution.beginning import Around
from axontrain.execution.microbatches import Cut
from axontrain.execution.precision import Precision
from axontrain.execution.run import clear_gradients
from axontrain.execution.runners import runner
from axontrain.execution.steps import Runner, check, check_eval
from axontrain.metrics.meter import Meter
from axontrain.objective import Objective, Step, batch_size
from axontrain.optimizer import Optimizer, check_covered, route
from axontrain.state import LoopState
from axontrain.update import Update

FALL_STEPS = 50
MOST_CHANGES = 3  # that are told


@dataclass(slots=True, repr=False)
class Report:
    """What a check found: ``ok`` if there is no problem; ``notes`` are what it saw, and what it could not look at."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return f"<Report {self}>"

    def __str__(self) -> str:
        head = "check: ok" if self.ok else f"check: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        return "\n".join([head, *(f"  ✗ {p}" for p in self.problems), *(f"  · {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def preflight(
    objective: Objective,
    evaluate_with: Objective | None,
    optimizers: Mapping[str, Optimizer],
    metrics: Mapping[str, Any],
    eval_metrics: Mapping[str, Any],
    streams: Mapping[str, Stream],
    seed: int,
    precision: Precision,
) -> Report:
    """Check an objective, its optimizers and its data on copies.

    Looked at are: shapes and dtypes through ``predict`` and ``loss``; parameters that get no gradient; parameters that no
    optimizer covers; whether the loss falls on one batch in 50 steps; and whether what was trained survives being saved
    and restored. The caller's objects and random generators stay bit for bit as they were, and what their code keeps
    elsewhere, as in global variables.
    """
    report, around = Report(), list[Around]()
    with contextlib.ExitStack() as every:
        every.enter_context(randomness.kept())
        every.enter_context(_own_generators_kept(streams))
        around += [every.enter_context(copying.untouched(one)) for one in (objective, evaluate_with) if one is not None]
        every.enter_context(precision.settings())
        batches = {name: _first_batch(stream, seed, report) for name, stream in streams.items()}
        batch = batches["train"]
        if batch is not None:
            try:
                trained = _copied(objective)
                report.notes += copying.shared(around[0], trained)
            except Exception as error:
                report.problems.append(f"the objective cannot be copied, so nothing more was looked at: {error}")
                return report
            several = inspect.isgeneratorfunction(objective.train_step)
            _one_sample_left(trained, streams["train"], report)
            works = _one_step(_copied(objective), batch, metrics, seed, precision, several, report)
            if works and _covered(objective, optimizers, report):
                if _falls(trained, optimizers, batch, seed, precision, several, report):
                    _survives(objective, trained, optimizers, batch, seed, precision, report)
        if batches.get("validation") is not None:
            _one_evaluation(objective, evaluate_with, batches["validation"], eval_metrics, seed, precision, report)
        if changes := list(dict.fromkeys(chain.from_iterable(one.changes() for one in around))):
            report.notes.append(
                f"code of the objective changes what is not in it, and in no checkpoint: {'; '.join(changes[:MOST_CHANGES])}. "
                f"Where results go by that, keep it in the objective, as a buffer or by get_extra_state"
            )
    report.notes += [one.left for one in around if one.left]
    return report


def _first_batch(stream: Stream, seed: int, report: Report) -> Any:
    if stream.source is not None and stream.source.once:
        report.notes.append(f"{stream.name} is an iterator, whose first batch can be read once only: it was not looked at")
        return None
    try:
        for batch in stream.batches(seed, 0):
            return batch
        raise stream.empty()
    except Exception as error:
        report.problems.append(f"{stream.name} gives no batch: {_told(error)}")
    return None


def _one_step(
    objective: Objective,
    batch: Any,
    metrics: Mapping[str, Any],
    seed: int,
    precision: Precision,
    several: bool,
    report: Report,
) -> bool:
    report.notes.append(f"batch: {kind_of(batch)}")
    if several:
        report.notes.append("train_step is a generator: its losses are looked at in training only")
        return True
    if modes.asleep(objective):
        report.problems.append(modes.ASLEEP)
    try:
        with (
            modes.training(objective),
            randomness.seeded(seed),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            if overridden(objective, "predict"):
                inputs = objective.split(_fresh(batch))[0]
                told = kind_of(inputs)
                report.notes.append(f"predict({told}) -> {kind_of(precision.within(objective.predict)(inputs))}")
            step: Any = precision.within(objective.train_step)(_fresh(batch))
            check(step, objective)
            step.loss.backward()
    except Exception as error:
        report.problems.append(f"the first step fails: {_told(error)} {_dtypes(objective, batch)}".rstrip())
        return False
    for text in dict.fromkeys(str(one.message).strip().splitlines()[0] for one in warned):
        report.problems.append(f"the first step is warned of: {text}")
    report.notes.append(f"loss: {float(step.loss.detach()):.6g}, {kind_of(step.loss)}, the mean over {_weight(step)} items")
    without = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        report.problems.append(
            f"no gradient reaches {', '.join(without)}: the loss does not depend on them; use them, or freeze them by "
            f"requires_grad_(False)"
        )
    _measured(step, metrics, report)
    _divided(objective, batch, seed, precision, report)
    return True


def _divided(objective: Objective, batch: Any, seed: int, precision: Precision, report: Report) -> None:
    """Whether the loss of a batch is the mean over its parts, which is what microbatches go by."""
    count = batch_size(batch)
    train_step = precision.within(objective.train_step)

    def loss(part: Any, seed: int) -> tuple[float, float]:
        with randomness.seeded(seed):
            step = train_step(_fresh(part))
        return float(step.loss.detach()), float(step.weight)

    try:
        with modes.evaluation(objective):
            whole, again = loss(batch, seed), loss(batch, seed + 1)
            parts = [loss(part, seed) for part in Cut(-(-count // 2))(batch)]
    except Exception:  # batches that cannot be cut, and steps that go with training alone
        return
    of_parts, near = sum(value * weight for value, weight in parts) / (sum(weight for _, weight in parts) or 1), abs(whole[0])
    rounding = 1e-3 if precision.name in ("fp32", "fp64") else 2e-2
    if whole == again and abs(whole[0] - of_parts) > rounding * max(near, 1e-6):
        report.notes.append(
            f"the loss of the batch, {whole[0]:.6g}, is not the mean of that of its halves, {of_parts:.6g}: with microbatch= "
            f"it would train otherwise. It goes with a mean over items, so many as weight(batch) says"
        )


def _one_sample_left(objective: nn.Module, stream: Stream, report: Report) -> None:
    loader = stream.loader
    if loader is None or loader.iterable or loader.drop_last or loader.batch_size in (None, 1):
        return
    if len(loader.dataset) % loader.batch_size != 1:
        return
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in objective.modules()):
        report.problems.append(
            f"{len(loader.dataset)} samples in batches of {loader.batch_size} leave a last batch of one, which BatchNorm "
            f"may refuse: ax.Loader(..., drop_last=True)"
        )


def _one_evaluation(
    objective: Objective,
    evaluate_with: Objective | None,
    batch: Any,
    metrics: Mapping[str, Any],
    seed: int,
    precision: Precision,
    report: Report,
) -> None:
    judge = copying.copied(objective if evaluate_with is None else evaluate_with)
    try:
        step = _evaluated(judge, batch, seed, precision)
    except Exception as error:
        report.problems.append(f"the first step of validation fails: {_told(error)} {_dtypes(judge, batch)}".rstrip())
    else:
        report.notes.append(f"validation loss: {float(step.loss):.6g}")
        _measured(step, metrics, report)


def _measured(step: Step, metrics: Mapping[str, Any], report: Report) -> None:
    meter = Meter(metrics)
    try:
        step.loss = step.loss.detach()
        meter.record(step)
        meter.read()
    except Exception as error:
        report.problems.append(f"the metrics fail: {_told(error)}")


def _covered(objective: Objective, optimizers: Mapping[str, Optimizer], report: Report) -> bool:
    try:
        if not optimizers:
            raise OptimizerError("there is no optimizer: ax.Loop(objective, optimizer)")
        check_covered(objective, route(objective, optimizers))
    except Exception as error:
        report.problems.append(_told(error))
        return False
    return True


def _falls(
    objective: Objective,
    optimizers: Mapping[str, Optimizer],
    batch: Any,
    seed: int,
    precision: Precision,
    several: bool,
    report: Report,
) -> bool:
    """Train on one batch: nothing is easier to learn by heart."""
    losses: list[Tensor] = []
    try:
        state, train_step = _trainer(objective, optimizers, seed, precision)
        with modes.training(objective), warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)
            for _ in range(FALL_STEPS):
                with randomness.seeded(seed):  # the same noise each time: what is left is what was learnt
                    losses.append(train_step(_fresh(batch)).loss)
    except Exception as error:
        report.problems.append(f"training on one batch fails at step {len(losses) + 1}: {_told(error)}")
        return False
    values = torch.stack([loss.reshape(()) for loss in losses]).tolist()
    told = f"on one batch, in {FALL_STEPS} steps: from {values[0]:.6g} to {values[-1]:.6g}"
    idle = [name for name, update in state.optimizers.items() if not update.steps]
    if idle:
        report.problems.append(f"train_step never yields a loss for the optimizer {', '.join(map(repr, idle))}")
    if several:
        report.notes.append(f"the losses' sum went {told}; losses that work against each other need not fall")
    elif not all(value == value and abs(value) != float("inf") for value in values):
        report.problems.append(f"the loss is not finite {told}: lower lr, or look at the data")
    elif not min(values[1:]) < values[0]:
        report.problems.append(
            f"the loss does not fall {told}: look at lr (too high or zero), at targets that fit the inputs, and at the path of "
            f"the gradient"
        )
    elif not sum(values[-5:]) / 5 < values[0]:
        report.problems.append(f"the loss does not stay down {told}: lower lr")
    else:
        report.notes.append(f"the loss falls {told}")
    return True


def _survives(
    objective: Objective,
    trained: Objective,
    optimizers: Mapping[str, Optimizer],
    batch: Any,
    seed: int,
    precision: Precision,
    report: Report,
) -> None:
    """Save what was trained, fill a fresh copy from it, and compare what both do next."""
    try:
        state, step_on = _trainer(trained, optimizers, seed, precision)
        with modes.training(trained), randomness.seeded(seed):
            step_on(_fresh(batch))  # so that the optimizers have a state
        text, tensors = encode(state.state_dict())
        fresh = _copied(objective)
        other, step_other = _trainer(fresh, optimizers, seed, precision)
        other.load_state_dict(decode(text, tensors))
        other.hide_averages()
        hidden = _hidden(trained, fresh)
        results = []
        for one, train_step in ((trained, step_on), (fresh, step_other)):
            with modes.training(one), randomness.seeded(seed):
                loss = train_step(_fresh(batch)).loss
            results.append([loss.detach(), *(p.detach() for p in one.parameters())])
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))
    except Exception as error:
        report.problems.append(f"the state cannot be saved and restored: {_told(error)}")
        return
    if hidden:
        report.problems.append(
            f"state is lost when saved and restored: {', '.join(hidden)} changed in training, and "
            f"{type(objective).__name__}.state_dict() does not have it: register it as a buffer, or override "
            f"get_extra_state and set_extra_state"
        )
    elif not same:
        report.problems.append(
            f"state is lost when saved and restored: a restored {type(objective).__name__} trains on differently; something "
            f"that it changes is not in its state_dict()"
        )
    else:
        report.notes.append("what was trained goes on the same after being saved and restored")


def _trainer(
    objective: Objective, optimizers: Mapping[str, Optimizer], seed: int, precision: Precision
) -> tuple[LoopState, Runner]:
    plain = {name: copy.copy(optimizer) for name, optimizer in optimizers.items()}
    for optimizer in plain.values():
        optimizer.schedule = None  # a warm-up from zero would say that nothing is learnt
        optimizer.patience = 10**9
    bound = {name: Update(name, plain[name], of_name, objective) for name, of_name in route(objective, plain).items()}
    state, scaler = LoopState(objective, bound, seed, Meter()), precision.scaler(objective)
    if scaler is not None:  # which is saved with a run
        state.attach("scaler", scaler)
        for update in bound.values():
            update.scaled = True
    return state, runner(state, None, precision=precision, scaler=scaler)


@contextlib.contextmanager
def _own_generators_kept(streams: Mapping[str, Stream]) -> Iterator[None]:
    # A torch DataLoader may draw its order from a generator of its own.
    owners = [part for s in streams.values() for part in (s.data, getattr(s.data, "sampler", None))]
    generators = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def overridden(objective: Objective, method: str) -> bool:
    """Whether an objective has a method of its own."""
    return getattr(type(objective), method) is not getattr(Objective, method)


def _fresh(batch: Any) -> Any:
    # What an objective does to a batch in place is not to reach the user's, nor the next step here.
    return copy.deepcopy(batch)


def _copied(objective: Objective) -> Objective:
    copied = copying.copied(objective)
    clear_gradients(copied)
    return copied


def _evaluated(objective: Objective, batch: Any, seed: int, precision: Precision) -> Step:
    with modes.evaluation(objective), randomness.seeded(seed), torch.no_grad():
        step: Step = precision.within(objective.eval_step)(_fresh(batch))
        check_eval(step, objective)
    return step


def _hidden(trained: nn.Module, restored: nn.Module) -> list[str]:
    """Tensors and numbers of a module that training changed and restoring did not bring back."""
    lost = []
    of_restored = dict(restored.named_modules())
    for name, module in trained.named_modules():
        other = of_restored.get(name)
        if other is None:
            continue
        prefix = f"{name}." if name else ""
        values = {**module._buffers, **{k: v for k, v in vars(module).items() if not k.startswith("_")}}
        for key, value in values.items():
            back = other._buffers.get(key, vars(other).get(key))
            if isinstance(value, Tensor) and isinstance(back, Tensor):
                changed = value.shape != back.shape or not torch.equal(value, back)
            else:
                changed = isinstance(value, (int, float)) and value != back and value == value
            if changed and key != "training":
                lost.append(prefix + key)
    return lost


def _weight(step: Step) -> float:
    return float(step.weight) if isinstance(step.weight, Tensor) else step.weight


def _dtypes(objective: Objective, batch: Any) -> str:
    parameters = sorted({str(p.dtype).removeprefix("torch.") for p in objective.parameters()})
    return f"(the batch is {kind_of(batch)}, parameters are {', '.join(parameters) or 'none'})"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
