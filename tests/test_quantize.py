"""Weights in few bits: what a packed layer computes, what a quantised model does in a stream, and what is refused.

The reference is always the plain formula: the rounded weight, written out by hand in float64, in an ordinary layer.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import streamllm
from families import FAMILIES, VOCAB
from stories import STORIES
from streamllm import matvec, models, quantize
from streamllm.cache import SinkCache
from streamllm.cli import app
from streamllm.doctor import examine
from streamllm.errors import ConfigError, StateError, UnsupportedModelError
from streamllm.quantize import Int4Linear, Int8Linear, PackedLinear, check_kind, kind_of
from streamllm.sampling import SamplingConfig
from streamllm.slots import Slots
from streamllm.spec import inspect_model
from streamllm.state import load_state, save_state

BF16 = 2.0**-8
"""Relative error of one rounding to bf16, at most."""

has_int4 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="this processor has no kernel for int4"
)
KINDS = ["int8", pytest.param("int4", marks=has_int4)]


def rounded(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight [N, K] in float64 that a packed layer stands for, made from ``weight`` as the formulas say."""
    exact = weight.detach().double()
    if isinstance(layer, Int8Linear):
        scale = (exact.abs().amax(1) / 127).float().bfloat16().double()[:, None]
        return (exact / scale).round().clamp(-127, 127) * scale
    groups = exact.reshape(len(exact), -1, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).float().bfloat16().double()
    middle = (low + 8 * scale).float().bfloat16().double()
    codes = ((groups - middle) / scale + 8).round().clamp(0, 15)
    return ((codes - 8) * scale + middle).reshape(exact.shape)


def widened(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A copy with ordinary layers that hold the rounded weights of its quantised twin."""
    other = copy.deepcopy(model)
    packed = quantize.quantize(copy.deepcopy(model), kind)
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear):
            plain = other.get_submodule(name)
            wide = rounded(layer, plain.weight.T if isinstance(plain, Conv1D) else plain.weight)
            plain.weight = nn.Parameter((wide.T if isinstance(plain, Conv1D) else wide).to(model.dtype))
    return other


def toy(name: str = "llama", dtype: torch.dtype = torch.float32, trained: int = 64) -> PreTrainedModel:
    """A tiny random model, to change."""
    return copy.deepcopy(FAMILIES[name].make(dtype=dtype, trained=trained))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def read(model: PreTrainedModel, ids: Tensor, chunk: int) -> Tensor:
    """Logits [T, V] of a stream with many evictions."""
    cache = SinkCache(model, 2, 14, 4)
    with torch.no_grad():
        return torch.cat([model(ids[:, i : i + chunk], past_key_values=cache).logits[0] for i in range(0, 90, chunk)])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (1, 90), generator=torch.Generator().manual_seed(9))


# ---- a layer


@pytest.mark.parametrize("kind", [Int8Linear, pytest.param(Int4Linear, marks=has_int4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (8,), (70,), (3, 70)])
def test_a_packed_layer_computes_with_the_rounded_weight(
    kind: type[PackedLinear], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Reference: the formula in float64. The input, the output and, of many rows, the scale are rounded to bf16."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 96), torch.randn(48).to(dtype), torch.randn(*shape, 96).to(dtype)
    layer = kind(weight, bias)
    wide = rounded(layer, weight)
    found = layer(x)
    assert found.dtype == dtype
    assert found.shape == (*shape, 48)
    wanted = x.double() @ wide.T + bias.double()
    bound = BF16 * (x.double().abs() @ wide.abs().T + 3 * wanted.abs() + bias.double().abs())
    assert bool(((found.double() - wanted).abs() <= bound).all())
    assert distance(found, wanted) < 0.005


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_rounding_to_eight_bits_is_off_by_half_a_step_and_four_bits_by_half_of_theirs(rows: int) -> None:
    """Reference: the weight itself; a step is the largest of 127, or a fifteenth of a group's range."""
    torch.manual_seed(rows)
    weight = torch.randn(rows * 16, 64) * torch.logspace(-6, 3, rows * 16)[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    found = rounded(Int8Linear(weight, None), weight)
    assert bool(((found - weight).abs() <= step * (0.5 + 127 * BF16 / 2)).all())
    groups = weight.view(len(weight), 2, 32)
    span = groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)
    four = rounded(nn.Identity(), weight).view_as(groups)
    assert bool(((four - groups).abs() <= span * (0.5 / 15 + 2 * BF16)).all())


def test_zeros_stay_zeros() -> None:
    for layer in (Int8Linear(torch.zeros(16, 32), None), Int4Linear(torch.zeros(16, 32), None)):
        assert not layer(torch.randn(2, 32)).any()


def test_many_rows_are_multiplied_as_few_are() -> None:
    """Reference: the same rows one at a time, by the other kernel."""
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(64, 96), None), torch.randn(quantize.MANY_ROWS, 96)
    few = torch.cat([layer(row[None]) for row in x])
    assert distance(layer(x), few) < 2 * BF16
    layer.widens = False
    assert torch.equal(layer(x), few)


