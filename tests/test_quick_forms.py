"""The quick forms give what torch gives, and leave alone what they were not made for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from streamllm import quick_forms
from streamllm.quick_forms import QuickForms

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative to the largest number; torch adds up in float32 and rounds once, the forms round every product."""

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_close(found: Tensor, want: Tensor) -> None:
    assert (found.shape, found.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(found, want, rtol=0, atol=TOLERANCE[want.dtype] * float(want.abs().max()))


class Counted:
    """Counts how often a form found its own way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, func: Callable[..., Tensor]) -> None:
        self.own = 0

        def count(form: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
            def counted(*args: object, **kwargs: object) -> Tensor | None:
                found = form(*args, **kwargs)
                self.own += found is not None
                return found

            return counted

        for forms in (quick_forms._FORMS, quick_forms._LOOPS):
            if func in forms:
                monkeypatch.setitem(forms, func, tuple(map(count, forms[func])))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- linear layers


def test_gradients_are_left_to_torch() -> None:
    """Reference: torch's own gradient; oneDNN's product, as it is called here, has none."""
    weight = draw(4, 8).requires_grad_()
    with torch.enable_grad(), QuickForms():
        functional.linear(draw(3, 8), weight).sum().backward()
    assert torch.equal(weight.grad, draw(3, 8).sum(0).expand(4, -1))


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_equal_torchs_own(
    dtype: torch.dtype, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: ``torch.nn.functional.linear`` in the same dtype, for rows as one, two or three dimensions."""
    counted = Counted(monkeypatch, functional.linear)
    weight, added = draw(33, 70, dtype=dtype), draw(33, dtype=dtype, seed=1) if bias else None
    states = draw(rows, 70, dtype=dtype, seed=2)
    for x in [states, states[:, None], states[None], *([states[0]] if rows == 1 else [])]:
        with QuickForms(loops=True):
            found = functional.linear(x, weight, added)
            named = functional.linear(input=x, weight=weight, bias=added)
        want = functional.linear(x, weight, added)
        check_close(found, want)
        assert torch.equal(named, found)
    assert (counted.own > 0) == (rows == 1 or dtype == torch.float32)
    before = counted.own
    with QuickForms():  # without loops: by oneDNN alone
        check_close(functional.linear(states, weight, added), want.view(rows, -1))
    assert (counted.own > before) == (dtype == torch.float32 and rows > quick_forms.ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer_is_as_near_to_the_exact_sum_as_torchs_own(dtype: torch.dtype) -> None:
    """Reference: the sum in float64; twice torch's own error is allowed, and a rounding of the dtype."""
    weight, x = draw(200, 512, dtype=dtype), draw(1, 512, dtype=dtype, seed=1)
    exact = functional.linear(x.double(), weight.double())
    with QuickForms(loops=True):
        found = functional.linear(x, weight)
    allowed = (functional.linear(x, weight).double() - exact).abs().max() * 2 + torch.finfo(dtype).eps
    assert (found.double() - exact).abs().max() <= allowed


def test_modules_are_read_by_the_form_and_only_while_the_mode_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a count of what the form was asked for."""
    counted = Counted(monkeypatch, functional.linear)
    layer, x = torch.nn.Linear(8, 4).requires_grad_(False), draw(1, 8)
    want = layer(x)
    assert counted.own == 0
    with QuickForms(loops=True):
        check_close(layer(x), want)
    assert counted.own == 1
    layer(x)
    assert counted.own == 1


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (draw(0, 8), draw(4, 8)),
        (draw(2, 8, dtype=torch.float64), draw(4, 8, dtype=torch.float64)),
        (draw(2, 8, dtype=torch.bfloat16), draw(4, 8, dtype=torch.bfloat16)),
        (torch.arange(8)[None], torch.arange(32).view(4, 8)),
        (draw(3, 8), draw(8)),
        (draw(1, 8), draw(8)),
    ],
    ids=["no rows", "float64", "bfloat16", "integers", "a vector", "a vector for one row"],
)
def test_linear_layers_of_other_kinds_are_left_alone(
    x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: torch's own, bit for bit."""
    counted = Counted(monkeypatch, functional.linear)
    want = functional.linear(x, weight)
    with QuickForms(loops=True):
        assert torch.equal(functional.linear(x, weight), want)
    assert counted.own == 0


def test_what_torch_refuses_is_refused_by_torch() -> None:
    """Reference: torch's own error."""
    for x, weight in [(draw(1, 8), draw(4, 8, dtype=torch.float64)), (draw(2, 7), draw(4, 8))]:
        with QuickForms(loops=True), pytest.raises(RuntimeError):
            functional.linear(x, weight)


# ---- attention


def cached(dtype: torch.dtype, heads: int = 8, groups: int = 2, value: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """One query in each of three rows over 21 columns."""
    return (
        draw(3, heads, 1, 16, dtype=dtype),
        draw(3, groups, 21, 16, dtype=dtype, seed=1),
        draw(3, groups, 21, value, dtype=dtype, seed=2),
    )


def masked(dtype: torch.dtype, shape: tuple[int, ...] = (3, 1, 1, 21)) -> Tensor:
    """As a step makes it: the smallest number where a column is hidden."""
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.5
    return torch.zeros(shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


@dtypes
@pytest.mark.parametrize(("heads", "groups", "value"), [(8, 8, 16), (8, 2, 16), (4, 1, 16), (4, 4, 6)])
@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_equals_torchs_own(
    dtype: torch.dtype,
    heads: int,
    groups: int,
    value: int,
    has_mask: bool,
    scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reference: ``scaled_dot_product_attention`` over keys and values repeated for each head of queries."""
    counted = Counted(monkeypatch, functional.scaled_dot_product_attention)
    query, keys, values = cached(dtype, heads, groups, value)
    mask = masked(dtype) if has_mask else None
    repeated = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (keys, values))
    want = functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=scale)
    with QuickForms(loops=True):
        found = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=heads != groups
        )
    check_close(found, want)
    assert counted.own == 1


def test_attention_hides_whatever_is_hidden() -> None:
    """Reference: the columns that are shown, alone; the largest keys and values are hidden."""
    query, keys, values = cached(torch.float32)
    mask = torch.zeros(3, 1, 1, 21)
    mask[..., 5:] = torch.finfo(torch.float32).min
    keys[:, :, 5:] *= 1e6
    values[:, :, 5:] = 1e30
    with QuickForms(loops=True):
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        want = functional.scaled_dot_product_attention(query, keys[:, :, :5], values[:, :, :5], enable_gqa=True)
    check_close(found, want)


@pytest.mark.parametrize(
    "change",
    [
        {"query": draw(3, 8, 2, 16)},
        {"attn_mask": torch.rand(3, 1, 1, 21) < 0.5},
        {"attn_mask": masked(torch.float32, (3, 8, 1, 21))},
        {"attn_mask": masked(torch.float32, (1, 21))},
        {"is_causal": True},
        {"query": draw(24, 1, 16), "key": draw(24, 21, 16), "value": draw(24, 21, 16), "enable_gqa": False},
        {"query": draw(3, 2, 1, 16), "key": draw(1, 2, 21, 16), "value": draw(1, 2, 21, 16), "enable_gqa": False},
    ],
    ids=["queries", "boolean mask", "mask by head", "flat mask", "causal", "three dimensions", "one row of keys"],
)
def test_attention_of_other_kinds_is_left_alone(change: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: torch's own, bit for bit."""
    counted = Counted(monkeypatch, functional.scaled_dot_product_attention)
    query, key, value = cached(torch.float32)
    given = {"query": query, "key": key, "value": value, "enable_gqa": True, **change}
    want = functional.scaled_dot_product_attention(**given)
    with QuickForms(loops=True):
        assert torch.equal(functional.scaled_dot_product_attention(**given), want)
    assert counted.own == 0


def test_dropout_and_heads_that_do_not_fit_are_torchs_own_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a count, and torch's own error for groups of heads that nobody asked for."""
    counted = Counted(monkeypatch, functional.scaled_dot_product_attention)
    query, keys, values = cached(torch.float32)
    with QuickForms(loops=True):
        functional.scaled_dot_product_attention(query, keys, values, dropout_p=0.5, enable_gqa=True)
        with pytest.raises(RuntimeError):
            functional.scaled_dot_product_attention(query, keys, values)
    assert counted.own == 0


def test_prompts_of_all_lengths_are_few_shapes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: torch's own product; oneDNN keeps code for each number of rows that it ever saw."""
    weight, seen = draw(5, 8), set()

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.add(len(rows))
        return functional.linear(rows, weight, bias)

    monkeypatch.setattr(quick_forms, "_onednn", product)
    for rows in range(2, 200):
        x = draw(rows, 8, seed=rows)
        with QuickForms():
            found = functional.linear(x, weight)
        check_close(found, x @ weight.T)
    assert seen == {64, 96, 128, 160, 192, 224}


# ---- packed weights


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_of_packed_weights_equals_torchs_own_kernel(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the kernel itself, which rounds its result to bf16 as the form does; more rows are left to it."""
    codes = torch.randint(-127, 128, (48, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale, x = draw(48, dtype=torch.bfloat16).abs(), draw(rows, 64, dtype=torch.bfloat16, seed=2)
    want = torch._weight_int8pack_mm(x, codes, scale)
    counted = Counted(monkeypatch, torch._weight_int8pack_mm)
    with QuickForms(loops=True):
        found = torch._weight_int8pack_mm(x, codes, scale)
    check_close(found, want)
    assert counted.own == (rows == 1)
    with QuickForms():
        torch._weight_int8pack_mm(x, codes, scale)
    assert counted.own == (rows == 1)
