"""Setup: what a run was made of, kept with its state, so that a run that is resumed says what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from axontrain.callback import Callback, stateful
from axontrain.clock import Every
from axontrain.data.stream import Stream
from axontrain.errors import CheckpointError, warn
from axontrain.naming import clean_names
from axontrain.shown import plain
from axontrain.state import LoopState
from axontrain.version import VERSION

# Where these differ, batch k of an epoch is another batch: to go on within the epoch would be wrong.
DECIDES_BATCHES = (
    "accumulate", "samples", "length", "rows", "mixture", "batch_size", "shuffle", "drop_last", "sampler", "batch_sampler",
    "seed",
)  # fmt: skip
WORDS = {
    "accumulate": "number of batches in a step",
    "batch_size": "samples in a batch",
    "length": "number of batches",
    "mixture": "mixture's weights and tasks",
    "rows": "rows at its beginning, middle and end, by a digest",
}


# Of how it computes, what numbers may differ by in their last bits; and what states have that know nothing of it.
LATER_ADDED = {"microbatch": None, "compile": False, "channels_last": False}
OF_THE_LOOP = ("average", "clip_norm", "clip_value")  # options of an Optimizer that no state holds


def describe(
    state: LoopState,
    train: Stream,
    validation: Stream | None,
    validate: Every,
    metrics: Mapping[str, Any],
    callbacks: Iterable[Callback],
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """What a run is made of, in plain values."""
    parameters = dict(state.objective.named_parameters())
    names = clean_names(state.objective)
    own = ("cadence/", "callback/", "compile", "data", "microbatch", "scaler")
    return {
        "versions": {"axontrain": VERSION, "torch": str(torch.__version__)},
        "device": device.type,
        "precision": precision,
        "data": train.described(),
        "validation": None if validation is None else validation.described(),
        "validate": str(validate),
        "optimizers": {name: update.described() for name, update in state.optimizers.items()},
        "metrics": {name: _named(metric) for name, metric in metrics.items()},
        "callbacks": {f"callback/{key}": dict(one.given) for key, one in stateful(callbacks).items()},
        "parts": sorted(name for name in state.attached if not name.startswith(own)),
        "modules": _modules(state.objective),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()}),
        "frozen": [names.get(name, name) for name, p in parameters.items() if not p.requires_grad],
    }


def same_batches(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two runs cut their data into the same batches, as far as their setups tell."""
    return not saved or not _batches_changed(saved, now)


