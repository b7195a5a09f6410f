"""The application: routes behind the door, errors in OpenAI's shape, and what is served without a model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response

import streamllm
from streamllm.server import (
    chat_route,
    models_route,
    responses_route,
    sessions_route,
    streams_route,
    text_route,
    tokens_route,
)
from streamllm.server.door import Door, Gate
from streamllm.server.journal import Journal
from streamllm.server.keys import Keys
from streamllm.server.manual import manual
from streamllm.server.memory import give_back
from streamllm.server.metrics import Metrics
from streamllm.server.refusal import Refusal, refusal_of
from streamllm.server.service import Service

ROUTES = (chat_route, text_route, responses_route, models_route, sessions_route, streams_route, tokens_route)

SWEEP_SECONDS = 5.0
"""Between two looks for replies that nobody has come back for."""

GIVE_BACK_SECONDS = 60.0
"""After which memory that is not needed any more is given back; all wait for that, 7 and 12 ms in one of 0.6 GB."""

EXPOSED = ("X-Request-Id", "X-Session-Id", "Retry-After")
"""Headers that a page of another origin may read."""

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KINDS = {"str", "int", "float", "bool", "list", "dict", "body"}
_log = logging.getLogger("streamllm.server")


def make_app(
    *,
    keys: Keys | None = None,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    max_body: int = 32 << 20,
    journal: Journal | None = None,
) -> FastAPI:
    """The application, without a model yet: ``serve`` gives it one.

    Args:
        keys: who may come in; ``None``: everybody.
        hosts: names by which the server may be asked for; ``None``: any.
        origins: other origins whose pages may use it.
        max_body: bytes of a request at most.
        journal: has a line for each request; ``None``: on stderr.
    """
    app = FastAPI(
        title="streamllm",
        version=streamllm.__version__,
        description="An OpenAI-compatible server whose conversations never end.",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.gate, app.state.metrics, app.state.service = Gate(), Metrics(), None
    app.state.journal = journal or Journal()
    for module in ROUTES:
        app.include_router(module.router)
    _add_own(app)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_served)
    app.add_exception_handler(streamllm.StreamLLMError, _refused)
    app.add_middleware(_Last)
    app.add_middleware(
        Door,
        gate=app.state.gate,
        keys=keys or Keys(),
        hosts=hosts,
        max_body=max_body,
        journal=app.state.journal,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED),
        )
    return app


def serve(app: FastAPI, service: Service) -> None:
    """Give the application its model: from now on it answers."""
    app.state.service = service
    app.state.gate.is_ready = True


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    def sweep() -> None:
        if app.state.service is not None:
            app.state.service.sweep()

    tasks = [
        asyncio.create_task(_now_and_then(SWEEP_SECONDS, sweep)),
        asyncio.create_task(_now_and_then(GIVE_BACK_SECONDS, give_back)),
    ]
    yield
    for task in tasks:
        task.cancel()


async def _now_and_then(seconds: float, work: Callable[[], None]) -> None:
    """Do something for ever, in a thread."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(work)
        except Exception:
            _log.exception("%s failed; it is tried again", work.__name__)


class _Last:
    """What nobody has foreseen becomes an error in OpenAI's shape, and a line in the log."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_begun = False

        async def noted(message: Any) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if scope["type"] != "http" or is_begun:
                raise
            _log.exception("a request failed")
            await refusal_of(error).response()(scope, receive, send)


# ---- errors


async def _refused(_request: Request, error: Exception) -> Response:
    return refusal_of(error).response()


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is no {request.method} {request.url.path[:200]} here; /docs lists what there is."
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} cannot be used by {request.method}; /docs lists what there is."
    elif error.status_code == 400:
        message = "The body is no JSON that can be read: it must be UTF-8, and not nested too deeply."
    headers = dict(error.headers or {})
    return Refusal(error.status_code, message, headers=headers).response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    found = min(errors, key=lambda each: (each["type"] not in ("refused", "unfit"), -len(each["loc"])))
    if found["type"] == "json_invalid":
        at, why = found["loc"][-1], found.get("ctx", {}).get("error", "")
        return Refusal(400, f"The body is no JSON: {why} at character {at}.", code="invalid_json").response()
    kind = request.headers.get("content-type", "")
    if found["loc"] == ("body",) and request.method == "POST" and not kind.startswith("application/json"):
        return Refusal(415, "The body must be JSON: send Content-Type: application/json.").response()
    param = _param(found["loc"])
    if found["type"] in ("refused", "unfit"):
        name = found["ctx"].get("param")
        param = ".".join(filter(None, (param, name))) if name else param
        return Refusal(400, found["msg"], param=param or None, code="unsupported_value").response()
    if found["type"] == "extra_forbidden":
        message = f"There is no field {param} here; it is refused rather than ignored."
        return Refusal(400, message, param=param, code="unknown_parameter").response()
    if found["type"] == "missing":
        message = f"{param or 'The body'} is missing."
        return Refusal(400, message, param=param or None, code="missing_required_parameter").response()
    return Refusal(400, f"{param or 'The body'} cannot be used: {found['msg']}.", param=param or None).response()


def _param(place: Sequence[Any]) -> str:
    """A field as OpenAI names it, such as ``messages[0].content``; pydantic's own words for unions are left out."""
    if place[0] != "body":
        return str(place[-1])
    name = ""
    for part in place[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif _WORD.fullmatch(part) and part not in _KINDS and part != "Part":
            name += f".{part}" if name else part
    return name


# ---- what is served without a model


def _add_own(app: FastAPI) -> None:
    page, policy = _page()

    @app.get("/health", tags=["server"], summary="Say whether the model is ready")
    async def health() -> Response:
        """200 when it is, 503 before, and when the server is leaving."""
        gate = app.state.gate
        if gate.is_leaving or not gate.is_ready:
            return Refusal(503, "leaving" if gate.is_leaving else "loading", retry_after=gate.retry_after).response()
        return Response('{"status":"ok"}', media_type="application/json")

    @app.get("/version", tags=["server"], summary="Say the version")
    async def version() -> dict[str, str]:
        """As ``streamllm --version``."""
        return {"version": streamllm.__version__}

    @app.get("/metrics", tags=["server"], summary="Tell figures to Prometheus", response_class=Response)
    async def metrics() -> Response:
        """See docs/server.md for their names."""
        text = await asyncio.to_thread(app.state.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        text = manual(app.openapi())
        return HTMLResponse(text, headers={"Content-Security-Policy": content_policy(text)})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def _page() -> tuple[str, str]:
    """The page and what it may do."""
    text = (importlib.resources.files("streamllm") / "assets" / "page.html").read_text(encoding="utf-8")
    return text, content_policy(text)


def content_policy(page: str) -> str:
    """A policy by which only what stands in the page itself is run, and nothing else is loaded."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.S | re.I)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src 'self' data: blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
