"""Meter: all readings of one pass: the loss, a step's own values, and the metrics.

Recording reads nothing to the host. Losses are kept and folded into sums every FOLD steps; small predictions are kept and
given to torchmetrics many at once, since an update of a few rows costs as much as one of many. Folds happen at fixed
counts, never at the time of a reading, so that readings do not change what is read later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axontrain import randomness
from axontrain.data.structure import mapped
from axontrain.errors import MetricError, kind_of
from axontrain.host import Fetch, item, travels
from axontrain.metrics.means import Entry, Sums, merge, summed
from axontrain.metrics.means import reading as of_sums
from axontrain.metrics.registry import Built, build, resolve
from axontrain.objective import Step, batch_size
from axontrain.readings import Reading, at_once, together
from axontrain.shown import plain

FOLD = 256
SMALL_BYTES = 256 * 1024
MOST_BYTES = 64 * 1024 * 1024
SMALL_STATE = 2**20  # values of a metric's state that need no reason

# predictions, targets, skipped (a flag on the device, or None), weights
Waiting = tuple[Any, Any, Tensor | None, Tensor | None]


class Meter:
    """Accumulates what steps give, until ``reset``.

    Args:
        metrics: what :func:`axontrain.metrics.resolve` takes.

    >>> meter = Meter()
    >>> meter.record(Step(torch.tensor(2.0), weight=3))
    >>> meter.record(Step(torch.tensor(4.0), weight=1))
    >>> meter.read()
    {'loss': 2.5}
    """

    def __init__(self, metrics: Any = None) -> None:
        self._specs = resolve(metrics)
        self._functions: list[Built] = []
        self._tallies: list[_Tally] | None = None if self._specs else []
        # loss, weight, skipped, values, and the weights of those values that have one of their own
        self._losses: list[tuple[Tensor, int | Tensor, Tensor | None, Mapping[str, Any], Mapping[str, Any] | None]] = []
        self._sums: Sums = {}
        self._saved: dict[str, Any] = {}
        self._of_tasks: dict[str, Meter] = {}
        self.tasks: tuple[str, ...] = ()  # whose names stand before those of their own metrics
        self._example: list[Any] | None = None  # of predictions and targets: shape and dtype

    def __len__(self) -> int:
        return len(self._losses) + len(self._sums)

    def record(self, step: Step, task: str | None = None) -> None:
        """Take a step in. Its loss is detached already.

        A step of a ``task`` counts in the readings of that task, ``task/loss`` and its metrics, and in the loss of all. One
        named ``task/name`` is one of that task alone.

        Raises:
            MetricError: if a metric does not fit what the step has: predictions, targets, or weights that it cannot take.
        """
        if task is not None:
            if task not in self._of_tasks:
                self._of_tasks[task] = Meter(self._specs_of(task))
            self._of_tasks[task].record(step)
            step = Step(step.loss, weight=step.weight, skipped=step.skipped)
        values = {k: _of_python(v) for k, v in _detached(step.values).items()} if step.values else step.values
        weights = None
        if self._specs and task is None:
            values, weights = self._measured(step, values)
        self._losses.append((step.loss, _of_python(step.weight), step.skipped, values, weights))
        if len(self._losses) == FOLD:
            self._sums = merge(self._sums, self._fold())
            self._losses = []

    def read(self, *, last: bool = False) -> dict[str, Any]:
        """Read everything to the host; nothing that is read later changes by it.

        With ``last`` nothing will be, before a reset: that spares a copy of the metrics.
        """
        return at_once(self.reading(last=last, now=True))

    def reading(self, *, last: bool = False, now: bool = False) -> Reading[dict[str, Any]]:
        """The same as a reading, of what has been taken in when it is begun.

        With ``now`` nothing will be before its end, which spares a copy.
        """
        sums = merge(self._sums, self._fold())
        self._build_as_before()
        parts = [of_sums(sums), *(tally.reading(last, now or last) for tally in self._tallies or ())]
        tasks = list(self._of_tasks)
        found = yield from together([*parts, *(self._of_tasks[task].reading(last=last, now=now) for task in tasks)])
        readings: dict[str, Any] = {}
        for of_part in found[: len(parts)]:
            readings |= of_part
        for task, of_task in zip(tasks, found[len(parts) :], strict=True):
            readings |= {f"{task}/{name}": value for name, value in of_task.items()}
        return readings

    def reset(self) -> None:
        """Begin anew."""
        self._losses, self._sums, self._saved = [], {}, {}
        for tally in self._tallies or ():
            tally.reset()
        for meter in self._of_tasks.values():
            meter.reset()

    def state_dict(self) -> dict[str, Any]:
        """What has been taken in, folded and not yet folded."""
        return {
            "sums": {name: tensor.clone() for name, tensor in self._sums.items()},
            "losses": [
                {"loss": loss, "weight": weight, "skipped": skipped, "values": dict(values), "weights": weights}
                for loss, weight, skipped, values, weights in self._losses
            ],
            "metrics": {tally.name: tally.state_dict() for tally in self._tallies or ()} or self._saved,
            "example": self._example,
            "names": list(self.tasks),
            "tasks": {task: meter.state_dict() for task, meter in self._of_tasks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._sums = dict(state["sums"])
        self._losses = [(of["loss"], of["weight"], of["skipped"], of["values"], of.get("weights")) for of in state["losses"]]
        self._saved = dict(state["metrics"])
        self._example = state.get("example")
        for tally in self._tallies or ():
            tally.reset()
        self._fill()
        self._of_tasks, self.tasks = {}, tuple(state.get("names", ()))
        for task, of_task in state.get("tasks", {}).items():
            self._of_tasks[task] = Meter(self._specs_of(task))
            self._of_tasks[task].load_state_dict(of_task)

    def _specs_of(self, task: str) -> dict[str, Any]:
        tasks = {task, *self.tasks}
        of_all = {n: spec for n, spec in self._specs.items() if "/" not in n or n.partition("/")[0] not in tasks}
        own = {name.partition("/")[2]: spec for name, spec in self._specs.items() if name.startswith(f"{task}/")}
        return {**of_all, **own}

    def _build(self, predictions: Any, targets: Any) -> list[_Tally]:
        with randomness.kept():  # torchmetrics is imported here, and all that it imports; some of that draws as it begins
            built = [build(name, spec, predictions, targets) for name, spec in self._specs.items()]
        self._functions = [one for one in built if one.function is not None]
        self._tallies = [_Tally(one) for one in built if one.metric is not None]
        self._fill()
        return self._tallies

    def _build_as_before(self, predictions: Any = None) -> None:
        # What was restored was made by the run's first batch: that which comes next may have another layout. And none may come
        # before the next reading, which then has to speak of what was saved all the same.
        if self._tallies is None and self._example is not None and self._saved:
            device = next((loss.device for loss, *_ in self._losses), torch.device("cpu"))
            device = next((sums.device for sums in self._sums.values()), device)
            device = predictions.device if isinstance(predictions, Tensor) else device
            self._check_example(self._example)
            self._tallies = self._build(*_empty(self._example, device))

    def _check_example(self, example: list[Any]) -> None:
        """Raise if the metrics would take far more memory than what was saved of them: a few digits of a file may ask for it.

        Raises:
            MetricError: if so.
        """
        saved = {name: _values(tally) for name, tally in self._saved.items()}
        most = max(SMALL_STATE, *saved.values())
        shapes = [shape for shape, _ in example]
        told = f"the saved metrics are of predictions {tuple(shapes[0])} and targets {tuple(shapes[1])}"
        try:
            with torch.device("meta"):  # where a tensor has a shape and no memory
                empty = _empty(example, torch.device("meta"))
                built = [build(name, spec, *empty) for name, spec in self._specs.items()]
        except Exception as error:  # of a user's factory which looks at its tensors: of what it makes nothing is known
            if any(size**2 > most for shape in shapes for size in shape[1:]):
                raise MetricError(f"{told}, for which nothing can be made before a batch has come: {plain(error)}") from error
            return
        for one in built:
            states = [] if one.metric is None else list(one.metric._defaults.values())
            values = sum(state.numel() for state in states if isinstance(state, Tensor) and state.is_meta)
            if values > most:
                raise MetricError(
                    f"{told}, for which {one.name!r} would hold {values:,} values where {saved.get(one.name, 0):,} were saved: "
                    f"that is no state of this metric"
                )

    def _fold(self) -> Sums:
        entries: dict[str, list[Entry]] = defaultdict(list)
        for loss, weight, skipped, values, weights in self._losses:
            entries["loss"].append((loss, weight, skipped))
            for name, value in values.items():
                own = weight if weights is None else weights.get(name, weight)
                entries[name].append((value, own, skipped))
        return summed(entries)

    def _measured(self, step: Step, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        predictions, targets = _detached(step.predictions), _detached(step.targets)
        if self._tallies is None:
            self._build_as_before(predictions)
        if self._tallies is None:
            self._tallies = self._build(predictions, targets)
            self._example = _example(predictions, targets)
        if step.sample_weights is not None:
            return self._weighted(step, values, predictions, targets)
        if self._functions:
            with torch.no_grad():
                values = {**values, **{one.name: one.function(predictions, targets) for one in self._functions}}  # type: ignore[misc]
        for tally in self._tallies:
            tally.record(predictions, targets, step.skipped)
        return values, None

    def _weighted(
        self, step: Step, values: Mapping[str, Any], predictions: Any, targets: Any
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        weights = _of_samples(step.sample_weights, targets)
        taken = {one.name: one.taken(weights) for one in self._functions}
        of_tallies = [tally.built.taken(weights) for tally in self._tallies or ()]
        with torch.no_grad():
            # Each value is averaged by what it is the mean of: the weights, or the samples if they are kept from it.
            own = {name: batch_size(weights) if of_name is None else weights.sum() for name, of_name in taken.items()}
            measured = {one.name: one.function(predictions, targets, taken[one.name]) for one in self._functions}  # type: ignore[misc]
        for tally, of_tally in zip(self._tallies or (), of_tallies, strict=True):
            tally.record(predictions, targets, step.skipped, of_tally)
        return {**values, **measured}, own

    def _fill(self) -> None:
        # Metrics are built from a first batch, which a restored run has yet to see: their state waits for them.
        for tally in self._tallies or ():
            if tally.name in self._saved:
                tally.load_state_dict(self._saved.pop(tally.name))


@dataclass(frozen=True, slots=True)
class _Joined:
    """A group of small steps in one tensor each, which waits until it is known which of them were skipped.

    What waits may be the steps of a whole second: as tensors of their own they would take many times what is in them, and
    Python's collector of garbage would look through them all.
    """

    predictions: Tensor
    targets: Tensor
    skipped: Tensor  # (steps,) of flags
    weights: Tensor | None
    rows: tuple[list[int], list[int], list[int]]  # of each step's predictions, targets, and weights

    @classmethod
    def of(cls, group: list[Waiting]) -> _Joined | None:
        """Join the steps of a group; None where they do not fit, or there is none that could be skipped."""
        flags = [flag for _, _, flag, _ in group if flag is not None]
        if len(flags) < len(group) or not all(_fits(group[0], entry) for entry in group):
            return None
        rows = [len(p) for p, *_ in group], [len(t) for _, t, *_ in group], [len(w) for *_, w in group if w is not None]
        predictions, targets, weights = _together(group)
        return cls(predictions, targets, torch.stack(flags), weights, rows)

    def kept(self, flags: list[float]) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What is left without the steps that were skipped, by the flags that were read; None if that is nothing."""
        if not any(flags):
            return self.predictions, self.targets, self.weights
        kept = [step for step, flag in zip(self.steps(), flags, strict=True) if not flag]
        return _together(kept) if kept else None

    def state_dict(self) -> dict[str, Any]:
        """What makes the same again."""
        of_all = {"predictions": self.predictions, "targets": self.targets, "skipped": self.skipped, "weights": self.weights}
        return of_all | {"rows": [list(rows) for rows in self.rows]}

    def steps(self) -> list[Waiting]:
        """The steps, as they were recorded."""
        predictions, targets = torch.split(self.predictions, self.rows[0]), torch.split(self.targets, self.rows[1])
        weights = [None] * len(predictions) if self.weights is None else torch.split(self.weights, self.rows[2])
        return list(zip(predictions, targets, self.skipped.unbind(), weights, strict=True))


