"""Objective: a model and a measure of how wrong it is.

It is a plain ``nn.Module``. It does not know the loop that trains it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axontrain.errors import ConfigurationError, LossError, ObjectiveError, SplitError, kind_of, unknown


@dataclass(slots=True)
class Step:
    """What one step gave.

    Args:
        loss: scalar, the mean over ``weight`` items; the engine runs ``backward`` on it and keeps it detached.
        predictions: what metrics compare with ``targets``; None where there is nothing to compare.
        targets: see ``predictions``.
        weight: how many items ``loss`` is the mean of: an int, or a scalar tensor where only the device knows.
        values: further named scalars to record, weighted in the same way.
        skipped: set by the engine: a scalar tensor, above 0 if the update was skipped as not finite.
        sample_weights: how much each sample counts in the metrics: a tensor (B,), or (B, T) as the targets are; None counts
            all alike. 0 leaves a sample out.
    """

    loss: Tensor
    predictions: Any = None
    targets: Any = None
    weight: int | Tensor = 1
    values: Mapping[str, Tensor | float] = field(default_factory=dict)
    skipped: Tensor | None = None
    sample_weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """A batch of a :class:`~axontrain.data.Mixture`: the name of its task, and the batch itself.

    It is indexed and unpacked as the batch within is, so that an objective need not know of it:

    >>> batch = TaskBatch("digits", ("images", "labels"))
    >>> images, labels = batch
    >>> batch.task, labels, batch[0]
    ('digits', 'labels', 'images')
    """

    task: str
    batch: Any

    def __getitem__(self, key: Any) -> Any:
        return self.batch[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True, slots=True)
class Accumulated:
    """Small batches that make one step together: what ``fit(..., accumulate=n)`` trains on.

    >>> batch_size(Accumulated((torch.zeros(3, 2), torch.zeros(2, 2))))
    5
    """

    batches: tuple[Any, ...]


class Objective(nn.Module):
    """What is trained: write ``predict`` and ``loss``; override the rest where the shape does not fit.

    ``metrics`` names the criteria it is judged by (see :func:`axontrain.metrics.register`).

    Samples that do not count alike have weights: ``split`` gives them as a third value, and ``loss`` takes them as a third
    argument and returns the weighted mean, sum w_i l_i / sum w_i. The metrics and the means over steps go by them too.

    >>> import torch
    >>> class Line(Objective):
    ...     metrics = ["mae"]
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(3, 1)
    ...
    ...     def predict(self, inputs):  # (B, 3) -> (B,)
    ...         return self.linear(inputs).squeeze(-1)
    ...
    ...     def loss(self, predictions, targets):
    ...         return F.mse_loss(predictions, targets)
    >>> step = Line().train_step((torch.zeros(4, 3), torch.zeros(4)))
    >>> step.predictions.shape, step.weight
    (torch.Size([4]), 4)

    >>> class Weighted(Line):
    ...     def split(self, batch):
    ...         return batch["x"], batch["y"], batch["w"]
    ...
    ...     def loss(self, predictions, targets, weights):
    ...         return (weights * (predictions - targets).square()).sum() / weights.sum()
    >>> Weighted().train_step({"x": torch.zeros(2, 3), "y": torch.zeros(2), "w": torch.tensor([1.0, 0.5])}).weight
    tensor(1.5000)
    """

    metrics: Any = ()
    _weighs = False  # whether a batch without weights is an error

    def predict(self, inputs: Any) -> Any:
        """Map a batch of inputs to predictions: ``(B, ...) -> (B, ...)`` in most objectives."""
        hint = "; rename its forward to predict" if type(self).forward is not Objective.forward else ""
        raise ObjectiveError(f"{type(self).__name__}.predict is not written: def predict(self, inputs): ...{hint}")

    def loss(self, predictions: Any, targets: Any) -> Tensor | Mapping[str, Tensor]:
        """Say how wrong predictions are: a scalar, the mean over the batch, or a mapping of terms to be summed.

        Where ``split`` gives weights they are the third argument, ``loss(self, predictions, targets, weights)``, and the mean
        is the weighted one. If all weights of a batch may be 0, guard the division.
        """
        raise ObjectiveError(f"{type(self).__name__}.loss is not written: def loss(self, predictions, targets): ...")

    def split(self, batch: Any) -> tuple[Any, Any] | tuple[Any, Any, Tensor | None]:
        """Take a batch apart into ``(inputs, targets)``, or ``(inputs, targets, weights)``.

        A pair (a tuple or a list of two) is taken as it is; anything else, a mapping too, is both. Weights are a tensor (B,)
        of numbers that are not negative, one a sample, or None.
        """
        if isinstance(batch, TaskBatch):
            return self.split(batch.batch)
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        return batch, batch

    def weight(self, batch: Any) -> int | Tensor:
        """How many items the mean in ``loss`` is over: samples, unless overridden (tokens, for a language model).

        A tensor may count on the device; it is never read during a step. Where ``split`` gives weights, their sum stands in
        for this method, unless it is overridden.
        """
        return batch_size(batch)

    def train_step(self, batch: Any) -> Step | Generator[tuple[str, Tensor], None, Step | None]:
        """Compute the loss of a batch.

        For several optimizers, write it as a generator that yields ``(optimizer_name, loss)`` for each update and may
        return a Step of readings at the end; the engine runs backward, clipping, the update and the schedule of that
        optimizer, then resumes it::

            def train_step(self, batch):
                fake = self.generator(noise)
                yield "discriminator", self.discriminator_loss(batch, fake.detach())
                yield "generator", self.generator_loss(fake)
        """
        return self._step(batch)

    def eval_step(self, batch: Any) -> Step:
        """Compute the loss and the predictions of a batch in evaluation: no gradient, modules in eval mode."""
        return self._step(batch)

    def forward(self, inputs: Any) -> Any:
        """Predict; so that an objective is called like any module."""
        return self.predict(inputs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in METHODS and (isinstance(value, (nn.Module, Tensor)) or not callable(value)):
            raise ConfigurationError(
                f"{type(self).__name__}.{name} is a method of every Objective: give the attribute ({kind_of(value)}) another "
                f"name, as self.{OTHER_NAMES.get(name, f'my_{name}')}"
            )
        if name == "metrics":  # a torchmetrics object is a module, but no part of the model
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    if TYPE_CHECKING:  # nn.Module's __call__ is typed as Any: an objective's has a signature.

        def __call__(self, inputs: Any) -> Any: ...

    def _step(self, batch: Any) -> Step:
        parts = self.split(batch)
        weights: Tensor | None = None
        if type(parts) is tuple and len(parts) == 2:
            inputs, targets = parts
        else:
            inputs, targets, weights = self._three(parts, batch)
        if weights is None and self._weighs:
            raise _without_weights(self, batch)
        predictions = self.predict(inputs)
        if weights is None:
            loss = self.loss(predictions, targets)
            weight = self.weight(batch)
        else:
            loss = self._weighted(predictions, targets, weights)
            given = "weight" in self.__dict__ or type(self).weight not in (Objective.weight, Supervised.weight)
            weight = self.weight(batch) if given else _sum(weights)
        if isinstance(loss, Tensor):
            return Step(loss, predictions, targets, weight, sample_weights=weights)
        return Step(total(loss, self), predictions, targets, weight, _detached(loss), sample_weights=weights)

    def _three(self, parts: Any, batch: Any) -> tuple[Any, Any, Tensor | None]:
        name = type(self).__name__
        if type(parts) is not tuple or len(parts) != 3:
            raise SplitError(
                f"{name}.split returned {kind_of(parts)}; it returns (inputs, targets), or (inputs, targets, weights). "
                f"The batch was {kind_of(batch)}."
            )
        weights = parts[2]
        if weights is not None and (not isinstance(weights, Tensor) or not weights.dim() or weights.is_complex()):
            raise SplitError(
                f"{name}.split returned {kind_of(weights)} as weights; it returns (inputs, targets) or (inputs, targets, "
                f"weights), and weights are a tensor (B,), one weight a sample, or None. "
                f"The batch was {kind_of(batch)}."
            )
        return parts[0], parts[1], weights

    def _weighted(self, predictions: Any, targets: Any, weights: Tensor) -> Tensor | Mapping[str, Tensor]:
        loss: Callable[..., Any] = self.loss
        function = getattr(loss, "__func__", loss)
        if not _takes_third(function, function is not loss):
            raise LossError(
                f"{type(self).__name__}.loss takes no weights, and split gave some ({kind_of(weights)}): write def loss(self, "
                f"predictions, targets, weights), which returns the weighted mean, (weights * each).sum() / weights.sum() with "
                f"the losses of the samples, each, of shape (B,)"
            )
        return loss(predictions, targets, weights)  # type: ignore[no-any-return]  # total looks at it


METHODS = ("predict", "loss", "split", "weight", "train_step", "eval_step")
OTHER_NAMES = {"loss": "criterion", "predict": "net", "weight": "class_weights"}


class Supervised(Objective):
    r"""An objective made of an existing model and a loss.

    With weights, of samples, of classes, or both multiplied, the loss is the weighted mean

    .. math:: \sum_i w_i l_i / \sum_i w_i, \qquad w_i = s_i \, c_{t_i}

    over items i, which are the elements of the targets: an integer weight s counts as so many copies of the sample, c is the
    ``weight`` of torch's own losses, and targets equal to -100 are left out. The metrics are weighted by the same w.

    Args:
        model: any module; ``predict(inputs)`` is ``model(inputs)``.
        loss: a name (``cross_entropy``, ``binary_cross_entropy`` on logits, ``mse``, ``mae``, ``huber``, ``nll``), or any
            callable of ``(predictions, targets)`` that returns a scalar or a mapping of terms. A loss that is a module
            becomes a part of the objective.
        metrics: see :attr:`Objective.metrics`.
        class_weights: one for each class, as a sequence, a tensor or a mapping {class: weight}, for ``cross_entropy``,
            ``nll`` and ``binary_cross_entropy`` (two of them). They are a buffer: moved and saved with the model.
        sample_weights: batches are (inputs, targets, weights), the weights (B,) or of the targets' shape. A loss that is a
            callable then takes (predictions, targets, weights) and returns the weighted mean.

    >>> import torch
    >>> objective = Supervised(nn.Linear(4, 3), "cross_entropy", metrics=["accuracy"])
    >>> objective(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    >>> objective = Supervised(nn.Linear(4, 3), "cross_entropy", class_weights=[1, 1, 5], sample_weights=True)
    >>> objective.train_step((torch.zeros(2, 4), torch.tensor([0, 2]), torch.tensor([1.0, 0.5]))).sample_weights
    tensor([1.0000, 2.5000])

    Raises:
        ConfigurationError: if model, loss or weights are of another kind, or do not go together.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        loss: str | Callable[..., Tensor | Mapping[str, Tensor]],
        metrics: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        class_weights: Sequence[float] | Mapping[int, float] | Tensor | None = None,
        sample_weights: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"Supervised(model=...) takes an nn.Module, not {kind_of(model)}")
        if not isinstance(sample_weights, bool):
            raise ConfigurationError(
                f"Supervised(sample_weights=...) takes True or False, not {kind_of(sample_weights)}: the weights are the "
                f"third part of each batch, as in ax.ArrayDataset(inputs, targets, weights)"
            )
        self._name = loss if isinstance(loss, str) else ""
        if isinstance(loss, str):
            if loss not in LOSSES:
                raise unknown("loss", loss, LOSSES, "Any callable of (predictions, targets) will do too.")
            loss = LOSSES[loss]
        elif isinstance(loss, type):
            raise ConfigurationError(f"Supervised(loss={loss.__name__}) is a class: call it, as in {loss.__name__}()")
        elif not callable(loss):
            raise ConfigurationError(f"Supervised(loss=...) takes a name or a callable, not {kind_of(loss)}")
        self._takes_weights = bool(self._name) or takes_weights(loss)
        if sample_weights and not self._takes_weights:
            raise ConfigurationError(f"Supervised(sample_weights=True): {_unweightable(loss)}")
        self.model = model
        self._criterion = loss
        self.metrics = () if metrics is None else metrics
        self.sample_weights = sample_weights
        weights = None if class_weights is None else _class_weights(class_weights, self._name)
        self.register_buffer("class_weights", weights)
        self._weighs = sample_weights or weights is not None

    def predict(self, inputs: Any) -> Any:
        """Call the model."""
        return self.model(inputs)

    def loss(self, predictions: Any, targets: Any, weights: Tensor | None = None) -> Tensor | Mapping[str, Tensor]:
        """Call the loss; with weights, the weighted mean of a named one.

        Raises:
            LossError: if the weights, or the number of classes, do not fit the predictions; or if there are weights and the
                loss is a callable that takes none.
        """
        if weights is None and self._weighs:
            weights = None if self.class_weights is None else self._weights(targets)
        if weights is None:
            return self._criterion(predictions, targets)
        if not self._takes_weights:
            raise LossError(f"{type(self).__name__}: {_unweightable(self._criterion)}")
        if not self._name:
            return self._criterion(predictions, targets, weights)  # type: ignore[call-arg]  # see takes_weights
        of_classes = self.class_weights
        if of_classes is not None and self._name in INDEXED and predictions.shape[1:2] != of_classes.shape:
            raise LossError(
                f"Supervised(class_weights=...) has {len(of_classes)} weights, and predictions are {kind_of(predictions)}: (B, "
                f"C, ...), with one weight for each of the C classes"
            )
        return _weighted_mean(self._name, predictions, targets, weights)

    def split(self, batch: Any) -> tuple[Any, Any] | tuple[Any, Any, Tensor | None]:
        """Take a batch apart into ``(inputs, targets)``; with weights, into ``(inputs, targets, weights)``."""
        if isinstance(batch, TaskBatch):
            return self.split(batch.batch)
        if isinstance(batch, (tuple, list)):
            if self._weighs and len(batch) == (3 if self.sample_weights else 2):
                return batch[0], batch[1], self._weights(*batch[1:])
            if len(batch) == 2:
                return batch[0], batch[1]
        return batch, batch

    def weight(self, batch: Any) -> int | Tensor:
        """Samples; of class numbers for tokens or pixels, (B, ...), those that are not -100, which the loss leaves out.

        To count those of targets (B,) would cost every step of a plain classifier: where some are -100, override this.
        """
        if self._name in INDEXED and isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
            targets = batch[1]
            if targets.dim() > 1 and not targets.is_floating_point():
                return (targets != IGNORED).sum()
        return batch_size(batch)

    def _weights(self, targets: Any, weights: Any = None) -> Any:
        """What each item counts: of the targets' shape where they are classes, else as the batch has it."""
        if not isinstance(targets, Tensor) or (self.sample_weights and not isinstance(weights, Tensor)):
            return weights  # for a loss of the user's own; or to be refused
        of_classes, indices = self.class_weights, self._name in INDEXED and not targets.is_floating_point()
        if of_classes is None and not indices:
            return weights
        each: Tensor | None = None
        if of_classes is not None and indices:
            # A target that is no class is for the loss to refuse.
            each = of_classes[targets.long().clamp(0, len(of_classes) - 1)]
        elif of_classes is not None:
            if self._name in INDEXED:
                raise LossError(
                    f"Supervised(class_weights=...) goes with targets that are class numbers, not probabilities "
                    f"({kind_of(targets)}): give targets.argmax(1), or sample weights"
                )
            each = torch.where(targets > 0.5, of_classes[1], of_classes[0])
        if weights is not None:
            of_samples = spread(weights, targets.shape)
            if of_samples is None:
                raise SplitError(
                    f"the weights of the batch are {kind_of(weights)}, its targets {kind_of(targets)}: weights are (B,), one a "
                    f"sample, or of the targets' shape"
                )
            each = of_samples if each is None else each * of_samples
        return torch.where(targets == IGNORED, 0, each) if indices else each  # type: ignore[arg-type]  # there is one


