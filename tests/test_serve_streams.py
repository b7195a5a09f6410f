"""Streams of the server: who hangs up, who comes back, who is slow, and who is too many."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from serving import MODEL, Served, application, listening, said, until
from streamllm.server import answer, runs
from streamllm.server import app as app_module
from streamllm.server import run as run_module
from streamllm.server.bell import Bell
from streamllm.server.refusal import Refusal
from streamllm.server.run import Run

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sessions")
    with application(folder, slots=2, waiting=2, max_per_key=4) as made, listening(made) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, timeout=30) as made:
        yield made


def asked(text: str = "Once upon a time", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": said(text), "stream": True, **more}


def endless(**more: Any) -> dict[str, Any]:
    return asked(endless=True, **more)


def events(response: httpx2.Response, most: int | None = None) -> list[tuple[int, str]]:
    """Ids and data of so many events."""
    found: list[tuple[int, str]] = []
    number = 0
    for line in response.iter_lines():
        if line.startswith("id: "):
            number = int(line[4:])
        elif line.startswith("data: "):
            found.append((number, line[6:]))
            if most is not None and len(found) >= most:
                break
    return found


def text_of(found: list[tuple[int, str]]) -> str:
    chunks = [json.loads(data) for _, data in found if data != "[DONE]"]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def is_idle(served: Served) -> bool:
    stats = served.service.engine.stats()
    return not (stats.running or stats.waiting or served.service.runs.running)


# ---- hanging up


def test_who_hangs_up_frees_the_slot(served: Served, client: httpx2.Client) -> None:
    """A reply without end, with a stream and without: after the client is gone the engine has nothing to do."""
    with client.stream("POST", CHAT, json=endless()) as response:
        assert len(events(response, 5)) == 5
        assert served.service.engine.stats().running == 1
    assert until(lambda: is_idle(served))
    whole = {"model": MODEL, "messages": said("x"), "endless": True, "max_tokens": 2**31 - 1}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(served.url + CHAT, json=whole, timeout=0.5)
    assert until(lambda: is_idle(served))


def test_who_hangs_up_in_the_queue_leaves_it(served: Served, client: httpx2.Client) -> None:
    with client.stream("POST", CHAT, json=endless()) as one, client.stream("POST", CHAT, json=endless()) as two:
        lines = [one.iter_lines(), two.iter_lines()]  # one that is let go of hangs up
        assert all(next(each) for each in lines)
        body = json.dumps(endless()).encode()
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as third:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            third.sendall(head.encode() + b"\r\n\r\n" + body)
            assert until(lambda: served.service.runs.running == 3)
        assert until(lambda: served.service.runs.running == 2)
    assert until(lambda: is_idle(served))


def test_a_text_is_kept_as_far_as_it_came_when_the_client_hangs_up(served: Served, client: httpx2.Client) -> None:
    client.post("/v1/sessions", json={"id": "cut"})
    with client.stream("POST", CHAT, json=endless(session_id="cut")) as response:
        shown = text_of(events(response, 20))
    assert until(lambda: is_idle(served))
    (turn,) = client.get("/v1/sessions/cut/turns").json()["data"]
    assert turn["reply"].startswith(shown)
    more = client.post(
        CHAT,
        json={
            "model": MODEL,
            "messages": [],
            "session_id": "cut",
            "session_action": "continue",
            "max_tokens": 5,
        },
    )
    assert more.status_code == 200, more.text
    (turn,) = client.get("/v1/sessions/cut/turns").json()["data"]
    assert turn["reply"].endswith(more.json()["choices"][0]["message"]["content"])


# ---- limits


def test_beyond_the_queue_requests_are_refused_with_a_time_to_come_back(served: Served, client: httpx2.Client) -> None:
    threads = [
        threading.Thread(target=lambda: httpx2.post(served.url + CHAT, json=asked(max_tokens=400), timeout=60))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert until(lambda: served.service.runs.running == 4, 10)
    refused = client.post(CHAT, json=asked())
    assert refused.status_code == 429, refused.text
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join(60)
    assert until(lambda: is_idle(served))
    assert client.post(CHAT, json=asked(max_tokens=1)).status_code == 200


def test_the_operators_limit_holds_for_every_reply(served: Served, client: httpx2.Client) -> None:
    served.service.limits.max_tokens = 7
    try:
        for more in ({}, {"max_tokens": 100}, {"endless": True}):
            done = client.post(CHAT, json={**asked(**more), "stream_options": {"include_usage": True}})
            usage = [json.loads(x[6:]) for x in done.text.splitlines() if '"usage":' in x][-1]["usage"]
            assert usage["completion_tokens"] == 7
    finally:
        served.service.limits.max_tokens = None


# ---- coming back


def test_a_resumable_reply_goes_on_and_is_picked_up_without_a_gap(served: Served, client: httpx2.Client) -> None:
    """Reference: the same request without a break."""
    whole = events_of(client.post(CHAT, json=asked(max_tokens=60)))
    with client.stream("POST", CHAT, json=asked(max_tokens=60, resumable=True)) as response:
        name = response.headers["x-request-id"]
        first = events(response, 10)
    with client.stream("GET", f"/v1/streams/{name}?after={first[-1][0]}") as response:
        rest = events(response)
    assert [number for number, _ in first + rest] == list(range(1, len(first + rest) + 1))
    assert text_of(first + rest) == text_of(whole)
    # by its other name, by the header of a browser, and all over again
    id = json.loads(first[0][1])["id"]
    header = {"Last-Event-ID": str(first[-1][0])}
    assert events_of(client.get(f"/v1/streams/{id}", headers=header)) == rest
    assert events_of(client.get(f"/v1/streams/{id}")) == first + rest
    assert client.get(f"/v1/streams/{id}?after=100000").status_code == 400
    assert client.get(f"/v1/streams/{id}", headers={"Last-Event-ID": "x"}).status_code == 400


def events_of(response: httpx2.Response) -> list[tuple[int, str]]:
    assert response.status_code == 200, response.text
    return events(response)


def test_a_resumable_reply_can_be_stopped(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the transcript. Telling is slower here than generating; what was generated is told all the same."""
    observe = served.service.metrics.inter_token_latency.observe

    def observe_slowly(seconds: float) -> None:
        time.sleep(0.01)
        observe(seconds)

    monkeypatch.setattr(served.service.metrics.inter_token_latency, "observe", observe_slowly)
    with client.stream("POST", CHAT, json=endless(resumable=True)) as response:
        name = response.headers["x-request-id"]
        events(response, 3)
    time.sleep(0.2)
    assert served.service.runs.running == 1
    assert client.delete(f"/v1/streams/{name}").json() == {"id": name, "deleted": True}
    assert until(lambda: is_idle(served))
    last = events_of(client.get(f"/v1/streams/{name}"))
    assert last[-1][1] == "[DONE]"
    told = json.loads(last[-2][1])["streamllm"]
    assert told["finish"] == "interrupted"
    (turn,) = client.get(f"/v1/sessions/{told['session_id']}/turns").json()["data"]
    assert text_of(last) == turn["reply"]


