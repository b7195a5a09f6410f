"""The text of an evaluation as ids on disk, so that its length does not matter and every method reads the same.

Documents are parted by the end token; the tokenizer's begin token stands at the head of the stream, or of every
document (the protocol of the paper's reference evaluation). Without files the text is what the embedded model wrote: it
is there anywhere, but figures that mean something need real text.
"""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamllm.console import STDIN
from streamllm.corpus import Source, read_documents
from streamllm.errors import ConfigError, InputError
from streamllm.reading import read_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTING = "\n\n"
"""Between documents, where the tokenizer has no end token."""


@dataclass(frozen=True)
class Text:
    """The text of an evaluation.

    Args:
        ids: [1, N] mapped from a file that is gone when the process ends; what is written to them stays in memory.
        files: names of what it was read from.
    """

    ids: np.ndarray[Any, Any]
    files: list[str]


def packaged_text() -> Path:
    """The file that is read where none is given."""
    return Path(str(importlib.resources.files("streamllm") / "assets" / "stories.txt"))


def check_files(files: Sequence[str]) -> None:
    """Refuse what cannot be text, before a model is loaded.

    Raises:
        ConfigError: a file of a kind that is not known, or with a weight.
        InputError: there is no such file.
    """
    for name in files:
        if name != STDIN and Source.parse(name).weight != 1:
            raise ConfigError(f"{name} has a weight, which only counts in training; give the file once.")


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[str],
    folder: Path,
    *,
    tokens: int | None = None,
    least: int = 2,
    every_document: bool = False,
    piped: Iterable[str] = (),
    watch: Callable[[], None] = lambda: None,
) -> Text:
    """The first ``tokens`` ids of the files.

    Args:
        tokenizer: of the model.
        files: .txt and .jsonl, also compressed; ``-`` is standard input. None: the packaged text.
        folder: where the ids are put, in a file without a name.
        tokens: at most; ``None``: all.
        least: tokens that the evaluation needs.
        every_document: every document gets the tokens that the tokenizer puts in front of a text, not only the first.
        piped: the text of ``-``, one document.
        watch: is called now and then, and may raise.

    Raises:
        ConfigError, InputError: a file cannot be used, or there is not enough text.
        OSError: the disk is full.
    """
    count = 0
    with tempfile.TemporaryFile(dir=folder) as spool:
        for ids in _ids(tokenizer, files, piped, every_document=every_document):
            watch()
            part = ids if tokens is None else ids[: tokens - count]
            spool.write(np.asarray(part, np.uint32).tobytes())
            count += len(part)
            if count == tokens:
                break
        if count < least:
            where = ", ".join(files) or "the packaged text"
            if count == tokens:
                raise InputError(f"{count:,} tokens are too few: this evaluation needs {least:,} of them.")
            raise InputError(
                f"The text has {count:,} tokens ({where}), {least:,} are needed: give more with --data, or ask for a "
                "smaller cache."
            )
        spool.flush()
        mapped = np.memmap(spool, np.uint32, mode="c", shape=(1, count))
    return Text(mapped, [Path(name).name if name != STDIN else "stdin" for name in files] or ["packaged"])


def _ids(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[str], piped: Iterable[str], *, every_document: bool
) -> Iterator[list[int]]:
    """The ids of all documents."""
    parting = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else PARTING
    if not every_document:
        yield from read_ids(tokenizer, (text for document in _documents(files, piped) for text in (*document, parting)))
        return
    for document in _documents(files, piped):
        yield from read_ids(tokenizer, document)


def _documents(files: Sequence[str], piped: Iterable[str]) -> Iterator[Iterable[str]]:
    """The documents, each in pieces; a document must be read before the next one."""
    for name in files or [str(packaged_text())]:
        if name == STDIN:
            yield piped
            continue
        pieces = read_documents([Source.parse(name)])
        for first in pieces:
            yield _document(first.text, first.ends, pieces)


def _document(text: str, ends: bool, pieces: Iterator[Any]) -> Iterator[str]:
    yield text
    while not ends:
        piece = next(pieces)
        ends = piece.ends
        yield piece.text
