"""Where does the attention fall? Maps over the first tokens, and the mass on the sinks (paper, figures 2 and 7).

Sequences are cut from the text evenly, each beginning as a stream begins, with what the tokenizer puts in front; they
begin in the middle of sentences, as the sequences of a training do. Attention is causal, so the first tokens of long
sequences have the maps of short ones. Layers are counted among those that have attention; those with a window of their
own cannot see a first token that has left it.

Shapes: ``L`` layers, ``H`` heads, ``S`` first tokens; maps are triangles, a row for each query, a value for each key
that it can see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamllm.config import check_count
from streamllm.errors import ConfigError
from streamllm.evaluate.evaluation import TOKENS, Evaluation, Figures, option, spell_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from torch import Tensor

    from streamllm.evaluate.desk import Desk

LENGTH = 128
"""Tokens of a sequence, where nobody says otherwise and the model was trained on so many."""

EARLY = 8
"""The first of so many parts of a sequence's queries does not count: they see too few tokens to choose from."""

GROUP = 32
"""Sequences that are measured between two checkpoints."""

SINK = 0.3
"""Mean attention on the first token from which on a head is said to have a sink."""

LOCAL = 2
"""The lowest layers, which in the paper's models look at the newest tokens instead."""

ROOM = 12
"""Layers, and heads, whose figures have room for numbers."""


