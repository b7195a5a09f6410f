"""What evictions and restarts of positions cost: steps with one beside the steps without, in the same cycle.

Two caches take turns. One belongs to the model as it is, whose positions restart once in many evictions; the other to
the same model, had it been trained on no more positions than the cache holds, so that each eviction restarts them. The
step with the eviction, amid a turn, less the median of the others is what an eviction costs; the difference of the two
caches is what a restart costs.
"""

from __future__ import annotations

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
from streamllm.bench.subject import Subject, one_by_one


class Cycle:
    """A full cache that is read by the compiled step, one cycle of evictions after the other."""

    def __init__(self, subject: Subject, window: int, positions: int | None, *, compiles: bool) -> None:
        self.subject = subject
        known = subject.spec if positions is None else subject.limited(positions)
        self.stepper = Stepper(
            subject.model, lambda count: make_cache(subject, window, count, known=known), compiles=compiles
        )
        # A turn does not begin with the eviction: its first steps also find the processor's caches cold.
        self.stepper.read(subject.ids(1, self.stepper.capacity - subject.block // 2))
        self.turn()

    def turn(self) -> tuple[float, float]:
        """Milliseconds of the step with the eviction, and the median of those without."""
        block, device = self.subject.block, self.subject.device
        times = []
        for ids in one_by_one(self.subject.ids(1, block)):
            wait(device)
            began = time.perf_counter()
            self.stepper.step(ids)
            wait(device)
            times.append((time.perf_counter() - began) * 1000)
        return times.pop(block // 2), median(times[block // 4 :])


def measure_upkeep(
    subject: Subject, window: int, rounds: int, leave: Leave, tell: Callable[[str], None], *, compiles: bool = True
) -> dict[str, Any] | None:
    """Milliseconds of an eviction and of a restart, and both by the token, as a share of the time of a token."""
    torch.compiler.reset()
    capacity = window + subject.block - 1
    try:
        plain = Cycle(subject, window, None, compiles=compiles)
        restarting = Cycle(subject, window, capacity, compiles=compiles)
    except Misfit as reason:
        leave("the cost of evictions", str(reason))
        return None
    evictions, restarts, steps = [], [], []
    for _ in range(rounds):
        tell("evictions")
        first, step = plain.turn()
        evictions.append(first - step)
        steps.append(step)
        tell("restarts")
        both, step = restarting.turn()
        restarts.append(both - step - evictions[-1])
    block = subject.block
    between = ((subject.spec.limit - capacity) // block + 1) * block
    per_token = max(0.0, median(evictions)) / block + max(0.0, median(restarts)) / between
    return {
        "window": window,
        "block": block,
        "tokens_between_restarts": between,
        "ms_per_step": summary(steps),
        "ms_per_eviction": summary(evictions),
        "ms_per_restart": summary(restarts),
        "ms_per_token": round(per_token, 5),
        "share": round(per_token / (per_token + median(steps)), 5),
    }
