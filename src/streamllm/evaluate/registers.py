"""StreamEval's text: an endless record of lines with numbers in them, and now and then a query about an earlier line.

The paper's data was never released; this is made after its description (section 4.4, figure 8). A line says "The
REGISTER_CONTENT in line 7 is <12345>"; a query asks for the number of one line, and the right answer follows it, as in
a stream whose every answer was right. The same seed gives the same text, however much of it is read; nothing grows with
it but the line numbers. Nothing here knows about torch.

A tokenizer may merge what stands on both sides of an answer's border into one token. So the text comes in pieces whose
borders are the borders of the numbers, and ``encode_pieces`` encodes each by itself, as what follows the character
before it: a number has the same ids in its line and in its answer, and no token lies across a border.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamllm.reading import read_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFACE = "Below is a record of lines I want you to remember.\n"
LINE = "The REGISTER_CONTENT in line "
ASK = "Query: "
OPEN, CLOSE = " is <", ">\n"

TEXTS = 256
"""Encoded texts that are kept: the constant ones come back with every line."""


Encoded = tuple[list[int], "Piece | None"]
"""The ids of a piece; those that stand before all text have no piece."""


@dataclass(frozen=True)
class Piece:
    """A piece of the text.

    Args:
        text: of it.
        line: number of the line whose content the text is; ``None``: it is no content.
        is_answer: it is the content that a query asks for, not the line's own.
    """

    text: str
    line: int | None = None
    is_answer: bool = False


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in the stream, and the line it repeats: indices of tokens, ends excluded.

    Args:
        begin, end: of the answer.
        line: begin of the line.
        content_begin, content_end: of the number in the line.
    """

    begin: int
    end: int
    line: int
    content_begin: int
    content_end: int

    @property
    def reach(self) -> int:
        """Tokens that the answer's last one must look back at, itself not included, to see the whole line."""
        return self.end - 1 - self.line

    @property
    def gap(self) -> int:
        """Tokens from the number's last one to the answer's first one."""
        return self.begin - self.content_end + 1


def make_line(number: int, content: str) -> tuple[Piece, ...]:
    """A line of the record."""
    return Piece(f"{LINE}{number}{OPEN}"), Piece(content, number), Piece(CLOSE)


def make_query(number: int, content: str) -> tuple[Piece, ...]:
    """A query about a line, and its answer."""
    return Piece(f"{ASK}{LINE}{number}{OPEN}"), Piece(content, number, is_answer=True), Piece(CLOSE)


def make_draw(seed: int, sample: int) -> random.Random:
    """What decides the contents of a stream."""
    return random.Random(f"{seed} {sample}")


def draw_content(draw: random.Random, digits: int) -> str:
    """A number of so many digits, each as likely as any other: a guess is right once in ``10**digits``."""
    return f"{draw.randrange(10**digits):0{digits}}"


def stream_pieces(draw: random.Random, *, distance: int, every: int, digits: int) -> Iterator[Piece]:
    """The text without end: lines from number 0 on, and a query after every ``every`` of them.

    Args:
        draw: of the contents; the lines are the same whatever is asked.
        distance: a query asks for the line so many lines before the newest one.
        every: lines from one query to the next; the first comes as soon as there is a line to ask for.
        digits: of a content.
    """
    yield Piece(PREFACE)
    contents: deque[str] = deque(maxlen=distance + 1)
    for number in itertools.count():
        contents.append(draw_content(draw, digits))
        yield from make_line(number, contents[-1])
        asked = number - distance
        if asked >= 0 and asked % every == 0:
            yield from make_query(asked, contents[0])


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece]) -> Iterator[Encoded]:
    """Each piece with its ids; at first, without a piece, the ids that the tokenizer puts in front of a text.

    A piece is encoded behind the last character of the piece before it, whose ids are taken away again, so that it does
    not look like the beginning of a text to the tokenizer. If that cannot be told apart, it is encoded alone.
    """

    @functools.lru_cache(TEXTS)
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    yield [token for ids in read_ids(tokenizer, "") for token in ids], None
    before = ""
    for piece in pieces:
        head, both = encode(before), encode(before + piece.text)
        is_behind = both[: len(head)] == head and len(both) > len(head)
        yield both[len(head) :] if is_behind else encode(piece.text), piece
        before = piece.text[-1]


def stream_blocks(encoded: Iterable[Encoded], size: int) -> Iterator[tuple[list[int], list[Answer]]]:
    """The ids in blocks of at least ``size``, each with the answers that lie in it; no answer lies in two.

    What is remembered of the lines is thrown away up to the line that was asked for: nothing grows with the stream.
    """
    ids: list[int] = []
    answers: list[Answer] = []
    lines: dict[int, tuple[int, int, int]] = {}
    place = begin = 0  # of the piece, and of the piece before it
    for new, piece in encoded:
        end = place + len(new)
        if piece is not None and piece.line is not None:
            if piece.is_answer:
                answers.append(Answer(place, end, *lines[piece.line]))
                lines = {number: spans for number, spans in lines.items() if number > piece.line}
            else:
                lines[piece.line] = (begin, place, end)
        ids += new
        begin, place = place, end
        if len(ids) >= size:
            yield ids, answers
            ids, answers = [], []
    if ids:
        yield ids, answers
