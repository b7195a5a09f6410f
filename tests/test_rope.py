"""Rotations, against complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamllm.rope import Rotation, fit

FREQ = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)


def by_complex_numbers(x: torch.Tensor, rotation: Rotation, offset: int) -> torch.Tensor:
    """Rotate pairs of the last dimension as complex numbers, in plain Python."""
    out = x.double().clone()
    m = len(rotation.inv_freq)
    for i, frequency in enumerate(rotation.inv_freq.tolist()):
        a, b = (2 * i, 2 * i + 1) if rotation.interleaved else (i, i + m)
        a, b = a + rotation.start, b + rotation.start
        z = torch.complex(out[..., a], out[..., b]) * complex(
            math.cos(offset * frequency), math.sin(offset * frequency)
        )
        out[..., a], out[..., b] = z.real, z.imag
    return out


@settings(max_examples=60, deadline=None)
@given(interleaved=st.booleans(), start=st.integers(0, 6), offset=st.integers(-5_000_000, 5_000_000))
def test_rotation_equals_multiplying_complex_numbers(interleaved: bool, start: int, offset: int) -> None:
    """Reference: ``by_complex_numbers``; what is outside the rotated part does not change."""
    x = torch.randn(2, 3, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(offset % 1000))
    rotation = Rotation(FREQ, start, interleaved)
    got = rotation.rotate(x, offset)
    assert torch.allclose(got, by_complex_numbers(x, rotation, offset), atol=1e-9)
    assert torch.equal(got[..., :start], x[..., :start])
    assert torch.equal(got[..., rotation.stop :], x[..., rotation.stop :])


def test_rotating_there_and_back_a_million_positions_returns_the_key() -> None:
    """Reference: the key itself; float32 angles would be off by 0.06 rad here."""
    x = torch.randn(1, 2, 5, 8)
    rotation = Rotation(FREQ)
    assert torch.allclose(rotation.rotate(rotation.rotate(x, 1_000_000), -1_000_000), x, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rotation_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    """Reference: the float64 rotation rounded to the dtype."""
    x = torch.randn(4, 8).to(dtype)
    got = Rotation(FREQ).rotate(x, 12_345)
    want = Rotation(FREQ).rotate(x.double(), 12_345)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max()) <= 4 * torch.finfo(dtype).eps * float(want.abs().max())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 6])
def test_fit_finds_pairing_and_place_of_the_rotation(interleaved: bool, start: int) -> None:
    """Reference: the rotation that made the samples; a decoy of other frequencies is beside it."""
    true = Rotation(FREQ, start, interleaved)
    x = torch.randn(2, 14, dtype=torch.float64)
    offsets = [0, 1, 2, 7, 31]
    samples = torch.stack([true.rotate(x, offset) for offset in offsets])
    found, residual = fit(samples, offsets, [FREQ * 1.01, FREQ, FREQ[:3]])
    assert found is not None
    assert (found.start, found.interleaved) == (start, interleaved)
    assert torch.equal(found.inv_freq, FREQ)
    assert residual < 1e-12
    assert found.describe() == f"{'interleaved' if interleaved else 'half-split'} {start}:{start + 8}"


def test_fit_says_that_samples_stand_still() -> None:
    """Reference: equal samples need no rotation."""
    samples = torch.randn(1, 2, 8).expand(4, 2, 8)
    assert fit(samples, [0, 1, 2, 3], [FREQ]) == (None, 0.0)


def test_fit_admits_by_its_residual_that_nothing_explains_the_samples() -> None:
    """Reference: independent noise at each position, as far from any rotation as can be."""
    _, residual = fit(torch.randn(4, 2, 8), [0, 1, 2, 3], [FREQ, FREQ[:2]])
    assert residual > 0.3
