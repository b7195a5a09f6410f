"""One more token for every stream of a cache, by shapes that never change, so that the step can be compiled.

The usual forward is handed the columns in use, whose number changes with every token; a compiled step would be made
anew each time. This one is handed all columns that are allocated, and a mask that hides those that are not in use; it
writes the new token into a column that is named by a tensor. Evictions stay where they are, in the cache, between two
steps. Shapes: ``B`` rows, ``C`` columns allocated, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from streamllm.cache import SinkCache
from streamllm.errors import CacheError, UnsupportedModelError
from streamllm.layer import SinkLayer


class DecodeStep:
    """See the module.

    Args:
        model: that reads.
        cache: its streams; something must have been read already.
        compiles: whether to compile the step; the first call then takes as long as that does.

    Raises:
        UnsupportedModelError: a step of fixed shapes cannot do what this model or cache needs.
    """

    def __init__(self, model: PreTrainedModel, cache: SinkCache, *, compiles: bool = True) -> None:
        if reason := why_not(cache):
            raise UnsupportedModelError(f"A model of type {cache.spec.model_type!r} cannot decode so: {reason}.")
        self.cache, self.decoder = cache, model.get_decoder()
        self._layers = [layer for layer in cache.layers if isinstance(layer, SinkLayer)]
        self._ledger = self._layers[0].ledger
        self._column = torch.zeros(1, dtype=torch.long, device=model.device)
        self._mask = torch.empty((len(cache.rows), 1, 1, 0), dtype=model.dtype, device=model.device)
        self._shown: tuple[list[int], int] = ([], 0)  # where each row begins in the mask, and where it ends

        def step(ids: Tensor, positions: Tensor, mask: Tensor, column: Tensor, storage: list[Any]) -> Tensor:
            view = _View([_StaticLayer(keys, values, column) for keys, values in storage])
            found = model(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=view, use_cache=True
            )
            logits: Tensor = found.logits[:, -1]
            return logits

        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self._step: Callable[..., Tensor] = torch.compile(step, dynamic=False, mode=mode) if compiles else step

    def __call__(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]; the logits [B, V] after them.

        Raises:
            CacheError: nothing was read before, the ids are of another shape, or the cache was broken off or belongs to
                another model.
        """
        if not all(layer.is_initialized for layer in self._layers):
            raise CacheError("A decode step needs a cache that has read something: read the prompt by the model first.")
        if ids.shape != (len(self.cache.rows), 1):
            raise CacheError(f"A decode step reads one id of {len(self.cache.rows)} rows, not {tuple(ids.shape)}.")
        supplied = self.cache.enter(self.decoder, ids, None, [True] * len(ids), are_ids=True)
        self._show()
        storage = [(layer.keys, layer.values) for layer in self._layers]
        with torch.no_grad():
            logits = self._step(ids, supplied["position_ids"], self._mask, self._column, storage)
        for layer in self._layers:
            layer.last = self._ledger.span
        self.cache.leave()
        return logits.clone()  # a CUDA graph writes its results into the same place again

    def _show(self) -> None:
        """Show each row its columns, and the one that is to be written."""
        ledger = self._ledger
        starts, end = [row.start for row in ledger.rows], ledger.end
        self._column.fill_(end)
        if self._mask.shape[-1] != ledger.slots:  # a longer head was pinned
            self._mask = self._mask.new_empty((*self._mask.shape[:-1], ledger.slots))
            self._shown = ([], 0)
        if self._shown == (starts, end - 1):
            self._mask[..., end] = 0
        else:
            self._mask.fill_(torch.finfo(self._mask.dtype).min)
            for row, start in enumerate(starts):
                self._mask[row, ..., start : end + 1] = 0
                # What is hidden must be finite: it is read, with a weight of zero.
                for layer in self._layers:
                    for stored in (layer.keys, layer.values):
                        assert stored is not None
                        stored[row, :, :start] = 0
                        stored[row, :, end:] = 0
        self._shown = (starts, end)


def why_not(cache: SinkCache) -> str | None:
    """Why a cache cannot be read by steps of fixed shapes; ``None``: it can."""
    if any(layer.kind != "sink" for layer in cache.spec.layers):
        return "some of its layers keep something else than a window of all tokens"
    if cache.config.reread:
        return "its tokens are read anew at every eviction"
    if cache.spec.positions == "alibi" or not cache.spec.takes_masks:
        return "it makes its own attention mask"
    return None


class _StaticLayer(CacheLayerMixin):
    """All columns of a layer, of which one is written."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.column = keys, values, column
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, H, 1, D] into the column; return all columns."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: everything is there."""

    def get_seq_length(self) -> int:
        """Unused: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what ``update`` returns."""
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Columns."""
        assert self.keys is not None
        return self.keys.shape[2]


class _View(Cache):
    """The cache as the compiled step sees it."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions are given."""
        return 0
