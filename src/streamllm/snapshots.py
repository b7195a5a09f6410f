"""The streams as they were when turns began: for taking turns back, within a bound of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from streamllm.cache import SinkCache
from streamllm.config import check_count
from streamllm.residents import Residents

MAX_BYTES = 1 << 28
"""Bytes of all snapshots together; the newest is kept whatever it takes."""


@dataclass(frozen=True)
class Snapshot:
    """A conversation at the border before a turn.

    Args:
        turn: number of the turn that began here.
        cache: a copy of its cache, which nobody changes.
        recent: tokens that the sampler remembered.
        residents: the turns in the window.
    """

    turn: int
    cache: SinkCache
    recent: tuple[int, ...]
    residents: Residents


class Snapshots:
    """The newest snapshots.

    Args:
        most: how many are kept; 0 keeps none.
        most_bytes: bytes of their caches together.

    Raises:
        ConfigError: ``most`` is negative.
    """

    def __init__(self, most: int, most_bytes: int = MAX_BYTES) -> None:
        check_count("snapshots", most, 0)
        self.most, self.most_bytes = most, most_bytes
        self._kept: deque[Snapshot] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes of all caches."""
        return sum(kept.cache.bytes for kept in self._kept)

    @property
    def oldest(self) -> int | None:
        """The first turn that can be taken back."""
        return self._kept[0].turn if self._kept else None

    def keep(self, snapshot: Snapshot) -> None:
        """Keep one more; the oldest go."""
        self._kept.append(snapshot)
        while len(self._kept) > self.most or (len(self._kept) > 1 and self.bytes > self.most_bytes):
            self._kept.popleft()

    def has(self, turn: int) -> bool:
        """Whether there is one before ``turn``."""
        return any(kept.turn == turn for kept in self._kept)

    def take(self, turn: int) -> Snapshot | None:
        """The snapshot before ``turn``; it and all later ones are no longer kept. ``None``: there is none."""
        if not self.has(turn):
            return None
        while True:
            last = self._kept.pop()
            if last.turn == turn:
                return last

    def clear(self) -> None:
        """Keep none."""
        self._kept.clear()

    def copy(self) -> Snapshots:
        """The same snapshots, kept for another conversation; their caches are shared, since nobody changes them."""
        other = Snapshots(self.most, self.most_bytes)
        other._kept = deque(self._kept)
        return other
