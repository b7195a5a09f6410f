"""The chat prompt: what each line does, and its manners in a pipe; a conversation without a model is behind it.

What a person sees in a terminal is in ``test_terminal``; ``test_chat_command`` has the command with a real model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_chat import FakeChat, talk_of
from streamllm import messages
from streamllm.config import SamplingConfig
from streamllm.console import Answer, Screen, Signals
from streamllm.errors import ConfigError, InputError, StreamLLMError, StreamLLMWarning
from streamllm.passages import Passage
from streamllm.repl import Repl
from streamllm.run import told
from streamllm.slash import ALIASES, COMMANDS, completions
from streamllm.strip import ASCII, draw
from streamllm.talk import Talk

pytestmark = pytest.mark.usefixtures("foreground")


def converse(chat: FakeChat, *lines: str, is_interactive: bool = False, **options: Any) -> Talk:
    """Say these lines at the prompt."""
    talk = talk_of(chat, **options)
    Repl(talk, partial(next, iter(lines), None), is_interactive=is_interactive).run()
    return talk


def sent(chat: FakeChat) -> list[str]:
    return [call[1] for call in chat.calls if call[0] == "send"]


# ---- messages


def test_each_line_is_a_message_and_each_reply_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the words that the conversation gives; nothing else is on stdout, and nothing on stderr."""
    converse(chat := FakeChat(), "2 words", "", "   ", "1 word")
    assert sent(chat) == ["2 words", "1 word"]
    assert capsys.readouterr() == ("word1 word2\nword1\n", "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("//etc is a folder", "/etc is a folder"),
        ("  //etc", "/etc"),
        ('"""/clear"""', "/clear"),
        ('"""\none\n\ntwo\n"""', "one\n\ntwo"),
        ('"""one "two" ""', 'one "two" ""'),
        ('one """two"""', 'one """two"""'),
        ("a\n/clear", "a\n/clear"),
    ],
)
def test_a_slash_can_be_said_and_quotes_make_any_text_a_message(line: str, said: str) -> None:
    converse(chat := FakeChat(), line)
    assert chat.calls == [("send", said, None)]


@given(text=st.text(alphabet='ab"/ \n\r', max_size=60), cuts=st.lists(st.integers(0, 60)))
def test_messages_do_not_depend_on_how_their_text_arrives(text: str, cuts: list[int]) -> None:
    """Reference: the whole text split by lines, and lines joined from one that opens quotes to one that closes them."""
    want: list[str] = []
    is_open = False
    lines = text.split("\n")
    for ended in lines if lines[-1] else lines[:-1]:
        line = ended.removesuffix("\r")
        if is_open:
            want[-1] += "\n" + line
            is_open = not line.rstrip().endswith('"""')
        else:
            want.append(line)
            is_open = line.strip().startswith('"""') and re.fullmatch(r'""".*"""', line.strip()) is None
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert list(messages.piped(pieces)) == want


