"""A stream on disk: one safetensors file with a JSON header, written whole or not at all.

The header says format, model and counters; the tensors are the cache's columns in use and its pristine head. Going on
from a file equals never having stopped, bit for bit on the same machine. No server code, no pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.atomic import replacing
from streamllm.cache import SinkCache
from streamllm.detokenize import Decoder
from streamllm.errors import ConfigError, StateError
from streamllm.sampling import Sampler
from streamllm.spec import inspect_model

FORMAT = 1
"""Version of the file format; a file of another one is refused."""


@dataclass
class SavedStream:
    """A stream as it was saved. ``sampler`` and ``decoder`` are ``None`` where none was saved."""

    cache: SinkCache
    sampler: Sampler | None = None
    decoder: Decoder | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def save_state(
    path: str | os.PathLike[str],
    cache: SinkCache,
    *,
    sampler: Sampler | None = None,
    decoder: Decoder | None = None,
    metadata: dict[str, Any] | None = None,
    private: bool = False,
) -> None:
    """Write a stream to ``path``; an older file there stays whole until the new one is complete.

    Args:
        path: the file, by custom ``*.stream``.
        cache: the stream; the fingerprint of the model that read it guards the file.
        sampler, decoder: theirs, if the text is to go on as if never stopped.
        metadata: anything JSON-able, given back as it is.
        private: nobody but its owner may read the file (mode 0600), whatever the umask.

    Raises:
        StateError: the file cannot be written (no space, no permission); nothing is left half-written.
    """
    path = Path(path)
    snapshot, tensors = cache.snapshot()
    header = {
        "format": FORMAT,
        "model": dataclasses.asdict(cache.spec.fingerprint),
        "cache": snapshot,
        "sampler": sampler.state() if sampler else None,
        "decoder": decoder.state() if decoder else None,
        "metadata": metadata or {},
    }
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path, mode=0o600 if private else None) as temporary:
            save_file(contiguous, temporary, metadata={"streamllm": json.dumps(header)})
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StateError(f"Cannot save the stream to {path}: {reason}. Make room, or choose another place.") from error


def load_state(
    path: str | os.PathLike[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> SavedStream:
    """Read a stream that ``save_state`` wrote.

    Args:
        path: the file.
        model: the model that the stream belongs to.
        tokenizer: its tokenizer; without one no ``decoder`` is given back.

    Raises:
        StateError: there is no such file, it is truncated or foreign, or it belongs to another model or format.
    """
    path = Path(path)
    header, tensors = _read(path)
    if header.get("format") != FORMAT:
        raise StateError(
            f"{path} has format {header.get('format')!r}, this version reads format {FORMAT}; "
            "use the version of streamllm that wrote it."
        )
    theirs, ours = header.get("model"), dataclasses.asdict(inspect_model(model).fingerprint)
    if theirs != ours:
        named = theirs.get("model_type") if isinstance(theirs, dict) else None
        what = (
            "other weights or another dtype or quantisation"
            if named == ours["model_type"]
            else f"a model of type {named!r}"
        )
        raise StateError(f"{path} was saved with {what}; load the model that it was saved with.")
    try:
        cache = SinkCache.restore(model, header["cache"], tensors)
        sampler = Sampler.from_state(header["sampler"], device=model.device) if header["sampler"] else None
        decoder = Decoder.from_state(tokenizer, header["decoder"]) if tokenizer and header["decoder"] else None
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, ConfigError) as error:
        raise StateError(f"{path} is damaged ({type(error).__name__}: {error}); it cannot be resumed.") from error
    return SavedStream(cache, sampler, decoder, header.get("metadata", {}))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, or the reason why not."""
    if not path.is_file():
        raise StateError(f"There is no saved stream at {path}; save one with --save {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("streamllm")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} is truncated or no saved stream ({error}); it cannot be resumed.") from error
    if text is None:
        raise StateError(f"{path} is a safetensors file, but no saved stream; it cannot be resumed.")
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise StateError(f"The header of {path} is damaged ({error}); it cannot be resumed.") from error
    if not isinstance(header, dict):
        raise StateError(f"The header of {path} is damaged; it cannot be resumed.")
    return header, tensors
