"""The scripts that make the models and tables of docs/results, on toys."""

from __future__ import annotations

import importlib
import json
import lzma
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamllm
from streamllm import SinkCache
from streamllm.evaluate.scores import read_losses
from toys import FLAGS

pytestmark = pytest.mark.usefixtures("no_settings")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of recipes/ by its name."""
    for folder in ("benchmarks", "recipes"):
        monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # for the processes that scripts start
    return importlib.import_module


def test_the_plainest_books_come_first_until_they_are_enough(script: Any, tmp_path: Path, text: Path) -> None:
    """Reference: three books of known plainness."""
    plain, mixed, hard = "Lily saw a big dog. " * 50, "Lily saw xylem quartz. " * 50, "Xylem quartz vortex. " * 50
    books = tmp_path / "books.jsonl.xz"
    with lzma.open(books, "wt") as file:
        for title, book in (("hard", hard), ("plain", plain), ("mixed", mixed)):
            file.write(json.dumps({"title": title, "text": book}) + "\n")
    out = tmp_path / "out.jsonl.xz"
    picking = script("plain_books")
    picking.main(["--stories", str(text), "--books", str(books), "--chars", "1500", "--out", str(out)])
    with lzma.open(out, "rt") as file:
        assert [json.loads(line)["title"] for line in file] == ["plain", "mixed"]
    picking.main(
        [
            "--stories",
            str(text),
            "--books",
            str(books),
            "--chars",
            "1",
            "--after",
            "1500",
            "--out",
            str(tmp_path / "r.xz"),
        ]
    )
    with lzma.open(tmp_path / "r.xz", "rt") as file:
        assert [json.loads(line)["title"] for line in file] == ["hard"]
    known = frozenset(["lily", "saw", "a", "big", "dog"])
    assert picking.plainness(plain, known) == 1
    assert picking.plainness(mixed, known) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_twins_are_trained_compared_and_drawn(
    script: Any, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the losses of the saved models, read once more; the table holds what the record holds."""
    twins = script("twins")
    monkeypatch.setattr(twins, "STRETCH", 20)
    arguments = ["--data", str(text), "--heldout", str(text), "--work", str(tmp_path), "--tokens", "3000"]
    arguments += ["--eval-tokens", "800", "--flags", " ".join(FLAGS), "--out", str(tmp_path / "twins")]
    twins.main(arguments)
    record = json.loads((tmp_path / "twins.json").read_text())
    found = record["figures"]["twins"]
    assert set(found) == {"none", "zero", "token"}
    assert len({json.dumps({**twin["recipe"], "sink": ""}) for twin in found.values()}) == 1
    for sink, twin in found.items():
        assert twin["recipe"]["sink"] == sink
        assert twin["tokens_evaluated"] == 8 * 99
        for kept, (ratio, low, high) in twin["ratio_to_4"].items():
            assert ratio == pytest.approx(twin["perplexity"][kept] / twin["perplexity"]["4"])
            assert low <= high
    shown = (tmp_path / "twins.md").read_text()
    assert f"| one sink token | {found['token']['perplexity']['0']:.3f} (" in shown
    assert "| trained with | 0+16 | 1+15 | 2+14 | 4+12 |" in shown
    assert (tmp_path / "twins.svg").read_text().lstrip().startswith("<?xml")
    before = (tmp_path / "none" / "model.safetensors").stat().st_mtime_ns
    twins.main(arguments)  # goes on with what is there
    again = json.loads((tmp_path / "twins.json").read_text())["figures"]["twins"]
    assert {s: t["perplexity"] for s, t in again.items()} == {s: t["perplexity"] for s, t in found.items()}
    assert (tmp_path / "none" / "model.safetensors").stat().st_mtime_ns > before


def test_a_paired_interval_is_narrow_where_both_vary_together(script: Any) -> None:
    """Reference: a constant ratio has an interval of no width; another one that is known to hold 1."""
    twins = script("twins")
    below = np.random.default_rng(0).exponential(2.0, (8, 5000))
    assert twins.ratio(below + math.log(1.1), below) == pytest.approx([1.1, 1.1, 1.1])
    noisy = below + np.random.default_rng(1).normal(0, 0.5, below.shape)
    middle, low, high = twins.ratio(noisy, below)
    assert low < 1 < high
    assert low < middle < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(below.size), rel=0.3)


def test_the_long_stream_is_compared_on_the_same_tokens(
    script: Any, tmp_path: Path, text: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the losses read in one go, cut by hand."""
    million = script("million")
    monkeypatch.setattr(million, "POINT", 500)
    million.main(
        f"--model {trained['token']} --text {text} --out {tmp_path / 'million'} --tokens 4000 --last 200 --before 40 "
        "--window 12 --block 4 --threads 1".split()
    )
    figures = json.loads((tmp_path / "million.json").read_text())["figures"]
    model, tokenizer = streamllm.load(trained["token"])
    ids = million.first_ids(tokenizer, [text], 4000)
    whole = read_losses(model, ids, SinkCache(model, 1, 12, 4), step=5)[0]
    assert figures["tokens"] == 3999
    assert len(figures["curve"]) == 7
    assert figures["curve"][1] == pytest.approx(float(whole[500:1000].double().mean().exp()), rel=1e-5)
    assert figures["last"]["stream"] == pytest.approx(float(whole[-200:].double().mean().exp()), rel=1e-5)
    assert figures["last"]["ratio"] == pytest.approx(1, abs=0.1)
    assert len(figures["dense"]) == len(figures["stream_beside_dense"]) == 8
    assert figures["dense"][0] == pytest.approx(dense(model, ids[:, :33]), rel=1e-4)
    one = read_losses(model, ids, SinkCache(model, 1, 15, 1), step=5).double().mean().exp()
    assert list(figures["pinned"]) == ["0+16", "1+15", "2+14", "4+12"]
    assert figures["pinned"]["1+15"] == pytest.approx(float(one), rel=1e-5)
    assert (tmp_path / "million.png").stat().st_size > 1000


def dense(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).exp())


def test_the_page_of_results_is_what_the_records_say(script: Any, tmp_path: Path) -> None:
    """Reference: the page in the repository; the part by hand stays."""
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    page = tmp_path / "results" / "README.md"
    written = page.read_text(encoding="utf-8")
    results = script("results")
    page.write_text(written.partition(results.MARK)[0] + results.MARK + "\nold", encoding="utf-8")
    results.main(["--results", str(tmp_path / "results")])
    assert page.read_text(encoding="utf-8") == written
