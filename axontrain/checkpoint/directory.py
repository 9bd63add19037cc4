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

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from axontrain.checkpoint.encode import DTYPES, decode, encode, parsed
from axontrain.errors import CheckpointError, kind_of
from axontrain.shown import plain, quoted

FORMAT = 1
TENSORS, STATE, ABOUT, MANIFEST = "tensors.safetensors", "state.json", "about.json", "manifest.json"
MOST_BYTES = {STATE: 64 * 2**20, ABOUT: 2**20, MANIFEST: 2**20}  # JSON takes many times its size in memory
MOST_HEADER, MOST_TENSORS, MOST_DIMENSIONS = 32 * 2**20, 200_000, 64
HOLES, HOLES_BEYOND = 1024, 2**30  # so many times its blocks on the disk, and so many bytes: a file of nothing


class Encoded(NamedTuple):
    """A tree as it is written: JSON text, tensors on the CPU, and what is said of it (see :func:`about`)."""

    text: str
    tensors: dict[str, Tensor]
    about: str


def encoded(
    tree: Any,
    about: Mapping[str, Any] | None = None,
    place: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Encoded:
    """Make ready to be written, without a copy where none is needed: it is what the tensors hold when they are written.

    With ``place`` the tensors that are written are what it makes of those in the tree.

    Raises:
        CheckpointError: if something in the tree cannot be saved, naming its place.
    """
    text, tensors = encode(tree, place)
    if len(text) > MOST_BYTES[STATE]:
        raise CheckpointError(
            f"the state is {len(text):,} bytes of JSON without its tensors, and no more than {MOST_BYTES[STATE]:,} are read "
            f"back: hold long lists of numbers as tensors"
        )
    header = sum(len(json.dumps(name)) + 100 + 21 * tensor.dim() for name, tensor in tensors.items())
    if len(tensors) > MOST_TENSORS or header > MOST_HEADER:
        raise CheckpointError(
            f"the state has {len(tensors):,} tensors, whose names and shapes take {header:,} bytes; no more than "
            f"{MOST_TENSORS:,} and {MOST_HEADER:,} are read back: stack those that are alike"
        )
    for name, tensor in tensors.items():
        if tensor.dim() > MOST_DIMENSIONS:
            raise CheckpointError(
                f"the tensor {name!r} has {tensor.dim()} dimensions, and no more than {MOST_DIMENSIONS} are read back"
            )
    told, others = encode(dict(about or {}))
    if others or len(told) > MOST_BYTES[ABOUT]:
        raise CheckpointError(
            f"what is said about a checkpoint is plain values, of no more than {MOST_BYTES[ABOUT]:,} bytes of JSON; this is "
            f"{len(told):,} bytes and {len(others)} tensors"
        )
    return Encoded(text, tensors, told)


def write(path: str | os.PathLike[str], tree: Any, about: Mapping[str, Any] | None = None) -> Path:
    """Commit a tree to the directory ``path``, replacing a checkpoint that is there.

    Args:
        path: of the checkpoint's directory.
        tree: numbers, text, None, tensors, and lists and mappings of them.
        about: what a list of checkpoints shows without reading the whole; plain values.

    Raises:
        CheckpointError: if something in the tree cannot be saved, or ``path`` is something else than a checkpoint;
            what was at ``path`` is as it was.
        OSError: if the disk is full or may not be written; likewise.
    """
    target = Path(path).absolute()  # which has a name, as "." has not
    ours = all((target / name).is_file() for name in (TENSORS, STATE)) or (target.is_dir() and not any(target.iterdir()))
    if target.exists() and not ours:
        raise CheckpointError(f"{target} is there and is no checkpoint: choose another path, nothing was written")
    what = encoded(tree, about)
    make(target.parent)
    return commit(target, what)


def commit(target: Path, what: Encoded) -> Path:
    """Write what was made ready, replacing whatever is at ``target``: the part of :func:`write` that takes time.

    Every byte is read back before it takes its place: what the disk has not kept leaves what was there as it was.

    Raises:
        CheckpointError: if it does not read back as it was written.
        OSError: if the disk is full, may not be written, or the directory of ``target`` is not there.
    """
    _sweep(target, "tmp")
    if _left(target, "old") and is_whole(target):  # else one of them may be all that there is
        sync(target.parent)
        _sweep(target, "old")
    new, aside = beside(target, "tmp"), beside(target, "old")
    try:
        _fill(new, what)
        try:
            verify(new)
        except CheckpointError as error:
            told = str(error).replace(new.name, target.name)
            raise CheckpointError(f"what was written does not read back as it was: {told}") from error
        if target.exists():
            target.rename(aside)
        new.rename(target)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            aside.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync(target.parent)
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


def about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was said of a checkpoint when it was written, checked against its manifest; of its other files the sizes are.

    Raises:
        CheckpointError: if it is no checkpoint, or damaged so far.
    """
    source = Path(path)
    listed = _listed(source)
    for name, described in listed.items():
        _check_size(source, name, described)
    if ABOUT not in listed:
        return {}
    _check(source, ABOUT, listed[ABOUT])
    told = _json(source / ABOUT, {})
    if not isinstance(told, dict):
        raise CheckpointError(f"{source / ABOUT} is {kind_of(told)}, no mapping")
    return told


def verify(path: str | os.PathLike[str]) -> None:
    """Check every byte of a checkpoint against its manifest.

    Raises:
        CheckpointError: if it is no checkpoint, incomplete or damaged; it says which file and how.
    """
    source = Path(path)
    listed = _listed(source)
    for name, described in listed.items():  # all of them at first, as it costs nothing
        _check_size(source, name, described)
    _check_header(_file(source, TENSORS))
    for name, described in listed.items():
        _check(source, name, described)


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint verifies."""
    try:
        verify(path)
    except (CheckpointError, OSError):
        return False
    return True


def _fill(directory: Path, what: Encoded) -> None:
    directory.mkdir()
    try:
        save_file(what.tensors, directory / TENSORS)
    except SafetensorError as error:  # its own words for what the disk said
        raise OSError(f"{directory / TENSORS} could not be written: {error}") from error
    (directory / STATE).write_text(what.text, encoding="utf-8")
    (directory / ABOUT).write_text(what.about, encoding="utf-8")
    # safetensors lets nobody else read it; the others are as the umask has it.
    (directory / TENSORS).chmod((directory / STATE).stat().st_mode & 0o777)
    files = {name: _described(directory / name) for name in (TENSORS, STATE, ABOUT)}
    for name in files:
        sync(directory / name)
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    sync(directory / MANIFEST)
    sync(directory)


def _read(source: Path) -> Any:
    verify(source)
    try:
        tensors = loaded(source / TENSORS)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:  # as a header was forged, any of them
        raise CheckpointError(f"{source / TENSORS} cannot be read: {plain(error)}") from error
    for name, tensor in tensors.items():
        # Torch counts what is true to know where to write, and would count such a byte as more than one.
        if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise CheckpointError(f"{source / TENSORS} cannot be read: {quoted(name)} holds what is neither true nor false")
    return _json(_file(source, STATE), tensors)


def _listed(source: Path) -> dict[str, Any]:
    """The files of a checkpoint with their sizes and sums, as its manifest says."""
    manifest = _json(_file(source, MANIFEST), {})
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{source} is damaged: {MANIFEST} does not list its files")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{source} has the format {quoted(manifest.get('format'))}; this axontrain reads {FORMAT}")
    listed: dict[str, Any] = manifest["files"]
    if not {TENSORS, STATE} <= set(listed) <= {TENSORS, STATE, ABOUT}:  # nor is a manifest to lead out of its directory
        raise CheckpointError(f"{source} is damaged: {MANIFEST} lists {kind_of(sorted(listed))}, which are other files")
    return listed


