"""Stores give back what was put in, in eight bits to within half a step; so a stream in eight bits is the stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import streamllm
from families import FAMILIES, VOCAB
from streamllm import SinkCache
from streamllm.errors import ConfigError
from streamllm.state import load_state, save_state
from streamllm.store import STORES, Int8Store, Store

ASSETS = Path(streamllm.__file__).parent / "assets"
S, W, B = SHAPE = (3, 12, 1)
TRAINED = 16
"""Positions restart at every second eviction: a key is turned back six times."""

kinds = pytest.mark.parametrize("kind", [Store, Int8Store])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of very different size from one vector to the next."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand((*shape[:-1], 1), generator=generator).mul(8).sub(4).exp()
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def filled(kind: type[Store], states: Tensor) -> Store:
    store = kind.allocate(states, states.shape[2])
    store.write(states)
    return store


# ---- stores


def eighths(vector: list[float]) -> list[float]:
    """What remains of a vector in eight bits, by plain arithmetic: 127 steps to its largest number."""
    step = max(abs(number) for number in vector) / 127
    return [round(number / step) * step if step else 0.0 for number in vector]


def test_eight_bits_are_those_of_a_plain_formula() -> None:
    """Reference: one vector after the other in Python's numbers; the largest is kept as it is."""
    states = draw(2, 3, 4, 16, dtype=torch.float64)
    want = [[[eighths(vector) for vector in head] for head in row] for row in states.tolist()]
    found = filled(Int8Store, states).read()
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    largest = states.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(found.gather(-1, largest), states.gather(-1, largest), rtol=1e-12, atol=0)


@dtypes
def test_eight_bits_are_off_by_half_a_step_and_the_rounding_of_the_dtype(dtype: torch.dtype) -> None:
    """Reference: what was written, in float64; some vectors come within a half of that bound, so it is no wider."""
    states = draw(2, 4, 50, 64, dtype=dtype)
    error = (filled(Int8Store, states).read().double() - states.double()).abs()
    step = states.double().abs().amax(-1, keepdim=True) / 127
    # the scale is rounded once, and so is what is read
    eps = torch.finfo(dtype).eps
    bound = step / 2 * (1 + 2 * eps) + eps / 2 * (states.double().abs() + step)
    assert bool((error <= bound).all())
    assert bool((error.amax(-1) > 0.45 * step[..., 0]).any())


@kinds
def test_zeros_come_back_as_zeros_and_what_is_no_number_as_none(kind: type[Store]) -> None:
    """Reference: by hand; the vectors beside them are none the worse."""
    states = draw(1, 1, 5, 4)
    states[0, 0, 1] = 0
    states[0, 0, 2, 3] = torch.nan
    states[0, 0, 3, 0] = torch.inf
    found = filled(kind, states).read()[0, 0]
    assert found[1].tolist() == [0, 0, 0, 0]
    assert found[[0, 1, 4]].isfinite().all()
    assert not found[2].isfinite().all()
    assert not found[3].isfinite().all()
    assert torch.equal(kind.allocate(states, 7).read(), torch.zeros(1, 1, 7, 4))


@kinds
@dtypes
def test_what_is_written_put_filled_cut_and_copied_is_read_again(kind: type[Store], dtype: torch.dtype) -> None:
    """Reference: the same on a plain tensor of what a store reads after one writing."""
    states, other = (draw(3, 2, 9, 8, dtype=dtype, seed=seed) for seed in range(2))
    want, new = (filled(kind, tensor).read().clone() for tensor in (states, other))
    store = filled(kind, states)
    assert store.columns == 9
    assert (store.read().dtype, store.read().shape) == (dtype, states.shape)

    store.put(torch.tensor([2, 0]), torch.tensor([5, 8]), other[[2, 0], :, [5, 8]])
    want[2, :, 5], want[0, :, 8] = new[2, :, 5], new[0, :, 8]
    assert torch.equal(store.read(), want)

    store.cut(slice(1, 2), 2, 6).write(other[1:2, :, 2:6])
    want[1, :, 2:6] = new[1, :, 2:6]
    assert torch.equal(store.read(), want)

    copy = store.clone()
    store.cut(slice(None), 0, 4).fill(filled(kind, other).cut(slice(None), 3, 7))
    want[:, :, :4] = new[:, :, 3:7]
    assert torch.equal(store.read(), want)
    assert not torch.equal(copy.read(), want)

    chosen = store.select(torch.tensor([2, 2, 0]))
    assert torch.equal(chosen.read(), want[[2, 2, 0]])
    store.clear()
    assert not store.read().any()
    assert chosen.read().any()


