"""The sessions of one owner: a folder of them, and the index by which their conversations are recognised.

An owner is whoever has one API key, and each has a folder, so no name leads from one to the sessions of another. Knows
sessions on disk; nothing here knows which of them are in memory.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from streamllm.errors import ConfigError, InputError, StateError, UnknownSessionError
from streamllm.hold import LOCK, make_private
from streamllm.server.recognition import Entry, Place, Recognition, beginning, extended
from streamllm.server.views import SessionView, TurnView, title_of, turn_view
from streamllm.sessions import Session, check_name, delete_session, find_session, read_transcript, sweep
from streamllm.transcript import Transcript

INDEX = ".recognition.db"
"""Begins with a dot, so it is no name of a session."""

TITLE_CHARS = 200
"""A title that is given is not longer."""


class Shelf:
    """See the module.

    Args:
        owner: by which the folder is called.
        folder: of all owners.
        model: as the server calls it.
        note: told in one sentence what a person should know.

    Attributes:
        lock: for whoever counts the sessions and then makes one.

    Raises:
        ConfigError: no folder can be called as the owner is.
        StateError: the folder cannot be used.
    """

    def __init__(self, owner: str, folder: Path, model: str, note: Callable[[str], None]) -> None:
        check_name(owner)
        self.owner, self.folder, self.model = owner, folder / owner, model
        self.lock = threading.RLock()
        try:
            make_private(self.folder)
            sweep(self.folder)
        except OSError as error:
            raise StateError(f"Sessions cannot be kept in {self.folder}: {error.strerror or error}.") from error
        self._index = Recognition(self.folder / INDEX, note)
        self._generation: int | None = None

    @property
    def index(self) -> Recognition:
        """What is known of the sessions; those that it does not know yet are added first."""
        with self.lock:
            if self._generation != self._index.generation:
                self._generation = self._index.generation
                self._compare()
            return self._index

    def close(self) -> None:
        """Let go of the index."""
        self._index.close()

    # ---- names

    def has(self, name: str) -> bool:
        """Whether there is a session, or something else, of this name."""
        return (self.folder / name).exists()

    def require(self, name: str) -> None:
        """Refuse a name that is none of a session.

        Raises:
            ConfigError: no session can be called so.
            UnknownSessionError: there is no such session.
        """
        check_name(name)
        try:
            find_session(name, self.folder)
        except StateError as error:
            raise UnknownSessionError(
                f"There is no session {name!r}; make it first, or leave the session out and send all messages."
            ) from error

    def new_name(self) -> str:
        """A name that nothing has."""
        return uuid.uuid4().hex

    def delete(self, name: str) -> None:
        """Delete a session and all that leads to it, as far as it is there.

        Raises:
            BusyError: another process holds it.
            StateError: its files cannot be deleted.
        """
        if self.has(name):
            delete_session(name, self.folder)
        self.index.forget(name)

    # ---- turns

    @contextmanager
    def reading(self, name: str) -> Iterator[Transcript]:
        """The transcript of a session, to be looked at.

        Raises:
            ConfigError, UnknownSessionError: as ``require``.
            StateError: it is damaged.
        """
        self.require(name)
        with closing(read_transcript(name, self.folder)) as transcript:
            yield transcript

    def turns(self, name: str, after: int, limit: int) -> list[TurnView]:
        """So many turns after one, as they are shown."""
        with self.reading(name) as transcript:
            last = min(transcript.count(), after + limit)
            return [turn_view(transcript.turn(number)) for number in range(after + 1, last + 1)]

    def copied(self, source: str, turns: int, name: str) -> Session:
        """A new session with the first turns of another one, which may be in use.

        Raises:
            ConfigError: there are not so many turns.
            StateError: it cannot be read or written.
        """
        with self.reading(source) as old:
            gone = old.count() - turns
            if gone < 0:
                raise ConfigError(f"Cannot fork behind turn {turns}: session {source!r} has {old.count()}.")
            session = Session(name, folder=self.folder)
            try:
                transcript = session.transcript
                old.copy_into(transcript)
                if gone:
                    transcript.undo(gone)
                if transcript.get("foreign", 0) > turns:
                    transcript.put("foreign", turns)
            except BaseException:
                session.close()
                raise
            return session

    # ---- digests

    def learn(self, name: str, transcript: Transcript, first: int | None = None) -> None:
        """Recognise a session by what was said in it from now on.

        Args:
            name: of the session.
            transcript: of it; whoever calls has it.
            first: the first turn that is new; ``None``: the last one is. If the others are not known, all are learnt.

        Raises:
            StateError: that cannot be read or written.
        """
        first = max(1, transcript.count()) if first is None else first
        digest: bytes | None = None
        if first > 1:
            digest = self.index.digest(name, first - 1, transcript.turn(first - 1).id)
        if digest is None:
            first, digest = 1, beginning(self.owner, self.model, transcript.get("system"))
        places = []
        for row in transcript.turns(first):
            digest = extended(digest, row.user, row.reply)
            places.append((row.number, row.id, digest))
        self.index.learn(name, places)

    @staticmethod
    def is_there(transcript: Transcript, place: Place, said: tuple[str, str] | None) -> bool:
        """Whether a session still has a place, and these were the last words there; ``None``: whatever they were."""
        if not 1 <= place.turn <= transcript.count():
            return False
        row = transcript.turn(place.turn)
        if row.id != place.turn_id:
            return False
        return said is None or [text.strip() for text in said] == [row.user.strip(), row.reply.strip()]

    # ---- looks

    def view(self, name: str, *, is_resident: bool, is_busy: bool, window: dict[str, int] | None = None) -> SessionView:
        """A session as it is shown.

        Raises:
            ConfigError, UnknownSessionError: as ``require``.
        """
        self.require(name)
        entry = self.index.entry(name) or Entry(name, 0.0, 0.0, False, 0, None)
        seen = SessionView(
            id=name,
            title="",
            turns=entry.turns,
            tokens=0,
            created=entry.created,
            used=entry.used,
            model=None,
            system=None,
            is_resident=is_resident,
            is_busy=is_busy,
            is_named=entry.is_named,
            window=window or entry.window,
        )
        try:
            with self.reading(name) as transcript:
                return replace(
                    seen,
                    title=transcript.get("title") or "",
                    turns=transcript.count(),
                    tokens=transcript.tokens(),
                    model=transcript.get("model"),
                    system=transcript.get("system"),
                )
        except (StateError, ValueError) as error:  # ValueError: what it holds is no JSON
            return replace(seen, damage=str(error))

    # ---- inside

    def _compare(self) -> None:
        """Bring the index and the folder together: sessions may have come and gone without it."""
        known = {entry.name for entry in self._index.entries()}
        there = {path.name for path in self.folder.iterdir() if _is_session(path)}
        for name in known - there:
            self._index.forget(name)
        for name in sorted(there - known):
            created, turns, is_named = time.time(), 0, True
            used = created
            with suppress(StateError, ValueError), closing(read_transcript(name, self.folder)) as transcript:
                created, is_named = float(transcript.get("created", created)), bool(transcript.get("named", True))
                turns, last = transcript.count(), transcript.last()
                used = created if last is None else last.ended or last.began
            self._index.add(name, created=created, used=used, is_named=is_named, turns=turns)


def checked_title(title: str) -> str:
    """Return a title on one line.

    Raises:
        InputError: it is empty, too long, or holds what is no text.
    """
    line = " ".join(title.split())
    if not line or len(line) > TITLE_CHARS or not line.isprintable():
        raise InputError(
            f"A session cannot have the title {title[:40]!r}; take 1 to {TITLE_CHARS} characters that can be printed."
        )
    return line


def entitle(transcript: Transcript, text: str) -> None:
    """Give a session a title from what was said first, unless it has one.

    Raises:
        StateError: it cannot be written.
    """
    if not transcript.get("title") and (title := title_of(text)):
        transcript.put("title", title)


def _is_session(path: Path) -> bool:
    try:
        check_name(path.name)
        return (path / LOCK).is_file()
    except (ConfigError, OSError):
        return False
