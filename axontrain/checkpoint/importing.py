"""Importing: a file of ``torch.save`` made into safetensors, once, so that nothing has to be unpickled afterwards.

It is the one place where axontrain reads a pickle, and it does so because a person asked for that file by name.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from axontrain.checkpoint.directory import sync
from axontrain.checkpoint.encode import TENSOR, encode
from axontrain.checkpoint.weights import PICKLED, is_pickle
from axontrain.errors import CheckpointError, ConfigurationError, kind_of
from axontrain.naming import cleaned
from axontrain.shown import NAME, plain, quoted

SUFFIX = ".safetensors"
WELL_KNOWN = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
MOST_LISTED, MOST_NESTED = 20, 4  # a mapping may hold itself
TAR = slice(257, 262)  # where an archive of a torch from before 2017 says so


def import_weights(file: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, key: str | None = None) -> Path:
    """Make a safetensors file of the tensors in a file of ``torch.save``, and print what was done.

    It is read with ``torch.load(weights_only=True)`` and in no other way, whatever that says. Even so: import only files
    that you trust.

    Args:
        file: what ``torch.save`` wrote: a mapping of tensors, or one that holds it under a key.
        out: where to write; the same name with ``.safetensors`` unless given. A file that is there is left alone.
        key: where in ``file`` the tensors are, as in ``"ema.model"``; well-known keys are found without it.

    Returns:
        The path of what was written.

    >>> import contextlib, io, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
    ...     torch.save({"model": {"module.weight": torch.ones(2, 3)}, "epoch": 5}, f"{folder}/old.pt")
    ...     import_weights(f"{folder}/old.pt").name
    took what is under 'model'; the other keys are left out: 'epoch'
    left the segments of wrappers out of the names: 'module.weight' is 'weight'
    wrote /.../old.safetensors: 1 tensor, 24 bytes
    load it with ax.load_weights(module, '/.../old.safetensors')
    'old.safetensors'

    Raises:
        ConfigurationError: if ``out`` is there already or is no ``.safetensors``.
        CheckpointError: if ``file`` is refused, or holds no mapping of tensors where it should; nothing is written then.
        OSError: if the disk is full or may not be written; likewise.
    """
    source = Path(file)
    target = Path(out) if out is not None else _beside(source)
    _check_places(source, target)
    _check_kind(source)
    print(
        f"axontrain: warning: {source} is a pickle. torch.load(weights_only=True) limits what it can do, but is no boundary "
        f"(CVE-2025-32434, CVE-2026-24747: needs torch >= 2.10, this is {torch.__version__}): only import files that you trust",
        file=sys.stderr,
    )
    found, notes = _tensors(_loaded(source), key, source)
    names = cleaned(found)
    if changed := [name for name, short in names.items() if name != short]:
        example = f"{quoted(changed[0])} is {quoted(names[changed[0]])}"
        notes.append(f"left the segments of wrappers out of the names: {example}")
    tensors = _ready({names[name]: value for name, value in found.items()}, source)
    _write(target, tensors)
    count, size = len(tensors), sum(tensor.nbytes for tensor in tensors.values())
    for note in notes:
        print(note)
    print(f"wrote {target}: {count:,} tensor{'s' if count > 1 else ''}, {size:,} bytes")
    print(f"load it with ax.load_weights(module, {str(target)!r})")
    return target


def _beside(source: Path) -> Path:
    return source.with_suffix(SUFFIX) if source.suffix.lower() in PICKLED else source.with_name(source.name + SUFFIX)


def _check_places(source: Path, target: Path) -> None:
    if torch.__version__ < "2.10":
        raise ConfigurationError(f"this is torch {torch.__version__}, in which weights_only=True is broken: 2.10 or newer")
    if source.is_dir():
        raise CheckpointError(f"{source} is a directory: ax.load_weights reads a checkpoint as it is, no other is imported")
    if not source.is_file():  # a link to a file will do, as in the caches of hubs; to open a pipe would be to wait for ever
        raise CheckpointError(f"{source} is {'no regular file' if source.exists() else 'not there'}")
    if source.suffix.lower() == SUFFIX:
        raise CheckpointError(f"{source} need not be imported: ax.load_weights reads it")
    if target.suffix.lower() != SUFFIX:
        raise ConfigurationError(f"{target}: what is written is safetensors, and its name ends in {SUFFIX}")
    _check_free(target)


def _check_free(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigurationError(f"{target} is there already, and is left alone: remove it, or name another OUT")


def _check_kind(source: Path) -> None:
    """Raise unless a file begins as a pickle does: of any other there is nothing to be warned of, and nothing to import."""
    with source.open("rb") as stream:
        head = stream.read(TAR.stop)
    if is_pickle(head) or head[TAR] == b"ustar":
        if not head.startswith(b"PK") or _has_pickle(source):
            return
        raise CheckpointError(f"{source} is refused: it is an archive without a pickle in it, and not of torch.save")
    if head[8:9] == b"{":
        raise CheckpointError(f"{source} is refused: it looks like safetensors, which ax.load_weights reads as they are")
    begins = f"begins with {quoted(head[:16].decode('utf-8', 'backslashreplace'))}" if head else "is empty"
    raise CheckpointError(f"{source} is refused: it is no file of torch.save, and {begins}")


def _has_pickle(source: Path) -> bool:
    try:
        with zipfile.ZipFile(source) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except Exception:  # it is damaged, and torch says how
        return True


def _loaded(source: Path) -> Any:
    """What is in the file, read in the one way there is; never retried in another."""
    try:
        with warnings.catch_warnings():  # of old protocols and of torch's own storages: nothing that a person could act on
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a forged pickle may provoke is anything
        raise CheckpointError(
            f"{source} is refused: {_reason(error)}. Nothing was written, and it is read in no other way; have it saved again "
            f"as torch.save(model.state_dict(), ...), or as safetensors"
        ) from error


def _reason(error: Exception) -> str:
    """Why torch refused, in one line, without its advice to read the file unsafely."""
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked:
        return f"it asks for {plain(asked[1], NAME)}, and tensors need no such thing"
    if "TorchScript" in text:
        return "it is a TorchScript archive, a program"
    lines = [line for line in text.splitlines() if line.strip() and "weights_only" not in line and "torch.load" not in line]
    what = plain(lines[0].strip(), NAME).rstrip(".") if lines else "it ends too soon, or is no such file"
    return f"torch.load(weights_only=True) cannot read it ({type(error).__name__}: {what})"


def _tensors(loaded: Any, key: str | None, source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The flat mapping of tensors in what was loaded, and what is to be said about it."""
    notes: list[str] = []
    if key is not None:
        found = _under(loaded, key)
        if not _has_tensors(found):
            what = "there is no such key" if found is None else f"it is {_kind(found)}, no mapping with tensors"
            raise CheckpointError(f"{source}: --key {plain(key)}: {what}. {_listing(loaded)}")
    else:
        found = loaded
        for _ in range(MOST_NESTED):
            name = _well_known(found, source)
            if name is None:
                break
            others = [other for other in found if other != name]
            also = f"; the other keys are left out: {_names(others)}" if others else ""
            notes.append(f"took what is under {name!r}{also}")
            found = found[name]
        if not _is_flat(found):
            raise CheckpointError(f"{source} holds no flat mapping of tensors: say where it is with --key. {_listing(found)}")
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    others = [name for name in found if name not in tensors]
    if others:
        kinds = [f"{_key(name)} ({_kind(found[name])})" for name in others[:MOST_LISTED]]
        more = f" and {len(others) - MOST_LISTED:,} more" if len(others) > MOST_LISTED else ""
        notes.append(f"left out what is no tensor with a name: {', '.join(kinds)}{more}")
    if not tensors:
        raise CheckpointError(f"{source}: no tensor there has a name that is text. {_listing(found)}")
    return tensors, notes


