"""Figures of a run, drawn from its log and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_run(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss, attention on the first token by layer, and what a stream without first tokens loses, against tokens."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, mass, ratio = figure.subplots(1, 3)
    figure.suptitle(title)
    steps = [row for row in rows if "loss" in row]
    loss.plot([row["tokens"] for row in steps], [row["loss"] for row in steps], color="0.7", lw=0.8, label="training")
    measured = [row for row in rows if "held_out" in row]
    for name in measured[0]["held_out"] if measured else ():
        points = [(row["tokens"], row["held_out"][name]["loss"]) for row in measured]
        loss.plot(*zip(*points, strict=True), marker=".", label=name)
    loss.set(title="loss", ylabel="nats per token")
    loss.legend(fontsize="small")
    seen = [row for row in rows if "sink_mass" in row]
    layers = len(seen[0]["sink_mass"]) if seen else 0
    for layer in range(layers):
        color = colormaps["viridis"](layer / max(1, layers - 1))
        points = [(row["tokens"], row["sink_mass"][layer]) for row in seen]
        mass.plot(*zip(*points, strict=True), color=color, label=f"layer {layer}")
    mass.set(title="attention on the first token", ylabel="share", ylim=(0, None))
    if layers:
        mass.legend(fontsize="x-small", ncols=2)
    ratio.plot([row["tokens"] for row in seen], [row["ratio"] for row in seen], marker=".", color="C3")
    ratio.axhline(1, color="0.7", lw=0.8)
    ratio.set(title="perplexity without sinks / with four", ylabel="ratio")
    for axes in (loss, mass, ratio):
        axes.set_xlabel("tokens trained")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
