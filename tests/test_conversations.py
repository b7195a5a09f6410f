"""Conversations of a server: recognised by what is resent, opened by name, in memory and on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from chats import LAST_USER, talker
from streamllm.config import CacheConfig, SamplingConfig
from streamllm.engine import Engine
from streamllm.errors import BusyError, ConfigError, InputError, StateError, StreamLLMError, UnknownSessionError
from streamllm.server.continuation import Continuation
from streamllm.server.conversations import Conversations
from streamllm.server.history import Message
from streamllm.sessions import read_transcript
from streamllm.transcript import Transcript

GREEDY = SamplingConfig(temperature=0)
SYSTEM = "You tell short stories about animals."
WINDOW = 120
ASKED = ["Who lives in the red house?", "Tell me about a dog.", "What did the bird say?", "Where is the ball?"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


def make_engine(template: str | None = None, **options: Any) -> Engine:
    model, tokenizer = talker() if template is None else talker(template)
    return Engine(model, tokenizer, slots=4, config=CacheConfig(window=WINDOW), columns=2 * WINDOW, **options)


@pytest.fixture
def there(engine: Engine, tmp_path: Path) -> Iterator[Conversations]:
    with begin(engine, tmp_path) as there:
        yield there


def begin(engine: Engine, folder: Path, **options: Any) -> Conversations:
    return Conversations(engine, folder, **{"model_name": "m", "recall": "off", "resident": 8, **options})


def messages(texts: Sequence[str], system: str | None = SYSTEM) -> list[Message]:
    """The user and the assistant in turns."""
    leading = [] if system is None else [Message("system", system)]
    return leading + [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def answer(found: Continuation, text: str | None = None, most: int = 8) -> tuple[str, int]:
    """The reply, and how many tokens of the prompt there were and were not read before."""
    with found:
        reply = found.chat.send(found.text if text is None else text, max_tokens=most, sampling=GREEDY)
        said = reply.text()
        found.done(reply)
        assert found.cached_tokens + found.read_tokens + reply.record.tokens_read == (
            found.chat.transcript.tokens() - reply.generated + (reply.finish == "end")
        )
        return said, reply.record.tokens_read


class Client:
    """One that resends everything, and shows the other side's text as clients do: trimmed."""

    def __init__(self, there: Conversations, owner: str = "local", system: str | None = SYSTEM) -> None:
        self.there, self.owner, self.system = there, owner, system
        self.texts: list[str] = []
        self.found: Continuation | None = None
        self.read = 0

    def say(self, text: str, most: int = 8) -> str:
        (found,) = self.there.continue_messages(self.owner, messages([*self.texts, text], self.system))
        said, self.read = answer(found, most=most)
        self.found = found
        self.texts += [text, f" {said.strip()}\n"]
        return said

    @property
    def how(self) -> tuple[str, int]:
        """How the last request was gone on with, and what was read before its turn."""
        assert self.found is not None
        return self.found.how, self.found.read_tokens

    @property
    def session(self) -> str:
        assert self.found is not None
        return self.found.session_id


# ---- going on


def test_a_client_that_resends_everything_goes_on_far_beyond_the_window(there: Conversations) -> None:
    """Reference: one session, of which each turn is read once; the first turns have left long ago."""
    client = Client(there)
    client.say(ASKED[0])
    first = client.session
    assert client.how == ("new", 0)
    for number in range(1, 25):
        before = there.view("local", first).tokens
        client.say(f"{ASKED[number % 4]} ({number})")
        assert client.found is not None
        assert (client.session, client.how, client.found.cached_tokens) == (first, ("continued", 0), before)
        assert client.read < 60
    view = there.view("local", first)
    assert view.window is not None
    assert view.window["turns_evicted"] > 15
    assert (view.turns, len(there.list("local"))) == (25, 1)
    assert [turn.user for turn in there.turns("local", first, after=20)] == client.texts[40::2]
    assert there.stats()["continued"] == 24


def test_a_restart_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    """Reference: the same conversation without a restart, which reads the same and says the same."""
    said: list[list[str]] = []
    for is_restarted in (False, True):
        folder = tmp_path / str(is_restarted)
        there = begin(engine, folder)
        client = Client(there)
        for number in range(10):
            client.say(f"{ASKED[number % 4]} ({number})")
            assert client.how == ("continued" if number else "new", 0)
            if is_restarted and number in (3, 8):
                there.close()
                there = client.there = begin(engine, folder)
        assert len(there.list("local")) == 1
        there.close()
        said.append(client.texts)
    assert said[0] == said[1]