def _check_size(source: Path, name: str, expected: Any) -> None:
    size = _file(source, name).stat().st_size
    if not isinstance(expected, dict) or type(expected.get("size")) is not int or expected["size"] != size:
        raise CheckpointError(f"{source} is damaged: {name} is not of the size that its manifest says")


def _check_header(file: Path) -> None:
    """Raise unless the tensors are described as they are written here: safetensors lets more pass, and takes long over it."""
    damaged = f"{file} is damaged: its header"
    with opened(file) as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, os.fstat(stream.fileno()).st_size - 8):
            raise CheckpointError(f"{damaged} is said to be of {length:,} bytes")
        header = stream.read(length)
    if header.count(b"{") > MOST_TENSORS + 1:
        raise CheckpointError(f"{damaged} has more than {MOST_TENSORS:,} tensors")
    try:
        tensors = parsed(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{damaged} is no JSON that axontrain wrote: {plain(error)}") from error
    for name, described in tensors.items() if isinstance(tensors, dict) else [("it", tensors)]:
        if not _is_described(described):
            raise CheckpointError(f"{damaged} describes {quoted(name)} as no tensor that axontrain wrote")


def _is_described(tensor: Any) -> bool:
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        return False
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPES.values()
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
    ):
        return False
    if len(shape) > MOST_DIMENSIONS or len(offsets) != 2:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets))


