"""The stream loop on stories260K: real text, end tokens, stop strings, breaking off and going on."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import streamllm
from families import FAMILIES
from stories import STORIES
from streamllm.cache import SinkCache
from streamllm.config import SamplingConfig
from streamllm.detokenize import Decoder
from streamllm.errors import ConfigError, InputError, StreamLLMError, StreamLLMWarning
from streamllm.loop import Chunk, end_ids, generate, stream
from streamllm.models import load
from streamllm.sampling import Sampler
from streamllm.state import load_state, save_state

GREEDY = SamplingConfig(temperature=0)
SIZES = {"sinks": 4, "window": 60, "block": 16}
PROMPT = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(STORIES)


@pytest.fixture
def model(pair: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> PreTrainedModel:
    return pair[0]


@pytest.fixture
def tokenizer(pair: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return pair[1]


def by_hand(model: PreTrainedModel, ids: list[int], n: int) -> list[int]:
    """Greedy decoding with nothing but the model and its cache, one token at a time."""
    cache, out = SinkCache(model, **SIZES), []
    with torch.no_grad():
        for token in ids:
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        for _ in range(n):
            out.append(int(logits.argmax()))
            logits = model(torch.tensor([[out[-1]]]), past_key_values=cache).logits[0, -1]
    return out


def ids_of(chunks: Iterator[Chunk]) -> list[int | None]:
    return [chunk.id for chunk in chunks]


def test_the_stream_draws_what_decoding_by_hand_draws(model, tokenizer) -> None:
    """Reference: ``by_hand``, far beyond the window and the trained length."""
    prompt = tokenizer(PROMPT).input_ids
    got = ids_of(stream(model, tokenizer, PROMPT, sampling=GREEDY, max_tokens=700, on_end="pass", **SIZES))
    assert got == by_hand(model, prompt, 700)


def test_ids_and_pieces_of_text_are_read_like_the_whole_text(model, tokenizer) -> None:
    """Reference: the same prompt as one string, longer than the window."""
    text = (PROMPT + " girl named Lily. She loved to play outside. ") * 20
    options = {"sampling": GREEDY, "max_tokens": 40, "on_end": "pass", **SIZES}
    want = list(stream(model, tokenizer, text, **options))
    pieces = (text[i : i + 7] for i in range(0, len(text), 7))
    for prompt in (tokenizer(text).input_ids, pieces):
        got = list(stream(model, tokenizer, prompt, **options))
        assert [(c.id, c.text) for c in got] == [(c.id, c.text) for c in want]


def test_the_text_of_the_chunks_is_the_text_of_the_ids(model, tokenizer) -> None:
    """Reference: decoding prompt and continuation at once."""
    prompt = tokenizer(PROMPT).input_ids
    chunks = list(stream(model, tokenizer, PROMPT, sampling=GREEDY, max_tokens=60, on_end="ban"))
    whole = tokenizer.decode(prompt + [c.id for c in chunks], skip_special_tokens=True)
    assert tokenizer.decode(prompt, skip_special_tokens=True) + "".join(c.text for c in chunks) == whole
    assert generate(model, tokenizer, PROMPT, sampling=GREEDY, max_tokens=60, on_end="ban") == "".join(
        c.text for c in chunks
    )


def test_end_tokens_stop_pass_or_are_banned(model, tokenizer) -> None:
    """Reference: the end tokens of model and tokenizer; the first story of this seed ends after a while."""
    ends = end_ids(model, tokenizer)
    assert ends == {tokenizer.eos_token_id, tokenizer.bos_token_id}
    seeded = SamplingConfig(seed=11)
    stopped = list(stream(model, tokenizer, PROMPT, sampling=seeded, max_tokens=3000))
    assert stopped[-1].finish == "end"
    assert stopped[-1].id in ends
    assert not any(c.id in ends for c in stopped[:-1])
    n = len(stopped)
    passed = list(stream(model, tokenizer, PROMPT, sampling=seeded, max_tokens=n + 50, on_end="pass"))
    assert ids_of(iter(passed[:n])) == ids_of(iter(stopped))
    assert passed[n - 1].document_end
    assert passed[n - 1].finish is None
    assert passed[-1].finish == "length"
    banned = list(stream(model, tokenizer, PROMPT, sampling=seeded, max_tokens=n + 50, on_end="ban"))
    assert not any(c.id in ends or c.document_end for c in banned)


def test_a_stop_string_ends_the_stream_and_is_not_shown(model, tokenizer) -> None:
    """Reference: the text without a stop string, cut where the string begins."""
    whole = generate(model, tokenizer, PROMPT, sampling=GREEDY, max_tokens=100, on_end="ban")
    stop = whole[40:47]
    chunks = list(stream(model, tokenizer, PROMPT, sampling=GREEDY, max_tokens=100, on_end="ban", stop=[stop]))
    assert chunks[-1].finish == "stop"
    assert "".join(c.text for c in chunks) == whole[: whole.index(stop)]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, tokenizer) -> None:
    """Reference: the first run."""
    texts = [
        generate(model, tokenizer, PROMPT, sampling=SamplingConfig(seed=seed), max_tokens=200, on_end="pass")
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stop_after", [1, 30, 150])
def test_a_stream_that_was_broken_off_goes_on_as_if_never_broken(model, tokenizer, stop_after: int, tmp_path) -> None:
    """Reference: the unbroken stream. Broken off by closing the generator, with and without a file in between."""
    options = {"max_tokens": 250, "on_end": "pass"}
    want = list(stream(model, tokenizer, PROMPT, sampling=SamplingConfig(seed=4), **options, **SIZES))
    for through_a_file in (False, True):
        cache, sampler, decoder = SinkCache(model, **SIZES), Sampler(SamplingConfig(seed=4)), Decoder(tokenizer)
        first = stream(model, tokenizer, PROMPT, cache=cache, sampling=sampler, decoder=decoder, **options)
        got = [next(first) for _ in range(stop_after)]
        first.close()
        assert cache.unread == [got[-1].id]
        if through_a_file:
            save_state(tmp_path / "x.stream", cache, sampler=sampler, decoder=decoder)
            saved = load_state(tmp_path / "x.stream", model, tokenizer)
            cache, sampler, decoder = saved.cache, saved.sampler, saved.decoder
        options_left = {**options, "max_tokens": 250 - stop_after}
        got += stream(model, tokenizer, None, cache=cache, sampling=sampler, decoder=decoder, **options_left)
        assert [(c.id, c.text) for c in got] == [(c.id, c.text) for c in want]


class Scripted(Sampler):
    """Draws what a script says, and records it like any other sampler."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(SamplingConfig(repetition_window=3))
        self.left = list(script)

    def __call__(self, logits: torch.Tensor) -> int:
        self.recent.append(self.left.pop(0))
        return self.recent[-1]


