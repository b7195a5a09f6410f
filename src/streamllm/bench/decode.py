"""Decoding by all methods in one window and number of rows: milliseconds, tokens per second, share of the floor."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from streamllm.bench.bandwidth import Bandwidth
from streamllm.bench.catalogue import METHODS
from streamllm.bench.method import Method, Misfit
from streamllm.bench.rounds import summary, take_turns
from streamllm.bench.subject import Subject
from streamllm.checkpoint import size
from streamllm.evaluate.memory import peak_bytes
from streamllm.models import free_bytes

Leave = Callable[[str, str], None]
"""Is told what is left out, and why."""


def make_method(name: str, subject: Subject, window: int, rows: int = 1) -> Method:
    """The method of that name, its cache empty.

    Raises:
        Misfit: it cannot be measured so.
    """
    # Plain transformers holds its keys and values twice while it joins a new token to them.
    need, free = 2 * rows * (window + subject.block) * subject.token_bytes, free_bytes(subject.device)
    if free is not None and need > free:
        raise Misfit(f"its keys and values may take {size(need)}, and {size(free)} of memory are free")
    module, kind = METHODS[name].place.split(":")
    found: Method = getattr(import_module(f"streamllm.bench.{module}"), kind)(subject, window, rows)
    return found


@contextmanager
def filled(names: Sequence[str], subject: Subject, window: int, rows: int, leave: Leave) -> Iterator[list[Method]]:
    """The methods that can be measured, their caches full; closed at the end."""
    methods: list[Method] = []
    try:
        for name in names:
            try:
                method = make_method(name, subject, window, rows)
                with torch.no_grad():
                    method.fill()
            except Misfit as reason:
                leave(_at(name, window, rows), str(reason))
            except (torch.OutOfMemoryError, MemoryError):
                leave(_at(name, window, rows), "the memory is used up")
            else:
                methods.append(method)
        yield methods
    finally:
        for method in methods:
            method.close()
        methods.clear()
        gc.collect()
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_decode(
    names: Sequence[str],
    subject: Subject,
    window: int,
    rows: int,
    rounds: int,
    bandwidth: Bandwidth,
    leave: Leave,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One entry a method; see ``_entry``."""
    torch.compiler.reset()  # torch compiles one piece of code for a few shapes only; others are over and done with
    with filled(names, subject, window, rows, leave) as methods:
        peaks: dict[str, int] = {}

        def turn_of(method: Method) -> Callable[[], float]:
            def turn() -> float:
                with peak_bytes(subject.device) as peak:
                    found = method.turn()
                peaks[method.name] = max(peaks.get(method.name, 0), peak.above)
                return found

            return turn

        found = take_turns({method.name: turn_of(method) for method in methods}, rounds, tell)
        return [_entry(method, found[method.name], bandwidth, peaks[method.name]) for method in methods]


def _entry(method: Method, milliseconds: list[float], bandwidth: Bandwidth, peak: int) -> dict[str, Any]:
    """What was found of a method, ready for JSON.

    ``working_bytes``: the most that a turn took beyond what the process held before it.
    """
    ms = summary(milliseconds)
    entry: dict[str, Any] = {
        "method": method.name,
        "window": method.window,
        "rows": method.rows,
        "ms_per_step": ms,
        "tokens_per_s": round(method.rows * 1000 / ms["median"], 2),
        "context": method.context,
        "steps": method.tokens,
        "weight_bytes": method.weight_bytes,
        "cache_bytes": method.cache_bytes,
        "working_bytes": peak,
    }
    if method.step_bytes is not None:
        floor = bandwidth.floor_ms(method.step_bytes)
        entry |= {"floor_ms": round(floor, 4), "share_of_floor": round(floor / ms["median"], 4)}
    return entry


def _at(name: str, window: int, rows: int) -> str:
    return f"{name} at window {window}" + (f" with {rows} rows" if rows > 1 else "")
