"""Tiny random models of many architectures, for tests that compare one way of computing with another.

A ``Family`` names one architecture in one setting (a RoPE variant, a sliding window). ``Family.make`` builds a model
of 50 to 200 thousand weights in milliseconds, the same one for the same arguments on every machine; models come out of
a cache and must not be changed. Weights are far larger than at the start of a training, so that attention is sharp,
logits have a scale of 1 to 3, and a key at a wrong position shows in the logits. ``FAMILIES`` can stream;
``REFUSED_OR_EXTRA`` holds models that cannot, or whose caches are of another kind.

Importing this file limits torch to one thread, see below. Nothing here knows about streamllm.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

# Matrices this small gain nothing from a second thread, and on busy cores each one waits for the other: 26 seconds of
# tests became 444.
torch.set_num_threads(1)

Positions = Literal["rotary", "alibi", "absolute", "relative"]
Attention = Literal["sdpa", "eager"]

VOCAB = 97
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
TRAINED = 256

HYBRID_WINDOW = 6
"""Own window of the sliding layers of models that mix them with full ones; below any capacity under test."""

ALL_SLIDING_WINDOW = 32
"""Window of models whose every layer slides; a stream on them needs a capacity of at most this."""

GAIN = 1.5
"""Weights are drawn so that a matrix multiplies the scale of its input by about this."""


@dataclass(frozen=True)
class Family:
    """One architecture in one setting.

    Args:
        name: key in ``FAMILIES`` or ``REFUSED_OR_EXTRA``.
        positions: how the model knows where a token stands.
        config: makes the config from the number of layers and the trained length.
        sliding: "hybrid" mixes sliding and full layers, in "all" every layer slides.
        note: what sets this family apart.
    """

    name: str
    positions: Positions
    config: Callable[[int, int], PreTrainedConfig]
    sliding: Literal["none", "hybrid", "all"] = "none"
    note: str = ""

    def make(
        self,
        dtype: torch.dtype = torch.float64,
        attn: Attention = "sdpa",
        layers: int = 2,
        trained: int = TRAINED,
    ) -> PreTrainedModel:
        """Return the model in eval mode; float32 and float64 models have the same weights.

        Args:
            dtype: of weights and activations. Angles, most norms and some softmaxes stay float32 inside
                transformers, so a float64 model is exact to about 1e-6 only.
            attn: "sdpa" falls back to "eager" where the architecture has no other.
            layers: number of decoder layers. With one layer a hybrid has a full one.
            trained: trained length (``max_position_embeddings`` or its like).
        """
        return _make(self, dtype, attn, layers, trained)

    def __str__(self) -> str:
        return self.name


@functools.lru_cache(maxsize=256)
def _make(family: Family, dtype: torch.dtype, attn: Attention, layers: int, trained: int) -> PreTrainedModel:
    config = family.config(layers, trained)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(
        config,
        dtype=torch.float32,
        # None takes sdpa where the architecture has it, "sdpa" would raise where it has not.
        attn_implementation=None if attn == "sdpa" else attn,
        # The loop over experts is the one dispatch that runs in every dtype on the CPU.
        experts_implementation="eager",
    )
    _randomise(model, seed=zlib.crc32(family.name.encode()))
    return model.to(dtype).eval()


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every weight again: constants (norms, biases) near their start, matrices by their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if bool((weight == weight.flatten()[0]).all()):
                weight.add_(0.2 * noise)
            elif weight.ndim < 2:
                weight.copy_(noise)
            else:
                # A router is drawn sharper: a near tie between experts would turn rounding into a jump.
                gain = 3 * GAIN if name.endswith(("gate.weight", "router.weight")) else GAIN
                weight.copy_(noise * gain / ((weight.shape[-1] + weight.shape[-2]) / 2) ** 0.5)


# --- configs -------------------------------------------------------------------------------------------------------

Options = Callable[[int, int], dict[str, Any]]


def _tokens() -> dict[str, Any]:
    return {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _decoder(layers: int, trained: int) -> dict[str, Any]:
    """Options under the names that most configs share."""
    return {
        **_tokens(),
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": trained,
    }


def _config(name: str, options: Options | None = None, **fixed: Any) -> Callable[[int, int], PreTrainedConfig]:
    """A maker of configs: the shared options, then ``fixed`` ones, then those that depend on layers and length."""

    def make(layers: int, trained: int) -> PreTrainedConfig:
        extra = options(layers, trained) if options else {}
        return getattr(transformers, name)(**{**_decoder(layers, trained), **fixed, **extra})

    return make


def _bare(name: str, options: Options, **fixed: Any) -> Callable[[int, int], PreTrainedConfig]:
    """A maker of configs that use names of their own."""

    def make(layers: int, trained: int) -> PreTrainedConfig:
        return getattr(transformers, name)(**{**_tokens(), **fixed, **options(layers, trained)})

    return make


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}


def _llama_rope(make_rope: Callable[[int], dict[str, Any]]) -> Callable[[int, int], PreTrainedConfig]:
    return _config("LlamaConfig", lambda _, trained: {"rope_parameters": make_rope(trained)})


def _alternate(layers: int, first: str, last: str) -> list[str]:
    """Kinds of layers in turn, so that the last layer is ``last``."""
    return [last if (layers - 1 - index) % 2 == 0 else first for index in range(layers)]


def _hybrid(layers: int, _trained: int) -> dict[str, Any]:
    return {
        "sliding_window": HYBRID_WINDOW,
        "layer_types": _alternate(layers, "sliding_attention", "full_attention"),
    }


def _two_ropes(layers: int, trained: int) -> dict[str, Any]:
    return {
        **_hybrid(layers, trained),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 2.0},
        },
    }


def _gemma3n(layers: int, trained: int) -> dict[str, Any]:
    # The upper half of the layers reads the keys and values of the lower half, so both have the same kinds.
    kinds = 2 * _alternate(layers, "sliding_attention", "full_attention")
    return {
        **_two_ropes(layers, trained),
        "num_hidden_layers": 2 * layers,
        "layer_types": kinds,
        "num_kv_shared_layers": layers,
        "activation_sparsity_pattern": [0.0] * (2 * layers),
    }


_MLA = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
}

_STREAMABLE = [
    Family("llama", "rotary", _config("LlamaConfig")),
    Family(
        "llama-linear",
        "rotary",
        _llama_rope(lambda _: _rope("linear", factor=4.0)),
        note="Every frequency is divided by 4.",
    ),
    Family(
        "llama-llama3",
        "rotary",
        _llama_rope(
            lambda trained: _rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=trained // 8,
            )
        ),
        note="The first frequency is kept, the second smoothed, the others divided by 8.",
    ),
    Family(
        "llama-yarn",
        "rotary",
        _llama_rope(lambda trained: _rope("yarn", factor=8.0, original_max_position_embeddings=trained // 8)),
        note="Cosine and sine are scaled by 1.2, and cached keys with them.",
    ),
    Family(
        "llama-dynamic",
        "rotary",
        _llama_rope(lambda _: _rope("dynamic", factor=4.0)),
        note="Frequencies change once a position reaches `trained`; pass a small one to see it. Calls leave the "
        "largest length in the rotary module until a call stays below `trained`.",
    ),
    Family(
        "llama-longrope",
        "rotary",
        _llama_rope(
            lambda trained: _rope(
                "longrope",
                factor=4.0,
                original_max_position_embeddings=trained // 4,
                short_factor=[1.0 + 0.1 * index for index in range(HEAD_DIM // 2)],
                long_factor=[2.0 + 0.5 * index for index in range(HEAD_DIM // 2)],
            )
        ),
        note="Short factors up to position trained / 4, long ones for calls that reach beyond; keys are scaled.",
    ),
    Family("mistral", "rotary", _config("MistralConfig", sliding_window=None)),
    Family(
        "mistral-sliding",
        "rotary",
        _config("MistralConfig", sliding_window=ALL_SLIDING_WINDOW),
        sliding="all",
        note="The config has no layer_types.",
    ),
    Family("mixtral", "rotary", _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2)),
    Family("qwen2", "rotary", _config("Qwen2Config"), note="Biases on queries, keys and values."),
    Family("qwen3", "rotary", _config("Qwen3Config", head_dim=24), note="Norms on queries and keys; own head size."),
    Family(
        "qwen3-moe",
        "rotary",
        _config(
            "Qwen3MoeConfig",
            head_dim=HEAD_DIM,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
    ),
    Family("phi", "rotary", _config("PhiConfig"), note="Half of each head rotates."),
    Family(
        "phi3",
        "rotary",
        _config("Phi3Config", rope_parameters=_rope("default", partial_rotary_factor=0.75)),
        note="Three quarters of each head rotate (as in Phi-4-mini).",
    ),
    Family(
        "phi3-sliding",
        "rotary",
        _config("Phi3Config", sliding_window=ALL_SLIDING_WINDOW),
        sliding="all",
        note="The config has no layer_types.",
    ),
    Family(
        "gemma2",
        "rotary",
        _config("Gemma2Config", _hybrid, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
        sliding="hybrid",
        note="Soft caps; eager attention only.",
    ),
    Family(
        "gemma3",
        "rotary",
        _config("Gemma3TextConfig", _two_ropes, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
        sliding="hybrid",
        note="Sliding and full layers have frequencies of their own.",
    ),
    Family(
        "gpt-oss",
        "rotary",
        _config(
            "GptOssConfig",
            lambda layers, trained: {
                **_hybrid(layers, trained),
                "rope_parameters": _rope(
                    "yarn", factor=8.0, original_max_position_embeddings=trained // 8, truncate=False
                ),
            },
            head_dim=HEAD_DIM,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        sliding="hybrid",
        note="Learned sinks in the softmax; eager attention only.",
    ),
    Family(
        "falcon",
        "rotary",
        _bare(
            "FalconConfig",
            lambda layers, trained: {"num_hidden_layers": layers, "max_position_embeddings": trained},
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            alibi=False,
            multi_query=True,
        ),
        note="One key/value head for all queries.",
    ),
    Family(
        "gpt-neox",
        "rotary",
        _config("GPTNeoXConfig", rope_parameters=_rope("default", partial_rotary_factor=0.25)),
        note="Pythia: a quarter of each head rotates.",
    ),
    Family(
        "stablelm",
        "rotary",
        _config("StableLmConfig", rope_parameters=_rope("default", partial_rotary_factor=0.25)),
        note="A quarter of each head rotates.",
    ),
    Family("cohere", "rotary", _config("CohereConfig", logit_scale=1.0), note="Interleaved."),
    Family(
        "cohere2",
        "rotary",
        _config("Cohere2Config", _hybrid, logit_scale=1.0),
        sliding="hybrid",
        note="Interleaved; only the sliding layers rotate.",
    ),
    Family(
        "glm",
        "rotary",
        _config("GlmConfig", head_dim=HEAD_DIM, rope_parameters=_rope("default", partial_rotary_factor=0.5)),
        note="Half of each head rotates, interleaved.",
    ),
    Family("olmo2", "rotary", _config("Olmo2Config"), note="Norms after attention and MLP, and on queries and keys."),
    Family(
        "smollm3",
        "rotary",
        _config(
            "SmolLM3Config",
            lambda layers, _: {"no_rope_layers": [int(index % 2 == 0) for index in range(layers)]},
        ),
        note="Every second layer knows no positions at all (NoPE).",
    ),
    Family(
        "granite",
        "rotary",
        _config(
            "GraniteConfig",
            embedding_multiplier=2.0,
            attention_multiplier=HEAD_DIM**-0.5,
            residual_multiplier=0.5,
            logits_scaling=0.5,
        ),
    ),
    Family(
        "deepseek-v2",
        "rotary",
        _config("DeepseekV2Config", **_MLA, topk_method="greedy"),
        note="MLA: caches (latent, rotary key); rotates complex numbers in float32.",
    ),
    Family(
        "deepseek-v3",
        "rotary",
        _config("DeepseekV3Config", **_MLA, n_group=2, topk_group=1, num_mtp_layers=0, rope_interleave=True),
        note="MLA: caches (latent, rotary key); the pairs are interleaved in the weights but not in the cache.",
    ),
    Family(
        "deepseek-v3-half",
        "rotary",
        _config("DeepseekV3Config", **_MLA, n_group=2, topk_group=1, num_mtp_layers=0, rope_interleave=False),
        note="As deepseek-v3 with halves in the weights too.",
    ),
    Family(
        "mpt",
        "alibi",
        _bare(
            "MptConfig",
            lambda layers, trained: {"n_layers": layers, "max_seq_len": trained},
            d_model=HIDDEN,
            n_heads=HEADS,
            expansion_ratio=2,
        ),
        note="No position_ids; the bias table has `trained` entries. Eager attention only.",
    ),
    Family(
        "bloom",
        "alibi",
        _bare("BloomConfig", lambda layers, _: {"n_layer": layers}, hidden_size=HIDDEN, n_head=HEADS),
        note="No position_ids, no trained length. Eager attention only.",
    ),
    Family(
        "gpt2",
        "absolute",
        _bare(
            "GPT2Config",
            lambda layers, trained: {"n_layer": layers, "n_positions": trained},
            n_embd=HIDDEN,
            n_head=HEADS,
        ),
    ),
    Family(
        "opt",
        "absolute",
        _bare(
            "OPTConfig",
            lambda layers, trained: {"num_hidden_layers": layers, "max_position_embeddings": trained},
            hidden_size=HIDDEN,
            ffn_dim=96,
            num_attention_heads=HEADS,
            word_embed_proj_dim=HIDDEN,
        ),
    ),
]

_OTHERS = [
    Family(
        "falcon-alibi",
        "alibi",
        _bare(
            "FalconConfig",
            lambda layers, trained: {"num_hidden_layers": layers, "max_position_embeddings": trained},
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            alibi=True,
            multi_query=True,
        ),
        note="Sizes its bias by the seen length, not by the keys; accepts position_ids and ignores them.",
    ),
    Family(
        "gptj",
        "rotary",
        _bare(
            "GPTJConfig",
            lambda layers, trained: {"n_layer": layers, "n_positions": trained},
            n_embd=HIDDEN,
            n_head=HEADS,
            rotary_dim=8,
        ),
        note="Interleaved, from a table of `trained` sines and cosines: no inv_freq buffer. Eager attention only.",
    ),
    Family(
        "codegen",
        "rotary",
        _bare(
            "CodeGenConfig",
            lambda layers, trained: {"n_layer": layers, "n_positions": trained, "n_ctx": trained},
            n_embd=HIDDEN,
            n_head=HEADS,
            rotary_dim=8,
        ),
        note="As GPT-J.",
    ),
    Family(
        "recurrent-gemma",
        "rotary",
        _bare(
            "RecurrentGemmaConfig",
            lambda layers, _: {"num_hidden_layers": layers, "block_types": ["recurrent", "attention"]},
            hidden_size=HIDDEN,
            intermediate_size=96,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            attention_window_size=ALL_SLIDING_WINDOW,
        ),
        sliding="all",
        note="Recurrent state lives in the modules and is cleared by position 0.",
    ),
    Family(
        "t5",
        "relative",
        _bare(
            "T5Config",
            lambda layers, _: {"num_layers": layers, "num_decoder_layers": layers},
            d_model=HIDDEN,
            d_kv=HEAD_DIM,
            d_ff=96,
            num_heads=HEADS,
            decoder_start_token_id=0,
        ),
        note="Encoder and decoder.",
    ),
    Family(
        "lfm2",
        "rotary",
        _config(
            "Lfm2Config",
            lambda layers, _: {"layer_types": _alternate(layers, "conv", "full_attention")},
            block_auto_adjust_ff_dim=False,
        ),
        note="Convolutions between full layers; a convolution keeps its last 3 inputs.",
    ),
    Family(
        "gemma3n",
        "rotary",
        _config(
            "Gemma3nTextConfig",
            _gemma3n,
            head_dim=HEAD_DIM,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
        ),
        sliding="hybrid",
        note="Has 2 * layers layers; the upper half reads the keys and values of the lower half.",
    ),
    Family(
        "llama4",
        "rotary",
        _config(
            "Llama4TextConfig",
            lambda layers, _: {
                "layer_types": _alternate(layers, "chunked_attention", "full_attention"),
                "no_rope_layers": [int(kind == "chunked") for kind in _alternate(layers, "chunked", "full")],
            },
            head_dim=HEAD_DIM,
            intermediate_size_mlp=96,
            num_local_experts=2,
            moe_layers=[],
            attention_chunk_size=HYBRID_WINDOW,
            floor_scale=8,
        ),
        sliding="hybrid",
        note="Chunked layers rotate, full ones do not but scale their queries by the length of the cache.",
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in _STREAMABLE}
REFUSED_OR_EXTRA: dict[str, Family] = {family.name: family for family in _OTHERS}
