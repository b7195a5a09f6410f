"""The probe: what it finds on models of every kind, and what makes it refuse."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from families import FAMILIES, REFUSED_OR_EXTRA, VOCAB
from streamllm.config import UNKNOWN_TRAINED_LENGTH
from streamllm.errors import UnsupportedModelError
from streamllm.spec import inspect_model

TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **options})).eval()


@pytest.mark.parametrize(
    ("family", "keys", "values"),
    [
        ("llama", "half-split 0:16", None),
        ("cohere", "interleaved 0:16", None),
        ("glm", "interleaved 0:8", None),
        ("gpt-neox", "half-split 0:4", None),
        ("deepseek-v2", None, "interleaved 0:8"),
        ("deepseek-v3", None, "half-split 0:8"),
        ("gpt2", None, None),
        ("bloom", None, None),
    ],
)
def test_the_probe_finds_pairing_and_place_of_the_rotation(family: str, keys: str | None, values: str | None) -> None:
    """Reference: what the families' papers and configs say."""
    layer = inspect_model(FAMILIES[family].make()).layers[-1]
    found = [rotation.describe() if rotation else None for rotation in (layer.keys, layer.values)]
    assert [f.split()[0] if f else None for f in found] == [k.split()[0] if k else None for k in (keys, values)]
    for rotation, want in zip(found, (keys, values), strict=True):
        assert rotation is None or rotation.split(":")[0] == want.split(":")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_does_not_hide_the_rotation(dtype: torch.dtype) -> None:
    """Reference: the rotation found in float32."""
    spec = inspect_model(llama().to(dtype))
    assert spec.positions == "rotary"
    assert all(layer.keys is not None and layer.keys.describe() == "half-split 0:16" for layer in spec.layers)
    assert spec.residual < 0.05


def test_layers_without_positions_are_told_from_rotated_ones() -> None:
    """Reference: SmolLM3's config, which names its layers without positions."""
    torch.manual_seed(0)
    config = SmolLM3Config(**{**TINY, "num_hidden_layers": 4, "pad_token_id": 0}, no_rope_layers=[1, 1, 0, 1])
    spec = inspect_model(SmolLM3ForCausalLM(config).eval())
    assert [layer.keys is not None for layer in spec.layers] == [True, True, False, True]
    assert spec.positions == "rotary"


def test_a_model_without_any_positions_is_recognised_by_its_uniform_attention() -> None:
    """Reference: SmolLM3 with no rotated layer at all."""
    torch.manual_seed(0)
    config = SmolLM3Config(**{**TINY, "pad_token_id": 0}, no_rope_layers=[0, 0])
    spec = inspect_model(SmolLM3ForCausalLM(config).eval())
    assert spec.positions == "none"
    assert spec.takes_masks


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon-alibi"])
def test_alibi_is_recognised_by_the_straight_line_of_its_bias(family: str) -> None:
    """Reference: the families themselves; two of them take no position_ids at all."""
    spec = inspect_model({**FAMILIES, **REFUSED_OR_EXTRA}[family].make())
    assert spec.positions == "alibi"
    assert not spec.reread


def test_a_model_that_ignores_position_ids_is_not_taken_for_alibi() -> None:
    """Reference: a Llama whose rotary embedding counts for itself; its keys do not move, its attention is no line."""
    model = llama()
    rotary = model.model.rotary_emb
    real = rotary.forward
    rotary.forward = lambda x, position_ids: real(x, torch.arange(x.shape[1])[None])
    with pytest.raises(UnsupportedModelError, match="neither uniform nor linear"):
        inspect_model(model)


def test_positions_in_the_queries_alone_are_noticed() -> None:
    """Reference: a Llama whose queries grow with the position, as temperature tuning makes them."""
    model = llama()
    seen: list[torch.Tensor] = []

    def remember(module, args, kwargs):
        seen.append(kwargs["position_ids"])

    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda m, args, out: out * (1 + seen[-1][..., None] / 20))
    with pytest.raises(UnsupportedModelError, match="depends on absolute positions"):
        inspect_model(model)


def test_the_trained_length_is_where_the_frequencies_begin_to_change() -> None:
    """Reference: the configs: longrope changes beyond the original length, others never do."""
    assert inspect_model(FAMILIES["llama-longrope"].make(trained=256)).trained_length == 64
    assert inspect_model(FAMILIES["llama-yarn"].make(trained=256)).trained_length == 256


def test_an_unknown_trained_length_is_bounded_anyway() -> None:
    """Reference: Bloom's config names none."""
    spec = inspect_model(FAMILIES["bloom"].make())
    assert spec.trained_length is None
    assert spec.limit == UNKNOWN_TRAINED_LENGTH


def test_the_answer_is_remembered_until_the_dtype_changes() -> None:
    """Reference: identity of the spec."""
    model = llama()
    spec = inspect_model(model)
    assert inspect_model(model) is spec
    model.to(torch.bfloat16)
    assert inspect_model(model) is not spec
    assert inspect_model(model).fingerprint != spec.fingerprint


def test_the_probe_leaves_the_model_as_it_was() -> None:
    """Reference: mode, weights, attention implementation and logits before."""
    model = FAMILIES["mpt"].make(dtype=torch.float32)
    kernel = model.config._attn_implementation
    model = llama(num_attention_heads=2).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    inspect_model(model)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert FAMILIES["mpt"].make(dtype=torch.float32).config._attn_implementation == kernel


def test_fingerprints_tell_models_of_one_shape_apart() -> None:
    """Reference: the same weights give the same fingerprint; one changed number another."""
    first, second = llama(), llama()
    assert inspect_model(first).fingerprint == inspect_model(second).fingerprint
    third = llama()
    with torch.no_grad():
        third.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert inspect_model(third).fingerprint != inspect_model(first).fingerprint


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("recurrent-gemma", "keeps a state of its own between forwards"),
        ("t5", "encoder-decoder"),
        ("llama4", "chunked_attention"),
    ],
)
def test_what_cannot_stream_is_refused_by_name_with_the_reason(family: str, reason: str) -> None:
    """Reference: none; the message names the model's type."""
    model = REFUSED_OR_EXTRA[family].make()
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        inspect_model(model)
    assert model.config.model_type in str(caught.value)


def test_layers_are_told_by_what_they_cache() -> None:
    """Reference: the families' configs."""
    kinds = {
        name: {kind: spec.count(kind) for kind in ("sink", "sliding", "linear", "shared")}
        for name in ("llama", "gemma2", "mistral-sliding", "lfm2", "gemma3n")
        if (spec := inspect_model({**FAMILIES, **REFUSED_OR_EXTRA}[name].make(layers=4)))
    }
    assert kinds["llama"] == {"sink": 4, "sliding": 0, "linear": 0, "shared": 0}
    assert kinds["gemma2"] == {"sink": 2, "sliding": 2, "linear": 0, "shared": 0}
    assert kinds["mistral-sliding"]["sink"] == 4
    assert kinds["lfm2"]["linear"] > 0
    assert kinds["gemma3n"]["shared"] > 0
    assert inspect_model(FAMILIES["mistral-sliding"].make()).limit == 32
