"""What became of the queries of StreamEval: counted along the stream, in the memory of a few numbers.

Nothing here knows about text, and nothing about torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from streamllm.evaluate.registers import Answer
from streamllm.evaluate.share import share

PARTS = 10
"""Of a stream, in which queries are counted."""

INSIDE, PARTLY, BEYOND = "yes", "partly", "no"
"""Whether the lines that are asked for are in the cache: all of each, nothing of any, or neither."""


class Part(NamedTuple):
    """A part of the stream: right answers, queries, and where the answers stand on average, in tokens."""

    right: int
    asked: int
    place: float


@dataclass
class Tally:
    """The queries of a stream.

    Args:
        hits, counts: right answers and queries, by part of the stream.
        places: sums of the places of their answers, likewise.
        reach, gap: the least and the largest (see ``Answer``); ``None`` before the first query.
    """

    hits: list[int] = field(default_factory=lambda: [0] * PARTS)
    counts: list[int] = field(default_factory=lambda: [0] * PARTS)
    places: list[int] = field(default_factory=lambda: [0] * PARTS)
    reach: list[int] | None = None
    gap: list[int] | None = None

    def add(self, progress: float, answer: Answer, is_right: bool) -> None:
        """Count a query; ``progress``: the share of the stream before it, below 1."""
        part = int(progress * PARTS)
        self.hits[part] += is_right
        self.counts[part] += 1
        self.places[part] += answer.begin
        self.reach = _ends([*(self.reach or ()), answer.reach])
        self.gap = _ends([*(self.gap or ()), answer.gap])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def summarise(tallies: Sequence[dict[str, Any]], least: int, most: int) -> dict[str, Any]:
    """Several streams as one, with the accuracy, its interval, and whether the lines are in the cache (``held``).

    Args:
        tallies: of the streams, as ``Tally.to_dict`` gave them.
        least, most: tokens back that are always, and at best, in the cache.
    """
    found: dict[str, Any] = {
        name: [sum(column) for column in zip(*(tally[name] for tally in tallies), strict=True)]
        for name in ("hits", "counts", "places")
    }
    reach, gap = (_ends([n for tally in tallies for n in tally[name] or ()]) for name in ("reach", "gap"))
    accuracy = held = None
    if reach is not None and gap is not None:
        accuracy = share(sum(found["hits"]), sum(found["counts"]))
        held = INSIDE if reach[1] <= least else BEYOND if gap[0] > most else PARTLY
    return {**found, "accuracy": accuracy, "reach": reach, "gap": gap, "held": held}


def parts(summary: dict[str, Any]) -> list[Part]:
    """The parts of the stream."""
    columns = zip(summary["hits"], summary["counts"], summary["places"], strict=True)
    return [Part(hits, asked, places / max(1, asked)) for hits, asked, places in columns]


def pool(summaries: dict[str, dict[str, Any]], held: str) -> tuple[int, int]:
    """Right answers and queries of all distances whose lines lie so."""
    chosen = [summary for summary in summaries.values() if summary["held"] == held]
    return sum(sum(each["hits"]) for each in chosen), sum(sum(each["counts"]) for each in chosen)


def _ends(values: Sequence[int]) -> list[int] | None:
    """The least and the largest; ``None`` of none."""
    return [min(values), max(values)] if values else None