def total(terms: Mapping[str, Tensor], objective: nn.Module) -> Tensor:
    """Sum a mapping of loss terms, or say what else ``loss`` returned."""
    name = type(objective).__name__
    if not isinstance(terms, Mapping):
        raise LossError(f"{name}.loss returned {kind_of(terms)}; it returns a scalar tensor or a mapping of named terms")
    if not terms:
        raise LossError(f"{name}.loss returned an empty mapping; there is nothing to minimise")
    for key, term in terms.items():
        if key == "loss":
            raise LossError(f"{name}.loss returned a term named 'loss', which is the name of the sum: call it otherwise")
        if not isinstance(term, Tensor) or term.numel() != 1:
            raise LossError(f"{name}.loss returned {kind_of(term)} as the term {key!r}; each term is a scalar tensor")
    return sum(term.reshape(()) for term in terms.values())  # type: ignore[return-value]  # not 0: there are terms


def task_of(batch: Any) -> str | None:
    """The task of a batch, where it has one."""
    return batch.task if isinstance(batch, TaskBatch) else None


def batch_size(batch: Any) -> int:
    """The leading size of the first tensor (or array) in a batch; 1 where there is none.

    >>> import torch
    >>> batch_size({"a": [torch.zeros(5, 2)], "b": torch.zeros(5)})
    5
    """
    while not isinstance(batch, Tensor):
        if isinstance(batch, (tuple, list)) and batch:  # first, as most batches are, and to be a Mapping is slow to ask for
            if isinstance(batch[0], (str, bytes, int, float)):
                return len(batch)
            batch = batch[0]
        elif isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        elif isinstance(batch, TaskBatch):
            batch = batch.batch
        elif isinstance(batch, Accumulated):
            return sum(map(batch_size, batch.batches))
        elif is_dataclass(batch) and not isinstance(batch, type) and fields(batch):
            batch = getattr(batch, fields(batch)[0].name)
        else:
            shape = getattr(batch, "shape", None)
            return int(shape[0]) if shape else 1
    return batch.shape[0] if batch.dim() else 1


