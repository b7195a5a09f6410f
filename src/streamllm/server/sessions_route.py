"""``/v1/sessions``: conversations by their names: made, shown, changed, forked, carried elsewhere and deleted."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path as File
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse

from streamllm.server.refusal import Refusal
from streamllm.server.schema import LARGE, SessionId, Strict, Text
from streamllm.server.service import Service, service_of

router = APIRouter(tags=["sessions"])

Serving = Annotated[Service, Depends(service_of)]
Id = Annotated[str, Path(max_length=64, description="Of the session.")]
Limit = Annotated[int, Query(ge=1, le=1000)]
Title = Annotated[Text, Field(max_length=1000)]

ZIP = ("application/zip", "application/x-zip-compressed", "application/octet-stream")


class NewSession(Strict):
    """``POST /v1/sessions``."""

    id: SessionId | None = None
    system: Text | None = None
    title: Title | None = None
    recall: Literal["auto", "off"] | None = None


class ChangedSession(Strict):
    """``PATCH /v1/sessions/{id}``; an empty ``system`` takes the instructions away."""

    title: Title | None = None
    system: Text | None = None


class ForkedSession(Strict):
    """``POST /v1/sessions/{id}/fork``."""

    id: SessionId | None = None
    turns: Annotated[int, Field(ge=0, le=LARGE)] | None = None


@router.get("/v1/sessions", summary="List the sessions, the newest first")
def list_sessions(
    request: Request, service: Serving, after: Annotated[str | None, Query(max_length=64)] = None, limit: Limit = 100
) -> dict[str, Any]:
    """So many sessions behind one."""
    found = list(service.conversations.list(request.state.owner, after=after, limit=limit + 1))
    return {"object": "list", "data": [shown(view) for view in found[:limit]], "has_more": len(found) > limit}


@router.post("/v1/sessions", status_code=201, summary="Make a session")
def create_session(request: Request, asked: NewSession, service: Serving) -> dict[str, Any]:
    """A session that was made so is never deleted to make room."""
    owner, many = request.state.owner, service.conversations
    return shown(many.create(owner, asked.id, system=asked.system, title=asked.title, recall=asked.recall))


@router.post("/v1/sessions/import", status_code=201, summary="Make a session of a file that was exported")
async def import_session(
    request: Request, service: Serving, id: Annotated[SessionId | None, Query()] = None
) -> dict[str, Any]:
    """The body is the file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ZIP:
        raise Refusal(415, "The body must be an exported session: send Content-Type: application/zip.")
    owner = request.state.owner
    with tempfile.TemporaryDirectory(prefix="streamllm-import-") as folder:
        file = File(folder) / "session.zip"
        with file.open("wb") as opened:
            async for piece in request.stream():
                await run_in_threadpool(opened.write, piece)
        return shown(await run_in_threadpool(service.conversations.import_, owner, file, id))


@router.get("/v1/sessions/{id}", summary="Show a session")
def retrieve_session(request: Request, id: Id, service: Serving) -> dict[str, Any]:
    """One session."""
    return shown(service.conversations.view(request.state.owner, id))


@router.patch("/v1/sessions/{id}", summary="Change a session")
def change_session(request: Request, id: Id, asked: ChangedSession, service: Serving) -> dict[str, Any]:
    """Give it another title or other instructions; with those the window is read anew."""
    owner, many = request.state.owner, service.conversations
    if asked.title is not None:
        many.rename(owner, id, asked.title)
    if asked.system is not None:
        many.set_system(owner, id, asked.system or None)
    return shown(many.view(owner, id))


@router.delete("/v1/sessions/{id}", summary="Delete a session")
def delete_session(request: Request, id: Id, service: Serving) -> dict[str, Any]:
    """All that was said in it is gone."""
    service.conversations.delete(request.state.owner, id)
    return {"id": id, "object": "session", "deleted": True}


@router.get("/v1/sessions/{id}/turns", summary="Show what was said")
def list_turns(
    request: Request, id: Id, service: Serving, after: Annotated[int, Query(ge=0, le=LARGE)] = 0, limit: Limit = 100
) -> dict[str, Any]:
    """So many turns behind one, however long ago they left the window."""
    found = list(service.conversations.turns(request.state.owner, id, after=after, limit=limit + 1))
    rows = [dataclasses.asdict(turn) for turn in found[:limit]]
    return {"object": "list", "data": rows, "has_more": len(found) > limit}


@router.post("/v1/sessions/{id}/fork", status_code=201, summary="Make a copy of a session")
def fork_session(request: Request, id: Id, asked: ForkedSession, service: Serving) -> dict[str, Any]:
    """A copy of all its turns, or of the first so many."""
    return shown(service.conversations.fork(request.state.owner, id, asked.id, asked.turns))


@router.get("/v1/sessions/{id}/export", summary="Carry a session elsewhere", response_class=FileResponse)
def export_session(request: Request, id: Id, service: Serving) -> FileResponse:
    """The session as one file."""
    folder = tempfile.TemporaryDirectory(prefix="streamllm-export-")
    file = File(folder.name) / "session.zip"
    try:
        service.conversations.export(request.state.owner, id, file)
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(
        file, media_type="application/zip", filename=f"{id}.zip", background=BackgroundTask(folder.cleanup)
    )


def shown(view: Any) -> dict[str, Any]:
    """A session as clients see it."""
    return {"object": "session", **dataclasses.asdict(view)}
