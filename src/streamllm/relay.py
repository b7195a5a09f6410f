"""The chunks of a reply that an engine generates beside others: in order, and none lost when the reply is broken off.

An engine runs ahead of whoever reads. So what came and was not taken is handed over at the end, and a stream stands
still while it is saved. Knows nothing of turns or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from streamllm.loop import Chunk
from streamllm.request import Request


class Submitter(Protocol):
    """Generates streams side by side: an ``Engine``."""

    @property
    def submit(self) -> Callable[..., Request]:
        """Queue a stream; see ``Engine.submit``."""

    def look_for_room(self) -> None:
        """Refuse what cannot be queued now; see ``Engine.look_for_room``."""


def relay(request: Request, every: int, save: Callable[[], None], spill: Callable[[Chunk], None]) -> Iterator[Chunk]:
    """The chunks of a stream of an engine.

    Args:
        request: the stream.
        every: tokens after which it is saved.
        save: called while the stream stands still, and all its chunks have been asked for.
        spill: takes the chunks that came before the reader broke off, and that it has not seen.

    Yields:
        The chunks. Whoever closes the iterator cancels the stream and waits until its cache is its own again.

    Raises:
        StreamLLMError: the stream failed.
    """
    unsaved = 0
    waiting: list[Chunk] = []
    try:
        for chunk in request:
            yield chunk
            unsaved += 1
            if unsaved >= every and not chunk.finish:
                unsaved = 0
                with request.still():
                    waiting = request.ready()
                    while waiting:
                        yield waiting.pop(0)
                    if request.state == "suspended":
                        save()
    finally:
        request.close()
        for chunk in [*waiting, *request.ready()]:
            spill(chunk)
