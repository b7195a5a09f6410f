"""Text one id at a time, against the text of all ids at once."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from streamllm.detokenize import MAX_HELD, PRIME_TAIL, Decoder, StopStrings
from streamllm.errors import ConfigError, StateError
from tokenizers_for_tests import byte_level, metaspace, slow, stories

KINDS = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level("llama3"),
    "prefix": lambda: byte_level("prefix"),
    "first": metaspace,
    "always": lambda: metaspace("always"),
    "legacy": lambda: metaspace("legacy"),
    "stories": stories,
    "slow": slow,
}
each_tokenizer = pytest.mark.parametrize("kind", KINDS)

PARTS = [*"a \n你é😀\u0301\ufffd", "  ", "👨\u200d👩\u200d👧", "<s>", "</s>", "<|endoftext|>", "Once upon", " a time"]
TEXTS = st.text(max_size=30) | st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def pieces_of(decoder: Decoder, ids: Sequence[int]) -> list[str]:
    return [*(decoder.push(id) for id in ids), decoder.flush()]


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, skip=st.booleans(), cut=st.integers(0, 60))
def test_pieces_join_to_the_text_of_all_ids_even_if_saved_in_between(
    kind: str, text: str, skip: bool, cut: int
) -> None:
    """Reference: ``tokenizer.decode`` of all ids; at ``cut`` the decoder goes through its state and JSON."""
    tokenizer = KINDS[kind]()
    ids = ids_of(tokenizer, text)
    decoder = Decoder(tokenizer, skip_special_tokens=skip)
    shown = [decoder.push(id) for id in ids[:cut]]
    decoder = Decoder.from_state(tokenizer, json.loads(json.dumps(decoder.state())))
    shown += pieces_of(decoder, ids[cut:])
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=skip)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(text=TEXTS.filter(lambda text: "\ufffd" not in text), cut=st.integers(0, 60))
def test_after_a_prompt_the_text_is_that_of_both_less_that_of_the_prompt(kind: str, text: str, cut: int) -> None:
    """Reference: ``decode(prompt + generated)``, which must begin with ``decode(prompt)``, cut there."""
    tokenizer = KINDS[kind]()
    ids = ids_of(tokenizer, text)
    before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
    while before.endswith("\ufffd"):  # a prompt does not end inside a character
        cut -= 1
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
    decoder = Decoder(tokenizer)
    decoder.prime(ids[:cut])
    assert before + "".join(pieces_of(decoder, ids[cut:])) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "prefix"])
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n_ids=st.integers(1, 40))
def test_random_ids_of_a_byte_level_tokenizer_give_the_text_of_all(kind: str, seed: int, n_ids: int) -> None:
    """Reference: ``tokenizer.decode`` of all ids, most of which are broken bytes."""
    tokenizer = KINDS[kind]()
    ids = random.Random(seed).choices(range(len(tokenizer)), k=n_ids)
    assert "".join(pieces_of(Decoder(tokenizer), ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_first_piece_after_a_prompt_keeps_its_leading_space() -> None:
    """Reference: by hand, " upon" after "Once", and "Once" at the start of a text."""
    tokenizer = stories()
    once, upon = ids_of(tokenizer, "Once upon")
    decoder = Decoder(tokenizer)
    assert [decoder.push(once), decoder.push(upon)] == ["Once", " upon"]
    for prompt in ([once], [1, once], [once, 1, 2], [once] * 100, [tokenizer.eos_token_id] * 100 + [once, 1] * 100):
        primed = Decoder(tokenizer)
        primed.prime(prompt)
        assert primed.push(upon) == " upon"
    primed = Decoder(tokenizer)
    primed.prime([1])
    assert primed.push(once) == "Once"


def test_a_long_prompt_of_byte_tokens_does_not_break_the_character_that_follows() -> None:
    """Reference: by hand; the tail of the prompt begins inside a character, whichever of three places it is."""
    tokenizer = stories()
    bytes_of = ids_of(tokenizer, "你" * 20)[1:]
    for extra in range(3):
        decoder = Decoder(tokenizer)
        decoder.prime(bytes_of[: PRIME_TAIL * 3 + extra])
        assert "".join(pieces_of(decoder, bytes_of[PRIME_TAIL * 3 + extra :])).startswith("你" * 3)


@each_tokenizer
def test_a_character_comes_out_with_its_last_byte(kind: str) -> None:
    """Reference: by hand; no piece shows half a character, and nothing is left at the end."""
    tokenizer = KINDS[kind]()
    pieces = pieces_of(Decoder(tokenizer), ids_of(tokenizer, "ж😀ж"))
    assert "".join(pieces).strip() == "ж😀ж"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


@pytest.mark.parametrize("kind", ["first", "stories", "gpt2"])
def test_one_broken_byte_does_not_spoil_the_characters_after_it(kind: str) -> None:
    """Reference: by hand; one U+FFFD, then the text; one-shot decoding with byte fallback spoils the whole run."""
    tokenizer = KINDS[kind]()
    text = ids_of(tokenizer, "жшжшжшжшжш")
    broken = next(id for id in text if tokenizer.decode([id]) == "\ufffd")
    text = text[text.index(broken) :]
    pieces = pieces_of(Decoder(tokenizer), [text[1], *text])
    assert "".join(pieces) == "\ufffdжшжшжшжшжш"


def broken_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a byte that never begins a character."""
    return int(tokenizer.convert_tokens_to_ids("<0x80>" if "<0x80>" in tokenizer.get_vocab() else "Ģ"))


