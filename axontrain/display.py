"""How readings look: as text, as an HTML table with a learning curve, and as a picture."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axontrain.errors import MissingExtraError, require
from axontrain.shown import plain

Rows = Sequence[Mapping[str, Any]]
COUNTERS = ("epoch", "step")
MOST_ROWS = 40


def columns(rows: Rows) -> list[str]:
    """The names in the rows, counters first, then in order of appearance; only those with single numbers.

    >>> columns([{"step": 1, "epoch": 0, "loss": 2.0}, {"step": 2, "epoch": 0, "acc": 0.5, "confusion": [[1]]}])
    ['epoch', 'step', 'loss', 'acc']
    """
    seen = {name: None for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    return [name for name in COUNTERS if name in seen] + [name for name in seen if name not in COUNTERS]


def number(value: Any) -> str:
    """Write a reading: four significant digits, or a whole number.

    >>> number(0.123456), number(12), number(None), number(float("nan"))
    ('0.1235', '12', '', 'nan')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if not math.isfinite(value) or abs(value) < 1e4 else f"{value:.4e}"
    return str(value)


def text_table(rows: Rows) -> str:
    """A table for a terminal; long ones show their beginning and their end.

    >>> print(text_table([{"epoch": 1, "step": 10, "train/loss": 0.5}]))
    epoch  step  train/loss
        1    10         0.5
    """
    names, shown = columns(rows), _shown(rows)
    body = [[number(row.get(name)) if row else "..." for name in names] for row in shown]
    cells = [[plain(name, None) for name in names], *body]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def html_table(rows: Rows, caption: str = "") -> str:
    """A table for a notebook. Everything in it is escaped: names come from users and from files."""
    names = columns(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(number(row.get(n)) if row else '…')}</td>" for n in names) + "</tr>"
        for row in _shown(rows)
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def rich(rows: Rows, caption: str) -> str:
    """A table and, where matplotlib is installed, the learning curves, for ``_repr_html_``."""
    table = html_table(rows, caption)
    if len(rows) < 2:
        return table
    try:
        picture = base64.b64encode(curve_png(rows)).decode()
    except MissingExtraError:
        return table
    return f'{table}<img alt="learning curves" src="data:image/png;base64,{picture}"/>'


def curve_png(rows: Rows) -> bytes:
    """Draw the readings over steps, train and validation of one reading in one panel, as a PNG.

    Raises:
        MissingExtraError: without matplotlib, the extra ``plot``.
    """
    # Figures are made without pyplot, whose global state belongs to the user's own plots.
    figure_of = require("matplotlib.figure", "plot", "a learning curve")
    panels: dict[str, list[str]] = {}
    for name in columns(rows):
        if name not in COUNTERS:
            panels.setdefault(name.partition("/")[2] or name, []).append(name)
    count = max(1, len(panels))
    across = min(count, 3)
    down = math.ceil(count / across)
    figure = figure_of.Figure(figsize=(4.2 * across, 3.1 * down), layout="constrained")
    for place, (panel, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, place)
        for name in names:
            points = [
                (row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
            ]
            if points:
                # A space in front: matplotlib leaves names that begin with _ out.
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else "", label=f" {name}")
                for text in axes.legend().get_texts():
                    text.set_parse_math(False)
        axes.set_title(panel, parse_math=False)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=90)
    return target.getvalue()


def save_curve(rows: Rows, path: Path) -> Path:
    """Write the learning curves as a PNG."""
    path.write_bytes(curve_png(rows))
    return path


def _shown(rows: Rows) -> list[Mapping[str, Any]]:
    if len(rows) <= MOST_ROWS:
        return list(rows)
    return [*rows[: MOST_ROWS // 2], {}, *rows[-MOST_ROWS // 2 :]]
