"""A small model that talks in turns: the embedded one with a chat template, whose replies end where sentences do."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.models import load

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LAST_USER = (
    "{% for message in messages %}{% if message.role != 'system' %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Puts the system prompt into the last user turn, so it cannot be applied turn by turn."""


@functools.cache
def _talker() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded, tokenizer = load(dtype="float32")
    model = copy.deepcopy(loaded)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = model.get_input_embeddings().weight
    (stop,) = tokenizer(".", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        weight[start] = 0
        weight[end] = weight[stop] * 1.15  # where a sentence ends, the reply does
    model.generation_config.eos_token_id = [0, end]
    return model, tokenizer


def talker(template: str | None = CHATML) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, and its tokenizer with ``template``; the model is shared, so do not change it."""
    model, tokenizer = _talker()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return model, tokenizer
