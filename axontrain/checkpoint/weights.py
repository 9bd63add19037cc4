"""Weights: a module filled from a checkpoint, a run or a safetensors file, for use without the Loop that trained it.

Names are compared clean on both sides (:mod:`axontrain.naming`): what is compiled or wrapped, there or here, does not matter.
All is checked before anything is changed. Nothing is unpickled, imported or written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from axontrain.checkpoint import directory, runs
from axontrain.errors import CheckpointError, ConfigurationError, kind_of, loses
from axontrain.naming import clean_names, cleanings, torn
from axontrain.shown import plain, quoted

PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # what files of torch.save are called, whatever they are
LISTED = 6
# Of a file that somebody else wrote: safetensors takes time and memory for each tensor before it says anything.
MOST_TENSORS, MOST_HEADER = 100_000, 64 * 2**20
MOST_ADVISED, MOST_TRIED = 10_000, 20  # advice takes a pass over all names for each prefix


class Unmatched(NamedTuple):
    """The names that did not fit, clean: what torch's ``load_state_dict`` returns too."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    prefix: str | None = None,
) -> Unmatched:
    """Fill a module with trained weights. Either all that is loaded fits, or nothing is changed.

    Args:
        module: any module; it may be compiled or wrapped. Values are converted to the dtypes and devices that it has.
        path: a checkpoint directory, a run directory (its newest good checkpoint), a ``.safetensors`` file, or what
            ``loop.save()`` gave.
        strict: every name of the module must be there, and no other. Without it, what has the same name is loaded.
        prefix: take only the names below it, and without it: ``"net."`` fills ``objective.net`` from its objective's weights.

    Returns:
        ``(missing_keys, unexpected_keys)``: names of the module that were not there, and names that the module has not got.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> layer = nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}, f"{folder}/trained.safetensors")
    ...     load_weights(layer, f"{folder}/trained.safetensors", prefix="net.")
    Unmatched(missing_keys=[], unexpected_keys=[])
    >>> layer(torch.tensor([2.0, 3.0])).item()
    5.0

    Raises:
        CheckpointError: if it cannot be read, or does not fit: other names (with ``strict``; otherwise none at all in
            common), other shapes, or floats where integers are. It says what would fit, where something would.
        ConfigurationError: if an argument is of another kind, or two names of the module are the same without its wrappers.
    """
    _check_arguments(module, path, strict, prefix)
    source, values = ("the snapshot", _objective(path, "the snapshot")) if isinstance(path, Mapping) else _read(Path(path))
    prefix = prefix or ""
    own = module.state_dict(keep_vars=True)
    clean = clean_names(module)
    wanted = {clean[key]: value for key, value in own.items()}
    where = f"{source}{f' below {prefix!r}' if prefix else ''}"
    found = _best(values, wanted, _dotted(prefix), where)

    missing = _missing(wanted, found)
    unexpected = [name for name in found if name not in wanted]
    faults = [fault for name in wanted if name in found and (fault := _fault(name, found[name], wanted[name]))]
    faults = [f"{len(faults)} of its tensors are of another kind: {_listed(faults)}"] if faults else []
    if not faults and (fault := torn(module, found)):
        faults = [fault]
    nothing = len(unexpected) == len(found)
    if strict or nothing:
        faults += [f"it lacks {_listed(map(quoted, missing))}"] if missing else []
        if unexpected:
            faults.append(f"the module lacks {_listed(map(quoted, unexpected))}{_tied(unexpected, found, wanted)}")
    if faults or nothing:
        raise CheckpointError(
            f"{where} does not fit this {_type(module)}, nothing was loaded: {'; '.join(faults) or 'there is nothing in it'}"
            f"{_advice(values, found, wanted)}"
        )
    state = {key: found[clean[key]] for key in own if clean[key] in found}
    try:
        module.load_state_dict(state, strict=False)  # names were compared above
    except Exception as error:  # a module's own hooks and extra state may ask for anything
        raise CheckpointError(
            f"{where} could not be loaded into this {_type(module)}, which may hold a part of it now: {plain(error, 1000)}"
        ) from error
    return Unmatched(missing, unexpected)


