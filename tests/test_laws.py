"""The laws of the algorithm, on tiny random models of every family; they are listed in ``docs/families.md``.

Nearly all models have a trained length of ``LIMIT`` positions, barely more than the cache holds. So positions restart
every few tokens in every test here, not only in those of law 8.

Every test compares logits with those of another way to compute them, which its docstring names. They have a scale of
1 to 3. transformers computes angles in float32 even for float64 models, so different ways agree to about 1e-6 there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from families import FAMILIES, REFUSED_OR_EXTRA, VOCAB, Family
from reference import dense_logits, literal_logits, reread_logits
from streamllm import cache as cache_module
from streamllm.cache import SinkCache
from streamllm.errors import CacheError, ConfigError, UnsupportedModelError
from streamllm.layer import SinkLayer
from streamllm.ledger import Ledger
from streamllm.rope import Rotation
from streamllm.spec import inspect_model
from streamllm.state import load_state, save_state

S, W, B = 3, 6, 2
CAPACITY = S + W + B - 1
LIMIT = 16
"""Trained length: an eviction in four restarts the positions of a cache of ``CAPACITY``."""

SETTINGS = [(4, 8, 1), (S, W, B), (2, 3, 5), (0, 4, 3), (0, 1, 1)]
"""Sinks, window, block: the paper's schedule, a plain one, a block beyond the window, no sinks, nothing but oneself."""

SPLITS = [(1000,), (2, 3, 5, 7, 11, 13), (23, 1, 1), (CAPACITY, B, 1, CAPACITY + 1, 4 * B)]
"""Sizes of chunks, over and over: one forward, primes, across several evictions, up to evictions and just beyond."""

TOLERANCE = {torch.float64: 2e-5, torch.float32: 1e-4}

FLAWED = 0.1
"""A flaw on purpose changes the logits by more than this."""

STREAMS = FAMILIES | {name: REFUSED_OR_EXTRA[name] for name in ("falcon-alibi", "gptj", "codegen", "lfm2", "gemma3n")}
REFUSED = {name: family for name, family in REFUSED_OR_EXTRA.items() if name not in STREAMS}
RAGGED = {name: family for name, family in STREAMS.items() if name != "lfm2"}
MOVED = {name: family for name, family in STREAMS.items() if family.positions != "absolute"}
ROTARY = {name: family for name, family in STREAMS.items() if family.positions == "rotary"}
MIXED_BAG = ("llama", "llama-yarn", "phi", "gemma3", "cohere2", "gpt-oss", "deepseek-v2", "bloom", "opt", "lfm2")

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def each(families: dict[str, Family] | Sequence[str]) -> pytest.MarkDecorator:
    chosen = families.values() if isinstance(families, dict) else [STREAMS[name] for name in families]
    return pytest.mark.parametrize("family", chosen, ids=str)


# ---- reading a stream


def make_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def make(family: Family, dtype: torch.dtype = torch.float64, limit: int = LIMIT, **options: Any) -> PreTrainedModel:
    """The model whose positions must stay below ``limit``; for longrope that is a quarter of its length."""
    return family.make(dtype, trained=4 * limit if family.name == "llama-longrope" else limit, **options)


def forward(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    """Logits [T, V] of ``ids`` [T], in one plain call of the model."""
    with torch.no_grad():
        logits: Tensor = model(ids[None], past_key_values=cache).logits[0]
    return logits


def read(model: PreTrainedModel, cache: Any, ids: Tensor, sizes: Iterable[int] = (1,)) -> Tensor:
    """Logits [T, V] of ``ids`` [T], read in chunks of these sizes, over and over."""
    first, logits = 0, []
    for size in itertools.cycle(sizes):
        logits.append(forward(model, cache, ids[first : first + size]))
        first += size
        if first >= len(ids):
            return torch.cat(logits)
    raise AssertionError("no sizes")


def read_rows(model: PreTrainedModel, cache: SinkCache, new: Sequence[Tensor], spare: int = 0) -> list[Tensor]:
    """Logits [T_r, V] of the new tokens [T_r] of each row, read together, left-padded to the longest and ``spare``."""
    width = max(len(ids) for ids in new) + spare
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in new])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in new]).long()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    return [of_row[width - len(row) :] for of_row, row in zip(logits, new, strict=True)]


