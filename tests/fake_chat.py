"""A conversation without a model, for tests of the prompt; run as a program it is the real prompt around that.

It says as much as it is asked for, keeps what was called, and knows no more of ``Chat`` than the prompt uses.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from streamllm.config import SamplingConfig
from streamllm.console import Answer, Screen, Signals
from streamllm.errors import CacheError, ConfigError, StateError
from streamllm.passages import Passage
from streamllm.repl import Repl
from streamllm.slash import completions
from streamllm.stats import Stats
from streamllm.talk import Talk


@dataclasses.dataclass
class Record:
    """Of a turn; the fields of ``TurnRecord``."""

    turn: int
    tokens_read: int = 3
    tokens_generated: int = 0
    tokens_seen: int = 81_920
    tokens_cached: int = 1_024
    tokens_evicted: int = 0
    turns_evicted: int = 0
    evicted_now: tuple[int, int] | None = None
    tokens_evicted_now: int = 0
    occupancy: float = 0.5
    recalled: tuple[Passage, ...] = ()
    finish: str | None = None
    seconds: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def evicted(self) -> str:
        return f"turns {self.evicted_now} left"


class FakeReply:
    """A reply of so many words; ``steps``: of reading before them; ``breaks``: at that word the disk is full."""

    def __init__(self, chat: FakeChat, words: int, *, steps: int = 0, breaks: int = 0, progress: Any = None) -> None:
        self.recalled = chat.calls[-1][2] or () if chat.calls[-1][0] == "send" else ()
        self.record = Record(chat.turns, recalled=tuple(self.recalled), evicted_now=chat.evicts, tokens_evicted_now=7)
        self.record.tokens_evicted = chat.tokens_evicted
        self._chat, self._words, self._steps, self._breaks, self._progress = chat, words, steps, breaks, progress

    def __iter__(self) -> FakeReply:
        return self

    def __next__(self) -> Any:
        if self.record.finish:
            raise StopIteration
        try:
            for step in range(1, self._steps + 1):
                self._pause(step)
                self._progress(step)
            self._steps = 0
        except BaseException:
            self.close()
            raise
        number = self.record.tokens_generated = self.record.tokens_generated + 1
        if number == self._breaks:
            self.close()
            raise StateError("The disk is full.")
        self._pause(number)
        if number == self._words:
            self.record.finish = "end"
        self._chat.said.append(f"word{number} ")
        text = self._chat.said[-1].rstrip() if self.record.finish else self._chat.said[-1]
        return SimpleNamespace(text=text, id=number, finish=self.record.finish, document_end=False)

    def _pause(self, number: int) -> None:
        time.sleep(self._chat.pause)
        if number == 2 and self._words == 100 and self._chat.signal:
            signal.raise_signal(self._chat.signal)

    def close(self) -> None:
        if self.record.finish is None:
            self.record.finish = "interrupted"


class FakeChat:
    """Replies to "N words" with N words, a pause before each; to "full" the disk is full after two words.

    "N steps" is read in so many steps. ``signal`` comes at the second word or step of 100.
    """

    def __init__(self, pause: float = 0.0, session: str | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.said: list[str] = []
        self.notes: list[str] = []
        self.texts: list[str] = []
        self.pause = pause
        self.signal: int | None = None
        self.evicts: tuple[int, int] | None = None
        self.tokens_evicted = 80_896
        self.turns_evicted = 0
        self.session = SimpleNamespace(name=session) if session else None
        self.system: str | None = None
        self.sampling = SamplingConfig()
        self.max_tokens: int | None = None
        self.stop: tuple[str, ...] = ()
        self.on_end, self.recall, self.is_plain = "stop", "auto", True
        self.stats: Stats | None = None
        self.record: Record | None = None
        self.cache = SimpleNamespace(
            tokens_seen=0,
            rows=[SimpleNamespace(pinned=4)],
            tokens_cached=204,
            capacity=404,
            config=SimpleNamespace(window=400),
        )
        self.tokenizer = lambda text, **_: {"input_ids": text.split()}
        self.is_closed = False

    @property
    def turns(self) -> int:
        return len(self.texts)

    def send(self, text: str, *, recall: Any = None, progress: Any = None) -> FakeReply:
        self.calls.append(("send", text, recall))
        self.texts.append(text)
        number, _, unit = text.partition(" ")
        words = int(number) if number.isdecimal() else 3
        if unit == "steps":
            return self._reply(words, steps=words, progress=progress)
        return self._reply(words, breaks=3 if text == "full" else 0)

    def _reply(self, words: int, **options: Any) -> FakeReply:
        reply = FakeReply(self, words, **options)
        self.stats = Stats(81_920, words, 1_024, self.tokens_evicted, 1_000, 2_000, 100.0, 43.0, 0.1)
        self.record = reply.record
        return reply

    def resume(self, *, progress: Any = None) -> FakeReply:
        self.calls.append(("resume",))
        return self._reply(2)

    def undo(self, turns: int = 1, *, rebuild: bool = False) -> None:
        self.calls.append(("undo", turns, rebuild))
        if turns > self.turns:
            raise ConfigError(f"Cannot take {turns} turns back: there are {self.turns}.")
        del self.texts[-turns:]

    def regenerate(self, *, rebuild: bool = False) -> FakeReply:
        self.calls.append(("regenerate", rebuild))
        if not self.turns:
            raise CacheError("There is no reply.")
        return self._reply(1)

    def edit(self, turn: int, text: str) -> FakeReply:
        self.calls.append(("edit", turn, text))
        return self._reply(1)

    def clear(self) -> None:
        self.calls.append(("clear",))
        self.texts.clear()

    def set_system(self, text: str | None) -> None:
        self.calls.append(("set_system", text))
        self.system = text

    def fork(self, session: str) -> FakeChat:
        self.calls.append(("fork", session))
        other = FakeChat(self.pause, session)
        other.texts = list(self.texts)
        return other

    def search(self, words: str, limit: int) -> list[Passage]:
        self.calls.append(("search", words, limit))
        return [] if words == "nothing" else [Passage(1, 3, "user", f"They spoke\nof {words}.", 9)]

    def history(self, last: int | None = None) -> Iterator[Any]:
        self.calls.append(("history", last))
        for number, text in enumerate(self.texts, 1):
            yield SimpleNamespace(number=number, user=text, reply=f" reply {number}\n")

    def close(self) -> None:
        self.is_closed = True


def talk_of(chat: FakeChat, signals: Signals | None = None, **options: Any) -> Talk:
    """A conversation in front of the streams that are there."""
    answer, screen = Answer(), Screen()
    other = partial(FakeChat, chat.pause)
    return Talk(chat, screen, answer, signals or Signals(), model="fake", open_chat=other, **options)


def main(pause: str = "0.01", file: str | None = None) -> int:
    """The prompt; at the end, what was said goes to ``file`` or to stderr."""
    from streamllm.typed import Typed

    with Signals() as signals:
        signals.defer("wait", presses=3)
        talk = talk_of(FakeChat(float(pause)), signals, shows_stats=True, list_names=lambda: ["books", "box"])
        print("ready", file=sys.stderr)
        Repl(talk, Typed(signals, partial(completions, talk), "a message"), is_interactive=True).run()
        talk.chat.close()
        told = f"{'closed' if talk.chat.is_closed else 'open'} {talk.chat.texts}"
        if file is None:
            print(told, file=sys.stderr)
        else:
            Path(file).write_text(told)
    return 0 if signals.received is None else 128 + signals.received


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
