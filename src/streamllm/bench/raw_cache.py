"""The scheme of the paper's reference implementation, written anew from its description, to compare with.

Keys are cached as they were before rotation. At every step the new key is concatenated to them, all of them are rotated
by their index in the cache, and one token is evicted by slicing and concatenating once more (paper, section 3.2; the
published code does so for every token and layer). Shapes: [B, H, N, D] as everywhere.

The model hands over keys that are rotated already, so the new one is rotated back before it is stored: one token's
work, which the published code does not have. In turn this one runs inside a current transformers model, with its
faster bookkeeping, so it is, if anything, the faster of the two. The published code computes attention by plain
matrix products ("eager"); with SDPA the scheme is shown at its best.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.cache_utils import Cache, CacheLayerMixin


class RawLayer(CacheLayerMixin):
    """Unrotated keys, and values, of one layer.

    Args:
        cos, sin: [N, D] tables for every index that the cache can reach.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cos, self.sin = cos, sin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin empty."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D]; return all keys, rotated by their index, and all values [B, H, N + T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        raw = _turn(key_states, self.cos[begin:end], -self.sin[begin:end])
        self.keys = torch.cat([self.keys, raw], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        # The published code looks the angles of all positions up anew in every layer, and so does this.
        positions = torch.arange(end, device=self.keys.device)
        return _turn(self.keys, self.cos[positions], self.sin[positions]), self.values

    def evict(self, sinks: int, count: int) -> None:
        """Drop the ``count`` oldest tokens behind the sinks."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (
            torch.cat([t[:, :, :sinks], t[:, :, sinks + count :]], dim=2) for t in (self.keys, self.values)
        )

    def get_seq_length(self) -> int:
        """Tokens cached."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what ``update`` will return."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: any number of tokens may pass through."""
        return -1


class RawCache(Cache):
    """``sinks`` + ``window`` tokens of a Llama, evicted one at a time."""

    def __init__(self, model: LlamaModel, sinks: int, window: int) -> None:
        self.sinks, self.size = sinks, sinks + window
        indices = torch.arange(self.size, device=model.device)[None]
        cos, sin = model.rotary_emb(torch.zeros(1, dtype=model.dtype, device=model.device), indices)  # [1, N, D] each
        super().__init__(layers=[RawLayer(cos[0], sin[0]) for _ in range(model.config.num_hidden_layers)])

    def make_room(self, count: int) -> None:
        """Evict so that ``count`` more tokens fit."""
        excess = self.get_seq_length() + count - self.size
        if excess > 0:
            for layer in self.layers:
                assert isinstance(layer, RawLayer)
                layer.evict(self.sinks, excess)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [B, H, T, D], half-split, by the angles of ``cos`` and ``sin`` [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
