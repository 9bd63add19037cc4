"""Shown: text that somebody else wrote, a file or a user, made fit for a terminal, a log and a single line.

A terminal obeys what it is sent: a name with an escape in it recolours or clears the screen, types what was not typed, or turns
the line around. So whatever is not printable is written as Python would write it, and what is too long is cut.
"""

from __future__ import annotations

LONGEST = 200  # characters
NAME = 120  # of a name among others


def plain(text: object, most: int | None = LONGEST) -> str:
    r"""Text, or what an error or any other object says of itself, with nothing in it that a terminal would obey.

    Args:
        text: what is to be shown as a part of a line.
        most: how many characters of it; None for all.

    >>> plain("val/loss"), plain("\x1b[2Jloss\n"), plain("a" * 300, 5)
    ('val/loss', '\\x1b[2Jloss\\n', 'aaaaa...')
    >>> plain(OSError(28, "No space left")), plain(KeyError())
    ('[Errno 28] No space left', 'KeyError')
    """
    whole = str(text)
    if not whole and isinstance(text, BaseException):
        whole = type(text).__name__
    short = whole if most is None or len(whole) <= most else f"{whole[:most]}..."
    if short.isprintable():
        return short
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in short)


def quoted(value: object, most: int = NAME) -> str:
    r"""The same of a name in quotes, so that it is seen where it begins and ends; of what is no text, what Python writes.

    >>> quoted("val/loss"), quoted("a\nb"), quoted("a" * 300, 5), quoted(None)
    ("'val/loss'", "'a\\nb'", "'aaaaa...'", 'None')
    """
    if isinstance(value, str):
        return repr(value if len(value) <= most else f"{value[:most]}...")
    return plain(repr(value), most)
