"""The words of passages: a full-text index in SQLite (FTS5), and what counts as a word in it.

Knows ids and texts, nothing of turns. Words are folded (case, accents, width) and stemmed; the stems are English, which
does other languages little harm. The smallest words are marked, since others have stems that look like them. Scripts
that are written without spaces between words are indexed letter by letter, and searched by pairs of letters that stand
side by side.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata

from streamllm.database import Database

TOKENIZE = "porter unicode61 remove_diacritics 2 categories ''L* N* Co Mn Mc''"
"""Marks belong to words: the vowels of many scripts are marks."""

SCHEMA = f"CREATE VIRTUAL TABLE words USING fts5(text, content = '', tokenize = '{TOKENIZE}')"
"""The texts themselves are not stored again."""

_SMALL = frozenset("am an as at be by do go he if in is it me my no of oh on or so to up us we".split())
"""Words that tell nothing. Among them are the stems of names and words that do: "Ines", "uses" and "ores" for three."""

_MARK = "\ue000"
"""Stands behind a small word: no stem has it."""

# Thai, Lao, Burmese, Khmer, kana, Chinese characters, Hangul.
_LETTER = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
    "\uf900-\ufaff\U00020000-\U0003134f])"
)


class Words:
    """Which passages hold which words.

    A *term* is a word, or two letters side by side, in the syntax of FTS5; ``terms`` makes them.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @staticmethod
    def add(connection: sqlite3.Connection, id: int, text: str) -> None:
        """Index a passage, within a transaction."""
        connection.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (id, _spaced(text)))

    @staticmethod
    def remove(connection: sqlite3.Connection, id: int, text: str) -> None:
        """Take a passage out again, within a transaction; ``text`` must be the one that was added."""
        connection.execute("INSERT INTO words (words, rowid, text) VALUES ('delete', ?, ?)", (id, _spaced(text)))

    def holders(self, term: str, last: int, limit: int) -> list[int]:
        """At most ``limit`` passages up to id ``last`` that hold ``term``, newest first."""
        query = "SELECT rowid FROM words WHERE words MATCH ? AND rowid <= ? ORDER BY rowid DESC LIMIT ?"
        return [id for (id,) in self._database.rows(query, term, last, limit)]

    def best(self, terms: list[str], last: int, limit: int) -> list[tuple[int, float]]:
        """At most ``limit`` passages up to id ``last`` that hold any of ``terms``: id and BM25, the best first."""
        query = "SELECT rowid, -rank FROM words WHERE words MATCH ? AND rowid <= ? ORDER BY rank LIMIT ?"
        return self._database.rows(query, " OR ".join(terms), last, limit)


def terms(text: str) -> list[str]:
    """The terms of a text, each once, in order."""
    return list(dict.fromkeys(term for word in _words(text) for term in _terms(word)))


def bare(term: str) -> str:
    """The word that a term stands for."""
    return term.strip(f'"{_MARK}')


def _words(text: str) -> list[str]:
    """The words of a text that are indexed; a run of a script without spaces counts as one."""
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded)
    return [word + _MARK * (word in _SMALL) for word in _LETTER_RUNS.sub(r" \1 ", kept).split()]


def _terms(word: str) -> list[str]:
    """A word, or the pairs of a run of letters."""
    if len(word) < 2 or not _LETTER.match(word):
        return [f'"{word}"']
    return [f'"{word[i]} {word[i + 1]}"' for i in range(len(word) - 1)]


def _spaced(text: str) -> str:
    """The words of a text, and single letters where words are not written apart."""
    return _LETTER.sub(r" \1 ", " ".join(_words(text)))


_LETTER_RUNS = re.compile(f"({_LETTER.pattern}+)")