@kinds
@dtypes
def test_a_column_takes_the_bytes_that_it_says(kind: type[Store], dtype: torch.dtype) -> None:
    """Reference: the bytes of the tensors themselves, here of keys with 24 numbers and values with 8 in 3 heads."""
    pair = [kind.allocate(torch.zeros(2, 3, 0, size, dtype=dtype), 10) for size in (24, 8)]
    held = sum(part.nbytes for store in pair for part in store.parts().values())
    assert held == 2 * 10 * kind.bytes_per_column(3 * (24 + 8) * dtype.itemsize, dtype.itemsize, 2 * 3)


@kinds
def test_stores_made_in_inference_mode_can_be_written_outside_of_it(kind: type[Store]) -> None:
    """Reference: what was written; a tensor of inference mode would refuse."""
    with torch.inference_mode():
        store = filled(kind, draw(1, 2, 3, 4))
        copy = store.clone()
    for written in (store, copy):
        written.write(torch.ones(1, 2, 3, 4))
        assert torch.equal(written.read(), torch.ones(1, 2, 3, 4))


# ---- streams in eight bits


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama"].make(trained=TRAINED)


def make_ids(count: int, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def read(model: PreTrainedModel, cache: SinkCache, ids: Tensor, step: int = 1) -> Tensor:
    """Logits [T, V] of ``ids`` [1, T], fed ``step`` at a time."""
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits[0] for part in ids.split(step, dim=1)])


