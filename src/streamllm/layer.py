"""One layer's keys and values: allocate once, append, and carry out the steps of the ledger.

The layer knows its rotation and nothing about policy. Shapes: ``B`` rows, ``H`` heads, ``T`` new tokens, ``N``
columns in use, ``D`` head size; storage is [B, H, slots, D]. Keys arrive after the model's rotation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from streamllm.errors import CacheError
from streamllm.ledger import Evict, Ledger, Move, Rotate, Span, Step
from streamllm.rope import Rotation


class SinkLayer(CacheLayerMixin):
    """Keys and values of one attention layer, in the columns that ``ledger`` assigns."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, ledger: Ledger, rotations: tuple[Rotation | None, Rotation | None], *, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.rotations = rotations
        self.is_sliding = is_sliding
        self.last: Span | None = None  # what was stored last
        self.heads: tuple[Tensor, Tensor] | None = None  # pinned heads as first stored, [B, H, P, D] each

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for good. Zeros, because 0 * nan is nan even where a mask hides it."""
        # Ordinary tensors even under inference_mode, so that generate() (no_grad) can go on with them.
        with torch.inference_mode(False):
            self.keys, self.values = (
                state.new_zeros((*state.shape[:2], self.ledger.slots, state.shape[-1]))
                for state in (key_states, value_states)
            )
        self.is_initialized = True

    def grow(self) -> None:
        """Allocate anew if the ledger has more slots now, keeping what is stored."""
        if self.is_initialized and self._tensors()[0].shape[2] < self.ledger.slots:
            old = self._tensors()
            self.lazy_initialization(*old)
            for stored, before in zip(self._tensors(), old, strict=True):
                stored[:, :, : before.shape[2]] = before

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``key_states`` and ``value_states`` [B, H, T, D]; return all columns in use [B, H, N + T, D]."""
        span = self.ledger.span
        if span is None or span.columns != key_states.shape[-2]:
            raise CacheError(
                "A SinkCache was used by a model that does not announce its forwards to it: make the cache with "
                "SinkCache(model) from the very model that reads it."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.last = span
        if span.crossings:
            keys, values = (self._cross(i, new) for i, new in enumerate((key_states, value_states)))
            return keys, values
        low, end = self.ledger.low, self.ledger.end
        tensors = self._tensors()
        for stored, new in zip(tensors, (key_states, value_states), strict=True):
            if span.is_padded:
                # Left of its new tokens a row's columns belong to its older tokens, so pads are not written.
                for row, count in enumerate(span.counts):
                    first = span.columns - count
                    stored[row, :, end + first : end + span.columns] = new[row, :, first:]
            else:
                stored[:, :, end : end + span.columns] = new
        stop = end + span.columns
        keys, values = tensors
        return keys[:, :, low:stop], values[:, :, low:stop]

    def _cross(self, which: int, new: Tensor) -> Tensor:
        """Append a span that runs over evictions.

        Returns [B, H, E * P + N + T, D]: the pinned head as it will stand after the 1st .. E-th eviction, then the
        columns in use, then the new ones; the mask shows each new token what is there at its turn.
        """
        ledger, stored = self.ledger, self._tensors()[which]
        span, row = ledger.span, ledger.rows[0]
        assert span is not None
        head, start, end = ledger.head(row), row.start, ledger.end
        if not row.captured:
            self._capture(which, slice(None), stored[:, :, start : start + head])
        frames = [row.frame + ledger.block * turn for turn in range(1, span.crossings + 1)]
        variants = [self._head_at(which, slice(None), head, frame) for frame in frames]
        full = torch.cat([*variants, stored[:, :, start:end], new], dim=2)
        kept = ledger.cached(row) + span.columns - ledger.block * span.crossings - head
        stored[:, :, :head] = variants[-1]
        stored[:, :, head : head + kept] = full[:, :, full.shape[2] - kept :]
        return full

    @torch.no_grad()
    def carry_out(self, steps: Iterable[Step]) -> None:
        """Carry out steps of the ledger; nothing to do before the first token."""
        if self.is_initialized:
            for step in steps:
                self._apply(step)

    def _apply(self, step: Step) -> None:
        for which, (stored, rotation) in enumerate(zip(self._tensors(), self.rotations, strict=True)):
            match step:
                case Evict(rows, start, head, count, frame, capture):
                    if capture:
                        self._capture(which, rows, stored[rows, :, start : start + head])
                    moved = start + count
                    stored[rows, :, moved : moved + head] = self._head_at(which, rows, head, frame)
                case Rotate(rows, start, stop, offset):
                    if rotation is not None:
                        stored[rows, :, start:stop] = rotation.rotate(stored[rows, :, start:stop], offset)
                case Move(rows, source, target, length):
                    # Source and target may overlap, hence the copy.
                    copy = stored[rows, :, source : source + length].clone()
                    stored[rows, :, target : target + length] = copy

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the layer, by name; none before the first token."""
        if not self.is_initialized:
            return {}
        named = dict(zip(("keys", "values"), self._tensors(), strict=True))
        if self.heads is not None:
            named["head_keys"], named["head_values"] = self.heads
        return named

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` gave, with keys and values cut to the columns in use.

        Raises:
            ValueError: a tensor is missing that the ledger counts on.
        """
        low, end = self.ledger.low, self.ledger.end
        needed = {"keys", "values"} if end > low else set()
        if any(row.captured for row in self.ledger.rows):
            needed |= {"head_keys", "head_values"}
        if missing := needed - set(tensors):
            raise ValueError(f"{min(missing)} of a layer is missing")
        if "keys" not in tensors:
            return
        self.lazy_initialization(tensors["keys"], tensors["values"])
        for stored, saved in zip(self._tensors(), (tensors["keys"], tensors["values"]), strict=True):
            stored[:, :, low:end] = saved
        if "head_keys" in tensors:
            self.heads = (tensors["head_keys"], tensors["head_values"])

    def _tensors(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _capture(self, which: int, rows: slice, head: Tensor) -> None:
        """Keep the pinned head as it was first stored; it is always rotated from this copy."""
        most = max(row.pinned for row in self.ledger.rows)
        if self.heads is None or self.heads[0].shape[2] < most:
            before = self.heads
            with torch.inference_mode(False):
                keys, values = (t.new_zeros((*t.shape[:2], most, t.shape[-1])) for t in self._tensors())
            self.heads = (keys, values)
            for new, old in zip(self.heads, before or (), strict=False):
                new[:, :, : old.shape[2]] = old
        self.heads[which][rows, :, : head.shape[2]] = head

    def _head_at(self, which: int, rows: slice, head: int, frame: int) -> Tensor:
        """The pinned head, ``frame`` positions further on."""
        assert self.heads is not None
        pristine = self.heads[which][rows, :, :head]
        rotation = self.rotations[which]
        return pristine if rotation is None else rotation.rotate(pristine, frame)

    # ---- what transformers asks of a layer

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.ledger.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what ``update`` will return."""
        return self.ledger.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: any number of tokens may pass through."""
        return -1

    def reset(self) -> None:
        """Nothing to clear: the ledger forgets, and stale columns are overwritten before they are read."""

    def offload(self) -> None:
        """Refuse: the layer is small and constant, and its steps need it where it is."""
        raise CacheError("A SinkCache cannot be offloaded: its size is constant, so choose a smaller window instead.")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows (beam search)."""
        if self.is_initialized:
            self.keys, self.values = (t.index_select(0, beam_idx.to(t.device)) for t in self._tensors())
            if self.heads is not None:
                keys, values = (t.index_select(0, beam_idx.to(t.device)) for t in self.heads)
                self.heads = (keys, values)


class RecurrentLayer(LinearAttentionLayer):
    """The state of a recurrent layer, in ordinary tensors even under inference_mode."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate for good."""
        with torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """All states, by kind and number; none before the first token."""
        states = {"conv": self.conv_states, "recurrent": self.recurrent_states}
        return {f"{kind}.{i}": t for kind, named in states.items() for i, t in named.items() if t is not None}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` gave."""
        for name, tensor in tensors.items():
            kind, number = name.split(".")
            index = int(number)
            if kind == "conv":
                self.lazy_initialization(conv_states=tensor, state_idx=index)
                self.conv_states[index] = tensor
            else:
                self.lazy_initialization(recurrent_states=tensor, state_idx=index)
                self.recurrent_states[index] = tensor
            self.has_previous_state[index] = True
