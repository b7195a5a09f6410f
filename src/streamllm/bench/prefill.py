"""Reading a prompt: tokens per second, and the time to the first token, which is the prompt's and one draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from streamllm.bench.bandwidth import wait
from streamllm.bench.decode import Leave, make_method
from streamllm.bench.method import Misfit
from streamllm.bench.rounds import summary, take_turns
from streamllm.bench.subject import Subject

COMPARED = ("eager", "int8", "dense", "llamacpp-f32", "llamacpp-f16", "llamacpp-q8_0")
"""Methods whose way to read a prompt differs; the compiled step is for single tokens, so it reads as eager does."""

LONG = 4
"""Windows of the long prompt, which only a cache that evicts can read."""


def measure_prefill(
    names: Sequence[str], subject: Subject, window: int, rounds: int, leave: Leave, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One entry a method, for a prompt of one window, and for ours also of ``LONG`` windows."""
    names = ["eager" if name == "compiled" else name for name in names]
    wanted = [(name, 1) for name in COMPARED if name in names]
    wanted += [(name, LONG) for name in ("eager", "int8") if name in names]
    turns: dict[str, Callable[[], float]] = {}
    lengths: dict[str, tuple[str, int]] = {}
    for name, windows in wanted:
        count = windows * window
        try:
            make_method(name, subject, window).close()
        except Misfit as reason:
            if windows == 1:
                leave(f"{name} reading a prompt", str(reason))
            continue
        label = f"{name}, prompt {count}"
        turns[label] = lambda name=name, count=count: _read(name, subject, window, count)  # type: ignore[misc]
        lengths[label] = name, count
    found = take_turns(turns, rounds, tell)
    return [
        {
            "method": name,
            "prompt": count,
            "first_token_ms": summary([1000 * seconds for seconds in found[label]]),
            "tokens_per_s": summary([count / seconds for seconds in found[label]]),
        }
        for label, (name, count) in lengths.items()
    ]


@torch.no_grad()
def _read(name: str, subject: Subject, window: int, count: int) -> float:
    """Seconds from a prompt of ``count`` ids to the first token, with a cache of its own."""
    method = make_method(name, subject, window)
    ids = subject.ids(1, count)
    wait(subject.device)
    began = time.perf_counter()
    method.read(ids).argmax(-1).tolist()
    seconds = time.perf_counter() - began
    method.close()
    return seconds
