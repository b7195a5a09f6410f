"""Recall: finding what was said and has left the window, and quoting it in front of a turn.

Knows the transcript, not the model: where the window begins is told by a ``Place``, and how many tokens a text has by a
function. An ``Index`` finds passages; ``WordIndex`` does by their words (BM25, FTS5 of SQLite), ``EmbeddingIndex`` in
``embeddings`` by their meaning, and ``MergedIndex`` by several at once.

Most turns need nothing that was said before, and a passage that does not belong there does harm. So ``worth_quoting``
is stricter than ``search``: it weighs each word of a turn by how few passages hold it, and asks that a passage holds a
fair share of that weight, and more of it than some passage would by chance.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from streamllm.passages import Passage, Place
from streamllm.transcript import Transcript
from streamllm.words import bare, terms

BUDGET_TOKENS = 256
"""What is put in front of a turn has at most so many tokens, unless said otherwise."""

MOST_QUOTED = 4
"""Passages quoted for a turn that asks for something, besides what answered them; for other turns it is one."""

SHARE_ASKED, SHARE = 0.4, 0.6
"""Share of the weight of a turn's words that a passage must hold: the best one for a turn that asks, and any other.
Measured on facts among 100 000 tokens of stories and books: 0.4 finds the reworded questions too; 0.5 instead of 0.6
quotes twice as much for turns that ask for nothing."""

MARGIN = 1.5
"""A passage's weight may be so much below the logarithm of the number of passages, at which one passage would hold as
much by chance. A fact that was told four times still passes."""

NEAR = 0.8
"""A passage that holds so much of the weight that the best one holds is as good; one that holds less is about
something else: the code of another box."""

MOST_WORDS = 8
"""So many words of a turn are looked at, those that the fewest passages hold."""

COMMON_SHARE, COMMON_LEAST, COMMON_MOST = 0.1, 500, 2000
"""A word in more than this share of all passages tells nothing, nor one in more than 2000; one in up to 500 may."""

READ_CHARS = 500
"""Characters looked at from either end of a turn: a question stands before or behind what was pasted."""

FUSION = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009), and how many ranks are fused."""

# Words of grammar and of talk about talk; how rare they are says nothing while a conversation is young.
_EMPTY = frozenset(
    """
a about after again all also am an and another any are as at be because been before being but by bye can continue cool
could d did do does doing don down each earlier else example explain few for forget forgot from further get give go
going good great had happen happened happens has have having he hello help her here hers hey hi him his how i if in into
is it its just know let like ll lot m made make many may me mention mentioned might mine more most must my next nice no
nor not now of off oh ok okay on once one only or other our ours out over own please re really recall remember remind s
said same say see shall she should simple simpler so some still story such sure t take talk tell than thank thanks that
the their theirs them then there these they thing things think this those through to told too under until up us ve very
want was we well were what when where which while who whom whose why will with word words would yes yet you your yours
""".split()
)

_SIGNS = ("?", "？", "؟")

_SENTENCE_END = re.compile(r"(?<=[.!?؟])\s+|(?<=[。！？])|\n+")

_ASKING = re.compile(
    r"\W*((\w+\W+){0,2}(what|who|whom|whose|where|which|how|remind|tell)|do|does|did|can|could)\b", re.IGNORECASE
)
"""A text that begins so asks, with or without a question mark."""


class Index(Protocol):
    """Finds passages of one transcript."""

    transcript: Transcript

    def search(self, words: str, *, before: Place | None = None, limit: int = 10) -> list[Passage]:
        """The passages that match best, the best first.

        Args:
            words: what to look for.
            before: only passages that have left a window which begins here; ``None``: all.
            limit: how many at most.
        """

    def worth_quoting(self, text: str, *, before: Place | None = None, limit: int = MOST_QUOTED) -> list[Passage]:
        """The passages that a turn refers to, the best first; none for most turns.

        Args:
            text: what the user says.
            before, limit: as for ``search``.
        """


class _Word(NamedTuple):
    """A word of a turn: its weight, and the passages that hold it."""

    weight: float
    term: str
    holders: list[int]


