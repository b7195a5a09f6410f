"""Named sessions: held by one process, private, listed whatever state they are in, and carried in one file."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chats import CHATML, talker
from streamllm import Chat, SamplingConfig
from streamllm import archive as archive_module
from streamllm.archive import export_session, import_session
from streamllm.console import unwinding
from streamllm.errors import BusyError, ConfigError, StateError, TakenError
from streamllm.hold import LOCK, PID, Hold, holder_of
from streamllm.sessions import (
    Session,
    check_name,
    delete_session,
    hidden,
    list_sessions,
    read_transcript,
    sessions_folder,
)
from streamllm.transcript import Transcript
from streamllm.transcript_lines import dump, load
from test_command import run

pytestmark = pytest.mark.usefixtures("no_settings")

BEGAN = 1_795_490_100.0

HOLDER = """
import sys
from streamllm.sessions import Session

with Session(sys.argv[1]) as session:
    print("held", flush=True)
    sys.stdin.read()
"""
"""A process that holds a session until its standard input ends."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_settings: None) -> Path:
    """Where sessions lie, for this test alone."""
    monkeypatch.setenv("STREAMLLM_SESSIONS", str(tmp_path / "data" / "sessions"))
    return tmp_path / "data" / "sessions"


def lines(turns: int, reply: str = "Fine, and you?", passages: int = 1) -> Iterator[bytes]:
    """A transcript of so many turns, written by hand."""
    for number in range(1, turns + 1):
        began = BEGAN + 60 * number
        turn = {"id": number, "number": number, "preface": "", "finish": "end", "end_id": 2}
        yield encoded("turn", **turn, began=began, ended=began + 5, prompt_ids=[1, 7, 7])
        yield encoded("passage", role="user", text=f"How are you, for the {number}th time?", stop=3, ids=[])
        for passage in range(passages):
            yield encoded("passage", role="assistant", text=reply, stop=5 + 2 * passage, ids=[8, 9])


def encoded(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, **fields}).encode() + b"\n"


def make(name: str, turns: int = 2, **settings: Any) -> Path:
    """A session with some turns, let go of; its folder."""
    with Session(name) as session:
        load(session.transcript, lines(turns), "lines")
        for key, value in settings.items():
            session.transcript.put(key, value)
        return session.path


@contextmanager
def held(name: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds a session."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, name], env=environment, text=True, **pipes) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def modes(folder: Path) -> dict[str, int]:
    """The permissions of everything in a folder, and of the folder."""
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}


def everything(folder: Path) -> dict[str, bytes]:
    """All files, but what SQLite keeps beside its own."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- names


BAD_NAMES = (
    "",
    ".",
    "..",
    "../work",
    "a/b",
    "/work",
    "a\\b",
    "-work",
    ".work",
    "a b",
    "a\n",
    "a\0b",
    "ä",
    "~",
    "a" * 65,
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_elsewhere_is_refused_everywhere_in_one_sentence(
    name: str, tmp_path: Path, folder: Path
) -> None:
    """Reference: by hand; nothing is made, wherever the name comes from."""
    make("work")
    export_session("work", tmp_path / "work.zip")
    before = modes(tmp_path)
    tries: list[Callable[[], object]] = [
        lambda: Session(name),
        lambda: Session(name, create=False),
        lambda: read_transcript(name),
        lambda: delete_session(name),
        lambda: export_session(name, tmp_path / "other.zip"),
        lambda: import_session(tmp_path / "work.zip", name),
    ]
    for attempt in tries:
        with pytest.raises(ConfigError, match=r"A session cannot be called .*; take at most 64") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert modes(tmp_path) == before


@settings(deadline=None)
@given(st.text(alphabet="aZ09._-/\\ \0\n\u00e9:", max_size=66))
def test_a_name_that_is_taken_is_that_of_a_folder_right_there(name: str) -> None:
    """Reference: what pathlib makes of it."""
    try:
        check_name(name)
    except ConfigError:
        return
    assert (Path("folder") / name).parts == ("folder", name)
    assert os.path.normpath(f"folder/{name}") == f"folder/{name}"
    assert name.isascii()
    assert len(name.encode()) <= 64


def test_the_folder_is_the_users_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reference: the rules of the XDG folders."""
    assert sessions_folder() == tmp_path / "data" / "sessions"
    monkeypatch.setenv("STREAMLLM_SESSIONS", "~/talks")
    assert sessions_folder() == Path.home() / "talks"
    for nothing in (
        lambda: monkeypatch.setenv("STREAMLLM_SESSIONS", ""),
        lambda: monkeypatch.delenv("STREAMLLM_SESSIONS"),
    ):
        nothing()
        assert sessions_folder().parts[-2:] == ("streamllm", "sessions")


# ---- one session


