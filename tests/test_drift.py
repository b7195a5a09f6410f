"""Drift: what the witness remembers, the exact keys, and what becomes of them, against the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from families import FAMILIES
from streamllm import SinkCache
from streamllm.console import Screen, Signals
from streamllm.errors import ConfigError
from streamllm.evaluate.desk import Desk, Interrupted
from streamllm.evaluate.drift import Drift, checkpoints, in_dtype
from streamllm.evaluate.exact import compare, dither, examine, turn
from streamllm.evaluate.job import json_able
from streamllm.evaluate.text import Text
from streamllm.evaluate.witness import Witness
from streamllm.rope import Rotation

SIZES = {"sinks": 2, "window": 14, "block": 4}
RESTART = 207
"""Tokens after which positions begin anew, with a trained length of 32."""

TURNING = ("llama", "llama-yarn", "phi", "cohere", "glm", "gpt-neox", "deepseek-v3")


def make(name: str = "llama", **options: Any) -> PreTrainedModel:
    return FAMILIES[name].make(trained=32, **options)


def draw(count: int) -> Tensor:
    return torch.randint(50, (1, count), generator=torch.Generator().manual_seed(0))


def watch(model: PreTrainedModel, count: int, width: int = 7, **sizes: int) -> Witness:
    """A witness that has read ``count`` tokens in forwards of ``width``."""
    witness = Witness(model, **{**SIZES, **sizes})
    with torch.no_grad():
        for part in draw(count).split(width, dim=1):
            model(part, past_key_values=witness)
    return witness


def kept(witness: Witness, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that must be cached, and where they must stand: the first ones and the newest, without a gap."""
    cached, stop = witness.tokens_cached, int(witness.position_ids(1))
    head, newest = ids[:, :2], ids[:, ids.shape[1] - cached + 2 :]
    return torch.cat([head, newest], dim=1), torch.arange(stop - cached, stop)[None]


class Toy(Desk):
    """A desk with a text of its own, that is broken off after so many steps."""

    def __init__(self, model: PreTrainedModel, out: Path, *, given: int = 100, stop: int | None = None) -> None:
        super().__init__(model, None, (), out, "drift", {}, Screen(quiet=True), Signals())  # type: ignore[arg-type]
        self.given, self.left = given, stop

    def text(self, *_: Any, **__: Any) -> Text:
        self.out.mkdir(exist_ok=True)
        return Text(draw(self.given).numpy().astype(np.uint32), ["toy"])

    def advance(self, count: int, words: str) -> None:
        super().advance(count, words)
        if self.left is not None:
            self.left -= count
            self.signals.received = 2 if self.left <= 0 else None


# ---- exact keys


def test_exact_keys_are_the_projections_at_their_present_positions() -> None:
    """Reference: what the key projection gave, through the model's own rotation, at positions without a gap."""
    model, ids = make(), draw(RESTART)
    SinkCache(model, **SIZES)  # looks at the model, before it is watched
    raw: dict[int, list[Tensor]] = {0: [], 1: []}
    handles = [
        block.self_attn.k_proj.register_forward_hook(lambda _m, _i, out, index=index: raw[index].append(out))
        for index, block in enumerate(model.model.layers)
    ]
    witness = watch(model, RESTART)
    witness.settle()
    for handle in handles:
        handle.remove()
    assert witness.restarts > 3
    _, positions = kept(witness, ids)
    for index, one in enumerate(examine(witness)[0]):
        keys = torch.cat(raw[index], dim=1).unflatten(2, (2, -1)).transpose(1, 2)  # [1, H, all tokens, D]
        keys = torch.cat([keys[:, :, :2], keys[:, :, RESTART - positions.shape[1] + 2 :]], dim=2)
        cos, sin = model.model.rotary_emb(keys, positions)
        expected, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
        torch.testing.assert_close(one.ideal, expected[0], rtol=0, atol=2e-5)
        assert not torch.allclose(one.ideal, keys[0], atol=0.1)


