"""One reply of a conversation, chunk by chunk, and the record of what it cost.

Knows nothing about caches or templates: the conversation (``session``) hands the chunks in and is told of each.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from streamllm.loop import Chunk
from streamllm.passages import Passage


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What one turn read, wrote, let go and found again.

    Args:
        turn: its number, from 1.
        tokens_read: tokens of the new turn that were read.
        tokens_generated: tokens of the reply.
        tokens_seen, tokens_evicted: of the whole conversation.
        tokens_cached: held now.
        turns_evicted: turns that have left the window with all their tokens.
        evicted_now: first and last turn that left during this one; ``None``: none did.
        tokens_evicted_now: tokens that left during this turn.
        occupancy: share of the cache in use, 0 to 1.
        recalled: passages that were put in front of the turn.
        finish: why the reply ended: "end", "stop", "length" or "interrupted"; ``None`` while it goes on.
        seconds: since the turn began.
    """

    turn: int
    tokens_read: int
    tokens_generated: int
    tokens_seen: int
    tokens_cached: int
    tokens_evicted: int
    turns_evicted: int
    evicted_now: tuple[int, int] | None
    tokens_evicted_now: int
    occupancy: float
    recalled: tuple[Passage, ...]
    finish: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    def evicted(self) -> str:
        """What has left during this turn, in words; empty if nothing has."""
        if not self.tokens_evicted_now:
            return ""
        if self.evicted_now is None:
            return f"{self.tokens_evicted_now} tokens left the window"
        first, last = self.evicted_now
        turns = f"turn {first}" if first == last else f"turns {first} to {last}"
        return f"{turns} left the window ({self.tokens_evicted_now} tokens)"


class Listener(Protocol):
    """Who is told of a reply: the conversation.

    Attributes:
        lock: held during every step of a reply; who else wants the conversation waits or is refused.
    """

    lock: threading.RLock

    def took(self, reply: Reply, chunk: Chunk) -> Chunk:
        """A chunk has come; it is handed on as it is returned."""

    def ended(self, reply: Reply) -> None:
        """No more will come."""

    def measure(self, reply: Reply) -> TurnRecord:
        """The record at this moment."""


class Reply(Iterator[Chunk]):
    """A reply on its way: iterate for its chunks.

    Breaking off, by ``close()`` or by sending the next message, leaves a reply that is complete to its last token.

    Attributes:
        turn: number of the turn.
        recalled: passages that were put in front of it.
        finish: why it ended; ``None`` while it goes on.
        generated: tokens so far.
        cancel: ends the stream of an engine that generates it.
        is_stopped: whether ``stop`` was called.
    """

    def __init__(
        self,
        listener: Listener,
        begin: Callable[[], Iterator[Chunk]],
        *,
        turn: int,
        read: int,
        recalled: tuple[Passage, ...],
        before: tuple[int, int, int],
    ) -> None:
        self.turn, self.read, self.recalled = turn, read, recalled
        self.oldest, self.evicted, self.seen = before  # oldest turn in the window, tokens evicted and seen before it
        self.finish: str | None = None
        self.generated = 0
        self.cancel: Callable[[], None] | None = None  # of what generates it beside others
        self.is_stopped = False
        self._reader: threading.Thread | None = None
        self._lock = listener.lock
        self._listener: Listener | None = listener  # until it has ended
        self._begin: Callable[[], Iterator[Chunk]] | None = begin
        self._chunks: Iterator[Chunk] | None = None
        self._began = time.perf_counter()
        self._record: TurnRecord | None = None

    def __iter__(self) -> Reply:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            self._reader = threading.current_thread()
            return self._next()

    def _next(self) -> Chunk:
        if self.is_stopped and self.cancel is None:  # else what generates it ends by itself, and loses nothing
            self.close()
        listener, begin = self._listener, self._begin
        if self.finish is not None or listener is None or begin is None:
            raise StopIteration
        try:
            if self._chunks is None:
                self._chunks = begin()
            chunk = next(self._chunks)
            if chunk.id is not None:
                self.generated += 1
            chunk = listener.took(self, chunk)
        except BaseException:
            self.close()
            raise
        if chunk.finish:
            self._end(chunk.finish)
        return chunk

    @property
    def is_read_elsewhere(self) -> bool:
        """Whether it goes on, and another thread than this one reads it."""
        reader = self._reader
        return self.finish is None and reader not in (None, threading.current_thread()) and reader.is_alive()

    @property
    def seconds(self) -> float:
        """Seconds since the turn began."""
        return time.perf_counter() - self._began

    @property
    def record(self) -> TurnRecord:
        """What the turn has cost so far, or in all."""
        with self._lock:
            if self._record is None:
                assert self._listener is not None
                return self._listener.measure(self)
            return self._record

    def text(self) -> str:
        """The rest of the reply, with blank lines where documents ended."""
        return "".join(chunk.shown for chunk in self)

    def stop(self) -> None:
        """Break the reply off from another thread, without waiting.

        Whoever iterates over it gets what has been generated, and comes to its end.
        """
        self.is_stopped = True
        cancel = self.cancel  # its reader may come to the end at this moment
        if cancel is not None:
            cancel()

    def close(self) -> None:
        """Break the reply off; it stays as far as it has come. Does nothing if it has ended."""
        with self._lock:
            if self.finish is None:
                self._end("interrupted")

    def _end(self, finish: str) -> None:
        listener, chunks = self._listener, self._chunks
        assert listener is not None
        self.finish = finish
        if isinstance(chunks, Generator):
            chunks.close()
        listener.ended(self)
        self._record = listener.measure(self)
        # A conversation that nobody has any more frees its memory at once, not when Python looks for cycles.
        self._listener = self._begin = self._chunks = self._reader = self.cancel = None
