"""The reference checked against itself and by hand, before anything else is checked against it."""

import pytest
import torch
from transformers import DynamicCache

import reference
from families import ALL_SLIDING_WINDOW, FAMILIES, HYBRID_WINDOW, REFUSED_OR_EXTRA, VOCAB, Family
from reference import dense_logits, dense_one_layer_logits, kept, layerwise_logits, literal_logits, reread_logits

S, W, B = 3, 6, 2
T = 30
TOLERANCE = 2e-5
"""transformers computes angles and norms in float32 even for float64 models, so rounding differs by about 1e-6."""

EVERY = FAMILIES | REFUSED_OR_EXTRA
STREAMS = FAMILIES | {name: REFUSED_OR_EXTRA[name] for name in ("falcon-alibi", "gptj", "codegen", "lfm2")}
RELATIVE = {name: family for name, family in STREAMS.items() if family.positions != "absolute"}
ROTARY = {name: family for name, family in FAMILIES.items() if family.positions == "rotary"}


def each(families: dict[str, Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families.values(), ids=str)


def make_ids(count: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def check_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0, [0]),
        (4, [0, 1, 2, 3, 4]),
        (5, [0, 1, 3, 4, 5]),
        (6, [0, 1, 4, 5, 6]),
        (20, [0, 1, 18, 19, 20]),
    ],
)
def test_blocks_of_one_evict_one_token_for_each_new_one(t, expected):
    assert kept(t, 2, 3, 1) == expected


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (7, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, [0, 1, 5, 6, 7, 8]),
        (9, [0, 1, 5, 6, 7, 8, 9]),
        (10, [0, 1, 5, 6, 7, 8, 9, 10]),
        (11, [0, 1, 8, 9, 10, 11]),
        (14, [0, 1, 11, 12, 13, 14]),
    ],
)
def test_blocks_of_three_leave_together_when_the_cache_is_full(t, expected):
    assert kept(t, 2, 4, 3) == expected


def test_a_stream_may_have_no_sinks_and_see_only_itself():
    assert [kept(t, 0, 2, 2) for t in range(6)] == [[0], [0, 1], [0, 1, 2], [2, 3], [2, 3, 4], [4, 5]]
    assert kept(9, 0, 1, 1) == [9]


@pytest.mark.parametrize(("sinks", "window", "block"), [(4, 8, 1), (4, 5, 3), (0, 3, 4), (2, 1, 5)])
def test_every_token_sees_the_sinks_and_its_window(sinks, window, block):
    for t in range(60):
        held = kept(t, sinks, window, block)
        assert held == sorted(set(held))
        assert held[:sinks] == list(range(min(sinks, t + 1)))
        assert held[-window:] == list(range(max(0, t + 1 - window), t + 1))[-len(held) :]
        assert len(held) <= sinks + window + block - 1


@each(EVERY)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_family_runs_with_and_without_a_cache(family, dtype, attn):
    model = family.make(dtype=dtype, attn=attn)
    ids = make_ids(12)[None]
    if model.config.is_encoder_decoder:
        assert model(input_ids=ids, decoder_input_ids=ids).logits.dtype == dtype
        return
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([7, 1, 1, 1, 1, 1], 1)]
    assert dense.dtype == dtype
    assert 0.5 < dense.std() < 4
    check_close(torch.cat(parts, dim=1), dense, TOLERANCE if dtype == torch.float64 else 1e-4)


@each(EVERY)
def test_a_family_has_the_same_weights_in_both_dtypes(family):
    wide, narrow = family.make(dtype=torch.float64), family.make(dtype=torch.float32)
    pairs = zip(wide.parameters(), narrow.parameters(), strict=True)
    assert all(torch.equal(one, other.double()) for one, other in pairs)
    assert family.make(dtype=torch.float64) is wide


@each(STREAMS | {"gemma3n": REFUSED_OR_EXTRA["gemma3n"]})
def test_before_the_first_eviction_the_stream_is_the_plain_model(family):
    model, ids = family.make(), make_ids()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [
            model(part, past_key_values=cache, use_cache=True).logits[0] for part in ids[None].split([20, 5, 5], 1)
        ]
    check_close(literal_logits(model, ids, S, T - S, 1), torch.cat(parts))
    check_close(reread_logits(model, ids, S, T - S, 1), torch.cat(parts))


