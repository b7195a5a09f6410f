"""Maps of attention against what the model computes by itself, and what the evaluation says about them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import streamllm
from families import FAMILIES, REFUSED_OR_EXTRA
from stories import STORIES
from streamllm.console import Screen, Signals
from streamllm.errors import ConfigError, InputError, UnsupportedModelError
from streamllm.evaluate import attention
from streamllm.evaluate.attention import LayerSums, check_memory, mass_on_nothing, sink_mass, sum_attention
from streamllm.evaluate.attention_maps import AttentionMaps
from streamllm.evaluate.desk import Desk, Interrupted
from test_zero_sink import make as make_zero

SMALL = AttentionMaps(sequences=40, length=24, shown=6, heads=3, tokens=2000)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return FAMILIES["llama"].make(trained=64, dtype=torch.float64)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 50, (5, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return streamllm.load(STORIES)


def make_desk(loaded: tuple[Any, Any], out: Path, files: tuple[str, ...] = ()) -> Desk:
    return Desk(*loaded, files, out, "attention", {}, Screen(quiet=True), Signals())


def rows_of(ids: Tensor) -> list[Tensor]:
    return [ids[row : row + 1] for row in range(len(ids))]


# ---- the sums


def test_maps_are_means_of_the_weights_that_eager_attention_gives_out(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Reference: all weights at once, from a copy of the model that is eager."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(eager(ids, output_attentions=True).attentions).double()  # [L, B, H, T, T]
    for layer, expected in zip(sum_attention(model, rows_of(ids), skip=4, shown=7, kept=2), weights, strict=True):
        maps = layer.attention / layer.count
        assert (layer.kept, layer.count) == ([0, 3], 5)
        torch.testing.assert_close(maps[0], expected[:, :, :7, :7].mean((0, 1)), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(maps[1:], expected[:, [0, 3], :7, :7].mean(0), rtol=1e-6, atol=1e-7)
        for index, first in enumerate(attention.FIRST):
            mass = expected[:, :, 4:, :first].sum(-1).mean((0, 2))
            torch.testing.assert_close(layer.mass[:, index] / 5, mass, rtol=1e-6, atol=1e-7)
    assert model.config._attn_implementation == "sdpa"


def test_logits_are_those_of_queries_and_keys_but_for_a_constant(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Reference: the products of the first layer's queries and keys, less their mean over the keys seen."""
    block, total = model.model.layers[0], ids.shape[1]
    with torch.no_grad():
        x = block.input_layernorm(model.model.embed_tokens(ids))
        cos, sin = model.model.rotary_emb(x, torch.arange(total)[None])
        size = block.self_attn.head_dim
        query, key = (
            proj(x).unflatten(2, (-1, size)).transpose(1, 2)
            for proj in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / size**0.5
    seen = torch.ones(total, total).tril()
    centred = (scores - (scores * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)) * seen
    layer = sum_attention(model, rows_of(ids), skip=4, shown=9, kept=4)[0]
    got = layer.logits / layer.seen.clamp(min=1)
    torch.testing.assert_close(got[0], centred.mean((0, 1))[:9, :9], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1:], centred.mean(0)[:, :9, :9], rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.seen[1] > 0, seen[:9, :9] > 0)


@pytest.mark.parametrize("name", ["mpt", "falcon", "gemma3", "gpt2", "deepseek-v3"])
def test_any_model_with_eager_attention_can_be_watched_and_is_left_as_it_was(name: str, ids: Tensor) -> None:
    """Reference: the weights of the model when it is made eager; its logits before and after."""
    model, eager = (FAMILIES[name].make(attn=kind, trained=64, dtype=torch.float32) for kind in ("sdpa", "eager"))
    usual = model.config._attn_implementation
    with torch.no_grad():
        before = model(ids).logits
        weights = eager(ids, output_attentions=True).attentions
        first, nothing = sink_mass(model, ids, skip=3)
        after = model(ids).logits
    expected = torch.stack([each[:, :, 3:, 0].mean((0, 2)) for each in weights])
    torch.testing.assert_close(first.float(), expected, rtol=1e-5, atol=1e-6)
    assert not nothing.any()
    assert model.config._attn_implementation == usual
    assert torch.equal(before, after)


def test_layers_without_attention_are_left_out(ids: Tensor) -> None:
    """Reference: LFM2 of the tests has one layer with attention and one convolution."""
    assert len(sum_attention(REFUSED_OR_EXTRA["lfm2"].make(), rows_of(ids), skip=2)) == 1


def test_a_key_outside_the_models_own_window_is_not_seen(ids: Tensor) -> None:
    """Reference: the window of 6 tokens of every other layer."""
    sliding, full = sum_attention(FAMILIES["gemma3"].make(trained=64), rows_of(ids), skip=8, shown=12, kept=1)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    assert torch.equal(sliding.seen[1] > 0, (distance >= 0) & (distance < 6))
    assert torch.equal(full.seen[1] > 0, distance >= 0)


