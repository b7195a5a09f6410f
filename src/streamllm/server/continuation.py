"""A conversation that a request goes on with: a chat, had alone until it is released, and what it took to get there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from streamllm.errors import StreamLLMError
from streamllm.reply import Reply
from streamllm.session import Chat, Recall

How = Literal["new", "continued", "forked", "streamed"]
"""A session begins with this request; one goes on; a copy of one goes on; one begins with turns said elsewhere."""


class Continuation:
    """See the module. ``with`` releases it.

    The tokens of a prompt are ``cached_tokens + read_tokens`` and those that the reply's record says were read.

    Args:
        chat: to be used by one thread at a time; never closed by whoever uses it.
        session_id: of its session.
        how: it came to be.
        text: what the user says now, of a client that resends everything; empty otherwise.
        cached_tokens: of the conversation so far that were not read for this request.
        read_tokens: those that were: of turns said elsewhere, and of a window that was read anew.
        done: registers the conversation.
        released: lets go of the chat.
    """

    def __init__(
        self,
        chat: Chat,
        session_id: str,
        how: How,
        *,
        text: str = "",
        cached_tokens: int = 0,
        read_tokens: int = 0,
        done: Callable[[], None],
        released: Callable[[], None],
    ) -> None:
        self.chat, self.session_id, self.how, self.text = chat, session_id, how, text
        self.cached_tokens, self.read_tokens = cached_tokens, read_tokens
        self._done, self._released = done, released
        self._turns, self._reread = chat.turns, chat.tokens_reread
        self._is_done = self._is_released = False

    @contextmanager
    def recalling(self, recall: Recall | None) -> Iterator[None]:
        """Let what is said in the block be said with passages in front of it or without; ``None``: as in all turns."""
        before = self.chat.recall
        self.chat.recall = before if recall is None else recall
        try:
            yield
        finally:
            self.chat.recall = before

    def began(self, reply: Reply) -> None:
        """``reply`` is about to be read: turns may have been taken back for it, and the window read anew."""
        chat = self.chat
        self.read_tokens += chat.tokens_reread - self._reread
        self._reread = chat.tokens_reread
        if chat.template.is_incremental:
            self.cached_tokens = max(0, chat.transcript.tokens() - reply.read - self.read_tokens)

    def done(self, reply: Reply) -> None:
        """``reply`` has ended: the conversation is recognised by it from now on.

        Call it before the client can know that the reply is over, or its next request may come too early.
        """
        reply.close()
        if not self._is_done:
            self._is_done = True
            self._done()

    def release(self) -> None:
        """Let go of the chat; a second time does nothing. A reply that goes on is ended.

        A message to which not one token was replied is taken back: who sends it again says it once.
        """
        if self._is_released:
            return
        self._is_released = True
        try:
            with suppress(StreamLLMError):  # what cannot be done now is done when the chat is used again
                self._take_back_what_failed()
            if not self._is_done:
                self._done()
        finally:
            self._released()

    def __enter__(self) -> Continuation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take_back_what_failed(self) -> None:
        chat = self.chat
        if chat.turns <= self._turns:
            return
        last = chat.transcript.last()
        if last is not None and not last.reply_tokens and last.finish in (None, "interrupted"):
            chat.undo(1, rebuild=True)
            self._is_done = False