@pytest.mark.parametrize("kind", ["gpt2", "first", "stories"])
def test_broken_bytes_for_ever_are_shown_and_not_kept(kind: str) -> None:
    """Reference: as many U+FFFD as bytes, none later than MAX_HELD ids; the state stays as small as at the start."""
    tokenizer = KINDS[kind]()
    decoder, bad, shown = Decoder(tokenizer), broken_id(tokenizer), 0
    for count in range(1, 20_001):
        shown += len(decoder.push(bad))
        assert shown > count - MAX_HELD
    assert len(json.dumps(decoder.state())) < 200
    assert shown + len(decoder.flush()) == 20_000
    assert decoder.push(ids_of(tokenizer, "a b")[-1]).strip() == "b"


@each_tokenizer
def test_ids_without_text_for_ever_are_not_kept(kind: str) -> None:
    """Reference: the state before them, and the text that follows; the library's own stream would keep every id."""
    tokenizer = KINDS[kind]()
    first, *rest = ids_of(tokenizer, "Once upon")
    decoder = Decoder(tokenizer)
    head = decoder.push(first)
    before = decoder.state()
    silent = [tokenizer.eos_token_id, 10**7, -1, 2**32, 2**70]
    assert "".join(decoder.push(id) for id in silent * 20_000) == ""
    assert decoder.state() == before
    assert head + "".join(pieces_of(decoder, rest)) == tokenizer.decode([first, *rest])


def test_an_id_that_is_missing_from_the_vocabulary_in_a_saved_state_is_refused() -> None:
    """Reference: the words of the messages."""
    state = Decoder(stories()).state()
    with pytest.raises(StateError, match="has the id 9999, which this tokenizer does not have"):
        Decoder.from_state(stories(), state | {"context": [9999]})
    for damage in ({"held": ["x"]}, {"context": None}):
        with pytest.raises(StateError, match="saved decoder cannot be used"):
            Decoder.from_state(stories(), state | damage)
    with pytest.raises(StateError, match="KeyError: 'held'"):
        Decoder.from_state(stories(), {"context": [], "skip_special_tokens": True})