@pytest.mark.parametrize(("first", "later"), [("", "x"), ('"""\n', "\n"), ('"""', "a\n")])
def test_a_message_without_end_is_refused_in_bounded_memory(
    first: str, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and in many between quotes; the pieces would never end."""
    monkeypatch.setattr(messages, "MOST_CHARS", 1000)
    endless = chain([first], iter(lambda: later, None))
    with pytest.raises(InputError, match="more than 1 000 characters"):
        list(messages.piped(endless))


# ---- commands


def test_the_commands_are_these_and_help_shows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the list of the design."""
    named = "help clear system set show stats cache save load regen undo bye recall continue edit history fork"
    assert set(COMMANDS) == set(named.split())
    assert set(ALIASES.values()) <= set(COMMANDS)
    converse(chat := FakeChat(), "/help")
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.startswith(f"/{name} {command.arguments}".strip()) and command.help in line for line in lines)
    assert chat.calls == []
    page = (Path(__file__).parents[1] / "docs" / "chat.md").read_text(encoding="utf-8")
    assert "\n".join(["```text", *lines, "```"]) in page, "the page shows the help as it is"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/hlep", "There is no command /hlep: did you mean /help?"),
        ("/hi", "There is no command /hi: did you mean /history?"),
        ("/zzz what is this", "There is no command /zzz: /help lists them."),
        ("/", "There is no command /: /help lists them."),
        ("/usr/bin/python is slow", "There is no command /usr/bin/python"),
        ("/clear all", "/clear takes nothing more, you gave 'all'."),
        ("/load", "/load needs more: /load NAME."),
        ("/set", "/set needs more: /set NAME VALUE."),
        ("/set temprature 1", "There is no 'temprature' to set: did you mean temperature?"),
        ("/set wings 2", "There is no 'wings' to set: known are temperature, top_p"),
        ("/set temperature hot", "temperature cannot be 'hot'; 0 takes the most likely token."),
        ("/set temperature", "temperature cannot be ''"),
        ("/set temperature -1", "temperature must be a number of at least 0, you gave -1."),
        ("/set top_k 1.5", "top_k cannot be '1.5'"),
        ("/set top_k true", "top_k cannot be 'true'"),
        ("/set max_tokens 0", "max_tokens must be a whole number of at least 1, you gave 0."),
        ("/set recall perhaps", "recall cannot be 'perhaps'; auto or off: in a chat"),
        ("/set stop [1]", "stop cannot be '[1]'"),
        ("/undo x", "/undo takes a whole number of at least 1, you gave 'x'."),
        ("/undo 0", "/undo takes a whole number of at least 1, you gave '0'."),
        ("/undo", "Cannot take 1 turns back: there are 0."),
        ("/regen twice", "/regen takes nothing more than rebuild, you gave 'twice'."),
        ("/edit 1", "/edit 1 needs what to say instead: /edit 1 TEXT."),
        ("/edit one two", "/edit takes a whole number"),
        ("/history all", "/history takes a whole number"),
    ],
)
def test_what_a_command_cannot_do_is_said_in_one_line_and_the_prompt_goes_on(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it is sent to the model, nothing is set, and the next message is answered."""
    converse(chat := FakeChat(), line, "1 word")
    out, err = capsys.readouterr()
    assert err.startswith(f"streamllm: {says}")
    assert err.count("\n") == 1
    assert (out, sent(chat)) == ("word1\n", ["1 word"])
    assert (chat.sampling, chat.max_tokens, chat.stop, chat.recall) == (SamplingConfig(), None, (), "auto")


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("/clear", ("clear",)),
        ("/system Be brief.  Be kind.", ("set_system", "Be brief.  Be kind.")),
        ("/system -", ("set_system", None)),
        ("/system\nBe brief.\nBe kind.", ("set_system", "Be brief.\nBe kind.")),
        ("/edit 2\nsay this", ("edit", 2, "say this")),
        ("/undo", ("undo", 1, False)),
        ("/undo 2", ("undo", 2, False)),
        ("/undo rebuild", ("undo", 1, True)),
        ("/undo 2 rebuild", ("undo", 2, True)),
        ("/regen", ("regenerate", False)),
        ("/regen rebuild", ("regenerate", True)),
        ("/continue", ("resume",)),
        ("/edit 2 say  this", ("edit", 2, "say  this")),
        ("/history", ("history", 5)),
        ("/history 9", ("history", 9)),
        ("/recall red box", ("search", "red box", 3)),
        ("/save mine", ("fork", "mine")),
        ("/fork mine", ("fork", "mine")),
        ("  /clear  ", ("clear",)),
    ],
)
def test_a_command_asks_the_conversation_for_what_it_says(line: str, call: tuple[Any, ...]) -> None:
    converse(chat := FakeChat(), "one", "two", line)
    assert chat.calls[2:] == [call]


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("/set temperature 0", {"sampling": SamplingConfig(temperature=0)}),
        ("/set top_p 0.5", {"sampling": SamplingConfig(top_p=0.5)}),
        ("/set top_k 7", {"sampling": SamplingConfig(top_k=7)}),
        ("/set min_p 0.1", {"sampling": SamplingConfig(min_p=0.1)}),
        ("/set repetition_penalty 1.1", {"sampling": SamplingConfig(repetition_penalty=1.1)}),
        ("/set seed 3", {"sampling": SamplingConfig(seed=3)}),
        ("/set seed none", {"sampling": SamplingConfig()}),
        ("/set max_tokens 9", {"max_tokens": 9}),
        ("/set max_tokens none", {"max_tokens": None}),
        ("/set recall off", {"recall": "off"}),
        ("/set endless on", {"on_end": "pass"}),
        ("/set endless false", {"on_end": "stop"}),
        ("/set stop The End", {"stop": ("The End",)}),
        (r'/set stop ["\n\n", "END"]', {"stop": ("\n\n", "END")}),
        ("/set stop 12", {"stop": ("12",)}),
        ("/set stop none", {"stop": ()}),
    ],
)
def test_set_changes_what_it_names(line: str, want: dict[str, Any]) -> None:
    converse(chat := FakeChat(), line)
    assert {name: getattr(chat, name) for name in want} == want


def test_a_reply_without_end_never_draws_an_end_token_where_turns_have_a_template() -> None:
    chat = FakeChat()
    chat.is_plain = False
    converse(chat, "/set endless on")
    assert chat.on_end == "ban"


def test_show_lists_what_is_in_force(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import streamllm.doctor

    monkeypatch.setattr(streamllm.doctor, "sizes", lambda _: "4 sinks + 200 window")
    converse(FakeChat(session="box"), "/system Be kind.", "/set temperature 0", "/set stop x", "1 word", "/show")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert rows["model"] == "fake"
    assert rows["conversation"] == "session 'box': 1 turn so far"
    assert rows["system"] == "Be kind."
    assert (rows["temperature"], rows["top_p"], rows["seed"], rows["max_tokens"]) == ("0", "0.95", "none", "none")
    assert (rows["stop"], rows["endless"], rows["recall"]) == ('["x"]', "off", "auto")


def test_what_recall_finds_is_shown_and_goes_in_front_of_the_next_message_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    converse(chat := FakeChat(), "/recall red boxes", "what of them?", "and now?", "/recall x", "/recall", "so")
    found = [call[2] for call in chat.calls if call[0] == "send"]
    assert [passage.text for passage in found[0]] == ["They spoke\nof red boxes."]
    assert found[1:] == [None, None]
    assert capsys.readouterr().out.startswith("turn 3, you: They spoke of red boxes.\nword1")


@pytest.mark.parametrize(
    ("window", "kept", "says"), [(90, [3, 5], "as many as fit, 2 of them, go"), (24, [], "none of")]
)
def test_what_recall_finds_leaves_room_in_the_window(
    window: int, kept: list[int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: quotations of 4 tokens and their words, within a third of the window; the best goes before others."""
    found = [Passage(number, 1, "user", "word " * words, 9) for number, words in ((3, 15), (4, 25), (5, 5))]
    monkeypatch.setattr(FakeChat, "search", lambda *_, **__: found)
    notes: list[str] = []
    monkeypatch.setattr(Screen, "note", lambda _, text: notes.append(text))
    chat = FakeChat()
    chat.cache.config.window = window
    converse(chat, "/recall word", "1 word")
    assert notes[0].startswith(says)
    assert [passage.id for passage in chat.calls[-1][2] or ()] == kept


def test_what_was_found_is_still_there_when_a_message_fails() -> None:
    class Refusing(FakeChat):
        def send(self, text: str, *, recall: Any = None, progress: Any = None) -> Any:
            if text == "no":
                raise InputError("Say it in other words.")
            return super().send(text, recall=recall)

    converse(chat := Refusing(), "/recall red", "no", "yes")
    assert len(chat.calls[-1][2]) == 1


def test_history_shows_turns_and_which_have_left(capsys: pytest.CaptureFixture[str]) -> None:
    chat = FakeChat()
    chat.turns_evicted = 1
    converse(chat, "one", "two", "/history")
    shown = capsys.readouterr().out.split("\n", 2)[2]
    assert shown == "turn 1 (left the window)\n>>> one\nreply 1\n\nturn 2\n>>> two\nreply 2\n\n"


# ---- sessions


def test_save_goes_on_in_the_copy_and_closes_what_was_before() -> None:
    talk = converse(chat := FakeChat(), "one", "/save mine", "two")
    assert talk.chat is not chat
    assert (chat.is_closed, chat.texts, talk.chat.session.name, talk.chat.texts) == (
        True,
        ["one"],
        "mine",
        ["one", "two"],
    )


def test_fork_goes_on_where_it_was() -> None:
    talk = converse(chat := FakeChat(), "one", "/fork mine", "two")
    assert talk.chat is chat
    assert (chat.is_closed, chat.texts) == (False, ["one", "two"])


@pytest.mark.parametrize("command", ["save", "fork", "load"])
def test_the_session_that_goes_on_is_not_named_as_one_of_another_process(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = converse(FakeChat(session="mine"), "one", f"/{command} mine")
    assert capsys.readouterr().err == "streamllm: This is session 'mine' already.\n"
    assert ("fork", "mine") not in talk.chat.calls


def test_load_goes_on_with_a_session_but_never_drops_what_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    talk = converse(chat := FakeChat(), "one", "/load box", "/save mine", "/load mine", "/load box", "two")
    assert (talk.chat.session.name, talk.chat.texts) == ("box", ["two"])
    assert chat.is_closed
    assert capsys.readouterr().err == (
        "streamllm: This conversation is not kept: /save NAME keeps it, /clear gives it up; then /load.\n"
        "streamllm: This is session 'mine' already.\n"
    )


def test_a_session_that_cannot_be_opened_leaves_the_conversation_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str) -> Any:
        raise ConfigError(f"There is no session {name!r}.")

    talk = talk_of(chat := FakeChat())
    talk.open_chat = refuse
    Repl(talk, partial(next, iter(["/load x", "1 word"]), None), is_interactive=False).run()
    assert (talk.chat, chat.is_closed) == (chat, False)
    assert capsys.readouterr() == ("word1\n", "streamllm: There is no session 'x'.\n")


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit"])
def test_bye_leaves(line: str) -> None:
    converse(chat := FakeChat(), line, "never said")
    assert chat.calls == []


# ---- replies


def test_a_full_disk_in_a_reply_is_one_line_and_the_prompt_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    converse(chat := FakeChat(), "full", "1 word")
    assert capsys.readouterr() == ("word1 word2 \nword1\n", "streamllm: The disk is full.\n")
    assert sent(chat) == ["full", "1 word"]


def test_notes_of_the_conversation_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    chat = FakeChat()
    chat.notes = ["The model has no chat template."]
    converse(chat, "1 word", "1 word")
    assert capsys.readouterr().err == "The model has no chat template.\n"


def test_a_warning_that_comes_with_each_reply_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(FakeChat):
        def send(self, text: str, **options: Any) -> Any:
            warnings.warn("Decoding is not compiled.", StreamLLMWarning, stacklevel=1)
            return super().send(text, **options)

    with told(Screen()):
        converse(Slow(), "1 word", "1 word")
    assert capsys.readouterr().err == "Decoding is not compiled.\n"


def test_statistics_name_what_was_seen_cached_evicted_and_recalled(capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the line of the design, and the record's own words for the turns that left."""
    chat = FakeChat()
    chat.evicts = (3, 4)
    converse(chat, "/recall x", "1 word", shows_stats=True)
    line = "seen 81 920 · cached 1 024 · evicted 80 896 · recalled 1 · 43 tok/s"
    assert capsys.readouterr().err == f"{line}\nturns (3, 4) left\n"


def test_statistics_of_a_message_that_was_broken_off_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was drawn, so the counts are the record's, and the speeds of the reply before say nothing."""
    chat = FakeChat()
    chat.signal = signal.SIGINT
    with Signals() as signals:
        signals.defer(presses=3)
        talk = converse(chat, "2 words", "100 steps", is_interactive=True, signals=signals, shows_stats=True)
        talk.chat.record.tokens_seen = 90_000
        converse(chat, "/stats")
    err, out = (text.splitlines() for text in reversed(capsys.readouterr()))
    assert err[0].endswith("tok/s")
    assert err[1] == "seen 81 920 · cached 1 024 · evicted 80 896 · recalled 0"
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out[-9:])
    assert (rows["read"], rows["generated"], rows["seen"].split(" tokens")[0]) == ("3 tokens", "0 tokens", "90 000")


def test_stats_shows_what_the_last_reply_has_cost(capsys: pytest.CaptureFixture[str]) -> None:
    converse(FakeChat(), "/stats", "2 words", "/stats")
    before, *table = capsys.readouterr().out.splitlines()
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in table[1:])
    assert before == "there is no reply yet since this began, or it was taken back"
    assert rows["generated"] == "2 tokens, 43.0 tok/s"
    assert rows["recalled"] == "nothing"


