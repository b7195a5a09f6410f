"""The evaluation of recall: its facts against their words, its places against the tokens of the stream, its counts."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import signal
import string
from pathlib import Path
from typing import Any

import pytest

import streamllm
from stories import STORIES
from streamllm import Chat, SamplingConfig
from streamllm.console import Screen, Signals
from streamllm.errors import ConfigError, InputError
from streamllm.evaluate import chatter as chatter_module
from streamllm.evaluate import haystack
from streamllm.evaluate.asked import pool, summarise
from streamllm.evaluate.chatter import LONGEST, Chatter, beginning
from streamllm.evaluate.desk import Desk, Interrupted
from streamllm.evaluate.facts import IDLE, MOST, NAMES, THINGS, Fact, draw_facts
from streamllm.evaluate.interview import Interview
from streamllm.evaluate.recall import Recall
from streamllm.evaluate.text import packaged_text
from streamllm.passages import LEAST

GRAMMAR = re.compile(r"\b(a|in|is|of|the|to|s|what|which|who|where|when|how|did|does|do|can|i|for)\b")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return streamllm.load(STORIES)


@pytest.fixture(scope="module")
def chatter() -> Chatter:
    return Chatter(packaged_text().read_text(encoding="utf-8"))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", GRAMMAR.sub("", text.lower())))


# ---- the facts


def test_facts_compete_and_each_has_one_answer() -> None:
    """Reference: the words of the sentences; the answer stands in the statement alone, all others are shared."""
    facts = draw_facts(random.Random(1), MOST)
    assert draw_facts(random.Random(1), MOST) == facts != draw_facts(random.Random(2), MOST)
    assert len({fact.question for fact in facts}) == len({fact.reworded for fact in facts}) == MOST
    for fact in facts:
        (subject,) = [name for name in (*NAMES, *THINGS) if re.search(rf"\b{name}\b", fact.statement)]
        assert fact.is_answered_by(fact.statement)
        for question in (fact.question, fact.reworded):
            assert question.endswith("?")
            assert words(subject) <= words(question)
            assert not fact.is_answered_by(question)
        assert words(fact.reworded) & words(fact.statement) == words(subject)
        others = [words(other.statement) for other in facts if other != fact]
        assert words(fact.statement) - {fact.answer.lower()} <= set().union(*others)


def test_a_few_facts_are_about_people_and_things() -> None:
    """Reference: by hand."""
    for count in (1, 2, 7):
        facts = draw_facts(random.Random(0), count)
        about = [any(name in fact.statement for name in NAMES) for fact in facts]
        assert (len(facts), sum(about)) == (count, count // 2)


@pytest.mark.parametrize(
    ("text", "is_answer"),
    [("It is 4711.", True), ("Bread and BUTTER", False), ("no. butt", True), ("47110", False), ("", False)],
)
def test_an_answer_is_a_word_of_its_own(text: str, is_answer: bool) -> None:
    """Reference: by hand."""
    answer = "4711" if any(digit in text for digit in string.digits) else "Butt"
    assert Fact("", "", "", answer).is_answered_by(text) == is_answer


# ---- the talk between


def test_talk_goes_on_as_the_text_does() -> None:
    """Reference: all runs of three words of the text; sentences begin and end where those of the text do."""
    text = "The cat saw a dog. The dog saw a cat run! A cat saw a bird run to the dog. Who saw the dog run?"
    known = set(zip(*(text.split()[place:] for place in range(3)), strict=False))
    maker, draw = Chatter(text), random.Random(0)
    said = [maker.sentence(draw) for _ in range(300)]
    assert len(set(said)) > 5
    assert not set(said) <= {"The cat saw a dog.", "The dog saw a cat run!"}
    for sentence in said:
        split = sentence.split()
        assert set(zip(*(split[place:] for place in range(3)), strict=False)) <= known
        assert sum(word[-1] in ".!?" for word in split) == 1
        assert split[-1][-1] in ".!?"
        assert split[0] in ("The", "A", "Who")
    assert [Chatter(text).sentence(random.Random(7)) for _ in range(9)] == [maker.sentence(random.Random(7))] * 9


def test_talk_is_as_long_as_it_is_asked_to_be(chatter: Chatter) -> None:
    """Reference: the characters; less than one sentence more."""
    draw = random.Random(0)
    for chars in (1, 100, 600):
        text = chatter.talk(draw, chars)
        assert chars <= len(text) < chars + LONGEST * 20


def test_a_text_that_ends_in_the_middle_still_gives_sentences() -> None:
    """Reference: by hand; the last words of the text have nothing behind them."""
    assert Chatter("Once there was").sentence(random.Random(0)) == "Once there was."
    endless = Chatter("go and " * 100).sentence(random.Random(0))
    assert endless == " ".join(["go", "and"] * (LONGEST // 2)) + "."


def test_a_text_without_sentences_is_refused() -> None:
    """Reference: by hand."""
    for text in ("", "One. Two. Three. Four."):
        with pytest.raises(InputError, match="The text has no sentence of three words; give another one with --data"):
            Chatter(text)


def test_only_the_beginning_of_a_text_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand; what comes later is not even read."""
    monkeypatch.setattr(chatter_module, "LEARNT", 7)
    pieces = iter(["abc", "defg", "h"])
    assert beginning(pieces) == "abcdefg"
    assert next(pieces) == "h"
    assert beginning(["abcdefghi"]) == "abcdefg"
    assert beginning(["ab"]) == "ab"