class _Group:
    """Steps that wait until it is known which of them were skipped, and the flags that tell, on their way to the host.

    One that is ``large`` waits for those before it alone: it is undone on the device where it was skipped.
    """

    def __init__(self, steps: list[Waiting], *, join: bool = False, large: bool = False) -> None:
        self.large = large
        joined = _Joined.of(steps) if join else None
        self.steps: _Joined | list[Waiting] = steps if joined is None else joined
        flags = [flag for _, _, flag, _ in steps if flag is not None and not large]
        self.flags = Fetch([torch.stack(flags) if joined is None else joined.skipped]) if flags else None

    def told(self) -> _Group:
        """The same, for one who has to know which were skipped."""
        return _Group(list(self.steps)) if self.large and not isinstance(self.steps, _Joined) else self

    def known(self) -> bool:
        """Whether the flags have arrived."""
        return self.flags is None or self.flags.arrived()

    def bytes(self) -> int:
        """In the predictions and targets that wait."""
        steps = [(self.steps.predictions, self.steps.targets)] if isinstance(self.steps, _Joined) else self.steps
        return sum(_bytes(predictions) + _bytes(targets) for predictions, targets, *_ in steps)


class _Tally:
    """One torchmetrics metric, and the predictions that it has not been given yet."""

    def __init__(self, built: Built) -> None:
        assert built.metric is not None
        self.built, self.name, self.metric = built, built.name, built.metric
        self.groups: list[_Group] = []  # of FOLD steps each, before those that are waiting
        self.waiting: list[Waiting] = []
        self.bytes = 0
        self.updates = 0
        self.skips: Tensor | None = None  # of them, those that were undone: counted on the device
        self.listed = any(isinstance(value, list) for value in self.metric._defaults.values())

    def record(self, predictions: Any, targets: Any, skipped: Tensor | None, weights: Tensor | None = None) -> None:
        tensors = isinstance(predictions, Tensor) and isinstance(targets, Tensor)
        size = predictions.nbytes + targets.nbytes if tensors else SMALL_BYTES + 1
        joined = self.built.joinable and size <= SMALL_BYTES
        large = not joined and not (self.listed and skipped is not None)
        if large:
            if self.groups or self.waiting:  # whose turn is before it
                self._consume(rest=True, wait=self.bytes + size > 2 * MOST_BYTES)
            if not self.groups:
                self._update(predictions, targets, skipped, weights)
                return
        # Copies: a model may write its outputs into one buffer, a loader its batches.
        if tensors:
            predictions, targets = predictions.clone(), targets.clone()
        else:
            predictions, targets = _copied(predictions), _copied(targets)
        self.waiting.append((predictions, targets, skipped, None if weights is None else weights.clone()))
        if large:
            self._close(large=True)
        elif len(self.waiting) == FOLD:
            self._join()
        self.bytes += size
        # Which steps were skipped is known at a reading: until then complete groups wait, unless they grow too large.
        if self.bytes > MOST_BYTES or (skipped is None and self.groups):
            self._consume(rest=not self.built.joinable, wait=self.bytes > 2 * MOST_BYTES)

    def reading(self, last: bool, now: bool) -> Reading[dict[str, Any]]:
        self._consume(rest=last, wait=last)
        metric, updates, skips, twin = self.metric, self.updates, self.skips, self.built.twin
        groups = [group.told() for group in self.groups] + ([_Group(list(self.waiting))] if self.waiting else [])
        # A copy, where more is to go into it, or has to be computed when more may have come: it may be on the CPU itself, and
        # others that are read with it be under way. What a twin computes of travels, and is of now.
        if groups or not (now or (twin is not None and travels(metric.device))):
            metric = metric.clone()
        if groups:
            yield [group.flags for group in groups if group.flags is not None]
            updates += sum(self._give(metric, group) for group in groups)
        states = {} if twin is None else {key: getattr(metric, key) for key in metric._defaults}
        fetch = Fetch([0 if skips is None else skips, *states.values()])
        yield [fetch]
        undone, *values = fetch.there()
        if updates == int(undone):
            return {}  # nothing to speak of: all steps were skipped
        try:
            if twin is not None:
                for key, value in zip(states, values, strict=True):
                    setattr(twin, key, value)
                twin._update_count, twin._computed = updates, None
                metric = twin
            value = yield from self.built.reading(metric.compute())
        except MetricError:
            raise
        except Exception as error:
            raise MetricError(f"the metric {self.name!r} cannot be computed: {error}") from error
        if isinstance(value, dict):
            return {f"{self.name}/{key}": part for key, part in value.items()}
        return {self.name: value}

    def reset(self) -> None:
        self.metric.reset()
        self.groups, self.waiting, self.bytes, self.updates, self.skips = [], [], 0, 0, None

    def _kept(self) -> int:
        """How many updates were of steps that were not skipped."""
        if self.skips is not None:
            self.updates, self.skips = self.updates - item(self.skips), None
        return self.updates

    def state_dict(self) -> dict[str, Any]:
        states = {key: getattr(self.metric, key) for key in self.metric._defaults}
        waiting: list[Any] = []
        # Joined, since a file of many small tensors takes long to write.
        last = _Joined.of(self.waiting) if self.waiting and self.built.joinable else None
        for steps in (*(group.steps for group in self.groups), last or self.waiting):
            waiting += [steps.state_dict()] if isinstance(steps, _Joined) else map(list, steps)
        return {
            "states": {k: list(v) if isinstance(v, list) else v.clone() for k, v in states.items()},
            "waiting": waiting,
            "updates": self._kept(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        for key, value in state["states"].items():
            if key not in self.metric._defaults:
                raise MetricError(f"the metric {self.name!r} has no state {key!r}: the saved one was another metric")
            device = self.metric.device
            setattr(self.metric, key, [v.to(device) for v in value] if isinstance(value, list) else value.to(device))
        self.updates = state["updates"]
        self.metric._update_count = self.updates
        self.metric._computed = None
        for saved in state["waiting"]:
            for entry in _Joined(**saved).steps() if isinstance(saved, Mapping) else [tuple(saved)]:
                self.record(*entry)

    def _join(self) -> None:
        """Make a group of what waits, of one tensor each where that can be."""
        self.groups.append(_Group(self.waiting, join=self.built.joinable))
        self.waiting = []

    def _close(self, *, large: bool = False) -> None:
        """Make a group of what waits, though it is none of so many."""
        if self.waiting:
            self.groups.append(_Group(self.waiting, large=large))
            self.waiting = []

    def _consume(self, *, rest: bool, wait: bool) -> None:
        """Give the metric the complete groups, and the ``rest`` too if it says so; unless ``wait``, those of known flags."""
        if rest:
            self._close()
        while self.groups and (wait or self.groups[0].known()):
            group = self.groups.pop(0)
            if group.large:
                self._update(*group.steps[0])  # type: ignore[index]  # it is of one step, which is joined to none
            else:
                self.updates += self._give(self.metric, group)
        self.bytes = sum(_bytes(p) + _bytes(t) for p, t, _, _ in self.waiting) + sum(group.bytes() for group in self.groups)

    def _give(self, metric: Any, group: _Group) -> int:
        steps, flags = group.steps, [] if group.flags is None else group.flags.values()[0]
        if isinstance(steps, _Joined):
            kept = steps.kept(flags)
            if kept is None:
                return 0
            self._checked(metric, *kept)
            return 1
        if any(flags):
            left_out = iter(flags)
            steps = [entry for entry in steps if entry[2] is None or not next(left_out)]
        count, first = 0, 0
        while first < len(steps):
            last = first + 1
            if self.built.joinable:
                while last < len(steps) and _fits(steps[first], steps[last]):
                    last += 1
            self._checked(metric, *_together(steps[first:last]))
            count, first = count + 1, last
        return count

    def _update(self, predictions: Any, targets: Any, skipped: Tensor | None, weights: Tensor | None) -> None:
        # Not kept for later, as too large or not to be joined: undone on the device where the step was skipped.
        kept = {}
        if skipped is not None:
            kept = {key: getattr(self.metric, key).clone() for key in self.metric._defaults}
        self._checked(self.metric, predictions, targets, weights)
        self.updates += 1
        if skipped is not None:
            self.skips = (skipped > 0).long() if self.skips is None else self.skips + (skipped > 0)
        for key, before in kept.items():
            after = getattr(self.metric, key)
            setattr(self.metric, key, torch.where(skipped.to(after.device) > 0, before, after))  # type: ignore[union-attr]

    def _checked(self, metric: Any, predictions: Any, targets: Any, weights: Tensor | None) -> None:
        with torch.no_grad():
            try:
                if weights is None:
                    metric.update(*self.built.prepare(predictions, targets))
                else:
                    self.built.update(metric, predictions, targets, weights)
            except MetricError:
                raise
            except Exception as error:
                raise MetricError(f"the metric {self.name!r} does not take these predictions and targets: {error}") from error


# What an example may be of, by name: nothing that is read from a file is looked up elsewhere.
DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.complex64,
    )
}  # fmt: skip


