"""How much runs at once: in all, and for one key; what is beyond is refused, with a time to come back.

Counts streams, not requests: a request for three choices counts as three.
"""

from __future__ import annotations

import threading
from collections import Counter

from streamllm.server.refusal import Refusal


class Limits:
    """Counts what runs.

    Args:
        most: streams at once in all.
        per_key: streams at once of one key; ``None``: no limit but ``most``.
        max_tokens: tokens of one stream; ``None``: no limit.
    """

    def __init__(self, most: int, per_key: int | None = None, max_tokens: int | None = None) -> None:
        self.most, self.per_key, self.max_tokens = most, per_key, max_tokens
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def admit(self, owner: str, streams: int = 1) -> None:
        """Count streams that begin.

        Raises:
            Refusal: there are too many.
        """
        if streams > min(self.most, self.per_key or self.most):
            raise Refusal(
                400,
                f"{streams} replies were asked for at once; this server makes at most "
                f"{min(self.most, self.per_key or self.most)}.",
                param="n",
            )
        with self._lock:
            if self.per_key is not None and self._running[owner] + streams > self.per_key:
                raise Refusal(429, f"This key has {self._running[owner]} replies running, the most it may have.")
            if (here := self._running.total()) + streams > self.most:
                raise Refusal(429, f"{here} replies run or wait, the most that this server takes: try again later.")
            self._running[owner] += streams

    def leave(self, owner: str, streams: int = 1) -> None:
        """Streams have ended."""
        with self._lock:
            self._running[owner] -= streams
            if self._running[owner] <= 0:
                del self._running[owner]  # owners come and go

    def cap(self, asked: int | None) -> int | None:
        """Tokens that a stream may have."""
        if asked is None or self.max_tokens is None:
            return self.max_tokens if asked is None else asked
        return min(asked, self.max_tokens)
