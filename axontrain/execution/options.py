"""Options: those of the optimizers, and what these keep, as a recorded step has it; and rates, which may be others each time.

A rate that a schedule sets is recorded as a tensor, which kernels read; all else is recorded as the number that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axontrain.execution.contents import PLAIN
from axontrain.execution.wording import shown
from axontrain.guard import hooks_of
from axontrain.update import Update

OF_SPECS = ("clip_norm", "clip_value", "on_nonfinite")


class Group(NamedTuple):
    """A group of parameters of an optimizer, as it is recorded."""

    optimizer: torch.optim.Optimizer
    number: int
    group: dict[str, Any]
    held: tuple[int, ...]  # the parameters, by id
    names: list[str]  # of options
    look: Any
    expected: tuple[Any, ...]


class Options:
    """What the optimizers of a recording take for given, and the rates that they are given.

    Args:
        updates: whose optimizers.
        whole: whether their steps are recorded; else only what comes before, the look at gradients and clipping.
    """

    def __init__(self, updates: Sequence[Update], *, whole: bool) -> None:
        self._every, self._updates = updates, updates if whole else ()
        self._kept = [one for update in self._updates for one in update.keeps()]  # held on to, as the recording writes there
        optimizers = [optimizer for update in self._updates for optimizer in update.optimizers]
        self._counts = [(optimizer, len(optimizer.param_groups)) for optimizer in optimizers]
        self._hooks = [(optimizer, hooks) for optimizer in optimizers for hooks in hooks_of(optimizer)]
        self._specs = [(update.spec, [getattr(update.spec, name) for name in OF_SPECS]) for update in updates]
        self._groups: list[Group] = []
        self._rates: list[tuple[dict[str, Any], Tensor]] = []
        for update in self._updates:
            for optimizer in update.optimizers:
                for number, group in enumerate(optimizer.param_groups):
                    self._take(update, optimizer, number, group)
        self._set = [float(group["lr"]) for group, _ in self._rates]

    def _take(self, update: Update, optimizer: torch.optim.Optimizer, number: int, group: dict[str, Any]) -> None:
        moving = ("params", "lr", "initial_lr") if update.scheduled else ("params",)
        names = [name for name in group if name not in moving]
        look, held = itemgetter(*names), tuple(map(id, group["params"]))
        self._groups.append(Group(optimizer, number, group, held, names, look, look(group)))
        if update.scheduled:
            # In what kernels take it in: float32 from the memory of a GPU, double on a CPU.
            dtype = torch.float32 if update.single else torch.float64
            self._rates.append((group, torch.full((), group["lr"], dtype=dtype, device=group["params"][0].device)))

    def hold(self) -> bool:
        """Whether all but the rates is as it was."""
        for spec, (norm, value, raises) in self._specs:
            if spec.clip_norm != norm or spec.clip_value != value or spec.on_nonfinite != raises:
                return False
        for optimizer, count in self._counts:
            if optimizer.param_groups[count:] or not optimizer.param_groups[count - 1 :]:
                return False
        for optimizer, number, group, held, _, look, expected in self._groups:
            # torch puts new groups in place of the old when it loads a state, and new state.
            groups = optimizer.param_groups
            if groups[number] is not group or look(group) != expected or tuple(map(id, group["params"])) != held:
                return False
        for _, hooks in self._hooks:
            if hooks:
                return False
        return self._still()

    def set(self) -> None:
        """Have the recording use the rates of now, once those of schedules are."""
        for update in self._every:
            update.ready()
        for index, (group, rate) in enumerate(self._rates):
            now = group["lr"]
            if now != self._set[index]:
                rate.fill_(now)
                self._set[index] = now

    def _still(self) -> bool:
        """Whether what the optimizers keep is where it was."""
        kept = [one for update in self._updates for one in update.keeps()]
        return len(kept) == len(self._kept) and all(map(is_, kept, self._kept))

    def broken(self) -> str:
        """Which option is another now, in words; "" if none is."""
        for spec, values in self._specs:
            for name, before in zip(OF_SPECS, values, strict=True):
                if (now := getattr(spec, name)) != before:
                    return f"the optimizer's {name} was {before}, and is {now}"
        if any(len(optimizer.param_groups) != count for optimizer, count in self._counts):
            return "the optimizer has more groups than it had, or fewer"
        for one in self._groups:
            if one.optimizer.param_groups[one.number] is not one.group:
                return "the optimizer's state was loaded anew"
            if tuple(map(id, one.group["params"])) != one.held:
                return f"the optimizer's group {one.number} is of other parameters"
            for name, before in zip(one.names, one.expected, strict=True):
                if one.group[name] != before:
                    return f"the optimizer's {name} was {shown(before)}, and is {shown(one.group[name])}"
        for optimizer, hooks in self._hooks:
            if hooks:
                return f"{type(optimizer).__name__} has hooks on its steps"
        return "" if self._still() else "what the optimizer keeps was replaced"

    def __enter__(self) -> None:
        """Put tensors in place of the rates, while a step is recorded."""
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        for group, rate in self._rates:
            self._before.append((group, "lr", group["lr"]))
            group["lr"] = rate
        for group in (one.group for one in self._groups):
            if "capturable" in group:  # what torch asks for, of fused ones too
                self._before.append((group, "capturable", group["capturable"]))
                group["capturable"] = True

    def __exit__(self, *raised: object) -> None:
        """Put the rates back."""
        for group, name, value in self._before:
            group[name] = value


def why_apart(updates: Sequence[Update]) -> str:
    """Why the steps of the optimizers cannot be recorded with the rest; "" if they can."""
    for update in updates:
        if why := update.read_by():
            return why
        for optimizer in update.optimizers:
            name = type(optimizer).__name__
            if update.scheduled and not all(group.get("fused") for group in optimizer.param_groups):
                return f"a schedule sets the learning rate of {name}, which takes it from the host"
            for group in optimizer.param_groups:
                if not all(_is_plain(value) for key, value in group.items() if key != "params"):
                    return f"an option of {name} is a tensor"
    return ""


def _is_plain(value: Any) -> bool:
    """Whether a value means nothing beside what it is equal to."""
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))
