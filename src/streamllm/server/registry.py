"""The sessions of all owners: made, shown, changed, carried and deleted, each by its name.

All methods block and may be called by any thread. An owner never sees what another has. Knows nothing of what is said
in a session, nor how a conversation is recognised.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from streamllm.archive import export_session, import_session
from streamllm.errors import ConfigError, UnknownSessionError
from streamllm.server.rooms import Rooms, in_use
from streamllm.server.shelf import checked_title, entitle
from streamllm.server.views import SessionView, TurnView
from streamllm.session import Recall
from streamllm.sessions import Session

UNPACKED_BYTES = 2**28
"""An imported session may unpack to so much more than its file has: a transcript gets smaller by some ten times, and a
stream hardly at all."""


class Registry:
    """See the module.

    Args:
        rooms: where the sessions and their chats are.
    """

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    def create(
        self,
        owner: str,
        session_id: str | None = None,
        *,
        system: str | None = None,
        title: str | None = None,
        recall: Recall | None = None,
    ) -> SessionView:
        """Make a session; one that is made so is never deleted to make room.

        Raises:
            ConfigError: no session can be called so, or an option cannot be used; or one is: ``TakenError``.
            InputError: the title or the instructions are no text.
            BusyError: there is no room for one more.
            StateError: it cannot be written.
        """
        shelf = self._rooms.shelf(owner)
        line = None if title is None else checked_title(title)
        with self._rooms.new(shelf, session_id, is_named=True) as berth:
            name = berth.key[1]
            chat = self._rooms.pool.seat(
                berth, lambda: self._rooms.opener.new(shelf, name, is_named=True, system=system, recall=recall)
            )
            if line is not None:
                chat.transcript.put("title", line)
        self._rooms.let_go(shelf, berth)
        return self.view(owner, name)

    def list(self, owner: str, *, after: str | None = None, limit: int = 100) -> Sequence[SessionView]:
        """Sessions, the newest first; ``after``: those that follow that one.

        Raises:
            UnknownSessionError: there is no session ``after``.
        """
        shelf = self._rooms.shelf(owner)
        if after is not None:
            shelf.require(after)
        found = []
        for entry in shelf.index.entries(after=after, limit=limit):
            with suppress(UnknownSessionError):  # deleted meanwhile
                found.append(self.view(owner, entry.name))
        return found

    def view(self, owner: str, session_id: str) -> SessionView:
        """A session as it is shown.

        Raises:
            ConfigError: no session can be called so.
            UnknownSessionError: there is no such session.
        """
        shelf = self._rooms.shelf(owner)
        key = (owner, session_id)
        is_resident, is_busy = self._rooms.pool.look(key)
        view = shelf.view(session_id, is_resident=is_resident, is_busy=is_busy, window=self._rooms.pool.window(key))
        title = self._rooms.pool.title(key)
        return view if title is None else replace(view, title=title)

    def turns(self, owner: str, session_id: str, *, after: int = 0, limit: int = 100) -> Sequence[TurnView]:
        """So many turns after one; that of a reply that goes on is among them.

        Raises:
            ConfigError, UnknownSessionError: as ``view``.
            StateError: the session is damaged.
        """
        return self._rooms.shelf(owner).turns(session_id, max(0, after), max(0, limit))

    def rename(self, owner: str, session_id: str, title: str) -> None:
        """Give a session another title, also while it is in use.

        Raises:
            InputError: it is no title.
            ConfigError, UnknownSessionError, BusyError, StateError: as ``open``.
        """
        shelf, line = self._rooms.shelf(owner), checked_title(title)
        shelf.require(session_id)
        berth = self._rooms.pool.claim((owner, session_id))
        if berth is None:
            if not self._rooms.pool.leave_title((owner, session_id), line):
                raise in_use(session_id)
            return
        try:
            if berth.chat is not None:
                berth.chat.transcript.put("title", line)
            else:
                with Session(session_id, create=False, folder=shelf.folder) as session:
                    session.transcript.put("title", line)
        finally:
            self._rooms.pool.release(berth)

    def set_system(self, owner: str, session_id: str, text: str | None) -> None:
        """Give a session other instructions; its window is read anew, and other histories lead to it from then on.

        Raises:
            ConfigError: they do not fit.
            UnknownSessionError, BusyError, StateError: as ``open``.
        """
        shelf = self._rooms.shelf(owner)
        berth = self._rooms.claimed(shelf, session_id)
        try:
            chat, _ = self._rooms.seat(shelf, berth)
            chat.set_system(text)
            shelf.index.unlearn(session_id)
            shelf.learn(session_id, chat.transcript)
        finally:
            self._rooms.let_go(shelf, berth)

    def delete(self, owner: str, session_id: str) -> None:
        """Delete a session, with all that was said in it.

        Raises:
            ConfigError, UnknownSessionError, BusyError: as ``open``.
            StateError: it cannot be deleted.
        """
        shelf = self._rooms.shelf(owner)
        shelf.require(session_id)
        berth = self._rooms.pool.claim((owner, session_id))
        if berth is None:
            raise in_use(session_id)
        self._rooms.delete(shelf, berth)

    def fork(self, owner: str, session_id: str, new_id: str | None = None, turns: int | None = None) -> SessionView:
        """A new session that has the turns of another one, or the first so many of them.

        Raises:
            ConfigError: the new one cannot be called so, or there are not so many turns; or one is: ``TakenError``.
            UnknownSessionError, BusyError, StateError: as ``open``.
        """
        shelf = self._rooms.shelf(owner)
        with shelf.reading(session_id) as transcript:
            last = transcript.last()
            whole = 0 if last is None else last.number - (last.finish is None)  # one that goes on is not whole
        if turns is not None and not 0 <= turns <= whole:
            raise ConfigError(f"Cannot fork behind turn {turns}: session {session_id!r} has {whole}.")
        berth = self._rooms.fork(shelf, session_id, whole if turns is None else turns, new_id, is_named=True)
        self._rooms.let_go(shelf, berth)
        return self.view(owner, berth.key[1])

    def export(self, owner: str, session_id: str, file: Path) -> None:
        """Write a session to a file.

        Raises:
            ConfigError, UnknownSessionError, BusyError, StateError: as ``open``.
        """
        shelf = self._rooms.shelf(owner)
        berth = self._rooms.claimed(shelf, session_id)
        try:
            self._rooms.pool.unseat(berth)
            export_session(session_id, file, shelf.folder)
        finally:
            self._rooms.pool.release(berth)

    def import_(self, owner: str, file: Path, new_id: str | None = None) -> SessionView:
        """Make a session from a file that ``export`` wrote.

        Raises:
            ConfigError: no session can be called so, or its instructions do not fit; or one is: ``TakenError``.
            InputError: its instructions cannot be read.
            BusyError: there is no room for one more.
            StateError: the file is damaged, none of ours or unpacks to too much, or it cannot be written.
        """
        shelf, most = self._rooms.shelf(owner), UNPACKED_BYTES + file.stat().st_size
        with self._rooms.new(shelf, new_id, is_named=True) as berth:
            name = berth.key[1]
            import_session(file, name, shelf.folder, most=most, shown="The file")
            with Session(name, create=False, folder=shelf.folder) as session:
                transcript = session.transcript
                transcript.put("named", True)
                shelf.learn(name, transcript)
                shelf.index.touch(name, turns=transcript.count())
                if (last := next(iter(transcript.turns()), None)) is not None:
                    entitle(transcript, last.user)
                self._rooms.opener.check_system(transcript.get("system", None))  # or it could not be gone on with
        self._rooms.pool.release(berth)
        return self.view(owner, name)
