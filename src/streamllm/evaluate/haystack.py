"""How long a search takes in a transcript of any length, of other talk but for a few facts at its beginning.

No model reads it: the transcript is written as a conversation writes it, turn by turn.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from streamllm.evaluate.chatter import Chatter
from streamllm.evaluate.facts import Fact
from streamllm.passages import Place
from streamllm.recall import WordIndex, matching
from streamllm.transcript import Transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_CHARS = 600
"""Of a turn, as in a conversation."""

SENTENCES = 100
"""Of other talk that are searched for, beside the questions."""


def measure(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    chatter: Chatter,
    draw: random.Random,
    tokens: int,
    watch: Callable[[int], None],
) -> dict[str, Any]:
    """Write a transcript of ``tokens`` and search in it.

    Args:
        watch: is told after each turn how many tokens there are; may raise.

    Returns:
        Tokens, searches, milliseconds of one (median, 95th percentile, most), and of the questions how many were found;
        ready for JSON.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    transcript = Transcript()
    try:
        written = 0
        texts = iter([fact.statement for fact in facts])
        while written < tokens:
            text = next(texts, None) or chatter.talk(draw, TURN_CHARS)
            ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            transcript.begin(text, prompt_ids=ids, count=count)
            transcript.end("length")
            written += len(ids)
            watch(written)
        index, place = WordIndex(transcript), Place(transcript.count() + 1, 0)
        found, taken = [], []
        for number in range(2 * len(facts) + SENTENCES):
            fact = facts[number // 2] if number < 2 * len(facts) else None
            text = (fact.reworded if number % 2 else fact.question) if fact else chatter.sentence(draw)
            began = time.perf_counter()
            passages = matching(index, text, place, count=count)
            taken.append(1000 * (time.perf_counter() - began))
            if fact:
                found.append(any(fact.statement in passage.text for passage in passages))
        return {
            "tokens": written,
            "turns": transcript.count(),
            "searches": len(taken),
            "ms": {"median": median(taken), "p95": quantiles(taken, n=20)[-1], "max": max(taken)},
            "found": {"own": sum(found[0::2]), "other": sum(found[1::2]), "of": len(facts)},
        }
    finally:
        transcript.close()