def test_an_edited_history_goes_on_behind_what_is_the_same(there: Conversations) -> None:
    """Reference: by hand. Where a snapshot is kept nothing is read anew; the first branch goes on as if nothing was."""
    client = Client(there)
    for text in ASKED:
        client.say(text)
    first = client.session
    other = Client(there)
    other.texts = client.texts[:6]  # the last turn, said otherwise: there is a snapshot
    other.say("Where is the cat?")
    assert other.how == ("forked", 0)
    early = Client(there)
    early.texts = client.texts[:2]  # no snapshot
    early.say("Where is the cow?")
    assert early.found is not None
    assert early.how == ("forked", there.turns("local", first)[0].turn and early.found.read_tokens)
    assert 0 < early.found.read_tokens < WINDOW
    assert early.found.cached_tokens == 0
    for each, texts in ((client, 5), (other, 5), (early, 3)):
        each.say("And then?")
        assert (each.how, there.view("local", each.session).turns) == (("continued", 0), texts)
    assert client.session == first
    assert len({client.session, other.session, early.session}) == 3
    assert [turn.user for turn in there.turns("local", early.session)] == [ASKED[0], "Where is the cow?", "And then?"]


def test_a_branch_with_more_than_one_turn_that_is_not_known_reads_these(there: Conversations) -> None:
    """Reference: by hand; the turns that were said elsewhere are known afterwards, too."""
    client = Client(there)
    client.say(ASKED[0])
    client.say(ASKED[1])
    first = client.session
    client.texts += ["Who said that?", "The dog did.", "Which dog?", "The red one."]
    client.say("Ah.")
    assert client.session == first
    assert client.found is not None
    assert client.found.how == "continued"
    assert 20 < client.found.read_tokens < 100
    other = Client(there)
    other.texts = client.texts[:6]
    other.say("No, which?")
    assert other.found is not None
    assert other.found.how == "forked"
    assert [turn.reply for turn in there.turns("local", other.session, after=2, limit=1)] == ["The dog did."]


def test_clients_with_the_same_beginning_do_not_disturb_one_another(there: Conversations) -> None:
    """Reference: one of them alone; what is said first, and the reply to it, are the same for all."""
    clients = [Client(there) for _ in range(3)]
    for client in clients:
        client.say(ASKED[0])
    assert len({tuple(client.texts) for client in clients}) == 1
    assert len({client.session for client in clients}) == 3
    for number in range(3):
        for name, client in enumerate(clients):
            client.say(f"I am {name}, say {number}.")
            assert client.how == ("continued", 0)
    assert len(there.list("local")) == 3
    for name, client in enumerate(clients):
        turns = there.turns("local", client.session)
        assert [turn.user for turn in turns] == [ASKED[0], *(f"I am {name}, say {number}." for number in range(3))]


def test_an_unknown_history_is_streamed_through_the_window(there: Conversations) -> None:
    """Reference: by hand; it is known from then on, and only the new turn is read."""
    client = Client(there)
    client.texts = [text for number in range(20) for text in (f"Say {number}.", f"It is {number}.")]
    client.say("And now?")
    how, read = client.how
    assert how == "streamed"
    assert read > 2 * WINDOW
    client.say("And then?")
    assert client.how == ("continued", 0)
    view = there.view("local", client.session)
    assert (view.turns, view.title, view.is_named) == (22, "Say 0.", False)
    assert [turn.reply for turn in there.turns("local", client.session, limit=2)] == ["It is 0.", "It is 1."]


@pytest.mark.slow
def test_ten_thousand_messages_are_one_conversation(tmp_path: Path) -> None:
    """Reference: by hand, and the memory of the process, which a history of ten times the length does not change."""
    model, tokenizer = talker()
    config = CacheConfig(window=250, block=200)
    with Engine(model, tokenizer, slots=2, config=config, columns=500) as engine, begin(engine, tmp_path) as there:
        peaks = []
        for turns in (500, 5_000):
            client = Client(there)
            client.texts = [text for number in range(turns) for text in (f"{turns}: {number}.", f"It is {number}.")]
            client.say(f"And now, after {turns}?")
            assert client.how[0] == "streamed"
            client.say("And then?")
            assert client.how == ("continued", 0)
            assert there.view("local", client.session).turns == turns + 2
            peaks.append(peak_bytes())
        assert peaks[1] - peaks[0] < 50e6


