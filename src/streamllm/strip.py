"""The picture of a cache as one line of signs: what is pinned, what has left, and how full the window is.

Knows numbers and signs, nothing of caches or terminals. The pinned tokens and the window are drawn to the scale of the
cache; what has left has no bound, so it gets a fixed share of the line and its count.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamllm.stats import grouped

EVICTED_SHARE = 3
"""What has left gets one cell in so many."""

LEAST_WIDTH = 12
"""Cells that a line has at least, whatever was asked for."""


@dataclass(frozen=True)
class Signs:
    """What the parts are drawn with; each is one cell wide."""

    border: str
    pinned: str
    evicted: str
    cached: str
    free: str


BLOCKS = Signs("│", "█", "·", "▓", "░")
ASCII = Signs("|", "#", ".", "=", "-")


def draw(width: int, *, pinned: int, cached: int, capacity: int, evicted: int, signs: Signs = BLOCKS) -> str:
    """One line that is ``width`` cells wide: pinned | evicted, with its count | window, as far as it is filled.

    Args:
        width: cells of a terminal.
        pinned: tokens that never leave.
        cached: tokens held, the pinned ones among them.
        capacity: tokens that can be held.
        evicted: tokens that have left.
        signs: what to draw with.
    """
    inner = max(LEAST_WIDTH, width) - 2 - (pinned > 0) - (evicted > 0)
    gone = inner // EVICTED_SHARE if evicted else 0
    to_scale = inner - gone
    head = min(to_scale // 2, max(1, round(to_scale * pinned / capacity))) if pinned else 0
    window = to_scale - head
    filled = _share(window, cached - pinned, capacity - pinned)
    count = f" {grouped(evicted)} evicted "
    parts = (
        signs.pinned * head,
        (count if len(count) <= gone else "").center(gone, signs.evicted),
        signs.cached * filled + signs.free * (window - filled),
    )
    return signs.border + signs.border.join(part for part in parts if part) + signs.border


def _share(cells: int, held: int, most: int) -> int:
    """Cells of a part that are filled; all of them only if it is full, and none only if it is empty."""
    if held <= 0:
        return 0
    return cells if held >= most else min(cells - 1, max(1, round(cells * held / most)))
