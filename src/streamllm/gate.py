"""Where the cache meets the model: two hooks on the decoder, through PyTorch's public interface.

Before a forward with a gated cache, the gate lets the cache evict, supplies the positions, and cuts inputs that are
longer than one forward may be: the first parts are read by forwards of their own, the last part by the one that was
asked for, and after it the outputs are joined. So `model(...)`, `model.generate(...)` and our own loop all get the
right positions and may hand over any number of tokens, and nothing in the model is replaced. A forward with any other
cache passes untouched.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from streamllm.errors import CacheError
from streamllm.spec import Fingerprint

# Which model stands behind a decoder that has the hooks, so that no cache is used on another one.
_fingerprints: WeakKeyDictionary[PreTrainedModel, Fingerprint] = WeakKeyDictionary()


class Gated(Cache, ABC):
    """A cache that is told of every forward before it begins and after it ends."""

    # Hidden states of the parts already read of the forward that is going on.
    _parts: tuple[Tensor, ...] = ()
    # Which rows read anything in the call that is being cut into parts; None outside of one.
    _reads: list[bool] | None = None

    @property
    @abstractmethod
    def room(self) -> int:
        """Tokens that can be read before the next eviction."""

    @abstractmethod
    def columns(self, valid: Tensor | None, most: int) -> int:
        """How many of the next ``most`` columns one forward may read, >= 1.

        ``valid`` [B, most]: which hold tokens; ``None``: all.
        """

    @abstractmethod
    def enter(
        self, decoder: PreTrainedModel, tokens: Tensor, valid: Tensor | None, reads: list[bool], *, are_ids: bool
    ) -> dict[str, Any]:
        """Begin a forward over ``tokens`` (ids [B, T] or embeddings [B, T, hidden]).

        ``reads``: which rows read anything in this call, of which the forward may be a part. Returns the
        ``position_ids`` and the ``attention_mask`` that the forward needs.
        """

    @abstractmethod
    def leave(self) -> None:
        """End the forward: its tokens are in the cache now."""


def attach(model: PreTrainedModel, fingerprint: Fingerprint) -> None:
    """Let caches of this kind meet ``model``'s decoder; a copy of the model takes the hooks along."""
    decoder = model.get_decoder()
    if _before not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True)
    _fingerprints[decoder] = fingerprint


def fingerprint_of(decoder: PreTrainedModel) -> Fingerprint | None:
    """The fingerprint that ``attach`` was given, if this very decoder was attached."""
    return _fingerprints.get(decoder)


@lru_cache
def _parameters(decoder_type: Any) -> tuple[str, ...]:
    """Names of the parameters of a decoder's forward, without self."""
    return tuple(inspect.signature(decoder_type.forward).parameters)[1:]


def _before(
    decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Any] | None:
    """Pre-hook: evict, cut, supply positions and mask."""
    # 1. only forwards with a gated cache
    if not args and not isinstance(kwargs.get("past_key_values"), Gated):
        return None  # at once, as a compiled step comes through here too
    parameters = _parameters(decoder.__class__)  # type: ignore[arg-type]
    inputs = {**dict(zip(parameters, args, strict=False)), **kwargs} if args else dict(kwargs)
    cache = inputs.get("past_key_values")
    if not isinstance(cache, Gated):
        return None
    cache._parts = ()

    # 2. which columns hold tokens, and which rows read anything
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):
        raise CacheError("A forward with a SinkCache needs input_ids or inputs_embeds.")
    total = tokens.shape[1]
    valid = _valid(inputs.get("attention_mask"), tokens) if total else None
    is_outermost = cache._reads is None
    reads = cache._reads or ([True] * len(tokens) if valid is None else valid[:, -1].tolist())
    if not total or not any(reads):
        raise CacheError("A forward with a SinkCache needs at least one token that is no padding.")
    asked = [name for name, value in inputs.items() if name.startswith("output_") and value is True]
    if asked and total > cache.room:
        raise CacheError(
            f"{asked[0]} was asked for over {total} tokens, but an eviction falls between them, so the parts would not "
            f"fit together; feed at most {cache.room} tokens now (cache.room)."
        )

    cache._reads = reads
    try:
        # 3. read all but the last part in forwards of their own (each comes back through this hook, and fits)
        parts: list[Tensor] = []
        first = 0
        for stop in _stops(valid, total):
            while first < stop:
                ahead = None if valid is None else valid[:, first:stop]
                width = cache.columns(ahead, stop - first)
                piece = _piece(inputs, total, first, first + width)
                piece["attention_mask"] = None if ahead is None else ahead[:, :width]
                first += width
                if first < total:
                    parts.append(decoder(**piece)[0])

        # 4. the last part is the forward that was asked for
        are_ids = piece.get("input_ids") is not None
        tokens = piece["input_ids"] if are_ids else piece["inputs_embeds"]
        supplied = cache.enter(decoder, tokens, piece["attention_mask"], reads, are_ids=are_ids)
    finally:
        if is_outermost:
            cache._reads = None
    cache._parts = tuple(parts)
    piece.update(supplied)
    return (), {name: value for name, value in piece.items() if name in parameters or name not in supplied}


def _after(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Post-hook: count the tokens; join the outputs of the parts."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Gated):
        return None
    cache.leave()
    parts, cache._parts = cache._parts, ()
    if not parts:
        return None
    joined = torch.cat([*parts, output[0]], dim=1)
    if isinstance(output, tuple):
        return (joined, *output[1:])
    output.last_hidden_state = joined
    return output


def _valid(mask: Any, tokens: Tensor) -> Tensor | None:
    """Which of the new columns [B, T] hold tokens; ``None``: all. The caller's mask says nothing else to the cache."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < tokens.shape[1]:
        raise CacheError(
            "A SinkCache makes the attention mask itself, because it alone knows what each token may see; pass none, "
            "or a 2-D one that marks left padding."
        )
    valid = mask[:, mask.shape[1] - tokens.shape[1] :].bool()
    if bool(valid.all()):
        return None
    if bool((valid.any(1) & ~valid[:, -1]).any()):
        raise CacheError("A SinkCache reads left-padded batches only: set tokenizer.padding_side = 'left'.")
    return valid


def _stops(valid: Tensor | None, total: int) -> list[int]:
    """Where to cut so that in every part each row is padded on the left only; the end is the last stop.

    The second turn of a batch in ``generate()`` begins with the last token of the first, and then come pads.
    """
    if valid is None:
        return [total]
    ends = (valid[:, :-1] & ~valid[:, 1:]).any(0).nonzero().flatten() + 1
    return [*ends.tolist(), total]


def _piece(inputs: dict[str, Any], total: int, first: int, stop: int) -> dict[str, Any]:
    """The inputs of columns ``first:stop``; whatever has one entry a column is cut along."""
    if (first, stop) == (0, total):
        return dict(inputs)
    return {
        name: value[:, first:stop]
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == total
        else value
        for name, value in inputs.items()
    }
