"""Histories that clients resend, brought into one form and recognised by their digests."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamllm.errors import InputError, StateError
from streamllm.server import recognition as module
from streamllm.server.history import History, Message, Role, canonical
from streamllm.server.recognition import Place, Recognition, beginning, digests, extended

SAID = [("Who are you?", "A bird."), ("Where?", "In a tree."), ("Why?", "I like it.")]


def messages(*said: tuple[Role, str]) -> list[Message]:
    return [Message(role, content) for role, content in said]


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def index(tmp_path: Path, notes: list[str]) -> Iterator[Recognition]:
    with closing(Recognition(tmp_path / "index.db", notes.append)) as index:
        yield index


def add(index: Recognition, name: str, turns: int = 0, *, is_named: bool = False, at: float = 1.0) -> list[bytes]:
    """A session with the first turns that were said; the digests of all of them."""
    chain = list(digests(beginning("local", "m", None), SAID))
    index.add(name, created=at, used=at, is_named=is_named)
    index.learn(name, [(turn, 10 * turn, chain[turn - 1]) for turn in range(1, turns + 1)])
    return chain


# ---- one form


def test_messages_are_brought_into_one_form() -> None:
    """Reference: by hand."""
    said = messages(
        ("system", "Be kind."),
        ("system", "Be short."),
        ("user", "Hello."),
        ("user", "Who are you?"),
        ("assistant", "A bird."),
        ("assistant", "I sing."),
        ("system", "It is late."),
        ("user", " Why? "),
    )
    assert canonical(said) == History(
        "Be kind.\n\nBe short.", (("Hello.\n\nWho are you?", "A bird.\n\nI sing."),), "It is late.\n\n Why? "
    )
    assert canonical(messages(("user", "Hello."))) == History(None, (), "Hello.")
    assert canonical(messages(("system", ""), ("user", "Hello."))).system == ""


def test_an_assistant_may_have_begun() -> None:
    """Reference: by hand; clients that greet do so."""
    found = canonical(messages(("assistant", "Welcome!"), ("user", "Hello.")))
    assert found == History(None, (("", "Welcome!"),), "Hello.")
    assert found.beginning == "Hello."


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([], "yours end with nothing"),
        ([("user", "Hello."), ("assistant", "Hi.")], "yours end with assistant"),
        ([("system", "Be kind.")], "yours end with system"),
        ([("user", "Hello."), ("assistant", "Hi."), ("user", " \n")], "The last message is empty"),
        ([("user", "Hello \ud800.")], "Message 1 holds half a character"),
    ],
)
def test_messages_that_nothing_can_be_said_to_are_refused(said: list[tuple[Role, str]], reason: str) -> None:
    """Reference: by hand."""
    with pytest.raises(InputError, match=reason):
        canonical(messages(*said))


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=5)), max_size=8))
def test_whatever_is_sent_has_a_form_or_is_refused(said: list[tuple[Role, str]]) -> None:
    """Reference: all texts that are not blank are in it, in order."""
    try:
        found = canonical(messages(*said))
    except InputError:
        return
    whole = "".join([found.system or "", *(text for turn in found.turns for text in turn), found.text])
    assert "".join(whole.split()) == "".join("".join(text for _, text in said).split())


# ---- digests


def test_a_digest_is_of_owner_model_instructions_and_all_that_was_said() -> None:
    """Reference: each of them changes it, and so does where a text ends; blanks at the ends do not."""
    first = beginning("local", "m", "Be kind.")
    others = [beginning("x", "m", "Be kind."), beginning("local", "n", "Be kind."), beginning("local", "m", None)]
    assert len({first, beginning("local", "m", ""), *others}) == 5
    assert beginning("local", "m", " Be kind.\n") == first
    said = extended(first, "Hello", "Hi")
    assert extended(first, " Hello\n", "Hi  ") == said
    turns = [("Hello", "hi"), ("HelloHi", ""), ("", "HelloHi"), ("Hell", "oHi"), ("Hi", "Hello")]
    assert len({said, *(extended(first, *turn) for turn in turns)}) == 6
    assert list(digests(first, [("Hello", "Hi"), ("a", "b")])) == [said, extended(said, "a", "b")]


# ---- the index


def test_the_longest_beginning_that_is_known_comes_first(index: Recognition) -> None:
    """Reference: by hand; sessions that are there come before those that went on, then the one used last."""
    chain = add(index, "old", 2)
    add(index, "new", 2, at=2.0)
    add(index, "gone-on", 3, at=3.0)
    found = list(index.known(chain))
    assert [length for length, _ in found] == [3, 2, 1]
    assert found[0][1] == [Place("gone-on", 3, 30, is_last=True)]
    assert [place.session for place in found[1][1]] == ["new", "old", "gone-on"]
    assert [place.is_last for place in found[1][1]] == [True, True, False]
    index.touch("old", turns=2)
    assert next(index.known(chain[:2]))[1][0].session == "old"
    assert list(index.known([os.urandom(16)])) == []
    assert list(index.known([])) == []


def test_ten_thousand_turns_are_found_wherever_they_branch_off(index: Recognition) -> None:
    """Reference: the place where another history leaves the one that is known."""
    said = [(f"say {number}", f"said {number}") for number in range(10_000)]
    chain = list(digests(beginning("local", "m", None), said))
    index.add("long", created=1, used=1, is_named=False)
    index.learn("long", [(turn, turn, digest) for turn, digest in enumerate(chain, 1)])
    for branch in (10_000, 9_999, 9_992, 9_991, 9_928, 9_927, 9_428, 9_427, 1):  # where lookups begin and end
        other = list(digests(chain[branch - 1], [("x", "y")] * (10_000 - branch)))
        assert next(index.known(chain[:branch] + other)) == (branch, [Place("long", branch, branch, branch == 10_000)])


def test_the_last_turn_is_looked_up_alone_and_first(index: Recognition, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the values of the queries; it is what a client that resends everything nearly always has."""
    chain = add(index, "work", 3)
    asked: list[tuple[Any, ...]] = []
    rows = index._rows

    def noted(query: str, *values: Any) -> list[Any]:
        asked.append(values)
        return rows(query, *values)

    monkeypatch.setattr(index, "_rows", noted)
    assert next(index.known(chain))[0] == 3
    assert asked[0] == (chain[-1],)


