"""A stream's losses in constant memory: sums over a bounded number of stretches, and intervals from them.

Neighbouring stretches are alike, since a hard passage is longer than one of them, so an interval comes from drawing
runs of them (a moving-block bootstrap, circular). Two streams over the same tokens are compared stretch by stretch,
because texts differ in difficulty. Nothing here knows about torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRETCHES = 400
"""Of a curve, at most."""

SHORTEST = 100
"""Tokens of a stretch, at least."""

FEWEST = 8
"""Stretches without which there is no interval: too few to say how different they are."""

DRAWS = 4000
"""Of a bootstrap."""

LEVEL = 0.95
"""Of all intervals."""


class Curve:
    """Losses of a stream of at most ``tokens`` tokens, by stretches; and what each stretch took.

    Attributes:
        stretch: tokens of one.
        done: tokens added so far.
        losses: sums in nats, one a stretch.
        seconds: of reading.
        cache_bytes, memory_bytes: of the cache, and of all that runs, at the end of each stretch.
        forwards: that read them.
    """

    def __init__(self, tokens: int) -> None:
        self.stretch = max(SHORTEST, math.ceil(tokens / STRETCHES))
        self.done = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cache_bytes: list[int] = []
        self.memory_bytes: list[int] = []
        self.forwards = 0

    def add(self, losses: NDArray[Any], *, seconds: float = 0.0, cache_bytes: int = 0, memory: int = 0) -> None:
        """Take in the losses [n] of the next forward, and what it took."""
        self.forwards += 1
        begin = 0
        while begin < len(losses):
            number, inside = divmod(self.done, self.stretch)
            if number == len(self.losses):
                self.losses.append(0.0)
                self.seconds.append(0.0)
                self.cache_bytes.append(0)
                self.memory_bytes.append(0)
            width = min(self.stretch - inside, len(losses) - begin)
            part = slice(begin, begin + width)
            self.losses[number] += float(losses[part].sum(dtype=np.float64))
            self.seconds[number] += seconds * width / len(losses)
            self.cache_bytes[number], self.memory_bytes[number] = cache_bytes, memory
            self.done += width
            begin += width

    @property
    def counts(self) -> NDArray[np.int64]:
        """Tokens of each stretch; the last one may be shorter."""
        counts = np.full(len(self.losses), self.stretch)
        if len(counts):
            counts[-1] = self.done - self.stretch * (len(counts) - 1)
        return counts

    @property
    def places(self) -> list[int]:
        """Tokens read at the end of each stretch."""
        return [int(place) for place in self.counts.cumsum()]

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean loss of each stretch in nats."""
        means: NDArray[np.float64] = np.asarray(self.losses) / self.counts
        return means

    @property
    def running(self) -> NDArray[np.float64]:
        """Mean loss of all tokens up to the end of each stretch."""
        running: NDArray[np.float64] = np.cumsum(self.losses) / self.counts.cumsum()
        return running

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss over all tokens."""
        return math.exp(sum(self.losses) / self.done)

    def tail(self, stretches: int) -> Curve:
        """The last ``stretches``, as a curve of its own."""
        found = Curve(0)
        found.stretch, found.done = self.stretch, int(self.counts[-stretches:].sum())
        for name in ("losses", "seconds", "cache_bytes", "memory_bytes"):
            setattr(found, name, getattr(self, name)[-stretches:])
        return found

    @classmethod
    def of_stretches(cls, curves: Sequence[Curve]) -> Curve:
        """One curve of several that are a stretch long each."""
        found = cls(0)
        found.stretch, found.done = curves[0].stretch, sum(curve.done for curve in curves)
        for name in ("losses", "seconds", "cache_bytes", "memory_bytes"):
            setattr(found, name, [value for curve in curves for value in getattr(curve, name)])
        return found

    def interval(self) -> list[float | None]:
        """The perplexity and its confidence interval, over other stretches of such text; ``None``: too few of them."""
        return [self.perplexity, *_bootstrap(self.means, self.counts)]

    def ratio(self, other: Curve) -> list[float | None]:
        """Perplexity as a share of ``other``'s on the same tokens, and its confidence interval.

        Where one curve is shorter, the tokens that both have are compared.
        """
        if self.stretch != other.stretch:
            raise ValueError("curves of different stretches have no tokens in common")
        both = min(len(self.losses), len(other.losses))
        if self.done != other.done:  # the last stretch is only whole in the longer curve
            both = min(self.done, other.done) // self.stretch
        difference = self.means[:both] - other.means[:both]
        weights = self.counts[:both]
        return [math.exp(float(np.average(difference, weights=weights))), *_bootstrap(difference, weights)]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Curve:
        """The curve that ``to_dict`` gave."""
        curve = cls(0)
        vars(curve).update({name: list(v) if isinstance(v, Sequence) else v for name, v in found.items()})
        return curve


def _bootstrap(means: NDArray[Any], weights: NDArray[Any]) -> list[float | None]:
    """Interval of the exponential of the weighted mean, by drawing runs of stretches, the root of their number long."""
    count = len(means)
    if count < FEWEST:
        return [None, None]
    run = math.ceil(math.sqrt(count))
    begins = np.random.default_rng(0).integers(0, count, (DRAWS, math.ceil(count / run)))
    draws = ((begins[:, :, None] + np.arange(run)) % count).reshape(DRAWS, -1)[:, :count]
    totals = (means * weights)[draws].sum(1) / weights[draws].sum(1)
    tail = (1 - LEVEL) / 2
    return [float(np.exp(value)) for value in np.quantile(totals, (tail, 1 - tail))]
