"""Which tokens are read when: windows of the encoded corpus, in an order that only the seed and the step decide.

So a run can go on anywhere without having saved what was read. An epoch visits every window once, the windows of a file
of weight w so many times, each time cut elsewhere. Nothing here knows about text or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Stretch:
    """Tokens ``begin`` .. ``end`` of the corpus, read ``weight`` times an epoch."""

    begin: int
    end: int
    weight: int = 1


class Sequences:
    """Windows of ``span`` tokens of ``tokens`` [N].

    Args:
        tokens: the encoded corpus, usually a file mapped into memory.
        stretches: its parts, at least one, all at least ``span`` long.
        span: tokens of a window.
        seed: of the order and of the places where windows are cut.
    """

    def __init__(self, tokens: NDArray[np.unsignedinteger], stretches: Sequence[Stretch], span: int, seed: int) -> None:
        assert stretches
        assert all(stretch.end - stretch.begin >= span for stretch in stretches)
        self.tokens, self.span, self.seed = tokens, span, seed
        self.passes = [stretch for stretch in stretches for _ in range(stretch.weight)]
        # A window less than would fit, so that each epoch may cut them elsewhere.
        self.counts = [max(1, (stretch.end - stretch.begin) // span - 1) for stretch in self.passes]
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        """Windows of an epoch."""
        return sum(self.counts)

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Windows ``first`` .. ``first + count`` of the endless order, [count, span]."""
        starts = [self._order(number // len(self))[number % len(self)] for number in range(first, first + count)]
        return np.stack([self.tokens[start : start + self.span] for start in starts]).astype(np.int64)

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        """Where the windows of an epoch begin, shuffled."""
        draw = np.random.default_rng((self.seed, epoch))
        starts = []
        for stretch, count in zip(self.passes, self.counts, strict=True):
            spare = stretch.end - stretch.begin - count * self.span
            starts.append(stretch.begin + draw.integers(0, spare + 1) + self.span * np.arange(count))
        order = np.concatenate(starts)
        draw.shuffle(order)
        return order
