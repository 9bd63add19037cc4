import math
import sys
from html.parser import HTMLParser

import pytest

import axontrain as ax
from axontrain import display


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (3, "3"),
        (-12345678, "-12345678"),
        (True, "True"),
        (0.5, "0.5"),
        (0.123456, "0.1235"),
        (1e-9, "1e-09"),
        (9999.4, "9999"),
        (12345.678, "1.2346e+04"),
        (-12345.678, "-1.2346e+04"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0.0, "0"),
    ],
)
def test_numbers_are_written_shortly(value, text):
    assert display.number(value) == text


def rows(count):
    return [{"epoch": index // 10, "step": index, "train/loss": 1 / (index + 1)} for index in range(count)]


def test_columns_are_counters_first_and_single_numbers_alone():
    assert display.columns([{"a": 1.0, "step": 1}, {"epoch": 0, "b": 2, "text": "x", "list": [1]}]) == [
        "epoch",
        "step",
        "a",
        "b",
    ]


def test_missing_cells_are_empty():
    table = display.text_table([{"step": 1, "a": 1.0}, {"step": 2, "b": 2.0}])
    assert table.splitlines() == ["step  a  b", "   1  1   ", "   2     2"]


@pytest.mark.parametrize("count", [1, 40, 41, 1000])
def test_long_tables_show_their_beginning_and_their_end(count):
    lines = display.text_table(rows(count)).splitlines()
    assert len(lines) == min(count, 41) + 1
    assert lines[1].split()[1] == "0"
    assert lines[-1].split()[1] == str(count - 1)
    assert len({len(line) for line in lines}) == 1
    assert (["..."] * 3 in map(str.split, lines)) is (count > 40)


class Cells(HTMLParser):
    """The text of each cell, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in ("td", "th", "caption"):
            self.cells.append("")

    def handle_data(self, data):
        self.cells[-1] += data


def test_html_has_the_same_cells():
    found = Cells(display.html_table([{"step": 1, "a": 0.5}, {"step": 2}], "a caption"))
    assert found.cells == ["a caption", "step", "a", "1", "0.5", "2", ""]


def test_html_of_evil_names_has_no_tags_of_theirs():
    evil = "</th><script>alert(1)</script><img src=x onerror=alert(1)>"
    found = Cells(display.html_table([{evil: 1.0}], evil))
    assert found.cells == [evil, evil, "1"]
    assert set(found.tags) == {"table", "caption", "thead", "tbody", "tr", "th", "td"}


def test_one_row_has_no_curve():
    assert "<img" not in display.rich(rows(1), "")


def test_curves_are_a_png_drawn_without_pyplot(tmp_path):
    pytest.importorskip("matplotlib")
    loaded = "matplotlib.pyplot" in sys.modules
    png = display.curve_png(
        [{"step": 1, "train/loss": 1.0, "val/loss": 2.0, "acc": math.nan}, {"step": 2, "train/loss": math.inf}]
    )
    assert png.startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) is loaded
    assert display.save_curve(rows(100), tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_a_picture_still():
    pytest.importorskip("matplotlib")
    assert display.curve_png([]).startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_table_and_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert display.rich(rows(3), "") == display.html_table(rows(3))
    with pytest.raises(ax.MissingExtraError, match=r"a learning curve needs matplotlib, .*axontrain\[plot\]"):
        display.curve_png(rows(3))
