"""Slots for streams side by side, and one step that reads a token of each.

A stream is a ``SinkCache`` of one row. In a slot its keys and values are views of one large store, so everything that
works on a stream works there too: usual forwards, evictions, pins, snapshots. The step is handed the columns of all
slots up to the longest stream's and hides those that are not in use; so it can be compiled once for so many slots, and
streams come, go and evict as they like. What a slot's own step would overwrite next takes what it writes while idle.
Shapes: ``n`` slots, ``C`` columns of each, and ``SPARE`` more; ``V`` vocabulary.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from streamllm.cache import SinkCache
from streamllm.compiled import compile_module
from streamllm.errors import CacheError, ConfigError, StreamLLMError, StreamLLMWarning, UnsupportedModelError
from streamllm.layer import SinkLayer
from streamllm.quantize import kind_of
from streamllm.slot_step import SlotStep
from streamllm.store import STORES, Store

Pair = tuple[Store, Store]
"""Keys and values of one layer."""

STRIDE = 64
"""A step reads a multiple of so many columns, or all of them."""


def why_not(cache: SinkCache) -> str | None:
    """Why streams such as ``cache`` cannot be read in slots; ``None``: they can."""
    if any(layer.kind != "sink" for layer in cache.spec.layers):
        return "some of its layers keep something else than a window of all tokens"
    if cache.config.reread:
        return "its tokens are read anew at every eviction"
    if cache.spec.positions == "alibi" or not cache.spec.takes_masks:
        return "it makes its own attention mask"
    return None


class Slots:
    """See the module.

    Args:
        model: that reads.
        count: how many slots.
        columns: most tokens that a stream may have cached: the largest ``capacity`` to come.
        compiles: whether steps are compiled; the first of each size then takes as long as that does.
        note: told once, in one sentence, why a step could not be compiled; it and those of other sizes to come are
            then run as they are. ``None``: a warning.

    Raises:
        ConfigError: ``count`` or ``columns`` is below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        count: int,
        columns: int,
        *,
        compiles: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> None:
        if count < 1 or columns < 1:
            raise ConfigError(f"Slots need at least one slot and one column, you gave {count} and {columns}.")
        self.columns, self.compiles = columns, compiles
        self.caches: list[SinkCache | None] = [None] * count
        self._model, self._decoder = model, model.get_decoder()
        self._note = note or (lambda text: warnings.warn(text, StreamLLMWarning, stacklevel=5))
        self._stores: list[Pair] = []  # of each layer, [count, H, C + SPARE, D]
        self._views: dict[tuple[int, int], list[list[Tensor]]] = {}
        # Steps read as many columns as they need, but a graph that was recorded reads as many as it did then.
        self._varies = model.device.type == "cpu" or not compiles
        self._compiled: dict[int, Callable[..., Tensor] | None] = {}
        self._plain: SlotStep | None = None  # the step as it is; it holds the model, so it may not stand in _steps
        self._weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))

    @property
    def free(self) -> int:
        """Slots without a stream."""
        return sum(cache is None for cache in self.caches)

    @property
    def bytes(self) -> int:
        """Bytes of all slots; 0 before the first stream."""
        return sum(part.nbytes for pair in self._stores for store in pair for part in store.parts().values())

    def take(self, cache: SinkCache) -> None:
        """Move a stream in, which has read something.

        Raises:
            UnsupportedModelError: it cannot be read in slots.
            CacheError: it has read nothing, has several rows, is too long for a slot, is in one already, keeps another
                dtype than the streams before it, or all slots are taken.
        """
        if reason := why_not(cache):
            raise UnsupportedModelError(f"A model of type {cache.spec.model_type!r} cannot be read in slots: {reason}.")
        if len(cache.rows) != 1 or not cache.tokens_seen:
            raise CacheError("A slot takes a cache of one row that has read something: read the prompt by the model.")
        if cache.capacity > self.columns:
            raise CacheError(f"The stream may cache {cache.capacity} tokens, a slot holds {self.columns}.")
        if cache in self.caches:
            raise CacheError("The stream is in a slot already.")
        if not self.free:
            raise CacheError(f"All {len(self.caches)} slots are taken: release a stream first.")
        if not self._stores:
            self._stores = [self._allocate(layer) for layer in _sink_layers(cache)]
        if STORES[cache.config.kv_dtype] is not type(self._stores[0][0]):
            raise CacheError(
                f"The stream has kv_dtype={cache.config.kv_dtype!r}, the slots were made for another: use other slots."
            )
        slot = self.caches.index(None)
        self.caches[slot] = cache
        self._place(cache, slot)

    def release(self, cache: SinkCache) -> None:
        """Move a stream out, into memory of its own; the last one takes its place.

        Raises:
            CacheError: it is in no slot.
        """
        slot = self._slot(cache)
        layers = _sink_layers(cache)
        own = [[store.cut(_ALL, 0, layer.ledger.slots).clone() for store in layer.stores or ()] for layer in layers]
        for layer, (keys, values) in zip(layers, own, strict=True):
            layer.stores = (keys, values)
        self._vacate(slot)

    def drop(self, cache: SinkCache) -> None:
        """Free the slot of a stream that has no other memory; it begins anew when it is read again."""
        slot = self._slot(cache)
        cache.reset()
        for layer in _sink_layers(cache):
            layer.stores, layer.is_initialized = None, False
        self._vacate(slot)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile, or load, the step of every size, while a stream is in a slot; nothing to do if none is compiled."""
        for size in range(1, len(self.caches) + 1):
            if self.compiles and self._size(size) == size:
                self._run(size)

    def _vacate(self, slot: int) -> None:
        """A slot is empty: the last stream takes it."""
        self.caches[slot] = None
        last = max((i for i, held in enumerate(self.caches) if held is not None), default=0)
        moved = self.caches[last]
        if last > slot and moved is not None:
            self.caches[slot], self.caches[last] = moved, None
            self._place(moved, slot)

    @torch.no_grad()
    def step(self, caches: Sequence[SinkCache], ids: Sequence[int]) -> Tensor:
        """Read one id of each of ``caches``, which are in slots; the logits [len(caches), V] after them.

        Whatever is raised by the model leaves all streams as they were, but for evictions that were due.

        Raises:
            CacheError: a stream is in no slot, was pinned beyond its slot, is named twice, or was broken off.
        """
        if len({id(cache) for cache in caches}) < len(caches):
            raise CacheError("A step reads one token of each stream, you named one twice.")
        places = [self._place_of(cache) for cache in caches]
        # Id, first column, column of the id, position; idle slots write where their next token will.
        plan = [[0, end, end, 0] for end in map(self._end, self.caches[: self._size(max(places) + 1)])]
        for cache, place, token in zip(caches, places, ids, strict=True):
            cache.enter(self._decoder, torch.tensor([[token]]), None, [True], are_ids=True)
            ledger = _sink_layers(cache)[0].ledger
            stream = ledger.rows[0]
            plan[place] = [token, stream.start, ledger.end, ledger.position(stream)]
        width = self._width(1 + max(column for _, _, column, _ in plan))
        logits = self._run(len(plan))(torch.tensor(plan, device=self._model.device), self._tensors(len(plan), width))
        # All memory is had before the first token counts. A graph writes its results into the same place again.
        found: Tensor = logits[places] if logits.is_cuda or places != list(range(len(plan))) else logits
        for cache in caches:
            for layer in _sink_layers(cache):
                layer.last = layer.ledger.span
            cache.leave()
        return found

    # ---- inside

    def _allocate(self, layer: SinkLayer) -> Pair:
        """The store of all slots for one layer."""
        found = []
        for store in layer.stores or ():
            like = store.cut(_ALL, 0, 0).read()
            found.append(type(store).allocate(like.expand(len(self.caches), -1, -1, -1), self.columns + SPARE))
        keys, values = found
        return keys, values

    def _place(self, cache: SinkCache, slot: int) -> None:
        """Move a stream into its slot, emptied before: what is hidden is read with a weight of 0, so it must be finite.

        One that was pinned beyond its slot stays in memory of its own. The first layer comes last: once it is there,
        all are, whatever interrupts.
        """
        if cache.capacity > self.columns:
            return
        rows = slice(slot, slot + 1)
        for layer, pair in reversed(list(zip(_sink_layers(cache), self._stores, strict=True))):
            if not _is_at(layer, pair, slot):
                for store in pair:
                    store.cut(rows, 0, store.columns).clear()
                keys, values = (store.cut(rows, 0, self.columns) for store in pair)
                layer.settle((keys, values))

    def _slot(self, cache: SinkCache) -> int:
        """The slot of a stream."""
        if cache not in self.caches:
            raise CacheError("The stream is in no slot: take() it first.")
        return self.caches.index(cache)

    def _place_of(self, cache: SinkCache) -> int:
        """The slot of a stream, which lies there; whatever gives a stream memory of its own has moved it out."""
        slot = self._slot(cache)
        if cache.capacity > self.columns:
            raise CacheError(f"The stream was pinned beyond its slot: it may cache {cache.capacity} of {self.columns}.")
        if not _is_at(_sink_layers(cache)[0], self._stores[0], slot):
            self._place(cache, slot)
        return slot

    def _size(self, used: int) -> int:
        """Slots that a step reads: all in use, or the next power of two if each size is compiled."""
        return min(1 << (used - 1).bit_length(), len(self.caches)) if self.compiles else used

    def _end(self, cache: SinkCache | None) -> int:
        """The column that the next token of a slot goes to."""
        return 0 if cache is None else min(_sink_layers(cache)[0].ledger.end, self.columns)

    def _width(self, needed: int) -> int:
        """Columns that a step reads which needs so many."""
        most = self.columns + 1
        return min(-(-needed // STRIDE) * STRIDE, most) if self._varies else most

    def _tensors(self, count: int, width: int) -> list[list[Tensor]]:
        """So many columns of the first ``count`` slots' stores, layer by layer: of keys, then of values."""
        if (count, width) not in self._views:
            if len(self._views) >= VIEWS:
                self._views.clear()
            rows = slice(0, count)
            cut = [[store.cut(rows, 0, width) for store in pair] for pair in self._stores]
            views = [[part for store in pair for part in store.parts().values()] for pair in cut]
            for part in (part for parts in views for part in parts if part.is_cuda):
                torch._dynamo.mark_static_address(part)  # or there is no graph, as the step writes into it
            self._views[count, width] = views
        return self._views[count, width]

    def _run(self, count: int) -> Callable[..., Tensor]:
        """The step over ``count`` slots, compiled if it can be."""
        kind = type(self._stores[0][0])
        if self._plain is None:
            self._plain = SlotStep(self._model, kind)
        if self.compiles and count not in self._compiled:
            self._compiled[count] = self._find(count, kind)
        return self._compiled.get(count) or self._plain

    def _find(self, count: int, kind: type[Store]) -> Callable[..., Tensor] | None:
        """The compiled step over ``count`` slots, known or made now; ``None``, and a note, if it cannot be."""
        key = (count, self.columns, kind, torch.get_num_threads(), self._weights)
        with _lock:  # another thread may be about to compile the same
            known = _steps.setdefault(self._model, {})
            for other in [other for other in known if other[-1] != self._weights or len(known) > KNOWN]:
                del known[other]
            found = known.get(key)
            if found is None or not (isinstance(found, str) or self._agrees(found, count)):
                found = known[key] = self._compile(count, kind)
        if not isinstance(found, str):
            return found
        self.compiles = False  # other sizes would fail alike, after as long a time
        self._note(NOT_COMPILED.format(found))
        return None

    def _compile(self, count: int, kind: type[Store]) -> Callable[..., Tensor] | str:
        """The step over ``count`` slots, loaded or compiled now; or why that cannot be."""
        step = SlotStep(self._model, kind, is_compiled=True)
        try:
            for anew in (False, True):
                found = compile_module(step, *self._example(count), anew=anew)
                if self._agrees(found, count):
                    return found
        except StreamLLMError as error:
            return str(error)
        except Exception as error:  # no compiler, no headers: many kinds
            if "InvalidCxxCompiler" in str(error):
                return "torch finds no C++ compiler; install g++, or name one by CXX"
            is_file = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            hint = "" if is_file else "; is a C++ compiler there?"
            return f"{type(error).__name__}, {str(error)[:100].strip()}{hint}"
        return "it gives other numbers than the model itself"

    def _example(self, count: int) -> tuple[tuple[Tensor, list[list[Tensor]]], Any]:
        """Arguments of a step of ``count`` slots that changes no stream, and which of their sizes vary."""
        most = self.columns + 1
        plan = torch.zeros((count, 4), dtype=torch.long, device=self._model.device)
        plan[:, 1:3] = self.columns
        tensors = self._tensors(count, most)
        if not self._varies or most <= STRIDE:
            return (plan, tensors), None
        columns = torch.export.Dim("columns", min=2, max=most)
        return (plan, tensors), {"plan": None, "stores": [[{2: columns} for _ in parts] for parts in tensors]}

    def _agrees(self, step: Callable[..., Tensor], count: int) -> bool:
        """Whether a compiled step still computes what the model does: hooks or adapters may have come or gone."""
        return all(self._agrees_at(step, count, width) for width in {self._width(1), self.columns + 1})

    def _agrees_at(self, step: Callable[..., Tensor], count: int, width: int) -> bool:
        """The same when so many columns are read.

        Each slot reads an id of its own at a place of its own, and sees some columns and not others. What lies in the
        last ones meanwhile is noise, as large as what the model itself wrote there, so that every query and mask
        counts.
        """
        assert self._plain is not None
        tensors, least = self._tensors(count, width), min(8, self.columns)
        begin, last = width - least, width - 1
        places = [(slot, begin + min(1 + slot % 2, least - 1)) for slot in range(count)]
        plan = torch.tensor(
            [[slot + 3, first, max(first, last - slot % 2), least // 2 + slot] for slot, first in places],
            device=self._model.device,
        )
        used = [store.cut(slice(0, count), begin, width) for pair in self._stores for store in pair]
        before = [store.clone() for store in used]
        draw = torch.Generator().manual_seed(0)
        try:
            self._plain(plan, tensors)
            for store in used:
                own = store.read()[torch.arange(count), :, plan[:, 2] - begin][:, :, None]
                store.write(own * torch.randn(store.data.shape, generator=draw).to(own))
            want, found = (run(plan, tensors).float() for run in (self._plain, step))
        finally:
            for store, old in zip(used, before, strict=True):
                store.fill(old)
        # Packed weights are multiplied in bf16, and where the compiler rounds to it is its own matter.
        # And positions are turned into angles in float32, whatever the dtype.
        coarse = torch.float32 if kind_of(self._model) == "none" else torch.bfloat16
        dtype = max(self._model.dtype, coarse, key=lambda dtype: torch.finfo(dtype).eps)
        return bool((found - want).norm() <= want.norm() * torch.finfo(dtype).eps ** 0.5)


SPARE = 2
"""Columns of a slot beyond ``C``: one for what a full slot writes while idle, and one that is never read, so that what
is read never lies in one piece: a compiled step of any width finds it laid out alike."""

NOT_COMPILED = "Decoding is not compiled, which is slower: {}"
"""What a note says, with the reason."""

KNOWN = 16
"""Compiled steps that are kept for each model; others are loaded again from disk."""

VIEWS = 16
"""Views of the slots that are kept, by how many slots and columns: each has tensors for all layers."""

_ALL = slice(None)

# The compiled steps of each model by their sizes and by where its weights lie, so that the next stream need not compile
# or load them again; or why there is none, which need not be tried again. One thread at a time finds one.
_steps: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], Callable[..., Tensor] | str]] = WeakKeyDictionary()
_lock = threading.Lock()


def _sink_layers(cache: SinkCache) -> list[SinkLayer]:
    """The layers of a stream that ``why_not`` has nothing against: all of them."""
    return cast("list[SinkLayer]", cache.layers)


def _is_at(layer: SinkLayer, pair: Pair, slot: int) -> bool:
    """Whether a layer's columns are those of a slot."""
    return layer.stores is not None and layer.stores[0].data.data_ptr() == pair[0].data[slot].data_ptr()
