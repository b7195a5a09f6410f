"""What every request passes before any route sees it, and its answer on the way out.

Gives the request an id, looks at the host that it names (so that no page of elsewhere can reach a server of this
machine under a name of its own), asks for a key, refuses what is too large before it is read, refuses all while the
model is loaded or the server is leaving, and writes the journal. Knows ASGI, but neither models nor routes.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamllm.server.journal import Journal
from streamllm.server.keys import Keys
from streamllm.server.refusal import Refusal

OPEN = frozenset({"/", "/docs", "/health", "/openapi.json", "/version", "/favicon.ico"})
"""Paths that need no key: they tell nothing of anybody, and the page asks for the key."""

ALWAYS = OPEN | {"/metrics"}
"""Paths that are served also while there is no model."""

WHILE_LEAVING = "/v1/streams/"
"""Replies that run can be picked up while the server is leaving."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PORT = re.compile(r":\d*$")


class Gate:
    """What the door looks at; others change it.

    Attributes:
        is_ready: the model is there.
        is_leaving: no more requests are taken.
        retry_after: seconds after which to try again while one of that is so.
    """

    def __init__(self) -> None:
        self.is_ready = self.is_leaving = False
        self.retry_after = 2


class Door:
    """The outermost application.

    Args:
        app: what comes behind it.
        gate: whether requests may come in.
        keys: who may come in.
        hosts: names by which the server may be asked for; ``None``: any.
        max_body: bytes of a request at most.
        journal: has a line for each request.
    """

    def __init__(
        self, app: ASGIApp, *, gate: Gate, keys: Keys, hosts: Sequence[str] | None, max_body: int, journal: Journal
    ) -> None:
        self._app, self._gate, self._keys, self._max_body, self._journal = app, gate, keys, max_body, journal
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, began=time.time())
        began, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            try:
                state["owner"] = self._admit(scope, headers)
            except Refusal as refusal:
                await refusal.response()(scope, receive, answer)
            else:
                await self._app(scope, self._measured(receive), answer)
        finally:
            self._write(scope, state, status or 499, time.monotonic() - began)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """The owner of a request that may come in.

        Raises:
            Refusal: it may not.
        """
        path, gate = scope["path"], self._gate
        if self._hosts is not None:
            host = _PORT.sub("", headers.get(b"host", b"").decode("latin-1").lower())
            if host not in self._hosts:
                raise Refusal(403, f"This server is not called {host[:80]!r}; see --allow-host.", code="unknown_host")
        owner = self._keys.owner(headers.get(b"authorization", b""))
        if owner is None and path not in OPEN:
            raise Refusal(
                401,
                "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            raise Refusal(400, "The header Content-Length is no number.")
        if int(length) > self._max_body:
            raise self._too_large()
        if path not in ALWAYS:
            if gate.is_leaving and not path.startswith(WHILE_LEAVING):
                raise Refusal(503, "The server is leaving; try again soon.", retry_after=gate.retry_after)
            if not gate.is_ready:
                raise Refusal(503, "The model is being loaded; try again soon.", retry_after=gate.retry_after)
        return owner or ""

    def _measured(self, receive: Receive) -> Receive:
        """The body as it comes, up to the limit; a body in chunks does not say how large it is."""
        size = 0

        async def measured() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, self._too_large().message)
            return message

        return measured

    def _too_large(self) -> Refusal:
        message = f"A request may have {self._max_body:,} bytes, this one has more; see --max-body."
        return Refusal(413, message, headers={"Connection": "close"})

    def _write(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        route = scope.get("route")
        log: Callable[[], dict[str, Any]] | None = state.get("log")
        self._journal.write(
            request=state["request_id"],
            method=scope["method"],
            path=getattr(route, "path_format", getattr(route, "path", None)),
            status=status,
            seconds=round(seconds, 4),
            **state.get("cost", {}),
            **(log() if log is not None else {}),
        )
