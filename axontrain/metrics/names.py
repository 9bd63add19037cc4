r"""The metrics that go by a name: torchmetrics' values from updates that never wait for the device.

===================  ===============================================================================  ==================
name                 value                                                                            read as
===================  ===============================================================================  ==================
accuracy             share of right answers (micro average; multilabel: over all labels)              float
top{k}               share of items whose class is among the k highest scores; multiclass             float
precision            TP / (TP + FP): macro average (mean over classes or labels, absent classes out)  float
recall               TP / (TP + FN): macro average                                                    float
f1                   2TP / (2TP + FP + FN): macro average                                             float
dice                 2TP / (2TP + FP + FN) over all pixels or labels together (micro average); for    float
                     multiclass this equals accuracy [1]_
iou                  TP / (TP + FP + FN), the Jaccard index: macro average [2]_                       float
auroc                area under the ROC curve: macro average, one class against the rest [3]_         float
average_precision    sum over thresholds of (R_n - R_{n-1}) P_n: macro average                        float
confusion_matrix     counts, rows are targets and columns predictions; multilabel: one for each       (C, C) or
                     label                                                                            (C, 2, 2) of ints
perplexity           exp(mean negative log-likelihood) of logits (B, V), (B, T, V) or (B, V, T)       float
mse, rmse, mae       mean (square root of mean) squared error, mean absolute error, over elements     float
r2                   1 - sum (t - p)^2 / sum (t - mean t)^2 over all elements                         float
cosine_similarity    mean of p.t / (\|p\| \|t\|) along the last dimension of (B, D)                     float
===================  ===============================================================================  ==================

Why torchmetrics' own ``update`` is not used for classification, though its ``compute`` is: it waits for the device
(``bincount``, boolean masks for ``ignore_index``), takes C x C counts where 3 x C do, and decides batch by batch
whether scores are logits (any outside 0..1) or probabilities, so that its value depends on how the data were cut. Here
the counts are sums over items, integers, added on the device, and that decision falls once, over all that was seen:
joining or splitting batches cannot change a value. Float targets that are no classes are counted too, and refused when
the value is read. What computes a value does look at numbers, so those with ``by_states`` true have it computed on the host,
of their states as they were read; ``auroc`` and ``average_precision``, which rank all that was seen, wait for the device.

Weighted, each sum is of weights instead of ones, in double precision: ``accuracy`` is sum w_i [right_i] / sum w_i, and an
integer weight counts as so many copies of the sample. What weighs 0 is left out, be it NaN. Counts stay integers for as
long as no batch has weights.

.. [1] L. R. Dice, Measures of the amount of ecologic association between species, Ecology 26 (1945).
.. [2] P. Jaccard, The distribution of the flora in the alpine zone, New Phytologist 11 (1912).
.. [3] T. Fawcett, An introduction to ROC analysis, Pattern Recognition Letters 27 (2006).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchmetrics
import torchmetrics.classification
import torchmetrics.text
from torch import Tensor
from torchmetrics.functional import cosine_similarity
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.functional.regression.r2 import _r2_score_compute
from torchmetrics.utilities import dim_zero_cat

from axontrain.errors import MetricError, kind_of
from axontrain.metrics.layout import Layout, infer, misfit, precise
from axontrain.objective import spread

__all__ = [
    "IGNORED",
    "ClassCounts",
    "ConfusionCounts",
    "Gathered",
    "Hits",
    "Mean",
    "Perplexity",
    "ThresholdCounts",
    "make",
]

IGNORED = -100
"""The target that counts for nothing in multiclass metrics: the ``ignore_index`` of ``cross_entropy``."""

# predictions, targets and, of a weighted step, sample weights -> the arguments of update
Prepare = Callable[..., tuple[Any, ...]]

# What torchmetrics calls it, after Binary, Multiclass or Multilabel, and the average over classes or labels.
_COUNTED: dict[str, tuple[str, str | None]] = {
    "accuracy": ("Accuracy", "micro"),
    "precision": ("Precision", "macro"),
    "recall": ("Recall", "macro"),
    "f1": ("F1Score", "macro"),
    "dice": ("F1Score", "micro"),
    "iou": ("JaccardIndex", "macro"),
    "confusion_matrix": ("ConfusionMatrix", None),
}
_RANKED = ("auroc", "average_precision")


def make(kind: str, name: str, predictions: Tensor, targets: Tensor) -> tuple[torchmetrics.Metric, Prepare]:
    """Make the metric of a built-in name for the first batch, and what brings every batch to its ``update``.

    ``kind`` is the built-in name, ``name`` the one in the readings, for messages.

    >>> logits, pixels = torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    >>> metric, prepare = make("iou", "iou", logits, pixels)
    >>> [tuple(tensor.shape) for tensor in prepare(logits, pixels)[:2]]
    [(128,), (128,)]

    Raises:
        MetricError: if the shapes or dtypes do not fit the metric.
    """
    if kind in _ERRORS or kind == "cosine_similarity":
        return _regression(kind, name, predictions, targets)
    layout = infer(name, predictions, targets)
    if layout.task == "labels":
        if kind != "accuracy":
            raise MetricError(
                f"metric {name!r}: predictions {kind_of(predictions)} are classes already, so neither scores nor the "
                f"number of classes are known: pass an instance, metrics={{{name!r}: torchmetrics.F1Score(...)}}"
            )
        # Equality needs no number of classes, and micro-averaged accuracy is the same for any.
        return Hits("MulticlassAccuracy", num_classes=2, average="micro"), partial(_equal, name, layout)
    if kind == "perplexity" or kind not in (*_COUNTED, *_RANKED):
        if layout.task != "multiclass":
            raise MetricError(
                f"metric {name!r} needs scores for each class, (B, C, ...), and class indices, (B, ...), but "
                f"predictions {kind_of(predictions)} and targets {kind_of(targets)} are {layout.task}"
            )
        if kind == "perplexity":
            # With classes last, vectors as they lie in memory; moving the classes would copy the logits.
            prepare = partial(_scores, name, layout) if layout.dim == -1 else partial(_aligned, name, layout)
            return _in_double(Perplexity(ignore_index=IGNORED), predictions), prepare
        return _top(name, int(kind.removeprefix("top")), layout, predictions)
    if kind in _RANKED:
        return Gathered(kind, layout.task == "multiclass"), partial(_scores, name, layout)
    words, average = _COUNTED[kind]
    options: dict[str, Any] = {} if average is None or layout.task == "binary" else {"average": average}
    if layout.task != "binary":
        options |= {"num_classes" if layout.task == "multiclass" else "num_labels": layout.size}
    words = layout.task.capitalize() + words
    if layout.task != "multiclass":
        return ThresholdCounts(words, layout.size, **options), partial(_scores, name, layout)
    if average == "micro":
        return Hits(words, **options), partial(_labels, name, layout)
    counts = ConfusionCounts if kind in ("iou", "confusion_matrix") else ClassCounts
    return counts(words, **options), partial(_labels, name, layout)


# How predictions and targets are prepared for a metric: functions of the module, so that a Loop can be sent to another process.


def _equal(
    name: str, layout: Layout, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Classes, predicted and true, as they are."""
    found = predictions, targets.long()
    return found if weights is None else (*found, None, layout.weights(name, weights, predictions, targets))


