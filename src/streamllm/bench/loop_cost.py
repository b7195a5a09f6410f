"""What the loop of ``stream()`` costs beside the step: the draw, and the text with its counters.

The loop's own parts (``loop.Turn``, its sampler) are timed one by one around the step, over whole cycles of evictions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from streamllm.bench.bandwidth import wait
from streamllm.bench.decode import Leave
from streamllm.bench.method import Misfit
from streamllm.bench.ours import Stepper, make_cache
from streamllm.bench.rounds import summary
from streamllm.bench.subject import Subject
from streamllm.config import SamplingConfig
from streamllm.loop import Turn


def measure_loop(
    subject: Subject, window: int, rounds: int, leave: Leave, tell: Callable[[str], None], *, compiles: bool
) -> dict[str, Any] | None:
    """Milliseconds a token of drawing (the default way, and greedily), of making text, and of the step, by rounds."""
    try:
        stepper = Stepper(subject.model, lambda count: make_cache(subject, window, count), compiles=compiles)
    except Misfit as reason:
        leave("the cost of the loop", str(reason))
        return None
    stepper.read(subject.ids(1, stepper.capacity))
    logits = stepper.step(subject.ids(1, 1))
    found: dict[str, list[float]] = {"draw": [], "greedy_draw": [], "text": [], "step": []}
    for number in range(rounds + 1):
        tell("loop")
        turn = Turn(subject.model, subject.tokenizer, stepper.caches[0], None, sampling=SamplingConfig(seed=number))
        greedy = Turn(subject.model, subject.tokenizer, stepper.caches[0], None, sampling=SamplingConfig(temperature=0))
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(subject.block):
            marks = [time.perf_counter()]
            greedy.sampler(logits[0])
            marks.append(time.perf_counter())
            token = turn.sampler(logits[0])
            marks.append(time.perf_counter())
            turn.take(token, logits[0])
            marks.append(time.perf_counter())
            logits = stepper.step(torch.tensor([[token]]))
            wait(subject.device)
            marks.append(time.perf_counter())
            spans = (1000 * (after - before) for before, after in itertools.pairwise(marks))
            for name, span in zip(("greedy_draw", "draw", "text", "step"), spans, strict=True):
                times[name].append(span)
        for name in found if number else ():  # the first round does not count
            found[name].append(median(times[name]))
    parts = {f"{name}_ms": summary(values) for name, values in found.items()}
    loop = parts["draw_ms"]["median"] + parts["text_ms"]["median"]
    return {"window": window, **parts, "share": round(loop / (loop + parts["step_ms"]["median"]), 5)}
