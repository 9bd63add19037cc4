"""Schema: what a Loop's state has to be of before any of it is put in place, whoever wrote the file.

Sums guard against damage, not against a file that was forged and summed anew. Most of what is wrong would raise where it is
used, with half of the state in place by then. Some of it would not even raise: torch's fused optimizers and NumPy's generator
take a size or a position at its word, and read and write outside of their memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from axontrain.errors import CheckpointError, kind_of
from axontrain.history import MOST_EARLY
from axontrain.shown import LONGEST, quoted

REQUIRED = ("objective", "optimizers", "counters", "values", "history", "rng", "meter", "attached")
OPTIONAL = ("early", "setup", "plan", "owed", "partial", "in_epoch", "halt")
COUNTED = ("epoch", "step", "samples", "batch_index")
MOST = 2**63  # of a counter
MOST_OF_ONE = 2**31  # values of one sample's predictions or targets
# torch.optim's own that look at each parameter's steps while they are loaded, and those that have a fused kernel.
STEPPED = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "ASGD", "RMSprop", "Rprop"}
FUSED = {"Adam", "AdamW", "SGD", "Adagrad"}
SHAPED = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"}  # what those kernels read and write
EXAMPLES = {  # of what a meter's predictions and targets may be
    str(dtype)
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.complex64,
    )
}  # fmt: skip
MOST_GRAPHS = 64
NAME = 200  # characters of a class's
WORDS = 624  # of a Mersenne twister
CUDA_BYTES = 16  # of a CUDA generator: a seed and an offset

Check = Callable[[Any, str], Any]


def check(tree: Any) -> None:
    """Raise unless a tree is of the form of a Loop's state; whether it fits a Loop's own objects is theirs to say.

    Raises:
        CheckpointError: naming the first place that is not.
    """
    state = _mapping(tree, "")
    for key in REQUIRED:
        if key not in state:
            raise CheckpointError(f"the saved state has no {key!r}: it is not of a Loop")
    _only(state, "", *REQUIRED, *OPTIONAL)
    _texts(state["objective"], "objective")
    for name, of_one in _texts(state["optimizers"], "optimizers").items():
        _optimizer(of_one, f"optimizers/{name}", state["objective"])
    _counters(state["counters"], "counters")
    _texts(state["values"], "values")
    if state.get("early") is not None:
        _early(state["early"], "early")
    for index, row in enumerate(_list(state["history"], "history")):
        _row(row, f"history/{index}")
    if state["rng"] is not None:
        _generators(state["rng"], "rng")
    _meter(state["meter"], "meter")
    for name, of_one in _texts(state["attached"], "attached").items():
        _attached(name, of_one, f"attached/{name}")
    _setup(state.get("setup", {}), "setup")
    if state.get("plan") is not None:
        _plan(state["plan"], "plan")
    if state.get("partial") is not None:
        row = _of(_only(state["partial"], "partial", "row", "names"), "row", "partial")
        _listed(state["partial"].get("names", []), "partial/names")
        if row is not None:
            _row(row, "partial/row")
        if not state["history"]:
            raise _wrong(state["partial"], "partial", "None, where the history is empty")
    _listed(state.get("owed", []), "owed")
    if state.get("halt") is not None:
        halt = _only(state["halt"], "halt", "kind", "reason", "callback", "given", "pending")
        _texts(_of(halt, "given", "halt"), "halt/given")
        for key in ("kind", "reason", "callback"):
            _text(_of(halt, key, "halt"), f"halt/{key}")
        if not isinstance(_of(halt, "pending", "halt"), bool):
            raise _wrong(halt["pending"], "halt/pending", "true or false")
    if not isinstance(state.get("in_epoch", False), bool):
        raise _wrong(state["in_epoch"], "in_epoch", "true or false")


def _row(value: Any, place: str) -> None:
    row = _texts(value, place)
    for key in ("step", "epoch"):
        _count(_of(row, key, place), f"{place}/{key}")


def _early(value: Any, place: str) -> None:
    """Check the earlier rows of a history, which are held by columns, and of tensors as :mod:`axontrain.history` makes them."""
    columns = {name: _only(column, f"{place}/{name}", "rows", "values") for name, column in _texts(value, place).items()}
    for name in ("step", "epoch"):
        values = _of(_of(columns, name, place), "values", f"{place}/{name}")
        if columns[name].get("rows") is not None or not isinstance(values, Tensor) or values.dtype is not torch.int64:
            raise _wrong(values, f"{place}/{name}", "a whole number for each row")
    count = columns["step"]["values"].numel()
    total = 0
    for name, column in columns.items():
        rows, values = _of(column, "rows", f"{place}/{name}"), _of(column, "values", f"{place}/{name}")
        in_tensor = isinstance(values, Tensor) and values.dim() == 1 and values.dtype in (torch.int64, torch.float64)
        length = len(values) if isinstance(values, list) or in_tensor else -1
        total += max(length, 0)
        if total > MOST_EARLY:
            raise CheckpointError(
                f"the saved state's {place!r} holds more than {MOST_EARLY:,} readings, which is more than is read back"
            )
        if length < 0 or (rows is None and length != count):
            raise _wrong(values, f"{place}/{name}/values", "one value for each row")
        if rows is not None and not _are_places(rows, length, count):
            raise _wrong(rows, f"{place}/{name}/rows", "the numbers of its rows")


def _are_places(rows: Any, length: int, count: int) -> bool:
    if not isinstance(rows, Tensor) or rows.dtype is not torch.int64 or rows.shape != (length,):
        return False
    return not length or (int(rows.min()) >= 0 and int(rows.max()) < count)


def _counters(value: Any, place: str) -> None:
    counters = _only(value, place, *COUNTED, "epoch_length", "elapsed", "seed")
    for key in COUNTED:
        _count(_of(counters, key, place), f"{place}/{key}")
    length = _of(counters, "epoch_length", place)
    if length is not None and not _count(length, f"{place}/epoch_length"):
        raise _wrong(length, f"{place}/epoch_length", "None, or a whole number above 0")
    elapsed = _of(counters, "elapsed", place)
    if _number(elapsed, f"{place}/elapsed") < 0 or not isinstance(elapsed, float):
        raise _wrong(counters["elapsed"], f"{place}/elapsed", "seconds, 0 or more")
    seed = _of(counters, "seed", place)
    if type(seed) is not int:
        raise _wrong(seed, f"{place}/seed", "a whole number")


def _plan(value: Any, place: str) -> None:
    starts = ("start_epoch", "start_step", "start_index")
    plan = _only(value, place, "epochs", "steps", "seconds", *starts, "start_elapsed")
    for key in ("epochs", "steps"):
        if _of(plan, key, place) is not None:
            _count(plan[key], f"{place}/{key}")
    if _of(plan, "seconds", place) is not None:
        _number(plan["seconds"], f"{place}/seconds")
    for key in starts:
        _count(_of(plan, key, place), f"{place}/{key}")
    _number(_of(plan, "start_elapsed", place), f"{place}/start_elapsed")


def _setup(value: Any, place: str) -> None:
    setup = _texts(value, place)
    if not setup:  # nothing was trained with fit
        return
    for key in ("versions", "data", "optimizers"):
        _texts(_of(setup, key, place), f"{place}/{key}")
    for name, options in setup["optimizers"].items():
        _texts(options, f"{place}/optimizers/{name}")
    if _of(setup, "validation", place) is not None:
        _texts(setup["validation"], f"{place}/validation")
    _text(_of(setup, "device", place), f"{place}/device")
    for key in ("precision", "modules"):
        _text(setup.get(key, ""), f"{place}/{key}")
    for key in ("metrics", "callbacks"):
        _texts(_of(setup, key, place), f"{place}/{key}")
    for name, given in setup["callbacks"].items():
        _texts(given, f"{place}/callbacks/{name}")
    for key in ("parts", "frozen", "dtypes"):
        _listed(_of(setup, key, place), f"{place}/{key}")
    _without_tensors(setup, place)


def _attached(name: str, value: Any, place: str) -> None:
    """Check the state of a part that the engine attaches itself; those of others are their own affair."""
    if name not in ("data", "microbatch", "scaler", "compile") and not name.startswith("cadence/"):
        return
    part = _texts(value, place)
    if name == "data":
        position = _list(part.get("position", [0, 0]), f"{place}/position")
        if len(position) != 2:
            raise _wrong(position, f"{place}/position", "an epoch and an index")
        for count in (*position, part.get("consumed", 0), part.get("turns", 0)):
            _count(count, f"{place}/position, consumed or turns")
        if not isinstance(part.get("ended", False), bool):
            raise _wrong(part["ended"], f"{place}/ended", "true or false")
        for key in ("begun", "now"):
            for index, own in enumerate(_list(part.get(key, []), f"{place}/{key}")):
                _twister(own, f"{place}/{key}/{index}")
    if name == "microbatch":
        for key in ("size", "smaller"):
            if _of(part, key, place) is not None and not _count(part[key], f"{place}/{key}"):
                raise _wrong(part[key], f"{place}/{key}", "None, or a whole number above 0")
        for key in ("wait", "since"):
            _count(_of(part, key, place), f"{place}/{key}")
    if name == "compile":
        _compiled(part, place)
    if name.startswith("cadence/"):
        _cadence(part, place)


def _compiled(part: Mapping[str, Any], place: str) -> None:
    for key in ("main", "eager", "divided"):
        _text(_of(part, key, place), f"{place}/{key}")
    for key in ("since", "others", "misses", "in_a_row", "anew"):
        _count(part.get(key, 0), f"{place}/{key}")
    if part.get("last", -1) != -1:
        _count(part["last"], f"{place}/last")
    for key in ("variable", "parted"):
        if not isinstance(part.get(key, False), bool):
            raise _wrong(part[key], f"{place}/{key}", "true or false")
    for key, known in (("varying", ("weight_decay", "momentum", "betas")), ("made", ("static", "dynamic"))):
        _listed(part.get(key, []), f"{place}/{key}")
        if len(part.get(key, [])) > MOST_GRAPHS or not {*part.get(key, [])} <= {*known}:
            raise _wrong(part[key], f"{place}/{key}", f"a list of {' and '.join(known)}")
    for index, options in enumerate(_list(part.get("constants", []), f"{place}/constants")):
        for key, value in _texts(options, f"{place}/constants/{index}").items():
            for one in value if isinstance(value, (list, tuple)) else (value,):
                _number(one, f"{place}/constants/{index}/{key}")


def _optimizer(value: Any, place: str, objective: Mapping[str, Any]) -> None:
    counts = ("skipped", "in_a_row", "bad_losses")
    of_one = _only(value, place, "optimizers", "schedulers", "scale", "unscaled", *counts, "average")
    if of_one.get("average") is not None:
        _average(of_one["average"], f"{place}/average")
    groups = 0
    for index, part in enumerate(_list(_of(of_one, "optimizers", place), f"{place}/optimizers")):
        groups += _part(part, f"{place}/optimizers/{index}", objective)
    schedulers = _list(_of(of_one, "schedulers", place), f"{place}/schedulers")
    for index, scheduler in enumerate(schedulers):
        at = f"{place}/schedulers/{index}"
        _kind(_of(_only(scheduler, at, "kind", "state"), "kind", at), f"{at}/kind")
        _texts(_of(scheduler, "state", at), f"{at}/state")
    scale = _number(_of(of_one, "scale", place), f"{place}/scale")
    unscaled = _list(_of(of_one, "unscaled", place), f"{place}/unscaled")
    for index, rate in enumerate(unscaled):
        _number(rate, f"{place}/unscaled/{index}")
    if len(unscaled) > groups or (
        not unscaled and schedulers and scale != 1
    ):  # optimizers within others have no rates of theirs
        raise _wrong(unscaled, f"{place}/unscaled", f"a rate for each of {groups} groups")
    for key in counts:
        _count(_of(of_one, key, place), f"{place}/{key}")


def _average(value: Any, place: str) -> None:
    average = _only(value, place, "kind", "folds", "counted", "raw", "finer", "cadence")
    _text(_of(average, "kind", place), f"{place}/kind")
    _count(_of(average, "folds", place), f"{place}/folds")
    counted = _of(average, "counted", place)
    if counted is not None and not (isinstance(counted, Tensor) and counted.is_floating_point() and not counted.ndim):
        raise _wrong(counted, f"{place}/counted", "a number in a tensor, or nothing")
    for key in ("raw", "finer"):
        for name, tensor in _texts(_of(average, key, place), f"{place}/{key}").items():
            if not isinstance(tensor, Tensor) or (key == "finer" and name not in average["raw"]):
                raise _wrong(tensor, f"{place}/{key}/{name}", "a tensor, of weights that are there")
    if _of(average, "cadence", place) is not None:
        _cadence(average["cadence"], f"{place}/cadence")


def _cadence(value: Any, place: str) -> None:
    part = _texts(value, place)
    _text(_of(part, "interval", place), f"{place}/interval")
    _count(_of(part, "fired", place), f"{place}/fired")
    if _of(part, "multiple", place) is not None:
        _count(part["multiple"], f"{place}/multiple")


def _kind(value: Any, place: str) -> str:
    """Check the name of a class, which is compared and shown."""
    if not isinstance(value, str) or not value.isidentifier() or len(value) > NAME:
        raise _wrong(value, place, "the name of a class")
    return value


def _part(value: Any, place: str, objective: Mapping[str, Any]) -> int:
    """Check the state of one torch optimizer; give how many groups it has."""
    part = _only(value, place, "kind", "state", "groups")
    kind = _kind(_of(part, "kind", place), f"{place}/kind")
    groups = _list(_of(part, "groups", place), f"{place}/groups")
    names: set[str] = set()
    fused = kind in FUSED
    for index, group in enumerate(groups):
        at = f"{place}/groups/{index}"
        _listed(_of(_texts(group, at), "parameters", at), f"{at}/parameters")
        names.update(group["parameters"])
        for key in ("lr", "initial_lr"):
            if key in group:
                _scalar(group[key], f"{at}/{key}")
        fused = fused or bool(group.get("fused") not in (None, False))
    for name, of_name in _texts(_of(part, "state", place), f"{place}/state").items():
        at = f"{place}/state/{name}"
        if name not in names:
            raise CheckpointError(f"{_said(at)} is of a parameter that is in none of its groups")
        _of_parameter(of_name, at, kind, fused, objective.get(name))
    return len(groups)


def _of_parameter(value: Any, place: str, kind: str, fused: bool, parameter: Any) -> None:
    state = _texts(value, place)
    if kind in STEPPED and state:
        _of(state, "step", place)
    if "step" in state:
        _scalar(state["step"], f"{place}/step", tensor=kind in STEPPED)
        if kind in STEPPED and not state["step"].is_floating_point():
            raise _wrong(state["step"], f"{place}/step", "a tensor of one floating-point number")
    if not fused or not isinstance(parameter, Tensor):
        return
    for key in SHAPED & set(state):
        item = state[key]
        if item is not None and (not isinstance(item, Tensor) or item.shape != parameter.shape):
            raise _wrong(item, f"{place}/{key}", f"a tensor of its parameter's shape {tuple(parameter.shape)}")


def _generators(value: Any, place: str) -> None:
    """Check what :func:`axontrain.randomness.capture` takes, down to where a generator would read outside of its words."""
    rng = _texts(value, place)
    _only(rng, place, "torch", "python", "numpy", "cuda")
    _twister(_of(rng, "torch", place), f"{place}/torch")
    python = _list(_of(rng, "python", place), f"{place}/python")
    if len(python) != 3 or not _is(python[0], 3) or not isinstance(python[2], (float, type(None))):
        raise _wrong(python, f"{place}/python", "a state of Python's generator: 3, its words, and a number or None")
    words = _tensor(python[1], f"{place}/python/1", torch.int64, WORDS + 1)
    try:
        random.Random().setstate((3, tuple(words.tolist()), python[2]))
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(words, f"{place}/python/1", f"the words of Python's generator ({error})") from error
    if "numpy" in rng:
        _numpy(rng["numpy"], f"{place}/numpy")
    for index, device in enumerate(_list(rng.get("cuda", []), f"{place}/cuda")):
        state = _tensor(device, f"{place}/cuda/{index}", torch.uint8, CUDA_BYTES)
        if int(state[8:].clone().view(torch.int64)) % 4:
            raise _wrong(state, f"{place}/cuda/{index}", "a state of CUDA's generator")


def _twister(value: Any, place: str) -> None:
    """Check the state of one of torch's generators on the CPU, which trusts it in which of its words is the next."""
    own = _tensor(value, place, torch.uint8, torch.get_rng_state().numel())
    left, following = (int(own[a:b].clone().view(dtype)) for a, b, dtype in ((8, 12, torch.int32), (16, 24, torch.int64)))
    try:
        torch.Generator().set_state(own.clone())
    except RuntimeError as error:
        raise _wrong(own, place, f"a state of torch's generator ({str(error).splitlines()[0]})") from error
    if not 0 <= following <= WORDS + 1 - left:
        raise _wrong(own, place, "a state of torch's generator")


