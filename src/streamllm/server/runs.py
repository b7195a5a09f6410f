"""Replies that run: each in a thread of its own, its events kept for a moment, and handed to readers in asyncio.

What waits between a reply and its reader is bounded: a slow reader holds its own stream up and no other. Who hangs up
ends the stream, unless it was asked to be resumable: then it goes on for a while, and its newest events can be had
again. Knows neither what the events say (``events``) nor where the chunks come from.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from streamllm.engine import Engine
from streamllm.loop import Chunk
from streamllm.request import Request
from streamllm.server.bell import Bell, Sleeper
from streamllm.server.events import event
from streamllm.server.metrics import Metrics
from streamllm.server.refusal import Refusal, refusal_of

BACKLOG = 256
"""Events that wait for a reader at most; then the reply stands still."""

REPLAY = 4096
"""Newest events of a resumable reply that can be had again."""

KEPT = 256
"""Resumable replies that have ended and are still known; the oldest are forgotten first."""

LINGER = 300.0
"""Seconds that a resumable reply goes on without a reader, and that it is known after its end."""

_log = logging.getLogger("streamllm.server")
_current = threading.local()


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


class Watched(Engine):
    """An engine that tells the run of this thread which stream is its own, so that it can be broken off."""

    def submit(self, *arguments: Any, **options: Any) -> Request:
        """As ``Engine.submit``."""
        run: Run | None = getattr(_current, "run", None)
        if run is not None and run.is_cancelled:
            raise Interrupted
        request = super().submit(*arguments, **options)
        if run is not None:
            run.has(request)
        return request


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was broken off before its stream began."""


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
        error: why it failed.
        is_done: whether nothing more comes.
    """

    def __init__(self, id: str, owner: str, *, is_resumable: bool, is_silent: bool, bell: Bell) -> None:
        self.id, self.owner, self.is_resumable, self.is_silent = id, owner, is_resumable, is_silent
        self.choices: Sequence[Choice] = ()
        self.error: Refusal | None = None
        self.is_done = self.is_cancelled = False
        self.began = self.left = time.monotonic()  # left: when it ended, or else when the last reader went
        self._bell = bell
        self._changed = threading.Condition()
        self._log: deque[bytes] = deque()
        self._first = 1  # number of the oldest event
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
            if self.is_resumable and len(self._log) > REPLAY and not any(r.next <= self._first for r in self._readers):
                self._log.popleft()
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


class Runs:
    """All runs of a server.

    Args:
        metrics: told of each token.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._running: set[Run] = set()
        self._kept: dict[tuple[str, str], Run] = {}  # resumable ones
        self._bell: Bell | None = None
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """How many go on."""
        return len(self._running)

    def start(
        self,
        names: Sequence[str],
        owner: str,
        prepare: Callable[[], Sequence[Choice]],
        sum_up: Callable[[Run], Iterable[bytes]],
        *,
        is_resumable: bool = False,
        is_silent: bool = False,
        leave: Callable[[Run], None] = lambda run: None,
    ) -> Run:
        """Begin to answer a request; called in the loop.

        Args:
            names: ids by which it can be found.
            owner: who asked.
            prepare: makes the replies; called in the thread.
            sum_up: the events after all replies have ended.
            is_resumable, is_silent: see ``Run``.
            leave: called when all replies have ended, before the last event.
        """
        loop = asyncio.get_running_loop()
        if self._bell is None or self._bell.loop is not loop:
            self._bell = Bell(loop)
        run = Run(names[0], owner, is_resumable=is_resumable, is_silent=is_silent, bell=self._bell)
        with self._lock:
            self._running.add(run)
            if is_resumable:
                self._sweep()
                for name in names:
                    self._kept[owner, name] = run

        def work() -> None:
            _current.run = run
            has_left = False  # before the last event: who has read it may come again at once
            try:
                run.choices = prepare()
                others = [threading.Thread(target=drive, args=(choice,), daemon=True) for choice in run.choices[1:]]
                for thread in others:
                    thread.start()
                drive(run.choices[0])
                for thread in others:
                    thread.join()
                has_left = True
                leave(run)
                for events in sum_up(run) if run.error is None else ():
                    run.emit(events)
            except BaseException as error:
                self._fail(run, error)
            finally:
                with self._lock:
                    self._running.discard(run)
                try:
                    if not has_left:
                        leave(run)
                finally:
                    run.end()

        def drive(choice: Choice) -> None:
            _current.run = run
            try:
                self._drive(run, choice)
            except BaseException as error:
                self._fail(run, error)

        threading.Thread(target=work, name=f"streamllm-run-{names[0]}", daemon=True).start()
        return run

    def find(self, owner: str, name: str) -> Run:
        """A resumable run.

        Raises:
            Refusal: there is none of this name, or it is forgotten.
        """
        with self._lock:
            self._sweep()
            run = self._kept.get((owner, name))
        if run is None:
            raise Refusal(404, f"There is no reply {name!r} to pick up: it was not resumable, or is forgotten.")
        return run

    def sweep(self) -> None:
        """Forget what nobody has come for; called now and then."""
        with self._lock:
            self._sweep()

    def interrupt(self) -> None:
        """Break all off."""
        with self._lock:
            running = list(self._running)
        for run in running:
            run.cancel()

    def _sweep(self) -> None:
        now = time.monotonic()
        for name, run in list(self._kept.items()):
            is_old = not run._readers and now - run.left > LINGER
            if is_old and not run.is_done:
                run.cancel()
            elif is_old:
                del self._kept[name]
        ended = [name for name, run in self._kept.items() if run.is_done]
        for name in ended[: max(0, len(ended) - KEPT)]:
            del self._kept[name]

    def _drive(self, run: Run, choice: Choice) -> None:
        """Read one reply to its end."""
        metrics, clock, last = self._metrics, time.monotonic, 0.0
        generated, observe = metrics.generation_tokens.inc, metrics.inter_token_latency.observe
        try:
            for chunk in choice.chunks():
                now = clock()
                events = choice.took(chunk)
                if last:
                    observe(now - last)
                    run.emit(events)
                else:
                    metrics.time_to_first_token.observe(now - run.began)
                    for first in choice.began():
                        run.emit(first)
                    run.emit(events)
                last = now
                generated()
                if run.is_cancelled:
                    break
            if not last:  # broken off before its first token
                for first in choice.began():
                    run.emit(first)
            end = list(choice.ended())
            choice.release()  # before the last events are told, for the same reason
            for last_events in end:
                run.emit(last_events)
            metrics.success[choice.finish()].inc()
            metrics.e2e_latency.observe(clock() - run.began)
        finally:
            choice.release()

    def _fail(self, run: Run, error: BaseException) -> None:
        """One reply has failed, and so has the run."""
        refusal = Refusal(503, "The reply was broken off.") if isinstance(error, Interrupted) else refusal_of(error)
        if refusal.status == 500:
            _log.error("a reply failed", exc_info=error)
        run.error = run.error or refusal
        run.cancel()
