"""What the server refuses: by name, with the right status, in OpenAI's shape, and never by a mistake of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving import MODEL, Served, application, said
from streamllm.server.chat_route import ChatRequest
from streamllm.server.response_schema import ResponseRequest
from streamllm.server.text_schema import CompletionRequest

CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": said("Hello"), "max_tokens": 2},
    TEXT: {"model": MODEL, "prompt": "Hello", "max_tokens": 2},
    RESPONSE: {"model": MODEL, "input": "Hello", "max_output_tokens": 2},
}
KINDS = {CHAT: ChatRequest, TEXT: CompletionRequest, RESPONSE: ResponseRequest}
MAX_BODY = 100_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with application(tmp_path_factory.mktemp("sessions"), max_body=MAX_BODY) as made:
        yield made


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(served.app, raise_server_exceptions=False) as made:
        yield made


def refused(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".") or status == 503
    assert answer.headers["x-request-id"]
    return error


# ---- fields


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, kind in KINDS.items() for field in sorted(kind.unserved)]
)
def test_each_field_of_openais_that_is_not_served_is_refused_by_name(client: TestClient, path: str, field: str) -> None:
    error = refused(client.post(path, json={**NEEDED[path], field: [{"type": "x"}]}))
    assert error["param"] == field
    assert field in error["message"]
    assert "not supported: " in error["message"]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True}),
        (CHAT, {"service_tier": "auto", "store": False, "modalities": ["text"], "logit_bias": {}, "user": "me"}),
        (CHAT, {"metadata": {"a": "b"}, "stop": None, "n": 1, "seed": -1, "stream": False, "reasoning_effort": None}),
        (TEXT, {"echo": False, "best_of": 1, "suffix": None}),
        (RESPONSE, {"tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}}, "truncation": "auto"}),
    ],
)
def test_a_field_that_asks_for_nothing_is_no_reason_to_refuse(
    client: TestClient, path: str, more: dict[str, Any]
) -> None:
    assert client.post(path, json={**NEEDED[path], **more}).status_code == 200


@pytest.mark.parametrize("path", list(NEEDED))
def test_a_field_that_nobody_knows_is_refused(client: TestClient, path: str) -> None:
    error = refused(client.post(path, json={**NEEDED[path], "temprature": 1}))
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["ok", ""]}, "stop[1]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": 1}, "stream"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
        ({"resumable": True}, "resumable"),
        ({"endless": True, "max_tokens": None}, "endless"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"messages": said("Hello", "Hi")}, "messages[1].role"),
        ({"messages": [*said("Hello"), {"role": "system", "content": "x"}, *said("x")]}, "messages[1].role"),
        ({"session_id": "../../x"}, "session_id"),
        ({"session_action": "edit", "session_id": "a"}, "session_turn"),
        ({"session_action": "continue"}, "messages"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"model": None}, "model"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_place(client: TestClient, more: dict[str, Any], param: str) -> None:
    error = refused(client.post(CHAT, json={**NEEDED[CHAT], **more}))
    assert str(error["param"]).startswith(param)


def test_what_a_client_got_as_a_message_it_can_send_back(client: TestClient) -> None:
    """OpenAI's client sends all fields of a message that it was given."""
    message = client.post(CHAT, json=NEEDED[CHAT]).json()["choices"][0]["message"]
    message |= {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    again = {**NEEDED[CHAT], "messages": [*said("Hello"), message, *said("More")]}
    assert client.post(CHAT, json=again).status_code == 200


# ---- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 50_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"model": 1' + b"0" * 5000 + b"}",
        b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "' + MODEL.encode() + b'", "\\ud800": 1, "messages": []}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "' + MODEL.encode() + b'", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    ],
)
@pytest.mark.parametrize("path", list(NEEDED))
def test_a_body_that_is_no_request_is_refused(client: TestClient, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    refused(answer, answer.status_code)


def test_zeros_and_odd_characters_are_text_like_any_other(client: TestClient) -> None:
    for text in ("a\x00b", "\x1b[31m", "\u202e", "é\u0301", "😀", "\x7f"):
        answer = client.post(CHAT, json={**NEEDED[CHAT], "messages": said(text)})
        assert answer.status_code == 200, answer.text


def test_a_body_of_another_type_is_refused(client: TestClient) -> None:
    """So that no page of elsewhere can post without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = client.post(CHAT, content=json.dumps(NEEDED[CHAT]), headers={"Content-Type": kind})
        assert refused(answer, 415)["code"] == "unsupported_media_type"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client: TestClient) -> None:
    """Also one that comes in pieces and does not say how large it is."""
    read = 0

    def pieces() -> Iterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b" " * (MAX_BODY // 4)

    headers = {"Content-Type": "application/json"}
    whole = client.post(CHAT, content=b" " * (MAX_BODY + 1), headers=headers)
    assert refused(whole, 413)["code"] == "request_too_large"
    assert refused(client.post(CHAT, content=pieces(), headers=headers), 413)


# ---- headers and paths


def test_an_id_of_a_request_is_taken_over_if_it_is_harmless(client: TestClient) -> None:
    assert client.get("/version", headers={"X-Request-Id": "mine-1.2_3"}).headers["x-request-id"] == "mine-1.2_3"
    for bad in ("a b", "x" * 65, "<script>", "a\tb", "é".encode().decode("latin-1"), ""):
        found = client.get("/version", headers={"X-Request-Id": bad.encode("latin-1")}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", found)


def test_a_session_that_cannot_be_is_refused_wherever_it_is_named(client: TestClient) -> None:
    for name in ("../x", "a/b", "x" * 65, ".hidden", "a b"):
        answer = client.post(CHAT, json=NEEDED[CHAT], headers={"X-Session-Id": name})
        assert refused(answer)["param"] == "x-session-id"
    for path in ("..%2f..%2fetc", "%00", ".hidden", "x" * 65, "%2e%2e", "a%0d%0aSet-Cookie:x"):
        answer = client.get(f"/v1/sessions/{path}")
        assert answer.status_code in (400, 404, 405)
        refused(answer, answer.status_code)
    refused(client.post(CHAT, json={**NEEDED[CHAT], "session_id": "nobody"}), 404)


def test_unknown_paths_and_methods_are_told_in_the_same_shape(client: TestClient) -> None:
    refused(client.get("/v1/nothing"), 404)
    refused(client.put(CHAT), 405)
    refused(client.get("/v1/streams/nobody"), 404)
    refused(client.get("/v1/models/other"), 404)
    refused(client.get("/v1/responses/other"), 404)
    refused(client.delete("/v1/responses/other"), 404)


# ---- keys, hosts and origins


def test_a_key_is_asked_for_and_another_one_is_refused(tmp_path: Path) -> None:
    with (
        application(tmp_path, keys=("one", "two")) as served,
        TestClient(served.app, raise_server_exceptions=False) as client,
    ):
        for key in (None, "Bearer three", "Bearer ", "one", "Basic one", "Bearer oneone"):
            headers = {} if key is None else {"Authorization": key}
            answer = client.get("/v1/models", headers=headers)
            assert refused(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
        for path in ("/health", "/version", "/", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "bearer two"}).status_code == 200
        # nobody reaches another key's sessions
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        assert client.post("/v1/sessions", json={"id": "mine"}, headers=one).status_code == 201
        assert client.get("/v1/sessions/mine", headers=one).status_code == 200
        assert client.get("/v1/sessions/mine", headers=two).status_code == 404
        assert client.get("/v1/sessions", headers=two).json()["data"] == []
        assert client.delete("/v1/sessions/mine", headers=two).status_code == 404
        named = {**NEEDED[CHAT], "session_id": "mine"}
        assert client.post(CHAT, json=named, headers=two).status_code == 404


def test_only_the_servers_own_names_are_answered_and_only_named_origins_may_read(tmp_path: Path) -> None:
    """A page of elsewhere that has its own name point to this machine is refused."""
    with (
        application(tmp_path, hosts=["localhost", "[::1]"], origins=("https://a.example",)) as served,
        TestClient(served.app, raise_server_exceptions=False) as client,
    ):
        for host in ("localhost", "LOCALHOST:8000", "[::1]:80"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "", "127.0.0.1"):
            assert refused(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "unknown_host"
        own = {"Host": "localhost"}
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        assert client.options(CHAT, headers={**own, **ask, "Origin": "https://a.example"}).status_code == 200
        assert client.options(CHAT, headers={**own, **ask, "Origin": "https://b.example"}).status_code == 400
        answer = client.get("/health", headers={**own, "Origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        answer = client.get("/health", headers={**own, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in answer.headers


# ---- what is served without a model


def test_before_there_is_a_model_and_while_leaving_requests_are_sent_away(served: Served, client: TestClient) -> None:
    gate = served.app.state.gate
    for name, away in (("is_ready", False), ("is_leaving", True)):
        setattr(gate, name, away)
        try:
            for answer in (client.get("/health"), client.post(CHAT, json=NEEDED[CHAT])):
                refused(answer, 503)
                assert int(answer.headers["retry-after"]) > 0
            assert client.get("/version").status_code == 200
            assert client.get("/metrics").status_code == 200
        finally:
            setattr(gate, name, not away)
    assert client.get("/health").json() == {"status": "ok"}


def test_the_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", answer.text)
    text = client.get("/docs").text
    for path in (CHAT, TEXT, RESPONSE, "/v1/sessions/{id}/fork", "/tokenize"):
        assert path in text


def test_tokens_go_there_and_back(served: Served, client: TestClient) -> None:
    """Reference: the tokenizer."""
    ids = served.service.engine.tokenizer("Once upon a time")["input_ids"]
    found = client.post("/tokenize", json={"model": MODEL, "prompt": "Once upon a time", "return_token_strs": True})
    assert (found.json()["tokens"], found.json()["count"]) == (ids, len(ids))
    assert len(found.json()["token_strs"]) == len(ids)
    back = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert back == served.service.engine.tokenizer.decode(ids)
    assert client.post("/tokenize", json={"messages": said("Once upon a time")}).json()["tokens"] == ids
    refused(client.post("/detokenize", json={"tokens": [10**8]}))
    refused(client.post("/tokenize", json={}))
    refused(client.post("/tokenize", json={"prompt": "a", "messages": said("b")}))


def test_the_journal_has_a_line_for_each_request_and_no_messages(served: Served, client: TestClient) -> None:
    served.journal.seek(0)
    served.journal.truncate()
    client.post(CHAT, json={**NEEDED[CHAT], "messages": said("a secret")}, headers={"X-Request-Id": "r1"})
    client.get("/v1/sessions/secret-name")
    lines = [json.loads(line) for line in served.journal.getvalue().splitlines()]
    first = lines[0]
    assert (first["request"], first["method"], first["path"], first["status"]) == ("r1", "POST", CHAT, 200)
    assert lines[1]["path"] == "/v1/sessions/{id}"
    assert lines[0]["completion_tokens"] == 2
    assert "secret" not in served.journal.getvalue()
    served.service.logs_messages = True
    try:
        client.post(CHAT, json={**NEEDED[CHAT], "messages": said("a secret")})
    finally:
        served.service.logs_messages = False
    assert "a secret" in served.journal.getvalue()


def test_metrics_have_vllms_names_and_ours(client: TestClient) -> None:
    client.post(CHAT, json=NEEDED[CHAT])
    text = client.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "request_queue_time_seconds_count",
        "e2e_request_latency_seconds_count",
        'request_success_total{finished_reason="length"}',
        "tokens_evicted_total",
        "rebases_total",
        "window_occupancy_count",
        "sessions_resident",
        "sessions_on_disk",
        "recalled_passages_total",
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(f"streamllm:{name} ")]
        assert float(line.split()[1]) >= 0
