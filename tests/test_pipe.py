"""Pipes: answers against the same ids fed by hand; and the command, with its pipes, signals and files."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import json
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import chat_templates as shapes
import streamllm
from chat_templates import chat_tokenizer
from stories import STORIES
from streamllm.cache import SinkCache
from streamllm.config import PREFILL_CHUNK, CacheConfig, SamplingConfig
from streamllm.errors import ConfigError, InputError, StateError, StreamLLMError
from streamllm.form import Form
from streamllm.loop import Chunk, end_ids
from streamllm.pipe import Pipe
from streamllm.pipe_job import PipeJob
from test_command import finish, run, spawn
from test_run import Pipe as Stdin

pytestmark = pytest.mark.usefixtures("no_settings")

GREEDY = SamplingConfig(temperature=0)
TEXTS = [
    "The cat sat.",
    "One day, a dog ran to the park.",
    "Lily had a ball",
    "It was red",
    "Tom saw a bird in a tree.",
]


@functools.cache
def stories() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return streamllm.load(STORIES)


@functools.cache
def chatty(template: str = shapes.CHATML) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model with a chat template, one in twenty of whose ids ends a reply."""
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes)
    model = LlamaForCausalLM(config).double().eval()
    model.generation_config.eos_token_id = list(range(300, 900, 20))
    return model, tokenizer


def said(chunks: Iterator[Chunk]) -> tuple[str, list[int], str | None]:
    """Text, ids and finish of an answer."""
    found = list(chunks)
    return (
        "".join(chunk.text for chunk in found),
        [chunk.id for chunk in found if chunk.id is not None],
        found[-1].finish,
    )


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    return ids


# ---- answers


def test_answers_are_those_of_the_plain_model_on_the_whole_conversation() -> None:
    """Reference: a forward of plain transformers over all ids for every token, with the turns spelt here by hand."""
    model, tokenizer = chatty()
    pipe = Pipe(model, tokenizer, system="Be brief.", sampling=GREEDY, max_tokens=12)
    ids = encoded(tokenizer, "<|im_start|>system\nBe brief.<|im_end|>\n")
    opening = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    finishes = set()
    for number, text in enumerate(TEXTS):
        ids += encoded(tokenizer, ("<|im_end|>\n" if number else "") + opening.format(text))
        want: list[int] = []
        while len(want) < 12 and not (want and want[-1] in end_ids(model, tokenizer)):
            with torch.no_grad():
                want.append(int(model(torch.tensor([ids + want])).logits[0, -1].argmax()))
        _, found, finish = said(pipe.answer(text))
        assert found == want
        finishes.add(finish)
        ids += want[:-1] if finish == "end" else want
    assert finishes == {"end", "length"}
    assert pipe.cache.tokens_seen == len(ids) - len(pipe.cache.unread)
    assert pipe.cache.tokens_evicted == 0


def test_answers_of_a_plain_model_are_those_of_its_texts_joined() -> None:
    """Reference: the same ids by hand, one at a time, in a cache whose turns are marked; far beyond the window."""
    model, tokenizer = stories()
    options = {"sinks": 4, "window": 60, "block": 8}
    most = 45
    pipe = Pipe(model, tokenizer, cache=SinkCache(model, **options), sampling=GREEDY, max_tokens=most)
    cache = SinkCache(model, **options)

    def read(ids: list[int]) -> torch.Tensor:
        for token in ids:
            with torch.no_grad():
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        return logits

    unread = [tokenizer.bos_token_id]
    finishes = []
    for text in TEXTS * 2:
        cache.mark(len(unread))
        logits = read(unread + encoded(tokenizer, text + "\n"))
        drawn: list[int] = []
        while len(drawn) < most:
            drawn.append(int(logits.argmax()))
            answer = tokenizer.decode(drawn).lstrip()
            if drawn[-1] in end_ids(model, tokenizer) or "\n" in answer:
                break
            logits = read(drawn[-1:]) if len(drawn) < most else logits
        answer, found, finish = said(pipe.answer(text + "\n"))
        assert found == drawn
        assert answer == tokenizer.decode(drawn, skip_special_tokens=True).lstrip().partition("\n")[0]
        finishes.append(finish)
        unread = drawn[-1:] + (encoded(tokenizer, "\n") if finish == "length" else [])
    assert {"stop", "length"} <= set(finishes)
    assert cache.tokens_evicted > 300


