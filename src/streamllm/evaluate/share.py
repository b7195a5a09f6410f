"""A share of successes, and how sure it is. Nothing here loads numpy, so that tables are at hand at once."""

from __future__ import annotations

import math


def sign_test(a: int, b: int) -> float:
    """How likely a split at least as uneven as ``a`` to ``b`` is, were both as likely (exact, two-sided)."""
    count, few = a + b, min(a, b)
    ways: int = sum(math.comb(count, k) for k in range(few + 1))
    return min(1.0, 2 * ways / (1 << count))


def share(hits: int, count: int) -> list[float]:
    """A share of successes and its confidence interval (Wilson's, which stays honest at 0 and 1)."""
    if not count:
        return [math.nan, 0.0, 1.0]
    z = 1.959963984540054
    rate = hits / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return [rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))]  # but for rounding
