"""``streamllm chat`` with a real small model: in a pipe, in a terminal, and what a session keeps whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import streamllm
from stories import STORIES
from streamllm import console
from streamllm.checkpoint import EMBEDDED
from streamllm.cli import app
from streamllm.errors import StateError, StreamLLMError
from streamllm.models import locate
from streamllm.session import Chat
from streamllm.sessions import Session
from streamllm.settings import SETTINGS
from streamllm.transcript import Transcript

pytestmark = pytest.mark.usefixtures("no_settings", "foreground")

TELL, MORE, AGAIN = "Once upon a time there was a cat", "The cat met a dog", "Then it was night"

PLAIN = "The model has no chat template, so the chat is plain text that the model goes on with.\n"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_settings: None) -> None:
    monkeypatch.setenv("STREAMLLM_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("STREAMLLM_HISTORY", str(tmp_path / "history"))


def chat(*arguments: str, stdin: bytes | str = "") -> tuple[int, str, str]:
    """Run the command in this process, in a pipe: exit code, stdout, stderr; errors go through the one table."""
    result = CliRunner().invoke(app, ["chat", *arguments], input=stdin)
    error = result.exception
    if isinstance(error, StreamLLMError):
        return error.exit_code, result.stdout, f"{result.stderr}streamllm: {error}"
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return result.exit_code, result.stdout, result.stderr


def lines(*messages: str) -> str:
    return "".join(f"{message}\n" for message in messages)


@contextmanager
def kept(name: str) -> Iterator[Transcript]:
    """What a session holds."""
    with Session(name) as session:
        yield session.transcript


def rows(table: str) -> dict[str, str]:
    """A table of the command by its first column."""
    return dict(line.split(None, 1) for line in table.splitlines() if len(line.split(None, 1)) == 2)


# ---- in a pipe


def test_replies_in_a_pipe_are_the_librarys_and_nothing_else_is_on_stdout() -> None:
    """Reference: ``Chat`` with the same options; the argument is said first."""
    model, tokenizer = streamllm.load(STORIES)
    greedy = streamllm.SamplingConfig(temperature=0)
    with Chat(model, tokenizer, sampling=greedy, max_tokens=20, recall="off") as want:
        texts = [want.send(text).text() for text in (TELL, MORE, AGAIN)]
    found = chat("-n", "20", "--temperature", "0", "--recall", "off", TELL, stdin=lines(MORE, "", AGAIN))
    assert found == (0, lines(*texts), PLAIN)


def test_quiet_says_nothing_but_replies_and_errors() -> None:
    assert chat("-q", "-n", "3", stdin=lines(TELL, "/nope"))[2].startswith("streamllm: There is no command /nope")


def test_json_has_the_tokens_of_each_reply_and_its_record() -> None:
    """Reference: the plain replies, and the fields that the issue names."""
    options = ("-n", "12", "--temperature", "0", "--recall", "off")
    plain = chat(*options, stdin=lines(TELL, MORE))[1]
    code, out, _ = chat(*options, "--json", stdin=lines(TELL, MORE))
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert "".join({"token": found.get("text"), "record": "\n"}[found["type"]] for found in objects) == plain
    records = [found for found in objects if found["type"] == "record"]
    assert [record["turn"] for record in records] == [1, 2]
    assert {"tokens_seen", "tokens_cached", "tokens_evicted", "evicted_now", "recalled", "occupancy"} <= set(records[0])
    assert records[0]["finish"] == "length"


def test_what_leaves_the_window_is_said_after_the_reply() -> None:
    """Reference: the counts of the record in the JSON of the same chat."""
    options = ("-n", "30", "--window", "40", "--block", "8", "--seed", "1", "--recall", "off")
    said = lines(TELL, MORE, AGAIN)
    records = [json.loads(line) for line in chat(*options, "--json", stdin=said)[1].splitlines() if '"record"' in line]
    last = records[-1]
    first, final = last["evicted_now"]
    *_, stats, left = chat(*options, "--stats", stdin=said)[2].splitlines()
    assert stats.startswith(f"seen {last['tokens_seen']} · cached {last['tokens_cached']} · evicted ")
    assert " · recalled 0 · " in stats
    turns = f"turn {first}" if first == final else f"turns {first} to {final}"
    assert left == f"{turns} left the window ({last['tokens_evicted_now']} tokens)"


def test_text_that_is_not_utf8_ends_the_chat_in_one_sentence_and_keeps_what_was_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "read_bytes", partial(console.read_bytes, size=len(TELL) + 1))
    code, out, err = chat("--session", "a", "-n", "3", stdin=TELL.encode() + b"\n\xff\xfe\n")
    assert code == 1
    assert err.startswith(f"{PLAIN}streamllm: The input is not UTF-8")
    with kept("a") as transcript:
        assert [row.user for row in transcript.turns()] == [TELL]
        assert out == transcript.turn(1).reply + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--recall", "perhaps"), 2, "--recall must be auto or off, you gave 'perhaps'."),
        (("--template-option", "thinking"), 2, "--template-option takes name=value, you gave 'thinking'."),
        (("--template-option", "thinking=false"), 2, "'thinking' is an option for a chat template"),
        (("--session", "../x"), 2, "A session cannot be called '../x'"),
        (("-s", "@nowhere.txt"), 1, "The system prompt cannot be read from nowhere.txt: No such file or directory."),
        (("-s", "cat " * 400, "--window", "100"), 2, "The system prompt has "),
        (("--snapshots", "-1"), 2, "snapshots must be a whole number of at least 0, you gave -1."),
        (("-m", "nowhere/at/all"), 1, ""),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(arguments: tuple[str, ...], code: int, says: str) -> None:
    found, out, err = chat(*arguments, stdin=lines(TELL))
    assert (found, out) == (code, "")
    assert err.startswith(f"streamllm: {says}")
    assert err.count("\n") == 0


def test_a_system_prompt_comes_from_a_file_and_a_bad_one_is_named(tmp_path: Path) -> None:
    """Reference: the same text given on the command line."""
    (tmp_path / "system.txt").write_text("A story of a cat.", encoding="utf-8")
    options = ("-n", "10", "--seed", "1")
    said = lines(TELL, "/system")
    assert chat(*options, "-s", f"@{tmp_path}/system.txt", stdin=said) == chat(
        *options, "-s", "A story of a cat.", stdin=said
    )
    (tmp_path / "system.txt").write_bytes(b"\xff")
    assert "is not UTF-8 text" in chat("-s", f"@{tmp_path}/system.txt")[2]


def test_config_shows_recall_and_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that only the chat has is among the others."""
    monkeypatch.setenv("STREAMLLM_RECALL", "off")
    result = CliRunner().invoke(app, ["config", "--json", "--window", "9"])
    settings = json.loads(result.stdout)["settings"]
    assert set(settings) == set(SETTINGS)
    assert settings["recall"] == {"value": "off", "source": "environment"}
    assert settings["window"] == {"value": 9, "source": "flag"}


