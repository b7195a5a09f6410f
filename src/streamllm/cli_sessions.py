"""``streamllm sessions``: what named sessions there are, and what was said in them; every rule stands elsewhere."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from streamllm.archive import export_session, import_session
from streamllm.config import check_count
from streamllm.console import Answer, Screen, unwinding
from streamllm.errors import ConfigError
from streamllm.flags import Debug, Json, Quiet, begin, one_off, source
from streamllm.sessions import check_name, delete_session, find_session, list_sessions, read_transcript, sessions_folder
from streamllm.transcript import Transcript, TurnRow

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Named sessions: conversations that are kept.")

LAST = 3
"""Turns that ``show`` shows unless it is told."""

SHOWN = ("model", "created", "system", "cache", "sampling", "template", "fingerprint")
"""Settings that a person is shown, in order; what else is kept is there for the chat, and in JSON."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the session.", show_default=False)]


@app.command("list")
def list_(ctx: typer.Context, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Say what sessions there are, and which process holds one."""
    begin(ctx)
    with _answering() as answer, Screen(quiet=quiet) as screen:
        found = list(list_sessions())
        if json:
            for info in found:
                answer.write(jsonlib.dumps(dataclasses.asdict(info)) + "\n")
        elif found:
            rows: list[tuple[str, ...]] = [("name", "turns", "tokens", "last used", "model", "")]
            for info in found:
                counts = ("", "") if info.damage else (str(info.turns), str(info.tokens))
                state = [info.damage or "", f"in use by process {info.pid}" if info.pid else ""]
                cells = (info.name, *counts, _when(info.used), _short(info.model), "; ".join(filter(None, state)))
                rows.append(tuple(answer.shown(cell) for cell in cells))
            answer.table(rows)
        else:
            screen.note(f"there are no sessions in {sessions_folder()}")


@app.command()
def show(
    ctx: typer.Context,
    name: Name,
    last: Annotated[int, one_off("--last", help="So many turns.", command="sessions_show")] = LAST,
    all: Annotated[bool, typer.Option("--all", help="All turns.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the settings of a session, and what was said last.

    As JSON: one line with the settings, and one for each turn.
    """
    begin(ctx)
    check_count("last", last, 0)
    if all and source(ctx, "last") == "flag":
        raise ConfigError("Both --last and --all are given; give one of them.")
    with _answering() as answer, closing(read_transcript(name)) as transcript:
        first = 1 if all else max(1, transcript.count() - last + 1)
        parts = _json_lines(name, transcript, first) if json else _paragraphs(transcript, first)
        for part in parts:
            if not answer.write(part if json else answer.shown(part)):
                break


@app.command()
def delete(
    ctx: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Delete a session, with all that was said in it."""
    begin(ctx)
    find_session(name)
    if not yes:
        if not (sys.stdin and sys.stdin.isatty()):
            raise ConfigError(f"Session {name!r} would be gone for good; say --yes to delete it.")
        typer.confirm(f"Delete session {name}, with all that was said in it?", abort=True, err=True)
    with unwinding():
        delete_session(name)


@app.command("export")
def export_(
    ctx: typer.Context,
    name: Name,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="To write; NAME.zip if left out.", show_default=False)
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a session to one file, to keep it or to carry it to another machine."""
    begin(ctx)
    check_name(name)
    file = Path(f"{name}.zip") if file is None else file
    with _answering() as answer:
        with unwinding():
            turns = export_session(name, file)
        told = jsonlib.dumps({"file": str(file), "turns": turns}) if json else f"{file}: {_turns(turns)}"
        answer.write(told + "\n")


@app.command("import")
def import_(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That export wrote.", show_default=False)],
    name: Annotated[
        str | None, one_off("--name", help="Of the session; as it was if left out.", command="sessions_import")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a session from a file that export wrote."""
    begin(ctx)
    with _answering() as answer:
        with unwinding():
            name = import_session(file, name)
        with closing(read_transcript(name)) as transcript:
            turns = transcript.count()
        told = jsonlib.dumps({"name": name, "turns": turns}) if json else f"{name}: {_turns(turns)}"
        answer.write(told + "\n")


COMMANDS = tuple(
    str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback
)


@contextmanager
def _answering() -> Iterator[Answer]:
    """Standard output, and at the end what went wrong with it."""
    answer = Answer()
    yield answer
    if answer.error:
        raise answer.error


def _json_lines(name: str, transcript: Transcript, first: int) -> Iterator[str]:
    """A session for programs."""
    counts = {"turns": transcript.count(), "tokens": transcript.tokens()}
    yield jsonlib.dumps({"type": "session", "name": name, **counts, "settings": transcript.settings()}) + "\n"
    for turn in transcript.turns(first):
        yield jsonlib.dumps({"type": "turn", **dataclasses.asdict(turn)}) + "\n"


def _paragraphs(transcript: Transcript, first: int) -> Iterator[str]:
    """A session for a person."""
    for key in SHOWN:
        if told := _setting(key, transcript.get(key)):
            yield f"{key:<12} {told}\n"
    yield f"{'turns':<12} {transcript.count()} ({transcript.tokens()} tokens)\n"
    for turn in transcript.turns(first):
        yield _paragraph(turn)


def _paragraph(turn: TurnRow) -> str:
    asked = "\n".join(f"{'...' if line else '>>>'} {text}" for line, text in enumerate(turn.user.split("\n")))
    cut_off = ", not finished" if turn.ended is None else ""
    return f"\nturn {turn.number}, {_when(turn.began)}{cut_off}\n{asked}\n{turn.reply}\n"


def _setting(key: str, value: Any) -> str:
    if key == "created" and isinstance(value, (int, float)):
        return _when(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each is not None)
    return "" if value is None else str(value).replace("\n", "\n" + " " * 13)


def _short(model: str | None) -> str:
    """A model's name without the folders of this machine; a Hub id stays whole."""
    return "" if model is None else Path(model).name if Path(model).is_absolute() else model


def _when(seconds: float | None) -> str:
    """A time as the clock on the wall showed it."""
    if seconds is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # no time of this world
        return str(seconds)


def _turns(count: int) -> str:
    return f"{count} turn{'' if count == 1 else 's'}"
