"""The tokenizer: any text comes back as it was, documents end with their mark, and foreign tokenizers are made fit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from stories import STORIES
from streamllm.corpus import END_OF_TEXT, Piece
from streamllm.errors import ConfigError, InputError
from streamllm.train import vocabulary
from streamllm.train.vocabulary import SINK_TOKEN, dress, encode, read_tokenizer, token_id, train_tokenizer


def story(seed: int = 0, words: int = 2000) -> str:
    """Made-up words, so that there is much to merge."""
    draw = random.Random(seed)
    made = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(300)]
    return " ".join(draw.choices(made, k=words))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Piece(story(), ends=True)], 400)


def words_only(folder: Path, vocabulary: dict[str, int], unknown: str = "") -> Path:
    """A tokenizer of whole words, which has no ids for others."""
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder


# ---- training one


def test_a_new_tokenizer_has_the_size_asked_for_and_its_two_tokens_first(tokenizer: Tokenizer) -> None:
    """Reference: the size; ids without gaps; and that text gets shorter by it, which bytes alone do not."""
    assert tokenizer.get_vocab_size() == 400
    assert sorted(tokenizer.get_vocab().values()) == list(range(400))
    assert [token_id(tokenizer, text) for text in (END_OF_TEXT, SINK_TOKEN)] == [0, 1]
    assert len(tokenizer.encode(story(1)).ids) < 0.7 * len(story(1))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    """Reference: the text, of any characters; none of its ids is one of the two that are no text."""
    (ids,) = encode(tokenizer, [Piece(text, ends=False)])
    assert tokenizer.decode(ids) == text
    assert min(ids, default=2) >= 2


def test_the_same_text_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    """Reference: the first one, byte for byte; where the text is cut into pieces changes nothing."""
    words = story().split(" ")
    pieces = [Piece(" ".join(["", *words[i : i + 50]][i == 0 :]), ends=False) for i in range(0, len(words), 50)]
    assert "".join(piece.text for piece in pieces) == story()
    assert train_tokenizer(pieces, 400).to_str() == tokenizer.to_str()


def test_no_more_text_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the bound, which the third of these pieces reaches."""
    monkeypatch.setattr(vocabulary, "SAMPLE_CHARS", 25_000)
    taken: list[int] = []

    def pieces() -> Iterator[Piece]:
        for seed in range(100):
            taken.append(seed)
            yield Piece(story(seed)[:10_000], ends=True)

    train_tokenizer(pieces(), 300)
    assert taken == [0, 1, 2]


def test_too_little_text_for_a_vocabulary_is_refused() -> None:
    """Reference: 256 bytes, two tokens, and the one pair in the text."""
    with pytest.raises(
        InputError, match="too short for a vocabulary of 300 ids, it gives 259: ask for fewer with --voc"
    ):
        train_tokenizer([Piece("ab", ends=True)], 300)


def test_what_is_wrong_with_the_text_is_said_as_it_was() -> None:
    """Reference: the error of the file, which comes up while the library reads."""

    def broken() -> Iterator[Piece]:
        yield Piece(story(), ends=False)
        raise InputError("stories.txt cannot be read.")

    with pytest.raises(InputError, match=r"^stories\.txt cannot be read\.$"):
        train_tokenizer(broken(), 400)


# ---- encoding


def test_each_document_ends_with_its_mark(tokenizer: Tokenizer) -> None:
    """Reference: the texts one by one; the size of a batch changes nothing."""
    pieces = [Piece(story(i, words=3), ends=i % 3 > 0) for i in range(20)] + [Piece("", ends=True)]
    wanted = [tokenizer.encode(piece.text).ids + [0] * piece.ends for piece in pieces]
    for batch in (1, 7, 64):
        assert list(encode(tokenizer, pieces, batch)) == wanted


def test_marks_inside_a_text_are_text(tokenizer: Tokenizer) -> None:
    """Reference: the text that comes back, and the one mark at the end; the tokenizer itself stays as it was."""
    text = f"one{END_OF_TEXT}two{SINK_TOKEN}"
    assert tokenizer.encode(text).tokens.count(END_OF_TEXT) == 1
    (ids,) = encode(tokenizer, [Piece(text, ends=True)])
    assert [i for i in ids if i < 2] == [0]
    assert ids[-1] == 0
    assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer.encode(text).tokens.count(END_OF_TEXT) == 1


