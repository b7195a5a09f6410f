"""Records: an input without end, cut where lines, paragraphs or JSON lines end.

Nothing is read ahead of what a record needs but the rest of the piece that its end came in, so a slow reader holds the
writer up and not the memory. A record that cannot be used says so when it is looked into, so that the ones after it can
be. Nothing here knows about models or what is done with a record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from streamllm.errors import InputError
from streamllm.reading import decode_utf8

Split = Literal["line", "paragraph", "json"]
"""What a record is."""

SPLITS: tuple[Split, ...] = ("line", "paragraph", "json")

LONGEST = 1 << 24
"""Bytes of a record at most; the rest of a longer one is let go as it comes."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Args:
        number: from 1.
        line: where it begins, from 1.
        data: its bytes without the line end; more than ``LONGEST`` if there were more.
    """

    number: int
    line: int
    data: bytes

    def text(self) -> str:
        """Return it as text.

        Raises:
            InputError: it is not UTF-8, or too long.
        """
        if len(self.data) > LONGEST:
            raise InputError(
                f"Line {self.line} begins a record of more than {LONGEST} bytes, the most that a record may have; cut "
                "it into several."
            )
        try:
            return "".join(decode_utf8([self.data]))
        except InputError as error:
            raise InputError(f"Line {self.line}: {error}") from error

    def fields(self) -> dict[str, Any]:
        """Return the fields of a JSON object.

        Raises:
            InputError: it is none, or its bytes are no text.
        """
        try:
            found = json.loads(self.text())
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(f"Line {self.line} is not JSON ({reason}); give one object a line.") from error
        if not isinstance(found, dict):
            raise InputError(f'Line {self.line} is JSON, but no object such as {{"text": "..."}}; give one a line.')
        return found


def split_records(pieces: Iterable[bytes], split: Split) -> Iterator[Record]:
    """Yield records as they are complete; the end of the input completes the last one.

    Args:
        pieces: the input, in pieces of any size.
        split: what a record is. Blank lines are none, and paragraphs end at them.
    """
    groups = _paragraphs(pieces) if split == "paragraph" else _lines(pieces)
    number = 0
    for line, data in groups:
        if data.strip():
            number += 1
            yield Record(number, line, data)


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers."""
    number, line = 1, bytearray()
    for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            _add(line, end)
            yield number, bytes(line).removesuffix(b"\r")
            number += 1
            line.clear()
        _add(line, rest)
    if line:
        yield number, bytes(line)


def _paragraphs(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield what stands between blank lines, with the number of the first line."""
    first, text = 0, bytearray()
    for number, line in _lines(pieces):
        if line.strip():
            first = first if text else number
            _add(text, b"\n" + line if text else line)
        elif text:
            yield first, bytes(text)
            text.clear()
    if text:
        yield first, bytes(text)


def _add(text: bytearray, more: bytes) -> None:
    """Add as much as shows that a record is too long."""
    text += more[: LONGEST + 1 - len(text)]
