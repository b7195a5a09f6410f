"""The page of all records: what it shows, in which order, and that it stands on its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree

import pytest

from streamllm.errors import InputError, StateError
from streamllm.evaluate.cache_size import CacheSize
from streamllm.evaluate.evaluation import Evaluation, Figures
from streamllm.evaluate.figure import make_figure, to_svg
from streamllm.evaluate.record import FORMAT, Record
from streamllm.evaluate.report import write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from streamllm.evaluate.desk import Desk

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
VOID = {"meta", "br"}


@dataclass(frozen=True)
class Toy(Evaluation):
    """An evaluation that shows one value."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toys & others"
    quick: ClassVar[dict[str, Any]] = {}

    def run(self, desk: Desk) -> Figures:
        raise NotImplementedError

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        return [("what", "value"), ("the <toy>", f"{figures['value']:.3f}")]

    @staticmethod
    def verdict(figures: Figures) -> str:
        return f"The value is {figures['value']}, & < 100."

    @staticmethod
    def draw(figures: Figures) -> Figure:
        figure, (axes,) = make_figure("toy -->")
        axes.plot([1, 2], [0, figures["value"]], marker="o")
        return figure


class Last(Toy):
    """Another one, whose name comes first in the alphabet."""

    name: ClassVar[str] = "another"
    title: ClassVar[str] = "The last one"


class Page(HTMLParser):
    """What stands on a page; an element that is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name.endswith(("href", "src")):
                self.addresses.append(value or "")
            if value and "url(" in value:
                self.addresses.append(value.split("url(")[1].split(")")[0])
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data


@pytest.fixture(autouse=True)
def catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: tuple[type[Evaluation], ...] = (Toy, CacheSize, Last)
    monkeypatch.setattr("streamllm.evaluate.catalogue.EVALUATIONS", {kind.name: kind for kind in kinds})


MACHINE = {"cpu": "A chip", "cores": 2, "ram_gib": 8.0, "os": "An OS", "python": "3.11.7", "threads": 1}
TOY = Record(
    "toy",
    "streamllm eval toy --data 'a file.txt'",
    "2026-11-03T13:30:19+00:00",
    "abc123",
    {**MACHINE, "torch": "2.9", "transformers": "5.23", "streamllm": "0.1", "load_before": 0.1},
    "tiny",
    "float32",
    {"value": 3.25},
)


def put(folder: Path, name: str, record: Record | dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    found = record.to_dict() if isinstance(record, Record) else record
    (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def show(folder: Path) -> tuple[Page, str]:
    """The page of ``folder``."""
    out = folder / "report.html"
    write_report(folder, out)
    text = out.read_text(encoding="utf-8")
    return Page(text), text


def test_a_record_is_shown_with_all_that_is_needed_to_trust_it(tmp_path: Path) -> None:
    """Reference: the evaluation's own functions, and the record's fields."""
    put(tmp_path, "a", TOY)
    page, text = show(tmp_path)
    assert page.texts["h2"] == ["Toys & others"]
    assert page.texts["h3"] == ["tiny"]
    assert "The value is 3.25, & < 100." in page.texts["p"]
    assert page.texts["th"] + page.texts["td"] == ["what", "value", "the <toy>", "3.250"]
    assert page.texts["pre"] == ["streamllm eval toy --data 'a file.txt'"]
    for part in ("3 November 2026, 13:30 UTC", "commit abc123", "A chip · 2 cores · 1 thread used", "torch 2.9"):
        assert part in page.texts["p"][-1]
    assert "noisy" not in text
    assert "trial" not in text
    assert "not remembering for ever" in " ".join(page.texts["p"][0].split())


def test_the_figure_is_the_one_that_the_evaluation_draws(tmp_path: Path) -> None:
    """Reference: its drawing, path by path; the page's is well-formed by itself."""
    put(tmp_path, "a", TOY)
    _, text = show(tmp_path)
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    drawn = ElementTree.fromstring(to_svg(Toy.draw(TOY.figures)))
    paths = [[e.get("d") for e in root.iter("{http://www.w3.org/2000/svg}path")] for root in (svg, drawn)]
    assert paths[0] == paths[1]
    assert len(paths[0]) > 10


def test_the_page_stands_on_its_own(tmp_path: Path) -> None:
    """Reference: no address but on the page itself, each of them there and no id twice; no script; one style."""
    for number in range(3):
        put(tmp_path, f"a{number}", replace(TOY, model=f"m{number}"))
    page, text = show(tmp_path)
    assert len(page.ids) == len(set(page.ids)) > 50
    assert page.tags.count("svg") == 3
    assert {address[0] for address in page.addresses} == {"#"}
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert page.tags.count("style") == 1
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert text.count("http") == text.count("http://www.w3.org/")
    assert "@import" not in text


def test_evaluations_stand_in_the_order_of_the_catalogue(tmp_path: Path) -> None:
    """Reference: the catalogue, whose order is not the alphabet's; within one the files are in order."""
    put(tmp_path, "1", replace(TOY, name="another"))
    put(tmp_path, "2", replace(TOY, model="b"))
    put(tmp_path, "3", replace(TOY, model="a"))
    page, _ = show(tmp_path)
    assert page.texts["h2"] == ["Toys & others", "The last one"]
    assert page.texts["h3"] == ["b", "a", "tiny"]
    assert [text for text in page.texts["a"] if text in page.texts["h2"]] == page.texts["h2"]


