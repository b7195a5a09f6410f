"""The process and its terminal, on real pipes and signals; a terminal is played by a stream that says it is one."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamllm import console
from streamllm.console import Answer, Screen, Signals, join, quit_now, read_stdin
from streamllm.errors import InputError

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_on_stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of stderr. No fixture: pytest's own capture would come after it."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    return terminal


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BufferedWriter]:
    """The writing end of a pipe that is stdin."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "wb", buffering=0) as writer:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield writer  # type: ignore[misc]


def never() -> None:
    pytest.fail("told somebody that nothing comes")


# ---- signals


def test_the_first_signal_is_noted_the_second_leaves_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.defer()
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(SystemExit) as leaving:
            signal.raise_signal(signal.SIGTERM)
        assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signals.defer()
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=Signals().defer)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_leaving_at_once_shows_the_cursor_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_on_stderr(monkeypatch)
    done: list[object] = []
    monkeypatch.setattr(os, "write", lambda number, data: done.append((number, data)))
    monkeypatch.setattr(os, "_exit", done.append)
    quit_now(signal.SIGINT)
    assert done == [(2, b"\x1b[?25h\n"), 130]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    quit_now(signal.SIGTERM)
    assert done[2:] == [143]


# ---- stdin


def test_a_pipe_is_read_as_it_comes_also_where_a_character_is_cut(pipe: io.BufferedWriter) -> None:
    pieces = read_stdin(Signals(), never)
    pipe.write("one é".encode()[:-1])
    assert next(pieces) == "one "
    pipe.write("é two".encode()[1:])
    pipe.close()
    assert "".join(pieces) == "é two"


def test_whoever_waits_for_an_idle_pipe_is_told_once(pipe: io.BufferedWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    told: list[int] = []

    def idle() -> None:
        told.append(1)
        threading.Timer(0.35, pipe.close).start()

    assert list(read_stdin(Signals(), idle)) == []
    assert told == [1]


def test_a_signal_ends_the_wait_for_a_pipe(pipe: io.BufferedWriter) -> None:
    with Signals() as signals:
        signals.defer()
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        assert list(read_stdin(signals, never)) == []
        timer.join()
        assert signals.received == signal.SIGTERM
    assert not pipe.closed


@pytest.mark.parametrize("stdin", [None, Terminal("typed")])
def test_a_terminal_or_nothing_at_all_is_not_read(stdin: Terminal | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert list(read_stdin(Signals(), never)) == []


@pytest.mark.parametrize(
    ("piped", "given", "want"),
    [
        (["a", "b"], "c", "ab\nc"),
        (["a\n"], "c", "a\nc"),
        ([""], "c", "c"),
        (["a"], "", "a"),
        ([], "", ""),
    ],
)
def test_what_was_given_stands_on_a_line_of_its_own_after_what_was_piped(
    piped: list[str], given: str, want: str
) -> None:
    assert "".join(join(piped, given)) == want


# ---- stderr


def test_a_spinner_turns_on_a_terminal_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_on_stderr(monkeypatch)
    with Screen() as screen:
        screen.spin("loading")
        screen.spin("reading")
        screen.note("ready")
        assert "reading" in stderr.getvalue()
        assert stderr.getvalue().endswith("\x1b[2mready\x1b[0m\n")
        screen.spin("again")
    assert stderr.getvalue().count(HIDE) == stderr.getvalue().count(SHOW) == 2


def test_what_takes_a_blink_gets_no_spinner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the test's: a spinner that was due shows the newest text, and none comes after it was settled."""

    class Clock:
        def __init__(self, seconds: float, function: Callable[[], None]) -> None:
            assert seconds == console.BLINK
            self.strike, self.daemon = function, False
            clocks.append(self)

        def start(self) -> None: ...

        cancel = start

    clocks: list[Clock] = []
    monkeypatch.setattr(threading, "Timer", Clock)
    stderr = terminal_on_stderr(monkeypatch)
    with Screen() as screen:
        screen.spin_later("one")
        screen.settle()
        clocks[0].strike()
        assert stderr.getvalue() == ""
        screen.spin_later("two")
        screen.spin_later("three")
        assert len(clocks) == 2
        clocks[1].strike()
        assert HIDE in stderr.getvalue()
        screen.spin_later("four")
    assert "four" in stderr.getvalue()
    assert "two" not in stderr.getvalue()
    assert stderr.getvalue().count(HIDE) == stderr.getvalue().count(SHOW) == 1
    assert len(clocks) == 2


@pytest.mark.parametrize(
    ("stream", "locale", "want"),
    [("utf-8", "UTF-8", True), ("UTF8", "utf-8", True), ("ascii", "UTF-8", False), ("utf-8", "ANSI_X3.4-1968", False)],
)
def test_only_where_stream_and_locale_are_utf8_more_than_ascii_is_shown(
    stream: str, locale: str, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.locale, "getencoding", lambda: locale)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=stream))
    assert Answer().is_unicode is want


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_on_stderr(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    Screen().note("ready")
    assert stderr.getvalue() == "ready\n"


def test_quiet_silences_a_terminal_but_not_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_on_stderr(monkeypatch)
    screen = Screen(quiet=True)
    screen.spin("loading")
    screen.note("ready")
    assert stderr.getvalue() == ""
    screen.line("statistics")
    assert "statistics" in stderr.getvalue()


def test_without_a_terminal_only_verbose_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    for verbose in (False, True):
        screen = Screen(verbose=verbose)
        screen.spin("loading")
        screen.note("ready")
    assert stderr.getvalue() == "ready\n"


def test_a_closed_stderr_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    Screen(verbose=True).note("ready")


def test_a_prompt_is_handed_on_in_small_pieces_until_a_signal_comes() -> None:
    signals = Signals()
    pieces = Screen().watch(["x" * 2500, "y"], signals, lambda: "reading")
    assert [len(next(pieces)) for _ in range(2)] == [1024, 1024]
    signals.received = signal.SIGINT
    assert list(pieces) == []


def test_a_prompt_that_takes_long_is_shown_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_on_stderr(monkeypatch)
    monkeypatch.setattr(console, "PATIENCE", -1.0)
    with Screen() as screen:
        assert list(screen.watch(["a", "b"], Signals(), lambda: "reading 7 tokens")) == ["a", "b"]
    assert "reading 7 tokens" in stderr.getvalue()


# ---- stdout


def test_without_a_stdout_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match="no standard output"):
        Answer()


