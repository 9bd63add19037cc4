"""A checkpoint directory: written beside its place, synced, its manifest last, and renamed into place.

A reader sees the whole checkpoint or none: whatever was interrupted lies under another name, and whatever was damaged
does not match the manifest's sizes and SHA-256 sums. Loading never unpickles, imports or writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from axontrain.checkpoint.encode import decode, encode
from axontrain.errors import CheckpointError

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


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
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} is there and is no checkpoint: choose another path, nothing was written")
    text, tensors = encode(tree)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        beside.mkdir()
        save_file(tensors, beside / TENSORS)
        (beside / STATE).write_text(text, encoding="utf-8")
        files = {name: _described(beside / name) for name in (TENSORS, STATE)}
        for name in files:
            _sync(beside / name)
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
        (beside / MANIFEST).write_text(manifest, encoding="utf-8")
        _sync(beside / MANIFEST)
        _sync(beside)
        replaced = None
        if target.exists():  # a directory cannot be renamed over a full one: the old one steps aside, whole
            replaced = target.with_name(f"{target.name}.old-{uuid.uuid4().hex}")
            target.rename(replaced)
        beside.rename(target)
        _sync(target.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


def read(path: str | os.PathLike[str]) -> Any:
    """Read the tree of a checkpoint directory, after checking every byte of it against its manifest.

    Raises:
        CheckpointError: if it is no checkpoint, incomplete or damaged; it says which file and how.

    """
    source = Path(path)
    if not source.exists():
        # A crash between the two renames of a replacement leaves the old one whole, under its other name.
        aside = sorted(source.parent.glob(f"{source.name}.old-*")) if source.parent.is_dir() else []
        if not aside:
            raise CheckpointError(f"{source} is not there")
        source = aside[-1]
    manifest = _manifest(source)
    for name in (TENSORS, STATE):
        file = source / name
        if not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{source} is incomplete: {name} is missing")
        expected, found = manifest.get(name), _described(file)
        if expected != found:
            how = "size" if not isinstance(expected, dict) or expected.get("size") != found["size"] else "content"
            raise CheckpointError(f"{source} is damaged: {name} is not of the {how} that its manifest says")
    try:
        tensors = load_file(source / TENSORS)
        text = (source / STATE).read_text(encoding="utf-8")
    except (SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source} cannot be read: {error}") from error
    return decode(text, tensors)


def _manifest(source: Path) -> dict[str, Any]:
    file = source / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise CheckpointError(f"{source} is no checkpoint: it has no {MANIFEST}")
    manifest = decode(file.read_text(encoding="utf-8", errors="replace"), {})
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{source} is damaged: {MANIFEST} does not list its files")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{source} has the format {manifest.get('format')!r}; this axontrain reads {FORMAT}")
    return manifest["files"]  # type: ignore[no-any-return]


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