def test_turns_leave_the_window_whole() -> None:
    """Reference: the ids at which turns began, counted here; the oldest token behind the head is always one of them."""
    model, tokenizer = chatty()
    cache = SinkCache(model, window=200, block=16)
    pipe = Pipe(model, tokenizer, system="Be brief.", cache=cache, sampling=SamplingConfig(seed=3), max_tokens=10)
    head = len(encoded(tokenizer, "<|im_start|>system\nBe brief.<|im_end|>\n"))
    closing = len(encoded(tokenizer, "<|im_end|>\n"))
    borders = {head}
    for text in TEXTS * 8:
        if cache.tokens_seen:
            borders.add(cache.tokens_seen + len(cache.unread) + closing)
        said(pipe.answer(text))
        assert cache.rows[0].pinned == head
        assert head + cache.tokens_evicted in borders
    assert cache.tokens_evicted > 200


def test_instructions_never_leave_and_must_fit() -> None:
    """Reference: the keys of the head, the same after many times the window; larger ones are refused."""
    model, tokenizer = chatty()
    cache = SinkCache(model, window=64, block=8)
    pipe = Pipe(model, tokenizer, system="Be brief, and kind.", cache=cache, sampling=GREEDY, max_tokens=4)
    head = len(pipe.template.head)
    assert head > 4
    said(pipe.answer(TEXTS[0]))
    values = [cache.layers[0].used()["values"][..., :head, :].clone()]
    for text in TEXTS * 8:
        said(pipe.answer(text))
    values.append(cache.layers[0].used()["values"][..., :head, :])
    assert cache.tokens_evicted > 400
    assert torch.equal(*values)
    with pytest.raises(ConfigError, match=r"The system prompt has \d+ tokens, the window 64"):
        Pipe(model, tokenizer, system="word " * 100, cache=SinkCache(model, window=64))
    with pytest.raises(ConfigError, match=r"The system prompt has \d+ tokens, which do not fit: .* 4096 positions"):
        Pipe(model, tokenizer, system="word " * 100, cache=SinkCache(model, window=4000))


def test_a_text_longer_than_the_window_streams_through() -> None:
    """Reference: its ids read by hand in one go; the window holds the end of it, and the pipe goes on."""
    model, tokenizer = stories()
    text = "Once upon a time there was a cat. " * 500 + "\n"
    ids = [tokenizer.bos_token_id, *encoded(tokenizer, text)]
    want = streamllm.generate(model, tokenizer, ids, sampling=GREEDY, max_tokens=12)
    pipe = Pipe(model, tokenizer, sampling=GREEDY, max_tokens=12)
    seen: list[int] = []
    chunks = list(pipe.answer(text, progress=seen.append))
    assert len(seen) >= len(ids) / PREFILL_CHUNK - 1
    assert seen == sorted(set(seen))
    assert "".join(chunk.text for chunk in chunks) == want.lstrip()
    assert chunks[-1].stats.tokens_seen >= len(ids)
    assert said(pipe.answer("The cat sat.\n"))[1]


def test_breaking_off_leaves_a_stream_that_goes_on() -> None:
    """Reference: by hand, a reply of three tokens that is closed."""
    model, tokenizer = chatty()
    pipe = Pipe(model, tokenizer, sampling=GREEDY, max_tokens=50)
    with contextlib.closing(pipe.answer(TEXTS[0])) as chunks:
        cut = [chunk.id for chunk in itertools.islice(chunks, 3)]
    ids = [*pipe.template.head, *encoded(tokenizer, f"<|im_start|>user\n{TEXTS[0]}<|im_end|>\n<|im_start|>assistant\n")]
    ids += [*cut, *encoded(tokenizer, f"<|im_end|>\n<|im_start|>user\n{TEXTS[1]}<|im_end|>\n<|im_start|>assistant\n")]
    want = [chunk.id for chunk in streamllm.stream(model, tokenizer, ids, sampling=GREEDY, max_tokens=50)]
    assert said(pipe.answer(TEXTS[1]))[1] == want


