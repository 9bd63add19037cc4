"""Optimizer: which algorithm updates which parameters, how fast, and within what bounds.

It is a description: nothing is bound to parameters until a Loop takes it, so one Optimizer may serve many Loops.
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from axontrain import averages, schedules
from axontrain.errors import ConfigurationError, OptimizerError, kind_of, require, unknown, whole

Predicate = Callable[[str, nn.Parameter], bool]
Selection = str | Predicate | type[nn.Module]
# Layers whose parameters are scales and shifts, of whatever shape.
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Optimizer:
    """An optimizer to be bound to the parameters of an objective.

    Args:
        factory: a name ("sgd", "adam", "adamw", "muon", ...), a ``torch.optim`` class, or any callable that takes
            parameters (or parameter groups) and returns a ``torch.optim.Optimizer``. Of one that averages by itself and has
            ``train()`` and ``eval()``, as the schedule-free ones of the extra ``schedulefree`` do ("adamwschedulefree",
            "radamschedulefree", "sgdschedulefree"), it is the average that is evaluated, saved and exported.
        lr: the base learning rate; a schedule's factor multiplies it.
        schedule: a function of progress in 0..1 that gives a factor (:mod:`axontrain.schedules`), or a torch scheduler
            factory such as ``lambda optimizer: StepLR(optimizer, 10)``, stepped once a step. Which of the two it is, is
            found out by calling it with 0.0.
        clip_norm: scale gradients down so that their norm over all parameters is at most this. A norm that is too large for
            float32 (above about 1e19) counts as not finite.
        clip_value: clamp each gradient element to within ± this; before ``clip_norm`` where both are given.
        groups: ``{selection: options}``. A selection is a glob over parameter names (``"*.bias"``), a predicate of
            ``(name, parameter)``, or a module type (``nn.Embedding``), whose own parameters are meant. Options are the
            optimizer's (``lr``, ``weight_decay``, ...); with ``optimizer=`` a group has an algorithm of its own. What no
            group matches has the options given here. :func:`layerwise` makes groups of learning rates.
        no_decay: no weight decay for biases, scales and the parameters of normalisation layers: those of fewer than two
            dimensions and those of BatchNorm, LayerNorm, GroupNorm and RMSNorm. What a group says itself goes before.
        params: the parameters it takes, as a pattern, a list of patterns, a predicate or a module type; without it a lone
            Optimizer takes all, and one in a dict takes the submodule of its name.
        on_nonfinite: what to do with an update whose loss or gradients are not finite: "skip" it on the device, without
            a host read, and warn at the next reading; or "raise" at once, at the cost of a host read each step.
        average: "ema" or "swa", or :func:`axontrain.averages.ema` or :func:`~axontrain.averages.swa` with arguments: what is
            evaluated, predicted with, saved and exported is the average of the weights; training goes on with the others.
        closure: the algorithm's step evaluates loss and gradients by itself, by a closure that computes them of the batch anew
            with the same random numbers. Unless given, it is so where ``step`` cannot do without one, as that of LBFGS.
        in_backward: update each parameter within the backward pass, as soon as its gradient is there, and free that: then
            there is never more than a gradient or two at a time. An update that is not finite is then left out parameter by
            parameter, and what needs all gradients at once is refused: ``clip_norm``, microbatches, the scaling of "fp16",
            ``on_nonfinite="raise"``, closures, callbacks with ``after_backward``.
        patience: so many skipped in a row are an error, raised at the next reading.
        **kwargs: options of the algorithm, as ``weight_decay=0.01``.

    Algorithms run fused wherever torch can and nothing was said otherwise (``fused=False``).

    >>> Optimizer("adamw", lr=1e-3, weight_decay=0.1, no_decay=True, groups={nn.Embedding: {"lr": 1e-4}})
    Optimizer('adamw', lr=0.001)

    Raises:
        ConfigurationError: for a name, an option or a value that cannot work.
    """

    def __init__(
        self,
        factory: str | type[torch.optim.Optimizer] | Callable[..., torch.optim.Optimizer],
        *,
        lr: float,
        schedule: Callable[..., Any] | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        groups: Mapping[Selection, Mapping[str, Any]] | None = None,
        no_decay: bool = False,
        params: Selection | Sequence[str] | None = None,
        average: str | averages.EMA | averages.SWA | None = None,
        closure: bool | None = None,
        in_backward: bool = False,
        on_nonfinite: str = "skip",
        patience: int = 10,
        **kwargs: Any,
    ) -> None:
        self.factory = _factory(factory)
        self.name = factory if isinstance(factory, str) else getattr(factory, "__name__", type(factory).__name__)
        self.lr = _number("lr", lr, at_least=0.0)
        self.schedule = schedule
        self.clip_norm = None if clip_norm is None else _number("clip_norm", clip_norm, above=0.0)
        self.clip_value = None if clip_value is None else _number("clip_value", clip_value, above=0.0)
        if not isinstance(groups, (Mapping, type(None))):
            raise ConfigurationError(
                f"groups={kind_of(groups)}: a mapping of selections to options, as groups={{'net.0.*': dict(lr=1e-4), "
                f"nn.Embedding: dict(weight_decay=0.0)}}"
            )
        self.groups = dict(groups or {})
        if not isinstance(no_decay, bool):
            raise ConfigurationError(f"no_decay={no_decay!r}: True or False")
        self.no_decay = no_decay
        self.params = params
        self.average = averages.parse(average)
        if closure is not None and not isinstance(closure, bool):
            raise ConfigurationError(f"closure={closure!r}: True or False; what it evaluates is train_step")
        self.closure = _needs_closure(self.factory) if closure is None else closure
        if not self.closure and _needs_closure(self.factory):
            raise ConfigurationError(f"closure=False: {self.name} steps by evaluating a closure; leave it out")
        if self.factory is torch.optim.LBFGS and (clip_norm is not None or clip_value is not None):
            raise ConfigurationError(
                "LBFGS compares gradients with the loss's differences, which clipped ones are not of: leave clip_norm and "
                "clip_value out"
            )
        if on_nonfinite not in ("skip", "raise"):
            raise unknown("on_nonfinite", on_nonfinite, ("skip", "raise"))
        self.on_nonfinite = on_nonfinite
        if not isinstance(in_backward, bool):
            raise ConfigurationError(f"in_backward={in_backward!r}: True or False")
        self.in_backward = in_backward
        if in_backward:
            self._check_in_backward()
        self.patience = whole("patience", patience, what="of updates")
        if schedule is not None and not callable(schedule):
            raise ConfigurationError(f"schedule={schedule!r}: a function of progress, or a torch scheduler factory")
        name = getattr(schedule, "__name__", "")
        if schedule is not None and getattr(schedules, name, None) is schedule:
            raise ConfigurationError(f"schedule={name}: call it, as in ax.schedules.{name}()")
        self.kwargs = kwargs
        _check_options(self.factory, self.name, kwargs)
        if no_decay and isinstance(self.factory, type) and "weight_decay" not in _accepted(self.factory):
            raise ConfigurationError(f"no_decay=True has no effect: {self.name} has no weight_decay")
        for selection, options in self.groups.items():
            if not isinstance(selection, str) and not callable(selection):
                raise ConfigurationError(
                    f"groups: {selection!r} is neither a pattern, nor a predicate(name, parameter), nor a module type"
                )
            if not isinstance(options, Mapping):
                raise ConfigurationError(f"groups[{selection!r}] is {kind_of(options)}; it is a mapping of options")
            own = dict(options)
            factory_of_group = _factory(own.pop("optimizer")) if "optimizer" in own else self.factory
            if factory_of_group is not self.factory and (self.closure or _needs_closure(factory_of_group)):
                other = getattr(factory_of_group, "__name__", "optimizer")
                raise ConfigurationError(
                    f"groups[{_shown(selection)}]: {other} beside {self.name}, of which one evaluates the loss by itself: it "
                    f"has to train all parameters"
                )
            _check_options(factory_of_group, getattr(factory_of_group, "__name__", "optimizer"), own, group=selection)

    def _check_in_backward(self) -> None:
        """Refuse what needs all gradients at once, of which there is one at a time."""
        if self.clip_norm is not None:
            raise ConfigurationError(
                "in_backward=True with clip_norm: the norm over all gradients is known with the last, when the others are used "
                "and freed; clip_value= bounds each element by itself"
            )
        if self.closure:
            raise ConfigurationError(
                f"in_backward=True: {self.name} evaluates the loss by itself, for which it needs all gradients; leave it out"
            )
        if self.on_nonfinite == "raise":
            raise ConfigurationError(
                "in_backward=True with on_nonfinite='raise', which promises that nothing was updated: by the time that a "
                "gradient is not finite others are used. Without it, patience=1 raises at the next reading"
            )

    def __repr__(self) -> str:
        return f"Optimizer({self.name!r}, lr={self.lr:g})"


@dataclass(slots=True)
class Part:
    """One torch optimizer to be: its factory, and its groups of named parameters with their options."""

    factory: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    groups: list[tuple[dict[str, nn.Parameter], dict[str, Any]]]


def named(optimizer: Any) -> dict[str, Optimizer]:
    """The optimizers of a Loop by name; a lone one is "main"."""
    by_name = {} if optimizer is None else dict(optimizer) if isinstance(optimizer, Mapping) else {MAIN: optimizer}
    for name, one in by_name.items():
        if not isinstance(one, Optimizer):
            raise ConfigurationError(
                f"the optimizer {name!r} is {kind_of(one)}; it is an ax.Optimizer, as ax.Optimizer('adamw', lr=1e-3)"
            )
    return by_name


def route(module: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, dict[str, nn.Parameter]]:
    """Give each optimizer its parameters, by name.

    Raises:
        OptimizerError: where a selection matches nothing, or two optimizers cover one parameter.
    """
    parameters = dict(module.named_parameters())
    taken: dict[str, dict[str, nn.Parameter]] = {}
    for name, optimizer in optimizers.items():
        if optimizer.params is not None:
            found = selected(parameters, optimizer.params, f"params= of the optimizer {name!r}", _owners(module))
        elif len(optimizers) == 1 and name == MAIN:
            found = parameters
        else:
            found = {key: p for key, p in parameters.items() if key == name or key.startswith(f"{name}.")}
            if not found:
                children = [child for child, _ in module.named_children()]
                raise unknown(f"optimizer of {type(module).__name__}:", name, children, _PARAMS_HINT)
        taken[name] = found
    owners: dict[int, str] = {}
    twice = []
    for name, found in taken.items():
        for key, parameter in found.items():
            if owners.setdefault(id(parameter), name) != name:
                twice.append(f"{key} (by {owners[id(parameter)]!r} and {name!r})")
    if twice:
        raise OptimizerError(f"parameters covered by two optimizers: {_some(twice)}; narrow one of them with params=")
    return taken


def check_covered(module: nn.Module, taken: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """Raise if there are trainable parameters that would never be trained.

    Raises:
        OptimizerError: naming them.
    """
    covered = {id(p) for found in taken.values() for p in found.values()}
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in covered]
    if names:
        raise OptimizerError(
            f"no optimizer covers {_some(names)}: give an Optimizer for them, or freeze them by parameter.requires_grad_(False)"
        )


def layerwise(patterns: Sequence[str], *, lr: float, decay: float) -> dict[Selection, Mapping[str, Any]]:
    """Groups whose learning rate falls with their distance from the output (Howard and Ruder 2018, arXiv:1801.06146).

    Args:
        patterns: of the layers, from the input to the output.
        lr: of the last; each before it has ``decay`` times that of the one behind it.
        decay: above 0, at most 1.

    >>> layerwise(["embedding.*", "blocks.0.*", "blocks.1.*"], lr=1e-3, decay=0.5)
    {'embedding.*': {'lr': 0.00025}, 'blocks.0.*': {'lr': 0.0005}, 'blocks.1.*': {'lr': 0.001}}

    Raises:
        ConfigurationError: for a decay or a rate out of bounds, or a pattern twice.
    """
    lr, decay = _number("lr", lr, at_least=0.0), _number("decay", decay, above=0.0)
    if decay > 1:
        raise ConfigurationError(f"decay={decay!r}: at most 1, as layers near the input are to learn more slowly")
    if isinstance(patterns, str) or len(set(patterns)) != len(patterns):
        raise ConfigurationError(f"layerwise({patterns!r}): a list of patterns, each once, from the input to the output")
    return {pattern: {"lr": lr * decay ** (len(patterns) - 1 - depth)} for depth, pattern in enumerate(patterns)}


def parts(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], module: nn.Module | None = None) -> list[Part]:
    """Divide parameters into groups, and the groups among torch optimizers; ``module`` has them, where types are asked for.

    Raises:
        OptimizerError: where a group matches nothing, or two groups match one parameter.
    """
    rest = dict(parameters)
    main = Part(optimizer.factory, {"lr": optimizer.lr, **optimizer.kwargs}, [])
    found: list[Part] = [main]
    matched: dict[str, Selection] = {}
    owners = _owners(module)
    for selection, options in optimizer.groups.items():
        chosen = selected(parameters, selection, "groups of the optimizer", owners)
        twice = [name for name in chosen if name in matched]
        if twice:
            raise OptimizerError(
                f"parameters matched by two groups ({_shown(matched[twice[0]])} and {_shown(selection)}): {_some(twice)}; "
                f"narrow one of them"
            )
        matched.update(dict.fromkeys(chosen, selection))
        for name in chosen:
            del rest[name]
        own = dict(options)
        if "optimizer" not in own:
            main.groups.append((chosen, own))
            continue
        factory = _factory(own.pop("optimizer"))
        found.append(Part(factory, {"lr": optimizer.lr, **own}, [(chosen, {})]))
    if rest:
        main.groups.insert(0, (rest, {}))
    if optimizer.no_decay:
        for part in found:
            if "weight_decay" in _accepted(part.factory):
                part.groups = [divided for group in part.groups for divided in _without_decay(*group, owners)]
    return [part for part in found if part.groups]


Owners = Mapping[int, Sequence[nn.Module]]  # of parameters, by id


def _owners(module: nn.Module | None) -> Owners:
    owners: dict[int, list[nn.Module]] = {}
    for part in () if module is None else module.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(part)
    return owners


def _without_decay(
    parameters: dict[str, nn.Parameter], options: dict[str, Any], owners: Owners
) -> list[tuple[dict[str, nn.Parameter], dict[str, Any]]]:
    """A group, and apart from it those of its parameters that have no weight decay."""
    if "weight_decay" in options:
        return [(parameters, options)]
    spared = {
        name: p
        for name, p in parameters.items()
        if p.ndim < 2 or any(isinstance(owner, NORMS) for owner in owners.get(id(p), ()))
    }
    decayed = {name: p for name, p in parameters.items() if name not in spared}
    groups = [(decayed, options), (spared, {**options, "weight_decay": 0.0})]
    return [group for group in groups if group[0]]


def build(part: Part, fused: bool) -> tuple[torch.optim.Optimizer, bool]:
    """Make a torch optimizer, fused where torch can and nothing was said otherwise; returns it and whether it is fused."""
    factory, options = part.factory, dict(part.options)
    groups = [{"params": list(parameters.values()), **own} for parameters, own in part.groups]
    tensors = [p for group in groups for p in group["params"]]
    accepted = _accepted(factory)
    takes_lr = "lr" in accepted or "**" in accepted
    if not takes_lr:
        options.pop("lr")
    said = {"fused", "foreach", "capturable", "differentiable"} & set(options)
    attempts = [options]
    can_fuse = fused and isinstance(factory, type) and "fused" in accepted and not said
    # Fused SGD of torch 2.13 leaves parameters of 16 bits on the CPU as they are, without a word.
    broken = factory is torch.optim.SGD and any(p.device.type == "cpu" and p.dtype.itemsize < 4 for p in tensors)
    if can_fuse and not broken and not options.get("dampening") and not any(p.is_complex() for p in tensors):
        attempts.insert(0, {**options, "fused": True})
    if "capturable" in accepted and not said and any(p.is_cuda for p in tensors):
        attempts[-1] = {**options, "capturable": True}  # keeps its step counts on the device
    for attempt in attempts:
        try:
            optimizer = factory(groups, **attempt)
            break
        except RuntimeError:  # fused on a device or dtype that has no such kernel
            if attempt is attempts[-1]:
                raise
        except (TypeError, ValueError) as error:
            raise OptimizerError(
                f"{getattr(factory, '__name__', factory)} cannot be made for {len(tensors)} parameters "
                f"({', '.join(list(part.groups[0][0])[:4])}, ...): {error}{_advice(error)}"
            ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"the optimizer factory {factory!r} returned {optimizer!r}, no torch.optim.Optimizer")
    is_fused = bool(optimizer.param_groups and all(group.get("fused") for group in optimizer.param_groups))
    return optimizer, is_fused


def _advice(error: Exception) -> str:
    if "2D" in str(error):
        return ". Give the others a group: groups={lambda name, p: p.ndim != 2: dict(optimizer='adamw', lr=...)}"
    return ". Leave groups= and no_decay= out" if "per-parameter options" in str(error) else ""


MAIN = "main"
_PARAMS_HINT = "Without params= an optimizer in a dict takes the submodule of its name."


# Of the package of that name, Defazio et al. 2024 (arXiv:2405.15682); imported when one of them is asked for.
SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")


def names() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers of torch's by name: its classes in lower case."""
    found = {}
    for name in dir(torch.optim):
        value = getattr(torch.optim, name)
        if not isinstance(value, type) or not issubclass(value, torch.optim.Optimizer):
            continue
        if value is not torch.optim.Optimizer:
            found[name.lower()] = value
    return found


