"""Where a model's attention falls: maps over the first tokens, and the mass on them (paper, figures 2 and 7).

The weights are those that transformers gives out itself, with eager attention; so any model that has it can be watched.
A softmax forgets what all logits of a row have in common, so logits come centred: the logarithms of the weights less
their mean over the keys that the query sees, which is what the softmax saw (soft caps and biases included) less its
mean. A weight that rounds to zero counts as not seen. What a row lacks to one fell on nothing: on a zero sink, or on a
sink that the model has learned beside its keys.

Shapes: ``B`` rows, ``H`` heads, ``T`` tokens, ``L`` layers, ``S`` first tokens, ``K`` heads that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from streamllm.checkpoint import first_line, size
from streamllm.errors import ConfigError, UnsupportedModelError
from streamllm.models import free_bytes, quiet_libraries
from streamllm.zero_sink import ZERO_SINK, ZERO_SINK_EAGER

FIRST = (1, 2, 4)
"""Numbers of first tokens whose mass is taken."""

FEWEST = 8
"""Sequences without which there is no interval."""

ROUNDING = 8
"""Times the precision of the weights: rows that miss one by less, in every head, miss it by rounding."""


_TENSORS = ("mass", "squares", "nothing", "attention", "logits", "seen")
"""Of ``LayerSums``."""


class LayerSums:
    """Running sums of one layer's attention over sequences; their size does not depend on how many.

    Args:
        heads: of the layer.
        skip: the first queries, which see too few tokens to choose from, are left out of the masses.
        shown: first tokens of the maps, S.
        kept: heads that have maps of their own, at most; spread evenly over all.

    Attributes:
        kept: the heads.
        count: sequences so far.
        mass: [H, 3] on the first ``FIRST`` tokens, sum over sequences of the mean over queries.
        squares: [3] likewise of the square of the mean over heads, from which intervals come.
        nothing: [H] what is missing to one, likewise.
        attention: [1 + K, S, S] sums of weights; the first map is the mean over all heads.
        logits, seen: [1 + K, S, S] sums of centred logits, and how many there were.
    """

    def __init__(self, heads: int, *, skip: int, shown: int, kept: int) -> None:
        kept = min(kept, heads)
        self.kept = [round(i * (heads - 1) / max(1, kept - 1)) for i in range(kept)]
        self.skip, self.shown, self.count = skip, shown, 0
        self.mass = torch.zeros(heads, len(FIRST), dtype=torch.float64)
        self.squares = torch.zeros(len(FIRST), dtype=torch.float64)
        self.nothing = torch.zeros(heads, dtype=torch.float64)
        maps = (1 + len(self.kept), shown, shown)
        self.attention, self.logits, self.seen = (torch.zeros(maps, dtype=torch.float64) for _ in range(3))

    def add(self, weights: Tensor) -> None:
        """Take in weights [B, H, T, T] of whole sequences."""
        late = weights[:, :, self.skip :].float()  # [B, H, T - skip, T]
        mass = torch.stack([late[..., :n].sum(-1).mean(2) for n in FIRST], dim=-1)  # [B, H, 3]
        self.mass += _sum(mass)
        self.squares += _sum(mass.mean(1) ** 2)
        self.nothing += _sum((1 - late.sum(-1)).mean(2))
        self.count += len(weights)
        if not self.shown:
            return
        early = weights[:, :, : self.shown, : self.shown].float()  # [B, H, S, S]
        seen = early > 0
        logs = early.log().where(seen, 0)
        mean = logs.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
        self.attention += (
            _sum(self._maps(early)) / torch.tensor([early.shape[1], *(1 for _ in self.kept)])[:, None, None]
        )
        self.logits += _sum(self._maps((logs - mean).where(seen, 0)))
        self.seen += _sum(self._maps(seen.float()))

    def _maps(self, found: Tensor) -> Tensor:
        """[B, 1 + K, S, S]: the sum over all heads, and the heads that are kept."""
        return torch.cat([found.sum(1, keepdim=True), found[:, self.kept]], dim=1)

    def interval(self, index: int) -> list[float | None]:
        """Mean mass of all heads on the first ``FIRST[index]`` tokens, and its interval over sequences."""
        mean = float(self.mass[:, index].mean()) / self.count
        if self.count < FEWEST:
            return [mean, None, None]
        spread = max(0.0, float(self.squares[index]) / self.count - mean**2) / (self.count - 1)
        return [mean, mean - 1.96 * spread**0.5, mean + 1.96 * spread**0.5]

    def to_dict(self) -> dict[str, Any]:
        """The sums, ready for JSON."""
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> LayerSums:
        """The sums that ``to_dict`` gave."""
        sums = cls(len(found["nothing"]), skip=found["skip"], shown=found["shown"], kept=len(found["kept"]))
        sums.count = found["count"]
        for name in _TENSORS:
            getattr(sums, name)[:] = torch.tensor(found[name], dtype=torch.float64).view_as(getattr(sums, name))
        return sums

    def merge(self, other: LayerSums) -> None:
        """Add those of other sequences."""
        self.count += other.count
        for name in _TENSORS:
            sums = getattr(self, name)
            sums += getattr(other, name)


def _sum(found: Tensor) -> Tensor:
    """The sum over the rows, in double precision and on the CPU, where there is such a thing."""
    return found.sum(0).cpu().double()


def check_memory(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a length whose weights, which all layers give out at once, would not fit.

    Raises:
        ConfigError: they would not.
    """
    config: Any = model.config.get_text_config(decoder=True)
    heads, free = getattr(config, "num_attention_heads", 0), free_bytes(model.device)
    need = config.num_hidden_layers * heads * tokens**2 * max(model.dtype.itemsize, 4)
    if free is not None and need > free:
        raise ConfigError(
            f"The attention weights of {tokens} tokens take {size(need)}, and {size(free)} of memory are free on "
            f"{model.device}: give a smaller --length."
        )


