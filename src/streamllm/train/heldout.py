"""What is measured along a run, on text that is not trained on: loss, and whether the model leans on its first tokens.

The second is the emergence of the sink (paper, section 3.1 and figure 7): the share of attention that falls on the
first token, layer by layer, and the perplexity of a stream whose cache keeps no first token (0 + W) beside that of one
which keeps four (4 + W - 4), on the same tokens. Shapes: ``B`` rows of ``T`` tokens, ``L`` layers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from streamllm import zero_sink
from streamllm.cache import SinkCache
from streamllm.config import CacheConfig
from streamllm.errors import InputError
from streamllm.evaluate.attention import sink_mass
from streamllm.evaluate.scores import perplexity, read_losses
from streamllm.train.encoded import Encoded
from streamllm.train.trainer import Trainer

SEQUENCES = 64
"""Sequences of a held-out text whose loss is taken."""

STREAMS, STREAM_CONTEXTS = 8, 4
"""Streams read side by side, and their length in contexts."""

BLOCK = 16
"""Tokens that leave together in these streams; it fits the shortest context that a recipe may have."""


class HeldOut:
    """Held-out texts of a run, cut once.

    Args:
        texts: by name; losses are taken on all, streams are read from the first.
        trainer: whose model is measured.

    Raises:
        InputError: the texts are shorter than one sequence.
    """

    def __init__(self, texts: dict[str, Encoded], trainer: Trainer) -> None:
        self.trainer, self.texts = trainer, texts
        self.context = trainer.recipe.shape.context
        span = trainer.recipe.span
        for name, text in texts.items():
            if len(text.ids) < span:
                raise InputError(
                    f"The held-out text {name} has {len(text.ids)} tokens, a sequence has {span}: give a longer one "
                    "with --heldout, or a smaller --context."
                )
        self.batches = {name: _spread(text.ids, SEQUENCES, span) for name, text in texts.items()}
        first = next(iter(texts.values()))
        self.streams = _spread(first.ids, STREAMS, min(STREAM_CONTEXTS * self.context, len(first.ids)))
        # Of its own, because the cache puts hooks into a model and the training may be compiled.
        self.copy = LlamaForCausalLM(trainer.model.config)
        zero_sink.switch_on(self.copy)
        self.copy.eval()

    def losses(self) -> dict[str, dict[str, float]]:
        """Loss in nats a token, and in bits a byte of text, of each text."""
        found = {}
        for name, batch in self.batches.items():
            loss, text = self.trainer.held_out(batch), self.texts[name]
            found[name] = {"loss": loss, "bits_per_byte": loss / math.log(2) * len(text.ids) / text.utf8_bytes}
        return found

    def sinks(self) -> dict[str, Any]:
        """How much the model leans on its first token."""
        self.copy.load_state_dict(self.trainer.model.state_dict())
        self.copy.to(self.trainer.device)  # type: ignore[arg-type]
        batch = next(iter(self.batches.values()))[:STREAMS]
        first, nothing = sink_mass(self.copy, self.trainer.begin(batch).to(self.trainer.device), skip=self.context // 8)
        size = self.context // 2
        streams = self.trainer.begin(self.streams).to(self.trainer.device)
        both = {}
        for sinks in (0, CacheConfig.sinks):
            cache = SinkCache(self.copy, sinks, size - sinks, BLOCK, batch_size=len(streams))
            losses = read_losses(self.copy, streams, cache)
            both[f"{sinks}+{size - sinks}"] = perplexity(losses[:, size:])  # before that nothing has left
        values = list(both.values())
        return {
            "sink_mass": [round(float(x), 6) for x in first.mean(1)],
            "sink_mass_of_strongest_head": [round(float(x), 6) for x in first.amax(1)],
            "nothing_mass": [round(float(x), 6) for x in nothing.mean(1)],
            "perplexity": both,
            "ratio": values[0] / values[1],
        }


def _spread(ids: np.ndarray[Any, Any], count: int, length: int) -> Tensor:
    """Up to ``count`` cuts of ``length`` tokens, evenly over ``ids``, [B, T]."""
    count = max(1, min(count, len(ids) // length))
    starts = [round(i * (len(ids) - length) / max(1, count - 1)) for i in range(count)]
    return torch.from_numpy(np.stack([ids[start : start + length] for start in starts]).astype(np.int64))
