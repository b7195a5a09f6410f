"""Named sessions on disk: each is a folder, held by one process at a time.

In the folder lie ``transcript.db`` (all that was ever said, and the settings), ``state.stream`` (the stream, where one
was saved), a lock, and the pid of the process that holds it. They are their owner's alone: folders 0700, files 0600,
whatever the umask. Names may come from outside: none leads out of the folder of sessions. Nothing here knows what a
chat does with a session, or how one is written into a single file (``archive``).
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import platformdirs

from streamllm.atomic import sweep_parts
from streamllm.errors import BusyError, ConfigError, StateError, StreamLLMError
from streamllm.hold import LOCK, Hold, holder_of, make_private
from streamllm.transcript import Transcript

FOLDER_ENV = "STREAMLLM_SESSIONS"
"""Names the folder of sessions."""

TRANSCRIPT = "transcript.db"
STATE = "state.stream"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_HIDDEN = re.compile(r"\.session-[0-9a-f]{32}")


class Session:
    """A session, held by this process until it is closed.

    Args:
        name: of the session.
        create: make it if it is not there.
        folder: of sessions; ``sessions_folder()`` if left out.

    Attributes:
        name: of the session.
        path: its folder.
        transcript: what was said, and the settings.
        state: the file of the stream; it may not exist.
        is_new: whether nothing was said or set before.

    Raises:
        BusyError: another process, or this one, holds it already; the message names the pid.
        ConfigError: no session can be called so.
        StateError: it is damaged, has lost its transcript, cannot be written, or is not there and not to be made.
    """

    def __init__(self, name: str, *, create: bool = True, folder: Path | None = None) -> None:
        self.name = name
        self.path = _make(name, folder) if create else find_session(name, folder)
        self.state = self.path / STATE
        self._hold = Hold(self.path, f"Session {name!r}")
        try:
            sweep_parts(self.state)
            # A stream is only saved beside a transcript: without one, something was lost.
            can_begin = create and not self.state.exists()
            self.transcript = Transcript(self.path / TRANSCRIPT) if can_begin else _transcript(self.path)
            try:
                self.is_new = not self.transcript.count() and not self.transcript.settings()
            except BaseException:
                self.transcript.close()
                raise
        except BaseException:
            self._hold.release()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it; a second time does nothing."""
        try:
            self.transcript.close()
        finally:
            self._hold.release()


@dataclass(frozen=True)
class SessionInfo:
    """What a list of sessions says about one.

    Args:
        name: of the session.
        turns: that were said, without those that were taken back.
        tokens: read and written in them.
        used: when somebody last spoke in it, in seconds of Unix time; ``None``: nobody has, or it is not known.
        model: as it was named to the session; ``None``: it is not known.
        pid: of the process that holds it.
        damage: why nothing else is known, in one sentence.
    """

    name: str
    turns: int = 0
    tokens: int = 0
    used: float | None = None
    model: str | None = None
    pid: int | None = None
    damage: str | None = None


def sessions_folder() -> Path:
    """Return where sessions lie: ``$STREAMLLM_SESSIONS``, or a folder among the user's data; it may not exist yet."""
    named = os.environ.get(FOLDER_ENV)
    return Path(named).expanduser() if named else platformdirs.user_data_path("streamllm") / "sessions"


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a session.

    Raises:
        ConfigError: it is empty or too long, has a sign that it must not have, or begins with a dot or a dash.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"A session cannot be called {name[:80]!r}; take at most 64 letters (a to z), digits, '.', '_' and '-', "
            "the first one neither '.' nor '-'."
        )


def find_session(name: str, folder: Path | None = None) -> Path:
    """Return the folder of a session.

    Args:
        name: of the session.
        folder: of sessions; ``sessions_folder()`` if left out.

    Raises:
        ConfigError: no session can be called so.
        StateError: there is no such session.
    """
    check_name(name)
    path = (folder or sessions_folder()) / name
    if not _is_session(path):
        raise StateError(f"There is no session {name!r} in {path.parent}; streamllm sessions list shows what there is.")
    return path