@functools.cache
def expected(family: Family, count: int, sinks: int, window: int, block: int) -> Tensor:
    """Logits [count, V] of the literal reference, in float64; for learned positions of the one that reads again."""
    reference = reread_logits if family.positions == "absolute" else literal_logits
    return reference(make(family), make_ids(count), sinks, window, block)


def difference(actual: Tensor, wanted: Tensor) -> float:
    assert actual.shape == wanted.shape
    return float((actual.double() - wanted.double()).abs().max())


def check_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float64) -> None:
    assert difference(actual, wanted) <= TOLERANCE[dtype]  # false for nan, too


# ---- what the probe finds


@each(STREAMS)
@both_dtypes
def test_the_probe_finds_how_a_family_knows_positions(
    family: Family, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """Reference: what ``families`` says about the architecture."""
    spec = inspect_model(family.make(dtype))
    assert spec.positions == family.positions
    assert spec.residual < 1e-5
    config = family.make(dtype).config
    kinds = Counter(
        f"{layer.kind} ({layer.window})" if layer.kind == "sliding" else layer.kind for layer in spec.layers
    )
    assert kinds.total() == config.num_hidden_layers
    assert ("sliding" in {layer.kind for layer in spec.layers}) == (family.sliding == "hybrid")
    record_property("positions", spec.positions)
    record_property("residual", spec.residual)
    record_property("layers", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    record_property("how", "re-reading" if spec.reread else "moving keys")


def test_the_probe_tells_which_layers_and_which_tensors_turn() -> None:
    """Reference: the architectures as their papers and configs describe them."""

    def turns(name: str, layers: int = 2) -> list[tuple[bool, bool]]:
        spec = inspect_model(STREAMS[name].make(layers=layers))
        return [(layer.keys is not None, layer.values is not None) for layer in spec.layers]

    assert turns("llama") == [(True, False)] * 2
    assert turns("smollm3", layers=4) == [(True, False), (False, False)] * 2  # every second layer has no positions
    assert turns("cohere2", layers=4) == [(True, False), (False, False)] * 2  # only sliding layers have
    assert turns("deepseek-v2") == [(False, True)] * 2  # MLA keeps its rotary key where values usually are
    assert turns("bloom") == turns("gpt2") == [(False, False)] * 2
    assert turns("gemma3n") == [(True, False)] * 2 + [(False, False)] * 2


@pytest.mark.parametrize("family", REFUSED.values(), ids=str)
def test_a_family_that_cannot_stream_is_refused_with_its_type_and_the_reason(
    family: Family, record_property: Callable[[str, object], None]
) -> None:
    """Reference: the reasons themselves, a word of each."""
    word = {"recurrent-gemma": "state of its own", "t5": "encoder-decoder", "llama4": "chunked_attention"}[family.name]
    model = family.make()
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        SinkCache(model)
    message = str(caught.value)
    assert f"'{model.config.model_type}'" in message
    record_property("refused", message.partition("cannot stream: ")[2].rstrip("."))


# ---- law 1: chunks


@pytest.mark.law(1)
@each(STREAMS)
@both_dtypes
def test_any_split_into_chunks_gives_the_logits_of_one_token_at_a_time(family: Family, dtype: torch.dtype) -> None:
    """Reference: the same cache, read one token at a time."""
    model, ids = make(family, dtype), make_ids(53)
    for shape in [(S, W, B), (0, 4, 3)]:
        single = read(model, SinkCache(model, *shape), ids)
        for sizes in SPLITS:
            check_close(read(model, SinkCache(model, *shape), ids, sizes), single, dtype)


@pytest.mark.law(1)
@each(MIXED_BAG)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 8), st.integers(1, 5)),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_random_splits_of_random_caches_give_the_logits_of_one_token_at_a_time(
    family: Family, shape: tuple[int, int, int], sizes: list[int]
) -> None:
    """Reference: the same cache, read one token at a time."""
    model, ids = make(family), make_ids(45)
    check_close(read(model, SinkCache(model, *shape), ids, sizes), read(model, SinkCache(model, *shape), ids))


