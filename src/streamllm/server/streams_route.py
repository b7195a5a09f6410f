"""``/v1/streams/{request_id}``: a reply that was asked to be resumable is picked up again, or stopped."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.responses import Response

from streamllm.server.answer import stream
from streamllm.server.refusal import Refusal
from streamllm.server.schema import LARGE
from streamllm.server.service import Service, service_of

router = APIRouter(tags=["streams"])

Serving = Annotated[Service, Depends(service_of)]
RequestId = Annotated[str, Path(max_length=100, description="X-Request-Id of the answer, or the completion's id.")]


@router.get("/v1/streams/{request_id}", summary="Pick a reply up", response_class=Response)
async def pick_up(
    request: Request,
    request_id: RequestId,
    service: Serving,
    after: Annotated[int | None, Query(ge=0, le=LARGE, description="The last event that was seen.")] = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """The events after one; 404 for a reply that is not known, 410 if these events are not kept any more."""
    run = service.runs.find(request.state.owner, request_id)
    if after is None and last_event_id:
        if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 10):
            raise Refusal(400, "The header Last-Event-ID is no number of an event.", param="Last-Event-ID")
        after = int(last_event_id)
    return await stream(request, run, after or 0)


@router.delete("/v1/streams/{request_id}", summary="Stop a reply")
async def stop(request: Request, request_id: RequestId, service: Serving) -> dict[str, Any]:
    """End a reply before its next token; what was said stays."""
    run = service.runs.find(request.state.owner, request_id)
    run.cancel()
    return {"id": request_id, "deleted": True}
