"""What Hugging Face's streams do not say of themselves, where they are read on from a saved place."""

from __future__ import annotations

from typing import Any


def leaves_buffer_out(data: Any) -> bool:
    """Whether data is a stream with a shuffle buffer, which its ``state_dict`` leaves out.

    Going on by it would fill the buffer again: what was in it is lost, and the order another.
    """
    waiting: list[Any] = [getattr(data, "_ex_iterable", None)]
    while waiting:
        part = waiting.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return bool(part.buffer_size > 1)
        inner = (getattr(part, "ex_iterable", None), *(getattr(part, "ex_iterables", None) or ()))
        waiting += [one for one in inner if one is not None]
    return False


def forget_start(data: Any, state: Any) -> None:
    """Let a stream that was read on from ``state`` begin at its beginning again.

    It would begin there in that epoch ever after.
    """
    if state is not None and getattr(data, "_starting_state_dict", None) is state:
        data._starting_state_dict = None
