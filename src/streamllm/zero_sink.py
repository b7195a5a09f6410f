"""The zero sink: softmax-off-by-one, which lets a head attend to nothing (paper, section 3.3).

``softmax1(x)_i = exp(x_i) / (1 + sum_j exp(x_j))`` is the ordinary softmax with one more key whose logit is 0 and whose
value is 0. So the attention of transformers does the work, over keys and values with a column of zeros in front, and is
plugged in through the public attention interface. Shapes: ``B`` rows, ``H`` heads, ``T`` new tokens, ``N`` keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

ZERO_SINK = "zero_sink"
"""Its name among the attention implementations of transformers."""

ZERO_SINK_EAGER = "zero_sink_eager"
"""The same, written out: slower, and it gives the weights."""


def zero_sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query`` [B, H, T, D] over ``key`` and ``value`` [B, H, N, D]; output [B, T, H, D]."""
    new = query.shape[2]
    key, value = (pad(t, (0, 0, 1, 0)) for t in (key, value))
    if attention_mask is not None:
        # The column of zeros is visible to everyone: True in a mask of booleans, 0 in an additive one.
        attention_mask = pad(attention_mask, (1, 0), value=attention_mask.dtype == torch.bool)
    elif new > 1:
        # The causal kernel counts from the first key, so a query that is thrown away goes with it.
        query = pad(query, (0, 0, 1, 0))
    output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    return output[:, output.shape[1] - new :], None


def zero_sink_eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """As ``zero_sink_attention``, without dropout; and the weights [B, H, T, N]: rows lack what fell on nothing."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling  # [B, H, T, N]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = pad(scores, (1, 0)).softmax(-1, dtype=torch.float32).to(query.dtype)[..., 1:]
    return (weights @ value).transpose(1, 2), weights


def register() -> None:
    """Make the zero sink known to transformers as an ``attn_implementation``; may be called again."""
    AttentionInterface.register(ZERO_SINK, zero_sink_attention)
    AttentionMaskInterface.register(ZERO_SINK, sdpa_mask)
    AttentionInterface.register(ZERO_SINK_EAGER, zero_sink_eager_attention)
    AttentionMaskInterface.register(ZERO_SINK_EAGER, eager_mask)


def mark(config: PreTrainedConfig) -> None:
    """Write into a model's config that it was trained with a zero sink, so that whoever loads it can know."""
    config.streamllm_attention = ZERO_SINK


def switch_on(model: PreTrainedModel) -> None:
    """Give a model that is marked so its zero sink; leave any other as it is."""
    if getattr(model.config, "streamllm_attention", None) == ZERO_SINK:
        register()
        model.set_attn_implementation(ZERO_SINK)
