"""What a metric's name stands for, and how the first batch completes it.

:func:`register` gives a name to a metric, :func:`resolve` turns what a user listed into :class:`MetricSpec` values, and
:func:`build` makes one of them for the predictions and targets of the first batch. The mathematics is torchmetrics';
it takes seconds to import, so nothing here imports it before the first metric is built.

Names: ``accuracy``, ``top{k}`` for any k, ``precision``, ``recall``, ``f1``, ``auroc``, ``average_precision``,
``confusion_matrix``, ``dice``, ``iou``, ``perplexity``, ``mse``, ``rmse``, ``mae``, ``r2``, ``cosine_similarity``:
what each computes, and with which average, stands in :mod:`axontrain.metrics.names`.

What a classification metric needs to know, its classes and its task, is read off the shapes and dtypes of the first batch,
never off values (that would wait for the device): :mod:`axontrain.metrics.layout` has the table.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from axontrain.errors import ConfigurationError, MetricError, kind_of, unknown
from axontrain.host import Fetch, placed, travels
from axontrain.metrics.layout import Layout, infer
from axontrain.objective import batch_size, of_torch
from axontrain.readings import Reading, at_once

if TYPE_CHECKING:
    import torchmetrics

__all__ = ["BUILT_IN", "Built", "Entry", "MetricSpec", "build", "register", "registered", "resolve", "unweighted"]

BUILT_IN = (
    "accuracy",
    "auroc",
    "average_precision",
    "confusion_matrix",
    "cosine_similarity",
    "dice",
    "f1",
    "iou",
    "mae",
    "mse",
    "perplexity",
    "precision",
    "r2",
    "recall",
    "rmse",
)

_TOP = re.compile(r"top([1-9][0-9]*)")
_TASK_WORDS = frozenset({"num_classes", "num_labels", "task"})
_BATCH_WORDS = frozenset({"predictions", "targets"})
_FORMS = (
    "a metric is made by (1) a callable without required arguments that returns a torchmetrics.Metric; "
    "(2) a callable, or a torchmetrics.Metric class, whose required arguments are among num_classes, num_labels, "
    "task, predictions and targets; or (3) a function of (predictions, targets) or of (predictions, targets, weights) that "
    "returns the batch's mean"
)
# What a function, or the update of a torchmetrics object, may call the weights of samples.
_WEIGHT_WORDS = ("weights", "weight", "sample_weights", "sample_weight", "w")


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """What a name stands for.

    ``factory`` is any of the forms that :func:`register` takes. ``joinable`` promises that one update with several
    batches joined along dimension 0 equals one update for each, so that the accumulator may join them. If not ``weighted``,
    sample weights are kept from it (:func:`unweighted`).

    >>> MetricSpec("gap", lambda predictions, targets: (predictions - targets).abs().mean()).joinable
    False
    """

    name: str
    factory: Callable[..., Any]
    joinable: bool = False
    weighted: bool = True


Entry: TypeAlias = MetricSpec
"""What :func:`resolve` gives for each name and :func:`build` takes."""


def _as_they_are(predictions: Any, targets: Any) -> tuple[Any, ...]:
    return predictions, targets


PREPARED = "(prepared)"  # no name that a parameter could have


@dataclass(frozen=True, slots=True)
class Built:
    """A metric made for the data at hand: either ``function`` or ``metric`` is set.

    ``function(predictions, targets, weights=None)`` gives a scalar tensor for one batch, to be averaged weighted by items.
    ``metric`` is fresh, on the predictions' device, and updated by ``metric.update(*prepare(predictions, targets))``.
    ``weights`` says how sample weights reach either: by ``prepare``, or as the parameter of that name; empty if they are kept
    from it, and None if it cannot take any. ``twin`` is the same metric on the host, where its states are read to, so that
    what computes its value may look at numbers; None where the value is computed on the metric's device.

    >>> built = build("mse", resolve(["mse"])["mse"], torch.ones(4, 1), torch.zeros(4))
    >>> built.metric.update(*built.prepare(torch.ones(4, 1), torch.zeros(4)))
    >>> built.read(built.metric.compute())
    1.0
    """

    name: str
    function: Callable[..., Tensor] | None = None
    metric: torchmetrics.Metric | None = None
    prepare: Callable[..., tuple[Any, ...]] = _as_they_are
    joinable: bool = False
    weights: str | None = None
    twin: torchmetrics.Metric | None = None

    def taken(self, weights: Tensor) -> Tensor | None:
        """Return the weights if the metric takes them, None if they are kept from it.

        Raises:
            MetricError: if it does neither.
        """
        if self.weights:
            return weights
        if self.weights is None:
            kind = "function" if self.function is not None else type(self.metric).__name__
            raise MetricError(
                f"metric {self.name!r} is a {kind} that takes no sample weights, and this Step has some ({kind_of(weights)}): "
                "write a function of (predictions, targets, weights) that returns the weighted mean of the batch, or a "
                f"torchmetrics.Metric with update(predictions, targets, weights); or say that all samples count alike: "
                f"metrics={{{self.name!r}: ax.metrics.unweighted(...)}}"
            )
        return None

    def update(self, metric: Any, predictions: Any, targets: Any, weights: Tensor) -> None:
        """Update ``metric``, or a clone of it, by a batch with weights."""
        if self.weights == PREPARED:
            metric.update(*self.prepare(predictions, targets, weights))
        else:
            metric.update(*self.prepare(predictions, targets), **{str(self.weights): weights})

    def read(self, value: Any) -> Any:
        """Turn what ``compute`` gave into host values; on a GPU this waits for the device.

        A scalar becomes a float, any other tensor a nested list, a sequence of tensors a list of those, and a mapping a
        flat dict; of one within another the keys become ``outer/inner``.

        >>> Built("matrix").read(torch.tensor([[3, 1], [0, 4]]))
        [[3, 1], [0, 4]]
        >>> Built("boxes").read({"map": torch.tensor(0.5)})
        {'map': 0.5}

        Raises:
            MetricError: if there is something else in it.
        """
        return at_once(self.reading(value))

    def reading(self, value: Any) -> Reading[Any]:
        """The same as a reading, which waits for nothing that need not be waited for."""
        found: list[Tensor] = []
        _read(self.name, value, found.append)
        fetch = Fetch(found)
        yield [fetch]
        numbers = iter(fetch.values())
        return _read(self.name, value, lambda tensor: next(numbers) if tensor.ndim else float(next(numbers)))


def _read(name: str, value: Any, read: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return read(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, part in value.items():
            inner = _read(name, part, read)
            flat |= {f"{key}/{of}": it for of, it in inner.items()} if isinstance(inner, dict) else {str(key): inner}
        return flat
    if isinstance(value, (tuple, list)):
        return [_read(name, part, read) for part in value]
    raise MetricError(f"metric {name!r} computed {kind_of(value)}: it must be a tensor, or a dict or list of them")


# --- names and forms -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    """The factory of a built-in name: like a user's, it has all it needs from the batch."""

    name: str

    def __call__(self, name: str, predictions: Tensor, targets: Tensor) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
        from axontrain.metrics import names  # here, because it imports torchmetrics

        return names.make(self.name, name, predictions, targets)


