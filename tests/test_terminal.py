"""The chat prompt in a real terminal: keys, Ctrl-C, completion, several lines, ``$EDITOR``, the history file.

A program without a model (``fake_chat``) runs in a pseudo-terminal, and the keys are sent as a terminal sends them.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from streamllm.atomic import replacing
from streamllm.console import Signals

pexpect = pytest.importorskip("pexpect", reason="no pseudo-terminals here")

pytestmark = pytest.mark.usefixtures("foreground")

SECONDS = 60
"""A busy machine needs many times what a quiet one does."""

READY = "a message"
"""The placeholder: a line that was left shows none, so this is the next prompt."""


class Terminal:
    """The prompt in a terminal of 100 columns."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.history = folder / "state" / "chat_history"
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "fake_chat", *arguments],
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                "STREAMLLM_HISTORY": str(self.history),
                **environment,
            },
            encoding="utf-8",
            timeout=SECONDS,
            dimensions=(30, 100),
        )
        self.process.delaybeforesend = None
        self.see("ready")
        self.see(">>>")

    def keys(self, keys: str) -> None:
        self.process.send(keys)

    def see(self, text: str) -> str:
        """Wait for a text; what came before it."""
        self.process.expect_exact(text)
        return str(self.process.before)

    def leave(self) -> tuple[int, str]:
        """Wait for the end: exit status, and what came last."""
        self.process.expect(pexpect.EOF)
        last = str(self.process.before)
        self.process.close()
        return self.process.exitstatus, last


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def begin(*arguments: str, **environment: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments, **environment))
        return opened[-1]

    yield begin
    for terminal in opened:
        with suppress(OSError):  # one that has gone away
            terminal.process.close(force=True)


def test_ctrl_c_stops_the_reply_and_ctrl_d_leaves_and_nothing_is_lost(spawn: Any) -> None:
    """In the middle of a reply, at a begun line, and at an empty one."""
    terminal = spawn()
    terminal.keys("10000 words\r")
    terminal.see("word9 ")
    terminal.keys("\x03")
    terminal.see("stopped; /continue goes on")
    terminal.see(READY)
    terminal.keys("begun")
    terminal.see("begun")
    terminal.keys("\x03")
    assert "leaves" not in terminal.see(READY)
    terminal.keys("\x03")
    terminal.see("Ctrl-D or /bye leaves")
    terminal.see(READY)
    terminal.keys("1 word\r")
    terminal.see("word1")
    terminal.see(READY)
    terminal.keys("\x04")
    code, last = terminal.leave()
    assert code == 0
    assert "closed ['10000 words', '1 word']" in last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("is_talking", [True, False])
def test_a_signal_that_ends_the_process_closes_the_conversation(
    spawn: Any, number: signal.Signals, is_talking: bool
) -> None:
    terminal = spawn()
    if is_talking:
        terminal.keys("10000 words\r")
        terminal.see("word9 ")
    terminal.process.kill(number)
    terminal.see("closed")
    assert terminal.leave()[0] == 128 + number


def test_a_terminal_that_goes_away_closes_the_conversation(spawn: Any, tmp_path: Path) -> None:
    """The terminal is closed, as by closing its window: SIGHUP, and nothing can be written any more."""
    terminal = spawn("0.01", str(tmp_path / "closed"))
    terminal.keys("10000 words\r")
    terminal.see("word9 ")
    os.close(terminal.process.ptyproc.fd)
    _, status = os.waitpid(terminal.process.pid, 0)
    assert (tmp_path / "closed").read_text() == "closed ['10000 words']"
    assert os.waitstatus_to_exitcode(status) == 129


def test_the_placeholder_is_grey_and_is_not_there_without_colours(spawn: Any) -> None:
    terminal = spawn()
    terminal.see("\x1b[0;90ma message")
    terminal.keys("/bye\r")
    assert terminal.leave()[0] == 0
    terminal = spawn(NO_COLOR="1")
    terminal.keys("/bye\r")
    assert "a message" not in terminal.leave()[1]


def test_tab_completes_commands_and_their_arguments(spawn: Any) -> None:
    terminal = spawn()
    for typed, menu, want in (("/hi", "/history", "/history"), ("/load bo", "books", "/load books")):
        terminal.keys(typed)
        terminal.see(menu)
        terminal.keys("\t\r")
        terminal.see(want)
        terminal.see(READY)
    terminal.keys("\x04")
    assert terminal.leave()[0] == 0


