"""The right to change a private folder: one process at a time has it, and others can see which.

A lock of the kernel on a file in the folder is the right itself, so it ends with the process at the latest. The pid
beside it is for messages only: what ``kill -9`` leaves of it does no harm. Nothing here knows what lies in the folder.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from streamllm.errors import BusyError, StateError

LOCK = "session.lock"
PID = "holder.pid"

PATIENCE = 0.2
"""Seconds to wait for a lock: who looks whether a folder is held may have its lock for a moment."""


class Hold:
    """The right to change a folder, until it is released.

    Args:
        path: the folder; it exists.
        what: is in it, for messages, such as ``Session 'work'``.

    Attributes:
        path: where the folder is.

    Raises:
        BusyError: another one has it; the message names its pid.
        StateError: the folder cannot be written.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._lock = _lock(path, PATIENCE)
        try:
            self._lock.acquire()
        except Timeout as error:
            pid = _pid(path)
            holder = "another process" if pid is None else f"process {pid}"
            raise BusyError(f"{what} is in use by {holder}; leave it there, or take another one here.") from error
        except OSError as error:
            raise StateError(f"{what} cannot be opened: {path}: {error.strerror or error}.") from error
        with suppress(OSError):  # a full disk must not keep anybody from deleting
            path.chmod(0o700)
            with open(path / PID, "w", opener=partial(os.open, mode=0o600)) as file:
                file.write(str(os.getpid()))

    def move(self, target: Path) -> None:
        """Rename the folder, which stays held.

        Raises:
            OSError: ``target`` is there and not empty, or the system refuses.
        """
        self.path.rename(target)
        self.path = target

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        if self._lock.is_locked:
            with suppress(OSError):
                (self.path / PID).unlink()
            self._lock.release()


def holder_of(path: Path) -> int | None:
    """Return the pid of the process that holds a folder; ``None`` if nobody does."""
    pid = _pid(path)
    if pid is None:
        return None
    try:
        with _lock(path, 0):
            return None  # the pid is that of a process that was killed
    except Timeout:
        return pid
    except OSError:
        return None


def make_private(path: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone (0700).

    Raises:
        OSError: the system refuses.
    """
    for each in (*reversed(path.parents), path):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)


def _lock(path: Path, seconds: float) -> FileLock:
    # Not bound to a thread: what one opened, another may close.
    return FileLock(path / LOCK, timeout=seconds, mode=0o600, thread_local=False)


def _pid(path: Path) -> int | None:
    try:
        return int((path / PID).read_text())
    except (OSError, ValueError):
        return None
