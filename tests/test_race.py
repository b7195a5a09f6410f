"""The draw without sorting, against the processors of transformers and ``torch.multinomial``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streamllm import race as module
from streamllm.config import SamplingConfig
from streamllm.race import make_noise, race, winners

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1, "top_p": 1},
    {"temperature": 0.7, "top_p": 0.5},
    {"temperature": 5, "top_p": 0.1},
    {"temperature": 1.7, "top_p": 0.999},
    {"temperature": 1, "top_p": 1e-6},
    {"temperature": 1, "top_p": 0.99999},
    {"top_p": 1, "top_k": 1},
    {"top_p": 1, "top_k": 40},
    {"top_p": 1, "top_k": 10**6},
    {"top_p": 0.9, "top_k": 40},
    {"top_p": 1, "min_p": 0.05},
    {"top_p": 0.8, "top_k": 30, "min_p": 0.02, "temperature": 2},
]

ROUNDINGS = {
    "float32": lambda x: x,
    "bfloat16": lambda x: x.bfloat16().float(),
    "many ties": lambda x: x.round(),
    "all equal": lambda x: x * 0,
    "some -inf": lambda x: x.where(x < 2, -math.inf),
}


def scores_of(seed: int, rows: int, size: int, spread: float = 3.0) -> torch.Tensor:
    """Random scores [rows, size]."""
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def kept_by_processors(scores: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Scores [B, V] after the processors that ``generate(do_sample=True)`` makes of these settings: -inf is out."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(config.temperature))])
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(float(config.top_p)))
    if config.min_p:
        processors.append(MinPLogitsWarper(config.min_p))
    kept: torch.Tensor = processors(None, scores)
    return kept


def generators(seeds: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("size", [1, 97, 8192, 49152])
def test_the_noise_is_that_of_torch(size: int) -> None:
    """Reference: ``exponential_()``, bit for bit, and the generator's state after it; a greedy row takes nothing."""
    ours, theirs, fresh = generators(range(3)), generators(range(3)), generators(range(3))
    configs = [SamplingConfig(), SamplingConfig(temperature=0), SamplingConfig()]
    noise = make_noise(torch.zeros(3, size), configs, ours)
    assert noise is not None
    for i in (0, 2):
        assert torch.equal(noise[i], torch.empty(size).exponential_(generator=theirs[i]))
        assert torch.equal(ours[i].get_state(), theirs[i].get_state())
    assert torch.equal(ours[1].get_state(), fresh[1].get_state())


