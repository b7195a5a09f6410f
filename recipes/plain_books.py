"""Pick the plainest books of a collection: those whose words are mostly known from simple stories.

    python recipes/plain_books.py --stories STORIES... --books BOOKS... --chars 60e6 --out plain.jsonl.xz

Plainness is the share of a book's words that are among the 5,000 most frequent of the simple stories. What is written
is one JSON object a line, like the input, the plainest book first. With ``--after 60e6`` the books are picked from
where ``--chars 60e6`` has ended, so that none is in both.
"""

from __future__ import annotations

import argparse
import collections
import json
import lzma
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streamllm.atomic import replacing
from streamllm.corpus import Source, read_file

KNOWN = 5000
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return WORD.findall(text.lower().replace("’", "'"))


def books(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The books of all files."""
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def plainness(text: str, known: frozenset[str]) -> float:
    """Share of known words, of about a tenth of the text, spread over it."""
    sample = [word for begin in range(0, len(text), 20_000) for word in words(text[begin : begin + 2_000])]
    return sum(word in known for word in sample) / max(1, len(sample))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the plainest books."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stories", type=Path, nargs="+", required=True, help="simple stories (.txt)")
    parser.add_argument("--books", type=Path, nargs="+", required=True, help="books (.jsonl.xz)")
    parser.add_argument("--chars", type=float, required=True, help="characters to pick, at least")
    parser.add_argument("--after", type=float, default=0, help="characters of plainer books to pass over (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="where they go (.jsonl.xz)")
    options = parser.parse_args(argv)
    counts = collections.Counter(
        word for file in options.stories for piece in read_file(Source(file)) for word in words(piece.text)
    )
    known = frozenset(word for word, _ in counts.most_common(KNOWN))
    ranked = sorted(
        ((plainness(book["text"], known), number) for number, book in enumerate(books(options.books))), reverse=True
    )
    order = {number: place for place, (_, number) in enumerate(ranked)}
    sizes = {number: len(book["text"]) for number, book in enumerate(books(options.books))}
    chosen, passed, total = set(), 0, 0
    for _, number in ranked:
        if passed < options.after:
            passed += sizes[number]
        elif total < options.chars:
            chosen.add(number)
            total += sizes[number]
    picked = sorted(
        ((order[number], book) for number, book in enumerate(books(options.books)) if number in chosen),
        key=lambda pair: pair[0],
    )
    with replacing(options.out) as temporary, lzma.open(temporary, "wt", encoding="utf-8", preset=1) as out:
        for place, book in picked:
            out.write(json.dumps(book, ensure_ascii=False) + "\n")
            if place in (*(place for place, _ in picked[:10]), picked[-1][0]):
                sys.stderr.write(f"{ranked[place][0]:.3f}  {book.get('title')}\n")
    sys.stderr.write(f"{len(picked)} of {len(sizes)} books, {total / 1e6:.1f} M characters\n")


if __name__ == "__main__":
    main()
