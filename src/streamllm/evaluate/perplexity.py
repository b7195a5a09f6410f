"""Perplexity along a stream, methods side by side (paper, figures 3 and 5, table 1).

Protocol of the paper: the loss of every token counts, the warm-up included; the cache is carried across documents.
The head of the text, which every method reads as far as it can, shows where they part; the rest is read by those whose
memory is bounded. Whether the stream wears out is told by its last tenth, which fresh streams with the same sinks
read, too, one for each stretch: perplexities of other passages differ because the passages do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamllm.config import PREFILL_CHUNK, CacheConfig, check_count
from streamllm.evaluate.evaluation import Evaluation, Figures, bounds, option, spell_interval
from streamllm.evaluate.methods import DENSE_CONTEXTS, METHODS, cache_maker, check_methods, dense_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from streamllm.cache import SinkCache
    from streamllm.evaluate.desk import Desk

WORN = 1.01
"""The end of a stream has worn out if its perplexity is surely so many times that of fresh ones."""

ONLY_HEAD = ("dense", "recompute")
"""Methods that do not read the whole text: one would fill the memory, the other takes too long."""


@dataclass(frozen=True)
class Perplexity(Evaluation):
    """See the module.

    Args:
        methods: of ``METHODS``.
        tokens: of the text at most; ``None``: all of it.
        sinks, window, block, kv_dtype: of the cache (``CacheConfig``).
        step: tokens of a forward; 1 reads token by token, as the paper's reference does.
        dense_limit: tokens of the head, which dense attention reads too; ``None``: 8 trained lengths, or what fits
            into the memory.
        recompute_limit: tokens that re-computation at every token reads.
        every_document: put the tokenizer's begin token in front of every document, not only of the first.

    Raises:
        ConfigError: a value is out of range.
    """

    methods: tuple[str, ...] = option(METHODS, "Side by side.")
    tokens: int | None = option(None, "Of the text at most; all of it if left out.")
    sinks: int = CacheConfig.sinks
    window: int | None = CacheConfig.window
    block: int = CacheConfig.block
    kv_dtype: str = CacheConfig.kv_dtype
    step: int = option(PREFILL_CHUNK, "Tokens of a forward; changes the time only.")
    dense_limit: int | None = option(None, "Tokens that dense attention reads; 8 trained lengths if left out.")
    recompute_limit: int = option(2000, "Tokens that re-computation at every token reads.")
    every_document: bool = option(False, "Begin every document with the begin token, not only the first.")

    name: ClassVar[str] = "perplexity"
    title: ClassVar[str] = "Perplexity along a stream, methods side by side"
    quick: ClassVar[dict[str, Any]] = {"tokens": 3000, "window": 124, "dense_limit": 1200, "recompute_limit": 200}

    def __post_init__(self) -> None:
        CacheConfig(self.sinks, self.window, self.block, kv_dtype=self.kv_dtype)
        check_methods(self.methods)
        check_count("step", self.step, 1)
        check_count("recompute_limit", self.recompute_limit, 2)
        for name, value in (("tokens", self.tokens), ("dense_limit", self.dense_limit)):
            if value is not None:
                check_count(name, value, 2)

    def run(self, desk: Desk) -> Figures:
        """Read the head with all methods, and all of the text with those that can."""
        import numpy as np

        from streamllm.cache import SinkCache
        from streamllm.evaluate.curve import Curve

        fitted = SinkCache(desk.model, self.sinks, self.window, self.block, kv_dtype=self.kv_dtype)
        window, trained = fitted.config.window, fitted.spec.trained_length
        assert window is not None
        text = desk.text(self.tokens, least=fitted.capacity + 2, every_document=self.every_document)
        total = text.ids.shape[1]
        head = min(total, self.dense_limit or DENSE_CONTEXTS * fitted.spec.limit)
        dense = dense_tokens(desk.model, fitted.spec, self.dense_limit)
        limits = {"dense": min(head, dense), "recompute": min(head, self.recompute_limit)}
        makers = {m: cache_maker(m, desk.model, self.sinks, window, self.block, self.kv_dtype) for m in self.methods}
        endless = [m for m in self.methods if m not in ONLY_HEAD] if total > head else []
        steps = sum(limits.get(m, head) - 1 for m in self.methods) + len(endless) * (total - 1)
        fresh = _fresh_parts(total - 1, fitted) if "streaming" in endless else []
        steps += sum(self.sinks + end - begin for begin, _, end in fresh)
        found: Figures = {
            "tokens": total,
            "files": text.files,
            "cache": {"sinks": self.sinks, "window": window, "block": self.block, "kv_dtype": self.kv_dtype},
            "trained_length": trained,
            "head": {"tokens": head, "methods": {}},
            "stream": None,
        }
        with desk.work(steps):
            curves = {
                m: desk.stream(f"{m}, head", text.ids[:, : limits.get(m, head)], makers[m], step=self.step, points=head)
                for m in self.methods
            }
            found["head"]["methods"] = _compare(curves)
            if endless:
                curves = {m: desk.stream(m, text.ids, makers[m], step=self.step) for m in endless}
                found["stream"] = {"tokens": total, "methods": _compare(curves), "last_tenth": None}
            if fresh:
                parts = [
                    desk.stream(
                        f"fresh stream at {first}",
                        np.concatenate([text.ids[:, : self.sinks], text.ids[:, begin : end + 1]], axis=1),
                        makers["streaming"],
                        step=self.step,
                        points=total - 1,
                        skip=self.sinks + first - begin,
                    )
                    for begin, first, end in fresh
                ]
                last = curves["streaming"].tail(len(parts))
                found["stream"]["last_tenth"] = last.ratio(Curve.of_stretches(parts))
        return found

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """A line a method."""
        rows: list[tuple[str, ...]] = [
            (
                "method",
                "tokens",
                "perplexity",
                "beside streaming, same tokens",
                "tokens a forward",
                "ms a token",
                "cache",
            )
        ]
        for part in ("head", "stream"):
            for name, found in (figures[part] or {"methods": {}})["methods"].items():
                beside = spell_interval(found["ratio"]) if found["ratio"] else ""
                rows.append(
                    (
                        name,
                        f"{found['tokens']:,}",
                        spell_interval(found["perplexity"]),
                        beside,
                        f"{found['tokens'] / found['curve']['forwards']:.0f}",
                        f"{found['ms_per_token']:.2f}",
                        f"{found['cache_bytes'] / 1e6:.2f} MB",
                    )
                )
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """What becomes of each method."""
        part = figures["stream"] or figures["head"]
        found = part["methods"].get("streaming")
        if not found:
            return f"{part['tokens']:,} tokens read; streaming was not among the methods."
        sentences = [
            f"The stream of {found['tokens']:,} tokens has perplexity {spell_interval(found['perplexity'])} in "
            f"{found['cache_bytes'] / 1e6:.2f} MB of cache."
        ]
        fresh = part.get("last_tenth")
        if fresh:
            worn = (
                "it wears out" if bounds(fresh)[0] > WORN else "it does not wear out" if bounds(fresh)[1] < WORN else ""
            )
            sentences.append(
                f"Its last tenth has {spell_interval(fresh, 4)} times the perplexity of fresh streams with the same "
                f"sinks{f': {worn}' if worn else ''}."
            )
        for name in METHODS:
            some = next((p["methods"][name] for p in (part, figures["head"]) if name in p["methods"]), None)
            if some and some["ratio"]:
                sentences.append(
                    f"Over the same {some['tokens']:,} tokens {name} has {spell_interval(some['ratio'])} times the "
                    "perplexity of streaming."
                )
        return " ".join(sentences)

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """Log perplexity and memory against tokens: the field's picture."""
        from streamllm.evaluate.curve import Curve
        from streamllm.evaluate.figure import COLORS, make_figure

        sizes, both = figures["cache"], figures["stream"] is not None
        title = f"{sizes['sinks']} + {sizes['window']} tokens cached, blocks of {sizes['block']}"
        title += "" if sizes.get("kv_dtype", "auto") == "auto" else f", in {sizes['kv_dtype']}"
        figure, axes = make_figure(title, 3, rows=2 if both else 1)
        for row, part in enumerate(("head", "stream") if both else ("head",)):
            losses, memory, times = axes[3 * row : 3 * row + 3]
            size = figures[part]["tokens"]
            scale, unit = (1e6, "million tokens") if size >= 1e6 else (1000, "thousand tokens")
            for name, found in figures[part]["methods"].items():
                curve, style = Curve.from_dict(found["curve"]), {"color": COLORS[name], "label": name, "lw": 1.5}
                at = [place / scale for place in curve.places]
                if part == "head":
                    losses.plot(at, curve.means, **style)
                    memory.plot(at, [n / 1e6 for n in curve.cache_bytes], **style)
                else:
                    if name == "streaming":  # the others' lie upon it
                        losses.plot(at, curve.means, color=COLORS[name], lw=0.5, alpha=0.4)
                    losses.plot(at, curve.running, **style)
                    memory.plot(at, [n / 1e6 for n in curve.memory_bytes], **style)
                times.plot(at, [1000 * s / n for s, n in zip(curve.seconds, curve.counts, strict=True)], **style)
            trained = figures["trained_length"]
            if part == "head" and trained and trained < size:
                losses.axvline(trained / scale, color="0.6", lw=0.8, ls=":")
                losses.text(trained / scale, losses.get_ylim()[0], " trained length", va="bottom", fontsize="x-small")
            means = "" if part == "head" else ", so far (thin: streaming, by stretch)"
            losses.set(title=f"log perplexity{means}", xlabel=unit, ylabel="nats a token")
            kind = "keys and values" if part == "head" else "memory of all that runs"
            memory.set(title=kind, xlabel=unit, ylabel="MB", ylim=(0, 1.1 * memory.get_ylim()[1]))
            spent = [found["ms_per_token"] for found in figures[part]["methods"].values()]
            times.set(title="time", xlabel=unit, ylabel="ms a token")
            if max(spent) > 5 * min(spent):  # re-computation is beside the others
                times.set_yscale("log")
            else:
                times.set_ylim(0, 1.1 * times.get_ylim()[1])
            losses.legend(fontsize="small")
        return figure


