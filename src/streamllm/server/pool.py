"""The chats that are in memory: who has one, and which goes to disk to make room for another.

A chat is for one at a time, so it is claimed and released. Those that nobody has stay, within a bound, until others
need their place or they were idle for long; then they are saved and closed, and come back when they are asked for.
Knows chats by keys; nothing here knows where they come from or what is said in them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from streamllm.config import check_count
from streamllm.errors import BusyError, StateError
from streamllm.session import Chat

PATIENCE = 1.0
"""Seconds to wait for a chat that is busy, or for a place: a reply that was cancelled has ended by then."""

Key = tuple[str, str]
"""Owner, and name of the session."""


@dataclass
class Berth:
    """The place of one chat, for whoever has claimed it.

    Args:
        key: of the chat.
        chat: itself; ``None``: it is on disk.
        is_busy: somebody has it.
        is_ending: what they wanted is done, and they will let go in a moment.
        is_seated: it has, or is about to have, a chat in memory.
        used: when it was let go, by the monotonic clock.
        window: how its window was filled when that could be looked at last.
        title: that the session is to get when it is let go.
    """

    key: Key
    chat: Chat | None = None
    is_busy: bool = True
    is_ending: bool = False
    is_seated: bool = False
    used: float = field(default_factory=time.monotonic)
    window: dict[str, int] | None = None
    title: str | None = None


class Pool:
    """See the module. All methods may be called by any thread.

    Args:
        most: chats in memory at a time.
        note: told in one sentence what went wrong where nobody can be told otherwise.

    Raises:
        ConfigError: ``most`` is below two.
    """

    def __init__(self, most: int, note: Callable[[str], None]) -> None:
        check_count("resident", most, 2)  # one is forked into another
        self.most, self._note = most, note
        self._changed = threading.Condition()
        self._berths: dict[Key, Berth] = {}  # busy or seated ones, the least recently used first

    # ---- looking

    def counts(self) -> tuple[int, int]:
        """Chats in memory, and those that somebody has."""
        with self._changed:
            berths = self._berths.values()
            return sum(berth.chat is not None for berth in berths), sum(berth.is_busy for berth in berths)

    def look(self, key: Key) -> tuple[bool, bool]:
        """Whether a chat is in memory, and whether somebody has it."""
        with self._changed:
            berth = self._berths.get(key)
            return berth is not None and berth.chat is not None, berth is not None and berth.is_busy

    def window(self, key: Key) -> dict[str, int] | None:
        """How the window of a chat in memory is filled; of a reply that goes on, as its last token told."""
        with self._changed:
            berth = self._berths.get(key)
            if berth is None or berth.chat is None or berth.window is None:
                return None
            window, stats = berth.window, berth.chat.stats
            if not berth.is_busy or stats is None or stats.tokens_seen <= window["seen"]:
                return window
            told = {"seen": stats.tokens_seen, "cached": stats.tokens_cached, "evicted": stats.tokens_evicted}
            return window | told

    def title(self, key: Key) -> str | None:
        """The title that a session is to get when it is let go."""
        with self._changed:
            berth = self._berths.get(key)
            return None if berth is None else berth.title

    # ---- having one

    def claim(self, key: Key, wait: float = 0.0) -> Berth | None:
        """Have a chat, in memory or not; ``None``: somebody else has it, also after ``wait`` seconds.

        Who is about to let go is waited for in any case.
        """
        with self._changed:
            end = time.monotonic() + PATIENCE
            patient = time.monotonic() + wait
            while (berth := self._berths.get(key)) is not None and berth.is_busy:
                left = (end if berth.is_ending else patient) - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return None
            if berth is None:
                berth = self._berths[key] = Berth(key)
            berth.is_busy = True
            return berth

    def ending(self, berth: Berth) -> None:
        """It is about to be released."""
        with self._changed:
            berth.is_ending = True
            self._changed.notify_all()

    def leave_title(self, key: Key, title: str) -> bool:
        """Leave a title for a session that somebody has; whether they will see it."""
        with self._changed:
            berth = self._berths.get(key)
            if berth is None or not berth.is_busy or berth.is_ending:
                return False
            berth.title = title
            return True

    def release(self, berth: Berth) -> None:
        """Let go of a chat; it stays in memory if it is there."""
        with self._changed:
            berth.is_busy = berth.is_ending = False
            berth.used = time.monotonic()
            if self._berths.pop(berth.key, None) is not None and berth.chat is not None:
                self._berths[berth.key] = berth  # the most recently used
            self._changed.notify_all()

    def seat(self, berth: Berth, make: Callable[[], Chat]) -> Chat:
        """The chat of a berth that the caller has claimed, made if it is not in memory.

        Raises:
            BusyError: all places are taken by chats that somebody has.
            StreamLLMError: as ``make``.
        """
        if berth.chat is not None:
            return berth.chat
        self._take_place(berth)
        try:
            berth.chat = make()
        finally:
            if berth.chat is None:
                self._leave(berth)
        return berth.chat

    def unseat(self, berth: Berth) -> None:
        """Save the chat of a berth that the caller has claimed, and close it.

        Raises:
            StateError: the disk does not take it; it stays in memory then.
        """
        if berth.chat is None:
            return
        chat = berth.chat
        chat.sampling = chat.sampling  # writes: what is not written yet must not be closed on a full disk
        try:
            chat.close()
        finally:
            self._leave(berth)

    def vacate(self, berth: Berth) -> Chat | None:
        """Take the chat out of a berth that the caller has claimed; it is the caller's to close."""
        chat = berth.chat
        self._leave(berth)
        return chat

    # ---- room

    def sweep(self, idle: float) -> int:
        """Put chats on disk that nobody had for so many seconds; how many that were."""
        count = 0
        tried: set[Key] = set()
        while True:
            with self._changed:
                before = time.monotonic() - idle
                due = (b for b in self._berths.values() if not b.is_busy and b.used <= before and b.key not in tried)
                berth = next(due, None)
                if berth is None:
                    return count
                berth.is_busy = berth.is_ending = True
            tried.add(berth.key)
            count += self._put_away(berth)

    def close(self) -> None:
        """End and save all chats, whoever has them."""
        with self._changed:
            berths = list(self._berths.values())
        for berth in berths:
            try:
                if berth.chat is not None:
                    berth.chat.close()
            except (StateError, BusyError) as error:
                self._note(f"Session {berth.key[1]!r} was not saved: {error}")
            else:
                self._leave(berth)

    def _take_place(self, berth: Berth) -> None:
        """Make room for one more chat, at the cost of the one that was not used for longest."""
        end = time.monotonic() + PATIENCE
        tried: set[Key] = set()
        while True:
            with self._changed:
                if sum(other.is_seated for other in self._berths.values()) < self.most:
                    berth.is_seated = True
                    return
                idle = (b for b in self._berths.values() if b.is_seated and not b.is_busy and b.key not in tried)
                victim = next(idle, None)
                if victim is None:
                    left = end - time.monotonic()
                    if left <= 0:
                        raise BusyError(
                            f"{self.most} conversations are in use at the same time, which is all that memory is kept "
                            "for: wait until one is done, or let the operator allow more."
                        )
                    self._changed.wait(left)
                    continue
                victim.is_busy = victim.is_ending = True
            tried.add(victim.key)
            self._put_away(victim)

    def _put_away(self, berth: Berth) -> bool:
        """Put a chat on disk that was claimed for that; whether it is there."""
        try:
            self.unseat(berth)
        except (StateError, BusyError) as error:
            self._note(f"Session {berth.key[1]!r} stays in memory: {error}")
        finally:
            used = berth.used
            self.release(berth)
            berth.used = used
        return berth.chat is None

    def _leave(self, berth: Berth) -> None:
        with self._changed:
            berth.chat, berth.is_seated = None, False
            self._changed.notify_all()
