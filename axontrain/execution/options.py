"""Options: those of the optimizers, and what these keep, as a recorded step has it; and rates, which may be others each time.

A rate that a schedule sets is recorded as a tensor, which kernels read; all else is recorded as the number that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from axontrain.execution.assumptions import is_plain, shown
from axontrain.guard import hooks_of
from axontrain.update import Update


class Options:
    """What the optimizers of a recording take for given, and the rates that they are given.

    Args:
        updates: whose optimizers.
        whole: whether their steps are recorded; else only what comes before, the look at gradients and clipping.
    """

    def __init__(self, updates: Sequence[Update], *, whole: bool) -> None:
        self._updates = updates if whole else ()
        self._kept = [one for update in self._updates for one in update.keeps()]  # held on to, as the recording writes there
        optimizers = [optimizer for update in self._updates for optimizer in update.optimizers]
        self._hooks = [(optimizer, hooks) for optimizer in optimizers for hooks in hooks_of(optimizer)]
        self._clips = [(update.spec, update.spec.clip_norm, update.spec.clip_value) for update in updates]
        self._groups: list[tuple[torch.optim.Optimizer, int, dict[str, Any], list[str], Any, tuple[Any, ...]]] = []
        self._rates: list[tuple[dict[str, Any], Tensor]] = []
        for update in self._updates:
            for optimizer in update.optimizers:
                for number, group in enumerate(optimizer.param_groups):
                    self._take(update, optimizer, number, group)
        self._set = [float(group["lr"]) for group, _ in self._rates]

    def _take(self, update: Update, optimizer: torch.optim.Optimizer, number: int, group: dict[str, Any]) -> None:
        moving = ("params", "lr", "initial_lr") if update.scheduled else ("params",)
        names = [name for name in group if name not in moving]
        look = itemgetter(*names)
        self._groups.append((optimizer, number, group, names, look, look(group)))
        if update.scheduled:
            # In what kernels take it in: float32 from the memory of a GPU, double on a CPU.
            dtype = torch.float32 if update.single else torch.float64
            self._rates.append((group, torch.full((), group["lr"], dtype=dtype, device=group["params"][0].device)))

    def set(self) -> bool:
        """Have the recording use the rates of now; False if an option is another than when it was made."""
        for spec, norm, value in self._clips:
            if spec.clip_norm != norm or spec.clip_value != value:
                return False
        for optimizer, number, group, _, look, expected in self._groups:
            # torch puts new groups in place of the old when it loads a state, and new state.
            if optimizer.param_groups[number] is not group or look(group) != expected:
                return False
        for _, hooks in self._hooks:
            if hooks:
                return False
        if not self._still():
            return False
        for index, (group, rate) in enumerate(self._rates):
            now = group["lr"]
            if now != self._set[index]:
                rate.fill_(now)
                self._set[index] = now
        return True

    def _still(self) -> bool:
        """Whether what the optimizers keep is where it was."""
        kept = [one for update in self._updates for one in update.keeps()]
        return len(kept) == len(self._kept) and all(map(is_, kept, self._kept))

    def broken(self) -> str:
        """Which option is another now, in words; "" if none is."""
        for spec, norm, value in self._clips:
            for name, now, before in (("clip_norm", spec.clip_norm, norm), ("clip_value", spec.clip_value, value)):
                if now != before:
                    return f"the optimizer's {name} was {before}, and is {now}"
        for optimizer, number, group, names, _, expected in self._groups:
            if optimizer.param_groups[number] is not group:
                return "the optimizer's state was loaded anew"
            for name, before in zip(names, expected, strict=True):
                if group[name] != before:
                    return f"the optimizer's {name} was {shown(before)}, and is {shown(group[name])}"
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
        for _, _, group, *_ in self._groups:
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
                if not all(is_plain(value) for key, value in group.items() if key != "params"):
                    return f"an option of {name} is a tensor"
    return ""
