"""What all tests share: one thread, quiet libraries, and the families table.

``pytest tests/test_laws.py --families-table PATH`` writes what the law tests of that very run found about each family
as a Markdown table. Nothing in it is stated here: a test says which law it tests (``pytest.mark.law``) and hands over
what it measured (``record_property``); a law is passed if every collected test of it for the family has passed.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from stories import STORIES

# Tiny models gain nothing from a second thread, and on a busy machine each would wait for the other.
torch.set_num_threads(1)

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of several processes that share a run
if not IS_WORKER:
    # Compiled steps of tests do not belong into the user's cache; a folder that goes with the run.
    os.environ["STREAMLLM_COMPILED"] = tempfile.mkdtemp(prefix="streamllm-tests-")

LAWS = {
    1: "Any split of a stream into chunks gives the same logits as one token at a time.",
    2: "The logits are those of an independent, literal implementation with the same eviction schedule.",
    3: "Before the first eviction they are those of the plain model with a `DynamicCache`.",
    4: "With one layer they are those of a dense forward over exactly the kept tokens.",
    5: "Each row of a ragged batch equals the same stream alone, whatever the ages of the rows.",
    6: "Saved and loaded, or forked, a stream goes on as if nothing had happened, bit for bit.",
    7: "The bytes of the cache are constant from the first eviction on.",
    8: "Positions stay below the trained length, and their restart changes nothing.",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families-table",
        metavar="PATH",
        default=None,
        help="write what the law tests of this run found about each family to PATH, as a Markdown table",
    )


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["STREAMLLM_COMPILED"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "law(number): the test is about this law of the algorithm, 1 to 8")
    path = config.getoption("--families-table")
    if path:
        config.pluginmanager.register(FamiliesTable(Path(path)))


class FamiliesTable:
    """Collects what the law tests say about each family, and writes it down after the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.families: dict[str, str] = {}  # of each test, by node id
        self.laws: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))  # family: law: node ids
        self.passed: set[str] = set()
        self.failed: set[str] = set()
        self.found: dict[str, dict[str, list[object]]] = defaultdict(lambda: defaultdict(list))

    @pytest.hookimpl(tryfirst=True)  # before -k and -m take tests away: a law that was not tested has not passed
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
            if family is None or item.path.name != "test_laws.py":
                continue
            self.families[item.nodeid] = str(family)
            for mark in item.iter_markers("law"):
                self.laws[str(family)][mark.args[0]].add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self.families:
            return
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
            found = self.found[self.families[report.nodeid]]
            for name, value in report.user_properties:
                found[name].append(value)

    def pytest_sessionfinish(self) -> None:
        if self.passed:  # not when tests were only listed, or could not be collected
            self.path.write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """The whole page."""
        numbered = "\n".join(f"{number}. {law}" for number, law in LAWS.items())
        names = dict.fromkeys(self.families.values())
        lines = [self.row(name) for name in sorted(names, key=lambda name: ("refused" in self.found[name], name))]
        return "\n".join(
            [
                "# Families of models",
                "",
                "Made by `make docs` from the tests in `tests/test_laws.py`; do not edit. "
                f"torch {torch.__version__}, transformers {transformers.__version__}, "
                f"Python {platform.python_version()}, CPU.",
                "",
                "Tested are tiny random models of each family, with a trained length so short that positions restart "
                "again and again. The laws, each in float64 and float32:",
                "",
                numbered,
                "",
                "*positions*, *residual* and *layers* are what the probe found: how the model knows positions, how "
                "far its keys are from what that predicts, and its layers (`sink`: pinned head and window; `sliding`: "
                "the model's own window; `linear`: a state of constant size; `shared`: uses another layer's keys). "
                "*difference* is the largest one from the literal implementation in float64 (law 2; for re-reading "
                "families one that reads the kept tokens again), for logits of scale 1 to 3. Angles are float32 inside "
                "transformers, which is why it is about 1e-6 and not 1e-15.",
                "",
                "| family | positions | residual | layers | laws passed | how it streams | difference |",
                "|---|---|---|---|---|---|---|",
                *lines,
                "",
            ]
        )

    def row(self, name: str) -> str:
        """One line of the table."""
        found = self.found[name]
        if "refused" in found:
            return f"| {name} | | | | | refused: {_joined(found['refused'])} | |"
        laws = [str(law) for law, tests in sorted(self.laws[name].items()) if tests <= self.passed - self.failed]
        how = "; ".join(filter(None, [_joined(found["how"]), _joined(found["limits"])]))
        cells = [
            name,
            _joined(found["positions"]),
            _largest(found["residual"]),
            _joined(found["layers"]),
            " ".join(laws) or "none",
            how,
            _largest(found["difference"]),
        ]
        return f"| {' | '.join(cells)} |"


def _joined(values: Iterable[object]) -> str:
    """Different findings, in the order in which they came; a bar would end the cell."""
    return ", ".join(str(value).replace("|", "\\|") for value in dict.fromkeys(values))


def _largest(values: Iterable[object]) -> str:
    numbers = [float(str(value)) for value in values]
    if not numbers:
        return ""
    return f"{max(numbers):.0e}" if max(numbers) else "0"


# ---- what several files of tests need


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the settings nor the environment of whoever runs the tests; the model is stories260K."""
    for name in list(os.environ):
        if name.startswith("STREAMLLM_"):
            monkeypatch.delenv(name)
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("STREAMLLM_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("STREAMLLM_MODEL", str(STORIES))


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C as in a terminal: a job in the background inherits that it is ignored, and hands that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that even a toy learns."""
    from toys import write_text

    return write_text(tmp_path_factory.mktemp("text") / "stories.txt")


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A toy of each kind."""
    from toys import train

    folder = tmp_path_factory.mktemp("models")
    for sink in ("token", "zero", "none"):
        code, out, _ = train(text, folder / sink, "--sink", sink)
        assert (code, out) == (0, "")
    return {sink: folder / sink for sink in ("token", "zero", "none")}