def test_turns_that_are_said_anew_replace_those_that_were_taken_back(index: Recognition) -> None:
    """Reference: by hand."""
    chain = add(index, "work", 3)
    other = extended(chain[0], "Where?", "Here.")
    index.learn("work", [(2, 40, other)])
    assert [length for length, _ in index.known(chain)] == [1]
    assert next(index.known([chain[0], other]))[1] == [Place("work", 2, 40, is_last=True)]
    assert (index.digest("work", 2, 40), index.digest("work", 2, 20), index.digest("work", 3, 30)) == (
        other,
        None,
        None,
    )
    index.unlearn("work")
    assert list(index.known(chain)) == []
    entry = index.entry("work")
    assert entry is not None
    assert entry.turns == 2


def test_what_leads_to_a_session_goes_with_it(index: Recognition) -> None:
    """Reference: the rows of the tables; a session that is made by the same name knows nothing of the first."""
    chain = add(index, "work", 3)
    add(index, "other", 1)
    index.copy("work", "copy", 2)  # there is none
    add(index, "copy")
    index.copy("work", "copy", 2)
    index.note_response("r1", "work", 3)
    index.note_response("r2", "copy", 2)
    index.forget("work")
    assert [place.session for _, places in index.known(chain) for place in places] == ["copy", "other", "copy"]
    assert (index.find_response("r1"), index.find_response("r2")) == (None, Place("copy", 2, 20, is_last=False))
    add(index, "copy")
    assert (index.find_response("r2"), index.count()) == (None, 2)
    with sqlite3.connect(index.path) as connection:
        assert connection.execute("SELECT count(*) FROM places").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM responses").fetchone() == (0,)
    connection.close()