def _numpy(value: Any, place: str) -> None:
    state = _only(value, place, "name", "keys", "position", "has_gauss", "gauss")
    if not _is(_of(state, "name", place), "MT19937"):
        raise _wrong(state["name"], f"{place}/name", "'MT19937'")
    keys = _tensor(_of(state, "keys", place), f"{place}/keys", torch.int64, WORDS)
    if int(keys.min()) < 0 or int(keys.max()) >= 2**32:
        raise _wrong(keys, f"{place}/keys", "words of 32 bits")
    for key, most in (("position", WORDS), ("has_gauss", 1)):
        if _count(_of(state, key, place), f"{place}/{key}") > most:
            raise _wrong(state[key], f"{place}/{key}", f"no more than {most}")
    _number(_of(state, "gauss", place), f"{place}/gauss")


def _meter(value: Any, place: str) -> None:
    meter = _only(value, place, "sums", "losses", "metrics", "example", "names", "tasks")
    for name, sums in _texts(_of(meter, "sums", place), f"{place}/sums").items():
        _sums(sums, f"{place}/sums/{name}")
    for index, entry in enumerate(_list(_of(meter, "losses", place), f"{place}/losses")):
        at = f"{place}/losses/{index}"
        _only(entry, at, "loss", "weight", "skipped", "values", "weights")
        for key in ("loss", "weight"):
            _scalar(_of(entry, key, at), f"{at}/{key}", tensor=key == "loss")
        if _of(entry, "skipped", at) is not None:
            _scalar(entry["skipped"], f"{at}/skipped", tensor=True)
        _scalars(_of(entry, "values", at), f"{at}/values")
        if entry.get("weights") is not None:
            _scalars(entry["weights"], f"{at}/weights")
    for name, tally in _texts(_of(meter, "metrics", place), f"{place}/metrics").items():
        _tally(tally, f"{place}/metrics/{name}")
    if meter.get("example") is not None:
        _example(meter["example"], f"{place}/example")
    _listed(meter.get("names", []), f"{place}/names")
    for task, of_task in _texts(meter.get("tasks", {}), f"{place}/tasks").items():
        _meter(of_task, f"{place}/tasks/{task}")


