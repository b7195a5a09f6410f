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


ROWS = 32
"""oneDNN makes code for every number of rows, and keeps it: hundreds of megabytes for prompts of all lengths. So a
prompt is filled up to a multiple of this; fewer rows are multiplied as quickly without it."""


class QuickForms(TorchFunctionMode):
    """While it is on, linear layers are computed in those forms on a processor, where gradients are not wanted.

    The sums are the same, added in another order.

    Args:
        loops: also use forms for single rows that are quick only if a compiler makes loops of them, in linear layers
            and in the attention of one token.
    """

    def __init__(self, *, loops: bool = False) -> None:
        super().__init__()
        self._forms = _LOOPS if loops else _FORMS

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch."""
        for form in self._forms.get(func, ()):
            found = form(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``functional.linear`` over input [..., K] by oneDNN; ``None``: better as it is."""
    rows = math.prod(input.shape[:-1])
    dtypes = {input.dtype, weight.dtype, torch.float32}
    if input.device.type != "cpu" or weight.ndim != 2 or not rows or len(dtypes) > 1:
        return None
    if not HAS_ONEDNN or torch.is_grad_enabled():
        return None
    out = _onednn(_rounded(input.reshape(rows, -1)), weight, bias)[:rows]
    return out.reshape(*input.shape[:-1], -1)


def _prompt(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``_linear`` over more than ``ROWS`` rows; ``None``: better as it is."""
    return _linear(input, weight, bias) if math.prod(input.shape[:-1]) > ROWS else None


def _rounded(rows: Tensor) -> Tensor:
    """Rows [R, K] and as many of zeros as make them a multiple of ``ROWS``, if they are more than that."""
    spare = -len(rows) % ROWS if len(rows) > ROWS else 0
    return functional.pad(rows, (0, 0, 0, spare)) if spare else rows


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by oneDNN."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def _row(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``functional.linear`` over one row, input [.., 1, K], as a sum of products; ``None``: better as it is."""
    is_row = math.prod(input.shape[:-1]) == 1 and weight.ndim == 2 and weight.dtype == input.dtype
    if input.device.type != "cpu" or not is_row or not input.is_floating_point():
        return None
    out = (weight * input.reshape(1, -1)).sum(-1)
    out = out if bias is None else out + bias
    return out.reshape(*input.shape[:-1], -1)


def _packed_row(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor | None:
    """``torch._weight_int8pack_mm`` over one row [1, K] as a sum of products; ``None``: better as it is."""
    if rows.device.type != "cpu" or len(rows) != 1:
        return None
    return ((codes.float() * rows.float()).sum(-1) * scale.float()).to(rows.dtype)[None]


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
        query.ndim == key.ndim == value.ndim == 4
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


_FORMS: dict[Callable[..., Any], tuple[Callable[..., Tensor | None], ...]] = {functional.linear: (_prompt,)}

_LOOPS: dict[Callable[..., Any], tuple[Callable[..., Tensor | None], ...]] = {
    functional.linear: (_row, _linear),
    torch._weight_int8pack_mm: (_packed_row,),
    functional.scaled_dot_product_attention: (_attention,),
}
