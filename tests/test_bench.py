"""The command ``bench``: its methods compute the same, its arithmetic is right, and it says what it leaves out.

No time is asserted here.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stories import STORIES
from streamllm import SinkCache
from streamllm.bench import delay, llamacpp
from streamllm.bench.bandwidth import Bandwidth, measure_bandwidth, tensor_bytes, weight_bytes
from streamllm.bench.catalogue import METHODS
from streamllm.bench.decode import filled, make_method
from streamllm.bench.delay import measure_delay
from streamllm.bench.figure import draw
from streamllm.bench.method import Method, Misfit
from streamllm.bench.ours import Compiled, Eager, Shift, make_cache
from streamllm.bench.plan import Plan
from streamllm.bench.published import FIGURE_10, SIZES
from streamllm.bench.raw_cache import RawCache
from streamllm.bench.rounds import ratio, summary, take_turns
from streamllm.bench.shape import SHAPES, Shape, make_model
from streamllm.bench.subject import Subject, twin
from streamllm.bench.table import tables
from streamllm.bench.upkeep import measure_upkeep
from streamllm.bench.verdict import ratios, targets
from streamllm.bench.window_alone import measure_window
from streamllm.evaluate.figure import to_svg
from streamllm.evaluate.memory import peak_bytes, rss_bytes
from streamllm.evaluate.record import begin_record
from test_command import run

pytestmark = [
    pytest.mark.usefixtures("no_settings"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),  # torch, of itself
]

CPU = torch.device("cpu")
TOY = SHAPES["toy"]
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
PEERS = pytest.mark.skipif(
    not (find_spec("llama_cpp") and find_spec("gguf")),
    reason="llama-cpp-python and gguf are not installed: make bench-peers",
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A toy, with evictions of 8."""
    return Subject(make_model(TOY, torch.float32, CPU), TOY, tmp_path, block=8)


def leave_nothing(what: str, why: str) -> None:
    pytest.fail(f"{what} was left out: {why}")


def is_quiet(words: str) -> None:
    """What is told of turns."""


# ---- the command


def quick(*flags: str) -> tuple[dict[str, Any], str]:
    """The record of a trial, which is the last line, and the lines before it."""
    code, out, _ = run("bench", "--quick", "--threads", "1", *flags)
    assert code == 0
    *shown, last = out.splitlines()
    return json.loads(last), "\n".join(shown)


