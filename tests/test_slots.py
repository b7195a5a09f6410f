"""Streams in slots give what each gives alone, whatever the others do, and whether or not the step is compiled."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES, REFUSED_OR_EXTRA, VOCAB, Family
from reference import literal_logits
from streamllm import SinkCache, compiled, slots
from streamllm.errors import CacheError, ConfigError, UnsupportedModelError
from streamllm.slots import Slots, why_not
from streamllm.state import load_state, save_state
from streamllm.store import Store

S, W, B = SHAPE = (3, 12, 5)
CAPACITY = S + W + B - 1
SHORT = 32
"""Trained length: every third eviction restarts the positions."""

ALL = FAMILIES | {name: family for name, family in REFUSED_OR_EXTRA.items() if name in ("gptj", "codegen", "lfm2")}


def make(name: str = "llama", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return ALL[name].make(dtype, trained=4 * SHORT if name == "llama-longrope" else SHORT)


@pytest.fixture
def model() -> PreTrainedModel:
    return make()


def draw(count: int, seed: int = 5) -> list[int]:
    ids: list[int] = torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def usual(model: PreTrainedModel, cache: SinkCache, ids: list[int]) -> Tensor:
    """Logits [V] after ``ids``, read in one usual forward."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids]), past_key_values=cache).logits[0, -1]
    return logits


def begun(model: PreTrainedModel, ids: list[int], shape: tuple[int, int, int] = SHAPE, **options: Any) -> SinkCache:
    """A stream that has read ``ids``."""
    cache = SinkCache(model, *shape, **options)
    usual(model, cache, ids)
    return cache


def check_close(found: Tensor, want: Tensor) -> None:
    """Angles and some softmaxes are float32 inside transformers, whatever the model's dtype."""
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


# ---- one stream