def peak_bytes() -> int:
    """The most memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_several_replies_to_one_message_are_conversations_of_their_own(there: Conversations) -> None:
    """Reference: by hand; each can be gone on with, whichever the client chose."""
    client = Client(there)
    for texts, how in (([], "new"), (["Hi.", "Who are you?"], "streamed")):
        found = there.continue_messages("local", messages([*texts, "Hello."]), copies=3)
        assert {each.how for each in found} == {how}
        replies = []
        for each in found:
            with each:
                reply = each.chat.send(each.text, max_tokens=12, sampling=SamplingConfig(temperature=1.5))
                replies.append(reply.text())
                each.done(reply)
        assert len({each.session_id for each in found}) == 3
        assert len(set(replies)) == 3
        for each, reply in zip(found, replies, strict=True):
            client.texts = [*texts, "Hello.", reply]
            client.say("Go on.")
            assert (client.session, client.how) == (each.session_id, ("continued", 0))
    with_more = there.continue_messages("local", messages([*client.texts, "More."]), copies=2)
    assert [each.how for each in with_more] == ["forked", "forked"]
    assert client.session not in {each.session_id for each in with_more}
    assert all(each.cached_tokens > 0 and each.read_tokens == 0 for each in with_more)
    for each in with_more:
        each.release()
    client.say("Not more.")
    assert client.how == ("continued", 0)


def test_a_template_that_is_not_read_turn_by_turn_works_as_well(tmp_path: Path) -> None:
    """Reference: by hand; nothing is cached then, and that is what is said."""
    with make_engine(LAST_USER) as engine, begin(engine, tmp_path) as there:
        client = Client(there)
        for number, text in enumerate(ASKED):
            (found,) = there.continue_messages("local", messages([*client.texts, text]))
            with found:
                reply = found.chat.send(text, max_tokens=6, sampling=GREEDY)
                client.texts += [text, reply.text()]
                found.done(reply)
                assert (found.cached_tokens, found.read_tokens) == (0, 0)
            assert found.how == ("continued" if number else "new")


def test_a_message_that_got_no_reply_can_be_sent_again(there: Conversations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a conversation in which it was sent once; an engine that is full refuses it first."""
    client = Client(there)
    client.say(ASKED[0])
    (found,) = there.continue_messages("local", messages([*client.texts, ASKED[1]]))

    def refuse(*_: object, **__: object) -> None:
        raise BusyError("The queue is full.")

    with monkeypatch.context() as patch:
        patch.setattr(found.chat._engine, "submit", refuse)
        with pytest.raises(BusyError, match="full"), found:
            found.chat.send(found.text, max_tokens=4).text()
        (new,) = there.continue_messages("local", messages(["Hello."]))
        patch.setattr(new.chat._engine, "submit", refuse)
        with pytest.raises(BusyError, match="full"), new:
            new.chat.send(new.text, max_tokens=4).text()
    client.say(ASKED[1])
    assert client.how == ("continued", 0)
    assert [turn.user for turn in there.turns("local", client.session)] == ASKED[:2]
    assert [view.id for view in there.list("local")] == [client.session]  # of the other one nothing has come


def test_a_reply_that_was_broken_off_is_known_by_what_came(there: Conversations) -> None:
    """Reference: the transcript."""
    client = Client(there)
    (found,) = there.continue_messages("local", messages([ASKED[0]]))
    with found:
        reply = found.chat.send(found.text, max_tokens=200, sampling=GREEDY, on_end="ban")
        for _ in range(5):
            next(reply)
        found.done(reply)
    (turn,) = there.turns("local", found.session_id)
    assert turn.finish == "interrupted"
    client.texts = [ASKED[0], turn.reply]
    client.say("Go on.")
    assert (client.session, client.how) == (found.session_id, ("continued", 0))


# ---- who has it


def test_a_session_that_is_in_use_is_waited_for_a_little(there: Conversations) -> None:
    """Reference: the second is refused after a moment, and served if the first lets go within it."""
    there.create("local", "work")
    first = there.open("local", "work")
    began = time.monotonic()
    with pytest.raises(BusyError, match="Session 'work' is in use"):
        there.open("local", "work")
    assert 0.5 < time.monotonic() - began < 5
    timer = threading.Timer(0.3, first.release)
    timer.start()
    there.open("local", "work").release()
    timer.join()


def test_a_history_whose_session_is_in_use_goes_on_in_a_copy(there: Conversations) -> None:
    """Reference: by hand; the reply that goes on is not disturbed, and the copy ends before it."""
    client = Client(there)
    client.say(ASKED[0])
    (found,) = there.continue_messages("local", messages([*client.texts, ASKED[1]]))
    with found:
        reply = found.chat.send(found.text, max_tokens=12, sampling=GREEDY, on_end="ban")
        next(reply)
        other = Client(there)
        other.texts = list(client.texts)
        other.say(ASKED[2])
        assert other.found is not None
        assert (other.found.how, other.session != client.session) == ("forked", True)
        assert other.found.chat.notes == []
        view = there.view("local", found.session_id)
        assert (view.is_busy, view.is_resident, view.turns) == (True, True, 2)
        assert there.turns("local", found.session_id)[-1].finish is None
        reply.text()
        assert reply.generated == 12
        found.done(reply)
    assert [turn.user for turn in there.turns("local", other.session)] == [ASKED[0], ASKED[2]]