def _joined(value: Any, place: str) -> None:
    """Steps that wait, put together: each has rows of predictions, of targets, and of weights if there are any, and a flag."""
    joined = _only(value, place, "predictions", "targets", "skipped", "weights", "rows")
    kinds = ("predictions", "targets", "weights")
    tensors = [_of(joined, name, place) for name in kinds]
    flags = _of(joined, "skipped", place)
    if not isinstance(flags, Tensor) or flags.dim() != 1:
        raise _wrong(flags, f"{place}/skipped", "a tensor (steps,)")
    every = _list(_of(joined, "rows", place), f"{place}/rows")
    if len(every) != len(kinds):
        raise _wrong(every, f"{place}/rows", f"a list of each of {', '.join(kinds)}")
    for name, tensor, rows in zip(kinds, tensors, every, strict=True):
        if tensor is None and name == "weights":
            continue
        if not isinstance(tensor, Tensor) or not tensor.dim():
            raise _wrong(tensor, f"{place}/{name}", "a tensor (rows, ...)")
        for index, number in enumerate(_list(rows, f"{place}/rows")):
            _count(number, f"{place}/rows/{index}")
        if len(rows) != len(flags) or sum(rows) != len(tensor):
            raise _wrong(tensor, f"{place}/{name}", f"of {sum(rows)} rows, in {len(flags)} steps")