def test_json_is_one_object_a_line_and_each_message_ends_with_a_record_or_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    converse(FakeChat(), "2 words", "/nope", "/system", "/stats", "full", is_json=True)
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [found["type"] for found in objects]
    assert kinds == ["token", "token", "record", "error", "text", "text", "token", "token", "error"]
    assert [found["text"] for found in objects[:2]] == ["word1 ", "word2"]
    assert (objects[2]["finish"], objects[2]["tokens_generated"]) == ("end", 2)
    assert objects[4]["text"] == "(no system prompt)"


def test_a_reply_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences, a bell and the eight-bit forms; line ends, tabs and letters stay."""
    talk = talk_of(FakeChat())
    evil = "\x1b]52;c;aGk=\x07 \x9b31m a\tb\né😀"
    assert talk.shown(evil) == evil, "a pipe gets what the model wrote"
    talk.answer.is_terminal = True
    assert talk.shown(evil) == "�]52;c;aGk=� �31m a\tb\né😀"


def test_what_was_recalled_cannot_steer_the_terminal_either(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named on stderr."""
    found = [Passage(1, 3, "assistant", "\x1b]52;c;aGk=\x07 \x9b31m a\tb", 9)]
    monkeypatch.setattr(FakeChat, "search", lambda *_, **__: found)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    talk = talk_of(FakeChat())
    Repl(talk, partial(next, iter(["/recall x", "1 word"]), None), is_interactive=False).run()
    assert "recalled from turn 3, reply: �]52;c;aGk=� �31m a b" in capsys.readouterr().err


