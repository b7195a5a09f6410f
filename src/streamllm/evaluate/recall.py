"""Recall: is what was told early found again, when it is asked for long after it has left the window?

Seeded conversations: facts are told at the beginning and asked for so and so many tokens later, in their own words and
in other ones, with recall and without (``interview``, ``facts``). What lies between is talk made after the words of a
text (``chatter``). A fact is found if its passage is in the window or among those that were recalled for the question;
that needs no model that can answer. Whether it does answer is measured beside it: the reply must have the word. Source:
issue 6; StreamingLLM itself forgets what has left the window (paper, appendix A).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

from streamllm.config import CacheConfig, SamplingConfig, check_count
from streamllm.console import STDIN
from streamllm.errors import ConfigError
from streamllm.evaluate.asked import OTHER, OWN, Count, pool, summarise
from streamllm.evaluate.evaluation import Evaluation, Figures, option, whiskers
from streamllm.evaluate.facts import MOST, draw_facts
from streamllm.evaluate.share import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from streamllm.evaluate.chatter import Chatter
    from streamllm.evaluate.desk import Desk

ABLE = 0.5
"""Right answers about what is in the window below which a model cannot show what recall is good for."""

TARGET, SEARCH_MS = 0.95, 20
"""What is found with recall, at least; and ms of a search in a million tokens, at most."""


@dataclass(frozen=True)
class Recall(Evaluation):
    """See the module.

    Args:
        distances: tokens between a fact and the question; rising. 0 asks at once.
        samples: independent conversations.
        facts: told in each.
        answer_tokens: of a reply, in which the answer is looked for; 0: the model does not reply.
        search_tokens: of the transcript in which searches are timed.
        sinks, window, block: of the cache (``CacheConfig``).
        seed: of facts and talk.

    Raises:
        ConfigError: a value is out of range.
    """

    distances: tuple[int, ...] = option(
        (0, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000), "Tokens between a fact and the question; 0: at once."
    )
    samples: int = option(3, "Independent conversations.")
    facts: int = option(40, f"Told in each, at most {MOST}.")
    answer_tokens: int = option(24, "Of a reply, in which the answer is looked for; 0: none.")
    search_tokens: int = option(1_000_000, "Of the transcript in which searches are timed.")
    sinks: int = CacheConfig.sinks
    window: int | None = CacheConfig.window
    block: int = CacheConfig.block
    seed: int = option(0, "Of facts and talk.")

    name: ClassVar[str] = "recall"
    title: ClassVar[str] = "Facts told early and asked for late: does recall find them?"
    quick: ClassVar[dict[str, Any]] = {
        "distances": (0, 500, 2000),
        "samples": 1,
        "facts": 8,
        "answer_tokens": 4,
        "search_tokens": 20_000,
    }

    def __post_init__(self) -> None:
        CacheConfig(self.sinks, self.window, self.block)
        if not self.distances or any(b <= a for a, b in pairwise((-1, *self.distances))):
            raise ConfigError(f"Give rising distances of at least 0 tokens, you gave {list(self.distances)}.")
        for name, least in (("samples", 1), ("facts", 1), ("answer_tokens", 0), ("search_tokens", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        if self.facts > MOST:
            raise ConfigError(f"There are {MOST} facts to tell in a conversation, you asked for {self.facts}.")

    def run(self, desk: Desk) -> Figures:
        """Lead the conversations, and search in a long transcript."""
        from streamllm.cache import SinkCache
        from streamllm.evaluate.chatter import Chatter, beginning

        fitted = SinkCache(desk.model, self.sinks, self.window, self.block)
        text = beginning(_pieces(desk))
        desk.plan["text"] = hashlib.sha256(text.encode()).hexdigest()
        chatter, asked = Chatter(text), []
        with desk.work(self.samples * self.distances[-1] + self.search_tokens):
            for sample in range(self.samples):
                name = f"conversation {sample + 1}"
                asked += desk.part(name, partial(self._lead, desk, chatter, sample, name), steps=self.distances[-1])
            search = desk.part("search", partial(self._search, desk, chatter), steps=self.search_tokens)
        sizes = {"sinks": self.sinks, "window": fitted.config.window, "block": self.block, "capacity": fitted.capacity}
        return {
            "cache": sizes,
            "chat": bool(desk.tokenizer.chat_template),
            "distances": {
                str(distance): summarise([each for each in asked if each["distance"] == distance])
                for distance in self.distances
            },
            "search": search,
        }

    def _lead(self, desk: Desk, chatter: Chatter, sample: int, name: str) -> list[dict[str, Any]]:
        """What was found in one conversation."""
        from streamllm.evaluate.interview import Interview
        from streamllm.session import Chat

        draw = random.Random(f"{self.seed} {sample}")
        facts = draw_facts(draw, self.facts)
        sizes: dict[str, Any] = {"sinks": self.sinks, "window": self.window, "block": self.block}
        greedy = SamplingConfig(temperature=0)
        with Chat(desk.model, desk.tokenizer, **sizes, sampling=greedy, recall="off", snapshots=0) as chat:
            interview = Interview(chat, facts, self.distances, chatter, draw, self.answer_tokens)
            asked = interview.lead(_Progress(desk, name, self.distances[-1]))
        return [each.to_dict() for each in asked]

    def _search(self, desk: Desk, chatter: Chatter) -> dict[str, Any]:
        """Times of searches."""
        from streamllm.evaluate.haystack import measure

        draw = random.Random(f"{self.seed} search")
        watch = _Progress(desk, "search", self.search_tokens)
        return measure(desk.tokenizer, draw_facts(draw, self.facts), chatter, draw, self.search_tokens, watch)

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """A line for each distance."""
        said = ("without recall", "with recall, in its words", "in other words")
        cost = ("right passages", "recalled", "for an idle turn", "tokens added", "search")
        rows: list[tuple[str, ...]] = [("asked after", "questions", *said, *cost, "answered", "with recall")]
        for distance, found in figures["distances"].items():
            asked = found["found"][1]
            rows.append(
                (
                    _spell_distance(distance),
                    f"{asked:,}",
                    *(_percent(found[name]) for name in ("held", OWN, OTHER, "right")),
                    f"{found['right'][1] / asked:.2f}",
                    f"{found['idle']['mean']:.2f}, at most {found['idle']['max']}",
                    f"{found['added']['mean']:.0f}",
                    f"{found['search_ms']:z.1f} ms",
                    *(_percent(found["answered"][how]) for how in ("without", "with")),
                )
            )
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """What is found beyond the window, what it costs, and whether the model makes use of it."""
        capacity, window, searched = figures["cache"]["capacity"], figures["cache"]["window"], figures["search"]
        beyond = [found for distance, found in figures["distances"].items() if int(distance) > capacity]
        speed = (
            f"A search in {searched['tokens']:,} tokens takes {searched['ms']['median']:.1f} ms, and "
            f"{searched['ms']['p95']:.1f} ms or less in 95 of 100 cases (target: {SEARCH_MS} ms)."
        )
        if not beyond:
            return (
                f"No question is asked beyond the cache of {capacity:,} tokens: ask later with --distances, or take a "
                f"smaller --window. {speed}"
            )
        counts = {name: pool(found[name] for found in beyond) for name in ("held", OWN, OTHER, "right")}
        worst = min((share(*found[OWN])[0] for found in beyond if found[OWN][1]), default=0.0)
        sentences = [
            f"Beyond the window of {window:,} tokens recall finds {_percent(counts[OWN])} of the facts that are asked "
            f"for in their own words ({worst:.0%} at the worst distance; target: {TARGET:.0%}) and "
            f"{_percent(counts[OTHER])} of those asked for in other words; without it {_percent(counts['held'])} are "
            "there.",
            f"Recall adds {mean(each['added']['mean'] for each in beyond):.0f} tokens and "
            f"{mean(each['wait_ms'] for each in beyond):.0f} ms to a question; {_percent(counts['right'])} of the "
            "passages are the right ones."
            if counts["right"][1]
            else "Nothing was recalled.",
            f"A turn that asks for nothing gets {mean(each['idle']['mean'] for each in beyond):.2f} passages, at most "
            f"{max(each['idle']['max'] for each in beyond)} (target: 1).",
            speed,
            _answered([*figures["distances"].values()], beyond),
        ]
        return " ".join(filter(None, sentences))

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """What is found by distance, and how long searches take."""
        from streamllm.evaluate.figure import COLORS, make_figure

        cache, distances, searched = figures["cache"], figures["distances"], figures["search"]
        figure, (shares, times) = make_figure(f"sinks: {cache['sinks']}, window: {cache['window']:,} tokens", 2)
        ours, theirs = COLORS["streaming"], COLORS["window"]
        # 1. what is found
        _draw_shares(shares, distances, OWN, label="found with recall, asked in its words", color=ours, marker="o")
        _draw_shares(
            shares, distances, OTHER, label="found with recall, in other words", color=ours, marker="s", ls="--"
        )
        _draw_shares(shares, distances, "held", label="in the window, without recall", color=theirs, marker="o")
        for how, color in (("with", ours), ("without", theirs)):
            answered = {distance: found["answered"] for distance, found in distances.items()}
            _draw_shares(shares, answered, how, label=f"answered, {how} recall", color=color, marker="^", ls=":")
        shares.set_xticks(range(len(distances)), [*map(_spell_distance, distances)], fontsize="small", rotation=30)
        shares.set(
            title="questions",
            xlabel="tokens since the fact was told",
            ylim=(-0.04, 1.5),
            yticks=[0, 0.25, 0.5, 0.75, 1],
        )
        shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        shares.legend(fontsize="small", loc="upper center", ncols=2, frameon=False)
        # 2. how long it takes
        late = [found for found in distances.values() if found["tokens"][1]]
        places, taken = [found["tokens"][1] for found in late], [found["search_ms"] for found in late]
        times.plot(places, taken, color=ours, marker="o", label="for a question of a conversation (median)")
        for which, marker in (("median", "o"), ("p95", "^")):
            times.plot(searched["tokens"], searched["ms"][which], marker, color=theirs, label=f"by itself ({which})")
        times.axhline(SEARCH_MS, color="0.6", lw=0.8, ls="--")
        times.text(0, SEARCH_MS, " target", transform=times.get_yaxis_transform(), va="top", fontsize="small")
        times.set(title="search", xlabel="tokens of the conversation", ylabel="ms", xscale="log", yscale="log")
        times.legend(fontsize="small", loc="center left")
        return figure


class _Progress:
    """Tells the desk how far a part is, which may raise; never beyond ``total``."""

    def __init__(self, desk: Desk, name: str, total: int) -> None:
        self._desk, self._name, self._total, self._done = desk, name, total, 0

    def __call__(self, tokens: int) -> None:
        reached = min(tokens, self._total)
        self._desk.advance(reached - self._done, self._name)
        self._done = reached


def _pieces(desk: Desk) -> Iterator[str]:
    """The text after whose words the talk is made."""
    from streamllm.corpus import Source, read_documents
    from streamllm.evaluate.text import packaged_text

    for name in desk.files or [str(packaged_text())]:
        if name == STDIN:
            yield from desk.piped()
            continue
        for piece in read_documents([Source.parse(name)]):
            yield piece.text + "\n" * piece.ends


def _answered(distances: Sequence[dict[str, Any]], beyond: Sequence[dict[str, Any]]) -> str:
    """Whether the model makes use of what it sees; empty if it was not asked."""
    inside = pool(found["answered"]["without"] for found in distances if found["held"][0] == found["held"][1])
    without, with_recall = (pool(found["answered"][how] for found in beyond) for how in ("without", "with"))
    if not without[1]:
        return ""
    if inside[1] and share(*inside)[1] < ABLE:
        return f"This model answers {_percent(inside)} about what is in the window: its answers say nothing of recall."
    return f"It answers {_percent(with_recall)} of the questions with recall, and {_percent(without)} without."


def _draw_shares(axes: Axes, found: dict[str, Any], name: str, **style: Any) -> None:
    """Shares by distance, where there are any."""
    known = [(place, share(*each[name])) for place, each in enumerate(found.values()) if each[name][1]]
    values = [value for _, value in known]
    if known:
        axes.errorbar(
            [place for place, _ in known], [value for value, *_ in values], whiskers(values), capsize=3, ms=4, **style
        )


def _percent(count: Count) -> str:
    """A share with its confidence interval; nothing of nothing."""
    if not count[1]:
        return ""
    value, low, high = (100 * each for each in share(*count))
    return f"{value:.1f}% ({low:.1f}-{high:.1f})"


def _spell_distance(distance: str) -> str:
    return f"{int(distance):,}" if int(distance) else "at once"
