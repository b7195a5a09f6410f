"""Recall: what left the window is found among any amount of other talk, what is in it never, and little else."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections import Counter

import pytest

from streamllm.passages import Passage, Place
from streamllm.recall import (
    BUDGET_TOKENS,
    COMMON_LEAST,
    COMMON_MOST,
    FUSION,
    MOST_QUOTED,
    MergedIndex,
    WordIndex,
    asks,
    matching,
    quote,
)
from streamllm.transcript import Transcript
from streamllm.words import terms
from talk import ASK_FOR_NOTHING, Fact, Talk, converse, count, make_facts, say

EVERYTHING = Place(10**9, 0)
"""A window that holds nothing."""


@functools.cache
def conversation(tokens: int) -> tuple[Transcript, list[Fact]]:
    """Facts among so many tokens of other talk; the tests only read it."""
    facts = make_facts({1_000: 6, 10_000: 40, 100_000: 120}[tokens])
    return converse(tokens, facts), facts


def conversing(*turns: tuple[str, str]) -> WordIndex:
    transcript = Transcript()
    for user, reply in turns:
        say(transcript, user, reply)
    return WordIndex(transcript)


def texts(passages: list[Passage]) -> list[str]:
    return [passage.text for passage in passages]


# ---- what is found


@pytest.mark.parametrize("tokens", [1_000, 10_000, 100_000])
def test_facts_told_at_any_distance_are_quoted_when_they_are_asked_for(tokens: int) -> None:
    """At least 95 of 100 questions find the passage where the fact was told, and little besides it."""
    transcript, facts = conversation(tokens)
    index = WordIndex(transcript)
    quoted = [(fact, matching(index, question, EVERYTHING, count=count)) for fact in facts for question in fact.asked]
    found = [any(fact.told in passage.text for passage in passages) for fact, passages in quoted]
    assert sum(found) >= 0.95 * len(found)
    assert sum(len(passages) for _, passages in quoted) <= 1.5 * len(quoted)
    assert max(count(quote(passages)) for _, passages in quoted) <= BUDGET_TOKENS


@pytest.mark.parametrize("tokens", [1_000, 10_000, 100_000])
def test_turns_that_ask_for_nothing_get_one_passage_at_most_and_mostly_none(tokens: int) -> None:
    transcript, _ = conversation(tokens)
    index, talk = WordIndex(transcript), Talk(seed=77)
    idle = [*ASK_FOR_NOTHING, *(talk.sentence() for _ in range(150)), *(talk.text(10) for _ in range(20))]
    quoted = [len(matching(index, text, EVERYTHING, count=count)) for text in idle]
    assert max(quoted) <= 1
    assert sum(quoted) <= 0.3 * len(quoted)


def test_facts_in_the_window_are_never_quoted_and_without_recall_none_would_be_known() -> None:
    """Reference: ``Place.has_left``. The window is drawn at random, also in the middle of a turn."""
    transcript, facts = conversation(10_000)
    index, draw = WordIndex(transcript), random.Random(5)
    told = {passage.id: passage for passage in transcript.passages(range(1, transcript.last_left(None) + 1))}
    for fact in facts:
        holder = next(passage for passage in told.values() if fact.told in passage.text)
        for place in (
            Place(holder.turn, holder.stop - 1),
            Place(draw.randint(1, transcript.count()), draw.randint(0, 90)),
        ):
            for passages in (
                matching(index, fact.asked[0], place, count=count),
                index.search(fact.asked[0], before=place, limit=50),
            ):
                assert all(place.has_left(told[passage.id]) for passage in passages)
        just_left = matching(index, fact.asked[0], Place(holder.turn, holder.stop), count=count)
        assert holder.id in {passage.id for passage in just_left}


def test_a_search_finds_the_passages_that_hold_a_word_and_no_others() -> None:
    """Reference: a regular expression over all passages."""
    transcript, _ = conversation(10_000)
    index = WordIndex(transcript)
    everything = transcript.passages(range(1, transcript.last_left(None) + 1))
    for word in ("baker", "Lisbon", "vodu", "greta", "nowhere"):
        found = index.search(word, limit=1000)
        wanted = {passage.id for passage in everything if re.search(rf"\b{word}\b", passage.text, re.IGNORECASE)}
        assert {passage.id for passage in found} == wanted
        assert [passage.score for passage in found] == sorted((passage.score for passage in found), reverse=True)
        assert all(transcript.passages([passage.id])[0].text == passage.text for passage in found)


def test_a_search_ranks_by_bm25() -> None:
    """Reference: BM25 as it is written in the literature (k1 = 1.2, b = 0.75), over the words of each passage."""
    draw, words = random.Random(2), "zorb quix flum brak nolp".split()
    turns = [
        " ".join(draw.choices([*words, "xav", "yem"], [1, 2, 3, 4, 5, 20, 20], k=draw.randint(3, 20)))
        for _ in range(60)
    ]
    index = conversing(*((text, "") for text in turns))
    documents = [Counter(text.split()) for text in turns]
    length = sum(document.total() for document in documents) / len(documents)

    def score(document: Counter[str], word: str) -> float:
        holders = sum(word in other for other in documents)
        weight = math.log((len(documents) - holders + 0.5) / (holders + 0.5))
        frequency = document[word]
        return weight * frequency * 2.2 / (frequency + 1.2 * (0.25 + 0.75 * document.total() / length))

    found = index.search("zorb quix flum", limit=1000)
    wanted = {
        number: sum(score(document, word) for word in ("zorb", "quix", "flum"))
        for number, document in enumerate(documents, 1)
        if document.keys() & {"zorb", "quix", "flum"}
    }
    assert {passage.turn for passage in found} == wanted.keys()
    assert [passage.score for passage in found] == pytest.approx(sorted(wanted.values(), reverse=True), rel=1e-6)
    assert [passage.score for passage in found] == pytest.approx([wanted[passage.turn] for passage in found], rel=1e-6)


def test_a_search_for_words_that_everybody_says_finds_the_newest_passages_with_all_of_them() -> None:
    index = conversing(*((f"it is the number {number}", "and so on") for number in range(COMMON_MOST // 4 + 50)))
    newest = index.transcript.count()
    assert [passage.turn for passage in index.search("the of it", limit=3)] == [newest, newest - 1, newest - 2]
    assert [passage.turn for passage in index.search("number", limit=2)] == [newest, newest - 1]
    assert index.search("of whom") == []
    assert index.search("?!") == []


@pytest.mark.parametrize(
    ("said", "sought"),
    [
        ("我的猫叫小白，住在北京。", "北京"),
        ("我的猫叫小白，住在北京。", "小白"),
        ("我的猫叫小白，住在北京。", "猫"),
        ("トムは東京の大学で働いています。", "東京の大学"),
        ("제 고양이는 부산에서 살아요.", "부산에서"),
        ("मेरी बिल्ली का नाम मोती है।", "बिल्ली"),
        ("แมวของฉันชื่อมะลิ", "มะลิ"),
        ("Das Café heißt Zur Brücke.", "cafe"),
        ("She baked three boxes of cookies.", "box"),
        ("The code is ＡＢＣ１２３.", "abc123"),
        ("The code is abc123.", "ＡＢＣ１２３"),
        ("It's in the file user_name-v2.txt!", "user_name"),
    ],
)
def test_words_are_found_in_any_script_and_form(said: str, sought: str) -> None:
    index = conversing(
        (said, "Noted."), ("你好，世界。这是另一句话。", "別の文です。"), ("Something else.", "다른 문장.")
    )
    assert texts(index.search(sought)) == [said]


def test_a_name_is_no_small_word_that_looks_like_its_stem() -> None:
    """Stemming makes "in" of "Ines"."""
    index = conversing(("Ines lives there.", ""), *(("A dog sleeps in the kitchen.", ""),) * (COMMON_LEAST + 1))
    assert texts(index.search("Ines")) == ["Ines lives there."]
    assert texts(index.worth_quoting("Where does Ines live?")) == ["Ines lives there."]


def test_marks_belong_to_words() -> None:
    """Two words of Hindi that differ in a vowel sign only."""
    index = conversing(("यह बोल है", ""), ("यह बिल है", ""))
    assert texts(index.search("बिल")) == ["यह बिल है"]


def test_letters_that_stand_apart_are_not_taken_for_a_word() -> None:
    """Letters are searched in pairs, in order."""
    assert terms("北京大学 ok") == ['"北 京"', '"京 大"', '"大 学"', '"ok"']
    assert conversing(("我住在北京。", "")).search("京北") == []


def test_chinese_facts_are_quoted_when_they_are_asked_for() -> None:
    facts = [(colour, thing) for colour in "红蓝绿黑白" for thing in ("箱子", "房子", "车子", "帽子")]
    index = conversing(
        *((f"{colour}色{thing}的密码是{number}。", "好的。") for number, (colour, thing) in enumerate(facts, 1000))
    )
    for number, (colour, thing) in enumerate(facts, 1000):
        assert f"{number}" in quote(matching(index, f"{colour}色{thing}的密码是什么？", EVERYTHING, count=count))
    assert matching(index, "谢谢", EVERYTHING, count=count) == []


# ---- what is quoted


def test_a_quotation_names_turn_and_speaker_in_order_on_one_line_each() -> None:
    passages = [Passage(9, 4, "assistant", " It is\n\n 4711. ", 3), Passage(2, 1, "user", "The code?", 3)]
    assert quote(passages) == ('(Earlier, turn 1, user: "The code?")\n(Earlier, turn 4, assistant: "It is 4711.")\n\n')
    assert quote([]) == ""


@pytest.mark.parametrize("budget", [0, 20, 40, 60, 100, 1000])
def test_a_quotation_keeps_to_its_budget_and_takes_the_best_first(budget: int) -> None:
    """Reference: the tokens of the whole quotation."""
    index = conversing(
        ("The code of the red box is 4711.", "Ok."),
        *((f"The code of the red box is not {number}, and it never was.", "Ok.") for number in range(9)),
        *((f"About {Talk(number).sentence()}", "Well.") for number in range(40)),
    )
    passages = matching(index, "What is the code of the red box?", EVERYTHING, count=count, budget_tokens=budget)
    assert count(quote(passages)) <= budget or not passages
    assert len(passages) == {0: 0, 20: 1, 40: 2, 60: 3, 100: 4, 1000: MOST_QUOTED}[budget]
    assert [passage.id for passage in passages] == sorted(passage.id for passage in passages)


def test_a_question_that_was_asked_before_brings_its_answer() -> None:
    index = conversing(
        ("What would be a good name for my bakery?", "How about Flour Power."),
        *((Talk(number).sentence(), Talk(number).sentence()) for number in range(60)),
    )
    reworded = matching(index, "Which name for my bakery did you suggest?", EVERYTHING, count=count)
    assert texts(reworded) == ["What would be a good name for my bakery?", "How about Flour Power."]
    small = matching(index, "Which name for my bakery did you suggest?", EVERYTHING, count=count, budget_tokens=20)
    assert texts(small) == ["What would be a good name for my bakery?"]
    repeated = matching(index, "what would be a good name for my bakery?", EVERYTHING, count=count)
    assert texts(repeated) == ["How about Flour Power."]
    assert texts(matching(index, "Which name for my bakery did you suggest?", Place(1, 19), count=count)) == [
        "What would be a good name for my bakery?"
    ]


def test_what_was_said_in_the_same_words_is_quoted_once_and_the_turn_itself_never() -> None:
    index = conversing(
        *(("The zebra is called Fritz.", "I see, the zebra is called Fritz.") for _ in range(5)),
        *((Talk(number).sentence(), "Well.") for number in range(60)),
    )
    repeated = matching(index, "The zebra is called  fritz.", EVERYTHING, count=count)
    assert "The zebra is called Fritz." not in texts(repeated)
    asked = matching(index, "Who is the zebra Fritz?", EVERYTHING, count=count)
    assert [(passage.turn, passage.role) for passage in asked] == [(5, "user"), (5, "assistant")]


def test_a_statement_goes_before_a_question_that_holds_the_same_words() -> None:
    index = conversing(
        ("The code of the zebra crate is 4711.", "Ok."),
        *((f"Is the code of the zebra crate {number}?", "No.") for number in range(9)),
        *((Talk(number).sentence(), "Well.") for number in range(60)),
    )
    passages = matching(index, "What is the code of the zebra crate?", EVERYTHING, count=count, budget_tokens=24)
    assert texts(passages) == ["The code of the zebra crate is 4711."]


def test_a_question_at_either_end_of_a_long_turn_is_read() -> None:
    told = "The zebra is called Fritz."
    index = conversing((told, "Ok."), *((Talk(n).sentence(), "Well.") for n in range(60)))
    pasted = Talk(99).text(200)
    for text in (f"Who is the zebra Fritz?\n{pasted}", f"{pasted} Who is the zebra Fritz?"):
        assert told in texts(matching(index, text, EVERYTHING, count=count))


def test_questions_amid_other_sentences_and_several_at_once_are_all_answered() -> None:
    """As the questions alone: at least 95 of 100 are found."""
    transcript, facts = conversation(10_000)
    index, talk = WordIndex(transcript), Talk(seed=5)
    amid = [
        fact.told
        in quote(matching(index, f"{talk.sentence()} {fact.asked[0]} {talk.sentence()}", EVERYTHING, count=count))
        for fact in facts
    ]
    assert sum(amid) >= 0.95 * len(amid)
    both = [
        all(
            fact.told in quote(matching(index, f"{one.asked[0]} {two.asked[0]}", EVERYTHING, count=count))
            for fact in (one, two)
        )
        for one, two in itertools.pairwise(facts)
    ]
    assert sum(both) >= 0.95 * len(both)


def test_a_question_about_what_everybody_talks_of_is_quoted_nothing() -> None:
    """Passages that hold its word are found by a search, but none is meant more than the others."""
    index = conversing(*((f"The dog of {Talk(n).sentence()}", f"A dog, {Talk(n + 99).sentence()}") for n in range(60)))
    assert len(index.search("dog", limit=100)) == 100
    assert matching(index, "What about the dog?", EVERYTHING, count=count) == []


def test_a_word_alone_that_asks_for_nothing_is_quoted_nothing() -> None:
    index = conversing(("We met in the morning.", "Ok."), *((Talk(n).sentence(), "Well.") for n in range(60)))
    assert matching(index, "Good morning!", EVERYTHING, count=count) == []
    assert len(matching(index, "Did we meet in the morning?", EVERYTHING, count=count)) == 1


@pytest.mark.parametrize(
    ("text", "asking"),
    [
        ("Is it late?", True),
        ("现在几点？", True),
        ("what is the code", True),
        ("ok, tell me the code", True),
        ("remind me of the code", True),
        ("in which box is it", True),
        ("Can you open it", True),
        ("He did not want to go.", False),
        ("The cat who slept.", True),
        ("A cat slept, and nobody knew where it was.", False),
        ("", False),
    ],
)
def test_a_turn_asks_if_its_signs_or_first_words_say_so(text: str, asking: bool) -> None:
    assert asks(text) is asking


def test_nothing_is_found_in_a_conversation_that_has_not_begun() -> None:
    index = WordIndex(Transcript())
    assert index.search("anything") == index.worth_quoting("What is it?") == []
    assert matching(index, "What is it?", Place(1, 0), count=count) == []


# ---- several indexes


class Fixed:
    """An index that finds what it was given."""

    def __init__(self, transcript: Transcript, ids: list[int]) -> None:
        self.transcript = transcript
        self._found = transcript.passages(ids)

    def search(self, words: str, *, before: Place | None = None, limit: int = 10) -> list[Passage]:
        return self._found[:limit]

    worth_quoting = search


def test_merged_indexes_rank_by_the_sum_of_reciprocal_ranks() -> None:
    """Reference: Cormack, Clarke and Buettcher (2009), by hand."""
    transcript = conversing(*(("One.", "Two.") for _ in range(3))).transcript
    merged = MergedIndex(Fixed(transcript, [1, 2, 3]), Fixed(transcript, [3, 2, 5]))
    scores = {
        3: 1 / (FUSION + 3) + 1 / (FUSION + 1),
        2: 2 / (FUSION + 2),
        1: 1 / (FUSION + 1),
        5: 1 / (FUSION + 3),
    }
    for found in (merged.search("any"), merged.worth_quoting("any")):
        assert [passage.id for passage in found] == [3, 2, 1, 5]
        assert [passage.score for passage in found] == pytest.approx(list(scores.values()))
    assert [passage.id for passage in merged.search("any", limit=1)] == [3]
    assert merged.transcript is transcript
