"""Clean names: what a parameter is called, whatever is wrapped around the module that has it.

A wrapper (``torch.compile``, ``DistributedDataParallel``, ...) puts a segment of its own into each name of a state_dict,
``_orig_mod.net.weight``, and a checkpoint that kept it would fit only what is wrapped in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axontrain.errors import ConfigurationError

# The module, the class, and the attribute that holds what is wrapped. They are looked up in what is imported already: of a
# class that is not, nothing can be an instance, and torch._dynamo takes seconds to import.
WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
)

# Without the objects there is only the text. These are torch's own, and stand for a wrapper wherever they are; ``module`` may
# be an attribute that a person named.
PRIVATE = frozenset(attribute for _, _, attribute in WRAPPERS if attribute.startswith("_"))
DEPTH = 4  # of ``module`` in ``module``: each is a way of its own to read all names


def clean_names(module: nn.Module) -> dict[str, str]:
    """Map each key of a module's ``state_dict()``, and each name of its parameters, to its clean name.

    A segment is left out only where its owner is a wrapper: an attribute ``module`` of somebody's own class stays.

    Args:
        module: any module, wrapped itself or with wrapped modules inside.

    >>> wrapped = nn.DataParallel(nn.Linear(2, 1))
    >>> clean_names(nn.Sequential(wrapped))
    {'0.module.weight': '0.weight', '0.module.bias': '0.bias'}

    Raises:
        ConfigurationError: if two keys would become one.
    """
    wrappers = [
        (found, attribute)
        for path, name, attribute in WRAPPERS
        if isinstance(found := getattr(sys.modules.get(path), name, None), type)
    ]
    clean: dict[str, str] = {}
    # Apart, since a hook may give a state_dict the clean name of what named_parameters calls otherwise: one tensor, twice.
    for names in (module.state_dict().keys(), (name for name, _ in module.named_parameters(remove_duplicate=False))):
        taken: dict[str, str] = {}
        for name in names:
            clean[name] = short = ".".join(_kept(module, name, wrappers))
            if taken.setdefault(short, name) != name:
                raise ConfigurationError(
                    f"{type(module).__name__}: {taken[short]!r} and {name!r} would both be called {short!r} without the "
                    f"wrapper around one of them: rename one"
                )
    return clean


def cleaned(names: Iterable[str]) -> dict[str, str]:
    """Map names of a file, whose modules nobody has, to what they are without the segments of wrappers.

    ``_orig_mod`` and its like are left out wherever they are; ``module`` at the beginning, where all names share it.

    Args:
        names: all the names of the file.

    >>> cleaned(["module.net.weight", "module.net._orig_mod.module"])
    {'module.net.weight': 'net.weight', 'module.net._orig_mod.module': 'net.module'}
    """
    *_, last = cleanings(names)
    return last


def cleanings(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Give the ways to clean the names of a file, each going further than the one before; the first changes nothing.

    Text alone cannot tell the ``module`` of a wrapper from a person's own; what the names have to fit can. More than DEPTH
    of them one in another are not looked at: a name of a forged file may begin with thousands.

    >>> list(cleanings(["module.module.w"]))
    [{'module.module.w': 'module.module.w'}, {'module.module.w': 'module.w'}, {'module.module.w': 'w'}]
    """
    found = {name: name for name in names}
    yield found
    without = {name: ".".join(segment for segment in name.split(".") if segment not in PRIVATE) for name in found}
    if without != found and all(without.values()) and len(set(without.values())) == len(without):
        yield (found := without)
    for _ in range(DEPTH):
        if not found or not all(name.startswith("module.") and name != "module." for name in found.values()):
            break
        yield (found := {name: clean.removeprefix("module.") for name, clean in found.items()})


def _kept(module: nn.Module, name: str, wrappers: list[tuple[type, str]]) -> Iterator[str]:
    """The segments of a name that no wrapper added."""
    owner: nn.Module | None = module
    for segment in name.split("."):
        parts: Any = {} if owner is None else owner._modules
        child = parts[segment] if segment in parts else None  # noqa: SIM401  # what TorchScript has there has no get
        if child is None or not any(isinstance(owner, wrapper) and segment == attribute for wrapper, attribute in wrappers):
            yield segment
        owner = child


def torn(module: nn.Module, values: Mapping[str, Any]) -> str:
    """What is wrong with values, by clean names, for parameters that are the same under several names; "" if nothing is."""
    names = clean_names(module)
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if names.get(name) in values:
            places.setdefault(id(parameter), []).append(names[name])
    for same in places.values():
        first = values[same[0]]
        for other in same[1:]:
            there = values[other]
            if isinstance(first, Tensor) and isinstance(there, Tensor) and first is not there and not torch.equal(first, there):
                return f"{same[0]} and {other} are one parameter here, and two that differ there"
    return ""
