"""StreamEval: what does a stream remember? Queries about earlier lines, by distance and along the stream.

Paper, section 4.4, table 7 and figure 9; its data was never released, ``registers`` makes such text. An answer is
right if each of its tokens was the most likely one given all that stands before it in the stream, so that greedy
decoding would have written exactly this answer. The right answers stand in the stream, whatever the model would have
said. No chat template is put around the text: a query is a line that the model completes.

Each distance has streams of its own: were several asked in one stream, the answer to a near query would be a copy of
the line for a far one to find. All distances and methods read the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, ClassVar

from streamllm.config import CacheConfig, check_count
from streamllm.errors import ConfigError
from streamllm.evaluate.evaluation import Evaluation, Figures, option
from streamllm.evaluate.methods import cache_maker, check_methods, dense_tokens
from streamllm.evaluate.registers import encode_pieces, make_draw, stream_blocks, stream_pieces
from streamllm.evaluate.tally import BEYOND, INSIDE, Tally, parts, pool, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers.cache_utils import Cache

    from streamllm.evaluate.desk import Desk

KNOWN = ("streaming", "window", "recompute-block", "dense")
"""Methods that take no longer than there is text."""

BLOCK_TOKENS = 2048
"""Tokens of a stream that are held at once."""

FORGOTTEN = 0.05
"""Accuracy beyond the cache, at most, of what is said to be forgotten."""

ABLE = 0.5
"""Accuracy inside the window below which a model cannot show what lies beyond."""


@dataclass(frozen=True)
class StreamEval(Evaluation):
    """See the module.

    Args:
        distances: a query asks for the line so many lines before the newest one; rising.
        every: lines from one query to the next.
        samples: independent streams for each distance.
        queries: of a stream.
        digits: of a number; one guess in ``10**digits`` is right.
        methods: of ``KNOWN``.
        sinks, window, block: of the cache (``CacheConfig``).
        dense_limit: tokens of a stream that dense attention reads; ``None``: 8 trained lengths, or what fits into the
            memory.
        seed: of the numbers.

    Raises:
        ConfigError: a value is out of range.
    """

    distances: tuple[int, ...] = option((20, 40, 60, 80, 100), "Lines between a query and the line it asks for.")
    every: int = option(10, "Lines from one query to the next.")
    samples: int = option(4, "Independent streams for each distance.")
    queries: int = option(100, "Of a stream.")
    digits: int = option(5, "Of a number.")
    methods: tuple[str, ...] = option(("streaming", "window", "dense"), "Side by side.")
    sinks: int = CacheConfig.sinks
    window: int | None = CacheConfig.window
    block: int = CacheConfig.block
    dense_limit: int | None = option(None, "Tokens that dense attention reads; 8 trained lengths if left out.")
    seed: int = option(0, "Of the numbers.")

    name: ClassVar[str] = "streameval"
    title: ClassVar[str] = "Queries about earlier lines of a stream: what does it remember?"
    quick: ClassVar[dict[str, Any]] = {"distances": (2, 12), "every": 4, "samples": 1, "queries": 10, "window": 188}

    def __post_init__(self) -> None:
        CacheConfig(self.sinks, self.window, self.block)
        check_methods(self.methods, KNOWN)
        if not self.distances or any(b <= a for a, b in pairwise((0, *self.distances))):
            raise ConfigError(f"Give rising distances of at least one line, you gave {list(self.distances)}.")
        for name in ("every", "samples", "queries", "digits"):
            check_count(name, getattr(self, name), 1)
        check_count("seed", self.seed, 0)
        if self.dense_limit is not None:
            check_count("dense_limit", self.dense_limit, 2)

    def check_files(self, files: Sequence[str]) -> None:
        """No files are read.

        Raises:
            ConfigError: there is one.
        """
        if files:
            raise ConfigError(f"StreamEval makes its own text and does not read {files[0]}; leave it out.")

    def run(self, desk: Desk) -> Figures:
        """Read a stream for each method, distance and sample."""
        from streamllm.cache import SinkCache

        fitted = SinkCache(desk.model, self.sinks, self.window, self.block)
        window, capacity, trained = fitted.config.window, fitted.capacity, fitted.spec.trained_length
        assert window is not None
        limits = {"dense": dense_tokens(desk.model, fitted.spec, self.dense_limit)}
        # Tokens back that a method sees at least and at most.
        sees = dict.fromkeys(self.methods, (self.sinks + window, capacity))
        sees |= {"streaming": (window, capacity), "dense": (limits["dense"], limits["dense"])}
        found: dict[str, Any] = {method: {} for method in self.methods}
        with desk.work(len(self.methods) * len(self.distances) * self.samples * self.queries):
            for method, distance in product(self.methods, self.distances):
                tallies = []
                for sample in range(self.samples):
                    name = f"{method}, {distance} lines, {sample + 1}"
                    make_cache = cache_maker(method, desk.model, self.sinks, window, self.block)
                    read = partial(self._read, desk, make_cache, distance, sample, limits.get(method), name)
                    tallies.append(desk.part(name, read, steps=self.queries))
                found[method][str(distance)] = summarise(tallies, *sees[method])
        return {
            "cache": {"sinks": self.sinks, "window": window, "block": self.block, "capacity": capacity},
            "trained_length": trained,
            "chance": 10.0**-self.digits,
            "methods": found,
        }

    def _read(
        self, desk: Desk, make_cache: Callable[[], Cache], distance: int, sample: int, limit: int | None, words: str
    ) -> dict[str, Any]:
        """Read one stream up to its last query, or to token ``limit``, and count; ready for JSON."""
        import torch

        from streamllm.evaluate.scores import score_stream

        cache = make_cache()
        draw = make_draw(self.seed, sample)
        pieces = stream_pieces(draw, distance=distance, every=self.every, digits=self.digits)
        tally = Tally()
        asked = read = 0  # queries, and tokens that are in the cache
        waiting: list[int] = []  # the last token, which is not
        for ids, found in stream_blocks(encode_pieces(desk.tokenizer, pieces), BLOCK_TOKENS):
            answers, end = found[: self.queries - asked], read + len(waiting) + len(ids)
            if asked + len(answers) == self.queries:
                end = answers[-1].end
            if limit is not None and end > limit:
                answers, end = [answer for answer in answers if answer.end <= limit], limit
            part = torch.tensor([[*waiting, *ids][: end - read]])
            right: list[bool] = []  # of the part's tokens from the second on
            for scores in score_stream(desk.model, part, cache):
                right += scores.hits[0].tolist()
                desk.advance(0, words)
            answers = [answer for answer in answers if answer.end - read - 1 <= len(right)]
            if len(right) < part.shape[1] - 1:  # a cache that grows could not read on
                limit = end
            for number, answer in enumerate(answers, start=asked):
                if answer.content_begin >= self.sinks:  # a number among the sinks never leaves
                    tally.add(
                        number / self.queries, answer, all(right[answer.begin - read - 1 : answer.end - read - 1])
                    )
            asked, read, waiting = asked + len(answers), end - 1, ids[-1:]
            desk.advance(len(answers), words)
            if asked == self.queries or end == limit:
                break
        desk.advance(self.queries - asked, words)
        return tally.to_dict()

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """A line for each method and distance."""
        rows: list[tuple[str, ...]] = [
            ("method", "lines", "tokens", "in the cache", "queries", "right", "first tenth", "last tenth")
        ]
        for method, distances in figures["methods"].items():
            for distance, found in distances.items():
                tenths = parts(found)
                rows.append(
                    (
                        method,
                        distance,
                        "-".join(f"{n:,}" for n in sorted(set(found["reach"] or ()))),
                        found["held"] or "",
                        f"{sum(found['counts']):,}",
                        _percent(found["accuracy"]) if found["accuracy"] else "not reached",
                        *(f"{part.right / part.asked:.0%}" if part.asked else "" for part in (tenths[0], tenths[-1])),
                    )
                )
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """Accuracy inside the window against beyond it; or that this model cannot show it."""
        from streamllm.evaluate.share import share

        methods, window, chance = figures["methods"], figures["cache"]["window"], figures["chance"]
        main = "streaming" if "streaming" in methods else next(iter(methods))
        inside, beyond = (pool(methods[main], held) for held in (INSIDE, BEYOND))
        if not inside[1]:
            return (
                f"No line that was asked for lies inside the window of {window:,} tokens: ask for nearer ones with "
                "--distances, or widen it with --window."
            )
        near, far = share(*inside), share(*beyond)
        rates = [found["accuracy"][0] for found in methods[main].values() if found["held"] == INSIDE]
        spread = f" ({min(rates):.0%} to {max(rates):.0%} by distance)" if len(rates) > 1 else ""
        right = f"{_percent(near)} of the queries about lines inside the window of {window:,} tokens{spread}"
        guess = f"chance is {100 * chance:.{max(0, round(-math.log10(chance)) - 2)}f}%"
        if near[1] < ABLE:
            able = "cannot do the task" if near[1] <= chance else "does not surely do the task"
            return (
                f"This model {able}: it answers {right} ({guess}), so what it answers beyond says nothing about the "
                "cache. Take a model that copies better."
            )
        words = f"With {main}, the model answers {right}"
        if not beyond[1]:
            return f"{words} ({guess}); no line that was asked for lies beyond the cache."
        if far[1] > chance:
            end = "which is more than chance"
        elif far[2] > max(FORGOTTEN, 2 * chance):
            end = "too few queries to tell whether it is forgotten"
        else:
            end = "what has left the cache is forgotten"
        return f"{words}, and {_percent(far)} of those about lines beyond the cache ({guess}): {end}."

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """Accuracy by distance, and along the stream."""
        from streamllm.evaluate.figure import COLORS, make_figure

        cache, methods = figures["cache"], figures["methods"]
        window, capacity = cache["window"], cache["capacity"]
        figure, (table, along) = make_figure(f"sinks: {cache['sinks']}, window: {window:,} tokens", 2)
        ticks: dict[float, str] = {}
        for method, distances in methods.items():
            asked = [(distance, found) for distance, found in distances.items() if found["accuracy"]]
            places = [sum(found["reach"]) / 2 for _, found in asked]
            ticks |= {place: f"{distance}\n({place:,.0f})" for place, (distance, _) in zip(places, asked, strict=True)}
            rates = [found["accuracy"] for _, found in asked]
            errors = [[max(0.0, r[0] - r[1]) for r in rates], [max(0.0, r[2] - r[0]) for r in rates]]  # rounding
            # Where nothing is lost, the window's line lies on that of the stream.
            style: dict[str, Any] = {"color": COLORS[method], "ls": "--" if method == "window" else "-", "marker": "o"}
            table.errorbar(places, [r[0] for r in rates], errors, capsize=3, label=method, **style)
            if asked:
                _draw_along(along, asked[0][1], label=f"{method}, {asked[0][0]} lines back", **style)
        beyond = [item for item in methods.get("streaming", {}).items() if item[1]["held"] == BEYOND]
        for distance, found in beyond[:1]:
            style = {"color": COLORS["streaming"], "ls": ":", "marker": "o", "mfc": "white"}
            _draw_along(along, found, label=f"streaming, {distance} lines back", **style)
        nearest, farthest = min([capacity, *ticks]), max([capacity, *ticks])
        table.set_xscale("log")
        table.minorticks_off()
        table.axvspan(nearest / 1.3, window, color=COLORS["streaming"], alpha=0.07, lw=0)
        table.axvspan(window, capacity, color="0.5", alpha=0.15, lw=0)
        table.text(nearest / 1.3, 1.03, " inside the window", fontsize="small", color=COLORS["streaming"])
        table.set_xticks(list(ticks), list(ticks.values()), fontsize="small")
        table.set_xlim(nearest / 1.3, farthest * 1.1)
        table.set(title="by distance", xlabel="lines (tokens) back to the line asked for", ylabel="right answers")
        if figures["trained_length"] and "dense" in methods:
            along.axvline(figures["trained_length"] / 1000, color="0.6", lw=0.8, ls=":")
            along.text(figures["trained_length"] / 1000, 1.03, " trained length", fontsize="small", color="0.4")
        along.set(title="along the stream", xlabel="thousand tokens")
        along.set_xlim(0, None)
        for axes in (table, along):
            axes.set_ylim(-0.04, 1.1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.legend(fontsize="small", loc="center right")
        return figure


def _percent(found: Sequence[float]) -> str:
    """A share with its confidence interval."""
    value, low, high = (100 * each for each in found)
    return f"{value:.1f}% ({low:.1f}-{high:.1f})"


def _draw_along(axes: Axes, found: dict[str, Any], **style: Any) -> None:
    """Accuracy of each part of the stream."""
    asked = [part for part in parts(found) if part.asked]
    places, rates = [part.place / 1000 for part in asked], [part.right / part.asked for part in asked]
    axes.plot(places, rates, ms=4, lw=1.4, **style)
