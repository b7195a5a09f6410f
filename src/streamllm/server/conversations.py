"""Which conversation a request belongs to: that of a client that resends everything, or a session by its name.

A client that resends everything is recognised by what it sends: its session goes on and only the new turn is read. A
history that branches off, or whose session is busy, goes on in a copy; one that nobody knows is streamed through a new
session once. All methods block and may be called by any thread; there is no thread here. Knows nothing of HTTP.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamllm.config import check_count
from streamllm.engine import Engine
from streamllm.errors import BusyError, StateError, UnknownSessionError
from streamllm.server.continuation import Continuation, How
from streamllm.server.history import History, Message, canonical
from streamllm.server.opener import Opener
from streamllm.server.pool import Berth
from streamllm.server.recognition import Place, beginning, digests
from streamllm.server.registry import Registry
from streamllm.server.rooms import Rooms
from streamllm.server.shelf import Shelf, entitle
from streamllm.server.views import window_of
from streamllm.session import Recall

Turns = Sequence[tuple[str, str]]
"""What the user said, and the reply."""

Found = tuple[Berth, How, int]
"""A claimed session with its chat, how it came to be, and how many tokens were read for that."""


class Conversations(Registry):
    """See the module. ``with`` closes it.

    Args:
        engine: reads and writes.
        folder: holds a folder for each owner.
        model_name: as clients call the model; a history that was said to another one is not known.
        recall: of sessions that do not say.
        resident: chats in memory, at least 2; ``None``: as many as a quarter of the memory that is free now has room
            for, each with its cache and its snapshots, at most 128.
        snapshots: turns of each chat that can be taken back exactly.
        most: sessions of one owner; beyond, unnamed ones are deleted, the least recently used first.
        idle: seconds after which ``sweep`` puts a chat on disk.
        template_options: handed to the chat template.

    Raises:
        ConfigError: an option cannot be used.
        StateError: the folder cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        model_name: str,
        recall: Recall = "auto",
        resident: int | None = None,
        snapshots: int = 2,
        most: int = 1000,
        idle: float = 600.0,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        check_count("snapshots", snapshots, 0)
        check_count("most", most, 1)
        opener = Opener(engine, model_name, recall, snapshots, template_options or {})
        super().__init__(Rooms(opener, folder, resident=resident, most=most))
        self.idle = idle
        self._how: Counter[How] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Conversations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- going on

    def continue_messages(self, owner: str, messages: Sequence[Message], *, copies: int = 1) -> list[Continuation]:
        """Go on with the conversation that a client resends.

        Args:
            owner: whose conversations are looked through.
            messages: all of them; the last one is what the user says now.
            copies: independent continuations of it.

        Raises:
            InputError: the messages cannot be read.
            BusyError: there is no room for one more conversation now.
            StateError: it cannot be read or written.
        """
        check_count("copies", copies, 1)
        history, shelf = canonical(messages), self._rooms.shelf(owner)
        chain = list(digests(beginning(owner, self._rooms.opener.model_name, history.system), history.turns))
        for length, places in shelf.index.known(chain):
            found = self._from(shelf, places, history.turns[length - 1], copies, history.turns[length:])
            if found is not None:
                return self._ready(shelf, found, history.text)
        return self._ready(shelf, self._begin(shelf, history, copies), history.text)

    def continue_turn(self, owner: str, session_id: str, turn: int, *, copies: int = 1) -> list[Continuation]:
        """Go on behind a turn of a session: in the session itself if it is the last one, otherwise in a copy.

        Raises:
            ConfigError: no session can be called so, or it has no such turn.
            UnknownSessionError: there is no such session.
            BusyError, StateError: as ``continue_messages``.
        """
        check_count("copies", copies, 1)
        shelf = self._rooms.shelf(owner)
        with shelf.reading(session_id) as transcript:
            place = Place(session_id, turn, transcript.turn(turn).id, turn == transcript.count())
        found = self._from(shelf, [place], None, copies, ())
        if found is None:
            raise BusyError(f"Session {session_id!r} has changed just now; ask for it again.")
        return self._ready(shelf, found, "")

    def open(self, owner: str, session_id: str) -> Continuation:
        """Go on with a session.

        Raises:
            ConfigError: no session can be called so.
            UnknownSessionError: there is no such session.
            BusyError: it is in use, also after a moment.
            StateError: it is damaged.
        """
        shelf = self._rooms.shelf(owner)
        berth = self._rooms.claimed(shelf, session_id)
        try:
            _, read = self._rooms.seat(shelf, berth)
        except BaseException:
            self._rooms.pool.release(berth)
            raise
        return self._ready(shelf, [(berth, "continued", read)], "")[0]

    # ---- responses

    def note_response(self, owner: str, response_id: str, session_id: str, turn: int) -> None:
        """Remember by which name a client knows a turn, when ``done`` was called behind it; the oldest are forgotten.

        Raises:
            StateError: that cannot be written.
        """
        self._rooms.shelf(owner).index.note_response(response_id, session_id, turn)

    def find_response(self, owner: str, response_id: str) -> tuple[str, int] | None:
        """Session and turn of a response; ``None``: it is not known, or was taken back."""
        place = self._rooms.shelf(owner).index.find_response(response_id)
        return None if place is None else (place.session, place.turn)

    def drop_response(self, owner: str, response_id: str) -> bool:
        """Forget a response; whether it was known."""
        return self._rooms.shelf(owner).index.drop_response(response_id)

    # ---- the whole

    @property
    def notes(self) -> deque[str]:
        """Sentences that the operator should be told once; whoever shows them clears them."""
        return self._rooms.notes

    def sweep(self) -> int:
        """Put chats on disk that were idle for long; how many. To be called now and then."""
        return self._rooms.pool.sweep(self.idle)

    def stats(self) -> dict[str, int]:
        """Sessions: in memory, in use, on disk only, deleted to make room; and how requests have gone on."""
        resident, busy = self._rooms.pool.counts()
        with self._lock:
            how = {name: self._how[name] for name in ("new", "continued", "forked", "streamed")}
        on_disk = max(0, self._rooms.count() - resident)
        return {"resident": resident, "busy": busy, "on_disk": on_disk, "deleted": self._rooms.deleted, **how}

    def close(self) -> None:
        """End and save everything."""
        self._rooms.close()

    # ---- inside

    def _from(
        self, shelf: Shelf, places: Sequence[Place], said: tuple[str, str] | None, copies: int, rest: Turns
    ) -> list[Found] | None:
        """Go on at one of several places that are the same, and take over what was said since; ``None``: none is left.

        ``said``: the last turn there; ``None``: it need not be compared.
        """
        if copies == 1:
            for place in places:
                if place.is_last and (found := self._at_the_end(shelf, place, said)) is not None:
                    return self._told(shelf, found, rest, 0)
        for place in places:
            if (berth := self._behind(shelf, place, said)) is not None:
                assert berth.chat is not None
                return self._told(shelf, (berth, "forked", berth.chat.tokens_reread), rest, copies - 1, is_new=True)
        return None

    def _at_the_end(self, shelf: Shelf, place: Place, said: tuple[str, str] | None) -> Found | None:
        """A session that nobody has, if its last turn is this one."""
        berth = self._rooms.pool.claim((shelf.owner, place.session))
        if berth is None:
            return None
        try:
            chat, read = self._rooms.seat(shelf, berth)
            if chat.turns == place.turn and shelf.is_there(chat.transcript, place, said):
                return berth, "continued", read
        except (BusyError, StateError, UnknownSessionError) as error:
            self.notes.append(f"Session {place.session!r} could not be gone on with: {error}")
        except BaseException:
            self._rooms.pool.release(berth)
            raise
        self._rooms.pool.release(berth)
        return None

    def _behind(self, shelf: Shelf, place: Place, said: tuple[str, str] | None) -> Berth | None:
        """A copy of a session up to a turn, if it is there."""
        try:
            with shelf.reading(place.session) as transcript:
                is_there = shelf.is_there(transcript, place, said)
            return self._rooms.fork(shelf, place.session, place.turn) if is_there else None
        except (StateError, UnknownSessionError) as error:
            self.notes.append(f"Session {place.session!r} could not be copied: {error}")
            return None

    def _begin(self, shelf: Shelf, history: History, copies: int) -> list[Found]:
        """A new session for a history that nobody knows."""
        how: How = "streamed" if history.turns else "new"
        with self._rooms.new(shelf, None, is_named=False) as berth:
            name = berth.key[1]
            opener = self._rooms.opener
            chat = self._rooms.pool.seat(berth, lambda: opener.new(shelf, name, is_named=False, system=history.system))
            entitle(chat.transcript, history.beginning)
        return self._told(shelf, (berth, how, 0), history.turns, copies - 1, is_new=True)

    def _told(self, shelf: Shelf, found: Found, turns: Turns, more: int, *, is_new: bool = False) -> list[Found]:
        """Take over turns that were said elsewhere, and then make so many copies more; all are claimed."""
        berth, how, read = found
        chat, all_of_them = berth.chat, [found]
        assert chat is not None
        try:
            if turns:
                before = chat.transcript.tokens()
                chat.tell(turns)
                shelf.learn(berth.key[1], chat.transcript, chat.turns - len(turns) + 1)
                read += chat.transcript.tokens() - before if chat.template.is_incremental else 0
                all_of_them = [(berth, how, read)]
            for _ in range(more):
                copy = self._rooms.fork(shelf, berth.key[1], chat.turns, held=berth)
                all_of_them.append((copy, how, 0))
                assert copy.chat is not None
                self._rooms.opener.redraw(copy.chat)
        except BaseException:
            for made, *_ in all_of_them:
                if is_new:
                    self._rooms.abandon(shelf, made)
                else:
                    self._rooms.let_go(shelf, made)
            raise
        return all_of_them

    def _ready(self, shelf: Shelf, found: Sequence[Found], text: str) -> list[Continuation]:
        """What is handed to those who asked."""
        return [self._continuation(shelf, *each, text=text) for each in found]

    def _continuation(self, shelf: Shelf, berth: Berth, how: How, read: int, *, text: str) -> Continuation:
        chat, name = berth.chat, berth.key[1]
        assert chat is not None
        with self._lock:
            self._how[how] += 1

        def done() -> None:
            self._rooms.pool.ending(berth)
            try:
                shelf.learn(name, chat.transcript)
                first = chat.transcript.turn(1).user if chat.turns else ""
                entitle(chat.transcript, first)
            except StateError as error:
                self.notes.append(f"Session {name!r} is not recognised by its last turn: {error}")

        def released() -> None:
            if how == "new" and not chat.turns:  # nothing came of it
                self._rooms.abandon(shelf, berth)
            else:
                self._rooms.let_go(shelf, berth)

        berth.window = window_of(chat)
        cached = chat.transcript.tokens() - read if chat.template.is_incremental else 0
        return Continuation(
            chat,
            name,
            how,
            text=text,
            cached_tokens=max(0, cached),
            read_tokens=read,
            done=done,
            released=released,
        )
