"""Tokens as clients are told of them: spelt, in bytes, with their log probabilities."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from streamllm.loop import Chunk

LEAST = -9999.0
"""Stands for minus infinity, which JSON has not."""


class Spelling:
    """Tells the log probabilities of tokens.

    Args:
        tokenizer: spells them.
        most: how many of the most likely ones are told beside each.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._begins = len(tokenizer.decode(self._before))

    def text(self, id: int) -> str:
        """A token as it stands in a text: many tokenizers take the space of the first one away."""
        return str(self._tokenizer.decode([*self._before, id]))[self._begins :]

    def chat(self, chunk: Chunk) -> list[dict[str, Any]]:
        """As in a chat completion: one entry for the token of a chunk."""
        found = chunk.logprobs
        if found is None or chunk.id is None:
            return []
        top = [self._entry(id, logprob) for id, logprob in found.top[: self._most]]
        return [{**self._entry(chunk.id, found.drawn), "top_logprobs": top}]

    def text_entry(self, chunk: Chunk, at: int) -> dict[str, list[Any]]:
        """As in a completion: lists, here of one; ``at``: where the text of the chunk begins."""
        found = chunk.logprobs
        if found is None or chunk.id is None:
            return {}
        top = {self.text(id): max(logprob, LEAST) for id, logprob in found.top[: self._most]}
        return {
            "tokens": [self.text(chunk.id)],
            "token_logprobs": [max(found.drawn, LEAST)],
            "top_logprobs": [top],
            "text_offset": [at],
        }

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.text(id)
        # A piece of a character is no text, so its bytes are not known by it.
        spelt = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": spelt}
