"""Which turns of a conversation are in the window: bookkeeping in plain integers.

Knows nothing about text or models. Tokens are numbered as the cache counts them; ``before`` are the conversation's
tokens that this cache never read, because the window was read anew. Bounded by the window: a turn has a token at least.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from streamllm.passages import Place


@dataclass
class Residents:
    """The turns that are in the window, wholly or in part.

    Args:
        before: tokens of the conversation that the cache never read.
        turns: number of each turn and of its first token, the oldest first.
    """

    before: int = 0
    turns: deque[tuple[int, int]] = field(default_factory=deque)

    def begin(self, number: int, first: int) -> None:
        """A turn begins with token ``first``."""
        self.turns.append((number, first))

    def let_go(self, gone: int) -> None:
        """All tokens below ``gone`` have left, but for the pinned head."""
        while len(self.turns) > 1 and self.turns[1][1] <= gone:
            self.turns.popleft()

    @property
    def oldest(self) -> int:
        """Number of the oldest turn that has a token in the window; 1 while there is none."""
        return self.turns[0][0] if self.turns else 1

    def place(self, gone: int) -> Place:
        """Up to where the conversation has left the window."""
        if not self.turns:
            return Place(1, 0)
        number, first = self.turns[0]
        return Place(number, max(0, gone - first))

    def copy(self) -> Residents:
        """An independent copy."""
        return Residents(self.before, deque(self.turns))

    def state(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {"before": self.before, "turns": [list(turn) for turn in self.turns]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Residents:
        """What ``state`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        return cls(int(state["before"]), deque((int(number), int(first)) for number, first in state["turns"]))
