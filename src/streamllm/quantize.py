"""Weights in 8 or 4 bits: linear layers that read a quarter or an eighth of the bytes, by torch's own packed kernels.

A decode step takes as long as its weights take to be read, so fewer bytes are more speed. Only weights are rounded to
so few bits: eight symmetric by output, four in groups of ``GROUP`` inputs, each with a middle of its own. The kernels
take bf16 and sum in float32; whatever lies between the layers keeps the model's dtype. In four bits the output head,
where they would cost most, has eight. Embedding, norms and experts (weights that are no linear layer) stay as they are.
Nothing here knows about a cache or a stream. Shapes: ``N`` outputs, ``K`` inputs, ``R`` rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from streamllm.errors import ConfigError, UnsupportedModelError

KINDS = ("none", "int8", "int4")

GROUP = 32
"""Inputs that share a scale in four bits. Both kernels read past the end of rows that are no multiple of it."""

OUTPUTS = 16
"""Outputs that the kernel of four bits takes at a time."""

MANY_ROWS = 64
"""Rows from which on it is faster to widen the weights of eight bits once, and to multiply in bf16."""


class PackedLinear(nn.Module, ABC):
    """A linear layer whose weight is packed; a kind of it says how."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K]; [..., N] in its dtype."""
        found = self.multiply(x.reshape(-1, x.shape[-1]).bfloat16().contiguous()).to(x.dtype)
        found = found.view(*x.shape[:-1], found.shape[-1])
        return found if self.bias is None else found + self.bias

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """``rows`` [R, K] times the weight: [R, N], both in bf16."""


class Int8Linear(PackedLinear):
    """``w = code * scale``, one scale an output.

    Args:
        weight: [N, K], K a multiple of ``GROUP``.
        bias: [N] or ``None``; stays as it is.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        exact = weight.detach().float()
        scale = _bf16(exact.abs().amax(1) / 127)
        codes = (exact / scale[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale.bfloat16())
        # Without such instructions the product in bf16 is the slowest of all.
        self.widens = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def multiply(self, rows: Tensor) -> Tensor:
        """See the base."""
        if self.widens and len(rows) >= MANY_ROWS:
            return linear(rows, self.codes.bfloat16()) * self.scale  # a code fits into bf16 without rounding
        return torch._weight_int8pack_mm(rows, self.codes, self.scale)


class Int4Linear(PackedLinear):
    """``w = (code - 8) * scale + middle``, one scale and middle a group.

    Args:
        weight: [N, K], N a multiple of ``OUTPUTS`` and K of ``GROUP``.
        bias: [N] or ``None``; stays as it is.
    """

    packed: Tensor
    groups: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        exact = weight.detach().float().reshape(len(weight), -1, GROUP)  # [N, K / GROUP, GROUP]
        low, high = exact.aminmax(dim=2, keepdim=True)
        scale = _bf16((high - low) / 15)
        middle = (low + 8 * scale).bfloat16().float()
        codes = ((exact - middle) / scale + 8).round_().clamp_(0, 15).flatten(1).int()
        self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("groups", torch.cat([scale, middle], 2).transpose(0, 1).bfloat16().contiguous())

    def multiply(self, rows: Tensor) -> Tensor:
        """See the base."""
        return torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.groups)


def quantize(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Replace the linear layers of ``model`` by packed ones, one after the other; return it.

    Layers that the kernels cannot take (inputs that are no multiple of 32) stay as they are.

    Args:
        model: on the CPU, not quantised yet.
        kind: one of ``KINDS``; "none" does nothing.

    Raises:
        ConfigError: there is no such kind, or not here.
        UnsupportedModelError: it is quantised already, or none of its layers can be.
    """
    check_kind(kind, model.device)
    if kind == "none":
        return model
    name = f"A model of type {model.config.model_type!r}"
    if (known := kind_of(model)) != "none":
        raise UnsupportedModelError(f"{name} is quantised to {known} already: load it anew to quantise it to {kind}.")
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            packed = _pack(layer, "int8" if layer is head else kind)
            if packed is not None:
                setattr(parent, child, packed)
    if kind_of(model) == "none":
        raise UnsupportedModelError(
            f"{name} cannot be quantised: none of its linear layers has a multiple of {GROUP} inputs, which the "
            "kernels need; load it without --quantize."
        )
    return model


def check_kind(kind: str, device: torch.device) -> None:
    """Refuse a kind that there is not, or for which this machine has no kernel.

    Raises:
        ConfigError: see above.
    """
    if kind not in KINDS:
        raise ConfigError(f"There is no quantisation {kind!r}; choose one of {', '.join(KINDS)}.")
    if kind != "none" and device.type != "cpu":
        raise ConfigError(
            f"Weights in {kind} run on the CPU only, and the device is {device}: leave out --quantize, or pass "
            "--device cpu."
        )
    if kind == "int4" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        raise ConfigError("torch has no fast kernel for int4 on this processor, which lacks AVX2: take int8.")


def kind_of(model: nn.Module) -> str:
    """Return which of ``KINDS`` a model is: that of its layers with the fewest bits."""
    found = {type(layer) for layer in model.modules()}
    return "int4" if Int4Linear in found else "int8" if Int8Linear in found else "none"


def bytes_of(model: nn.Module) -> int:
    """Return the bytes that parameters and buffers take; what is tied counts once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def numbers_of(model: PreTrainedModel) -> str:
    """Return in what ``model`` computes, such as "float32" or "float32, weights int8"."""
    kind, dtype = kind_of(model), str(model.dtype).removeprefix("torch.")
    return dtype if kind == "none" else f"{dtype}, weights {kind}"


def _pack(layer: nn.Module, kind: str) -> PackedLinear | None:
    """A layer in as few bits as ``kind`` says and its shape allows; ``None``: it stays as it is."""
    # Not what is derived from them: it may compute something else.
    if type(layer) is nn.Linear:
        weight = layer.weight
    elif type(layer) is Conv1D:
        weight = layer.weight.T.contiguous()
    else:
        return None
    if weight.shape[1] % GROUP:
        return None
    pack = Int4Linear if kind == "int4" and weight.shape[0] % OUTPUTS == 0 else Int8Linear
    return pack(weight, layer.bias)


def _bf16(scale: Tensor) -> Tensor:
    """Scales as the kernels take them, in float32 and not 0: what is divided by them makes up for their rounding."""
    return scale.clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16().float()