def _factory(factory: Any) -> Callable[..., torch.optim.Optimizer]:
    if isinstance(factory, str):
        known = names()
        for name in SCHEDULE_FREE:
            if factory.lower() == name.lower():
                return getattr(require("schedulefree", "schedulefree", f"the optimizer {factory!r}"), name)  # type: ignore[no-any-return]
        if factory.lower() not in known:
            every = [*known, *(name.lower() for name in SCHEDULE_FREE)]
            raise unknown("optimizer", factory, every, "A torch.optim class or any callable of parameters will do too.")
        factory = known[factory.lower()]
    if isinstance(factory, torch.optim.Optimizer):
        raise ConfigurationError(
            f"{type(factory).__name__}(...) is bound to parameters already: pass the class, and its options beside it, as "
            f"ax.Optimizer({type(factory).__name__}, lr=...)"
        )
    if not callable(factory):
        raise ConfigurationError(f"an optimizer is a name, a torch.optim class or a callable, not {kind_of(factory)}")
    return factory  # type: ignore[no-any-return]


def _needs_closure(factory: Any) -> bool:
    """Whether an optimizer's step has to be given a closure, as LBFGS's has."""
    step = inspect.signature(factory.step).parameters if hasattr(factory, "step") else {}
    return "closure" in step and step["closure"].default is inspect.Parameter.empty


