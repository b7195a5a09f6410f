"""A model's folder on disk: what it must hold, checked before anything is loaded, and how many bytes it will take.

Knows the files of the Hugging Face format and the headers of safetensors; not where a folder comes from or how a
model runs. Pickled weights and code from a model's repository are refused, as both can run anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from streamllm.errors import ModelFilesError, UnsupportedModelError

EMBEDDED = "stories7M"
"""Folder of the model that comes with streamllm."""

PIECES, DIGESTED = 64, 1 << 14
"""Pieces of a file of weights that enter a model's digest, evenly spread, and bytes of each."""

_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check(folder: Path) -> None:
    """Refuse a folder that transformers could not load, or could load only by running code.

    Raises:
        ModelFilesError: a file is missing, damaged or pickled.
        UnsupportedModelError: not a causal language model that transformers itself can run.
    """
    _check_config(folder)
    _check_weights(folder)
    if not _has(folder, _TOKENIZER_FILES):
        raise ModelFilesError(
            f"{shown(folder)} has no tokenizer: add its tokenizer.json (or tokenizer.model) to the folder."
        )


def shown(folder: Path) -> str:
    """Return what a user calls the model in ``folder``: its Hub id if it was fetched, else the path."""
    for part in folder.parts:
        if part.startswith("models--") and "snapshots" in folder.parts:
            return part.removeprefix("models--").replace("--", "/")
    return EMBEDDED if folder.parent.name == "assets" and folder.name == EMBEDDED else str(folder)


def digest(folder: Path, quantize: str = "none") -> str:
    """Tell models apart: over config, quantisation and pieces of the weights, without reading all their bytes."""
    found = hashlib.sha256((folder / "config.json").read_bytes())
    found.update(b"" if quantize == "none" else quantize.encode())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            end = opened.seek(0, os.SEEK_END)
            found.update(f"{end} ".encode())
            for number in range(PIECES):
                opened.seek(max(0, end - DIGESTED) * number // (PIECES - 1))
                found.update(opened.read(DIGESTED))
    return found.hexdigest()[:12]


def weights_bytes(folder: Path, dtype: str = "auto") -> int:
    """Return the bytes that the weights in ``folder`` take once loaded as ``dtype``, from the files' headers."""
    itemsize = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}.get(dtype)
    total = 0
    for kind, count in _tensors(folder):
        total += count * (itemsize if itemsize and kind in _FLOATS else _BYTES.get(kind, 1))
    return total


def stored_dtype(folder: Path) -> str | None:
    """Return the dtype in which most of the weights in ``folder`` are stored; ``None``: in none that is known."""
    counts: Counter[str] = Counter()
    for kind, count in _tensors(folder):
        if kind in _FLOATS:
            counts[_FLOATS[kind]] += count
    return max(counts, key=counts.__getitem__, default=None)


def size(count: int) -> str:
    """Write a number of bytes with a unit."""
    amount, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{count} bytes" if count < 1000 else f"{amount:.1f} {units[0]}"


def first_line(error: BaseException) -> str:
    """The first sentence of a library's error; the rest is advice for other programs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ---- the checks


def _check_config(folder: Path) -> None:
    """Refuse what is not a causal language model of transformers itself."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise ModelFilesError(f"{shown(folder)} has no config.json, so it is no model in Hugging Face format.")
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{file} cannot be read: {first_line(error)}") from error
    family = written.get("model_type") if isinstance(written, dict) else None
    if not isinstance(family, str):
        raise ModelFilesError(f"{file} names no model_type, so nothing can tell what this model is.")
    if family not in CONFIG_MAPPING:
        why = (
            "it brings its own code, which streamllm never runs"
            if "auto_map" in written
            else "the installed transformers does not know it; a newer one may"
        )
        raise UnsupportedModelError(f"{shown(folder)} is of type {family!r}: {why}.")
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # values out of range raise nearly anything
        raise ModelFilesError(f"{file} cannot be used: {first_line(error)}") from error
    names = [str(name) for name in config.architectures or ()]
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or not causal or (names and not any(_generates(name) for name in names)):
        what = "an encoder-decoder" if config.is_encoder_decoder else "no causal language model"
        raise UnsupportedModelError(
            f"{shown(folder)} is a {names[0] if names else family}, {what}: only causal language models can stream."
        )


def _generates(architecture: str) -> bool:
    """Whether weights saved from this class include the head that predicts the next token."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel", "LMHead", "ForConditionalGeneration"))


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are missing, pickled or damaged."""
    index = folder / "model.safetensors.index.json"
    files = _weight_files(folder)
    if not files:
        if _has(folder, _PICKLED):
            raise ModelFilesError(
                f"{shown(folder)} has no safetensors weights, and pickled ones are never loaded, as they can run code: "
                "convert them, with https://huggingface.co/spaces/safetensors/convert or, if you trust them, "
                "transformers' from_pretrained and save_pretrained."
            )
        raise ModelFilesError(f"{shown(folder)} has no weights: there is no model.safetensors (or shards of it).")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelFilesError(f"{shown(folder)} lacks {missing[0]}, which {index.name} names: fetch it again.")
    for _ in _tensors(folder):
        pass


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [file for file in (folder / "model.safetensors",) if file.is_file()]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFilesError(f"{index} is damaged ({first_line(error)}): fetch it again.") from error
    return [folder / str(name) for name in sorted(names)]


def _tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """The kind and number of elements of every stored tensor; opening a file also checks its header and length."""
    from safetensors import SafetensorError, safe_open

    for file in _weight_files(folder):
        try:
            with safe_open(str(file), framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118 - no dict
                    tensor = opened.get_slice(key)
                    yield tensor.get_dtype(), prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelFilesError(
                f"{file} is damaged or cut short ({first_line(error).rstrip('.')}): fetch it again."
            ) from error


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