def _check_arguments(module: object, path: object, strict: object, prefix: object) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"load_weights fills a module, not {kind_of(module)}: give loop.objective, or the model")
    if isinstance(path, Mapping):
        if "objective" not in path:
            raise ConfigurationError(
                "load_weights takes of mappings what loop.save() gave, and this one has no 'objective': a state_dict goes into "
                "module.load_state_dict(...)"
            )
    elif not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ConfigurationError(
            f"load_weights reads a path, not {kind_of(path)}: give a checkpoint, a run directory or a .safetensors file, or "
            f"what loop.save() gave"
        )
    if not isinstance(strict, bool):
        raise ConfigurationError(f"strict={quoted(strict)}: True or False")
    if not isinstance(prefix, (str, type(None))):
        raise ConfigurationError(f"prefix={quoted(prefix)}: text, as in prefix='net.'")


def _objective(tree: Any, where: object) -> Mapping[str, Any]:
    values = tree.get("objective") if isinstance(tree, Mapping) else None
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{where} holds no weights of an objective: it was not written by a Loop")
    return values


def _read(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """What is at a path, by name, and where exactly it was."""
    if path.name == directory.TENSORS and path.with_name(directory.MANIFEST).is_file():
        path = path.parent  # a checkpoint by its file of tensors, which alone does not say what they are
    if path.exists() and not path.is_dir():
        return path, _file(path)
    if not path.is_dir() or any((path / name).exists() for name in (directory.MANIFEST, directory.TENSORS)):
        tree = directory.read(path)
    elif (newest := runs.newest(path)) is not None:
        path, tree = newest
    else:
        raise CheckpointError(f"{path} is no checkpoint and holds none: give one, a run directory or a .safetensors file")
    return path, _objective(tree, path)


def _file(path: Path) -> Mapping[str, Any]:
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, and what it leads to may change: give {str(path.resolve())!r} itself")
    if not path.is_file():  # to open a pipe would be to wait for ever
        raise CheckpointError(f"{path} is no regular file: give a checkpoint, a run directory or a .safetensors file")
    try:
        with directory.opened(path) as stream:
            head = stream.read(9)
            if is_pickle(head):
                raise CheckpointError(
                    f"{path} is a pickle, which could run anything, and is not read: `axontrain import-weights {path}` makes a "
                    f".safetensors of it, if you trust it"
                )
            stream.seek(8)
            length = int.from_bytes(head[:8], "little")
            _check_header(path, length, stream.read(min(length, MOST_HEADER)))
        return directory.loaded(path)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:  # as a header was forged, any of them
        raise CheckpointError(f"{path} cannot be read as safetensors: {plain(error)}") from error


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a pickle, or an archive with one in it as ``torch.save`` makes it."""
    # The length of a header may begin with any bytes, but then its "{" follows.
    return head[8:9] != b"{" and (head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and b"" < head[1:2] <= b"\x05"))


def _check_header(path: Path, length: int, header: bytes) -> None:
    """Raise where a header would take long; all else safetensors looks at itself."""
    if length > MOST_HEADER and length <= path.stat().st_size - 8:
        raise CheckpointError(f"{path} has a header of {length:,} bytes, and no more than {MOST_HEADER:,} are read")
    if header.count(b"{") > MOST_TENSORS + 2:  # one more for all, and one for what may be said about them
        raise CheckpointError(f"{path} has more than {MOST_TENSORS:,} tensors, which are not read")


def _best(values: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    """The values below a prefix, under those of their clean names that fit the most; of equals, the least changed."""
    found: dict[str, Any] = {}
    most = -1
    for names in _ways(values, prefix):
        fitting = sum(short in wanted for short in names.values())
        if fitting > most:
            most, found = fitting, {short: values[name] for name, short in names.items()}
    if prefix and not found:
        tops = dict.fromkeys(f"{name.partition('.')[0]}." for name in values if "." in name)
        raise CheckpointError(f"{where} there is nothing; its names begin with {_listed(map(quoted, tops)) or 'no prefix'}")
    return found


def _ways(values: Mapping[str, Any], prefix: str) -> Iterator[dict[str, str]]:
    """The ways to read the names of a file: what is around the prefix may be a wrapper's, and what is below it too."""
    for outer in cleanings(values):
        below = {name: short.removeprefix(prefix) for name, short in outer.items() if short.startswith(prefix)}
        if not prefix:
            yield below
            continue
        for inner in cleanings(below.values()):
            yield {name: inner[short] for name, short in below.items()}


def _missing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    # A tied tensor that is there under one of its names is there.
    there = {id(value) for name, value in wanted.items() if name in found and isinstance(value, Tensor)}
    return [name for name, value in wanted.items() if name not in found and id(value) not in there]


def _fault(name: str, value: Any, own: Any) -> str:
    """Why a value does not fit a module's own of that name; "" if it does."""
    if not isinstance(own, Tensor) or name.rpartition(".")[2] == "_extra_state":  # the module's own affair
        return ""
    if not isinstance(value, Tensor):
        return f"{quoted(name)} is {type(value).__name__} there, a tensor here"
    if is_lazy(own):  # it takes the shape that it gets
        return ""
    if own.is_meta:
        return f"{quoted(name)} is on the meta device here, and holds nothing: module.to_empty(device=...) first"
    if own.shape != value.shape:
        return f"{quoted(name)} is {tuple(value.shape)} there, {tuple(own.shape)} here"
    if loses(value, own):
        return f"{quoted(name)} is {kind_of(value)} there, {kind_of(own)} here"
    return ""


def _tied(unexpected: list[str], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What to do where all that the module lacks is there twice, as of a network that was kept in two attributes."""
    there: dict[str, list[str]] = {}
    for name in wanted:
        if name in found:
            there.setdefault(name.rpartition(".")[2], []).append(name)
    pairs = []
    for name in unexpected[:LISTED]:
        twins = (twin for twin in there.get(name.rpartition(".")[2], ()) if _same(found[name], found[twin]))
        pairs.append(max(twins, key=lambda twin, name=name: _alike(name, twin), default=""))  # type: ignore[misc]  # mypy has no type for a default in a lambda
    if "" in pairs:
        return ""
    names = _listed(map(quoted, [*pairs, *unexpected[LISTED:]]))  # so many, of which the first are told
    return f", which hold what {names} hold: strict=False leaves them out"


def _alike(name: str, other: str) -> int:
    """How many segments the ends of two names share."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _same(value: Any, other: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return False
    return (value.dtype, value.shape) == (other.dtype, other.shape) and torch.equal(value, other)


def _advice(values: Mapping[str, Any], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What would make it fit, if something simple would."""
    if len(values) > MOST_ADVISED:
        return ""
    fitting = [
        prefix
        for prefix in _prefixes(values, wanted)
        if any(_fits({short: values[name] for name, short in names.items()}, wanted) for names in _ways(values, prefix))
    ]
    if fitting:
        return f". It would fit with {' or '.join(f'prefix={quoted(prefix)}' for prefix in fitting[:LISTED])}"
    for names in cleanings(found):
        inner = {short: found[name] for name, short in names.items()}
        for prefix in _prefixes(wanted, inner):
            if _fits(inner, {name.removeprefix(prefix): wanted[name] for name in wanted if name.startswith(prefix)}):
                return f". It fits a part of the module, {quoted(prefix[:-1])}: give that in its place"
    return ""


def _prefixes(longer: Iterable[str], shorter: Iterable[str]) -> list[str]:
    """What stands before a name of ``shorter`` in names of ``longer``, the shortest first."""
    end = max(shorter, key=lambda name: name.count("."), default=None)  # the most telling one
    if end is None:
        return []
    whole = {name.removesuffix(end) for name in longer if name.endswith(f".{end}")}
    return sorted(whole, key=lambda prefix: (len(prefix), prefix))[:MOST_TRIED]


def _fits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    known = bool(found) and all(name in wanted for name in found) and not _missing(wanted, found)
    return known and not any(_fault(name, value, wanted[name]) for name, value in found.items())


def _dotted(prefix: str) -> str:
    """A prefix is whole segments: "net" is "net.", and not the beginning of "network."."""
    return f"{prefix}." if prefix and not prefix.endswith(".") else prefix


def _type(module: nn.Module) -> str:
    return type(module).__name__


def _listed(texts: Iterable[str]) -> str:
    listed = list(texts)
    more = f" and {len(listed) - LISTED:,} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + more
