"""One request that is answered: its events, kept for a moment, written by threads and handed to readers in asyncio.

What waits between a reply and its reader is bounded: a slow reader holds its own stream up and no other. Who hangs up
ends the stream, unless it was asked to be resumable: then it goes on, and its newest events can be had again. Knows
neither what the events say (``events``) nor who writes them (``runs``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Protocol

from streamllm.loop import Chunk
from streamllm.request import Request
from streamllm.server.bell import Bell, Sleeper
from streamllm.server.events import event
from streamllm.server.refusal import Refusal

BACKLOG = 256
"""Events that wait for a reader at most; then the reply stands still."""

REPLAY = 4096
"""Newest events of a resumable reply that can be had again."""

REPLAY_BYTES = 2**20
"""Of these at most, whatever each event has: many replies are kept at a time."""


class Choice(Protocol):
    """One reply of a run; used in one thread."""

    def chunks(self) -> Iterator[Chunk]:
        """The reply."""

    def began(self) -> Iterable[bytes]:
        """The events before the first chunk."""

    def took(self, chunk: Chunk) -> bytes:
        """The event of a chunk; empty where it has no text."""

    def ended(self) -> Iterable[bytes]:
        """The events after the last."""

    def finish(self) -> str:
        """Why it ended: "stop", "length" or "interrupted"."""

    def usage(self) -> tuple[int, int, int]:
        """Tokens of the prompt, those of them that were not read, and tokens of the reply."""

    def release(self) -> None:
        """Let go of what it holds; a second time does nothing."""


class Reader(Sleeper):
    """Someone who takes the events of a run; ``next`` is the number of the next one."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.next = after + 1
        self.is_waiting = False


class Run:
    """One request that is answered, by one reply or several.

    Args:
        id, owner: by which it is found.
        is_resumable: whether it goes on without a reader.
        is_silent: whether only its end is waited for, so no events are kept.
        bell: of the loop where it is read.

    Attributes:
        choices: its replies, once they have begun.
        session_id: of the first of them, if it is one of a conversation.
        error: why it failed.
        is_done: whether nothing more comes.
    """

    def __init__(self, id: str, owner: str, *, is_resumable: bool, is_silent: bool, bell: Bell) -> None:
        self.id, self.owner, self.is_resumable, self.is_silent = id, owner, is_resumable, is_silent
        self.choices: Sequence[Choice] = ()
        self.session_id: str | None = None
        self.error: Refusal | None = None
        self.is_done = self.is_cancelled = False
        self.began = self.left = time.monotonic()  # left: when it ended, or else when the last reader went
        self._bell = bell
        self._changed = threading.Condition()
        self._log: deque[bytes] = deque()
        self._first = 1  # number of the oldest event
        self._bytes = 0  # of the events of a resumable reply
        self._readers: set[Reader] = set()
        self._requests: list[Request] = []

    # ---- for the threads that write

    def emit(self, events: bytes) -> None:
        """Add an event, without its id; waits while a reader is slow."""
        if not events or self.is_silent:
            return
        with self._changed:
            while not self.is_cancelled and any(self._last - r.next >= BACKLOG for r in self._readers):
                self._changed.wait()
            self._log.append(b"id: %d\n%b" % (self._last + 1, events))
            self._bytes += len(self._log[-1])
            while self.is_resumable and (len(self._log) > REPLAY or self._bytes > REPLAY_BYTES):
                if any(reader.next <= self._first for reader in self._readers):
                    break
                self._bytes -= len(self._log.popleft())
                self._first += 1
            self._ring()

    def end(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self.is_done, self.left = True, time.monotonic()
            self._requests.clear()
            self._ring()

    def has(self, request: Request) -> None:
        """A stream of the engine belongs to it."""
        with self._changed:
            self._requests = [known for known in self._requests if known.state != "done"]
            self._requests.append(request)
        if self.is_cancelled:
            request.cancel()

    @property
    def _last(self) -> int:
        """Number of the newest event."""
        return self._first + len(self._log) - 1

    def _ring(self) -> None:
        for reader in self._readers:
            if reader.is_waiting:
                reader.is_waiting = False
                self._bell.ring(reader)

    # ---- for everybody

    def cancel(self) -> None:
        """Break it off: its streams end before their next token."""
        with self._changed:
            self.is_cancelled = True
            requests = list(self._requests)
            self._changed.notify_all()
        for request in requests:
            request.cancel()

    # ---- for readers, in the loop

    def attach(self, after: int = 0) -> Reader:
        """Read on after an event.

        Raises:
            Refusal: it is not kept any more, or has not come.
        """
        with self._changed:
            if after + 1 < self._first:
                raise Refusal(410, f"Events up to {self._first - 1} are not kept any more; ask for later ones.")
            if after > self._last:
                raise Refusal(400, f"There is no event {after} yet, the last one is {self._last}.", param="after")
            reader = Reader(after)
            self._readers.add(reader)
            return reader

    def detach(self, reader: Reader) -> None:
        """A reader goes; a reply that is not resumable ends with its last one."""
        with self._changed:
            self._readers.discard(reader)
            if not self.is_done:
                self.left = time.monotonic()
            is_deserted = not (self._readers or self.is_done or self.is_resumable)
            self._changed.notify_all()
        if is_deserted:
            self.cancel()

    async def begun(self, reader: Reader, seconds: float) -> None:
        """Wait until something can be read, or so long.

        Raises:
            Refusal: it failed before anything could be read.
        """
        if self._is_empty(reader):
            await reader.sleep(seconds)
        if self.error is not None and self._last < 1:
            raise self.error

    async def read(self, reader: Reader) -> AsyncIterator[bytes]:
        """The events, those together that wait together."""
        try:
            while True:
                events = self._take(reader)
                if events:
                    yield events
                elif self.is_done and reader.next > self._last:
                    if self.error is not None:
                        yield event(self.error.shape(), "error")
                    return
                else:
                    await reader.sleep()
        finally:
            self.detach(reader)

    async def done(self, reader: Reader) -> None:
        """Wait for the end."""
        while not self.is_done:
            if not self._take(reader):
                await reader.sleep()

    def _is_empty(self, reader: Reader) -> bool:
        with self._changed:
            reader.is_waiting = not self.is_done and reader.next > self._last
            return reader.is_waiting

    def _take(self, reader: Reader) -> bytes:
        """What waits for a reader; if nothing does, it will be rung."""
        with self._changed:
            start = reader.next - self._first
            log = self._log
            if start >= len(log):
                reader.is_waiting = not self.is_done
                return b""
            events = b"".join(log if start == 0 else [log[i] for i in range(start, len(log))])
            reader.next = self._last + 1
            if not self.is_resumable:
                self._first += len(log)
                log.clear()
            self._changed.notify_all()
            return events
