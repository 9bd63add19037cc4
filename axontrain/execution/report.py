"""How the steps of a Loop are computed: what ``loop.report()`` gives."""

from __future__ import annotations

import html
from dataclasses import dataclass, field


@dataclass(slots=True, repr=False)
class StepReport:
    """How the steps of a Loop are computed, and why so.

    Args:
        how: "eager"; "one graph", the whole step compiled; "in parts", forward and backward compiled where torch can.
        reason: why it is not one graph; "" where it is, or was not asked for.
        graphs: how many were compiled.
        recompilations: how many of them because a step fitted none of those before.
        changes: what it was that did not fit, in torch's words.
        compared: steps that were held against eager.
        seconds: spent on compiling and comparing.
        recorded: how many CUDA graphs were recorded, over all fits.
        replayed: steps that were replayed from one.
        held: steps that were done both ways, and were the same bits.
        others: steps that were of more kinds of batches than are recorded.
        rerecorded: what it was that an earlier recording had taken for given.
        update: why the update is done after a replay, and is not a part of it; "" where it is.
        not_replayed: why steps are not replayed; "" where they are, or it was not asked for.
        ratio: with ``graph="auto"``, what a replayed step took, as a part of what it took without; 0 where that was not timed.

    >>> print(StepReport("one graph", graphs=1, compared=3, seconds=4.2))
    steps are computed as one graph: 1 graph, 0 recompilations, 3 steps held against eager, 4.2 s of compiling
    """

    how: str
    reason: str = ""
    graphs: int = 0
    recompilations: int = 0
    changes: list[str] = field(default_factory=list)
    compared: int = 0
    seconds: float = 0.0
    recorded: int = 0
    replayed: int = 0
    held: int = 0
    others: int = 0
    rerecorded: list[str] = field(default_factory=list)
    update: str = ""
    not_replayed: str = ""
    ratio: float = 0.0

    def __str__(self) -> str:
        return "\n".join([*self._computed(), *self._replays()])

    def _computed(self) -> list[str]:
        head = f"steps are computed {'in eager' if self.how == 'eager' else self.how if 'in' in self.how else f'as {self.how}'}"
        why = f" ({self.reason})" if self.reason else ""
        if not self.graphs:
            return [f"{head}{why}"]
        counts = (
            f"{self.graphs} graph{'s' if self.graphs > 1 else ''}, {self.recompilations} "
            f"recompilation{'' if self.recompilations == 1 else 's'}, {self.compared} steps held against eager, "
            f"{self.seconds:.1f} s of compiling"
        )
        return [f"{head}{why}: {counts}", *(f"  recompiled: {change}" for change in self.changes)]

    def _replays(self) -> list[str]:
        counts = (
            f"{self.recorded} CUDA graph{'' if self.recorded == 1 else 's'} recorded, {self.held} steps held against the same "
            f"without, {self.replayed} replayed"
        )
        if self.not_replayed:
            return [f"steps are not replayed: {self.not_replayed}", *([f"  before: {counts}"] if self.recorded else [])]
        if not self.recorded:
            return []
        return [
            f"steps are replayed: {counts}",
            *([f"  a step takes {self.ratio:.2f} of what it takes without"] if self.ratio else []),
            *([f"  {self.others} steps were of further kinds of batches, and done as without"] if self.others else []),
            *([f"  the update is done after it: {self.update}"] if self.update else []),
            *(f"  recorded anew: {change}" for change in self.rerecorded),
        ]

    def __repr__(self) -> str:
        return f"<StepReport {self}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
