"""Files of text as documents: whole, in order, in constant memory; and what is no text is refused in one sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from streamllm import corpus
from streamllm.corpus import END_OF_TEXT, Piece, Source, read_documents, read_file, seam
from streamllm.errors import ConfigError, InputError, StreamLLMError
from streamllm.train.vocabulary import train_tokenizer

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
PACKED = [suffix for suffix in COMPRESS if suffix]

WORDS = [
    "a",
    "bird",
    "the",
    "little",
    "garden",
    "über",
    "cat's",
    "don't",
    "1920",
    "«Größe»",
    "日本語",
    "русский",
    "🙂",
    "x=y",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE whose merges reach over whole words."""
    draw = random.Random(0)
    return train_tokenizer([Piece(" ".join(draw.choices(WORDS, k=3000)), ends=True)], 320)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def documents(pieces: Iterable[Piece]) -> list[str]:
    """Pieces joined to documents."""
    found, open_ = [""], False
    for piece in pieces:
        found[-1] += piece.text
        open_ = not piece.ends
        if piece.ends:
            found.append("")
    assert not open_, "the last document has no end"
    return found[:-1]


def written(folder: Path, name: str, data: bytes) -> Source:
    """A file with these bytes, compressed as its name says."""
    file = folder / name
    file.write_bytes(COMPRESS[file.suffix if file.suffix in COMPRESS else ""](data))
    return Source.parse(str(file))


def refusal(source: Source) -> str:
    """The one sentence that reading a file ends with."""
    with pytest.raises(StreamLLMError) as caught:
        list(read_documents([source]))
    message = str(caught.value)
    assert str(source.file) in message
    assert len(message.splitlines()) == 1
    return message


# ---- documents


@pytest.mark.parametrize("suffix", COMPRESS)
def test_marks_part_the_documents_of_a_text_file(tmp_path: Path, suffix: str) -> None:
    """Reference: the documents that were written, without the white space around them; empty ones are left out."""
    wanted = ["One day.\n\nTwo days.", "Ein zweiter, größer.", "🙂 three"]
    text = f"\n\n{wanted[0]}\n{END_OF_TEXT}\n{wanted[1]}{END_OF_TEXT}{END_OF_TEXT} \n {END_OF_TEXT}\n{wanted[2]}\n"
    assert documents(read_file(written(tmp_path, f"a.txt{suffix}", text.encode()))) == wanted
    assert documents(read_file(written(tmp_path, f"b.txt{suffix}", f"{text}{END_OF_TEXT}\n".encode()))) == wanted


def test_a_text_file_without_a_mark_is_one_document(tmp_path: Path) -> None:
    """Reference: the text; lines may end as on Windows, where a byte-order mark may begin the file."""
    assert documents(read_file(written(tmp_path, "a.txt", b"one\n\ntwo\n"))) == ["one\n\ntwo"]
    assert documents(read_file(written(tmp_path, "b.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n"))) == ["one\n\ntwo"]


@pytest.mark.parametrize("before", range(16 - len(END_OF_TEXT), 34))
def test_a_mark_that_two_reads_cut_parts_documents_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """Reference: ``str.split``; the mark lies at every place of a read of 16 characters, and behind pieces too."""
    monkeypatch.setattr(corpus, "PIECE_CHARS", 16)
    text = f"{'word ' * 9}{'x' * before}{END_OF_TEXT}y z{END_OF_TEXT}end"
    assert documents(read_file(written(tmp_path, "a.txt", text.encode()))) == text.split(END_OF_TEXT)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_line_of_a_jsonl_file_is_a_document(tmp_path: Path, suffix: str) -> None:
    """Reference: the texts that were written, as objects and as strings; marks in them are text."""
    wanted = ["one\ntwo", f"a{END_OF_TEXT}b", "größer 🙂"]
    lines = [json.dumps({"id": 3, "text": wanted[0]}), "", json.dumps(wanted[1]), '{"text": " \\n "}', '""', "  "]
    lines.append(json.dumps({"text": f" {wanted[2]}\n"}, ensure_ascii=False))
    source = written(tmp_path, f"a.jsonl{suffix}", "\n".join(lines).encode())
    assert documents(read_file(source)) == wanted


def test_what_lies_inside_the_compression_decides_how_a_file_is_read(tmp_path: Path) -> None:
    """Reference: the last suffix but for that of the compression: this file is text, whatever it was made from."""
    assert documents(read_file(written(tmp_path, "a.jsonl.txt", b'"one"'))) == ['"one"']
    assert documents(read_file(written(tmp_path, "a.txt.jsonl.gz", b'"one"'))) == ["one"]


@pytest.mark.parametrize("suffix", PACKED)
def test_all_parts_of_a_compressed_file_are_read(tmp_path: Path, suffix: str) -> None:
    """Reference: the texts of the parts; so are files that were written bit by bit, or by several threads."""
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(b"".join(COMPRESS[suffix](text) for text in (b"one, ", b"", b"two, ", b"three")))
    assert documents(read_file(Source(file))) == ["one, two, three"]