@pytest.mark.parametrize("stop_after", range(1, 13))
def test_breaking_off_in_the_middle_of_a_character_changes_nothing(model, tokenizer, stop_after: int, tmp_path) -> None:
    """Reference: the text of the whole script, and its last three ids; four ids make one of its characters."""
    script = tokenizer("hello 🙂🙂 you", add_special_tokens=False).input_ids
    cache, sampler, decoder = SinkCache(model, **SIZES), Scripted(script), Decoder(tokenizer)
    text, prompt = "", [tokenizer.bos_token_id]
    for n in (stop_after, len(script) - stop_after):
        options = {"cache": cache, "sampling": sampler, "decoder": decoder, "on_end": "ban", "max_tokens": None}
        sampler.banned = tuple(end_ids(model, tokenizer))
        chunks = stream(model, tokenizer, prompt, **options)
        text += "".join(next(chunks).text for _ in range(n))
        chunks.close()
        save_state(tmp_path / "e.stream", cache, decoder=decoder)
        saved = load_state(tmp_path / "e.stream", model, tokenizer)
        cache, decoder, prompt = saved.cache, saved.decoder, None
    assert text == "hello 🙂🙂 you"
    assert list(sampler.recent) == script[-3:]


def test_a_second_prompt_is_read_after_the_token_that_was_left_unread(model, tokenizer) -> None:
    """Reference: by hand, with the last token of the first answer in front of the second prompt."""
    cache = SinkCache(model, **SIZES)
    first = ids_of(stream(model, tokenizer, PROMPT, cache=cache, sampling=GREEDY, max_tokens=10, on_end="pass"))
    more = tokenizer(" cat", add_special_tokens=False).input_ids
    second = ids_of(stream(model, tokenizer, more, cache=cache, sampling=GREEDY, max_tokens=10, on_end="pass"))
    assert second == by_hand(model, [*tokenizer(PROMPT).input_ids, *first, *more], 10)


