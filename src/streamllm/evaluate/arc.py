"""Streaming ARC: multiple-choice questions, each with its right answer, in one endless stream (paper, table 5).

An answer counts if every token of it is the one that greedy decoding would have drawn, given the stream before it
(exact match, under teacher forcing). The right answers stay in the stream, as in the paper; so a model may learn the
format from it, and a stream may do better than the question alone (one-shot). The loss of an answer, the sum over its
tokens, tells apart even models that know none.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from streamllm.config import CacheConfig, check_count
from streamllm.errors import InputError
from streamllm.evaluate.evaluation import Evaluation, Figures, option, spell_interval
from streamllm.evaluate.methods import cache_maker, check_methods, dense_tokens
from streamllm.evaluate.questions import check_sources, read_questions, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from streamllm.evaluate.desk import Desk

ALONE = "one-shot"
"""Each question alone, in a cache of its own: what the others are compared with."""

METHODS = (ALONE, "streaming", "window", "dense")

STRETCHES, SHORTEST = 12, 20
"""Of a figure along the stream, at most; and questions of one, at least."""


@dataclass(frozen=True)
class Arc(Evaluation):
    """See the module.

    Args:
        methods: of ``METHODS``.
        questions: at most; ``None``: all.
        sinks, window, block: of the cache (``CacheConfig``).
        dense_limit: tokens that dense attention reads; ``None``: 8 trained lengths, or what fits into the memory.
        shuffle: ask in an order drawn with ``seed``, not in that of the file.
        seed: of the order.

    Raises:
        ConfigError: a value is out of range.
    """

    methods: tuple[str, ...] = option(METHODS, "Side by side.")
    questions: int | None = option(None, "At most; all if left out.")
    sinks: int = CacheConfig.sinks
    window: int | None = CacheConfig.window
    block: int = CacheConfig.block
    dense_limit: int | None = option(None, "Tokens that dense attention reads; 8 trained lengths if left out.")
    shuffle: bool = option(False, "Ask in an order drawn with --seed.")
    seed: int = option(0, "Same seed, same order.")

    name: ClassVar[str] = "arc"
    title: ClassVar[str] = "Questions answered along a stream (streaming ARC)"
    quick: ClassVar[dict[str, Any]] = {"questions": 20, "window": 124}

    def __post_init__(self) -> None:
        CacheConfig(self.sinks, self.window, self.block)
        check_methods(self.methods, METHODS)
        check_count("seed", self.seed, 0)
        for name, value, least in (("questions", self.questions, 1), ("dense_limit", self.dense_limit, 2)):
            if value is not None:
                check_count(name, value, least)

    def check_files(self, files: Sequence[str]) -> None:
        """Refuse what cannot be questions."""
        check_sources(files)

    def run(self, desk: Desk) -> Figures:
        """Ask all questions with each method."""
        from streamllm.cache import SinkCache
        from streamllm.evaluate.quiz import Quiz, compare

        fitted = SinkCache(desk.model, self.sinks, self.window, self.block)
        window, spec = fitted.config.window, fitted.spec
        assert window is not None
        questions = read_questions(desk.files, desk.piped())
        if self.shuffle:
            random.Random(self.seed).shuffle(questions)
        questions = questions[: self.questions]
        quiz = Quiz(desk.tokenizer, questions)
        desk.plan["ids"] = hashlib.sha256(quiz.ids.tobytes()).hexdigest()
        total = quiz.ids.shape[1]
        if total <= fitted.capacity:
            raise InputError(
                f"The questions have {total:,} tokens, the cache holds {fitted.capacity:,}: nothing would leave it; "
                "give more questions, or a smaller --window."
            )
        dense = min(total, dense_tokens(desk.model, spec, self.dense_limit))
        tokens: dict[str, int] = dict.fromkeys(self.methods, total) | {"dense": dense, ALONE: quiz.alone_tokens + 1}
        found = {}
        with desk.work(sum(tokens[name] - 1 for name in self.methods)):
            for name in self.methods:
                make_cache = cache_maker("dense" if name == ALONE else name, desk.model, self.sinks, window, self.block)
                if name == ALONE:
                    longest = spec.limit if spec.positions == "absolute" else total
                    measure = partial(quiz.ask_alone, desk, name, make_cache, longest)
                else:
                    measure = partial(quiz.ask, desk, name, make_cache, tokens[name])
                found[name] = desk.part(name, measure, steps=tokens[name] - 1)
        choices = [len(question.choices) for question in questions]
        return {
            "files": [shown(name) for name in desk.files] or ["packaged"],
            "questions": len(questions),
            "tokens": total,
            "chat": bool(desk.tokenizer.chat_template),
            "cache": {"sinks": self.sinks, "window": window, "block": self.block},
            "trained_length": spec.trained_length,
            "chance": {
                "accuracy": sum(1 / n for n in choices) / len(choices),
                "loss": sum(map(math.log, choices)) / len(choices),
            },
            "ends": quiz.ends.tolist(),
            **compare(found),
        }

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """A line a method."""
        common = figures["common"]
        is_alike = common == figures["questions"]
        head = ("method", "questions", "answered right", "loss of an answer, nats")
        rows: list[tuple[str, ...]] = [
            head if is_alike else (*head, f"right, the {common:,} that all read", "loss, likewise")
        ]
        for name, found in figures["methods"].items():
            line = (name, f"{found['all']['questions']:,}", *_spell(found["all"]))
            rows.append(line if is_alike else (*line, *_spell(found["common"])))
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """What the stream does to the answers."""
        methods, chance = figures["methods"], figures["chance"]
        read = {name: found["all"] for name, found in methods.items() if found["all"]["questions"]}
        rights = [f"{name} {_percent(found['all'])}" for name, found in methods.items()]
        words = (
            f"{figures['questions']:,} questions in a stream of {figures['tokens']:,} tokens, answered right: "
            f"{', '.join(rights)}; a guess among the labels is right in {100 * chance['accuracy']:.1f} %."
        )
        words += "".join(
            _beside(other, methods["streaming"]["hits"], methods[other]["hits"], chance["accuracy"])
            for other in methods
            if "streaming" in methods and other != "streaming"
        )
        if read and all(found["accuracy"][1] <= chance["accuracy"] for found in read.values()):
            losses = [f"{name} {found['loss'][0]:.2f}" for name, found in read.items()]
            words += (
                f" No method is surely better than a guess, so this model does not know the answers; look at the loss "
                f"of an answer instead: {', '.join(losses)} nats, a guess {chance['loss']:.2f}."
            )
        if figures["common"] < figures["questions"]:
            words += f" All methods read {figures['common']:,} questions, on which the table compares them."
        return words

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """The table as bars; right answers and losses along the stream."""
        from streamllm.evaluate.figure import COLORS, make_figure

        sizes = figures["cache"]
        title = f"{sizes['sinks']} + {sizes['window']} tokens cached, blocks of {sizes['block']}"
        figure, (bars, rights, losses) = make_figure(title, 3)
        names, chance = list(figures["methods"]), figures["chance"]
        values = [figures["methods"][name]["all"] for name in names]
        for place, (name, found) in enumerate(zip(names, values, strict=True)):
            value, low, high = (100 * x for x in found["accuracy"] or (0, 0, 0))
            bars.bar(place, value, color=COLORS[name])
            bars.errorbar(place, value, yerr=[[max(0, value - low)], [max(0, high - value)]], ecolor="0.2", capsize=3)
        words = [f"{name}\n{found['questions']:,} read" for name, found in zip(names, values, strict=True)]
        bars.set_xticks(range(len(names)), words)
        bars.set(title="answered right (95 % interval)", ylabel="%")
        for axes, key, scale in ((rights, "hits", 100), (losses, "losses", 1)):
            for name in names:
                places, means = _along(figures["methods"][name][key])
                scaled = [scale * mean for mean in means]
                # Where nothing is lost, the window's line lies on that of the stream.
                dashes = "--" if name == "window" else "-"
                axes.plot(places, scaled, dashes, color=COLORS[name], label=name, lw=1.5, marker=".")
        rights.set(title="answered right, along the stream", xlabel="question", ylabel="%")
        losses.set(title="loss of an answer, along the stream", xlabel="question", ylabel="nats")
        for axes in (bars, rights, losses):
            guess, right = chance["loss"] if axes is losses else 100 * chance["accuracy"], axes.get_yaxis_transform()
            axes.axhline(guess, color="0.3", lw=1, ls=":")
            axes.text(1, guess, "a guess", transform=right, ha="right", va="bottom", fontsize="small")
            axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
        for axes in (rights, losses):
            _mark(axes, figures)
        rights.legend(fontsize="small", ncols=2, loc="upper right", frameon=False)
        return figure


def _beside(name: str, ours: Sequence[int | None], theirs: Sequence[int | None], chance: float) -> str:
    """Streaming beside another method on the questions that both read: those that one of them alone answers right.

    Were both as good, either would be as likely (McNemar's test, exact). Nobody who guesses is better than another.
    """
    from streamllm.evaluate.share import share, sign_test

    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return ""
    better, worse = (sum(pair == alone for pair in pairs) for alone in ((1, 0), (0, 1)))
    words = f"streaming alone is right on {better:,} and {name} alone on {worse:,} of {len(pairs):,}"
    knows = any(share(sum(pair[which] for pair in pairs), len(pairs))[1] > chance for which in (0, 1))
    if sign_test(better, worse) >= 0.05:
        return f" Streaming cannot be told from {name}: {words}."
    if not knows:
        return f" Streaming differs from {name}, but neither knows the answers: {words}."
    return f" Streaming does {'better' if better > worse else 'worse'} than {name}: {words}."


def _percent(found: dict[str, Any]) -> str:
    if not found["questions"]:
        return "none read"
    value, low, high = (100 * x for x in found["accuracy"])
    return f"{value:.1f} % ({low:.1f}-{high:.1f})"


def _spell(found: dict[str, Any]) -> tuple[str, str]:
    return (_percent(found), spell_interval(found["loss"], 2)) if found["questions"] else ("", "")


def _along(values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Middles and means of stretches of questions that were read."""
    known = [(number, value) for number, value in enumerate(values, 1) if value is not None]
    width = max(SHORTEST, math.ceil(len(values) / STRETCHES))
    stretches = [known[begin : begin + width] for begin in range(0, len(known), width)]
    if len(stretches) > 1 and len(stretches[-1]) < width / 2:  # too few to say anything
        stretches.pop()
    places = [sum(number for number, _ in some) / len(some) for some in stretches]
    return places, [sum(value for _, value in some) / len(some) for some in stretches]


def _mark(axes: Axes, figures: Figures) -> None:
    """The questions at which the cache is full, and at which dense attention passes the trained length."""
    sizes = figures["cache"]
    marks = {"cache full": sizes["sinks"] + sizes["window"] + sizes["block"]}
    if "dense" in figures["methods"] and figures["trained_length"]:
        marks["trained length"] = figures["trained_length"]
    for height, (words, tokens) in zip((0.99, 0.94), marks.items(), strict=False):
        place = next((number for number, end in enumerate(figures["ends"], 1) if end > tokens), None)
        if place is not None:
            axes.axvline(place, color="0.6", lw=0.8, ls="--")
            top = axes.get_xaxis_transform()
            axes.text(place, height, f" {words}", transform=top, va="top", fontsize="x-small", color="0.3")