_specs: dict[str, MetricSpec] = {name: MetricSpec(name, _BuiltIn(name), joinable=True) for name in BUILT_IN}


def register(name: str, factory: Callable[..., Any], *, overwrite: bool = False) -> None:
    """Give a name to a metric, for every objective and Loop of this process.

    ``factory`` is one of:

    1. a callable without required arguments that returns a fresh ``torchmetrics.Metric``;
    2. a callable, or a ``torchmetrics.Metric`` class, whose required arguments are among ``num_classes``,
       ``num_labels``, ``task``, ``predictions`` and ``targets``: they are filled in from the first batch, as are
       arguments of these names whose default is None. If it takes one of the first three, its updates get the batch in
       the layout that these describe (:meth:`Layout.align`); otherwise just as the Step has it;
    3. a function of two arguments, (predictions, targets), that returns the batch's mean as a scalar tensor: these are
       averaged over the batches, weighted by items. A mean of means is not every metric: F1 needs form 1 or 2;
    4. a function of three, (predictions, targets, weights), that returns the weighted mean, averaged by the sums of weights.
       The third may have a default. If it has none, and a batch no weights, it is given ones.

    Of a batch with sample weights (:class:`~axontrain.Step`), names and form 4 take them, and so do torchmetrics objects
    whose ``update`` has a parameter named weights, weight, sample_weights or sample_weight. Others are an error there, unless
    :func:`unweighted` says that they need none.

    Binary scores that all lie in 0..1 are taken for probabilities, by torchmetrics too (which looks at each update by
    itself): if yours may be logits, give the Step ``predictions.sigmoid()``, or pass a function of your own.

    >>> def specificity(task, num_labels=None, num_classes=None):
    ...     from torchmetrics import Specificity
    ...
    ...     return Specificity(task, num_classes=num_classes, num_labels=num_labels)
    >>> register("specificity", specificity, overwrite=True)
    >>> "specificity" in registered()
    True

    Raises:
        ConfigurationError: if the name is taken and ``overwrite`` is not set, or is reserved, or the factory has none
            of these forms.
    """
    _check_name(name)
    if not overwrite and (name in _specs or _TOP.fullmatch(name)):
        raise ConfigurationError(f"the metric {name!r} exists already: pass overwrite=True to replace it")
    _form(name, factory)
    _specs[name] = MetricSpec(name, factory)


