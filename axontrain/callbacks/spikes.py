"""SpikeGuard: updates whose loss leaps up are left out; and where they go on, the run goes back to before they began."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from axontrain.callback import Answer, GoBack, Looker
from axontrain.checkpoint import runs
from axontrain.errors import CheckpointError, ConfigurationError, warn, whole
from axontrain.host import Fetch, placed, travels
from axontrain.readings import Later, Reading, at_once
from axontrain.state import LoopState, Stop

RISE = 0.1  # no leap is smaller than this share of the mean
Found = tuple[int, Tensor]  # a step, and on the device: leapt, loss, mean, deviation, leaps in a row


class SpikeGuard(Looker):
    """Leave out updates whose loss leaps up, on the device and without waiting for it; go back if that does not help.

    A loss leaps if it is above the mean of those before it by ``deviations`` standard deviations, and by a tenth. Both are
    moving ones over ``window`` steps, in which a leap counts as the bound, so that a level that stays is usual in the end.

    With ``rollback``, so many leaps in a row are taken for damage that was done before them. The run then goes back to the
    newest good checkpoint from before, and does the same steps again, on the same batches, without the updates from ``margin``
    before the first leap to the last one (as Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, left out the batches).

    Args:
        deviations: above 0.
        window: in steps.
        warmup: steps before it judges; as many as ``window``, unless given.
        rollback: how many leaps in a row; None never goes back.
        margin: updates before the first leap to be left out too.
        most: so often it goes back at most; the next time it stops the fit.
        look: every so many steps it looks at what the device has found: to tell, and to go back. On a GPU it acts at the next
            look, when that has long arrived, or before a validation, an epoch's end, a save, or the fit's end.

    >>> SpikeGuard(deviations=5, rollback=10)
    SpikeGuard(deviations=5, window=200, rollback=10)

    Raises:
        ConfigurationError: for values that cannot work; with several losses a step; for ``rollback`` without a directory.
    """

    def __init__(
        self,
        *,
        deviations: float = 6.0,
        window: int = 200,
        warmup: int | None = None,
        rollback: int | None = None,
        margin: int = 0,
        most: int = 3,
        look: int = 50,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        if isinstance(deviations, (bool, str)) or not deviations > 0:
            raise ConfigurationError(f"deviations={deviations!r}: a number above 0")
        self.deviations = float(deviations)
        self.window = whole("window", window, what="of steps")
        self.warmup = self.window if warmup is None else whole("warmup", warmup, what="of steps")
        self.rollback = None if rollback is None else whole("rollback", rollback, what="of steps")
        self.margin = whole("margin", margin, least=0, what="of updates")
        self.most, self.look = whole("most", most, what="of times"), whole("look", look, what="of steps")
        self.left_out: list[list[int]] = []  # first and last of steps that are done without an update, counted from 0
        self.times = 0  # so often it went back
        self._usual: Tensor | None = None  # mean, variance, losses seen, leaps in a row
        self._found: list[Found] = []  # since the last look
        self._told = 0  # of those
        self._asked = 0  # of those: a look at so many has begun
        self._later: Later[list[tuple[int, list[float]]]] | None = None  # their numbers on the way
        self._step = -1

    def __repr__(self) -> str:
        back = "" if self.rollback is None else f", rollback={self.rollback}"
        return f"SpikeGuard(deviations={self.deviations:g}, window={self.window}{back})"

    def before_fit(self, state: LoopState) -> Answer:
        """Check that it can work."""
        if inspect.isgeneratorfunction(state.objective.train_step):
            raise ConfigurationError("SpikeGuard judges one loss a step, and this train_step yields several")
        if self.rollback is not None and state.directory is None:
            raise ConfigurationError("SpikeGuard(rollback=...) goes back to a checkpoint: Loop(..., directory=...) has them")
        self._step, self._later = -1, None
        return None

    @torch.no_grad()
    def after_backward(self, state: LoopState) -> Answer:
        """Judge the loss; a leap is left out."""
        if state.step == self._step or state.loss is None:  # the loss of this step is evaluated once more
            return None
        self._step = state.step
        dtype = torch.float32 if state.loss.device.type == "mps" else torch.float64
        loss = state.loss.detach().reshape(()).to(dtype)
        if self._usual is None:
            self._usual = torch.zeros(4, dtype=dtype, device=loss.device)
        mean, variance, seen, row = placed(self._usual, loss.device).unbind()
        finite = torch.isfinite(loss)
        deviation = variance.sqrt()
        bound = mean + torch.maximum(self.deviations * deviation, RISE * mean.abs())
        judged = finite & (seen >= self.warmup)
        leapt = judged & (loss > bound)
        taken = torch.where(leapt, bound, loss)
        share = (1 / (seen + 1)).clamp_min(1 / self.window)
        away = taken - mean
        following = torch.stack(
            [mean + share * away, (1 - share) * (variance + share * away * away), seen + 1, (row + 1) * leapt]
        )
        self._usual = torch.where(finite, following, torch.stack([mean, variance, seen, row]))
        if any(first <= state.step <= last for first, last in self.left_out):
            state.skip(torch.ones((), device=loss.device))
        else:
            state.skip(leapt)
            self._found.append((state.step, torch.stack([leapt.to(dtype), loss, mean, deviation, self._usual[3]])))
        return None

    def after_batch(self, state: LoopState) -> Answer:
        """Look at what was found, now and then: act by the look before, and begin the next."""
        if state.step % self.look:
            return None
        answer = self.settle(state)
        self._asked = len(self._found)
        if not self._found:
            return answer
        self._later = self._begun()
        # Not whether it has arrived: what is decided at a step would hang on how fast the device was.
        return answer if travels(self._found[-1][1].device) else self.settle(state) or answer

    def after_fit(self, state: LoopState) -> Answer:
        """Tell of the rest; what it comes to is for the next look, if the run goes on."""
        self._later = None
        self._tell(at_once(_values(self._found)))
        return None

    def state_dict(self) -> dict[str, Any]:
        """What is usual, which updates are left out, and what was not looked at yet."""
        found = {"steps": [step for step, _ in self._found], "told": self._told, "asked": self._asked}
        values = _together(self._found) if self._found else None
        left_out = [list(steps) for steps in self.left_out]
        return {"usual": self._usual, "left_out": left_out, "times": self.times, "found": found, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        count = len(state["found"]["steps"])
        for name in ("told", "asked"):
            number = state["found"].get(name, 0)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= count:
                raise CheckpointError(f"SpikeGuard: {name}={number!r} of {count} steps that it has not looked at yet")
        self._usual, self.times, self._told = state["usual"], state["times"], state["found"]["told"]
        values = [] if state["values"] is None else state["values"].unbind()
        self._found = list(zip(state["found"]["steps"], values, strict=True))
        self._asked, self._later = state["found"].get("asked", 0), None
        self.left_out = [[int(first), int(last)] for first, last in state["left_out"]]

    def _begun(self) -> Later[list[tuple[int, list[float]]]]:
        return Later(_values(self._found[: self._asked]))  # those of now, while others come

    def _tell(self, found: list[tuple[int, list[float]]]) -> None:
        found, self._told = found[self._told :], len(found)
        leaps = [
            f"step {step + 1}: {loss:.4g}, where {m:.4g} ± {d:.2g} is usual" for step, (leapt, loss, m, d, _) in found if leapt
        ]
        if leaps:
            more = f"; and {len(leaps) - 3} more" if len(leaps) > 3 else ""
            warn(f"SpikeGuard left out {len(leaps)} update{'s' if len(leaps) > 1 else ''}: {'; '.join(leaps[:3])}{more}")

    def settle(self, state: LoopState) -> Answer:
        """Act by a look that has begun; waits for it."""
        if not self._asked:
            return None
        later, self._later = self._later or self._begun(), None
        found = later.result()
        told = self._told
        self._tell(found)
        self._found, self._told, self._asked = self._found[len(found) :], max(0, told - len(found)), 0
        if self.rollback is None:
            return None
        rows = [(step, int(row)) for step, (*_, row) in found if row >= self.rollback]
        if not rows:
            return None
        last, row = rows[-1]
        first = max(0, last - row + 1 - self.margin)
        if self.times >= self.most:
            return Stop(
                f"the loss leaps from step {first + 1} to {last + 1}, and SpikeGuard went back {self.times} times before"
            )
        path = self._checkpoint(state, first)
        if path is None:
            warn(
                f"SpikeGuard: there is no checkpoint from before step {first + 1} to go back to; training goes on without those"
            )
            return None
        steps, times = [*self.left_out, [first, last]], self.times + 1

        def then() -> None:
            self.left_out, self.times = steps, times

        warn(f"SpikeGuard goes back to {path}, and leaves out the updates of steps {first + 1} to {last + 1}")
        raise GoBack(path, then)

    @staticmethod
    def _checkpoint(state: LoopState, before: int) -> Any:
        assert state.directory is not None  # or it was refused
        begun = 0 if state.plan is None else state.plan.start_step  # at which the state is still of the fit before
        there = [one for one in runs.entries(state.directory) if one.step <= before and (one.step > begun or not begun)]
        return next((entry.path for entry in reversed(there) if runs.verified(entry)), None)


def _together(found: list[Found]) -> Tensor:
    device = found[-1][1].device  # those that came from a file are on the CPU
    return torch.stack([placed(values, device) for _, values in found])


def _values(found: list[Found]) -> Reading[list[tuple[int, list[float]]]]:
    """What was found, by step, as numbers."""
    fetch = Fetch([_together(found) if found else []])
    yield [fetch]
    return [(step, of_step) for (step, _), of_step in zip(found, fetch.values()[0], strict=True)]