def test_a_reader_that_goes_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        answer = Answer()
        assert answer.write("heard")
        os.close(reading)
        assert not answer.write("not heard")
        assert answer.is_closed
        assert answer.error is None
        assert not answer.write("nor this")
        stdout.flush()  # what Python does at its end; fails if the rest was not dropped


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_is_kept_as_the_error_to_raise_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        answer = Answer()
        assert not answer.write("lost")
        assert str(answer.error) == "Standard output cannot be written: No space left on device."
        assert not answer.is_closed
        assert not answer.write("not tried again")


def test_a_character_that_the_terminal_cannot_show_does_not_end_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert Answer().write("caf\u00e9")
    assert raw.getvalue() == b"caf?"


def test_tables_are_aligned_and_bold_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", "1", "flag"), ("long", "22", "")]
    for stdout, name in ((io.StringIO(), "a   "), (Terminal(), "\x1b[1ma   \x1b[0m")):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.delenv("NO_COLOR", raising=False)
        Answer().table(rows)
        assert stdout.getvalue().splitlines()[0] == f"{name}  1   flag"


def test_a_bar_shows_how_far_a_long_work_is_also_where_its_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: what was reported; with ten steps in a minute the time left is known, and is not a dash."""
    now = [0.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "120")
    terminal = terminal_on_stderr(monkeypatch)
    with Screen().bar(100, done=20) as advance:
        for step in range(30, 60, 10):
            now[0] += 60
            advance(step, "loss 3.2")
    shown = terminal.getvalue()
    assert "50.0 %  loss 3.2" in shown
    assert "left 0:05:00" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_without_a_terminal_lines_come_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the time between lines."""
    now = [100.0]
    monkeypatch.setattr("streamllm.console.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    with Screen().bar(10) as advance:
        for step in range(1, 11):
            now[0] += 12
            advance(step, "loss 3.2")
    assert out.getvalue().splitlines() == [
        "3 of 10 · loss 3.2 · 1 min left",
        "6 of 10 · loss 3.2 · 1 min left",
        "9 of 10 · loss 3.2 · 0 min left",
        "10 of 10 · loss 3.2 · 0 min left",
    ]
    with Screen(quiet=True).bar(1) as advance:
        advance(1, "never seen")
    assert "never" not in out.getvalue()


def test_the_first_signal_says_what_happens_now(capfd: pytest.CaptureFixture[str]) -> None:
    """Reference: the words that were given."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Signals() as signals:
            signals.defer("saving first")
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "\nsaving first\n"
