"""Conversations: what is read, what stays, what can be taken back, and what a kill leaves."""

from __future__ import annotations

import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from chats import CHATML, LAST_USER, talker
from stories import STORIES
from streamllm.archive import export_session, import_session
from streamllm.cache import SinkCache
from streamllm.config import SamplingConfig
from streamllm.errors import BusyError, CacheError, ConfigError, InputError, StateError
from streamllm.models import load
from streamllm.sampling import Sampler
from streamllm.session import Chat
from streamllm.sessions import Session

GREEDY = SamplingConfig(temperature=0)
VARIED = SamplingConfig(seed=7, presence_penalty=0.6, frequency_penalty=0.8)
SYSTEM = "You tell short stories about animals and you are always kind."
SAID = [
    "Who lives in the red house?",
    "Tell me about a dog.",
    "What did the bird say to Lily?",
    "Where is the ball?",
    "And then?",
    "Why was Tom sad?",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMLLM_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def make(template: str | None = CHATML, **options: object) -> Chat:
    model, tokenizer = talker(template)
    settings: dict[str, object] = {"sampling": GREEDY, "recall": "off", "max_tokens": 24, **options}
    return Chat(model, tokenizer, **settings)  # type: ignore[arg-type]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[int]]:
    """All ids that the model reads, in order, each time that it reads them."""
    read: list[int] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: read.extend(args[0].flatten().tolist()))
    try:
        yield read
    finally:
        hook.remove()


def talk(chat: Chat, turns: int, first: int = 0) -> list[str]:
    return [chat.send(SAID[(first + n) % len(SAID)]).text() for n in range(turns)]


# ---- what is read


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_every_token_is_read_once_and_they_are_those_of_the_template(system: str | None) -> None:
    """Reference: the template over the whole conversation at once."""
    with make(system=system, window=120) as chat, watched(chat.model) as read:
        replies = talk(chat, 8)
        assert sum(row.finish == "end" for row in chat.history()) >= 3
        assert chat.tokens_evicted > 50
        messages = []
        for said, reply in zip(SAID + SAID, replies, strict=False):
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        messages.append({"role": "user", "content": "Bye"})
        chat.send("Bye", max_tokens=1).text()
        want = chat.tokenizer.apply_chat_template(
            ([{"role": "system", "content": system}] if system else []) + messages, add_generation_prompt=True
        )["input_ids"]
        assert read == want
        assert chat.tokens_seen == len(want)


def test_plain_texts_are_joined_as_they_are() -> None:
    """Reference: the tokenizer over each text; an end token stays, and a line end stands in where there is none."""
    with make(None, max_tokens=6) as chat, watched(chat.model) as read:
        assert chat.is_plain
        assert len(chat.notes) == 1
        first = chat.send("Once upon a time").text()
        chat.send("The end of it", max_tokens=1).text()
        encode = chat.tokenizer
        want = encode("Once upon a time")["input_ids"] + encode(first, add_special_tokens=False)["input_ids"]
        for text in ("\n", "The end of it"):
            want += encode(text, add_special_tokens=False)["input_ids"]
        assert read == want


def test_the_system_prompt_never_leaves() -> None:
    """Reference: a plain cache over the head and what is kept, dense."""
    with make(system=SYSTEM, window=100) as chat:
        talk(chat, 12)
        head = chat.template.head
        assert SYSTEM in chat.tokenizer.decode(head)
        assert chat.cache.rows[0].pinned >= len(head)
        assert chat.record is not None
        assert chat.record.turns_evicted > 3
        assert chat.cache.tokens_cached <= chat.cache.capacity


def test_turns_leave_whole() -> None:
    with make(system=SYSTEM, window=150) as chat, watched(chat.model) as read:
        for turn in range(15):
            chat.send(SAID[turn % len(SAID)]).text()
            if chat.tokens_evicted:
                kept = chat.cache.tokens_cached - chat.cache.rows[0].pinned
                window = read[len(read) - kept :]
                assert chat.tokenizer.decode(window).startswith("<|im_start|>user\n")
        assert chat.turns_evicted > 5


def test_a_turn_longer_than_the_window_streams_through() -> None:
    with make(system=SYSTEM, window=64, block=16) as chat:
        talk(chat, 2)
        reply = chat.send("The cat sat on the mat. " * 60)
        assert reply.text()
        assert chat.cache.tokens_cached <= chat.cache.capacity
        assert reply.record.turns_evicted == 2
        assert reply.record.evicted_now is not None
        assert talk(chat, 1)


# ---- what a reply says


def test_records_add_up() -> None:
    with make(window=90) as chat:
        left = 0
        for number in range(1, 12):
            before = chat.turns_evicted
            reply = chat.send(SAID[number % len(SAID)])
            reply.text()
            record = reply.record
            left += record.tokens_evicted_now
            assert record.turn == number
            assert record.tokens_seen == record.tokens_cached + record.tokens_evicted
            assert record.tokens_evicted == left
            assert 0 < record.occupancy <= 1
            assert (record.evicted_now is None) == (chat.turns_evicted == before)
            if record.evicted_now is not None:
                assert record.evicted_now == (before + 1, chat.turns_evicted)
                assert str(chat.turns_evicted) in record.evicted()
            assert chat.stats is not None
            assert chat.stats.tokens_seen == record.tokens_seen
        assert left > 100


