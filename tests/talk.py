"""Conversations made up for the tests of recall: facts that are told once, among any amount of other talk.

Everything is drawn from a seed. The talk has its own words, drawn as often as Zipf's law says, and shares colours,
things and names with the facts, so that a fact's words are found in other places too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from streamllm.transcript import Transcript

COLOURS = "red blue green yellow black white brown purple orange silver golden grey".split()
THINGS = "box door bag car boat house chair lamp clock drawer bottle key safe tent".split()
PROPERTIES = "code owner price weight".split()
NAMES = "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Klara Leon Maria Nadia Oscar Paula".split()
KIN = "sister brother aunt uncle cousin neighbour boss friend".split()
TOWNS = "Lisbon Oslo Cairo Lima Tokyo Bergen Porto Quito Dakar Hanoi".split()
TRADES = "baker nurse pilot teacher lawyer painter farmer tailor".split()
GRAMMAR = "the a of and to in was it that he she with for on had as at his her but they".split()

ASK_FOR_NOTHING = [
    "ok thanks",
    "tell me more",
    "go on please",
    "that is nice",
    "Thank you!",
    "yes",
    "And then?",
    "What happened next?",
    "Can you continue the story?",
    "haha that was funny",
    "Good morning!",
    "How are you?",
    "Really?",
    "I see, that makes sense.",
    "Give me another example.",
    "Let's talk about something else.",
    "继续",
    "谢谢",
]


@dataclass(frozen=True)
class Fact:
    """A sentence, and ways to ask for what it says."""

    told: str
    asked: tuple[str, ...]


def count(text: str) -> int:
    """Tokens of a text, for tests: one for four characters."""
    return -(-len(text) // 4)


def make_facts(number: int, seed: int = 0) -> list[Fact]:
    """Facts that differ in few words, half of them about things and half about people."""
    draw = random.Random(seed)
    things = [(p, c, t) for p in PROPERTIES for c in COLOURS for t in THINGS]
    people = [(kin, name) for kin in KIN for name in NAMES]
    facts = []
    for what, colour, thing in draw.sample(things, number - number // 2):
        named = f"the {what} of the {colour} {thing}"
        asked = (
            f"What is {named}?",
            f"tell me {named} please",
            f"Do you remember what the {colour} {thing}'s {what} was?",
        )
        facts.append(Fact(f"The {what} of the {colour} {thing} is {draw.randint(1000, 99999)}.", asked))
    for kin, name in draw.sample(people, number // 2):
        told = f"My {kin} {name} lives in {draw.choice(TOWNS)} and works as a {draw.choice(TRADES)}."
        facts.append(Fact(told, (f"Where does my {kin} {name} live?", f"what is the job of {name}, my {kin}")))
    draw.shuffle(facts)
    return facts


class Talk:
    """Endless talk about nothing; all talk has the same words."""

    def __init__(self, seed: int = 0) -> None:
        make = random.Random("words")
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        made = {"".join(make.choices(syllables, k=make.randint(2, 4))) for _ in range(2000)}
        lower = [name.lower() for name in NAMES]
        self._words = [*sorted(made), *COLOURS, *THINGS, *PROPERTIES, *KIN, *lower, "lives", "works", "job"]
        make.shuffle(self._words)
        self._weights = [1 / rank for rank in range(10, 10 + len(self._words))]
        self._draw = random.Random(seed)

    def sentence(self) -> str:
        """A sentence of about a dozen words, half of them of grammar."""
        words = self._draw.choices(self._words, self._weights, k=self._draw.randint(3, 8))
        return " ".join(f"{self._draw.choice(GRAMMAR)} {word}" for word in words).capitalize() + "."

    def text(self, sentences: int) -> str:
        """Some sentences."""
        return " ".join(self.sentence() for _ in range(sentences))


def say(transcript: Transcript, user: str, reply: str) -> None:
    """A whole turn; tokens are of four characters."""
    transcript.begin(user, prompt_ids=range(count(user) + 4), count=count)
    transcript.write(reply, range(count(reply)))
    transcript.end("end", 2)


def converse(tokens: int, facts: list[Fact], seed: int = 0) -> Transcript:
    """A conversation of so many tokens in which the facts are told at places drawn at random, alone or amid talk."""
    draw, talk, transcript = random.Random(seed), Talk(seed), Transcript()
    said, due = 0, sorted((draw.random() * tokens * 0.98, number) for number in range(len(facts)))
    while said < tokens:
        user = talk.sentence() if draw.random() < 0.7 else draw.choice(ASK_FOR_NOTHING)
        reply = talk.text(draw.choice([1, 3, 8]))
        if due and said >= due[0][0]:
            told = facts[due.pop(0)[1]].told
            place = draw.randrange(3)
            user, reply = ((told, "Noted."), (f"{user} {told}", reply), (user, f"{talk.sentence()} {told} {reply}"))[
                place
            ]
        say(transcript, user, reply)
        said += count(user) + 4 + count(reply)
    return transcript
