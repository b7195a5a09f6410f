"""What breaks around the server harms nothing else: kills, hang-ups, slow readers, full disks, poisoned streams."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
import torch

from serving import MODEL, Served, application, listening, said, until
from streamllm.errors import StateError
from streamllm.server import answer as answer_module
from streamllm.server import serve_job
from streamllm.transcript import Transcript
from test_serve_process import Process, process

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FIRST = "Once upon a time there was a dog."


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with application(tmp_path, resident=32) as made, listening(made) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, timeout=60) as made:
        yield made


def asked(text: str = FIRST, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": said(text), "temperature": 0, **more}


def piece(line: str) -> str:
    """The text of a line of a stream."""
    if not line.startswith("data: {"):
        return ""
    choices = json.loads(line[6:]).get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def answer(client: httpx2.Client, **more: Any) -> str:
    done = client.post(CHAT, json=asked(**more))
    assert done.status_code == 200, done.text
    text: str = done.json()["choices"][0]["message"]["content"]
    return text


def turns(client: httpx2.Client, session: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/v1/sessions/{session}/turns").json()["data"]
    return found


def figure(client: httpx2.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"streamllm:{name} ")).rpartition(" ")[2])


def is_idle(served: Served) -> bool:
    """Whether nothing runs, waits, is held or counted."""
    service = served.service
    stats = service.engine.stats()
    return not (
        stats.running
        or stats.waiting
        or service.runs.running
        or service.conversations.stats()["busy"]
        or service.limits._running.total()
    )


# ---- kill -9


class Listener:
    """Reads a reply in a thread until it breaks off; ``text`` is what has come."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.text = ""
        self._url, self._body = url, body
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with (
            suppress(httpx2.TransportError),
            httpx2.stream("POST", self._url + CHAT, json=self._body | {"stream": True}, timeout=60) as response,
        ):
            for line in response.iter_lines():
                self.text += piece(line)

    def join(self) -> None:
        self._thread.join(60)


def have_heard(listeners: Iterable[Listener]) -> bool:
    """Whether each is in the middle of its reply."""
    return all(len(each.text) > 100 for each in listeners)


def ready(server: Process) -> httpx2.Client:
    assert until(lambda: server.status() == 200, 60)
    return httpx2.Client(base_url=server.url, timeout=60)


