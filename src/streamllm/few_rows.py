"""Layers over few rows, in forms that a compiler turns into loops as fast as the memory.

A decode step multiplies matrices by one row a stream. The matrix libraries that PyTorch calls for that are made for
many rows: on a processor of two cores they read 17 GB/s of weights for one row and 12 GB/s for eight, where a plain
loop reads 60 (docs/results/bench). ``FewRows`` is a mode of PyTorch's public override protocol: it touches no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MOST_ROWS = 16
"""More rows than this are many."""


class FewRows(TorchFunctionMode):
    """While it is on, linear layers and attention over few rows on a processor are computed in those forms.

    The sums are the same, added in another order.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch."""
        own = _FORMS.get(func)
        found = own(*args, **(kwargs or {})) if own else None
        return func(*args, **(kwargs or {})) if found is None else found


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``functional.linear`` over input [..., K]; ``None``: better as it is."""
    rows = math.prod(input.shape[:-1])
    if input.device.type != "cpu" or not 0 < rows <= MOST_ROWS or weight.ndim != 2 or weight.dtype != input.dtype:
        return None
    if rows == 1 and input.is_floating_point():
        out = (weight * input.reshape(1, -1)).sum(-1)
        out = out if bias is None else out + bias
    elif input.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        out = torch.ops.mkldnn._linear_pointwise(input.reshape(rows, -1), weight, bias, "none", [], "")
    else:
        return None
    return out.reshape(*input.shape[:-1], -1)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``scaled_dot_product_attention`` of query [B, H, 1, D] over [B, G, C, D]; ``None``: better as it is."""
    fits = (
        query.device.type == "cpu"
        and query.ndim == key.ndim == value.ndim == 4
        and query.shape[2] == 1
        and query.shape[0] == key.shape[0]
        and key.shape[:3] == value.shape[:3]
        and (query.shape[1] == key.shape[1] or enable_gqa)
    )
    if not fits or is_causal or dropout_p or not (attn_mask is None or _adds(attn_mask)):
        return None
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    packed = query.reshape(batch * groups, heads // groups, size)  # the queries of one head of keys side by side
    scores = torch.bmm(packed, key.reshape(batch * groups, -1, size).transpose(1, 2))
    scores = scores.view(batch, groups, heads // groups, -1) * (size**-0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores + attn_mask  # [B, 1, 1, C]
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=exact).to(value.dtype).view(batch * groups, heads // groups, -1)
    out = torch.bmm(weights, value.reshape(batch * groups, -1, value.shape[-1]))
    return out.view(batch, heads, 1, -1)


def _adds(mask: Tensor) -> bool:
    """Whether a mask is added to the scores, and is the same for all heads."""
    return mask.is_floating_point() and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


_FORMS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.scaled_dot_product_attention: _attention,
}
