"""The replies that run: each in a thread of its own, so that what is said goes to disk as it comes.

Begins them, breaks them off, forgets them, and counts what they cost. Knows neither what the events of a reply say nor
where its chunks come from (``run.Choice``).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from streamllm.engine import Engine
from streamllm.request import Request
from streamllm.server.bell import Bell
from streamllm.server.metrics import Metrics
from streamllm.server.refusal import Refusal, refusal_of
from streamllm.server.run import Choice, Run

KEPT = 256
"""Resumable replies that have ended and are still known; the oldest are forgotten first."""

LINGER = 300.0
"""Seconds that a resumable reply goes on without a reader, and that it is known after its end."""

_log = logging.getLogger("streamllm.server")
_current = threading.local()


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was broken off before its stream began."""


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
                run.session_id = getattr(run.choices[0], "session_id", None)
                _side_by_side(run, drive)
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
                    if not is_silent:  # it is known for a while, and must not keep conversations in memory
                        run.choices = ()

        def drive(choice: Choice) -> None:
            _current.run = run
            try:
                self._drive(run, choice)
            except BaseException as error:
                self._fail(run, error)

        try:
            threading.Thread(target=work, name=f"streamllm-run-{names[0]}", daemon=True).start()
        except RuntimeError as error:  # the system has no thread left
            with self._lock:
                self._running.discard(run)
                for name in names:
                    self._kept.pop((owner, name), None)
            leave(run)
            raise Refusal(503, "The server has no thread left for this; try again later.") from error
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
        """Read one reply to its end, which comes by itself if it is cancelled."""
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


def _side_by_side(run: Run, drive: Callable[[Choice], None]) -> None:
    """Drive each reply in a thread, the first one in this one; if one cannot begin, all are broken off."""
    choices, threads = run.choices, list[threading.Thread]()
    try:
        for choice in choices[1:]:
            thread = threading.Thread(target=drive, args=(choice,), daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as error:  # the system has no thread left
        run.cancel()
        for choice in (choices[0], *choices[1 + len(threads) :]):
            choice.release()
        raise Refusal(503, "The server has no thread left for this; try again later.") from error
    else:
        drive(choices[0])
    finally:
        for thread in threads:
            thread.join()