def _well_known(found: Any, source: Path) -> str | None:
    """The one well-known key that has the tensors below it, if there is one."""
    if not isinstance(found, Mapping):
        return None
    names = [name for name in WELL_KNOWN if name in found and _reaches_tensors(found[name])]
    if len(names) > 1:
        raise CheckpointError(f"{source} holds several mappings of tensors, under {_names(names)}: say which with --key")
    return names[0] if names else None


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _is_flat(value: Any) -> bool:
    """Whether it has tensors, and no mapping of further ones beside them (an extra state may be one)."""
    if not _has_tensors(value):
        return False
    nested = [name for name, item in value.items() if _has_tensors(item)]
    return all(isinstance(name, str) and name.rpartition(".")[2] == "_extra_state" for name in nested)


def _reaches_tensors(value: Any) -> bool:
    return _has_tensors(value) or (isinstance(value, Mapping) and any(_has_tensors(value.get(name)) for name in WELL_KNOWN))


def _under(value: Any, key: str) -> Any:
    """What is at a dotted key; a key of the file may hold dots itself."""
    if not isinstance(value, Mapping):
        return None
    if key in value:
        return value[key]
    for place, letter in enumerate(key):
        if letter == "." and (found := _under(value.get(key[:place]), key[place + 1 :])) is not None:
            return found
    return None


def _ready(found: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: dense, contiguous, tied ones each whole."""
    if "__metadata__" in found:
        raise CheckpointError(f"{source}: a tensor is called '__metadata__', which safetensors keeps for itself: rename it")
    try:
        text, tensors = encode(found)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return {name: tensors[place[TENSOR]] for name, place in json.loads(text).items()}


def _write(target: Path, tensors: dict[str, Tensor]) -> None:
    """Write beside, sync, rename: what has the name is whole."""
    beside = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        try:
            save_file(tensors, beside, metadata={"format": "pt"})
        except SafetensorError as error:  # its own words for what the disk said
            raise OSError(f"{target} could not be written: {error}") from error
        sync(beside)
        _check_free(target)  # it took a while
        beside.rename(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(target.parent)


def _listing(value: Any) -> str:
    return f"Its keys: {_names(list(value)) or 'none'}" if isinstance(value, Mapping) else f"It is {_kind(value)}"


def _names(names: list[Any]) -> str:
    more = f" and {len(names) - MOST_LISTED:,} more" if len(names) > MOST_LISTED else ""
    return ", ".join(map(_key, names[:MOST_LISTED])) + more


def _key(name: Any) -> str:
    return quoted(name) if isinstance(name, str) else f"a key that is {_kind(name)}"


def _kind(value: Any) -> str:
    # What is inside is not looked at: a small file may hold lists in lists without end.
    return kind_of(value) if isinstance(value, Tensor) else type(value).__name__
