"""How long a stream waits for its first token when others decode beside it, against when it is alone.

The streams go through one engine and are drawn from by threads, one each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from streamllm.bench.decode import Leave
from streamllm.bench.method import Misfit
from streamllm.bench.ours import refuse
from streamllm.bench.rounds import ratio, summary
from streamllm.bench.subject import Subject
from streamllm.config import CacheConfig
from streamllm.engine import Engine
from streamllm.errors import ConfigError

Submit = Callable[[Sequence[int], int], Iterator[Any]]
"""Takes the ids of a prompt and the most tokens to write; gives a stream, one item a token."""


OTHERS = 7
"""Streams that decode beside the one that is waited for."""

LONGEST = 600
"""Seconds that they may take until all decode."""


def measure_engine(
    subject: Subject, window: int, rounds: int, leave: Leave, *, compiles: bool
) -> dict[str, Any] | None:
    """``measure_delay`` of an engine with a slot for each, and prompts of one window."""
    try:
        return _measure(subject, window, rounds, compiles)
    except (ConfigError, Misfit) as reason:
        leave("the delay of the first token", str(reason))
        return None


def _measure(subject: Subject, window: int, rounds: int, compiles: bool) -> dict[str, Any]:
    config = CacheConfig(subject.sinks, window - subject.sinks, subject.block)
    with Engine(
        subject.model, subject.tokenizer, slots=OTHERS + 1, config=config, compile=compiles, note=refuse
    ) as engine:
        if (slots := engine.stats().slots) <= OTHERS:
            raise Misfit(f"memory has room for {slots} streams at a time, {OTHERS + 1} are needed")

        def submit(prompt: Sequence[int], most: int) -> Iterator[Any]:
            request = engine.submit(prompt, max_tokens=most, on_end="pass")
            try:
                yield from request
            finally:
                request.cancel()

        found = measure_delay(submit, subject.ids(1, window)[0].tolist(), OTHERS, rounds)
        if failed := engine.stats().repeated:
            raise Misfit(f"{failed} decode steps failed and were repeated stream by stream")
        return found


def measure_delay(submit: Submit, prompt: Sequence[int], others: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token, alone and beside ``others`` streams that decode, and the ratio.

    Raises:
        Misfit: they do not begin.
        Exception: why one of them ended.
    """
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
    """Streams that decode for as long as the context lasts; it begins when each has written its first token.

    If one of them cannot, there is no context, and no waiting for the others: whoever serves them ends them.
    """

    ENDLESS = 1 << 30

    def __init__(self, submit: Submit, prompt: Sequence[int], count: int) -> None:
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._started = [threading.Event() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._draw, args=(submit, prompt, started), daemon=True)
            for started in self._started
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()
        is_there = all(started.wait(LONGEST) for started in self._started)
        if self._errors or not is_there:
            self._stop.set()
            raise self._errors[0] if self._errors else Misfit(f"{len(self._started)} streams beside it do not begin")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors and kind is None:
            raise self._errors[0]

    def _draw(self, submit: Submit, prompt: Sequence[int], started: threading.Event) -> None:
        try:
            stream = submit(prompt, self.ENDLESS)
            try:
                for _ in stream:
                    started.set()
                    if self._stop.is_set():
                        return
                raise RuntimeError("a stream ended that was to go on")
            finally:
                if hasattr(stream, "close"):
                    stream.close()
        except BaseException as error:
            self._errors.append(error)
        finally:
            started.set()
