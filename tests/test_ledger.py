"""The ledger's bookkeeping, against a naive model: lists of tokens, one per row, evicted by the rule of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamllm.ledger import Evict, Ledger, Move, Rotate, Row, Span


@dataclass
class Columns:
    """What a layer would store, without tensors: for each row and slot a token and the position it is rotated to."""

    ledger: Ledger
    slots: list[list[tuple[int, int] | None]] = field(default_factory=list)
    heads: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [[None] * self.ledger.slots for _ in self.ledger.rows]
        self.heads = [[] for _ in self.ledger.rows]

    def apply(self) -> None:
        for step in self.ledger.steps:
            for row in range(len(self.slots))[step.rows]:
                columns = self.slots[row]
                match step:
                    case Evict(_, start, head, count, frame, capture):
                        if capture:
                            self.heads[row] = [columns[start + i][0] for i in range(head)]
                        for i in range(head):
                            columns[start + count + i] = (self.heads[row][i], i + frame)
                    case Rotate(_, start, stop, offset):
                        for i in range(start, stop):
                            token, position = columns[i]
                            columns[i] = (token, position + offset)
                    case Move(_, source, target, length):
                        columns[target : target + length] = columns[source : source + length]
        self.ledger.steps.clear()

    def append(self, tokens: list[list[int]], chunk: Span) -> None:
        positions = [self.ledger.position(row) for row in self.ledger.rows]
        self.ledger.open(chunk)
        self.apply()
        end = self.ledger.end
        for row, new in enumerate(tokens):
            for i, token in enumerate(new):
                self.slots[row][end + chunk.columns - len(new) + i] = (token, positions[row] + i)
        self.ledger.close()

    def held(self, row: int) -> list[tuple[int, int]]:
        return self.slots[row][self.ledger.rows[row].start : self.ledger.end]


@dataclass
class Naive:
    """One stream as the paper has it: a list of tokens; when full, the oldest ones behind the head leave."""

    pinned: int
    window: int
    block: int
    tokens: list[int] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return self.pinned + self.window + self.block - 1

    def evict(self, count: int) -> None:
        head = min(self.pinned, len(self.tokens))
        del self.tokens[head : head + count]

    def read(self, token: int) -> None:
        if len(self.tokens) == self.capacity:
            self.evict(self.block)
        self.tokens.append(token)


sizes = st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(1, 5))


@settings(max_examples=200, deadline=None)
@given(sizes=sizes, rows=st.integers(1, 4), extra=st.integers(0, 20), data=st.data())
def test_any_schedule_of_ragged_chunks_keeps_what_the_naive_streams_keep_at_contiguous_positions(
    sizes: tuple[int, int, int], rows: int, extra: int, data: st.DataObject
) -> None:
    """Reference: ``Naive``. Positions: the newest token is at ``position - 1`` and each older one just below."""
    pinned, window, block = sizes
    limit = pinned + window + block - 1 + extra
    slack = block if rows > 1 else 0
    ledger = Ledger(window, block, limit, slack, [Row(pinned) for _ in range(rows)])
    columns = Columns(ledger)
    naive = [Naive(pinned, window, block) for _ in range(rows)]
    token = 0
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["read", "read", "read", "evict", "reset"]))
        if action == "reset":
            row = data.draw(st.integers(0, rows - 1))
            ledger.reset(row)
            naive[row].tokens.clear()
        elif action == "evict":
            row = data.draw(st.integers(0, rows - 1))
            unpinned = len(naive[row].tokens) - min(pinned, len(naive[row].tokens))
            count = data.draw(st.integers(0, unpinned))
            if count:
                ledger.evict(row, count)
                naive[row].evict(count)
        else:
            for index, row in enumerate(ledger.rows):
                if ledger.is_full(row):
                    ledger.evict(index, block)
                    naive[index].evict(block)
            counts = [data.draw(st.integers(0, ledger.room(row))) for row in ledger.rows]
            width = max(1, *counts)
            if width > ledger.slots - max(ledger.cached(row) for row in ledger.rows):
                continue
            new = [[token + i for i in range(count)] for count in counts]
            token += width
            columns.append(new, Span(width, tuple(counts)))
            for stream, tokens in zip(naive, new, strict=True):
                for one in tokens:
                    stream.read(one)
        columns.apply()
        for index, row in enumerate(ledger.rows):
            held = columns.held(index)
            assert [one for one, _ in held] == naive[index].tokens
            first = row.frame
            assert [position for _, position in held] == list(range(first, first + len(held)))
            assert ledger.position(row) <= limit
            assert row.frame + ledger.capacity(row) <= limit
            assert 0 <= row.start <= ledger.end <= ledger.slots


@settings(max_examples=200, deadline=None)
@given(sizes=sizes, extra=st.integers(0, 60), chunks=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_chunks_that_cross_evictions_count_as_the_same_tokens_one_at_a_time(
    sizes: tuple[int, int, int], extra: int, chunks: list[int]
) -> None:
    """Reference: a second ledger that reads one token at a time, and the naive stream."""
    pinned, window, block = sizes
    limit = pinned + window + block - 1 + extra
    crossing = Ledger(window, block, limit, 0, [Row(pinned)])
    single = Ledger(window, block, limit, 0, [Row(pinned)])
    for wanted in chunks:
        row = crossing.rows[0]
        whole_head = crossing.cached(row) >= pinned
        width = min(wanted, crossing.max_columns(40)) if whole_head else min(wanted, crossing.room(row))
        if crossing.is_full(row):
            crossing.evict(None, block)
        chunk = Span(width, (width,), crossing.crossings(width))
        if chunk.crossings:
            crossing.span = chunk
        else:
            crossing.open(chunk)
        crossing.close()
        for _ in range(width):
            if single.is_full(single.rows[0]):
                single.evict(None, block)
            single.open(Span(1, (1,)))
            single.close()
        a, b = crossing.rows[0], single.rows[0]
        assert (a.seen, crossing.cached(a), a.frame) == (b.seen, single.cached(b), b.frame)
        assert crossing.position(a) == single.position(b)


def test_the_room_of_a_full_row_is_what_its_eviction_will_free() -> None:
    """Counted by hand: 2 + 3 + 4 - 1 = 8 tokens fill the row, and 4 leave."""
    ledger = Ledger(3, 4, 100, 0, [Row(2)])
    assert (ledger.slots, ledger.room(ledger.rows[0])) == (8, 8)
    ledger.open(Span(8, (8,)))
    ledger.close()
    assert ledger.is_full(ledger.rows[0])
    assert ledger.room(ledger.rows[0]) == 4
    assert ledger.position(ledger.rows[0]) == 8
    assert ledger.evict(None, 4) == 0
    assert ledger.cached(ledger.rows[0]) == 4


@pytest.mark.parametrize(("limit", "expected"), [(8, 4), (11, 4), (12, 8)])
def test_positions_restart_when_the_next_block_would_pass_the_limit(limit: int, expected: int) -> None:
    """Counted by hand: after the eviction positions run from 8 to 11, if 12 positions are allowed."""
    ledger = Ledger(3, 4, limit, 0, [Row(2)])
    ledger.open(Span(8, (8,)))
    ledger.close()
    assert ledger.position(ledger.rows[0]) == expected
    ledger.evict(None, 4)
    assert ledger.position(ledger.rows[0]) == expected
    assert any(isinstance(step, Rotate) for step in ledger.steps) == (expected == 4)


def test_a_layer_with_its_own_window_drops_only_what_no_later_token_can_see() -> None:
    """Counted by hand: of 7 tokens, with a window of 4, the newest 3 can still be seen by the next token."""
    ledger = Ledger(4, 4, 100, 0, [Row(0)])
    ledger.open(Span(7, (7,)))
    ledger.close()
    ledger.drop_stale(1)
    assert ledger.cached(ledger.rows[0]) == 3
    ledger.drop_stale(1)
    assert ledger.cached(ledger.rows[0]) == 3