def unweighted(metric: Any) -> MetricSpec:
    """Make a metric that counts all samples alike, whatever their weights: to be listed among the others.

    Args:
        metric: a name, a function, a ``torchmetrics.Metric`` instance, class or factory: what a list of metrics may hold. A
            function's value is then averaged over the batches by their numbers of samples.

    >>> list(resolve([unweighted("accuracy"), "f1"]))
    ['accuracy', 'f1']
    >>> list(resolve({"weighted": "accuracy", "plain": unweighted("accuracy")}))
    ['weighted', 'plain']

    Raises:
        UnknownNameError: if it is a name that is not registered.
        ConfigurationError: if it is no metric, or a collection of several.
    """
    if _is_collection(metric) or isinstance(metric, (list, tuple, Mapping)):
        raise ConfigurationError(f"unweighted(...) takes one metric, not {kind_of(metric)}: call it on each of them")
    named = not callable(metric) or isinstance(metric, (nn.Module, type))
    name = next(_named([metric]))[0] if named else getattr(metric, "__name__", "<lambda>")
    return replace(_entry(name, metric), name="" if name == "<lambda>" else name, weighted=False)


def registered() -> tuple[str, ...]:
    """Return the names that a list of metrics may hold, sorted; ``top{k}`` goes without saying.

    >>> "accuracy" in registered(), "loss" in registered()
    (True, False)
    """
    return tuple(sorted(_specs))


def resolve(specs: Any) -> dict[str, Entry]:
    """Turn what a user listed into one spec for each name, in the user's order.

    ``specs`` is None, a list of names, functions, ``torchmetrics.Metric`` instances and :class:`MetricSpec` values, or
    a dict from the name in the readings to one of these or to a ``Metric`` class. In a list, a function goes by its own
    name and an instance by its class's: ``MulticlassF1Score`` is ``multiclass_f1_score``. Of a ``MetricCollection``
    each metric becomes an entry ``name/key``.

    >>> def bias(predictions, targets):
    ...     return (predictions - targets).mean()
    >>> list(resolve(["accuracy", "top5", bias]))
    ['accuracy', 'top5', 'bias']
    >>> resolve({"quality": "f1"})["quality"].name
    'f1'

    Raises:
        UnknownNameError: if a name is not registered; the nearest ones are offered.
        ConfigurationError: if a name comes twice, is no string or is reserved, or a value is no metric.
    """
    if specs is None:
        return {}
    if not isinstance(specs, (list, tuple, Mapping)):
        example = f"metrics=[{specs!r}]" if isinstance(specs, str) else "metrics=['accuracy']"
        raise ConfigurationError(f"metrics must be a list or a dict, not {kind_of(specs)}: {example}")
    entries: dict[str, Entry] = {}
    for name, value in specs.items() if isinstance(specs, Mapping) else _named(specs):
        _check_name(name)
        members = {f"{name}/{key}": of for key, of in value.items()} if _is_collection(value) else {name: value}
        for member, of in members.items():
            if member in entries:
                raise ConfigurationError(
                    f"two metrics are named {member!r}: metrics={{'name': ..., 'other': ...}} tells them apart"
                )
            entries[member] = _entry(member, of)
    return entries


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"a metric's name must be a string, not {name!r}")
    if name == "loss":
        raise ConfigurationError("the name 'loss' is reserved: the loss is always among the readings")