def _sums(value: Any, place: str) -> None:
    if not isinstance(value, Tensor) or value.shape != (2,) or not value.is_floating_point():
        raise _wrong(value, place, "a tensor of two numbers")


def _tally(value: Any, place: str) -> None:
    tally = _only(value, place, "states", "waiting", "updates")
    for name, state in _texts(_of(tally, "states", place), f"{place}/states").items():
        if not isinstance(state, Tensor):
            for index, item in enumerate(_list(state, f"{place}/states/{name}")):
                if not isinstance(item, Tensor):
                    raise _wrong(item, f"{place}/states/{name}/{index}", "a tensor")
    for index, entry in enumerate(_list(_of(tally, "waiting", place), f"{place}/waiting")):
        at = f"{place}/waiting/{index}"
        if isinstance(entry, Mapping):
            _joined(entry, at)
            continue
        if len(_list(entry, at)) != 4:
            raise _wrong(entry, at, "predictions, targets, a flag and weights")
        if entry[2] is not None:
            _scalar(entry[2], f"{at}/2", tensor=True)
        if not isinstance(entry[3], (Tensor, type(None))):
            raise _wrong(entry[3], f"{at}/3", "None, or a tensor")
    _count(_of(tally, "updates", place), f"{place}/updates")


def _example(value: Any, place: str) -> None:
    if len(_list(value, place)) != 2:
        raise _wrong(value, place, "shape and dtype of predictions and of targets")
    for index, of_one in enumerate(value):
        at = f"{place}/{index}"
        if len(_list(of_one, at)) != 2 or _text(of_one[1], f"{at}/1") not in EXAMPLES:
            raise _wrong(of_one, at, "a shape and a dtype")
        sizes = [_count(size, f"{at}/0/{axis}") for axis, size in enumerate(_list(of_one[0], f"{at}/0"))]
        every = math.prod(max(size, 1) for size in sizes)
        if not sizes or every >= MOST or every // max(sizes[0], 1) >= MOST_OF_ONE:
            raise _wrong(of_one[0], f"{at}/0", "the shape of a batch")


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, place, "a mapping")
    return value


