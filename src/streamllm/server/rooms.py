"""Sessions and their chats: who has one, how one comes to be, is copied and is deleted, for all owners.

Joins what is on disk (``shelf``), what is in memory (``pool``) and how a chat is made (``opener``). A session is
claimed before anything is done with it, so of two threads that want one, the second waits or takes a copy. Knows no
messages.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamllm.config import MOST_RESIDENT, RESIDENT_SHARE
from streamllm.engine import Engine
from streamllm.errors import BusyError, ConfigError, StateError, StreamLLMError, TakenError
from streamllm.models import free_bytes
from streamllm.server.opener import Opener
from streamllm.server.pool import PATIENCE, Berth, Pool
from streamllm.server.shelf import Shelf
from streamllm.server.views import window_of
from streamllm.session import Chat
from streamllm.sessions import check_name

NOTES = 64
"""Notes that wait for somebody to read them; the oldest go."""


class Rooms:
    """See the module.

    Args:
        opener: makes chats.
        folder: holds a folder for each owner.
        resident: chats in memory; ``None``: as ``fitting`` says.
        most: sessions of one owner.

    Attributes:
        notes: sentences that the operator should be told once.
        deleted: sessions that were deleted to make room for others.

    Raises:
        ConfigError: ``resident`` is out of range.
    """

    def __init__(self, opener: Opener, folder: Path, *, resident: int | None, most: int) -> None:
        self.opener, self.folder, self.most = opener, folder, most
        self.notes: deque[str] = deque(maxlen=NOTES)
        resident = fitting(opener.engine, opener.snapshots) if resident is None else resident
        self.pool = Pool(resident, self.notes.append)
        self.deleted = 0
        self._shelves: dict[str, Shelf] = {}
        self._lock = threading.Lock()
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if path.is_dir():
                with suppress(ConfigError):
                    self.shelf(path.name)

    def shelf(self, owner: str) -> Shelf:
        """The sessions of an owner.

        Raises:
            ConfigError: nobody can be called so.
            StateError: the folder cannot be used.
        """
        with self._lock:
            if owner not in self._shelves:
                self._shelves[owner] = Shelf(owner, self.folder, self.opener.model_name, self.notes.append)
            return self._shelves[owner]

    def count(self) -> int:
        """Sessions of all owners."""
        with self._lock:
            shelves = list(self._shelves.values())
        return sum(shelf.index.count() for shelf in shelves)

    def close(self) -> None:
        """End and save everything."""
        self.pool.close()
        with self._lock:
            shelves, self._shelves = list(self._shelves.values()), {}
        for shelf in shelves:
            shelf.close()

    # ---- having one

    def claimed(self, shelf: Shelf, name: str) -> Berth:
        """A session that is there, for the caller alone, who releases it.

        Raises:
            ConfigError: no session can be called so.
            UnknownSessionError: there is no such session.
            BusyError: it is in use, also after a moment.
        """
        shelf.require(name)
        berth = self.pool.claim((shelf.owner, name), PATIENCE)
        if berth is None:
            raise in_use(name)
        try:
            shelf.require(name)  # it may have been deleted meanwhile
        except BaseException:
            self.pool.release(berth)
            raise
        return berth

    def seat(self, shelf: Shelf, berth: Berth) -> tuple[Chat, int]:
        """The chat of a claimed session, and how many tokens were read anew for it.

        Raises:
            BusyError: there is no room, or another process holds the session.
            UnknownSessionError, StateError: as ``Opener.there``.
        """
        if berth.chat is not None:
            return berth.chat, 0
        chat = self.pool.seat(berth, lambda: self.opener.there(shelf, berth.key[1]))
        return chat, chat.tokens_reread

    def let_go(self, shelf: Shelf, berth: Berth) -> None:
        """Release a session that was used."""
        self.pool.ending(berth)
        try:
            if berth.chat is not None and berth.title is not None:
                berth.chat.transcript.put("title", berth.title)
                berth.title = None
            if berth.chat is not None:
                berth.window = window_of(berth.chat)
                shelf.index.touch(berth.key[1], turns=berth.chat.turns, window=berth.window)
        except StreamLLMError as error:
            self.notes.append(f"Session {berth.key[1]!r}: {error}")
        finally:
            self.pool.release(berth)

    # ---- new ones

    @contextmanager
    def new(self, shelf: Shelf, name: str | None, *, is_named: bool) -> Iterator[Berth]:
        """A session that is to be made in the block, and is claimed then; if the block fails, it is not there.

        Raises:
            ConfigError: no session can be called so; or one is: ``TakenError``.
            BusyError: there are too many, and none that may be deleted.
        """
        name = shelf.new_name() if name is None else name
        check_name(name)
        berth = self.pool.claim((shelf.owner, name))
        if berth is None:
            raise _taken(name)
        try:
            with shelf.lock:
                self._reserve(shelf, name, is_named=is_named)
            try:
                yield berth
            except BaseException:
                with suppress(StreamLLMError):
                    self._discard(shelf, berth)
                raise
        except BaseException:
            self.pool.release(berth)
            raise

    def fork(
        self,
        shelf: Shelf,
        source: str,
        turns: int,
        name: str | None = None,
        *,
        is_named: bool = False,
        held: Berth | None = None,
    ) -> Berth:
        """A claimed new session that has the first turns of another one, which may be in use.

        Args:
            shelf: where both are.
            source: the other one.
            turns: how many.
            name: of the new one; ``None``: any.
            is_named: whether it was asked for by name.
            held: the other one, if the caller has claimed it.

        Raises:
            ConfigError, BusyError: as ``new``.
            StateError: it cannot be read or written.
        """
        with self.new(shelf, name, is_named=is_named) as berth:
            name = berth.key[1]
            other = self.pool.claim((shelf.owner, source)) if held is None else held
            try:
                if other is not None:
                    self._fork_in_memory(shelf, other, turns, berth, is_named=is_named)
            finally:
                if other is not None and held is None:
                    self.pool.release(other)
            self.pool.seat(berth, lambda: self.opener.copied(shelf, source, turns, name, is_named=is_named))
            shelf.index.copy(source, name, turns)
        return berth

    def delete(self, shelf: Shelf, berth: Berth) -> None:
        """Delete a session that was claimed, and release it.

        Raises:
            BusyError: another process holds it.
            StateError: it cannot be deleted.
        """
        try:
            self._discard(shelf, berth)
        finally:
            self.pool.release(berth)

    def abandon(self, shelf: Shelf, berth: Berth) -> None:
        """The same for one of which nothing has come."""
        with suppress(StreamLLMError):
            self.delete(shelf, berth)

    # ---- inside

    def _fork_in_memory(self, shelf: Shelf, held: Berth, turns: int, berth: Berth, *, is_named: bool) -> None:
        """Fork a session that is claimed, if its stream is in memory or, for all of its turns, on disk."""
        source = held.key[1]
        if held.chat is None:
            with shelf.reading(source) as transcript:
                is_all = turns == transcript.count()
            if not is_all:
                return
            self.seat(shelf, held)
        chat = held.chat
        assert chat is not None
        self.pool.seat(berth, lambda: self.opener.forked(shelf, chat, turns, berth.key[1], is_named=is_named))

    def _reserve(self, shelf: Shelf, name: str, *, is_named: bool) -> None:
        """Count a session that is about to be made."""
        if shelf.has(name):
            raise _taken(name)
        self._make_room(shelf)
        now = time.time()
        shelf.index.add(name, created=now, used=now, is_named=is_named)

    def _make_room(self, shelf: Shelf) -> None:
        """Delete sessions that nobody has named, the least recently used first, until one more may be made."""
        while shelf.index.count() >= self.most:
            for name in shelf.index.unnamed():
                berth = self.pool.claim((shelf.owner, name))
                if berth is None:
                    continue
                try:
                    self.delete(shelf, berth)
                except (BusyError, StateError) as error:
                    self.notes.append(f"Session {name!r} was to be deleted: {error}")
                    continue
                self.deleted += 1
                break
            else:
                raise BusyError(
                    f"{self.most} sessions are kept already and none of them may be deleted to make room, since they "
                    "have names or are in use: delete some."
                )

    def _discard(self, shelf: Shelf, berth: Berth) -> None:
        """Close the chat of a claimed session, whatever becomes of it, and delete the session."""
        chat = self.pool.vacate(berth)
        if chat is not None:
            with suppress(StreamLLMError):
                chat.close()
        shelf.delete(berth.key[1])


def fitting(engine: Engine, snapshots: int) -> int:
    """Return how many chats memory is kept for: a share of what is free now, for their caches and snapshots."""
    free = free_bytes(engine.model.device)
    if free is None:
        return MOST_RESIDENT
    return max(2, min(MOST_RESIDENT, free // RESIDENT_SHARE // (engine.bytes_per_stream * (1 + snapshots))))


def in_use(name: str) -> BusyError:
    """What is said of a session that somebody else has."""
    return BusyError(f"Session {name!r} is in use: wait for the end of the reply that goes on in it, or stop that one.")


def _taken(name: str) -> TakenError:
    return TakenError(f"There is a session {name!r} already; take another name, or delete that one.")