def _fresh_parts(losses: int, cache: SinkCache) -> list[tuple[int, int, int]]:
    """Where fresh streams begin, count from, and end, for each stretch of the last tenth of ``losses``.

    Each evicts and restarts its positions at the same tokens as the long stream, because how many tokens are seen, and
    where, changes with these.
    """
    from streamllm.evaluate.curve import Curve

    sinks, block, stretch = cache.config.sinks, cache.config.block, Curve(losses).stretch
    period = ((cache.spec.limit - cache.capacity) // block + 1) * block
    count = -(-losses // stretch)
    parts = []
    for first in range((count - count // 10) * stretch, losses, stretch):
        begin = sinks + (first - cache.capacity - 2 * sinks) // period * period
        if begin < sinks:
            return []
        parts.append((begin, first, min(first + stretch, losses)))
    return parts


def _compare(curves: dict[str, Any]) -> dict[str, Any]:
    """Figures of each method, and the ratio to streaming on the same tokens."""
    base = curves.get("streaming")
    found = {}
    for name, curve in curves.items():
        comparable = base is not None and name != "streaming" and min(curve.done, base.done) >= base.stretch
        found[name] = {
            "tokens": curve.done,
            "perplexity": curve.interval(),
            "ratio": curve.ratio(base) if comparable else None,
            "ms_per_token": 1000 * sum(curve.seconds) / curve.done,
            "cache_bytes": max(curve.cache_bytes),
            "curve": curve.to_dict(),
        }
    return found