def test_responses_are_remembered_within_a_bound(index: Recognition, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand; one whose turn was taken back is not known, and one that is dropped is not."""
    monkeypatch.setattr(module, "MOST_RESPONSES", 3)
    chain = add(index, "work", 3)
    for number in range(5):
        index.note_response(f"r{number}", "work", 1 + number % 3)
    assert [index.find_response(f"r{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert index.find_response("r2") == Place("work", 3, 30, is_last=True)
    index.learn("work", [(3, 50, chain[2])])
    assert index.find_response("r2") is None
    assert (index.drop_response("r3"), index.drop_response("r3"), index.find_response("r3")) == (True, False, None)
    index.note_response("../r'; --\0", "work", 3)
    assert index.find_response("../r'; --\0") == Place("work", 3, 50, is_last=True)
    index.note_response("nothing", "nowhere", 1)
    assert index.find_response("nothing") is None


def test_all_of_it_survives_a_restart(index: Recognition, notes: list[str]) -> None:
    """Reference: the index before."""
    chain = add(index, "work", 3, is_named=True)
    index.note_response("r1", "work", 3)
    index.touch("work", turns=3, window={"cached": 7})
    before = (list(index.known(chain)), index.find_response("r1"), index.entries())
    index.close()
    again = Recognition(index.path, notes.append)
    assert (list(again.known(chain)), again.find_response("r1"), again.entries()) == before
    again.close()
    assert notes == []
    assert index.path.stat().st_mode & 0o777 == 0o600


def test_sessions_are_listed_in_pages_and_the_oldest_unnamed_ones_are_known(index: Recognition) -> None:
    """Reference: by hand."""
    for number in range(5):
        add(index, f"s{number}", is_named=number == 0, at=float(number // 2))
    assert [entry.name for entry in index.entries()] == ["s4", "s3", "s2", "s1", "s0"]
    assert [entry.name for entry in index.entries(limit=2)] == ["s4", "s3"]
    assert [entry.name for entry in index.entries(after="s3", limit=2)] == ["s2", "s1"]
    assert index.entries(after="nothing") == []
    index.touch("s1", turns=0)
    assert index.unnamed() == ["s2", "s3", "s4", "s1"]


# ---- a file that is damaged


def damage(path: Path) -> None:
    """Random bytes in the place of all pages but the first."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = path.read_bytes()
    path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))


@pytest.mark.parametrize("content", [b"no database at all", b"SQLite format 3\0" + os.urandom(5000), None])
def test_a_damaged_file_is_set_aside(content: bytes | None, index: Recognition, notes: list[str]) -> None:
    """Reference: an empty index, the damaged file beside it, and a sentence."""
    chain = add(index, "work", 3)
    index.close()
    damage(index.path) if content is None else index.path.write_bytes(content)
    before = index.path.read_bytes()
    again = Recognition(index.path, notes.append)
    assert (list(again.known(chain)), again.entries(), again.generation) == ([], [], 1)
    assert index.path.with_name("index.db.set-aside").read_bytes() == before
    assert len(notes) == 1
    assert "histories that clients send are recognised from now on only" in notes[0]
    add(again, "work", 2)
    assert next(again.known(chain))[0] == 2
    again.close()


def test_damage_that_is_met_on_the_way_is_no_error(index: Recognition, notes: list[str]) -> None:
    """Reference: an index that goes on, empty."""
    for number in range(300):
        add(index, f"s{number}", 3)
    chain = add(index, "work", 3)
    damage(index.path)
    assert list(index.known(chain)) == []
    add(index, "work", 2)
    assert next(index.known(chain))[0] == 2
    assert (len(notes), index.generation) == (1, 1)


def test_a_file_that_cannot_be_reached_is_not_set_aside(tmp_path: Path, notes: list[str]) -> None:
    """Reference: the error; nobody can say that it is damaged."""
    with pytest.raises(StateError, match="Cannot make"):
        Recognition(tmp_path / "nowhere" / "index.db", notes.append)
    assert notes == []


def test_threads_may_share_it(index: Recognition) -> None:
    """Reference: what each of them has written is there."""
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                add(index, f"s{number}-{turn}", 2)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert index.count() == 80