def spread(weights: Tensor, *shapes: Sequence[int]) -> Tensor | None:
    """Spread weights (B,) or (B, T) over the first of the shapes that begins with theirs; None if none does.

    Trailing dimensions of 1 do not count: a column of weights is a vector.

    >>> import torch
    >>> spread(torch.tensor([1.0, 2.0]), (2, 3))
    tensor([[1., 1., 1.],
            [2., 2., 2.]])
    """
    while weights.dim() > 1 and weights.shape[-1] == 1:
        weights = weights.squeeze(-1)
    size = tuple(weights.shape)
    for shape in map(tuple, shapes):
        if size and size == shape[: len(size)]:
            return weights.reshape(size + (1,) * (len(shape) - len(size))).expand(shape)
    return None


def takes_weights(function: Callable[..., Any]) -> bool:
    """Whether a loss takes a third argument by its place; what torch's own take there are no weights of samples.

    >>> takes_weights(lambda predictions, targets, weights: 0), takes_weights(F.cross_entropy)
    (True, False)
    """
    function = function.forward if isinstance(function, nn.Module) else function
    return not of_torch(function) and _third(function)


def of_torch(function: Any) -> bool:
    """Whether a function is one of torch's, or a partial of one: its ``weight`` is of classes, if it is of anything."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def _third(function: Callable[..., Any], bound: bool = False) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_place = [parameter for parameter in parameters if parameter.kind in placed][bound:]
    # A third one with another default, as reduction="mean", is an option.
    return len(by_place) > 2 and by_place[2].default in (inspect.Parameter.empty, None)


_takes_third = functools.lru_cache(maxsize=256)(_third)  # once for each class, not at each step


def _unweightable(loss: Callable[..., Any]) -> str:
    name = getattr(loss, "__name__", type(loss).__name__)
    return (
        f"the loss {name} takes no weights: write a function of (predictions, targets, weights) that returns the weighted "
        f"mean, (weights * each).sum() / weights.sum() with the losses of the samples, each, of shape (B,); or give a name: "
        f"{', '.join(LOSSES)}"
    )


def _without_weights(objective: Objective, batch: Any) -> SplitError:
    by_sample = getattr(objective, "sample_weights", True)
    argument, parts = ("sample_weights=True", ", weights") if by_sample else ("class_weights=...", "")
    return SplitError(
        f"{type(objective).__name__}({argument}) takes batches (inputs, targets{parts}), and this one is {kind_of(batch)}: "
        f"what is missing can be given as ax.ArrayDataset(inputs, targets{parts})"
        f"{', or leave sample_weights out' if by_sample else ''}"
    )


def _class_weights(given: Any, loss: str) -> Tensor:
    """Bring class weights to a tensor (C,), or say what is wrong with them."""
    where = "Supervised(class_weights=...)"
    if loss not in WITH_CLASSES:
        raise ConfigurationError(
            f"{where} goes with the losses that have classes, {', '.join(WITH_CLASSES)}, not with "
            f"{repr(loss) if loss else 'a callable'}: give sample_weights=True, and the weights in the batches"
        )
    if isinstance(given, Mapping):
        missing = [c for c in range(len(given)) if c not in given]
        if missing or not given:
            raise ConfigurationError(
                f"{where} has weights for the classes {list(given)}, and none for {missing}: it names each class, 0 to C - 1"
            )
        given = [given[c] for c in range(len(given))]
    try:
        weights = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{where} takes numbers, one for each class, not {kind_of(given)}: {error}") from error
    if not (isinstance(given, Tensor) and weights.is_floating_point()):
        weights = weights.to(torch.get_default_dtype())
    if weights.dim() != 1 or len(weights) < 2 or (len(weights) != 2 and loss not in INDEXED):
        wanted = "one for each class" if loss in INDEXED else "two, of the classes 0 and 1"
        raise ConfigurationError(f"{where} takes numbers, {wanted}, not {kind_of(given)}")
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ConfigurationError(f"{where} holds {weights.tolist()}: weights are finite and not negative")
    return weights.clone()


def _sum(weights: Tensor) -> Tensor:
    return weights.sum(dtype=torch.float32 if weights.dtype in (torch.float16, torch.bfloat16) else None)


def _weighted_mean(name: str, predictions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum w_i l_i / sum w_i over the items of a named loss; 0, with zero gradients, if all weights are 0."""
    classes = name in INDEXED
    if not classes:
        _check_same(predictions, targets)
    shape = predictions.shape[:1] + predictions.shape[2:] if classes else predictions.shape
    each = spread(weights, shape)
    if each is None:
        raise LossError(
            f"weights are {kind_of(weights)} and predictions {kind_of(predictions)}: weights are (B,), one a sample, or "
            f"{'of the shape of the class numbers' if classes else 'of the shape of the predictions'}, {tuple(shape)}"
        )
    indices = classes and not targets.is_floating_point()
    if indices and targets.shape != shape:
        return LOSSES[name](predictions, targets)  # torch says what is wrong
    if indices:
        each = torch.where(targets == IGNORED, 0, each)
    # What counts for nothing may be NaN: it is taken out before the loss, since zero times the gradient of a NaN is NaN.
    kept = each != 0
    of_all = kept.unsqueeze(1) if classes else kept
    predictions = torch.where(of_all, predictions, 0)
    targets = torch.where(kept, targets.long(), IGNORED) if indices else torch.where(of_all, targets, 0)
    losses = ITEMS[name](predictions, targets)
    each = each.to(torch.promote_types(losses.dtype, torch.float32))
    weight = each.sum()
    return (losses * (each / torch.where(weight != 0, weight, 1))).sum()


