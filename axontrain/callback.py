"""Callback: the hook contract, and how hooks are found before a loop starts.

A hook that no callback overrides costs nothing: the loop holds None in its place.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from axontrain.clock import Cadence, Every
from axontrain.errors import ConfigurationError, kind_of, reject, unknown
from axontrain.state import LoopState, Stateful, Stop, StopEpoch

Answer = Stop | StopEpoch | None
Hook = Callable[[LoopState], Answer]

HOOKS = (
    "before_fit",
    "after_fit",
    "before_epoch",
    "after_epoch",
    "before_batch",
    "after_batch",
    "after_backward",
    "before_evaluate",
    "after_evaluate",
    "on_error",
)
# These belong to the run as a whole: a cadence says nothing about them.
ALWAYS = ("before_fit", "after_fit", "on_error")


class GoBack(Exception):  # noqa: N818  # as StopIteration, it is no error
    """What a hook raises for the fit to go on from a checkpoint, as if what came after it had not been.

    Args:
        path: of the checkpoint.
        then: called once the state is that of the checkpoint.
    """

    def __init__(self, path: Path, then: Callable[[], None]) -> None:
        super().__init__(f"back to {path}")
        self.path, self.then = path, then


class Callback:
    """What happens beside training: override the hooks that are wanted.

    Each takes the :class:`~axontrain.LoopState` and answers None, :class:`~axontrain.Stop` or
    :class:`~axontrain.StopEpoch`. A callback with ``state_dict`` and ``load_state_dict`` is saved and restored.

    Args:
        every: when it acts (see :class:`axontrain.Every`); unless given, on each occasion. The hooks around a fit and
            ``on_error`` are called in any case.
        first, after, before: see :class:`axontrain.Every`.

    >>> class Patience(Callback):
    ...     def after_epoch(self, state):
    ...         if state.values["train/loss"] > 10:
    ...             return Stop("the loss runs away")
    >>> class Typo(Callback):
    ...     def after_epochs(self, state): ...
    Traceback (most recent call last):
        ...
    axontrain.errors.UnknownNameError: unknown hook of Typo 'after_epochs': did you mean 'after_epoch' ...
    """

    every: Every | None = None
    given: dict[str, Any]
    cadences: dict[str, Cadence]  # of the present fit, by hook
    # Whether before_fit says by itself, from a state of its own, that it has ended the run that is resumed.
    restates = False
    # Hooks that are called on each occasion, ``every`` or not, and ask ``self.cadences[hook]`` by themselves.
    asks: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        every: Any = None,
        first: int | None = None,
        after: int | str | None = None,
        before: int | str | None = None,
        **others: Any,
    ) -> None:
        reject(others, type(self).__init__, Callback.__init__)
        if any(given is not None for given in (every, first, after, before)):
            self.every = Every.parse(every, first=first, after=after, before=before)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note what it was made with: a run that is resumed says what of it has changed."""
        made = super().__new__(cls)
        made.cadences = {}
        given = {str(number): value for number, value in enumerate(args)} | kwargs
        made.given = {name: value for name, value in given.items() if isinstance(value, (bool, int, float, str, type(None)))}
        return made

    @property
    def label(self) -> str:
        """What its state is saved under: two that could be taken for one another have two."""
        return type(self).__name__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if name.startswith(("before_", "after_", "on_")) and callable(value) and name not in HOOKS:
                raise unknown(f"hook of {cls.__name__}", name, HOOKS, "A method of your own has another beginning.")

    def before_fit(self, state: LoopState) -> Answer:
        """Before anything else of a fit."""

    def after_fit(self, state: LoopState) -> Answer:
        """After everything else of a fit, however it ended; its answer has nothing left to stop."""

    def before_epoch(self, state: LoopState) -> Answer:
        """Before the first batch of an epoch, or where a fit goes on within one.

        A run that is resumed within an epoch (``state.resumed``) has had it before: what is drawn there does not count, and
        what has a cadence is not called again; what it changes of the state would be changed twice.
        """

    def after_epoch(self, state: LoopState) -> Answer:
        """After the epoch was counted, validation, and the readings."""

    def before_batch(self, state: LoopState) -> Answer:
        """Before a batch is trained on; a stop leaves it out."""

    def after_batch(self, state: LoopState) -> Answer:
        """After the update, with ``state.last``."""

    def after_backward(self, state: LoopState) -> Answer:
        """Between backward and update: gradients as backward left them, unscaled and unclipped."""

    def before_evaluate(self, state: LoopState) -> Answer:
        """Before each validation; once more where one was interrupted and the run is resumed, as ``before_epoch``."""

    def after_evaluate(self, state: LoopState) -> Answer:
        """After each validation, its readings in ``state.values``."""

    def on_error(self, state: LoopState) -> Answer:
        """When an error ends the fit: ``state.error``. It is raised on afterwards."""


