"""Small tokenizers of every kind that the tests need, made here or stored here; no network.

All are trained on the same few lines, with runs of one letter, of digits and of spaces among them, so that runs have
long tokens and a stretch that begins out of step stays out of step.
"""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stories import STORIES

CORPUS = [
    "Once upon a time there was a little girl named Lily. She loved to play with her red ball.",
    "You are here, and there she goes again; they're happy!  I can't 12 123 1234 2024 1000000.",
    "aaaaaaaaaaaaaaaa aaaa aaab abab abababab baaa aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "def f(x):\n        return x\n\n\n                for y in x:\n\tpass\r\n111111111111 222222",
    "你好,世界。你好 😀😀 é è naïve café",
] * 4

SPLIT_DIGITS = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Pre-tokens as Llama 3 and Qwen cut them: digits in threes, line ends with the spaces before them."""


@functools.cache
def byte_level(kind: str = "gpt2") -> PreTrainedTokenizerBase:
    """Byte-level BPE; "gpt2", "llama3" (digits in threes, trimmed offsets, BOS) or "prefix" (a space put in front)."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "llama3":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_DIGITS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, ["<|endoftext|>", "<|begin|>"], initial_alphabet=alphabet)
    if kind == "llama3":
        begin = processors.TemplateProcessing(
            single="<|begin|> $A <|endoftext|>",
            special_tokens=[("<|begin|>", 1), ("<|endoftext|>", 0)],
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@functools.cache
def metaspace(kind: str = "first") -> PreTrainedTokenizerBase:
    """BPE over whole texts with byte fallback, as sentencepiece makes it; ``kind``: where a space is put in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(tokenizer, special, initial_alphabet=[], limit_alphabet=60)
    # The byte tokens are plain tokens, only the first three are special.
    tokenizer = Tokenizer.from_str(_without_byte_tokens(tokenizer))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def stories() -> PreTrainedTokenizerBase:
    """The tokenizer of stories260K."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(STORIES)
    return tokenizer


@functools.cache
def slow() -> PreTrainedTokenizerBase:
    """A tokenizer without offsets, one id a byte; it appends ``</s>``."""
    return ByT5Tokenizer()


def unknown_runs() -> PreTrainedTokenizerBase:
    """A tokenizer that knows "a" only and makes one unknown token of a run of anything else."""
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _train(tokenizer: Tokenizer, special: list[str], **options: Any) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=900, min_frequency=2, show_progress=False, special_tokens=special, **options
    )
    tokenizer.train_from_iterator(CORPUS, trainer)


def _without_byte_tokens(tokenizer: Tokenizer) -> str:
    import json

    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return json.dumps(data)