@pytest.mark.parametrize("name", TURNING)
def test_exact_keys_are_those_of_a_dense_forward_over_what_is_kept(name: str) -> None:
    """Reference: with one layer, the plain cache after one forward over exactly the kept tokens."""
    model, ids = make(name, layers=1), draw(150)
    witness = watch(model, 150)
    witness.settle()
    tokens, positions = kept(witness, ids)
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, position_ids=positions, past_key_values=dense)
    stored = {"0.keys": dense.layers[0].keys, "0.values": dense.layers[0].values}
    turned, is_intact = examine(witness)
    assert is_intact
    assert turned
    for one in turned:
        torch.testing.assert_close(one.ideal, stored[one.name][0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_turning_is_what_the_cache_does(is_interleaved: bool) -> None:
    """Reference: the cache's own rotation, token by token, of a part in the middle."""
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64), start=2, interleaved=is_interleaved)
    x = torch.randn(3, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 3, -7, 100, 5000])
    expected = [rotation.rotate(x[:, i : i + 1], int(offset)) for i, offset in enumerate(offsets)]
    torch.testing.assert_close(turn(x, rotation, offsets), torch.cat(expected, dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_rounding_takes_one_of_the_two_neighbours_and_is_right_on_average(dtype: torch.dtype) -> None:
    """Reference: the numbers of the dtype beside the value; the mean over many draws."""
    value, generator = torch.full((40_000,), 0.7371931, dtype=torch.float64), torch.Generator().manual_seed(0)
    found = dither(value, dtype, generator)
    spacing = torch.finfo(dtype).eps / 2
    assert len(found.unique()) == 2
    assert float((found.double() - value).abs().max()) < spacing
    assert abs(float((found.double() - value).mean())) < 0.02 * spacing
    whole = value.to(dtype)
    assert torch.equal(dither(whole.double(), dtype, generator), whole)
    assert not dither(torch.zeros(5, dtype=torch.float64), dtype, generator).any()


# ---- what is found


def test_a_sound_cache_is_off_by_roundings_and_everything_else_is_untouched() -> None:
    """Reference: float32's own rounding, half a unit in the last place."""
    model = make(dtype=torch.float32)
    found = compare(watch(model, RESTART), model, draw(3))
    assert 0 < found["keys"]["floor_mean"] < torch.finfo(torch.float32).eps / 2
    assert found["keys"]["floor_mean"] <= found["keys"]["mean"] < 10 * found["keys"]["floor_mean"]
    assert 0 < found["pinned"]["mean"] < 10 * found["pinned"]["floor_mean"]
    assert found["logits"]["max"] < 1e-4
    assert found["logits"]["agree"] == 1
    assert found["intact"]


def corrupted(part: str, token: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is found in a cache, and in the same with one number changed."""
    model = make(dtype=torch.float32)
    found = []
    for change in (0.0, 0.5):
        witness = watch(model, count)
        witness.snapshot()[1][f"1.{part}"][0, 1, token, 3] += change
        found.append(compare(witness, model, draw(3)))
    return found[0], found[1]


def test_a_key_that_is_off_is_reported() -> None:
    """Reference: the same cache before one number of it was changed; all keys have just been turned."""
    sound, found = corrupted("keys", 6, RESTART)
    assert found["keys"]["max"] > 1e-2 > 1000 * sound["keys"]["max"]
    assert found["keys"]["mean"] > 10 * sound["keys"]["mean"]
    assert found["logits"]["max"] > 100 * sound["logits"]["max"]
    assert found["logits"]["kl"] > 100 * sound["logits"]["kl"]


def test_a_pinned_key_that_is_off_is_reported() -> None:
    """Reference: the same cache before one number of it was changed; the eviction that is due mends it."""
    sound, found = corrupted("keys", 1, RESTART - 4)
    assert found["pinned"]["max"] > 1e-2 > 1000 * sound["pinned"]["max"]
    assert found["logits"] == sound["logits"]


@pytest.mark.parametrize(("part", "token"), [("values", 0), ("values", 9), ("keys", -1)])
def test_a_change_of_what_is_never_turned_is_reported(part: str, token: int) -> None:
    """Reference: the same cache before one number of it was changed; the newest key has not been turned yet."""
    sound, found = corrupted(part, token, RESTART + 1)
    assert sound["intact"]
    assert not found["intact"]


def test_a_wrong_position_is_reported() -> None:
    """Reference: the same keys, all turned by one position too far."""
    model = make(dtype=torch.float32)
    witness = watch(model, RESTART)
    witness.settle()
    keys = witness.snapshot()[1]["0.keys"]
    rotation = witness.spec.layers[0].keys
    assert rotation is not None
    keys[:] = rotation.rotate(keys, 1)
    assert compare(witness, model, draw(3))["keys"]["mean"] > 0.1


def test_numbers_that_are_not_finite_are_an_error() -> None:
    """Reference: a key that has overflowed."""
    model = make(dtype=torch.float32)
    witness = watch(model, RESTART)
    witness.settle()
    witness.snapshot()[1]["0.keys"][0, 0, 5] = torch.inf
    with pytest.raises(FloatingPointError, match="keys are not finite"):
        compare(witness, model, draw(3))


# ---- the witness


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_witness_streams_as_any_cache_and_holds_no_more(name: str) -> None:
    """Reference: the logits of a ``SinkCache``; as many arrivals as there are columns in each layer."""
    model, ids = make(name, dtype=torch.float32), draw(120)
    caches = SinkCache(model, **SIZES), Witness(model, **SIZES)
    with torch.no_grad():
        plain, watched = (
            torch.cat([model(part, past_key_values=cache).logits for part in ids.split(5, dim=1)], 1)
            for cache in caches
        )
    assert torch.equal(plain, watched)
    for index, came in caches[1].arrivals.items():
        held = caches[1].snapshot()[1][f"{index}.keys"]
        assert came.states[0].shape == came.states[1].shape == held.shape
        assert len(came.positions) == held.shape[2] < 120
    assert examine(caches[1])[1]
    caches[1].reset()
    assert not caches[1].arrivals


def test_carrying_out_an_eviction_beforehand_changes_nothing() -> None:
    """Reference: the stream that evicts by itself."""
    model, ids = make(), draw(60)
    logits = []
    for settles in (False, True):
        witness = Witness(model, **SIZES)
        found = []
        with torch.no_grad():
            for token in ids.split(1, dim=1):
                found.append(model(token, past_key_values=witness).logits)
                if settles:
                    witness.settle()
        logits.append(torch.cat(found))
    assert torch.equal(*logits)
    assert witness.tokens_evicted == 60 - witness.tokens_cached > 0


def test_a_witness_goes_on_from_its_file(tmp_path: Path) -> None:
    """Reference: the one that was saved, read on; what is no file of it is none."""
    model, ids = make(dtype=torch.float32), draw(RESTART)
    witness = watch(model, RESTART)
    witness.save(tmp_path / "a.witness", [1, "two"])
    found = Witness.load(tmp_path / "a.witness", model)
    assert found is not None
    assert found[1] == [1, "two"]
    with torch.no_grad():
        for one in (witness, found[0]):
            model(ids[:, :50], past_key_values=one)
    assert compare(found[0], model, ids[:, :3]) == compare(witness, model, ids[:, :3])
    (tmp_path / "b.witness").write_bytes(b"no such thing")
    assert Witness.load(tmp_path / "b.witness", model) is Witness.load(tmp_path / "c.witness", model) is None


def test_a_witness_watches_one_row() -> None:
    with pytest.raises(ConfigError, match="one row, you asked for 2"):
        Witness(make(), **SIZES, batch_size=2)


# ---- where it is compared


@pytest.mark.parametrize(("window", "block"), [(14, 4), (20, 1), (27, 1), (9, 8), (3, 2)])
def test_places_are_where_positions_begin_anew(window: int, block: int) -> None:
    """Reference: a cache that is read token by token, and whose positions fall."""
    cache = SinkCache(model := make(), 2, window, block)
    falls, position = [], 0
    for count in range(120):
        if int(cache.position_ids(1)) < position:
            falls.append(count)
        position = int(cache.position_ids(1))
        with torch.no_grad():
            model(torch.tensor([[3]]), past_key_values=cache)
    found = checkpoints(119, cache.capacity, block, 32)
    assert set(found) <= set(falls)
    assert found[-1] == falls[-1]
    assert found == sorted(set(found))
    assert any(found[0] - fall >= cache.capacity for fall in falls)


def test_places_are_few_and_far_between() -> None:
    """Reference: by hand, for a cache that fits its positions and for one that never fills them."""
    assert checkpoints(1_000_000, 1087, 64, 2048) == [4095, 10239, 20479, 50175, 100351, 200703, 500735, 999423]
    assert checkpoints(6000, 1087, 64, 131_072) == [1087, 2000, 5000, 6000]
    with pytest.raises(ConfigError, match="the cache holds 1,087"):
        checkpoints(1000, 1087, 64, 2048)


# ---- the evaluation


def run(model: PreTrainedModel, out: Path, drift: Drift, **options: Any) -> dict[str, Any]:
    figures: dict[str, Any] = json_able(drift.run(Toy(model, out, **options)))
    return figures


SMALL = Drift(dtypes=("float32",), tokens=300, **SIZES)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run without a break."""
    return run(make(dtype=torch.float32), tmp_path_factory.mktemp("whole"), SMALL)


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tmp_path: Path, figures: dict[str, Any]) -> None:
    """Reference: a run without a break; the second one begins where the first one stopped."""
    model = make(dtype=torch.float32)
    with pytest.raises(Interrupted):
        run(model, tmp_path / "b", SMALL, stop=200)
    read: list[int] = []
    handle = model.model.register_forward_hook(lambda _m, _a, kwargs, _o: read.append(1), with_kwargs=True)
    resumed = run(model, tmp_path / "b", SMALL)
    count = len(read)
    run(model, tmp_path / "c", SMALL)
    handle.remove()
    assert resumed == figures
    assert count < (len(read) - count) * 0.75


def test_half_precision_is_measured_with_a_copy_and_refused_where_keys_would_turn_too_often(tmp_path: Path) -> None:
    """Reference: the refusal of the cache itself; the model that is given stays as it is."""
    model = FAMILIES["llama"].make(trained=64, dtype=torch.float32)
    both = ("bfloat16", "float32")
    found = run(model, tmp_path / "a", Drift(both, 200, **SIZES))
    assert model.dtype == torch.float32
    assert found["is_repeated"]
    errors = [found["dtypes"][name]["checkpoints"][-1]["keys"]["mean"] for name in both]
    assert errors[0] > 1000 * errors[1] > 0
    often = Drift(both, 200, 2, 62, 1)
    found = run(model, tmp_path / "b", often)
    assert "a key would be rotated back" in found["dtypes"]["bfloat16"]["reason"]
    assert "rotated back" in Drift.verdict(found)
    assert found["dtypes"]["float32"]["checkpoints"][-1]["turns"] > 20
    with pytest.raises(ConfigError, match="rotated back"):
        run(model, tmp_path / "c", Drift(("bfloat16",), 200, 2, 62, 1))


def test_a_copy_in_another_dtype_is_what_loading_gives(tmp_path: Path) -> None:
    """Reference: the model saved and loaded in that dtype: weights, and frequencies that stay in float32."""
    model = make(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = in_dtype(model, torch.bfloat16)
    for theirs, own in (
        (loaded.named_parameters(), ours.named_parameters()),
        (loaded.named_buffers(), ours.named_buffers()),
    ):
        expected, got = dict(theirs), dict(own)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor)
    assert in_dtype(model, torch.float32) is model


def test_a_device_that_cannot_compute_in_a_dtype_is_no_failure(tmp_path: Path) -> None:
    """Reference: the sentence of torch; any other error of it comes through."""
    model = make(dtype=torch.float32)

    def lacking(message: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if model.training is False:
                raise RuntimeError(message)

        return hook

    handle = model.model.norm.register_forward_hook(lacking("\"mul_cpu\" not implemented for 'Half'"))
    with pytest.raises(ConfigError, match=r"cannot compute in float32: .*mul_cpu"):
        run(model, tmp_path / "a", SMALL)
    handle.remove()
    handle = model.model.norm.register_forward_hook(lacking("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        run(model, tmp_path / "b", SMALL)
    handle.remove()


def test_models_whose_keys_are_never_turned_are_refused(tmp_path: Path) -> None:
    """Reference: learned positions."""
    with pytest.raises(ConfigError, match="Nothing can drift: the keys of a model of type 'gpt2'"):
        run(make("gpt2", dtype=torch.float32), tmp_path, SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("float64",)}, "in 'float64'; choose from float32, bfloat16, float16"),
        ({"dtypes": ()}, "at least one dtype"),
        ({"dtypes": ("float32", "float32")}, "none twice"),
        ({"tokens": 1}, "tokens must be a whole number of at least 2, you gave 1"),
        ({"block": 0}, "block"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Drift(**options)


def test_the_verdict_says_what_the_figures_say(figures: dict[str, Any]) -> None:
    """Reference: the figures of a run, and the same with keys that are twice as far off at the end, or changed."""
    found = json_able(figures)
    points = found["dtypes"]["float32"]["checkpoints"]
    assert len(Drift.rows(found)) == 3
    assert "nothing drifts" in Drift.verdict(found)
    assert f"{points[-1]['evictions']:,} evictions and {points[-1]['restarts']:,} restarts" in Drift.verdict(found)
    short = json_able(found)
    del short["dtypes"]["float32"]["checkpoints"][1:]
    assert "too few tokens to tell whether anything drifts" in Drift.verdict(short)
    worse = json_able(found)
    last = worse["dtypes"]["float32"]["checkpoints"][-1]
    for part, value in (("keys", "mean"), ("pinned", "mean"), ("logits", "max")):
        known = last[part][value]
        last[part][value] = known * 2 if part != "logits" else 6 * last[part]["floor"]
        words = {"keys": "keys", "pinned": "pinned keys", "logits": "logits"}[part]
        assert f"there is drift: {words} in float32." in Drift.verdict(worse)
        last[part][value] = known
    worse["dtypes"]["float32"]["checkpoints"][0]["intact"] = False
    assert "nothing drifts" not in Drift.verdict(worse)
    assert "the cache is broken" in Drift.verdict(worse)


def test_the_figure_shows_also_where_there_is_no_error_at_all(figures: dict[str, Any]) -> None:
    """Reference: the points of the figures; a zero has no place on a logarithmic axis and is drawn hollow."""
    found = json_able(figures)
    points = found["dtypes"]["float32"]["checkpoints"]
    points[0]["logits"]["max"] = 0.0
    keys, logits = Drift.draw(found).axes
    assert [float(y) for y in keys.lines[0].get_ydata()] == [point["keys"]["mean"] for point in points]
    assert [float(x) for x in logits.lines[2].get_xdata()] == [points[0]["tokens"]]