def test_what_a_learned_sink_takes_is_what_falls_on_nothing(ids: Tensor) -> None:
    """Reference: the same model with sinks so low that no head chooses them."""
    model = copy.deepcopy(FAMILIES["gpt-oss"].make(trained=64, dtype=torch.float32))
    first, nothing = sink_mass(model, ids, skip=3)
    assert float(nothing.min()) > 1e-3
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    alone, none = sink_mass(model, ids, skip=3)
    assert not none.any()
    assert bool((alone[0] > first[0]).all())


def test_the_written_out_zero_sink_is_the_one_that_models_run_with(ids: Tensor) -> None:
    """Reference: the logits with the implementation of every day."""
    model = make_zero()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("zero_sink_eager")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("zero_sink")
    sums = sum_attention(model, rows_of(ids), skip=3)
    assert all(bool((each > 0.01).all()) for each in mass_on_nothing(sums, model.dtype))


def test_sums_of_parts_are_the_sums_of_all(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Reference: all sequences in one go; the parts went through JSON."""
    whole = sum_attention(model, rows_of(ids), skip=4, shown=5, kept=2)
    parts = [sum_attention(model, rows_of(some), skip=4, shown=5, kept=2) for some in (ids[:2], ids[2:])]
    for number, layer in enumerate(whole):
        merged = LayerSums(4, skip=4, shown=5, kept=2)
        for part in parts:
            merged.merge(LayerSums.from_dict(json.loads(json.dumps(part[number].to_dict()))))
        assert merged.count == layer.count
        for name in ("mass", "nothing", "attention", "logits", "seen"):
            torch.testing.assert_close(getattr(merged, name), getattr(layer, name))


def test_masses_have_intervals_over_sequences(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Reference: each sequence by itself, and the textbook's formula."""
    rows = torch.cat([ids, ids.flip(0).flip(1), ids.roll(3, 1)])[:9]
    rows = rows.repeat(-(-9 // len(rows)), 1)[:9]
    alone = [sum_attention(model, rows_of(row[None]), skip=4)[0].mass[:, 0].mean() for row in rows]
    means = torch.stack(alone)
    (layer, *_) = sum_attention(model, rows_of(rows), skip=4)
    mean, error = float(means.mean()), 1.96 * float(means.std()) / 3
    assert layer.interval(0) == pytest.approx([mean, mean - error, mean + error])
    (few, *_) = sum_attention(model, rows_of(rows[:7]), skip=4)
    assert few.interval(0)[1:] == [None, None]


# ---- what cannot be done


def test_a_model_without_attention_is_refused_in_one_sentence() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError, match=r"mamba\) cannot be had.*take a model with eager attention"):
        sink_mass(model, torch.arange(9)[None], skip=2)


def test_a_length_whose_weights_do_not_fit_is_refused(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: 2 layers of 4 heads, 64 x 64 weights of 8 bytes: 262 kB."""
    monkeypatch.setattr(attention, "free_bytes", lambda _: 262_144)
    check_memory(model, 64)
    monkeypatch.setattr(attention, "free_bytes", lambda _: 262_143)
    with pytest.raises(ConfigError, match=r"64 tokens take 262\.1 kB.*smaller --length"):
        check_memory(model, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 0}, "sequences must be"),
        ({"length": 4}, "length must be"),
        ({"length": 12, "shown": 16}, "A map of 16 tokens needs sequences of as many: --length is 12"),
        ({"heads": 0}, "heads must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentionMaps(**options)


def test_what_model_and_text_cannot_give_is_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: stories260K was trained on 512 tokens."""
    with pytest.raises(ConfigError, match="trained on 512 tokens, you gave --length 513"):
        AttentionMaps(length=513).run(make_desk(loaded, tmp_path))
    (tmp_path / "short.txt").write_text("One day.")
    with pytest.raises(InputError, match="128 are needed"):
        AttentionMaps().run(make_desk(loaded, tmp_path, (str(tmp_path / "short.txt"),)))


# ---- the evaluation


def test_every_sequence_begins_as_a_stream_begins(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the ids that the model is given: the begin token, and cuts of the text that do not overlap."""
    desk, given = make_desk(loaded, tmp_path), []
    handle = desk.model.model.embed_tokens.register_forward_hook(lambda *call: given.append(call[1][0][0].tolist()))
    figures = SMALL.run(desk)
    handle.remove()
    text = desk.text(2000).ids[0].tolist()
    own = [row[1:] for row in given]
    assert (len(given), figures["sequences"], figures["begin"]) == (40, 40, ["<s>"])
    assert {row[0] for row in given} == {1}
    assert (own[0], own[-1]) == (text[1:24], text[-23:])
    places = [next(i for i in range(1, len(text)) if text[i : i + 23] == row) for row in own]
    assert all(b - a >= 23 for a, b in itertools.pairwise(places))


def test_a_run_that_is_broken_off_goes_on(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the run in one go; the second run does not read again what the first has read."""
    monkeypatch.setattr("streamllm.evaluate.attention_maps.GROUP", 15)
    whole = SMALL.run(make_desk(loaded, tmp_path / "whole"))
    first, reads = make_desk(loaded, tmp_path / "parts"), []
    handle = first.model.register_forward_hook(lambda *_: reads.append(1))

    def interrupt(done: int, words: str) -> None:
        if done == 20:
            first.signals.received = signal.SIGINT

    first._report = interrupt
    monkeypatch.setattr(first, "work", lambda total: contextlib.nullcontext())
    with pytest.raises(Interrupted):
        SMALL.run(first)
    assert (len(reads), first.model.config._attn_implementation) == (20, "sdpa")
    resumed = SMALL.run(make_desk(loaded, tmp_path / "parts"))
    handle.remove()
    assert len(reads) == 20 + 25
    assert resumed == whole


def test_the_table_and_the_maps_hold_what_was_measured(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: every row of weights adds up to one; the even share, token by token; the figures as JSON again."""
    figures = json.loads(json.dumps(SMALL.run(make_desk(loaded, tmp_path))))
    assert [len(layer) for layer in figures["mass"]["1"]] == [8] * 5
    assert figures["heads"] == [[0, 4, 7]] * 5
    assert all(len(layer) == 4 for kind in ("attention", "logits") for layer in figures[kind])
    for layer in figures["attention"]:
        assert all(sum(row) == pytest.approx(1, abs=1e-3) for rows in layer for row in rows)
    for layer in figures["logits"]:
        assert all(sum(row) == pytest.approx(0, abs=1e-3) for rows in layer for row in rows)
    assert figures["queries"] == [3, 24]
    assert figures["even"] == pytest.approx(sum(1 / n for n in range(4, 25)) / 21)
    rows = AttentionMaps.rows(figures)
    assert rows[0] == ("layer", "on the first token", "on the first 4", "strongest head, on the first")
    for line, heads in zip(rows[1:], figures["mass"]["1"], strict=True):
        assert line[1].startswith(f"{sum(heads) / 8:.3f} (")
        assert line[3] == f"{heads.index(max(heads))}: {max(heads):.3f}"
    figure = AttentionMaps.draw(figures)
    titles = [axes.get_title() for axes in figure.get_axes()]
    assert [title for title in titles if title.startswith("layer")] == [f"layer {n}" for n in (0, 1, 2, 4)] * 2
    assert {"attention on the first token, by head", "attention on the first tokens, by layer"} < set(titles)


def made_figures(mass: list[list[float]], nothing: list[list[float]] | None = None) -> dict[str, Any]:
    maps = [[[1.0], [0.5, 0.5]]] * 2
    return {
        "sequences": 3,
        "length": 16,
        "begin": ["<s>"],
        "queries": [2, 16],
        "even": 0.1,
        "mass": {"1": mass, "2": mass, "4": mass},
        "layers": {n: [[sum(heads) / len(heads), None, None] for heads in mass] for n in ("1", "2", "4")},
        "nothing": nothing,
        "attention": [maps for _ in mass],
        "logits": [[[[0.0], [-1.0, None]]] * 2 for _ in mass],
    }


def test_the_verdict_tells_sinks_from_none() -> None:
    """Reference: means taken by hand."""
    verdict = AttentionMaps.verdict(made_figures([[0.1, 0.1], [0.0, 0.2], [0.6, 0.8], [0.9, 0.9], [0.5, 0.5]]))
    assert "put 0.460 of their attention on the first token (<s>), 4.6 times an even share" in verdict
    assert "layer 3 the most, 0.900. 6 of 10 heads put 0.3 or more on it." in verdict
    assert verdict.endswith("The lowest 2 layers: 0.100, those above 0.700.")
    none = made_figures([[0.1, 0.2]], [[0.5, 0.7]])
    assert "0 of 2 heads put 0.3 or more on it: this model hardly leans on it." in AttentionMaps.verdict(none)
    assert AttentionMaps.verdict(none).endswith(
        "0.600 falls on no token at all, but on the sink that the model has beside them."
    )
    assert AttentionMaps.rows(none) == [
        ("layer", "on the first token", "on the first 4", "strongest head, on the first", "on nothing"),
        ("0", "0.150 (too few)", "0.150 (too few)", "1: 0.200", "0.600"),
    ]


def test_layers_with_unlike_numbers_of_heads_can_be_drawn() -> None:
    """Reference: the shape of the map, and nothing where there is no head."""
    figure = AttentionMaps.draw(made_figures([[0.1, 0.2, 0.3], [0.4]], [[0.1, 0.1, 0.1], [0.2]]))
    heads = next(axes for axes in figure.get_axes() if axes.get_title().endswith("by head"))
    drawn = heads.images[0].get_array().filled(math.nan)
    assert drawn.shape == (2, 3)
    assert drawn[1, 0] == 0.4
    assert all(math.isnan(x) for x in drawn[1, 1:])
