"""Does this model need sinks, and how many? Initial tokens kept, at a cache of the same size (paper, tables 1 and 2).

The variant of table 1 is among them: the first four tokens replaced by line breaks, which shows whether it is what they
say or where they stand that matters. Tokens count from where the cache is full: before, nothing has left.
"""

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

TOLERANCE = 1.01
"""Perplexity within so much of that with the most sinks counts as none lost."""

BREAKS = "line breaks"
REPLACED = 4


@dataclass(frozen=True)
class Sinks(Evaluation):
    """See the module.

    Args:
        kept: numbers of initial tokens to keep, rising.
        size: tokens cached, initial ones included; ``None``: as many as a stream keeps by default.
        tokens: of the text at most.
        block: tokens that leave together.
        every_document: put the tokenizer's begin token in front of every document, not only of the first.

    Raises:
        ConfigError: a value is out of range.
    """

    kept: tuple[int, ...] = option((0, 1, 2, 4, 8), "Numbers of initial tokens.")
    size: int | None = option(None, "Tokens cached, initial ones included.")
    tokens: int | None = option(TOKENS, "Of the text at most.")
    block: int = CacheConfig.block
    every_document: bool = option(False, "Begin every document with the begin token, not only the first.")

    name: ClassVar[str] = "sinks"
    title: ClassVar[str] = "Initial tokens kept: does the model need sinks, and how many?"
    quick: ClassVar[dict[str, Any]] = {"tokens": 3000, "size": 128}

    def __post_init__(self) -> None:
        CacheConfig(block=self.block)
        if len(self.kept) < 2 or any(b <= a for a, b in zip((-1, *self.kept), self.kept, strict=False)):
            raise ConfigError(f"Give at least two rising numbers of initial tokens, you gave {list(self.kept)}.")
        if self.size is not None:
            check_count("size", self.size, self.kept[-1] + 1)
        if self.tokens is not None:
            check_count("tokens", self.tokens, 2)

    def run(self, desk: Desk) -> Figures:
        """Read the text once for each number."""
        from streamllm.cache import SinkCache
        from streamllm.evaluate.curve import FEWEST, SHORTEST, Curve

        size = self.size
        if size is None:
            fitted = SinkCache(desk.model, block=self.block).config
            size = fitted.sinks + (fitted.window or 0)
        text = desk.text(
            self.tokens, least=size + self.block + 1 + FEWEST * SHORTEST, every_document=self.every_document
        )
        total = text.ids.shape[1]
        ids = desk.tokenizer("\n", add_special_tokens=False)["input_ids"]
        variants = [(str(kept), kept) for kept in self.kept]
        if ids and REPLACED in self.kept:
            variants.append((BREAKS, REPLACED))
        curves: dict[str, Curve] = {}
        with desk.work(len(variants) * (total - 1)):
            for name, kept in variants:
                if name == BREAKS:  # the last one, so nobody reads the words any more
                    text.ids[:, :REPLACED] = ids[-1]
                curves[name] = desk.stream(
                    f"{kept}+{size - kept} {name}",
                    text.ids,
                    cache_maker("streaming", desk.model, kept, size - kept, self.block),
                    skip=size + self.block,
                )
        most = curves[str(self.kept[-1])]
        return {
            "tokens": total,
            "files": text.files,
            "size": size,
            "perplexity": {name: curve.interval() for name, curve in curves.items()},
            "ratio": {name: curve.ratio(most) for name, curve in curves.items() if curve is not most},
            "most": self.kept[-1],
            "breaks": curves[BREAKS].ratio(curves[str(REPLACED)]) if BREAKS in curves else None,
            "curves": {name: curve.to_dict() for name, curve in curves.items()},
        }

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """A line a number."""
        rows: list[tuple[str, ...]] = [("cache", "perplexity", f"beside {figures['most']} kept, same tokens")]
        for name, found in figures["perplexity"].items():
            kept = REPLACED if name == BREAKS else int(name)
            words = (
                f"{kept} {BREAKS} + {figures['size'] - kept}"
                if name == BREAKS
                else f"{kept} + {figures['size'] - kept}"
            )
            ratio = figures["ratio"].get(name)
            rows.append((words, spell_interval(found), spell_interval(ratio, 4) if ratio else ""))
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """Whether the model needs sinks, and how many; or that this text does not tell."""
        ratios, most = figures["ratio"], figures["most"]
        kept = [name for name in ratios if name != BREAKS]
        least = kept[0]
        words = f"with {least} kept its perplexity is {spell_interval(ratios[least])} times that with {most}"
        if bounds(ratios[least])[1] <= TOLERANCE:
            if least == "0":
                return f"This model does not need sinks: {words}."
            return f"{least} initial tokens are enough, fewer were not tried: {words}."
        if bounds(ratios[least])[0] <= TOLERANCE:
            return f"Whether this model needs sinks cannot be told on this text: {words}."
        enough = next((name for name in kept if bounds(ratios[name])[1] <= TOLERANCE), None)
        tokens = {"1": "first token", None: f"first {most} tokens or more"}.get(enough, f"first {enough} tokens")
        breaks = figures["breaks"]
        tail = ""
        if breaks and bounds(breaks)[1] <= TOLERANCE:
            tail = f" {REPLACED} line breaks in place of the first {REPLACED} do as well."
        elif breaks and bounds(breaks)[0] > 1:
            tail = (
                f" {REPLACED} line breaks in place of the first {REPLACED} cost {spell_interval(breaks)} times as much."
            )
        return f"This model needs its {tokens}: {words}.{tail}"

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """Perplexity by number, and along the stream."""
        from streamllm.evaluate.curve import Curve
        from streamllm.evaluate.figure import COLORS, make_figure

        figure, (beside, along) = make_figure(f"{figures['size']} tokens cached, some of them initial ones", 2)
        names = list(figures["perplexity"])
        labels = [name if name != BREAKS else f"{REPLACED} line\nbreaks" for name in names]
        for place, name in enumerate(names):
            found = figures["ratio"].get(name, [1.0, 1.0, 1.0])
            color = COLORS["recompute" if name == BREAKS else "streaming"]
            beside.errorbar(place, found[0], whiskers([found]), fmt="o", color=color, capsize=4)
            words = f"{figures['perplexity'][name][0]:.4g}"
            top = (place, found[2] or found[0])
            beside.annotate(words, top, xytext=(0, 6), textcoords="offset points", ha="center", fontsize="small")
        beside.axhline(1, color="0.7", lw=0.8, zorder=0)
        beside.margins(y=0.2)
        if max(found[0] for found in figures["ratio"].values()) > 2:
            beside.set_yscale("log")
        beside.set_xticks(range(len(names)), labels)
        title = f"perplexity, and as a share of that with {figures['most']} kept"
        beside.set(title=title, xlabel="initial tokens kept", ylabel="ratio, same tokens")
        most = Curve.from_dict(figures["curves"][str(figures["most"])])
        for number, name in enumerate(names):
            curve = Curve.from_dict(figures["curves"][name])
            if curve is not most and name != str(figures["most"]):
                change = curve.running - most.running
                along.plot([p / 1000 for p in curve.places], change, label=name, color=f"C{number}", lw=1.2)
        along.axhline(0, color="0.7", lw=0.8)
        along.set(title=f"beside {figures['most']} kept, running", xlabel="thousand tokens", ylabel="nats a token more")
        along.legend(fontsize="small", title="kept")
        return figure
