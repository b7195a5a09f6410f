"""The cache inside plain transformers: ``model(...)``, ``model.generate(...)``, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import os
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from families import FAMILIES, REFUSED_OR_EXTRA, VOCAB
from reference import literal_logits
from streamllm import layer as layer_module
from streamllm.cache import SinkCache
from streamllm.capacity import fit_config
from streamllm.config import CacheConfig
from streamllm.errors import CacheError, ConfigError, UnsupportedModelError
from streamllm.spec import inspect_model

S, W, B = 3, 9, 4
CAPACITY = S + W + B - 1


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama"].make(trained=48)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (1, 120), generator=torch.Generator().manual_seed(5))


def read(model: PreTrainedModel, cache: SinkCache, ids: Tensor, step: int = 1) -> Tensor:
    """Logits [T, V] of ``ids`` [1, T], fed ``step`` at a time."""
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits[0] for part in ids.split(step, dim=1)]
    return torch.cat(parts)


def greedy(model: PreTrainedModel, cache: SinkCache, prompt: Tensor, n: int) -> list[int]:
    """Greedy decoding by hand, one token at a time; the reference for ``generate``."""
    logits = read(model, cache, prompt)[-1]
    out = []
    for _ in range(n):
        out.append(int(logits.argmax()))
        logits = read(model, cache, torch.tensor([[out[-1]]]))[-1]
    return out


# ---- inside generate()


@pytest.mark.parametrize("prompt_length", [1, 10, CAPACITY, CAPACITY + 1, 70])
def test_generate_equals_feeding_one_token_at_a_time(model: PreTrainedModel, ids: Tensor, prompt_length: int) -> None:
    """Reference: greedy decoding by hand. Long prompts run over several evictions in one call."""
    prompt = ids[:, :prompt_length]
    out = model.generate(
        prompt, past_key_values=SinkCache(model, S, W, B), max_new_tokens=60, do_sample=False, eos_token_id=-1
    )
    assert out[0, prompt_length:].tolist() == greedy(model, SinkCache(model, S, W, B), prompt, 60)


@pytest.mark.parametrize("chunk", [1, 4, 7, 16, 50])
def test_generate_with_prefill_chunks_equals_generate_without(model: PreTrainedModel, ids: Tensor, chunk: int) -> None:
    """Reference: the same call without ``prefill_chunk_size``; no chunk length needs to fit the evictions."""
    plain, chunked = (
        model.generate(
            ids[:, :70],
            past_key_values=SinkCache(model, S, W, B),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=-1,
            **options,
        )
        for options in ({}, {"prefill_chunk_size": chunk})
    )
    assert torch.equal(plain, chunked)


def test_generate_over_several_turns_reads_only_what_is_new(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: the same tokens fed one at a time; the counters show that nothing is read twice."""
    cache, text = SinkCache(model, S, W, B), ids[:, :20]
    for turn in range(4):
        text = model.generate(text, past_key_values=cache, max_new_tokens=15, do_sample=False, eos_token_id=-1)
        # generate() does not read the last token that it returns
        assert cache.tokens_seen == text.shape[1] - 1
        text = torch.cat([text, ids[:, 20 + 10 * turn : 30 + 10 * turn]], dim=1)
    by_hand = SinkCache(model, S, W, B)
    turns = greedy(model, by_hand, ids[:, :20], 15)
    assert text[0, 20:35].tolist() == turns


def test_sampling_in_generate_draws_the_same_as_with_a_cache_that_never_evicts(model: PreTrainedModel) -> None:
    """Reference: ``DynamicCache``, as long as the window holds everything."""
    prompt = torch.tensor([[5, 6, 7]])
    texts = []
    for cache in (SinkCache(model, S, 30, B), DynamicCache(config=model.config)):
        torch.manual_seed(0)
        texts.append(
            model.generate(
                prompt,
                past_key_values=cache,
                max_new_tokens=25,
                do_sample=True,
                top_k=0,
                temperature=1.3,
                eos_token_id=-1,
            )
        )
    assert torch.equal(*texts)


