"""Does a larger cache foresee better? Caches of several sizes on the same text (paper, table 6: not always)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamllm.config import CacheConfig, check_count
from streamllm.errors import ConfigError
from streamllm.evaluate.evaluation import TOKENS, Evaluation, Figures, bounds, option, spell_interval, whiskers
from streamllm.evaluate.methods import cache_maker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from streamllm.evaluate.desk import Desk

SHARES = (16, 8, 4, 2, 1)
"""Default sizes: these parts of the trained length, the last one less a block."""


@dataclass(frozen=True)
class CacheSize(Evaluation):
    """See the module.

    Args:
        sizes: tokens cached, sinks included, rising; empty: parts of the trained length.
        sinks: initial tokens among them.
        tokens: of the text at most.
        block: tokens that leave together.
        every_document: put the tokenizer's begin token in front of every document, not only of the first.

    Raises:
        ConfigError: a value is out of range.
    """

    sizes: tuple[int, ...] = option((), "Tokens cached; parts of the trained length if left out.")
    sinks: int = CacheConfig.sinks
    tokens: int | None = option(TOKENS, "Of the text at most.")
    block: int = CacheConfig.block
    every_document: bool = option(False, "Begin every document with the begin token, not only the first.")

    name: ClassVar[str] = "cache-size"
    title: ClassVar[str] = "Perplexity by size of the cache"
    quick: ClassVar[dict[str, Any]] = {"tokens": 3000, "sizes": (32, 64, 128)}

    def __post_init__(self) -> None:
        CacheConfig(self.sinks, block=self.block)
        if any(b <= a for a, b in zip((self.sinks, *self.sizes), self.sizes, strict=False)):
            raise ConfigError(
                f"Give rising sizes above the {self.sinks} sinks that they include, you gave {list(self.sizes)}."
            )
        if self.tokens is not None:
            check_count("tokens", self.tokens, 2)

    def run(self, desk: Desk) -> Figures:
        """Read the text once for each size."""
        from streamllm.cache import SinkCache

        limit = SinkCache(desk.model, self.sinks, block=self.block).spec.limit
        sizes = self.sizes or tuple(
            sorted({min(limit // share, limit - self.block + 1) for share in SHARES if limit // share > self.sinks})
        )
        for size in sizes:  # refused before the first is measured
            SinkCache(desk.model, self.sinks, size - self.sinks, self.block)
        text = desk.text(self.tokens, least=sizes[-1] + self.block + 1, every_document=self.every_document)
        total = text.ids.shape[1]
        with desk.work(len(sizes) * (total - 1)):
            curves = {
                size: desk.stream(
                    f"{self.sinks}+{size - self.sinks}",
                    text.ids,
                    cache_maker("streaming", desk.model, self.sinks, size - self.sinks, self.block),
                )
                for size in sizes
            }
        largest = curves[sizes[-1]]
        return {
            "tokens": total,
            "files": text.files,
            "sinks": self.sinks,
            "sizes": list(sizes),
            "perplexity": {str(size): curve.interval() for size, curve in curves.items()},
            "ratio": {str(size): curve.ratio(largest) for size, curve in curves.items() if curve is not largest},
            "cache_bytes": {str(size): max(curve.cache_bytes) for size, curve in curves.items()},
            "ms_per_token": {str(size): 1000 * sum(curve.seconds) / curve.done for size, curve in curves.items()},
        }

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """A line a size."""
        sizes, sinks = figures["sizes"], figures["sinks"]
        rows: list[tuple[str, ...]] = [
            ("cache", "perplexity", f"beside {sizes[-1]}, same tokens", "memory", "ms a token")
        ]
        for size in sizes:
            ratio = figures["ratio"].get(str(size))
            rows.append(
                (
                    f"{sinks} + {size - sinks}",
                    spell_interval(figures["perplexity"][str(size)]),
                    spell_interval(ratio, 4) if ratio else "",
                    f"{figures['cache_bytes'][str(size)] / 1e6:.2f} MB",
                    f"{figures['ms_per_token'][str(size)]:.2f}",
                )
            )
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """Whether the largest is the best, on the same tokens."""
        *smaller, largest = figures["sizes"]
        words = f"With {largest} tokens cached the perplexity is {spell_interval(figures['perplexity'][str(largest)])}"
        if not smaller:
            return f"{words}; no other size was tried."
        ratios = {size: figures["ratio"][str(size)] for size in smaller}
        best = min(ratios, key=lambda size: ratios[size][0])
        if bounds(ratios[best])[1] < 1:
            return f"{words}; larger is not better: {best} tokens have {spell_interval(ratios[best], 4)} times that."
        alike = [str(size) for size in smaller if bounds(ratios[size])[0] <= 1]
        if alike:
            return f"{words}; {', '.join(alike)} cannot be told from it on this text."
        return f"{words}, the lowest: the next best, {best} tokens, has {spell_interval(ratios[best], 4)} times that."

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """Perplexity by size, as a share of that with the largest."""
        from streamllm.evaluate.figure import COLORS, make_figure

        figure, (axes,) = make_figure(f"{figures['sinks']} sinks + window")
        sizes, largest = figures["sizes"], figures["sizes"][-1]
        shares = [figures["ratio"].get(str(size), [1.0, 1.0, 1.0]) for size in sizes]
        values = [share[0] for share in shares]
        axes.errorbar(sizes, values, whiskers(shares), marker="o", capsize=3, color=COLORS["streaming"])
        axes.axhline(1, color="0.7", lw=0.8, zorder=0)
        for size, value in zip(sizes, values, strict=True):
            words = f"{figures['perplexity'][str(size)][0]:.4g}"
            axes.annotate(words, (size, value), xytext=(8, 8), textcoords="offset points", fontsize="small")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.margins(0.1)
        title = f"perplexity, and as a share of that with {largest}"
        axes.set(title=title, xlabel="tokens cached", ylabel="ratio, same tokens")
        return figure
