"""One self-contained HTML page of the records in a folder: tables, figures inline, and how to repeat each of them.

Everything is drawn anew from the figures in the records, by the same functions that a run uses. The page needs no
network, no script and no other file. Nothing here measures, and nothing here knows an evaluation in particular.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import streamllm
from streamllm.atomic import write_atomically
from streamllm.errors import InputError, StateError, StreamLLMError
from streamllm.evaluate.evaluation import MISFITS, Evaluation
from streamllm.evaluate.record import BUSY, Record, load_record

PAGE = "report.html"
"""Name of the template among the assets, and of the page where no other is given."""


@dataclass(frozen=True)
class Shown:
    """One record as the page shows it.

    Args:
        anchor: of its place on the page.
        record: as it was loaded.
        began: when, in words.
        machine: in words.
        rows: the table, its head first; empty for a record that is no evaluation's.
        verdict: what was found.
        figure: an ``<svg>`` element.
        figures: as JSON, for a record that is no evaluation's.
    """

    anchor: str
    record: Record
    began: str
    machine: str
    rows: Sequence[tuple[str, ...]] = ()
    verdict: str = ""
    figure: str = ""
    figures: str = ""

    @property
    def is_quick(self) -> bool:
        """Whether it was a trial, which proves nothing."""
        return bool(self.record.figures.get("quick"))


@dataclass
class Section:
    """All records of one evaluation."""

    title: str
    shown: list[Shown] = field(default_factory=list)


def write_report(folder: Path, out: Path) -> int:
    """Write the page of all records in ``folder`` to ``out``, wholly or not at all; return how many it shows.

    A file that is no record, or that this version cannot show, is named on the page with the reason.

    Raises:
        InputError: there is no such folder, or no record in it that can be shown.
        ConfigError: matplotlib is not installed.
        StateError: the page cannot be written.
    """
    from streamllm.evaluate.catalogue import EVALUATIONS
    from streamllm.evaluate.figure import make_figure

    make_figure("")  # refused before any work, and not taken for a record that does not fit
    sections = {name: Section(kind.title) for name, kind in EVALUATIONS.items()}
    others: list[Shown] = []
    unread: list[tuple[str, str]] = []
    for number, path in enumerate(_files(folder)):
        try:
            record = load_record(path)
            kind = EVALUATIONS.get(record.name)
            shown = _show(f"r{number}", record, kind)
        except StreamLLMError as error:
            unread.append((path.name, str(error).replace(str(path), path.name)))
        except MISFITS as error:
            unread.append((path.name, _misfit(error)))
        else:
            (sections[record.name].shown if kind else others).append(shown)
    found = [section for section in sections.values() if section.shown]
    count = sum(len(section.shown) for section in found) + len(others)
    if not count:
        raise InputError(
            f"No file in {folder} is a record that can be shown; the first of {len(unread)}, {unread[0][0]}: "
            f"{unread[0][1]}"
        )
    page = _render(sections=found, others=others, unread=unread, count=count, version=streamllm.__version__)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.encode())
    except OSError as error:
        raise StateError(
            f"The report cannot be written to {out}: {error.strerror or error}. Name another file with --out."
        ) from error
    return count


def _files(folder: Path) -> list[Path]:
    """The files that may be records."""
    first = "run an evaluation first, for example `streamllm eval perplexity`, or name the folder of its results."
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}: {first}")
    files = sorted(path for path in folder.glob("*.json") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise InputError(f"There are no records in {folder}: {first}")
    return files


def _show(anchor: str, record: Record, kind: type[Evaluation] | None) -> Shown:
    """A record as the page shows it; raises one of ``MISFITS`` if its figures are not what this version draws."""
    from streamllm.evaluate.figure import to_svg

    began = datetime.fromisoformat(record.began).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    common: dict[str, Any] = {"anchor": anchor, "record": record, "began": began, "machine": _machine(record.machine)}
    if kind is None:
        return Shown(**common, figures=_spell(record.figures))
    return Shown(
        **common,
        rows=kind.rows(record.figures),
        verdict=kind.verdict(record.figures),
        figure=_inline(to_svg(kind.draw(record.figures)), anchor),
    )


def _misfit(error: Exception) -> str:
    """What is wrong with a record whose figures do not fit."""
    what = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return f"Its figures are not what this version shows ({what}): run the evaluation again."


def _machine(facts: dict[str, Any]) -> str:
    """The machine in a line; what was not known is left out."""
    words = [
        facts.get("device"),
        facts.get("cpu"),
        f"{facts['cores']} cores" if facts.get("cores") else None,
        f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'} used" if facts.get("threads") else None,
        f"{facts['ram_gib']} GiB" if facts.get("ram_gib") else None,
        facts.get("os"),
        *(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "streamllm") if facts.get(name)),
    ]
    load = facts.get("load_before") or 0
    if load > BUSY:
        words.append(f"busy with other work when it began (load {load}), so times are noisy")
    return " · ".join(str(word) for word in words if word)


def _spell(figures: dict[str, Any]) -> str:
    """Figures as JSON, each list of plain values on one line."""
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text)


def _inline(svg: str, prefix: str) -> str:
    """``svg`` fit to stand beside others on one page: ids of its own, and nothing that reaches beyond itself."""
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)  # styles would hold for the whole page
    svg = re.sub(r'\b(id="|href="#)', rf"\1{prefix}-", svg)
    return svg.replace("url(#", f"url(#{prefix}-").replace("<svg", '<svg role="img"', 1)


def _render(**values: Any) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    text = (importlib.resources.files("streamllm") / "assets" / PAGE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(text).render(**values)
