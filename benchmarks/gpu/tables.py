"""From runs to tables, and what they say of the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.gpu.contenders import CONTENDERS

Turns = dict[int, dict[str, Any]]  # by round
TARGET_MFU = 0.40


@dataclass
class Found:
    """What was measured of one workload."""

    name: str
    title: str
    tolerance: float
    goal: float | None = None  # the accuracy of which the time is told
    extra: Mapping[str, float] = field(default_factory=dict)
    peak: float | None = None  # FLOP/s of the device
    turns: dict[str, Turns] = field(default_factory=dict)  # by contender
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)  # what a contender said at its end
    failures: dict[str, str] = field(default_factory=dict)

    def middle(self, contender: str, key: str) -> float:
        """The median over rounds."""
        return median(turn[key] for turn in self.turns[contender].values())

    def against(self, names: Iterable[str]) -> str | None:
        """The fastest of some contenders."""
        there = [name for name in names if self.turns.get(name)]
        return min(there, key=lambda name: self.middle(name, "seconds"), default=None)

    def reference(self) -> str | None:
        """Who is 1.00."""
        return self.against(name for name, contender in CONTENDERS.items() if self.name in contender.of)

    def ratios(self, contender: str, against: str, key: str = "seconds") -> list[float]:
        """A contender's time over another's, round by round."""
        theirs = self.turns.get(against, {})
        return [turn[key] / theirs[number][key] for number, turn in self.turns.get(contender, {}).items() if number in theirs]

    def loss(self, contender: str) -> float | None:
        """The final loss: of the training that went on, or the median of several."""
        if "loss" in self.ends.get(contender, {}):
            return float(self.ends[contender]["loss"])
        if self.turns.get(contender) and all("loss" in turn for turn in self.turns[contender].values()):
            return self.middle(contender, "loss")
        return None

    def differs(self, contender: str) -> str:
        """In what a contender's training is another than the reference's; "" where it is the same."""
        reference = self.reference()
        ours, theirs = self.loss(contender), None if reference is None else self.loss(reference)
        if ours is None or theirs is None:
            return "" if contender in self.failures or reference in (None, contender) else "no final loss"
        if not abs(ours - theirs) <= self.tolerance * abs(theirs):  # written so that NaN differs
            return f"final loss {ours:.4f}, and not {theirs:.4f}"
        settings, wanted = (self.ends.get(name, {}).get("settings", {}) for name in (contender, reference))
        others = [f"{name}={value}" for name, value in settings.items() if wanted and wanted[name] != value]
        return f"torch's settings: {', '.join(others)}" if others else ""


def spread(values: list[float]) -> str:
    """The median and the range."""
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def rows(found: list[Found], titles: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """The table of ratios, with a column for each workload: header and body."""
    body = []
    for name, title in titles.items():
        cells = [_ratio(one, name) for one in found]
        if any(cell != "–" for cell in cells):
            body.append([title, *cells])
    return ["contender", *(one.title for one in found)], body


def _ratio(found: Found, name: str) -> str:
    if name in found.failures:
        return "failed"
    reference = found.reference()
    if reference is None or not (shares := found.ratios(name, reference)):
        return "–"
    return spread(shares) + (" differs" if found.differs(name) else "")


def figures(found: list[Found], titles: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """The table of figures as they are: header and body."""
    columns = [(f"{one.title}: {head}", one, show) for one in found for head, show in COLUMNS[one.name].items()]
    columns = [column for column in columns if column[1].turns]
    body = []
    for name, title in titles.items():
        cells = [show(one, name) if one.turns.get(name) else "–" for _, one, show in columns]
        if any(cell != "–" for cell in cells):
            body.append([title, *cells])
    return ["contender", *(head for head, _, _ in columns)], body


def _to_accuracy(found: Found, name: str) -> str:
    accuracy = found.middle(name, "accuracy")
    seconds = f"{found.middle(name, 'whole'):.2f}"
    return seconds if found.goal is not None and accuracy >= found.goal else f"({seconds})"


def _mfu(found: Found, name: str) -> str:
    share = mfu(found, name)
    return "–" if share is None else f"{100 * share:.1f} %"


def mfu(found: Found, name: str) -> float | None:
    """Model FLOPs utilization, 0 to 1; None where the device's peak is not known."""
    if found.peak is None:
        return None
    return found.extra["flops"] / found.middle(name, "seconds") / found.peak


