"""Meter: all readings of one pass: the loss, a step's own values, and the metrics.

Recording reads nothing to the host. Losses are kept and folded into sums every FOLD steps; small predictions are kept and
given to torchmetrics many at once, since an update of a few rows costs as much as one of many. Folds happen at fixed
counts, never at the time of a reading, so that readings do not change what is read later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import MetricError
from axontrain.metrics.means import Entry, Sums, means, merge, summed
from axontrain.metrics.registry import Built, build, resolve
from axontrain.objective import Step

FOLD = 256
SMALL_BYTES = 256 * 1024
MOST_BYTES = 64 * 1024 * 1024


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
        self._losses: list[tuple[Tensor, int | Tensor, Tensor | None, Mapping[str, Any]]] = []
        self._sums: Sums = {}
        self._saved: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._losses) + len(self._sums)

    def record(self, step: Step) -> None:
        """Take a step in. Its loss is detached already."""
        values = _detached(step.values) if step.values else step.values
        if self._specs:
            values = self._measured(step, values)
        self._losses.append((step.loss, step.weight, step.skipped, values))
        if len(self._losses) == FOLD:
            self._sums = merge(self._sums, self._fold())
            self._losses = []

    def read(self, *, last: bool = False) -> dict[str, Any]:
        """Read everything to the host; nothing that is read later changes by it.

        With ``last`` nothing will be, before a reset: that spares a copy of the metrics.
        """
        readings: dict[str, Any] = means(merge(self._sums, self._fold()))
        for tally in self._tallies or ():
            readings |= tally.read(last)
        return readings

    def reset(self) -> None:
        """Begin anew."""
        self._losses, self._sums, self._saved = [], {}, {}
        for tally in self._tallies or ():
            tally.reset()

    def state_dict(self) -> dict[str, Any]:
        """What has been taken in, folded and not yet folded."""
        return {
            "sums": {name: tensor.clone() for name, tensor in self._sums.items()},
            "losses": [
                {"loss": loss, "weight": weight, "skipped": skipped, "values": dict(values)}
                for loss, weight, skipped, values in self._losses
            ],
            "metrics": {tally.name: tally.state_dict() for tally in self._tallies or ()} or self._saved,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._sums = dict(state["sums"])
        self._losses = [(of["loss"], of["weight"], of["skipped"], of["values"]) for of in state["losses"]]
        self._saved = dict(state["metrics"])
        for tally in self._tallies or ():
            tally.reset()
        self._fill()

    def _fold(self) -> Sums:
        entries: dict[str, list[Entry]] = defaultdict(list)
        for loss, weight, skipped, values in self._losses:
            entries["loss"].append((loss, weight, skipped))
            for name, value in values.items():
                entries[name].append((value, weight, skipped))
        return summed(entries)

    def _measured(self, step: Step, values: Mapping[str, Any]) -> Mapping[str, Any]:
        predictions, targets = _detached(step.predictions), _detached(step.targets)
        if self._tallies is None:
            built = [build(name, spec, predictions, targets) for name, spec in self._specs.items()]
            self._functions = [one for one in built if one.function is not None]
            self._tallies = [_Tally(one) for one in built if one.metric is not None]
            self._fill()
        if self._functions:
            with torch.no_grad():
                values = {**values, **{one.name: one.function(predictions, targets) for one in self._functions}}  # type: ignore[misc]
        for tally in self._tallies:
            tally.record(predictions, targets, step.skipped)
        return values

    def _fill(self) -> None:
        # Metrics are built from a first batch, which a restored run has yet to see: their state waits for them.
        for tally in self._tallies or ():
            if tally.name in self._saved:
                tally.load_state_dict(self._saved.pop(tally.name))


class _Tally:
    """One torchmetrics metric, and the predictions that it has not been given yet."""

    def __init__(self, built: Built) -> None:
        assert built.metric is not None
        self.built, self.name, self.metric = built, built.name, built.metric
        self.waiting: list[tuple[Any, Any, Tensor | None]] = []
        self.bytes = 0
        self.updates = 0
        self.listed = any(isinstance(value, list) for value in self.metric._defaults.values())

    def record(self, predictions: Any, targets: Any, skipped: Tensor | None) -> None:
        size = _bytes(predictions) + _bytes(targets)
        joined = self.built.joinable and size <= SMALL_BYTES
        if not joined and not (self.listed and skipped is not None):
            if self.waiting:
                self._consume(len(self.waiting))
            self._update(predictions, targets, skipped)
            return
        # Copies: a model may write its outputs into one buffer, a loader its batches.
        self.waiting.append((_copied(predictions), _copied(targets), skipped))
        self.bytes += size
        # Which steps were skipped is known at a reading: until then complete groups wait, unless they grow too large.
        if self.bytes > MOST_BYTES or (skipped is None and len(self.waiting) >= FOLD):
            self._consume(len(self.waiting) // FOLD * FOLD if self.built.joinable else len(self.waiting))

    def read(self, last: bool) -> dict[str, Any]:
        self._consume(len(self.waiting) if last else len(self.waiting) // FOLD * FOLD)
        metric, updates = self.metric, self.updates
        if self.waiting:
            metric = metric.clone()
            updates += self._give(metric, self.waiting)
        if not updates:
            return {}  # nothing to speak of: all steps were skipped
        try:
            value = self.built.read(metric.compute())
        except MetricError:
            raise
        except Exception as error:
            raise MetricError(f"the metric {self.name!r} cannot be computed: {error}") from error
        if isinstance(value, dict):
            return {f"{self.name}/{key}": item for key, item in value.items()}
        return {self.name: value}

    def reset(self) -> None:
        self.metric.reset()
        self.waiting, self.bytes, self.updates = [], 0, 0

    def state_dict(self) -> dict[str, Any]:
        states = {key: getattr(self.metric, key) for key in self.metric._defaults}
        return {
            "states": {k: list(v) if isinstance(v, list) else v.clone() for k, v in states.items()},
            "waiting": [[p, t, flag] for p, t, flag in self.waiting],
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        for key, value in state["states"].items():
            if key not in self.metric._defaults:
                raise MetricError(f"the metric {self.name!r} has no state {key!r}: the saved one was another metric")
            device = self.metric.device
            setattr(self.metric, key, [v.to(device) for v in value] if isinstance(value, list) else value.to(device))
        self.waiting = [(p, t, flag) for p, t, flag in state["waiting"]]
        self.bytes = sum(_bytes(p) + _bytes(t) for p, t, _ in self.waiting)
        self.updates = state["updates"]
        self.metric._update_count = self.updates
        self.metric._computed = None

    def _consume(self, count: int) -> None:
        for first in range(0, count, FOLD):
            self.updates += self._give(self.metric, self.waiting[first : min(first + FOLD, count)])
        self.waiting = self.waiting[count:]
        self.bytes = sum(_bytes(p) + _bytes(t) for p, t, _ in self.waiting)

    def _give(self, metric: Any, group: list[tuple[Any, Any, Tensor | None]]) -> int:
        flags = [flag for _, _, flag in group if flag is not None]
        if flags and any(read := torch.stack(flags).tolist()):
            left_out = iter(read)
            group = [entry for entry in group if entry[2] is None or not next(left_out)]
        count, first = 0, 0
        while first < len(group):
            last = first + 1
            if self.built.joinable:
                while last < len(group) and _fits(group[first], group[last]):
                    last += 1
            part = group[first:last]
            if len(part) == 1:
                predictions, targets = part[0][0], part[0][1]
            else:
                predictions, targets = torch.cat([p for p, _, _ in part]), torch.cat([t for _, t, _ in part])
            self._checked(metric, predictions, targets)
            count, first = count + 1, last
        return count

    def _update(self, predictions: Any, targets: Any, skipped: Tensor | None) -> None:
        # Not kept for later, as too large or not to be joined: undone on the device where the step was skipped.
        kept = {}
        if skipped is not None:
            kept = {key: getattr(self.metric, key).clone() for key in self.metric._defaults}
        self._checked(self.metric, predictions, targets)
        self.updates += 1
        for key, before in kept.items():
            after = getattr(self.metric, key)
            setattr(self.metric, key, torch.where(skipped.to(after.device) > 0, before, after))  # type: ignore[union-attr]

    def _checked(self, metric: Any, predictions: Any, targets: Any) -> None:
        with torch.no_grad():
            try:
                metric.update(*self.built.prepare(predictions, targets))
            except MetricError:
                raise
            except Exception as error:
                raise MetricError(f"the metric {self.name!r} does not take these predictions and targets: {error}") from error


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_detached(item) for item in value]
    return value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else SMALL_BYTES + 1


def _fits(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any]) -> bool:
    return all(
        x.shape[1:] == y.shape[1:] and x.dtype == y.dtype and x.dim() and x.dim() == y.dim()
        for x, y in zip(a[:2], b[:2], strict=True)
    )
