"""``POST /v1/completions``: a text goes on, without a conversation: nothing of it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from streamllm.loop import Chunk
from streamllm.request import Request as Stream
from streamllm.server.answer import answer, new_id
from streamllm.server.chat_events import usage_of
from streamllm.server.events import DONE, event
from streamllm.server.refusal import Refusal
from streamllm.server.run import Choice, Run
from streamllm.server.service import Service, service_of
from streamllm.server.text_events import TextEvents
from streamllm.server.text_schema import CompletionRequest
from streamllm.server.tokens import Spelling

router = APIRouter()

Serving = Annotated[Service, Depends(service_of)]


class TextChoice:
    """One choice of a completion.

    Args:
        stream: of the engine.
        events: makes its events.
        spelling: spells log probabilities; ``None``: they were not asked for.
        service: whose figures are told of it.
        read: tokens of its prompt.
        is_streamed: whether nobody wants the text at the end, so that nothing of it is kept.
    """

    def __init__(
        self,
        stream: Stream,
        events: TextEvents,
        spelling: Spelling | None,
        service: Service,
        read: int,
        *,
        is_streamed: bool,
    ) -> None:
        self._is_streamed = is_streamed
        self._stream, self._events, self._spelling = stream, events, spelling
        self._metrics, self.read = service.metrics, read
        self.text, self.generated = list[str](), 0
        self.logprobs: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        self._finish: str | None = None
        self._at = 0

    def chunks(self) -> Iterator[Chunk]:
        """The text as it comes."""
        for chunk in self._stream:
            if not self.generated:
                stats = chunk.stats
                self._metrics.prompt_tokens.inc(self.read)
                reading = self.read / stats.prefill_tokens_per_s if stats.prefill_tokens_per_s else 0.0
                self._metrics.queue_time.observe(max(0.0, (stats.ttft_s or 0.0) - reading))
            self.generated += chunk.id is not None
            self._finish = chunk.finish
            if chunk.text and not self._is_streamed:
                self.text.append(chunk.text)
            yield chunk

    def began(self) -> Iterator[bytes]:
        """Nothing: a text has no role."""
        yield from ()

    def took(self, chunk: Chunk) -> bytes:
        """The event of a chunk."""
        found = None
        if self._spelling is not None:
            found = self._spelling.text_entry(chunk, self._at)
            for name, values in () if self._is_streamed else found.items():
                self.logprobs[name] += values
        self._at += len(chunk.text)
        return self._events.text(chunk.text, found) if chunk.text or found else b""

    def ended(self) -> Iterator[bytes]:
        """The event with the reason."""
        yield self._events.ended(self.finish_reason())

    def finish(self) -> str:
        """Why it ended: "stop", "length" or "interrupted"."""
        return {"end": "stop", None: "interrupted"}.get(self._finish, str(self._finish))

    def finish_reason(self) -> str:
        """The same in OpenAI's words."""
        return "stop" if self.finish() == "stop" else "length"

    def usage(self) -> tuple[int, int, int]:
        """Tokens of the prompt, those of them that were not read, and of the text."""
        return self.read, 0, self.generated

    def release(self) -> None:
        """End the stream."""
        if self._stream.state != "done":
            self._stream.cancel()

    def whole(self, index: int) -> dict[str, Any]:
        """The choice as one object."""
        return {
            "index": index,
            "text": "".join(self.text),
            "logprobs": None if self._spelling is None else self.logprobs,
            "finish_reason": self.finish_reason(),
        }


@router.post("/v1/completions", tags=["OpenAI"], summary="Go on with a text", response_class=Response)
async def create_completion(request: Request, asked: CompletionRequest, service: Serving) -> Response:
    """Go on with one text or several, each by itself."""
    service.check_model(asked.model)
    copies, options = asked.n or 1, asked.stream_options
    head = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(request.state.began),
        "model": service.model,
    }
    prompts = [prompt for prompt in asked.prompts() for _ in range(copies)]
    for prompt in prompts:
        if not prompt:
            raise Refusal(400, "The prompt is empty: give at least one token to go on from.", param="prompt")
    spelling = Spelling(service.engine.tokenizer, asked.logprobs) if asked.logprobs is not None else None
    service.drawn(asked)  # what is wrong is said before anything begins

    def prepare() -> Sequence[Choice]:
        made: list[TextChoice] = []
        try:
            for index, prompt in enumerate(prompts):
                ids = _ids(service, prompt)
                stream = service.engine.submit(
                    ids,
                    max_tokens=service.most(asked.max_tokens),
                    sampling=service.drawn(asked, index % copies),
                    stop=service.stops(asked),
                    on_end=service.on_end(asked.endless),
                    logprobs=asked.logprobs,
                )
                events, is_streamed = TextEvents(head, index), bool(asked.stream)
                made.append(TextChoice(stream, events, spelling, service, len(ids), is_streamed=is_streamed))
        except BaseException:
            for choice in made:
                choice.release()
            raise
        return made

    def sum_up(run: Run) -> Iterator[bytes]:
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": _usage(run, copies)})
        yield DONE

    request.state.log = partial(_log, [p for p in prompts if isinstance(p, str)] if service.logs_messages else None)
    return await answer(
        request,
        service,
        id=str(head["id"]),
        streams=len(prompts),
        prepare=prepare,
        sum_up=sum_up,
        whole=None if asked.stream else partial(_whole, head, copies),
        is_resumable=bool(asked.resumable),
    )


def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    """The ids of a prompt.

    Raises:
        Refusal: it has none.
    """
    if not isinstance(prompt, str):
        return prompt
    ids: list[int] = service.engine.tokenizer(prompt)["input_ids"]
    if not ids:
        raise Refusal(400, "The prompt has no tokens.", param="prompt")
    return ids


def _texts(run: Run) -> list[TextChoice]:
    return [choice for choice in run.choices if isinstance(choice, TextChoice)]


def _usage(run: Run, copies: int) -> dict[str, Any]:
    """What it has cost; a prompt counts once, however many texts were made of it."""
    choices = _texts(run)
    return usage_of(sum(c.read for c in choices[::copies]), 0, sum(c.generated for c in choices))


def _whole(head: dict[str, Any], copies: int, run: Run) -> dict[str, Any]:
    choices = [choice.whole(index) for index, choice in enumerate(_texts(run))]
    return {**head, "choices": choices, "usage": _usage(run, copies)}


def _log(prompts: list[str] | None) -> dict[str, Any]:
    return {} if prompts is None else {"prompts": prompts}
