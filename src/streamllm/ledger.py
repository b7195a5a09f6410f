"""Who stays: the bookkeeping of slots, evictions and positions, in plain integers.

The ledger knows nothing about tensors. It decides *what* is to be done and hands it out as steps (``Evict``,
``Rotate``, ``Move``) that every layer then carries out on its own keys and values.

Layout: a layer stores ``slots`` columns. All rows of a batch end at the same column ``end`` (their newest token),
and row ``r`` begins at its own ``start``; what lies left of ``start`` is garbage. So rows of different age need
nothing but the ordinary two-dimensional padding mask that every transformers model understands::

    slot     0 . . . . . . . . . . . end
    row 0    s s s s w w w w w w w w          s  pinned head (sinks)
    row 1    . . . . . s s s s w w w          w  window

Positions (algorithm: paper section 3.2): a token is read at position ``frame + cached``. Window keys keep the
rotation they were stored with; the pinned head is rotated by ``frame``, the tokens evicted since positions last
restarted, so that positions are contiguous again. When positions would pass ``limit`` the window is *rebased*: its
keys are rotated back by ``frame`` and ``frame`` restarts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Evict:
    """Drop ``count`` tokens behind the pinned head: the head is written anew ``count`` columns further right.

    ``frame`` is the rotation that the head gets. ``capture``: first copy the head as it was stored, unrotated.
    """

    rows: slice
    start: int
    head: int
    count: int
    frame: int
    capture: bool


@dataclass(frozen=True)
class Rotate:
    """Rotate the keys in columns ``start:stop`` by ``offset`` positions."""

    rows: slice
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Move:
    """Copy ``length`` columns from ``source`` to ``target``; the two may overlap."""

    rows: slice
    source: int
    target: int
    length: int


Step = Evict | Rotate | Move


@dataclass
class Row:
    """One stream of the batch.

    ``pinned``: tokens of its head that never leave, present or still to come. ``borders``: where turns begin that are
    still in the window, in tokens of the stream.
    """

    pinned: int
    seen: int = 0
    start: int = 0
    frame: int = 0
    captured: bool = False
    borders: tuple[int, ...] = ()


@dataclass(frozen=True)
class Span:
    """One forward: ``columns`` new columns, of which row ``r`` fills the last ``counts[r]``.

    ``crossings`` > 0: the span runs over that many evictions (all rows of equal age), see ``Ledger.crossings``.
    """

    columns: int
    counts: tuple[int, ...]
    crossings: int = 0

    @property
    def is_padded(self) -> bool:
        """Whether some row fills fewer columns than the span has."""
        return any(count < self.columns for count in self.counts)


@dataclass
class Ledger:
    """The columns of one kind of layer.

    Args:
        window: every token attends to at least its ``window`` newest tokens, itself included.
        block: tokens that leave together.
        limit: positions stay below it; at least the capacity of every row.
        slack: columns beyond the capacity, which rows of different age need to stay aligned.
        rows: the streams of the batch.
    """

    window: int
    block: int
    limit: int
    slack: int
    rows: list[Row]
    end: int = 0
    steps: list[Step] = field(default_factory=list)
    span: Span | None = None

    # ---- what is where

    @property
    def slots(self) -> int:
        """Columns that a layer allocates."""
        return max(self.capacity(row) for row in self.rows) + self.slack

    def capacity(self, row: Row) -> int:
        """Most tokens that ``row`` can hold: pinned + window + block - 1."""
        return row.pinned + self.window + self.block - 1

    def cached(self, row: Row) -> int:
        """Tokens that ``row`` holds."""
        return self.end - row.start

    def head(self, row: Row) -> int:
        """Pinned tokens that ``row`` holds."""
        return min(row.pinned, self.cached(row))

    def room(self, row: Row) -> int:
        """Tokens that ``row`` can read before its next eviction is due (one that is due already counts as done)."""
        return self.capacity(row) - self.cached(row) or self.due(row)

    def first(self, row: Row) -> int:
        """Number in the stream of the oldest token of ``row`` behind its head."""
        return row.seen - self.cached(row) + self.head(row)

    def due(self, row: Row) -> int:
        """Tokens of a full ``row`` that leave together: whole turns if half the window stays, or else a block."""
        first, most = self.first(row), self.window - self.window // 2 + self.block - 1
        turns = next((border - first for border in row.borders if border - first >= self.block), self.block)
        return turns if turns <= most else self.block

    def position(self, row: Row) -> int:
        """Position of the next token of ``row``, after an eviction that is due."""
        return self._next_frame(row) + self.capacity(row) - self.room(row)

    @property
    def low(self) -> int:
        """First column that any row uses."""
        return min(self.end, *(row.start for row in self.rows))

    @property
    def length(self) -> int:
        """Columns in use: the tokens of the row that holds most."""
        return self.end - self.low

    @property
    def is_uniform(self) -> bool:
        """Whether all rows are of the same age, so that one step serves them all and no mask is needed."""
        return all(row == self.rows[0] for row in self.rows)

    # ---- changes

    def evict(self, index: int | None, count: int) -> int:
        """Drop the ``count`` oldest unpinned tokens of row ``index`` (``None``: of all rows, which are uniform).

        Returns the number of positions by which its keys were moved back (a rebase), or 0.
        """
        where, row = (slice(None), self.rows[0]) if index is None else (slice(index, index + 1), self.rows[index])
        rebased = row.frame + count if self._rebases(row, count) else 0
        new = replace(
            row,
            start=row.start + count,
            frame=0 if rebased else row.frame + count,
            captured=row.captured or row.pinned > 0,
            borders=tuple(border for border in row.borders if border > self.first(row) + count),
        )
        head = self.head(row)
        if head:
            self.steps.append(Evict(where, row.start, head, count, new.frame, capture=not row.captured))
        if rebased:
            self.steps.append(Rotate(where, new.start + head, self.end, -rebased))
        self._put(index, new)
        return rebased

    def open(self, span: Span) -> None:
        """Make room for ``span`` on the right; evictions that are due have been made before."""
        if self.end + span.columns > self.slots:
            self._compact()
        for index, row in enumerate(self.rows):
            pad = span.columns - span.counts[index]
            if pad:
                if self.cached(row):
                    where = slice(index, index + 1)
                    self.steps.append(Move(where, row.start, row.start + pad, self.cached(row)))
                self._put(index, replace(row, start=row.start + pad))
        self.span = span

    def close(self) -> None:
        """The span has been read: its tokens are cached now."""
        span = self.span
        assert span is not None
        self.span = None
        if span.crossings:
            dropped = span.crossings * self.block
            row = self.rows[0]
            self.end = self.cached(row) + span.columns - dropped
            captured = row.captured or row.pinned > 0
            frame = row.frame + dropped
            self._put(None, replace(row, start=0, seen=row.seen + span.columns, frame=frame, captured=captured))
        else:
            self.end += span.columns
            for row, count in zip(self.rows, span.counts, strict=True):
                row.seen += count

    def crossings(self, columns: int) -> int:
        """How many evictions ``columns`` more tokens of uniform rows, none of which is full, would run over."""
        row = self.rows[0]
        return max(0, -(-(columns - self.capacity(row) + self.cached(row)) // self.block))

    def max_columns(self, most: int) -> int:
        """Most tokens, up to ``most``, that uniform rows can read in one forward without a rebase on the way.

        The span ends where an eviction is due, so that the next one begins with it.
        """
        row = self.rows[0]
        before_rebase = (self.limit - self.capacity(row) - self._next_frame(row)) // self.block
        blocks = min(before_rebase, (most - self.room(row)) // self.block)
        return self.room(row) + max(0, blocks) * self.block

    def drop_stale(self, columns: int) -> None:
        """Make room for ``columns`` by dropping what no later token can see (a layer with a window of its own)."""
        for index, row in enumerate(self.rows):
            stale = self.cached(row) - (self.window - 1)
            if stale > 0 and self.cached(row) + columns > self.capacity(row):
                self._put(index, replace(row, start=row.start + stale))

    def rotate_back(self, index: int | None, offset: int) -> None:
        """Follow a rebase of the ledger that keeps the positions."""
        where, row = (slice(None), self.rows[0]) if index is None else (slice(index, index + 1), self.rows[index])
        if self.cached(row):
            self.steps.append(Rotate(where, row.start, self.end, -offset))

    def mark(self, index: int, ahead: int = 0) -> None:
        """A turn of row ``index`` begins after ``ahead`` more tokens."""
        row, border = self.rows[index], self.rows[index].seen + ahead
        if border > max(self.first(row), *row.borders, 0):
            row.borders += (border,)

    def reset(self, index: int | None = None) -> None:
        """Forget all tokens of one row, or of all; what is pinned stays the same number."""
        for i, row in enumerate(self.rows):
            if index in (None, i):
                self.rows[i] = Row(row.pinned, start=self.end)
        if all(row.start == self.end for row in self.rows):
            self.end = 0
            for row in self.rows:
                row.start = 0

    def is_full(self, row: Row) -> bool:
        """Whether an eviction is due before the next token."""
        return self.cached(row) == self.capacity(row)

    def _next_frame(self, row: Row) -> int:
        """Frame of ``row`` after an eviction that is due."""
        if not self.is_full(row):
            return row.frame
        count = self.due(row)
        return 0 if self._rebases(row, count) else row.frame + count

    def _rebases(self, row: Row, count: int) -> bool:
        """Whether positions must restart when ``count`` tokens of ``row`` leave."""
        return row.frame + count + self.capacity(row) > self.limit

    def _compact(self) -> None:
        """Move everything to the left border."""
        low, length = self.low, self.length
        if low:
            self.steps.append(Move(slice(None), low, 0, length))
            self.end -= low
            for row in self.rows:
                row.start -= low

    def _put(self, index: int | None, row: Row) -> None:
        for i in range(len(self.rows)) if index is None else (index,):
            self.rows[i] = replace(row)