# ---- sessions


def test_a_session_in_parts_is_the_conversation_at_once() -> None:
    """Reference: the same messages without a stop; the second part names nothing but the session."""
    options = ("-n", "25", "--window", "60", "--block", "8", "--seed", "4", "-s", "A story.")
    whole = chat("--session", "a", *options, stdin=lines(TELL, MORE, AGAIN))
    first = chat("--session", "b", *options, stdin=lines(TELL, MORE))
    second = chat("--session", "b", "-n", "25", stdin=lines(AGAIN))
    assert (whole[0], first[0], second[0]) == (0, 0, 0)
    assert first[1] + second[1] == whole[1]
    shown = rows(chat("--session", "b", stdin="/show\n")[1])
    assert shown["system"] == "A story."
    assert shown["seed"] == "4"
    assert shown["conversation"].startswith("session 'b': 3 turns so far, ")


def test_only_a_flag_or_the_environment_contradicts_what_a_session_keeps(tmp_path: Path) -> None:
    chat("--session", "a", "-n", "3", "--window", "60", stdin=lines(TELL))
    (tmp_path / "config.toml").write_text("window = 50\ntemperature = 0.5\n")
    code, out, err = chat("--session", "a", stdin="/show\n")
    assert code == 0
    assert "60 window" in rows(out)["cache"]
    assert rows(out)["temperature"] == "0.8"
    code, _, err = chat("--session", "a", "--window", "40")
    assert (code, "window=40 contradicts the session" in err) == (2, True)
    assert rows(chat("--session", "a", "--temperature", "0.3", stdin="/show\n")[1])["temperature"] == "0.3"


