"""Multiple-choice questions in the format of ARC: from files, from the Hub, or those that come with streamllm.

A file holds a JSON list, or one JSON object a line, of ``{"question": ..., "choices": {"text": [...], "label": [...]},
"answerKey": ...}``, also compressed; ``hub:ARC-Easy`` and ``hub:ARC-Challenge`` are the tests themselves. Nothing here
knows about tokens or models.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamllm.checkpoint import first_line
from streamllm.console import STDIN
from streamllm.corpus import Source, read_file
from streamllm.errors import ConfigError, InputError

HUB = "hub:"
HUB_REPOSITORY = "allenai/ai2_arc"
HUB_NAMES = ("ARC-Easy", "ARC-Challenge")
HUB_FILE = "{}/test-00000-of-00001.parquet"

PARQUET = ".parquet"

MOST_CHARS = 1 << 26
"""Of a file, which is read whole; the tests of ARC have a million."""


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Args:
        text: of the question.
        choices: label and text of each.
        answer: label of the right one.
    """

    text: str
    choices: tuple[tuple[str, str], ...]
    answer: str

    @property
    def prompt(self) -> str:
        """What a model is to continue with a label."""
        return "\n".join([f"Question: {self.text}", *(f"{label}. {text}" for label, text in self.choices), "Answer:"])


def check_sources(names: Sequence[str]) -> None:
    """Refuse what cannot hold questions, before a model is loaded.

    Raises:
        ConfigError: no such test on the Hub, or a package is missing.
        InputError: there is no such file.
    """
    for name in names:
        if name.startswith(HUB) and name.removeprefix(HUB) not in HUB_NAMES:
            known = " or ".join(HUB + each for each in HUB_NAMES)
            raise ConfigError(f"There are no questions called {name}: give {known}, or a file.")
        if name.startswith(HUB) or name.endswith(PARQUET):
            _parquet(name)
        if name == STDIN or name.startswith(HUB):
            continue
        try:
            is_file = Path(name).expanduser().is_file()
        except (OSError, RuntimeError) as error:  # a name too long, an unknown home
            raise InputError(f"The file {name} cannot be found: {first_line(error)}; check its name.") from error
        if not is_file:
            raise InputError(f"There is no file {name} with questions; check its name.")


def read_questions(names: Sequence[str], piped: Iterable[str] = ()) -> list[Question]:
    """All questions of files and tests; those that come with streamllm if none is named.

    Args:
        names: of files, ``hub:ARC-Easy`` and the like, or ``-``.
        piped: the text of ``-``.

    Raises:
        ConfigError, InputError: one cannot be read, or is not what the module describes.
    """
    names = names or [str(importlib.resources.files("streamllm") / "assets" / "questions.json")]
    found = []
    for name in names:
        where = shown(name)
        raw = list(_raw(name, piped))
        if not raw:
            raise InputError(f"There is no question in {where}; give another file.")
        found += [_question(each, f"Question {number} of {where}") for number, each in enumerate(raw, 1)]
    return found


def shown(name: str) -> str:
    """What to call a file or test: no folders of this machine."""
    return "stdin" if name == STDIN else Path(name).name


def _raw(name: str, piped: Iterable[str]) -> Iterator[Any]:
    """The objects of a file or test."""
    if name.startswith(HUB) or name.endswith(PARQUET):
        file = _fetch(name.removeprefix(HUB)) if name.startswith(HUB) else str(Path(name).expanduser())
        try:
            rows = _parquet(name).read_table(file).to_pylist()
        except Exception as error:  # damaged in many ways
            raise InputError(f"{file} cannot be read as parquet: {first_line(error)}; fetch it again.") from error
        yield from rows
        return
    text = _text(name, piped)
    if text.startswith("["):
        yield from _load(text, shown(name))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _load(line, f"Line {number} of {shown(name)}")


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not JSON ({first_line(error)}); questions are a JSON list, or a JSON object a line, in the "
            "format of ARC."
        ) from error


class _Plain(Source):
    """A file that is read as text, whatever its name says."""

    @property
    def kind(self) -> str:
        """That of text."""
        return ".txt"


def _text(name: str, piped: Iterable[str]) -> str:
    """The text of a file."""
    file = _Plain(Path(name).expanduser())
    pieces = piped if name == STDIN else (piece.text for piece in read_file(file))
    parts, length = [], 0
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length > MOST_CHARS:
            raise InputError(
                f"{name} is longer than {MOST_CHARS:,} characters: make several files of it, and name some."
            )
    return "".join(parts).strip()


def _question(found: Any, where: str) -> Question:
    """One question, checked."""
    try:
        labels, texts = found["choices"]["label"], found["choices"]["text"]
        question = Question(found["question"], tuple(zip(labels, texts, strict=True)), found["answerKey"])
        "".join([question.text, question.answer, *labels, *texts]).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a character, which is no Unicode text; correct it.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f'{where} is not in the format of ARC ({type(error).__name__}: {first_line(error)}): it needs "question", '
            '"choices" with as many of "text" as of "label", and "answerKey", all of them text.'
        ) from error
    if len(labels) < 2 or len(set(labels)) < len(labels) or question.answer not in labels or not all(labels):
        raise InputError(
            f"{where} cannot be answered: its choices are {labels}, its answer is {question.answer!r}; it must be one "
            "of two or more, none of them empty."
        )
    return question


def _parquet(name: str) -> Any:
    """What reads parquet files: no dependency of streamllm, since only the Hub keeps questions in them."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(f"Reading {name} needs the package pyarrow: pip install pyarrow.") from error


def _fetch(test: str) -> str:
    """The file of a test, from the Hub or its cache on this machine."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from streamllm.models import quiet_downloads

    file = HUB_FILE.format(test)
    try:
        with quiet_downloads():
            return hf_hub_download(HUB_REPOSITORY, file, repo_type="dataset")
    except Exception as error:  # no network, no disk, no answer: many kinds, one sentence
        cause = type(error.__cause__ or error).__name__
        is_away = isinstance(error, LocalEntryNotFoundError)
        why = f"the Hub cannot be reached ({cause})" if is_away else first_line(error)
        raise InputError(
            f"{HUB}{test} cannot be fetched, {why}: fetch it once while online, or get {file} of the dataset "
            f"{HUB_REPOSITORY} elsewhere and give it with --data."
        ) from error
