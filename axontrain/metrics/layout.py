"""How predictions and targets stand to each other: the task of a batch, by shapes and dtypes.

What a classification metric needs to know is read off the shapes and dtypes of the first batch, never off values
(that would wait for the device). B is the batch, C the classes or labels, ``...`` any further dimensions:

==================  ==================  ===========================  ==================================================
predictions         targets             task                         remark
==================  ==================  ===========================  ==================================================
float (B, C, ...)   int (B, ...)        multiclass, C classes        as ``cross_entropy`` takes them
float (B, T, V)     int (B, T)          multiclass, V classes        language models: classes last; if T == V then
                                                                     dimension 1 is taken, as ``cross_entropy`` would
float (B, C, ...)   float (B, C, ...)   multiclass, C classes        class probabilities: the largest is the target; they
                                                                     are in 0..1 and add up to 1
float (B, C, ...)   int (B, C, ...)     multilabel, C labels         logits or probabilities, one per label
float (B,)          int or float (B,)   binary                       logits or probabilities; a float target is in 0..1,
                                                                     positive above 1/2; a dimension of 1 on either side
                                                                     is squeezed: (B, 1), (B, 1, H, W)
int (B, ...)        int (B, ...)        none: classes, not scores    accuracy alone; the number of classes is unknown
==================  ==================  ===========================  ==================================================

C is at least 2 (1 is binary), and bool counts as int in targets and as a score in predictions. Multilabel targets that
``binary_cross_entropy`` wants as floats look like class probabilities: give the Step ``targets.bool()``. Multiclass
metrics leave out targets equal to -100, the ``ignore_index`` of ``cross_entropy``.

Float targets that are no probabilities, as those of a regression, make a reading of a classification metric an error.

Binary and multilabel scores are taken for probabilities if all that were seen lie in 0..1, else for logits: torchmetrics'
rule. Logits that all happen to lie there are counted by the wrong border, 1/2 for 0, so where that may be, be explicit:
give the Step ``predictions.sigmoid()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from axontrain.errors import MetricError, kind_of
from axontrain.objective import spread


@dataclass(frozen=True, slots=True)
class Layout:
    """How predictions and targets stand to each other: one row of the table of this module.

    ``size`` is the number of classes or labels (1 if binary, 0 for ``task == "labels"``, which are predictions that
    are classes already), and ``dim`` the dimension of the predictions that holds them.
    """

    task: Literal["binary", "multiclass", "multilabel", "labels"]
    size: int
    dim: int = 1

    def strange(self, targets: Tensor) -> Tensor | None:
        """Tell which float targets are no probabilities (of regression, or multilabel); None for integers.

        >>> Layout("binary", 1).strange(torch.tensor([0.0, 0.9, 3.2]))
        tensor([False, False,  True])
        """
        if not targets.is_floating_point():
            return None
        strange = ~((targets >= 0) & (targets <= 1))  # NaN too
        if self.task == "multiclass":
            # As much as half-precision probabilities of many classes may round off.
            strange = strange.any(1) | ((targets.sum(1, dtype=torch.float32) - 1).abs() > 0.02)
        return strange

    def targets(self, targets: Tensor) -> Tensor:
        """Return the targets as int64: class indices, or 0 and 1."""
        if targets.is_floating_point():
            targets = targets.argmax(1) if self.task == "multiclass" else targets > 0.5
        return targets.long()

    def weights(self, name: str, weights: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """Spread sample weights over what is counted, in double precision: class indices, or binary and label targets.

        >>> layout, labels = Layout("multiclass", 5, -1), torch.zeros(2, 3, dtype=torch.long)
        >>> layout.weights("f1", torch.tensor([1, 2]), torch.randn(2, 3, 5), labels).tolist()
        [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]

        Raises:
            MetricError: if they fit neither samples nor targets.
        """
        shape = targets.shape
        if self.task == "multiclass" and targets.is_floating_point():
            shape = shape[:1] + shape[2:]
        each = spread(weights, shape, predictions.shape) if self.task == "binary" else spread(weights, shape)
        if each is None and self.task == "multilabel":  # one for each pixel, of all its labels
            each = spread(weights, shape[:1] + shape[2:])
            each = None if each is None else each.unsqueeze(1).expand(shape)
        if each is None:
            raise misfit(name, weights, targets)
        return precise(each)

    def align(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Bring a batch to the shapes torchmetrics takes: classes in dimension 1, or two tensors of one shape.

        A binary target that is no probability becomes 2: torchmetrics says that it expects 0 and 1.

        >>> predictions, targets = torch.randn(2, 7, 5), torch.zeros(2, 7, dtype=torch.long)
        >>> layout = infer("f1", predictions, targets)
        >>> layout.task, layout.size
        ('multiclass', 5)
        >>> [tuple(tensor.shape) for tensor in layout.align(predictions, targets)]
        [(2, 5, 7), (2, 7)]
        """
        if self.task == "multiclass" and self.dim != 1:
            predictions = predictions.movedim(self.dim, 1)
        strange, targets = self.strange(targets), self.targets(targets)
        if self.task == "binary" and strange is not None:
            targets = targets.masked_fill(strange, 2)
        if self.task == "binary" and predictions.shape != targets.shape:
            shape = min(predictions.shape, targets.shape, key=len)
            predictions, targets = predictions.reshape(shape), targets.reshape(shape)
        return predictions, targets