def test_an_interrupted_reply_stays_to_its_last_token() -> None:
    """Reference: the template over the whole conversation with the reply as far as it came."""
    with make(window=150) as chat, watched(chat.model) as read:
        reply = chat.send(SAID[0])
        text = "".join(next(reply).text for _ in range(5))
        second = chat.send(SAID[2], max_tokens=1)  # ends the first
        assert reply.finish == "interrupted"
        assert list(reply) == []
        second.text()
        messages = [
            {"role": "user", "content": SAID[0]},
            {"role": "assistant", "content": text},
            {"role": "user", "content": SAID[2]},
        ]
        assert read == chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        first = chat.transcript.turn(1)
        assert (first.reply, first.finish, first.reply_tokens) == (text, "interrupted", 5)


@pytest.mark.parametrize("window", [40, 150])
def test_a_reply_that_was_cut_off_goes_on_as_if_it_had_not_been(window: int) -> None:
    """Reference: the same reply, not cut off."""
    with make(window=window, block=8) as whole, make(window=window, block=8) as cut:
        want = whole.send(SAID[0], max_tokens=60).text()
        reply = cut.send(SAID[0], max_tokens=60)
        text = "".join(next(reply).text for _ in range(4))
        reply.close()
        assert cut.can_resume
        while cut.can_resume and cut.transcript.turn(1).reply_tokens < 60:
            text += cut.resume(max_tokens=min(7, 60 - cut.transcript.turn(1).reply_tokens)).text()
        assert text == want == cut.transcript.turn(1).reply
        if whole.transcript.turn(1).finish == "end":
            with pytest.raises(CacheError, match="no reply that was cut off"):
                cut.resume()


# ---- taking back


@pytest.mark.parametrize("window", [60, 250])
def test_undo_is_as_if_the_turn_had_never_been(window: int) -> None:
    """Reference: a conversation in which it never was, before and after evictions."""
    with make(window=window) as chat, make(window=window) as other:
        want = talk(other, 9)
        assert talk(chat, 7) == want[:7]
        chat.send("Something quite different.").text()
        chat.send("And more.").text()
        chat.undo(2)
        assert chat.turns == 7
        assert talk(chat, 2, first=7) == want[7:]
        assert chat.tokens_seen == other.tokens_seen
        assert (chat.cache.tokens_evicted > 0) == (window == 60)


def test_regenerate_and_edit_change_a_turn_and_drop_what_came_after() -> None:
    """Reference: for an edit a conversation in which that was said at once."""
    with make(window=80) as chat, make(window=80) as other:
        first = talk(chat, 6)
        assert chat.regenerate().text() == first[-1]  # greedy
        edited = chat.edit(4, "Tell me about a cat.").text()
        assert chat.turns == 4
        talk(other, 3)
        assert other.send("Tell me about a cat.").text() == edited
        with pytest.raises(ConfigError, match="no turn 9"):
            chat.edit(9, "x")


def test_another_reply_is_drawn_with_other_numbers() -> None:
    with make(sampling=SamplingConfig(temperature=1.0, seed=3), max_tokens=30) as chat:
        first = chat.send(SAID[1]).text()
        assert len({first, *(chat.regenerate().text() for _ in range(4))}) > 1
        assert chat.turns == 1


def test_beyond_the_snapshots_the_answer_says_what_is_possible() -> None:
    with make(window=80, snapshots=2) as chat:
        talk(chat, 5)
        with pytest.raises(CacheError, match="turns from 4 on can be"):
            chat.undo(3)
        assert chat.turns == 5
        chat.undo(3, rebuild=True)
        assert chat.turns == 2
        assert chat.send(SAID[0]).text()


def test_snapshots_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(window=80, snapshots=3) as chat:
        talk(chat, 6)
        assert [kept.turn for kept in chat._snapshots] == [4, 5, 6]
        monkeypatch.setattr(chat._snapshots, "most_bytes", chat.cache.bytes)
        talk(chat, 1)
        assert len(chat._snapshots) == 1
    with make(window=80, snapshots=0) as chat:
        talk(chat, 2)
        with pytest.raises(CacheError, match="no turn can be taken back exactly"):
            chat.undo()


def test_a_fork_goes_its_own_way() -> None:
    """Reference: the conversation that was forked."""
    with make(window=80, sampling=SamplingConfig(seed=5)) as chat:
        talk(chat, 5)
        with chat.fork() as other:
            assert talk(chat, 2, first=5) == talk(other, 2, first=5)
            other.undo(3)
            assert (chat.turns, other.turns) == (7, 4)
            other.send("I go another way.").text()
            assert chat.transcript.turn(5).user != other.transcript.turn(5).user


