"""One token of each of several streams through the model, as a module that can be compiled.

The streams are rows of one store for each layer (``slots``). All columns that are handed over are read, and those that
are not a stream's own are hidden from it. Shapes: ``n`` slots, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from streamllm.quick_forms import QuickForms
from streamllm.store import Store


class SlotStep(nn.Module):
    """See the module.

    Args:
        model: that reads.
        kind: of the stores.
        is_compiled: whether it is to be compiled, so that forms are used which only pay then.
    """

    def __init__(self, model: PreTrainedModel, kind: type[Store], *, is_compiled: bool = False) -> None:
        super().__init__()
        self.model, self.kind, self.is_compiled = model, kind, is_compiled
        self.training = False  # of this module alone: the model's own mode is its owner's

    def forward(self, plan: Tensor, stores: list[list[Tensor]]) -> Tensor:
        """Logits [n, V] after one token of each slot.

        Args:
            plan: [n, 4]: id, first column that it sees, column that it goes to, position.
            stores: of each layer the parts [n, H, W, ..] of its keys, then of its values; W columns are read.
        """
        ids, first, column, position = plan.unbind(1)
        columns = torch.arange(stores[0][0].shape[2], device=plan.device)
        hidden = (columns < first[:, None]) | (columns > column[:, None])
        dtype = self.model.dtype
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        view = _View([_View.layer(self.kind, parts, column) for parts in stores])
        with QuickForms(loops=self.is_compiled):
            found = self.model(
                input_ids=ids[:, None],
                position_ids=position[:, None],
                attention_mask=mask[:, None, None],
                past_key_values=view,
                use_cache=True,
            )
        logits: Tensor = found.logits[:, -1]
        return logits


class _SlotLayer(CacheLayerMixin):
    """The columns of a layer, of which one of each slot is written."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Store, values: Store, column: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pair, self.column = (keys, values), column
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [n, H, 1, D] into each slot's column; return all that is read."""
        rows = torch.arange(len(self.column), device=self.column.device)
        for store, states in zip(self.pair, (key_states, value_states), strict=True):
            store.put(rows, self.column, states[:, :, 0])
        keys, values = self.pair
        return keys.read(), values.read()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: everything is there."""

    def get_seq_length(self) -> int:
        """Unused: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what ``update`` returns."""
        return self.get_max_length(), 0

    def get_max_length(self) -> int:
        """Columns."""
        return self.pair[0].columns


class _View(Cache):
    """The slots as the model sees them."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    @staticmethod
    def layer(kind: type[Store], parts: list[Tensor], column: Tensor) -> _SlotLayer:
        """A layer of the parts of its keys, then of its values."""
        half = len(parts) // 2
        return _SlotLayer(kind(*parts[:half]), kind(*parts[half:]), column)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions are given."""
        return 0
