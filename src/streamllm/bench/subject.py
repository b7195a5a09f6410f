"""What is measured: one set of weights, in a model for sink caches and in a plain one, and the tokens that all read.

Every method reads the same random ids, whatever the weights: only the shapes decide the speed, and no method waits for
a draw. Shapes: ``B`` rows, ``T`` tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from streamllm.bench.shape import Shape
from streamllm.config import CacheConfig
from streamllm.spec import ModelSpec, inspect_model


@dataclass
class Subject:
    """See the module.

    Args:
        model: that reads with sink caches, which put hooks on it.
        shape: of random weights; ``None`` for a model that was loaded.
        folder: for the files that rivals read; nothing in it outlives the run.
        sinks, block: of every sink cache.
        made: what methods have made of the weights for themselves, by name; made once.
    """

    model: PreTrainedModel
    shape: Shape | None
    folder: Path
    sinks: int = CacheConfig.sinks
    block: int = CacheConfig.block
    made: dict[str, Any] = field(default_factory=dict)
    plain: PreTrainedModel = field(init=False)

    def __post_init__(self) -> None:
        self.plain = twin(self.model)  # before any cache has put hooks on the model

    @cached_property
    def spec(self) -> ModelSpec:
        """What is known of the model, by probing it."""
        return inspect_model(self.model)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """One that spells each id as its number, whatever the weights: text costs the same, and no file is needed."""
        words = {str(number): number for number in range(self.vocabulary)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))

    @property
    def is_llama(self) -> bool:
        """Whether it is a plain Llama, which some rivals are written for."""
        config = self.model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return isinstance(self.model, LlamaForCausalLM) and rope.get("rope_type", "default") == "default"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(layer.bytes_per_token for layer in self.spec.layers)

    def ids(self, rows: int, count: int) -> Tensor:
        """[B, T] random ids, the same at every call with the same rows."""
        draw = torch.Generator().manual_seed(rows)
        return torch.randint(self.vocabulary, (rows, count), generator=draw).to(self.device)

    def limited(self, positions: int) -> ModelSpec:
        """The spec of the same model, had it been trained on so many positions only."""
        return replace(self.spec, trained_length=positions)

    def thin(self) -> Subject | None:
        """The same attention in a model whose weights weigh nothing; ``None`` where it is not a plain Llama."""
        from streamllm.bench.shape import make_model

        config = self.model.config
        if not self.is_llama:
            return None
        shape = Shape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            head_size=config.head_dim,
            positions=config.max_position_embeddings,
        ).thin()
        model = make_model(shape, self.model.dtype, self.device)
        return Subject(model, shape, self.folder, self.sinks, self.block)


def one_by_one(ids: Tensor) -> list[Tensor]:
    """The columns of ids [B, T], each [B, 1]."""
    return [ids[:, number : number + 1] for number in range(ids.shape[1])]


def twin(model: PreTrainedModel, attention: str | None = None) -> PreTrainedModel:
    """A model of its own on the same weights in the same memory, tied as they are.

    ``attention``: the kernel, if another one.
    """
    memo: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    found = copy.deepcopy(model, memo)
    if attention is not None:
        found.set_attn_implementation(attention)
    return found
