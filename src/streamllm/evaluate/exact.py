"""Exact keys, and how far a cache is from them (paper, section 3.2).

From what a ``Witness`` remembers each key is computed afresh: turned once, in float64, from the position at which it
arrived to the one it has now, where positions in the cache have no gap and end where the next token will stand. What
the model's own rounding did to a key before it arrived is part of the model and counts on both sides. The rotation is
written independently of ``rope``; only the frequencies are shared. Nothing here knows the text.

Shapes: one row, ``H`` heads, ``N`` cached tokens, ``D`` head size, ``M`` frequencies, ``T`` new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from streamllm.cache import SinkCache
from streamllm.evaluate.witness import Witness
from streamllm.rope import Rotation


def turn(x: Tensor, rotation: Rotation, offsets: Tensor) -> Tensor:
    """``x`` [H, N, D] in float64 with each token turned by its own offset [N], as complex numbers."""
    out = x.clone()
    part = out[..., rotation.start : rotation.stop]
    rest = part.shape[:-1]
    pairs = part.view(*rest, -1, 2) if rotation.interleaved else part.view(*rest, 2, -1).transpose(-1, -2)
    angles = offsets[:, None] * rotation.inv_freq  # [N, M]
    spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    pairs.copy_(torch.view_as_real(spun))  # [H, N, M, 2]
    return out


def dither(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``x`` (float64) rounded to ``dtype`` up or down at random, in expectation to itself: another single rounding."""
    spacing = torch.finfo(dtype).eps * torch.exp2(x.frexp().exponent.double() - 1)
    noise = (torch.rand(x.shape, dtype=x.dtype, generator=generator) - 0.5) * spacing
    return (x + noise * (x.to(dtype).double() != x)).to(dtype)  # what needs no rounding stays


@dataclass(frozen=True)
class Turned:
    """Keys (or values, where these turn) of one layer beside their reference.

    Args:
        name: of the tensor in the cache's snapshot.
        held: what the cache holds, [H, N, D] on the CPU.
        ideal: the same in float64, turned once from what arrived.
        moved: [N] whether it lies elsewhere now than where it arrived.
        head: pinned tokens among them.
    """

    name: str
    held: Tensor
    ideal: Tensor
    moved: Tensor
    head: int

    @property
    def nearest(self) -> Tensor:
        """The reference, rounded once."""
        return self.ideal.to(self.held.dtype)

    def distances(self, tokens: slice) -> Tensor:
        """[2, count] relative distances from the reference, of the keys held and of ``nearest``, where moved."""
        both = torch.stack([self.held, self.nearest])[:, :, tokens].double()
        ideal = self.ideal[:, tokens]
        found: Tensor = (both - ideal).norm(dim=-1) / ideal.norm(dim=-1).clamp_min(1e-300)  # [2, H, N]
        return found[..., self.moved[tokens]].flatten(1)


@torch.no_grad()
def examine(witness: Witness) -> tuple[list[Turned], bool]:
    """What has been turned, layer by layer; and whether all the rest is bit for bit as it arrived."""
    _, tensors = witness.snapshot()
    found, is_intact = [], True
    for index, came in witness.arrivals.items():
        spec, offsets = witness.spec.layers[index], witness.offsets(index)
        moved = offsets != 0
        for name, arrived, rotation in zip(("keys", "values"), came.states, (spec.keys, spec.values), strict=True):
            held = tensors[f"{index}.{name}"]
            still = slice(None) if rotation is None else ~moved
            is_intact &= torch.equal(held[:, :, still], arrived[:, :, still])
            if rotation is not None:
                ideal = turn(arrived[0].cpu().double(), rotation, offsets)
                found.append(Turned(f"{index}.{name}", held[0].cpu(), ideal, moved, witness.head(index)))
    return found, is_intact


@torch.no_grad()
def compare(witness: Witness, model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """How far the cache is from keys that were each turned once, ready for JSON.

    Args:
        witness: that has read something; an eviction that is due is carried out.
        model: that reads with it.
        ids: [1, T] the next tokens of the stream, read with copies of the cache; as many of them as there is room for.

    Returns:
        ``keys``: relative distance of a key [D] from its reference, mean and largest over all that have moved, and what
        a single rounding of the reference gives (``floor``). ``pinned``: the same of the pinned ones before an eviction
        that is due, because a restart takes them back to where they arrived. ``logits``: largest difference from those
        with exact keys, what another single rounding of these makes (``floor``), mean KL divergence in nats, and the
        share of tokens after which the most likely one is the same. ``intact``: whether all that was never to be turned
        is bit for bit as it arrived. ``turns``: most restarts in the life of a key.

    Raises:
        FloatingPointError: keys or logits are not finite.
    """
    layers, was_intact = examine(witness)
    pinned = [one.distances(slice(one.head)) for one in layers]
    witness.settle()
    layers, is_intact = examine(witness)
    header, held = witness.snapshot()
    generator = torch.Generator().manual_seed(witness.tokens_seen)
    exact = {one.name: one.nearest[None] for one in layers}
    other = {one.name: dither(one.ideal, one.held.dtype, generator)[None] for one in layers}
    ids = ids[:, : witness.room].to(model.device)
    return {
        "read": ids.shape[1],
        "keys": _spread([one.distances(slice(None)) for one in layers]),
        "pinned": _spread(pinned),
        "logits": _part(*(_read(model, header, {**held, **keys}, ids) for keys in (exact, {}, other))),
        "intact": was_intact and is_intact,
        "turns": witness.turns,
    }


def _spread(parts: list[Tensor]) -> dict[str, float]:
    """Mean and largest of distances [2, count], the second line being the floor; 0 where nothing has moved."""
    distances = torch.cat(parts, dim=1)
    if not distances.shape[1]:
        return dict.fromkeys(("mean", "max", "floor_mean", "floor_max"), 0.0)
    if not distances.isfinite().all():
        raise FloatingPointError("its keys are not finite numbers")
    (mean, floor_mean), (largest, floor_max) = distances.mean(1).tolist(), distances.amax(1).tolist()
    return {"mean": mean, "max": largest, "floor_mean": floor_mean, "floor_max": floor_max}


def _read(model: PreTrainedModel, header: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] in float64 of ``ids``, read with a copy of the cache that holds ``tensors``."""
    cache = SinkCache.restore(model, header, tensors)
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].cpu().double()
    if not logits.isfinite().all():
        raise FloatingPointError("its logits are not finite numbers")
    return logits


def _part(exact: Tensor, held: Tensor, dithered: Tensor) -> dict[str, float]:
    """How far ``held`` and ``dithered`` lie from ``exact`` logits."""
    p, q = exact.log_softmax(-1), held.log_softmax(-1)
    return {
        "max": float((held - exact).abs().max()),
        "floor": float((dithered - exact).abs().max()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0)),
        "agree": float((exact.argmax(-1) == held.argmax(-1)).double().mean()),
    }