@pytest.mark.parametrize("template", [shapes.CHATML, shapes.LAST_TURN, None])
def test_a_text_whose_reading_is_broken_off_was_never_there(template: str | None) -> None:
    """Reference: a pipe that never saw it, in what comes after and in what it would save; the penalty sees no trace."""
    model, tokenizer = stories() if template is None else chatty(template)
    sampling = SamplingConfig(seed=4, repetition_penalty=1.3, repetition_window=2000)
    options: dict[str, Any] = {"system": "Be kind.", "max_tokens": 15, "sampling": sampling}
    one, two = (Pipe(model, tokenizer, cache=SinkCache(model, window=100), **options) for _ in range(2))
    for text in TEXTS[:3]:
        assert said(one.answer(text)) == said(two.answer(text))
    for many in (1, 3):  # where little or much of what was before has left
        steps = itertools.count(1)

        def stop(_seen: int, many: int = many, steps: Iterator[int] = steps) -> None:
            if next(steps) == many:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            said(two.answer("The dog ran to the park. " * 500, progress=stop))
        assert two.state() == one.state()
        assert two.cache.unread == one.cache.unread
    for text in TEXTS[3:]:
        assert list(map(_apart_from_speed, one.answer(text))) == list(map(_apart_from_speed, two.answer(text)))


def _apart_from_speed(chunk: Chunk) -> tuple[Any, ...]:
    stats = chunk.stats
    return chunk.text, chunk.id, chunk.finish, stats.tokens_seen, stats.tokens_cached, stats.tokens_evicted


def test_a_template_that_cannot_be_spelt_in_turns_is_read_anew() -> None:
    """Reference: a fresh stream over the whole conversation, as much of it as fits into the window."""
    model, tokenizer = chatty(shapes.LAST_TURN)
    window = 150
    pipe = Pipe(
        model, tokenizer, system="Be kind.", cache=SinkCache(model, window=window), sampling=GREEDY, max_tokens=8
    )
    assert not pipe.template.is_incremental
    talk: list[dict[str, str]] = []
    dropped, sizes = 0, set()
    for text in TEXTS * 4:
        talk.append({"role": "user", "content": text})
        system = {"role": "system", "content": "Be kind."}
        while (
            len(ids := tokenizer.apply_chat_template([system, *talk], add_generation_prompt=True)["input_ids"]) > window
        ):
            talk, dropped = talk[2:], dropped + 1
        want = list(streamllm.stream(model, tokenizer, ids, sampling=GREEDY, max_tokens=8))
        found = list(pipe.answer(text))
        assert [chunk.id for chunk in found] == [chunk.id for chunk in want]
        stats = found[-1].stats
        assert stats.tokens_seen == stats.tokens_cached + stats.tokens_evicted
        talk.append({"role": "assistant", "content": "".join(chunk.text for chunk in found)})
        sizes.add(len(pipe.state()["said"]))
    assert dropped > 3
    assert stats.tokens_seen > 1000
    assert max(sizes) < 8


@pytest.mark.parametrize("template", [shapes.CHATML, shapes.LAST_TURN, None])
def test_saved_and_restored_a_pipe_goes_on_as_if_never_stopped(template: str | None, tmp_path: Path) -> None:
    """Reference: a pipe that was not saved, with the same seed."""
    model, tokenizer = stories() if template is None else chatty(template)
    options: dict[str, Any] = {"system": "Be kind.", "max_tokens": 45 if template is None else 15}
    one = Pipe(model, tokenizer, cache=SinkCache(model, window=100), sampling=SamplingConfig(seed=4), **options)
    before = [said(one.answer(text)) for text in TEXTS]
    streamllm.save_state(tmp_path / "a.stream", one.cache, sampler=one.sampler, metadata=one.state())
    saved = streamllm.load_state(tmp_path / "a.stream", model)
    two = Pipe(model, tokenizer, cache=saved.cache, sampling=saved.sampler, state=saved.metadata, **options)
    after = [said(one.answer(text)) for text in TEXTS * 2]
    assert [said(two.answer(text)) for text in TEXTS * 2] == after
    assert len({finish for _, _, finish in before + after}) > 1