# ---- a model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mixtral", "gpt-oss", "gpt2", "bloom", "opt", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_computes_as_its_rounded_weights_do(family: str, kind: str, ids: Tensor) -> None:
    """Reference: the same model with the rounded weights in ordinary layers, in float32."""
    model = toy(family)
    wanted = widened(model, kind)
    with torch.no_grad():
        a, b = wanted(ids[:, :8]).logits, quantize.quantize(model, kind)(ids[:, :8]).logits
    assert kind_of(model) == kind
    assert distance(b, a) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_stream_through_a_quantised_model_is_that_of_its_rounded_weights(kind: str, chunk: int, ids: Tensor) -> None:
    """Reference: the rounded weights in ordinary layers, through the same cache, over many evictions."""
    model = toy()
    wanted = read(widened(model, kind), ids, chunk)
    found = read(quantize.quantize(model, kind), ids, chunk)
    assert distance(found, wanted) < 0.05
    assert distance(found[-20:], wanted[-20:]) < 0.05  # no drift


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch, of itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_step_is_that_of_the_model(kind: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the model with the cache, not compiled. In four bits it cannot be, as it is, and says so."""
    monkeypatch.setattr("streamllm.slots.STRIDE", 8)  # or all widths are one
    model = quantize.quantize(toy(), kind)
    notes: list[str] = []
    with torch.no_grad():
        caches = [SinkCache(model, 2, 14, 4) for _ in range(2)]
        for cache in caches:
            model(ids[:, :5], past_key_values=cache)
        side = Slots(model, 1, caches[0].capacity, compiles=True, note=notes.append)
        side.take(caches[0])
        for i in range(5, 40):
            wanted = model(ids[:, i : i + 1], past_key_values=caches[1]).logits[:, -1]
            assert distance(side.step(caches[:1], ids[0, i : i + 1].tolist()), wanted) < 0.05
    assert ["which is no weight" in note for note in notes] == ([True] if kind == "int4" else [])


def test_the_embedding_stays_while_the_tied_head_becomes_a_copy() -> None:
    """Reference: the model before."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    before = model.get_input_embeddings().weight.clone()
    quantize.quantize(model, "int8")
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert not any(type(layer) is nn.Linear for layer in model.modules())


@has_int4
def test_in_four_bits_the_head_has_eight_and_so_has_what_the_kernel_cannot_take() -> None:
    model = toy()
    odd = nn.Linear(64, 24)
    model.model.layers[0].mlp.extra = odd
    quantize.quantize(model, "int4")
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert isinstance(model.model.layers[0].mlp.extra, Int8Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)


def test_a_layer_that_no_kernel_can_take_stays_as_it_is() -> None:
    """Kernels read past the end of such rows."""
    model, _ = models.load(STORIES, quantize="int8")
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear  # 172 inputs
    assert isinstance(model.model.layers[0].mlp.up_proj, Int8Linear)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "bloom", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_finds_in_a_quantised_model_what_it_finds_in_the_model(family: str, kind: str) -> None:
    """Reference: the probe of the model before."""
    model = toy(family)
    before = inspect_model(model)
    after = inspect_model(quantize.quantize(model, kind))
    assert (after.positions, after.takes_masks) == (before.positions, before.takes_masks)
    assert [layer.kind for layer in after.layers] == [layer.kind for layer in before.layers]
    assert after.fingerprint != before.fingerprint


# ---- loading, saving, measuring


def test_eight_bits_cost_the_embedded_model_less_than_half_a_percent() -> None:
    """Reference: its perplexity in float32, on text that the model wrote itself."""
    model, tokenizer = models.load(device="cpu")
    draw = SamplingConfig(seed=1)
    text = streamllm.generate(model, tokenizer, "Once upon a time", max_tokens=400, sampling=draw)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]

    def loss(model: PreTrainedModel) -> float:
        with torch.no_grad():
            logits = model(ids, past_key_values=SinkCache(model, 4, 120, 16)).logits[0, :-1]
        return float(nn.functional.cross_entropy(logits, ids[0, 1:]))

    packed, _ = models.load(device="cpu", quantize="int8")
    assert abs(loss(packed) - loss(model)) < 0.005
    assert packed.dtype == torch.float32
    assert quantize.bytes_of(packed) < 0.55 * quantize.bytes_of(model)  # its embedding is a third of the model


def test_a_saved_stream_is_refused_by_the_model_in_other_bits(tmp_path: Path, ids: Tensor) -> None:
    """Reference: the model that it belongs to, which loads it."""
    plain, packed = toy(), quantize.quantize(toy(), "int8")
    for here, there in ((plain, packed), (packed, plain)):
        cache = SinkCache(here, 2, 14, 4)
        with torch.no_grad():
            here(ids[:, :30], past_key_values=cache)
        save_state(tmp_path / "a.stream", cache)
        assert load_state(tmp_path / "a.stream", here).cache.tokens_seen == 30
        with pytest.raises(StateError, match="other weights or another dtype or quantisation"):
            load_state(tmp_path / "a.stream", there)