def test_text_from_a_record_is_only_text(tmp_path: Path) -> None:
    """Reference: what the record says, letter by letter."""
    evil = '<script>alert("1")</script>'
    put(tmp_path, "a", replace(TOY, model=evil, command=f"x {evil}", dtype=evil, commit=evil))
    put(tmp_path, "b", replace(TOY, name="speed", model=evil, figures={"a": evil}))
    (tmp_path / "c<b>.json").write_text("{", encoding="utf-8")
    page, _ = show(tmp_path)
    assert "script" not in page.tags
    assert page.texts["h3"] == [evil]
    assert page.texts["pre"][0] == f"x {evil}"
    assert "c<b>.json" in page.texts["strong"]


def test_a_trial_and_a_busy_machine_are_named_so(tmp_path: Path) -> None:
    """Reference: the figures and the load of the record."""
    busy = {**TOY.machine, "load_before": 2.6}
    put(tmp_path, "a", replace(TOY, figures={**TOY.figures, "quick": True}, machine=busy))
    _, text = show(tmp_path)
    assert "a quick trial, which proves nothing" in text
    assert "(load 2.6), so times are noisy" in text


def test_other_records_are_there_with_their_figures(tmp_path: Path) -> None:
    """Reference: the JSON itself, of benchmarks that the repository holds."""
    figures = {"runs": [1, 2.5, 3], "none": None, "deep": [{"a": [True, "x [\n y"]}], "empty": []}
    put(tmp_path, "a", replace(TOY, name="speed", figures=figures))
    page, _ = show(tmp_path)
    assert page.texts["h2"] == ["Other records"]
    assert json.loads(page.texts["pre"][1]) == figures
    assert "[1, 2.5, 3]" in page.texts["pre"][1]
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page, _ = show(tmp_path)
    assert page.tags.count("details") > 3


def test_files_that_cannot_be_shown_are_listed_with_the_reason(tmp_path: Path) -> None:
    """Reference: a sound record beside them is shown all the same; no reason names a folder."""
    put(tmp_path, "sound", TOY)
    put(tmp_path, "later", {**asdict(TOY), "format": FORMAT + 1})
    put(tmp_path, "older", replace(TOY, figures={}))
    put(tmp_path, "odd", replace(TOY, figures={"value": "many"}))
    put(tmp_path, "bare", replace(TOY, machine=[]))  # type: ignore[arg-type]
    put(tmp_path, "foreign", {"a": 1})
    put(tmp_path, "list", [1])  # type: ignore[arg-type]
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / ".hidden.json").write_text("{", encoding="utf-8")
    page, text = show(tmp_path)
    assert page.texts["h3"] == ["tiny"]
    reasons = dict(item.strip().split(" ", 1) for item in page.texts["li"] if ".json" in item)
    assert reasons.keys() == {f"{n}.json" for n in ("bare", "broken", "foreign", "later", "list", "odd", "older")}
    assert f"has format {FORMAT + 1}" in reasons["later.json"]
    assert "it has no 'value'" in reasons["older.json"]
    assert all("run the evaluation again" in reasons[f"{name}.json"] for name in ("older", "odd", "bare", "foreign"))
    assert "not JSON" in reasons["broken.json"]
    assert str(tmp_path) not in text


def test_a_real_evaluation_is_shown(tmp_path: Path) -> None:
    """Reference: figures as ``eval cache-size`` writes them."""
    figures = {
        "tokens": 100,
        "files": ["packaged"],
        "sinks": 4,
        "sizes": [32, 64],
        "perplexity": {"32": [9.0, 8.5, 9.5], "64": [8.0, 7.5, 8.5]},
        "ratio": {"32": [0.9, 0.8, 1.0]},
        "cache_bytes": {"32": 1000, "64": 2000},
        "ms_per_token": {"32": 1.0, "64": 1.5},
    }
    put(tmp_path, "a", replace(TOY, name="cache-size", figures=figures))
    page, _ = show(tmp_path)
    assert page.texts["h2"] == [CacheSize.title]
    assert CacheSize.verdict(figures) in page.texts["p"]
    assert page.texts["td"] == [cell for row in CacheSize.rows(figures)[1:] for cell in row]


def test_where_there_is_nothing_to_show_it_says_what_to_do(tmp_path: Path) -> None:
    """Reference: the kinds of nothing; no page is written."""
    out = tmp_path / "report.html"
    with pytest.raises(InputError, match=r"There is no folder .*none: run an evaluation first"):
        write_report(tmp_path / "none", out)
    with pytest.raises(InputError, match="There are no records in"):
        write_report(tmp_path, out)
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"No file in .* can be shown; the first of 1, a\.json: a\.json is no record"):
        write_report(tmp_path, out)
    assert not out.exists()


def test_it_returns_how_many_records_it_shows_and_makes_the_folder(tmp_path: Path) -> None:
    """Reference: two of an evaluation, one of a benchmark, one that is none."""
    for number in range(2):
        put(tmp_path, f"a{number}", TOY)
    put(tmp_path, "b", replace(TOY, name="speed"))
    put(tmp_path, "c", {"a": 1})
    out = tmp_path / "pages" / "all.html"
    assert write_report(tmp_path, out) == 3
    assert "3 records, shown by streamllm" in out.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Reference: a folder stands in its place."""
    put(tmp_path, "a", TOY)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StateError, match=r"cannot be written to .*report\.html: .* with --out"):
        write_report(tmp_path, tmp_path / "report.html")
