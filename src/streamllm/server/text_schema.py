"""What a request for a plain completion may hold, and one for tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from streamllm.server.schema import ChatMessage, Drawn, Model, StreamOptions, Strict, Text, Tokens, need

Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]


class CompletionRequest(Drawn):
    """``POST /v1/completions``."""

    unserved: ClassVar = {
        "best_of": ("choices are not ranked; n makes several", (1,)),
        "echo": ("the prompt is not repeated", ()),
        "suffix": ("models are run from left to right", ("",)),
    }

    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Tokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    resumable: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        need("stream_options", self.stream_options is None or self.stream, "it needs stream: true")
        need("resumable", not self.resumable or self.stream, "it needs stream: true")
        need("endless", not self.endless or self.stream or self.max_tokens, "without a stream it needs max_tokens")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TokenizeRequest(Strict):
    """``POST /tokenize``, of a text or of messages."""

    model: Model | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        need("prompt", (self.prompt is None) != (self.messages is None), "give prompt or messages, one of them")
        return self


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: Model | None = None
    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1)]]