@pytest.mark.usefixtures("no_settings", "foreground")
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kill_in_the_middle_of_replies_loses_nothing_that_was_shown(tmp_path: Path, kills: int) -> None:
    """Reference: the texts that clients had received; the conversation that was not killed."""
    names = ["one", "two", "three"]
    flags = ("--state", str(tmp_path / "state"), "--window", "60", "--block", "8")
    draw, shown = random.Random(kills), dict[str, str]()
    resent = said(FIRST)
    for number in range(kills + 1):
        with process(*flags) as server, ready(server) as client:
            if not number:
                for name in names:
                    assert client.post("/v1/sessions", json={"id": name}).status_code == 201
                    answer(client, text=f"{FIRST} It met {name}.", session_id=name, max_tokens=20)
                resent += [{"role": "assistant", "content": answer(client, max_tokens=20)}]
                resent += said("Then Lily came.")
            else:
                listed = {view["id"]: view["turns"] for view in client.get("/v1/sessions").json()["data"]}
                assert {name: listed[name] for name in names} == dict.fromkeys(names, number + 1)
                for name in names:
                    last = turns(client, name)[-1]
                    assert last["reply"].startswith(shown[name])
                    more = answer(client, messages=[], session_id=name, session_action="continue", max_tokens=6)
                    assert turns(client, name)[-1]["reply"].startswith(last["reply"])
                    assert turns(client, name)[-1]["reply"].endswith(more)
                done = client.post(CHAT, json=asked(messages=resent, max_tokens=6)).json()  # as a client tries again
                assert done["streamllm"]["how"] in ("forked", "continued")
                assert done["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
            if number == kills:
                return
            bodies = {name: asked(f"Then {number} cats came.", session_id=name, endless=True) for name in names}
            listeners = {name: Listener(server.url, body) for name, body in bodies.items()}
            other = Listener(server.url, asked(messages=resent, endless=True))
            assert until(partial(have_heard, (*listeners.values(), other)), 60)
            time.sleep(draw.uniform(0, 0.3))
            server.process.kill()
            for each in (*listeners.values(), other):
                each.join()
            shown = {name: each.text for name, each in listeners.items()}


# ---- hanging up


async def hang_up(url: str, draw: random.Random, number: int) -> None:
    """Ask for something, and go at a random moment: before the answer, in the middle of an event, or late."""
    place = urlsplit(url)
    kind = draw.choice(("new", "new", "session", "text", "whole", "resumable"))
    body = asked(f"{FIRST} And {number}.", stream=kind != "whole", max_tokens=400)
    if kind == "session":
        body["session_id"] = draw.choice(("one", "two"))
    if kind == "text":
        body = {"model": MODEL, "prompt": FIRST, "stream": True, "max_tokens": 400}
    data = json.dumps(body).encode()
    head = f"POST {TEXT if kind == 'text' else CHAT} HTTP/1.1\r\nHost: {place.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    request = head.encode() + data
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    is_cut = draw.random() < 0.1
    writer.write(request[: draw.randrange(len(request))] if is_cut else request)
    with suppress(asyncio.TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        wanted = draw.choice((0, 1, 100, 1000, 5000))
        await asyncio.wait_for(reader.readexactly(wanted), 0 if is_cut else draw.uniform(0.001, 0.3))
    if draw.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_hang_up_at_any_moment_leave_no_slot_taken(
    served: Served, client: httpx2.Client, count: int
) -> None:
    """Reference: the same request before and after, and the memory of a quarter of the way."""
    for name in ("one", "two"):
        client.post("/v1/sessions", json={"id": name})
        answer(client, session_id=name, max_tokens=5)
    want = client.post(TEXT, json={"model": MODEL, "prompt": FIRST, "max_tokens": 30}).json()["choices"]
    draw, left = random.Random(count), iter(range(count))
    weights: list[int] = []

    async def some() -> None:
        for number in left:
            await hang_up(served.url, draw, number)
            if number % (count // 4) == 0:
                weights.append(psutil.Process().memory_info().rss)

    async def all_of_them() -> None:
        await asyncio.gather(*(some() for _ in range(6)))

    asyncio.run(all_of_them())
    assert until(lambda: is_idle(served), 20), served.service.engine.stats()
    assert figure(client, "num_requests_running") == figure(client, "num_requests_waiting") == 0
    assert until(lambda: not [each for each in threading.enumerate() if each.name.startswith("streamllm-run")], 5)
    assert client.post(TEXT, json={"model": MODEL, "prompt": FIRST, "max_tokens": 30}).json()["choices"] == want
    for name in ("one", "two"):
        before = turns(client, name)
        assert before[0]["user"] == FIRST
        answer(client, text="And then?", session_id=name, max_tokens=5)
        assert turns(client, name)[: len(before)] == before
    if count >= 1000:
        assert weights[-1] - weights[1] < 16 << 20
    assert "Traceback" not in served.journal.getvalue()


# ---- slow readers


def sluggish(served: Served, number: int) -> socket.socket:
    """A client that asks for a reply without end and does not read it."""
    place = urlsplit(served.url)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((place.hostname, place.port))
    more = {"stream": True, "endless": True, "stream_options": {"include_stats": True}}  # events are long
    data = json.dumps(asked(f"{FIRST} {number}", **more)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    made.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return made


def test_clients_that_do_not_read_hold_nobody_up(tmp_path: Path) -> None:
    """Two slots and two clients that do not read. Reference: the text of a third one when it was alone."""
    with (
        application(tmp_path, slots=2) as made,
        listening(made, buffer=4096) as served,
        httpx2.Client(base_url=served.url, timeout=60) as client,
    ):
        want = answer(client, max_tokens=100)
        slow = [sluggish(served, number) for number in range(2)]
        try:
            assert until(lambda: served.service.runs.running == 2)
            assert until(is_still(served), 90)
            assert answer(client, max_tokens=100) == want
            assert served.service.runs.running == 2
            for run in served.service.runs._running:
                assert len(run._log) <= 300  # BACKLOG, and what one write takes
            slow[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            assert len(slow[0].recv(100_000)) > 0  # who reads again goes on
        finally:
            for each in slow:
                each.close()
        assert until(lambda: is_idle(served), 10)


def test_a_client_that_reads_nothing_for_long_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "STALLED", 0.5)
    with application(tmp_path, slots=2) as made, listening(made, buffer=4096) as served, sluggish(served, 1):
        assert until(lambda: served.service.runs.running == 1)
        assert until(lambda: is_idle(served), 90)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux breaks such connections off by itself")
def test_a_connection_that_nothing_is_taken_from_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the error that the system tells of the connection."""
    monkeypatch.setattr(serve_job, "STALLED", 0.5)
    with serve_job.listen("127.0.0.1", 0) as place, socket.create_connection(place.getsockname()):
        place.setblocking(True)
        connection, _ = place.accept()
        connection.settimeout(20)
        with connection, pytest.raises(TimeoutError) as caught:
            connection.sendall(bytes(1 << 30))
    assert caught.value.errno == errno.ETIMEDOUT


def is_still(served: Served) -> Callable[[], bool]:
    """Tells whether no token was generated for half a second."""
    seen, since = -1, time.monotonic()

    def look() -> bool:
        nonlocal seen, since
        now = served.service.engine.stats().tokens_generated
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 0.5

    return look


# ---- a full disk


def test_a_full_disk_breaks_one_reply_off_and_loses_nothing(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the reply that met no full disk; a text that needs no disk meanwhile."""
    for name in ("whole", "full"):
        client.post("/v1/sessions", json={"id": name})
    want = answer(client, session_id="whole", max_tokens=30)
    write, written = Transcript.write, 0

    def full(self: Transcript, *given: Any) -> None:
        nonlocal written
        written += 1
        if written > 10:
            raise StateError("The disk is full.") from OSError(errno.ENOSPC, "No space left on device")
        write(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Transcript, "write", full)
        with client.stream("POST", CHAT, json=asked(session_id="full", max_tokens=30, stream=True)) as response:
            lines = list(response.iter_lines())
        shown = "".join(map(piece, lines))
        assert want.startswith(shown)
        assert shown
        (error,) = [json.loads(line[6:])["error"] for line in lines if '"error"' in line]
        assert "The disk is full." in error["message"]
        assert "data: [DONE]" not in lines
        refused = client.post(CHAT, json=asked("More.", session_id="full", max_tokens=30))
        assert refused.status_code == 507
        assert "The disk is full." in refused.json()["error"]["message"]
        text = client.post(TEXT, json={"model": MODEL, "prompt": FIRST, "max_tokens": 30})
        assert text.status_code == 200
        assert until(lambda: is_idle(served), 10)
    (turn,) = turns(client, "full")
    assert turn["reply"].startswith(shown)
    answer(client, messages=[], session_id="full", session_action="continue", max_tokens=10)
    (turn,) = turns(client, "full")
    assert want.startswith(turn["reply"]) or turn["reply"].startswith(want)
    assert client.get("/health").status_code == 200


# ---- a poisoned stream


def test_a_poisoned_stream_harms_only_itself(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits turn to nan after some tokens. Reference: the others' texts without it, and what it had shown."""
    engine = served.service.engine
    forward = engine._forward

    def poisoned(ready: list[Any]) -> list[Any]:
        rows = list(forward(ready))
        for place, request in enumerate(ready):
            row = rows[place]
            if request.turn.sampler.config.seed == 666 and row is not None and request.tokens_in_slot > 8:
                rows[place] = torch.full_like(row, float("nan"))
        return rows

    client.post("/v1/sessions", json={"id": "poisoned"})
    bodies = [asked(f"{FIRST} {number}", max_tokens=60) for number in range(3)]
    want = [answer(client, **body) for body in bodies]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", poisoned)
        listeners = [Listener(served.url, body) for body in bodies]
        body = asked(session_id="poisoned", max_tokens=60, stream=True, seed=666)
        with client.stream("POST", CHAT, json=body) as response:
            lines = list(response.iter_lines())
        for each in listeners:
            each.join()
    assert [each.text for each in listeners] == want
    (error,) = [json.loads(line[6:])["error"] for line in lines if '"error"' in line]
    assert "not finite" in error["message"]
    shown = "".join(map(piece, lines))
    (turn,) = turns(client, "poisoned")
    assert turn["reply"].startswith(shown)
    assert shown
    answer(client, text="Go on.", session_id="poisoned", max_tokens=5)
    assert until(lambda: is_idle(served), 10)
    assert engine.stats().failed == 1
