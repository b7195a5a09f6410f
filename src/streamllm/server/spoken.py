"""One reply of a conversation as a run drives it: its chunks, what it has cost, and letting go of the conversation.

Knows the conversation, but no API: how a reply is told is its subclasses' (``chat_route``, ``responses_route``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamllm.loop import Chunk
from streamllm.reply import Reply, TurnRecord
from streamllm.server.continuation import Continuation
from streamllm.server.metrics import Metrics


class Spoken:
    """A reply.

    Args:
        held: the conversation, held until ``release``.
        reply: the reply in it.
        metrics: told what it has cost.

    Attributes:
        is_streamed: whether nobody wants the text at the end, so that nothing of it is kept.
        text: so far, in pieces, unless it is streamed.
        record: what it has cost, once it has ended.
    """

    def __init__(self, held: Continuation, reply: Reply, metrics: Metrics) -> None:
        self.session_id, self.text, self.is_streamed = held.session_id, list[str](), False
        self.record: TurnRecord | None = None
        held.began(reply)
        self._held, self._reply, self._metrics = held, reply, metrics
        self._last: Chunk | None = None
        self._is_released = False
        self._frame = self._positions_freed()

    def chunks(self) -> Iterator[Chunk]:
        """The reply as it comes."""
        for chunk in self._reply:
            if self._last is None:
                self._began(chunk)
            self._last = chunk
            if chunk.text and not self.is_streamed:
                self.text.append(chunk.text)
            yield chunk

    def close(self) -> TurnRecord:
        """End the reply, if it has not; the record of it."""
        if self.record is None:
            self._reply.close()
            record = self.record = self._reply.record
            self._facts = self._told(record)
            self._held.done(self._reply)
            self._metrics.tokens_evicted.inc(max(0, record.tokens_evicted_now))
            self._metrics.recalled_passages.inc(len(record.recalled))
            self._metrics.window_occupancy.observe(record.occupancy)
            self._metrics.rebases.inc(self._positions_freed() != self._frame)
        return self.record

    def release(self) -> None:
        """Let the conversation go; a second time does nothing."""
        if self._is_released:
            return
        self._is_released = True
        try:
            self.close()
        finally:
            self._held.release()

    def finish(self) -> str:
        """Why it ended, as metrics and clients are told: "stop", "length" or "interrupted"."""
        finish = self.close().finish
        return "stop" if finish in ("end", "stop") else str(finish)

    def finish_reason(self) -> str:
        """The same in OpenAI's words: a reply that was interrupted is not whole."""
        return "stop" if self.finish() == "stop" else "length"

    def usage(self) -> tuple[int, int, int]:
        """Tokens before the reply, those of them that were not read anew, and tokens of the reply."""
        record, held = self.close(), self._held
        read = held.read_tokens + record.tokens_read
        return held.cached_tokens + read, held.cached_tokens, record.tokens_generated

    def facts(self) -> dict[str, Any]:
        """What only an endless conversation has to tell: the object ``streamllm``."""
        return self._facts if self.record is not None else self._told(self._reply.record)

    def _positions_freed(self) -> int:
        """Positions that rebases have given back so far: those of all tokens that left, but for the present frame."""
        cache = self._held.chat.cache
        return cache.tokens_evicted - cache.rows[0].frame

    def _began(self, chunk: Chunk) -> None:
        stats, metrics = chunk.stats, self._metrics
        read = self._reply.read
        metrics.prompt_tokens.inc(read + self._held.read_tokens)
        reading = read / stats.prefill_tokens_per_s if stats.prefill_tokens_per_s else 0.0
        metrics.queue_time.observe(max(0.0, (stats.ttft_s or 0.0) - reading))

    def _told(self, record: TurnRecord) -> dict[str, Any]:
        chat, stats = self._held.chat, None if self._last is None else self._last.stats
        config = chat.cache.config
        speed = stats.decode_tokens_per_s if stats is not None else 0.0
        return {
            "session_id": self.session_id,
            "how": self._held.how,
            "turn": record.turn,
            "turns": chat.turns,
            "tokens_seen": record.tokens_seen,
            "tokens_cached": record.tokens_cached,
            "tokens_evicted": record.tokens_evicted,
            "turns_evicted": record.turns_evicted,
            "evicted_now": record.evicted_now,
            "tokens_evicted_now": record.tokens_evicted_now,
            "occupancy": round(record.occupancy, 4),
            "pinned": chat.cache.rows[0].pinned,
            "window": config.window,
            "capacity": chat.cache.capacity,
            "cache_bytes": chat.cache.bytes if stats is None else stats.cache_bytes,
            "ms_per_token": round(1000 / speed, 3) if speed else None,
            "recalled": [{"turn": p.turn, "role": p.role, "text": p.text} for p in record.recalled],
            "finish": record.finish,
            "notes": list(chat.notes),
        }
