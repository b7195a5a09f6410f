"""A reply as OpenAI's response: its events in their order, or one object. Knows no conversation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamllm.server.events import Frame, event

DELTA = "response.output_text.delta"


class ResponseEvents:
    """Makes the events of one response.

    Args:
        base: the response as far as it is known before it begins.
        item_id: of the message in it.
    """

    def __init__(self, base: dict[str, Any], item_id: str) -> None:
        self._base, self._item_id = base, item_id
        self._count = 0
        self._place = {"item_id": item_id, "output_index": 0, "content_index": 0}
        value = {"type": DELTA, "sequence_number": Frame.BLANK, **self._place, "delta": Frame.BLANK, "logprobs": []}
        self._frame = Frame(value, DELTA)

    def began(self) -> Iterator[bytes]:
        """What comes before the first text."""
        response = {**self._base, "status": "in_progress", "output": []}
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=self._item([], "in_progress"))
        yield self._event("response.content_part.added", **self._place, part=part("", []))

    def text(self, text: str, logprobs: list[Any]) -> bytes:
        """The event of a text."""
        if logprobs:
            return self._event(DELTA, **self._place, delta=text, logprobs=logprobs)
        self._count += 1
        return self._frame.fill(self._count - 1, text)

    def ended(self, text: str, logprobs: list[Any], response: dict[str, Any]) -> Iterator[bytes]:
        """What comes after the last; ``response``: the whole."""
        status = response["status"]
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=logprobs)
        yield self._event("response.content_part.done", **self._place, part=part(text, logprobs))
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{status}", response=response)

    def whole(
        self, text: str, logprobs: list[Any], *, is_whole: bool, usage: dict[str, Any] | None, **more: Any
    ) -> dict[str, Any]:
        """The response as one object."""
        status = "completed" if is_whole else "incomplete"
        return {
            **self._base,
            "status": status,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self._item([part(text, logprobs)], status)],
            "usage": usage,
            **more,
        }

    def _item(self, content: list[Any], status: str) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._count += 1
        return event({"type": kind, "sequence_number": self._count - 1, **fields}, kind)


def part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    """The text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def base_of(id: str, created: float, model: str, **asked: Any) -> dict[str, Any]:
    """A response before it begins; ``asked``: what the request said, and is told again."""
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": model,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": None,
        **asked,
    }


def usage_of(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """What a response has cost, in tokens."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }
