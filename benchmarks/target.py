"""Targets on the terminal; what a target is stands in ``streamllm.bench.target``."""

from __future__ import annotations

from collections.abc import Sequence

from streamllm.bench.target import Target, rows_of

__all__ = ["Target", "print_targets"]


def print_targets(targets: Sequence[Target]) -> None:
    """Print one line a target: its name, value, limit and verdict."""
    width = max(len(target.name) for target in targets)
    for name, *cells in rows_of(targets):
        print(f"{name:<{width}}", *cells, sep="  ")
