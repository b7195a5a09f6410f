"""Wakes readers in asyncio from threads that write: many at once by one call into the loop.

A token for each of many streams comes at the same moment; a wake-up of the loop for each would cost more than the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque


class Sleeper:
    """Someone in asyncio who waits to be rung."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    async def sleep(self, seconds: float | None = None) -> bool:
        """Wait until rung, or so long; whether it was rung."""
        self._future = asyncio.get_running_loop().create_future()
        try:
            if seconds is None:
                await self._future
            else:
                async with asyncio.timeout(seconds):
                    await self._future
        except TimeoutError:
            return False
        finally:
            self._future = None
        return True

    def wake(self) -> None:
        """End the wait; called in the loop."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class Bell:
    """Rings in one loop, from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._due: deque[Sleeper] = deque()
        self._is_rung = False

    def ring(self, sleeper: Sleeper) -> None:
        """Wake somebody soon."""
        self._due.append(sleeper)
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_rung = False  # before looking: who comes from now on rings anew
        while self._due:
            self._due.popleft().wake()
