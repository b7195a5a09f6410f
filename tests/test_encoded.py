"""The encoded corpus: the text and nothing else, made once, and never half."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from streamllm.corpus import END_OF_TEXT, Piece, Source
from streamllm.errors import InputError
from streamllm.train import encoded
from streamllm.train.encoded import Encoded, encode_corpus
from streamllm.train.sequences import Stretch
from streamllm.train.vocabulary import SINK_TOKEN, encode, train_tokenizer

WORDS = ["Lily", "saw", "a", "big", "größer", "ball", "日本", "and", "ran", "to", "the", "🙂", "park"]


def stories(seed: int, count: int = 30) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=20)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Piece(" ".join(stories(0, 100)), ends=True)], 300)


def written(folder: Path, name: str, texts: list[str]) -> Path:
    file = folder / name
    file.write_text(END_OF_TEXT.join(texts), encoding="utf-8")
    return file


def texts_of(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """Documents, from ids."""
    assert ids[-1] == 0
    ends = np.flatnonzero(ids == 0)
    return [tokenizer.decode(part[part != 0].tolist()) for part in np.split(ids, ends[:-1] + 1)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever text is encoded."""
    made: list[int] = []

    def counted(*arguments, **options):
        made.append(1)
        return encode(*arguments, **options)

    monkeypatch.setattr(encoded, "encode", counted)
    return made


def test_the_documents_come_back_from_the_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Reference: the documents of both files, their size in UTF-8, and what the tokenizer gives for each."""
    first, second = stories(1), stories(2)
    sources = [Source(written(tmp_path, "a.txt", first)), Source(written(tmp_path, "b.txt", second))]
    told: list[int] = []
    found = encode_corpus(sources, tokenizer, tmp_path / "text", watch=told.append)
    assert texts_of(tokenizer, found.ids) == first + second
    assert found.ids.tolist() == [i for text in first + second for i in [*tokenizer.encode(text).ids, 0]]
    assert found.utf8_bytes == sum(len(text.encode()) for text in first + second)
    assert found.ids.dtype == np.uint16
    assert found.stretches == [Stretch(0, len(found.ids))]
    assert told == sorted(told)
    assert told[-1] == len(found.ids)
    assert isinstance(found.ids, np.memmap)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.txt", "text.bin", "text.json"]


def test_ids_that_do_not_fit_two_bytes_get_four(tmp_path: Path) -> None:
    """Reference: the words' own numbers."""
    count = (1 << 16) + 10
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END_OF_TEXT, SINK_TOKEN])
    source = Source(written(tmp_path, "a.txt", [f"w7 w{count - 1} w65536"]))
    found = encode_corpus([source], tokenizer, tmp_path / "text")
    assert found.ids.tolist() == [7, count - 1, 65536, count]
    assert found.ids.dtype == np.uint32


# ---- what was encoded before


def test_text_is_encoded_only_once(tokenizer: Tokenizer, tmp_path: Path, calls: list[int]) -> None:
    """Reference: the first time."""
    sources = [Source(written(tmp_path, "a.txt", stories(1))), Source(written(tmp_path, "b.txt", stories(2)), 3)]
    first = encode_corpus(sources, tokenizer, tmp_path / "text")
    again = encode_corpus(sources, tokenizer, tmp_path / "text")
    assert len(calls) == 2  # once for each file
    assert np.array_equal(first.ids, again.ids)
    assert (first.stretches, first.utf8_bytes) == (again.stretches, again.utf8_bytes)


@pytest.mark.parametrize("change", ["text", "time", "weight", "files", "tokenizer"])
def test_text_is_encoded_again_when_anything_about_it_changes(
    tokenizer: Tokenizer, tmp_path: Path, calls: list[int], change: str
) -> None:
    """Reference: the same text and tokenizer in an empty folder."""
    file = written(tmp_path, "a.txt", stories(1))
    encode_corpus([Source(file)], tokenizer, tmp_path / "text")
    sources = [Source(file, 2 if change == "weight" else 1)]
    if change == "text":
        file.write_text("another text", encoding="utf-8")
    elif change == "time":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    elif change == "files":
        sources.append(Source(written(tmp_path, "b.txt", stories(2))))
    elif change == "tokenizer":
        tokenizer = train_tokenizer([Piece(" ".join(stories(5, 100)), ends=True)], 295)
    before = len(calls)
    found = encode_corpus(sources, tokenizer, tmp_path / "text")
    assert len(calls) == before + len(sources)
    fresh = encode_corpus(sources, tokenizer, tmp_path / "fresh")
    assert np.array_equal(found.ids, fresh.ids)
    assert (found.stretches, found.utf8_bytes) == (fresh.stretches, fresh.utf8_bytes)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "null", "stretches", "utf8_bytes", "short", "gone"])