def test_a_prompt_is_read_while_it_arrives_and_never_kept(model, tokenizer) -> None:
    """Reference: the counters while the pieces are still coming; what waits is less than two chunks."""
    cache, given, waiting = SinkCache(model, **SIZES), 0, []

    def pieces() -> Iterator[str]:
        nonlocal given
        for _ in range(60):
            piece = "The cat sat on the mat and looked at the big red ball. " * 20
            given += len(tokenizer(piece, add_special_tokens=False).input_ids)
            waiting.append(given - cache.tokens_seen)
            yield piece

    last = list(stream(model, tokenizer, pieces(), cache=cache, sampling=GREEDY, max_tokens=1))[-1]
    assert last.stats.tokens_seen > 20_000
    assert max(waiting[5:]) < 0.5 * last.stats.tokens_seen
    assert last.stats.tokens_cached <= cache.capacity
    assert last.stats.prefill_tokens_per_s > 0


def test_stats_add_up(model, tokenizer) -> None:
    """Reference: the cache's own counters."""
    cache = SinkCache(model, **SIZES)
    last = list(stream(model, tokenizer, PROMPT, cache=cache, sampling=GREEDY, max_tokens=300, on_end="pass"))[-1]
    stats = last.stats
    assert stats.tokens_generated == 300
    assert stats.tokens_seen == len(tokenizer(PROMPT).input_ids) + 299
    assert stats.tokens_seen == stats.tokens_cached + stats.tokens_evicted
    assert stats.cache_bytes == cache.bytes == cache.bytes_when_full
    assert stats.ttft_s is not None
    assert stats.decode_tokens_per_s > 0


def test_nothing_to_generate_only_reads(model, tokenizer) -> None:
    """Reference: the counters, one chunk without a token, and the stream that did not stop there."""
    cache = SinkCache(model, **SIZES)
    chunks = list(stream(model, tokenizer, PROMPT, cache=cache, max_tokens=0))
    ids = tokenizer(PROMPT).input_ids
    assert [(c.text, c.id, c.finish) for c in chunks] == [("", None, "length")]
    assert (cache.tokens_seen, cache.unread) == (len(ids) - 1, ids[-1:])
    options = {"sampling": GREEDY, "max_tokens": 20, "on_end": "pass"}
    assert ids_of(stream(model, tokenizer, cache=cache, **options)) == ids_of(
        stream(model, tokenizer, PROMPT, **SIZES, **options)
    )


def test_a_model_without_logits_to_keep_streams_too(tokenizer) -> None:
    """Reference: by hand, on the GPT-2 of the families, which re-reads its window."""
    model = FAMILIES["gpt2"].make(trained=200, dtype=torch.float32)
    prompt = [5, 6, 7] * 40
    got = ids_of(stream(model, tokenizer, prompt, sampling=GREEDY, max_tokens=60, on_end="pass", **SIZES))
    assert got == by_hand(model, prompt, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"on_end": "explode"}, "on_end must be one of stop, pass, ban"),
        ({"window": 4096}, "does not lengthen the context: this model was trained on 512 positions, you asked for"),
        ({"stop": [""]}, "stop"),
        ({"sinks": 600}, "does not lengthen"),
    ],
)
def test_wrong_options_are_refused_before_the_first_token(model, tokenizer, options, message: str) -> None:
    """Reference: none; the error comes from the call, not from the first ``next``."""
    with pytest.raises(ConfigError, match=message):
        stream(model, tokenizer, PROMPT, **options)


def test_sizes_and_a_cache_together_are_refused(model, tokenizer) -> None:
    """Reference: none."""
    with pytest.raises(ConfigError, match="cannot be changed"):
        stream(model, tokenizer, PROMPT, cache=SinkCache(model), window=20)
    with pytest.raises(ConfigError, match="one row"):
        stream(model, tokenizer, PROMPT, cache=SinkCache(model, batch_size=2))


def test_ids_may_come_as_tensor_or_array(model, tokenizer) -> None:
    """Reference: the list of ids."""
    ids = tokenizer(PROMPT).input_ids
    want = ids_of(stream(model, tokenizer, ids, sampling=GREEDY, max_tokens=5))
    for prompt in (torch.tensor(ids), torch.tensor([ids]), np.array(ids), tuple(np.array(ids))):
        assert ids_of(stream(model, tokenizer, prompt, sampling=GREEDY, max_tokens=5)) == want


@pytest.mark.parametrize("prompt", [b"Once", [[1, 403], [2]], [1.5], iter([3])])
def test_a_prompt_of_another_kind_is_one_sentence(model, tokenizer, prompt) -> None:
    """Reference: none."""
    with pytest.raises(InputError, match="prompt"):
        next(stream(model, tokenizer, prompt))


