"""A transcript as lines of JSON, and back: everything, the turns that were taken back included.

One line for a turn and then one for each of its passages, so that no line grows with a reply::

    {"type": "turn", "id": 1, "number": 1, "preface": "", "finish": "end", "end_id": 2, "began": ..., "ended": ...,
     "prompt_ids": [...]}
    {"type": "passage", "role": "user", "text": "Hello", "stop": 9, "ids": []}

``number`` is ``null`` for a turn that was taken back. Lines may come from outside: each is checked. Knows the tables of
a transcript, but no files.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

from streamllm.errors import StateError
from streamllm.transcript import ROLES, Transcript, packed, unpacked

PAGE = 256
"""Passages in memory at a time."""

LATEST = 1e11
"""No number is larger: times are seconds since 1970, so this is the year 5138."""

_KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "turn": {
        "id": (int,),
        "number": (int, NoneType),
        "preface": (str,),
        "finish": (str, NoneType),
        "end_id": (int, NoneType),
        "began": (int, float),
        "ended": (int, float, NoneType),
        "prompt_ids": (list,),
    },
    "passage": {"role": (str,), "text": (str,), "stop": (int,), "ids": (list,)},
}


def dump(transcript: Transcript) -> Iterator[str]:
    """Yield the lines of a transcript, with their line ends, a few in memory at a time.

    Raises:
        StateError: it cannot be read.
    """
    columns = list(_KINDS["turn"])
    query = f"SELECT {', '.join(columns)} FROM turns WHERE id > ? ORDER BY id LIMIT 1"
    turn_id = 0
    while row := transcript.database.row(query, turn_id):
        turn = dict(zip(columns, row, strict=True))
        turn_id = turn["id"]
        yield _line({"type": "turn", **turn, "prompt_ids": unpacked(turn["prompt_ids"])})
        for role, text, stop, ids in _passages(transcript, turn_id):
            yield _line({"type": "passage", "role": ROLES[role], "text": text, "stop": stop, "ids": unpacked(ids)})


def load(transcript: Transcript, lines: Iterable[bytes], what: str) -> None:
    """Put lines into a new transcript: all of them or none.

    Args:
        transcript: where nothing was said yet.
        lines: of ``dump``.
        what: they are called in messages.

    Raises:
        StateError: a line is not one of ``dump``, or cannot be written.
    """
    turn: dict[str, Any] = {"id": 0, "number": None}
    live = 0
    with transcript.database.transaction() as connection:
        for count, line in enumerate(lines, 1):
            try:
                kind, record = _parsed(line)
                if kind == "turn":
                    live += record["number"] is not None
                    _expect(record["id"] > turn["id"] and record["number"] in (None, live), "the turns are in disorder")
                    turn = record
                    _insert(connection, "turns", {**turn, "prompt_ids": packed(turn["prompt_ids"])})
                else:
                    _expect(turn["id"] > 0, "it belongs to no turn")
                    role, text = ROLES.index(record["role"]), record["text"]
                    is_live = turn["number"] is not None  # what was taken back is never found
                    values = {**record, "turn_id": turn["id"], "role": role, "ids": packed(record["ids"])}
                    passage_id = _insert(connection, "passages", {**values, "indexed": int(is_live)})
                    if is_live:
                        transcript.words.add(connection, passage_id, text)
            except (ValueError, TypeError, LookupError, OverflowError, RecursionError, struct.error) as error:
                raise StateError(f"Line {count} of {what} is damaged ({error}); export the session again.") from error


def _parsed(line: bytes) -> tuple[str, dict[str, Any]]:
    """A line's type, and the rest of it, or a ValueError or the like that says what is wrong."""
    record = json.loads(line)
    _expect(isinstance(record, dict) and record.get("type") in _KINDS, "it has no known type")
    kind = record.pop("type")
    kinds = _KINDS[kind]
    _expect(record.keys() == kinds.keys(), f"a {kind} has the fields {', '.join(kinds)}")
    for name, value in record.items():
        _expect(type(value) in kinds[name], f"{name} is {value!r:.40}")
        _expect(not isinstance(value, (int, float)) or 0 <= value < LATEST, f"{name} is {value!r:.40}")
        _expect(not isinstance(value, list) or all(type(id) is int and id >= 0 for id in value), f"{name} are no ids")
    return kind, record


def _expect(is_right: bool, otherwise: str) -> None:
    if not is_right:
        raise ValueError(otherwise)


def _insert(connection: sqlite3.Connection, table: str, values: dict[str, Any]) -> int:
    """Add a row; give back its id."""
    query = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
    id = connection.execute(query, tuple(values.values())).lastrowid
    assert id is not None
    return id


def _passages(transcript: Transcript, turn_id: int) -> Iterator[Any]:
    """The passages of a turn, a page in memory at a time."""
    query = f"SELECT role, text, stop, ids, id FROM passages WHERE turn_id = ? AND id > ? ORDER BY id LIMIT {PAGE}"
    last = 0
    while page := transcript.database.rows(query, turn_id, last):
        for *passage, last in page:  # noqa: B007 - the last one is where the next page begins
            yield passage


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
