"""Text files as a stream of documents: .txt and .jsonl, plain or compressed (.xz, .gz, .zst).

A text file holds documents apart by ``<|endoftext|>``; without that mark it is one document. A line of a .jsonl file
is one document: an object with a ``text``, or a string. No file is ever held in memory; a long document comes in
pieces, cut where a byte-level tokenizer cuts too, so that the pieces have the ids of the whole. Nothing here knows
about ids.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from streamllm.checkpoint import first_line
from streamllm.errors import ConfigError, InputError

END_OF_TEXT = "<|endoftext|>"
"""What parts the documents of a text file, and the token that ends a document."""

PIECE_CHARS = 1 << 14
"""Characters read at once; no piece of a document is longer than three times that. Longer than the mark."""

LINE_CHARS = 1 << 24
"""The longest line of a .jsonl file, as a line can only be read whole."""

MOST_WEIGHT = 1000
"""Times an epoch that a file can be read."""

ZSTD_BYTES = 256
"""Bytes given to zstandard at once; no four of them become more than 128 KiB, which bounds memory."""

SUFFIXES = (".txt", ".jsonl")
COMPRESSED = (".xz", ".gz", ".bz2", ".zst")


@dataclass(frozen=True)
class Piece:
    """A piece of a document; ``ends``: the document ends with it."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Source:
    """A file of a corpus, counted ``weight`` times an epoch."""

    file: Path
    weight: int = 1

    @classmethod
    def parse(cls, text: str) -> Source:
        """A source from ``FILE`` or ``FILE:WEIGHT``.

        Raises:
            ConfigError: the weight is out of range, or the kind of file is not known.
            InputError: there is no such file.
        """
        name, _, weight = text.rpartition(":")
        try:
            weighted = bool(name) and weight.isdecimal() and not Path(text).expanduser().exists()
            file = Path(name if weighted else text).expanduser()
            exists, is_file, is_folder = file.exists(), file.is_file(), file.is_dir()
        except (OSError, RuntimeError) as error:  # a name too long, a closed folder, an unknown home
            raise InputError(f"The text {text} cannot be found: {_why(error)}; check its name.") from error
        if weighted and not (len(weight) < 5 and 1 <= int(weight) <= MOST_WEIGHT):
            raise ConfigError(f"The weight of {name} must be between 1 and {MOST_WEIGHT}, you gave {weight}.")
        if not is_file:
            what = "does not exist; check its name (FILE, or FILE:3 for three times)"
            if exists:
                what = "is a folder; name its files" if is_folder else "is no ordinary file; copy it into one"
            raise InputError(f"The text {file} {what}.")
        source = cls(file, int(weight) if weighted else 1)
        if source.kind not in SUFFIXES:
            raise ConfigError(
                f"{file} is none of {', '.join(SUFFIXES)} (or these with {', '.join(COMPRESSED)}); rename it or "
                "convert it."
            )
        return source

    @property
    def kind(self) -> str:
        """The suffix of what is inside the compression."""
        return (self.file.with_suffix("") if self.file.suffix in COMPRESSED else self.file).suffix


def read_documents(sources: Sequence[Source]) -> Iterator[Piece]:
    """The documents of all files, one file after the other, in pieces.

    Raises:
        InputError: a file cannot be read, is cut short, is not UTF-8, or has a line that is no document; or there is
            no text in any.
    """
    is_empty = True
    for source in sources:
        for piece in read_file(source):
            is_empty = False
            yield piece
    if is_empty:
        raise no_text(sources)


def no_text(sources: Sequence[Source]) -> InputError:
    """What to say if no file has a document."""
    return InputError(f"There is no text in {', '.join(str(source.file) for source in sources)}; give other files.")


def read_file(source: Source) -> Iterator[Piece]:
    """The documents of one file, in pieces; empty documents are left out.

    Raises:
        ConfigError: a package that the compression needs is not there.
        InputError: as ``read_documents``, but for a file without text.
    """
    try:
        with _open(source.file) as opened:
            yield from _from_lines(opened, source.file) if source.kind == ".jsonl" else _from_text(opened)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source.file} is not UTF-8 text ({error.reason}); convert it, for example with iconv."
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        why = _why(error) if getattr(error, "errno", None) else f"it is cut short or damaged ({_why(error)})"
        raise InputError(f"{source.file} cannot be read: {why}; put a whole, readable file there.") from error


