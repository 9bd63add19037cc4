"""Damage and forge checkpoints at random, and restore them: each is restored exactly, or refused with nothing changed.

`python -m benchmarks.fuzz_checkpoints --seconds 60 --seed 0` prints how often which outcome was seen, and how to see a failure
again. `tests/checkpoint/test_fuzz.py` does the same on fewer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import axontrain as ax
from axontrain.checkpoint import read, write
from axontrain.checkpoint.directory import about
from axontrain.update import KERNEL

TENSORS, STATE, ABOUT, MANIFEST = FILES = ("tensors.safetensors", "state.json", "about.json", "manifest.json")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, -(10**400), 0.5, -0.0, 1e308, "", "a", "state/values", "../../x", "\0",
    [], [1], [[]], {}, {"a": 1}, {"$tensor": "state/objective/model.0.bias"}, {"$tensor": None}, {"$float": "nan"},
    {"$float": "inf"}, {"$x": 1}, "F64", "I8", "step", "main", 624, 625, 2**64, [0, 0], [2, 3],
)  # fmt: skip


class Own:
    """Something of a user's that takes part in saving."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"text": "", "numbers": [1, 2.5, None], "mask": torch.tensor([True, False])}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        state["numbers"][0], state["mask"].sum()  # a part may ask for anything
        self.state = dict(state)


