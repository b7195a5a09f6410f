"""How keys are rotated: finding a rotation from samples, and rotating by any offset.

Rotary embeddings turn pairs of numbers of a key by ``position * frequency`` (RoFormer, arXiv 2104.09864). Since the
turn is additive, a stored key moves from position p to p + offset by one more turn of ``offset * frequency``; angles
are computed in float64, because in float32 they are off by 0.06 rad at position 1,000,000.

This file knows nothing about models: ``fit`` is given keys sampled at known positions and candidate frequencies, and
says which rotation explains them, and how well (the residual).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation of ``2 * len(inv_freq)`` numbers of the last dimension, beginning at ``start``.

    Args:
        inv_freq: [M] float64, radians per position.
        start: first rotated number; the rest of the vector stays as it is (partial rotation, MLA).
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + M), "half-split".
    """

    inv_freq: Tensor
    start: int = 0
    interleaved: bool = False

    @property
    def stop(self) -> int:
        """End of the rotated part of the last dimension."""
        return self.start + 2 * len(self.inv_freq)

    def rotate(self, x: Tensor, offset: int) -> Tensor:
        """Rotate ``x`` [..., D] by ``offset`` positions; a new tensor of the same shape and dtype."""
        # Angles in float64, the turn itself at least in float32: half precision is rounded once, at the end.
        angle = self.inv_freq * offset
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos = angle.cos().to(device=x.device, dtype=dtype)
        sin = angle.sin().to(device=x.device, dtype=dtype)
        out = x.clone()
        source, target = x[..., self.start : self.stop], out[..., self.start : self.stop]
        half = len(self.inv_freq)
        first, second = (
            (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(0, half), slice(half, None))
        )
        a, b = source[..., first].to(dtype), source[..., second].to(dtype)
        target[..., first] = (a * cos - b * sin).to(x.dtype)
        target[..., second] = (b * cos + a * sin).to(x.dtype)
        return out

    def describe(self) -> str:
        """Say the pairing and the rotated part, e.g. ``half-split 0:64``."""
        return f"{'interleaved' if self.interleaved else 'half-split'} {self.start}:{self.stop}"


def fit(samples: Tensor, offsets: Sequence[int], frequencies: Iterable[Tensor]) -> tuple[Rotation | None, float]:
    """Find the rotation R with ``samples[i] = R(offsets[i]) samples[0]``.

    Args:
        samples: [P, H, D] one token's keys (or values), read at P positions.
        offsets: how far each position lies from the first; ``offsets[0]`` is 0.
        frequencies: candidate ``inv_freq`` vectors, radians per position.

    Returns:
        The rotation (``None``: the samples do not move) and its residual: the largest distance over the positions,
        relative to the norm of the first sample. The caller judges whether the residual is small enough.
    """
    samples = samples.detach().to(device="cpu", dtype=torch.float64)
    width = samples.shape[-1]
    best: Rotation | None = None
    least = _residual(samples, [samples[0]] * len(offsets))
    for inv_freq in frequencies:
        freq = inv_freq.detach().to(device="cpu", dtype=torch.float64).flatten()
        size = 2 * len(freq)
        if not 0 < size <= width:
            continue
        for start in sorted({0, width - size}):
            for interleaved in (False, True):
                candidate = Rotation(freq, start, interleaved)
                residual = _residual(samples, [candidate.rotate(samples[0], offset) for offset in offsets])
                if residual < least:
                    best, least = candidate, residual
    return best, least


def _residual(samples: Tensor, expected: Sequence[Tensor]) -> float:
    """Largest relative distance between ``samples`` [P, H, D] and what a rotation predicts."""
    scale = samples[0].norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float(max((sample - want).norm() for sample, want in zip(samples, expected, strict=True)) / scale)
