"""How likely the model held a token, and which tokens it held most likely: logarithms of probabilities.

Knows logits of one stream ``[V]`` (``V`` vocabulary) and ids; nothing about how a token is drawn (``sampling``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamllm.config import MOST_LOGPROBS
from streamllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities where one token was drawn.

    They are those of the model itself: log softmax of its logits in float32, before penalties, bias, ban and
    temperature. So a token can be drawn that the model held unlikely, and none of the most likely ones need be it.

    Args:
        drawn: of the token that was drawn.
        top: the most likely ids with theirs, the likeliest first.
    """

    drawn: float
    top: tuple[tuple[int, float], ...]


def check_logprobs(count: int | None) -> None:
    """Refuse a number of most likely tokens that cannot be asked for; ``None`` asks for nothing.

    Raises:
        ConfigError: it is no whole number from 0 to ``MOST_LOGPROBS``.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_LOGPROBS):
        raise ConfigError(
            f"logprobs must be a whole number from 0 to {MOST_LOGPROBS}, you gave {count!r}; 0 tells of the token that "
            "was drawn alone, None of none."
        )


def measure(logits: Tensor, token: int, count: int) -> Logprobs:
    """Return what the model's own logits ``[V]`` say of ``token``, and of the ``count`` most likely ids."""
    scores = torch.log_softmax(logits.detach().float(), dim=-1)
    if not count:
        return Logprobs(scores[token].item(), ())
    best = scores.topk(min(count, scores.shape[-1]))
    return Logprobs(scores[token].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