def _example(*values: Any) -> list[Any] | None:
    if all(isinstance(value, Tensor) and value.dim() and str(value.dtype) in DTYPES for value in values):
        return [[list(value.shape), str(value.dtype)] for value in values]
    return None


def _empty(example: list[Any], device: torch.device) -> list[Tensor]:
    return [torch.empty((0, *shape[1:]), dtype=DTYPES[dtype], device=device) for shape, dtype in example]


def _values(value: Any) -> int:
    """How many values the tensors of a tree hold."""
    if isinstance(value, Tensor):
        return value.numel()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_values, parts))


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_detached(item) for item in value]
    return value


def _of_python(value: Any) -> Any:
    """A number of Python's in place of one of NumPy's, which a saved state does not hold."""
    numpys = not isinstance(value, (Tensor, int, float)) and hasattr(value, "item")
    return value.item() if numpys else value


def _of_samples(weights: Any, targets: Any) -> Tensor:
    # Before batches are joined, where too many weights of one would make up for too few of another.
    if not isinstance(weights, Tensor) or not weights.dim():
        raise MetricError(f"the Step's sample_weights are {kind_of(weights)}; they are a tensor (B,), one weight a sample")
    if isinstance(targets, Tensor) and weights.shape[0] != (len(targets) if targets.dim() else 1):
        raise MetricError(
            f"the Step's sample_weights are {kind_of(weights)}, and its targets {kind_of(targets)}: one weight a sample"
        )
    return weights.detach()


def _copied(value: Any) -> Any:
    return mapped(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else SMALL_BYTES + 1


def _together(steps: list[Waiting]) -> tuple[Any, Any, Tensor | None]:
    """Predictions, targets and weights of steps that fit."""
    predictions, targets, _, weights = steps[0]
    if len(steps) > 1:
        predictions, targets = torch.cat([p for p, _, _, _ in steps]), torch.cat([t for _, t, _, _ in steps])
        if weights is not None:
            weights = torch.cat([w for _, _, _, w in steps])  # type: ignore[misc]  # as _fits saw
    return predictions, targets, weights


def _fits(a: Waiting, b: Waiting) -> bool:
    pairs = [(a[0], b[0]), (a[1], b[1])]
    if a[3] is not None and b[3] is not None:
        pairs.append((a[3], b[3]))
    elif a[3] is not b[3]:  # one has weights
        return False
    return all(x.shape[1:] == y.shape[1:] and x.dtype == y.dtype and x.dim() and x.dim() == y.dim() for x, y in pairs)
