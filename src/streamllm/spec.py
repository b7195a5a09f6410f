"""What a model is, as far as streaming goes: its layers and how it knows positions, found by probing, not by name.

The probe runs the model on one token at several positions. With a single key the attention output does not depend
on the position, so in every layer ``key(p + d) = R(d) key(p)``: the rotation R that explains the samples is the
model's, and the residual of the fit is its own proof. Nothing here looks at an architecture's name or source.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, get_layer_types_and_kwargs

from streamllm.config import UNKNOWN_TRAINED_LENGTH
from streamllm.errors import ConfigError, UnsupportedModelError
from streamllm.quantize import kind_of
from streamllm.rope import Rotation, fit

Positions = Literal["rotary", "alibi", "none", "absolute"]
LayerKind = Literal["sink", "sliding", "linear", "shared"]

PROBE_POSITIONS = (1, 2, 3, 4, 8, 30, 128)
"""Where the probe samples keys; not at 0, where some recurrent layers begin a new state."""

PROBE_LENGTH = 6

INCIDENTAL = ("_name_or_path", "architectures", "attn_implementation", "dtype", "transformers_version", "use_cache")
"""Entries of a config that do not change what a model computes."""

FINGERPRINTED = 16
"""Numbers at each end of a weight that enter the fingerprint: telling models apart need not read all their bytes."""

_KINDS: dict[str, LayerKind] = {
    "full_attention": "sink",
    "sliding_attention": "sliding",
    "linear_attention": "linear",
    "conv": "linear",
    "dummy": "shared",
}


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One layer.

    Args:
        kind: "sink" (pinned head and window), "sliding" (the model's own window, no sinks), "linear" (a recurrent
            state of constant size) or "shared" (uses another layer's cache, or has no attention).
        window: the model's own sliding window in tokens, if it has one.
        keys, values: how each is rotated; ``None`` where it does not move.
        bytes_per_token: bytes of one token's keys and values.
        vectors: of which these consist: heads of keys and heads of values.
        states: recurrent states of a linear layer.
    """

    kind: LayerKind
    window: int | None = None
    keys: Rotation | None = None
    values: Rotation | None = None
    bytes_per_token: int = 0
    vectors: int = 0
    states: int = 1


@dataclass(frozen=True)
class Fingerprint:
    """Enough to tell models apart: type, dtype, and a digest of the config and of some numbers of every weight."""

    model_type: str
    dtype: str
    digest: str


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """How a model can stream.

    Args:
        model_type: the family, as its config names it.
        positions: "rotary", "alibi", "none" (no positions at all, NoPE) or "absolute" (learned or sinusoidal
            positions, part of the hidden states: such a model streams by re-reading).
        residual: how far the probe is from what the scheme predicts, relative; the worst layer.
        trained_length: positions that the model was trained on; ``None`` if its config does not say.
        layers: one entry a layer.
        takes_positions: whether the decoder has a ``position_ids`` parameter.
        takes_masks: whether the decoder takes a 4-D mask as it is.
        fingerprint: guards saved streams against another model.
    """

    model_type: str
    positions: Positions
    residual: float
    trained_length: int | None
    layers: tuple[LayerSpec, ...]
    takes_positions: bool
    takes_masks: bool
    fingerprint: Fingerprint

    @property
    def limit(self) -> int:
        """Most tokens that the cache may hold: the trained length, or the model's own window if all layers have one."""
        windows = [layer.window for layer in self.layers if layer.kind == "sink" and layer.window]
        return min([self.trained_length or UNKNOWN_TRAINED_LENGTH, *windows])

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the model's dtype."""
        dtype: torch.dtype = getattr(torch, self.fingerprint.dtype.removeprefix("torch."))
        return dtype.itemsize

    @property
    def reread(self) -> bool:
        """Whether cached keys cannot be moved, so that kept tokens must be read again at each eviction."""
        return self.positions == "absolute"

    def count(self, kind: LayerKind) -> int:
        """Number of layers of one kind."""
        return sum(layer.kind == kind for layer in self.layers)


# What was found, with the dtype and the attention kernel that it was found with.
_known: WeakKeyDictionary[PreTrainedModel, tuple[tuple[torch.dtype, str], ModelSpec]] = WeakKeyDictionary()


