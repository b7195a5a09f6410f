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
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from streamllm.errors import CacheError

# The decoders that have the hooks, with the names of their forward's parameters.
_gated: WeakKeyDictionary[PreTrainedModel, tuple[str, ...]] = WeakKeyDictionary()


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


def attach(model: PreTrainedModel) -> None:
    """Let caches of this kind meet ``model``'s decoder; once is enough, more does nothing."""
    decoder = model.get_decoder()
    if decoder not in _gated:
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True)
        _gated[decoder] = tuple(inspect.signature(decoder.forward).parameters)


def _before(
    decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Any] | None:
    """Pre-hook: evict, cut, supply positions and mask."""
    # 1. only forwards with a gated cache
    parameters = _gated[decoder]
    inputs = {**dict(zip(parameters, args, strict=False)), **kwargs} if args else dict(kwargs)
    cache = inputs.get("past_key_values")
    if not isinstance(cache, Gated):
        return None
    cache._parts = ()

    # 2. which columns hold tokens
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):
        raise CacheError("A forward with a SinkCache needs input_ids or inputs_embeds.")
    total = tokens.shape[1]
    valid = _valid(inputs.get("attention_mask"), tokens) if total else None
    reads = cache._reads or ([True] * len(tokens) if valid is None else valid[:, -1].tolist())
    if not total or not any(reads):
        raise CacheError("A forward with a SinkCache needs at least one token that is no padding.")
    if inputs.get("output_attentions") and total > cache.room:
        raise _too_long("Attentions", total, cache)

    # 3. read all but the last part in forwards of their own (each comes back through this hook, and fits)
    parts: list[Tensor] = []
    first = 0
    while True:
        width = cache.columns(None if valid is None else valid[:, first:], total - first)
        piece = _piece(inputs, total, first, first + width)
        piece["attention_mask"] = None if valid is None else valid[:, first : first + width]
        if first + width == total:
            break
        if inputs.get("output_hidden_states"):
            raise _too_long("Hidden states", total, cache)
        cache._reads = reads
        try:
            parts.append(decoder(**piece)[0])
        finally:
            cache._reads = None
        first += width

    # 4. the last part is the forward that was asked for
    are_ids = piece.get("input_ids") is not None
    tokens = piece["input_ids"] if are_ids else piece["inputs_embeds"]
    supplied = cache.enter(decoder, tokens, piece["attention_mask"], reads, are_ids=are_ids)
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
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise CacheError("A SinkCache reads left-padded batches only: set tokenizer.padding_side = 'left'.")
    return valid


def _too_long(what: str, total: int, cache: Gated) -> CacheError:
    return CacheError(
        f"{what} of {total} tokens were asked for, but an eviction falls between them, so they would not fit together; "
        f"feed at most {cache.room} tokens now (cache.room)."
    )


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
