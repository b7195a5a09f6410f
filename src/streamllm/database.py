"""One SQLite file of ours: made private, checked when it is opened, its errors said as sentences.

Knows nothing of what the tables hold. The file is in WAL mode with ``synchronous=NORMAL``: what was committed outlives
the process, whenever it is killed; a power cut may take the last commits, but never damages the file. A file that is
damaged is refused and a copy of it is kept, since whatever opens a SQLite file next may change it.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streamllm.atomic import replacing
from streamllm.errors import StateError

CHECKED_BYTES = 2**28
"""A file up to this size is checked whole when it is opened, which takes a third of a second for the largest; of a
larger one damage is found where it is read."""

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_NEXT = {
    sqlite3.SQLITE_FULL: "make room on the disk; what was written before is safe",
    sqlite3.SQLITE_IOERR: "look whether the disk is full or failing; what was written before is safe",
    sqlite3.SQLITE_BUSY: "another process is using it; end that one first",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable",
    sqlite3.SQLITE_CANTOPEN: "look whether its folder is there and writable",
}
"""What to do next, by SQLite's primary result code."""


class Database:
    """A SQLite file with tables of one application.

    Not for use by several threads at once; whoever shares it brings the lock.

    Args:
        path: the file; made with mode 0600 where there is none. ``None``: a temporary one that is gone when closed.
        application: SQLite's ``application_id``, by which a file is known to be ours.
        format: version of the tables, >= 1; a file with another one is refused.
        schema: the statements that make the tables.
        read_only: only look at a file that is there; another process may be writing it.

    Raises:
        StateError: the file cannot be opened, is damaged (a copy is kept), of another program or of another version.
    """

    def __init__(
        self, path: Path | None, *, application: int, format: int, schema: Sequence[str], read_only: bool = False
    ) -> None:
        self.path = path
        self._application = application
        self._format = format
        self._is_read_only = read_only
        self._is_closed = False
        is_new = path is None or (not read_only and self._create(path)) or not self._probe(path)
        if read_only and (path is None or is_new):
            raise StateError(f"There is nothing in {path} to look at; open it to write first.")
        with self._sentences():
            self._connection = _look_at(path, is_shared=True) if read_only and path else _connect(path or "")
        if not read_only:
            try:
                self._prepare(schema if is_new else ())
            except BaseException:  # the caller has nothing to close
                self.close()
                raise

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All changes in the block are kept when it ends well, and none of them if it does not.

        Raises:
            StateError: they cannot be written.
        """
        with self._sentences():
            try:  # around all of it: an interrupt may come right behind any of the three
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[Any]:
        """All rows of a query, at once: an open cursor would keep the log from being written back.

        Raises:
            StateError: they cannot be read.
        """
        with self._sentences():
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> Any:
        """The first row of a query, or ``None``.

        Raises:
            StateError: it cannot be read.
        """
        return next(iter(self.rows(query, *values)), None)

    def copy_to(self, path: Path) -> None:
        """Write everything to a new private file, whole or not at all.

        Raises:
            StateError: there is such a file already, or it cannot be written.
        """
        if path.exists():
            raise StateError(f"{path} exists already, so nothing was copied; choose another name.")
        try:
            with replacing(path, mode=0o600) as temporary, self._sentences():
                target = sqlite3.connect(temporary)
                try:
                    self._connection.backup(target)
                finally:
                    target.close()
        except OSError as error:
            raise StateError(f"Cannot copy to {path}: {error.strerror or error}; choose another place.") from error

    def copy_into(self, other: Database) -> None:
        """Make ``other`` the same as this one.

        Raises:
            StateError: it cannot be written.
        """
        with self._sentences():
            self._connection.backup(other._connection)

    def close(self) -> None:
        """Write the log back and let go of the file; closing twice is allowed."""
        with self._sentences():
            self._connection.close()
        self._is_closed = True

    # ---- opening

    @staticmethod
    def _create(path: Path) -> bool:
        """Make an empty private file; False if there is one already. SQLite gives its own files the same mode."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            if path.is_dir():
                raise StateError(f"{path} is a folder, so nothing can be kept in it; give a file.") from None
            return False
        except OSError as error:
            raise StateError(
                f"Cannot make {path}: {error.strerror or error}; choose a folder that is there and writable."
            ) from error
        return True

    def _probe(self, path: Path) -> bool:
        """Whether the file has tables; refuses what is damaged or not ours, without changing a byte."""
        with self._sentences():
            # One that may write would write the log back into a file that may be damaged, when it is closed.
            probe = _look_at(path, is_shared=self._is_read_only)
            try:
                (application,) = probe.execute("PRAGMA application_id").fetchone()
                (found,) = probe.execute("PRAGMA user_version").fetchone()
                (tables,) = probe.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if tables and application != self._application:
                    raise StateError(
                        f"{path} is a database of another program, so it is left alone; choose another file."
                    )
                if tables and found != self._format:
                    raise StateError(
                        f"{path} has format {found}, this version reads format {self._format}; "
                        "use the version of streamllm that wrote it."
                    )
                whole = not self._is_read_only and path.stat().st_size <= CHECKED_BYTES
                if whole and (problem := probe.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise self._damaged(problem.splitlines()[-1])
            finally:
                probe.close()
        return bool(tables)

    def _prepare(self, schema: Sequence[str]) -> None:
        """Set how the file is written, and make the tables of a new one."""
        self.rows("PRAGMA journal_mode = WAL")
        self.rows("PRAGMA synchronous = NORMAL")
        if schema:
            with self.transaction() as connection:
                for statement in schema:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {self._application}")
                connection.execute(f"PRAGMA user_version = {self._format}")

    # ---- errors

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code; the rest says where it happened
            if code in _DAMAGED and self.path:
                raise self._damaged(error) from error
            what = self.path or "the temporary database"
            if self._is_closed:
                raise StateError(f"Cannot use {what}: it is closed; open it again.") from error
            raise StateError(f"Cannot use {what}: {error}; {_NEXT.get(code, 'look at the file')}.") from error

    def _damaged(self, reason: object) -> StateError:
        """Keep a copy, and say so; who only looks leaves nothing behind."""
        assert self.path is not None
        if self._is_read_only:
            return StateError(f"{self.path} is damaged ({reason}), so it cannot be read.")
        try:
            kept = f"a copy is kept at {_keep_copy(self.path)}"
        except OSError as error:
            kept = f"no copy could be made ({error.strerror or error})"
        return StateError(
            f"{self.path} is damaged ({reason}), so it is not used; {kept}. Move it away to begin anew, "
            "or try `sqlite3 FILE .recover` on the copy."
        )


def _look_at(path: Path, *, is_shared: bool) -> sqlite3.Connection:
    """A connection that may not write.

    Args:
        path: the file.
        is_shared: whether another process may begin to write the file. SQLite then needs a log and its index beside it,
            which stay behind; without them what is read would be wrong.
    """
    where, log = f"{path.absolute().as_uri()}?mode=ro", path.with_name(f"{path.name}-wal")
    if not is_shared and not log.exists():
        return _connect(f"{where}&immutable=1")
    connection = _connect(where)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        connection.close()
        # Where there is no room or right for a log, nobody else can write one.
        if isinstance(error, sqlite3.OperationalError) and is_shared and not (log.exists() and log.stat().st_size):
            return _connect(f"{where}&immutable=1")
        raise
    return connection


def _connect(where: Path | str) -> sqlite3.Connection:
    """A connection to a path or URI, whose transactions are begun and ended by us."""
    return sqlite3.connect(where, uri=isinstance(where, str), isolation_level=None, check_same_thread=False)


def _keep_copy(path: Path) -> Path:
    """Copy a file and its log beside it, once: a copy that equals it is taken instead of another one."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        if filecmp.cmp(path, copy, shallow=False):
            return copy
        number += 1
    for end in ("", "-wal"):
        source = path.with_name(path.name + end)
        if source.exists():
            target = copy.with_name(copy.name + end)
            with source.open("rb") as data, os.fdopen(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
                shutil.copyfileobj(data, file)
    return copy