def test_what_was_said_in_a_session_is_there_again() -> None:
    """Reference: what was put in."""
    with Session("work") as session:
        assert session.is_new
        session.transcript.put("system", "Be kind.")
        session.transcript.begin("Hello", prompt_ids=[1, 2], count=len)
        session.transcript.write("Hi", [3])
        session.transcript.end("end")
    with Session("work", create=False) as session:
        assert not session.is_new
        assert session.transcript.settings() == {"system": "Be kind."}
        last = session.transcript.last()
        assert last
        assert (last.user, last.reply, session.transcript.tokens()) == ("Hello", "Hi", 3)
        assert session.state == session.path / "state.stream"
        session.close()
    session.close()


def test_a_session_that_is_not_there_is_not_made_unless_that_is_wanted(folder: Path) -> None:
    """Reference: by hand."""
    with pytest.raises(StateError, match=r"There is no session 'work' in .*sessions; streamllm sessions list shows"):
        Session("work", create=False)
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["empty", "missing"])
def test_a_session_that_has_lost_its_transcript_does_not_begin_anew(damage: str, folder: Path) -> None:
    """Reference: the saved stream, byte for byte."""
    with Session("work") as session:
        session.transcript.put("system", "Be kind.")
        session.state.write_bytes(b"a stream")
    file = folder / "work" / "transcript.db"
    file.unlink()
    if damage == "empty":
        file.touch()
    for create in (True, False):
        with pytest.raises(StateError, match=rf"Session 'work' has no transcript: .*transcript.db is {damage}; put it"):
            Session("work", create=create)
    assert (folder / "work" / "state.stream").read_bytes() == b"a stream"
    delete_session("work")


def test_a_session_that_was_never_begun_is_new_still(folder: Path) -> None:
    """Reference: what a process leaves that is killed, or has no room, while it makes a session."""
    with Session("work"):
        pass
    with Session("work") as session:
        assert session.is_new
    (folder / "work" / "transcript.db").write_bytes(b"")
    with Session("work") as session:
        assert session.is_new


def test_a_folder_of_something_else_is_neither_used_nor_listed_nor_deleted(folder: Path) -> None:
    """Reference: its files, byte for byte."""
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(StateError, match="photos is a folder of something else; take another name"):
        Session("photos")
    with pytest.raises(StateError, match="There is no session 'photos'"):
        delete_session("photos")
    assert list(list_sessions()) == []
    assert everything(folder) == {"photos/cat.jpg": b"cat"}


@pytest.mark.parametrize("umask", [0, 0o022])
def test_all_files_are_their_owners_alone_whatever_the_umask(umask: int, folder: Path, tmp_path: Path) -> None:
    """Reference: folders 0700, files 0600, those of SQLite and those above the sessions too."""
    before = os.umask(umask)
    try:
        with Session("work") as session:
            load(session.transcript, lines(2), "lines")
            seen = modes(folder.parent)
            session.state.touch(mode=0o600)
        export_session("work", tmp_path / "work.zip")
        import_session(tmp_path / "work.zip", "copy")
        seen |= modes(folder.parent)
        seen["work.zip"] = (tmp_path / "work.zip").stat().st_mode & 0o777
    finally:
        os.umask(before)
    folders = {name for name, mode in seen.items() if (folder.parent / name).is_dir()}
    assert {"sessions/work/transcript.db-wal", "sessions/work/transcript.db-shm", "sessions/work/holder.pid"} <= set(
        seen
    )
    assert {seen[name] for name in folders} == {0o700}
    assert {seen[name] for name in seen.keys() - folders} == {0o600}


# ---- two processes


def test_the_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    """Reference: a real process, which nothing is changed for by list and show."""
    make("work")
    with held("work") as process:
        sentence = f"Session 'work' is in use by process {process.pid}; "
        for attempt in (
            lambda: Session("work"),
            lambda: delete_session("work"),
            lambda: export_session("work", tmp_path / "work.zip"),
        ):
            with pytest.raises(BusyError, match=re.escape(sentence)):
                attempt()
        assert run("sessions", "delete", "work", "--yes")[::2] == (
            1,
            f"streamllm: {sentence}leave it there, or take another one here.",
        )
        assert [info.pid for info in list_sessions()] == [process.pid]
        assert f"in use by process {process.pid}" in run("sessions", "list")[1]
        assert "How are you, for the 2th time?" in run("sessions", "show", "work")[1]
        assert not (tmp_path / "work.zip").exists()
        process.communicate()
        assert process.returncode == 0
    with Session("work") as session:
        assert session.transcript.count() == 2


def test_what_kill_leaves_behind_does_no_harm() -> None:
    """Reference: the pid of a process that lives, this one, in a file that the killed one left."""
    make("work")
    with held("work") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    path = sessions_folder() / "work"
    assert (path / PID).read_text() == str(process.pid)
    (path / PID).write_text(str(os.getpid()))
    assert holder_of(path) is None
    assert [info.pid for info in list_sessions()] == [None]
    with Session("work") as session:
        assert (path / PID).read_text() == str(os.getpid())
        assert session.transcript.count() == 2
    assert not (path / PID).exists()


