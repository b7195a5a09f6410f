"""``/v1/responses``: one turn of a conversation, which goes on by the id of its last response."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from streamllm.loop import Chunk
from streamllm.server.answer import answer, new_id
from streamllm.server.continuation import Continuation
from streamllm.server.history import Message
from streamllm.server.refusal import Refusal
from streamllm.server.response_events import ResponseEvents, base_of, usage_of
from streamllm.server.response_schema import LOGPROBS, ResponseRequest
from streamllm.server.run import Choice, Run
from streamllm.server.service import Service, service_of
from streamllm.server.spoken import Spoken
from streamllm.server.tokens import Spelling

router = APIRouter(tags=["OpenAI"])

Serving = Annotated[Service, Depends(service_of)]
ResponseId = Annotated[str, Path(max_length=100)]


class ResponseChoice(Spoken):
    """The reply of a response.

    Args:
        events: makes its events.
        spelling: spells log probabilities; ``None``: they were not asked for.
        note: called with the turn, once it has ended.
    """

    def __init__(self, *arguments: Any, events: ResponseEvents, spelling: Spelling | None, note: Any) -> None:
        super().__init__(*arguments)
        self._events, self._spelling, self._note = events, spelling, note
        self.logprobs: list[dict[str, Any]] = []
        self.response: dict[str, Any] | None = None

    def began(self) -> Iterator[bytes]:
        """The events before the text."""
        return self._events.began()

    def took(self, chunk: Chunk) -> bytes:
        """The event of a chunk."""
        found = [] if self._spelling is None else self._spelling.chat(chunk)
        self.logprobs += found
        return self._events.text(chunk.text, found) if chunk.text or found else b""

    def ended(self) -> Iterator[bytes]:
        """The events after it."""
        text = "".join(self.text)
        response = self.response = self._events.whole(
            text,
            self.logprobs,
            is_whole=self.finish_reason() == "stop",
            usage=usage_of(*self.usage()),
            streamllm=self.facts(),
        )
        self._note(self.close().turn, response)
        return self._events.ended(text, self.logprobs, response)


@router.post("/v1/responses", summary="Say something, and be answered", response_class=Response)
async def create_response(request: Request, asked: ResponseRequest, service: Serving) -> Response:
    """Answer the input, behind a previous response if one is named."""
    service.check_model(asked.model)
    messages = _checked(asked)
    service.drawn(asked)  # what is wrong is said before anything begins
    sampling = service.drawn(asked)
    id, owner = new_id("resp").replace("-", "_"), request.state.owner
    store = asked.store is not False
    base = base_of(
        id,
        request.state.began,
        service.model,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        previous_response_id=asked.previous_response_id,
        store=store,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_logprobs=asked.top_logprobs or 0,
        user=asked.user,
    )
    wants = LOGPROBS in (asked.include or ())
    most = asked.top_logprobs or 0

    def prepare() -> Sequence[Choice]:
        held = _held(service, owner, asked, messages)

        def note(turn: int, response: dict[str, Any]) -> None:
            if store:
                service.conversations.note_response(owner, id, held.session_id, turn)
                service.remember(owner, id, response)

        try:
            text = messages[-1].content if asked.previous_response_id is None else _joined(messages)
            options: dict[str, Any] = {
                "max_tokens": service.most(asked.max_output_tokens),
                "sampling": sampling,
                "stop": service.stops(asked),
                "on_end": service.on_end(asked.endless),
                "logprobs": most if wants else None,
            }
            with held.recalling(asked.recall):
                reply = held.chat.send(held.text or text, **options)
            return [
                ResponseChoice(
                    held,
                    reply,
                    service.metrics,
                    events=ResponseEvents(base, new_id("msg").replace("-", "_")),
                    spelling=Spelling(service.engine.tokenizer, most) if wants else None,
                    note=note,
                )
            ]
        except BaseException:
            held.release()
            raise

    request.state.log = partial(_log, messages if service.logs_messages else None)
    return await answer(
        request,
        service,
        id=id,
        streams=1,
        prepare=prepare,
        sum_up=lambda _: (),
        whole=None if asked.stream else _whole,
        is_resumable=bool(asked.resumable),
    )


@router.get("/v1/responses/{response_id}", summary="Show a response that was stored")
async def retrieve_response(request: Request, response_id: ResponseId, service: Serving) -> dict[str, Any]:
    """A response; after a restart of the server without what it has cost."""
    owner = request.state.owner
    place = await asyncio.to_thread(service.conversations.find_response, owner, response_id)
    if place is None:
        raise _unknown(response_id)
    known = service.recollect(owner, response_id)
    if known is not None:
        return known
    session, turn = place
    (row,) = await asyncio.to_thread(
        lambda: service.conversations.turns(owner, session, after=turn - 1, limit=1)
    ) or (None,)  # fmt: skip
    if row is None:
        raise _unknown(response_id)
    events = ResponseEvents(base_of(response_id, row.began, service.model), f"msg_{response_id[5:]}")
    return events.whole(row.reply, [], is_whole=row.finish in ("end", "stop"), usage=None)


@router.delete("/v1/responses/{response_id}", summary="Forget a response that was stored")
async def delete_response(request: Request, response_id: ResponseId, service: Serving) -> dict[str, Any]:
    """The response cannot be gone on from any more; its conversation stays."""
    owner = request.state.owner
    if await asyncio.to_thread(service.conversations.find_response, owner, response_id) is None:
        raise _unknown(response_id)
    await asyncio.to_thread(service.conversations.drop_response, owner, response_id)
    service.forget(owner, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def _checked(asked: ResponseRequest) -> list[Message]:
    """The messages, in an order that can be answered; the instructions are their first.

    Raises:
        Refusal: they are not.
    """
    messages: list[Message] = []
    if asked.instructions and asked.previous_response_id is None:
        messages.append(Message("system", asked.instructions))
    is_begun = False
    for index, item in enumerate(asked.items()):
        is_system, param = item.role in ("system", "developer"), f"input[{index}].role"
        if asked.previous_response_id is not None and item.role != "user":
            raise Refusal(400, "Behind a previous response send only what the user says.", param=param)
        if is_system and is_begun:
            raise Refusal(400, "System messages can come only at the beginning.", param=param)
        is_begun |= not is_system
        messages.append(Message("system" if is_system else item.role, item.text))  # type: ignore[arg-type]
    if messages[-1].role != "user":
        raise Refusal(400, "The last message must be the user's.", param="input")
    return messages


def _held(service: Service, owner: str, asked: ResponseRequest, messages: Sequence[Message]) -> Continuation:
    """The conversation.

    Raises:
        Refusal: the previous response is not known, or had other instructions.
    """
    previous, conversations = asked.previous_response_id, service.conversations
    if previous is None:
        return conversations.continue_messages(owner, messages)[0]
    place = conversations.find_response(owner, previous)
    if place is None:
        raise _unknown(previous, param="previous_response_id")
    held = conversations.continue_turn(owner, *place)[0]
    if asked.instructions is not None and asked.instructions != (held.chat.system or ""):
        held.release()
        raise Refusal(
            400,
            "The instructions of a conversation stay what they were: leave them out behind a previous response, or "
            "begin another conversation.",
            param="instructions",
        )
    return held


def _joined(messages: Sequence[Message]) -> str:
    return "\n\n".join(message.content for message in messages)


def _unknown(response_id: str, param: str | None = None) -> Refusal:
    return Refusal(
        404, f"There is no response {response_id!r}: it was not stored, or is forgotten.", param=param
    )  # fmt: skip


def _whole(run: Run) -> dict[str, Any]:
    (choice,) = run.choices
    assert isinstance(choice, ResponseChoice)
    assert choice.response is not None
    return choice.response


def _log(messages: list[Message] | None) -> dict[str, Any]:
    return {} if messages is None else {"messages": [{"role": m.role, "content": m.content} for m in messages]}
