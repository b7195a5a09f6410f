"""Sessions over HTTP: said anew, forked, carried elsewhere, and what is wrong with a request for that."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving import MODEL, Served, application, said
from streamllm.errors import StateError
from streamllm.server import registry
from streamllm.transcript import Transcript

CHAT, SESSIONS, IMPORT = "/v1/chat/completions", "/v1/sessions", "/v1/sessions/import"
ZIP = {"Content-Type": "application/zip"}
MINE, OTHER = {"Authorization": "Bearer mine"}, {"Authorization": "Bearer other"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with application(tmp_path_factory.mktemp("sessions"), keys=("mine", "other"), window=150) as made:
        yield made


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(served.app, raise_server_exceptions=False, headers=MINE) as made:
        yield made


def make(client: TestClient, name: str, *texts: str, **more: Any) -> list[str]:
    """A session in which this was said; the replies."""
    assert client.post(SESSIONS, json={"id": name, **more}).status_code == 201
    return [say(client, name, said(text))["choices"][0]["message"]["content"] for text in texts]


def say(client: TestClient, name: str, messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    answer = client.post(CHAT, json={"model": MODEL, "session_id": name, "messages": messages, "max_tokens": 8, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    message: str = answer.json()["error"]["message"]
    assert "/tmp" not in message
    return message


def turns(client: TestClient, name: str) -> list[tuple[str, str]]:
    rows = client.get(f"{SESSIONS}/{name}/turns").json()["data"]
    return [(row["user"], row["reply"]) for row in rows]


def before_the_reply(client: TestClient, name: str, answer: dict[str, Any]) -> int:
    """Tokens of a session but for those of its last reply."""
    tokens: int = client.get(f"{SESSIONS}/{name}").json()["tokens"]
    return tokens - int(answer["usage"]["completion_tokens"])


# ---- said anew


def test_a_turn_that_is_edited_takes_later_ones_back_and_its_usage_is_that_of_what_stays(client: TestClient) -> None:
    """Reference: a session in which only what stays was ever said."""
    make(client, "plain", "One day", "A cat sat")
    make(client, "edited", "One day", "A dog ran", "It was late")
    edited = say(client, "edited", said("A cat sat"), session_action="edit", session_turn=2)
    assert turns(client, "edited") == turns(client, "plain")
    seen = say(client, "plain", [], session_action="regenerate")
    for name, each in (("edited", edited), ("plain", seen)):
        assert each["usage"]["prompt_tokens"] == before_the_reply(client, name, each)
        assert each["streamllm"]["turns"] == 2
    assert edited["usage"] == seen["usage"]
    assert 0 < seen["usage"]["prompt_tokens_details"]["cached_tokens"] < seen["usage"]["prompt_tokens"]
    assert turns(client, "plain") == turns(client, "edited")


def test_a_window_that_is_read_anew_for_an_edit_is_not_called_cached(client: TestClient) -> None:
    """Turn 1 has no snapshot any more."""
    make(client, "anew", *[f"Turn {number}" for number in range(6)])
    usage = say(client, "anew", said("Other"), session_action="edit", session_turn=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_reply_that_was_cut_off_goes_on(client: TestClient) -> None:
    (begun,) = make(client, "cut", "Once upon a time")
    more = say(client, "cut", [], session_action="continue")
    ((_, whole),) = turns(client, "cut")
    assert whole == begun + more["choices"][0]["message"]["content"]
    assert more["usage"]["prompt_tokens"] == before_the_reply(client, "cut", more)


def test_a_turn_can_be_said_without_passages_and_with_them(client: TestClient) -> None:
    """Reference: the field ``recall``, whatever is done, in a session that recalls by itself."""
    make(client, "castle", "Thornwood castle", *["Tell me more"] * 9, "Thornwood castle?")
    last = turns(client, "castle")
    assert client.get(f"{SESSIONS}/castle/turns?after={len(last) - 1}").json()["data"][0]["recalled"]
    again: dict[str, Any] = {"session_action": "regenerate"}
    other: dict[str, Any] = {"session_action": "edit", "session_turn": len(last)}
    asked = said("Thornwood castle?")
    assert say(client, "castle", [], **again)["streamllm"]["recalled"]
    assert say(client, "castle", [], recall="off", **again)["streamllm"]["recalled"] == []
    assert say(client, "castle", asked, recall="auto", **other)["streamllm"]["recalled"]
    assert say(client, "castle", asked, recall="off", **other)["streamllm"]["recalled"] == []
    assert say(client, "castle", asked, **other)["streamllm"]["recalled"]


def test_what_cannot_be_said_anew_is_refused_and_changes_nothing(client: TestClient) -> None:
    make(client, "kept", "One day")
    before = turns(client, "kept")
    body = {"model": MODEL, "session_id": "kept", "max_tokens": 3}
    edit = {**body, "session_action": "edit"}
    assert "no turn 9" in refused(client.post(CHAT, json={**edit, "session_turn": 9, "messages": said("x")}), 400)
    assert "empty" in refused(client.post(CHAT, json={**edit, "session_turn": 1, "messages": said(" ")}), 400)
    again = {**body, "session_action": "regenerate", "messages": said("x")}
    assert "send []" in refused(client.post(CHAT, json=again), 400)
    assert turns(client, "kept") == before
    make(client, "fresh")
    nothing = {**body, "session_id": "fresh", "session_action": "regenerate", "messages": []}
    assert "no turn" in refused(client.post(CHAT, json=nothing), 400)
    assert "cut off" in refused(client.post(CHAT, json={**nothing, "session_action": "continue"}), 409)


# ---- forked and carried


def test_a_fork_goes_on_by_itself(client: TestClient) -> None:
    make(client, "source", "One day", "A dog ran")
    fork = client.post(f"{SESSIONS}/source/fork", json={"id": "branch", "turns": 1})
    assert (fork.status_code, fork.json()["turns"]) == (201, 1)
    say(client, "branch", said("A cat sat"))
    assert turns(client, "branch")[0] == turns(client, "source")[0]
    assert [user for user, _ in turns(client, "source")] == ["One day", "A dog ran"]
    whole = client.post(f"{SESSIONS}/source/fork", json={}).json()
    assert turns(client, whole["id"]) == turns(client, "source")
    assert "behind turn 3" in refused(client.post(f"{SESSIONS}/source/fork", json={"turns": 3}), 400)
    assert "already" in refused(client.post(f"{SESSIONS}/source/fork", json={"id": "branch"}), 409)
    refused(client.post(f"{SESSIONS}/source/fork", json={"turns": -1}), 400)
    refused(client.post(f"{SESSIONS}/nothing/fork", json={}), 404)


def test_a_session_is_carried_in_a_file_and_goes_on_there_as_here(client: TestClient) -> None:
    make(client, "here", "One day", "A dog ran", system="Be kind.")
    file = client.get(f"{SESSIONS}/here/export")
    assert (file.status_code, file.headers["content-type"]) == (200, "application/zip")
    assert file.headers["content-disposition"] == 'attachment; filename="here.zip"'
    carried = client.post(f"{IMPORT}?id=there", content=file.content, headers=ZIP)
    assert (carried.status_code, carried.json()["system"]) == (201, "Be kind.")
    assert turns(client, "there") == turns(client, "here")
    one, two = (say(client, name, said("And then"))["choices"][0]["message"] for name in ("here", "there"))
    assert one == two
    assert "already" in refused(client.post(f"{IMPORT}?id=there", content=file.content, headers=ZIP), 409)
    elsewhere = client.post(f"{IMPORT}?id=there", content=file.content, headers=ZIP | OTHER)
    assert elsewhere.status_code == 201


def member(**changed: bytes) -> bytes:
    """An exported session with other members."""
    members = {"session.json": json.dumps({"format": 1, "name": "x", "settings": {}}).encode(), "transcript.jsonl": b""}
    whole = members | {name.replace("_", "."): data for name, data in changed.items()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in whole.items():
            archive.writestr(name, data)
    return file.getvalue()


def test_a_file_that_unpacks_to_too_much_is_refused_and_leaves_nothing(
    client: TestClient, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bomb: a thousand times as large as its file."""
    monkeypatch.setattr(registry, "UNPACKED_BYTES", 2**20)
    before = served.service.conversations.stats()["on_disk"]
    message = refused(client.post(IMPORT, content=member(state_stream=bytes(2**21)), headers=ZIP), 422)
    assert message.startswith("The file unpacks to more than a session may have")
    assert served.service.conversations.stats()["on_disk"] == before