def small_loop(steps: int = 0, seed: int = 0) -> ax.Loop:
    """A Loop with a little of everything, trained so many steps: in the middle of an epoch, of a meter, of a patience."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        made = torch.Generator().manual_seed(seed)
        data = ax.ArrayDataset(torch.randn(40, 3, generator=made), torch.randint(2, (40,), generator=made))
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4)  # noqa: E731
    loop = ax.Loop(
        ax.Supervised(net, "cross_entropy", metrics=["accuracy"]),
        ax.Optimizer("adamw", lr=0.01, schedule=schedule),
        callbacks=[ax.EarlyStopping("val/loss", patience=50)],
        device="cpu",
        progress=False,
        seed=seed,
    )
    loop.state.attach("own", Own())
    if steps:
        loop.fit(data, data, steps=steps, batch_size=4, validate="2 steps")
    return loop


def fitting(path: Path) -> Path:
    """Give a checkpoint a manifest that fits what is in it, as whoever forges one would."""
    files = {}
    for name in (TENSORS, STATE, ABOUT):
        if (path / name).is_file():
            content = (path / name).read_bytes()
            files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    return path


# --- mutators: each changes a checkpoint directory, given another one, by what a generator of random numbers says ----------


def flip(chance: random.Random, path: Path, other: Path) -> None:
    content, file = _some(chance, path)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def insert(chance: random.Random, path: Path, other: Path) -> None:
    content, file = _some(chance, path)
    place, new = chance.randint(0, len(content)), chance.randbytes(chance.choice((1, 4, 100)))
    content[place:place] = chance.choice((new, b"\0" * len(new), b"[" * len(new), b'"', b",", bytes(content[:200])))
    file.write_bytes(content)


def delete(chance: random.Random, path: Path, other: Path) -> None:
    content, file = _some(chance, path)
    place = chance.randint(0, len(content))
    del content[place : place + chance.choice((1, 4, 100, 10**6))]
    file.write_bytes(content)


def swap_bytes(chance: random.Random, path: Path, other: Path) -> None:
    content, file = _some(chance, path)
    size = chance.choice((1, 8, 64))
    a, b = (chance.randint(0, max(0, len(content) - size)) for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    file.write_bytes(content)


def swap_file(chance: random.Random, path: Path, other: Path) -> None:
    name = chance.choice(FILES)
    shutil.copy(other / name, path / name)


def remove_file(chance: random.Random, path: Path, other: Path) -> None:
    (path / chance.choice(FILES)).unlink(missing_ok=True)


def replace_value(chance: random.Random, path: Path, other: Path) -> None:
    """Put another value in the place of one, in one of the JSON files."""
    _change(chance, path, lambda holder, key: holder.__setitem__(key, chance.choice(VALUES)))


def remove_value(chance: random.Random, path: Path, other: Path) -> None:
    _change(chance, path, lambda holder, key: holder.__delitem__(key))


def nudge_value(chance: random.Random, path: Path, other: Path) -> None:
    """Change a value to one of the same kind."""

    def nudge(holder: Any, key: Any) -> None:
        value = holder[key]
        if isinstance(value, bool) or value is None:
            holder[key] = not value
        elif isinstance(value, (int, float)):
            holder[key] = chance.choice((value + 1, value - 1, -value, value * 2, value + 0.5, float(value)))
        elif isinstance(value, str):
            holder[key] = chance.choice((value + "x", value[:-1], value.upper(), value[::-1]))
        elif isinstance(value, list):
            holder[key] = chance.choice((value + value, value[:-1], value[::-1]))
        else:
            holder[key] = list(value.items()) if chance.random() < 0.2 else {**value, "more": 1}

    _change(chance, path, nudge)


def swap_values(chance: random.Random, path: Path, other: Path) -> None:
    """Exchange two values of one file: tensors of other places among them."""
    name, tree = _tree(chance, path)
    places = _places(tree)
    if len(places) < 2:
        return
    (a, at), (b, bt) = (chance.choice(places) for _ in range(2))
    a[at], b[bt] = b[bt], a[at]
    if len(repr(tree)) < 10**6:
        _put(path, name, tree)


def change_header(chance: random.Random, path: Path, other: Path) -> None:
    """Change what safetensors says of its tensors."""
    try:
        content = (path / TENSORS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
    except (OSError, ValueError, RecursionError):  # after another mutation
        return
    places = _places(header)
    if places:
        holder, key = chance.choice(places)
        what = chance.random()
        if what < 0.2:
            del holder[key]
        elif what < 0.6 and type(holder[key]) is int:
            holder[key] = chance.choice((holder[key] + 1, holder[key] - 1, 0, 2**63, 2**64, -1, holder[key] * 2))
        else:
            holder[key] = chance.choice(VALUES)
    made = json.dumps(header).encode()
    (path / TENSORS).write_bytes(len(made).to_bytes(8, "little") + made + content[8 + length :])


Mutator = Callable[[random.Random, Path, Path], None]
MUTATORS: tuple[Mutator, ...] = (
    flip, insert, delete, swap_bytes, swap_file, remove_file, replace_value, remove_value, nudge_value, swap_values,
    change_header,
)  # fmt: skip


def _some(chance: random.Random, path: Path) -> tuple[bytearray, Path]:
    file = path / chance.choice(FILES)
    return bytearray(file.read_bytes() if file.is_file() else b""), file


def _tree(chance: random.Random, path: Path) -> tuple[str, Any]:
    name = chance.choice((STATE, STATE, STATE, STATE, ABOUT, MANIFEST))
    try:
        return name, json.loads((path / name).read_bytes())
    except (OSError, ValueError, RecursionError):  # after another mutation
        return name, None


def _put(path: Path, name: str, tree: Any) -> None:
    (path / name).write_text(json.dumps(tree, separators=(",", ":")), encoding="utf-8")


def _change(chance: random.Random, path: Path, change: Callable[[Any, Any], None]) -> None:
    name, tree = _tree(chance, path)
    # First how deep, then where there: else it would nearly always be one of the many numbers far down.
    by_depth: dict[int, list[tuple[Any, Any]]] = {}
    for holder, key, depth in _places_with_depth(tree, 0):
        by_depth.setdefault(depth, []).append((holder, key))
    if by_depth:
        change(*chance.choice(by_depth[chance.choice(list(by_depth))]))
        _put(path, name, tree)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    return [(holder, key) for holder, key, _ in _places_with_depth(tree, 0)]


def _places_with_depth(tree: Any, depth: int) -> list[tuple[Any, Any, int]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, item in items:
        found += [(tree, key, depth), *_places_with_depth(item, depth + 1)]
    return found


# --- outcomes ----------------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit; a tuple comes back from a file as a list."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b)) and repr(a) == repr(b)


def different(a: Any, b: Any, place: str = "") -> str:
    """The first place in which two states differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if set(a) != set(b):
            return f"{place}: the keys {sorted(set(a) ^ set(b))}"
        return next((different(a[key], b[key], f"{place}/{key}") for key in a if not same(a[key], b[key])), place)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return different(dict(enumerate(a)), dict(enumerate(b)), place)
    return f"{place}: {a!r:.200} and {b!r:.200}"


