"""Which conversation a history belongs to: digests of all histories so far, and the sessions and turns that they are.

A digest stands for owner, model, instructions and all turns up to one, so a longer history is recognised by its
beginning. What is compared are texts without the blanks at their ends, for clients trim. Several sessions may have the
same beginning. The index is one SQLite file; it holds nothing that cannot be done without, so one that is damaged is
set aside and begun anew. Knows digests, names and numbers; no texts are kept here, and no chats are known.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from streamllm.database import Database
from streamllm.errors import StateError

APPLICATION = 0x73746C72  # "stlr"

FORMAT = 1
"""Version of the tables."""

DIGEST_BYTES = 16

LOOKED_UP = 500
"""Digests that are looked up by one query at most; SQLite takes 999 values everywhere."""

CANDIDATES = 8
"""Places with one beginning that are looked at: more than that are copies of one another."""

MOST_RESPONSES = 10_000
"""Responses that are remembered; the oldest go."""

SCHEMA = (
    "CREATE TABLE sessions (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created REAL NOT NULL, "
    "used REAL NOT NULL, is_named INTEGER NOT NULL, turns INTEGER NOT NULL, window TEXT)",  # window: JSON
    # turn_id: of the transcript; another turn may come to have the same number.
    "CREATE TABLE places (session INTEGER NOT NULL, turn INTEGER NOT NULL, turn_id INTEGER NOT NULL, "
    "digest BLOB NOT NULL, PRIMARY KEY (session, turn)) WITHOUT ROWID",
    "CREATE INDEX places_by_digest ON places (digest)",
    "CREATE TABLE responses (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, "
    "session INTEGER NOT NULL, turn INTEGER NOT NULL, turn_id INTEGER NOT NULL)",
    "CREATE INDEX responses_of_sessions ON responses (session)",
)


_ENTRY = "name, created, used, is_named, turns, window"

_NUMBER = "(SELECT number FROM sessions WHERE name = ?)"

T = TypeVar("T")


def beginning(owner: str, model: str, system: str | None) -> bytes:
    """Return the digest of a conversation in which nothing was said yet."""
    said = [owner, model, None if system is None else system.strip()]
    return blake2b(json.dumps(said).encode(), digest_size=DIGEST_BYTES).digest()


def extended(digest: bytes, user: str, reply: str) -> bytes:
    """Return the digest of a conversation that has one turn more."""
    for role, text in ((b"user:", user), (b"assistant:", reply)):
        digest = blake2b(digest + role + text.strip().encode(), digest_size=DIGEST_BYTES).digest()
    return digest


def digests(first: bytes, turns: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """Yield the digest behind each turn; ``first`` is that of the beginning."""
    for user, reply in turns:
        first = extended(first, user, reply)
        yield first


@dataclass(frozen=True, slots=True)
class Place:
    """A moment of a session: behind one of its turns.

    Args:
        session: its name.
        turn: number of the turn; 0: the beginning.
        turn_id: of the transcript.
        is_last: whether it was the last turn when the session was last let go.
    """

    session: str
    turn: int
    turn_id: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a session without looking at it: times in seconds of Unix time, turns, and its window."""

    name: str
    created: float
    used: float
    is_named: bool
    turns: int
    window: dict[str, int] | None


