"""What every evaluation is: options, a measurement, and pure functions of what was measured.

An evaluation is a frozen dataclass whose fields are its options. Its module loads neither torch nor matplotlib until it
runs or draws, so that the command line and the report can name and show evaluations at once.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from streamllm.evaluate.desk import Desk

MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What figures of another version run into when this one shows them."""

TOKENS = 200_000
"""Of a text that is read several times, at most, unless somebody says otherwise: minutes for a small model."""

Figures = dict[str, Any]
"""What was measured, ready for JSON."""


class Evaluation(ABC):
    """One evaluation with its options.

    Attributes:
        name: on the command line.
        title: in one line.
        quick: options of a trial that takes seconds.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    quick: ClassVar[dict[str, Any]]

    @abstractmethod
    def run(self, desk: Desk) -> Figures:
        """Measure.

        Raises:
            StreamLLMError: the text or the model cannot be used.
            Interrupted: a signal came; what was measured is kept on the desk.
        """

    @staticmethod
    @abstractmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """The table, its head first."""

    @staticmethod
    @abstractmethod
    def verdict(figures: Figures) -> str:
        """What was found, in a sentence or two."""

    @staticmethod
    @abstractmethod
    def draw(figures: Figures) -> Figure:
        """The figure."""

    def check_files(self, files: Sequence[str]) -> None:
        """Refuse files that cannot be what the evaluation reads, before a model is loaded; text, unless it says else.

        Raises:
            ConfigError, InputError: one cannot be.
        """
        from streamllm.evaluate.text import check_files

        check_files(files)

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]


def option(default: Any, help: str) -> Any:
    """A field that is a flag of its own, with its help; fields without one share the setting of their name."""
    return dataclasses.field(default=default, metadata={"help": help})


Interval = Sequence[Any]
"""A value, and the ends of its confidence interval, which are ``None`` where there was too little to tell."""


def bounds(found: Interval) -> tuple[float, float]:
    """The ends of an interval; anything may be, where there is none."""
    _, low, high = found
    return (-math.inf, math.inf) if low is None else (low, high)


def spell_interval(found: Interval, digits: int = 3) -> str:
    """A value with its confidence interval."""
    value, low, high = found
    return f"{value:.{digits}f} ({'too few' if low is None else f'{low:.{digits}f}-{high:.{digits}f}'})"


def whiskers(values: Sequence[Interval]) -> list[list[float]]:
    """How far each interval reaches below and above its value, for error bars; never below zero by rounding."""
    ends = [(value, *((value, value) if low is None else (low, high))) for value, low, high in values]
    return [[max(0.0, value - low) for value, low, _ in ends], [max(0.0, high - value) for value, _, high in ends]]
