r'''Messages as they are typed or piped in: a line each, or several lines between ``"""``.

Knows text only. Messages are handed on with their quotes, for what stands between quotes is never a command.
'''

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streamllm.errors import InputError
from streamllm.stats import grouped

QUOTES = '"""'

MOST_CHARS = 1 << 24
"""A message has at most so many characters; it is held in memory."""


def is_quoted(text: str) -> bool:
    """Whether a message begins with quotes."""
    return text.lstrip().startswith(QUOTES)


def is_open(text: str) -> bool:
    """Whether a message began with quotes that are not closed yet, so that more lines belong to it."""
    stripped = text.strip()
    return stripped.startswith(QUOTES) and not (len(stripped) >= 2 * len(QUOTES) and stripped.endswith(QUOTES))


def unquoted(text: str) -> str:
    """What stands between the quotes, without the line ends next to them; the closing ones may be missing."""
    inner = text.strip().removeprefix(QUOTES)
    return inner.removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")


def piped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the messages of a text that comes in pieces; the end of the text closes quotes.

    Raises:
        InputError: a message is too long.
    """
    held: list[str] = []
    size = 0
    for line in _lines(pieces):
        size += len(line) + 1
        if size > MOST_CHARS:
            raise _too_long()
        begun = bool(held)
        held.append(line)
        if line.rstrip().endswith(QUOTES) if begun else not is_open(line):
            yield "\n".join(held)
            held, size = [], 0
    if held:
        yield "\n".join(held)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield lines without their ends."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        *whole, rest = piece.split("\n")
        for line in whole:
            yield "".join([*held, line]).removesuffix("\r")
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > MOST_CHARS:
            raise _too_long()
    if last := "".join(held):
        yield last.removesuffix("\r")


def _too_long() -> InputError:
    return InputError(f"A message has more than {grouped(MOST_CHARS)} characters; say it in parts.")
