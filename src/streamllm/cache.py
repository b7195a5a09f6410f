"""The sink cache: a transformers ``Cache`` that keeps the head of a stream and a window, and drops the middle.

To the model it is an ordinary causal cache of at most ``capacity`` tokens at positions counted inside it; to
``generate()`` it has seen every token of the stream. Algorithm: paper section 3.2, with eviction in blocks: between
two evictions the cache is plain, so feeding many tokens at once equals feeding them one at a time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DummyLayer
from transformers.masking_utils import create_masks_for_generate

from streamllm.capacity import check_capacity, fit_config
from streamllm.config import PREFILL_CHUNK, CacheConfig, check_count
from streamllm.errors import CacheError, ConfigError
from streamllm.gate import Gated, attach, fingerprint_of
from streamllm.layer import RecurrentLayer, SinkLayer
from streamllm.ledger import Ledger, Row, Span
from streamllm.mask import crossing_mask, next_positions, padding_mask
from streamllm.spec import LayerSpec, ModelSpec, inspect_model
from streamllm.store import STORES


class SinkCache(Gated):
    """Keys and values of the first ``sinks`` and at least the ``window`` newest tokens of endless streams.

    Works wherever transformers takes ``past_key_values``: ``model(...)``, ``model.generate(...)`` (greedy, sampling,
    several turns, left-padded batches, ``prefill_chunk_size``, beam search), with eager, SDPA and Flex attention.

    Args:
        model_or_spec: the model that will read; or its ``inspect_model(model)``, if ``SinkCache(model)`` was used on
            that model before.
        sinks: tokens at the head of the stream that are never evicted; see ``pin`` for a longer head.
        window: every token attends to at least its ``window`` newest tokens, itself included. ``None``: the smaller
            of 1020 and half the trained length less the sinks.
        block: tokens that leave together when the cache is full; 1 is the paper's schedule.
        batch_size: rows; each is a stream of its own age.
        reread: re-read the kept tokens at each eviction instead of moving keys; ``None``: only where the model needs
            it (learned positions).
        kv_dtype: "int8" keeps keys and values in eight bits each, "auto" in the model's dtype.

    Raises:
        ConfigError: an option is out of range, or the cache would be longer than the model was trained for.
        UnsupportedModelError: the model cannot stream.
    """

    def __init__(
        self,
        model_or_spec: PreTrainedModel | ModelSpec,
        sinks: int = CacheConfig.sinks,
        window: int | None = CacheConfig.window,
        block: int = CacheConfig.block,
        batch_size: int = 1,
        reread: bool | None = CacheConfig.reread,
        kv_dtype: str = CacheConfig.kv_dtype,
    ) -> None:
        if isinstance(model_or_spec, ModelSpec):
            self.spec = model_or_spec
        else:
            self.spec = inspect_model(model_or_spec)
            attach(model_or_spec, self.spec.fingerprint)
        check_count("batch_size", batch_size, 1)
        self.config = fit_config(CacheConfig(sinks, window, block, reread, kv_dtype), self.spec)
        self._build(batch_size)
        super().__init__(layers=[self._layer(layer) for layer in self.spec.layers])

    def _build(self, batch_size: int) -> None:
        """Fresh ledgers: one for the layers with sinks, one for each window that the model brings along itself."""
        window, block = self.config.window, self.config.block
        assert window is not None
        slack = block if batch_size > 1 else 0
        rows = [Row(self.config.sinks) for _ in range(batch_size)]
        self._main = Ledger(window, block, self.spec.limit, slack, rows)
        self._sliding = {
            layer.window: Ledger(layer.window, block, self.spec.limit, slack, [Row(0) for _ in rows])
            for layer in self.spec.layers
            if layer.kind == "sliding" and layer.window
        }
        self._columns = 0  # columns read so far, padding included: what generate() counts
        self._ids: list[list[int]] = [[] for _ in rows]  # the cached tokens, kept only for re-reading
        self._new_ids: list[list[int]] = []  # the ids of the forward that is going on, likewise
        self._is_fragile = False  # the cache is being rewritten: an interrupt now leaves the layers at odds
        self._unread: tuple[int, list[int]] = (0, [])

    def _layer(self, layer: LayerSpec) -> Any:
        if layer.kind == "linear":
            return RecurrentLayer(number_of_states=layer.states)
        if layer.kind == "shared":
            return DummyLayer()
        is_sliding = layer.kind == "sliding"
        store = STORES[self.config.kv_dtype]
        return SinkLayer(self._ledger(layer), (layer.keys, layer.values), is_sliding=is_sliding, store=store)

    def _ledger(self, layer: LayerSpec) -> Ledger:
        return self._sliding[layer.window or 0] if layer.kind == "sliding" else self._main

    @property
    def _ledgers(self) -> list[Ledger]:
        return [self._main, *self._sliding.values()]

    def __repr__(self) -> str:
        return (
            f"SinkCache({self.spec.model_type}, sinks={self.config.sinks}, window={self.config.window}, "
            f"block={self.config.block}, cached={self.tokens_cached} of {self.capacity}, evicted={self.tokens_evicted})"
        )

    # ---- counters

    @property
    def rows(self) -> Sequence[Row]:
        """The streams of the batch, with the tokens that each has seen (read only)."""
        return self._main.rows

    @property
    def tokens_seen(self) -> int:
        """Tokens read so far, over all rows."""
        return sum(row.seen for row in self.rows)

    @property
    def tokens_cached(self) -> int:
        """Tokens held now, over all rows."""
        return sum(self._main.cached(row) for row in self.rows)

    @property
    def tokens_evicted(self) -> int:
        """Tokens let go so far, over all rows."""
        return self.tokens_seen - self.tokens_cached

    @property
    def capacity(self) -> int:
        """Most tokens that a row can hold: pinned + window + block - 1."""
        return max(self._main.capacity(row) for row in self.rows)

    @property
    def room(self) -> int:
        """Tokens that every row can still read before an eviction."""
        return min(self._main.room(row) for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that the cache holds now; constant from the first eviction on."""
        return sum(t.numel() * t.element_size() for tensors in self._tensors() for t in tensors.values())

    @property
    def bytes_when_full(self) -> int:
        """Bytes that ``bytes`` will reach, known beforehand (recurrent states of linear layers not counted)."""
        total, store = 0, STORES[self.config.kv_dtype]
        for layer in self.spec.layers:
            if layer.kind in ("sink", "sliding"):
                ledger = self._ledger(layer)
                pristine = 0 if self._rereads else max(row.pinned for row in ledger.rows)
                column = store.bytes_per_column(layer.bytes_per_token, self.spec.itemsize, layer.vectors)
                total += len(ledger.rows) * (ledger.slots * column + pristine * layer.bytes_per_token)
        return total

    @property
    def unread(self) -> list[int]:
        """Ids that belong to the stream and were not read yet: the last one that ``stream()`` gave out."""
        seen, ids = self._unread
        return list(ids) if seen == self.tokens_seen else []

    @unread.setter
    def unread(self, ids: Sequence[int]) -> None:
        self._unread = (self.tokens_seen, list(ids))

    @property
    def is_whole(self) -> bool:
        """Whether the cache can be used: an interrupt while it was being rewritten leaves it in pieces."""
        return not self._is_fragile

    @property
    def _rereads(self) -> bool:
        return bool(self.config.reread)

    # ---- what a caller may do between forwards

    def position_ids(self, n: int) -> Tensor:
        """Positions [batch_size, n] that the next ``n`` tokens of each row will get; on the CPU.

        The gate supplies them to the model by itself. Valid up to ``room`` tokens: then an eviction may restart them.
        """
        first = torch.tensor([[self._main.position(row)] for row in self.rows])
        return first + torch.arange(n)

    def pin(self, n: int, row: int | None = None) -> None:
        """Pin the first ``n`` tokens of ``row`` (``None``: of every row), read or still to come; they never leave.

        The window keeps its size, so the cache grows by what is pinned beyond the sinks; do it before the first
        eviction (paper, table 8: four sinks do not keep instructions).

        Raises:
            ConfigError: the cache would be longer than the model was trained for.
            CacheError: an eviction has taken some of the first ``n`` tokens already, or more than ``n`` are pinned and
                read.
        """
        self._idle()
        check_count("n", n, 0)
        indices = self._indices(row)
        for index in indices:
            known = self.rows[index]
            if n < known.pinned and known.seen:
                raise CacheError(f"{known.pinned} tokens are pinned and read already; reset() before pinning fewer.")
            if n > known.pinned and known.seen > self._main.cached(known):
                raise CacheError(
                    f"Cannot pin {n} tokens: an eviction has left only the first {known.pinned} in the cache; "
                    "pin before the window is full."
                )
        check_capacity(n, self.config, self.spec)
        self._is_fragile = True
        for index in indices:
            self.rows[index].pinned = n
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                layer.grow()
        self._is_fragile = False

    def mark(self, ahead: int = 0, row: int | None = None) -> None:
        """A turn of ``row`` (``None``: of every row) begins ``ahead`` tokens from here.

        When the cache is full, turns that were marked leave whole, as long as half the window stays; in a turn longer
        than that a block leaves at a time.

        Raises:
            ConfigError: ``ahead`` is negative.
        """
        self._idle()
        check_count("ahead", ahead, 0)
        for index in self._indices(row):
            self._main.mark(index, ahead)

    def evict(self, n: int, row: int | None = None) -> None:
        """Let the ``n`` oldest unpinned tokens of ``row`` (``None``: of every row) go, e.g. at a turn's border.

        Raises:
            CacheError: there are not so many unpinned tokens, or the model streams by re-reading.
        """
        self._idle()
        if self._rereads:
            raise CacheError("A cache that re-reads evicts by itself; evict() works where keys can be moved.")
        check_count("n", n, 0)
        indices = self._indices(row)
        for index in indices:
            known = self.rows[index]
            unpinned = self._main.cached(known) - self._main.head(known)
            if not 0 <= n <= unpinned:
                raise CacheError(f"Cannot evict {n} tokens: {unpinned} are cached besides the pinned head.")
        if n:
            self._is_fragile = True
            for index in indices:
                self._evict(index, n)
            self._carry_out()
            self._is_fragile = False

    def reset(self, row: int | None = None) -> None:
        """Forget everything (``row``: of that row); what is allocated and what is pinned stay.

        Raises:
            CacheError: one row of a model with recurrent layers, whose state is not kept by rows.
        """
        indices = self._indices(row)
        if row is not None:
            self._idle()
            if self.spec.count("linear"):
                raise CacheError("A model with recurrent layers cannot reset single rows; reset them all.")
        self._is_fragile = True
        self._parts = ()
        for ledger in self._ledgers:
            ledger.reset(row)
        for index in indices:
            self._ids[index] = []
        if row is None:
            self._columns = 0
            super().reset()  # type: ignore[no-untyped-call]
        self._unread = (0, [])
        self._is_fragile = False

    def fork(self) -> SinkCache:
        """Return an independent copy: both go on from here, bit for bit alike."""
        self._idle()
        other = object.__new__(SinkCache)
        other.__dict__ = copy.deepcopy(self.__dict__, {id(self.spec): self.spec})
        return other

    def take_over(self, other: SinkCache) -> None:
        """Become ``other``, a stream of the same model, which is not to be used any more."""
        self.__dict__ = other.__dict__

    def _indices(self, row: int | None) -> Sequence[int]:
        """The rows that ``row`` means."""
        if row is None:
            return range(len(self.rows))
        if row not in range(len(self.rows)):
            raise ConfigError(f"There is no row {row}: the rows of this cache run from 0 to {len(self.rows) - 1}.")
        return (row,)

    # ---- as data

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything the cache knows, as a JSON-able dictionary and named tensors (views, not copies)."""
        self._idle()
        header = {
            "config": dataclasses.asdict(self.config),
            "ledgers": {
                str(name): {"end": ledger.end, "rows": [dataclasses.asdict(row) for row in ledger.rows]}
                for name, ledger in self._named_ledgers()
            },
            "columns": self._columns,
            "ids": self._ids,
            "unread": self.unread,
        }
        tensors = {}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, (SinkLayer, RecurrentLayer)):
                named = layer.used() if isinstance(layer, SinkLayer) else layer.tensors()
                tensors.update({f"{index}.{name}": tensor for name, tensor in named.items()})
        return header, tensors

    @classmethod
    def restore(cls, model: PreTrainedModel, header: dict[str, Any], tensors: dict[str, Tensor]) -> SinkCache:
        """The cache that ``snapshot`` described, on ``model``'s device.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: header or tensors are not what ``snapshot`` gives.
            ConfigError: they do not suit the model.
        """
        rows = header["ledgers"]["0"]["rows"]
        cache = cls(model, **header["config"], batch_size=len(rows))
        for name, ledger in cache._named_ledgers():
            saved = header["ledgers"][str(name)]
            ledger.rows = [Row(**{**row, "borders": tuple(row.get("borders", ()))}) for row in saved["rows"]]
            ledger.end = saved["end"]
        cache._columns, cache._ids = header["columns"], header["ids"]
        cache.unread = header["unread"]
        for index, layer in enumerate(cache.layers):
            prefix = f"{index}."
            own = {
                name.removeprefix(prefix): t.to(model.device) for name, t in tensors.items() if name.startswith(prefix)
            }
            if isinstance(layer, (SinkLayer, RecurrentLayer)):
                layer.load(own)
        return cache

    def _named_ledgers(self) -> list[tuple[int, Ledger]]:
        """The ledgers by the window that the model brings along; 0 is the one with the sinks."""
        return [(0, self._main), *self._sliding.items()]

    def _tensors(self) -> list[dict[str, Tensor]]:
        """The tensors of every layer, by name."""
        return [
            layer.tensors() if isinstance(layer, (SinkLayer, RecurrentLayer)) else {}  # a dummy holds nothing
            for layer in self.layers
        ]

    # ---- the gate

    def columns(self, valid: Tensor | None, most: int) -> int:
        """How many of the next ``most`` columns one forward may read; see ``Gated``."""
        main = self._main
        if self._crosses(valid):
            return min(most, main.max_columns(PREFILL_CHUNK))
        limits = [most]
        if valid is None:
            limits.append(self.room)
            held = [main.capacity(row) - main.room(row) for row in main.rows]
        else:
            counts, reads = valid.cumsum(1).tolist(), self._reads or valid[:, -1].tolist()
            limits += [sum(n <= main.room(row) for n in count) for row, count in zip(main.rows, counts, strict=True)]
            held = [
                main.capacity(row) - main.room(row) if read else main.cached(row)
                for row, read in zip(main.rows, reads, strict=True)
            ]
        limits.append(main.slots - max(held))
        for ledger in self._sliding.values():
            limits.append(ledger.slots - max(min(ledger.cached(row), ledger.window - 1) for row in ledger.rows))
        return min(limits)

    def _crosses(self, valid: Tensor | None) -> bool:
        """Whether one forward may run over evictions, all of one block: rows of one age with their whole head."""
        return (
            valid is None
            and self.spec.takes_masks
            and not self._rereads
            and not self.spec.count("linear")
            and self._main.is_uniform
            and not self.rows[0].borders
            and self._main.cached(self.rows[0]) >= self.rows[0].pinned
        )

    def enter(
        self, decoder: PreTrainedModel, tokens: Tensor, valid: Tensor | None, reads: list[bool], *, are_ids: bool
    ) -> dict[str, Any]:
        """Begin a forward; see ``Gated``."""
        self._check(decoder, tokens, valid, are_ids=are_ids)
        main = self._main
        # 1. evictions that are due
        due = [index for index, row in enumerate(main.rows) if main.is_full(row) and reads[index]]
        if due and self._rereads:
            self._reread(decoder, due, tokens.device)
        self._is_fragile = True
        if due and not self._rereads:
            for index in [None] if main.is_uniform and len(due) == len(main.rows) else due:
                self._evict(index, main.due(main.rows[index or 0]))
        # 2. where the new tokens go
        columns = tokens.shape[1]
        counts = tuple([columns] * len(main.rows) if valid is None else valid.sum(1).tolist())
        span = Span(columns, counts, main.crossings(columns) if self._crosses(valid) else 0)
        positions = next_positions(main, span).to(tokens.device)
        if span.crossings:
            main.span = span
        else:
            for ledger in self._sliding.values():
                ledger.drop_stale(columns)
            for ledger in self._ledgers:
                ledger.open(span)
        self._carry_out()
        if self._rereads:
            self._new_ids = [new[columns - count :] for new, count in zip(tokens.tolist(), counts, strict=True)]
        # 3. what the model needs to know; a plain span only writes where nothing is yet, so it may be cut short
        self._is_fragile = span.crossings > 0 or span.is_padded or self.spec.count("linear") > 0
        return {"position_ids": positions, "attention_mask": self._mask(span, decoder, tokens.device)}

    def leave(self) -> None:
        """End the forward; see ``Gated``."""
        span = self._main.span
        assert span is not None
        self._is_fragile = True
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SinkLayer) and layer.last is not layer.ledger.span:
                raise CacheError(
                    f"Layer {index} stored nothing of this forward; gradient checkpointing in training mode drops the "
                    "cache: call model.eval(), then reset() this cache and read again."
                )
        for ledger in self._ledgers:
            ledger.close()
        for ids, new in zip(self._ids, self._new_ids, strict=False):
            ids.extend(new)
        self._columns += span.columns
        self._is_fragile = False

    def _check(self, decoder: PreTrainedModel, tokens: Tensor, valid: Tensor | None, *, are_ids: bool) -> None:
        """Refuse a forward that could not be answered rightly."""
        self._idle()
        theirs = fingerprint_of(decoder)
        if theirs is not None and theirs != self.spec.fingerprint:
            raise CacheError(
                f"This cache was made for another model (type {self.spec.model_type!r}, or other weights or dtype) "
                f"than the one that reads now (type {theirs.model_type!r}): make it from this one, SinkCache(model)."
            )
        if tokens.shape[0] != len(self.rows):
            raise CacheError(
                f"This cache was made for batch_size={len(self.rows)}, the model was given {tokens.shape[0]} rows: "
                f"make it with SinkCache(model, batch_size={tokens.shape[0]}) (beam search: rows x num_beams)."
            )
        if self._rereads and not are_ids:
            raise CacheError("A cache that re-reads needs input_ids; inputs_embeds alone cannot be read again.")
        if self.spec.count("linear") and not (valid is None and self._main.is_uniform):
            raise CacheError(
                f"Rows of different age cannot be read together by {self.spec.model_type!r}: the state of its "
                "recurrent layers would take in the padding. Give each row a cache of its own."
            )

    def _idle(self) -> None:
        """Refuse to go on with a cache that an interrupt left half-rewritten."""
        if self._is_fragile:
            raise CacheError(
                "This cache was interrupted while it was being rewritten, so its contents are not whole: call reset() "
                "and read again, or go on from a saved stream."
            )

    def _carry_out(self) -> None:
        """Let every layer carry out the steps that the ledgers have decided."""
        if any(ledger.steps for ledger in self._ledgers):
            for layer in self.layers:
                if isinstance(layer, SinkLayer):
                    layer.carry_out(layer.ledger.steps)
            for ledger in self._ledgers:
                ledger.steps.clear()

    def _evict(self, index: int | None, count: int) -> None:
        """Let ``count`` tokens of row ``index`` (``None``: of all, uniform rows) go; positions may restart."""
        rebased = self._main.evict(index, count)
        for ledger in self._sliding.values() if rebased else ():
            ledger.rotate_back(index, rebased)

    def _reread(self, decoder: PreTrainedModel, due: list[int], device: torch.device) -> None:
        """Evict by reading the tokens that stay once more, from position 0, by a forward of their own."""
        main = self._main
        kept = [list(ids) for ids in self._ids]
        before = [replace(row) for row in main.rows]
        for index in due:
            row = main.rows[index]
            head, gone = main.head(row), main.due(row)
            del kept[index][head : head + gone]
            before[index].borders = tuple(border for border in row.borders if border > main.first(row) + gone)
        columns = self._columns
        longest = max(len(ids) for ids in kept)
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in kept], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in kept], device=device)
        try:
            for ledger in self._ledgers:
                ledger.reset()
            super().reset()  # type: ignore[no-untyped-call]
            self._ids = [[] for _ in kept]
            if longest:
                with torch.no_grad():
                    decoder(input_ids=padded, attention_mask=mask, past_key_values=self, use_cache=True)
            for row, old in zip(main.rows, before, strict=True):
                row.seen, row.borders = old.seen, old.borders
            self._columns = columns
        except BaseException:
            self._is_fragile = True
            raise

    def _mask(self, span: Span, decoder: PreTrainedModel, device: torch.device) -> Any:
        """The attention mask: 4-D across evictions, 2-D for rows of different age, none for rows of one age.

        ALiBi models always get a 2-D one: they count the keys, which are fewer than the tokens seen, by it.
        """
        main = self._main
        if span.crossings:
            return crossing_mask(main, span).to(device=device, dtype=decoder.dtype)
        if main.is_uniform and not span.is_padded and self.spec.positions != "alibi":
            return None
        if not self._sliding:
            return padding_mask(main, span, self._offset).to(device)
        # Layers with a window of their own may hold more of a row than the others do: each kind gets its own mask.
        shape = torch.empty((len(main.rows), span.columns, 0), dtype=decoder.dtype, device=device)
        masks = {}
        for ledger, kind in ((main, "full_attention"), (next(iter(self._sliding.values())), "sliding_attention")):
            padding = padding_mask(ledger, span, self._offset).to(device)
            masks[kind] = create_masks_for_generate(decoder.config, shape, padding, self)[kind]
        return masks

    @property
    def _offset(self) -> int:
        """Index of the next token in the space of columns that all layers share during a forward."""
        return max(ledger.length for ledger in self._ledgers)

    # ---- what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included: ``generate()`` cuts its inputs by it."""
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the first new token among the columns that ``get_mask_sizes`` describes."""
        return self._offset

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of what the layer's ``update`` will return."""
        layer = self.spec.layers[layer_idx]
        ledger = self._ledger(layer) if layer.kind in ("sink", "sliding") else self._main
        return ledger.length + query_length, self._offset - ledger.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: any number of tokens may pass through."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows (beam search)."""
        self._idle()
        for layer in self.layers:
            layer.reorder_cache(beam_idx)  # type: ignore[arg-type]
        order = beam_idx.tolist()
        for ledger in self._ledgers:
            ledger.rows = [copy.copy(ledger.rows[i]) for i in order]
        self._ids = [list(self._ids[i]) for i in order]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: tokens that an eviction has let go cannot be brought back."""
        raise CacheError(
            "A SinkCache cannot be cropped (assisted and prompt-lookup decoding do that): an eviction cannot be "
            "undone. Generate without an assistant, or fork() the cache before what may be taken back."
        )

    def activate_past_recording(self) -> None:
        """Refuse: see ``crop``."""
        self.crop(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: the number of rows is fixed."""
        raise CacheError(f"The rows of a SinkCache are fixed: make it with batch_size x {repeats} from the start.")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: the number of rows is fixed."""
        raise CacheError("The rows of a SinkCache are fixed: reset(row) frees one for another stream.")