@pytest.mark.parametrize(("unit", "said"), [("words", ["word1 ", "word2 "]), ("steps", [])])
@pytest.mark.parametrize(
    ("number", "is_interactive", "goes_on"),
    [(signal.SIGINT, True, True), (signal.SIGINT, False, False), (signal.SIGTERM, True, False)],
)
def test_a_signal_stops_reading_and_writing_and_only_ctrl_c_at_a_prompt_comes_back(
    number: int, is_interactive: bool, goes_on: bool, unit: str, said: list[str]
) -> None:
    """The word that was drawn when the signal came is shown and stays; of a message that is read no more is read."""
    chat = FakeChat()
    chat.signal = number
    with Signals() as signals:
        signals.defer(presses=3)
        converse(chat, f"100 {unit}", "1 word", is_interactive=is_interactive, signals=signals)
    assert sent(chat) == [f"100 {unit}", "1 word"][: 2 if goes_on else 1]
    assert chat.said == said + ["word1 "] * goes_on


def test_the_spinner_follows_the_reading_and_is_gone_before_the_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(Screen, "spin_later", lambda _, text: happened.append(text))
    monkeypatch.setattr(Screen, "settle", lambda _: happened.append("gone"))
    monkeypatch.setattr(Answer, "write", lambda _, text: happened.append(text) is None)
    talk_of(FakeChat()).send("2 steps")
    steps = ["reading", "reading · 1 of 3 tokens", "reading · 2 of 3 tokens"]
    assert happened[:7] == [*steps, "gone", "word1 ", "gone", "word2"]


