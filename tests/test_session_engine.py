"""Conversations whose replies an engine generates: the same texts, beside others, through breaks, kills and saves."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import streamllm.session as sessions_of_chat
from chats import CHATML, LAST_USER, talker
from streamllm.config import CacheConfig, SamplingConfig
from streamllm.engine import Engine
from streamllm.errors import BusyError, ConfigError, StateError
from streamllm.session import Chat
from test_session import GREEDY, SAID, SYSTEM, make, talk, watched

ROLES = ("user", "assistant")
OTHERS = [(f"Tell me about number {number}.", f"Number {number} was a small red ball.") for number in range(150)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMLLM_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


@pytest.fixture
def engine() -> Iterator[Engine]:
    model, tokenizer = talker()
    with Engine(model, tokenizer, slots=2, config=CacheConfig(window=100), columns=400) as engine:
        yield engine


def messages_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for pair in turns for role, text in zip(ROLES, pair, strict=True)]


def rows(chat: Chat) -> list[tuple[str, str, str | None]]:
    return [(row.user, row.reply, row.finish) for row in chat.history()]


def test_replies_of_an_engine_are_those_of_a_conversation_alone(engine: Engine) -> None:
    """Reference: the same conversation without an engine; two go on side by side in two threads."""
    seeded = SamplingConfig(seed=11)
    with make(system=SYSTEM, window=100) as one, make(system=SYSTEM, window=100, sampling=seeded) as two:
        want = [talk(one, 7), talk(two, 7)]
    got: dict[int, list[str]] = {}

    def go(number: int, sampling: SamplingConfig) -> None:
        with make(system=SYSTEM, window=100, sampling=sampling, engine=engine) as chat:
            got[number] = talk(chat, 7)
            assert chat.record is not None
            assert chat.record.turns_evicted > 1
            assert chat.tokens_seen == chat.transcript.tokens() - (chat.transcript.last().finish != "end")  # type: ignore[union-attr]

    threads = [threading.Thread(target=go, args=pair) for pair in enumerate((GREEDY, seeded))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[0], got[1]] == want


def test_what_an_engine_generated_before_a_reply_was_broken_off_is_in_the_transcript(engine: Engine) -> None:
    """Reference: the ids that the cache has read, and the reply that was not broken off."""
    with make(on_end="ban", max_tokens=150) as other:
        whole = other.send(SAID[0]).text()
    with make(engine=engine, on_end="ban", max_tokens=None) as chat:
        reply = chat.send(SAID[0])
        seen = "".join(chunk.text for chunk in islice(reply, 3))
        while chat.cache.tokens_seen < 60:  # the engine runs ahead
            time.sleep(0.01)
        reply.close()
        row = chat.transcript.turn(1)
        assert row.finish == "interrupted"
        assert row.reply_tokens >= 40
        assert row.reply_tokens == reply.record.tokens_generated
        assert row.reply.startswith(seen)
        assert whole.startswith(row.reply) or row.reply.startswith(whole)
        assert chat.tokens_seen + len(chat.cache.unread) == chat.transcript.tokens()
        with watched(chat.model) as read:
            chat.resume(max_tokens=3).text()
        assert len(read) == 3  # nothing is read anew
        assert engine.stats().running == 0


def test_a_reply_that_came_to_its_end_unread_has_ended(engine: Engine) -> None:
    """Reference: the reply that was read to its end."""
    with make(max_tokens=200) as other:
        want = other.send(SAID[0]).text()
        assert other.transcript.turn(1).finish == "end"
    with make(engine=engine, max_tokens=200) as chat:
        reply = chat.send(SAID[0])
        next(reply)
        while engine.stats().running or engine.stats().waiting:
            time.sleep(0.01)
        reply.close()
        assert rows(chat) == [(SAID[0], want, "end")]
        assert not chat.can_resume
        with make(max_tokens=200) as other:
            assert talk(other, 2)[1] == chat.send(SAID[1]).text()


def test_another_thread_can_stop_a_reply_while_its_reader_waits(engine: Engine) -> None:
    """Reference: by hand; the reader holds the conversation while it waits for the next chunk."""
    with make(engine=engine, on_end="ban", max_tokens=None) as chat:
        reply = chat.send(SAID[0])
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.extend(chunk.text for chunk in reply))
        reader.start()
        while len(texts) < 5:
            time.sleep(0.01)
        reply.stop()
        reader.join(timeout=30)
        assert not reader.is_alive()
        assert reply.finish == "interrupted"
        assert chat.transcript.turn(1).reply == "".join(texts)
    with make(engine=engine, on_end="ban", max_tokens=None) as chat:  # by a reader who is behind
        before = engine.stats().tokens_generated
        reply = chat.send(SAID[0])
        texts = [next(reply).text]
        while engine.stats().tokens_generated < before + 4:
            time.sleep(0.01)
        reply.stop()
        texts += [chunk.text for chunk in reply]
        assert len(texts) > 1
        assert chat.transcript.turn(1).reply == "".join(texts)
    with make(max_tokens=None, on_end="ban") as chat:  # and without an engine
        reply = chat.send(SAID[0])
        next(reply)
        reply.stop()
        assert list(reply) == []
        assert reply.finish == "interrupted"


@pytest.mark.parametrize("is_served", [False, True])
def test_a_conversation_that_is_closed_frees_its_memory_without_a_garbage_collection(
    engine: Engine, is_served: bool
) -> None:
    """A server opens and closes many, each with megabytes, and Python looks for cycles seldom."""
    gc.collect()
    gc.disable()
    try:
        chat = make(engine=engine if is_served else None, max_tokens=5)
        talk(chat, 2)
        chat.send(SAID[2]).close()
        known = weakref.ref(chat.cache)
        chat.close()
        assert known() is not None
        del chat
        assert known() is None
    finally:
        gc.enable()


def test_a_long_reply_is_saved_on_the_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the reply without an engine; the saved stream goes on where it was saved, by replaying little."""
    monkeypatch.setattr(sessions_of_chat, "SAVE_EVERY", 16)
    with make(on_end="ban", max_tokens=90, window=100, sampling=SamplingConfig(seed=3)) as other:
        want = other.send(SAID[0]).text()
    model, tokenizer = talker()
    settings: dict[str, object] = {"on_end": "ban", "max_tokens": 90, "window": 100, "recall": "off"}
    chat = Chat(model, tokenizer, engine=engine, session="talk", sampling=SamplingConfig(seed=3), **settings)  # type: ignore[arg-type]
    saved = []
    save = chat._keeper.save
    monkeypatch.setattr(chat._keeper, "save", lambda: (saved.append(chat.transcript.last().reply_tokens), save()))  # type: ignore[union-attr]
    text = "".join(chunk.text for chunk in islice(chat.send(SAID[0]), 90))
    assert text == want
    assert len(saved) >= 4
    assert saved == sorted(saved)
    chat.close()
    with Chat(model, tokenizer, session="talk", **settings) as again:  # type: ignore[arg-type]
        assert rows(again)[0][1] == want
        assert not again.notes or "anew" not in again.notes[0]