def test_a_session_that_this_process_holds_is_refused_as_well() -> None:
    """Reference: our own pid; a look at it does not let go of it."""
    with Session("work") as session:
        for _ in range(2):
            with pytest.raises(BusyError, match=f"is in use by process {os.getpid()};"):
                Session("work")
            assert [info.pid for info in list_sessions()] == [os.getpid()]
        session.transcript.put("system", "Still here.")


def test_only_one_of_many_processes_gets_a_new_session() -> None:
    """Reference: all begin at once, and each tells what it got."""
    code = HOLDER.replace(
        "with Session",
        "from streamllm.errors import BusyError\nprint('ready', flush=True)\nsys.stdin.readline()\n\nwith Session",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    rivals = [
        subprocess.Popen([sys.executable, "-c", code, "work"], env=environment, text=True, **pipes) for _ in range(4)
    ]
    try:
        for rival in rivals:
            assert rival.stdout
            assert rival.stdout.readline() == "ready\n"
        for rival in rivals:
            assert rival.stdin
            rival.stdin.write("\n")
            rival.stdin.flush()
        deadline = time.monotonic() + 300
        while sum(rival.poll() is None for rival in rivals) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        said = [rival.communicate() for rival in rivals]
    finally:
        for rival in rivals:
            rival.kill()
    assert sorted(out for out, _ in said) == ["", "", "", "held\n"]
    assert sum("BusyError" in error for _, error in said) == 3


def test_a_session_that_is_made_elsewhere_just_now_is_no_folder_of_something_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: a lock that appears at the worst moment, right after it was looked for."""

    def look(path: Path) -> bool:
        found = (path / LOCK).is_file()
        (path / LOCK).touch()
        return found

    monkeypatch.setattr("streamllm.sessions._is_session", look)
    with Session("work") as session:
        assert session.is_new


# ---- what there is


def test_one_damaged_session_does_not_hide_the_others(folder: Path) -> None:
    """Reference: by hand. Looking leaves nothing behind."""
    make("a", model="Qwen/Qwen3-0.6B")
    for name, damage in {"b": b"no database at all", "d": None, "e": b""}.items():
        file = make(name) / "transcript.db"
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
    whole = (make("c") / "transcript.db").read_bytes()
    (folder / "c" / "transcript.db").write_bytes(whole[: len(whole) // 2])
    make("f", model="stories260K", turns=0)
    before = everything(folder)
    found = {info.name: info for info in list_sessions()}
    assert everything(folder) == before
    assert list(found) == ["a", "b", "c", "d", "e", "f"]
    assert {name for name, info in found.items() if info.damage} == {"b", "c", "d", "e"}
    assert (found["a"].turns, found["a"].tokens, found["a"].used) == (2, 10, BEGAN + 125)
    assert (found["f"].turns, found["f"].tokens, found["f"].used) == (0, 0, None)
    code, out, err = run("sessions", "list")
    assert (code, err, len(out.splitlines())) == (0, "", 7)
    code, out, _ = run("sessions", "list", "--json")
    assert [json.loads(line)["damage"] is None for line in out.splitlines()] == [True, False, False, False, False, True]
    for name in found:
        delete_session(name)
    assert list(folder.iterdir()) == []


def test_a_session_of_a_newer_version_says_so(folder: Path) -> None:
    """Reference: a format that is one more than ours."""
    path = make("work")
    with closing(Transcript(path / "transcript.db")) as transcript, transcript.database.transaction() as connection:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {found + 1}")
    (info,) = list_sessions()
    assert f"has format {found + 1}, this version reads format {found}" in str(info.damage)
    with pytest.raises(StateError, match="use the version of streamllm that wrote it") as caught:
        Session("work")
    Hold(path, "it").release()  # it was let go of, though the error still knows the session
    assert caught.tb


def test_no_sessions_are_nothing_to_print(folder: Path) -> None:
    assert run("sessions", "list") == (0, "", "")
    assert run("sessions", "list", "--json") == (0, "", "")
    folder.parent.mkdir()
    folder.write_text("")
    code, _, err = run("sessions", "list")
    said = f"streamllm: The folder of sessions cannot be used: {folder}: Not a directory; name another one by "
    assert (code, err) == (1, said + "STREAMLLM_SESSIONS.")


def test_the_settings_file_is_heard(tmp_path: Path) -> None:
    """Reference: the flag."""
    make("work")
    flagged = run("sessions", "list", "--json")
    (tmp_path / "config.toml").write_text("json = true\nwindow = 60\n")
    assert run("sessions", "list") == flagged
    assert json.loads(flagged[1])["name"] == "work"


def test_show_prints_the_settings_and_the_last_turns_or_all_of_them() -> None:
    """Reference: the turns as they were put in."""
    make(
        "work",
        turns=5,
        model="stories260K",
        cache={"sinks": 4, "window": 60, "reread": None},
        system="Be kind.\nBe brief.",
        template={},
        spelling=[1, 2],
    )
    code, out, err = run("sessions", "show", "work")
    assert (code, err) == (0, "")
    assert re.findall(r"^turn (\d)", out, re.M) == ["3", "4", "5"]
    assert ">>> How are you, for the 5th time?\nFine, and you?\n" in out
    assert "cache        sinks 4, window 60\n" in out
    assert not {"template", "spelling"} & set(out.split())
    assert "system       Be kind.\n             Be brief.\n" in out
    assert re.findall(r"^turn (\d)", run("sessions", "show", "work", "--last", "1")[1], re.M) == ["5"]
    assert "turn 5" not in run("sessions", "show", "work", "--last", "0")[1]
    assert re.findall(r"^turn (\d)", run("sessions", "show", "work", "--all")[1], re.M) == list("12345")
    code, out, _ = run("sessions", "show", "work", "--all", "--json")
    first, *turns = map(json.loads, out.splitlines())
    assert (first["type"], first["turns"], first["tokens"]) == ("session", 5, 25)
    assert first["settings"]["system"] == "Be kind.\nBe brief."
    assert first["settings"]["spelling"] == [1, 2]
    assert [(turn["type"], turn["number"], turn["reply"]) for turn in turns] == [
        ("turn", number, "Fine, and you?") for number in range(1, 6)
    ]
    code, _, err = run("sessions", "show", "work", "--all", "--last", "2")
    assert (code, err) == (2, "streamllm: Both --last and --all are given; give one of them.")
    assert run("sessions", "show", "work", "--last", "-1")[0] == 2


def on_a_terminal(*arguments: str, typed: str = "") -> tuple[int, str]:
    """Run the command with a terminal for everything: exit code, and what is on the screen."""
    keyboard, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "streamllm", *arguments]
    with subprocess.Popen(command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.write(keyboard, typed.encode())
        code = process.wait(timeout=60)
    os.set_blocking(keyboard, False)
    screen = os.read(keyboard, 65536).decode()
    os.close(keyboard)
    os.close(terminal)
    return code, screen


def test_text_from_elsewhere_does_nothing_to_a_terminal() -> None:
    """Reference: sequences that clear the screen; a pipe gets them as they are."""
    with Session("work") as session:
        load(session.transcript, lines(1, reply="\x1b[2Jgone \x9b2J"), "lines")
    assert "\x1b[2Jgone \x9b2J" in run("sessions", "show", "work")[1]
    code, screen = on_a_terminal("sessions", "show", "work")
    assert code == 0
    assert "\ufffd[2Jgone \ufffd2J" in screen
    assert not {"\x1b", "\x9b"} & set(screen)


def test_delete_asks_on_a_terminal_and_wants_yes_elsewhere(folder: Path) -> None:
    """Reference: by hand."""
    make("work")
    assert run("sessions", "delete", "work")[::2] == (
        2,
        "streamllm: Session 'work' would be gone for good; say --yes to delete it.",
    )
    code, screen = on_a_terminal("sessions", "delete", "work", typed="n\n")
    assert code == 1
    assert "Delete session work, with all that was said in it? [y/N]" in screen
    assert (folder / "work").exists()
    assert on_a_terminal("sessions", "delete", "work", typed="y\n")[0] == 0
    assert list(folder.iterdir()) == []
    assert run("sessions", "delete", "work", "--yes")[0] == 1


def test_what_a_process_left_when_it_died_is_taken_away_by_the_next_one(folder: Path) -> None:
    """Reference: what another process is still making, and what is not ours, stays."""
    make("work")
    left, busy, other = hidden(folder), hidden(folder), folder / ".ssh"
    for path in (left, busy, other):
        path.mkdir()
        (path / "some").write_text("text")
    (left / LOCK).touch()
    hold = Hold(busy, "it")
    delete_session("work")
    assert sorted(folder.iterdir()) == sorted([busy, other])
    hold.release()


@pytest.mark.parametrize("create", [True, False])
def test_what_a_save_left_that_was_killed_is_gone_when_the_session_is_held_again(create: bool, folder: Path) -> None:
    """Reference: a process that is killed within a save, twice; other files stay, also while somebody only looks."""
    path = make("work")
    code = (
        "import os, pathlib, sys\nfrom streamllm.atomic import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as part:\n    part.write_bytes(bytes(1000)); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", code, path / "state.stream"], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL
    for name in (".other.part", "state.stream", ".state.stream.note"):
        (path / name).write_text("mine")
    before = {file.name for file in path.iterdir()}
    parts = {name for name in before if re.fullmatch(r"\.state\.stream\..+\.part", name)}
    assert len(parts) == 2
    assert [info.name for info in list_sessions()] == ["work"]
    assert {file.name for file in path.iterdir()} >= parts
    Session("work", create=create).close()
    assert {file.name for file in path.iterdir()} == before - parts


def test_a_session_that_is_a_link_is_not_deleted(tmp_path: Path, folder: Path) -> None:
    """Reference: all files and the link as they were; the link is a session otherwise."""
    path = make("work")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = everything(tmp_path)
    with pytest.raises(StateError, match=rf"^Session 'work' is a link to {tmp_path / 'elsewhere'}, and is not deleted"):
        delete_session("work")
    assert everything(tmp_path) == before
    assert path.is_symlink()
    assert [info.turns for info in list_sessions()] == [2]


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs root to mount a tiny disk")
def test_a_session_can_be_seen_and_deleted_on_a_full_disk(folder: Path) -> None:
    """Reference: a file system of 256 KiB without a free byte."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = make("work")
        with suppress(OSError), (path / "state.stream").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(StateError, match=r"No space left|is full|disk"):
            export_session("work", folder / "work.zip")
        assert [(info.name, info.turns) for info in list_sessions()] == [("work", 2)]
        delete_session("work")
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- one file


def records(name: str) -> list[str]:
    with closing(read_transcript(name)) as transcript:
        return list(dump(transcript))


def test_a_session_comes_back_from_its_file_as_it_was(tmp_path: Path, folder: Path) -> None:
    """Reference: every row of the first session, its settings and its stream, byte for byte."""
    said = {"model": "stories260K", "system": "Be kind ☀", "cache": {"sinks": 4}, "created": BEGAN}
    with Session("work") as session:
        transcript = session.transcript
        for key, value in said.items():
            transcript.put(key, value)
        for number, word in enumerate(("apple", "pear", "plum")):
            transcript.begin(f"What is a {word}?", prompt_ids=[1, number], count=len, preface="earlier")
            for token in range(200):
                transcript.write(f" {word} {token}.", [token])
            transcript.end("stop", 2)
            if word == "pear":
                transcript.undo()
        session.state.write_bytes(os.urandom(5000))
    code, out, err = run("sessions", "export", "work", str(tmp_path / "a.zip"))
    assert (code, out, err) == (0, f"{tmp_path / 'a.zip'}: 2 turns\n", "")
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert file.namelist() == ["session.json", "transcript.jsonl", "state.stream"]
        kinds = [json.loads(line)["type"] for line in file.read("transcript.jsonl").splitlines()]
        assert kinds.count("turn") == 3  # the one that was taken back, too
    assert run("sessions", "import", str(tmp_path / "a.zip"), "--name", "copy") == (0, "copy: 2 turns\n", "")
    assert records("copy") == records("work")
    assert (folder / "copy" / "state.stream").read_bytes() == (folder / "work" / "state.stream").read_bytes()
    with Session("copy", create=False) as copy:
        found = copy.transcript
        assert found.settings() == said
        assert found.prompt_ids(2) == [1, 2]
        assert found.reply_ids(2) == list(range(200))
        for word, is_found in {"apple": True, "plum": True, "pear": False}.items():
            assert bool(found.words.best([f'"{word}"'], 10**6, 1)) is is_found
        found.begin("And?", prompt_ids=[5], count=len)
        found.write("So.", [6])
        found.end("stop")
        assert [turn.number for turn in found.turns()] == [1, 2, 3]
        assert [turn.reply for turn in found.turns(3)] == ["So."]
        found.undo(3)
        assert not found.words.best(['"apple" OR "so"'], 10**6, 1)


def test_a_session_comes_back_under_its_own_name_and_never_over_another(tmp_path: Path, folder: Path) -> None:
    """Reference: by hand; an export over an older one replaces it."""
    make("work", turns=1)
    for turns in (1, 3):
        delete_session("work")
        make("work", turns=turns)
        assert export_session("work", tmp_path / "work.zip") == turns
    before = everything(folder)
    code, _, err = run("sessions", "import", str(tmp_path / "work.zip"))
    assert (code, err) == (
        2,
        "streamllm: There is a session 'work' already; import it under another --name, or delete that one.",
    )
    assert everything(folder) == before
    delete_session("work")
    assert run("sessions", "import", str(tmp_path / "work.zip"), "--json")[:2] == (0, '{"name": "work", "turns": 3}\n')
    assert len(records("work")) == 9


def test_a_session_that_appears_while_another_is_imported_stays(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: its turns."""
    make("work", turns=1)
    export_session("work", tmp_path / "work.zip")

    def slow(*arguments: Any) -> None:
        make("other", turns=2)
        load(*arguments)

    monkeypatch.setattr(archive_module, "load", slow)
    with pytest.raises(TakenError, match="There is a session 'other' already"):
        import_session(tmp_path / "work.zip", "other")
    assert len(records("other")) == 6
    assert sorted(path.name for path in folder.iterdir()) == ["other", "work"]


def test_export_import_and_show_take_constant_memory(tmp_path: Path) -> None:
    """Reference: a transcript that is ten times as long, by its turns or (but for show) by one reply."""

    def peak(turns: int, passages: int) -> int:
        name = f"of-{turns}-{passages}"
        with Session(name) as session:
            load(session.transcript, lines(turns, reply="x" * 600, passages=passages), "lines")
        tracemalloc.start()
        try:
            export_session(name, tmp_path / "a.zip")
            import_session(tmp_path / "a.zip", f"{name}-copy")
            if passages == 1:
                with closing(read_transcript(name)) as transcript:
                    for _ in transcript.turns():
                        pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short = peak(100, 1)
    assert peak(1000, 1) < short + 100_000
    assert peak(1, 1000) < short + 600_000


HEADER = {"format": 1, "name": "work", "settings": {}}
TURN = {
    "id": 1,
    "number": 1,
    "preface": "",
    "finish": None,
    "end_id": None,
    "began": 1.0,
    "ended": None,
    "prompt_ids": [],
}
PASSAGE = {"role": "user", "text": "Hi", "stop": 1, "ids": []}


def packed(members: dict[str, bytes | str], file: Path) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file


WHOLE: dict[str, bytes | str] = {"session.json": json.dumps(HEADER), "transcript.jsonl": encoded("turn", **TURN)}

STRANGE: dict[str, dict[str, bytes | str]] = {
    "is no exported session; it holds session.json.": {"session.json": "{}"},
    "holds nothing": {},
    "holds ../evil, ": {**WHOLE, "../evil": "x"},
    "holds /evil, ": {**WHOLE, "/evil": "x"},
    "holds evil, ": {**WHOLE, "evil": "x"},
    "format 2, this version reads format 1": {**WHOLE, "session.json": json.dumps({**HEADER, "format": 2})},
    "format None": {**WHOLE, "session.json": "[]"},
    "lacks the name": {**WHOLE, "session.json": json.dumps({**HEADER, "name": 3})},
    "or the settings": {**WHOLE, "session.json": json.dumps({**HEADER, "settings": []})},
    "is damaged or no exported session": {**WHOLE, "session.json": "{"},
    "unpacks to more": {**WHOLE, "session.json": json.dumps({**HEADER, "settings": {"a": "x" * 2**20}})},
    "cannot be called '../w'": {**WHOLE, "session.json": json.dumps({**HEADER, "name": "../w"})},
}


@pytest.mark.parametrize("said", STRANGE)
def test_a_strange_file_is_refused_in_one_sentence_and_nothing_is_made(said: str, tmp_path: Path, folder: Path) -> None:
    """Reference: by hand."""
    file = packed(STRANGE[said], tmp_path / "a.zip")
    with pytest.raises((StateError, ConfigError), match=re.escape(said)) as caught:
        import_session(file)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
    assert [path.name for path in tmp_path.rglob("*evil*")] == []


STRANGE_SETTINGS: dict[str, Any] = {
    "'evil': there is no setting of that name": {"evil": 1},
    "'cache': it must be an object, not [1]": {"cache": [1]},
    "'cache': it must be an object, not None": {"cache": None},
    "unexpected keyword argument 'nope'": {"cache": {"sinks": 1, "nope": 2}},
    "'cache': sinks must be a whole number": {"cache": {"sinks": "4"}},
    "'cache': reread must be True, False or None, you gave 'yes'": {"cache": {"reread": "yes"}},
    "'cache': window must be a number of at most": {"cache": {"window": 10**30}},
    "'template': it must be an object, not [1]": {"template": [1]},
    "'template': it must not bring a chat_template": {"template": {"chat_template": "{{ messages }}"}},
    "'template': its values must be text": {"template": {"tools": [{}]}},
    "'system': it must be text, not 5": {"system": 5},
    "'system': 'utf-8' codec can't encode": {"system": "\ud800"},
    "'model': it must be text, not []": {"model": []},
    "'fingerprint': its values must be text": {"fingerprint": {"digest": 1}},
    "'created': it must be a time, not nan": {"created": float("nan")},
    "'created': it must be a time, not 1e+300": {"created": 1e300},
    "'created': it must be a time, not True": {"created": True},
    "'embeddings': it must be a whole number": {"embeddings": "x"},
    "'named': it must be true or false": {"named": 1},
    "'recall': it must be auto or off": {"recall": ["auto"]},
    "'title': it must be text": {"title": {}},
    "'sampling': '<' not supported": {"sampling": {"top_p": "x"}},
    "'sampling': temperature must be a number": {"sampling": {"temperature": None}},
    "'sampling': seed must be a whole number": {"sampling": {"seed": 1.5}},
    "'sampling': presence_penalty must be a number from": {"sampling": {"presence_penalty": 2 * 10**9}},
    "'sampling': frequency_penalty must be a number from": {"sampling": {"frequency_penalty": "2"}},
    "'sampling': logit_bias must be pairs": {"sampling": {"logit_bias": {"5": 1}}},
    "'sampling': the bias of id 5 in logit_bias": {"sampling": {"logit_bias": [[5, 1e300]]}},
    "'sampling': repetition_window must be a number of at most": {"sampling": {"repetition_window": 2**40}},
}


@pytest.mark.parametrize("said", STRANGE_SETTINGS)
def test_a_strange_setting_is_refused_in_one_sentence_and_nothing_is_made(
    said: str, tmp_path: Path, folder: Path
) -> None:
    """Reference: by hand."""
    header = json.dumps({**HEADER, "settings": {"system": "Be kind.", **STRANGE_SETTINGS[said]}})
    file = packed({**WHOLE, "session.json": header}, tmp_path / "a.zip")
    with pytest.raises(StateError, match=re.escape(said)) as caught:
        import_session(file)
    assert str(caught.value).startswith(f"A setting in {file} cannot be used, ")
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_all_that_a_conversation_keeps_is_let_in(tmp_path: Path, folder: Path) -> None:
    """Reference: the settings of a conversation with all options and an index of meanings, which goes on."""
    model, tokenizer = talker("{{ mood or '' }}" + CHATML)
    options: dict[str, Any] = {
        "template_options": {"mood": "calm"},
        "system": "Be kind.",
        "window": 300,
        "kv_dtype": "int8",
    }
    sampling = SamplingConfig(seed=3, presence_penalty=0.5, frequency_penalty=-1, logit_bias=((5, 2.5), (6, -math.inf)))
    with Chat(model, tokenizer, session="work", sampling=sampling, max_tokens=4, **options) as chat:
        chat.send("Hello").text()
        chat.transcript.put("model", "stories260K")
        chat.transcript.put("embeddings", 2**32 - 1)
        chat.transcript.put("sampling", asdict(chat.sampling))
        kept = chat.transcript.settings()
    assert set(kept) >= {"cache", "created", "fingerprint", "system", "template"}
    export_session("work", tmp_path / "a.zip")
    import_session(tmp_path / "a.zip", "copy")
    with Chat(model, tokenizer, session="copy", max_tokens=4) as chat:
        assert chat.transcript.settings() == kept
        assert chat.sampling == sampling
        assert chat.notes == []
        assert chat.send("And?").text()


STRANGE_LINES = {
    "no_json": b"{",
    "no_object": b"[]",
    "no_type": b"{}",
    "unknown_type": encoded("reply", **PASSAGE),
    "type_that_cannot_be_looked_up": b'{"type": []}',
    "passage_without_a_turn": encoded("passage", **PASSAGE),
    "number_too_high": encoded("turn", **TURN | {"number": 2}),
    "id_below_one": encoded("turn", **TURN | {"id": 0}),
    "same_id_twice": encoded("turn", **TURN) + encoded("turn", **TURN | {"number": 2}),
    "truth_for_a_number": encoded("turn", **TURN | {"number": True}),
    "text_for_ids": encoded("turn", **TURN | {"prompt_ids": "12"}),
    "negative_id": encoded("turn", **TURN | {"prompt_ids": [-1]}),
    "large_id": encoded("turn", **TURN | {"prompt_ids": [2**31]}),
    "large_end_id": encoded("turn", **TURN | {"end_id": 2**70}),
    "no_time": encoded("turn", **TURN | {"began": float("nan")}),
    "late": encoded("turn", **TURN | {"began": 1e300}),
    "field_too_much": encoded("turn", **TURN | {"live": 1}),
    "unknown_role": encoded("turn", **TURN) + encoded("passage", **PASSAGE | {"role": "system"}),
    "half_a_character": encoded("turn", **TURN) + encoded("passage", **PASSAGE | {"text": "\ud800"}),
    "no_utf8": encoded("turn", **TURN) + b'{"type": "passage", "text": "\xff"}',
    "deep": b"[" * 10**5,
    "many_digits": b"1" * 10**5,
}


@pytest.mark.parametrize("line", STRANGE_LINES.values(), ids=STRANGE_LINES)
def test_a_strange_line_is_refused_in_one_sentence_and_nothing_is_made(
    line: bytes, tmp_path: Path, folder: Path
) -> None:
    """Reference: by hand; it is the last line that is wrong."""
    file = packed({**WHOLE, "transcript.jsonl": line}, tmp_path / "a.zip")
    number = line.rstrip().count(b"\n") + 1
    said = rf"Line {number} of transcript.jsonl in .*a\.zip is damaged \(.*\); export the session again"
    with pytest.raises(StateError, match=said) as caught:
        import_session(file)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: bounds that are lower than what is there."""
    make("work", turns=50)
    export_session("work", tmp_path / "a.zip")
    monkeypatch.setattr(archive_module, "TOTAL_BYTES", 5000)
    with pytest.raises(StateError, match="unpacks to more than a session may have"):
        import_session(tmp_path / "a.zip", "copy")
    monkeypatch.undo()
    monkeypatch.setenv("STREAMLLM_SESSIONS", str(folder))
    monkeypatch.setattr(archive_module, "LINE_BYTES", 50)
    with pytest.raises(StateError, match="a line has more than 50 bytes"):
        import_session(tmp_path / "a.zip", "copy")
    assert [path.name for path in folder.iterdir()] == ["work"]


def test_a_file_that_is_missing_encrypted_or_twice_the_same_is_refused(tmp_path: Path, folder: Path) -> None:
    """Reference: by hand."""
    code, _, err = run("sessions", "import", str(tmp_path / "none.zip"))
    assert (code, err) == (
        1,
        f"streamllm: {tmp_path / 'none.zip'} cannot be imported: {tmp_path / 'none.zip'}: No such file or directory.",
    )
    data = bytearray(packed(WHOLE, tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(StateError, match="is encrypted; unpack it"):
        import_session(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in ("session.json", "transcript.jsonl"):
            archive.writestr(name, WHOLE[name])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("transcript.jsonl", "")
    with pytest.raises(StateError, match=r"holds session\.json, transcript\.jsonl, transcript\.jsonl\."):
        import_session(tmp_path / "b.zip")
    assert not folder.exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_the_same_session_or_none(data: st.DataObject, tmp_path: Path, folder: Path) -> None:
    """Reference: the session as it was; bytes of its file are changed, or its end is cut off."""
    file, whole = tmp_path / "a.zip", tmp_path / "whole.zip"
    if not whole.exists():
        with Session("work") as session:
            load(session.transcript, lines(3), "lines")
            session.state.write_bytes(b"state" * 100)
        export_session("work", whole)
    damaged = bytearray(whole.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    with suppress(StateError, ConfigError):
        import_session(file, "copy")
        assert records("copy") == records("work")
        delete_session("copy")
    assert [path.name for path in folder.iterdir()] == ["work"]


@pytest.mark.parametrize("place", ["transcript", "state"])
def test_nothing_is_left_of_an_import_for_which_there_is_no_room(
    place: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: a disk that is full, simulated; the same file is imported when there is room."""
    with Session("work") as session:
        session.state.write_bytes(b"state")
    export_session("work", tmp_path / "a.zip")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if place == "state":
            patch.setattr("streamllm.archive.shutil.copyfileobj", full)
        else:
            patch.setattr(archive_module, "load", full)
        with pytest.raises(StateError, match=r"a\.zip cannot be imported: .*No space left on device"):
            import_session(tmp_path / "a.zip", "copy")
    assert [path.name for path in folder.iterdir()] == ["work"]
    assert import_session(tmp_path / "a.zip", "copy") == "copy"


def test_an_export_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the older file, byte for byte; a signal that comes in the middle does the same."""
    make("work")
    file = tmp_path / "out" / "work.zip"
    with pytest.raises(
        StateError, match=r"cannot be written to .*work\.zip: No such file or directory; choose another"
    ):
        export_session("work", file)
    file.parent.mkdir()
    export_session("work", file)
    before = file.read_bytes()

    def interrupted(transcript: Transcript) -> Iterator[str]:
        yield "{}"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(archive_module, "dump", interrupted)
    with pytest.raises(SystemExit) as caught, unwinding():
        export_session("work", file)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
    with Session("work"):  # was let go of
        pass


def test_the_commands_load_neither_torch_nor_numpy() -> None:
    """Reference: a fresh process."""
    heavy = {"torch", "transformers", "numpy"}
    code = f"import sys, streamllm.cli_sessions; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the document


def test_the_document_shows_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: its console block, command by command, over the sessions that it shows."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "chat.md").read_text(encoding="utf-8")
    block = re.search(r"^## Sessions\n.*?^```console\n(.*?)^```", page, re.M | re.S)
    assert block
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    cache = {"sinks": 1, "window": 1020, "block": 64, "kv_dtype": "auto"}
    make("fox", 0, cache=cache, created=BEGAN, model="stories7M")
    make("notes", 0, model="Qwen/Qwen3-0.6B")
    with Session("fox") as session:
        said = (
            encoded("turn", **TURN | {"began": BEGAN, "ended": BEGAN + 5, "prompt_ids": [1] * 51}),
            encoded(
                "turn", **TURN | {"id": 2, "number": 2, "began": BEGAN + 60, "ended": BEGAN + 65, "prompt_ids": [1]}
            ),
            encoded("passage", **PASSAGE | {"text": "Once upon a time there was a little fox who\nfound a ball."}),
            encoded(
                "passage",
                role="assistant",
                text="The fox was very kind, and he wanted to stay outside in the sun.",
                stop=80,
                ids=[1] * 68,
            ),
        )
        load(session.transcript, said, "lines")
    try:
        shown = re.split(r"^\$ streamllm (.*)\n", block[1], flags=re.M)[1:]
        assert len(shown) == 8
        for command, printed in zip(shown[::2], shown[1::2], strict=True):
            assert (command, run(*command.split())) == (command, (0, printed, ""))
    finally:
        monkeypatch.undo()
        time.tzset()