def _detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    return {name: term.detach() for name, term in terms.items()}


def _check_same(predictions: Tensor, targets: Tensor) -> None:
    # torch broadcasts (B, 1) against (B,) to (B, B), trains on it, and only warns.
    if predictions.shape != targets.shape:
        raise LossError(
            f"predictions are {tuple(predictions.shape)} and targets {tuple(targets.shape)}: make the shapes equal, "
            f"as by predictions.squeeze(-1) or targets.unsqueeze(-1); broadcasting would compare each with each"
        )


def _same_shape(
    loss: Callable[..., Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    def checked(predictions: Tensor, targets: Tensor) -> Tensor:
        # Here rather than by _check_same: a call a step less.
        if predictions.shape != targets.shape:
            _check_same(predictions, targets)
        return loss(predictions, targets.to(predictions.dtype))

    return checked


IGNORED = -100  # the ignore_index of torch's losses
INDEXED = ("cross_entropy", "nll")
WITH_CLASSES = (*INDEXED, "binary_cross_entropy")
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": _same_shape(F.binary_cross_entropy_with_logits),
    "mse": _same_shape(F.mse_loss),
    "mae": _same_shape(F.l1_loss),
    "huber": _same_shape(F.huber_loss),
    "nll": F.nll_loss,
}
# The same, one value for each item.
ITEMS: dict[str, Callable[[Any, Any], Tensor]] = {
    "cross_entropy": functools.partial(F.cross_entropy, reduction="none"),
    "binary_cross_entropy": _same_shape(functools.partial(F.binary_cross_entropy_with_logits, reduction="none")),
    "mse": _same_shape(functools.partial(F.mse_loss, reduction="none")),
    "mae": _same_shape(functools.partial(F.l1_loss, reduction="none")),
    "huber": _same_shape(functools.partial(F.huber_loss, reduction="none")),
    "nll": functools.partial(F.nll_loss, reduction="none"),
}