def stored(cache: SinkCache, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values [H, N, D] that a layer holds in use."""
    held = cache.layers[layer]
    keys, values = (store.cut(slice(None), held.ledger.low, held.ledger.end).read()[0].clone() for store in held.stores)
    return keys, values


def test_keys_and_values_stay_near_those_of_a_float_cache_over_evictions_and_restarts(model: PreTrainedModel) -> None:
    """Reference: the float cache of the same stream; half a step for each time that a vector was rounded.

    In the first layer, whose inputs are the same in both. A value is rounded once; a key of the window once more each
    time that it is turned back; a key of the head once when it is stored and once when it is turned, however old it is.
    """
    small, exact = SinkCache(model, *SHAPE, kv_dtype="int8"), SinkCache(model, *SHAPE)
    ids, largest = make_ids(400), []
    for age in range(400):
        for cache in (small, exact):
            read(model, cache, ids[:, age : age + 1])
        (keys, values), (want_keys, want_values) = stored(small), stored(exact)
        assert bool(((values - want_values).abs() <= want_values.abs().amax(-1, keepdim=True) / 127 / 2 + 1e-6).all())
        # the error's length: half a step in each of D numbers, and a step is at most a 127th of the key's length
        rounding = want_keys.norm(dim=-1) / 127 / 2 * keys.shape[-1] ** 0.5
        roundings = (keys - want_keys).norm(dim=-1) / rounding
        assert roundings[:, :S].max() <= 2.1
        assert roundings[:, S:].max() <= 1 + 7.1 if age > S else True
        largest.append(float(roundings[:, :S].max()))
    assert exact.rows[0].seen - exact.tokens_cached > 300
    assert max(largest[200:]) <= 1.5 * max(largest[20:200])


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek-v2", "smollm3", "bloom", "gpt2", "qwen3"])
def test_a_stream_in_eight_bits_gives_nearly_the_same_logits_in_the_bytes_foretold(family: str) -> None:
    """Reference: the float cache of the same stream; ``bytes_when_full``, known before the first token."""
    model = FAMILIES[family].make(trained=24, dtype=torch.float32)
    small, exact = (SinkCache(model, 3, 12, 5, kv_dtype=kv_dtype) for kv_dtype in ("int8", "auto"))
    foretold, ids = small.bytes_when_full, make_ids(90)
    found, want = read(model, small, ids), read(model, exact, ids)
    assert 1e-4 < (found - want).abs().mean() < 0.05 * want.std()
    assert small.bytes == small.bytes_when_full == foretold
    assert small.bytes < 0.5 * exact.bytes


def test_a_head_pinned_later_is_kept_in_eight_bits_too(model: PreTrainedModel) -> None:
    """Reference: a cache with as many sinks from the start; the store grows by what is pinned."""
    model = FAMILIES["llama"].make(trained=48)
    pinned, sinks, ids = (
        SinkCache(model, *SHAPE, kv_dtype="int8"),
        SinkCache(model, 6, W, B, kv_dtype="int8"),
        make_ids(60),
    )
    read(model, pinned, ids[:, :8])
    read(model, sinks, ids[:, :8])
    pinned.pin(6)
    torch.testing.assert_close(read(model, pinned, ids[:, 8:]), read(model, sinks, ids[:, 8:]), rtol=0, atol=1e-9)
    assert pinned.bytes == pinned.bytes_when_full == sinks.bytes


def test_forwards_over_evictions_in_eight_bits_are_near_single_tokens(model: PreTrainedModel) -> None:
    """Reference: one token at a time. Within a forward over evictions new keys are read as they are, so only nearly."""
    ids = make_ids(200)
    exact = read(model, SinkCache(model, *SHAPE), ids)
    single = read(model, SinkCache(model, *SHAPE, kv_dtype="int8"), ids)
    off = (single - exact).abs().mean()
    for step in (7, 50, 200):
        chunked = SinkCache(model, *SHAPE, kv_dtype="int8")
        assert (read(model, chunked, ids, step) - single).abs().mean() < 2 * off
        # what is left behind is as if read one by one: the next tokens see nothing else
        single_on, more = SinkCache(model, *SHAPE, kv_dtype="int8"), make_ids(5, seed=9)
        read(model, single_on, ids)
        assert (read(model, chunked, more) - read(model, single_on, more)).abs().mean() < 2 * off


def test_rows_of_different_age_in_eight_bits_equal_each_alone(model: PreTrainedModel) -> None:
    """Reference: each row alone. Rounding is by vector, so neighbours and padding do not matter, but for a rare tie."""
    ids, ages = make_ids(60), (4, 30, 11)
    cache = SinkCache(model, *SHAPE, batch_size=3, kv_dtype="int8")
    width = max(ages)
    tokens = torch.stack([torch.nn.functional.pad(ids[0, :age], (width - age, 0)) for age in ages])
    mask = torch.stack([(torch.arange(width) >= width - age).long() for age in ages])
    alone = [SinkCache(model, *SHAPE, kv_dtype="int8") for _ in ages]
    with torch.no_grad():
        found = model(tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
    want = torch.stack([read(model, one, ids[:, :age])[-1] for one, age in zip(alone, ages, strict=True)])
    for number in range(25):
        torch.testing.assert_close(found, want, rtol=0, atol=0.05)
        new = [ids[0, age + number] for age in ages]
        with torch.no_grad():
            found = model(torch.stack(new)[:, None], past_key_values=cache).logits[:, -1]
        want = torch.cat([read(model, one, token[None, None]) for one, token in zip(alone, new, strict=True)])


def test_a_stream_in_eight_bits_goes_on_from_a_file_bit_for_bit(model: PreTrainedModel, tmp_path: Path) -> None:
    """Reference: the uninterrupted stream; nothing is rounded a second time on the way."""
    ids = make_ids(80)
    for stop in (5, 16, 44):
        cache = SinkCache(model, *SHAPE, kv_dtype="int8")
        read(model, cache, ids[:, :stop])
        save_state(tmp_path / "small.stream", cache)
        fork, saved = cache.fork(), load_state(tmp_path / "small.stream", model).cache
        assert saved.config.kv_dtype == "int8"
        assert saved.layers[0].tensors()["keys"].dtype == torch.int8
        want = read(model, cache, ids[:, stop:])
        assert torch.equal(read(model, saved, ids[:, stop:]), want)
        assert torch.equal(read(model, fork, ids[:, stop:]), want)


def test_tensors_are_taken_over_by_name_in_any_order(model: PreTrainedModel) -> None:
    """Reference: the stream itself; a scale is no key, even if it comes first."""
    ids, cache = make_ids(40), SinkCache(model, *SHAPE, kv_dtype="int8")
    read(model, cache, ids[:, :20])
    header, tensors = cache.snapshot()
    backwards = {name: tensors[name].clone() for name in sorted(tensors, reverse=True)}
    other = SinkCache.restore(model, header, backwards)
    assert torch.equal(read(model, other, ids[:, 20:]), read(model, cache, ids[:, 20:]))


def test_reordered_rows_in_eight_bits_take_their_scales_along(model: PreTrainedModel) -> None:
    """Reference: each row alone, after the exchange."""
    ids = make_ids(40)
    cache = SinkCache(model, *SHAPE, batch_size=2, kv_dtype="int8")
    swapped = SinkCache(model, *SHAPE, batch_size=2, kv_dtype="int8")
    rows = torch.cat([ids[:, :20], ids[:, 20:]])
    with torch.no_grad():
        model(rows, past_key_values=cache)
        model(rows.flip(0), past_key_values=swapped)
        cache.reorder_cache(torch.tensor([1, 0]))
        tokens = torch.tensor([[5], [6]])
        found, want = (model(tokens, past_key_values=one).logits for one in (cache, swapped))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


def test_too_many_turns_and_unknown_kinds_are_refused_in_words() -> None:
    """Reference: counted by hand: at capacity 15 of 15 positions each eviction turns the 12 keys of the window."""
    tight = FAMILIES["llama"].make(trained=15)
    with pytest.raises(
        ConfigError, match=r"In int8 a key would be rotated back 12 times .* use a window of at most"
    ) as caught:
        SinkCache(tight, *SHAPE, kv_dtype="int8")
    most = int(str(caught.value).split("window of at most ")[1].split(",")[0])
    SinkCache(tight, S, most, B, kv_dtype="int8")
    with pytest.raises(ConfigError, match="rotated back"):
        SinkCache(tight, S, most + 1, B, kv_dtype="int8")
    SinkCache(tight, *SHAPE)
    SinkCache(FAMILIES["gpt2"].make(trained=15), *SHAPE, kv_dtype="int8")  # reads anew instead of turning
    with pytest.raises(ConfigError, match="kv_dtype must be one of auto, int8, you gave 'int4'"):
        SinkCache(tight, *SHAPE, kv_dtype="int4")
    assert set(STORES) == {"auto", "int8"}


def test_the_embedded_model_predicts_as_well_in_eight_bits() -> None:
    """Reference: the loss with float keys and values; with 64 tokens of window most have gone before the end."""
    model, tokenizer = streamllm.load()
    text = (ASSETS / "stories.txt").read_text(encoding="utf-8")[:2000]
    ids = torch.tensor([tokenizer(text).input_ids[:301]])
    losses = []
    for kv_dtype in ("auto", "int8"):
        logits = read(model, SinkCache(model, 4, 64, 16, kv_dtype=kv_dtype), ids[:, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    assert losses[0] < 3
    assert abs(losses[1] - losses[0]) < 0.01