def _peak(found: Found, name: str) -> str:
    most = max(turn["peak"] for turn in found.turns[name].values())
    return f"{most:,.0f}" if most else "–"


def _final(found: Found, name: str) -> str:
    loss = found.loss(name)
    return "–" if loss is None else f"{loss:.4f}"


COLUMNS = {
    "cifar": {
        "s/epoch": lambda found, name: f"{found.middle(name, 'seconds'):.4f}",
        "s to 94 %": _to_accuracy,
        "accuracy": lambda found, name: f"{100 * found.middle(name, 'accuracy'):.2f} %",
        "loss": _final,
        "MiB": _peak,
    },
    "gpt": {
        "tokens/s": lambda found, name: f"{found.extra['tokens'] / found.middle(name, 'seconds'):,.0f}",
        "MFU": _mfu,
        "loss": _final,
        "MiB": _peak,
    },
    "mlp": {
        "µs/step": lambda found, name: f"{found.middle(name, 'seconds') * 1e6:.1f}",
        "loss": _final,
        "MiB": _peak,
    },
}


def verdicts(found: list[Found], *, judged: bool) -> list[str]:
    """A line for each target: the figure, and whether it is met; where it is not ``judged``, the figure alone."""
    lines: list[str] = []
    for one in found:
        lines += TARGETS[one.name](one, judged)
    return lines


def _verdict(what: str, values: list[float], target: str, met: bool | None, judged: bool) -> str:
    if not values or met is None:
        return f"{what}: target {target}: not measured."
    said = ("met" if met else "missed") if judged else "not judged"
    return f"{what}: target {target}: {said}, {_times(values)}."


def _times(values: list[float]) -> str:
    return f"{median(values):.2f} × ({min(values):.2f}–{max(values):.2f})"


def _at_most(what: str, values: list[float], most: float, judged: bool) -> str:
    return _verdict(what, values, f"≤ {most:.2f} ×", median(values) <= most if values else None, judged)


def _of_cifar(found: Found, judged: bool) -> list[str]:
    fastest = found.reference()
    if fastest is None:
        return [_at_most("CIFAR-10, axontrain beside the loop by hand", [], 1.02, judged)]
    lines = [
        _at_most(f"CIFAR-10, {what}, axontrain beside the fastest ({CONTENDERS[fastest].title})", values, 1.02, judged)
        for what, values in (
            ("an epoch", found.ratios("axontrain", fastest)),
            ("all of a training", found.ratios("axontrain", fastest, "whole")),
        )
    ]
    for name, contender in CONTENDERS.items():
        if "cifar" in contender.of and name != fastest and (values := found.ratios("axontrain", name)):
            lines.append(f"CIFAR-10, an epoch, axontrain beside {contender.title}: {_times(values)}.")
    if found.goal is not None and found.turns.get("axontrain"):
        accuracy, goal = found.middle("axontrain", "accuracy"), found.goal
        said = "reached" if accuracy >= goal else "not reached"
        lines.append(f"CIFAR-10, accuracy of axontrain: {100 * accuracy:.2f} %; {100 * goal:.0f} % is {said}.")
    return lines


def _of_gpt(found: Found, judged: bool) -> list[str]:
    shares = [1 / share for share in found.ratios("axontrain", "by_hand")]
    met = median(shares) >= 1 if shares else None
    lines = [_verdict("GPT, tokens/s of axontrain beside the loop by hand", shares, "≥ 1.00 ×", met, judged)]
    if found.turns.get("axontrain") and (share := mfu(found, "axontrain")) is not None:
        said = ("met" if share >= TARGET_MFU else "missed") if judged else "not judged"
        lines.append(f"GPT, MFU of axontrain: aim ≥ {100 * TARGET_MFU:.0f} % on an H100: {said}, {100 * share:.1f} %.")
    return lines


def _of_mlp(found: Found, judged: bool) -> list[str]:
    to_graph = found.ratios("axontrain_graph", "cuda_graph")
    faster = [1 / share for share in found.ratios("axontrain_graph", "by_hand")]
    met = median(faster) >= 3 if faster else None
    return [
        _at_most("MLP, a step of axontrain with graph=True beside a CUDA graph by hand", to_graph, 1.05, judged),
        _verdict("MLP, axontrain with graph=True faster than the loop by hand in eager", faster, "≥ 3 ×", met, judged),
    ]


TARGETS = {"cifar": _of_cifar, "gpt": _of_gpt, "mlp": _of_mlp}