def infer(name: str, predictions: Tensor, targets: Tensor) -> Layout:
    """Find the task of a batch by shapes and dtypes: the table of this module.

    >>> infer("f1", torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    Layout(task='multiclass', size=3, dim=1)
    >>> infer("f1", torch.randn(8, 1), torch.zeros(8))
    Layout(task='binary', size=1, dim=1)

    Raises:
        MetricError: if they fit no row.
    """
    scores = predictions.is_floating_point() or predictions.dtype is torch.bool
    soft = targets.is_floating_point()
    shape, wanted = predictions.shape, targets.shape
    layout: Layout | None = None
    if shape == wanted and shape:
        size = shape[1] if len(shape) > 1 else 1
        if scores:
            layout = Layout("binary" if size == 1 else "multiclass" if soft else "multilabel", size)
        elif not soft and not predictions.is_complex():
            layout = Layout("labels", 0)
    elif scores:
        if (dim := _extra(shape, wanted)) is not None:
            size = shape[dim]
            if size == 1 or not soft:
                layout = Layout("binary" if size == 1 else "multiclass", size, dim)
        elif (dim := _extra(wanted, shape)) is not None and wanted[dim] == 1:
            layout = Layout("binary", 1)
    if layout is None or (layout.task == "multiclass" and not predictions.is_floating_point()):
        raise MetricError(
            f"metric {name!r}: predictions {kind_of(predictions)} and targets {kind_of(targets)} fit no classification "
            "task: scores (B, C, ...) or (B, T, C) go with class indices (B, ...), scores of the targets' own shape "
            "with labels. If yours is another task, pass a torchmetrics instance or a function"
        )
    return layout


def precise(weights: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return weights.to(torch.float32 if weights.device.type == "mps" else torch.float64)


def misfit(name: str, weights: Tensor, targets: object) -> MetricError:
    """The error for weights of another shape than the data."""
    return MetricError(
        f"metric {name!r}: the Step's sample_weights are {kind_of(weights)}, and targets {kind_of(targets)}: weights are (B,), "
        "one a sample, or of the targets' shape"
    )


def _extra(longer: torch.Size, shorter: torch.Size) -> int | None:
    """Find the dimension without which one shape is the other: 1 before -1, as cross_entropy has it."""
    if len(longer) < 2 or len(longer) != len(shorter) + 1:
        return None
    if longer[:1] + longer[2:] == shorter:
        return 1
    return -1 if longer[:-1] == shorter else None
