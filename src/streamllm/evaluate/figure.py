"""How all figures look, and how they are written. Drawing is done by whoever has something to draw."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.atomic import write_atomically
from streamllm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")

COLORS = {
    "streaming": "#0b6e4f",
    "window": "#d1495b",
    "dense": "#6c757d",
    "recompute": "#e08e0b",
    "recompute-block": "#3d5a99",
    "one-shot": "#7b4b94",
}
"""Of the methods, the same in every figure."""


def make_figure(title: str, columns: int = 1, *, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with ``rows`` x ``columns`` axes, row by row.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Figures need the package matplotlib: pip install 'streamllm[eval]'.") from error
    width = {1: 7.0, 2: 11.0}.get(columns, 14.0)
    figure = Figure(figsize=(width, 4.2 * rows), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``path`` with each of ``FORMATS`` as its ending.

    Raises:
        OSError: the disk is full.
    """
    import matplotlib

    for kind in FORMATS:
        drawn = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "streamllm"}):  # the same figure, the same bytes
            figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        write_atomically(path.with_name(f"{path.name}.{kind}"), drawn.getvalue())


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, to stand inside a page."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    text = drawn.getvalue()
    return text[text.index("<svg") :]
