"""A conversation as a person meets it: replies written as they come, and what each of them has cost.

Replies, and what was asked for, go to stdout; all else to stderr. Knows what a conversation gives, but neither commands
(``slash``) nor where messages come from (``repl``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from streamllm.console import Answer, Screen, Signals, harmless
from streamllm.run import TextLines, json_line, json_lines
from streamllm.stats import Stats, grouped

if TYPE_CHECKING:
    from streamllm.loop import Chunk
    from streamllm.passages import Passage
    from streamllm.reply import Reply, TurnRecord
    from streamllm.session import Chat

GLIMPSE_CHARS = 60
"""Characters of a text that are shown where it is only to be recognised."""


class _Interrupted(Exception):  # noqa: N818 - no error
    """A signal came while a message was read."""


class Talk:
    """A conversation, and where it is shown.

    Args:
        chat: the conversation; commands may put another one in its place.
        screen, answer, signals: the terminal.
        model: name of the model.
        open_chat: goes on with the session of a name, which must be there.
        list_names: names of the sessions.
        shows_stats: a line of statistics follows each reply.
        is_json: stdout gets one object a line.

    Attributes:
        chat: the conversation.
        is_leaving: whether no more messages shall be read.
        found: passages to put in front of the next message.
    """

    def __init__(
        self,
        chat: Chat,
        screen: Screen,
        answer: Answer,
        signals: Signals,
        *,
        model: str,
        open_chat: Callable[[str], Chat],
        list_names: Callable[[], Iterable[str]] = tuple,
        shows_stats: bool = False,
        is_json: bool = False,
    ) -> None:
        self.chat, self.screen, self.answer, self.signals = chat, screen, answer, signals
        self.model, self.open_chat, self.list_names = model, open_chat, list_names
        self.is_leaving = False
        self.found: Sequence[Passage] | None = None
        self._shows_stats, self._is_json = shows_stats, is_json
        self._seen = self._due = 0  # tokens seen before the message that is read, and tokens of it

    # ---- replies

    def send(self, text: str) -> None:
        """Say something, and show the reply.

        Raises:
            StreamLLMError: as of ``Chat.send`` and of its reply.
        """
        reply = self.chat.send(text, recall=self.found, progress=self.reading)
        self.found = None
        self.show(reply)

    def show(self, reply: Reply) -> None:
        """Write a reply as it comes, until it ends, a signal comes, or nobody listens; then what it has cost.

        Raises:
            StreamLLMError: as of the reply.
        """
        self.tell_notes()
        for passage in reply.recalled:
            self.screen.note(f"recalled from {whose(passage)}: {glimpse(passage.text)}")
        self._seen, self._due = self.chat.cache.tokens_seen, reply.record.tokens_read
        self.screen.spin_later("reading")
        try:
            with suppress(_Interrupted):
                self._write(reply)
        finally:
            self.screen.settle()
            reply.close()
        self._sum_up(reply.record)

    def reading(self, seen: int) -> None:
        """A part of a long message was read; ``seen``: tokens that the cache has seen.

        Raises:
            Exception: a signal has come, so the rest is not to be read.
        """
        if self.signals.received is not None:
            raise _Interrupted
        self.screen.spin_later(f"reading · {grouped(seen - self._seen)} of {grouped(self._due)} tokens")

    def _write(self, reply: Iterator[Chunk]) -> None:
        line = json_lines if self._is_json else TextLines()
        end = ""
        try:
            for chunk in reply:
                self.screen.settle()
                text = self.shown(line(chunk))
                end = text[-1:] or end
                if not self.answer.write(text) or self.signals.received is not None:
                    break
        finally:
            if end != "\n":
                self.answer.write("" if self._is_json else "\n")

    def _sum_up(self, record: TurnRecord) -> None:
        if self._is_json:
            self.answer.write(json_line("record", **record.to_dict()))
        if self._shows_stats and self.chat.stats is not None:
            self.screen.line(_counted(self.chat.stats, record).line(f"recalled {len(record.recalled)}"))
            if record.evicted_now is not None:
                self.screen.line(record.evicted())
        if record.finish == "interrupted":
            self.screen.note("stopped; /continue goes on")
        elif record.finish == "length":
            self.screen.note(f"cut off after {record.tokens_generated} tokens; /continue goes on")

    # ---- words

    def tell(self, text: str) -> None:
        """Write what was asked for."""
        self.answer.write(json_line("text", text=text) if self._is_json else self.shown(text) + "\n")

    def table(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Write what was asked for, in columns."""
        if self._is_json:
            self.tell("\n".join("  ".join(row) for row in rows))
        elif rows:
            self.answer.table([tuple(self.shown(cell) for cell in row) for row in rows])

    def note(self, text: str) -> None:
        """Say what was done, to whoever watches."""
        self.screen.note(text)

    def fail(self, text: str) -> None:
        """Say what went wrong; the conversation goes on."""
        self.screen.line(text if self.screen.is_terminal else f"streamllm: {text}", is_dim=False)
        if self._is_json:
            self.answer.write(json_line("error", message=text))

    def tell_notes(self) -> None:
        """Say what the conversation has to say, once."""
        for note in self.chat.notes:
            if not self.screen.is_quiet:
                self.screen.line(note)
        self.chat.notes.clear()

    def shown(self, text: str) -> str:
        """A text as it may be written: nothing in it steers a terminal."""
        return self.answer.shown(text)

    # ---- conversations

    def switch(self, chat: Chat) -> None:
        """Go on with another conversation; the one before is saved and closed."""
        before, self.chat = self.chat, chat
        self.found = None
        before.close()

    def place(self) -> str:
        """Where the conversation is kept, how long it is and how much of it has left the window, in words."""
        chat = self.chat
        name = "not kept" if chat.session is None else f"session {chat.session.name!r}"
        turns = "1 turn" if chat.turns == 1 else f"{chat.turns} turns"
        gone = f", {chat.turns_evicted} left the window" if chat.turns_evicted else ""
        return f"{name}: {turns} so far{gone}"


def _counted(stats: Stats, record: TurnRecord) -> Stats:
    """Statistics as of the end of a turn; of one that was broken off before its first token no speed is known."""
    stats = replace(
        stats,
        tokens_seen=record.tokens_seen,
        tokens_cached=record.tokens_cached,
        tokens_evicted=record.tokens_evicted,
    )
    return stats if record.tokens_generated else replace(stats, decode_tokens_per_s=0.0)


def whose(passage: Passage) -> str:
    """Where a passage comes from, in words."""
    return f"turn {passage.turn}, {'you' if passage.role == 'user' else 'reply'}"


def glimpse(text: str) -> str:
    """The beginning of a text on one line; it may go to any terminal."""
    line = " ".join(harmless(text).split())
    return line if len(line) <= GLIMPSE_CHARS else line[: GLIMPSE_CHARS - 1] + "…"
