"""One long conversation: facts are told at its beginning, and asked for again after so and so many tokens.

The conversation is a real ``Chat``, and every token of it is read by the model. Each question is asked in a copy of it
(``Chat.fork``), once with recall and once without, and the copy is thrown away: so no question is a passage for a later
one to find, each is asked at its distance whatever was asked before, and both answers come from the same stream. The
user talks, the model's replies in between are empty: they would say nothing about finding, and take hours.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from streamllm.evaluate.asked import Asked
from streamllm.evaluate.chatter import Chatter
from streamllm.evaluate.facts import IDLE, LEADS, Fact
from streamllm.session import Chat

TURN_CHARS = 600
"""Of a turn that says something else; about 150 tokens."""


@dataclass(frozen=True)
class _Reply:
    """What became of one question: of its turn, its text, and its seconds."""

    oldest: int
    read: int
    text: str
    recalled: tuple[Any, ...]
    search: float
    first: float


class Interview:
    """See the module.

    Args:
        chat: a conversation that has not begun, without recall.
        facts: to be told.
        distances: at which each is asked for, in tokens, rising.
        chatter: what else is said.
        draw: decides the words.
        answer_tokens: of a reply; 0: none is asked for.
    """

    def __init__(
        self,
        chat: Chat,
        facts: Sequence[Fact],
        distances: Sequence[int],
        chatter: Chatter,
        draw: random.Random,
        answer_tokens: int,
    ) -> None:
        self.chat, self.facts, self.distances, self.answer_tokens = chat, facts, distances, answer_tokens
        self._chatter, self._draw = chatter, draw
        self._told: list[tuple[int, int]] = []  # turn of each fact, and tokens of the conversation after it

    def lead(self, watch: Callable[[int], None]) -> list[Asked]:
        """Lead the conversation up to its last question.

        Args:
            watch: is told after each turn how many tokens the conversation has; may raise.
        """
        asked: list[Asked] = []
        due: list[tuple[int, int, int]] = []  # at which token, number of the distance, number of the fact
        for number, text in enumerate(self._turns()):
            self.chat.send(text, max_tokens=0).text()
            seen = self.chat.tokens_seen
            if number < len(self.facts):
                self._told.append((self.chat.turns, seen))
                for place, distance in enumerate(self.distances):
                    heapq.heappush(due, (seen + distance, place, number))
            while due and due[0][0] <= seen:
                _, place, fact = heapq.heappop(due)
                asked += [self._ask(place, fact, seen, is_reworded=is_reworded) for is_reworded in (False, True)]
            watch(seen)
            if not due and number >= len(self.facts) - 1:
                return asked
        raise AssertionError("talk has no end")

    def _turns(self) -> Iterator[str]:
        """What the user says: the facts, half of them among other talk; then other talk."""
        for number, fact in enumerate(self.facts):
            told = self._draw.choice(LEADS) + fact.statement
            if number % 2:
                told = f"{self._chatter.sentence(self._draw)} {told} {self._chatter.sentence(self._draw)}"
            yield told
        while True:
            yield self._chatter.talk(self._draw, TURN_CHARS)

    def _ask(self, place: int, number: int, seen: int, *, is_reworded: bool) -> Asked:
        """Ask for a fact, without and with recall; and say something that asks for nothing."""
        fact, (turn, told) = self.facts[number], self._told[number]
        question = fact.reworded if is_reworded else fact.question
        # Whoever comes first also warms up what both need.
        first, second = ("off", "auto") if number % 4 < 2 else ("auto", "off")
        replies = {how: self._send(question, how, self.answer_tokens) for how in (first, second)}
        without, found = replies["off"], replies["auto"]
        right = sum(fact.statement in passage.text for passage in found.recalled)
        answers = (fact.is_answered_by(without.text), fact.is_answered_by(found.text)) if self.answer_tokens else None
        return Asked(
            distance=self.distances[place],
            tokens=seen - told,
            is_reworded=is_reworded,
            is_held=turn >= without.oldest,
            is_found=turn >= found.oldest or right > 0,
            recalled=len(found.recalled),
            right=right,
            added=found.read - without.read,
            search=found.search - without.search,
            wait=found.first - without.first,
            answers=answers,
            idle=len(self._send(self._idle(number, is_reworded), "auto", 0).recalled),
        )

    def _idle(self, number: int, is_phrase: bool) -> str:
        """A turn that asks for nothing: a phrase, or a sentence like the rest of the talk."""
        if is_phrase:
            return IDLE[number % len(IDLE)]
        return next(said for said in iter(lambda: self._chatter.sentence(self._draw), None) if "?" not in said)

    def _send(self, text: str, recall: str, max_tokens: int) -> _Reply:
        """Say something in a copy of the conversation."""
        with self.chat.fork() as copy:
            copy.recall = recall  # type: ignore[assignment]
            began = time.perf_counter()
            reply = copy.send(text, max_tokens=max_tokens)
            search = time.perf_counter() - began
            words = next(reply).text
            first = time.perf_counter() - began
            words += reply.text()
            return _Reply(copy.turns_evicted + 1, reply.read, words, reply.recalled, search, first)