def _named(values: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Name each member of a list: by itself, or after its function or class."""
    for value in values:
        if isinstance(value, str):
            yield value, value
        elif isinstance(value, MetricSpec):
            if not value.name:
                raise ConfigurationError(f"{value.factory!r} has no name of its own: metrics={{'name': ...}} gives it one")
            yield value.name, value
        elif isinstance(value, (nn.Module, type)):
            words = (value if isinstance(value, type) else type(value)).__name__
            yield re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", words).lower(), value
        elif not callable(value):
            raise ConfigurationError(f"{value!r} is no metric: {_FORMS}; or it is a name or an instance")
        elif getattr(value, "__name__", "<lambda>") == "<lambda>":
            raise ConfigurationError(f"{value!r} has no name of its own: metrics={{'name': ...}} gives it one")
        else:
            yield value.__name__, value


def _entry(name: str, value: Any) -> Entry:
    if isinstance(value, str):
        if value in _specs:
            return _specs[value]
        if _TOP.fullmatch(value):
            return MetricSpec(value, _BuiltIn(value), joinable=True)
        raise unknown("metric", value, [*_specs, "top5"], "(top{k} for any k; ax.metrics.register adds a name.)")
    if isinstance(value, MetricSpec):
        _form(name, value.factory)
        return value
    if _is_metric(value):
        # A clone for each use: training and validation must never share a state.
        return MetricSpec(name, value.clone)
    if not callable(value):
        raise ConfigurationError(f"metric {name!r} is {kind_of(value)}: {_FORMS}; or it is a name or an instance")
    _form(name, value)
    return MetricSpec(name, value)


def _is_metric(value: object) -> bool:
    # Whoever holds a Metric has imported torchmetrics, so there is no need to do it here.
    loaded = sys.modules.get("torchmetrics")
    return loaded is not None and isinstance(value, loaded.Metric)


def _is_collection(value: object) -> bool:
    loaded = sys.modules.get("torchmetrics")
    return loaded is not None and isinstance(value, loaded.MetricCollection)


def _parameters(name: str, factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    # A module's __call__ takes anything; what it wants stands at forward.
    called = factory.forward if isinstance(factory, nn.Module) else factory
    try:
        found = inspect.signature(called).parameters
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"metric {name!r}: the arguments of {factory!r} cannot be read; wrap it in a function. In general, {_FORMS}"
        ) from None
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {word: parameter for word, parameter in found.items() if parameter.kind not in open_ended}


def _form(name: str, factory: object) -> Literal["metric", "function"]:
    """Tell a factory of metrics from a per-batch function by the arguments without a default."""
    if isinstance(factory, _BuiltIn):
        return "metric"
    if not callable(factory):
        raise ConfigurationError(f"metric {name!r} is {kind_of(factory)}: {_FORMS}")
    empty = inspect.Parameter.empty
    required = {word: p for word, p in _parameters(name, factory).items() if p.default is empty}
    if required.keys() <= _TASK_WORDS | _BATCH_WORDS and required.keys() != _BATCH_WORDS:
        return "metric"
    keyword_only = any(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in required.values())
    # A third argument is what it is called; a metric of (x, y, z) is more likely a mistake.
    third = len(required) == 3 and list(required)[2] in _WEIGHT_WORDS
    if (len(required) == 2 or third) and not keyword_only and not isinstance(factory, type):
        return "function"
    raise ConfigurationError(
        f"metric {name!r}: {getattr(factory, '__name__', factory)!s} requires ({', '.join(required)}), but {_FORMS}"
    )


def _weight_word(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The parameter that takes sample weights, which is none of the first two."""
    return next((word for word in list(parameters)[2:] if word in _WEIGHT_WORDS), None)


def _function_weights(name: str, function: Callable[..., Any]) -> str | None:
    """The same of a function, where a default other than None, or a ``weight`` of torch's (of classes), is another thing."""
    parameters = _parameters(name, function)
    word = None if of_torch(function) else _weight_word(parameters)
    return word if word and parameters[word].default in (inspect.Parameter.empty, None) else None


# --- a metric for the data at hand -----------------------------------------------------------------------------------


def build(name: str, spec: Entry, predictions: Any, targets: Any) -> Built:
    """Make a metric for the first batch: infer what it needs, put it on the predictions' device, reset it.

    ``name`` is the one in the readings, used in messages. Values are not read, so this does not wait for the device.

    >>> predictions, targets = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])
    >>> built = build("accuracy", resolve(["accuracy"])["accuracy"], predictions, targets)
    >>> built.metric.update(*built.prepare(predictions, targets))
    >>> built.read(built.metric.compute())
    0.5

    Raises:
        MetricError: if predictions or targets are missing or fit no task, or the factory makes no metric.
    """
    for what, value in (("predictions", predictions), ("targets", targets)):
        if value is None:
            raise MetricError(
                f"metric {name!r}: this objective's Step has no {what}: return Step(..., predictions=, targets=) from "
                "train_step (and from eval_step, if it is another)"
            )
    factory = spec.factory
    prepare: Callable[..., tuple[Any, ...]] = _as_they_are
    weights: str | None = PREPARED
    if isinstance(factory, _BuiltIn):
        _check_tensors(name, predictions, targets)
        metric, prepare = factory(name, predictions, targets)
    elif _form(name, factory) == "function":
        word = _function_weights(name, factory)
        return Built(name, _per_batch(name, factory, word), weights=word if spec.weighted else "")
    else:
        arguments, layout = _arguments(name, factory, predictions, targets)
        try:
            metric = factory(**arguments)
        except Exception as error:
            raise MetricError(f"metric {name!r} cannot be made: {error}") from error
        if not _is_metric(metric):
            raise MetricError(f"metric {name!r}: its factory returned {kind_of(metric)}, not a torchmetrics.Metric")
        if layout is not None:
            prepare = layout.align
        weights = _weight_word(inspect.signature(metric.update).parameters)
    metric.reset()
    device, twin = _device(predictions), None
    if device is not None and travels(device):
        # Of ours, whose states are all that it knows, the value is computed on the host.
        twin = metric.clone() if getattr(metric, "by_states", False) else None
        metric._apply(functools.partial(placed, device=device))  # as metric.to(device), which waits
    elif device is not None:
        metric = metric.to(device)
    return Built(name, None, metric, prepare, spec.joinable, weights if spec.weighted else "", twin)


def _check_tensors(name: str, predictions: object, targets: object) -> None:
    for what, value in (("predictions", predictions), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise MetricError(
                f"metric {name!r} reads {what} that are one tensor, and this objective's Step has {kind_of(value)}: "
                f"override train_step (and eval_step) to give the metrics the tensor meant, Step(..., {what}=), or use "
                "a function of (predictions, targets) as the metric"
            )


def _arguments(name: str, factory: Callable[..., Any], predictions: Any, targets: Any) -> tuple[dict[str, Any], Layout | None]:
    """Fill in what the factory asks for; the layout too, if it asked for any part of it."""
    parameters = _parameters(name, factory)
    empty = inspect.Parameter.empty
    required = {word for word, parameter in parameters.items() if parameter.default is empty}
    # A default other than None is the user's own choice: partial(Accuracy, task="multiclass", num_classes=10).
    wanted = required | {word for word, parameter in parameters.items() if parameter.default is None}
    known: dict[str, Any] = {"predictions": predictions, "targets": targets}
    layout = None
    if wanted & _TASK_WORDS:
        try:
            _check_tensors(name, predictions, targets)
            layout = infer(name, predictions, targets)
        except MetricError:
            if required & _TASK_WORDS:
                raise
    if layout is not None and layout.task != "labels":
        size = {"multiclass": "num_classes", "multilabel": "num_labels"}.get(layout.task)
        known |= {"task": layout.task, **({size: layout.size} if size else {})}
    missing = sorted(required - known.keys())
    if missing:
        task = layout.task if layout is not None and layout.task != "labels" else "classes instead of scores"
        raise MetricError(
            f"metric {name!r} needs {' and '.join(missing)}, which predictions {kind_of(predictions)} and targets "
            f"{kind_of(targets)} do not tell ({task}): register a function that gives it, or pass an instance"
        )
    arguments = {word: value for word, value in known.items() if word in wanted}
    return arguments, layout if arguments.keys() & _TASK_WORDS else None


def _per_batch(name: str, function: Callable[..., Any], word: str | None) -> Callable[..., Tensor]:
    """Hold a user's function to its contract: one scalar for each batch."""
    parameter = None if word is None else _parameters(name, function)[word]
    required = parameter is not None and parameter.default is inspect.Parameter.empty
    by_place = parameter is not None and parameter.kind is inspect.Parameter.POSITIONAL_ONLY

    @functools.wraps(function, updated=())
    def measure(predictions: Any, targets: Any, weights: Tensor | None = None) -> Tensor:
        if weights is None and required:
            weights = torch.ones(batch_size(predictions), device=_device(predictions))
        if weights is None:
            value = function(predictions, targets)
        else:
            value = (
                function(predictions, targets, weights) if by_place else function(predictions, targets, **{str(word): weights})
            )
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach().reshape(())
        if isinstance(value, numbers.Real):
            return torch.tensor(float(value))
        raise MetricError(
            f"metric {name!r} is a function of (predictions, targets), so it must return one scalar, the mean over the "
            f"batch; it returned {kind_of(value)}"
            + (". A factory takes num_classes, num_labels or task, or nothing at all" if _is_metric(value) else "")
        )

    return measure


def _device(value: object) -> torch.device | None:
    """Find the device of the first tensor in a structure: some metrics take lists of dicts (detection)."""
    if isinstance(value, Tensor):
        return value.device
    if isinstance(value, str):  # of which every part is a string again
        return None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return next((device for device in map(_device, parts) if device is not None), None)
