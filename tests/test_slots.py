"""Steps of fixed shapes give what the usual forward gives, over evictions and restarts, compiled or not."""

from __future__ import annotations

import shutil

import pytest
import torch
from streamllm.decode import DecodeStep, why_not
from torch import Tensor

from families import FAMILIES, TRAINED, VOCAB, Family
from streamllm import SinkCache
from streamllm.errors import CacheError, UnsupportedModelError

SHAPE = (3, 12, 5)
"""Sinks, window, block: 120 tokens see twenty evictions."""

SHORT = 64
"""A trained length at which positions restart several times within 120 tokens; some families need a longer one."""


def draw(count: int, rows: int = 1) -> Tensor:
    return torch.randint(VOCAB, (rows, count), generator=torch.Generator().manual_seed(5))


def both(family: Family, ids: Tensor, *, trained: int = SHORT, compiles: bool = False) -> tuple[Tensor, Tensor]:
    """The logits [B, T, V] of the usual forwards and of steps, after a prompt of ten tokens."""
    model = family.make(dtype=torch.float32, trained=trained)
    found = []
    for is_static in (False, True):
        cache = SinkCache(model, *SHAPE, batch_size=len(ids))
        with torch.no_grad():
            model(ids[:, :10], past_key_values=cache)
            step = DecodeStep(model, cache, compiles=compiles) if is_static else None
            tokens = ids[:, 10:].split(1, 1)
            logits = [step(t) if step else model(t, past_key_values=cache).logits[:, -1] for t in tokens]
        assert cache.tokens_seen == ids.numel()
        assert cache.tokens_evicted > 0
        found.append(torch.stack(logits, dim=1))
    return found[0], found[1]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_steps_give_the_logits_of_the_usual_forward_or_say_why_not(family: Family) -> None:
    """Reference: single tokens through the same cache, by the model itself."""
    model = family.make(dtype=torch.float32)
    cache = SinkCache(model, *SHAPE)
    if why_not(cache):
        with pytest.raises(UnsupportedModelError, match="cannot decode so: "):
            DecodeStep(model, cache)
        return
    usual, steps = both(family, draw(130), trained=TRAINED)
    torch.testing.assert_close(steps, usual, rtol=1e-4, atol=1e-4)


def test_most_families_can_decode_by_steps() -> None:
    """Reference: by hand; what cannot has layers of other kinds, ALiBi, or learned positions."""
    able = {name for name, family in FAMILIES.items() if not why_not(SinkCache(family.make(), *SHAPE))}
    assert {"llama", "qwen3", "gpt-neox"} <= {name.split(" ")[0] for name in able}
    assert len(able) > len(FAMILIES) / 2


def test_rows_of_different_age_are_read_side_by_side() -> None:
    """Reference: each row alone, by the usual forward."""
    model = next(iter(FAMILIES.values())).make(dtype=torch.float32, trained=SHORT)
    ids = draw(90, rows=3)
    ages = (4, 20, 11)
    cache = SinkCache(model, *SHAPE, batch_size=3)
    longest = max(ages)
    prompt = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros_like(prompt)
    for row, age in enumerate(ages):
        prompt[row, longest - age :], mask[row, longest - age :] = ids[row, :age], 1
    with torch.no_grad():
        model(prompt, attention_mask=mask, past_key_values=cache)
        step = DecodeStep(model, cache, compiles=False)
        found = torch.stack([step(torch.stack([ids[r, ages[r] + t] for r in range(3)])[:, None]) for t in range(60)], 1)
        for row, age in enumerate(ages):
            alone = SinkCache(model, *SHAPE)
            model(ids[row : row + 1, :age], past_key_values=alone)
            for t in range(60):
                want = model(ids[row : row + 1, age + t : age + t + 1], past_key_values=alone).logits[0, -1]
                torch.testing.assert_close(found[row, t], want, rtol=1e-4, atol=1e-4)


def test_steps_and_usual_forwards_may_take_turns() -> None:
    """Reference: the usual forward alone; the cache is the same whoever has written into it."""
    family = next(iter(FAMILIES.values()))
    model = family.make(dtype=torch.float32, trained=SHORT)
    ids = draw(120)
    usual, _ = both(family, ids)
    cache = SinkCache(model, *SHAPE)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        step = DecodeStep(model, cache, compiles=False)
        for number, token in enumerate(ids[:, 10:].split(1, 1)):
            by_step = number // 7 % 2 == 0
            logits = step(token) if by_step else model(token, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, usual[:, number], rtol=1e-4, atol=1e-4)


def test_what_a_poisoned_stream_leaves_behind_does_no_harm() -> None:
    """Reference: the usual forward after a reset; zero times NaN would be NaN."""
    model = next(iter(FAMILIES.values())).make(dtype=torch.float32, trained=SHORT)
    cache, ids = SinkCache(model, *SHAPE), draw(10)
    with torch.no_grad():
        model(draw(15), past_key_values=cache)
        for layer in cache.layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        cache.reset()
        model(ids[:, :5], past_key_values=cache)
        step = DecodeStep(model, cache, compiles=False)
        assert all(step(token).isfinite().all() for token in ids[:, 5:].split(1, 1))


def test_a_longer_head_may_be_pinned_between_steps() -> None:
    """Reference: the usual forward through a cache whose head was as long from the first token."""
    model = next(iter(FAMILIES.values())).make(dtype=torch.float32, trained=SHORT)
    cache, usual, ids = SinkCache(model, *SHAPE), SinkCache(model, *SHAPE), draw(60)
    usual.pin(6)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, :8], past_key_values=usual)
        step = DecodeStep(model, cache, compiles=False)
        for number, token in enumerate(ids[:, 8:].split(1, 1)):
            if number == 2:
                cache.pin(6)
            want = model(token, past_key_values=usual).logits[:, -1]
            torch.testing.assert_close(step(token), want, rtol=1e-4, atol=1e-4)


def test_what_a_step_cannot_read_is_refused() -> None:
    """Reference: by hand; the cache can be used afterwards."""
    model = next(iter(FAMILIES.values())).make(dtype=torch.float32, trained=SHORT)
    cache = SinkCache(model, *SHAPE)
    step = DecodeStep(model, cache, compiles=False)
    with pytest.raises(CacheError, match="read the prompt by the model first"):
        step(draw(1))
    with torch.no_grad():
        model(draw(5), past_key_values=cache)
    for ids in (draw(2), draw(1, rows=2)):
        with pytest.raises(CacheError, match=r"reads one id of 1 rows, not \("):
            step(ids)
    assert step(draw(1)).shape == (1, VOCAB)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch, of itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
def test_compiled_steps_are_compiled_once() -> None:
    """Reference: the usual forward; torch counts what it compiles, and evictions and a second stream add nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    family = next(iter(FAMILIES.values()))
    usual, steps = both(family, draw(130), compiles=True)
    torch.testing.assert_close(steps, usual, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    both(family, draw(130), compiles=True)
    assert counters["stats"]["unique_graphs"] == 1