@pytest.mark.parametrize("state", [{}, {"end_id": "x"}, {"end_id": None, "is_closed": 0, "said": 3, "before": 0}])
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    """Reference: what ``state()`` gives."""
    model, tokenizer = stories()
    with pytest.raises(StateError, match="saved pipe is damaged"):
        Pipe(model, tokenizer, state=state)


def test_a_text_that_cannot_be_encoded_changes_nothing() -> None:
    """Reference: the answers without it."""
    for template in (shapes.CHATML, shapes.LAST_TURN):
        model, tokenizer = chatty(template)
        one, two = (Pipe(model, tokenizer, system="Be kind.", sampling=GREEDY, max_tokens=8) for _ in range(2))
        said(one.answer(TEXTS[0]))
        said(two.answer(TEXTS[0]))
        with pytest.raises(InputError, match=r"surrogate|template refuses"):
            said(one.answer("half \ud800"))
        assert said(one.answer(TEXTS[1])) == said(two.answer(TEXTS[1]))


def test_thousands_of_records_take_no_more_memory_than_the_first_hundreds() -> None:
    """Reference: the same process after 500 records: bytes of the cache, Python objects, and resident memory.

    The texts come again, because tokenizers remember the first 10,000 words that they see.
    """
    model, tokenizer = stories()
    cache = SinkCache(model, window=40, block=16)
    pipe = Pipe(model, tokenizer, cache=cache, sampling=SamplingConfig(seed=1), max_tokens=1)
    process, measured = psutil.Process(), []
    for number in range(2000):
        for chunk in pipe.answer(f"{TEXTS[number % 5]}\n"):
            assert chunk.stats.tokens_cached <= cache.capacity
        if number in (499, 1999):
            gc.collect()
            measured.append((cache.bytes, len(gc.get_objects()), process.memory_info().rss))
    (bytes_then, objects_then, rss_then), (bytes_now, objects_now, rss_now) = measured
    assert cache.tokens_seen > 2000 * 5
    assert bytes_now == bytes_then <= cache.bytes_when_full
    assert objects_now - objects_then < 200
    assert rss_now - rss_then < 4_000_000
    assert len(cache.rows[0].borders) <= cache.capacity


# ---- the command, in this process


def job(**changes: Any) -> PipeJob:
    """A quiet pipe of a few greedy tokens an answer."""
    return PipeJob(
        **{
            "form": Form(),
            "system": None,
            "every": 1,
            "on_error": "stop",
            "model": str(STORIES),
            "device": "cpu",
            "dtype": "auto",
            "quantize": "none",
            "cache": CacheConfig(),
            "compile": False,
            "sampling": GREEDY,
            "explicit": frozenset(),
            "max_tokens": 8,
            "stop": (),
            "template_options": {},
            "save": None,
            "resume": None,
            "stats": False,
            "json": False,
            "quiet": True,
            "verbose": False,
            **changes,
        }
    )


def test_each_line_is_answered_by_one() -> None:
    """Reference: the library's answers, with line breaks and the blanks around them as one space."""
    model, tokenizer = stories()
    pipe = Pipe(model, tokenizer, sampling=SamplingConfig(seed=5), max_tokens=90, stop=["@"])
    want, _, finishes = zip(*[said(pipe.answer(f"Say: {text}")) for text in TEXTS], strict=True)
    options = ("--seed", "5", "-n", "90", "--stop", "@", "--template", "Say: {record}")
    code, out, err = run("pipe", *options, stdin="\n\n".join(TEXTS))
    assert (code, err) == (0, "")
    assert out.splitlines() == [re.sub(r"\s*\n\s*", " ", text).strip() for text in want]
    assert any("\n" in text.strip() for text in want)
    code, out, err = run("pipe", *options, "--json", stdin="\n\n".join(TEXTS))
    found = [json.loads(line) for line in out.splitlines()]
    assert [record["answer"] for record in found] == list(want)
    assert [record["record"] for record in found] == [1, 2, 3, 4, 5]
    assert [record["finish"] for record in found] == list(finishes)
    assert found[-1]["stats"]["tokens_seen"] == pipe.cache.tokens_seen
    assert set(found[-1]["stats"]) == {"tokens_seen", "tokens_cached", "tokens_evicted"}