# ---- reading one


def test_a_saved_tokenizer_is_read_as_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Reference: the tokenizer that was saved, byte for byte, from its file and from its folder."""
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.to_str(), encoding="utf-8")
    assert read_tokenizer(file).to_str() == read_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_a_foreign_tokenizer_gets_the_two_tokens() -> None:
    """Reference: stories260K's tokenizer, whose ids stay what they were; what it puts before a text goes."""
    foreign, ours = Tokenizer.from_file(str(STORIES / "tokenizer.json")), read_tokenizer(STORIES)
    assert foreign.token_to_id(SINK_TOKEN) is None
    added = ours.get_vocab_size() - foreign.get_vocab_size()
    ids = sorted(token_id(ours, text) for text in (END_OF_TEXT, SINK_TOKEN))
    assert ids == [foreign.get_vocab_size(), foreign.get_vocab_size() + 1]
    assert added == 2
    assert ours.encode("Once upon a time").ids == foreign.encode("Once upon a time", add_special_tokens=False).ids


def test_no_text_is_cut_or_filled_up_as_a_foreign_tokenizer_would(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Reference: the ids of the tokenizer before it was told to cut and to fill up."""
    pieces = [Piece(story(1, words=40), ends=True), Piece("short", ends=True)]
    wanted = list(encode(tokenizer, pieces))
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(8)
    cutting.enable_padding(length=12)
    cutting.save(str(tmp_path / "tokenizer.json"))
    assert [len(ids) for ids in encode(cutting, pieces)] != [len(ids) for ids in wanted]
    assert list(encode(read_tokenizer(tmp_path), pieces)) == wanted


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": {}}', "not JSON"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    """Reference: the words of the message."""
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        ConfigError, match=r"The tokenizer .*tokenizer\.json cannot be read \(.*name a tokenizer\.json, or"
    ):
        read_tokenizer(tmp_path)


def test_a_tokenizer_with_gaps_between_its_ids_is_refused(tmp_path: Path) -> None:
    """Reference: the words of the message; a model has a row for each id up to its size and no further."""
    folder = words_only(tmp_path, {"one": 0, "two": 1, "three": 9})
    with pytest.raises(ConfigError, match="has 5 ids, and yet one is 9: there are gaps"):
        read_tokenizer(folder)


def test_a_tokenizer_that_cannot_spell_the_text_is_refused(tmp_path: Path) -> None:
    """Reference: the words of the message; what it can spell is encoded."""
    tokenizer = read_tokenizer(words_only(tmp_path, {"one": 0, "two": 1}))
    assert list(encode(tokenizer, [Piece("two one", ends=False)])) == [[1, 0]]
    with pytest.raises(ConfigError, match=r"The tokenizer cannot encode the text \(.*take a byte-level one"):
        list(encode(tokenizer, [Piece("three", ends=False)]))


def test_a_token_that_is_not_there_is_refused(tokenizer: Tokenizer) -> None:
    """Reference: the words of the message."""
    with pytest.raises(ConfigError, match=r"has no token <\|nothing\|>"):
        token_id(tokenizer, "<|nothing|>")
    bare = Tokenizer(models.WordLevel({"one": 0}, unk_token="one"))
    with pytest.raises(ConfigError, match=r"has no token <\|endoftext\|>"):
        list(encode(bare, [Piece("one", ends=True)]))


# ---- as transformers uses it


@pytest.mark.parametrize("begins", [True, False])
def test_a_dressed_tokenizer_puts_the_sink_token_in_front_if_it_shall(
    tokenizer: Tokenizer, tmp_path: Path, begins: bool
) -> None:
    """Reference: the bare tokenizer's ids; the dressed one goes through a folder, as users meet it."""
    before = tokenizer.to_str()
    dress(tokenizer, context=64, begins=begins).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"one day {END_OF_TEXT} two"
    assert loaded(text).input_ids == [1] * begins + tokenizer.encode(text).ids
    assert loaded.decode(loaded("one , day .").input_ids, skip_special_tokens=True) == "one , day ."
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
        SINK_TOKEN if begins else None,
        END_OF_TEXT,
        END_OF_TEXT,
    )
    assert loaded.model_max_length == 64
    assert tokenizer.to_str() == before
