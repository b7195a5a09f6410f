"""A SQLite file of ours: private, whole or refused, and every error a sentence."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from streamllm import database as database_module
from streamllm.database import Database
from streamllm.errors import StateError

SCHEMA = ("CREATE TABLE things (id INTEGER PRIMARY KEY, text TEXT)",)


def opened(path: Path | None, format: int = 1) -> Database:
    return Database(path, application=77, format=format, schema=SCHEMA)


def fill(database: Database, rows: int) -> None:
    with database.transaction() as connection:
        connection.executemany("INSERT INTO things (text) VALUES (?)", [("x" * 500,)] * rows)


def delete_and_stop(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute("DELETE FROM things")
        raise KeyboardInterrupt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with 500 rows."""
    path = tmp_path / "a thing?#%.db"
    database = opened(path)
    fill(database, 500)
    database.close()
    return path


def test_every_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        database = opened(tmp_path / "a.db")
        fill(database, 3)
        database.copy_to(tmp_path / "b.db")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(old)
    assert modes == dict.fromkeys(["a.db", "a.db-wal", "a.db-shm", "b.db"], 0o600)


def test_what_was_committed_is_there_when_the_file_is_opened_again(path: Path) -> None:
    database = opened(path)
    assert database.row("SELECT count(*), max(id) FROM things") == (500, 500)
    assert database.rows("SELECT id FROM things WHERE id < ?", 3) == [(1,), (2,)]
    assert database.row("SELECT 1 WHERE 0") is None


def test_a_transaction_that_fails_changes_nothing(path: Path) -> None:
    database = opened(path)
    with pytest.raises(KeyboardInterrupt):
        delete_and_stop(database)
    assert database.row("SELECT count(*) FROM things") == (500,)
    fill(database, 1)
    assert database.row("SELECT count(*) FROM things") == (501,)


def test_a_temporary_database_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    database = opened(None)
    fill(database, 5000)
    assert database.row("SELECT count(*) FROM things") == (5000,)
    assert list(tmp_path.iterdir()) == []
    database.close()
    database.close()


def test_a_database_that_was_closed_says_so(path: Path) -> None:
    database = opened(path)
    database.close()
    with pytest.raises(StateError, match=r"Cannot use .*: it is closed; open it again\.$"):
        database.row("SELECT 1")
    with pytest.raises(StateError, match=r"it is closed"), database.transaction():
        pass


@pytest.mark.parametrize("damage", ["header", "middle", "cut", "log"])
def test_a_damaged_file_is_refused_and_one_copy_of_it_is_kept(path: Path, damage: str) -> None:
    """Reference: the bytes of the damaged file, before and after; opening it again makes no second copy."""
    data = bytearray(path.read_bytes())
    if damage in ("header", "log"):
        data[:64] = b"\0" * 64
    elif damage == "middle":
        middle = len(data) // 2 // 4096 * 4096
        data[middle : middle + 4096] = b"\xa5" * 4096
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    if damage == "log":
        path.with_name(path.name + "-wal").write_bytes(b"what was not written back")
    for _ in range(2):
        with pytest.raises(StateError, match=r"is damaged .*a copy is kept at .*\.damaged-1\. Move it away"):
            opened(path)
    copy = path.with_name(path.name + ".damaged-1")
    kept = {file.name for file in path.parent.iterdir() if ".damaged" in file.name}
    assert kept == {copy.name, f"{copy.name}-wal"} if damage == "log" else {copy.name}
    assert path.read_bytes() == copy.read_bytes() == data
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_another_damage_is_kept_beside_the_first(path: Path) -> None:
    for number in (1, 2):
        path.write_bytes(b"%d" % number * 9000)
        with pytest.raises(StateError, match=rf"damaged-{number}\."):
            opened(path)


def test_damage_that_opening_does_not_find_is_refused_where_it_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest files are not checked whole; here none is."""
    monkeypatch.setattr(database_module, "CHECKED_BYTES", 0)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = b"\xa5" * 4096
    path.write_bytes(data)
    database = opened(path)
    with pytest.raises(StateError, match=r"damaged-1"):
        database.rows("SELECT text FROM things")
    database.close()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA application_id = 78", "another program"),
        ("PRAGMA user_version = 2", "has format 2, this version reads format 1"),
    ],
)
def test_a_file_of_another_program_or_version_is_refused_and_left_alone(
    path: Path, statement: str, message: str
) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StateError, match=message):
        opened(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_empty_file_is_taken_as_a_new_one(tmp_path: Path) -> None:
    """As a process leaves it that was killed while it made the file."""
    path = tmp_path / "a.db"
    path.touch()
    assert opened(path).row("SELECT count(*) FROM things") == (0,)


def test_a_path_that_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"nowhere/a\.db: No such file or directory; choose a folder"):
        opened(tmp_path / "nowhere" / "a.db")
    with pytest.raises(StateError, match="is a folder"):
        opened(tmp_path)


def test_a_file_that_may_not_be_written_is_refused_when_it_is_written(
    path: Path,
) -> None:
    database = opened(path)
    database.rows("PRAGMA query_only = 1")
    with pytest.raises(StateError, match="readonly database; make the file and its folder writable"):
        fill(database, 1)


def test_a_database_that_cannot_be_opened_leaves_no_connection_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the connections that were made."""
    made = list[sqlite3.Connection]()

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        made.append(real(*args, **kwargs))
        return made[-1]

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(StateError, match="syntax error"):
        Database(path.with_name("new.db"), application=77, format=1, schema=["CREATE NOTHING"])
    with pytest.raises(StateError):
        opened(path, format=2)
    assert len(made) == 2
    for connection in made:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_a_copy_is_whole_and_never_replaces_a_file(path: Path, tmp_path: Path) -> None:
    database = opened(path)
    database.copy_to(tmp_path / "b.db")
    other = opened(None)
    database.copy_into(other)
    fill(database, 1)
    assert opened(tmp_path / "b.db").row("SELECT count(*) FROM things") == (500,)
    assert other.row("SELECT count(*) FROM things") == (500,)
    with pytest.raises(StateError, match=r"b\.db exists already"):
        database.copy_to(tmp_path / "b.db")
    with pytest.raises(StateError, match=r"Cannot copy to .*No such file"):
        database.copy_to(tmp_path / "nowhere" / "c.db")
    assert not [file.name for file in tmp_path.iterdir() if file.name.endswith(".part")]
