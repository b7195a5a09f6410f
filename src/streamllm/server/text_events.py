"""A completion of plain text in OpenAI's shape: the events of a stream, or one object."""

from __future__ import annotations

from typing import Any

from streamllm.server.events import Frame, event


class TextEvents:
    """Makes the events of one choice of a completion.

    Args:
        head: id, object, created and model.
        index: of the choice.
    """

    def __init__(self, head: dict[str, Any], index: int) -> None:
        self._head, self._index = head, index
        self._frame = Frame(self._value(Frame.BLANK))

    def text(self, text: str, logprobs: Any = None) -> bytes:
        """The event of a text."""
        return self._frame.fill(text) if logprobs is None else event(self._value(text, logprobs=logprobs))

    def ended(self, finish: str) -> bytes:
        """The last event of the choice."""
        return event(self._value("", finish=finish))

    def _value(self, text: str, finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [choice]}
