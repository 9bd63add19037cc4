"""A corpus of hostile checkpoints: by somebody who wants to run, read, write or use up something of whoever loads them.

`python tests/checkpoint/hostile.py DIRECTORY` makes it, to try something else on it. Names begin with who has to refuse:
"file" (read), "about" (about, and so read), "state" (the schema of a Loop's state), "loop" (the Loop that it does not fit).
"""

import copy
import json
import marshal
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from axontrain.checkpoint import write
from axontrain.checkpoint.directory import encoded
from benchmarks.fuzz_checkpoints import ABOUT, FILES, MANIFEST, STATE, TENSORS, fitting, small_loop

MILLION = 10**6
ESCAPES = "\x1b[31mred\x1b[0m\r\n=cmd|' /C calc'!A0<script>alert(1)</script>\u202etxt"


class Evil:
    """What a pickle may do when it is read: here, make a directory."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


class Builds:
    """One that imports a module and calls what is in it."""

    def __reduce__(self):
        return eval, ("__import__('antigravity')",)


def header(text, length=None):
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return (len(content) if length is None else length).to_bytes(8, "little") + content


def tensor(dtype="F32", shape="[1]", offsets="[0,4]", more=""):
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


def one(*arguments, content=bytes(4), name="a", **options):
    return header(f'{{"{name}":{tensor(*arguments, **options)}}}') + content


def pickles(target):
    """Things that run when they are unpickled."""
    torch.save({"a": Evil(target)}, zipped := target.with_suffix(".pt"))
    torch.save({"a": Evil(target)}, old := target.with_suffix(".old"), _use_new_zipfile_serialization=False)
    found = {f"a pickle of protocol {protocol}": pickle.dumps(Evil(target), protocol) for protocol in range(6)}
    found |= {"a pickle that imports": pickle.dumps(Builds()), "a torch archive": zipped.read_bytes()}
    found |= {"an old torch file": old.read_bytes(), "a marshalled program": marshal.dumps(compile("1", "x", "exec"))}
    found["a pickle after a header"] = header("{}") + pickle.dumps(Evil(target))
    for file in (zipped, old):
        file.unlink()
    return found


def headers():
    """Forged safetensors files."""
    one_more = tensor(offsets="[4,8]")
    names = ",".join(f'"{number:06}":{tensor("U8", "[0]", "[0,0]")}' for number in range(MILLION))
    return {
        "nothing": b"",
        "half a length": b"\0\0\0",
        "a length alone": header("", 2),
        "an empty header": header(""),
        "a length of 2^31": header("{}", 2**31),
        "a length of 2^62": header("{}", 2**62),
        "a length of 2^63": header("{}", 2**63),
        "a length of 2^64-1": header("{}", 2**64 - 1),
        "a length of minus 8": struct.pack("<q", -8) + b"{}",
        "a length of 100 MB": header("{}", 100_000_000),
        "a length of one more than there is": header("{}", 3),
        "a length in another order": (2).to_bytes(8, "big") + b"{}",
        "a header that is a list": header("[]"),
        "a header that is null": header("null"),
        "a header that is a number": header("1e999"),
        "a header of deep lists": header("[" * 100_000),
        "a header of deep objects": header('{"a":' * 100_000),
        "a header with a BOM": header("\ufeff{}"),
        "a header that is no UTF-8": header(b'{"\xff":1}'),
        "a header in UTF-16": header("{}".encode("utf-16")),
        "a header with a surrogate": one(name="\\ud800"),
        "a header with NULs after it": header(b"{}\0\0\0\0\0\0"),
        "a header with a comment": header("{/* */}"),
        "two headers": header("{}") + header("{}"),
        "bytes after the tensors": one(content=bytes(8)),
        "a name twice": header(f'{{"a":{tensor()},"a":{tensor()}}}') + bytes(4),
        "a name twice, the later elsewhere": header(f'{{"a":{tensor()},"a":{one_more}}}') + bytes(8),
        "a dtype twice": one(more=',"dtype":"I32"'),
        "a million names": header(f"{{{names}}}"),
        "no dtype": header('{"a":{"shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        "no offsets": header('{"a":{"dtype":"F32","shape":[1]}}') + bytes(4),
        "a key more": one(more=',"__reduce__":"os.system"'),
        "an unknown dtype": one("OBJECT"),
        "a dtype with escapes": one("\\u001b[2J\\n\\u202e"),
        "a dtype that nobody writes": one("F4", "[8]"),
        "a dtype that torch lacks": one("F6_E2M3", "[16]", "[0,12]", content=bytes(12)),
        "a dtype that is a number": header('{"a":{"dtype":7,"shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        "a dtype that is a list": header('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        "a long dtype": one("x" * MILLION),
        "a shape that is too large": one(shape="[2]"),
        "a shape beyond 2^64": one(shape="[4294967296,4294967296,4294967296]"),
        "a shape that wraps to nothing": one("U8", "[4294967296,4294967296]", "[0,0]", content=b""),
        "a size of 2^64": one(shape="[18446744073709551616]"),
        "a size of 2^64-1 beside 0": one("U8", "[0,18446744073709551615]", "[0,0]", content=b""),
        "a size of ten thousand digits": one(shape=f"[{'9' * 10_000}]"),
        "a negative size": one(shape="[-1]"),
        "two negative sizes": one(shape="[-1,-1]"),
        "a size that is a float": one(shape="[1.0]"),
        "a size that is true": one(shape="[true]"),
        "a nested shape": one(shape="[[1]]"),
        "a shape that is text": one(shape='"1"'),
        "a hundred thousand dimensions": one("U8", f"[{','.join('1' * 100_000)}]", "[0,1]", content=b"\0"),
        "offsets beyond the file": one(shape="[4]", offsets="[0,16]"),
        "offsets far beyond the file": one(shape="[1]", offsets="[9223372036854775800,9223372036854775804]"),
        "offsets before the file": one(offsets="[-4,0]"),
        "offsets into the header": header(f'{{"a":{tensor(offsets="[-8,-4]")}}}') + bytes(4),
        "offsets backwards": one(offsets="[4,0]"),
        "offsets that are floats": one(offsets="[0.0,4.0]"),
        "three offsets": one(offsets="[0,4,8]"),
        "nested offsets": one(offsets="[[0,4]]"),
        "a hole before a tensor": one(offsets="[4,8]", content=bytes(8)),
        "overlapping tensors": header(
            f'{{"a":{tensor("U8", "[4]", "[0,4]")},"b":{tensor("U8", "[4]", "[2,6]")}}}'
        ) + bytes(6),
        "two tensors in one place": header(f'{{"a":{tensor()},"b":{tensor()}}}') + bytes(4),
        "a tensor within another": header(f'{{"a":{tensor("U8", "[8]", "[0,8]")},"b":{tensor()}}}') + bytes(8),
        "metadata": header(f'{{"__metadata__":{{"format":"pt"}},"a":{tensor()}}}') + bytes(4),
        "metadata that is a list": header(f'{{"__metadata__":[],"a":{tensor()}}}') + bytes(4),
        "metadata that is a tensor": one(name="__metadata__"),
        "metadata that is a program": header('{"__metadata__":{"__class__":{"__reduce__":["os.system","id"]}}}'),
        "a truth of 7": one("BOOL", "[4]", content=b"\0\1\7\xff"),
    }  # fmt: skip


def jsons():
    """Forged state files, beside the one tensor "a"."""
    names = ",".join(f'"{number}":1' for number in range(MILLION))
    marks = {
        "that is not there": '"b"', "that is a list": '["a"]', "that is null": "null", "that is a number": "0",
        "that is an object": '{"$tensor":"a"}', "up": '"../../../../etc/passwd"', "of a root": '"/etc/passwd"',
        "of another file": '"state.json"', "of a URL": '"http://127.0.0.1:9/a"', "with a NUL": '"a\\u0000"',
        "with escapes": json.dumps(ESCAPES), "of a megabyte": f'"{"x" * MILLION}"', "that is empty": '""',
        "of another case": '"A"', "of a lone surrogate": '"\\ud800"',
    }  # fmt: skip
    found = {f"a tensor {name}": f'{{"a":{{"$tensor":"a"}},"b":{{"$tensor":{mark}}}}}' for name, mark in marks.items()}
    for mark in ('"NaN"', '"Infinity"', '"1e5"', "1", "null", '["nan"]', json.dumps(ESCAPES), "\"__import__('os')\""):
        found[f"a float {mark[:30]!a}"] = f'{{"a":{{"$tensor":"a"}},"b":{{"$float":{mark}}}}}'
    for mark in ("$class", "$", "$ref", "$import", "$pickle", "$schema"):
        found[f"the key {mark}"] = f'{{"a":{{"$tensor":"a"}},"b":{{"{mark}":"os.system"}}}}'
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 10_000, f"-{'9' * MILLION}", "0x10", "1_000", "01"):
        found[f"the number {number[:12]}{len(number) if len(number) > 12 else ''}"] = f'{{"a":{{"$tensor":"a"}},"b":{number}}}'
    return found | {
        "nothing": "",
        "a NUL": "\0",
        "lists that are deep": "[" * 200_000 + "]" * 200_000,
        "objects that are deep": '{"a":' * 200_000 + "1" + "}" * 200_000,
        "lists of 101 levels": "[" * 102 + "]" * 102,
        "a million keys": f'{{"a":{{"$tensor":"b"}},{names}}}',
        "three million empty lists": f"[{'[],' * (3 * MILLION)}[]]",
        "three million numbers": f"[{'1,' * (3 * MILLION)}1]",
        "three million objects": f"[{'{},' * (3 * MILLION)}1]",
        "ten thousand huge numbers": f"[{('9' * 641 + ',') * 10_000}1]",
        "a key twice": '{"a":{"$tensor":"a"},"a":1}',
        "a tensor and more": '{"a":{"$tensor":"a","$float":"nan"}}',
        "a tensor twice": '{"a":{"$tensor":"a"},"b":{"$tensor":"a"}}',
        "a tensor that it does not speak of": "{}",
        "a BOM": '\ufeff{"a":{"$tensor":"a"}}',
        "UTF-16": '{"a":{"$tensor":"a"}}'.encode("utf-16"),
        "bytes that are no text": b'{"a":"\xff\xfe"}',
        "text that goes on": '{"a":{"$tensor":"a"}}{}',
        "a single quote": "{'a':{'$tensor':'a'}}",
        "a comma at its end": '{"a":{"$tensor":"a"},}',
        "YAML": "a: !!python/object/apply:os.system [id]",
    }


def manifests(path):
    """Forged manifests beside files that are good."""
    good = json.loads((path / MANIFEST).read_text())
    files = good["files"]

    def made(**changes):
        return json.dumps({**good, "files": {**files, **changes}})

    entry = files[STATE]
    found = {
        "nothing": "",
        "no files": '{"format":1}',
        "files that are a list": json.dumps({**good, "files": list(files)}),
        "files without the state": json.dumps({**good, "files": {TENSORS: files[TENSORS]}}),
        "a file up": made(**{"../good/state.json": entry}),
        "a file of a root": made(**{"/etc/passwd": {"size": Path("/etc/passwd").stat().st_size, "sha256": "0" * 64}}),
        "a file of another name": made(**{"evil.pkl": entry}),
        "itself": made(**{MANIFEST: entry}),
        "a name of another case": json.dumps({**good, "files": {**files, "STATE.json": entry}}),
        "a name with a NUL": made(**{"state.json\0": entry}),
        "a name with escapes": made(**{ESCAPES: entry}),
        "a hundred thousand files": made(**{f"{number:05}": 1 for number in range(10**5)})[: 2**20],
        "sixty thousand files": json.dumps({**good, "files": {**files, **{f"{number:05}": 1 for number in range(60_000)}}}),
        "deep": "[" * 500_000,
        "two megabytes": " " * 2**21 + json.dumps(good),
        "a format of 2": json.dumps({**good, "format": 2}),
        "a format of true": json.dumps({**good, "format": "1"}),
        "a format that is a megabyte": json.dumps({**good, "format": "\x1b" * 100_000}),
        "a format that is a tree": json.dumps({**good, "format": {"a": [[[[[]]]]]}}),
        "files twice": json.dumps(good)[:-1] + ', "files": {}}',
        "a size that is twice there": json.dumps(good).replace('{"size"', '{"size": 0, "size"'),
    }
    sizes = {"negative": -1, "a float": float(entry["size"]), "huge": 2**63, "true": True, "text": str(entry["size"]),
             "null": None, "a list": [entry["size"]], "640 digits": int("9" * 640)}  # fmt: skip
    found |= {f"a size that is {name}": made(**{STATE: {**entry, "size": size}}) for name, size in sizes.items()}
    sums = {"null": None, "a number": 0, "a list": list(entry["sha256"]), "empty": "", "upper case": entry["sha256"].upper(),
            "true": True, "an object": {}, "cut": entry["sha256"][:8]}  # fmt: skip
    found |= {f"a sum that is {name}": made(**{STATE: {**entry, "sha256": of}}) for name, of in sums.items()}
    found["an entry with more"] = made(**{STATE: {**entry, "url": "http://127.0.0.1:9/"}})
    found["an entry that is a list"] = made(**{STATE: [entry]})
    found["an entry without a sum"] = made(**{STATE: {"size": entry["size"]}})
    return found


def states(good):
    """Changes to the state of a Loop, each of which its schema has to refuse: the places, and what stands there."""
    wrong = {"null": None, "text": "x", "a list": [], "a number": 3, "true": True, "a tensor": torch.ones(2)}
    kinds = {
        "objective": "a mapping", "optimizers": "a mapping", "counters": "a mapping", "values": "a mapping",
        "history": "a list", "rng": "null", "meter": "a mapping", "attached": "a mapping", "setup": "a mapping",
        "owed": "a list", "in_epoch": "true",
    }  # fmt: skip
    found = {}
    for key, kind in kinds.items():
        for name, value in wrong.items():
            if name != kind:
                found[f"{key} that is {name}"] = {key: value}
    found |= {f"no {key}": {key: ...} for key in kinds if key not in ("setup", "owed", "in_epoch")}
    counts = {"text": "8", "a float": 8.0, "true": True, "negative": -1, "2^63": 2**63, "null": None,
              "640 digits": int("9" * 640), "NaN": float("nan"), "a tensor": torch.tensor(8)}  # fmt: skip
    for key in ("epoch", "step", "samples", "batch_index", "epoch_length", "elapsed", "seed"):
        for name, value in counts.items():
            fits = {"epoch_length": ("null",), "elapsed": ("a float",), "seed": ("negative", "2^63", "640 digits")}
            if name not in fits.get(key, ()):
                found[f"counters, {key} that is {name}"] = {f"counters/{key}": value}
    found |= {
        "no step in the counters": {"counters/step": ...},
        "an epoch of no batches": {"counters/epoch_length": 0},
        "elapsed that is infinite": {"counters/elapsed": float("inf")},
        "a counter more": {"counters/__class__": "os"},
        "a part that nobody knows": {"__reduce__": ["os.system", "id"]},
        "history of numbers": {"history": [1, 2]},
        "history of lists": {"history": [["step", 1]]},
        "history without steps": {"history": [{"epoch": 1}]},
        "history of steps that are text": {"history": [{"epoch": 1, "step": "1"}]},
        "an unfinished row of an empty history": {"history": [], "partial": {"row": None}},
        "an unfinished row that is a list": {"partial": {"row": [1]}},
        "an unfinished row that is missing": {"partial": {}},
        "a plan without limits": {"plan": {}},
        "a plan that is a list": {"plan": [1]},
        "a plan of text": {"plan/start_step": "0"},
        "a plan with more": {"plan/__init__": 1},
        "owed numbers": {"owed": [1]},
        "a setup without data": {"setup/data": ...},
        "a setup whose versions are text": {"setup/versions": "1.0"},
        "a setup whose optimizers are lists": {"setup/optimizers": {"main": []}},
        "a setup of tensors": {"setup/data/samples": torch.ones(2)},
        "a microbatch of none": {"attached/microbatch": {"size": 0, "wait": 1, "since": 0, "smaller": None}},
        "a microbatch that is text": {"attached/microbatch": {"size": "8", "wait": 1, "since": 0, "smaller": None}},
        "a cadence that fires text": {"attached/cadence~validate/fired": "x"},
        "a cadence without an interval": {"attached/cadence~validate/interval": ...},
        "data at no place": {"attached/data": {"position": [0], "consumed": 0, "turns": 0}},
        "data at a place that is text": {"attached/data": {"position": ["0", "0"]}},
        "data with a generator beyond its words": {"attached/data": {"begun": [_twisted(good["rng"]["torch"])]}},
    }
    return found | _of_early() | _of_generators(good) | _of_optimizers(good) | _of_meters()


def _of_early():
    whole = {"rows": None, "values": torch.arange(3)}
    columns = {"step": whole, "epoch": whole}
    values = {"bytes": torch.ones(3, dtype=torch.uint8), "truths": torch.ones(3) > 0, "floats of 32 bits": torch.ones(3),
              "complex numbers": torch.ones(3, dtype=torch.complex64), "many dimensions": torch.ones(3, 1, dtype=torch.int64),
              "text": "abc", "too few": torch.arange(2), "null": None}  # fmt: skip
    found = {f"early readings of {name}": {**columns, "a": {"rows": None, "values": of}} for name, of in values.items()}
    rows = {"beyond": torch.tensor([3]), "negative": torch.tensor([-1]), "floats": torch.tensor([1.0]), "text": "0"}
    found |= {
        f"early readings of rows that are {name}": {**columns, "a": {"rows": of, "values": torch.ones(1, dtype=torch.float64)}}
        for name, of in rows.items()
    }
    found["early readings without steps"] = {"epoch": whole}
    found["early readings of steps in some rows"] = {**columns, "step": {"rows": torch.arange(3), "values": torch.arange(3)}}
    return {name: {"early": early} for name, early in found.items()}


def _twisted(state, left=624, following=624):
    """A state of torch's generator which reads beyond its words. Torch checks each of these numbers by itself."""
    twisted = state.clone()
    twisted[8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
    twisted[16:24] = torch.tensor([following]).view(torch.uint8)
    return twisted


def _of_generators(good):
    state, python = good["rng"]["torch"], good["rng"]["python"]
    keys = good["rng"]["numpy"]["keys"] if "numpy" in good["rng"] else torch.zeros(624, dtype=torch.int64)
    numpy = {"name": "MT19937", "keys": keys, "position": 1, "has_gauss": 0, "gauss": 0.0}
    words = python[1]
    beyond = words.clone()
    beyond[-1] = 10**6
    found = {
        "torch's generator missing": {"rng/torch": ...},
        "torch's generator as a list": {"rng/torch": [0] * 5056},
        "torch's generator of one byte": {"rng/torch": state[:1].clone()},
        "torch's generator of too many bytes": {"rng/torch": torch.zeros(10**5, dtype=torch.uint8)},
        "torch's generator of another dtype": {"rng/torch": state.to(torch.int64)},
        "torch's generator of another shape": {"rng/torch": state.reshape(2, -1)},
        "torch's generator of zeros": {"rng/torch": torch.zeros_like(state)},
        "torch's generator of ones": {"rng/torch": torch.full_like(state, 255)},
        "torch's generator beyond its words": {"rng/torch": _twisted(state)},
        "torch's generator at a negative word": {"rng/torch": _twisted(state, 1, -1)},
        "Python's generator as text": {"rng/python": "x"},
        "Python's generator of another version": {"rng/python": [2, words, None]},
        "Python's generator of too few words": {"rng/python": [3, words[:10].clone(), None]},
        "Python's generator of floats": {"rng/python": [3, words.double(), None]},
        "Python's generator of negative words": {"rng/python": [3, -words - 1, None]},
        "Python's generator beyond its words": {"rng/python": [3, beyond, None]},
        "Python's generator with text": {"rng/python": [3, words, "x"]},
        "a generator of nobody": {"rng/os": state},
        "CUDA's generators as a tensor": {"rng/cuda": state},
        "CUDA's generator of one byte": {"rng/cuda": [state[:1].clone()]},
        "CUDA's generator at an odd place": {"rng/cuda": [torch.ones(16, dtype=torch.uint8)]},
    }
    changes = {"of another name": {"name": "os.system"}, "of too few words": {"keys": keys[:3].clone()},
               "of negative words": {"keys": -keys - 1}, "beyond its words": {"position": 10**6},
               "at a negative word": {"position": -5}, "at a word that is text": {"position": "0"},
               "with a gauss of 2": {"has_gauss": 2}, "with a gauss that is text": {"gauss": "0"}}  # fmt: skip
    found |= {f"NumPy's generator {name}": {"rng/numpy": {**numpy, **change}} for name, change in changes.items()}
    found["NumPy's generator without words"] = {"rng/numpy": {"name": "MT19937"}}
    return found


def _of_optimizers(good):
    main, part = "optimizers/main", "optimizers/main/optimizers/0"
    name = next(iter(good["optimizers"]["main"]["optimizers"][0]["state"]))
    return {
        "an optimizer that is null": {main: None},
        "an optimizer of no parts": {f"{main}/optimizers": {}},
        "an optimizer without a scale": {f"{main}/scale": ...},
        "an optimizer of a scale that is text": {f"{main}/scale": "1"},
        "an optimizer of a scale that is NaN": {f"{main}/scale": float("nan")},
        "an optimizer that skipped -1": {f"{main}/skipped": -1},
        "an optimizer that skipped text": {f"{main}/in_a_row": "3"},
        "an optimizer with rates of nobody": {f"{main}/unscaled": [0.1] * 7},
        "an optimizer with rates that are text": {f"{main}/unscaled": ["x"]},
        "an optimizer with more": {f"{main}/__setstate__": 1},
        "an optimizer of no kind": {f"{part}/kind": ...},
        "an optimizer of a kind that is a list": {f"{part}/kind": ["AdamW"]},
        "an optimizer of a kind that is a path": {f"{part}/kind": "os.system"},
        "a schedule of a kind with escapes": {f"{main}/schedulers/0/kind": ESCAPES},
        "groups that are a mapping": {f"{part}/groups": {}},
        "a group that is a list": {f"{part}/groups": [[]]},
        "a group without parameters": {f"{part}/groups/0/parameters": ...},
        "a group of numbers": {f"{part}/groups/0/parameters": [0, 1]},
        "a rate that is text": {f"{part}/groups/0/lr": "0.1"},
        "a rate of many": {f"{part}/groups/0/lr": torch.ones(3)},
        "a rate of 640 digits": {f"{part}/groups/0/lr": int("9" * 640)},
        "a state of a parameter of nobody": {f"{part}/state/evil": {"step": torch.tensor(1.0)}},
        "a state that is a list": {f"{part}/state/{name}": [1]},
        "a state without steps": {f"{part}/state/{name}/step": ...},
        "a step that is text": {f"{part}/state/{name}/step": "1"},
        "a step of many": {f"{part}/state/{name}/step": torch.ones(3)},
        "a mean of one number": {f"{part}/state/{name}/exp_avg": torch.ones(1)},
        "a mean of no dimensions": {f"{part}/state/{name}/exp_avg": torch.tensor(1.0)},
        "a mean that is a number": {f"{part}/state/{name}/exp_avg": 0.5},
        "a variance that is empty": {f"{part}/state/{name}/exp_avg_sq": torch.ones(0)},
        "a variance that is too large": {f"{part}/state/{name}/exp_avg_sq": torch.ones(10**5)},
        "a schedule that is a list": {f"{main}/schedulers": [[]]},
        "a schedule without a state": {f"{main}/schedulers/0/state": ...},
        "a schedule of a state that is text": {f"{main}/schedulers/0/state": "x"},
    }


def _of_meters():
    loss = {"loss": torch.tensor(1.0), "weight": 4, "skipped": None, "values": {}, "weights": None}
    tally = {"states": {}, "waiting": [], "updates": 0}
    losses = {"text": "x", "many": torch.ones(3), "a number": 1.0, "null": None}
    found = {f"a loss that is {name}": {"meter/losses": [{**loss, "loss": value}]} for name, value in losses.items()}
    return found | {
        "losses that are a mapping": {"meter/losses": {}},
        "a loss without a weight": {"meter/losses": [{"loss": torch.tensor(1.0)}]},
        "a weight that is text": {"meter/losses": [{**loss, "weight": "4"}]},
        "a flag that is text": {"meter/losses": [{**loss, "skipped": "yes"}]},
        "a value that is a list": {"meter/losses": [{**loss, "values": {"a": [1]}}]},
        "values that are a list": {"meter/losses": [{**loss, "values": [1]}]},
        "weights that are text": {"meter/losses": [{**loss, "weights": "x"}]},
        "sums of three": {"meter/sums": {"loss": torch.ones(3)}},
        "sums that are a list": {"meter/sums": {"loss": [1, 2]}},
        "a metric that is null": {"meter/metrics": {"accuracy": None}},
        "a metric whose states are text": {"meter/metrics": {"accuracy": {**tally, "states": {"right": "x"}}}},
        "a metric whose states are numbers": {"meter/metrics": {"accuracy": {**tally, "states": {"right": [1]}}}},
        "a metric that waits for three": {"meter/metrics": {"accuracy": {**tally, "waiting": [[1, 2, 3]]}}},
        "a metric that waits for text": {"meter/metrics": {"accuracy": {**tally, "waiting": [[1, 2, "x", None]]}}},
        "a metric of -1 updates": {"meter/metrics": {"accuracy": {**tally, "updates": -1}}},
        "an example of text": {"meter/example": "x"},
        "an example of one": {"meter/example": [[[4], "torch.int64"]]},
        "an example of another dtype": {"meter/example": [[[4], "os.system"], [[4], "torch.int64"]]},
        "an example of a dtype that is a list": {"meter/example": [[[4], []], [[4], "torch.int64"]]},
        "an example of a negative size": {"meter/example": [[[-4], "torch.int64"], [[4], "torch.int64"]]},
        "an example of a size beyond memory": {"meter/example": [[[4, 2**40, 2**40], "torch.int64"], [[4], "torch.int64"]]},
        "an example of a sample beyond memory": {"meter/example": [[[0, 2**31], "torch.int64"], [[4], "torch.int64"]]},
        "an example of many sizes": {"meter/example": [[[1, *[2] * 40], "torch.int64"], [[4], "torch.int64"]]},
        "names of tasks that are numbers": {"meter/names": [1]},
        "a task that is text": {"meter/tasks": {"a": "x"}},
        "a task within a task that is text": {
            "meter/tasks": {"a": {"sums": {}, "losses": [], "metrics": {}, "tasks": {"b": 1}}}
        },
        "a meter with more": {"meter/__dict__": {}},
    }


def misfits(good):
    """States that are of a Loop, but not of this one."""
    weight = next(iter(good["objective"]))
    part = "optimizers/main/optimizers/0"
    return {
        "weights of another shape": {f"objective/{weight}": torch.ones(7, 7)},
        "weights that are text": {f"objective/{weight}": "x"},
        "weights that are null": {f"objective/{weight}": None},
        "counts of batches that are floats": {"objective/model.1.num_batches_tracked": torch.tensor(1.5)},
        "weights that are missing": {f"objective/{weight}": ...},
        "weights that are complex": {f"objective/{weight}": good["objective"][weight].to(torch.complex64)},
        "weights of a name more": {"objective/../../evil": torch.ones(1)},
        "weights of a name with escapes": {f"objective/{ESCAPES.replace('/', '')}": torch.ones(1)},
        "an optimizer of another name": {"optimizers": {"evil": good["optimizers"]["main"]}},
        "no optimizer": {"optimizers": {}},
        "an optimizer of another kind": {f"{part}/kind": "SGD"},
        "an optimizer of no groups": {f"{part}/groups": []},
        "an optimizer of other parameters": {f"{part}/groups/0/parameters": ["a"], f"{part}/state": {}},
        "a schedule of another kind": {"optimizers/main/schedulers/0/kind": "LambdaLR"},
        "a schedule with a step of its own": {"optimizers/main/schedulers/0/state/step": "os.system"},
        "a schedule with an optimizer of its own": {"optimizers/main/schedulers/0/state/optimizer": None},
        "a metric of other states": {"meter/metrics": {"accuracy": {"states": {"__class__": torch.ones(1)}, "waiting": [],
                                                                    "updates": 1}}},
        "a callback that lacks all": {"attached/callback~EarlyStopping(val~loss)": {}},
        "a part that is empty": {"attached/own": {}},
        "a part that is text": {"attached/own": "x"},
        "a part that is null": {"attached/own": None},
        "a part that is a tensor": {"attached/own": torch.ones(1)},
        "a part of another kind": {"attached/own": {"numbers": 3, "mask": "x"}},
    }  # fmt: skip


def changed(good, changes):
    """A copy of a state with other things in some places; ``...`` is nothing at all, and ~ a slash within a key."""
    state = copy.deepcopy(good)
    for place, value in changes.items():
        *way, last = [key.replace("~", "/") for key in place.split("/")] if "../" not in place else place.split("/", 1)
        holder = state
        for key in way:
            holder = holder[int(key) if isinstance(holder, list) else key]
        if value is ...:
            del holder[last]
        elif isinstance(holder, list):
            holder[int(last)] = value
        else:
            holder[last] = value
    return state


def links(make):
    """What lies in a directory and is no file of its own. Of each file, as it is in a good checkpoint."""
    for name in FILES:
        kinds = {
            "to what it was": lambda file, good: file.symlink_to(good),
            "to a secret": lambda file, good: file.symlink_to("/etc/passwd"),
            "without an end": lambda file, good: file.symlink_to("/dev/zero"),
            "to nowhere": lambda file, good: file.symlink_to("nowhere"),
            "to itself": lambda file, good: file.symlink_to(file),
            "that is a pipe": lambda file, good: os.mkfifo(file),
            "that is a directory": lambda file, good: file.mkdir(),
        }
        for kind, put in kinds.items():
            path = make(f"file: {name}, a link {kind}")
            (path / name).rename(path / f"{name}.was")
            put(path / name, path / f"{name}.was")
        sparse = make(f"file: {name} of a terabyte")
        os.truncate(sparse / name, 2**40)
        if name != MANIFEST:
            lying = make(f"file: {name} of a terabyte, as its manifest says")
            os.truncate(lying / name, 2**40)
            manifest = json.loads((lying / MANIFEST).read_text())
            manifest["files"][name]["size"] = 2**40
            (lying / MANIFEST).write_text(json.dumps(manifest))
        (make(f"file: no {name}") / name).unlink()
    path = make("file: names of another case")
    for name in FILES:
        (path / name).rename(path / name.upper())
    true = make("file: a terabyte of one tensor")
    content = header(f'{{"a":{tensor("U8", f"[{2**40}]", f"[0,{2**40}]")}}}')
    (true / TENSORS).write_bytes(content)
    os.truncate(true / TENSORS, len(content) + 2**40)
    manifest = json.loads((true / MANIFEST).read_text())
    manifest["files"][TENSORS]["size"] = len(content) + 2**40
    (true / MANIFEST).write_text(json.dumps(manifest))


def abouts():
    """Forged descriptions."""
    return {
        "that are a list": "[]",
        "that are a number": "1e999",
        "that are deep": "[" * 400_000,
        "that are a pickle": pickle.dumps(Builds()),
        "with a tensor": '{"a":{"$tensor":"a"}}',
        "with NaN": '{"readings":{"val/loss":NaN}}',
        "with a key twice": '{"step":1,"step":2}',
        "of two megabytes": f'{{"a":"{"x" * 2**21}"}}',
    }


def _put(path, tree):
    """The same as ``write``, many times quicker: what may be lost when the power fails is made again."""
    path.mkdir()
    what = encoded(tree)
    save_file(what.tensors, path / TENSORS)
    (path / STATE).write_text(what.text)
    (path / ABOUT).write_text(what.about)
    fitting(path)


def corpus(directory):
    """Make the corpus: the paths by name, each that of a directory which is given to ``read`` and ``restore``."""
    directory = Path(directory)
    directory.mkdir(exist_ok=True)
    tree = small_loop(8).save()
    good = write(directory / "good", tree, {"step": 8, "readings": {"val/loss": 0.5}})
    found = {}

    def make(name, **contents):
        path = found[name] = directory / f"{len(found):03}"
        shutil.copytree(good, path)
        for key, content in contents.items():
            file = path / {"tensors": TENSORS, "state": STATE, "about": ABOUT, "manifest": MANIFEST}[key]
            file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        if contents and "manifest" not in contents:
            fitting(path)
        return path

    single = save({"a": torch.zeros(1)})
    for name, content in pickles(directory / "ran").items():
        for key in ("tensors", "state", "about", "manifest"):
            make(f"{'about' if key == 'about' else 'file'}: {key}, {name}", **{key: content})
    for name, content in headers().items():
        make(f"file: header, {name}", tensors=content, state='{"a":{"$tensor":"a"}}')
    for name, content in jsons().items():
        make(f"file: state, {name}", tensors=single, state=content)
    for name, content in manifests(good).items():
        make(f"file: manifest, {name}", manifest=content)
    for name, content in abouts().items():
        make(f"about: readings {name}", about=content)
    links(make)
    for kind, of_kind in (("state", states(tree)), ("loop", misfits(tree))):
        for name, changes in of_kind.items():
            path = found[f"{kind}: {name}"] = directory / f"{len(found):03}"
            _put(path, changed(tree, changes))
    for name, other in {
        "a list": [],
        "a number": 3,
        "text": "x",
        "null": None,
        "a tensor": torch.ones(2),
        "nothing": {},
    }.items():
        path = found[f"state: {name} in place of it"] = directory / f"{len(found):03}"
        _put(path, other)
    return found


if __name__ == "__main__":
    for name, path in corpus(sys.argv[1]).items():
        print(path, name)
