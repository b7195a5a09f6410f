"""Linear layers and attention on a processor, in forms quicker than those that PyTorch takes by itself.

A decode step multiplies matrices by one row a stream. The library that PyTorch calls for that (MKL) was made for many
rows and for other processors: on two cores of an AMD EPYC it reads 17 GB/s of weights for one row, where a compiled
loop reads 60, and computes 180 GFLOP/s over 256 rows, where oneDNN, which comes with PyTorch too, computes 440.
``QuickForms`` is a mode of PyTorch's public override protocol: it touches no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class QuickForms(TorchFunctionMode):
    """While it is on, linear layers, and attention of single tokens, are computed in those forms on a processor.

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
    if input.device.type != "cpu" or not rows or weight.ndim != 2 or weight.dtype != input.dtype:
        return None
    if rows == 1 and input.is_floating_point() and torch.compiler.is_compiling():
        out = (weight * input.reshape(1, -1)).sum(-1)
        out = out if bias is None else out + bias
    elif input.dtype == torch.float32 and HAS_ONEDNN and not torch.is_grad_enabled():
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
        and torch.compiler.is_compiling()
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
