"""What a model has before it in a conversation: the cache, which turns are in it, and what draws.

Knows how a turn enters the window, how the window is read anew from a transcript, and how a stream is brought to where
a transcript says that it is; not who says what, or when it is saved (``session``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.cache import SinkCache
from streamllm.config import CacheConfig
from streamllm.errors import ConfigError, StateError
from streamllm.passages import Place
from streamllm.replay import read, replay, tail
from streamllm.residents import Residents
from streamllm.sampling import Sampler
from streamllm.snapshots import Snapshot
from streamllm.state import SavedStream
from streamllm.template import ChatTemplate
from streamllm.transcript import Transcript, TurnRow


@dataclass
class Context:
    """The stream of a conversation.

    Args:
        model, tokenizer: who reads.
        template: how turns are spelt.
        asked: the cache that was asked for; the head of the template is pinned on top of its sinks.
        sampler: what draws.

    Attributes:
        cache: what the model sees.
        residents: the turns that are in it.
        tokens_reread: that were read once more, because there was no stream to go on with.

    Raises:
        ConfigError: the cache cannot be had, or the system prompt is larger than the window.
        UnsupportedModelError: the model cannot stream.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    asked: CacheConfig
    sampler: Sampler

    def __post_init__(self) -> None:
        self.cache = self._new_cache(self.template)
        self.residents = Residents()
        self.tokens_reread = 0

    # ---- counters

    @property
    def window(self) -> int:
        """Tokens of the window."""
        return self.cache.config.window or 0

    @property
    def tokens_seen(self) -> int:
        """Tokens of the conversation so far."""
        return self.residents.before + self.cache.tokens_seen

    @property
    def tokens_evicted(self) -> int:
        """Tokens of the conversation that have left the window."""
        return max(0, self.tokens_seen - self.cache.tokens_cached)

    @property
    def oldest(self) -> int:
        """Number of the oldest turn that has a token in the window."""
        self.residents.let_go(self._gone)
        return self.residents.oldest

    @property
    def place(self) -> Place:
        """Up to where the conversation has left the window."""
        self.residents.let_go(self._gone)
        return self.residents.place(self._gone)

    @property
    def _gone(self) -> int:
        """All tokens of the cache's stream below this one have left, but for the pinned head."""
        evicted = self.cache.tokens_evicted
        return self.cache.rows[0].pinned + evicted if evicted else 0

    # ---- turns

    def piece(self, content: str, transcript: Transcript) -> tuple[list[int], int]:
        """The ids of the next turn, and how many of them still belong to the last one."""
        last = transcript.last()
        if last is None:
            return self.template.head + self.template.opening(content), 0
        end_id = _end_id(last, transcript)
        return self.template.following(content, end_id), self.template.closing(end_id)

    def enter(self, number: int, closing: int, ahead: int = 0, behind: int = 0) -> None:
        """Turn ``number`` begins with what is read next, of which ``closing`` tokens still belong to the turn before.

        ``ahead``: so many tokens are counted to what comes before. Of a turn that is not read as it first was, it is
        not known where its parts lie in the window; then all of it counts as there until all of it has left.
        ``behind``: so many tokens of earlier turns are read first.
        """
        unread = len(self.cache.unread) + behind
        self.residents.begin(number, self.cache.tokens_seen + unread + ahead)
        self.cache.mark(unread + closing)

    def snapshot(self, number: int) -> Snapshot:
        """The stream where turn ``number`` begins."""
        return Snapshot(number, self.cache.fork(), tuple(self.sampler.recent), self.residents.copy())

    def go_back(self, snapshot: Snapshot) -> None:
        """Be as at ``snapshot`` again; the random numbers go on."""
        self.cache, self.residents = snapshot.cache.fork(), snapshot.residents.copy()
        self.sampler.recent.clear()
        self.sampler.observe(snapshot.recent)

    def copy(self) -> Context:
        """An independent copy that draws alike."""
        sampler = Sampler.from_state(self.sampler.state(), device=self.model.device)
        other = Context(self.model, self.tokenizer, self.template, self.asked, sampler)
        other.cache, other.residents = self.cache.fork(), self.residents.copy()
        return other

    # ---- reading anew

    def change(self, template: ChatTemplate) -> None:
        """Spell by another template from now on; what was read is gone.

        Raises:
            ConfigError: its system prompt is larger than the window; nothing has changed then.
        """
        self.cache = self._new_cache(template)
        self.template, self.residents = template, Residents()

    def reread(self, transcript: Transcript) -> None:
        """Read the newest turns that fit into the window anew."""
        self.change(self.template)
        if not self.template.is_incremental or not transcript.count():
            return
        foreign = transcript.get("foreign", 0)
        pieces = tail(transcript, self.template, self.tokenizer, self.window, foreign)
        for piece in pieces:
            self.enter(piece.number, piece.closing, len(piece.ids))
            read(self.model, self.tokenizer, self.cache, piece.ids)
            self.sampler.observe(piece.ids)
            self.tokens_reread += len(piece.ids)
        self.residents.before = transcript.tokens() - sum(len(piece.ids) for piece in pieces)

    def whole(self, transcript: Transcript, content: str, before: int) -> tuple[list[int], int]:
        """The ids of turn ``before`` with as many of those in front of it as fit, and the number of the first of them.

        For templates without pieces.
        """
        messages, first = [_said(content)], before
        ids = self.template.whole(messages)
        for number in range(before - 1, 0, -1):
            row = transcript.turn(number)
            messages = [_said(row.preface + row.user), {"role": "assistant", "content": row.reply}, *messages]
            longer = self.template.whole(messages)
            if len(longer) > self.window:
                break
            ids, first = longer, number
        return ids, first

    def forget(self, tokens: int, first: int) -> None:
        """Empty the cache for a window that begins with turn ``first``, and behind ``tokens`` of the conversation."""
        self.cache.reset()
        self.residents = Residents(before=tokens)
        self.residents.begin(first, len(self.template.head))

    def reopen(self, transcript: Transcript) -> None:
        """Know what was in the window of a conversation that is read as a whole at each turn, before the next one."""
        last = transcript.last()
        if last is not None:
            ids, first = self.whole(transcript, last.preface + last.user, last.number)
            self.forget(transcript.tokens() - len(ids) - last.reply_tokens, first)

    # ---- on disk

    def metadata(self, transcript: Transcript) -> dict[str, Any]:
        """What a saved stream must know to go on, ready for JSON."""
        number, id, tokens, finish = transcript.tip()
        return {
            "turn": number,
            "id": id,
            "tokens": tokens,
            "finish": finish,
            "residents": self.residents.state(),
            "head": self.template.head,
        }

    def catch_up(self, saved: SavedStream, place: dict[str, Any], transcript: Transcript) -> None:
        """Go on from a saved stream, and from what the transcript has beyond it.

        Args:
            saved: the stream; its sampler must have been put in place.
            place: its ``metadata``.
            transcript: what was said.

        Raises:
            StateError: the stream does not fit.
            KeyError, TypeError, ValueError: it is damaged.
        """
        if not self.template.is_incremental or place["head"] != self.template.head:
            raise StateError("The chat template has changed since the session was saved.")
        number = place["turn"]
        first = transcript.turn(number) if 0 < number <= transcript.count() else None
        if number and (first is None or first.id != place["id"] or first.reply_tokens < place["tokens"]):
            raise StateError("The saved state is of another course of the conversation.")
        self.cache, self.residents = saved.cache, Residents.from_state(place["residents"])
        if first is not None and (place["tokens"], place["finish"]) != (first.reply_tokens, first.finish):
            self._replay(first, None, transcript.reply_ids(number)[place["tokens"] :])
        last = first
        for row in transcript.turns(number + 1):
            ids = transcript.prompt_ids(row.number)
            self.enter(row.number, self.template.closing(_end_id(last, transcript)) if last else 0)
            self._replay(row, ids, transcript.reply_ids(row.number))
            last = row

    def _replay(self, row: TurnRow, prompt: list[int] | None, ids: list[int]) -> None:
        self.tokens_reread += len(prompt or ()) + len(ids)
        replay(self.model, self.tokenizer, self.cache, self.sampler, prompt, ids, is_ended=row.finish == "end")

    def _new_cache(self, template: ChatTemplate) -> SinkCache:
        """An empty cache with room for the pinned head."""
        asked, head = self.asked, len(template.head)

        def made(sinks: int) -> SinkCache:
            return SinkCache(self.model, sinks, asked.window, asked.block, kv_dtype=asked.kv_dtype)

        if head <= asked.sinks:
            return made(asked.sinks)
        window = made(asked.sinks).config.window or 0  # as it would be without the prompt
        sizes = f"The system prompt has {head} tokens, the window {window}"
        try:
            cache = made(head)
        except ConfigError as error:
            raise ConfigError(f"{sizes}: shorten the prompt, for both do not fit into the model. {error}") from error
        if head > (cache.config.window or 0):
            raise ConfigError(f"{sizes}: shorten it, or give a larger window.")
        return cache


def _end_id(row: TurnRow, transcript: Transcript) -> int | None:
    """The end token of a reply; none if another tokenizer drew it."""
    return row.end_id if row.number > transcript.get("foreign", 0) else None


def _said(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