class WordIndex:
    """Finds passages by their words."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript

    def search(self, words: str, *, before: Place | None = None, limit: int = 10) -> list[Passage]:
        """As ``Index.search``: by BM25, any of the words that tell something; else the newest passages with all."""
        last, index = self.transcript.last_left(before), self.transcript.words
        if wanted := [word.term for word in self._telling(words, last) if word.holders]:
            scores = dict(index.best(wanted, last, limit))
        else:
            held = [term for term in terms(words)[:MOST_WORDS] if index.holders(term, last, 1)]
            scores = dict.fromkeys(index.holders(" AND ".join(held), last, limit) if held else [], 0.0)
        return [replace(found, score=scores[found.id]) for found in self.transcript.passages(scores)]

    def worth_quoting(self, text: str, *, before: Place | None = None, limit: int = MOST_QUOTED) -> list[Passage]:
        """As ``Index.worth_quoting``; the score is the weight of the words that a passage holds."""
        last = self.transcript.last_left(before)
        words, is_asking = self._telling(text, last), asks(text)
        weights: defaultdict[int, float] = defaultdict(float)
        for word in words:
            for id in word.holders:
                weights[id] += word.weight
        if not weights or (len(words) == 1 and not is_asking):  # "Good morning!"
            return []
        total, best = sum(word.weight for word in words), max(weights.values())
        least = max(math.log(last + 1) - MARGIN, NEAR * best, (SHARE_ASKED if is_asking else SHARE) * total)
        order = sorted((id for id in weights if weights[id] >= least), key=lambda id: (-weights[id], -id))
        order = order[:1] + [id for id in order[1 : 4 * limit] if weights[id] >= SHARE * total]
        found = [replace(passage, score=weights[passage.id]) for passage in self.transcript.passages(order)]
        # Of passages that hold the same words, those that say something go before those that asked for it.
        found.sort(key=lambda passage: (-passage.score, _is_question(passage)))
        unlike: dict[str, Passage] = {}
        for passage in found:
            unlike.setdefault(_folded(passage.text), passage)
        return list(unlike.values())[:limit]

    def _telling(self, text: str, last: int) -> list[_Word]:
        """The words of a text that tell passages apart, the heaviest first; a word that nobody said is as heavy."""
        common = min(max(COMMON_LEAST, int(COMMON_SHARE * last)), COMMON_MOST)
        words = []
        for term in terms(_ends(text)):
            if bare(term) in _EMPTY:
                continue
            holders = self.transcript.words.holders(term, last, common + 1)
            if len(holders) <= common:
                words.append(_Word(math.log((last + 1) / max(1, len(holders))), term, holders))
        return sorted(words, key=lambda word: -word.weight)[:MOST_WORDS]


class MergedIndex:
    """Finds passages by several indexes of one transcript: reciprocal rank fusion of what each of them finds."""

    def __init__(self, *indexes: Index) -> None:
        self.transcript = indexes[0].transcript
        self._indexes = indexes

    def search(self, words: str, *, before: Place | None = None, limit: int = 10) -> list[Passage]:
        """As ``Index.search``."""
        return _fused([index.search(words, before=before, limit=max(limit, FUSION)) for index in self._indexes], limit)

    def worth_quoting(self, text: str, *, before: Place | None = None, limit: int = MOST_QUOTED) -> list[Passage]:
        """As ``Index.worth_quoting``; what one index alone finds worth it counts."""
        return _fused([index.worth_quoting(text, before=before, limit=limit) for index in self._indexes], limit)


def matching(
    index: Index, text: str, place: Place, *, count: Callable[[str], int], budget_tokens: int = BUDGET_TOKENS
) -> list[Passage]:
    """The passages to quote in front of a turn: they have left the window, and ``quote`` of them is within the budget.

    A question that was asked before brings along what answered it.

    Args:
        index: finds them.
        text: what the user says.
        place: where the window begins.
        count: how many tokens a text has.
        budget_tokens: how many tokens the quotation may have.

    Returns:
        The passages in the order in which they were said; none if nothing said before belongs there.
    """
    chosen: dict[int, Passage] = {}
    for part in _parts(text):
        is_asking = asks(part)
        for found in index.worth_quoting(part, before=place, limit=MOST_QUOTED if is_asking else 1):
            answers = index.transcript.passages([found.id + 1]) if is_asking and _is_question(found) else []
            answers = [answer for answer in answers if place.has_left(answer)]
            questions = [] if _folded(found.text) == _folded(part) else [found]
            for group in ([*questions, *answers], questions):
                wider = {**chosen, **{passage.id: passage for passage in group}}
                if count(quote(list(wider.values()))) <= budget_tokens:
                    chosen = wider
                    break
    return [chosen[id] for id in sorted(chosen)]


def fitting(passages: Sequence[Passage], *, count: Callable[[str], int], budget_tokens: int) -> list[Passage]:
    """As many of ``passages``, those that come first before others, as ``quote`` has room for within the budget."""
    chosen: list[Passage] = []
    for passage in passages:
        if count(quote([*chosen, passage])) <= budget_tokens:
            chosen.append(passage)
    return chosen


def quote(passages: Sequence[Passage]) -> str:
    """What is put in front of a user's text: the passages, each on a line with its turn; empty if there are none."""
    if not passages:
        return ""
    lines = [
        f'(Earlier, turn {passage.turn}, {passage.role}: "{" ".join(passage.text.split())}")'
        for passage in sorted(passages, key=lambda passage: passage.id)
    ]
    return "\n".join([*lines, "", ""])


def asks(text: str) -> bool:
    """Whether a text asks for something, as far as that shows in its signs and first words."""
    return any(sign in text for sign in _SIGNS) or bool(_ASKING.match(text))


def _parts(text: str) -> list[str]:
    """What a turn asks, sentence by sentence, and the whole turn: what else it says may be about something else."""
    sentences = [sentence for sentence in _SENTENCE_END.split(_ends(text)) if sentence.strip()]
    asking = [sentence for sentence in sentences if asks(sentence)] if len(sentences) > 1 else []
    return [*asking[:1], *asking[1:][-2:], text]


def _ends(text: str) -> str:
    """The beginning and the end of a text that is long."""
    return text if len(text) <= 2 * READ_CHARS else f"{text[:READ_CHARS]}\n{text[-READ_CHARS:]}"


def _is_question(passage: Passage) -> bool:
    """Whether a passage ends with a question of the user, so that what comes next answers it."""
    return passage.role == "user" and passage.text.rstrip().endswith(_SIGNS)


def _folded(text: str) -> str:
    """A text without what does not change what it says."""
    return " ".join(text.lower().split())


def _fused(rankings: Sequence[Sequence[Passage]], limit: int) -> list[Passage]:
    """Reciprocal rank fusion of several rankings; the score is what the ranks give."""
    scores: defaultdict[int, float] = defaultdict(float)
    passages = {passage.id: passage for ranking in rankings for passage in ranking}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, 1):
            scores[passage.id] += 1 / (FUSION + rank)
    best = sorted(scores, key=lambda id: -scores[id])[:limit]
    return [replace(passages[id], score=scores[id]) for id in best]
