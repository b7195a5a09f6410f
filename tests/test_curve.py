"""Curves: sums that forget nothing that counts, in constant memory, and intervals that hold what they promise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from streamllm.evaluate.curve import SHORTEST, STRETCHES, Curve
from streamllm.evaluate.share import share, sign_test


def fill(losses: np.ndarray, tokens: int | None = None, *, parts: int = 7) -> Curve:
    """A curve that was given ``losses`` in uneven parts."""
    curve = Curve(tokens or len(losses))
    for part in np.array_split(losses, parts):
        curve.add(part, seconds=len(part) * 0.001, cache_bytes=5, memory=9)
    return curve


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_a_curve_is_the_same_however_its_losses_come(parts: int) -> None:
    """Reference: means of slices, and counts by hand."""
    losses = np.random.default_rng(1).gamma(2, 1, 1234)
    curve = fill(losses, parts=parts)
    slices = [losses[i : i + SHORTEST] for i in range(0, 1234, SHORTEST)]
    np.testing.assert_allclose(curve.means, [part.mean() for part in slices])
    assert curve.counts.tolist() == [*[SHORTEST] * 12, 34]
    assert curve.places == [*range(100, 1201, 100), 1234]
    np.testing.assert_allclose(curve.running[-1], losses.mean())
    assert curve.perplexity == pytest.approx(math.exp(losses.mean()))
    assert sum(curve.seconds) == pytest.approx(1.234)
    assert set(curve.cache_bytes) == {5}


def test_a_curve_does_not_grow_with_the_stream() -> None:
    """Reference: the bound; a stream of a million tokens has no more stretches than one of forty thousand."""
    for tokens in (40_000, 1_000_000):
        curve = Curve(tokens)
        for _ in range(tokens // 1000):
            curve.add(np.ones(1000))
        assert len(curve.losses) == STRETCHES
        assert curve.done == tokens


def test_a_curve_comes_back_from_json() -> None:
    """Reference: the curve itself, which goes on alike."""
    losses = np.random.default_rng(2).gamma(2, 1, 500)
    whole, begun = fill(losses), fill(losses[:230], 500)
    again = Curve.from_dict(json.loads(json.dumps(begun.to_dict())))
    again.add(losses[230:])
    np.testing.assert_allclose(again.losses, whole.losses)
    assert (again.stretch, again.done) == (whole.stretch, whole.done)


def test_curves_are_compared_on_the_tokens_that_both_have() -> None:
    """Reference: the means over those tokens; the longer curve goes up where the shorter one has ended."""
    base = np.random.default_rng(3).gamma(2, 1, 1000)
    long, short = fill(np.concatenate([base, base + 9]), 2000), fill(base[:730] + math.log(2), 2000)
    assert short.ratio(long)[0] == pytest.approx(2)
    assert short.ratio(long)[1:] == [None, None]  # of seven stretches
    assert long.ratio(short)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no tokens in common"):
        Curve(80_000).ratio(Curve(40_000))


def test_the_end_of_a_curve_is_a_curve() -> None:
    """Reference: the means over those tokens; the last stretch is shorter."""
    losses = np.random.default_rng(6).gamma(2, 1, 1950)
    tail = fill(losses).tail(9)
    assert (tail.done, len(tail.losses)) == (850, 9)
    assert tail.perplexity == pytest.approx(math.exp(losses[1100:].mean()))
    assert tail.ratio(fill(losses[1100:] + math.log(2))) == pytest.approx([0.5, 0.5, 0.5])


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Reference: 300 texts with a known mean; 95 % intervals miss it in 5 % of them, within chance."""
    draw = np.random.default_rng(4)
    held = 0
    for _ in range(300):
        curve = Curve(4000)
        curve.add(draw.exponential(1.0, 4000))
        _, low, high = curve.interval()
        held += low < math.e < high
    assert 0.90 < held / 300 < 0.99


def test_an_interval_is_honest_about_passages_that_are_alike() -> None:
    """Reference: 300 texts whose difficulty drifts (correlated over some thousand tokens) around a known mean.

    Drawing single stretches would hold the truth in half of them.
    """
    draw = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        level = np.empty(400)
        level[0] = draw.normal(0, 1)
        for i in range(1, 400):
            level[i] = 0.8 * level[i - 1] + draw.normal(0, 0.6)
        curve = Curve(40_000)
        curve.add(np.repeat(level, 100) + 5)
        _, low, high = curve.interval()
        held += low < math.exp(5) < high
    assert held / 300 > 0.85


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (81, 263, 0.25530, 0.36617)],
)
def test_a_share_has_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    """Reference: E. B. Wilson's interval as tabulated (81 of 263: Newcombe 1998, 0.2553 to 0.3662)."""
    assert share(hits, count) == pytest.approx([hits / count, low, high], abs=6e-5)


@pytest.mark.parametrize(("a", "b", "p"), [(0, 0, 1), (1, 0, 1), (5, 0, 0.0625), (9, 1, 0.021484375), (6, 6, 1)])
def test_a_sign_test_is_exact(a: int, b: int, p: float) -> None:
    """Reference: tables of the binomial distribution; the order does not matter."""
    assert sign_test(a, b) == sign_test(b, a) == pytest.approx(p)
    assert sign_test(100 * a, 100 * b) <= p


def test_a_share_of_nothing_is_unknown() -> None:
    """Reference: by hand."""
    rate, low, high = share(0, 0)
    assert math.isnan(rate)
    assert (low, high) == (0, 1)