def test_many_threads_say_many_things(there: Conversations) -> None:
    """Reference: each client's own session has what it said, and nothing else."""
    failed: list[BaseException] = []
    clients = [Client(there) for _ in range(6)]

    def work(name: int) -> None:
        try:
            for number in range(4):
                clients[name].say(f"I am {name}, say {number}.", most=4)
                assert clients[name].how == ("continued" if number else "new", 0)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for name, client in enumerate(clients):
        turns = there.turns("local", client.session)
        assert [turn.user for turn in turns] == [f"I am {name}, say {number}." for number in range(4)]
    assert there.stats()["busy"] == 0


def test_one_history_from_many_threads_at_once_is_served_to_all(there: Conversations) -> None:
    """Reference: one goes on in the session itself, the others in copies of it."""
    client = Client(there)
    client.say(ASKED[0])
    hows: list[str] = []
    held: list[Continuation] = []

    def work() -> None:
        (found,) = there.continue_messages("local", messages([*client.texts, ASKED[1]]))
        hows.append(found.how)
        held.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in held:
        answer(found, most=3)
    assert sorted(hows) == ["continued", "forked", "forked", "forked"]


# ---- owners and names


def test_nobody_sees_what_another_owner_has(there: Conversations) -> None:
    """Reference: the errors of sessions that are not there; the same history is another conversation."""
    mine, yours = Client(there, "mine"), Client(there, "yours")
    mine.say(ASKED[0])
    there.note_response("mine", "r1", mine.session, 1)
    yours.texts = list(mine.texts)
    yours.say(ASKED[1])
    assert yours.how[0] == "streamed"
    assert yours.session != mine.session
    assert [view.id for view in there.list("yours")] == [yours.session]
    assert there.find_response("mine", "r1") == (mine.session, 1)
    assert there.find_response("yours", "r1") is None
    name = mine.session
    for refused in (
        lambda: there.open("yours", name),
        lambda: there.view("yours", name),
        lambda: there.turns("yours", name),
        lambda: there.delete("yours", name),
        lambda: there.rename("yours", name, "mine"),
        lambda: there.fork("yours", name),
        lambda: there.set_system("yours", name, "x"),
        lambda: there.continue_turn("yours", name, 1),
        lambda: there.list("yours", after=name),
    ):
        with pytest.raises(UnknownSessionError, match=f"There is no session '{name}'"):
            refused()
    for path in (f"../mine/{name}", f"..\\mine\\{name}", f"./{name}"):
        with pytest.raises(ConfigError, match="A session cannot be called"):
            there.open("yours", path)


@pytest.mark.parametrize(
    "name", ["", "../x", "..", ".", "/etc/passwd", "a/b", "x" * 65, "a\0b", "ärger", "x\n", "-x", ".recognition.db"]
)
def test_a_name_that_cannot_be_is_refused_everywhere(name: str, there: Conversations, tmp_path: Path) -> None:
    """Reference: one sentence, and nothing that was made, here or elsewhere."""
    there.create("local", "work")
    before = sorted(tmp_path.rglob("*"))
    for refused in (
        lambda: there.open("local", name),
        lambda: there.create("local", name),
        lambda: there.view("local", name),
        lambda: there.turns("local", name),
        lambda: there.delete("local", name),
        lambda: there.rename("local", name, "x"),
        lambda: there.set_system("local", name, "x"),
        lambda: there.fork("local", name),
        lambda: there.fork("local", "work", name),
        lambda: there.export("local", name, tmp_path / "x.zip"),
        lambda: there.continue_turn("local", name, 1),
    ):
        with pytest.raises(ConfigError, match="A session cannot be called") as caught:
            refused()
        assert caught.value.http_status == 400
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError):
        there.list(name or "..")


# ---- sessions


