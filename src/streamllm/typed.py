"""Messages that a person types: a line editor with completion, several lines, an external editor, and a history file.

Knows the terminal and prompt_toolkit, which is why this module is imported late; nothing here knows what a message
means. The prompt is drawn on stderr if that is a terminal, so that stdout carries replies only.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.defaults import create_output

from streamllm.atomic import replacing
from streamllm.console import Signals
from streamllm.messages import is_open

HISTORY_ENV = "STREAMLLM_HISTORY"
"""Names the history file. Set but empty: keep none."""

HISTORY_BYTES = 1 << 20
"""A longer history file is cut to its newer half when a chat begins."""

ENTRY_CHARS = 1 << 14
"""Longer messages are not kept in the history."""

PROMPT, CONTINUED = ">>> ", "... "

GLANCE = 0.1
"""Seconds between two looks whether the process shall end."""

Completions = Callable[[str], Iterable[tuple[str, str]]]
"""What a text can be completed to: the last word, and a few words about it."""


class Typed:
    """Reads messages from a terminal.

    Args:
        signals: a signal among them ends the wait for a message.
        complete: what a text before the cursor can be completed to.
        placeholder: what an empty line shows.
    """

    def __init__(self, signals: Signals, complete: Completions, placeholder: str) -> None:
        self._signals = signals
        is_plain = bool(os.environ.get("NO_COLOR"))  # a placeholder must not look like typed text
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=open_history(),
            completer=_LastWord(complete),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            multiline=Condition(lambda: is_open(self._session.default_buffer.text)),
            prompt_continuation=CONTINUED,
            placeholder=None if is_plain else lambda: self._shown(placeholder),
            key_bindings=_keys(),
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".txt",
            output=create_output(stdout=sys.stderr if sys.stderr and sys.stderr.isatty() else sys.stdout),
        )

    def __call__(self) -> str | None:
        """The next message; ``None`` when there will be no more.

        Raises:
            KeyboardInterrupt: Ctrl-C on an empty line; on another one it takes the line back.
        """
        while True:
            try:
                text = self._session.prompt(pre_run=self._watch)
            except EOFError:
                if not self._signals.forget():
                    return None
                raise KeyboardInterrupt from None  # it came between two prompts, as a signal and not as a key
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise
            else:
                return text

    def _shown(self, placeholder: str) -> FormattedText:
        """The placeholder, while somebody may type; a line that was left stays empty."""
        return FormattedText([] if self._session.app.is_done else [("ansibrightblack", placeholder)])

    def _watch(self) -> None:
        """Look now and then whether a signal was noted: a noted signal does not end the wait for a key."""
        app = self._session.app

        async def look() -> None:
            while self._signals.received is None:
                await asyncio.sleep(GLANCE)
            if not app.is_done:
                app.exit(exception=EOFError)

        app.create_background_task(look())


class _LastWord(Completer):
    """Completes the last word by a function of the text before the cursor."""

    def __init__(self, complete: Completions) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        typed = text.rpartition(" ")[2]
        for word, about in self._complete(text):
            yield Completion(word, start_position=-len(typed), display_meta=about)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return keys


# ---- the history


class _PrivateHistory(FileHistory):
    """A file that only its owner can read; what cannot be kept is not."""

    def store_string(self, string: str) -> None:
        if len(string) <= ENTRY_CHARS:
            with suppress(OSError):
                super().store_string(string)


def open_history() -> History:
    """The history file, cut if it is long; one in memory if there shall be none, or none can be written."""
    named = os.environ.get(HISTORY_ENV)
    if named == "":
        return InMemoryHistory()
    file = Path(named).expanduser() if named else platformdirs.user_state_path("streamllm") / "chat_history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        file.chmod(0o600)
        if file.stat().st_size > HISTORY_BYTES:
            _cut(file)
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(str(file))


def _cut(file: Path) -> None:
    """Keep the newer entries of a history file; each begins with a line with its date."""
    with file.open("rb") as opened:
        opened.seek(-HISTORY_BYTES // 2, os.SEEK_END)
        newer = opened.read()
    with replacing(file, mode=0o600) as temporary:
        temporary.write_bytes(newer[max(0, newer.find(b"\n# ")) :])
