"""The card and the figure of a run: they say what was done, and nothing that was not."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from huggingface_hub import ModelCard

from streamllm.evaluate.figure import FORMATS, save_figure
from streamllm.train.card import make_card
from streamllm.train.figure import draw_run
from streamllm.train.recipe import SINKS, Recipe

RECIPE = Recipe(size="toy", tokens=1_000_000, vocabulary=777, learning_rate=0.0031, seed=42, warmup=0.025)
FACTS: dict[str, Any] = {
    "sources": [("stories.txt.xz", 3), ("books.jsonl", 1)],
    "corpus_tokens": 1234567,
    "measured": {
        "step": 1200,
        "held_out": {"tales": {"loss": 2.34567, "bits_per_byte": 0.98765}},
        "sink_mass": [0.123, 0.456],
        "perplexity": {"0+64": 99.5, "4+60": 12.25},
    },
    "seconds": 95.0,
    "machine": "2 cores",
    "dtype": "bfloat16",
    "step": 10**9,
}
LAYERS, MEASURED = 3, 4
ROWS: list[dict[str, Any]] = [
    {"step": 10 * i, "tokens": 1000 * i, "loss": 5 / i, "rate": 1e-3, "seconds": i} for i in range(1, 9)
] + [
    {
        "step": 20 * i,
        "tokens": 2000 * i,
        "held_out": {name: {"loss": 5 / (i + 1) + extra} for name, extra in (("tales", 0.1), ("books", 0.2))},
        "sink_mass": [0.1 * i + 0.01 * layer for layer in range(LAYERS)],
        "ratio": 1.0 + i,
    }
    for i in range(MEASURED)
]


# ---- the card


def test_the_card_has_a_header_that_the_hub_reads() -> None:
    """Reference: the Hub's own reader. What language the text is in nobody has said."""
    data = ModelCard(make_card(RECIPE, **FACTS)).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["streamllm", "attention-sinks"],
    }


def test_the_card_says_what_was_done() -> None:
    """Reference: the recipe and the figures that it is made from."""
    card = make_card(RECIPE, **FACTS)
    shape = RECIPE.shape
    for words in (
        f"# A Llama of {shape.parameters() / 1e6:.2f} M parameters",
        "2 layers, hidden size 64, 2 heads (1 for keys and values), feed-forward 192, 777 token ids",
        "sequences of 128 tokens, saved in bfloat16",
        "1,234,567 tokens",
        "\n- `stories.txt.xz` x 3\n- `books.jsonl` x 1\n",
        f"{RECIPE.steps} steps of {RECIPE.step_tokens:,} tokens ({RECIPE.steps * RECIPE.step_tokens:,} in all), muon",
        "learning rate 0.0031 after a warm-up of 2.5%, falling by a cosine to 5.0% of it",
        "weight decay 0.1, gradients clipped at 1, seed 42. It took 1.6 minutes on 2 cores.",
        "| held-out text | loss (nats a token) | bits a byte |\n|---|---|---|\n| tales | 2.3457 | 0.9877 |\n",
        "Attention on the first token, by layer: 12.3%, 45.6%.",
        "with the cache 0+64: 99.50; with 4+60: 12.25.",
        "## Limits",
    ):
        assert words in card
    assert card.endswith(".\n")
    assert "\n\n\n" not in card


@pytest.mark.parametrize(
    ("sink", "words"), [("token", "sink token `<|sink|>`"), ("zero", "softmax-off-by-one"), ("none", "no token stood")]
)
def test_the_card_says_how_the_model_was_given_its_sink(sink: Any, words: str) -> None:
    """Reference: the words for each kind, which no other kind's card has."""
    cards = {kind: make_card(Recipe(size="toy", sink=kind, tokens=1000), **FACTS) for kind in SINKS}
    assert [kind for kind, card in cards.items() if words in card] == [sink]


def test_a_card_without_figures_has_no_empty_table() -> None:
    """Reference: the headings that are left; all else is said as before."""
    whole, bare = make_card(RECIPE, **FACTS), make_card(RECIPE, **{**FACTS, "measured": None})
    assert re.findall(r"^#+ \w+", bare, re.M) == ["# A", "## Data", "## Recipe", "## Limits"]
    assert "|---|" not in bare
    assert "Perplexity" not in bare
    assert bare == whole[: whole.index("## What it reached")] + whole[whole.index("## Limits") :]


# ---- the figure


def test_the_figure_shows_the_log() -> None:
    """Reference: the rows of the log: the points of each line, a line for each text and for each layer."""
    figure = draw_run(ROWS, "toy: 0.1 M parameters")
    loss, mass, ratio = figure.axes
    assert figure.get_suptitle() == "toy: 0.1 M parameters"
    assert all(axes.get_title() and axes.get_ylabel() for axes in figure.axes)
    assert [axes.get_xlabel() for axes in figure.axes] == ["tokens trained"] * 3
    assert [line.get_label() for line in loss.lines] == ["training", "tales", "books"]
    assert [line.get_label() for line in mass.lines] == ["layer 0", "layer 1", "layer 2"]
    assert len({line.get_color() for line in mass.lines}) == LAYERS
    measured = [row for row in ROWS if "held_out" in row]
    assert np.array_equal(loss.lines[0].get_xydata(), [(row["tokens"], row["loss"]) for row in ROWS if "loss" in row])
    for line in loss.lines[1:]:
        points = [(row["tokens"], row["held_out"][line.get_label()]["loss"]) for row in measured]
        assert np.array_equal(line.get_xydata(), points)
    for layer, line in enumerate(mass.lines):
        assert np.array_equal(line.get_xydata(), [(row["tokens"], row["sink_mass"][layer]) for row in measured])
    assert np.array_equal(ratio.lines[0].get_xydata(), [(row["tokens"], row["ratio"]) for row in measured])


@pytest.mark.parametrize("rows", [ROWS, ROWS[8:9], []], ids=len)
def test_the_figure_is_written_as_png_and_as_svg(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Reference: the first bytes of a PNG, and a reader of XML; also for a run that was stopped at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(draw_run(rows, "a & <b>"), tmp_path / "loss")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", "loss.svg"]
    assert {f"loss.{kind}" for kind in FORMATS} == {"loss.png", "loss.svg"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the old files, byte for byte."""
    save_figure(draw_run(ROWS[:8], "before"), tmp_path / "loss")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("streamllm.atomic.os.fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            save_figure(draw_run(ROWS, "after"), tmp_path / "loss")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
