"""What data cost: batches in memory, pictures from a Parquet file, memory over many epochs, orders of 10⁹ samples.

`python -m benchmarks.data --cifar FOLDER` (with cifar10-train.parquet: the columns image, JPEG bytes, and label).

All runs in one process, on one thread (workers are processes of their own). A round goes through all contenders in an order
of its own, after a pass of each that is not counted; a ratio is taken within a round, and the table has its median and its
range. A pass takes every batch of an epoch, the drawing of its order included, and does nothing with it. Parts that measure
memory run in a fresh process each, and read of it what is resident.
"""

from __future__ import annotations

import argparse
import gc
import io
import multiprocessing
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import axontrain as ax
from benchmarks import report

FILE = "cifar10-train.parquet"
PADDING, SIDE = 4, 32
WORKERS = 2
MB = 1e6


@dataclass
class Part:
    """One table, and what it says of the goal."""

    title: str
    what: str
    header: list[str]
    body: list[list[str]]
    verdicts: list[str] = field(default_factory=list)


def main() -> None:
    """Measure and print the tables."""
    arguments = _arguments()
    torch.set_num_threads(1)
    started = time.monotonic()
    command = f"python -m benchmarks.data {shlex.join(sys.argv[1:])}".strip()
    about = f"{report.machine()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread used"
    print(f"`{command}`, {datetime.now(UTC).date().isoformat()}, {about}, rounds: {arguments.rounds}; medians.")
    for name in arguments.only:
        if name == "cifar" and arguments.cifar is None:
            print(f"\n{name}: skipped; --cifar FOLDER says where {FILE} is.")
            continue
        if name in ("memory", "orders") and not Path("/proc/self/smaps_rollup").exists():
            print(f"\n{name}: skipped; it reads /proc, which this system has not.")
            continue
        part = PARTS[name](arguments)
        print(f"\n{'**' + part.title + '**' if arguments.markdown else part.title}\n\n{part.what}\n")
        print(report.table(part.header, part.body, markdown=arguments.markdown), flush=True)
        print("\n" + "\n".join(part.verdicts), flush=True)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)


class Times(NamedTuple):
    """Seconds of one pass of each contender, round by round: on the wall, and of the CPU, workers included."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]


def timed(contenders: dict[str, Callable[[], object]], rounds: int, passes: int = 1) -> Times:
    """Measure passes over rounds.

    A round goes through all contenders ``passes`` times, so that what slows the machine for a while slows all alike.
    """
    for run in contenders.values():
        run()
    times = Times({name: [] for name in contenders}, {name: [] for name in contenders})
    order = random.Random(0)
    for _ in range(rounds):
        gc.collect()
        wall, cpu = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0.0)
        for _ in range(passes):
            for name in order.sample(list(contenders), len(contenders)):
                used, started = cpu_seconds(), time.perf_counter()
                contenders[name]()
                wall[name] += time.perf_counter() - started
                cpu[name] += cpu_seconds() - used
        for name in contenders:
            times.wall[name].append(wall[name] / passes)
            times.cpu[name].append(cpu[name] / passes)
    return times


def cpu_seconds() -> float:
    """Return what this process and its children that live have used of the CPU; Linux tells it of others, to 10 ms."""
    seconds = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.exists():
            fields = stat.read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def ratios(times: dict[str, list[float]], name: str, against: str) -> list[float]:
    """Return a contender's time over another's, round by round."""
    return [ours / theirs for ours, theirs in zip(times[name], times[against], strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Show the median and the range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def verdict(what: str, value: float, goal: float, unit: str = "") -> str:
    """Say whether a goal was met."""
    digits = 2 if not unit else 1
    return f"{what}: {value:.{digits}f}{unit}, the goal is ≤ {goal:g}{unit}: {'met' if value <= goal else 'missed'}."


def drain(batches: Iterable[Any]) -> None:
    """Take every batch."""
    for _ in batches:
        pass


# 1 and 2: in memory


def inputs_by_hand(x: Tensor, size: int) -> Tensor:
    """Go through an epoch of inputs with bare index_select; as in all loops, a batch lives until the next is there."""
    for rows in torch.randperm(len(x)).split(size):
        batch = x.index_select(0, rows)
    return batch


def pairs_by_hand(x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Go through an epoch of inputs and labels with bare index_select."""
    for rows in torch.randperm(len(x)).split(size):
        batch = x.index_select(0, rows), y.index_select(0, rows)
    return batch


class Shape(NamedTuple):
    """A training set in memory, and how far axontrain may be from bare index_select."""

    size: int
    width: int
    samples: int
    goal: float