@pytest.mark.law(1)
@each(["llama", "gemma3", "bloom", "opt"])
@pytest.mark.parametrize("point", [5, CAPACITY, 17])
def test_a_head_that_shrinks_gives_the_same_logits_in_any_chunks_or_is_refused(family: Family, point: int) -> None:
    """Reference: the same cache, read one token at a time; while nothing is lost, the literal one with fewer sinks."""
    model, ids = make(family), make_ids(40)
    caches = [SinkCache(model, S, W, B) for _ in range(2)]
    for cache in caches:
        read(model, cache, ids[:point])
        try:
            cache.pin(1)
        except (CacheError, ConfigError):
            return
    single, chunked = (
        read(model, cache, ids[point:], sizes) for cache, sizes in zip(caches, [(1,), (9, 2)], strict=True)
    )
    check_close(chunked, single)
    if point < 1 + W + B - 1:
        check_close(single, expected(family, 40, 1, W, B)[point:])


# ---- law 2: the literal implementation


@pytest.mark.law(2)
@each(STREAMS)
@both_dtypes
def test_a_stream_equals_the_literal_implementation(
    family: Family, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """Reference: ``reference.literal_logits`` in float64, for learned positions ``reference.reread_logits``.

    The literal one knows layers that share keys and values (Gemma 3n), the layer-wise one that checks it does not.
    """
    model, ids = make(family, dtype), make_ids(40)
    for shape in SETTINGS:
        logits, wanted = read(model, SinkCache(model, *shape), ids), expected(family, 40, *shape)
        check_close(logits, wanted, dtype)
        if dtype == torch.float64:
            record_property("difference", difference(logits, wanted))


@pytest.mark.law(2)
@each(MIXED_BAG)
def test_four_layers_equal_the_literal_implementation_too(family: Family) -> None:
    """Reference: ``reference.literal_logits``, for learned positions ``reference.reread_logits``."""
    model, ids = make(family, layers=4), make_ids(40)
    reference = reread_logits if family.positions == "absolute" else literal_logits
    check_close(read(model, SinkCache(model, S, W, B), ids, (9, 4)), reference(model, ids, S, W, B))


@pytest.mark.law(2)
@each(MIXED_BAG)
def test_eager_attention_equals_the_literal_implementation_in_any_chunks(family: Family) -> None:
    """Reference: the literal implementation on a model with SDPA attention, where the architecture has it."""
    model, ids = make(family, attn="eager"), make_ids(40)
    for sizes in [(1,), *SPLITS]:
        check_close(read(model, SinkCache(model, S, W, B), ids, sizes), expected(family, 40, S, W, B))


@pytest.mark.law(2)
@each({name: family for name, family in MOVED.items() if family.positions == "rotary"} | {"bloom": FAMILIES["bloom"]})
def test_reading_again_on_request_equals_reading_again_literally(family: Family) -> None:
    """Reference: ``reference.reread_logits``, the paper's sliding window with re-computation."""
    model, ids = make(family), make_ids(30)
    logits = read(model, SinkCache(model, S, W, B, reread=True), ids, (1, 5))
    check_close(logits, reread_logits(model, ids, S, W, B))


# ---- law 3: before the first eviction


@pytest.mark.law(3)
@each(STREAMS)
@both_dtypes
def test_before_the_first_eviction_a_stream_is_the_plain_model(family: Family, dtype: torch.dtype) -> None:
    """Reference: the plain model with a ``DynamicCache``, read in the same chunks."""
    model, ids = make(family, dtype, limit=32), make_ids(32)
    cache = SinkCache(model, 3, 25, 5)
    logits = read(model, cache, ids, (9, 1, 3))
    assert (cache.capacity, cache.tokens_evicted) == (32, 0)
    check_close(logits, read(model, DynamicCache(config=model.config), ids, (9, 1, 3)), dtype)


# ---- law 4: one layer


@pytest.mark.law(4)
@each(STREAMS)
@both_dtypes
def test_one_layer_reads_a_token_as_a_dense_forward_over_what_is_kept(family: Family, dtype: torch.dtype) -> None:
    """Reference: for each token a forward of its own, over the kept tokens at positions 0, 1, ..., without a cache."""
    model, ids = make(family, dtype, layers=1), make_ids(30)
    for shape in [(S, W, B), (2, 3, 5)]:
        dense = torch.stack([dense_logits(model, ids, t, *shape) for t in range(len(ids))])
        check_close(read(model, SinkCache(model, *shape), ids, (1, 7)), dense, dtype)


# ---- law 5: rows


TURNS = [(3, 20, 9), (1, 1, 1), (1, 1, 1), (0, 5, 14), (12, 0, 1), (1, 1, 1), (1, 1, 1), (0, 0, 2), (7, 11, 30)]
"""New tokens of three rows, turn by turn: prompts, single steps, later turns, and rows with nothing new."""


class Rows:
    """A ragged batch, and beside it each of its rows alone, one token at a time."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, shape: tuple[int, int, int] = (S, W, B)) -> None:
        self.model, self.dtype = model, dtype
        self.batch = SinkCache(model, *shape, batch_size=3)
        self.alone = [SinkCache(model, *shape) for _ in range(3)]
        self.ids = [iter(make_ids(400, seed=row).split(1)) for row in range(3)]

    def evict(self, count: int, row: int) -> None:
        self.batch.evict(count, row=row)
        self.alone[row].evict(count)

    def turn(self, counts: Sequence[int], spare: int = 0) -> None:
        new = [
            torch.cat([torch.empty(0, dtype=torch.long), *itertools.islice(ids, n)])
            for ids, n in zip(self.ids, counts, strict=True)
        ]
        together = read_rows(self.model, self.batch, new, spare)
        for logits, cache, ids in zip(together, self.alone, new, strict=True):
            if len(ids):
                check_close(logits, read(self.model, cache, ids), self.dtype)

    def seen(self) -> list[int]:
        return [row.seen for row in self.batch.rows]


@pytest.mark.law(5)
@each(RAGGED)
@both_dtypes
def test_rows_of_a_ragged_batch_equal_the_same_streams_alone(family: Family, dtype: torch.dtype) -> None:
    """Reference: each row in a cache of its own, one token at a time."""
    rows = Rows(make(family, dtype), dtype)
    for counts in TURNS:
        rows.turn(counts)
    assert rows.seen() == [sum(counts) for counts in zip(*TURNS, strict=True)]


@pytest.mark.law(5)
@each(RAGGED)
@both_dtypes
def test_a_row_is_pinned_evicted_and_reset_without_the_others(family: Family, dtype: torch.dtype) -> None:
    """Reference: each row in a cache of its own, on which the same is done."""
    rows = Rows(make(family, dtype), dtype)
    rows.batch.pin(6, row=1)
    rows.alone[1].pin(6)
    for counts in [(4, 8, 6), (2, 3, 1), (5, 20, 1)]:
        rows.turn(counts)
    if family.positions != "absolute":
        rows.evict(3, row=2)
    rows.turn((1, 1, 1))
    rows.batch.reset(0)
    rows.alone[0] = SinkCache(rows.model, S, W, B)
    for counts in [(5, 1, 2), (1, 1, 1), (9, 0, 30), (15, 9, 1)]:
        rows.turn(counts)


@pytest.mark.law(5)
@each(RAGGED)
def test_rows_of_one_age_equal_the_same_streams_alone(family: Family) -> None:
    """Reference: each row in a cache of its own, one token at a time."""
    rows = Rows(make(family), torch.float64)
    for count in (1, 14, 1, 23):
        rows.turn((count,) * 3)


@pytest.mark.law(5)
@each([name for name in MIXED_BAG if name != "lfm2"])
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(6, 9), st.integers(1, 4)),
    turns=st.lists(st.tuples(*[st.integers(0, 20)] * 3).filter(any), min_size=1, max_size=8),
)
def test_rows_of_random_ages_in_random_caches_equal_the_same_streams_alone(
    family: Family, shape: tuple[int, int, int], turns: list[tuple[int, int, int]]
) -> None:
    """Reference: each row in a cache of its own, one token at a time."""
    rows = Rows(make(family), torch.float64, shape)
    for counts in turns:
        rows.turn(counts)


@pytest.mark.law(5)
@each({name: family for name, family in RAGGED.items() if family.positions != "absolute"})
def test_a_row_that_keeps_only_its_head_equals_the_same_stream_alone(family: Family) -> None:
    """Reference: each row in a cache of its own, on which the same is done. Layers with an own window keep theirs."""
    rows = Rows(make(family), torch.float64)
    rows.turn((6, 9, 8))
    rows.evict(5, row=2)
    for counts in [(1, 1, 1), (2, 4, 3), (1, 1, 1)]:
        rows.turn(counts)


@pytest.mark.law(5)
@each(["llama", "gemma3", "bloom"])
@pytest.mark.parametrize("ages", [(CAPACITY, 4, 5), (CAPACITY,) * 3], ids=["different", "equal"])
def test_nothing_leaves_a_full_row_while_only_other_rows_read(family: Family, ages: tuple[int, int, int]) -> None:
    """Reference: the row in a cache of its own, on which the same is done."""
    rows = Rows(make(family), torch.float64)
    rows.turn(ages)
    rows.turn((0, 3, 1))
    rows.evict(1, row=0)
    rows.turn((1, 1, 1))


@pytest.mark.law(5)
@each(["llama", "gemma3", "bloom", "opt"])
def test_padding_that_all_rows_share_changes_nothing(family: Family) -> None:
    """Reference: each row in a cache of its own, without padding, one token at a time."""
    rows = Rows(make(family), torch.float64)
    for counts, spare in [((3, 5, 2), CAPACITY + 5), ((1, 1, 1), 1), ((8, 1, 20), 3), ((1, 1, 1), CAPACITY + 5)]:
        rows.turn(counts, spare)


@pytest.mark.law(5)
@each([name for name in MIXED_BAG if name != "lfm2"])
def test_a_row_begins_anew_with_a_longer_head(family: Family) -> None:
    """Reference: each row in a cache of its own; for the row that begins anew a new one."""
    rows = Rows(make(family), torch.float64)
    rows.turn((20, 15, 3))
    rows.batch.reset(1)
    rows.batch.pin(S + 3, row=1)
    rows.alone[1] = SinkCache(rows.model, S + 3, W, B)
    for counts in [(1, 20, 5), (1, 1, 1)]:
        rows.turn(counts)


@pytest.mark.law(2)
@each(MIXED_BAG)
def test_a_cache_begins_anew_with_a_longer_head(family: Family) -> None:
    """Reference: the literal implementation with as many sinks as are pinned."""
    model, ids = make(family), make_ids(40)
    cache = SinkCache(model, S, W, B)
    read(model, cache, make_ids(30, seed=1), (7,))
    cache.reset()
    cache.pin(S + 3)
    check_close(read(model, cache, ids, (1, 8)), expected(family, 40, S + 3, W, B))


@each(["lfm2"])
def test_recurrent_layers_refuse_rows_of_different_age(
    family: Family, record_property: Callable[[str, object], None]
) -> None:
    """Reference: the error; and rows of one age, which are read, in a cache of their own, one token at a time."""
    model = make(family)
    rows = Rows(model, torch.float64)
    for count in (1, 14, 1, 23):
        rows.turn((count,) * 3)
    with pytest.raises(CacheError, match="recurrent layers"):
        read_rows(model, rows.batch, [make_ids(2), make_ids(3), make_ids(1)])
    with pytest.raises(CacheError, match="recurrent layers"):
        rows.batch.reset(0)
    record_property("limits", "rows of a batch must be of one age")


# ---- law 6: states

POINTS = (5, CAPACITY, 16, 17)
"""Where a stream is left: before evictions, when the first is due, when a restart is due, and right after that."""


@pytest.mark.law(6)
@each(STREAMS)
@both_dtypes
def test_a_saved_stream_goes_on_bit_for_bit(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    """Reference: the same stream without a break, in the same chunks."""
    model, ids = make(family, dtype), make_ids(55)
    for point in POINTS:
        cache = SinkCache(model, S, W, B)
        read(model, cache, ids[:point])
        if point == POINTS[-1] and inspect_model(model).trained_length and not inspect_model(model).reread:
            assert cache.tokens_evicted > cache.rows[0].frame == 0  # positions have just restarted
        save_state(tmp_path / "stream", cache)
        loaded = load_state(tmp_path / "stream", model).cache
        assert torch.equal(read(model, loaded, ids[point:], (1, 9)), read(model, cache, ids[point:], (1, 9)))
        assert loaded.rows == cache.rows


@pytest.mark.law(6)
@each(STREAMS)
@both_dtypes
def test_a_fork_goes_on_bit_for_bit_and_leaves_the_original_alone(family: Family, dtype: torch.dtype) -> None:
    """Reference: the same stream without a break, in the same chunks."""
    model, ids = make(family, dtype), make_ids(55)
    whole, broken = SinkCache(model, S, W, B), SinkCache(model, S, W, B)
    first = 0
    for point in (*POINTS, len(ids)):
        assert torch.equal(read(model, broken, ids[first:point]), read(model, whole, ids[first:point]))
        fork = broken.fork()
        read(model, broken, make_ids(19, seed=1), (1, 6))  # going on elsewhere must not touch the fork
        broken, first = fork, point


@pytest.mark.law(6)
@each(RAGGED)
def test_a_saved_batch_of_rows_goes_on_bit_for_bit(family: Family, tmp_path: Path) -> None:
    """Reference: the same batch without a break, in the same chunks."""
    model = make(family)
    cache = SinkCache(model, S, W, B, batch_size=3)
    cache.pin(5, row=2)
    for turn, counts in enumerate(TURNS):
        new = [make_ids(count, seed=3 * turn + row) for row, count in enumerate(counts)]
        save_state(tmp_path / "stream", cache)
        loaded = load_state(tmp_path / "stream", model).cache
        expected_rows = read_rows(model, cache, new)
        assert all(map(torch.equal, read_rows(model, loaded, new), expected_rows))
        cache = loaded


# ---- law 7: memory


@pytest.mark.law(7)
@each(STREAMS)
@both_dtypes
@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_are_constant_from_the_first_eviction_on(family: Family, dtype: torch.dtype, rows: int) -> None:
    """Reference: ``bytes_when_full``, which is known before the first token."""
    model, ids = make(family, dtype), make_ids(70)
    cache = SinkCache(model, S, W, B, batch_size=rows)
    forecast = cache.bytes_when_full
    storages: set[tuple[tuple[int, int], ...]] = set()
    sizes: set[int] = set()
    for part in ids.split([1] * (CAPACITY + 1) + [1] * 10 + [2, 30, 17]):
        with torch.no_grad():
            model(part.expand(rows, -1), past_key_values=cache)
        layers = [layer for layer in cache.layers if isinstance(layer, SinkLayer)]
        storages.add(tuple(store.data.data_ptr() for layer in layers for store in layer.stores or ()))
        for layer in layers:
            assert {store.columns for store in layer.stores or ()} == {layer.ledger.slots}
        if cache.tokens_evicted:
            sizes.add(cache.bytes)
    assert cache.tokens_evicted > 0
    assert len(storages) == 1  # nothing was allocated anew
    assert len(sizes) == 1
    if not cache.spec.count("linear"):
        assert sizes == {forecast}


# ---- law 8: positions restart


@pytest.mark.law(8)
@each(MOVED)
@both_dtypes
@pytest.mark.parametrize("spare", [0, 3, 7])
def test_positions_that_restart_give_the_logits_of_positions_that_go_on(
    family: Family, dtype: torch.dtype, spare: int
) -> None:
    """Reference: the same model and cache with a trained length beyond the stream, so that nothing restarts."""
    model, ids = make(family, dtype, limit=256), make_ids(60)
    SinkCache(model, S, W, B)  # lets caches of this model meet it, whatever spec they are made from
    spec = inspect_model(model)
    layers = tuple(dataclasses.replace(x, window=None) if x.kind == "sink" else x for x in spec.layers)
    tight = SinkCache(dataclasses.replace(spec, layers=layers, trained_length=CAPACITY + spare), S, W, B)
    wide = SinkCache(dataclasses.replace(spec, layers=layers, trained_length=256), S, W, B)
    wanted = read(model, wide, ids)
    check_close(read(model, tight, ids), wanted, dtype)
    tight.reset()
    check_close(read(model, tight, ids, (1, 13)), wanted, dtype)
    assert wide.rows[0].frame == wide.tokens_evicted == tight.tokens_evicted
    assert tight.rows[0].frame <= spare


@pytest.mark.law(8)
@each(STREAMS)
def test_positions_stay_below_the_trained_length_and_frequencies_never_change(family: Family) -> None:
    """Reference: the positions that reach the decoder, and its frequencies before the stream."""
    model, ids = make(family), make_ids(400)
    cache = SinkCache(model, S, W, B)
    decoder = model.get_decoder()
    fed: list[Tensor] = []
    handle = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["position_ids"]) if "position_ids" in kwargs else None,
        with_kwargs=True,
    )
    before = {name: value.clone() for name, value in decoder.named_buffers() if name.endswith("inv_freq")}
    try:
        read(model, cache, ids, (1, 1, 30, 5, 100, 2))
    finally:
        handle.remove()
    after = dict(decoder.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert cache.tokens_evicted > 300
    assert bool(fed) == cache.spec.takes_positions
    if fed and cache.spec.trained_length:
        assert cache.spec.trained_length == LIMIT
        assert CAPACITY <= max(int(positions.max()) for positions in fed) + 1 <= LIMIT
        assert min(int(positions.min()) for positions in fed) == 0


# ---- half precision


@each(["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_streams_agree_within_its_rounding(family: Family, dtype: torch.dtype) -> None:
    """Reference: one token at a time; and the literal implementation in float64, as far as such a model is from it."""
    model, ids = make(family, dtype), make_ids(53)
    exact = make(family)
    plain = [read(each_model, DynamicCache(config=exact.config), ids) for each_model in (model, exact)]
    rounding = difference(*plain)
    single = read(model, SinkCache(model, S, W, B), ids)
    assert difference(single, expected(family, 53, S, W, B)) <= 2 * rounding
    for sizes in SPLITS:
        assert difference(read(model, SinkCache(model, S, W, B), ids, sizes), single) <= rounding


# ---- the laws can fail

Flaw = Callable[[pytest.MonkeyPatch], None]


def keep_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned head stays where it was first read."""
    right = SinkLayer._head_at
    monkeypatch.setattr(SinkLayer, "_head_at", lambda layer, which, rows, head, _: right(layer, which, rows, head, 0))


def keep_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window does not follow when positions restart."""
    right = Rotation.rotate
    monkeypatch.setattr(Rotation, "rotate", lambda turn, x, offset: right(turn, x, max(offset, 0)))


def keep_own_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a window of their own do not follow when positions restart."""
    monkeypatch.setattr(Ledger, "rotate_back", lambda *_: None)


def skip_a_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tokens stand one further than they should, once tokens have left."""
    right = cache_module.next_positions
    monkeypatch.setattr(cache_module, "next_positions", lambda x, chunk: right(x, chunk) + (x.rows[0].frame > 0))


def show_what_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that runs over evictions sees all that was cached when it came."""
    right = cache_module.crossing_mask

    def wrong(ledger: Ledger, chunk: Any) -> Tensor:
        mask = right(ledger, chunk)
        first = ledger.head(ledger.rows[0]) * chunk.crossings
        mask[..., first : first + ledger.cached(ledger.rows[0])] = 0
        return mask

    monkeypatch.setattr(cache_module, "crossing_mask", wrong)


def show_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows see the columns that belong to none of their tokens."""
    right = cache_module.padding_mask
    monkeypatch.setattr(cache_module, "padding_mask", lambda *args: torch.ones_like(right(*args)))


def flawed_by(monkeypatch: pytest.MonkeyPatch, flaw: Flaw, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as context:
        flaw(context)
        return run()


@each({name: family for name, family in ROTARY.items() if name != "cohere2"})  # its layers with sinks do not rotate
def test_a_head_that_does_not_move_shows_in_every_family(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the literal implementation, from which the flawed cache must differ."""
    model, ids = make(family), make_ids(40)
    logits = flawed_by(monkeypatch, keep_head, lambda: read(model, SinkCache(model, S, W, B), ids))
    assert difference(logits, expected(family, 40, S, W, B)) > FLAWED


@pytest.mark.parametrize(
    ("flaw", "name", "sizes"),
    [
        (keep_head, "llama", (40,)),
        (keep_window, "llama", (1,)),
        (keep_window, "deepseek-v2", (7,)),
        (keep_own_windows, "gemma3", (1,)),
        (skip_a_position, "llama", (1,)),
        (show_what_left, "llama", (1, 15)),
    ],
)
def test_a_flaw_in_the_cache_shows_in_the_logits(
    flaw: Flaw, name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the literal implementation, which the cache without the flaw equals."""
    family = STREAMS[name]
    model, ids = make(family), make_ids(40)
    wanted = expected(family, 40, S, W, B)
    check_close(read(model, SinkCache(model, S, W, B), ids, sizes), wanted)
    logits = flawed_by(monkeypatch, flaw, lambda: read(model, SinkCache(model, S, W, B), ids, sizes))
    assert difference(logits, wanted) > FLAWED


@each(["llama", "gemma3", "bloom"])
def test_a_mask_that_shows_padding_shows_in_the_logits(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: each row in a cache of its own."""
    rows = Rows(make(family), torch.float64)
    rows.turn((9, 2, 5))
    with pytest.raises(AssertionError):
        flawed_by(monkeypatch, show_padding, lambda: rows.turn((1, 1, 1)))


@pytest.mark.parametrize("shape", [(S - 1, W, B), (S, W - 1, B), (S, W, B + 1)], ids=str)
def test_another_schedule_shows_in_the_logits(shape: tuple[int, int, int]) -> None:
    """Reference: the literal implementation with one sink, one token of the window, or one of a block less or more."""
    family, ids = FAMILIES["llama"], make_ids(40)
    model = make(family)
    assert difference(read(model, SinkCache(model, *shape), ids), expected(family, 40, S, W, B)) > FLAWED


def test_a_state_that_lost_its_frame_shows_in_the_logits(tmp_path: Path) -> None:
    """Reference: the stream without a break."""
    model, ids = make(FAMILIES["llama"]), make_ids(30)
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:14])
    save_state(tmp_path / "stream", cache)
    loaded = load_state(tmp_path / "stream", model).cache
    assert loaded.rows[0].frame > 0
    loaded.rows[0].frame = 0
    assert difference(read(model, loaded, ids[14:]), read(model, cache, ids[14:])) > FLAWED


# ---- the table


def test_the_families_table_lists_exactly_the_families_tested(request: pytest.FixtureRequest) -> None:
    """Reference: the families that the tests above run on. `make docs` writes the table anew."""
    if request.config.getoption("--families-table"):
        pytest.skip("the table is being written")
    docs = Path(__file__).parents[1] / "docs"
    if not docs.is_dir():
        pytest.skip("the source distribution has no docs")
    listed = re.findall(r"^\| (\S+) \|", (docs / "families.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(set(listed) - {"family"}) == sorted([*STREAMS, *REFUSED])
    assert len(listed) == len(set(listed))