def test_the_last_of_several_presses_ends_the_process_and_a_prompt_begins_to_count_anew(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Signals() as signals:
        signals.defer("once more", presses=3)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err == ""
            signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err == "\nonce more\n"
            assert signals.forget()
            assert signals.received is None
        assert not signals.forget()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert not signals.forget(), "what ends the process is not taken back"
        assert signals.received == signal.SIGTERM
        with pytest.raises(SystemExit) as leaving:
            signal.raise_signal(signal.SIGINT)
        assert leaving.value.code == 130


def test_when_nobody_reads_the_replies_the_prompt_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        converse(chat := FakeChat(), "5 words", "never said")
        assert sent(chat) == ["5 words"]
        assert chat.said == ["word1 "]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_replies_that_cannot_be_written_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(StreamLLMError, match="Standard output cannot be written: No space left"):
            converse(chat := FakeChat(), "5 words", "never said")
        assert sent(chat) == ["5 words"]


# ---- completion


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("/sh", ["/show"]),
        ("/s", ["/system", "/set", "/show", "/stats", "/save"]),
        ("/", [f"/{name}" for name in COMMANDS]),
        ("/set to", ["top_p", "top_k"]),
        ("/load b", ["books", "box"]),
        ("/load books ", []),
        ("/regen ", ["rebuild"]),
        ("//s", []),
        ("so", []),
        ("", []),
    ],
)
def test_commands_and_their_arguments_are_completed(text: str, want: list[str]) -> None:
    talk = talk_of(FakeChat(), list_names=lambda: ["books", "box", "crate"])
    assert [word for word, _ in completions(talk, text)] == want


