"""One layer's keys and values: allocate once, append, and carry out the steps of the ledger.

The layer knows its rotation and nothing about policy. Shapes: ``B`` rows, ``H`` heads, ``T`` new tokens, ``N``
columns in use, ``D`` head size; a store has ``slots`` columns. Keys arrive after the model's rotation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from streamllm.errors import CacheError
from streamllm.ledger import Evict, Ledger, Move, Rotate, Span, Step
from streamllm.rope import Rotation
from streamllm.store import Store

_ALL = slice(None)
_NAMES = ("keys", "values")


class SinkLayer(CacheLayerMixin):
    """Keys and values of one attention layer, in the columns that ``ledger`` assigns."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        ledger: Ledger,
        rotations: tuple[Rotation | None, Rotation | None],
        *,
        is_sliding: bool,
        store: type[Store] = Store,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.rotations = rotations
        self.is_sliding = is_sliding
        self.last: Span | None = None  # what was stored last
        self.heads: tuple[Tensor, Tensor] | None = None  # pinned heads as first stored, [B, H, P, D] each
        self.stores: tuple[Store, Store] | None = None  # of keys and of values
        self._store = store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for good."""
        slots = self.ledger.slots
        self.stores = (self._store.allocate(key_states, slots), self._store.allocate(value_states, slots))
        self.is_initialized = True

    def grow(self) -> None:
        """Allocate anew if the ledger has more slots now, keeping what is stored."""
        if self.is_initialized and self._stores()[0].columns < self.ledger.slots:
            old = self._stores()
            self.lazy_initialization(*(store.read()[:, :, :0] for store in old))
            for stored, before in zip(self._stores(), old, strict=True):
                stored.cut(_ALL, 0, before.columns).fill(before)

    def settle(self, stores: tuple[Store, Store]) -> None:
        """Move what is stored into ``stores``, of at least as many columns, and go on there."""
        low, end = self.ledger.low, self.ledger.end
        for stored, target in zip(self._stores(), stores, strict=True):
            target.cut(_ALL, low, end).fill(stored.cut(_ALL, low, end))
        self.stores = stores

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
        stop = end + span.columns
        stores = self._stores()
        for stored, new in zip(stores, (key_states, value_states), strict=True):
            if span.is_padded:
                # Left of its new tokens a row's columns belong to its older tokens, so pads are not written.
                for row, count in enumerate(span.counts):
                    first = span.columns - count
                    stored.cut(slice(row, row + 1), end + first, stop).write(new[row : row + 1, :, first:])
            else:
                stored.cut(_ALL, end, stop).write(new)
        keys, values = (stored.cut(_ALL, low, stop).read() for stored in stores)
        return keys, values

    def _cross(self, which: int, new: Tensor) -> Tensor:
        """Append a span that runs over evictions.

        Returns [B, H, E * P + N + T, D]: the pinned head as it will stand after the 1st .. E-th eviction, then the
        columns in use, then the new ones; the mask shows each new token what is there at its turn.
        """
        ledger, stored = self.ledger, self._stores()[which]
        span, row = ledger.span, ledger.rows[0]
        assert span is not None
        head, start, end = ledger.head(row), row.start, ledger.end
        if not row.captured:
            self._capture(which, _ALL, start, head)
        frames = [row.frame + ledger.block * turn for turn in range(1, span.crossings + 1)]
        variants = [self._head_at(which, _ALL, head, frame) for frame in frames]
        full = torch.cat([*variants, stored.cut(_ALL, start, end).read(), new], dim=2)
        kept = ledger.cached(row) + span.columns - ledger.block * span.crossings - head
        stored.cut(_ALL, 0, head).write(variants[-1])
        stored.cut(_ALL, head, head + kept).write(full[:, :, full.shape[2] - kept :])
        return full

    @torch.no_grad()
    def carry_out(self, steps: Iterable[Step]) -> None:
        """Carry out steps of the ledger; nothing to do before the first token."""
        if self.is_initialized:
            for step in steps:
                self._apply(step)

    def _apply(self, step: Step) -> None:
        for which, (stored, rotation) in enumerate(zip(self._stores(), self.rotations, strict=True)):
            match step:
                case Evict(rows, start, head, count, frame, capture):
                    if capture:
                        self._capture(which, rows, start, head)
                    moved = start + count
                    stored.cut(rows, moved, moved + head).write(self._head_at(which, rows, head, frame))
                case Rotate(rows, start, stop, offset):
                    if rotation is not None:
                        part = stored.cut(rows, start, stop)
                        part.write(rotation.rotate(part.read(), offset))
                case Move(rows, source, target, length):
                    # Source and target may overlap, hence the copy.
                    copy = stored.cut(rows, source, source + length).clone()
                    stored.cut(rows, target, target + length).fill(copy)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the layer, by name; none before the first token."""
        if not self.is_initialized:
            return {}
        named = {
            name + end: part
            for name, store in zip(_NAMES, self._stores(), strict=True)
            for end, part in store.parts().items()
        }
        if self.heads is not None:
            named["head_keys"], named["head_values"] = self.heads
        return named

    def used(self) -> dict[str, Tensor]:
        """The same, with keys and values cut to the columns in use."""
        low, end = self.ledger.low, self.ledger.end
        return {
            name: tensor if name.startswith("head_") else tensor[:, :, low:end]
            for name, tensor in self.tensors().items()
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``used`` gave.

        Raises:
            ValueError: a tensor is missing that the ledger counts on.
        """
        low, end = self.ledger.low, self.ledger.end
        needed = set(_NAMES) if end > low else set()
        if any(row.captured for row in self.ledger.rows):
            needed |= {"head_keys", "head_values"}
        if missing := needed - set(tensors):
            raise ValueError(f"{min(missing)} of a layer is missing")
        if "keys" not in tensors:
            return
        saved = [
            self._store(*(tensors[name] for name in (kind, f"{kind}_scale") if name in tensors)) for kind in _NAMES
        ]
        self.lazy_initialization(*(store.read()[:, :, :0] for store in saved))
        for stored, store in zip(self._stores(), saved, strict=True):
            stored.cut(_ALL, low, end).fill(store)
        if "head_keys" in tensors:
            self.heads = (tensors["head_keys"], tensors["head_values"])

    def __deepcopy__(self, memo: dict[int, Any]) -> SinkLayer:
        """A copy whose columns lie in memory of its own, even if these are a part of a larger one."""
        other = object.__new__(SinkLayer)
        memo[id(self)] = other
        kept = {name: value for name, value in self.__dict__.items() if name != "stores"}
        other.__dict__ = copy.deepcopy(kept, memo)
        other.stores = None
        if self.stores is not None:
            keys, values = (store.cut(_ALL, 0, self.ledger.slots).clone() for store in self.stores)
            other.stores = (keys, values)
        return other

    def _stores(self) -> tuple[Store, Store]:
        assert self.stores is not None
        return self.stores

    def _capture(self, which: int, rows: slice, start: int, head: int) -> None:
        """Keep the pinned head, which begins at ``start``, as it was first stored: it is rotated from this copy."""
        states = self._stores()[which].cut(rows, start, start + head).read()
        most = max(row.pinned for row in self.ledger.rows)
        if self.heads is None or self.heads[0].shape[2] < most:
            before = self.heads
            like = [store.cut(_ALL, 0, 0).read() for store in self._stores()]
            with torch.inference_mode(False):
                keys, values = (t.new_zeros((*t.shape[:2], most, t.shape[-1])) for t in like)
            self.heads = (keys, values)
            for new, old in zip(self.heads, before or (), strict=False):
                new[:, :, : old.shape[2]] = old
        self.heads[which][rows, :, :head] = states

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
        """Clear. The ledger forgets, but a step over slots reads what is hidden with a weight of 0: 0 * nan is nan."""
        for store in self.stores or ():
            store.clear()

    def offload(self) -> None:
        """Refuse: the layer is small and constant, and its steps need it where it is."""
        raise CacheError("A SinkCache cannot be offloaded: its size is constant, so choose a smaller window instead.")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows (beam search)."""
        if self.is_initialized:
            keys, values = (store.select(beam_idx) for store in self._stores())
            self.stores = (keys, values)
            if self.heads is not None:
                head_keys, head_values = (t.index_select(0, beam_idx.to(t.device)) for t in self.heads)
                self.heads = (head_keys, head_values)


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
