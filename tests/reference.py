"""StreamingLLM written down literally (arXiv 2309.17453, section 3.2): slow, short, and independent of streamllm.

The stream. The first S tokens stay; the cache holds at most C = S + W + B - 1. When a token arrives and C are held,
the B oldest after the first S leave together; then the token joins and attends to all that are held, itself included.
Positions are places in the cache, 0 to n - 1. ``kept`` says which tokens that are; everything else follows from it.

Ways to the logits:

* ``literal_logits``: token by token with keys cached *before* rotation and all rotated by their place at every step.
  The rotation comes from a table of architectures below; angles are float64.
* ``layerwise_logits``: no cache and no rotation at all. A layer of the model runs densely over the stored inputs of
  the kept tokens; its last output is the new token's input to the next layer. Any depth.
* ``dense_one_layer_logits``: one dense forward over the kept tokens. For one layer only: a deeper model would compute
  the kept tokens anew, without what they once saw.
* ``reread_logits``: another stream, for learned positions and for the paper's "sliding window with re-computation":
  at each eviction the kept tokens are read again from nothing. This one equals ``dense_logits`` at any depth.

Layers that slide by themselves beside full ones (``hybrid``) keep the model's own window: the last w tokens of the
stream, itself included, no sinks. Where every layer slides, all have sinks and window, and C must fit the model's
window. Convolutions keep their own state. Batch is 1; shapes: H heads, N cached tokens, D head size, F frequencies.
"""
# ruff: noqa: N803

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, LinearAttentionLayer

Ids = torch.Tensor | Sequence[int]


def kept(t: int, S: int, W: int, B: int) -> list[int]:
    """Indices of the tokens that token ``t`` attends to, in cache order, ``t`` itself last."""
    held: list[int] = []
    for new in range(t + 1):
        if len(held) == S + W + B - 1:
            del held[S : S + B]
        held.append(new)
    return held


# --- what each layer holds -----------------------------------------------------------------------------------------


def _kinds(model: PreTrainedModel) -> list[str]:
    """For each layer: "stream" (sinks and window), "own" (the model's window), "conv" or "shared"."""
    config = model.config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    types = list(getattr(config, "layer_types", None) or ["full_attention"] * count)
    unknown = set(types) - {"full_attention", "sliding_attention", "conv"}
    if unknown:
        raise NotImplementedError(f"The reference does not define a stream for layers of type {sorted(unknown)}.")
    own = "own" if "full_attention" in types else "stream"
    kinds = [{"full_attention": "stream", "sliding_attention": own, "conv": "conv"}[kind] for kind in types]
    modes = getattr(config, "kv_sharing_modes", None) or [None] * count
    return ["shared" if mode == "reuse" else kind for mode, kind in zip(modes, kinds, strict=True)]


