"""benchmarks/data.py on data of a few samples: that it runs, and that those compared do the same."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import axontrain as ax
from benchmarks import data


@pytest.fixture
def pictures(tmp_path):
    """A file like CIFAR-10's, of pictures in one grey each, none of them black."""
    images = []
    for grey in range(100, 112):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(file, "JPEG")
        images.append(file.getvalue())
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": np.arange(12, dtype="uint8")}), tmp_path / data.FILE)
    return tmp_path / data.FILE


def test_in_memory_all_contenders_have_both_columns():
    part = data.in_memory(data.Shape(4, 3, 10, goal=1.0), rounds=2, passes=1)
    assert [len(row) for row in part.body] == [len(part.header)] * 3
    assert len(part.verdicts) == 2
    assert all(line.endswith(("met.", "missed.")) for line in part.verdicts)


def test_cifar_has_a_row_for_each_contender_and_number_of_workers(pictures):
    part = data.cifar(pictures, rounds=1, images=8, size=4)
    assert sorted(row[1] for row in part.body) == ["0", "0", "0", "0", "2", "2"]


def test_the_ways_to_crop_and_flip_differ_in_their_draws_alone(pictures):
    images, labels = data.decoded(pictures)
    table = ax.data.TableDataset(pictures, decode=data.augmented)
    batch, of = data.augmented_batch((images, labels))
    assert of.tolist() == labels.tolist()
    for index in range(len(images)):
        samples = table[index], data.Pictures(pictures)[index], data.Decoded(images, labels)[index], (batch[index], index)
        for sample, label in samples:
            assert sample.shape == (3, 32, 32)
            assert sample.dtype == torch.float32
            assert int(label) == index
            # A grey picture, cropped out of a black border: its grey and black, of which there is less than the most cut off.
            assert set(sample.unique().tolist()) <= {0.0, float(images[index].max() / 255)}
            assert (sample > 0).sum() >= 3 * 28 * 28


def test_a_batch_is_cropped_and_flipped_as_its_draws_say(monkeypatch):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    draws = iter([torch.tensor([[4], [0]]), torch.tensor([[4], [8]])])  # rows, columns; 4 is the middle
    monkeypatch.setattr(torch, "randint", lambda *_: next(draws))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor([[0.0], [1.0]]))
    batch, _ = data.augmented_batch((images, torch.zeros(2)))
    padded = torch.nn.functional.pad(images, (4,) * 4)
    assert (batch[0] * 255).round().equal(images[0].float())
    assert (batch[1] * 255).round().equal(padded[1, :, 0:32, 8:40].flip(-1).float())


def test_the_cases_of_memory_give_batches(tmp_path):
    for make in data.CASES.values():
        loader = make(tmp_path)
        loader.workers = 0
        assert len(next(iter(loader))) == 2


def test_goals():
    assert data.verdict("x", 1.15, 1.15).endswith("met.")
    assert data.verdict("x", 5.1, 5, " MB") == "x: 5.1 MB, the goal is ≤ 5 MB: missed."
    assert data.ratios({"a": [1.0, 4.0], "b": [2.0, 2.0]}, "a", "b") == [0.5, 2.0]
