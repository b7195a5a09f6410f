"""Passages: the pieces of bounded size in which a text is kept, found and quoted.

Knows nothing of databases or tokenizers. A passage ends at a sentence or a line where it can. Where a text is cut
depends only on what stands up to one character behind the cut, so a text that grows is cut as the whole would be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant"]

LEAST = 300
"""A passage of so many characters ends with its sentence or line, about 75 tokens of English."""

MOST = 600
"""No passage has more characters than this."""

# Each border looks at the character behind it, so that more text never moves it.
_BORDER = re.compile(
    r"""[.!?…]["'”’»)\]]*(?=\s)"""  # where words have spaces between them
    r"|[。！？．][」』”’）】]*(?=[^」』”’）】])"  # where they have none
    r"|\n(?=[^\n])"
)


@dataclass(frozen=True)
class Passage:
    """A piece of what was said.

    Args:
        id: passages said later have larger ones.
        turn: number of its turn, from 1.
        role: who said it.
        text: at most ``MOST`` characters.
        stop: tokens of its turn up to the end of the passage; an upper bound.
        score: how well it matches what was searched for; larger is better, 0 if nothing was.
    """

    id: int
    turn: int
    role: Role
    text: str
    stop: int
    score: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where the window begins: the first ``stop`` tokens of ``turn`` have left it, and all turns before."""

    turn: int
    stop: int

    def has_left(self, passage: Passage) -> bool:
        """Whether no token of the passage is in the window any more."""
        return passage.turn < self.turn or (passage.turn == self.turn and passage.stop <= self.stop)


def cut(text: str) -> list[str]:
    """Cut a text into passages; joined, they are the text again."""
    pieces, start = [], 0
    while (stop := _border(text, start)) is not None:
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]] if start < len(text) else pieces


def placed(text: str, prompt_tokens: int, count: Callable[[str], int]) -> list[tuple[str, int]]:
    """Cut a user's text into passages, each with its ``stop``.

    What stands in front of the text in its prompt is not known, so tokens are counted from the end: a passage ends
    where the tokens behind it begin. Two tokens and a sixteenth of each passage are taken off, because a text may have
    fewer tokens within its context than alone; ``stop`` may be too large for that, but not too small.

    Args:
        text: what the user said.
        prompt_tokens: tokens that were fed to the model for it.
        count: how many tokens a text has, without special ones.
    """
    pieces, behind = [], 0
    for piece in reversed(cut(text)):
        pieces.append((piece, prompt_tokens - behind))
        tokens = count(piece)
        behind += max(0, tokens - 2 - tokens // 16)
    return pieces[::-1]


def _border(text: str, start: int) -> int | None:
    """Where the passage that begins at ``start`` ends; ``None`` if it may still grow."""
    end = _BORDER.search(text, start + LEAST - 1, start + MOST + 1)
    if end:
        return end.end()
    if len(text) - start <= MOST:
        return None
    space = text.rfind(" ", start + LEAST, start + MOST)
    return space if space >= 0 else start + MOST
