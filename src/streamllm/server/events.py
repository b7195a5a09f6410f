"""Server-sent events as bytes: what is the same in each event of a reply is made once.

Knows JSON and lines, but no field of any API. Text leaves as UTF-8; half a character, which is none, becomes a mark.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring
from typing import Any

DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    """A value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Any, name: str | None = None) -> bytes:
    """One event."""
    line = b"" if name is None else b"event: " + name.encode() + b"\n"
    return line + b"data: " + dumps(value) + b"\n\n"


class Frame:
    """An event of which some values change.

    Args:
        value: the event; where a value is ``Frame.BLANK`` something comes.
        name: of the event.
    """

    BLANK = "\x00"

    def __init__(self, value: Any, name: str | None = None) -> None:
        self._head, *self._parts = event(value, name).split(json.dumps(self.BLANK).encode())

    def fill(self, *values: str | int) -> bytes:
        """The event with these values, in the order of the blanks."""
        filled = self._head
        for value, part in zip(values, self._parts, strict=True):
            text = encode_basestring(value) if isinstance(value, str) else str(value)
            filled += text.encode("utf-8", "replace") + part
        return filled