def _check_options(factory: Any, name: str, options: Mapping[str, Any], group: Selection | None = None) -> None:
    if not isinstance(factory, type):
        return
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # it passes them on, and knows
        return
    accepted = [p for p in parameters if p not in ("self", "params")]
    for option in options:
        if option not in accepted:
            where = "" if group is None else f" in groups[{_shown(group)}]"
            raise unknown(f"option of {name}{where}:", option, [*accepted, *(OWN_OPTIONS if group is None else ["optimizer"])])


OWN_OPTIONS = (
    "schedule", "clip_norm", "clip_value", "groups", "no_decay", "params", "average", "closure", "in_backward", "on_nonfinite",
    "patience",
)  # fmt: skip


def selected(
    parameters: Mapping[str, nn.Parameter], selection: Selection | Sequence[str], where: str, owners: Owners | None = None
) -> dict[str, nn.Parameter]:
    """Those of the parameters that a selection means, by name; ``where`` is what an error calls it.

    Raises:
        OptimizerError: if it matches nothing, or one of its patterns does not.
    """
    if isinstance(selection, type) and issubclass(selection, nn.Module):
        found = {
            name: p
            for name, p in parameters.items()
            if any(isinstance(owner, selection) for owner in (owners or {}).get(id(p), ()))
        }
    elif callable(selection):
        predicate: Callable[..., Any] = selection
        found = {name: p for name, p in parameters.items() if predicate(name, p)}
    else:
        patterns = [selection] if isinstance(selection, str) else list(selection)
        found = {}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ConfigurationError(f"{where}: {kind_of(pattern)} is neither a pattern nor a predicate")
            matches = {name: p for name, p in parameters.items() if fnmatch.fnmatchcase(name, pattern)}
            if not matches:
                raise OptimizerError(f"{where}: {pattern!r} matches no parameter of {_some(list(parameters))}")
            found.update(matches)
    if not found:
        raise OptimizerError(f"{where}: {_shown(selection)} matches no parameter of {_some(list(parameters))}")
    return found


def _shown(selection: Any) -> str:
    return getattr(selection, "__name__", repr(selection)) if callable(selection) else repr(selection)


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:8]) + (f", ... ({len(items)} in all)" if len(items) > 8 else "")


def _number(name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise ConfigurationError(f"{name}={value!r}: a number{', and not text' if isinstance(value, str) else ''}")
    number = float(value)
    if not math.isfinite(number):
        raise ConfigurationError(f"{name}={value!r}: a finite number")
    if at_least is not None and not number >= at_least:
        raise ConfigurationError(f"{name}={value!r}: {at_least:g} or more")
    if above is not None and not number > above:
        raise ConfigurationError(f"{name}={value!r}: above {above:g}")
    return number


def _accepted(factory: Any) -> set[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return {"**"}
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
