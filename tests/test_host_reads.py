"""What counts as a host read: each way there is to make one, once, and nothing else."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from axontrain.execution.reads import METHODS, HostReads

VALUES, LABELS = torch.arange(3.0), torch.tensor([0, 2, 1])

READING = {
    "item": (lambda: VALUES[0].item(), "item"),
    "float": (lambda: float(VALUES[0]), "item"),
    "int": (lambda: int(LABELS[0]), "item"),
    "bool": (lambda: bool(VALUES[0] > 1), "item"),
    "if": (lambda: 1 if VALUES.sum() > 2 else 0, "item"),
    "index": (lambda: ["a", "b", "c"][LABELS[0]], "item"),
    "in": (lambda: 2.0 in VALUES, "item"),
    "format of one": (lambda: f"{VALUES[0]:.3f}", "item"),
    "format of many": (lambda: f"{VALUES}", "print"),
    "repr": (lambda: repr(VALUES), "print"),
    "print": (lambda: print(VALUES[0]), "print"),
    "tolist": (lambda: VALUES.tolist(), "tolist"),
    "tolist of one": (lambda: VALUES[0].tolist(), "tolist"),
    "numpy": (lambda: VALUES.numpy(), "numpy"),
    "asarray": (lambda: np.asarray(VALUES), "numpy"),
    "cpu": (lambda: VALUES.cpu(), "cpu"),
    "mask": (lambda: VALUES[VALUES > 1], "mask index"),
    "mask among indices": (lambda: VALUES.repeat(2, 1)[:, VALUES > 1], "mask index"),
    "masked assignment": (lambda: VALUES.clone().__setitem__(VALUES > 0, torch.ones(2)), "mask assignment"),
    "masked_select": (lambda: VALUES.masked_select(VALUES > 1), "masked_select"),
    "nonzero": (lambda: VALUES.nonzero(), "nonzero"),
    "where": (lambda: torch.where(VALUES > 1), "nonzero"),
    "argwhere": (lambda: torch.argwhere(VALUES), "nonzero"),
    "unique": (lambda: VALUES.unique(), "unique"),
    "unique of rows": (lambda: VALUES.repeat(2, 1).unique(dim=0), "unique"),
    "unique_consecutive": (lambda: VALUES.unique_consecutive(), "unique_consecutive"),
    "bincount": (lambda: LABELS.bincount(), "bincount"),
    "equal": (lambda: torch.equal(VALUES, VALUES), "equal"),
    "allclose": (lambda: torch.allclose(VALUES, VALUES), "allclose"),
    "repeats": (lambda: VALUES.repeat_interleave(LABELS), "repeat_interleave"),
    "inverse": (lambda: torch.linalg.inv(torch.eye(3)), "check of torch.linalg"),
}

READING_NOTHING = {
    "where": lambda: torch.where(VALUES > 1, VALUES, 0.0).sum(),
    "fill": lambda: VALUES.clone().masked_fill_(VALUES > 1, 0.0),
    "a number where a mask is": lambda: VALUES.clone().__setitem__(VALUES > 1, 0.0),
    "index": lambda: VALUES[LABELS] + VALUES[1] + VALUES[:2].sum(),
    "indexed assignment": lambda: VALUES.clone().__setitem__(LABELS, VALUES),
    "repeats of known size": lambda: VALUES.repeat_interleave(LABELS, output_size=3),
    "shape": lambda: (len(VALUES), VALUES.shape, VALUES.numel(), VALUES.dtype, VALUES.is_floating_point()),
    "copy": lambda: VALUES.clone().to(torch.float64).copy_(VALUES),
    "nonzero of known size": lambda: VALUES.nonzero_static(size=2),
    "loss": lambda: F.cross_entropy(VALUES.repeat(3, 1).requires_grad_(), LABELS).backward(),
    "iteration": lambda: [row + 1 for row in VALUES],
}


@pytest.mark.parametrize("way", READING)
def test_each_way_to_read_is_seen_once(way, capsys):
    function, word = READING[way]
    words = []
    with HostReads(words.append):
        function()
    assert words == [word]


@pytest.mark.parametrize("way", READING_NOTHING)
def test_what_reads_nothing_is_not_told(way):
    words = []
    with HostReads(words.append):
        READING_NOTHING[way]()
    assert words == []


def test_who_is_told_can_refuse_and_torch_is_as_before():
    before = {name: vars(torch.Tensor).get(name) for name in METHODS}

    def refuse(word):
        raise RuntimeError(word)

    for function, word in READING.values():
        with pytest.raises(RuntimeError, match=word), HostReads(refuse):
            function()
    assert {name: vars(torch.Tensor).get(name) for name in METHODS} == before
    assert VALUES.tolist() == [0.0, 1.0, 2.0]


def test_one_within_another_and_entered_again():
    inner, outer = [], []
    one, other = HostReads(outer.append), HostReads(inner.append)
    for _ in range(2):
        with one:
            VALUES.tolist()
            with other:
                VALUES.tolist()
                VALUES[0].item()
            VALUES.sum().item()
    assert outer == ["tolist", "tolist", "item", "item"] * 2
    assert inner == ["tolist", "item"] * 2


# Of tensors on a GPU that is not there; in a process of its own, as it may not end well.
SCRIPT = """
import json, os, sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from axontrain.execution.reads import HostReads

words, told = [], {}
with FakeTensorMode():
    there, here = torch.empty(4, device="cuda"), torch.empty(4)
    ways = {
        "to": lambda: there.to("cpu"),
        "to, later": lambda: there.to("cpu", non_blocking=True),
        "cpu": lambda: there.cpu(),
        "copy_": lambda: here.copy_(there),
        "copy_, later": lambda: here.copy_(there, non_blocking=True),
        "tensor": lambda: torch.tensor([1.0], device="cuda"),
        "equal there": lambda: torch.equal(there, there),
        "equal here": lambda: torch.equal(here, here),
        "cpu here": lambda: here.cpu(),
    }
    for way, function in ways.items():
        words.clear()
        with HostReads(words.append, torch.device("cuda")):
            try:
                function()
            except Exception:  # for there are no values
                pass
        told[way] = list(words)
print(json.dumps(told), flush=True)
os._exit(0)
"""


def test_of_a_loop_on_a_gpu_copies_between_devices_are_told_and_what_lies_on_the_cpu_is_not():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "to": ["copy to the host"],
        "to, later": [],
        "cpu": ["cpu"],
        "copy_": ["copy to the host"],
        "copy_, later": [],
        "tensor": ["copy to the device without non_blocking=True"],
        "equal there": ["equal"],
        "equal here": [],
        "cpu here": [],
    }
