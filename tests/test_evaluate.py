"""Losses along a stream and attention on the first token, against the model itself."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from families import FAMILIES
from streamllm import SinkCache
from streamllm.errors import UnsupportedModelError
from streamllm.evaluate.attention import sink_mass
from streamllm.evaluate.scores import perplexity, read_losses, score_stream
from test_zero_sink import make as make_zero

SIZES = {"sinks": 2, "window": 14, "block": 4}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return FAMILIES["llama"].make(trained=64, dtype=torch.float64)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(50, (3, 120), generator=torch.Generator().manual_seed(0))


def test_losses_are_those_of_reading_one_token_at_a_time(model, ids) -> None:
    """Reference: a loop over single tokens, each row with a cache of its own; the chunks change nothing."""
    expected = []
    for row in ids:
        cache = SinkCache(model, *SIZES.values())
        with torch.no_grad():
            logits = [model(token[None, None], past_key_values=cache).logits[0, 0] for token in row[:-1]]
        expected.append(cross_entropy(torch.stack(logits).float(), row[1:], reduction="none"))
    for chunk in (1, 7, 64):
        got = read_losses(model, ids, SinkCache(model, **SIZES, batch_size=3), step=chunk)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_hit_is_what_greedy_decoding_would_draw(model, ids) -> None:
    """Reference: ``generate()`` of transformers, one token after each beginning."""
    cache = SinkCache(model, **SIZES)
    hits = torch.cat([scores.hits for scores in score_stream(model, ids[:1], cache)], dim=1)[0]
    for end in range(1, SIZES["window"]):
        drawn = model.generate(ids[:1, :end], max_new_tokens=1, do_sample=False)[0, end]
        assert hits[end - 1] == (drawn == ids[0, end])


def test_a_stream_goes_on_where_it_was_left(model, ids) -> None:
    """Reference: the stream in one go."""
    whole = read_losses(model, ids, SinkCache(model, **SIZES, batch_size=3))
    cache = SinkCache(model, **SIZES, batch_size=3)
    begun = torch.cat([scores.losses for scores in score_stream(model, ids[:, :50], cache)], dim=1)
    rest = torch.cat([scores.losses for scores in score_stream(model, ids, cache, begin=begun.shape[1])], dim=1)
    torch.testing.assert_close(torch.cat([begun, rest], dim=1), whole, rtol=1e-5, atol=1e-5)


def test_ids_may_be_mapped_from_a_file(model, ids) -> None:
    """Reference: the same ids in memory."""
    mapped = ids.numpy().astype(np.uint32)
    expected = read_losses(model, ids, SinkCache(model, **SIZES, batch_size=3))
    assert torch.equal(read_losses(model, mapped, SinkCache(model, **SIZES, batch_size=3)), expected)


@pytest.mark.parametrize("length", [16, 120])
def test_dense_attention_is_read_by_the_same_loop(model, ids, length) -> None:
    """Reference: one dense forward; while nothing has left, a stream's losses are the same."""
    with torch.no_grad():
        logits = model(ids[:, :length]).logits.float()
    expected = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:length], reduction="none")
    got = read_losses(model, ids[:, :length], DynamicCache(config=model.config), step=7)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if length <= SIZES["window"] + SIZES["sinks"]:
        streamed = read_losses(model, ids[:, :length], SinkCache(model, **SIZES, batch_size=3))
        torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_that_grows_ends_where_the_model_does() -> None:
    """Reference: a model with a table of 64 positions, read densely past its end, and streamed on by re-reading."""
    learned = FAMILIES["gpt2"].make(trained=64, dtype=torch.float64)
    text = torch.randint(50, (1, 100), generator=torch.Generator().manual_seed(1))
    dense = list(score_stream(learned, text, DynamicCache(config=learned.config), step=16))
    assert sum(scores.losses.shape[1] for scores in dense) == 64
    streamed = read_losses(learned, text, SinkCache(learned, **SIZES))
    assert streamed.isfinite().all()
    with pytest.raises((RuntimeError, IndexError)):
        list(score_stream(learned, text, DynamicCache(config=learned.config), step=100))


def test_losses_that_are_no_numbers_are_no_figures(ids) -> None:
    """Reference: a model whose weights have become infinite."""
    broken = copy.deepcopy(FAMILIES["llama"].make(trained=64, dtype=torch.float64))
    broken.lm_head.weight.data[:] = math.inf
    with pytest.raises(UnsupportedModelError, match="are no numbers in float64: try --dtype float32"):
        read_losses(broken, ids, SinkCache(broken, **SIZES, batch_size=3))


def test_perplexity_is_that_of_a_fair_choice() -> None:
    """Reference: a loss of log 7 is that of a choice among seven."""
    assert perplexity(torch.full((2, 5), math.log(7))) == pytest.approx(7)


def test_sink_mass_is_what_the_model_says_itself(model, ids) -> None:
    """Reference: the attention weights that eager attention gives out."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(ids, output_attentions=True).attentions)  # [L, B, H, T, T]
    model.set_attn_implementation("sdpa")
    first, nothing = sink_mass(model, ids, skip=10)
    torch.testing.assert_close(first.double(), weights[:, :, :, 10:, 0].mean((1, 3)), rtol=1e-5, atol=1e-6)
    assert not nothing.any()
    assert model.config._attn_implementation == "sdpa"


def test_with_a_zero_sink_what_falls_on_nothing_is_what_is_left(ids) -> None:
    """Reference: the logits while it is watched, which are those without; the literal softmax of the first layer."""
    model, seen = make_zero(), []
    handle = model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        expected = model(ids).logits
        first, nothing = sink_mass(model, ids, skip=3)
        torch.testing.assert_close(torch.cat(seen[1:]), expected, rtol=1e-5, atol=1e-5)
        handle.remove()
        block = model.model.layers[0]
        x = block.input_layernorm(model.model.embed_tokens(ids))
        cos, sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        query, key = (
            proj(x).unflatten(2, (-1, 8)).transpose(1, 2) for proj in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
        raised = scores.exp().tril()
        weights = raised / (1 + raised.sum(-1, keepdim=True))
    torch.testing.assert_close(first[0].double(), weights[:, :, 3:, 0].mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nothing[0].double(), 1 - weights[:, :, 3:].sum(-1).mean((0, 2)), rtol=1e-5, atol=1e-6)


def test_a_reader_of_losses_is_not_in_inference_mode(model, ids) -> None:
    """Reference: the mode before."""
    scores = score_stream(model, ids, SinkCache(model, **SIZES, batch_size=3))
    next(scores)
    assert not torch.is_inference_mode_enabled()
    scores.close()