def test_clear_begins_anew() -> None:
    """Reference: a new conversation."""
    with make(system=SYSTEM, window=80) as chat, make(system=SYSTEM, window=80) as other:
        talk(chat, 4)
        chat.clear()
        assert chat.turns == 0
        assert talk(chat, 2) == talk(other, 2)


def test_other_instructions_are_pinned_and_the_window_is_read_behind_them() -> None:
    with make(system=SYSTEM, window=150) as chat:
        talk(chat, 3)
        chat.set_system("Be brief.")
        assert chat.system == "Be brief."
        with watched(chat.model) as read:
            chat.send("Hello").text()
        assert "Be brief." in chat.tokenizer.decode(chat.template.head)
        assert len(read) < 60  # the past was read when it was set, not again


# ---- bad input


def test_what_cannot_be_said_is_refused_and_changes_nothing() -> None:
    with make() as chat:
        talk(chat, 1)
        for text in ("", "  \n"):
            with pytest.raises(InputError, match="empty"):
                chat.send(text)
        with pytest.raises(InputError):
            chat.send("half a character: \ud800")
        with pytest.raises(ConfigError, match="recall must be"):
            make(recall="maybe")
        with pytest.raises(ConfigError, match="there are 1"):
            chat.undo(2)
        assert chat.turns == 1
        assert chat.send("Go on.").text()


def test_a_system_prompt_larger_than_the_window_is_refused_with_both_sizes() -> None:
    with pytest.raises(ConfigError, match=r"system prompt has \d+ tokens, the window 16"):
        make(system=SYSTEM * 4, window=16)
    with pytest.raises(ConfigError, match=r"system prompt has \d+ tokens"):
        make(system=SYSTEM * 100)
    with make(system=SYSTEM, window=40) as chat, pytest.raises(ConfigError, match="system prompt"):
        chat.set_system(SYSTEM * 50)
    assert chat.system == SYSTEM


def test_a_second_thread_is_refused() -> None:
    with make() as chat:
        reply = chat.send(SAID[0])
        next(reply)
        errors: list[BaseException] = []

        def say() -> None:
            try:
                chat.send("Me too")
            except BusyError as error:
                errors.append(error)

        with chat._alone():
            thread = threading.Thread(target=say)
            thread.start()
            thread.join()
        assert len(errors) == 1
        assert "Another thread" in str(errors[0])
        assert reply.text()