def test_every_k_records_make_one_turn() -> None:
    """Reference: the same texts joined by hand; what is left at the end is said to a person, and not answered."""
    model, tokenizer = stories()
    pipe = Pipe(model, tokenizer, sampling=GREEDY, max_tokens=8)
    want = [said(pipe.answer(f"{one}\n{two}\n"))[0] for one, two in (TEXTS[:2], TEXTS[2:4])]
    options = ("--temperature", "0", "-n", "8", "--every", "2", "--json", "-v")
    code, out, err = run("pipe", *options, stdin="\n".join(TEXTS))
    found = [json.loads(line) for line in out.splitlines()]
    assert [(record["record"], record["answer"]) for record in found] == [(2, want[0]), (4, want[1])]
    assert code == 0
    assert "not answered at the end: 1 of --every 2 records" in err


def test_a_preset_gives_template_instructions_and_split_and_flags_count_more() -> None:
    """Reference: the same said flag by flag."""
    from streamllm.form import preset

    known = preset("summarise")
    options = ("pipe", "--temperature", "0", "-n", "8", "--json")
    records = "A cat.\nA dog.\n\nA bird.\n"
    assert run(*options, "--preset", "summarise", stdin=records) == run(
        *options, "-s", known.system, "--template", known.text, "--split", "paragraph", stdin=records
    )
    changed = run(
        *options, "--preset", "summarise", "-s", "Hi", "--template", "{record}", "--split", "line", stdin=records
    )
    assert changed == run(*options, "-s", "Hi", "--template", "{record}", stdin=records)
    german = run(*options, "--preset", "translate", "--to", "German", stdin=records)
    assert german == run(
        *options,
        "-s",
        preset("translate", "German").system,
        "--template",
        "Translate to German: {record}\n",
        stdin=records,
    )


BROKEN = b'{"text": "A cat."}\n{"txt": 1}\n\n{"text": "A d\xff"}\n{"text": \n{"text": "A bird."}\n{"text": "\\ud800"}\n'


