"""Facts that a user tells, and questions that ask for them later; drawn from a seed.

The facts compete: several are about the same person or thing, several say the same about others, and none of their
words but the answer is theirs alone. Each has a question in its own words and one in other words. Nothing here knows
about tokens, models or torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

NAMES = ("Mara", "Jonas", "Priya", "Tomek", "Ines", "Kofi", "Yuki", "Selma")
THINGS = tuple(f"{color} {kind}" for color in ("red", "blue", "green", "yellow") for kind in ("box", "trunk", "safe"))

_DISHES = ("lasagne", "ramen", "goulash", "paella", "couscous", "pierogi", "moussaka", "risotto")
_MONTHS = ("January", "February", "March", "April", "June", "July", "August", "October")
_TOWNS = ("Lisbon", "Krakow", "Porto", "Ghent", "Bergen", "Turku", "Split", "Graz")
_DOGS = ("Biscuit", "Pixel", "Nacho", "Waffle", "Bolt", "Domino", "Pepper", "Olaf")
_JOBS = ("baker", "nurse", "plumber", "tailor", "welder", "florist", "surveyor", "librarian")
_ROOMS = ("kitchen", "cellar", "attic", "garage", "hall", "study", "porch", "shed")
_OWNERS = ("Anton", "Beatriz", "Carmen", "Dmitri", "Elif", "Fiona", "Goran", "Hana")
_CODES = tuple(str(number) for number in range(1000, 10_000))
_PRICES = tuple(str(number) for number in range(100, 1000))

_Kind = tuple[str, str, str, Sequence[str]]
"""A statement, a question in its words, one in other words, and what may be stated."""

_OF_PEOPLE: tuple[_Kind, ...] = (
    ("{}'s favourite dish is {}.", "What is {}'s favourite dish?", "What does {} like to eat most?", _DISHES),
    ("{} was born in {}.", "In which month was {} born?", "When is {}'s birthday?", _MONTHS),
    ("{} lives in {}.", "Which town does {} live in?", "Where is {}'s home?", _TOWNS),
    ("{} has a dog called {}.", "What is {}'s dog called?", "What is the name of {}'s pet?", _DOGS),
    ("{} works as a {}.", "What does {} work as?", "What does {} do for a living?", _JOBS),
    ("{}'s phone number ends with {}.", "What does {}'s phone number end with?", "How can I call {}?", _CODES),
)
_OF_THINGS: tuple[_Kind, ...] = (
    ("The code of the {} is {}.", "What is the code of the {}?", "Which digits open the {}?", _CODES),
    ("The {} stands in the {}.", "Where does the {} stand?", "In which room can I find the {}?", _ROOMS),
    ("The {} belongs to {}.", "Who does the {} belong to?", "Who is the owner of the {}?", _OWNERS),
    ("The {} cost {} dollars.", "How much did the {} cost?", "What did I pay for the {}?", _PRICES),
)

MOST = 2 * min(len(NAMES) * len(_OF_PEOPLE), len(THINGS) * len(_OF_THINGS))
"""Facts that there are, half of them about people."""

LEADS = ("", "One more thing. ", "Please remember this. ", "Before I forget it. ", "Something for later. ")
"""What stands in front of a fact where it is told."""

IDLE = (
    "Ok, thanks.",
    "That is nice.",
    "Go on, please.",
    "Tell me more.",
    "I see.",
    "Good morning!",
    "Let us talk about something else.",
    "Wait a moment, please.",
    "That was funny!",
    "I am back.",
)
"""Turns that ask for nothing that was said before."""


@dataclass(frozen=True)
class Fact:
    """Something that is told.

    Args:
        statement: the sentence.
        question: asks for it in its own words.
        reworded: asks for it in other words.
        answer: one word of the sentence.
    """

    statement: str
    question: str
    reworded: str
    answer: str

    def is_answered_by(self, text: str) -> bool:
        """Whether the answer stands in a text, as a word of its own."""
        return bool(re.search(rf"\b{re.escape(self.answer)}\b", text, re.IGNORECASE))


def draw_facts(draw: random.Random, count: int) -> list[Fact]:
    """``count`` facts, at most ``MOST``; no two say the same about the same person or thing."""
    people = draw.sample(list(product(NAMES, _OF_PEOPLE)), count // 2)
    things = draw.sample(list(product(THINGS, _OF_THINGS)), count - count // 2)
    facts = []
    for subject, (statement, question, reworded, answers) in (*people, *things):
        answer = draw.choice(answers)
        facts.append(
            Fact(statement.format(subject, answer), question.format(subject), reworded.format(subject), answer)
        )
    draw.shuffle(facts)
    return facts
