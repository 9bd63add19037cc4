"""A copy of an objective, to try things on; and what its code changes around it meanwhile, as it was afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor

from axontrain.data.structure import tensors
from axontrain.execution.beginning import Around
from axontrain.execution.contents import Contents
from axontrain.objective import Objective


def copied(objective: Objective) -> Objective:
    """A copy; results that a module keeps, as its last activations, which torch does not copy, are detached in it."""
    kept: dict[int, Tensor] = {}
    for module in objective.modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                kept |= {id(one): one.detach().clone() for one in tensors(value) if one.grad_fn is not None}
    return copy.deepcopy(objective, kept)


@contextlib.contextmanager
def untouched(objective: Objective) -> Iterator[Around]:
    """Leave what a copy shares with the objective as it was: global variables, closures, attributes of classes.

    What there is of it in the objective itself, too; not its parameters and buffers, nor the global random generators. What
    cannot be put back is told by ``left``. What another thread writes there meanwhile is taken for the trial's, and put back.

    >>> seen = []
    >>> def note(value):
    ...     seen.append(value)
    >>> objective = Objective()
    >>> objective.note = note
    >>> with untouched(objective):
    ...     copied(objective).note(2)
    ...     print(seen)
    [2]
    >>> seen
    []
    """
    around = Around(objective)
    try:
        yield around
    finally:
        try:
            around.put_back()
        except Exception as error:  # of the user's
            around.left = f"what code of the objective changes elsewhere cannot be put back: {type(error).__name__}: {error}"


def shared(around: Around, copy: Objective) -> list[str]:
    """The iterators and queues of which a copy has none of its own, in words."""
    taken = around.surroundings.contents.taken
    its = {id(value) for _, value in Contents(copy).taken} if taken else set()
    return [f"{name} has no copy of its own: what a trial takes from it is gone" for name, value in taken if id(value) in its]
