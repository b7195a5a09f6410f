"""How much attention falls on the first token of a sequence (paper, figures 2 and 7).

The attention of every layer is watched through transformers' public attention interface, and computed as the model
itself computes it. Shapes: ``B`` rows, ``H`` heads, ``T`` tokens, ``L`` layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from streamllm.zero_sink import ZERO_SINK

_WATCHING = "streamllm_watching"


@torch.no_grad()
def sink_mass(model: PreTrainedModel, ids: Tensor, *, skip: int) -> tuple[Tensor, Tensor]:
    """Mean attention on the first token, and on nothing (a zero sink), of the queries from ``skip`` on: [L, H] each.

    Args:
        model: a decoder whose attention goes through transformers' attention interface, without soft capping.
        ids: [B, T] sequences as the model was trained on.
        skip: the first queries, which see too few tokens to choose from, are left out.
    """
    usual = model.config._attn_implementation
    zero = usual == ZERO_SINK
    first: list[Tensor] = []
    nothing: list[Tensor] = []

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * options["scaling"]  # [B, H, T, T]
        if mask is not None:
            scores = scores + mask
        if zero:
            scores = pad(scores, (0, 1))
        weights = scores.float().softmax(-1)
        first.append(weights[:, :, skip:, 0].mean((0, 2)))
        nothing.append(weights[:, :, skip:, -1].mean((0, 2)) if zero else torch.zeros_like(first[-1]))
        return (weights[..., : key.shape[2]].to(value.dtype) @ value).transpose(1, 2), None

    AttentionInterface.register(_WATCHING, watch)
    AttentionMaskInterface.register(_WATCHING, eager_mask)
    model.set_attn_implementation(_WATCHING)
    try:
        for row in range(len(ids)):
            model(input_ids=ids[row : row + 1], use_cache=False)
    finally:
        model.set_attn_implementation(usual)
    on_first, on_nothing = (
        torch.stack(found).view(len(ids), -1, found[0].shape[0]).mean(0) for found in (first, nothing)
    )
    return on_first, on_nothing
