"""The transcript of a conversation: everything that was ever said, on disk, whatever has left the window.

Knows no model: of a turn it keeps the user's text, the reply as it grows, the ids that were fed and drawn, and how it
ended, so that a reply that was cut off by a crash can be read again. Each token of a reply is a commit of its own; its
cost does not depend on how long the reply or the conversation is, since texts are kept in passages of bounded size.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamllm.config import check_count
from streamllm.database import Database
from streamllm.errors import ConfigError
from streamllm.passages import Passage, Place, Role, cut, placed
from streamllm.words import SCHEMA as WORDS_SCHEMA
from streamllm.words import Words

APPLICATION = 0x73746C6D  # "stlm"

FORMAT = 2
"""Version of the tables; a file of another one is refused."""

SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",  # value: JSON
    # number: NULL once the turn was taken back. before: tokens of the turns before it, see the trigger.
    # prompt_ids: int32, little-endian; last, as it may be long.
    "CREATE TABLE turns (id INTEGER PRIMARY KEY, number INTEGER UNIQUE, before INTEGER NOT NULL DEFAULT 0, "
    "preface TEXT NOT NULL, finish TEXT, end_id INTEGER, began REAL NOT NULL, ended REAL, prompt_ids BLOB NOT NULL)",
    # role: an index into ROLES. ids: of a reply, as prompt_ids. indexed: its words are in the index.
    "CREATE TABLE passages (id INTEGER PRIMARY KEY, turn_id INTEGER NOT NULL REFERENCES turns, role INTEGER NOT NULL, "
    "stop INTEGER NOT NULL, indexed INTEGER NOT NULL, text TEXT NOT NULL, ids BLOB NOT NULL)",
    "CREATE INDEX passages_of_turns ON passages (turn_id)",
    "CREATE TRIGGER tokens_before_turns AFTER INSERT ON turns BEGIN UPDATE turns SET before = coalesce(("
    "SELECT t.before + (length(t.prompt_ids) + (SELECT total(length(ids)) FROM passages WHERE turn_id = t.id)) / 4 "
    "FROM turns t WHERE t.number < new.number ORDER BY t.number DESC LIMIT 1), 0) WHERE id = new.id; END",
    WORDS_SCHEMA,
)

MOST_IDS = 2400
"""A passage takes no more ids after so many, four for each of its characters: ids may have no text at all."""

ROLES: tuple[Role, Role] = ("user", "assistant")

_USER, _ASSISTANT = 0, 1


@dataclass(frozen=True)
class TurnRow:
    """What a user said, and the reply.

    Args:
        id: never used again, also not after the turn was taken back.
        number: from 1, among the turns that were not taken back.
        user, reply: the texts.
        preface: what was put in front of the user's text for the model to read.
        finish: why the reply ended; ``None`` while it goes on, or if it was cut off by a crash.
        end_id: the end token that the reply ended with; it is not among the reply's ids.
        prompt_tokens, reply_tokens: tokens that were fed for the user's turn, and drawn for the reply.
        began, ended: when, in seconds of Unix time; ``ended`` is ``None`` as ``finish`` is.
    """

    id: int
    number: int
    user: str
    reply: str
    preface: str
    finish: str | None
    end_id: int | None
    prompt_tokens: int
    reply_tokens: int
    began: float
    ended: float | None


@dataclass
class _Growing:
    """The end of the reply that is being written: its open passage, if it has an id, and where it stops."""

    turn_id: int
    stop: int
    id: int | None = None
    text: str = ""
    ids: bytes = b""


class Transcript:
    """Everything ever said in one conversation, in one SQLite file with mode 0600.

    Not for use by several threads at once; whoever shares it brings the lock.

    Args:
        path: the file; made if there is none. ``None``: a temporary one that is gone when closed.
        read_only: only look at a file that is there; another process may be writing it.

    Raises:
        StateError: the file cannot be opened, is damaged (a copy is kept), of another program or of another version;
            every method raises it as well if the file cannot be read or written, and then has changed nothing.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        self.database = Database(path, application=APPLICATION, format=FORMAT, schema=SCHEMA, read_only=read_only)
        self.words = Words(self.database)
        self._growing: _Growing | None = None  # None: to be read from the file
        if not read_only:
            try:
                self._index_what_was_left_open()
            except BaseException:  # the caller has nothing to close
                self.close()
                raise

    def get(self, key: str, default: Any = None) -> Any:
        """A setting that was ``put``; ``default`` where there is none."""
        row = self.database.row("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(row[0]) if row else default

    def put(self, key: str, value: Any) -> None:
        """Keep a setting: anything JSON-able."""
        with self.database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def settings(self) -> dict[str, Any]:
        """All settings that were ``put``, by key."""
        return {key: json.loads(value) for key, value in self.database.rows("SELECT key, value FROM meta ORDER BY key")}

    # ---- writing

    def begin(self, user: str, *, prompt_ids: Sequence[int], count: Callable[[str], int], preface: str = "") -> int:
        """Add a turn.

        Args:
            user: what the user said.
            prompt_ids: what is fed to the model for it.
            count: how many tokens a text has, without special ones.
            preface: what was put in front of the user's text; it is not found by a search.

        Returns:
            The id of the turn.
        """
        pieces = placed(user, len(prompt_ids), count)
        growing, self._growing = self._growing or self._read_growing(), None
        with self.database.transaction() as connection:
            if growing:
                self._close_passage(connection, growing)
            turn_id = connection.execute(
                "INSERT INTO turns (number, preface, began, prompt_ids) VALUES (?, ?, ?, ?)",
                (self.count() + 1, preface, time.time(), packed(prompt_ids)),
            ).lastrowid
            assert turn_id is not None
            for text, stop in pieces:
                passage = _Growing(turn_id, stop, text=text)
                self._store(connection, passage, _USER)
                self._close_passage(connection, passage)
        return turn_id

    def write(self, text: str, ids: Sequence[int]) -> None:
        """Add to the reply of the newest turn what a token brought; it is on disk when this returns.

        Args:
            text: may be empty; it may come with a later token than the one it began with.
            ids: the token, or several.
        """
        if not text and not ids:
            return
        # Until the commit is through, what the file holds is in doubt, and whoever comes next reads it.
        growing, self._growing = self._growing or self._read_growing(), None
        assert growing is not None, "write() before begin()"
        pieces = cut(growing.text + text) or [""]
        written, end, brought = len(growing.text), 0, packed(ids)
        # Nearly always a passage that is there grows a little, by one statement.
        is_simple = len(pieces) == 1 and len(growing.ids) + len(brought) < 4 * MOST_IDS
        with self.database.alone() if is_simple else self.database.transaction() as connection:
            for number, piece in enumerate(pieces, 1):
                end += len(piece)
                is_last = number == len(pieces)
                growing.text = piece
                if brought and (end > written or is_last):  # the ids go where their text begins
                    growing.ids, growing.stop, brought = growing.ids + brought, growing.stop + len(ids), b""
                self._store(connection, growing)
                if not is_last or len(growing.ids) >= 4 * MOST_IDS:
                    growing = self._close_passage(connection, growing)
        self._growing = growing

    def end(self, finish: str | None, end_id: int | None = None) -> None:
        """The reply of the newest turn has ended.

        Args:
            finish: why.
            end_id: the end token that was drawn, if one was.
        """
        growing, self._growing = self._growing or self._read_growing(), None
        assert growing is not None, "end() before begin()"
        with self.database.transaction() as connection:
            self._close_passage(connection, growing)
            values = (finish, end_id, time.time(), growing.turn_id)
            connection.execute("UPDATE turns SET finish = ?, end_id = ?, ended = ? WHERE id = ?", values)

    def reopen(self) -> None:
        """The reply of the newest turn goes on, in a passage of its own: one that was closed never changes."""
        self._growing = None
        with self.database.transaction() as connection:
            query = "UPDATE turns SET finish = NULL, end_id = NULL, ended = NULL WHERE number = ?"
            connection.execute(query, (self.count(),))

    def undo(self, turns: int = 1) -> None:
        """Take the newest turns back: they are kept, but have no number and are never found.

        Raises:
            ConfigError: there are not so many.
        """
        check_count("turns", turns, 1)
        if turns > (number := self.count()):
            raise ConfigError(f"There are {number} turns to take back, you asked for {turns}.")
        self._growing = None
        gone = "turn_id IN (SELECT id FROM turns WHERE number > ?)"
        with self.database.transaction() as connection:
            query = f"SELECT id, text FROM passages WHERE {gone} AND indexed"
            for id, text in connection.execute(query, (number - turns,)):
                self.words.remove(connection, id, text)
            connection.execute(f"UPDATE passages SET indexed = 0 WHERE {gone}", (number - turns,))
            connection.execute("UPDATE turns SET number = NULL WHERE number > ?", (number - turns,))

    # ---- reading

    def count(self) -> int:
        """How many turns there are, without those that were taken back."""
        return self.database.row("SELECT max(number) FROM turns")[0] or 0

    def tokens(self) -> int:
        """Tokens of all turns, without those that were taken back."""
        number = self.count()
        if not number:
            return 0
        id, before, prompt = self._turn(number, "id, before, length(prompt_ids) / 4")
        (drawn,) = self.database.row("SELECT total(length(ids)) / 4 FROM passages WHERE turn_id = ?", id)
        return int(before + prompt + drawn)

    def turn(self, number: int) -> TurnRow:
        """A turn with its texts.

        Raises:
            ConfigError: there is no such turn.
        """
        id, preface, finish, end_id, began, ended, prompt = self._turn(
            number, "id, preface, finish, end_id, began, ended, length(prompt_ids) / 4"
        )
        rows = self.database.rows("SELECT role, text, length(ids) / 4 FROM passages WHERE turn_id = ? ORDER BY id", id)
        user, reply = ("".join(text for role, text, _ in rows if role == wanted) for wanted in (_USER, _ASSISTANT))
        drawn = sum(tokens for *_, tokens in rows)
        return TurnRow(id, number, user, reply, preface, finish, end_id, prompt, drawn, began, ended)

    def last(self) -> TurnRow | None:
        """The newest turn, if there is one."""
        number = self.count()
        return self.turn(number) if number else None

    def tip(self) -> tuple[int, int, int, str | None]:
        """Number, id, tokens of the reply and ``finish`` of the newest turn; zeros if there is none."""
        number = self.count()
        if not number:
            return 0, 0, 0, None
        id, finish = self._turn(number, "id, finish")
        (drawn,) = self.database.row("SELECT total(length(ids)) / 4 FROM passages WHERE turn_id = ?", id)
        return number, id, int(drawn), finish

    def prefaces(self, first: int) -> list[str]:
        """What was put in front of the turns from number ``first`` on, where there was anything."""
        query = "SELECT preface FROM turns WHERE number >= ? AND preface != '' ORDER BY number"
        return [preface for (preface,) in self.database.rows(query, first)]

    def turns(self, first: int = 1, *, newest_first: bool = False) -> Iterator[TurnRow]:
        """The turns from number ``first`` on, one in memory at a time."""
        numbers = range(first, self.count() + 1)
        return (self.turn(number) for number in (reversed(numbers) if newest_first else numbers))

    def prompt_ids(self, number: int) -> list[int]:
        """What was fed to the model for a turn; as ``turn`` if there is none."""
        (blob,) = self._turn(number, "prompt_ids")
        return unpacked(blob)

    def reply_ids(self, number: int) -> list[int]:
        """The ids of a reply; as ``turn`` if there is none."""
        (id,) = self._turn(number, "id")
        rows = self.database.rows("SELECT ids FROM passages WHERE turn_id = ? ORDER BY id", id)
        return unpacked(b"".join(blob for (blob,) in rows))

    def passages(self, ids: Iterable[int]) -> list[Passage]:
        """Passages of turns that were not taken back, in the order of ``ids``."""
        return [found for id in ids if (found := self._passage(id))]

    def last_left(self, place: Place | None) -> int:
        """Id of the last passage that has left the window; of the last one at all for ``None``. 0: there is none."""
        everything = self.database.row("SELECT max(id) FROM passages")[0] or 0
        if place is None:
            return int(everything)
        row = self.database.row("SELECT id, number FROM turns WHERE number >= ? ORDER BY number LIMIT 1", place.turn)
        if row is None:
            return int(everything)
        within = "SELECT id FROM passages WHERE turn_id = ? AND stop <= ? ORDER BY id DESC LIMIT 1"
        behind = "SELECT id FROM passages WHERE turn_id < ? ORDER BY turn_id DESC, id DESC LIMIT 1"
        found = self.database.row(within, row[0], place.stop) if row[1] == place.turn else None
        found = found or self.database.row(behind, row[0])
        return int(found[0]) if found else 0

    # ---- the whole

    def copy(self, path: Path | None = None) -> Transcript:
        """The same transcript in a new file, or in a temporary one.

        Raises:
            StateError: there is such a file already, or it cannot be written.
        """
        if path is not None:
            self.database.copy_to(path)
            return Transcript(path)
        copy = Transcript()
        self.copy_into(copy)
        return copy

    def copy_into(self, other: Transcript) -> None:
        """Put everything into ``other``, in place of what it holds."""
        self.database.copy_into(other.database)
        other._growing = None

    def close(self) -> None:
        """Let go of the file; closing twice is allowed."""
        self.database.close()

    # ---- rows

    def _turn(self, number: int, columns: str) -> Any:
        """Columns of the turn with a number."""
        row = self.database.row(f"SELECT {columns} FROM turns WHERE number = ?", number)
        if row is None:
            raise ConfigError(f"There is no turn {number!r}; the turns are 1 to {self.count()}.")
        return row

    def _passage(self, id: int) -> Passage | None:
        """A passage, if its turn was not taken back."""
        query = "SELECT p.id, t.number, p.role, p.text, p.stop FROM passages p JOIN turns t ON t.id = p.turn_id"
        row = self.database.row(f"{query} WHERE p.id = ? AND t.number IS NOT NULL", id)
        return row and Passage(row[0], row[1], ROLES[row[2]], row[3], row[4])

    def _read_growing(self) -> _Growing | None:
        """Where the newest reply goes on; ``None`` if there is no turn."""
        turn = self.database.row("SELECT id, length(prompt_ids) / 4 FROM turns WHERE number = ?", self.count())
        if turn is None:
            return None
        last = "SELECT role, stop, indexed, id, text, ids FROM passages WHERE turn_id = ? ORDER BY id DESC LIMIT 1"
        row = self.database.row(last, turn[0])
        if row is None or row[0] == _USER:
            return _Growing(*turn)
        return _Growing(turn[0], row[1]) if row[2] else _Growing(turn[0], row[1], *row[3:])

    def _index_what_was_left_open(self) -> None:
        """Close the passage that grew when a process died."""
        growing = self._read_growing()
        if growing and growing.id:
            with self.database.transaction() as connection:
                self._close_passage(connection, growing)

    def _store(self, connection: sqlite3.Connection, growing: _Growing, role: int = _ASSISTANT) -> None:
        """Insert or update the row of a passage, within a transaction."""
        if growing.id:
            query = "UPDATE passages SET stop = ?, text = ?, ids = ? WHERE id = ?"
            connection.execute(query, (growing.stop, growing.text, growing.ids, growing.id))
        else:
            query = "INSERT INTO passages (turn_id, role, stop, indexed, text, ids) VALUES (?, ?, ?, 0, ?, ?)"
            values = (growing.turn_id, role, growing.stop, growing.text, growing.ids)
            growing.id = connection.execute(query, values).lastrowid

    def _close_passage(self, connection: sqlite3.Connection, growing: _Growing) -> _Growing:
        """Index a passage that grows no more, within a transaction; gives back where the next one begins."""
        if growing.id:
            self.words.add(connection, growing.id, growing.text)
            connection.execute("UPDATE passages SET indexed = 1 WHERE id = ?", (growing.id,))
        return _Growing(growing.turn_id, growing.stop)


def packed(ids: Sequence[int]) -> bytes:
    """Ids as the tables keep them."""
    return struct.pack(f"<{len(ids)}i", *ids)


def unpacked(blob: bytes) -> list[int]:
    """Ids as they were, from what the tables keep."""
    return list(struct.unpack(f"<{len(blob) // 4}i", blob))