@pytest.mark.parametrize("compiles", [False, True], ids=["as it is", "to be compiled"])
@pytest.mark.parametrize("family", ALL.values(), ids=str)
def test_steps_give_the_logits_of_the_usual_forward_or_say_why_not(
    family: Family, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: single tokens through a cache of its own, by the model itself; over evictions and restarts.

    What is compiled takes other forms for a few rows; here it is run without a compiler.
    """
    monkeypatch.setattr(slots, "compile_module", lambda module, args, sizes, anew: module)
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    model, ids = make(family.name), draw(70)
    cache, alone, other_alone = (begun(model, ids[:10]) for _ in range(3))
    side = Slots(model, 2, CAPACITY, compiles=compiles)
    if why_not(cache):
        with pytest.raises(UnsupportedModelError, match="cannot be read in slots: "):
            side.take(cache)
        return
    other = cache.fork()
    side.take(cache)
    side.take(other)
    frames = []
    for number, token in enumerate(ids[10:]):
        caches = [cache, other] if number % 2 else [cache]
        found = side.step(caches, [token] * len(caches))
        check_close(found[0], usual(model, alone, [token]))
        if number % 2:
            check_close(found[1], usual(model, other_alone, [token]))
        frames.append(cache.rows[0].frame)
    assert cache.tokens_seen == alone.tokens_seen == 70
    assert any(later < earlier for earlier, later in itertools.pairwise(frames))  # positions did restart


def test_what_cannot_be_read_in_slots_is_known_and_has_a_reason() -> None:
    """Reference: the families by hand, by what their layers keep and how they know positions."""
    kept, reread, own = "something else than a window", "read anew at every eviction", "its own attention mask"
    reasons = {name: why_not(SinkCache(make(name), *SHAPE)) for name in ALL}
    refused = {name: reason for name, reason in reasons.items() if reason}
    for names, why in [
        (("gemma2", "gemma3", "gpt-oss", "cohere2", "lfm2"), kept),
        (("gpt2", "opt"), reread),
        (("mpt", "bloom"), own),
    ]:
        for name in names:
            assert why in refused.pop(name)
    assert not refused
    assert "read anew" in str(why_not(SinkCache(make(), *SHAPE, reread=True)))


def test_steps_give_the_logits_of_the_literal_implementation(model: PreTrainedModel) -> None:
    """Reference: ``reference.literal_logits``, which knows neither caches of this kind nor slots."""
    ids = draw(60)
    want = literal_logits(model, ids, *SHAPE)
    cache, side = begun(model, ids[:1]), Slots(model, 2, CAPACITY)
    side.take(cache)
    for number in range(1, 60):
        torch.testing.assert_close(side.step([cache], [ids[number]])[0], want[number], rtol=2e-5, atol=2e-5)


# ---- several streams


SHAPES = [(3, 12, 5), (0, 9, 4), (4, 20, 1)]


def test_streams_of_different_age_and_capacity_are_read_side_by_side(model: PreTrainedModel) -> None:
    """Reference: each stream alone, by the usual forward. The longest fills its slot, the others do not."""
    side, pairs = Slots(model, 3, 24), []
    for seed, (shape, age) in enumerate(zip(SHAPES, (4, 21, 30), strict=True)):
        ids = draw(100, seed)
        cache, alone = (begun(model, ids[:age], shape) for _ in range(2))
        side.take(cache)
        pairs.append((cache, alone, ids[age:]))
    for number in range(60):
        found = side.step([cache for cache, _, _ in pairs], [ids[number] for _, _, ids in pairs])
        for logits, (_, alone, ids) in zip(found, pairs, strict=True):
            check_close(logits, usual(model, alone, [ids[number]]))


class Bustle:
    """Streams that come, go and do everything that a stream can do; each has a twin that is read alone."""

    def __init__(self, model: PreTrainedModel, seed: int, **options: Any) -> None:
        self.model, self.options = model, options
        self.random = random.Random(seed)
        self.side = Slots(model, 3, 30)
        self.twins: list[tuple[SinkCache, SinkCache]] = []
        self.tolerance = 1e-5
        self.done: set[str] = set()

    def ids(self, most: int) -> list[int]:
        return [self.random.randrange(3, VOCAB) for _ in range(self.random.randint(1, most))]

    def come(self) -> None:
        if self.side.free:
            shape, ids = self.random.choice(SHAPES), self.ids(40)
            cache, alone = (begun(self.model, ids, shape, **self.options) for _ in range(2))
            self.side.take(cache)
            self.twins.append((cache, alone))

    def go(self) -> None:
        if self.twins:
            cache, alone = self.twins.pop(self.random.randrange(len(self.twins)))
            self.side.release(cache)
            ids = self.ids(3)
            self.compare(usual(self.model, cache, ids), usual(self.model, alone, ids))

    def come_back(self) -> None:
        if self.twins:
            cache, _ = self.random.choice(self.twins)
            self.side.release(cache)
            self.side.take(cache)

    def step(self) -> None:
        chosen = self.random.sample(self.twins, self.random.randint(0, len(self.twins)))
        if chosen:
            ids = [self.random.randrange(3, VOCAB) for _ in chosen]
            found = self.side.step([cache for cache, _ in chosen], ids)
            for logits, (_, alone), token in zip(found, chosen, ids, strict=True):
                self.compare(logits, usual(self.model, alone, [token]))

    def turn(self) -> None:
        if self.twins:
            pair, ids = self.random.choice(self.twins), self.ids(40)
            self.compare(*(usual(self.model, cache, ids) for cache in pair))

    def evict(self) -> None:
        if self.twins:
            pair = self.random.choice(self.twins)
            unpinned = pair[0].tokens_cached - min(pair[0].rows[0].pinned, pair[0].tokens_cached)
            count = self.random.randint(0, unpinned)
            for cache in pair:
                cache.evict(count)

    def pin(self) -> None:
        young = [pair for pair in self.twins if not pair[0].tokens_evicted and pair[0].rows[0].pinned < 5]
        if young:
            pair = self.random.choice(young)
            for cache in pair:
                cache.pin(5)

    def begin_anew(self) -> None:
        if self.twins:
            pair, ids = self.random.choice(self.twins), self.ids(5)
            for cache in pair:
                cache.reset()
            self.compare(*(usual(self.model, cache, ids) for cache in pair))

    def compare(self, found: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(found, want, rtol=self.tolerance, atol=self.tolerance)

    def run(self, count: int) -> None:
        acts = [self.come, self.go, self.come_back, self.turn, self.evict, self.pin, self.begin_anew]
        for _ in range(count):
            act = self.random.choice(acts)
            act()
            self.done.add(act.__name__)
            for _ in range(4):
                self.step()
            assert self.side.free == 3 - len(self.twins)
        assert len(self.done) == len(acts)


@pytest.mark.parametrize("seed", range(3))
def test_streams_that_come_and_go_and_do_what_they_like_equal_each_alone(model: PreTrainedModel, seed: int) -> None:
    """Reference: for each stream a twin that is read alone, by usual forwards, and does the same."""
    Bustle(model, seed).run(60)


def test_streams_in_eight_bits_come_and_go_likewise(model: PreTrainedModel) -> None:
    """Reference: as above; a key that lies between two of the 255 numbers may be rounded either way."""
    bustle = Bustle(model, 0, kv_dtype="int8")
    bustle.tolerance = 0.05
    bustle.run(60)


def test_when_one_leaves_the_last_takes_its_place_and_a_gap_costs_nothing(model: PreTrainedModel) -> None:
    """Reference: by hand; all that is read by a step lies at the front."""
    side = Slots(model, 4, CAPACITY)
    first, second, third = (begun(model, draw(5, seed)) for seed in range(3))
    for cache in (first, second, third):
        side.take(cache)
    side.release(first)
    assert side.caches == [third, second, None, None]
    side.release(second)
    assert side.caches == [third, None, None, None]
    side.release(third)
    assert side.free == 4


def test_a_released_stream_goes_on_as_if_it_had_stayed(model: PreTrainedModel) -> None:
    """Reference: its fork that stays in a slot; bit for bit. A neighbour that takes its place does it no harm."""
    side, ids = Slots(model, 3, CAPACITY), draw(60)
    leaver = begun(model, ids[:10])
    side.take(leaver)
    for token in ids[10:25]:
        side.step([leaver], [token])
    stayer = leaver.fork()
    side.take(stayer)
    side.release(leaver)
    assert side.caches == [stayer, None, None]
    newcomer = begun(model, draw(10, 1))
    side.take(newcomer)
    for token in ids[25:]:
        side.step([newcomer], [token])
        assert torch.equal(usual(model, leaver, [token]), usual(model, stayer, [token]))


def test_streams_that_are_not_named_are_left_alone(model: PreTrainedModel) -> None:
    """Reference: their own tensors and counters before; and logits come in the order of the streams named."""
    side, caches = Slots(model, 3, CAPACITY), [begun(model, draw(16, seed)) for seed in range(3)]
    for cache in caches:
        side.take(cache)
    header, tensors = caches[1].snapshot()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    forks = [cache.fork() for cache in caches]
    for token in draw(12):
        found = side.step([caches[2], caches[0]], [token, token + 1])
        check_close(found[0], usual(model, forks[2], [token]))
        check_close(found[1], usual(model, forks[0], [token + 1]))
    after = caches[1].snapshot()
    assert after[0] == header
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before.items())


def test_a_stream_in_a_slot_can_be_forked_and_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    """Reference: the stream itself going on by usual forwards, bit for bit; the copies are no larger than it is."""
    side, ids = Slots(model, 2, 100), draw(60)
    cache = begun(model, ids[:10])
    side.take(cache)
    for token in ids[10:30]:
        side.step([cache], [token])
    fork = cache.fork()
    assert {t.untyped_storage().nbytes() for t in fork.layers[0].tensors().values()} == {
        t.nbytes for t in fork.layers[0].tensors().values()
    }
    save_state(tmp_path / "slot.stream", cache)
    loaded = load_state(tmp_path / "slot.stream", model).cache
    again = begun(model, ids[:1])
    side.take(again)
    for token in ids[30:40]:
        want = usual(model, cache, [token])
        assert torch.equal(usual(model, fork, [token]), want)
        assert torch.equal(usual(model, loaded, [token]), want)
    side.release(again)
    side.take(loaded)
    for token in ids[40:]:
        both = side.step([cache, loaded], [token, token])
        assert torch.equal(both[0], both[1])
        check_close(both[0], usual(model, fork, [token]))


def test_no_grad_and_inference_mode_may_take_turns(model: PreTrainedModel) -> None:
    """Reference: no_grad all the way; what is made in inference mode could not be written outside it."""
    ids = draw(80)
    alone = begun(model, ids[:10])
    with torch.inference_mode():
        cache = SinkCache(model, *SHAPE)
        model(torch.tensor([ids[:10]]), past_key_values=cache)
        side = Slots(model, 2, CAPACITY)
        side.take(cache)
    for number, token in enumerate(ids[10:], start=10):
        want = usual(model, alone, [token])
        with torch.inference_mode(number // 3 % 2 == 0):
            if number % 9 == 8:
                side.release(cache)
                side.take(cache)
            check_close(
                side.step([cache], [token])[0]
                if number % 2
                else model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].detach(),
                want,
            )
    cache.reset()
    assert cache.tokens_seen == 0


# ---- what goes wrong


def poison(cache: SinkCache) -> None:
    """Spoil everything that a stream keeps."""
    for layer in cache.layers:
        for store in layer.stores:
            store.write(torch.full_like(store.read(), torch.nan))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_poisoned_stream_harms_no_other_and_leaves_a_clean_slot(model: PreTrainedModel, kv_dtype: str) -> None:
    """Reference: each healthy stream alone. Zero times NaN would be NaN, also where an idle slot writes."""
    side, tolerance = Slots(model, 2, CAPACITY), 1e-5 if kv_dtype == "auto" else 0.05
    sick, well = (begun(model, draw(10, seed), kv_dtype=kv_dtype) for seed in range(2))
    alone = well.fork()
    side.take(sick)
    side.take(well)
    poison(sick)
    for number, token in enumerate(draw(30)):
        want = usual(model, alone, [token])
        if number == 20:
            side.release(sick)  # and the other moves to where it was
        found = side.step([sick, well], [7, token]) if number < 10 else side.step([well], [token])
        assert not number < 10 or found[0].isnan().any()
        torch.testing.assert_close(found[-1], want, rtol=tolerance, atol=tolerance)
    newcomer = begun(model, draw(4), kv_dtype=kv_dtype)
    side.take(newcomer)
    alone = newcomer.fork()
    torch.testing.assert_close(side.step([newcomer], [9])[0], usual(model, alone, [9]), rtol=tolerance, atol=tolerance)


def test_a_poisoned_stream_is_healthy_after_a_reset(model: PreTrainedModel) -> None:
    """Reference: a new stream; what was there is hidden, and read with a weight of zero."""
    side, ids = Slots(model, 1, CAPACITY), draw(12)
    cache = begun(model, draw(15))
    side.take(cache)
    poison(cache)
    cache.reset()
    usual(model, cache, ids[:5])
    alone = begun(model, ids[:5])
    for token in ids[5:]:
        check_close(side.step([cache], [token])[0], usual(model, alone, [token]))


@pytest.mark.parametrize("spoiled", [0, 50])
def test_a_spoiled_embedding_harms_only_who_reads_it(spoiled: int) -> None:
    """Reference: the other stream alone. Idle slots read id 0, so 0 is the one that must do no harm at all."""
    model = copy.deepcopy(make())
    SinkCache(model, *SHAPE)  # the probe reads some ids, too
    with torch.no_grad():
        model.get_input_embeddings().weight[spoiled] = torch.nan
    side, ids = Slots(model, 3, CAPACITY), [token for token in draw(40) if token != spoiled]
    sick, idle, well = (begun(model, ids[:6]) for _ in range(3))
    for cache in (idle, sick, well):
        side.take(cache)
    alone = well.fork()
    assert side.step([sick], [spoiled]).isnan().any()
    for number, token in enumerate(ids):
        if number == 12:
            side.release(idle)
        if number == 15:
            side.release(sick)
        check_close(side.step([well], [token])[0], usual(model, alone, [token]))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("retry", ["step", "usual"])
def test_a_step_that_is_broken_off_can_be_taken_again(model: PreTrainedModel, layer: int, retry: str) -> None:
    """Reference: streams that were never interrupted; the model raises in each third step, at either layer."""
    side, pairs = Slots(model, 2, CAPACITY), []
    for seed in range(2):
        cache = begun(model, draw(10 + 3 * seed, seed))
        pairs.append((cache, cache.fork()))
        side.take(cache)
    caches, breaks = [cache for cache, _ in pairs], False

    def cut(module: nn.Module, args: Any) -> None:
        if breaks:
            raise KeyboardInterrupt

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(cut)
    try:
        for number, token in enumerate(draw(45)):
            if breaks := number % 3 == 0:
                with pytest.raises(KeyboardInterrupt):
                    side.step(caches, [token, token])
                breaks = False
                assert [cache.tokens_seen for cache in caches] == [10 + number, 13 + number]
            if retry == "usual" and number % 3 == 0:
                found = torch.stack([usual(model, cache, [token]) for cache in caches])
            else:
                found = side.step(caches, [token, token])
            for logits, (_, alone) in zip(found, pairs, strict=True):
                check_close(logits, usual(model, alone, [token]))
    finally:
        handle.remove()


def test_a_stream_that_is_not_whole_stops_the_step_and_no_other_stream(model: PreTrainedModel) -> None:
    """Reference: the other stream alone, after the step that was refused."""
    side = Slots(model, 2, CAPACITY)
    well, broken = (begun(model, draw(CAPACITY, seed)) for seed in range(2))
    alone = well.fork()
    side.take(well)
    side.take(broken)
    broken._is_fragile = True  # as an interrupt in the middle of an eviction leaves it
    with pytest.raises(CacheError, match="interrupted while it was being rewritten"):
        side.step([well, broken], [5, 5])
    side.release(broken)
    for token in draw(20):
        check_close(side.step([well], [token])[0], usual(model, alone, [token]))


def test_what_does_not_fit_is_refused_in_words(model: PreTrainedModel) -> None:
    """Reference: by hand; a refused stream is as it was."""
    with pytest.raises(ConfigError, match="at least one slot and one column, you gave 0 and 5"):
        Slots(model, 0, 5)
    with pytest.raises(ConfigError, match="you gave 1 and 0"):
        Slots(model, 1, 0)
    side, cache = Slots(model, 1, CAPACITY), begun(model, draw(8))
    for stranger, why in [
        (SinkCache(model, *SHAPE), "one row that has read something"),
        (begun(model, draw(5), (3, 13, 5)), f"may cache {CAPACITY + 1} tokens, a slot holds {CAPACITY}"),
    ]:
        with pytest.raises(CacheError, match=why):
            side.take(stranger)
    rows = SinkCache(model, *SHAPE, batch_size=2)
    with torch.no_grad():
        model(torch.tensor([[5], [6]]), past_key_values=rows)
    with pytest.raises(CacheError, match="one row"):
        side.take(rows)
    for act in (lambda: side.step([cache], [5]), lambda: side.release(cache)):
        with pytest.raises(CacheError, match="in no slot"):
            act()
    alone = cache.fork()
    side.take(cache)
    with pytest.raises(CacheError, match="in a slot already"):
        side.take(cache)
    with pytest.raises(CacheError, match="All 1 slots are taken"):
        side.take(begun(model, draw(5)))
    with pytest.raises(CacheError, match="named one twice"):
        side.step([cache, cache], [5, 5])
    check_close(side.step([cache], [5])[0], usual(model, alone, [5]))


def test_slots_hold_keys_of_one_kind(model: PreTrainedModel) -> None:
    """Reference: by hand; the refused stream goes on alone."""
    side = Slots(model, 2, CAPACITY)
    side.take(begun(model, draw(5)))
    small = begun(model, draw(5), kv_dtype="int8")
    with pytest.raises(CacheError, match="kv_dtype='int8', the slots were made for another"):
        side.take(small)
    assert side.free == 1
    assert usual(model, small, [5]).isfinite().all()


def test_a_stream_pinned_beyond_its_slot_is_refused_until_it_fits_again(model: PreTrainedModel) -> None:
    """Reference: a stream alone that does the same. Meanwhile it lives in memory of its own, wherever others go."""
    side, ids = Slots(model, 2, CAPACITY), draw(60)
    neighbour, cache = (begun(model, ids[:8]) for _ in range(2))
    alone = cache.fork()
    side.take(neighbour)
    side.take(cache)
    for stream in (cache, alone):
        stream.pin(6)
    with pytest.raises(CacheError, match=f"may cache {CAPACITY + 3} of {CAPACITY}"):
        side.step([cache], [5])
    side.release(neighbour)
    for token in ids[:30]:
        check_close(usual(model, cache, [token]), usual(model, alone, [token]))
    for stream in (cache, alone):
        stream.reset()
        stream.pin(2)
        usual(model, stream, ids[:4])
    for token in ids[4:40]:
        check_close(side.step([cache], [token])[0], usual(model, alone, [token]))


def test_a_stream_whose_rows_were_reordered_is_found_again(model: PreTrainedModel) -> None:
    """Reference: a stream alone. Reordering, as generate() does with beams, gives a stream memory of its own."""
    side, ids = Slots(model, 1, CAPACITY), draw(30)
    cache = begun(model, ids[:8])
    alone = cache.fork()
    side.take(cache)
    cache.reorder_cache(torch.tensor([0]))
    usual(model, cache, ids[8:10])
    usual(model, alone, ids[8:10])
    for token in ids[10:]:
        check_close(side.step([cache], [token])[0], usual(model, alone, [token]))


# ---- memory


def test_slots_are_allocated_once_and_as_large_as_they_say(model: PreTrainedModel) -> None:
    """Reference: by hand: keys and values of two layers with two heads of 16 numbers, and two columns more."""
    side = Slots(model, 3, CAPACITY)
    assert side.bytes == 0
    for seed in range(5):
        cache = begun(model, draw(6, seed))
        side.take(cache)
        for token in draw(20):
            side.step([cache], [token])
        assert side.bytes == 2 * 2 * 3 * 2 * (CAPACITY + 2) * 16 * 8
        side.release(cache)


def test_what_was_released_is_freed_and_so_is_the_model() -> None:
    """Reference: weak references; neither slots nor steps may keep a stream or a model alive."""
    model = copy.deepcopy(make())
    side = Slots(model, 2, CAPACITY)
    cache = begun(model, draw(6))
    side.take(cache)
    side.step([cache], [5])
    side.release(cache)
    released, freed = weakref.ref(cache), weakref.ref(model)
    del cache
    gc.collect()
    assert released() is None
    del side, model
    gc.collect()
    assert freed() is None


# ---- compiled

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")


@pytest.fixture(scope="module")
def built() -> PreTrainedModel:
    return copy.deepcopy(make(dtype=torch.float32))


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder of compiled modules, which the tests below share."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("compiled")
        patch.setenv("STREAMLLM_COMPILED", str(folder))
        yield folder


def refuse(*args: Any) -> None:
    raise AssertionError("compiled a second time")


def together(
    model: PreTrainedModel, ages: list[int], tokens: int, side: Slots, **options: Any
) -> tuple[Tensor, Tensor]:
    """Logits [n, T, V] of streams in slots, and of each alone by the usual forward."""
    caches = [begun(model, draw(age, age), **options) for age in ages]
    forks = [cache.fork() for cache in caches]
    for cache in caches:
        side.take(cache)
    found, want = [], []
    for token in draw(tokens):
        ids = [(token + place) % VOCAB for place in range(len(ages))]
        found.append(side.step(caches, ids))
        want.append(torch.stack([usual(model, fork, [id]) for fork, id in zip(forks, ids, strict=True)]))
    return torch.stack(found, 1), torch.stack(want, 1)


@needs_compiler
@pytest.mark.parametrize(
    ("ages", "kv_dtype", "tolerance"), [([10], "auto", 1e-4), ([4, 25, 11], "auto", 1e-4), ([10], "int8", 0.05)]
)
def test_a_compiled_step_is_compiled_once_and_gives_the_logits_of_the_usual_forward(
    built: PreTrainedModel,
    modules: Path,
    monkeypatch: pytest.MonkeyPatch,
    ages: list[int],
    kv_dtype: str,
    tolerance: float,
) -> None:
    """Reference: each stream alone, by the usual forward. A later process finds the step on disk."""
    before = set(modules.iterdir())
    monkeypatch.setattr(slots, "STRIDE", 8)  # or all widths are one

    def slots_of() -> Slots:
        return Slots(built, 3, CAPACITY, compiles=True, note=pytest.fail)

    found, want = together(built, ages, 60, slots_of(), kv_dtype=kv_dtype)
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
    assert len(set(modules.iterdir()) - before) == 1
    monkeypatch.setattr(compiled, "_compile", refuse)
    again, _ = together(built, ages, 60, slots_of(), kv_dtype=kv_dtype)  # this process has it at hand
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    later, _ = together(built, ages, 60, slots_of(), kv_dtype=kv_dtype)  # another one would load it
    assert torch.equal(again, found)
    assert torch.equal(later, found)


@pytest.mark.parametrize(
    "compiles", [pytest.param(False, id="as it is"), pytest.param(True, id="compiled", marks=needs_compiler)]
)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_steps_read_as_many_columns_as_the_longest_stream_has(
    modules: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool, kv_dtype: str
) -> None:
    """Reference: each stream alone, by the usual forward; the columns by hand, of streams of up to 139 tokens.

    Two that stand between others take part in no step but the last, and are what they were. One of them is full.
    """
    monkeypatch.setattr(slots, "VIEWS", 3)
    model = ALL["llama"].make(torch.float32, trained=256)
    shape, tolerance = (4, 120, 16), 1e-4 if kv_dtype == "auto" else 0.05
    side = Slots(model, 5, 139, compiles=compiles, note=pytest.fail)
    caches = [begun(model, draw(age, age), shape, kv_dtype=kv_dtype) for age in (2, 58, 40, 139, 11)]
    young, idle, old, full, last = caches
    alone = {cache: cache.fork() for cache in caches}
    handed: list[int] = []

    def run(count: int, run: Any = side._run) -> Any:
        def noted(plan: Tensor, tensors: list[list[Tensor]]) -> Tensor:
            handed.append(tensors[0][0].shape[2])
            logits: Tensor = run(count)(plan, tensors)
            return logits

        return noted

    def step(*caches: SinkCache) -> None:
        ids = [5 + number for number in range(len(caches))]
        for row, cache, id in zip(side.step(caches, ids), caches, ids, strict=True):
            torch.testing.assert_close(row, usual(model, alone[cache], [id]), rtol=tolerance, atol=tolerance)
        assert len(side._views) <= 3

    monkeypatch.setattr(side, "_run", run)
    for cache in (young, idle, old):
        side.take(cache)
    length = 40
    for _ in range(130):
        step(young, old)
        length += 1 if length < 139 else 1 - 16
        assert handed[-1] == (64 if length <= 64 else 128 if length <= 128 else 140)
    assert old.tokens_evicted > 0
    side.release(old)
    side.take(full)
    side.take(last)
    for _ in range(3):
        step(young, last)
    assert handed[-1] == 140  # the full one, too, needs a column
    step(young, idle, full, last)


DEPENDS_ON_DATA = ("llama-dynamic", "mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3", "deepseek-v3-half")
"""Families whose code asks its tensors what to do, so that no step of theirs is exported, at one width or at all."""


@pytest.mark.parametrize("family", ALL.values(), ids=str)
def test_steps_of_every_family_are_exported_for_all_widths(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the usual forward; what is exported is run without a compiler, at 8, 16 and 20 columns."""
    widths: set[int] = set()

    def export(module: nn.Module, args: Any, sizes: Any, *, anew: bool) -> Any:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = torch.export.export(module, args, dynamic_shapes=sizes, strict=False).module()

        def noted(plan: Tensor, tensors: list[list[Tensor]]) -> Any:
            widths.add(tensors[0][0].shape[2])
            return run(plan, tensors)

        return noted

    monkeypatch.setattr(slots, "STRIDE", 8)
    monkeypatch.setattr(slots, "compile_module", export)
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    model = make(family.name)
    if why_not(begun(model, draw(4))):
        return
    notes: list[str] = []
    found, want = together(model, [4, 2], 30, Slots(model, 2, CAPACITY, compiles=True, note=notes.append))
    check_close(found, want)
    assert widths == (set() if family.name in DEPENDS_ON_DATA else {8, 16, CAPACITY + 1})
    assert ["GuardOnDataDependent" in note for note in notes] == [True] * (family.name in DEPENDS_ON_DATA)


@needs_compiler
def test_a_compiled_step_follows_the_weights_and_outlives_an_error(
    built: PreTrainedModel, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the usual forward. Weights change in place, then move to other memory; an id is out of range."""
    monkeypatch.setattr(slots, "STRIDE", 8)
    together(built, [10], 1, Slots(built, 3, CAPACITY, compiles=True, note=pytest.fail))
    monkeypatch.setattr(compiled, "_compile", refuse)
    model = copy.deepcopy(built)
    for change in (lambda t: t, lambda t: t.mul_(1.1), lambda t: setattr(t, "data", t.data.clone() * 0.9)):
        with torch.no_grad():
            for tensor in model.parameters():
                change(tensor)
        side = Slots(model, 3, CAPACITY, compiles=True, note=pytest.fail)
        found, want = together(model, [10], 5, side)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    cache = side.caches[0]
    assert cache is not None
    alone = cache.fork()
    with pytest.raises(RuntimeError):
        side.step([cache], [VOCAB + 5])
    for token in draw(20):
        want = usual(model, alone, [token])
        torch.testing.assert_close(side.step([cache], [token])[0], want, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_compiled_module_that_is_damaged_is_compiled_anew(
    built: PreTrainedModel, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the logits of the whole one."""
    monkeypatch.setattr(slots, "STRIDE", 8)
    want, _ = together(built, [10], 5, Slots(built, 3, CAPACITY, compiles=True, note=pytest.fail))
    whole = {path: path.read_bytes() for path in modules.iterdir()}
    for damage in (lambda data: b"", lambda data: data[: len(data) // 2]):
        monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
        for path, data in whole.items():
            path.write_bytes(damage(data))
        mended: list[Path] = []

        def mend(module: nn.Module, args: Any, sizes: Any, path: Path, mended: list[Path] = mended) -> None:
            mended.append(path)
            path.write_bytes(whole[path])

        monkeypatch.setattr(compiled, "_compile", mend)
        found, _ = together(built, [10], 5, Slots(built, 3, CAPACITY, compiles=True, note=pytest.fail))
        assert torch.equal(found, want)
        assert len(mended) == 1
    for path, data in whole.items():
        path.write_bytes(data)


def test_without_a_compiler_there_is_one_note_for_all_sizes_and_the_right_logits(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the usual forward; the next slots do not try again, but say so too."""
    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())

    tried: list[None] = []

    def fail(*args: Any) -> None:
        tried.append(None)
        raise FileNotFoundError("g++ was not found")

    monkeypatch.setattr(compiled, "_compile", fail)
    notes: list[str] = []
    for _ in range(2):
        side = Slots(model, 4, CAPACITY, compiles=True, note=notes.append)
        side.take(begun(model, draw(5)))
        side.prepare()
        found, want = together(model, [4, 25, 11], 30, side)
        check_close(found, want)
    assert notes == 2 * [
        "Decoding is not compiled, which is slower: FileNotFoundError, g++ was not found; is a C++ compiler there?"
    ]
    assert len(tried) == 1
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    with pytest.warns(UserWarning, match="Decoding is not compiled"):
        together(model, [4], 2, Slots(model, 4, CAPACITY, compiles=True))


def test_that_no_compiler_is_there_is_said_in_words_of_ours(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: what torch raises there, whose own words end in the middle of a setting of its."""
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def fail(*args: Any) -> None:
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    monkeypatch.setattr(compiled, "_compile", fail)
    notes: list[str] = []
    together(model, [4], 2, Slots(model, 1, CAPACITY, compiles=True, note=notes.append))
    assert notes == [
        "Decoding is not compiled, which is slower: torch finds no C++ compiler; install g++, or name one by CXX"
    ]


def test_steps_are_compiled_for_powers_of_two_and_for_all_slots(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: by hand; six streams that come and go need four steps, however often they do."""
    counts: list[int] = []

    def record(module: nn.Module, args: tuple[Tensor, Any], sizes: Any, *, anew: bool) -> nn.Module:
        counts.append(len(args[0]))
        return module

    monkeypatch.setattr(slots, "compile_module", record)
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    for _ in range(2):
        side = Slots(model, 6, CAPACITY, compiles=True)
        for seed in range(6):
            side.take(begun(model, draw(4, seed)))
            held = [cache for cache in side.caches if cache]
            assert side.step(held, [5] * len(held)).shape == (len(held), VOCAB)
    assert counts == [1, 2, 4, 6]


@pytest.mark.parametrize("mends", [True, False])
def test_a_compiled_step_that_does_not_compute_what_the_model_does_is_not_used(
    mends: bool, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook was added since it was compiled, say. Reference: the usual forward; it is compiled anew, once."""
    asked: list[bool] = []

    def stale(module: nn.Module, args: Any, sizes: Any, *, anew: bool) -> Any:
        asked.append(anew)
        return module if anew and mends else lambda *args: module(*args) * 1.01

    monkeypatch.setattr(slots, "compile_module", stale)
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    notes: list[str] = []
    found, want = together(model, [10], 5, Slots(model, 1, CAPACITY, compiles=True, note=notes.append))
    check_close(found, want)
    assert asked == [False, True]
    assert (
        [note.partition(": ")[2] for note in notes] == [] if mends else ["it gives other numbers than the model itself"]
    )


@pytest.mark.parametrize("change", ["hook", "scale", "rotation", "mask", "id"])
def test_a_compiled_step_is_held_against_the_model_on_slots_that_attend(
    change: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: what was changed since the step was compiled, each of which one key alone would not show."""
    old, model = model, copy.deepcopy(model)  # other tests have the old one, too
    layers: Any = model.get_decoder().layers

    def stale(module: nn.Module, args: Any, sizes: Any, *, anew: bool) -> Any:
        step = slots.SlotStep(old, Store, is_compiled=True)
        unseen = torch.tensor([change != "id", change != "mask", True, True])
        return lambda plan, stores: step(plan * unseen, stores)

    for layer in layers:
        if change == "hook":
            layer.self_attn.q_proj.register_forward_hook(lambda module, args, found: found * 3)
        elif change == "scale":
            layer.self_attn.scaling *= 1.5
    if change == "rotation":
        model.get_decoder().rotary_emb.inv_freq.mul_(0.5)
    monkeypatch.setattr(slots, "compile_module", stale)
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())
    notes: list[str] = []
    for ages in ([10], [4, 11]):
        found, want = together(model, ages, 5, Slots(model, 2, CAPACITY, compiles=True, note=notes.append))
        check_close(found, want)
    assert len(notes) == 2
    assert all(note.endswith("it gives other numbers than the model itself") for note in notes)


def test_two_threads_compile_once_and_an_interrupt_is_no_answer(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the number of attempts; what was broken off is tried again."""
    tried: list[int] = []

    def slowly(module: nn.Module, args: Any, sizes: Any, *, anew: bool) -> nn.Module:
        tried.append(len(tried))
        if len(tried) == 1:
            raise KeyboardInterrupt
        time.sleep(0.2)
        return module

    monkeypatch.setattr(slots, "compile_module", slowly)
    monkeypatch.setattr(slots, "_steps", weakref.WeakKeyDictionary())

    def run() -> None:
        together(model, [4], 2, Slots(model, 1, CAPACITY, compiles=True, note=notes.append))

    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run()
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tried == [0, 1]
    assert not notes


def test_code_that_others_could_have_written_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the permissions."""
    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match=r"others can write to .*chmod go-w"):
        compiled.compile_module(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that depends on numbers; it is no matter of the compiler."""

    class Fickle(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"^its step cannot be exported \(\w+: .*\)$"):
        compiled.compile_module(Fickle(2, 2), (torch.zeros(1, 2),))
    assert not list(tmp_path.iterdir())


def test_the_folder_of_compiled_modules_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand; the one unused for longest makes room, and a failure leaves nothing behind."""
    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    monkeypatch.setattr(compiled, "KEPT", 3)

    def package(exported: Any, package_path: str, inductor_configs: Any) -> None:
        Path(package_path).write_bytes(b"code")
        if broken:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    broken = False
    foreign = tmp_path / "somebody's model.pt2"
    foreign.write_bytes(b"not ours")
    paths = [tmp_path / f"{number:032x}.pt2" for number in range(6)]
    for age, path in enumerate(paths):
        compiled._compile(nn.Linear(2, 2), (torch.zeros(1, 2),), None, path)
        assert path.read_bytes() == b"code"
        for young, other in enumerate(paths[: age + 1]):
            if other.exists():
                compiled.os.utime(other, (young, 1000 + (young if young != 1 else 100)))  # number 1 was used lately
    assert sorted(tmp_path.iterdir()) == [paths[1], paths[4], paths[5], foreign]
    broken = True
    with pytest.raises(RuntimeError, match="no compiler"):
        compiled._compile(nn.Linear(2, 2), (torch.zeros(1, 2),), None, tmp_path / "7.pt2")
    assert sorted(tmp_path.iterdir()) == [paths[1], paths[4], paths[5], foreign]
