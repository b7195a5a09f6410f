"""Log probabilities against plain formulas, ``generate()`` and dense forwards; alone and in an engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stories import STORIES
from streamllm.cache import SinkCache
from streamllm.config import MOST_LOGPROBS, CacheConfig, SamplingConfig
from streamllm.engine import Engine
from streamllm.errors import ConfigError
from streamllm.logprobs import Logprobs, measure
from streamllm.loop import Chunk, end_ids, stream
from streamllm.models import load

PROMPT = "Once upon a time, there was a little"
CONFIG = CacheConfig(sinks=4, window=60, block=16)
ODD = SamplingConfig(
    seed=5,
    presence_penalty=0.8,
    frequency_penalty=0.6,
    logit_bias=((31, 4.0), (286, -math.inf)),
    repetition_penalty=1.2,
)
"""All that moves a logit before the draw."""


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(STORIES)


def assert_those(found: list[Logprobs | None], ids: list[int], rows: torch.Tensor, count: int) -> None:
    """``found`` is what the logits [T, V] say of ``ids``, by the definition of softmax in float64."""
    assert len(found) == len(ids) == len(rows)
    exact = rows.double()
    wanted = exact - exact.exp().sum(-1, keepdim=True).log()
    for logprobs, token, row in zip(found, ids, wanted, strict=True):
        assert logprobs is not None
        assert logprobs.drawn == pytest.approx(row[token].item(), abs=1e-4)
        order = sorted(range(len(row)), key=lambda x: -row[x].item())[:count]
        assert [token for token, _ in logprobs.top] == order
        assert [number for _, number in logprobs.top] == pytest.approx([row[x].item() for x in order], abs=1e-4)


def by_token(chunks: list[Chunk]) -> list[Any]:
    return [(chunk.id, chunk.text, chunk.logprobs is None, chunk.finish) for chunk in chunks]


@pytest.mark.parametrize("count", [0, 1, 5, MOST_LOGPROBS])
def test_they_are_the_models_own(loaded: Any, count: int) -> None:
    """Reference: a dense forward over prompt and reply, whatever penalties, bias and temperature made of it."""
    model, tokenizer = loaded
    prompt = tokenizer(PROMPT).input_ids
    chunks = list(stream(*loaded, prompt, sampling=ODD, max_tokens=60, on_end="ban", logprobs=count))
    ids = [chunk.id for chunk in chunks if chunk.id is not None]
    with torch.no_grad():
        rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert_those([chunk.logprobs for chunk in chunks], ids, rows, count)
    assert not set(ids) & (end_ids(*loaded) | {286})


def test_sampled_ones_are_those_of_generate(loaded: Any) -> None:
    """Reference: ``model.generate(do_sample=True)`` with the same seed, and its logits."""
    model, tokenizer = loaded
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    torch.manual_seed(9)
    out = model.generate(
        prompt,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=50,
        min_new_tokens=50,
        eos_token_id=None,
        pad_token_id=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    plain = SamplingConfig(seed=9, temperature=1.0, top_p=1.0)
    chunks = list(stream(*loaded, prompt, sampling=plain, max_tokens=50, on_end="pass", logprobs=3))
    ids = out.sequences[0, prompt.shape[1] :].tolist()
    assert [chunk.id for chunk in chunks] == ids
    assert_those([chunk.logprobs for chunk in chunks], ids, torch.cat(out.logits), 3)


def test_they_change_no_token_and_none_are_there_unasked(loaded: Any) -> None:
    """Reference: the stream without them; the end token has one too, and a prompt that is only read has none."""
    options: dict[str, Any] = {"sampling": SamplingConfig(seed=1), "max_tokens": 400}
    without = list(stream(*loaded, PROMPT, **options))
    asked = list(stream(*loaded, PROMPT, logprobs=2, **options))
    assert [(c.id, c.text, c.finish) for c in asked] == [(c.id, c.text, c.finish) for c in without]
    assert asked[-1].finish == "end"
    assert all(chunk.logprobs is None for chunk in without)
    assert all(chunk.logprobs is not None for chunk in asked)
    (nothing,) = stream(*loaded, PROMPT, max_tokens=0, logprobs=2)
    assert nothing.logprobs is None


def test_half_precision_is_measured_in_float32_and_a_small_vocabulary_has_no_more() -> None:
    """Reference: the same logits in float64; the larger ones would not add up in half precision."""
    logits = torch.tensor([9.0, 8.5, -3.0, 0.25], dtype=torch.float16)
    found = measure(logits, 2, MOST_LOGPROBS)
    wanted = torch.log_softmax(logits.double(), -1)
    assert found.drawn == pytest.approx(wanted[2].item(), abs=1e-6)
    assert [token for token, _ in found.top] == [0, 1, 3, 2]
    assert [number for _, number in found.top] == pytest.approx(wanted[[0, 1, 3, 2]].tolist(), abs=1e-6)


@pytest.mark.parametrize("bad", [-1, MOST_LOGPROBS + 1, True, 1.0, "5"])
def test_a_number_of_them_that_cannot_be_is_refused_at_once(loaded: Any, bad: Any) -> None:
    """Reference: the words of the message."""
    with pytest.raises(ConfigError, match=f"logprobs must be a whole number from 0 to 20, you gave {bad!r}; 0 tells"):
        stream(*loaded, PROMPT, logprobs=bad)


def test_streams_of_an_engine_are_what_they_would_be_alone(loaded: Any) -> None:
    """Reference: ``stream()``; penalties, bias and numbers of logprobs differ from stream to stream."""
    samplings = [ODD, SamplingConfig(temperature=0, frequency_penalty=0.4), SamplingConfig(seed=2), ODD.replace(seed=6)]
    counts = [4, 0, None, 20]
    with Engine(*loaded, slots=2, config=CONFIG, quantum=10) as engine:
        requests = [
            engine.submit(PROMPT, max_tokens=90, on_end="pass", sampling=sampling, logprobs=count)
            for sampling, count in zip(samplings, counts, strict=True)
        ]
        for request, sampling, count in zip(requests, samplings, counts, strict=True):
            got = list(request)
            cache = SinkCache(loaded[0], CONFIG.sinks, CONFIG.window, CONFIG.block)
            want = list(
                stream(*loaded, PROMPT, cache=cache, max_tokens=90, on_end="pass", sampling=sampling, logprobs=count)
            )
            assert by_token(got) == by_token(want)
            for one, other in zip(got, want, strict=True):
                if one.logprobs is None or other.logprobs is None:
                    assert count is None
                    continue
                assert one.logprobs.drawn == pytest.approx(other.logprobs.drawn, abs=1e-3)
                assert len(one.logprobs.top) == count
                numbers = [[number for _, number in chunk.top] for chunk in (one.logprobs, other.logprobs)]
                assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)


def test_a_stream_whose_logprobs_fail_ends_alone(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the other streams with the machine to themselves; its own cache has the token that was drawn."""

    def fails(logits: torch.Tensor, token: int, count: int) -> Logprobs:
        if count == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(logits, token, count)

    options: dict[str, Any] = {"max_tokens": 30, "on_end": "pass", "sampling": ODD}
    want = by_token(list(stream(*loaded, PROMPT, logprobs=3, **options)))
    monkeypatch.setattr("streamllm.loop.measure", fails)
    with Engine(*loaded, slots=3, config=CONFIG) as engine:
        bad = engine.submit(PROMPT, logprobs=7, **options)
        others = [engine.submit(PROMPT, logprobs=3, **options) for _ in range(2)]
        with pytest.raises(torch.OutOfMemoryError):
            list(bad)
        assert bad.cache.unread == [want[0][0]]
        assert [by_token(list(request)) for request in others] == [want, want]
        assert engine.stats().failed == 1