@dataclass(frozen=True)
class AttentionMaps(Evaluation):
    """See the module.

    Args:
        sequences: cut from the text at most.
        length: tokens of each; ``None``: 128, or the trained length if that is less.
        shown: first tokens of the maps.
        heads: of each layer that have maps of their own, besides the mean over all; they are the bulk of the record.
        tokens: of the text at most.

    Raises:
        ConfigError: a value is out of range.
    """

    sequences: int = option(256, "Cut evenly from the text, at most.")
    length: int | None = option(None, f"Tokens of a sequence; {LENGTH}, or the trained length, if left out.")
    shown: int = option(16, "First tokens of the maps.")
    heads: int = option(8, "Heads of a layer that get maps of their own, at most.")
    tokens: int | None = option(TOKENS, "Of the text at most.")

    name: ClassVar[str] = "attention"
    title: ClassVar[str] = "Where the attention falls: maps, and the mass on the first tokens"
    quick: ClassVar[dict[str, Any]] = {"sequences": 16, "length": 64}

    def __post_init__(self) -> None:
        check_count("sequences", self.sequences, 1)
        check_count("shown", self.shown, 2)
        check_count("heads", self.heads, 1)
        if self.length is not None:
            check_count("length", self.length, EARLY)
            self._check_length(self.length)
        if self.tokens is not None:
            check_count("tokens", self.tokens, 2)

    def _check_length(self, length: int) -> None:
        if length < self.shown:
            raise ConfigError(f"A map of {self.shown} tokens needs sequences of as many: --length is {length}.")

    def run(self, desk: Desk) -> Figures:
        """Sum up the attention over the sequences."""
        from streamllm.evaluate.attention import FIRST, LayerSums, mass_on_nothing, sum_attention
        from streamllm.reading import read_ids

        length = self._fit(desk)
        text = desk.text(self.tokens, least=length)
        begin = [i for ids in read_ids(desk.tokenizer, "") for i in ids]
        own = length - len(begin)
        if own < 1:
            raise ConfigError(
                f"The tokenizer puts {len(begin)} tokens in front of a text, and a sequence has {length}: give a "
                "larger --length."
            )
        total = text.ids.shape[1] - len(begin)
        count = max(1, min(self.sequences, total // own))
        starts = [len(begin) + round(i * (total - own) / max(1, count - 1)) for i in range(count)]
        skip = length // EARLY

        def rows(some: Sequence[int]) -> Iterator[Tensor]:
            import torch

            for start in some:
                yield torch.tensor([[*begin, *text.ids[0, start : start + own].tolist()]])
                desk.advance(1, f"sequences of {length} tokens")

        with desk.work(count):
            done, kept = desk.kept("sums") or (0, [])
            sums = [LayerSums.from_dict(layer) for layer in kept]
            desk.advance(done, "")
            while done < count:
                some = starts[done : done + GROUP]
                found = sum_attention(desk.model, rows(some), skip=skip, shown=self.shown, kept=self.heads)
                for layer, more in zip(sums, found, strict=bool(sums)):
                    layer.merge(more)
                sums, done = sums or found, done + len(some)
                desk.keep("sums", [done, [layer.to_dict() for layer in sums]])
        nothing = mass_on_nothing(sums, desk.model.dtype)
        return {
            "files": text.files,
            "sequences": count,
            "length": length,
            "begin": desk.tokenizer.convert_ids_to_tokens(begin),
            "queries": [skip, length],
            "even": sum(1 / (query + 1) for query in range(skip, length)) / (length - skip),
            "mass": {
                str(n): [_rounded(layer.mass[:, index] / layer.count) for layer in sums]
                for index, n in enumerate(FIRST)
            },
            "layers": {str(n): [layer.interval(index) for layer in sums] for index, n in enumerate(FIRST)},
            "nothing": [_rounded(each) for each in nothing] if any(bool(each.any()) for each in nothing) else None,
            "heads": [layer.kept for layer in sums],
            "attention": [[_triangle(m / layer.count) for m in layer.attention] for layer in sums],
            "logits": [[_triangle(m / n) for m, n in zip(layer.logits, layer.seen, strict=True)] for layer in sums],
        }

    def _fit(self, desk: Desk) -> int:
        """The length of a sequence, which the model must have been trained on."""
        from streamllm.evaluate.attention import check_memory

        trained = getattr(desk.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        length = self.length or min(LENGTH, trained or LENGTH)
        self._check_length(length)
        if trained and length > trained:
            raise ConfigError(
                f"The model was trained on {trained} tokens, you gave --length {length}: give at most that."
            )
        check_memory(desk.model, length)
        return length

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """A line a layer."""
        first, nothing = figures["mass"]["1"], figures["nothing"]
        one, four = figures["layers"]["1"], figures["layers"]["4"]
        head = ("layer", "on the first token", "on the first 4", "strongest head, on the first")
        rows: list[tuple[str, ...]] = [(*head, "on nothing") if nothing else head]
        for layer, heads in enumerate(first):
            best = max(range(len(heads)), key=heads.__getitem__)
            line = (str(layer), spell_interval(one[layer]), spell_interval(four[layer]), f"{best}: {heads[best]:.3f}")
            rows.append((*line, f"{_mean(nothing[layer]):.3f}") if nothing else line)
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """Whether there is a sink, and where."""
        layers = [_mean(heads) for heads in figures["mass"]["1"]]
        heads = [value for some in figures["mass"]["1"] for value in some]
        sinks, even, mean = sum(value >= SINK for value in heads), figures["even"], _mean(heads)
        most = max(range(len(layers)), key=layers.__getitem__)
        begins = f" ({figures['begin'][0]})" if figures["begin"] else ""
        words = (
            f"Queries from token {figures['queries'][0] + 1} on put {mean:.3f} of their attention on the first "
            f"token{begins}, {mean / even:.1f} times an even share; layer {most} the most, {layers[most]:.3f}. "
            f"{sinks} of {len(heads)} heads put {SINK} or more on it"
        )
        words += "." if sinks else ": this model hardly leans on it."
        if len(layers) > 2 * LOCAL and sinks:
            words += (
                f" The lowest {LOCAL} layers: {_mean(layers[:LOCAL]):.3f}, those above {_mean(layers[LOCAL:]):.3f}."
            )
        if figures["nothing"]:
            share = _mean([value for some in figures["nothing"] for value in some])
            words += f" {share:.3f} falls on no token at all, but on the sink that the model has beside them."
        return words

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """Maps of four layers, weights above and logits below; the mass of every head, and of every layer."""
        from streamllm.evaluate.figure import make_figure

        layers = len(figures["mass"]["1"])
        some = sorted({0, min(1, layers - 1), layers // 2, layers - 1})
        title = f"{figures['sequences']} sequences of {figures['length']} tokens"
        figure, axes = make_figure(title, 4, rows=3)
        for each in axes:
            each.remove()
        parts: Any = figure.subfigures(3, 1)  # each with a layout of its own
        _draw_maps(parts[0], "attention, mean over heads", {n: figures["attention"][n][0] for n in some})
        _draw_maps(parts[1], "logits, less the mean of their row", {n: figures["logits"][n][0] for n in some})
        heads, bars = parts[2].subplots(1, 2)
        _draw_heads(heads, figures["mass"]["1"])
        _draw_layers(bars, figures)
        return figure


def _draw_maps(figure: SubFigure, label: str, maps: dict[int, Any]) -> None:
    """A map for each layer: of weights on a scale of square roots, of what may be below zero around it."""
    from matplotlib.colors import CenteredNorm, PowerNorm

    values = [x for rows in maps.values() for row in rows for x in row if x is not None]
    is_signed = min(values) < 0
    norm = CenteredNorm(0, max(map(abs, values))) if is_signed else PowerNorm(0.5, 0, 1)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for each, (layer, rows) in zip(axes, maps.items(), strict=True):
        image = each.imshow(_square(rows), norm=norm, cmap="RdBu_r" if is_signed else "viridis")
        each.set(title=f"layer {layer}", xlabel="key", ylabel="query" if each is axes[0] else "")
        each.spines[:].set_visible(False)
    figure.colorbar(image, ax=list(axes), label=label, pad=0.01, aspect=24)


def _draw_heads(axes: Axes, mass: Sequence[Sequence[float]]) -> None:
    """The mass on the first token, layers by heads; with numbers where there is room."""
    from matplotlib.ticker import MaxNLocator

    widest, most = max(map(len, mass)), max(map(max, mass))
    image = axes.imshow(
        [[*heads, *[math.nan] * (widest - len(heads))] for heads in mass], vmin=0, cmap="viridis", aspect="auto"
    )
    if len(mass) <= ROOM and widest <= ROOM:
        for layer, heads in enumerate(mass):
            for head, value in enumerate(heads):
                color = "white" if value < 0.6 * most else "black"
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize="small", color=color)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="attention on the first token, by head", xlabel="head", ylabel="layer")
    axes.figure.colorbar(image, ax=axes, pad=0.02)


def _draw_layers(axes: Axes, figures: Figures) -> None:
    """The mass of each layer."""
    from matplotlib.ticker import MaxNLocator

    heads = figures["mass"]["1"]
    first, four = ([_mean(layer) for layer in figures["mass"][n]] for n in ("1", "4"))
    places = range(len(first))
    rest = [b - a for a, b in zip(first, four, strict=True)]
    axes.bar(places, first, color="#0b6e4f", label="first token")
    axes.bar(places, rest, bottom=first, color="#8fc1b0", label="next three")
    if figures["nothing"]:
        nothing = [_mean(layer) for layer in figures["nothing"]]
        axes.bar(places, nothing, bottom=four, color="#d9d9d9", label="nothing")
    axes.plot(places, [max(layer) for layer in heads], "o", color="#e08e0b", label="first token, strongest head")
    axes.axhline(figures["even"], color="0.3", lw=1, ls=":", label="first token, an even share")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title="attention on the first tokens, by layer", xlabel="layer", ylabel="mean over heads")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(fontsize="small", ncols=2, loc="upper center", frameon=False)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _triangle(found: Any) -> list[list[float | None]]:
    """[S, S] as rows of the keys that a query can see; what was never seen is ``None``."""
    rows = found.tolist()
    return [[None if math.isnan(x) else round(x, 4) for x in row[: query + 1]] for query, row in enumerate(rows)]


def _square(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """A triangle as a square, with nothing where nothing is seen."""
    return [[*(math.nan if x is None else x for x in row), *[math.nan] * (len(rows) - len(row))] for row in rows]
