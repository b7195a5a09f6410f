"""What the window alone costs: attention and the upkeep of the cache, without the weights.

A step of the whole model is mostly weights, and a small difference of two large times is mostly noise. So the same
code runs in a *thin* model: as many layers, heads and key-value heads of the same size, but hidden states of a few
numbers, so that its matrices weigh next to nothing. Of its time at a window, its time at a tiny window is taken off,
turn by turn: what is left grows with the window, and neither Python nor kernel launches are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from streamllm.bench.decode import Leave, filled
from streamllm.bench.method import Method
from streamllm.bench.rounds import summary, take_turns
from streamllm.bench.subject import Subject

COMPARED = ("compiled", "eager", "dense", "paper", "paper-sdpa")
"""Methods whose window can be told apart from their weights."""


def measure_window(
    names: Sequence[str], subject: Subject, window: int, rounds: int, leave: Leave, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One entry a method: milliseconds a step of the thin model, at the window and at a tiny one, and what is between.

    Empty where the model has no thin twin.
    """
    thin = subject.thin()
    names = [name for name in names if name in COMPARED]
    tiny = subject.sinks + subject.block
    if thin is None or not names or window <= 2 * tiny:
        if names:
            leave("the cost of the window alone", "it is told for Llamas, and for windows far beyond the block")
        return []
    torch.compiler.reset()
    with filled(names, thin, window, 1, leave) as wide, filled(names, thin, tiny, 1, leave) as narrow:
        both: dict[str, Method] = {f"{method.name}+": method for method in wide}
        both |= {f"{method.name}-": method for method in narrow}
        found = take_turns({name: method.turn for name, method in both.items()}, rounds, tell)
    entries = []
    for name in names:
        above, below = found.get(f"{name}+"), found.get(f"{name}-")
        if above and below:
            entries.append(
                {
                    "method": name,
                    "window": window,
                    "tiny": tiny,
                    "ms": summary([a - b for a, b in zip(above, below, strict=True)]),
                    "ms_at_window": summary(above),
                    "ms_at_tiny": summary(below),
                }
            )
    return entries
