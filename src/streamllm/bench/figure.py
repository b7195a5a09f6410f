"""The paper's figure 10, drawn from a record alone: time of a token against the size of the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamllm.bench.catalogue import OURS
from streamllm.bench.published import FIGURE_10, SIZES
from streamllm.bench.verdict import Figures, entry_of, windows
from streamllm.evaluate.figure import COLORS, make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = {
    "compiled": COLORS["streaming"],
    "eager": "#5fb794",
    "int8": "#084c36",
    "dense": COLORS["dense"],
    "recompute": COLORS["recompute"],
    "reread": COLORS["recompute-block"],
    "shift": COLORS["window"],
    "paper": COLORS["one-shot"],
    "paper-sdpa": "#b08cc0",
    "llamacpp-f32": "#1f77b4",
    "llamacpp-f16": "#6baed6",
    "llamacpp-q8_0": "#08306b",
}
"""Colours of the methods."""


def draw(figures: Figures, title: str) -> Figure:
    """Streaming beside re-computation as in the paper, and all methods side by side.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, (ten, every) = make_figure(title, 2)
    streaming = next((name for name in OURS if _points(figures, name)), None)
    chosen = [name for name in (streaming, "recompute") if name and _points(figures, name)]
    for name in chosen:
        _line(ten, figures, name)
    if figures["published"]:
        for name, values in FIGURE_10["7B"].items():
            color = LINES["recompute" if name == "recompute" else "compiled"]
            ten.plot(SIZES, values, "o:", color=color, label=f"paper, {name} (A6000)")
    ten.set_title("as figure 10 of the paper")
    for name in LINES:
        if _points(figures, name):
            _line(every, figures, name)
    every.set_title("all methods")
    for axis in (ten, every):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(windows(figures), [str(window) for window in windows(figures)])
        axis.set_xlabel("tokens in the cache")
        axis.set_ylabel("ms per token")
        for place in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            place(_plain)
        axis.tick_params(axis="y", which="minor", labelsize="x-small")
    if ten.get_legend_handles_labels()[0]:
        ten.legend(fontsize="small")
        every.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _points(figures: Figures, name: str) -> list[tuple[int, float]]:
    """Windows and milliseconds of a method."""
    found = [(window, entry_of(figures, name, window)) for window in windows(figures)]
    return [(window, entry["ms_per_step"]["median"]) for window, entry in found if entry]


def _plain(value: float, _place: float) -> str:
    """A time without powers of ten; on an axis that has room for few, 1, 2 and 5 are enough."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _line(axis: Any, figures: Figures, name: str) -> None:
    axis.plot(*zip(*_points(figures, name), strict=True), "o-", markersize=4, color=LINES[name], label=name)