def in_memory(shape: Shape, rounds: int, passes: int = 3) -> Part:
    """Compare shuffled epochs, of inputs alone and with labels."""
    size, width, samples, goal = shape
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, width, generator=generator), torch.randint(10, (samples,), generator=generator)
    hand, ours = "by hand, index_select", "axontrain, Loader(ArrayDataset)"
    batches = -(-samples // size)
    columns: list[dict[str, list[str]]] = []
    verdicts = []
    for what, tensors in (("x", (x,)), ("x and y", (x, y))):
        by_hand = (lambda: inputs_by_hand(x, size)) if len(tensors) == 1 else (lambda: pairs_by_hand(x, y, size))
        loader = ax.Loader(ax.ArrayDataset(*tensors), size, shuffle=True)
        theirs = DataLoader(TensorDataset(*tensors), batch_size=size, shuffle=True)
        contenders: dict[str, Callable[[], object]] = {
            hand: by_hand,
            ours: lambda loader=loader: drain(loader),
            "DataLoader(TensorDataset)": lambda theirs=theirs: drain(theirs),
        }
        times = timed(contenders, rounds, passes).wall
        found = {name: ratios(times, name, hand) for name in contenders}
        columns.append({n: [f"{median(times[n]) / batches * 1e6:.1f}", spread(found[n])] for n in contenders})
        verdicts.append(verdict(f"{what}: axontrain over bare index_select", median(found[ours]), goal))
    return Part(
        f"In memory, {size} x {width} floats",
        f"A shuffled epoch of {samples} samples ({x.nbytes / MB:.0f} MB of inputs; labels are int64), {batches} batches of "
        f"{size}: by hand `for rows in torch.randperm(n).split({size}): x.index_select(0, rows)`, and the labels likewise. "
        f"{passes} epochs of each a round.",
        ["contender", "x: µs/batch", "ratio (min–max)", "x and y: µs/batch", "ratio (min–max)"],
        [[name, *columns[0][name], *columns[1][name]] for name in columns[0]],
        verdicts,
    )


# 3: pictures from a Parquet file


def pixels(image: Image.Image) -> Tensor:
    """Return the bytes of a picture: uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def augmented(row: dict[str, Any]) -> tuple[Tensor, int]:
    """Make a sample of a row, float (3, 32, 32) and label: decoded, randomly cropped out of a black border, and flipped."""
    image = Image.open(io.BytesIO(row["image"])).convert("RGB")
    top, left = (torch.randint(2 * PADDING + 1, (2,)) - PADDING).tolist()
    image = image.crop((left, top, left + SIDE, top + SIDE))  # black where it reaches beyond
    if torch.rand(()) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return pixels(image).float() / 255, row["label"]


def augmented_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Crop and flip a whole batch of uint8 pictures (B, 3, 32, 32), each in its own way."""
    images, labels = batch
    n, width = len(images), SIDE + 2 * PADDING
    places = torch.arange(SIDE)
    rows = torch.randint(2 * PADDING + 1, (n, 1)) + places
    columns = torch.randint(2 * PADDING + 1, (n, 1)) + torch.where(torch.rand(n, 1) < 0.5, places, places.flip(0))
    padded = F.pad(images, (PADDING,) * 4)
    cropped = padded.gather(2, rows[:, None, :, None].expand(-1, 3, -1, width))
    return cropped.gather(3, columns[:, None, None, :].expand(-1, 3, SIDE, -1)).float() / 255, labels


class Pictures:
    """The file as a map-style dataset for torch's DataLoader: the table in memory, each sample decoded when it is asked for."""

    def __init__(self, path: Path) -> None:
        table = pyarrow.parquet.read_table(path)
        self.images, self.labels = (table.column(name).combine_chunks() for name in ("image", "label"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return augmented({"image": self.images[index].as_py(), "label": self.labels[index].as_py()})


class Decoded:
    """Pictures decoded once, cropped and flipped one by one, for torch's DataLoader."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
        image = F.pad(self.images[index], (PADDING,) * 4)[:, top : top + SIDE, left : left + SIDE]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return image.float() / 255, self.labels[index]


def decoded(path: Path) -> tuple[Tensor, Tensor]:
    """Decode a file once: uint8 (N, 3, 32, 32), int64 (N,)."""
    table = pyarrow.parquet.read_table(path)
    images = [pixels(Image.open(io.BytesIO(image.as_py())).convert("RGB")) for image in table.column("image")]
    return torch.stack(images), torch.tensor(table.column("label").to_pylist())


def cifar(path: Path, rounds: int, *, images: int = 10_000, size: int = 128) -> Part:
    """Compare shuffled epochs of decoded, cropped and flipped pictures out of one file."""
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / FILE
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, images), few)
        started = time.perf_counter()
        tensors = decoded(few)
        once = time.perf_counter() - started
        table = ax.data.TableDataset(few, decode=augmented)
        loaders = {
            ("axontrain, TableDataset(decode=)", workers): ax.Loader(table, size, shuffle=True, workers=workers)
            for workers in (0, WORKERS)
        }
        loaders["axontrain, decoded once, whole batches", 0] = ax.Loader(
            ax.ArrayDataset(*tensors), size, shuffle=True, transform=augmented_batch
        )
        others: dict[tuple[str, int], DataLoader] = {
            ("DataLoader", workers): DataLoader(
                Pictures(few), size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
            )
            for workers in (0, WORKERS)
        }
        others["DataLoader, decoded once, one by one", 0] = DataLoader(Decoded(*tensors), size, shuffle=True)
        every: dict[tuple[str, int], Iterable[Any]] = others | loaders
        names = {key: f"{key[0]}, {key[1]} workers" for key in every}
        times = timed({names[key]: lambda batches=batches: drain(batches) for key, batches in every.items()}, rounds)
        for loader in loaders.values():
            loader.close()
        del others, every  # and the workers of the DataLoaders
    count = len(tensors[0])
    body = []
    for key, name in names.items():
        wall, cpu = (ratios(each, name, names["DataLoader", key[1]]) for each in times)
        body.append([key[0], str(key[1]), f"{median(times.wall[name]) / count * 1e6:.1f}", spread(wall), spread(cpu)])
    return Part(
        "CIFAR-10 from Parquet",
        f"A shuffled epoch of the first {count} pictures in a file of one row group, batches of {size}: decoded by Pillow, "
        f"cropped with padding {PADDING}, flipped, made floats; both read the same file with the same function. Workers "
        f"persist. The ratios are to DataLoader with as many workers; the CPU's counts the workers too. Decoding once, which "
        f"those two rows do not count, took {once / count * 1e6:.0f} µs a picture and {tensors[0].nbytes / MB:.0f} MB.",
        ["contender", "workers", "µs/picture", "ratio (min–max)", "CPU ratio (min–max)"],
        body,
        ["No goal in numbers is set; 1.00 is as fast as DataLoader."],
    )


# 4: memory over many epochs


class Memory(NamedTuple):
    """What processes hold, in bytes: own and shared pages, each counted once; and the sum of what is resident in each."""

    held: int
    resident: int


class Noisy:
    """A dataset whose samples are made, and draw, one by one."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index] + torch.randn(self.x.shape[1]), "index": index}


def arrays(samples: int = 6_400) -> ax.ArrayDataset:
    """Make samples in memory."""
    return ax.ArrayDataset(torch.randn(samples, 784), torch.randint(10, (samples,)))


def written(folder: Path, samples: int = 6_400, groups: int = 20) -> Path:
    """Write a table of several row groups."""
    path = folder / "table.parquet"
    numbers = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.random.rand(samples * 256).astype("float32")), 256)
    rows = pyarrow.table({"x": numbers, "y": np.arange(samples)})
    pyarrow.parquet.write_table(rows, path, row_group_size=-(-samples // groups))
    return path


def as_pair(row: dict[str, Any]) -> tuple[Tensor, int]:
    """Make a sample of a row, with a random sign."""
    return row["x"] * (1 if random.random() < 0.5 else -1), row["y"]


# With cache=4 of 20 row groups each is read anew in each epoch.
CASES: dict[str, Callable[[Path], ax.Loader]] = {
    "in memory": lambda folder: ax.Loader(arrays(), 64, shuffle=True),
    f"in memory, {WORKERS} workers": lambda folder: ax.Loader(arrays(), 64, shuffle=True, workers=WORKERS),
    f"sample by sample, {WORKERS} workers": lambda folder: ax.Loader(
        Noisy(torch.randn(3_200, 784)), 64, shuffle=True, workers=WORKERS
    ),
    "TableDataset": lambda folder: ax.Loader(ax.data.TableDataset(written(folder), cache=4), 64, shuffle=True),
    f"TableDataset(decode=), {WORKERS} workers": lambda folder: ax.Loader(
        ax.data.TableDataset(written(folder, 3_200), cache=4, decode=as_pair), 64, shuffle=True, workers=WORKERS
    ),
}


def occupied() -> Memory:
    """Read what this process and its children hold."""
    gc.collect()
    held = resident = 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        of = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
        held, resident = held + of["Pss_Anon"] + of["Pss_Shmem"], resident + of["Rss"]
    return Memory(held, resident)


def growth(case: str, epochs: int, first: int = 2) -> tuple[Memory, Memory]:
    """Go through epochs; return what the processes hold after the first ones, and after the last."""
    with tempfile.TemporaryDirectory() as folder:
        loader = CASES[case](Path(folder))
        for epoch in range(1, epochs + 1):
            drain(loader)
            if epoch == first:
                before = occupied()
        after = occupied()
        loader.close()
    return before, after


def memory(epochs: int = 50, goal: float = 5) -> Part:
    """Look for growth over epochs, in a fresh process for each case."""
    body, verdicts = [], []
    for case in CASES:
        before, after = in_fresh_process(growth, case, epochs)
        held, resident = ((late - early) / MB for early, late in zip(before, after, strict=True))
        body.append([case, f"{before.held / MB:.1f}", f"{after.held / MB:.1f}", f"{held:+.1f}", f"{resident:+.1f}"])
        verdicts.append(verdict(f"{case}: growth, the greater of the two", max(held, resident), goal, " MB"))
    return Part(
        f"Memory over {epochs} epochs",
        "The process and its workers, after epoch 2 and after the last: what they hold (Pss_Anon + Pss_Shmem of /proc, so that "
        "a page that several share counts once), and by how much the sum of their resident memory (Rss) grew.",
        ["Loader", "MB after epoch 2", f"after epoch {epochs}", "growth", "growth of Rss"],
        body,
        verdicts,
    )


# 5: orders of 10⁹ samples


class Numbers:
    """A dataset whose samples are their indices."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def first_batch(n: int, start: int, rounds: int, size: int = 64) -> tuple[list[float], float]:
    """Return the seconds to batch ``start`` of different epochs, and the bytes by which the peak of memory rose meanwhile."""
    loader = ax.Loader(Numbers(n), size, shuffle=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    resident = _status("VmRSS")
    seconds = []
    for epoch in range(rounds + 1):
        started = time.perf_counter()
        next(loader.batches(0, epoch, start))
        seconds.append(time.perf_counter() - started)
    return seconds, _status("VmHWM") - resident


def orders(rounds: int, n: int = 10**9, size: int = 64, goal_ms: float = 50, goal_mb: float = 100) -> Part:
    """Measure how soon a batch of a very long epoch is there, in a fresh process for each place."""
    body, verdicts = [], []
    for place, start in (("the first batch", 0), ("the batch in the middle", n // size // 2)):
        seconds, risen = in_fresh_process(first_batch, n, start, rounds, size)
        first, *later = (each * 1e3 for each in seconds)
        body.append([place, f"{first:.1f}", spread(later, 1), f"{risen / MB:.1f}"])
        verdicts.append(verdict(f"{place}: the slowest, the first of the process too", max(first, *later), goal_ms, " ms"))
        verdicts.append(verdict(f"{place}: memory", risen / MB, goal_mb, " MB"))
    return Part(
        f"An order of 10^{len(str(n)) - 1} samples",
        f"A shuffled Loader of a dataset that returns its index, batches of {size}: from `loader.batches(seed, epoch, start)` "
        f"to its first batch, of {rounds} epochs after the first of the process. Memory is the rise of the peak (VmHWM) over "
        f"what was resident before. (A stored order would be {n * 8 / 1e9:.3g} GB.)",
        ["place", "the process's first, ms", "later, ms (min–max)", "memory, MB"],
        body,
        verdicts,
    )


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has done nothing yet."""
    usual, context = multiprocessing.get_start_method(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(usual,)) as pool:
        return pool.submit(function, *arguments).result()


def _begin(start_method: str) -> None:
    torch.set_num_threads(1)
    # Of workers: one that was spawned itself would spawn them, whatever the platform's way.
    multiprocessing.set_start_method(start_method, force=True)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# The training sets of W2 and W1 in workloads.py are of these shapes.
PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "wide": lambda arguments: in_memory(Shape(64, 784, 19_200, goal=1.15), arguments.rounds),
    "narrow": lambda arguments: in_memory(Shape(32, 32, 12_800, goal=1.0), arguments.rounds),
    "cifar": lambda arguments: cifar(arguments.cifar / FILE, arguments.rounds),
    "memory": lambda arguments: memory(),
    "orders": lambda arguments: orders(arguments.rounds),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cifar", type=Path, metavar="FOLDER", help=f"where {FILE} is; without it that part is skipped")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