# ---- one conversation


class Noted(Interview):
    """An interview that notes what it asks: fact, tokens of the stream, and turns."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.noted: list[tuple[int, int, int]] = []

    def _ask(self, place: int, number: int, seen: int, **wording: bool) -> Any:
        self.noted.append((number, seen, self.chat.turns))
        return super()._ask(place, number, seen, **wording)


def make_chat(loaded: tuple[Any, Any], window: int = 120) -> Chat:
    greedy = SamplingConfig(temperature=0)
    return Chat(*loaded, window=window, block=16, recall="off", snapshots=0, sampling=greedy)


def test_questions_come_at_their_distances_and_leave_nothing_behind(loaded: tuple[Any, Any], chatter: Chatter) -> None:
    """Reference: the tokens of the transcript, added up; it holds the facts and other talk, and no question."""
    facts, distances = draw_facts(random.Random(3), 6), (0, 300, 1000)
    with make_chat(loaded) as chat:
        interview = Noted(chat, facts, distances, chatter, random.Random(0), 0)
        watched: list[int] = []
        asked = interview.lead(watched.append)
        turns = list(chat.history())
        read = list(itertools.accumulate(turn.prompt_tokens + turn.reply_tokens for turn in turns))
    found = [
        (each.distance, number, each.is_reworded) for each, (number, *_) in zip(asked, interview.noted, strict=True)
    ]
    assert sorted(found) == sorted(itertools.product(distances, range(6), (False, True)))
    longest = max(end - begin for begin, end in itertools.pairwise([0, *read]))
    for each, (number, seen, turn) in zip(asked, interview.noted, strict=True):
        assert each.tokens == read[turn - 1] - read[number]
        assert seen == read[turn - 1] - 1  # the last one waits to be read
        assert each.distance <= each.tokens < each.distance + longest
        assert each.answers is None
    for turn, fact in zip(turns, facts, strict=False):
        assert fact.statement in turn.user
    assert [turn.user.endswith(fact.statement) for turn, fact in zip(turns, facts, strict=False)].count(False) == 3
    for turn in turns:
        assert not any(question in turn.user for fact in facts for question in (fact.question, fact.reworded))
        assert turn.user not in IDLE
        assert (turn.reply, turn.preface) == ("", "")
    assert watched == [tokens - 1 for tokens in read]


def test_what_is_said_to_be_there_without_recall_is_in_the_cache(loaded: tuple[Any, Any], chatter: Chatter) -> None:
    """Reference: how far back the fact lies, in tokens up to the question's end, against what a cache can hold."""
    facts, distances = draw_facts(random.Random(4), 8), (0, 40, 90, 200, 400)
    _, tokenizer = loaded
    with make_chat(loaded, window=160) as chat:
        interview = Noted(chat, facts, distances, chatter, random.Random(0), 0)
        asked = interview.lead(lambda tokens: None)
        lengths = [turn.prompt_tokens for turn in chat.history()]
        window, capacity = chat.cache.config.window, chat.cache.capacity
    sure = {True: 0, False: 0}
    for each, (number, *_) in zip(asked, interview.noted, strict=True):
        question = facts[number].reworded if each.is_reworded else facts[number].question
        behind = each.tokens + len(tokenizer(question, add_special_tokens=False)["input_ids"])
        if behind + lengths[number] + 1 <= window // 2:  # whole turns leave early, up to half of the window
            assert each.is_held
            assert each.is_found or each.added  # recall may push it out, and says what it added
            sure[True] += 1
        if behind > capacity:
            assert not each.is_held
            assert each.is_found == (each.right > 0)
            sure[False] += 1
    assert min(sure.values()) > 5


