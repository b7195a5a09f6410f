"""The text of an evaluation: the ids of its documents, as many as are wanted, and no other."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from streamllm.errors import ConfigError, InputError
from streamllm.evaluate import text as module
from streamllm.evaluate.text import check_files, encode_text, packaged_text
from tokenizers_for_tests import byte_level

DOCUMENTS = ["Once upon a time there was a girl.", "She had a red ball " * 4000 + "end.", "你好 😀"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The documents in files of two kinds."""
    with lzma.open(tmp_path / "a.jsonl.xz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:2])
    (tmp_path / "b.txt").write_text(DOCUMENTS[2], encoding="utf-8")
    return [str(tmp_path / "a.jsonl.xz"), str(tmp_path / "b.txt")]


def test_documents_are_parted_by_the_end_token(files: list[str], tmp_path: Path) -> None:
    """Reference: the tokenizer on each document as a whole; BOS at the head only."""
    tokenizer = byte_level("llama3")
    found = encode_text(tokenizer, files, tmp_path)
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    end = tokenizer.eos_token_id
    assert found.ids.shape == (1, sum(map(len, bare)) + 4)
    assert found.ids[0].tolist() == [1, *bare[0], end, *bare[1], end, *bare[2], end]
    assert found.files == ["a.jsonl.xz", "b.txt"]


def test_every_document_may_begin_as_a_text_does(files: list[str], tmp_path: Path) -> None:
    """Reference: the protocol of the paper, one call of the tokenizer a text (whose end token is not read)."""
    tokenizer = byte_level("llama3")
    found = encode_text(tokenizer, files, tmp_path, every_document=True)
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    assert found.ids[0].tolist() == [x for ids in bare for x in (1, *ids)]


def test_no_more_is_read_than_is_wanted(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the head of all ids; the second file is never opened."""
    tokenizer = byte_level()
    whole = encode_text(tokenizer, files, tmp_path).ids
    opened = []
    read = module.read_documents
    monkeypatch.setattr(module, "read_documents", lambda sources: (opened.append(sources), read(sources))[1])
    found = encode_text(tokenizer, files, tmp_path, tokens=1234)
    assert found.ids.tolist() == whole[:, :1234].tolist()
    assert len(opened) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.xz", "b.txt"]


def test_standard_input_is_a_file_like_others(tmp_path: Path) -> None:
    """Reference: the tokenizer on what was piped in."""
    tokenizer = byte_level()
    found = encode_text(tokenizer, ["-"], tmp_path, piped=iter([DOCUMENTS[0][:100], DOCUMENTS[0][100:]]))
    assert found.ids[0].tolist() == [*tokenizer(DOCUMENTS[0])["input_ids"], tokenizer.eos_token_id]
    assert found.files == ["stdin"]


def test_too_little_text_is_refused_with_its_length(files: list[str], tmp_path: Path) -> None:
    """Reference: by hand."""
    with pytest.raises(InputError, match=r"The text has \d+ tokens .* 500 are needed"):
        encode_text(byte_level(), files[1:], tmp_path, least=500)


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("nowhere.txt", InputError, "The text nowhere.txt does not exist"),
        ("README.md", ConfigError, "is none of .txt, .jsonl"),
        ("a.txt:3", ConfigError, "has a weight, which only counts in training"),
    ],
)
def test_files_that_are_no_text_are_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], sentence: str
) -> None:
    """Reference: by hand."""
    monkeypatch.chdir(tmp_path)
    for file in ("a.txt", "README.md"):
        Path(file).write_text("x")
    with pytest.raises(error, match=sentence):
        check_files(["-", "a.txt", name])


def test_the_packaged_text_has_stories_of_the_embedded_model() -> None:
    """Reference: what it is said to be: documents apart by the end mark, some tens of kilobytes."""
    stories = packaged_text().read_text(encoding="utf-8").split("<|endoftext|>")
    assert len(stories) > 100
    assert sum(map(len, stories)) > 50_000
    assert all(story.strip() for story in stories)