def list_sessions(folder: Path | None = None) -> Iterator[SessionInfo]:
    """Yield what sessions there are, by name, without holding any of them; a damaged one says so.

    Args:
        folder: of sessions; ``sessions_folder()`` if left out.

    Raises:
        StateError: the folder cannot be read.
    """
    folder = folder or sessions_folder()
    try:
        found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and _is_session(path))
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(folder, error) from error
    yield from map(_look, found)


def read_transcript(name: str, folder: Path | None = None) -> Transcript:
    """Open the transcript of a session to be looked at only, also while a process holds the session.

    Args:
        name: of the session.
        folder: of sessions; ``sessions_folder()`` if left out.

    Raises:
        ConfigError: no session can be called so.
        StateError: there is no such session, or it is damaged.
    """
    return _transcript(find_session(name, folder), read_only=True)


def delete_session(name: str, folder: Path | None = None) -> None:
    """Delete a session, with all that was said in it.

    Args:
        name: of the session.
        folder: of sessions; ``sessions_folder()`` if left out.

    Raises:
        BusyError: a process holds it.
        ConfigError: no session can be called so.
        StateError: there is no such session, it is a link to one elsewhere, or its files cannot be deleted.
    """
    path = find_session(name, folder)
    if path.is_symlink():
        raise StateError(f"Session {name!r} is a link to {path.resolve()}, and is not deleted; delete the link itself.")
    sweep(path.parent)
    hold = Hold(path, f"Session {name!r}")
    try:
        hold.move(hidden(path.parent))  # the name is free at once, also if the process dies in the middle
        shutil.rmtree(hold.path)
    except OSError as error:
        raise StateError(
            f"Session {name!r} cannot be deleted: {error.filename or path}: {error.strerror or error}."
        ) from error
    finally:
        hold.release()


def hidden(folder: Path) -> Path:
    """Return where a session may be made, or deleted, without being one; no name leads there."""
    return folder / f".session-{uuid.uuid4().hex}"


def sweep(folder: Path) -> None:
    """Delete what processes left that died while they made or deleted a session."""
    for path in folder.iterdir():
        if _HIDDEN.fullmatch(path.name) and _is_session(path):
            with suppress(BusyError, StateError):
                hold = Hold(path, path.name)
                shutil.rmtree(path, ignore_errors=True)
                hold.release()


def _is_session(path: Path) -> bool:
    """Whether a folder is a session's: any other one is never written or deleted."""
    try:
        return (path / LOCK).is_file()
    except OSError:  # nobody lets us look into it
        return False


def _make(name: str, folder: Path | None) -> Path:
    """The folder of a session, made if it is not there."""
    check_name(name)
    path = (folder or sessions_folder()) / name
    try:
        make_private(path)
        # In this order: the lock is the first file of a session that another process makes just now.
        if any(path.iterdir()) and not _is_session(path):
            raise StateError(f"{path} is a folder of something else; take another name for the session.")
    except OSError as error:
        raise _unusable(path, error) from error
    return path


def _transcript(path: Path, *, read_only: bool = False) -> Transcript:
    """The transcript that is there."""
    file = path / TRANSCRIPT
    if not file.exists() or (not file.stat().st_size and (path / STATE).exists()):
        what = "empty" if file.exists() else "missing"
        raise StateError(
            f"Session {path.name!r} has no transcript: {file} is {what}; put it back, or delete the session."
        )
    return Transcript(file, read_only=read_only)


def _unusable(path: Path, error: OSError) -> StateError:
    return StateError(
        f"The folder of sessions cannot be used: {path}: {error.strerror}; name another one by {FOLDER_ENV}."
    )


def _look(path: Path) -> SessionInfo:
    """What can be seen of a session from outside."""
    pid = holder_of(path)
    try:
        with closing(_transcript(path, read_only=True)) as transcript:
            last, model = transcript.last(), transcript.get("model")
            return SessionInfo(
                path.name,
                turns=transcript.count(),
                tokens=transcript.tokens(),
                used=None if last is None else last.ended or last.began,
                model=None if model is None else str(model),
                pid=pid,
            )
    except (StreamLLMError, ValueError) as error:  # ValueError: what it holds is no JSON
        return SessionInfo(path.name, pid=pid, damage=str(error))