def test_a_broken_record_stops_the_pipe_or_is_left_out() -> None:
    """Reference: the pipe without the broken records; each is named by its line, once."""
    options = ("pipe", "--temperature", "0", "-n", "8", "--split", "json", "--template", "{text}\n", "--json")
    code, out, err = run(*options, stdin=BROKEN)
    assert (code, len(out.splitlines())) == (1, 1)
    assert err == (
        "streamllm: Line 2 has no field 'text', which the template wants; it has txt. "
        "--on-error skip leaves such records out."
    )
    code, out, err = run(*options, "--on-error", "skip", stdin=BROKEN)
    found = [json.loads(line) for line in out.splitlines()]
    whole = b'{"text": "A cat."}\n{"text": "A bird."}\n'
    want = [json.loads(line) for line in run(*options, stdin=whole)[1].splitlines()]
    assert code == 0
    assert [record["record"] for record in found] == [1, 5]
    assert [{**record, "record": 0} for record in found] == [{**record, "record": 0} for record in want]
    assert [line.split(":")[0][:17] for line in err.splitlines()] == [
        "left out",
        "left out",
        "left out",
        "left out",
    ]
    assert re.findall(r"Line (\d+)", err) == ["2", "4", "5", "7"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--template", "{recrd}"], "has {recrd}, which no record fills"),
        (["--template", "{text}"], "fields need split json"),
        (["--split", "word"], "split must be one of line, paragraph, json, you gave 'word'"),
        (["--preset", "poem"], "no preset 'poem'; choose one of translate, qa, code, summarise"),
        (["--to", "German"], "--to German is for --preset translate"),
        (["--every", "0"], "every must be a whole number of at least 1, you gave 0"),
        (["-n", "0"], "max_tokens must be a whole number of at least 1, you gave 0"),
        (["--on-error", "cry"], "on_error must be one of stop, skip, you gave 'cry'"),
        (["--template-option", "x"], "--template-option takes name=value, you gave 'x'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_looked_for(arguments: list[str], sentence: str) -> None:
    """Reference: a model that does not exist, of which nothing is said."""
    code, out, err = run("pipe", "-m", "no/such/folder", *arguments, stdin="a\n")
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_an_option_that_the_chat_template_does_not_know_is_refused() -> None:
    """Reference: a model without a chat template."""
    code, _, err = run("pipe", "--template-option", "enable_thinking=false", stdin="a\n")
    assert code == 2
    assert "'enable_thinking' is an option for a chat template" in err


def test_no_records_are_no_answers_and_no_error() -> None:
    """Reference: nothing on either side."""
    assert run("pipe", stdin="") == run("pipe", "--json", stdin="\n \n") == (0, "", "")


def test_saving_and_resuming_equals_one_pipe(tmp_path: Path) -> None:
    """Reference: one pipe over all records; one of them waits in the file for the second that makes a turn."""
    path = str(tmp_path / "a.stream")
    options = ("--every", "2", "-n", "20")
    lines = [f"{number} cats ran. {text}\n" for number, text in enumerate(TEXTS * 8)]
    code, whole, _ = run("pipe", *options, "--seed", "5", "-s", "Be kind.", stdin="".join(lines))
    _, first, _ = run("pipe", *options, "--seed", "5", "-s", "Be kind.", "--save", path, stdin="".join(lines[:13]))
    _, second, _ = run("pipe", *options, "--resume", path, stdin="".join(lines[13:]))
    assert (code, len(whole.splitlines())) == (0, 20)
    assert first + second == whole
    code, _, err = run("pipe", "--resume", path, "-s", "Be cruel.", stdin="a\n")
    assert code == 2
    assert "The system prompt contradicts" in err
    assert run("pipe", *options, "--resume", path, "-s", "Be kind.", stdin="".join(lines[13:]))[1] == second


def test_a_stream_of_run_can_be_gone_on_with(tmp_path: Path) -> None:
    """Reference: the text of run, then a line end and the record, as one prompt."""
    path = str(tmp_path / "a.stream")
    options = ("--temperature", "0", "-n", "12")
    _, text, _ = run("run", *options, "--save", path, "Once upon a time")
    _, out, _ = run("pipe", *options, "--resume", path, "--json", stdin="The cat sat.")
    model, tokenizer = stories()
    prompt = [tokenizer.bos_token_id, *encoded(tokenizer, "Once upon a time" + text)]
    prompt += [*encoded(tokenizer, "\n"), *encoded(tokenizer, "The cat sat.\n")]
    want = streamllm.generate(model, tokenizer, prompt, sampling=GREEDY, max_tokens=12)
    assert json.loads(out)["answer"] == want.lstrip().partition("\n")[0]


def test_a_saved_pipe_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Reference: a file whose note about the pipe lacks what it must have."""
    model, _ = stories()
    path = tmp_path / "a.stream"
    streamllm.save_state(path, SinkCache(model), metadata={"pipe": {"waiting": []}})
    with pytest.raises(StateError, match=r"a\.stream is damaged \('system'\)"):
        job(resume=path).run()


@pytest.fixture
def signals() -> Iterator[None]:
    """Ctrl-C is not ignored, as it would be in a background job; an alarm is one, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    alarm = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    yield
    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ctrl_c(signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes soon after the first record is taken."""

    def begin(*given: Any, **options: Any) -> Iterator[Chunk]:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        return answer(*given, **options)

    answer = Pipe.answer
    monkeypatch.setattr(Pipe, "answer", begin)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_answer_and_prints_it_as_far_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the answer that nobody interrupts; the file goes on with the next record."""
    monkeypatch.setattr(sys, "stdin", Stdin(b"Once upon a time\nnot this one\n"))
    monkeypatch.setattr("streamllm.loop.end_ids", lambda *_: frozenset())  # so that it would never end
    path = tmp_path / "a.stream"
    assert job(max_tokens=10**6, stop=("@@",), json=True, save=path).run() == 130
    (line,) = capsys.readouterr().out.splitlines()
    monkeypatch.undo()
    found = json.loads(line)
    assert (found["record"], found["finish"]) == (1, "interrupted")
    model, tokenizer = stories()
    ids = [tokenizer.bos_token_id, *encoded(tokenizer, "Once upon a time\n")]
    count = found["stats"]["tokens_seen"] - len(ids) + 1
    want = streamllm.generate(model, tokenizer, ids, sampling=GREEDY, max_tokens=count, on_end="pass")
    assert count >= 1
    assert want.startswith(found["answer"])
    monkeypatch.setattr(sys, "stdin", Stdin(b"The cat sat.\n"))
    assert job(resume=path).run() == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.usefixtures("signals")
def test_ctrl_c_while_a_record_comes_in_answers_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the half record before the signal, which has no answer."""
    monkeypatch.setattr(sys, "stdin", Stdin(b"A cat.\n", b"A do", int(signal.SIGTERM), b"g.\n", b"A bird.\n"))
    assert job().run() == 143
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.usefixtures("signals")
def test_ctrl_c_while_a_long_record_is_read_leaves_it_waiting(
    every: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: a pipe that nobody interrupts, over the same records; the signal comes in the middle of one."""

    def begin(pipe: Pipe, text: str, *, progress: Any) -> Iterator[Chunk]:
        def step(seen: int) -> None:
            if seen > 2000:
                signal.raise_signal(signal.SIGINT)
            progress(seen)

        return answer(pipe, text, progress=step)

    answer = Pipe.answer
    short, long = b"A cat.\n" * every, b"The dog ran.\n" * (every - 1) + b"The cat sat on the mat. " * 600 + b"\n"
    monkeypatch.setattr(sys, "stdin", Stdin(short + long + short))
    assert job(every=every, sampling=SamplingConfig(seed=2)).run() == 0
    whole = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(Pipe, "answer", begin)
    monkeypatch.setattr(sys, "stdin", Stdin(short + long + b"not this one\n"))
    path = tmp_path / "a.stream"
    assert job(every=every, save=path, sampling=SamplingConfig(seed=2)).run() == 130
    first, told = capsys.readouterr()
    assert told == "broken off while it was read: the last record has no answer; --resume answers it first\n"
    monkeypatch.undo()
    state = streamllm.load_state(path, stories()[0]).metadata["pipe"]
    assert "".join(state["waiting"]) == long.decode()
    monkeypatch.setattr(sys, "stdin", Stdin(short))
    assert job(every=every, resume=path).run() == 0
    assert [*first.splitlines(), *capsys.readouterr().out.splitlines()] == whole
    assert len(whole) == 3
    damaged = {**state, "waiting": ["\ud800"] * every}
    saved = streamllm.load_state(path, stories()[0])
    streamllm.save_state(path, saved.cache, metadata={"pipe": damaged})
    monkeypatch.setattr(sys, "stdin", Stdin(short))
    assert job(every=every, resume=path, on_error="skip").run() == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_record_that_only_the_model_refuses_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the answers without it; half a character is JSON, but no text, wherever among three it comes."""
    good = [b'{"text": "%s"}\n' % text.encode() for text in TEXTS * 2]
    options: dict[str, Any] = {"form": Form("{text}\n", "json"), "every": 3}

    def answers(lines: list[bytes], **more: Any) -> list[str]:
        monkeypatch.setattr(sys, "stdin", Stdin(*lines))
        assert job(**options, **more).run() == 0
        return capsys.readouterr().out.splitlines()

    want = answers(good)
    assert len(want) == 3
    for at in (3, 4, 5):
        broken = [*good[:at], b'{"text": "\\ud800"}\n', *good[at:]]
        assert answers(broken, on_error="skip") == want
        path = tmp_path / f"{at}.stream"
        monkeypatch.setattr(sys, "stdin", Stdin(*broken))
        with pytest.raises(InputError, match=rf"^Line {at + 1}: .*surrogate"):
            job(**options, save=path).run()
        capsys.readouterr()
        assert answers(good[at:], resume=path) == want[1:]


def test_a_stdout_that_fails_is_an_error_after_the_stream_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reference: the saved stream, which has the record whose answer could not be written, and not the next."""

    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdin", stdin := Stdin(b"A cat.\n", b"A dog.\n"))
    monkeypatch.setattr(sys, "stdout", Full())
    path = tmp_path / "a.stream"
    with pytest.raises(StreamLLMError, match="No space left"):
        job(save=path).run()
    assert stdin.pieces == [b"A dog.\n"]
    assert streamllm.load_state(path, stories()[0]).cache.tokens_seen > 0


def test_a_reader_that_goes_away_ends_the_pipe_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: ``head -1``: exit without a word after the second answer, and no more is read."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            if self.tell():
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdin", stdin := Stdin(*[b"A cat.\n"] * 5))
    monkeypatch.setattr(sys, "stdout", out := Closed())
    assert job(quiet=False).run() == 0
    assert out.getvalue().count("\n") == 1
    assert len(stdin.pieces) == 3


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_answer_cannot_steer_the_terminal(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log that is watched may say anything, and a model may repeat it; a pipe gets what the model wrote."""
    monkeypatch.setattr(sys, "stdin", Stdin(b"A cat.\n"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setattr(PipeJob, "_line", lambda *_: "\x1b]52;c;aGk=\x07 a\tb \x9b31m")
    job().run()
    want = "�]52;c;aGk=� a\tb �31m\n" if is_terminal else "\x1b]52;c;aGk=\x07 a\tb \x9b31m\n"
    assert capsys.readouterr().out == want


def test_a_person_sees_what_runs_and_what_it_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the sum that the banner must show, with the instructions in it."""
    monkeypatch.setattr(sys, "stdin", Stdin(b"A cat.\n"))
    path = tmp_path / "a.stream"
    job(quiet=False, verbose=True, stats=True, save=path, system="Be kind and brief.").run()
    lines = capsys.readouterr().err.splitlines()
    sizes = re.search(r"(\d+) pinned \+ 252 window \+ 63 block slack = (\d+) tokens", lines[0])
    assert sizes
    assert int(sizes[1]) + 252 + 63 == int(sizes[2])
    assert "forgotten" in lines[1]
    assert "no chat template" in lines[2]
    assert lines[3] == f"saved to {path}; go on with --resume {path}"
    assert lines[4].startswith("seen ")


# ---- the command, as a process of its own


def read_line(process: Any, seconds: float = 60) -> bytes:
    assert select.select([process.stdout], [], [], seconds)[0], "no answer came"
    return process.stdout.readline()


def test_answers_come_at_once_and_the_pipe_holds_the_writer_up() -> None:
    """Reference: an answer before the next record is written; and the bytes that a pipe and one piece of it hold."""
    process = spawn("pipe", "--temperature", "0", "--stop", "@@", bufsize=0)
    for _ in range(2):
        process.stdin.write(b"The cat sat.\n")
        read_line(process)
    os.set_blocking(process.stdin.fileno(), False)
    taken, line = 0, b"The dog ran.\n"
    while select.select([], [process.stdin], [], 1)[1]:
        taken += process.stdin.write(line * 5000) or 0
    process.send_signal(signal.SIGINT)
    os.set_blocking(process.stdin.fileno(), True)
    code, out, err = finish(process)
    assert (code, err) == (130, b"")
    assert 0 < taken <= 65_536 + 4096 + len(line) * out.count(b"\n")