def test_damaged_files_are_made_anew(tokenizer: Tokenizer, tmp_path: Path, calls: list[int], damage: str) -> None:
    """Reference: the first time."""
    source, name = Source(written(tmp_path, "a.txt", stories(1))), tmp_path / "text"
    first = encode_corpus([source], tokenizer, name).ids.tolist()
    index, data = name.with_suffix(".json"), name.with_suffix(".bin")
    if damage == "short":
        data.write_bytes(data.read_bytes()[:-2])
    elif damage == "gone":
        data.unlink()
    elif damage in ("stretches", "utf8_bytes"):
        index.write_text(json.dumps(json.loads(index.read_text()) | {damage: None}))
    else:
        index.write_text(damage)
    assert encode_corpus([source], tokenizer, name).ids.tolist() == first
    assert len(calls) == 2


# ---- stretches


def test_files_of_one_weight_are_one_stretch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Reference: the files encoded alone; files without text leave no stretch."""
    names = [("a.txt", 1), ("b.txt", 1), ("empty.txt", 7), ("c.txt", 3), ("d.txt", 1)]
    texts = {name: [] if "empty" in name else stories(i) for i, (name, _) in enumerate(names)}
    sources = [Source(written(tmp_path, name, texts[name]), weight) for name, weight in names]
    found = encode_corpus(sources, tokenizer, tmp_path / "text")
    a, b, c, d = (
        len(encode_corpus([source], tokenizer, tmp_path / source.file.stem).ids)
        for source in sources
        if "empty" not in source.file.name
    )
    assert found.stretches == [Stretch(0, a + b, 1), Stretch(a + b, a + b + c, 3), Stretch(a + b + c, a + b + c + d, 1)]
    assert len(found.ids) == a + b + c + d


def test_the_end_of_each_stretch_is_parted_off() -> None:
    """Reference: slices; a share where that is little, and no more than the bound; what is too short is kept whole."""
    ids = np.arange(1010, dtype=np.uint16)
    whole = Encoded(ids, [Stretch(0, 200, 2), Stretch(200, 1000, 1), Stretch(1000, 1010, 3)], 5000)
    kept, ends = whole.part(0.1, least=6, most=50, spell=lambda some: "é" * len(some))
    assert kept.stretches == [Stretch(0, 180, 2), Stretch(200, 950, 1), Stretch(1000, 1010, 3)]
    assert kept.ids is ids
    assert list(ends) == ["held-out-0", "held-out-1"]
    for name, (begin, end) in {"held-out-0": (180, 200), "held-out-1": (950, 1000)}.items():
        assert ends[name].ids.tolist() == list(range(begin, end))
        assert ends[name].stretches == [Stretch(0, end - begin)]
        assert ends[name].utf8_bytes == 2 * (end - begin)


def test_one_stretch_has_one_end() -> None:
    """Reference: its name, without a number."""
    whole = Encoded(np.arange(100, dtype=np.uint16), [Stretch(0, 100)], 300)
    _, ends = whole.part(0.1, least=20, most=50, spell=str)
    assert {name: len(end.ids) for name, end in ends.items()} == {"held-out": 20}
    with pytest.raises(InputError, match="has 100 tokens, too few to hold 51 out for measuring"):
        whole.part(0.1, least=51, most=60, spell=str)


# ---- what goes wrong


def test_files_without_text_are_refused_and_leave_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Reference: the words of the message."""
    source = Source(written(tmp_path, "a.txt", [" \n"]))
    with pytest.raises(InputError, match=r"There is no text in .*a\.txt; give other files"):
        encode_corpus([source], tokenizer, tmp_path / "text")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_cannot_be_read_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Reference: the words of the messages; the first file is whole, and was already encoded when the second fails."""
    sources = [Source(written(tmp_path, name, stories(1))) for name in ("a.txt", "b.txt")]
    sources[1].file.write_bytes(b"one \xff two")
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8 text"):
        encode_corpus(sources, tokenizer, tmp_path / "text")
    sources[1].file.unlink()
    with pytest.raises(InputError, match=r"b\.txt cannot be read: No such file or directory; put it back"):
        encode_corpus(sources, tokenizer, tmp_path / "text")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_nothing_that_could_be_taken_for_whole(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Reference: a folder where nothing went wrong; also where an older text had been encoded before."""
    source, name = Source(written(tmp_path, "a.txt", stories(1))), tmp_path / "text"
    if before:
        encode_corpus([source], tokenizer, name)
        written(tmp_path, "a.txt", stories(2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(encoded.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            encode_corpus([source], tokenizer, name)
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt"} | ({"text.bin"} if before else set())
    found = encode_corpus([source], tokenizer, name)
    assert texts_of(tokenizer, found.ids) == stories(2 if before else 1)


def test_what_a_killed_process_left_is_written_over(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Reference: the files of a run that nobody killed."""
    (tmp_path / "text.part").write_bytes(b"half" * 100_000)
    found = encode_corpus([Source(written(tmp_path, "a.txt", stories(1)))], tokenizer, tmp_path / "text")
    assert texts_of(tokenizer, found.ids) == stories(1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "text.bin", "text.json"]