def _check(source: Path, name: str, expected: Any) -> None:
    _check_size(source, name, expected)
    file = _file(source, name)
    if expected != _described(file):
        raise CheckpointError(f"{source} is damaged: {name} is not of the content that its manifest says")


def _file(source: Path, name: str) -> Path:
    """A file of a checkpoint, which is no link, no pipe, and of a size that can be read."""
    file = source / name
    found = None
    # A ValueError is of a path with a NUL; any error of another kind is of the disk's, and says nothing of the file.
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        found = file.lstat()
    if found is None or not stat.S_ISREG(found.st_mode):
        how = "no checkpoint: it has no" if name == MANIFEST else "incomplete: it has no"
        raise CheckpointError(f"{source} is {how} {name}")
    if name in MOST_BYTES and found.st_size > MOST_BYTES[name]:
        raise CheckpointError(f"{source} is damaged: {name} is larger than {MOST_BYTES[name]:,} bytes")
    if found.st_size > HOLES_BEYOND and 0 < getattr(found, "st_blocks", 0) * 512 < found.st_size / HOLES:
        raise CheckpointError(f"{source} is damaged: {name} is one large hole, {found.st_size:,} bytes that are not there")
    return file


def _json(file: Path, tensors: Mapping[str, Tensor]) -> Any:
    try:
        with opened(file) as stream:
            text = stream.read(MOST_BYTES.get(file.name, -1) + 1)
        if len(text) > MOST_BYTES[file.name]:
            raise CheckpointError(f"it is larger than {MOST_BYTES[file.name]:,} bytes")
        return decode(text.decode("utf-8"), tensors)
    except (UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _left(target: Path, kind: str) -> list[Path]:
    """What earlier saves left beside a target, in their order. A name that a person gave, as ``state.old-1``, is none."""
    name = re.compile(rf"{re.escape(target.name)}\.{kind}-\d{{6}}-[0-9a-f]{{32}}")
    files = target.parent.iterdir() if target.parent.is_dir() else ()
    return sorted(file for file in files if name.fullmatch(file.name))


def beside(target: Path, kind: str) -> Path:
    """A new name beside a target, after those that are there."""
    left = _left(target, kind)
    number = int(left[-1].name.split("-")[-2]) + 1 if left else 0
    return target.with_name(f"{target.name}.{kind}-{number:06d}-{uuid.uuid4().hex}")


def _sweep(target: Path, kind: str) -> None:
    for one in _left(target, kind):  # what stays is swept by the next save
        if one.is_symlink() or not one.is_dir():  # a file was in the target's place
            with suppress(OSError):
                one.unlink()
        else:
            shutil.rmtree(one, ignore_errors=True)


def _described(file: Path) -> dict[str, Any]:
    with opened(file) as stream:
        digest = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]  # it is a BufferedReader
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": digest.hexdigest()}


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file to be read, which is a file: a link or a pipe that has taken its place is neither followed nor waited for.

    Raises:
        CheckpointError: if it is something else by now, or gone.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise CheckpointError(f"{file} is not there any more, or no file of its own") from error
        raise
    with open(descriptor, "rb") as stream:  # noqa: PTH123  # it is open
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{file} is no file any more")
        yield stream


def loaded(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by the file that is open: what takes its place meanwhile is not looked at."""
    with opened(file) as stream:
        by_number = Path(f"/proc/self/fd/{stream.fileno()}")
        return load_file(by_number if by_number.exists() else file)


def make(directory: Path) -> None:
    """Make a directory and those that it lies in, where they are not there, so that a power cut does not take them again."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    if os.name == "posix":
        for path in reversed(made):
            sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