def test_left_padded_prompts_in_generate_equal_each_prompt_alone(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: each row alone. A stock padding mask would be wrong from the second token after the first eviction."""
    rows = [ids[0, :30], ids[0, 40:47], ids[0, 60:98]]
    longest = max(len(row) for row in rows)
    padded = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    cache = SinkCache(model, S, W, B, batch_size=3)
    out = model.generate(
        padded, attention_mask=mask, past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=-1
    )
    for row, got in zip(rows, out, strict=True):
        assert got[longest:].tolist() == greedy(model, SinkCache(model, S, W, B), row[None], 40)


@pytest.mark.parametrize("rows", [1, 2])
def test_padding_that_all_rows_share_is_left_out_as_well(model: PreTrainedModel, ids: Tensor, rows: int) -> None:
    """Reference: the same tokens without padding, in turns; the third finds the cache full."""
    want = read(model, SinkCache(model, S, W, B), ids[:, :35])
    cache = SinkCache(model, S, W, B, batch_size=rows)
    got = []
    with torch.no_grad():
        for part in ids[:, :35].split(5, dim=1):
            padded = torch.cat([torch.zeros(1, 25, dtype=torch.long), part], dim=1).repeat(rows, 1)
            mask = torch.tensor([[0] * 25 + [1] * 5] * rows)
            got.append(model(padded, attention_mask=mask, past_key_values=cache).logits[-1, 25:])
    assert torch.allclose(torch.cat(got), want, atol=1e-9)


def test_beam_search_equals_beam_search_with_a_cache_that_never_evicts(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: ``DynamicCache`` with a window that holds everything; and it runs on past evictions."""
    options = {"num_beams": 3, "do_sample": False, "eos_token_id": -1, "early_stopping": False}
    wide = SinkCache(model, S, 40, B, batch_size=3)
    got = model.generate(ids[:, :8], past_key_values=wide, max_new_tokens=20, **options)
    assert torch.equal(got, model.generate(ids[:, :8], max_new_tokens=20, **options))
    narrow = SinkCache(model, S, W, B, batch_size=3)
    out = model.generate(ids[:, :8], past_key_values=narrow, max_new_tokens=40, **options)
    assert out.shape[1] == 48
    assert narrow.tokens_evicted > 0


def test_assisted_decoding_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none; tokens that an eviction took cannot come back, so it must not pretend."""
    with pytest.raises(CacheError, match="eviction cannot be undone"):
        model.generate(
            ids[:, :10], past_key_values=SinkCache(model, S, W, B), max_new_tokens=5, prompt_lookup_num_tokens=3
        )


def test_changing_the_rows_or_offloading_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none; each refusal names what to do instead."""
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :5])
    with pytest.raises(CacheError, match="batch_size x 2"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(CacheError, match="reset"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(CacheError, match="smaller window"):
        cache.offload(0)
    with pytest.raises(CacheError, match="smaller window"):
        cache.layers[0].prefetch()


# ---- positions, masks, kernels


def test_positions_passed_by_the_caller_do_not_matter(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: the cache's own positions; ``generate()`` passes ones that grow without end."""
    mine, theirs = SinkCache(model, S, W, B), SinkCache(model, S, W, B)
    for i in range(60):
        with torch.no_grad():
            a = model(ids[:, i : i + 1], past_key_values=mine).logits
            b = model(ids[:, i : i + 1], past_key_values=theirs, position_ids=torch.tensor([[10_000 + i]])).logits
        assert torch.equal(a, b)


def test_position_ids_tells_the_positions_that_the_model_is_given(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: what the decoder really gets, seen by a hook that runs after the gate's."""
    given: list[Tensor] = []
    cache = SinkCache(model, S, W, B)
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        for i in range(100):
            told = cache.position_ids(1)
            read(model, cache, ids[:, i : i + 1])
            assert torch.equal(told, given[-1])
    finally:
        handle.remove()
    assert max(int(p.max()) for p in given) < 48


def test_eager_attention_gives_the_logits_of_sdpa(ids: Tensor) -> None:
    """Reference: the literal implementation, for both kernels and a chunk across evictions."""
    for kernel in ("eager", "sdpa"):
        model = FAMILIES["llama"].make(trained=48, attn=kernel)
        want = literal_logits(model, ids[0], S, W, B)
        assert torch.allclose(read(model, SinkCache(model, S, W, B), ids, 50), want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flex_attention_gives_the_logits_of_sdpa(ids: Tensor) -> None:
    """Reference: SDPA. Flex attention is compiled for every new length, hence slow."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=48,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    sdpa = LlamaForCausalLM(config).eval()
    flex = LlamaForCausalLM(config).eval()
    flex.load_state_dict(sdpa.state_dict())
    flex.set_attn_implementation("flex_attention")
    tokens = ids[:, :40]
    for step in (1, 40):
        want = read(sdpa, SinkCache(sdpa, S, W, B), tokens, step)
        assert torch.allclose(read(flex, SinkCache(flex, S, W, B), tokens, step), want, atol=1e-4)


def test_embeddings_are_read_like_the_ids_they_stand_for(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: the ids."""
    want = read(model, SinkCache(model, S, W, B), ids[:, :40])
    with torch.no_grad():
        vectors = model.get_input_embeddings()(ids[:, :40])
        got = model(inputs_embeds=vectors, past_key_values=SinkCache(model, S, W, B)).logits[0]
    assert torch.allclose(got, want, atol=1e-9)


def test_a_forward_longer_than_the_room_returns_all_its_logits(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: one token at a time; also as a tuple, and through the decoder with positional arguments."""
    want = read(model, SinkCache(model, S, W, B), ids)
    with torch.no_grad():
        assert torch.allclose(model(ids, past_key_values=SinkCache(model, S, W, B)).logits[0], want, atol=1e-9)
        tuples = model(ids, past_key_values=SinkCache(model, S, W, B), return_dict=False)
        assert torch.allclose(tuples[0][0], want, atol=1e-9)
        hidden = model.get_decoder()(ids, None, None, SinkCache(model, S, W, B), return_dict=False)
        assert torch.allclose(model.lm_head(hidden[0])[0], want, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_attentions_across_an_eviction_are_refused_because_they_would_not_fit_together(
    family: str, ids: Tensor
) -> None:
    """Reference: none; within the room they are given. One of the two reads across evictions in one forward."""
    model = FAMILIES[family].make(trained=48, attn="eager")
    for what in ("attentions", "hidden_states"):
        cache = SinkCache(model, S, W, B)
        options = {f"output_{what}": True}
        with torch.no_grad():
            inside = model(ids[:, :5], past_key_values=cache, **options)
            assert getattr(inside, what)[-1].shape[-2] == 5
            if what == "attentions" or family == "gemma2":
                with pytest.raises(CacheError, match=r"would not fit together; feed at most 10 tokens"):
                    model(ids[:, 5:60], past_key_values=cache, **options)


def test_masks_that_only_the_cache_can_make_are_refused(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none; a four-dimensional mask and right padding are both refused in words."""
    with pytest.raises(CacheError, match="makes the attention mask itself"):
        model(ids[:, :4], past_key_values=SinkCache(model, S, W, B), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(CacheError, match="padding_side"):
        model(ids[:, :4], past_key_values=SinkCache(model, S, W, B), attention_mask=torch.tensor([[1, 1, 0, 0]]))


def test_other_caches_pass_the_gate_untouched(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: the logits of a model that never met a SinkCache."""
    SinkCache(model, S, W, B)
    fresh = LlamaForCausalLM(model.config).double().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
        mine, theirs = (m(ids, past_key_values=DynamicCache(config=m.config)).logits for m in (model, fresh))
        assert torch.equal(mine, theirs)


def test_a_model_that_was_never_prepared_is_told_so(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none; without the gate positions would be wrong, so it must not compute."""
    stranger = LlamaForCausalLM(model.config).double().eval()
    cache = SinkCache(inspect_model(model), S, W, B)
    with pytest.raises(CacheError, match=r"SinkCache\(model\)"), torch.no_grad():
        stranger(ids[:, :3], past_key_values=cache)


def test_a_cache_from_a_spec_works_on_the_model_that_was_prepared(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: a cache made from the model."""
    want = read(model, SinkCache(model, S, W, B), ids)
    assert torch.equal(read(model, SinkCache(inspect_model(model), S, W, B), ids), want)


def test_no_graph_grows_when_the_caller_forgets_no_grad(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: the cache's tensors, which must not remember how they came about."""
    cache = SinkCache(model, S, W, B)
    model(ids[:, :30], past_key_values=cache)
    tensors = [tensor for layer in cache.layers for tensor in layer.tensors().values()]
    assert tensors
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in tensors)


def test_inference_mode_and_no_grad_can_be_mixed_on_one_cache(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: no_grad all the way; tensors made in inference mode could not be written outside it."""
    want = read(model, SinkCache(model, S, W, B), ids[:, :40])
    cache = SinkCache(model, S, W, B)
    with torch.inference_mode():
        first = model(ids[:, :20], past_key_values=cache).logits[0]
    second = read(model, cache, ids[:, 20:40])
    assert torch.allclose(torch.cat([first, second]), want, atol=1e-9)


# ---- counters, pinning, own borders


def test_counters_say_what_was_seen_held_and_let_go(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: counted by hand with S=3, W=9, B=4: full at 15, then 4 leave with every 4 that come."""
    cache = SinkCache(model, S, W, B)
    assert (cache.capacity, cache.room, cache.bytes) == (15, 15, 0)
    read(model, cache, ids[:, :15], 5)
    assert (cache.tokens_seen, cache.tokens_cached, cache.tokens_evicted, cache.room) == (15, 15, 0, 4)
    read(model, cache, ids[:, 15:16])
    assert (cache.tokens_seen, cache.tokens_cached, cache.tokens_evicted, cache.room) == (16, 12, 4, 3)
    assert cache.get_seq_length() == 16
    assert cache.get_max_length() == -1
    assert "evicted=4" in repr(cache)


def test_bytes_reach_the_forecast_at_the_first_eviction_and_stay(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: ``bytes_when_full``, known before the first token."""
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :16])
    sizes = {cache.bytes}
    for i in range(16, 120):
        read(model, cache, ids[:, i : i + 1])
        sizes.add(cache.bytes)
    assert sizes == {cache.bytes_when_full}


def test_a_pinned_head_stays_and_equals_that_many_sinks(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: the literal implementation with as many sinks; pinned before or after the tokens came."""
    want = literal_logits(model, ids[0], 10, W, B)
    before, after = SinkCache(model, S, W, B), SinkCache(model, S, W, B)
    before.pin(10)
    assert before.capacity == 10 + W + B - 1
    assert torch.allclose(read(model, before, ids), want, atol=2e-5)
    first = read(model, after, ids[:, :8])
    after.pin(10)
    assert torch.allclose(torch.cat([first, read(model, after, ids[:, 8:])]), want, atol=2e-5)


def test_pinning_what_has_gone_or_cannot_fit_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none; the message names the number."""
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :40])
    with pytest.raises(CacheError, match="Cannot pin 10 tokens"):
        cache.pin(10)
    with pytest.raises(ConfigError, match="100 pinned tokens"):
        SinkCache(model, S, W, B).pin(100)
    with pytest.raises(ConfigError, match="at least 0"):
        SinkCache(model, S, W, B).pin(-1)


def test_a_border_of_the_callers_choice_equals_a_dense_forward_over_what_is_kept(ids: Tensor) -> None:
    """Reference: one-layer model, dense forward over exactly the kept tokens."""
    model = FAMILIES["llama"].make(trained=48, layers=1)
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :12])
    cache.evict(5)
    got = read(model, cache, ids[:, 12:13])[-1]
    kept = torch.cat([ids[:, :3], ids[:, 8:13]], dim=1)
    with torch.no_grad():
        want = model(kept).logits[0, -1]
    assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(CacheError, match="Cannot evict 6 tokens: 5 are cached"):
        cache.evict(6)


def test_after_a_reset_the_cache_is_as_new(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: the first run."""
    cache = SinkCache(model, S, W, B)
    want = read(model, cache, ids, 50)
    size = cache.bytes
    cache.reset()
    assert (cache.tokens_seen, cache.tokens_cached, cache.bytes) == (0, 0, size)
    assert torch.equal(read(model, cache, ids, 50), want)


def test_unread_ids_are_forgotten_when_something_else_is_read(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none; stale ids would be read a second time."""
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :3])
    cache.unread = [7]
    assert cache.unread == [7]
    assert cache.fork().unread == [7]
    read(model, cache, ids[:, 3:4])
    assert cache.unread == []


# ---- interrupts


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_interrupt_inside_a_forward_loses_nothing(family: str, ids: Tensor) -> None:
    """Reference: the uninterrupted stream. The model is cut off in each of its layers, over and over."""
    model = FAMILIES[family].make(trained=24, layers=3)
    want = read(model, SinkCache(model, S, W, B), ids[:, :60])
    cache, calls = SinkCache(model, S, W, B), itertools.count()

    def cut(module, args):
        if next(calls) % 5 == 4:
            raise KeyboardInterrupt

    handles = [
        module.register_forward_pre_hook(cut)
        for name, module in model.named_modules()
        if name.endswith("input_layernorm")
    ]
    got, cuts = [], 0
    try:
        while len(got) < 60:
            try:
                got.append(read(model, cache, ids[:, len(got) : len(got) + 1]))
            except KeyboardInterrupt:
                cuts += 1
                assert cache.get_seq_length() == len(got)  # or generate() would read tokens twice
    finally:
        for handle in handles:
            handle.remove()
    assert cuts > 20
    assert torch.equal(torch.cat(got), want)


@pytest.mark.parametrize(("family", "seen"), [("llama", 15), ("llama", 23), ("gemma2", 15), ("gpt2", 15), ("lfm2", 14)])
def test_an_interrupt_at_any_line_of_the_cache_is_harmless_or_owned_up_to(family: str, seen: int, ids: Tensor) -> None:
    """Reference: the uninterrupted forward, here one with an eviction, a rebase or a recurrent state.

    ``sys.settrace`` throws at the 1st, 2nd, ... line that runs in the cache's own files, until none is left.
    """
    model = {**FAMILIES, **REFUSED_OR_EXTRA}[family].make(trained=20)
    before = SinkCache(model, S, W, B)
    read(model, before, ids[:, :seen])
    want = read(model, before.fork(), ids[:, seen : seen + 1])
    files = tuple(f"streamllm{os.sep}{name}.py" for name in ("cache", "layer", "ledger", "gate", "mask"))
    outcomes = {"right": 0, "owned up to": 0}
    for stop in itertools.count(1):
        cache, lines = before.fork(), itertools.count(1)
        try:
            with throwing(files, lambda lines=lines, stop=stop: next(lines) == stop):
                read(model, cache, ids[:, seen : seen + 1])
            break
        except KeyboardInterrupt:
            pass
        try:
            cache.fork()  # like every use, refuses a cache that is not whole
            if cache.tokens_seen == seen:
                assert torch.allclose(read(model, cache, ids[:, seen : seen + 1]), want, atol=1e-9), stop
            assert cache.tokens_seen == cache.get_seq_length() == seen + 1
            outcomes["right"] += 1
        except CacheError:
            cache.reset()
            outcomes["owned up to"] += 1
    assert min(outcomes.values()) > 10


@contextlib.contextmanager
def throwing(files: tuple[str, ...], when: Callable[[], bool]) -> Iterator[None]:
    """Throw a KeyboardInterrupt at the line of one of ``files`` for which ``when`` says so."""

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line" and when():
            raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outer)


def test_an_interrupt_while_a_chunk_crosses_evictions_is_owned_up_to(
    model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: none; the layers are at odds then, so the cache must not be used before a reset."""
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :20], 20)
    real = layer_module.SinkLayer._cross

    def interrupted(self, which, new):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_module.SinkLayer, "_cross", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(model, cache, ids[:, 20:60], 40)
    monkeypatch.setattr(layer_module.SinkLayer, "_cross", real)
    with pytest.raises(CacheError, match="not whole"):
        read(model, cache, ids[:, 20:21])
    cache.reset()
    assert torch.equal(read(model, cache, ids, 20), read(model, SinkCache(model, S, W, B), ids, 20))


# ---- the model's life


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_works_with_and_without_a_cache(
    duplicate: Callable, model: PreTrainedModel, ids: Tensor
) -> None:
    """Reference: the model that was copied."""
    want = read(model, SinkCache(model, S, W, B), ids)
    other = duplicate(model)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert torch.equal(read(other, SinkCache(other, S, W, B), ids), want)
    assert len(other.get_decoder()._forward_pre_hooks) == len(model.get_decoder()._forward_pre_hooks)


def test_a_cache_is_refused_by_another_model(ids: Tensor) -> None:
    """Reference: none; the rotations would be another model's. Same weights, other frequencies."""
    first = FAMILIES["llama"].make(trained=48)
    config = copy.deepcopy(first.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 500_000.0}
    second = LlamaForCausalLM(config).double().eval()
    second.load_state_dict(first.state_dict())
    cache = SinkCache(first, S, W, B)
    SinkCache(second, S, W, B)
    with pytest.raises(CacheError, match="made for another model"):
        read(second, cache, ids[:, :3])


def test_a_forward_that_stores_nothing_is_refused(ids: Tensor) -> None:
    """Reference: none; transformers drops the cache when gradient checkpointing is on in training mode."""
    model = copy.deepcopy(FAMILIES["llama"].make(trained=48))
    cache = SinkCache(model, S, W, B)
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(CacheError, match="gradient checkpointing"):
        model(ids[:, :6], past_key_values=cache)


def test_a_model_is_freed_when_nobody_holds_it(ids: Tensor) -> None:
    """Reference: a weak reference; neither the gate nor the probe's memory may keep a model alive."""
    model = copy.deepcopy(FAMILIES["llama"].make(trained=48))
    cache = SinkCache(model, S, W, B)
    read(model, cache, ids[:, :20])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert cache.tokens_seen == 20


def test_generate_goes_on_with_padded_turns_of_different_length(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: each row alone, in two turns."""
    tokenless = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    firsts, seconds = [ids[0, :9], ids[0, 20:24]], [ids[0, 40:42], ids[0, 50:59]]

    def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        longest = max(len(row) for row in rows)
        tokens = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
        return tokens, torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])

    cache = SinkCache(model, S, W, B, batch_size=2)
    tokens, mask = pad(firsts)
    out = model.generate(tokens, attention_mask=mask, past_key_values=cache, **tokenless)
    mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)
    more, more_mask = pad(seconds)
    tokens, mask = torch.cat([out, more], dim=1), torch.cat([mask, more_mask], dim=1)
    got = model.generate(tokens, attention_mask=mask, past_key_values=cache, **tokenless)[:, tokens.shape[1] :]
    for row in range(2):
        alone = SinkCache(model, S, W, B)
        answer = torch.tensor([greedy(model, alone, firsts[row][None], 12)])
        # greedy() reads its last token, generate() leaves it for the second turn
        assert torch.equal(out[row, -12:], answer[0])
        assert got[row].tolist() == greedy(model, alone, seconds[row][None], 12)


def test_a_row_that_does_not_exist_is_refused_before_anything_changes(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none; the cache goes on afterwards."""
    cache = SinkCache(model, S, W, B, batch_size=2)
    read(model, cache, ids[:, :5].repeat(2, 1))
    for row in (-1, 2):
        for act in (cache.reset, lambda row: cache.evict(1, row), lambda row: cache.pin(5, row)):
            with pytest.raises(ConfigError, match="no row"):
                act(row)
    read(model, cache, ids[:, 5:6].repeat(2, 1))


def test_pinning_more_and_less_between_streams(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: a new cache with as many sinks."""
    cache = SinkCache(model, S, W, B)
    cache.pin(10)
    read(model, cache, ids[:, :40])
    with pytest.raises(CacheError, match="before pinning fewer"):
        cache.pin(2)
    cache.reset()
    cache.pin(2)
    cache.pin(5)
    assert torch.equal(read(model, cache, ids), read(model, SinkCache(model, 5, W, B), ids))


def test_half_precision_refuses_to_turn_keys_too_often() -> None:
    """Reference: measured on stories260K: 508 turns in a key's life give garbage, 32 do no harm."""
    model = copy.deepcopy(FAMILIES["llama"].make(trained=256)).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"rotated back 252 times .* use a window of at most") as caught:
        SinkCache(model, 4, 252, 1)
    most = int(str(caught.value).split("window of at most ")[1].split(",")[0])
    SinkCache(model, 4, most, 1)
    with pytest.raises(ConfigError, match="rotated back"):
        SinkCache(model, 4, most + 1, 1)
    SinkCache(FAMILIES["llama"].make(trained=256), 4, 252, 1)


# ---- settings


def test_a_window_beyond_the_trained_length_is_refused_in_words(model: PreTrainedModel) -> None:
    """Reference: the sentence that the issue asks for."""
    with pytest.raises(ConfigError, match="does not lengthen the context: this model was trained on 48 positions, you"):
        SinkCache(model, window=4096)
    with pytest.raises(ConfigError, match="use a window of at most 42, or a smaller block"):
        SinkCache(model, S, 45, B)
    with pytest.raises(ConfigError, match="48 pinned tokens"):
        SinkCache(model, sinks=48, window=1, block=1)
    with pytest.raises(ConfigError, match=r"4 pinned tokens .* and a block of 64"):
        SinkCache(model, sinks=4, block=64)
    with pytest.raises(ConfigError, match="batch_size"):
        SinkCache(model, batch_size=0)


@pytest.mark.parametrize(("trained", "window"), [(512, 252), (2048, 1020), (4096, 1020), (128, 60), (100, 33)])
def test_the_default_window_is_1020_or_half_the_trained_length(trained: int, window: int) -> None:
    """Reference: min(1020, trained / 2 - sinks), less where a block must fit as well; counted by hand."""
    spec = inspect_model(FAMILIES["llama"].make(trained=trained))
    assert fit_config(CacheConfig(), spec).window == window


def test_rereading_on_request_is_the_papers_sliding_window_with_recomputation(ids: Tensor) -> None:
    """Reference: for every token, a dense forward over the window alone, the paper's baseline (no sinks, block 1)."""
    model = FAMILIES["llama"].make(trained=48)
    got = read(model, SinkCache(model, 0, W, 1, reread=True), ids[:, :40])
    with torch.no_grad():
        for t in range(40):
            want = model(ids[:, max(0, t + 1 - W) : t + 1]).logits[0, -1]
            assert torch.allclose(got[t], want, atol=1e-5)


def test_rereading_refuses_what_it_cannot_do(ids: Tensor) -> None:
    """Reference: none; embeddings cannot be read again, and learned positions cannot be moved."""
    model = FAMILIES["gpt2"].make(trained=48)
    cache = SinkCache(model, S, W, B)
    with pytest.raises(CacheError, match="input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids[:, :3]), past_key_values=cache)
    with pytest.raises(CacheError, match="evicts by itself"):
        cache.evict(1)
    with pytest.raises(ConfigError, match="only by re-reading"):
        SinkCache(model, S, W, B, reread=False)


def test_the_wrong_number_of_rows_is_refused_with_the_remedy(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none."""
    with pytest.raises(CacheError, match="batch_size=2"):
        model(ids[:, :3].repeat(2, 1), past_key_values=SinkCache(model, S, W, B))


def test_a_window_smaller_than_the_models_own_serves_rows_of_different_age(ids: Tensor) -> None:
    """Reference: each row alone. The model's own window of 6 then reaches further back than the cache's."""
    model = FAMILIES["gemma2"].make(trained=48)
    cache = SinkCache(model, 1, 2, B, batch_size=2)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:, :26]], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 26, [1] * 30])
    with torch.no_grad():
        got = model(torch.cat([padded, ids[:, :30]]), attention_mask=mask, past_key_values=cache).logits
    assert torch.allclose(got[0, 4:], read(model, SinkCache(model, 1, 2, B), ids[:, :26]), atol=1e-5)
    assert torch.allclose(got[1], read(model, SinkCache(model, 1, 2, B), ids[:, :30]), atol=1e-5)


def test_a_forward_of_nothing_but_padding_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    """Reference: none."""
    with pytest.raises(CacheError, match="at least one token"):
        model(ids[:, :3], attention_mask=torch.zeros(1, 3), past_key_values=SinkCache(model, S, W, B))
    with pytest.raises(CacheError, match="at least one token"):
        model(ids[:, :0], past_key_values=SinkCache(model, S, W, B))


def test_a_thing_that_is_no_model_is_refused() -> None:
    """Reference: none."""
    with pytest.raises(ConfigError, match="PreTrainedModel"):
        SinkCache(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_an_all_sliding_model_bounds_the_cache_by_its_own_window() -> None:
    """Reference: algorithm, section 3: beyond it the model's own mask would hide the sinks."""
    model = FAMILIES["mistral-sliding"].make()
    with pytest.raises(ConfigError, match="sees only 32 tokens back"):
        SinkCache(model, window=100)
    assert SinkCache(model, 4, 20, 8).capacity <= 32


def test_unsupported_models_name_type_and_reason() -> None:
    """Reference: a Llama whose keys are moved in a way no rotation explains."""

    class Odd(LlamaForCausalLM):
        pass

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
    )
    model = Odd(config).eval()
    rotary = model.model.rotary_emb
    rotary.register_forward_hook(lambda module, args, output: (output[0] * 1.7, output[1] ** 3))
    with pytest.raises(UnsupportedModelError, match=r"'llama' cannot stream: the keys of layer \d .*residual"):
        SinkCache(model)
