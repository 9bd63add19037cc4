"""What counts as a host read: each way there is to make one, once, and nothing else."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import one_hot

from axontrain.execution.reads import METHODS, HostReads

CPU = torch.device("cpu")  # what a script computes on, whatever that is
VALUES, LABELS = torch.arange(3.0), torch.tensor([0, 2, 1])

COPIED = "copy to the device without non_blocking=True"
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
    "one_hot": (lambda: F.one_hot(LABELS), "one_hot"),
    "one_hot imported": (lambda: one_hot(LABELS, -1), "one_hot"),
    "to the CPU": (lambda: VALUES.to("cpu"), "copy to the host"),
    "to the CPU by name": (lambda: VALUES.to(device=torch.device("cpu"), dtype=torch.float64), "copy to the host"),
    "a tensor of one": (lambda: torch.tensor([1.0, VALUES[0]]), "item"),
    "as_tensor": (lambda: torch.as_tensor([[1.0], [VALUES[0]]]), "item"),
    "numbers on a device": (lambda: torch.tensor(1.0, device=VALUES.device), COPIED),
    "an array on a device": (lambda: torch.as_tensor(np.ones(2), device=VALUES.device), COPIED),
    "new_tensor": (lambda: VALUES.new_tensor([1.0, 2.0]), COPIED),
    "select": (lambda: VALUES[LABELS[0]], "item"),
    "slice": (lambda: VALUES[: LABELS[1]], "item"),
    "size": (lambda: torch.zeros(LABELS[1]), "item"),
    "end": (lambda: torch.linspace(0, VALUES[2], 3), "item"),
    "histogram": (lambda: VALUES.histc(3), "histc"),
    "sample": (lambda: VALUES.multinomial(1), "multinomial"),
    "samples": (lambda: VALUES.multinomial(2), "multinomial"),
    "normal": (lambda: torch.normal(VALUES, VALUES), "normal"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_sparse"),
    "inverse": (lambda: torch.linalg.inv(torch.eye(3)), "check of torch.linalg"),
    "eigh": (lambda: torch.linalg.eigh(torch.eye(3)), "check of torch.linalg"),
    "eigvals": (lambda: torch.linalg.eigvals(torch.eye(3)), "check of torch.linalg"),
    "svd": (lambda: torch.linalg.svd(torch.eye(3)), "check of torch.linalg"),
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
    "one_hot of so many": lambda: (F.one_hot(LABELS, 3), one_hot(LABELS, num_classes=3)),
    "to what is asked for": lambda: VALUES.to(CPU) if VALUES.device.type == "cpu" else VALUES,
    "to where it is": lambda: VALUES.to(CPU).to(str(CPU)).to(VALUES.device, torch.float64).to(VALUES).to(torch.float16),
    "to the CPU, later": lambda: (VALUES.to("cpu", non_blocking=True), VALUES.to("cpu", torch.float64, True)),
    "a tensor of numbers": lambda: (torch.tensor([1.0, 2.0]), torch.as_tensor(np.ones(2)), torch.tensor(1, device="cpu")),
    "a tensor of a tensor": lambda: (torch.as_tensor(VALUES, device=CPU), torch.stack([VALUES, VALUES])),
    "histogram of a range": lambda: VALUES.histc(3, 0, 3),
    "samples one by one": lambda: VALUES.multinomial(5, replacement=True),
    "normal of one deviation": lambda: (torch.normal(VALUES, 1.0), torch.randn(3) * VALUES, VALUES.clone().normal_()),
    "masks and lengths": lambda: (
        VALUES.cumsum(0) > VALUES[2],
        (VALUES > 1).sum(),
        torch.arange(len(VALUES)) < LABELS[:, None],
    ),
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
    one_there, one_here = torch.empty((), device="cuda"), torch.empty(())
    ways = {
        "to": lambda: there.to("cpu"),
        "to, later": lambda: there.to("cpu", non_blocking=True),
        "cpu": lambda: there.cpu(),
        "copy_": lambda: here.copy_(there),
        "copy_, later": lambda: here.copy_(there, non_blocking=True),
        "tensor": lambda: torch.tensor([1.0], device="cuda"),
        "tensor here": lambda: torch.tensor([1.0]),
        "tensor of one there": lambda: torch.tensor([one_there]),
        "tensor of one here": lambda: torch.tensor([one_here]),
        "new_tensor": lambda: there.new_tensor([1.0]),
        "new_tensor here": lambda: here.new_tensor([1.0]),
        "one_hot": lambda: torch.nn.functional.one_hot(there.long()),
        "one_hot of so many": lambda: torch.nn.functional.one_hot(there.long(), 3),
        "one_hot here": lambda: torch.nn.functional.one_hot(here.long()),
        "to, here": lambda: here.to("cpu"),
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
        "tensor": [COPIED],
        "tensor here": [],
        "tensor of one there": ["item"],
        "tensor of one here": [],
        "new_tensor": [COPIED],
        "new_tensor here": [],
        "one_hot": ["one_hot"],
        "one_hot of so many": [],
        "one_hot here": [],
        "to, here": [],
        "equal there": ["equal"],
        "equal here": [],
        "cpu here": [],
    }