def test_a_session_is_made_used_renamed_forked_and_deleted(there: Conversations) -> None:
    """Reference: by hand."""
    view = there.create("local", "work", system="Be kind.", title=" My\n work ")
    assert (view.id, view.title, view.turns, view.system, view.model) == ("work", "My work", 0, "Be kind.", "m")
    assert (view.is_named, view.is_resident, view.is_busy) == (True, True, False)
    with pytest.raises(ConfigError, match="There is a session 'work' already"):
        there.create("local", "work")
    for text in ASKED[:3]:
        found = there.open("local", "work")
        answer(found, text)
        assert (found.how, found.read_tokens) == ("continued", 0)
    there.rename("local", "work", "<b>Work</b>")
    assert there.view("local", "work").title == "<b>Work</b>"
    fork = there.fork("local", "work", "copy", turns=2)
    assert (fork.id, fork.turns, fork.is_named, fork.title) == ("copy", 2, True, "<b>Work</b>")
    assert there.fork("local", "work").turns == 3
    with pytest.raises(ConfigError, match="Cannot fork behind turn 4: session 'work' has 3"):
        there.fork("local", "work", turns=4)
    with pytest.raises(ConfigError, match="already"):
        there.fork("local", "work", "copy")
    assert [view.id for view in there.list("local", limit=2)][1] == "copy"
    assert [view.id for view in there.list("local", after="copy")] == ["work"]
    there.delete("local", "work")
    with pytest.raises(UnknownSessionError):
        there.view("local", "work")
    assert there.create("local", "work").turns == 0


@pytest.mark.parametrize("title", ["", "  ", "x" * 201, "a\0b", "a\x1b[2J", "\ud800"])
def test_a_title_is_a_line_of_text(title: str, there: Conversations) -> None:
    """Reference: by hand; what is refused makes nothing."""
    with pytest.raises(InputError, match="cannot have the title"):
        there.create("local", title=title)
    assert there.list("local") == []


def test_a_session_by_name_is_recognised_by_its_messages_too(there: Conversations) -> None:
    """Reference: by hand; and a turn that is said anew is known by its new words only."""
    there.create("local", "work", system=SYSTEM)
    said = [answer(there.open("local", "work"), text)[0] for text in ASKED[:2]]
    client = Client(there)
    client.texts = [ASKED[0], said[0], ASKED[1], said[1]]
    client.say(ASKED[2])
    assert (client.session, client.how) == ("work", ("continued", 0))
    with there.open("local", "work") as found:
        reply = found.chat.edit(2, "Tell me about a cat.", max_tokens=8, sampling=GREEDY)
        new = reply.text()
        found.done(reply)
    client.texts = client.texts[:4]
    client.say("Go on.")
    assert client.session != "work"
    client.texts = [ASKED[0], said[0], "Tell me about a cat.", new]
    client.say("Go on.")
    assert (client.session, client.how) == ("work", ("continued", 0))


def test_other_instructions_lead_elsewhere(there: Conversations) -> None:
    """Reference: by hand."""
    client = Client(there)
    client.say(ASKED[0])
    first = client.session
    there.set_system("local", first, "Be brief.")
    assert there.view("local", first).system == "Be brief."
    old, client.system = list(client.texts), "Be brief."
    client.say(ASKED[1])
    assert (client.session, client.how) == (first, ("continued", 0))
    client.texts, client.system = old, SYSTEM
    client.say(ASKED[1])
    assert client.how[0] == "streamed"


def test_a_response_is_gone_on_with_by_its_name(there: Conversations) -> None:
    """Reference: by hand; behind an earlier one a copy goes on."""
    there.create("local", "work")
    found = there.open("local", "work")
    for number in range(3):
        answer(found, ASKED[number])
        there.note_response("local", f"r{number}", "work", number + 1)
        place = there.find_response("local", f"r{number}")
        assert place == ("work", number + 1)
        (found,) = there.continue_turn("local", *place)
        assert (found.how, found.session_id) == ("continued", "work")
    found.release()
    (early,) = there.continue_turn("local", "work", 1)
    assert (early.how, early.session_id != "work", early.chat.turns) == ("forked", True, 1)
    early.release()
    with pytest.raises(ConfigError, match="There is no turn 9"):
        there.continue_turn("local", "work", 9)
    assert there.drop_response("local", "r1")
    assert there.find_response("local", "r1") is None


def test_a_session_that_answers_can_be_looked_at_and_renamed(there: Conversations, tmp_path: Path) -> None:
    """Reference: by hand; the reply goes on as fast as it is taken, in another thread."""
    client = Client(there)
    client.say(ASKED[0])
    (found,) = there.continue_messages("local", messages([*client.texts, ASKED[1]]))
    reply = found.chat.send(found.text, max_tokens=5000, sampling=GREEDY, on_end="ban")
    next(reply)
    thread = threading.Thread(target=reply.text)
    thread.start()
    seen = []
    for number in range(5):
        there.rename("local", found.session_id, f"Title {number}")
        view = there.view("local", found.session_id)
        assert view.window is not None
        assert (view.title, view.is_busy) == (f"Title {number}", True)
        seen.append((view.tokens, view.window["seen"], len(there.turns("local", found.session_id)[1].reply)))
    assert seen == sorted(seen)
    assert thread.is_alive()
    reply.close()
    thread.join()
    found.release()
    assert there.view("local", found.session_id).title == "Title 4"
    with closing(read_transcript(found.session_id, tmp_path / "local")) as transcript:
        assert transcript.get("title") == "Title 4"


