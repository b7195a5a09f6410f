"""Many streams at once: each gets the text that it would get alone, whatever happens to the others."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stories import STORIES
from streamllm import SamplingConfig, SinkCache, StreamLLMError, load, stream
from streamllm.config import CacheConfig
from streamllm.engine import Engine
from streamllm.errors import BusyError, ConfigError, InputError, StateError
from streamllm.request import BUFFER, Request
from streamllm.state import load_state, save_state

CONFIG = CacheConfig(sinks=4, window=60, block=16)
PROMPTS = [
    "Once upon a time",
    "Lily and Ben went to the park. " * 20,
    "The dog was sad because",
    "One day, a big cat saw a small bird in the tree and",
    "Tom had a red car. " * 7,
]


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(STORIES)


@pytest.fixture
def engine(loaded) -> Iterator[Engine]:
    with Engine(*loaded, slots=3, config=CONFIG, quantum=10) as made:
        yield made


def sampling(number: int) -> SamplingConfig:
    """Greedy, and sampled by a seed of its own, in turn."""
    return SamplingConfig(temperature=0) if number % 2 else SamplingConfig(temperature=1.1, top_p=0.9, seed=number)


def alone(loaded: Any, prompt: Any, number: int, **options: Any) -> list[int | None]:
    """The ids of a stream that has the machine to itself."""
    cache = SinkCache(loaded[0], CONFIG.sinks, CONFIG.window, CONFIG.block)
    options = {"max_tokens": 90, "on_end": "pass", **options}
    return [c.id for c in stream(*loaded, prompt, cache=cache, sampling=sampling(number), **options)]


def ids(request: Request) -> list[int | None]:
    return [chunk.id for chunk in request]


def together(engine: Engine, count: int, repeats: int = 1, **options: Any) -> list[Request]:
    """Streams that the engine finds all at once."""
    options = {"on_end": "pass", **options}
    with engine._changed:
        return [engine.submit(PROMPTS[i % 5] * repeats, sampling=sampling(i), **options) for i in range(count)]


def watch_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most caches beside the slots that were ever there, as a list of one number.

    Those of streams that are just done are their users'.
    """
    most = [0]

    def watched(act: Any) -> Any:
        def run(*args: Any) -> Any:
            most[0] = max(most[0], engine._places.in_memory())
            found = act(*args)
            most[0] = max(most[0], engine._places.in_memory())
            return found

        return run

    for owner, name in ((engine, "_step"), (engine._places, "settle"), (engine._places, "move")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return most


def wait_until(reached: Any, seconds: float = 60) -> None:
    """Until something has happened in the engine's thread."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_each_stream_is_what_it_would_be_alone(loaded, engine) -> None:
    """Reference: ``stream()``; five streams of different lengths share three slots and take turns."""
    requests = [
        engine.submit(prompt, max_tokens=90, on_end="pass", sampling=sampling(i)) for i, prompt in enumerate(PROMPTS)
    ]
    for number, (request, prompt) in enumerate(zip(requests, PROMPTS, strict=True)):
        assert ids(request) == alone(loaded, prompt, number)
        assert request.state == "done"
        assert request.error is None
    assert all(request.cache.tokens_evicted > 0 for request in requests)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.finished, stats.failed) == (0, 0, 5, 0)
    assert stats.tokens_generated == 5 * 90


def test_streams_that_memory_has_no_room_for_wait_on_disk(
    loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: ``stream()``; six streams, memory for one slot and one cache beside it."""
    size = SinkCache(loaded[0], 4, 60, 16).bytes_when_full
    with Engine(*loaded, slots=4, config=CONFIG, memory=2 * size, folder=tmp_path, quantum=7) as engine:
        assert engine.stats().slots == 1
        most = watch_memory(engine, monkeypatch)
        requests = [engine.submit(PROMPTS[i % 5], max_tokens=30, on_end="pass", sampling=sampling(i)) for i in range(6)]
        wait_until(lambda: engine.stats().on_disk >= 2)
        assert len(list(tmp_path.glob("*.stream"))) >= 1
        for number, request in enumerate(requests):
            assert ids(request) == alone(loaded, PROMPTS[number % 5], number, max_tokens=30)
    assert not list(tmp_path.iterdir())
    assert most == [1]


def test_without_a_folder_streams_wait_until_others_are_done(loaded) -> None:
    """Reference: the order of the calls; memory for two slots and one cache beside them, and no more."""
    size = SinkCache(loaded[0], 4, 60, 16).bytes_when_full
    with Engine(*loaded, slots=2, config=CONFIG, memory=3 * size, quantum=3) as engine:
        requests = [engine.submit(PROMPTS[0], max_tokens=20, on_end="pass") for _ in range(4)]
        ended = []
        for request in requests:
            request.text()
            ended.append([r.state for r in requests].count("done"))
        assert ended[0] <= 2
        assert ended[-1] == 4


def test_a_disk_that_is_full_ends_no_stream(loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: ``stream()``; memory for a slot and one cache beside it, and a disk that takes one file."""
    saved: list[Path] = []

    def refuse(path: Path, cache: SinkCache) -> None:
        if saved:
            raise StateError("No space is left.")
        saved.append(path)
        save_state(path, cache)

    monkeypatch.setattr("streamllm.places.save_state", refuse)
    size = SinkCache(loaded[0], 4, 60, 16).bytes_when_full
    notes: list[str] = []
    with Engine(
        *loaded, slots=1, config=CONFIG, memory=2 * size, folder=tmp_path, quantum=5, note=notes.append
    ) as engine:
        most = watch_memory(engine, monkeypatch)
        requests = together(engine, 6, max_tokens=40)
        for number, request in enumerate(requests):
            assert ids(request) == alone(loaded, PROMPTS[number % 5], number, max_tokens=40)
    assert most == [1]
    assert notes == ["Streams that wait stay in memory from here on, so fewer are served in turns: No space is left."]
    assert len(saved) == 1


def test_caches_beside_the_slots_stay_within_memory_while_prompts_are_read(
    loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: by hand: memory for four slots and one cache beside them; a cache that reads cannot go to disk."""
    size = SinkCache(loaded[0], 4, 60, 16).bytes_when_full
    with Engine(*loaded, slots=4, config=CONFIG, memory=5 * size, folder=tmp_path, quantum=9) as engine:
        assert engine.stats().slots == 4
        most = watch_memory(engine, monkeypatch)
        requests = together(engine, 6, max_tokens=30, repeats=20)
        for number, request in enumerate(requests):
            prompt = PROMPTS[number % 5] * 20
            assert ids(request) == alone(loaded, prompt, number, max_tokens=30)
    assert most == [1]


def test_streams_that_were_suspended_where_memory_is_tight_go_on(loaded) -> None:
    """Reference: ``stream()``; two slots, one cache beside them, no folder: a free slot needs no more memory."""
    size = SinkCache(loaded[0], 4, 60, 16).bytes_when_full
    with Engine(*loaded, slots=2, config=CONFIG, memory=3 * size) as engine:
        requests = together(engine, 2, max_tokens=BUFFER + 10)  # not done before they are read
        first = [next(request).id for request in requests]
        for request in requests:
            request.suspend()
        wait_until(lambda: all(request.state == "suspended" for request in requests))
        for request in requests:
            request.resume()
        wait_until(lambda: all(request.state == "decoding" for request in requests), 20)
        for number, request in enumerate(requests):
            assert [first[number], *ids(request)] == alone(loaded, PROMPTS[number], number, max_tokens=BUFFER + 10)


def test_a_chunk_taken_while_a_slot_changes_hands_hurts_nobody(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the number of tokens; a stream that stood still could go on right after others were let in for it."""
    with Engine(*loaded, slots=1, config=CONFIG, quantum=10**6) as engine:
        stuck = engine.submit(PROMPTS[0], on_end="pass")
        wait_until(lambda: stuck.is_full)
        choose = engine._places.next
        taken = []

        def choose_and_read() -> Any:
            chosen = choose()
            while chosen is not None and len(taken) < BUFFER - 1:
                taken.append(next(stuck))
            return chosen

        monkeypatch.setattr(engine._places, "next", choose_and_read)
        others = together(engine, 4, max_tokens=20)
        assert [len(ids(request)) for request in others] == [20] * 4


def test_a_cache_that_was_brought_along_stays_the_stream_after_a_stay_on_disk(loaded, tmp_path: Path) -> None:
    """Reference: ``stream()``, and identity; meanwhile the cache is refused, and holds no memory."""
    size = SinkCache(loaded[0], 4, 60, 16).bytes_when_full
    mine = SinkCache(loaded[0], 4, 60, 16)
    with Engine(*loaded, slots=1, config=CONFIG, memory=2 * size, folder=tmp_path, quantum=4) as engine:
        request = engine.submit(PROMPTS[0], cache=mine, max_tokens=60, on_end="pass", sampling=sampling(0))
        others = [engine.submit(PROMPTS[2], on_end="pass") for _ in range(4)]
        wait_until(lambda: request.id in engine._places.files)
        request.suspend()
        wait_until(lambda: request.state == "suspended" and request.id in engine._places.files)
        assert mine.bytes == 0
        with pytest.raises(BusyError, match="belongs to a stream of the engine"):
            engine.submit(None, cache=mine)
        request.resume()
        for other in others:
            other.cancel()
        assert ids(request) == alone(loaded, PROMPTS[0], 0, max_tokens=60)
        assert request.cache is mine
        assert mine.tokens_seen + 1 == len(loaded[1](PROMPTS[0]).input_ids) + 60


def test_a_stream_that_stood_still_goes_on_when_half_of_what_waits_is_taken() -> None:
    """Reference: by hand; else a slow reader would cost a change of slots for each token."""
    woken: list[int] = []
    chunk: Any = "a chunk"
    request = Request(1, None, None, lambda: woken.append(left), threading.current_thread())  # type: ignore[arg-type]
    for _ in range(2):
        for number in range(BUFFER):
            assert request.is_full == (number == BUFFER)
            request.push(chunk)
        for left in reversed(range(BUFFER)):
            next(request)
            assert request.is_full == (left > BUFFER // 2)
    assert woken == [BUFFER // 2] * 2


def test_a_cancelled_stream_frees_its_slot_and_keeps_what_it_has(loaded, engine) -> None:
    """Reference: the ids given out, which are in its cache or unread."""
    endless = engine.submit(PROMPTS[0], on_end="pass")
    begun = [next(endless).id for _ in range(5)]
    endless.cancel()
    got = begun + ids(endless)
    wait_until(lambda: endless.state == "done")
    prompt = loaded[1](PROMPTS[0]).input_ids
    assert endless.cache.tokens_seen + len(endless.cache.unread) == len(prompt) + len(got)
    assert engine.stats().running == 0
    # The cache goes on in another stream, by itself or in the engine.
    again = engine.submit(None, cache=endless.cache, max_tokens=3, on_end="pass")
    assert len(ids(again)) == 3


def test_a_suspended_stream_goes_on_where_it_was(loaded, engine) -> None:
    """Reference: ``stream()``."""
    request = engine.submit(PROMPTS[1], max_tokens=90, on_end="pass", sampling=sampling(2))
    got = [next(request).id for _ in range(4)]
    request.suspend()
    wait_until(lambda: request.state in ("suspended", "done"))
    assert engine.stats().suspended == 1
    before = engine.stats().tokens_generated
    other = engine.submit(PROMPTS[2], max_tokens=5, on_end="pass")
    other.text()
    assert engine.stats().tokens_generated == before + 5
    request.resume()
    assert got + ids(request) == alone(loaded, PROMPTS[1], 2)


def test_a_stream_that_nobody_reads_stands_still(loaded, engine) -> None:
    """Reference: ``BUFFER``; the others go on, and it goes on when it is read."""
    stuck = engine.submit(PROMPTS[0], max_tokens=BUFFER + 40, on_end="pass", sampling=sampling(4))
    wait_until(lambda: stuck.is_full)
    others = [engine.submit(PROMPTS[i], max_tokens=20, on_end="pass", sampling=sampling(i)) for i in range(4)]
    for number, request in enumerate(others):
        assert ids(request) == alone(loaded, PROMPTS[number], number, max_tokens=20)
    assert engine.stats().tokens_generated == BUFFER + 4 * 20
    assert ids(stuck) == alone(loaded, PROMPTS[0], 4, max_tokens=BUFFER + 40)


def test_a_poisoned_stream_ends_alone(loaded, engine) -> None:
    """Reference: ``stream()`` for the others; the poison is nan in its keys, as an overflow would leave it."""
    cache = SinkCache(loaded[0], CONFIG.sinks, CONFIG.window, CONFIG.block)
    list(stream(*loaded, PROMPTS[0], cache=cache, max_tokens=3))
    layer: Any = cache.layers[0]
    layer.stores[0].data.fill_(torch.nan)
    poisoned = engine.submit(None, cache=cache, max_tokens=50)
    others = [engine.submit(PROMPTS[i], max_tokens=40, on_end="pass", sampling=sampling(i)) for i in range(4)]
    with pytest.raises(StreamLLMError, match="not finite"):
        ids(poisoned)
    assert isinstance(poisoned.error, StreamLLMError)
    for number, request in enumerate(others):
        assert ids(request) == alone(loaded, PROMPTS[number], number, max_tokens=40)
    assert engine.stats().failed == 1


def test_a_callback_ends_a_stream_and_one_that_raises_ends_it_alone(loaded, engine) -> None:
    def fails(chunk: Any) -> bool:
        raise ZeroDivisionError("the callback")

    good = engine.submit(PROMPTS[0], max_tokens=30, on_end="pass", sampling=sampling(0))
    bad = engine.submit(PROMPTS[2], on_end="pass", stop_when=fails)
    short = engine.submit(PROMPTS[2], on_end="pass", stop_when=lambda chunk: chunk.stats.tokens_generated == 4)
    with pytest.raises(ZeroDivisionError):
        ids(bad)
    assert len(ids(short)) == 4
    assert ids(good) == alone(loaded, PROMPTS[0], 0, max_tokens=30)


@pytest.mark.parametrize("error", [SystemExit("the callback"), asyncio.CancelledError()])
def test_whatever_a_callback_raises_ends_its_stream_alone(error: BaseException, loaded, engine) -> None:
    """Reference: ``stream()``; these are no ``Exception``, and would end a thread."""

    def fails(chunk: Any) -> bool:
        raise error

    good = engine.submit(PROMPTS[0], max_tokens=30, on_end="pass", sampling=sampling(0))
    bad = engine.submit(PROMPTS[2], on_end="pass", stop_when=fails)
    with pytest.raises(type(error)):
        ids(bad)
    assert ids(good) == alone(loaded, PROMPTS[0], 0, max_tokens=30)


@pytest.mark.parametrize("error", [StopIteration(), StopAsyncIteration()])
def test_a_callback_cannot_make_its_failure_look_like_an_end(error: Exception, engine) -> None:
    """Reference: what Python does in generators; a loop would take these for the end of the text."""

    def fails(chunk: Any) -> bool:
        raise error

    async def collect(request: Request) -> list[Any]:
        return [chunk async for chunk in request]

    request = engine.submit(PROMPTS[2], on_end="pass", stop_when=fails)
    with pytest.raises(RuntimeError, match=f"stop_when raised {type(error).__name__}"):
        ids(request)
    with pytest.raises(RuntimeError, match="stop_when raised"):
        asyncio.run(collect(request))
    assert engine.stats().failed == 1


def test_an_error_that_is_raised_again_and_again_does_not_grow(engine) -> None:
    """Reference: the length of its traceback the first time."""

    def fails(chunk: Any) -> bool:
        raise ZeroDivisionError("the callback")

    request = engine.submit(PROMPTS[2], on_end="pass", stop_when=fails)
    lengths = []
    for _ in range(3):
        with pytest.raises(ZeroDivisionError) as caught:
            next(request)
        lengths.append(len(traceback.extract_tb(caught.value.__traceback__)))
        assert any(frame.name == "fails" for frame in traceback.extract_tb(caught.value.__traceback__))
    assert len(set(lengths)) == 1


def test_what_waits_for_the_engine_is_refused_in_its_own_thread(engine) -> None:
    """Reference: time; it would wait for itself, and all others with it."""
    for wait in (engine.drain, engine.close):
        request = engine.submit(PROMPTS[0], stop_when=lambda chunk, wait=wait: wait())
        with pytest.raises(RuntimeError, match="another thread"):
            ids(request)
    assert engine.submit(PROMPTS[0], max_tokens=1).text() is not None


def test_a_stream_that_fails_lets_go_of_the_memory_it_failed_with(
    loaded, engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: weak references; the error is kept, and what its forward had made would be kept with it."""
    forward = type(engine.submit(PROMPTS[0], max_tokens=1).turn).forward
    victim, made, held = list[Any](), list[Any](), list[bool]()

    def one_by_one(turn: Any, tokens: Any) -> Any:
        if turn.cache in victim:
            large = torch.zeros(1000)
            made.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.extend(there() is not None for there in made)
        return forward(turn, tokens)

    def out_of_memory(*_: Any, step: Any = engine._slots.step) -> Any:
        if victim and not made:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*_)

    monkeypatch.setattr("streamllm.loop.Turn.forward", one_by_one)
    monkeypatch.setattr(engine._slots, "step", out_of_memory)
    requests = together(engine, 2, max_tokens=40)
    for request in requests:
        next(request)
    victim.append(requests[0].turn.cache)
    with pytest.raises(torch.OutOfMemoryError):
        ids(requests[0])
    ids(requests[1])
    assert held
    assert not any(held)


def test_a_draw_that_fails_is_repeated_without_what_it_had_made(
    loaded, engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: ``stream()`` and weak references; the memory runs out behind the random numbers of all."""
    from streamllm import race

    made, held = list[Any](), list[bool]()

    def fail(scores: Any, *rest: Any, winners: Any = race.winners) -> Any:
        if len(scores) > 1:
            large = torch.zeros(1000)
            made.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.extend(there() is not None for there in made)
        return winners(scores, *rest)

    monkeypatch.setattr(race, "winners", fail)
    with engine._changed:
        requests = [engine.submit(PROMPTS[i], max_tokens=30, on_end="pass", sampling=sampling(2 * i)) for i in range(3)]
    for number, request in enumerate(requests):
        assert ids(request) == alone(loaded, PROMPTS[number], 2 * number, max_tokens=30)
    assert made
    assert not any(held)


def test_an_engine_that_broke_says_so(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the mistake, which is ours; nobody has closed it."""
    with Engine(*loaded, slots=1, config=CONFIG) as engine:
        monkeypatch.setattr(engine, "_come_and_go", lambda: 1 // 0)
        request = engine.submit(PROMPTS[0])
        with pytest.raises(ZeroDivisionError):
            ids(request)
        with pytest.raises(BusyError, match=r"has stopped by a mistake of its own: ZeroDivisionError, .*make another"):
            engine.submit(PROMPTS[0])


def test_steps_are_compiled_by_the_thread_that_runs_them(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the threads' numbers; a graph of an accelerator belongs to the thread that it was recorded by."""
    seen: list[int] = []
    monkeypatch.setattr("streamllm.slots.Slots.prepare", lambda slots: seen.append(threading.get_ident()))
    with Engine(*loaded, slots=1, config=CONFIG, compile=True) as engine:
        assert seen == [engine._thread.ident]


def test_what_fails_while_an_engine_is_made_fails_there(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the error, and no thread that is left."""

    def fail(slots: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("streamllm.slots.Slots.prepare", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(*loaded, slots=1, config=CONFIG, compile=True)
    wait_until(lambda: not any(thread.name == "streamllm-engine" for thread in threading.enumerate()))


def test_a_step_that_fails_is_repeated_one_by_one(loaded, engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the middle of a step; reference: ``stream()`` for those that are not to blame."""
    step, forward = engine._slots.step, type(engine.submit(PROMPTS[0], max_tokens=1).turn).forward
    victim: list[Any] = []

    def out_of_memory(caches: Any, tokens: Any) -> Any:
        if any(cache in victim for cache in caches):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(caches, tokens)

    def one_by_one(turn: Any, tokens: Any) -> Any:
        if turn.cache in victim:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(turn, tokens)

    monkeypatch.setattr(engine._slots, "step", out_of_memory)
    monkeypatch.setattr("streamllm.loop.Turn.forward", one_by_one)
    requests = [engine.submit(PROMPTS[i], max_tokens=40, on_end="pass", sampling=sampling(i)) for i in range(3)]
    first = next(requests[1])
    victim.append(requests[1].turn.cache)
    with pytest.raises(torch.OutOfMemoryError):
        ids(requests[1])
    for number in (0, 2):
        assert ids(requests[number]) == alone(loaded, PROMPTS[number], number, max_tokens=40)
    assert first.id is not None


def test_one_step_serves_all_streams(loaded, engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand; all tokens but each stream's first, which its prompt gives, come from shared steps."""
    sizes: list[int] = []

    def count(caches: Any, tokens: Any, step: Any = engine._slots.step) -> Any:
        found = step(caches, tokens)
        sizes.append(len(caches))
        return found

    monkeypatch.setattr(engine._slots, "step", count)
    for request in together(engine, 3, max_tokens=30):
        request.text()
    assert sum(sizes) == engine.stats().tokens_generated - 3 == 3 * 29
    assert max(sizes) == 3
    assert engine.stats().repeated == 0


def test_a_step_that_always_fails_is_told_of_once(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: ``stream()``, by the number of steps; want of memory is no mistake, and is not told of."""
    notes: list[str] = []
    with Engine(*loaded, slots=2, config=CONFIG, note=notes.append) as engine:
        for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a mistake in the step")):

            def fail(*_: Any, error: Exception = error) -> Any:
                raise error

            monkeypatch.setattr(engine._slots, "step", fail)
            assert ids(together(engine, 1, max_tokens=10)[0]) == alone(loaded, PROMPTS[0], 0, max_tokens=10)
        assert engine.stats().repeated == 2 * 9
    assert notes == [
        "A decode step failed and is repeated stream by stream, which is slower: RuntimeError, a mistake in the step."
    ]


def test_a_piece_of_a_prompt_takes_as_long_as_is_left(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand, from seconds that are given; at least 16 tokens, at most 256."""
    engine._token_s = 0.001
    assert engine._width(0.04) == 256
    monkeypatch.setattr(engine._places, "active", [SimpleNamespace(state="decoding")])
    for seconds, width in [(0.0401, 40), (0.4, 256), (0.004, 16), (-1, 16)]:
        assert engine._width(seconds) == width
    engine._token_s = 0.0
    assert engine._width(0.04) == 256


@pytest.mark.parametrize(("step_s", "running"), [(10.0, 3), (0.0, 1)])
def test_prompts_are_read_for_as_long_as_four_steps(
    engine, monkeypatch: pytest.MonkeyPatch, step_s: float, running: int
) -> None:
    """Reference: by hand: who runs at the first step: in forty seconds all prompts are read, in none one is."""
    found: list[int] = []

    def watch(step: Any = engine._step) -> Any:
        found.append(sum(request.state == "decoding" for request in engine._places.active))
        return step()

    monkeypatch.setattr(engine, "_step", watch)
    monkeypatch.setattr("streamllm.engine._lately", lambda before, now: before)
    engine._step_s = step_s
    with engine._changed:
        requests = [engine.submit(prompt, max_tokens=30, on_end="ban") for prompt in PROMPTS[:3]]
    for request in requests:
        request.text()
    assert next(filter(None, found)) == running


def test_there_is_an_end_to_what_is_read_in_one_turn(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand: once 256 of 600 tokens are read the turn is over, however long steps have taken lately."""
    read: list[int] = []

    def watch(step: Any = engine._step) -> Any:
        read.append(engine._read)
        return step()

    monkeypatch.setattr(engine, "_step", watch)
    monkeypatch.setattr("streamllm.engine._lately", lambda before, now: before)
    engine._step_s = 1000.0
    with engine._changed:
        requests = [engine.submit([5] * 200, max_tokens=1) for _ in range(3)]
    for request in requests:
        request.text()
    assert 256 <= read[0] < 512


def test_long_prompts_are_read_in_turns(loaded, engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand: a piece of one, a piece of the other, each as long as it was to be."""
    grown: list[list[int]] = []

    def watch(end: float, read: Any = engine._read_a_piece) -> Any:
        before = [request.turn.cache.tokens_seen for request in requests]
        found = read(end)
        after = [request.turn.cache.tokens_seen for request in requests]
        grown.append([new - old for old, new in zip(before, after, strict=True)])
        return found

    monkeypatch.setattr(engine, "_read_a_piece", watch)
    monkeypatch.setattr(engine, "_width", lambda seconds: 32)
    with engine._changed:
        requests = [engine.submit(PROMPTS[1] * 3, max_tokens=1) for _ in range(2)]
    for request in requests:
        request.text()
    assert [pair for pair in grown if any(pair)][:12] == [[32, 0], [0, 32]] * 6


def test_streams_that_share_a_slot_take_turns(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand: five tokens each, after a first turn in which the prompt counts as four."""
    order: list[int] = []
    with Engine(*loaded, slots=1, config=CONFIG, quantum=5) as engine:
        show = engine._show

        def watch(requests: Any, *others: Any) -> None:
            order.extend(request.id for request in requests)
            show(requests, *others)

        monkeypatch.setattr(engine, "_show", watch)
        for request in together(engine, 3, max_tokens=17):
            assert len(ids(request)) == 17
    turns = [(number, len(list(tokens))) for number, tokens in itertools.groupby(order)]
    assert turns == [(number, tokens) for tokens in (2, 5, 5, 5) for number in (1, 2, 3)]


def test_streams_that_no_slot_takes_are_served_all_the_same() -> None:
    """Reference: ``stream()``; a model with layers of another kind, whose steps cannot be compiled either."""
    from families import FAMILIES
    from streamllm.slots import why_not

    family = next(f for f in FAMILIES.values() if why_not(SinkCache(f.make(), 3, 12, 5)))
    model = family.make()
    tokenizer = load(STORIES)[1]
    prompt = [5, 9, 2, 7, 11, 3]
    options: dict[str, Any] = {"max_tokens": 40, "sampling": SamplingConfig(temperature=0), "on_end": "pass"}
    want = [c.id for c in stream(model, tokenizer, prompt, cache=SinkCache(model, 3, 12, 5), **options)]
    size, notes = SinkCache(model, 3, 12, 5).bytes_when_full, list[str]()
    with Engine(
        model, tokenizer, slots=4, config=CacheConfig(3, 12, 5), memory=4 * size, compile=True, note=notes.append
    ) as engine:
        requests = [engine.submit(prompt, **options) for _ in range(5)]
        assert [ids(request) for request in requests] == [want] * 5
        # Without slots nothing lies beside them: as many as memory has room for go on at the same time.
        endless = [engine.submit(prompt, on_end="pass") for _ in range(4)]
        wait_until(lambda: all(request.is_full for request in endless))
    assert [note.partition(": ")[0] for note in notes] == ["Decoding is not compiled, which is slower"]


def test_threads_and_asyncio_can_share_an_engine(loaded, engine) -> None:
    """Reference: ``stream()``."""
    got: dict[int, list[int | None]] = {}

    def work(number: int) -> None:
        got[number] = ids(engine.submit(PROMPTS[number], max_tokens=30, on_end="pass", sampling=sampling(number)))

    async def collect(number: int) -> list[int | None]:
        request = engine.submit(PROMPTS[number], max_tokens=30, on_end="pass", sampling=sampling(number))
        return [chunk.id async for chunk in request]

    async def both() -> list[list[int | None]]:
        return list(await asyncio.gather(*(collect(number) for number in range(5))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    found = asyncio.run(both())
    for thread in threads:
        thread.join()
    for number in range(5):
        assert got[number] == found[number] == alone(loaded, PROMPTS[number], number, max_tokens=30)


def test_the_queue_has_an_end(loaded) -> None:
    with Engine(*loaded, slots=1, config=CONFIG, waiting=1) as engine:
        first, second = (engine.submit(PROMPTS[0], on_end="pass") for _ in range(2))
        with pytest.raises(BusyError, match="2 streams are here already"):
            engine.submit(PROMPTS[0])
        first.cancel()
        wait_until(lambda: first.state == "done")
        third = engine.submit(PROMPTS[0], max_tokens=1)
        second.cancel()
        assert len(ids(third)) == 1


def test_an_engine_drains_and_closes(loaded) -> None:
    engine = Engine(*loaded, slots=2, config=CONFIG)
    request = engine.submit(PROMPTS[0], max_tokens=20, on_end="pass")
    assert engine.drain(60)
    assert len(ids(request)) == 20
    with pytest.raises(BusyError, match="closing"):
        engine.submit(PROMPTS[0])
    engine.close()
    engine = Engine(*loaded, slots=2, config=CONFIG)
    endless = engine.submit(PROMPTS[0], on_end="pass")
    next(endless)
    assert not engine.drain(0.05)
    engine.close()
    with pytest.raises(BusyError, match="closed"):
        ids(endless)


def test_what_cannot_be_is_said_at_once(loaded, engine) -> None:
    with pytest.raises(ConfigError, match="slots must be a whole number of at least 1, you gave 0"):
        Engine(*loaded, slots=0)
    with pytest.raises(ConfigError, match=r"One stream needs .* bytes, for its slot .* 1,000 are there"):
        Engine(*loaded, memory=1000)
    with pytest.raises(ConfigError, match=r"this engine was made for 79: make it with columns=\d+"):
        engine.submit("x", cache=SinkCache(loaded[0], 4, 200, 16))
    with pytest.raises(InputError, match="whole prompt"):
        engine.submit(iter(["x"]))
    with pytest.raises(ConfigError, match="max_tokens"):
        engine.submit("x", max_tokens=-1)
    with pytest.raises(InputError, match="empty"):
        ids(engine.submit([]))
    only_read = engine.submit(PROMPTS[1], max_tokens=0)
    assert [chunk.id for chunk in only_read] == [None]
    assert only_read.cache.unread


@pytest.mark.parametrize(
    ("option", "value"),
    [("slots", 2.5), ("slots", True), ("columns", 10.5), ("memory", "4GB"), ("waiting", -1), ("quantum", 0)],
)
def test_numbers_that_are_none_are_refused_at_once(option: str, value: Any, loaded) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be a whole number of at least ., you gave {value!r}"):
        Engine(*loaded, **{option: value})


def test_a_folder_that_cannot_be_is_refused_before_anything_is_compiled(
    loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_prepare", lambda *_: pytest.fail("it was prepared"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Caches cannot go to .*file: File exists; name another folder"):
        Engine(*loaded, folder=tmp_path / "file")


def test_a_long_prompt_does_not_hold_the_others_up(loaded, engine) -> None:
    """Reference: the order of events: between two pieces of the prompt the other stream gets its token."""
    other = engine.submit(PROMPTS[0], on_end="pass")
    next(other)
    reader = engine.submit(PROMPTS[1] * 60, max_tokens=1)
    during = 0
    while reader.state != "done":
        next(other)
        during += 1
    assert during >= 10
    other.cancel()
    assert len(ids(reader)) == 1


def test_more_unread_streams_than_slots_block_nobody(loaded) -> None:
    """Reference: ``stream()`` for the one that is read; the engine can still be closed."""
    with Engine(*loaded, slots=1, config=CONFIG, quantum=5) as engine:
        unread = [engine.submit(PROMPTS[0], on_end="pass") for _ in range(2)]
        wait_until(lambda: all(request.is_full for request in unread))
        read = engine.submit(PROMPTS[2], max_tokens=30, on_end="pass", sampling=sampling(3))
        assert ids(read) == alone(loaded, PROMPTS[2], 3, max_tokens=30)
        assert len([next(unread[0]) for _ in range(BUFFER + 50)]) == BUFFER + 50


def test_a_stream_can_be_suspended_and_cancelled_while_it_reads(loaded, engine) -> None:
    """Reference: ``stream()``; and the tokens that a cancelled one has read are in its cache."""
    long = PROMPTS[1] * 30
    first, second = (engine.submit(long, max_tokens=20, on_end="pass", sampling=sampling(5)) for _ in range(2))
    wait_until(lambda: first.turn.cache.tokens_seen > 300 and second.turn.cache.tokens_seen > 300)
    first.suspend()
    second.cancel()
    wait_until(lambda: first.state == "suspended" and second.state == "done")
    assert ids(second) == []
    assert second.cache.tokens_seen > 300
    seen = first.turn.cache.tokens_seen
    time.sleep(0.1)
    assert first.turn.cache.tokens_seen == seen
    first.resume()
    assert ids(first) == alone(loaded, long, 5, max_tokens=20)


def test_streams_on_disk_can_be_cancelled_and_outlive_the_engine(loaded, tmp_path: Path) -> None:
    """Reference: the ids given out; and the file that the error names."""
    size = SinkCache(loaded[0], 4, 60, 16).bytes_when_full
    with Engine(*loaded, slots=1, config=CONFIG, memory=2 * size, folder=tmp_path, quantum=4) as engine:
        requests = [engine.submit(PROMPTS[0], on_end="pass") for _ in range(5)]
        wait_until(lambda: engine.stats().on_disk >= 3)
        victim = next(r for r in requests if r.id in engine._places.files)
        victim.cancel()
        wait_until(lambda: victim.state == "done")
        got = ids(victim)
        assert victim.cache.tokens_seen + 1 == len(loaded[1](PROMPTS[0]).input_ids) + len(got)
        wait_until(lambda: engine.stats().on_disk >= 2)
    errors = [str(request.error) for request in requests if request is not victim]
    assert all("The engine was closed." in error for error in errors)
    files = [Path(error.rpartition(" in ")[2].rstrip(".")) for error in errors if " in " in error]
    assert files
    for file in files:
        assert load_state(file, loaded[0]).cache.tokens_seen > 0


@pytest.mark.parametrize("where", ["release", "draw", "after"])
def test_running_out_of_memory_anywhere_ends_no_other_stream(
    where: str, loaded, engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a stream leaves its slot, while all draw, or where the results of a step are put together."""

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    requests = [engine.submit(PROMPTS[i], max_tokens=60, on_end="pass", sampling=sampling(i)) for i in range(3)]
    first = [next(request).id for request in requests]
    broken = requests[0] if where == "release" else None
    if where == "release":
        monkeypatch.setattr("streamllm.slots.Slots.release", fail)
        requests[0].cancel()
        wait_until(lambda: requests[0].state == "done")
        monkeypatch.undo()
        with pytest.raises(torch.OutOfMemoryError):
            ids(requests[0])
        assert requests[0].cache.tokens_seen == 0
    elif where == "draw":
        monkeypatch.setattr("streamllm.engine.draw", fail)
    else:
        step = engine._slots._plain.forward

        def once(*args: Any) -> Any:
            engine._slots._plain.forward = step
            step(*args)
            return fail()

        engine._slots._plain.forward = once
    for number, request in enumerate(requests):
        if request is not broken:
            assert [first[number], *ids(request)] == alone(loaded, PROMPTS[number], number, max_tokens=60)


def test_a_stream_that_is_suspended_lets_the_engine_drain(loaded, engine) -> None:
    """Reference: time; nobody else tells whoever waits."""
    request = engine.submit(PROMPTS[0], on_end="pass")
    next(request)
    threading.Timer(0.3, request.suspend).start()
    assert engine.drain(30)
    assert request.state == "suspended"


def test_asyncio_that_gives_up_waiting_leaves_nothing_behind(loaded, engine) -> None:
    async def poll(request: Request) -> int:
        for _ in range(20):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(request), 0.01)
        return len(request._sleepers)

    request = engine.submit(PROMPTS[0], on_end="pass")
    request.suspend()
    wait_until(lambda: request.state == "suspended")
    while request._chunks:
        next(request)
    assert asyncio.run(poll(request)) == 0


def test_a_cache_of_another_kind_or_in_use_is_refused(loaded, engine) -> None:
    with pytest.raises(ConfigError, match="kv_dtype='int8', this engine's have 'auto'"):
        engine.submit(PROMPTS[0], cache=SinkCache(loaded[0], 4, 60, 16, kv_dtype="int8"))
    with pytest.raises(ConfigError, match="in this engine's slots, since its tokens are read anew"):
        engine.submit(PROMPTS[0], cache=SinkCache(loaded[0], 4, 60, 16, reread=True))
    first = engine.submit(PROMPTS[0], cache=SinkCache(loaded[0], 4, 60, 16), on_end="pass")
    with pytest.raises(BusyError, match="belongs to a stream of the engine"):
        engine.submit(PROMPTS[0], cache=first.turn.cache)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.slow
def test_a_compiled_engine_in_eight_bits(loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: ``stream()`` over a cache in eight bits, not compiled; the steps are ready before the first stream."""
    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    config = CacheConfig(4, 60, 16, kv_dtype="int8")
    with Engine(*loaded, slots=2, config=config, quantum=10, compile=True) as engine:
        assert len(list(tmp_path.iterdir())) == 2
        requests = [engine.submit(PROMPTS[i], max_tokens=50, on_end="pass", sampling=sampling(1)) for i in range(3)]
        for number, request in enumerate(requests):
            cache = SinkCache(loaded[0], 4, 60, 16, kv_dtype="int8")
            options: dict[str, Any] = {"max_tokens": 50, "on_end": "pass", "sampling": sampling(1)}
            assert ids(request) == [c.id for c in stream(*loaded, PROMPTS[number], cache=cache, **options)]
    assert len(list(tmp_path.iterdir())) == 2
