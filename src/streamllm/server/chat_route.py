"""``POST /v1/chat/completions``: one turn of a conversation, which is recognised by its messages or named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import Response

from streamllm.loop import Chunk
from streamllm.reply import Reply
from streamllm.server.answer import answer, new_id
from streamllm.server.chat_events import ChatEvents, usage_event, usage_of
from streamllm.server.continuation import Continuation
from streamllm.server.events import DONE
from streamllm.server.history import Message
from streamllm.server.refusal import Refusal
from streamllm.server.run import Choice, Run
from streamllm.server.schema import ChatRequest, SessionId
from streamllm.server.service import Service, service_of
from streamllm.server.spoken import Spoken
from streamllm.server.tokens import Spelling

router = APIRouter()

Serving = Annotated[Service, Depends(service_of)]


class ChatChoice(Spoken):
    """One choice of a chat completion.

    Args:
        events: makes its events.
        spelling: spells log probabilities; ``None``: they were not asked for.
        is_streamed: see ``Spoken``.
        is_telling: whether each event has the object ``streamllm``.
    """

    def __init__(
        self, *arguments: Any, events: ChatEvents, spelling: Spelling | None, is_streamed: bool, is_telling: bool
    ) -> None:
        super().__init__(*arguments)
        self.is_streamed = is_streamed
        self._events, self._spelling, self._is_telling = events, spelling, is_telling
        self.logprobs: list[dict[str, Any]] = []

    def began(self) -> Iterator[bytes]:
        """The event with the role."""
        yield self._events.began()

    def took(self, chunk: Chunk) -> bytes:
        """The event of a chunk."""
        more: dict[str, Any] = {}
        if self._spelling is not None:
            found = self._spelling.chat(chunk)
            self.logprobs += () if self.is_streamed else found
            more["logprobs"] = {"content": found, "refusal": None}
        elif not chunk.text:
            return b""
        if self._is_telling:
            more["streamllm"] = self.facts()
        return self._events.text(chunk.text, **more)

    def ended(self) -> Iterator[bytes]:
        """The event with the reason."""
        yield self._events.ended(self.finish_reason(), streamllm=self.facts())

    def whole(self, index: int) -> dict[str, Any]:
        """The choice as one object."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(self.text), "refusal": None},
            "logprobs": None if self._spelling is None else {"content": self.logprobs, "refusal": None},
            "finish_reason": self.finish_reason(),
        }


@router.post(
    "/v1/chat/completions", tags=["OpenAI"], summary="Say something in a conversation", response_class=Response
)
async def create_chat_completion(
    request: Request,
    asked: ChatRequest,
    service: Serving,
    x_session_id: Annotated[SessionId | None, Header()] = None,
) -> Response:
    """Answer the last message; what came before it is read only as far as it is not known yet."""
    service.check_model(asked.model)
    if x_session_id is not None:
        if asked.session_id not in (None, x_session_id):
            raise Refusal(400, "The header X-Session-Id and session_id name two sessions.", param="session_id")
        asked.session_id = x_session_id
    messages = _checked(asked)
    copies = asked.n or 1
    options = asked.stream_options
    head = {"id": new_id("chatcmpl"), "created": int(request.state.began), "model": service.model}
    spelling = Spelling(service.engine.tokenizer, asked.top_logprobs or 0) if asked.logprobs else None
    for index in range(copies):
        service.drawn(asked, index)  # what is wrong is said before anything begins

    def prepare() -> Sequence[Choice]:
        held = _held(service, request.state.owner, asked, messages, copies)
        made: list[ChatChoice] = []
        try:
            for index, each in enumerate(held):
                made.append(
                    ChatChoice(
                        each,
                        _say(service, asked, each, index),
                        service.metrics,
                        events=ChatEvents(head, index),
                        spelling=spelling,
                        is_streamed=bool(asked.stream),
                        is_telling=bool(options and options.include_stats),
                    )
                )
        except BaseException:
            for choice in made:
                choice.release()
            for each in held[len(made) :]:
                each.release()
            raise
        return made

    def sum_up(run: Run) -> Iterator[bytes]:
        if options and options.include_usage:
            yield usage_event(head, _usage(run))
        yield DONE

    request.state.log = partial(_log, messages if service.logs_messages else None)
    return await answer(
        request,
        service,
        id=str(head["id"]),
        streams=copies,
        prepare=prepare,
        sum_up=sum_up,
        whole=None if asked.stream else partial(_whole, head, asked),
        is_resumable=bool(asked.resumable),
    )