def run(*arguments: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.stdout, str(found.exception or "")


@pytest.mark.usefixtures("no_settings")
def test_the_command_line_takes_the_kind_and_shows_it(tmp_path: Path) -> None:
    """Reference: the library with the same kind."""
    model, tokenizer = models.load(STORIES, quantize="int8")
    greedy = SamplingConfig(temperature=0)
    wanted = streamllm.generate(model, tokenizer, "Once", max_tokens=20, sampling=greedy)
    flags = ("--quantize", "int8", "--quiet")
    assert run("run", *flags, "-n", "20", "--temperature", "0", "Once") == (0, wanted, "")
    code, out, _ = run("doctor", "--json", *flags)
    facts = json.loads(out)
    assert (code, facts["quantize"], facts["dtype"]) == (0, "int8", "float32")
    assert facts["weights_bytes"] == quantize.bytes_of(model)
    assert "numbers" not in facts
    assert "float32, weights int8 on cpu" in dict(examine(STORIES, quantize="int8").rows())["weights"]


@pytest.mark.usefixtures("no_settings")
def test_an_evaluation_names_the_kind_and_keeps_its_results_apart(tmp_path: Path, text: Path) -> None:
    """Reference: the same evaluation of the model as it is."""
    records = {}
    for kind in ("none", "int8"):
        flags = ("--data", str(text), "--out", str(tmp_path), "--quick", "--quiet", "--quantize", kind)
        code, out, said = run("eval", "perplexity", "--json", *flags)
        assert (code, said) == (0, "")
        records[kind] = json.loads(out)
    assert [one["dtype"] for one in records.values()] == ["float32", "float32, weights int8"]
    assert records["none"]["figures"]["weights"] != records["int8"]["figures"]["weights"]
    files = sorted(file.name for file in tmp_path.glob("*.json"))
    assert files == ["perplexity-stories260K-int8-quick.json", "perplexity-stories260K-quick.json"]


# ---- what is refused


def test_an_unknown_kind_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_load_weights", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="no quantisation 'int3'; choose one of none, int8, int4"):
        models.load(quantize="int3")


def test_another_device_and_a_processor_without_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kind("none", torch.device("mps"))
    with pytest.raises(ConfigError, match="int8 run on the CPU only, and the device is mps"):
        check_kind("int8", torch.device("mps"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    check_kind("int8", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no fast kernel for int4 on this processor.*take int8"):
        check_kind("int4", torch.device("cpu"))


def test_a_model_is_quantised_once_and_only_if_a_layer_can_be() -> None:
    model = quantize.quantize(toy(), "int8")
    with pytest.raises(UnsupportedModelError, match="quantised to int8 already: load it anew"):
        quantize.quantize(model, "int8")
    assert quantize.quantize(model, "none") is model
    config = LlamaConfig(
        hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB
    )
    with pytest.raises(UnsupportedModelError, match="none of its linear layers has a multiple of 32 inputs"):
        quantize.quantize(LlamaForCausalLM(config), "int8")


# ---- the dtype that is taken


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[torch.dtype], Path]:
    """Copies of stories260K, stored in another dtype."""

    def make(dtype: torch.dtype) -> Path:
        model, tokenizer = models.load(STORIES, device="cpu")
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("dtype", "faster", "taken"),
    [
        (torch.bfloat16, 1.2, torch.bfloat16),
        (torch.bfloat16, 1.19, torch.float32),
        (torch.float16, 3.0, torch.float16),
        (torch.float16, 0.0, torch.float32),
        (torch.float32, None, torch.float32),
    ],
)
def test_a_large_checkpoint_keeps_half_precision_only_where_that_is_clearly_faster(
    dtype: torch.dtype,
    faster: float | None,
    taken: torch.dtype,
    stored: Callable[[torch.dtype], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was measured is given; ``None``: nothing may be measured."""

    def speedup(name: str) -> float:
        assert name == str(dtype).removeprefix("torch.")
        return faster if faster is not None else pytest.fail("measured")

    folder = stored(dtype)
    monkeypatch.setattr(matvec, "speedup", speedup)
    monkeypatch.setattr(models, "SMALL", 0)
    assert models.load(folder, device="cpu")[0].dtype == taken
    assert models.load(folder, device="cpu", quantize="int8")[0].dtype == torch.float32
    assert models.load(folder, device="cpu", dtype="float32")[0].dtype == torch.float32


def test_nothing_is_measured_for_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matvec, "speedup", lambda _: pytest.fail("measured"))
    assert models.load(device="cpu")[0].dtype == torch.float32  # stored in bfloat16


def test_the_measurement_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(matvec, "_seconds", lambda dtype: asked.append((dtype, torch.get_num_threads())) or 1.0)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    torch.set_num_threads(2)
    try:
        assert matvec.speedup("bfloat16") == 1.0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert asked == [(torch.float32, 1), (torch.bfloat16, 1)]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert matvec.speedup("float16") == 0.0


def test_a_product_takes_some_time() -> None:
    assert 0 < matvec._seconds(torch.float32) < 1
