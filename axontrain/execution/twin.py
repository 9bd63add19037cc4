"""A twin: a copy of an objective and its optimizer on which a step is tried in eager, to hold a compiled step against.

torch's compiler can be wrong without a word (its CPU code has dropped the ``alpha`` of ``torch.add(p, a @ b, alpha=c)``).
What is compared are the loss, the predictions, the change of each parameter and of each buffer, and what the optimizer keeps.
How far two right answers may lie apart is found out, not assumed: a second twin, whose weights are nudged by a rounding
error, does the same step. Adam divides a gradient by its own size, so that one which is nothing but rounding (of a bias
before a BatchNorm) moves its parameter by a whole learning rate all the same: updates are compared where the averages of
gradients that it keeps agree.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from axontrain import randomness
from axontrain.data.structure import tensors
from axontrain.execution.beginning import Before
from axontrain.execution.compilation import EFFECT
from axontrain.execution.copying import copied, shared, untouched
from axontrain.execution.functional import PREFIX, Forward, differentiated
from axontrain.execution.microbatches import out_of_memory
from axontrain.execution.precision import Precision
from axontrain.execution.steps import check
from axontrain.objective import Objective, Step
from axontrain.update import Update

COMPARED = 3  # so many steps of what is compiled are held against eager before it is trusted
# A rounding error or two of what is computed in, and by how much two right answers may differ beside what a nudge changes.
NUDGE = {"fp64": 2.0**-50, "fp32": 2.0**-22, "tf32": 2.0**-10, "fp16": 2.0**-9, "fp8": 2.0**-4}
RELATIVE = {"fp64": 1e-6, "fp32": 1e-3, "tf32": 2e-2, "fp16": 3e-2, "fp8": 2e-1}
FAINT = 64.0  # times a rounding error of all gradients together: one that is smaller is nothing but rounding
SURE = 0.1  # of a gradient that is known so well, relatively, an update by its sign is, too
UNSEEN = (
    "it goes by something that is found neither in the objective nor by the names in its code, as a cache of a method or an "
    "attribute of a library, and trials have moved that on; keep it in the objective, as a buffer"
)
TIMES = 16.0  # what a nudge changes, at most so many times


@dataclass(slots=True)
class Outcome:
    """What a step gave, by name: the loss, predictions, and by how much parameters and buffers have changed."""

    found: dict[str, Tensor]
    trained: list[str] = field(default_factory=list)  # the parameters that had a gradient
    changing: list[str] = field(default_factory=list)  # the buffers that have changed
    draws: bool = False  # whether it has drawn random numbers
    leaves: list[str] = field(default_factory=list)  # what it has changed around the objective


class Twin:
    """A copy to try steps on. The originals, and the random generators, stay as they are.

    Args:
        objective: what is trained, between two steps.
        update: its optimizer; None to go no further than the gradients.
        precision: what it computes in.
        nudged: whether weights are off by a rounding error.
    """

    def __init__(self, objective: Objective, update: Update | None, precision: Precision, *, nudged: bool = False) -> None:
        self.objective, self.precision = copied(objective), precision
        self.update: Update | None = None
        named = dict(self.objective.named_parameters(remove_duplicate=False))
        for p in named.values():
            p.grad = None
        if update is not None:
            spec = copy.copy(update.spec)
            spec.schedule = spec.average = None  # the rate of now is in the state
            spec.on_nonfinite, spec.patience = "skip", 2**62
            self.update = Update(update.name, spec, {name: named[name] for name in update.parameters}, self.objective)
            self.update.load_state_dict({**update.state_dict(), "schedulers": [], "unscaled": [], "average": None})
        if nudged:
            self._nudge()

    def _nudge(self) -> None:
        size = NUDGE.get(self.precision.name, 2.0**-8)
        with randomness.kept(), torch.no_grad():
            for p in self.objective.parameters():
                if p.is_floating_point():
                    p.mul_(1 + size * torch.empty_like(p).uniform_(-1, 1).sign())

    def step(self, batch: Any, *, functional: bool = False) -> Outcome:
        """Do a step in eager; ``functional`` has torch.func differentiate it, as it does in a graph of the whole step."""
        objective, batch = self.objective, copy.deepcopy(batch)
        before = {name: p.detach().clone() for name, p in objective.named_parameters()}
        buffers = {name: (b, b._version, b.detach().clone()) for name, b in objective.named_buffers()}
        with randomness.kept():
            before_it = randomness.snapshot()
            step = self._functional(batch) if functional else self._plain(batch)
            draws = not randomness.drawn(before_it, randomness.snapshot()).isdisjoint(("torch", "cuda"))
        trained = [name for name, p in objective.named_parameters() if p.grad is not None]
        outcome = Outcome(_of_step(step), trained, draws=draws)
        for name, now in objective.named_buffers():
            was = buffers.get(name)
            if was is None or now is not was[0] or now._version != was[1] or not torch.equal(now, was[2]):
                outcome.changing.append(name)
                if was is not None:
                    outcome.found[f"the buffer {name}"] = _change(now, was[2])
        if self.update is None:
            outcome.found |= {
                f"the gradient of {name}": p.grad for name, p in objective.named_parameters() if p.grad is not None
            }
            return outcome
        if float(self.update.update(step.loss.detach(), step.values)):  # skipped: buffers are put back
            changed = [f"the buffer {name}" for name in outcome.changing]
            outcome.found |= {name: torch.zeros_like(outcome.found[name]) for name in changed if name in outcome.found}
        outcome.found |= {f"the update of {name}": _change(p, before[name]) for name, p in objective.named_parameters()}
        outcome.found |= _states(self.update)
        return outcome

    def _plain(self, batch: Any) -> Step:
        step: Any = self.precision.within(self.objective.train_step)(batch)
        check(step, self.objective)
        step.loss.backward()
        return step  # type: ignore[no-any-return]

    def _functional(self, batch: Any) -> Step:
        named = {PREFIX + name: p.detach() for name, p in self.objective.named_parameters() if p.requires_grad}
        buffers = {PREFIX + name: buffer for name, buffer in self.objective.named_buffers()}
        gradients, loss, parts, after = differentiated(Forward(self.objective, self.precision), named, buffers, batch)
        predictions, targets, weight, values, sample_weights = parts
        for name, p in self.objective.named_parameters():
            p.grad = gradients.get(PREFIX + name)
        for name, buffer in buffers.items():
            buffer.copy_(after[name])
        return Step(loss, predictions, targets, weight, values, sample_weights=sample_weights)


def in_eager(
    objective: Objective, update: Update | None, precision: Precision, batch: Any, *, functional: bool = False
) -> tuple[Outcome, Outcome]:
    """A step on copies, and the same with weights that are off by a rounding error; all is as it was afterwards.

    Args:
        objective: what is trained, between two steps.
        update: its optimizer; None to go no further than the gradients.
        precision: what it computes in.
        batch: of which the step is.
        functional: whether torch.func is to differentiate it.

    Raises:
        Exception: of what cannot be copied, or of the step; ValueError of one that is another each time.
    """
    with untouched(objective) as around:
        twin = Twin(objective, update, precision)
        if taken := shared(around, twin.objective):
            raise ValueError(taken[0])
        expected = twin.step(batch, functional=functional)
        del twin  # there may not be the memory for two
        expected.leaves = [what for what, _ in around.changed()]
        around.put_back()
        again = Twin(objective, update, precision).step(batch, functional=functional)
        around.put_back()
        if told := _unlike(again, expected, precision):
            raise ValueError(f"{told}, done twice from one beginning: {UNSEEN}")
        nudged = Twin(objective, update, precision, nudged=True).step(batch, functional=functional)
    if around.left:
        raise ValueError(around.left)
    return expected, nudged


def _unlike(again: Outcome, expected: Outcome, precision: Precision) -> str:
    """What is another in the same step, by more than rounding."""
    a, b = (float(torch.nan_to_num(one.found["the loss"])) for one in (again, expected))
    if abs(a - b) > RELATIVE.get(precision.name, 5e-2) / 100 * abs(b):  # kernels may sum in any order, on a CPU too
        return f"the loss is {a:.7g}, and was {b:.7g}"
    return next(iter(differences(again, expected, expected, {}, precision)), "")


def unmoved(expected: Outcome, before: Before) -> list[str]:
    """What eager changes around the objective, and a compiled step has left as it was before, in words."""
    changed = {what for what, _ in before.around.changed()} if expected.leaves else set()
    if before.around.surroundings.contents.names("is_compiling"):  # who asks for that wants it so
        return []
    return [f"{what} {EFFECT}" for what in expected.leaves if what not in changed]


def untried_for(error: Exception) -> str:
    """Why a compiled step cannot be held against eager, and is not to be trusted."""
    if out_of_memory(error):
        return "there is not the memory to hold what is compiled against eager, on a copy"
    told = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return f"what is compiled cannot be held against eager, on a copy of the objective and its optimizer: {told}"


def of_step(step: Step, objective: Objective, before: Mapping[str, Tensor], update: Update | None = None) -> Outcome:
    """The outcome of a step that was done on the objective itself, of which ``before`` has parameters and buffers."""
    found = _of_step(step)
    buffers, parameters = objective.named_buffers(), objective.named_parameters()
    found |= {f"the buffer {name}": _change(now, before[name]) for name, now in buffers if name in before}
    found |= {f"the update of {name}": _change(p, before[name]) for name, p in parameters if name in before}
    return Outcome(found | ({} if update is None else _states(update)))


def differences(
    found: Outcome, expected: Outcome, nudged: Outcome, sizes: Mapping[str, float], precision: Precision
) -> list[str]:
    """What differs by more than rounding, in words.

    Args:
        found: of the compiled step.
        expected: of the same step in eager.
        nudged: of that with weights that are off by a rounding error.
        sizes: norms of what was changed, by the names of the outcome: a change is not known better than that is rounded.
        precision: what it was computed in.
    """
    relative, nudge = RELATIVE.get(precision.name, 5e-2), NUDGE.get(precision.name, 2.0**-8)
    floors = _floors(expected, FAINT * nudge)
    told = []
    told += [
        f"{name}, which eager has not" for name in found.found if name.startswith("the grad") and name not in expected.found
    ]
    for name, right in expected.found.items():
        one, other = found.found.get(name), nudged.found.get(name)
        if one is None or one.shape != right.shape:
            told.append(f"{name} is {'missing' if one is None else tuple(one.shape)}, in eager {tuple(right.shape)}")
            continue
        a, b = _plain(one), _plain(right)
        c = b if other is None or other.shape != right.shape else _plain(other)
        average = name.replace("the update of", "the state exp_avg of")
        if average != name and average in expected.found and average in found.found:
            mine, its = _plain(found.found[average]), _plain(expected.found[average])
            sure = ((mine - its).abs() <= SURE * its.abs()) & (its.abs() > floors["the state exp_avg"])
            a, b, c = a[sure], b[sure], c[sure]
        gap, size = _norm(a - b), _norm(b)
        eps = torch.finfo(right.dtype).eps if right.dtype.is_floating_point else 0.0
        floor = floors.get(name.partition(" of ")[0], 0.0)
        allowed = TIMES * _norm(c - b) + max(relative, 4 * eps) * size + 8 * eps * sizes.get(name, 0.0) + floor + 1e-30
        if not gap <= allowed:
            told.append(f"{name} by {gap:.3g}, where it is {size:.3g} in eager")
    return told


def _floors(expected: Outcome, faint: float) -> dict[str, float]:
    """Below which norm a gradient, or what is made of it, is nothing but rounding, beside those of all parameters together."""
    squares: dict[str, float] = {}
    for name, value in expected.found.items():
        kind, of, _ = name.partition(" of ")
        if of:
            squares[kind] = squares.get(kind, 0.0) + _norm(_plain(value)) ** 2
    return {kind: (faint**2 if "_sq" in kind else faint) * total**0.5 for kind, total in squares.items()}


def _states(update: Update) -> dict[str, Tensor]:
    """What optimizers keep of each parameter."""
    names = {id(p): name for name, p in update.parameters.items()}
    kept = (
        (names.get(id(p)), key, value)
        for one in update.optimizers
        for p, of_p in one.state.items()
        for key, value in of_p.items()
    )
    return {
        f"the state {key} of {name}": value.detach().clone() for name, key, value in kept if name and isinstance(value, Tensor)
    }


def _of_step(step: Step) -> dict[str, Tensor]:
    found = {"the loss": step.loss.detach().reshape(())}
    found |= {f"the value {name!r}": torch.as_tensor(v).detach() for name, v in step.values.items()}
    for number, tensor in enumerate(tensors(step.predictions)):
        found[f"the predictions{f' ({number})' if number else ''}"] = tensor.detach().clone()
    found["the weight"] = torch.as_tensor(step.weight).detach()
    return found


def _change(now: Tensor, before: Tensor) -> Tensor:
    now = now.detach()
    if now.shape != before.shape or now.dtype != before.dtype:
        return now.clone()
    return now.to(torch.int64) - before.to(torch.int64) if not (now.is_floating_point() or now.is_complex()) else now - before


def _plain(tensor: Tensor) -> Tensor:
    """In float64, with numbers in place of what is none: what is not finite is to be so in both."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    wide = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return torch.nan_to_num(wide.double(), nan=1e30, posinf=2e30, neginf=-2e30)


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm())


def sizes(objective: Objective) -> dict[str, float]:
    """The norms of parameters and buffers, by the names of an outcome."""
    named: Iterable[tuple[str, Tensor]] = objective.named_parameters()
    found = {f"the update of {name}": float(p.detach().float().norm()) for name, p in named}
    return found | {
        f"the buffer {name}": float(b.float().norm()) for name, b in objective.named_buffers() if b.is_floating_point()
    }
