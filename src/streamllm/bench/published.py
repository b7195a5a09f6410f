"""Figure 10 of the paper (arXiv 2309.17453): milliseconds per token on one A6000, by cache size."""

from __future__ import annotations

SIZES = (256, 512, 1024, 2048, 4096)

FIGURE_10: dict[str, dict[str, tuple[int, ...]]] = {
    "7B": {"recompute": (63, 103, 223, 523, 1411), "streaming": (31, 31, 35, 45, 65)},
    "13B": {"recompute": (99, 169, 361, 860, 2355), "streaming": (48, 52, 60, 75, 106)},
}
"""By the size of Llama-2."""