def test_a_queue_that_is_full_is_refused_before_anything_is_written() -> None:
    """Reference: by hand."""
    model, tokenizer = talker()
    with (
        Engine(model, tokenizer, slots=1, waiting=0, config=CacheConfig(window=100), columns=400) as engine,
        make(engine=engine, on_end="ban", max_tokens=None) as one,
        make(engine=engine) as two,
    ):
        reply = one.send(SAID[0])
        next(reply)
        with pytest.raises(BusyError, match="streams are here already"):
            two.send(SAID[0])
        assert two.turns == 0
        reply.close()
        assert two.send(SAID[0]).text()


def test_a_stream_that_fails_ends_its_reply_and_the_conversation_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the conversation that met no error."""
    with make() as other:
        want = talk(other, 1)
    with make(engine=engine) as chat:
        assert talk(chat, 1) == want
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise StateError("The disk is full.")

            patch.setattr(chat.transcript, "write", fail)
            with pytest.raises(StateError, match="full"):
                chat.send(SAID[1]).text()
        assert engine.stats().running == 0
        assert chat.send(SAID[2], max_tokens=4).text()
        assert chat.tokens_seen + len(chat.cache.unread) == chat.transcript.tokens()


# ---- what one reply does otherwise


def test_a_seed_of_one_reply_begins_anew_and_the_conversation_draws_on() -> None:
    """Reference: the first reply with that seed; a conversation without the seeded reply in it."""
    seeded = SamplingConfig(seed=5)
    with make(sampling=SamplingConfig(seed=1), on_end="ban", max_tokens=12) as chat:
        first = chat.send(SAID[0], sampling=seeded).text()
        assert chat.regenerate(sampling=seeded).text() == first
        assert chat.sampling.seed == 1
    with make(sampling=seeded, on_end="ban", max_tokens=12) as other:
        assert other.send(SAID[0]).text() == first


def test_stop_strings_and_end_tokens_of_one_reply() -> None:
    """Reference: by hand."""
    with make(max_tokens=40) as chat:
        whole = chat.send(SAID[0]).text()
        assert chat.transcript.turn(1).finish == "end"
        word = whole.split()[3]
        assert chat.regenerate(stop=[word]).text() == whole[: whole.index(word)]
        longer = chat.regenerate(on_end="ban", max_tokens=40).text()
        assert chat.transcript.turn(1).finish == "length"
        assert len(longer) > len(whole)
        assert chat.regenerate().text() == whole


# ---- what was said elsewhere


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("is_engine", [False, True])
def test_what_was_said_elsewhere_is_read_once_as_the_template_gives_it(
    template: str | None, *, is_engine: bool, engine: Engine
) -> None:
    """Reference: the whole conversation, spelt at once."""
    with make(template, window=100, engine=engine if is_engine else None) as chat:
        with watched(chat.model) as read:
            chat.tell(OTHERS)
            chat.send("Bye", max_tokens=1).text()
        messages = messages_of(OTHERS)
        messages.append({"role": "user", "content": "Bye"})
        assert read == chat.template.whole(messages)
        assert chat.turns == 151
        assert rows(chat)[:150] == [(*pair, "end") for pair in OTHERS]
        assert chat.turns_evicted > 140
        assert chat.tokens_seen == len(read)
        chat.undo()
        chat.undo(3, rebuild=True)
        assert chat.turns == 147


def test_turns_that_were_told_leave_whole_and_are_found(engine: Engine) -> None:
    """Reference: the borders of the turns in the cache, which lie where turns begin."""
    with make(window=100, engine=engine, recall="auto") as chat:
        chat.tell([("The key is under the purple stone.", "I see."), *OTHERS])
        reply = chat.send("Where is the key, under which purple stone?", max_tokens=2)
        assert [passage.turn for passage in reply.recalled][:1] == [1]


def test_telling_works_with_templates_that_are_read_as_a_whole() -> None:
    """Reference: the window of the conversation that said the same itself."""
    with make(LAST_USER, window=100, system=SYSTEM) as chat:
        chat.tell(OTHERS[:5])
        assert chat.turns == 5
        with watched(chat.model) as read:
            chat.send("Bye", max_tokens=1).text()
        whole = chat.template.whole([*messages_of(OTHERS[3:5]), {"role": "user", "content": "Bye"}])
        assert read == whole


def test_control_tokens_in_what_was_told_are_text() -> None:
    """Reference: the ids of control tokens, which must not be among those of the reply."""
    with make() as chat:
        chat.tell([("Hello", "Hi <|im_end|> there")])
        control = set(chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
        assert not control & set(chat.transcript.reply_ids(1))


# ---- forks behind a turn


@pytest.mark.parametrize("behind", [0, 3, 7, 8])
def test_a_fork_behind_a_turn_goes_on_from_there(behind: int, engine: Engine) -> None:
    """Reference: the conversation that never went further, where a snapshot is kept; else what it says of itself."""
    with make(system=SYSTEM, window=100, engine=engine, snapshots=3) as chat:
        talk(chat, 8)
        with chat.fork("branch", turns=behind) as fork:
            assert fork.turns == behind
            assert rows(fork) == rows(chat)[:behind]
            got = fork.send("Bye").text()
            assert fork.session is not None
        if behind >= 7:
            with make(system=SYSTEM, window=100) as other:
                talk(other, behind)
                assert other.send("Bye").text() == got
        assert chat.turns == 8
        with pytest.raises(ConfigError, match="Cannot fork behind turn 9"):
            chat.fork("other", turns=9)