@pytest.mark.parametrize(
    "names",
    [
        ("eager", "dense", "recompute"),
        # Five steps are compiled, which takes minutes.
        pytest.param(("compiled", "eager", "dense", "recompute"), marks=[COMPILER, pytest.mark.slow]),
    ],
    ids=",".join,
)
def test_a_trial_measures_each_method_at_each_window(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Reference: by hand; W + (B - 1) / 2 tokens of context for ours, W where one token leaves at each step."""
    out = tmp_path / "out"
    record, shown = quick("--windows", "64,160", "--out", str(out), "--methods", ",".join(names))
    assert sorted(path.name for path in out.iterdir()) == [f"bench-toy-quick.{kind}" for kind in ("json", "png", "svg")]
    assert json.loads((out / "bench-toy-quick.json").read_text()) == record
    assert record["name"] == "bench"
    assert record["model"] == f"{TOY.describe()} (toy)"
    assert record["machine"]["threads"] == 1
    figures = record["figures"]
    assert figures["quick"] is True
    assert figures["left_out"] == []
    found = {(e["window"], e["rows"], e["method"]): e for e in figures["decode"]}
    one = [(window, 1, name) for window in (64, 160) for name in names]
    assert list(found) == [*one, *((160, 2, name) for name in names[:-1])]
    contexts = {"compiled": 31.5, "eager": 31.5, "dense": 0.5, "recompute": 0}
    for (window, rows, name), entry in found.items():
        assert entry["context"] == window + contexts[name]
        assert entry["steps"] == {"recompute": 4}.get(name, 64)
        assert len(entry["ms_per_step"]["rounds"]) == 1
        assert entry["tokens_per_s"] == pytest.approx(1000 * rows / entry["ms_per_step"]["median"], rel=0.01)
        assert ("share_of_floor" in entry) == (name != "recompute")
    assert [(e["method"], e["prompt"]) for e in figures["prefill"]] == [("eager", 160), ("dense", 160), ("eager", 640)]
    assert [e["method"] for e in figures["window_alone"]] == list(names[:-1])
    assert figures["upkeep"]["tokens_between_restarts"] == ((1024 - (160 + 63)) // 64 + 1) * 64
    of_compiled = ["compiled / dense, ms per token, window 160", "compiled, share of the floor, window 160"]
    assert [target["name"] for target in figures["targets"]] == [
        *(of_compiled if "compiled" in names else ()),
        "evictions and restarts, block 64",
        "first token beside 7 streams / alone",
    ]
    assert figures["delay"]["others"] == 7
    assert 0 < figures["loop"]["share"] < 1
    for title in ("decoding; this machine reads", "reading a prompt", "the window alone", "targets"):
        assert title in shown


def test_a_loaded_model_is_measured_where_it_fits(tmp_path: Path) -> None:
    """Reference: stories260K knows 512 positions; what does not fit, or only nearly, is named with the reason."""
    flags = ("--methods", "eager,dense,paper", "--batches", "1", "--rounds", "1")
    code, out, _ = run(
        "bench", "-m", str(STORIES), "--windows", "64,512,4096", *flags, "--json", "--out", str(tmp_path)
    )
    assert code == 0
    record = json.loads(out)
    assert record["model"] == "stories260K"
    found = {(e["method"], e["window"]) for e in record["figures"]["decode"]}
    assert {method for method, window in found if window == 64} == {"eager", "dense", "paper"}
    assert ("eager", 512) not in found
    what = {entry["what"]: entry["why"] for entry in record["figures"]["left_out"]}
    assert what["window 4096"] == "the model was trained on 512 positions"
    assert "use a window of at most 445" in what["the delay of the first token"]
    assert (tmp_path / "bench-stories260K.json").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--shape", "13B"), "There is no shape '13B'; choose one of toy, 15M, 135M"),
        (("--methods", "dense,vllm"), "There is no method 'vllm'; choose of compiled"),
        (("--methods", ","), "--methods is empty"),
        (("--windows", "256,many"), "--windows takes whole numbers with commas, you gave '256,many'"),
        (("--windows", "8"), "each of --windows must be a whole number of at least 16, you gave 8"),
        (("--windows", ""), "--windows is empty"),
        (("--windows", "2048,4096"), "No window of 2048, 4096 fits this model, which was trained on 512 positions"),
        (("--batches", "0"), "each of --batches must be a whole number of at least 1, you gave 0"),
        (("--rounds", "0"), "rounds must be a whole number of at least 1"),
        (("--threads", "0"), "threads must be a whole number of at least 1"),
        (("--shape", "15M", "-m", "x"), "Both --model and --shape are given"),
        (("--shape", "15M", "--dtype", "float64"), "There is no dtype 'float64' here; choose one of auto, float32"),
        (("--shape", "15M", "--device", "abacus"), "There is no device 'abacus'"),
        (("--out", __file__), "test_bench.py is no folder; name another one with --out."),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags: Sequence[str], said: str) -> None:
    """Reference: by hand; exit code 2, as for all wrong values."""
    code, out, err = run("bench", *flags)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 0


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: 6.7 thousand million weights of four bytes; half of it would fit."""
    monkeypatch.setattr("streamllm.models.free_bytes", lambda device: 20_000_000_000)
    code, _, err = run("bench", "--shape", "7B", "--dtype", "float32", "--device", "cpu")
    assert code == 2
    assert "take 27.0 GB in float32, and 20.0 GB of memory are free on cpu: pass --dtype bfloat16 (13.5 GB)" in err


def test_a_trial_keeps_what_was_given_by_hand() -> None:
    """Reference: by hand."""
    plan = Plan(windows=(32,), shape="15M").quick(frozenset({"windows", "shape"}))
    assert (plan.windows, plan.shape, plan.batches, plan.rounds) == ((32,), "15M", (1, 2), 1)
    assert Plan().quick(frozenset()).shape == "toy"
    assert Plan().at == 1024
    assert Plan(windows=(512, 2048)).at == 512
    assert Plan(windows=(2048, 4096)).at == 2048


# ---- the methods compute the same


def logits_of(method: Method, ids: Tensor) -> Tensor:
    """The logits [B, T, V] of single tokens after a prompt of ten."""
    with torch.no_grad():
        method.read(ids[:, :10])
        step = getattr(method, "step", method.read)
        return torch.stack([step(ids[:, i : i + 1]).clone() for i in range(10, ids.shape[1])], dim=1)


@pytest.mark.parametrize("name", ["eager", "recompute", "reread", "shift", "paper", "paper-sdpa"])
@pytest.mark.parametrize("rows", [1, 2])
def test_before_anything_leaves_all_give_the_logits_of_plain_transformers(
    subject: Subject, name: str, rows: int
) -> None:
    """Reference: the dense method, which is a ``DynamicCache``."""
    ids = subject.ids(rows, 30)
    want = logits_of(make_method("dense", subject, 64, rows), ids)
    found = logits_of(make_method(name, subject, 64, rows), ids)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@COMPILER
def test_the_compiled_step_gives_the_logits_of_the_plain_loop_over_evictions(subject: Subject) -> None:
    """Reference: the eager method, over five evictions."""
    ids = subject.ids(1, 80)
    want, found = (logits_of(kind(subject, 32), ids) for kind in (Eager, Compiled))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_shift_turns_all_keys_and_changes_nothing_else(subject: Subject) -> None:
    """Reference: a cache with the same schedule whose window keys are never turned."""
    shift = Shift(subject, 32)
    plain = SinkCache(subject.model, 4, 32 - 16 + 1 - 4, 16)
    assert shift.cache.capacity == plain.capacity == 32
    ids = subject.ids(1, 70)
    with torch.no_grad():
        for first in range(70):
            want = subject.model(ids[:, first : first + 1], past_key_values=plain).logits[:, -1]
            torch.testing.assert_close(shift.read(ids[:, first : first + 1]), want, rtol=1e-4, atol=1e-5)
            assert shift.cache.tokens_cached == plain.tokens_cached
    keys, untouched = (cache.layers[1].stores[0].data[:, :, 4:20] for cache in (shift.cache, plain))
    assert not torch.allclose(keys, untouched, atol=1e-3)


def test_the_papers_scheme_gives_the_logits_of_a_sink_cache_with_block_1(subject: Subject) -> None:
    """Reference: SinkCache with the paper's schedule; so what is compared in speed computes the same."""
    ids = subject.ids(1, 60)
    raw, ours = RawCache(subject.plain.get_decoder(), 4, 20), SinkCache(subject.model, 4, 20, block=1)
    with torch.no_grad():
        subject.plain(ids[:, :24], past_key_values=raw)
        subject.model(ids[:, :24], past_key_values=ours)
        for i in range(24, 60):
            token = ids[:, i : i + 1]
            raw.make_room(1)
            positions = torch.tensor([[raw.get_seq_length()]])
            theirs = subject.plain(token, past_key_values=raw, position_ids=positions).logits
            torch.testing.assert_close(subject.model(token, past_key_values=ours).logits, theirs, rtol=1e-4, atol=1e-5)
            assert raw.get_seq_length() == ours.tokens_cached == 24


def make_uneven(folder: Path, *, tied: bool) -> Subject:
    """A model whose weights, norms included, are of the size that trained ones have, so that each of them matters."""
    found = Shape(64, 128, 3, 4, 2, 512, tied=tied, positions=1024)
    model = make_model(found, torch.float32, CPU)
    draw = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.normal_(0, 0.2, generator=draw) if weight.ndim == 2 else weight.uniform_(0.5, 1.5, generator=draw)
    return Subject(model, found, folder)


@PEERS
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_gives_the_logits_of_transformers(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the plain model; llama.cpp keeps keys and values in float32 here, and does not fuse attention."""
    api: Any = importlib.import_module("llama_cpp")
    defaults = api.llama_context_default_params

    def exact() -> Any:
        options = defaults()
        options.type_k = options.type_v = api.GGML_TYPE_F32
        options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return options

    monkeypatch.setattr(api, "llama_context_default_params", exact)
    own = make_uneven(tmp_path, tied=tied)
    ids = own.ids(2, 40)
    theirs = make_method("llamacpp-f32", own, 64, 2)
    found = logits_of(theirs, ids)
    theirs.close()
    torch.testing.assert_close(found, logits_of(make_method("dense", own, 64, 2), ids), rtol=1e-3, atol=1e-3)


@PEERS
@pytest.mark.parametrize(("kind", "item", "most"), [("f32", 4, 0.01), ("f16", 2, 0.02), ("q8_0", 34 / 32, 0.2)])
def test_llama_cpp_as_it_is_rounds_but_does_not_differ(tmp_path: Path, kind: str, item: float, most: float) -> None:
    """Reference: the plain model, by the root mean square; and the bytes of its weights. No file stays behind."""
    folder = tmp_path / "weights"
    folder.mkdir()
    own = make_uneven(folder, tied=True)
    ids = own.ids(1, 40)
    theirs = make_method(f"llamacpp-{kind}", own, 64)
    found, want = logits_of(theirs, ids), logits_of(make_method("dense", own, 64), ids)
    theirs.close()
    assert float((found - want).std() / want.std()) < most
    assert theirs.weight_bytes == pytest.approx(weight_bytes(own.model) * item / 4, rel=0.01)
    assert not list(folder.iterdir())


@PEERS
def test_llama_cpp_decodes_at_the_end_of_its_context(subject: Subject) -> None:
    """Reference: by hand; the last 64 of 128 tokens, twice."""
    with filled(["llamacpp-f32"], subject, 128, 1, leave_nothing) as (method,):
        for _ in range(2):
            assert method.turn() > 0
            assert method.context == 64 + 65 / 2
        assert method.cache_bytes == 128 * subject.token_bytes / 2


def test_rivals_that_are_not_installed_are_left_out_with_the_remedy(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: by hand."""
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    left: list[tuple[str, str]] = []
    with filled(["llamacpp-f32", "eager"], subject, 32, 2, lambda *words: left.append(words)) as methods:
        assert [method.name for method in methods] == ["eager"]
    said = "the package llama-cpp-python is not installed: make bench-peers"
    assert left == [("llamacpp-f32 at window 32 with 2 rows", said)]


def test_every_method_decodes_in_turns(subject: Subject) -> None:
    """Reference: by hand; what a turn attends to, and what it holds."""
    names = [name for name in METHODS if name not in ("compiled", "int8") and not name.startswith("llamacpp")]
    with filled(names, subject, 32, 1, leave_nothing) as methods:
        for method in methods * 2:
            assert method.turn() > 0
            assert method.tokens > 0
        contexts = {method.name: method.context for method in methods}
        held = {method.name: method.cache_bytes for method in methods}
    assert contexts == {
        "eager": 32 + 7 / 2,
        "dense": 32.5,
        "recompute": 32,
        "reread": 24.5,
        "shift": 24,
        "paper": 32,
        "paper-sdpa": 32,
    }
    token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, bytes
    assert held["recompute"] == 0
    assert held["paper"] == held["reread"] == 32 * token
    assert held["eager"] == (32 + 7 + 4) * token  # and the copies of the sinks


def test_a_window_that_the_model_has_no_positions_for_is_left_out(subject: Subject) -> None:
    """Reference: a toy of 1024 positions."""
    for name in ("eager", "dense", "recompute", "reread", "paper"):
        with pytest.raises(Misfit, match="1024"):
            make_method(name, subject, 1040)
    with pytest.raises(Misfit, match="of memory are free"):
        make_method("dense", subject, 1024, 10**7)


def test_a_twin_stands_on_the_same_memory_and_has_no_hooks(tmp_path: Path) -> None:
    """Reference: the addresses of the weights; a tie stays a tie."""
    model = make_model(TOY, torch.float32, CPU)
    subject = Subject(model, TOY, tmp_path)
    SinkCache(model, 4, 20)
    assert [w.data_ptr() for w in subject.plain.parameters()] == [w.data_ptr() for w in model.parameters()]
    assert subject.plain.lm_head.weight is subject.plain.model.embed_tokens.weight
    assert len(model.get_decoder()._forward_pre_hooks) == 1
    assert len(subject.plain.get_decoder()._forward_pre_hooks) == 0
    assert twin(subject.plain, "eager").config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"


# ---- arithmetic


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_count_their_weights(tied: bool) -> None:
    """Reference: the model itself; rows of an embedding are looked up, and read by a step only if they are the head."""
    found = Shape(48, 96, 3, 6, 2, 300, tied=tied, head_size=16)
    model = make_model(found, torch.bfloat16, CPU)
    assert sum(weight.numel() for weight in model.parameters()) == found.parameters
    assert weight_bytes(model) == 2 * (found.parameters - (0 if tied else 300 * 48))
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_a_thin_shape_caches_what_the_whole_one_does_and_weighs_nothing(name: str) -> None:
    """Reference: the configs, which transformers checks."""
    whole, thin = SHAPES[name].config(), SHAPES[name].thin().config()
    for what in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(thin, what) == getattr(whole, what)
    assert SHAPES[name].thin().parameters < SHAPES[name].parameters / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_models_can_be_read_by_the_compiled_step(dtype: torch.dtype, tmp_path: Path) -> None:
    """Reference: the probe, which half precision must not mislead; the thin twin of the largest shape among them."""
    thin = dataclasses.replace(SHAPES["7B"].thin(), layers=4)
    for found in (TOY, TOY.thin(), thin):
        subject = Subject(make_model(found, dtype, CPU), found, tmp_path)
        assert subject.spec.takes_masks
        assert subject.spec.positions == "rotary"


def test_named_shapes_are_as_large_as_their_names() -> None:
    """Reference: the names."""
    sizes = {"15M": 15.2e6, "135M": 134.5e6, "360M": 361.8e6, "1B": 1235.8e6, "7B": 6738.4e6}
    assert {name: found.parameters for name, found in SHAPES.items() if name != "toy"} == {
        name: pytest.approx(size, rel=1e-3) for name, size in sizes.items()
    }


def test_random_weights_compute_what_the_same_weights_do_in_a_usual_model() -> None:
    """Reference: a model that transformers made, with these weights loaded."""
    from transformers import LlamaForCausalLM

    model = make_model(TOY, torch.float32, CPU)
    usual = LlamaForCausalLM(TOY.config()).eval()
    usual.load_state_dict(model.state_dict())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, usual(ids).logits)
    assert float(model.model.layers[0].mlp.up_proj.weight.std()) == pytest.approx(64**-0.5, rel=0.05)


def test_the_floor_is_what_a_step_reads_by_what_the_machine_reads(subject: Subject) -> None:
    """Reference: by hand; weights, and keys and values of the context of each row."""
    assert Bandwidth(product=2e9, total=1e9).floor_ms(1e9) == 500
    method = make_method("dense", subject, 32, 3)
    method.context = 32
    token = 2 * 2 * 2 * 16 * 4
    assert method.step_bytes == 4 * TOY.parameters + 3 * 32 * token
    assert make_method("recompute", subject, 32).step_bytes is None


def test_bandwidth_is_measured_in_two_ways() -> None:
    """Reference: both read something in some time; the better counts."""
    found = measure_bandwidth(CPU, 1 << 20)
    assert found.best == max(found.product, found.total) > min(found.product, found.total) > 0


def test_bytes_of_quantised_weights_are_those_of_their_parts() -> None:
    """Reference: by hand; a tensor of subclasses says of what it is made."""

    class Made:
        codes, scales = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scales"], None

    assert tensor_bytes(Made()) == 32 + 16  # type: ignore[arg-type]
    assert tensor_bytes(torch.zeros(3, 5, dtype=torch.float16)) == 30


def test_methods_take_turns_and_the_first_round_does_not_count() -> None:
    """Reference: by hand."""
    told: list[str] = []
    values = itertools.count()
    turns = {name: lambda: float(next(values)) for name in "ab"}
    assert take_turns(turns, 2, told.append) == {"a": [2, 4], "b": [3, 5]}
    assert told == list("ababab")
    assert ratio([6, 8], [3, 2]) == [2, 4]
    assert summary([4.0, 2.0, 3.0]) == {"median": 3, "min": 2, "max": 4, "spread": 0.6667, "rounds": [4, 2, 3]}


def entry(method: str, window: int, rounds: list[float], rows: int = 1, share: float = 0.8) -> dict[str, Any]:
    return {
        "method": method,
        "window": window,
        "rows": rows,
        "ms_per_step": summary(rounds),
        "tokens_per_s": 1.0,
        "context": window,
        "steps": 1,
        "cache_bytes": 1,
        "working_bytes": 1,
        "weight_bytes": 1,
        "floor_ms": 1.0,
        "share_of_floor": share,
    }


FIGURES: dict[str, Any] = {
    "plan": {"at": 1024},
    "device": "cpu",
    "bandwidth": {"product": 20.0, "sum": 10.0},
    "decode": [
        entry("compiled", 1024, [10, 20]),
        entry("int8", 1024, [5, 10]),
        entry("dense", 1024, [20, 30]),
        entry("llamacpp-f32", 1024, [5, 40]),
        entry("llamacpp-q8_0", 1024, [5, 5]),
        entry("recompute", 512, [100, 100]),
        entry("compiled", 512, [10, 10]),
        entry("recompute", 1024, [300, 600]),
        entry("compiled", 1024, [20, 40], rows=8),
    ],
    "prefill": [],
    "window_alone": [
        {"method": "compiled", "window": 4096, "tiny": 68, "ms": summary([1, -1, 2])},
        {"method": "paper", "window": 4096, "tiny": 68, "ms": summary([30, 40, 50])},
    ],
    "upkeep": {"block": 64, "share": 0.02},
    "delay": None,
    "left_out": [],
}


def test_targets_are_medians_of_ratios_within_the_rounds() -> None:
    """Reference: by hand; what is below the noise does not count."""
    found = {target.name: (target.value, target.is_met) for target in targets(FIGURES)}
    assert found == {
        "compiled / dense, ms per token, window 1024": (pytest.approx((10 / 20 + 20 / 30) / 2), True),
        "compiled / llamacpp-f32, ms per token, window 1024": (pytest.approx((10 / 5 + 20 / 40) / 2), False),
        "int8 / llamacpp-q8_0, ms per token, window 1024": (1.5, False),
        "recompute / compiled, window 1024": (30, True),
        "paper / compiled, window 4096 alone": (27.5, True),
        "compiled, share of the floor, window 1024": (0.8, True),
        "compiled, tokens per second of 8 rows / 1 row": (4, True),
        "evictions and restarts, block 64": (2, True),
    }
    on_cuda = [target.name for target in targets({**FIGURES, "device": "cuda:0"}) if "floor" in target.name]
    assert on_cuda == [f"compiled, share of the floor, window {window}" for window in (512, 1024)]
    times = {(e["of"], e["beside"], e["window"]): e["times_faster"]["rounds"] for e in ratios(FIGURES)}
    assert times[("compiled", "dense", 1024)] == [2, 1.5]
    assert times[("int8", "compiled", 1024)] == [2, 2]
    assert times[("compiled", "recompute", 512)] == [10, 10]


def test_the_papers_figure_stands_beside_ours_where_the_shape_is_the_same() -> None:
    """Reference: the published numbers, in the table and in the figure."""
    figures = {
        **FIGURES,
        "window_alone": [],
        "upkeep": None,
        "ratios": ratios(FIGURES),
        "published": {"streaming": [None, 10.0, 15.0, None, None], "recompute": [None, 100.0, 450.0, None, None]},
    }
    shown = dict(tables(figures, []))
    table = next(rows for title, rows in shown.items() if "figure 10" in title)
    assert table[0] == ("cache", *map(str, SIZES))
    assert ("paper, streaming", *map(str, FIGURE_10["7B"]["streaming"])) in table
    assert ("here, streaming", "", "10.0", "15.0", "", "") in table
    svg = to_svg(draw(figures, "7B"))
    assert svg.startswith("<svg")
    assert draw({**figures, "published": None, "decode": []}, "nothing")


def test_the_page_of_results_shows_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand; each table has a head, and the figure stands beside the record."""
    for folder in ("benchmarks", "recipes"):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / folder)
    figures = {**FIGURES, "window_alone": [], "upkeep": None, "ratios": ratios(FIGURES), "published": None}
    record = dataclasses.replace(begin_record("bench", "streamllm bench", "a model", "float32"), figures=figures)
    lines = list(importlib.import_module("results").benched(record, Path("bench-x.json")))
    assert "## Speed and memory: a model, float32" in lines
    assert "| window | ours | beside | times faster | spread |" in lines
    assert "| what | measured | promised |  |" in lines
    assert "![Time of a token against the size of the cache](bench-x.png)" in lines


# ---- what is measured apart


def test_the_window_alone_is_told_by_a_model_whose_weights_weigh_nothing(subject: Subject) -> None:
    """Reference: by hand; the same heads and layers, and the difference of two windows, round by round."""
    thin = subject.thin()
    assert thin is not None
    assert thin.token_bytes == subject.token_bytes
    assert weight_bytes(thin.model) < weight_bytes(subject.model) / 10
    found = measure_window(["eager", "recompute", "paper"], subject, 64, 2, leave_nothing, is_quiet)
    assert [entry["method"] for entry in found] == ["eager", "paper"]
    for each in found:
        above, below = each["ms_at_window"]["rounds"], each["ms_at_tiny"]["rounds"]
        assert each["ms"]["rounds"] == pytest.approx([a - b for a, b in zip(above, below, strict=True)], abs=2e-4)
        assert each["tiny"] == 12
    left: list[str] = []
    assert measure_window(["eager"], subject, 20, 1, lambda what, why: left.append(what), is_quiet) == []
    assert left == ["the cost of the window alone"]


def test_evictions_and_restarts_are_spread_over_the_tokens_between_them(subject: Subject) -> None:
    """Reference: by hand, from the medians."""
    found = measure_upkeep(subject, 64, 3, leave_nothing, is_quiet, compiles=False)
    assert found is not None
    capacity, block = 64 + 7, 8
    assert found["tokens_between_restarts"] == ((1024 - capacity) // block + 1) * block
    eviction, restart = (max(0, found[f"ms_per_{name}"]["median"]) for name in ("eviction", "restart"))
    per_token = eviction / block + restart / found["tokens_between_restarts"]
    assert found["ms_per_token"] == pytest.approx(per_token, abs=1e-4)
    assert found["share"] == pytest.approx(per_token / (per_token + found["ms_per_step"]["median"]), rel=0.05)


def test_the_first_token_is_timed_alone_and_in_company() -> None:
    """Reference: by hand; seven others are asked for more than they will ever write, and are closed."""
    asked: list[int] = []
    closed: list[int] = []

    def submit(prompt: Sequence[int], most: int) -> Iterator[int]:
        asked.append(most)
        assert prompt == [1, 2, 3]
        try:
            yield from itertools.count()
        finally:
            closed.append(most)

    found = measure_delay(submit, [1, 2, 3], others=7, rounds=2)
    assert len(found["ratio"]["rounds"]) == 2
    assert (found["others"], found["prompt"]) == (7, 3)
    assert asked.count(1) == 3 * 2
    assert len(asked) - asked.count(1) == len(closed) - closed.count(1) == 3 * 7


@pytest.mark.parametrize(("begins", "why"), [(False, "no room"), (True, "broke off")])
def test_streams_beside_that_fail_are_no_company(begins: bool, why: str) -> None:
    """Reference: by hand; what they raise comes out, and is not timed as if they were there."""

    def submit(prompt: Sequence[int], most: int) -> Iterator[int]:
        if most > 1 and not begins:
            raise ZeroDivisionError("no room")
        yield 1
        if most > 1:
            raise ZeroDivisionError("broke off")

    with pytest.raises(ZeroDivisionError, match=why):
        measure_delay(submit, [1], others=2, rounds=1)


def test_streams_beside_that_do_not_begin_are_not_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand; an engine that has no slot for one of them, say."""
    monkeypatch.setattr(delay, "LONGEST", 0.1)
    is_over = threading.Event()

    def submit(prompt: Sequence[int], most: int) -> Iterator[int]:
        if most > 1:
            is_over.wait()
        yield 1

    with pytest.raises(Misfit, match="2 streams beside it do not begin"):
        measure_delay(submit, [1], others=2, rounds=1)
    is_over.set()


def test_an_engine_that_cannot_be_timed_is_left_out_by_name(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the reasons: too few slots, a window that is too long, a step that is not compiled or always fails."""

    def left_out(window: int, compiles: bool = False) -> str:
        reasons: list[str] = []
        found = delay.measure_engine(subject, window, 1, lambda what, why: reasons.append(why), compiles=compiles)
        assert found is None
        return reasons.pop()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a mistake")

    size = make_cache(subject, 64).bytes_when_full
    assert "use a window of at most 1013" in left_out(1024)
    with monkeypatch.context() as patch:
        patch.setattr("streamllm.engine.free_bytes", lambda device: 3 * size * 5 // 4)
        assert left_out(64) == "memory has room for 2 streams at a time, 8 are needed"
    with monkeypatch.context() as patch:
        patch.setattr("streamllm.slots.compile_module", fail)
        assert "not compiled" in left_out(64, compiles=True)
    with monkeypatch.context() as patch:
        patch.setattr("streamllm.slots.Slots.step", fail)
        assert "decode steps failed" in left_out(64)


def test_the_memory_of_a_turn_is_the_most_that_it_takes() -> None:
    """Reference: a tensor of 64 MB that is gone at the end; nothing where there is no /proc."""
    if not rss_bytes():
        pytest.skip("this system does not tell")
    with peak_bytes(CPU) as peak:
        torch.ones(16 << 20).sum()
    assert 60e6 < peak.above < 90e6
    with peak_bytes(CPU) as peak:
        pass
    assert peak.above < 5e6
