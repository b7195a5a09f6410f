"""Passages: bounds, borders, and where they end in tokens."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from streamllm.passages import LEAST, MOST, Passage, Place, cut, placed
from tokenizers_for_tests import byte_level, metaspace, stories

WORDS = st.sampled_from(
    ["you", "a", "Lily", "aaaa", "世界", "。", "3.14", "é", "😀", "x" * 90, "end.", "end!”", "\n", "\n\n", " ", "?"]
)
TEXTS = st.builds(
    lambda words, gap, times: gap.join(words * times),
    st.lists(WORDS, max_size=30),
    st.sampled_from([" ", ""]),
    st.integers(1, 40),
)


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_passages_joined_are_the_text_and_each_is_of_bounded_size(text: str) -> None:
    pieces = cut(text)
    assert "".join(pieces) == text
    assert all(LEAST <= len(piece) <= MOST for piece in pieces[:-1])
    assert all(0 < len(piece) <= MOST for piece in pieces[-1:])


@given(TEXTS, st.integers(0, 3000))
@settings(max_examples=150, deadline=None)
def test_a_text_that_grows_is_cut_as_the_whole(text: str, known: int) -> None:
    """Reference: the whole. All passages of a beginning but its last are those of the whole."""
    *closed, _ = cut(text[:known]) or [""]
    assert cut(text)[: len(closed)] == closed


@pytest.mark.parametrize(
    ("sentence", "ends"),
    [("The number is 3.14 today. ", "."), ("He said “no!” ", "”"), ("世界很大。", "。"), ("a line\n", "\n")],
)
def test_passages_end_where_sentences_and_lines_do(sentence: str, ends: str) -> None:
    """Reference: the text, split at every sentence end."""
    pieces = cut(sentence * 200)
    assert len(pieces) > 3
    assert all(piece.endswith(ends) for piece in pieces[:-1])
    assert all(len(piece) < LEAST + len(sentence) + 1 for piece in pieces)
    assert {part.strip() for piece in pieces for part in re.split(rf"(?<={re.escape(ends)})\s*(?!\d)", piece)} <= {
        sentence.strip(),
        "",
    }


def test_a_text_without_sentences_is_cut_between_words_and_one_without_words_anywhere() -> None:
    assert {len(piece) for piece in cut("word " * 1000)[:-1]} == {599, 595}
    assert [len(piece) for piece in cut("x" * 1500)] == [600, 600, 300]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        byte_level("llama3"),
        byte_level("prefix"),
        metaspace(),
        metaspace("always"),
        metaspace("legacy"),
        stories(),
    ],
    ids=["gpt2", "llama3", "prefix", "first", "always", "legacy", "stories"],
)
@given(text=TEXTS)
@settings(max_examples=25, deadline=None)
def test_where_a_passage_stops_is_never_too_few_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Reference: the offsets of the tokens of the whole prompt; a token counts if it begins before the passage ends."""
    before, behind = "<|u|> ", "\nanswer:"
    encoded = tokenizer(before + text + behind, add_special_tokens=False, return_offsets_mapping=True)
    tokens = len(encoded["input_ids"])

    def count(piece: str) -> int:
        return len(tokenizer(piece, add_special_tokens=False)["input_ids"])

    end, stops = len(before), []
    for piece, stop in placed(text, tokens, count):
        end += len(piece)
        stops.append(stop)
        assert sum(start < end for start, _ in encoded["offset_mapping"]) <= stop <= tokens
    assert stops == sorted(stops)
    assert stops[-1:] in ([], [tokens])


def test_a_stop_is_not_much_too_large_either() -> None:
    """Reference: the offsets, on plain English."""
    text, tokenizer = "Once upon a time there was a little girl named Lily. " * 100, stories()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, end = len(encoded["input_ids"]), 0
    for piece, stop in placed(text, tokens, lambda piece: len(tokenizer(piece, add_special_tokens=False)["input_ids"])):
        end += len(piece)
        assert stop - sum(start < end for start, _ in encoded["offset_mapping"]) <= 0.11 * (tokens - stop) + 60


@pytest.mark.parametrize(("turn", "stop", "left"), [(3, 999, True), (4, 10, True), (4, 11, False), (5, 0, False)])
def test_a_passage_has_left_when_all_its_tokens_have(turn: int, stop: int, left: bool) -> None:
    assert Place(turn=4, stop=10).has_left(Passage(1, turn, "user", "text", stop)) is left
