"""What the questions of a recall evaluation found: one by one, and counted by distance.

Counts and not shares are kept, so that they can be added up. Nothing here knows about text, and nothing about torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

OWN, OTHER = "own", "other"
"""Words of a question: those of the fact, or not."""

Count = Sequence[int]
"""How many did, and of how many."""


@dataclass(frozen=True)
class Asked:
    """What one question found.

    Args:
        distance: tokens that were to lie between the fact and the question.
        tokens: that did.
        is_reworded: the question has other words than the fact.
        is_held: the fact's turn was in the window without recall, when the question had been read.
        is_found: with recall it was there, or among what was recalled.
        recalled: passages for the question.
        right: of them, those that hold the fact.
        added: tokens that recall put in front of the question.
        search: seconds to find passages, or to find that there are none.
        wait: seconds that recall added before the first token, the search and reading what it found.
        answers: whether the reply had the answer, without and with recall; ``None``: no reply was asked for.
        idle: passages that were recalled for a turn that asks for nothing, at the same place.
    """

    distance: int
    tokens: int
    is_reworded: bool
    is_held: bool
    is_found: bool
    recalled: int
    right: int
    added: int
    search: float
    wait: float
    answers: tuple[bool, bool] | None
    idle: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def summarise(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The questions of one distance, as ``Asked.to_dict`` gave them: counts, and what it cost on average."""
    wordings = {OWN: [each for each in asked if not each["is_reworded"]], OTHER: [e for e in asked if e["is_reworded"]]}
    answers = [each["answers"] for each in asked if each["answers"] is not None]
    tokens, added, idle = ([each[name] for each in asked] for name in ("tokens", "added", "idle"))
    return {
        "tokens": [min(tokens), max(tokens)],
        "held": _count(asked, "is_held"),
        "found": _count(asked, "is_found"),
        **{which: _count(some, "is_found") for which, some in wordings.items()},
        "right": [sum(each["right"] for each in asked), sum(each["recalled"] for each in asked)],
        "answered": {
            how: [sum(each[place] for each in answers), len(answers)] for place, how in enumerate(("without", "with"))
        },
        "added": {"mean": mean(added), "max": max(added)},
        "search_ms": 1000 * median(each["search"] for each in asked),
        "wait_ms": 1000 * median(each["wait"] for each in asked),
        "idle": {"mean": mean(idle), "max": max(idle)},
    }


def pool(counts: Iterable[Count]) -> list[int]:
    """Several counts as one."""
    found = list(counts)
    return [sum(did for did, _ in found), sum(of for _, of in found)]


def _count(asked: Sequence[dict[str, Any]], name: str) -> list[int]:
    return [sum(each[name] for each in asked), len(asked)]