def test_a_session_goes_on_with_the_model_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is taken if it is named; it reads the window anew, and says so."""
    chat("--session", "a", "-n", "3", "-m", str(STORIES), stdin=lines(TELL))
    monkeypatch.delenv("STREAMLLM_MODEL")
    assert rows(chat("--session", "a", stdin="/show\n")[1])["model"] == str(STORIES)
    embedded = str(locate(None))
    code, out, err = chat("--session", "a", "-n", "3", "-m", embedded, stdin=lines(MORE, "/show"))
    assert code == 0
    assert rows(out)["model"] == "stories7M"
    assert rows(out)["conversation"].startswith("session 'a': 2 turns so far")
    assert "read anew from the transcript" in err
    assert rows(chat("--session", "a", stdin="/show\n")[1])["model"] == "stories7M"


def test_a_session_that_is_in_use_is_refused_before_the_model_is_loaded() -> None:
    """The second one names who has it; a model that does not exist would be refused later."""
    with Session("a"):
        code, out, err = chat("--session", "a", "-m", "nowhere/at/all", stdin=lines(TELL))
    assert (code, out) == (1, "")
    assert "'a'" in err
    assert str(os.getpid()) in err


def test_save_and_load_move_between_sessions() -> None:
    """Reference: the transcripts."""
    said = lines(TELL, "/save a", MORE, "/fork b", AGAIN, "/load b", "/regen rebuild")
    code, _, err = chat("-n", "5", "--seed", "1", stdin=said)
    assert (code, err) == (0, PLAIN)
    for name, want in (("a", [TELL, MORE, AGAIN]), ("b", [TELL, MORE])):
        with kept(name) as transcript:
            assert [row.user for row in transcript.turns()] == want


def test_a_session_that_is_loaded_belongs_to_the_model_that_goes_on_with_it(tmp_path: Path) -> None:
    """Reference: what the session says of its model, and that it is not read anew the next time."""
    chat("--session", "a", "-m", EMBEDDED, "-n", "3", stdin=lines(TELL))
    small = str(Path(STORIES).resolve())
    _, _, err = chat("-m", small, "-n", "3", stdin=lines("/load a", MORE))
    assert "another tokenizer" in err
    with kept("a") as transcript:
        assert transcript.get("model") == small
    assert chat("--session", "a", "-n", "3", stdin=lines(AGAIN))[2] == PLAIN


def test_what_goes_wrong_when_a_session_is_saved_at_the_end_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StateError("There is no room for the stream.")

    monkeypatch.setattr("streamllm.keeper.save_state", full)
    code, _, err = chat("--session", "a", stdin="")
    assert code == 0
    assert err.count("There is no room for the stream. The transcript has") == 2, "at the beginning, and at the end"


# ---- as a process of its own


def spawn(*arguments: str) -> subprocess.Popen[bytes]:
    """The command as a process, with pipes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "streamllm", "chat", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_reply_is_kept_to_its_last_token_whatever_ends_the_process(number: signal.Signals) -> None:
    """Reference: what came through the pipe; after SIGKILL what was on its way may be missing there, not on disk."""
    process = spawn("--session", "a", "--endless", "--seed", "1")
    assert process.stdin
    assert process.stdout
    process.stdin.write(lines(TELL).encode())
    process.stdin.flush()
    head = process.stdout.read(200)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert b"Traceback" not in err
    shown = (head + out).decode()
    with kept("a") as transcript:
        turn = transcript.turn(1)
    assert turn.user == TELL
    assert turn.reply.startswith(shown.removesuffix("\n"))
    if number != signal.SIGKILL:
        assert (turn.reply, turn.finish) == (shown.removesuffix("\n"), "interrupted")
    code, more, _ = chat("--session", "a", "-n", "5", stdin="/continue\n")
    assert (code, bool(more.strip())) == (0, True)


@pytest.fixture
def terminal() -> Iterator[Any]:
    """The command in a terminal."""
    pexpect = pytest.importorskip("pexpect", reason="no pseudo-terminals here")
    command = ["-m", "streamllm", "chat", "--session", "a", "--seed", "1"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    process = pexpect.spawn(
        sys.executable, command, env=environment, encoding="utf-8", timeout=120, dimensions=(30, 100)
    )
    process.delaybeforesend = None
    yield process
    process.close(force=True)


def test_a_chat_in_a_terminal(terminal: Any) -> None:
    """Banner, a reply that is stopped and goes on, the strip, and the end; the session has it all."""
    terminal.expect_exact("fluent for ever is not remembering for ever")
    terminal.expect_exact("session 'a': 0 turns so far")
    terminal.expect_exact(PLAIN.strip())
    terminal.expect_exact(">>>")
    terminal.send("/set endless on\r")
    terminal.expect_exact("endless on")
    terminal.expect_exact(">>>")
    for line in (TELL, "/continue"):
        terminal.send(f"{line}\r")
        terminal.expect_exact(".")
        terminal.send("\x03")
        terminal.expect(r"seen \d+ · cached \d+ · evicted \d+ · recalled \d+ · [\d.]+ tok/s")
        terminal.expect_exact("stopped; /continue goes on")
        terminal.expect_exact(">>>")
    terminal.send("/cache\r")
    terminal.expect_exact("│█│")
    terminal.expect(r"pinned 4, evicted \d+, window \d+ of")
    terminal.expect_exact(">>>")
    terminal.send("\x04")
    terminal.expect_exact("saved; go on with --session a")
    terminal.wait()
    assert terminal.exitstatus == 0
    with kept("a") as transcript:
        (turn,) = transcript.turns()
    assert (turn.user, turn.finish) == (TELL, "interrupted")
