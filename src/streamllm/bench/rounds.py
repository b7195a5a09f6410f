"""Methods taking turns, A B C A B C, so that a slower minute of the machine meets all of them.

A ratio is the median over the rounds of the ratio within a round; what disturbs a whole round leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

Turn = Callable[[], float]
"""Measures once, and returns what it found."""


def take_turns(turns: dict[str, Turn], rounds: int, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """What each found in every round, by name; a first round is thrown away.

    ``tell``: is called with the name before each turn.
    """
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            tell(name)
            value = turn()
            if number:
                found[name].append(value)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most, and the distance of these two relative to the median."""
    middle = median(values)
    return {
        "median": round(middle, 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "spread": round((max(values) - min(values)) / abs(middle), 4) if middle else 0.0,
        "rounds": [round(value, 4) for value in values],
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratios within each round."""
    return [a / b for a, b in zip(above, below, strict=True)]