def _aligned(
    name: str, layout: Layout, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Scores (B, C, ...) with targets (B, ...), and what of the targets is strange."""
    found = *layout.align(predictions, targets), layout.strange(targets)
    return found if weights is None else (*found, layout.weights(name, weights, predictions, targets))


def _labels(
    name: str, layout: Layout, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Class indices, predicted and true, as vectors; and what of the targets is strange."""
    labels = predictions.argmax(layout.dim)
    found = labels.reshape(-1), layout.targets(targets).reshape(-1), layout.strange(targets)
    return found if weights is None else (*found, layout.weights(name, weights, predictions, targets).reshape(-1))


def _scores(
    name: str, layout: Layout, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Scores (N, C) with targets (N,), multilabel (N, L) both, binary (N,) both; and what of the targets is strange."""
    strange, true = layout.strange(targets), layout.targets(targets)
    each = None if weights is None else layout.weights(name, weights, predictions, targets)
    if layout.task == "binary":
        scores = predictions.reshape(-1)
    else:
        scores = predictions.movedim(layout.dim, -1).reshape(-1, layout.size)
    if layout.task == "multilabel":
        true = true.movedim(layout.dim, -1)
        each = None if each is None else each.movedim(layout.dim, -1)
    found = scores, true.reshape(scores.shape if layout.task == "multilabel" else -1), strange
    return found if each is None else (*found, each.reshape(found[1].shape))


def _highest(
    name: str, layout: Layout, k: int, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """The classes of the ``k`` highest scores, targets beside them, and what of the targets is strange."""
    indices = predictions.topk(k, layout.dim).indices
    found = indices, layout.targets(targets).unsqueeze(layout.dim), layout.strange(targets)
    if weights is None:
        return found
    return *found, layout.weights(name, weights, predictions, targets).unsqueeze(layout.dim)


def _top(name: str, k: int, layout: Layout, predictions: Tensor) -> tuple[torchmetrics.Metric, Prepare]:
    if k > layout.size:
        raise MetricError(
            f"metric {name!r} looks at the {k} highest of at least {k} classes, but predictions "
            f"{kind_of(predictions)} have {layout.size}: use 'top{layout.size}' at most"
        )
    metric = Hits("MulticlassAccuracy", num_classes=layout.size, average="micro")
    # With k = 1 exactly accuracy, ties too.
    return metric, partial(_labels, name, layout) if k == 1 else partial(_highest, name, layout, k)


class _OfClasses(torchmetrics.Metric):
    """A metric of classes. Float targets that are none are counted on the device, and an error when the value is read."""

    full_state_update = False
    is_differentiable = False
    strange: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("strange", torch.tensor(0), dist_reduce_fx="sum")

    def _note(self, strange: Tensor | None, weights: Tensor | None = None) -> None:
        if strange is not None:
            if weights is not None:
                strange = strange.reshape(-1) & (weights.reshape(-1) != 0)
            self.strange = self.strange + strange.sum()

    def _check(self) -> None:
        if count := int(self.strange):
            raise ValueError(
                f"{count} of the targets are floats that it cannot take for classes (neither 0 and 1, nor probabilities that "
                "add up to 1 over classes), and this metric is of classes: for numbers use mse, mae or r2; for several labels "
                "at once have targets of bool, in the data, or give the Step targets.bool()"
            )


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    """Values times weights, or the weights where something is true; 0 where the weight is, be the value NaN."""
    if values.dtype is torch.bool:
        return torch.where(values, weights, 0)
    return torch.where(weights != 0, weights * values, 0)


# --- counts over items, each a sum that updates add to ---------------------------------------------------------------


class _Counted(_OfClasses):
    """Counts as states, and the value that a torchmetrics class computes of them.

    The states are integers until an update has weights, and sums of weights, float64, from then on.
    """

    by_states = True

    def __init__(self, words: str, **options: Any) -> None:
        super().__init__()
        self.words, self.options = words, options

    def _count(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def _value(self, true_false: tuple[Tensor, ...] | None = None, confusion: Tensor | None = None) -> Tensor:
        self._check()
        # Through the class, as the instance's own compute would synchronise, cache and warn once more.
        metric = _judge(self.words, tuple(self.options.items()))
        if confusion is not None:
            metric.confmat = confusion
        else:
            metric.tp, metric.fp, metric.tn, metric.fn = true_false or ()
        value: Tensor = type(metric).compute(metric)
        return value


@functools.lru_cache(maxsize=64)
def _judge(words: str, options: tuple[tuple[str, Any], ...]) -> Any:
    # Made once: making one costs more than all else of a reading.
    return getattr(torchmetrics.classification, words)(**dict(options), validate_args=False)


class Hits(_Counted):
    """Right answers and items that count: micro averages of multiclass data.

    >>> hits = Hits("MulticlassAccuracy", num_classes=3, average="micro")
    >>> hits.update(torch.tensor([0, 1, 2]), torch.tensor([0, 2, IGNORED]))
    >>> hits.compute()
    tensor(0.5000)
    """

    right: Tensor
    items: Tensor

    def __init__(self, words: str, **options: Any) -> None:
        super().__init__(words, **options)
        self._count("right")
        self._count("items")

    def update(self, labels: Tensor, targets: Tensor, strange: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add a batch: labels broadcast to targets, where a target equals at most one of the labels."""
        self._note(strange, weights)
        right, items = labels == targets, targets != IGNORED  # no label equals IGNORED
        if weights is not None:
            right, items = _weighed(weights, right), _weighed(weights, items)
        self.right = self.right + right.sum()
        self.items = self.items + items.sum()

    def compute(self) -> Tensor:
        """Let torchmetrics compute the value: an item that is wrong is false for one class and missing in another."""
        right, wrong = self.right.reshape(1), (self.items - self.right).reshape(1)
        return self._value((right, wrong, torch.zeros_like(right), wrong))


class ClassCounts(_Counted):
    """For each class the items that are it and were taken for it, that were taken for it, and that are it.

    3 x C counts serve a language model's vocabulary, for which torchmetrics' C x C do not fit in memory.
    """

    counts: Tensor

    def __init__(self, words: str, *, num_classes: int, **options: Any) -> None:
        super().__init__(words, num_classes=num_classes, **options)
        self._count("counts", 3, num_classes)

    def update(self, labels: Tensor, targets: Tensor, strange: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add a batch of class indices (N,); a target outside the classes raises, on a GPU as an assertion."""
        self._note(strange, weights)
        kept = targets != IGNORED
        if weights is not None:
            kept = kept & (weights != 0)
        # Ignored items are counted in class 0, zero times: selecting the others would wait for the device.
        targets = torch.where(kept, targets, 0)
        counted = torch.stack((kept & (labels == targets), kept, kept))
        where = torch.stack((targets, labels, targets))
        if weights is not None:
            self.counts = self.counts.to(weights.dtype)
        found = counted.to(self.counts.dtype) if weights is None else _weighed(weights, counted)
        self.counts.scatter_add_(1, where, found)

    def compute(self) -> Tensor:
        """Let torchmetrics compute the value."""
        hits, taken, true = self.counts
        return self._value((hits, taken - hits, true.sum() - taken - true + hits, true - hits))


class ConfusionCounts(_Counted):
    """How often each class (row) was taken for each (column)."""

    counts: Tensor

    def __init__(self, words: str, *, num_classes: int, **options: Any) -> None:
        super().__init__(words, num_classes=num_classes, **options)
        self._count("counts", num_classes, num_classes)

    def update(self, labels: Tensor, targets: Tensor, strange: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add a batch of class indices (N,); a target outside the classes raises, on a GPU as an assertion."""
        self._note(strange, weights)
        kept = targets != IGNORED
        if weights is not None:
            kept = kept & (weights != 0)
        cells = torch.where(kept, targets, 0) * self.counts.shape[1] + labels
        if weights is not None:
            self.counts = self.counts.to(weights.dtype)
        found = kept.to(self.counts.dtype) if weights is None else _weighed(weights, kept)
        self.counts.view(-1).scatter_add_(0, cells, found)

    def compute(self) -> Tensor:
        """Let torchmetrics compute the value."""
        return self._value(confusion=self.counts)


class ThresholdCounts(_Counted):
    """Binary and multilabel counts, kept twice: as if scores were probabilities, and as if they were logits.

    Scores are logits if any of all that were seen lies outside 0..1: torchmetrics' rule, but it looks at each update
    by itself, so that a small batch of logits may pass for probabilities (and on the CPU it reads the answer). Logits
    that all lie in 0..1 pass for probabilities here too: ``predictions.sigmoid()`` leaves no doubt.
    """

    true: Tensor
    false: Tensor
    positives: Tensor
    negatives: Tensor
    outside: Tensor

    def __init__(self, words: str, labels: int, **options: Any) -> None:
        super().__init__(words, **options)
        self._count("true", 2, labels)
        self._count("false", 2, labels)
        self._count("positives", labels)
        self._count("negatives", labels)
        self._count("outside")

    def update(self, scores: Tensor, targets: Tensor, strange: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add a batch of scores and targets 0 or 1, both (N, L), or (N,) if binary; any other target is left out."""
        self._note(strange, weights)
        positive, negative = targets == 1, targets == 0
        taken = torch.stack((scores > 0.5, scores > 0))  # sigmoid(x) > 1/2 where x > 0
        true, false, outside = taken & positive, taken & negative, (scores < 0) | (scores > 1)
        if weights is not None:
            true, false = _weighed(weights, true), _weighed(weights, false)
            positive, negative = _weighed(weights, positive), _weighed(weights, negative)
            outside = outside & (weights != 0)
        self.true = self.true + true.sum(1).view_as(self.true)
        self.false = self.false + false.sum(1).view_as(self.false)
        self.positives = self.positives + positive.sum(0)
        self.negatives = self.negatives + negative.sum(0)
        self.outside = self.outside + outside.sum()

    def compute(self) -> Tensor:
        """Let torchmetrics compute the value of the counts that apply."""
        true, false = (torch.where(self.outside > 0, counts[1], counts[0]) for counts in (self.true, self.false))
        missed, right = self.positives - true, self.negatives - false
        if "Jaccard" in self.words or "Confusion" in self.words:
            confusion = torch.stack((right, false, missed, true), -1).view(-1, 2, 2)
            return self._value(confusion=confusion if self.words.startswith("Multilabel") else confusion[0])
        return self._value((true, false, right, missed))


# --- metrics of other kinds ------------------------------------------------------------------------------------------


class Gathered(_OfClasses):
    """All scores and targets, ranked when the value is read; a class without positives is left out of the average.

    Ranks cannot be summed up without loss, so this keeps everything: its memory grows with the data. torchmetrics
    would take the AUROC of a class that is absent for 0. If no class is left the value is NaN. It has no weights either:
    weighted values are :func:`_ranked`'s.
    """

    scores: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor]

    def __init__(self, kind: str, multiclass: bool) -> None:
        super().__init__()
        self.kind, self.multiclass = kind, multiclass
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")
        self.add_state("weights", [], dist_reduce_fx="cat")  # empty, or as many as the others

    def update(self, scores: Tensor, targets: Tensor, strange: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Keep a batch; as copies, for the memory of predictions may be written again (CUDA graphs)."""
        self._note(strange, weights)
        if weights is not None or self.weights:
            # Batches without weights, before or among those with them, count each item once.
            self.weights.extend(torch.ones_like(part, dtype=torch.float32) for part in self.targets[len(self.weights) :])
            weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
            self.weights.append(weights.clone())
        self.scores.append(scores.clone())
        self.targets.append(targets.clone())

    def compute(self) -> Tensor:
        """Average torchmetrics' value of each class against the rest, or of each label."""
        self._check()
        scores, targets = dim_zero_cat(self.scores), dim_zero_cat(self.targets)
        weights = dim_zero_cat(self.weights) if len(self.weights) else None
        if scores.device.type == "mps":  # which has no float64
            scores, targets, weights = scores.cpu(), targets.cpu(), None if weights is None else weights.cpu()
        # In double precision: in single the softmax of confident logits is 1, and their scores would tie.
        scores = scores.double()
        if self.multiclass:
            kept = targets != IGNORED
            if weights is not None:
                kept = kept & (weights != 0)
                weights = weights[kept]
            scores, targets = scores[kept], targets[kept]
            scores = scores.softmax(1) if bool(((scores < 0) | (scores > 1)).any()) else scores
        columns, of_labels = (part if part.dim() > 1 else part.unsqueeze(1) for part in (scores, targets))
        value = binary_auroc if self.kind == "auroc" else binary_average_precision
        values = []
        for index, column in enumerate(columns.unbind(1)):
            true = targets == index if self.multiclass else of_labels[:, index]
            known = (true == 0) | (true == 1)
            each = None
            if weights is not None:
                each = weights if weights.dim() == 1 else weights[:, index]
                known = known & (each != 0)
                each = each[known].double()
            column, true = column[known], true[known].long()
            positives = int(true.sum())
            if positives and (positives < len(true) or self.kind != "auroc"):
                if each is not None:
                    values.append(_ranked(self.kind, column, true, each))
                else:
                    values.append(value(column if self.multiclass else _in_order(column), true, validate_args=False))
        return torch.stack(values).mean() if values else scores.new_tensor(torch.nan)


def _in_order(scores: Tensor) -> Tensor:
    """Scores (N,) of the same order and the same ties, from 0 to below 1, which torchmetrics takes as they are.

    Of logits it would take the sigmoid, whose last bit differs by where in memory a number lies, so that equal ones are not
    tied any more, and which is 1 above 37, where all are.

    >>> _in_order(torch.tensor([40.0, -3.0, 50.0, 40.0]))
    tensor([0.3333, 0.0000, 0.6667, 0.3333], dtype=torch.float64)
    """
    levels, level = torch.unique(scores, return_inverse=True)
    placed: Tensor = level.double() / max(len(levels), 1)
    return placed


def _ranked(kind: str, scores: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    r"""The AUROC or the average precision of weighted items, tied scores together.

    With the weights p_g of positives and n_g of negatives at the g-th score, from the lowest:

    .. math::
        \mathrm{AUROC} = \sum_g n_g \Bigl(\sum_{h > g} p_h + p_g / 2\Bigr) \Big/ \sum_g p_g \sum_g n_g, \qquad
        \mathrm{AP} = \sum_g p_g \frac{\sum_{h \ge g} p_h}{\sum_{h \ge g} (p_h + n_h)} \Big/ \sum_g p_g

    >>> scores, true = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 1, 0, 1])
    >>> _ranked("auroc", scores, true, torch.ones(4).double())
    tensor(0.8750, dtype=torch.float64)
    """
    levels, level = torch.unique(scores, return_inverse=True)
    of_level = weights.new_zeros(2, len(levels)).index_add_(1, level, torch.stack((weights * true, weights * (1 - true))))
    positive, negative = of_level.flip(1)  # from the highest
    if kind == "auroc":
        above = positive.cumsum(0) - positive / 2
        value: Tensor = (negative * above).sum() / (positive.sum() * negative.sum())
    else:
        precision = positive.cumsum(0) / (positive + negative).cumsum(0)
        value = (positive * precision).sum() / positive.sum()
    return value


class Mean(torchmetrics.Metric):
    """The mean of one value for each item; torchmetrics' own looks for NaN on the host.

    >>> mean = Mean()
    >>> mean.update(torch.tensor([1.0, 2.0]))
    >>> mean.update(torch.tensor([6.0]))
    >>> mean.compute()
    tensor(3.)
    """

    by_states = True
    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch of values (N,)."""
        if weights is not None:
            self.total = self.total + _weighed(weights, values).sum()
            self.count = self.count + weights.sum()
            return
        self.total += values.sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Divide."""
        return self.total / self.count


class Perplexity(_OfClasses, torchmetrics.text.Perplexity):
    """torchmetrics' perplexity, with an update by log-softmax: probabilities that underflow do not make it infinite."""

    by_states = True

    def update(self, preds: Tensor, target: Tensor, strange: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add a batch of logits (B, V, ...) and targets (B, ...)."""
        self._note(strange, weights)
        likelihood = torch.log_softmax(preds, 1, dtype=None if preds.dtype == torch.float64 else torch.float32)
        kept = target != IGNORED
        if weights is not None:
            kept = kept & (weights != 0)
        # Not nll_loss, which has no deterministic form for (B, V, T) on a GPU.
        chosen = likelihood.gather(1, torch.where(kept, target, 0).unsqueeze(1)).squeeze(1)
        if weights is not None:
            self.total_log_probs -= _weighed(_weighed(weights, kept), chosen).sum()
            self.count += _weighed(weights, kept).sum()
            return
        self.total_log_probs -= torch.where(kept, chosen, 0).sum()
        self.count += kept.sum()

    def compute(self) -> Tensor:
        """Let torchmetrics compute the value."""
        self._check()
        return super().compute()


class SquaredError(torchmetrics.MeanSquaredError):
    """torchmetrics' mean squared error, and its weighted mean."""

    by_states = True

    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch of elements (N,)."""
        if weights is None:
            super().update(preds, target)
            return
        self.sum_squared_error = self.sum_squared_error + _weighed(weights, (preds - target).square()).sum()
        self.total = self.total + weights.sum()


class AbsoluteError(torchmetrics.MeanAbsoluteError):
    """torchmetrics' mean absolute error, and its weighted mean."""

    by_states = True

    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch of elements (N,)."""
        if weights is None:
            super().update(preds, target)
            return
        self.sum_abs_error = self.sum_abs_error + _weighed(weights, (preds - target).abs()).sum()
        self.total = self.total + weights.sum()


class Determination(torchmetrics.R2Score):
    """torchmetrics' R², and that of weighted sums: 1 - sum w (t - p)^2 / sum w (t - mean t)^2, of the weighted mean.

    It does not depend on the scale of the weights; torchmetrics' formula, which takes small sums for zero, is given sums that
    are scaled to weights of mean 1.
    """

    by_states = True
    weighted: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("weighted", torch.tensor(0.0), dist_reduce_fx="sum")  # items that came with weights
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")  # theirs

    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch of elements (N,)."""
        if weights is None:
            super().update(preds, target)
            return
        self.sum_squared_error = self.sum_squared_error + _weighed(weights, target * target).sum()
        self.sum_error = self.sum_error + _weighed(weights, target).sum()
        self.residual = self.residual + _weighed(weights, (target - preds).square()).sum()
        items = (weights != 0).sum()
        self.total, self.weighted = self.total + items, self.weighted + items
        self.weight = self.weight + weights.sum()

    def compute(self) -> Tensor:
        """Let torchmetrics compute the value."""
        if not self.total:  # all weights were 0
            return torch.full_like(self.residual, torch.nan)
        scale = self.total / (self.total - self.weighted + self.weight)
        return _r2_score_compute(self.sum_squared_error * scale, self.sum_error * scale, self.residual * scale, self.total)


_ERRORS: dict[str, Callable[[], torchmetrics.Metric]] = {
    "mse": SquaredError,
    "rmse": partial(SquaredError, squared=False),
    "mae": AbsoluteError,
    "r2": Determination,
}


def _regression(kind: str, name: str, predictions: Tensor, targets: Tensor) -> tuple[torchmetrics.Metric, Prepare]:
    metric = _ERRORS[kind]() if kind in _ERRORS else Mean()
    # R² is a difference of large sums, which single precision would not survive.
    double = kind == "r2" and predictions.device.type != "mps"

    vectors = kind == "cosine_similarity"
    _check_alike(name, vectors, predictions, targets)
    return _in_double(metric, predictions), partial(_cosines, name) if vectors else partial(_elements, name, double)


def _check_alike(name: str, vectors: bool, predictions: Tensor, targets: Tensor) -> None:
    shape, wanted = predictions.shape, targets.shape
    if vectors and (shape != wanted or len(shape) < 2):
        raise MetricError(
            f"metric {name!r} compares vectors, (B, D) each, not predictions {kind_of(predictions)} with targets "
            f"{kind_of(targets)}"
        )
    # (B, 1) against (B,) would broadcast to (B, B): a number, and the wrong one.
    if shape != wanted and (*shape, 1) != wanted and shape != (*wanted, 1):
        raise MetricError(
            f"metric {name!r}: predictions {kind_of(predictions)} and targets {kind_of(targets)} must have one "
            "shape, up to a trailing dimension of 1"
        )


def _each(name: str, weights: Tensor, targets: Tensor, shape: torch.Size) -> Tensor:
    found = spread(weights, shape)
    if found is None:
        raise misfit(name, weights, targets)
    return precise(found).reshape(-1)


def _elements(
    name: str, double: bool, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    _check_alike(name, False, predictions, targets)
    found = _real(predictions, double).reshape(-1), _real(targets, double).reshape(-1)
    return found if weights is None else (*found, _each(name, weights, targets, targets.shape))


def _cosines(name: str, predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
    _check_alike(name, True, predictions, targets)
    of, to = (_real(tensor.detach()).reshape(-1, tensor.shape[-1]) for tensor in (predictions, targets))
    found = cosine_similarity(of, to, reduction="none")
    return (found,) if weights is None else (found, _each(name, weights, targets, targets.shape[:-1]))


def _real(values: Tensor, double: bool = False) -> Tensor:
    """In single precision at least: sums of half-precision values round off."""
    if double:
        return values.double()
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _in_double(metric: torchmetrics.Metric, predictions: Tensor) -> torchmetrics.Metric:
    """Keep sums in double precision where there is one: a single-precision count stands still at 2^24."""
    return metric if predictions.device.type == "mps" else metric.set_dtype(torch.float64)
