"""The figures of a run as rows for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamllm.bench.published import FIGURE_10, SIZES
from streamllm.bench.target import Target, rows_of
from streamllm.bench.verdict import Figures
from streamllm.checkpoint import size

Rows = list[tuple[str, ...]]


def tables(figures: Figures, targets: list[Target]) -> Iterator[tuple[str, Rows]]:
    """Titles and tables, their heads first."""
    speed = figures["bandwidth"]
    best = max(speed.values())
    yield (
        f"decoding; this machine reads {best:.1f} GB/s (product {speed['product']:.1f}, sum {speed['sum']:.1f})",
        [
            ("window", "rows", "method", "ms/step", "spread", "tok/s", "context", "floor", "share", "cache", "working"),
            *(_decode(entry) for entry in figures["decode"]),
        ],
    )
    head: tuple[str, ...]
    if figures["prefill"]:
        head = ("prompt", "method", "tok/s", "first token, ms", "spread")
        yield "reading a prompt", [head, *(_prefill(entry) for entry in figures["prefill"])]
    if figures["window_alone"]:
        head = ("window", "method", "ms", "spread", "thin step", "thin step, tiny window")
        yield "the window alone", [head, *(_window(entry) for entry in figures["window_alone"])]
    if figures["upkeep"]:
        yield "evictions and restarts of positions", _upkeep(figures["upkeep"])
    if figures["delay"]:
        yield "first token", _delay(figures["delay"])
    if loop := figures.get("loop"):
        head = ("draw", "greedy draw", "text", "step", "loop's share")
        names = ("draw_ms", "greedy_draw_ms", "text_ms", "step_ms")
        cells = (f"{loop[name]['median']:.3f}" for name in names)
        yield "the loop beside the step, ms a token", [head, (*cells, f"{loop['share']:.1%}")]
    if figures["ratios"]:
        head = ("window", "ours", "beside", "times faster", "spread")
        yield "ratios, medians within the rounds", [head, *(_ratio(entry) for entry in figures["ratios"])]
    if figures["published"]:
        yield "the paper's figure 10, Llama-2-7B on one A6000, ms per token", _published(figures["published"])
    if targets:
        head = ("what", "measured", "promised", "")
        yield "targets, set for 135M on two threads and 7B on CUDA", [head, *rows_of(targets)]
    if figures["left_out"]:
        yield "left out", [("what", "why"), *((entry["what"], entry["why"]) for entry in figures["left_out"])]


def _decode(entry: dict[str, Any]) -> tuple[str, ...]:
    ms = entry["ms_per_step"]
    return (
        str(entry["window"]),
        str(entry["rows"]),
        entry["method"],
        _number(ms["median"]),
        f"{ms['spread']:.0%}",
        _number(entry["tokens_per_s"]),
        f"{entry['context']:,.0f}",
        _number(entry["floor_ms"]) if "floor_ms" in entry else "",
        f"{entry['share_of_floor']:.0%}" if "floor_ms" in entry else "",
        size(entry["cache_bytes"]),
        size(entry["working_bytes"]),
    )


def _prefill(entry: dict[str, Any]) -> tuple[str, ...]:
    ms, speed = entry["first_token_ms"], entry["tokens_per_s"]
    return (
        f"{entry['prompt']:,}",
        entry["method"],
        _number(speed["median"]),
        _number(ms["median"]),
        f"{ms['spread']:.0%}",
    )


def _window(entry: dict[str, Any]) -> tuple[str, ...]:
    names = ("ms", "ms_at_window", "ms_at_tiny")
    found, at, tiny = (_number(entry[name]["median"]) for name in names)
    return str(entry["window"]), entry["method"], found, f"{entry['ms']['spread']:.0%}", at, tiny


def _upkeep(found: dict[str, Any]) -> Rows:
    return [
        ("what", "cost", "how often"),
        ("an eviction", f"{_number(found['ms_per_eviction']['median'])} ms", f"once in {found['block']} tokens"),
        (
            "a restart",
            f"{_number(found['ms_per_restart']['median'])} ms",
            f"once in {found['tokens_between_restarts']:,} tokens",
        ),
        ("both", f"{found['ms_per_token']:.4f} ms a token", f"{found['share']:.2%} of its time"),
    ]


def _delay(found: dict[str, Any]) -> Rows:
    alone, beside = (_number(found[f"first_token_ms_{name}"]["median"]) for name in ("alone", "beside"))
    return [
        ("stream", "first token", ""),
        ("alone", f"{alone} ms", ""),
        (f"beside {found['others']} streams", f"{beside} ms", f"{found['ratio']['median']:.2f} x"),
    ]


def _ratio(entry: dict[str, Any]) -> tuple[str, ...]:
    times = entry["times_faster"]
    return str(entry["window"]), entry["of"], entry["beside"], f"{times['median']:.2f}", f"{times['spread']:.0%}"


def _published(found: dict[str, Any]) -> Rows:
    rows = [("cache", *(str(count) for count in SIZES))]
    rows += [(f"paper, {name}", *(str(ms) for ms in values)) for name, values in FIGURE_10["7B"].items()]
    return rows + [(f"here, {name}", *("" if ms is None else _number(ms) for ms in found[name])) for name in found]


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
