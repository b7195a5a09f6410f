"""What is refused, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the right status.

Knows errors and statuses, but no routes. The text is ASCII, whatever was sent in: half a character of a request must
not make its refusal fail.
"""

from __future__ import annotations

import errno
import json
import sqlite3
from typing import Any

from starlette.responses import Response

from streamllm.errors import BusyError, StreamLLMError

RETRY_AFTER = 1
"""Seconds after which to try again, where nothing better is known."""

LONGEST = 1000
"""Characters of a message at most: what was sent in may be as long as a request."""

_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    410: "gone",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "unprocessable",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
    507: "insufficient_storage",
}


class Refusal(Exception):  # noqa: N818 - what the client is told, no fault of ours
    """A request that is not served.

    Args:
        status: of HTTP.
        message: a sentence for a person.
        param: the field that is at fault, such as ``messages[0].role``.
        code: a word for a program; ``None``: that of the status.
        retry_after: seconds; set for 429 and 503 if left out.
        headers: more of them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message[:LONGEST], param
        self.code = code or _CODES.get(status, "error")
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers["Retry-After"] = str(RETRY_AFTER if retry_after is None else retry_after)

    @property
    def kind(self) -> str:
        """The type as OpenAI calls it."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def shape(self) -> dict[str, Any]:
        """The body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        body = json.dumps(self.shape())
        return Response(body, self.status, headers=self.headers, media_type="application/json")


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told about an error; of one that we did not foresee only that there was one."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, MemoryError):
        return Refusal(503, "The server has no memory left for this; try again later.")
    if _is_full(error):
        return Refusal(507, str(error))
    if not isinstance(error, StreamLLMError):
        return Refusal(500, "The server made a mistake; its log says more.", code="internal_error")
    is_closing = isinstance(error, BusyError) and "closing" in str(error)
    return Refusal(503 if is_closing else error.http_status, str(error))


def _is_full(error: BaseException) -> bool:
    """Whether a disk without room is behind one of our errors: the client is not at fault then."""
    cause = error.__cause__ if isinstance(error, StreamLLMError) else None
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