class Saver(Callback, abc.ABC):
    """A callback that acts last of all: after a step's validation, its readings, and every other callback.

    So what it saves is one and the same step. The engine asks beforehand when to look up for it.
    """

    failed = False  # whether the last save did

    @abc.abstractmethod
    def next_step(self, state: LoopState) -> float:
        """No step before this one needs it."""

    @abc.abstractmethod
    def seconds_left(self, state: LoopState) -> float:
        """How long it can wait, whatever the step."""

    @abc.abstractmethod
    def at_step_end(self, state: LoopState) -> None:
        """After a step, when the engine looks up; whether anything is due is the callback's to know."""

    @abc.abstractmethod
    def at_fit_end(self, state: LoopState) -> None:
        """At the end of a fit that no error has ended."""

    @abc.abstractmethod
    def close(self, state: LoopState) -> None:
        """At the very end, whatever ended it."""


class Looker(Callback, abc.ABC):
    """A callback that looks some steps later at what the device has found, so as not to wait for it.

    What it decides may not hang on when that arrives: it decides at a step that the count of steps tells, or before that where
    the engine has it settle: before a validation, an epoch's end, a save, and the end of a fit, all of which wait anyway.
    """

    @abc.abstractmethod
    def settle(self, state: LoopState) -> Answer:
        """Wait for what is under way, and act; nothing is to be done where nothing is."""


class Reader(Callback, abc.ABC):
    """A callback that the batches of training pass through, on their way from the data to the loop.

    So it sees when the loop asks for the next one, and when it gets it. Without one there is nothing in between.
    """

    # Whether what it does takes so long that those who look at the clock are to be through before: see in_order.
    takes_time = False

    @abc.abstractmethod
    def reading(self, batches: Iterator[Any], state: LoopState) -> Iterator[Any]:
        """The same batches, of a pass over the data or of what is left of it, each asked for when it is wanted."""


class FunctionCallback(Callback):
    """A function on a hook; what ``Loop.on`` makes."""

    def __init__(self, hook: str, function: Hook, **cadence: Any) -> None:
        if hook not in HOOKS:
            raise unknown("hook", hook, HOOKS)
        if not callable(function):
            raise ConfigurationError(f"on({hook!r}): {kind_of(function)} is no function of the state")
        super().__init__(**cadence)
        self.hook, self.function = hook, function
        setattr(self, hook, function)

    @property
    def label(self) -> str:
        return f"{self.hook}:{getattr(self.function, '__name__', 'function')}"

    def __repr__(self) -> str:
        return f"on({self.hook!r}, {getattr(self.function, '__name__', self.function)})"


