"""Bringing a stream to where a transcript says that it is: reading anew, and drawing again what was drawn.

Knows turns as ids; nothing here knows about files or snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.cache import SinkCache
from streamllm.loop import Turn
from streamllm.sampling import Sampler
from streamllm.template import ChatTemplate
from streamllm.transcript import Transcript, TurnRow


def read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: SinkCache, ids: Sequence[int]) -> None:
    """Read ``ids``; the last one stays in ``cache.unread``, for only its logits can begin a text."""
    turn = Turn(model, tokenizer, cache, ids, max_tokens=0)
    for _ in turn.read():
        pass
    turn.leave_unread()


def replay(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: SinkCache,
    sampler: Sampler,
    prompt: Sequence[int] | None,
    reply: Sequence[int],
    *,
    is_ended: bool,
) -> None:
    """Read a turn as it was read, and draw its reply again: the stream and the random numbers are then where they were.

    Args:
        model, tokenizer, cache, sampler: of the stream.
        prompt: ids of the turn; ``None``: they are read, and more of the reply follows.
        reply: ids that were drawn. Where other ones are drawn now (another machine), these count.
        is_ended: an end token was drawn after them.
    """
    if prompt is not None:
        sampler.begin()
    turn = Turn(model, tokenizer, cache, prompt, sampling=sampler)
    for _ in turn.read():
        pass
    if not reply and not is_ended:
        turn.leave_unread()
        return
    logits = turn.first_logits()
    for place, token in enumerate(reply):
        if sampler(logits) != token:
            sampler.correct(token)
        cache.unread = [token]
        if place < len(reply) - 1 or is_ended:
            logits = turn.forward([token])
    if is_ended:
        sampler(logits)


@dataclass(frozen=True)
class Piece:
    """A turn to be read anew.

    Args:
        number: of the turn.
        ids: what to read.
        closing: how many of them close the turn before.
        skipped: tokens of the turn that are not among them, because it is longer than the window.
    """

    number: int
    ids: list[int]
    closing: int
    skipped: int


def tail(
    transcript: Transcript,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    foreign: int,
) -> list[Piece]:
    """The newest turns that fit into ``window`` tokens, at least the end of the last one.

    ``foreign``: turns up to this number were spelt by another tokenizer, so their texts are encoded anew.
    """
    rows: list[TurnRow] = []
    left = window
    for row in transcript.turns(newest_first=True):
        if rows and row.prompt_tokens + row.reply_tokens > left:
            break
        rows.append(row)
        left -= row.prompt_tokens + row.reply_tokens
    rows.reverse()
    kept: list[Piece] = []
    for place, row in enumerate(rows):
        content = row.preface + row.user
        head: list[int] = []
        if place:
            end_id = rows[place - 1].end_id if rows[place - 1].number > foreign else None
            ids, closing = template.following(content, end_id), template.closing(end_id)
        else:
            head, ids, closing = template.head, template.opening(content), 0
        if row.number > foreign:
            ids = ids + transcript.reply_ids(row.number)
        else:
            ids = ids + list(tokenizer(row.reply, add_special_tokens=False)["input_ids"])
        skipped = max(0, len(ids) - window)
        kept.append(Piece(row.number, head + ids[skipped:], closing, skipped))
    return kept