def _why(error: Exception) -> str:
    """The reason, without the number and the path that Python puts around it."""
    return getattr(error, "strerror", None) or first_line(error)


def _open(file: Path) -> IO[str]:
    """The decompressed text of a file."""
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zstd}
    opener = openers.get(file.suffix, open)
    stream = cast("IO[bytes]", opener(file, "rb"))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="strict", newline=None)


def _open_zstd(file: Path, _mode: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"Reading {file} needs the package zstandard: pip install 'streamllm[train]'.") from error
    return io.BufferedReader(_ZstdFile(file.open("rb"), zstandard))


class _ZstdFile(io.RawIOBase):
    """What a .zst file holds, frame after frame; ``zstandard.open`` takes a file that is cut short for a whole one."""

    def __init__(self, file: IO[bytes], zstandard: Any) -> None:
        self.file, self.zstandard = file, zstandard
        self.frame: Any = None
        self.waiting = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes; none only at the end of a file that is whole."""
        while not self.waiting:
            block = self.file.read(ZSTD_BYTES)
            if not block:
                if self.frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self.waiting = memoryview(self._decompress(block))
        count = min(len(buffer), len(self.waiting))
        buffer[:count] = self.waiting[:count]
        self.waiting = self.waiting[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        found = []
        while block:
            self.frame = self.frame or self.zstandard.ZstdDecompressor().decompressobj()
            try:
                found.append(self.frame.decompress(block))
            except self.zstandard.ZstdError as error:
                raise OSError(first_line(error)) from error
            block = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        return b"".join(found)

    def close(self) -> None:
        """Close the file too."""
        self.file.close()
        super().close()


def _from_lines(lines: IO[str], file: Path) -> Iterator[Piece]:
    for number in itertools.count(1):
        line = lines.readline(LINE_CHARS + 1)
        if not line:
            return
        if len(line) > LINE_CHARS:
            raise InputError(
                f"Line {number} of {file} is longer than {LINE_CHARS:,} characters; make more lines of it."
            )
        if line.strip():
            yield from _cut(_document(line, f"Line {number} of {file}"))


def _document(line: str, where: str) -> str:
    """The text of a line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise InputError(f"{where} is not JSON ({why}); each line must be one document.") from error
    text = found.get("text") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise InputError(f'{where} has no text; it must be an object with a "text", or a string.')
    if half := re.search("[\ud800-\udfff]", text):
        raise InputError(f"{where} has half a character (\\u{ord(half[0]):04x}), which is no Unicode text; correct it.")
    return text


def _cut(text: str) -> Iterator[Piece]:
    """A whole document in pieces."""
    text = text.strip()
    begin = 0
    while len(text) - begin > 2 * PIECE_CHARS:
        end = begin + seam(text[begin : begin + PIECE_CHARS])
        yield Piece(text[begin:end], ends=False)
        begin = end
    if text:
        yield Piece(text[begin:], ends=True)


def seam(text: str) -> int:
    """Where the head of a longer text may be cut: before its last single space between two letters, or at its end.

    A byte-level tokenizer begins a new word there whatever stands on either side.
    """
    at = len(text)
    while (at := text.rfind(" ", 1, at)) > 0:
        if text[at - 1].isalpha() and at + 1 < len(text) and text[at + 1].isalpha():
            return at
    return len(text)


def _from_text(opened: IO[str]) -> Iterator[Piece]:
    """Documents of a text file. What is not handed on yet stays in ``rest``, which is never longer than three reads."""
    rest, is_fresh = "", True
    while block := opened.read(PIECE_CHARS):
        rest += block
        *whole, rest = rest.split(END_OF_TEXT)
        for text in whole:
            yield from _last(text, is_fresh=is_fresh)
            is_fresh = True
        if is_fresh:
            rest = rest.lstrip()
        while len(rest) >= 2 * PIECE_CHARS:
            end = seam(rest[:-PIECE_CHARS])
            yield Piece(rest[:end], ends=False)
            rest, is_fresh = rest[end:], False
    yield from _last(rest, is_fresh=is_fresh)


def _last(text: str, *, is_fresh: bool) -> Iterator[Piece]:
    """The last piece of a document; none if the document is empty."""
    text = text.strip() if is_fresh else text.rstrip()
    if text or not is_fresh:
        yield Piece(text, ends=True)