def test_a_session_that_is_in_use_is_not_deleted(there: Conversations) -> None:
    """Reference: the session, after it."""
    there.create("local", "work")
    with there.open("local", "work"):
        for refused in (lambda: there.delete("local", "work"), lambda: there.set_system("local", "work", "x")):
            with pytest.raises(BusyError, match="in use"):
                refused()
        there.rename("local", "work", "Renamed")
    assert there.view("local", "work").title == "Renamed"
    there.delete("local", "work")


def test_a_session_is_carried_in_one_file(there: Conversations, tmp_path: Path) -> None:
    """Reference: what was exported; it is recognised under the other owner, and goes on without reading."""
    client = Client(there)
    for text in ASKED:
        client.say(text)
    there.rename("local", client.session, "My talk")
    there.export("local", client.session, tmp_path / "a.zip")
    view = there.import_("other", tmp_path / "a.zip")
    assert (view.title, view.turns, view.is_named, view.is_resident) == ("My talk", 4, True, False)
    again = there.import_("local", tmp_path / "a.zip", "again")
    assert again.id == "again"
    other = Client(there, "other")
    other.texts = list(client.texts)
    other.say("And then?")
    assert (other.session, other.how) == (view.id, ("continued", 0))
    (tmp_path / "b.zip").write_bytes(b"no zip")
    for name in (None, "again", "new"):
        with pytest.raises((StateError, ConfigError), match=r"damaged or no exported session|already"):
            there.import_("local", tmp_path / "b.zip", name)
    assert sorted(view.id for view in there.list("local")) == sorted(["again", client.session])


def test_a_file_whose_instructions_do_not_fit_is_refused(there: Conversations, tmp_path: Path) -> None:
    """Reference: the error; there is no session afterwards, and a file whose instructions fit comes in."""
    client = Client(there)
    client.say("Hello")
    there.export("local", client.session, tmp_path / "a.zip")
    for system in ("word " * 60, "word " * 4000, "Be kind."):
        with zipfile.ZipFile(tmp_path / "a.zip") as old, zipfile.ZipFile(tmp_path / "b.zip", "w") as new:
            header = json.loads(old.read("session.json"))
            header["settings"]["system"] = system
            new.writestr("session.json", json.dumps(header))
            new.writestr("transcript.jsonl", old.read("transcript.jsonl"))
        if system == "Be kind.":
            assert there.import_("other", tmp_path / "b.zip").system == system
        else:
            with pytest.raises(ConfigError, match=r"instructions take|system prompt has"):
                there.import_("other", tmp_path / "b.zip")
            assert not list(there.list("other"))


# ---- memory and disk


def test_chats_beyond_the_bound_go_to_disk_and_come_back(engine: Engine, tmp_path: Path) -> None:
    """Reference: clients that never had to share; the least recently used goes."""
    said = []
    for resident in (2, 8):
        with begin(engine, tmp_path / str(resident), resident=resident) as there:
            clients = [Client(there) for _ in range(4)]
            for number in range(3):
                for name, client in enumerate(clients):
                    client.say(f"I am {name}, say {number}.")
                    assert client.how == ("continued" if number else "new", 0)
                    assert there.stats()["resident"] <= resident
            stats = there.stats()
            assert (stats["resident"], stats["on_disk"]) == (min(4, resident), max(0, 4 - resident))
            said.append([client.texts for client in clients])
            with begin(engine, tmp_path / f"busy-{resident}", resident=2) as busy:
                held = [busy.continue_messages("local", messages([f"I am {name}"]))[0] for name in range(2)]
                with pytest.raises(BusyError, match="2 conversations are in use at the same time"):
                    busy.continue_messages("local", messages(["I am 2"]))
                assert len(busy.list("local")) == 2
                for found in held:
                    found.release()
    assert said[0] == said[1]


