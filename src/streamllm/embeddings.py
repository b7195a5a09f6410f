"""Recall by meaning: passages are found by the cosine between their embedding and that of what is looked for.

Optional: the embeddings come from model2vec, a table of word vectors without a network behind it. They are made when
they are first needed and kept in the transcript's own database, in half precision; a search reads them all, some at a
time, so its memory is constant and its time grows with the transcript.
"""

from __future__ import annotations

import heapq
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from streamllm.errors import ConfigError, ModelNotFoundError
from streamllm.passages import Passage, Place
from streamllm.recall import MOST_QUOTED
from streamllm.transcript import Transcript

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TABLES = (
    "CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, vector BLOB NOT NULL)",  # float16 of length one
    # What was taken back is not found.
    "CREATE TRIGGER IF NOT EXISTS vectors_of_passages AFTER UPDATE OF indexed ON passages WHEN NOT new.indexed "
    "BEGIN DELETE FROM vectors WHERE id = new.id; END",
)

_PROBE = "The quick brown fox jumps over the lazy dog."

BATCH = 256
"""Passages embedded at once."""

BLOCK = 4096
"""Vectors in memory at once."""

MARGIN = 1.0
"""A passage is worth quoting if it is by so many standard deviations closer than the closest of as many would be by
chance. Measured with word vectors of 256 numbers on facts among 100 000 tokens: 0.0 quotes for twice as many turns that
ask for nothing, 2.0 loses every tenth fact."""


class Encoder(Protocol):
    """What makes embeddings: ``model2vec.StaticModel``, or anything like it."""

    def encode(self, sentences: list[str]) -> NDArray[np.float32]:
        """Return the vectors of some texts, [texts, D]."""


class EmbeddingIndex:
    """Finds passages by their meaning.

    Args:
        transcript: where they are; the vectors are kept in its database.
        model: a model of model2vec: its name on the Hub, its folder, or the model itself.

    Raises:
        ConfigError: model2vec is not installed.
        ModelNotFoundError: there is no such model.
        StateError: the transcript cannot be read or written; the methods raise it too.
    """

    def __init__(self, transcript: Transcript, model: str | os.PathLike[str] | Encoder) -> None:
        self.transcript = transcript
        self._model = _load(model) if isinstance(model, str | os.PathLike) else model
        made_by = zlib.crc32(self._encode([_PROBE]).tobytes())
        with transcript.database.transaction() as connection:
            for statement in _TABLES:
                connection.execute(statement)
        if transcript.get("embeddings") != made_by:  # vectors of another model
            with transcript.database.transaction() as connection:
                connection.execute("DELETE FROM vectors")
            transcript.put("embeddings", made_by)

    def search(self, words: str, *, before: Place | None = None, limit: int = 10) -> list[Passage]:
        """As ``Index.search``; the score is the cosine."""
        best, _, _, _ = self._scan(words, self.transcript.last_left(before), limit)
        return self._passages(best)

    def worth_quoting(self, text: str, *, before: Place | None = None, limit: int = MOST_QUOTED) -> list[Passage]:
        """As ``Index.worth_quoting``; the score is the cosine."""
        best, count, mean, deviation = self._scan(text, self.transcript.last_left(before), limit)
        if count < 2:
            return []
        least = mean + deviation * (math.sqrt(2 * math.log(count)) + MARGIN)
        return self._passages([(score, id) for score, id in best if score > max(0.0, least)])

    def _passages(self, best: list[tuple[float, int]]) -> list[Passage]:
        """The passages of scores and ids."""
        scores = {id: score for score, id in best}
        return [replace(found, score=scores[found.id]) for found in self.transcript.passages(scores)]

    def _scan(self, text: str, last: int, limit: int) -> tuple[list[tuple[float, int]], int, float, float]:
        """The best scores with their ids, and how many there are, their mean and standard deviation."""
        self._fill()
        wanted = self._encode([text]).astype("float32")[0]
        best: list[tuple[float, int]] = []
        count, total, squares = 0, 0.0, 0.0
        for ids, vectors in self._blocks(last):
            scores = vectors @ wanted  # [BLOCK, D] @ [D]
            count, total, squares = count + len(ids), total + float(scores.sum()), squares + float(scores @ scores)
            highest = scores.argsort()[-limit:]
            best = heapq.nlargest(limit, [*best, *((float(scores[i]), ids[i]) for i in highest)])
        mean = total / max(1, count)
        return best, count, mean, math.sqrt(max(0.0, squares / max(1, count) - mean * mean))

    def _blocks(self, last: int) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Ids and vectors of the passages up to ``last``, a block at a time."""
        import numpy as np

        query = "SELECT id, vector FROM vectors WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
        after = 0
        while rows := self.transcript.database.rows(query, after, last, BLOCK):
            ids = [id for id, _ in rows]
            vectors = np.frombuffer(b"".join(vector for _, vector in rows), dtype="<f2").reshape(len(rows), -1)
            yield ids, vectors.astype(np.float32)
            after = ids[-1]

    def _fill(self) -> None:
        """Embed the passages that were closed since the last time."""
        query = (
            "SELECT id, text FROM passages WHERE indexed AND id > (SELECT coalesce(max(id), 0) FROM vectors) "
            "ORDER BY id LIMIT ?"
        )
        while rows := self.transcript.database.rows(query, BATCH):
            vectors = self._encode([text for _, text in rows])
            with self.transcript.database.transaction() as connection:
                connection.executemany(
                    "INSERT INTO vectors VALUES (?, ?)",
                    [(id, vector.tobytes()) for (id, _), vector in zip(rows, vectors, strict=True)],
                )

    def _encode(self, texts: list[str]) -> NDArray[np.float16]:
        """Vectors of length one, or of zeros for a text without known words, [texts, D]."""
        import numpy as np

        vectors = np.asarray(self._model.encode(texts), dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(lengths > 0, lengths, 1)).astype("<f2")


def _load(model: str | os.PathLike[str]) -> Encoder:
    """A model of model2vec by its name or folder."""
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise ConfigError(
            "Recall by meaning needs the package model2vec, which is not installed; "
            "run: pip install 'streamllm[recall]'."
        ) from error
    try:
        loaded: Encoder = StaticModel.from_pretrained(os.fspath(model), force_download=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFoundError(
            f"{os.fspath(model)!r} is no model of model2vec that can be loaded ({error}); "
            "give a folder, or a name on the Hub such as minishlab/potion-base-8M."
        ) from error
    return loaded