def common(a: Any, b: Any) -> tuple[Any, Any]:
    """Two states without what one of them has not got: what was not saved begins with nothing, what is not here is left.

    And without what is no state: a cadence of another interval begins anew, AdamW is what it is, and which kernel computes is
    this machine's to say.
    """
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        both = [common(x, y) for x, y in zip(a, b, strict=True)]
        return [x for x, _ in both], [y for _, y in both]
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and b.is_floating_point():
        return a, b.to(a.dtype)  # a module converts what it takes
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a, b
    pairs = {
        key: common(a[key], b[key])
        for key in a
        if key in b and key not in ("decoupled_weight_decay", *KERNEL) and not key.startswith("cadence/")
    }
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


class Fuzz:
    """A Loop, two good checkpoints, and a place for a bad one.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        readings = {"readings": {"val/loss": 0.5}}
        self.good = write(directory / "good", small_loop(8).state.state_dict(), {"step": 8, **readings})
        self.other = write(directory / "other", small_loop(13, seed=1).state.state_dict(), {"step": 13, **readings})
        self.bad = directory / "bad"
        self.begin()

    def begin(self) -> None:
        """Make the Loop, elsewhere than at either."""
        self.loop = small_loop(3)
        self.before = self.loop.save()

    def mutate(self, chance: random.Random, mutators: list[Mutator], fit: bool) -> None:
        """Make the bad checkpoint."""
        shutil.rmtree(self.bad, ignore_errors=True)
        shutil.copytree(self.good, self.bad)
        for mutator in mutators:
            mutator(chance, self.bad, self.other)
        if fit:
            fitting(self.bad)

    def outcome(self) -> str:
        """Restore the bad checkpoint.

        Raises:
            AssertionError: if it was neither restored exactly nor refused with nothing changed.
        """
        refused = [str(error) for look in (about, self.loop.restore) if (error := _refused(look, self.bad)) is not None]
        for text in refused:
            assert text.isprintable(), f"unprintable: {text!r}"
            assert len(text) < 2000, f"too long: {text[:3000]}"
        now = self.loop.save()
        if same(now, self.before):
            assert refused, "neither restored nor refused"
            return f"refused: {'damaged' if 'manifest says' in refused[-1] else 'forged'}"
        expected = read(self.bad)  # so that what was refused and changed something fails here, or at the comparison
        shared = common(now, expected)
        assert set(expected) <= set(now), f"left out {set(expected) - set(now)}"
        assert same(*shared), f"restored as something else than what was saved: {different(*shared)}; {refused}"
        original = same(now, read(self.good))
        self.reset()
        return f"restored: {'the original' if original else 'another state, exactly'}"

    def train(self) -> str:
        """Go on from a bad checkpoint that was restored: what was forged may fail, but must not crash the process."""
        self.loop.restore(self.bad)
        data = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 3
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.loop.fit(data, data, steps=2)
        except Exception as error:
            return f"trained: {type(error).__name__}"
        finally:
            self.begin()
        return "trained: on"

    def reset(self) -> None:
        """Put the Loop back to where it was."""
        self.loop.restore(self.before)
        assert same(self.loop.save(), self.before), different(self.loop.save(), self.before)


def _refused(look: Callable[[Path], Any], path: Path) -> ax.CheckpointError | None:
    try:
        look(path)
    except ax.CheckpointError as error:
        return error
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation; each further one has the next")
    parser.add_argument("--count", type=int, help="how many at most: 1 to see a failure again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    failures: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as directory:
        fuzz = Fuzz(Path(directory))
        end, seed = perf_counter() + arguments.seconds, arguments.seed
        while perf_counter() < end and (arguments.count is None or seed < arguments.seed + arguments.count):
            chance = random.Random(seed)
            mutators = chance.choices(MUTATORS, k=chance.choice((1, 1, 2, 3)))
            fuzz.mutate(chance, mutators, fit=chance.random() < 0.8)
            try:
                outcome = fuzz.outcome()
                counts[outcome] += 1
                if outcome.startswith("restored: another"):
                    counts[fuzz.train()] += 1
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                failures.setdefault(
                    f"{type(error).__name__} {str(error)[:160]} ({Path(where.filename).name}:{where.lineno})", seed
                )
                counts["FAILED"] += 1
                fuzz.begin()
            seed += 1
    print(f"{seed - arguments.seed} mutated checkpoints")
    for outcome, count in sorted(counts.items()):
        print(f"{count:8} {outcome}")
    for failure, at in failures.items():
        print(f"--seed {at} --count 1: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