def test_banning_with_a_sampler_that_does_not_ban_is_refused(model, tokenizer) -> None:
    """Reference: none; it would draw what the caller said it never draws."""
    with pytest.raises(ConfigError, match="banned="):
        stream(model, tokenizer, PROMPT, sampling=Sampler(SamplingConfig()), on_end="ban")


def test_an_empty_prompt_or_a_strange_id_is_one_sentence(model, tokenizer) -> None:
    """Reference: none."""
    with pytest.raises(InputError, match="prompt is empty"):
        next(stream(model, tokenizer, None))
    with pytest.raises(InputError, match="9999"):
        next(stream(model, tokenizer, [5, 9999]))


def test_public_calls_work_from_the_package(model, tokenizer) -> None:
    """Reference: the modules themselves."""
    text = streamllm.generate(model, tokenizer, PROMPT, sampling=GREEDY, max_tokens=5)
    assert text == generate(model, tokenizer, PROMPT, sampling=GREEDY, max_tokens=5)
    assert streamllm.StreamLLMError is StreamLLMError


def test_memory_stays_flat_over_many_tokens(model, tokenizer) -> None:
    """Law 7. Reference: the process itself, early; the cache's bytes must not move at all."""
    process = psutil.Process()
    sizes, held = set(), []
    chunks = stream(model, tokenizer, PROMPT, sampling=SamplingConfig(seed=0, repetition_penalty=1.1), on_end="pass")
    for n, chunk in enumerate(chunks, 1):
        if n >= 1000:
            sizes.add(chunk.stats.cache_bytes)
        if n in (1500, 4000):
            gc.collect()
            held.append(process.memory_info().rss)
        if n == 4000:
            chunks.close()
            break
    assert len(sizes) == 1
    assert held[1] - held[0] < 4 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_over_a_hundred_thousand_tokens(model, tokenizer) -> None:
    """Law 7. Reference: the process at token 5,000."""
    process = psutil.Process()
    held = []
    chunks = stream(model, tokenizer, PROMPT, sampling=SamplingConfig(seed=0), on_end="pass", max_tokens=100_000)
    for n, _ in enumerate(chunks, 1):
        if n in (5_000, 100_000):
            gc.collect()
            held.append(process.memory_info().rss)
    assert held[1] - held[0] < 2 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_prompt_of_many_megabytes_is_read_in_flat_memory(model, tokenizer) -> None:
    """Reference: the process after the first tenth."""
    process = psutil.Process()
    held = []
    piece = "The cat sat on the mat and looked at the big red ball. " * 100

    def pieces() -> Iterator[str]:
        for n in range(600):
            if n in (60, 599):
                gc.collect()
                held.append(process.memory_info().rss)
            yield piece

    last = list(stream(model, tokenizer, pieces(), max_tokens=1))[-1]
    assert last.stats.tokens_seen > 1_000_000
    assert held[1] - held[0] < 4 * 2**20


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_stream_draws_what_it_would_draw_anyway(model, tokenizer, tmp_path, monkeypatch) -> None:
    """Reference: ``by_hand``; over many evictions, and on after another stream has ended."""
    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    prompt = tokenizer(PROMPT).input_ids
    options = {"sampling": GREEDY, "on_end": "pass", "compile": True}
    cache = SinkCache(model, **SIZES)
    got = ids_of(stream(model, tokenizer, PROMPT, max_tokens=200, cache=cache, **options))
    got += ids_of(stream(model, tokenizer, None, max_tokens=100, cache=cache, **options))
    assert got == by_hand(model, prompt, 300)
    assert len(list(tmp_path.iterdir())) == 1  # compiled once


def test_what_cannot_be_compiled_is_said_and_goes_on(tokenizer) -> None:
    """Reference: the same stream without; a model that re-reads."""
    model = next(f for f in FAMILIES.values() if SinkCache(f.make(), 3, 12, 5).config.reread).make()
    options = {"sampling": GREEDY, "max_tokens": 20, "on_end": "pass", "sinks": 3, "window": 12, "block": 5}
    want = ids_of(stream(model, tokenizer, [5, 9, 2, 7], **options))
    with pytest.warns(StreamLLMWarning, match="not compiled, which is slower: its tokens are read anew"):
        got = ids_of(stream(model, tokenizer, [5, 9, 2, 7], compile=True, **options))
    assert got == want
