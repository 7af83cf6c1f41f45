"""The error budget of the numerical contract: a kernel may be no further from float64 than twice the same formula in float32."""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of each value in dtype: what one rounding may cost."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(exact, info.eps / 4), exponent.to(torch.int32))


def assert_within_budget(name: str, actual: Tensor, working: Tensor, exact: Tensor, *, factor: float = 2.0, rounded_to: torch.dtype | None = None):
    """max|actual - exact| <= factor (max|working - exact| + eps32 max|exact|), plus half an ulp where a gradient was rounded to a dtype.

    working is the reference in float32 and exact the reference in float64, both from the SAME inputs as actual. What is not finite
    must be so in the same places and with the same sign; float64 results are held to float64's own rounding.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    eps = torch.finfo(torch.float64).eps * 8 if actual.dtype == torch.float64 and rounded_to in (None, torch.float64) else EPS32
    actual, working, exact = (x.detach().double() for x in (actual, working, exact))
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}, not finite: {m}")
    actual, working, exact = actual[finite], working[finite], exact[finite]
    if exact.numel() == 0:
        return
    budget = factor * ((working - exact).abs().max() + eps * exact.abs().max())
    if rounded_to is not None and rounded_to != torch.float64:
        budget = budget + half_ulp(exact, rounded_to)
    excess = (actual - exact).abs() - budget
    assert excess.max() <= 0, f"{name}: error {(actual - exact).abs().max():.3e}, {excess.max():.3e} over the budget"