# ---- the strip


@given(
    width=st.integers(0, 300),
    pinned=st.integers(0, 500),
    window=st.integers(1, 5000),
    free=st.integers(0, 5000),
    evicted=st.integers(0, 10**9),
)
def test_the_strip_is_as_wide_as_the_terminal_and_true(
    width: int, pinned: int, window: int, free: int, evicted: int
) -> None:
    """Reference: the parts that must show, and that what is drawn full is full and what is drawn empty is empty."""
    line = draw(
        width, pinned=pinned, cached=pinned + window, capacity=pinned + window + free, evicted=evicted, signs=ASCII
    )
    assert len(line) == max(width, 12)
    parts = line.strip("|").split("|")
    assert len(parts) == 1 + (pinned > 0) + (evicted > 0)
    if pinned:
        assert set(parts[0]) == {"#"}
    if evicted:
        assert "." in parts[-2] or str(evicted)[:1] in parts[-2]
        assert f" {evicted:,} evicted ".replace(",", " ") in parts[-2] or width < 73  # a third of it is for this
    assert set(parts[-1]) <= {"=", "-"}
    assert ("-" in parts[-1]) == (free > 0)
    assert "=" in parts[-1] or len(parts[-1]) < 2


def test_the_strip_is_to_scale() -> None:
    """Reference: by hand. 100 pinned of 400, half of the window filled, in 42 cells."""
    line = draw(43, pinned=100, cached=250, capacity=400, evicted=0, signs=ASCII)
    assert line == "|" + "#" * 10 + "|" + "=" * 15 + "-" * 15 + "|"
    line = draw(64, pinned=100, cached=250, capacity=400, evicted=80_896, signs=ASCII)
    assert line == "|" + "#" * 10 + "|.. 80 896 evicted ..|" + "=" * 15 + "-" * 15 + "|"


def test_cache_draws_the_strip_and_says_it_in_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 pinned and 200 held of 400. Where the output is not UTF-8 it is plain ASCII."""
    chat = FakeChat()
    chat.turns_evicted, chat.texts = 3, ["said"] * 8
    converse(chat, "/cache")
    line, numbers = capsys.readouterr().out.splitlines()
    assert len(line) == 80
    assert numbers == "pinned 4, evicted 80 896, 3 of 8 turns, window 200 of 400 tokens"
    talk = talk_of(chat)
    talk.answer.is_unicode = False
    Repl(talk, partial(next, iter(["/cache"]), None), is_interactive=False).run()
    assert capsys.readouterr().out.splitlines()[0].isascii()
