"""Questions as ids, in one stream and each alone, and which of them are answered.

A base model sees question, choices and "Answer:", and has to go on with the label; a chat model gets the same as a
user's turn and answers in its own. Prompt, answer and what follows are encoded one after the other, so that no token
lies across the border of an answer. Shapes: ``N`` tokens of the stream, ``Q`` questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from streamllm.checkpoint import first_line
from streamllm.errors import UnsupportedModelError
from streamllm.evaluate.desk import Desk
from streamllm.evaluate.questions import Question
from streamllm.evaluate.scores import Scores, score_stream
from streamllm.evaluate.share import share
from streamllm.reading import read_ids

SEPARATOR = "\n\n"
"""Between pairs, for a model without a chat template."""

INSTRUCTION = "\nReply with the label of the right choice and nothing else."
"""Only for chat models, which would talk otherwise."""


class Quiz:
    """See the module.

    Args:
        tokenizer: of the model; one with a chat template is that of a chat model.
        questions: with their right answers, which stay in the stream.

    Attributes:
        ids: [1, N] of the stream.
        owner: [N] the question whose answer a token belongs to; -1: none.
        alone: [1, n] ids of each question up to its answer, as at the head of a stream.
        ends: [Q] tokens of the stream up to the end of each answer.

    Raises:
        UnsupportedModelError: the chat template cannot hold a question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> None:
        head = [] if tokenizer.chat_template else [i for ids in read_ids(tokenizer, "") for i in ids]
        ids, owner, self.alone, ends = list(head), [-1] * len(head), [], []
        lengths = []
        for number, question in enumerate(questions):
            prompt, answer, rest = _encode(tokenizer, _turns(tokenizer, question))
            self.alone.append(np.array([head + prompt + answer]))
            lengths.append(len(answer))
            ends.append(len(ids) + len(prompt) + len(answer))
            ids += prompt + answer + rest
            owner += [-1] * len(prompt) + [number] * len(answer) + [-1] * len(rest)
        self.ids, self.owner, self.ends = np.array([ids]), np.array(owner), np.array(ends)
        self._lengths = np.array(lengths)

    @property
    def alone_tokens(self) -> int:
        """Tokens that are scored if each question is asked alone."""
        return sum(ids.shape[1] - 1 for ids in self.alone)

    def ask(self, desk: Desk, name: str, make_cache: Callable[[], Cache], tokens: int) -> dict[str, Any]:
        """Ask all in one stream, of which the first ``tokens`` are read.

        Returns:
            ``hits`` and ``losses`` (in nats) of each answer; ``None`` where it was not read.

        Raises:
            Interrupted: a signal came.
        """
        marks = _Marks(self._lengths)
        at = 1
        for scores in score_stream(desk.model, self.ids[:, :tokens], make_cache()):
            width = scores.losses.shape[1]
            marks.add(self.owner[at : at + width], scores)
            at += width
            desk.advance(width, f"{name} · {marks}")
        return marks.to_dict()

    def ask_alone(self, desk: Desk, name: str, make_cache: Callable[[], Cache], tokens: int) -> dict[str, Any]:
        """Ask each in a cache of its own, if it has at most ``tokens``; returns and raises as ``ask``."""
        marks = _Marks(self._lengths)
        for number, ids in enumerate(self.alone):
            at, total = 1, ids.shape[1]
            owner = np.full(total, -1)
            owner[total - self._lengths[number] :] = number
            for scores in score_stream(desk.model, ids, make_cache()) if total <= tokens else ():
                marks.add(owner[at : at + scores.losses.shape[1]], scores)
                at += scores.losses.shape[1]
            desk.advance(total - 1, f"{name} · {marks}")
        return marks.to_dict()


class _Marks:
    """What was found about the answers' tokens so far."""

    def __init__(self, lengths: NDArray[Any]) -> None:
        self.lengths = lengths
        self.read, self.hits = (np.zeros(len(lengths), int) for _ in range(2))
        self.losses = np.zeros(len(lengths))

    def add(self, owner: NDArray[Any], scores: Scores) -> None:
        """Take in the scores of tokens, and whose they are, [n]."""
        ours = owner >= 0
        np.add.at(self.read, owner[ours], 1)
        np.add.at(self.hits, owner[ours], scores.hits[0].cpu().numpy()[ours])
        np.add.at(self.losses, owner[ours], scores.losses[0].cpu().numpy()[ours])

    def __str__(self) -> str:
        is_read = self.read == self.lengths
        return f"{int((self.hits == self.lengths)[is_read].sum())} of {int(is_read.sum())} right"

    def to_dict(self) -> dict[str, Any]:
        """Hits and losses of the answers that were read wholly."""
        is_read = self.read == self.lengths
        return {
            "hits": [int(h == n) if r else None for h, n, r in zip(self.hits, self.lengths, is_read, strict=True)],
            "losses": [round(float(x), 5) if r else None for x, r in zip(self.losses, is_read, strict=True)],
        }


def compare(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of each method, over the questions that it read and over those that all read."""
    read = [[hit is not None for hit in marks["hits"]] for marks in found.values()]
    by_all = [all(some) for some in zip(*read, strict=True)]
    return {
        "common": sum(by_all),
        "methods": {
            name: {"all": _figures(marks, mine), "common": _figures(marks, by_all), **marks}
            for (name, marks), mine in zip(found.items(), read, strict=True)
        },
    }


def _figures(marks: dict[str, Any], counts: Sequence[bool]) -> dict[str, Any]:
    """Accuracy and mean loss over the questions that count, with their intervals; ``None`` where none does."""
    hits, losses = ([x for x, is_in in zip(marks[key], counts, strict=True) if is_in] for key in ("hits", "losses"))
    if not hits:
        return {"questions": 0, "accuracy": None, "loss": None}
    mean = sum(losses) / len(losses)
    spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / max(1, len(losses) - 1) / len(losses))
    return {
        "questions": len(hits),
        "accuracy": share(sum(hits), len(hits)),
        "loss": [mean, mean - 1.96 * spread, mean + 1.96 * spread],
    }


# ---- as text, and as ids


def _turns(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[str, str, str]:
    """What stands before the answer, the answer, and what follows it."""
    if not tokenizer.chat_template:
        return question.prompt, f" {question.answer}", SEPARATOR
    user = {"role": "user", "content": question.prompt + INSTRUCTION}
    model = {"role": "assistant", "content": question.answer}

    def render(turns: list[dict[str, str]], **options: Any) -> str:
        # Templates that know of thinking leave it out; others do not look at the option.
        return str(tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **options))

    try:
        opened, whole = render([user], add_generation_prompt=True), render([user, model])
    except Exception as error:  # a template is a program of its own
        raise UnsupportedModelError(
            f"The chat template of this model cannot hold a question: {first_line(error)}; take another model."
        ) from error
    before, found, rest = whole.removeprefix(opened).partition(question.answer)
    if not whole.startswith(opened) or not found:
        return opened, question.answer, tokenizer.eos_token or ""
    if before.strip():  # not the model's words, but the template's
        return opened + before, question.answer, rest
    return opened, before + question.answer, rest


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that follow each other; some tokenizers put a space in front of one that stands alone."""
    found: list[list[int]] = []
    known: list[int] = []
    before = ""
    for text in texts:
        before += text
        both = _ids(tokenizer, before)
        fits = both[: len(known)] == known
        found.append(both[len(known) :] if fits else _ids(tokenizer, text))
        known = both
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids
