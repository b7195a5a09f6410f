"""What a chat request may hold: OpenAI's fields that are served, ours, and by name those that are not.

Strict: a value of another type is refused, and so is a field that nobody knows. A known field of OpenAI's that is not
served is refused with the reason, unless it asks for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _whole_text(text: str) -> str:
    """Refuse half characters, which JSON can write and no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("string_unicode", "it holds half a character (a lone surrogate)") from error
    return text


Text = Annotated[str, AfterValidator(_whole_text)]

LARGE = 2**31 - 1
"""No count is larger."""

Model = Annotated[str, Field(min_length=1, max_length=1000, description="The loaded model; GET /v1/models names it.")]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, le=LARGE)]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
    Field(max_length=1024, description="Added to the logits of ids."),
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[Text, Field(max_length=1000)]
Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16, description="Given back with the answer."),
]
SessionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")]

NO_TOOLS = "this server calls no tools"
NO_MEDIA = "this server reads and writes text only"
NOT_THERE = "there is nothing like it here"
NOTHING: tuple[Any, ...] = (None, [], {}, False)
"""What asks for nothing."""


def refused(name: str, why: str) -> PydanticCustomError:
    """A field that is not served."""
    return PydanticCustomError("refused", "{param} is not supported: {why}.", {"param": name, "why": why})


class Strict(BaseModel):
    """An object that has these fields and no other."""

    model_config = ConfigDict(extra="forbid", strict=True)

    unserved: ClassVar[dict[str, tuple[str, Sequence[Any]]]] = {}
    """Fields that are refused: why, and the values besides ``NOTHING`` that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict) or cls.unserved.keys().isdisjoint(data):
            return data
        kept = {}
        for name, value in data.items():
            if name not in cls.unserved:
                kept[name] = value
                continue
            why, harmless = cls.unserved[name]
            if not any(value == each and type(value) is type(each) for each in (*NOTHING, *harmless)):
                raise refused(name, why)
        return kept


class Part(Strict):
    """A piece of a message."""

    type: str
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind not in ("text", "input_text", "output_text"):
            raise PydanticCustomError("refused", "Content of type {kind} is not supported: {why}.",
                                      {"kind": repr(kind[:40]), "why": NO_MEDIA})  # fmt: skip
        return data


class ChatMessage(Strict):
    """One message."""

    unserved: ClassVar = {
        "tool_calls": (NO_TOOLS, ()),
        "function_call": (NO_TOOLS, ()),
        "tool_call_id": (NO_TOOLS, ()),
        "audio": (NO_MEDIA, ()),
        "refusal": ("a refusal is no text that was said", ()),
        "annotations": (NOT_THERE, ()),
        "name": ("the model's chat template has no names", ()),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") in ("tool", "function"):
            raise PydanticCustomError("refused", "The role {role} is not supported: {why}.",
                                      {"role": repr(data["role"]), "why": NO_TOOLS})  # fmt: skip
        return data

    @property
    def text(self) -> str:
        """What is said."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(Strict):
    """How a stream is told."""

    unserved: ClassVar = {"include_obfuscation": ("events are not padded", ())}

    include_usage: bool | None = None
    include_stats: bool | None = Field(None, description="Each event has the object streamllm.")


class Drawn(Strict):
    """How tokens are drawn, and how a reply ends; in all requests."""

    model: Model
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=LARGE)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    endless: bool | None = Field(None, description="Go on past the end, until the client hangs up.")
    user: Name | None = Field(None, description="Taken, and not used: keys tell clients apart.")

    def stops(self) -> tuple[str, ...] | None:
        """The texts that end a reply; ``None``: not said."""
        return (self.stop,) if isinstance(self.stop, str) else None if self.stop is None else tuple(self.stop)


class ChatRequest(Drawn):
    """``POST /v1/chat/completions``."""

    unserved: ClassVar = {
        "tools": (NO_TOOLS, ()),
        "tool_choice": (NO_TOOLS, ("none", "auto")),
        "parallel_tool_calls": (NO_TOOLS, (True,)),
        "functions": (NO_TOOLS, ()),
        "function_call": (NO_TOOLS, ("none", "auto")),
        "response_format": ("the form of a text cannot be promised", ({"type": "text"},)),
        "audio": (NO_MEDIA, ()),
        "modalities": (NO_MEDIA, (["text"],)),
        "prediction": ("nothing is predicted", ()),
        "moderation": (NOT_THERE, ()),
        "prompt_cache_options": (NOT_THERE, ()),
        "prompt_cache_retention": (NOT_THERE, ()),
        "reasoning_effort": ("models are run as they are", ("none",)),
        "service_tier": ("there is one service", ("auto", "default")),
        "store": ("only /v1/responses keeps answers", ()),
        "verbosity": ("models are run as they are", ("medium",)),
        "web_search_options": (NO_TOOLS, ()),
    }

    messages: list[ChatMessage]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    safety_identifier: Name | None = Field(None, description="Taken, and not used.")
    prompt_cache_key: Name | None = Field(None, description="Taken, and not used: conversations are recognised.")
    session_id: SessionId | None = Field(None, description="The messages hold the new turn only.")
    session_action: Literal["send", "edit", "regenerate", "continue"] = "send"
    session_turn: Annotated[int, Field(ge=1, le=LARGE)] | None = None
    recall: Literal["auto", "off"] | None = None
    resumable: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        need("stream_options", self.stream_options is None or self.stream, "it needs stream: true")
        need("resumable", not self.resumable or self.stream, "it needs stream: true")
        need("top_logprobs", self.top_logprobs is None or self.logprobs, "it needs logprobs: true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        need("max_tokens", len(limits) < 2, "it contradicts max_completion_tokens")
        need("endless", not self.endless or self.stream or limits, "without a stream it needs max_tokens")
        return self

    @property
    def most(self) -> int | None:
        """Tokens at most."""
        return self.max_completion_tokens or self.max_tokens


def need(name: str, is_fine: object, why: str) -> None:
    """Refuse a field that does not fit the others."""
    if not is_fine:
        raise PydanticCustomError("unfit", "{param} cannot be used so: {why}.", {"param": name, "why": why})
