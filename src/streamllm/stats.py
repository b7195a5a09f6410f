"""What a stream has cost: tokens seen, kept and evicted, bytes, and seconds.

``Stats`` is the record that every surface shows; ``Meter`` measures it. ``EngineStats`` is that of many streams.
Nothing here knows about torch: whoever owns the cache passes its counts in. A meter keeps a handful of numbers however
long the stream is.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

try:
    import resource
except ImportError:  # pragma: no cover  # Windows has no such module
    resource = None  # type: ignore[assignment]

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in one unit of ``ru_maxrss``: bytes on macOS, KiB on Linux."""


@dataclass(frozen=True, slots=True)
class Stats:
    """The state of a stream at one moment.

    Args:
        tokens_seen: tokens that went through the model, read or generated.
        tokens_generated: tokens that were sampled.
        tokens_cached: tokens whose keys and values are held now.
        tokens_evicted: tokens that have left the cache.
        cache_bytes: bytes of keys and values held now.
        peak_rss_bytes: most memory the process has ever held, in bytes; 0 where the system does not tell.
        prefill_tokens_per_s: reading speed; 0 before anything was read.
        decode_tokens_per_s: generating speed over the tokens after the first; 0 before there are two.
        ttft_s: seconds until the first generated token; ``None`` before it.
    """

    tokens_seen: int
    tokens_generated: int
    tokens_cached: int
    tokens_evicted: int
    cache_bytes: int
    peak_rss_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_s: float | None

    def to_dict(self) -> dict[str, int | float | None]:
        """Return the fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    def line(self, *more: str) -> str:
        """Return the one line shown after a reply, with ``more`` in it; the speed is left out while it is unknown."""
        parts = [
            f"seen {grouped(self.tokens_seen)}",
            f"cached {grouped(self.tokens_cached)}",
            f"evicted {grouped(self.tokens_evicted)}",
            *more,
        ]
        if self.decode_tokens_per_s > 0:
            parts.append(f"{_speed(self.decode_tokens_per_s)} tok/s")
        return " · ".join(parts)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing.

    Args:
        running: streams in slots.
        waiting: streams that want one.
        suspended: streams that do not.
        on_disk: streams whose cache is on disk.
        slots: how many there are.
        bytes_per_stream: of a full cache.
        tokens_read, tokens_generated: since the engine began, over all streams.
        finished, failed: streams since the engine began.
        repeated: steps for all that failed, and were repeated stream by stream; since the engine began.
    """

    running: int
    waiting: int
    suspended: int
    on_disk: int
    slots: int
    bytes_per_stream: int
    tokens_read: int
    tokens_generated: int
    finished: int
    failed: int
    repeated: int


class Meter:
    """Measures one stream.

    Args:
        clock: seconds on a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._created = clock()
        self._first = self._last = self._created
        self._generated = 0
        self._read_tokens = 0
        self._read_seconds = 0.0

    def prefilled(self, n_tokens: int, seconds: float) -> None:
        """Record that ``n_tokens`` tokens were read in ``seconds``."""
        self._read_tokens += n_tokens
        self._read_seconds += seconds

    def decoded(self) -> None:
        """Record that one token was generated just now."""
        self._last = self._clock()
        if self._generated == 0:
            self._first = self._last
        self._generated += 1

    def stats(self, *, seen: int, cached: int, evicted: int, cache_bytes: int) -> Stats:
        """Return the record of this moment; the counts come from the cache, in tokens and bytes."""
        return Stats(
            tokens_seen=seen,
            tokens_generated=self._generated,
            tokens_cached=cached,
            tokens_evicted=evicted,
            cache_bytes=cache_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            prefill_tokens_per_s=_rate(self._read_tokens, self._read_seconds),
            decode_tokens_per_s=_rate(self._generated - 1, self._last - self._first),
            ttft_s=self._first - self._created if self._generated else None,
        )


def peak_rss_bytes() -> int:
    """Return the most memory this process has ever held, in bytes; 0 where the system does not tell.

    On Linux a process starts with the peak of the one that started it.
    """
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _rate(count: int, seconds: float) -> float:
    """Return ``count`` per second; 0 while nothing can be said."""
    return count / seconds if count > 0 and seconds > 0 else 0.0


def grouped(count: int) -> str:
    """Write a count with a space between the thousands."""
    return f"{count:,}".replace(",", " ")


def _speed(per_second: float) -> str:
    """Write a speed; a slow one keeps a decimal, or it would read as 0 or 1."""
    return f"{per_second:.1f}" if per_second < 10 else grouped(round(per_second))