def test_where_torch_makes_its_noise_otherwise_it_makes_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: ``exponential_()`` again, as on a build of torch on which our fast way gave other numbers."""
    monkeypatch.setattr(module, "_is_fast_the_same", lambda: False)
    noise = make_noise(torch.zeros(1, 500), [SamplingConfig()], generators(range(1)))
    assert noise is not None
    assert torch.equal(noise[0], torch.empty(500).exponential_(generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("size", [2, 97, 2000, 49152])
def test_exactly_the_ids_that_the_processors_keep_can_win(size: int, rounding: str) -> None:
    """Reference: the processors' own set. In each row the noise favours one id so much that it wins if it may at all.

    Every id of a small vocabulary has its row; of a large one those around the border, and both ends.
    """
    scores = ROUNDINGS[rounding](scores_of(size, 1, size))
    order = scores[0].argsort(descending=True)
    for settings in SETTINGS:
        config = SamplingConfig(**settings)
        kept = kept_by_processors(scores, config)[0] > -math.inf
        count = int(kept.sum())
        near = range(max(0, count - 6), min(size, count + 6))
        places = range(size) if size < 100 else sorted({0, 1, *near, size - 1})
        favoured = order[torch.tensor(places)]  # [R]
        noise = torch.ones(len(favoured), size).scatter_(1, favoured[:, None], 1e-30)
        drawn = winners(scores.expand(len(favoured), -1), [config] * len(favoured), noise)
        assert [won == id_ for won, id_ in zip(drawn, favoured.tolist(), strict=True)] == kept[favoured].tolist()


@pytest.mark.parametrize("settings", [{"min_p": 0.05}, {"min_p": 0.05, "top_p": 0.9}, {"top_p": 0.5}], ids=str)
def test_ids_on_the_very_border_are_kept_as_the_processors_keep_them(settings: dict[str, Any]) -> None:
    """Reference: the processors' own set; 40 ids lie some units of rounding around min_p times the best chance."""
    config = SamplingConfig(**({"temperature": 1, "top_p": 1} | settings))
    scores = torch.cat((torch.zeros(1), math.log(0.05) + torch.arange(-20, 20) * 3e-7))
    kept = kept_by_processors(scores[None], config)[0] > -math.inf
    assert 1 < kept.sum() < len(kept)
    noise = torch.ones(41, 41).fill_diagonal_(1e-30)
    drawn = winners(scores.expand(41, -1), [config] * 41, noise)
    assert [won == id_ for id_, won in enumerate(drawn)] == kept.tolist()


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 10.0])
@pytest.mark.parametrize("size", [97, 512, 8192, 49152])
def test_the_draws_are_those_of_multinomial_over_what_the_processors_keep(size: int, spread: float) -> None:
    """Reference: ``torch.multinomial`` with the same seeds; each row has other settings, rounding, seed and scores."""
    n = len(SETTINGS) * (1 if size > 10_000 else 8)
    scores = scores_of(size, n, size, spread)
    for i, rounding in enumerate(ROUNDINGS.values()):
        scores[i :: len(ROUNDINGS)] = rounding(scores[i :: len(ROUNDINGS)])
    configs = [SamplingConfig(**SETTINGS[i % len(SETTINGS)]) for i in range(n)]
    wanted = []
    for row, config, generator in zip(scores, configs, generators(range(n)), strict=True):
        chances = torch.softmax(kept_by_processors(row[None], config), -1)
        wanted.append(int(torch.multinomial(chances, 1, generator=generator)))
    assert race(scores, configs, generators(range(n))) == wanted


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_race_that_rounding_decides_is_decided_by_the_rounding_of_the_processors(settings: dict[str, Any]) -> None:
    """Reference: multinomial's formula over what the processors keep; the noise makes all ids equally fast."""
    config = SamplingConfig(**settings)
    scores = scores_of(3, 50, 97)
    noise = torch.softmax(scores / config.temperature, -1)
    chances = torch.softmax(kept_by_processors(scores, config), -1)
    assert winners(scores, [config] * 50, noise) == (chances / noise).argmax(-1).tolist()


def test_rows_are_drawn_from_as_if_each_were_alone() -> None:
    """Reference: each row in a call of its own; greedy rows, rows that hold nothing, and all kinds of settings."""
    scores = scores_of(1, 60, 97)
    scores[7], scores[8, 5], scores[9, 6] = -math.inf, math.nan, math.inf
    scores[10] = scores[10].round()
    kinds = [*SETTINGS, {"temperature": 0}]
    configs = [SamplingConfig(**kinds[i % len(kinds)]) for i in range(60)]
    together, alone = generators(range(60)), generators(range(60))
    for _ in range(5):
        wanted = [race(scores[i : i + 1], configs[i : i + 1], alone[i : i + 1])[0] for i in range(60)]
        assert race(scores, configs, together) == wanted
        assert [i for i, id_ in enumerate(wanted) if id_ is None] == [7, 8, 9]
    assert race(scores[:0], [], []) == []


def test_sorting_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: how many of 2000 rows went to the processors, where a draw is ten times slower."""
    sorted_rows = []
    by_processors = module._by_processors

    def counted(*row: Any) -> int:
        sorted_rows.append(row)
        return by_processors(*row)

    monkeypatch.setattr(module, "_by_processors", counted)
    scores = scores_of(2, 2000, 2000).bfloat16().float()
    race(scores, [SamplingConfig()] * 2000, generators(range(2000)))
    assert len(sorted_rows) < 30
