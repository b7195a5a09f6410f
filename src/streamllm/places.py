"""Where each stream of an engine is: in a slot or on its way there, in the queue, or apart; in memory or on disk.

Knows nothing of tokens. All but ``all`` and the counts belong to the engine's thread. The lock is the engine's, and is
held for a change of groups only, never while a cache is moved.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from streamllm.cache import SinkCache
from streamllm.errors import CacheError
from streamllm.request import Request, State
from streamllm.slots import Slots
from streamllm.state import load_state, save_state


class Places:
    """See the module.

    Args:
        model: whose streams they are.
        slots: where streams decode side by side; ``None``: this model's streams decode each by itself.
        count: streams that are active at the same time.
        most_apart: caches that memory has room for beside the slots; all of them, if there are no slots.
        folder: where further ones go, which is there; ``None``: nowhere.
        quantum: tokens of its share; after them a stream leaves for others that wait.
        changed: the engine's lock.
        empty: makes a cache that holds nothing.
        fail: ends a stream by an error.
        tell: told in one sentence that nothing more can be put into the folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: Slots | None,
        count: int,
        most_apart: int,
        folder: Path | None,
        quantum: int,
        changed: threading.Condition,
        empty: Callable[[], SinkCache],
        fail: Callable[[Request, Exception], None],
        tell: Callable[[str], None],
    ) -> None:
        self.count, self.slots = count, slots
        self.active: list[Request] = []  # has a slot, or reads its prompt to get into it
        self.queue: deque[Request] = deque()  # wants one
        self.apart: list[Request] = []  # suspended
        self.files: dict[int, Path] = {}  # of those on disk, by their numbers
        self._model, self._most_apart, self._folder, self._quantum = model, most_apart, folder, quantum
        self._changed, self._empty, self._fail, self._tell = changed, empty, fail, tell

    # ---- for every thread

    def all(self) -> list[Request]:
        """All streams that are not done."""
        with self._changed:
            return [*self.active, *self.queue, *self.apart]

    def add(self, request: Request) -> None:
        """Put a new stream into the queue."""
        with self._changed:
            self.queue.append(request)
            self._changed.notify_all()

    # ---- for the engine's thread

    def next(self) -> tuple[Request, Request | None] | None:
        """Who becomes active next, and who leaves for it, if somebody must.

        It is the first in the queue that can go on, and for whose cache there is room. Readers may take chunks at any
        moment, so who is stuck is asked here, once.
        """
        with self._changed:
            victim = self._victim() if self.is_crowded else None
            if self.is_crowded and victim is None:
                return None
            for request in self.queue:
                if not request.is_full and self._has_room(request, victim):
                    return request, victim
            return None

    @property
    def is_crowded(self) -> bool:
        """Whether nobody can become active unless another leaves."""
        return len(self.active) >= self.count

    def enter(self, request: Request, victim: Request | None) -> None:
        """Make the stream that is ``next`` active, in another's place if need be.

        Nothing comes of it if the disk turns out to be full on the way: who is next is another question then.

        Raises:
            StateError: its file cannot be read.
            Exception: there is no memory for it.
        """
        if victim is not None:
            if self._has_slot(victim) and not self._make_room():
                return
            self.move(victim, self.queue, "waiting")
        if (self._needs_room(request) and not self._make_room()) or request.state == "done":
            return
        with self._changed:
            self._remove(request)
            self.active.append(request)
            request.tokens_in_slot = 0
            request.state = "decoding" if request.turn.drawn else "reading"
        self._fetch(request)
        request.is_begun = True
        if request.state == "decoding":
            self.settle(request)

    def settle(self, request: Request) -> None:
        """Give an active stream that decodes its slot."""
        if self.slots is not None:
            self.slots.take(request.turn.cache)

    def move(self, request: Request, group: Any, state: State) -> None:
        """Let a stream go from wherever it is to ``queue`` or ``apart``; if that fails, it fails."""
        try:
            if self._has_slot(request):
                self._make_room()
                self._release(request)
            elif request.is_held:
                self._fetch(request)
        except Exception as error:  # no memory, or its file cannot be read
            self._fail(request, error)
            return
        with self._changed:
            self._remove(request)
            group.append(request)
            request.state = state
            self._changed.notify_all()
        request.moved()  # not with the lock held, as its own is taken first elsewhere

    def rotate(self, request: Request) -> None:
        """Make an active stream the last of them."""
        with self._changed:
            self.active.remove(request)
            self.active.append(request)

    def leave(self, request: Request) -> Exception | None:
        """Let go of a stream for good, its cache in memory of its own; the reason, if that cannot be."""
        failed = None
        try:
            self._release(request)
            self._fetch(request)
        except Exception as error:  # no memory: the cache is given up; its file, if there is one, stays
            failed = error
            if self.slots is not None and self._has_slot(request):
                self.slots.drop(request.turn.cache)
        with self._changed:
            self.files.pop(request.id, None)
            self._remove(request)
        return failed

    def in_memory(self) -> int:
        """Caches in memory beside the slots."""
        return sum(r.is_begun and r.id not in self.files and not self._has_slot(r) for r in self.all())

    # ---- inside

    def _victim(self) -> Request | None:
        """Whose turn it is to leave for others: nobody reads it, or it has had its share."""
        stuck = [r for r in self.active if r.is_full]
        done = [r for r in self.active if r.tokens_in_slot >= self._quantum]
        return next(iter(stuck or sorted(done, key=lambda r: -r.tokens_in_slot)), None)

    def _has_slot(self, request: Request) -> bool:
        return self.slots is not None and request.turn.cache in self.slots.caches

    def _has_room(self, request: Request, victim: Request | None) -> bool:
        """Whether memory suffices if one becomes active, and another gives up its slot, maybe."""
        more = self._needs_room(request) + (victim is not None and self._has_slot(victim))
        if not more:
            return True
        if self._folder is None:
            return self.in_memory() + more <= self._most_apart
        # One after the other, and all may go to disk but those that are active beside the slots.
        staying = sum(other is not victim and not self._has_slot(other) for other in self.active)
        return staying < self._most_apart

    def _needs_room(self, request: Request) -> bool:
        """Whether a stream's cache takes memory beside the slots when it enters, and did not before."""
        return not request.is_begun or request.id in self.files

    def _release(self, request: Request) -> None:
        """Out of its slot, if it is in one."""
        if self.slots is not None and self._has_slot(request):
            self.slots.release(request.turn.cache)

    def _fetch(self, request: Request) -> None:
        """Back from disk, if it is there."""
        if request.id in self.files:
            request.turn.cache.take_over(load_state(self.files[request.id], self._model).cache)
            self.files.pop(request.id).unlink(missing_ok=True)

    def _make_room(self) -> bool:
        """Put caches on disk, those first that get a slot last, until one more fits into memory; whether it does."""
        with self._changed:  # others are added to the queue meanwhile
            last_first = [*reversed(self.apart), *reversed(self.queue)]
        for request in last_first:
            if self._folder is None or self.in_memory() < self._most_apart:
                break
            if not self._needs_room(request) and not request.is_held:
                self._put_on_disk(request, self._folder)
        return self.in_memory() < self._most_apart

    def _put_on_disk(self, request: Request, folder: Path) -> None:
        """Its cache stays the object that its user may hold, and holds nothing meanwhile."""
        path = folder / f"engine-{os.getpid()}-{id(self):x}-{request.id}.stream"
        try:
            save_state(path, request.turn.cache)
        except CacheError as error:  # its cache is in pieces
            self._fail(request, error)
        except Exception as error:  # no space: what is in memory is whole, and stays there
            self._folder = None
            self._tell(f"Streams that wait stay in memory from here on, so fewer are served in turns: {error}")
        else:
            request.turn.cache.take_over(self._empty())
            self.files[request.id] = path

    def _remove(self, request: Request) -> None:
        """Out of whichever group it is in; called with the lock held."""
        for group in (self.active, self.queue, self.apart):
            if request in group:
                group.remove(request)
