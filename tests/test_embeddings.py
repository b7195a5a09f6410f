"""Recall by meaning: cosines as numpy computes them, vectors kept once, and nothing that was taken back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from streamllm import embeddings as embeddings_module
from streamllm.embeddings import EmbeddingIndex
from streamllm.errors import ConfigError, ModelNotFoundError
from streamllm.passages import Place
from streamllm.recall import Index, MergedIndex, WordIndex, matching
from streamllm.transcript import Transcript
from talk import Talk, converse, count, make_facts, say

model2vec = pytest.importorskip("model2vec")

WORDS = sorted({word for text in [Talk(1).text(3000)] for word in text.lower().replace(".", "").split()})
PAIRS = [("cat", "feline"), ("called", "named"), ("doctor", "physician"), ("lives", "resides")]
"""Words that mean the same to the models of these tests."""


def make_model(seed: int = 0) -> Any:
    """Random vectors of 64 numbers for words, the same ones for words that mean the same."""
    vocabulary = ["[UNK]", "[PAD]", *WORDS, *(word for pair in PAIRS for word in pair if word not in WORDS)]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    vectors = np.random.default_rng(seed).normal(size=(len(vocabulary), 64)).astype(np.float32)
    vectors[0] = 0
    for one, other in PAIRS:
        vectors[numbers[one]] = vectors[numbers[other]]
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    return model2vec.StaticModel(vectors, tokenizer)


class Counting:
    """A model that counts what it embeds."""

    def __init__(self, model: Any) -> None:
        self._model, self.texts = model, list[str]()

    def encode(self, sentences: list[str]) -> NDArray[np.float32]:
        self.texts += sentences
        vectors: NDArray[np.float32] = self._model.encode(sentences)
        return vectors


def test_the_nearest_passages_are_found_as_numpy_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: cosines of all passages at once, in full precision. Blocks are small, so that there are many."""
    monkeypatch.setattr(embeddings_module, "BLOCK", 7)
    monkeypatch.setattr(embeddings_module, "BATCH", 5)
    model, transcript = make_model(), converse(3000, make_facts(6))
    index, talk = EmbeddingIndex(transcript, model), Talk(9)
    passages = transcript.passages(range(1, transcript.last_left(None) + 1))
    vectors = model.encode([passage.text for passage in passages])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    place = Place(transcript.count() // 2, 30)
    for words in (talk.sentence() for _ in range(20)):
        wanted = model.encode([words])[0]
        cosines = vectors @ (wanted / np.linalg.norm(wanted))
        for before in (None, place):
            left = [number for number, passage in enumerate(passages) if before is None or before.has_left(passage)]
            best = sorted(left, key=lambda number: -cosines[number])[:6]
            found = index.search(words, before=before, limit=6)
            assert [passage.score for passage in found] == pytest.approx(cosines[best], abs=2e-3)
            assert {passage.id for passage in found[:3]} <= {passages[number].id for number in best}


def test_what_means_the_same_is_found_and_quoted_where_words_find_nothing() -> None:
    transcript = Transcript()
    say(transcript, "my feline named resides", "ok")
    for number in range(80):
        say(transcript, Talk(number).sentence(), Talk(number + 100).sentence())
    by_words, by_meaning = WordIndex(transcript), EmbeddingIndex(transcript, make_model())
    asked = "where lives the cat called?"
    assert by_words.search("cat") == by_words.worth_quoting(asked) == []
    assert [passage.turn for passage in by_meaning.search("cat", limit=1)] == [1]
    indexes: list[Index] = [by_meaning, MergedIndex(by_words, by_meaning)]
    for index in indexes:
        assert [passage.turn for passage in index.search("cat called", limit=1)] == [1]
        assert 1 in {passage.turn for passage in matching(index, asked, Place(50, 0), count=count)}


def test_turns_about_nothing_said_before_are_mostly_quoted_nothing() -> None:
    transcript, talk = converse(5000, []), Talk(55)
    index = EmbeddingIndex(transcript, make_model())
    quoted = [len(matching(index, talk.sentence(), Place(10**9, 0), count=count)) for _ in range(60)]
    assert max(quoted) <= 1
    assert sum(quoted) <= 20
    assert index.worth_quoting("unknownword") == []


def test_each_passage_is_embedded_once_and_again_only_for_another_model(tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "a.db")
    say(transcript, "one cat", "two cat")
    model = Counting(make_model())
    index = EmbeddingIndex(transcript, model)
    index.search("cat")
    transcript.begin("three cat", prompt_ids=[1], count=count)
    transcript.write("not yet ended", [1])
    index.search("cat")
    transcript.close()
    transcript = Transcript(tmp_path / "a.db")
    found = EmbeddingIndex(transcript, model).search("feline")
    assert {passage.text for passage in found} == {"one cat", "two cat", "three cat", "not yet ended"}
    for text in ("one cat", "two cat", "three cat", "not yet ended"):
        assert model.texts.count(text) == 1
    other = Counting(make_model(seed=1))
    EmbeddingIndex(transcript, other).search("cat")
    assert other.texts.count("one cat") == 1


def test_what_was_taken_back_is_not_found_even_if_it_was_embedded() -> None:
    transcript = Transcript()
    index = EmbeddingIndex(transcript, make_model())
    say(transcript, "one cat", "ok")
    say(transcript, "the cat called", "cat lives")
    assert len(index.search("cat")) == 4
    transcript.undo()
    assert [passage.text for passage in index.search("cat", limit=2)] == ["one cat", "ok"]
    say(transcript, "another feline", "ok")
    assert {passage.text for passage in index.search("cat")} == {"one cat", "ok", "another feline"}


def test_a_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    """Reference: the same model, not saved."""
    make_model().save_pretrained(tmp_path / "model")
    transcript = Transcript()
    say(transcript, "one cat", "ok")
    wanted = EmbeddingIndex(transcript, make_model()).search("feline")
    assert EmbeddingIndex(transcript, tmp_path / "model").search("feline") == wanted
    assert EmbeddingIndex(transcript, str(tmp_path / "model")).search("feline") == wanted


def test_a_folder_without_a_model_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model of model2vec that can be loaded"):
        EmbeddingIndex(Transcript(), tmp_path)


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(ConfigError, match=r"run: pip install 'streamllm\[recall\]'"):
        EmbeddingIndex(Transcript(), "any")
