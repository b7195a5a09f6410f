"""How well a model foresees each next token of a stream (paper, section 4.1): one loop for every method.

A method is a cache: a ``SinkCache`` streams, one without sinks is a sliding window, one that re-reads at every token is
the sliding window with re-computation, and a ``DynamicCache`` of transformers is dense attention. Steps run over
evictions exactly, so their length changes the time and nothing else. Shapes: ``B`` streams side by side, ``N`` tokens
of each. Nothing here knows about files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from streamllm.cache import SinkCache
from streamllm.config import PREFILL_CHUNK
from streamllm.errors import UnsupportedModelError

Ids = Tensor | np.ndarray[Any, Any]
"""[B, N] ids; an array may be mapped from a file that is larger than the memory."""


@dataclass(frozen=True)
class Scores:
    """What a forward found about ``n`` tokens of each stream.

    Args:
        losses: [B, n] negative log-likelihoods in nats.
        hits: [B, n] whether the token was the most likely one, so that greedy decoding would have drawn it.
    """

    losses: Tensor
    hits: Tensor


def score_stream(
    model: PreTrainedModel, ids: Ids, cache: Cache, *, begin: int = 0, step: int = PREFILL_CHUNK
) -> Iterator[Scores]:
    """Scores of ``ids[:, begin + 1:]``, as they are read; ``cache`` is left as it is before the last token.

    With a cache that grows the scores end early where the model's table of positions does, or the memory.

    Args:
        model: a causal language model.
        ids: [B, N] tokens of B streams of equal age.
        cache: what the model reads with.
        begin: tokens that the cache has read already.
        step: tokens of a forward at most.

    Raises:
        CacheError: the cache belongs to another model, or was broken off.
        UnsupportedModelError: a loss is no number.
    """
    total = ids.shape[1] - 1
    while begin < total:
        width = min(cache.columns(None, step) if isinstance(cache, SinkCache) else step, total - begin)
        part = ids[:, begin : begin + width + 1]
        if not isinstance(part, Tensor):
            part = torch.from_numpy(part.astype(np.int64))
        part = part.to(model.device)
        targets = part[:, 1:]
        try:
            with torch.inference_mode():
                logits = model(input_ids=part[:, :-1], past_key_values=cache, use_cache=True).logits.float()
                losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
                hits = logits.argmax(-1) == targets
        except (RuntimeError, IndexError) as error:
            if isinstance(cache, SinkCache) or begin == 0 or not _is_exhausted(error):
                raise
            return
        if not bool(losses.isfinite().all()):
            raise UnsupportedModelError(
                f"The losses of this model are no numbers in {str(model.dtype).removeprefix('torch.')}: try --dtype "
                "float32 or bfloat16."
            )
        yield Scores(losses, hits)  # outside of the mode, which would be the caller's, too
        begin += width


def _is_exhausted(error: Exception) -> bool:
    """Whether positions or memory have come to their end."""
    # The allocator of the CPU has no exception of its own.
    return isinstance(error, (IndexError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def read_losses(model: PreTrainedModel, ids: Ids, cache: Cache, *, step: int = PREFILL_CHUNK) -> Tensor:
    """All losses of ``score_stream``, [B, N - 1], on the CPU; same arguments and errors.

    They are put into one tensor as they come: many small ones, kept between the large ones of the forwards, would leave
    the allocator with holes that nothing fits into.
    """
    found = torch.empty(ids.shape[0], ids.shape[1] - 1)
    begin = 0
    for scores in score_stream(model, ids, cache, step=step):
        width = scores.losses.shape[1]
        found[:, begin : begin + width] = scores.losses
        begin += width
    return found


def perplexity(losses: Tensor) -> float:
    """Exponential of the mean loss."""
    return math.exp(float(losses.double().mean()))