def test_recall_finds_what_was_told_and_says_what_it_cost(loaded: tuple[Any, Any], chatter: Chatter) -> None:
    """Reference: the question asked by hand in the same conversation: passages, tokens, and the reply's text."""
    facts = draw_facts(random.Random(5), 10)
    with make_chat(loaded, window=440) as chat:
        interview = Noted(chat, facts, (1200,), chatter, random.Random(0), 6)
        asked = interview.lead(lambda tokens: None)
        assert sum(each.right for each in asked if not each.is_reworded) >= 4
        assert not any(each.is_held for each in asked)
        # The last question comes after the last turn, so the conversation is as it was.
        last, number = asked[-1], interview.noted[-1][0]
        question = facts[number].reworded if last.is_reworded else facts[number].question
        replies = {}
        for recall in ("off", "auto"):
            with chat.fork() as copy:
                copy.recall = recall  # type: ignore[assignment]
                reply = copy.send(question, max_tokens=6)
                replies[recall] = (reply.read, reply.recalled, reply.text())
    passages = replies["auto"][1]
    assert (last.recalled, last.added) == (len(passages), replies["auto"][0] - replies["off"][0])
    holding = [passage for passage in passages if passage.turn == number + 1 and facts[number].answer in passage.text]
    assert last.right == len(holding)
    assert last.answers == tuple(facts[number].is_answered_by(replies[recall][2]) for recall in ("off", "auto"))
    assert all((each.added > 0) == (each.recalled > 0) for each in asked)
    assert all(each.search > -1 < each.wait for each in asked)


# ---- searching alone


def test_a_search_alone_finds_the_facts_of_a_long_transcript(loaded: tuple[Any, Any], chatter: Chatter) -> None:
    """Reference: the same passages written by hand, and searched by the function that conversations use."""
    _, tokenizer = loaded
    facts, seen = draw_facts(random.Random(0), 12), []
    found = haystack.measure(tokenizer, facts, chatter, random.Random(0), 8000, seen.append)
    assert found["tokens"] == seen[-1] >= 8000
    assert seen == sorted(seen)
    assert found["turns"] == len(seen)
    assert found["searches"] == 24 + haystack.SENTENCES
    assert 0 < found["ms"]["median"] <= found["ms"]["p95"] <= found["ms"]["max"]
    assert found["found"]["of"] == 12
    assert 11 <= found["found"]["own"] <= 12
    assert 0 < found["found"]["other"] <= found["found"]["own"]


# ---- counts