@torch.no_grad()
def sum_attention(
    model: PreTrainedModel, rows: Iterable[Tensor], *, skip: int, shown: int = 0, kept: int = 0
) -> list[LayerSums]:
    """Sums of the attention over sequences, one entry for each layer that has attention.

    Args:
        model: a decoder with eager attention.
        rows: [1, T] ids each, beginning as the model's texts do.
        skip, shown, kept: see ``LayerSums``.

    Raises:
        UnsupportedModelError: the model gives out no weights.
    """
    sums: list[LayerSums] = []
    with _giving_weights(model):
        for row in rows:
            weights = _weights(model, row)
            sums = sums or [LayerSums(each.shape[1], skip=skip, shown=shown, kept=kept) for each in weights]
            for layer, each in zip(sums, weights, strict=True):
                layer.add(each)
    return sums


def sink_mass(model: PreTrainedModel, ids: Tensor, *, skip: int) -> tuple[Tensor, Tensor]:
    """Mean attention on the first token, and on nothing (a zero sink), of the queries from ``skip`` on: [L, H] each.

    Args:
        model: a decoder with eager attention, and as many heads in every layer.
        ids: [B, T] sequences as the model was trained on.
        skip: the first queries, which see too few tokens to choose from, are left out.

    Raises:
        UnsupportedModelError: the model gives out no weights.
    """
    sums = sum_attention(model, (ids[row : row + 1] for row in range(len(ids))), skip=skip)
    first = torch.stack([layer.mass[:, FIRST.index(1)] / layer.count for layer in sums])
    return first, torch.stack(mass_on_nothing(sums, model.dtype))


def mass_on_nothing(sums: Sequence[LayerSums], dtype: torch.dtype) -> list[Tensor]:
    """Mean attention on nothing, [H] for each layer; exactly 0 for a model that can only attend to tokens.

    Args:
        sums: of its layers.
        dtype: of the model; softmaxes are float32 at best.
    """
    found = [layer.nothing / layer.count for layer in sums]
    rounding = ROUNDING * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if all(float(each.abs().max()) <= rounding for each in found):
        return [torch.zeros_like(each) for each in found]
    return found


@contextmanager
def _giving_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend in the way that gives out weights; as before when the block ends."""
    config: Any = model.config
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    usual = [(part, part._attn_implementation) for part in parts if getattr(part, "_attn_implementation", None)]
    wanted = ZERO_SINK_EAGER if config._attn_implementation == ZERO_SINK else "eager"
    with quiet_libraries():
        try:
            model.set_attn_implementation(wanted)
            if config._attn_implementation != wanted:  # refused by models that choose for themselves, such as Falcon
                config._attn_implementation = wanted
            yield
        finally:
            for part, implementation in usual:
                part._attn_implementation = implementation


def _weights(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The weights [1, H, T, T] of each layer that has attention, over ids [1, T]."""
    total = ids.shape[1]
    try:
        found = model(input_ids=ids.to(model.device), use_cache=False, output_attentions=True)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _unfit(model, first_line(error)) from error
    given = getattr(found, "attentions", None) or ()
    weights = [each for each in given if each is not None and each.shape[-2:] == (total, total)]
    if not weights:
        raise _unfit(model, "transformers gives out none for it")
    if any(bool(each.triu(1).any()) for each in weights):
        raise _unfit(model, "those that transformers gives out fall on tokens still to come, so they are not its own")
    return weights


def _unfit(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention weights of this model ({model.config.model_type}) cannot be had: {why}; take a model with "
        "eager attention."
    )
