"""Talk without end: sentences that go on from word to word as some text does, drawn from a seed.

A text of a few pages is over soon, and one that is read again and again has no rare words. So sentences are made by a
chain: after two words comes one that came after them somewhere in the text. They mean little, but their words are as
frequent, and stand together, as those of the text. Nothing here knows about tokens, models or torch.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from streamllm.errors import InputError

LEARNT = 1_000_000
"""Characters of a text that ``beginning`` gives at most."""

LONGEST = 40
"""Words of a sentence, at most."""

_ENDS = (".", "!", "?", '."', '!"', '?"')


class Chatter:
    """Makes sentences after the words of a text.

    Raises:
        InputError: the text has no sentence of three words.
    """

    def __init__(self, text: str) -> None:
        words = text.split()
        self._next: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self._begins: list[tuple[str, str]] = []
        is_begin = True
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            if is_begin and not (first.endswith(_ENDS) or second.endswith(_ENDS)):
                self._begins.append((first, second))
            is_begin = first.endswith(_ENDS)
            if not (first.endswith(_ENDS) or second.endswith(_ENDS)):
                self._next[first, second].append(third)
        if not self._begins:
            raise InputError("The text has no sentence of three words; give another one with --data.")

    def sentence(self, draw: random.Random) -> str:
        """A sentence."""
        words = list(draw.choice(self._begins))
        while len(words) < LONGEST and not words[-1].endswith(_ENDS):
            following = self._next.get((words[-2], words[-1]))
            if not following:  # the end of the text
                break
            words.append(draw.choice(following))
        sentence = " ".join(words)
        return sentence if sentence.endswith(_ENDS) else f"{sentence}."

    def talk(self, draw: random.Random, chars: int) -> str:
        """Sentences of together at least ``chars`` characters."""
        said = self.sentence(draw)
        while len(said) < chars:
            said += " " + self.sentence(draw)
        return said


def beginning(pieces: Iterable[str]) -> str:
    """As much of a text as is looked at."""
    found, left = [], LEARNT
    for piece in pieces:
        found.append(piece[:left])
        left -= len(piece)
        if left <= 0:
            break
    return "".join(found)
