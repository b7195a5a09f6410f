"""How long a stream waits for its first token when others decode beside it, against when it is alone.

The streams go through one engine and are drawn from by threads, one each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from streamllm.bench.rounds import ratio, summary
from streamllm.bench.subject import Subject
from streamllm.config import CacheConfig
from streamllm.engine import Engine

Submit = Callable[[Sequence[int], int], Iterator[Any]]
"""Takes the ids of a prompt and the most tokens to write; gives a stream, one item a token."""


OTHERS = 7
"""Streams that decode beside the one that is waited for."""


def measure_engine(subject: Subject, window: int, rounds: int, *, compiles: bool) -> dict[str, Any]:
    """``measure_delay`` of an engine with a slot for each, and prompts of one window."""
    config = CacheConfig(subject.sinks, window - subject.sinks, subject.block)
    with Engine(subject.model, subject.tokenizer, slots=OTHERS + 1, config=config, compile=compiles) as engine:

        def submit(prompt: Sequence[int], most: int) -> Iterator[Any]:
            request = engine.submit(prompt, max_tokens=most, on_end="pass")
            try:
                yield from request
            finally:
                request.cancel()

        return measure_delay(submit, subject.ids(1, window)[0].tolist(), OTHERS, rounds)


def measure_delay(submit: Submit, prompt: Sequence[int], others: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token, alone and beside ``others`` streams that decode, and the ratio."""
    alone, beside = [], []
    for number in range(rounds + 1):  # the first is thrown away: something may be compiled in it
        quiet = _first_token(submit, prompt)
        with _Company(submit, prompt, others):
            busy = _first_token(submit, prompt)
        if number:
            alone.append(quiet)
            beside.append(busy)
    return {
        "others": others,
        "prompt": len(prompt),
        "first_token_ms_alone": summary([1000 * seconds for seconds in alone]),
        "first_token_ms_beside": summary([1000 * seconds for seconds in beside]),
        "ratio": summary(ratio(beside, alone)),
    }


def _first_token(submit: Submit, prompt: Sequence[int]) -> float:
    began = time.perf_counter()
    for _ in submit(prompt, 1):
        return time.perf_counter() - began
    raise RuntimeError("a stream ended without a token")


class _Company:
    """Streams that decode for as long as the context lasts; it begins when each has written its first token."""

    ENDLESS = 1 << 30

    def __init__(self, submit: Submit, prompt: Sequence[int], count: int) -> None:
        self._stop = threading.Event()
        self._started = [threading.Event() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._draw, args=(submit, prompt, started), daemon=True)
            for started in self._started
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()
        for started in self._started:
            started.wait()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _draw(self, submit: Submit, prompt: Sequence[int], started: threading.Event) -> None:
        stream = submit(prompt, self.ENDLESS)
        try:
            for _ in stream:
                started.set()
                if self._stop.is_set():
                    return
        finally:
            started.set()
            if hasattr(stream, "close"):
                stream.close()
