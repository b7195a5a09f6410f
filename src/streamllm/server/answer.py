"""From a run to a response: events as they come, or one object at the end; and what becomes of who hangs up."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streamllm.config import STALLED
from streamllm.server.run import Choice, Reader, Run
from streamllm.server.service import Service

PATIENCE = 5.0
"""Seconds to wait for the first token before an answer begins without it; until then a failure has its own status."""

KEEP_ALIVE = 10.0
"""Seconds between two comments that keep a connection open while nothing else comes."""


async def answer(
    request: Request,
    service: Service,
    *,
    id: str,
    streams: int,
    prepare: Callable[[], Sequence[Choice]],
    sum_up: Callable[[Run], Iterable[bytes]],
    whole: Callable[[Run], dict[str, Any]] | None,
    is_resumable: bool = False,
) -> Response:
    """Answer a request.

    Args:
        id: of the answer.
        streams: how many replies it has.
        prepare, sum_up, is_resumable: see ``Runs.start``.
        whole: makes the one object; ``None``: events.

    Raises:
        Refusal: it cannot be answered.
    """
    owner: str = request.state.owner
    service.limits.admit(owner, streams)

    def leave(run: Run) -> None:
        service.limits.leave(owner, streams)
        costs = [choice.usage() for choice in run.choices]
        if costs:
            prompt, cached = (sum(each[i] for each in costs) for i in (0, 1))
            request.state.cost = {
                "prompt_tokens": prompt,
                "cached_tokens": cached,
                "completion_tokens": sum(each[2] for each in costs),
            }

    run = service.runs.start(
        (request.state.request_id, id),
        owner,
        prepare,
        sum_up if whole is None else lambda _: (),
        is_resumable=is_resumable,
        is_silent=whole is not None,
        leave=leave,
    )
    if whole is None:
        return await stream(request, run)
    reader = run.attach()
    ends, leaves = asyncio.create_task(run.done(reader)), asyncio.create_task(_hang_up(request))
    try:
        await asyncio.wait((ends, leaves), return_when=asyncio.FIRST_COMPLETED)
    finally:
        ends.cancel()
        leaves.cancel()
        run.detach(reader)
    if not run.is_done:
        return Response(status_code=499)  # nobody reads it
    if run.error is not None:
        raise run.error
    body = await asyncio.to_thread(lambda: json.dumps(whole(run), ensure_ascii=False).encode("utf-8", "replace"))
    run.choices = ()  # what asyncio leaves behind is in cycles, and must not keep a conversation in memory
    return Response(body, headers=_headers(run), media_type="application/json")


async def stream(request: Request, run: Run, after: int = 0) -> Response:
    """The events of a run as they come."""
    reader = run.attach(after)
    leaves = asyncio.create_task(_hang_up(request))
    begins = asyncio.create_task(run.begun(reader, PATIENCE))
    try:
        await asyncio.wait((begins, leaves), return_when=asyncio.FIRST_COMPLETED)
        if not begins.done():
            run.detach(reader)
            return Response(status_code=499)
        begins.result()
    except BaseException:
        run.detach(reader)
        raise
    finally:
        begins.cancel()
        leaves.cancel()
    return _Events(
        run,
        reader,
        headers=_headers(run),
        ping=KEEP_ALIVE,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        sep="\n",
        send_timeout=STALLED,
    )


class _Events(EventSourceResponse):
    """The events of a run. A client that is gone before the first of them is a reader that goes, like any other."""

    def __init__(self, run: Run, reader: Reader, **options: Any) -> None:
        super().__init__(run.read(reader), **options)
        self._run, self._reader = run, reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(SendTimeoutError):
                await super().__call__(scope, receive, send)
        finally:
            self._run.detach(self._reader)


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(16)}"


async def _hang_up(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(run: Run) -> dict[str, str]:
    return {} if run.session_id is None else {"X-Session-Id": run.session_id}
