"""One stream of an engine as its user holds it: an iterator of chunks, for threads and for asyncio.

The engine's thread pushes, the user's takes. What waits between them is bounded: a stream that nobody reads stands
still, and holds nobody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Literal

from streamllm.cache import SinkCache
from streamllm.loop import Chunk, Turn

BUFFER = 256
"""Chunks that wait for their reader at most; then the stream stands still, until half of them are taken."""

State = Literal["waiting", "reading", "decoding", "suspended", "done"]


class Request:
    """A stream in an engine; made by ``Engine.submit``. Iterate over it, in a thread or in asyncio.

    Attributes:
        id: counts from 1 in each engine.
        state: "waiting" for a slot, "reading" its prompt, "decoding", "suspended", or "done".
        error: why it ended, if it failed; raised from the iterator too, after the last chunk.
        is_held: its cache is looked at, so it stays in memory.
        is_full: so much waits for the reader that the stream stands still. It goes on when half of that is taken: to
            give a slot back for each token would cost more than the token.
    """

    def __init__(
        self,
        number: int,
        turn: Turn,
        stop_when: Callable[[Chunk], bool] | None,
        wake: Callable[[], None],
        worker: threading.Thread,
    ) -> None:
        self.id = number
        self.state: State = "waiting"
        self.error: BaseException | None = None
        self.turn = turn
        self.stop_when = stop_when
        self.is_cancelled = self.is_suspended = False
        self.is_begun = self.is_full = self.is_held = False
        self.tokens_in_slot = 0  # since it got its slot
        self._wake = wake
        self._worker = worker
        self._changed = threading.Condition()
        self._trace: TracebackType | None = None  # of the error
        self._chunks: deque[Chunk] = deque()
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    # ---- for the user

    @property
    def cache(self) -> SinkCache:
        """The stream itself, to go on with when it is done.

        Raises:
            RuntimeError: it is not done.
        """
        if self.state != "done":
            raise RuntimeError("The cache belongs to the engine until the stream is done.")
        return self.turn.cache

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks, as they come.

        Raises:
            StreamLLMError: the stream failed.
        """
        return self

    def __next__(self) -> Chunk:
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self.state == "done")
            chunk = self._pop()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """The same in asyncio, without a thread."""
        return self

    async def __anext__(self) -> Chunk:
        while True:
            with self._changed:
                if self._chunks or self.state == "done":
                    chunk = self._pop()
                    break
                loop = asyncio.get_running_loop()
                sleeper: asyncio.Future[None] = loop.create_future()
                self._sleepers.append((loop, sleeper))
            try:
                await sleeper
            finally:
                with self._changed:  # broken off, maybe: nothing may pile up
                    self._sleepers = [pair for pair in self._sleepers if pair[1] is not sleeper]
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def text(self) -> str:
        """Wait for the end; the whole text that was not taken yet."""
        return "".join(chunk.text for chunk in self)

    def cancel(self) -> None:
        """End the stream before its next token; what was read and generated stays in its cache."""
        self.is_cancelled = True
        self._wake()

    def close(self) -> None:
        """``cancel``, and wait until that is done. What came before and was not taken can still be taken."""
        self.cancel()
        if threading.current_thread() is self._worker:  # which collects garbage just now, and must not wait for itself
            return
        with self._changed:
            self._changed.wait_for(lambda: self.state == "done")

    def ready(self) -> list[Chunk]:
        """Take what has come, without waiting; raises nothing, whatever the stream ended by."""
        with self._changed:
            chunks = list(self._chunks)
            self._chunks.clear()
            if self.is_full:
                self.is_full = False
                self._wake()
            return chunks

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Let the stream stand still meanwhile, its cache in memory: it may be looked at, unless the stream is done."""
        self.is_held = True
        self.suspend()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self.state in ("suspended", "done"))
            yield
        finally:
            self.is_held = False
            self.resume()

    def suspend(self) -> None:
        """Give the slot up before the next token, until ``resume``."""
        self.is_suspended = True
        self._wake()

    def resume(self) -> None:
        """Go on after ``suspend``, when a slot is free."""
        self.is_suspended = False
        self._wake()

    # ---- for the engine

    def push(self, chunk: Chunk) -> None:
        """Hand a chunk to the reader."""
        with self._changed:
            self._chunks.append(chunk)
            self.is_full |= len(self._chunks) >= BUFFER
            self._tell()

    def moved(self) -> None:
        """Its state has changed."""
        with self._changed:
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self._changed:
            self.error, self.state = error, "done"
            self._trace = None if error is None else error.__traceback__
            self._tell()

    def _pop(self) -> Chunk | None:
        """The next chunk; ``None`` at the end; called with the lock held."""
        if self._chunks:
            chunk = self._chunks.popleft()
            if self.is_full and len(self._chunks) <= BUFFER // 2:
                self.is_full = False
                self._wake()
            return chunk
        if self.error is not None:
            raise self.error.with_traceback(self._trace)  # or it grows each time
        return None

    def _tell(self) -> None:
        """Wake whoever waits; called with the lock held."""
        self._changed.notify_all()
        for loop, sleeper in self._sleepers:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
                loop.call_soon_threadsafe(_settle, sleeper)
        self._sleepers.clear()


def _settle(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
