"""A reply as OpenAI's chat completion: the events of a stream, or one object."""

from __future__ import annotations

from typing import Any

from streamllm.server.events import Frame, event

EVENT = "chat.completion.chunk"


class ChatEvents:
    """Makes the events of one choice of a chat completion.

    Args:
        head: id, created and model.
        index: of the choice.
    """

    def __init__(self, head: dict[str, Any], index: int) -> None:
        self._head, self._index = {**head, "object": EVENT}, index
        self._frame = Frame(self._value({"content": Frame.BLANK}))

    def began(self) -> bytes:
        """The first event, with the role."""
        return event(self._value({"role": "assistant", "content": ""}))

    def text(self, text: str, **more: Any) -> bytes:
        """The event of a text."""
        return event({**self._value({"content": text}, **more)}) if more else self._frame.fill(text)

    def ended(self, finish: str, **more: Any) -> bytes:
        """The last event of the choice."""
        return event(self._value({}, finish=finish) | more)

    def _value(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> dict[str, Any]:
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [choice], **more}


def usage_event(head: dict[str, Any], usage: dict[str, Any]) -> bytes:
    """The event after all choices that says what it has cost."""
    return event({**head, "object": EVENT, "choices": [], "usage": usage})


def usage_of(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """What a completion has cost, in tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
