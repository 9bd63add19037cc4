"""Setup: what a run was made of, kept with its state, so that a run that is resumed says what has changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from axontrain.data.stream import Stream
from axontrain.errors import CheckpointError
from axontrain.state import LoopState
from axontrain.version import VERSION

# Where these differ, batch k of an epoch is another batch: to go on within the epoch would be wrong.
DECIDES_BATCHES = ("samples", "batch_size", "shuffle", "drop_last", "sampler", "batch_sampler", "seed")
BATCHES = {"batch_size": "samples in a batch", "samples": "samples", "batches": "batches in an epoch"}


def describe(
    state: LoopState, train: Stream, validation: Stream | None, metrics: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """What a run is made of, in plain values."""
    return {
        "versions": {"axontrain": VERSION, "torch": str(torch.__version__)},
        "device": device.type,
        "data": train.described(),
        "validation": None if validation is None else validation.described(),
        "optimizers": {name: update.described() for name, update in state.optimizers.items()},
        "metrics": sorted(metrics),
    }


def same_batches(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two runs cut their data into the same batches, as far as their setups tell."""
    return not _batches_changed(saved, now)


def compare(saved_state: Mapping[str, Any], now: Mapping[str, Any], seed: int | None, limits: Mapping[str, Any]) -> str:
    """What has changed since a state was saved, in words; "" if nothing has.

    Args:
        saved_state: what was saved, or at least its "setup", "counters", "plan" and "attached".
        now: what :func:`describe` says of this run, and in "callbacks" the names of those that have a state.
        seed: what this Loop was given, if anything.
        limits: of this fit.

    Raises:
        CheckpointError: where going on would be wrong: in the middle of an epoch of other batches.
    """
    saved, counters = saved_state.get("setup", {}), saved_state["counters"]
    if not saved:  # nothing was trained with fit
        return ""
    batches = _batches_changed(saved, now)
    if batches and counters["batch_index"]:
        raise CheckpointError(
            f"this run cannot be resumed at batch {counters['batch_index']} of epoch {counters['epoch']}, whose batches are "
            f"others now: {'; '.join(batches)}. Give fit the data that the run had, or begin the epoch anew with these: "
            f"loop.restore(...), and fit(...) without resume"
        )
    changes = list(batches)
    kind, limit = (_changed(saved["data"], now["data"], key) for key in ("kind", "limit"))
    changes += [f"the training data's {key}: {change}" for key, change in (("kind", kind), ("limit", limit)) if change]
    validation = (saved["validation"], now["validation"])
    if validation[0] != validation[1]:
        changes.append(f"the validation data: it was {_told(validation[0])}, and is {_told(validation[1])}")
    kept = counters["seed"]
    if seed not in (None, kept):
        changes.append(f"seed: it was {kept}, and this Loop has {seed}; the run keeps {kept}")
    for name, options in now["optimizers"].items():
        before = saved["optimizers"].get(name, {})
        different = {key: change for key in sorted({*before, *options}) if (change := _changed(before, options, key))}
        for key, change in different.items():
            kept = "; the clipping is that of this Loop" if key.startswith("clip") else "; the run keeps what it had"
            changes.append(f"{key} of the optimizer {name!r}: {change}{kept}")
    known, present = set(saved["callbacks"]), set(now["callbacks"])
    changes += [f"{name.partition('/')[2]} is new: it begins with nothing" for name in sorted(present - known)]
    changes += [f"{name.partition('/')[2]} is no longer there: its state waits for it" for name in sorted(known - present)]
    if counters["batch_index"] and saved["metrics"] != now["metrics"]:
        new = sorted(set(now["metrics"]) - set(saved["metrics"]))
        gone = sorted(set(saved["metrics"]) - set(now["metrics"]))
        if new:
            changes.append(f"the metrics {', '.join(new)} are new: of the present epoch they see the rest")
        if gone:
            changes.append(f"the metrics {', '.join(gone)} are no longer there")
    old = saved_state.get("plan")
    if old is not None and any(options["sees progress"] for options in now["optimizers"].values()):
        changed = {key: change for key in limits if (change := _changed(old, limits, key))}
        for key, change in changed.items():
            changes.append(f"{key}: {change}, so that the schedule sees another progress")
    for key, what in (("versions", "axontrain"), ("versions", "torch")):
        if change := _changed(saved[key], now[key], what):
            changes.append(f"the version of {what}: {change}; numbers may differ in their last bits")
    if change := _changed(saved, now, "device"):
        changes.append(f"the device: {change}; numbers differ in their last bits, and what is random differs")
    return "; ".join(changes)


def _batches_changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, after = saved.get("data", {}), now["data"]
    changed = {key: change for key in DECIDES_BATCHES if (change := _changed(before, after, key))}
    return [f"the training data's {BATCHES.get(key, key)}: {change}" for key, change in changed.items()]


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    old, new = before.get(key), after.get(key)
    return "" if _plain(old) == _plain(new) else f"it was {old!r}, and is {new!r}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # a tuple comes back from a checkpoint as a list


def _told(described: Mapping[str, Any] | None) -> str:
    if described is None:
        return "not there"
    return ", ".join(f"{key}={value!r}" for key, value in described.items() if value is not None)