def test_a_file_that_is_no_session_is_refused_without_a_word_of_where_it_lay(client: TestClient) -> None:
    bad = [b"", b"nonsense", member(extra=b"x"), member(session_json=b"[]"), member(transcript_jsonl=b"{}\n")]
    for body in bad:
        assert "The file" in refused(client.post(IMPORT, content=body, headers=ZIP), 422)
    refused(client.post(f"{IMPORT}?id=../x", content=member(), headers=ZIP), 400)
    refused(client.post(IMPORT, content=member()), 415)


# ---- owners and the disk


def test_no_other_key_reaches_a_session_by_any_way(client: TestClient) -> None:
    """Reference: what is said of a session that is not there at all."""
    make(client, "secret", "One day")
    response = client.post("/v1/responses", json={"model": MODEL, "input": "Hi", "max_output_tokens": 3}).json()["id"]
    before = turns(client, "secret")
    behind = {"model": MODEL, "input": "x", "previous_response_id": response}
    body = {"model": MODEL, "session_id": "secret", "messages": said("x"), "max_tokens": 3}
    place = f"{SESSIONS}/secret"
    answers = [
        client.get(place, headers=OTHER),
        client.get(f"{place}/turns", headers=OTHER),
        client.get(f"{place}/export", headers=OTHER),
        client.get(f"{SESSIONS}?after=secret", headers=OTHER),
        client.patch(place, json={"title": "x"}, headers=OTHER),
        client.delete(place, headers=OTHER),
        client.post(f"{place}/fork", json={}, headers=OTHER),
        client.post(CHAT, json=body, headers=OTHER),
        client.post(CHAT, json={**body, "session_action": "regenerate", "messages": []}, headers=OTHER),
        client.get(f"/v1/responses/{response}", headers=OTHER),
        client.delete(f"/v1/responses/{response}", headers=OTHER),
        client.post("/v1/responses", json=behind, headers=OTHER),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert turns(client, "secret") == before
    assert client.get(f"/v1/responses/{response}").status_code == 200


def test_a_full_disk_is_the_servers_fault(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """507, which clients try again, and not 422, which says that the request was wrong."""
    make(client, "full", "One day")

    def fail(*_: Any, **__: Any) -> None:
        raise StateError("There is no room; make some.") from OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Transcript, "begin", fail)
        body = {"model": MODEL, "session_id": "full", "messages": said("x"), "max_tokens": 3}
        assert "no room" in refused(client.post(CHAT, json=body), 507)
    say(client, "full", said("x"))
