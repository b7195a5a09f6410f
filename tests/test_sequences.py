"""The order of reading: every window once an epoch, decided by the seed and the step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamllm.train.sequences import Sequences, Stretch

SPAN = 10

STRETCHES = [
    [Stretch(0, 10)],
    [Stretch(0, 19)],
    [Stretch(3, 24)],
    [Stretch(0, 1000)],
    [Stretch(0, 333), Stretch(333, 700, 3), Stretch(720, 1000)],
]


def make(stretches: list[Stretch], seed: int = 0) -> Sequences:
    """Sequences of a corpus whose tokens are their own places, so that a window shows where it was cut."""
    return Sequences(np.arange(max(stretch.end for stretch in stretches), dtype=np.uint16), stretches, SPAN, seed)


def starts(sequences: Sequences, epoch: int) -> list[int]:
    """Where the windows of an epoch begin."""
    found: list[int] = sequences.batch(epoch * len(sequences), len(sequences))[:, 0].tolist()
    return found


def within(start: int, stretch: Stretch) -> bool:
    return stretch.begin <= start and start + SPAN <= stretch.end


@pytest.mark.parametrize("stretches", STRETCHES, ids=str)
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_window_is_tokens_that_follow_each_other_in_one_stretch(stretches: list[Stretch], epoch: int) -> None:
    """Reference: the corpus, whose tokens are their own places."""
    sequences = make(stretches)
    batch = sequences.batch(epoch * len(sequences), len(sequences))
    assert batch.shape == (len(sequences), SPAN)
    assert batch.dtype == np.int64
    assert np.array_equal(batch - batch[:, :1], np.tile(np.arange(SPAN), (len(sequences), 1)))
    assert all(any(within(start, stretch) for stretch in stretches) for start in batch[:, 0].tolist())


@pytest.mark.parametrize("stretches", STRETCHES, ids=str)
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_reads_every_window_once_and_those_of_a_weight_so_many_times(
    stretches: list[Stretch], epoch: int
) -> None:
    """Reference: windows side by side, one run of them for each pass over a stretch; no window is left over."""
    sequences = make(stretches)
    left = Counter(starts(sequences, epoch))
    for stretch in stretches:
        fit = max(1, (stretch.end - stretch.begin) // SPAN - 1)
        for _ in range(stretch.weight):
            first = min(start for start in left if within(start, stretch))
            left -= Counter(range(first, first + fit * SPAN, SPAN))
            assert within(first + (fit - 1) * SPAN, stretch)
    assert not left
    assert len(sequences) == sum(
        stretch.weight * max(1, (stretch.end - stretch.begin) // SPAN - 1) for stretch in stretches
    )


def test_windows_are_cut_elsewhere_in_each_epoch_and_each_pass() -> None:
    """Reference: every token of the corpus, which many epochs together read; one epoch alone does not."""
    sequences = make([Stretch(0, 57)])
    once, ever = set(), set()
    for epoch in range(200):
        read = set(sequences.batch(epoch * len(sequences), len(sequences)).ravel().tolist())
        once, ever = once or read, ever | read
    assert len(once) == 40
    assert ever == set(range(57))
    assert len({start % SPAN for start in starts(make([Stretch(0, 500, 6)]), 0)}) > 1


def test_windows_are_shuffled_anew_each_epoch_and_by_each_seed() -> None:
    """Reference: the sorted order, the next epoch and the next seed."""
    orders = [starts(make([Stretch(0, 1000)], seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(order != sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    begun = [order.index(min(order)) for order in orders]
    assert len(set(begun)) > 1


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 1000), count=st.integers(1, 60), before=st.lists(st.integers(0, 1000), max_size=4))
def test_a_batch_does_not_depend_on_what_was_read_before(first: int, count: int, before: list[int]) -> None:
    """Reference: sequences that have read nothing yet, window by window."""
    stretches = [Stretch(0, 333), Stretch(333, 500, 2)]
    sequences = make(stretches, seed=5)
    for number in before:
        sequences.batch(number, 3)
    fresh = make(stretches, seed=5)
    wanted = np.concatenate([fresh.batch(number, 1) for number in range(first, first + count)])
    assert np.array_equal(sequences.batch(first, count), wanted)


def test_reading_goes_on_over_the_end_of_an_epoch() -> None:
    """Reference: the last windows of one epoch and the first of the next."""
    sequences = make([Stretch(0, 100)])
    assert len(sequences) == 9
    both = sequences.batch(6, 6)[:, 0].tolist()
    assert both == starts(sequences, 0)[6:] + starts(sequences, 1)[:3]


def test_stretches_shorter_than_a_window_are_our_own_mistake() -> None:
    """Reference: the shortest stretch that will do, which is one window."""
    assert make([Stretch(5, 5 + SPAN)]).batch(0, 1).tolist() == [list(range(5, 5 + SPAN))]
    for stretches in ([Stretch(0, SPAN - 1)], [Stretch(0, 100), Stretch(100, 105)]):
        with pytest.raises(AssertionError):
            make(stretches)
    with pytest.raises(AssertionError):
        Sequences(np.arange(5, dtype=np.uint16), [], SPAN, 0)