def inspect_model(model: PreTrainedModel) -> ModelSpec:
    """Probe ``model`` (a few forwards of one to six tokens; the answer is remembered as long as the model lives).

    Raises:
        ConfigError: ``model`` is no transformers model.
        UnsupportedModelError: it cannot stream; the message names its type and the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"Expected a transformers model (PreTrainedModel), got {type(model).__name__}.")
    known, state = _known.get(model), (model.dtype, str(model.config._attn_implementation))
    if known is None or known[0] != state:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                known = (state, _Probe(model).spec())
        finally:
            for module, mode in modes:
                module.training = mode
    # Weights may have been trained on, or merged, since the probe.
    spec, fingerprint = known[1], _fingerprint(model)
    if spec.fingerprint != fingerprint:
        spec = replace(spec, fingerprint=fingerprint)
    _known[model] = (state, spec)
    return spec


class _Probe:
    """One examination of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.name = str(self.config.model_type)
        if model.config.is_encoder_decoder:
            raise self._unfit("it is an encoder-decoder: its cross-attention needs the whole input, which never ends")
        self.decoder = model.get_decoder()
        self.parameters = inspect.signature(self.decoder.forward).parameters
        if "past_key_values" not in self.parameters:
            raise self._unfit("its decoder keeps no keys and values in a Cache (no past_key_values parameter)")
        self.trained = _trained_length(self.config)
        self.positions = tuple(p for p in PROBE_POSITIONS if p < (self.trained or UNKNOWN_TRAINED_LENGTH))
        # Rounding of the model's own arithmetic; a wrong rotation is off by about 1.
        is_coarse = model.dtype in (torch.bfloat16, torch.float16) or kind_of(model) != "none"
        self.tolerance = 5e-2 if is_coarse else 2e-3

    def spec(self) -> ModelSpec:
        kinds = self._layers()
        cache = DynamicCache(config=self.config)
        self._forward(self._token().expand(len(self.positions), 1), cache, positions=self.positions)
        layers, worst, moving = self._explain(kinds, cache)
        scheme: Positions
        if worst > self.tolerance:
            change = self._hidden_states_move()
            if change <= self.tolerance:
                layer = max(range(len(layers)), key=lambda i: layers[i][1])
                raise self._unfit(
                    f"the keys of layer {layer} move with the position in a way that no known rotation explains "
                    f"(residual {worst:.2g}, accepted up to {self.tolerance:.0e})"
                )
            # Positions are added to the hidden states; keys follow from them and need no explanation.
            scheme, worst = "absolute", 0.0
            layers = [(replace(layer, keys=None, values=None), 0.0) for layer, _ in layers]
        elif moving:
            scheme = "rotary"
            worst = max(worst, self._shift_residual())
        else:
            scheme, worst = self._bias()
        return ModelSpec(
            model_type=self.name,
            positions=scheme,
            residual=worst,
            trained_length=self.trained,
            layers=tuple(layer for layer, _ in layers),
            takes_positions="position_ids" in self.parameters,
            takes_masks=scheme in ("rotary", "none") and self._takes_masks(),
            fingerprint=_fingerprint(self.model),
        )

    # ---- the layers

    def _layers(self) -> list[LayerSpec]:
        """Kinds of the layers, from ``config.layer_types`` as the model's own cache reads them."""
        types, options = get_layer_types_and_kwargs(self.config)
        for name in types:
            if name not in _KINDS:
                raise self._unfit(f"it has layers of type {name!r}, which cannot be evicted from")
        layers = [
            LayerSpec(_KINDS[t], o.get("sliding_window"), states=o.get("number_of_states", 1))
            for t, o in zip(types, options, strict=True)
        ]
        if not any(layer.kind == "sink" for layer in layers):
            # Every layer slides: they all get sinks, inside the model's own window.
            layers = [LayerSpec("sink", x.window) if x.kind == "sliding" else x for x in layers]
        if not any(layer.kind == "sink" for layer in layers):
            raise self._unfit("none of its layers caches keys: its state is constant already and needs no streaming")
        return layers

    def _explain(
        self, kinds: list[LayerSpec], cache: DynamicCache
    ) -> tuple[list[tuple[LayerSpec, float]], float, bool]:
        """Fit a rotation to each layer's keys and values; (layers with residuals, worst residual, any that moves)."""
        frequencies = [b for name, b in self.decoder.named_buffers() if name.endswith("inv_freq")]
        frequencies = list({tuple(f.flatten().tolist()): f for f in frequencies}.values())
        if not frequencies:
            # A table of sines instead of frequencies (GPT-J): those of RoFormer, in every width.
            frequencies = [10_000.0 ** (-torch.arange(0, size, 2) / size) for size in range(2, 257, 2)]
        layers: list[tuple[LayerSpec, float]] = []
        for index, kind in enumerate(kinds):
            if kind.kind not in ("sink", "sliding"):
                layers.append((kind, 0.0))
                continue
            stored = cache.layers[index] if index < len(cache.layers) else None
            if not isinstance(stored, CacheLayerMixin) or stored.keys is None or stored.values is None:
                raise self._unfit(f"layer {index} keeps its keys outside the Cache that it is given")
            found: list[Rotation | None] = []
            residuals: list[float] = []
            for states in (stored.keys, stored.values):
                rotation, residual = fit(states[:, :, 0], [p - self.positions[0] for p in self.positions], frequencies)
                found.append(rotation)
                residuals.append(residual)
            size = sum(t[0, :, 0].numel() * t.element_size() for t in (stored.keys, stored.values))
            vectors = stored.keys.shape[1] + stored.values.shape[1]
            layers.append((LayerSpec(kind.kind, kind.window, found[0], found[1], size, vectors), max(residuals)))
        worst = max(residual for _, residual in layers)
        return layers, worst, any(layer.keys or layer.values for layer, _ in layers)

    # ---- the checks

    def _shift_residual(self) -> float:
        """How much the output changes when all positions move by the same offset: nothing, if only distances count.

        The keys alone would not show a position that enters the queries or the hidden states otherwise.
        """
        last = self.positions[-1]
        if last <= PROBE_LENGTH:
            return 0.0
        ids = self._ids()
        outputs = [
            self._forward(ids, DynamicCache(config=self.config), positions=range(first, first + PROBE_LENGTH))[0]
            for first in (self.positions[0], last - PROBE_LENGTH, self.positions[0])
        ]
        if (change := _relative(outputs[2], outputs[0])) > self.tolerance:
            raise self._unfit(
                f"it keeps a state of its own between forwards, outside the cache (the same input twice gives outputs "
                f"that differ by {change:.2g})"
            )
        residual = _relative(outputs[1], outputs[0])
        if residual > 10 * self.tolerance:
            raise self._unfit(
                f"its output depends on absolute positions (moving all of them changes it by {residual:.2g}), "
                "although its keys are rotated"
            )
        return residual

    def _hidden_states_move(self) -> float:
        """How much the embedding of a token changes with its position: > 0 for learned and sinusoidal positions."""
        if "position_ids" not in self.parameters:
            return 0.0
        output = self._run(
            self._token().expand(2, 1),
            None,
            positions=(self.positions[0], self.positions[-1]),
            output_hidden_states=True,
        )
        first = output.hidden_states[0][:, 0]
        return _relative(first[1], first[0])

    def _bias(self) -> tuple[Positions, float]:
        """Tell ALiBi from no positions, by positive signs, for a model whose keys do not move.

        With the same token everywhere all keys and values of a layer are equal, so attention is uniform unless a bias
        by distance is added; ALiBi's is linear in the distance (arXiv 2108.12409), so log attention is a straight line.
        """
        ids = self._token().expand(1, PROBE_LENGTH)
        implementation = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation("eager")
            attentions = self._run(ids, None, output_attentions=True).attentions
        finally:
            self.model.set_attn_implementation(implementation)
        if not attentions or attentions[0] is None:
            raise self._unfit("its keys do not move with the position, and it does not show its attention to tell why")
        logs = torch.stack([a[0, :, -1].double() for a in attentions]).log()  # [layers, heads, keys]
        slopes = logs.diff(dim=-1)
        bend = float((slopes - slopes.mean(-1, keepdim=True)).abs().max())
        slope = float(slopes.mean(-1).max())
        if bend > 10 * self.tolerance:
            raise self._unfit(
                f"its keys do not move with the position, and its attention is neither uniform nor linear in the "
                f"distance (off by {bend:.2g}): it may ignore position_ids"
            )
        if float(slopes.abs().max()) <= self.tolerance:
            return "none", bend
        if slope < 0:
            raise self._unfit("its attention falls towards recent tokens, which is not ALiBi")
        return "alibi", bend

    def _takes_masks(self) -> bool:
        """Whether a 4-D additive mask given by the caller is used as it is: the causal one must change nothing."""
        if any(layer.kind == "sliding" for layer in self._layers()) or "attention_mask" not in self.parameters:
            return False
        ids = self._ids()
        lowest = torch.finfo(self.model.dtype).min
        causal = torch.full((1, 1, PROBE_LENGTH, PROBE_LENGTH), lowest, dtype=self.model.dtype, device=ids.device).triu(
            1
        )
        positions = range(PROBE_LENGTH)
        plain = self._forward(ids, DynamicCache(config=self.config), positions=positions)
        try:
            masked = self._forward(ids, DynamicCache(config=self.config), positions=positions, attention_mask=causal)
            # A mask that hides all but the token itself must change the output, or it is ignored.
            itself = causal + causal.transpose(2, 3)
            alone = self._forward(ids, DynamicCache(config=self.config), positions=positions, attention_mask=itself)
        except (ValueError, IndexError, RuntimeError, TypeError):
            return False
        return _relative(masked, plain) <= 10 * self.tolerance < _relative(alone, plain)

    # ---- running the model

    def _token(self) -> Tensor:
        """[1, 1] id of a token with an embedding that is not zero (a padding token's may be)."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        for index in range(weight.shape[0] // 2, weight.shape[0]):
            if bool(weight[index].any()):
                return torch.tensor([[index]], device=weight.device)
        raise self._unfit("all its token embeddings are zero")

    def _ids(self) -> Tensor:
        """[1, PROBE_LENGTH] different tokens."""
        first = self._token()
        return (first + torch.arange(PROBE_LENGTH, device=first.device)) % int(self.config.vocab_size)

    def _forward(self, ids: Tensor, cache: DynamicCache | None, **options: Any) -> Tensor:
        output: Tensor = self._run(ids, cache, **options)[0]
        return output

    def _run(self, ids: Tensor, cache: DynamicCache | None, *, positions: Any = None, **options: Any) -> Any:
        """Run the decoder on ``ids`` [B, T]; ``positions`` are one per row (T = 1) or one per column (B = 1)."""
        if positions is not None and "position_ids" in self.parameters:
            options["position_ids"] = torch.tensor(list(positions), device=ids.device).view(ids.shape)
        if cache is not None:
            options["past_key_values"] = cache
        return self.decoder(input_ids=ids, use_cache=cache is not None, **options)

    def _unfit(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"A model of type {self.name!r} cannot stream: {reason}.")


def _fingerprint(model: PreTrainedModel) -> Fingerprint:
    config = model.config.get_text_config(decoder=True).to_dict()
    facts = {name: value for name, value in config.items() if name not in INCIDENTAL}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in (*model.state_dict().items(), *model.named_buffers()):
        flat = weight.detach().flatten()
        ends = torch.cat([flat[:FINGERPRINTED], flat[-FINGERPRINTED:]]).to(device="cpu", dtype=torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(ends.numpy().tobytes())
    return Fingerprint(str(model.config.model_type), str(model.dtype), digest.hexdigest())


def _relative(a: Tensor, b: Tensor) -> float:
    """Distance of ``a`` from ``b``, relative to the norm of ``b``."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def _trained_length(config: Any) -> int | None:
    """Positions that the model was trained on, from its config.

    Kinds of rotary scaling that change their frequencies with the largest position seen (dynamic NTK, longrope) count
    up to where the change begins: beyond it, keys that are stored already would no longer fit.
    """
    lengths = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length")]
    known = [length for length in lengths if isinstance(length, int) and length > 0]
    if not known:
        return None
    changing = [
        original
        for parameters in _rope_parameters(getattr(config, "rope_parameters", None))
        if str(parameters.get("rope_type", "")) in ("dynamic", "longrope")
        and isinstance(original := parameters.get("original_max_position_embeddings"), int)
    ]
    return min([known[0], *changing])


def _rope_parameters(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rope parameters of a config, which may be given per layer type."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        for value in parameters.values():
            yield from _rope_parameters(value)
