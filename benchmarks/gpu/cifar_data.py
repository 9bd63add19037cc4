"""CIFAR-10 as tensors: decoded from Parquet once, and kept in one .safetensors file of 184 MB.

`python -m benchmarks.gpu.cifar_data --from FOLDER --to FILE.safetensors` (FOLDER with cifar10-train.parquet and
cifar10-test.parquet: the columns image, encoded bytes, and label). Decoding needs pyarrow and Pillow, reading the file neither:
convert where these are, and give the file to `python -m benchmarks.gpu --data FILE.safetensors` elsewhere.
"""

from __future__ import annotations

import argparse
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("train", "test")
SIDE, CLASSES = 32, 10
CONVERTED = "cifar10.safetensors"
AT_ONCE = 1024


class Pictures(NamedTuple):
    """Images (N, 3, 32, 32) of uint8, and labels (N,) of int64."""

    images: Tensor
    labels: Tensor


def parquet(folder: Path, part: str) -> Path:
    """Where a part is looked for."""
    return folder / f"cifar10-{part}.parquet"


def decoded(path: Path) -> Pictures:
    """Decode a file of Parquet.

    Raises:
        SystemExit: if what decodes it is not installed, or it holds something else; saying what to do.
    """
    try:
        from PIL import Image
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise SystemExit(
            f"decoding {path} needs pyarrow and Pillow ({error}): pip install pyarrow pillow. Or convert it where these are, "
            f"by python -m benchmarks.gpu.cifar_data --from {path.parent} --to {CONVERTED}, and pass --data {CONVERTED} here"
        ) from error
    table = read_table(path)
    if missing := {"image", "label"} - set(table.column_names):
        raise SystemExit(f"{path} has the columns {table.column_names}, and not {' and '.join(sorted(missing))}")

    def pixels(chunk: list[bytes]) -> Tensor:
        found = (Image.open(io.BytesIO(one)).convert("RGB").tobytes() for one in chunk)
        # As a bytearray, since torch warns of what is read-only.
        return torch.stack([torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in found])

    encoded = table["image"].to_pylist()
    chunks = [encoded[first : first + AT_ONCE] for first in range(0, len(encoded), AT_ONCE)]
    with ThreadPoolExecutor() as threads:
        flat = torch.cat(list(threads.map(pixels, chunks)))
    if flat.shape[1] != SIDE * SIDE * 3:
        raise SystemExit(f"{path} has images of {flat.shape[1] // 3} pixels; CIFAR-10's are {SIDE} x {SIDE}")
    images = flat.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()
    return Pictures(images, torch.tensor(table["label"].to_pylist()))


def convert(folder: Path, to: Path) -> None:
    """Write both parts of a folder to one file."""
    found = {part: decoded(parquet(folder, part)) for part in PARTS}
    tensors = {f"{part}.{name}": tensor for part, pair in found.items() for name, tensor in pair._asdict().items()}
    save_file(tensors, to)


def read(path: Path) -> dict[str, Pictures]:
    """Read what :func:`convert` has written.

    Raises:
        SystemExit: if it is no such file.
    """
    tensors = load_file(path)
    wanted = {f"{part}.{name}" for part in PARTS for name in Pictures._fields}
    if set(tensors) != wanted:
        raise SystemExit(f"{path} holds {sorted(tensors)}; what benchmarks.gpu.cifar_data writes holds {sorted(wanted)}")
    return {part: Pictures(tensors[f"{part}.images"], tensors[f"{part}.labels"]) for part in PARTS}


def made(train: int, test: int) -> dict[str, Pictures]:
    """Pictures that are made up, where there are none: of each class a pattern, under noise."""
    generator = torch.Generator().manual_seed(4)
    patterns = torch.rand(CLASSES, 3, SIDE, SIDE, generator=generator)

    def some(count: int) -> Pictures:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        noise = torch.rand(count, 3, SIDE, SIDE, generator=generator)
        return Pictures((patterns[labels] * 60 + noise * 195).to(torch.uint8), labels)

    return {"train": some(train), "test": some(test)}


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, required=True, metavar="FOLDER", help="where the Parquet files are")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    given = parser.parse_args()
    if absent := [str(parquet(given.folder, part)) for part in PARTS if not parquet(given.folder, part).exists()]:
        parser.error(f"there is no {' and no '.join(absent)}")
    if given.to.suffix != ".safetensors":
        parser.error(f"--to {given.to}: a name that ends in .safetensors")
    convert(given.folder, given.to)
    print(f"{given.to}: {given.to.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