def compare(
    saved_state: Mapping[str, Any], now: Mapping[str, Any], seed: int | None, limits: Mapping[str, Any], state: LoopState
) -> str:
    """What has changed since a state was saved, in words; "" if nothing has.

    Args:
        saved_state: what was saved, or at least its "setup", "counters" and "plan".
        now: what :func:`describe` says of this run.
        seed: what this Loop was given, if anything.
        limits: of this fit.
        state: of this Loop.

    Raises:
        CheckpointError: where going on would be wrong: in the middle of an epoch of other batches.
    """
    saved, counters = saved_state.get("setup", {}), saved_state["counters"]
    if not saved:  # nothing was trained with fit
        return ""
    within = bool(counters["batch_index"])
    batches = _batches_changed(saved, now)
    if batches and within:
        raise CheckpointError(
            f"this run cannot be resumed at batch {counters['batch_index']} of epoch {counters['epoch']}, whose batches are "
            f"others now: {'; '.join(batches)}. Give fit the data that the run had, or begin the epoch anew with these: "
            f"loop.restore(...), and fit(...) without resume"
        )
    changes = list(batches)
    changes += _differences("the training data's ", saved["data"], now["data"], ("kind", "limit", "augment"))
    changes += _validation(saved["validation"], now["validation"])
    changes += _differences("", saved, now, ("validate",))
    kept = counters["seed"]
    if seed not in (None, kept):
        changes.append(f"seed: it was {kept}, and this Loop has {seed}; the run keeps {kept}")
    for name, options in now["optimizers"].items():
        changes += _of_optimizer(name, saved["optimizers"].get(name, {}), options)
    changes += _of_callbacks(saved["callbacks"], now["callbacks"])
    lost = sorted(set(saved.get("parts", [])) - set(now["parts"]))
    changes += [f"{name} is not attached any more (state.attach): its state waits for it" for name in lost]
    changes += _of_metrics(saved["metrics"], now["metrics"], within=within)
    changes += _differences("the parameters' ", saved, now, ("dtypes",))
    changes += _of_modules(saved.get("modules"), now["modules"], state)
    for word, names in (
        ("frozen", sorted(set(now["frozen"]) - set(saved.get("frozen", [])))),
        ("no longer frozen", sorted(set(saved.get("frozen", [])) - set(now["frozen"]))),
    ):
        if names:
            changes.append(f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: {word}")
    old = saved_state.get("plan")
    if old is not None and any(_sees_progress(options["schedule"]) for options in now["optimizers"].values()):
        changes += [f"{change}, so that the schedule sees another progress" for change in _differences("", old, limits, limits)]
    for change in _differences("the version of ", saved["versions"], now["versions"], ("axontrain", "torch")):
        changes.append(f"{change}; numbers may differ in their last bits")
    for change in _differences("the ", {"precision": "fp32", **saved}, now, ("precision",)):
        changes.append(f"{change}; numbers are others from here on")
    for change in _differences("", {**LATER_ADDED, **saved}, now, tuple(LATER_ADDED)):
        changes.append(f"{change}; numbers may differ in their last bits")
    for change in _differences("the ", saved, now, ("device",)):
        changes.append(f"{change}; numbers differ in their last bits, and what is random differs")
    return "; ".join(changes)


def tell(source: object, changes: str) -> None:
    """Warn of what has changed since a run was saved."""
    if changes:
        warn(f"resumed from {source}. Since then has changed: {plain(changes, None)}")


def _batches_changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return _differences("the training data's ", saved.get("data", {}), now["data"], DECIDES_BATCHES)


def _differences(what: str, before: Mapping[str, Any], after: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    changed = {key: change for key in keys if (change := _changed(before.get(key), after.get(key), key))}
    return [f"{what}{WORDS.get(key, key)}: {change}" for key, change in changed.items()]


def _changed(old: Any, new: Any, key: str = "") -> str:
    if _plain(old) == _plain(new):
        return ""
    told = ["not known" if value is None and key in ("samples", "length") else repr(value) for value in (old, new)]
    return f"it was {told[0]}, and is {told[1]}"


def _validation(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    if before is None or after is None:
        told = "there is none any more" if after is None else "there was none before"
        return [f"the validation data: {told}"] if before is not after else []
    return _differences("the validation data's ", before, after, sorted({*before, *after} - {"batches"}))


def _of_optimizer(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    changes = []
    for key in sorted({*before, *after} - {"schedule", "set", *after["set"]}):
        if change := _changed(before.get(key), after.get(key)):
            how = f"the run keeps what it had (to change it: loop.restore, loop.state.optimizers[{name!r}].set, fit)"
            how = f"the {'average' if key == 'average' else 'clipping'} is that of this Loop" if key in OF_THE_LOOP else how
            changes.append(f"{key} of the optimizer {name!r}: {change}; {how}")
    if _plain(before.get("schedule")) != _plain(after.get("schedule")):
        how = "this Loop's is used" if after.get("schedule") is not None else "there is none, and the rate stays where it was"
        changes.append(f"the schedule of the optimizer {name!r}: {how}")
    return changes


def _sees_progress(schedule: Any) -> bool:
    return bool(schedule) and isinstance(schedule[0], float)


def _of_callbacks(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    changes = [f"{_short(name)} is new: it begins with nothing" for name in after if name not in before]
    changes += [f"{_short(name)} is no longer there: its state waits for it" for name in before if name not in after]
    for name, given in after.items():
        if name in before:
            keys = sorted({*given, *before[name]})
            named = {key: f"argument {key}" if key.isdigit() else key for key in keys}
            found = _differences("", before[name], given, keys)
            changes += [f"{_short(name)}, {named[one.partition(':')[0]]}{one[one.index(':') :]}" for one in found]
    return changes


def _of_metrics(before: Mapping[str, Any], after: Mapping[str, Any], *, within: bool) -> list[str]:
    changes = [f"the metric {_line}" for _line in _differences("", before, after, [name for name in after if name in before])]
    if within:
        changes += [f"the metric {name} is new: of the present epoch it sees the rest" for name in after if name not in before]
        changes += [f"the metric {name} is no longer there" for name in before if name not in after]
    return changes


# Wrappers that compute what the module within them does.
WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel")
LATER = "-"  # of a module that the first batch makes another


def _lines(objective: nn.Module) -> dict[str, str]:
    """Each module in words, as ``Dropout(p=0.5, inplace=False)``, without those in it.

    Only torch's own layers tell of their options: what others say may be anything, as an address, or not be ready to be said.
    """
    found = {}
    for name, part in objective.named_modules():
        kind = type(part)
        if isinstance(part, LazyModuleMixin):
            found[name] = LATER
        elif kind.__name__ not in WRAPPERS:
            found[name] = f"{kind.__name__}({part.extra_repr() if kind.__module__.startswith('torch.nn.modules.') else '...'})"
    return found


def _modules(objective: nn.Module) -> str:
    """A digest of each module's words, in order: short enough to be kept with every state."""
    lines = _lines(objective).values()
    return " ".join(LATER if line == LATER else hashlib.blake2b(line.encode(), digest_size=4).hexdigest() for line in lines)


def _of_modules(before: str | None, after: str, state: LoopState) -> list[str]:
    if before is None or before == after:
        return []
    old, new = before.split(), after.split()
    if len(old) != len(new):
        return [f"the number of modules: {_changed(len(old), len(new))}"]
    lines = _lines(state.objective)
    both = zip(lines.items(), old, new, strict=True)
    changed = [f"{name} is {line}" for (name, line), a, b in both if a != b and LATER not in (a, b)]
    if not changed:
        return []
    return [f"{', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''}, which was something else"]


def _named(metric: Any) -> str:
    """What a metric is, as far as it has a name of its own."""
    of = getattr(metric, "factory", metric)
    name = getattr(of, "__qualname__", type(of).__name__)
    return f"{name} ({metric.name})" if isinstance(getattr(metric, "name", None), str) else name


def _short(name: str) -> str:
    return name.partition("/")[2]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # a tuple comes back from a checkpoint as a list
