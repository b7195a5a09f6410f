"""From times to ratios, and from ratios to targets: what of a run's figures was promised, and whether it is kept.

Works on the entries that ``decode``, ``window_alone``, ``upkeep`` and ``delay`` give, so a record tells it again.
Rounds are compared with rounds: both methods of a ratio had a turn in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from streamllm.bench.catalogue import OURS
from streamllm.bench.rounds import ratio, summary
from streamllm.bench.target import Target

Figures = dict[str, Any]
"""What was measured, ready for JSON."""

COMPARED: dict[str, tuple[str, ...]] = {
    "compiled": ("dense", "recompute", "reread", "shift", "paper", "paper-sdpa", "llamacpp-f32"),
    "eager": ("dense", "recompute", "reread", "shift", "paper", "paper-sdpa"),
    "int8": ("dense", "compiled", "llamacpp-q8_0"),
}
"""What each of ours is held against."""


def ratios(figures: Figures) -> list[dict[str, Any]]:
    """How many times faster ours is than each rival, at each window with one row."""
    found = []
    for window in windows(figures):
        for name, rivals in COMPARED.items():
            for rival in rivals:
                values = speedup(figures, name, rival, window)
                if values:
                    found.append({"of": name, "beside": rival, "window": window, "times_faster": summary(values)})
    return found


def speedup(figures: Figures, ours: str, rival: str, window: int) -> list[float]:
    """The rival's time by ours, round by round; empty where one of them was not measured."""
    above, below = (rounds_of(figures, name, window) for name in (rival, ours))
    return ratio(above, below) if above and below else []


def windows(figures: Figures) -> list[int]:
    """The windows that were measured with one row."""
    return sorted({entry["window"] for entry in figures["decode"] if entry["rows"] == 1})


def entry_of(figures: Figures, method: str, window: int, rows: int = 1) -> dict[str, Any] | None:
    """What was measured of a method; ``None``: nothing."""
    wanted = (method, window, rows)
    return next((e for e in figures["decode"] if (e["method"], e["window"], e["rows"]) == wanted), None)


def rounds_of(figures: Figures, method: str, window: int, rows: int = 1) -> list[float]:
    """Milliseconds of a step in each round; empty where it was not measured."""
    entry = entry_of(figures, method, window, rows)
    return list(entry["ms_per_step"]["rounds"]) if entry else []


def targets(figures: Figures) -> list[Target]:
    """The promises that this run can tell, whatever the model; they were made for 135M, and 7B on CUDA."""
    return list(_targets(figures))


def _targets(figures: Figures) -> Iterator[Target]:
    at, ours = figures["plan"]["at"], OURS[0]
    # 1. beside others
    for name, rival, limit in ((ours, "dense", 0.65), (ours, "llamacpp-f32", 1.0), ("int8", "llamacpp-q8_0", 1.0)):
        if values := speedup(figures, rival, name, at):
            yield Target(f"{name} / {rival}, ms per token, window {at}", median(values), limit)
    for window in windows(figures):
        if window >= 1024 and (values := speedup(figures, ours, "recompute", window)):
            yield Target(f"recompute / {ours}, window {window}", median(values), 22.2, at_least=True)
    if values := _paper_alone(figures, ours):
        window = figures["window_alone"][0]["window"]
        yield Target(f"paper / {ours}, window {window} alone", median(values), 20.0, at_least=True)
    # 2. beside the machine
    for window in windows(figures) if figures["device"].startswith("cuda") else [at]:
        if entry := entry_of(figures, ours, window):
            yield Target(f"{ours}, share of the floor, window {window}", entry["share_of_floor"], 0.7, at_least=True)
    # 3. beside itself
    one, eight = (rounds_of(figures, ours, at, rows) for rows in (1, 8))
    if one and eight:
        values = [8 * each for each in ratio(one, eight)]
        yield Target(f"{ours}, tokens per second of 8 rows / 1 row", median(values), 4.0, at_least=True)
    if upkeep := figures["upkeep"]:
        name = f"evictions and restarts, block {upkeep['block']}"
        yield Target(name, 100 * upkeep["share"], 3.0, unit="% of a token's time")
    if delay := figures["delay"]:
        yield Target(f"first token beside {delay['others']} streams / alone", delay["ratio"]["median"], 2.0)


def _paper_alone(figures: Figures, ours: str) -> list[float]:
    """How many times the cost of our window the paper's is, round by round; what is below the noise does not count."""
    rounds = {entry["method"]: entry["ms"]["rounds"] for entry in figures["window_alone"]}
    pairs = zip(rounds.get("paper", ()), rounds.get(ours, ()), strict=False)
    return [theirs / mine for theirs, mine in pairs if mine > 0]
