"""Clients that stream, all in one process of their own and light on it, so that the server has the cores.

Each is a task with plain sockets: what comes is noted with its time, and read when the reply is over. Knows OpenAI's
events of completions and of chat completions, as all servers here send them, and nothing of who sends them.

As a script: the requests of each client as JSON on stdin, ``{"url": .., "clients": [[[PATH, BODY], ..], ..]}``; each
sends its own one after the other, all begin at once, and the replies come as JSON on stdout.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any
from urllib.parse import urlsplit

SHOWN = 300
"""Characters of an error that are kept."""

Asked = tuple[str, dict[str, Any]]
"""Path and body of a request."""


@dataclass
class Reply:
    """What came of one request; times are seconds of the client's clock.

    Args:
        sent: when it was.
        times: of each event with text.
        text: all of it.
        finish: why it ended, as the server says; ``None``: it did not say.
        tokens: of the reply, by the server's own count; without one, events.
        prompt, cached: tokens before the reply, and those of them that were not read.
        how: what a server of ours says of the conversation.
        error: what went wrong.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    tokens: int = 0
    prompt: int = 0
    cached: int = 0
    how: str | None = None
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.sent

    @property
    def intervals(self) -> list[float]:
        """Seconds between two events with text."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def pace(self) -> float:
        """Median of them."""
        return median(self.intervals)

    def read(self, event: bytes, moment: float) -> None:
        """Take in one event."""
        if event == b"[DONE]":
            return
        value = json.loads(event)
        if "error" in value:
            self.error = json.dumps(value["error"])[:SHOWN]
            return
        for choice in value.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text:
                self.times.append(moment)
                self.text += text
            self.finish = choice.get("finish_reason") or self.finish
        if usage := value.get("usage"):
            self.tokens, self.prompt = usage["completion_tokens"], usage["prompt_tokens"]
            self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.how = (value.get("streamllm") or {}).get("how") or self.how


class Wire(asyncio.Protocol):
    """One request and what comes back, line by line."""

    def __init__(self, request: bytes) -> None:
        self._request, self._rest = request, b""
        self.lines: list[tuple[float, bytes]] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note whole lines."""
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.lines += [(now, line) for line in lines]

    def connection_lost(self, error: Exception | None) -> None:
        """The reply is over."""
        self.lines.append((time.perf_counter(), self._rest))
        if not self.over.done():
            self.over.set_result(None)


async def ask(url: str, path: str, body: dict[str, Any]) -> Reply:
    """One request, and its reply when that is over."""
    place, data = urlsplit(url), json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    reply = Reply(time.perf_counter())
    host, port = place.hostname or "", place.port or 80
    try:
        _, wire = await asyncio.get_running_loop().create_connection(lambda: Wire(head.encode() + data), host, port)
        await wire.over
    except OSError as error:
        reply.error = f"{type(error).__name__}: {error}"
        return reply
    lines = wire.lines
    if not lines[0][1].startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
        reply.error = b"\n".join(line for _, line in (lines[0], *lines[-2:])).decode(errors="replace")[-SHOWN:]
        return reply
    for moment, line in lines:
        if line.startswith(b"data: "):  # lengths of pieces stand in lines of their own
            reply.read(line[6:].strip(), moment)
    reply.tokens = reply.tokens or len(reply.times)
    if reply.finish is None and reply.error is None:
        reply.error = "The reply broke off."
    return reply


async def ask_all(url: str, clients: Sequence[Sequence[Asked]]) -> list[list[Reply]]:
    """The replies of each client."""

    async def one(requests: Sequence[Asked]) -> list[Reply]:
        return [await ask(url, path, body) for path, body in requests]

    return list(await asyncio.gather(*map(one, clients)))


def run_clients(url: str, clients: Sequence[Sequence[Asked]]) -> list[list[Reply]]:
    """The same, in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    given = json.dumps({"url": url, "clients": clients})
    done = subprocess.run([sys.executable, __file__], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The clients ended with {done.returncode}: {done.stderr[-SHOWN:]}")
    return [[Reply(**found) for found in each] for each in json.loads(done.stdout)]


if __name__ == "__main__":
    plan = json.load(sys.stdin)
    replies = asyncio.run(ask_all(plan["url"], plan["clients"]))
    json.dump([[asdict(reply) for reply in each] for each in replies], sys.stdout)