def asked(distance: int = 1000, **changes: Any) -> dict[str, Any]:
    usual = {
        "distance": distance,
        "tokens": distance + 5,
        "is_reworded": False,
        "is_held": False,
        "is_found": True,
        "recalled": 2,
        "right": 1,
        "added": 40,
        "search": 0.002,
        "wait": 0.01,
        "answers": (False, True),
        "idle": 0,
    }
    return {**usual, **changes}


def test_questions_are_counted() -> None:
    """Reference: by hand."""
    found = summarise(
        [asked(), asked(is_reworded=True, is_found=False, right=0, idle=3, added=10, tokens=1100), asked()]
    )
    assert found == {
        "tokens": [1005, 1100],
        "held": [0, 3],
        "found": [2, 3],
        "own": [2, 2],
        "other": [0, 1],
        "right": [2, 6],
        "answered": {"without": [0, 3], "with": [3, 3]},
        "added": {"mean": 30, "max": 40},
        "search_ms": 2,
        "wait_ms": 10,
        "idle": {"mean": 1, "max": 3},
    }
    assert summarise([asked(answers=None)])["answered"] == {"without": [0, 0], "with": [0, 0]}
    assert pool([[1, 2], [3, 4]]) == [4, 6]
    assert pool([]) == [0, 0]


def figures_of(**distances: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "cache": {"sinks": 4, "window": 252, "block": 64, "capacity": 319},
        "distances": {name.removeprefix("at_"): summarise(some) for name, some in distances.items()},
        "search": {"tokens": 1_000_000, "ms": {"median": 0.5, "p95": 12.34, "max": 30.0}},
    }


def test_the_verdict_says_what_is_found_and_what_it_costs() -> None:
    """Reference: by hand, for counts that are made up."""
    near = [asked(0, is_held=True, recalled=0, right=0, answers=(True, True))] * 100
    far = [asked(1000)] * 97 + [asked(1000, is_found=False, right=0)] * 3
    other = [asked(5000, is_reworded=True, idle=2)] * 40 + [asked(5000, is_reworded=True, is_found=False, right=0)] * 60
    said = Recall.verdict(figures_of(at_0=near, at_1000=far, at_5000=other))
    assert said.startswith(
        "Beyond the window of 252 tokens recall finds 97.0% (91.5-99.0) of the facts that are asked for in their own "
        "words (97% at the worst distance; target: 95%) and 40.0% (30.9-49.8) of those asked for in other words; "
        "without it 0.0% (0.0-1.9) are there. Recall adds 40 tokens and 10 ms to a question; 34.2% (29.8-39.0) of the "
        "passages are the right ones. A turn that asks for nothing gets 0.40 passages, at most 2 (target: 1). "
        "A search in 1,000,000 tokens takes 0.5 ms, and 12.3 ms or less in 95 of 100 cases (target: 20 ms). "
    )
    assert said.endswith("It answers 100.0% (98.1-100.0) of the questions with recall, and 0.0% (0.0-1.9) without.")
    unable = [asked(0, is_held=True, recalled=0, right=0, answers=(False, False))] * 100
    said = Recall.verdict(figures_of(at_0=unable, at_1000=far))
    assert said.endswith(
        "This model answers 0.0% (0.0-3.7) about what is in the window: its answers say nothing of recall."
    )
    said = Recall.verdict(figures_of(at_1000=[asked(recalled=0, right=0, is_found=False, answers=None)]))
    assert "Nothing was recalled." in said
    assert said.endswith("(target: 20 ms).")
    assert Recall.verdict(figures_of(at_0=near)).startswith("No question is asked beyond the cache of 319 tokens: ")