def _check_fits(model: PreTrainedModel, S: int, W: int, B: int) -> None:
    """Where every layer slides the model's own mask must not hide a sink."""
    config = model.config.get_text_config(decoder=True)
    slides = "full_attention" not in (getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window < S + W + B - 1:
        raise ValueError(f"S + W + B - 1 = {S + W + B - 1} does not fit the model's window of {window}.")


def _in_layer(kind: str, model: PreTrainedModel, t: int, S: int, W: int, B: int) -> list[int]:
    """Tokens whose inputs a layer of this kind uses to compute token ``t``."""
    config = model.config.get_text_config(decoder=True)
    if kind == "stream":
        return kept(t, S, W, B)
    width = config.conv_L_cache if kind == "conv" else config.sliding_window
    return list(range(max(0, t + 1 - width), t + 1))


# --- how each architecture rotates ---------------------------------------------------------------------------------

INTERLEAVED = {"codegen", "cohere", "cohere2", "deepseek_v2", "glm", "gptj"}
"""Model types whose cached keys rotate in pairs (0, 1), (2, 3), ...; all others in pairs (0, F), (1, F + 1), ...

DeepSeek-V3 interleaves its weights, but what it caches is already in halves."""

ROTATES_SECOND = {"deepseek_v2", "deepseek_v3"}
"""MLA: the rotary key is the second of the two cached tensors, the first is the latent."""

NO_ROTATION = {"bloom", "gpt2", "mpt", "opt"}


def _frequencies(model: PreTrainedModel, layer: int) -> torch.Tensor | None:
    """Angles per position, [F] in float64, in force right now; None for a layer that does not rotate."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in NO_ROTATION or (config.model_type == "falcon" and config.alibi):
        return None
    if config.model_type in {"gptj", "codegen"}:
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64) / config.rotary_dim
        return (1.0 / 10000**exponents).double()
    if config.model_type == "smollm3" and not config.no_rope_layers[layer]:
        return None
    if config.model_type == "cohere2" and config.layer_types[layer] == "full_attention":
        return None
    own_name = f"{config.layer_types[layer]}_inv_freq" if getattr(config, "layer_types", None) else "inv_freq"
    for module in model.modules():
        for name in (own_name, "inv_freq"):
            if isinstance(getattr(module, name, None), torch.Tensor):
                return getattr(module, name).double()
    raise NotImplementedError(f"The reference does not know how {config.model_type} rotates.")


def _rotate(states: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, pairs: str) -> torch.Tensor:
    """Rotate the leading 2 F of D dimensions of [1, H, N, D] by positions [N] (float64)."""
    turning = 2 * len(frequencies)
    part, rest = states[..., :turning], states[..., turning:]
    angles = positions[:, None].double() * frequencies  # [N, F]
    turn = torch.polar(torch.ones_like(angles), angles)
    if pairs == "interleaved":
        numbers = torch.complex(part[..., 0::2], part[..., 1::2]) * turn
        part = torch.stack((numbers.real, numbers.imag), dim=-1).flatten(-2)
    else:
        numbers = torch.complex(part[..., : turning // 2], part[..., turning // 2 :]) * turn
        part = torch.cat((numbers.real, numbers.imag), dim=-1)
    return torch.cat((part, rest), dim=-1)


# --- the cache of raw keys -----------------------------------------------------------------------------------------


class _RawLayer(CacheLayerMixin):
    """Keys before rotation and values, [1, H, N, D] in float64; reads one token at a time."""

    def __init__(self, frequencies: Callable[[], torch.Tensor | None], pairs: str, rotates_second: bool) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.pairs = pairs
        self.rotates_second = rotates_second
        self.held: list[torch.Tensor] = []
        self.position = 0

    def keep(self, places: list[int]) -> None:
        if self.held:
            self.held = [tensor[:, :, places] for tensor in self.held]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.held = [key_states[:, :, :0].double(), value_states[:, :, :0].double()]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert key_states.shape[-2] == 1, "the literal stream reads one token at a time"
        if not self.held:
            self.lazy_initialization(key_states, value_states)
        frequencies = self.frequencies()
        new = [key_states.double(), value_states.double()]
        moving = 1 if self.rotates_second else 0
        if frequencies is not None:
            new[moving] = _rotate(new[moving], torch.tensor([-self.position]), frequencies, self.pairs)
        self.held = [torch.cat(pair, dim=-2) for pair in zip(self.held, new, strict=True)]
        out = list(self.held)
        if frequencies is not None:
            # The newest stands at its position, each other one step behind its successor.
            count = out[moving].shape[-2]
            places = self.position - (count - 1) + torch.arange(count)
            out[moving] = _rotate(out[moving], places, frequencies, self.pairs)
        return out[0].to(key_states.dtype), out[1].to(value_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.held[0].shape[-2] if self.held else 0

    def get_max_length(self) -> int:
        return -1


class _OwnWindowLayer(_RawLayer):
    """A sliding layer of a hybrid model."""

    is_sliding = True


def _make_cache(model: PreTrainedModel, kinds: list[str]) -> Cache:
    model_type = model.config.get_text_config(decoder=True).model_type
    pairs = "interleaved" if model_type in INTERLEAVED else "half"

    def make(index: int, kind: str) -> Any:
        if kind == "conv":
            return LinearAttentionLayer()
        if kind == "shared":
            return DummyLayer()
        layer = _OwnWindowLayer if kind == "own" else _RawLayer
        return layer(lambda: _frequencies(model, index), pairs, model_type in ROTATES_SECOND)

    return Cache(layers=[make(index, kind) for index, kind in enumerate(kinds)])


# --- running the model ---------------------------------------------------------------------------------------------


def _list(ids: Ids) -> list[int]:
    return torch.as_tensor(ids).flatten().tolist()


def _forward(model: PreTrainedModel, ids: list[int], first: int = 0, cache: Cache | None = None) -> torch.Tensor:
    """Logits [T, vocab] of tokens at positions ``first``, ``first + 1``, ..."""
    options: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = torch.arange(first, first + len(ids))[None]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None, **options)
    return out.logits[0]


def literal_logits(model: PreTrainedModel, ids: Ids, S: int, W: int, B: int) -> torch.Tensor:
    """Logits [T, vocab] of the paper's stream: raw keys cached, all rotated by their place at every step."""
    _check_fits(model, S, W, B)
    kinds = _kinds(model)
    cache = _make_cache(model, kinds)
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    logits, before = [], []
    for t, token in enumerate(_list(ids)):
        now = kept(t, S, W, B)
        stay = [place for place, index in enumerate(before) if index in now]
        for layer in cache.layers:
            if isinstance(layer, _OwnWindowLayer):
                layer.keep(list(range(max(0, layer.get_seq_length() - (window - 1)), layer.get_seq_length())))
            elif isinstance(layer, _RawLayer):
                layer.keep(stay)
            layer.position = len(now) - 1
        logits.append(_forward(model, [token], first=len(now) - 1, cache=cache))
        before = now
    return torch.cat(logits)


def dense_logits(model: PreTrainedModel, ids: Ids, t: int, S: int, W: int, B: int) -> torch.Tensor:
    """Logits [vocab] of token ``t`` from one dense forward over the kept tokens at positions 0 to n - 1."""
    _check_fits(model, S, W, B)
    tokens = _list(ids)
    return _forward(model, [tokens[index] for index in kept(t, S, W, B)])[-1]


def dense_one_layer_logits(model: PreTrainedModel, ids: Ids, t: int, S: int, W: int, B: int) -> torch.Tensor:
    """``dense_logits``, for a model that must have one layer."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if count != 1:
        raise ValueError(f"A dense forward equals the stream for one layer only, this model has {count}.")
    return dense_logits(model, ids, t, S, W, B)


def reread_logits(model: PreTrainedModel, ids: Ids, S: int, W: int, B: int) -> torch.Tensor:
    """Logits [T, vocab] when at each eviction the kept tokens are read again at positions 0 to n - 1."""
    tokens = _list(ids)
    logits, before = [], []
    cache = DynamicCache(config=model.config)
    for t, token in enumerate(tokens):
        now = kept(t, S, W, B)
        if now[:-1] != before:
            cache = DynamicCache(config=model.config)
            if len(now) > 1:
                _forward(model, [tokens[index] for index in now[:-1]], cache=cache)
        logits.append(_forward(model, [token], first=len(now) - 1, cache=cache))
        before = now
    return torch.cat(logits)


# --- layer by layer, without a cache -------------------------------------------------------------------------------


def _decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise NotImplementedError(f"No list of {count} decoder layers in {type(model).__name__}.")


class _Probe:
    """Hooks on one layer: replaces the inputs of all tokens but the newest, records the newest's input and output."""

    def __init__(self, layer: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
        self.inputs = inputs  # of the tokens in the layer, the newest's last if it is known: each [hidden]
        self.newest = torch.empty(0)
        self.output = torch.empty(0)
        self.handles = (
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after),
        )

    def _before(self, _layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()  # [1, N, hidden]
        for place, state in enumerate(self.inputs):
            hidden[0, place] = state
        self.newest = hidden[0, -1]
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _after(self, _layer: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        first = output if isinstance(output, torch.Tensor) else output[0]
        self.output = first[0, -1]

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self.handles:
            handle.remove()


def layerwise_logits(model: PreTrainedModel, ids: Ids, S: int, W: int, B: int) -> torch.Tensor:
    """Logits [T, vocab] of the paper's stream from dense forwards of single layers; no cache, no rotation table."""
    _check_fits(model, S, W, B)
    tokens, layers, kinds = _list(ids), _decoder_layers(model), _kinds(model)
    if "shared" in kinds:
        raise NotImplementedError("Layers that share keys and values cannot run one by one.")
    seen: list[list[torch.Tensor]] = [[] for _ in layers]  # inputs of each layer for each token so far: [hidden]
    logits = []
    for t in range(len(tokens)):
        known: list[torch.Tensor] = []  # the input of token t to this layer, once the layer before has run
        for index, layer in enumerate(layers):
            used = _in_layer(kinds[index], model, t, S, W, B)
            with _Probe(layer, [seen[index][token] for token in used[:-1]] + known) as probe:
                last = _forward(model, [tokens[token] for token in used])[-1]
            seen[index].append(probe.newest)
            known = [probe.output]
        logits.append(last)
    return torch.stack(logits)