def test_several_lines_by_quotes_by_alt_enter_and_by_a_paste(spawn: Any) -> None:
    """Reference: the messages that the conversation got. Enter alone sends, also what was pasted."""
    terminal = spawn()
    for keys in ('"""one\rtwo"""\r', "a\x1b\rb\r", "\x1b[200~x\ny\x1b[201~\r"):
        terminal.keys(keys)
        terminal.see("word3")
        terminal.see(READY)
    terminal.keys("/bye\r")
    assert r"closed ['one\ntwo', 'a\nb', 'x\ny']" in terminal.leave()[1]


def test_the_editor_writes_the_message(spawn: Any, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "edited %s" "$(cat "$1")" > "$1"\n')
    editor.chmod(0o755)
    terminal = spawn(EDITOR=str(editor), VISUAL="")
    terminal.keys("draft")
    terminal.see("draft")
    terminal.keys("\x18\x05")
    terminal.see("word3")
    terminal.see(READY)
    terminal.keys("\x04")
    assert "closed ['edited draft']" in terminal.leave()[1]


def test_what_was_typed_is_kept_for_its_owner_only_and_comes_back(spawn: Any) -> None:
    """The file and its folder are private whatever the umask, and the next chat begins with it."""
    before = os.umask(0)
    try:
        terminal = spawn()
    finally:
        os.umask(before)
    terminal.keys("1 word\r")
    terminal.see("word1")
    terminal.see(READY)
    terminal.keys("\x04")
    terminal.leave()
    assert stat.S_IMODE(terminal.history.stat().st_mode) == 0o600
    assert stat.S_IMODE(terminal.history.parent.stat().st_mode) == 0o700
    assert "+1 word" in terminal.history.read_text().splitlines()
    terminal = spawn()
    terminal.keys("\x1b[A\r")
    terminal.see("word1")


# ---- in this process


def test_a_signal_that_came_between_two_prompts_is_seen_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is then what it is at an empty prompt, and the next message is read; another signal ends the messages."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input

    from streamllm.typed import Typed

    monkeypatch.setenv("STREAMLLM_HISTORY", "")
    with Signals() as signals, create_pipe_input() as keys, create_app_session(input=keys):
        signals.defer(presses=3)
        typed = Typed(signals, lambda _: (), "a message")
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            typed()
        keys.send_text("still here\r")
        assert typed() == "still here"
        signal.raise_signal(signal.SIGTERM)
        assert typed() is None
        assert signals.received == signal.SIGTERM


# ---- the history file


def test_a_long_history_is_cut_to_its_newer_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the entries themselves; what is kept begins with a whole one, and the mode stays private."""
    from streamllm import typed

    file = tmp_path / "history"
    monkeypatch.setenv("STREAMLLM_HISTORY", str(file))
    monkeypatch.setattr(typed, "HISTORY_BYTES", 2000)
    history = typed.open_history()
    for number in range(200):
        history.append_string(f"message {number}\nand more")
    history.append_string("x" * (typed.ENTRY_CHARS + 1))
    assert file.stat().st_size > 2000
    kept = list(typed.open_history().load_history_strings())
    assert file.stat().st_size <= 1000
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert kept == [f"message {number}\nand more" for number in range(199, 199 - len(kept), -1)]
    assert len(kept) > 5


@pytest.mark.parametrize("named", ["", "/dev/null/history"])
def test_where_no_history_can_be_kept_there_is_none(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prompt_toolkit.history import InMemoryHistory

    from streamllm import typed

    monkeypatch.setenv("STREAMLLM_HISTORY", named)
    assert isinstance(typed.open_history(), InMemoryHistory)


def test_a_full_disk_loses_a_line_of_history_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamllm import typed

    monkeypatch.setenv("STREAMLLM_HISTORY", str(tmp_path / "history"))
    history = typed.open_history()
    (tmp_path / "history").unlink()
    (tmp_path / "history").mkdir()
    history.append_string("kept in memory")
    assert history.get_strings() == ["kept in memory"]


def test_a_private_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with replacing(tmp_path / "file", mode=0o600) as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