class Hooks:
    """The hooks of one fit: for each name a function of the state, or None where nobody wants it."""

    __slots__ = (*HOOKS, "settle")

    before_fit: Callable[[LoopState], None] | None
    after_fit: Callable[[LoopState], None] | None
    before_epoch: Callable[[LoopState], None] | None
    after_epoch: Callable[[LoopState], None] | None
    before_batch: Callable[[LoopState], None] | None
    after_batch: Callable[[LoopState], None] | None
    after_backward: Callable[[LoopState], None] | None
    before_evaluate: Callable[[LoopState], None] | None
    after_evaluate: Callable[[LoopState], None] | None
    on_error: Callable[[LoopState], None] | None
    settle: Callable[[LoopState], None] | None  # of those that look later

    def __init__(self, callbacks: Iterable[Callback], state: LoopState, *, resumed: bool = False) -> None:
        named = keys(callbacks)
        for hook in HOOKS:
            wanted = []
            for key, callback in named.items():
                if not overrides(callback, hook):
                    continue
                cadence = None
                if callback.every is not None and hook not in ALWAYS:
                    cadence = state.cadence(f"{key}.{hook}", callback.every)
                    cadence.start(state, resumed=resumed)
                    callback.cadences[hook] = cadence
                    cadence = None if hook in callback.asks else cadence
                wanted.append((getattr(callback, hook), cadence, (key, callback.given)))
            setattr(self, hook, _caller(hook, wanted) if wanted else None)
        looking = [(one.settle, None, (key, one.given)) for key, one in named.items() if isinstance(one, Looker)]
        self.settle = _caller("settle", [*looking]) if looking else None


def keys(callbacks: Iterable[Callback]) -> dict[str, Callback]:
    """Name each callback by its class, so that its state finds it again; two of one name are numbered."""
    named: dict[str, Callback] = {}
    for callback in callbacks:
        base = key = callback.label
        number = 2
        while key in named:
            key, number = f"{base}#{number}", number + 1
        named[key] = callback
    return named


def stateful(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Those that take part in saving and restoring, by their keys."""
    return {key: one for key, one in keys(callbacks).items() if isinstance(one, Stateful)}


def overrides(callback: Callback, hook: str) -> bool:
    """Whether a callback does something on a hook."""
    return hook in vars(callback) or getattr(type(callback), hook) is not getattr(Callback, hook)


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks in the order in which they act: that in which they are given, but Readers that take time after the others.

    So what a profiler does, and what it writes, is no time of training, wherever it stands in the list.
    """
    given = list(callbacks)
    quick = [index for index, one in enumerate(given) if isinstance(one, Reader) and not one.takes_time]
    last = quick[-1] + 1 if quick else 0
    moved = [one for one in given[:last] if isinstance(one, Reader) and one.takes_time]
    return [*(one for one in given[:last] if one not in moved), *moved, *given[last:]]


def checked(callbacks: Any) -> list[Callback]:
    """The callbacks as a list, or an error that says what is none."""
    if isinstance(callbacks, Callback):
        callbacks = [callbacks]
    found = list(callbacks)
    for callback in found:
        if not isinstance(callback, Callback):
            hint = " (a class: call it)" if isinstance(callback, type) else ""
            raise ConfigurationError(
                f"callbacks: {kind_of(callback)}{hint} is no ax.Callback; a function becomes one by loop.on(hook)"
            )
    for callback in found:
        if hasattr(callback, "state_dict") != hasattr(callback, "load_state_dict"):
            raise ConfigurationError(f"callbacks: {callback!r} has one of state_dict and load_state_dict; a state needs both")
    for index, callback in enumerate(found):
        if any(callback is other for other in found[:index]):
            raise ConfigurationError(f"callbacks: {callback!r} is there twice, so it would count everything twice")
    return found


def _caller(hook: str, wanted: list[tuple[Hook, Cadence | None, tuple[str, dict[str, Any]]]]) -> Callable[[LoopState], None]:
    def call(state: LoopState) -> None:
        for function, cadence, who in wanted:
            if cadence is None or (not state.repeating and cadence.due(state)):
                answer = function(state)
                if answer is not None:
                    _take(answer, state, who)

    def _take(answer: Any, state: LoopState, who: tuple[str, dict[str, Any]]) -> None:
        if not isinstance(answer, (Stop, StopEpoch)):
            raise ConfigurationError(
                f"{hook} of {who[0]} returned {kind_of(answer)}; a hook returns None, ax.Stop(reason) or ax.StopEpoch(reason)"
            )
        if not isinstance(state.request, Stop):  # a Stop outranks a StopEpoch; the first of each kind gives the reason
            state.request, state.stopper = answer, who

    call.__name__ = ", ".join(key for _, _, (key, _) in wanted)  # by which reasons name them
    return call
