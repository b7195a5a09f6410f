"""A figure beside what was promised for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One promise.

    Args:
        name: what is measured.
        value: what was measured.
        limit: what was promised.
        at_least: whether more is better; otherwise less is.
        unit: of both, for people.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict, ready for JSON."""
        sign = ">=" if self.at_least else "<="
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "target": f"{sign} {self.limit:g} {self.unit}",
            "is_met": self.is_met,
        }


def rows_of(targets: Sequence[Target]) -> list[tuple[str, ...]]:
    """One row a target: its name, value, limit and verdict."""
    return [(t.name, f"{t.value:.3f}", f"target {t.to_dict()['target']}", _verdict(t)) for t in targets]


def _verdict(target: Target) -> str:
    return "met" if target.is_met else "not met"
