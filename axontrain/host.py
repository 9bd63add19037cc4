"""Host: numbers on their way from a GPU to Python and back, without waiting where nobody has to.

``.item()`` waits until the device has done all that it was asked for, and leaves it idle until it is asked for more. Here a
number is copied into pinned memory after what made it, and an event tells when it is there. Who needs it now waits for that
event; who does not looks again later (see :mod:`axontrain.readings`). On the CPU nothing is copied: a number is read when it is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in the work of a device, as ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether the device has come to it; does not wait."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Road(Protocol):
    """How numbers travel between a kind of device and the host."""

    def sent(self, tensor: Tensor) -> Tensor:
        """The tensor in the host's memory, or rather where its values will be."""

    def mark(self, device: torch.device) -> Mark:
        """Behind all that the device was asked for so far."""


class Cuda:
    """By pinned memory, in the present stream."""

    def sent(self, tensor: Tensor) -> Tensor:
        """The tensor in pinned memory, which torch keeps for the next one."""
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return there.copy_(tensor.detach(), non_blocking=True)

    def mark(self, device: torch.device) -> Mark:
        """An event in the present stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        event.record(torch.cuda.current_stream(device))
        return event


# By the type of the device; others, as the CPU, are read at once.
ROADS: dict[str, Road] = {"cuda": Cuda()}


class Fetch:
    """Values on their way to the host.

    Args:
        values: tensors of any device and shape; what is no tensor stays as it is.

    >>> Fetch([torch.tensor([1.5, 2.5]), torch.tensor(True), 3]).values()
    [[1.5, 2.5], True, 3]
    """

    __slots__ = ("_marks", "_values")

    def __init__(self, values: Iterable[Any]) -> None:
        self._values: list[Any] = []
        devices: dict[torch.device, Road] = {}
        given = list(values)
        for value in given:
            road = ROADS.get(value.device.type) if isinstance(value, Tensor) else None
            if road is not None:
                devices[value.device] = road
                value = road.sent(value)
            self._values.append(value)
        if devices:  # what does not travel is looked at when the rest has come, and may have been changed by then
            self._values = [
                one.clone() if isinstance(one, Tensor) and one is value else one
                for one, value in zip(self._values, given, strict=True)
            ]
        self._marks = [road.mark(device) for device, road in devices.items()]

    def arrived(self) -> bool:
        """Whether the values are there; does not wait."""
        while self._marks and self._marks[-1].query():
            self._marks.pop()
        return not self._marks

    def values(self) -> list[Any]:
        """Python's numbers, of a tensor with dimensions nested lists; waits until they are there."""
        return [value.tolist() if isinstance(value, Tensor) else value for value in self.there()]

    def there(self) -> list[Any]:
        """The same, tensors as such: those that have travelled in the host's memory; waits until they are there."""
        while self._marks:
            self._marks.pop().synchronize()
        return self._values


def single(value: Any) -> Any:
    """The number that a list of one holds, or a list of such a list: of a tensor (1, 1)."""
    while isinstance(value, list):
        (value,) = value
    return value


def item(tensor: Tensor) -> Any:
    """The number of a tensor that holds one; waits for it, and for nothing that the device was asked for after it."""
    return single(Fetch([tensor]).values()[0])


def travels(device: torch.device) -> bool:
    """Whether numbers have to travel to the host from a device."""
    return device.type in ROADS


def copied(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into each first tensor, a contiguous one of the CPU, the second, of any device; waits once for all of them.

    Into memory that is not pinned a driver may copy before the call returns or after it: the wait is for both.
    """
    devices: dict[torch.device, Road] = {}
    for into, tensor in pairs:
        road = ROADS.get(tensor.device.type)
        into.copy_(tensor, non_blocking=road is not None)
        if road is not None:
            devices[tensor.device] = road
    for device, road in devices.items():
        road.mark(device).synchronize()


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of any device on the CPU, those of the CPU themselves; waits once for all of them.

    >>> on_cpu({"steps": torch.arange(2)})
    {'steps': tensor([0, 1])}
    """
    away = {
        name: torch.empty(one.shape, dtype=one.dtype, device="cpu") for name, one in tensors.items() if one.device.type != "cpu"
    }
    copied((into, tensors[name]) for name, into in away.items())
    return {**tensors, **away}


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return pinned(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in pinned memory, in the layout that it would have on a device.

    Of the others a copy waits until the device has come to it: of those that are not pinned, and of those with gaps.
    """
    if tensor.is_pinned() and (tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()):
        return tensor
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)


def scalar(value: Any, device: torch.device) -> Tensor:
    """A number, or a tensor, as a tensor on a device, without waiting for it; of the dtype that ``torch.as_tensor`` gives it.

    >>> scalar(3, torch.device("cpu")), scalar(0.5, torch.device("cpu"))
    (tensor(3), tensor(0.5000))
    """
    # What is not exactly one of Python's, as NumPy's, has another dtype, or is no number that torch.full takes.
    if type(value) in (bool, int, float):
        return torch.full((), value, device=device)
    return placed(torch.as_tensor(value), device)
