"""Shapes of Llama models by name, and random weights for them: only the shape matters for speed.

Weights are made where they are needed and in the type they are needed in, so 7B in bfloat16 never takes more than its
13.5 GB. Letters as everywhere: ``H`` heads, ``D`` head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamllm.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

POSITIONS = 8192
"""Trained length of every random model: twice the largest window, so that each window fits."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Shape:
    """Size of a Llama.

    Args:
        hidden .. vocabulary: as in its config.
        tied: whether the head is the embedding.
        head_size: numbers of one head, if not hidden / heads.
        positions: trained length.
        like: the model that has this shape.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True
    head_size: int | None = None
    positions: int = POSITIONS
    like: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        size = self.head_size or self.hidden // self.heads
        attention = 2 * self.hidden * size * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.layers * layer + self.hidden

    def describe(self) -> str:
        """The shape in words, for records."""
        return (
            f"random Llama: hidden {self.hidden}, intermediate {self.intermediate}, {self.layers} layers, "
            f"{self.heads} heads, {self.kv_heads} key-value heads, vocabulary {self.vocabulary}, "
            f"{'tied' if self.tied else 'untied'}, {self.positions} positions"
        )

    def thin(self) -> Shape:
        """The same attention, layer by layer, in a model whose weights weigh nothing."""
        size = self.head_size or self.hidden // self.heads
        narrow = self.heads * -(-8 // self.heads)  # a config wants a multiple of the heads
        return replace(self, hidden=narrow, intermediate=narrow, vocabulary=256, tied=True, head_size=size)

    def config(self) -> LlamaConfig:
        """The config of transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size or self.hidden // self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.positions,
            tie_word_embeddings=self.tied,
        )


SHAPES: dict[str, Shape] = {
    "toy": Shape(64, 128, 2, 4, 2, 512, positions=1024),
    "15M": Shape(288, 768, 6, 6, 6, 32000, like="stories15M"),
    "135M": Shape(576, 1536, 30, 9, 3, 49152, like="SmolLM-135M"),
    "360M": Shape(960, 2560, 32, 15, 5, 49152, like="SmolLM-360M"),
    "1B": Shape(2048, 8192, 16, 32, 8, 128256, like="Llama-3.2-1B"),
    "7B": Shape(4096, 11008, 32, 32, 32, 32000, tied=False, like="Llama-2-7B"),
}
"""By the names that ``--shape`` takes; the toy is for trying out the command."""


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"There is no shape {name!r}; choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A model of that shape with random weights, ready to run.

    Raises:
        ConfigError: it would not fit into the memory that is free.
    """
    import torch
    from transformers import LlamaForCausalLM

    _check_memory(shape, dtype, device)
    config = shape.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(dtype)  # type: ignore[arg-type]
    model.to_empty(device=device)
    model.tie_weights()
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            else:
                # What passes through keeps its size at any width, so that a probe sees what each part does.
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=draw)
    # Its frequencies are no weights, so they have to be worked out again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.eval().requires_grad_(False)
    return model


def _check_memory(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    from streamllm.checkpoint import size
    from streamllm.models import free_bytes

    need, free = shape.parameters * dtype.itemsize, free_bytes(device)
    if free is None or need <= free:
        return
    half = need * 2 // dtype.itemsize
    remedy = f"pass --dtype bfloat16 ({size(half)}) or " if half < need and half <= free else ""
    raise ConfigError(
        f"Random weights of this shape take {size(need)} in {str(dtype).removeprefix('torch.')}, and {size(free)} of "
        f"memory are free on {device}: {remedy}choose a smaller --shape."
    )
