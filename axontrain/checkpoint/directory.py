"""A checkpoint directory: written beside its place, synced, its manifest last, and renamed into place.

A reader sees the whole checkpoint or none: whatever was interrupted lies under another name, and whatever was damaged
does not match the manifest's sizes and SHA-256 sums. Loading never unpickles, imports or writes.

A directory cannot be renamed over a full one, so that one that is replaced first steps aside, whole. Beside ``state`` lie::

    state.tmp-<number>-<hex>   what is being written
    state.old-<number>-<hex>   what is being replaced: read where ``state`` is missing, the highest number first

A save that was killed leaves them and the next one removes them, save where one may be all that there is. One process at a
time saves to a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from axontrain.checkpoint.encode import decode, encode
from axontrain.errors import CheckpointError

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
MOST_BYTES = {STATE: 64 * 2**20, MANIFEST: 2**20}  # JSON takes many times its size in memory


def name_of(step: int) -> str:
    """The directory name of the checkpoint of a step.

    >>> name_of(123)
    'step-000000123'
    """
    return f"step-{step:09d}"


def write(path: str | os.PathLike[str], tree: Any) -> Path:
    """Commit a tree to the directory ``path``, replacing a checkpoint that is there.

    Raises:
        CheckpointError: if something in the tree cannot be saved, or ``path`` is something else than a checkpoint;
            what was at ``path`` is as it was.
        OSError: if the disk is full or may not be written; likewise.
    """
    target = Path(path)
    ours = all((target / name).is_file() for name in (TENSORS, STATE)) or (target.is_dir() and not any(target.iterdir()))
    if target.exists() and not ours:
        raise CheckpointError(f"{target} is there and is no checkpoint: choose another path, nothing was written")
    text, tensors = encode(tree)
    if len(text) > MOST_BYTES[STATE]:
        raise CheckpointError(
            f"the state is {len(text):,} bytes of JSON without its tensors, and no more than {MOST_BYTES[STATE]:,} are read "
            f"back: hold long lists of numbers as tensors"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target, "tmp")
    if _left(target, "old") and _is_whole(target):  # else one of them may be all that there is
        _sync(target.parent)
        _sweep(target, "old")
    beside, aside = _next(target, "tmp"), _next(target, "old")
    try:
        _fill(beside, text, tensors)
        if target.exists():
            target.rename(aside)
        beside.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync(target.parent)
    _sweep(target, "old")
    return target


def read(path: str | os.PathLike[str]) -> Any:
    """Read the tree of a checkpoint directory, after checking every byte of it against its manifest.

    Raises:
        CheckpointError: if it is no checkpoint, incomplete or damaged; it says which file and how.
    """
    source = Path(path)
    if source.exists():
        return _read(source)
    for aside in reversed(_left(source, "old")):  # of a save that was killed between its two renames,
        with suppress(CheckpointError, OSError):  # or while it removed this one
            return _read(aside)
    raise CheckpointError(f"{source} is not there")


def _fill(directory: Path, text: str, tensors: dict[str, Tensor]) -> None:
    directory.mkdir()
    try:
        save_file(tensors, directory / TENSORS)
    except SafetensorError as error:  # its own words for what the disk said
        raise OSError(f"{directory / TENSORS} could not be written: {error}") from error
    (directory / STATE).write_text(text, encoding="utf-8")
    files = {name: _described(directory / name) for name in (TENSORS, STATE)}
    for name in files:
        _sync(directory / name)
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    _sync(directory / MANIFEST)
    _sync(directory)


def _read(source: Path) -> Any:
    _verify(source)
    try:
        tensors = load_file(source / TENSORS)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:  # as a header was forged, any of them
        raise CheckpointError(f"{source / TENSORS} cannot be read: {error}") from error
    return _json(_file(source, STATE), tensors)


def _verify(source: Path) -> None:
    """Check a checkpoint's files against its manifest."""
    manifest = _json(_file(source, MANIFEST), {})
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{source} is damaged: {MANIFEST} does not list its files")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{source} has the format {manifest.get('format')!r}; this axontrain reads {FORMAT}")
    for name in (TENSORS, STATE):
        expected, found = manifest["files"].get(name), _described(_file(source, name))
        if expected != found:
            how = "size" if not isinstance(expected, dict) or expected.get("size") != found["size"] else "content"
            raise CheckpointError(f"{source} is damaged: {name} is not of the {how} that its manifest says")


def _is_whole(source: Path) -> bool:
    try:
        _verify(source)
    except (CheckpointError, OSError):
        return False
    return True


def _file(source: Path, name: str) -> Path:
    """A file of a checkpoint, which is no link, no pipe, and of a size that can be read."""
    file = source / name
    if not file.is_file() or file.is_symlink():
        how = "no checkpoint: it has no" if name == MANIFEST else "incomplete: it has no"
        raise CheckpointError(f"{source} is {how} {name}")
    if name in MOST_BYTES and file.stat().st_size > MOST_BYTES[name]:
        raise CheckpointError(f"{source} is damaged: {name} is larger than {MOST_BYTES[name]:,} bytes")
    return file


def _json(file: Path, tensors: Mapping[str, Tensor]) -> Any:
    try:
        return decode(file.read_text(encoding="utf-8"), tensors)
    except (UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _left(target: Path, kind: str) -> list[Path]:
    """What earlier saves left beside a target, in their order. A name that a person gave, as ``state.old-1``, is none."""
    name = re.compile(rf"{re.escape(target.name)}\.{kind}-\d{{6}}-[0-9a-f]{{32}}")
    files = target.parent.iterdir() if target.parent.is_dir() else ()
    return sorted(file for file in files if name.fullmatch(file.name))


def _next(target: Path, kind: str) -> Path:
    """A new name beside a target, after those that are there."""
    left = _left(target, kind)
    number = int(left[-1].name.split("-")[-2]) + 1 if left else 0
    return target.with_name(f"{target.name}.{kind}-{number:06d}-{uuid.uuid4().hex}")


def _sweep(target: Path, kind: str) -> None:
    for directory in _left(target, kind):
        if directory.is_symlink():
            directory.unlink()
        shutil.rmtree(directory, ignore_errors=True)  # what stays is swept by the next save


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
