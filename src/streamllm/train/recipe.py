"""What a training run does, frozen and checked: every default of training stands here and only here.

Two runs with the same recipe, on the same text and processor, read the same tokens in the same order and end with the
same weights (on an accelerator, within rounding). Nothing here knows about torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from streamllm.config import check_count
from streamllm.errors import ConfigError

Sink = Literal["token", "zero", "none"]
"""``token``: every sequence begins with a sink token; ``zero``: softmax-off-by-one; ``none``: neither."""

SINKS: tuple[Sink, ...] = ("token", "zero", "none")
DTYPES = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("muon", "adamw")

MEASURES = 24
"""How often the held-out figures are taken along a run."""

SAVE_DTYPES = ("float32", "bfloat16", "float16")
"""What weights are saved in; the first is the default."""


@dataclass(frozen=True)
class Shape:
    """Size of a Llama: ``hidden`` is a multiple of ``heads``, and ``heads`` of ``kv_heads``."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context: int

    def parameters(self) -> int:
        """Weights of the model, with tied embeddings."""
        keys = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocabulary * self.hidden + self.layers * layer + self.hidden

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token: three times those of the matrix products of a forward."""
        norms = self.hidden * (2 * self.layers + 1)
        attention = 2 * self.layers * self.context * self.hidden  # two products over half the context on average
        return 3 * (2 * (self.parameters() - norms) + attention)


SIZES: dict[str, Shape] = {
    "toy": Shape(64, 2, 2, 1, 192, 512, 128),
    "tiny": Shape(192, 6, 3, 1, 576, 4096, 512),
    "small": Shape(256, 8, 4, 2, 768, 4096, 512),
    "medium": Shape(512, 8, 8, 4, 1408, 8192, 1024),
    "base": Shape(576, 30, 9, 3, 1536, 16384, 2048),
}
"""Shapes by name, from seconds on a processor (toy) to days on an accelerator (base)."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Args:
        size: name of the shape, one of ``SIZES``.
        sink: what a head that has nothing to attend to may attend to (``SINKS``; paper, section 3.3).
        tokens: tokens to train on; ``None`` until ``minutes`` are translated into them.
        hidden, layers, heads, kv_heads, intermediate, vocabulary, context: of the shape (see ``Shape``); ``None``: as
            the size has it.
        optimizer: ``muon`` (matrices by Muon, the rest by AdamW) or ``adamw``.
        learning_rate: at its highest.
        weight_decay: of matrices.
        batch_tokens: tokens of one step of the optimizer, rounded down to whole sequences.
        warmup: share of the run in which the learning rate rises.
        final: learning rate at the end, as a share of the highest.
        clip: largest norm of the gradient.
        seed: of weights and order.
        dtype: of matrix products; ``auto`` takes bfloat16 where the device computes in it.

    Raises:
        ConfigError: a value is out of range.
    """

    size: str = "small"
    sink: Sink = "token"
    tokens: int | None = None
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None
    vocabulary: int | None = None
    context: int | None = None
    optimizer: str = "muon"
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    batch_tokens: int = 16384
    warmup: float = 0.02
    final: float = 0.05
    clip: float = 1.0
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("size", self.size, SIZES),
            ("sink", self.sink, SINKS),
            ("dtype", self.dtype, DTYPES),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in known:
                raise ConfigError(f"There is no {name} {value!r} for training; choose one of {', '.join(known)}.")
        for name, count, least in (
            ("tokens", self.tokens, 1),
            ("hidden", self.hidden, 2),
            ("layers", self.layers, 1),
            ("heads", self.heads, 1),
            ("kv_heads", self.kv_heads, 1),
            ("intermediate", self.intermediate, 1),
            ("vocabulary", self.vocabulary, 258),  # the bytes, and the two tokens that are none
            ("context", self.context, 32),
            ("seed", self.seed, 0),
        ):
            if count is not None:
                check_count(name, count, least)
        shape = self.shape
        check_count("batch_tokens", self.batch_tokens, shape.context)
        if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
            raise ConfigError(
                f"A model with hidden {shape.hidden}, {shape.heads} heads and {shape.kv_heads} kv_heads cannot be: "
                "hidden must be an even multiple of heads, and heads a multiple of kv_heads."
            )
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed must be below 2**63, you gave {self.seed}.")
        for name, fits, range_ in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "of at least 0"),
            ("warmup", 0 <= self.warmup <= 1, "between 0 and 1"),
            ("final", 0 <= self.final <= 1, "between 0 and 1"),
            ("clip", 0 < self.clip < math.inf, "above 0"),
        ):
            if not fits:
                raise ConfigError(f"{name} must be a number {range_}, you gave {getattr(self, name)}.")

    @property
    def shape(self) -> Shape:
        """The shape that is trained."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Shape)}
        return dataclasses.replace(SIZES[self.size], **{name: n for name, n in given.items() if n is not None})

    @property
    def span(self) -> int:
        """Tokens of text in a sequence.

        One place is kept for the sink token, also where there is none, so that twins that differ in the sink read the
        same text.
        """
        return self.shape.context - 1

    @property
    def batch(self) -> int:
        """Sequences of one step."""
        return self.batch_tokens // self.shape.context

    @property
    def step_tokens(self) -> int:
        """Tokens of text of one step."""
        return self.batch * self.span

    @property
    def steps(self) -> int:
        """Steps of the run; ``tokens`` must be known."""
        assert self.tokens is not None
        return max(1, round(self.tokens / self.step_tokens))

    def rate(self, step: int) -> float:
        """Learning rate of step ``step``, from 0, as a share of the highest.

        A straight rise, then half a cosine that reaches ``final`` in the last step.
        """
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        fall = (step + 1 - rise) / (self.steps - rise)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * fall))

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)