def test_idle_chats_go_to_disk_when_they_are_swept(engine: Engine, tmp_path: Path) -> None:
    """Reference: by hand; one that is in use stays, and one that comes back reads nothing."""
    with begin(engine, tmp_path, idle=100) as there:
        client, other = Client(there), Client(there, system=None)
        client.say(ASKED[0])
        (held,) = there.continue_messages("local", messages([ASKED[1]]))
        assert there.sweep() == 0
        other.say(ASKED[2])
        for key, berth in there._rooms.pool._berths.items():
            berth.used -= 200 if key[1] in (client.session, held.session_id) else 0
        assert there.sweep() == 1
        assert there.stats()["resident"] == 2
        view = there.view("local", client.session)
        assert (view.is_resident, view.window is not None) == (False, True)
        client.say(ASKED[1])
        assert client.how == ("continued", 0)
        held.release()


def test_the_bound_is_derived_from_memory(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand: a quarter of what is free, for caches with their snapshots."""
    for free, snapshots, most in ((100 * engine.bytes_per_stream, 4, 5), (0, 0, 2), (2**50, 0, 128), (None, 0, 128)):
        monkeypatch.setattr("streamllm.server.rooms.free_bytes", lambda _, free=free: free)
        with begin(engine, tmp_path, resident=None, snapshots=snapshots) as there:
            assert there._rooms.pool.most == most
    with pytest.raises(ConfigError, match="resident must be a whole number of at least 2"):
        begin(engine, tmp_path, resident=1)


def test_unnamed_sessions_are_deleted_when_there_are_too_many(engine: Engine, tmp_path: Path) -> None:
    """Reference: by hand; those in use and those with names stay, and if there are no others, that is said."""
    with begin(engine, tmp_path, most=3) as there:
        there.create("local", "work")
        first, second, third = Client(there), Client(there), Client(there)
        first.say("I am 1.")
        second.say("I am 2.")
        first.say("I am still 1.")
        third.say("I am 3.")
        assert {view.id for view in there.list("local")} == {"work", first.session, third.session}
        assert there.stats()["deleted"] == 1
        second.say("And I?")  # as if nothing had happened, but for the reading
        assert second.how[0] == "streamed"
        there.delete("local", second.session)
        held = [there.continue_messages("local", messages([f"I am {name}."]))[0] for name in (5, 6)]
        with pytest.raises(BusyError, match="3 sessions are kept already"):
            there.create("local", "more")
        with pytest.raises(BusyError, match="3 sessions are kept already"):
            there.continue_messages("local", messages(["I am 7."]))
        for found in held:
            found.release()
        there.create("local", "more")


def test_a_session_of_another_window_is_read_anew(engine: Engine, tmp_path: Path) -> None:
    """Reference: by hand; a server that was started with a smaller window goes on with all sessions."""
    model, tokenizer = talker()
    with (
        Engine(model, tokenizer, slots=2, config=CacheConfig(window=200), columns=400) as large,
        begin(large, tmp_path) as there,
    ):
        client = Client(there)
        for text in ASKED:
            client.say(text)
    with begin(engine, tmp_path) as there:
        client.there = there
        client.say("And then?")
        assert client.found is not None
        assert client.found.how == "continued"
        assert 0 < client.found.read_tokens <= WINDOW
        assert client.found.chat.cache.config.window == WINDOW


def test_the_folder_of_streams_that_wait_is_nobodys(engine: Engine, tmp_path: Path) -> None:
    """Reference: a folder that is an owner's."""
    for name in (".swap", "local"):
        (tmp_path / name).mkdir()
    with begin(engine, tmp_path) as there:
        assert list(there._rooms._shelves) == ["local"]


def test_instructions_that_do_not_fit_are_refused_and_nothing_is_made(there: Conversations) -> None:
    """Reference: the error; there is no session afterwards."""
    for length in (60, 4000):
        with pytest.raises(ConfigError, match=r"instructions take|system prompt has"):
            there.continue_messages("local", messages(["Hello."], "Be kind. " * length))
    with pytest.raises(ConfigError, match="recall must be auto or off"):
        there.create("local", recall="often")  # type: ignore[arg-type]
    assert there.list("local") == []
    assert there.stats()["resident"] == 0


# ---- faults


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_conversations import GREEDY, begin, make_engine, messages

with make_engine() as engine:
    there = begin(engine, Path(sys.argv[1]))
    (found,) = there.continue_messages("local", messages(["Tell me about a dog.", "It is red.", "And then?"]))
    print(found.session_id, flush=True)
    for chunk in found.chat.send(found.text, max_tokens=4000, sampling=GREEDY, on_end="ban"):
        print(chunk.id, flush=True)
"""


def test_kill_loses_at_most_the_token_in_flight(engine: Engine, tmp_path: Path) -> None:
    """Reference: the tokens that a process had shown when it was killed by kill -9."""
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        shown = [int(process.stdout.readline()) for _ in range(40)]
        process.send_signal(signal.SIGKILL)
        shown += [int(line) for line in process.stdout if line.endswith("\n")]
        assert process.wait() == -signal.SIGKILL
    with begin(engine, tmp_path) as there:
        (view,) = there.list("local")
        assert (view.id, view.turns) == (name, 2)
        assert there.turns("local", name)[1].finish is None
        with there.open("local", name) as found:
            kept = found.chat.transcript.reply_ids(2)
            assert kept[: len(shown)] == shown
            assert len(kept) - len(shown) <= 300  # what came between the last line that was read and the kill
            assert found.chat.can_resume
            reply = found.chat.resume(max_tokens=4)
            reply.text()
            found.done(reply)
        client = Client(there)
        client.texts = [text for turn in there.turns("local", name) for text in (turn.user, turn.reply)]
        client.say("Go on.")
        assert (client.session, client.how) == (name, ("continued", 0))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own; a test that may not mount is skipped."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a tiny disk")
def test_a_full_disk_is_one_clear_error_and_loses_nothing(engine: Engine, tmp_path: Path) -> None:
    """Reference: a file system without a free byte, and the same when there is room again."""
    with small_disk(tmp_path / "disk", "16m"), begin(engine, tmp_path / "disk") as there:
        client = Client(there)
        client.say(ASKED[0])
        filler = tmp_path / "disk" / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(StateError, match=r"disk|No space left"):
            there.create("local", "work")
        with pytest.raises(StreamLLMError, match=r"disk|No space left"):  # when the logs that are there are full
            all(client.say(f"Say {number}.") is not None for number in range(200))
        before = list(client.texts)
        assert there.sweep() == 0
        filler.unlink()
        client.say("Is there room?")
        assert client.found is not None
        assert client.texts[: len(before)] == before
        turns = there.turns("local", client.session)
        assert [text.strip() for turn in turns for text in (turn.user, turn.reply)] == [
            text.strip() for text in client.texts
        ]
        assert [view.id for view in there.list("local") if view.id == "work"] == []
        assert there.create("local", "work").turns == 0


def test_a_full_disk_keeps_a_chat_in_memory(there: Conversations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a chat that cannot be written, simulated; it is not closed, for what it holds would be lost."""
    client = Client(there)
    client.say(ASKED[0])
    there.idle = 0

    def full(*_: object) -> None:
        raise StateError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(Transcript, "put", full)
        assert there.sweep() == 0
    assert there.stats()["resident"] == 1
    assert there.notes.pop() == f"Session {client.session!r} stays in memory: The disk is full."
    assert there.sweep() == 1


def test_a_damaged_index_only_forgets(engine: Engine, tmp_path: Path) -> None:
    """Reference: the sessions, which are all there; an old history is streamed anew, and known from then on."""
    with begin(engine, tmp_path) as there:
        client = Client(there)
        client.say(ASKED[0])
        there.create("local", "work", title="Work")
    first = client.session
    (tmp_path / "local" / ".recognition.db").write_bytes(b"nothing of ours" * 1000)
    with begin(engine, tmp_path) as there:
        assert {view.id: (view.is_named, view.turns) for view in there.list("local")} == {
            first: (False, 1),
            "work": (True, 0),
        }
        assert "recognised from now on only" in there.notes[0]
        client.there = there
        client.say(ASKED[1])
        assert client.how[0] == "streamed"
        assert client.session != first
        client.say(ASKED[2])
        assert client.how == ("continued", 0)
        answer(there.open("local", first), "Hello again.")
        with closing(read_transcript(first, tmp_path / "local")) as transcript:
            said = [text for row in transcript.turns() for text in (row.user, row.reply)]
        client.texts = said
        client.say("And?")
        assert (client.session, client.how) == (first, ("continued", 0))


def test_a_damaged_session_does_not_stand_in_the_way(engine: Engine, tmp_path: Path) -> None:
    """Reference: by hand; its history is streamed into a new one, and the list says what is wrong."""
    with begin(engine, tmp_path) as there:
        client = Client(there)
        client.say(ASKED[0])
    first = client.session
    (tmp_path / "local" / first / "transcript.db").write_bytes(b"nothing of ours" * 1000)
    with begin(engine, tmp_path) as there:
        client.there = there
        client.say(ASKED[1])
        assert (client.how[0], client.session != first) == ("streamed", True)
        assert any(first in note for note in there.notes)
        damaged = there.view("local", first)
        assert damaged.damage is not None
        with pytest.raises(StateError, match="damaged"):
            there.open("local", first)
        there.delete("local", first)
        assert [view.id for view in there.list("local")] == [client.session]