def test_rows_and_figure_show_what_there_is() -> None:
    """Reference: by hand; of nothing there is no share."""
    figures = figures_of(at_0=[asked(0, is_held=True, recalled=0, right=0, tokens=0)], at_1000=[asked(search=-0.00001)])
    _, near, far = Recall.rows(figures)
    assert near[:3] == ("at once", "1", "100.0% (20.7-100.0)")
    assert near[4:7] == ("", "", "0.00")
    assert far[0] == "1,000"
    assert far[5:10] == ("50.0% (9.5-90.5)", "2.00", "0.00, at most 0", "40", "0.0 ms")
    shares, times = Recall.draw(figures).axes
    assert [label.get_text() for label in shares.get_xticklabels()] == ["at once", "1,000"]
    assert max(times.lines[0].get_xdata()) == 1005


# ---- the command


def make_desk(loaded: tuple[Any, Any], out: Path, *files: str) -> Desk:
    return Desk(*loaded, files, out, "recall", {}, Screen(quiet=True), Signals())


def run_with(desk: Desk, evaluation: Recall) -> dict[str, Any]:
    """The figures, with the desk's own report instead of a bar."""
    desk.work = lambda total: contextlib.nullcontext()  # type: ignore[method-assign]
    return evaluation.run(desk)


def without_times(figures: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: {key: value for key, value in each.items() if not key.endswith("_ms")}
        for name, each in figures["distances"].items()
    }
    return {**figures, "distances": found, "search": {**figures["search"], "ms": None}}


def test_what_was_measured_before_is_not_measured_again(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the evaluation in one go; a signal comes while the second conversation is led."""
    sizes: dict[str, Any] = {"answer_tokens": 2, "search_tokens": 2000, "window": 120, "block": 16}
    evaluation = Recall((0, 300), samples=2, facts=3, **sizes)
    whole = evaluation.run(make_desk(loaded, tmp_path / "whole"))
    assert [each["found"][1] for each in whole["distances"].values()] == [12, 12]
    desk = make_desk(loaded, tmp_path / "parts")

    def interrupt(done: int, words: str) -> None:
        if words.startswith("conversation 2"):
            desk.signals.received = signal.SIGINT

    desk._report = interrupt
    with pytest.raises(Interrupted):
        run_with(desk, evaluation)
    again, counted = make_desk(loaded, tmp_path / "parts"), []
    again._report = lambda done, words: counted.append(done)
    assert without_times(run_with(again, evaluation)) == without_times(whole)
    assert counted[0] == 300
    assert counted[-1] == 2 * 300 + 2000
    assert counted == sorted(counted)


def test_talk_is_made_after_the_files_that_are_given(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: a file of one sentence, which then stands between the facts and the questions."""
    text = tmp_path / "said.txt"
    sentence = "Zebras and quokkas doze at noon."
    text.write_text(f"{sentence}\n", encoding="utf-8")
    said: list[str] = []
    evaluation = Recall((60,), samples=1, facts=1, answer_tokens=0, search_tokens=50, window=120, block=16)
    original = Chat.send

    def send(chat: Chat, words: str, **options: Any) -> Any:
        said.append(words)
        return original(chat, words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chat, "send", send)
        evaluation.run(make_desk(loaded, tmp_path, str(text)))
    filler = next(words for words in said if len(words) > LEAST)
    assert set(filler.split()) == set(sentence.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"distances": ()}, "Give rising distances of at least 0 tokens, you gave []."),
        ({"distances": (5, 5)}, "you gave [5, 5]."),
        ({"distances": (-1, 5)}, "you gave [-1, 5]."),
        ({"samples": 0}, "samples must be a whole number of at least 1, you gave 0."),
        ({"facts": 0}, "facts must be"),
        ({"facts": MOST + 1}, f"There are {MOST} facts to tell in a conversation, you asked for {MOST + 1}."),
        ({"answer_tokens": -1}, "answer_tokens must be"),
        ({"search_tokens": 0}, "search_tokens must be"),
        ({"seed": -1}, "seed must be"),
        ({"window": 0}, "window must be"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    """Reference: by hand."""
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Recall(**options)
