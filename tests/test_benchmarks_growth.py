"""benchmarks/growth.py at tiny sizes: tables and pictures come out, and those compared do the same."""

import dataclasses
import struct
import sys

import pytest
import torch

import axontrain as ax
from axontrain import Step
from axontrain.metrics import Meter
from benchmarks import growth


@pytest.fixture
def tiny(monkeypatch):
    """Two axes of one epoch each."""
    made = {
        "batch": growth.Axis("batch", "Batch", "samples", [growth.point(x, 4, batch=x, samples=64, width=8) for x in (8, 16)]),
        "metrics": growth.Axis("metrics", "Metrics", "metrics", [growth.with_metrics(("accuracy", "f1"), 4)], log=False),
    }
    monkeypatch.setattr(growth, "axes", lambda quick: made)
    return made


def pixels(path):
    """Width and height of what is a PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def cells(text):
    """The rows of all tables, without headers and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_tables_and_pictures_come_out(tiny, tmp_path, capsys):
    assert growth.main(["--rounds", "2", "--markdown", "--out", str(tmp_path / "plots")]) == 0
    told = capsys.readouterr().out
    assert [row[0] for row in cells(told)] == ["8", "16", "2"]
    assert all(row[-1] == "agree" for row in cells(told))
    assert "µs torchmetrics" in told
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in pictures] == ["batch.png", "metrics.png"]
    assert all(pixels(path) == (576, 504) and 5_000 < path.stat().st_size <= 60 * 1024 for path in pictures)


def test_who_does_another_training_is_named(tiny, tmp_path, capsys):
    def idle(job):
        with torch.no_grad():
            job.model[0].weight.mul_(3)
        return lambda: {"loss": 0.0}

    axis = tiny["batch"]
    other = dataclasses.replace(axis.points[0], others={growth.OURS: idle})
    tiny["batch"] = dataclasses.replace(axis, points=[other])
    assert growth.main(["--rounds", "1", "--markdown", "--only", "batch", "--out", str(tmp_path)]) == 1
    assert cells(capsys.readouterr().out)[0][-1].startswith("differs: axontrain ")


@pytest.mark.parametrize("value", [0.3, [[0.2, 0.9]], None, float("nan")])
def test_metrics_that_differ_are_named(value):
    ends = {"sums": (1.0, {"f1": [0.2, 0.8]}), "axontrain": (1.0, {"f1": value})}
    same = value == [[0.2, 0.9]]
    assert growth.disagreement(ends, "sums", 0.2) == ("" if same else "differs: f1 of axontrain")


def test_without_matplotlib_nothing_is_measured(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ax.MissingExtraError, match=r"needs matplotlib, .* pip install 'axontrain\[plot\]'"):
        growth.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("count", range(len(growth.METRICS) + 1))
def test_all_compute_the_same_metrics(count):
    names = growth.METRICS[:count]
    sums, collection, meter = growth.Sums(names), growth.Collection(names), Meter(list(names) or None)
    torch.manual_seed(0)
    for size in (32, 32, 7):
        logits, targets = torch.randn(size, growth.CLASSES), torch.randint(growth.CLASSES, (size,))
        sums.update(logits, targets)
        collection.update(logits, targets)
        meter.record(Step(torch.tensor(1.0), logits, targets, size))
    by_hand = {name: value.tolist() for name, value in sums.compute().items()}
    if sums.alone:
        by_hand["accuracy"] /= 71
    of_torchmetrics = {name: value.tolist() for name, value in collection.compute().items()}
    ours = {name: value for name, value in meter.read().items() if name != "loss"}
    for name in names:
        flat = [growth._numbers(of[name]) for of in (by_hand, of_torchmetrics, ours)]
        assert flat[0] == pytest.approx(flat[1], rel=1e-5) == flat[2]
    assert list(ours) == list(names) == list(by_hand)
    assert sorted(of_torchmetrics) == sorted(names)


def test_the_axes_grow_in_one_size_each():
    every = growth.axes(quick=False)
    assert list(every) == list(growth.axes(quick=True))
    for axis in every.values():
        x = [at.x for at in axis.points]
        assert len(x) >= 4
        assert x == sorted(set(x))
    assert [at.work.batch_size for at in every["batch"].points] == [at.x for at in every["batch"].points]
    assert [at.steps for at in every["steps"].points] == [at.x for at in every["steps"].points]
    assert [len(at.work.data()[0][0]) for at in every["dataset"].points[:3]] == [2**12, 2**14, 2**16]
    widths = [at.work.model()[0].out_features for at in every["width"].points]
    assert widths == [at.x for at in every["width"].points]
    layers = [sum(isinstance(one, torch.nn.ReLU) for one in at.work.model()) for at in every["depth"].points]
    assert layers == [at.x for at in every["depth"].points]


@pytest.mark.slow
def test_the_quick_command_has_a_picture_for_each_axis(tmp_path, capsys):
    assert growth.main(["--quick", "--rounds", "1", "--markdown", "--out", str(tmp_path)]) == 0
    assert len(cells(capsys.readouterr().out)) == 2 * len(growth.axes(quick=True))
    assert {path.stem for path in tmp_path.iterdir()} == set(growth.axes(quick=True))
    assert all(path.stat().st_size <= 60 * 1024 for path in tmp_path.iterdir())
