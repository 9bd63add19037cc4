r"""Microbatches: a batch in parts that fit in memory, with the gradient of the whole.

With l_i the loss of part i, a mean over w_i items, the gradient of the batch is

.. math:: \sum_i w_i \nabla l_i / \sum_i w_i

whatever the sizes of the parts: ragged last ones and means over tokens too. The weights are those that the steps tell, so
their sum is known when the last part is through: until then gradients are of :math:`w_i l_i / c` with a c near that sum, and
are multiplied by :math:`c / \sum w_i` at the end. A part of weight zero adds nothing, be its loss 0/0.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from axontrain.data.structure import cut, joined, share_of, tensors
from axontrain.errors import ConfigurationError, DataError, LossError, kind_of, warn, whole
from axontrain.execution.beginning import Beginning, Changing
from axontrain.execution.precision import Precision, Scaler
from axontrain.execution.steps import OneLoss, SeveralLosses, check, let_go
from axontrain.host import placed, scalar
from axontrain.objective import Accumulated, Objective, Step, TaskBatch, batch_size
from axontrain.state import LoopState
from axontrain.update import Update

AUTO = "auto"
# Steps after which a size that was too large once is tried again; each time that it fails, twice as many.
TRY_AGAIN = 100
Parts = list[Any]


class Cut:
    """How batches are cut.

    Args:
        size: the most samples in a microbatch; None leaves batches whole but for those that come in parts already. Parts of a
            batch differ by one sample at most, so that none is left with a sample or two.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __call__(self, batch: Any) -> Parts:
        """The parts of a batch, in its order."""
        if isinstance(batch, Accumulated):
            return [part for one in batch.batches for part in self(one)]
        if isinstance(batch, TaskBatch):
            return [TaskBatch(batch.task, part) for part in self(batch.batch)]
        count = batch_size(batch)
        if self.size is None or count <= self.size:
            return [batch]
        if odd := [kind_of(leaf) for leaf in tensors(batch) if leaf.dim() and leaf.shape[0] != count]:
            raise DataError(
                f"microbatch={self.size} cuts the {count} samples of a batch along the first dimension, and it has a part "
                f"{odd[0]}: leave microbatch= out, or read small batches and make a step of n of them by fit(..., accumulate=n)"
            )
        parts = -(-count // self.size)
        return [cut(batch, *share_of(count, (index, parts)), count) for index in range(parts)]


class AutoCut(Cut):
    """Parts as large as memory allows: halved when it runs out, tried larger again later.

    It takes part in saving: a run that goes on cuts its batches as the one before would have.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.wait, self.since = TRY_AGAIN, 0
        self.smaller: int | None = None  # what is known to fit, while a larger size is tried

    def halve(self, batch: Any) -> bool:
        """Take half of what did not fit; False where that was a single sample."""
        largest = max(batch_size(part) for part in self(batch))
        if self.smaller is not None:
            self.size, self.smaller, self.wait = self.smaller, None, 2 * self.wait
            told = f"{largest} samples at once do not fit in memory yet; on with {self.size}"
        elif largest < 2:
            return False
        else:
            self.size = -(-largest // 2)
            told = f"{largest} samples at once do not fit in memory: on with microbatches of {self.size}"
        self.since = 0
        warn(f"microbatch='auto': {told}. Gradients are the same to rounding; the step is done again from its beginning")
        return True

    def fitted(self, batch: Any) -> None:
        """A step is through: count it, and try a larger size when it is time."""
        largest = max(map(batch_size, batch.batches)) if isinstance(batch, Accumulated) else batch_size(batch)
        if self.size is None or largest <= (self.smaller or self.size):  # which tells nothing of a larger size
            return
        if self.smaller is not None:
            whole = self.size >= largest
            warn(f"microbatch='auto': {'whole batches' if whole else f'microbatches of {self.size}'} fit in memory again")
            self.size, self.smaller = None if whole else self.size, None
        self.since += 1
        if self.since >= self.wait and self.size is not None:
            self.since, self.smaller, self.size = 0, self.size, 2 * self.size

    def state_dict(self) -> dict[str, Any]:
        """The size that was found, and when a larger one is tried."""
        return {"size": self.size, "wait": self.wait, "since": self.since, "smaller": self.smaller}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.size, self.smaller = state["size"], state["smaller"]
        self.wait, self.since = state["wait"], state["since"]


def cut_of(microbatch: int | str | None, accumulate: int | None) -> Cut | None:
    """How ``fit(microbatch=..., accumulate=...)`` cuts batches; None where it leaves them whole.

    Raises:
        ConfigurationError: if it is no number of samples, and not "auto".
    """
    if microbatch == AUTO:
        return AutoCut()
    if microbatch is not None:
        if isinstance(microbatch, str):
            raise ConfigurationError(f"microbatch={microbatch!r}: a number of samples, or 'auto'")
        return Cut(whole("microbatch", microbatch, what="of samples"))
    return None if accumulate is None else Cut(None)


def look_at(objective: nn.Module) -> None:
    """Warn of modules whose result depends on the other samples of a batch."""
    names = [name for name, module in objective.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn(
            f"{', '.join(names[:3])}{more} normalise over the samples that they see at once, which are those of a microbatch: "
            f"the result is not that of the whole batch. GroupNorm or LayerNorm know no batch; or leave microbatch= out"
        )


class OneLossInParts(OneLoss):
    """As :class:`OneLoss`, part by part."""

    def __init__(
        self,
        objective: Objective,
        state: LoopState,
        after_backward: Callable[[LoopState], None] | None,
        precision: Precision,
        cut: Cut,
        scaler: Scaler | None,
        keeps_predictions: bool,
    ) -> None:
        super().__init__(objective, state, after_backward, precision)
        self.cut, self.scaler, self.keeps_predictions = cut, scaler, keeps_predictions
        self.retry = Retry(objective, cut) if isinstance(cut, AutoCut) else None

    def __call__(self, batch: Any) -> Step:
        if self.buffers is not None:
            self.buffers.keep()
        step = self._accumulated(batch) if self.retry is None else self.retry(self._accumulated, batch)
        step = self.finished(step)
        if self.scaler is not None and self.updating:
            flags = [flag for one in self.state.optimizers.values() if (flag := one.not_finite) is not None]
            self.scaler.update(torch.stack(flags).amax() if flags else torch.zeros_like(self.scaler.scale))
        return step

    def _accumulated(self, batch: Any) -> Step:
        parts = self.cut(batch)
        sums = Sums([p for p in self.objective.parameters() if p.requires_grad], batch, len(parts), self.scaler)
        steps = []
        with sums.zeros_masked():
            for part in parts:
                step: Step = self.train_step(part)
                nothing = isinstance(step, Step) and not isinstance(step.weight, Tensor) and not step.weight
                # A part in which nothing counts needs no graph, unless it is the last of a batch in which nothing does.
                if not nothing or (sums.left == 1 and not sums.weight) or step.loss.requires_grad:
                    check(step, self.objective)
                sums.add(step.loss, step.weight)
                let_go(step)
                if not self.keeps_predictions:
                    step.predictions = step.targets = step.sample_weights = None
                steps.append((step, batch_size(part)))
        sums.finish()
        return merged(steps)


class SeveralLossesInParts(SeveralLosses):
    """As :class:`SeveralLosses`: the generators of all parts go on side by side, from one update to the next."""

    def __init__(
        self,
        objective: Objective,
        state: LoopState,
        after_backward: Callable[[LoopState], None] | None,
        precision: Precision,
        cut: Cut,
        scaler: Scaler | None,
        keeps_predictions: bool,
    ) -> None:
        super().__init__(objective, state, after_backward, precision)
        self.cut, self.scaler, self.keeps_predictions = cut, scaler, keeps_predictions
        self.overflowed: Tensor | None = None  # above 0 if an update of the step was not finite

    def __call__(self, batch: Any) -> Step:
        if self.buffers is not None:
            self.buffers.keep()
        parts, self.overflowed = self.cut(batch), None
        generators: list[Any] = [self.objective.train_step(part) for part in parts]
        weights = [self.objective.weight(part) for part in parts]
        losses: dict[str, list[Tensor]] = {}
        skipped: Tensor | None = None
        while True:
            found = self._next(generators[0])
            if isinstance(found, Ended):
                ends = [found.step, *(self._ended(generator, None) for generator in generators[1:])]
                break
            update, loss, terms = found
            sums = Sums([p for p in update.tensors if p.requires_grad], batch, len(parts), self.scaler)
            told = []
            with sums.zeros_masked():
                for index, weight in enumerate(weights):  # one after the other: each graph is gone before the next is made
                    if index:
                        found = self._next(generators[index])
                        if isinstance(found, Ended) or found[0] is not update:
                            raise self._apart(update.name, None if isinstance(found, Ended) else found[0].name)
                        _, loss, terms = found
                    sums.add(loss, weight, inputs=sums.parameters)
                    values = {name: value.detach() for name, value in terms.items()}
                    told.append((Step(loss.detach(), weight=weight, values=values), 1))
                    del found, loss, terms
            sums.finish()
            step = merged(told)
            if self.after_backward is not None:
                self.state.loss = step.loss
                self.after_backward(self.state)
            skipped = self.updated(update, step.loss, step.values, skipped)
            for name, value in {f"{update.name}_loss": step.loss, **step.values}.items():
                losses.setdefault(name, []).append(value)  # type: ignore[arg-type]  # merged values are tensors
        total = sum(weights[1:], weights[0])
        step = self.step_of(total, losses, self._returned(ends, parts))
        if self.scaler is not None and self.overflowed is not None:
            self.scaler.update(self.overflowed)
        return self.finished(step, skipped)

    def updated(self, update: Update, loss: Tensor, terms: Mapping[str, Any], skipped: Tensor | None) -> Tensor:
        """The same; and whether it was the scale that was too large."""
        skipped = super().updated(update, loss, terms, skipped)
        if (flag := update.not_finite) is not None:
            self.overflowed = flag if self.overflowed is None else torch.maximum(self.overflowed, flag)
        return skipped

    def _next(self, generator: Any) -> Any:
        try:
            return self.taken(self.next(generator))
        except StopIteration as stop:
            return Ended(stop.value)

    def _ended(self, generator: Any, name: str | None) -> Any:
        found = self._next(generator)
        if not isinstance(found, Ended):
            raise self._apart(name, found[0].name)
        return found.step

    def _apart(self, one: str | None, other: str | None) -> LossError:
        told = " and ".join("nothing" if name is None else repr(name) for name in (one, other))
        return LossError(
            f"{type(self.objective).__name__}.train_step yields for {told} at one point, by microbatch: each update needs the "
            f"losses of all of them"
        )

    def _returned(self, ends: Sequence[Any], parts: Parts) -> Any:
        if not all(isinstance(end, Step) for end in ends):
            return next((end for end in ends if not isinstance(end, Step)), None)
        for end in ends:
            let_go(end)
            if not self.keeps_predictions:
                end.predictions = end.targets = end.sample_weights = None
        return merged([(end, batch_size(part)) for end, part in zip(ends, parts, strict=True)])


class Ended:
    """A generator of a part is through, and returned a Step or None."""

    def __init__(self, step: Any) -> None:
        self.step = step


class Sums:
    """The gradients of one batch, gathered over its parts.

    Args:
        parameters: whose gradients.
        batch: the whole of it.
        count: of its parts.
        scaler: of losses, if there is one.
    """

    def __init__(self, parameters: list[Tensor], batch: Any, count: int, scaler: Scaler | None) -> None:
        self.parameters, self.count, self.scaler = parameters, count, scaler
        self.near: float | Tensor | None = None  # what the weights will about sum up to
        self.samples = max(1, batch_size(batch))
        self.weight: float | Tensor = 0
        self.left = count
        self._alive: Tensor | None = None

    def add(self, loss: Tensor, weight: float | Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        """Add the gradient of a part's loss, the mean over ``weight`` items."""
        self.left -= 1
        if isinstance(weight, Tensor):  # of the loss's own precision: whole numbers would be divided in float32
            weight = placed(weight.detach().reshape(()), loss.device).to(torch.promote_types(torch.float32, loss.dtype))
        self.weight = self.weight + weight
        if isinstance(weight, Tensor):
            if self.near is None:
                self.near = weight.clamp_min(1) * self.count
            self._alive = weight > 0
            scaled = torch.where(self._alive, loss.reshape(()) * (weight / self.near).to(loss.device), 0)
        elif weight or (not self.left and not isinstance(self.weight, Tensor) and not self.weight):
            if self.near is None:
                self.near = self.samples
            self._alive = None
            # All of the batch counts nothing: then its mean is 0/0, as it is of a batch in one part.
            scaled = loss * (weight / self.near if weight else float("nan"))
        else:
            return
        if self.scaler is not None:
            scaled = self.scaler.scaled(scaled)
        if inputs is not None and not inputs:  # all are frozen for now
            return
        scaled.backward(inputs=inputs)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Bring the gradients to the mean over the items of all parts."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale(gradients)
        if self.near is None or (not isinstance(self.near, Tensor) and self.near == self.weight):
            return
        factor = self.near / self.weight if isinstance(self.weight, Tensor) or self.weight else 1.0
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device) if isinstance(factor, Tensor) else factor)

    @contextmanager
    def zeros_masked(self) -> Iterator[None]:
        """Keep the gradients of parts of weight zero out, without a look at the weight: zero times NaN is NaN."""

        def mask(gradient: Tensor) -> Tensor:
            if self._alive is None:
                return gradient
            if gradient.is_sparse:
                values = torch.where(self._alive.to(gradient.device), gradient._values(), 0)
                return torch.sparse_coo_tensor(
                    gradient._indices(), values, gradient.shape, is_coalesced=gradient.is_coalesced(), check_invariants=False
                )
            return torch.where(self._alive.to(gradient.device), gradient, 0)

        handles: list[Any] = [parameter.register_hook(mask) for parameter in self.parameters]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def merged(steps: Sequence[tuple[Step, int]]) -> Step:
    """The step of the whole batch: means over all items, predictions put together; each comes with its number of samples."""
    first = steps[0][0]
    if len(steps) == 1:
        return first
    device = first.loss.device
    weights = torch.stack([scalar(step.weight, device).reshape(()).to(torch.float64) for step, _ in steps])
    whole = weights.sum()

    def mean(values: Mapping[int, Any]) -> Tensor:
        """Over the items of the parts, by number, that have a value."""
        stacked = torch.stack([scalar(value, device).detach().reshape(()) for value in values.values()])
        own, total = weights, whole
        if len(values) < len(steps):
            own = torch.stack([weights[index] for index in values])
            total = own.sum()
        of_all = torch.where(own > 0, stacked * own, 0.0).sum() / total
        return of_all.to(stacked.dtype if stacked.is_floating_point() else torch.float32)

    names = dict.fromkeys(name for step, _ in steps for name in step.values)
    values: Mapping[str, Tensor] = {
        name: mean({index: step.values[name] for index, (step, _) in enumerate(steps) if name in step.values}) for name in names
    }
    ints = all(not isinstance(step.weight, Tensor) for step, _ in steps)
    return Step(
        mean({index: step.loss for index, (step, _) in enumerate(steps)}),
        None if first.predictions is None else joined([(step.predictions, size) for step, size in steps]),
        None if first.targets is None else joined([(step.targets, size) for step, size in steps]),
        weight=sum(step.weight for step, _ in steps) if ints else whole,
        values=values,
        sample_weights=None if first.sample_weights is None else torch.cat([s.sample_weights for s, _ in steps]),  # type: ignore[misc]
    )


class Retry:
    """Does a step again in smaller parts when memory runs out, from where it began: generators, buffers, metrics, gradients."""

    def __init__(self, objective: Objective, cut: AutoCut) -> None:
        self.changing, self.cut = Changing(objective), cut

    def __call__(self, compute: Callable[[Any], Step], batch: Any) -> Step:
        while True:
            beginning = Beginning(self.changing)
            failure: Exception | None = None
            try:
                step = compute(batch)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # whose frames hold the tensors that are in the way
            if failure is None:
                self.cut.fitted(batch)
                return step
            beginning.put_back()
            if not self.cut.halve(batch):
                failure.add_note("microbatch='auto': a single sample does not fit in memory; the model is too large for it")
                raise failure
            failure = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of a device or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"))
