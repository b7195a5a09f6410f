"""A Llama's weights as a GGUF file, so that llama.cpp runs the very same model.

llama.cpp pairs the numbers of a head as (2i, 2i + 1), transformers as (i, i + D / 2), so the rows of the query and key
weights change places. Without a tokenizer there is no vocabulary: ids go in and logits come out. Letters: ``H`` heads,
``D`` head size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("F32", "F16", "Q8_0")
"""Types of weights; norms are always F32."""

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
"""llama.cpp's names of a layer's weights, and transformers'."""


def write_gguf(model: PreTrainedModel, file: Path, kind: str, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """Write ``model`` to ``file`` in one of ``KINDS``; return the bytes of the weights that a step reads.

    Args:
        tokenizer: of byte pairs, as GPT-2's; ``None``: none is written.

    Raises:
        ImportError: the package gguf is not installed.
        OSError: the disk is full.
    """
    import gguf

    config = model.config
    writer: Any = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    rope: Any = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, tokenizer)
    file_types = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_types[kind])
    read = 0
    for name, weight in _tensors(model):
        own = kind if weight.ndim == 2 else "F32"
        data = gguf.quants.quantize(_array(weight), gguf.GGMLQuantizationType[own])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[own])
        is_read = name != "token_embd.weight" or config.tie_word_embeddings
        read += data.nbytes if is_read else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pieces, merges, and the ids that begin and end a text."""
    import gguf

    known: Any = tokenizer
    made = json.loads(known.backend_tokenizer.to_str())["model"]
    ids, special = known.get_vocab(), set(known.all_special_tokens)
    pieces = sorted(ids, key=ids.__getitem__)
    kinds = [gguf.TokenType.CONTROL if piece in special else gguf.TokenType.NORMAL for piece in pieces]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in made["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    first = known("a")["input_ids"][0]
    begins = first in known.all_special_ids
    if begins:
        writer.add_bos_token_id(first)
    writer.add_add_bos_token(begins)
    if known.eos_token_id is not None:
        writer.add_eos_token_id(known.eos_token_id)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All weights by llama.cpp's names; a tied head is left out, as the embedding stands for it."""
    config: Any = model.config
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for number, layer in enumerate(model.model.layers):
        for name, theirs in _LAYER.items():
            weight: Any = layer.get_submodule(theirs).weight
            yield f"blk.{number}.{name}.weight", _paired(weight, heads[name]) if name in heads else weight


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows [H * D, hidden] of a head in the order in which llama.cpp pairs them."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _array(weight: Tensor) -> np.ndarray[Any, Any]:
    return weight.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