def test_a_template_that_needs_the_whole_is_read_anew_each_turn() -> None:
    """Reference: the template over the turns that fit."""
    with make(LAST_USER, system=SYSTEM, window=130) as chat:
        assert any("turn by turn" in note for note in chat.notes)
        for number in range(6):
            with watched(chat.model) as read:
                reply = chat.send(SAID[number])
                reply.text()
            rows = list(chat.history())[:-1]
            wants = []
            for kept in range(len(rows) + 1):
                messages = [{"role": "system", "content": SYSTEM}]
                for row in rows[len(rows) - kept :]:
                    messages += [{"role": "user", "content": row.user}, {"role": "assistant", "content": row.reply}]
                messages.append({"role": "user", "content": SAID[number]})
                wants.append(chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
            want = max((ids for ids in wants if len(ids) <= 130), key=len)
            assert read[: len(want)] == want
        chat.undo(2)
        assert chat.turns == 4
        assert chat.regenerate().text()


def test_an_interrupted_cache_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(window=80) as chat:
        talk(chat, 5)

        def broken(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(SinkCache, "_carry_out", broken)
            with pytest.raises(KeyboardInterrupt):
                chat.send("A long sentence that must evict something, " * 4).text()
        assert not chat.cache.is_whole
        assert chat.send("Hello").text()
        assert any("interrupted" in note for note in chat.notes)
        assert chat.turns == 7


def test_a_turn_that_was_broken_off_while_it_was_read_is_read_anew() -> None:
    """Reference: how far the cache had come, and what the window then ends with."""
    with make(window=200, session="talk") as chat:
        talk(chat, 2)
        text = "The cat sat on the mat and looked at the moon. " * 60
        seen: list[int] = []

        def stop(tokens: int) -> None:
            seen.append(tokens)
            if len(seen) == 2:
                raise KeyboardInterrupt

        reply = chat.send(text, progress=stop)
        with pytest.raises(KeyboardInterrupt):
            next(reply)
        assert reply.finish == "interrupted"
        assert seen == sorted(set(seen))
        with watched(chat.model) as read:
            assert chat.send("Hello", max_tokens=3).text() is not None
        assert any("interrupted" in note for note in chat.notes)
        assert len(read) < 300
        assert "looked at the moon" in chat.tokenizer.decode(read)
    with make(session="talk") as chat:
        assert (chat.turns, chat.notes) == (4, [])


# ---- on disk


def test_a_session_goes_on_as_if_it_had_never_stopped() -> None:
    """Reference: one that never stopped; sampled, so the random numbers go on as well."""
    sampling = SamplingConfig(seed=11, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((31, 1.5),))
    options = {"system": SYSTEM, "window": 100, "sampling": sampling}
    with make(**options) as other:
        want = talk(other, 8)
    found = []
    for first in range(0, 8, 2):
        with make(session="talk", **(options if not first else {"sampling": None})) as chat:
            assert chat.turns == first
            with watched(chat.model) as read:
                found.append(chat.send(SAID[first % len(SAID)], max_tokens=24).text())
            assert len(read) < 120  # the past is not read again
            found += talk(chat, 1, first=first + 1)
            assert chat.notes == []
    assert found == want


@pytest.mark.parametrize("damage", ["missing", "cut short", "other course"])
def test_without_its_state_a_session_is_read_from_the_transcript(folder: Path, damage: str) -> None:
    with make(system=SYSTEM, session="talk", window=100) as chat:
        talk(chat, 5)
        kept = (folder / "talk" / "state.stream").read_bytes()
        talk(chat, 1)
        chat.undo(2)
        talk(chat, 1, first=3)
        seen = chat.tokens_seen
    state = folder / "talk" / "state.stream"
    if damage == "missing":
        state.unlink()
    else:
        state.write_bytes(kept if damage == "other course" else kept[: len(kept) // 2])
    with make(session="talk") as chat:
        assert (chat.turns, chat.system) == (5, SYSTEM)
        assert len(chat.notes) == 1
        assert "read anew from the transcript" in chat.notes[0]
        assert abs(chat.tokens_seen - seen) < 30
        assert SYSTEM in chat.tokenizer.decode(chat.template.head)
        assert chat.send("Hello").text()


def test_a_session_of_another_model_is_read_anew_with_its_own_ids() -> None:
    with make(None, session="talk", window=100) as chat:
        talk(chat, 3)
    model, tokenizer = talker(None)
    other = type(model)(model.config).eval()
    with Chat(other, tokenizer, session="talk", sampling=GREEDY, max_tokens=5) as chat:
        assert chat.turns == 3
        assert any("other weights" in note for note in chat.notes)
        assert chat.send("Hello").text() is not None


def test_a_session_goes_on_from_its_archive(tmp_path: Path) -> None:
    """Reference: the session that was not carried; it was said with two tokenizers, so every setting is there."""
    with make(None, session="talk", window=100) as chat:
        talk(chat, 2)
    model, tokenizer = load(STORIES)
    options = {"sampling": GREEDY, "max_tokens": 5, "recall": "off"}
    with Chat(model, tokenizer, session="talk", **options) as chat:
        talk(chat, 2)
    export_session("talk", tmp_path / "talk.zip")
    import_session(tmp_path / "talk.zip", "other")
    with (
        Chat(model, tokenizer, session="talk", **options) as chat,
        Chat(model, tokenizer, session="other", **options) as other,
    ):
        assert chat.transcript.settings() == other.transcript.settings()
        assert {"foreign", "spelling"} <= chat.transcript.settings().keys()
        assert talk(chat, 2) == talk(other, 2)
        assert not any("anew" in note for note in other.notes)


def test_what_contradicts_a_session_is_refused() -> None:
    with make(session="talk", window=100) as chat:
        talk(chat, 1)
    with pytest.raises(ConfigError, match="window=90 contradicts"):
        make(session="talk", window=90)
    with make(session="talk", window=100) as chat:
        assert chat.turns == 1
        with pytest.raises(BusyError, match=str(os.getpid())):
            make(session="talk")


def test_a_fork_can_be_kept_as_a_session() -> None:
    with make(window=100) as chat:
        talk(chat, 4)
        with chat.fork("kept") as kept:
            assert kept.session is not None
        want = talk(chat, 2, first=4)
    with make(session="kept") as chat:
        assert chat.turns == 4
        assert talk(chat, 2, first=4) == want
        other = Session("other")
        other.transcript.begin("x", prompt_ids=[1], count=len)
        with pytest.raises(ConfigError, match="not new"):
            chat.fork(other)


def test_a_full_disk_in_the_middle_of_a_reply_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the reply that met no full disk."""
    with make() as other:
        want = other.send(SAID[0], max_tokens=20).text()
    with make(session="talk") as chat:
        reply = chat.send(SAID[0], max_tokens=20)
        text = "".join(next(reply).text for _ in range(4))
        write = chat.transcript.write
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise StateError("The disk is full.")

            patch.setattr(chat.transcript, "write", full)
            with pytest.raises(StateError, match="full"):
                next(reply)
            with pytest.raises(StateError, match="full"):
                chat.send("Hello")
        assert chat.transcript.write == write
        rest = chat.resume(max_tokens=15).text()
        row = chat.transcript.turn(1)
        assert row.reply == want
        assert want.startswith(text)
        assert want.endswith(rest)


@pytest.mark.parametrize("template", [CHATML, LAST_USER])
def test_penalties_count_what_the_reply_has_drawn_also_after_it_was_cut_off(
    template: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the ids that a sampler counts must be those of the reply in the transcript, whatever came between."""
    counted: list[list[int]] = []

    def watch(sampler: Sampler, logits: object) -> None:
        counted.append(list(sampler.drawn))
        reweigh(sampler, logits)  # type: ignore[arg-type]

    reweigh = Sampler._reweigh
    monkeypatch.setattr(Sampler, "_reweigh", watch)

    def check(chat: Chat, turn: int, begin: int) -> None:
        ids = chat.transcript.reply_ids(turn)
        assert counted[: len(ids) - begin] == [ids[:place] for place in range(begin, len(ids))]
        counted.clear()

    with make(template, session="talk", sampling=VARIED, on_end="ban", max_tokens=12) as chat:
        for turn in (1, 2):
            chat.send(SAID[turn]).text()
            check(chat, turn, 0)
        chat.resume(max_tokens=9).text()
        check(chat, 2, 12)
        chat.regenerate(rebuild=True).text()
        check(chat, 2, 0)
        chat.undo(rebuild=True)
        chat.resume(max_tokens=5).text()
        check(chat, 1, 12)
        reply = chat.send(SAID[3])
        for _ in range(4):
            next(reply)
    (folder / "talk" / "state.stream").unlink(missing_ok=True)
    counted.clear()
    with make(template, session="talk", sampling=None, on_end="ban", max_tokens=12) as chat:
        assert chat.sampling == VARIED
        chat.resume().text()
        check(chat, 2, 4)


KILLED = """
import sys
from test_session import SAID, SYSTEM, VARIED, make
chat = make(system=SYSTEM, session="talk", window=100, max_tokens=40, sampling=VARIED)
print(chat.can_resume, flush=True)
if chat.can_resume:
    for chunk in chat.resume(max_tokens=40 - chat.transcript.last().reply_tokens):
        print("token", flush=True)
while chat.turns < 10:
    for chunk in chat.send(SAID[chat.turns % len(SAID)]):
        print("token", flush=True)
chat.close()
"""


def test_a_session_that_was_killed_twice_says_what_it_would_have_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the conversation that was not killed, reply for reply and id for id; the first kill is in turn 1."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for tokens in (5, 61, None):
        process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line == "token\n"
            if seen == tokens:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == (0 if tokens is None else -signal.SIGKILL)
    with make(system=SYSTEM, window=100, max_tokens=40, sampling=VARIED) as other:
        talk(other, 10)
        want = [(row.user, row.reply, row.finish) for row in other.history()]
        with make(session="talk") as chat:
            assert [(row.user, row.reply, row.finish) for row in chat.history()] == want
            for number in range(1, 11):
                assert chat.transcript.reply_ids(number) == other.transcript.reply_ids(number)
            assert chat.tokens_seen == other.tokens_seen


# ---- whatever breaks off


class Interrupted:
    """A connection that is interrupted once, right behind one command."""

    def __init__(self, connection: sqlite3.Connection, command: str, skip: int) -> None:
        self.connection, self.command, self.skip = connection, command, skip

    def execute(self, query: str, *values: object) -> sqlite3.Cursor:
        found = self.connection.execute(query, *values)
        if query.startswith(self.command):
            self.skip -= 1
            if self.skip == -1:
                raise KeyboardInterrupt
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)


@pytest.mark.parametrize(
    ("command", "skip"),
    [
        ("INSERT INTO passages", 0),  # the first token
        ("UPDATE passages SET stop", 0),  # and those after it
        ("UPDATE passages SET stop", 1),
        ("UPDATE passages SET stop", 3),
        ("BEGIN IMMEDIATE", 0),  # the end
        ("COMMIT", 0),
    ],
)
def test_an_interrupt_while_a_token_is_written_loses_and_doubles_nothing(command: str, skip: int) -> None:
    """Reference: the reply that was not interrupted."""
    with make(on_end="pass", max_tokens=12) as other:
        other.send(SAID[0]).text()
        want = other.transcript.turn(1)
        ids = other.transcript.reply_ids(1)
    with make(on_end="pass", max_tokens=12) as chat:
        reply = chat.send(SAID[0])
        database = chat.transcript.database
        connection = database._connection
        database._connection = Interrupted(connection, command, skip)
        with pytest.raises(KeyboardInterrupt):
            reply.text()
        database._connection = connection
        assert chat.can_resume
        chat.resume(max_tokens=12 - chat.transcript.turn(1).reply_tokens).text()
        assert chat.transcript.reply_ids(1) == ids
        assert chat.transcript.turn(1).reply == want.reply
        assert chat.notes == []
        chat.send("Hello", max_tokens=2).text()
        assert chat.tokens_seen == chat.transcript.tokens() - 1


def test_a_search_in_another_thread_harms_no_reply() -> None:
    """Reference: the reply that nobody searched beside."""
    with make(on_end="pass", max_tokens=60) as other:
        want = other.send(SAID[0]).text()
    errors: list[BaseException] = []
    done = threading.Event()
    with make(on_end="pass", max_tokens=60) as chat:

        def look() -> None:
            while not done.is_set():
                try:
                    chat.search("house")
                except BaseException as error:
                    errors.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        text = chat.send(SAID[0]).text()
        done.set()
        thread.join()
        assert (text, errors) == (want, [])
        assert chat.transcript.turn(1).reply == want


def test_a_full_disk_at_the_end_of_a_reply_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same reply with room."""
    with make() as other:
        want = other.send(SAID[0]).text()
        assert other.transcript.turn(1).finish == "end"
    with make() as chat:
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise StateError("The disk is full.")

            patch.setattr(chat.transcript, "end", full)
            assert chat.send(SAID[0]).text() == want
            assert any("full" in note for note in chat.notes)
            with pytest.raises(StateError, match="full"):
                chat.send("Hello")
        with pytest.raises(CacheError, match="no reply that was cut off"):
            chat.resume()
        row = chat.transcript.turn(1)
        assert (row.reply, row.finish) == (want, "end")


def test_instructions_that_were_interrupted_are_read_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(system=SYSTEM, window=150) as chat:
        talk(chat, 2)
        with monkeypatch.context() as patch:

            def interrupt(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr("streamllm.context.read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                chat.set_system("Be brief.")
        with watched(chat.model) as read:
            chat.send("Hello").text()
        assert "Be brief." in chat.tokenizer.decode(read[: len(chat.template.head)])
        assert SAID[1] in chat.tokenizer.decode(read)


def test_a_fork_of_a_half_read_turn_knows_that_it_is_one() -> None:
    with make(window=200) as chat:
        reply = chat.send("The cat sat on the mat and looked at the moon. " * 60, progress=lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(reply)
        with chat.fork() as other:
            assert other.send("Hello", max_tokens=2).text() is not None
            assert any("interrupted" in note for note in other.notes)
            assert other.tokens_seen == other.transcript.tokens() - 1


def test_text_that_was_held_back_comes_with_the_end_of_the_reply() -> None:
    """Reference: the reply that was not broken off; the stop string begins like what is said, and never ends."""
    stop = ["The dog is a dragon", "And the little house is"]
    with make(on_end="pass", max_tokens=20) as other:
        want = other.send(SAID[0]).text()
    for tokens in range(1, 12):
        with make(on_end="pass", max_tokens=20, stop=stop) as chat:
            reply = chat.send(SAID[0])
            for _ in range(tokens):
                next(reply)
            reply.close()
            ids = chat.transcript.reply_ids(1)
            said = chat.transcript.turn(1).reply.replace("\n\n", "")
            assert said == chat.tokenizer.decode(ids, skip_special_tokens=True)
            chat.resume(max_tokens=20 - tokens).text()
            assert chat.transcript.turn(1).reply == want


def test_a_call_that_fails_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(session="mine") as chat:
        talk(chat, 4)
        with pytest.raises(InputError):
            chat.edit(2, "half: \ud800")
        assert chat.turns == 4

        def full(*_: object) -> None:
            raise StateError("The disk is full.")

        with monkeypatch.context() as patch:
            patch.setattr(chat.transcript, "undo", full)
            with pytest.raises(StateError, match="full"):
                chat.undo(2)
        chat.undo(2)
        assert chat.turns == 2
        chat.clear()
    with make() as other, pytest.raises(ConfigError, match="not new"):
        other.fork("mine")


def test_sampling_is_kept_with_a_session(folder: Path) -> None:
    with make(session="talk") as chat:
        talk(chat, 1)
        chat.sampling = SamplingConfig(temperature=0.3)
    with make(session="talk", sampling=None) as chat:
        assert chat.sampling == SamplingConfig(temperature=0.3)
    (folder / "talk" / "state.stream").unlink()
    with make(session="talk", sampling=None, system="Be brief.") as chat:
        assert chat.sampling == SamplingConfig(temperature=0.3)


def test_sampling_that_is_set_during_a_reply_counts_from_the_next_one_on() -> None:
    """Reference: set between the two replies."""
    first, second = SamplingConfig(seed=3), SamplingConfig(seed=3, temperature=0.5, repetition_penalty=1.3)
    with make(on_end="pass", sampling=first) as chat, make(on_end="pass", sampling=first) as other:
        want = talk(other, 1)
        other.sampling = second
        want += talk(other, 1, first=1)
        reply = chat.send(SAID[0])
        text = "".join(next(reply).text for _ in range(5))
        chat.sampling = second
        assert chat.sampling == second
        assert [text + reply.text(), *talk(chat, 1, first=1)] == want


def test_turns_said_with_another_tokenizer_are_spelt_anew_however_often() -> None:
    """Reference: the texts themselves."""
    with make(None, session="talk", window=150, on_end="pass") as chat:
        talk(chat, 3)
        texts = [(row.user, row.reply) for row in chat.history()]
    model, tokenizer = load(STORIES)
    with Chat(model, tokenizer, session="talk", sampling=GREEDY, max_tokens=5, recall="off") as chat:
        assert any("another tokenizer" in note for note in chat.notes)
        for _ in range(2):
            with watched(chat.model) as read:
                chat._keeper.rebuild()
            for user, reply in texts[1:2]:
                assert user in tokenizer.decode(read)
                assert reply.strip() in tokenizer.decode(read)


# ---- recall


def test_what_left_the_window_is_put_in_front_of_a_turn_that_asks_for_it() -> None:
    with make(window=200, recall="auto") as chat, watched(chat.model) as read:
        chat.send("The secret code of the treasure chest is 48151623.").text()
        assert chat.search("treasure")[0].turn == 1
        first = chat.send("What is the secret code of the treasure chest?")
        assert first.recalled == ()  # it is still in the window
        first.text()
        talk(chat, 12)
        assert chat.turns_evicted >= 2
        reply = chat.send("What is the secret code of the treasure chest?")
        del read[:]
        reply.text()
        assert any("48151623" in passage.text for passage in reply.record.recalled)
        assert "48151623" in chat.tokenizer.decode(read)
        row = chat.transcript.turn(chat.turns)
        assert "48151623" in row.preface
        assert row.user == "What is the secret code of the treasure chest?"


def test_what_is_in_the_window_because_it_was_quoted_is_not_quoted_again() -> None:
    with make(window=250, recall="auto") as chat:
        chat.send("The secret code of the treasure chest is 48151623.").text()
        talk(chat, 14)
        first = chat.send("What is the secret code of the treasure chest?")
        assert len(first.recalled) == 1
        first.text()
        again = chat.send("What is the secret code of the treasure chest?")
        assert again.recalled == ()


def test_what_a_template_without_pieces_reads_again_is_not_quoted_besides() -> None:
    with make(LAST_USER, system=SYSTEM, window=400, recall="auto") as chat:
        chat.send("The secret code of the treasure chest is 48151623.").text()
        for _ in range(3):
            chat.send(SAID[1]).text()
        with watched(chat.model) as read:
            reply = chat.send("What is the secret code of the treasure chest?")
            reply.text()
        assert reply.recalled == ()
        assert chat.tokenizer.decode(read).count("48151623") == 1
        assert reply.record.turns_evicted == 0


def test_after_reading_anew_nothing_is_taken_for_gone_that_is_there() -> None:
    """Reference: the text of what the cache holds."""
    with make(system=SYSTEM * 5, window=200, recall="auto") as chat, watched(chat.model) as read:
        talk(chat, 8)
        for _ in range(6):
            del read[:]
            chat._keeper.rebuild()
            seen = list(read)
            talk(chat, 3)
            held = chat.cache.tokens_cached - chat.cache.rows[0].pinned
            window = chat.tokenizer.decode((seen + read)[-held:])
            for number in range(1, chat.turns + 1):
                (passage,) = [p for p in chat.search(chat.transcript.turn(number).user, 50) if p.turn == number][:1]
                if chat._context.place.has_left(passage):
                    place = window.find(f"user\n{passage.text}")
                    later = [chat.transcript.turn(k).user for k in range(chat._context.oldest, chat.turns + 1)]
                    assert place < 0 or passage.text in later


def test_recall_can_be_off_and_passages_can_be_chosen() -> None:
    with make(window=100) as chat:
        chat.send("The secret code of the treasure chest is 48151623.").text()
        talk(chat, 10)
        reply = chat.send("What is the secret code of the treasure chest?")
        assert reply.recalled == ()
        reply.text()
        found = chat.search("treasure chest", limit=1)
        chosen = chat.send("Say it.", recall=found)
        assert chosen.recalled == tuple(found)
        chosen.text()


# ---- without end


def test_nothing_grows_with_the_conversation() -> None:
    with make(window=60, snapshots=2, max_tokens=6, recall="auto") as chat:
        for number in range(150):
            chat.send(f"{SAID[number % len(SAID)]} {number}").text()
            if number == 50:
                size = chat.cache.bytes, len(chat._context.residents.turns), len(chat._snapshots)
        assert (chat.cache.bytes, len(chat._snapshots)) == (size[0], size[2])
        assert len(chat._context.residents.turns) <= 60
        assert chat.turns_evicted > 140
        alive = weakref.ref(chat)
    del chat
    gc.collect()
    assert alive() is None


def test_a_compiled_conversation_says_the_same() -> None:
    """Reference: the one that is not compiled."""
    with make(window=100) as chat:
        want = talk(chat, 6)
    with make(window=100, compile=True) as chat, pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamllm.slots.compile_module", lambda step, *_, **__: step)
        assert talk(chat, 4) == want[:4]
        chat.undo(2)
        assert talk(chat, 4, first=2) == want[2:]


def test_a_second_thread_is_refused_between_two_tokens_too() -> None:
    """Reference: the reply of the first, which goes on as if nobody had asked."""
    with make(max_tokens=12, on_end="ban") as other:
        want = other.send(SAID[0]).text()
    with make(max_tokens=12, on_end="ban") as chat:
        texts: list[str] = []
        steps, goes_on = threading.Event(), threading.Event()

        def read() -> None:
            for chunk in chat.send(SAID[0]):
                texts.append(chunk.text)
                steps.set()
                goes_on.wait(30)

        thread = threading.Thread(target=read)
        thread.start()
        steps.wait(30)
        with pytest.raises(BusyError, match="Another thread reads a reply"):
            chat.send(SAID[1])
        goes_on.set()
        thread.join()
        assert "".join(texts) == want
        assert chat.send(SAID[1]).text()


def test_what_was_quoted_is_known_after_a_restart_and_nothing_is_kept_for_it() -> None:
    """Reference: by hand; what stands quoted in the window is not quoted again."""
    with make(session="talk", window=150, recall="auto", max_tokens=8) as chat:
        chat.send("The key is under the purple stone.").text()
        talk(chat, 12)
        reply = chat.send("Where is the key, under which purple stone?")
        assert [passage.turn for passage in reply.recalled] == [1]
        reply.text()
    with make(session="talk", recall="auto", max_tokens=8) as chat:
        assert not chat.send("So where is the key, under the purple stone?").recalled
        for _ in range(14):
            chat.send("Tell me about a dog.").text()
        assert chat.send("Where is the key, under which purple stone?").recalled


def test_a_reply_in_its_own_manner_leaves_the_random_numbers_of_the_conversation_alone() -> None:
    """Reference: a conversation without that reply's own seed, and one in which nothing was drawn otherwise."""
    conversation = SamplingConfig(seed=5)
    with make(sampling=conversation, on_end="ban", max_tokens=10) as chat:
        first = chat.send(SAID[0]).text()
        chat.send(SAID[1], sampling=SamplingConfig(seed=9)).text()
        chat.undo()
        second = chat.send(SAID[1]).text()
        chat.undo(2)
        assert chat.send(SAID[0]).text() != first  # the numbers of seed 5 go on
    with make(sampling=conversation, on_end="ban", max_tokens=10) as other:
        assert [other.send(SAID[0]).text(), other.send(SAID[1]).text()] == [first, second]
    with make(sampling=conversation, on_end="ban", max_tokens=10) as other:  # without a seed they go on in it
        assert other.send(SAID[0], sampling=SamplingConfig()).text() == first
        assert other.send(SAID[1], sampling=SamplingConfig()).text() == second


def test_regenerating_and_resuming_keep_what_was_recalled() -> None:
    """Reference: the passages given by hand."""
    with make(window=150) as chat:
        talk(chat, 3)
        passages = chat.search("red house")
        assert passages
        chat.send("Bye", recall=passages, max_tokens=2, on_end="ban").text()
        assert chat.resume(max_tokens=2).recalled == tuple(passages)
        assert chat.regenerate(max_tokens=2).recalled == tuple(passages)


def test_a_template_that_is_read_as_a_whole_tells_what_leaves_also_after_a_restart() -> None:
    """Reference: by hand."""
    with make(LAST_USER, session="talk", window=100, system=SYSTEM) as chat:
        for n in range(8):
            reply = chat.send(SAID[n % len(SAID)])
            reply.text()
        assert reply.record.evicted_now is not None
        evicted = chat.turns_evicted
        assert evicted >= 3
    with make(LAST_USER, session="talk", window=100) as chat:
        assert abs(chat.turns_evicted - evicted) <= 1
        assert chat.tokens_evicted > 0


def test_other_instructions_say_what_is_unusual_about_them() -> None:
    """Reference: the note of a conversation that begins with them."""
    with make(LAST_USER) as chat:
        before = len(chat.notes)
        chat.set_system(SYSTEM)
        assert len(chat.notes) > before
        assert any("read again at every turn" in note for note in chat.notes)


def test_a_system_prompt_that_does_not_fit_is_told_with_both_sizes() -> None:
    """Reference: by hand, with a window that is given and with the default one."""
    with pytest.raises(ConfigError, match=r"has \d\d\d tokens, the window 60: shorten"):
        make(system="Be kind. " * 60, window=60)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, the window \d+: shorten"):
        make(system="Be kind. " * 400)


def test_a_document_that_was_passed_is_set_apart_in_the_transcript() -> None:
    """Reference: the chunks as they are shown."""
    with make(None, on_end="pass", max_tokens=400) as chat:
        chunks = list(chat.send("Once upon a time"))
        assert sum(chunk.document_end for chunk in chunks)
        assert chat.transcript.turn(1).reply == "".join(chunk.shown for chunk in chunks)


def test_a_fork_that_fails_leaves_no_session(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Reference: the folder of sessions."""
    with make() as chat:
        talk(chat, 2)
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise StateError("The disk is full.")

            patch.setattr("streamllm.transcript.Transcript.copy_into", fail)
            with pytest.raises(StateError, match="full"):
                chat.fork("branch")
        assert not [path for path in folder.iterdir() if path.name == "branch"]
        chat.fork("branch").close()