def _checked(asked: ChatRequest) -> list[Message]:
    """The messages, in an order that can be answered.

    Raises:
        Refusal: they are not.
    """
    if asked.session_action in ("regenerate", "continue"):
        if asked.messages:
            raise Refusal(400, f"To {asked.session_action} a reply takes no messages: send [].", param="messages")
    elif not asked.messages:
        raise Refusal(400, "There is no message to answer.", param="messages")
    elif asked.messages[-1].role != "user":
        raise Refusal(400, "The last message must be the user's.", param=f"messages[{len(asked.messages) - 1}].role")
    if asked.session_action != "send" and asked.session_id is None:
        raise Refusal(400, f"To {asked.session_action} needs a session_id.", param="session_action")
    if (asked.session_action == "edit") != (asked.session_turn is not None):
        raise Refusal(400, "session_turn goes with session_action: edit, and is needed there.", param="session_turn")
    is_begun = False
    for index, message in enumerate(asked.messages):
        is_system = message.role in ("system", "developer")
        if is_system and (is_begun or asked.session_id is not None):
            why = "only at the beginning" if is_begun else "not into a session that is there: change it by PATCH"
            raise Refusal(400, f"System messages can come {why}.", param=f"messages[{index}].role")
        if asked.session_id is not None and message.role == "assistant":
            raise Refusal(400, "With session_id send the new turn only.", param=f"messages[{index}].role")
        is_begun |= not is_system
    return [Message("system" if m.role == "developer" else m.role, m.text) for m in asked.messages]


def _held(
    service: Service, owner: str, asked: ChatRequest, messages: Sequence[Message], copies: int
) -> list[Continuation]:
    """The conversation, or several that go on from the same point."""
    if asked.session_id is None:
        return service.conversations.continue_messages(owner, messages, copies=copies)
    if copies > 1:
        raise Refusal(400, "A session that is named has one reply at a time; fork it for more.", param="n")
    return [service.conversations.open(owner, asked.session_id)]


def _say(service: Service, asked: ChatRequest, held: Continuation, index: int) -> Reply:
    """Begin one reply."""
    options: dict[str, Any] = {
        "max_tokens": service.most(asked.most),
        "sampling": service.drawn(asked, index),
        "stop": service.stops(asked),
        "on_end": service.on_end(asked.endless),
        "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
    }
    text = "\n\n".join(each.text for each in asked.messages) if asked.session_id is not None else held.text
    chat = held.chat
    with held.recalling(asked.recall):
        match asked.session_action:
            case "regenerate" if asked.recall == "off" and chat.turns:  # said anew, or what was recalled stays
                return chat.edit(chat.turns, chat.transcript.turn(chat.turns).user, rebuild=True, **options)
            case "regenerate":
                return chat.regenerate(rebuild=True, **options)
            case "continue":
                return chat.resume(**options)
            case "edit":
                return chat.edit(asked.session_turn or 1, text, rebuild=True, **options)
        return chat.send(text, **options)


def _usage(run: Run) -> dict[str, Any]:
    """What all choices have cost; the prompt counts once."""
    costs = [choice.usage() for choice in run.choices if isinstance(choice, Spoken)]
    prompt, cached, _ = costs[0]
    return usage_of(prompt, cached, sum(completion for *_, completion in costs))


def _whole(head: dict[str, Any], asked: ChatRequest, run: Run) -> dict[str, Any]:
    """The completion as one object."""
    choices = [choice for choice in run.choices if isinstance(choice, ChatChoice)]
    return {
        **head,
        "object": "chat.completion",
        "choices": [choice.whole(index) for index, choice in enumerate(choices)],
        "usage": _usage(run),
        **({"metadata": asked.metadata} if asked.metadata else {}),
        "streamllm": choices[0].facts(),
    }


def _log(messages: list[Message] | None) -> dict[str, Any]:
    return {} if messages is None else {"messages": [{"role": m.role, "content": m.content} for m in messages]}
