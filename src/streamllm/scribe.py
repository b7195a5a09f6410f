"""Keeps the transcript in step with the stream, whatever breaks off: nothing is lost, nothing is written twice.

A token is written before it is shown. If that fails, or is interrupted at any point, the two are compared: all that was
read and drawn must be in the transcript, so what the stream has beyond it is written then. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable

from streamllm.context import Context
from streamllm.detokenize import PRIME_TAIL, Decoder
from streamllm.loop import Chunk, end_ids
from streamllm.transcript import Transcript

TAIL = 64
"""Tokens at the end of a reply whose text is looked at: far more than stop strings and broken characters hold back."""


class Scribe:
    """Writes one conversation down.

    Args:
        transcript: where to.
        context: the stream.

    Attributes:
        is_settled: no reply goes on, and all of the last one is written.
    """

    def __init__(self, transcript: Transcript, context: Context) -> None:
        self.transcript, self.context = transcript, context
        self.is_settled = True
        self._text, self._ids = "", []  # type: tuple[str, list[int]]
        self._end: tuple[str, int | None] = ("interrupted", None)

    @property
    def is_whole(self) -> bool:
        """Whether the stream has all that the transcript has: no interrupt has left it half-written or half-read."""
        return self.context.cache.is_whole and not self._ahead

    @property
    def _ahead(self) -> int:
        """Tokens that the stream has and the transcript has not; negative: it lacks some."""
        context = self.context
        return context.tokens_seen + len(context.cache.unread) - self.transcript.tokens()

    def begin(self) -> None:
        """A reply begins, or goes on."""
        self.is_settled = False
        self._text, self._ids, self._end = "", [], ("interrupted", None)

    def took(self, chunk: Chunk) -> None:
        """Write what a token brought.

        Raises:
            StateError: it cannot be written; ``settle`` will try again.
        """
        self._text, self._ids = chunk.shown, [] if chunk.id is None or chunk.finish == "end" else [chunk.id]
        if chunk.finish:
            self._end = (chunk.finish, chunk.id if chunk.finish == "end" else None)
        self.transcript.write(self._text, self._ids)
        self._text, self._ids = "", []

    def told(self, user: str, prompt_ids: list[int], reply: str, ids: list[int], count: Callable[[str], int]) -> None:
        """Write a whole turn that was said elsewhere.

        Raises:
            StateError: it cannot be written.
        """
        self.transcript.begin(user, prompt_ids=prompt_ids, count=count)
        self.transcript.write(reply, ids)
        self.transcript.end("end")

    def ended(self) -> None:
        """The reply has ended; ``settle`` writes that. An end token is not read: the template puts its own in."""
        if self._end[0] == "end":
            self.context.cache.unread = []

    def settle(self) -> bool:
        """Write what is not written yet; whether there was anything.

        Raises:
            StateError: it cannot be written.
        """
        if self.is_settled:
            return False
        unread, ahead = self.context.cache.unread, self._ahead
        if ahead == 1 and unread:
            text = self._text if self._ids == unread else Decoder(self.context.tokenizer).push(unread[0])
            self.transcript.write(text, unread)
        elif not self._ids:
            self.transcript.write(self._text, [])
        self._text, self._ids = "", []
        finish, end_id = self._end
        if finish == "interrupted":
            self.complete()
        self.transcript.end(finish, end_id)
        self.is_settled = True
        return True

    def complete(self) -> None:
        """Write the text of the last reply's tokens that was held back when it was broken off.

        Raises:
            StateError: it cannot be written.
        """
        last = self.transcript.last()
        if last is None or not last.reply_tokens:
            return
        ids = self.transcript.reply_ids(last.number)[-TAIL:]
        ends = end_ids(self.context.model, self.context.tokenizer)
        passed = max((place for place, id in enumerate(ids, 1) if id in ends), default=0)
        ids = ids[passed:]  # nothing was held back where a document ended
        decoder = Decoder(self.context.tokenizer)
        tail = "".join(map(decoder.push, ids)).lstrip("\N{REPLACEMENT CHARACTER}")
        known = next((end for end in range(len(tail), 0, -1) if last.reply.endswith(tail[:end])), 0)
        if known or not last.reply or (passed and last.reply.endswith("\n\n")):
            self.transcript.write(tail[known:], [])

    def decoder(self) -> Decoder:
        """What spells the reply on from where it was broken off."""
        number = self.transcript.count()
        ids = self.transcript.reply_ids(number) or self.transcript.prompt_ids(number)
        decoder = Decoder(self.context.tokenizer)
        decoder.prime(ids[-PRIME_TAIL:])
        return decoder