class Recognition:
    """The index of one owner. Threads may share it.

    Args:
        path: the file.
        note: told in one sentence that the index was begun anew.

    Attributes:
        generation: how often it was begun anew; what is not in the file by itself must be added then.

    Raises:
        StateError: the file cannot be opened or made; every method raises it as well if the file cannot be read or
            written, and then has changed nothing.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self.path, self._note = path, note
        self._lock = threading.RLock()
        self.generation = 0
        try:
            self._database = self._open()
        except StateError as error:
            if not _is_damage(error):
                raise
            self._begin_anew(error)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()

    # ---- sessions

    def add(self, name: str, *, created: float, used: float, is_named: bool, turns: int = 0) -> None:
        """A session is there; one of that name that was known is forgotten."""
        query = "INSERT INTO sessions (name, created, used, is_named, turns) VALUES (?, ?, ?, ?, ?)"
        self._change(*_forgetting(name), (query, (name, created, used, is_named, turns)))

    def touch(self, name: str, *, turns: int, window: dict[str, int] | None = None) -> None:
        """A session was used, and has so many turns now."""
        query = "UPDATE sessions SET used = ?, turns = ?, window = coalesce(?, window) WHERE name = ?"
        self._change((query, (time.time(), turns, window and json.dumps(window), name)))

    def forget(self, name: str) -> None:
        """A session is gone, and all that leads to it."""
        self._change(*_forgetting(name))

    def entry(self, name: str) -> Entry | None:
        """What is known of a session."""
        found = self._rows(f"SELECT {_ENTRY} FROM sessions WHERE name = ?", name)
        return _entry(found[0]) if found else None

    def entries(self, *, after: str | None = None, limit: int | None = None) -> list[Entry]:
        """Sessions, the newest first; ``after``: those that follow that one."""
        values: list[Any] = []
        where = ""
        if after is not None:
            where = "WHERE (created, number) < (SELECT created, number FROM sessions WHERE name = ?)"
            values.append(after)
        query = f"SELECT {_ENTRY} FROM sessions {where} ORDER BY created DESC, number DESC LIMIT ?"
        return [_entry(row) for row in self._rows(query, *values, -1 if limit is None else limit)]

    def count(self) -> int:
        """How many sessions there are."""
        return int(self._rows("SELECT count(*) FROM sessions")[0][0])

    def unnamed(self) -> list[str]:
        """Sessions that nobody has named, the least recently used first."""
        return [name for (name,) in self._rows("SELECT name FROM sessions WHERE NOT is_named ORDER BY used, number")]

    # ---- places

    def learn(self, name: str, places: Sequence[tuple[int, int, bytes]]) -> None:
        """Remember places of a session: number of a turn, its id, and the digest of all up to there.

        What was known of these turns and of later ones is forgotten: they were taken back.
        """
        if places:
            insert = "INSERT INTO places SELECT number, ?, ?, ? FROM sessions WHERE name = ?"
            gone = (f"DELETE FROM places WHERE session = {_NUMBER} AND turn >= ?", (name, places[0][0]))
            turns = ("UPDATE sessions SET turns = ? WHERE name = ?", (places[-1][0], name))
            self._change(gone, turns, *((insert, (*place, name)) for place in places))

    def unlearn(self, name: str) -> None:
        """Forget all places of a session."""
        self._change((f"DELETE FROM places WHERE session = {_NUMBER}", (name,)))

    def copy(self, name: str, other: str, turns: int) -> None:
        """Another session has the same turns, up to a number."""
        query = (
            "INSERT OR REPLACE INTO places SELECT o.number, p.turn, p.turn_id, p.digest FROM places p, sessions o "
            f"WHERE o.name = ? AND p.session = {_NUMBER} AND p.turn <= ?"
        )
        self._change((query, (other, name, turns)))

    def digest(self, name: str, turn: int, turn_id: int) -> bytes | None:
        """The digest of a session up to a turn, if it is known."""
        query = f"SELECT digest FROM places WHERE session = {_NUMBER} AND turn = ? AND turn_id = ?"
        found = self._rows(query, name, turn, turn_id)
        return bytes(found[0][0]) if found else None

    def known(self, chain: Sequence[bytes]) -> Iterator[tuple[int, list[Place]]]:
        """Yield how many of the digests are known, the most first, and the places that the last of these leads to.

        Sessions that were there last come first, and then those that were used last.
        """
        stop, most = len(chain), 1  # nearly always the last one is known
        while stop:
            part = chain[max(0, stop - most) : stop]
            marks = ", ".join("?" * len(part))
            found = {bytes(row[0]) for row in self._rows(f"SELECT digest FROM places WHERE digest IN ({marks})", *part)}
            for length in range(stop, stop - len(part), -1):
                if chain[length - 1] in found:
                    yield length, self._places(chain[length - 1])
            stop, most = stop - len(part), min(8 * most, LOOKED_UP)

    def _places(self, digest: bytes) -> list[Place]:
        rows = self._rows(
            "SELECT s.name, p.turn, p.turn_id, p.turn = s.turns FROM places p JOIN sessions s ON s.number = p.session "
            "WHERE p.digest = ? ORDER BY p.turn = s.turns DESC, s.used DESC, s.number DESC LIMIT ?",
            digest,
            CANDIDATES,
        )
        return [Place(name, turn, turn_id, bool(is_last)) for name, turn, turn_id, is_last in rows]

    # ---- responses

    def note_response(self, id: str, name: str, turn: int) -> None:
        """Remember by which name a client knows a turn; the turn's place must be known."""
        noted = (
            "INSERT INTO responses (id, session, turn, turn_id) SELECT ?, session, turn, turn_id FROM places "
            f"WHERE session = {_NUMBER} AND turn = ?"
        )
        self._change(
            ("DELETE FROM responses WHERE id = ?", (id,)),
            (noted, (id, name, turn)),
            ("DELETE FROM responses WHERE number <= (SELECT max(number) FROM responses) - ?", (MOST_RESPONSES,)),
        )

    def find_response(self, id: str) -> Place | None:
        """The place behind a turn that a client knows by this name, if that turn is still there."""
        rows = self._rows(
            "SELECT s.name, r.turn, r.turn_id, r.turn = s.turns FROM responses r "
            "JOIN sessions s ON s.number = r.session "
            "JOIN places p ON p.session = r.session AND p.turn = r.turn AND p.turn_id = r.turn_id WHERE r.id = ?",
            id,
        )
        return Place(rows[0][0], rows[0][1], rows[0][2], bool(rows[0][3])) if rows else None

    def drop_response(self, id: str) -> bool:
        """Forget a name; whether it was known."""
        return self._change(("DELETE FROM responses WHERE id = ?", (id,))) > 0

    # ---- the file

    def _open(self) -> Database:
        return Database(self.path, application=APPLICATION, format=FORMAT, schema=SCHEMA)

    def _change(self, *changes: tuple[str, Sequence[Any]]) -> int:
        """Make changes, all or none; how many rows the last one has changed."""

        def work() -> int:
            with self._database.transaction() as connection:
                for query, values in changes:
                    count = connection.execute(query, values).rowcount
            return count

        return self._whole(work)

    def _rows(self, query: str, *values: Any) -> list[Any]:
        return self._whole(lambda: self._database.rows(query, *values))

    def _whole(self, work: Callable[[], T]) -> T:
        """Work on the file; on an empty one if it turns out to be damaged."""
        with self._lock:
            try:
                return work()
            except StateError as error:
                if not _is_damage(error):
                    raise
                with suppress(StateError):
                    self._database.close()
                self._begin_anew(error)
                return work()

    def _begin_anew(self, reason: StateError) -> None:
        """Set the file aside, and make an empty one."""
        try:
            self.path.replace(self.path.with_name(f"{self.path.name}.set-aside"))
            for end in ("-wal", "-shm"):
                self.path.with_name(self.path.name + end).unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"{self.path} cannot be set aside: {error.strerror or error}; move it away.") from reason
        self._database = self._open()
        self.generation += 1
        self._note(f"{reason} It was set aside, and histories that clients send are recognised from now on only.")


def _entry(row: Any) -> Entry:
    name, created, used, is_named, turns, window = row
    return Entry(name, created, used, bool(is_named), turns, json.loads(window) if window else None)


def _forgetting(name: str) -> list[tuple[str, Sequence[Any]]]:
    """What deletes all that is known of a session."""
    tables = ("places", "responses")
    return [
        *((f"DELETE FROM {table} WHERE session = {_NUMBER}", (name,)) for table in tables),
        ("DELETE FROM sessions WHERE name = ?", (name,)),
    ]


def _is_damage(error: StateError) -> bool:
    """Whether a file is of no use, rather than out of reach for now."""
    cause = error.__cause__
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return cause is None