@pytest.mark.parametrize("kind", ["gpt2", "stories", "slow"])
def test_a_hundred_thousand_ids_leave_nothing_behind(kind: str) -> None:
    """Reference: the text once, over and over; the state never holds more than the ids of one character."""
    tokenizer = KINDS[kind]()
    text = " Once upon a time there was 你 and 😀.\n"
    ids = ids_of(tokenizer, "x" + text)[len(ids_of(tokenizer, "x")) :]
    decoder = Decoder(tokenizer)
    decoder.prime(ids_of(tokenizer, "x"))
    for _ in range((100_000 if kind != "slow" else 5_000) // len(ids)):
        assert "".join(decoder.push(id) for id in ids) == text
        assert len(decoder.state()["context"]) <= 4
        assert decoder.state()["held"] == []


def test_flushing_twice_gives_the_rest_once_and_the_text_goes_on() -> None:
    """Reference: by hand."""
    tokenizer = stories()
    first_byte = ids_of(tokenizer, "你")[1]
    word = ids_of(tokenizer, "a the")[-1]
    decoder = Decoder(tokenizer)
    assert [decoder.push(word), decoder.push(first_byte)] == ["the", ""]
    assert [decoder.flush(), decoder.flush(), decoder.push(word)] == ["\ufffd", "", " the"]


def test_what_is_whole_is_kept_as_context_after_a_flush() -> None:
    """Reference: by hand; the broken byte ends with the word, and the next word keeps its space."""
    tokenizer = stories()
    word = ids_of(tokenizer, "a the")[-1]
    letter, byte = tokenizer.convert_tokens_to_ids(["<0x41>", "<0x80>"])
    decoder = Decoder(tokenizer)
    assert [decoder.push(id) for id in (letter, byte, word, word)] == ["A", "", "\ufffd the", " the"]


def test_a_broken_byte_after_a_character_of_several_bytes_is_one_mark() -> None:
    """Reference: by hand; one-shot decoding marks every byte of the run, but the character was shown before."""
    tokenizer = stories()
    character, byte = ids_of(tokenizer, "你")[1:], tokenizer.convert_tokens_to_ids("<0x80>")
    assert "".join(pieces_of(Decoder(tokenizer), [*character, byte])) == "你\ufffd"


@each_tokenizer
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
def test_the_replacement_character_itself_is_text_like_any_other(kind: str, count: int) -> None:
    """Reference: ``tokenizer.decode`` of all ids; the bytes that follow are not lost where the wait for them ends."""
    tokenizer = KINDS[kind]()
    ids = ids_of(tokenizer, "\ufffd" * count + "😀ж" + "\ufffd" * count)
    assert "".join(pieces_of(Decoder(tokenizer), ids)) == tokenizer.decode(ids)


# ---- stop strings


def by_hand(stops: Sequence[str], text: str) -> tuple[str, bool]:
    """What is shown of a text: all before the stop that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@settings(max_examples=300, deadline=None)
@given(stops=STOPS, pieces=st.lists(st.text("abc", max_size=6), max_size=8))
def test_a_stop_string_is_found_wherever_the_pieces_are_cut(stops: list[str], pieces: list[str]) -> None:
    """Reference: the whole text looked at end by end; never more than the longest stop less one is held back."""
    search, shown, hit, taken = StopStrings(stops), "", False, 0
    for piece in pieces:
        text, hit = search.push(piece)
        shown, taken = shown + text, taken + len(piece)
        if not hit:
            assert taken - len(shown) <= max(map(len, stops), default=1) - 1
    shown += search.flush()
    assert (shown, hit) == by_hand(stops, "".join(pieces))


def test_nothing_is_shown_after_a_stop_string() -> None:
    """Reference: by hand."""
    search = StopStrings(["END"])
    assert [search.push(text) for text in ("oneE", "NDtwo", "three")] == [("one", False), ("", True), ("", True)]
    assert search.flush() == ""


def test_a_single_string_is_one_stop_and_an_empty_one_is_refused() -> None:
    """Reference: by hand, and the words of the message."""
    assert StopStrings("ab").push("xab") == ("x", True)
    for stops in ([""], "", ["a", ""]):
        with pytest.raises(ConfigError, match="stop string is empty"):
            StopStrings(stops)
