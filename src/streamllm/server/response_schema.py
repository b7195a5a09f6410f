"""What a request for a response may hold, and which of OpenAI's fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from streamllm.server.schema import (
    NO_MEDIA,
    NO_TOOLS,
    NOT_THERE,
    Drawn,
    Metadata,
    Name,
    Strict,
    Text,
    Tokens,
    need,
    refused,
)

LOGPROBS = "message.output_text.logprobs"

_PARTS = ("input_text", "output_text", "text")


class ResponsePart(Strict):
    """A piece of a message; what comes back with a client's own history is taken, too."""

    unserved: ClassVar = {"annotations": (NOT_THERE, ())}

    type: str
    text: Text
    logprobs: list[Any] | None = Field(None, description="Taken, and not used.")

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind not in _PARTS:
            raise refused(f"content of type {kind[:40]!r}", NO_MEDIA)
        return data


class InputItem(Strict):
    """A message."""

    unserved: ClassVar = {"phase": (NOT_THERE, ("final_answer",))}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ResponsePart]
    id: Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_messages(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "message":
            raise PydanticCustomError("refused", "Items of type {kind} are not supported: {why}.",
                                      {"kind": repr(kind[:40]), "why": NO_TOOLS})  # fmt: skip
        return data

    @property
    def text(self) -> str:
        """What is said."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ResponseRequest(Drawn):
    """``POST /v1/responses``."""

    unserved: ClassVar = {
        "access_programs": (NOT_THERE, ()),
        "background": ("answers are made while the client waits", ()),
        "background_options": (NOT_THERE, ()),
        "context_management": ("the window moves by itself", ()),
        "conversation": ("name a session, or the previous response", ()),
        "image": (NO_MEDIA, ()),
        "max_tool_calls": (NO_TOOLS, ()),
        "moderation": (NOT_THERE, ()),
        "parallel_tool_calls": (NO_TOOLS, (True,)),
        "prompt": ("no prompts are kept here", ()),
        "prompt_cache_options": (NOT_THERE, ()),
        "prompt_cache_retention": (NOT_THERE, ()),
        "reasoning": ("models are run as they are", ({"effort": None}, {"effort": "none"})),
        "service_tier": ("there is one service", ("auto", "default")),
        "stream_options": (NOT_THERE, ({"include_obfuscation": False},)),
        "text": ("the form of a text cannot be promised", ({"format": {"type": "text"}},)),
        "tool_choice": (NO_TOOLS, ("none", "auto")),
        "tools": (NO_TOOLS, ()),
    }

    input: Text | Annotated[list[InputItem], Field(min_length=1)]
    instructions: Text | None = None
    previous_response_id: Name | None = None
    store: bool | None = Field(None, description="Whether the response can be asked for later; true if left out.")
    max_output_tokens: Tokens | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="Neither comes to pass here.")
    metadata: Metadata | None = None
    safety_identifier: Name | None = Field(None, description="Taken, and not used.")
    prompt_cache_key: Name | None = Field(None, description="Taken, and not used: conversations are recognised.")
    resumable: bool | None = None
    recall: Literal["auto", "off"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        need("resumable", not self.resumable or self.stream, "it needs stream: true")
        need("top_logprobs", not self.top_logprobs or self.include, f"it needs include: [{LOGPROBS}]")
        is_bounded = self.stream or self.max_output_tokens
        need("endless", not self.endless or is_bounded, "without a stream it needs max_output_tokens")
        return self

    def items(self) -> list[InputItem]:
        """The messages."""
        return [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