def test_files_follow_each_other(tmp_path: Path) -> None:
    """Reference: the documents of each; weights change nothing here."""
    sources = [written(tmp_path, name, b'"one"') for name in ("a.txt", "b.jsonl", "c.txt.gz")]
    sources[1] = Source(sources[1].file, 5)
    assert documents(read_documents(sources)) == ['"one"', "one", '"one"']


# ---- pieces


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=120), gap=st.sampled_from([" ", "\n", "  ", " - "]))
def test_pieces_are_the_document_and_have_its_ids(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, kind: str, words: list[str], gap: str
) -> None:
    """Reference: the whole document, given to the tokenizer at once; 48 characters always have a place to cut."""
    whole = " and so".join(f" {word}{gap if i % 3 else ' '}on" for i, word in enumerate(words)).strip()
    file = tmp_path_factory.getbasetemp() / f"pieces.{kind}"
    text = f"\n \n{whole}\n\n"
    file.write_text(text if kind == "txt" else json.dumps(text), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_CHARS", 48)
        pieces = list(read_file(Source(file)))
    assert "".join(piece.text for piece in pieces) == whole
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= 3 * 48
    assert len(pieces) >= len(whole) // (3 * 48)
    assert [one for piece in pieces for one in ids_of(tokenizer, piece.text)] == ids_of(tokenizer, whole)


@settings(max_examples=200, deadline=None)
@given(head=st.text(), tail=st.text(), left=st.characters(categories=["L"]), right=st.characters(categories=["L"]))
def test_a_cut_changes_no_ids_whatever_stands_on_either_side(
    tokenizer: Tokenizer, head: str, tail: str, left: str, right: str
) -> None:
    """Reference: the ids of the uncut text."""
    text = f"{head}{left} {right}{tail}"
    at = seam(text)
    assert text[at] == " "
    assert at >= len(head) + 1
    assert ids_of(tokenizer, text[:at]) + ids_of(tokenizer, text[at:]) == ids_of(tokenizer, text)


@pytest.mark.parametrize("text", ["", "word", "日本語" * 9, " a", "a ", "a  b", "1 2", "a\nb", ". b"])
def test_a_text_without_a_place_to_cut_is_cut_at_its_end(text: str) -> None:
    """Reference: its length."""
    assert seam(text) == len(text)


@pytest.mark.parametrize("text", ["日本語" * 200, "x" * 500, f"a b{'y' * 400}c d{'1 ' * 300}z", f" a b{'y' * 47}"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_pieces_stay_short_where_there_is_hardly_a_place_to_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, text: str
) -> None:
    """Reference: three reads, and the text."""
    monkeypatch.setattr(corpus, "PIECE_CHARS", 16)
    data = f"{text}{END_OF_TEXT}" if kind == "txt" else json.dumps(text)
    pieces = list(read_file(written(tmp_path, f"a.{kind}", data.encode())))
    assert max(len(piece.text) for piece in pieces) <= 48
    assert documents(pieces) == [text.strip()]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl"])
def test_a_long_file_is_read_in_constant_memory(tmp_path: Path, name: str) -> None:
    """Reference: 4 MB of Python's memory for 30 MB; 20 MB where a few bytes of the archive unfold to as much."""
    line = ("It was a bright cold day in April, and the clocks were striking thirteen. " * 4)[:255]
    line = f"{line}\n" if "txt" in name else json.dumps(line * 100) + "\n"
    size = 30_000_000 // len(line) * len(line)
    source = written(tmp_path, name, line.encode() * (size // len(line)))
    tracemalloc.start()
    try:
        found = sum(len(piece.text) for piece in read_file(source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found > 0.98 * size
    assert peak < (20e6 if name.endswith("zst") else 4e6)


# ---- sources


def test_a_weight_may_follow_the_name_of_a_file(tmp_path: Path) -> None:
    """Reference: the number; but a file whose name ends so is that file."""
    file = tmp_path / "a.txt"
    file.write_text("one")
    assert Source.parse(str(file)) == Source(file, 1)
    assert Source.parse(f"{file}:3") == Source(file, 3)
    odd = tmp_path / "b:3.txt"
    odd.write_text("one")
    assert Source.parse(str(odd)) == Source(odd, 1)
    assert Source.parse(f"{odd}:1000") == Source(odd, 1000)


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the file in the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert Source.parse("~/a.txt:2") == Source(tmp_path / "a.txt", 2)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.txt:0", ConfigError, r"a\.txt must be between 1 and 1000, you gave 0\."),
        ("a.txt:1001", ConfigError, r"a\.txt must be between 1 and 1000, you gave 1001\."),
        ("a.txt:99999999999999", ConfigError, "you gave 99999999999999"),
        ("a.txt:-1", InputError, r"a\.txt:-1 does not exist; check its name \(FILE, or FILE:3"),
        ("a.txt:1.5", InputError, r"a\.txt:1\.5 does not exist"),
        ("a.txt:²", InputError, r"a\.txt:² does not exist"),
        ("none.txt", InputError, r"none\.txt does not exist"),
        ("none.txt:3", InputError, r"none\.txt does not exist"),
        ("folder.txt", InputError, r"folder\.txt is a folder; name its files"),
        (f"{'x' * 400}.txt", InputError, r"x\.txt cannot be found: File name too long"),
        ("a.csv", ConfigError, r"a\.csv is none of \.txt, \.jsonl \(or these with \.xz"),
        ("a.csv.gz", ConfigError, r"a\.csv\.gz is none of"),
        ("a", ConfigError, "a is none of"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, name: str, kind: type[Exception], message: str) -> None:
    """Reference: the words of the message."""
    (tmp_path / "folder.txt").mkdir()
    for file in ("a.txt", "a.csv", "a.csv.gz", "a"):
        (tmp_path / file).write_text("one")
    with pytest.raises(kind, match=message):
        Source.parse(str(tmp_path / name))


def test_a_home_that_is_not_known_and_a_pipe_are_refused(tmp_path: Path) -> None:
    """Reference: the words of the messages; a pipe could not be read a second time."""
    with pytest.raises(InputError, match=r"The text ~nobody-of-this-name/a\.txt cannot be found"):
        Source.parse("~nobody-of-this-name/a.txt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        with pytest.raises(InputError, match=r"pipe\.txt is no ordinary file; copy it into one"):
            Source.parse(str(tmp_path / "pipe.txt"))


# ---- bad input


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("left", [0.999, 0.5, 6])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, suffix: str, left: float) -> None:
    """Reference: the whole file, which is read; a part of it must not pass for the whole."""
    text = random.Random(1).randbytes(30_000).hex()
    source = written(tmp_path, f"a.txt{suffix}", text.encode())
    assert documents(read_file(source)) == [text]
    data = source.file.read_bytes()
    source.file.write_bytes(data[: int(left * len(data)) if left < 1 else int(left)])
    assert "cannot be read: it is cut short or damaged (" in refusal(source)


@pytest.mark.parametrize("suffix", PACKED)
def test_a_damaged_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    """Reference: text that was only renamed, and noise behind the first bytes of a real archive."""
    source = written(tmp_path, f"a.txt{suffix}", b"one " * 1000)
    begin = source.file.read_bytes()[:10]
    for data in (b"this is no archive at all", begin + random.Random(2).randbytes(1000)):
        source.file.write_bytes(data)
        assert "cannot be read: it is cut short or damaged (" in refusal(source)
        assert refusal(source).endswith("put a whole, readable file there.")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.xz", "a.txt.zst"])
@pytest.mark.parametrize("data", [b'"one \xff two"', b'"one \xc3', '"one"'.encode("utf-16")], ids=["byte", "end", "16"])
def test_what_is_not_utf_8_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    """Reference: the words of the message."""
    assert "is not UTF-8 text (" in refusal(written(tmp_path, name, b'"one two three"\n' * 5000 + data))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("once upon a time", "is not JSON (Expecting value"),
        ('{"text": "one', "is not JSON (Invalid control character at, column 14); each line must be one document."),
        ("[" * 100_000, "is not JSON ("),
        ('{"Text": "one"}', 'has no text; it must be an object with a "text", or a string.'),
        ('{"text": null}', "has no text"),
        ('["one"]', "has no text"),
        ("17", "has no text"),
        ('{"text": "one \\ud83d two"}', "has half a character (\\ud83d)"),
        ('"much too long a line"', "is longer than 20 characters"),
    ],
)
def test_a_line_that_is_no_document_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    """Reference: the words of the message; two good lines and an empty one stand before it."""
    if "long" in line:
        monkeypatch.setattr(corpus, "LINE_CHARS", 20)
    source = written(tmp_path, "a.jsonl", f'"one"\n\n{{"text": "two"}}\n{line}\n'.encode())
    assert f"Line 4 of {source.file} {message}" in refusal(source)


@pytest.mark.parametrize("name", [f"a.{kind}{suffix}" for kind in ("txt", "jsonl") for suffix in COMPRESS])
def test_files_without_text_are_refused(tmp_path: Path, name: str) -> None:
    """Reference: the names of all; beside a file with text, an empty one does no harm."""
    first, second = written(tmp_path, name, b""), written(tmp_path, "b.txt", f" \n{END_OF_TEXT}\n".encode())
    with pytest.raises(InputError) as caught:
        list(read_documents([first, second]))
    assert str(caught.value) == f"There is no text in {first.file}, {second.file}; give other files."
    third = written(tmp_path, "c.txt", b"one")
    assert documents(read_documents([first, third, second])) == ["one"]


def test_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    """Reference: what the system says about it, and not that it be damaged."""
    source = written(tmp_path, "a.txt.gz", b"one")
    source.file.unlink()
    assert "cannot be read: No such file or directory;" in refusal(source)


def test_zst_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the words of the message."""
    source = written(tmp_path, "a.txt.zst", b"one")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"a\.txt\.zst needs the package zstandard: pip install"):
        list(read_file(source))
