"""Losses along a stream: how well a model with a bounded cache foresees each next token (paper, section 4.1).

Shapes: ``B`` streams side by side, ``N`` tokens of each. Chunks run over evictions exactly, so the length of a chunk
changes the time and nothing else. Nothing here knows about files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from streamllm.cache import SinkCache
from streamllm.config import PREFILL_CHUNK


def stream_losses(
    model: PreTrainedModel, ids: Tensor, *, sinks: int, window: int, block: int, chunk: int = PREFILL_CHUNK
) -> Iterator[Tensor]:
    """Negative log-likelihoods in nats of ``ids[:, 1:]``, as they are read, [B, n] each.

    Args:
        model: a causal language model.
        ids: [B, N] tokens of B streams of equal age.
        sinks, window, block: of the cache, see ``CacheConfig``.
        chunk: tokens of a forward at most.

    Raises:
        ConfigError, UnsupportedModelError: as ``SinkCache``.
    """
    cache = SinkCache(model, sinks, window, block, batch_size=len(ids))
    begin, total = 0, ids.shape[1] - 1
    while begin < total:
        width = min(cache.columns(None, chunk), total - begin)
        with torch.inference_mode():
            logits = model(input_ids=ids[:, begin : begin + width], past_key_values=cache, use_cache=True).logits
            targets = ids[:, begin + 1 : begin + width + 1]
            losses = cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        yield losses  # outside of the mode, which would be the caller's, too
        begin += width


def read_losses(model: PreTrainedModel, ids: Tensor, **options: int) -> Tensor:
    """All losses of ``stream_losses``, [B, N - 1], on the CPU; same arguments and errors.

    They are put into one tensor as they come: many small ones, kept between the large ones of the forwards, would leave
    the allocator with holes that nothing fits into.
    """
    found = torch.empty(len(ids), ids.shape[1] - 1)
    begin = 0
    for part in stream_losses(model, ids, **options):
        found[:, begin : begin + part.shape[1]] = part
        begin += part.shape[1]
    return found


def perplexity(losses: Tensor) -> float:
    """Exponential of the mean loss."""
    return math.exp(float(losses.double().mean()))