def test_a_resumable_reply_that_nobody_comes_back_for_ends(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client.stream("POST", CHAT, json=endless(resumable=True)) as response:
        name = response.headers["x-request-id"]
        events(response, 3)
    monkeypatch.setattr(runs, "LINGER", 0.2)
    assert until(lambda: bool(served.service.runs.sweep() or is_idle(served)))
    assert until(lambda: client.get(f"/v1/streams/{name}").status_code == 404)


def test_events_that_fell_out_of_the_buffer_are_gone(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "REPLAY", 20)
    done = client.post(CHAT, json=asked(max_tokens=60, resumable=True))
    name = done.headers["x-request-id"]
    assert client.get(f"/v1/streams/{name}?after=1").status_code == 410
    last = events(done)[-1][0]
    assert [n for n, _ in events_of(client.get(f"/v1/streams/{name}?after={last - 5}"))] == list(
        range(last - 4, last + 1)
    )


def test_a_reply_that_is_not_resumable_is_not_found(client: httpx2.Client) -> None:
    done = client.post(CHAT, json=asked(max_tokens=3))
    assert client.get(f"/v1/streams/{done.headers['x-request-id']}").status_code == 404


# ---- keeping the connection


def test_comments_keep_a_connection_while_nothing_comes(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both slots are taken and given to others only at times, so the third waits."""
    monkeypatch.setattr(answer, "PATIENCE", 0.1)
    monkeypatch.setattr(answer, "KEEP_ALIVE", 0.05)
    engine = served.service.engine
    held = [engine.submit("a", on_end="pass"), engine.submit("b", on_end="pass")]  # nobody reads: they stand still
    try:
        assert until(lambda: all(request.is_full for request in held), 20)
        monkeypatch.setattr(engine, "submit", lambda *a, **k: held[0])  # nothing comes of it
        with client.stream("POST", "/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True}) as response:
            lines = response.iter_lines()
            assert any(line == ": keep-alive" for line, _ in zip(lines, range(2000), strict=False))
    finally:
        monkeypatch.undo()
        for request in held:
            request.cancel()
    assert until(lambda: is_idle(served))


def test_a_failure_in_the_middle_is_an_event_and_the_end(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise Refusal(507, "The disk is full.")

    seen: list[int] = []
    true = Run.emit

    def emit(self: Run, data: bytes) -> None:
        seen.append(1)
        if len(seen) > 3:
            fail()
        true(self, data)

    monkeypatch.setattr(Run, "emit", emit)
    text = client.post(CHAT, json=asked(max_tokens=50)).text
    assert text.endswith(
        'event: error\ndata: {"error":{"message":"The disk is full.","type":"server_error","param":null,'
        '"code":"insufficient_storage"}}\n\n'
    )
    assert "[DONE]" not in text
    assert until(lambda: is_idle(served))


# ---- slow readers, by themselves


def run_of(loop: asyncio.AbstractEventLoop, **options: Any) -> Run:
    return Run("r", "o", **{"is_resumable": False, "is_silent": False, **options}, bell=Bell(loop))


def test_a_slow_reader_holds_its_own_reply_up_and_gets_everything() -> None:
    async def slow() -> list[bytes]:
        run = run_of(asyncio.get_running_loop())
        reader = run.attach()
        most = 3 * run_module.BACKLOG
        written = 0

        def write() -> None:
            nonlocal written
            for _ in range(most):
                run.emit(b"x")
                written += 1
            run.end()

        thread = threading.Thread(target=write)
        thread.start()
        await asyncio.sleep(0.2)
        assert written == run_module.BACKLOG + 1 or written == run_module.BACKLOG
        found = [piece async for piece in run.read(reader)]
        thread.join()
        return found

    data = b"".join(asyncio.run(slow()))
    assert data.count(b"id: ") == 3 * run_module.BACKLOG


def test_a_reply_whose_reader_is_gone_does_not_wait_for_it() -> None:
    async def gone() -> None:
        run = run_of(asyncio.get_running_loop())
        reader = run.attach()
        thread = threading.Thread(target=lambda: [run.emit(b"x") for _ in range(2 * run_module.BACKLOG)])
        thread.start()
        await asyncio.sleep(0.1)
        run.detach(reader)
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
        assert run.is_cancelled

    asyncio.run(gone())


def test_a_reply_whose_client_is_gone_before_its_first_event_ends() -> None:
    """Its generator is never begun then, so nothing in it can notice."""

    async def gone() -> None:
        run = run_of(asyncio.get_running_loop())
        response = answer._Events(run, run.attach(), ping=1)

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            raise OSError("the client is gone")

        with contextlib.suppress(OSError):
            await response({"type": "http", "method": "POST"}, receive, send)
        assert run.is_cancelled

    asyncio.run(gone())


def test_what_is_kept_for_those_who_come_back_has_a_bound_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "REPLAY_BYTES", 1000)

    async def write() -> None:
        run = run_of(asyncio.get_running_loop(), is_resumable=True)
        for _ in range(100):
            run.emit(b"x" * 93)  # 100 with its id, at least
        assert sum(map(len, run._log)) <= 1000
        with pytest.raises(Refusal) as caught:
            run.attach(80)
        assert caught.value.status == 410
        assert run.attach(95).next == 96

    asyncio.run(write())


# ---- nothing is left behind


def test_a_reply_that_can_be_picked_up_keeps_no_conversation_in_memory(served: Served, client: httpx2.Client) -> None:
    """Its events are kept for a while, but not the cache: a session that is deleted is gone."""
    client.post("/v1/sessions", json={"id": "light"})
    done = client.post(CHAT, json=asked(max_tokens=3, resumable=True, session_id="light"))
    (berth,) = [b for (_, name), b in served.service.conversations._rooms.pool._berths.items() if name == "light"]
    chat = weakref.ref(berth.chat)
    del berth
    client.delete("/v1/sessions/light")

    def is_gone() -> bool:
        gc.collect()
        return chat() is None

    assert until(is_gone)
    again = client.get(f"/v1/streams/{done.headers['x-request-id']}")
    assert again.text == done.text
    assert again.headers["x-session-id"] == "light"


@pytest.mark.parametrize("more", [0, 1])
def test_where_no_thread_can_be_had_nothing_is_left_behind(
    served: Served, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """The thread of the request, and that of its second choice."""
    true = threading.Thread.start
    mine: list[threading.Thread] = []

    def start(self: threading.Thread) -> None:
        target = getattr(self, "_target", None)
        if getattr(target, "__module__", None) == "streamllm.server.runs":
            mine.append(self)
            if len(mine) > more:
                raise RuntimeError("can't start new thread")
        true(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        refused = client.post(CHAT, json={"model": MODEL, "messages": said("No thread"), "n": 2, "max_tokens": 3})
        assert (refused.status_code, len(mine)) == (503, more + 1)
    assert until(lambda: is_idle(served))
    assert not served.service.limits._running
    assert until(lambda: served.service.conversations.stats()["busy"] == 0)
    assert client.post(CHAT, json={**asked("No thread", n=2, max_tokens=3)}).status_code == 200


def test_a_sweep_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "SWEEP_SECONDS", 0.01)
    monkeypatch.setattr(app_module, "GIVE_BACK_SECONDS", 0.01)
    calls: list[int] = []
    given: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("a mistake")

    def give_back() -> None:
        given.append(1)
        raise RuntimeError("a mistake")

    monkeypatch.setattr(app_module, "give_back", give_back)
    with application(tmp_path) as made:
        monkeypatch.setattr(made.service, "sweep", fail)
        with TestClient(made.app):
            assert until(lambda: len(calls) > 2 and len(given) > 2)