@each(RELATIVE)
@pytest.mark.parametrize(("sinks", "window", "block"), [(3, 6, 2), (4, 5, 1)])
def test_one_layer_streams_as_it_reads_the_kept_tokens(family, sinks, window, block):
    model, ids = family.make(layers=1), make_ids()
    dense = [dense_one_layer_logits(model, ids, t, sinks, window, block) for t in range(T)]
    check_close(literal_logits(model, ids, sinks, window, block), torch.stack(dense))


@each(STREAMS)
@pytest.mark.parametrize("block", [1, 3])
def test_rotating_raw_keys_equals_running_each_layer_densely(family, block):
    model, ids = family.make(), make_ids()
    check_close(literal_logits(model, ids, S, W, block), layerwise_logits(model, ids, S, W, block))


@each({name: FAMILIES[name] for name in ("llama", "smollm3", "gemma3", "cohere2", "deepseek-v2", "bloom")})
def test_four_layers_stream_like_two(family):
    model, ids = family.make(layers=4), make_ids(24)
    check_close(literal_logits(model, ids, S, W, B), layerwise_logits(model, ids, S, W, B))


@each({name: FAMILIES[name] for name in ("llama", "llama-yarn", "glm", "gemma3", "gpt-oss", "deepseek-v3", "mpt")})
def test_float32_models_stream_the_same_within_float32(family):
    model, ids = family.make(dtype=torch.float32), make_ids()
    assert literal_logits(model, ids, S, W, B).dtype == torch.float32
    check_close(literal_logits(model, ids, S, W, B), literal_logits(family.make(), ids, S, W, B).float(), 1e-4)


@each(STREAMS)
def test_reading_again_equals_reading_the_kept_tokens_at_any_depth(family):
    model, ids = family.make(), make_ids()
    dense = [dense_logits(model, ids, t, S, W, 3) for t in range(T)]
    check_close(reread_logits(model, ids, S, W, 3), torch.stack(dense))


@pytest.mark.parametrize(("name", "trained"), [("llama-dynamic", 8), ("llama-longrope", 32)])
def test_frequencies_that_change_inside_the_cache_hold_for_all_keys(name, trained):
    model, ids = FAMILIES[name].make(trained=trained), make_ids()
    streamed = literal_logits(model, ids, S, W, 3)
    check_close(streamed, layerwise_logits(model, ids, S, W, 3))
    assert (streamed - literal_logits(FAMILIES[name].make(), ids, S, W, 3)).abs().max() > 0.1


@each(STREAMS)
def test_evictions_and_sinks_show_in_the_logits(family):
    model, ids = family.make(), make_ids()
    streamed = literal_logits(model, ids, S, W, B)
    whole = literal_logits(model, ids, S, T - S, 1)
    without_sinks = literal_logits(model, ids, 0, S + W, B)
    first = S + W + B - 1
    check_close(streamed[:first], whole[:first])
    assert (streamed - whole)[first:].abs().max() > 0.1
    assert (streamed - without_sinks)[first:].abs().max() > 0.1


@each(ROTARY)
def test_keys_left_where_they_were_fed_show_in_the_logits(family, monkeypatch):
    model, ids = family.make(), make_ids()
    streamed = literal_logits(model, ids, S, W, B)
    monkeypatch.setattr(reference, "_frequencies", lambda *_: None)
    assert (literal_logits(model, ids, S, W, B) - streamed).abs().max() > 0.01


def test_own_windows_are_shorter_than_the_stream_and_all_sliding_ones_bound_it():
    assert HYBRID_WINDOW < W + S + B - 1 < ALL_SLIDING_WINDOW < T + S
    with pytest.raises(ValueError, match="does not fit"):
        literal_logits(FAMILIES["mistral-sliding"].make(), make_ids(), 4, ALL_SLIDING_WINDOW, 1)
