"""What every evaluation is: options, a measurement, and pure functions of what was measured.

An evaluation is a frozen dataclass whose fields are its options. Its module loads neither torch nor matplotlib until it
runs or draws, so that the command line and the report can name and show evaluations at once.
"""

from __future__ import annotations

import dataclasses
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


def spell_interval(found: Sequence[float], digits: int = 3) -> str:
    """A value with its confidence interval."""
    value, low, high = found
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