def _texts(value: Any, place: str) -> Mapping[str, Any]:
    found = _mapping(value, place)
    for key in found:
        if not isinstance(key, str):
            raise _wrong(key, f"{place}'s key", "text")
    return found


def _only(value: Any, place: str, *known: str) -> Mapping[str, Any]:
    found = _texts(value, place)
    for key in found:
        if key not in known:
            raise CheckpointError(f"{_said(place)} has {quoted(key)}, which this axontrain does not know")
    return found


def _list(value: Any, place: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, place, "a list")
    return value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, place, "text")
    return value


def _listed(value: Any, place: str) -> None:
    """Check a list of text."""
    for index, name in enumerate(_list(value, place)):
        _text(name, f"{place}/{index}")


def _without_tensors(value: Any, place: str) -> None:
    if isinstance(value, Tensor):
        raise _wrong(value, place, "a plain value")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        _without_tensors(item, f"{place}/{key}")


def _of(value: Mapping[str, Any], key: str, place: str) -> Any:
    if key not in value:
        raise CheckpointError(f"{_said(place)} has no {key!r}")
    return value[key]


def _count(value: Any, place: str) -> int:
    if type(value) is not int or not 0 <= value < MOST:
        raise _wrong(value, place, "a whole number, 0 or more")
    return value


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(_float(value)):
        raise _wrong(value, place, "a finite number")
    return _float(value)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _scalar(value: Any, place: str, *, tensor: bool = False) -> None:
    """Check a number, which may be infinite, or a tensor of one."""
    number = not tensor and isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number and not (isinstance(value, Tensor) and value.numel() == 1):
        raise _wrong(value, place, "a tensor of one number" if tensor else "a number, or a tensor of one")
    if isinstance(value, int) and math.isinf(_float(value)):
        raise _wrong(value, place, "a number that fits a float")


def _is(value: Any, expected: int | str) -> bool:
    return type(value) is type(expected) and bool(value == expected)


def _scalars(value: Any, place: str) -> None:
    for name, item in _texts(value, place).items():
        _scalar(item, f"{place}/{name}")


def _tensor(value: Any, place: str, dtype: torch.dtype, size: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != (size,):
        raise _wrong(value, place, f"a tensor of {size}, {str(dtype).removeprefix('torch.')}")
    return value


def _wrong(value: Any, place: str, expected: str) -> CheckpointError:
    number = isinstance(value, (int, float)) and abs(value) < 1e30
    what = (
        kind_of(value) if isinstance(value, Tensor) else f"{type(value).__name__} {value}" if number else type(value).__name__
    )
    return CheckpointError(f"{_said(place)} is {what}; it should be {expected}")


def _said(place: str) -> str:
    return f"the saved state's {quoted(place, LONGEST)}" if place else "the saved state"
